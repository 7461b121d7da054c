"""Where images come from: folders with everything that is found in folders, tar files, streams, the index of files."""
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

import engine
from builders import (
    encoded,
    open_loaders,
    pairs,
    photo,
    tar,
    write,
    write_cifar,
    write_meta,
    write_parquet,
    write_shards,
)
from conftest import ROOT
from pipeline import augmentation, files
from pipeline.sources import ImageFiles
from recipes import RECIPES, Run
from tasks.classification import Accuracy
from tools import check_dataset
from utils import UserError

RECIPE = replace(RECIPES['moganet_xtiny_digits'], data_set='image_folder', total_batch_size=4)
PHOTO = photo()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


def folder(root, classes='ab', count=4):
    for split in ('train', 'val'):
        for name in classes:
            for number in range(count):
                write(root / split / name / f'{number}.jpg')
    return root


def loaders(root, recipe=RECIPE, **changes):
    run = Run(data_path=str(root), batch_size=recipe.total_batch_size, update_freq=1, num_workers=0)
    run = replace(run, **changes)
    splits = ('val',) if run.eval else ('train',) if run.disable_eval else ('train', 'val')
    return open_loaders(recipe, run, splits=splits)


# ---- Folders --------------------------------------------------------------------------------------------------------

def test_a_folder_with_everything_in_it(tmp_path):
    root = folder(tmp_path / 'data', 'a')
    odd = root / 'train' / 'b'
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20000, 3), np.uint8))
    deep = Image.fromarray((np.arange(120 * 90, dtype=np.uint16) * 6).reshape(90, 120))
    content = {
        'cmyk.jpg': encoded(PHOTO.convert('CMYK')), 'grey.jpg': encoded(PHOTO.convert('L')),
        'sixteen bits.png': encoded(deep, 'PNG'), 'transparent.png': encoded(PHOTO.convert('RGBA'), 'PNG'),
        'palette.gif': encoded(PHOTO, 'GIF'), 'rotated.jpg': encoded(PHOTO, exif=exif), 'dot.png': encoded(
            PHOTO.resize((1, 1)), 'PNG'), 'wide.png': encoded(wide, 'PNG'), 'Äpfel 苹果 🍎.JPEG': encoded(),
        'progressive.jpg': encoded(progressive=True), 'png inside.JPEG': encoded(PHOTO, 'PNG'), 'web.webp': encoded(
            PHOTO, 'WEBP')}
    for name, file in content.items():
        write(odd / name, file)
        write(root / 'val' / 'b' / name, file)
    write(odd / 'notes.txt', b'no image')
    write(odd / '.hidden.jpg', b'no image')
    opened = loaders(root)
    assert opened.task.classes == ['a', 'b'] and opened.train.count == 4 + len(content)
    for batches in (opened.train.epoch(0), opened.val):
        for images, _ in pairs(batches):
            assert images.shape[1:] == (3, 32, 32) and images.isfinite().all()
    files = ImageFiles(root / 'train')
    pixels = {Path(files.name(index)).name: augmentation.decode(files.read(index)[0]) for index in range(len(files))}
    assert set(content) <= set(pixels)
    # As Pillow, and so timm, reads them: EXIF's rotation and transparency are ignored
    for name in set(content) - {'sixteen bits.png'}:
        np.testing.assert_array_equal(pixels[name], Image.open(odd / name).convert('RGB'), err_msg=name)
    np.testing.assert_array_equal(pixels['sixteen bits.png'][..., 0], np.asarray(deep) >> 8)


def test_a_truncated_jpeg_is_an_error_and_not_a_grey_half(tmp_path):
    for share in (0.3, 0.9):
        whole = encoded(PHOTO.resize((500, 375)))
        with pytest.raises(augmentation.BadImage), augmentation.refusing_bad_images():
            augmentation.decode_top(whole[:int(share * len(whole))], 100)


@pytest.mark.parametrize('name', ['val', 'validation'])
def test_one_class_and_both_names_of_the_test_folder(tmp_path, name):
    root = folder(tmp_path / 'data', 'a')
    (root / 'val').rename(root / name)
    opened = loaders(root)
    assert opened.task.recipe.num_classes == 1 and opened.val.count == 4


