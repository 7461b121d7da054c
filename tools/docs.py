"""Writes what the pages say about recipes and model: the tables of RECIPES.md and README.md. It also writes the
repository's address, from pyproject.toml, wherever it is used.

    python tools/docs.py            # rewrites what is stale
    python tools/docs.py --check    # names what is stale, with exit status 1, and changes nothing
    python tools/docs.py --count    # first counts the models anew (docs.json): minutes, after a change of the models

A generated part stands between `<!-- NAME: ... -->` and `<!-- end of NAME -->`.
"""
import argparse
import json
import math
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recipes import RECIPES, Classification, Run, fit_batch
from recipes.ade20k import Segmentation
from recipes.coco import Detection
from recipes.dense import Dense
from recipes.fields import Recipe
from recipes.imagenet import S
from utils import UserError, run_cli, write_atomically

ROOT = Path(__file__).resolve().parent.parent
# {model: {image side: parameters, GMACs, and MB that a training step moves for an image, in bf16 and in fp32}}; of the
# rows of dense tasks {recipe: {WIDTHxHEIGHT: parameters and GMACs}}
COSTS = ROOT / 'tools' / 'docs.json'
Costs = dict[str, dict[str, dict[str, float]]]

# The paper's table: millions of parameters by model, GMACs by model and test size (XL: the authors' repository)
PUBLISHED_PARAMETERS = {'moganet_xtiny': '2.97', 'moganet_tiny': '5.20', 'moganet_small': '25.3',
                        'moganet_base': '43.9', 'moganet_large': '82.5', 'moganet_xlarge': '180.8'}
PUBLISHED_GMACS = {('moganet_xtiny', 224): '0.80', ('moganet_tiny', 224): '1.10', ('moganet_tiny', 256): '1.44',
                   ('moganet_small', 224): '4.97', ('moganet_base', 224): '9.93', ('moganet_large', 224): '15.9',
                   ('moganet_xlarge', 224): '34.5'}

PROCESSES = {1: '1 GPU', 2: '2 GPUs', 4: '4 GPUs', 8: '8 GPUs', 16: '2 nodes of 8'}
# Where the pages say that the images of a data set lie; a data set that is made up lies nowhere
DATA = {'image_folder': '/path/to/imagenet', 'coco': '/path/to/coco', 'ade20k': '/path/to/ade20k',
        'torch/cifar10': '/path/to/cifar', 'torch/cifar100': '/path/to/cifar'}


def all_rows() -> list[Classification]:
    """The rows of image classification."""
    return [row for row in RECIPES.values() if isinstance(row, Classification)]


def count(model: str, size: int) -> dict[str, float]:
    """What docs.json holds of a model at an image size."""
    from tools.benchmark_model import measure_traffic
    from tools.complexity import complexity
    counts, (traffic,) = complexity(model, size), measure_traffic([model], input_size=size)
    return {'parameters': counts['parameters'], 'gmacs': round(counts['macs'] / 1e9, 3), 'mb': round(traffic['mb']),
            'fp32_mb': round(traffic['fp32_mb'])}


def count_all() -> Costs:
    """Counts every model at every image size of its recipes."""
    from tools.complexity import complexity
    sizes: dict[str, set[int]] = {}
    for row in all_rows():
        sizes.setdefault(row.model, set()).update((row.input_size, row.test_size))
    counted = {model: {str(size): count(model, size) for size in sorted(chosen)} for model, chosen in sizes.items()}
    for row in RECIPES.values():
        if isinstance(row, Dense):
            counts = complexity(row.name, row.count_size())
            counted[row.name] = {size_of(row): {'parameters': counts['parameters'],
                                                'gmacs': round(counts['macs'] / 1e9, 1)}}
    return counted


def size_of(row: Dense) -> str:
    """The image for which a dense row's multiply-accumulates are told, as WIDTHxHEIGHT."""
    return 'x'.join(map(str, reversed(row.count_size())))


