"""What rank 0 writes about a run, its recipe, starts and log, and shows: terminal, TensorBoard, Weights & Biases."""
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from recipes import Recipe, Run
from utils import Processes, UserError, going_on_without, log, reason_of, write_atomically, write_json


def environment() -> dict[str, Any]:
    """What a run was started with: command, versions, host, and the git revision of this repository."""
    def git(*words: str) -> str | None:
        try:
            return subprocess.run(['git', *words], cwd=Path(__file__).parent, capture_output=True, text=True,
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


def read_json(path: Path, fits: Callable[[Any], bool]) -> Any:
    """The value in a file of ours, or None where there is none. A damaged one is moved aside, and the log says so.

    Args:
        fits: whether a value is what the file should hold.
    """
    try:
        value = json.loads(path.read_text())
        if fits(value):
            return value
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):  # a folder, another encoding, no JSON
        pass
    set_aside(path)
    return None


def set_aside(path: Path) -> None:
    """Moves a damaged file out of the way, under a name that is free, and says so."""
    names = (path.with_name(f'{path.name}.damaged{number or ""}') for number in itertools.count())
    aside = next(name for name in names if not os.path.lexists(name))
    os.rename(path, aside)
    log.warning('%s is damaged: it is kept as %s, and begun anew.', path, aside.name)


class TensorBoard:
    """A run on TensorBoard, which hides what an earlier start, or an attempt that is rolled back, wrote beyond."""

    def __init__(self, folder: Path, *, step: int):
        """
        Args:
            step: updates done.
        """
        self._folder = folder
        self._open(step)

    def _open(self, step: int) -> None:
        self._writer = SummaryWriter(self._folder, purge_step=step + 1 if step else 0)

    def add(self, values: dict[str, float | Image.Image], step: int) -> None:
        """Writes the numbers and pictures of an update."""
        for name, value in values.items():
            if isinstance(value, Image.Image):
                self._writer.add_image(name, np.asarray(value), step, dataformats='HWC')
            else:
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def rewind(self, step: int) -> None:
        """Goes back to an earlier update."""
        self._writer.close()
        self._open(step)

    def close(self, *, complete: bool) -> None:
        """Ends the file."""
        self._writer.close()


class WeightsAndBiases:
    """A run on Weights & Biases: one for a run's folder, however often that is started and continued.

    Its charts want every update once, rising. wandb.json in the folder keeps the id and the last update sent; what is
    computed again after an interruption or a rollback is not sent again. The package itself writes every 15 s: what a
    kill takes from it is missing from the charts, and is in log.txt.
    """

    def __init__(self, folder: Path, *, project: str, config: dict[str, Any], step: int):
        """
        Args:
            config: the recipe and how it is run.
            step: updates done; with none, the folder begins a new run there too.
        """
        import wandb
        self._file = folder / 'wandb.json'
        self._sent = {'id': secrets.token_hex(4), 'step': -1}
        if step:
            self._sent = read_json(self._file, lambda sent: isinstance(sent, dict) and isinstance(sent.get('id'), str)
                                   and isinstance(sent.get('step'), int)) or self._sent
        # Console capture would take the terminal away from the progress bar; and without a limit, a run that was told
        # to stop would wait for a lost network until its scheduler kills it
        settings = wandb.Settings(console='off', finish_timeout=60)
        self._run = wandb.init(project=project, id=self._sent['id'], name=folder.name, dir=folder, resume='allow',
                               config=config, allow_val_change=True, settings=settings)
        write_json(self._file, self._sent)

    def add(self, values: dict[str, float | Image.Image], step: int) -> None:
        """Sends the numbers and pictures of an update, unless that was done before."""
        if step <= self._sent['step']:
            return
        import wandb
        self._run.log({name: wandb.Image(value) if isinstance(value, Image.Image) else value
                       for name, value in values.items()}, step=step, commit=True)
        self._sent['step'] = step
        write_json(self._file, self._sent)

    def rewind(self, step: int) -> None:
        """Nothing: the updates that follow are not sent again."""

    def upload(self, files: Iterable[Path]) -> None:
        """Adds files as an artifact of the run."""
        import wandb
        artifact = wandb.Artifact(f'checkpoints-{self._sent["id"]}', type='model')
        for file in files:
            artifact.add_file(str(file))
        self._run.log_artifact(artifact)
        if not self._run.offline:
            artifact.wait(timeout=3600)  # seconds; `close` leaves it only a minute

    def close(self, *, complete: bool) -> None:
        """Waits a minute for all to be sent; an incomplete run is marked as failed until it is continued."""
        self._run.finish(exit_code=0 if complete else 1)


