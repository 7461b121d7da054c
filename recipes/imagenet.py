"""Recipes of image classification: their fields, and the rows of the results table."""
import os
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from recipes.fields import BELOW_ONE, NOT_NEGATIVE, POSITIVE, RATE, DataSet, Recipe, check, doc

# The fields that say how a classifier's images are prepared for a test, and those that a checkpoint brings to its test,
# beside the gate
PREPARATION = ('test_size', 'crop_pct', 'crop_mode', 'interpolation')
TESTED_BY = ('model', *PREPARATION, 'mean', 'std')

Interpolation = Literal['bicubic', 'bilinear', 'nearest', 'lanczos', 'box', 'hamming']

# timm's notation, which it reads leniently: a section that it does not know has no effect or is an assertion
AA = re.compile(r'(3a|original|originalr|v0|v0r)(-mstd\d+(\.\d+)?)?|rand(-(m|n|mmax)\d+|-(mstd|p)\d+(\.\d+)?|-inc[01]|'
                r'-t\w+)*|augmix(-[mwd]\d+|-(mstd|a)\d+(\.\d+)?|-b[01])*')


def is_moganet(model: str) -> bool:
    """Whether a timm model's name is a MogaNet's, also one that no row has."""
    return model.startswith('moganet')


def names_file(source: str) -> bool:
    """Whether a source of weights names a file, an address or a released file, and not a timm model."""
    return bool(re.match(r'released:|\w+://', source) or os.path.isfile(source) or os.path.dirname(source)
                or re.search(r'\.(pth|pt|th|tar|bin|ckpt|pkl|safetensors|json)$', source))


