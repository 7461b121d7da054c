"""Every option changes a result: weights, batches, files, log, or what is printed. An option without a case fails.

Most cases run `main.main` for two updates of a MogaNet of four blocks, twice: without the option and with it. On the
CPU the same command gives the same bits, so that any difference is the option's doing.
"""
import argparse
import csv
import dataclasses
import json
import os
import platform
import re
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

import engine
import main
import recipes
import runs
from builders import log_of, make_image_folder, open_loaders, smooth, state_of, write, write_cifar
from pipeline import digits_coco, loaders
from pipeline.files import cache_folder
from recipes.ade20k import Segmentation
from recipes.coco import Detection
from recipes.command_line import parser_of
from tasks import create_task
from training import trainer
from training.start import compile_model, prepare_model
from utils import UserError

MODEL = ('--model', 'moganet_xtiny', '--model_kwargs', 'dims=[8,8,16,16]', 'depths=[1,1,1,1]', 'ffn_ratios=[2,2,2,2]',
         '--input_size', '32')
BASE = (*MODEL, '--device', 'cpu', '--precision', 'fp32', '--gate_fp32', 'false', '--batch_size', '8',
        '--total_batch_size', '8', '--num_workers', '0', '--epochs', '1', '--warmup_epochs', '0', '--lr', '1e-2',
        '--min_lr', '1e-3')

pytestmark = pytest.mark.usefixtures('one_thread', 'own_cache')

PROVEN: set[str] = set()


def proves(*options: str) -> Callable[[Any], Any]:
    """Marks a test as the case of these options."""
    PROVEN.update(options)
    return lambda test: test


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    """18 images to train, two updates of 8; 9 to test."""
    return make_image_folder(tmp_path_factory.mktemp('data'), train=6, val=3, draw=smooth)


@pytest.fixture(scope='module')
def train(data, tmp_path_factory):
    """Trains by `main.main` and returns the run's folder; the same flags train once."""
    done: dict[tuple[str, ...], Path] = {}

    def start(*flags: str, status: int = 0, base: tuple[str, ...] = (*BASE, '--model_ema', 'false', '--disable_eval'),
              folder: Path | None = None) -> Path:
        key = (*base, *flags)
        if folder is None and key in done:
            return done[key]
        folder = folder or tmp_path_factory.mktemp('run')
        assert main.main([*base, '--data_path', str(data), '--output_dir', str(folder), *flags]) == status
        done[key] = folder
        return folder

    return start


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts are bit for bit the same."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_same_command_twice_gives_the_same_bits(train, tmp_path):
    again = train(folder=tmp_path)
    assert same(state_of(train())['model'], state_of(again)['model'])


# ---- What changes the weights ---------------------------------------------------------------------------------------

# option: the flags with it, and the flags of the run it is compared with
WEIGHTS: dict[str, tuple[str, str]] = {
    'drop': ('--drop 0.5', ''),
    'proj_drop': ('--proj_drop 0.5', ''),
    'drop_path': ('--drop_path 0.6', ''),
    'layer_scale_init_value': ('--layer_scale_init_value 0.1', ''),
    'head_init_scale': ('--head_init_scale 0.1', ''),
    'gate': ('--gate double', ''),
    'gate_fp32': ('--precision bf16 --gate_fp32 --layer_scale_init_value 1',
                  '--precision bf16 --layer_scale_init_value 1'),
    'num_classes': ('--num_classes 7', ''),
    'loss': ('--loss bce', ''),
    'loss=bce_sum': ('--loss bce_sum --opt sgd', '--loss bce --opt sgd'),
    'smoothing': ('--smoothing 0.3', ''),
    'smoothing without mixup': ('--smoothing 0.3 --mixup 0 --cutmix 0', '--mixup 0 --cutmix 0'),
    'smoothing of bce': ('--smoothing 0.3 --mixup 0 --cutmix 0 --loss bce', '--mixup 0 --cutmix 0 --loss bce'),
    'bce_target_thresh': ('--loss bce --bce_target_thresh 0.2', '--loss bce'),
    'total_batch_size': ('--total_batch_size 4 --batch_size 4', ''),
    'opt': ('--opt lamb', ''),
    'opt=sgd': ('--opt sgd', '--opt lamb'),
    'opt_eps': ('--opt_eps 1e-2', ''),
    'opt_eps of lamb': ('--opt_eps 1e-2 --opt lamb', '--opt lamb'),
    'opt_betas': ('--opt_betas 0.5 0.9', ''),
    'opt_betas of lamb': ('--opt_betas 0.5 0.9 --opt lamb', '--opt lamb'),
    'momentum': ('--opt sgd --momentum 0.5', '--opt sgd'),
    'lr': ('--lr 2e-2', ''),
    'min_lr': ('--min_lr 1e-4', ''),
    'scale_lr': ('--total_batch_size 16 --batch_size 16 --scale_lr', '--total_batch_size 16 --batch_size 16'),
    'warmup_epochs': ('--warmup_epochs 1', ''),
    'warmup_steps': ('--warmup_steps 2', ''),
    'warmup_ratio': ('--warmup_epochs 1 --warmup_ratio 0.5', '--warmup_epochs 1'),
    'sched': ('--epochs 2 --sched poly', '--epochs 2'),
    'sched=step': ('--epochs 2 --sched step --milestones 1.5', '--epochs 2'),
    'milestones': ('--epochs 2 --sched step --milestones 1', '--epochs 2 --sched step --milestones 1.5'),
    'milestones in updates': ('--epochs none --updates 3 --sched step --milestones 1',
                              '--epochs none --updates 3 --sched step --milestones 2'),
    'gamma': ('--sched step --milestones 0.5 --gamma 0.5', '--sched step --milestones 0.5'),
    'power': ('--epochs 2 --sched poly --power 2', '--epochs 2 --sched poly'),
    'weight_decay': ('--weight_decay 0.5', ''),
    'weight_decay_end': ('--weight_decay_end 0.5', ''),
    'weight_decay_end of sgd': ('--opt sgd --weight_decay_end 0.5', '--opt sgd'),
    'layer_decay': ('--layer_decay 0.7', ''),
    'clip_grad': ('--opt sgd --clip_grad 0.01', '--opt sgd'),
    'clip_mode': ('--opt sgd --clip_grad 0.01 --clip_mode value', '--opt sgd --clip_grad 0.01'),
    'clip_mode=agc': ('--opt sgd --clip_grad 0.01 --clip_mode agc', '--opt sgd --clip_grad 0.01'),
    'precision': ('--precision bf16', ''),
    'seed': ('--seed 1', ''),
    'batch_size': ('--batch_size 4', ''),  # BN sees smaller batches
    'update_freq': ('--batch_size none --update_freq 4', '--batch_size none --update_freq 2'),
}
PROVEN |= {name.partition('=')[0].partition(' ')[0] for name in WEIGHTS}


@pytest.mark.parametrize('case', WEIGHTS)
def test_option_changes_the_trained_weights(case, train):
    with_it, without = (state_of(train(*flags.split()))['model'] for flags in WEIGHTS[case])
    assert not same(with_it, without)
    assert all(value.isfinite().all() for value in with_it.values())


@proves('class_weights', 'balanced_sampling')
def test_weights_of_classes_and_balanced_sampling_change_the_trained_weights(train, tmp_path):
    (tmp_path / 'weights.txt').write_text('class0 1\nclass1 2\nclass2 3\n')
    (tmp_path / 'ones.txt').write_text('1\n1\n1\n')
    plain = state_of(train())['model']
    for flags in (('--class_weights', str(tmp_path / 'weights.txt')), ('--balanced_sampling',)):
        assert not same(state_of(train(*flags))['model'], plain), flags
    # Six images of each class: both weigh each image by 1, and the same sum in the same order has the same bits
    balanced, ones = (state_of(train('--class_weights', value))['model']
                      for value in ('balanced', str(tmp_path / 'ones.txt')))
    assert same(balanced, ones)


