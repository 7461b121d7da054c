"""What a task is: data, model, loss and metric for one kind of target. The engine and the loaders receive it.

A task is a class that a recipe's class names (`Recipe.task`); `create_task` makes it. What it gives, who asks for it:

    open(split), check_data              the data path       where the samples are, and whether they fit one another
    sample(item, seed), collate          a worker            one augmented sample; samples to a batch
    finish(batch, device, position)      the device          a worker's batch to the model's input
    build_model()                        all                 the recipe's model, with its initial weights
    loss(model, batch), losses           the training step   named losses, whose sum is minimised
    metric()                             evaluation          `update(models, batch)`, then `result()`
    forward(model, batch)                measurements        a forward pass alone
    example_batch(size, device)          DDP, auto batch     a fixed batch in which there is something to learn
    prepare, predict, draw, to_json      predict.py          images, for people and for programs
"""
import dataclasses
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import optim_factory
from pipeline import labels
from pipeline.augmentation import Picture, decode
from pipeline.files import Split
from pipeline.loaders import Loaded, Position, Sample, Source
from recipes import Recipe, Run
from tasks import pictures
from utils import UserError, log

Data = TypeVar('Data', bound=Source)  # the data set of a task; an IterableImageDataset of timm, too
Taken = TypeVar('Taken', contravariant=True)  # the model's input, where it is only taken
Input = TypeVar('Input', bound='Batch')  # what the model takes


def _map(value: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map(item, change) for item in value)
    return value


@dataclasses.dataclass
class Batch:
    """A micro-batch: a task's dataclass of tensors, also nested in lists and dicts. `len` is the number of images."""

    images: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def _map(self: Input, change: Callable[[Tensor], Any]) -> Input:
        return dataclasses.replace(self, **{field.name: _map(getattr(self, field.name), change)
                                            for field in dataclasses.fields(self)})

    def to(self: Input, device: torch.device) -> Input:
        """The batch on a device, copied without waiting where the memory is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self: Input) -> Input:
        """The batch in pinned memory; torch's DataLoader calls it."""
        return self._map(lambda tensor: tensor.pin_memory())

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keeps the tensors' memory until a CUDA stream has used it."""
        self._map(lambda tensor: tensor.record_stream(stream))


class Metric(Protocol[Taken]):
    """The sums of an evaluation over several models in one pass over the data."""

    def update(self, models: dict[str, nn.Module], batch: Taken, /) -> None:
        """Adds a batch; `models`, the same each time, are in evaluation mode."""

    def result(self, models: Sequence[str], /) -> dict[str, dict[str, Any]]:
        """The values of all ranks together by model: 'count' of images, the recipe's `metrics`, and what else there is.

        Where the metric is detailed, 'right' may say which images are right, bool [images] in the order of the source,
        by which two models are compared, and 'classes' may be rows of a table, a dict each; they go to files.
        Every rank calls it, also one that had no batch.
        """


