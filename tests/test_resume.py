"""A run that is stopped, killed, or starved of disk goes on as if nothing had happened: real processes, real files."""
import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch

import utils
from builders import assert_same_run, differences, make_image_folder, state_of, untimed_log
from runs import TINY, Job, run, start

# 48 images: 4 updates of 12, in an epoch; mixup, drop path, average, erasing and accumulation are all on
COMMAND = (*TINY, '--total_batch_size', '12', '--batch_size', '2', '--epochs', '3', '--warmup_epochs', '1',
           '--drop_path', '0.3', '--num_workers', '1')


@pytest.fixture(scope='session')
def data(tmp_path_factory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp('images'))


@pytest.fixture(scope='session')
def command(data):
    def of(folder: Path, *words: str) -> tuple[str, ...]:
        return (*COMMAND, '--data_path', str(data), '--output_dir', str(folder), *words)
    return of


@pytest.fixture(scope='session')
def uninterrupted(command, tmp_path_factory):
    """The folder of a whole run with 1, 2 or 3 processes."""
    folders: dict[int, Path] = {}

    def of(world_size: int) -> Path:
        if world_size not in folders:
            folders[world_size] = tmp_path_factory.mktemp(f'whole{world_size}') / 'run'
            run(command(folders[world_size]), folders[world_size].with_suffix('.txt'), world_size=world_size)
        return folders[world_size]
    return of


@pytest.mark.parametrize('world_size', [1, 2, 3])
def test_resumed_run_equals_uninterrupted_run(world_size, command, uninterrupted, tmp_path):
    """Stopped by a signal to the last rank alone, inside an epoch and at its end, with another number of workers."""
    folder = tmp_path / 'run'
    stop_at = {6: signal.SIGTERM, 8: signal.SIGUSR1}
    for update, number in stop_at.items():
        job = start(command(folder, '--num_workers', '0'), tmp_path / f'{update}.txt', world_size=world_size,
                    before=stop_after(update - (world_size > 1), number))
        assert job.wait() == [128 + number] * world_size, job.text()
        assert 'The same command continues' in job.text()
        assert state_of(folder)['step'] == update
    run(command(folder), tmp_path / 'rest.txt', world_size=world_size)
    assert_same_run(folder, uninterrupted(world_size))
    assert [line['epoch'] for line in untimed_log(folder)] == [0, 1, 2]


def stop_after(update: int, number: int) -> str:
    """A signal that the last rank sends itself after an update of the run (counted from the start of the run)."""
    return f'''
import os
def observe(state):
    if state.step == {update} and rank == int(os.environ.get('WORLD_SIZE', 1)) - 1:
        os.kill(os.getpid(), {int(number)})
'''


def test_the_same_command_twice_gives_the_same_bits_however_it_saves_and_loads(command, uninterrupted, tmp_path):
    folder = tmp_path / 'run'
    run(command(folder, '--num_workers', '4', '--save_ckpt_steps', '1', '--print_freq', '1'), tmp_path / 'out.txt')
    assert_same_run(folder, uninterrupted(1))


def test_only_the_newest_checkpoints_are_kept_and_all_open_safely(command, tmp_path):
    folder = tmp_path / 'run'
    run(command(folder, '--save_ckpt_steps', '1', '--save_ckpt_num', '2'), tmp_path / 'out.txt')
    assert sorted(path.name for path in folder.glob('*.pth')) == [
        'checkpoint-11.pth', 'checkpoint-12.pth', 'checkpoint-best-ema.pth', 'checkpoint-best.pth',
        'checkpoint-last.pth']
    for path in folder.glob('*.pth'):
        state = torch.load(path, weights_only=True)
        assert {'version', 'model', 'model_ema', 'optimizer', 'scaler', 'epoch', 'step', 'best', 'recipe',
                'classes'} <= state.keys()
        assert state['classes'] == ['class0', 'class1', 'class2']
    best = state_of(folder, 'best-ema')
    same_step = next(path for path in (folder / f'checkpoint-{best["step"]}.pth', folder / 'checkpoint-best.pth')
                     if path.exists())
    assert best['which'] == 'ema' and best['model_ema'] is None
    if (state := torch.load(same_step, weights_only=True))['step'] == best['step']:
        assert differences(best['model'], state['model_ema']) == []


