"""The house itself: imports run downwards, nothing unpickles, no machine path, the dependencies' known traps."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
# A file imports only from floors below its own
FLOORS = [{'recipes', 'utils'},
          {'notes', 'run_lock', 'models', 'image_kernels', 'image_ops', 'image_sources', 'datasets', 'optim_factory'},
          {'checkpoint'}, {'engine'}, {'parts'}, {'trainer', 'evaluation'}, {'main'}, {'run_with_submitit'}]
# On the second floor the rooms do not know one another, but for the data path's own
DATA = {'image_kernels', 'image_ops', 'image_sources', 'datasets'}
NOT_IN_TRAINING = {'predict'}


def imported(path: Path) -> set[str]:
    """The top-level names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split('.')[0])
    return names


def floor_of(name: str) -> int:
    return next(i for i, floor in enumerate(FLOORS) if name in floor)


def rooms() -> list[tuple[str, Path]]:
    files = [(path.stem, path) for path in ROOT.glob('*.py') if path.stem not in NOT_IN_TRAINING]
    return files + [('models', path) for path in (ROOT / 'models').glob('*.py')]


@pytest.mark.parametrize('room,path', rooms(), ids=lambda value: str(getattr(value, 'name', value)))
def test_imports_only_run_downwards(room, path):
    known = {name for floor in FLOORS for name in floor}
    for other in imported(path) & known - {room}:
        below = floor_of(other) < floor_of(room)
        neighbours = floor_of(room) == 0 or {room, other} <= DATA
        assert below or neighbours, f'{path.name} imports {other}'


def test_every_top_level_file_has_a_floor():
    known = {name for floor in FLOORS for name in floor}
    assert {room for room, _ in rooms()} <= known
    for path in ROOT.glob('*.py'):
        assert ast.get_docstring(ast.parse(path.read_text())), f'{path.name} does not say what it is for'


def test_the_command_line_answers_without_torch():
    code = 'import sys, recipes, utils; recipes.resolve(["--model", "moganet_tiny"]); assert "torch" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


def tracked() -> list[Path]:
    listed = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip('not a git checkout')
    return [ROOT / name for name in listed.stdout.split()]


def test_nothing_loads_a_pickle_in_any_other_way():
    for path in tracked():
        if path.suffix != '.py' or 'tests' in path.parts:
            continue
        text = path.read_text()
        for call in re.findall(r'torch\.load\((?:[^()]|\([^()]*\))*\)', text):
            assert 'weights_only=True' in call, f'{path.name}: {call}'
        assert not re.search(r'\bpickle\.loads?\(|\bUnpickler\(|weights_only=False', text), path.name


def test_no_file_names_a_machine():
    for path in tracked():
        if path.suffix in ('.py', '.md', '.toml', '.sh', '') and path.name != Path(__file__).name:
            text = path.read_text(errors='replace')
            assert not re.search(r'/(work|root|opt)/', text), path


@pytest.mark.parametrize('level', [0, 5, 10])
def test_posterize_takes_every_level_with_the_pillow_that_was_installed(level):
    from timm.data.auto_augment import AugmentOp
    operation = AugmentOp('PosterizeIncreasing', prob=1.0, magnitude=level, hparams={})
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    assert operation(image).size == (16, 16)


def test_three_thousand_images_pass_randaugment():
    import random

    from timm.data.auto_augment import rand_augment_transform
    random.seed(0)
    np.random.seed(0)
    augment = rand_augment_transform('rand-m9-mstd0.5-inc1', {'translate_const': 8, 'img_mean': (124, 116, 104)})
    pixels = np.random.default_rng(0).integers(0, 256, (3000, 16, 16, 3), dtype=np.uint8)
    changed = sum(np.asarray(augment(Image.fromarray(image))).tobytes() != image.tobytes() for image in pixels)
    assert changed > 2000  # two operations, each with probability 0.5
