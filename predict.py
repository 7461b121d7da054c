"""Says what is in images: classes and probabilities, by any checkpoint that `main.py --eval` evaluates.

    python predict.py photo.jpg folder https://HOST/cat.png --checkpoint released:moganet_small
    python predict.py folder --checkpoint runs/demo/checkpoint-best-ema.pth --topk 3 --json

The pixels are those of the evaluation: test size, crop, interpolation and normalisation are the checkpoint's own, and
EXIF's rotation is not applied. Exit status 2 where an image could not be read; the others are answered all the same.
"""
import argparse
import contextlib
import itertools
import json
import os
import re
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

import recipes
from evaluation import find_recipe
from image_ops import BadImage, TestTransform, normalise, refusing_bad_images
from image_sources import is_image
from models.weights import build_model, check_forward
from recipes import Recipe, Run
from utils import UserError, choose_device, run_cli, to_stderr

# Flags of main.py that mean here what they mean there
FLAGS = ('weights', 'model', 'gate', 'test_size', 'crop_pct', 'crop_mode', 'interpolation', 'device')


class Classifier:
    """A checkpoint's model, and what `main.py --eval` would evaluate it by.

    Attributes:
        about: one line on the weights and the settings.
        names: of the classes, by index.
    """

    def __init__(self, source: str, flags: Sequence[str] = ()):
        """
        Args:
            source: a path, an https URL or `released:NAME`.
            flags: words of main.py's command line, those of `FLAGS`.

        Raises:
            UserError: for a wrong flag, or a file that is no classifier.
        """
        asked, run = recipes.resolve(['--eval', f'--checkpoint={source}', *flags])
        weights, recipe, _ = find_recipe(source, asked, run)
        self.recipe = recipe
        self.device = choose_device(run.device)
        self.model = build_model(weights, recipe.model, gate=recipe.gate).to(self.device)
        if not self.model.num_classes:
            raise UserError(f'{source}: holds no classifier; give a checkpoint that was trained to tell classes apart')
        check_forward(self.model, size=recipe.test_size)
        self.names = class_names(weights.meta.get('classes') or (), self.model)
        self.about = (f'{weights}; {recipe.model} at {recipe.test_size}, crop {recipe.crop_pct:g} '
                      f'({recipe.crop_mode}), {recipe.interpolation}')
        self._transform = TestTransform(recipe)
        self._mean = torch.tensor(recipe.mean, device=self.device) * 255
        self._scale = 1 / (torch.tensor(recipe.std, device=self.device) * 255)

    def pixels(self, source: str) -> np.ndarray:
        """The test crop, uint8 [H, W, 3], of a file or of what a URL returns. Raises BadImage."""
        with refusing_bad_images():
            return self._transform(read(source))

    def images(self, pixels: Sequence[np.ndarray]) -> torch.Tensor:
        """The model's input, float32 [B, 3, H, W] on the device, from what `pixels` returns."""
        batch = torch.from_numpy(np.stack(pixels)).to(self.device)
        return normalise(batch.view(-1, 3), self._mean, self._scale, None).view(batch.shape).permute(0, 3, 1, 2)

    @torch.inference_mode()
    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, classes] on the CPU: the softmax, also where training was by binary cross-entropy."""
        return self.model(images).float().softmax(1).cpu()


def class_names(classes: Sequence[str], model: nn.Module) -> list[str]:
    """The names of a model's classes.

    Args:
        classes: the checkpoint's own names, or none: then ImageNet's, if there are as many, else the numbers. WordNet
            ids are described in words.
    """
    subset = infer_imagenet_subset(model)
    imagenet = ImageNetInfo(subset or 'imagenet-1k')
    names = list(classes) or (imagenet.label_names() if subset else [])
    if all(re.fullmatch(r'n\d{8}', name) for name in names):
        with contextlib.suppress(KeyError):  # ids that are not ImageNet's stay as they are
            names = [imagenet.label_name_to_description(name) for name in names]
    return names + [str(number) for number in range(len(names), model.num_classes)]


def find_images(sources: Sequence[str]) -> Iterator[str]:
    """The sources, and in place of a folder all images below it in sorted order."""
    for source in sources:
        below = sorted(path for path in Path(source).rglob('*') if is_image(path.name) and path.is_file())
        yield from map(str, below) if below else (source,)


def read(source: str) -> bytes:
    """The content of a file or URL. Raises OSError, ValueError or HTTPException."""
    if re.match('https?://', source):
        # Many servers refuse urllib under its own name
        request = urllib.request.Request(source, headers={'User-Agent': 'Mozilla/5.0 (MogaNet predict.py)'})
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.read()
    if os.path.isdir(source):
        raise OSError('no image lies below this folder')
    return Path(source).read_bytes()


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that choose a checkpoint and how it is evaluated."""
    parser.add_argument('--checkpoint', required=True, metavar='SOURCE', help='a path, an https URL or released:NAME')
    fields = Recipe.__dataclass_fields__ | Run.__dataclass_fields__
    for name in FLAGS:
        parser.add_argument(f'--{name}', help=fields[name].metadata['help'].replace('%', '%%'))


def from_flags(args: argparse.Namespace) -> Classifier:
    """The classifier that the flags of `add_flags` ask for."""
    given = {name: getattr(args, name) for name in FLAGS}
    return Classifier(args.checkpoint, [f'--{name}={value}' for name, value in given.items() if value is not None])


def main(argv: list[str] | None = None) -> int:
    """Predicts as the flags say. Returns the exit status; raises UserError where the checkpoint is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='files, folders, or http(s) URLs')
    parser.add_argument('--topk', type=int, default=5, help='classes to show of each image')
    parser.add_argument('--json', action='store_true', help='print a JSON list instead of lines')
    parser.add_argument('--batch_size', type=int, default=32, help='images at a time')
    add_flags(parser)
    args = parser.parse_args(argv)
    if min(args.topk, args.batch_size) < 1:
        raise UserError('--topk and --batch_size: give at least 1')
    classifier = from_flags(args)
    to_stderr(classifier.about)
    predicted, bad, sources = [], 0, find_images(args.images)
    while some := list(itertools.islice(sources, args.batch_size)):
        names, pixels = [], []
        for source in some:
            shown = source.encode(errors='backslashreplace').decode()  # file names need not be Unicode
            try:
                pixels.append(classifier.pixels(source))
                names.append(shown)
            except BadImage as error:
                to_stderr(f'error: {shown}: {error}')
                bad += 1
        rows = classifier.probabilities(classifier.images(pixels)) if pixels else ()
        for name, row in zip(names, rows, strict=True):
            top = [{'class': number, 'name': classifier.names[number], 'probability': row[number].item()}
                   for number in row.topk(min(args.topk, len(row))).indices.tolist()]
            if args.json:
                predicted.append({'image': name, 'predictions': top})
            else:
                print(name, *(f'{100 * entry["probability"]:8.2f} %  {entry["name"]}' for entry in top), sep='\n')
    if args.json:
        print(json.dumps(predicted, indent=1))
    return 2 if bad else 0


if __name__ == '__main__':
    run_cli(main)
