"""COCO's data: anyone's JSON read into arrays, what is wrong in it, transforms with boxes, batches of one shape."""
import copy
import io
import json
import pickle
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import dense_reference
import tasks
from builders import COCO_SIZES, coco_data, differences, encoded, open_loaders, write_coco
from pipeline import coco, dense, digits_coco
from pipeline.augmentation import BadImage, refusing_bad_images
from pipeline.coco import CocoSource, Transform, find_json
from pipeline.labels import BadLabel
from pipeline.loaders import TrainLoader, ValLoader
from recipes import RECIPES, Recipe, Run
from tools import check_dataset
from utils import UserError

pytestmark = pytest.mark.usefixtures('own_cache')

FIGURES = dense_reference.load('resize_metrics')
def source(root: Path, data: Any = None, *, split: str = 'train', **options: Any) -> CocoSource:
    write_coco(root, coco_data() if data is None else data, split=split, **options)
    return CocoSource(*find_json(root, split), training=split == 'train')


# ---- Reading --------------------------------------------------------------------------------------------------------

def test_training_takes_what_the_authors_take_and_an_evaluation_all(tmp_path):
    train, val = source(tmp_path), source(tmp_path, split='val')
    assert train.classes == ['cat', 'dog', 'none yet'] and train.category_ids == [3, 7, 90]
    assert train.ids.tolist() == [105, 110, 115, 125, 130, 135]  # 0, 4 and 8 have no boxes
    assert val.ids.tolist() == list(range(100, 145, 5))
    assert train.groups.tolist() == [0, 0, 1, 0, 1, 0]  # a square counts as high, as by the authors
    image, notes = train.read(2)
    assert image == (tmp_path / 'train2017' / '3.jpg').read_bytes() and train.name(2).endswith('train2017/3.jpg')
    assert notes.boxes.tolist() == [[2.5, 3, 22.5, 18.5], [3.5, 3, 23.5, 18.5]] and notes.boxes.dtype == np.float32
    assert notes.labels.tolist() == [0, 1] and notes.size == (40, 64) and notes.image_id == 115
    assert val.annotations(3).crowd.tolist() == [False, False, True] and not notes.crowd.any()
    assert val.annotations(3).ids.tolist() == [1009, 1012, 1015] and val.annotations(3).areas.tolist() == [200.25] * 3
    assert val.annotations(0).boxes.shape == (0, 4)
    assert val.annotations(3).segments() == [[[2.5, 3, 22.5, 3, 22.5, 18.5 + box]] for box in range(3)]
    assert train.dropped == {'crowds': 1, 'boxes outside their image or below a pixel': 0, 'images without boxes': 3,
                             'images below 32 pixels': 0}
    assert train.counts.tolist() == [7, 4, 0]


def test_a_json_is_read_once_and_again_when_it_changed(tmp_path, monkeypatch):
    scans, scan = [], coco.scan
    monkeypatch.setattr(coco, 'scan', lambda *args: scans.append(args) or scan(*args))
    first = source(tmp_path)
    again = CocoSource(first.json, first.folder, training=True)
    assert len(scans) == 1 and again.read(1)[1].boxes.tolist() == first.read(1)[1].boxes.tolist()
    data = coco_data()
    data['categories'][0]['name'] = 'wolf'
    assert source(tmp_path, data).classes == ['cat', 'wolf', 'none yet'] and len(scans) == 2
    other = tmp_path / 'elsewhere'
    (tmp_path / 'train2017').rename(other)
    assert CocoSource(first.json, other, training=True).name(0) == f'{other}/1.jpg' and len(scans) == 3


def test_a_spawned_worker_maps_the_arrays_again(tmp_path):
    made = source(tmp_path)
    made = CocoSource(made.json, made.folder, training=True)  # from the cache
    state = pickle.dumps(made)
    assert b'.npy' in state and pickle.loads(state).read(2)[1].boxes.tolist() == made.read(2)[1].boxes.tolist()


def test_an_evaluation_needs_no_box(tmp_path):
    data = coco_data()
    data['annotations'] = []
    val = source(tmp_path, data, split='val')
    assert len(val) == 9 and val.read(4)[1].boxes.shape == (0, 4) and val.read(4)[1].segments() == []


def test_the_labels_follow_another_order_of_the_names(tmp_path):
    made = source(tmp_path)
    made.relabel(['none yet', 'dog', 'bird', 'cat'])
    assert made.read(2)[1].labels.tolist() == [3, 1] and made.counts.tolist() == [0, 4, 0, 7]


