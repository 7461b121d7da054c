"""The fast image operations against Pillow's and timm's, on photographs: each one, their sampling, the whole."""
import io
import json
import logging
import os
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as photos
from timm.data import auto_augment, create_transform

from conftest import ROOT
from pipeline import augmentation
from pipeline.labels import BadLabel
from recipes import RECIPES

PHOTOS = [Image.fromarray(getattr(photos, name)()) for name in ('astronaut', 'chelsea', 'coffee', 'rocket')]
SQUARE = np.array(PHOTOS[0].resize((224, 224), Image.Resampling.BICUBIC))
OBLONG = np.array(PHOTOS[2].resize((200, 120), Image.Resampling.BICUBIC))
SMALL = replace(RECIPES['moganet_small'], name='test')

# Parameters over timm's whole range, then the bounds: mean and largest difference in grey levels. Those of 0 are the
# same bits. The bicubic ones truncate, which float32 does at another place in one value of hundreds; near whole pixels
# many values lie just below whole levels, and it is one of tens. (Shifts by whole pixels themselves are left out: there
# Pillow's float64 turns k into k - 1e-13, and a fifth of its values are one level too dark.)
BICUBIC = (0.05, 1)
OPERATIONS = {
    'AutoContrast': ([()], 0, 0), 'Equalize': ([()], 0, 0), 'Invert': ([()], 0, 0),
    'Posterize': ([(bits,) for bits in range(9)], 0, 0),
    'Solarize': ([(level,) for level in range(0, 257, 8)], 0, 0),
    'SolarizeAdd': ([(level,) for level in range(0, 111, 5)], 0, 0),
    'Color': ([(float(x),) for x in np.linspace(0.1, 1.9, 19)], 0, 0),
    'Contrast': ([(float(x),) for x in np.linspace(0.1, 1.9, 19)], 0, 0),
    'Brightness': ([(float(x),) for x in np.linspace(0.1, 1.9, 19)], 0, 0),
    'Sharpness': ([(float(x),) for x in np.linspace(0.1, 1.9, 19)], 0, 0),
    'Desaturate': ([(float(x),) for x in np.linspace(0.5, 1.0, 6)], 0, 0),
    'ShearX': ([(float(x),) for x in np.linspace(-0.3, 0.3, 25)], *BICUBIC),
    'ShearY': ([(float(x),) for x in np.linspace(-0.3, 0.3, 25)], *BICUBIC),
    'TranslateXRel': ([(float(x),) for x in np.linspace(-0.45, 0.45, 38)], *BICUBIC),
    'TranslateYRel': ([(float(x),) for x in np.linspace(-0.45, 0.45, 38)], *BICUBIC),
    'TranslateX': ([(float(x),) for x in np.linspace(-249.7, 249.9, 22)], *BICUBIC),
    'TranslateY': ([(float(x),) for x in np.linspace(-249.7, 249.9, 22)], *BICUBIC),
    'Rotate': ([(float(x),) for x in [*np.linspace(-30, 30, 25), 90, 180, 359.5]], *BICUBIC),
    'GaussianBlurRand': ([(float(x),) for x in np.linspace(0.0, 1.0, 5)], 0, 0),
    'GaussianBlur': ([(float(x),) for x in np.linspace(0.1, 2.0, 5)], 0, 0),
}
SETTINGS = {'fillcolor': (124, 116, 104), 'resample': Image.Resampling.BICUBIC}


def encoded(image, form='JPEG', **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def difference(a, b):
    off = np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int))
    return off.mean(), off.max()


