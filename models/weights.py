"""Every checkpoint format turned into a plain state dict, without ever unpickling arbitrary code.

`load_weights` reads a path, a URL or `released:NAME` (a row of `released.RELEASED`) and says what the file is;
`apply_weights` puts the tensors into a model and says what matched. Formats: our training checkpoints, timm's, mmcv's
(OpenMixup), ConvNeXt's and DeiT's, bare state dicts, safetensors.
"""
import argparse
import contextlib
import json
import pickletools
import re
import struct
import sys
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors
import timm
import torch
from torch import Tensor, nn

from models.build import create_model, name_of
from models.download import download, forget, remembered
from models.moganet import Gate
from models.released import RELEASED, RELEASED_BY_FILE, RELEASED_DENSE, Which
from recipes import RECIPES, to_dict
from recipes.imagenet import TESTED_BY
from utils import UserError, expand, nearest, reason_of, write_atomically

# ---- Reading --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Weights:
    """What a checkpoint holds for a model.

    `meta` carries what is known of `model, test_size, crop_pct, crop_mode, interpolation, mean, std, classes, acc1,
    acc5` (published, %), `epoch, metric, recipe, args, released` (its name in `RELEASED`), `url, sha256, bytes`, and
    `config`: what a dense model's file says of its training where that is not the recipe's.
    """
    state_dict: dict[str, Tensor]  # our names
    gate: Gate | None  # None: neither the file nor the table says
    which: Which
    format: str  # 'training', 'timm', 'mmcv', 'deit', 'bare' or 'safetensors'
    meta: dict[str, Any] = field(default_factory=dict)
    source: str = ''

    def __str__(self) -> str:
        gate = f', {self.gate} gate' if self.gate else ''
        config = ', '.join(f'{name}={value}' for name, value in self.meta.get('config', {}).items())
        unlike = f'; unlike the recipe, it was trained with {config}' if config else ''
        return f'{self.source}: {self.which} weights, {self.format} format{gate}{unlike}'

    @property
    def dense(self) -> bool:
        """Whether it is of a network over a backbone, such as a detector."""
        return _is_dense(self.state_dict)


def load_weights(source: str | Path, which: Literal['auto', 'raw', 'ema'] = 'auto', *,
                 of_backbone: Which | None = None) -> Weights:
    """Reads a checkpoint of any known format.

    Args:
        source: a path, an https URL (`#sha256=...` at its end is checked), or `released:NAME` of `RELEASED`. URLs are
            downloaded once, into torch's hub cache. A file with a released file's name is taken for that file.
        which: the averaged weights, the plain ones, or (auto) those that reach a released file's accuracy, else the
            averaged where the file has them.
        of_backbone: which of them auto takes of a file without neck and heads.

    Raises:
        UserError: not found, damaged, not a checkpoint, without the weights asked for, or in need of code to be read.
    """
    source = str(source)
    name, url = None, None
    if source.startswith('released:'):
        name = source.removeprefix('released:')
        known = RELEASED | RELEASED_DENSE
        if name not in known:
            raise UserError(f'no released checkpoint {name!r}{nearest(name, known)} (known: {", ".join(known)})')
        url = known[name].url
    elif re.match(r'https?://', source):
        url = source
    path = download(url) if url else Path(expand(source))
    name = name or RELEASED_BY_FILE.get(path.name, '')
    row = RELEASED.get(name)
    try:
        payload, told = _read_file(path)
        sets, gate, kind, meta = _interpreted(payload, told)
    except UserError as error:
        if not url:
            raise UserError(f'{source}: {error}') from None
        forget(path)
        raise UserError(f'{source}: {error} (removed from the cache)') from None
    if row and row.weights == 'ema' and kind == 'mmcv' and list(sets) == ['raw']:
        sets = {'ema': sets['raw']}  # even without their `ema_` twins, the plain names hold the average
    if which == 'auto' and of_backbone in sets and not any(map(_is_dense, sets.values())):
        which = of_backbone
    if which == 'auto':
        which = row.weights if row and row.weights in sets else next(iter(sets))
    if which not in sets:
        raise UserError(f'{source}: has no {which} weights, only {" and ".join(sets)}: leave the choice to auto')
    if row:
        meta = {'released': name, 'interpolation': 'bicubic'} | {
            key: getattr(row, key) for key in ('model', 'test_size', 'crop_pct', 'acc1', 'acc5')} | {
            key: value for key, value in meta.items() if key in ('classes', 'epoch', 'metric', 'args')}
    if name in RELEASED_DENSE and (recipe := RECIPES.get(name)):
        meta |= {'released': name, 'model': recipe.model, 'recipe': to_dict(recipe)} | {
            key: value for key, value in recipe.expected().items() if value is not None}
        gate = gate or 'single'
    if url:
        meta |= remembered(path)
    return Weights(sets[which], gate or (row.gate if row else None), which, kind, meta, source)


