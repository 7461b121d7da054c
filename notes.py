"""What rank 0 writes about a run: recipe.json, environment.json, log.txt, TensorBoard, the terminal."""
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from utils import log, write_atomically, write_json


def environment() -> dict[str, Any]:
    """What a run was started with: command, versions, host, and the git revision of this repository."""
    import importlib.metadata
    import platform

    import torch

    def git(*words: str) -> str | None:
        try:
            return subprocess.run(['git', *words], cwd=Path(__file__).parent, capture_output=True, text=True,
                                  timeout=10, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    versions = {name: importlib.metadata.version(name) for name in ('torch', 'torchvision', 'timm', 'numpy', 'pillow')}
    return {'command': sys.argv, 'time': time.strftime('%Y-%m-%dT%H:%M:%S%z'), 'host': platform.node(),
            'python': platform.python_version(), **versions, 'cuda': torch.version.cuda,
            'git': git('rev-parse', 'HEAD'), 'git_dirty': bool(git('status', '--porcelain'))}


class Notes:
    """What rank 0 writes about a run: recipe.json, environment.json, log.txt, TensorBoard, the terminal."""

    def __init__(self, run: Any, *, first: bool, epochs_done: int, step: int):
        """
        Args:
            run: `recipes.Run`.
            first: whether this is rank 0; other ranks write nothing.
            epochs_done: epochs that the log may hold; later ones are about to be computed again.
            step: updates done; TensorBoard hides what an earlier start wrote beyond.
        """
        self._first, self._folder = first, Path(run.output_dir)
        self._bar: Any = None
        self._board: Any = None
        if not first:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._board_folder = run.log_dir or self._folder / 'tensorboard'
        self._unwritten = ''  # lines of log.txt for which the disk had no room
        self.rewind(epochs_done, step)

    def begin(self, recipe: dict[str, Any], environment: dict[str, Any]) -> None:
        """Writes the resolved recipe, and adds this start to the list of environments."""
        if self._first:
            write_json(self._folder / 'recipe.json', recipe)
            path = self._folder / 'environment.json'
            write_json(path, [*(json.loads(path.read_text()) if path.exists() else []), environment])

    def rewind(self, epochs_done: int, step: int) -> None:
        """Keeps of log.txt the first `epochs_done` epochs, and of TensorBoard the updates up to `step`."""
        path = self._folder / 'log.txt'
        if not self._first:
            return
        from torch.utils.tensorboard import SummaryWriter
        if self._board is not None:
            self._board.close()
        self._board = SummaryWriter(self._board_folder, purge_step=step + 1)
        if not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # a line that a kill cut off
                if json.loads(line)['epoch'] < epochs_done:
                    kept.append(line + '\n')
        write_atomically(path, lambda file: file.write(''.join(kept).encode()))

    def progress(self, progress: Any, *, epoch: int, epochs: int) -> None:
        """Shows an `engine.Progress`: a bar on a terminal, a line elsewhere."""
        if not self._first:
            return
        step = epoch * progress.updates + progress.update
        for name in ('loss', 'lr', 'images_per_second', 'data_wait'):
            self._board.add_scalar(f'train/{name}', getattr(progress, name), step)
        left = (epochs * progress.updates - step) * progress.seconds_per_update
        text = (f'loss {progress.loss:.4f}  lr {progress.lr:.2e}  {progress.images_per_second:.0f} images/s  '
                f'{duration(left)} left' + (f'  {progress.skipped:.0f} updates skipped' if progress.skipped else ''))
        if not sys.stdout.isatty():
            log.info('epoch %d  update %d/%d  %s', epoch, progress.update, progress.updates, text)
            return
        if self._bar is None:
            from tqdm import tqdm
            self._bar = tqdm(total=progress.updates, desc=f'epoch {epoch}', leave=False, dynamic_ncols=True,
                             bar_format='{desc} {percentage:3.0f}% |{bar}| {postfix}')
        self._bar.n = progress.update
        self._bar.set_postfix_str(text)  # draws it, however short the time since the last
        if progress.update == progress.updates:
            self._bar.close()
            self._bar = None

    def epoch(self, entry: dict[str, Any], *, epochs: int) -> None:
        """Appends an epoch to log.txt, flushed to disk: it must be there before the checkpoint that counts it."""
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
        for name, value in entry.items():
            if name.startswith('test_'):
                self._board.add_scalar(name.replace('_', '/', 1), value, entry['step'])
        with contextlib.suppress(OSError):  # a full disk, of which log.txt has told
            self._board.flush()
        tested = ''
        if 'test_acc1' in entry:
            tested = f', top-1 {entry["test_acc1"]:.2f} %'
        if 'test_acc1_ema' in entry:
            tested += f' (average {entry["test_acc1_ema"]:.2f} %)'
        log.info('epoch %d of %d done: train loss %.4f%s, %.0f images/s', entry['epoch'] + 1, epochs,
                 entry['train_loss'], tested, entry['images_per_second'])
        if entry['bad_images']:
            log.warning('%d unreadable images were replaced in this epoch; tools/check_dataset.py names them.',
                        entry['bad_images'])
        if entry['data_wait'] > 0.1:
            log.info('%.0f %% of the time went into waiting for data: raise --num_workers, up to the cores this '
                     'process has', 100 * entry['data_wait'])

    def close(self) -> None:
        """Closes what is open."""
        if self._first:
            self._board.close()
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """Seconds as 3d 04h, 4h 05m, 5m 06s."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f'{days}d {hour:02d}h'
    return f'{hour}h {minute:02d}m' if hours else f'{minute}m {second:02d}s'
