"""COCO's average precision, by faster-coco-eval, whose twelve numbers are those of pycocotools."""
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as codes
from torch import Tensor

from pipeline.coco import CocoSource, run_lengths_of

# COCO's twelve numbers, in its own order
STATISTICS = ('ap', 'ap50', 'ap75', 'ap_small', 'ap_medium', 'ap_large', 'ar1', 'ar10', 'ar100', 'ar_small',
              'ar_medium', 'ar_large')
# Of a row of detections: the image's position in its source, the box in pixels, the score, the class from 0
COLUMNS = ('place', 'x', 'y', 'width', 'height', 'score', 'label')


def encode(masks: Tensor) -> list[bytes]:
    """Masks, bool [n, h, w], as the text of COCO's run lengths, without the size; a mask at a time is copied."""
    return [codes.encode(np.asfortranarray(mask.byte().cpu().numpy()))['counts'] for mask in masks]


def as_run_lengths(text: bytes, size: Sequence[int]) -> dict[str, Any]:
    """COCO's run lengths, as JSON has them, of a mask of a size (h, w)."""
    return {'size': [int(side) for side in size], 'counts': text.decode()}


def decode(masks: Sequence[dict[str, Any]]) -> Tensor:
    """Masks, bool [n, h, w], of COCO's run lengths; at least one."""
    return torch.from_numpy(codes.decode(list(masks))).permute(2, 0, 1).bool()


def truth_of(source: CocoSource, *, masks: bool) -> COCO:
    """The ground truth of a source, with positions counted from 1 for its ids: 0 is no id of an annotation to it.

    Raises:
        BadLabel: with `masks`, where an annotation has none that can be read.
    """
    images = [{'id': place, 'height': int(height), 'width': int(width)}
              for place, (height, width) in enumerate(source.sizes, start=1)]
    annotations: list[dict[str, Any]] = []
    for place in range(len(source)):
        truth = source.annotations(place)
        segments = run_lengths_of(truth.segments(), truth.size, truth.ids) if masks else [None] * len(truth.boxes)
        for box, label, crowd, area, segment in zip(truth.bbox.tolist(), truth.labels.tolist(), truth.crowd.tolist(),
                                                    truth.areas.tolist(), segments, strict=True):
            annotations.append({'id': len(annotations) + 1, 'image_id': place + 1, 'category_id': label + 1,
                                'bbox': box, 'area': area, 'iscrowd': int(crowd)}
                               | ({'segmentation': segment} if masks else {}))
    categories = [{'id': number, 'name': name} for number, name in enumerate(source.classes, start=1)]
    return COCO({'images': images, 'annotations': annotations, 'categories': categories})


def average_precision(source: CocoSource, rows: np.ndarray, masks: Sequence[bytes] | None = None
                      ) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The average precision of boxes, and of masks where there are some.

    Args:
        source: of the images, with `sizes` and `annotations(i)`: bbox [n, 4], labels, crowd, areas, and for masks
            `segments`; crowds are ignored.
        rows: what was found, float64 [n, COLUMNS], an image's in the order that decides among equal scores.
        masks: of each row, as `encode` has them. A mask is small or large by its own area, as mmdet counts, and not by
            its box's.

    Returns:
        COCO's numbers as `box_ap` and so on, with masks `mask_ap` and so on too, and for each class a row with its
        number of `boxes`, `box_ap`, `box_ap50`, `box_ap75`, and with masks the same of them: in hundredths, -1 where
        there is no such object.
    """
    truth = truth_of(source, masks=masks is not None)
    found = [{'id': number, 'image_id': int(place) + 1, 'category_id': int(label) + 1, 'bbox': box,
              'area': box[2] * box[3], 'score': score, 'iscrowd': 0}
             for number, (place, *box, score, label) in enumerate(rows.tolist(), start=1)]
    whole = [annotation['category_id'] - 1 for annotation in truth.dataset['annotations'] if not annotation['iscrowd']]
    boxes = np.bincount(whole, minlength=len(source.classes)).tolist()
    result, by_class = _judge(truth, found, 'bbox', 'box')
    if masks is not None:
        found = [note | {'segmentation': segment, 'area': float(codes.area(segment))} for note, segment in zip(
            found, (as_run_lengths(text, source.sizes[int(place)]) for text, place in zip(masks, rows[:, 0],
                                                                                         strict=True)), strict=True)]
        of_masks, mask_by_class = _judge(truth, found, 'segm', 'mask')
        result |= of_masks
        by_class = [of_box | of_mask for of_box, of_mask in zip(by_class, mask_by_class, strict=True)]
    return result, [{'class': i, 'name': name, 'boxes': boxes[i], **by_class[i]}
                    for i, name in enumerate(source.classes)]


def _judge(truth: COCO, found: list[dict[str, Any]], kind: str, name: str
           ) -> tuple[dict[str, float], list[dict[str, float]]]:
    """The twelve numbers of 'bbox' or 'segm', and three of each class, by names that begin with `name`."""
    found = COCO({'images': truth.dataset['images'], 'categories': truth.dataset['categories'], 'annotations': found})
    judge = COCOeval_faster(truth, found, kind, print_function=lambda *_: None)
    judge.run()

    def hundredths(value: float) -> float:
        return 100 * float(value) if value >= 0 else -1.0

    def mean(values: np.ndarray) -> float:
        return hundredths(values[values > -1].mean() if (values > -1).any() else -1)

    precision = judge.eval['precision'][:, :, :, 0, -1]  # by IoU, recall and class, of all sizes and 100 detections
    by_class = [{f'{name}_ap': mean(precision[:, :, i]), f'{name}_ap50': mean(precision[0, :, i]),
                 f'{name}_ap75': mean(precision[5, :, i])} for i in range(precision.shape[2])]
    return {f'{name}_{of}': hundredths(value) for of, value in zip(STATISTICS, judge.stats, strict=False)}, by_class