def test_exports_of_other_programs_are_read(tmp_path):
    """Roboflow's folder, names and placeholder; ids as text and from 0; what may be missing; names with folders."""
    folder = tmp_path / 'train'
    (folder / 'a b').mkdir(parents=True)
    for name in ('a b/ä.png', 'c.png'):
        Image.new('RGB', (50, 40)).save(folder / name)
    (folder / '_annotations.coco.json').write_text('\ufeff' + json.dumps({
        'annotations': [{'id': '0', 'image_id': '0', 'category_id': 2.0, 'bbox': ['1', '2', '10', '20']},
                        {'id': 1, 'image_id': 0, 'category_id': 1, 'bbox': [1, 2, 3, 4], 'area': None,
                         'segmentation': []}],
        'images': [{'id': 0, 'file_name': 'a b\\ä.png', 'height': 40, 'width': 50},
                   {'id': 1, 'file_name': 'c.png', 'height': None}],
        'categories': [{'id': 0, 'name': 'pets', 'supercategory': 'none'},
                       {'id': 1, 'name': 'dög', 'supercategory': 'pets'},
                       {'id': 2, 'name': 'cat', 'supercategory': 'pets'}]}, ensure_ascii=False), encoding='utf-8')
    made = CocoSource(*find_json(tmp_path, 'train'), training=False)
    assert made.classes == ['dög', 'cat'] and made.name(0).endswith('train/a b/ä.png')
    notes = made.read(0)[1]
    assert notes.labels.tolist() == [1, 0] and notes.areas.tolist() == [200, 12] and not notes.crowd.any()
    assert notes.segments() == [None, None]
    assert made.sizes.tolist() == [[40, 50], [40, 50]]  # the second by its file


def test_the_json_and_the_images_are_where_the_flags_say(tmp_path):
    path = write_coco(tmp_path / 'coco', coco_data())
    recipe = RECIPES['retinanet_moganet_tiny_1x']

    def opened(**flags: str) -> CocoSource:
        return coco.open_coco(recipe, Run(**flags), 'train')

    assert opened(data_path=str(tmp_path / 'coco')).folder == tmp_path / 'coco' / 'train2017'
    elsewhere = path.rename(tmp_path / 'mine.json')
    made = opened(train_json=str(elsewhere), image_dir=str(tmp_path / 'coco' / 'train2017'))
    assert len(made) == 6 and made.json == elsewhere
    beside = elsewhere.rename(tmp_path / 'coco' / 'train2017' / 'mine.json')
    assert opened(train_json=str(beside)).folder == beside.parent
    with pytest.raises(UserError, match=r'has none of annotations/instances_train2017.json, .*--train_json'):
        opened(data_path=str(tmp_path / 'coco'))
    with pytest.raises(UserError, match='is no folder; give --data_path the folder with train2017/'):
        opened(data_path=str(tmp_path / 'nowhere'))


@pytest.mark.parametrize('form', [{}, {'indent': 1}, {'separators': (',', ':')}])
def test_a_json_in_any_layout_is_walked_as_the_parser_reads_it(form):
    data = {'a': [], 'images': [{'id': 1, 'x': '}],"'}, {'id': 2}], 'b': {'images': [3]}, 'c': [[1], 2],
            'categories': []}
    text, found = json.dumps(data, **form), []
    keys = coco.walk(text, {name: lambda value, start, end: found.append((value, json.loads(text[start:end])))
                            for name in ('images', 'categories')})
    assert keys == set(data) and found == [(image, image) for image in data['images']]
    assert coco.walk(' { } ', {}) == set()


# ---- What is wrong in a file ----------------------------------------------------------------------------------------

def changed(change: Any) -> dict[str, Any]:
    """The data set after a change."""
    data = copy.deepcopy(coco_data())
    change(data)
    return data


def set_note(**values: Any) -> Any:
    return lambda data: data['annotations'][1].update(values)


def as_corners(data: dict[str, Any]) -> None:
    """Boxes all over the images, as x1, y1, x2, y2: three of four would overflow as x, y, width, height."""
    rng = np.random.default_rng(0)
    for note in data['annotations']:
        size = next((image['width'], image['height']) for image in data['images'] if image['id'] == note['image_id'])
        corner = rng.uniform(0, 0.8, 2) * size
        note['bbox'] = [*corner, *(corner + rng.uniform(0.1, 0.2, 2) * size)]


