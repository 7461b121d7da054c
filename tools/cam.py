"""Where a model looks: Grad-CAM of its stages, and the orders and the gate of a MogaNet's aggregation, in one picture.

    python tools/cam.py photo.jpg --checkpoint released:moganet_small [--stages 3 4] [--target tabby] [--output cam.png]

The picture has a row for each stage. The first column is the test crop, the second is Grad-CAM (arXiv 1610.02391) of
the stage's output for the predicted class or --target. The others show how strongly each part of the multi-order gated
aggregation responds in one block of the stage (the last, or --block), as the root mean square over its channels: the
low, the middle and the high order, on one scale, and the gate that multiplies their mixture. Other timm models have the
first two columns alone.
"""
import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

import predict
from models.moganet import MogaNet, MultiOrderGatedAggregation
from pipeline.augmentation import BadImage
from utils import UserError, as_path, expand, nearest, run_cli, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The parts of the aggregation, in the order of `aggregation`; the 5x5 also comes before the other two
PARTS = ('low order\n5x5', 'middle order\n5x5, dilation 2', 'high order\n7x7, dilation 3', 'gate')


@dataclass(frozen=True)
class Row:
    """What is shown of a stage: arrays [h, w] at the stage's resolution."""

    label: str
    cam: np.ndarray
    parts: list[np.ndarray]  # those of `PARTS`, or none


def stage_layers(model: nn.Module, image: Tensor) -> list[nn.Module]:
    """The modules whose outputs, [B, C, h, w], are the stages of a timm model. Raises UserError where they are not."""
    from captum.attr import LayerActivation
    infos = getattr(model, 'feature_info', None) or []
    try:
        layers = [model.get_submodule(info['module']) for info in infos]
    except (AttributeError, KeyError, TypeError):
        layers = []
    outputs = LayerActivation(model, layers).attribute(image) if layers else []
    # A transformer's are tokens [B, N, C] or maps [B, h, w, C]
    maps = [output.ndim == 4 and output.shape[1] == info['num_chs'] for output, info in zip(outputs, infos, strict=True)
            ] if layers else []
    if not maps or not all(maps):
        raise UserError(f'{type(model).__name__} has no stages of feature maps [B, C, H, W]; give a checkpoint of a '
                        'MogaNet or of another convolutional network')
    return layers


def grad_cam(model: nn.Module, layer: nn.Module, image: Tensor, target: int) -> Tensor:
    """Grad-CAM, [h, w], of a layer's output: channels weighted by their mean gradients, and negative sums set to 0."""
    from captum.attr import LayerGradCam
    return LayerGradCam(model, layer).attribute(image, target, relu_attributions=True)[0, 0].detach()


def aggregation(model: nn.Module, attn: MultiOrderGatedAggregation, image: Tensor) -> list[Tensor]:
    """The strength, [h, w], of the three orders before they are mixed, and of the gate."""
    from captum.attr import LayerActivation
    value = attn.value
    layers = [value.DW_conv0, value.DW_conv1, value.DW_conv2, attn.gate]
    low, middle, high, gate = LayerActivation(model, layers).attribute(image)
    gate = F.silu(F.silu(gate)) if attn.double_gate else F.silu(gate)
    return [part.detach()[0].square().mean(0).sqrt() for part in (low[:, :value.dims[0]], middle, high, gate)]


def find_class(word: str, names: list[str]) -> int:
    """The class that a word means: a name, one of the synonyms in a name, or a number. Raises UserError."""
    known = {}
    for index, name in enumerate(names):
        for synonym in (name, *name.split(', ')):
            known.setdefault(synonym.casefold(), index)
    if word.casefold() in known:
        return known[word.casefold()]
    if word.isdecimal() and int(word) < len(names):
        return int(word)
    raise UserError(f'--target {word} is none of the {len(names)} classes{nearest(word.casefold(), known)}')


