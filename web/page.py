"""The page: a photograph, and one or two checkpoints that say what is in it."""
import functools
import html
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import gradio as gr
import matplotlib
import numpy as np
from gradio.data_classes import ImageData
from PIL import Image, ImageDraw, ImageFont

from predict import Predictor
from tools import cam
from utils import UserError
from web.models import KINDS, Models, Refused

LEAST = 320  # pixels to which a smaller crop is enlarged, so that the maps over it can be seen
PART = 120  # pixels of the side of a part of the aggregation

ONE_AT_A_TIME = {'concurrency_id': 'model', 'concurrency_limit': 1}  # of all that asks a model
PRIVATE = {'api_visibility': 'private', 'trigger_mode': 'always_last'} | ONE_AT_A_TIME

# File, title, licence; scikit-image's and scikit-learn's, which lie in their packages
EXAMPLES = {
    ('skimage', 'data/chelsea.png'): 'cat by Stefan van der Walt, CC0',
    ('skimage', 'data/coffee.png'): 'coffee by Rachel Michetti, CC0',
    ('skimage', 'data/astronaut.png'): 'Eileen Collins by NASA, public domain',
    ('skimage', 'data/rocket.jpg'): 'rocket by SpaceX, public domain',
    ('sklearn', 'datasets/images/china.jpg'): 'temple by danielbuechele, CC BY 2.0',
    ('sklearn', 'datasets/images/flower.jpg'): 'flower by vultilion, CC BY 2.0',
}


with mock.patch('gradio.component_meta.create_or_modify_pyi'):  # it would write a .pyi beside this file
    class Photograph(gr.Image):
        """An image of which the server gets the file as it is: Gradio's own opens it, and would fetch an address."""

        is_template = True  # the browser shows Gradio's own

        def preprocess(self, payload: ImageData | None) -> str | None:
            """The path of an uploaded file."""
            return payload.path if payload else None

        async def async_move_resource_to_block_cache(self, url_or_file_path: str | Path | None) -> str | None:
            """The path of a file in the folder of the uploads. Raises gradio.Error for an address."""
            if '://' in str(url_or_file_path):
                raise gr.Error('give a file, not an address', print_exception=False)
            return await super().async_move_resource_to_block_cache(url_or_file_path)


def examples() -> dict[str, str]:
    """Those of `EXAMPLES` whose packages are installed: titles by path."""
    found = {}
    for (package, name), title in EXAMPLES.items():
        spec = importlib.util.find_spec(package)  # does not import it
        path = Path(next(iter(spec.submodule_search_locations)), name) if spec else None
        if path and path.exists():
            found[str(path)] = title
    return found