REFUSED = {
    'cut off': (lambda: json.dumps(coco_data())[:-200], r'is cut off, damaged or no COCO JSON \(.*char \d+\)\); copy'),
    'more behind': (lambda: json.dumps(coco_data()) + '{}', 'is cut off, damaged or no COCO JSON .Extra data'),
    'no list': (lambda: json.dumps(coco_data() | {'images': {'1': 2}}), 'Expecting a list of images'),
    'results': (lambda: json.dumps([{'image_id': 1, 'bbox': [1, 2, 3, 4], 'score': 0.5}]), 'is a list, as results are'),
    'LabelMe': (lambda: json.dumps({'shapes': [], 'imagePath': 'a.jpg'}), 'LabelMe.s file of one image'),
    'no categories': (lambda: json.dumps({'images': [], 'annotations': []}), 'has no "categories" and is no COCO'),
    'no object': (lambda: json.dumps(coco_data() | {'images': ['0.jpg']}), '"images" holds .*0.jpg.* where COCO has'),
    'no images': (lambda: changed(lambda data: data['images'].clear()), 'has no images'),
    'no names': (lambda: changed(lambda data: data['images'][2].pop('file_name')), 'image 110 has no file_name'),
    'image ids': (lambda: changed(lambda data: data['images'][2].update(id='a7')), "2.jpg has the id 'a7'"),
    'image ids twice': (lambda: changed(lambda data: data['images'][2].update(id=100)),
                        '1 image ids stand there twice, 100 for example'),
    'sizes': (lambda: changed(lambda data: data['images'][2].update(width=0)), 'image 110, 2.jpg, is 0 x 48 pixels'),
    'annotation ids': (lambda: changed(set_note(id=1000)), '1 annotation ids stand there twice, 1000 for example'),
    'no annotation id': (lambda: changed(lambda data: data['annotations'][1].pop('id')),
                         'annotation None has the image_id 110'),
    'unknown image': (lambda: changed(set_note(image_id=4)), r'annotation 1003 is of image 4, which .* \(1 such\)'),
    'unknown category': (lambda: changed(set_note(category_id=4)), 'annotation 1003 is of category 4, which'),
    'no box': (lambda: changed(lambda data: data['annotations'][1].pop('bbox')),
               'annotation 1003 of image 110 has the bbox None'),
    'five numbers': (lambda: changed(set_note(bbox=[1, 2, 3, 4, 5])), 'annotation 1003 .*bbox .1, 2, 3, 4, 5.'),
    'no end': (lambda: changed(set_note(image_id=float('inf'))), 'annotation 1003 has the image_id inf'),
    'huge': (lambda: changed(set_note(bbox=[1, 2, 10**400, 4])), 'annotation 1003 of image 110 has the bbox'),
    'no file can': (lambda: changed(lambda data: data['images'][2].update(file_name='a\0/\ud800.jpg')), 'are not in'),
    'no number': (lambda: changed(set_note(bbox=[1, 2, 'NaN', 4])), 'annotation 1003 of image 110 has the bbox'),
    'corners': (lambda: changed(as_corners), '% of the boxes leave their image as x, y, width, height, .*annotation 1'),
    'shares': (lambda: changed(lambda data: [note.update(bbox=[0.1, 0.2, 0.3, 0.4]) for note in data['annotations']]),
               'all boxes are shares of the image .annotation 1000'),
    'category ids twice': (lambda: changed(lambda data: data['categories'][0].update(id=3)),
                           'two categories have the id 3'),
    'names twice': (lambda: changed(lambda data: data['categories'][0].update(name='cat')),
                    "two categories have the name 'cat'"),
    'no name': (lambda: changed(lambda data: data['categories'][0].pop('name')), 'a category has the id 7 and the n'),
    'nothing to learn': (lambda: changed(lambda data: [note.update(iscrowd=1) for note in data['annotations']]),
                         'none of its 9 images has a box to train on'),
}


@pytest.mark.parametrize('fault', REFUSED)
def test_a_fault_of_a_file_is_refused_with_its_place(tmp_path, fault):
    make, message = REFUSED[fault]
    with pytest.raises(UserError, match=message) as refused:
        source(tmp_path, make())
    line = str(refused.value)
    assert line.startswith(str(tmp_path / 'annotations' / 'instances_train2017.json')) and '\n' not in line


def test_missing_images_are_told_with_the_flag_that_names_their_folder(tmp_path):
    with pytest.raises(UserError, match=r'1 of its 9 images are not in .*2.jpg, image 110, .*--image_dir'):
        source(tmp_path, missing=2)
    source(tmp_path)  # a refused file is not kept in the cache