def test_an_empty_class_keeps_its_label_and_is_told(tmp_path, caplog):
    root = folder(tmp_path / 'data', 'ac')
    for split in ('train', 'val'):
        (root / split / 'b').mkdir()
    opened = loaders(root)
    assert opened.task.classes == ['a', 'b', 'c']
    assert {label for _, labels in pairs(opened.val) for label in labels.tolist()} == {0, 2}
    assert f'{root}/train: 1 class folders hold no image (b)' in caplog.text


def test_what_is_missing_is_told_with_the_path_and_the_cure(tmp_path):
    with pytest.raises(UserError, match=r'nowhere does not exist; give --data_path'):
        loaders(tmp_path / 'nowhere')
    (tmp_path / 'data').mkdir()
    with pytest.raises(UserError, match=r'data has none of train, .*; give --data_path'):
        loaders(tmp_path / 'data')
    (tmp_path / 'data' / 'train').mkdir()
    with pytest.raises(UserError, match=r'data/train holds no image in a class folder'):
        loaders(tmp_path / 'data', disable_eval=True)
    folder(tmp_path / 'data')
    for number in range(4):
        os.rename(tmp_path / 'data' / 'val' / 'a' / f'{number}.jpg', tmp_path / 'data' / 'val' / f'{number}.jpg')
        os.remove(tmp_path / 'data' / 'val' / 'b' / f'{number}.jpg')
    with pytest.raises(UserError, match=r'data/val holds 4 images in no class folder; give each .* tools/check'):
        loaders(tmp_path / 'data')


def test_class_folders_that_differ_are_refused(tmp_path):
    root = folder(tmp_path / 'data', 'abc')
    (root / 'val' / 'c').rename(root / 'val' / 'd')
    with pytest.raises(UserError, match=r'1 only in .*train \(c\) and 1 only in .*val \(d\).*make both folders'):
        loaders(root)


def test_eval_data_path_may_be_the_folder_of_classes_itself(tmp_path):
    root = folder(tmp_path / 'data', 'ab')
    assert loaders(root, eval=True, eval_data_path=str(root / 'val')).val.count == 8
    assert loaders(root, eval=True, eval_data_path=str(root)).val.count == 8


def test_class_map_chooses_labels_and_classes(tmp_path):
    root = folder(tmp_path / 'data', 'abc', count=2)
    (tmp_path / 'map.txt').write_text('c\na\n')
    opened = loaders(root, class_map=str(tmp_path / 'map.txt'))
    assert opened.task.classes == ['c', 'a'] and opened.train.count == opened.val.count == 4
    files = ImageFiles(root / 'train', class_map=str(tmp_path / 'map.txt'))
    assert {(Path(files.name(i)).parent.name, files.read(i)[1]) for i in range(4)} == {('a', 1), ('c', 0)}
    with pytest.raises(UserError, match=r'--class_map nowhere\.txt cannot be read'):
        loaders(root, class_map='nowhere.txt')


# ---- The index ------------------------------------------------------------------------------------------------------

def test_index_is_built_once_and_again_after_a_change(tmp_path, monkeypatch):
    root = folder(tmp_path / 'data') / 'train'
    built, scan = [], files._scan_folder
    monkeypatch.setattr(files, '_scan_folder', lambda path: built.append(path) or scan(path))
    names = [[found.name(i) for i in range(len(found))] for found in (ImageFiles(root), ImageFiles(root))]
    assert names[0] == names[1] == sorted(names[0]) and len(built) == 1
    assert not list(root.rglob('*.npy')) and list((tmp_path / 'cache' / 'moganet').glob('*.npy'))
    write(root / 'b' / 'deep' / 'new.jpg')
    assert len(ImageFiles(root)) == 9 and len(built) == 2
    write(root / 'b' / 'deep' / 'newer.jpg')  # only the inner folder has changed
    assert len(ImageFiles(root)) == 10 and len(built) == 3
    (root / 'b' / '0.jpg').unlink()
    assert len(ImageFiles(root)) == 9 and len(built) == 4
    assert len(list((tmp_path / 'cache' / 'moganet').glob('*.npy'))) == 1  # no old ones are left


