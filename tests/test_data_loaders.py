"""The loaders: which images a run sees, in which order, and what the device does to a batch."""
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from builders import encoded, make_image_folder, open_loaders, pairs
from conftest import ROOT
from pipeline import augmentation, coco, loaders
from pipeline.ade20k import LabelFile
from pipeline.loaders import MapBatches
from recipes import RECIPES, Run
from tasks import classification, create_task
from utils import UserError

DIGITS = replace(RECIPES['moganet_xtiny_digits'], total_batch_size=24)
STRONG = replace(DIGITS, aa='rand-m9-mstd0.5-inc1', hflip=0.5, reprob=0.5, mixup=0.8, cutmix=1.0)


def run_of(world_size=1, batch_size=None, update_freq=1, total=24, **changes):
    batch_size = batch_size or total // world_size // update_freq
    return Run(world_size=world_size, batch_size=batch_size, update_freq=update_freq, num_workers=0, **changes)


def open_train(recipe, run=None, rank=0):
    return open_loaders(recipe, run or run_of(), rank=rank).train


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets)
        for a, b in zip(first, second, strict=True))


@pytest.fixture
def numbered(monkeypatch):
    """A source of 100 images whose label is their index, so that batches tell which images they hold."""
    class Numbered:
        in_memory, classes = True, [str(i) for i in range(100)]

        def __init__(self, *_):
            self.noise = np.random.default_rng(0).integers(0, 256, (100, 40, 40, 3), np.uint8)

        def __len__(self):
            return 100

        def read(self, index):
            return self.noise[index], index

        def name(self, index):
            return f'number {index}'

    monkeypatch.setattr(classification, 'open_source', Numbered)
    return replace(DIGITS, mixup=0, cutmix=0, aa=None, reprob=0.0)


def test_number_of_workers_changes_no_pixel():
    first, *others = [list(open_train(STRONG, replace(run_of(), num_workers=workers)).epoch(1))
                      for workers in (0, 1, 2)]
    assert len(first) == 1437 // 24
    assert all(same(first, other) for other in others)


@pytest.mark.parametrize('method', ['spawn', 'forkserver'])  # the defaults of macOS and of Python 3.14
def test_workers_that_are_not_forked_make_the_same_pixels(method):
    code = ('import multiprocessing, torch, test_data_loaders as t\n'
            f'multiprocessing.set_start_method({method!r})\n'
            'loader = t.open_train(t.STRONG, t.replace(t.run_of(), num_workers=1))\n'
            'batches = loader.epoch(1)\n'
            'first = [next(batches)]\n'
            'loader.close()\n'
            'print(t.same(first, [next(t.open_train(t.STRONG).epoch(1))]))')
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT / 'tests', timeout=120, capture_output=True, text=True)
    assert done.stdout == 'True\n', done.stderr


@pytest.mark.parametrize('workers', [0, 2])
def test_epoch_resumed_at_an_update_equals_its_rest(workers):
    run = replace(run_of(batch_size=6, update_freq=4), num_workers=workers)
    whole = list(open_train(STRONG, run).epoch(2))
    loader = open_train(STRONG, run)
    begun = loader.epoch(1)  # an epoch that is broken off leaves nothing behind
    next(begun)
    rest = list(loader.epoch(2, start_update=50))
    assert same(whole[50 * 4:], rest)
    loader.close()


def test_epochs_attempts_and_seeds_differ():
    def first(recipe=STRONG, **position):
        return next(open_train(recipe).epoch(**position)).images
    base = first(epoch=0)
    assert torch.equal(base, first(epoch=0))
    for other in (first(epoch=1), first(epoch=0, attempt=1), first(replace(STRONG, seed=1), epoch=0)):
        assert not torch.equal(base, other)