@dataclass(frozen=True)
class Classification(Recipe):
    """All that can change a classifier's accuracy. Two runs of one recipe differ by round-off and hardware only."""

    task = 'tasks.classification:Classification'
    metrics = {'acc1': ('top-1', ' %'), 'acc5': ('top-5', ' %'), 'loss': ('loss', '')}  # noqa: RUF012
    best = 'acc1'
    published_data = DataSet('ImageNet-1K', classes=1000, images=1_281_167, gigabytes=155, benchmark='data')
    descriptive = (*Recipe.descriptive, 'expected_acc1', 'expected_acc5')
    by_content = ('class_weights', 'teacher')
    fixed = (*Recipe.fixed, 'linear_probe')

    expected_acc1: float | None = doc(None, 'published top-1 accuracy, %', flag=False)
    expected_acc5: float | None = doc(None, 'published top-5 accuracy, %', flag=False)

    # Model
    drop: float = doc(0.0, 'dropout rate in front of the classifier', RATE, BELOW_ONE)
    proj_drop: float = doc(0.0, 'dropout rate of the channel aggregation (MogaNet)', RATE, BELOW_ONE)
    layer_scale_init_value: float = doc(1e-5, 'initial layer scale (MogaNet)', NOT_NEGATIVE)
    head_init_scale: float = doc(1.0, "factor on the classifier's initial weights (MogaNet)", NOT_NEGATIVE)
    gate: Literal['single', 'double'] = doc('single', "MogaNet's gate; 'double' applies SiLU twice (OpenMixup's files)")
    gate_fp32: bool = doc(False, 'keep the gating product in float32 under mixed precision (MogaNet)')

    # Data and augmentation
    input_size: int = doc(224, 'side of the training crop, pixels', POSITIVE)
    test_size: int = doc(224, 'side of the test crop, pixels; follows --input_size unless given. '
                              'Several, with --eval, make a table', POSITIVE)
    crop_pct: float = doc(0.9, 'test crop: the shorter side is resized to test_size / crop_pct', POSITIVE)
    crop_mode: Literal['center', 'squash', 'border'] = doc('center', 'how the test image is made square')
    interpolation: Interpolation = doc('bicubic', 'interpolation of the test resize')
    train_interpolation: Literal[Interpolation, 'random'] = doc('bicubic', 'interpolation of the training crop; random '
                                                                           'is bilinear or bicubic')
    scale: tuple[float, float] = doc((0.08, 1.0), 'area of the random crop as a share of the image')
    ratio: tuple[float, float] = doc((3 / 4, 4 / 3), 'aspect ratio of the random crop')
    hflip: float = doc(0.5, 'probability of a horizontal flip', RATE)
    vflip: float = doc(0.0, 'probability of a vertical flip', RATE)
    color_jitter: float | None = doc(0.4, 'strength of the colour jitter; timm ignores it beside RandAugment',
                                     NOT_NEGATIVE)
    aa: str | None = doc('rand-m9-mstd0.5-inc1', "automatic augmentation in timm's notation, '3a', or none")
    reprob: float = doc(0.25, 'probability of random erasing', RATE)
    remode: Literal['pixel', 'const', 'rand'] = doc('pixel', 'what random erasing fills in')
    recount: int = doc(1, 'number of erased boxes', POSITIVE)
    mixup: float = doc(0.8, "alpha of mixup's Beta distribution; 0 is off", NOT_NEGATIVE)
    cutmix: float = doc(1.0, "alpha of CutMix's Beta distribution; 0 is off", NOT_NEGATIVE)
    cutmix_minmax: tuple[float, float] | None = doc(None, "bounds of CutMix's box side, instead of --cutmix")
    mixup_prob: float = doc(1.0, 'probability of mixing a batch', RATE)
    mixup_switch_prob: float = doc(0.5, 'probability of CutMix where both are on', RATE)
    mixup_mode: Literal['batch', 'pair', 'elem'] = doc('batch', 'one mixing weight per batch, pair or image')
    mixup_off_epochs: int = doc(0, 'number of closing epochs without mixup and CutMix', NOT_NEGATIVE)

    # Fine-tuning
    linear_probe: bool = doc(False, 'train the classifier alone')

    # Loss
    loss: Literal['ce', 'bce', 'bce_sum'] = doc('ce', 'cross-entropy, or binary cross-entropy averaged or summed '
                                                      'over the classes')
    smoothing: float = doc(0.1, 'label smoothing', RATE, BELOW_ONE)
    bce_target_thresh: float | None = doc(None, 'make soft targets above it 1, others 0 (binary cross-entropy only)')

    # Long tails
    class_weights: str | None = doc(None, 'weigh the loss of an image by its class: balanced, as the inverse of the '
                                          "class's number of images, or a file of NAME WEIGHT lines", path=True)
    balanced_sampling: bool = doc(False, 'train on equally many images of each class: those of small classes repeat')

    # Distillation
    teacher: str | None = doc(None, 'trained classifier whose answers to the same images are learnt beside the labels: '
                                    "a checkpoint, released:NAME, or a timm model with its pretrained weights",
                              path=True)
    distill: Literal['hard', 'soft'] | None = doc(None, "learn the teacher's likeliest class, or its probabilities")
    distill_alpha: float = doc(0.5, "share of the teacher's loss; the labels' has the rest", RATE, POSITIVE)
    distill_tau: float = doc(1.0, 'temperature of both probabilities (--distill soft)', POSITIVE)

    def check(self) -> None:
        """Refuses values that cannot be meant. Raises UserError that names the flag."""
        super().check()
        check(self.crop_pct <= 1, f'--crop_pct {self.crop_pct}: the crop cannot exceed the image; give at most 1')
        check(self.aa is None or AA.fullmatch(self.aa) is not None,
              f"--aa {self.aa} is not in timm's notation: give for example rand-m9-mstd0.5-inc1, 3a, or none")
        check(0 < self.scale[0] <= self.scale[1] <= 1, f'--scale {self.scale}: give two shares of the image, rising')
        bounds = self.cutmix_minmax
        check(bounds is None or 0 <= int(bounds[0] * self.input_size) < int(bounds[1] * self.input_size)
              <= self.input_size,
              f'--cutmix_minmax {bounds}: give two shares of the side, rising, a pixel apart or more')
        check(0 < self.ratio[0] <= self.ratio[1], f'--ratio {self.ratio}: give two aspect ratios, rising')
        check(self.bce_target_thresh is None or self.loss != 'ce',
              '--bce_target_thresh needs --loss bce or bce_sum; cross-entropy has no threshold')
        check(self.class_weights is None or self.loss == 'ce', '--class_weights weighs cross-entropy: say --loss ce')
        check(self.class_weights != 'balanced' or not self.balanced_sampling,
              '--class_weights balanced and --balanced_sampling both make up for the same difference; give one')
        check(not self.balanced_sampling or self.repeated_aug == 1,
              '--balanced_sampling repeats the images of small classes by itself; leave --repeated_aug out')
        check((self.teacher is None) == (self.distill is None),
              '--teacher SOURCE and --distill hard or soft go together; give both or neither')
        check(self.teacher is not None or self.distill_alpha == Classification.distill_alpha,
              '--distill_alpha goes with --teacher SOURCE')
        check(self.distill == 'soft' or self.distill_tau == Classification.distill_tau,
              '--distill_tau goes with --distill soft')
        check(self.teacher is None or self.loss == 'ce', '--teacher gives its loss beside cross-entropy: say --loss ce')

    def expected(self) -> dict[str, float | None]:
        """The published values of the row by metric, None where none was published."""
        return {'acc1': self.expected_acc1, 'acc5': self.expected_acc5}

    def settings(self) -> dict[str, Any]:
        """How the model and its images are prepared for a test, as eval.json holds it."""
        return {'gate': self.gate if is_moganet(self.model) else None} | {
            name: getattr(self, name) for name in PREPARATION}

    def arguments(self) -> dict[str, Any]:
        """The arguments of the model's constructor, beside its classes and `model_kwargs`."""
        arguments = {'drop_rate': self.drop or None, **super().arguments()}
        if is_moganet(self.model):
            arguments |= {'proj_drop_rate': self.proj_drop, 'layer_scale_init_value': self.layer_scale_init_value,
                          'head_init_scale': self.head_init_scale, 'gate': self.gate, 'gate_fp32': self.gate_fp32}
        return arguments

    def freezes(self) -> bool:
        """Whether a part of the model keeps the weights that it starts from."""
        return super().freezes() or self.linear_probe

    def check_micro_batch(self, size: int) -> None:
        """Refuses a micro-batch for which the model is not defined. Raises UserError."""
        check(size > 1 or self.input_size > 32 or not is_moganet(self.model),
              'one image of 32 pixels leaves the batch norms of the last stage one value a channel; give --batch_size '
              '2 or more')

    def cells(self) -> dict[str, str]:
        """The row in the table of recipes, by column."""
        return {'recipe': self.name, 'train/test': f'{self.input_size}/{self.test_size}', 'epochs': str(self.epochs),
                'batch': str(self.total_batch_size), 'opt': self.opt, 'lr': f'{self.lr:g}',
                'decay': f'{self.weight_decay:g}', 'drop path': f'{self.drop_path:g}', 'augmentation': self.aa or '-',
                'mixup': f'{self.mixup:g}', 'EMA': f'{self.model_ema_decay:g}' if self.model_ema else '-',
                'precision': self.precision, 'gate': self.gate,
                'top-1': f'{self.expected_acc1:.1f}' if self.expected_acc1 else '-'}

    def useless(self, model: str) -> list[str]:
        """The fields that do nothing for a model."""
        of_moganet = ['proj_drop', 'layer_scale_init_value', 'head_init_scale', 'gate', 'gate_fp32']
        return [] if is_moganet(model) else of_moganet


