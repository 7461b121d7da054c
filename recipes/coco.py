"""Recipes of object detection on COCO: their fields, and the rows of the authors' table."""
from dataclasses import dataclass, replace
from typing import Literal

from recipes.dense import Dense
from recipes.fields import RATE, Run, check, doc


@dataclass(frozen=True)
class Detection(Dense):
    """All that can change a detector's accuracy. Two runs of one recipe differ by round-off and hardware only."""

    task = 'tasks.detection:Detection'
    metrics = {  # noqa: RUF012
        'box_ap': ('box AP', ''), 'box_ap50': ('AP50', ''), 'box_ap75': ('AP75', ''), 'box_ap_small': ('small', ''),
        'box_ap_medium': ('medium', ''), 'box_ap_large': ('large', ''), 'box_ar1': ('AR1', ''),
        'box_ar10': ('AR10', ''), 'box_ar100': ('AR100', ''), 'box_ar_small': ('AR small', ''),
        'box_ar_medium': ('AR medium', ''), 'box_ar_large': ('AR large', '')}
    best = 'box_ap'
    known_classes = 80
    descriptive = (*Dense.descriptive, 'expected_box_ap')

    expected_box_ap: float | None = doc(None, 'published AP of the boxes, in hundredths', flag=False)

    # Data and augmentation
    data_set: str = doc('coco', "coco: COCO's folder, or any COCO JSON; digits_coco: digits on photographs, made up")
    resize: Literal['fixed', 'multi_scale'] = doc('fixed', 'training: as for a test, or one of several sizes after a '
                                                           'random crop in every other image')
    image_scale: tuple[int, int] = doc((1333, 800), 'longest and shortest side within which an image is resized, '
                                                    'pixels')
    hflip: float = doc(0.5, 'probability of a horizontal flip', RATE)

    def check(self) -> None:
        """Refuses values that cannot be meant. Raises UserError that names the flag."""
        super().check()
        check(self.data_set in ('coco', 'digits_coco'), f'--data_set {self.data_set} has no boxes; say coco (any COCO '
                                                        'JSON) or digits_coco')
        check(min(self.image_scale) > 0, f'--image_scale {self.image_scale}: give two sides above 0')

    def check_run(self, run: Run) -> None:
        """Refuses a way to run that this task cannot take. Raises UserError that names the flag."""
        super().check_run(run)
        check(run.save_predictions is None or run.eval, '--save_predictions goes with --eval')
        check(run.eval_data_path is None, '--eval_data_path is for classification; give --val_json and --image_dir')

    def count_size(self) -> tuple[int, int]:
        """Height and width of the image for which multiply-accumulates are told: as published, 1280 x 800."""
        whole = self.image_scale == Detection.image_scale
        return (800, 1280) if whole else (min(self.image_scale), max(self.image_scale))

    def expected(self) -> dict[str, float | None]:
        """The published values of the row by metric, None where none was published."""
        return {'box_ap': self.expected_box_ap}

    def settings(self) -> dict[str, object]:
        """How the model and its images are prepared for a test, as eval.json holds it."""
        return {'gate': self.arguments().get('gate'), 'image_scale': list(self.image_scale)}


# ---- The rows -------------------------------------------------------------------------------------------------------

# Micro-batches of 2: the batch norms see 2 images, and a loss is divided by the positive anchors of 2
_retinanet = Detection(
    source="authors' repository, detection", network='retinanet', hardware='8 GPUs', micro_batch_size=2,
    total_batch_size=16, epochs=12, lr=1e-4, min_lr=0.0, sched='step', milestones=(8, 11), warmup_epochs=0,
    warmup_steps=500, warmup_ratio=0.001, weight_decay=0.05, param_groups='authors', model_ema=False)


def _retinanet_1x(size: str, drop_path: float, *, ap: float, parameters: float, flops: float) -> Detection:
    """A row of RetinaNet, 12 epochs."""
    return replace(_retinanet, name=f'retinanet_moganet_{size}_1x', model=f'moganet_{size}', drop_path=drop_path,
                   expected_box_ap=ap, expected_parameters=parameters, expected_flops=flops)


ROWS = (
    _retinanet_1x('xtiny', 0.05, ap=39.7, parameters=12.1, flops=167.2),
    _retinanet_1x('tiny', 0.1, ap=41.4, parameters=14.4, flops=173.4),
    _retinanet_1x('small', 0.1, ap=45.8, parameters=35.1, flops=253.0),
    _retinanet_1x('base', 0.2, ap=47.7, parameters=53.5, flops=354.5),
    _retinanet_1x('large', 0.3, ap=48.7, parameters=92.4, flops=476.8),
    # Digits of 12 to 64 pixels, which must not be mirrored: from scratch, and with anchors from 16 pixels on
    replace(_retinanet, name='retinanet_moganet_digits', source='this project (make demo-detection)',
            hardware='2 CPU cores', model='moganet_xtiny', data_set='digits_coco', image_scale=(160, 160), hflip=0.0,
            model_kwargs={'dims': [16, 32, 64, 128], 'depths': [1, 1, 3, 1], 'ffn_ratios': [4, 4, 4, 4],
                          'layer_scale_init_value': 0.1},
            network_kwargs={'channels': 64, 'depth': 2, 'anchor_scale': 2.0}, micro_batch_size=8, total_batch_size=8,
            epochs=24, drop_path=0.0, lr=1e-3, min_lr=1e-5, sched='cosine', milestones=(), warmup_steps=100,
            warmup_ratio=None, clip_grad=1.0, param_groups='ours', model_ema=True, model_ema_decay=0.995),
)
