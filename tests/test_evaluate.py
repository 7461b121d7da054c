"""`main.py --eval`: files of every format reach the accuracy that their weights have, by the settings that are theirs.

What is expected is computed beside the code under test: timm's transform on Pillow's images, one model loaded strictly
from the seeded state dict that the file was made of, and the loss over all images at once.
"""
import argparse
import csv
import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.data import create_transform
from torch.nn import functional as F

import builders as files
import main
import recipes
import reference
import runs
from models import download
from models.released import RELEASED

XT = 'moganet_xtiny'
FOUR_BLOCKS = {'dims': [8, 8, 16, 16], 'depths': [1, 1, 1, 1], 'ffn_ratios': [2, 2, 2, 2]}
SMALL = ('--test_size', '64')
ROUND_OFF = 1e-5  # relative, of the loss: float32 in batches of another size; the settings tested change it by 1e-4
State = dict[str, torch.Tensor]
pytestmark = pytest.mark.usefixtures('one_thread', 'own_cache')


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    """13 smooth pictures, higher than wide, in six classes: no two or three processes have equal shares."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp('data')
    for number in range(13):
        folder = root / 'val' / f'class{number % 6}'
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (9, 7, 3), np.uint8))
        coarse.resize((72, 96), Image.Resampling.BICUBIC).save(folder / f'{number}.png')
    return root


@functools.cache
def state_of(seed: int, variant: str = XT) -> State:
    """Seeded weights that tell the images apart, and prefer the first six classes: some are right, some wrong."""
    if variant == 'four blocks':
        model = timm.create_model(XT, num_classes=6, **FOUR_BLOCKS)
        state = reference.seeded_entries({name: list(value.shape) for name, value in model.state_dict().items()}, seed)
    else:
        state = reference.seeded_state_dict(variant, seed)
    state['head.weight'] = 12 * state['head.weight']
    state['head.bias'][:6] += 12
    return state


def outcome(state: State, data: Path, *, model: str = XT, size: int = 64, crop_pct: float = 0.9,
            interpolation: str = 'bicubic', crop_mode: str = 'center', mean: tuple = recipes.fields.IMAGENET_MEAN,
            std: tuple = recipes.fields.IMAGENET_STD, classes: int = 1000, valid: tuple[int, ...] | None = None,
            **arguments: Any) -> dict[str, float]:
    """Accuracies and loss of weights on the images of a folder."""
    transform = create_transform(size, interpolation=interpolation, crop_pct=crop_pct, crop_mode=crop_mode, mean=mean,
                                 std=std)
    paths = sorted((data / 'val').glob('*/*'))
    labels = torch.tensor([int(path.parent.name.removeprefix('class')) for path in paths])
    network = timm.create_model(model, num_classes=classes, **arguments).eval()
    network.load_state_dict(state)
    with torch.inference_mode():
        logits = network(torch.stack([transform(Image.open(path).convert('RGB')) for path in paths]))
    logits = logits if valid is None else logits[:, list(valid)]
    right = logits.argsort(1, descending=True)[:, :5] == labels[:, None]
    return {'acc1': 100 * right[:, 0].double().mean().item(), 'acc5': 100 * right.any(1).double().mean().item(),
            'loss': F.cross_entropy(logits, labels).item()}


@functools.cache
def expected(seed: int, data: Path, *, model: str = XT, **settings: Any) -> dict[str, float]:
    """`outcome` of seeded weights."""
    if model == 'four blocks':
        return outcome(state_of(seed, model), data, classes=6, **FOUR_BLOCKS, **settings)
    return outcome(state_of(seed, model), data, model=model, **settings)


def expected_of_training(seed: int, data: Path, **changes: Any) -> dict[str, float]:
    """What `training_file` says of itself, but for the changes."""
    return expected(seed, data, **{'model': 'four blocks', 'crop_pct': 0.8, 'gate': 'double', **changes})


def flags(data: Path) -> tuple[str, ...]:
    return '--data_path', str(data), '--device', 'cpu', '--num_workers', '0', '--val_batch_size', '5'


def evaluate(data: Path, output: Path, *words: str | Path) -> dict[str, Any]:
    """Evaluates by `main.main`. Returns the content of eval.json."""
    assert main.main(['--eval', *flags(data), '--output_dir', str(output), *map(str, words)]) == 0
    return json.loads((output / 'eval.json').read_text())


def assert_same(result: dict[str, Any], wanted: dict[str, float]) -> None:
    assert result['count'] == 13
    assert result['loss'] == pytest.approx(wanted['loss'], rel=ROUND_OFF)
    # counts of 13: exact, but for the order of a division
    assert (result['acc1'], result['acc5']) == pytest.approx((wanted['acc1'], wanted['acc5']), abs=1e-9)


def apart(one: float, other: float) -> bool:
    """Whether two losses differ by far more than round-off."""
    return abs(one - other) > 10 * ROUND_OFF * abs(one)


def training_file(path: Path, raw: int, ema: int | None) -> None:
    """A checkpoint of this project's training, weights by their seeds: four blocks, the double gate, tested at 64."""
    raw, ema = (seed if seed is None else state_of(seed, 'four blocks') for seed in (raw, ema))
    recipe = dataclasses.replace(recipes.RECIPES[XT], test_size=64, crop_pct=0.8, gate='double',
                                 model_kwargs=FOUR_BLOCKS)
    torch.save({'version': 1, 'model': raw, 'model_ema': ema, 'optimizer': {}, 'scaler': {}, 'epoch': 3, 'step': 30,
                'best': {}, 'recipe': recipes.to_dict(recipe), 'classes': [f'class{i}' for i in range(6)]}, path)


