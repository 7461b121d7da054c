"""CUDA computes what the CPU computes, and two GPUs what they are to. Values are tested: kernels have to work."""
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
import predict
import utils
from builders import assert_same_run, make_image_folder, smooth, state_of
from runs import TINY, run, start
from tools import cam

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures('one_thread', 'own_cache')]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
# Two updates of 12 an epoch, and nothing that the devices draw differently: no drop path, no erased pixels. By a small
# epsilon Adam would make a whole step of any gradient, also of one that is round-off, as of a bias in front of a norm
WORDS = (*TINY, '--total_batch_size', '12', '--batch_size', '6', '--epochs', '2', '--warmup_epochs', '0', '--lr',
         '1e-2', '--opt_eps', '1e-2', '--drop_path', '0', '--reprob', '0', '--num_workers', '0',
         '--layer_scale_init_value', '0.1', '--deterministic', '--tf32', 'false')


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp('images'), train=8, val=3, draw=smooth)


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory):
    """The folder of a run, each made once, by the device, the number of its processes, and further flags."""
    done: dict[tuple, Path] = {}

    def of(device: str, world_size: int, *flags: str, before: str = '') -> Path:
        key = (device, world_size, *flags, before)
        if key not in done:
            folder = done[key] = tmp_path_factory.mktemp('run')
            words = (*WORDS, '--data_path', str(data), '--device', device, '--output_dir', str(folder), *flags)
            if world_size == 1:
                assert main.main(list(words)) == 0
            else:
                run(words, folder.with_suffix('.txt'), world_size=world_size, before=before)
        return done[key]
    yield of
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = False


def apart(folder: Path, other: Path) -> float:
    """The largest difference between two runs' weights and averages."""
    a, b = state_of(folder), state_of(other)
    assert a['step'] == b['step'] == 4
    return max((a[kind][name].float() - b[kind][name].float()).abs().max().item()
               for kind in ('model', 'model_ema') for name in a[kind])


ROUND_OFF = 1e-4  # float32 sums in another order, through four updates


@two_gpus
def test_two_nccl_ranks_equal_two_gloo_ranks(trained):
    assert apart(trained('cuda', 2), trained('cpu', 2)) < ROUND_OFF
    assert apart(trained('cuda', 2), trained('cuda', 2, '--seed', '1')) > 100 * ROUND_OFF  # what it is to be told from


@pytest.mark.parametrize('flags', [
    '', '--opt lamb --loss bce', '--opt sgd --clip_grad 0.05 --clip_mode agc',
    '--opt sgd --clip_grad 1 --clip_mode value', '--mixup_mode elem', '--mixup_mode pair',
    '--gate double --grad_checkpointing', '--channels_last false'])
def test_training_on_cuda_is_that_on_the_cpu(flags, trained):
    assert apart(trained('cuda', 1, *flags.split()), trained('cpu', 1, *flags.split())) < ROUND_OFF


@two_gpus
def test_sync_bn_takes_its_statistics_over_both_gpus(trained):
    whole = trained('cuda', 1, '--batch_size', '12', '--mixup', '0', '--cutmix', '0')
    halves = ('--batch_size', '6', '--mixup', '0', '--cutmix', '0')
    assert apart(trained('cuda', 2, *halves, '--sync_bn'), whole) < ROUND_OFF
    assert apart(trained('cuda', 2, *halves), whole) > 10 * ROUND_OFF


COMPILED = '''
import torch
compile_module = torch.nn.Module.compile
torch.nn.Module.compile = lambda self, **others: compile_module(self, backend='aot_eager')
'''


@two_gpus
@pytest.mark.parametrize('flags', ['', '--grad_checkpointing'])
def test_a_compiled_model_in_ddp_trains_as_one_that_is_not(flags, trained):
    """By torch's own operators: the kernels that a compiler makes are tried by the tests of the models."""
    compiled = trained('cuda', 2, '--compile', *flags.split(), before=COMPILED)
    assert apart(compiled, trained('cuda', 2)) < ROUND_OFF


SIGNAL = '''
import os
def observe(state):
    if state.step == {update} and rank == 1:
        os.kill(os.getpid(), {number})
'''


