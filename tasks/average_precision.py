"""COCO's average precision, by faster-coco-eval, whose twelve numbers are those of pycocotools."""
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

# COCO's twelve numbers, in its own order
STATISTICS = ('ap', 'ap50', 'ap75', 'ap_small', 'ap_medium', 'ap_large', 'ar1', 'ar10', 'ar100', 'ar_small',
              'ar_medium', 'ar_large')
# Of a row of detections: the image's position in its source, the box in pixels, the score, the class from 0
COLUMNS = ('place', 'x', 'y', 'width', 'height', 'score', 'label')


def truth_of(source: Any) -> COCO:
    """The ground truth of a source, with positions counted from 1 for its ids: 0 is no id of an annotation to it."""
    images = [{'id': place + 1} for place in range(len(source))]
    annotations = []
    for place in range(len(source)):
        truth = source.annotations(place)
        for box, label, crowd, area in zip(truth.bbox.tolist(), truth.labels.tolist(), truth.crowd.tolist(),
                                           truth.areas.tolist(), strict=True):
            annotations.append({'id': len(annotations) + 1, 'image_id': place + 1, 'category_id': label + 1,
                                'bbox': box, 'area': area, 'iscrowd': int(crowd)})
    categories = [{'id': number, 'name': name} for number, name in enumerate(source.classes, start=1)]
    return COCO({'images': images, 'annotations': annotations, 'categories': categories})


def average_precision(source: Any, rows: np.ndarray) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The average precision of boxes.

    Args:
        source: of the images, with `annotations(i)`: bbox [n, 4], labels, crowd, areas; crowds are ignored.
        rows: what was found, float64 [n, COLUMNS], an image's in the order that decides among equal scores.

    Returns:
        COCO's numbers as `box_ap` and so on, and for each class a row with its number of `boxes`, `box_ap`, `box_ap50`
        and `box_ap75`: in hundredths, -1 where there is no such object.
    """
    truth = truth_of(source)
    found = COCO({'images': truth.dataset['images'], 'categories': truth.dataset['categories'], 'annotations': [
        {'id': number, 'image_id': int(place) + 1, 'category_id': int(label) + 1, 'bbox': box, 'area': box[2] * box[3],
         'score': score, 'iscrowd': 0} for number, (place, *box, score, label) in enumerate(rows.tolist(), start=1)]})
    judge = COCOeval_faster(truth, found, 'bbox', print_function=lambda *_: None)
    judge.run()

    def hundredths(value: float) -> float:
        return 100 * float(value) if value >= 0 else -1.0

    precision = judge.eval['precision'][:, :, :, 0, -1]  # by IoU, recall and class, of all sizes and 100 detections
    whole = [annotation['category_id'] - 1 for annotation in truth.dataset['annotations'] if not annotation['iscrowd']]
    boxes = np.bincount(whole, minlength=len(source.classes))

    def mean(values: np.ndarray) -> float:
        return hundredths(values[values > -1].mean() if (values > -1).any() else -1)

    classes = [{'class': i, 'name': name, 'boxes': int(boxes[i]), 'box_ap': mean(precision[:, :, i]),
                'box_ap50': mean(precision[0, :, i]), 'box_ap75': mean(precision[5, :, i])}
               for i, name in enumerate(source.classes)]
    return {f'box_{name}': hundredths(value) for name, value in zip(STATISTICS, judge.stats, strict=False)}, classes
