"""Draws MogaNet into tools/architecture.svg, which README.md shows.

    python tools/architecture.py            # writes the file
    python tools/architecture.py --check    # exit status 1 where it is stale

The widths and depths are read from the model, so that the picture is of the code.
"""
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timm

import models  # noqa: F401 (registers the MogaNets)
from utils import run_cli, write_atomically

TARGET = Path(__file__).resolve().parent / 'architecture.svg'
MODEL = 'moganet_small'
PLAIN, CONVOLUTION, DEPTHWISE, POINTWISE, NORM = '#f3f4f6', '#dbeafe', '#bbf7d0', '#fef3c7', '#e9d5ff'
ROW = 44  # from box to box
HEIGHT = 28  # of a box
LINE = 13  # of text


class Drawing:
    """An SVG of boxes, arrows and text, in pixels from the upper left corner."""

    def __init__(self, width: int, height: int):
        self.root = ElementTree.Element('svg', {
            'xmlns': 'http://www.w3.org/2000/svg', 'viewBox': f'0 0 {width} {height}', 'font-size': '12',
            'font-family': 'Helvetica, Arial, sans-serif', 'text-anchor': 'middle', 'fill': '#111827'})
        self._add('title', text='MogaNet')
        marker = ElementTree.SubElement(self._add('defs'), 'marker', {
            'id': 'tip', 'viewBox': '0 0 6 6', 'refX': '6', 'refY': '3', 'markerWidth': '6', 'markerHeight': '6',
            'orient': 'auto'})
        ElementTree.SubElement(marker, 'path', {'d': 'M0 0L6 3L0 6z'})
        self._add('rect', width=width, height=height, fill='white')

    def _add(self, tag: str, *, text: str | None = None, **attributes: object) -> ElementTree.Element:
        element = ElementTree.SubElement(self.root, tag, {
            name.replace('_', '-'): f'{value:g}' if isinstance(value, float) else str(value)
            for name, value in attributes.items()})
        element.text = text
        return element

    def text(self, x: float, y: float, text: str, **attributes: object) -> None:
        """A line of text around (x, y)."""
        self._add('text', text=text, x=x, y=y + 4, **attributes)

    def box(self, x: float, y: float, text: str, fill: str, *, width: float = 150) -> None:
        """A box around (x, y) with lines of text."""
        lines = text.split('\n')
        height = HEIGHT + LINE * (len(lines) - 1)
        self._add('rect', x=x - width / 2, y=y - height / 2, width=width, height=height, rx=4, fill=fill,
                  stroke='#6b7280')
        for i, line in enumerate(lines):
            self.text(x, y + LINE * (i - (len(lines) - 1) / 2), line)

    def sign(self, x: float, y: float, sign: str) -> None:
        """An operation of two: a sign in a circle."""
        self._add('circle', cx=x, cy=y, r=10, fill='white', stroke='#6b7280')
        self.text(x, y, sign)

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through points, to its tip."""
        self._add('polyline', points=' '.join(f'{x:g},{y:g}' for x, y in points), fill='none', stroke='#111827',
                  marker_end='url(#tip)')

    def down(self, x: float, begin: float, end: float) -> None:
        """An arrow from the box around `begin` to that around `end`."""
        self.arrow((x, begin + HEIGHT / 2), (x, end - HEIGHT / 2))


def draw_stages(drawing: Drawing, y: float) -> None:
    """The whole network, from left to right."""
    model = timm.create_model(MODEL, device='meta')
    depths = [len(getattr(model, f'blocks{i}')) for i in (1, 2, 3, 4)]
    x = 55
    drawing.box(x, y, 'image\n3 x H x W', PLAIN, width=80)
    for i, (depth, info) in enumerate(zip(depths, model.feature_info, strict=True)):
        drawing.arrow((x + 40, y), (x + 85, y))
        x += 110
        drawing.box(x - 3, y, 'stem\n/ 4' if i == 0 else '3x3\n/ 2', CONVOLUTION, width=44)
        drawing.arrow((x + 19, y), (x + 34, y))
        drawing.box(x + 72, y, f'{depth} blocks\nbatch norm', PLAIN, width=76)
        drawing.text(x + 60, y + 36, f'{info["num_chs"]} x H/{info["reduction"]} x W/{info["reduction"]}')
        x += 70
    drawing.arrow((x + 40, y), (x + 60, y))
    drawing.box(x + 92, y, 'mean', PLAIN, width=64)
    drawing.arrow((x + 124, y), (x + 144, y))
    drawing.box(x + 180, y, f'linear\n{model.num_classes}', CONVOLUTION, width=72)


def draw_block(drawing: Drawing, x: float, y: float) -> None:
    """x + scale * branch(norm(x)), for the spatial and then for the channel mixer."""
    drawing.text(x, y, 'block', font_weight='bold')
    top = y + 26
    drawing.text(x, top, 'x')
    for parts in ((('batch norm', NORM), ('multi-order gated\naggregation', PLAIN)),
                  (('batch norm', NORM), ('channel\naggregation', PLAIN))):
        y = top + ROW
        drawing.arrow((x, top + 10), (x, y - HEIGHT / 2))
        drawing.box(x, y, *parts[0])
        drawing.arrow((x, y + HEIGHT / 2), (x, y + 62 - 20))
        drawing.box(x, y + 62, *parts[1])
        drawing.arrow((x, y + 62 + 20), (x, y + 112 - 10))
        drawing.sign(x, y + 112, '\N{MULTIPLICATION SIGN}')
        drawing.text(x + 16, y + 112, 'layer scale, drop path', text_anchor='start')
        drawing.arrow((x, y + 122), (x, y + 146))
        drawing.sign(x, y + 156, '+')
        drawing.arrow((x, top + 16), (x - 95, top + 16), (x - 95, y + 156), (x - 10, y + 156))
        top = y + 156
    drawing.arrow((x, top + 10), (x, top + 30))


def draw_spatial(drawing: Drawing, x: float, y: float) -> None:
    """The multi-order gated aggregation."""
    drawing.text(x, y, 'multi-order gated aggregation', font_weight='bold')
    left, right = x - 150, x + 75
    y += 26
    rows = [y + ROW * (i + 1) for i in range(9)]
    drawing.text(x, y, 'u, C channels')
    drawing.arrow((x, y + 10), (x, rows[0] - HEIGHT / 2))
    drawing.box(x, rows[0], 'proj_1: 1x1', POINTWISE)
    drawing.down(x, rows[0], rows[1])
    drawing.box(x, rows[1], 'y + \N{GREEK SMALL LETTER GAMMA} (y \N{MINUS SIGN} mean y), SiLU', PLAIN, width=180)
    for at in (left, right):
        drawing.arrow((x, rows[1] + HEIGHT / 2), (x, rows[2] - 26), (at, rows[2] - 26), (at, rows[2] - HEIGHT / 2))
    drawing.box(left, rows[2], 'gate: 1x1', POINTWISE, width=100)
    drawing.box(right, rows[2], 'DW_conv0: depthwise 5x5', DEPTHWISE, width=250)
    parts = (('C / 8', right - 105), ('3 C / 8\ndepthwise 5x5\ndilation 2', right - 18),
             ('4 C / 8\ndepthwise 7x7\ndilation 3', right + 85))
    middle = rows[3] + 18
    for text, at in parts:
        half = 27 if '\n' in text else HEIGHT / 2
        drawing.arrow((at, rows[2] + HEIGHT / 2), (at, middle - half))
        drawing.box(at, middle, text, DEPTHWISE if '\n' in text else PLAIN, width=64 if half < 20 else 94)
        drawing.arrow((at, middle + half), (at, rows[5] - HEIGHT / 2))
    drawing.box(right, rows[5], 'concatenate, PW_conv: 1x1', POINTWISE, width=280)
    for at, begin in ((left, rows[2]), (right, rows[5])):
        drawing.down(at, begin, rows[6])
        drawing.box(at, rows[6], 'SiLU', PLAIN, width=60)
        drawing.arrow((at, rows[6] + HEIGHT / 2), (at, rows[7]), (x + (10 if at > x else -10), rows[7]))
    drawing.sign(x, rows[7], '\N{MULTIPLICATION SIGN}')
    drawing.arrow((x, rows[7] + 10), (x, rows[8] - HEIGHT / 2))
    drawing.box(x, rows[8], 'proj_2: 1x1', POINTWISE)
    drawing.arrow((x, rows[8] + HEIGHT / 2), (x, rows[8] + 34))
    drawing.sign(x, rows[8] + ROW, '+')
    drawing.arrow((x, rows[8] + ROW + 10), (x, rows[8] + ROW + 30))
    drawing.arrow((x, y + 16), (x - 212, y + 16), (x - 212, rows[8] + ROW), (x - 10, rows[8] + ROW))


def draw_channel(drawing: Drawing, x: float, y: float) -> None:
    """The channel aggregation."""
    drawing.text(x, y, 'channel aggregation', font_weight='bold')
    y += 26
    drawing.text(x, y, 'C channels')
    drawing.arrow((x, y + 10), (x, y + ROW - HEIGHT / 2))
    boxes = (('fc1: 1x1, to r C channels', POINTWISE), ('dwconv: depthwise 3x3, GELU', DEPTHWISE),
             ('z + \N{GREEK SMALL LETTER GAMMA} (z \N{MINUS SIGN} GELU(decompose z))', PLAIN),
             ('fc2: 1x1, to C channels', POINTWISE))
    for i, (text, fill) in enumerate(boxes):
        drawing.box(x, y + ROW * (i + 1), text, fill, width=210)
        drawing.arrow((x, y + ROW * (i + 1) + HEIGHT / 2), (x, y + ROW * (i + 2) - HEIGHT / 2))
    drawing.text(x, y + ROW * 6, 'decompose: 1x1, to one channel')
    drawing.text(x, y + ROW * 6 + 20, 'r = 8, 8, 4, 4 in the four stages')


def draw() -> bytes:
    """The picture, as the file holds it."""
    drawing = Drawing(1000, 650)
    drawing.text(500, 20, MODEL, font_weight='bold')
    draw_stages(drawing, 58)
    draw_block(drawing, 120, 130)
    draw_spatial(drawing, 500, 130)
    draw_channel(drawing, 870, 130)
    ElementTree.indent(drawing.root, ' ')
    return ElementTree.tostring(drawing.root, encoding='utf-8') + b'\n'


def main(argv: Sequence[str] | None = None) -> int:
    """Writes or checks the picture. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='change nothing; exit status 1 where it is stale')
    args = parser.parse_args(argv)
    picture = draw()
    if TARGET.exists() and TARGET.read_bytes() == picture:
        return 0
    if args.check:
        print(f'stale: {TARGET.name}')
        return 1
    write_atomically(TARGET, lambda file: file.write(picture))
    print(f'written: {TARGET.name}')
    return 0


if __name__ == '__main__':
    run_cli(main)