# NumPy's names of the numbers a checkpoint may hold, and `struct`'s
_NUMBERS = {'b1': '?', 'i1': 'b', 'i2': 'h', 'i4': 'i', 'i8': 'q', 'u1': 'B', 'u2': 'H', 'u4': 'I', 'u8': 'Q',
            'f2': 'e', 'f4': 'f', 'f8': 'd'}


class _Dtype:
    """Stands in for `numpy.dtype` while unpickling.

    NumPy's own `__setstate__` believes the flags it is given, and an object scalar behind forged ones is a pointer that
    the file chose. Nothing of NumPy is called here.
    """

    def __init__(self, code: str, align: bool = False, copy: bool = True) -> None:
        self.format = _NUMBERS[code]

    def __setstate__(self, state: tuple) -> None:
        self.format = ('>' if state[1] == '>' else '<') + self.format[-1]


def _scalar(dtype: _Dtype, data: bytes) -> int | float | bool:
    """Stands in for NumPy's constructor of scalars: a plain number."""
    if not isinstance(dtype, _Dtype):
        raise TypeError(f'a scalar of {type(dtype).__name__}')
    return struct.unpack(dtype.format, data)[0]


# All that a pickle may name beside tensors and containers. NumPy 1 wrote `numpy.core`, NumPy 2 writes `numpy._core`.
_HARMLESS = [argparse.Namespace, (_Dtype, 'numpy.dtype'), (_scalar, 'numpy.core.multiarray.scalar'),
             (_scalar, 'numpy._core.multiarray.scalar')]


def _read_file(path: Path, *, of_index: bool = False) -> tuple[Any, dict[str, str] | None]:
    """The content of a checkpoint file and, of a safetensors file, its notes. Nothing in the file is executed.

    Args:
        of_index: the file is one of several that an index names.
    """
    if path.is_dir():
        raise UserError('is a directory: give a checkpoint file')
    try:
        with path.open('rb') as file:
            head = file.read(512)
    except OSError as error:
        raise UserError(f'cannot be read ({error.strerror}): check the path') from None
    if not head:
        raise UserError('is empty: fetch or copy it again')
    if b'\0' not in head and re.match(rb'\s*<[!?a-zA-Z]', head):
        raise UserError('is a web page, not a checkpoint: fetch it again, from the link of the file itself')
    if head.startswith(b'version https://git-lfs'):
        raise UserError('is a Git LFS pointer, not the file: run `git lfs pull`')
    if path.suffix == '.json' and b'{' in head:
        return _read_parts(path)
    if not of_index and (found := re.search(r'-\d+-of-0*([2-9]|\d{2,})\.', path.name)):
        raise UserError(f'is one of {found[1]} parts: give the index beside it (*.index.json)')
    try:
        if head[8:9] == b'{' and int.from_bytes(head[:8], 'little') < 2**32:  # length of the header, then its JSON
            with safetensors.safe_open(path, 'pt') as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        if zipfile.is_zipfile(path):  # torch reads tensors without a look at their CRC-32
            with zipfile.ZipFile(path) as archive:
                if wrong := archive.testzip():
                    raise ValueError(f'checksum of {wrong}')
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # on protocols and TorchScript: the errors below say it
            return torch.load(path, map_location='cpu', weights_only=True), None
    except Exception as error:  # whatever a damaged or hostile file makes a parser throw
        if needed := _foreign_globals(path, str(error)):
            raise UserError(f'refused: to read it, {needed} would have to be imported and called, but weights need no '
                            f'code; ask its author for a file with weights only') from None
        if 'TorchScript' in str(error):
            raise UserError('is a TorchScript program, which carries code: give the checkpoint it was made from'
                            ) from None
        reason = re.split(r'\. |\n', str(error).strip())[0][:120] or type(error).__name__
        raise UserError(f'is damaged or no checkpoint ({reason}): fetch or copy it again') from None


