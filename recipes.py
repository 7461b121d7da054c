"""Recipes (all that can change accuracy) and runs (where and how), the rows of the results table, and the command line.

Every flag is generated from a field of `Recipe` or `Run`; `resolve` turns a command line into one of each. Nothing here
imports torch, so that `--help`, `--list_recipes` and a misspelt flag answer at once.
"""
import argparse
import dataclasses
import importlib.util
import json
import math
import os
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from utils import UserError, nearest

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Interpolation = Literal['bicubic', 'bilinear', 'nearest', 'lanczos', 'box', 'hamming']


def doc(default: Any, text: str, *, flag: bool = True) -> Any:
    """A dataclass field with a default, the line that documents it, and whether the command line may set it."""
    metadata = {'help': text, 'flag': flag}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Recipe:
    """All that can change the accuracy of a run. Two runs of one recipe differ by round-off and hardware only."""

    # Where the row comes from
    name: str = doc('', 'name of the row', flag=False)
    source: str = doc('', 'where its values and its accuracy were published', flag=False)
    hardware: str = doc('8 GPUs', 'what it was trained on', flag=False)
    micro_batch_size: int = doc(128, 'images per GPU and micro-step on that hardware', flag=False)
    expected_acc1: float | None = doc(None, 'published top-1 accuracy, %', flag=False)
    expected_acc5: float | None = doc(None, 'published top-5 accuracy, %', flag=False)

    # Model
    model: str = doc('moganet_small', 'model name, one of timm.list_models()')
    num_classes: int | None = doc(None, 'classes of the head; found from the data set where not given')
    drop: float = doc(0.0, 'dropout rate in front of the classifier')
    proj_drop: float = doc(0.0, 'dropout rate of the channel aggregation (MogaNet)')
    drop_path: float = doc(0.1, 'stochastic depth rate of the last block; rises linearly from 0')
    layer_scale_init_value: float = doc(1e-5, 'initial layer scale (MogaNet)')
    head_init_scale: float = doc(1.0, "factor on the classifier's initial weights (MogaNet)")
    gate: Literal['single', 'double'] = doc('single', "MogaNet's gate; 'double' applies SiLU twice (OpenMixup's files)")
    gate_fp32: bool = doc(False, 'keep the gating product in float32 under mixed precision (MogaNet)')
    model_kwargs: dict[str, Any] = doc({}, 'further arguments of the model, as name=value ...')

    # Data and augmentation
    data_set: str = doc('image_folder', "image_folder, digits, fake, or a name of timm's create_dataset, as hfds/...")
    input_size: int = doc(224, 'side of the training crop, pixels')
    test_size: int = doc(224, 'side of the test crop, pixels; follows --input_size unless given')
    crop_pct: float = doc(0.9, 'test crop: the shorter side is resized to test_size / crop_pct')
    crop_mode: Literal['center', 'squash', 'border'] = doc('center', 'how the test image is made square')
    interpolation: Interpolation = doc('bicubic', 'interpolation of the test resize')
    train_interpolation: Literal[Interpolation, 'random'] = doc('bicubic', 'interpolation of the training crop; random '
                                                                           'is bilinear or bicubic')
    scale: tuple[float, float] = doc((0.08, 1.0), 'area of the random crop as a share of the image')
    ratio: tuple[float, float] = doc((3 / 4, 4 / 3), 'aspect ratio of the random crop')
    hflip: float = doc(0.5, 'probability of a horizontal flip')
    vflip: float = doc(0.0, 'probability of a vertical flip')
    color_jitter: float | None = doc(0.4, 'strength of the colour jitter; timm ignores it beside RandAugment')
    aa: str | None = doc('rand-m9-mstd0.5-inc1', "automatic augmentation in timm's notation, '3a', or none")
    reprob: float = doc(0.25, 'probability of random erasing')
    remode: Literal['pixel', 'const', 'rand'] = doc('pixel', 'what random erasing fills in')
    recount: int = doc(1, 'number of erased boxes')
    repeated_aug: int = doc(1, 'augmented copies of one image in an epoch (DeiT: 3); 1 is none')
    on_bad_image: Literal['stop', 'skip'] = doc('stop', 'an unreadable training image: stop, or take another and '
                                                        'count it')
    mean: tuple[float, float, float] = doc(IMAGENET_MEAN, 'mean of the normalisation, of values in 0..1')
    std: tuple[float, float, float] = doc(IMAGENET_STD, 'standard deviation of the normalisation')
    mixup: float = doc(0.8, "alpha of mixup's Beta distribution; 0 is off")
    cutmix: float = doc(1.0, "alpha of CutMix's Beta distribution; 0 is off")
    cutmix_minmax: tuple[float, float] | None = doc(None, "bounds of CutMix's box side, instead of --cutmix")
    mixup_prob: float = doc(1.0, 'probability of mixing a batch')
    mixup_switch_prob: float = doc(0.5, 'probability of CutMix where both are on')
    mixup_mode: Literal['batch', 'pair', 'elem'] = doc('batch', 'one mixing weight per batch, pair or image')
    mixup_off_epochs: int = doc(0, 'number of closing epochs without mixup and CutMix')

    # Fine-tuning
    freeze_stages: int = doc(0, 'keep the stem and the first N stages as they are, BN statistics included')
    linear_probe: bool = doc(False, 'train the classifier alone')

    # Loss
    loss: Literal['ce', 'bce', 'bce_sum'] = doc('ce', 'cross-entropy, or binary cross-entropy averaged or summed '
                                                      'over the classes')
    smoothing: float = doc(0.1, 'label smoothing')
    bce_target_thresh: float | None = doc(None, 'make soft targets above it 1, others 0 (binary cross-entropy only)')

    # Optimisation
    epochs: int = doc(300, 'passes over the training set')
    total_batch_size: int = doc(1024, 'images per update, over all GPUs and micro-steps')
    opt: Literal['adamw', 'lamb', 'sgd'] = doc('adamw', 'optimizer')
    opt_eps: float = doc(1e-8, 'epsilon of AdamW and LAMB')
    opt_betas: tuple[float, float] = doc((0.9, 0.999), 'betas of AdamW and LAMB')
    momentum: float = doc(0.9, 'momentum of SGD')
    lr: float = doc(1e-3, 'peak learning rate')
    scale_lr: bool = doc(False, "scale lr and min_lr linearly from the row's total batch to the one given")
    min_lr: float = doc(1e-5, 'learning rate of the last update')
    warmup_epochs: float = doc(5, 'epochs of linear warm-up')
    warmup_steps: int | None = doc(None, 'updates of linear warm-up, instead of --warmup_epochs')
    weight_decay: float = doc(0.05, 'weight decay; none on biases, norms, layer scales')
    weight_decay_end: float | None = doc(None, 'weight decay of the last update, reached on a cosine')
    layer_decay: float = doc(1.0, 'factor of the learning rate from one group of layers to the one below; 1 is none')
    clip_grad: float | None = doc(None, 'bound of gradient clipping; none is off')
    clip_mode: Literal['norm', 'value', 'agc'] = doc('norm', 'clip by global norm, by value, or adaptively')
    precision: Literal['fp32', 'fp16', 'bf16'] = doc('fp32', 'fp32, or automatic mixed precision in fp16 or bf16')
    seed: int = doc(0, 'seed from which all randomness is derived')

    # Batch norm and averaging
    model_ema: bool = doc(True, 'keep an exponential moving average of the model')
    model_ema_decay: float = doc(0.9999, 'decay of the average, per update')
    model_ema_warmup: bool = doc(False, 'let the decay rise as (1 + t) / (10 + t) at the beginning')
    dist_bn: Literal['reduce', 'broadcast', 'none'] = doc('reduce', 'BN statistics over the ranks before evaluating '
                                                                    'and saving')
    sync_bn: bool = doc(False, 'BN statistics of the batch over all ranks')
    precise_bn: int = doc(0, 're-estimate the BN statistics on so many training images before evaluating')


