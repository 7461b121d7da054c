"""Logs that others published, as the entries of our log.txt.

timm's summary.csv, the .log.json of mmcv's programs (OpenMixup, mmdetection, mmsegmentation), or a run of ours.
"""
import contextlib
import csv
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils import UserError, expand

# Their columns and ours. The `eval_` of timm's script are those of the average, where it keeps one; so are OpenMixup's
TIMM = {'train_loss': 'train_loss', 'eval_loss': 'test_loss', 'eval_top1': 'test_acc1', 'eval_top5': 'test_acc5',
        'lr': 'lr'}
MMCV = {r'(.*_)?top-?1': 'test_acc1', r'(.*_)?top-?5': 'test_acc5', 'bbox_mAP': 'test_box_ap',
        'segm_mAP': 'test_mask_ap', 'mIoU': 'test_miou', 'mAcc': 'test_macc', 'aAcc': 'test_pixel_acc'}
SHARES = ('bbox_mAP', 'segm_mAP', 'mIoU', 'mAcc', 'aAcc')  # of 1, where ours are hundredths


@dataclass
class Published:
    """A published log.

    Attributes:
        name: for people.
        entries: as in log.txt, in their order; of a log by epochs there is no 'step'.
        by_epoch: whether it counts epochs, and not updates.
        averaged: whether its tests are of the moving average, where there is one.
    """

    name: str
    entries: list[dict[str, Any]] = field(default_factory=list)
    by_epoch: bool = True
    averaged: bool = False


def read(source: str) -> Published:
    """A published log.

    Args:
        source: a file, an address, `released:NAME`, or the folder of a run.

    Raises:
        UserError: where it is none of the known logs.
    """
    path = find(source)
    try:
        text = path.read_text(encoding='utf-8-sig', errors='replace')
    except OSError as error:
        raise UserError(f'--published {source} cannot be read ({error.strerror}); give a log') from None
    lines = list(_json_lines(text))
    if any('mode' in line for line in lines):
        found = _of_mmcv(source, lines)
    elif any({'epoch', 'step'} <= line.keys() for line in lines):
        numbers = [{key: value for key, value in line.items() if isinstance(value, (int, float))} for line in lines]
        entries = [line for line in numbers if {'epoch', 'step'} <= line.keys()]
        found = Published(source, entries, by_epoch=len({entry['epoch'] for entry in entries}) == len(entries))
    else:
        found = _of_timm(source, text)
    if not any(key.startswith('test_') for entry in found.entries for key in entry):
        raise UserError(f"--published {source} is no log with tests that is known: give timm's summary.csv, a "
                        '.log.json of OpenMixup, mmdetection or mmsegmentation, or a run of ours')
    return found


def find(source: str) -> Path:
    """The file of a log, downloaded where it is an address. Raises UserError."""
    if source.startswith('released:'):
        from models.released import LOGS
        from utils import nearest
        name = source.removeprefix('released:')
        if name not in LOGS:
            raise UserError(f'--published {source}: no log is known by that name{nearest(name, LOGS)}; known are '
                            f'{", ".join(LOGS)}')
        source = LOGS[name]
    if re.match('https?://', source):
        from models.download import download  # with torch, which a file does not need
        return download(source)
    path = Path(expand(source))
    return path / 'log.txt' if path.is_dir() else path


def _json_lines(text: str) -> Iterator[dict[str, Any]]:
    """The objects of a file with one a line, but for a half-written one."""
    for line in text.splitlines():
        if line.startswith('{'):
            try:
                yield json.loads(line)
            except ValueError:
                continue


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _count(value: Any) -> int | None:
    """A number of an epoch or an update."""
    number = _number(value)
    return int(number) if number is not None and math.isfinite(number) else None


def _of_timm(source: str, text: str) -> Published:
    """timm's summary.csv: an epoch a row, from 0."""
    entries = []
    with contextlib.suppress(csv.Error):  # of a file that is no table
        for row in csv.DictReader(text.replace('\0', '').splitlines()):
            values = {ours: value for theirs, ours in TIMM.items() if (value := _number(row.get(theirs))) is not None}
            if (epoch := _count(row.get('epoch'))) is not None and values:
                entries.append({'epoch': epoch, **values})
    return Published(source, entries, averaged=True)


def _of_mmcv(source: str, lines: Iterable[dict[str, Any]]) -> Published:
    """A .log.json of mmcv's: lines of training with the loss, and a line a test, whose own `iter` counts test batches.

    The `iter` of training begins anew in each epoch where the run counts epochs, and else goes on.
    """
    lines = [line | {'epoch': epoch, 'iter': _count(line.get('iter'))} for line in lines
             if (epoch := _count(line.get('epoch'))) is not None]
    training = [line for line in lines if line.get('mode') == 'train' and line['iter'] is not None]
    restarts = any(later['iter'] <= line['iter'] and later['epoch'] > line['epoch']
                   for line, later in itertools.pairwise(training))
    by_epoch = restarts or len({line['epoch'] for line in training}) < 2
    entries: dict[int, dict[str, Any]] = {}
    losses: list[float] = []
    lr, step, epoch = None, 0, 0
    for line in lines:
        if line.get('mode') == 'train':
            rate = line['lr'][0] if isinstance(line.get('lr'), list) and line['lr'] else line.get('lr')
            if by_epoch and line['epoch'] != epoch:  # an epoch's own losses
                losses = []
            lr, step, epoch = _number(rate), line['iter'] or 0, line['epoch']
            losses += [loss] if (loss := _number(line.get('loss'))) is not None else []
        else:
            tests = {ours: value * (100 if theirs in SHARES else 1) for theirs, ours in MMCV.items()
                     for key in line if re.fullmatch(theirs, key) and (value := _number(line[key])) is not None}
            place = {'epoch': line['epoch'] - 1} | ({} if by_epoch else {'step': step})
            shown = {'train_loss': sum(losses) / len(losses)} if losses else {}
            if tests:  # one that a resumed run repeats counts once
                entries[place.get('step', place['epoch'])] = place | tests | shown | ({} if lr is None else {'lr': lr})
            losses = []
    averaged = any(name.startswith('test_acc') for entry in entries.values() for name in entry)
    return Published(source, [entries[key] for key in sorted(entries)], by_epoch=by_epoch, averaged=averaged)
