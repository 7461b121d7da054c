"""MogaNet for timm: importing this package registers the six variants with `timm.create_model`, and the released files
as their pretrained weights. `create_model` makes every classifier of this project, `create_dense` every detector and
segmentor.
"""
from torch import Tensor

from models import moganet
from models.build import create_model as create_model
from models.dense import create_dense as create_dense
from models.released import pretrained_cfgs
from models.weights import load_weights


def _read(source: str) -> tuple[dict[str, Tensor], moganet.Gate | None]:
    weights = load_weights(source)
    return weights.state_dict, weights.gate


moganet.register(pretrained_cfgs(), _read)