def test_boxes_that_teach_nothing_are_dropped_from_the_training_and_kept_for_the_evaluation(tmp_path):
    data = coco_data()
    bad = [[70, 1, 5, 5], [-20, 1, 15, 10], [2, 2, 0.5, 30], [2, 2, 30, 0], [5, 5, -3, 9]]
    for number, box in enumerate(bad):
        data['annotations'].append({'id': number, 'image_id': 130, 'category_id': 3, 'bbox': box, 'area': 9})
    data['annotations'] += [
        {'id': 50, 'image_id': 130, 'category_id': 3, 'bbox': [1, 1, 9, 9], 'area': 0},
        {'id': 51, 'image_id': 130, 'category_id': 3, 'bbox': [1, 1, 9, 9], 'area': 81, 'ignore': 1},
        {'id': 52, 'image_id': 130, 'category_id': 3, 'bbox': [-5, -5, 90, 90], 'area': 8100}]  # hangs over: kept
    data['images'].append({'id': 7, 'file_name': '9.jpg', 'width': 64, 'height': 31})
    data['annotations'].append({'id': 53, 'image_id': 7, 'category_id': 3, 'bbox': [1, 1, 9, 9]})
    made = source(tmp_path, data)
    assert made.dropped == {'crowds': 1, 'boxes outside their image or below a pixel': 7, 'images without boxes': 3,
                            'images below 32 pixels': 1}
    assert made.annotations(made.ids.tolist().index(130)).ids.tolist() == [1021, 1024, 52]
    val = source(tmp_path, data, split='val')
    assert len(val.annotations(6).ids) == 10 and 7 in val.ids
    _, warnings = coco.check_coco(made, val)
    assert any('leaves out 1 crowds, 7 boxes outside' in line for line in warnings)
    assert any("1 of its 3 classes has no box (none yet)" in line for line in warnings)


def test_a_box_over_the_edge_does_not_make_corners_of_a_file(tmp_path):
    data = coco_data()
    for note in data['annotations'][:5]:  # five of eleven, and all of them could be corners
        note['bbox'] = [10, 10, 39, 39]
    for note in data['annotations'][5:]:
        note['bbox'] = [2, 2, 20, 20]
    assert len(source(tmp_path, data)) == 6


def test_a_name_may_be_a_whole_path(tmp_path):
    data = coco_data()
    for image in data['images']:
        image['file_name'] = str(tmp_path / 'train2017' / image['file_name'])
    made = source(tmp_path, data)
    assert made.name(0) == data['images'][1]['file_name'] and made.read(0)[0]


def test_two_halves_that_do_not_fit_are_told(tmp_path):
    train, val = source(tmp_path), changed(lambda data: data['categories'].append({'id': 1, 'name': 'bird'}))
    assert 'has 1 classes that' in coco.check_coco(train, source(tmp_path, val, split='val'))[0][0]
    same = CocoSource(train.json, train.folder, training=False)
    assert any('6 images are in both' in line for line in coco.check_coco(train, same)[1])


def test_an_image_of_another_size_than_its_boxes_is_refused(tmp_path):
    made = source(tmp_path)
    Image.new('RGB', (65, 40)).save(tmp_path / 'train2017' / '3.jpg')
    with pytest.raises(BadLabel, match='is 65 x 40 pixels, and its boxes belong to one of 64 x 40; resize'):
        Transform((64, 64))(made.read(2), None)
    turned = Image.new('RGB', (64, 40))
    exif = turned.getexif()
    exif[dense.ORIENTATION] = 6
    turned.save(tmp_path / 'train2017' / '3.jpg', exif=exif)
    with pytest.raises(BadLabel, match='its EXIF data turn it, and the boxes were drawn in the unturned image'):
        Transform((64, 64))(made.read(2), None)


def test_an_outline_whose_json_changed_meanwhile_is_told(tmp_path):
    made = source(tmp_path)
    segments = made.read(1)[1].segments
    made.json.write_text('{"images": []}' * 1000)
    with pytest.raises(BadLabel, match=r'has no annotation 1003 any more where .* had it'):
        segments()


def test_check_dataset_knows_coco(tmp_path, capsys):
    for split in ('train', 'val'):
        write_coco(tmp_path, coco_data(), split=split)
    (tmp_path / 'val2017' / '4.jpg').write_bytes(b'no image')
    Image.new('RGB', (10, 10)).save(tmp_path / 'train2017' / '1.jpg')
    words = ['--recipe', 'retinanet_moganet_tiny_1x', '--data_path', str(tmp_path)]
    assert check_dataset.main(words) == 0
    shown = capsys.readouterr().out
    assert '"images": 6' in shown and '"classes": 3' in shown and 'leaves out 1 crowds' in shown
    assert check_dataset.main([*words, '--decode', '--workers', '1']) == 1
    shown = capsys.readouterr().out
    assert 'val2017/4.jpg: is no image' in shown and 'train2017/1.jpg: is 10 x 10 pixels' in shown


