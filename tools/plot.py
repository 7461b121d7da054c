"""Draws the curves of runs, finished or not: losses, metric, learning rate, waiting for data, speed.

    python tools/plot.py runs/moganet_small [runs/other ...] [--published FILE_OR_URL] [--output STEM]

The tool reads the log.txt and the recipe.json of each folder. It writes STEM.png and STEM.html, by default curves.png
and curves.html in the first folder; the page holds the picture, a table of the runs and what their recipes differ in.
It draws a published log (timm's summary.csv, a .log.json of OpenMixup, mmdetection or mmsegmentation, or a run of ours)
in grey under the curves, and prints its difference from the first run, epoch by epoch.
"""
import argparse
import base64
import dataclasses
import html
import io
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recipes import Classification, Recipe
from recipes.rows import recipe_class
from training import published
from utils import UserError, as_path, expand, run_cli, write_atomically

MARK = 'MogaNet tools/plot.py'  # in both files: the tool overwrites its own files alone
# Okabe and Ito's colours, which every kind of colour vision tells apart; their yellow is too pale for a line
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
GREY = {'color': '0.6', 'linewidth': 2.5, 'zorder': 1}  # of a published log, under all runs
MARKERS = ('o', '^', 's', 'D', 'v', 'P')  # a run beyond the colours takes the next
STYLE = '''
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1300px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
img { width: 100% } div { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3em .9em; text-align: left; border-bottom: 1px solid #ddd; white-space: nowrap }
th { border-bottom: 2px solid #999 }
i { display: inline-block; width: 1.4em; height: .35em; margin-right: .6em; vertical-align: middle }
'''


@dataclasses.dataclass(frozen=True)
class RunLog:
    """What a run's folder tells."""

    folder: Path
    recipe: dict[str, Any]
    entries: list[dict[str, Any]]  # of log.txt: one an epoch, or one every --val_steps updates

    @property
    def by_epoch(self) -> bool:
        """Whether the log has an entry an epoch."""
        epochs = {entry['epoch'] for entry in self.entries}
        return self.recipe['epochs'] is not None and len(epochs) == len(self.entries)

    @property
    def kind(self) -> type[Recipe]:
        """The class of the run's recipe, which knows the metrics."""
        return recipe_class(self.recipe.get('task', Classification.task))

    @property
    def progress(self) -> str:
        """Whether the run is finished."""
        last = self.entries[-1] if self.entries else {'epoch': -1, 'step': 0}
        length, unit, done = self.recipe['epochs'], 'epochs', last['epoch'] + 1
        if length is None:
            length, unit, done = self.recipe['updates'], 'updates', last['step']
        return f'finished, {done} {unit}' if done >= length else f'{done} of {length} {unit}'

    def series(self, column: str, *, by_epoch: bool) -> tuple[list[int], list[float]]:
        """A column of the log: the epochs (from 1) or updates that have a finite value in it, and the values."""
        pairs = [(entry['epoch'] + 1 if by_epoch else entry['step'], value) for entry in self.entries
                 if (value := entry.get(column)) is not None and math.isfinite(value)]
        return [place for place, _ in pairs], [value for _, value in pairs]

    def accuracies(self, column: str) -> tuple[str, str]:
        """The best value of a column with its epoch, and the last, as text."""
        places, values = self.series(column, by_epoch=self.by_epoch)
        if not values:
            return '-', '-'
        best = max(values)
        unit = 'epoch' if self.by_epoch else 'update'
        return f'{best:.2f} ({unit} {places[values.index(best)]})', f'{values[-1]:.2f}'


def read_run(folder: Path) -> RunLog:
    """Reads a run's folder, also while the run writes to it. Raises UserError for a folder of no run."""
    if not folder.exists():
        raise UserError(f'{folder} does not exist; give the --output_dir of a training')
    try:
        recipe = json.loads((folder / 'recipe.json').read_text())
        recipe['name'], recipe['epochs']
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f'{folder} is no run: its recipe.json cannot be read ({error!r}); give the --output_dir of a '
                        'training') from None
    entries, log = [], folder / 'log.txt'
    for line in log.read_text(errors='replace').splitlines() if log.exists() else ():
        try:
            entries.append(json.loads(line))
        except ValueError:  # half-written
            continue
    return RunLog(folder, recipe, entries)


