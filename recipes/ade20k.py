"""Recipes of semantic segmentation on ADE20K: their fields, and the rows of the authors' table."""
from dataclasses import dataclass, replace
from typing import Literal

from recipes.dense import Dense
from recipes.fields import COUNT, NOT_NEGATIVE, POSITIVE, RATE, Bound, DataSet, Run, check, doc

DATA_SETS = ('ade20k', 'digits_ade')


@dataclass(frozen=True)
class Segmentation(Dense):
    """All that can change a segmentor's accuracy. Two runs of one recipe differ by round-off and hardware only."""

    task = 'tasks.segmentation:Segmentation'
    metrics = {  # noqa: RUF012
        'miou': ('mIoU', ' %'), 'macc': ('mAcc', ' %'), 'pixel_acc': ('pixel accuracy', ' %')}
    best = 'miou'
    known_classes = 150
    published_data = DataSet('ADE20K', classes=known_classes, images=20_210, gigabytes=1)
    descriptive = (*Dense.descriptive, 'expected_miou', 'expected_macc')

    expected_miou: float | None = doc(None, 'published mean IoU, %', flag=False)
    expected_macc: float | None = doc(None, 'published mean accuracy of the classes, %', flag=False)

    # Data and augmentation
    data_set: str = doc('ade20k', "ade20k: ADE20K's folder, or one's own with images/ and labels/; digits_ade: digits "
                                  'on photographs, made up')
    ignore_label: int | None = doc(None, 'number in the label pictures that counts for nothing, beside 255',
                                   NOT_NEGATIVE, Bound(lambda value: value < 2**16, ' {value}: give at most 65535'))
    reduce_zero_label: bool | None = doc(None, 'labels: 0 counts for nothing and the classes count from 1; so by '
                                               "default in ADE20K's annotations/, not in labels/")
    image_scale: tuple[int, int] = doc((2048, 512), 'longest and shortest side within which an image is resized, '
                                                    'pixels')
    scale_range: tuple[float, float] = doc((0.5, 2.0), 'training: smallest and largest factor of --image_scale')
    crop_size: int = doc(512, 'training: side of the crop, pixels', COUNT)
    max_class_share: float = doc(0.75, 'training: a crop with more of one class than this share is drawn anew, up to '
                                       '10 times', RATE, POSITIVE)
    hflip: float = doc(0.5, 'probability of a horizontal flip', RATE)
    photometric: float = doc(0.5, 'training: probability of each part of the distortion of colours: brightness, '
                                  'contrast, saturation and hue', RATE)

    # Test
    align_resize: bool = doc(True, "test: resize once more, up to multiples of 32 (the authors' AlignResize)")
    test_mode: Literal['whole', 'slide'] = doc('whole', 'test: the image at once, or windows of --crop_size that '
                                                        'overlap by a third')
    test_flip: bool = doc(False, 'test: average with the mirrored image')
    test_scales: tuple[float, ...] = doc((1.0,), 'test: average over the image at these factors of --image_scale')

    def check(self) -> None:
        """Refuses values that cannot be meant. Raises UserError that names the flag."""
        super().check()
        check(self.data_set in DATA_SETS, f'--data_set {self.data_set} has no label pictures; say ade20k (any folder '
                                          'with images and labels) or digits_ade')
        check(min(self.image_scale) > 0, f'--image_scale {self.image_scale}: give two sides above 0')
        check(len(self.scale_range) == 2 and 0 < self.scale_range[0] <= self.scale_range[1],
              f'--scale_range {self.scale_range}: give the smallest and the largest factor, above 0')
        check(bool(self.test_scales) and min(self.test_scales) > 0, f'--test_scales {self.test_scales}: give factors '
                                                                    'above 0')

    def check_run(self, run: Run) -> None:
        """Refuses a way to run that this task cannot take. Raises UserError that names the flag."""
        super().check_run(run)
        for name in ('train_json', 'val_json', 'image_dir', 'save_predictions'):
            check(getattr(run, name) is None, f'--{name} is for detectors, and {self.name} is no detector; leave it '
                                              'out')
        check(run.val_batch_size in (None, 1), f'--val_batch_size {run.val_batch_size}: images to segment are '
                                               'evaluated one at a time; leave it out')

    def count_size(self) -> tuple[int, int]:
        """Height and width of the image for which multiply-accumulates are told: as published, 2048 x 512."""
        return min(self.image_scale), max(self.image_scale)

    def expected(self) -> dict[str, float | None]:
        """The published values of the row by metric, None where none was published."""
        return {'miou': self.expected_miou, 'macc': self.expected_macc}

    def settings(self) -> dict[str, object]:
        """How the model and its images are prepared for a test, as eval.json holds it."""
        return {'gate': self.arguments().get('gate'), 'image_scale': list(self.image_scale),
                'align_resize': self.align_resize, 'test_mode': self.test_mode, 'test_flip': self.test_flip,
                'test_scales': list(self.test_scales)}


