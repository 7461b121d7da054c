"""The engine knows no task: one that lives only in the tests is trained, resumed, evaluated and predicted by it."""
import json
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

import main
import predict
import recipes
import runs
import tasks
from angle_task import ROW, AngleRecipe, Closeness, draw_bar
from builders import differences, log_of, state_of
from utils import UserError

WORDS = ('--recipe', ROW.name, '--device', 'cpu', '--num_workers', '1', '--print_freq', '2')
KNOWN = 'import angle_task\nangle_task.register()\n'  # in each process, before main


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The row is known in this process too, for as long as a test takes."""
    monkeypatch.setitem(recipes.RECIPES, ROW.name, ROW)


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Path:
    """A run of twenty epochs, which is enough to tell angles."""
    folder = tmp_path_factory.mktemp('angle') / 'run'
    runs.run((*WORDS, '--epochs', '20', '--output_dir', str(folder)), folder.with_suffix('.txt'), before=KNOWN)
    return folder


def test_a_foreign_task_learns_and_its_losses_and_metrics_are_the_log(trained):
    log = log_of(trained)
    assert len(log) == 20
    for entry in log:  # their sum, in float32 and rounded once more
        assert entry['train_direction'] + entry['train_length'] == pytest.approx(entry['train_loss'], rel=1e-6)
    assert log[-1]['train_direction'] < 0.5 * log[0]['train_direction']
    assert {'test_close', 'test_close_ema', 'test_loss', 'test_loss_ema'} <= log[-1].keys()
    assert not any('acc' in name for name in log[-1])
    state = state_of(trained)
    assert state['best']['test_close'] == max(entry['test_close'] for entry in log) > 50  # chance: 17
    assert (trained / 'checkpoint-best.pth').exists() and (trained / 'checkpoint-best-ema.pth').exists()
    text = trained.with_suffix('.txt').read_text()
    assert f'within 15 degrees {log[-1]["test_close"]:.2f} %' in text and 'best close' in text
    saved = json.loads((trained / 'recipe.json').read_text())
    assert saved['task'] == AngleRecipe.task and recipes.from_dict(saved).grain == ROW.grain


@pytest.mark.parametrize('world_size', [1, 2])
def test_a_foreign_task_resumes_bit_for_bit(world_size, tmp_path):
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    runs.run((*WORDS, '--output_dir', str(whole)), tmp_path / 'whole.txt', world_size=world_size, before=KNOWN)
    stop = f'''{KNOWN}
import os
def observe(state):
    if state.step == 6 and rank == 0:
        os.kill(os.getpid(), {int(signal.SIGTERM)})
'''
    job = runs.start((*WORDS, '--output_dir', str(parts)), tmp_path / 'stopped.txt', world_size=world_size, before=stop)
    assert job.wait() == [128 + signal.SIGTERM] * world_size, job.text()
    assert state_of(parts)['step'] in (6, 7)  # two ranks agree an update later
    runs.run((*WORDS, '--output_dir', str(parts)), tmp_path / 'rest.txt', world_size=world_size, before=KNOWN)
    assert differences(state_of(whole), state_of(parts)) == []


def test_a_foreign_task_is_evaluated_alike_on_one_and_two_processes(trained, tmp_path):
    results = []
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        words = ('--eval', '--checkpoint', str(trained / 'checkpoint-last.pth'), '--weights', 'raw', '--device', 'cpu',
                 '--val_batch_size', '4', '--output_dir', str(folder))
        text = runs.run(words, tmp_path / f'{world_size}.txt', world_size=world_size, before=KNOWN)
        results.append(json.loads((folder / 'eval.json').read_text()))
        assert f'within 15 degrees {results[-1]["close"]:.4g} %' in text
    assert results[0]['close'] == results[1]['close'] and results[0]['count'] == results[1]['count'] == 21
    assert results[0]['loss'] == pytest.approx(results[1]['loss'], rel=1e-6)  # float32 means of other batches
    assert results[0]['close'] == log_of(trained)[-1]['test_close']


def test_a_foreign_task_is_predicted(trained, tmp_path, capsys):
    angles = {'flat': 0.0, 'upright': 90.0, 'sloping': 45.0}
    for name, angle in angles.items():
        Image.fromarray(draw_bar(angle)).save(tmp_path / f'{name}.png')
    files = [str(tmp_path / f'{name}.png') for name in angles]
    words = [*files, '--checkpoint', str(trained / 'checkpoint-best.pth'), '--weights', 'raw', '--device', 'cpu']
    assert predict.main([*words, '--json']) == 0
    found = {Path(entry['image']).stem: entry['predictions']['angle'] for entry in json.loads(capsys.readouterr().out)}
    wrong = [abs((found[name] - angle + 90) % 180 - 90) for name, angle in angles.items()]
    assert sorted(wrong)[1] < 30  # chance: 45; it has seen 48 bars
    assert predict.main(words) == 0
    assert f'{found["flat"]:8.1f} degrees' in capsys.readouterr().out


def test_flags_are_those_of_the_recipes_task(capsys):
    recipe, _ = recipes.resolve(['--recipe', ROW.name, '--grain', '5'])
    assert recipe.grain == 5 and type(recipe) is AngleRecipe
    with pytest.raises(UserError, match='unknown flag --mixup'):
        recipes.resolve(['--recipe', ROW.name, '--mixup', '0.1'])
    with pytest.raises(UserError, match=r'--grain -1\.0 is negative'):
        recipes.resolve(['--recipe', ROW.name, '--grain', '-1'])
    with pytest.raises(SystemExit):
        recipes.resolve(['--recipe', ROW.name, '--help'])
    said = capsys.readouterr().out
    assert '--grain' in said and '--mixup' not in said


def test_a_file_cannot_name_a_task_that_no_row_has():
    with pytest.raises(UserError, match='no recipe is of the task'):
        recipes.from_dict({'task': 'os:system', 'model': 'resnet18'})


def test_a_batch_moves_with_all_that_is_in_it():
    @tasks.dataclasses.dataclass
    class Nested(tasks.Batch):
        targets: list[dict[str, torch.Tensor]]
        sizes: tuple[int, int]

    batch = Nested(torch.zeros(2, 3, 4, 4), [{'boxes': torch.ones(1, 4)}, {'boxes': torch.ones(0, 4)}], (4, 4))
    moved = batch.to(torch.device('meta'))
    assert len(moved) == 2 and moved.sizes == (4, 4)
    assert moved.images.is_meta and all(target['boxes'].is_meta for target in moved.targets)


def test_a_flag_of_another_task_is_refused_beside_a_checkpoint(trained, capsys):
    words = ['--checkpoint', str(trained / 'checkpoint-last.pth'), '--crop_pct', '0.9', '--device', 'cpu']
    assert main.main(['--eval', *words]) == 2
    assert '--crop_pct is no field of angle_tiny' in capsys.readouterr().err
    with pytest.raises(UserError, match='--crop_pct is no field of angle_tiny'):
        predict.main(['photo.png', *words])


def test_the_first_value_of_a_metric_is_the_best_yet_also_below_zero(tmp_path, monkeypatch):
    result = Closeness.result
    monkeypatch.setattr(Closeness, 'result', lambda self, models: {
        name: values | {'close': values['close'] - 200} for name, values in result(self, models).items()})
    assert main.main([*WORDS, '--num_workers', '0', '--epochs', '1', '--output_dir', str(tmp_path)]) == 0
    assert (tmp_path / 'checkpoint-best.pth').exists() and state_of(tmp_path)['best']['test_close'] < 0
