"""Recipes of object detection on COCO: their fields, and the rows of the authors' table."""
from dataclasses import dataclass, replace
from typing import Any, Literal

from recipes.dense import Dense
from recipes.fields import RATE, DataSet, Run, check, doc

BOXES = {
    'box_ap': ('box AP', ''), 'box_ap50': ('AP50', ''), 'box_ap75': ('AP75', ''), 'box_ap_small': ('small', ''),
    'box_ap_medium': ('medium', ''), 'box_ap_large': ('large', ''), 'box_ar1': ('AR1', ''), 'box_ar10': ('AR10', ''),
    'box_ar100': ('AR100', ''), 'box_ar_small': ('AR small', ''), 'box_ar_medium': ('AR medium', ''),
    'box_ar_large': ('AR large', '')}
MASKS = {name.replace('box', 'mask'): (f'mask {label.removeprefix("box ")}', unit)
         for name, (label, unit) in BOXES.items()}


class _Metrics:
    """The metrics of all detectors together; of a recipe, those that its network has."""

    def __get__(self, recipe: 'Detection | None', kind: type) -> dict[str, tuple[str, str]]:
        return BOXES | MASKS if recipe is None or recipe.with_masks else BOXES


@dataclass(frozen=True)
class Detection(Dense):
    """All that can change a detector's accuracy. Two runs of one recipe differ by round-off and hardware only."""

    task = 'tasks.detection:Detection'
    metrics = _Metrics()
    best = 'box_ap'
    known_classes = 80
    published_data = DataSet('COCO 2017', classes=known_classes, images=117_266, gigabytes=20.4)  # those with boxes
    descriptive = (*Dense.descriptive, 'expected_box_ap', 'expected_mask_ap')
    fixed = (*Dense.fixed, 'masks')

    expected_box_ap: float | None = doc(None, 'published AP of the boxes, in hundredths', flag=False)
    expected_mask_ap: float | None = doc(None, 'published AP of the masks, in hundredths', flag=False)

    # Model
    masks: bool = doc(True, 'train and evaluate masks beside boxes; false: boxes alone, from data without masks too')

    # Data and augmentation
    data_set: str = doc('coco', "coco: COCO's folder, or any COCO JSON; digits_coco: digits on photographs, made up")
    resize: Literal['fixed', 'multi_scale'] = doc('fixed', 'training: as for a test, or one of several sizes after a '
                                                           'random crop in every other image')
    image_scale: tuple[int, int] = doc((1333, 800), 'longest and shortest side within which an image is resized, '
                                                    'pixels')
    hflip: float = doc(0.5, 'probability of a horizontal flip', RATE)

    @property
    def knows_masks(self) -> bool:
        """Whether the network can have mask heads."""
        return 'mask' in self.network

    @property
    def with_masks(self) -> bool:
        """Whether the network has mask heads."""
        return self.masks and self.knows_masks

    def check(self) -> None:
        """Refuses values that cannot be meant. Raises UserError that names the flag."""
        super().check()
        check(self.masks or self.knows_masks, f'--masks false: {self.network} has no masks; leave it out')
        check('masks' not in self.network_kwargs, '--network_kwargs masks: say --masks false')
        check(self.data_set in ('coco', 'digits_coco'), f'--data_set {self.data_set} has no boxes; say coco (any COCO '
                                                        'JSON) or digits_coco')
        check(min(self.image_scale) > 0, f'--image_scale {self.image_scale}: give two sides above 0')

    def check_run(self, run: Run) -> None:
        """Refuses a way to run that this task cannot take. Raises UserError that names the flag."""
        super().check_run(run)
        check(run.save_predictions is None or run.eval, '--save_predictions goes with --eval')
        check(run.save_predictions is None or len(run.checkpoint) == 1,
              '--save_predictions is one file: give one --checkpoint at a time')
        check(run.eval_data_path is None, '--eval_data_path is for classification; give --val_json and --image_dir')

    def count_size(self) -> tuple[int, int]:
        """Height and width of the image for which multiply-accumulates are told: as published, 1280 x 800."""
        whole = self.image_scale == Detection.image_scale
        return (800, 1280) if whole else (min(self.image_scale), max(self.image_scale))

    def expected(self) -> dict[str, float | None]:
        """The published values of the row by metric, None where none was published."""
        return {'box_ap': self.expected_box_ap} | ({'mask_ap': self.expected_mask_ap} if self.with_masks else {})

    def arguments(self) -> dict[str, Any]:
        """The arguments of the network's constructor, beside `network_kwargs` and `model_kwargs`."""
        return super().arguments() | ({'masks': self.masks} if self.knows_masks else {})

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


