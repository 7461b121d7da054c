"""What rank 0 writes about a run, its recipe, starts and log, and shows on the terminal and in charts."""
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from recipes import Recipe, Run, to_dict
from training.charts import TensorBoard, WeightsAndBiases
from utils import (
    Processes,
    UserError,
    going_on_without,
    log,
    read_json,
    reason_of,
    set_aside,
    write_atomically,
    write_json,
)


def environment() -> dict[str, Any]:
    """What a run was started with: command, versions, host, and the git revision of this repository."""
    def git(*words: str) -> str | None:
        try:
            return subprocess.run(['git', *words], cwd=Path(__file__).parent.parent, capture_output=True, text=True,
                                  timeout=10, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    def version(package: str) -> str | None:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # built from source, say
            return importlib.metadata.version(package)
        return None

    versions = {name: version(name) for name in ('torch', 'torchvision', 'timm', 'numpy', 'pillow')}
    return {'command': sys.argv, 'time': time.strftime('%Y-%m-%dT%H:%M:%S%z'), 'host': platform.node(),
            'python': platform.python_version(), **versions, 'cuda': torch.version.cuda,
            'git': git('rev-parse', 'HEAD'), 'git_dirty': bool(git('status', '--porcelain'))}


class Notes:
    """What rank 0 writes about a run. On the other ranks nothing happens."""

    def __init__(self, recipe: Recipe, run: Run, processes: Processes, *, step: int, total: int):
        """Writes the recipe and this start into the run's folder, and opens its log and its charts.

        Args:
            step: updates done; what the log holds beyond is about to be computed again.
            total: updates of the run.

        Raises:
            UserError: where the folder cannot be written, or --wandb cannot begin.
        """
        self._recipe, self._run, self._first, self._folder = recipe, run, processes.first, Path(run.output_dir)
        self._total = total
        self._bar: Any = None
        self._charts: dict[str, TensorBoard | WeightsAndBiases] = {}
        self._complete = False
        if not self._first:
            return
        self._unwritten = ''  # lines of log.txt for which the disk had no room
        start = {'run': dataclasses.asdict(run), 'device': str(processes.device), **environment()}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            board = Path(run.log_dir or self._folder / 'tensorboard')
            board.mkdir(parents=True, exist_ok=True)
            with going_on_without('TensorBoard'):
                self._charts['TensorBoard'] = TensorBoard(board, step=step)
            write_json(self._folder / 'recipe.json', to_dict(recipe))
            path = self._folder / 'environment.json'
            starts = read_json(path, lambda starts: isinstance(starts, list)) or []
            write_json(path, [*starts, start])
            self._cut_log(step)
        except OSError as error:
            raise UserError(f'cannot write {error.filename or self._folder} ({error.strerror}); give another '
                            '--output_dir or --log_dir, or free space there') from None
        if run.wandb:
            self._begin_wandb({**to_dict(recipe), **start}, step)

    def _begin_wandb(self, config: dict[str, Any], step: int) -> None:
        try:
            self._charts['--wandb'] = WeightsAndBiases(self._folder, project=self._run.project, config=config,
                                                       step=step)
        except Exception as error:  # its package raises many kinds
            reason = reason_of(error).rstrip('.')
            if not step:
                raise UserError(f'--wandb: {reason}; say `wandb login` or another --project, or set WANDB_MODE=offline '
                                'and send the run later by `wandb sync`') from None
            log.error('--wandb: %s; the run goes on without it.', reason)

    def _with_charts(self, use: Callable[[Any], None], *names: str) -> None:
        """Lets the charts (of these names, or all) do something. They are not worth a run: one that fails, on a full
        disk or a lost network, is told of and left out."""
        for name in names or list(self._charts):
            chart = self._charts.pop(name, None)
            if chart is not None:
                with going_on_without(name):
                    use(chart)
                    self._charts[name] = chart

    def rewind(self, step: int) -> None:
        """Goes back to an earlier update: forgets what log.txt holds beyond, and what the charts can forget."""
        if not self._first:
            return
        self._end_bar()
        self._with_charts(lambda chart: chart.rewind(step))
        with going_on_without('log.txt'):
            self._cut_log(step)

    def _end_bar(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            with going_on_without('The progress bar'):
                bar.close()

    def _cut_log(self, step: int) -> None:
        """Keeps of log.txt what was written up to an update."""
        path = self._folder / 'log.txt'
        if not path.exists():
            return
        kept, damaged = [], False
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                if json.loads(line)['step'] <= step:
                    kept.append(line.rstrip(b'\r\n') + b'\n')
            except (ValueError, LookupError, TypeError, RecursionError):
                damaged = damaged or line.endswith(b'\n')  # else a kill has cut it off
        if damaged:
            set_aside(path)
        write_atomically(path, lambda file: file.write(b''.join(kept)))

    def images(self, draw: Callable[[], Image.Image]) -> None:
        """Shows what the network sees first, as `draw` returns it."""
        if self._first:
            with going_on_without('The picture of the first images'):
                picture = draw()
                self._with_charts(lambda chart: chart.add({'train/images': picture}, 0))

    def progress(self, progress: Any, *, title: str, step: int) -> None:
        """Shows an `engine.Progress` after an update of the run: a bar on a terminal, a line elsewhere.

        Args:
            title: of the stretch of updates.
        """
        if not self._first:
            return
        names = ('loss', 'lr', 'images_per_second', 'data_wait')
        figures = {f'train/{name}': getattr(progress, name) for name in names}
        # Weights & Biases takes an update once, and the epoch's own figures come with its last
        charts = ('TensorBoard',) if progress.update == progress.updates else ()
        self._with_charts(lambda chart: chart.add(figures, step), *charts)
        left = (self._total - step) * progress.seconds_per_update
        text = (f'loss {progress.loss:.4f}  lr {progress.lr:.2e}  {progress.images_per_second:.0f} images/s  '
                f'{duration(left)} left' + (f'  {progress.skipped:.0f} updates skipped' if progress.skipped else ''))
        if not sys.stdout.isatty():
            log.info('%s  update %d/%d  %s', title, progress.update, progress.updates, text)
            return
        with going_on_without('The progress bar'):
            if self._bar is None:
                from tqdm import tqdm
                self._bar = tqdm(total=progress.updates, desc=title, leave=False, dynamic_ncols=True,
                                 bar_format='{desc} {percentage:3.0f}% |{bar}| {postfix}')
            self._bar.n = progress.update
            self._bar.set_postfix_str(text)  # draws it, however short the time since the last
        if progress.update == progress.updates:
            self._end_bar()

    def entry(self, entry: dict[str, Any], pictures: dict[str, Image.Image], *, title: str) -> None:
        """Appends an entry to log.txt, flushed to disk: it must be there before the checkpoint that counts it.

        Args:
            pictures: for the charts, by name.
            title: of what was done, as 'epoch 3 of 300'.
        """
        if not self._first:
            return
        self._unwritten += json.dumps(entry) + '\n'
        try:
            with open(self._folder / 'log.txt', 'a') as file:
                file.write(self._unwritten)
                file.flush()
                os.fsync(file.fileno())
            self._unwritten = ''
        except OSError as error:
            log.error('log.txt could not be written (%s): its line is kept for the next epoch; free space in %s.',
                      error, self._folder)
        figures = {name.replace('_', '/', 1) if name.startswith('test_') else f'epoch/{name}': value
                   for name, value in entry.items() if name not in ('epoch', 'step', 'n_parameters')}
        self._with_charts(lambda chart: chart.add(figures | pictures, entry['step']))
        best, (label, unit) = f'test_{self._recipe.best}', self._recipe.metrics[self._recipe.best]
        tested = f', {label} {entry[best]:.2f}{unit}' if best in entry else ''
        if f'{best}_ema' in entry:
            tested += f' (average {entry[f"{best}_ema"]:.2f}{unit})'
        log.info('%s done: train loss %.4f%s, %.0f images/s, %.0f %% of the time waiting for data', title,
                 entry['train_loss'], tested, entry['images_per_second'], 100 * entry['data_wait'])
        if entry['bad_images']:
            log.warning('%d unreadable images were replaced in this epoch; tools/check_dataset.py --decode names them.',
                        entry['bad_images'])
        if entry['data_wait'] > 0.1:
            missing = [name for name in ('numba', 'simplejpeg') if importlib.util.find_spec(name) is None]
            cure = (f'pip install {" ".join(missing)}, for a faster decoder' if missing else
                    'raise --num_workers up to the cores of this process, or give it more: tools/benchmark.py data '
                    'says how many it takes')
            log.info('Training waits for data: %s.', cure)

    def complete(self) -> None:
        """To be called when the run is complete and its last checkpoint written."""
        self._complete = True
        if self._run.wandb_ckpt:
            self._with_charts(lambda chart: chart.upload(sorted(self._folder.glob('checkpoint-best*.pth'))), '--wandb')

    def close(self) -> None:
        """Closes what is open."""
        self._end_bar()
        self._with_charts(lambda chart: chart.close(complete=self._complete))


def duration(seconds: float) -> str:
    """Seconds as 3d 04h, 4h 05m, 5m 06s."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f'{days}d {hour:02d}h'
    return f'{hour}h {minute:02d}m' if hours else f'{minute}m {second:02d}s'
