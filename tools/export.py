"""Turns a checkpoint of any format into a file for use elsewhere, and checks that it computes the same.

    python tools/export.py --checkpoint released:moganet_small --format onnx --output moganet_small.onnx

Formats: `safetensors`, weights that `load_weights` and timm read; `huggingface`, a model folder (config.json,
model.safetensors, README.md) that `timm.create_model('local-dir:...')` opens; `onnx` and `torch_export`, programs with
a dynamic batch that need nothing of this repository. The program of a segmentor gives logits [B, classes, H, W] of
square images, by default of the side of its training crops. The program of RetinaNet or Mask R-CNN, in `onnx` alone,
takes one square image of a fixed size and gives what it finds there: `boxes`, `scores`, `labels` and `masks`, by
falling score.
"""
import argparse
import dataclasses
import io
import json
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import safetensors.torch
import timm
import torch
from timm.data import ImageNetInfo
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from models.detection import Detector
from models.download import sha256_of
from models.moganet import MogaNet, fuse
from models.rcnn import CascadeMaskRCNN
from models.segmentation import Segmentor
from models.weights import Weights
from predict import Predictor
from utils import UserError, as_path, run_cli, write_atomically

# Relative, on logits. Another runtime adds in another order, which changes 1e-6 (onnxruntime, MogaNet-XT); a wrong
# operator or a dropped layer changes the second digit.
TOLERANCE = 1e-4

Exported = tuple[bytes, Callable[[Tensor], Tensor]]  # a file's content, and what it computes when read back


class Logits(nn.Module):
    """A segmentor as a function of images alone."""

    def __init__(self, model: Segmentor) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits [B, classes, H, W]."""
        return self.model.logits(images)


class Detections(nn.Module):
    """A detector as a function of one image alone, which fills its whole size."""

    def __init__(self, model: Detector) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """[1, 3, H, W] -> boxes [n, 4], scores [n], labels [n] and, with mask heads, masks bool [n, H, W]."""
        size = int(images.shape[2]), int(images.shape[3])
        found, = self.model.predict(images, [size], [size])
        return tuple(found.values())


class Normalized(nn.Module):
    """A model that takes RGB images in 0..1 and normalises them itself."""

    def __init__(self, model: nn.Module, *, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer('mean', torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer('std', torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> what the model gives."""
        return self.model((images - self.mean) / self.std)


def describe(source: Predictor, weights: Weights, size: int | None) -> dict[str, Any]:
    """All that the user of a file must know, in JSON's types: from the checkpoint, else from timm's defaults."""
    model, recipe = source.model, source.recipe
    cfg = model.pretrained_cfg
    about = {'model': cfg['architecture'], 'weights': weights.which}
    if isinstance(model, (Segmentor, Detector)):
        size_of = max(recipe.image_scale) if isinstance(model, Detector) else recipe.crop_size
        about |= {'network': recipe.name, 'test_size': size_of, 'mean': recipe.mean, 'std': recipe.std,
                  'classes': source.task.classes}
    else:
        about |= {'test_size': cfg['input_size'][-1]} | {
            key: cfg[key] for key in ('crop_pct', 'interpolation', 'mean', 'std')}
    if isinstance(model, MogaNet):
        about['gate'] = weights.gate or 'single'
    if 'released' in weights.meta and not isinstance(model, (Segmentor, Detector)):
        names = ImageNetInfo('imagenet-1k')
        about['classes'] = [names.index_to_description(index) for index in range(names.num_classes())]
    # what describes the source file rather than the model stays behind
    about |= {key: value for key, value in weights.meta.items() if key not in ('args', 'metric', 'sha256', 'bytes')}
    if size:
        about['test_size'] = size
    return json.loads(json.dumps(about, default=str))