class Task(Generic[Data, Sample, Loaded, Input]):
    """What all tasks share. A task of one's own derives from it, in a file of its own.

    It is generic in its data set, in what a worker makes of an item and of some, and in the model's input.

    Attributes:
        recipe: with `num_classes` resolved once the data is known.
        classes: names by label, empty where the source does not know them.
        class_map: labels by class name, where the user gave a map.
        trained: the names of the classes that a checkpoint was trained on, by label; they decide over the data's.
        resumed: whether the run goes on from that checkpoint, so that the data must have its classes.
        teacher: a trained network that the loss asks too, where the recipe names one.
        class_cure: what a user does about classes of the data that are none of the model's.
        losses: names of the single losses that the log shows beside their sum; () where there is but one.
    """

    losses: tuple[str, ...] = ()
    class_cure = ('rename or remove their folders, or say which classes they are by --valid_labels FILE or '
                  '--class_map FILE')

    def __init__(self, recipe: Recipe, run: Run):
        self.recipe, self.run = recipe, run
        self.classes: list[str] = []
        self.class_map: dict[str, int] | None = None
        self.trained: Sequence[str] = ()
        self.trained_map: dict[str, int] | None = None
        self.resumed = False
        self.teacher: Any = None

    # ---- Data

    def open(self, split: Split) -> Data:
        """The source of 'train' or 'val': `len`, `read(i)`, `name(i)`; or timm's IterableImageDataset.

        Raises:
            UserError: where there is nothing, with the path and the cure.
        """
        raise NotImplementedError

    def check_data(self, train: Data | None, val: Data | None) -> tuple[list[str], list[str]]:
        """Errors and warnings about the sources (None: not opened); each line names the path and the cure."""
        return [], []

    def class_names(self, source: Data) -> list[str]:
        """The names of a source's classes by label, empty where it does not know them."""
        return list(getattr(source, 'classes', ()))

    def learn_classes(self, sources: Sequence[Data]) -> None:
        """Takes the names and the number of the classes from the first source that knows them.

        Where a checkpoint's own names decide, the sources number their images by those.

        Raises:
            UserError: where neither the data nor the recipe says how many there are, the data has more, or a run goes
                on with other classes.
        """
        ours = next(filter(None, map(self.class_names, sources)), [])
        self.class_map = next(filter(None, (getattr(source, 'class_map', None) for source in sources)), None)
        if self.run.eval and self.trained_map and self.class_map != self.trained_map:
            raise UserError(f'the checkpoint was trained with {"another" if self.class_map else "a"} --class_map '
                            f'({labels.some(list(self.trained_map))}); give its file by --class_map')
        self.classes, order = self._decide_classes(ours)
        for source in sources if self.classes else ():
            names = self.class_names(source)
            if self.run.class_map or names == self.classes:
                continue
            if lost := labels.lacking(names, self.classes):
                raise UserError(f'{len(lost)} of the classes of one half of the data ({labels.some(lost)}) are none of '
                                f'{labels.some(self.classes)}; make both halves hold the same classes')
            if labels.find(names, self.classes) != list(range(len(names))):
                if not hasattr(source, 'relabel'):
                    raise UserError(f'--data_set {self.recipe.data_set} numbers its classes in another order '
                                    f'({labels.some(names)}) than {labels.some(self.classes)}; restore the data')
                source.relabel(self.classes)
        if ours:
            log.info('%d classes, numbered by %s: %s', len(self.classes), order, labels.some(self.classes))
        number = self.recipe.num_classes or len(self.classes)
        if not number:
            raise UserError(f'--data_set {self.recipe.data_set} does not say how many classes it has; give '
                            '--num_classes')
        if len(self.classes) > number:
            cure = (f'evaluate a checkpoint on the data it was trained for, or {self.class_cure}' if self.run.eval else
                    'leave the flag out')
            raise UserError(f'--num_classes {number}, but the data has {len(self.classes)} classes; {cure}')
        self.recipe = dataclasses.replace(self.recipe, num_classes=number)

    def _decide_classes(self, ours: list[str]) -> tuple[list[str], str]:
        """The names of the classes by label, and what orders them. Raises UserError.

        Args:
            ours: the data's classes, in their own order.
        """
        trained, number, chosen = list(self.trained), self.recipe.num_classes, self.run.class_map
        if self.run.eval and ours and number and not (chosen or self.run.valid_labels):
            if found := labels.classes_of_model(ours, trained, number, cure=self.class_cure):
                return found
        elif trained and ours and not self.run.eval:
            apart = labels.difference(ours, trained, we='the data', they='the checkpoint')
            if chosen and self.class_map and trained == sorted(self.class_map, key=self.class_map.get):
                return trained, '--class_map'  # checkpoints have long counted the names of a map, and not its labels
            if self.resumed and (apart or (chosen and ours != trained)):
                raise UserError(f'the classes changed since the checkpoint was written: {apart or "their order"}; '
                                'restore the data and how its classes are named, or begin anew from the weights by '
                                '--finetune and another --output_dir')
            if not (apart or chosen):  # the head of the weights has this order
                return trained, 'the checkpoint'
        return ours, '--class_map' if chosen else 'their numbers' if (
            labels.are_numbers(ours) and ours == labels.in_order(ours)) else 'their sorted names'

    def balance(self, source: Data) -> np.ndarray | None:
        """The class of each training image, int64, where an epoch shall have equally many of each; else None.

        Raises:
            UserError: where the source does not tell.
        """
        return None

    def nearest_neighbours(self, model: nn.Module, batches: Any) -> nn.Module:
        """A classifier by the nearest of some images (`--knn`), where the task has features of whole images.

        Args:
            model: in evaluation mode.
            batches: the images' loader.

        Raises:
            UserError: for a stream, or too few images.
        """
        raise NotImplementedError

    def sources(self) -> dict[str, str]:
        """What the training depends on beside the recipe and the images: the SHA-256 of each, by its flag."""
        return {}

    def sample(self, item: tuple[Picture, Any], seed: int | None) -> Sample:
        """One sample from what the source reads: augmented from a seed; None is the test's.

        Raises:
            BadImage: for an image that cannot be read.
            BadLabel: for a target that the model cannot have.
        """
        raise NotImplementedError

    def collate(self, samples: Sequence[Sample]) -> Loaded:
        """The batch of some samples, on the CPU."""
        raise NotImplementedError

    def sample_bytes(self, *, training: bool) -> int:
        """What a sample takes of the memory that workers share with their process, about; 0 where that is not known."""
        return 0

    def finish(self, batch: Loaded, device: torch.device, position: Position | None) -> Input:
        """A worker's batch as the model's input on the device.

        Args:
            position: from which the device draws; None in an evaluation.
        """
        raise NotImplementedError

    # ---- Model

    def build_model(self, *, pretrained: bool = False) -> nn.Module:
        """The recipe's model with its initial weights, on the CPU. Raises UserError."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Input) -> dict[str, Tensor]:
        """The losses of a batch by name, scalars; training minimises their sum."""
        raise NotImplementedError

    def freeze(self, model: nn.Module) -> None:
        """Takes the gradient from the parameters that the recipe keeps as they are. Raises UserError."""
        optim_factory.freeze(model, stages=self.recipe.freeze_stages)

    def forward(self, model: nn.Module, batch: Input) -> Any:
        """The model's pass over a batch, without a loss."""
        return model(batch.images)

    def metric(self, device: torch.device, *, names: Callable[[], Sequence[str]] | None = None,
               detailed: bool = False) -> Metric[Input]:
        """A new metric, whose sums are kept on the device.

        Args:
            names: returns the names of this rank's images, in the order in which they come.
            detailed: whether the result shall hold what is only worth it at a run's end.
        """
        raise NotImplementedError

    def example_batch(self, size: int, device: torch.device) -> Input:
        """A fixed batch, as `finish` returns one, in which every part of the loss has something to learn."""
        raise NotImplementedError

    # ---- For people

    def show_settings(self) -> str:
        """The model and how images are prepared for it, in a few words."""
        return self.recipe.model

    def show_result(self, result: dict[str, Any]) -> str:
        """An evaluation's result in a line."""
        return '  '.join(f'{label} {result[name]:.4g}{unit}' for name, (label, unit) in self.recipe.metrics.items())

    def show_details(self, result: dict[str, Any]) -> list[str]:
        """Further lines on the result of a detailed evaluation."""
        return []

    def show_batch(self, batch: Input) -> Image.Image:
        """What the network sees, drawn."""
        return pictures.draw_images(batch.images, self.recipe.mean, self.recipe.std)

    def draw_result(self, result: dict[str, Any]) -> dict[str, Image.Image]:
        """Pictures of an evaluation's result, by name."""
        return {}

    def remarks(self) -> list[str]:
        """Lines for the log about what differs from the row's own hardware in this run."""
        return []

    def name_classes(self, model: nn.Module, classes: Sequence[str]) -> None:
        """Fills in the names of the model's classes: a checkpoint's own, or where it has none those that are known."""
        self.classes = list(classes)

    def picture(self, image: Picture) -> Image.Image:
        """An undecoded image as predictions are drawn onto it. Raises what the decoder raises."""
        return Image.fromarray(decode(image))

    def prepare(self, image: Picture) -> Any:
        """An undecoded image as `predict` takes it. Raises BadImage."""
        raise NotImplementedError

    def predict(self, model: nn.Module, samples: Sequence[Any]) -> list[Any]:
        """What the model finds in each of some images, as `prepare` returns them."""
        raise NotImplementedError

    def embed(self, model: nn.Module, samples: Sequence[Any]) -> Tensor:
        """What the model's classifier takes of each of some images, float32 [images, features] on the CPU.

        Raises:
            UserError: where the model has no classifier.
        """
        raise UserError(f'{self.recipe.name}: its task classifies no images; leave --embed out')

    def draw(self, image: Image.Image, result: Any, *, count: int = 5) -> Image.Image:
        """An image with what was found in it. Raises UserError where the task cannot show that."""
        raise UserError(f'{self.recipe.name}: its task draws no predictions; leave --draw out')

    def label_picture(self, result: Any) -> Image.Image:
        """The class of each pixel as a picture of numbers. Raises UserError where the task tells none."""
        raise UserError(f'{self.recipe.name}: its task tells no class of each pixel; leave --labels out')

    def to_json(self, result: Any, *, count: int = 5) -> Any:
        """A prediction as JSON; where it is a ranking, its first `count` entries."""
        raise NotImplementedError

    def to_text(self, result: Any, *, count: int = 5) -> list[str]:
        """A prediction as lines of text."""
        raise NotImplementedError


def create_task(recipe: Recipe, run: Run) -> Task:
    """The task that the recipe's class names."""
    return pkgutil.resolve_name(recipe.task)(recipe, run)
