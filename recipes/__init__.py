"""Recipes and runs: all that a command line can say, without torch.

`fields.py` has what all tasks share, and `dense.py` what detectors and segmentors share. `imagenet.py`, `coco.py` and
`ade20k.py` each have the fields and the rows of one task. `command_line.py` turns words into a recipe and a run.
"""
from recipes.batch import fit_batch as fit_batch
from recipes.command_line import check_start as check_start
from recipes.command_line import resolve as resolve
from recipes.fields import Recipe as Recipe
from recipes.fields import Run as Run
from recipes.imagenet import Classification as Classification
from recipes.imagenet import is_moganet as is_moganet
from recipes.imagenet import names_file as names_file
from recipes.rows import RECIPES as RECIPES
from recipes.saved import differences as differences
from recipes.saved import from_dict as from_dict
from recipes.saved import of_weights as of_weights
from recipes.saved import to_dict as to_dict
