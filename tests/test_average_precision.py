"""The average precision is COCO's: equal to pycocotools and to the figures recorded with it."""
import contextlib
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import reference
from pipeline import coco, digits_coco
from pipeline.coco import CocoSource
from tasks.average_precision import STATISTICS, average_precision, encode

RECORDED = json.loads(gzip.decompress((reference.DATA / 'dense' / 'resize_metrics.json.gz').read_bytes()))['coco']


def open_source(folder: Path, truth: dict) -> CocoSource:
    """A source of a ground truth, with images of one pixel's content."""
    for image in truth['images']:
        image.setdefault('file_name', f'{image["id"]}.png')
        Image.new('RGB', (image['width'], image['height'])).save(folder / image['file_name'])
    (folder / 'truth.json').write_text(json.dumps(truth))
    return CocoSource(folder / 'truth.json', folder, training=False)


def to_rows(source: CocoSource, detections: list[dict]) -> np.ndarray:
    place, label = ({int(number): i for i, number in enumerate(numbers)} for numbers in (
        source.ids, source.category_ids))
    return np.array([[place[found['image_id']], *found['bbox'], found['score'], label[found['category_id']]]
                     for found in detections]).reshape(-1, 7)


def of_pycocotools(truth: dict, detections: list[dict], kind: str = 'bbox') -> list[float]:
    with contextlib.redirect_stdout(io.StringIO()):
        judged = COCO()
        judged.dataset = json.loads(json.dumps(truth))
        judged.createIndex()
        judge = COCOeval(judged, judged.loadRes(json.loads(json.dumps(detections))), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge.stats.tolist()


def hundredths(values: list[float]) -> list[float]:
    return [100 * value if value >= 0 else -1 for value in values]


def test_all_twelve_numbers_and_those_by_class_equal_the_recorded_ones(tmp_path, own_cache):
    source = open_source(tmp_path, RECORDED['ground_truth'])
    values, classes = average_precision(source, to_rows(source, RECORDED['detections']))
    assert list(values) == [f'box_{name}' for name in STATISTICS]
    # Sums of at most 10 x 101 x classes numbers in another order
    assert list(values.values()) == pytest.approx(hundredths(RECORDED['bbox']), abs=1e-10)
    recorded = RECORDED['per_category_bbox']
    assert len(classes) == len(source.category_ids) >= 5
    for number, entry in zip(source.category_ids, classes, strict=True):
        if str(number) in recorded:
            assert entry['box_ap'] == pytest.approx(hundredths([recorded[str(number)] or -1])[0], abs=1e-10)
    boxes = [note['category_id'] for note in RECORDED['ground_truth']['annotations'] if not note.get('iscrowd')]
    assert [entry['boxes'] for entry in classes] == [boxes.count(n) for n in source.category_ids]


@pytest.mark.parametrize('seed', range(3))
def test_all_twelve_numbers_equal_pycocotools_on_many_boxes_with_crowds_and_equal_scores(seed, tmp_path, own_cache):
    rng = np.random.default_rng(seed)
    truth = {'images': [{'id': 7 * i + 3, 'width': 300, 'height': 200} for i in range(30)], 'annotations': [],
             'categories': [{'id': number, 'name': f'class {number}'} for number in (2, 3, 17, 90)]}
    detections = []
    for image in truth['images'][:-2]:  # two without a box, of which one has detections all the same
        for _ in range(rng.integers(0, 12)):
            x, y, w, h = (rng.random(4) * (200, 120, 100, 80) + (0, 0, 2, 2)).round(2).tolist()
            number = int(rng.choice([2, 3, 17]))  # nothing is a 90
            truth['annotations'].append({
                'id': len(truth['annotations']), 'image_id': image['id'], 'category_id': number,
                'bbox': [x, y, w, h], 'area': round(w * h * rng.uniform(0.5, 1), 2),
                'iscrowd': int(rng.random() < 0.1)})
            for _ in range(rng.integers(0, 4)):
                jitter = (np.array([x, y, w, h]) + rng.normal(0, 4, 4)).clip(1).tolist()
                detections.append({'image_id': image['id'], 'category_id': int(rng.choice([number, number, 90])),
                                   'bbox': jitter, 'score': float(rng.integers(1, 20) / 20)})
    detections.append({'image_id': truth['images'][-1]['id'], 'category_id': 2, 'bbox': [1, 1, 5, 5], 'score': 0.9})
    source = open_source(tmp_path, truth)
    for note in truth['annotations']:
        note['id'] += 1  # pycocotools takes an annotation with the id 0 for none
    values, _ = average_precision(source, to_rows(source, detections))
    assert list(values.values()) == pytest.approx(hundredths(of_pycocotools(truth, detections)), abs=1e-10)
    assert 0 < values['box_ap'] < values['box_ap50']


def test_the_numbers_of_masks_equal_the_recorded_ones_with_areas_of_their_own(tmp_path, own_cache):
    source = open_source(tmp_path, RECORDED['ground_truth'])
    texts = [found['segmentation']['counts'].encode() for found in RECORDED['detections']]
    values, classes = average_precision(source, to_rows(source, RECORDED['detections']), texts)
    assert list(values) == [f'{of}_{name}' for of in ('box', 'mask') for name in STATISTICS]
    boxes, masks = (list(values.values())[part] for part in (slice(12), slice(12, None)))
    assert boxes == pytest.approx(hundredths(RECORDED['bbox']), abs=1e-10)
    assert masks == pytest.approx(hundredths(RECORDED['segm']), abs=1e-10)
    # By the areas of boxes, which pycocotools takes where results have boxes, two numbers would differ
    assert sum(a != b for a, b in zip(RECORDED['segm'], RECORDED['segm_with_bbox_kept'], strict=True)) == 2
    for number, entry in zip(source.category_ids, classes, strict=True):
        if str(number) in RECORDED['per_category_segm']:
            expected = hundredths([RECORDED['per_category_segm'][str(number)] or -1])[0]
            assert entry['mask_ap'] == pytest.approx(expected, abs=1e-10)
        assert list(entry)[3:] == ['box_ap', 'box_ap50', 'box_ap75', 'mask_ap', 'mask_ap50', 'mask_ap75']


@pytest.mark.parametrize('seed', range(2))
def test_the_numbers_of_masks_equal_pycocotools_on_masks_in_all_forms_with_crowds_and_empty_ones(
        seed, tmp_path, own_cache):
    digits_coco.write(tmp_path, train=1, val=12, seed=seed)
    path = tmp_path / 'annotations' / 'instances_val2017.json'
    truth, rng = json.loads(path.read_text()), np.random.default_rng(seed)
    segments = [note['segmentation'] for note in truth['annotations']]
    assert len({isinstance(one, list) or type(one['counts']) for one in segments}) == 3  # polygons, lengths, text
    source = CocoSource(path, tmp_path / 'val2017', training=False)
    detections, texts = [], []
    for place in range(len(source)):
        notes = source.annotations(place)
        for mask, label in zip(coco.rasterise(notes.segments(), notes.size, notes.ids), notes.labels, strict=True):
            shifted = torch.from_numpy(np.roll(mask, rng.integers(-3, 4, 2), (0, 1)))[None]
            text, = encode(shifted * int(rng.random() > 0.1))  # some are empty
            texts.append(text)
            detections.append({'image_id': int(source.ids[place]), 'category_id': source.category_ids[label],
                               'score': float(rng.integers(1, 20) / 20),
                               'segmentation': {'size': list(notes.size), 'counts': text.decode()}})
    rows = to_rows(source, [found | {'bbox': [0, 0, 1, 1]} for found in detections])
    values, _ = average_precision(source, rows, texts)
    expected = hundredths(of_pycocotools(truth, detections, 'segm'))
    assert list(values.values())[12:] == pytest.approx(expected, abs=1e-10) and 5 < values['mask_ap'] < 95


def test_without_a_detection_all_is_0_and_without_an_object_of_a_size_it_is_as_coco_has_it(tmp_path, own_cache):
    truth = {'images': [{'id': 1, 'width': 50, 'height': 50}], 'categories': [{'id': 4, 'name': 'a'}], 'annotations': [
        {'id': 1, 'image_id': 1, 'category_id': 4, 'bbox': [2, 2, 20, 20], 'area': 400, 'iscrowd': 0}]}
    values, classes = average_precision(open_source(tmp_path, truth), np.zeros((0, 7)))
    assert values['box_ap'] == values['box_ap_small'] == values['box_ar100'] == 0 and values['box_ap_large'] == -1
    assert classes == [{'class': 0, 'name': 'a', 'boxes': 1, 'box_ap': 0, 'box_ap50': 0, 'box_ap75': 0}]
