"""Trains on a SLURM cluster through submitit: main.py in each task of a job that outlives preemption and time limits.

    python run_with_submitit.py --nodes 2 --gpus 8 --partition gpu --model moganet_base --data_path /path/to/imagenet

Every flag of main.py goes through. `--dry_run` prints the sbatch script, `--local` needs no SLURM; `--sweep` and
`--array` submit an array with an output folder each.
"""
import argparse
import contextlib
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out

import submitit
from submitit.core.utils import FailedJobError, JobPaths, cloudpickle_dump
from submitit.helpers import Checkpointable, environment_variables
from submitit.slurm import slurm

import main as training
import recipes
import utils
from recipes import Recipe, Run
from utils import UserError

ROOT = Path(__file__).resolve().parent
# Names that ConvNeXt's script gave to these flags
SPELLINGS = {'ngpus': 'gpus', 'timeout': 'time', 'job_name': 'name'}
LOCAL_FILE_SYSTEMS = {'tmpfs', 'ramfs', 'devtmpfs'}


# ---- In the job -----------------------------------------------------------------------------------------------------

class Task(Checkpointable):
    """What every task of a job calls: `main.main` as one rank.

    submitit's signal handler asks for the same again after a preemption or a time limit. While main trains, its own
    handlers stand in place of that one and let all ranks save after the same update.
    """

    def __init__(self, argv: Sequence[str], output_dir: str, *, max_restarts: int):
        """
        Args:
            argv: flags of main.py.
            output_dir: the run's folder; '' for an evaluation.
        """
        self.argv, self.output_dir, self.max_restarts = list(argv), output_dir, max_restarts
        self.submitted = time.time_ns()  # tells this job from an earlier one of the same number

    def __call__(self) -> dict[str, Any] | None:
        """Trains, or goes on training.

        Returns:
            The last line of the run's log on rank 0, else None.

        Raises:
            RuntimeError: where it was restarted too often, or does not come on.
            SystemExit: where it failed, with the error as the job's result, or was interrupted, without one.
        """
        job = submitit.JobEnvironment()
        job.paths.result_pickle.unlink(missing_ok=True)  # of the start before
        if job.cluster == 'local':  # where `kill` cancels; submitit would ignore it until the training begins
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ |= {
            'RANK': str(job.global_rank), 'LOCAL_RANK': str(job.local_rank), 'WORLD_SIZE': str(job.num_tasks),
            'LOCAL_WORLD_SIZE': str(job.num_tasks // job.num_nodes)}
        os.environ.setdefault('MASTER_ADDR', job.hostnames[0] if job.num_nodes > 1 else '127.0.0.1')
        if job.global_rank == 0:
            self._count_start(job)

        def report(text: str) -> None:
            utils.to_stderr(text)
            self._set_error(job, text)

        status = training.main(self.argv, report=report)
        if status == 0:
            return self._finish(job) if job.global_rank == 0 else None
        if status > 128:
            self._leave(job, status)
        log = job.paths.stdout
        if job.global_rank == 0 and not job.paths.result_pickle.exists():  # a line in the log said why, as after a NaN
            self._set_error(job, '\n'.join([f'the training stopped; the end of {log}:',
                                            *log.read_text().splitlines()[-5:]]))
        sys.exit(status)

    def _notes(self, job: submitit.JobEnvironment) -> Path:
        return job.paths.folder / f'{job.job_id}_starts.json'

    def _starts(self, job: submitit.JobEnvironment) -> list[str]:
        """The newest checkpoint at each start so far, and 'complete' after the last."""
        try:
            notes = json.loads(self._notes(job).read_text())
        except (OSError, ValueError):
            return []
        return notes['starts'] if notes['submitted'] == self.submitted else []

    def _add_start(self, job: submitit.JobEnvironment, entry: str) -> None:
        utils.write_json(self._notes(job), {'submitted': self.submitted, 'starts': [*self._starts(job), entry]})

    def _count_start(self, job: submitit.JobEnvironment) -> None:
        """Counts the restarts, whoever asked for them. Raises RuntimeError where there is no point in another."""
        checkpoints = list(Path(self.output_dir).glob('checkpoint-[0-9]*.pth')) if self.output_dir else []
        newest = max(checkpoints, key=lambda path: path.stat().st_mtime, default=Path()).name
        starts = self._starts(job)
        if 'complete' not in starts:
            if len(starts) > self.max_restarts:
                raise RuntimeError(f'restarted {self.max_restarts} times already, see --max_restarts; the same command '
                                   'submits a job that continues')
            if self.output_dir and len(starts) > 1 and starts[-1] == newest:
                raise RuntimeError(f'no progress since the restart before: {newest or "no checkpoint"} is still the '
                                   'newest. Save more often, by --save_ckpt_steps, or ask for a longer --time')
        self._add_start(job, newest)

    def _finish(self, job: submitit.JobEnvironment) -> dict[str, Any] | None:
        self._add_start(job, 'complete')
        log = Path(self.output_dir, 'log.txt')
        return json.loads(log.read_text().splitlines()[-1]) if self.output_dir and log.exists() else None

    def _leave(self, job: submitit.JobEnvironment, status: int) -> None:
        """Ends an interrupted task; rank 0 sees to it that the job comes back unless that is seen to, or not wanted.

        SIGTERM has many senders. A job that `scancel` ends, or that Slurm itself puts back into the queue, is no longer
        RUNNING when it comes; a preempted one is, and so is one at its time limit.
        """
        if job.global_rank > 0:
            sys.exit(0)  # the first task to fail would end the job, rank 0 included
        again = signal.Signals[f'SIG{job.USR_SIG}']
        if state_of(job.job_id) == 'RUNNING' if job.cluster == 'slurm' else status == 128 + again:
            # main has put submitit's handler back, which counts timeouts, asks for the job again and exits
            signal.raise_signal(again)
        sys.exit(status)

    def _set_error(self, job: submitit.JobEnvironment, text: str) -> None:
        """Makes the error of the first task to fail the result of all, since the others fail because of it."""
        for rank in range(job.num_tasks):
            cloudpickle_dump(('error', text), JobPaths(job.paths.folder, job.job_id, rank).result_pickle)


def state_of(job_id: str) -> str:
    """What Slurm says about a job now, as RUNNING or CANCELLED; '' where it cannot be asked."""
    try:
        shown = ask('scontrol', '--oneliner', 'show', 'job', job_id)
    except UserError:
        return ''
    found = re.search(r'\bJobState=(\w+)', ' '.join(shown))
    return found[1] if found else ''


# ---- Submitting -----------------------------------------------------------------------------------------------------

def minutes(text: str) -> int:
    """A duration in minutes, of hours ('72', '1.5') or as Slurm writes it ('72:00:00', '3-00', '3-12:30:00')."""
    match = re.fullmatch(r'(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?', text)
    if match is None or (match[3] and not match[4] and not match[1]):  # Slurm's own m:s looks too much like h:m
        try:
            total = 60 * float(text)
        except ValueError:
            raise UserError(f'--time {text}: give hours, or HH:MM:SS, or D-HH:MM:SS') from None
    else:
        days, hours, mins, seconds = (int(part or 0) for part in match.groups())
        total = 24 * 60 * days + 60 * hours + mins + seconds / 60
    if not (math.isfinite(total) and total > 0):
        raise UserError(f'--time {text}: give more than nothing')
    return math.ceil(total)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f'{message.removeprefix("argument ")}; see run_with_submitit.py --help')


def parser() -> Parser:
    """The flags of this script alone."""
    made = Parser(prog='run_with_submitit.py', allow_abbrev=False, description=__doc__,
                  formatter_class=argparse.RawDescriptionHelpFormatter,
                  epilog='Everything else goes to main.py; see main.py --help.')
    add = made.add_argument
    add('--nodes', type=int, default=1, help='nodes (1)')
    add('--gpus', type=int, default=8, help='GPUs, and so tasks, on each node (8); with --device cpu, tasks')
    add('--time', default='72', help='time limit of each start: hours, HH:MM:SS or D-HH:MM:SS (72 hours)')
    for name, text in (('partition', "partition; Slurm's default where not given"), ('account', 'account to charge'),
                       ('qos', 'quality of service'), ('constraint', 'features that the nodes must have'),
                       ('comment', 'comment on the job'), ('exclude', 'nodes to leave out'),
                       ('nodelist', 'nodes to take'), ('mail', 'address to which its end and failure are mailed'),
                       ('name', "the job's name; the recipe's where not given")):
        add(f'--{name}', help=text)
    add('--cpus_per_gpu', type=int, default=10, help='cores of each task (10)')
    add('--mem_per_gpu', type=float, help="memory of each task, GB; the partition's default where not given")
    add('--setup', action='append', default=[], help="shell command to begin with, as 'module load cuda'; repeatable")
    add('--shared_dir', type=utils.expand,
        help="folder that all nodes see, for the job's files; the run's output folder where not given")
    add('--job_dir', type=utils.expand, help="the job's folder itself; 'slurm' in the shared folder where not given")
    add('--max_restarts', type=int, default=100, help='restarts after which to give up (100)')
    add('--signal_delay', type=int, default=120, help='seconds before the time limit at which to save (120)')
    add('--array', metavar='FILE', type=utils.expand,
        help='submit an array: a line of FILE each, a recipe or flags of main.py')
    add('--sweep', metavar='GRID', help="submit an array: all combinations of 'lr=1e-3,2e-3 seed=0,1,2'")
    add('--local', action='store_true', help='run on this machine, without Slurm')
    add('--dry_run', action='store_true', help='print the sbatch script and submit nothing')
    return made


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our flags, and the words for main.py. Raises UserError."""
    made = parser()
    own = {option for action in made._actions for option in action.option_strings}
    words = []
    for word in argv:
        flag, equals, value = word.partition('=')
        name = flag.removeprefix('--').replace('-', '_')
        name = SPELLINGS.get(name, name)
        words.append(f'--{name}{equals}{value}' if flag.startswith('--') and f'--{name}' in own else word)
    args, rest = made.parse_known_args(words)
    for name in ('nodes', 'gpus', 'cpus_per_gpu', 'mem_per_gpu', 'signal_delay'):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise UserError(f'--{name} {getattr(args, name)}: give at least 1')
    if args.max_restarts < 0:
        raise UserError(f'--max_restarts {args.max_restarts} is negative')
    if args.array is not None and args.sweep is not None:
        raise UserError('--array and --sweep both say what to submit; give one')
    if args.local and (args.array or args.sweep):
        raise UserError('--local would start all runs of an array at once: start them one by one, or leave it out')
    args.minutes = minutes(args.time)
    if 60 * args.minutes <= args.signal_delay:
        raise UserError(f'--signal_delay {args.signal_delay} leaves nothing of --time {args.time}: give less')
    return args, rest


def resolve(argv: list[str], world_size: int) -> tuple[Recipe, Run]:
    """What main.py will make of its flags in the job. Raises UserError as it does."""
    try:
        if any(word.replace('-', '_').startswith('__plan') for word in argv):
            raise UserError('--plan costs no job: python main.py, with the same flags')
        with environment_variables(WORLD_SIZE=world_size):
            return recipes.resolve(argv)
    except UserError as error:  # a misspelt flag may have been meant for this script
        if unknown := re.match(r'unknown flag --([\w-]+)', str(error)):
            own = [option[2:] for action in parser()._actions for option in action.option_strings]
            if close := utils.nearest(unknown[1], own, prefix='--'):
                raise UserError(f'unknown flag --{unknown[1]}{close}') from None
        raise


def commands(args: argparse.Namespace, rest: list[str]) -> list[list[str]]:
    """The command lines of main.py: one, or those of an array, each with an output folder of its own.

    Raises:
        UserError: for a file that cannot be read, a grid that is none, or two runs in one folder.
    """
    if args.array is not None:
        try:
            lines = [line.split('#')[0].strip() for line in Path(args.array).read_text().splitlines()]
        except OSError as error:
            raise UserError(f'--array {args.array} cannot be read ({error.strerror}); give a file with a recipe, or '
                            'flags of main.py, in each line') from None
        variants = [(line, shlex.split(line if line.startswith('-') else f'--recipe {line}')) for line in lines if line]
    elif args.sweep is not None:
        axes = []
        for word in args.sweep.split():
            name, equals, values = word.partition('=')
            if not (name and equals and all(values.split(','))):
                raise UserError(f"--sweep {word}: write name=value,value, as in --sweep 'lr=1e-3,2e-3 seed=0,1'")
            axes.append([(f'{name}={value}', f'--{name}={value}') for value in values.split(',')])
        variants = [('_'.join(label for label, _ in point), [flag for _, flag in point])
                    for point in itertools.product(*axes)]
    else:
        return [rest]
    if not variants or not all(words for _, words in variants):
        raise UserError('the array is empty: say what to vary')
    made = []
    for label, words in variants:
        _, run = resolve([*rest, *words], args.nodes * args.gpus)
        folder = Path(run.output_dir) / re.sub(r'[^\w.=+-]+', '_', label.lstrip('-'))
        made.append([*rest, *words, '--output_dir', str(folder)])
    if len({words[-1] for words in made}) < len(made):
        raise UserError('two runs of the array would share a folder: leave out the one that is there twice')
    return made


def free_port() -> int:
    """A port for rank 0, below 32768, where Linux begins to hand out ports: so it stays free until rank 0 binds it."""
    for port in random.sample(range(15000, 32768), 1000):
        with contextlib.suppress(OSError), socket.create_server(('', port)):
            return port
    raise OSError('all ports are in use')


def setup(args: argparse.Namespace) -> list[str]:
    """The shell commands that make a task's environment."""
    return [*args.setup, f'export PYTHONPATH={shlex.quote(str(ROOT))}:$PYTHONPATH']


def parameters(args: argparse.Namespace, *, name: str, device: str) -> dict[str, Any]:
    """The job as submitit's executor for Slurm takes it."""
    port = 'import run_with_submitit; print(run_with_submitit.free_port())'
    values = {
        'job_name': args.name or name, 'nodes': args.nodes, 'ntasks_per_node': args.gpus, 'time': args.minutes,
        'gpus_per_node': None if device == 'cpu' else args.gpus, 'cpus_per_task': args.cpus_per_gpu,
        'mem': f'{math.ceil(1024 * args.mem_per_gpu * args.gpus)}M' if args.mem_per_gpu else None,
        'signal_delay_s': args.signal_delay, 'mail_user': args.mail, 'mail_type': args.mail and 'END,FAIL',
        'additional_parameters': {'requeue': True},
        # srun takes no --cpus-per-task from sbatch since Slurm 22.05, and would leave a task one core
        'srun_args': ['--kill-on-bad-exit=1', f'--cpus-per-task={args.cpus_per_gpu}'],
        # The batch script runs on the first node, which is rank 0's
        'setup': [*setup(args), f'export MASTER_PORT=$({shlex.join([sys.executable, "-c", port])})'],
        **{key: getattr(args, key) for key in ('partition', 'account', 'qos', 'constraint', 'comment', 'exclude',
                                               'nodelist')}}
    return {key: value for key, value in values.items() if value is not None}


def ask(*command: str) -> list[str]:
    """The lines that a program of Slurm prints."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, 'stderr', '') or str(error)).strip().splitlines()
        raise UserError(f'Slurm does not answer ({reason[0]}); ask again later, or use --local') from None


def check_cluster(script: str) -> None:
    """Refuses a job that this Slurm would not take. Raises UserError."""
    if shutil.which('sbatch') is None or shutil.which('srun') is None:
        raise UserError('there is no Slurm on this machine (no sbatch): submit from a login node, or use --local')
    try:
        tried = subprocess.run(['sbatch', '--test-only'], input=script, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        raise UserError('Slurm does not answer (sbatch --test-only, 60 s); ask again later, or use --local') from None
    if tried.returncode:
        reason = '; '.join(re.findall(r'(?:error|failure): (.*)', tried.stderr)) or tried.stderr.strip()
        raise UserError(f"Slurm refuses the job, nothing is submitted: {reason}; sinfo --format='%P %D %c %m %G %f' "
                        'shows the partitions, and the nodes, cores, memory, GPUs and features that they have')


def check_machine(args: argparse.Namespace, device: str) -> None:
    """Refuses a job that this machine cannot run by itself. Raises UserError."""
    import torch
    if args.nodes > 1:
        raise UserError(f'--local has this machine alone: give --nodes 1, not {args.nodes}')
    if device in ('auto', 'cuda') and torch.cuda.device_count() < args.gpus:
        raise UserError(f'{args.gpus} GPUs are asked for, and this machine has {torch.cuda.device_count()}: give '
                        'another number by --gpus, or --device cpu')


def check_folder(folder: Path, *, shared: bool) -> None:
    """Makes a folder of a job. Raises UserError where it cannot be written, or other nodes would not see it."""
    fixed = JobPaths.get_first_id_independent_folder(folder)
    try:
        fixed.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=fixed):
            pass
    except OSError as error:
        raise UserError(f'the folder {fixed} cannot be written ({error.strerror}); give another --output_dir, '
                        '--shared_dir or --job_dir') from None
    if shared and is_local(fixed):
        raise UserError(f'the folder {fixed} is on this machine alone; give one that all nodes see, by --output_dir, '
                        '--shared_dir or --job_dir')


def is_local(folder: Path) -> bool:
    """Whether other machines certainly do not see a folder: one in memory, or for temporary files."""
    folder = folder.resolve()
    if any(folder.is_relative_to(parent) for parent in ('/tmp', '/var/tmp', Path(tempfile.gettempdir()).resolve())):
        return True
    try:
        mounts = [line.split()[1:3] for line in Path('/proc/mounts').read_text().splitlines()]
    except OSError:  # not Linux
        return False
    above = [(mount, kind) for mount, kind in mounts if folder.is_relative_to(mount.replace('\\040', ' '))]
    return max(above, key=lambda entry: len(entry[0]), default=('', ''))[1] in LOCAL_FILE_SYSTEMS


def is_one_machine() -> bool:
    """Whether all nodes of this Slurm have an address of this machine, so that every folder is shared."""
    addresses = set(ask('sinfo', '--noheader', '--Node', '--format=%o'))
    return addresses <= {'127.0.0.1', 'localhost', socket.gethostname()}


def submit(argv: Sequence[str]) -> list[submitit.Job]:
    """Submits what a command line of this script says, and tells how to follow it.

    Returns:
        The jobs, several for an array, none after `--dry_run`.

    Raises:
        UserError: for what cannot be run; then nothing is submitted.
    """
    args, rest = parse(argv)
    lines = commands(args, rest)
    runs = [resolve(line, args.nodes * args.gpus) for line in lines]
    folders = [Path(run.output_dir).absolute() for _, run in runs if run.output_dir]
    recipe, first = runs[0]
    parent = args.shared_dir or (os.path.commonpath(folders) if folders else f'runs/{recipe.name}')
    folder = Path(args.job_dir or Path(parent, 'slurm')).absolute()
    values = parameters(args, name=recipe.name, device=first.device)
    command = shlex.join([sys.executable, '-u', '-m', 'submitit.core._submit', str(folder)])
    script = slurm._make_sbatch_string(command=command, folder=folder, map_count=len(lines) if len(lines) > 1 else None,
                                       **values)
    if args.dry_run:
        print(script)
        return []
    if args.local:
        check_machine(args, first.device)
    else:
        check_cluster(script)
    for made, run in runs:
        if args.local:
            recipes.check_start(made, run)
        elif made.data_set == 'image_folder' and not run.checkpoint and not Path(run.data_path).exists():
            print(f'note: {run.data_path} is not seen from here; the nodes of the job must see it', file=sys.stderr)
    shared = not args.local and not is_one_machine()
    for path in (folder, *folders):
        check_folder(path, shared=shared)
    tasks = [Task(line, '' if run.eval else run.output_dir, max_restarts=args.max_restarts)
             for line, (_, run) in zip(lines, runs, strict=True)]
    if args.local:
        # submitit's own `setup` mistakes the shell's process id for the job's where the shell makes way for its last
        # command, as bash does
        lines = [*setup(args), 'exec "$@"']
        if 'CUDA_VISIBLE_DEVICES' in os.environ:  # submitit would take the machine's first GPUs
            lines.insert(0, f'export CUDA_VISIBLE_DEVICES={shlex.quote(os.environ["CUDA_VISIBLE_DEVICES"])}')
        python = shlex.join(['sh', '-c', ' && '.join(lines), 'sh', sys.executable])
        executor: Any = submitit.LocalExecutor(folder, max_num_timeout=args.max_restarts, python=python)
        executor.update_parameters(timeout_min=args.minutes, tasks_per_node=args.gpus,
                                   gpus_per_node=values.get('gpus_per_node', 0), signal_delay_s=args.signal_delay)
        os.environ['MASTER_PORT'] = str(free_port())
    else:
        executor = submitit.SlurmExecutor(folder, max_num_timeout=args.max_restarts)
        executor.update_parameters(**values)
    try:
        jobs = executor.submit_array(tasks) if len(tasks) > 1 else [executor.submit(tasks[0])]
    except FailedJobError as error:  # what --test-only does not look at, as how many jobs a user may have
        raise UserError(f'Slurm refuses the job: {" ".join(str(error).split())}') from None
    tell(jobs, runs, cancel='kill' if args.local else 'scancel')
    return jobs


def tell(jobs: list[submitit.Job], runs: list[tuple[Recipe, Run]], *, cancel: str) -> None:
    """Prints each job's number, its folder, how to follow it, and how to cancel."""
    for job, (recipe, run) in zip(jobs, runs, strict=True):
        print(f'job {job.job_id}: {recipe.name} in {run.output_dir or job.paths.folder}')
        print(f'  follow: tail -F {shlex.quote(str(job.task(0).paths.stdout))}')
    print(f'  cancel: {cancel} {jobs[0].job_id.split("_")[0]}')


def main() -> int:
    """Submits the command line."""
    submit(sys.argv[1:])
    return 0


if __name__ == '__main__':
    # Imported by its name, by which a job finds `Task` again
    import run_with_submitit
    utils.run_cli(run_with_submitit.main)
