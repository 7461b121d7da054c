"""Jobs on a real Slurm: interrupted in every way there is, they end with the bits of an uninterrupted run."""
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from submitit.core.utils import UncompletedJobError

import cluster
import held
import run_with_submitit
from builders import assert_same_run, log_of
from runs import TINY
from utils import UserError

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures('slurm')]

ROOT = Path(run_with_submitit.__file__).parent
LAYOUTS = {'2 nodes x 1 task': ('--nodes', '2', '--gpus', '1'), '1 node x 2 tasks': ('--nodes', '1', '--gpus', '2')}
# 1437 digits: 11 updates of 128, in each of 3 epochs; the nodes' names n1 and n2 do not resolve
FLAGS = (*TINY, '--data_set', 'digits', '--device', 'cpu', '--total_batch_size', '128', '--epochs', '3',
         '--warmup_epochs', '1', '--num_workers', '1')
JOB = ('--time', '0:10:00', '--signal_delay', '50', '--cpus_per_gpu', '1', '--setup',
       'export MASTER_ADDR=127.0.0.1 GLOO_SOCKET_IFNAME=lo')
ENDED = ('COMPLETED', 'FAILED', 'CANCELLED', 'TIMEOUT', 'NODE_FAIL')
PATIENCE = 240  # seconds for a step that takes 10 on an idle machine
RESTARTS: list[tuple[str, str, float]] = []  # interruption, layout, seconds from the signal to the restart


@pytest.fixture(scope='session')
def slurm(tmp_path_factory, request):
    """A running Slurm of two nodes; the tests are skipped, with the reason, where there can be none."""
    with pytest.MonkeyPatch.context() as patch:
        # The jobs find held.py; and one thread each, since the machine has two cores for all
        patch.setenv('PYTHONPATH', str(Path(__file__).parent), prepend=os.pathsep)
        patch.setenv('OMP_NUM_THREADS', '1')
        try:
            with cluster.running(tmp_path_factory.mktemp('cluster') / 'run'):
                yield
        except cluster.Unavailable as reason:
            pytest.skip(str(reason))
    plugins = request.config.pluginmanager
    with plugins.get_plugin('capturemanager').global_and_fixture_disabled():
        show = plugins.get_plugin('terminalreporter')
        show.ensure_newline()
        show.section('interruptions after which weights, average, optimizer and log were equal bit for bit')
        for what, layout, seconds in RESTARTS:
            show.line(f'{what:24} {layout:18} {seconds:5.1f} s to the restart')


def submit(folder: Path, layout: str, *words: str):
    """A job of the run in a folder."""
    [job] = run_with_submitit.submit([*JOB, *LAYOUTS[layout], *FLAGS, '--output_dir', str(folder), *words])
    return job


def text_of(job, rank: int = 0) -> str:
    """What a rank has printed."""
    paths = job.task(rank).paths
    return ''.join(path.read_text() for path in (paths.stdout, paths.stderr) if path.exists())


def state(job) -> str:
    """PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, CANCELLED, ..."""
    return cluster.output('squeue', '-h', '--array', '--states=all', '-j', job.job_id, '-o', '%T').strip()


def wait_for(job, text: str, *, rank: int = 0, count: int = 1) -> None:
    """Waits until a rank has printed a text."""
    def printed() -> bool:
        return text_of(job, rank).count(text) >= count

    wait_until(job, lambda: printed() or state(job) in ENDED)
    if not printed():
        pytest.fail(f'{text!r} was not printed {count} times:\n{text_of(job)}')


def wait_for_end(job) -> None:
    """Waits until a job is neither queued nor running."""
    wait_until(job, lambda: state(job) in ENDED)


def wait_until(job, condition) -> None:
    try:
        cluster.wait_until(condition, what=f'waited for job {job.job_id}', seconds=PATIENCE)
    except TimeoutError as error:
        pytest.fail(f'{error} ({state(job)}):\n{text_of(job)}')


def results(job) -> list:
    """What the ranks returned."""
    wait_for_end(job)
    assert state(job) == 'COMPLETED', text_of(job)
    return job.results()


def log_in(folder: Path) -> list[int]:
    return [line['epoch'] for line in log_of(folder)]


