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
from models.released import LOGS, RELEASED, RELEASED_DENSE
from tools import plot
from training import published
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


# ---- Published logs -------------------------------------------------------------------------------------------------

def timm_log(path: Path) -> list[float]:
    """timm's summary.csv of three epochs. Returns its top-1 accuracies."""
    rows = [(0, 6.9, 6.5, 1.25, 4.0, 2e-4), (1, 6.2, 5.5, 9.5, 24.0, 4e-4), (2, 5.8, 5.0, 20.125, 41.0, 6e-4)]
    path.write_text('epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n' + ''.join(
        ','.join(map(str, row)) + '\n' for row in rows))
    return [row[3] for row in rows]


def mmcv_log(path: Path, tests: dict[int, dict[str, float]], *, by_epoch: bool, iterations: int = 200) -> None:
    """A .log.json as mmcv's programs write it: training every 50 iterations; `iter` of a test counts its batches."""
    lines = [{'env_info': 'Python: 3.8', 'config': 'model = dict()', 'seed': 0}]
    for number, values in tests.items():
        for i in range(50, iterations + 1, 50):
            lines.append({'mode': 'train', 'epoch': number if by_epoch else 1 + (number - 1) // 2,
                          'iter': i if by_epoch else (number - 1) * iterations + i, 'lr': 1e-4 * number, 'memory': 9,
                          'data_time': 0.1, 'loss': 7.0 - number + i / 1000, 'time': 0.5})
        lines.append({'mode': 'val', 'epoch': lines[-1]['epoch'], 'iter': 13, 'lr': 1e-4 * number, **values})
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines) + '{"mode": "train", "ep')


def test_timms_summary_is_drawn_grey_under_the_average_and_the_difference_printed(trained, tmp_path, capsys):
    theirs = timm_log(tmp_path / 'summary.csv')
    plot.main([str(trained), '--published', str(tmp_path / 'summary.csv'), '--output', str(tmp_path / 'x')])
    log = [json.loads(line) for line in (trained / 'log.txt').read_text().splitlines()]
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith('top-1, %, of the moving average, against')  # timm tests its average
    ours = [entry['test_acc1_ema'] for entry in log]
    assert [line.split() for line in said[2:4]] == [
        [str(i + 1), f'{ours[i]:.2f}', f'{theirs[i]:.2f}', f'{ours[i] - theirs[i]:+.2f}'] for i in (0, 1)]
    cells = re.findall(r'<t[dh]>(.*?)</t[dh]>', (tmp_path / 'x.html').read_text().partition(' against ')[2])
    assert cells[:5] == ['at', 'ours', 'published', 'difference', '1'] and len(cells) == 12
    run = plot.read_run(trained)
    beside = plot.as_run(published.read(str(tmp_path / 'summary.csv')), run)
    axes = plot.draw([run], ['run'], beside).axes
    own, average, grey = (line for line in axes[2].lines if len(line.get_xdata()))
    assert (grey.get_xdata().tolist(), grey.get_ydata().tolist()) == ([1, 2, 3], theirs)
    assert grey.get_color() == '0.6' and grey.get_zorder() < min(own.get_zorder(), average.get_zorder())
    assert axes[0].lines[-1].get_ydata().tolist() == [6.9, 6.2, 5.8] and axes[2].get_xlim()[1] < 3
    raw = dataclasses.replace(run, entries=[{key: value for key, value in entry.items() if not key.endswith('_ema')}
                                            for entry in run.entries])
    assert plot.against(raw, plot.as_run(published.read(str(tmp_path / 'summary.csv')), raw))[0] == 'test_acc1'


@pytest.mark.parametrize('top1', ['head0_top1', 'acc_head0_top1', 'accuracy_top-1'])
def test_openmixups_log_is_read(top1, trained, tmp_path):
    mmcv_log(tmp_path / 'x.log.json', {1: {top1: 3.5, 'head0_top5': 9.0}, 2: {top1: 12.25}}, by_epoch=True)
    log = published.read(str(tmp_path / 'x.log.json'))
    assert log.by_epoch and log.averaged
    # the loss is the mean over an epoch's lines
    assert log.entries == [
        {'epoch': 0, 'test_acc1': 3.5, 'test_acc5': 9.0, 'train_loss': pytest.approx(6.125), 'lr': 1e-4},
        {'epoch': 1, 'test_acc1': 12.25, 'train_loss': pytest.approx(5.125), 'lr': 2e-4}]
    run = plot.read_run(trained)
    column, rows = plot.against(run, plot.as_run(log, run))
    assert column == 'test_acc1_ema' and [row[0] for row in rows] == [1, 2] and rows[1][2] == 12.25


