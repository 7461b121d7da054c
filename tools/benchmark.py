"""The measurements behind this repository's claims, one subcommand a subject: `python tools/benchmark.py model`."""
import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recipes import RECIPES
from tools.alternation import PRECISIONS, SUBJECTS, Row
from utils import align, expand, run_cli

Measure = Callable[[argparse.Namespace], list[Row] | Row]


def print_table(rows: Sequence[Row]) -> None:
    """Prints rows of the same keys; a spread as `median (min-max)`."""
    def cell(value: Any) -> str:
        if isinstance(value, dict):
            return f'{value["median"]} ({value["min"]}-{value["max"]})'
        return f'{value:.4g}' if isinstance(value, float) else str(value)

    cells = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    print(align(cells))


# ---- Subjects: each adds its flags to a parser and returns what measures with them ----------------------------------

def model(parser: argparse.ArgumentParser) -> Measure:
    """Images a second of each form of a model, in inference and per training step."""
    parser.add_argument('names', nargs='*', default=['moganet_xtiny'], metavar='NAME', help='timm models')
    parser.add_argument('--batch_size', type=int, default=16)
    parser.add_argument('--input_size', type=int, default=224)
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda, cuda:1, mps')
    parser.add_argument('--precisions', nargs='+', default=['fp32'], choices=PRECISIONS)
    parser.add_argument('--inference', nargs='*', metavar='FORM',
                        default=['authors', 'channels_last', 'fused+channels_last', 'fused+channels_last+compiled'],
                        help='eager, or a sum of authors (their formulation), fused, compiled, channels_last')
    parser.add_argument('--training', nargs='*', metavar='FORM',
                        default=['authors', 'channels_last', 'channels_last+compiled'],
                        help='eager, or a sum of authors (their formulation), compiled, channels_last')
    parser.add_argument('--rounds', type=int, default=7)

    def measure(args: argparse.Namespace) -> list[Row]:
        from tools import benchmark_model
        return benchmark_model.measure(
            args.names, batch_size=args.batch_size, input_size=args.input_size, device=args.device,
            precisions=args.precisions, inference=args.inference, training=args.training, rounds=args.rounds)
    return measure


def traffic(parser: argparse.ArgumentParser) -> Measure:
    """Bytes moved and kernels launched by a training step on CUDA, ours beside the authors', on meta tensors."""
    parser.add_argument('names', nargs='*', metavar='NAME', help='MogaNets (default: all)')
    parser.add_argument('--batch_size', type=int, default=64)
    parser.add_argument('--input_size', type=int, default=224)
    parser.add_argument('--compiled', action='store_true',
                        help="also the compiler's own count: it compiles for the CPU, minutes for the deep ones")

    def measure(args: argparse.Namespace) -> list[Row]:
        from tools import benchmark_model
        return benchmark_model.measure_traffic(
            args.names, batch_size=args.batch_size, input_size=args.input_size, compiled=args.compiled)
    return measure


def engine(parser: argparse.ArgumentParser) -> Measure:
    """What the training engine costs over a bare loop."""
    parser.add_argument('--input_size', type=int, default=64)
    parser.add_argument('--batch_size', type=int, default=16)
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--steps', type=int, default=5, help='updates of each contender in a round')
    parser.add_argument('--device', default='cpu')

    def measure(args: argparse.Namespace) -> Row:
        from tools import benchmark_engine
        return benchmark_engine.measure(input_size=args.input_size, batch_size=args.batch_size, rounds=args.rounds,
                                        steps=args.steps, device=args.device)
    return measure


def checkpoint(parser: argparse.ArgumentParser) -> Measure:
    """The time for which training waits while a checkpoint is saved, over that of a plain torch.save."""
    parser.add_argument('--recipe', default='moganet_xtiny', choices=RECIPES, metavar='NAME',
                        help='recipe whose training state is saved')
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--folder', type=expand, help='where the saves go (default: a temporary folder)')

    def measure(args: argparse.Namespace) -> Row:
        from tools import benchmark_engine
        return benchmark_engine.measure_save(recipe=RECIPES[args.recipe], rounds=args.rounds, device=args.device,
                                             folder=args.folder)
    return measure