def kill_and_resume(command, folder: Path, updates: list[int], *, world_size: int, tmp_path: Path) -> None:
    """Kills all ranks by SIGKILL right after these updates of each start, then lets the run end."""
    for i, update in enumerate(updates):
        job = start(command(folder, '--save_ckpt_steps', '1', '--print_freq', '1'), tmp_path / f'kill{i}.txt',
                    world_size=world_size, before=f'''
import os, signal
seen = []
def observe(state):
    seen.append(state.step)
    if len(seen) == {update}:
        os.kill(os.getpid(), signal.SIGKILL)
''')
        assert set(job.wait()) <= {-signal.SIGKILL, 0}, job.text()
    run(command(folder, '--save_ckpt_steps', '1', '--print_freq', '1'), tmp_path / 'rest.txt', world_size=world_size)


def test_a_run_killed_twice_by_sigkill_equals_an_uninterrupted_one(command, uninterrupted, tmp_path):
    folder = tmp_path / 'run'
    kill_and_resume(command, folder, [3, 4], world_size=1, tmp_path=tmp_path)
    assert_same_run(folder, uninterrupted(1))


@pytest.mark.slow
@pytest.mark.parametrize('world_size', [1, 2, 3])
def test_a_run_killed_at_five_random_updates_in_a_row_equals_an_uninterrupted_one(
        world_size, command, uninterrupted, tmp_path):
    folder = tmp_path / 'run'
    seed = random.randrange(2 ** 32)
    print('seed', seed)
    updates = [random.Random(seed + i).randint(1, 4) for i in range(5)]
    kill_and_resume(command, folder, updates, world_size=world_size, tmp_path=tmp_path)
    assert_same_run(folder, uninterrupted(world_size))


def test_a_kill_in_the_middle_of_a_save_loses_nothing(command, uninterrupted, tmp_path):
    folder = tmp_path / 'run'
    job = start(command(folder, '--save_ckpt_steps', '1'), tmp_path / 'out.txt', before='''
import os, time, utils
flush = os.fsync
def slow(descriptor):
    name = os.readlink(f'/proc/self/fd/{descriptor}')
    if 'checkpoint-6.pth' in name:
        print('half written', flush=True)
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        time.sleep(60)
    flush(descriptor)
os.fsync = slow
''')
    job.wait_for('half written')
    job.kill()
    job.wait()
    assert list(folder.glob('.checkpoint-6.pth.*.part'))
    text = run(command(folder), tmp_path / 'rest.txt')
    assert 'checkpoint-5.pth' in text
    assert_same_run(folder, uninterrupted(1))


@pytest.mark.parametrize('file', ['checkpoint-best-ema.pth', 'checkpoint-best.pth'])
def test_a_kill_between_the_files_of_a_save_leaves_the_best_right(file, command, uninterrupted, tmp_path):
    folder = tmp_path / 'run'
    job = start(command(folder), tmp_path / 'out.txt', before=f'''
import os, time
flush, seen = os.fsync, []
def slow(descriptor):
    if '.{file}.' in os.readlink(f'/proc/self/fd/{{descriptor}}'):
        seen.append(1)
        if len(seen) == 2:
            print('between', flush=True)
            time.sleep(60)
    flush(descriptor)
os.fsync = slow
''')
    if 'between' not in wait_or_end(job):
        pytest.skip('only one best in this run')
    job.kill()
    job.wait()
    run(command(folder), tmp_path / 'rest.txt')
    assert_same_run(folder, uninterrupted(1))


def wait_or_end(job: Job) -> str:
    """What a job printed by the time that it stands between two files, or ends."""
    while 'between' not in job.text() and any(rank.is_alive() for rank in job.ranks):
        time.sleep(0.01)
    return job.text()


def test_a_full_disk_keeps_the_old_checkpoint_and_leaves_no_litter(command, uninterrupted, tmp_path):
    folder = tmp_path / 'run'
    start(command(folder), tmp_path / 'first.txt', before=stop_after(6, signal.SIGTERM)).wait()
    before = state_of(folder)
    job = start(command(folder), tmp_path / 'full.txt',
                before='import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))')
    assert job.wait() == [1]
    assert 'could not be saved' in job.text() and 'free space in' in job.text()
    assert job.text().count('Traceback') == 0
    assert differences(state_of(folder), before) == []
    assert not list(folder.glob('.*.part'))
    run(command(folder), tmp_path / 'rest.txt')
    assert_same_run(folder, uninterrupted(1))


