"""What the page's checkpoints answer. It is predict.py's answer, by the same functions, within limits."""
import asyncio
import contextlib
import io
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

from models.released import RELEASED, RELEASED_DENSE
from pipeline.augmentation import BadImage, refusing_bad_images
from predict import Predictor
from recipes import RECIPES
from utils import UserError

Result = TypeVar('Result')

# Pillow also reads EPS, by starting another program, and formats of which no camera makes files
FORMATS = ('JPEG', 'MPO', 'PNG', 'WEBP', 'AVIF', 'GIF', 'BMP', 'TIFF', 'PPM')
# What a task of a recipe answers, as its endpoint is named
KINDS = {'tasks.classification:Classification': 'classify', 'tasks.detection:Detection': 'detect',
         'tasks.segmentation:Segmentation': 'segment'}


@dataclass(frozen=True)
class Limits:
    """What one request, and all together, may take of the machine."""

    file_size: int = 20 * 2**20  # bytes of a photograph: a 50-megapixel JPEG has 15 to 20 million
    pixels: int = 50_000_000  # 150 MB as RGB
    seconds: float = 60  # of computing for one request
    queue: int = 40  # requests that wait
    kept: float = 600  # seconds for which a photograph stays, so that another class or stage can be asked for
    room: int = 500 * 2**20  # bytes of all photographs that are kept


@dataclass(frozen=True)
class Seen:
    """What was made of a photograph on the way of predict.py."""

    photograph: bytes
    sample: Any  # as `Predictor.prepare` gives it: a classifier's is the crop, uint8 [H, W, 3]
    result: Any
    milliseconds: float


class Refused(Exception):
    """A request that is not answered. Its text is one line for whoever asked."""


class TimeUp(Exception):
    """A request has computed for as long as it may."""


class Models:
    """Checkpoints, of which one at a time is in memory. One thread computes, whatever the number of requests.

    Attributes:
        sources: all that may be asked.
        exif: whether photographs are turned unless a request says otherwise.
    """

    def __init__(self, sources: Sequence[str], *, limits: Limits, exif: bool = False, **others: Any):
        """
        Args:
            sources: paths, https URLs or `released:NAME`.
            others: as of `Predictor`: device, weights, settings.
        """
        self.sources, self.exif, self.limits = tuple(dict.fromkeys(sources)), exif, limits
        self._others, self._kinds = others, {}
        self._kept: tuple[str, Predictor] | None = None
        self._thread = ThreadPoolExecutor(1, 'model')

    def load(self, source: str) -> Predictor:
        """The predictor of a source; the one before is given up first. Raises UserError."""
        if self._kept is None or self._kept[0] != source:
            self._kept = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            predictor = Predictor(source, **self._others)
            self._kept, self._kinds[source] = (source, predictor), KINDS[predictor.recipe.task]
        return self._kept[1]

    def kind(self, source: str) -> str:
        """What a source answers: 'classify', 'detect' or 'segment'. Raises UserError.

        A released file is not downloaded before somebody asks for it: its table says it.
        """
        if source not in self._kinds:
            name = source.removeprefix('released:')
            if name != source and name in RELEASED | RELEASED_DENSE:
                return KINDS[RECIPES[name].task if name in RELEASED_DENSE else RECIPES['default'].task]
            self.load(source)
        return self._kinds[source]

    async def ask(self, source: str, work: Callable[[Predictor], Result]) -> Result:
        """What `work` makes of the predictor of a source. Raises Refused."""
        if source not in self.sources:
            raise Refused('choose a checkpoint')
        return await asyncio.wrap_future(self._thread.submit(self._answer, source, work))

    def _answer(self, source: str, work: Callable[[Predictor], Result]) -> Result:
        try:
            predictor = self.load(source)
            with within(self.limits.seconds):
                return work(predictor)
        except (UserError, BadImage) as error:
            raise Refused(str(error)) from None
        except TimeUp:
            raise Refused(f'it took longer than {self.limits.seconds:g} s; give a smaller photograph or another '
                          'checkpoint') from None
        except (MemoryError, torch.OutOfMemoryError):
            raise Refused('there is not enough memory; give a smaller photograph or another checkpoint') from None

    def look(self, predictor: Predictor, path: str | None, *, exif: bool) -> Seen:
        """What a predictor finds in an uploaded file, computed as predict.py does. Raises BadImage."""
        if not path:
            raise BadImage('give a photograph')
        predictor.exif = exif
        photograph, begin = self.read(path), time.perf_counter()
        sample = predictor.prepare(photograph)
        result, = predictor.task.predict(predictor.model, [sample])
        return Seen(photograph, sample, result, 1000 * (time.perf_counter() - begin))

    def read(self, path: str) -> bytes:
        """The content of an uploaded file, of which Pillow has read no more than the header. Raises BadImage."""
        try:
            data = Path(path).read_bytes()
        except OSError:
            raise BadImage(f'is kept no longer than {self.limits.kept / 60:g} minutes; give it again') from None
        if len(data) > self.limits.file_size:
            raise BadImage(f'is larger than {self.limits.file_size / 2**20:g} MB')
        with refusing_bad_images():
            try:
                with Image.open(io.BytesIO(data)) as image:
                    form, (width, height) = image.format, image.size
            except Image.DecompressionBombError:
                raise BadImage(f'has more than {self.limits.pixels / 1e6:g} million pixels') from None
            if form not in FORMATS:
                raise BadImage(f'is a {form} file; give one of {", ".join(FORMATS)}')
            if width * height > self.limits.pixels:
                raise BadImage(f'has {width} x {height} pixels, more than {self.limits.pixels / 1e6:g} million')
        return data


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Ends what computes within it after a time, by TimeUp, as the next module of a network begins."""
    end = time.monotonic() + seconds

    def check(*_: Any) -> None:
        if time.monotonic() > end:
            raise TimeUp

    with register_module_forward_pre_hook(check):
        yield
