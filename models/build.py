"""Where a run's model is made, and a look whether it takes the images that it will be given."""
import copy
from typing import Any

import timm
import torch
from torch import Tensor, nn

from utils import UserError, nearest, reason_of


def create_model(name: str, *, pretrained: bool = False, **arguments: Any) -> nn.Module:
    """timm's `create_model`. Raises UserError for an unknown name, or arguments with which the model cannot be."""
    if not timm.is_model(name):
        raise UserError(f'unknown model {name}{nearest(name, timm.list_models())}')
    try:
        return timm.create_model(name, pretrained=pretrained, **arguments)
    except OSError as error:
        raise UserError(f"timm's weights of {name} cannot be had ({reason_of(error)[:200]}); download them elsewhere "
                        "into Hugging Face's cache and copy it here (HF_HOME), or give the file by --finetune, or with "
                        '--eval by --checkpoint') from None
    except UserError:
        raise
    except Exception as error:  # anything that timm's thousand models make of arguments that they do not expect
        raise UserError(f'{name} cannot be built as the recipe says ({reason_of(error)[:200]}); see --model_kwargs, '
                        '--drop, --drop_path 0') from None


def check_forward(model: nn.Module, *, size: int, batch: int = 2, training: bool = False) -> None:
    """Passes images of a size through a copy of a model, so that one that cannot take them is known at once.

    The copy lies on torch's device `meta`, where tensors have shapes and no values: this takes little time and draws no
    random number. A few models cannot be run there, and are run on the CPU.

    Args:
        model: on any device.
        size: pixels of the square images, which have three channels.
        batch: number of the images.
        training: in training mode, in which some models do other things.

    Raises:
        UserError: where the model fails, or gives no logits [batch, classes].
    """
    reason, wanted = '', (batch, getattr(model, 'num_classes', None))
    for device in ('meta', 'cpu'):
        try:
            trial = copy.deepcopy(model).to(device).train(training)
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                logits = trial(torch.zeros(batch, 3, size, size, device=device))
        except Exception as error:  # anything, of thousands of models
            reason = reason_of(error)[:200]
            continue
        if isinstance(logits, Tensor) and logits.shape == wanted:
            return
        shape = list(logits.shape) if isinstance(logits, Tensor) else f'a {type(logits).__name__}'
        reason = f'it gives {shape}, not logits {list(wanted)}'
    cure = (f'give the size it was made for by --input_size and --test_size, or --model_kwargs img_size={size} where '
            'it knows that, and leave in_chans out')
    if batch == 1 and 'more than 1 value' in reason:  # in torch's words, a batch norm's
        cure = 'give --batch_size 2 or more'
    raise UserError(f'{name_of(model)} cannot take {batch} images of 3 x {size} x {size} ({reason}); {cure}')


def name_of(model: nn.Module) -> str:
    return (getattr(model, 'pretrained_cfg', None) or {}).get('architecture', type(model).__name__)
