"""The released files: where each lies, what it is, and how it reaches its published accuracy."""
from dataclasses import dataclass
from typing import Any, Literal

from models.moganet import Gate
from recipes import RECIPES, Classification

Which = Literal['raw', 'ema']

_H = 'https://github.com/Westlake-AI/MogaNet/releases/download/moganet-in1k-weights/'
_O = 'https://github.com/Westlake-AI/openmixup/releases/download/moganet-in1k-weights/'


@dataclass(frozen=True)
class Released:
    """A released ImageNet-1k checkpoint and how it reaches its published accuracy.

    Sizes and hashes are not published, so none are given; a download's own are shown and remembered.
    """
    model: str
    url: str
    format: Literal['timm', 'mmcv']
    gate: Gate
    weights: Which  # those that reach the accuracy
    test_size: int  # pixels, squares
    crop_pct: float
    acc1: float | None  # published top-1 and top-5, %; None where not published for this file
    acc5: float | None


def _released(recipe: str, url: str, gate: Gate, published: tuple[str, ...] | dict[str, float]) -> Released:
    """A file that was trained by a recipe, whose accuracies it has: those of `published`, or those given there."""
    row = RECIPES[recipe]
    assert isinstance(row, Classification)
    accuracies = published if isinstance(published, dict) else {name: row.expected()[name] for name in published}
    return Released(row.model, url, 'timm' if url.endswith('.tar') else 'mmcv', gate, 'ema' if row.model_ema else 'raw',
                    row.test_size, row.crop_pct, accuracies.get('acc1'), accuracies.get('acc5'))


def _timm(recipe: str, file: str, published: tuple[str, ...] | dict[str, float] = ('acc1', 'acc5')) -> Released:
    """A file of the authors' MogaNet repository: trained with the single gate."""
    return _released(recipe, f'{_H}{file}.pth.tar', 'single', published)


def _mmcv(recipe: str, file: str, published: tuple[str, ...] = ('acc1',), *, gate: Gate = 'double') -> Released:
    """A file of the authors' OpenMixup: trained with `attn_force_fp32`, which is the double gate."""
    return _released(recipe, f'{_O}{file}.pth', gate, published)


# Accuracies stand in the recipes: the paper's, and OpenMixup's own for 3-Augment (XT) and RSB A3. The authors'
# repository gives others than the paper for its files of B and L
RELEASED: dict[str, Released] = {
    'moganet_xtiny': _timm('moganet_xtiny', 'moganet_xtiny_sz224_8xbs128_ep300'),
    'moganet_xtiny_256': _timm('moganet_xtiny_256', 'moganet_xtiny_sz256_8xbs128_ep300'),
    'moganet_tiny': _timm('moganet_tiny', 'moganet_tiny_sz224_8xbs128_ep300'),
    'moganet_tiny_256': _timm('moganet_tiny_256', 'moganet_tiny_sz256_8xbs128_ep300'),
    'moganet_small': _timm('moganet_small', 'moganet_small_sz224_8xbs128_ep300'),
    'moganet_base': _timm('moganet_base', 'moganet_base_sz224_8xbs128_ep300', {'acc1': 84.3, 'acc5': 97.0}),
    'moganet_large': _timm('moganet_large', 'moganet_large_sz224_8xbs64_ep300', {'acc1': 84.7, 'acc5': 97.1}),
    'moganet_xlarge': _timm('moganet_xlarge', 'moganet_xlarge_sz224_8xbs64_ep300'),
    'moganet_xtiny_openmixup': _mmcv('moganet_xtiny', 'moga_xtiny_sz224_8xb128_fp16_ep300'),
    'moganet_xtiny_256_openmixup': _mmcv('moganet_xtiny_256', 'moga_xtiny_sz256_8xb128_fp16_ep300', ()),
    'moganet_xtiny_3aug_256': _mmcv('moganet_xtiny_3aug_256', 'moga_xtiny_deit3_sz256_lr2e_3_8xb128_fp16_ep300'),
    'moganet_tiny_openmixup': _mmcv('moganet_tiny', 'moga_tiny_sz224_8xb128_fp16_ep300'),
    'moganet_tiny_256_openmixup': _mmcv('moganet_tiny_256', 'moga_tiny_sz256_8xb128_fp16_ep300'),
    'moganet_tiny_3aug_256': _mmcv(
        'moganet_tiny_3aug_256', 'moga_tiny_deit3_sz256_lr2e_3_8xb128_fp16_ep300', ('acc1', 'acc5')),
    'moganet_small_openmixup': _mmcv('moganet_small', 'moga_small_ema_sz224_8xb128_ep300'),
    'moganet_small_openmixup_single': _mmcv(
        'moganet_small', 'moga_small_ema_sz224_8xb128_no_forcefp32_ep300', (), gate='single'),
    'moganet_base_openmixup': _mmcv('moganet_base', 'moga_base_ema_sz224_8xb128_ep300'),
    'moganet_large_openmixup': _mmcv('moganet_large', 'moga_large_ema_sz224_8xb64_accu2_ep300'),
    'moganet_xlarge_openmixup': _mmcv('moganet_xlarge', 'moga_xlarge_ema_sz224_8xb32_accu2_ep300', ()),
    'moganet_xtiny_rsb_a3': _mmcv('moganet_xtiny_rsb_a3', 'moga_xtiny_sz160_rsb_a3_8xb256_ep100'),
    'moganet_tiny_rsb_a3': _mmcv('moganet_tiny_rsb_a3', 'moga_tiny_sz160_rsb_a3_8xb256_ep100'),
    'moganet_small_rsb_a3': _mmcv('moganet_small_rsb_a3', 'moga_small_sz160_rsb_a3_8xb256_ep100'),
    'moganet_base_rsb_a3': _mmcv('moganet_base_rsb_a3', 'moga_base_rsb_a3_sz160_8xb128_accu2_ep100'),
    'moganet_large_rsb_a3': _mmcv('moganet_large_rsb_a3', 'moga_large_rsb_a3_sz160_8xb128_accu2_ep100'),
}


