"""`main.py --eval --suite`: each set is found by its name and tested by its rules, on any number of processes.

What is expected is computed beside the code under test: timm's transform on Pillow's images, one model, all images of a
set at once.
"""
import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, RealLabelsImagenet, create_transform
from torch import Tensor
from torch.nn import functional as F

import angle_task
import main
import recipes
import reference
import runs
from builders import make_image_folder, smooth
from recipes.fields import IMAGENET_MEAN, IMAGENET_STD
from training import suite
from utils import UserError

FOUR_BLOCKS = {'dims': [8, 8, 16, 16], 'depths': [1, 1, 1, 1], 'ffn_ratios': [2, 2, 2, 2]}
RECIPE = dataclasses.replace(recipes.RECIPES['moganet_xtiny'], test_size=32, crop_pct=0.8, model_kwargs=FOUR_BLOCKS,
                             num_classes=1000, precision='fp32', gate_fp32=False)
IDS = ImageNetInfo().label_names()
INDICES = {name: [int(word) for word in (Path(timm.data.__file__).parent / '_info' / f'imagenet_{name}_indices.txt')
                  .read_text().split()] for name in 'ar'}
VAL = [0, 40, 80, 120, 160, 200]  # the classes of the made-up val
CPU = ('--device', 'cpu', '--num_workers', '0', '--val_batch_size', '7')
pytestmark = pytest.mark.usefixtures('one_thread', 'own_cache')


def picture(path: Path, number: int, size: tuple[int, int] = (48, 40)) -> None:
    """A smooth picture, by its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(number).integers(0, 256, (5, 6, 3), np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """The sets, each by another spelling of its name; A and R have an image in each of their 200 classes."""
    root = tmp_path_factory.mktemp('sets')
    real = [labels for _, labels in sorted(RealLabelsImagenet([''] * 50000).real_labels.items())]
    among = [number for number, labels in enumerate(real, 1) if set(labels) & set(VAL)][:22]
    for i, number in enumerate((1, *among)):  # ReaL has no label for the first, and leaves it out
        picture(root / 'val' / IDS[VAL[i % 6]] / f'ILSVRC2012_val_{number:08d}.png', i)
    for i in range(12):
        picture(root / 'imagenetv2-matched-frequency-format-val' / str((7, 100, 999)[i % 3]) / f'{i}.png', 100 + i)
        picture(root / 'ImageNet_Sketch' / IDS[250 * (i % 4)] / f'{i}.png', 200 + i)
    for i in range(200):
        picture(root / 'imagenet-a' / IDS[INDICES['a'][i]] / 'x.png', 300 + i % 9)
        picture(root / 'r' / IDS[INDICES['r'][i]] / 'x.png', 600 + i % 9)
    for i in range(10):  # of the severities 1 and 5 alone
        picture(root / 'imagenet-c' / 'weather' / 'fog' / str(1 + i % 2 * 4) / IDS[i] / f'{i}.png', 800 + i, (32, 32))
    (root / 'notes').mkdir()
    return root


def checkpoint(path: Path, seed: int) -> Path:
    """A checkpoint of this project's, of seeded weights that like some classes of each set."""
    names = {name: list(value.shape) for name, value in
             timm.create_model(RECIPE.model, num_classes=1000, **FOUR_BLOCKS).state_dict().items()}
    state = reference.seeded_entries(names, seed)
    state['head.bias'][VAL] += 6
    state['head.bias'][[250, 500, 750, 7, 100, 999, 1, 2, 3]] += 5.5
    torch.save({'version': 1, 'model': state, 'model_ema': None, 'optimizer': {}, 'scaler': {}, 'epoch': 3, 'step': 30,
                'best': {}, 'recipe': recipes.to_dict(RECIPE), 'classes': IDS}, path)
    return path


@pytest.fixture(scope='module')
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """Two checkpoints."""
    root = tmp_path_factory.mktemp('checkpoints')
    return checkpoint(root / 'first.pth', 0), checkpoint(root / 'second.pth', 1)


