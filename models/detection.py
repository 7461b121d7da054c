"""RetinaNet (https://arxiv.org/abs/1708.02002) over a feature pyramid (https://arxiv.org/abs/1612.03144), for any timm
backbone with maps at strides 4 to 32, and what it shares with the other detectors.

The function and the state-dict names are those of mmdet 2.26, with which the authors trained the released detectors
(`backbone.`, `neck.`, `bbox_head.`), so that their files need no converter.
"""
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import sigmoid_focal_loss

from models import boxes as box
from models.build import create_model
from models.moganet import Blocks
from utils import UserError

EPSILON = torch.finfo(torch.float32).eps
STRIDES = [4, 8, 16, 32]
# boxes [n, 4], labels [n] from 0, size (h, w) of the image inside the padding; for mask heads, masks bool [n, h, w]
Target = dict[str, Any]


def create_backbone(name: str, **kwargs: Any) -> nn.Module:
    """A timm model that gives its maps at strides 4, 8, 16 and 32; raises UserError where there are none."""
    backbone = create_model(name, features_only=True, out_indices=(-4, -3, -2, -1), **kwargs)
    strides = backbone.feature_info.reduction()
    if strides != STRIDES:
        raise UserError(f'a dense model needs maps at strides 4, 8, 16 and 32, and the last four of {name} are at '
                        f'{", ".join(map(str, strides))}; choose a model with four stages')
    return backbone


def freeze_backbone(backbone: nn.Module, *, stages: int = 0, norms: bool = False) -> None:
    """Takes the gradient from a backbone's stem and first stages, and from its batch norms.

    `engine.train_mode` keeps what is frozen in evaluation mode, so that the statistics stay too.

    Raises:
        UserError: where the backbone does not tell its stages apart, or nothing of it would be left to train.
    """
    ends = list(getattr(backbone, 'return_layers', ()))  # the last part of each stage
    if stages and not ends:
        raise UserError(f'--freeze_stages: {type(backbone).__name__} does not name its stages; give 0')
    if stages >= len(ends) > 0:
        raise UserError(f'--freeze_stages {stages}: the backbone has {len(ends)} stages; give at most {len(ends) - 1}')
    parts = list(backbone.named_children())
    count = [name for name, _ in parts].index(ends[stages - 1]) + 1 if stages else 0
    frozen = [part for _, part in parts[:count]]
    if norms:
        frozen += [module for module in backbone.modules() if isinstance(module, _BatchNorm)]
    for module in frozen:
        module.requires_grad_(False)


class SyncedNorm(nn.BatchNorm2d):
    """A head's batch norm, by the statistics of all ranks on CUDA; elsewhere, where there is no such, by the rank's.

    It is no `SyncBatchNorm`, which DDP refuses on the CPU, but computes as one.
    """

    process_group = None  # all ranks
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, C, H, W] -> the same, normalised."""
        return nn.SyncBatchNorm.forward(self, x) if x.is_cuda else super().forward(x)


def convolution(
    in_channels: int, channels: int, kernel: int, *, stride: int = 1, norm: bool = False, relu: bool = False
) -> nn.Sequential:
    """A convolution that keeps the size, up to its stride; the released files call it `conv`, and its norm `bn`."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(in_channels, channels, kernel, stride=stride, padding=kernel // 2, bias=not norm))
    if norm:
        layers['bn'] = SyncedNorm(channels)
    if relu:
        layers['relu'] = nn.ReLU(inplace=True)
    return nn.Sequential(layers)