def one_line(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose refusals reach the browser as one line, and leave no trace in the log."""
    @functools.wraps(handler)
    async def handle(*args: Any) -> Any:
        try:
            return await handler(*args)
        except Refused as refusal:
            raise gr.Error(html.escape(str(refusal)), title='Not answered', duration=20,
                           print_exception=False) from None
    return handle


# ---- For programs ---------------------------------------------------------------------------------------------------

DESCRIPTIONS = {
    'classify': 'The likeliest classes of a photograph: their number, name and probability.',
    'detect': 'The boxes in a photograph, by falling score: class, name, score, box (x1, y1, x2, y2) and, from a model '
              "with masks, the mask as COCO's run lengths.",
    'segment': 'The classes that take up most of a photograph with their shares, and the class of each pixel as a PNG '
               'of numbers.',
}


def add_endpoints(models: Models, photograph: gr.Image) -> None:
    """An endpoint for each kind of answer that the sources give."""
    by_kind: dict[str, list[str]] = {}
    for source in models.sources:
        by_kind.setdefault(models.kind(source), []).append(source)
    for kind, sources in by_kind.items():
        inputs = [photograph, gr.Dropdown(sources, value=sources[0], label='checkpoint', visible=False),
                  gr.Number(100 if kind == 'detect' else 5, precision=0, minimum=1, label='topk', visible=False),
                  gr.Checkbox(models.exif, label='exif', visible=False)]
        outputs = [gr.JSON(label='predictions', visible=False)]
        if kind == 'segment':
            outputs.append(gr.Image(label='class of each pixel', format='png', visible=False))
        gr.Button(visible=False).click(endpoint(models, kind), inputs, outputs, api_name=kind,
                                       api_description=DESCRIPTIONS[kind], **ONE_AT_A_TIME)


def endpoint(models: Models, kind: str) -> Callable[..., Any]:
    """The handler of an endpoint; the names of its arguments are those that programs give."""
    @one_line
    async def answer(image: str | None, checkpoint: str, topk: int, exif: bool) -> Any:
        def work(predictor: Predictor) -> Any:
            result = models.look(predictor, image, exif=exif).result
            found = predictor.task.to_json(result, count=topk)
            return (found, predictor.task.label_picture(result)) if kind == 'segment' else found
        return await models.ask(checkpoint, work)
    return answer


# ---- For people -----------------------------------------------------------------------------------------------------

class Panel:
    """A checkpoint's answer."""

    def __init__(self, models: Models, value: str, *, optional: bool):
        """
        Args:
            value: the source that is chosen at first; '' for none.
            optional: whether it may stay without one.
        """
        self._models = models
        choices = [('none', '')] if optional or not value else []
        self.source = gr.Dropdown([*choices, *((name, name) for name in models.sources)], value=value,
                                  label='Second checkpoint' if optional else 'Checkpoint')
        self.about = gr.HTML(visible=False, padding=False)
        with gr.Column(visible=False, elem_classes='maps') as self.classes:
            self.bars = gr.Label(label='Probabilities', num_top_classes=5, show_heading=False)
            with gr.Row():
                self.target = gr.Dropdown(label='Heat map of the class', min_width=160)
                self.stage = gr.Radio(label='after stage', type='value', min_width=160)
            self.no_heat = gr.HTML(visible=False, padding=False)
            self.heat = gr.ImageSlider(label='What the network saw, and Grad-CAM', format='png', interactive=False,
                                       buttons=['fullscreen'])
            self.parts = gr.Image(show_label=False, format='png', interactive=False, buttons=['fullscreen'],
                                  alt_text="How strongly the aggregation's orders and its gate respond")
        with gr.Column(visible=False) as self.pixels:
            self.picture = gr.Image(label='Found', format='png', interactive=False, buttons=['download', 'fullscreen'])
            self.lines = gr.Textbox(label='In words', lines=3, max_lines=12, interactive=False)
        with gr.Accordion('As predict.py --json prints it', open=False, visible=False,
                          elem_classes='answer') as self.more:
            self.json = gr.Textbox(show_label=False, lines=8, max_lines=20, interactive=False, buttons=['copy'])

    def connect(self, photograph: gr.Image, exif: gr.Checkbox) -> None:
        """Answers as soon as something is chosen anew."""
        shown = [self.about, self.classes, self.bars, self.target, self.stage, self.no_heat, self.heat, self.parts,
                 self.pixels, self.picture, self.lines, self.more, self.json]
        events = [photograph.change, exif.change, self.source.change]
        gr.on(events, one_line(self.look), [photograph, self.source, exif, self.stage], shown,
              show_progress_on=[self.source], **PRIVATE)
        gr.on([self.target.input, self.stage.input], one_line(self.explain),
              [photograph, self.source, exif, self.target, self.stage], [self.no_heat, self.heat, self.parts],
              show_progress_on=[self.heat], **PRIVATE)

    async def look(self, path: str | None, source: str, exif: bool, stage: int | None) -> dict[Any, Any]:
        """What is shown of a photograph."""
        if not path or not source:
            return {part: gr.update(visible=False) for part in (self.about, self.classes, self.pixels, self.more)}

        def work(predictor: Predictor) -> dict[Any, Any]:
            seen = self._models.look(predictor, path, exif=exif)
            found, kind = predictor.task.to_json(seen.result), KINDS[predictor.recipe.task]
            line = html.escape(f'{predictor.about}; {seen.milliseconds:.0f} ms')
            shown = {self.about: gr.update(value=f'<p>{line}</p>', visible=True), self.more: gr.update(visible=True),
                     self.classes: gr.update(visible=kind == 'classify'), self.json: json.dumps(found, indent=1),
                     self.pixels: gr.update(visible=kind != 'classify')}
            if kind != 'classify':
                picture = predictor.task.draw(predictor.picture(seen.photograph), seen.result)
                return shown | {self.picture: picture, self.lines: '\n'.join(predictor.task.to_text(seen.result))}
            names, stages = predictor.task.classes, len(getattr(predictor.model, 'feature_info', None) or ())
            stage_shown = stage if stage in range(1, stages + 1) else stages
            return shown | self._heat(predictor, seen.sample, found[0]['class'], stage_shown) | {
                self.bars: bars(found),
                self.target: gr.update(choices=[(name, i) for i, name in enumerate(names)], value=found[0]['class']),
                self.stage: gr.update(choices=list(range(1, stages + 1)), value=stage_shown)}
        return await self._models.ask(source, work)

    async def explain(self, path: str | None, source: str, exif: bool, target: int, stage: int) -> dict[Any, Any]:
        """The maps of another class or stage."""
        def work(predictor: Predictor) -> dict[Any, Any]:
            sample = self._models.look(predictor, path, exif=exif).sample
            return self._heat(predictor, sample, target, stage)
        return await self._models.ask(source, work)

    def _heat(self, predictor: Predictor, crop: np.ndarray, target: int, stage: int) -> dict[Any, Any]:
        """The crop, the heat map over it, and the parts of the aggregation.

        Args:
            crop: uint8 [H, W, 3].
        """
        picture, hidden = enlarge(crop), gr.update(visible=False)
        try:
            row, = cam.explain(predictor, predictor.task.to_input([crop], predictor.device), target, stages=[stage],
                               block=None)
        except UserError as error:  # of another family of networks
            return {self.no_heat: gr.update(value=f'<p>{html.escape(str(error))}</p>', visible=True),
                    self.heat: gr.update(value=(picture, picture)), self.parts: hidden}
        heat = Image.blend(picture, color(row.cam, picture.size, row.cam.max(), colors='jet'), 0.5)
        strongest = max((part.max() for part in row.parts[:3]), default=1)  # the orders have one scale, as in tools/cam
        parts = [color(part, (PART, PART), limit or part.max())
                 for part, limit in zip(row.parts, (strongest,) * 3 + (None,), strict=False)]
        return {self.no_heat: hidden, self.heat: (picture, heat),
                self.parts: gr.update(value=beside(parts, cam.PARTS), visible=True) if parts else hidden}


def bars(found: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Probabilities by name, for the bars; two classes of one name bear their numbers."""
    names = [entry['name'] for entry in found]
    return {entry['name'] if names.count(entry['name']) == 1 else f'{entry["name"]} ({entry["class"]})':
            entry['probability'] for entry in found}


def enlarge(crop: np.ndarray) -> Image.Image:
    """A crop, uint8 [H, W, 3], at least `LEAST` pixels large."""
    factor = max(1, -(-LEAST // min(crop.shape[:2])))
    return Image.fromarray(crop.repeat(factor, 0).repeat(factor, 1))


def color(values: np.ndarray, size: tuple[int, int], limit: float, *, colors: str = 'magma') -> Image.Image:
    """A map [h, w] in colours from 0 to a limit, bilinear at a size (width, height)."""
    smooth = Image.fromarray((values / (limit or 1)).astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
    return Image.fromarray(matplotlib.colormaps[colors](np.asarray(smooth).clip(0, 1), bytes=True)[..., :3])


def beside(maps: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Square maps in a row, each above its caption."""
    font, step = ImageFont.load_default(15), PART + 8
    row = Image.new('RGB', (step * len(maps) - 8, PART + 44), 'white')
    for place, (one, caption) in enumerate(zip(maps, captions, strict=True)):
        row.paste(one, (step * place, 0))
        ImageDraw.Draw(row).text((step * place + PART / 2, PART + 4), caption, font=font, fill='black', anchor='ma',
                                 align='center')
    return row


def build(models: Models, *, first: str = '', second: str = '') -> gr.Blocks:
    """The page.

    Args:
        first, second: the sources that are chosen at first; '' for none.
    """
    limits, photographs = models.limits, examples()
    with gr.Blocks(title='MogaNet', analytics_enabled=False, delete_cache=(10, limits.kept)) as page:
        gr.Markdown('# MogaNet\nWhat a network sees in a photograph, and where it looks. Nothing is stored.')
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                photograph = Photograph(label='Photograph', type='filepath', image_mode=None, height=300,
                                        sources=['upload', 'clipboard', 'webcam'], buttons=['fullscreen'])
                exif = gr.Checkbox(models.exif,
                                   label='Turn it as its EXIF data say (detectors and segmentors always do)')
                if photographs:
                    gr.Examples([[path] for path in photographs], [photograph], label='Examples')
                    gr.Markdown('Examples: ' + '; '.join(photographs.values()) + '.')
            with gr.Column(scale=3, min_width=320), gr.Row():
                panels = []
                for value in (first, second)[:len(models.sources)]:
                    with gr.Column(min_width=320):
                        panels.append(Panel(models, value, optional=bool(panels)))
        for panel in panels:
            panel.connect(photograph, exif)
        add_endpoints(models, photograph)
    return page