@dataclass(frozen=True)
class Run:
    """Where and how a recipe is run. Nothing here is meant to change the accuracy."""

    # Files
    data_path: str = doc('data/ImageNet', 'folder with train/ and val/, or the root the data set needs')
    eval_data_path: str | None = doc(None, 'folder of the test images, where it is not under --data_path')
    class_map: str | None = doc(None, "file that maps class names to indices (timm's class map)")
    output_dir: str = doc('', "the run's folder; runs/<recipe> by default")
    log_dir: str | None = doc(None, "TensorBoard's folder; <output_dir>/tensorboard by default")

    # Processes, device, batch
    device: str = doc('auto', "'auto', 'cuda', 'mps' or 'cpu'")
    batch_size: int | Literal['auto'] | None = doc(None, 'micro-batch: images per process and micro-step; auto (CUDA) '
                                                         'finds the largest that fits')
    update_freq: int | None = doc(None, 'micro-steps per update; derived where not given')
    world_size: int = doc(1, 'number of processes, from the launcher', flag=False)
    given: tuple[str, ...] = doc((), 'fields of the recipe that the command line gave', flag=False)
    num_workers: int | None = doc(None, 'data-loading processes per rank; the cores of a rank, at most 10, by default')
    pin_mem: bool = doc(True, 'load into pinned memory (CUDA)')
    compile: bool = doc(False, 'torch.compile the model')
    channels_last: bool | None = doc(None, 'memory layout; on by default on CUDA')
    grad_checkpointing: bool = doc(False, 'recompute activations in the backward pass to save memory')
    deterministic: bool = doc(False, 'deterministic CUDA kernels: two runs are bit-identical, and slower')
    tf32: bool = doc(False, 'TensorFloat-32 in float32 matrix products and convolutions (CUDA)')
    model_ema_force_cpu: bool = doc(False, 'keep the moving average on the CPU')

    # Starting
    finetune: str | None = doc(None, 'checkpoint whose weights the model starts from')
    pretrained: bool = doc(False, "start from timm's pretrained weights of the model")
    resume: str | None = doc(None, 'training checkpoint to continue from')
    auto_resume: bool = doc(True, "continue from the newest valid checkpoint of the run's folder")
    resume_anyway: bool = doc(False, 'resume although the recipe differs')
    no_resume_opt: bool = doc(False, 'with --resume: take the weights and the position, not the optimizer')

    # Saving and stopping
    save_ckpt: bool = doc(True, 'save checkpoints')
    save_ckpt_freq: int = doc(1, 'epochs between checkpoints')
    save_ckpt_steps: int | None = doc(None, 'updates between further checkpoints inside an epoch')
    save_ckpt_num: int = doc(3, 'checkpoints to keep beside the best')
    stop_signals: tuple[Literal['TERM', 'INT', 'USR1', 'USR2'], ...] = doc(
        ('TERM', 'INT', 'USR1', 'USR2'), 'signals on which the run saves and stops; others do what they do by default')
    max_skips: int = doc(50, 'updates that the fp16 scaler may skip in a row before the run is stopped')
    on_nan: Literal['stop', 'rollback'] = doc('stop', 'on a NaN: stop, or go back to the last checkpoint with another '
                                                      'data order, at most 3 times')

    # Evaluating
    eval: bool = doc(False, 'evaluate --checkpoint and exit')
    checkpoint: tuple[str, ...] = doc((), 'checkpoints to evaluate')
    weights: Literal['auto', 'raw', 'ema'] = doc('auto', 'which weights of it: auto takes the EMA where there is one')
    valid_labels: str | None = doc(None, "file of the model's classes that the test set has, one index a line, in the "
                                         'order of its labels')
    real_labels: str | None = doc(None, 'JSON of the reassessed labels of the ImageNet test images (ReaL)')
    throughput: bool = doc(False, 'measure the images/s of the model alone too')
    results_file: str | None = doc(None, 'CSV file to which the results are appended')
    val_batch_size: int | None = doc(None, 'images per process when evaluating; 1.5 micro-batches by default')
    val_interval: int = doc(1, 'epochs between evaluations')
    disable_eval: bool = doc(False, 'do not evaluate while training')
    model_ema_eval: bool = doc(True, 'evaluate the moving average beside the raw weights')

    # Reporting
    print_freq: int = doc(50, 'updates between log lines, and between checks for NaN')
    print_param_groups: bool = doc(False, "print the optimizer's parameter groups")
    wandb: bool = doc(False, 'show the run on Weights & Biases too')
    project: str = doc('moganet', 'project on Weights & Biases')
    wandb_ckpt: bool = doc(False, 'upload the best checkpoints there when the run is complete')