def explain(classifier: predict.Classifier, image: Tensor, target: int, *, stages: list[int] | None,
            block: int | None) -> list[Row]:
    """The rows of the picture.

    Args:
        image: the model's input [1, 3, H, W].
        stages: counted from 1; all by default.
        block: the block of each stage whose aggregation is shown, from 1; the last by default.

    Raises:
        UserError: where the model has no such stage or block.
    """
    model, rows = classifier.model, []
    layers = stage_layers(model, image)
    for stage in stages or range(1, len(layers) + 1):
        if not 1 <= stage <= len(layers):
            raise UserError(f'--stages {stage}: {classifier.recipe.model} has stages 1 to {len(layers)}')
        cam, label, parts = grad_cam(model, layers[stage - 1], image, target), f'stage {stage}', []
        if isinstance(model, MogaNet):
            blocks = model.get_submodule(f'blocks{stage}')
            chosen = block or len(blocks)
            if not 1 <= chosen <= len(blocks):
                raise UserError(f'--block {block}: stage {stage} has blocks 1 to {len(blocks)}; choose others by '
                                '--stages')
            parts = aggregation(model, blocks[chosen - 1].attn, image)
            label += f', block {chosen} of {len(blocks)}'
        elif block:
            raise UserError(f'--block is for MogaNet models; {classifier.recipe.model} has no such part')
        rows.append(Row(f'{label}\n{cam.shape[0]}x{cam.shape[1]}', cam.cpu().numpy(),
                        [part.cpu().numpy() for part in parts]))
    return rows


def draw(pixels: np.ndarray, rows: list[Row], title: str) -> 'Figure':
    """The picture of an image, uint8 [H, W, 3], and the maps of its rows."""
    from matplotlib.figure import Figure
    columns = ('image', 'Grad-CAM', *(PARTS if rows[0].parts else ()))
    figure = Figure(figsize=(2 * len(columns) + 0.5, 2.05 * len(rows) + 1), dpi=120, layout='constrained')
    figure.suptitle(title, fontsize=12)
    height, width = pixels.shape[:2]
    maps = {'interpolation': 'bilinear', 'extent': (0, width, height, 0)}
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        line[0].set_ylabel(row.label, fontsize=9)
        for axis in line[:2]:
            axis.imshow(pixels, extent=maps['extent'])
        line[1].imshow(row.cam, cmap='jet', alpha=0.5, vmin=0, vmax=row.cam.max() or 1, **maps)
        strongest = max((part.max() for part in row.parts[:3]), default=1)
        for axis, part, limit in zip(line[2:], row.parts, (strongest,) * 3 + (None,), strict=False):
            axis.imshow(part, cmap='magma', vmin=0, vmax=limit, **maps)
    for axis, name in zip(axes[0], columns, strict=True):
        axis.set_title(name, fontsize=10)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    return figure


def main(argv: list[str] | None = None) -> None:
    """Draws as the flags say. Raises UserError; a file is then left as it was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('image', metavar='IMAGE', type=expand, help='a file or an http(s) URL')
    parser.add_argument('--stages', type=int, nargs='+', metavar='N', help='stages to show, from 1 (default: all)')
    parser.add_argument('--target', metavar='CLASS', help="class to explain, by name or number (default: the model's "
                                                          'own answer)')
    parser.add_argument('--block', type=int, metavar='N', help='block of each stage, from 1 (default: the last)')
    parser.add_argument('--output', type=as_path, metavar='PNG',
                        help='file to write (default: IMAGE-cam.png, here, if '
                             'there is none yet)')
    predict.add_flags(parser)
    args = parser.parse_args(argv)
    output = args.output or Path(f'{Path(args.image).stem}-cam.png')
    if args.output is None and output.exists():
        raise UserError(f'{output} exists already; to replace it say --output {output}')
    classifier = predict.from_flags(args, predict.Classifier)
    try:
        pixels = classifier.pixels(args.image)
    except BadImage as error:
        raise UserError(f'{args.image}: {error}; give one image') from None
    image = classifier.images([pixels])
    probabilities = classifier.probabilities(image)[0].tolist()
    answer = int(np.argmax(probabilities))
    target = answer if args.target is None else find_class(args.target, classifier.names)

    def said(number: int) -> str:
        return f'{classifier.names[number]} ({100 * probabilities[number]:.1f} %)'

    title = said(target) if target == answer else f'why {said(target)}, and not {said(answer)}'
    try:
        rows = explain(classifier, image, target, stages=args.stages, block=args.block)
        figure = draw(pixels, rows, f'{classifier.recipe.model}: {title}')
    except ImportError as error:
        raise UserError(f"tools/cam.py needs {error.name}: pip install -e '.[plot]'") from None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, lambda file: figure.savefig(file, format='png'))
    except OSError as error:
        raise UserError(f'cannot write {output}: {error.strerror or error}') from None
    print(f'{classifier.about}\n{title}\n{output}')


if __name__ == '__main__':
    run_cli(main)
