"""The recipes against the published table, and command lines turned into recipe and run. Needs no torch."""
import dataclasses
import json
import subprocess
import sys
import typing

import pytest

import recipes
from conftest import ROOT
from recipes import RECIPES, Classification, resolve
from recipes.command_line import parser_of
from utils import UserError

# ---- The table, typed from the sources by hand ----------------------------------------------------------------------

# recipe: train size, test size, lr, min lr, warm-up, weight decay, drop path, RandAugment m (0: 3-Augment), mixup, EMA,
# precision, images per GPU of the 8 GPUs, micro-steps, top-1, top-5, gate
ROWS_300 = {
    'moganet_xtiny': (224, 224, 1e-3, 1e-6, 5, 0.03, 0.05, 7, 0.1, None, 'fp16', 128, 1, 76.5, 93.4, 'single'),
    'moganet_xtiny_256': (256, 256, 1e-3, 1e-6, 5, 0.03, 0.05, 7, 0.1, None, 'fp16', 128, 1, 77.2, 93.8, 'single'),
    'moganet_xtiny_3aug_256': (256, 256, 2e-3, 1e-6, 20, 0.03, 0.05, 0, 0.1, None, 'fp16', 128, 1, 77.6, None,
                               'double'),
    'moganet_tiny': (224, 224, 1e-3, 1e-6, 5, 0.04, 0.1, 7, 0.1, None, 'fp16', 128, 1, 79.0, 94.6, 'single'),
    'moganet_tiny_256': (256, 256, 1e-3, 1e-6, 5, 0.04, 0.1, 7, 0.1, None, 'fp16', 128, 1, 79.6, 94.9, 'single'),
    'moganet_tiny_3aug_256': (256, 256, 2e-3, 1e-6, 20, 0.04, 0.1, 0, 0.1, None, 'fp16', 128, 1, 80.0, 95.0, 'double'),
    'moganet_small': (224, 224, 1e-3, 1e-5, 5, 0.05, 0.1, 9, 0.8, 0.9999, 'fp32', 128, 1, 83.4, 96.9, 'single'),
    'moganet_base': (224, 224, 1e-3, 1e-5, 5, 0.05, 0.2, 9, 0.8, 0.9999, 'fp32', 128, 1, 84.2, 97.0, 'single'),
    'moganet_large': (224, 224, 1e-3, 1e-5, 5, 0.05, 0.3, 9, 0.8, 0.9999, 'fp32', 64, 2, 84.6, 97.1, 'single'),
    'moganet_xlarge': (224, 224, 1e-3, 1e-5, 5, 0.05, 0.4, 9, 0.8, 0.9999, 'fp32', 64, 1, 85.1, 97.4, 'single'),
}
# recipe: drop path, images per GPU, micro-steps, clipping, top-1
ROWS_RSB_A3 = {
    'moganet_xtiny_rsb_a3': (0.05, 256, 1, None, 72.8),
    'moganet_tiny_rsb_a3': (0.1, 256, 1, None, 75.4),
    'moganet_small_rsb_a3': (0.1, 256, 1, None, 81.1),
    'moganet_base_rsb_a3': (0.2, 128, 2, None, 82.2),
    'moganet_large_rsb_a3': (0.4, 128, 2, 10.0, 83.2),
}
COMMON = dict(opt_betas=(0.9, 0.999), opt_eps=1e-8, cutmix=1.0, mixup_prob=1.0, mixup_switch_prob=0.5,
              mixup_mode='batch', remode='pixel', recount=1, train_interpolation='bicubic', interpolation='bicubic',
              scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), hflip=0.5, vflip=0.0, repeated_aug=1, layer_decay=1.0,
              layer_scale_init_value=1e-5, clip_mode='norm', weight_decay_end=None, mixup_off_epochs=0,
              model_ema_warmup=False, precise_bn=0, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@pytest.mark.parametrize('name', ROWS_300)
