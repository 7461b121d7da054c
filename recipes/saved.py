"""Recipes in files: as JSON and in checkpoints; how two differ, and which one evaluates a checkpoint."""
import json
import typing
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal

from recipes.fields import UNIONS, Recipe
from recipes.imagenet import TESTED_BY, Classification
from recipes.rows import recipe_class
from utils import UserError, nearest


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON and checkpoints hold it. A classifier's has no entry `task`, as in the first release."""
    task = {} if type(recipe) is Classification else {'task': recipe.task}
    return task | {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(recipe).items()}


def from_dict(values: dict[str, Any]) -> Recipe:
    """A recipe from what `to_dict` makes of it. Raises UserError for anything else."""
    values = dict(values)
    kind = recipe_class(values.pop('task', Classification.task))
    known = {field.name for field in fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise UserError(f'this is no recipe of this project: it has an unknown field '
                        f'{unknown[0]}{nearest(unknown[0], known)}')
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        if not _fits(value, hints[name]):
            raise UserError(f'this is no recipe of this project: {value!r} cannot be the value of {name}')
    return kind(**values)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a field's type."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in UNIONS:
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        inner = inner[:1] * len(value) if isinstance(value, tuple) and inner[-1] is Ellipsis else inner
        return isinstance(value, tuple) and len(value) == len(inner) and all(map(_fits, value, inner))
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, origin or kind)


def check_parts(recipe: Recipe, given: Iterable[str]) -> None:
    """Refuses fields for a part that the recipe's model does not have. Raises UserError."""
    useless = [name for name in recipe.useless(recipe.model) if name in given]
    if useless and recipe.model:  # without a name, the checkpoint will say it
        raise UserError(f'--{useless[0]} is for MogaNet models; {recipe.model} has no such part')


def of_weights(meta: dict[str, Any], gate: str | None, asked: Recipe, given: tuple[str, ...]) -> Recipe:
    """The recipe by which a checkpoint is to be evaluated.

    This is the recipe in the file, where there is one; else the one asked for, with the test settings and the gate that
    the file or the table of released files knows. What the command line gives overrides both.

    Args:
        meta: what `models.weights.load_weights` found out about the file.
        gate: the gate it was trained with, where that is known.
        asked: the recipe of the command line.
        given: the names of its fields that were given there.

    Raises:
        UserError: where neither the file nor the command line says which model it is, or the file says nonsense.
    """
    recipe = from_dict(meta['recipe']) if isinstance(meta.get('recipe'), dict) else asked
    known = {name: meta[name] for name in TESTED_BY if meta.get(name) is not None and hasattr(recipe, name)}
    if gate is not None and hasattr(recipe, 'gate'):
        known['gate'] = gate
    if recipe is asked and recipe.model:  # --model or --recipe says it
        known.pop('model', None)
    known = {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()
             if name not in given}
    hints = typing.get_type_hints(type(recipe))
    for name, value in known.items():
        if not _fits(value, hints[name]):
            raise UserError(f'the checkpoint says {name} {value!r}, which cannot be; give --{name}')
    if foreign := [name for name in given if not hasattr(recipe, name)]:
        raise UserError(f'--{foreign[0]} is no field of {recipe.name}, the recipe that the checkpoint was trained by; '
                        'leave it out')
    recipe = replace(recipe, **known, **{name: getattr(asked, name) for name in given})
    if not recipe.model:
        raise UserError('the checkpoint does not say which model it is; give --model NAME')
    check_parts(recipe, given)
    return recipe


def load_recipe(path: str) -> Recipe:
    """The recipe in a `recipe.json`. Raises UserError where there is none."""
    try:
        values = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f'--config {path} cannot be read ({error}); give the recipe.json of a run') from None
    if not isinstance(values, dict):
        raise UserError(f'--config {path} holds no recipe; give the recipe.json of a run')
    return from_dict(values)


def differences(old: Recipe, new: Recipe) -> list[str]:
    """The fields in which two recipes compute something else, as `name: old -> new`."""
    if type(old) is not type(new):
        return [f'task: {old.task} -> {new.task}']
    return [f'{field.name}: {getattr(old, field.name)} -> {getattr(new, field.name)}' for field in fields(old)
            if field.name not in old.descriptive and getattr(old, field.name) != getattr(new, field.name)]
