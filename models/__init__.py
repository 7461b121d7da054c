"""MogaNet for timm: importing this package registers the six variants with `timm.create_model`."""
from models import moganet as moganet