@proves('teacher', 'distill', 'distill_alpha', 'distill_tau')
def test_a_teacher_and_how_it_is_heard_change_the_trained_weights(train):
    one, other = (str(train('--seed', seed) / 'checkpoint-last.pth') for seed in '56')
    soft = ('--teacher', one, '--distill', 'soft')
    found = [state_of(train(*flags))['model']['head.weight'] for flags in (
        (), soft, ('--teacher', other, '--distill', 'soft'), ('--teacher', one, '--distill', 'hard'),
        (*soft, '--distill_alpha', '0.9'), (*soft, '--distill_tau', '3'))]
    assert all(weight.isfinite().all() for weight in found)
    assert not any(torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


def prepare(recipe: recipes.Recipe, run: recipes.Run, *, num_classes: int) -> torch.nn.Module:
    task = create_task(dataclasses.replace(recipe, num_classes=num_classes), run)
    return prepare_model(task, run, torch.device('cpu'))


@proves('model')
def test_model_chooses_the_architecture():
    sizes = {}
    for name in ('moganet_xtiny', 'moganet_tiny', 'resnet10t'):
        recipe, run = recipes.resolve(['--model', name])
        model = prepare(recipe, run, num_classes=1000)
        sizes[name] = sum(param.numel() for param in model.parameters())
    assert sizes == {'moganet_xtiny': 2_956_066, 'moganet_tiny': 5_197_332, 'resnet10t': 5_435_488}


@proves('model_kwargs')
def test_model_kwargs_reach_the_model_and_a_misspelt_one_is_refused(train, capsys):
    shape = state_of(train())['model']['blocks1.0.mlp.fc1.weight'].shape
    assert shape == (16, 8, 1, 1)
    wider = (*BASE, '--model_kwargs', 'dims=[16,8,16,16]', 'depths=[1,1,1,1]', 'ffn_ratios=[3,2,2,2]')
    assert state_of(train(base=wider))['model']['blocks1.0.mlp.fc1.weight'].shape == (48, 16, 1, 1)
    train(base=(*BASE, '--model_kwargs', 'dimms=[16,8,16,16]'), status=2)
    assert 'dimms' in capsys.readouterr().err


@proves('epochs')
def test_epochs_are_the_lines_of_the_log(train):
    assert [entry['epoch'] for entry in log_of(train('--epochs', '2'))] == [0, 1]
    assert len(log_of(train())) == 1


@proves('updates')
def test_updates_are_the_length_of_the_run(train, capsys):
    folder = train('--epochs', 'none', '--updates', '3')
    assert [(entry['epoch'], entry['step']) for entry in log_of(folder)] == [(0, 2), (1, 3)]
    assert state_of(folder)['step'] == 3
    train('--updates', '3', status=2)
    assert 'give one' in capsys.readouterr().err


def test_a_row_of_another_model_trains_without_what_is_moganets(data, tmp_path, monkeypatch):
    row = dataclasses.replace(recipes.RECIPES['default'], name='resnet10t_tiny', model='resnet10t', drop_path=0.0)
    monkeypatch.setitem(recipes.RECIPES, row.name, row)
    assert not recipes.is_moganet('resnet10t')
    assert main.main(['--recipe', row.name, '--input_size', '32', '--device', 'cpu', '--batch_size', '8',
                      '--total_batch_size', '8', '--num_workers', '0', '--epochs', '1', '--warmup_epochs', '0',
                      '--data_path', str(data), '--output_dir', str(tmp_path)]) == 0
    assert state_of(tmp_path)['model']['fc.weight'].shape == (3, 512)
    assert json.loads((tmp_path / 'recipe.json').read_text())['model'] == 'resnet10t'


@proves('model_ema', 'model_ema_decay', 'model_ema_warmup', 'model_ema_eval')
def test_moving_average_follows_its_options(train):
    def average(*flags: str) -> dict[str, torch.Tensor]:
        return state_of(train('--model_ema', *flags))['model_ema']

    assert state_of(train())['model_ema'] is None
    plain = average('--model_ema_decay', '0.9')
    assert not same(plain, state_of(train('--model_ema', '--model_ema_decay', '0.9'))['model'])
    assert not same(plain, average('--model_ema_decay', '0.5'))
    assert not same(plain, average('--model_ema_decay', '0.9', '--model_ema_warmup'))
    evaluated = train('--model_ema', '--disable_eval', 'false')
    assert 'test_acc1_ema' in log_of(evaluated)[0] and (evaluated / 'checkpoint-best-ema.pth').exists()
    not_evaluated = train('--model_ema', '--disable_eval', 'false', '--model_ema_eval', 'false')
    assert 'test_acc1_ema' not in log_of(not_evaluated)[0] and 'test_acc1' in log_of(not_evaluated)[0]
    assert not (not_evaluated / 'checkpoint-best-ema.pth').exists()


@proves('precise_bn')
def test_precise_bn_changes_the_saved_statistics_and_not_the_training(train):
    with_it, without = (state_of(train('--disable_eval', 'false', *flags)) for flags in (['--precise_bn', '16'], []))
    changed = {name for name, value in with_it['model'].items() if not torch.equal(value, without['model'][name])}
    assert changed and all('running_' in name for name in changed)
    assert torch.equal(with_it['local']['buffers'], without['local']['buffers'])


@proves('dist_bn')
def test_dist_bn_chooses_whose_statistics_are_saved(data, tmp_path):
    """Of two ranks: `reduce` takes the mean, `broadcast` rank 0's; with `none` each evaluates by its own."""
    jobs = [runs.start((*BASE, '--batch_size', '4', '--model_ema', 'false', '--dist_bn', mode,
                        '--data_path', str(data), '--output_dir', str(tmp_path / mode)),
                       tmp_path / f'{mode}.txt', world_size=2) for mode in ('reduce', 'broadcast', 'none')]
    for job in jobs:
        assert job.wait() == [0, 0], job.text()
    saved = {mode: state_of(tmp_path / mode) for mode in ('reduce', 'broadcast', 'none')}
    own = saved['none']['local']['buffers']
    assert not torch.equal(own[0], own[1])
    for mode, expected in (('reduce', own.sum(0) / 2), ('broadcast', own[0]), ('none', own[0])):
        statistics = [value.flatten() for name, value in saved[mode]['model'].items() if 'running_' in name]
        assert torch.equal(torch.cat(statistics), expected), mode
        assert torch.equal(saved[mode]['local']['buffers'], own), mode  # the course of training is the same
    assert len({log_of(tmp_path / mode)[0]['test_loss'] for mode in saved}) == 3


@proves('sync_bn')
def test_sync_bn_converts_every_norm_and_is_refused_without_cuda(train, capsys):
    for name in ('moganet_xtiny', 'resnetv2_50'):
        recipe, run = recipes.resolve(['--model', name, '--sync_bn'])
        norms = {type(module).__name__ for module in prepare(recipe, run, num_classes=3).modules()
                 if 'Norm' in type(module).__name__}
        assert norms and all('Sync' in norm for norm in norms)
    train('--sync_bn', status=2)
    assert '--sync_bn needs CUDA' in capsys.readouterr().err


# ---- What changes the batches ---------------------------------------------------------------------------------------

def first_batch(data: Path, flags: str, *, split: str = 'train') -> tuple[torch.Tensor, torch.Tensor]:
    """The first batch that the flags of a command line bring."""
    recipe, run = recipes.resolve([*BASE, '--data_path', str(data), *flags.split()])
    opened = open_loaders(recipe, run)
    batch = next(iter(opened.train.epoch(0) if split == 'train' else opened.val))
    return batch.images, batch.targets


TRAIN_BATCHES: dict[str, tuple[str, str]] = {
    'data_set': ('--data_set fake --num_classes 3', '--num_classes 3'),
    'input_size': ('--input_size 64', ''),
    'train_interpolation': ('--train_interpolation nearest --aa none', '--aa none'),
    'scale': ('--scale 0.5 0.6', ''),
    'ratio': ('--ratio 2 3', ''),
    'hflip': ('--hflip 1', '--hflip 0'),
    'vflip': ('--vflip 1', ''),
    'color_jitter': ('--color_jitter 0.9 --aa none', '--color_jitter none --aa none'),
    'aa': ('--aa none', ''),
    'aa=3a': ('--aa 3a', '--aa none'),
    'aa in strength': ('--aa rand-m9-mstd0.5-inc1', ''),
    'reprob': ('--reprob 1', '--reprob 0'),
    'remode': ('--reprob 1 --remode const', '--reprob 1'),
    'remode=rand': ('--reprob 1 --remode rand', '--reprob 1'),
    'recount': ('--reprob 1 --recount 4', '--reprob 1'),
    'repeated_aug': ('--repeated_aug 2 --mixup 0 --cutmix 0', '--mixup 0 --cutmix 0'),
    'mean': ('--mean 0.1 0.2 0.3', ''),
    'std': ('--std 0.1 0.2 0.3', ''),
    'mixup': ('--mixup 0', ''),
    'mixup in strength': ('--mixup 5 --cutmix 0', '--cutmix 0'),
    'cutmix': ('--cutmix 0 --mixup_switch_prob 1', '--mixup_switch_prob 1'),
    'cutmix_minmax': ('--cutmix_minmax 0.2 0.9', ''),
    'mixup_prob': ('--mixup_prob 0', ''),
    'mixup_switch_prob': ('--mixup_switch_prob 0', '--mixup_switch_prob 1'),
    'mixup_mode': ('--mixup_mode pair', ''),
    'mixup_mode=elem': ('--mixup_mode elem', '--mixup_mode pair'),
    'mixup_off_epochs': ('--mixup_off_epochs 1', ''),
}
VAL_BATCHES: dict[str, tuple[str, str]] = {
    'test_size': ('--test_size 48', ''),
    'crop_pct': ('--crop_pct 0.6', ''),
    'crop_mode': ('--crop_mode squash', ''),
    'crop_mode=border': ('--crop_mode border', '--crop_mode squash'),
    'interpolation': ('--interpolation nearest', ''),
    'val_batch_size': ('--val_batch_size 2', ''),
}
PROVEN |= {name.partition('=')[0].partition(' ')[0] for name in (*TRAIN_BATCHES, *VAL_BATCHES)}


@pytest.mark.parametrize('split, case', [*(('train', case) for case in TRAIN_BATCHES),
                                         *(('val', case) for case in VAL_BATCHES)])
def test_option_changes_the_batches(split, case, data):
    cases = TRAIN_BATCHES if split == 'train' else VAL_BATCHES
    with_it, without = (first_batch(data, flags, split=split) for flags in cases[case])
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(with_it, without, strict=True))