def short_names(folders: Sequence[Path]) -> list[str]:
    """The fewest closing parts of each path that no other path ends in."""
    parts = [folder.resolve().parts for folder in folders]
    names = []
    for own in parts:
        others = [other for other in parts if other is not own]
        count = next((count for count in range(1, len(own))
                      if all(other[-count:] != own[-count:] for other in others)), len(own))
        names.append(str(Path(*own[-count:])))
    return names


def differences(runs: Sequence[RunLog]) -> dict[str, list[Any]]:
    """The fields in which the recipes differ, with the value of each run; None where a recipe has no such field."""
    fields = dict.fromkeys(field for run in runs for field in run.recipe if field not in run.kind.descriptive)
    values = {field: [run.recipe.get(field) for run in runs] for field in fields}
    return {field: row for field, row in values.items() if any(value != row[0] for value in row)}


def panels(kind: type[Recipe]) -> tuple[tuple[str, float, dict[str, str], float | None], ...]:
    """Title, factor, columns of log.txt with their line styles, and for an axis from zero, where it ends at least."""
    label, unit = kind.metrics[kind.best]
    return (
        ('training loss', 1, {'train_loss': '-'}, None),
        ('test loss', 1, {'test_loss': '-', 'test_loss_ema': '--'}, None),
        (f'test {label}{"," if unit else ""}{unit}', 1, {f'test_{kind.best}': '-', f'test_{kind.best}_ema': '--'},
         None),
        ('learning rate', 1, {'lr': '-'}, 0),
        ('time spent waiting for data, %', 100, {'data_wait': '-'}, 10),  # from there on the run itself warns
        ('images/s', 1, {'images_per_second': '-'}, 0),
    )


def as_run(log: published.Published, own: RunLog) -> RunLog:
    """A published log beside a run: its tests are of the average, where that is what it tested and the run has one.

    Raises:
        UserError: where it counts epochs and the run updates.
    """
    if log.by_epoch and not own.by_epoch:
        raise UserError(f'--published {log.name} counts epochs, and {own.folder} updates: they have no common axis; '
                        'give the log of a run in updates')
    average = log.averaged and any(name.startswith('test_') and name.endswith('_ema')
                                   for entry in own.entries for name in entry)
    entries = [{f'{name}_ema' if average and name.startswith('test_') else name: value
                for name, value in entry.items()} for entry in log.entries]
    return RunLog(Path(log.name), own.recipe | ({} if log.by_epoch else {'epochs': None}), entries)


def against(own: RunLog, log: RunLog) -> tuple[str, list[tuple[int, float, float]]]:
    """The column in which a run and a published log are compared, and place and both values where both have them."""
    best = f'test_{own.kind.best}'
    by_epoch = own.by_epoch and log.by_epoch
    for column in (f'{best}_ema', best):
        theirs = dict(zip(*log.series(column, by_epoch=by_epoch), strict=True))
        ours = dict(zip(*own.series(column, by_epoch=by_epoch), strict=True))
        if theirs and ours:
            return column, [(place, ours[place], theirs[place]) for place in ours if place in theirs]
    return best, []


def show_differences(own: RunLog, log: RunLog) -> str:
    """The difference between a run and a published log, a line an epoch (or a test)."""
    (label, unit), (column, rows) = own.kind.metrics[own.kind.best], against(own, log)
    place = 'epoch' if own.by_epoch and log.by_epoch else 'update'
    if not rows:
        return f'{log.folder}: no {place} in common yet'
    average = ', of the moving average' if column.endswith('_ema') else ''
    lines = [f'{label}{unit and ","}{unit}{average}, against {log.folder}',
             f'{place:>7}    ours  published  difference',
             *(f'{at:7}  {ours:6.2f}  {theirs:9.2f}  {ours - theirs:+10.2f}' for at, ours, theirs in rows)]
    return '\n'.join(lines)