# ---- The rows -------------------------------------------------------------------------------------------------------

S = 'MogaNet paper, arXiv 2211.03295, results table'
H = "authors' repository, March 2024"
O = "authors' OpenMixup configurations"  # noqa: E741

_small = Classification(name='moganet_small', model='moganet_small', source=S, expected_acc1=83.4, expected_acc5=96.9)
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


def _rsb_a3(row: Classification, acc1: float, *, micro_batch_size: int, **changes: Any) -> Classification:
    """The 100-epoch row of "ResNet strikes back" (arXiv 2110.00476), procedure A3, for a model."""
    # The loss is summed over the classes: its scale matters for L's clipping and for LAMB's own
    return replace(
        row, name=f'{row.model}_rsb_a3', source=O, micro_batch_size=micro_batch_size, expected_acc1=acc1,
        expected_acc5=None, input_size=160, test_size=224, crop_pct=0.95, epochs=100, opt='lamb', lr=6e-3, min_lr=1e-6,
        total_batch_size=2048, weight_decay=0.02, opt_eps=1e-6, mixup=0.1, aa='rand-m6-mstd0.5-inc1', reprob=0.0,
        smoothing=0.0, loss='bce_sum', model_ema=False, precision='fp32', gate='double', gate_fp32=False, **changes)



