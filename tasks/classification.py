"""Image classification: crops with a label, cross-entropy with mixing, accuracy with ReaL and a confusion matrix."""
import contextlib
import hashlib
import json
import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.data.mixup import Mixup, mixup_target
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import optim_factory
from models import create_model
from models.build import check_forward, name_of
from pipeline import labels, memory
from pipeline.augmentation import (
    TestTransform,
    TrainTransform,
    erasing_boxes,
    normalise,
    refusing_bad_images,
    seed_image,
)
from pipeline.corruptions import corrupt
from pipeline.labels import BadLabel
from pipeline.loaders import Position, ValLoader
from pipeline.sources import ImageFiles, check_files, class_names, open_source
from recipes import Classification as Recipe
from recipes import Run
from tasks import Batch, Task, evidence, pictures
from utils import UserError, derive_seed, seed_everything, sum_dtype

VOTE_TEMPERATURE = 0.07  # of the votes of nearest neighbours, as in arXiv 1805.01978
MAX_CONFUSION = 100  # classes of which a confusion matrix is still one that a person reads


@dataclass
class Crops(Batch):
    """A worker's micro-batch: images uint8 [B, H, W, 3]."""

    targets: Tensor  # int64 [B]
    boxes: Tensor  # int32 [B, recount, 4]: to erase, as top, left, height, width
    seeds: Tensor  # int64 [B]: the images' seeds, from which the erased pixels are filled


@dataclass
class Labelled(Batch):
    """The model's input: images float32 [B, 3, H, W], normalised, erased and mixed."""

    targets: Tensor  # int64 [B], or float [B, classes] while mixup or CutMix is on
    weights: Tensor | None = None  # float [B], of the images' losses, with --class_weights