@pytest.mark.parametrize('name', OPERATIONS)
def test_operation_equals_timms_over_its_whole_range(name):
    parameters, mean, largest = OPERATIONS[name]
    theirs = auto_augment.NAME_TO_OP[name]
    ours = augmentation.array_operation(theirs)
    for image in (SQUARE, OBLONG, OBLONG[:1].copy(), OBLONG[:, :2].copy(), np.full((9, 9, 3), 128, np.uint8)):
        worst = np.zeros(2)
        for arguments in parameters:
            random.seed(1)
            expected = theirs(Image.fromarray(image), *arguments, **SETTINGS)
            random.seed(1)
            got = ours(image.copy(), *arguments, **SETTINGS)
            assert got.dtype == np.uint8 and got.shape == image.shape
            worst = np.maximum(worst, difference(got, expected))
        # One of a few hundred values is more than the mean over a photograph
        assert worst[1] <= largest and (worst[0] <= mean or image.size < 10000), worst


@pytest.mark.parametrize('name', ['Rotate', 'ShearX', 'TranslateYRel'])
def test_other_interpolations_go_through_pillow(name):
    settings = SETTINGS | {'resample': (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)}
    theirs = auto_augment.NAME_TO_OP[name]
    for seed in range(6):
        random.seed(seed)
        expected = theirs(Image.fromarray(SQUARE), 0.2, **settings)
        random.seed(seed)
        got = augmentation.array_operation(theirs)(SQUARE, 0.2, **settings)
        assert difference(got, expected)[0] <= BICUBIC[0] and difference(got, expected)[1] <= 1


RECIPE_CHANGES = {
    'randaugment': {}, 'm7': {'aa': 'rand-m7-mstd0.5-inc1'}, 'm6': {'aa': 'rand-m6-mstd0.5-inc1', 'input_size': 160},
    '3a': {'aa': '3a', 'color_jitter': 0.3, 'input_size': 256}, 'jitter': {'aa': None, 'color_jitter': 0.4},
    'flips': {'aa': None, 'color_jitter': None, 'vflip': 0.5}, 'autoaugment': {'aa': 'original-mstd0.5'},
    'random interpolation': {'train_interpolation': 'random'}, 'bilinear': {'train_interpolation': 'bilinear'},
    'augmix': {'aa': 'augmix-m5-w2'}, 'weights': {'aa': 'rand-m9-n3-mstd101-inc1-tweights'},
}


@pytest.mark.parametrize('name', RECIPE_CHANGES)
def test_from_one_seed_the_pipeline_makes_the_image_that_timm_makes(name):
    """So operations, levels, crops and flips are drawn as timm draws them: with its code, in its order."""
    recipe = replace(SMALL, **RECIPE_CHANGES[name])
    ours = augmentation.TrainTransform(recipe)
    theirs = create_transform(
        recipe.input_size, is_training=True, scale=recipe.scale, ratio=recipe.ratio, hflip=recipe.hflip,
        vflip=recipe.vflip, color_jitter=recipe.color_jitter, auto_augment=recipe.aa,
        interpolation=recipe.train_interpolation, mean=recipe.mean, std=recipe.std, use_prefetcher=True)
    files = [encoded(photo, quality=85 + 3 * number) for number, photo in enumerate(PHOTOS)]
    means = []
    for seed in range(32):
        file = files[seed % len(files)]
        augmentation.seed_image(seed)
        got = ours(file)
        augmentation.seed_image(seed)
        expected = theirs(Image.open(io.BytesIO(file)).convert('RGB')).permute(1, 2, 0).numpy()
        means.append(difference(got, expected)[0])
    # A grey level of difference can move a value over a threshold of solarize, so only the means are bounded
    assert np.mean(means) < 0.02 and max(means) < 0.5