def test_sizes_and_counts_are_those_asked_for(data):
    assert first_batch(data, '--input_size 64')[0].shape == (8, 3, 64, 64)
    assert first_batch(data, '--test_size 48', split='val')[0].shape[1:] == (3, 48, 48)
    assert len(first_batch(data, '--val_batch_size 2', split='val')[0]) == 2
    labels = first_batch(data, '--repeated_aug 2 --mixup 0 --cutmix 0 --num_classes 3')[1]
    assert labels.dtype == torch.int64


@proves('data_path', 'eval_data_path')
def test_images_come_from_the_folders_named(data, tmp_path):
    other = make_image_folder(tmp_path / 'other', train=6, val=3, seed=1, draw=smooth)
    for split, flags in (('train', f'--data_path {other}'), ('val', f'--data_path {other}'),
                         ('val', f'--eval_data_path {other}'), ('val', f'--eval_data_path {other}/val')):
        assert not torch.equal(first_batch(data, flags, split=split)[0], first_batch(data, '', split=split)[0])
    assert torch.equal(first_batch(data, f'--eval_data_path {other}')[0], first_batch(data, '')[0])


@proves('class_map')
def test_class_map_numbers_the_classes(data, tmp_path):
    (tmp_path / 'map.txt').write_text('class2\nclass1\nclass0\n')
    unmixed = '--mixup 0 --cutmix 0'
    labels = first_batch(data, unmixed)[1]
    assert torch.equal(first_batch(data, f'{unmixed} --class_map {tmp_path / "map.txt"}')[1], 2 - labels)


@pytest.mark.parametrize('words, said', [
    ('--input_size 64 32', '--input_size takes no further value 32; images are square: give one value'),
    ('--epochs 1 --test-size=64 64 --lr 1', '--test_size takes no further value 64; images are square: give one value'),
    ('--input_size 3 224 224', '--input_size takes no further value 224; images are square: give one value'),
    ('--input_size 64x32', '--input_size 64x32: give a whole number; images are square: give one value'),
    ('--epochs 3 4', '--epochs takes no further value 4; give one value'), ('here', 'here belongs to no flag')])
def test_a_value_too_many_is_told_with_the_flag_that_takes_one(words, said):
    with pytest.raises(UserError, match=re.escape(said)):
        recipes.resolve([*words.split(), '--model', 'moganet_xtiny'])


@proves('on_bad_image')
def test_bad_image_stops_the_run_or_is_replaced_and_counted(train, tmp_path, capsys):
    broken = make_image_folder(tmp_path / 'data', train=6, val=1, draw=smooth)
    for path in (broken / 'train/class0').iterdir():
        path.write_bytes(path.read_bytes()[:100])
    train('--data_path', str(broken), status=2)
    message = capsys.readouterr().err
    assert str(broken / 'train/class0') in message and '--on_bad_image skip' in message
    folder = train('--data_path', str(broken), '--on_bad_image', 'skip')
    assert log_of(folder)[0]['bad_images'] >= 4  # 16 of 18 images, 6 of them broken


@proves('num_workers')
def test_workers_are_as_many_as_asked_and_change_no_weight(train, monkeypatch):
    asked = []
    loader = torch.utils.data.DataLoader

    def spy(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs['num_workers'])
        return loader(*args, **kwargs)

    monkeypatch.setattr(loaders, 'DataLoader', spy)
    with_two = train('--num_workers', '2')
    assert asked == [2]
    assert same(state_of(with_two)['model'], state_of(train())['model'])


@proves('pin_mem')
@pytest.mark.gpu
def test_pin_mem_pins_what_crosses_the_bus(data):
    pinned = {}
    for value in ('true', 'false'):
        recipe, run = recipes.resolve([*BASE, '--data_path', str(data), '--pin_mem', value])
        opened = open_loaders(recipe, run, device='cuda')
        pinned[value] = next(opened.train._batches(0, 0, 0, 1))[0].images.is_pinned()
    assert pinned == {'true': True, 'false': False}


# ---- Device and speed -----------------------------------------------------------------------------------------------

@proves('device')
def test_device_is_the_one_named_or_refused(train, capsys, tmp_path):
    train(folder=tmp_path)
    assert json.loads((tmp_path / 'environment.json').read_text())[0]['device'] == 'cpu'
    there = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available()}
    for name in ('cuda', 'mps', 'toaster'):
        if there.get(name):
            continue
        train('--device', name, status=2)
        assert f'--device {name}' in capsys.readouterr().err