@pytest.mark.parametrize('world_size', [1, 2, 3])
def test_every_image_is_trained_on_once_an_epoch_and_evaluated_once(numbered, world_size):
    trained, evaluated = Counter(), Counter()
    for rank in range(world_size):
        opened = open_loaders(numbered, run_of(world_size), rank=rank)
        trained.update(label for _, labels in pairs(opened.train.epoch(0)) for label in labels.tolist())
        evaluated.update(label for _, labels in pairs(opened.val) for label in labels.tolist())
        assert opened.val.count == 100
    assert set(trained.values()) == {1}
    assert len(trained) == 96  # 4 updates of 24; the tail of 4 images is dropped
    assert evaluated == Counter(range(100))


def test_an_update_trains_on_the_same_images_whatever_the_world_size(numbered):
    def updates(world_size, update_freq):
        run, seen = run_of(world_size, update_freq=update_freq), [Counter() for _ in range(4)]
        for rank in range(world_size):
            for number, (_, labels) in enumerate(pairs(open_train(numbered, run, rank).epoch(3))):
                seen[number // update_freq].update(labels.tolist())
        return seen
    assert updates(1, 1) == updates(2, 3) == updates(3, 2) == updates(1, 4)


def test_an_images_pixels_do_not_depend_on_its_place(numbered):
    recipe = replace(numbered, aa='rand-m9-mstd0.5-inc1', reprob=1.0)
    alone = {label: image for rank in range(3)
             for images, labels in pairs(open_train(recipe, run_of(3), rank).epoch(0))
             for image, label in zip(images, labels.tolist(), strict=True)}
    for images, labels in pairs(open_train(recipe).epoch(0)):
        for image, label in zip(images, labels.tolist(), strict=True):
            assert torch.equal(image, alone[label])


def test_repeated_augmentation_gives_different_copies_in_one_process(numbered):
    recipe = replace(numbered, repeated_aug=3)
    batches = list(pairs(open_train(recipe).epoch(0)))
    labels = Counter(label for _, batch in batches for label in batch.tolist())
    assert sum(labels.values()) == 96 and len(labels) == 32 and set(labels.values()) == {3}
    images = {}
    for batch, numbers in batches:
        for image, label in zip(batch, numbers.tolist(), strict=True):
            images.setdefault(label, []).append(image)
    assert not any(torch.equal(a, b) for copies in images.values() for a, b in pairwise(copies))
    # With accumulation, the copies of an image are in different micro-batches
    for _, numbers in pairs(open_train(recipe, run_of(update_freq=3)).epoch(0)):
        assert len(set(numbers.tolist())) == len(numbers)


@pytest.mark.parametrize('mode', ['batch', 'pair', 'elem'])
@pytest.mark.parametrize('size', [8, 7])
@pytest.mark.parametrize('kind', ['mixup', 'cutmix', 'minmax'])
def test_mixup_mixes_targets_as_it_mixes_pixels(mode, size, kind):
    mixup = classification.BatchMixup(
        1.0 if kind == 'mixup' else 0.0, 1.0 if kind == 'cutmix' else 0.0, (0.3, 0.6) if kind == 'minmax' else None,
        mode=mode, label_smoothing=0.0, num_classes=size)
    np.random.seed(3)
    # Image i is i everywhere, so that its mean tells the share of each of its two sources
    images = torch.arange(size, dtype=torch.float32)[:, None, None, None].expand(size, 3, 20, 20).clone()
    mixed, targets = mixup(images, torch.arange(size))
    assert not torch.equal(mixed, torch.arange(size)[:, None, None, None].expand_as(mixed).float())
    torch.testing.assert_close(targets.sum(1), torch.ones(size))
    torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ torch.arange(size, dtype=torch.float32),
                               rtol=1e-5, atol=1e-5)  # float32 sums


def test_mixing_ends_before_the_last_epochs_and_smooths_where_it_is_on():
    recipe = replace(STRONG, epochs=4, mixup_off_epochs=1, smoothing=0.1)
    loader = open_train(recipe)
    soft, hard = (next(loader.epoch(epoch)).targets for epoch in (2, 3))
    assert soft.shape == (24, 10) and float(soft.min()) == pytest.approx(0.01)
    assert hard.dtype == torch.int64 and hard.shape == (24,)