# ---- The rows -------------------------------------------------------------------------------------------------------

S = 'MogaNet paper, arXiv 2211.03295, results table'
H = "authors' repository, March 2024"
O = "authors' OpenMixup configurations"  # noqa: E741

_small = Recipe(name='moganet_small', model='moganet_small', source=S, expected_acc1=83.4, expected_acc5=96.9)
_base = replace(_small, name='moganet_base', model='moganet_base', drop_path=0.2, expected_acc1=84.2,
                expected_acc5=97.0)
# 8 x 64 with two micro-steps: 8 x 128 in the authors' command, accumulated in OpenMixup, 1024 images in both
_large = replace(_small, name='moganet_large', model='moganet_large', drop_path=0.3, micro_batch_size=64,
                 expected_acc1=84.6, expected_acc5=97.1)
# lr 1e-3 at batch 512, as in the authors' repository; OpenMixup trains it at 1024
_xlarge = replace(_large, name='moganet_xlarge', model='moganet_xlarge', source=H, drop_path=0.4, total_batch_size=512,
                  expected_acc1=85.1, expected_acc5=97.4)
# fp16 with the gating product in float32: users of the authors' code report NaN from it in fp16
_tiny = replace(_small, name='moganet_tiny', model='moganet_tiny', weight_decay=0.04, min_lr=1e-6,
                aa='rand-m7-mstd0.5-inc1', mixup=0.1, model_ema=False, precision='fp16', gate_fp32=True,
                expected_acc1=79.0, expected_acc5=94.6)
_xtiny = replace(_tiny, name='moganet_xtiny', model='moganet_xtiny', drop_path=0.05, weight_decay=0.03,
                 expected_acc1=76.5, expected_acc5=93.4)
_tiny_256 = replace(_tiny, name='moganet_tiny_256', input_size=256, test_size=256, expected_acc1=79.6,
                    expected_acc5=94.9)
_xtiny_256 = replace(_xtiny, name='moganet_xtiny_256', source=H, input_size=256, test_size=256, expected_acc1=77.2,
                     expected_acc5=93.8)
# 3-Augment (DeiT III): its own colour jitter, no random erasing; trained with the double gate
_three_augment = dict(lr=2e-3, warmup_epochs=20, aa='3a', color_jitter=0.3, reprob=0.0, gate='double')
_tiny_3aug = replace(_tiny_256, name='moganet_tiny_3aug_256', source=f'{S} (T*); {O}', expected_acc1=80.0,
                     expected_acc5=95.0, **_three_augment)
_xtiny_3aug = replace(_xtiny_256, name='moganet_xtiny_3aug_256', source=O, expected_acc1=77.6, expected_acc5=None,
                      **_three_augment)


def _rsb_a3(row: Recipe, acc1: float, *, micro_batch_size: int, **changes: Any) -> Recipe:
    """The 100-epoch row of "ResNet strikes back" (arXiv 2110.00476), procedure A3, for a model."""
    # The loss is summed over the classes: its scale matters for L's clipping and for LAMB's own
    return replace(
        row, name=f'{row.model}_rsb_a3', source=O, micro_batch_size=micro_batch_size, expected_acc1=acc1,
        expected_acc5=None, input_size=160, test_size=224, crop_pct=0.95, epochs=100, opt='lamb', lr=6e-3, min_lr=1e-6,
        total_batch_size=2048, weight_decay=0.02, opt_eps=1e-6, mixup=0.1, aa='rand-m6-mstd0.5-inc1', reprob=0.0,
        smoothing=0.0, loss='bce_sum', model_ema=False, precision='fp32', gate='double', gate_fp32=False, **changes)



def _ft384(row: Recipe, drop_path: float, *, micro_batch_size: int) -> Recipe:
    """Fine-tuning at 384 pixels of a model trained at 224, after ConvNeXt's row for ImageNet-1K (arXiv 2201.03545).

    `main.py --recipe NAME_ft384 --finetune SOURCE`. Ours: no accuracy was published for a MogaNet.
    """
    return replace(
        row, name=f'{row.model}_ft384', source='this project, after ConvNeXt (arXiv 2201.03545); not published',
        hardware='8 GPUs (not measured)', micro_batch_size=micro_batch_size, expected_acc1=None, expected_acc5=None,
        input_size=384, test_size=384, crop_pct=1.0, crop_mode='squash', epochs=30, total_batch_size=512, lr=5e-5,
        min_lr=1e-6, warmup_epochs=0, layer_decay=0.7, weight_decay=1e-8, head_init_scale=0.001, mixup=0.0, cutmix=0.0,
        drop_path=drop_path, model_ema=True, aa='rand-m9-mstd0.5-inc1')