def test_batch_size_auto_is_refused_without_cuda(train, capsys):
    train('--batch_size', 'auto', status=2)
    assert '--batch_size auto' in capsys.readouterr().err


@pytest.mark.gpu
def test_batch_size_auto_finds_one_that_divides_the_batch(train, tmp_path, capsys):
    train('--device', 'cuda', '--batch_size', 'auto', '--total_batch_size', '16', folder=tmp_path)
    assert '--batch_size auto: 16' in capsys.readouterr().out


def test_small_batches_under_batch_norm_are_told_with_the_cures_that_help(monkeypatch):
    recipe, _ = recipes.resolve([*MODEL])
    model, told = torch.nn.Sequential(torch.nn.BatchNorm2d(3)), []
    monkeypatch.setattr(trainer.log, 'warning', lambda text, *values: told.append(text % values))

    def said(batch_size: int, world_size: int = 1, model: torch.nn.Module = model, **changes: Any) -> str:
        told.clear()
        run = dataclasses.replace(recipes.Run(), batch_size=batch_size, world_size=world_size, update_freq=2)
        trainer.warn_of_small_batches(dataclasses.replace(recipe, **changes), run, model)
        return ''.join(told)

    assert said(16, 4) == (
        'Batch norm takes its statistics over 16 images at a time: fewer than 32 make a worse model. Give --batch_size '
        '32, with fewer micro-steps, or --sync_bn, which takes them over all GPUs, or fewer processes, or a larger '
        '--total_batch_size.')
    assert 'processes' not in said(31) and 'over 31 images' in said(31) and 'over 1 image at' in said(1)
    assert said(8, 4, sync_bn=True) == said(32) == '' and '--sync_bn' not in said(8, 2, sync_bn=True)
    assert said(16, micro_batch_size=16) == ''  # a row that is for so few
    assert said(4, model=torch.nn.LayerNorm(3)) == ''
    model[0].requires_grad_(False)  # keeps the statistics that it has
    assert said(4) == ''


@proves('compile')
def test_compile_compiles_the_model_and_keeps_its_names(train, tmp_path, monkeypatch):
    torch._dynamo.reset()
    compiled = []
    compile_module = torch.nn.Module.compile
    # inductor takes half a minute for a kernel that the tests of the models look at; here only that it is asked for
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self: compile_module(self, backend=backend))
    monkeypatch.delenv('TORCHINDUCTOR_CACHE_DIR', raising=False)

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        compiled.append(len(graph.graph.nodes))
        return graph.forward

    train('--compile', folder=tmp_path)
    assert max(compiled) > 100  # the whole model
    assert state_of(tmp_path)['model'].keys() == state_of(train())['model'].keys()
    assert os.environ['TORCHINDUCTOR_CACHE_DIR'] == str(cache_folder() / 'inductor' / platform.node())


@pytest.mark.parametrize('device, options', [('cuda', {'options': {'force_layout_optimization': True}}), ('cpu', {})])
def test_compiled_on_cuda_the_whole_graph_is_told_to_be_channels_last(device, options, monkeypatch):
    asked = []
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', '/own')
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self, **given: asked.append(given))
    compile_model(torch.nn.Linear(1, 1), torch.device(device))
    assert asked == [options]
    assert os.environ['TORCHINDUCTOR_CACHE_DIR'] == '/own'  # the user's stays


@proves('channels_last')
def test_channels_last_is_the_layout_of_the_weights(train):
    for flags, expected in ((['--channels_last'], True), (['--channels_last', 'false'], False)):
        weight = state_of(train(*flags))['model']['patch_embed2.projection.weight']
        assert weight.is_contiguous(memory_format=torch.channels_last) is expected


@proves('grad_checkpointing')
def test_grad_checkpointing_recomputes_and_changes_no_bit(train, monkeypatch, tmp_path):
    from models import moganet
    calls = []
    forward = moganet.MogaBlock.forward

    def counted(self, x):
        if x.device.type != 'meta':  # on which a model is tried before it trains
            calls.append(1)
        return forward(self, x)

    monkeypatch.setattr(moganet.MogaBlock, 'forward', counted)
    train(folder=tmp_path / 'plain')
    plain = len(calls)
    train('--grad_checkpointing', folder=tmp_path / 'checkpointed')
    assert len(calls) - plain == 2 * plain
    assert same(state_of(tmp_path / 'plain')['model'], state_of(tmp_path / 'checkpointed')['model'])


@proves('tf32', 'deterministic')
def test_backend_switches_are_set_before_training(train, monkeypatch):
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', ':4096:8')

    def switches() -> tuple[bool, ...]:
        return (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32,
                torch.are_deterministic_algorithms_enabled(), not torch.backends.cudnn.benchmark)

    train('--tf32', 'false')
    assert switches() == (False, False, False, False)
    train('--tf32')
    assert switches() == (True, True, False, False)
    try:
        train('--deterministic')
        assert switches() == (False, False, True, True)
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False
        torch.utils.deterministic.fill_uninitialized_memory = True


@proves('model_ema_force_cpu')
@pytest.mark.gpu
def test_moving_average_is_kept_on_the_cpu(train, monkeypatch, tmp_path):
    devices = {}
    for value in ('true', 'false'):
        with monkeypatch.context() as patch:
            fit = trainer.Training.fit

            def spy(self: Any, stop: Any, value: str = value, fit: Any = fit) -> int:
                devices[value] = next(self.state.ema.module.parameters()).device.type
                return fit(self, stop)

            patch.setattr(trainer.Training, 'fit', spy)
            train('--device', 'cuda', '--model_ema', '--model_ema_force_cpu', value, folder=tmp_path / value)
    assert devices == {'true': 'cpu', 'false': 'cuda'}


# ---- Where a run starts ---------------------------------------------------------------------------------------------

STILL = ('--lr', '0', '--min_lr', '0')  # the weights stay what they were


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state_of(folder)['model'].items()
            if 'running_' not in name and 'num_batches' not in name}


@proves('finetune')
def test_finetune_starts_from_the_weights_of_a_file(train, capsys, tmp_path):
    source = train()
    folder = train(*STILL, '--finetune', str(source / 'checkpoint-last.pth'), folder=tmp_path / 'tuned')
    assert same(parameters(folder), parameters(source))
    assert not same(parameters(folder), parameters(train(*STILL)))
    assert 'Starting from' in capsys.readouterr().out
    averaged = train('--model_ema', '--model_ema_decay', '0.5')
    auto, raw = (parameters(train(*STILL, '--finetune', str(averaged / 'checkpoint-last.pth'), '--weights', which))
                 for which in ('auto', 'raw'))
    assert same(raw, parameters(averaged)) and not same(auto, raw)
    train('--finetune', str(tmp_path / 'none.pth'), status=2)


@proves('pretrained')
def test_pretrained_starts_from_the_weights_that_timm_knows(train, tmp_path):
    source = train()
    overlay = json.dumps({'file': str(source / 'checkpoint-last.pth'), 'num_classes': 3})
    base = (*BASE, '--model_ema', 'false', '--disable_eval', '--model_kwargs', *BASE[3:6],
            f'pretrained_cfg_overlay={overlay}')
    assert same(parameters(train(*STILL, '--pretrained', base=base)), parameters(source))
    assert not same(parameters(train(*STILL, base=base)), parameters(source))


@proves('auto_resume')
def test_folder_of_a_run_is_continued_or_refused(train, tmp_path, capsys):
    train('--save_ckpt_steps', '1', '--save_ckpt_num', '9', folder=tmp_path)
    expected = state_of(tmp_path)['model']
    for name in ('checkpoint-2.pth', 'checkpoint-last.pth'):  # as if it had been killed after one update
        (tmp_path / name).unlink()
    train('--auto_resume', 'false', folder=tmp_path, status=2)
    assert 'holds a run already' in capsys.readouterr().err
    train(folder=tmp_path)
    assert 'in epoch 1, after 1 updates' in capsys.readouterr().out
    assert same(state_of(tmp_path)['model'], expected)