@pytest.mark.parametrize('damage', ['truncated', 'empty', 'garbage', 'flipped', 'foreign'])
def test_a_damaged_newest_checkpoint_is_passed_over_loudly(damage, command, uninterrupted, tmp_path):
    folder = tmp_path / 'run'
    start(command(folder), tmp_path / 'first.txt', before=stop_after(6, signal.SIGTERM)).wait()
    newest = folder / 'checkpoint-6.pth'
    content = newest.read_bytes()
    middle = len(content) // 2
    newest.unlink()  # the link checkpoint-last keeps the content
    newest.write_bytes({
        'truncated': content[:-1000], 'empty': b'', 'garbage': os.urandom(5000),
        'flipped': content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:],
        'foreign': b''}[damage])
    if damage == 'foreign':
        torch.save({'state_dict': {}}, newest)
    (folder / 'checkpoint-last.pth').unlink()
    text = run(command(folder), tmp_path / 'rest.txt')
    assert f'{newest}' in text and 'passing over it for the one before' in text
    assert 'Continuing from' in text and 'checkpoint-4.pth' in text
    assert_same_run(folder, uninterrupted(1))


def test_a_folder_of_damaged_checkpoints_is_not_begun_anew(command, tmp_path):
    folder = tmp_path / 'run'
    folder.mkdir()
    (folder / 'checkpoint-4.pth').write_bytes(b'nothing')
    job = start(command(folder), tmp_path / 'out.txt')
    assert job.wait() == [2]
    assert 'error: none of the 1 checkpoints' in job.text()
    assert (folder / 'checkpoint-4.pth').read_bytes() == b'nothing'


def test_another_world_size_goes_on_with_the_same_batches_and_says_so(command, uninterrupted, tmp_path):
    folder = tmp_path / 'run'
    start(command(folder), tmp_path / 'first.txt', before=stop_after(6, signal.SIGTERM)).wait()
    text = run(command(folder), tmp_path / 'rest.txt', world_size=2)
    assert 'written by 1 processes and goes on with 2: on the same batches, but not bit for bit' in text
    here, there = untimed_log(folder), untimed_log(uninterrupted(1))
    assert here[0] == there[0] and [line['epoch'] for line in here] == [0, 1, 2]
    # mixup and drop path are drawn for each rank, so the loss differs, but not by more than they do
    assert here[2]['train_loss'] == pytest.approx(there[2]['train_loss'], abs=0.2)


def test_another_recipe_is_refused_with_the_fields_that_differ(command, tmp_path):
    folder = tmp_path / 'run'
    start(command(folder), tmp_path / 'first.txt', before=stop_after(6, signal.SIGTERM)).wait()
    job = start(command(folder, '--lr', '0.5', '--smoothing', '0'), tmp_path / 'refused.txt')
    assert job.wait() == [2]
    assert 'lr: 0.001 -> 0.5; smoothing: 0.1 -> 0.0' in job.text() and '--resume_anyway' in job.text()
    text = run(command(folder, '--lr', '0.5', '--smoothing', '0', '--resume_anyway'), tmp_path / 'anyway.txt')
    assert 'Resuming' in text and 'under another recipe' in text
    assert untimed_log(folder)[-1]['epoch'] == 2


def test_hyperparameters_changed_by_resume_anyway_are_those_that_train(command, tmp_path):
    states = {}
    for name, words in {'same': (), 'other': ('--opt_betas', '0.5', '0.6', '--resume_anyway')}.items():
        folder = tmp_path / name
        start(command(folder), tmp_path / 'first.txt', before=stop_after(6, signal.SIGTERM)).wait()
        run(command(folder, *words), tmp_path / 'rest.txt')
        states[name] = state_of(folder)
    assert differences(states['same']['model'], states['other']['model'])
    for words in (('--layer_decay', '0.5'), ('--opt', 'lamb'), ('--total_batch_size', '24')):
        job = start(command(tmp_path / 'same', *words, '--epochs', '4', '--resume_anyway'), tmp_path / 'refused.txt')
        assert job.wait() == [2] and 'cannot be resumed with' in job.text()


