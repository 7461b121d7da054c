"""What detectors compute with boxes: anchors, the coder, the assigner, and the choice of detections.

A box is x1, y1, x2, y2 in pixels, float32, its width x2 - x1. These are the functions of mmdet 2.26, with which the
released detectors were trained; what torchvision computes otherwise is written here, all else is torchvision's.
"""
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_convert, box_iou, clip_boxes_to_image

# A decoded box is at most 62.5 times as wide or high as its reference, and at least 1/62.5 times
LIMIT = abs(math.log(16 / 1000))
Stds = tuple[float, float, float, float]


class Anchors(nn.Module):
    """The anchors of a pyramid: at every cell of a level, a box for each ratio and, within a ratio, each scale.

    The centre of a cell's anchors is its index times the stride, and their sides are not rounded.

    Args:
        strides: pixels between the cells of each level.
        scales: side of a square anchor in strides.
        ratios: height over width.
    """

    def __init__(
        self, strides: Sequence[int], *, scales: Sequence[float], ratios: Sequence[float] = (0.5, 1.0, 2.0)
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        heights = torch.tensor(ratios).sqrt()[:, None]
        size = torch.tensor(self.strides, dtype=torch.float32)[:, None, None]
        sides = torch.tensor(scales)
        half = torch.stack((size * (1 / heights) * sides, size * heights * sides), dim=-1).flatten(1, 2) / 2
        # [levels, anchors of a cell, 4]; no part of the state dict
        self.register_buffer('base', torch.cat((-half, half), dim=-1), persistent=False)

    @property
    def per_cell(self) -> int:
        """The number of a cell's anchors."""
        return self.base.shape[1]

    def forward(self, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """The anchors of maps of these sizes (rows, columns): a [rows * columns * per_cell, 4] for each level."""
        grids = []
        for (rows, columns), stride, base in zip(sizes, self.strides, self.base, strict=True):
            y, x = torch.meshgrid(torch.arange(rows, device=base.device) * stride,
                                  torch.arange(columns, device=base.device) * stride, indexing='ij')
            grids.append((torch.stack((x, y, x, y), dim=-1)[:, :, None] + base).flatten(0, 2))
        return grids

    def inside(self, sizes: Sequence[tuple[int, int]], padded: tuple[int, int]) -> list[Tensor]:
        """Whether the anchors' cells lie in an image of the size `padded` (h, w): a mask for each level."""
        masks = []
        for (rows, columns), stride in zip(sizes, self.strides, strict=True):
            row = torch.arange(rows, device=self.base.device) < -(-padded[0] // stride)
            column = torch.arange(columns, device=self.base.device) < -(-padded[1] // stride)
            masks.append((row[:, None] & column).flatten().repeat_interleave(self.per_cell))
        return masks


def encode(references: Tensor, boxes: Tensor, *, stds: Stds = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """The deltas [..., 4] that turn references [..., 4] into boxes [..., 4]."""
    x, y, w, h = box_convert(references, 'xyxy', 'cxcywh').unbind(-1)
    to_x, to_y, to_w, to_h = box_convert(boxes, 'xyxy', 'cxcywh').unbind(-1)
    deltas = ((to_x - x) / w, (to_y - y) / h, (to_w / w).log(), (to_h / h).log())
    return torch.stack([delta / std for delta, std in zip(deltas, stds, strict=True)], dim=-1)


def decode(
    references: Tensor, deltas: Tensor, *, stds: Stds = (1.0, 1.0, 1.0, 1.0), size: tuple[int, int] | None = None
) -> Tensor:
    """The boxes [..., 4] that deltas [..., 4] make of references [..., 4], clipped to the size (h, w) if there is one.

    The logarithms of width and height are limited on both sides; torchvision limits them above only.
    """
    x, y, w, h = box_convert(references.float(), 'xyxy', 'cxcywh').unbind(-1)
    dx, dy, dw, dh = (delta * std for delta, std in zip(deltas.float().unbind(-1), stds, strict=True))
    dw, dh = dw.clamp(-LIMIT, LIMIT), dh.clamp(-LIMIT, LIMIT)
    boxes = box_convert(torch.stack((x + dx * w, y + dy * h, w * dw.exp(), h * dh.exp()), dim=-1), 'cxcywh', 'xyxy')
    return boxes if size is None else clip_boxes_to_image(boxes, size)


def scale(boxes: Tensor, size: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """The boxes [..., 4] in an image of one size (h, w), for the same image of another size."""
    x, y = (to[i] / size[i] for i in (1, 0))
    return torch.stack((boxes[..., 0] * x, boxes[..., 1] * y, boxes[..., 2] * x, boxes[..., 3] * y), dim=-1)


def assign(
    boxes: Tensor, candidates: Tensor, *, positive: float, negative: float, low_quality: float | None,
    valid: Tensor | None = None,
) -> Tensor:
    """The ground truth of each candidate, without a wait for the device.

    A candidate belongs to the box with which its IoU is highest, if that is at least `positive`. Beyond that a box
    takes all candidates that share the highest IoU of this box, if that is at least `low_quality`, and takes them from
    another box of a higher IoU too; of two such boxes, the later takes them.

    Args:
        boxes: the ground truth [n, 4], n may be 0.
        candidates: anchors or proposals [A, 4].
        positive: the least IoU of a positive candidate.
        negative: a candidate whose IoUs are all below it is negative; between the two, it is ignored.
        low_quality: see above; None for no such candidates.
        valid: the candidates that take part [A]; all without.

    Returns:
        [A], int64: i + 1 for box i, 0 for negative, -1 for ignored or not valid.
    """
    index = candidates.new_zeros(len(candidates), dtype=torch.int64)
    if len(boxes):
        overlaps = box_iou(boxes.float(), candidates.float())
        if valid is not None:
            overlaps = overlaps.masked_fill(~valid, -1.0)
        highest, which = overlaps.max(dim=0)
        index = torch.where(highest < negative, 0, -1)
        index = torch.where(highest >= positive, which + 1, index)
        if low_quality is not None:
            best = overlaps.amax(dim=1, keepdim=True)
            number = torch.arange(1, len(boxes) + 1, device=boxes.device, dtype=torch.int32)[:, None]
            taken = ((overlaps == best) & (best >= low_quality)).mul(number).amax(dim=0)
            index = torch.where(taken > 0, taken, index)
    return index if valid is None else index.masked_fill(~valid, -1)


def sample(index: Tensor, *, count: int, positive: float) -> tuple[Tensor, Tensor]:
    """Candidates to train on, drawn by `torch.randperm` on the CPU; waits for the device to know how many there are.

    Args:
        index: of each candidate [A], as `assign` gives it.
        count: the most candidates.
        positive: the largest part of them that is positive. Negative ones fill up the rest.

    Returns:
        the positions of the positive and those of the negative ones, both rising.
    """
    chosen, wanted = [], int(count * positive)
    for mask in (index > 0, index == 0):
        found = mask.nonzero().squeeze(1)
        if len(found) > wanted:
            found = found[torch.randperm(len(found))[:wanted].to(found.device)].sort().values
        chosen.append(found)
        wanted = count - len(found)
    return chosen[0], chosen[1]


def choose(
    boxes: Tensor, scores: Tensor, labels: Tensor, *, score: float, iou: float, count: int
) -> Tensor:
    """The indices of the detections among boxes [n, 4] with scores [n] and labels [n], by falling score.

    Args:
        boxes, scores, labels: all candidates.
        score: what a detection's score exceeds.
        iou: a box of the same label and a lower score goes if its IoU with a detection exceeds this.
        count: the most detections.
    """
    kept = (scores > score).nonzero().squeeze(1)  # waits for the device, as NMS does
    return kept[batched_nms(boxes[kept].float(), scores[kept].float(), labels[kept], iou)[:count]]