def test_row_of_300_epochs_holds_the_published_values(name):
    (size, test_size, lr, min_lr, warmup, decay, drop_path, magnitude, mixup, ema, precision, per_gpu, steps, acc1,
     acc5, gate) = ROWS_300[name]
    expected = COMMON | dict(
        model=name.removesuffix('_256').removesuffix('_3aug'), epochs=300, opt='adamw', loss='ce', smoothing=0.1,
        clip_grad=None, crop_pct=0.9, crop_mode='center', input_size=size, test_size=test_size, lr=lr, min_lr=min_lr,
        warmup_epochs=warmup, weight_decay=decay, drop_path=drop_path, mixup=mixup, model_ema=ema is not None,
        precision=precision, gate_fp32=precision == 'fp16', micro_batch_size=per_gpu,
        total_batch_size=8 * per_gpu * steps, expected_acc1=acc1, expected_acc5=acc5, gate=gate,
        aa=f'rand-m{magnitude}-mstd0.5-inc1' if magnitude else '3a', reprob=0.25 if magnitude else 0.0,
        color_jitter=0.4 if magnitude else 0.3)
    if ema is not None:
        expected['model_ema_decay'] = ema
    row = RECIPES[name]
    assert {field: getattr(row, field) for field in expected} == expected


@pytest.mark.parametrize('name', ROWS_RSB_A3)
def test_row_of_rsb_a3_holds_the_published_values(name):
    drop_path, per_gpu, steps, clip_grad, acc1 = ROWS_RSB_A3[name]
    expected = COMMON | dict(
        model=name.removesuffix('_rsb_a3'), epochs=100, opt='lamb', lr=6e-3, min_lr=1e-6, warmup_epochs=5,
        opt_eps=1e-6, weight_decay=0.02, input_size=160, test_size=224, crop_pct=0.95, mixup=0.1,
        aa='rand-m6-mstd0.5-inc1',
        reprob=0.0, smoothing=0.0, loss='bce_sum', bce_target_thresh=None, model_ema=False, precision='fp32',
        gate_fp32=False, gate='double', drop_path=drop_path, clip_grad=clip_grad, micro_batch_size=per_gpu,
        total_batch_size=2048, expected_acc1=acc1)
    assert 8 * per_gpu * steps == 2048
    row = RECIPES[name]
    assert {field: getattr(row, field) for field in expected} == expected


def test_every_published_row_is_there_and_says_its_source_and_hardware():
    assert {*ROWS_300, *ROWS_RSB_A3, 'moganet_xtiny_digits'} <= set(RECIPES)
    for name, row in RECIPES.items():
        assert row.name == name
        assert row.source and row.hardware
    for name in (*ROWS_RSB_A3, 'moganet_xtiny_3aug_256', 'moganet_tiny_3aug_256'):
        assert 'OpenMixup' in RECIPES[name].source