_rows = (
    _xtiny, _xtiny_256, _xtiny_3aug, _tiny, _tiny_256, _tiny_3aug, _small, _base, _large, _xlarge,
    _rsb_a3(_xtiny, 72.8, micro_batch_size=256),
    _rsb_a3(_tiny, 75.4, micro_batch_size=256),
    _rsb_a3(_small, 81.1, micro_batch_size=256),
    _rsb_a3(_base, 82.2, micro_batch_size=128),
    _rsb_a3(_large, 83.2, micro_batch_size=128, drop_path=0.4, clip_grad=10.0),
    _ft384(_xtiny, 0.1, micro_batch_size=64),
    _ft384(_tiny, 0.2, micro_batch_size=64),
    _ft384(_small, 0.2, micro_batch_size=64),
    _ft384(_base, 0.4, micro_batch_size=64),
    _ft384(_large, 0.5, micro_batch_size=32),
    _ft384(_xlarge, 0.6, micro_batch_size=32),
    # One's own folder of classes, hundreds to thousands of images, from ImageNet weights by --finetune. Small batches,
    # so that there are hundreds of updates; the first two stages, whose features are general, stay as they are; no
    # mixing, which takes longer to pay than such a run lasts; the average looks back over 100 updates
    replace(_small, name='moganet_small_transfer', source='this project; not published',
            hardware='1 GPU (not measured)', micro_batch_size=32, expected_acc1=None, expected_acc5=None, epochs=50,
            total_batch_size=32, lr=2e-4, min_lr=1e-6, warmup_epochs=2, layer_decay=0.8, mixup=0.0, cutmix=0.0,
            reprob=0.0, freeze_stages=2,
            model_ema_decay=0.99),
    # Digits must not be mirrored; 32 pixels; the EMA's horizon of 50 updates fits the run's few hundred
    replace(_xtiny, name='moganet_xtiny_digits', source='this project (make demo)', hardware='2 CPU cores',
            micro_batch_size=64, total_batch_size=64, expected_acc1=98.0, expected_acc5=None, data_set='digits',
            input_size=32, test_size=32, crop_pct=1.0, epochs=8, warmup_epochs=1, lr=2e-3, min_lr=1e-5, aa=None,
            color_jitter=None, hflip=0.0, scale=(0.6, 1.0), reprob=0.0, mixup=0.0, cutmix=0.0, precision='fp32',
            model_ema=True, model_ema_decay=0.98),
    # Any other timm model: the ImageNet recipe of the small model, which is DeiT's and ConvNeXt's
    replace(_small, name='default', source='moganet_small, for timm models without a row', expected_acc1=None,
            expected_acc5=None),
)
RECIPES: dict[str, Recipe] = {row.name: row for row in _rows}
MOGANETS = tuple(dict.fromkeys(row.model for row in _rows))

# Fields that compute nothing: they say where a row comes from, or have been carried out when it was resolved
DESCRIPTIVE = ('name', 'source', 'hardware', 'micro_batch_size', 'expected_acc1', 'expected_acc5', 'scale_lr')
# Fields that only a MogaNet has: given for another model they would do nothing, so they are refused
MOGANET_FIELDS = ('proj_drop', 'layer_scale_init_value', 'head_init_scale', 'gate', 'gate_fp32')


# ---- The command line -----------------------------------------------------------------------------------------------

# The first release's flags that are gone, each with its successor
RETIRED = {
    'resplit': 'augmentation splits are out of scope; leave it out',
    'model_key': 'the weights are found in every known format; leave it out',
    'model_prefix': 'prefixes are removed by themselves; leave it out',
    'start_epoch': 'the position comes from the checkpoint: use --resume FILE',
    'dist_eval': 'evaluation is always spread over the ranks and counts each image once; leave it out',
    'world_size': 'the launcher sets it: torchrun --nproc_per_node=N main.py ...',
    'dist_on_itp': 'use torchrun',
    'dist_url': 'use torchrun --rdzv-endpoint=HOST:PORT',
}
ALIASES = {'nb_classes': 'num_classes', 'amp': 'use_amp', 'val_path': 'eval_data_path', 'b': 'batch_size',
           'enable_wandb': 'wandb'}
# Values of other repositories' --data_set
DATA_SETS = {'IMNET': 'image_folder', 'CIFAR': 'torch/cifar100', 'folder': 'image_folder'}


# timm's notation, which it reads leniently: a section that it does not know has no effect or is an assertion
AA = re.compile(r'(3a|original|originalr|v0|v0r)(-mstd\d+(\.\d+)?)?|rand(-(m|n|mmax)\d+|-(mstd|p)\d+(\.\d+)?|-inc[01]|'
                r'-t\w+)*|augmix(-[mwd]\d+|-(mstd|a)\d+(\.\d+)?|-b[01])*')

UNIONS = (types.UnionType, typing.Union)  # int | None, and what typing makes of int | Literal['auto'] | None


def _parse(value: str, kind: Any) -> Any:
    """One command-line word as the type of a field. Raises ValueError."""
    if typing.get_origin(kind) in UNIONS:
        if value.lower() in ('none', ''):
            return None
        first, *others = typing.get_args(kind)
        return value if any(value in typing.get_args(other) for other in others) else _parse(value, first)
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise ValueError(f'choose from {", ".join(typing.get_args(kind))}')
        return value
    if kind is bool:
        if value.lower() in ('true', '1', 'yes', 'on'):
            return True
        if value.lower() in ('false', '0', 'no', 'off'):
            return False
        raise ValueError('say true or false')
    if kind in (int, float):
        try:
            number = kind(value)
        except ValueError:
            raise ValueError('a whole number is wanted' if kind is int else 'a number is wanted') from None
        if not math.isfinite(number):
            raise ValueError('a finite number is wanted')
        return number
    return value


