"""What waits for a CUDA device, and races between its streams. Nothing reads what kernels compute: they may be idle."""
import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import optim_factory
import recipes
from builders import open_loaders
from conftest import ROOT
from models.detection import RetinaNet
from recipes import Recipe, Run
from runs import TINY
from tasks import create_task
from tools import benchmark_memory
from training.checkpoint import CheckpointFolder
from training.start import build_state, build_step, prepare_model
from utils import Processes

pytestmark = pytest.mark.gpu
MODEL = dict(zip(('dims', 'depths', 'ffn_ratios'), ([8, 8, 16, 16], [1] * 4, [2] * 4), strict=True))
CLIPS = {'none': {}, 'norm': {'clip_grad': 1.0}, 'value': {'clip_grad': 1.0, 'clip_mode': 'value'},
         'agc': {'clip_grad': 0.01, 'clip_mode': 'agc'}}


def resolved(**changes: Any) -> tuple[Recipe, Run]:
    """A recipe of MogaNet on made-up images, and its run on the device."""
    recipe, run = recipes.resolve([*TINY, '--device', 'cuda', '--data_set', 'fake', '--num_classes', '10',
                                   '--total_batch_size', '8', '--batch_size', '4', '--num_workers', '0'])
    return dataclasses.replace(recipe, **changes), run


def waits(work: Callable[[], Any]) -> list[str]:
    """The calls in some work for which the host waits for the device: at most one, since the first ends it."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        work()
    except RuntimeError as error:
        if 'synchronizing' not in str(error):
            raise
        return [str(error)]
    finally:
        torch.cuda.set_sync_debug_mode('default')
    return []


def updates(recipe: Recipe, run: Run) -> Iterator[list[str]]:
    """Trains, and yields an update's waits after two that do not count."""
    task, processes = create_task(recipe, run), Processes(torch.device('cuda', 0))
    step = build_step(task, run, processes, prepare_model(task, run, processes.device))
    step.model.train()
    batches = itertools.repeat(task.example_batch(run.batch_size, processes.device))

    def update(number: int) -> None:
        optim_factory.set_schedule(step.optimizer, recipe, update=number, updates_per_epoch=10)
        step(batches, number)

    for number in range(2):
        update(number)
    while True:
        yield waits(lambda: update(2))


@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp16'])
@pytest.mark.parametrize('clip', CLIPS)
def test_an_update_by_adamw_waits_for_nothing(clip, precision):
    recipe, run = resolved(precision=precision, **CLIPS[clip])
    assert run.update_freq == 2 and recipe.model_ema
    assert next(updates(recipe, run)) == []


@pytest.mark.parametrize('clip', CLIPS)
@pytest.mark.parametrize('opt,precision', [('sgd', 'fp16'), ('sgd', 'fp32'), ('lamb', 'fp32'), ('lamb', 'bf16')])
def test_neither_does_one_by_another_optimizer(opt, precision, clip):
    recipe, run = resolved(precision=precision, opt=opt, loss='bce', **CLIPS[clip])
    assert next(updates(recipe, run)) == []


def test_the_waits_that_the_pages_name_are_found():
    recipe, run = resolved(precision='fp16', opt='lamb')
    assert next(updates(recipe, run))  # it reads the overflow flag
    recipe, run = resolved()
    assert next(updates(recipe, dataclasses.replace(run, model_ema_force_cpu=True)))


@pytest.mark.parametrize('mode', ['batch', 'pair', 'elem'])
@pytest.mark.parametrize('remode', ['pixel', 'rand', 'const'])
def test_a_batch_on_its_way_to_the_device_waits_for_nothing(remode, mode):
    recipe, run = resolved(mixup_mode=mode, mixup=0.8, cutmix=1.0, reprob=1.0, recount=2, remode=remode)
    loaders = open_loaders(recipe, run, device='cuda')
    batches = loaders.train.updates(0, 4)
    next(batches)
    assert waits(lambda: [next(batches) for _ in range(5)]) == []
    loaders.close()