def load_costs() -> Costs:
    """The counts in docs.json. Raises UserError where there are none for a recipe."""
    costs = json.loads(COSTS.read_text()) if COSTS.exists() else {}
    for row in all_rows():
        for size in (row.input_size, row.test_size):
            if str(size) not in costs.get(row.model, {}):
                raise UserError(f'{COSTS.name} has no counts of {row.model} at {size} pixels; run tools/docs.py '
                                '--count')
    for row in RECIPES.values():
        if isinstance(row, Dense) and size_of(row) not in costs.get(row.name, {}):
            raise UserError(f'{COSTS.name} has no counts of {row.name}; run tools/docs.py --count')
    return costs


# ---- What is written ------------------------------------------------------------------------------------------------

def is_ours(row: Recipe) -> bool:
    """Whether a row was published by nobody else."""
    return row.source.startswith('this project')


def command(row: Recipe) -> str:
    """The command line that trains a row on the hardware of the row."""
    gpus, tuned = row.gpus(), row.name.endswith(('_ft384', '_transfer'))
    words = ['python' if gpus == 1 else f'torchrun --nproc_per_node={gpus}', 'main.py',
             f'--model {row.model}' if row.name == row.model else f'--recipe {row.name}']
    if row.data_set in DATA:
        if tuned or isinstance(row, Dense):
            words.append(f'--finetune released:{row.model}')
        words.append(f'--data_path {"/path/to/own/classes" if row.name.endswith("_transfer") else DATA[row.data_set]}')
    return ' '.join(words)


def macs(row: Recipe, costs: Costs) -> str:
    """The multiply-accumulates of a test image of a row, and the side or the sides of that image."""
    if isinstance(row, Dense):
        return f'{costs[row.name][size_of(row)]["gmacs"]:.1f} at {size_of(row)}'
    return f'{costs[row.model][str(row.test_size)]["gmacs"]:.3f} at {row.test_size}'


def line(row: Recipe, costs: Costs) -> list[str]:
    """The line of a row in RECIPES.md. The batch of a row of one device is not spread over several."""
    batches = [''] * len(PROCESSES)
    if row.gpus() > 1:
        fitted = [fit_batch(row, Run(world_size=processes)) for processes in PROCESSES]
        batches = [f'{run.world_size} x {run.batch_size} x {run.update_freq}' for run in fitted]
    expected = [f'{row.metrics[name][0]} {value:.1f}{row.metrics[name][1]}' for name, value in row.expected().items()
                if value is not None]
    return [f'`{row.name}`', ', '.join(expected) or 'not published', macs(row, costs), *batches, f'`{command(row)}`']


def table_of(belongs: Callable[[Recipe], bool]) -> str:
    """The table of the rows that belong to it, and their sources."""
    from tools.benchmark_report import markdown_table
    costs, rows = load_costs(), [row for row in RECIPES.values() if row.name != 'default' and belongs(row)]
    sources: dict[str, list[str]] = {}
    for row in rows:
        sources.setdefault(row.source, []).append(f'`{row.name}`')
    told = [f'- {source}: {"all rows" if len(sources) == 1 else ", ".join(names)}' for source, names in sources.items()]
    heads = ('recipe', 'expected', 'GMACs', *PROCESSES.values(), 'command')
    return '\n'.join([markdown_table(heads, [line(row, costs) for row in rows]), '', 'Sources:', '', *told])


def dense_results(kind: type[Dense]) -> str:
    """The table of the published rows of a task."""
    costs, rows = load_costs(), [row for row in RECIPES.values() if type(row) is kind and any(row.expected().values())]
    names = list(dict.fromkeys(name for row in rows for name in row.expected()))
    heads = [f'{kind.metrics[name][0]}{"," if kind.metrics[name][1] else ""}{kind.metrics[name][1]}' for name in names]
    lines = [f'| recipe | parameters, M (published) | GMACs at {size_of(rows[0])} (published) | {" | ".join(heads)} |',
             '|---' * (3 + len(names)) + '|']
    for row in rows:
        cost = costs[row.name][size_of(row)]
        values = [f'{value:.1f}' if (value := row.expected().get(name)) else '-' for name in names]
        parameters, gmacs = (f' ({value:g})' if value else ''
                             for value in (row.expected_parameters, row.expected_flops))
        lines.append(f'| `{row.name}` | {cost["parameters"] / 1e6:.2f}{parameters} | '
                     f'{cost["gmacs"]:.1f}{gmacs} | {" | ".join(values)} |')
    return '\n'.join(lines)