def _literal(text: str) -> Any:
    """The value of a name=value word: JSON where it is JSON (numbers, true, lists), else the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


SIZES = ('input_size', 'test_size')
SQUARE = 'images are square: give one value'


def _surplus(word: str, argv: list[str]) -> str:
    """Why a word that is no flag has no place: the flag before it takes one value alone."""
    flag, values = '', 0
    for other in argv:
        if other.startswith('--'):
            flag, _, value = other.partition('=')
            values = bool(value)
        elif other == word and values and flag:
            cure = SQUARE if flag.removeprefix('--') in SIZES else 'give one value'
            return f'{flag} takes no further value {word}; {cure}'
        else:
            values += 1
    return f'{word} belongs to no flag; see main.py --help'


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message.removeprefix('argument ') + '; see main.py --help')


class _Store(argparse.Action):
    """Parses one or several words as the field's type and stores a plain value."""

    def __init__(self, *args: Any, kind: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.kind = kind

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        kind = self.kind
        if typing.get_origin(kind) in UNIONS and typing.get_origin(typing.get_args(kind)[0]) is tuple:
            kind = None if values in (['none'], ['None']) else typing.get_args(kind)[0]
        try:
            if values is True or kind is None:  # a bare boolean, or none for a tuple
                value = values is True or None
            elif typing.get_origin(kind) is dict:
                value = {name: _literal(text) for name, text in (word.split('=', 1) for word in values)}
            elif typing.get_origin(kind) is tuple:
                inner = typing.get_args(kind)
                words = [part for word in values for part in word.split(',') if part] if inner[0] is float else values
                if inner[-1] is not Ellipsis and len(words) != len(inner):
                    raise ValueError(f'{len(inner)} values are wanted')
                value = tuple(_parse(word, inner[0]) for word in words)
            else:
                value = _parse(values, kind)
        except ValueError as error:
            reason = 'write name=value' if 'unpack' in str(error) or 'dictionary' in str(error) else error
            reason = f'{reason}; {SQUARE}' if self.dest in SIZES else reason
            shown = ' '.join(values) if isinstance(values, list) else values
            raise UserError(f'{option} {shown}: {reason}') from None
        setattr(namespace, self.dest, value)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog='main.py', allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Trains and evaluates MogaNet, and any other timm model.\n\n'
                    '  torchrun --nproc_per_node=8 main.py --model moganet_small --data_path /path/to/imagenet\n'
                    '  python main.py --eval --model moganet_small --checkpoint FILE --data_path /path/to/imagenet\n\n'
                    'A flag may be spelt with _ or -. Defaults are those of the recipe (--print_recipe shows them).')
    top = parser.add_argument_group('what to do')
    top.add_argument('--recipe', metavar='NAME', help="row of the results table; the model's own by default")
    top.add_argument('--config', metavar='FILE', help='recipe.json of an earlier run, to run it again')
    top.add_argument('--list_recipes', action='store_true', help='print the table of recipes and exit')
    top.add_argument('--print_recipe', action='store_true', help='print the resolved recipe as JSON and exit')
    for cls in (Recipe, Run):
        group = parser.add_argument_group(f'{cls.__name__.lower()}: {cls.__doc__.splitlines()[0]}')
        hints = typing.get_type_hints(cls)
        for field in fields(cls):
            if not field.metadata['flag']:
                continue
            kind = hints[field.name]
            text = field.metadata['help'].replace('%', '%%')
            options: dict[str, Any] = {'kind': kind, 'action': _Store, 'help': text}
            base = typing.get_args(kind)[0] if typing.get_origin(kind) in UNIONS else kind
            if base is bool:
                options |= {'nargs': '?', 'const': True, 'metavar': 'true|false'}
            elif typing.get_origin(base) in (tuple, dict):
                options |= {'nargs': '+', 'metavar': 'NAME=VALUE' if typing.get_origin(base) is dict else 'VALUE'}
            elif typing.get_origin(base) is Literal:
                options['metavar'] = '|'.join(typing.get_args(base))
            else:
                options['metavar'] = base.__name__.upper()
            group.add_argument(f'--{field.name}', default=argparse.SUPPRESS, **options)
    # Kept from the first release under their old meaning; said in terms of the fields above
    for name in ('use_amp', 'imagenet_default_mean_and_std'):
        parser.add_argument(f'--{name}', action=_Store, kind=bool, nargs='?', const=True, default=argparse.SUPPRESS,
                            help=argparse.SUPPRESS)
    # torch.distributed.launch passes the local rank; the environment says it too
    parser.add_argument('--local_rank', type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _normalise(argv: list[str]) -> list[str]:
    """Flags with underscores, aliases resolved, retired flags refused with their successor."""
    words = []
    for word in argv:
        if word.startswith('--') and len(word) > 2:
            name, equals, value = word[2:].partition('=')
            name = name.replace('-', '_')
            name = ALIASES.get(name, name)
            if name in RETIRED:
                raise UserError(f'--{name} is gone: {RETIRED[name]}')
            word = f'--{name}{equals}{value}'
        words.append(word)
    return words


def resolve(argv: list[str]) -> tuple[Recipe, Run]:
    """Turns a command line into the recipe and the run it asks for.

    The world size comes from the launcher's environment (`WORLD_SIZE`).

    Args:
        argv: the words after `main.py`.

    Raises:
        UserError: for an unknown flag, recipe or value, an impossible combination, or a batch that does not come out.
        SystemExit: after `--help`, `--list_recipes` and `--print_recipe`.
    """
    parser = _parser()
    args, unknown = parser.parse_known_args(_normalise(argv))
    if unknown and not unknown[0].startswith('-'):
        raise UserError(_surplus(unknown[0], _normalise(argv)))
    if unknown:
        names = [option.lstrip('-') for action in parser._actions for option in action.option_strings]
        raise UserError(f'unknown flag {unknown[0]}{nearest(unknown[0].lstrip("-").split("=")[0], names, prefix="--")}')
    given = vars(args)
    if given.pop('list_recipes'):
        print(table())
        raise SystemExit(0)
    print_recipe = given.pop('print_recipe')
    given.pop('local_rank', None)
    recipe, overridden = _resolve_recipe(given)
    run_fields = {field.name for field in fields(Run)}
    run = Run(**{name: value for name, value in given.items() if name in run_fields})
    run = replace(run, world_size=int(os.environ.get('WORLD_SIZE', 1)), given=overridden,
                  output_dir=run.output_dir or ('' if run.eval else f'runs/{recipe.name}'))
    _validate(recipe, run)
    if print_recipe:
        print(json.dumps(dataclasses.asdict(recipe), indent=2))
        raise SystemExit(0)
    return recipe, run if run.eval else fit_batch(recipe, run)


def check_start(recipe: Recipe, run: Run) -> None:
    """Refuses what can be seen to fail, at once and not after torch is imported: files and folders that are not there,
    stages frozen before they have learnt anything. Raises UserError."""
    frozen = (recipe.freeze_stages or recipe.linear_probe) and not run.eval
    if frozen and not (run.finetune or run.pretrained or run.resume):
        raise UserError('what is frozen would stay at its random initial values; give --finetune FILE or --pretrained, '
                        'or --freeze_stages 0')
    if recipe.data_set in ('digits', 'fake') and run.data_path != Run.data_path:
        raise UserError(f'--data_set {recipe.data_set} reads no --data_path; for a folder of images say --data_set '
                        'image_folder')
    named = [('checkpoint', path) for path in run.checkpoint] + [(name, getattr(run, name)) for name in (
        'finetune', 'resume', 'valid_labels', 'real_labels')]  # a class map may also lie below the data
    for name, path in named:
        if path and not re.match(r'released:|https?://', path) and not Path(path).expanduser().exists():
            raise UserError(f'--{name} {path} does not exist; check the path')
    elsewhere = run.checkpoint or (run.eval and run.eval_data_path)  # a checkpoint says what data it is of
    if recipe.data_set == 'image_folder' and not elsewhere and not Path(run.data_path).exists():
        raise UserError(f'{run.data_path} does not exist; give --data_path the folder that has train/ and val/')


def _resolve_recipe(given: dict[str, Any]) -> tuple[Recipe, tuple[str, ...]]:
    """The row that the flags choose with the flags that override its fields, and these fields' names."""
    name, config = given.pop('recipe', None), given.pop('config', None)
    model = given.get('model')
    if config is not None and name is not None:
        raise UserError('--config and --recipe both name the recipe; give one')
    if config is not None:
        row = load_recipe(config)
    elif name is not None:
        if name not in RECIPES:
            raise UserError(f'unknown recipe {name}{nearest(name, RECIPES)}; main.py --list_recipes shows them')
        row = RECIPES[name]
    elif model is None and given.get('checkpoint'):  # the file says which
        row = replace(RECIPES['default'], model='')
    elif model is None and given.get('eval'):
        raise UserError('evaluate what? say --checkpoint FILE, or --model NAME --pretrained')
    elif model is None:
        raise UserError('which model? say --model moganet_small, or --recipe NAME; main.py --list_recipes shows them')
    elif model in RECIPES and RECIPES[model].model == model:
        row = RECIPES[model]
    elif model.startswith('moganet'):
        hint = f'; it is a recipe: say --recipe {model}' if model in RECIPES else nearest(model, MOGANETS)
        raise UserError(f'unknown model {model}{hint}')
    else:
        row = replace(RECIPES['default'], model=model)

    if 'use_amp' in given:
        given.setdefault('precision', 'fp16' if given.pop('use_amp') else 'fp32')
    if not given.pop('imagenet_default_mean_and_std', True):
        given.setdefault('mean', (0.5,) * 3)
        given.setdefault('std', (0.5,) * 3)
    if 'data_set' in given:
        given['data_set'] = DATA_SETS.get(given['data_set'], given['data_set'])
    recipe_fields = {field.name for field in fields(Recipe)}
    changes = {field: value for field, value in given.items() if field in recipe_fields}
    _check_parts(changes, changes.get('model', row.model))
    if 'input_size' in changes:
        changes.setdefault('test_size', changes['input_size'])
    recipe = replace(row, **changes)
    if recipe.scale_lr:
        factor = recipe.total_batch_size / row.total_batch_size
        recipe = replace(recipe, lr=recipe.lr * factor, min_lr=recipe.min_lr * factor)
    return recipe, tuple(changes)


def _check_parts(given: Iterable[str], model: str) -> None:
    """Refuses fields that the model has no part for. Raises UserError."""
    useless = [field for field in MOGANET_FIELDS if field in given]
    if useless and model and not model.startswith('moganet'):  # without a name, the checkpoint will say it
        raise UserError(f'--{useless[0]} is for MogaNet models; {model} has no such part')


def from_dict(values: dict[str, Any]) -> Recipe:
    """A recipe from the dict that `dataclasses.asdict` and JSON make of one. Raises UserError for others."""
    known = {field.name for field in fields(Recipe)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise UserError(f'not a recipe: unknown field {unknown[0]}{nearest(unknown[0], known)}')
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    hints = typing.get_type_hints(Recipe)
    for name, value in values.items():
        if not _fits(value, hints[name]):
            raise UserError(f'not a recipe: {value!r} cannot be the value of {name}')
    return Recipe(**values)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a field's type."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in UNIONS:
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, tuple) and len(value) == len(inner) and all(map(_fits, value, inner))
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, origin or kind)


