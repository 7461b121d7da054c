"""What the pages say is so: every command is taken by its program, some are run, the generated parts are current."""
import argparse
import ast
import dataclasses
import functools
import importlib
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from torch.distributed.run import get_args_parser

import main
import recipes
import run_with_submitit
import runs
from builders import (
    coco_data,
    encoded,
    photo,
    tar,
    write,
    write_coco,
    write_labelled,
    write_meta,
    write_parquet,
    write_shards,
)
from conftest import ROOT
from models.released import RELEASED, RELEASED_DENSE
from recipes import RECIPES
from recipes.command_line import parser_of
from tools import architecture, docs
from utils import UserError

PAGES = ('README.md', 'INSTALL.md', 'TRAINING.md', 'RECIPES.md', 'DENSE.md', 'CONTRIBUTING.md', 'web/README.md')
CPU = ('--device', 'cpu', '--num_workers', '0')
SMALL = (*runs.TINY[2:], *CPU, '--batch_size', '8', '--total_batch_size', '8', '--epochs', '1', '--warmup_epochs', '0')


def split_page(text: str) -> tuple[list[str], list[str], str]:
    """The lines of a page's shell blocks (indented, or fenced as bash), the languages of its fences, and the rest."""
    commands, languages, prose, fence, before = [], [], [], None, ''
    for line in text.splitlines():
        if line.startswith('```'):
            fence = (line[3:] if fence is None else None)
            languages += [fence] if fence is not None else []
        elif fence == 'bash' or (fence is None and line.startswith('    ') and (not before or before[:4] == '    ')):
            commands.append(line.strip())
        elif fence is None:
            prose.append(line)
        before = line
    return commands, languages, '\n'.join(prose)


def spans(text: str) -> list[str]:
    """What stands between backticks in the prose of a page."""
    return re.findall(r'`([^`]+)`', split_page(text)[2])


def commands(page: str) -> Iterator[tuple[str, ...]]:
    """The commands of a page as words: of its blocks, and those between backticks."""
    text = (ROOT / page).read_text()
    inline = [span for span in spans(text) if re.match(r'(python|sbatch|make|pip) |(torchrun .*)?main\.py ', span)]
    for line in (*split_page(text)[0], *inline):
        words = shlex.split(line, comments=True)
        while words:
            end = words.index('&&') if '&&' in words else len(words)
            if end:
                yield tuple(words[:end])
            words = words[end + 1:]


ALL = list(dict.fromkeys((page, words) for page in PAGES for words in commands(page)))


def house() -> list[Path]:
    """The folders of the program."""
    return sorted({path.parent for path in ROOT.glob('*/*.py')} - {ROOT / 'tests'})


# ---- Every command is taken by the program it names -----------------------------------------------------------------

def resolve(argv: list[str], world_size: int, monkeypatch: pytest.MonkeyPatch) -> recipes.Run | None:
    """What main.py makes of its words; None where they ask for a text."""
    for word in argv:
        assert not word.startswith('released:') or word.removeprefix('released:') in RELEASED | RELEASED_DENSE, word
    monkeypatch.setenv('WORLD_SIZE', str(world_size))
    try:
        return recipes.resolve(argv)[1]
    except SystemExit as done:
        assert not done.code and {'--help', '--list_recipes', '--print_recipe'} & set(argv)


class Parsed(Exception):
    """Raised in place of the work that would follow."""