class Classification(Task):
    """One label an image, from ImageNet's folders, timm's data sets, digits or noise."""

    recipe: Recipe

    def __init__(self, recipe: Recipe, run: Run):
        super().__init__(recipe, run)
        self._train = self._test = self._finish = None
        self._source: Any = None  # of the training images
        self._class_weights: Tensor | None = None
        self._binary = None if recipe.loss == 'ce' else BinaryCrossEntropy(
            recipe.smoothing, target_threshold=recipe.bce_target_thresh, sum_classes=recipe.loss == 'bce_sum')

    def __getstate__(self) -> dict[str, Any]:
        """Spawned workers need no tensors of the device, and receive their source by themselves."""
        return self.__dict__ | dict.fromkeys(('_finish', '_source', '_class_weights', 'teacher'))

    # ---- Data

    def open(self, split: str) -> Any:
        if split == 'train':
            self._train = TrainTransform(self.recipe)  # here, since it compiles what the workers will inherit
        else:
            self._test = TestTransform(self.recipe)
        source = open_source(self.recipe, self.run, split)
        if split == 'train':
            self._source = source
        return source

    def check_data(self, train: Any, val: Any) -> tuple[list[str], list[str]]:
        files = [source if isinstance(source, ImageFiles) else None for source in (train, val)]
        return check_files(*files)

    def class_names(self, source: Any) -> list[str]:
        return list(getattr(source, 'classes', None) or class_names(source))

    def learn_classes(self, sources: Sequence[Any]) -> None:
        super().learn_classes(sources)
        if self.teacher is not None:
            self.teacher.learn_classes(self.classes, self.recipe.num_classes)
        if self.recipe.class_weights and self._source is not None:
            names = self.classes + [str(number) for number in range(len(self.classes), self.recipe.num_classes)]
            self._class_weights = torch.from_numpy(
                balanced_weights(self._labels_of(self._source, '--class_weights balanced'), self.recipe.num_classes)
                if self.recipe.class_weights == 'balanced' else read_class_weights(self.recipe.class_weights, names))

    def _labels_of(self, source: Any, flag: str) -> np.ndarray:
        """The class of each image, for a flag. Raises UserError where the source does not tell them."""
        found = getattr(source, 'labels', None)
        if found is None:
            raise UserError(f'{flag} needs the label of each image beforehand, which --data_set '
                            f'{self.recipe.data_set} does not tell; take a folder of images')
        try:
            return np.array([self._check_label(label) for label in found], np.int64)
        except BadLabel as error:
            raise UserError(f'{flag}: an image of --data_set {self.recipe.data_set} {error}') from None

    def balance(self, source: Any) -> np.ndarray | None:
        return self._labels_of(source, '--balanced_sampling') if self.recipe.balanced_sampling else None

    def sources(self) -> dict[str, str]:
        weights, teacher = self._class_weights, self.teacher
        return {} | ({} if weights is None else {'class_weights': hashlib.sha256(weights.numpy()).hexdigest()}) | (
            {} if teacher is None else {'teacher': teacher.digest})

    def sample(self, item: tuple[Any, Any], seed: int | None) -> tuple[np.ndarray, int, np.ndarray | None, int]:
        image, label = item
        label = self._check_label(label)
        if seed is None:
            return self.prepare(image), label, None, 0
        seed_image(seed)
        with refusing_bad_images():
            pixels = self._train(image)
        return pixels, label, erasing_boxes(self.recipe), seed

    def _check_label(self, label: Any) -> int:
        """A label as a number. Raises BadLabel for one that is no class of the model."""
        try:
            number = int(label) if isinstance(label, float) and label.is_integer() else operator.index(label)
        except TypeError:
            raise BadLabel(f'has label {label!r}, and a label must be a whole number: name the classes by --class_map '
                           'FILE, or mend the data') from None
        if not 0 <= number < self.recipe.num_classes:
            raise BadLabel(f'has label {number}, but the model has {self.recipe.num_classes} classes: give '
                           '--num_classes, or check --class_map')
        return number

    def collate(self, samples: Sequence[tuple[np.ndarray, int, np.ndarray | None, int]]) -> Crops:
        images = memory.empty((len(samples), *samples[0][0].shape), torch.uint8)
        targets, boxes, seeds = (torch.zeros(len(samples), *shape, dtype=dtype) for shape, dtype in (
            ((), torch.int64), ((self.recipe.recount, 4), torch.int32), ((), torch.int64)))
        # Filled as arrays: an assignment to a part of a tensor takes 5 us
        arrays = [tensor.numpy() for tensor in (images, targets, boxes, seeds)]
        for i, sample in enumerate(samples):
            for array, value in zip(arrays, sample, strict=True):
                if value is not None:
                    array[i] = value
        return Crops(images, targets, boxes, seeds)

    def sample_bytes(self, *, training: bool) -> int:
        return 3 * (self.recipe.input_size if training else self.recipe.test_size) ** 2

    def finish(self, batch: Crops, device: torch.device, position: Position | None) -> Labelled:
        if self._finish is None:
            self._finish = Finish(self.recipe, device, self._class_weights)
        mixing = position is not None and position.epochs_left > self.recipe.mixup_off_epochs
        return self._finish(batch, ('mixup', *position[:3]) if mixing else None)

    # ---- Model

    def build_model(self, *, pretrained: bool = False) -> nn.Module:
        recipe, run = self.recipe, self.run
        seed_everything(recipe.seed, 'model')
        model = create_model(recipe.model, num_classes=recipe.num_classes, pretrained=pretrained,
                             **recipe.arguments() | recipe.model_kwargs)
        if not run.eval:
            check_forward(model, size=recipe.input_size, training=True,
                          batch=run.batch_size if isinstance(run.batch_size, int) else 2)
        if (run.eval or recipe.test_size != recipe.input_size) and recipe.num_classes:
            check_forward(model, size=recipe.test_size)
        return model

    def freeze(self, model: nn.Module) -> None:
        optim_factory.freeze(model, stages=self.recipe.freeze_stages, linear_probe=self.recipe.linear_probe)

    def loss(self, model: nn.Module, batch: Labelled) -> dict[str, Tensor]:
        """The mean over the images; mixed targets were smoothed where they were mixed, class indices are here.

        With class weights, the mean of each image's loss times its weight. With a teacher, that and the teacher's
        loss, which no weight and no smoothing touches, by their shares.
        """
        logits, targets = model(batch.images), batch.targets
        if self._binary is not None:
            return {'loss': self._binary(logits, targets)}
        smoothing = 0.0 if targets.is_floating_point() else self.recipe.smoothing
        if batch.weights is None:
            loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        else:
            losses = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction='none')
            loss = (batch.weights * losses).mean()
        if self.teacher is not None:
            share = self.recipe.distill_alpha
            loss = (1 - share) * loss + share * self.teacher.loss(logits, batch.images)
        return {'loss': loss}

    @torch.no_grad()
    def nearest_neighbours(self, model: nn.Module, batches: ValLoader) -> 'NearestNeighbours':
        """A classifier by the nearest of some images, which the ranks share out.

        Args:
            model: in evaluation mode.

        Raises:
            UserError: for a stream, or too few images.
        """
        wanted = max(self.run.knn, self.run.world_size)
        if not batches.exact or batches.count < wanted:
            found = f'has {batches.count}' if batches.exact else 'is a stream'
            raise UserError(f'--knn {self.run.knn} compares with {wanted} or more training images in any order, and '
                            f'this data set {found}; give a lower --knn, or another --data_path')
        rows = [torch.cat([batch.targets[:, None], features(model, batch.images)], 1) for batch in batches]
        known = gather(rows)
        return NearestNeighbours(model, known[:, 1:], known[:, 0].long(), count=self.run.knn,
                                 classes=self.recipe.num_classes)

    def example_batch(self, size: int, device: torch.device) -> Labelled:
        side = self.recipe.input_size
        # In the layout of the loader's, for which a compiled model would else be compiled again
        images = torch.zeros(size, 3, side, side, device=device).to(memory_format=torch.channels_last)
        return Labelled(images, torch.zeros(size, dtype=torch.int64, device=device))

    def metric(self, device: torch.device, *, names: Callable[[], Sequence[str]] | None = None,
               detailed: bool = False) -> 'Accuracy':
        valid = real = None
        if self.run.valid_labels:
            valid = read_valid_labels(self.run.valid_labels, self.recipe, self.classes)
        if self.run.real_labels:
            real = read_real_labels(self.run.real_labels, names(), num_classes=self.recipe.num_classes)
            real = real if valid is None else real[:, valid]
        count = self.recipe.num_classes if valid is None else len(valid)
        numbers = range(count) if valid is None else valid
        names = describe(self.classes) + [str(number) for number in numbers[len(self.classes):]]
        return Accuracy(device, valid_labels=valid, real_labels=real, mirrored=self.run.tta == 'hflip',
                        classes=names if detailed else None)

    # ---- For people

    def show_settings(self) -> str:
        recipe, gate = self.recipe, self.recipe.settings()['gate']
        return (f'{recipe.model}{f", {gate} gate" if gate else ""}, at {recipe.test_size}, crop {recipe.crop_pct:g} '
                f'({recipe.crop_mode}), {recipe.interpolation}{", with mirror images" if self.run.tta else ""}'
                f'{f", by {self.run.knn} nearest neighbours" if self.run.knn else ""}')

    def show_result(self, result: dict[str, Any]) -> str:
        real = f'  top-1 by the reassessed labels {result["real_acc1"]:.3f} %' if 'real_acc1' in result else ''
        return f'top-1 {result["acc1"]:.3f} %  top-5 {result["acc5"]:.3f} %  loss {result["loss"]:.4f}{real}'

    def show_details(self, result: dict[str, Any]) -> list[str]:
        bounds = {label: result[f'interval_{name}'] for name, label in
                  (('acc1', 'top-1'), ('acc5', 'top-5'), ('real_acc1', 'top-1 by the reassessed labels'))
                  if f'interval_{name}' in result}
        fitted = result['temperature']
        lines = ['95 % intervals: ' + ', '.join(f'{label} {low:.2f} to {high:.2f} %'
                                                for label, (low, high) in bounds.items()),
                 f'mean of the top-1 accuracies of the classes: {result["mean_class_acc1"]:.3f} %',
                 f'calibration error {result["ece"]:.2f} %, '
                 f'{"no temperature fits" if fitted is None else f"fitted temperature {fitted:.3f}"}',
                 'worst classes: ' + ', '.join(f'{row["name"].split(",")[0]} {row["acc1"]:.0f} %'
                                               for row in result['worst_classes'])]
        if result['confusions']:
            lines.append('commonest confusions: ' + ', '.join(
                f'{row["name"].split(",")[0]} taken for {row["taken_for"].split(",")[0]} {row["times"]} times'
                for row in result['confusions']))
        return lines

    def draw_result(self, result: dict[str, Any]) -> dict[str, Image.Image]:
        if 'confusion' not in result:
            return {}
        return {'confusion': pictures.draw_confusion(result['confusion'], self.classes)}

    @torch.inference_mode()
    def predict(self, model: nn.Module, samples: Sequence[np.ndarray]) -> list[Tensor]:
        """The probabilities, [classes] on the CPU: the softmax, also where training was by binary cross-entropy."""
        device = next(model.parameters()).device
        return list(model(self.to_input(samples, device)).float().softmax(1).cpu())

    @torch.inference_mode()
    def embed(self, model: nn.Module, samples: Sequence[np.ndarray]) -> Tensor:
        return features(model, self.to_input(samples, next(model.parameters()).device)).cpu()

    def prepare(self, image: Any) -> np.ndarray:
        """The test crop, uint8 [H, W, 3], of an image that `augmentation.decode` takes. Raises BadImage."""
        self._test = self._test or TestTransform(self.recipe)
        with refusing_bad_images():
            pixels = self._test(image)
        return corrupt(pixels, *self.run.corruption) if self.run.corruption else pixels

    def to_input(self, crops: Sequence[np.ndarray], device: torch.device) -> Tensor:
        """The model's input, float32 [B, 3, H, W] on the device, from test crops."""
        pixels = torch.from_numpy(np.stack(crops)).to(device)
        mean, std = (torch.tensor(values, device=device) * 255 for values in (self.recipe.mean, self.recipe.std))
        return normalise(pixels, mean, 1 / std)

    def top(self, probabilities: Tensor, count: int) -> list[dict[str, Any]]:
        """The likeliest classes, the likeliest first: their number, name and probability."""
        return [{'class': number, 'name': self.classes[number], 'probability': probabilities[number].item()}
                for number in probabilities.topk(min(count, len(probabilities))).indices.tolist()]

    def to_json(self, result: Tensor, *, count: int = 5) -> list[dict[str, Any]]:
        return self.top(result, count)

    def to_text(self, result: Tensor, *, count: int = 5) -> list[str]:
        return [f'{100 * entry["probability"]:8.2f} %  {entry["name"]}' for entry in self.top(result, count)]

    def draw(self, image: Image.Image, result: Tensor, *, count: int = 5) -> Image.Image:
        bars = [(entry['name'], entry['probability']) for entry in self.top(result, count)]
        return pictures.draw_bars(image, bars)

    def name_classes(self, model: nn.Module, classes: Sequence[str]) -> None:
        """Fills in the names of the model's classes.

        Args:
            classes: the checkpoint's own names, or none: then ImageNet's, if there are as many, else the numbers.
                WordNet ids are described in words.
        """
        subset = infer_imagenet_subset(model)
        imagenet = ImageNetInfo(subset or 'imagenet-1k')
        names = describe(list(classes) or (imagenet.label_names() if subset else []), imagenet)
        self.classes = names + [str(number) for number in range(len(names), model.num_classes)]