def of_weights(meta: dict[str, Any], gate: str | None, asked: Recipe, given: tuple[str, ...]) -> Recipe:
    """The recipe by which a checkpoint is to be evaluated.

    Its own, where the file holds one; else the one asked for, with the test settings and the gate that the file or the
    table of released files knows. Fields that the command line gave win.

    Args:
        meta: what `models.weights.load_weights` found out about the file.
        gate: the gate it was trained with, where that is known.
        asked: the recipe of the command line.
        given: the names of its fields that were given there.

    Raises:
        UserError: where neither the file nor the command line says which model it is, or the file says nonsense.
    """
    recipe = from_dict(meta['recipe']) if isinstance(meta.get('recipe'), dict) else asked
    fields_of_test = ('model', 'test_size', 'crop_pct', 'crop_mode', 'interpolation', 'mean', 'std')
    known = {name: meta[name] for name in fields_of_test if meta.get(name) is not None}
    if gate is not None:
        known['gate'] = gate
    if recipe is asked and recipe.model:  # --model or --recipe says it
        known.pop('model', None)
    known = {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()
             if name not in given}
    hints = typing.get_type_hints(Recipe)
    for name, value in known.items():
        if not _fits(value, hints[name]):
            raise UserError(f'the checkpoint says {name} {value!r}, which cannot be; give --{name}')
    recipe = replace(recipe, **known, **{name: getattr(asked, name) for name in given})
    if not recipe.model:
        raise UserError('the checkpoint does not say which model it is; give --model NAME')
    _check_parts(given, recipe.model)
    return recipe