def test_digits_row_does_not_mirror_and_its_average_fits_its_length():
    row = RECIPES['moganet_xtiny_digits']
    assert (row.data_set, row.input_size, row.test_size, row.hflip, row.vflip) == ('digits', 32, 32, 0.0, 0.0)
    assert row.mixup == row.cutmix == row.reprob == 0
    updates = row.epochs * (1437 // row.total_batch_size)
    assert row.model_ema and 1 / (1 - row.model_ema_decay) < updates / 3


def test_the_rows_of_cifar_train_from_scratch_at_32_pixels_and_promise_nothing():
    for classes in (10, 100):
        row = RECIPES[f'moganet_xtiny_cifar{classes}']
        assert row.data_set == f'torch/cifar{classes}' and row.input_size == row.test_size == 32 and row.crop_pct == 1
        assert row.expected_acc1 is row.expected_acc5 is None and not row.freezes()
        assert 'not published' in row.source and row.hardware == '1 GPU (not measured)'
        assert 1 / (1 - row.model_ema_decay) < 5 * (50_000 // row.total_batch_size)  # looks back over few epochs


@pytest.mark.parametrize('row', RECIPES.values(), ids=str)
def test_every_row_resolves_at_8_processes_and_at_1(row, monkeypatch):
    for world in (1, 8):
        monkeypatch.setenv('WORLD_SIZE', str(world))
        recipe, run = resolve(['--recipe', row.name, *(['--model', 'resnet18'] if row.name == 'default' else [])])
        assert world * run.batch_size * run.update_freq == recipe.total_batch_size == row.total_batch_size
        assert run.output_dir == f'runs/{row.name}'
    if row.hardware == '8 GPUs':
        assert run.batch_size == row.micro_batch_size


# ---- Which row, and what overrides it -------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['xtiny', 'tiny', 'small', 'base', 'large', 'xlarge'])
def test_name_of_a_model_is_its_recipe(name):
    recipe, run = resolve(['--model', f'moganet_{name}'])
    assert recipe == RECIPES[f'moganet_{name}']
    assert (run.data_path, run.output_dir) == ('data/ImageNet', f'runs/moganet_{name}')


def test_recipe_picks_a_row_and_flags_override_single_fields():
    recipe, run = resolve(['--recipe', 'moganet_tiny_256', '--lr', '2e-3', '--drop-path=0.2', '--num_workers', '3'])
    assert recipe == dataclasses.replace(RECIPES['moganet_tiny_256'], lr=2e-3, drop_path=0.2)
    assert run.num_workers == 3 and set(run.given) == {'lr', 'drop_path'}


def test_model_without_a_row_takes_the_default_row():
    recipe, _ = resolve(['--model', 'resnet50'])
    assert recipe == dataclasses.replace(RECIPES['default'], model='resnet50')
    assert recipe.name == 'default' and 'without a row' in recipe.source


@pytest.mark.parametrize('spelling', [
    ['--drop_path', '0.25'], ['--drop-path', '0.25'], ['--drop_path=0.25'], ['--drop-path=0.25']])
def test_both_spellings_of_a_flag(spelling):
    assert resolve(['--model', 'moganet_small', *spelling])[0].drop_path == 0.25


@pytest.mark.parametrize('words, value', [
    (['--model_ema'], True), (['--model-ema'], True), (['--model_ema', 'true'], True), (['--model_ema=True'], True),
    (['--model_ema', 'false'], False), (['--model-ema=False'], False), (['--model_ema', '0'], False),
    (['--model_ema', 'no'], False), (['--model_ema', '1'], True)])
def test_booleans_bare_or_with_a_value(words, value):
    for model in ('moganet_tiny', 'moganet_small'):  # one with an average, one without
        assert resolve(['--model', model, *words])[0].model_ema is value


def test_value_that_begins_with_dashes_of_its_own_is_left_alone():
    assert resolve(['--model', 'moganet_small', '--data-path=/my-data/image-net'])[1].data_path == '/my-data/image-net'


@pytest.mark.parametrize('words, field, value', [
    (['--scale', '0.2', '0.9'], 'scale', (0.2, 0.9)),
    (['--scale', '0.2,0.9'], 'scale', (0.2, 0.9)),
    (['--opt_betas', '0.9', '0.95'], 'opt_betas', (0.9, 0.95)),
    (['--mean', '0.5', '0.5', '0.5'], 'mean', (0.5, 0.5, 0.5)),
    (['--aa', 'none'], 'aa', None),
    (['--clip_grad', 'None'], 'clip_grad', None),
    (['--cutmix_minmax', '0.2', '0.8'], 'cutmix_minmax', (0.2, 0.8)),
    (['--model_kwargs', 'dims=[8,8,16,16]', 'x=1e-3', 'act=gelu', 'flag=true'], 'model_kwargs',
     {'dims': [8, 8, 16, 16], 'x': 1e-3, 'act': 'gelu', 'flag': True})])
def test_words_become_typed_values(words, field, value):
    assert getattr(resolve(['--model', 'moganet_small', *words])[0], field) == value


def test_every_field_of_recipe_and_run_has_a_help_line_and_every_flag_a_field():
    flags = {option for action in parser_of(recipes.Classification)._actions for option in action.option_strings}
    for cls in (Classification, recipes.Run):
        for field in dataclasses.fields(cls):
            assert field.metadata['help'], field.name
            assert (f'--{field.name}' in flags) == field.metadata['flag']


def test_test_size_follows_input_size_unless_given():
    assert resolve(['--model', 'moganet_small', '--input_size', '192'])[0].test_size == 192
    assert resolve(['--model', 'moganet_small', '--input_size', '192', '--test_size', '224'])[0].test_size == 224
    assert resolve(['--recipe', 'moganet_tiny_rsb_a3'])[0].test_size == 224


def test_scale_lr_scales_from_the_batch_of_the_row():
    recipe, _ = resolve(['--model', 'moganet_small', '--total_batch_size', '2048', '--scale_lr'])
    assert recipe.lr == pytest.approx(2e-3) and recipe.min_lr == pytest.approx(2e-5)
    assert resolve(['--model', 'moganet_small', '--total_batch_size', '2048'])[0].lr == 1e-3


def test_config_brings_back_a_saved_recipe_and_flags_still_override(tmp_path):
    recipe, _ = resolve(['--recipe', 'moganet_tiny_3aug_256', '--scale', '0.1', '1', '--cutmix_minmax', '0.2', '0.8',
                         '--model_kwargs', 'dims=[8,8,16,16]'])
    (tmp_path / 'recipe.json').write_text(json.dumps(recipes.to_dict(recipe)))
    assert resolve(['--config', str(tmp_path / 'recipe.json')])[0] == recipe
    changed, _ = resolve(['--config', str(tmp_path / 'recipe.json'), '--lr', '1e-4'])
    assert changed == dataclasses.replace(recipe, lr=1e-4)


def test_resuming_config_scales_the_rate_only_once(tmp_path):
    recipe, _ = resolve(['--model', 'moganet_small', '--total_batch_size', '512', '--scale_lr'])
    (tmp_path / 'recipe.json').write_text(json.dumps(recipes.to_dict(recipe)))
    assert resolve(['--config', str(tmp_path / 'recipe.json')])[0].lr == recipe.lr == pytest.approx(5e-4)


@pytest.mark.parametrize('content, reason', [
    ('no json', 'cannot be read'), ('[1, 2]', 'holds no recipe'), ('{"learning_rate": 1}', 'learning_rate'),
    ('{"layer_deca": 1}', 'layer_decay'), ('{"lr": "fast"}', 'lr'), ('{"epochs": 1.5}', 'epochs'),
    ('{"model": null}', 'model'), ('{"scale": [0.1]}', 'scale'), ('{"gate": "triple"}', 'gate')])
def test_config_that_is_no_recipe_is_refused(tmp_path, content, reason):
    (tmp_path / 'recipe.json').write_text(content)
    with pytest.raises(UserError, match=reason):
        resolve(['--config', str(tmp_path / 'recipe.json')])


def test_config_and_recipe_do_not_go_together():
    with pytest.raises(UserError, match='--config and --recipe'):
        resolve(['--config', 'recipe.json', '--recipe', 'moganet_small'])


def test_config_that_is_missing_is_refused(tmp_path):
    with pytest.raises(UserError, match='cannot be read'):
        resolve(['--config', str(tmp_path / 'recipe.json')])


# ---- The batch ------------------------------------------------------------------------------------------------------

# world size, flags -> micro-batch, micro-steps, for moganet_small: 1024 images, 128 a GPU
@pytest.mark.parametrize('world, words, micro, steps', [
    (8, [], 128, 1), (4, [], 128, 2), (1, [], 128, 8), (16, [], 64, 1), (64, [], 16, 1), (1024, [], 1, 1),
    (8, ['--batch_size', '64'], 64, 2), (8, ['--update_freq', '4'], 32, 4), (2, ['--batch_size', '512'], 512, 1),
    (1, ['--update_freq', '1'], 1024, 1), (8, ['--batch_size', '128', '--update_freq', '1'], 128, 1),
    (3, ['--total_batch_size', '96'], 32, 1), (3, ['--total_batch_size', '900'], 100, 3),
    (2, ['--total_batch_size', '8', '--batch_size', '4'], 4, 1)])
def test_accumulation_is_what_is_left_of_the_batch(monkeypatch, world, words, micro, steps):
    monkeypatch.setenv('WORLD_SIZE', str(world))
    recipe, run = resolve(['--model', 'moganet_small', *words])
    assert (run.world_size, run.batch_size, run.update_freq) == (world, micro, steps)
    assert world * micro * steps == recipe.total_batch_size


@pytest.mark.parametrize('world, words, arithmetic, cures', [
    (8, ['--batch_size', '100'], '8 processes x micro-batch 100 x 1 micro-step = 800', ['--total_batch_size 800']),
    (8, ['--batch_size', '128', '--update_freq', '2'], '= 2048', ['--batch_size 64', '--total_batch_size 2048']),
    (3, [], '3 processes x', ['--total_batch_size']),
    (1, ['--batch_size', '2048'], '= 2048', ['--batch_size 1024', '--total_batch_size 2048']),
    (2048, [], '2048 processes', ['--total_batch_size 2048'])])
def test_batch_that_does_not_come_out_is_refused_with_the_arithmetic_and_both_cures(monkeypatch, world, words,
                                                                                    arithmetic, cures):
    monkeypatch.setenv('WORLD_SIZE', str(world))
    with pytest.raises(UserError) as refused:
        resolve(['--model', 'moganet_small', *words])
    assert arithmetic in str(refused.value) and '1024' in str(refused.value) and '\n' not in str(refused.value)
    for cure in cures:
        assert cure in str(refused.value)


@pytest.mark.parametrize('world', [1, 2, 3, 5, 6, 7, 8, 12, 24])
@pytest.mark.parametrize('words', [[], ['--batch_size', '100'], ['--batch_size', '48'], ['--update_freq', '3'],
                                   ['--batch_size', '64', '--update_freq', '3']], ids=' '.join)
def test_either_cure_of_a_refused_batch_works(monkeypatch, world, words):
    monkeypatch.setenv('WORLD_SIZE', str(world))
    argv = ['--model', 'moganet_small', *words]
    try:
        recipe, run = resolve(argv)
        assert world * run.batch_size * run.update_freq == recipe.total_batch_size == 1024
        return
    except UserError as refused:
        message = str(refused).replace(',', ' ').split()
    for flag in ('--batch_size', '--total_batch_size'):
        if flag in message:
            recipe, run = resolve([*argv, flag, message[message.index(flag) + 1]])
            assert world * run.batch_size * run.update_freq == recipe.total_batch_size
    assert '--total_batch_size' in message


def test_evaluation_never_checks_batches(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '7')
    for words in ([], ['--batch_size', '100']):
        _, run = resolve(['--model', 'moganet_small', '--eval', '--checkpoint', 'some.pth', *words])
        assert run.eval and run.checkpoint == ('some.pth',)


# ---- What is refused ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('argv, said', [
    (['--recipe', 'moganet_smal'], 'moganet_small'), (['--model', 'moganet_smol'], 'moganet_small'),
    (['--model', 'moganet_small', '--drop_pth', '0.1'], '--drop_path'),
    (['--model', 'moganet_small', '--drop-pth=0.1'], '--drop_path'),
    (['--model', 'moganet_small', '--weight_dcay', '0.1'], '--weight_decay'),
    (['--model', 'moganet_small', 'train'], 'train'), ([], '--model moganet_small'),
    (['--model', 'moganet_small', '--opt', 'adam'], 'adamw'), (['--model', 'moganet_small', '--lr'], '--lr')])