# ---- The rows -------------------------------------------------------------------------------------------------------

# The configurations ask for synchronised batch norms everywhere. The heads have them; the authors' backbone does not
# take the setting and has plain ones, over the 2 or 4 images of a GPU
_NORMS = 'plain batch norms in the backbone, those over all GPUs in the heads'
_semantic_fpn = Segmentation(
    source=f"authors' repository, segmentation; {_NORMS}", network='semantic_fpn', hardware='8 GPUs',
    micro_batch_size=4, total_batch_size=32, epochs=None, updates=80_000, lr=2e-4, min_lr=0.0, sched='poly', power=0.9,
    warmup_epochs=0, weight_decay=1e-4, param_groups='all', model_ema=False)
_upernet = replace(_semantic_fpn, network='upernet', micro_batch_size=2, total_batch_size=16, updates=160_000, lr=1e-4,
                   power=1.0, warmup_steps=1500, warmup_ratio=1e-6, weight_decay=0.01, param_groups='authors')


def _rows(row: Segmentation, suffix: str, *published: tuple[float, float, float, float]) -> list[Segmentation]:
    """The rows of XT to L with the published mIoU, mAcc, parameters (millions) and multiply-accumulates (billions)."""
    sizes = zip(('xtiny', 'tiny', 'small', 'base', 'large'), (0.05, 0.1, 0.1, 0.2, 0.3), published, strict=True)
    return [replace(row, name=f'{row.network}_moganet_{size}_{suffix}', model=f'moganet_{size}', drop_path=drop_path,
                    expected_miou=miou, expected_macc=macc, expected_parameters=parameters, expected_flops=flops)
            for size, drop_path, (miou, macc, parameters, flops) in sizes]


ROWS = (
    *_rows(_semantic_fpn, '80k', (40.3, 52.4, 6.9, 101.4), (43.1, 55.4, 9.1, 107.8), (47.7, 59.8, 29.1, 189.7),
           (49.3, 61.6, 47.5, 293.6), (50.2, 63.0, 86.2, 418.7)),
    *_rows(_upernet, '160k', (42.2, 55.1, 30.4, 855.7), (43.7, 57.1, 33.1, 862.4), (49.2, 61.6, 55.3, 946.4),
           (50.1, 63.4, 73.7, 1050.4), (50.9, 63.5, 113.2, 1176.1)),
    replace(_upernet, name='upernet_moganet_xlarge_160k', model='moganet_xlarge', drop_path=0.4, expected_miou=54.0,
            source=f"authors' repository, segmentation, which has a configuration alone: no file and no log are "
                   f"released; the mIoU is the paper's, from weights of ImageNet-21K; {_NORMS}"),
    # Digits of 16 to 64 pixels on images of 128 to 160, which must not be mirrored: crops that hold the largest, and
    # at least a tenth of digits
    replace(_semantic_fpn, name='semantic_fpn_moganet_digits', source='this project (make demo-segmentation)',
            hardware='2 CPU cores', model='moganet_xtiny', data_set='digits_ade', image_scale=(160, 160),
            scale_range=(1.0, 1.0), crop_size=96, max_class_share=0.9, hflip=0.0,
            model_kwargs={'dims': [16, 32, 64, 128], 'depths': [1, 1, 2, 1], 'ffn_ratios': [4, 4, 4, 4],
                          'layer_scale_init_value': 0.1},
            network_kwargs={'channels': 32, 'head_channels': 32, 'dropout': 0.0, 'classifier_std': 0.2},
            micro_batch_size=16, total_batch_size=16, epochs=12, updates=None, drop_path=0.0, lr=6e-3,
            weight_decay=0.05, param_groups='ours', warmup_steps=100, clip_grad=1.0, model_ema=True,
            model_ema_decay=0.995),
)