def load_recipe(path: str) -> Recipe:
    """The recipe in a `recipe.json`. Raises UserError where there is none."""
    try:
        values = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f'--config {path} cannot be read ({error}); give the recipe.json of a run') from None
    if not isinstance(values, dict):
        raise UserError(f'--config {path} holds no recipe; give the recipe.json of a run')
    return from_dict(values)


def differences(old: Recipe, new: Recipe) -> list[str]:
    """The fields in which two recipes compute something else, as `name: old -> new`."""
    return [f'{field.name}: {getattr(old, field.name)} -> {getattr(new, field.name)}' for field in fields(Recipe)
            if field.name not in DESCRIPTIVE and getattr(old, field.name) != getattr(new, field.name)]


def _validate(recipe: Recipe, run: Run) -> None:
    """Refuses values that cannot be meant. Raises UserError that names the flag."""

    def check(holds: bool, message: str) -> None:
        if not holds:
            raise UserError(message)

    for name in ('drop', 'proj_drop', 'drop_path', 'hflip', 'vflip', 'reprob', 'mixup_prob', 'mixup_switch_prob',
                 'smoothing', 'momentum', 'model_ema_decay'):
        value = getattr(recipe, name)
        check(0 <= value <= 1, f'--{name} {value} is not a rate: give a value from 0 to 1')
    for name in ('drop', 'proj_drop', 'drop_path', 'smoothing', 'momentum', 'model_ema_decay'):
        check(getattr(recipe, name) < 1, f'--{name} 1 leaves nothing: give a value below 1')
    for name in ('lr', 'min_lr', 'weight_decay', 'weight_decay_end', 'warmup_epochs', 'warmup_steps', 'mixup', 'cutmix',
                 'color_jitter', 'opt_eps', 'precise_bn', 'layer_scale_init_value', 'head_init_scale',
                 'mixup_off_epochs'):
        value = getattr(recipe, name)
        check(value is None or value >= 0, f'--{name} {value} is negative')
    for name in ('epochs', 'total_batch_size', 'input_size', 'test_size', 'recount', 'repeated_aug', 'num_classes',
                 'clip_grad', 'crop_pct', 'layer_decay'):
        value = getattr(recipe, name)
        check(value is None or value > 0, f'--{name} {value}: give a value above 0')
    for name in ('save_ckpt_freq', 'save_ckpt_steps', 'save_ckpt_num', 'val_batch_size', 'val_interval', 'print_freq',
                 'update_freq', 'max_skips'):
        value = getattr(run, name)
        check(value is None or value > 0, f'--{name} {value}: give a whole number above 0')
    check(run.batch_size in (None, 'auto') or run.batch_size > 0, f'--batch_size {run.batch_size}: give at least 1')
    check(run.num_workers is None or run.num_workers >= 0, f'--num_workers {run.num_workers} is negative')
    check(recipe.freeze_stages >= 0, f'--freeze_stages {recipe.freeze_stages} is negative')
    for name in ('valid_labels', 'real_labels', 'throughput', 'results_file'):
        check(run.eval or not getattr(run, name), f'--{name} goes with --eval')
    check(recipe.layer_decay <= 1, f'--layer_decay {recipe.layer_decay} speeds up lower layers: give at most 1')
    check(recipe.crop_pct <= 1, f'--crop_pct {recipe.crop_pct}: the crop cannot exceed the image; give at most 1')
    check(recipe.min_lr <= recipe.lr, f'--min_lr {recipe.min_lr} is above --lr {recipe.lr}')
    check(recipe.warmup_steps is not None or recipe.warmup_epochs <= recipe.epochs,
          f'--warmup_epochs {recipe.warmup_epochs:g} is longer than the run: give at most its {recipe.epochs} epochs')
    check(recipe.aa is None or AA.fullmatch(recipe.aa) is not None,
          f'--aa {recipe.aa} is not in timm\'s notation: give for example rand-m9-mstd0.5-inc1, 3a, or none')
    check(0 < recipe.scale[0] <= recipe.scale[1] <= 1, f'--scale {recipe.scale}: give two shares of the image, rising')
    bounds = recipe.cutmix_minmax
    check(bounds is None or 0 <= int(bounds[0] * recipe.input_size) < int(bounds[1] * recipe.input_size)
          <= recipe.input_size, f'--cutmix_minmax {bounds}: give two shares of the side, rising, a pixel apart or more')
    check(0 < recipe.ratio[0] <= recipe.ratio[1], f'--ratio {recipe.ratio}: give two aspect ratios, rising')
    check(all(value > 0 for value in recipe.std), f'--std {recipe.std}: give values above 0')
    check(all(0 <= beta < 1 for beta in recipe.opt_betas), f'--opt_betas {recipe.opt_betas}: give values in [0, 1)')
    check(recipe.bce_target_thresh is None or recipe.loss != 'ce',
          '--bce_target_thresh needs --loss bce or bce_sum; cross-entropy has no threshold')
    check(recipe.clip_grad is not None or recipe.clip_mode == 'norm', '--clip_mode needs --clip_grad')
    check(not (run.eval and not run.checkpoint and not run.pretrained), 'evaluate what? say --checkpoint FILE')
    check(not (run.checkpoint and run.pretrained), '--checkpoint and --pretrained both name the weights; give one')
    check(not (run.eval and run.batch_size == 'auto'), '--batch_size auto is for training; give --val_batch_size')
    check(run.eval or not run.checkpoint, '--checkpoint goes with --eval; to continue a run say --resume, '
                                          'to start from its weights --finetune')
    check(not (run.finetune and run.pretrained), '--finetune and --pretrained both name the initial weights; give one')
    for name in ('resume', 'finetune'):
        check(not (run.eval and getattr(run, name)), f'--{name} is for training; what to evaluate is --checkpoint FILE')
    check(run.eval or run.finetune is not None or run.pretrained or run.weights == 'auto',
          '--weights chooses from a file: it goes with --eval, --finetune FILE or --pretrained')
    check(run.resume is not None or not run.no_resume_opt, '--no_resume_opt goes with --resume FILE')
    check(not (run.wandb and run.eval), '--wandb shows a training; leave it out with --eval')
    check(run.wandb or run.project == Run.project, '--project goes with --wandb')
    check(run.wandb or not run.wandb_ckpt, '--wandb_ckpt goes with --wandb')
    check(not run.wandb_ckpt or (run.save_ckpt and not run.disable_eval),
          '--wandb_ckpt uploads the best checkpoints; leave out --save_ckpt false and --disable_eval')
    # A folder `wandb`, as the package leaves them, passes for a package without origin
    check(not run.wandb or getattr(importlib.util.find_spec('wandb'), 'origin', None) is not None,
          '--wandb needs its package: pip install wandb')


