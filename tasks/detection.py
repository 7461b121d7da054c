"""Object detection: images with boxes, the detector's own losses, COCO's average precision."""
import errno
import functools
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights
from tqdm import tqdm

from models.dense import NETWORKS
from models.detection import Target
from pipeline import coco
from pipeline.augmentation import Picture, refusing_bad_images
from pipeline.dense import decode_upright, padded, stack
from pipeline.files import Split
from recipes import Run
from recipes.coco import Detection as Recipe
from tasks import pictures
from tasks.average_precision import COLUMNS, as_run_lengths, average_precision, decode, encode
from tasks.dense import Dense, DenseBatch
from utils import UserError, from_rank_zero, write_atomically

SHOWN = 0.3  # the least score of a box that is drawn or written as text; JSON has them all
EXAMPLES = 4  # test images that are drawn at the end of a training


@dataclass
class DetectionBatch(DenseBatch):
    """uint8 [B, H, W, 3] from a worker, float32 [B, 3, H, W] for the model."""

    targets: list[Target]
    image_ids: list[int]


def coco_classes() -> list[str]:
    """The names of COCO's 80 classes."""
    return [name for name in RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta['categories']
            if name not in ('__background__', 'N/A')]


def shorten(loss: str) -> str:
    """A loss's name in the log: loss_cls is cls."""
    return loss.replace('loss_', '')


