"""Mask R-CNN (https://arxiv.org/abs/1703.06870) and Cascade Mask R-CNN (https://arxiv.org/abs/1906.09756) over a
feature pyramid, for any timm backbone with maps at strides 4 to 32; both without masks too.

A first stage, the RPN, proposes boxes without a class; the features in each are pooled to one size, from which the
heads of the following stages tell its class, a better box, and its mask. The function and the state-dict names are
those of mmdet 2.26, as in `detection.py`: the background is the last class, RoIAlign is aligned and adaptive.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou, roi_align

from models import boxes as box
from models.detection import EPSILON, FPN, Detector, Target, by_anchor, convolution

STRIDES = (4, 8, 16, 32)  # of the levels from which boxes and masks are pooled
BOX, MASK = 7, 14  # cells along each side of a pooled map
# RoIAlign's compiled form, whose values always repeat to the bit; on CUDA, its gradients do not. Torchvision's function
# leaves it where `torch.are_deterministic_algorithms_enabled()`, even where there are no gradients
KERNEL = torch.ops.torchvision.roi_align
CANVASES = 2**24  # pixels of the masks that are pasted at once; each costs 12 bytes for a moment


@dataclass(frozen=True)
class Stage:
    """How the boxes of a stage are matched and coded.

    Attributes:
        iou: the least IoU of a positive box.
        stds: by which the deltas are divided.
        weight: of the stage's losses.
    """

    iou: float
    stds: box.Stds = (0.1, 0.1, 0.2, 0.2)
    weight: float = 1.0


@dataclass(frozen=True)
class Samples:
    """What a stage is trained on in an image.

    Attributes:
        boxes: [n, 4], the positive ones first, and of them the ground truth itself first.
        labels: [n], the number of classes for the background.
        which: [positive], the ground truth's index of each positive box.
        proposed: [m], the positions of the boxes that are not the ground truth itself.
    """

    boxes: Tensor
    labels: Tensor
    which: Tensor
    proposed: Tensor

    @property
    def positive(self) -> int:
        """The number of positive boxes."""
        return len(self.which)


# ---- Heads ----------------------------------------------------------------------------------------------------------


class RPNHead(nn.Module):
    """A convolution shared by all levels, then for each anchor a logit of its being an object, and deltas.

    Args:
        channels: of the levels.
        anchors: A, the anchors of a cell.
    """

    def __init__(self, channels: int, *, anchors: int) -> None:
        super().__init__()
        self.rpn_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.rpn_cls = nn.Conv2d(channels, anchors, 1)
        self.rpn_reg = nn.Conv2d(channels, anchors * 4, 1)
        for conv in self.children():
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)

    def forward(self, levels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Levels [B, channels, H, W] -> logits [B, A, H, W] and deltas [B, A * 4, H, W] of each."""
        shared = [F.relu(self.rpn_conv(level)) for level in levels]
        return [self.rpn_cls(x) for x in shared], [self.rpn_reg(x) for x in shared]


