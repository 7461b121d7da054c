"""Semantic segmentation over any timm backbone with maps at strides 4 to 32: Semantic FPN
(https://arxiv.org/abs/1901.02446) and UPerNet (https://arxiv.org/abs/1807.10221) with an auxiliary FCN head.

The function and the state-dict names are those of mmsegmentation 0.29, with which the authors trained the released
segmentors (`backbone.`, `neck.`, `decode_head.`, `auxiliary_head.`), so that their files need no converter. Pooling and
cross-entropy are written in the forms whose gradients are deterministic on CUDA.
"""
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models.detection import FPN, Dense, convolution
from utils import UserError

IGNORED = 255  # the label of pixels without a class, in the losses and in the metric
POOLS = (1, 2, 3, 6)  # bins along each side of the pyramid pooling
AUXILIARY_WEIGHT = 0.4
CHUNK = 32  # classes that are resized at once


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, by pixels' areas (align_corners False): [B, C, H, W] -> [B, C, *size]."""
    if maps.shape[-2:] == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode='bilinear', align_corners=False)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy's sum over the labelled pixels, divided by the number of all pixels, as the original has it.

    It is 0 where no pixel is labelled. On [pixels, classes], since the gradient of the form on maps is not
    deterministic on CUDA.

    Args:
        logits: [B, K, h, w]; they are resized to the labels.
        labels: [B, H, W], integers; IGNORED has no class.
    """
    logits = resize(logits.float(), labels.shape[-2:]).permute(0, 2, 3, 1).flatten(0, 2)
    loss = F.cross_entropy(logits, labels.flatten().long(), ignore_index=IGNORED, reduction='sum')
    return loss / labels.numel()


class Pool(nn.Module):
    """Means over bins x bins parts of a map, as `nn.AdaptiveAvgPool2d`, first over rows and then over columns.

    Products are summed, and not matrices multiplied, which mixed precision would do in 16 bits.
    """

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.bins = bins

    def _weights(self, size: int, device: torch.device) -> Tensor:
        """The share of each of `size` pixels in each bin, [bins, size]; neighbouring bins may share a pixel."""
        place, number = torch.arange(size, device=device), torch.arange(self.bins, device=device)[:, None]
        inside = (place >= number * size // self.bins) & (place < -(-(number + 1) * size // self.bins))
        return inside / inside.sum(1, keepdim=True)

    def forward(self, maps: Tensor) -> Tensor:
        """[B, C, H, W] -> float32 [B, C, bins, bins]."""
        rows, columns = (self._weights(size, maps.device) for size in maps.shape[-2:])
        means = (maps.float()[..., None, :, :] * rows[..., None]).sum(-2)
        return (means[..., None, :] * columns).sum(-1)


class Head(nn.Module):
    """What the heads share: the classifier, and dropout of whole channels before it."""

    def __init__(self, channels: int, *, num_classes: int, dropout: float, classifier_std: float = 0.01) -> None:
        super().__init__()
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        self.dropout = nn.Dropout2d(dropout)
        nn.init.normal_(self.conv_seg.weight, std=classifier_std)
        nn.init.zeros_(self.conv_seg.bias)

    def _init_convolutions(self) -> None:
        """Kaiming's rule for all but the classifier; called at the end of a head's constructor."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module is not self.conv_seg:
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')

    def classify(self, maps: Tensor) -> Tensor:
        """[B, channels, H, W] -> logits [B, K, H, W]."""
        return self.conv_seg(self.dropout(maps))