def test_unknown_name_is_one_line_with_the_nearest(argv, said):
    with pytest.raises(UserError) as refused:
        resolve(argv)
    assert said in str(refused.value) and '\n' not in str(refused.value)


# flags -> the flag that the message must name first or an essential word
IMPOSSIBLE = [
    '--drop_path -0.1', '--drop_path 1', '--drop 1.5', '--proj_drop -1', '--hflip 2', '--vflip -0.5', '--reprob 1.1',
    '--mixup_prob 1.01', '--mixup_switch_prob -1', '--smoothing 1', '--momentum 1', '--model_ema_decay 1',
    '--model_ema_decay 1.2', '--lr -0.001', '--lr nan', '--lr inf', '--lr fast', '--min_lr -1', '--min_lr 1',
    '--weight_decay -0.1', '--weight_decay_end -0.1', '--warmup_epochs -1', '--warmup_epochs 301', '--warmup_steps -5',
    '--mixup -1', '--cutmix -0.5', '--color_jitter -1', '--opt_eps -1', '--precise_bn -1',
    '--layer_scale_init_value -1', '--mixup_off_epochs -1', '--epochs 0', '--epochs 1.5', '--total_batch_size 0',
    '--input_size 0', '--test_size -224', '--recount 0', '--repeated_aug 0', '--num_classes 0', '--clip_grad 0',
    '--crop_pct 0', '--crop_pct 1.5', '--layer_decay 0', '--layer_decay 1.1', '--save_ckpt_freq 0',
    '--save_ckpt_steps 0', '--save_ckpt_num 0', '--val_batch_size 0', '--val_interval 0', '--print_freq 0',
    '--update_freq 0', '--max_skips 0', '--batch_size 0', '--batch_size many', '--num_workers -1', '--scale 0 1',
    '--scale 0.9 0.1', '--scale 0.5', '--scale 0.5 1.5', '--ratio 2 1', '--ratio 0 1', '--std 0 1 1', '--std 1 1',
    '--opt_betas 0.9 1', '--opt_betas 0.9', '--bce_target_thresh 0.2', '--clip_mode agc', '--interpolation random',
    '--interpolation cubic', '--train_interpolation cubic', '--cutmix_minmax 0.8 0.2', '--cutmix_minmax 0.5 2',
    '--model_ema maybe', '--model_kwargs dims', '--eval', '--checkpoint some.pth', '--no_resume_opt',
    '--finetune some.pth --pretrained', '--precision fp8', '--gate triple',
    '--eval --checkpoint some.pth --batch_size auto', '--aa autopilot', '--aa rand-m9-inc',
    '--aa rand-m7-mstd0.5-incl1', '--aa rand-m9-q3']


