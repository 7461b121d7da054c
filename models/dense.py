"""Detectors and segmentors by the names of their rows, and by recipes. A row is in `recipes`, alone."""
from collections.abc import Mapping
from typing import Any

from timm.layers import convert_sync_batchnorm  # torch's drops the activation of timm's BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.detection import RetinaNet
from models.segmentation import SemanticFPN, UPerNet
from recipes import RECIPES
from recipes.dense import Dense
from utils import UserError, nearest, reason_of

# By the recipes' `network`
NETWORKS: dict[str, type[nn.Module]] = {'retinanet': RetinaNet, 'semantic_fpn': SemanticFPN, 'upernet': UPerNet}


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


def synchronise_norms(model: nn.Module, *, backbone: bool) -> nn.Module:
    """Makes the batch norms of the heads, and of the backbone too where asked, take the statistics of all ranks.

    Raises:
        UserError: there is none.
    """
    found = False
    for name, part in model.named_children():
        if (backbone or name != 'backbone') and any(isinstance(module, _BatchNorm) for module in part.modules()):
            setattr(model, name, convert_sync_batchnorm(part))
            found = True
    if not found:
        raise UserError('--sync_bn: the heads of this network have no batch norm; say --sync_bn_backbone too for those '
                        'of the backbone, or leave it out')
    return model
