"""`hubconf.py` in a stranger's process, whose own `utils`, `models` and `datasets` stay what they are."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import models  # noqa: F401  registers the MogaNets
from builders import Payload, put, seeded, timm_file, write
from conftest import ROOT

IMAGE = torch.linspace(-2, 2, 3 * 64 * 64).view(1, 3, 64, 64)
# What each process begins with; at its end nothing of the repository but the model's file may be left
BEGINNING = f"""
import sys

import utils

import torch

IMAGE = torch.linspace(-2, 2, 3 * 64 * 64).view(1, 3, 64, 64)
REPOSITORY = {str(ROOT)!r}
path = sys.path[:]
"""
END = """
import datasets
import models

assert sys.path == path
assert utils is sys.modules['utils'] and (utils.NAME, models.NAME) == ('of the caller', 'of the caller')
assert not hasattr(datasets, 'build_loaders') and datasets.Dataset
files = {name: getattr(module, '__file__', None) or '' for name, module in sys.modules.items()}
left = [name for name, file in files.items() if file.startswith(REPOSITORY) and 'site-packages' not in file]
assert left == ['moganet_of_torch_hub'], left
"""


@pytest.fixture
def call(tmp_path, cache):
    """Runs Python in a process of its own, in a folder with a `utils.py` and a package `models`."""
    folder = tmp_path / 'project'
    for file in ('utils.py', 'models/__init__.py'):
        write(folder / file, b"NAME = 'of the caller'\n")
    stranger = [path for path in sys.path if Path(path or '.').resolve() != ROOT]
    if not any((Path(path) / 'datasets').is_dir() for path in stranger):  # Hugging Face's is not installed
        write(folder / 'datasets' / '__init__.py', b'class Dataset: ...\n')

    def run(code: str) -> subprocess.CompletedProcess:
        (folder / 'caller.py').write_text(BEGINNING + code)
        environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
        return subprocess.run([sys.executable, 'caller.py'], cwd=folder, env=environment, capture_output=True,
                              text=True, timeout=300)
    return run


def test_a_model_is_that_of_the_repository_and_the_caller_keeps_its_modules(call, tmp_path, cache):
    (cache.parent / 'someone_MogaNet_main').symlink_to(ROOT)  # as torch.hub would have fetched it
    done = call(f"""
import pickle

torch.manual_seed(0)
model = torch.hub.load(REPOSITORY, 'moganet_tiny', source='local', num_classes=7, drop_path_rate=0.1)
torch.save(model.eval()(IMAGE), {str(tmp_path / 'logits')!r})
assert type(pickle.loads(pickle.dumps(model))) is type(model)
again = torch.hub.load(REPOSITORY, 'moganet_xtiny', source='local', features_only=True, out_indices=(1, 3))
assert [tuple(output.shape[1:]) for output in again(IMAGE)] == [(64, 8, 8), (192, 2, 2)]
assert type(model.blocks1) in map(type, again.modules())  # both are of one module, loaded once
print(torch.hub.list('someone/MogaNet:main', skip_validation=True, trust_repo=True, verbose=False))
print(torch.hub.help('someone/MogaNet:main', 'moganet_small', skip_validation=True, trust_repo=True))
{END}""")
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    ours = timm.create_model('moganet_tiny', num_classes=7, drop_path_rate=0.1).eval()
    with torch.no_grad():  # the same file on the same seed, and so the same bits
        assert torch.equal(torch.load(tmp_path / 'logits', weights_only=True), ours(IMAGE))
    names, _, text = done.stdout.partition('\n')
    assert eval(names) == sorted(f'moganet_{size}' for size in ('xtiny', 'tiny', 'small', 'base', 'large', 'xlarge'))
    assert text.startswith('MogaNet-S: 25.3 M parameters') and 'pretrained: with the authors' in text


def test_pretrained_weights_are_the_released_file_by_the_repositorys_rules(call, tmp_path, cache):
    """The released file holds an average, which does not count here, an `argparse.Namespace` and an optimizer."""
    put(cache, 'moganet_xtiny', timm_file, seeded(0), seeded(1))
    done = call(f"""
model = torch.hub.load(REPOSITORY, 'moganet_xtiny', source='local', pretrained=True).eval()
torch.save(model(IMAGE), {str(tmp_path / 'logits')!r})
new = torch.hub.load(REPOSITORY, 'moganet_xtiny', source='local', pretrained=True, num_classes=5)
assert new.head.weight.shape[0] == 5 and torch.equal(new.blocks1[0].mlp.fc1.weight, model.blocks1[0].mlp.fc1.weight)
{END}""")
    assert done.returncode == 0, done.stderr
    ours = timm.create_model('moganet_xtiny').eval()
    ours.load_state_dict(seeded(0))
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / 'logits', weights_only=True), ours(IMAGE))


def test_a_file_that_would_run_code_is_refused_in_one_line(call, tmp_path, cache):
    marker = tmp_path / 'marker'
    put(cache, 'moganet_tiny', lambda path: torch.save(Payload(os.system, f'touch {marker}'), path))
    done = call(f"""
try:
    torch.hub.load(REPOSITORY, 'moganet_tiny', source='local', pretrained=True)
except RuntimeError as error:
    print(error)
{END}""")
    assert done.returncode == 0, done.stderr
    assert 'refused: to read it, posix.system would have to be imported' in done.stdout
    assert done.stdout.count('\n') == 1 and not marker.exists()
