"""The effective batch belongs to the recipe, the GPUs to the run: micro-batch and accumulation are derived."""
from dataclasses import replace

from recipes.fields import Recipe, Run
from utils import UserError


def fit_batch(recipe: Recipe, run: Run) -> Run:
    """Derives micro-batch and accumulation so that world size x micro-batch x micro-steps is the recipe's batch.

    The effective batch belongs to the recipe, the GPUs to the run. What the user gives is kept; the rest is derived:
    the largest micro-batch up to the recipe's own that divides the batch, then the micro-steps.

    Raises:
        UserError: where it does not come out, with the arithmetic and the cures.
    """
    total, world = recipe.total_batch_size, run.world_size
    if run.batch_size == 'auto':  # found by trial once the model stands on the device
        return run
    given = f'{world} process{"es" if world > 1 else ""}'
    micro, steps = run.batch_size, run.update_freq
    if micro is None:
        share = total // (world * steps) if steps else total // world
        limit = share if steps else min(share, recipe.micro_batch_size)
        micro = next((size for size in range(limit, 0, -1) if total % (world * size) == 0), max(share, 1))
    if steps is None:
        steps = max(total // (world * micro), 1)
    product = world * micro * steps
    if product != total:
        raise UserError(
            f'{given} x micro-batch {micro} x {steps} micro-step{"s" if steps > 1 else ""} = {product} images per '
            f"update, but the recipe's batch is {total}: {_cures(recipe, run, micro, steps)}")
    recipe.check_micro_batch(micro)
    return replace(run, batch_size=micro, update_freq=steps)


def _cures(recipe: Recipe, run: Run, micro: int, steps: int) -> str:
    """The two ways out of a batch that does not come out."""
    total, world = recipe.total_batch_size, run.world_size
    other = f'train with another batch by --total_batch_size {world * micro * steps} (and think of --scale_lr)'
    fixed = world * (run.update_freq or 1)
    if total % fixed:
        return f'{total} cannot be divided by {fixed}, so change the number of processes or --update_freq, or {other}'
    fitting = [size for size in range(1, total // fixed + 1) if total % (fixed * size) == 0]
    if run.update_freq:
        fitting = [total // fixed]
    best = min(fitting, key=lambda size: abs(size - micro))
    return f'give --batch_size {best}, or {other}'