def fit_batch(recipe: Recipe, run: Run) -> Run:
    """Derives micro-batch and accumulation so that world size x micro-batch x micro-steps is the recipe's batch.

    The effective batch belongs to the recipe, the GPUs to the run. What the user gives is kept; the rest is derived:
    the largest micro-batch up to the recipe's own that divides the batch, then the micro-steps.

    Raises:
        UserError: where it does not come out, with the arithmetic and the cures.
    """
    total, world = recipe.total_batch_size, run.world_size
    if run.batch_size == 'auto':  # found by trial once the model stands on the device
        return run
    given = f'{world} process{"es" if world > 1 else ""}'
    micro, steps = run.batch_size, run.update_freq
    if micro is None:
        share = total // (world * steps) if steps else total // world
        limit = share if steps else min(share, recipe.micro_batch_size)
        micro = next((size for size in range(limit, 0, -1) if total % (world * size) == 0), max(share, 1))
    if steps is None:
        steps = max(total // (world * micro), 1)
    product = world * micro * steps
    if product != total:
        raise UserError(
            f'{given} x micro-batch {micro} x {steps} micro-step{"s" if steps > 1 else ""} = {product} images per '
            f"update, but the recipe's batch is {total}: {_cures(recipe, run, micro, steps)}")
    if micro == 1 and recipe.input_size <= 32 and recipe.model in MOGANETS:
        raise UserError('one image of 32 pixels leaves the batch norms of the last stage one value a channel; give '
                        '--batch_size 2 or more')
    return replace(run, batch_size=micro, update_freq=steps)


def _cures(recipe: Recipe, run: Run, micro: int, steps: int) -> str:
    """The two ways out of a batch that does not come out."""
    total, world = recipe.total_batch_size, run.world_size
    other = f'train with another batch by --total_batch_size {world * micro * steps} (and think of --scale_lr)'
    fixed = world * (run.update_freq or 1)
    if total % fixed:
        return f'{total} cannot be divided by {fixed}, so change the number of processes or --update_freq, or {other}'
    fitting = [size for size in range(1, total // fixed + 1) if total % (fixed * size) == 0]
    if run.update_freq:
        fitting = [total // fixed]
    best = min(fitting, key=lambda size: abs(size - micro))
    return f'give --batch_size {best}, or {other}'


def table() -> str:
    """The recipes as a table of text, one row each."""
    head = ('recipe', 'train/test', 'epochs', 'batch', 'opt', 'lr', 'decay', 'drop path', 'augmentation', 'mixup',
            'EMA', 'precision', 'gate', 'top-1')
    lines = [head]
    for row in RECIPES.values():
        lines.append((
            row.name, f'{row.input_size}/{row.test_size}', str(row.epochs), str(row.total_batch_size), row.opt,
            f'{row.lr:g}', f'{row.weight_decay:g}', f'{row.drop_path:g}', row.aa or '-', f'{row.mixup:g}',
            f'{row.model_ema_decay:g}' if row.model_ema else '-', row.precision, row.gate,
            f'{row.expected_acc1:.1f}' if row.expected_acc1 else '-'))
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return '\n'.join('  '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                     for line in lines)
