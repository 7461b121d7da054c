"""The parts that a recipe names, built: the model on its device, and the loss."""
import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm  # torch's drops the activation of timm's BatchNormAct2d
from timm.loss import BinaryCrossEntropy
from torch import nn
from torch.nn import functional as F

import optim_factory
import recipes
import utils
from models.weights import Weights, apply_weights, check_forward, create_model
from recipes import Recipe, Run
from utils import UserError, log


def adapt_to_device(recipe: Recipe, run: Run, device: torch.device) -> Recipe:
    """Sets what torch keeps globally, and falls back to fp32 where the device has no fp16."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = run.tf32
    torch.backends.cudnn.benchmark = not run.deterministic
    if run.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # what cuBLAS asks for in order to be so
        torch.use_deterministic_algorithms(True)
    if recipe.precision == 'fp16' and device.type != 'cuda':
        log.info('fp16 needs a CUDA device: running in fp32 on this %s.', device.type)
        recipe = dataclasses.replace(recipe, precision='fp32')
    if recipe.sync_bn and device.type != 'cuda':
        raise UserError(f'--sync_bn needs CUDA devices, and this is a {device.type}; leave it out')
    return recipe


def build_model(recipe: Recipe, run: Run, *, num_classes: int, device: torch.device,
                initial: Weights | None = None, pretrained: bool = False) -> nn.Module:
    """The recipe's model on the device, with its own initial weights or those of `initial` (the head where it fits).

    Raises:
        UserError: for an unknown model, one that cannot take the recipe's images, or weights that are not of it.
    """
    # Many timm models have no drop path; a rate of 0 is not passed on
    arguments: dict[str, Any] = {'num_classes': num_classes, 'drop_rate': recipe.drop or None,
                                 'drop_path_rate': recipe.drop_path or None, **recipe.model_kwargs}
    if recipe.model in recipes.MOGANETS:
        arguments |= {'proj_drop_rate': recipe.proj_drop, 'layer_scale_init_value': recipe.layer_scale_init_value,
                      'head_init_scale': recipe.head_init_scale, 'gate': recipe.gate, 'gate_fp32': recipe.gate_fp32}
    utils.seed_everything(recipe.seed, 'model')
    model = create_model(recipe.model, pretrained=pretrained and initial is None, **arguments)
    if not run.eval:
        check_forward(model, size=recipe.input_size, training=True,
                      batch=run.batch_size if isinstance(run.batch_size, int) else 2)
    if run.eval or recipe.test_size != recipe.input_size:
        check_forward(model, size=recipe.test_size)
    if initial is not None:
        log.info('Starting from %s: %s', initial, apply_weights(model, initial, drop_classifier=True))
    optim_factory.freeze(model, stages=recipe.freeze_stages, linear_probe=recipe.linear_probe)
    if run.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError):
            raise UserError(f'{recipe.model} has no gradient checkpointing; leave --grad_checkpointing out') from None
    if recipe.sync_bn:
        model = convert_sync_batchnorm(model)
    channels_last = device.type == 'cuda' if run.channels_last is None else run.channels_last
    return model.to(device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@contextlib.contextmanager
def compile_errors() -> Iterator[None]:
    """Makes one line of what torch.compile raises: at the first call, and not when it is asked to compile."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(('torch._dynamo', 'torch._inductor', 'torch._functorch', 'triton')):
            raise
        reason = str(error).strip().split('\n')[0][:200] or type(error).__name__
        raise UserError(f'--compile: torch cannot compile the model here ({reason}); install a C++ compiler (g++; on a '
                        'GPU Triton too), or leave --compile out') from error


class Criterion:
    """The recipe's loss of (logits [B, classes], targets [B] or [B, classes]), the mean over the images.

    Mixed targets are smoothed where they are mixed; class indices here.
    """

    def __init__(self, recipe: Recipe):
        self.smoothing = recipe.smoothing
        self.binary = None if recipe.loss == 'ce' else BinaryCrossEntropy(
            recipe.smoothing, target_threshold=recipe.bce_target_thresh, sum_classes=recipe.loss == 'bce_sum')

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self.binary is not None:
            return self.binary(logits, targets)
        return F.cross_entropy(logits, targets, label_smoothing=0.0 if targets.is_floating_point() else self.smoothing)
