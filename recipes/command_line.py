"""The command line: flags made from the fields of a recipe's class and of `Run`, resolved into one of each."""
import argparse
import json
import math
import os
import re
import typing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

from recipes.batch import fit_batch
from recipes.fields import MADE_UP, UNIONS, Recipe, Run
from recipes.imagenet import Classification, is_moganet, names_file
from recipes.rows import RECIPES
from recipes.saved import check_parts, load_recipe, to_dict
from utils import UserError, align, expand, nearest, number_of

# Flags of the first release that are gone, each with what to do instead
RETIRED = {
    'resplit': 'augmentation splits are out of scope; leave it out',
    'model_key': 'the weights are found in every known format; leave it out',
    'model_prefix': 'prefixes are removed by themselves; leave it out',
    'start_epoch': 'the position comes from the checkpoint: use --resume FILE',
    'dist_eval': 'evaluation is always spread over the ranks and counts each image once; leave it out',
    'world_size': 'the launcher sets it: torchrun --nproc_per_node=N main.py ...',
    'dist_on_itp': 'use torchrun',
    'dist_url': 'use torchrun --rdzv-endpoint=HOST:PORT',
}
ALIASES = {'nb_classes': 'num_classes', 'amp': 'use_amp', 'val_path': 'eval_data_path', 'b': 'batch_size',
           'enable_wandb': 'wandb'}
# Values of other repositories' --data_set
DATA_SETS = {'IMNET': 'image_folder', 'CIFAR': 'torch/cifar100', 'folder': 'image_folder'}


def _parse(value: str, kind: Any) -> Any:
    """One command-line word as the type of a field. Raises ValueError."""
    if typing.get_origin(kind) in UNIONS:
        if value.lower() in ('none', ''):
            return None
        first, *others = typing.get_args(kind)
        return value if any(value in typing.get_args(other) for other in others) else _parse(value, first)
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise ValueError(f'choose from {", ".join(typing.get_args(kind))}')
        return value
    if kind is bool:
        if value.lower() in ('true', '1', 'yes', 'on'):
            return True
        if value.lower() in ('false', '0', 'no', 'off'):
            return False
        raise ValueError('say true or false')
    if kind in (int, float):
        try:
            number = kind(value)
        except ValueError:
            raise ValueError('give a whole number' if kind is int else 'give a number') from None
        if not math.isfinite(number):
            raise ValueError('give a finite number')
        return number
    return value