class FPNHead(Head):
    """Semantic FPN's: each level of the pyramid is enlarged to stride 4 step by step; the sum is classified."""

    def __init__(self, in_channels: int, channels: int, **kwargs: Any) -> None:
        super().__init__(channels, **kwargs)
        self.scale_heads = nn.ModuleList()
        for level in range(4):
            layers: list[nn.Module] = []
            for i in range(max(level, 1)):
                layers.append(convolution(channels if i else in_channels, channels, 3, norm=True, relu=True))
                if level:
                    layers.append(nn.Upsample(scale_factor=2, mode='bilinear', align_corners=False))
            self.scale_heads.append(nn.Sequential(*layers))
        self._init_convolutions()

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Levels [B, in_channels, H / s, W / s] of strides 4 to 32 -> logits [B, K, H / 4, W / 4]."""
        enlarged = [head(level) for head, level in zip(self.scale_heads, levels, strict=True)]
        return self.classify(sum(resize(x, enlarged[0].shape[-2:]) for x in enlarged))  # sizes round up


class UPerHead(Head):
    """UPerNet's: pyramid pooling on the coarsest map, a pyramid, and the classifier on all its levels together."""

    def __init__(self, in_channels: Sequence[int], channels: int, **kwargs: Any) -> None:
        super().__init__(channels, **kwargs)

        def block(count: int, kernel: int) -> nn.Sequential:
            return convolution(count, channels, kernel, norm=True, relu=True)

        last = in_channels[-1]
        self.psp_modules = nn.ModuleList(nn.Sequential(Pool(bins), block(last, 1)) for bins in POOLS)
        self.bottleneck = block(last + len(POOLS) * channels, 3)
        self.lateral_convs = nn.ModuleList(block(count, 1) for count in in_channels[:-1])
        self.fpn_convs = nn.ModuleList(block(channels, 3) for _ in in_channels[:-1])
        self.fpn_bottleneck = block(len(in_channels) * channels, 3)
        self._init_convolutions()

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """The backbone's maps -> logits [B, K, H / 4, W / 4]."""
        top = maps[-1]
        pooled = [resize(module(top), top.shape[-2:]) for module in self.psp_modules]
        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps[:-1], strict=True)]
        levels.append(self.bottleneck(torch.cat([top, *pooled], 1)))
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + resize(levels[i], levels[i - 1].shape[-2:])
        levels = [conv(x) for conv, x in zip(self.fpn_convs, levels[:-1], strict=True)] + levels[-1:]
        together = torch.cat([resize(x, levels[0].shape[-2:]) for x in levels], 1)
        return self.classify(self.fpn_bottleneck(together))