@proves('resume', 'no_resume_opt')
def test_resume_continues_the_run_of_another_folder(train, tmp_path):
    source = train('--save_ckpt_steps', '1', '--save_ckpt_num', '9', folder=tmp_path / 'source')
    middle = str(source / 'checkpoint-1.pth')
    assert same(state_of(train('--resume', middle))['model'], state_of(source)['model'])
    without_optimizer = state_of(train('--resume', middle, '--no_resume_opt'))
    assert without_optimizer['step'] == 2 and not same(without_optimizer['model'], state_of(source)['model'])


@proves('resume_anyway')
def test_another_recipe_is_resumed_only_on_demand(train, tmp_path, capsys):
    source = train('--save_ckpt_steps', '1', '--save_ckpt_num', '9', folder=tmp_path / 'source')
    flags = ('--resume', str(source / 'checkpoint-1.pth'), '--weight_decay', '0.5')
    train(*flags, status=2)
    message = capsys.readouterr().err
    assert 'weight_decay: 0.03 -> 0.5' in message and '--resume_anyway' in message
    assert not same(state_of(train(*flags, '--resume_anyway'))['model'], state_of(source)['model'])


# ---- What is saved, and when a run stops ----------------------------------------------------------------------------

def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.stem.split('-')[1]) for path in folder.glob('checkpoint-*.pth')
                  if path.stem.split('-')[1].isdigit())


@proves('save_ckpt', 'save_ckpt_freq', 'save_ckpt_steps', 'save_ckpt_num')
def test_checkpoints_are_saved_as_often_and_kept_as_many_as_asked(train):
    assert saved_steps(train('--save_ckpt', 'false')) == []
    assert saved_steps(train('--epochs', '3', '--save_ckpt_num', '9')) == [2, 4, 6]
    assert saved_steps(train('--epochs', '3', '--save_ckpt_num', '2')) == [4, 6]
    assert saved_steps(train('--epochs', '3', '--save_ckpt_num', '9', '--save_ckpt_freq', '2')) == [4, 6]
    assert saved_steps(train('--save_ckpt_steps', '1')) == [1, 2]


@proves('output_dir', 'log_dir')
def test_files_are_where_they_were_asked_for(train, tmp_path):
    folder = train('--log_dir', str(tmp_path / 'board'), folder=tmp_path / 'run')
    assert {'recipe.json', 'environment.json', 'log.txt'} <= {path.name for path in folder.iterdir()}
    assert list((tmp_path / 'board').glob('events.*')) and not (folder / 'tensorboard').exists()
    assert list((train() / 'tensorboard').glob('events.*'))


@proves('on_nan')
def test_nan_stops_the_run_or_rolls_it_back(train, tmp_path, capsys):
    diverging = ('--opt', 'sgd', '--lr', '1e30', '--save_ckpt_steps', '1', '--print_freq', '1', '--epochs', '2')
    train(*diverging, folder=tmp_path / 'stop', status=1)
    printed = capsys.readouterr().out
    assert 'Stopped.' in printed and 'Going back' not in printed
    train(*diverging, '--on_nan', 'rollback', folder=tmp_path / 'rollback', status=1)
    printed = capsys.readouterr().out
    assert all(f'attempt {attempt} of 3' in printed for attempt in (1, 2, 3)) and 'Stopped.' in printed


@proves('max_skips')
def test_run_stops_after_so_many_skipped_updates(train, tmp_path, monkeypatch, capsys):
    """The loss scale is infinite, so that every update overflows, as fp16 does on CUDA."""
    def overflowing(device: torch.device, precision: str) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(device.type, init_scale=float('inf'))

    monkeypatch.setattr(engine, 'create_scaler', overflowing)
    flags = ('--print_freq', '1', '--loss', 'bce_sum')
    train(*flags, folder=tmp_path / 'patient')
    assert log_of(tmp_path / 'patient')[0]['skipped'] == 2
    capsys.readouterr()
    train(*flags, '--max_skips', '1', folder=tmp_path / 'impatient', status=1)
    assert 'fp16 overflowed in 1 updates in a row' in capsys.readouterr().out


# ---- Evaluating and reporting ---------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def trained(train) -> Path:
    """A run with a moving average that differs from the weights."""
    return train('--model_ema', '--model_ema_decay', '0.5', base=BASE)


@proves('eval', 'checkpoint', 'weights')
def test_eval_evaluates_the_checkpoint_and_the_weights_asked_for(trained, data, tmp_path, capsys):
    logged = log_of(trained)[0]
    results = {}
    for which in ('auto', 'ema', 'raw'):
        assert main.main(['--eval', '--checkpoint', str(trained / 'checkpoint-last.pth'), '--weights', which,
                          '--data_path', str(data), '--output_dir', str(tmp_path), '--num_workers', '0', '--device',
                          'cpu']) == 0
        results[which] = json.loads((tmp_path / 'eval.json').read_text())
        assert f'{results[which]["weights"]} weights' in capsys.readouterr().out
    # one forward pass in other batches: to round-off
    assert results['raw']['loss'] == pytest.approx(logged['test_loss'], rel=1e-5)
    assert results['ema']['loss'] == pytest.approx(logged['test_loss_ema'], rel=1e-5)
    assert results['auto']['loss'] == results['ema']['loss'] != results['raw']['loss']
    assert [results[which]['weights'] for which in ('auto', 'ema', 'raw')] == ['ema', 'ema', 'raw']
    assert all(result['count'] == 9 for result in results.values())


def test_eval_needs_a_checkpoint(capsys):
    assert main.main([*MODEL, '--eval']) == 2
    assert '--checkpoint' in capsys.readouterr().err


@proves('knn')
def test_nearest_neighbours_decide_in_place_of_the_classifier(trained, data, tmp_path):
    results = []
    for flags in ([], ['--knn', '1'], ['--knn', '9']):
        assert main.main(['--eval', '--checkpoint', str(trained / 'checkpoint-last.pth'), '--data_path', str(data),
                          '--output_dir', str(tmp_path), '--num_workers', '0', '--device', 'cpu', *flags]) == 0
        results.append(json.loads((tmp_path / 'eval.json').read_text()))
    assert len({result['loss'] for result in results}) == 3
    assert [result.get('knn') for result in results] == [None, 1, 9]


@proves('download')
def test_download_fetches_what_is_not_there_and_only_when_told(tmp_path, monkeypatch, capsys):
    content = write_cifar(tmp_path / 'server', CIFAR10, monkeypatch)
    limits = []

    def fetch(url: str, root: str, filename: str, md5: str) -> None:
        limits.append(socket.getdefaulttimeout())
        write(Path(root) / filename, content)

    monkeypatch.setattr('torchvision.datasets.utils.download_url', fetch)
    command = [*BASE, '--data_set', 'torch/cifar10', '--data_path', str(tmp_path / 'data'), '--disable_eval',
               '--output_dir', str(tmp_path / 'run')]
    assert main.main(command) == 2 and 'by --download' in capsys.readouterr().err
    assert main.main([*command, '--download']) == 0 and state_of(tmp_path / 'run')['step'] == 5
    assert limits == [30] and socket.getdefaulttimeout() is None  # once for both halves; no server is waited for longer
    with pytest.raises(UserError, match='--download fetches a --data_set torch/NAME, and this is digits'):
        recipes.check_start(*recipes.resolve([*BASE, '--data_set', 'digits', '--download']))


