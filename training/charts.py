"""A run on TensorBoard and on Weights & Biases."""
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from utils import read_json, write_json


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
        self._sent: dict[str, Any] = {'id': secrets.token_hex(4), 'step': -1}
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