@pytest.mark.parametrize('mode', ['pixel', 'rand', 'const'])
def test_random_erasing_fills_its_boxes_and_nothing_else(numbered, mode):
    plain = list(open_train(numbered).epoch(0))
    erased = list(open_train(replace(numbered, reprob=0.5, remode=mode, recount=2)).epoch(0))
    hit = 0
    for (before, _), (after, _) in zip(pairs(plain), pairs(erased), strict=True):
        for old, new in zip(before, after, strict=True):
            changed = (old != new).any(0)
            hit += bool(changed.any())
            if mode == 'const':
                assert (new[:, changed] == 0).all()
            if mode == 'rand' and changed.any():
                assert len({tuple(pixel.tolist()) for pixel in new[:, changed].T}) <= 2
    assert 0.35 < hit / 96 < 0.65  # three standard deviations around 0.5


def test_erasing_boxes_are_distributed_as_timms():
    from timm.data.random_erasing import RandomErasing
    recipe, areas, ours = replace(DIGITS, input_size=64, reprob=0.7), [], []
    erasing = RandomErasing(0.7, mode='const', device='cpu')
    augmentation.seed_image(0)
    for _ in range(3000):
        areas.append(float((erasing(torch.ones(1, 64, 64)) == 0).sum()))
        box = augmentation.erasing_boxes(recipe)[0]
        ours.append(float(box[2] * box[3]))
    from scipy.stats import ks_2samp
    assert ks_2samp(areas, ours).pvalue > 1e-3


OPTIONS = {
    'scale': (0.1, 0.2), 'ratio': (2.0, 2.5), 'hflip': 1.0, 'vflip': 1.0, 'aa': 'rand-m9-p1', 'color_jitter': 0.9,
    'reprob': 1.0, 'repeated_aug': 2, 'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5),
    'train_interpolation': 'bilinear',
    'input_size': 40, 'mixup': 0.8, 'cutmix': 1.0, 'cutmix_minmax': (0.2, 0.8),
    'seed': 7, 'total_batch_size': 12,
}


@pytest.mark.parametrize('name', OPTIONS)
def test_training_option_changes_the_batches(numbered, name):
    changed = replace(numbered, **{name: OPTIONS[name]})
    run = run_of(total=changed.total_batch_size)
    assert not same([next(open_train(numbered).epoch(0))], [next(open_train(changed, run).epoch(0))])


MIXING = {'mixup_prob': 0.0, 'mixup_switch_prob': 0.0, 'mixup_mode': 'elem', 'mixup_off_epochs': 8, 'smoothing': 0.3}


@pytest.mark.parametrize('name', MIXING)
def test_mixing_option_changes_the_batches(numbered, name):
    recipe = replace(numbered, mixup=0.8, cutmix=1.0)
    changed = replace(recipe, **{name: MIXING[name]})
    assert not same([next(open_train(recipe).epoch(0))], [next(open_train(changed).epoch(0))])


@pytest.mark.parametrize('changes', [{'test_size': 48}, {'crop_pct': 0.5}, {'interpolation': 'nearest'},
                                     {'crop_mode': 'squash'}, {'crop_mode': 'border'}])
def test_test_option_changes_the_batches(monkeypatch, changes):
    class Oblong:
        in_memory, classes = True, ['a', 'b']
        pixels = np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)

        def __init__(self, *_):
            pass

        def __len__(self):
            return 30

        def read(self, index):
            return self.pixels, 0

    monkeypatch.setattr(classification, 'open_source', Oblong)
    run = replace(run_of(), eval=True)
    base, other = (next(iter(open_loaders(recipe, run).val)).images
                   for recipe in (replace(DIGITS, crop_pct=0.9), replace(DIGITS, **({'crop_pct': 0.9} | changes))))
    assert not torch.equal(base, other)


def test_normalisation_is_that_of_the_recipe(numbered):
    images = next(iter(open_loaders(replace(numbered, crop_pct=1.0, test_size=40), run_of()).val)).images
    noise = np.random.default_rng(0).integers(0, 256, (100, 40, 40, 3), np.uint8)[:len(images)]
    expected = (torch.from_numpy(noise / 255.0) - torch.tensor(DIGITS.mean)) / torch.tensor(DIGITS.std)
    torch.testing.assert_close(images, expected.permute(0, 3, 1, 2).float(), rtol=0, atol=2e-6)  # float32 round-off