def test_logs_of_detection_count_epochs_and_those_of_segmentation_updates(tmp_path, trained):
    mmcv_log(tmp_path / 'det', {i: {'bbox_mAP': 0.1 * i, 'bbox_mAP_50': 0.5, 'bbox_mAP_copypaste': '0.1 0.5'}
                                for i in (1, 2, 3)}, by_epoch=True)
    log = published.read(str(tmp_path / 'det'))
    assert log.by_epoch and not log.averaged
    assert [(entry['epoch'], entry['test_box_ap']) for entry in log.entries] == [
        (i - 1, pytest.approx(10 * i)) for i in (1, 2, 3)]  # hundredths, as ours
    mmcv_log(tmp_path / 'seg', {i: {'aAcc': 0.7, 'mIoU': 0.08 * i, 'mAcc': 0.5} for i in (1, 2, 3, 4)}, by_epoch=False)
    log = published.read(str(tmp_path / 'seg'))
    assert not log.by_epoch and [(entry['step'], entry['test_miou']) for entry in log.entries] == [
        (200 * i, pytest.approx(8 * i)) for i in (1, 2, 3, 4)]
    run = plot.read_run(trained)  # its own metric would be miou; the axis is what counts here
    ours = dataclasses.replace(run, recipe=run.recipe | {'epochs': None, 'updates': 800}, entries=[
        {'epoch': 0, 'step': step, 'test_acc1': float(step)} for step in (200, 400, 500)])
    beside = plot.as_run(dataclasses.replace(log, entries=[entry | {'test_acc1': entry['test_miou']}
                                                           for entry in log.entries]), ours)
    assert plot.against(ours, beside)[1] == [(200, 200.0, pytest.approx(8)), (400, 400.0, pytest.approx(16))]
    assert '    200  200.00       8.00     +192.00' in plot.show_differences(ours, beside)
    with pytest.raises(UserError, match='no common axis'):
        plot.as_run(published.read(str(tmp_path / 'det')), ours)


def test_a_run_of_ours_is_a_published_log_too(pair, capsys):
    plot.main([str(pair[0]), '--published', str(pair[1])])
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[2:4]] == ['+0.00', '+0.00']


@pytest.mark.parametrize('content', ['', '<html></html>', 'epoch,train_loss\n0,1.5\n', '{"epoch": 1}\n', '\0\0',
                                     '{"mode": "train", "epoch": 1, "iter": 50, "loss": 1.0}\n',
                                     '{"mode": "val", "epoch": NaN, "bbox_mAP": 0.3}\n', 'epoch,eval_top1\ninf,3\n',
                                     f'epoch,eval_top1\n0,"{200_000 * " "}',
                                     '{"epoch": 0, "step": 1, "test_acc1": "x"}'])
def test_what_is_no_log_is_one_line(content, trained, tmp_path):
    (tmp_path / 'log').write_text(content)
    with pytest.raises(UserError, match='is no log with tests that is known'):
        plot.main([str(trained), '--published', str(tmp_path / 'log'), '--output', str(tmp_path / 'x')])


def test_released_logs_have_addresses_beside_their_files(cache, trained, tmp_path, capsys):
    for name, url in LOGS.items():
        assert url == (RELEASED | RELEASED_DENSE)[name].url.removesuffix('.pth') + '.log.json'
    assert {'moganet_small_openmixup', 'retinanet_moganet_tiny_1x'} <= LOGS.keys()
    mmcv_log(cache / LOGS['moganet_xtiny_openmixup'].rsplit('/', 1)[1], {1: {'head0_top1': 3.5}}, by_epoch=True)
    plot.main([str(trained), '--published', 'released:moganet_xtiny_openmixup', '--output', str(tmp_path / 'x')])
    assert capsys.readouterr().out.splitlines()[2].split()[2] == '3.50'
    with pytest.raises(UserError, match='did you mean moganet_xtiny_openmixup'):
        published.read('released:moganet_xtiny_openmixpu')
    with pytest.raises(UserError, match='cannot be read'):
        published.read(str(tmp_path / 'nowhere.csv'))