def test_damaged_or_forbidden_cache_costs_only_time(tmp_path, monkeypatch):
    root = folder(tmp_path / 'data') / 'train'
    assert len(ImageFiles(root)) == 8
    next((tmp_path / 'cache' / 'moganet').glob('*.json')).write_text('{')
    assert len(ImageFiles(root)) == 8
    next((tmp_path / 'cache' / 'moganet').glob('*.npy')).write_bytes(b'')
    assert len(ImageFiles(root)) == 8
    monkeypatch.setenv('XDG_CACHE_HOME', '/dev/null')
    assert len(ImageFiles(root)) == 8


def test_spawned_workers_get_the_index_by_its_name(tmp_path):
    files = ImageFiles(folder(tmp_path / 'data', count=50) / 'train')
    sent = pickle.dumps(files)
    assert len(sent) < 2000
    received = pickle.loads(sent)
    assert [received.name(i) for i in range(100)] == [files.name(i) for i in range(100)]


@pytest.mark.slow
def test_200_000_files_start_in_two_seconds_and_are_shared_by_the_workers(tmp_path):
    root = tmp_path / 'data' / 'train'
    for label in range(200):
        (root / f'n{label:08d}').mkdir(parents=True)
        for number in range(1000):
            (root / f'n{label:08d}' / f'n{label:08d}_{number}.JPEG').touch()
    code = textwrap.dedent(f'''
        import os, sys, time
        from pathlib import Path
        from pipeline.sources import ImageFiles
        def private():
            lines = Path('/proc/self/smaps_rollup').read_text().splitlines()
            return sum(int(line.split()[1]) for line in lines if line.startswith('Private'))
        start = time.perf_counter()
        files = ImageFiles(Path({str(root)!r}))
        print(len(files), time.perf_counter() - start)
        reader, writer = os.pipe()
        if not os.fork():
            before = private()
            for index in range(0, len(files), 3):
                files._record(index)
            os.write(writer, str(private() - before).encode())
            os._exit(0)
        print(os.read(reader, 100).decode())
    ''')
    environment = os.environ | {'XDG_CACHE_HOME': str(tmp_path / 'cache')}
    outputs = [subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=environment, check=True, capture_output=True,
                              text=True).stdout.split() for _ in range(2)]
    assert outputs[0][0] == outputs[1][0] == '200000'
    assert float(outputs[1][1]) < 2
    assert int(outputs[1][2]) < 5000  # kilobytes; a list of tuples would be copied, 40 MB


# ---- Tar files ------------------------------------------------------------------------------------------------------

def test_imagenets_tar_files_are_read_unextracted(tmp_path):
    root = folder(tmp_path / 'folder', ['n01', 'n02'], count=3)
    for number, path in enumerate(sorted((root / 'train').rglob('*.jpg'))):
        write(path, encoded(PHOTO.rotate(number)))
    packed = tmp_path / 'packed'
    write(packed / 'ILSVRC2012_img_train.tar', tar({f'{name}.tar': tar({
        f'{name}_{path.stem}.JPEG': path.read_bytes() for path in sorted((root / 'train' / name).iterdir())})
        for name in ('n01', 'n02')}))
    write(packed / 'ILSVRC2012_img_val.tar', tar({f'ILSVRC2012_val_{i:08d}.JPEG': encoded() for i in (1, 2, 3)}))
    with pytest.raises(UserError, match=r'val\.tar holds 3 images in no class folder; put .* beside it'):
        loaders(packed)
    write(packed / 'ILSVRC2012_validation_ground_truth.txt', b'7\n3\n7\n')
    write_meta(packed / 'meta.mat', {3: 'n01', 7: 'n02'})
    for workers in (0, 2):
        opened = loaders(packed, num_workers=workers)
        assert opened.task.classes == ['n01', 'n02']
        assert [label for _, labels in pairs(opened.val) for label in labels.tolist()] == [1, 0, 1]
        batches = zip(pairs(opened.train.epoch(0)), pairs(loaders(root).train.epoch(0)), strict=True)
        for (images, labels), (expected, numbers) in batches:
            assert (images == expected).all() and (labels == numbers).all()
        opened.close()


# ---- timm's readers -------------------------------------------------------------------------------------------------