def _literal(text: str) -> Any:
    """The value of a name=value word: JSON where it is JSON (numbers, true, lists), else the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


SIZES = ('input_size', 'test_size')
SQUARE = 'images are square: give one value'


def _surplus(word: str, argv: list[str]) -> str:
    """Why a word that is no flag has no place: the flag before it takes one value alone."""
    flag, values = '', 0
    for other in argv:
        if other.startswith('--'):
            flag, _, value = other.partition('=')
            values = bool(value)
        elif other == word and values and flag:
            cure = SQUARE if flag.removeprefix('--') in SIZES else 'give one value'
            return f'{flag} takes no further value {word}; {cure}'
        else:
            values += 1
    return f'{word} belongs to no flag; see main.py --help'


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message.removeprefix('argument ') + '; see main.py --help')


class _Store(argparse.Action):
    """Parses one or several words as the field's type and stores a plain value."""

    def __init__(self, *args: Any, kind: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.kind = kind

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        kind = self.kind
        if typing.get_origin(kind) in UNIONS and typing.get_origin(typing.get_args(kind)[0]) is tuple:
            kind = None if values in (['none'], ['None']) else typing.get_args(kind)[0]
        try:
            if values is True or kind is None:  # a bare boolean, or none for a tuple
                value = values is True or None
            elif typing.get_origin(kind) is dict:
                value = {name: _literal(text) for name, text in (word.split('=', 1) for word in values)}
            elif typing.get_origin(kind) is tuple:
                inner = typing.get_args(kind)
                words = [part for word in values for part in word.split(',') if part] if inner[0] is float else values
                if inner[-1] is not Ellipsis and len(words) != len(inner):
                    raise ValueError(f'give {len(inner)} values')
                value = tuple(_parse(word, inner[0]) for word in words)
            elif isinstance(values, list):  # several test sizes
                value = tuple(_parse(word, kind) for word in values)
                value = value if len(value) > 1 else value[0]
            else:
                value = _parse(values, kind)
        except ValueError as error:
            reason = 'write name=value' if 'unpack' in str(error) or 'dictionary' in str(error) else error
            reason = f'{reason}; {SQUARE}' if self.dest in SIZES else reason
            shown = ' '.join(values) if isinstance(values, list) else values
            raise UserError(f'{option} {shown}: {reason}') from None
        setattr(namespace, self.dest, value)


def parser_of(kind: type[Recipe]) -> argparse.ArgumentParser:
    """The parser of main.py's flags, for the recipes of one class."""
    parser = _Parser(
        prog='main.py', allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Trains and evaluates MogaNet, and any other timm model.\n\n'
                    '  torchrun --nproc_per_node=8 main.py --model moganet_small --data_path /path/to/imagenet\n'
                    '  python main.py --eval --model moganet_small --checkpoint FILE --data_path /path/to/imagenet\n\n'
                    'A flag may be spelt with _ or -. Defaults are those of the recipe (--print_recipe shows them).')
    top = parser.add_argument_group('what to do')
    top.add_argument('--recipe', metavar='NAME', help='name of a recipe; by default that of --model')
    top.add_argument('--config', metavar='FILE', help='recipe.json of an earlier run, to run it again')
    top.add_argument('--list_recipes', action='store_true', help='print the table of recipes and exit')
    top.add_argument('--print_recipe', action='store_true', help='print the resolved recipe as JSON and exit')
    for title, cls in (('recipe', kind), ('run', Run)):
        group = parser.add_argument_group(f'{title}: {cls.__doc__.splitlines()[0]}')
        hints = typing.get_type_hints(cls)
        for field in fields(cls):
            if not field.metadata['flag']:
                continue
            kind = hints[field.name]
            text = field.metadata['help'].replace('%', '%%')
            options: dict[str, Any] = {'kind': kind, 'action': _Store, 'help': text}
            base = typing.get_args(kind)[0] if typing.get_origin(kind) in UNIONS else kind
            if base is bool:
                options |= {'nargs': '?', 'const': True, 'metavar': 'true|false'}
            elif typing.get_origin(base) in (tuple, dict):
                options |= {'nargs': '+', 'metavar': 'NAME=VALUE' if typing.get_origin(base) is dict else 'VALUE'}
            elif typing.get_origin(base) is Literal:
                options['metavar'] = '|'.join(typing.get_args(base))
            else:
                options['metavar'] = base.__name__.upper()
                if field.name == 'test_size':  # an evaluation takes several
                    options['nargs'] = '+'
            group.add_argument(f'--{field.name}', default=argparse.SUPPRESS, **options)
    # Kept from the first release under their old meaning; said in terms of the fields above
    for name in ('use_amp', 'imagenet_default_mean_and_std'):
        parser.add_argument(f'--{name}', action=_Store, kind=bool, nargs='?', const=True, default=argparse.SUPPRESS,
                            help=argparse.SUPPRESS)
    # torch.distributed.launch passes the local rank; the environment says it too
    parser.add_argument('--local_rank', type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _class_asked_for(words: list[str]) -> type[Recipe]:
    """The class of the recipe that a command line names; a classifier's where it names none that is known."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument('--recipe')
    parser.add_argument('--config')
    asked, _ = parser.parse_known_args([word for word in words if word not in ('--recipe', '--config')]
                                       if words[-1:] in (['--recipe'], ['--config']) else words)
    if asked.config is not None and asked.recipe is None:
        return type(load_recipe(expand(asked.config)))
    return type(RECIPES[asked.recipe]) if asked.recipe in RECIPES else Classification


def _normalise(argv: list[str]) -> list[str]:
    """The words, with flags in underscores and without aliases. Raises UserError for a retired flag, with its cure."""
    words = []
    for word in argv:
        if word.startswith('--') and len(word) > 2:
            name, equals, value = word[2:].partition('=')
            name = name.replace('-', '_')
            name = ALIASES.get(name, name)
            if name in RETIRED:
                raise UserError(f'--{name} is gone: {RETIRED[name]}')
            word = f'--{name}{equals}{value}'
        words.append(word)
    return words


def resolve(argv: list[str]) -> tuple[Recipe, Run]:
    """Turns a command line into the recipe and the run it asks for.

    The world size comes from the launcher's environment (`WORLD_SIZE`).

    Args:
        argv: the words after `main.py`.

    Raises:
        UserError: for an unknown flag, recipe or value, an impossible combination, or a batch that does not come out.
        SystemExit: after `--help`, `--list_recipes` and `--print_recipe`.
    """
    words = _normalise(argv)
    kind = _class_asked_for(words)
    parser = parser_of(kind)
    args, unknown = parser.parse_known_args(words)
    if unknown and not unknown[0].startswith('-'):
        raise UserError(_surplus(unknown[0], words))
    if unknown:
        name = unknown[0].lstrip('-').split('=')[0]
        others = [row.name for row in RECIPES.values() if name in {field.name for field in fields(row)
                                                                   if field.metadata['flag']}]
        if others:
            raise UserError(f'unknown flag --{name}: only recipes such as {others[0]} have it; choose one of them '
                            'by --recipe')
        names = [option.lstrip('-') for action in parser._actions for option in action.option_strings]
        raise UserError(f'unknown flag {unknown[0]}{nearest(name, names, prefix="--")}')
    given = vars(args)
    if given.pop('list_recipes'):
        print(text_tables())
        raise SystemExit(0)
    print_recipe = given.pop('print_recipe')
    given.pop('local_rank', None)
    for cls in (kind, Run):
        for field in fields(cls):
            if field.metadata['path'] and given.get(field.name):
                value = given[field.name]
                given[field.name] = tuple(map(expand, value)) if isinstance(value, tuple) else expand(value)
    sizes = given.get('test_size')
    if isinstance(sizes, tuple) and given.get('eval'):
        given |= {'test_size': sizes[0], 'test_sizes': sizes}
    elif isinstance(sizes, tuple):
        raise UserError(f'--test_size takes no further value {sizes[1]}; {SQUARE}')
    recipe, overridden = _resolve_recipe(given)
    run_fields = {field.name for field in fields(Run)}
    run = Run(**{name: value for name, value in given.items() if name in run_fields})
    run = replace(run, world_size=number_of('WORLD_SIZE', 1), given=overridden,
                  output_dir=run.output_dir or ('' if run.eval else f'runs/{recipe.name}'))
    recipe.check()
    run.check()
    if print_recipe:
        print(json.dumps(to_dict(recipe), indent=2))
        raise SystemExit(0)
    if run.plan:
        run = replace(run, world_size=run.gpus or recipe.gpus())
    return recipe, run if run.eval else fit_batch(recipe, run)


def check_start(recipe: Recipe, run: Run) -> None:
    """Refuses what can be seen to fail, at once and not after torch is imported: files and folders that are not there,
    stages that are frozen before they have learnt anything. Raises UserError."""
    if run.plan:  # needs neither images nor weights
        return check_data_path(recipe, run)
    if run.suite and not os.path.isdir(run.suite):
        raise UserError(f'--suite {run.suite} is no folder; give the folder that holds the sets')
    if recipe.freezes() and not (run.eval or run.finetune or run.pretrained or run.resume):
        raise UserError('what is frozen would stay at its random initial values; give --finetune FILE or --pretrained, '
                        'or --freeze_stages 0')
    check_data_path(recipe, run)
    if recipe.model:  # else a checkpoint will say what it is
        recipe.check_run(run)
    named = [('checkpoint', path) for path in run.checkpoint] + [(name, getattr(run, name)) for name in (
        'finetune', 'resume', 'valid_labels', 'real_labels', 'train_json', 'val_json', 'image_dir')]
    # A class map may also lie below the data
    if getattr(recipe, 'class_weights', None) not in (None, 'balanced'):
        named.append(('class_weights', recipe.class_weights))
    if getattr(recipe, 'teacher', None) is not None and names_file(recipe.teacher):
        named.append(('teacher', recipe.teacher))
    for name, path in named:
        if path and not re.match(r'released:|https?://', path) and not os.path.exists(path):
            raise UserError(f'--{name} {path} does not exist; check the path')
    # A checkpoint says what data it was trained on
    elsewhere = run.checkpoint or (run.eval and run.eval_data_path) or run.suite
    if recipe.data_set == 'image_folder' and not elsewhere and not Path(run.data_path).exists():
        raise UserError(f'{run.data_path} does not exist; give --data_path the folder that has train/ and val/')
    named_json = run.val_json and (run.eval or run.train_json)
    if recipe.data_set == 'coco' and not elsewhere and not named_json and not Path(run.data_path).exists():
        raise UserError(f'{run.data_path} does not exist; give --data_path the folder that has train2017/, val2017/ '
                        'and annotations/, or --train_json and --val_json')


def check_data_path(recipe: Recipe, run: Run) -> None:
    """Refuses a path of images beside a data set that reads none, and to fetch one that is not torchvision's.

    Raises:
        UserError: that names the flag.
    """
    if run.download and recipe.model and not recipe.data_set.startswith('torch/'):
        raise UserError(f'--download fetches a --data_set torch/NAME, and this is {recipe.data_set}; leave it out')
    if recipe.data_set not in MADE_UP:
        return
    for name in ('data_path', 'eval_data_path', 'train_json', 'val_json', 'image_dir'):
        if getattr(run, name) != getattr(Run, name):
            raise UserError(f'--data_set {recipe.data_set} reads no --{name}; for images of your own say --data_set '
                            f'{type(recipe).data_set}')


def row_of_model(model: str) -> Recipe:
    """The row of a model: its own, or for another timm model the default one. Raises UserError for no model at all."""
    if model in RECIPES and RECIPES[model].model == model:
        return RECIPES[model]
    if is_moganet(model):
        known = dict.fromkeys(row.model for row in RECIPES.values() if is_moganet(row.model))
        hint = f'; it is a recipe: say --recipe {model}' if model in RECIPES else nearest(model, known)
        raise UserError(f'unknown model {model}{hint}')
    return replace(RECIPES['default'], model=model)


def parse_field(kind: type[Recipe], name: str, word: str) -> Any:
    """A command line's word as the value of a recipe's field. Raises UserError."""
    try:
        return _parse(word, typing.get_type_hints(kind)[name])
    except ValueError as error:
        raise UserError(f'--{name} {word}: {error}') from None


def _resolve_recipe(given: dict[str, Any]) -> tuple[Recipe, tuple[str, ...]]:
    """The row that the flags choose with the flags that override its fields, and these fields' names."""
    name, config = given.pop('recipe', None), given.pop('config', None)
    model = given.get('model')
    if config is not None and name is not None:
        raise UserError('--config and --recipe both name the recipe; give one')
    if config is not None:
        row = load_recipe(expand(config))
    elif name is not None:
        if name not in RECIPES:
            raise UserError(f'unknown recipe {name}{nearest(name, RECIPES)}; main.py --list_recipes shows them')
        row = RECIPES[name]
    elif model is None and given.get('checkpoint'):  # the file says which
        row = replace(RECIPES['default'], model='')
    elif model is None and given.get('eval'):
        raise UserError('there is nothing to evaluate: say --checkpoint FILE, or --model NAME --pretrained')
    elif model is None:
        raise UserError('no model is given: say --model moganet_small, or --recipe NAME; main.py --list_recipes shows '
                        'them')
    else:
        row = row_of_model(model)

    if 'use_amp' in given:
        given.setdefault('precision', 'fp16' if given.pop('use_amp') else 'fp32')
    if not given.pop('imagenet_default_mean_and_std', True):
        given.setdefault('mean', (0.5,) * 3)
        given.setdefault('std', (0.5,) * 3)
    if 'data_set' in given:
        reader, slash, place = DATA_SETS.get(given['data_set'], given['data_set']).partition('/')
        given['data_set'] = f'{reader}{slash}{expand(place)}'  # hfds/~/parquet
    recipe_fields = {field.name for field in fields(row)}
    changes = {field: value for field, value in given.items() if field in recipe_fields}
    if 'input_size' in changes:
        changes.setdefault('test_size', changes['input_size'])
    if 'updates' in changes or 'epochs' in changes:  # the other way to give a length gives way
        changes = {'epochs': None, 'updates': None} | changes
    recipe = replace(row, **changes)
    check_parts(recipe, changes)
    if recipe.scale_lr:
        factor = recipe.total_batch_size / row.total_batch_size
        recipe = replace(recipe, lr=recipe.lr * factor, min_lr=recipe.min_lr * factor)
    return recipe, tuple(changes)


def text_tables() -> str:
    """The recipes as tables of text, a row each, one table a task."""
    tables = []
    for kind in dict.fromkeys(map(type, RECIPES.values())):
        rows = [row.cells() for row in RECIPES.values() if type(row) is kind]
        tables.append(align([tuple(rows[0]), *(tuple(row.values()) for row in rows)]))
    return '\n\n'.join(tables)