def results() -> str:
    """The table of the published rows."""
    costs = load_costs()
    lines = ['| recipe | train/test | parameters, M (published) | GMACs (published) | top-1, % | gate |',
             '|---|---|---|---|---|---|']

    def counted(value: str, published: str | None) -> str:
        return f'{value} ({published})' if published else value

    for row in all_rows():
        if row.expected_acc1 is None or row.data_set != 'image_folder':
            continue
        cost = costs[row.model][str(row.test_size)]
        size = f'{row.test_size}' if row.input_size == row.test_size else f'{row.input_size}/{row.test_size}'
        parameters = counted(f'{cost["parameters"] / 1e6:.3f}', PUBLISHED_PARAMETERS[row.model])
        gmacs = counted(f'{cost["gmacs"]:.3f}', PUBLISHED_GMACS.get((row.model, row.test_size)))
        accuracy = f'{row.expected_acc1:.1f}' if row.source.startswith(S) else f'({row.expected_acc1:.1f})'
        name = f'`{row.name}`{"" if row.epochs == 300 else f", {row.epochs} epochs"}'
        lines.append(f'| {name} | {size} | {parameters} | {gmacs} | {accuracy} | {row.gate} |')
    return '\n'.join(lines)


def feeding() -> str:
    """What a core makes of images, and how many cores eight GPUs need."""
    from tools.benchmark_report import load, markdown_table
    rates = load()['cpu']['data']['images_per_second_and_core']
    # uint8 tensors on both sides: the GPU normalises and erases
    rows = {'this data path': rates['this_uint8'], 'the common pipeline': rates['timm_uint8']}
    return markdown_table(('', 'images/s and core', 'cores for 8 GPUs at 1,200 images/s each'),
                 [[name, f'{rate:.0f}', f'{8 * 1200 / rate:.1f}'] for name, rate in rows.items()])


def speed() -> str:
    """What of BENCHMARKS.md matters most, in a sentence."""
    from tools.benchmark_report import cell, load
    figures = load()
    cpu = figures['cpu']
    traffic = max(row['ratio'] for row in cpu['traffic'])
    # The last two forms: that of main.py, and the same compiled
    *_, default, compiled = (cell(row['speedup']) for row in cpu['model'] if row['mode'] == 'training')
    gpu = '' if 'cuda' in figures else ', where a GPU is not measured yet'
    return textwrap.fill(
        f"It is also fast: a training step moves {traffic:.2f} of the memory traffic of the authors' formulation; on "
        f'two cores, a step of {cpu["model"][0]["model"]} is {default} times as fast, {compiled} compiled; and a core '
        f'prepares {cell(cpu["data"]["ratio_uint8"])} times the images of the usual pipeline. These are medians, and '
        'in brackets the smallest and the largest, of alternated runs. All '
        f'figures are in [BENCHMARKS.md](BENCHMARKS.md){gpu}.', 120)