@dataclass(frozen=True)
class ReleasedDense:
    """A released file of the authors' detectors and segmentors, named as its recipe, which says what it reaches.

    Sizes and hashes are not published, so none are given; a download's own are shown and remembered.
    """
    url: str


_RELEASES = 'https://github.com/Westlake-AI/MogaNet/releases/download'
_SIZES = ('xtiny', 'tiny', 'small', 'base', 'large')

# The authors' names: sizes in full for 12 epochs, by their letters for 36
_DETECTORS = {
    **{f'retinanet_moganet_{size}_1x': f'retinanet_moganet_{size}_fpn_1x_coco' for size in _SIZES},
    **{f'mask_rcnn_moganet_{size}_1x': f'mask_rcnn_moganet_{size}_fpn_1x_coco' for size in _SIZES},
    **{f'mask_rcnn_moganet_{size}_3x': f'mask_rcnn_moganet_{size[0]}_fpn_mstrain_480-800_3x_coco'
       for size in _SIZES[1:]},
    'cascade_mask_rcnn_moganet_small_3x': 'cascade_mask_rcnn_moganet_s_fpn_ms_3x_coco',
    **{f'cascade_mask_rcnn_moganet_{size}_giou_3x': f'cascade_mask_rcnn_moganet_{size[0]}_fpn_giou_4conv1f_ms_3x_coco'
       for size in ('small', 'base')},
}
_SEGMENTORS = {
    **{f'semantic_fpn_moganet_{size}_80k': f'fpn_moganet_{size}_80k_ade20k' for size in _SIZES},
    **{f'upernet_moganet_{size}_160k': f'upernet_moganet_{size}_512x512_160k_ade20k' for size in _SIZES},
}
RELEASED_DENSE = {
    name: ReleasedDense(f'{_RELEASES}/moganet-{kind}-weights/{file}.pth')
    for kind, files in (('det', _DETECTORS), ('seg', _SEGMENTORS)) for name, file in files.items()}
# Beside the files of mmcv's programs lie their logs, by the same stem. Those of the authors' own repository are timm's
# summary.csv, under names that are not known here
LOGS = {name: row.url.removesuffix('.pth') + '.log.json' for name, row in (*RELEASED.items(), *RELEASED_DENSE.items())
        if row.url.endswith('.pth')}
RELEASED_BY_FILE = {row.url.rsplit('/', 1)[1]: name for name, row in (*RELEASED.items(), *RELEASED_DENSE.items())}


def pretrained_cfgs() -> dict[str, dict[str, Any]]:
    """timm's pretrained cfgs of the released files: `moganet_tiny.in1k`, `moganet_tiny.in1k_256`, and so on.

    The tag is what a file's name adds to its model's; a model's first is timm's default.
    """
    return {f'{row.model}.in1k{name.removeprefix(row.model)}': {
        'url': row.url, 'crop_pct': row.crop_pct, 'input_size': (3, row.test_size, row.test_size),
        'pool_size': (row.test_size // 32, row.test_size // 32),
    } for name, row in RELEASED.items()}