class Detection(Dense[coco.CocoSource, coco.Sample, DetectionBatch]):
    """Boxes with a class each, from COCO's folder, from a JSON of that form, or made up."""

    recipe: Recipe
    class_cure = 'rename or remove their categories in the JSON'
    divided = ', and the losses are divided by the positive anchors of as many'

    def __init__(self, recipe: Recipe, run: Run):
        super().__init__(recipe, run)
        self._masks = recipe.with_masks
        self.losses = tuple(shorten(name) for name in NETWORKS[recipe.network].LOSSES
                            if self._masks or 'mask' not in name)
        self._transform = coco.Transform(recipe.image_scale, hflip=recipe.hflip, masks=self._masks,
                                         multi_scale=recipe.resize == 'multi_scale')
        # The source of the test images, which the metric asks for the ground truth
        self._val: coco.CocoSource | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Workers receive their source by themselves."""
        return self.__dict__ | {'_val': None}

    def known_classes(self) -> list[str]:
        return coco_classes()

    # ---- Data

    def open(self, split: Split) -> coco.CocoSource:
        source = coco.open_coco(self.recipe, self.run, split)
        if split == 'val':
            self._val = source
        return source

    def check_data(self, train: coco.CocoSource | None, val: coco.CocoSource | None
                   ) -> tuple[list[str], list[str]]:
        return coco.check_coco(train, val, masks=self._masks)

    def learn_classes(self, sources: Sequence[coco.CocoSource]) -> None:
        if self.run.eval and not self.trained and self.recipe.num_classes == Recipe.known_classes:
            self.trained = coco_classes()  # a released file does not name them
        super().learn_classes(sources)

    def sample(self, item: tuple[Picture, coco.Annotations], seed: int | None) -> coco.Sample:
        with refusing_bad_images():
            return self._transform(item, seed)

    def collate(self, samples: Sequence[coco.Sample]) -> DetectionBatch:
        sizes = [sample['size'] for sample in samples]
        targets = [{name: torch.from_numpy(value) for name, value in sample.items()
                    if name in ('boxes', 'labels', 'masks')} | {'size': sample['size']} for sample in samples]
        images = stack([sample['pixels'] for sample in samples], padded(sizes))
        return DetectionBatch(images, sizes, [sample['original_size'] for sample in samples], targets,
                              [sample['image_id'] for sample in samples])

    def _decide_classes(self, ours: list[str]) -> tuple[list[str], str]:
        names, order = super()._decide_classes(ours)
        return names, "their categories' ids" if names == ours and order.startswith('their') else order

    # ---- Model

    def loss(self, model: nn.Module, batch: DetectionBatch) -> dict[str, Tensor]:
        return {shorten(name): loss for name, loss in model(batch.images, batch.targets).items()}

    def example_batch(self, size: int, device: torch.device) -> DetectionBatch:
        """As large as images get, with two boxes in each."""
        height, width = sorted(self.recipe.image_scale)
        boxes = torch.tensor([[0.1, 0.1, 0.4, 0.5], [0.3, 0.2, 0.9, 0.9]], device=device)
        target = {'boxes': boxes * torch.tensor([width, height] * 2, device=device), 'size': (height, width),
                  'labels': torch.arange(2, device=device) % self.recipe.num_classes}
        if self._masks:
            target['masks'] = torch.ones(2, height, width, dtype=torch.bool, device=device)
        images = torch.zeros(size, 3, *padded([(height, width)]), device=device)
        sizes = [(height, width)] * size
        return DetectionBatch(images, sizes, sizes, [target] * size, list(range(size)))

    def metric(self, device: torch.device, *, names: Callable[[], Sequence[str]] | None = None,
               detailed: bool = False) -> 'BoxAP':
        return BoxAP(self._val, device, self.run, masks=self._masks, detailed=detailed)

    # ---- For people

    def show_settings(self) -> str:
        recipe, gate = self.recipe, self.recipe.settings()['gate']
        within = f'{max(recipe.image_scale)} x {min(recipe.image_scale)}'
        return f'{recipe.name} ({recipe.model}{f", {gate} gate" if gate else ""}), images within {within}'

    def show_batch(self, batch: DetectionBatch) -> Image.Image:
        return pictures.draw_batch_of_boxes(batch.images, batch.targets, mean=self.recipe.mean, std=self.recipe.std,
                                            names=self.classes)

    def draw_result(self, result: dict[str, Any]) -> dict[str, Image.Image]:
        drawn = {}
        for place, (rows, masks) in enumerate(result.get('examples', ())):
            image, truth = self._val.read(place)
            drawn[f'detections {place}'] = self.draw(pictures.draw_boxes(self.picture(image), truth.boxes),
                                                     from_rows(rows) | ({'masks': masks} if self._masks else {}))
        return drawn

    def prepare(self, image: Picture) -> coco.Sample:
        with refusing_bad_images():
            pixels = decode_upright(image)
        return self.sample((pixels, coco.Annotations.none(pixels.shape[:2])), None)

    @torch.inference_mode()
    def predict(self, model: nn.Module, samples: Sequence[coco.Sample]) -> list[dict[str, Any]]:
        """Boxes [n, 4] in pixels of the image, scores [n] and labels [n] on the CPU, by falling score, and where the
        network has masks, each as COCO's run lengths.

        One image at a time: beside a larger one, the padding would change the features.
        """
        results = []
        for sample in samples:
            batch = self.finish(self.collate([sample]), next(model.parameters()).device, None)
            result, = model.predict(batch.images, batch.sizes, batch.original_sizes)
            # Whole masks of many photographs would not fit into memory
            masks = {'masks': [as_run_lengths(text, batch.original_sizes[0]) for text in encode(result.pop('masks'))]
                     } if self._masks else {}
            results.append({name: value.cpu() for name, value in result.items()} | masks)
        return results

    def to_json(self, result: dict[str, Any], *, count: int = 100) -> list[dict[str, Any]]:
        entries = [{'class': label, 'name': self.classes[label], 'score': score, 'box': box} for label, score, box in
                   zip(*(result[name][:count].tolist() for name in ('labels', 'scores', 'boxes')), strict=True)]
        for entry, mask in zip(entries, result.get('masks', ()), strict=False):
            entry['mask'] = mask
        return entries

    def to_text(self, result: dict[str, Any], *, count: int = 100) -> list[str]:
        return [f'{100 * entry["score"]:8.2f} %  {entry["name"]}  at {" ".join(f"{x:.0f}" for x in entry["box"])}'
                for entry in self.to_json(result, count=count) if entry['score'] >= SHOWN] or ['    nothing']

    def draw(self, image: Image.Image, result: dict[str, Any], *, count: int = 100) -> Image.Image:
        shown = [entry for entry in self.to_json(result, count=count) if entry['score'] >= SHOWN]
        if masks := [entry['mask'] for entry in shown if 'mask' in entry]:
            image = pictures.draw_masks(image, decode(masks))
        return pictures.draw_boxes(image, [entry['box'] for entry in shown],
                                   [f'{entry["name"]} {100 * entry["score"]:.0f} %' for entry in shown])


class BoxAP:
    """COCO's average precision of boxes and masks over a data set that the ranks share out, each image once.

    A mask is kept as run lengths, a few hundred bytes, as soon as its image is done.

    `result` gives, by model, the metrics of the recipe in hundredths (-1 where no object of the kind is in the set, as
    COCO has it), 'count', and where it is detailed 'classes' and, in a training, 'examples': what was found in the
    first images.
    """

    def __init__(self, source: coco.CocoSource, device: torch.device, run: Run, *, masks: bool = False,
                 detailed: bool = False):
        """
        Args:
            source: of the test images.
            masks: whether the models find masks.
        """
        self._source, self._device, self._run, self._detailed = source, device, run, detailed
        self._rows: dict[str, list[np.ndarray]] = {}  # by model, of an image each
        self._masks: dict[str, list[bytes]] | None = {} if masks else None  # by model, of a row each
        self._seen = 0
        self._order = np.argsort(source.ids)
        first = not dist.is_initialized() or dist.get_rank() == 0
        if run.save_predictions and first:
            check_writable(Path(run.save_predictions))  # before an hour's work, and not after it
        # On a terminal alone, and of one rank
        self._bar = tqdm(total=-(-len(source) // run.world_size), desc='evaluating', unit=' images', leave=False,
                         disable=None if first else True)

    def update(self, models: dict[str, nn.Module], batch: DetectionBatch) -> None:
        places = self._order[np.searchsorted(self._source.ids, batch.image_ids, sorter=self._order)]
        for name, model in models.items():
            found = model.predict(batch.images, batch.sizes, batch.original_sizes)
            self._rows.setdefault(name, []).extend(
                to_rows(int(place), result) for place, result in zip(places, found, strict=True))
            if self._masks is not None:
                self._masks.setdefault(name, []).extend(text for result in found for text in encode(result['masks']))
        self._seen += len(batch)
        self._bar.update(len(batch))

    def result(self, models: Sequence[str]) -> dict[str, dict[str, Any]]:
        self._bar.close()
        count = int(gather(np.full((1, 1), self._seen), self._device).sum())
        results = {}
        for model in models:
            rows = gather(np.concatenate([np.empty((0, len(COLUMNS))), *self._rows.get(model, ())]), self._device)
            masks = None if self._masks is None else gather_texts(self._masks.get(model, []), self._device)
            # One rank computes; others would take the same seconds from the same cores
            text = from_rank_zero(f'average precision {next(_numbers)}',
                                  functools.partial(self._of, rows, masks))
            results[model] = json.loads(text) | {'count': count}
        return results

    def _of(self, rows: np.ndarray, masks: list[bytes] | None) -> str:
        """The values of the rows of all ranks, and of their masks, as JSON."""
        order = np.argsort(rows[:, 0], kind='stable')  # the same on any number of ranks
        rows, masks = rows[order], None if masks is None else [masks[i] for i in order]
        values, classes = average_precision(self._source, rows, masks)
        result: dict[str, Any] = {**values}
        segments = None if masks is None else [as_run_lengths(text, self._source.sizes[int(place)])
                              for text, place in zip(masks, rows[:, 0], strict=True)]
        if self._run.save_predictions:
            save_predictions(Path(self._run.save_predictions), self._source, rows, segments)
        if self._detailed:
            result['classes'] = classes
            if not self._run.eval:
                ends = np.searchsorted(rows[:, 0], range(min(EXAMPLES, len(self._source)) + 1))
                result['examples'] = [(rows[start:end].tolist(), segments and segments[start:end])
                                      for start, end in itertools.pairwise(ends)]
        return json.dumps(result)


_numbers = itertools.count()  # of the results of this process, which are the same on all ranks


def to_rows(place: int, result: dict[str, Tensor]) -> np.ndarray:
    """What was found in an image as rows of COLUMNS, float64 [n, 7].

    Args:
        place: the image's position in its source.
    """
    found = torch.cat([result['boxes'], result['scores'][:, None], result['labels'][:, None]], dim=1)
    found = found.cpu().double()  # in this order: MPS has no float64
    rows = np.concatenate([np.full((len(found), 1), place), found], axis=1)
    rows[:, 3:5] -= rows[:, 1:3]
    return rows


def from_rows(rows: Sequence[Sequence[float]]) -> dict[str, Tensor]:
    """Boxes, scores and labels of an image's rows."""
    values = torch.tensor(rows).reshape(-1, len(COLUMNS))
    boxes = torch.cat([values[:, 1:3], values[:, 1:3] + values[:, 3:5]], dim=1)
    return {'boxes': boxes, 'scores': values[:, 5], 'labels': values[:, 6].long()}