def test_hugging_face_datasets_are_read_although_datasets_py_bears_their_name(tmp_path):
    write_parquet(tmp_path / 'parquet')
    code = textwrap.dedent(f'''
        import datasets, tasks
        from recipes import resolve
        for name in ('hfds', 'hfids'):
            for workers in ('0', '2'):
                recipe, run = resolve(['--recipe', 'moganet_xtiny_digits', '--data_set', name + '/{tmp_path}/parquet',
                                       '--data_path', '{tmp_path}/hub', '--total_batch_size', '8',
                                       '--num_workers', workers])
                task = tasks.create_task(recipe, run)
                loaders = datasets.build_loaders(task, run)
                labels = [label for batch in loaders.train.epoch(0) for label in batch.targets.tolist()]
                seen = [label for batch in loaders.val for label in batch.targets.tolist()]
                print(task.classes, len(labels), sorted(seen) == sorted(i % 3 for i in range(13)))
                loaders.close()
        import datasets.arrow_dataset
        from datasets import Dataset, build_loaders
        print(datasets.__file__, Dataset is datasets.arrow_dataset.Dataset, datasets.load_dataset.__module__)
    ''')
    environment = os.environ | {'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path / 'home')}
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        *["['x', 'y', 'z'] 40 True"] * 4, f'{ROOT}/datasets.py True datasets.load']