def check(run: Callable[[Tensor], Tensor], model: nn.Module, shape: tuple[int, int, int]) -> float:
    """The largest relative error of `run` against the model, on one and on three random images of a shape [C, H, W].

    Raises:
        UserError: it exceeds `TOLERANCE`.
    """
    generator = torch.Generator().manual_seed(0)
    errors = []
    with torch.inference_mode():
        for batch in (1, 3):
            images = torch.rand(batch, *shape, generator=generator)
            expected = model(images)
            errors.append(((run(images) - expected).norm() / expected.norm()).item())
    if not all(error <= TOLERANCE for error in errors):  # NaN too
        raise UserError(f'the exported logits differ from the checkpoint\'s by {max(errors):.1e}, more than '
                        f'{TOLERANCE:g}, so nothing was written: try without --fuse, or another version of torch')
    return max(errors)


def check_detections(run: Callable[[Tensor], Sequence[Tensor]], program: nn.Module, shape: tuple[int, int, int]
                     ) -> float:
    """As `check`, of what is found in three images: the numbers of things, classes and masks must be equal.

    Of a mask, a thousandth of the pixels may differ, where its probability is 0.5 but for round-off.
    """
    generator, errors = torch.Generator().manual_seed(0), []
    with torch.inference_mode():
        for _ in range(3):
            image = torch.rand(1, *shape, generator=generator)
            expected, actual = program(image), run(image)
            boxes, scores, labels, *masks = zip(actual, expected, strict=True)
            equal = boxes[0].shape == boxes[1].shape and torch.equal(*labels) and all(
                (ours != theirs).float().mean() <= 1e-3 for ours, theirs in masks)
            errors += [((a - b).norm() / b.norm().clamp(min=1e-12)).item() if equal else math.inf
                       for a, b in (boxes, scores)]
    if not all(error <= TOLERANCE for error in errors):  # NaN too
        raise UserError('the exported program finds other things than the checkpoint in an image of noise, so nothing '
                        'was written: try another --input_size, or another version of torch')
    return max(errors)


def program_of(model: nn.Module) -> nn.Module:
    """The model as a function of images alone: itself, a segmentor's logits, or what a detector finds."""
    kind = Logits if isinstance(model, Segmentor) else Detections if isinstance(model, Detector) else None
    # In evaluation mode as a whole: the exporter sets the mode of the outermost module anew, and of all below it
    return kind(model).eval() if kind else model


def check_detector(model: Detector, *, format: str, size: int) -> None:
    """Refuses a form in which a detector cannot be written. Raises UserError."""
    name = model.pretrained_cfg['architecture']
    if isinstance(model, CascadeMaskRCNN):
        raise UserError(f'{name} is a cascade, which is not exported; choose a RetinaNet or a Mask R-CNN')
    if format != 'onnx':
        raise UserError(f'{name} is a detector, which is exported only as a program that chooses its boxes; choose '
                        '--format onnx')
    if size % model.SIZE_DIVISOR:
        raise UserError(f'--input_size {size}: a detector takes a multiple of {model.SIZE_DIVISOR}; give '
                        f'{model.padded((size, size))[0]}')


# ---- The formats ----------------------------------------------------------------------------------------------------

def to_safetensors(model: nn.Module, weights: Weights, about: dict[str, Any]) -> Exported:
    """Weights from which `load_weights` reads back the gate, which weights they are, and `about` as `meta`."""
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    note = {'which': weights.which, 'gate': weights.gate, 'meta': about}
    data = safetensors.torch.save(tensors, {'format': 'pt', 'moganet': json.dumps(note)})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'model.safetensors'
        path.write_bytes(data)
        return data, program_of(Predictor(str(path), device='cpu').model)