def test_operations_and_levels_are_sampled_as_timms():
    """RandAugment on ours and on timm's own streams, with other seeds: the same frequencies of operation and level."""
    from scipy.stats import chi2_contingency, ks_2samp
    recipe, counts, levels = replace(SMALL, aa='rand-m9-mstd0.5-inc1'), [], []
    for ours in (False, True):
        composed = create_transform(224, is_training=True, auto_augment=recipe.aa, interpolation='bicubic')
        augment = composed.transforms[2]
        call = augmentation.on_arrays(augment) if ours else augment
        seen, drawn = dict.fromkeys((operation.name for operation in augment.ops), 0), []
        for operation in augment.ops:
            def note(image, *arguments, name=operation.name, seen=seen, drawn=drawn, **_):
                seen[name] += 1
                if name == 'Rotate':
                    drawn.append(arguments[0])
                return image
            operation.aug_fn = note
        augmentation.seed_image(int(ours))
        for _ in range(6000):
            call(SQUARE)
        counts.append(list(seen.values()))
        levels.append(drawn)
    assert chi2_contingency(counts).pvalue > 1e-3
    assert ks_2samp(*levels).pvalue > 1e-3
    assert abs(sum(counts[1]) / 6000 - 1) < 0.05  # two draws of probability one half


def test_randaugment_survives_its_strongest_levels():
    """timm 1.0.31's posterize comes to 0 bits, which Pillow 13 refuses."""
    for level in (10, 10.0):
        operation = auto_augment.AugmentOp('PosterizeIncreasing', prob=1.0, magnitude=level)
        assert np.asarray(operation(Image.fromarray(SQUARE))).max() == 0
    transform = augmentation.TrainTransform(replace(SMALL, input_size=32, aa='rand-m9-mstd0.5-inc1'))
    rng = np.random.default_rng(0)
    for seed in range(3000):
        augmentation.seed_image(seed)
        assert transform(rng.integers(0, 256, (40, 50, 3), np.uint8)).shape == (32, 32, 3)


@pytest.mark.parametrize('form', ['plain', 'progressive', 'restart', 'grey', '444', '422'])
def test_decoding_equals_pillows_and_its_upper_part_the_whole(form):
    options = {'progressive': {'progressive': True}, 'restart': {'restart_marker_blocks': 5}, '444': {'subsampling': 0},
               '422': {'subsampling': 1}}.get(form, {})
    for photo in PHOTOS[1:3]:
        file = encoded(photo.convert('L') if form == 'grey' else photo, **options)
        whole = np.asarray(Image.open(io.BytesIO(file)).convert('RGB'))
        np.testing.assert_array_equal(augmentation.decode(file), whole)
        shorter = 0
        for rows in range(1, len(whole) + 1, 7):
            part = augmentation.decode_top(file, rows)
            np.testing.assert_array_equal(part[:rows], whole[:rows])
            shorter += len(part) < len(whole)
        assert (shorter > 0) == (form != 'progressive')


def test_resizing_differs_from_pillows_by_two_grey_levels_at_most():
    transform = augmentation.TrainTransform(replace(SMALL, aa=None, color_jitter=None, hflip=0.0))
    theirs = create_transform(224, is_training=True, scale=(0.08, 1), hflip=0.0, color_jitter=None,
                              interpolation='bicubic', use_prefetcher=True)
    worst = np.zeros(2)
    for seed in range(40):
        file = encoded(PHOTOS[seed % 4], 'PNG')
        augmentation.seed_image(seed)
        got = transform(file)
        augmentation.seed_image(seed)
        expected = theirs(Image.open(io.BytesIO(file)).convert('RGB')).permute(1, 2, 0).numpy()
        worst = np.maximum(worst, difference(got, expected))
    assert worst[0] < 0.02 and worst[1] <= 2, worst


@pytest.mark.parametrize('changes', [{}, {'crop_pct': 0.95}, {'test_size': 384, 'crop_pct': 1.0, 'crop_mode': 'squash'},
                                     {'crop_mode': 'border'}, {'interpolation': 'bilinear'}])
def test_test_transform_equals_timms_within_one_level(changes):
    recipe = replace(SMALL, **changes)
    theirs = create_transform(recipe.test_size, crop_pct=recipe.crop_pct, crop_mode=recipe.crop_mode,
                              interpolation=recipe.interpolation, mean=recipe.mean, std=recipe.std)
    for photo in PHOTOS:
        file = encoded(photo)
        expected = theirs(Image.open(io.BytesIO(file)).convert('RGB'))
        pixels = torch.from_numpy(augmentation.TestTransform(recipe)(file)).permute(2, 0, 1) / 255
        got = (pixels - torch.tensor(recipe.mean)[:, None, None]) / torch.tensor(recipe.std)[:, None, None]
        torch.testing.assert_close(got, expected, rtol=0, atol=1 / 255)