def test_streams_train_whole_epochs_and_evaluate_every_image_once(tmp_path, caplog):
    write_shards(tmp_path / 'shards')
    recipe = replace(RECIPE, data_set='wds/made-up', num_classes=3, total_batch_size=6)
    with pytest.raises(UserError, match='does not say how many classes it has; give --num_classes'):
        loaders(tmp_path / 'shards', replace(recipe, num_classes=None))
    for world_size, workers in ((1, 0), (1, 2), (3, 0), (3, 1)):
        seen = Counter()
        for rank in range(world_size):
            run = Run(data_path=str(tmp_path / 'shards'), batch_size=6 // world_size, update_freq=1,
                      world_size=world_size, num_workers=workers)
            opened = open_loaders(recipe, run, rank=rank)
            assert opened.train.updates_per_epoch == 8 and opened.val.count == 13
            sizes = [[len(batch) for batch in opened.train.epoch(epoch)] for epoch in range(2)]
            assert sizes == [[6 // world_size] * 8] * 2
            seen.update(label for _, labels in pairs(opened.val) for label in labels.tolist())
            opened.close()
        assert seen == Counter(i % 3 for i in range(13)), (world_size, workers)
    opened = loaders(tmp_path / 'shards', recipe)
    assert len(list(opened.train.epoch(0, start_update=5))) == 3
    assert 'is a stream: the rest of epoch 1 begins with a fresh pass' in caplog.text
    first, second = (next(opened.train.epoch(epoch)).images for epoch in (0, 1))
    assert not (first == second).all()
    with pytest.raises(UserError, match='--repeated_aug needs'):
        loaders(tmp_path / 'shards', replace(recipe, repeated_aug=2))


def test_streams_tell_their_errors_in_one_line(tmp_path):
    write_shards(tmp_path / 'shards')
    recipe = replace(RECIPE, data_set='wds/made-up', num_classes=2)
    for workers in (0, 2):
        opened = loaders(tmp_path / 'shards', recipe, num_workers=workers)
        with pytest.raises(UserError, match='has label 2, but the model has 2 classes') as caught:
            list(opened.train.epoch(0))
        assert '\n' not in str(caught.value)
        opened.close()


@pytest.mark.parametrize('ending', ['jpeg', 'JPEG', 'png', 'webp', 'gif', 'bmp', 'tiff', 'xyz'])
def test_members_of_shards_may_have_any_ending_of_an_image(tmp_path, ending):
    write_shards(tmp_path, ending=ending)
    opened = loaders(tmp_path, replace(RECIPE, data_set='wds/made-up', num_classes=3))
    if ending == 'xyz':
        with pytest.raises(UserError, match=r'train-\d\.tar: \d{4} cannot be read .*jpg.*skip') as caught:
            next(opened.train.epoch(0))
        assert '\n' not in str(caught.value)
    else:
        assert len(next(opened.train.epoch(0))) == 4
        assert sum(map(len, opened.val)) == 13


@pytest.mark.parametrize('fault', ['shard', 'half a shard', 'image', 'count', 'everything'])
def test_what_is_wrong_in_a_stream_follows_on_bad_image_and_costs_an_evaluation_a_warning(tmp_path, fault, caplog):
    write_shards(tmp_path, broken=[('train', 1), ('validation', 4)] if fault == 'image' else ())
    shard, model = tmp_path / 'validation-1.tar', torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(3))
    recipe = replace(RECIPE, data_set='wds/made-up', num_classes=3)
    if fault in ('shard', 'everything'):
        for path in [*tmp_path.glob('*.tar')] if fault == 'everything' else (shard, tmp_path / 'train-1.tar'):
            path.unlink()
    if fault == 'half a shard':
        for path in (shard, tmp_path / 'train-1.tar'):
            path.write_bytes(path.read_bytes()[:3500])
    if fault == 'count':
        info = json.loads((tmp_path / '_info.json').read_text())
        info['splits']['validation']['num_samples'] = 14
        (tmp_path / '_info.json').write_text(json.dumps(info))
    expected = {'image': 12, 'count': 13, 'shard': 9, 'half a shard': range(9, 13)}
    opened = loaders(tmp_path, recipe)
    images = torch.zeros(1, 3, recipe.test_size, recipe.test_size)
    model(images)

    def evaluate():
        device = torch.device('cpu')
        return engine.evaluate({'': model}, opened.val, Accuracy(device), count=opened.val.count, device=device,
                               exact=opened.val.exact)['']

    if fault == 'everything':
        with pytest.raises(UserError, match='the stream gives none of the 13 test images'):
            evaluate()
    else:
        result = evaluate()
        assert result['count'] in np.atleast_1d(expected[fault])
        assert f'{result["count"]} images were evaluated, though the stream says it has' in caplog.text
        assert fault == 'count' or ('validation-1.tar' in caplog.text and 'cannot be read' in caplog.text)
    with pytest.raises(UserError, match='is a stream, which does not tell the names'):
        _ = opened.val.names
    if fault != 'count':
        with pytest.raises(UserError, match=r'train-\d\.tar.* cannot be read \(.*--on_bad_image skip trains without'):
            list(opened.train.epoch(0))
        skipping = loaders(tmp_path, replace(recipe, on_bad_image='skip')).train
        if fault == 'everything':
            with pytest.raises(UserError, match='gives this process no whole micro-batch'):
                list(skipping.epoch(0))
        else:
            assert len(list(skipping.epoch(0))) == skipping.updates_per_epoch and skipping.bad_images > 0


@pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
def test_cifars_rows_read_the_official_archive_as_other_images_are_read(name, tmp_path, monkeypatch):
    kind = {'cifar10': CIFAR10, 'cifar100': CIFAR100}[name]
    recipe = replace(RECIPES[f'moganet_xtiny_{name}'], total_batch_size=8)
    write_cifar(tmp_path, kind, monkeypatch, images=24)
    opened = loaders(tmp_path, recipe)
    count = 24 * len(kind.train_list)
    assert opened.task.recipe.num_classes == int(name.removeprefix('cifar'))
    assert opened.task.classes[:2] == ['class 00', 'class 01'] and (opened.train.count, opened.val.count) == (count, 24)
    images, labels = (torch.cat(parts) for parts in zip(*pairs(opened.val), strict=True))
    assert labels.tolist() == [number % 10 for number in range(24)]
    pixels = torch.from_numpy(kind(tmp_path, train=False).data).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (recipe.mean, recipe.std))
    torch.testing.assert_close(images, (pixels - mean) / std)  # no resize at 32 pixels; float32 in another order
    shutil.rmtree(tmp_path / kind.base_folder)  # a second start unpacks anew, and workers make the same bits
    again = loaders(tmp_path, recipe, num_workers=1)
    for (ours, to_ours), (theirs, to_theirs) in zip(pairs(opened.train.epoch(1)), pairs(again.train.epoch(1)),
                                                    strict=True):
        assert torch.equal(ours, theirs) and torch.equal(to_ours, to_theirs)
    again.close()


