"""The made-up set of digits on photographs: exact masks, all that troubles a reader of COCO, equal bytes each time."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from pipeline import digits_coco
from pipeline.digits_coco import ADE_FOLDERS, CATEGORY_IDS, LABELS, PHOTOGRAPHS, Scene
from pipeline.sources import Digits
from utils import UserError

COUNTS = {'train': 60, 'val': 20}


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set; tests only read it."""
    root = tmp_path_factory.mktemp('digits') / 'set'
    digits_coco.write(root, **COUNTS)
    return root


@pytest.fixture(scope='module', params=['train', 'val'])
def half(request: pytest.FixtureRequest, folder: Path) -> tuple[str, COCO]:
    """A half as COCO's own reader has it."""
    return request.param, COCO(folder / 'annotations' / f'instances_{request.param}2017.json')


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob('*') if path.is_file()}


def test_equal_arguments_give_equal_bytes_and_another_seed_gives_other_pictures(tmp_path):
    for name, seed in (('a', 0), ('b', 0), ('c', 1)):
        digits_coco.write(tmp_path / name, train=3, val=2, seed=seed)
    a, b, c = (contents(tmp_path / name) for name in 'abc')
    assert a == b and len(a) == 3 * 5 + 2
    assert a.keys() == c.keys() and all(a[name] != c[name] for name in a)


def test_a_set_is_not_written_over_another(folder):
    before = contents(folder)
    with pytest.raises(FileExistsError):
        digits_coco.write(folder, train=1, val=1)
    assert contents(folder) == before


def test_masks_boxes_and_areas_agree_in_all_three_forms_of_masks(half):
    _, coco = half
    forms = set()
    for annotation in coco.anns.values():
        mask, code = coco.annToMask(annotation), annotation['segmentation']
        rows, columns = np.nonzero(mask)
        box = [columns.min(), rows.min(), columns.max() + 1 - columns.min(), rows.max() + 1 - rows.min()]
        assert annotation['bbox'] == box and annotation['area'] == mask.sum()
        forms.add('polygons' if isinstance(code, list) else type(code['counts']).__name__)
        assert not annotation['iscrowd'] or isinstance(code['counts'], list)
    assert forms == {'polygons', 'str', 'list'}


def test_what_troubles_a_reader_occurs(half):
    split, coco = half
    count = COUNTS[split]
    assert [coco.cats[number]['name'] for number in sorted(coco.cats)] == list('0123456789')
    assert sorted(coco.cats) == list(CATEGORY_IDS) and max(np.diff(CATEGORY_IDS)) > 1
    assert len(coco.imgs) == count and set(np.diff(list(coco.imgs))) == {3}
    assert sorted(coco.anns) == list(range(1, len(coco.anns) + 1))
    assert sum(image['height'] > image['width'] for image in coco.imgs.values()) == count // 3
    assert sum(not coco.imgToAnns[number] for number in coco.imgs) == count // 20
    assert sum(annotation['iscrowd'] for annotation in coco.anns.values()) == count // 10
    digits = [annotation for annotation in coco.anns.values() if not annotation['iscrowd']]
    assert 4.5 < len(digits) / count < 7.5  # 4 to 10, and no place for some
    longer = [max(annotation['bbox'][2:]) for annotation in digits]
    # What is covered is up to a quarter less, and an edge is rounded by a pixel or two
    assert 12 <= min(longer) < 17 and 50 < max(longer) <= 66
    for image in coco.imgs.values():
        assert {128 <= image[side] <= 160 for side in ('height', 'width')} == {True}


def test_pictures_and_labels_are_those_of_the_annotations(folder, half):
    split, coco = half
    for number, image in coco.imgs.items():
        picture = folder / f'{split}2017' / image['file_name']
        with Image.open(picture) as opened:
            assert opened.size == (image['width'], image['height']) and opened.mode == 'RGB'
        copy = folder / 'images' / ADE_FOLDERS[split] / image['file_name']
        assert copy.read_bytes() == picture.read_bytes()
        expected = np.ones((image['height'], image['width']), int)
        for annotation in coco.imgToAnns[number]:
            mask = coco.annToMask(annotation) > 0
            assert (expected[mask] == 1).all()  # what lies above cuts what lies below
            name = coco.cats[annotation['category_id']]['name']
            expected[mask] = LABELS.index('ignored' if annotation['iscrowd'] else name)
        with Image.open(folder / 'annotations' / ADE_FOLDERS[split] / f'{picture.stem}.png') as opened:
            assert opened.mode == 'L' and np.array_equal(np.asarray(opened), expected)


