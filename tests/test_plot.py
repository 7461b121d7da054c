"""tools/plot.py draws what the logs say, of runs that are finished, under way, or barely begun."""
import base64
import dataclasses
import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import main
import runs
from builders import make_image_folder
from tools import plot
from utils import UserError


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Path:
    """A run of two epochs with a moving average, as `main.py` leaves it."""
    folder = tmp_path_factory.mktemp('plot') / 'first'
    data = make_image_folder(folder.parent / 'data')
    assert main.main([*runs.TINY, '--data_path', str(data), '--epochs', '2', '--warmup_epochs', '0', '--device', 'cpu',
                      '--total_batch_size', '16', '--batch_size', '16', '--num_workers', '0', '--output_dir',
                      str(folder)]) == 0
    return folder


@pytest.fixture
def pair(trained, tmp_path) -> tuple[Path, Path]:
    """That run, and one of the same log under another learning rate of which the third epoch is being written."""
    first, second = tmp_path / 'one' / 'run', tmp_path / 'two' / 'run'
    shutil.copytree(trained, first)
    shutil.copytree(trained, second)
    recipe = json.loads((second / 'recipe.json').read_text())
    (second / 'recipe.json').write_text(json.dumps(recipe | {'lr': 5e-4, 'epochs': 5}))
    with open(second / 'log.txt', 'a') as file:
        file.write('{"epoch": 2, "train_lo')
    return first, second


def test_curves_are_the_columns_of_the_log(trained):
    run = plot.read_run(trained)
    log = [json.loads(line) for line in (trained / 'log.txt').read_text().splitlines()]
    loss, test_loss, top1, lr, wait, rate = plot.draw([run], ['first']).axes
    for axes, columns, factor in ((loss, ['train_loss'], 1), (test_loss, ['test_loss', 'test_loss_ema'], 1),
                                  (top1, ['test_acc1', 'test_acc1_ema'], 1), (lr, ['lr'], 1),
                                  (wait, ['data_wait'], 100), (rate, ['images_per_second'], 1)):
        for line, column in zip(axes.lines, columns, strict=True):
            assert line.get_xdata().tolist() == [1, 2]
            assert line.get_ydata() == pytest.approx([factor * entry[column] for entry in log], rel=1e-12)
            assert (line.get_linestyle() == '--') == column.endswith('_ema')


def test_page_holds_the_picture_and_says_what_differs(pair, capsys):
    plot.main([*map(str, pair)])
    picture, page = pair[0] / 'curves.png', (pair[0] / 'curves.html').read_text()
    assert capsys.readouterr().out.splitlines() == [str(picture), str(pair[0] / 'curves.html')]
    embedded = base64.b64decode(re.search(r'data:image/png;base64,([^"]+)', page)[1])
    assert embedded == picture.read_bytes()
    assert np.asarray(Image.open(io.BytesIO(embedded)).convert('RGB')).std() > 10  # something is drawn
    assert '<script' not in page and 'http' not in page and '<link' not in page
    cells = [re.findall(r'<t[dh]>(.*?)</t[dh]>', row) for row in page.split('<tr>')[1:]]
    assert cells[3:] == [['field', 'one/run', 'two/run'], ['<code>epochs</code>', '2', '5'],
                         ['<code>lr</code>', '0.001', '0.0005']]
    log = [json.loads(line) for line in (pair[0] / 'log.txt').read_text().splitlines()]
    assert cells[1][1:3] == ['moganet_xtiny', 'finished, 2 epochs'] and cells[2][2] == '2 of 5 epochs'
    assert cells[1][3].startswith(f'{max(entry["test_acc1"] for entry in log):.2f} (epoch ')
    assert cells[1][4] == f'{log[-1]["test_acc1"]:.2f}' and cells[1][6] == f'{log[-1]["test_acc1_ema"]:.2f}'
    assert cells[1][7] == str(pair[0])


