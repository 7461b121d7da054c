"""`demo.ipynb`: its cells parse, its flags are real, it is stored without outputs, and it runs from top to bottom."""
import ast
import json
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

import recipes
from conftest import ROOT
from tools import docs

NOTEBOOK = ROOT / 'demo.ipynb'


def code_cells() -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())['cells'] if cell['cell_type'] == 'code']


def test_cells_parse_and_hold_no_output() -> None:
    for cell in code_cells():
        ast.parse(''.join(cell['source']))
        assert cell['outputs'] == [] and cell['execution_count'] is None
        assert max(map(len, cell['source'])) <= 121  # the line length, and its end


def calls(of: str) -> list[list[str]]:
    """The words of every call `of.main([...])`; what is not a constant is written as the path `x`."""
    found = []
    for cell in code_cells():
        for node in ast.walk(ast.parse(''.join(cell['source']))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == f'{of}.main':
                found.append([word.value if isinstance(word, ast.Constant) else 'x' for word in node.args[0].elts])
    return found


def test_flags_are_those_of_the_command_line() -> None:
    trainings = [recipes.resolve(words) for words in calls('main')]
    assert [run.finetune is not None for _, run in trainings] == [False, True]
    assert len(calls('predict')) == 2 and len(calls('cam')) == len(calls('complexity')) == 1


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a local repository with the files of this one, as they are now; git runs without a terminal."""
    if shutil.which('git') is None:
        pytest.skip('git is not installed')
    folder = tmp_path / 'published'
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns('.*', 'runs', 'data', 'tests', '*.egg-info'))
    for name in ('AUTHOR', 'COMMITTER'):
        monkeypatch.setenv(f'GIT_{name}_NAME', 'test')
        monkeypatch.setenv(f'GIT_{name}_EMAIL', 'test@localhost')
    monkeypatch.setenv('GIT_TERMINAL_PROMPT', '0')
    for words in (['init', '--quiet'], ['add', '--all'], ['commit', '--quiet', '--message', 'as it is']):
        subprocess.run(['git', *words], cwd=folder, check=True)
    return folder.as_uri()


@pytest.fixture
def colab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder and an environment as Colab's: its variables, and a Python into which the notebook may install.

    That Python, the Jupyter kernel `colab`, finds the packages of this one; pip needs no network.
    """
    for name, value in {'COLAB_RELEASE_TAG': 'release-colab', 'COLAB_GPU': '0', 'COLAB_JUPYTER_IP': '172.28.0.12',
                        'PYTHONPATH': '/env/python', 'MPLBACKEND': 'module://matplotlib_inline.backend_inline',
                        'TF2_BEHAVIOR': '1', 'GCE_METADATA_TIMEOUT': '3', 'JUPYTER_PATH': str(tmp_path / 'jupyter'),
                        'PIP_NO_INDEX': '1', 'PIP_NO_BUILD_ISOLATION': '0',  # pip's word for: without isolation
                        'OMP_NUM_THREADS': '1'}.items():  # beside other tests, threads that wait take minutes
        monkeypatch.setenv(name, value)
    venv.create(tmp_path / 'env', symlinks=True)
    site = next((tmp_path / 'env').glob('lib/python*/site-packages'))
    (site / 'parent.pth').write_text('\n'.join(path for path in sys.path if path.endswith('-packages')))
    kernel = tmp_path / 'jupyter' / 'kernels' / 'colab'
    kernel.mkdir(parents=True)
    python = str(tmp_path / 'env' / 'bin' / 'python')
    (kernel / 'kernel.json').write_text(json.dumps({
        'argv': [python, '-m', 'ipykernel_launcher', '-f', '{connection_file}'], 'display_name': 'Colab',
        'language': 'python'}))
    (tmp_path / 'content' / 'sample_data').mkdir(parents=True)
    return tmp_path / 'content'


def test_notebook_runs_from_top_to_bottom_as_on_colab(colab: Path, published: str) -> None:
    """From a clone of a local repository in place of the address.

    Longer than 20 s, and not marked slow: a page that is not run at every change soon says what is not so.
    """
    nbclient, nbformat = pytest.importorskip('nbclient'), pytest.importorskip('nbformat')
    notebook = nbformat.reads(NOTEBOOK.read_text().replace(docs.address(), published), as_version=4)
    resources = {'metadata': {'path': str(colab)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name='colab', resources=resources).execute()
    assert sorted(path.name for path in colab.iterdir()) == ['MogaNet', 'sample_data']
    folder = colab / 'MogaNet'
    assert sorted(path.name for path in (folder / 'runs').iterdir()) == ['notebook']
    said = [''.join(output.get('text', '') for output in cell.outputs) for cell in notebook.cells
            if cell.cell_type == 'code']
    assert '25,335,675' in said[1]  # parameters of moganet_small
    best = [float(re.search(r'best acc1 ([\d.]+) %', said[number])[1]) for number in (2, 5)]
    assert best[0] > 90 and best[1] > 75  # 97.5 and 90.0 were seen; chance is 10 and 50
    assert said[3].count('-is-a-') == said[5].count('-is-a-') == 6 and 'even' in said[5]
    pictures = [output for cell in notebook.cells if cell.cell_type == 'code' for output in cell.outputs
                if 'image/png' in output.get('data', {})]
    assert len(pictures) == 2


def first_cell(folder: Path) -> subprocess.CompletedProcess:
    """Runs the first cell in a folder, its address replaced by a folder that is not there."""
    code = ''.join(code_cells()[0]['source']).replace(docs.address(), (folder / 'nothing').as_uri())
    return subprocess.run([sys.executable, '-c', f'{code}\nprint(os.getcwd(), sys.path[0])'], cwd=folder,
                          capture_output=True, text=True, timeout=60)


def test_in_the_repository_nothing_is_cloned(tmp_path: Path) -> None:
    (tmp_path / 'main.py').touch()
    done = first_cell(tmp_path)
    assert done.stdout == f'{tmp_path} {tmp_path}\n' and [path.name for path in tmp_path.iterdir()] == ['main.py']


def test_an_address_that_cannot_be_cloned_is_named_with_gits_reason(tmp_path: Path) -> None:
    """Where subprocesses write to the terminal of the kernel, nobody reads it."""
    done = first_cell(tmp_path)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert re.search(r"git clone --depth 1 file://\S+/nothing MogaNet: (?s:.)*does not (appear|exist)", done.stderr)