# ---- Transforms -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('case', FIGURES['detection_test'], ids=lambda case: 'x'.join(map(str, case['wh'])))
def test_sizes_and_factors_of_a_test_are_the_recorded(case):
    old = case['wh'][1], case['wh'][0]
    size = dense.fit(old, (1333, 800))
    assert list(size) == case['img_shape'] and list(dense.padded([size])) == case['pad_shape']
    np.testing.assert_array_equal(dense.factors(old, size), np.array(case['scale_factor'], np.float32))


def test_sizes_of_several_scales_are_the_recorded():
    compared = 0
    for name, shapes in FIGURES['detection_multi_scale'].items():
        width, height = map(int, name.split('x'))
        for scale, shape in shapes.items():
            short, long = map(int, scale.split(','))
            assert list(dense.fit((height, width), (long, short))) == shape
            compared += 1
    assert compared == sum(map(len, FIGURES['detection_multi_scale'].values())) >= 14
    sides = {int(scale.split(',')[0]) for shapes in FIGURES['detection_multi_scale'].values() for scale in shapes}
    assert {*Transform.SIDES, *Transform.SIDES_BEFORE} <= sides


@pytest.mark.parametrize('name', ['up', 'down', 'align'])
def test_pixels_are_the_recorded_within_a_level(name):
    """torch's fixed point has 15 bits and OpenCV's 11: one level, in a fifth of the values."""
    image, wanted = FIGURES['pixels/image'].numpy(), FIGURES[f'pixels/image_{name}'].numpy()
    apart = np.abs(dense.resize(image, wanted.shape[:2]).astype(int) - wanted)
    assert apart.max() <= 1 and (apart > 0).mean() < 0.3
    labels, wanted = FIGURES['pixels/labels'].numpy(), FIGURES[f'pixels/labels_{name}'].numpy()
    np.testing.assert_array_equal(dense.resize_labels(labels, wanted.shape), wanted)


def test_boxes_resized_and_mirrored_are_the_recorded():
    case = FIGURES['boxes_resize']
    size = dense.fit((57, 83), tuple(case['scale']))
    assert list(size) == case['img_shape']
    boxes = coco.scale_boxes(np.array(case['boxes'], np.float32), dense.factors((57, 83), size), size)
    np.testing.assert_array_equal(boxes, np.array(case['out'], np.float32))
    # The recorded are flipped after resizing, whose rounding is that of float32 at 116 pixels
    np.testing.assert_allclose(coco.mirror_boxes(boxes, size[1]), FIGURES['boxes_flip'], atol=1e-5)


class Drawn:
    """A generator that gives what it is told and notes what was asked."""

    def __init__(self, values: list[int]):
        self.values, self.asked = list(values), []

    def integers(self, low: int, high: int | None = None) -> int:
        self.asked.append([0, low] if high is None else [low, high])
        return self.values.pop(0)


def test_crops_are_the_recorded():
    boxes = np.array(FIGURES['boxes_resize']['boxes'], np.float32)
    for case in FIGURES['boxes_crop']:
        (top, left), size = case['offset_yx'], tuple(case['crop_hw'])
        moved, kept = coco.crop_boxes(boxes, top, left, size)
        assert np.flatnonzero(kept).tolist() == case['kept']
        np.testing.assert_array_equal(moved[kept], np.array(case['boxes'], np.float32))
        rng = Drawn([*size, top, left])
        assert coco.draw_crop(rng, (57, 83), size) == (top, left, *size)
        assert rng.asked[2:] == case['randint_bounds']
    for name in ('crop_size_absolute_range', 'crop_size_small_image'):
        case = FIGURES[name]
        low = [bounds[0] for bounds in case['randint_bounds']]
        rng = Drawn([*low, 0, 0])
        coco.draw_crop(rng, tuple(case['image_hw']), Transform.CROP)
        assert rng.asked[:2] == case['randint_bounds']


def test_a_batch_is_normalised_as_recorded_and_zero_in_its_padding():
    image = FIGURES['pixels/image'].numpy()[:, :, ::-1]  # recorded in BGR
    images = dense.stack([image, image[:20, :30]], dense.padded([image.shape[:2]]), fill=77)
    assert images.shape == (2, 64, 96, 3)
    recipe = RECIPES['retinanet_moganet_tiny_1x']
    batch = dense.normalise_padded(images, [(57, 83), (20, 30)], mean=recipe.mean, std=recipe.std)
    wanted = FIGURES['pixels/normalized_sample']
    found = dense_reference.sample(batch[0, :, :57, :83].contiguous(), len(wanted))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)  # of values up to 2.6 in float32
    assert not batch[0, :, 57:].any() and not batch[0, :, :, 83:].any()
    assert not batch[1, :, 20:].any() and not batch[1, :, :, 30:].any() and batch[1, :, :20, :30].all()


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'WEBP'])
def test_images_are_upright(orientation, form):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8))
    exif = image.getexif()
    exif[dense.ORIENTATION] = orientation
    file = encoded(image, form, exif=exif)
    with Image.open(io.BytesIO(file)) as opened:
        wanted = np.asarray(ImageOps.exif_transpose(opened).convert('RGB'))
    np.testing.assert_array_equal(dense.decode_upright(file), wanted)
    assert dense.upright_size(file) == wanted.shape[:2]


