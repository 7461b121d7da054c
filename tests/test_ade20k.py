"""Images with a label for each pixel: folders and label files of all kinds, what is wrong in them, the transforms."""
import colorsys
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dense_reference
from builders import blocks, differences, encoded, open_loaders, write_labelled
from pipeline import ade20k, augmentation, dense
from pipeline.ade20k import LabelFile, Transform, open_ade20k
from pipeline.labels import BadLabel
from recipes import RECIPES, Run
from tools import check_dataset
from utils import UserError

FIGURES = dense_reference.load('resize_metrics')
PALETTE = [value for color in range(256) for value in (color, 255 - color, color // 2)]


def png(numbers: np.ndarray, mode: str = 'L', **options: Any) -> bytes:
    """Labels as a PNG: L, P (with a palette), I;16, or 1."""
    image = Image.fromarray(numbers.astype(np.uint16 if mode == 'I;16' else np.uint8 if mode != '1' else bool))
    if mode == 'P':
        image = Image.fromarray(numbers, 'P')
        image.putpalette(PALETTE)
    return encoded(image, 'PNG', **options)


def recipe(**values: Any) -> Any:
    """What the source asks of a recipe."""
    return SimpleNamespace(**{'data_set': 'ade20k', 'num_classes': None, 'reduce_zero_label': None,
                              'ignore_label': None} | values)


def opened(root: Path, split: str = 'train', **values: Any) -> ade20k.LabelledImages:
    return open_ade20k(recipe(**values), Run(data_path=str(root)), split)


# ---- Reading --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('own', [True, False])
def test_folders_of_ones_own_count_from_0_and_ade20ks_from_1(tmp_path, own):
    write_labelled(tmp_path, own=own)
    (tmp_path / 'classes.txt').write_text('sky\n\nroad\ncar\ndög\n', encoding='utf-8')
    for split in ('train', 'val'):
        source = opened(tmp_path, split)
        assert len(source) == 3 and source.classes == ['sky', 'road', 'car', 'dög']
        image, file = source.read(1)
        assert image == Path(source.name(1)).read_bytes() and source.name(1).endswith('/1.jpg')
        np.testing.assert_array_equal(file.decode(4, (60, 80)), blocks(1))
    # Said the other way round: 0 counts for nothing, or is a class
    turned = opened(tmp_path, reduce_zero_label=own).read(1)[1].decode(5, (60, 80))
    if own:
        np.testing.assert_array_equal(turned, np.where(blocks(1) == 0, 255, blocks(1).astype(int) - 1))
    else:
        np.testing.assert_array_equal(turned, blocks(1) + 1)


def test_reduced_labels_are_the_recorded():
    case = FIGURES['reduce_zero_label']
    file = LabelFile('x', png(np.array([case['raw']], np.uint8)), reduce_zero_label=True)
    with pytest.raises(BadLabel, match='has the label 254 in x, but the classes are 1 to 253'):
        file.decode(253, (1, len(case['raw'])))  # which the original takes for a class of 254
    table = ade20k.label_table(254, reduce_zero_label=True, ignore_label=None)
    assert table[case['raw']].tolist() == case['out']


def test_labels_that_count_for_nothing_are_the_one_named_and_255():
    file = LabelFile('x', png(np.array([[0, 1, 9, 255]], np.uint8)), ignore_label=9)
    assert file.decode(2, (1, 4)).tolist() == [[0, 1, 255, 255]]


@pytest.mark.parametrize('mode, options', [('L', {}), ('P', {}), ('P', {'bits': 2}), ('P', {'bits': 4}), ('I;16', {})])
def test_numbers_are_read_as_they_are_from_any_png(mode, options):
    numbers = blocks()
    found = LabelFile('x', png(numbers, mode, **options)).decode(4, numbers.shape)
    np.testing.assert_array_equal(found, numbers)
    assert found.dtype == np.uint8


def test_two_colours_are_two_classes_and_16_bits_reach_to_65535():
    numbers = blocks(classes=2)
    np.testing.assert_array_equal(LabelFile('x', png(numbers, '1')).decode(2, numbers.shape), numbers)
    far = np.array([[0, 3, 65535, 40000]])
    file = LabelFile('x', png(far, 'I;16'), ignore_label=65535)
    with pytest.raises(BadLabel, match='has the label 40000 in x'):
        file.decode(4, far.shape)
    assert LabelFile('x', png(far[:, :3], 'I;16'), ignore_label=65535).decode(4, (1, 3)).tolist() == [[0, 3, 255]]


@pytest.mark.parametrize('kind', [np.uint8, np.uint16])
def test_the_fast_table_and_count_are_numpys(kind, monkeypatch):
    rng = np.random.default_rng(0)
    table = rng.integers(0, 256, 65536).astype(np.uint8)
    numbers = rng.integers(0, np.iinfo(kind).max + 1, (31, 45)).astype(kind)[:, 1:]
    fast = dense.relabel(numbers, table)
    counts = [dense.count_labels(fast[:, left:]) for left in (0, 1)]
    monkeypatch.setattr(dense, 'kernels', None)
    np.testing.assert_array_equal(fast, dense.relabel(numbers, table))
    for left, count in enumerate(counts):
        np.testing.assert_array_equal(count, dense.count_labels(fast[:, left:]))


@pytest.mark.parametrize('depth', [2, 4])
def test_grey_pngs_of_few_bits_are_not_stretched(depth):
    """Pillow reads them as 0..255 and writes none, so this one is put together here."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))

    rows = bytes([0, 0b00011011]) if depth == 2 else bytes([0, 0x01, 0x23])
    file = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 4, 1, depth, 0, 0, 0, 0)) + chunk(
        b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')
    assert LabelFile('x', file).decode(4, (1, 4)).tolist() == [[0, 1, 2, 3]]


def test_the_labels_follow_another_order_of_the_names(tmp_path):
    (write_labelled(tmp_path) / 'classes.txt').write_text('a\nb\nc\nd\n')
    source = opened(tmp_path)
    source.relabel(['d', 'b', 'a', 'c'])
    source = pickle.loads(pickle.dumps(source))  # as a spawned worker receives it
    np.testing.assert_array_equal(source.read(0)[1].decode(4, (60, 80)), np.array([2, 1, 3, 0])[blocks(0)])
    source.relabel(['a', 'b', 'c', 'd'])
    np.testing.assert_array_equal(source.read(0)[1].decode(4, (60, 80)), blocks(0))


def test_an_evaluation_takes_one_image_a_batch(tmp_path):
    write_labelled(tmp_path)
    assert opened(tmp_path, 'val').groups.tolist() == [0, 1, 2] and not hasattr(opened(tmp_path), 'groups')


def test_a_worker_holds_two_arrays_of_names(tmp_path):
    made = write_labelled(tmp_path)
    many = pickle.dumps(opened(made))
    for number in range(3, 103):
        for folder, ending in (('images', 'jpg'), ('labels', 'png')):
            (made / folder / 'train' / f'{number}.{ending}').write_bytes(
                (made / folder / 'train' / f'0.{ending}').read_bytes())
    assert (len(pickle.dumps(opened(made))) - len(many)) / 100 < 20  # bytes an image: the names themselves


# ---- What is wrong --------------------------------------------------------------------------------------------------

def label_of(root: Path, number: int) -> Path:
    return root / 'labels' / 'train' / f'{number}.png'


def as_jpeg(root: Path) -> None:
    for number in range(3):
        Image.fromarray(blocks(number)).save(label_of(root, number).with_suffix('.jpg'))
        label_of(root, number).unlink()


def masks(root: Path) -> None:
    for number in range(3):
        label_of(root, number).write_bytes(png(blocks(number, classes=2) * 255))


def remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


FAULTS = {
    'no labels': (lambda root: label_of(root, 1).unlink(), '1 of the 3 images of .*train have no labels; .*1.png is'),
    'JPEG': (as_jpeg, '3 of the 3 images of .* have no labels; .*0.jpg is no PNG, and a lossy form changes numbers'),
    'colours': (lambda root: Image.new('RGB', (80, 60)).save(label_of(root, 0)),
                '0.jpg has labels in colours .RGB., .*0.png: write the number of its class for each pixel'),
    'no PNG': (lambda root: label_of(root, 0).write_bytes(encoded(Image.new('L', (80, 60)), 'JPEG')),
               'has labels in a file of the form JPEG, .*0.png: write PNGs'),
    'damaged': (lambda root: label_of(root, 0).write_bytes(b'no'), 'has labels that cannot be read, .*0.png'),
    'masks': (masks, 'all labels are 0 or 255, and 255 counts for nothing: .* write 1 for it'),
    'nothing': (lambda root: [label_of(root, number).write_bytes(png(blocks() * 0 + 255)) for number in range(3)],
                'all labels are 255, which counts for nothing; check --ignore_label'),
    'no label folder': (lambda root: remove(root / 'labels' / 'train'),
                        r'has images/train/, but no annotations/train/ or labels/train/; put the label PNGs there'),
    'no folder': (lambda root: (root / 'images').rename(root / 'pictures'),
                  r'has none of images/train/, images/training/; give --data_path ADEChallengeData2016, or'),
    'no image': (lambda root: [path.unlink() for path in (root / 'images' / 'train').iterdir()], 'holds no image'),
    'names': (lambda root: (root / 'classes.txt').write_text('a\nb\na\n'), 'classes.txt names a class twice'),
    'names in bytes': (lambda root: (root / 'classes.txt').write_bytes(b'\xff\xfe\xfa'), 'classes.txt cannot be read'),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_a_fault_is_refused_with_the_file_before_a_run_begins(tmp_path, fault):
    spoil, message = FAULTS[fault]
    spoil(write_labelled(tmp_path))
    with pytest.raises(UserError, match=message) as refused:
        opened(tmp_path)
    assert str(tmp_path) in str(refused.value) and '\n' not in str(refused.value)


def test_a_missing_folder_and_too_many_classes_are_refused(tmp_path):
    with pytest.raises(UserError, match='is no folder; give --data_path the folder with images/'):
        opened(tmp_path / 'nowhere')
    with pytest.raises(UserError, match='300 classes are more than the 254'):
        opened(write_labelled(tmp_path), num_classes=300)


def test_labels_that_fit_no_class_or_not_their_image_are_refused_as_they_are_read(tmp_path):
    write_labelled(tmp_path)
    transform, item = Transform((80, 60), crop=32), opened(tmp_path).read(0)
    with pytest.raises(BadLabel, match=r'has the label 3 in .*0.png, but the classes are 0 to 2: give --num_classes'):
        transform(item, 0, num_classes=3)
    label_of(tmp_path, 0).write_bytes(png(blocks()[:50]))
    with pytest.raises(BadLabel, match=r'is 80 x 60 pixels, and its labels .*0.png are 80 x 50: make both of one size'):
        transform(opened(tmp_path).read(0), None, num_classes=4)


def test_check_dataset_knows_label_files(tmp_path, capsys):
    write_labelled(tmp_path)
    (tmp_path / 'classes.txt').write_text('a\nb\nc\nd\n')
    words = ['--recipe', 'upernet_moganet_tiny_160k', '--data_path', str(tmp_path)]
    assert check_dataset.main([*words, '--decode', '--workers', '1']) == 0
    assert '"images": 3, "classes": 4' in capsys.readouterr().out
    label_of(tmp_path, 1).write_bytes(png(blocks() + 7))
    (tmp_path / 'images' / 'val' / '2.jpg').write_bytes(b'no')
    assert check_dataset.main(words) == 0 and check_dataset.main([*words, '--decode', '--workers', '1']) == 1
    shown = capsys.readouterr().out
    assert 'train/1.jpg: has the label 10 in' in shown and 'val/2.jpg: is no image' in shown


# ---- Transforms -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('case', FIGURES['segmentation_test'], ids=lambda case: 'x'.join(map(str, case['wh'])))
def test_sizes_of_a_test_are_the_recorded(case):
    width, height = case['wh']
    size = dense.fit((height, width), (2048, 512))
    assert list(size) == case['keep_ratio_shape'] and list(ade20k.align(size)) == case['aligned_shape']
    np.testing.assert_array_equal(dense.factors((height, width), ade20k.align(size)),
                                  np.array(case['scale_factor'], np.float32))
    pixels = np.zeros((height, width, 3), np.uint8)
    assert list(Transform((2048, 512), crop=512).prepare(pixels).shape[:2]) == case['aligned_shape']
    assert list(Transform((2048, 512), crop=512, aligned=False).prepare(pixels).shape[:2]) == case['keep_ratio_shape']


def test_sizes_of_the_training_are_the_recorded():
    transform = Transform((2048, 512), crop=512)
    assert len(FIGURES['segmentation_train_scale']) > 10
    for case in FIGURES['segmentation_train_scale']:
        scale = transform._scaled(case['ratio'])
        assert list(scale) == case['scale'] and list(dense.fit(case['wh'][::-1], scale)) == case['shape']


def test_a_test_image_is_the_recorded_within_a_level():
    """Of each of two resizes in 8 bits: two levels at most, in the mean a third."""
    figures = dense_reference.load('fpn')  # the same image and pixels as for UPerNet
    wanted = figures['pipeline/aligned_rgb'].numpy()
    found = Transform((512, 128), crop=512).prepare(figures['pipeline/image_bgr'].numpy()[:, :, ::-1])
    apart = np.abs(found.astype(int) - wanted)
    assert found.shape == wanted.shape and apart.max() <= 2 and apart.mean() < 0.5


def striped(size: tuple[int, int] = (480, 640)) -> tuple[bytes, LabelFile]:
    """Four classes in stripes, each of its own grey, one of which covers most."""
    numbers = np.zeros(size, np.uint8)
    for label, start in ((1, 60), (2, 200), (3, 400)):
        numbers[:, start:start + 60] = label
    pixels = np.repeat((numbers * 60 + 20)[..., None], 3, -1)
    return encoded(Image.fromarray(pixels), 'PNG'), LabelFile('x', png(numbers))


def test_labels_go_where_the_pixels_go_and_all_comes_from_the_seed():
    item, transform = striped(), Transform((512, 384), crop=256, photometric=0.0)
    seen = Counter()
    for seed in range(10):
        sample = transform(item, seed, num_classes=4)
        pixels, found = sample['pixels'], sample['labels']
        assert pixels.shape == (*found.shape, 3) and max(found.shape) <= 256 and sample['size'] == found.shape
        # Away from the edges of the stripes, where the resizing blurs, the grey tells the label
        assert (np.abs(pixels[..., 0].astype(int) - (found * 60 + 20)) < 5).mean() > 0.9
        again = transform(item, seed, num_classes=4)
        assert (again['pixels'] == pixels).all() and (again['labels'] == found).all()
        seen[found.shape] += 1
    assert len(seen) > 1  # smaller than the crop at small ratios: to be padded
    test = transform(item, None, num_classes=4)
    assert test['labels'].shape == (480, 640) == test['original_size']
    assert [view.shape for view in test['views']] == [(384, 512, 3)]


@pytest.mark.parametrize('option', [{'hflip': 1.0}, {'ratios': (1.0, 1.0)}, {'max_class': 0.4}, {'crop': 64},
                                    {'photometric': 1.0}])
def test_each_setting_changes_the_sample(option):
    item = striped((450, 640))
    plain = {'crop': 256, 'hflip': 0.0, 'photometric': 0.0}
    before, after = (Transform((512, 384), **settings)(item, 3, num_classes=4)['pixels']
                     for settings in (plain, plain | option))
    assert before.shape != after.shape or (before != after).any()


def test_a_test_has_a_view_at_each_scale():
    transform = Transform((512, 384), crop=256, aligned=False, test_ratios=(0.5, 1.0, 1.5))
    views = transform(striped((450, 640)), None, num_classes=4)['views']
    assert [view.shape[:2] for view in views] == [(180, 256), (360, 512), (540, 768)]


def test_a_crop_has_no_class_above_the_share_unless_ten_draws_find_none():
    numbers = np.zeros((400, 400), np.uint8)
    numbers[300:, 300:] = 1  # in one of nine places of the crop or so
    transform = Transform((400, 400), crop=100, ratios=(1.0, 1.0), max_class=0.75)
    kept = Transform((400, 400), crop=100, ratios=(1.0, 1.0), max_class=1.0)

    def mixed(chosen: Transform) -> int:
        shares = []
        for seed in range(60):
            top, left = chosen._draw_crop(numbers, np.random.default_rng(seed))
            share = numbers[top:top + 100, left:left + 100].mean()
            shares.append(0.25 < share < 0.75)
        return sum(shares)

    assert mixed(transform) > 3 * max(mixed(kept), 1)
    ignored = np.full((400, 400), 255, np.uint8)
    assert len(transform._draw_crop(ignored, np.random.default_rng(0))) == 2  # nothing counts: no division by 0


def test_a_training_crop_is_padded_with_what_counts_for_nothing():
    sample = Transform((80, 60), crop=128, ratios=(0.5, 0.5))(striped(), 0, num_classes=4)
    found = dense.stack([sample['labels']], (128, 128), fill=ade20k.IGNORED)[0]
    height, width = sample['size']
    assert (found[height:] == 255).all() and (found[:, width:] == 255).all()
    assert (found[:height, :width].numpy() == sample['labels']).all()


def test_workers_change_no_batch(tmp_path):
    write_labelled(tmp_path, count=5)
    recipe = replace(RECIPES['upernet_moganet_tiny_160k'], image_scale=(96, 64), crop_size=64, total_batch_size=4)
    taken = []
    for workers in (0, 2):
        run = Run(data_path=str(tmp_path), device='cpu', batch_size=2, update_freq=2, num_workers=workers)
        made = open_loaders(replace(recipe, num_classes=4), run)
        taken.append([*made.train.epoch(0, end=1), *made.val])
        made.close()
    assert len(taken[0]) == 2 + 5
    assert differences([vars(batch) for batch in taken[0]], [vars(batch) for batch in taken[1]]) == []


# ---- Colours --------------------------------------------------------------------------------------------------------

PHOTO = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
SAME = ade20k.levels()


@pytest.mark.parametrize('saturation, hue', [(1.0, 7), (1.5, 0), (0.5, -18), (1.3, 17), (0.0, 0)])
@pytest.mark.parametrize('fast', [True, False])
def test_saturation_and_hue_are_the_textbooks(saturation, hue, fast, monkeypatch):
    """colorsys is exact; 8 bits of saturation and 180 hues cost 5 levels at most, Pillow's 8-bit hues 12."""
    if not fast:
        monkeypatch.setattr(dense, 'kernels', None)
    found = dense.recolor(PHOTO, before=SAME, saturation=saturation, hue=hue, after=SAME)
    wanted = []
    for color in PHOTO.reshape(-1, 3) / 255:
        h, s, v = colorsys.rgb_to_hsv(*color)
        wanted.append(colorsys.hsv_to_rgb((h + hue / 180) % 1, min(1, s * saturation), v))
    apart = np.abs(np.array(wanted).reshape(PHOTO.shape) * 255 - found)
    assert apart.max() <= (5 if fast else 12) and apart.mean() < (0.6 if fast else 1.6)


def test_levels_are_cut_off_as_the_original_does():
    assert ade20k.levels(1.5, 0)[[0, 101, 200]].tolist() == [0, 151, 255]
    assert ade20k.levels(1, -10.5)[[0, 11, 255]].tolist() == [0, 0, 244]
    found = dense.recolor(PHOTO, before=ade20k.levels(0.5), saturation=1.0, hue=0, after=ade20k.levels(1, 9))
    np.testing.assert_array_equal(found, PHOTO // 2 + 9)


def test_distortion_draws_each_part_at_its_rate():
    pixels = np.full((8, 8, 3), (90, 120, 150), np.uint8)

    def changed(rate: float) -> int:
        return sum((ade20k.distort(pixels, np.random.default_rng(seed), rate) != pixels).any() for seed in range(100))

    assert changed(0.0) == 0 and 85 <= changed(0.5) < 100 <= changed(1.0)
    assert augmentation.kernels is not None
