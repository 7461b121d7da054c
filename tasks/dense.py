"""What detection and segmentation share: a network over a backbone, of images that are turned as EXIF says."""
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from PIL import Image
from torch import nn

from models.dense import build_dense
from models.detection import freeze_backbone
from pipeline.augmentation import Picture
from pipeline.dense import decode_upright, normalise_padded, padded
from pipeline.loaders import Position, Sample
from recipes.dense import Dense as Recipe
from tasks import Batch, Data, Task
from utils import seed_everything


@dataclass
class DenseBatch(Batch):
    """Images of unequal sizes, each in the upper left corner."""

    sizes: list[tuple[int, int]]  # (h, w) of each without the padding
    original_sizes: list[tuple[int, int]]  # (h, w) of each before resizing


Input = TypeVar('Input', bound=DenseBatch)  # from a worker, and as the model takes it


class Dense(Task[Data, Sample, Input, Input], Generic[Data, Sample, Input]):
    """A task whose network gives its own losses, and whose batches have `sizes`."""

    recipe: Recipe
    divided = ''  # what depends on a micro-batch beside the batch norms, for the log

    def known_classes(self) -> list[str]:
        """The names of the classes of the data set that the rows were trained on."""
        raise NotImplementedError

    def sample_bytes(self, *, training: bool) -> int:
        height, width = padded([tuple(sorted(self.recipe.image_scale))])  # type: ignore[attr-defined]  # of both tasks
        return 3 * height * width

    def finish(self, batch: Input, device: torch.device, position: Position | None) -> Input:
        batch = batch.to(device)
        return replace(batch, images=normalise_padded(batch.images, batch.sizes, mean=self.recipe.mean,
                                                      std=self.recipe.std))

    def build_model(self, *, pretrained: bool = False) -> nn.Module:
        seed_everything(self.recipe.seed, 'model')
        return build_dense(self.recipe, num_classes=self.recipe.num_classes, pretrained=pretrained,
                           **self.recipe.arguments() | self.recipe.model_kwargs)

    def freeze(self, model: nn.Module) -> None:
        freeze_backbone(model.backbone, stages=self.recipe.freeze_stages, norms=self.recipe.freeze_bn)

    def forward(self, model: nn.Module, batch: Input) -> Any:
        return model.outputs(batch.images)

    def remarks(self) -> list[str]:
        recipe, run = self.recipe, self.run
        if run.batch_size != recipe.micro_batch_size:
            return [f'Micro-batches of {run.batch_size} images where the recipe has {recipe.micro_batch_size}: the '
                    f'batch norms see as many{self.divided}, so that this trains another function.']
        if run.update_freq > 1:
            return [f'{run.update_freq} micro-batches of {run.batch_size} are accumulated for an update, each with its '
                    'own batch statistics and losses, as on so many more processes; the running statistics of the '
                    f'batch norms move with each{self.heads_see()}.']
        return []

    def heads_see(self) -> str:
        """What accumulating means for norms of the heads over all GPUs, where the network has such; for the log."""
        return ''

    def name_classes(self, model: nn.Module, classes: Sequence[str]) -> None:
        known = self.known_classes()
        names = list(classes) or (known if model.num_classes == len(known) else [])
        self.classes = names + [str(number) for number in range(len(names), model.num_classes)]

    def picture(self, image: Picture) -> Image.Image:
        return Image.fromarray(decode_upright(image))