def timm_file(path: Path, raw: State, ema: State | None) -> None:
    """timm's, whose arguments say a size and a crop."""
    args = argparse.Namespace(model=XT, img_size=64, crop_pct=0.85, interpolation='bilinear', mean=None, std=None)
    torch.save({'arch': XT, 'epoch': 299, 'state_dict': raw, 'args': args, 'metric': np.float64(50)}
               | ({'state_dict_ema': ema} if ema else {}), path)


def safetensors_file(path: Path, raw: State, ema: State | None) -> None:
    safetensors.torch.save_file(raw, path)


# ---- The formats ----------------------------------------------------------------------------------------------------

# how the file is made, the flags that it needs, and how it is then evaluated
FORMATS: dict[str, tuple[Callable, tuple[str, ...], dict[str, Any]]] = {
    'timm': (timm_file, (), {'crop_pct': 0.85, 'interpolation': 'bilinear'}),
    'mmcv': (files.mmcv_file, ('--model', XT, *SMALL), {'gate': 'double'}),
    'mmcv, single gate': (functools.partial(files.mmcv_file, config='attn_force_fp32=False'),
                          ('--recipe', f'{XT}_3aug_256', *SMALL), {'gate': 'single'}),
    'deit': (files.deit_file, ('--model', XT, *SMALL), {}),
    'safetensors': (safetensors_file, ('--model', XT, *SMALL), {}),
    'bare': (files.bare_file, ('--model', XT, *SMALL), {}),
}


@pytest.mark.parametrize('kind, which', [(kind, which) for kind in FORMATS for which in ('raw', 'ema')
                                         if which == 'raw' or kind not in ('safetensors', 'bare')])
def test_each_format_reaches_the_accuracy_of_its_weights(kind: str, which: str, data: Path, tmp_path: Path) -> None:
    make, words, settings = FORMATS[kind]
    path = tmp_path / 'file'
    make(path, *((state_of(1), state_of(0)) if which == 'ema' else (state_of(0), state_of(1))))
    result = evaluate(data, tmp_path, '--checkpoint', path, *words, *(
        () if which == 'ema' or kind in ('safetensors', 'bare') else ('--weights', 'raw')))
    settings = {'crop_pct': 0.9, 'interpolation': 'bicubic', 'gate': 'single', **settings}
    assert {name: result[name] for name in settings} == settings
    assert (result['weights'], result['model'], result['test_size']) == (which, XT, 64)
    wanted = expected(0, data, **settings)
    assert_same(result, wanted)
    assert 0 < wanted['acc1'] < 100 and wanted['acc1'] < wanted['acc5']  # else the accuracies would prove little
    swapped = expected(0, data, **{**settings, 'gate': {'single': 'double', 'double': 'single'}[
        settings['gate']]})
    assert apart(wanted['loss'], swapped['loss']) and apart(wanted['loss'], expected(1, data, **settings)['loss'])