class BoxHead(nn.Module):
    """Class and box from pooled features: convolutions with batch norms or none, then linear layers.

    Args:
        channels: of the features.
        num_classes: K.
        boxes: deltas for each class, K, or one for all, 1.
        convs: 3x3 convolutions.
        hidden: widths of the linear layers.
    """

    def __init__(self, channels: int, *, num_classes: int, boxes: int, convs: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.fc_cls = nn.Linear(hidden[-1], num_classes + 1)
        self.fc_reg = nn.Linear(hidden[-1], boxes * 4)
        self.shared_convs = nn.ModuleList(
            convolution(channels, channels, 3, norm=True, relu=True) for _ in range(convs))
        widths = (channels * BOX**2, *hidden)
        self.shared_fcs = nn.ModuleList(map(nn.Linear, widths[:-1], widths[1:]))
        for layer in self.shared_fcs:
            nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(self.fc_cls.weight, std=0.01)
        nn.init.normal_(self.fc_reg.weight, std=0.001)
        for layer in (*self.shared_fcs, self.fc_cls, self.fc_reg):
            nn.init.zeros_(layer.bias)
        for conv in self.shared_convs:
            nn.init.kaiming_normal_(conv.conv.weight, mode='fan_out', nonlinearity='relu')

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features [n, channels, 7, 7] -> float32 logits [n, K + 1] and deltas [n, boxes, 4]."""
        for conv in self.shared_convs:
            x = conv(x)
        x = x.flatten(1)
        for layer in self.shared_fcs:
            x = F.relu(layer(x))
        return self.fc_cls(x).float(), self.fc_reg(x).float().unflatten(1, (-1, 4))


class MaskHead(nn.Module):
    """A mask for each class from pooled features.

    Args:
        channels: of the features.
        num_classes: K.
        kaiming: fresh weights of the last two layers by Kaiming's rule, as Mask R-CNN's; the cascade's are PyTorch's.
    """

    def __init__(self, channels: int, *, num_classes: int, kaiming: bool) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convolution(channels, channels, 3, relu=True) for _ in range(4))
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.conv_logits = nn.Conv2d(channels, num_classes, 1)
        for layer in (*(conv.conv for conv in self.convs), *((self.upsample, self.conv_logits) if kaiming else ())):
            nn.init.kaiming_normal_(layer.weight, mode='fan_out', nonlinearity='relu')
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Features [n, channels, 14, 14] -> float32 logits [n, K, 28, 28]."""
        for conv in self.convs:
            x = conv(x)
        return self.conv_logits(F.relu(self.upsample(x))).float()


# ---- Between the stages ---------------------------------------------------------------------------------------------


def rois_of(boxes: Sequence[Tensor]) -> Tensor:
    """Boxes [n_i, 4] of each image -> [n, 5], before each box the number of its image."""
    return torch.cat([F.pad(of_image, (1, 0), value=i) for i, of_image in enumerate(boxes)])


def roi_levels(rois: Tensor) -> Tensor:
    """The level, from 0, of which each of the RoIs [n, 5] takes its features: larger ones from coarser levels."""
    sides = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
    return (sides / 56 + 1e-6).log2().floor().clamp(0, len(STRIDES) - 1)


def picks_rois(level: Tensor) -> bool:
    """Whether a level pools its own RoIs alone, in training.

    It does on the CPU, which waits for nothing, and where the other levels' RoIs cost a seventh of a training step. It
    also does where gradients shall repeat to the bit (`--deterministic`): torchvision then takes another form on CUDA,
    in which a RoI without area divides 0 by 0 and has gradients of NaN.
    """
    return torch.is_grad_enabled() and (level.device.type == 'cpu' or torch.are_deterministic_algorithms_enabled())


def roi_features(levels: Sequence[Tensor], rois: Tensor, size: int) -> Tensor:
    """The features of RoIs [n, 5] from levels [B, C, H, W]: float32 [n, C, size, size].

    On CUDA without a wait for the device: each level pools all RoIs, of which those of another level have no area. Such
    a RoI has no sampling points, costs next to nothing there and gives zeros. To pick the RoIs of a level, the host
    would have to wait for their number.
    """
    number = roi_levels(rois)
    pooled = levels[0].new_zeros((rois.shape[0], levels[0].shape[1], size, size), dtype=torch.float32)
    for i, (level, stride) in enumerate(zip(levels, STRIDES, strict=True)):
        if not picks_rois(level):
            own = torch.where((number == i)[:, None], rois, F.pad(rois[:, :1], (0, 4)))
            pooled = pooled + KERNEL(level.float(), own, 1 / stride, size, size, 0, True)
        elif len(which := (number == i).nonzero()[:, 0]):
            pooled[which] = roi_align(level.float(), rois[which], size, 1 / stride, sampling_ratio=0, aligned=True)
    return pooled


def of_class(values: Tensor, labels: Tensor) -> Tensor:
    """values[i, labels[i]] of [n, K, ...], or values[i, 0] where all classes share one.

    No place is read twice, so that gradients repeat to the bit.
    """
    if values.shape[1] == 1:
        return values[:, 0]
    return values[torch.arange(values.shape[0], device=values.device), labels]


def positives(values: Tensor, samples: Sequence[Samples]) -> Tensor:
    """The rows of [n, ...], which are of all images' samples, that are of positive boxes."""
    rows = values.split([len(sample.boxes) for sample in samples])
    return torch.cat([of_image[:sample.positive] for of_image, sample in zip(rows, samples, strict=True)])


def mask_targets(masks: Tensor, padded: tuple[int, int], boxes: Tensor, which: Tensor) -> Tensor:
    """What the mask head shall say of boxes [n, 4]: 0 or 1, float32 [n, 28, 28].

    Args:
        masks: bool [m, h, w] of an image.
        padded: (h, w) with the image's own padding, in which the masks are 0.
        boxes: in the image.
        which: [n], the mask of each.
    """
    height, width = masks.shape[1:]
    whole = F.pad(masks.float(), (0, padded[1] - width, 0, padded[0] - height))[:, None]
    rois = torch.cat((which[:, None].to(boxes.dtype), boxes), dim=1)
    return (KERNEL(whole, rois, 1.0, 2 * MASK, 2 * MASK, 0, True)[:, 0] >= 0.5).float()


def paste(probabilities: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks in boxes -> masks in an image, where the interpolated probability is at least 0.5.

    Args:
        probabilities: [n, 28, 28].
        boxes: [n, 4] in the image; one without area gets an empty mask.
        size: (h, w) of the image.

    Returns:
        bool [n, h, w].
    """
    pasted = torch.empty((len(boxes), *size), dtype=torch.bool, device=boxes.device)
    count = max(1, CANVASES // (size[0] * size[1]))
    for start in range(0, len(boxes), count):
        pasted[start:start + count] = paste_at_once(
            probabilities[start:start + count], boxes[start:start + count], size)
    return pasted


def paste_at_once(probabilities: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """As `paste`, for any number of masks without a loop, and 12 bytes a pixel of each."""
    rows, columns = (torch.arange(side, device=boxes.device) + 0.5 for side in size)
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
    tiny = torch.finfo(boxes.dtype).tiny  # far away, and not the middle, are the pixels of a box without area
    x = (columns - x0) / (x1 - x0).clamp(min=tiny) * 2 - 1
    y = (rows - y0) / (y1 - y0).clamp(min=tiny) * 2 - 1
    grid = torch.stack((x[:, None].expand(-1, size[0], -1), y[:, :, None].expand(-1, -1, size[1])), dim=3)
    grid = grid.clamp(-4, 4)  # a mask ends at -1 and 1
    return F.grid_sample(probabilities[:, None].to(grid.dtype), grid, align_corners=False)[:, 0] >= 0.5


# ---- The models -----------------------------------------------------------------------------------------------------


def _distance(rois: Tensor, deltas: Tensor, boxes: Tensor, *, stds: box.Stds, beta: float) -> Tensor:
    """The sum of the distances of deltas [n, 4] from those that make boxes [n, 4] of rois [n, 4]."""
    return F.smooth_l1_loss(deltas, box.encode(rois, boxes, stds=stds), beta=beta, reduction='sum')


class RCNN(Detector):
    """What detectors with two and more stages share.

    Args:
        backbone: a timm model's name.
        num_classes: classes, the background not counted.
        masks: whether there are mask heads; without them, targets need no masks.
        channels: of the pyramid and of the heads.
        hidden: width of the box heads' linear layers.
        samples: boxes of an image on which a stage is trained, a quarter of them positive at most.
        anchor_scale: side of a level's square anchor, in its strides.
        kwargs: the backbone's, such as `drop_path_rate`, `gate` or `pretrained`.

    Raises:
        UserError: the backbone cannot be built so, or has no maps at strides 4 to 32.
    """

    STAGES: tuple[Stage, ...]
    LOW_QUALITY: float | None  # of the assigner of boxes, see `box.assign`
    RPN_BETA: float  # where the RPN's distance turns from quadratic to linear; 0: it is linear
    ANCHORS_INSIDE: bool  # whether an anchor that leaves the image takes no part
    PROPOSALS: tuple[int, int]  # of an image, in training and in a test
    BEFORE_NMS = (2000, 1000)  # proposals of a level, in training and in a test

    def __init__(
        self, backbone: str, *, num_classes: int = 80, masks: bool = True, channels: int = 256, hidden: int = 1024,
        samples: int = 512, anchor_scale: float = 8.0, **kwargs: Any
    ) -> None:
        super().__init__(backbone, num_classes=num_classes, **kwargs)
        self.masks, self.samples = masks, samples
        self.anchors = box.Anchors((*STRIDES, 64), scales=(anchor_scale,))
        self.neck = FPN(self.backbone.feature_info.channels(), channels, extra=0)
        self.rpn_head = RPNHead(channels, anchors=self.anchors.per_cell)
        heads = {'bbox_head': partial(self.box_head, channels, hidden)}
        if masks:
            heads['mask_head'] = partial(MaskHead, channels, num_classes=num_classes, kaiming=not self.cascaded)
        # A released file numbers the heads of a cascade, and gives a single one no number
        self.roi_head = nn.ModuleDict({
            name: nn.ModuleList(make() for _ in self.STAGES) if self.cascaded else make()
            for name, make in heads.items()})

    @property
    def cascaded(self) -> bool:
        """Whether boxes pass through several stages."""
        return len(self.STAGES) > 1

    @property
    def without(self) -> tuple[str, ...]:
        """The parts of a file for which the model has no place, and need not have one."""
        return () if self.masks else ('roi_head.mask_head.',)

    def box_head(self, channels: int, hidden: int) -> BoxHead:
        """A stage's box head."""
        raise NotImplementedError

    def box_loss(self, rois: Tensor, deltas: Tensor, boxes: Tensor, *, stds: box.Stds) -> Tensor:
        """The sum of the losses of the deltas [n, 4] that shall make boxes [n, 4] of rois [n, 4]."""
        raise NotImplementedError

    def heads(self, name: str) -> list[nn.Module]:
        """The heads of the stages, `bbox_head` or `mask_head`."""
        return list(self.roi_head[name]) if self.cascaded else [self.roi_head[name]]

    def features(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] -> the pyramid's five levels [B, channels, H / 4, W / 4] ... [.., H / 64, W / 64]."""
        levels = self.neck(self.maps(images))
        return [*levels, F.max_pool2d(levels[-1], 1, stride=2)]

    def outputs(self, images: Tensor) -> list[Any]:
        """What the RPN and the heads give for images [B, 3, H, W]: a test's operations, without a choice of boxes.

        In place of what a test would choose, the box heads of every stage see 1,000 boxes of each image and the mask
        heads 100, without area. For measurements, on the device meta too.
        """
        levels = self.features(images)
        box_rois, mask_rois = (images.new_zeros(count * len(images), 5) for count in (1000, 100))
        given = [(BOX, 'bbox_head', box_rois), (MASK, 'mask_head', mask_rois)][:2 if self.masks else 1]
        heads = [head(roi_features(levels[:len(STRIDES)], rois, size)) for size, name, rois in given
                 for head in self.heads(name)]
        return [*self.rpn_head(levels), *heads]

    def forward(
        self, images: Tensor, targets: Sequence[Target], proposals: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The losses, whose sum is to be minimised, in training and in evaluation mode alike.

        Args:
            images: [B, 3, H, W], normalised, each padded with zeros to the right and below.
            targets: of each image `boxes` [n, 4], also of none, `labels` [n], `size` (h, w) without the padding and,
                if the model has mask heads, `masks` bool [n, h, w].
            proposals: of each image boxes [k, 4], in place of those that the RPN finds.

        Returns:
            float32 scalars: `loss_rpn_cls` and `loss_rpn_bbox`; `loss_cls`, `loss_bbox` and `loss_mask`, in a cascade
            with `s0.`, `s1.` and `s2.` before them.
        """
        return self.losses(self.features(images), targets, proposals)

    def losses(
        self, levels: Sequence[Tensor], targets: Sequence[Target], proposals: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The losses of the pyramid's levels; see `forward`."""
        logits, deltas = self.rpn_head(levels)
        losses = self._rpn_losses(logits, deltas, targets)
        if proposals is None:
            proposals = self.proposals(logits, deltas, [target['size'] for target in targets], training=True)
        levels = [level.float() for level in levels[:len(STRIDES)]]
        for i, stage in enumerate(self.STAGES):
            samples = [self._sample(*of_image, stage) for of_image in zip(proposals, targets, strict=True)]
            logits, deltas = self.heads('bbox_head')[i](
                roi_features(levels, rois_of([sample.boxes for sample in samples]), BOX))
            of_stage = self._box_losses(stage, samples, logits, deltas, targets)
            if self.masks:
                of_stage['loss_mask'] = self._mask_loss(self.heads('mask_head')[i], levels, samples, targets)
            prefix = f's{i}.' if self.cascaded else ''
            losses |= {prefix + name: stage.weight * loss for name, loss in of_stage.items()}
            if stage is not self.STAGES[-1]:
                proposals = self._refine(stage, samples, logits, deltas, targets)
        return losses

    def _rpn_losses(self, logits: list[Tensor], deltas: list[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        """The losses of 256 anchors of each image, divided by the sum of max(1, positive) and max(1, negative)."""
        sizes = [tuple(level.shape[-2:]) for level in logits]
        anchors = torch.cat(self.anchors(sizes))
        every = torch.cat([by_anchor(x, 1)[..., 0] for x in logits], dim=1)
        moves = torch.cat([by_anchor(x, 4) for x in deltas], dim=1)
        classification, regression, count = [], [], EPSILON
        for x, move, target in zip(every, moves, targets, strict=True):
            boxes, inside = target['boxes'].float().reshape(-1, 4), self.inside(sizes, anchors, target['size'])
            index = box.assign(boxes, anchors, positive=0.7, negative=0.3, low_quality=0.3, valid=inside)
            positive, negative = box.sample(index, count=256, positive=0.5)
            # -log(p) of the positive, -log(1 - p) of the negative
            classification.append(F.softplus(-x[positive]).sum() + F.softplus(x[negative]).sum())
            regression.append(_distance(anchors[positive], move[positive], boxes[index[positive] - 1],
                                        stds=(1.0, 1.0, 1.0, 1.0), beta=self.RPN_BETA))
            count += max(1, len(positive)) + max(1, len(negative))
        return {'loss_rpn_cls': torch.stack(classification).sum() / count,
                'loss_rpn_bbox': torch.stack(regression).sum() / count}

    def inside(self, sizes: list[tuple[int, int]], anchors: Tensor, size: tuple[int, int]) -> Tensor:
        """The anchors [A, 4] that take part in an image of a size (h, w)."""
        inside = torch.cat(self.anchors.inside(sizes, self.padded(size)))
        if self.ANCHORS_INSIDE:
            x0, y0, x1, y1 = anchors.unbind(1)
            inside = inside & (x0 >= 0) & (y0 >= 0) & (x1 < size[1]) & (y1 < size[0])
        return inside

    @torch.no_grad()
    def proposals(
        self, logits: list[Tensor], deltas: list[Tensor], sizes: Sequence[tuple[int, int]], *, training: bool
    ) -> list[Tensor]:
        """Of each image the boxes [n, 4] that the RPN's maps propose, by falling score.

        Args:
            logits, deltas: of the levels, [B, A, H, W] and [B, A * 4, H, W].
            sizes: (h, w) of each image, in which the boxes are clipped.
            training: whether to take the counts of the training.
        """
        before, count = (counts[0 if training else 1] for counts in (self.BEFORE_NMS, self.PROPOSALS))
        anchors, found = self.anchors([tuple(level.shape[-2:]) for level in logits]), []
        for i, size in enumerate(sizes):
            boxes, scores, numbers = [], [], []
            for number, (x, y, level) in enumerate(zip(logits, deltas, anchors, strict=True)):
                score = by_anchor(x[i], 1)[:, 0].sigmoid()
                if torch.onnx.is_in_onnx_export():  # which knows no stable sort
                    score, index = score.topk(min(before, len(level)))
                else:  # which of two equal scores comes first decides what is drawn later; `topk` does not say
                    score, index = (values[:before] for values in score.sort(descending=True, stable=True))
                boxes.append(box.decode(level[index], by_anchor(y[i], 4)[index], size=size))
                scores.append(score)
                numbers.append(torch.full_like(index, number))
            every, score = torch.cat(boxes), torch.cat(scores)
            flat = ((every[:, 2:] - every[:, :2]) <= 0).any(dim=1)  # nothing of it is inside the image
            kept = box.choose(every, score.masked_fill(flat, -1.0), torch.cat(numbers), score=-0.5, iou=0.7,
                              count=count)
            found.append(every[kept])
        return found

    @torch.no_grad()
    def _sample(self, proposals: Tensor, target: Target, stage: Stage) -> Samples:
        """The boxes of an image on which a stage is trained, the ground truth among them."""
        boxes = target['boxes'].float().reshape(-1, 4)
        index = box.assign(boxes, proposals, positive=stage.iou, negative=stage.iou, low_quality=self.LOW_QUALITY)
        every = torch.cat((boxes, proposals.float()))
        index = torch.cat((torch.arange(1, len(boxes) + 1, device=index.device), index))
        positive, negative = box.sample(index, count=self.samples, positive=0.25)
        which = index[positive] - 1
        labels = torch.cat((target['labels'][which], torch.full_like(negative, self.num_classes)))
        chosen = torch.cat((positive, negative))
        return Samples(every[chosen], labels, which, (chosen >= len(boxes)).nonzero()[:, 0])

    def _box_losses(
        self, stage: Stage, samples: Sequence[Samples], logits: Tensor, deltas: Tensor, targets: Sequence[Target]
    ) -> dict[str, Tensor]:
        """The losses of class and box, both divided by the number of samples."""
        labels = torch.cat([sample.labels for sample in samples])
        rois, count = torch.cat([sample.boxes for sample in samples]), max(1, len(labels)) + EPSILON
        wanted = torch.cat([target['boxes'].float().reshape(-1, 4)[sample.which]
                            for sample, target in zip(samples, targets, strict=True)])
        label, delta, roi = (positives(values, samples) for values in (labels, deltas, rois))
        loss = self.box_loss(roi, of_class(delta, label), wanted, stds=stage.stds)
        return {'loss_cls': F.cross_entropy(logits, labels, reduction='sum') / count, 'loss_bbox': loss / count}

    def _mask_loss(
        self, head: nn.Module, levels: Sequence[Tensor], samples: Sequence[Samples], targets: Sequence[Target]
    ) -> Tensor:
        """The mean over the pixels of the masks of the positive boxes; 0 without one, with gradients of 0."""
        boxes = [sample.boxes[:sample.positive] for sample in samples]
        labels = torch.cat([sample.labels[:sample.positive] for sample in samples])
        logits = of_class(head(roi_features(levels, rois_of(boxes), MASK)), labels)
        with torch.no_grad():
            wanted = torch.cat([
                mask_targets(target['masks'], self.padded(target['size']), of_image, sample.which)
                for target, of_image, sample in zip(targets, boxes, samples, strict=True)])
        loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction='sum')
        return loss / max(1, logits.numel())

    @torch.no_grad()
    def _refine(
        self, stage: Stage, samples: Sequence[Samples], logits: Tensor, deltas: Tensor, targets: Sequence[Target]
    ) -> list[Tensor]:
        """The boxes of a stage's samples, moved by their deltas, as the next stage's proposals.

        The ground truth that was added to them is left out. What was drawn as background moves by its likeliest class.
        """
        counts, refined = [len(sample.boxes) for sample in samples], []
        for sample, x, y, target in zip(samples, logits.split(counts), deltas.split(counts), targets, strict=True):
            labels = torch.where(sample.labels == self.num_classes, x[:, :-1].argmax(1), sample.labels)
            boxes = box.decode(sample.boxes, of_class(y, labels), stds=stage.stds, size=target['size'])
            refined.append(boxes[sample.proposed])
        return refined

    @torch.no_grad()
    def predict(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], original_sizes: Sequence[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """The detections, at most 100 an image, by falling score; the model has to be in evaluation mode.

        Args:
            images: [B, 3, H, W] as in `forward`.
            sizes: (h, w) of each image without the padding.
            original_sizes: (h, w) of each image before it was resized, to which boxes and masks are scaled.

        Returns:
            Of each image `boxes` [n, 4] and `scores` [n], float32, `labels` [n], int64 from 0, and with mask heads
            `masks`, bool [n, H, W] at the original size.
        """
        levels = self.features(images)
        proposals = self.proposals(*self.rpn_head(levels), sizes, training=False)
        levels = [level.float() for level in levels[:len(STRIDES)]]
        detections = []
        for i, (boxes, size, original) in enumerate(zip(proposals, sizes, original_sizes, strict=True)):
            own = [level[i:i + 1] for level in levels]
            found = self._detect(own, boxes, size, original)
            if self.masks:
                rois = rois_of([box.scale(found['boxes'], original, size)])
                put = paste_at_once if torch.onnx.is_in_onnx_export() else paste
                found['masks'] = put(self.mask_probabilities(own, rois, found['labels']), found['boxes'], original)
            detections.append(found)
        return detections

    def _detect(
        self, levels: Sequence[Tensor], boxes: Tensor, size: tuple[int, int], original: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Boxes, scores and labels of an image from its proposals [n, 4]."""
        total, last = 0.0, len(self.STAGES) - 1
        for i, (stage, head) in enumerate(zip(self.STAGES, self.heads('bbox_head'), strict=True)):
            logits, deltas = head(roi_features(levels, rois_of([boxes]), BOX))
            total = total + logits
            if i < last:
                boxes = box.decode(boxes, of_class(deltas, logits[:, :-1].argmax(1)), stds=stage.stds, size=size)
        scores = (total / len(self.STAGES)).softmax(dim=1)[:, :-1]
        boxes = box.decode(boxes[:, None], deltas, stds=stage.stds, size=size).expand(-1, self.num_classes, -1)
        boxes, scores = box.scale(boxes.flatten(0, 1), size, original), scores.flatten()
        labels = torch.arange(self.num_classes, device=scores.device).repeat(scores.shape[0] // self.num_classes)
        kept = box.choose(boxes, scores, labels, score=0.05, iou=0.5, count=100)
        return {'boxes': boxes[kept], 'scores': scores[kept], 'labels': labels[kept]}

    def mask_probabilities(self, levels: Sequence[Tensor], rois: Tensor, labels: Tensor) -> Tensor:
        """The mean over the stages of the masks [n, 28, 28] of RoIs [n, 5] of classes [n]."""
        pooled = roi_features(levels, rois, MASK)
        masks = [of_class(head(pooled), labels).sigmoid() for head in self.heads('mask_head')]
        return torch.stack(masks).mean(dim=0)


class MaskRCNN(RCNN):
    """Mask R-CNN; with `masks=False`, Faster R-CNN."""

    STAGES = (Stage(0.5),)
    LOW_QUALITY = 0.5
    RPN_BETA = 0.0
    ANCHORS_INSIDE = False
    PROPOSALS = (1000, 1000)
    LOSSES = ('loss_rpn_cls', 'loss_rpn_bbox', 'loss_cls', 'loss_bbox', 'loss_mask')
    LAST: ClassVar = {'roi_head.bbox_head.fc_cls': (1, 1), 'roi_head.bbox_head.fc_reg': (4, 0),
                      'roi_head.mask_head.conv_logits': (1, 0)}

    def box_head(self, channels: int, hidden: int) -> BoxHead:
        """Two linear layers, deltas for each class."""
        return BoxHead(channels, num_classes=self.num_classes, boxes=self.num_classes, convs=0,
                       hidden=(hidden, hidden))

    def box_loss(self, rois: Tensor, deltas: Tensor, boxes: Tensor, *, stds: box.Stds) -> Tensor:
        """The distance of the deltas from those wanted."""
        return _distance(rois, deltas, boxes, stds=stds, beta=0.0)


class CascadeMaskRCNN(RCNN):
    """Cascade Mask R-CNN: three stages, each for better boxes; with `masks=False`, Cascade R-CNN."""

    STAGES = (Stage(0.5), Stage(0.6, (0.05, 0.05, 0.1, 0.1), 0.5), Stage(0.7, (0.033, 0.033, 0.067, 0.067), 0.25))
    LOW_QUALITY = None
    RPN_BETA = 1 / 9
    ANCHORS_INSIDE = True
    PROPOSALS = (2000, 1000)
    LOSSES = ('loss_rpn_cls', 'loss_rpn_bbox',
              *(f's{i}.loss_{name}' for i in range(3) for name in ('cls', 'bbox', 'mask')))
    LAST: ClassVar = {f'roi_head.{name}': channels for i in range(3) for name, channels in (
        (f'bbox_head.{i}.fc_cls', (1, 1)), (f'mask_head.{i}.conv_logits', (1, 0)))}

    def box_head(self, channels: int, hidden: int) -> BoxHead:
        """Two linear layers, deltas for all classes in common."""
        return BoxHead(channels, num_classes=self.num_classes, boxes=1, convs=0, hidden=(hidden, hidden))

    def box_loss(self, rois: Tensor, deltas: Tensor, boxes: Tensor, *, stds: box.Stds) -> Tensor:
        """The distance of the deltas from those wanted, quadratic below 1."""
        return _distance(rois, deltas, boxes, stds=stds, beta=1.0)


class CascadeMaskRCNNGIoU(CascadeMaskRCNN):
    """Cascade Mask R-CNN whose box heads have four convolutions with batch norms and are trained by the GIoU."""

    LAST: ClassVar = CascadeMaskRCNN.LAST | {f'roi_head.bbox_head.{i}.fc_reg': (4, 0) for i in range(3)}

    def box_head(self, channels: int, hidden: int) -> BoxHead:
        """Four convolutions and a linear layer, deltas for each class."""
        return BoxHead(channels, num_classes=self.num_classes, boxes=self.num_classes, convs=4, hidden=(hidden,))

    def box_loss(self, rois: Tensor, deltas: Tensor, boxes: Tensor, *, stds: box.Stds) -> Tensor:
        """Ten times 1 - GIoU of the boxes that the deltas make; they are not clipped to the image."""
        # The diagonal of all pairs: torchvision's loss of pairs alone waits for the device
        return 10 * (1 - generalized_box_iou(box.decode(rois, deltas, stds=stds), boxes).diagonal()).sum()
