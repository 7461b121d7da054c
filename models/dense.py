"""Detectors and segmentors by the names of their rows, and by recipes. A row is in `recipes`, alone."""
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from models.detection import RetinaNet
from models.rcnn import CascadeMaskRCNN, CascadeMaskRCNNGIoU, MaskRCNN
from models.segmentation import SemanticFPN, UPerNet
from recipes import RECIPES
from recipes.dense import Dense
from utils import UserError, nearest, reason_of

# By the recipes' `network`
NETWORKS: dict[str, type[nn.Module]] = {
    'retinanet': RetinaNet, 'mask_rcnn': MaskRCNN, 'cascade_mask_rcnn': CascadeMaskRCNN,
    'cascade_mask_rcnn_giou': CascadeMaskRCNNGIoU, 'semantic_fpn': SemanticFPN, 'upernet': UPerNet}


def build_dense(recipe: Dense, *, num_classes: int, **kwargs: Any) -> nn.Module:
    """The network of a recipe, with fresh weights.

    Args:
        num_classes: classes, the background not counted.
        kwargs: further arguments, which win over the recipe's: of the network, and of its backbone.

    Raises:
        UserError: arguments with which it cannot be.
    """
    try:
        model = NETWORKS[recipe.network](recipe.model, num_classes=num_classes,
                                         **recipe.network_kwargs | recipe.model_kwargs | kwargs)
    except (TypeError, ValueError, RuntimeError) as error:  # of values that a layer cannot have
        raise UserError(f'{recipe.name} cannot be built ({reason_of(error)[:200]}); see --network_kwargs') from None
    # As timm's: what a message calls the model, and what is renewed for other classes
    model.pretrained_cfg = {'architecture': recipe.name, 'classifier': tuple(model.LAST)}
    return model


def create_dense(row: str, num_classes: int | None = None, **kwargs: Any) -> nn.Module:
    """The network of a row by the row's name, without the row's drop path, which is a value of its training.

    Args:
        row: such as `retinanet_moganet_xtiny_1x` or `upernet_moganet_tiny_160k`.
        num_classes: classes, a detector's background not counted; those of the row's data set by default, COCO's 80
            or ADE20K's 150.
        kwargs: as the network takes them; what it does not know is the backbone's, such as `drop_path_rate`.

    Raises:
        UserError: for an unknown row, or arguments with which it cannot be.
    """
    rows = {name: recipe for name, recipe in RECIPES.items() if isinstance(recipe, Dense)}
    if row not in rows:
        raise UserError(f'unknown dense model {row}{nearest(row, rows)}')
    return build_dense(rows[row], num_classes=num_classes or rows[row].known_classes, **kwargs)


def classes_of_dense(state_dict: Mapping[str, Tensor], recipe: Dense) -> int:
    """The classes that the weights of a recipe's network tell apart; 0 where its last layer is not among them."""
    layer, (each, further) = next(iter(NETWORKS[recipe.network].LAST.items()))
    bias = state_dict.get(f'{layer}.bias')
    return 0 if bias is None else (len(bias) - further) // each
