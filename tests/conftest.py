"""Puts the repository on the path, as running from its folder does."""
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault('OMP_NUM_THREADS', '1')  # tests run beside one another, and threads would wait for one another
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))


# Of real processes, kills, ports and time limits: one after the other, on one core. The longest begin
PROCESSES = ('test_resume', 'test_submitit', 'test_run_lock', 'test_task', 'test_benchmark_engine',
             'test_benchmark_model', 'test_benchmark_report', 'test_data_benchmark', 'test_notebook', 'test_nodes',
             'test_detection')
LONG = ('test_resume', 'test_options', 'test_command_line', 'test_docs', 'test_evaluate', 'test_notes')


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For `pytest -n 2 --dist loadgroup`: the tests of a file share its fixtures on one core; the long files first."""
    for item in items:
        stem = item.path.stem
        item.add_marker(pytest.mark.xdist_group('processes' if stem in PROCESSES else stem))
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(scope='module')
def one_thread():
    """Sums are the same bits as in the forked processes of tests/runs.py, and tests beside one another do not wait."""
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def own_cache(tmp_path_factory):
    """Indices of the images go to a folder of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
        yield


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch hub cache, in which a released file may be put by hand."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.setenv('no_proxy', '*')
    folder = tmp_path / 'torch' / 'hub' / 'checkpoints'
    folder.mkdir(parents=True)
    return folder