@torch.inference_mode()
def logits_of(path: Path, files: list[Path], *, size: int = 32, crop_pct: float = 0.8,
              mirrored: bool = False) -> Tensor:
    """What a checkpoint says of some images, [images, 1000]."""
    transform = create_transform(size, interpolation='bicubic', crop_pct=crop_pct, mean=IMAGENET_MEAN,
                                 std=IMAGENET_STD)
    model = timm.create_model(RECIPE.model, num_classes=1000, **FOUR_BLOCKS).eval()
    model.load_state_dict(torch.load(path)['model'])
    images = torch.stack([transform(Image.open(file).convert('RGB')) for file in files])
    return (model(images) + model(images.flip(-1))) / 2 if mirrored else model(images)


def files_of(root: Path) -> list[Path]:
    """The images of a set in the order of the evaluation: sorted as text."""
    return sorted(root.glob('*/*.png'))


def measured(logits: Tensor, targets: list[int]) -> dict[str, Any]:
    """Accuracies, % and loss; each number is one that eval.json has too."""
    top, wanted = logits.topk(5).indices, torch.tensor(targets)
    right = top == wanted[:, None]
    # counts are exact; the loss is of float32 in batches of another size
    return {'acc1': pytest.approx(100 * right[:, 0].double().mean().item(), abs=1e-9), 'count': len(targets),
            'acc5': pytest.approx(100 * right.any(1).double().mean().item(), abs=1e-9),
            'loss': pytest.approx(F.cross_entropy(logits, wanted).item(), rel=1e-5)}


def expected(root: Path, path: Path, **settings: Any) -> dict[str, dict[str, Any]]:
    """The results of a checkpoint by set, but for C."""
    results = {}
    number_of = {name: number for number, name in enumerate(IDS)}
    for name, place in (('val', 'val'), ('V2 matched-frequency', 'imagenetv2-matched-frequency-format-val'),
                        ('Sketch', 'ImageNet_Sketch')):
        files = files_of(root / place)
        if name.startswith('V2'):  # numbers are sorted as numbers, images in a folder as text
            files.sort(key=lambda file: (str(file.parent), file.name))
        targets = [number_of.get(file.parent.name, -1) if file.parent.name in number_of else int(file.parent.name)
                   for file in files]
        results[name] = measured(logits_of(path, files, **settings), targets)
    for name, place, key in (('A', 'imagenet-a', 'a'), ('R', 'r', 'r')):
        files = files_of(root / place)
        logits = logits_of(path, files, **settings)[:, INDICES[key]]
        results[name] = measured(logits, [INDICES[key].index(number_of[file.parent.name]) for file in files])
    return results


def evaluate(folder: Path, output: Path, *words: Any) -> list[dict[str, Any]]:
    """Evaluates by `main.main`. Returns the results in eval.json."""
    assert main.main(['--eval', '--suite', str(folder), *CPU, '--output_dir', str(output), *map(str, words)]) == 0
    return json.loads((output / 'eval.json').read_text())


def some(folder: Path, place: Path, *names: str) -> Path:
    """A folder of some of the sets."""
    place.mkdir()
    for name in names:
        (place / name).symlink_to(folder / name)
    return place


