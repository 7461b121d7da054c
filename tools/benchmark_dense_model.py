"""Training steps of Mask R-CNN beside those of torchvision's, and of UPerNet beside those of
segmentation-models-pytorch's, on the same backbone (`tools/benchmark.py dense`).

Both have the same channels. The other one is measured as it comes, and as ours: channels-last. Mask R-CNN has as many
proposals and samples, and as ours RoIAlign with sampling points by a box's size, where torchvision takes 2 x 2 a cell.
Our UPerNet trains its auxiliary head too, which the other one lacks.
"""
import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from models.dense import build_dense
from models.detection import create_backbone
from models.rcnn import BOX, MASK
from recipes import Recipe
from recipes.dense import Dense
from tools.alternation import Row, alternate
from utils import UserError

BOXES = 7  # an image, as in COCO
Inputs = tuple[torch.Tensor, Any]  # what a model takes in training


class Pyramid(nn.Module):
    """A backbone with torchvision's feature pyramid, as torchvision's detectors take it."""

    out_channels = 256

    def __init__(self, name: str, **kwargs: Any) -> None:
        super().__init__()
        self.backbone = create_backbone(name, **kwargs)
        self.fpn = FeaturePyramidNetwork(self.backbone.feature_info.channels(), self.out_channels,
                                         extra_blocks=LastLevelMaxPool())

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images [B, 3, H, W] -> levels '0' to '3' and 'pool', of strides 4 to 64."""
        return self.fpn({str(i): level for i, level in enumerate(self.backbone(images))})


def torchvision_mask_rcnn(recipe: Recipe, classes: int, *, as_ours: bool) -> nn.Module:
    """torchvision's Mask R-CNN, with the anchors, proposals and samples of ours, on images that are not resized."""
    pools = {f'{kind}_roi_pool': MultiScaleRoIAlign(list('0123'), size, sampling_ratio=0)
             for kind, size in (('box', BOX), ('mask', MASK)) if as_ours}
    return MaskRCNN(
        Pyramid(recipe.model, **recipe.model_kwargs), classes + 1, _skip_resize=True, rpn_post_nms_top_n_train=1000,
        **pools,
        rpn_anchor_generator=AnchorGenerator(tuple((8 * 2**i,) for i in range(2, 7)), ((0.5, 1.0, 2.0),) * 5))


def boxes_and_masks(size: tuple[int, int, int], classes: int) -> tuple[Inputs, Inputs]:
    """Random boxes on random images [B, H, W] for our Mask R-CNN and for torchvision's, whose labels begin at 1."""
    batch, height, width = size
    rng = torch.Generator().manual_seed(0)
    images, ours, theirs = torch.rand(batch, 3, height, width, generator=rng), [], []
    for _ in range(batch):
        corners = torch.rand(BOXES, 2, generator=rng) * 0.5
        sides = torch.rand(BOXES, 2, generator=rng) * 0.4 + 0.1
        boxes = torch.cat((corners, corners + sides), 1) * torch.tensor([width, height] * 2)
        masks = torch.zeros(BOXES, height, width, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
        labels = torch.randint(classes, (BOXES,), generator=rng)
        ours.append({'boxes': boxes, 'labels': labels, 'masks': masks, 'size': (height, width)})
        theirs.append({'boxes': boxes, 'labels': labels + 1, 'masks': masks.byte()})
    return (images, ours), (images, theirs)


class OtherUPerNet(nn.Module):
    """segmentation-models-pytorch's UPerNet with the cross-entropy; its encoders of timm's are named `tu-`.

    Raises:
        UserError: the package is not installed.
    """

    def __init__(self, recipe: Recipe, classes: int) -> None:
        super().__init__()
        if importlib.util.find_spec('segmentation_models_pytorch') is None:
            raise UserError(f'--recipe {recipe.name} is measured beside segmentation-models-pytorch, which is not '
                            'installed: pip install segmentation-models-pytorch')
        from segmentation_models_pytorch import UPerNet
        self.model = UPerNet(f'tu-{recipe.model}', encoder_weights=None, classes=classes,
                             decoder_channels=recipe.network_kwargs.get('channels', 512), **recipe.model_kwargs)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images [B, 3, H, W] and labels [B, H, W] -> the loss, by its name."""
        return {'loss': F.cross_entropy(self.model(images), labels)}


def labelled(size: tuple[int, int, int], classes: int) -> Inputs:
    """Random images [B, 3, H, W] and random labels [B, H, W] of all pixels."""
    batch, height, width = size
    rng = torch.Generator().manual_seed(0)
    return (torch.rand(batch, 3, height, width, generator=rng),
            torch.randint(classes, (batch, height, width), generator=rng))


def training_step(model: nn.Module, inputs: Inputs, layout: torch.memory_format) -> Callable[[], None]:
    """A training step of forward, backward and AdamW on the same images again and again."""
    model = model.to(memory_format=layout).train()
    images, targets = inputs
    images = images.to(memory_format=layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step() -> None:
        sum(model(images, targets).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def beside_torchvision(recipe: Recipe, size: tuple[int, int, int], classes: int) -> dict[str, Callable[[], None]]:
    """The training steps of Mask R-CNN."""
    ours, theirs = boxes_and_masks(size, classes)
    return {
        'torchvision': training_step(
            torchvision_mask_rcnn(recipe, classes, as_ours=False), theirs, torch.contiguous_format),
        'torchvision, as ours': training_step(
            torchvision_mask_rcnn(recipe, classes, as_ours=True), theirs, torch.channels_last),
        'this': training_step(build_dense(recipe, num_classes=classes), ours, torch.channels_last)}


def beside_smp(recipe: Recipe, size: tuple[int, int, int], classes: int) -> dict[str, Callable[[], None]]:
    """The training steps of UPerNet."""
    inputs = labelled(size, classes)
    return {
        'smp': training_step(OtherUPerNet(recipe, classes), inputs, torch.contiguous_format),
        'smp, as ours': training_step(OtherUPerNet(recipe, classes), inputs, torch.channels_last),
        'this': training_step(build_dense(recipe, num_classes=classes), inputs, torch.channels_last)}


BESIDE = {'mask_rcnn': beside_torchvision, 'upernet': beside_smp}


def measure(recipe: Recipe, *, batch_size: int = 2, height: int = 256, width: int = 320, rounds: int = 7) -> list[Row]:
    """Measures training steps on the CPU in this process, one thread, alternated.

    Returns:
        A row a contender: images a second, and the speed-up over the other library's as it comes, with its spread.

    Raises:
        UserError: for a recipe of another network, or where the other library is not installed.
    """
    if not isinstance(recipe, Dense) or recipe.network not in BESIDE:
        raise UserError(f'--recipe {recipe.name} is neither Mask R-CNN nor UPerNet, which other libraries have too; '
                        'give a row of one of them')
    classes = recipe.num_classes or recipe.known_classes
    recipe = dataclasses.replace(recipe, num_classes=classes)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with contextlib.ExitStack() as restored:
        restored.callback(torch.set_num_threads, threads)
        measured = alternate(BESIDE[recipe.network](recipe, (batch_size, height, width), classes), rounds=rounds)
    return [{'model': contender, 'images/s': batch_size / found['seconds'], 'speedup': found['speedup']}
            for contender, found in measured.items()]