def describe(names: list[str], imagenet: ImageNetInfo | None = None) -> list[str]:
    """WordNet ids in words, where all are ImageNet's; other names as they are."""
    if names and all(re.fullmatch(r'n\d{8}', name) for name in names):
        imagenet = imagenet or ImageNetInfo()
        with contextlib.suppress(KeyError):  # ids that are not ImageNet's stay as they are
            return [imagenet.label_name_to_description(name) for name in names]
    return names


# ---- On the device --------------------------------------------------------------------------------------------------

class WithoutWait(TorchFunctionMode):
    """Within it, what `torch.tensor` puts on a CUDA device goes there from pinned memory: else the host would wait."""

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.tensor and torch.device(kwargs.get('device') or 'cpu').type == 'cuda':
            device = kwargs.pop('device')
            return torch.tensor(*args, **kwargs).pin_memory().to(device, non_blocking=True)
        return function(*args, **kwargs)


class BatchMixup(Mixup):
    """timm's mixup and CutMix, without a wait for the device, and for odd batches too.

    The image in the middle would be mixed with itself.
    """

    def __call__(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        with WithoutWait() if x.is_cuda else contextlib.nullcontext():
            return self._mix(x, target)

    def _mix(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if len(x) % 2 == 0:
            return super().__call__(x, target)
        if self.mode == 'batch':
            weight: Any = self._mix_batch(x)
        elif self.mode == 'elem':
            weight = self._mix_elem(x)
        else:
            half = self._mix_pair(x)
            weight = torch.cat([half[:len(x) // 2], half.new_ones(1, 1), half[len(x) // 2:]])
        return x, mixup_target(target, self.num_classes, weight, self.label_smoothing)


class Finish:
    """Turns a worker's batch into the model's input: to the device, to float, normalised, erased, mixed."""

    def __init__(self, recipe: Recipe, device: torch.device, class_weights: Tensor | None = None):
        """
        Args:
            class_weights: float32 [classes], by which the losses of training images are multiplied.
        """
        self._recipe, self._device = recipe, device
        self._weights = None if class_weights is None else class_weights.to(device)
        self._mean = torch.tensor(recipe.mean, device=device) * 255
        self._scale = 1 / (torch.tensor(recipe.std, device=device) * 255)
        self._mixup = None
        if recipe.mixup > 0 or recipe.cutmix > 0 or recipe.cutmix_minmax:
            self._mixup = BatchMixup(
                recipe.mixup, recipe.cutmix, recipe.cutmix_minmax, recipe.mixup_prob, recipe.mixup_switch_prob,
                recipe.mixup_mode, label_smoothing=recipe.smoothing, num_classes=recipe.num_classes)

    def __call__(self, batch: Crops, mixup_key: tuple[Any, ...] | None = None) -> Labelled:
        """Images float32 [B, 3, H, W] in channels-last memory and targets, mixed where a key is given."""
        targets = batch.targets.to(self._device, non_blocking=True)
        pixels = batch.images.to(self._device, non_blocking=True)
        images = normalise(pixels, self._mean, self._scale)
        self._erase(images, batch)
        if mixup_key is not None and self._mixup is not None:
            np.random.seed(derive_seed(self._recipe.seed, *mixup_key) & 0xFFFFFFFF)
            images, targets = self._mixup(images, targets)
        return Labelled(images, targets, None if self._weights is None else self._weights_of(targets))

    def _weights_of(self, targets: Tensor) -> Tensor:
        """The weight of each image, [B]: its class's; of a mixed image the mean of both, by their shares."""
        if not targets.is_floating_point():
            return self._weights[targets]
        # Mixed targets are smoothed: that share of each goes to all classes alike, and has no weight here
        smoothing = self._recipe.smoothing
        return (targets @ self._weights - smoothing * self._weights.mean()) / (1 - smoothing)

    def _erase(self, images: Tensor, batch: Crops) -> None:
        """Random erasing of the boxes drawn in the workers; the fill comes from the images' seeds too."""
        for number in batch.boxes[:, :, 2].sum(1).nonzero().flatten().tolist():
            generator = torch.Generator(self._device).manual_seed(int(batch.seeds[number]))
            for top, left, height, width in batch.boxes[number].tolist():
                shape = {'pixel': (3, height, width), 'rand': (3, 1, 1), 'const': (3, 0, 0)}[self._recipe.remode]
                fill = torch.randn(shape, device=self._device, generator=generator) if shape[1] else 0.0
                images[number, :, top:top + height, left:left + width] = fill


# ---- Features -------------------------------------------------------------------------------------------------------

def features(model: nn.Module, images: Tensor) -> Tensor:
    """What the classifier of a model takes, float32 [B, features], of images [B, 3, H, W]. Raises UserError."""
    try:
        found = model.forward_head(model.forward_features(images), pre_logits=True)
    except (AttributeError, TypeError) as error:  # of the few models of timm without these, or without the argument
        raise UserError(f'{name_of(model)} does not tell what its classifier takes ({error}); give another model'
                        ) from None
    return found.float().flatten(1)


class NearestNeighbours(nn.Module):
    """Classifies by known images: the nearest vote by `exp(cosine / VOTE_TEMPERATURE)` (Wu et al., arXiv 1805.01978).

    Attributes:
        model: whose features are compared.
    """

    def __init__(self, model: nn.Module, known: Tensor, labels: Tensor, *, count: int, classes: int):
        """
        Args:
            known: features, float32 [images, features].
            labels: int64 [images].
            count: of the nearest images, which vote.
            classes: number of the classes.
        """
        super().__init__()
        self.model, self._labels, self._count, self._classes = model, labels, count, classes
        self._known = F.normalize(known)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> the logarithm of the shares of the votes, at least of 1e-6, float32 [B, classes]."""
        ours = F.normalize(features(self.model, images))
        with torch.autocast(images.device.type, enabled=False):
            nearest = (ours @ self._known.T).topk(self._count)
        votes = (nearest.values / VOTE_TEMPERATURE).softmax(1)
        shares = votes.new_zeros(len(ours), self._classes).scatter_add_(1, self._labels[nearest.indices], votes)
        return shares.clamp(min=1e-6).log()


# ---- Accuracy -------------------------------------------------------------------------------------------------------

class Accuracy:
    """Accuracy and cross-entropy over a data set that the ranks share out, each image once.

    `result` gives, by model, 'acc1' and 'acc5' in % (top-5 is top-k where there are k < 5 classes), 'loss' per image,
    'count', and with `real_labels` 'real_acc1' in %. With `classes` also 'interval_' of each accuracy (95 %),
    'mean_class_acc1', the mean of the accuracies of the classes that have images, in %, 'ece' in %, the fitted
    'temperature', 'worst_classes' and 'confusions', up to 100 classes 'confusion', the images [true][predicted], and
    for files 'right', bool [images] in the order of the source, and 'classes', a row each.
    """

    names = ('right1', 'right5', 'loss', 'real_right', 'real_count')

    def __init__(self, device: torch.device, *, valid_labels: Sequence[int] | None = None,
                 real_labels: Tensor | None = None, classes: Sequence[str] | None = None, mirrored: bool = False):
        """
        Args:
            valid_labels: the model's classes that the data set has, in the order of its labels; all of them by default.
            real_labels: bool [images of this rank, classes], all the labels that are right for an image; an image
                without any is left out (ReaL, arXiv 2006.07159).
            classes: the names of the classes, where the result shall tell what single images and classes say.
            mirrored: whether the logits are the mean of those of an image and of its mirror image.
        """
        self._device, self._valid, self._real, self._classes = device, valid_labels, real_labels, classes
        self._mirrored, self._seen = mirrored, 0
        self._sums: dict[str, Tensor] = {}  # [names + sharpnesses] by model
        self._images: dict[str, list[Tensor]] = {}  # by model: target, likeliest class, its probability; [B, 3] a batch

    def _sums_of(self, model: str) -> Tensor:
        if model not in self._sums:
            self._sums[model] = torch.zeros(len(self.names) + len(evidence.SHARPNESS), device=self._device,
                                            dtype=sum_dtype(self._device))
        return self._sums[model]

    def update(self, models: dict[str, nn.Module], batch: Labelled) -> None:
        images, targets = batch.images.to(self._device), batch.targets.to(self._device)
        for name, model in models.items():
            sums = self._sums_of(name)
            logits = model(images).float()
            if self._mirrored:
                logits = (logits + model(images.flip(3)).float()) / 2
            if self._valid is not None:
                logits = logits[:, self._valid]
            top = logits.topk(min(5, logits.shape[1])).indices
            right = top == targets[:, None]
            found = [right[:, 0].sum(), right.sum(), F.cross_entropy(logits, targets, reduction='sum')]
            if self._real is not None:
                real = self._real[self._seen:self._seen + len(images)].to(self._device)
                found += [real.gather(1, top[:, :1]).sum(), real.any(1).sum()]
            sums[:len(found)] += torch.stack(found)
            if self._classes is not None:
                sums[len(self.names):] += evidence.slopes(logits, targets)
                self._images.setdefault(name, []).append(
                    torch.stack([targets.to(sums), top[:, 0].to(sums), logits.softmax(1).amax(1).to(sums)], 1))
        self._seen += len(images)

    def result(self, models: Sequence[str]) -> dict[str, dict[str, Any]]:
        results = {}
        for model in models:  # also where this rank had no image: all ranks take part in the exchange
            packed = torch.cat([self._sums_of(model), torch.full((1,), self._seen).to(self._sums_of(model))])
            if dist.is_initialized():
                dist.all_reduce(packed)
            count = packed[-1].item() or math.nan  # a stream may give no image at all
            total = dict(zip(self.names, packed.tolist(), strict=False))
            result = {'acc1': 100 * total['right1'] / count, 'acc5': 100 * total['right5'] / count,
                      'loss': total['loss'] / count, 'count': int(packed[-1])}
            if self._real is not None:
                result['real_acc1'] = 100 * total['real_right'] / max(total['real_count'], 1)
            if self._classes is not None and result['count']:
                images = gather([packed.new_zeros(0, 3), *self._images.get(model, ())])
                result |= self._details(total, images.cpu(), packed[len(self.names):-1].tolist())
            results[model] = result
        return results

    def _details(self, total: dict[str, float], images: Tensor, slopes: list[float]) -> dict[str, Any]:
        """What the result holds with `classes`, from the images of all ranks, [images, 3]."""
        targets, guesses, confidences = images[:, 0].long(), images[:, 1].long(), images[:, 2]
        right, rows = targets == guesses, evidence.class_rows(targets, guesses, self._classes)
        counts = {'acc1': (total['right1'], len(images)), 'acc5': (total['right5'], len(images))}
        if self._real is not None and total['real_count']:
            counts['real_acc1'] = (total['real_right'], total['real_count'])
        details = {f'interval_{name}': list(evidence.wilson(round(hits), round(of)))
                   for name, (hits, of) in counts.items()}
        details |= {'mean_class_acc1': sum(row['acc1'] for row in rows) / len(rows),
                    'ece': evidence.calibration_error(confidences, right), 'temperature': evidence.temperature(slopes),
                    'worst_classes': evidence.worst(rows), 'right': right, 'classes': rows,
                    'confusions': evidence.confusions(targets, guesses, self._classes)}
        if (size := len(self._classes)) <= MAX_CONFUSION:
            details['confusion'] = (targets * size + guesses).bincount(minlength=size**2).view(size, size).tolist()
        return details


def gather(batches: Sequence[Tensor]) -> Tensor:
    """The rows of all ranks' batches, [images, columns], in the order of a source that the ranks share out.

    Its image i is on rank i % world size. The first column is nowhere negative.
    """
    rows = torch.cat(list(batches))
    if not dist.is_initialized():
        return rows
    longest = torch.tensor(len(rows), device=rows.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    padded = rows.new_full((int(longest), rows.shape[1]), -1)
    padded[:len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, padded)
    rows = torch.stack(parts, 1).flatten(0, 1)
    return rows[rows[:, 0] >= 0]


def balanced_weights(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """A weight for each class, float32: the inverse of its number of images; their mean over the images is 1.

    A class without images has the weight 0.

    Args:
        labels: the class of each image.
    """
    counts = np.bincount(labels, minlength=num_classes)
    there = np.count_nonzero(counts)
    return np.divide(len(labels) / there, counts, out=np.zeros(num_classes), where=counts > 0).astype(np.float32)


def read_class_weights(path: str, classes: Sequence[str]) -> np.ndarray:
    """A weight for each class, float32, from a file of NAME WEIGHT lines, or of a weight a line in the classes' order.

    Raises:
        UserError: where a class has no weight or two, or a weight is no number from 0.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding='utf-8-sig').splitlines() if line.strip()]
        names, values = list(classes), lines
        if any(len(line.split()) > 1 for line in lines):
            pairs = [line.rsplit(maxsplit=1) for line in lines]
            names, values = [pair[0] for pair in pairs], [pair[-1] for pair in pairs]
        weights = np.array(values, np.float32)
    except (OSError, ValueError) as error:
        raise UserError(f'--class_weights {path} cannot be read ({error}); give NAME WEIGHT lines, or balanced'
                        ) from None
    if len(names) != len(weights) or len(names) != len(classes):
        raise UserError(f'--class_weights {path} has {len(weights)} weights, but there are {len(classes)} classes; '
                        'give each class one')
    if lost := labels.lacking(classes, names):
        raise UserError(f'--class_weights {path} has no weight for {labels.some(lost)}; give each class one')
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise UserError(f'--class_weights {path}: give finite weights from 0, not all of them 0')
    return weights[labels.find(classes, names)]


def read_valid_labels(path: str, recipe: Recipe, classes: list[str]) -> list[int]:
    """The model's classes in a file, one index a line, each of one of the data's `classes`. Raises UserError."""
    try:
        labels = [int(line) for line in Path(path).read_text(encoding='utf-8-sig').split()]
    except (OSError, ValueError) as error:
        raise UserError(f'--valid_labels {path} cannot be read ({error}); give a class index a line') from None
    if not labels or min(labels) < 0 or max(labels) >= (recipe.num_classes or 0):
        raise UserError(f'--valid_labels {path}: give indices below the {recipe.num_classes} classes of the model')
    if len(set(labels)) < len(labels):
        raise UserError(f'--valid_labels {path} names a class twice; give each of the data\'s classes one of its own')
    if classes and len(labels) != len(classes):
        raise UserError(f'--valid_labels {path} names {len(labels)} classes, but the data has {len(classes)}; give one '
                        'for each, in the order of the data')
    return labels


def read_real_labels(path: str, names: Sequence[str], *, num_classes: int) -> Tensor:
    """Bool [images of this rank, classes] from ReaL's JSON: a list of labels for each image, by its number.

    Args:
        names: the images' paths.

    Raises:
        UserError: where the file or the images' names are not ImageNet's.
    """
    try:
        labels = json.loads(Path(path).read_text(encoding='utf-8-sig'))
        real = torch.zeros(len(names), num_classes, dtype=torch.bool)
        for row, name in enumerate(names):
            number = int(Path(name).stem.rsplit('_', 1)[-1])
            right = labels[number - 1] if number > 0 else None
            # torch takes -1 for the last class, and None for all of them
            if not isinstance(right, list) or not all(type(label) is int and 0 <= label < num_classes
                                                      for label in right):
                raise ValueError(f'the labels of {name} are {right}')
            real[row, right] = True
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise UserError(f'--real_labels {path} does not fit the images ({error}); give ReaL\'s real.json and the '
                        'ImageNet test images under their own names (ILSVRC2012_val_00000001.JPEG)') from None
    return real