@proves('results_file')
def test_results_file_takes_a_line_for_every_evaluation(trained, data, tmp_path):
    command = ['--eval', '--checkpoint', str(trained / 'checkpoint-last.pth'), str(trained / 'checkpoint-best-ema.pth'),
               '--data_path', str(data), '--output_dir', str(tmp_path), '--num_workers', '0', '--device', 'cpu',
               '--results_file', str(tmp_path / 'results.csv')]
    for count in (2, 4):
        assert main.main(command) == 0
        with open(tmp_path / 'results.csv') as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == count and float(rows[0]['loss']) > 0 and rows[1]['checkpoint'].endswith('best-ema.pth')


@proves('stop_signals')
def test_only_the_chosen_signals_save_and_stop(data, tmp_path):
    to_itself = '''
import os, signal
def observe(state):
    os.kill(os.getpid(), signal.SIGUSR1)
'''
    command = (*BASE, '--data_path', str(data), '--output_dir')
    chosen = runs.start((*command, str(tmp_path / 'a')), tmp_path / 'a.txt', before=to_itself)
    others = runs.start((*command, str(tmp_path / 'b'), '--stop_signals', 'TERM', 'INT'), tmp_path / 'b.txt',
                        before=to_itself)
    assert (chosen.wait(), others.wait()) == ([128 + signal.SIGUSR1], [-signal.SIGUSR1])
    assert (tmp_path / 'a' / 'checkpoint-1.pth').exists() and not (tmp_path / 'b' / 'checkpoint-1.pth').exists()


@proves('valid_labels', 'real_labels', 'throughput')
def test_eval_among_some_classes_by_other_labels_and_with_its_speed(trained, data, tmp_path, capsys):
    subset = tmp_path / 'subset' / 'val'
    for i, label in enumerate((0, 2)):
        (subset / f'class{label}').mkdir(parents=True)
        for j, path in enumerate(sorted((data / 'val' / f'class{label}').iterdir())):
            Image.open(path).save(subset / f'class{label}' / f'ILSVRC2012_val_{3 * i + j + 1:08d}.png')
    (tmp_path / 'valid.txt').write_text('0\n2\n')
    (tmp_path / 'real.json').write_text(json.dumps([[0, 2], [], [0, 2], [0, 2], [0, 2], [2, 0]]))

    def evaluate(*flags: str) -> dict[str, Any]:
        assert main.main(['--eval', '--checkpoint', str(trained / 'checkpoint-last.pth'), '--data_path',
                          str(tmp_path / 'subset'), '--output_dir', str(tmp_path), '--num_workers', '0', '--device',
                          'cpu', *flags]) == 0
        return json.loads((tmp_path / 'eval.json').read_text())

    valid = ('--valid_labels', str(tmp_path / 'valid.txt'))
    among_all, among_two = evaluate(), evaluate(*valid)
    assert among_two['loss'] < among_all['loss']  # a class less to share the probability with
    assert among_two['acc5'] == 100 and among_two['count'] == 6
    real = evaluate(*valid, '--real_labels', str(tmp_path / 'real.json'))
    assert real['real_acc1'] == 100 and real['acc1'] == among_two['acc1']  # both classes are right wherever one is
    fast = evaluate('--throughput')
    assert fast['throughput'] > 0 and 'of the model alone' in capsys.readouterr().out and 'throughput' not in among_all
    (tmp_path / 'valid.txt').write_text('0\n9\n')
    assert main.main(['--eval', '--checkpoint', str(trained / 'checkpoint-last.pth'), '--data_path',
                      str(tmp_path / 'subset'), '--device', 'cpu', '--output_dir', str(tmp_path), *valid]) == 2
    assert 'below the 3 classes' in capsys.readouterr().err


@proves('suite', 'tta', 'corruptions')
def test_eval_on_a_suite_with_mirror_images_and_corruptions(trained, data, tmp_path):
    pytest.importorskip('imagecorruptions')

    def evaluate(*flags: str) -> Any:
        assert main.main(['--eval', '--checkpoint', str(trained / 'checkpoint-last.pth'), '--output_dir', str(tmp_path),
                          '--num_workers', '0', '--device', 'cpu', *flags]) == 0
        return json.loads((tmp_path / 'eval.json').read_text())

    plain = evaluate('--data_path', str(data))
    mirrored = evaluate('--data_path', str(data), '--tta', 'hflip')
    assert mirrored['loss'] != plain['loss'] and mirrored['tta'] == 'hflip' and 'tta' not in plain
    (alone,) = evaluate('--suite', str(data))
    assert (alone['set'], alone['loss']) == ('val', plain['loss'])
    _, corrupted = evaluate('--suite', str(data), '--corruptions', 'contrast')
    assert corrupted['count'] == 5 * 9 and len(corrupted['errors']['contrast']) == 5


@proves('freeze_stages', 'linear_probe')
def test_what_is_frozen_stays_as_it_was_statistics_included(train):
    start = train()
    tune = ('--finetune', str(start / 'checkpoint-last.pth'), '--model_ema', 'false')
    before = state_of(start)['model']
    changed = {name: {key for key, value in state_of(train(*tune, *flags))['model'].items()
                      if not torch.equal(value, before[key])}
               for name, flags in {'all': (), 'two': ('--freeze_stages', '2'), 'probe': ('--linear_probe',)}.items()}
    assert {'patch_embed1.projection.0.weight', 'norm1.running_mean', 'head.weight'} <= changed['all']
    of_frozen = ('patch_embed1.', 'blocks1.', 'norm1.', 'patch_embed2.', 'blocks2.', 'norm2.')
    assert not [key for key in changed['two'] if key.startswith(of_frozen)]
    assert {'patch_embed3.projection.weight', 'norm3.running_mean', 'head.weight'} <= changed['two']
    assert changed['probe'] == {'head.weight', 'head.bias'}


@proves('val_interval', 'disable_eval')
def test_evaluation_happens_as_often_as_asked(train):
    def evaluated(*flags: str) -> list[bool]:
        return ['test_acc1' in entry for entry in log_of(train('--epochs', '3', '--disable_eval', *flags))]

    assert evaluated('false') == [True, True, True]
    assert evaluated('false', '--val_interval', '2') == [False, True, True]  # the last epoch always
    assert evaluated('true') == [False, False, False]


@proves('val_steps')
def test_evaluation_and_log_may_come_every_so_many_updates(train):
    folder = train('--epochs', '3', '--disable_eval', 'false', '--val_steps', '4')  # two epochs, and the end
    assert [(entry['step'], 'test_acc1' in entry) for entry in log_of(folder)] == [(4, True), (6, True)]
    assert same(state_of(folder)['model'], state_of(train('--epochs', '3', '--disable_eval', 'false'))['model'])


@proves('wandb', 'project', 'wandb_ckpt')
def test_wandb_options_choose_what_is_sent_where(train, tmp_path, monkeypatch, capsys):
    wandb = pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    assert not (train() / 'wandb').exists()
    recorded = {}
    for flags in ('--wandb', '--wandb --project other', '--wandb --wandb_ckpt --disable_eval false'):
        wandb.teardown()
        folder = train(*flags.split(), folder=tmp_path / str(len(recorded)))
        wandb.teardown()  # waits for what is still being written
        (file,) = (folder / 'wandb').glob('offline-run-*/*.wandb')
        recorded[flags] = file.read_bytes()
    plain, other, uploaded = recorded.values()
    assert b'epoch/train_loss' in plain and b'checkpoint-best.pth' not in plain
    assert b'\x07moganet' in plain and b'\x05other' in other and b'\x05other' not in plain  # protobuf: length, text
    assert b'checkpoint-best.pth' in uploaded
    for flags, cure in (('--wandb_ckpt', 'goes with --wandb'), ('--project other', 'goes with --wandb')):
        train(*flags.split(), status=2)
        assert cure in capsys.readouterr().err