# What the paper calls a thing, and a piece of the one line of the model that is it
MODEL = 'models/moganet.py'
SOURCE = ROOT / MODEL
SYMBOLS = (
    ('`Y = X + SMixer(Norm(X))`', 'torch.addcmul(x, scale, self.attn(u) + u)'),
    ('`Z = Y + CMixer(Norm(Y))`', 'torch.addcmul(x, scale, self.mlp(self.norm2(x)))'),
    ('`Norm`, batch normalisation', 'self.norm1 = nn.BatchNorm2d(dim'),
    ('`FD(.)`, feature decomposition: `Y + gamma_s (Y - GAP(Y))` of `Y = Conv1x1(X)`',
     '.mean((2, 3), keepdim=True), scaled)'),
    ('`gamma_s` and `gamma_c`, learned scales', 'self.scale = nn.Parameter('),
    ('`Moga(.)`, multi-order gated aggregation', 'class MultiOrderGatedAggregation('),
    ('`DW 5x5, d = 1`', 'self.DW_conv0 = nn.Conv2d('),
    ('`DW 5x5, d = 2`', 'self.DW_conv1 = nn.Conv2d('),
    ('`DW 7x7, d = 3`', 'self.DW_conv2 = nn.Conv2d('),
    ('`C_l : C_m : C_h = 1 : 3 : 4`', 'mid, high = dim * 3 // 8, dim // 2'),
    ('`Y_C = Concat(Y_l, Y_m, Y_h)`, and the 1x1 after it', 'torch.cat([low, self.DW_conv1(mid), self.DW_conv2(high)]'),
    ('`F_phi`, gating branch; `G_psi`, context branch', 'gate, value = self.gate(y), self.value(y)'),
    ('`SiLU(Conv1x1(X)) * SiLU(Conv1x1(Y_C))`', 'self.proj_2(F.silu(gate) * F.silu(value))'),
    ('`DW 3x3` of the channel mixer', 'self.dwconv = nn.Conv2d('),
    ('`CA(X) = X + gamma_c (X - GELU(X W_r))`, with the 1x1 after it', 'self.fc2.bias) + '),
    ('`W_r`, from all channels to one', 'self.decompose = nn.Conv2d('),
    ('`GELU(X W_r)`', 'common = F.gelu(self.decompose(x))'),
    ('embedding stem', 'class Stem('),
)


def symbols() -> str:
    """Where in the code each symbol of the paper is. Raises UserError where a piece is not in one line."""
    lines = SOURCE.read_text().splitlines()
    rows = ['| in the paper | in the code |', '|---|---|']
    for symbol, piece in SYMBOLS:
        places = [number for number, line in enumerate(lines, 1) if piece in line]
        if len(places) != 1:
            raise UserError(f'{MODEL} has {len(places)} lines with {piece!r}; make it one in SYMBOLS')
        rows.append(f'| {symbol} | [`{lines[places[0] - 1].strip().rstrip(":")}`]({MODEL}#L{places[0]}) |')
    return '\n'.join(rows)


def predicted(row: Classification, costs: Costs, card: str, *, precision: str) -> str:
    """The images a second that a training step may take on a card, to two digits, by what its memory moves."""
    from training.plan import BANDWIDTH, CARDS
    moved = 1e6 * costs[row.model][str(row.input_size)]['fp32_mb' if precision == 'fp32' else 'mb']
    rates = [share * CARDS[card].bandwidth / moved for share in BANDWIDTH]
    digits = 10 ** (math.floor(math.log10(rates[0])) - 1)
    return '-'.join(f'{round(rate / digits) * digits:,}' for rate in rates)


def needs() -> str:
    """What a GPU needs and does for a row: the allocator's peak (benchmarks/memory.json), and predicted images/s."""
    from tools.benchmark_memory import FIGURES, FORMS
    from tools.benchmark_report import markdown_table
    kept, costs, lines = json.loads(FIGURES.read_text()), load_costs(), []
    for row in RECIPES.values():
        if row.name not in kept:
            continue
        figures = kept[row.name]
        if (figures['micro_batch'], figures['precision']) != (row.micro_batch_size, row.precision):
            raise UserError(f'{FIGURES.name} is of another micro-batch or precision of {row.name}; on a GPU run '
                            f'tools/benchmark.py memory {row.name}')
        forms = [(card, precision) for precision in (row.precision, 'bf16') for card in ('a100', 'h100')]
        rates = [predicted(row, costs, card, precision=precision) if isinstance(row, Classification) else ''
                 for card, precision in forms]
        lines.append([f'`{row.name}`, {row.precision}', str(row.micro_batch_size), *(
            f'{found["allocated"]:.1f} ({found["reserved"]:.1f})' if found else 'too much'
            for found in map(figures.get, FORMS)), *rates])
    heads = ('row', 'micro-batch', *(f'GiB {form}' for form in FORMS), 'images/s, A100', 'H100', 'bf16, A100',
             'bf16, H100')
    return markdown_table(heads, lines)


