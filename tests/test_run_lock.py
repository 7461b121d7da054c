"""A run's folder has one owner, whoever starts, and a dead owner never keeps it."""
import json
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import main
from training import lock as run_lock
from training.lock import Lock, own_folder
from utils import Processes, UserError

ALONE = Processes(device=torch.device('cpu'))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(run_lock, 'SILENCE', 0.6)
    monkeypatch.setattr(run_lock, 'BEAT', 0.05)
    monkeypatch.setattr(run_lock, 'POLL', 0.02)
    for name in ('SLURM_JOB_ID', 'TORCHELASTIC_RUN_ID'):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope='module')
def dead() -> int:
    """The number of a process that has ended."""
    ended = subprocess.Popen([sys.executable, '-c', ''])
    ended.wait(timeout=60)
    return ended.pid


def leave(folder: Path, **facts: Any) -> Path:
    """A lock as an owner on this machine leaves it, but for these facts."""
    folder.mkdir(exist_ok=True)
    path = folder / run_lock.NAME
    path.write_text(json.dumps({'token': 'other', **run_lock._machine(), 'pid': os.getpid(), 'started': 'then',
                                'pid_start': run_lock._start_of(os.getpid()), 'job': '', 'run': '', **facts}))
    return path


def seconds_to_take(folder: Path) -> float:
    begin = time.monotonic()
    Lock(folder).release()
    return time.monotonic() - begin


def test_a_lock_says_who_holds_it_beats_and_goes_with_its_owner(tmp_path, monkeypatch):
    monkeypatch.setenv('SLURM_JOB_ID', '17')
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'a-run')
    folder = tmp_path / 'runs' / 'new'
    with own_folder(folder, ALONE):
        path = folder / run_lock.NAME
        facts = json.loads(path.read_text())
        assert (facts['pid'], facts['job'], facts['run']) == (os.getpid(), '17', 'a-run') and facts['host']
        before = path.stat().st_mtime_ns
        time.sleep(0.3)
        assert path.stat().st_mtime_ns > before
    assert not (tmp_path / 'runs').exists()  # nothing was written into it


def test_a_lock_is_released_on_errors_too(tmp_path):
    with pytest.raises(ZeroDivisionError), own_folder(tmp_path, ALONE):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_a_second_start_is_refused_in_one_line_while_the_first_lives(tmp_path, capsys):
    (tmp_path / 'log.txt').write_text('the first')
    with own_folder(tmp_path, ALONE):
        assert main.main(['--model', 'moganet_xtiny', '--data_set', 'fake', '--device', 'cpu', '--output_dir',
                          str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f'error: {tmp_path} is being trained in by process {os.getpid()} on ')
    assert printed.err.count('\n') == 1 and '--output_dir' in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ['log.txt']


@pytest.mark.parametrize('facts', [{'pid': 'dead'}, {'pid_start': '1'}])
def test_a_dead_owner_on_this_machine_is_followed_at_once(facts, dead, tmp_path):
    """Also where a later process has its number."""
    leave(tmp_path, **{name: dead if value == 'dead' else value for name, value in facts.items()})
    assert seconds_to_take(tmp_path) < 0.4


def test_a_zombie_is_dead(tmp_path):
    zombie = subprocess.Popen([sys.executable, '-c', ''])
    started = run_lock._start_of(zombie.pid)
    while run_lock._start_of(zombie.pid):
        time.sleep(0.01)
    leave(tmp_path, pid=zombie.pid, pid_start=started)
    assert seconds_to_take(tmp_path) < 0.4
    zombie.wait(timeout=60)


@pytest.mark.parametrize('name,variable', [('job', 'SLURM_JOB_ID'), ('run', 'TORCHELASTIC_RUN_ID')])
def test_a_start_of_the_same_job_or_run_elsewhere_is_followed_at_once(name, variable, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, '17')
    leave(tmp_path, host='another', **{name: '17'})
    assert seconds_to_take(tmp_path) < 0.4


@pytest.mark.parametrize('facts', [{'host': 'another'}, {'boot': 'another'}, {'space': 'another'}, {'job': '18',
                         'host': 'another'}, {'run': 'none', 'host': 'another'}])
def test_an_owner_elsewhere_is_followed_after_its_silence(facts, dead, tmp_path, monkeypatch):
    """Where its process number means nothing here: another host, another boot, another container."""
    monkeypatch.setenv('SLURM_JOB_ID', '17')
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')  # torchrun's default: every run's
    leave(tmp_path, pid=dead, **facts)
    assert 0.5 < seconds_to_take(tmp_path) < 3


def test_an_old_lock_from_elsewhere_is_not_waited_for_again(tmp_path):
    """By the clock of the file system: the hosts' own may differ."""
    path = leave(tmp_path, host='another')
    os.utime(path, (time.time() - 100, time.time() - 100))
    assert seconds_to_take(tmp_path) < 0.4


def test_an_owner_elsewhere_that_beats_is_not_followed(tmp_path):
    path, stop = leave(tmp_path, host='another'), threading.Event()

    def beat() -> None:
        while not stop.wait(0.1):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match=r'is being trained in by process .* on another'):
            Lock(tmp_path)
    finally:
        stop.set()
        thread.join(timeout=10)
    assert json.loads(path.read_text())['token'] == 'other'


def test_whatever_stands_in_a_lock_is_followed_after_its_silence(tmp_path):
    """Property: forty damaged locks, seeded."""
    random.seed(0)
    whole = leave(tmp_path, host='another').read_bytes()
    for number in range(40):
        content = bytearray(whole)
        for _ in range(random.randrange(1, 20)):
            content[random.randrange(len(content))] = random.randrange(256)
        content = [bytes(content), whole[:random.randrange(len(whole))], b'', b'[]', b'{"pid": "x"}'][number % 5]
        path = tmp_path / run_lock.NAME
        path.write_bytes(content)
        os.utime(path, (time.time() - 100, time.time() - 100))
        assert seconds_to_take(tmp_path) < 0.4
        assert not list(tmp_path.iterdir())


def _contend(folder: str, barrier: Any, results: Any) -> None:
    barrier.wait(timeout=60)
    try:
        with own_folder(Path(folder), ALONE):
            results.put('won')
            barrier.wait(timeout=60)  # the winner lives until all have tried
    except UserError:
        results.put('refused')
        barrier.wait(timeout=60)


@pytest.mark.parametrize('left', [False, True])
def test_of_many_starts_at_once_one_wins(left, dead, tmp_path):
    """Also where a dead owner's lock is there to be taken over."""
    context = multiprocessing.get_context('fork')
    for round_ in range(6):
        folder = tmp_path / str(round_)
        if left:
            leave(folder, pid=dead)
        barrier, results = context.Barrier(8), context.Queue()
        starts = [context.Process(target=_contend, args=(str(folder), barrier, results)) for _ in range(8)]
        for start in starts:
            start.start()
        found = [results.get(timeout=60) for _ in starts]
        for start in starts:
            start.join(timeout=60)
        assert sorted(found) == ['refused'] * 7 + ['won']


def test_an_owner_that_was_taken_over_ends(tmp_path, monkeypatch):
    """After more than three minutes without a heartbeat, as of a suspended machine."""
    ended = threading.Event()
    monkeypatch.setattr(os, '_exit', lambda status: ended.set())
    lock = Lock(tmp_path)
    path = leave(tmp_path, host='another')
    path.unlink()
    leave(tmp_path, host='another')
    assert ended.wait(timeout=5)
    lock.release()
    assert json.loads(path.read_text())['token'] == 'other'