@proves('print_freq', 'print_param_groups')
def test_what_is_printed(train, tmp_path, capsys):
    lines = {}
    for frequency in ('1', '2'):
        train('--print_freq', frequency, folder=tmp_path / frequency)
        lines[frequency] = capsys.readouterr().out
    assert lines['1'].count('update 1/2') == 1 and lines['2'].count('update 1/2') == 0
    assert all(text.count('update 2/2') == 1 for text in lines.values())
    train('--print_param_groups', '--layer_decay', '0.7', folder=tmp_path / 'groups')
    printed = capsys.readouterr().out
    assert 'lr scale' in printed and 'patch_embed1' in printed and '0.7000' in printed and 'lr scale' not in lines['1']


@proves('plan', 'card', 'gpus', 'price')
def test_a_plan_is_printed_and_nothing_is_trained(data, tmp_path, capsys):
    def planned(*flags: str, status: int = 0) -> str:
        command = [*BASE, '--plan', '--data_path', str(data), '--output_dir', str(tmp_path / 'run'), *flags]
        assert main.main(command) == status and not (tmp_path / 'run').exists()
        return ''.join(capsys.readouterr())

    assert 'the recipe\'s batch is 8' in planned(status=2)  # of the recipe's eight GPUs
    one = planned('--gpus', '1')
    assert '2 updates of 8 images (1 x 8 x 1), fp32' in one and f'18 images of {data}' in one
    assert one.count(' GB  ') == 4 and 'hours on 1' in one and 'price' not in one
    one = planned('--gpus', '1', '--card', 'a100', '--price', '2.5')
    assert one.count(' GB  ') == 1 and 'A100' in one and 'price' in one


# ---- Detectors ------------------------------------------------------------------------------------------------------

DETECTOR = ('--recipe', 'retinanet_moganet_digits', '--data_set', 'coco', '--model_kwargs', 'dims=[8,8,16,16]',
            'depths=[1,1,1,1]', 'ffn_ratios=[2,2,2,2]', 'layer_scale_init_value=0.5', '--network_kwargs', 'channels=8',
            'depth=1', '--image_scale', '64', '64', '--device', 'cpu', '--num_workers', '0', '--total_batch_size', '4',
            '--epochs', 'none', '--updates', '2', '--warmup_steps', '0', '--model_ema', 'false')


@pytest.fixture(scope='module')
def digits(tmp_path_factory) -> Path:
    """12 images of digits in COCO's form to train, 4 to test."""
    folder = tmp_path_factory.mktemp('digits')
    digits_coco.write(folder, train=12, val=4)
    return folder


@pytest.fixture(scope='module')
def detect(digits, tmp_path_factory):
    """Trains a detector for two updates by `main.main` and returns the run's folder; the same flags train once."""
    done: dict[str, Path] = {}

    def start(flags: str = '') -> Path:
        if flags not in done:
            done[flags] = tmp_path_factory.mktemp('detector')
            words = [*DETECTOR, '--data_path', str(digits), '--disable_eval', '--output_dir', str(done[flags])]
            assert main.main([*words, *flags.split()]) == 0
        return done[flags]

    return start


DETECTOR_WEIGHTS: dict[str, tuple[str, str]] = {
    'network_kwargs': ('--network_kwargs channels=8 depth=1 anchor_scale=2', ''),
    'gate': ('--gate double', ''),
    'gate_fp32': ('--precision bf16 --gate_fp32', '--precision bf16'),
    'drop_path': ('--drop_path 0.9', ''),
    'precision': ('--precision bf16', ''),
    'image_scale': ('--image_scale 96 96', ''),
    'resize': ('--resize multi_scale', ''),
    'hflip': ('--hflip 1', ''),
    'batch_size': ('--batch_size 2', ''),  # BN sees smaller batches, the losses other normalisers
}
OF_DETECTORS = set(DETECTOR_WEIGHTS) | {'data_set', 'freeze_bn', 'masks'}


@pytest.mark.parametrize('case', DETECTOR_WEIGHTS)
def test_option_changes_the_weights_of_a_detector(case, detect):
    flags, other = DETECTOR_WEIGHTS[case]
    assert not same(state_of(detect(flags))['model'], state_of(detect(other))['model'])


def test_recomputed_activations_change_no_bit_of_a_detector(detect):
    assert same(state_of(detect('--grad_checkpointing'))['model'], state_of(detect())['model'])


def test_what_is_frozen_of_a_detector_stays(detect):
    begin = detect()
    before = state_of(begin)['model']

    def moved(flags: str) -> set[str]:
        after = state_of(detect(f'--finetune {begin}/checkpoint-last.pth {flags}'))['model']
        return {name for name in after if not torch.equal(after[name], before[name])}

    norms = {f'{name.rpartition(".")[0]}.' for name in before if name.endswith('running_mean')}
    free, frozen, stage = moved(''), moved('--freeze_bn'), moved('--freeze_stages 1')
    assert all(any(name.startswith(norm) for name in free) for norm in norms) and len(norms) > 4
    assert frozen and not any(name.startswith(tuple(norms)) for name in frozen)
    first = ('backbone.patch_embed1.', 'backbone.blocks1.', 'backbone.norm1.')
    assert any(name.startswith(first) for name in free) and not any(name.startswith(first) for name in stage)
    assert any(name.startswith('backbone.blocks2.') for name in stage)


def test_synchronised_norms_of_a_detector_are_plain_ones_off_cuda_and_that_is_said(detect, capsys):
    assert same(state_of(detect('--sync_bn'))['model'], state_of(detect())['model'])
    assert '--sync_bn: off CUDA, on this cpu, the batch norms are plain ones' in capsys.readouterr().out


@proves('train_json', 'val_json', 'image_dir')
def test_files_of_ones_own_are_read_in_place_of_cocos(digits, tmp_path):
    named = {split: tmp_path / f'{split}.json' for split in ('train', 'val')}
    for split, path in named.items():
        facts = json.loads((digits / 'annotations' / f'instances_{split}2017.json').read_text())
        facts['images'] = facts['images'][:5 if split == 'train' else 3]
        kept = {image['id'] for image in facts['images']}
        facts['annotations'] = [note for note in facts['annotations'] if note['image_id'] in kept]
        path.write_text(json.dumps(facts))
        for image in facts['images']:
            shutil.copy(digits / f'{split}2017' / image['file_name'], tmp_path / f'{split}-{image["file_name"]}')

    def counts(*flags: str) -> tuple[int, int]:
        recipe, run = recipes.resolve([*DETECTOR, '--data_path', str(digits), *flags])
        opened = open_loaders(recipe, run)
        return opened.train.count, opened.val.count

    assert counts() == (12, 4)
    folders = ('--image_dir', str(digits / 'train2017'))
    assert counts('--train_json', str(named['train']), *folders, '--val_json', str(named['train'])) == (5, 5)
    with pytest.raises(UserError, match='give their folder by --image_dir'):
        counts('--val_json', str(named['val']))


@proves('save_predictions')
def test_predictions_are_saved_where_they_are_wanted(detect, digits, tmp_path, capsys):
    state = torch.load(detect() / 'checkpoint-last.pth', weights_only=True)
    state['model']['bbox_head.retina_cls.bias'] += 4  # sure of many boxes
    torch.save(state, tmp_path / 'file.pth')
    words = ['--eval', '--checkpoint', str(tmp_path / 'file.pth'), '--data_path', str(digits), '--device', 'cpu',
             '--num_workers', '0', '--output_dir', str(tmp_path / 'out')]
    assert main.main(words) == 0 and not (tmp_path / 'found.json').exists()
    assert main.main([*words, '--save_predictions', str(tmp_path / 'found.json')]) == 0
    assert {'image_id', 'category_id', 'bbox', 'score'} == json.loads((tmp_path / 'found.json').read_text())[0].keys()
    (tmp_path / 'file').touch()
    assert main.main([*words, '--save_predictions', str(tmp_path / 'file' / 'found.json')]) == 2
    assert '--save_predictions' in capsys.readouterr().err


