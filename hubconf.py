"""The six MogaNets for torch.hub: `torch.hub.load(ADDRESS_OR_FOLDER, 'moganet_tiny', pretrained=True)`.

torch.hub puts this folder on its caller's path, where `utils`, `datasets` and `models` are the caller's names as well.
So the model's file is loaded by its path, and what reads a released file is imported apart and then taken out of
`sys.modules`. All that is callable here without an underscore is an entry of torch.hub.
"""
import collections.abc
import contextlib
import importlib.util
import pathlib
import sys
import types
import typing

dependencies = ['torch', 'timm']
_ROOT = pathlib.Path(__file__).resolve().parent
_ARGUMENTS = """

    Args:
        pretrained: with the authors' ImageNet-1k weights, downloaded once. The file's gate is taken over, and nothing
            in the file is executed. With `num_classes` other than 1000 the classifier is made anew.
        kwargs: timm's, as `num_classes`, `in_chans`, `features_only` and `out_indices`, and those of `MogaNet`, as
            `drop_path_rate` and `gate`. `pretrained_cfg='in1k_256'` chooses another released file of the model;
            `pretrained_cfg_overlay={'file': PATH}` reads a checkpoint of any format, of this repository too.

    Raises:
        RuntimeError: the weights cannot be fetched or read, or would need code to be run.
    """


def _load_by_path() -> types.ModuleType:
    """`models/moganet.py` under a name that no other module has; twice the same, so that its models can be pickled."""
    name, path = 'moganet_of_torch_hub', _ROOT / 'models' / 'moganet.py'
    if name in sys.modules and sys.modules[name].__file__ == str(path):
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _repository() -> collections.abc.Iterator[None]:
    """For its time `models`, `recipes` and `utils` are this repository's; the caller's are put back after it."""
    def taken_out() -> dict[str, types.ModuleType]:
        return {name: sys.modules.pop(name) for name in list(sys.modules)
                if name.partition('.')[0] in ('models', 'recipes', 'utils')}

    callers, path = taken_out(), sys.path[:]
    sys.path.insert(0, str(_ROOT))
    try:
        yield
    finally:
        taken_out()
        sys.modules.update(callers)
        sys.path[:] = path


def _register_released() -> None:
    """Makes the released files the pretrained weights of the models, read by this repository's rules."""
    with _repository():
        from models.released import pretrained_cfgs
        from models.weights import load_weights
        from utils import UserError

    def read(source: str) -> tuple[dict[str, typing.Any], str | None]:
        try:
            weights = load_weights(source)
        except UserError as error:  # a class that the caller cannot name
            raise RuntimeError(str(error)) from None
        return weights.state_dict, weights.gate

    _moganet.register(pretrained_cfgs(), read)


def _entry(create: collections.abc.Callable[..., typing.Any]) -> collections.abc.Callable[..., typing.Any]:
    def entry(pretrained: bool = False, **kwargs: typing.Any) -> typing.Any:
        if pretrained:
            _register_released()
        return create(pretrained, **kwargs)

    entry.__name__, entry.__doc__ = create.__name__, f"{create.__doc__}{_ARGUMENTS}"
    return entry


_moganet = _load_by_path()
moganet_xtiny = _entry(_moganet.moganet_xtiny)
moganet_tiny = _entry(_moganet.moganet_tiny)
moganet_small = _entry(_moganet.moganet_small)
moganet_base = _entry(_moganet.moganet_base)
moganet_large = _entry(_moganet.moganet_large)
moganet_xlarge = _entry(_moganet.moganet_xlarge)
