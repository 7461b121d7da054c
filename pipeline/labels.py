"""Class names: how they are compared, which order numbers them, and the files that map them to labels.

Labels are positions in a list of names, and a wrong list fails silently. So names are compared here alone: on a
resume, in an evaluation, with a class map, and between the training and the test images.
"""
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo
from timm.data.readers.class_map import load_class_map

from utils import UserError

MAX_LABEL = 1_000_000  # above it a class map's number is no label


class BadLabel(Exception):
    """A target that fits no class of the model, where a GPU would name nothing in an assertion, or not its image."""


def normal(name: str) -> str:
    """A name in one Unicode form: some systems write an accent as a character of its own."""
    return unicodedata.normalize('NFC', name)


def known_names(value: Any) -> list[str]:
    """The class names that a foreign file may hold under this name; none where they are something else."""
    names = list(value) if isinstance(value, (list, tuple)) else []
    return names if all(isinstance(name, str) for name in names) else []


def are_numbers(names: Sequence[str]) -> bool:
    """Whether all names are whole numbers."""
    return bool(names) and all(re.fullmatch('[0-9]{1,18}', name) for name in names)


def in_order(names: Sequence[str]) -> list[str]:
    """The names as they number the classes of a new run: by their numbers where all are whole numbers, else as text."""
    return sorted(names, key=lambda name: (int(name), name)) if are_numbers(names) else sorted(names)


def _keys(names: Sequence[str], *, numbers: bool) -> list[str]:
    """The names in the form in which they are compared; as they are where two of them would become one."""
    keys = [str(int(name)) if numbers else normal(name) for name in names]
    return keys if len(set(keys)) == len(keys) else list(names)


def find(names: Sequence[str], classes: Sequence[str]) -> list[int]:
    """The position of each name among the classes, -1 where it is none of them.

    This is the only comparison of class names. One name in two Unicode forms is the same, and 7 and 007 are where all
    names are whole numbers.
    """
    numbers = are_numbers(names) and are_numbers(classes)
    position: dict[str, int] = {}
    for i, key in enumerate(_keys(classes, numbers=numbers)):
        position.setdefault(key, i)
    return [position.get(key, -1) for key in _keys(names, numbers=numbers)]


def some(names: Sequence[str]) -> str:
    """The first three of some names, printable."""
    shown = [name.encode(errors='backslashreplace').decode().replace('\n', '\\n') for name in names[:3]]
    return ', '.join(shown) + (', ...' if len(names) > 3 else '')


def lacking(names: Sequence[str], classes: Sequence[str]) -> list[str]:
    """The names that are none of the classes."""
    return [name for name, place in zip(names, find(names, classes), strict=True) if place < 0]


def difference(ours: Sequence[str], theirs: Sequence[str], *, we: str, they: str) -> str:
    """Which classes only one of two lists has; empty where both have the same.

    Args:
        we: how the owner of the first list is called.
        they: how the owner of the second list is called.
    """
    parts = [f'{len(names)} only in {owner} ({some(names)})' for names, owner in
             ((lacking(ours, theirs), we), (lacking(theirs, ours), they)) if names]
    return ' and '.join(parts)


def classes_of_model(ours: Sequence[str], known: Sequence[str], num_classes: int, *, cure: str
                     ) -> tuple[list[str], str] | None:
    """The names of a model's classes by index, for its evaluation on data with the classes `ours`.

    Args:
        ours: the data's classes, in their own order.
        known: the checkpoint's own names, empty where it has none.
        num_classes: of the model.
        cure: of classes that are not the model's, for the message.

    Returns:
        the names, among which all of `ours` are, and where they come from; None where the data's names say nothing
        about the model.

    Raises:
        UserError: where only some of the data's classes are the model's.
    """
    candidates = [(list(known), 'the checkpoint')] if len(known) == num_classes else []
    if num_classes == 1000:
        candidates.append((ImageNetInfo('imagenet-1k').label_names(), "ImageNet's ids"))
    if are_numbers(ours) and len(ours) < num_classes and not set(find(ours, known)) - {-1}:
        candidates.append(([str(number) for number in range(num_classes)], 'their numbers'))
    for names, source in candidates:
        unknown = lacking(ours, names)
        if not unknown:
            return names, source
        if len(unknown) < len(ours) <= num_classes:
            raise UserError(f'{len(unknown)} of the {len(ours)} classes of the data ({some(unknown)}) are none of the '
                            f"model's {num_classes} by {source}; {cure}")
    if known and len(ours) < num_classes and len(known) == num_classes and len(candidates) == 1:
        raise UserError(f'the data has other classes ({some(ours)}) than the checkpoint was trained on '
                        f'({some(list(known))}); {cure}')
    return None


def names_of_map(labels: dict[str, int]) -> list[str]:
    """The names of the classes by label; where a label has several names, all of them."""
    names: list[list[str]] = [[] for _ in range(max(labels.values()) + 1)]
    for name, label in labels.items():
        names[label].append(str(name))
    return [' or '.join(several) or str(label) for label, several in enumerate(names)]


def read_class_map(path: str, folder: Path | None = None, *, names: Sequence[str] = ()) -> dict[str, int]:
    """The label of each class name in a file: a name a line, which its line's position numbers, or NAME LABEL lines.

    Args:
        path: a text file, with or without a byte-order mark; or timm's pickled dictionary.
        folder: of the images, in or beside which the file may lie.
        names: the data's classes, by which the form is told where names end in numbers.

    Raises:
        UserError: where the file is none of these, with the line.
    """
    places = [Path(path), *([folder / path, folder.parent / path] if folder else [])]
    file = next((place for place in places if place.is_file()), places[0])
    cure = 'give a text file with a class name a line, or NAME LABEL lines'
    try:
        if file.suffix.lower() == '.pkl':
            entries = list(load_class_map(str(file)).items())  # its keys may be numbers, which timm looks up
        else:
            lines = [line.strip() for line in file.read_text(encoding='utf-8-sig').split('\n')]
            lines = [line for line in lines if line]
            pairs = [match.groups() for line in lines if (match := re.fullmatch(r'(.*\S)\s+([0-9]{1,18})', line))]
            numbered = len(pairs) == len(lines) and (
                not names or len(lacking(names, lines)) >= len(lacking(names, [name for name, _ in pairs])))
            entries = [(name, int(label)) for name, label in pairs] if numbered else [
                (line, label) for label, line in enumerate(lines)]
    except Exception as error:  # what a pickle raises is anything
        reason = getattr(error, 'strerror', None) or str(error) or type(error).__name__
        raise UserError(f'--class_map {path} cannot be read ({reason}); {cure}') from None
    labels: dict[str, int] = {}
    for name, label in entries:
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label <= MAX_LABEL:
            raise UserError(f'--class_map {path}: the label of {some([str(name)])} is {label}; give a whole '
                            'number from 0')
        key = normal(name) if isinstance(name, str) else name
        if labels.setdefault(key, label) != label:
            raise UserError(f'--class_map {path} names {some([str(name)])} twice; {cure}')
    if not labels:
        raise UserError(f'--class_map {path} is empty; {cure}')
    return labels