class FPN(nn.Module):
    """A feature pyramid: every map to the same channels, from the top down each added to the map below.

    Args:
        in_channels: of the maps, from the finest.
        channels: of the pyramid's levels.
        extra: levels above, by convolutions of stride 2: the first of the coarsest *input*, each other of the level
            below it, with no ReLU between.
    """

    def __init__(self, in_channels: Sequence[int], channels: int = 256, *, extra: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(convolution(count, channels, 1) for count in in_channels)
        self.fpn_convs = nn.ModuleList(convolution(channels, channels, 3) for _ in in_channels)
        self.fpn_convs.extend(
            convolution(channels if i else in_channels[-1], channels, 3, stride=2) for i in range(extra))
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.xavier_uniform_(conv.weight)
                nn.init.zeros_(conv.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps [B, C_i, H_i, W_i] -> levels [B, channels, H_i, W_i], then the extra ones, halved and rounded up."""
        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + F.interpolate(levels[i], size=levels[i - 1].shape[-2:], mode='nearest')
        count = len(levels)
        levels = [conv(x) for conv, x in zip(self.fpn_convs[:count], levels, strict=True)]
        x = maps[-1]
        for conv in self.fpn_convs[count:]:
            x = conv(x)
            levels.append(x)
        return levels


class RetinaHead(nn.Module):
    """Two towers of 3x3 convolutions, shared by all levels: a logit for each anchor and class, deltas for each anchor.

    Args:
        channels: of the levels and of the towers.
        num_classes: K.
        anchors: A, the anchors of a cell.
        depth: convolutions of a tower.
    """

    def __init__(self, channels: int = 256, *, num_classes: int, anchors: int, depth: int = 4) -> None:
        super().__init__()
        self.cls_convs = nn.ModuleList(convolution(channels, channels, 3, relu=True) for _ in range(depth))
        self.reg_convs = nn.ModuleList(convolution(channels, channels, 3, relu=True) for _ in range(depth))
        self.retina_cls = nn.Conv2d(channels, anchors * num_classes, 3, padding=1)
        self.retina_reg = nn.Conv2d(channels, anchors * 4, 3, padding=1)
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.normal_(conv.weight, std=0.01)
                nn.init.zeros_(conv.bias)
        nn.init.constant_(self.retina_cls.bias, -math.log(99))  # at first, all scores are 0.01

    def forward(self, levels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Levels [B, channels, H, W] -> logits [B, A * K, H, W] and deltas [B, A * 4, H, W] of each."""
        logits, deltas = [], []
        for level in levels:
            x = y = level
            for conv in self.cls_convs:
                x = conv(x)
            for conv in self.reg_convs:
                y = conv(y)
            logits.append(self.retina_cls(x))
            deltas.append(self.retina_reg(y))
        return logits, deltas


def by_anchor(maps: Tensor, last: int) -> Tensor:
    """[..., A * last, H, W] -> float32 [..., H * W * A, last], in the anchors' order."""
    # Counted from the front, as ONNX does
    return maps.movedim(maps.ndim - 3, maps.ndim - 1).flatten(maps.ndim - 3).unflatten(-1, (-1, last)).float()


def focal_loss(logits: Tensor, labels: Tensor, weights: Tensor, count: Tensor | float) -> Tensor:
    """The sum of the sigmoid focal loss over all candidates and classes, divided by the count.

    Args:
        logits: [..., K].
        labels: [...], int64; K is the background.
        weights: [...] of the candidates; 0 leaves one out.
        count: what to divide by.
    """
    wanted = labels[..., None] == torch.arange(logits.shape[-1], device=logits.device)
    loss = sigmoid_focal_loss(logits, wanted.to(logits.dtype), alpha=0.25, gamma=2.0)
    return (loss * weights[..., None]).sum() / (count + EPSILON)


def l1_loss(deltas: Tensor, wanted: Tensor, positive: Tensor, count: Tensor | float) -> Tensor:
    """The sum of the distances of deltas [..., 4] where `positive` [...], divided by the count.

    Where nothing is positive the loss is 0, and so are its gradients, which are there.
    """
    return torch.where(positive[..., None], (deltas - wanted).abs(), 0.0).sum() / (count + EPSILON)


class Dense(nn.Module):
    """What detectors and segmentors have: a backbone, whose maps their heads take.

    Args:
        backbone: a timm model's name.
        num_classes: classes; of a detector, the background not counted.
        kwargs: the backbone's, such as `drop_path_rate`, `gate` or `pretrained`.

    Raises:
        UserError: the backbone cannot be built so, or has no maps at strides 4 to 32.
    """

    def __init__(self, backbone: str, *, num_classes: int, **kwargs: Any) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = create_backbone(backbone, **kwargs)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade a second forward pass of the backbone for the memory of its activations."""
        stages = [module for module in self.backbone.modules() if isinstance(module, Blocks)]
        for stage in stages:
            stage.grad_checkpointing = enable
        if not stages:
            getattr(self.backbone, 'model', self.backbone).set_grad_checkpointing(enable)  # timm wraps some

    def maps(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] -> the backbone's maps [B, C_i, H / s, W / s] at the strides 4, 8, 16 and 32."""
        maps = self.backbone(images)
        if getattr(self.backbone, 'output_fmt', 'NCHW') == 'NHWC':  # a Swin's
            maps = [x.permute(0, 3, 1, 2) for x in maps]
        return maps


class Detector(Dense):
    """What all detectors have beside a backbone: anchors that lie in an image's padding."""

    SIZE_DIVISOR = 32  # an image is padded to a multiple, in which its anchors lie

    def padded(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size (h, w) of an image with its own padding, which in a batch may be smaller than the batch's."""
        height, width = (-(-int(side) // self.SIZE_DIVISOR) * self.SIZE_DIVISOR for side in size)
        return height, width


class RetinaNet(Detector):
    """RetinaNet: a score for each class at each anchor, all anchors trained by the focal loss.

    Args:
        backbone: a timm model's name.
        num_classes: classes, the background not counted.
        channels: of the pyramid and of the head.
        depth: convolutions of each of the head's towers.
        anchor_scale: side of a level's smallest square anchor, in its strides.
        kwargs: the backbone's, such as `drop_path_rate`, `gate` or `pretrained`.

    Raises:
        UserError: the backbone cannot be built so, or has no maps at strides 4 to 32.
    """

    ANCHORS: ClassVar = {'strides': (8, 16, 32, 64, 128), 'scales': tuple(4 * 2 ** (i / 3) for i in range(3))}
    LOSSES = ('loss_cls', 'loss_bbox')
    # The layers that know the classes. Of the first, channels for each class, and further ones
    LAST: ClassVar = {'bbox_head.retina_cls': (9, 0)}
    BEFORE_NMS = 1000  # candidates of a level

    def __init__(
        self, backbone: str, *, num_classes: int = 80, channels: int = 256, depth: int = 4, anchor_scale: float = 4.0,
        **kwargs: Any
    ) -> None:
        super().__init__(backbone, num_classes=num_classes, **kwargs)
        self.anchors = box.Anchors(
            self.ANCHORS['strides'], scales=[anchor_scale / 4 * scale for scale in self.ANCHORS['scales']])
        self.neck = FPN(self.backbone.feature_info.channels()[1:], channels, extra=2)
        self.bbox_head = RetinaHead(channels, num_classes=num_classes, anchors=self.anchors.per_cell, depth=depth)

    def features(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] -> the pyramid's five levels [B, channels, H / 8, W / 8] ... [.., H / 128, W / 128]."""
        return self.neck(self.maps(images)[1:])

    def outputs(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The head's logits and deltas of each level, of images [B, 3, H, W]: all that is computed before detections
        are chosen."""
        return self.bbox_head(self.features(images))

    def forward(self, images: Tensor, targets: Sequence[Target], proposals: None = None) -> dict[str, Tensor]:
        """The losses, whose sum is to be minimised, in training and in evaluation mode alike; no wait for the device.

        Args:
            images: [B, 3, H, W], normalised, each padded with zeros to the right and below.
            targets: of each image `boxes` [n, 4], also of none, `labels` [n] and `size` (h, w) without the padding.
            proposals: for detectors with two stages.

        Returns:
            `loss_cls` and `loss_bbox`, float32 scalars.
        """
        if proposals is not None:
            raise ValueError('RetinaNet has no proposals')
        return self.losses(*self.outputs(images), targets)

    def losses(self, logits: list[Tensor], deltas: list[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        """The losses of the head's maps, divided by the sum over images of max(1, positive anchors); see `forward`."""
        sizes = [tuple(level.shape[-2:]) for level in logits]
        anchors = self.anchors(sizes)
        counts = [len(level) for level in anchors]
        matched = [self._match(target, sizes, torch.cat(anchors)) for target in targets]
        indices, labels, wanted = (torch.stack(values) for values in zip(*matched, strict=True))
        positives = (indices > 0).sum(dim=1).clamp(min=1).sum()
        classification, regression = [], []
        for x, y, index, label, delta in zip(
                logits, deltas, *(values.split(counts, dim=1) for values in (indices, labels, wanted)), strict=True):
            classification.append(focal_loss(by_anchor(x, self.num_classes), label, (index >= 0).float(), positives))
            regression.append(l1_loss(by_anchor(y, 4), delta, index > 0, positives))
        return {'loss_cls': torch.stack(classification).sum(), 'loss_bbox': torch.stack(regression).sum()}

    def _match(self, target: Target, sizes: list[tuple[int, int]], anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each of an image's anchors [A, 4]: what `assign` gives [A], the class [A], the deltas wanted [A, 4]."""
        inside = torch.cat(self.anchors.inside(sizes, self.padded(target['size'])))
        boxes, labels = target['boxes'].float().reshape(-1, 4), target['labels']
        index = box.assign(boxes, anchors, positive=0.5, negative=0.4, low_quality=0.0, valid=inside)
        if not len(boxes):
            return index, torch.full_like(index, self.num_classes), torch.zeros_like(anchors)
        which, positive = (index - 1).clamp(min=0), index > 0
        wanted = box.encode(anchors, torch.where(positive[:, None], boxes[which], anchors))
        return index, torch.where(positive, labels[which], self.num_classes), wanted

    @torch.no_grad()
    def predict(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], original_sizes: Sequence[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """The detections, at most 100 an image, by falling score; the model has to be in evaluation mode.

        Args:
            images: [B, 3, H, W] as in `forward`.
            sizes: (h, w) of each image without the padding.
            original_sizes: (h, w) of each image before it was resized, to which the boxes are scaled.

        Returns:
            Of each image `boxes` [n, 4] and `scores` [n], float32, and `labels` [n], int64 from 0.
        """
        logits, deltas = self.outputs(images)
        anchors = self.anchors([tuple(level.shape[-2:]) for level in logits])
        detections = []
        for i, (size, original) in enumerate(zip(sizes, original_sizes, strict=True)):
            candidates = [
                self._candidates(by_anchor(x[i], self.num_classes), by_anchor(y[i], 4), level, size)
                for x, y, level in zip(logits, deltas, anchors, strict=True)]
            boxes, scores, labels = (torch.cat(values) for values in zip(*candidates, strict=True))
            boxes = box.scale(boxes, size, original)
            kept = box.choose(boxes, scores, labels, score=0.05, iou=0.5, count=100)
            detections.append({'boxes': boxes[kept], 'scores': scores[kept], 'labels': labels[kept]})
        return detections

    def _candidates(
        self, logits: Tensor, deltas: Tensor, anchors: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes [n, 4], scores [n] and labels [n] of the highest of a level's logits [A, K]."""
        scores = logits.flatten().sigmoid()
        scores, index = scores.topk(min(self.BEFORE_NMS, len(scores)))
        which, labels = index // self.num_classes, index % self.num_classes
        return box.decode(anchors[which], deltas[which], size=size), scores, labels
