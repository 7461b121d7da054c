"""Corruptions of images made on the fly, by the optional package `imagecorruptions`."""
import functools
import typing
import zlib
from collections.abc import Callable
from unittest import mock

import numpy as np

from recipes.fields import Corruption
from utils import UserError, derive_seed

CORRUPTIONS: tuple[str, ...] = typing.get_args(Corruption)
SEVERITIES = (1, 2, 3, 4, 5)
LEAST_SIZE = 32  # pixels a side, for the package


def check_package() -> None:
    """Refuses corruptions where the package is missing. Raises UserError."""
    try:
        import imagecorruptions  # noqa: F401
    except ImportError as error:
        raise UserError(f"--corruptions needs a package ({error}): pip install -e '.[corruptions]'") from None


@functools.cache
def _numba_seeder() -> Callable[[int], None]:
    """Seeds the random numbers of compiled functions, which are not NumPy's."""
    from numba import njit

    @njit
    def seed(value: int) -> None:
        np.random.seed(value)

    return seed


def corrupt(pixels: np.ndarray, name: str, severity: int) -> np.ndarray:
    """A corrupted copy of a test crop, uint8 [H, W, 3], H = W: always the same of the same crop.

    ImageNet-C too was made of crops. The seed comes from the pixels, so that neither the order nor the number of the
    processes changes an image.
    """
    import imagecorruptions
    seed = derive_seed('corruption', name, severity, zlib.crc32(np.ascontiguousarray(pixels).data)) % 2**32
    np.random.seed(seed)
    _numba_seeder()(seed)  # glass_blur draws from numba's own stream
    seeded = np.random.default_rng(seed)
    with mock.patch('numpy.random.default_rng', lambda *_: seeded):  # impulse_noise from a new one of NumPy's
        return imagecorruptions.corrupt(pixels, corruption_name=name, severity=severity)