def _read_parts(index: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of the files, beside it, that an index names (Hugging Face's `*.index.json`)."""
    try:
        places = {str(name): Path(file).name for name, file in json.loads(index.read_text())['weight_map'].items()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f'is damaged or no checkpoint ({reason_of(error)[:200]}): an index has a weight_map') from None
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        try:
            part, _ = _read_file(index.with_name(file), of_index=True)
        except UserError as error:
            raise UserError(f'its part {file} {error}') from None
        tensors |= part if isinstance(part, Mapping) else {}
    if lost := sorted(places.keys() - tensors.keys()):
        raise UserError(f'its parts lack {len(lost)} of its {len(places)} tensors, {lost[0]} for one: fetch them again')
    return tensors, {}


def _foreign_globals(path: Path, message: str) -> str:
    """The globals for whose sake a pickle was refused: torch's word, else (protocol 4, at which torch gives up before
    it comes to a name) those that its opcodes spell out."""
    found = re.search(r'GLOBAL (\S+)', message)
    if found:
        return found[1]
    if 'Unsupported operand' not in message:
        return ''
    names, strings = [], []
    with contextlib.suppress(ValueError, KeyError, zipfile.BadZipFile), contextlib.ExitStack() as stack:
        if zipfile.is_zipfile(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            file = stack.enter_context(archive.open(next(n for n in archive.namelist() if n.endswith('data.pkl'))))
        else:
            file = stack.enter_context(path.open('rb'))
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == 'STACK_GLOBAL':
                names.append('.'.join(strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
    return ', '.join(dict.fromkeys(names))


# ---- The formats ----------------------------------------------------------------------------------------------------

Interpreted = tuple[dict[str, dict[str, Tensor]], Gate | None, str, dict[str, Any]]


# The names of a state dict and of its average in a file, by the programs that write it
_RAW = ('state_dict', 'model', 'model_state_dict', 'net', 'network', 'weights', 'params', 'module')
_AVERAGES = ('state_dict_ema', 'model_ema', 'ema_state_dict', 'model_ema_state_dict', 'params_ema', 'ema')


def _interpreted(payload: Any, told: dict[str, str] | None) -> Interpreted:
    """What `_interpret` says. Raises UserError also where a file's notes make no sense."""
    try:
        sets, gate, kind, meta = _interpret(payload, told)
        if gate not in (None, 'single', 'double'):
            raise ValueError(f'a gate {gate!r}')
        if not set(sets) <= {'raw', 'ema'}:
            raise ValueError(f'weights {" and ".join(sets)}')
        if not all(isinstance(name, str) for name in meta.get('classes', ())):
            raise ValueError('classes without names')
    except UserError:
        raise
    except Exception as error:  # a file may hold anything under any name
        raise UserError(f'says what cannot be ({type(error).__name__}: {reason_of(error)[:200]}): save the state dict '
                        'alone') from None
    return sets, gate, kind, meta


def _holds_weights(value: Any) -> bool:
    """Whether a value is a state dict, or a dict that holds one under a known name."""
    return isinstance(value, Mapping) and (any(isinstance(entry, Tensor) for entry in value.values())
                                           or any(_holds_weights(value.get(name)) for name in (*_RAW, *_AVERAGES)))


def _interpret(payload: Any, told: dict[str, str] | None) -> Interpreted:
    """Tells a file's format by its keys: ({'ema' and / or 'raw': state dict}, gate, format, meta)."""
    if not isinstance(payload, Mapping) or not payload:
        raise UserError(f'holds a {type(payload).__name__}, not weights')
    if told and 'moganet' in told:  # a safetensors file of tools/export.py
        note = json.loads(told['moganet'])
        return {note['which']: _clean(payload)}, note['gate'], 'safetensors', dict(note['meta'])
    if all(isinstance(value, Tensor) for value in payload.values()):
        return {'raw': _clean(payload)}, None, 'bare' if told is None else 'safetensors', {}
    plain, averages = ([name for name in names if _holds_weights(payload.get(name))] for names in (_RAW, _AVERAGES))
    if not plain and not averages:  # an empty one still says which model it is of
        plain = [name for name in _RAW if isinstance(payload.get(name), Mapping) and not payload[name]][:1]
    if len(plain) > 1 or len(averages) > 1:
        raise UserError(f'holds weights under several names, {", ".join(plain + averages)}: save the right ones alone')
    if plain and not averages and payload[plain[0]] and not any(
            isinstance(value, Tensor) for value in payload[plain[0]].values()):
        return _interpret(payload[plain[0]], None)  # a dict in a dict
    tensors = {name: value for name, value in payload.items() if isinstance(value, Tensor)}
    if not plain and not averages and any('.' in str(name) for name in tensors):  # beside an epoch and the like
        return {'raw': _clean(tensors)}, None, 'bare', {}
    if not plain and not averages and any(name in payload for name in (*_RAW, *_AVERAGES)):
        raise UserError('holds something other than tensors where its weights should be')
    if not plain and not averages:
        raise UserError(f'holds no weights under any name known here, only {", ".join(map(str, list(payload)[:8]))}: '
                        'save the state dict of the model alone')
    kind = 'timm' if (plain + averages)[0].startswith('state_dict') else 'deit'
    sets = {'ema': _clean(payload[averages[0]])} if averages else {}
    if plain:
        sets['ema' if payload.get('which') == 'ema' else 'raw'] = _clean(payload[plain[0]])
    raw = next(reversed(sets.values()))
    recipe = _mapping(payload.get('recipe'))
    if not recipe and any(name.startswith('backbone.') for name in raw):
        return _interpret_mmcv(raw, _mapping(payload.get('meta')))
    if recipe:
        meta = {key: recipe.get(key) for key in TESTED_BY} | {
            key: payload.get(key) for key in ('epoch', 'classes', 'class_map', 'recipe')}
        gate = recipe.get('gate') if str(recipe.get('model')).startswith('moganet') else None  # others have none
        return sets, gate, 'training', _known(meta)
    args = _mapping(payload.get('args'))
    size = args.get('img_size') or args.get('input_size')
    meta = {key: args.get(key) for key in TESTED_BY} | {key: payload.get(key) for key in (
        'epoch', 'metric', 'classes')} | {'model': payload.get('arch') or args.get('model'), 'args': args or None,
                                          'test_size': size[-1] if isinstance(size, (list, tuple)) else size}
    return sets, payload.get('gate') or _gate_in(str(args)), kind, _known(meta)


def _mapping(value: Any) -> dict[str, Any]:
    """The items of a dict or Namespace; none of anything else."""
    value = vars(value) if isinstance(value, argparse.Namespace) else value
    return dict(value) if isinstance(value, Mapping) else {}


def _known(meta: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in meta.items() if value is not None and value != ''}


def _interpret_mmcv(entries: Mapping[str, Tensor], told: dict[str, Any]) -> Interpreted:
    """mmcv's names. With an EMA hook the plain names hold the average and `ema_` entries the raw weights; their dots
    became underscores for good, so they are looked up from the plain names' side."""
    plain = {key: value for key, value in entries.items() if not key.startswith('ema_')}
    sets = {'raw': plain}
    if len(plain) < len(entries):
        twins = {key: f'ema_{key.replace(".", "_")}' for key in plain}
        lost = [twin for key, twin in twins.items() if twin not in entries and not _is_buffer(key)]
        if lost:
            raise UserError(f'has `ema_` entries, but not {lost[0]}: it is damaged or of another architecture')
        # the hook averages parameters, and a BN buffer without a twin is shared
        sets = {'ema': plain, 'raw': {key: entries.get(twin, plain[key]) for key, twin in twins.items()}}
    meta = {'epoch': told.get('epoch'), 'classes': told.get('CLASSES')}
    config = str(told.get('config'))
    if _is_dense(plain):
        return sets, _gate_in(config), 'mmcv', _known(meta | {'config': _unlike_the_recipes(config)})
    ours = {which: {key.removeprefix('backbone.').replace('head.fc.', 'head.'): value for key, value in tensors.items()}
            for which, tensors in sets.items()}
    return ours, _gate_in(config), 'mmcv', _known(meta)


# The parts of mmdet's and mmseg's networks beside the backbone
_DENSE = ('neck.', 'bbox_head.', 'rpn_head.', 'roi_head.', 'decode_head.', 'auxiliary_head.')


def _is_dense(names: Iterable[str]) -> bool:
    """Whether a state dict's names are those of a network over a backbone."""
    names = list(names)
    return any(name.startswith('backbone.') for name in names) and any(name.startswith(_DENSE) for name in names)


def _unlike_the_recipes(config: str) -> dict[str, str] | None:
    """What the text of a dense model's config says that no recipe of ours has: frozen stages and the like."""
    ours = {'frozen_stages': '-1', 'norm_eval': 'False', 'attn_force_fp32': 'False'}
    found = {name: set(re.findall(rf'\b{name}[\'"]?\s*[=:]\s*(-?\w+)', config)) - {value}
             for name, value in ours.items()}
    return {name: ' or '.join(sorted(values)) for name, values in found.items() if values} or None


def _is_buffer(name: str) -> bool:
    return name.endswith(('running_mean', 'running_var', 'num_batches_tracked'))


def _gate_in(text: str) -> Gate | None:
    """The authors' option `attn_force_fp32` applies SiLU twice: it names the gate, if a text sets it, to one value."""
    values = set(re.findall(r'attn_force_fp32[\'"]?\s*[=:]\s*(True|False)', text))
    if len(values) != 1:
        return None
    return 'double' if values == {'True'} else 'single'


def _clean(tensors: Any) -> dict[str, Tensor]:
    """A state dict without what DistributedDataParallel, torch.compile, AveragedModel and Lightning add to its names.

    Lightning's are those of the attributes in which people keep their model; no timm model has a part of these names.
    """
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError('holds something other than tensors where its weights should be')
    cleaned = {re.sub(r'^((module|model|net)\.)+', '', name.replace('_orig_mod.', '')): value
               for name, value in tensors.items()}
    if len(cleaned) < len(tensors):
        raise UserError('holds two models, under several prefixes of the same names: save the right one alone')
    return {name: value for name, value in cleaned.items() if name != 'n_averaged'}


# ---- Into a model ---------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Report:
    """What of a checkpoint went into a model: names of state-dict entries."""
    matched: list[str]
    missing: list[str]  # in the model, not in the file
    unexpected: list[str]  # in the file, not in the model
    wrong_shape: list[str]
    dropped: list[str]  # the classifier's, of another size, when fine-tuning
    fresh: list[str]  # neck and heads, of which a backbone's file has nothing
    resampled: list[str]  # of another size, as timm's own filter made them fit

    def __str__(self) -> str:
        parts = [f'{len(self.matched)} tensors loaded']
        if self.fresh:
            tops = dict.fromkeys(name.split('.')[0] for name in self.fresh)
            parts.append(f'{", ".join(tops)} start afresh: the file has a backbone alone')
        if self.dropped:
            parts.append(f'classifier of another size dropped ({", ".join(self.dropped)}): the new one starts afresh')
        for what, names in (('resampled to the size of the model', self.resampled), ('missing', self.missing),
                            ('unexpected', self.unexpected), ('of another shape', self.wrong_shape)):
            if names:
                parts.append(f'{len(names)} {what}: {_some(names)}')
        return '; '.join(parts)


def _some(names: list[str]) -> str:
    return f'{", ".join(names[:4])}{", ..." if len(names) > 4 else ""}'


def classifier_names(model: nn.Module | str) -> tuple[str, ...]:
    """The module names of a timm model's classifier, from its pretrained cfg; `model` may be a registered name."""
    cfg = timm.get_pretrained_cfg(model) if isinstance(model, str) else getattr(model, 'pretrained_cfg', None)
    names = cfg.get('classifier') if isinstance(cfg, dict) else getattr(cfg, 'classifier', None)
    return (names,) if isinstance(names, str) else tuple(names or ())


def classes_of(weights: Weights, name: str) -> int:
    """The classes that a checkpoint of the timm model `name` tells apart; 0 where it has no classifier."""
    shapes = [weights.state_dict[f'{head}.weight'].shape for head in classifier_names(name)
              if f'{head}.weight' in weights.state_dict]
    return shapes[0][0] if shapes and shapes[0] else 0


def apply_weights(model: nn.Module, weights: Weights, *, drop_classifier: bool = False) -> Report:
    """Loads a checkpoint into a model of the same architecture, any of timm's, in place.

    Args:
        drop_classifier: for fine-tuning: keep the model's classifier where the file's has another size or is missing.

    Raises:
        UserError: another classifier without `drop_classifier`; or a tensor of the backbone is missing or of another
            shape, and would stay at its random initial values; or fewer than 90 % of the file's tensors have a place,
            which is then a deeper model's. The model is then untouched.
    """
    ours, given = model.state_dict(), weights.state_dict
    given = _places(given, ours)
    lone = _is_dense(ours) and not weights.dense
    if lone and not drop_classifier:
        raise UserError(f'{weights.source}: holds a backbone alone, and no {name_of(model)}; give a file of such a '
                        'model, or train one from this by --finetune')
    fresh = [name for name in ours if name.startswith(_DENSE)] if lone else []
    classifier = tuple(f'{name}.' for name in classifier_names(model))
    of_head = {name for name in [*ours, *given] if name.startswith(classifier)} if classifier else set()
    # Counters, and tables that a model makes from its own sizes
    made = {name for name, _ in model.named_buffers() if not name.endswith(('running_mean', 'running_var'))}

    def fits(name: str, value: Tensor) -> bool:  # quantised or complex numbers are no weights of ours
        return value.shape == ours[name].shape and (value.is_floating_point() or name in made)

    unfit = [name for name in ours if name in given and not fits(name, given[name])]
    resampled = {name: value for name, value in _resampled(model, given, unfit).items() if fits(name, value)}
    given = given | resampled
    matched = [name for name in ours if name in given and fits(name, given[name])]
    missing = [name for name in ours if name not in given and name not in fresh]
    unexpected = [name for name in given if name not in ours]
    wrong_shape = [name for name in unfit if name not in resampled]

    apart = tuple(getattr(model, 'without', ()))  # parts that the model could have, and has not
    skipped = of_head | made | {name for name in given if name.startswith(apart)}

    def backbone(names: Iterable[str]) -> list[str]:
        return [name for name in names if name not in skipped and not name.endswith('num_batches_tracked')]
    lost = backbone([*missing, *wrong_shape])
    if lost or len(backbone(matched)) < 0.9 * len(backbone(given)):
        is_of = f' of {weights.meta["model"]}' if weights.meta.get('model') else ''
        raise UserError(
            f'{weights.source}: weights{is_of} do not fit {name_of(model)}: of its {len(backbone(ours))} tensors '
            f'{len(backbone(matched))} match, {len(backbone(missing))} are missing, {len(backbone(wrong_shape))} of '
            f'another shape{f" ({_some(lost)})" if lost else ""}, and {len(unexpected)} of the file have no place; '
            'give the --model the file was made with, and its --model_kwargs')
    lacking = [name for name in (*wrong_shape, *missing) if name in of_head]
    if lacking and not drop_classifier:
        has = ' x '.join(map(str, given[lacking[0]].shape)) if lacking[0] in given else 'none'
        raise UserError(f'{weights.source}: the classifier\'s {lacking[0]} is {has} in the file and '
                        f'{" x ".join(map(str, ours[lacking[0]].shape))} in the model: give --num_classes as the file '
                        f'has it, or train a new one with --finetune')
    dropped = [name for name in wrong_shape if name in of_head]
    try:
        model.load_state_dict({name: given[name] for name in matched}, strict=False)
    except Exception as error:  # tensors of a kind that cannot be copied, such as sparse ones
        raise UserError(f'{weights.source}: cannot be loaded ({reason_of(error)[:200]}): save it anew') from None
    return Report(matched, missing, unexpected, [name for name in wrong_shape if name not in of_head], dropped,
                  fresh, list(resampled))


def _places(given: dict[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names by which the model has its backbone, which in a dense model lies inside it."""
    inside = any(name.startswith('backbone.') for name in given)
    if inside == any(name.startswith('backbone.') for name in ours):
        return given
    if inside:
        return {name.removeprefix('backbone.'): value for name, value in given.items()}
    # timm's `features_only` joins the first two parts of some names: stages.0 is stages_0
    flat = {name: f'backbone.{name.replace(".", "_", 1)}' for name in given}
    return {flat[name] if flat[name] in ours else f'backbone.{name}': value for name, value in given.items()}


def _resampled(model: nn.Module, given: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """The named tensors as timm's filter for the model's checkpoints makes them, where it has one: position embeddings
    and the like, interpolated to the size of the model."""
    maker = timm.model_entrypoint(name_of(model)).__module__ if timm.is_model(name_of(model)) else ''
    filter_fn = getattr(sys.modules.get(maker), 'checkpoint_filter_fn', None)
    if not names or filter_fn is None:
        return {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of timm's and torch's own doings
            filtered = filter_fn(dict(given), model)
        return {name: filtered[name] for name in names if name in filtered}
    except Exception:  # of another model's tensors; they are refused by their shapes
        return {}


def build_model(weights: Weights, name: str | None = None, *, gate: Gate | None = None) -> nn.Module:
    """The model that a checkpoint was made with, weights loaded, in evaluation mode.

    Args:
        name: a timm model's name, for a file that does not say.
        gate: overrides the file's word.

    Raises:
        UserError: the file does not say its model, or does not fit it.
    """
    name = name or weights.meta.get('model')
    if not name:
        raise UserError(f'{weights.source}: the file does not say which model it is of: give --model')
    kwargs = dict((weights.meta.get('recipe') or {}).get('model_kwargs') or {})
    gate = gate or weights.gate
    if gate and name.startswith('moganet'):
        kwargs['gate'] = gate
    model = create_model(name, num_classes=classes_of(weights, name), **kwargs)
    apply_weights(model, weights)
    return model.eval()


# ---- Into a file ----------------------------------------------------------------------------------------------------

def save_weights(weights: Weights, path: Path) -> None:
    """Writes weights and what they need to be evaluated, no optimizer, into a file that `load_weights` reads.

    Raises:
        UserError: where it cannot be written; what was there is then left as it was.
    """
    kept = {key: weights.meta[key] for key in ('epoch', 'classes', 'class_map', 'recipe') if key in weights.meta}
    payload = {'model': weights.state_dict, 'which': weights.which, 'gate': weights.gate,
               'arch': weights.meta.get('model'), **kept}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: torch.save(payload, file))
    except OSError as error:
        raise UserError(f'cannot write {path}: {error.strerror or error}') from None
