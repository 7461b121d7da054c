"""The teacher of a distillation (`--teacher`): a released file, a checkpoint of any known format, or a timm model."""
import dataclasses
import hashlib
from typing import Any

import torch
from torch import nn

import utils
from models.released import RELEASED
from models.weights import Weights, load_weights
from pipeline import labels
from recipes import RECIPES, Classification, Recipe, Run, is_moganet, names_file
from tasks.distillation import Teacher
from training.evaluation import build_task, recipe_of
from utils import UserError, log


def find_teacher(recipe: Recipe, run: Run, device: torch.device, *, loading: bool = True) -> Teacher | None:
    """The recipe's teacher on the device; None where the recipe has none.

    Args:
        run: settled (`start.settle_arithmetic`).
        loading: whether it needs its weights, and not only its shape; then nothing is downloaded.

    Raises:
        UserError: for a source that cannot be read, does not say its architecture, or is no classifier of the
            recipe's classes and size of images.
    """
    if not isinstance(recipe, Classification) or recipe.teacher is None:
        return None
    source = recipe.teacher
    try:
        teacher = _build(source, recipe, run, device, loading)
    except UserError as error:
        reason = str(error)
        raise UserError(f'--teacher {reason if reason.startswith(source) else f"{source}: {reason}"}') from None
    if recipe.num_classes is not None:
        teacher.learn_classes((), recipe.num_classes)
    return teacher


def _build(source: str, recipe: Classification, run: Run, device: torch.device, loading: bool) -> Teacher:
    if not names_file(source) and is_moganet(source):
        source = f'released:{source}'
    name, weights = source, None
    if source.removeprefix('released:') in RELEASED and not loading:
        name = RELEASED[source.removeprefix('released:')].model
    elif names_file(source):
        name, weights = '', _load(source, loading)
    own = Run(eval=True, channels_last=run.channels_last, tf32=run.tf32, given=('test_size',))
    asked = RECIPES['default']
    assert isinstance(asked, Classification)
    asked = dataclasses.replace(asked, model=name, test_size=recipe.input_size)
    found, _ = recipe_of(weights, asked, own)
    task, model = build_task(weights, dataclasses.replace(found, sync_bn=False), own, device,
                             pretrained=weights is None and loading)
    classes = labels.known_names(weights.meta.get('classes')) if weights is not None else []
    about = (found.model, found.arguments() | found.model_kwargs, found.mean, found.std, classes)
    digest = digest_of(model, about) if loading else ''
    if loading:
        log.info('The teacher: %s, %s, SHA-256 %s', weights or f"timm's weights of {found.model}", found.model, digest)
    return Teacher(model, task.recipe, recipe=recipe, classes=classes, digest=digest)


def _load(source: str, loading: bool) -> Weights:
    """The weights of a file or an address. Raises UserError where they are of no classifier, or do not say of which."""
    if not loading and '://' in source:
        raise UserError('--plan downloads nothing; give a file, released:NAME or the name of a timm model')
    with utils.rank_zero_first('teacher'):  # it may be a download
        weights = load_weights(source)
    kind = (weights.meta.get('recipe') or {}).get('task', Classification.task)
    if weights.dense or kind != Classification.task:
        raise UserError('tells no classes of whole images apart; give a classifier')
    if not weights.meta.get('model'):
        raise UserError('does not say which model it is of; give a checkpoint that does, as one of a training, or '
                        'released:NAME')
    return weights


def digest_of(model: nn.Module, about: Any) -> str:
    """SHA-256 of a model's parameters and buffers, and of what else decides its answers."""
    found = hashlib.sha256(repr(about).encode())
    for name, value in model.state_dict().items():
        found.update(f'{name} {value.dtype} {tuple(value.shape)}'.encode())
        found.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()