def scenes(count: int) -> list[Scene]:
    """Scenes on an even grey, on which all that is drawn is seen."""
    grey, digits = Image.new('RGB', (320, 320), (128, 128, 128)), Digits('val')
    return [Scene(index, [grey], digits, np.random.default_rng(index)) for index in range(count)]


def test_digits_overlap_and_none_is_covered_by_more_than_a_quarter():
    shares = []
    for scene in scenes(40):
        seen = np.bincount(scene.owner.flat, minlength=len(scene.areas))
        shares += [seen[i] / scene.areas[i] for i, (_, crowd) in enumerate(scene.objects, start=1) if not crowd]
    assert 0.75 <= min(shares) < 0.9 and 0.1 < np.mean(np.array(shares) < 1) < 0.7


def test_the_ink_differs_in_brightness_from_the_photograph_inside_the_mask_alone():
    for scene in scenes(12):
        difference = np.abs((scene.pixels - 128) @ digits_coco.LUMINANCE)
        # Half of the contrast of 80 where the ink covers half; the edge of a digit above may lighten or darken it
        assert scene.objects == [] or np.mean(difference[scene.owner == 1] >= 39) > 0.9
        assert np.mean(difference[scene.owner == 0] == 0) > 0.8


def test_the_halves_share_no_photograph_and_no_digit():
    assert not set(PHOTOGRAPHS['train']) & set(PHOTOGRAPHS['val'])
    train, val = ({source.read(i)[0].tobytes() for i in range(len(source))} for source in map(Digits, PHOTOGRAPHS))
    assert len(train) > 1400 and not train & val


@pytest.fixture
def written(tmp_path, monkeypatch) -> list[Path]:
    """Each folder that `root` writes, two images instead of all, into a cache of the test's own."""
    folders, write = [], digits_coco.write

    def small(root: Path, **_: int) -> None:
        folders.append(root)
        write(root, train=1, val=1)

    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(digits_coco, 'write', small)
    return folders


def test_the_set_is_written_into_the_cache_once(written, tmp_path):
    root = digits_coco.root()
    assert digits_coco.root() == root and len(written) == 1
    assert root.parent == tmp_path / 'moganet' and list(root.parent.iterdir()) == [root]
    facts = json.loads((root / 'annotations' / 'instances_val2017.json').read_text())
    assert (root / 'val2017' / facts['images'][0]['file_name']).is_file()


def test_of_two_processes_one_writes_and_the_other_takes_what_it_wrote(written, tmp_path, monkeypatch):
    ours = digits_coco.write

    def other_comes_first(root: Path, **sizes: int) -> None:
        monkeypatch.setattr(digits_coco, 'write', ours)
        digits_coco.root()
        ours(root, **sizes)

    monkeypatch.setattr(digits_coco, 'write', other_comes_first)
    root = digits_coco.root()
    assert len(written) == 2 and list((tmp_path / 'moganet').iterdir()) == [root] and (root / 'val2017').is_dir()


def test_a_set_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(root: Path, **_: int) -> None:
        (root / 'train2017').mkdir()
        raise KeyboardInterrupt

    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(digits_coco, 'write', interrupted)
    with pytest.raises(KeyboardInterrupt):
        digits_coco.root()
    assert not list((tmp_path / 'moganet').iterdir())


def test_a_cache_that_cannot_be_written_is_refused_with_the_cure(tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
    with pytest.raises(UserError, match=r'digits_coco-[0-9]+-\w+ cannot be written .*XDG_CACHE_HOME'):
        digits_coco.root()


@pytest.mark.parametrize('package', ['sklearn', 'skimage'])
def test_a_missing_package_is_answered_by_how_to_install_it(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"need scikit-learn and scikit-image .*pip install -e '\.\[demo\]'"):
        digits_coco.write(tmp_path / 'set', train=1, val=1)
    assert not (tmp_path / 'set').exists()
