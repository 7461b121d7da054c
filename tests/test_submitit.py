"""What run_with_submitit.py makes of its flags, and what it refuses; without Slurm. tests/slurm has the real one."""
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import recipes
import run_with_submitit
from builders import assert_same_run, make_image_folder
from conftest import ROOT
from recipes.command_line import parser_of
from run_with_submitit import Task
from runs import TINY, run
from utils import UserError

MODEL = ('--model', 'moganet_tiny', '--data_path', 'images')


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A folder without Slurm's programs on the path, in which the default output folders come to lie."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PATH', str(tmp_path))


@pytest.fixture
def fake_slurm(tmp_path):
    """Programs that answer as those of a cluster whose nodes are other machines with four GPUs each."""
    sinfo = 'case "$*" in *%o*) echo n7;; esac'
    sbatch = """[ "$*" = --test-only ] || exit 0
case $(cat) in
*partition=gpus*) echo 'sbatch: error: invalid partition specified: gpus
allocation failure: Invalid partition name specified' >&2; exit 1;;
*gpus-per-node=8*) echo 'allocation failure: Requested node configuration is not available' >&2; exit 1;;
*constraint*) echo 'sbatch: error: QOSMaxNodePerUserLimit\nsbatch: error: and no more' >&2; exit 1;;
esac"""
    for name, line in {'sinfo': sinfo, 'srun': 'exit 1', 'sbatch': sbatch}.items():
        Path(tmp_path, name).write_text(f'#!/bin/sh\nPATH=/usr/bin:/bin\n{line}\n')
        Path(tmp_path, name).chmod(0o755)


def script(capsys, *words: str) -> str:
    """The sbatch script of a command line."""
    assert run_with_submitit.submit([*MODEL, '--dry_run', *words]) == []
    return capsys.readouterr().out


def refusal(*words: str) -> str:
    """The line with which a command line is refused."""
    with pytest.raises(UserError) as caught:
        run_with_submitit.submit([*MODEL, *words])
    assert '\n' not in str(caught.value)
    return str(caught.value)


# ---- Flags ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('words,lines', [
    (('--nodes', '2'), ['#SBATCH --nodes=2']),
    (('--gpus', '4'), ['#SBATCH --gpus-per-node=4', '#SBATCH --ntasks-per-node=4']),
    (('--partition', 'a,b'), ['#SBATCH --partition=a,b']),
    (('--account', 'vision'), ['#SBATCH --account=vision']),
    (('--qos', 'low'), ['#SBATCH --qos=low']),
    (('--constraint', 'a100|h100'), ["#SBATCH --constraint='a100|h100'"]),
    (('--time', '1-12:00:00'), ['#SBATCH --time=2160']),
    (('--cpus_per_gpu', '12'), ['#SBATCH --cpus-per-task=12', '--cpus-per-task=12 ']),
    (('--mem_per_gpu', '7.5'), ['#SBATCH --mem=61440M']),
    (('--comment', 'for the paper'), ["#SBATCH --comment='for the paper'"]),
    (('--exclude', 'n[1-3]'), ["#SBATCH --exclude='n[1-3]'"]),
    (('--nodelist', 'n4'), ['#SBATCH --nodelist=n4']),
    (('--mail', 'me@home'), ['#SBATCH --mail-user=me@home', '#SBATCH --mail-type=END,FAIL']),
    (('--setup', 'module load cuda', '--setup', 'ulimit -n 9999'), ['module load cuda\nulimit -n 9999\n']),
    (('--name', 'mine'), ['#SBATCH --job-name=mine']),
    (('--signal_delay', '300'), ['#SBATCH --signal=USR2@300']),
    (('--job_dir', 'jobs'), ['/jobs/%j_0_log.out']),
    (('--shared_dir', 'shared'), ['/shared/slurm/%j_0_log.out']),
    (('--output_dir', 'here'), ['/here/slurm/%j_0_log.out']),
    (('--device', 'cpu', '--gpus', '2'), ['#SBATCH --ntasks-per-node=2']),
    (('--sweep', 'lr=1e-3,2e-3 seed=0,1,2'), ['#SBATCH --array=0-5%6', '%A_%a_0_log.out']),
], ids=lambda value: value[0] if isinstance(value, tuple) else '')
def test_a_flag_changes_the_script(words, lines, capsys):
    changed = script(capsys, *words)
    plain = script(capsys)
    for line in lines:
        assert line in changed and line not in plain


def test_the_script_ends_a_job_with_its_first_failing_task_and_lets_it_be_requeued(capsys):
    text = script(capsys)
    assert '--kill-on-bad-exit=1' in text and '#SBATCH --requeue' in text
    assert '#SBATCH --job-name=moganet_tiny' in text and '/runs/moganet_tiny/slurm/' in text
    assert '--gpus-per-node' in text and '--gpus-per-node' not in script(capsys, '--device', 'cpu')


