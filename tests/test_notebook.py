"""`demo.ipynb`: its cells parse, its flags are real, it is stored without outputs, and it runs from top to bottom."""
import ast
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import recipes
from conftest import ROOT

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


def test_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than 20 s, and not marked slow: a page that is not run at every change soon says what is not so."""
    nbclient, nbformat = pytest.importorskip('nbclient'), pytest.importorskip('nbformat')
    monkeypatch.delenv('PYTHONPATH', raising=False)  # the notebook finds the repository by itself
    monkeypatch.setenv('OMP_NUM_THREADS', '1')  # beside other tests, threads that wait for one another take minutes
    folder = tmp_path / 'repository'
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns('.*', 'runs', 'data', 'tests'))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={'metadata': {'path': str(folder)}}).execute()
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