def test_columns_that_an_old_log_lacks_stay_empty(pair):
    lines = (pair[1] / 'log.txt').read_text().splitlines()[:2]
    kept = [{name: value for name, value in json.loads(line).items() if not name.startswith(('test_', 'data_'))}
            for line in lines]
    (pair[1] / 'log.txt').write_text(''.join(json.dumps(entry) + '\n' for entry in kept))
    old = plot.read_run(pair[1])
    axes = plot.draw([old], ['old']).axes
    assert [bool(one.texts) for one in axes] == [False, True, True, False, True, False]
    assert old.accuracies('test_acc1') == ('-', '-')
    both = plot.draw([plot.read_run(pair[0]), old], ['new', 'old']).axes
    assert not any(one.texts for one in both)


def test_run_without_an_epoch_is_said_in_a_line(pair, tmp_path, capsys):
    (pair[0] / 'log.txt').unlink()
    (pair[1] / 'log.txt').write_text('{"epoch": 0, "tr')
    with pytest.raises(UserError, match='before the first epoch'):
        plot.main([*map(str, pair)])
    shutil.copy(pair[0] / 'recipe.json', tmp_path)
    capsys.readouterr()
    (pair[1] / 'log.txt').write_text('{"epoch": 0, "train_loss": NaN}\n')
    plot.main([*map(str, pair), '--output', str(tmp_path / 'here' / 'both')])
    assert 'one/run: no epoch in log.txt yet' in capsys.readouterr().out
    assert '0 of 2 epochs' in (tmp_path / 'here' / 'both.html').read_text()


def test_a_foreign_file_stays_and_an_own_one_is_drawn_anew(trained, tmp_path):
    stem = tmp_path / 'figure'
    for _ in range(2):
        plot.main([str(trained), '--output', str(stem)])
    foreign = tmp_path / 'figure.html'
    foreign.write_text('<p>mine</p>')
    with pytest.raises(UserError, match='give another --output'):
        plot.main([str(trained), '--output', str(stem)])
    assert foreign.read_text() == '<p>mine</p>'


def test_what_cannot_be_is_refused_with_the_cure(trained, tmp_path, monkeypatch):
    with pytest.raises(UserError, match='--output_dir of a training'):
        plot.main([str(tmp_path)])
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.raises(UserError, match='pip install'):
        plot.main([str(trained), '--output', str(tmp_path / 'x')])


def test_a_log_of_several_entries_an_epoch_is_drawn_over_the_updates(trained):
    run = plot.read_run(trained)
    log = [{'epoch': 0, 'step': step, 'test_acc1': float(step)} for step in (5, 10, 12)]
    several = dataclasses.replace(run, entries=log)
    axes = plot.draw([several], ['several']).axes
    assert axes[2].lines[0].get_xdata().tolist() == [5, 10, 12] and axes[3].get_xlabel() == 'update'
    assert several.accuracies('test_acc1') == ('12.00 (update 12)', '12.00')
    assert plot.draw([run], ['run']).axes[3].get_xlabel() == 'epoch'


@pytest.mark.parametrize(('paths', 'names'), [
    (['/a/runs/small'], ['small']),
    (['/a/small', '/a/tiny'], ['small', 'tiny']),
    (['/a/lr=1/run', '/a/lr=2/run', '/a/other'], ['lr=1/run', 'lr=2/run', 'other']),
    (['/run', '/a/run'], ['/run', 'a/run']),
])  # fmt: skip
def test_names_are_the_shortest_that_tell_the_runs_apart(paths, names):
    assert plot.short_names([Path(path) for path in paths]) == names


def test_more_runs_than_colours_still_look_different(trained):
    run = plot.read_run(trained)
    lines = plot.draw([run] * 20, [str(i) for i in range(20)]).axes[0].lines
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 20


def test_long_curves_show_what_comes_after_the_first_fifth_of_the_shortest(trained):
    run = plot.read_run(trained)
    log = [{'epoch': epoch, 'test_acc1': float(epoch)} for epoch in range(100)]
    long, short = (dataclasses.replace(run, entries=log[:end]) for end in (100, 50))
    bottom, top = plot.draw([long, short], ['long', 'short']).axes[2].get_ylim()
    assert bottom == pytest.approx(10 - 0.05 * 89) and top == pytest.approx(99 + 0.05 * 89)
