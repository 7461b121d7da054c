"""Puts the repository on the path, as running from its folder does."""
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))


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