@pytest.fixture(scope='session')
def uninterrupted(slurm, tmp_path_factory):
    """The folder of a job that ran undisturbed in a layout, and the job."""
    made = {}

    def of(layout: str):
        if layout not in made:
            folder = tmp_path_factory.mktemp('whole') / 'run'
            job = submit(folder, layout)
            results(job)
            made[layout] = folder, job
        return made[layout]
    return of


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_job_trains_to_its_end(layout, uninterrupted):
    folder, job = uninterrupted(layout)
    first, second = job.results()
    assert second is None
    assert first == json.loads((folder / 'log.txt').read_text().splitlines()[-1]) and first['epoch'] == 2
    assert log_in(folder) == [0, 1, 2]
    assert '2 processes' in text_of(job)
    assert_same_run(folder, uninterrupted('2 nodes x 1 task')[0])  # both have two ranks


def pid_of(job, rank: int) -> int:
    """The process id of a rank that is held."""
    return int(re.search(r'held: process (\d+)', text_of(job, rank))[1])


# ---- Interruptions, each of which returns the time at which the signal was sent -------------------------------------

def preemption(job) -> float:
    """A job of the partition `high` takes both nodes for a moment."""
    begin = time.monotonic()
    subprocess.run(['sbatch', '--partition=high', '--nodes=2', '--exclusive', '--output=/dev/null', '--wrap=sleep 1'],
                   check=True, capture_output=True)
    return begin


def preemption_by_sigterm(job) -> float:
    """The same in a cluster that was not told to send the user's signal."""
    configuration = Path(os.environ['SLURM_CONF'])
    text = configuration.read_text()
    try:
        configuration.write_text(text.replace('SlurmctldParameters=preempt_send_user_signal\n', ''))
        subprocess.run(['scontrol', 'reconfigure'], check=True)
        begin = preemption(job)
        wait_for(job, 'SIGTERM received')
    finally:
        configuration.write_text(text)
        subprocess.run(['scontrol', 'reconfigure'], check=True)
    return begin


def time_limit(job) -> float:
    """Comes as near as the delay of the signal; Slurm looks every 30 s."""
    subprocess.run(['scontrol', 'update', f'JobId={job.job_id}', 'TimeLimit=1'], check=True)
    wait_for(job, 'SIGUSR2 received')
    begin = time.monotonic()
    wait_until(job, lambda: state(job) != 'RUNNING')
    subprocess.run(['scontrol', 'update', f'JobId={job.job_id}', 'TimeLimit=10'], check=True)
    return begin


def requeue(job) -> float:
    begin = time.monotonic()
    subprocess.run(['scontrol', 'requeue', job.job_id], check=True)
    return begin


def node_failure(job) -> float:
    """The last rank's node is lost at once with all that runs on it, and comes back by itself."""
    found = re.search(r'\bNodeList=n\[?(?:\d-)?(\d)', cluster.output('scontrol', '-o', 'show', 'job', job.job_id))
    begin = time.monotonic()
    lost = [pid_of(job, rank) for rank in ((1,) if '[' in found[0] else (0, 1))]
    # Slurm's own process above the ranks goes first and cannot tell what happened to them
    parent = int(Path(f'/proc/{lost[0]}/stat').read_text().rsplit(')', 1)[1].split()[1])
    for pid in (parent, *lost):
        os.kill(pid, signal.SIGKILL)
    subprocess.run(['scontrol', 'update', f'NodeName=n{found[1]}', 'State=DOWN', 'Reason=test'], check=True)
    return begin


COMES_BACK = {'preemption': preemption, 'preemption by SIGTERM': preemption_by_sigterm, 'time limit': time_limit,
              'scontrol requeue': requeue, 'node failure': node_failure}


# The last two with one layout, for the sake of time
@pytest.mark.parametrize('interruption,layout', [
    *itertools.product(('preemption', 'time limit', 'scontrol requeue'), LAYOUTS),
    ('preemption by SIGTERM', '1 node x 2 tasks'), ('node failure', '2 nodes x 1 task')])