def to_onnx(program: nn.Module, images: Tensor, about: dict[str, Any], outputs: Sequence[str] = ('logits',)
            ) -> Exported:
    """An ONNX model from `images` to its outputs, and `about` as its metadata.

    From logits, with a dynamic batch; a detector's outputs, of one image, are as many as things are found.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  used by torch.onnx.export
    except ImportError as error:
        raise UserError(f'--format onnx needs {error.name}: pip install onnx onnxruntime onnxscript') from None
    names = {'input_names': ['images'], 'output_names': list(outputs), 'verbose': False}
    single = outputs == ('logits',)
    if single and torch.__version__ >= (2, 7):
        shapes = ({0: torch.export.Dim('batch')},)
        proto = torch.onnx.export(program, (images,), dynamo=True, dynamic_shapes=shapes, **names).model_proto
    else:  # torch 2.6 fails to decompose lerp under a dynamic batch, and torch.export at the number of boxes
        axes = {'images': {0: 'batch'}, 'logits': {0: 'batch'}} if single else {name: {0: 'n'} for name in outputs}
        buffer = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of sizes that become constants, as they shall
            # RoIAlign as here came with ONNX's 16
            torch.onnx.export(program, (images,), buffer, dynamo=False, dynamic_axes=axes, **names,
                              **({} if single else {'opset_version': 17}))
        proto = onnx.load_from_string(buffer.getvalue())
    onnx.helper.set_model_props(proto, {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()})
    data = proto.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=['CPUExecutionProvider'])

    def run(images: Tensor) -> Any:
        found = [torch.from_numpy(value) for value in session.run(None, {'images': images.numpy()})]
        return found[0] if single else found

    return data, run


def to_torch_export(program: nn.Module, images: Tensor, about: dict[str, Any]) -> Exported:
    """A `torch.export` program with a dynamic batch, with `about.json` inside."""
    exported = torch.export.export(program, (images,), dynamic_shapes=({0: torch.export.Dim('batch')},))
    buffer = io.BytesIO()
    torch.export.save(exported, buffer, extra_files={'about.json': json.dumps(about)})
    return buffer.getvalue(), torch.export.load(io.BytesIO(buffer.getvalue())).module()


def fill_folder(folder: Path, model: nn.Module, weights: Weights, about: dict[str, Any]) -> nn.Module:
    """Lays out a Hugging Face model folder; returns the model that timm makes of it."""
    arguments = dict(about.get('recipe', {}).get('model_kwargs', {}))
    if 'gate' in about:
        arguments['gate'] = about['gate']
    size = about['test_size']
    model.pretrained_cfg.update({key: about[key] for key in ('crop_pct', 'interpolation', 'mean', 'std')},
                                input_size=(model.pretrained_cfg['input_size'][0], size, size), pool_size=None)
    labels = {'label_names': about['classes']} if about.get('classes') else {}
    folder.mkdir()
    save_config_for_hf(model, folder / 'config.json', model_config=labels, model_args=arguments)
    (folder / 'model.safetensors').write_bytes(to_safetensors(model, weights, about)[0])
    (folder / 'README.md').write_text(model_card(about))
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


def model_card(about: dict[str, Any]) -> str:
    """README.md of a Hugging Face model folder."""
    is_moganet = 'gate' in about
    facts = [f'{about["weights"]} weights' + (f', {about["gate"]} gate' if is_moganet else ''),
             f'tested at {about["test_size"]} x {about["test_size"]} pixels, crop {about["crop_pct"]:g}, '
             f'{about["interpolation"]} interpolation', f'normalised by mean {about["mean"]} and std {about["std"]}']
    if about.get('acc1'):
        facts.append(f'ImageNet-1k top-1 as published: {about["acc1"]} %')
    if is_moganet:
        facts.append('paper: [MogaNet](https://arxiv.org/abs/2211.03295)')
    front = ['library_name: timm', 'pipeline_tag: image-classification', 'license: apache-2.0', 'tags:',
             '- image-classification', '- timm']
    code = ['import timm', *(['import models  # of the MogaNet repository: tells timm the architecture'] * is_moganet),
            "model = timm.create_model('local-dir:PATH_OF_THIS_FOLDER', pretrained=True).eval()"]
    return '\n'.join(['---', *front, '---', f'# {about["model"]}', '', *(f'- {fact}' for fact in facts), '',
                      '```python', *code, '```', ''])


# ---- The command line -----------------------------------------------------------------------------------------------

def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags. Exits with status 2 on a wrong one, as argparse does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--checkpoint', required=True, help='a path, an https URL or released:NAME')
    parser.add_argument('--format', required=True, choices=('safetensors', 'huggingface', 'onnx', 'torch_export'))
    parser.add_argument('--output', required=True, type=as_path, help='the file to write; a folder for huggingface')
    parser.add_argument('--weights', choices=('auto', 'raw', 'ema'), default='auto')
    parser.add_argument('--model', help='timm model, where the checkpoint does not say')
    parser.add_argument('--gate', choices=('single', 'double'),
                        help='the gate, in place of the one that the checkpoint names')
    parser.add_argument('--input_size', '--input-size', type=int,
                        help="side of the images in pixels, in place of the checkpoint's test size")
    parser.add_argument('--fuse', action='store_true', help='fold BN into its neighbours (MogaNet; onnx, torch_export)')
    parser.add_argument('--normalize', action='store_true',
                        help='mean and std become part of the program, which takes RGB in 0..1 (onnx, torch_export)')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Exports as the flags say. Raises UserError; a file is then left as it was."""
    args = parse(argv)
    is_program = args.format in ('onnx', 'torch_export')
    if (args.fuse or args.normalize) and not is_program:
        raise UserError(f'--fuse and --normalize change the program, but {args.format} holds weights alone: leave them '
                        'out, or choose onnx or torch_export')
    if args.output.is_dir():
        raise UserError(f'{args.output} is a folder already: give another --output')
    settings = {'model': args.model, 'gate': args.gate}
    source = Predictor(args.checkpoint, device='cpu', weights=args.weights,
                       settings={name: value for name, value in settings.items() if value is not None})
    model = program = program_of(source.model)
    detector = isinstance(model, Detections)
    if args.format == 'huggingface' and isinstance(model, Logits):
        raise UserError('--format huggingface is for classifiers, which timm opens; choose safetensors, onnx or '
                        'torch_export')
    weights = dataclasses.replace(source.weights, gate=args.gate or source.weights.gate)
    about = describe(source, weights, args.input_size)
    channels = next(value.shape[1] for value in model.parameters() if value.ndim == 4)  # of the first convolution
    if detector and not args.input_size:  # with its padding
        about['test_size'] = source.model.padded((about['test_size'],) * 2)[0]
    shape = (channels, about['test_size'], about['test_size'])
    if detector:
        check_detector(source.model, format=args.format, size=about['test_size'])
    if args.fuse:
        if not isinstance(model, MogaNet):
            raise UserError(f'--fuse is for MogaNet models, not for {about["model"]}: leave it out')
        program = fuse(model)
    if is_program:
        about['normalized'] = args.normalize
    if args.normalize:
        model, program = (Normalized(part, mean=about['mean'], std=about['std']).eval() for part in (model, program))
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        if args.format == 'huggingface':
            with tempfile.TemporaryDirectory(dir=args.output.parent) as beside:
                folder = Path(beside) / args.output.name
                error = check(fill_folder(folder, model, weights, about), model, shape)
                os.rename(folder, args.output)
        else:
            # Of zeros nothing might be found
            images = torch.rand(1, *shape) if detector else torch.zeros(2, *shape)
            outputs = ('boxes', 'scores', 'labels', 'masks')[:4 if source.recipe.with_masks else 3] if detector else (
                'logits',)
            data, run = (to_safetensors(source.model, weights, about) if args.format == 'safetensors' else
                         to_onnx(program, images, about, outputs) if args.format == 'onnx' else
                         to_torch_export(program, images, about))
            error = (check_detections if detector else check)(run, model, shape)
            write_atomically(args.output, lambda file: file.write(data))
    except OSError as failure:
        raise UserError(f'cannot write {args.output}: {failure.strerror or failure}') from None
    except UserError:
        raise
    except Exception as failure:  # of the model, at a size that it cannot take, or of an exporter, at its operations
        reason = ' '.join(str(failure).split())[:200]
        raise UserError(f'{about["model"]} cannot be written as {args.format} for images of '
                        f'{" x ".join(map(str, shape))} ({type(failure).__name__}: {reason}); give another --format or '
                        '--input_size') from failure
    file = args.output / 'model.safetensors' if args.format == 'huggingface' else args.output
    print(f'{weights}\n{file}: {file.stat().st_size:,} bytes, sha256 {sha256_of(file)}\n'
          + (f'boxes and scores within {error:.1e} of the checkpoint\'s in three images' if detector else
             f'logits within {error:.1e} of the checkpoint\'s at batch sizes 1 and 3'))


if __name__ == '__main__':
    run_cli(main)