def test_a_training_set_of_another_length_is_refused(command, data, tmp_path):
    folder = tmp_path / 'run'
    start(command(folder), tmp_path / 'first.txt', before=stop_after(6, signal.SIGTERM)).wait()
    longer = make_image_folder(tmp_path / 'longer', train=20)
    job = start(command(folder, '--data_path', str(longer)), tmp_path / 'refused.txt')
    assert job.wait() == [2]
    assert 'counts 4 updates an epoch, but the training set now makes 5' in job.text()


def test_another_micro_batch_is_said_not_to_be_exact(command, tmp_path):
    folder = tmp_path / 'run'
    start(command(folder), tmp_path / 'first.txt', before=stop_after(6, signal.SIGTERM)).wait()
    text = run(command(folder, '--batch_size', '6'), tmp_path / 'rest.txt')
    assert 'micro-batches of 2 and goes on with 6: on the same batches, but not bit for bit' in text


def test_no_resume_opt_leaves_the_optimizer_behind_once(command, tmp_path):
    first, whole, folder = (tmp_path / name for name in ('first', 'whole', 'run'))
    start(command(first), tmp_path / 'first.txt', before=stop_after(6, signal.SIGTERM)).wait()
    words = ('--resume', str(first / 'checkpoint-last.pth'), '--no_resume_opt')
    run(command(whole, *words), tmp_path / 'whole.txt')
    start(command(folder, *words), tmp_path / 'part.txt', before=stop_after(9, signal.SIGTERM)).wait()
    run(command(folder, *words), tmp_path / 'rest.txt')
    assert differences(state_of(folder), state_of(whole)) == []
    steps = {float(state['step']) for state in state_of(folder)['optimizer']['state'].values()}
    assert steps == {6.0}


def test_what_resume_cannot_mean_is_refused_in_one_line(command, uninterrupted, tmp_path):
    whole = uninterrupted(1)
    cases = {
        ('--resume', str(whole / 'checkpoint-best-ema.pth')): 'holds weights alone',
        ('--resume', str(whole / 'checkpoint-last.pth')): 'is complete',
        ('--resume', str(tmp_path / 'none.pth')): 'does not exist',
    }
    for words, message in cases.items():
        job = start(command(tmp_path / 'new', *words), tmp_path / 'out.txt')
        assert job.wait() == [2] and message in job.text() and 'Traceback' not in job.text()
        assert not (tmp_path / 'new').exists()
    job = start(command(whole, '--auto_resume', 'false', '--resume', str(whole / 'checkpoint-12.pth')),
                tmp_path / 'out.txt')
    assert job.wait() == [2] and 'holds a run already' in job.text()


def test_resume_takes_another_runs_state_and_leaves_that_run_alone(command, uninterrupted, tmp_path):
    first, second = tmp_path / 'first', tmp_path / 'second'
    start(command(first), tmp_path / 'first.txt', before=stop_after(6, signal.SIGTERM)).wait()
    kept = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    resume = command(second, '--resume', str(first / 'checkpoint-last.pth'))
    start(resume, tmp_path / 'second.txt', before=stop_after(9, signal.SIGTERM)).wait()
    text = run(resume, tmp_path / 'rest.txt')  # the same command: the run's own folder comes first
    assert 'second/checkpoint-9.pth' in text
    assert differences(state_of(second), state_of(uninterrupted(1))) == []
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == kept
    older = start(command(second, '--resume', str(second / 'checkpoint-9.pth')), tmp_path / 'older.txt')
    assert older.wait() == [2] and 'would be lost' in older.text()


