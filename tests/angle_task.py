"""A second task, for the tests alone: tell the angle of a bar. It shows what the engine, the loaders and main know of a
task, which is nothing: this file and its row are all that there is of it.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import Tensor, nn

import tasks
from models import create_model
from pipeline.augmentation import decode
from pipeline.loaders import Position
from recipes import RECIPES, Recipe
from recipes.fields import NOT_NEGATIVE, doc
from utils import derive_seed, seed_everything, sum_dtype


@dataclass(frozen=True)
class AngleRecipe(Recipe):
    """All that can change how well an angle is told."""

    task = 'angle_task:Angle'
    metrics = {'close': ('within 15 degrees', ' %'), 'loss': ('loss', '')}  # noqa: RUF012
    best = 'close'

    grain: float = doc(20.0, 'noise on the pixels while training, grey levels', NOT_NEGATIVE)
    length_weight: float = doc(0.1, 'weight of the loss on the length of the predicted vector', NOT_NEGATIVE)


# 48 images, 4 updates of 12 in an epoch; of a few thousand parameters, with drop path
ROW = AngleRecipe(
    name='angle_tiny', source='the tests', model='moganet_xtiny', num_classes=2, micro_batch_size=12, drop_path=0.1,
    model_kwargs={'dims': [8, 8, 16, 16], 'depths': [1, 1, 1, 1], 'ffn_ratios': [2, 2, 2, 2],
                  'layer_scale_init_value': 0.1},
    data_set='bars', epochs=3, total_batch_size=12, lr=5e-3, warmup_epochs=1, model_ema_decay=0.9)


def register() -> None:
    """Adds the row to the known ones, as recipes/rows.py does it for those of the repository."""
    RECIPES[ROW.name] = ROW


def draw_bar(angle: float) -> np.ndarray:
    """A white bar through the middle of a black picture, uint8 [32, 32, 3]; angles are equal modulo 180 degrees."""
    picture = Image.new('RGB', (32, 32))
    x, y = 13 * math.cos(math.radians(angle)), 13 * math.sin(math.radians(angle))
    ImageDraw.Draw(picture).line((16 - x, 16 - y, 16 + x, 16 + y), 'white', 3)
    return np.array(picture)


class Bars:
    """Pictures of bars and their angles, degrees in 0..180."""

    in_memory = True

    def __init__(self, split: str):
        self._split, self._count = split, 48 if split == 'train' else 21

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> tuple[np.ndarray, float]:
        angle = derive_seed('bar', self._split, index) % 1800 / 10
        return draw_bar(angle), angle

    def name(self, index: int) -> str:
        return f'bar {index}'


@dataclass
class BarBatch(tasks.Batch):
    """uint8 [B, 32, 32, 3] from a worker, float32 [B, 3, 32, 32] for the model."""

    angles: Tensor  # [B], degrees


class Angle(tasks.Task):
    """The model's two outputs are the direction of the doubled angle, so that 0 and 180 degrees are one."""

    losses = ('direction', 'length')

    def open(self, split: str) -> Bars:
        return Bars(split)

    def sample(self, item: tuple[Any, float], seed: int | None) -> tuple[np.ndarray, float]:
        pixels, angle = decode(item[0]), item[1]
        if seed is not None:
            noise = np.random.default_rng(seed).normal(0, self.recipe.grain, pixels.shape)
            pixels = np.clip(pixels + noise, 0, 255).astype(np.uint8)
        return pixels, angle

    def collate(self, samples: Sequence[tuple[np.ndarray, float]]) -> BarBatch:
        pixels, angles = zip(*samples, strict=True)
        return BarBatch(torch.from_numpy(np.stack(pixels)), torch.tensor(angles))

    def finish(self, batch: BarBatch, device: torch.device, position: Position | None) -> BarBatch:
        batch = batch.to(device)
        images = batch.images.permute(0, 3, 1, 2).float() / 255 - 0.5
        if position is not None:  # what the device draws depends on the place in the run
            generator = torch.Generator(device).manual_seed(
                derive_seed(self.recipe.seed, 'light', *position[:3]))
            images = images * torch.rand(len(images), 1, 1, 1, device=device, generator=generator)
        return replace(batch, images=images)

    def build_model(self, *, pretrained: bool = False) -> nn.Module:
        seed_everything(self.recipe.seed, 'model')
        return create_model(self.recipe.model, num_classes=self.recipe.num_classes, pretrained=pretrained,
                            **self.recipe.arguments() | self.recipe.model_kwargs)

    def loss(self, model: nn.Module, batch: BarBatch) -> dict[str, Tensor]:
        vectors, angles = model(batch.images), torch.deg2rad(2 * batch.angles)
        wanted = torch.stack([angles.cos(), angles.sin()], 1)
        return {'direction': (vectors - wanted).square().mean(),
                'length': self.recipe.length_weight * (vectors.norm(dim=1) - 1).square().mean()}

    def metric(self, device: torch.device, **_: Any) -> 'Closeness':
        return Closeness(self, device)

    def example_batch(self, size: int, device: torch.device) -> BarBatch:
        return BarBatch(torch.zeros(size, 3, 32, 32, device=device), torch.zeros(size, device=device))

    def prepare(self, image: Any) -> tuple[np.ndarray, float]:
        return self.sample((image, 0.0), None)

    @torch.inference_mode()
    def predict(self, model: nn.Module, samples: Sequence[tuple[np.ndarray, float]]) -> list[float]:
        batch = self.collate(samples)
        return told(model(self.finish(batch, next(model.parameters()).device, None).images)).tolist()

    def to_json(self, result: float, *, count: int = 5) -> dict[str, float]:
        return {'angle': result}

    def to_text(self, result: float, *, count: int = 5) -> list[str]:
        return [f'{result:8.1f} degrees']


def told(vectors: Tensor) -> Tensor:
    """The angles, degrees in 0..180, [B], of the model's outputs [B, 2]."""
    return torch.rad2deg(torch.atan2(vectors[:, 1], vectors[:, 0])) / 2 % 180


class Closeness:
    """How many angles are told within 15 degrees, and the mean loss."""

    def __init__(self, task: Angle, device: torch.device):
        self._task, self._device, self._sums = task, device, {}

    def _of(self, model: str) -> Tensor:
        return self._sums.setdefault(model, torch.zeros(3, device=self._device, dtype=sum_dtype(self._device)))

    def update(self, models: dict[str, nn.Module], batch: BarBatch) -> None:
        for name, model in models.items():
            wrong = (told(model(batch.images)) - batch.angles).abs()
            close = (torch.minimum(wrong, 180 - wrong) < 15).sum()
            loss = sum(self._task.loss(model, batch).values())
            self._of(name).add_(torch.stack([close, loss * len(batch), torch.tensor(len(batch))]))

    def result(self, models: Sequence[str]) -> dict[str, dict[str, Any]]:
        results = {}
        for model in models:
            if dist.is_initialized():
                dist.all_reduce(self._of(model))
            close, loss, count = self._of(model).tolist()
            results[model] = {'close': 100 * close / count, 'loss': loss / count, 'count': int(count)}
        return results
