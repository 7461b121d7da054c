"""How sums are formed is part of the state: a run goes on in the layout and the precision in which it began."""
import json
import logging
import signal
from pathlib import Path

import pytest
import torch

import main
from builders import assert_same_run, make_image_folder, smooth, state_of
from recipes import Run
from runs import TINY
from training.checkpoint import earlier_arithmetic
from training.start import settle_arithmetic
from utils import UserError

CPU, CUDA = torch.device('cpu'), torch.device('cuda')

pytestmark = pytest.mark.usefixtures('one_thread', 'own_cache', 'switches')


@pytest.fixture
def switches():
    """Puts back what torch keeps of TF32."""
    yield
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp('data'), train=6, val=2, draw=smooth)


@pytest.fixture(scope='module')
def train(data):
    """Trains four updates of 8 in this process, stopped after some of them where that is asked."""
    def start(folder: Path, *flags: str, stop_after: int = 0, status: int | None = None) -> None:
        def observe(state):
            if state.step == stop_after:
                signal.raise_signal(signal.SIGTERM)

        words = [*TINY, '--device', 'cpu', '--data_path', str(data), '--output_dir', str(folder), '--num_workers', '0',
                 '--total_batch_size', '8', '--batch_size', '8', '--epochs', '2', '--warmup_epochs', '0', *flags]
        expected = status if status is not None else 128 + signal.SIGTERM if stop_after else 0
        assert main.main(words, observer=observe) == expected
    return start


def rewrite(folder: Path, change) -> None:
    """Changes the state in a run's newest checkpoint."""
    state = state_of(folder)
    change(state)
    torch.save(state, folder / f'checkpoint-{state["step"]}.pth')


def layout(folder: Path) -> bool:
    """Whether the weights of a run are channels-last."""
    return state_of(folder)['model']['patch_embed2.projection.weight'].is_contiguous(memory_format=torch.channels_last)


@pytest.fixture(scope='module')
def contiguous(train, tmp_path_factory) -> Path:
    """A whole run as an earlier version trained it here."""
    folder = tmp_path_factory.mktemp('contiguous')
    train(folder, '--channels_last', 'false')
    return folder


def test_a_new_run_on_the_cpu_is_channels_last_and_says_and_saves_it(train, tmp_path, capsys):
    train(tmp_path, '--epochs', '1')
    assert state_of(tmp_path)['arithmetic'] == {'channels_last': True, 'tf32': False, 'convolutions': 'conv2d'}
    assert layout(tmp_path)
    assert 'fp32, channels-last, on cpu' in capsys.readouterr().out
    assert json.loads((tmp_path / 'environment.json').read_text())[-1]['run']['channels_last'] is True


@pytest.mark.parametrize('earlier', [False, True])
def test_a_run_goes_on_in_its_layout_bit_for_bit(earlier, train, contiguous, tmp_path, capsys):
    """The checkpoint says the layout, or is one of an earlier version, in whose time the CPU's was contiguous."""
    train(tmp_path, '--channels_last', 'false', stop_after=1)
    if earlier:
        rewrite(tmp_path, lambda state: state.pop('arithmetic'))
        starts = json.loads((tmp_path / 'environment.json').read_text())
        starts[-1]['run'] |= {'channels_last': None, 'tf32': False}
        (tmp_path / 'environment.json').write_text(json.dumps(starts))
    capsys.readouterr()
    train(tmp_path)
    assert 'fp32, contiguous, on cpu' in capsys.readouterr().out
    assert not layout(tmp_path)
    assert_same_run(tmp_path, contiguous)


def test_another_layout_than_the_checkpoints_is_taken_and_said(train, tmp_path, capsys):
    train(tmp_path, '--channels_last', 'false', stop_after=1)
    train(tmp_path, '--channels_last')
    assert '(--channels_last false -> true): on the same batches, but not bit for bit' in capsys.readouterr().out
    assert layout(tmp_path) and state_of(tmp_path)['arithmetic']['channels_last']


def test_a_form_of_convolutions_that_is_not_known_is_one_line(train, tmp_path, capsys):
    folder = tmp_path / 'run'
    train(folder, stop_after=1)
    rewrite(folder, lambda state: state['arithmetic'].update(convolutions='banded'))
    train(folder, status=2)
    said = capsys.readouterr().err
    assert 'convolutions in the form banded' in said and 'Traceback' not in said


def test_the_flags_of_an_earlier_run_decide_what_its_checkpoint_does_not_say(tmp_path):
    path = tmp_path / 'checkpoint-1.pth'

    def was(device, **flags):
        (tmp_path / 'environment.json').write_text(json.dumps([{'run': {}, 'device': 'cpu'},
                                                               {'run': flags, 'device': device}]))
        found = earlier_arithmetic(path, CPU)
        assert found.pop('convolutions') == 'conv2d'
        return found['channels_last'], found['tf32']

    assert earlier_arithmetic(path, CUDA) == {'channels_last': True, 'tf32': False, 'convolutions': 'conv2d'}
    assert not earlier_arithmetic(path, CPU)['channels_last']
    assert was('cuda:0', channels_last=None, tf32=False) == (True, False)
    assert was('cuda:0', channels_last=False, tf32=True) == (False, True)
    assert was('cpu', channels_last=True, tf32=False) == (True, False)
    (tmp_path / 'environment.json').write_text('[')
    assert not earlier_arithmetic(path, CPU)['channels_last']


@pytest.mark.parametrize('capability, expected', [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_tf32_is_on_where_the_device_has_it(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    run = settle_arithmetic(Run(), CUDA)
    assert (run.channels_last, run.tf32) == (True, expected)
    assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is expected
    run = settle_arithmetic(Run(tf32=False), CUDA)
    assert not run.tf32 and not torch.backends.cudnn.allow_tf32


def test_a_resumed_run_keeps_strict_float32_on_a_device_with_tf32(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    start = {'arithmetic': {'channels_last': True, 'tf32': False, 'convolutions': 'conv2d'}}
    assert not settle_arithmetic(Run(), CUDA, start).tf32
    assert not torch.backends.cudnn.allow_tf32
    with caplog.at_level(logging.WARNING):
        assert settle_arithmetic(Run(tf32=True), CUDA, start).tf32
    assert torch.backends.cuda.matmul.allow_tf32
    start['arithmetic']['convolutions'] = 'new'
    with pytest.raises(UserError, match='in the form new'):
        settle_arithmetic(Run(), CUDA, start)


def test_layout_of_mps_stays_as_it_was():
    assert not settle_arithmetic(Run(), torch.device('mps')).channels_last