def test_mask_heads_are_left_out_where_no_masks_are_wanted_and_a_network_without_them_refuses_that(capsys):
    words = ['--recipe', 'mask_rcnn_moganet_xtiny_1x', '--num_classes', '3']

    def heads(*flags: str) -> set[str]:
        task = create_task(*recipes.resolve([*words, *flags, '--batch_size', '2', '--total_batch_size', '2']))
        assert ('mask' in task.losses) == ('mask_ap' in task.recipe.metrics) == ('mask_ap' in task.recipe.expected())
        with torch.device('meta'):
            return {name.split('.')[1] for name, _ in task.build_model().named_parameters() if 'roi_head' in name}

    assert heads() == heads('--masks') == {'bbox_head', 'mask_head'} and heads('--masks', 'false') == {'bbox_head'}
    assert main.main([*DETECTOR, '--masks', 'false']) == 2
    assert '--masks false: retinanet has no masks' in capsys.readouterr().err
    assert main.main([*words, '--network_kwargs', 'masks=false']) == 2
    assert 'say --masks false' in capsys.readouterr().err


def test_made_up_digits_are_read_by_their_name(digits, monkeypatch):
    monkeypatch.setattr(digits_coco, 'root', lambda **_: digits)
    recipe, run = recipes.resolve([*DETECTOR, '--data_set', 'digits_coco'])
    assert open_loaders(recipe, run).train.count == 12


def test_every_option_of_detectors_alone_has_a_case():
    shared = {field.name for field in dataclasses.fields(recipes.Recipe)}
    own = {field.name for field in dataclasses.fields(Detection) if field.metadata['flag']} - shared
    assert own <= OF_DETECTORS, f'no case: {own - OF_DETECTORS}'


# ---- Segmentors -----------------------------------------------------------------------------------------------------

SEGMENTOR = ('--recipe', 'semantic_fpn_moganet_digits', '--data_set', 'ade20k', '--model_kwargs', 'dims=[8,8,16,16]',
             'depths=[1,1,1,1]', 'ffn_ratios=[2,2,2,2]', 'layer_scale_init_value=0.5', '--network_kwargs', 'channels=8',
             'head_channels=8', 'dropout=0', '--image_scale', '64', '64', '--crop_size', '48', '--device', 'cpu',
             '--num_workers', '0', '--total_batch_size', '4', '--epochs', 'none', '--updates', '2', '--warmup_steps',
             '0', '--model_ema', 'false')


@pytest.fixture(scope='module')
def segment(digits, tmp_path_factory):
    """Trains a segmentor for two updates by `main.main` and returns the run's folder; the same flags train once."""
    done: dict[str, Path] = {}

    def start(flags: str = '') -> Path:
        if flags not in done:
            done[flags] = tmp_path_factory.mktemp('segmentor')
            words = [*SEGMENTOR, '--data_path', str(digits), '--num_classes', '12', '--disable_eval', '--output_dir',
                     str(done[flags])]
            assert main.main([*words, *flags.split()]) == 0
        return done[flags]

    return start


SEGMENTOR_WEIGHTS: dict[str, str] = {
    'network_kwargs': '--network_kwargs channels=8 head_channels=12 dropout=0', 'gate': '--gate double',
    'gate_fp32': '--gate_fp32 true --precision bf16', 'ignore_label': '--ignore_label 1',
    'reduce_zero_label': '--reduce_zero_label false', 'image_scale': '--image_scale 80 80',
    'scale_range': '--scale_range 1.5 2', 'crop_size': '--crop_size 64', 'max_class_share': '--max_class_share 0.5',
    'hflip': '--hflip 1', 'photometric': '--photometric 1'}
SEGMENTOR_OTHERS = {'gate_fp32': '--precision bf16'}  # beside the plain command
# The tests of what is frozen, and of the ways to test
OF_SEGMENTORS = set(SEGMENTOR_WEIGHTS) | {'data_set', 'freeze_bn', 'align_resize', 'test_mode', 'test_flip',
                                          'test_scales'}


@pytest.mark.parametrize('case', SEGMENTOR_WEIGHTS)
def test_option_changes_the_weights_of_a_segmentor(case, segment):
    flags, other = SEGMENTOR_WEIGHTS[case], SEGMENTOR_OTHERS.get(case, '')
    assert not same(state_of(segment(flags))['model'], state_of(segment(other))['model'])


def test_the_batch_norms_of_a_segmentors_backbone_stay_where_they_are_frozen(segment):
    begin = segment()
    after = segment(f'--freeze_bn --finetune {begin / "checkpoint-last.pth"}')
    before, after = (state_of(folder)['model'] for folder in (begin, after))
    kept = {name for name in before if torch.equal(before[name], after[name])}
    norms = {name for name in before if name.startswith('backbone.') and 'running_' in name}
    assert norms <= kept and not any(name.startswith('decode_head') and 'running_' in name for name in kept)


def test_made_up_labels_are_read_by_their_name(digits, monkeypatch):
    monkeypatch.setattr(digits_coco, 'root', lambda **_: digits)
    recipe, run = recipes.resolve([*SEGMENTOR, '--data_set', 'digits_ade'])
    assert open_loaders(recipe, run).train.count == 12


@pytest.mark.parametrize('way', ['--align_resize false', '--test_mode slide', '--test_flip true', '--test_scales 0.5'])
def test_a_way_to_test_changes_the_result_of_a_segmentor(way, segment, digits, tmp_path):
    state = torch.load(segment() / 'checkpoint-last.pth', weights_only=True)
    classifier = state['model']['decode_head.conv_seg.weight']  # which shall find several classes
    state['model']['decode_head.conv_seg.weight'] = torch.randn(classifier.shape, generator=torch.manual_seed(0))
    state['model']['decode_head.conv_seg.bias'].zero_()
    torch.save(state, tmp_path / 'file.pth')
    results = []
    for flags in ('', way):
        words = ['--eval', *SEGMENTOR[:4], '--image_scale', '72', '72', '--checkpoint', str(tmp_path / 'file.pth'),
                 '--data_path', str(digits), '--device', 'cpu', '--num_workers', '0', '--output_dir',
                 str(tmp_path / 'out'), *flags.split()]
        assert main.main(words) == 0
        results.append((tmp_path / 'out' / 'eval-classes.csv').read_text())
    assert results[0] != results[1]


def test_every_option_of_segmentors_alone_has_a_case():
    shared = {field.name for field in dataclasses.fields(recipes.Recipe)}
    own = {field.name for field in dataclasses.fields(Segmentation) if field.metadata['flag']} - shared
    assert own <= OF_SEGMENTORS, f'no case: {own - OF_SEGMENTORS}'


# ---- All of them ----------------------------------------------------------------------------------------------------

def test_every_option_has_a_case():
    options = {field.name for cls in (recipes.Classification, recipes.Run) for field in dataclasses.fields(cls)
               if field.metadata['flag']}
    assert options == PROVEN, f'no case: {options - PROVEN}; no option: {PROVEN - options}'
    # beside the fields: what tests/test_recipes.py and tests/test_command_line.py look at
    flags = {option.lstrip('-') for action in parser_of(recipes.Classification)._actions
             for option in action.option_strings if action.help != argparse.SUPPRESS}
    assert flags - options == {'h', 'help', 'recipe', 'config', 'list_recipes', 'print_recipe'}
