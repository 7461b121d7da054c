"""What a run writes beside its checkpoints is what it computed: TensorBoard, its pictures, Weights & Biases."""
import io
import json
import shutil
import signal
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import engine
import main
import recipes
import runs
import utils
from builders import log_of, make_image_folder, open_loaders
from tasks.classification import Accuracy, Labelled
from tasks.pictures import draw_confusion
from training import charts
from training import log as notes

COMMAND = (*runs.TINY, '--device', 'cpu', '--total_batch_size', '8', '--batch_size', '8', '--num_workers', '0',
           '--warmup_epochs', '0', '--epochs', '2', '--print_freq', '2')


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    """48 images to train, six updates of 8, and 15 to test, in three classes."""
    return make_image_folder(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def finished(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('run')
    assert main.main([*COMMAND, '--data_path', str(data), '--output_dir', str(folder)]) == 0
    return folder


def board_of(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / 'tensorboard'), size_guidance={'images': 0}).Reload()


def picture_of(board: EventAccumulator, tag: str) -> np.ndarray:
    (event,) = board.Images(tag)
    return np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))


# ---- TensorBoard ----------------------------------------------------------------------------------------------------

def test_tensorboard_shows_what_log_txt_holds(finished):
    board, log = board_of(finished), log_of(finished)
    tags = {name: name.replace('_', '/', 1) if name.startswith('test_') else f'epoch/{name}' for name in log[0]
            if name not in ('epoch', 'step', 'n_parameters')}
    assert {'epoch/train_loss', 'epoch/lr', 'epoch/images_per_second', 'epoch/data_wait', 'test/acc1_ema'} <= set(
        tags.values())
    for name, tag in tags.items():
        events = board.Scalars(tag)
        assert [event.step for event in events] == [6, 12]
        assert [event.value for event in events] == pytest.approx([entry[name] for entry in log], rel=1e-6)  # float32


def test_first_picture_is_the_first_batch_as_the_network_sees_it(finished, data):
    recipe, run = recipes.resolve([*COMMAND, '--data_path', str(data)])
    batch = next(open_loaders(recipe, run).train.epoch(0))
    assert batch.targets.dtype == torch.float32  # mixed
    pixels = batch.images * torch.tensor(recipe.std).view(3, 1, 1) + torch.tensor(recipe.mean).view(3, 1, 1)
    shown = picture_of(board_of(finished), 'train/images')
    assert shown.shape == (36, 2 + 8 * 34, 3)  # eight of 32 pixels in a row, two pixels between them
    for i in range(8):
        tile = shown[2:34, 2 + 34 * i:34 + 34 * i]
        assert np.abs(tile - pixels[i].clamp(0, 1).permute(1, 2, 0).numpy() * 255).max() <= 1  # rounding to 8 bits


def test_picture_is_of_fresh_starts_alone(data, tmp_path):
    """A run that saved after its third update and goes on shows the picture of its first start, once."""
    command = (*COMMAND, '--data_path', str(data), '--output_dir', str(tmp_path / 'run'))
    job = runs.start(command, tmp_path / 'out.txt', before=stopping_after(3))
    assert job.wait() == [128 + signal.SIGTERM], job.text()
    before = picture_of(board_of(tmp_path / 'run'), 'train/images')
    runs.run(command, tmp_path / 'out.txt')
    assert np.array_equal(picture_of(board_of(tmp_path / 'run'), 'train/images'), before)


def test_confusion_matrix_of_both_models_is_shown_at_the_end(finished, data):
    board, log = board_of(finished), log_of(finished)
    for suffix in ('', '_ema'):
        (event,) = board.Images(f'test/confusion{suffix}')
        assert event.step == 12
    assert main.main(['--eval', '--checkpoint', str(finished / 'checkpoint-last.pth'), '--weights', 'raw',
                      '--data_path', str(data), '--device', 'cpu', '--num_workers', '0']) == 0
    counts = json.loads((finished / 'eval.json').read_text())['confusion']
    assert [sum(row) for row in counts] == [5, 5, 5]
    assert 100 * sum(counts[i][i] for i in range(3)) / 15 == pytest.approx(log[-1]['test_acc1'])
    expected = np.asarray(draw_confusion(counts, ['class0', 'class1', 'class2']))
    assert np.array_equal(picture_of(board, 'test/confusion'), expected)


def test_confusion_matrix_counts_true_classes_in_rows():
    class Fixed(torch.nn.Linear):  # says the class that the image's first value is
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(images[:, 0].long(), 3).float()

    def evaluated(classes: list[str] | None) -> dict[str, Any]:
        batches = [Labelled(torch.tensor([[0.], [1.], [1.]]), torch.tensor([0, 0, 1])),
                   Labelled(torch.tensor([[2.]]), torch.tensor([0]))]
        cpu = torch.device('cpu')
        return engine.evaluate({'': Fixed(1, 1)}, batches, Accuracy(cpu, classes=classes), count=4, device=cpu)['']

    assert evaluated(['x', 'y', 'z'])['confusion'] == [[1, 1, 1], [0, 1, 0], [0, 0, 0]]
    assert 'confusion' not in evaluated(None)


