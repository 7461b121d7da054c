"""Says what is in images, by any checkpoint that `main.py --eval` evaluates: classes, boxes, or a class a pixel.

    python predict.py photo.jpg folder https://HOST/cat.png --checkpoint released:moganet_small
    python predict.py folder --checkpoint runs/demo/checkpoint-best-ema.pth --topk 3 --json --draw pictures
    python predict.py folder --checkpoint released:moganet_small --embed features.npz

The pixels are those of the evaluation: sizes, interpolation and normalisation are the checkpoint's own. EXIF's rotation
is applied for detectors and segmentors, as in their training, and for classifiers with --exif alone. Exit status 2
where an image could not be read; the others are answered all the same. `python -m web` is a page with the same answers.
"""
import argparse
import itertools
import json
import os
import re
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # PYTHONSAFEPATH leaves it out

import numpy as np
import torch
from PIL import Image

from pipeline.augmentation import BadImage, refusing_bad_images
from pipeline.dense import decode_upright
from pipeline.files import find_images as images_below
from recipes import RECIPES, Run
from recipes import Classification as ClassificationRecipe
from recipes.command_line import parse_field, row_of_model
from recipes.imagenet import PREPARATION
from recipes.saved import check_parts
from tasks.classification import Classification
from training.evaluation import load_task
from utils import UserError, as_path, choose_device, expand, run_cli, to_stderr, write_atomically

# Fields of the recipe that may be set for a test, and flags of main.py that mean here what they mean there
SETTINGS = ('model', 'gate', *PREPARATION)
FLAGS = ('weights', *SETTINGS, 'device')


class Predictor:
    """A checkpoint's model, and what `main.py --eval` would evaluate it by.

    Attributes:
        task: what it finds in an image, and how that is shown.
        model: in evaluation mode, on `device`.
        weights: what was read from the file.
        about: one line on the weights and the settings.
        exif: whether images are turned as their EXIF data say, also for a classifier.
    """

    def __init__(self, source: str, *, device: str = 'auto', weights: str = 'auto',
                 settings: Mapping[str, Any] | None = None, exif: bool = False):
        """
        Args:
            source: a path, an https URL or `released:NAME`.
            device: 'auto', 'cuda', 'mps' or 'cpu'.
            weights: 'auto', 'raw' or 'ema'.
            settings: fields of the recipe that win over the checkpoint's own, as `test_size`.

        Raises:
            UserError: for a wrong setting, or a file that holds no such model.
        """
        settings = dict(settings or {})
        row = row_of_model(settings['model']) if settings.get('model') else replace(RECIPES['default'], model='')
        asked = replace(row, **settings)
        check_parts(asked, settings)
        asked.check()
        run = Run(eval=True, checkpoint=(source,), weights=weights, given=tuple(settings), device=device)
        self.device, self.exif = choose_device(device), exif
        self.task, self.model, self.weights = load_task(source, asked, run, self.device)
        self.recipe = self.task.recipe
        self.about = f'{self.weights}; {self.task.show_settings()}'

    def predict(self, images: Sequence[Any]) -> list[Any]:
        """What the model finds in each of some undecoded images (bytes). Raises BadImage."""
        return self.task.predict(self.model, [self.prepare(image) for image in images])

    def prepare(self, image: Any) -> Any:
        """An undecoded image (bytes) as the task's `predict` takes it. Raises BadImage."""
        with refusing_bad_images():
            return self.task.prepare(decode_upright(image) if self.exif else image)

    def picture(self, image: Any) -> Image.Image:
        """An undecoded image (bytes) as predictions are drawn onto it. Raises what the decoder raises."""
        return self.task.picture(decode_upright(image) if self.exif else image)


class Classifier(Predictor):
    """A checkpoint that tells classes apart.

    Attributes:
        names: of the classes, by index.
    """

    def __init__(self, source: str, **others: Any):
        super().__init__(source, **others)
        if not isinstance(self.task, Classification) or not getattr(self.model, 'num_classes', 0):
            raise UserError(f'{source}: holds no classifier; give a checkpoint that was trained to tell classes apart')
        self.names = self.task.classes

    def pixels(self, source: str) -> np.ndarray:
        """The test crop, uint8 [H, W, 3], of a file or of what a URL returns. Raises BadImage."""
        with refusing_bad_images():
            return self.prepare(read(source))

    def images(self, pixels: Sequence[np.ndarray]) -> torch.Tensor:
        """The model's input, float32 [B, 3, H, W] on the device, from what `pixels` returns."""
        return self.task.to_input(pixels, self.device)

    @torch.inference_mode()
    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, classes] on the CPU: the softmax, also where training was by binary cross-entropy."""
        return self.model(images).float().softmax(1).cpu()


def find_images(names: Sequence[str]) -> Iterator[str]:
    """The names, and in place of a folder all images below it in sorted order. Raises UserError where it is closed."""
    for name in names:
        yield from (images_below(name) if os.path.isdir(name) else ()) or (name,)


def read(source: str) -> bytes:
    """The content of a file or URL. Raises OSError, ValueError or HTTPException."""
    if re.match('https?://', source):
        # Many servers refuse urllib under its own name
        request = urllib.request.Request(source, headers={'User-Agent': 'Mozilla/5.0 (MogaNet predict.py)'})
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.read()
    if os.path.isdir(source):
        raise OSError('is a folder without an image')
    return Path(source).read_bytes()


def add_flags(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Adds the flags that choose a checkpoint, or several or none, and how it is evaluated."""
    parser.add_argument('--checkpoint', metavar='SOURCE', help='a path, an https URL or released:NAME',
                        **{'nargs': '+', 'default': []} if several else {'required': True})
    fields = ClassificationRecipe.__dataclass_fields__ | Run.__dataclass_fields__
    for name in FLAGS:
        parser.add_argument(f'--{name}', help=fields[name].metadata['help'].replace('%', '%%'))
    parser.add_argument('--exif', action='store_true',
                        help='turn photographs as their EXIF data say, also for a classifier')


def arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags of `add_flags` say beside the checkpoint, as arguments of a predictor. Raises UserError."""
    settings = {name: parse_field(ClassificationRecipe, name, getattr(args, name)) for name in SETTINGS
                if getattr(args, name) is not None}
    if args.weights not in (None, 'auto', 'raw', 'ema'):
        raise UserError(f'--weights {args.weights}: choose from auto, raw, ema')
    return {'device': args.device or 'auto', 'weights': args.weights or 'auto', 'settings': settings,
            'exif': args.exif}


def from_flags(args: argparse.Namespace, kind: type[Predictor] = Predictor) -> Predictor:
    """The predictor that the flags of `add_flags` ask for. Raises UserError."""
    return kind(args.checkpoint, **arguments(args))


def picture_path(folder: Path, name: str) -> Path:
    """A PNG in a folder named after an image; numbered where another image has the name."""
    stem = Path(name).stem or 'image'
    names = (f'{stem}{f"-{number}" if number else ""}.png' for number in itertools.count())
    return next(folder / name for name in names if not (folder / name).exists())


def main(argv: list[str] | None = None) -> int:
    """Predicts as the flags say. Returns the exit status; raises UserError where the checkpoint is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('images', nargs='+', metavar='IMAGE', type=expand, help='files, folders, or http(s) URLs')
    parser.add_argument('--topk', type=int, help='of each image, the classes to show (5 by default), or the most boxes')
    parser.add_argument('--json', action='store_true', help='print a JSON list instead of lines')
    parser.add_argument('--draw', type=as_path, metavar='FOLDER',
                        help='write a picture of each prediction into a folder')
    parser.add_argument('--labels', type=as_path, metavar='FOLDER',
                        help="write a segmentor's class of each pixel, numbered from 0, as a PNG into a folder")
    parser.add_argument('--embed', type=as_path, metavar='FILE',
                        help="write a NumPy archive instead: 'names', and what the classifier takes of each image, "
                             "'features', float32 [images, features]")
    parser.add_argument('--batch_size', type=int, default=32, help='images at a time')
    add_flags(parser)
    args = parser.parse_args(argv)
    if min(1 if args.topk is None else args.topk, args.batch_size) < 1:
        raise UserError('--topk and --batch_size: give at least 1')
    if args.embed and (args.json or args.draw or args.labels or args.topk):
        raise UserError('--embed writes features in place of predictions; leave --json, --draw, --labels, --topk out')
    if args.embed and args.embed.exists():
        raise UserError(f'--embed {args.embed} is there already; give another file')
    predictor = from_flags(args)
    to_stderr(predictor.about)
    count = {} if args.topk is None else {'count': args.topk}
    task, predicted, bad, pending = predictor.task, [], 0, iter([*find_images(args.images)])
    embedded: list[tuple[str, torch.Tensor]] = []
    while some := list(itertools.islice(pending, args.batch_size)):
        names, files, samples = [], [], []
        for source in some:
            shown = source.encode(errors='backslashreplace').decode()  # file names need not be Unicode
            try:
                with refusing_bad_images():
                    file = read(source)
                    samples.append(predictor.prepare(file))
                files.append(file)
                names.append(shown)
            except BadImage as error:
                to_stderr(f'error: {shown}: {error}')
                bad += 1
        if args.embed:
            embedded += zip(names, task.embed(predictor.model, samples) if samples else (), strict=True)
            continue
        results = task.predict(predictor.model, samples) if samples else ()
        for name, file, result in zip(names, files, results, strict=True):
            if args.draw:
                draw(args.draw, name, task.draw(predictor.picture(file), result, **count))
            if args.labels:
                draw(args.labels, name, task.label_picture(result), flag='--labels')
            if args.json:
                predicted.append({'image': name, 'predictions': task.to_json(result, **count)})
            else:
                print(name, *task.to_text(result, **count), sep='\n')
    if args.json:
        print(json.dumps(predicted, indent=1))
    if args.embed:
        write_features(args.embed, embedded)
    return 2 if bad else 0


def write_features(path: Path, embedded: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Writes the names and the features of images as a NumPy archive. Raises UserError where it cannot."""
    if not embedded:
        raise UserError(f'--embed {path}: no image could be read, and nothing is written')
    names, rows = zip(*embedded, strict=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: np.savez(file, names=np.array(names), features=torch.stack(rows).numpy()))
    except OSError as error:
        raise UserError(f'--embed {path} cannot be written ({error.strerror or error}); give another file') from None


def draw(folder: Path, name: str, picture: Image.Image, *, flag: str = '--draw') -> None:
    """Writes the picture of an image's prediction. Raises UserError, which names the flag, where it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(picture_path(folder, name), lambda file: picture.save(file, 'PNG'))
    except OSError as error:
        raise UserError(f'{flag} {folder} cannot be written ({error.strerror or error}); give another folder') from None


if __name__ == '__main__':
    run_cli(main)