def test_labels_out_of_range_are_refused_on_the_cpu(numbered, monkeypatch):
    monkeypatch.setattr(classification, 'class_names', lambda _: [])
    source = classification.open_source()
    source.classes = []
    monkeypatch.setattr(classification, 'open_source', lambda *_: source)
    loader = open_train(replace(numbered, num_classes=50))
    with pytest.raises(UserError, match=r'number \d+, has label \d+, but the model has 50 classes: give --num_classes'):
        list(loader.epoch(0))


def test_wrong_class_counts_and_small_sets_are_refused_with_the_cure(numbered):
    with pytest.raises(UserError, match='--num_classes 50, but the data has 100 classes'):
        open_train(replace(numbered, num_classes=50))
    with pytest.raises(UserError, match=r'100 training images are fewer than one batch of 128; give --total.* 64'):
        open_train(replace(numbered, total_batch_size=128), run_of(batch_size=128))


def test_eval_and_disable_eval_open_only_what_they_need():
    evaluating = open_loaders(DIGITS, Run(eval=True, val_batch_size=100, num_workers=0), splits=('val',))
    assert evaluating.train is None and [len(batch) for batch in evaluating.val] == [100, 100, 100, 60]
    assert open_loaders(DIGITS, run_of(), splits=('train',)).val is None


def test_digits_are_the_fixed_split():
    opened = open_loaders(DIGITS, run_of())
    assert (opened.train.count, opened.val.count, opened.task.recipe.num_classes) == (1437, 360, 10)
    counts = Counter(label for _, labels in pairs(opened.val) for label in labels.tolist())
    assert set(counts) == set(range(10)) and min(counts.values()) >= 34


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    with pytest.raises(UserError, match='pip install'):
        open_train(DIGITS)


def test_fake_data_makes_ten_updates():
    opened = open_loaders(replace(DIGITS, data_set='fake', num_classes=7), run_of())
    assert opened.train.updates_per_epoch == 10 and opened.task.recipe.num_classes == 7
    first, again = next(opened.train.epoch(0)), next(opened.train.epoch(0))
    assert same([first], [again])


def test_batches_that_are_kept_are_not_overwritten():
    loader = open_train(DIGITS)
    kept = list(loader.epoch(0))
    views = [batch.images[:2] for batch in loader.epoch(0)]
    assert all(torch.equal(view, batch.images[:2]) for view, batch in zip(views, kept, strict=True))


def test_workers_ignore_the_signals_of_a_preemption():
    loader = open_train(STRONG, replace(run_of(), num_workers=2))
    batches = loader.epoch(0)
    first = [next(batches)]
    for worker in loader._workers._iterator._workers:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(worker.pid, number)
    assert same(first + list(batches), list(open_train(STRONG).epoch(0)))
    loader.close()


def test_the_workers_of_an_evaluation_live_on_to_the_next():
    loader = open_loaders(DIGITS, replace(run_of(), num_workers=2)).val
    passes = [(list(loader), [worker.pid for worker in loader._workers._iterator._workers]) for _ in range(2)]
    (first, workers), (second, same_workers) = passes
    assert same(first, second) and workers == same_workers and len(set(workers)) == 2
    loader.close()


def test_a_process_that_forgets_to_close_its_loaders_ends():
    code = ('import datasets, tasks; from recipes import resolve\n'
            "recipe, run = resolve('--recipe moganet_xtiny_digits --num_workers 2 --val_batch_size 9'.split())\n"
            'loaders = datasets.build_loaders(tasks.create_task(recipe, run), run)\nbatches = loaders.train.epoch(0)\n'
            'next(batches)\ntests = iter(loaders.val)\nnext(tests)\nprint("end")')
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, 'end\n'), done.stderr