def gather(rows: np.ndarray, device: torch.device) -> np.ndarray:
    """The rows [n, columns] of all ranks, one rank after the other. Every rank calls it."""
    if not dist.is_initialized():
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=device))
    longest = int(max(counts))
    own = torch.from_numpy(rows).to(device)
    mine = own.new_zeros(longest, rows.shape[1])
    mine[:len(rows)] = own
    parts = [torch.empty_like(mine) for _ in counts]
    dist.all_gather(parts, mine)
    return np.concatenate([part[:int(count)].cpu().numpy() for part, count in zip(parts, counts, strict=True)])


def gather_texts(texts: Sequence[bytes], device: torch.device) -> list[bytes]:
    """The texts of all ranks, one rank after the other. Every rank calls it."""
    lengths = gather(np.array([len(text) for text in texts], np.int64).reshape(-1, 1), device)[:, 0]
    whole = gather(np.frombuffer(bytearray().join(texts), np.uint8).reshape(-1, 1), device).tobytes()
    ends = lengths.cumsum()
    return [whole[end - length:end] for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)]


def check_writable(path: Path) -> None:
    """Makes the folder of --save_predictions. Raises UserError where no file can be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        raise UserError(f'--save_predictions {path} cannot be written ({error.strerror}); give a file') from None


def save_predictions(path: Path, source: coco.CocoSource, rows: np.ndarray,
                     segments: Sequence[dict[str, Any]] | None = None) -> None:
    """Writes COCO's result JSON, with the ids of the data. Raises UserError where it cannot.

    Args:
        rows: float64 [n, COLUMNS].
        segments: of each row its mask as run lengths, where there are masks.
    """
    numbers = {label: number for label, number in enumerate(source.category_ids) if number is not None}
    records = [{'image_id': int(source.ids[int(place)]), 'category_id': int(numbers[label]), 'bbox': box,
                'score': score} | ({'segmentation': segments[i]} if segments else {})
               for i, (place, *box, score, label) in enumerate(rows.tolist())
               if label in numbers]  # others are classes of the model alone
    try:
        write_atomically(path, lambda file: file.write(json.dumps(records).encode()))
    except OSError as error:
        raise UserError(f'--save_predictions {path} cannot be written ({error.strerror}); give a file') from None