class FCNHead(Head):
    """The auxiliary head: one convolution and the classifier."""

    def __init__(self, in_channels: int, channels: int, **kwargs: Any) -> None:
        super().__init__(channels, **kwargs)
        self.convs = nn.Sequential(convolution(in_channels, channels, 3, norm=True, relu=True))
        self._init_convolutions()

    def forward(self, maps: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> logits [B, K, H, W]."""
        return self.classify(self.convs(maps))


class Segmentor(Dense):
    """What the segmentors share: losses, and label maps at the images' original sizes."""

    LOSSES: ClassVar[tuple[str, ...]]  # in the order of `heads`
    LAST: ClassVar[dict[str, tuple[int, int]]]  # the layers that know the classes: channels a class, further ones
    decode_head: Head

    def heads(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] -> the logits of each head, the deciding one first, at the head's own stride."""
        raise NotImplementedError

    def logits(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> the logits by which pixels are told, float32 [B, K, H, W]."""
        return resize(self.heads(images)[0].float(), images.shape[-2:])

    def outputs(self, images: Tensor) -> Tensor:
        """All that is computed before the labels are chosen: the logits."""
        return self.logits(images)

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The losses, whose sum is to be minimised, in training and in evaluation mode alike; no wait for the device.

        Args:
            images: [B, 3, H, W], normalised.
            labels: [B, H, W], integers; IGNORED has no class.

        Returns:
            `decode.loss_ce` and, where there is an auxiliary head, `aux.loss_ce` times its weight; float32 scalars.
        """
        weights = (1.0, AUXILIARY_WEIGHT)
        return {name: weight * cross_entropy(logits, labels)
                for name, weight, logits in zip(self.LOSSES, weights, self.heads(images), strict=False)}

    @torch.no_grad()
    def predict(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], original_sizes: Sequence[tuple[int, int]], *,
        window: int | None = None, flip: bool = False
    ) -> list[dict[str, Tensor]]:
        """The class of every pixel of each image; the model has to be in evaluation mode.

        One image at a time and without its padding, which would change the features: what is beside an image does not
        matter.

        Args:
            images: [B * V, 3, H, W], of each image V views of any size after one another, in the upper left corner.
            sizes: (h, w) of each view without the padding.
            original_sizes: (h, w) of each of the B images before it was resized.
            window: side of the windows, in pixels, of which the logits are averaged where they overlap; at once where
                not given.
            flip: average the probabilities with those of the mirrored image. Those of several views always are.

        Returns:
            Of each image `labels`, int64 [H, W] at its original size.
        """
        views = len(images) // len(original_sizes)
        results = []
        for i, original in enumerate(original_sizes):
            maps = []
            for image, (height, width) in zip(images[i * views:][:views], sizes[i * views:][:views], strict=True):
                image = image[None, :, :height, :width]
                maps.append(self._logits(image, window))
                if flip:
                    maps.append(self._logits(image.flip(-1), window).flip(-1))
            if len(maps) == 1:
                labels = label_map(maps[0], original)
            else:
                labels = sum(resize(x, original).softmax(1) for x in maps)[0].argmax(0)
            results.append({'labels': labels})
        return results

    def _logits(self, image: Tensor, window: int | None) -> Tensor:
        """The logits [1, K, h, w] of an image, of windows that overlap by a third where they are asked for."""
        if window is None:
            return self.logits(image)
        height, width = image.shape[-2:]
        total = image.new_zeros(1, self.num_classes, height, width, dtype=torch.float32)
        count = torch.zeros_like(total[:, :1])
        for top in window_starts(height, window):
            for left in window_starts(width, window):
                part = (..., slice(top, top + window), slice(left, left + window))
                total[part] += self.logits(image[part])
                count[part] += 1
        return total / count


def window_starts(side: int, window: int) -> list[int]:
    """Where the windows over a side begin, two thirds of a window apart; the last one ends with the side."""
    stride = max(window * 2 // 3, 1)
    count = -(-max(side - window, 0) // stride) + 1
    return [max(min(i * stride, side - window), 0) for i in range(count)]


def label_map(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The likeliest class at each pixel, int64 [*size], of logits [1, K, h, w] that are resized.

    Some classes at a time: all 150 of an image of 12 megapixels would take 7 GB.
    """
    best = classes = None
    for start in range(0, logits.shape[1], CHUNK):
        values, index = resize(logits[:, start:start + CHUNK], size)[0].max(0)
        if best is None:
            best, classes = values, index
        else:
            classes = torch.where(values > best, index + start, classes)
            best = torch.maximum(values, best)
    return classes


class SemanticFPN(Segmentor):
    """Semantic FPN: a feature pyramid, whose levels are added and classified.

    Args:
        backbone: a timm model's name.
        num_classes: K.
        channels: of the pyramid.
        head_channels: of the head.
        dropout: rate of channels left out before the classifier.
        classifier_std: of the classifier's initial weights. The authors' 0.01 is for a trained backbone: from scratch,
            every class starts with the background's answer and takes two to three times as many updates to leave it.
        kwargs: the backbone's, such as `drop_path_rate`, `gate` or `pretrained`.

    Raises:
        UserError: the backbone cannot be built so, or has no maps at strides 4 to 32.
    """

    LOSSES = ('decode.loss_ce',)
    LAST: ClassVar = {'decode_head.conv_seg': (1, 0)}

    def __init__(self, backbone: str, *, num_classes: int = 150, channels: int = 256, head_channels: int = 128,
                 dropout: float = 0.1, classifier_std: float = 0.01, **kwargs: Any) -> None:
        super().__init__(backbone, num_classes=num_classes, **kwargs)
        self.neck = FPN(self.backbone.feature_info.channels(), channels, extra=0)
        self.decode_head = FPNHead(channels, head_channels, num_classes=num_classes, dropout=dropout,
                                   classifier_std=classifier_std)

    def heads(self, images: Tensor) -> list[Tensor]:
        return [self.decode_head(self.neck(self.maps(images)))]


class UPerNet(Segmentor):
    """UPerNet, with an auxiliary head on the maps of stride 16 while it is trained.

    Args:
        backbone: a timm model's name.
        num_classes: K.
        channels: of all levels of the head.
        auxiliary_channels: of the auxiliary head.
        dropout: rate of channels left out before the classifiers.
        kwargs: the backbone's, such as `drop_path_rate`, `gate` or `pretrained`.

    Raises:
        UserError: the backbone cannot be built so, or has no maps at strides 4 to 32.
    """

    LOSSES = ('decode.loss_ce', 'aux.loss_ce')
    LAST: ClassVar = {'decode_head.conv_seg': (1, 0), 'auxiliary_head.conv_seg': (1, 0)}

    def __init__(self, backbone: str, *, num_classes: int = 150, channels: int = 512, auxiliary_channels: int = 256,
                 dropout: float = 0.1, **kwargs: Any) -> None:
        super().__init__(backbone, num_classes=num_classes, **kwargs)
        counts = self.backbone.feature_info.channels()
        self.decode_head = UPerHead(counts, channels, num_classes=num_classes, dropout=dropout)
        self.auxiliary_head = FCNHead(counts[2], auxiliary_channels, num_classes=num_classes, dropout=dropout)

    def heads(self, images: Tensor) -> list[Tensor]:
        several = images.is_cuda and dist.is_initialized() and dist.get_world_size() > 1
        if self.training and len(images) == 1 and not several:
            raise UserError('--batch_size 1: of one image, pyramid pooling leaves a batch norm of UPerNet one value a '
                            'channel; give at least 2')
        maps = self.maps(images)
        return [self.decode_head(maps), self.auxiliary_head(maps[2])]

    def logits(self, images: Tensor) -> Tensor:
        return resize(self.decode_head(self.maps(images)).float(), images.shape[-2:])