def depthwise(parser: argparse.ArgumentParser) -> Measure:
    """GB/s of each depthwise convolution of a model by precision and layout, beside a copy: two minutes on a GPU."""
    parser.add_argument('name', nargs='?', default='moganet_small', metavar='NAME', help='timm model')
    parser.add_argument('--batch_size', type=int, default=128)
    parser.add_argument('--input_size', type=int, default=224)
    parser.add_argument('--device', default='auto')
    parser.add_argument('--precisions', nargs='+', default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument('--rounds', type=int, default=3)

    def measure(args: argparse.Namespace) -> list[Row]:
        from tools import benchmark_depthwise
        return benchmark_depthwise.measure(
            args.name, batch_size=args.batch_size, input_size=args.input_size, device=args.device,
            precisions=args.precisions, rounds=args.rounds)
    return measure


def memory(parser: argparse.ArgumentParser) -> Measure:
    """The GiB that a training step of each recipe takes on a GPU, allocated (reserved), into benchmarks/memory.json."""
    parser.add_argument('names', nargs='*', metavar='NAME', help='recipes (default: all of GPUs)')
    parser.add_argument('--device', default='cuda')

    def measure(args: argparse.Namespace) -> list[Row]:
        from tools import benchmark_memory
        return benchmark_memory.measure(args.names, device=args.device)
    return measure


def data(parser: argparse.ArgumentParser) -> Measure:
    """Images a second and core of the data path and of the common pipeline, and the cores that the GPUs need."""
    parser.add_argument('--data_path', type=expand,
                        help='folder with train/, as for training (default: photographs of scikit-image '
                             'as JPEGs of the size of ImageNet\'s)')
    parser.add_argument('--images', type=int, default=256, help='images of a round')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--gpus', type=int, default=1, help='number of GPUs of the machine to feed')
    parser.add_argument('--images_per_second', type=float,
                        help='images that the training step takes on one GPU in a second')
    parser.add_argument('--device', help='measure those images a second on this device, where they are not given')
    parser.add_argument('--recipe', default='moganet_small', choices=RECIPES, metavar='NAME',
                        help='recipe whose augmentation (and training step) is measured')

    def measure(args: argparse.Namespace) -> Row:
        from tools import benchmark_data
        return benchmark_data.measure(
            args.data_path, recipe=RECIPES[args.recipe], images=args.images, rounds=args.rounds, gpus=args.gpus,
            images_per_second=args.images_per_second, device=args.device)
    return measure


def dense_data(parser: argparse.ArgumentParser) -> Measure:
    """Images a second and core of a detector's data path beside torchvision's, or a segmentor's beside Pillow's."""
    parser.add_argument('--images', type=int, default=64, help='images of a round')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--recipe', default='retinanet_moganet_tiny_1x', choices=RECIPES, metavar='NAME',
                        help='recipe whose data path is measured')

    def measure(args: argparse.Namespace) -> Row:
        from tools import benchmark_dense_data
        return benchmark_dense_data.measure(RECIPES[args.recipe], images=args.images, rounds=args.rounds)
    return measure


def dense(parser: argparse.ArgumentParser) -> Measure:
    """Training images a second of Mask R-CNN and UPerNet beside other libraries' on the same backbone, on the CPU."""
    parser.add_argument('--recipe', default='mask_rcnn_moganet_xtiny_1x', choices=RECIPES, metavar='NAME',
                        help='a row of Mask R-CNN, beside torchvision\'s, or of UPerNet, beside '
                             'segmentation-models-pytorch\'s')
    parser.add_argument('--batch_size', type=int, default=2)
    parser.add_argument('--height', type=int, default=256)
    parser.add_argument('--width', type=int, default=320)
    parser.add_argument('--rounds', type=int, default=7)

    def measure(args: argparse.Namespace) -> list[Row]:
        from tools import benchmark_dense_model
        return benchmark_dense_model.measure(RECIPES[args.recipe], batch_size=args.batch_size, height=args.height,
                                             width=args.width, rounds=args.rounds)
    return measure


def report(parser: argparse.ArgumentParser) -> Measure:
    """Measures all subjects on one device, into benchmarks/<device>.json, and writes BENCHMARKS.md from all devices."""
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--subjects', nargs='+', choices=SUBJECTS, help='subjects to measure (default: all)')
    parser.add_argument('--models', nargs='+', metavar='NAME', help='timm models (default: those for the device)')
    parser.add_argument('--precisions', nargs='+', choices=PRECISIONS,
                        help='precisions of the models (default: those for the device)')

    def measure(args: argparse.Namespace) -> Row:
        from tools import benchmark_report
        return benchmark_report.measure(args.device, rounds=args.rounds, subjects=args.subjects, models=args.models,
                                        precisions=args.precisions)
    return measure


def main(argv: Sequence[str] | None = None) -> None:
    """Measures one subject and prints its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar='SUBJECT')
    for subject in (model, traffic, engine, checkpoint, depthwise, memory, data, dense_data, dense, report):
        command = commands.add_parser(subject.__name__, description=subject.__doc__, help=subject.__doc__)
        command.set_defaults(measure=subject(command))
        command.add_argument('--json', action='store_true', help='JSON in place of a table')
    args = parser.parse_args(argv)
    result = args.measure(args)
    if args.json or isinstance(result, dict):
        print(json.dumps(result, indent=1))
    else:
        print_table(result)


if __name__ == '__main__':
    run_cli(main)