def _ft384(row: Classification, drop_path: float, *, micro_batch_size: int, note: str = '') -> Classification:
    """Fine-tuning at 384 pixels of a model trained at 224, after ConvNeXt's row for ImageNet-1K (arXiv 2201.03545).

    `main.py --recipe NAME_ft384 --finetune SOURCE`. Ours: no accuracy was published for a MogaNet.
    """
    return replace(
        row, name=f'{row.model}_ft384', source=f'this project, after ConvNeXt (arXiv 2201.03545); not published{note}',
        hardware='8 GPUs (not measured)', micro_batch_size=micro_batch_size, expected_acc1=None, expected_acc5=None,
        input_size=384, test_size=384, crop_pct=1.0, crop_mode='squash', epochs=30, total_batch_size=512, lr=5e-5,
        min_lr=1e-6, warmup_epochs=0, layer_decay=0.7, weight_decay=1e-8, head_init_scale=0.001, mixup=0.0, cutmix=0.0,
        drop_path=drop_path, model_ema=True, aa='rand-m9-mstd0.5-inc1')


def _cifar(classes: int, *, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Classification:
    """CIFAR-10 or 100 from scratch, at their own 32 pixels. Ours: no accuracy was published for a MogaNet.

    390 updates an epoch, over two and a half of which the average looks back. Crops keep half of the image or more.
    """
    return replace(
        _xtiny, name=f'moganet_xtiny_cifar{classes}', source='this project; not published',
        hardware='1 GPU (not measured)', micro_batch_size=128, total_batch_size=128, expected_acc1=None,
        expected_acc5=None, data_set=f'torch/cifar{classes}', mean=mean, std=std, input_size=32, test_size=32,
        crop_pct=1.0, scale=(0.5, 1.0), epochs=200, warmup_epochs=10, weight_decay=0.05, model_ema=True,
        model_ema_decay=0.999)


ROWS = (
    _xtiny, _xtiny_256, _xtiny_3aug, _tiny, _tiny_256, _tiny_3aug, _small, _base, _large, _xlarge,
    _rsb_a3(_xtiny, 72.8, micro_batch_size=256),
    _rsb_a3(_tiny, 75.4, micro_batch_size=256),
    _rsb_a3(_small, 81.1, micro_batch_size=256),
    _rsb_a3(_base, 82.2, micro_batch_size=128),
    _rsb_a3(_large, 83.2, micro_batch_size=128, drop_path=0.4, clip_grad=10.0),
    _ft384(_xtiny, 0.1, micro_batch_size=64),
    _ft384(_tiny, 0.2, micro_batch_size=64),
    _ft384(_small, 0.2, micro_batch_size=64),
    # Twice the images take 73 and 83 GiB, more than a GPU of 80 GB has beside CUDA itself (benchmarks/memory.json)
    _ft384(_base, 0.4, micro_batch_size=32, note='. Batch norm goes over 32 images, as many as fit 80 GB'),
    _ft384(_large, 0.5, micro_batch_size=32),
    _ft384(_xlarge, 0.6, micro_batch_size=16, note='. Batch norm goes over 16 images, as many as fit 80 GB'),
    # One's own folder of classes, hundreds to thousands of images, from ImageNet weights by --finetune. Small batches,
    # so that there are hundreds of updates; the first two stages, whose features are general, stay as they are; no
    # mixing, which takes longer to pay than such a run lasts; the average looks back over 100 updates
    replace(_small, name='moganet_small_transfer', source='this project; not published',
            hardware='1 GPU (not measured)', micro_batch_size=32, expected_acc1=None, expected_acc5=None, epochs=50,
            total_batch_size=32, lr=2e-4, min_lr=1e-6, warmup_epochs=2, layer_decay=0.8, mixup=0.0, cutmix=0.0,
            reprob=0.0, freeze_stages=2,
            model_ema_decay=0.99),
    # Mean and deviation of the training images' pixels
    _cifar(10, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
    _cifar(100, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762)),
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