@pytest.mark.parametrize('words', IMPOSSIBLE)
def test_impossible_value_is_refused_and_named(words):
    with pytest.raises(UserError) as refused:
        resolve(['--model', 'moganet_small', *words.split()])
    message = str(refused.value)
    flags = [word for word in words.split() if word.startswith('--')]
    assert '\n' not in message and any(flag in message for flag in [*flags, '--checkpoint'])


@pytest.mark.parametrize('policy', ['rand-m9-mstd0.5-inc1', 'rand-m7-n3-mmax10-p0.7', '3a', 'original-mstd0.5', 'v0',
                                    'augmix-m5-w4-d2', 'rand-m9-t0'])
def test_policies_of_timm_are_taken(policy):
    assert resolve(['--model', 'moganet_small', '--aa', policy])[0].aa == policy


def test_numbers_stand_for_every_rate_and_count_of_the_recipe():
    """No numeric field may take a value below zero: a new field must be validated too."""
    hints = typing.get_type_hints(Classification) | typing.get_type_hints(recipes.Run)
    signless = {'seed', 'world_size', 'micro_batch_size', 'expected_acc1', 'expected_acc5'}
    numeric = [name for name, kind in hints.items() if name not in signless
               and any(kind is number or number in typing.get_args(kind) for number in (int, float))]
    assert len(numeric) > 40
    for name in numeric:
        with pytest.raises(UserError):
            resolve(['--model', 'moganet_small', f'--{name}=-3'])
            pytest.fail(f'--{name}=-3 was accepted')