@pytest.mark.parametrize('workers', [0, 2])
def test_corrupt_image_stops_the_run_by_name_or_is_replaced_and_counted(tmp_path, monkeypatch, workers):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    make_image_folder(tmp_path, classes=2, train=6, val=6)
    broken = tmp_path / 'train' / 'class0' / '3.png'
    broken.write_bytes(broken.read_bytes()[:600])
    recipe = replace(DIGITS, data_set='image_folder', total_batch_size=4)
    run = replace(run_of(total=4), data_path=str(tmp_path), num_workers=workers)
    said = r'image 3, .*train/class0/3\.png, cannot be read .*--on_bad_image skip'
    with pytest.raises(UserError, match=said) as caught:
        list(open_train(recipe, run).epoch(0))
    assert '\n' not in str(caught.value)
    skipping = replace(recipe, on_bad_image='skip')
    loader = open_train(skipping, run)
    batches = list(loader.epoch(0))
    assert list(map(len, batches)) == [4, 4, 4] and loader.bad_images == 1
    assert same(batches, list(open_train(skipping, run_of(total=4, data_path=str(tmp_path))).epoch(0)))
    loader.close()


def test_bad_images_are_counted_when_their_batch_is_trained_on_not_when_it_is_prepared(numbered, monkeypatch):
    """CUDA prepares a batch ahead; a run that stops before it is trained on prepares it again."""
    def one_ahead(batches, _):
        waiting = next(batches)
        for batch in batches:
            yield waiting
            waiting = batch
        yield waiting

    monkeypatch.setattr(loaders, 'ahead', one_ahead)
    monkeypatch.setattr(loaders.MapBatches, '__getitem__', lambda self, keys: (classification.Crops(
        torch.zeros(24, 32, 32, 3, dtype=torch.uint8), torch.zeros(24, dtype=torch.int64),
        torch.zeros(24, 1, 4, dtype=torch.int32), torch.zeros(24, dtype=torch.int64)), 1))
    loader = open_train(numbered)
    assert [loader.bad_images for _ in loader.epoch(0)] == [1, 2, 3, 4]