@two_gpus
def test_a_run_in_fp16_that_a_signal_to_one_of_two_ranks_stops_goes_on_bit_for_bit(data, tmp_path):
    words = (*WORDS, '--data_path', str(data), '--device', 'cuda', '--precision', 'fp16', '--epochs', '4',
             '--drop_path', '0.3', '--reprob', '0.25', '--output_dir')
    run((*words, str(tmp_path / 'whole')), tmp_path / 'whole.txt', world_size=2)
    job = start((*words, str(tmp_path / 'parts')), tmp_path / 'parts.txt', world_size=2,
                before=SIGNAL.format(update=2, number=int(signal.SIGTERM)))
    assert job.wait() == [128 + signal.SIGTERM] * 2, job.text()
    # Both after the same update, which is as far ahead as the host may be of its device
    assert state_of(tmp_path / 'parts')['step'] == 2 + 1 + utils.CUDA_LEAD
    run((*words, str(tmp_path / 'parts')), tmp_path / 'rest.txt', world_size=2)
    assert_same_run(tmp_path / 'parts', tmp_path / 'whole')
    assert state_of(tmp_path / 'whole')['scaler']['scale'] > 0


def test_an_update_that_overflows_in_fp16_leaves_no_trace_in_batch_norm(tmp_path, data):
    words = [*WORDS, '--data_path', str(data), '--device', 'cuda', '--output_dir', str(tmp_path), '--precision', 'fp16']

    def overflow(state):
        if state.step == 1:
            state.scaler.load_state_dict(state.scaler.state_dict() | {'scale': 2.0**127})
            overflow.before = {name: value.clone() for name, value in state.model.named_buffers()}
        if state.step == 2:
            assert all(torch.equal(value, overflow.before[name]) for name, value in state.model.named_buffers())
            assert float(state.skips[0]) == 1
            state.scaler.load_state_dict(state.scaler.state_dict() | {'scale': 2.0**10})

    assert main.main(words, observer=overflow) == 0
    counts = [value for name, value in state_of(tmp_path)['model'].items() if name.endswith('num_batches_tracked')]
    assert counts and all(int(count) == 2 * 3 for count in counts)  # micro-batches of the three updates that counted


def test_a_save_holds_the_state_of_its_update_though_training_goes_on(tmp_path, data):
    """The copies are only ordered behind the update; the next one is at work when the writer begins."""
    kept = {}

    def keep(state):
        kept[state.step] = {name: value.cpu().clone() for name, value in state.model.named_parameters()}

    words = [*WORDS, '--data_path', str(data), '--device', 'cuda', '--output_dir', str(tmp_path), '--save_ckpt_steps',
             '1', '--save_ckpt_num', '9']
    assert main.main(words, observer=keep) == 0
    for update in range(1, 5):
        saved = state_of(tmp_path, str(update))['model']
        assert all(torch.equal(saved[name], value) for name, value in kept[update].items())


# ---- Weights in use -------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def checkpoint(trained) -> str:
    return str(trained('cpu', 1) / 'checkpoint-last.pth')


def test_an_evaluation_on_cuda_gives_what_the_cpu_gives(checkpoint, data, tmp_path):
    results = {}
    for device in ('cpu', 'cuda'):
        assert main.main(['--eval', '--checkpoint', checkpoint, '--data_path', str(data), '--device', device,
                          '--output_dir', str(tmp_path / device), '--num_workers', '0', '--tf32', 'false']) == 0
        results[device] = json.loads((tmp_path / device / 'eval.json').read_text())
    assert results['cuda']['acc1'] == results['cpu']['acc1'] and results['cuda']['count'] == 9
    assert results['cuda']['loss'] == pytest.approx(results['cpu']['loss'], rel=1e-5)  # float32, in another order


def test_a_prediction_on_cuda_gives_what_the_cpu_gives(checkpoint, data, capsys):
    found = {}
    for device in ('cpu', 'cuda'):
        capsys.readouterr()
        words = [str(data / 'val' / 'class1'), '--checkpoint', checkpoint, '--json', '--device', device]
        assert predict.main(words) == 0
        found[device] = json.loads(capsys.readouterr().out)
    assert len(found['cpu']) == 3
    for image, other in zip(found['cuda'], found['cpu'], strict=True):
        ours, theirs = (sorted((one['class'], one['probability']) for one in entry['predictions'])
                        for entry in (image, other))
        assert np.allclose(ours, theirs, atol=1e-5)  # float32, in another order


def test_grad_cam_on_cuda_draws_what_the_cpu_draws(checkpoint, data, tmp_path):
    drawn = {}
    for device in ('cpu', 'cuda'):
        cam.main([str(data / 'val' / 'class1' / '0.png'), '--checkpoint', checkpoint, '--device', device, '--output',
                  str(tmp_path / f'{device}.png')])
        drawn[device] = np.asarray(Image.open(tmp_path / f'{device}.png').convert('RGB')).astype(int)
    assert drawn['cpu'].std() > 10
    assert np.abs(drawn['cuda'] - drawn['cpu']).mean() < 0.5  # of 255 levels: round-off may tip a pixel's colour