def test_an_interrupted_job_comes_back_by_itself_and_ends_with_the_same_bits(interruption, layout, uninterrupted,
                                                                             monkeypatch, tmp_path):
    whole, _ = uninterrupted(layout)
    monkeypatch.setattr(run_with_submitit, 'Task', held.HeldTask)
    job = submit(tmp_path / 'run', layout)
    for rank in (0, 1):
        wait_for(job, 'held', rank=rank)
    begin = COMES_BACK[interruption](job)
    wait_for(job, 'Continuing from')
    seconds = time.monotonic() - begin
    assert results(job)[0]['epoch'] == 2
    assert_same_run(tmp_path / 'run', whole)
    assert log_in(tmp_path / 'run') == [0, 1, 2]
    if interruption in ('preemption', 'preemption by SIGTERM', 'time limit'):
        # Saved where the signal met it, not at the epoch before
        assert f'in epoch 2, after {held.HOLD_AT + 1} updates' in text_of(job)
        assert 'remaining timeouts' in text_of(job)  # by submitit
    if interruption == 'node failure':  # where nothing could be saved
        assert 'checkpoint-11.pth: in epoch 2, after 11 updates' in text_of(job)
    RESTARTS.append((interruption, layout, seconds))


def cancel(job) -> float:
    begin = time.monotonic()
    subprocess.run(['scancel', job.job_id], check=True)
    wait_for_end(job)
    assert state(job) == 'CANCELLED'
    return begin


def kill_task(job) -> float:
    """SIGKILL of the second rank ends the whole job, within a minute."""
    begin = time.monotonic()
    os.kill(pid_of(job, 1), signal.SIGKILL)
    wait_for_end(job)
    assert time.monotonic() - begin < 60
    assert state(job) == 'FAILED'
    assert re.search(r'task 1: Killed', text_of(job))
    with pytest.raises(UncompletedJobError):
        job.results()
    return begin


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('interruption', [cancel, kill_task], ids=['scancel', 'SIGKILL of a task'])
def test_an_ended_job_is_continued_by_the_same_command(interruption, layout, uninterrupted, monkeypatch, tmp_path):
    whole, _ = uninterrupted(layout)
    with monkeypatch.context() as patch:
        patch.setattr(run_with_submitit, 'Task', held.HeldTask)
        job = submit(tmp_path / 'run', layout)
    for rank in (0, 1):
        wait_for(job, 'held', rank=rank)
    begin = interruption(job)
    again = submit(tmp_path / 'run', layout)
    wait_for(again, 'Continuing from')
    seconds = time.monotonic() - begin
    assert results(again)[0]['epoch'] == 2
    assert_same_run(tmp_path / 'run', whole)
    assert log_in(tmp_path / 'run') == [0, 1, 2]
    assert state(job) in ('CANCELLED', 'FAILED')  # and did not come back beside it
    RESTARTS.append(('scancel' if interruption is cancel else 'SIGKILL of a task', layout, seconds))


def test_a_finished_job_is_not_run_again(uninterrupted):
    folder, job = uninterrupted('1 node x 2 tasks')
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}
    subprocess.run(['scontrol', 'requeue', job.job_id], check=True)
    wait_for(job, 'is complete: 3 epochs. Nothing to do')
    assert results(job)[0]['epoch'] == 2
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()} == before


def test_a_job_that_makes_no_progress_between_two_restarts_stops(monkeypatch, tmp_path):
    monkeypatch.setattr(run_with_submitit, 'Task', held.StuckTask)
    job = submit(tmp_path / 'run', '1 node x 2 tasks')
    for start in (1, 2):
        wait_for(job, 'stuck', count=start)
        requeue(job)
    wait_for_end(job)
    assert state(job) == 'FAILED'
    assert 'no progress since the restart before: no checkpoint is still the newest' in str(job.task(0).exception())


def test_an_error_in_one_task_ends_the_job_and_is_what_the_user_sees(monkeypatch, tmp_path):
    monkeypatch.setattr(run_with_submitit, 'Task', held.BrokenTask)
    job = submit(tmp_path / 'run', '2 nodes x 1 task')
    wait_for_end(job)
    assert state(job) == 'FAILED'
    for rank in (0, 1):
        assert 'RuntimeError: the disk of rank 1 is on fire' in str(job.task(rank).exception())
    assert 'RuntimeError: the disk of rank 1 is on fire' in text_of(job, rank=1)
    assert 'Traceback' not in text_of(job, rank=0)