@pytest.mark.parametrize('flag', ['proj_drop 0.1', 'layer_scale_init_value 1', 'head_init_scale 0.1', 'gate double',
                                  'gate_fp32 true'])
def test_flag_of_moganet_is_refused_for_other_models(flag):
    with pytest.raises(UserError, match=flag.split()[0]):
        resolve(['--model', 'resnet18', *f'--{flag}'.split()])
    resolve(['--model', 'moganet_tiny', *f'--{flag}'.split()])


# ---- Fast answers ---------------------------------------------------------------------------------------------------

PRINTED = {'model', 'input_size', 'test_size', 'epochs', 'total_batch_size', 'opt', 'lr', 'min_lr', 'warmup_epochs',
           'weight_decay', 'layer_decay', 'drop_path', 'aa', 'mixup', 'cutmix', 'reprob', 'color_jitter', 'smoothing',
           'loss', 'model_ema', 'model_ema_decay', 'precision', 'gate', 'crop_pct', 'interpolation', 'clip_grad',
           'dist_bn', 'expected_acc1', 'source'}


def test_print_recipe_prints_it_as_json_with_its_overrides(capsys):
    with pytest.raises(SystemExit) as done:
        resolve(['--recipe', 'moganet_large', '--print_recipe', '--lr', '3e-3'])
    printed = json.loads(capsys.readouterr().out)
    assert done.value.code == 0 and set(printed) >= PRINTED
    assert recipes.from_dict(printed) == dataclasses.replace(RECIPES['moganet_large'], lr=3e-3)