def counted(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What no number of processes may change: counts exactly, sums of float32 to round-off."""
    exact = ('set', 'count', 'acc1', 'acc5', 'real_acc1', 'interval_acc1', 'worst_classes', 'confusions', 'bits',
             'errors', 'compared')
    return [{name: pytest.approx(row[name], rel=1e-5) if name in ('loss', 'ece') else row[name]
             for name in (*exact, 'loss', 'ece') if name in row} for row in results]


# ---- The sets -------------------------------------------------------------------------------------------------------

def test_each_set_is_evaluated_by_its_rules(folder, pair, tmp_path, capsys):
    results = evaluate(folder, tmp_path, '--checkpoint', pair[0])
    said = capsys.readouterr().out
    assert [row['set'] for row in results] == ['val', 'V2 matched-frequency', 'A', 'R', 'Sketch', 'C']
    for name, wanted in expected(folder, pair[0]).items():
        (row,) = (row for row in results if row['set'] == name)
        assert {key: row[key] for key in wanted} == wanted, name
        assert row['interval_acc1'][0] <= row['acc1'] < row['interval_acc1'][1]
    assert any(0 < row['acc1'] < 100 for row in results[:5])  # else the accuracies would prove little
    assert 'other classes' not in said and 'notes bear no name of a set' in said
    table = [line.split() for line in said.splitlines()[-7:]]
    assert table[0][:4] == ['set', 'top-1', 'interval', 'top-5'] and 'ReaL' in table[0] and 'mCE' not in table[0]
    assert [line[0] for line in table[1:]] == ['val', 'V2', 'A', 'R', 'Sketch', 'C']


def test_val_is_judged_by_timms_reassessed_labels_too(folder, pair, tmp_path):
    sets = some(folder, tmp_path / 'sets', 'val')
    (row,) = evaluate(sets, tmp_path, '--checkpoint', pair[0])
    files = files_of(folder / 'val')
    judge = RealLabelsImagenet([file.with_suffix('.JPEG').name for file in files] + [''] * (50000 - len(files)))
    judge.add_result(logits_of(pair[0], files))
    assert row['real_acc1'] == pytest.approx(judge.get_accuracy(k=1), abs=1e-9)
    assert len(judge.is_correct[1]) == 22 and 0 < row['real_acc1'] < 100 and row['real_acc1'] != row['acc1']
    (tmp_path / 'real.json').write_text(json.dumps([VAL] * 50000))
    (row,) = evaluate(sets, tmp_path, '--checkpoint', pair[0], '--real_labels', tmp_path / 'real.json')
    assert row['real_acc1'] == 100


def test_images_of_imagenet_c_are_taken_as_they_are_and_are_no_mce_while_some_are_missing(folder, pair, tmp_path,
                                                                                          capsys):
    (row,) = evaluate(some(folder, tmp_path / 'sets', 'imagenet-c'), tmp_path, '--checkpoint', pair[0])
    assert '2 of the 75 folders of ImageNet-C are there' in capsys.readouterr().out
    errors = []
    for severity in (1, 5):
        files = files_of(folder / 'imagenet-c' / 'weather' / 'fog' / str(severity))
        top = logits_of(pair[0], files, crop_pct=1.0).argmax(1).tolist()
        errors.append(100 * np.mean([IDS[guess] != file.parent.name for guess, file in zip(top, files, strict=True)]))
    assert row['errors'] == {'fog': pytest.approx(errors)}
    assert row['corruption_error'] == pytest.approx(np.mean(errors)) and 'mce' not in row
    assert row['crop_pct'] == 1.0 and row['count'] == 10


@pytest.mark.parametrize('factor', [0.5, 1.0])
def test_mce_is_the_mean_of_the_errors_over_alexnets(factor, tmp_path):
    for name in suite.ALEXNET:
        for severity in range(1, 6):
            (tmp_path / 'imagenet-c' / name / str(severity)).mkdir(parents=True)
    _, run = recipes.resolve(['--eval', '--checkpoint', 'x', '--suite', str(tmp_path)])
    (part,) = suite.parts(RECIPE, run)
    assert len(part.cases) == 75

    def one(run: recipes.Run, detailed: bool) -> dict[str, Any]:
        place = Path(run.eval_data_path)
        error = factor * suite.ALEXNET[place.parent.name] + 0.01 * (int(place.name) - 3)
        return {'acc1': 100 * (1 - error), 'count': 50000, 'seconds': 2.0, 'model': 'm'}

    result = part.evaluate(one)
    assert result['mce'] == pytest.approx(100 * factor) and result['count'] == 75 * 50000 and result['model'] == 'm'
    assert result['corruption_error'] == pytest.approx(100 * factor * np.mean(list(suite.ALEXNET.values())))
    made_here = dataclasses.replace(part, name='val, corrupted here').evaluate(one)
    assert 'mce' not in made_here and made_here['corruption_error'] == result['corruption_error']


def test_any_number_of_processes_counts_the_same(folder, pair, tmp_path):
    sets = some(folder, tmp_path / 'sets', 'val', 'imagenet-c')
    found = {}
    for world_size in (1, 2, 3):
        output = tmp_path / str(world_size)
        words = ('--eval', '--suite', str(sets), *CPU, '--checkpoint', *map(str, pair), '--output_dir', str(output))
        if world_size == 1:
            assert main.main(list(words)) == 0
        else:
            runs.run(words, tmp_path / 'log', world_size=world_size)
        found[world_size] = (json.loads((output / 'eval.json').read_text()),
                             (output / 'eval-classes.csv').read_text(), dict(np.load(output / 'eval-bits.npz')))
    results, classes, bits = found[1]
    assert len(results) == 4 and len(bits) == 2
    for other in (2, 3):
        assert counted(found[other][0]) == counted(results)
        assert found[other][1] == classes
        assert all(np.array_equal(found[other][2][name], value) for name, value in bits.items())
    right = [np.unpackbits(bits[results[i]['bits']], count=23).astype(bool) for i in (0, 2)]
    files = files_of(folder / 'val')
    for path, ours in zip(pair, right, strict=True):
        top = logits_of(path, files).argmax(1).tolist()
        assert ours.tolist() == [IDS[guess] == file.parent.name for guess, file in zip(top, files, strict=True)]
    (compared,) = results[2]['compared']
    assert (compared['with'], compared['right_there_alone'], compared['right_here_alone']) == (
        str(pair[0]), int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum()))
    rows = [row for row in csv.DictReader(classes.splitlines())
            if (row['set'], row['checkpoint']) == ('val', str(pair[0]))]
    assert [int(row['images']) for row in rows] == [4, 4, 4, 4, 4, 3]
    assert sum(int(row['right']) for row in rows) == right[0].sum() and rows[0]['name'] == 'tench, Tinca tinca'


# ---- Test sizes, mirror images, corruptions -------------------------------------------------------------------------

def test_several_test_sizes_make_a_table_also_without_a_suite(folder, pair, tmp_path, capsys):
    words = ['--eval', '--checkpoint', str(pair[0]), '--data_path', str(folder), *CPU, '--output_dir', str(tmp_path)]
    assert main.main([*words, '--test_size', '32', '48']) == 0
    results = json.loads((tmp_path / 'eval.json').read_text())
    assert [row['test_size'] for row in results] == [32, 48] and 'compared' not in results[1]
    for row in results:
        wanted = expected(folder, pair[0], size=row['test_size'])['val']
        assert {key: row[key] for key in wanted} == wanted
    assert results[0]['loss'] != results[1]['loss']
    assert [line.split()[-2] for line in capsys.readouterr().out.splitlines()[-3:]] == ['size', '32', '48']


def test_mirror_images_take_half_of_the_logits(folder, pair, tmp_path, capsys):
    words = ['--eval', '--checkpoint', str(pair[0]), '--data_path', str(folder), *CPU, '--output_dir', str(tmp_path)]
    assert main.main([*words, '--tta', 'hflip']) == 0
    row = json.loads((tmp_path / 'eval.json').read_text())
    wanted = expected(folder, pair[0], mirrored=True)['val']
    assert {key: row[key] for key in wanted} == wanted and row['tta'] == 'hflip'
    assert row['loss'] != pytest.approx(expected(folder, pair[0])['val']['loss'].expected, rel=1e-4)
    assert 'bicubic, with mirror images, on 23 images' in capsys.readouterr().out


def test_corruptions_made_here_are_the_same_on_any_number_of_processes_and_are_called_corruption_error(
        folder, pair, tmp_path, capsys):
    pytest.importorskip('imagecorruptions')
    sets = some(folder, tmp_path / 'sets', 'val')
    words = ('--corruptions', 'impulse_noise', '--checkpoint', str(pair[0]))
    clean, corrupted = evaluate(sets, tmp_path / '1', *words)
    assert 'corruption error' in capsys.readouterr().out.splitlines()[-3]
    assert corrupted['set'] == 'val, corrupted here' and 'mce' not in corrupted and corrupted['count'] == 5 * 23
    assert {name: len(values) for name, values in corrupted['errors'].items()} == {'impulse_noise': 5}
    assert any(error != pytest.approx(100 - clean['acc1']) for error in corrupted['errors']['impulse_noise'])
    runs.run(('--eval', '--suite', str(sets), *CPU, '--output_dir', str(tmp_path / '2'), *words),
             tmp_path / 'log', world_size=2)
    assert counted(json.loads((tmp_path / '2' / 'eval.json').read_text())) == counted([clean, corrupted])


def test_corruptions_change_the_crops_and_glass_is_the_same_twice():
    pytest.importorskip('imagecorruptions')
    from pipeline.corruptions import CORRUPTIONS, corrupt
    crop = np.asarray(smooth(np.random.default_rng(0), 0).resize((32, 32)))
    for name in CORRUPTIONS:
        first, again, other = corrupt(crop, name, 3), corrupt(crop.copy(), name, 3), corrupt(crop, name, 5)
        assert np.array_equal(first, again), name  # three streams of random numbers are seeded
        assert not np.array_equal(first, crop) and not np.array_equal(first, other), name


# ---- Wrong ones -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('words,said', [
    ('--suite {empty}', 'holds no set that is known; call them val, imagenetv2'),
    ('--suite {none}', 'is no folder; give'), ('--suite {folder}/v.txt', 'is no folder; give'),
    ('--suite {folder} --class_map x', '--suite knows its sets; leave --class_map'),
    ('--suite {folder} --valid_labels {folder}/v.txt', '--valid_labels are of one set'),
    ('--suite {folder}/val --corruptions fog', 'holds no set that is known'),
    ('--suite {folder}/imagenet-c/.. --data_set digits', '--suite reads folders of images'),
    ('--suite {alone} --corruptions fog', 'holds no val; leave the flag out'),
    ('--suite {alone} --valid_labels {folder}/v.txt', 'holds no A and no R; leave the flag out'),
    ('--suite {folder} --data_path {folder}', '--suite knows its sets; leave --data_path out'),
    ('--corruptions fog', '--corruptions go with --suite'), ('--suite {folder} --corruptions fgo', 'choose from'),
    ('--suite {folder} --corruptions all fog', '--corruptions all includes every corruption'),
    ('--suite {folder} --corruptions fog --test_size 32 16', '--corruptions are defined from 32 pixels on'),
    ('--test_size 32 0', 'give values above 0'), ('--tta vflip', 'choose from hflip')])
def test_what_cannot_be_is_one_line(words, said, folder, pair, tmp_path, capsys):
    (tmp_path / 'empty').mkdir()
    some(folder, tmp_path / 'alone', 'ImageNet_Sketch')
    (folder / 'v.txt').write_text('1\n')
    places = {name: tmp_path / name for name in ('alone', 'empty', 'none')} | {'folder': folder}
    words = words.format(**places).split()
    assert main.main(['--eval', '--checkpoint', str(pair[0]), '--output_dir', str(tmp_path), *CPU, *words]) == 2
    line = capsys.readouterr().err
    assert said in line and line.count('\n') == 1


def test_a_model_of_other_classes_is_evaluated_on_val_alone(tmp_path, capsys):
    data = make_image_folder(tmp_path / 'data', train=6, val=3, draw=smooth)
    (data / 'imagenet-a' / 'n01440764').mkdir(parents=True)
    assert main.main([*runs.TINY, '--data_path', str(data), '--device', 'cpu', '--num_workers', '0', '--epochs', '1',
                      '--warmup_epochs', '0', '--total_batch_size', '6', '--batch_size', '6', '--output_dir',
                      str(tmp_path / 'run')]) == 0
    (row,) = evaluate(data, tmp_path / 'run', '--checkpoint', tmp_path / 'run' / 'checkpoint-last.pth')
    assert (row['set'], row['count']) == ('val', 9) and 'real_acc1' not in row
    assert "A want a model of ImageNet's 1000 classes, and this one has 3" in capsys.readouterr().out


@pytest.mark.parametrize('flag,value', [('suite', '.'), ('tta', 'hflip'), ('test_sizes', (32, 48))])
def test_another_task_is_refused_what_is_of_classifiers(flag, value):
    run = dataclasses.replace(recipes.Run(eval=True), **{flag: value})
    with pytest.raises(UserError, match=f'--{flag.removesuffix("s")} is of classifiers, and angle_tiny is none'):
        suite.parts(angle_task.ROW, run)


def test_a_folder_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(UserError, match='cannot be read'):
        suite.find_sets(tmp_path / 'gone')


def test_corruptions_without_their_package_name_it(folder, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'imagecorruptions', None)
    _, run = recipes.resolve(['--eval', '--checkpoint', 'x', '--suite', str(folder), '--corruptions', 'fog'])
    with pytest.raises(UserError, match=r"pip install -e '\.\[corruptions\]'"):
        suite.parts(RECIPE, run)