@pytest.mark.parametrize('theirs,ours', [(('--ngpus', '4'), ('--gpus', '4')), (('--timeout', '24'), ('--time', '24')),
                                         (('--job_name', 'mine'), ('--name', 'mine')),
                                         (('--job-dir=jobs',), ('--job_dir', 'jobs'))])
def test_convnexts_spellings_and_dashes_mean_the_same(theirs, ours, capsys):
    assert script(capsys, *theirs) == script(capsys, *ours) != script(capsys)


def test_no_flag_of_the_script_hides_one_of_main():
    options = {option for made in (run_with_submitit.parser(), parser_of(recipes.Classification))
               for action in made._actions for option in action.option_strings}
    shared = [option for option in options if sum(
        option in action.option_strings for made in (run_with_submitit.parser(), parser_of(recipes.Classification))
        for action in made._actions) > 1]
    assert sorted(shared) == ['--gpus', '--help', '-h']  # of a plan, which is refused here
    assert not set(run_with_submitit.SPELLINGS) & {option.lstrip('-') for option in options}


@pytest.mark.parametrize('text,expected', [('72', 4320), ('1.5', 90), ('72:00:00', 4320), ('0:00:30', 1),
                                           ('3-00', 4320), ('1-12:30', 2190), ('1-12:30:01', 2191)])
def test_durations_are_hours_or_as_slurm_writes_them(text, expected):
    assert run_with_submitit.minutes(text) == expected


@pytest.mark.parametrize('text', ['', '1:30', 'a day', '0', '-3', 'inf', 'nan', '1:2:3:4', '00:00:00'])
def test_a_duration_that_says_nothing_or_two_things_is_refused(text):
    with pytest.raises(UserError, match='--time'):
        run_with_submitit.minutes(text)


def array(*words: str) -> list[list[str]]:
    return run_with_submitit.commands(*run_with_submitit.parse([*MODEL, *words]))


def test_a_sweep_is_all_combinations_with_a_folder_each():
    runs = [run_with_submitit.resolve(line, 8) for line in array('--sweep', 'lr=1e-3,2e-3 seed=0,1')]
    assert [(recipe.lr, recipe.seed, run.output_dir) for recipe, run in runs] == [
        (1e-3, 0, 'runs/moganet_tiny/lr=1e-3_seed=0'), (1e-3, 1, 'runs/moganet_tiny/lr=1e-3_seed=1'),
        (2e-3, 0, 'runs/moganet_tiny/lr=2e-3_seed=0'), (2e-3, 1, 'runs/moganet_tiny/lr=2e-3_seed=1')]


def test_an_array_file_holds_recipes_or_flags():
    Path('recipes.txt').write_text('moganet_small\nmoganet_tiny --lr 2e-3  # higher\n\n--model resnet50 --epochs 100\n')
    args, rest = run_with_submitit.parse(['--data_path', 'images', '--array', 'recipes.txt'])
    runs = [run_with_submitit.resolve(line, 8) for line in run_with_submitit.commands(args, rest)]
    assert [(recipe.model, recipe.lr, recipe.epochs) for recipe, _ in runs] == [
        ('moganet_small', 1e-3, 300), ('moganet_tiny', 2e-3, 300), ('resnet50', 1e-3, 100)]
    assert len({run.output_dir for _, run in runs}) == 3