def parse_only(script: str, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a tool parse its words, and stops it there."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    module = importlib.import_module(script.removesuffix('.py').replace('/', '.'))
    monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', stop)
    with pytest.raises(Parsed):
        module.main(argv)


def check(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes a command as its program would. Fails for one that has no place here."""
    match [words[0].removeprefix('.venv/bin/'), *words[1:]]:
        case ['torchrun', *rest]:
            args = get_args_parser().parse_args(rest)
            assert args.training_script == 'main.py'
            resolve(args.training_script_args, int(args.nproc_per_node) * int(args.nnodes.split(':')[-1]), monkeypatch)
        case ['python', 'main.py', *rest] | ['main.py', *rest]:
            resolve(rest, 1, monkeypatch)
        case ['python', 'run_with_submitit.py', *rest]:
            args, rest = run_with_submitit.parse(rest)
            for line in run_with_submitit.commands(args, rest):
                resolve(line, args.nodes * args.gpus, monkeypatch)
        case ['sbatch', *rest]:
            at = rest.index('tools/train.sbatch')
            script = dict(re.findall(r'^#SBATCH --([\w-]+)=(\S+)', (ROOT / rest[at]).read_text(), re.MULTILINE))
            options = script | dict(word.removeprefix('--').split('=') for word in rest[:at])
            resolve(rest[at + 1:], int(options['nodes']) * int(options['gpus-per-node']), monkeypatch)
        case ['python', '-m', 'web', *rest]:
            parse_only('web/__main__.py', rest, monkeypatch)
        case ['python', '-c', code]:
            ast.parse(code)
        case ['python', script, *rest] if (ROOT / script).is_file():
            parse_only(script, rest, monkeypatch)
        case ['make', *rest]:
            targets = [word for word in rest if '=' not in word]  # the others set variables
            known = re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE)
            assert targets and set(targets) <= set(known)
        case ['pip', 'install', '-e', here]:
            known = (ROOT / 'pyproject.toml').read_text()
            assert here == '.' or all(f'{extra} = [' in known for extra in here[2:-1].split(','))
        case ['pip', 'install', *names]:
            assert names and all(re.fullmatch(r'[a-z][\w-]+(<\d+)?', name) for name in names)
        case (['git', 'clone', *_] | ['cd', _] | ['python3', '-m', 'venv', _] | ['source', '.venv/bin/activate']
              | ['conda', 'create' | 'activate', *_] | ['tensorboard', '--logdir', _]):
            pass
        case _:
            pytest.fail(f'the tests know no place for: {shlex.join(words)}')


@pytest.mark.parametrize(('page', 'words'), ALL, ids=[f'{page}: {shlex.join(words)}' for page, words in ALL])
def test_command_is_taken_by_its_program(page, words, tmp_path, monkeypatch):
    """In a folder with the files that a user would have made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'recipes.txt').write_text('moganet_tiny --lr 2e-3\n--model moganet_xtiny\n')
    saved = tmp_path / 'runs' / 'moganet_small' / 'recipe.json'
    saved.parent.mkdir(parents=True)
    saved.write_text(json.dumps(recipes.to_dict(RECIPES['moganet_small'])))
    check(words, monkeypatch)


def test_a_wrong_command_is_found(monkeypatch):
    for line in ('torchrun --nproc_per_node=3 main.py --model moganet_small', 'python main.py --modle moganet_small',
                 'torchrun --gpus=8 main.py --model moganet_small', 'sbatch --nodes=3 tools/train.sbatch --model '
                 'moganet_base', 'python run_with_submitit.py --nodes 3 --model moganet_base', 'make coffee',
                 'python tools/complexity.py --sise 224', "pip install -e '.[cuda]'", 'rm -rf runs', 'python train.py',
                 'python main.py --eval --checkpoint released:moganet_tin'):
        with monkeypatch.context() as patch, pytest.raises((UserError, SystemExit, AssertionError,
                                                            pytest.fail.Exception)):
            check(tuple(shlex.split(line)), patch)


def test_pages_have_the_commands_that_they_must():
    programs = {words[0] if words[0] != 'python' else words[1] for _, words in ALL}
    assert {'torchrun', 'main.py', 'run_with_submitit.py', 'sbatch', 'make', 'tools/check_dataset.py'} <= programs
    assert len(ALL) > 60


def test_flags_and_files_between_backticks_exist():
    kinds = {type(row) for row in recipes.RECIPES.values()}
    parsers = (*map(parser_of, kinds), run_with_submitit.parser(), get_args_parser())
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    known |= {f'--{name}' for name in run_with_submitit.SPELLINGS}
    for source in (*(ROOT / 'tools').glob('*.py'), ROOT / 'predict.py', ROOT / 'web' / '__main__.py'):
        known |= set(re.findall(r"'(--\w+)'", source.read_text() if source.exists() else ''))
    for page in PAGES:
        for span in spans((ROOT / page).read_text()):
            if span.startswith('--'):
                assert set(re.findall(r'(?<![\w-])--[\w-]+', span)) <= known, f'{page}: {span}'
            if re.fullmatch(r'[\w/]+\.(py|sbatch|md|toml)', span) and 'NAME' not in span:
                assert (ROOT / span).exists(), f'{page}: {span}'


# ---- Some are run ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    """A folder with small data for each `/path/to/` of the pages."""
    root = tmp_path_factory.mktemp('data')
    names = {1: 'n01440764', 2: 'n01443537'}
    turned = iter(range(0, 360, 11))  # degrees: no two images are equal, which --leaks would tell
    for split in ('train', 'val'):
        for name in names.values():
            for number in range(8):
                write(root / 'imagenet' / split / name / f'{number}.JPEG', encoded(photo().rotate(next(turned))))
    images = {f'ILSVRC2012_val_{number:08d}.JPEG': encoded() for number in (1, 2, 3)}
    shutil.copytree(root / 'imagenet' / 'train', root / 'flat' / 'train')
    for name, content in images.items():
        write(root / 'flat' / 'val' / name, content)
    write(root / 'tars' / 'ILSVRC2012_img_val.tar', tar(images))
    write(root / 'tars' / 'ILSVRC2012_img_train.tar', tar({f'{name}.tar': tar({
        f'{name}_{number}.JPEG': encoded() for number in range(8)}) for name in names.values()}))
    for folder in ('tars', 'work'):
        write(root / folder / 'ILSVRC2012_validation_ground_truth.txt', b'2\n1\n2\n')
        write_meta(root / folder / 'meta.mat', names)
    for split in ('train', 'val'):
        write_coco(root / 'coco', coco_data(), split=split)
        shutil.copytree(root / 'coco' / f'{split}2017', root / 'work' / 'mine' / 'images', dirs_exist_ok=True)
        write(root / 'work' / 'mine' / f'{split}.json', (
            root / 'coco' / 'annotations' / f'instances_{split}2017.json').read_bytes())
    write_labelled(root / 'ade', own=False)
    write_parquet(root / 'parquet')
    write_shards(root / 'shards')
    return root


@pytest.fixture
def run(one_thread, data, tmp_path, monkeypatch):
    """Runs a command in this process, on small data and with a small model."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.chdir(data / 'work')

    def start(words: list[str], *more: str) -> int | None:
        folder = {'own/classes': 'imagenet', 'imagenet': 'flat' if '--sort_val' in words else 'imagenet'}
        match [re.sub('/path/to/(own/classes|[a-z]+)', lambda path: f'{data}/{folder.get(path[1], path[1])}', word)
               for word in words]:
            case ['python', '-c', code]:
                exec(code, {})
            case ['python', 'main.py', *rest]:
                small = CPU if '--eval' in rest or '--print_recipe' in rest else SMALL
                return main.main([*rest, *small, *more])
            case ['python', tool, *rest]:
                return importlib.import_module(tool.removesuffix('.py').replace('/', '.')).main(rest)
    return start


def test_the_commands_of_installation_run(run, capsys):
    chosen = [list(words) for page, words in ALL if page == 'INSTALL.md' and words[0] == 'python' and
              words[1:3] != ('-m', 'web')]  # which runs until it is interrupted: tests/test_web.py
    for words in chosen:
        assert not run(words), f'{shlex.join(words)}\n{capsys.readouterr().out}'
    printed = capsys.readouterr().out
    assert len(chosen) == 13 and '2,956,066' in printed and '0.787' in printed
    assert printed.count('train: {"path"') == 8 and '3 images of' in printed


SHAPES = re.findall(r'^\| [^|]+ \| `(--data_[^`]+)` \|$', (ROOT / 'INSTALL.md').read_text(), re.MULTILINE)
NOT_HERE = {'torch/cifar10': 'its files cannot be made: tests/test_data_sources.py reads made-up ones',
            'tfds/imagenet2012': 'needs TensorFlow'}


@pytest.mark.parametrize('flags', SHAPES)
def test_each_shape_of_images_trains(flags, run, tmp_path, capsys):
    for name, reason in NOT_HERE.items():
        if name in flags:
            pytest.skip(reason)
    assert not run(['python', 'main.py', '--model', 'moganet_xtiny', *flags.split()], '--output_dir',
                   str(tmp_path / 'run')), capsys.readouterr().out
    assert 'Training is complete: 1 epochs' in capsys.readouterr().out


def test_every_shape_has_its_line():
    assert len(SHAPES) == 8


def test_the_transfer_recipe_trains_on_own_classes(run, tmp_path, capsys):
    argv = ['python', 'main.py', '--model', 'moganet_xtiny', '--data_path', '/path/to/imagenet']
    assert not run(argv, '--output_dir', str(tmp_path / 'before'))
    words = shlex.split(docs.command(RECIPES['moganet_small_transfer']).replace(
        'released:moganet_small', str(tmp_path / 'before' / 'checkpoint-best-ema.pth')))
    assert not run(words, '--output_dir', str(tmp_path / 'after')), capsys.readouterr().out
    assert json.loads((tmp_path / 'after' / 'recipe.json').read_text())['freeze_stages'] == 2


def test_recipes_are_listed_and_printed(capsys):
    assert main.main(['--list_recipes']) == main.main(['--recipe', 'moganet_large', '--print_recipe']) == 0
    printed = capsys.readouterr().out
    assert 'moganet_large_rsb_a3' in printed and '"drop_path": 0.3' in printed


# ---- Links and languages --------------------------------------------------------------------------------------------

def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r'^#+ (.*)$', split_page(path.read_text())[2], re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere_and_fences_say_their_language(page):
    text = (ROOT / page).read_text()
    assert set(split_page(text)[1]) <= {'bash', 'text', 'json', 'python', 'bibtex'}
    for target in re.findall(r'\]\(([^)]+)\)', text):
        if not target.startswith('https://'):
            name, _, anchor = target.partition('#')
            path = ROOT / (name or page)
            assert path.exists(), f'{page}: {target}'
            if path.suffix == '.md':
                assert not anchor or anchor in anchors(path), f'{page}: {target}'


# ---- What the pages quote -------------------------------------------------------------------------------------------

VARIES = '\0'  # stands for what a message puts in
QUOTING = {'TRAINING.md': '## Troubleshooting', 'INSTALL.md': '## When something fails'}
FOREIGN = {'operator torchvision::nms does not exist': 'torchvision says it',
           'module datasets has no attribute load_dataset': 'Python says it of a missing package'}


def template(node: ast.AST) -> str:
    """The text that an expression makes, as far as it stands in the source."""
    match node:
        case ast.Constant(value=str(text)):
            return re.sub(r'%[-+.\d,]*[sdfgr]', VARIES, text).replace('%%', '%')
        case ast.JoinedStr(values=parts):
            return ''.join(map(template, parts))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return template(left) + template(right)
    return VARIES


@functools.cache
def templates() -> set[str]:
    """Every text in the program's source that is no docstring."""
    found = set()
    for path in (*ROOT.glob('*.py'), *(path for folder in house() for path in folder.glob('*.py'))):
        tree = ast.parse(path.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        found |= {template(node) for node in ast.walk(tree) if id(node) not in docstrings
                  and isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp)}
    return found


def quotes(page: str) -> list[str]:
    """The messages that the first column of a page's table of errors quotes. What has no space is a name or a flag."""
    rows = re.findall(r'^\| (.*?) \| ', (ROOT / page).read_text().partition(QUOTING[page])[2], re.MULTILINE)
    return [quote for row in rows for quote in re.findall(r'`([^`]+)`', row) if ' ' in quote]


def is_said(quote: str) -> bool:
    """Whether one text of the program has what a quote has between its `...`, in that order."""
    first, *others = [piece.strip() for piece in quote.split('...') if piece.strip()]
    for text in templates():
        _, found, rest = text.partition(first)
        for piece in others:
            _, found, rest = rest.partition(piece) if found else ('', '', '')
        if found:
            return True
    return False


def test_every_quoted_message_is_in_the_source():
    quoted = [quote for page in QUOTING for quote in quotes(page)]
    assert len(quoted) > 40 and FOREIGN.keys() <= set(quoted)
    assert [quote for quote in quoted if quote not in FOREIGN and not is_said(quote)] == []


def test_a_message_that_is_gone_is_found():
    assert is_said('has label ..., but the model has ... classes')
    for quote in ('30 % of the time went into waiting for data', 'has label 1000, but the model has ... classes',
                  'the model has ... classes, but ... has label'):
        assert not is_said(quote), quote


def test_the_guide_to_training_stays_short():
    assert len((ROOT / 'TRAINING.md').read_text().splitlines()) <= 280


def test_the_floor_plan_has_a_line_for_each_file():
    tree = (ROOT / 'README.md').read_text().partition('## The house')[2].partition('```text\n')[2].partition('```')[0]
    named, folder = [], ''
    for indent, name in re.findall(r'^( *)([\w.]+/?)  +\w', tree, re.MULTILINE):
        folder = (name if name.endswith('/') else '') if not indent else folder
        named += [] if name.endswith('/') else [folder + name]
    assert len(named) == len(set(named))
    missing = {str(path.relative_to(ROOT)) for path in (*ROOT.glob('*.py'), *(
        path for folder in house() for path in folder.glob('[!_]*.py')))} - set(named)
    assert not missing, f'README.md, "The house", lacks {sorted(missing)}'
    assert all((ROOT / name).exists() for name in named)


def test_every_symbol_of_the_paper_leads_to_its_line():
    found = re.findall(r'\[`(.+)`\]\((models/\w+\.py)#L(\d+)\) \|$', (ROOT / 'README.md').read_text(), re.MULTILINE)
    assert len(found) == len(docs.SYMBOLS) == 18
    for (code, path, number), (_, piece) in zip(found, docs.SYMBOLS, strict=True):
        line = (ROOT / path).read_text().splitlines()[int(number) - 1]
        assert code in line and piece in line


def test_a_symbol_without_its_line_is_refused(monkeypatch):
    monkeypatch.setattr(docs, 'SYMBOLS', [('`Y`', 'self.no_such_layer(')])
    with pytest.raises(UserError, match='0 lines with'):
        docs.symbols()


def test_the_picture_of_the_architecture_is_of_the_model(tmp_path, monkeypatch, capsys):
    assert architecture.main(['--check']) == 0
    text = ''.join(ElementTree.parse(architecture.TARGET).getroot().itertext())
    assert '12 blocks' in text and '320 x H/16 x W/16' in text and len(architecture.TARGET.read_bytes()) < 20_000
    monkeypatch.setattr(architecture, 'TARGET', tmp_path / 'architecture.svg')
    monkeypatch.setattr(architecture, 'MODEL', 'moganet_base')
    assert architecture.main(['--check']) == 1 and not architecture.TARGET.exists()
    assert architecture.main([]) == 0 and b'22 blocks' in architecture.TARGET.read_bytes()


def test_the_citation_is_of_this_version_and_names_the_papers_authors():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    project = (ROOT / 'pyproject.toml').read_text()
    assert f'version = "{citation["version"]}"' in project and f'license = "{citation["license"]}"' in project
    paper, bibtex = citation['preferred-citation'], (ROOT / 'README.md').read_text().partition('```bibtex')[2]
    assert paper['title'] == re.search(r'title += \{(.*)\},', bibtex)[1].replace('{', '').replace('}', '')
    names = [f'{author["family-names"]}, {author["given-names"]}' for author in paper['authors']]
    assert names == re.search(r'author += \{(.*)\},', bibtex)[1].split(' and ') and len(names) == 9
    assert {'cff-version', 'message', 'title', 'authors'} <= citation.keys()  # what the format asks for


# ---- The generated parts --------------------------------------------------------------------------------------------

def test_generated_parts_are_current(capsys):
    assert docs.main(['--check']) == 0, capsys.readouterr().out


def test_every_row_has_its_line_with_the_batches_of_the_run(monkeypatch):
    text = (ROOT / 'RECIPES.md').read_text()
    for row in RECIPES.values():
        if row.name == 'default':
            continue
        found, = re.findall(rf'^\| `{row.name}` \|(.*)\| `([^|]* main\.py [^|]*)` \|$', text, re.MULTILINE)
        launcher, argv = found[1].split(' main.py ', 1)
        columns = re.findall(r'\d+ x \d+ x \d+', found[0])
        for world_size, column in zip((1, 2, 4, 8, 16), columns, strict=False):
            made = resolve(argv.split(), world_size, monkeypatch)
            assert column == f'{made.world_size} x {made.batch_size} x {made.update_freq}', row.name
            assert world_size * made.batch_size * made.update_freq == row.total_batch_size
        assert (launcher != 'python') == (len(columns) == 5), row.name
        for value in row.expected().values():
            assert value is None or f' {value:.1f}' in found[0], row.name


def test_counts_are_those_of_the_tools():
    """To 1 %: another release of torch may launch another kernel. What is written has two digits."""
    counted, kept = docs.count('moganet_xtiny', 224), docs.load_costs()['moganet_xtiny']['224']
    assert counted == pytest.approx(kept, rel=0.01) and counted['parameters'] == kept['parameters']


@pytest.mark.slow
def test_all_counts_are_those_of_the_tools():
    for model, sizes in docs.count_all().items():
        for size, counted in sizes.items():
            assert counted == pytest.approx(docs.load_costs()[model][size], rel=0.01), (model, size)


@pytest.fixture
def copy(tmp_path, monkeypatch) -> Path:
    """Copies of the generated pages, which the tool takes for the true ones."""
    for file in ('README.md', 'RECIPES.md', 'INSTALL.md', 'pyproject.toml', 'demo.ipynb'):
        shutil.copy(ROOT / file, tmp_path)
    monkeypatch.setattr(docs, 'ROOT', tmp_path)
    return tmp_path


def test_a_changed_recipe_is_stale_until_it_is_written(copy, monkeypatch, capsys):
    changed = dataclasses.replace(RECIPES['moganet_small'], expected_acc1=84.9, total_batch_size=2048)
    monkeypatch.setitem(RECIPES, 'moganet_small', changed)
    before = (copy / 'README.md').read_text()
    assert docs.main(['--check']) == 1
    assert capsys.readouterr().out == 'stale: README.md (results), RECIPES.md (imagenet)\n'
    assert (copy / 'README.md').read_text() == before
    assert docs.main([]) == 0 and docs.main(['--check']) == 0
    assert '| 84.9 | single |' in (copy / 'README.md').read_text()
    assert '| 1 x 128 x 16 | 2 x 128 x 8 |' in (copy / 'RECIPES.md').read_text()


def test_the_address_stands_in_one_place_and_is_written_from_there(copy, capsys):
    project, before = copy / 'pyproject.toml', docs.address()
    project.write_text(project.read_text().replace(before, 'https://github.com/someone/Moga.Net'))
    assert docs.main(['--check']) == 1
    assert capsys.readouterr().out == (
        'stale: README.md (colab), README.md (clone), README.md (hub), INSTALL.md (clone), demo.ipynb (address)\n')
    assert docs.main([]) == 0 and docs.main(['--check']) == 0
    button = '(https://colab.research.google.com/github/someone/Moga.Net/blob/main/demo.ipynb)'
    for file, text in (('README.md', button), ('README.md', "torch.hub.load('someone/Moga.Net', "),
                       ('INSTALL.md', 'git clone https://github.com/someone/Moga.Net MogaNet'),
                       ('demo.ipynb', "REPOSITORY = 'https://github.com/someone/Moga.Net'")):
        assert text in (copy / file).read_text()
    name = before.removeprefix('https://github.com/')
    assert not [path.name for path in copy.iterdir() if name in path.read_text()]  # a second place would be left
    project.write_text('')
    with pytest.raises(UserError, match=r'pyproject\.toml has no line Repository = '):
        docs.main([])


def test_a_page_without_its_markers_and_a_model_without_counts_are_refused(copy, monkeypatch):
    (copy / 'README.md').write_text('# MogaNet\n')
    with pytest.raises(UserError, match=r'there are 0 parts `<!-- results: '):
        docs.main([])
    monkeypatch.setitem(RECIPES, 'moganet_base', dataclasses.replace(RECIPES['moganet_base'], micro_batch_size=64))
    with pytest.raises(UserError, match=r'memory.json is of another micro-batch or precision of moganet_base;'):
        docs.needs()
    monkeypatch.setitem(RECIPES, 'moganet_small', dataclasses.replace(RECIPES['moganet_small'], input_size=192))
    with pytest.raises(UserError, match=r'no counts of moganet_small at 192 pixels; run tools/docs\.py --count'):
        docs.load_costs()