def test_tensorboard_shows_every_step_once_after_a_resume(command, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    folder = tmp_path / 'run'
    kill_and_resume(command, folder, [3, 4], world_size=1, tmp_path=tmp_path)
    events = EventAccumulator(str(folder / 'tensorboard'))
    events.Reload()
    assert [event.step for event in events.Scalars('test/acc1')] == [4, 8, 12]
    assert [event.step for event in events.Scalars('train/loss')] == list(range(1, 13))


@pytest.mark.gpu
@pytest.mark.parametrize('precision', ['fp16', 'fp32'])
def test_on_cuda_a_deterministic_run_resumes_bit_for_bit_scaler_included(precision, command, tmp_path):
    words = ('--device', 'cuda', '--precision', precision, '--deterministic', '--batch_size', '6')
    run(command(tmp_path / 'whole', *words), tmp_path / 'whole.txt')
    folder = tmp_path / 'run'
    start(command(folder, *words), tmp_path / 'first.txt', before=stop_after(6, signal.SIGTERM)).wait()
    run(command(folder, *words), tmp_path / 'rest.txt')
    assert_same_run(folder, tmp_path / 'whole')
    assert bool(state_of(folder)['scaler']) == (precision == 'fp16')


def test_a_model_without_batch_norm_resumes_too(data, tmp_path):
    words = ('--model', 'vit_tiny_patch16_224', '--model_kwargs', 'depth=1', 'embed_dim=12', 'img_size=32',
             '--input_size', '32', '--data_path', str(data), '--total_batch_size', '12', '--epochs', '2',
             '--warmup_epochs', '1', '--device', 'cpu', '--print_freq', '4', '--num_workers', '0', '--output_dir')
    run((*words, str(tmp_path / 'whole')), tmp_path / 'whole.txt', world_size=2)
    start((*words, str(tmp_path / 'run')), tmp_path / 'first.txt', world_size=2,
          before=stop_after(5, signal.SIGTERM)).wait()
    run((*words, str(tmp_path / 'run')), tmp_path / 'rest.txt', world_size=2)
    assert_same_run(tmp_path / 'run', tmp_path / 'whole')


# ---- Several processes ----------------------------------------------------------------------------------------------

NAN_ON_ONE_RANK = '''
from dataclasses import replace
from pipeline.loaders import TrainLoader
epoch = TrainLoader.epoch
def poisoned(self, number, start=0, attempt=0, **others):
    for i, batch in enumerate(epoch(self, number, start, attempt, **others)):
        if rank == 1 and (number, attempt) == (1, 0) and i == 2:
            batch = replace(batch, images=batch.images * float('nan'))
        yield batch
TrainLoader.epoch = poisoned
'''


def test_a_nan_on_one_rank_stops_all_and_names_the_last_good_checkpoint(command, tmp_path):
    folder = tmp_path / 'run'
    job = start(command(folder, '--print_freq', '1'), tmp_path / 'out.txt', world_size=2, before=NAN_ON_ONE_RANK)
    assert job.wait() == [1, 1], job.text()
    assert f'the last good checkpoint is {folder}/checkpoint-4.pth' in job.text()
    assert job.text().count('NaN or infinite') == 1 and 'Traceback' not in job.text()
    assert sorted(path.name for path in folder.glob('checkpoint-[0-9]*')) == ['checkpoint-4.pth']


def test_all_ranks_go_back_to_the_same_checkpoint_while_one_is_being_written(command, tmp_path):
    slow = NAN_ON_ONE_RANK + '''
import os, time
flush = os.fsync
def wait(descriptor):
    if 'checkpoint' in os.readlink(f'/proc/self/fd/{descriptor}'):
        time.sleep(1)
    flush(descriptor)
os.fsync = wait
'''
    folder = tmp_path / 'run'
    text = run(command(folder, '--on_nan', 'rollback', '--save_ckpt_steps', '1', '--batch_size', '6', '--epochs', '2'),
               tmp_path / 'out.txt', world_size=2, before=slow)
    assert 'attempt 1 of 3' in text
    assert state_of(folder)['step'] == 8


def test_after_a_nan_the_run_can_go_back_and_take_another_order(command, uninterrupted, tmp_path):
    folder = tmp_path / 'run'
    text = run(command(folder, '--print_freq', '1', '--on_nan', 'rollback'), tmp_path / 'out.txt', world_size=2,
               before=NAN_ON_ONE_RANK)
    assert 'Going back to update 4 with another data order (attempt 1 of 3)' in text
    assert [line['epoch'] for line in untimed_log(folder)] == [0, 1, 2]
    here, there = untimed_log(folder), untimed_log(uninterrupted(2))
    assert here[0] == there[0] and here[1] != there[1]
    assert state_of(folder)['attempt'] == 1


def test_a_rank_that_dies_makes_the_others_stop_soon_with_its_error_shown_once(command, tmp_path):
    dying = '''
from pipeline.loaders import TrainLoader
epoch = TrainLoader.epoch
def broken(self, *args, **others):
    for i, item in enumerate(epoch(self, *args, **others)):
        if rank == 1 and i == 5:
            raise RuntimeError('the disk of rank 1 is on fire')
        yield item
TrainLoader.epoch = broken
'''
    begin = time.monotonic()
    job = start(command(tmp_path / 'run'), tmp_path / 'out.txt', world_size=3, before=dying)
    statuses = job.wait(timeout=60)
    assert all(status == 1 for status in statuses), job.text()
    assert job.text().count('Traceback') == job.text().count('RuntimeError: the disk of rank 1 is on fire') == 1
    assert time.monotonic() - begin < 60


def test_a_killed_rank_makes_the_others_stop_soon(command, tmp_path):
    job = start(command(tmp_path / 'run', '--epochs', '50'), tmp_path / 'out.txt', world_size=3)
    job.wait_for('epoch 1 of 50 done')
    begin = time.monotonic()
    job.kill(rank=1)
    statuses = job.wait(timeout=60)
    assert statuses[1] == -signal.SIGKILL and statuses[0] == statuses[2] == 1, job.text()
    assert time.monotonic() - begin < 60


PRINT_BUFFERS = '''
import engine, hashlib
evaluate = engine.evaluate
def shown(models, *args, **kwargs):
    flat = engine.Buffers(models['']).get()
    print(f'buffers {hashlib.md5(flat.numpy().tobytes()).hexdigest()}', flush=True)
    return evaluate(models, *args, **kwargs)
engine.evaluate = shown
'''


@pytest.mark.parametrize('mode', ['reduce', 'broadcast', 'none'])
def test_buffers_are_equal_on_all_ranks_when_they_are_used(mode, command, tmp_path):
    folder = tmp_path / 'run'
    text = run(command(folder, '--dist_bn', mode, '--epochs', '1', '--model_ema', 'false'), tmp_path / 'out.txt',
               world_size=2, before=PRINT_BUFFERS)
    hashes = [line for line in text.splitlines() if line.startswith('buffers')]
    assert len(hashes) == 2 and len(set(hashes)) == (2 if mode == 'none' else 1)
    state = state_of(folder)
    own = state['local']['buffers']
    saved = torch.cat([value.reshape(-1) for name, value in state['model'].items() if 'running' in name])
    expected = own.mean(0) if mode == 'reduce' else own[0]
    assert not torch.equal(own[0], own[1])
    assert torch.allclose(saved, expected, rtol=1e-6, atol=1e-7)  # float32 mean of two


def test_an_odd_test_set_gives_the_same_accuracy_with_1_2_and_3_processes(data, uninterrupted, tmp_path):
    checkpoint = uninterrupted(1) / 'checkpoint-best.pth'
    results = []
    for world_size in (1, 2, 3):
        folder = tmp_path / str(world_size)
        text = run(('--eval', '--checkpoint', str(checkpoint), '--weights', 'raw', '--data_path', str(data),
                    '--output_dir', str(folder), '--val_batch_size', '4'), tmp_path / 'out.txt', world_size=world_size)
        assert '15 images' in text and 'raw weights' in text
        results.append(json.loads((folder / 'eval.json').read_text()))
    assert {result['count'] for result in results} == {15}
    assert len({(result['acc1'], result['acc5']) for result in results}) == 1
    # the loss is summed in float64 from batches of other compositions
    assert [result['loss'] for result in results] == pytest.approx([results[0]['loss']] * 3, rel=1e-5)
    assert results[0]['acc1'] == pytest.approx(torch.load(checkpoint)['best']['test_acc1'])


# ---- Lost workers, and waits that would not end ---------------------------------------------------------------------

SHORT = 'import utils; utils.STOP_PATIENCE, utils.SECOND_PATIENCE = {first}, {second}'
STOP_A_WORKER = '''
import os, signal, multiprocessing
def observe(state):
    if state.step == {update} and rank == 0:
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.{signal})
        print('workers signalled', flush=True)
'''


def test_a_killed_worker_costs_one_line_and_no_update(command, uninterrupted, tmp_path):
    folder = tmp_path / 'run'
    job = start(command(folder, '--num_workers', '2', '--print_freq', '1'), tmp_path / 'out.txt',
                before=STOP_A_WORKER.format(update=6, signal='SIGKILL'))
    assert job.wait() == [2], job.text()
    (line,) = [line for line in job.text().splitlines() if line.startswith('error')]
    assert 'a data worker was killed' in line and '--num_workers' in line and 'Traceback' not in job.text()
    saved = int(job.text().split('Saved after ')[1].split()[0])
    assert state_of(folder)['step'] == saved >= 6
    run(command(folder), tmp_path / 'rest.txt')
    assert_same_run(folder, uninterrupted(1))


@pytest.mark.parametrize('signals', [1, 2])
def test_a_stopped_worker_is_waited_for_only_so_long_after_a_signal(signals, command, tmp_path):
    """The stopped worker may hold the main thread in a read that no Python handler can end."""
    job = start(command(tmp_path / 'run', '--num_workers', '2', '--epochs', '50'), tmp_path / 'out.txt',
                before=SHORT.format(first=2 if signals == 1 else 600, second=1)
                + STOP_A_WORKER.format(update=5, signal='SIGSTOP'))
    job.wait_for('workers signalled')
    for number in range(signals):
        time.sleep(1.2 * number)
        job.kill(number=signal.SIGTERM)
    assert job.wait(timeout=30) == [1], job.text()
    after = 'SIGTERM' if signals == 1 else 'a second signal'
    assert f'for a batch of the data workers after {after}, without an update: ended' in job.text()
    assert 'Traceback' not in job.text()


def test_a_stopped_rank_is_waited_for_only_so_long_after_a_signal(command, tmp_path):
    job = start(command(tmp_path / 'run', '--epochs', '500', '--num_workers', '0'), tmp_path / 'out.txt', world_size=2,
                before=SHORT.format(first=2, second=1))
    job.wait_for('epoch 1 of 500 done')
    job.kill(rank=1, number=signal.SIGSTOP)
    job.kill(rank=0, number=signal.SIGTERM)
    job.ranks[0].join(30)
    job.kill(rank=1)
    assert job.wait()[0] == 1, job.text()
    assert 'rank 0 waited 2 s for the ' in job.text() and 'after SIGTERM' in job.text()


def test_a_stopped_rank_is_named_by_one_line_when_the_exchange_times_out(command, tmp_path):
    job = start(command(tmp_path / 'run', '--epochs', '500', '--num_workers', '0'), tmp_path / 'out.txt', world_size=2,
                before='import utils; utils.RANK_PATIENCE = 3')
    job.wait_for('epoch 1 of 500 done')
    job.kill(rank=1, number=signal.SIGSTOP)
    job.ranks[0].join(40)
    job.kill(rank=1)
    assert job.wait()[0] == 1, job.text()
    assert 'error: another rank has not come on for 3 s' in job.text() and 'Traceback' not in job.text()


BLOCKED_DISK = '''
import os, time, utils
flush = os.fsync
def blocked(descriptor):
    if 'checkpoint-4.pth' in os.readlink(f'/proc/self/fd/{descriptor}') or 'best' in os.readlink(
            f'/proc/self/fd/{descriptor}'):
        print('blocked', flush=True)
        time.sleep(600)
    flush(descriptor)
os.fsync = blocked
'''


def test_a_disk_that_never_answers_ends_the_run_with_a_line(command, tmp_path):
    """By itself, and sooner after a signal."""
    job = start(command(tmp_path / 'run'), tmp_path / 'out.txt',
                before=BLOCKED_DISK + 'from training import checkpoint; checkpoint.WRITE_PATIENCE = 2')
    assert job.wait(timeout=60) == [2], job.text()
    assert f'error: the disk of {tmp_path / "run"} has not taken a checkpoint for 2 s' in job.text()
    job = start(command(tmp_path / 'other'), tmp_path / 'out.txt',
                before=BLOCKED_DISK + SHORT.format(first=2, second=1))
    job.wait_for('blocked')
    job.kill(number=signal.SIGTERM)
    assert job.wait(timeout=60) == [1], job.text()
    assert 'for the write of a checkpoint into' in job.text() and 'after SIGTERM' in job.text()


def test_a_second_signal_does_not_cut_the_save_that_the_first_asked_for(command, uninterrupted, tmp_path):
    """A warning before the time limit, and SIGTERM seconds later: the disk takes longer than a second signal waits."""
    folder = tmp_path / 'run'
    job = start(command(folder), tmp_path / 'out.txt', before=SHORT.format(first=60, second=0.5) + '''
import os, time
flush, slept = os.fsync, []
def slow(descriptor):
    if 'checkpoint-' in os.readlink(f'/proc/self/fd/{descriptor}') and not slept:
        slept.append(1)
        print('writing', flush=True)
        time.sleep(4)
    flush(descriptor)
os.fsync = slow
def observe(state):
    if state.step == 2:
        os.kill(os.getpid(), 10)
''')
    job.wait_for('writing')
    time.sleep(1.2)
    job.kill(number=signal.SIGTERM)
    assert job.wait(timeout=60) == [128 + signal.SIGUSR1], job.text()
    assert state_of(folder)['step'] == 2
    run(command(folder), tmp_path / 'rest.txt')
    assert_same_run(folder, uninterrupted(1))


def test_signs_of_life_keep_a_run_from_being_ended_however_long_it_takes_after_a_signal(monkeypatch):
    """Batches, updates and pieces of a checkpoint: here, a tenth of a second apart, for three times the limit."""
    ended = []
    monkeypatch.setattr(utils, 'STOP_PATIENCE', 0.4)
    monkeypatch.setattr(utils.StopRequest, '_end', lambda *what: ended.append(what))
    with utils.StopRequest(utils.Processes(device=torch.device('cpu'))) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(12):
            time.sleep(0.1)
            utils.alive()
        assert stop.agreed() == signal.SIGTERM and not ended
        time.sleep(0.8)
    assert ended and ended[0][1:] == (signal.SIGTERM, 0.4, False)


def test_a_hangup_saves_unless_it_was_ignored_at_the_start(command, tmp_path):
    """torchrun passes SIGHUP on; nohup ignores it, so that the run outlives its terminal."""
    job = start(command(tmp_path / 'run'), tmp_path / 'out.txt', before=stop_after(6, signal.SIGHUP))
    assert job.wait() == [128 + signal.SIGHUP], job.text()
    assert state_of(tmp_path / 'run')['step'] == 6
    run(command(tmp_path / 'nohup', '--epochs', '2'), tmp_path / 'out.txt',
        before='import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n' + stop_after(6, signal.SIGHUP))


LACKS = {
    'descriptors in the worker': ("""
import multiprocessing.reduction as reduction
def fail(descriptor):
    raise OSError(24, 'Too many open files')
reduction.DupFd = fail""", 'ulimit -n'),
    'shared memory, told': ("""
import torch
torch.UntypedStorage._new_shared = lambda size: torch.empty(1 << 60)
def fail(*_, **__):
    raise RuntimeError('unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)')
torch.UntypedStorage._new_shared = fail""", '--shm-size'),
    'shared memory, killed': ("""
import os, signal, torch
torch.UntypedStorage._new_shared = lambda *_, **__: os.kill(os.getpid(), signal.SIGBUS)""", '--shm-size'),
    'processes': ("""
import os
def fail():
    raise BlockingIOError(11, 'Resource temporarily unavailable')
os.fork = fail""", 'ulimit -u'),
    'memory': ("""
import os
def fail():
    raise OSError(12, 'Cannot allocate memory')
os.fork = fail""", 'memory'),
    'threads': ("""
import threading
begin = threading.Thread.start
def fail(self):
    if self.name.startswith('QueueFeeder'):
        raise RuntimeError("can't start new thread")
    begin(self)
threading.Thread.start = fail""", '--num_workers'),
    'a short TMPDIR': ("""
import os, tempfile
tempfile.tempdir = os.path.join('FOLDER', 'x' * 100)
os.makedirs(tempfile.tempdir, exist_ok=True)
import multiprocessing
multiprocessing.current_process()._config.pop('tempdir', None)  # the forkserver's""", 'TMPDIR'),
}


@pytest.mark.parametrize('lack', LACKS)
def test_workers_that_cannot_hand_over_a_batch_are_one_line_with_the_cure(lack, command, tmp_path):
    before, cure = LACKS[lack]
    job = start(command(tmp_path / 'run', '--num_workers', '2'), tmp_path / 'out.txt',
                before=before.replace('FOLDER', str(tmp_path)))
    assert job.wait(timeout=60) == [2], job.text()
    (line,) = re.findall(r'error: .*', job.text())  # torch's own ERROR, of a bus error, has no end of line
    assert cure in line and '--num_workers' in line and 'Traceback' not in job.text(), job.text()


@pytest.mark.parametrize('limit', [24, 40, 64])
def test_few_descriptors_are_enough_or_one_line_and_never_a_hang(limit, command, tmp_path):
    job = start(command(tmp_path / 'run', '--num_workers', '3', '--epochs', '1'), tmp_path / 'out.txt',
                before=f'import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))')
    (status,) = job.wait(timeout=60)
    assert status == 0 or (status == 2 and 'ulimit -n' in job.text() and 'Traceback' not in job.text()), job.text()
