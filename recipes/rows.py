"""The rows of every task by name, and the class of a recipe by the task that it names."""
from recipes import ade20k, coco, imagenet
from recipes.fields import Recipe
from utils import UserError, nearest

RECIPES: dict[str, Recipe] = {row.name: row for row in (*imagenet.ROWS, *coco.ROWS, *ade20k.ROWS)}


def recipe_class(task: str) -> type[Recipe]:
    """The class of the recipes of a task. Only the tasks of known rows: a file must not name code to be run.

    Raises:
        UserError: where no row is of that task.
    """
    known = {type(row).task: type(row) for row in RECIPES.values()}
    if task not in known:
        raise UserError(f'no recipe is of the task {task}{nearest(str(task), known)}; update this project')
    return known[task]