class Notes:
    """What rank 0 writes about a run. On the other ranks nothing happens."""

    def __init__(self, recipe: Recipe, run: Run, processes: Processes, *, epochs_done: int, step: int):
        """Writes the recipe and this start into the run's folder, and opens its log and its charts.

        Args:
            epochs_done: epochs that the log may hold; later ones are about to be computed again.
            step: updates done.

        Raises:
            UserError: where the folder cannot be written, or --wandb cannot begin.
        """
        self._recipe, self._run, self._first, self._folder = recipe, run, processes.first, Path(run.output_dir)
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
            write_json(self._folder / 'recipe.json', dataclasses.asdict(recipe))
            path = self._folder / 'environment.json'
            starts = read_json(path, lambda starts: isinstance(starts, list)) or []
            write_json(path, [*starts, start])
            self._cut_log(epochs_done)
        except OSError as error:
            raise UserError(f'cannot write {error.filename or self._folder} ({error.strerror}); give another '
                            '--output_dir or --log_dir, or free space there') from None
        if run.wandb:
            self._begin_wandb({**dataclasses.asdict(recipe), **start}, step)

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

    def rewind(self, epochs_done: int, step: int) -> None:
        """Goes back to an earlier update: forgets later epochs in log.txt, and what the charts can forget."""
        if not self._first:
            return
        self._end_bar()
        self._with_charts(lambda chart: chart.rewind(step))
        with going_on_without('log.txt'):
            self._cut_log(epochs_done)

    def _end_bar(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            with going_on_without('The progress bar'):
                bar.close()

    def _cut_log(self, epochs_done: int) -> None:
        """Keeps of log.txt the first epochs."""
        path = self._folder / 'log.txt'
        if not path.exists():
            return
        kept, damaged = [], False
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                if json.loads(line)['epoch'] < epochs_done:
                    kept.append(line.rstrip(b'\r\n') + b'\n')
            except (ValueError, LookupError, TypeError, RecursionError):
                damaged = damaged or line.endswith(b'\n')  # else a kill has cut it off
        if damaged:
            set_aside(path)
        write_atomically(path, lambda file: file.write(b''.join(kept)))

    def images(self, images: torch.Tensor) -> None:
        """Shows what the network sees first, normalised images [B, 3, H, W]: crops, augmentation, erasing, mixing."""
        if self._first:
            with going_on_without('The picture of the first images'):
                picture = draw_images(images, self._recipe)
                self._with_charts(lambda chart: chart.add({'train/images': picture}, 0))

    def progress(self, progress: Any, *, epoch: int) -> None:
        """Shows an `engine.Progress`: a bar on a terminal, a line elsewhere."""
        if not self._first:
            return
        step = epoch * progress.updates + progress.update
        names = ('loss', 'lr', 'images_per_second', 'data_wait')
        figures = {f'train/{name}': getattr(progress, name) for name in names}
        # Weights & Biases takes an update once, and the epoch's own figures come with its last
        charts = ('TensorBoard',) if progress.update == progress.updates else ()
        self._with_charts(lambda chart: chart.add(figures, step), *charts)
        left = (self._recipe.epochs * progress.updates - step) * progress.seconds_per_update
        text = (f'loss {progress.loss:.4f}  lr {progress.lr:.2e}  {progress.images_per_second:.0f} images/s  '
                f'{duration(left)} left' + (f'  {progress.skipped:.0f} updates skipped' if progress.skipped else ''))
        if not sys.stdout.isatty():
            log.info('epoch %d  update %d/%d  %s', epoch + 1, progress.update, progress.updates, text)
            return
        with going_on_without('The progress bar'):
            if self._bar is None:
                from tqdm import tqdm
                self._bar = tqdm(total=progress.updates, desc=f'epoch {epoch + 1}', leave=False, dynamic_ncols=True,
                                 bar_format='{desc} {percentage:3.0f}% |{bar}| {postfix}')
            self._bar.n = progress.update
            self._bar.set_postfix_str(text)  # draws it, however short the time since the last
        if progress.update == progress.updates:
            self._end_bar()

    def epoch(self, entry: dict[str, Any], confusion: dict[str, list[list[int]]], classes: list[str]) -> None:
        """Appends an epoch to log.txt, flushed to disk: it must be there before the checkpoint that counts it.

        Args:
            confusion: confusion matrices by the name that they are shown under.
            classes: their names.
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
        pictures = {}
        with going_on_without('The picture of the confusion matrix'):
            pictures = {name: draw_confusion(matrix, classes) for name, matrix in confusion.items()}
        self._with_charts(lambda chart: chart.add(figures | pictures, entry['step']))
        tested = ''
        if 'test_acc1' in entry:
            tested = f', top-1 {entry["test_acc1"]:.2f} %'
        if 'test_acc1_ema' in entry:
            tested += f' (average {entry["test_acc1_ema"]:.2f} %)'
        log.info('epoch %d of %d done: train loss %.4f%s, %.0f images/s, %.0f %% of the time waiting for data',
                 entry['epoch'] + 1, self._recipe.epochs, entry['train_loss'], tested, entry['images_per_second'],
                 100 * entry['data_wait'])
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


# ---- Pictures -------------------------------------------------------------------------------------------------------

def draw_images(images: torch.Tensor, recipe: Recipe) -> Image.Image:
    """The first 32 of a batch of normalised images [B, 3, H, W], eight in a row."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (recipe.mean, recipe.std))
    return to_pil_image(make_grid((images[:32].cpu() * std + mean).clamp(0, 1), nrow=8))


def draw_confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> Image.Image:
    """A confusion matrix, rows for the true classes: blue what is right, orange what is wrong, deeper for more.

    Args:
        matrix: counts, [true][predicted].
        classes: their names; may be empty.
    """
    counts = np.array(matrix)
    size = len(counts)
    cell, font = (40, ImageFont.load_default(14)) if size <= 20 else (12, ImageFont.load_default(10))
    share = counts / counts.sum(1, keepdims=True).clip(1)
    depth = np.sqrt(share)[..., None]  # a mistake in a hundred is to be seen
    colour = np.where(np.eye(size, dtype=bool)[..., None], (0, 114, 178), (213, 94, 0))
    pixels = (255 - depth * (255 - colour)).astype(np.uint8)
    cells = Image.fromarray(pixels.repeat(cell, 0).repeat(cell, 1))
    if size <= 20:
        draw = ImageDraw.Draw(cells)
        for row, column in zip(*counts.nonzero(), strict=True):
            draw.text(((column + 0.5) * cell, (row + 0.5) * cell), str(counts[row, column]), font=font, anchor='mm',
                      fill='white' if depth[row, column, 0] > 0.7 else 'black')
    names = [name[:20] for name in classes] or [str(label) for label in range(size)]
    width = 10 + max(int(font.getlength(name)) for name in names)
    labels = Image.new('RGB', (width, size * cell), 'white')
    for row, name in enumerate(names):
        ImageDraw.Draw(labels).text((width - 5, (row + 0.5) * cell), name, font=font, anchor='rm', fill='black')
    head, caption, large = 24, 'rows: true class; columns: predicted', ImageFont.load_default(13)
    whole = max(width + size * cell, 10 + int(large.getlength(caption)))
    picture = Image.new('RGB', (whole, head + size * cell + width), 'white')
    ImageDraw.Draw(picture).text((5, head / 2), caption, anchor='lm', fill='black', font=large)
    picture.paste(labels, (0, head))
    picture.paste(cells, (width, head))
    picture.paste(labels.rotate(90, expand=True), (width, head + size * cell))
    return picture