def draw(runs: Sequence[RunLog], names: Sequence[str], beside: RunLog | None = None) -> 'Figure':
    """The curves: a colour a run, dashed for the moving average; grey for a published log.

    Raises:
        UserError: where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise UserError("matplotlib is missing: pip install 'matplotlib>=3.8'") from None
    figure = Figure(figsize=(13, 7.5), layout='constrained')
    figure.get_layout_engine().set(hspace=0.06, wspace=0.03)
    looks = [{'color': COLOURS[i % len(COLOURS)], 'marker': MARKERS[i // len(COLOURS) % len(MARKERS)]}
             for i in range(len(runs))]
    by_epoch = all(run.by_epoch for run in (*runs, *([beside] if beside else ())))
    ends = [run.entries[-1]['epoch'] + 1 if by_epoch else run.entries[-1]['step'] for run in runs if run.entries]
    averages = False
    for axes, (title, factor, columns, least_top) in zip(figure.subplots(2, 3).flat, panels(runs[0].kind),
                                                            strict=True):
        axes.set_title(title, loc='left', fontsize=11)
        settled = []  # values after the first fifth of the shortest run, which would leave the rest a flat line
        for run, look in zip(runs, looks, strict=True):
            for column, style in columns.items():
                epochs, values = run.series(column, by_epoch=by_epoch)
                axes.plot(epochs, [factor * value for value in values], style, **look, linewidth=1.5, markersize=3.5,
                          markerfacecolor='white' if style == '--' else look['color'],
                          markevery=max(1, len(epochs) // 15))
                averages |= bool(values) and style == '--'
                settled += [value for epoch, value in zip(epochs, values, strict=True) if epoch > min(ends) / 5]
        for column, style in columns.items() if beside else ():
            epochs, values = beside.series(column, by_epoch=by_epoch)
            axes.plot(epochs, [factor * value for value in values], style, **GREY)
            settled += [value for epoch, value in zip(epochs, values, strict=True)
                        if min(ends) / 5 < epoch <= max(ends)]
        axes.set_xlim(0, 1.02 * max(ends))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter('{x:g}')
        axes.spines[['top', 'right']].set_visible(False)
        axes.grid(alpha=0.25)
        if all(not len(line.get_xdata()) for line in axes.lines):
            axes.text(0.5, 0.5, 'not in the log yet', transform=axes.transAxes, ha='center', color='0.5')
            axes.set_yticks([])
        elif least_top is not None:
            axes.set_ylim(0, max(least_top, axes.get_ylim()[1]))
        elif max(ends) >= 20 and len(set(settled)) > 1:
            margin = 0.05 * (max(settled) - min(settled))
            axes.set_ylim(min(settled) - margin, max(settled) + margin)
    for axes in figure.axes[3:]:
        axes.set_xlabel('epoch' if by_epoch else 'update')
    handles = [Line2D([], [], **look, label=name) for look, name in zip(looks, names, strict=True)]
    if beside is not None:
        handles.append(Line2D([], [], **GREY, label=f'published: {beside.folder.name}'))
    if averages:
        handles += [Line2D([], [], color='0.4', linestyle=style, marker='o', markerfacecolor=face, label=label) for
                    style, face, label in (('-', '0.4', 'weights'), ('--', 'white', 'their moving average (EMA)'))]
    figure.legend(handles=handles, loc='outside upper left', ncols=min(len(handles), 4), frameon=False, fontsize=11)
    return figure


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; the first cell of a row is HTML, the others are text."""
    lines = [f'<tr>{"".join(f"<th>{html.escape(cell)}</th>" for cell in head)}</tr>']
    for first, *others in rows:
        lines.append(f'<tr><td>{first}</td>{"".join(f"<td>{html.escape(cell)}</td>" for cell in others)}</tr>')
    return '<div><table>\n' + '\n'.join(lines) + '\n</table></div>'


