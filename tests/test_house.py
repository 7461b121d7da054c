"""The house itself: imports run downwards, nothing unpickles, no machine path, the dependencies' known traps."""
import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
# A file imports only from floors below its own; the rooms of one floor do not know one another
FLOORS = [{'utils'}, {'recipes'}, {'models'}, {'optim_factory', 'pipeline'}, {'engine', 'tasks', 'datasets'},
          {'training'}, {'main'}, {'predict'}, {'tools', 'run_with_submitit', 'hubconf'}, {'web'}]
KNOWN = {name for floor in FLOORS for name in floor}
PACKAGES = ('recipes', 'models', 'pipeline', 'tasks', 'training', 'tools', 'web')


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
    """All files of the project but the tests, and the room of each: a top-level file's name, or its package's."""
    files = [(path.stem, path) for path in ROOT.glob('*.py')]
    return files + [(package, path) for package in PACKAGES for path in (ROOT / package).rglob('*.py')]


@pytest.mark.parametrize('room,path', rooms(), ids=lambda value: str(getattr(value, 'name', value)))
def test_imports_only_run_downwards(room, path):
    for other in imported(path) & KNOWN - {room}:
        assert floor_of(other) < floor_of(room), f'{path.name} imports {other}'


def test_the_engine_knows_no_task_and_no_file():
    assert imported(ROOT / 'engine.py') & KNOWN <= {'optim_factory', 'utils'}


def test_the_backbones_file_imports_nothing_of_the_project():
    assert not imported(ROOT / 'models' / 'moganet.py') & KNOWN


def test_every_top_level_file_and_package_has_a_floor():
    folders = {path.relative_to(ROOT).parts[0] for path in tracked() if path.suffix == '.py' and path.parent != ROOT}
    assert {path.stem for path in ROOT.glob('*.py')} | folders - {'tests'} == KNOWN
    for _, path in rooms():
        text = path.read_text()
        assert not text or ast.get_docstring(ast.parse(text)), f'{path.name} does not say what it is for'


def test_no_test_file_imports_another():
    for path in (ROOT / 'tests').rglob('*.py'):
        assert not [name for name in imported(path) if name.startswith('test_')], path.name


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


# ---- Waits ----------------------------------------------------------------------------------------------------------

# Calls that wait for a thread, a process, a rank, a lock or the network, and the keyword that limits them
WAITS = {'join': 'timeout', 'wait': 'timeout', 'get': 'timeout', 'result': 'timeout', 'communicate': 'timeout',
         'acquire': 'timeout', 'run': 'timeout', 'check_output': 'timeout', 'check_call': 'timeout', 'call': 'timeout',
         'urlopen': 'timeout', 'urlretrieve': 'timeout', 'FileLock': 'timeout', 'select': 'timeout', 'recv': 'timeout',
         'accept': 'timeout', 'barrier': 'timeout', 'monitored_barrier': 'timeout', 'init_process_group': 'timeout',
         'rendezvous': 'timeout', 'new_group': 'timeout', 'waitpid': 'timeout', 'create_connection': 'timeout'}
# These wait with any arguments; the others only without, as a thread's `join()` does and a text's `join(parts)` not
ALWAYS = {'run', 'check_output', 'check_call', 'urlopen', 'urlretrieve', 'FileLock', 'recv', 'waitpid',
          'init_process_group', 'rendezvous', 'new_group', 'create_connection', 'communicate'}
# Methods of ours by these names: Buffers.get waits for nothing, CheckpointFolder.wait has its limit within
OURS = {'self.get', 'buffers.get', 'self.buffers.get', 'self.wait', 'folder.wait', 'self.folder.wait', 'files.wait'}
PLACE = r'`([\w./]+): (\w+)`'
SUBPROCESS = {'run', 'check_output', 'check_call', 'call'}


def waits_without_limit(source: str) -> list[tuple[str, str]]:
    """(function, call) of each wait in a source that has no limit of its own."""
    found = []

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            function = node.name
        if isinstance(node, ast.Call):
            name = getattr(node.func, 'attr', getattr(node.func, 'id', ''))
            owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ''
            limited = any(keyword.arg in (WAITS.get(name), None) for keyword in node.keywords)
            waits = name in WAITS and (name in ALWAYS or not node.args)
            if waits and not limited and (name not in SUBPROCESS or owner == 'subprocess'):
                found.append((function, ast.unparse(node.func)))
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(source), 'module')
    return found


def table_of_waits() -> list[list[str]]:
    """The rows of CONTRIBUTING's table of waits: where, for what, the limit, the line."""
    text = (ROOT / 'CONTRIBUTING.md').read_text().partition('## Waits')[2].partition('\n## ')[0]
    lines = [line for line in text.splitlines() if line.startswith('|')]
    return [[cell.strip() for cell in line.strip('|').split(' | ')] for line in lines[2:]]


def test_every_wait_has_a_limit_of_its_own_or_stands_on_the_table():
    listed = {place for row in table_of_waits() for place in re.findall(PLACE, row[0])}
    for path in tracked():
        name = str(path.relative_to(ROOT))
        if path.suffix != '.py' or name.startswith('tests/'):
            continue
        for function, call in waits_without_limit(path.read_text()):
            assert call in OURS or (name, function) in listed, f'{name}: {function} waits without a limit in {call}()'


def test_the_table_of_waits_names_functions_that_are_there_with_a_limit_and_a_line():
    rows = table_of_waits()
    assert len(rows) > 10
    for where, what, limit, line in rows:
        places = re.findall(PLACE, where)
        assert places and what and re.search(r'\d', limit) and line, where
        for file, function in places:
            defined = {node.name for node in ast.walk(ast.parse((ROOT / file).read_text()))
                       if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
            assert function in defined, f'{file}: {function}'


def test_a_wait_without_a_limit_is_found():
    source = 'def f():\n' + ''.join(f'    {call}\n' for call in (
        'thread.join()', 'process.wait()', 'queue.get()', 'subprocess.run(["a"])', 'FileLock(path)', 'lock.acquire()',
        'process.communicate(b"x")', 'future.result()', 'urlopen(request)', 'connection.recv(4)'))
    assert len(waits_without_limit(source)) == 10
    assert not waits_without_limit('", ".join(names); values.get("a"); event.wait(5); queue.get(timeout=1)\n'
                                   'subprocess.run(["a"], timeout=3); thread.join(timeout=2); main.run()')


# ---- Tests of GPUs --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('words, said', [
    ([], 'skipped: no STANDIN=FOLDER is given'),
    (['STANDIN=.', 'STANDIN_TORCH=1.0, CUDA 8'], 'skipped: the stand-in is for torch 1.0, CUDA 8, and this'),
    (['STANDIN=.', f'STANDIN_TORCH={torch.__version__.split("+")[0]}, CUDA {torch.version.cuda}', 'CUDA_HOME=/nowhere'],
     "skipped: the stand-in is built by g++ and CUDA's headers, in /nowhere")])
def test_the_tests_of_gpus_are_left_out_with_their_reason(words, said):
    if shutil.which('make') is None:
        pytest.skip('make is not installed')
    made = ['--no-print-directory', '-o', '.venv/installed', 'test-standin', f'PYTHON={sys.executable}', *words]
    done = subprocess.run(['make', *made], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout.startswith(said)) == (0, True), done.stdout + done.stderr