def squares(size: tuple[int, int], boxes: list[list[int]]) -> tuple[bytes, coco.Annotations]:
    """A black image with white boxes, and what a JSON says of it."""
    pixels = np.zeros((*size, 3), np.uint8)
    for left, top, right, bottom in boxes:
        pixels[top:bottom, left:right] = 255
    notes = coco.Annotations.none(size)
    return encoded(Image.fromarray(pixels), 'PNG'), replace(notes, boxes=np.array(boxes, np.float32),
                                                            labels=np.arange(len(boxes)))


@pytest.mark.parametrize('multi_scale', [False, True])
def test_boxes_go_where_the_pixels_go(multi_scale):
    """A white square fills its box within two pixels of the resizing's blur, whatever was drawn."""
    item = squares((420, 640), [[100, 120, 300, 280]])
    transform, seen = Transform((1333, 800), hflip=0.5, multi_scale=multi_scale), Counter()
    for seed in range(12):
        sample = transform(item, seed)
        bright = sample['pixels'][..., 0] > 127
        rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
        for left, top, right, bottom in sample['boxes']:
            assert np.abs([left - columns[0], top - rows[0], right - columns[-1] - 1, bottom - rows[-1] - 1]).max() <= 2
        assert len(sample['boxes']) == len(sample['labels']) == int(bright.any())
        assert sample['size'] == sample['pixels'].shape[:2] and sample['original_size'] == (420, 640)
        again = transform(item, seed)
        assert again['boxes'].tobytes() == sample['boxes'].tobytes() and (again['pixels'] == sample['pixels']).all()
        seen[sample['flipped'], min(sample['size'])] += 1
    assert {flipped for flipped, _ in seen} == {False, True}
    assert {side for _, side in seen} == {800} if not multi_scale else len({side for _, side in seen}) > 5


def test_a_test_draws_nothing_and_crowds_stay_apart():
    item = squares((420, 640), [[100, 120, 300, 280]])
    plain = Transform((1333, 800))(item, None)
    varied = Transform((1333, 800), hflip=1.0, multi_scale=True)(item, None)
    assert not varied['flipped'] and (varied['pixels'] == plain['pixels']).all() and plain['size'] == (800, 1219)


def test_a_crop_without_boxes_keeps_their_shape():
    item = squares((900, 900), [[0, 0, 3, 3]])
    transform = Transform((1333, 800), multi_scale=True)
    found = [transform(item, seed)['boxes'].shape for seed in range(20)]
    assert set(found) == {(0, 4), (1, 4)}


def test_a_damaged_image_is_a_bad_image(tmp_path):
    made = source(tmp_path)
    _, notes = made.read(2)
    with pytest.raises(BadImage), refusing_bad_images():
        Transform((64, 64))((b'\xff\xd8no image', notes), 1)


# ---- Masks ----------------------------------------------------------------------------------------------------------

UNITS = dense_reference.load('units')


def test_polygons_become_the_recorded_masks_and_are_resized_and_mirrored_as_recorded():
    size = tuple(UNITS['masks/size'])
    masks = coco.rasterise(UNITS['masks/polygons'], size, range(3))
    smaller, larger = ([dense.resize_labels(mask, size) for mask in masks] for size in ((57, 91), (200, 300)))
    mirrored = [dense.mirror(mask) for mask in masks]
    recorded = UNITS['masks/rle'], *(UNITS[f'masks/{name}']['rle'] for name in (
        'resized_57x91', 'resized_200x300', 'flipped'))
    for found, codes in zip((masks, smaller, larger, mirrored), recorded, strict=True):
        for mask, (height, width, text) in zip(found, codes, strict=True):
            assert np.array_equal(mask, coco.rasterise([{'size': [height, width], 'counts': text}], (height, width),
                                                       [0])[0])