def address() -> str:
    """The repository's address on GitHub. Raises UserError where pyproject.toml has none."""
    found = re.search(r'^Repository = "(https://github\.com/[\w.-]+/[\w.-]+)"$', (ROOT / 'pyproject.toml').read_text(),
                      re.MULTILINE)
    if not found:
        raise UserError('pyproject.toml has no line Repository = "https://github.com/OWNER/NAME"; write it there')
    return found[1]


def badge() -> str:
    """The button that opens the notebook on Colab."""
    link = address().replace('https://github.com', 'https://colab.research.google.com/github')
    return f'[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link}/blob/main/demo.ipynb)'


def hub() -> str:
    """How torch.hub loads a model, from the address and from a folder."""
    name = address().removeprefix('https://github.com/')
    return f"""```python
model = torch.hub.load('{name}', 'moganet_tiny', pretrained=True)
model = torch.hub.load('/path/to/MogaNet', 'moganet_tiny', source='local', pretrained=True)
```"""


def clone() -> str:
    """The first commands of INSTALL.md."""
    return f'    git clone {address()} MogaNet && cd MogaNet\n    make demo'


PARTS = {
    ('README.md', 'results'): results,
    ('README.md', 'coco'): lambda: dense_results(Detection),
    ('README.md', 'ade20k'): lambda: dense_results(Segmentation),
    ('README.md', 'speed'): speed,
    ('README.md', 'symbols'): symbols,
    ('RECIPES.md', 'imagenet'): lambda: table_of(lambda row: type(row) is Classification and not is_ours(row)),
    ('RECIPES.md', 'coco'): lambda: table_of(lambda row: type(row) is Detection and not is_ours(row)),
    ('RECIPES.md', 'ade20k'): lambda: table_of(lambda row: type(row) is Segmentation and not is_ours(row)),
    ('RECIPES.md', 'ours'): lambda: table_of(is_ours),
    ('RECIPES.md', 'needs'): needs,
    ('RECIPES.md', 'feeding'): feeding,
    ('README.md', 'colab'): badge,
    ('README.md', 'clone'): clone,
    ('README.md', 'hub'): hub,
    ('INSTALL.md', 'clone'): clone,
}


def rewrite(text: str, name: str, content: str) -> str:
    """A document with the content of a generated part in place. Raises UserError where its markers are not there."""
    part = re.compile(f'(<!-- {name}: [^\n]*-->\n).*?(<!-- end of {name} -->)', re.DOTALL)
    new, places = part.subn(lambda match: f'{match[1]}\n{content}\n\n{match[2]}', text)
    if places != 1:
        raise UserError(f'there are {places} parts `<!-- {name}: ... -->` to `<!-- end of {name} -->`; make it one')
    return new


def main(argv: Sequence[str] | None = None) -> int:
    """Writes or checks the documents. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='change nothing, and name what is stale')
    parser.add_argument('--count', action='store_true', help='count the models anew, too')
    args = parser.parse_args(argv)
    stale = []

    def update(path: Path, text: str, what: str) -> None:
        if not path.exists() or path.read_text() != text:
            stale.append(f'{path.name}{what}')
            if not args.check:
                write_atomically(path, lambda file: file.write(text.encode()))

    if args.count:
        update(COSTS, json.dumps(count_all(), indent=1) + '\n', '')
    for (name, part), content in PARTS.items():
        path = ROOT / name
        update(path, rewrite(path.read_text(), part, content()), f' ({part})')
    notebook = ROOT / 'demo.ipynb'
    update(notebook, re.sub(r"(?<=REPOSITORY = ')[^']*", address(), notebook.read_text()), ' (address)')
    if stale:
        print(f'{"stale" if args.check else "rewritten"}: {", ".join(stale)}')
    return 1 if stale and args.check else 0


if __name__ == '__main__':
    run_cli(main)