@pytest.mark.parametrize('interpolation', ['bicubic', 'bilinear', 'lanczos'])
@pytest.mark.parametrize('crop_mode', ['center', 'squash'])
def test_test_crop_has_pillows_bits_whatever_the_sizes(interpolation, crop_mode, monkeypatch):
    """Larger and smaller, of few pixels and of many, where the crop takes the whole, a part or an odd rest of it."""
    rng, fast = np.random.default_rng(0), []
    kernel = augmentation.kernels.resized_crop
    monkeypatch.setattr(augmentation.kernels, 'resized_crop', lambda *words: fast.append(words) or kernel(*words))
    for number in range(60):
        height, width = (int(side) for side in rng.integers(4, 60 if number % 3 else 700, 2))
        size, crop_pct = int(rng.integers(8, 120)), float(rng.choice([0.5, 0.875, 0.9, 0.95, 1.0]))
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        recipe = replace(SMALL, test_size=size, crop_pct=crop_pct, crop_mode=crop_mode, interpolation=interpolation)
        theirs = create_transform(size, crop_pct=crop_pct, crop_mode=crop_mode, interpolation=interpolation,
                                  use_prefetcher=True)
        expected = theirs(Image.fromarray(pixels)).permute(1, 2, 0).numpy()
        got = augmentation.TestTransform(recipe)(pixels)
        assert got.flags.c_contiguous and (got == expected).all(), (height, width, size, crop_pct)
    # Each transform calls it once beside, to have it compiled
    assert len(fast) == (0 if interpolation == 'lanczos' else 120)


def test_without_the_fast_packages_the_same_images_are_made(tmp_path):
    code = (
        "import sys\nfor name in sys.argv[1].split(): sys.modules[name] = None\n"
        "import logging; logging.basicConfig(format='%(message)s')\n"
        'import numpy as np\nfrom pipeline import augmentation\n'
        'from dataclasses import replace\nfrom recipes import RECIPES\n'
        "file = open(sys.argv[2], 'rb').read()\n"
        "out = []\n"
        "for aa in ('rand-m9-mstd0.5-inc1', None):\n"
        "    transform = augmentation.TrainTransform(replace(RECIPES['moganet_small'], aa=aa))\n"
        '    for seed in range(12):\n        augmentation.seed_image(seed)\n        out.append(transform(file))\n'
        'np.save(sys.argv[3], np.stack(out))\n')

    def run(missing, folder):
        path = os.path.join(folder, f'{len(missing)}.npy')
        done = subprocess.run([sys.executable, '-c', code, missing, os.path.join(folder, 'photo.jpg'), path], cwd=ROOT,
                              check=True, capture_output=True, text=True)
        return np.load(path), done.stderr

    PHOTOS[2].save(tmp_path / 'photo.jpg')
    fast, silence = run('', tmp_path)
    slow, warning = run('numba simplejpeg', tmp_path)
    assert 'simplejpeg and numba cannot be imported' in warning and warning.count('imported') == 1
    assert 'imported' not in silence
    means = np.abs(fast.astype(int) - slow).mean((1, 2, 3))
    assert means.mean() < 0.02 and means.max() < 0.5


