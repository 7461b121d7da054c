"""`main.py` from the command line to the files of a run: training, evaluating, and refusing in one line."""
import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import main
import recipes
import runs
from builders import make_image_folder, tinted
from conftest import ROOT
from utils import UserError

CPU = ('--device', 'cpu', '--num_workers', '0')
TINY = (*runs.TINY, *CPU, '--batch_size', '8', '--total_batch_size', '8', '--epochs', '2', '--warmup_epochs', '0')
pytestmark = pytest.mark.usefixtures('one_thread', 'own_cache')


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp('data'), train=6, val=3)


@pytest.fixture(scope='module')
def finished(data, tmp_path_factory) -> Path:
    """The folder of a run that is complete."""
    folder = tmp_path_factory.mktemp('finished')
    assert main.main([*TINY, '--data_path', str(data), '--output_dir', str(folder)]) == 0
    return folder


def model_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)['model']


def refusal(argv: list[str], capsys) -> str:
    """The one line with which a command is refused, with exit status 2."""
    capsys.readouterr()
    assert main.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith('error: ') and printed.err.count('\n') == 1, printed.err
    assert 'Traceback' not in printed.out + printed.err
    return printed.err


# ---- A run and its folder -------------------------------------------------------------------------------------------

def test_run_folder_holds_recipe_versions_log_scalars_and_checkpoints(finished):
    recipe = recipes.saved.load_recipe(str(finished / 'recipe.json'))
    assert (recipe.model, recipe.num_classes, recipe.total_batch_size, recipe.epochs) == ('moganet_xtiny', 3, 8, 2)
    (start,) = json.loads((finished / 'environment.json').read_text())
    assert start['torch'].split('+')[0] == torch.__version__.split('+')[0]
    assert start['timm'] and start['python'] and start['run']['batch_size'] == 8
    git = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=ROOT, capture_output=True, text=True)
    assert len(start['git'] or '') == (len(git.stdout.strip()) if git.returncode == 0 else 0)
    log = [json.loads(line) for line in (finished / 'log.txt').read_text().splitlines()]
    assert [entry['epoch'] for entry in log] == [0, 1]
    columns = {'train_loss', 'test_acc1', 'test_acc5', 'test_loss', 'test_acc1_ema', 'test_acc5_ema', 'test_loss_ema',
               'lr', 'n_parameters', 'images_per_second', 'data_wait'}
    assert columns <= set(log[0])
    assert log[1]['lr'] == pytest.approx(recipe.min_lr) and log[0]['n_parameters'] > 1000
    assert list((finished / 'tensorboard').glob('events.*'))
    assert {'checkpoint-best.pth', 'checkpoint-last.pth', 'checkpoint-best-ema.pth', 'checkpoint-4.pth'} <= {
        path.name for path in finished.iterdir()}
    last = torch.load(finished / 'checkpoint-last.pth', weights_only=True)
    assert last['epoch'] == 2 and last['step'] == 4
    best = max((entry['test_acc1_ema'], -entry['epoch']) for entry in log)
    average = torch.load(finished / f'checkpoint-{2 * (1 - best[1])}.pth', weights_only=True)['model_ema']
    ema = model_of(finished / 'checkpoint-best-ema.pth')  # whose model is the moving average
    assert all(torch.equal(ema[name], average[name]) for name in average)


def test_finished_run_says_so_and_exits_0_without_touching_anything(finished, data, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob('*') if path.is_file()}
    assert main.main([*TINY, '--data_path', str(data), '--output_dir', str(finished)]) == 0
    assert 'is complete: 2 epochs' in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob('*') if path.is_file()} == before