def test_an_archive_of_another_checksum_is_not_opened(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        content = write_cifar(tmp_path, CIFAR10, patch)
    with pytest.raises(UserError, match=r'cannot be opened \(Dataset not found or corrupted\.\); check --data_path, or '
                                        'fetch them into it by --download'):
        loaders(tmp_path, replace(RECIPE, data_set='torch/cifar10'))
    assert os.listdir(tmp_path) == [CIFAR10.filename] and (tmp_path / CIFAR10.filename).read_bytes() == content


def test_unknown_and_unreadable_data_sets_are_told(tmp_path):
    with pytest.raises(UserError, match=r'--data_set imagefolder is unknown; did you mean image_folder'):
        loaders(tmp_path, replace(RECIPE, data_set='imagefolder'))
    with pytest.raises(UserError, match=r'--data_set wds/none: the train images under .* cannot be opened'):
        loaders(tmp_path, replace(RECIPE, data_set='wds/none'))


# ---- tools/check_dataset.py -----------------------------------------------------------------------------------------

def test_check_finds_what_does_not_decode(tmp_path, capsys):
    root = folder(tmp_path / 'data', 'ab')
    write(root / 'train' / 'a' / '1.jpg', encoded()[:700])
    write(root / 'val' / 'b' / '2.jpg', b'text')
    report = tmp_path / 'report.json'
    arguments = ['--data_path', str(root), '--report', str(report)]
    assert check_dataset.main(arguments) == 0
    assert check_dataset.main([*arguments, '--decode', '--workers', '2']) == 1
    found = json.loads(report.read_text())
    assert [broken['path'] for broken in found['train']['not_decodable']] == [str(root / 'train' / 'a' / '1.jpg')]
    assert [broken['path'] for broken in found['val']['not_decodable']] == [str(root / 'val' / 'b' / '2.jpg')]
    assert found['train']['images'] == 8 and found['train']['classes'] == 2 and len(found['errors']) == 2
    assert str(root / 'train' / 'a' / '1.jpg') in capsys.readouterr().out


def test_check_knows_imagenets_counts(tmp_path):
    root = tmp_path / 'data'
    for label in range(1000):
        for split in ('train', 'val'):
            (root / split / f'n{label:08d}').mkdir(parents=True)
    write(root / 'train' / 'n00000000' / '1.jpg')
    write(root / 'val' / 'n00000000' / '1.jpg')
    found = check_dataset.check(RECIPES['moganet_small'], Run(data_path=str(root)))
    assert any("1 images, but ImageNet's are 1,281,167" in line for line in found['warnings'])
    assert any("1 images, but ImageNet's are 50,000" in line for line in found['warnings'])
    assert any('999 class folders hold no image' in line for line in found['warnings'])


@pytest.mark.parametrize('form', ['numbers', 'ids', 'csv'])
def test_sort_val_sorts_by_the_ground_truth(tmp_path, form):
    val, order = tmp_path / 'data' / 'val', ['n02', 'n01', 'n02', 'n03']
    for number in range(1, 5):
        write(val / f'ILSVRC2012_val_{number:08d}.JPEG')
    truth = tmp_path / 'truth.txt'
    if form == 'numbers':
        truth.write_text('7\n3\n7\n4\n')
        write_meta(tmp_path / 'meta.mat', {3: 'n01', 7: 'n02', 4: 'n03'})
    elif form == 'ids':
        truth.write_text('\n'.join(order))
    else:
        lines = [f'ILSVRC2012_val_{number:08d},{name} 1 2 3 4' for number, name in enumerate(order, start=1)]
        truth.write_text('\n'.join(['ImageId,PredictionString', *lines]))
    assert check_dataset.sort_val(val, truth) == 4
    assert sorted(str(path.relative_to(val)) for path in val.rglob('*.JPEG')) == [
        'n01/ILSVRC2012_val_00000002.JPEG', 'n02/ILSVRC2012_val_00000001.JPEG', 'n02/ILSVRC2012_val_00000003.JPEG',
        'n03/ILSVRC2012_val_00000004.JPEG']
    assert check_dataset.sort_val(val, truth) == 0  # again, nothing is left to do


def test_sort_val_moves_nothing_where_the_ground_truth_does_not_fit(tmp_path):
    for name in ('ILSVRC2012_val_00000001.JPEG', 'ILSVRC2012_val_00000009.JPEG'):
        write(tmp_path / 'val' / name)
    (tmp_path / 'truth.txt').write_text('n01\nn02\n')
    with pytest.raises(UserError, match=r'does not know 1 images .* nothing was moved'):
        check_dataset.sort_val(tmp_path / 'val', tmp_path / 'truth.txt')
    assert not (tmp_path / 'val' / 'n01').exists()
    (tmp_path / 'truth.txt').write_text('some text\n')
    with pytest.raises(UserError, match='is no ground-truth file'):
        check_dataset.sort_val(tmp_path / 'val', tmp_path / 'truth.txt')
