"""MogaNet: multi-order gated aggregation network (https://arxiv.org/abs/2211.03295), in timm's conventions.

Read bottom-up: a `MogaBlock` is a spatial mixer (`MultiOrderGatedAggregation`) and a channel mixer
(`ChannelAggregation`), four stages of blocks make a `MogaNet`, and the functions at the end make its six variants.
State-dict names are those of the released checkpoints, whence the mixed capitals.

This file needs torch and timm, and nothing else of this repository: copied into another project and imported there, it
registers the variants with `timm.create_model` (README.md, "The backbone in another project").
"""
import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._features import feature_take_indices
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

Gate = Literal['single', 'double']


class Scale(nn.Module):
    """The learned scale, by channel, of what differs from a common part: `x + scale * (x - common)`.

    Both its uses are next to a 1x1 convolution, whose small weight takes the scale in place of the large x: the same
    function with a third less memory traffic in a training step (`tools/benchmark.py traffic`).
    """

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1, dim, 1, 1), 1e-5, **dd))


class MultiOrderDWConv(nn.Module):
    """The value branch: depthwise convolutions of 3/8 and 4/8 of the channels at growing dilation.

    All C channels go through a 5x5; then 1/8 of them stay, 3/8 go through a 5x5 at dilation 2 (receptive field 9) and
    4/8 through a 7x7 at dilation 3 (receptive field 19).
    """

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        mid, high = dim * 3 // 8, dim // 2
        self.dims = [dim - mid - high, mid, high]
        self.DW_conv0 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.DW_conv1 = nn.Conv2d(mid, mid, 5, padding=4, dilation=2, groups=mid, **dd)
        self.DW_conv2 = nn.Conv2d(high, high, 7, padding=9, dilation=3, groups=high, **dd)
        self.PW_conv = nn.Conv2d(dim, dim, 1, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        low, mid, high = torch.split(self.DW_conv0(x), self.dims, dim=1)
        return self.PW_conv(torch.cat([low, self.DW_conv1(mid), self.DW_conv2(high)], dim=1))


@torch.fx.wrap  # neither tracer nor script can follow a context that depends on the device
@torch.jit.ignore
def gated_projection_fp32(
    gate: torch.Tensor, value: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """`conv1x1(SiLU(gate) * SiLU(value))` in float32, whatever autocast says; the result has the weight's dtype."""
    with torch.autocast('cpu' if gate.is_meta else gate.device.type, enabled=False):  # meta is not known to autocast
        product = F.silu(gate.float()) * F.silu(value.float())
        return F.conv2d(product, weight.float(), None if bias is None else bias.float()).to(weight.dtype)


class MultiOrderGatedAggregation(nn.Module):
    """The spatial mixer: multi-order context, gated.

    Args:
        dim: C, the channels.
        gate: 'single' activates both branches once; 'double' applies SiLU twice to each, as the checkpoints trained
            with the authors' `attn_force_fp32` expect: another function, not another precision.
        gate_fp32: under autocast, compute the gating product and its projection in float32. The product of two
            unbounded fp16 branches overflows at 65,504, which is where fp16 training of MogaNet turns to NaN.
    """

    double_gate: Final[bool]
    gate_fp32: Final[bool]

    def __init__(self, dim: int, *, gate: Gate = 'single', gate_fp32: bool = False, **dd: Any) -> None:
        super().__init__()
        self.double_gate = gate == 'double'
        self.gate_fp32 = gate_fp32
        self.proj_1 = nn.Conv2d(dim, dim, 1, **dd)
        self.gate = nn.Conv2d(dim, dim, 1, **dd)
        self.value = MultiOrderDWConv(dim, **dd)
        self.proj_2 = nn.Conv2d(dim, dim, 1, **dd)
        self.sigma = Scale(dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W], already normalised -> [B, C, H, W]."""
        # y + scale * (y - mean(y)) for y = proj_1(x)
        weight = self.proj_1.weight
        scaled = weight * self.sigma.scale.transpose(0, 1)
        y = F.conv2d(x, weight + scaled, self.proj_1.bias) - F.conv2d(x.mean((2, 3), keepdim=True), scaled)
        y = F.silu(y)
        gate, value = self.gate(y), self.value(y)
        if self.double_gate:
            gate, value = F.silu(gate), F.silu(value)
        if self.gate_fp32:
            return gated_projection_fp32(gate, value, self.proj_2.weight, self.proj_2.bias)
        return self.proj_2(F.silu(gate) * F.silu(value))


class ChannelAggregation(nn.Module):
    """The channel mixer: an inverted bottleneck that reallocates its hidden channels.

    Args:
        dim: C, the channels in and out.
        hidden_dim: channels in between.
        drop: dropout rate after the activation and after the last convolution.
    """

    def __init__(self, dim: int, hidden_dim: int, *, drop: float = 0.0, **dd: Any) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1, **dd)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1, **dd)
        self.decompose = nn.Conv2d(hidden_dim, 1, 1, **dd)
        self.sigma = Scale(hidden_dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        x = self.drop(F.gelu(self.dwconv(self.fc1(x))))
        common = F.gelu(self.decompose(x))  # [B, 1, H, W]
        # fc2(x + scale * (x - common))
        weight, scale = self.fc2.weight, self.sigma.scale
        common_weight = (weight.flatten(1) @ -scale.flatten()).view(-1, 1, 1, 1)
        x = F.conv2d(x, weight * (1 + scale), self.fc2.bias) + F.conv2d(common, common_weight)
        return self.drop(x)


class MogaBlock(nn.Module):
    """One block: `x + drop_path(layer_scale * branch(norm(x)))` for the spatial, then for the channel mixer.

    The spatial branch has a shortcut of its own, around `attn`.
    """

    def __init__(
        self,
        dim: int,
        *,
        ffn_ratio: int,
        proj_drop: float,
        drop_path: float,
        layer_scale_init_value: float,
        gate: Gate,
        gate_fp32: bool,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.layer_scale_1 = nn.Parameter(torch.full((1, dim, 1, 1), layer_scale_init_value, **dd))
        self.layer_scale_2 = nn.Parameter(torch.full((1, dim, 1, 1), layer_scale_init_value, **dd))
        self.norm1 = nn.BatchNorm2d(dim, **dd)
        self.attn = MultiOrderGatedAggregation(dim, gate=gate, gate_fp32=gate_fp32, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.mlp = ChannelAggregation(dim, dim * ffn_ratio, drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H, W]; under autocast the result, the residual stream, is float32."""
        # Drop path acts on the scale [B, C, 1, 1] and not on the branch [B, C, H, W]: the same product, one pass less.
        scale = self.drop_path(self.layer_scale_1.expand(x.shape[0], -1, -1, -1))
        u = self.norm1(x)
        x = torch.addcmul(x, scale, self.attn(u) + u)
        scale = self.drop_path(self.layer_scale_2.expand(x.shape[0], -1, -1, -1))
        return torch.addcmul(x, scale, self.mlp(self.norm2(x)))


@contextlib.contextmanager
def _running_statistics_kept(module: nn.Module) -> Iterator[None]:
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    settings = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, setting in zip(norms, settings, strict=True):
            norm.momentum, norm.num_batches_tracked = setting


def checkpoint_block(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`block(x)`, recomputed in the backward pass without counting the batch twice in BN's running statistics.

    A compiler recomputes operators and not the block, so that there the statistics are safe, and contexts not allowed.
    """
    if torch.compiler.is_compiling():
        return checkpoint(block, x, use_reentrant=False)
    return checkpoint(
        block, x, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), _running_statistics_kept(block))
    )


class Blocks(nn.Sequential):
    """The blocks of a stage, recomputed one by one in the backward pass when `grad_checkpointing` is set."""

    def __init__(self, *blocks: MogaBlock) -> None:
        super().__init__(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            for block in self:
                x = checkpoint_block(block, x)
            return x
        for block in self:
            x = block(x)
        return x


class Stem(nn.Module):
    """Stage 1's embedding: [B, in_chans, H, W] -> [B, C, H/4, W/4], rounded up."""

    def __init__(self, in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.projection = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
            nn.BatchNorm2d(dim // 2, **dd),
            nn.GELU(),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
            nn.BatchNorm2d(dim, **dd),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection(x)


class Downsample(nn.Module):
    """The other stages' embedding: [B, C, H, W] -> [B, C', H/2, W/2], rounded up."""

    def __init__(self, in_dim: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.projection = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.projection(x))


class MogaNet(nn.Module):
    """MogaNet (https://arxiv.org/abs/2211.03295) with timm's interface.

    Args:
        in_chans: channels of the input image.
        num_classes: classes; 0 leaves the classifier out.
        global_pool: 'avg', or '' for none (only without classifier).
        dims: channels of the four stages.
        depths: blocks of the four stages.
        ffn_ratios: hidden over outer channels in the channel aggregation of the four stages.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout in the channel aggregation.
        drop_path_rate: drop path of the last block; the first has 0, between them it rises linearly.
        layer_scale_init_value: the initial `layer_scale_*`.
        gate: 'single' or 'double', see `MultiOrderGatedAggregation`.
        gate_fp32: float32 gating under autocast, see `MultiOrderGatedAggregation`.
        head_init_scale: factor on the classifier's initial weights.
        device: where the parameters are made, as in torch.
        dtype: their type, as in torch.

    Raises:
        ValueError: an unknown `gate` or `global_pool`, or a classifier without pooling.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        *,
        dims: tuple[int, ...] = (32, 64, 96, 192),
        depths: tuple[int, ...] = (3, 3, 10, 2),
        ffn_ratios: tuple[int, ...] = (8, 8, 4, 4),
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-5,
        gate: Gate = 'single',
        gate_fp32: bool = False,
        head_init_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if gate not in ('single', 'double'):
            raise ValueError(f"gate must be 'single' or 'double', not {gate!r}")
        dd = {'device': device, 'dtype': dtype}
        self.num_features = self.head_hidden_size = dims[-1]
        self.head_init_scale = head_init_scale
        self.num_stages = 4
        self.feature_info = [
            {'num_chs': dim, 'reduction': 2 ** (i + 2), 'module': f'norm{i + 1}'} for i, dim in enumerate(dims)
        ]
        drop_paths = torch.linspace(0, drop_path_rate, sum(depths), device='cpu').split(depths)
        for i, (dim, ffn_ratio) in enumerate(zip(dims, ffn_ratios, strict=True)):
            embed = Stem(in_chans, dim, **dd) if i == 0 else Downsample(dims[i - 1], dim, **dd)
            blocks = Blocks(*(
                MogaBlock(
                    dim,
                    ffn_ratio=ffn_ratio,
                    proj_drop=proj_drop_rate,
                    drop_path=drop_path,
                    layer_scale_init_value=layer_scale_init_value,
                    gate=gate,
                    gate_fp32=gate_fp32,
                    **dd,
                )
                for drop_path in drop_paths[i].tolist()
            ))
            self.add_module(f'patch_embed{i + 1}', embed)
            self.add_module(f'blocks{i + 1}', blocks)
            self.add_module(f'norm{i + 1}', nn.BatchNorm2d(dim, **dd))
        self.head_drop = nn.Dropout(drop_rate)
        self._set_head(num_classes, global_pool, **dd)
        self.apply(_init_convolution)

    def _set_head(self, num_classes: int, global_pool: str, **dd: Any) -> None:
        if global_pool not in ('avg', ''):
            raise ValueError(f"global_pool must be 'avg' or '', not {global_pool!r}")
        if num_classes and not global_pool:
            raise ValueError("global_pool='' needs num_classes=0: the classifier takes pooled features")
        self.num_classes, self.global_pool = num_classes, global_pool
        self.head = nn.Linear(self.num_features, num_classes, **dd) if num_classes else nn.Identity()
        if num_classes:
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
            with torch.no_grad():
                self.head.weight *= self.head_init_scale

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns for timm's `group_parameters`: the stem, then every block (or, if coarse, stage), then the head.

        An embedding goes with the first block of its stage, a closing norm with the last.
        """
        return {
            'stem': r'^patch_embed1',
            'blocks': r'^(?:patch_embed|blocks|norm)(\d)' if coarse else [
                (r'^patch_embed(\d)', (0,)),
                (r'^blocks(\d)\.(\d+)', None),
                (r'^norm(\d)', (99999,)),  # timm's mark for 'with the group before'
            ],
        }

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The scales start at 1e-5 and are exempt from decay, though 4-D: timm's rule would exempt only 1-D ones."""
        return {name for name, _ in self.named_parameters() if name.endswith('sigma.scale') or 'layer_scale' in name}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade a second forward pass for the memory of each block's activations."""
        for module in self.modules():
            if isinstance(module, Blocks):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier, `nn.Identity` where there is none."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a fresh one, or by none at 0 classes; raises ValueError as the constructor."""
        like = next(self.parameters())
        pool = self.global_pool if global_pool is None else global_pool
        self._set_head(num_classes, pool, device=like.device, dtype=like.dtype)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """The stages' outputs, beside the final features unless `intermediates_only`.

        Args:
            x: images [B, in_chans, H, W].
            indices: the stages wanted: the last n if an int, all if None.
            norm: part of timm's interface and without effect, as every stage ends with its own norm.
            stop_early: leave out the stages after the last one wanted.
            output_fmt: 'NCHW', the only one there is.
            intermediates_only: return the list alone.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', not {output_fmt!r}")
        take, last = feature_take_indices(self.num_stages, indices)
        intermediates = []
        for i in range(last + 1 if stop_early else self.num_stages):
            for part in ('patch_embed', 'blocks', 'norm'):
                x = self.get_submodule(f'{part}{i + 1}')(x)
            if i in take:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the stages after the last one in `indices`, and the classifier; returns the indices kept.

        `prune_norm` is part of timm's interface and without effect: a stage's norm belongs to its output.
        """
        take, last = feature_take_indices(self.num_stages, indices)
        for i in range(last + 1, self.num_stages):
            for part in ('patch_embed', 'blocks', 'norm'):
                setattr(self, f'{part}{i + 1}', nn.Identity())
        if prune_head or last + 1 < self.num_stages:
            self.num_features = self.head_hidden_size = self.feature_info[last]['num_chs']
            self.reset_classifier(0, '')
        self.num_stages = last + 1
        return take

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """[B, in_chans, H, W] -> [B, C, H/32, W/32], rounded up; any H and W of at least 32."""
        x = self.norm1(self.blocks1(self.patch_embed1(x)))
        x = self.norm2(self.blocks2(self.patch_embed2(x)))
        x = self.norm3(self.blocks3(self.patch_embed3(x)))
        return self.norm4(self.blocks4(self.patch_embed4(x)))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """[B, C, H, W] -> logits [B, num_classes], or with `pre_logits` what the classifier takes, [B, C]."""
        if self.global_pool == 'avg':
            x = x.mean((2, 3))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, in_chans, H, W] -> logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


class FusedBlock(nn.Module):
    """A `MogaBlock` for inference without its norms and layer scales: `attn(x) + skip * x`, then `mlp(x) + skip * x`.

    Args:
        block: the block, in evaluation mode; its modules are taken over and changed.
        closing: the stage's norm, if the block is the last of its stage.

    With norm(x) = a*x + b, s the layer scale and (c, d) the closing norm's scale and shift, the branches become

        x + s*(proj_2(f(proj_1(a*x + b))) + a*x + b) = [s*proj_2 + s*b](f([proj_1 of a*x + b](x))) + (1 + s*a)*x
        c*(x + s*fc2(f(fc1(a*x + b)))) + d           = [c*s*fc2 + d](f([fc1 of a*x + b](x))) + c*x

    where each bracket is one 1x1 convolution, so that nothing is padded and every fold is exact.
    """

    def __init__(self, block: MogaBlock, closing: _BatchNorm | None) -> None:
        super().__init__()
        self.attn, self.mlp = block.attn, block.mlp
        dtype = block.layer_scale_1.dtype
        scale, shift = _affine(block.norm1)
        layer_scale = block.layer_scale_1.double().flatten()
        _fold_input(self.attn.proj_1, scale, shift)
        _fold_output(self.attn.proj_2, layer_scale, layer_scale * shift)
        self.register_buffer('skip_1', (1 + layer_scale * scale).to(dtype).view(1, -1, 1, 1))
        _fold_input(self.mlp.fc1, *_affine(block.norm2))
        layer_scale = block.layer_scale_2.double().flatten()
        scale, shift = (torch.ones_like(layer_scale), 0.0) if closing is None else _affine(closing)
        _fold_output(self.mlp.fc2, scale * layer_scale, shift)
        self.register_buffer('skip_2', scale.to(dtype).view(1, -1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        x = torch.addcmul(self.attn(x), x, self.skip_1)
        return torch.addcmul(self.mlp(x), x, self.skip_2)


def _affine(norm: _BatchNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, shift), each [C] in float64, such that `norm(x) == scale * x + shift` in evaluation mode."""
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def _fold_input(conv: nn.Conv2d, scale: torch.Tensor, shift: torch.Tensor) -> None:
    """Makes a 1x1 convolution take x where it took `scale * x + shift`."""
    weight = conv.weight.double()
    conv.bias.copy_(conv.bias.double() + weight.flatten(1) @ shift)
    conv.weight.copy_(weight * scale.view(1, -1, 1, 1))


def _fold_output(conv: nn.Conv2d, scale: torch.Tensor, shift: torch.Tensor | float) -> None:
    """Makes a convolution return `scale * y + shift` where it returned y."""
    conv.weight.copy_(conv.weight.double() * scale.view(-1, 1, 1, 1))
    conv.bias.copy_(conv.bias.double() * scale + shift)


@torch.no_grad()
def fuse(model: MogaNet) -> MogaNet:
    """An equal copy for inference in which every BN is folded into its neighbours; a fused model gives a plain copy.

    An embedding's norms go into the convolutions before them, a block's into those around them (`FusedBlock`), and a
    stage's into its last block: it cannot go into the embedding after it, whose zero padding stands for a normalised
    zero, nor into the head, as stage outputs would no longer be the same. Relative to the original 1e-5, in float32.

    Raises:
        TypeError: the model is not a MogaNet.
    """
    if not isinstance(model, MogaNet):
        raise TypeError(f'only a MogaNet can be fused, not a {type(model).__name__}')
    model = copy.deepcopy(model).eval()
    for i in range(model.num_stages):
        embed, blocks = (model.get_submodule(f'{part}{i + 1}') for part in ('patch_embed', 'blocks'))
        closing = model.get_submodule(f'norm{i + 1}')
        if not isinstance(closing, _BatchNorm):
            continue
        if isinstance(embed, Stem):
            for conv, norm in ((0, 1), (3, 4)):
                embed.projection[conv] = fuse_conv_bn_eval(embed.projection[conv], embed.projection[norm])
                embed.projection[norm] = nn.Identity()
        else:
            embed.projection, embed.norm = fuse_conv_bn_eval(embed.projection, embed.norm), nn.Identity()
        for j, block in enumerate(blocks):
            blocks[j] = FusedBlock(block, closing if j == len(blocks) - 1 else None)
        setattr(model, f'norm{i + 1}', nn.Identity())
    return model


def _init_convolution(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
        nn.init.zeros_(module.bias)


def _cfg(url: str = '', **kwargs: Any) -> dict[str, Any]:
    return {
        'url': url,
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': (7, 7),
        'min_input_size': (3, 32, 32),
        'crop_pct': 0.9,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'patch_embed1.projection.0',
        'classifier': 'head',
        'license': 'apache-2.0',
        'paper_ids': 'arXiv:2211.03295',
        'origin_url': 'https://github.com/Westlake-AI/MogaNet',
        **kwargs,
    }


default_cfgs: dict[str, Any] = {}  # timm's name for the cfgs of a module's models; filled by `register`
# Reads a pretrained file into (state dict, gate); where there is none, timm reads it. Set by `register`.
_read: Callable[[str], tuple[dict[str, torch.Tensor], Gate | None]] | None = None


def _create_moganet(
    variant: str, pretrained: bool, kwargs: dict[str, Any], *, dims: tuple[int, ...], depths: tuple[int, ...]
) -> MogaNet:
    kwargs = {'dims': dims, 'depths': depths, **kwargs}
    if pretrained and _read:
        overlay = kwargs.get('pretrained_cfg_overlay') or {}
        cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), overlay)
        source = cfg.file or cfg.url
        if source and not (cfg.state_dict or cfg.hf_hub_id or cfg.source == 'local-dir'):
            # timm would neither open the released files, which carry more than tensors, nor know their gate
            state_dict, gate = _read(source)
            kwargs['pretrained_cfg_overlay'] = {**overlay, 'state_dict': state_dict}
            kwargs.setdefault('gate', gate or 'single')
    model = build_model_with_cfg(MogaNet, variant, pretrained, feature_cfg={'out_indices': (0, 1, 2, 3)}, **kwargs)
    for module in model.modules():  # with features_only, a wrapper has a cfg of its own
        getattr(module, 'pretrained_cfg', {}).pop('state_dict', None)  # would keep the weights twice
    return model


def moganet_xtiny(pretrained: bool = False, **kwargs: Any) -> MogaNet:
    """MogaNet-XT: 2.96 M parameters, 0.79 GMACs at 224."""
    return _create_moganet('moganet_xtiny', pretrained, kwargs, dims=(32, 64, 96, 192), depths=(3, 3, 10, 2))


def moganet_tiny(pretrained: bool = False, **kwargs: Any) -> MogaNet:
    """MogaNet-T: 5.20 M parameters, 1.09 GMACs at 224."""
    return _create_moganet('moganet_tiny', pretrained, kwargs, dims=(32, 64, 128, 256), depths=(3, 3, 12, 2))


def moganet_small(pretrained: bool = False, **kwargs: Any) -> MogaNet:
    """MogaNet-S: 25.3 M parameters, 4.94 GMACs at 224."""
    return _create_moganet('moganet_small', pretrained, kwargs, dims=(64, 128, 320, 512), depths=(2, 3, 12, 2))


def moganet_base(pretrained: bool = False, **kwargs: Any) -> MogaNet:
    """MogaNet-B: 43.7 M parameters, 9.88 GMACs at 224."""
    return _create_moganet('moganet_base', pretrained, kwargs, dims=(64, 160, 320, 512), depths=(4, 6, 22, 3))


def moganet_large(pretrained: bool = False, **kwargs: Any) -> MogaNet:
    """MogaNet-L: 82.5 M parameters, 15.8 GMACs at 224."""
    return _create_moganet('moganet_large', pretrained, kwargs, dims=(64, 160, 320, 640), depths=(4, 6, 44, 4))


def moganet_xlarge(pretrained: bool = False, **kwargs: Any) -> MogaNet:
    """MogaNet-XL: 181.0 M parameters, 34.4 GMACs at 224."""
    return _create_moganet('moganet_xlarge', pretrained, kwargs, dims=(96, 192, 480, 960), depths=(6, 6, 44, 4))


_VARIANTS = (moganet_xtiny, moganet_tiny, moganet_small, moganet_base, moganet_large, moganet_xlarge)


def register(
    pretrained_cfgs: Mapping[str, dict[str, Any]] | None = None,
    read: Callable[[str], tuple[dict[str, torch.Tensor], Gate | None]] | None = None,
) -> None:
    """Registers the variants with `timm.create_model`, in place of timm's models of these names, if it has any.

    timm registers its models when it is imported, which this file does first.

    Args:
        pretrained_cfgs: by `variant.tag`, the `url` of a file of weights and what of `_cfg` is different for it. By
            default no variant has pretrained weights.
        read: reads a path or URL of weights into (state dict in this file's names, gate or None for the single one).
            By default timm reads it.
    """
    global _read
    _read = read
    default_cfgs.clear()
    rows = pretrained_cfgs or {create.__name__: {} for create in _VARIANTS}
    default_cfgs.update(generate_default_cfgs({name: _cfg(**row) for name, row in rows.items()}))
    with warnings.catch_warnings():  # timm warns of a name that is taken, by an earlier call or by a port in timm
        warnings.filterwarnings('ignore', 'Overwriting moganet_')
        for create in _VARIANTS:
            register_model(create)


register()