def test_line_before_the_result_says_what_is_evaluated_and_eval_json_holds_it_all(
        data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / 'checkpoint-last.pth'
    training_file(path, 1, 0)
    assert main.main(['--eval', '--checkpoint', str(path), *flags(data)]) == 0
    said = capsys.readouterr().out
    loaded = f'{len(state_of(0, "four blocks"))} tensors loaded'
    assert f'{path}: ema weights, training format, double gate: {loaded}\n' in said
    assert (f'Evaluating the ema weights of {XT}, double gate, at 64, crop 0.8 (center), bicubic, on 13 images\n'
            in said)
    result = json.loads((tmp_path / 'eval.json').read_text())  # beside the checkpoint
    assert f'top-1 {result["acc1"]:.3f} %  top-5 {result["acc5"]:.3f} %  loss {result["loss"]:.4f}' in said
    assert result.pop('seconds') > 0 and result.pop('images_per_second') > 0
    wanted = expected_of_training(0, data)
    confusion = result.pop('confusion')
    right = sum(row[label] for label, row in enumerate(confusion))
    assert sum(map(sum, confusion)) == 13 and 100 * right / 13 == pytest.approx(result['acc1'])
    for line in ('95 % intervals: top-1 ', 'calibration error ', 'worst classes: ', 'commonest confusions: '):
        assert f'\n{line}' in said
    for name in ('acc1', 'acc5'):
        low, high = result.pop(f'interval_{name}')
        assert low < result[name] < high
    assert result.pop('mean_class_acc1') == pytest.approx(
        sum(100 * row[label] / sum(row) for label, row in enumerate(confusion)) / 6)
    assert 0 < result.pop('ece') < 100 and (result.pop('temperature') or 1) > 0  # None where none fits
    assert [row['acc1'] for row in result['worst_classes']] == sorted(row['acc1'] for row in result['worst_classes'])
    assert {row['name'] for row in result.pop('worst_classes')} == {f'class{i}' for i in range(6)}
    assert sum(row['times'] for row in result.pop('confusions')) == 13 - right
    assert result == {
        'acc1': pytest.approx(wanted['acc1']), 'acc5': pytest.approx(wanted['acc5']),
        'loss': pytest.approx(wanted['loss'], rel=ROUND_OFF), 'count': 13, 'checkpoint': str(path), 'weights': 'ema',
        'model': XT, 'gate': 'double', 'test_size': 64, 'crop_pct': 0.8, 'crop_mode': 'center',
        'interpolation': 'bicubic', 'precision': 'fp32', 'bits': 'right0'}
    assert 'published' not in said


@pytest.mark.parametrize('words, settings', [
    ('--test_size 96', {'size': 96}), ('--crop_pct 1', {'crop_pct': 1.0}),
    ('--interpolation bilinear', {'interpolation': 'bilinear'}), ('--crop_mode squash', {'crop_mode': 'squash'}),
    ('--crop_mode border', {'crop_mode': 'border'}), ('--gate single', {'gate': 'single'}),
    ('--mean 0.5 0.5 0.5 --std 0.5 0.5 0.5', {'mean': (0.5,) * 3, 'std': (0.5,) * 3}), ('--weights raw', {})])
def test_flag_overrides_what_the_file_says(words: str, settings: dict[str, Any], data: Path, tmp_path: Path,
                                           capsys: pytest.CaptureFixture) -> None:
    training_file(tmp_path / 'file', 1, 0)
    result = evaluate(data, tmp_path, '--checkpoint', tmp_path / 'file', *words.split())
    wanted = expected_of_training(1 if 'raw' in words else 0, data, **settings)
    assert_same(result, wanted)
    assert apart(wanted['loss'], expected_of_training(0, data)['loss'])
    crop = f'crop {result["crop_pct"]:g} ({result["crop_mode"]}), {result["interpolation"]},'
    assert (f'the {result["weights"]} weights of {XT}, {result["gate"]} gate, at {result["test_size"]}, {crop}'
            in capsys.readouterr().out)
    for name, value in settings.items():
        name = 'test_size' if name == 'size' else name
        assert result.get(name, value) == value


# ---- Released files -------------------------------------------------------------------------------------------------

@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts a file where the download of a released one would be; whoever goes to the network fails."""
    def offline(*_: Any) -> None:
        raise AssertionError('nothing is to be downloaded')

    monkeypatch.setattr(download, '_fetch', offline)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.chdir(tmp_path)

    def put(name: str, make: Callable, *args: Any, **others: Any) -> Path:
        path = tmp_path / 'torch' / 'hub' / 'checkpoints' / RELEASED[name].url.rsplit('/', 1)[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path, *args, **others)
        return path

    return put


def test_released_file_is_evaluated_as_published_and_compared(cached, data: Path, tmp_path: Path,
                                                              capsys: pytest.CaptureFixture) -> None:
    """The table knows that this file's raw weights reach the accuracy, at 256, though it holds an average too."""
    cached('moganet_tiny_256', files.timm_file, state_of(0, 'moganet_tiny'), state_of(1, 'moganet_tiny'))
    assert main.main(['--eval', '--checkpoint', 'released:moganet_tiny_256', *flags(data)]) == 0
    result = json.loads((tmp_path / 'runs' / 'moganet_tiny' / 'eval.json').read_text())
    assert_same(result, expected(0, data, model='moganet_tiny', size=256))
    assert (result['checkpoint'], result['published_acc1'], result['published_acc5']) == (
        'released:moganet_tiny_256', 79.6, 94.9)
    assert (result['difference_acc1'], result['difference_acc5']) == (result['acc1'] - 79.6, result['acc5'] - 94.9)
    said = capsys.readouterr().out
    assert ('Evaluating the raw weights of moganet_tiny, single gate, at 256, crop 0.9 (center), bicubic, on 13 images'
            in said)
    for name, label, published in (('acc1', 'top-1', 79.6), ('acc5', 'top-5', 94.9)):
        low, high = result[f'interval_{name}']
        assert low < result[name] < high < published
        assert (f'{label}: published {published} %, difference {result[name] - published:+.3f}, above the 95 % '
                f'interval {low:.2f} to {high:.2f}\n' in said)


def test_gate_and_crop_come_from_the_table_and_flags_win(cached, data: Path, tmp_path: Path,
                                                         capsys: pytest.CaptureFixture) -> None:
    """A file whose own config says nothing, and whose top-5 accuracy was not published."""
    cached('moganet_xtiny_rsb_a3', files.mmcv_file, state_of(0), None, config='')
    result = evaluate(data, tmp_path, '--checkpoint', 'released:moganet_xtiny_rsb_a3', *SMALL)
    assert_same(result, expected(0, data, crop_pct=0.95, gate='double'))
    assert result['published_acc1'] == 72.8 and 'published_acc5' not in result
    assert 'top-1: published 72.8 %' in (said := capsys.readouterr().out) and 'top-5: published' not in said
    result = evaluate(data, tmp_path, '--checkpoint', 'released:moganet_xtiny_rsb_a3', *SMALL, '--gate', 'single',
                      '--crop_pct', '1')
    assert_same(result, expected(0, data, crop_pct=1.0))


def test_pretrained_evaluates_timms_weights_of_a_model_with_all_their_classes(cached, data: Path,
                                                                              tmp_path: Path) -> None:
    cached(XT, files.timm_file, state_of(0), None)
    result = evaluate(data, tmp_path, '--pretrained', '--model', XT, *SMALL)
    assert_same(result, expected(0, data))
    assert (result['checkpoint'], result['weights']) == (None, 'pretrained')


# ---- Other models, several checkpoints ------------------------------------------------------------------------------

def other_state(name: str) -> State:
    torch.manual_seed(0)
    model = timm.create_model(name)
    with torch.no_grad():
        model.fc.weight.mul_(12)
        model.fc.bias[:6] += 2
    return model.state_dict()


@pytest.mark.parametrize('name, words, settings', [
    ('resnet18', SMALL, {'size': 64, 'crop_pct': 1.0}),
    ('test_resnet', (), {'size': 160, 'crop_pct': 0.95, 'interpolation': 'bilinear', 'mean': (0.5,) * 3,
                         'std': (0.5,) * 3})])
def test_other_timm_model_is_evaluated_as_timm_does(name: str, words: tuple[str, ...], settings: dict[str, Any],
                                                    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    state = other_state(name)
    torch.save(state, tmp_path / 'file')
    result = evaluate(data, tmp_path, '--model', name, '--checkpoint', tmp_path / 'file', *words)
    assert_same(result, outcome(state, data, model=name, **settings))
    assert result['gate'] is None
    assert f'Evaluating the raw weights of {name}, at {settings["size"]}, crop' in capsys.readouterr().out


def test_several_checkpoints_make_a_table_and_each_its_own_settings(
        cached, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    training_file(tmp_path / 'ours.pth', 1, 0)
    cached('moganet_xtiny', files.timm_file, state_of(0), None)
    sources = [str(tmp_path / 'ours.pth'), 'released:moganet_xtiny']
    both = evaluate(data, tmp_path, '--checkpoint', *sources, '--results_file', tmp_path / 'r' / 'results.csv')
    table = [line.replace('class top-1', 'by-class').split() for line in capsys.readouterr().out.splitlines()[-3:]]
    ours = expected_of_training(0, data)
    released = expected(0, data, size=224)
    (head, *lines), numbers = table, [[f'{one["ece"]:.2f}', f'{one["temperature"] or 0:.3f}'] for one in both]
    lines = [[cell if head[i] != 'T' or cell != '-' else '0.000' for i, cell in enumerate(line)] for line in lines]
    intervals = ['{:.2f}-{:.2f}'.format(*one['interval_acc1']) for one in both]
    means = [f'{one["mean_class_acc1"]:.3f}' for one in both]
    assert head == ['top-1', 'interval', 'top-5', 'by-class', 'NLL', 'ECE', 'T', 'published', 'weights', 'size',
                    'checkpoint']
    assert lines == [
        [f'{ours["acc1"]:.3f}', intervals[0], f'{ours["acc5"]:.3f}', means[0], f'{ours["loss"]:.4f}', *numbers[0], '-',
         'ema', '64', sources[0]],
        [f'{released["acc1"]:.3f}', intervals[1], f'{released["acc5"]:.3f}', means[1], f'{released["loss"]:.4f}',
         *numbers[1], '76.5', 'raw', '224', sources[1]]]
    with open(tmp_path / 'r' / 'results.csv') as file:
        rows = list(csv.DictReader(file))
    assert [row['checkpoint'] for row in rows] == [result['checkpoint'] for result in both] == sources
    assert float(rows[0]['loss']) == both[0]['loss'] == pytest.approx(ours['loss'], rel=ROUND_OFF)
    assert float(rows[1]['loss']) == both[1]['loss'] == pytest.approx(released['loss'], rel=ROUND_OFF)
    assert [(row['gate'], row['crop_pct']) for row in rows] == [('double', '0.8'), ('single', '0.9')]


def test_a_table_of_results_keeps_the_columns_that_it_was_begun_with(data: Path, tmp_path: Path,
                                                                    capsys: pytest.CaptureFixture) -> None:
    training_file(tmp_path / 'file', 0, None)
    (tmp_path / 'old.csv').write_text('loss,checkpoint\n1.5,x\n')
    loss = evaluate(data, tmp_path, '--checkpoint', tmp_path / 'file', '--results_file', tmp_path / 'old.csv')['loss']
    assert (tmp_path / 'old.csv').read_text() == f'loss,checkpoint\n1.5,x\n{loss},{tmp_path / "file"}\n'
    (tmp_path / 'mine.txt').write_text('my notes\n')
    assert main.main(['--eval', *flags(data), '--checkpoint', str(tmp_path / 'file'), '--results_file',
                      str(tmp_path / 'mine.txt')]) == 2
    assert 'its first line has no column checkpoint' in capsys.readouterr().err
    assert (tmp_path / 'mine.txt').read_text() == 'my notes\n'


def test_results_before_a_wrong_checkpoint_are_kept(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    training_file(tmp_path / 'file', 0, None)
    (tmp_path / 'wrong.pth').touch()
    assert main.main(['--eval', *flags(data), '--results_file', str(tmp_path / 'results.csv'), '--checkpoint',
                      str(tmp_path / 'file'), str(tmp_path / 'wrong.pth')]) == 2
    assert len((tmp_path / 'results.csv').read_text().splitlines()) == 2
    assert 'wrong.pth: is empty' in capsys.readouterr().err


# ---- Several processes ----------------------------------------------------------------------------------------------

def test_two_and_three_processes_reach_the_same_result(data: Path, tmp_path: Path) -> None:
    training_file(tmp_path / 'file', 1, 0)
    wanted = expected_of_training(0, data)
    for world_size in (2, 3):
        output = tmp_path / str(world_size)
        said = runs.run(('--eval', '--checkpoint', str(tmp_path / 'file'), '--output_dir', str(output), *flags(data)),
                        tmp_path / 'log', world_size=world_size)
        assert_same(json.loads((output / 'eval.json').read_text()), wanted)
        assert said.count('Evaluating the ema weights') == said.count(f'top-1 {wanted["acc1"]:.3f} %') == 1


def test_nearest_neighbours_are_those_computed_by_hand_on_one_two_and_three_processes(tmp_path: Path) -> None:
    """A checkpoint of six classes, on images of three: its classifier has no part in it."""
    training_file(tmp_path / 'file', 1, None)
    data = files.make_image_folder(tmp_path / 'data', train=6, val=5, draw=files.smooth)  # 18 and 15 images
    model = timm.create_model(XT, num_classes=6, gate='double', **FOUR_BLOCKS).eval()
    model.load_state_dict(state_of(1, 'four blocks'))
    inputs = []
    model.head.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    transform = create_transform(64, interpolation='bicubic', crop_pct=0.8)
    targets = []
    for split in ('train', 'val'):
        paths = sorted((data / split).glob('*/*'))
        targets.append(torch.tensor([int(path.parent.name.removeprefix('class')) for path in paths]))
        with torch.no_grad():
            model(torch.stack([transform(Image.open(path)) for path in paths]))
    known, asked = (features.double() for features in inputs)
    cosines = (asked @ known.T) / asked.norm(dim=1)[:, None] / known.norm(dim=1)
    votes = torch.zeros(15, 3, dtype=torch.float64)
    for image, row in enumerate(cosines):
        for neighbour in row.argsort(descending=True)[:4].tolist():
            votes[image, targets[0][neighbour]] += (row[neighbour] / 0.07).exp()
    shares = votes / votes.sum(1, keepdim=True)
    loss = -shares[torch.arange(15), targets[1]].clamp(min=1e-6).log().mean().item()
    acc1 = 100 * (shares.argmax(1) == targets[1]).double().mean().item()
    for world_size in (1, 2, 3):
        output = tmp_path / str(world_size)
        runs.run(('--eval', '--checkpoint', str(tmp_path / 'file'), '--output_dir', str(output), *flags(data), '--knn',
                  '4'), tmp_path / 'log', world_size=world_size)
        result = json.loads((output / 'eval.json').read_text())
        assert (result['count'], result['knn']) == (15, 4) and result['acc1'] == pytest.approx(acc1, abs=1e-9)
        # Cosines near 1 are divided by 0.07, which makes round-off 14 times as large
        assert result['loss'] == pytest.approx(loss, rel=20 * ROUND_OFF)


@pytest.mark.parametrize(('words', 'reason'), [
    ('--knn 0', '--knn 0: give a whole number above 0'), ('--knn 99', '--knn 99 compares with 99 or more training'),
    ('--knn 5 --compile', 'leave --compile out'), ('--knn 5 --valid_labels x', 'leave --valid_labels out')])
def test_nearest_neighbours_that_cannot_be_are_refused(words: str, reason: str, tmp_path: Path, capsys) -> None:
    training_file(tmp_path / 'file', 1, None)
    data = files.make_image_folder(tmp_path / 'data', train=2, val=1)
    assert main.main(['--eval', '--checkpoint', str(tmp_path / 'file'), *flags(data), *words.split()]) == 2
    assert reason in capsys.readouterr().err


# Rank 0 must not be gone before rank 1 has joined it, which would then have an error of its own to tell
JOINED = '''
import torch.distributed, utils
join = utils.init_processes
def join_together(device):
    processes = join(device)
    torch.distributed.barrier()
    return processes
utils.init_processes = join_together
'''


def test_wrong_file_ends_all_processes_with_one_line(data: Path, tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('<html><body>Not Found</body></html>')
    job = runs.start(('--eval', '--checkpoint', str(tmp_path / 'file'), *flags(data)), tmp_path / 'log', world_size=2,
                     before=JOINED)
    first, second = job.wait()
    assert first == 2 and second in (1, 2)  # 1 where rank 0 left before rank 1 had looked at the file itself
    assert job.text().splitlines() == [f'error: {tmp_path}/file: is a web page, not a checkpoint: fetch it again, from '
                                       'the link of the file itself']


# ---- Wrong ones -----------------------------------------------------------------------------------------------------

def refusal(words: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one line by which a command line is refused."""
    assert main.main(['--eval', *words]) == 2
    line = capsys.readouterr().err
    assert line.startswith('error: ') and line.count('\n') == 1
    return line


def truncated(path: Path) -> None:
    training_file(path, 0, None)
    os.truncate(path, path.stat().st_size // 2)


def nonsense(path: Path, **args: Any) -> None:
    torch.save({'arch': XT, 'args': argparse.Namespace(**args), 'state_dict': state_of(0)}, path)


@pytest.mark.parametrize('make, words, said', [
    (lambda path: None, '', 'does not exist; check'), (Path.mkdir, '', 'is a directory'), (Path.touch, '', 'is empty'),
    (truncated, '', 'is damaged or no checkpoint'),
    (lambda path: path.write_text('<!DOCTYPE html><html></html>'), '', 'is a web page'),
    (lambda path: torch.save({'model': state_of(0), 'x': files.Payload(os.getcwd)}, path), '', 'refused: to read it, '),
    (lambda path: torch.save(state_of(0), path), '', 'does not say which model it is; give --model'),
    (lambda path: torch.save(state_of(0), path), '--model resnet18', 'do not fit resnet18'),
    (lambda path: torch.save(state_of(0), path), '--model moganet_tiny', 'do not fit moganet_tiny'),
    (lambda path: torch.save(state_of(0), path), '--model moganet_xtinny', 'did you mean moganet_xtiny'),
    (lambda path: torch.save(state_of(0), path), '--model resnet18.none', 'Invalid pretrained tag'),
    (lambda path: torch.save(state_of(0), path), f'--model {XT} --weights ema', 'has no ema weights, only raw'),
    (lambda path: torch.save(state_of(0), path), f'--model {XT} --num_classes 10', 'give --num_classes as the file'),
    (lambda path: torch.save({'arch': 'resnet18', 'state_dict': {}}, path), '--gate double', '--gate is for MogaNet'),
    (lambda path: nonsense(path, interpolation='cubic'), '', "interpolation 'cubic', which cannot be; give --inter"),
    (lambda path: nonsense(path, crop_pct='wide'), '', "crop_pct 'wide', which cannot be; give --crop_pct"),
    (lambda path: nonsense(path, mean=[0.5]), '', 'mean (0.5,), which cannot be; give --mean'),
    (lambda path: torch.save(state_of(0), path), f'--model {XT} --pretrained', 'both name the weights'),
], ids=['missing', 'directory', 'empty', 'truncated', 'web page', 'malicious', 'no model', 'another architecture',
        'another variant', 'misspelt model', 'unknown tag', 'no average', 'another classifier', 'no gate',
        'interpolation', 'crop', 'mean', 'two sources'])
def test_wrong_file_is_one_line_and_leaves_nothing(make: Callable[[Path], Any], words: str, said: str, data: Path,
                                                   tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make(tmp_path / 'file.pth')
    line = refusal(['--checkpoint', str(tmp_path / 'file.pth'), *words.split(), *flags(data)], capsys)
    assert said in line
    assert {path.name for path in tmp_path.iterdir()} <= {'file.pth'}


def test_flag_helps_over_nonsense_in_a_file(data: Path, tmp_path: Path) -> None:
    nonsense(tmp_path / 'file', interpolation='cubic')
    result = evaluate(data, tmp_path, '--checkpoint', tmp_path / 'file', *SMALL, '--interpolation', 'bilinear')
    assert_same(result, expected(0, data, interpolation='bilinear'))


def test_results_that_cannot_be_written_are_one_line(data: Path, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture) -> None:
    training_file(tmp_path / 'file', 0, None)
    words = ['--checkpoint', str(tmp_path / 'file'), *flags(data)]
    assert 'file/eval.json (File exists)' in refusal([*words, '--output_dir', str(tmp_path / 'file')], capsys)
    assert 'cannot be written (Is a directory)' in refusal([*words, '--results_file', str(tmp_path)], capsys)


# ---- Classes --------------------------------------------------------------------------------------------------------

def test_classes_that_are_not_the_models_are_warned_of(data: Path, tmp_path: Path,
                                                       capsys: pytest.CaptureFixture) -> None:
    training_file(tmp_path / 'file', 0, None)
    assert_same(evaluate(data, tmp_path, '--checkpoint', tmp_path / 'file'), expected_of_training(0, data))
    assert 'The data has' not in capsys.readouterr().out
    payload = torch.load(tmp_path / 'file')
    torch.save({**payload, 'classes': ['ant', *payload['classes'][1:]]}, tmp_path / 'file')
    assert '1 of the 6 classes of the data (class0) are none' in refusal(['--checkpoint', str(tmp_path / 'file'),
                                                                         *flags(data)], capsys)
    torch.save({**payload, 'classes': ['ant', 'bee', 'cat', 'dog', 'emu', 'fox']}, tmp_path / 'file')
    evaluate(data, tmp_path, '--checkpoint', tmp_path / 'file')
    assert 'other classes (class0, ...) than the checkpoint was trained on (ant, ...)' in capsys.readouterr().out
    torch.save(state_of(0), tmp_path / 'file')
    evaluate(data, tmp_path, '--checkpoint', tmp_path / 'file', '--model', XT, *SMALL)
    assert 'The data has 6 classes, the model 1000: ' in capsys.readouterr().out


def test_valid_labels_compare_the_named_classes_alone(data: Path, tmp_path: Path,
                                                      capsys: pytest.CaptureFixture) -> None:
    torch.save(state_of(0), tmp_path / 'file')
    valid = (5, 3, 900, 0, 1, 2)
    (tmp_path / 'valid.txt').write_text('\n'.join(map(str, valid)))
    words = ['--checkpoint', str(tmp_path / 'file'), '--model', XT, *SMALL, '--valid_labels',
             str(tmp_path / 'valid.txt')]
    result = evaluate(data, tmp_path, *words)
    assert_same(result, expected(0, data, valid=valid))
    assert 'The data has' not in capsys.readouterr().out
    (tmp_path / 'valid.txt').write_text('5 3 900')
    assert 'names 3 classes, but the data has 6' in refusal([*words, *flags(data)], capsys)