@pytest.mark.slow
def test_digits_trained_on_both_pipelines_reach_the_same_accuracy(tmp_path):
    """With RandAugment, three seeds each: the means differ by less than the seeds do."""
    code = ("import sys\nfor name in sys.argv[1].split(): sys.modules[name] = None\n"
            'from main import main; raise SystemExit(main(sys.argv[2:]))')
    accuracies = []
    for missing in ('', 'numba simplejpeg'):
        accuracies.append([])
        for seed in range(3):
            folder = tmp_path / f'{len(missing)}-{seed}'
            subprocess.run([sys.executable, '-c', code, missing, '--recipe', 'moganet_xtiny_digits', '--aa',
                            'rand-m9-mstd0.5-inc1', '--epochs', '2', '--model_ema', 'false', '--seed', str(seed),
                            '--output_dir', str(folder)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            accuracies[-1].append(json.loads((folder / 'log.txt').read_text().splitlines()[-1])['test_acc1'])
    fast, slow = np.array(accuracies)
    spread = max(fast.std(ddof=1), slow.std(ddof=1), 1.0)
    logging.getLogger().warning('fast %s, slow %s', fast, slow)
    assert min(fast.mean(), slow.mean()) > 80
    assert abs(fast.mean() - slow.mean()) < 2 * spread


# ---- Bad images -----------------------------------------------------------------------------------------------------

def forms():
    """One small photograph as files of every kind that the data of this trade comes in, bytes by name."""
    photo = PHOTOS[1].resize((48, 40))
    deep = Image.fromarray(np.asarray(photo.convert('L')).astype(np.uint16) * 257)
    alpha = photo.copy()
    alpha.putalpha(128)
    kinds = {'jpeg': (photo, 'JPEG', {}), 'progressive jpeg': (photo, 'JPEG', {'progressive': True}),
             'grey jpeg': (photo.convert('L'), 'JPEG', {}), 'cmyk jpeg': (photo.convert('CMYK'), 'JPEG', {}),
             'png': (photo, 'PNG', {}), 'palette png': (photo.convert('P'), 'PNG', {'transparency': b'\x01\x80'}),
             '16-bit png': (deep, 'PNG', {}), 'rgba png': (alpha, 'PNG', {}), 'webp': (photo, 'WEBP', {}),
             'gif': (photo.convert('P'), 'GIF', {}), 'bmp': (photo, 'BMP', {}), 'tiff': (photo, 'TIFF', {}),
             'lzw tiff': (photo, 'TIFF', {'compression': 'tiff_lzw'}),
             'jpeg tiff': (photo, 'TIFF', {'compression': 'jpeg'}), 'jpeg 2000': (photo, 'JPEG2000', {})}
    return {name: encoded(image, form, **options) for name, (image, form, options) in kinds.items()}


def damaged(file, rng):
    """A file with bytes flipped, zeroed, inserted, repeated, or cut off; the head, which has the sizes, more often."""
    end = len(file) if rng.random() < 0.5 else min(len(file), 200)
    at, length = int(rng.integers(end)), int(rng.integers(1, 40))
    kind = rng.integers(5)
    if kind == 0:
        return file[:at]
    if kind == 1:
        return file[:at] + bytes(length) + file[at + length:]
    if kind == 2:
        return file[:at] + rng.bytes(length) + file[at:]
    if kind == 3:
        return file[:at + length] + file[at:]
    changed = np.frombuffer(file, np.uint8).copy()
    changed[rng.integers(0, end, length)] ^= (1 << rng.integers(0, 8, length)).astype(np.uint8)
    return changed.tobytes()


def try_damage(files, count, seed=0, damage=damaged):
    """Damages each file `count` times. Returns how many were read and how many refused; anything else is raised."""
    recipe = replace(SMALL, input_size=32, test_size=32)
    transforms = augmentation.TrainTransform(recipe), augmentation.TestTransform(recipe)
    rng = np.random.default_rng(seed)
    read = refused = 0
    for name, file in files.items():
        for number in range(count):
            bad = damage(file, rng)
            augmentation.seed_image(number)
            try:
                with augmentation.refusing_bad_images():
                    pixels = transforms[number % 2](bad)
                assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8, name
                read += 1
            except augmentation.BadImage as error:
                assert str(error) and '\n' not in str(error), name
                refused += 1
    return read, refused


def test_whatever_is_damaged_the_image_is_read_or_is_a_bad_image_and_no_warning_is_shown(recwarn):
    assert try_damage(forms(), 2, damage=lambda file, _: file) == (30, 0)
    read, refused = try_damage(forms(), 100)
    assert read > 200 and refused > 600
    assert not [warning for warning in recwarn if 'PIL' in warning.filename]


class Unusual(Exception):
    pass


@pytest.mark.parametrize('error', [
    OSError(5, 'broken pipe'), Image.DecompressionBombError('large'), MemoryError(), RuntimeError('sizes\nof 0'),
    IndexError('index'), KeyError('tag'), OverflowError(), AssertionError(), Unusual('never heard of')], ids=repr)
def test_any_error_over_an_image_says_its_type_in_one_line_and_an_interrupt_is_none(error):
    with pytest.raises(augmentation.BadImage) as caught, augmentation.refusing_bad_images():
        raise error
    assert caught.value.__cause__ is error and '\n' not in str(caught.value)
    assert isinstance(error, OSError) or type(error).__name__ in str(caught.value)
    with pytest.raises(KeyboardInterrupt), augmentation.refusing_bad_images():
        raise KeyboardInterrupt


@pytest.mark.parametrize('error', [OSError(24, 'Too many open files'), OSError(12, 'no memory'),
                                   BadLabel('has label 7')], ids=repr)
def test_what_the_machine_lacks_and_a_wrong_label_are_no_bad_image(error):
    with pytest.raises(type(error)) as caught, augmentation.refusing_bad_images():
        raise error
    assert caught.value is error


def test_a_header_that_promises_gigapixels_is_a_bad_image_at_once():
    file = bytearray(encoded(PHOTOS[0].resize((64, 64)), restart_marker_blocks=4))
    size = file.index(b'\xff\xc0') + 5
    file[size:size + 4] = b'\xff\xdc\xff\xdc'  # 65,500 by 65,500
    for transform in (augmentation.TrainTransform(SMALL), augmentation.TestTransform(SMALL)):
        with pytest.raises(augmentation.BadImage, match='DecompressionBomb'), augmentation.refusing_bad_images():
            transform(bytes(file))


@pytest.mark.parametrize('shape', [(1, 1), (1, 2), (3, 1), (1, 60000), (60000, 1), (2, 700), (101, 1)])
@pytest.mark.parametrize('mode', ['center', 'squash', 'border'])
def test_extreme_shapes_are_read_or_bad_and_take_no_gigabytes(shape, mode, monkeypatch):
    """Their resized pixels are bounded: a line of 60,000 would be resized to 3.9 gigapixels before its crop."""
    recipe, sizes = replace(SMALL, crop_mode=mode), []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, 'resize', lambda self, size, *rest, **named: (
        sizes.append(size), resize(self, size, *rest, **named))[1])
    file = encoded(Image.new('RGB', shape, (200, 30, 30)), 'PNG')
    try:
        with augmentation.refusing_bad_images():
            pixels = augmentation.TestTransform(recipe)(file)
        assert pixels.shape == (224, 224, 3)
        assert mode == 'border' or (pixels == (200, 30, 30)).all()
    except augmentation.BadImage:
        assert mode == 'border'  # whose shorter side would be resized to nothing
    assert max(width * height for width, height in sizes) <= 100 * 250**2
    train = augmentation.TrainTransform(replace(SMALL, aa=None, color_jitter=None))
    for seed in range(50):
        augmentation.seed_image(seed)
        assert (train(file) == (200, 30, 30)).all()


def test_the_middle_of_a_long_image_is_the_crop_of_the_whole():
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (60, 3, 3), np.uint8)).resize((12, 1224), Image.Resampling.BICUBIC)
    recipe = replace(SMALL, test_size=32, crop_pct=0.9)
    theirs = create_transform(32, crop_pct=0.9, interpolation='bicubic', use_prefetcher=True)
    got = augmentation.TestTransform(recipe)(np.asarray(coarse))
    assert difference(got, theirs(coarse).permute(1, 2, 0))[1] == 0