def test_evaluation_refuses_a_corrupt_image(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    make_image_folder(tmp_path, classes=2, train=0, val=6)
    (tmp_path / 'val' / 'class1' / '1.png').write_bytes(b'no image')
    recipe = replace(DIGITS, data_set='image_folder', on_bad_image='skip')
    with pytest.raises(UserError, match=r'val/class1/1\.png, cannot be read'):
        list(open_loaders(recipe, Run(eval=True, data_path=str(tmp_path), num_workers=0), splits=('val',)).val)


ERRORS = (MemoryError(), RuntimeError('sizes'), Image.DecompressionBombError('large'), IndexError(), OSError(5, 'disk'))


@pytest.mark.parametrize('error', ERRORS, ids=repr)
@pytest.mark.parametrize('place', ['reading', 'transform'])
def test_whatever_an_image_makes_a_library_raise_it_is_named_or_replaced(numbered, monkeypatch, error, place):
    transforms = augmentation.TrainTransform, augmentation.TestTransform

    def batch(training=True, **changes):
        task = create_task(replace(numbered, num_classes=100, **changes), run_of())
        source = task.open('train' if training else 'val')

        def fail_at(call, *, image):
            def failing(self, given):
                if np.array_equal(given, image):
                    raise error
                return call(self, given)
            return failing

        with monkeypatch.context() as patch:
            if place == 'reading':
                patch.setattr(type(source), 'read', fail_at(type(source).read, image=3))
            else:
                for transform in transforms:
                    patch.setattr(transform, '__call__', fail_at(transform.__call__, image=source.noise[3]))
            return MapBatches(source, task, training=training)[np.array([[0, 2, 0], [0, 3, 0]])]

    for said in (batch(), batch(training=False), batch(training=False, on_bad_image='skip')):
        assert said.startswith('image 3, number 3, cannot be read (') and '\n' not in said
        assert (error.strerror if isinstance(error, OSError) else type(error).__name__) in said
    assert '--on_bad_image skip' in batch() and 'replace or remove' in batch(training=False)
    assert batch(on_bad_image='skip')[1] == 1


def test_in_a_small_set_each_bad_image_is_replaced_by_a_good_one(numbered, monkeypatch):
    """The image that derives itself as its substitute too: one in ten does, in a set of ten."""
    task = create_task(replace(numbered, num_classes=100, on_bad_image='skip'), run_of())
    source = task.open('train')
    monkeypatch.setattr(type(source), '__len__', lambda self: 10)
    read = type(source).read
    for bad in range(10):
        def broken(self, index, bad=bad):
            if index == bad:
                raise OSError('broken')
            return read(self, index)
        monkeypatch.setattr(type(source), 'read', broken)
        batch, replaced = MapBatches(source, task, training=True)[np.array([[0, bad, 0]])]
        assert replaced == 1 and batch.targets.tolist() != [bad]


def test_a_fault_of_every_image_is_told_and_not_replaced_for_ever(numbered, monkeypatch):
    monkeypatch.setattr(augmentation.TrainTransform, '__call__', lambda self, image: undefined)  # noqa: F821
    task = create_task(replace(numbered, num_classes=100, on_bad_image='skip'), run_of())
    said = MapBatches(task.open('train'), task, training=True)[np.array([[0, 3, 0]])]
    assert "cannot be read (NameError: name 'undefined' is not defined)" in said


@pytest.mark.gpu
def test_cuda_prefetcher_gives_what_the_cpu_gives():
    recipe = replace(STRONG, reprob=0.0)  # the two devices draw different noise
    on_gpu = open_loaders(recipe, replace(run_of(), num_workers=2), device='cuda').train
    batches = zip(pairs(on_gpu.epoch(0)), pairs(open_train(recipe).epoch(0)), strict=True)
    for (images, targets), (expected, labels) in batches:
        torch.testing.assert_close(images.cpu(), expected, rtol=0, atol=1e-5)  # fused multiply-add
        torch.testing.assert_close(targets.cpu(), labels)
    on_gpu.close()


@pytest.mark.parametrize('words, wanted', [
    (dict(num_workers=2), 2 * 2 * 12 * 3 * 64**2), (dict(num_workers=0), 0),
    (dict(num_workers=1, val_batch_size=50), 2 * 50 * 3 * 64**2)])
def test_shared_memory_that_cannot_hold_the_workers_batches_is_refused_before_they_start(words, wanted, monkeypatch):
    recipe = replace(RECIPES['moganet_xtiny'], data_set='fake', input_size=64, test_size=64, num_classes=3)
    run = replace(run_of(), batch_size=8, update_freq=128, **words)

    def of(room: int) -> None:
        monkeypatch.setattr(os, 'statvfs', lambda path: SimpleNamespace(f_blocks=room, f_frsize=1))
        open_loaders(recipe, run).close()

    of(wanted)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    if wanted:
        with pytest.raises(UserError, match=r'share up to [12] MB of batches, and /dev/shm has [12]: .*--shm-size=16g'):
            of(2 * wanted - 1)
    of(2 * wanted)


@pytest.mark.parametrize('row, training', [
    ('retinanet_moganet_digits', False), ('semantic_fpn_moganet_digits', True), ('semantic_fpn_moganet_digits', False)])
def test_a_sample_of_a_dense_task_takes_no_more_shared_memory_than_is_said(row, training):
    task = create_task(replace(RECIPES[row], num_classes=11), run_of())
    width, height = RECIPES[row].image_scale
    image = encoded(Image.new('RGB', (width, height)))  # fills its room
    target = coco.Annotations.none((height, width)) if 'retinanet' in row else LabelFile(
        'labels.png', encoded(Image.fromarray(np.ones((height, width), np.uint8)), 'PNG'), True, None, None)
    batch = task.collate([task.sample((image, target), 1 if training else None)])
    taken = sum(value.nbytes for value in vars(batch).values() if isinstance(value, torch.Tensor))
    if isinstance(labels := getattr(batch, 'labels', None), list):
        taken += sum(label.nbytes for label in labels)
    # The labels of a test come at the image's own size, which nobody knows beforehand
    assert taken / 1.4 <= task.sample_bytes(training=training) <= 2 * taken
