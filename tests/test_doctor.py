"""tools/check_dataset.py --leaks: what is in both halves is found, the advice is a command that trains."""
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

import recipes
from builders import encoded, smooth, write
from tools import check_dataset, doctor
from utils import UserError

pytestmark = pytest.mark.usefixtures('own_cache')


def picture(seed: int) -> Image.Image:
    """A smooth picture of 320 x 240, of its own."""
    return smooth(np.random.default_rng(seed), 0).resize((320, 240))


@pytest.fixture
def data(tmp_path) -> Path:
    """Two classes of 12 images to train and 4 to test, no two alike; in train, 2 more in one class."""
    for split, count, first in (('train', 12, 0), ('val', 4, 100)):
        for label, name in enumerate(('cat', 'dog')):
            for i in range(count):
                write(tmp_path / split / name / f'{i}.jpg', encoded(picture(first + 50 * label + i)))
    return tmp_path


def report_of(data: Path, *flags: str) -> tuple[int, dict]:
    status = check_dataset.main(['--data_path', str(data), '--leaks', '--workers', '1', '--report',
                                 str(data / 'report.json'), *flags])
    return status, json.loads((data / 'report.json').read_text())


def test_the_same_file_a_near_one_and_a_label_that_contradicts_are_found(data, capsys):
    pytest.importorskip('imagehash')
    train, val = data / 'train', data / 'val'
    write(val / 'cat' / 'copy.jpg', (train / 'cat' / '3.jpg').read_bytes())
    again = ImageEnhance.Brightness(picture(5).resize((200, 150))).enhance(1.1)
    write(val / 'cat' / 'smaller.jpg', encoded(again, quality=60))
    write(train / 'dog' / 'cat.jpg', (train / 'cat' / '7.jpg').read_bytes())
    write(train / 'dog' / 'broken.jpg', encoded()[:300])
    status, report = report_of(data)
    found, printed = report['leaks'], capsys.readouterr().out
    assert status == 1 and len(report['errors']) == 1
    assert report['errors'][0].startswith(f'1 images of {val} are in {train} too, {val}/cat/copy.jpg as')
    assert found['equal'] == {'images': 1, 'examples': [[f'{val}/cat/copy.jpg', f'{train}/cat/3.jpg']]}
    assert found['near'] == {'images': 1, 'examples': [[f'{val}/cat/smaller.jpg', f'{train}/cat/5.jpg']]}
    assert found['conflicts'] == {'images': 1, 'examples': [[f'{train}/cat/7.jpg', f'{train}/dog/cat.jpg']]}
    assert found['train'] == {'images': 26, 'not_decodable': 1, 'classes': 2, 'smallest_class': ['cat', 12],
                              'largest_class': ['dog', 14],
                              'shorter_side': {'least': 240, 'median': 240, 'most': 240}}
    assert 'images of val equal to one of train: 1' in printed and '--on_bad_image skip' in printed
    assert sum('look like one of' in line or 'under another class' in line for line in report['warnings']) == 2


def test_a_clean_set_is_well_and_its_advice_is_taken_by_main(data, capsys):
    pytest.importorskip('imagehash')
    status, report = report_of(data)
    assert (status, report['errors'], report['warnings']) == (0, [], [])
    words = shlex.split(report['leaks']['command'])
    recipe, run = recipes.resolve(words[2:])
    assert words[:2] == ['python', 'main.py'] and run.data_path == str(data)
    assert recipe.name == 'moganet_small_transfer' and recipe.total_batch_size == 4  # of 24 images
    assert recipe.lr == pytest.approx(recipes.RECIPES[recipe.name].lr / 8)


@pytest.mark.parametrize(('images', 'side', 'bad', 'batch', 'size'), [
    (2_000_000, 400, 0, 1024, 224), (5000, 32, 0, 32, 32), (5000, 90, 3, 32, 96), (40, 20, 0, 8, 32)])
def test_the_advice_follows_number_and_size(images, side, bad, batch, size):
    half = {'images': images, 'shorter_side': {'median': side}, 'not_decodable': bad}
    command, why = doctor.advise(half, 'data')
    recipe, _ = recipes.resolve(shlex.split(command)[2:])
    assert (recipe.total_batch_size, recipe.input_size, recipe.test_size) == (batch, size, size)
    assert recipe.on_bad_image == ('skip' if bad else 'stop')
    flags = [word for word in shlex.split(command) if word.startswith('--') and word != '--data_path']
    assert all(any(flag in reason for reason in why) for flag in flags if flag != '--finetune')


def test_an_unbalanced_set_is_told(data):
    pytest.importorskip('imagehash')
    for i in range(11):
        (data / 'train' / 'cat' / f'{i}.jpg').unlink()
    _, report = report_of(data)
    assert any('class dog has 12 images and cat 1' in line for line in report['warnings'])


def test_without_the_package_it_says_what_to_install(data, monkeypatch):
    monkeypatch.setattr(doctor, 'imagehash', None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[doctor\]'"):
        report_of(data)


def test_near_hashes_are_those_that_every_pair_would_give():
    rng = np.random.default_rng(0)
    theirs = rng.integers(0, 2**64, 3000, np.uint64, endpoint=False)
    ours = rng.integers(0, 2**64, 500, np.uint64, endpoint=False)
    for i in range(300):  # as many bits as 0 to 6 away
        ours[i] = theirs[rng.integers(3000)]
        for bit in rng.choice(64, i % 7, replace=False):
            ours[i] ^= np.uint64(1) << np.uint64(bit)
    theirs[::7] = theirs[0]  # a hash that many images share
    apart = np.unpackbits((ours[:, None] ^ theirs).view(np.uint8).reshape(500, 3000, 8), axis=2).sum(2)
    found = doctor.nearest_hash(ours, theirs)
    assert ((found >= 0) == (apart.min(1) <= doctor.NEAR)).all() and (found >= 0).sum() > 150
    near = np.flatnonzero(found >= 0)
    assert (apart[near, found[near]] == apart.min(1)[near]).all()
    assert (doctor.nearest_hash(ours[:0], theirs) == []).all() and (doctor.nearest_hash(ours, theirs[:0]) == -1).all()