def page(runs: Sequence[RunLog], names: Sequence[str], picture: bytes, beside: RunLog | None = None) -> str:
    """The HTML page: no script, and nothing outside of it."""
    swatches = [f'<i style="background:{COLOURS[i % len(COLOURS)]}"></i>{html.escape(name)}'
                for i, name in enumerate(names)]
    best, (label, unit) = runs[0].kind.best, runs[0].kind.metrics[runs[0].kind.best]
    unit = f',{unit}' if unit else ''
    head = ('run', 'recipe', 'state', f'best {label}{unit}', 'last', f'best of the EMA{unit}', 'last', 'folder')
    rows = [(swatch, run.recipe['name'], run.progress, *run.accuracies(f'test_{best}'),
             *run.accuracies(f'test_{best}_ema'), str(run.folder)) for swatch, run in zip(swatches, runs, strict=True)]
    parts = [f'<h1>{html.escape(", ".join(names))}</h1>',
             f'<img alt="curves" src="data:image/png;base64,{base64.b64encode(picture).decode()}">',
             '<h2>Runs</h2>', html_table(head, rows)]
    if len(runs) > 1:
        different = [(f'<code>{html.escape(field)}</code>', *map(show, values))
                     for field, values in differences(runs).items()]
        parts += ['<h2>What the recipes differ in</h2>',
                  html_table(('field', *names), different) if different else '<p>Nothing.</p>']
    if beside is not None:
        rows = [(str(at), f'{ours:.2f}', f'{theirs:.2f}', f'{ours - theirs:+.2f}')
                for at, ours, theirs in against(runs[0], beside)[1]]
        parts += [f'<h2>{html.escape(names[0])} against {html.escape(str(beside.folder))}</h2>',
                  html_table(('at', 'ours', 'published', 'difference'), rows)]
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="{MARK}">'
            f'<title>{html.escape(", ".join(names))}</title><style>{STYLE}</style></head>\n<body>\n'
            + '\n'.join(parts) + '\n</body></html>\n')


def show(value: Any) -> str:
    """A recipe's value as one would write it."""
    if isinstance(value, (list, tuple)):
        return ', '.join(map(show, value))
    return f'{value:g}' if isinstance(value, float) else '-' if value is None else str(value)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', type=as_path, metavar='RUN', help="a run's folder (--output_dir of main.py)")
    parser.add_argument('--output', metavar='STEM', type=expand,
                        help='of the files (default: curves in the first folder)')
    parser.add_argument('--published', metavar='SOURCE', type=expand,
                        help="another log to compare with: a file, an address, released:NAME, or a run's folder")
    args = parser.parse_args(argv)
    folders = list({folder.resolve(): folder for folder in args.runs}.values())
    runs, names = [read_run(folder) for folder in folders], short_names(folders)
    for run, name in zip(runs, names, strict=True):
        if not run.entries:
            print(f'{name}: no epoch in log.txt yet')
    if not any(run.entries for run in runs):
        raise UserError('there is nothing to draw before the first epoch is finished; see the log on the terminal')
    beside = as_run(published.read(args.published), runs[0]) if args.published else None
    if beside is not None:
        print(show_differences(runs[0], beside))
    stem = args.output or str(folders[0] / 'curves')
    files = {suffix: Path(stem + suffix) for suffix in ('.png', '.html')}
    try:
        for path in files.values():
            if path.exists() and MARK.encode() not in path.read_bytes():
                raise UserError(f'{path} was not made by this tool and stays as it is; give another --output')
        picture = io.BytesIO()
        draw(runs, names, beside).savefig(picture, dpi=150, metadata={'Software': MARK})
        text = page(runs, names, picture.getvalue(), beside)
        for path, content in ((files['.png'], picture.getvalue()), (files['.html'], text.encode())):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda file, content=content: file.write(content))
            print(path)
    except OSError as error:
        raise UserError(f'cannot write {stem} ({error.strerror}); give another --output') from None


if __name__ == '__main__':
    run_cli(main)