def test_a_step_of_retinanet_waits_for_nothing():
    torch.manual_seed(0)
    model = RetinaNet('moganet_xtiny', num_classes=3, channels=16, depth=1, **MODEL).cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images = torch.randn(2, 3, 64, 96, device='cuda')
    targets = [{'boxes': torch.tensor([[4.0, 4.0, 40.0, 50.0], [0.0, 0.0, 20.0, 20.0]], device='cuda'),
                'labels': torch.tensor([0, 2], device='cuda'), 'size': (60, 90)},
               {'boxes': torch.zeros(0, 4, device='cuda'), 'labels': torch.zeros(0, dtype=torch.int64, device='cuda'),
                'size': (64, 96)}]

    def step() -> None:
        sum(model(images, targets).values()).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    assert waits(step) == []


def test_what_is_handed_to_the_writer_of_a_checkpoint_is_not_waited_for(tmp_path):
    recipe, run = resolved()
    task, processes = create_task(recipe, run), Processes(torch.device('cuda', 0))
    step = build_step(task, run, processes, prepare_model(task, run, processes.device))
    state = build_state(task, run, step, updates_per_epoch=4, start=None, own=False)
    step(itertools.repeat(task.example_batch(run.batch_size, processes.device)), 0)
    folder = CheckpointFolder(tmp_path, keep=3)
    assert waits(lambda: folder.save(state.state_dict())) == []
    assert folder.wait() and folder.newest() is not None


# ---- Races ----------------------------------------------------------------------------------------------------------

SANITIZED = '''
import torch.cuda._sanitizer
torch.cuda._sanitizer.enable_cuda_sanitizer()
import itertools
import sys
import torch
sys.path.insert(0, 'tests')
PLANTED
import engine
from builders import open_loaders
from test_streams import resolved
from training.start import build_step, prepare_model
from utils import Processes

for mode in ('batch', 'elem'):
    recipe, run = resolved(precision='fp16', mixup_mode=mode, mixup=0.8, cutmix=1.0, reprob=1.0, clip_grad=1.0)
    loaders, processes = open_loaders(recipe, run, device='cuda'), Processes(torch.device('cuda', 0))
    step = build_step(loaders.task, run, processes, prepare_model(loaders.task, run, processes.device))
    engine.train_mode(step.model)
    batches = loaders.train.updates(0, 3)
    for update in range(3):
        step(batches, update)
    step.model.eval()
    metric = loaders.task.metric(processes.device)
    with torch.no_grad():
        for batch in itertools.islice(loaders.val, 3):
            metric.update({'': step.model}, batch)
print('to the end')
'''


def sanitized(planted: str = '') -> subprocess.CompletedProcess:
    """Training and evaluation under torch's sanitizer, which has to be there from the beginning."""
    return subprocess.run([sys.executable, '-c', SANITIZED.replace('PLANTED', planted)], cwd=ROOT, capture_output=True,
                          text=True, timeout=300)


def test_torchs_sanitizer_finds_no_race_in_training_and_evaluation():
    done = sanitized()
    assert done.returncode == 0 and 'to the end' in done.stdout, done.stderr[-3000:]


def test_torchs_sanitizer_finds_a_race_that_is_planted():
    done = sanitized('torch.cuda.Stream.wait_event = lambda self, event: None')
    assert done.returncode == 1 and 'possible data race' in done.stderr, done.stderr[-3000:]


# ---- Memory ---------------------------------------------------------------------------------------------------------

def test_the_memory_of_a_row_is_kept_and_less_where_it_is_recomputed(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_memory, 'FIGURES', tmp_path / 'memory.json')
    (tmp_path / 'memory.json').write_text('{"moganet_tiny": {}}')
    row, = benchmark_memory.measure(['moganet_small_transfer'])
    kept = json.loads((tmp_path / 'memory.json').read_text())
    assert kept.keys() == {'moganet_tiny', 'moganet_small_transfer'} and row['micro_batch'] == 32
    figures = kept['moganet_small_transfer']
    assert 0 < figures['bf16']['allocated'] < figures['as the row']['allocated'] <= figures['as the row']['reserved']
    assert figures['checkpointed']['allocated'] < figures['as the row']['allocated']
