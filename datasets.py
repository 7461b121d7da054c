"""The training and evaluation loaders of a run, for any task; and the door to Hugging Face's package `datasets`."""
import importlib
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.files import indexing
from pipeline.loaders import TrainLoader, ValLoader
from recipes import Run
from utils import UserError, log


def __getattr__(name: str) -> Any:
    """Lets the Hugging Face package `datasets` be found through this module, which bears its name.

    Its users (timm's `hfds/` readers) write `import datasets` and get us: they find its submodules on `__path__`, and
    all its other names here.
    """
    if name.startswith('__') and name != '__path__':
        raise AttributeError(name)
    here = os.path.dirname(os.path.abspath(__file__))
    elsewhere = [path for path in sys.path if os.path.abspath(path or '.') != here]
    if name == '__path__':
        spec = importlib.machinery.PathFinder.find_spec(__name__, elsewhere)
        if spec is None or spec.submodule_search_locations is None:
            raise AttributeError(name)
        return list(spec.submodule_search_locations)
    package = globals().get('_hugging_face')
    if package is None:
        ours, path = sys.modules.pop(__name__), sys.path[:]
        sys.path[:] = elsewhere
        try:
            package = importlib.import_module(__name__)
        except ModuleNotFoundError as error:
            raise AttributeError(f'module {__name__} has no attribute {name}') from error
        finally:
            sys.modules[__name__], sys.path[:] = ours, path
        globals()['_hugging_face'] = package
    return getattr(package, name)


@dataclass
class Loaders:
    """What a run reads; None for a half that was not asked for."""

    train: TrainLoader | None
    val: ValLoader | None
    plain: ValLoader | None = None  # the training images, in order and as the test images

    def close(self) -> None:
        """Ends the worker processes."""
        for loader in (self.train, self.val, self.plain):
            if loader is not None:
                loader.close()


def build_loaders(task: Any, run: Run, *, rank: int = 0, device: torch.device | str = 'cpu',
                  splits: Sequence[str] = ('train', 'val'), augmented: bool = True) -> Loaders:
    """The loaders of a run; the task learns its classes and their number from the data.

    Args:
        task: a `tasks.Task`.
        run: with `batch_size` and `update_freq` resolved, where it trains.
        rank: of this process among `run.world_size`.
        device: where the batches are wanted.
        splits: 'train', 'val' or both.
        augmented: whether the training images come as `train`, to be trained on, else as `plain`.

    Raises:
        UserError: for data that is missing, too small or does not fit the recipe, with the cure.
    """
    with indexing():
        train, val = (task.open(split) if split in splits else None for split in ('train', 'val'))
    errors, warnings = task.check_data(train, val)
    for warning in warnings if rank == 0 else ():
        log.warning('%s', warning)
    if errors:
        raise UserError(errors[0])
    task.learn_classes([source for source in (train, val) if source is not None])
    others = {'rank': rank, 'device': torch.device(device)}
    return Loaders(TrainLoader(train, task, run, **others) if train is not None and augmented else None,
                   None if val is None else ValLoader(val, task, run, **others),
                   ValLoader(train, task, run, **others) if train is not None and not augmented else None)
