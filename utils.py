"""Small things without a home: user errors, derived seeds, the process group, the run's notes.

torch is imported inside the functions that need it, so that the command line answers without it.
"""
import difflib
import hashlib
import sys
from collections.abc import Callable, Iterable
from typing import Any


class UserError(Exception):
    """Something the user can put right. `main` prints the message, one line with the cure, and exits with status 2."""


def nearest(word: str, known: Iterable[str], *, prefix: str = '') -> str:
    """`; did you mean a, b?` for the known names next to a misspelt one, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f'; did you mean {", ".join(prefix + name for name in close)}?' if close else ''


def run_cli(main: Callable[[], int | None]) -> None:
    """Runs a command and exits: with its status, or with one line and status 2 on a user error."""
    try:
        status = main() or 0
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        status = 2
    sys.exit(status)


# ---- Derived randomness ---------------------------------------------------------------------------------------------

def derive_seed(*keys: int | str) -> int:
    """A 63-bit seed that depends on all keys and their order: the source of every random number here.

    Nothing random is stored in a checkpoint; a stream begins wherever its keys (seed, epoch, image, ...) say. BLAKE2b
    and not `hash`, which differs from process to process, nor a sum, under which (0, 1) and (1, 0) would agree.
    """
    text = '\x1f'.join(f'{type(key).__name__}:{key}' for key in keys)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'little') >> 1


def seed_everything(*keys: int | str) -> int:
    """Seeds Python, NumPy and torch (every device) from `derive_seed(*keys)`, which it returns."""
    import random

    import numpy as np
    import torch
    seed = derive_seed(*keys)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return seed