def test_an_array_trains_a_folder_each_and_is_collected(slurm, tmp_path):
    jobs = run_with_submitit.submit([*JOB, '--nodes', '1', '--gpus', '1', *FLAGS, '--epochs', '1', '--output_dir',
                                     str(tmp_path), '--sweep', 'lr=1e-3,2e-3 warmup_epochs=0'])
    entries = [results(job)[0] for job in jobs]
    assert len({entry['train_loss'] for entry in entries}) == 2
    for lr, entry in zip(('1e-3', '2e-3'), entries, strict=True):
        folder = tmp_path / f'lr={lr}_warmup_epochs=0'
        assert json.loads((folder / 'log.txt').read_text()) == entry
        assert json.loads((folder / 'recipe.json').read_text())['lr'] == float(lr)


# ---- Without submitit -----------------------------------------------------------------------------------------------

HELD_MAIN = '''
import sys
sys.path.pop(0)  # this file is not the module
import held
import main
held.hold_first_start()
sys.exit(main.main())
'''


def test_the_sbatch_file_saves_at_its_signal_comes_back_and_ends_with_the_same_bits(uninterrupted, monkeypatch,
                                                                                    tmp_path):
    layout = '2 nodes x 1 task'
    whole, _ = uninterrupted(layout)
    (tmp_path / 'main.py').write_text(HELD_MAIN)
    for name, value in {'PROCESSES': '1', 'MASTER_ADDR': '127.0.0.1', 'GLOO_SOCKET_IFNAME': 'lo',
                        'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}'}.items():
        monkeypatch.setenv(name, value)
    submitted = cluster.output('sbatch', '--parsable', '--nodes=2', '--gpus-per-node=0', '--cpus-per-task=2',
                               '--time=10', f'--chdir={tmp_path}', str(ROOT / 'tools/train.sbatch'), *FLAGS,
                               '--output_dir', str(tmp_path / 'run'))
    paths = SimpleNamespace(stdout=tmp_path / f'slurm-{submitted.strip()}.log', stderr=Path('/dev/null'))
    job = SimpleNamespace(job_id=submitted.strip(), task=lambda rank: SimpleNamespace(paths=paths))
    wait_for(job, 'held', count=2)
    begin = time.monotonic()
    subprocess.run(['scancel', '--batch', '--signal=USR2', job.job_id], check=True)  # as at the time limit
    wait_for(job, 'Continuing from')
    seconds = time.monotonic() - begin
    wait_for_end(job)
    assert state(job) == 'COMPLETED', text_of(job)
    assert_same_run(tmp_path / 'run', whole)
    assert log_in(tmp_path / 'run') == [0, 1, 2]
    assert f'in epoch 2, after {held.HOLD_AT + 1} updates' in text_of(job)
    RESTARTS.append(('sbatch file, USR2', layout, seconds))


# ---- Bad input ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('words,line', [
    (('--partition', 'hihg'), 'Slurm refuses the job, nothing is submitted: invalid partition specified: hihg'),
    (('--device', 'auto'), 'nothing is submitted: Invalid generic resource (gres) specification'),
    (('--job_dir', '/proc/nowhere'), 'the folder /proc/nowhere cannot be written'),
    (('--nodes', '8'), 'Slurm refuses the job, nothing is submitted'),
    (('--constraint', 'h200'), 'Slurm refuses the job, nothing is submitted'),
])
def test_what_slurm_cannot_run_is_refused_in_one_line_and_not_submitted(words, line, tmp_path):
    before = cluster.output('squeue', '-h')
    with pytest.raises(UserError) as caught:
        run_with_submitit.submit([*JOB, '--gpus', '1', *FLAGS, '--output_dir', str(tmp_path / 'run'), *words])
    assert line in str(caught.value) and '\n' not in str(caught.value)
    assert cluster.output('squeue', '-h') == before
    assert not list((tmp_path / 'run').glob('**/*.pkl'))