def test_print_recipe_does_not_check_batches(monkeypatch, capsys):
    monkeypatch.setenv('WORLD_SIZE', '3')
    with pytest.raises(SystemExit):
        resolve(['--recipe', 'moganet_large', '--print_recipe'])
    assert json.loads(capsys.readouterr().out)['model'] == 'moganet_large'


def test_list_recipes_prints_every_row(capsys):
    with pytest.raises(SystemExit) as done:
        resolve(['--list_recipes'])
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines if line]
    assert done.value.code == 0 and [name for name in names if name != 'recipe'] == list(RECIPES)
    assert names.count('recipe') == len({row.task for row in RECIPES.values()})  # a table each
    small = next(line for line in lines if line.startswith('moganet_small '))
    assert '83.4' in small and '1024' in small and '0.9999' in small and 'rand-m9-mstd0.5-inc1' in small


@pytest.mark.parametrize('words, status', [
    ('--help', 0), ('--list_recipes', 0), ('--recipe moganet_large --print_recipe', 0), ('--recpe moganet_large', 2),
    ('--recipe moganet_larg', 2), ('--model moganet_small --lr -1', 2), ('--model moganet_small --batch_size 100', 2)])
def test_fast_answers_import_neither_torch_nor_numpy(words, status):
    code = ('import sys, time, main\n'
            'status = main.main(sys.argv[1:])\n'
            'print(status, sorted({"torch", "numpy", "timm", "PIL"} & set(sys.modules)), file=sys.stderr)')
    done = subprocess.run([sys.executable, '-c', code, *words.split()], cwd=ROOT, capture_output=True, text=True,
                          timeout=60)
    *message, report = done.stderr.splitlines()
    assert report == f'{status} []'
    assert len(message) == (1 if status else 0) and bool(done.stdout) == (not status)


def test_a_batch_that_batch_norm_cannot_normalise_is_refused():
    words = ['--model', 'moganet_tiny', '--batch_size', '1', '--total_batch_size', '4']
    with pytest.raises(UserError, match='--batch_size 2 or more'):
        recipes.resolve([*words, '--input_size', '32'])
    assert recipes.resolve([*words, '--input_size', '64'])[1].batch_size == 1
