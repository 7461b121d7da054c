"""The parts that a recipe names: a model that cannot do what is asked is known before the training starts."""
import copy
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

import models  # noqa: F401, registers the MogaNets
import optim_factory
from models.build import check_forward
from recipes import resolve
from tasks import create_task
from training.start import build_step, compile_errors, prepare_model
from utils import Processes, UserError, choose_device

MOGANET = '--model moganet_xtiny --model_kwargs dims=[8,8,16,16] depths=[1,1,1,1] ffn_ratios=[2,2,2,2]'
VIT = '--model vit_tiny_patch16_224 --model_kwargs depth=1 embed_dim=12'
SMALL = '--input_size 32 --total_batch_size 4 --batch_size 4'


def build(words):
    recipe, run = resolve(words.split())
    return prepare_model(create_task(replace(recipe, num_classes=3), run), run, torch.device('cpu'))


@pytest.mark.parametrize('words, said', [
    (f'{MOGANET} in_chans=1 {SMALL}', r'moganet_xtiny cannot take 4 images of 3 x 32 x 32 .*leave in_chans out'),
    (f'{VIT} {SMALL}', r'vit_tiny_patch16_224 cannot take 4 images of 3 x 32 x 32 .*--model_kwargs img_size=32'),
    (f'{VIT} img_size=32 {SMALL} --test_size 64', r'cannot take 2 images of 3 x 64 x 64 .*--test_size'),
    (f'--eval --checkpoint x {VIT} --test_size 64', r'cannot take 2 images of 3 x 64 x 64'),
    ('--model resnet10t --input_size 32 --total_batch_size 1 --batch_size 1', r'cannot take 1 images .*--batch_size 2'),
    (f'{VIT} embed_dim=13 {SMALL}', r'vit_tiny_patch16_224 cannot be built as the recipe says'),
    (f'{VIT} global_pool= {SMALL}', r'vit_tiny_patch16_224 cannot (take|be built)'),
    (f'{MOGANET} dims=0 {SMALL}', r'moganet_xtiny cannot be built as the recipe says .*--model_kwargs'),
    (f'{MOGANET} dims=text {SMALL}', r'moganet_xtiny cannot be built as the recipe says .*--model_kwargs')])
def test_model_that_cannot_do_what_the_recipe_says_is_one_line(words, said):
    with pytest.raises(UserError, match=said) as error:
        build(words)
    assert '\n' not in str(error.value)


def test_model_that_fits_its_images_is_built():
    for words in (f'{MOGANET} {SMALL}', f'{VIT} img_size=32 {SMALL} --test_size 32',
                  f'{VIT} dynamic_img_size=true {SMALL} --test_size 64'):
        assert build(words).num_classes == 3


def test_trying_a_model_changes_nothing_in_it_and_draws_no_random_number():
    model = timm.create_model('resnet10t', num_classes=3, drop_rate=0.5)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    check_forward(model, size=32, training=True)
    check_forward(model, size=32)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Odd(nn.Module):
    """Pools its images; asks for a value, which tensors without values do not have; gives what it is told to."""

    num_classes = 3

    def __init__(self, result):
        super().__init__()
        self.result, self.drop = result, nn.Dropout()

    def forward(self, images):
        if self.result is None:
            images.mean().item()
        return self.result or self.drop(images.mean((2, 3)))


def test_a_model_that_needs_values_is_tried_on_the_cpu_and_one_without_logits_refused():
    state = torch.get_rng_state()
    check_forward(Odd(None), size=8, training=True)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(UserError, match=r'it gives a tuple, not logits \[2, 3\]'):
        check_forward(Odd((1, 2)), size=8)
    with pytest.raises(UserError, match=r'Odd cannot take .*it gives a str'):
        check_forward(Odd('logits'), size=8)


@pytest.mark.parametrize('gate_fp32', [False, True])
def test_a_moganet_is_tried_without_values(gate_fp32):
    recipe, _ = resolve(f'{MOGANET} {SMALL} --gate_fp32 {gate_fp32}'.split())
    model, tried = timm.create_model(recipe.model, num_classes=3, **recipe.arguments()), []
    model.register_forward_pre_hook(lambda module, inputs: tried.append(inputs[0].device.type))
    check_forward(model, size=32, training=True)
    assert tried == ['meta']


def test_both_classifiers_of_a_distilled_model_are_probed():
    model = timm.create_model('deit_tiny_distilled_patch16_224', num_classes=3, depth=1, img_size=32)
    optim_factory.freeze(model, linear_probe=True)
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    assert trained == {'head.weight', 'head.bias', 'head_dist.weight', 'head_dist.bias'}


class Unnamed(Odd):
    def group_matcher(self, coarse=False):
        raise AssertionError('not implemented')  # as timm's RDNet


@pytest.mark.parametrize('kind', [Odd, Unnamed])
def test_model_that_does_not_name_its_layers_is_told_the_other_way(kind):
    with pytest.raises(UserError, match=f'--layer_decay: {kind.__name__} does not name its layers; give 1'):
        optim_factory.layer_ids(kind(None))
    with pytest.raises(UserError, match=f'--freeze_stages: {kind.__name__} .*use --linear_probe'):
        optim_factory.freeze(kind(None), stages=1)


def test_only_what_the_compiler_raises_is_told_as_its_failure():
    def broken(graph, inputs):
        raise OSError('no C++ compiler\nfound')

    model = nn.Linear(2, 2)
    model.compile(backend=broken)
    with pytest.raises(UserError, match=r'--compile: torch cannot compile .*install a C\+\+ compiler') as error, \
            compile_errors():
        model(torch.ones(1, 2))
    assert '\n' not in str(error.value)
    with pytest.raises(OSError, match='full'), compile_errors():
        raise OSError('the disk is full')


# ---- Devices --------------------------------------------------------------------------------------------------------

@pytest.fixture
def gpus(monkeypatch):
    """A machine on which torch counts so many GPUs, of which nothing is used."""
    def of(count: int, **environment: str) -> None:
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: count > 0)
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: count)
        monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
        monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
    return of


def test_each_process_takes_the_gpu_of_its_rank_or_the_one_that_it_is_shown(gpus):
    gpus(4)
    assert choose_device('cuda', 3) == torch.device('cuda', 3)
    gpus(1, CUDA_VISIBLE_DEVICES='2')  # of srun --gpus-per-task=1: each task sees another one
    assert choose_device('cuda', 3) == torch.device('cuda', 0)
    gpus(1)
    with pytest.raises(UserError, match='local rank 3 has no GPU: there are 1 here'):
        choose_device('cuda', 3)


def test_one_gpu_is_refused_to_several_processes(gpus):
    gpus(4, WORLD_SIZE='1')
    assert choose_device('cuda:2') == torch.device('cuda', 2)
    gpus(4, WORLD_SIZE='4')
    with pytest.raises(UserError, match='--device cuda:2 is one GPU for all 4 processes; say --device cuda'):
        choose_device('cuda:2', 1)


@pytest.mark.parametrize('flags, split', [('--compile', True), ('--compile --grad_checkpointing', False)])
def test_compiled_blocks_that_are_recomputed_are_not_split_for_ddp(flags, split):
    """torch before 2.14 raises NotImplementedError where it would have to."""
    recipe, run = resolve(f'{MOGANET} {SMALL} {flags}'.split())
    task, device = create_task(replace(recipe, num_classes=3), run), torch.device('cpu')
    with torch._dynamo.config.patch(optimize_ddp=True):
        build_step(task, run, Processes(device), prepare_model(task, run, device))
        assert torch._dynamo.config.optimize_ddp is split