def test_all_forms_of_masks_give_the_made_up_sets_areas_and_boxes(tmp_path):
    digits_coco.write(tmp_path, train=12, val=1)
    made, forms = CocoSource(*find_json(tmp_path, 'train'), training=True), set()
    for index in range(len(made)):
        notes = made.annotations(index)
        segments = notes.segments()
        for mask, box, area in zip(coco.rasterise(segments, notes.size, notes.ids), notes.boxes, notes.areas,
                                   strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert mask.sum() == area
            assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        forms |= {'polygons' if isinstance(one, list) else type(one['counts']).__name__ for one in segments}
    assert forms == {'polygons', 'str', 'list'}


@pytest.mark.parametrize('multi_scale', [False, True])
def test_masks_go_where_the_pixels_go_and_leave_with_their_boxes(multi_scale):
    image, notes = squares((420, 640), [[100, 120, 300, 280], [500, 10, 520, 40]])
    outlines = [[[x0, y0, x1, y0, x1, y1, x0, y1]] for x0, y0, x1, y1 in notes.boxes.tolist()]
    item = image, replace(notes, segments=lambda: outlines, ids=np.arange(2))
    transform = Transform((1333, 800), hflip=0.5, multi_scale=multi_scale, masks=True)
    plain, counts = Transform((1333, 800), hflip=0.5, multi_scale=multi_scale), Counter()
    for seed in range(12):
        sample = transform(item, seed)
        masks = sample['masks']
        assert masks.dtype == bool and masks.shape == (len(sample['boxes']), *sample['size'])
        bright = sample['pixels'][..., 0] > 127
        # The nearest pixel and the middle of a blur differ by two along the edges at most
        assert (masks.any(0) != bright).sum() <= 2 * 2 * sum(
            right - left + bottom - top for left, top, right, bottom in sample['boxes'].tolist())
        for mask, box in zip(masks, sample['boxes'], strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            # To the nearest twice: by up to a pixel of the smaller image, 2 of the larger, and one of its own
            assert np.abs([columns[0] - box[0], rows[0] - box[1], columns[-1] + 1 - box[2], rows[-1] + 1 - box[3]]
                          ).max() <= 3
        without = plain(item, seed)
        assert 'masks' not in without and (without['pixels'] == sample['pixels']).all()
        counts[len(masks)] += 1
    assert counts.keys() == ({2} if not multi_scale else {1, 2} | counts.keys())
    assert 'masks' not in transform(item, None)


@pytest.mark.parametrize('segment,said', [
    (None, 'has no mask in annotation 7; train boxes alone by --masks false'),
    ([[1, 2]], 'cannot be read in annotation 7'), ({'counts': 'zz'}, 'cannot be read in annotation 7'),
    ({'size': [4, 4], 'counts': [16]}, r'annotation 7 \(a mask of 4 x 4 pixels\)')])
def test_a_mask_that_is_missing_or_broken_is_a_bad_label(segment, said):
    with pytest.raises(BadLabel, match=said):
        coco.rasterise([segment], (60, 80), [7])


# ---- Loaders --------------------------------------------------------------------------------------------------------

class Shapes(tasks.Task):
    """Batches that are lists of (image id, whether it is wider than high): what the loaders do with groups."""

    def sample(self, item: Any, seed: int | None) -> tuple[int, bool]:
        height, width = item[1].size
        return item[1].image_id, width > height

    def collate(self, samples: Any) -> list[tuple[int, bool]]:
        return list(samples)

    def finish(self, batch: Any, device: Any, position: Any) -> Any:
        return batch


ROW = replace(RECIPES['moganet_xtiny'], total_batch_size=8, micro_batch_size=2, epochs=3)


@pytest.fixture(scope='module')
def many(tmp_path_factory) -> CocoSource:
    """61 images that can be trained on: 20 or 21 of each shape, so 40 high or square and 21 wide."""
    data = coco_data(0)
    for place in range(61):
        width, height = COCO_SIZES[place % 3]
        data['images'].append({'id': place, 'file_name': f'{place}.jpg', 'width': width, 'height': height})
        data['annotations'].append({'id': place, 'image_id': place, 'category_id': 3, 'bbox': [1, 1, 9, 9]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
        return source(tmp_path_factory.mktemp('many'), data)


def train_loader(made: CocoSource, recipe: Recipe = ROW, *, ranks: int = 1, rank: int = 0, steps: int = 4,
                 size: int = 2) -> TrainLoader:
    run = Run(batch_size=size, update_freq=steps, world_size=ranks, num_workers=0)
    return TrainLoader(made, Shapes(recipe, run), run, rank=rank, device=torch.device('cpu'))


def updates(made: CocoSource, epoch: int, *, ranks: int, recipe: Recipe = ROW, start: int = 0) -> list[list[Any]]:
    """The micro-batches of each update of an epoch, over all ranks, sorted."""
    steps = 4 // ranks
    loaders = [train_loader(made, recipe, ranks=ranks, rank=rank, steps=steps) for rank in range(ranks)]
    batches = [list(loader.epoch(epoch, start)) for loader in loaders]
    return [sorted(map(tuple, (batch for each in batches for batch in each[steps * update:steps * (update + 1)])))
            for update in range(len(batches[0]) // steps)]


def test_micro_batches_are_of_one_shape_and_the_same_for_any_number_of_ranks(many):
    alone = updates(many, 0, ranks=1)
    assert len(alone) == 7  # 40 + 20 images in whole micro-batches of 2 are 60: 7 updates of 8
    for update in alone:
        assert len(update) == 4 and all(len({wide for _, wide in batch}) == 1 and len(batch) == 2 for batch in update)
    assert updates(many, 0, ranks=2) == alone == updates(many, 0, ranks=4)
    assert updates(many, 0, ranks=2, start=3) == alone[3:]
    used = Counter(number for update in alone for batch in update for number, _ in batch)
    assert len(used) == 56 and set(used.values()) == {1}
    kinds = [sum(next(iter(batch))[1] for batch in update) for update in alone]
    assert len(set(kinds)) > 1 and updates(many, 1, ranks=1) != alone  # both shapes in an update, anew in each epoch
    assert updates(many, 0, ranks=1, recipe=replace(ROW, seed=1)) != alone


def test_too_few_images_of_one_shape_and_repeated_images_are_refused(many, tmp_path):
    with pytest.raises(UserError, match='2 training images in whole micro-batches of one shape are fewer'):
        train_loader(source(tmp_path, coco_data(6)))  # three high ones, and a wide one alone
    with pytest.raises(UserError, match='--repeated_aug spreads the copies of an image'):
        train_loader(many, replace(ROW, repeated_aug=2))


@pytest.mark.parametrize('ranks', [1, 2, 3])
def test_an_evaluation_sees_each_image_once_in_batches_of_one_padded_size(many, ranks):
    val = coco.open_coco(RECIPES['retinanet_moganet_tiny_1x'], Run(val_json=str(many.json), image_dir=str(many.folder)),
                         'val')
    seen, names = [], []
    for rank in range(ranks):
        run = Run(batch_size=2, world_size=ranks, num_workers=0, val_batch_size=4)
        loader = ValLoader(val, Shapes(ROW, run), run, rank=rank, device=torch.device('cpu'))
        batches = list(loader)
        assert len(batches) == len(loader) and max(map(len, batches)) == 4
        for batch in batches:
            assert len({val.sizes[number].tobytes() for number, _ in batch}) == 1
        seen += [number for batch in batches for number, _ in batch]
        names += loader.names
    assert sorted(seen) == list(range(61))
    assert [int(Path(name).stem) for name in names] == seen


def test_workers_change_no_batch(many):
    """Of the real task: pixels, boxes and sizes of the first update, with and without processes."""
    recipe = replace(RECIPES['retinanet_moganet_tiny_1x'], image_scale=(96, 64), total_batch_size=4, epochs=1,
                     num_classes=None)
    taken = []
    for workers in (0, 2):
        run = Run(train_json=str(many.json), val_json=str(many.json), image_dir=str(many.folder), device='cpu',
                  batch_size=2, update_freq=2, num_workers=workers)
        made = open_loaders(recipe, run)
        assert made.task.classes == many.classes
        taken.append([*made.train.epoch(0, end=1), *list(made.val)[:2]])
        made.close()
    assert differences([vars(batch) for batch in taken[0]], [vars(batch) for batch in taken[1]]) == []
    assert all(not batch.images[:, :, height:, width:].any() for batch in taken[0] for height, width in [
        tuple(map(max, zip(*batch.sizes, strict=True)))])


@dataclass
class Boxes(tasks.Batch):
    targets: list[dict[str, Any]]


def test_a_batch_of_lists_of_dicts_travels_as_a_whole(monkeypatch):
    batch = Boxes(torch.zeros(2, 3), [{'boxes': torch.ones(number, 4), 'size': (3, 4)} for number in (1, 0)])
    moved = batch.to(torch.device('meta'))
    assert all(target['boxes'].is_meta and target['size'] == (3, 4) for target in moved.targets)
    recorded = []
    monkeypatch.setattr(torch.Tensor, 'record_stream', lambda tensor, stream: recorded.append((tensor.shape, stream)))
    monkeypatch.setattr(torch.Tensor, 'pin_memory', lambda tensor: tensor + 2)
    batch.record_stream('stream')
    assert recorded == [((2, 3), 'stream'), ((1, 4), 'stream'), ((0, 4), 'stream')]
    assert (batch.pin_memory().targets[0]['boxes'] == 3).all()