def test_recipe_json_of_a_run_runs_it_again(finished, data, tmp_path):
    assert main.main(['--config', str(finished / 'recipe.json'), '--data_path', str(data), '--output_dir',
                      str(tmp_path), '--batch_size', '8', *CPU]) == 0
    assert json.loads((tmp_path / 'recipe.json').read_text()) == json.loads((finished / 'recipe.json').read_text())
    first, second = (model_of(folder / 'checkpoint-last.pth') for folder in (finished, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)  # the same bits


def test_checkpoint_alone_says_how_it_is_evaluated(finished, data, capsys):
    """Model, classes, size and crop come from the file; the result is the last line of the run's log."""
    assert main.main(['--eval', '--checkpoint', str(finished / 'checkpoint-last.pth'), '--weights', 'raw',
                      '--data_path', str(data), *CPU]) == 0
    result = json.loads((finished / 'eval.json').read_text())
    last = json.loads((finished / 'log.txt').read_text().splitlines()[-1])
    assert result['count'] == 9 and result['test_size'] == 32 and result['model'] == 'moganet_xtiny'
    assert result['acc1'] == last['test_acc1'] and result['acc5'] == last['test_acc5']
    assert result['loss'] == pytest.approx(last['test_loss'], rel=1e-5)  # other batches: to round-off
    assert 'raw weights' in capsys.readouterr().out


def test_flags_override_what_a_checkpoint_says(finished, data, tmp_path):
    assert main.main(['--eval', '--checkpoint', str(finished / 'checkpoint-last.pth'), '--data_path', str(data),
                      '--test_size', '64', '--crop_pct', '1', *CPU, '--output_dir', str(tmp_path)]) == 0
    result = json.loads((tmp_path / 'eval.json').read_text())
    assert (result['test_size'], result['crop_pct']) == (64, 1)


def test_several_checkpoints_make_a_table(finished, data, tmp_path, capsys):
    names = [str(finished / f'checkpoint-{name}.pth') for name in ('last', 'best-ema')]
    assert main.main(['--eval', '--checkpoint', *names, '--data_path', str(data), *CPU, '--output_dir',
                      str(tmp_path)]) == 0
    table = capsys.readouterr().out.splitlines()[-3:]
    assert table[0].split()[:3] == ['top-1', 'interval', 'top-5'] and [line.split()[-1] for line in table[1:]] == names


def test_fp16_falls_back_to_fp32_without_cuda_and_is_recorded(data, tmp_path, capsys):
    assert main.main([*TINY, '--epochs', '1', '--precision', 'fp16', '--data_path', str(data),
                      '--output_dir', str(tmp_path)]) == 0
    assert 'fp16 needs a CUDA device: running in fp32' in capsys.readouterr().out
    assert json.loads((tmp_path / 'recipe.json').read_text())['precision'] == 'fp32'


def test_other_timm_model_trains_by_the_default_row_and_says_so(data, tmp_path, capsys):
    assert main.main(['--model', 'resnet10t', '--input_size', '32', '--epochs', '1', '--warmup_epochs', '0',
                      '--batch_size', '8', '--total_batch_size', '8', *CPU, '--data_path', str(data),
                      '--output_dir', str(tmp_path)]) == 0
    assert 'resnet10t has no recipe of its own' in capsys.readouterr().out
    assert json.loads((tmp_path / 'recipe.json').read_text())['name'] == 'default'
    assert main.main(['--eval', '--model', 'resnet10t', '--checkpoint', str(tmp_path / 'checkpoint-last.pth'),
                      '--data_path', str(data), *CPU]) == 0
    assert json.loads((tmp_path / 'eval.json').read_text())['count'] == 9


def test_digits_are_an_ordinary_recipe(tmp_path):
    assert main.main(['--recipe', 'moganet_xtiny_digits', *runs.TINY[2:6], '--epochs', '1', '--output_dir',
                      str(tmp_path), '--device', 'cpu']) == 0
    assert json.loads((tmp_path / 'recipe.json').read_text())['num_classes'] == 10
    assert main.main(['--eval', '--checkpoint', str(tmp_path / 'checkpoint-best-ema.pth'), '--device', 'cpu']) == 0
    assert json.loads((tmp_path / 'eval.json').read_text())['count'] == 360


def test_default_output_is_runs_and_the_recipe(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main.main([*TINY, '--epochs', '1', '--data_path', str(data)]) == 0
    assert (tmp_path / 'runs' / 'moganet_xtiny' / 'checkpoint-last.pth').exists()


def test_two_processes_train_on_the_same_batches_and_evaluate_each_image_once(finished, data, tmp_path):
    folder = tmp_path / 'run'
    text = runs.run((*TINY, '--batch_size', '4', '--data_path', str(data), '--output_dir', str(folder)),
                    tmp_path / 'log', world_size=2)
    assert '2 processes x 4' in text and text.count('Training is complete') == 1  # rank 0 alone speaks
    one, two = (json.loads((f / 'log.txt').read_text().splitlines()[0]) for f in (finished, folder))
    # the same images in the same order; batch statistics of 4 instead of 8, and other mixup pairs
    assert two['train_loss'] == pytest.approx(one['train_loss'], rel=0.2)
    runs.run(('--eval', '--checkpoint', str(folder / 'checkpoint-last.pth'), '--data_path', str(data), *CPU),
             tmp_path / 'log', world_size=2)
    assert json.loads((folder / 'eval.json').read_text())['count'] == 9


def test_terminal_gets_a_bar_with_loss_speed_and_time_left(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
    assert main.main([*TINY, '--print_freq', '1', '--data_path', str(data), '--output_dir', str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert 'update 1/2' not in printed.out
    bar = [line for line in printed.err.split('\r') if 'epoch 2' in line][-1]
    assert all(part in bar for part in ('100%', 'loss ', 'images/s', ' left'))


def test_slurm_variables_of_a_shell_do_not_start_distribution(monkeypatch):
    monkeypatch.setenv('SLURM_PROCID', '0')
    monkeypatch.setenv('SLURM_NTASKS', '4')
    assert recipes.resolve(['--model', 'moganet_small'])[1].world_size == 1


# ---- Refused in one line --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('words, said', [
    ('--recipe moganet_smal', 'moganet_small'), ('--model moganet_smol', 'moganet_small'),
    ('--model moganet_small --drop_pth 0.1', '--drop_path'), ('--model moganet_small --lr -1', '--lr'),
    ('--model moganet_small --warmup_epochs 400', '--warmup_epochs'),
    ('--model moganet_small --batch_size 100', '--total_batch_size 1000'),
    ('--model moganet_small --data_path no/such/folder', 'no/such/folder'),
    ('--model moganet_small --config no/such/file.json', 'no/such/file.json'),
    ('--model moganet_small --data_set imagefolder', 'image_folder'),
    ('--eval --checkpoint no/such/file.pth', 'no/such/file.pth'),
    ('--model moganet_small --resume no/such/file.pth', 'no/such/file.pth')])
def test_mistake_is_one_line_with_the_cure_and_leaves_nothing(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert said in refusal(words.split(), capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('words, said', [
    ('--recipe moganet_small_transfer --data_path .', 'give --finetune FILE or --pretrained'),
    ('--model moganet_small --data_path . --linear_probe', 'give --finetune FILE or --pretrained'),
    ('--recipe moganet_xtiny_digits --data_path .', '--data_set image_folder'),
    ('--eval --data_path .', '--checkpoint FILE'),
    ('--eval --checkpoint . --resume .', '--resume is for training'),
    ('--eval --checkpoint . no/such/file.pth', '--checkpoint no/such/file.pth does not exist'),
    ('--model moganet_small --data_path . --weights raw', '--finetune FILE'),
    ('--model moganet_small --data_path . --wandb --wandb_ckpt --disable_eval', '--disable_eval')])
def test_what_cannot_be_meant_is_refused_before_torch_is_imported(words, said, capsys, monkeypatch):
    monkeypatch.setattr(main.utils, 'init_processes', None)  # what comes first after it
    assert said in refusal(words.split(), capsys)


def test_what_can_be_meant_may_start(tmp_path):
    (tmp_path / 'map.txt').write_text('class0\n')
    for words in ('--pretrained --weights raw', '--class_map map.txt'):  # the map lies in the data's folder
        argv = ['--model', 'moganet_small', '--data_path', str(tmp_path), *words.split()]
        recipes.check_start(*recipes.resolve(argv))


def test_mistake_is_shown_once_by_several_processes(tmp_path):
    job = runs.start((*TINY, '--batch_size', '4', '--data_path', 'no/such/folder', '--output_dir',
                      str(tmp_path / 'run')), tmp_path / 'log', world_size=2)
    first, second = job.wait()
    assert first == 2 and second in (1, 2)  # 1 where the process that it asks has left already
    assert job.text().count('error:') == 1 and 'Traceback' not in job.text()


def test_mistakes_that_only_the_data_shows(data, tmp_path, capsys):
    base = [*TINY, '--data_path', str(data), '--output_dir', str(tmp_path / 'run')]
    line = refusal([*base, '--batch_size', '32', '--total_batch_size', '32'], capsys)
    assert '18 training images are fewer than one batch of 32' in line and '--total_batch_size 16' in line
    assert '--num_classes 2' in refusal([*base, '--num_classes', '2'], capsys)
    assert '--warmup_steps 9' in refusal([*base, '--warmup_steps', '9'], capsys)
    assert 'resnet18' in refusal(['--model', 'resnet81', '--data_path', str(data), '--total_batch_size', '8',
                                  '--output_dir', str(tmp_path / 'run')], capsys)
    assert not (tmp_path / 'run' / 'recipe.json').exists()


@pytest.mark.parametrize('words', ['--aa rand-m7-mstd0.5-incl1x', '--aa autopilot', '--model_kwargs depths=[1]',
                                   '--data_set torch/nothing', '--class_map no/such/file.txt',
                                   '--finetune no/such/file.pth'])
def test_value_that_a_library_would_reject_is_one_line_too(words, data, tmp_path, capsys):
    line = refusal([*TINY, '--data_path', str(data), '--output_dir', str(tmp_path / 'run'), *words.split()], capsys)
    assert words.split()[0] in line or words.split()[1] in line


def test_pretrained_weights_out_of_reach_are_one_line(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    assert "timm's weights of resnet10t" in refusal(
        ['--model', 'resnet10t', '--pretrained', '--input_size', '32', '--total_batch_size', '8', *CPU, '--data_path',
         str(data), '--output_dir', str(tmp_path / 'run')], capsys)


def test_script_prints_no_traceback_and_exits_2():
    done = subprocess.run([sys.executable, 'main.py', '--modle', 'moganet_small'], cwd=ROOT, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ''
    assert done.stderr == 'error: unknown flag --modle; did you mean --model?\n' or '--model' in done.stderr
    assert done.stderr.count('\n') == 1


# ---- The first release's command lines ------------------------------------------------------------------------------

def first_release(name: str, *, drop_path: str, weight_decay: str, flags: str) -> list[str]:
    return (f'--model moganet_{name} --input_size 224 --drop_path {drop_path} --batch_size 128 --lr 1e-3 '
            f'--weight_decay {weight_decay} --update_freq 1 {flags} --data_path /path/to/imagenet-1k '
            '--output_dir /path/to/save_results').split()


LIGHT = '--aa rand-m7-mstd0.5-inc1 --mixup 0.1 --model_ema false --model_ema_eval false'
AVERAGED = '--model_ema true --model_ema_eval true'
COMMANDS = {
    'xtiny': first_release('xtiny', drop_path='0.05', weight_decay='0.03', flags=LIGHT),
    'tiny': first_release('tiny', drop_path='0.1', weight_decay='0.04', flags=LIGHT),
    'small': first_release('small', drop_path='0.1', weight_decay='0.05', flags=AVERAGED),
    'base': first_release('base', drop_path='0.2', weight_decay='0.05', flags=AVERAGED),
    'large': first_release('large', drop_path='0.3', weight_decay='0.05', flags=AVERAGED),
}


@pytest.mark.parametrize('name', COMMANDS)
def test_command_line_of_the_first_release_is_the_row_at_8_processes(name, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '8')
    recipe, run = recipes.resolve(COMMANDS[name])
    assert recipe == recipes.RECIPES[f'moganet_{name}']
    assert (run.batch_size, run.update_freq, run.world_size) == (128, 1, 8)
    assert (run.data_path, run.output_dir) == ('/path/to/imagenet-1k', '/path/to/save_results')


def shrunk(name: str, data: Path, folder: Path) -> tuple[str, ...]:
    """The first release's command for one update on two processes."""
    return (*COMMANDS[name], '--input_size', '64', '--batch_size', '4', '--total_batch_size', '8', '--epochs', '1',
            '--warmup_epochs', '0', *CPU, '--data_path', str(data), '--output_dir', str(folder))


@pytest.fixture(scope='module')
def few(tmp_path_factory) -> Path:
    """One update of 8 images."""
    return make_image_folder(tmp_path_factory.mktemp('few'), classes=2, train=4, val=2,
                             draw=functools.partial(tinted, size=64))


def check_first_release_run(name: str, folder: Path) -> None:
    (entry,) = [json.loads(line) for line in (folder / 'log.txt').read_text().splitlines()]
    assert entry['step'] == 1 and entry['train_loss'] > 0 and 'test_acc1' in entry
    assert ('test_acc1_ema' in entry) == (name in ('small', 'base', 'large'))
    recipe = json.loads((folder / 'recipe.json').read_text())
    assert (recipe['model'], recipe['input_size'], recipe['test_size']) == (f'moganet_{name}', 64, 64)
    assert (folder / 'checkpoint-last.pth').exists()


@pytest.mark.parametrize('name', ['tiny', *(pytest.param(name, marks=pytest.mark.slow)
                                            for name in ('small', 'base', 'large'))])
def test_command_line_of_the_first_release_runs_on_two_processes(name, few, tmp_path):
    runs.run(shrunk(name, few, tmp_path / 'run'), tmp_path / 'log', world_size=2)
    check_first_release_run(name, tmp_path / 'run')


def test_command_line_of_the_first_release_runs_under_torchrun(few, tmp_path):
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'main.py',
         *shrunk('xtiny', few, tmp_path / 'run')], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count('Training is complete') == 1
    check_first_release_run('xtiny', tmp_path / 'run')


FIRST_RELEASE_FLAGS = [
    'batch_size', 'epochs', 'update_freq', 'model', 'drop_path', 'input_size', 'layer_scale_init_value', 'model_ema',
    'model_ema_decay', 'model_ema_force_cpu', 'model_ema_eval', 'opt', 'opt_eps', 'opt_betas', 'clip_grad', 'momentum',
    'weight_decay', 'weight_decay_end', 'lr', 'layer_decay', 'min_lr', 'warmup_epochs', 'warmup_steps', 'color_jitter',
    'aa', 'smoothing', 'train_interpolation', 'crop_pct', 'reprob', 'remode', 'recount', 'resplit', 'mixup', 'cutmix',
    'cutmix_minmax', 'mixup_prob', 'mixup_switch_prob', 'mixup_mode', 'finetune', 'head_init_scale', 'model_key',
    'model_prefix', 'data_path', 'eval_data_path', 'nb_classes', 'imagenet_default_mean_and_std', 'data_set',
    'output_dir', 'log_dir', 'device', 'seed', 'resume', 'auto_resume', 'save_ckpt', 'save_ckpt_freq', 'save_ckpt_num',
    'start_epoch', 'eval', 'dist_eval', 'disable_eval', 'num_workers', 'pin_mem', 'world_size', 'local_rank',
    'dist_on_itp', 'dist_url', 'use_amp', 'enable_wandb', 'project', 'wandb_ckpt']

# flag: its words, and what they must come to in the recipe or the run (at 8 processes)
WORKING = {
    'batch_size': ('64', {'batch_size': 64, 'update_freq': 2}), 'update_freq': ('4', {'update_freq': 4}),
    'epochs': ('100', {'epochs': 100}), 'model': ('moganet_base', {'model': 'moganet_base', 'drop_path': 0.2}),
    'drop_path': ('0.3', {'drop_path': 0.3}), 'input_size': ('192', {'input_size': 192, 'test_size': 192}),
    'layer_scale_init_value': ('1e-6', {'layer_scale_init_value': 1e-6}), 'model_ema': ('false', {'model_ema': False}),
    'model_ema_decay': ('0.999', {'model_ema_decay': 0.999}),
    'model_ema_force_cpu': ('true', {'model_ema_force_cpu': True}),
    'model_ema_eval': ('false', {'model_ema_eval': False}), 'opt': ('sgd', {'opt': 'sgd'}),
    'opt_eps': ('1e-6', {'opt_eps': 1e-6}), 'opt_betas': ('0.9 0.98', {'opt_betas': (0.9, 0.98)}),
    'clip_grad': ('5', {'clip_grad': 5.0}), 'momentum': ('0.8', {'momentum': 0.8}),
    'weight_decay': ('0.1', {'weight_decay': 0.1}), 'weight_decay_end': ('0.2', {'weight_decay_end': 0.2}),
    'lr': ('2e-3', {'lr': 2e-3}), 'layer_decay': ('0.7', {'layer_decay': 0.7}), 'min_lr': ('1e-6', {'min_lr': 1e-6}),
    'warmup_epochs': ('20', {'warmup_epochs': 20}), 'warmup_steps': ('100', {'warmup_steps': 100}),
    'color_jitter': ('0.3', {'color_jitter': 0.3}), 'aa': ('rand-m7-mstd0.5-inc1', {'aa': 'rand-m7-mstd0.5-inc1'}),
    'smoothing': ('0.2', {'smoothing': 0.2}), 'train_interpolation': ('random', {'train_interpolation': 'random'}),
    'crop_pct': ('0.95', {'crop_pct': 0.95}), 'reprob': ('0.1', {'reprob': 0.1}),
    'remode': ('const', {'remode': 'const'}), 'recount': ('2', {'recount': 2}),
    'mixup': ('0.2', {'mixup': 0.2}), 'cutmix': ('0.5', {'cutmix': 0.5}),
    'cutmix_minmax': ('0.2 0.8', {'cutmix_minmax': (0.2, 0.8)}), 'mixup_prob': ('0.5', {'mixup_prob': 0.5}),
    'mixup_switch_prob': ('0.3', {'mixup_switch_prob': 0.3}), 'mixup_mode': ('elem', {'mixup_mode': 'elem'}),
    'finetune': ('weights.pth', {'finetune': 'weights.pth'}), 'head_init_scale': ('0.001', {'head_init_scale': 0.001}),
    'data_path': ('/d', {'data_path': '/d'}), 'eval_data_path': ('/v', {'eval_data_path': '/v'}),
    'nb_classes': ('100', {'num_classes': 100}),
    'imagenet_default_mean_and_std': ('false', {'mean': (0.5, 0.5, 0.5), 'std': (0.5, 0.5, 0.5)}),
    'data_set': ('IMNET', {'data_set': 'image_folder'}), 'output_dir': ('/o', {'output_dir': '/o'}),
    'log_dir': ('/l', {'log_dir': '/l'}), 'device': ('cuda', {'device': 'cuda'}), 'seed': ('7', {'seed': 7}),
    'resume': ('c.pth', {'resume': 'c.pth'}), 'auto_resume': ('false', {'auto_resume': False}),
    'save_ckpt': ('false', {'save_ckpt': False}), 'save_ckpt_freq': ('5', {'save_ckpt_freq': 5}),
    'save_ckpt_num': ('7', {'save_ckpt_num': 7}), 'eval': ('true --checkpoint c.pth', {'eval': True}),
    'disable_eval': ('true', {'disable_eval': True}), 'num_workers': ('4', {'num_workers': 4}),
    'pin_mem': ('false', {'pin_mem': False}), 'local_rank': ('3', {}), 'use_amp': ('true', {'precision': 'fp16'}),
    'enable_wandb': ('true', {'wandb': True}), 'project': ('other --enable_wandb', {'project': 'other'}),
    'wandb_ckpt': ('true --enable_wandb', {'wandb_ckpt': True}),
}
# flag: its words, and what the refusal must name in its place
REFUSED = {
    'resplit': ('', 'leave it out'), 'model_key': ('model', 'leave it out'), 'model_prefix': ('x', 'leave it out'),
    'start_epoch': ('5', '--resume'), 'dist_eval': ('true', 'leave it out'), 'world_size': ('8', 'torchrun'),
    'dist_on_itp': ('', 'torchrun'), 'dist_url': ('env://', '--rdzv-endpoint'),
}


def test_list_of_first_release_flags_is_complete():
    assert sorted([*WORKING, *REFUSED]) == sorted(FIRST_RELEASE_FLAGS)


@pytest.mark.parametrize('dashes', [False, True], ids=['underscores', 'dashes'])
@pytest.mark.parametrize('flag', FIRST_RELEASE_FLAGS)
def test_flag_of_the_first_release_works_or_names_its_successor(flag, dashes, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '8')
    words, outcome = (WORKING | REFUSED)[flag]
    argv = [f'--{flag.replace("_", "-") if dashes else flag}', *words.split()]
    base = [] if flag == 'model' else ['--model', 'moganet_small']
    if flag in REFUSED:
        with pytest.raises(UserError) as refused:
            recipes.resolve([*base, *argv])
        assert f'--{flag} is gone' in str(refused.value) and outcome in str(refused.value)
        return
    recipe, run = recipes.resolve([*base, *argv])
    values = dataclasses.asdict(recipe) | dataclasses.asdict(run)
    assert {name: values[name] for name in outcome} == outcome
    plain_recipe, plain_run = recipes.resolve(['--model', 'moganet_small'])
    plain = dataclasses.asdict(plain_recipe) | dataclasses.asdict(plain_run)
    assert flag == 'local_rank' or flag == 'data_set' or any(plain[name] != value for name, value in outcome.items())


@pytest.mark.parametrize('name, value', [('IMNET', 'image_folder'), ('image_folder', 'image_folder'),
                                         ('CIFAR', 'torch/cifar100')])
def test_data_sets_of_the_first_release_keep_their_names(name, value):
    assert recipes.resolve(['--model', 'moganet_small', '--data_set', name])[0].data_set == value


def test_use_amp_false_is_fp32():
    assert recipes.resolve(['--model', 'moganet_tiny', '--use_amp', 'false'])[0].precision == 'fp32'
    assert recipes.resolve(['--model', 'moganet_small', '--use_amp'])[0].precision == 'fp16'


@pytest.mark.parametrize('words', [['--local_rank=0'], ['--local-rank=0'], ['--local_rank', '0']])
def test_local_rank_of_the_old_launcher_is_accepted(words):
    assert recipes.resolve(['--model', 'moganet_small', *words])[0] == recipes.RECIPES['moganet_small']


# ---- What a process finds: the launcher's variables, a home, paths, standard streams --------------------------------

@pytest.mark.parametrize('environment,named', [
    ({'WORLD_SIZE': '2'}, 'RANK and MASTER_ADDR and MASTER_PORT are not set'),
    ({'WORLD_SIZE': '2', 'RANK': '0', 'MASTER_ADDR': 'localhost'}, 'MASTER_PORT is not set'),
    ({'WORLD_SIZE': '2', 'RANK': '0', 'MASTER_PORT': '1234'}, 'MASTER_ADDR is not set'),
    ({'WORLD_SIZE': '2', 'RANK': '2', 'MASTER_ADDR': 'localhost', 'MASTER_PORT': '1234'}, 'RANK is 2'),
    ({'WORLD_SIZE': '2', 'RANK': '0', 'MASTER_ADDR': 'localhost', 'MASTER_PORT': 'x'}, "MASTER_PORT is 'x'"),
    ({'WORLD_SIZE': 'two'}, "WORLD_SIZE is 'two'"), ({'WORLD_SIZE': '0'}, 'WORLD_SIZE is 0'),
    ({'WORLD_SIZE': '-1'}, "WORLD_SIZE is '-1'"), ({'WORLD_SIZE': '1.0'}, "WORLD_SIZE is '1.0'"),
    ({'RANK': 'first'}, "RANK is 'first'"), ({'RANK': '1'}, 'RANK is 1'), ({'LOCAL_RANK': 'x'}, "LOCAL_RANK is 'x'"),
])
def test_a_launchers_variables_that_cannot_be_are_one_line(environment, named, monkeypatch, capsys):
    for name in ('WORLD_SIZE', 'RANK', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    line = refusal([*TINY, '--data_set', 'fake'], capsys)
    assert named in line and 'unset' in line


def test_a_port_in_use_is_one_line(data, tmp_path, monkeypatch, capsys):
    import socket
    with socket.create_server(('127.0.0.1', 0)) as server:
        for name, value in {'WORLD_SIZE': '2', 'RANK': '0', 'LOCAL_RANK': '0', 'MASTER_ADDR': '127.0.0.1',
                            'MASTER_PORT': str(server.getsockname()[1])}.items():
            monkeypatch.setenv(name, value)
        line = refusal([*TINY, '--batch_size', '4', '--data_path', str(data), '--output_dir', str(tmp_path / 'run')],
                       capsys)
    assert 'cannot meet at 127.0.0.1' in line and 'MASTER_PORT' in line


def test_every_path_of_the_command_line_has_its_home_expanded(monkeypatch):
    monkeypatch.setenv('HOME', '/home/of')
    paths = [field for cls in (recipes.Recipe, recipes.Run) for field in dataclasses.fields(cls)
             if field.metadata['path']]
    named = {'data_path', 'eval_data_path', 'class_map', 'output_dir', 'log_dir', 'finetune', 'resume', 'checkpoint',
             'valid_labels', 'real_labels', 'results_file'}
    assert {field.name for field in paths} >= named
    for field in paths:
        words = ['--eval', '--checkpoint', 'x'] if field.name in (
            'checkpoint', 'valid_labels', 'real_labels', 'results_file', 'suite') else ['--model', 'moganet_tiny']
        resolved = recipes.resolve([*words, f'--{field.name}=~/x'])
        value = next(getattr(part, field.name) for part in resolved if hasattr(part, field.name))
        assert value == (('/home/of/x',) if field.name == 'checkpoint' else '/home/of/x'), field.name
    recipe, run = recipes.resolve(['--eval', '--checkpoint', '~/a', 'released:x~', 'https://h/~b', 'c~', '--data_set',
                                   'hfds/~/parquet'])
    assert run.checkpoint == ('/home/of/a', 'released:x~', 'https://h/~b', 'c~')
    assert recipe.data_set == 'hfds//home/of/parquet'


def test_a_run_in_the_home_folder_is_continued_from_there(data, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data').symlink_to(data)
    assert main.main([*TINY, '--epochs', '1', '--data_path=~/data', '--output_dir=~/run']) == 0
    assert main.main([*TINY, '--epochs', '1', '--config=~/run/recipe.json', '--data_path=~/data',
                      '--output_dir=~/again', '--log_dir=~/board']) == 0
    assert main.main(['--eval', '--checkpoint=~/run/checkpoint-last.pth', '--data_path=~/data', *CPU,
                      '--results_file=~/results.csv']) == 0
    assert {path.name for path in tmp_path.iterdir()} >= {'run', 'again', 'board', 'results.csv'}
    assert not (tmp_path / '~').exists() and (tmp_path / 'run' / 'eval.json').exists()


def test_without_a_home_and_a_line_in_the_password_file_there_is_a_folder_for_what_is_kept(tmp_path, monkeypatch):
    import getpass
    import tempfile

    import utils
    for name in ('HOME', 'USER', 'LOGNAME', 'LNAME', 'USERNAME', 'NUMBA_CACHE_DIR', 'XDG_CACHE_HOME'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr('pwd.getpwuid', lambda uid: {}[uid])
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    utils.settle()
    home = Path.home()
    assert home.parent == tmp_path and home.stat().st_mode & 0o777 == 0o700
    assert os.environ['NUMBA_CACHE_DIR'].startswith(str(home)) and getpass.getuser()
    os.environ.pop('HOME')
    home.rmdir()
    home.symlink_to(tmp_path / 'elsewhere')  # that somebody else laid there
    utils.settle()
    assert Path.home() != home and Path.home().parent == tmp_path


def test_a_home_that_cannot_be_written_keeps_its_name_and_numba_has_another_place(tmp_path, monkeypatch):
    import utils
    monkeypatch.delenv('NUMBA_CACHE_DIR', raising=False)
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setattr(utils, 'is_writable', lambda folder: False)
    utils.settle()
    assert os.environ['HOME'] == str(tmp_path) and os.path.isabs(os.environ.pop('NUMBA_CACHE_DIR'))


def test_no_folder_for_temporary_files_is_one_line(monkeypatch, capsys):
    def none() -> str:
        raise FileNotFoundError('No usable temporary directory found')

    monkeypatch.setattr('tempfile.gettempdir', none)
    assert 'TMPDIR' in refusal([*TINY, '--data_set', 'fake'], capsys)


@pytest.mark.parametrize('script', ['main.py --list_recipes', 'run_with_submitit.py --help', 'tools/plot.py --help',
                                    pytest.param('predict.py --help', marks=pytest.mark.slow)])
def test_scripts_find_their_modules_where_the_scripts_folder_is_not_on_the_path(script, tmp_path):
    environment = {**os.environ, 'PYTHONSAFEPATH': '1', 'PYTHONPATH': ''}
    done = subprocess.run([sys.executable, *(str(ROOT / word) if word.endswith('.py') else word
                                             for word in script.split())],
                          cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


STREAMS = {'closed': 'os.close(1); sys.stdout = None', 'both closed': 'os.close(1); os.close(2); '
           'sys.stdout = sys.stderr = None',
           'broken pipe': 'reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1)',
           'closed terminal': """
writer, reader = os.openpty()
os.dup2(reader, 1)
os.close(reader)
os.close(writer)"""}


@pytest.mark.parametrize('streams', [*STREAMS, 'full'])
def test_standard_streams_that_are_closed_or_full_cost_no_run(streams, data, tmp_path):
    words = (*TINY, '--epochs', '1', '--print_freq', '1', '--data_path', str(data), '--output_dir',
             str(tmp_path / 'run'))
    if streams == 'full':
        with open('/dev/full', 'w') as full:
            done = subprocess.run([sys.executable, str(ROOT / 'main.py'), *words], stdout=full, stderr=subprocess.PIPE,
                                  text=True, timeout=120)
        printed = done.stderr
        assert done.returncode == 0, printed
    else:
        printed = runs.run(words, tmp_path / 'out.txt', before=f'import os, sys\n{STREAMS[streams]}')
    assert 'Traceback' not in printed and len(printed.splitlines()) < 3, printed
    assert (tmp_path / 'run' / 'checkpoint-last.pth').exists()


@pytest.mark.parametrize('number,cure', [('EMFILE', 'ulimit -n'), ('ENOSPC', 'free space'), ('ENOMEM', 'memory')])
def test_what_the_machine_runs_out_of_is_one_line(number, cure, monkeypatch, capsys):
    import errno

    from training import trainer

    def fail(*_: object, **__: object) -> int:
        code = getattr(errno, number)
        raise OSError(code, os.strerror(code), '/some/file')

    monkeypatch.setattr(trainer, 'train', fail)
    assert cure in refusal([*TINY, '--data_set', 'fake'], capsys)


@pytest.mark.parametrize('words, said', [
    ('--updates 3 --epochs none --warmup_epochs 5', '--warmup_epochs 5, or 50 updates, is longer than the run of 3'),
    ('--sched step --milestones 400', 'the last of --milestones is at update 4000, and the run has 10'),
    ('--power 2', '--power goes with --sched poly'), ('--gamma 0.5', '--gamma goes with --sched step')])
def test_a_schedule_of_which_a_part_would_do_nothing_is_refused(words, said, tmp_path, capsys):
    base = [*TINY, '--data_set', 'fake', '--num_classes', '3', '--num_workers', '0', '--total_batch_size', '8',
            '--epochs', '1', '--warmup_epochs', '0', '--disable_eval', '--output_dir', str(tmp_path / 'run')]
    assert said in refusal([*base, *words.split()], capsys)


def test_the_digits_of_a_checkpoint_are_not_evaluated_in_place_of_a_folder(tmp_path, data, capsys):
    words = ['--recipe', 'moganet_xtiny_digits', *TINY[2:], '--epochs', '1', '--warmup_epochs', '0', '--num_workers',
             '0', '--disable_eval', '--output_dir', str(tmp_path / 'run'), '--total_batch_size', '700', '--batch_size',
             '350']
    assert main.main(words) == 0
    for flag in ('--data_path', '--eval_data_path'):
        assert f'--data_set digits reads no {flag}' in refusal(
            ['--eval', '--checkpoint', str(tmp_path / 'run' / 'checkpoint-last.pth'), flag, str(data)], capsys)