# ---- Refusals -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('words,line', [
    ((), 'there is no Slurm on this machine (no sbatch): submit from a login node, or use --local'),
    (('--gpus', '0'), '--gpus 0: give at least 1'),
    (('--gpus', 'all'), "--gpus: invalid int value: 'all'"),
    (('--gpus', '7', '--nodes', '3'), "but the recipe's batch is 1024"),
    (('--partitoin', 'gpu'), 'unknown flag --partitoin; did you mean --partition'),
    (('--lr', 'high'), '--lr high: give a number'),
    (('--time', '0:01:00'), '--signal_delay 120 leaves nothing of --time 0:01:00'),
    (('--local', '--nodes', '2'), '--local has this machine alone'),
    (('--local', '--device', 'cuda', '--gpus', '64'), '64 GPUs are asked for, and this machine has'),
    (('--sweep', 'lr=1e-3', '--array', 'x'), '--array and --sweep both'),
    (('--local', '--sweep', 'lr=1e-3'), '--local would start all runs of an array at once'),
    (('--sweep', 'lr'), 'write name=value,value'),
    (('--sweep', 'lr=1,'), 'write name=value,value'),
    (('--sweep', ''), 'the array is empty'),
    (('--sweep', 'lr=1e-3,1e-3'), 'two runs of the array would share a folder'),
    (('--sweep', 'learning=1'), 'unknown flag --learning'),
    (('--array', 'nowhere.txt'), '--array nowhere.txt cannot be read (No such file or directory)'),
])
def test_a_mistake_is_refused_in_one_line(words, line, tmp_path):
    assert line in refusal(*words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('words,line', [
    (('--partition', 'gpus'), 'invalid partition specified: gpus; Invalid partition name specified; sinfo --format='),
    (('--gpus', '8'), 'nothing is submitted: Requested node configuration is not available; sinfo --format='),
    (('--gpus', '4', '--output_dir', '/dev/null/run'), 'the folder /dev/null/run/slurm cannot be written'),
    (('--gpus', '4'), 'is on this machine alone; give one that all nodes see'),
])
def test_a_job_that_this_cluster_cannot_run_is_not_submitted(words, line, fake_slurm):
    assert line in refusal(*words)
    assert not list(Path('runs').glob('**/*.pkl'))


def test_slurms_refusal_is_one_line_and_nothing_is_left_behind(fake_slurm, tmp_path):
    line = refusal('--gpus', '4', '--constraint', 'x')
    assert line == 'Slurm refuses the job, nothing is submitted: QOSMaxNodePerUserLimit; and no more; ' \
                   "sinfo --format='%P %D %c %m %G %f' shows the partitions, and the nodes, cores, memory, GPUs and " \
                   'features that they have'
    assert not Path('runs').exists()


# ---- In the job -----------------------------------------------------------------------------------------------------

def start(task: Task, *, job_id: str = '7') -> None:
    job = SimpleNamespace(paths=SimpleNamespace(folder=Path()), job_id=job_id)
    task._count_start(job)


def test_restarts_are_counted_and_limited(tmp_path):
    task = Task([], 'run', max_restarts=2)
    Path('run').mkdir()
    for step in (900, 1000, 1100):
        Path(f'run/checkpoint-{step}.pth').touch()
        start(task)
    Path('run/checkpoint-1200.pth').touch()
    with pytest.raises(RuntimeError, match='restarted 2 times already, see --max_restarts'):
        start(task)
    start(Task([], 'run', max_restarts=2))  # another job, with a number that has come again


def test_a_start_without_progress_is_forgiven_once():
    task = Task([], 'run', max_restarts=9)
    Path('run').mkdir()
    Path('run/checkpoint-900.pth').touch()
    start(task)
    start(task)  # the first start may have come to nothing; from now on there must be progress between two
    with pytest.raises(RuntimeError, match=r'no progress .* checkpoint-900.pth is still the newest'):
        start(task)


@pytest.fixture
def local(tmp_path):
    """A function that runs a job on this machine in two processes, of which it returns the job."""
    images = make_image_folder(tmp_path / 'images')
    words = [*TINY, '--total_batch_size', '12', '--epochs', '2', '--warmup_epochs', '1', '--num_workers', '0',
             '--device', 'cpu', '--data_path', str(images)]

    def submitted(folder: Path):
        [job] = run_with_submitit.submit(['--local', '--gpus', '2', '--setup', 'export OMP_NUM_THREADS=1', *words,
                                          '--output_dir', str(folder)])
        return job
    return SimpleNamespace(submit=submitted, words=words)


@pytest.mark.slow
def test_a_local_job_equals_the_ranks_of_torchrun(local, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('PATH', '/usr/bin:/bin')
    job = local.submit(tmp_path / 'run')
    assert f'job {job.job_id}: ' in (told := capsys.readouterr().out)
    assert f'follow: tail -F {tmp_path}/run/slurm/{job.job_id}_0_log.out' in told
    assert f'cancel: kill {job.job_id}' in told
    end = time.monotonic() + 240
    while not job.done() and time.monotonic() < end:
        time.sleep(0.2)
    assert job.results()[0]['epoch'] == 1
    run((*local.words, '--output_dir', str(tmp_path / 'whole')), tmp_path / 'whole.txt', world_size=2)
    assert_same_run(tmp_path / 'run', tmp_path / 'whole')


def test_the_command_line_ends_with_one_line_and_status_2_also_from_another_folder(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    done = subprocess.run([sys.executable, str(ROOT / 'run_with_submitit.py'), *MODEL], capture_output=True, text=True,
                          env=environment)
    assert done.returncode == 2 and done.stdout == ''
    assert done.stderr == 'error: there is no Slurm on this machine (no sbatch): submit from a login node, or use ' \
                          '--local\n'