_mask_rcnn = replace(_retinanet, network='mask_rcnn', lr=2e-4)
_3x: dict[str, Any] = {'resize': 'multi_scale', 'epochs': 36, 'milestones': (27, 33)}
_cascade = replace(_mask_rcnn, network='cascade_mask_rcnn', **_3x)
_giou = replace(_cascade, network='cascade_mask_rcnn_giou', warmup_steps=1000)
# The authors' levels for B and L, whose oddities optim_factory names
_layers: dict[str, Any] = {'lr': 1e-4, 'param_groups': 'authors_layers', 'layer_decay': 0.8}


def _with_masks(
    row: Detection, name: str, drop_path: float, *, ap: tuple[float, float], parameters: float, flops: float,
    **changes: Any
) -> Detection:
    """A row of a detector with masks: `ap` is of the boxes and of the masks, the name has the size."""
    size = next(part for part in name.split('_') if part in ('xtiny', 'tiny', 'small', 'base', 'large'))
    return replace(row, name=name, model=f'moganet_{size}', drop_path=drop_path, expected_box_ap=ap[0],
                   expected_mask_ap=ap[1], expected_parameters=parameters, expected_flops=flops, **changes)


ROWS = (
    _retinanet_1x('xtiny', 0.05, ap=39.7, parameters=12.1, flops=167.2),
    _retinanet_1x('tiny', 0.1, ap=41.4, parameters=14.4, flops=173.4),
    _retinanet_1x('small', 0.1, ap=45.8, parameters=35.1, flops=253.0),
    _retinanet_1x('base', 0.2, ap=47.7, parameters=53.5, flops=354.5),
    _retinanet_1x('large', 0.3, ap=48.7, parameters=92.4, flops=476.8),
    _with_masks(_mask_rcnn, 'mask_rcnn_moganet_xtiny_1x', 0.05, ap=(40.7, 37.6), parameters=22.8, flops=185.4),
    _with_masks(_mask_rcnn, 'mask_rcnn_moganet_tiny_1x', 0.1, ap=(42.6, 39.1), parameters=25.0, flops=191.7),
    _with_masks(_mask_rcnn, 'mask_rcnn_moganet_small_1x', 0.1, ap=(46.6, 42.2), parameters=45.0, flops=271.6),
    _with_masks(_mask_rcnn, 'mask_rcnn_moganet_base_1x', 0.2, ap=(49.0, 43.8), parameters=63.4, flops=373.1, lr=1e-4),
    _with_masks(_mask_rcnn, 'mask_rcnn_moganet_large_1x', 0.3, ap=(49.4, 44.2), parameters=102.1, flops=495.3,
                lr=1e-4),
    _with_masks(_mask_rcnn, 'mask_rcnn_moganet_tiny_3x', 0.1, ap=(45.3, 40.7), parameters=25.0, flops=191.7, **_3x),
    _with_masks(_mask_rcnn, 'mask_rcnn_moganet_small_3x', 0.1, ap=(48.5, 43.1), parameters=45.0, flops=271.6, **_3x),
    _with_masks(_mask_rcnn, 'mask_rcnn_moganet_base_3x', 0.3, ap=(50.3, 44.4), parameters=63.4, flops=373.1, **_3x),
    # The authors print B's parameters and FLOPs here; these are those of L's shorter row
    _with_masks(_mask_rcnn, 'mask_rcnn_moganet_large_3x', 0.3, ap=(50.6, 44.6), parameters=102.1, flops=495.3, **_3x),
    _with_masks(_cascade, 'cascade_mask_rcnn_moganet_small_3x', 0.1, ap=(51.4, 44.9), parameters=77.9, flops=405.4),
    _with_masks(_giou, 'cascade_mask_rcnn_moganet_small_giou_3x', 0.1, ap=(51.7, 45.1), parameters=82.8, flops=750.2),
    _with_masks(_giou, 'cascade_mask_rcnn_moganet_base_giou_3x', 0.2, ap=(52.6, 46.0), parameters=101.2, flops=851.6,
                **_layers),
    # The authors give no file of it
    _with_masks(_giou, 'cascade_mask_rcnn_moganet_large_giou_3x', 0.3, ap=(53.3, 46.1), parameters=139.9, flops=973.8,
                **_layers),
    # Digits of 12 to 64 pixels, which must not be mirrored: from scratch, and with anchors from 16 pixels on
    replace(_retinanet, name='retinanet_moganet_digits', source='this project (make demo-detection)',
            hardware='2 CPU cores', model='moganet_xtiny', data_set='digits_coco', image_scale=(160, 160), hflip=0.0,
            model_kwargs={'dims': [16, 32, 64, 128], 'depths': [1, 1, 3, 1], 'ffn_ratios': [4, 4, 4, 4],
                          'layer_scale_init_value': 0.1},
            network_kwargs={'channels': 64, 'depth': 2, 'anchor_scale': 2.0}, micro_batch_size=8, total_batch_size=8,
            epochs=5, drop_path=0.0, lr=1e-3, min_lr=1e-5, sched='cosine', milestones=(), warmup_steps=100,
            warmup_ratio=None, clip_grad=1.0, param_groups='ours', model_ema=True, model_ema_decay=0.995),
)