def test_confusion_matrix_of_two_ranks_is_their_sum(data, tmp_path):
    runs.run((*COMMAND, '--epochs', '1', '--batch_size', '4', '--data_path', str(data), '--output_dir',
              str(tmp_path / 'run')), tmp_path / 'out.txt', world_size=2)
    runs.run(('--eval', '--checkpoint', str(tmp_path / 'run' / 'checkpoint-last.pth'), '--weights', 'raw',
              '--data_path', str(data), '--device', 'cpu', '--num_workers', '0'), tmp_path / 'out.txt', world_size=2)
    counts = json.loads((tmp_path / 'run' / 'eval.json').read_text())['confusion']
    assert [sum(row) for row in counts] == [5, 5, 5]


@pytest.mark.parametrize('size', [1, 10, 100])
def test_picture_of_a_confusion_matrix_is_blue_where_right_and_orange_where_wrong(size):
    right, wrong = (np.asarray(draw_confusion(counts, [])).reshape(-1, 3).astype(int) for counts in (
        np.eye(size, dtype=int), np.roll(np.eye(size, dtype=int), 1, axis=1)))
    blue, orange = (lambda pixels, colour=colour: bool((pixels == colour).all(1).any())
                    for colour in ((0, 114, 178), (213, 94, 0)))
    assert blue(right) and not orange(right)
    assert size == 1 or (orange(wrong) and not blue(wrong))


# ---- Weights & Biases, offline: the real package and the files that it would send -----------------------------------

def stopping_after(updates: int) -> str:
    """Python that makes a run receive SIGTERM in an update."""
    return f'''
import os, signal
def observe(state):
    if state.step == {updates}:
        os.kill(os.getpid(), signal.SIGTERM)
'''


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """The package, told to send nothing."""
    wandb = pytest.importorskip('wandb')
    for name, value in {'WANDB_MODE': 'offline', 'WANDB_SILENT': 'true', 'WANDB_DATA_DIR': str(tmp_path / 'data'),
                        'WANDB_CACHE_DIR': str(tmp_path / 'cache')}.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()  # the settings are read once a process
    yield wandb
    wandb.teardown()


def records_of(folder: Path) -> list[Any]:
    """What the package recorded, by all starts of a run: protobufs in LevelDB's log format, in blocks of 32 KiB."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record
    wandb.teardown()  # waits for the service, which writes after `finish` has returned
    found = []
    for path in sorted((folder / 'wandb').glob('offline-run-*/*.wandb')):
        content, place, parts = path.read_bytes(), 7, b''
        while place + 7 <= len(content):
            if 32768 - place % 32768 < 7:  # no room for a header: filled up
                place += 32768 - place % 32768
                continue
            _, length, kind = struct.unpack('<IHB', content[place:place + 7])
            parts += content[place + 7:place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # whole, or the last part
                found.append(Record.FromString(parts))
                parts = b''
    return found


def history_of(folder: Path) -> list[dict[str, Any]]:
    rows = [{item.key or '/'.join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for record in records_of(folder) if record.WhichOneof('record_type') == 'history']
    return [{name: value for name, value in row.items() if not name.startswith('_') or name == '_step'} for row in rows]


def test_wandb_gets_the_log_the_recipe_and_the_checkpoints_and_changes_no_bit(offline, finished, data, tmp_path):
    folder = tmp_path / 'run'
    assert main.main([*COMMAND, '--data_path', str(data), '--output_dir', str(folder), '--enable_wandb', 'true',
                      '--project', 'mine', '--wandb_ckpt']) == 0
    records = {record.WhichOneof('record_type'): record for record in records_of(folder)}
    assert records['run'].run.project == 'mine' and records['run'].run.display_name == 'run'
    config = {item.key: json.loads(item.value_json) for item in records['run'].run.config.update}
    assert config['lr'] == 1e-3 and config['run']['batch_size'] == 8
    rows = {row['_step']: row for row in history_of(folder)}
    assert list(rows) == [0, 2, 4, 6, 8, 10, 12] and rows[0]['train/images/_type'] == 'image-file'
    assert rows[12]['test/confusion_ema/_type'] == 'image-file'
    for entry in log_of(folder):
        for name, column in (('epoch/train_loss', 'train_loss'), ('test/acc1', 'test_acc1'), ('epoch/lr', 'lr')):
            assert rows[entry['step']][name] == entry[column]
    uploaded = {Path(entry.path).name for entry in records['artifact'].artifact.manifest.contents}
    assert uploaded == {'checkpoint-best.pth', 'checkpoint-best-ema.pth'}
    assert records['exit'].exit.exit_code == 0
    states = [torch.load(path / 'checkpoint-last.pth', weights_only=True)['model'] for path in (finished, folder)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_wandb_continues_one_run_and_gets_no_update_twice(offline, data, tmp_path):
    """Killed after update 11, without a checkpoint since update 6: updates 7 to 11 are computed again, and not sent."""
    command = (*COMMAND, '--data_path', str(data), '--output_dir', str(tmp_path / 'run'), '--wandb')
    # The server from which processes are forked has the environment of its own start
    environment = "import os; os.environ |= {'WANDB_MODE': 'offline', 'WANDB_SILENT': 'true'}\n"
    killed = environment + stopping_after(11).replace('SIGTERM', 'SIGKILL')
    job = runs.start(command, tmp_path / 'out.txt', before=killed)
    assert job.wait() == [-signal.SIGKILL], job.text()
    sent = json.loads((tmp_path / 'run' / 'wandb.json').read_text())
    assert sent['step'] == 10
    shutil.rmtree(tmp_path / 'run' / 'wandb')  # the package writes every 15 s: how much it has is chance
    runs.run(command, tmp_path / 'out.txt', before=environment)
    (start,) = [record.run for record in records_of(tmp_path / 'run') if record.WhichOneof('record_type') == 'run']
    assert start.run_id == sent['id']
    assert [row['_step'] for row in history_of(tmp_path / 'run')] == [12]


def test_rollback_sends_no_update_twice(offline, finished, tmp_path):
    board = charts.WeightsAndBiases(tmp_path, project='moganet', config={}, step=0)
    for step in (2, 4, 6, 4, 6, 8):  # back to 2 after 6
        board.add({'train/loss': float(step)}, step)
    board.close(complete=False)
    assert [(row['_step'], row['train/loss']) for row in history_of(tmp_path)] == [(2, 2), (4, 4), (6, 6), (8, 8)]
    (end,) = [record for record in records_of(tmp_path) if record.WhichOneof('record_type') == 'exit']
    assert end.exit.exit_code == 1


@pytest.mark.parametrize('chart', [charts.TensorBoard, charts.WeightsAndBiases])
def test_a_chart_that_fails_does_not_end_the_run(chart, offline, finished, data, tmp_path, monkeypatch, capsys):
    """By a full disk, or a lost network."""
    add = chart.add

    def failing(self, values: dict[str, Any], step: int) -> None:
        if step > 2:
            raise OSError(28, 'No space left on device')
        add(self, values, step)

    monkeypatch.setattr(chart, 'add', failing)
    folder = tmp_path / 'run'
    assert main.main([*COMMAND, '--data_path', str(data), '--output_dir', str(folder), '--wandb']) == 0
    printed = capsys.readouterr().out
    assert printed.count('No space left on device; the run goes on without it') == 1
    assert [line['train_loss'] for line in log_of(folder)] == [line['train_loss'] for line in log_of(finished)]


def test_a_run_that_continues_goes_on_where_wandb_is_not_reached(offline, data, tmp_path, monkeypatch, capsys):
    import wandb
    command = (*COMMAND, '--data_path', str(data), '--output_dir', str(tmp_path / 'run'))
    runs.start(command, tmp_path / 'out.txt', before=stopping_after(3)).wait()

    def unreachable(**_: Any) -> None:
        raise wandb.errors.CommError('no route to host')

    monkeypatch.setattr(wandb, 'init', unreachable)
    assert main.main([*command, '--wandb']) == 0
    assert '--wandb: no route to host; the run goes on without it' in capsys.readouterr().out


@pytest.mark.parametrize('flag', ['--output_dir', '--log_dir'])
def test_a_folder_that_cannot_be_written_is_one_line(flag, data, tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    command = [*COMMAND, '--data_path', str(data), '--output_dir', str(tmp_path / 'run'), flag,
               str(tmp_path / 'file' / 'below')]
    assert main.main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f'error: cannot write {tmp_path / "file"}') and 'another --output_dir or --log_dir' in line


def test_wandb_that_cannot_begin_is_one_line_with_the_cure(offline, data, tmp_path, monkeypatch, capsys):
    command = [*COMMAND, '--data_path', str(data), '--output_dir', str(tmp_path / 'run'), '--wandb']
    monkeypatch.setenv('WANDB_MODE', 'online')
    for name in ('WANDB_API_KEY', 'NETRC', 'WANDB_IDENTITY_TOKEN_FILE'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('HOME', str(tmp_path))  # no login is kept there
    monkeypatch.setattr(sys, 'stdin', io.StringIO())
    assert main.main(command) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error')]
    assert 'wandb login' in line and not (tmp_path / 'run' / 'log.txt').exists()
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    assert main.main(command) == 2
    assert 'pip install wandb' in capsys.readouterr().err


# ---- What only notes or shows costs no run --------------------------------------------------------------------------

DAMAGE = {'empty': b'', 'cut': b'[{"command": ["ma', 'another type': b'{"a": 1}', 'a number': b'3', 'null': b'null',
          'another encoding': '[{"host": "r\xe9"}]'.encode('utf-16'), 'bytes': bytes(range(256)),
          'deep': b'[' * 100_000}


@pytest.mark.parametrize('damage', [*DAMAGE, 'a folder'])
def test_a_damaged_note_is_kept_aside_and_the_run_goes_on(damage, finished, data, tmp_path, capsys):
    folder = tmp_path / 'run'
    shutil.copytree(finished, folder)
    kept = {path.name: path.read_bytes() for path in folder.glob('checkpoint-*')}
    for name in ('environment.json', 'recipe.json'):
        (folder / name).unlink()
        if damage != 'a folder':
            (folder / name).write_bytes(DAMAGE[damage])
    if damage == 'a folder':
        (folder / 'environment.json').mkdir()
    (folder / 'environment.json.damaged').write_text('an earlier time')
    written = notes.Notes(*recipes.resolve([*COMMAND, '--data_path', str(data), '--output_dir', str(folder)]),
                          utils.Processes(device=torch.device('cpu')), step=12, total=12)
    written.close()
    assert len(json.loads((folder / 'environment.json').read_text())) == 1
    assert json.loads((folder / 'recipe.json').read_text())['model'] == 'moganet_xtiny'
    assert (folder / 'environment.json.damaged').read_text() == 'an earlier time'
    aside = folder / 'environment.json.damaged1'
    assert aside.is_dir() if damage == 'a folder' else aside.read_bytes() == DAMAGE[damage]
    assert len(log_of(folder)) == 2
    assert kept == {path.name: path.read_bytes() for path in folder.glob('checkpoint-*')}


def test_log_txt_keeps_its_epochs_whatever_else_stands_in_it(finished, data, tmp_path):
    """Property: two hundred logs with foreign lines in them, seeded."""
    rng = np.random.default_rng(0)
    lines = (finished / 'log.txt').read_bytes().splitlines(keepends=True)
    foreign = [b'\n', b'{"epoch": "x"}\n', b'[]\n', b'7\n', b'\xff\xfe\n', b'{"epoch": 3}\n', b'null\n', b'{"epoch"\n']
    made = notes.Notes.__new__(notes.Notes)
    for number in range(200):
        made._folder = tmp_path / str(number)
        made._folder.mkdir()
        mixed = [*lines]
        for _ in range(rng.integers(1, 4)):
            mixed.insert(rng.integers(len(mixed) + 1), foreign[rng.integers(len(foreign))])
        content = b''.join(mixed) + (lines[0][:int(rng.integers(len(lines[0])))] if number % 2 else b'')
        (made._folder / 'log.txt').write_bytes(content)
        made._cut_log(12)
        assert (made._folder / 'log.txt').read_bytes() == b''.join(lines)
        assert (made._folder / 'log.txt.damaged').read_bytes() == content


def test_a_line_that_a_kill_cut_off_is_nobodys(finished, tmp_path):
    made = notes.Notes.__new__(notes.Notes)
    made._folder = tmp_path
    content = (finished / 'log.txt').read_bytes()
    (tmp_path / 'log.txt').write_bytes(content + b'{"epoch": 2, "st')
    made._cut_log(12)
    assert [path.name for path in tmp_path.iterdir()] == ['log.txt']
    assert (tmp_path / 'log.txt').read_bytes() == content


BREAKS = ['training.charts.SummaryWriter', 'tasks.pictures.draw_images', 'tasks.pictures.draw_confusion',
          'training.charts.SummaryWriter.add_scalar', 'training.charts.SummaryWriter.close',
          'training.log.importlib.metadata.version', 'training.log.subprocess.run', 'tqdm.tqdm']


@pytest.mark.parametrize('broken', BREAKS)
def test_what_only_shows_may_fail(broken, data, tmp_path, monkeypatch, capsys):
    import importlib.metadata
    errors = {'training.log.importlib.metadata.version': importlib.metadata.PackageNotFoundError('torch'),
              'training.log.subprocess.run': FileNotFoundError('git')}

    def fail(*_: Any, **__: Any) -> None:
        raise errors.get(broken, RuntimeError('it does not work here'))

    monkeypatch.setattr(broken, fail)
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: broken == 'tqdm.tqdm')
    assert main.main([*COMMAND, '--epochs', '1', '--data_path', str(data), '--output_dir', str(tmp_path / 'run')]) == 0
    printed = capsys.readouterr().out
    assert broken in errors or 'it does not work here; the run goes on without it' in printed
    assert len(log_of(tmp_path / 'run')) == 1
