"""A real Slurm on this machine alone, for the tests: munge, slurmctld, and one slurmd a node, all on the loopback.

    sudo python tests/slurm/cluster.py bash     # a shell with `sinfo`, `sbatch` and the rest in it; stops at its exit

Debian's and Ubuntu's packages are installed where they are missing (13 MB). Needs root: slurmd starts jobs as others.
"""
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ('munge', 'slurmctld', 'slurmd', 'slurm-client')
PROGRAMS = ('munged', 'slurmctld', 'slurmd', 'sbatch')
MUNGE = Path('/run/munge')

# There is no accounting database behind this cluster, so `sacct`, from which submitit learns how jobs ended, has
# nothing to say. The controller remembers the jobs of the last MinJobAge seconds; ask it instead.
SACCT = '''#!/bin/bash
jobs=
while [ $# -gt 0 ]; do
  if [ "$1" = -j ]; then jobs=$jobs${jobs:+,}$2; shift; fi
  shift
done
echo 'JobID|State|NodeList'
squeue --noheader --array --states=all ${jobs:+--jobs=$jobs} --format='%i|%T|%N' 2>/dev/null
exit 0
'''


class Unavailable(Exception):
    """Slurm cannot run here; the message says why."""


def install() -> None:
    """Sees to it that the programs are there. Raises Unavailable where they cannot be installed."""
    if os.geteuid() != 0:
        raise Unavailable('a Slurm for the tests needs root, to start its daemons')
    search = os.pathsep.join([os.environ['PATH'], '/usr/sbin', '/sbin'])
    if all(shutil.which(name, path=search) for name in PROGRAMS):
        return
    if shutil.which('apt-get') is None:
        raise Unavailable(f'no {", ".join(PROGRAMS)} on this machine, and no apt-get to install them')
    environment = {**os.environ, 'DEBIAN_FRONTEND': 'noninteractive'}
    for words in (['update'], ['install', '--yes', '--no-install-recommends', *PACKAGES]):
        done = subprocess.run(['apt-get', '-qq', *words], env=environment, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr or done.stdout).strip().splitlines()
            raise Unavailable(f'apt-get {words[0]} failed: {reason[-1] if reason else done.returncode}')


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, so that two clusters can run side by side."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(('127.0.0.1', 0))
        return [one.getsockname()[1] for one in sockets]


def configuration(folder: Path, *, nodes: int, cpus: int) -> str:
    """slurm.conf of a cluster with nodes n1, n2, ... and the partitions `main` and `high`, which preempts `main`."""
    host = socket.gethostname().split('.')[0]
    controller, *ports = free_ports(nodes + 1)
    settings = {
        'ClusterName': 'test', 'SlurmctldHost': f'{host}(127.0.0.1)', 'SlurmctldPort': controller,
        # Numbers of an earlier cluster must not come again: result files of its jobs may still lie about
        'FirstJobId': int(time.time()) % 10_000_000 + 1000,
        'SlurmUser': 'root', 'SlurmdUser': 'root', 'AuthType': 'auth/munge', 'CredType': 'cred/munge',
        'StateSaveLocation': folder / 'state', 'SlurmdSpoolDir': folder / 'spool-%n',
        'SlurmctldPidFile': folder / 'slurmctld.pid', 'SlurmdPidFile': folder / 'slurmd-%n.pid',
        'SlurmctldLogFile': folder / 'slurmctld.log', 'SlurmdLogFile': folder / 'slurmd-%n.log',
        # No cgroups, no accounting, no MPI, no mail: what a container may lack
        'ProctrackType': 'proctrack/linuxproc', 'TaskPlugin': 'task/none', 'MailProg': '/bin/true',
        'JobAcctGatherType': 'jobacct_gather/none', 'AccountingStorageType': 'accounting_storage/none',
        'JobCompType': 'jobcomp/none', 'MpiDefault': 'none',
        'CommunicationParameters': 'NoInAddrAny,NoCtldInAddrAny', 'SlurmdParameters': 'config_overrides',
        'SelectType': 'select/cons_tres', 'SelectTypeParameters': 'CR_Core_Memory', 'DefMemPerCPU': 500,
        'PreemptType': 'preempt/partition_prio', 'PreemptMode': 'REQUEUE', 'JobRequeue': 1,
        'SlurmctldParameters': 'preempt_send_user_signal', 'ReturnToService': 2, 'KillWait': 5, 'MinJobAge': 3600,
        # By default a requeued job waits half a minute: credentials expire slowly and the scheduler looks rarely
        'AuthInfo': 'cred_expire=5', 'SchedulerType': 'sched/backfill',
        'SchedulerParameters': 'bf_interval=2,sched_interval=2,sched_min_interval=0,batch_sched_delay=0',
    }
    lines = [f'{name}={value}' for name, value in settings.items()]
    for i, port in enumerate(ports, 1):  # the CPUs may be more than the machine has: config_overrides
        lines.append(f'NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} Boards=1 SocketsPerBoard=1 '
                     f'CPUs={cpus} CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=4000 State=UNKNOWN')
    lines.append('PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30')
    lines.append('PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF')
    return '\n'.join(lines) + '\n'


def wait_until(condition, *, what: str, seconds: float = 60) -> None:
    """Polls a condition. Raises TimeoutError with `what` was waited for."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f'{what}, for {seconds:g} s in vain')
        time.sleep(0.1)


def output(*command: str) -> str:
    """What a command prints, also where it fails."""
    return subprocess.run(command, capture_output=True, text=True).stdout


def munge_works() -> bool:
    credential = subprocess.run(['munge', '--no-input'], capture_output=True)
    return credential.returncode == 0 and subprocess.run(
        ['unmunge'], input=credential.stdout, capture_output=True).returncode == 0


def stop(pid_file: Path) -> None:
    """Ends a daemon that wrote its process id, and waits until it is gone."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        pid = int(pid_file.read_text())
        for number in (signal.SIGTERM, signal.SIGKILL):  # slurmd hangs on where it finds no controller
            os.kill(pid, number)
            with contextlib.suppress(TimeoutError):
                wait_until(lambda: 'State:\tZ' in Path(f'/proc/{pid}/status').read_text(), what=str(pid), seconds=10)


@contextlib.contextmanager
def running(folder: Path, *, nodes: int = 2, cpus: int = 2) -> Iterator[None]:
    """A cluster that runs within the context, in whose environment (SLURM_CONF, PATH) Slurm's programs find it.

    Args:
        folder: for the configuration, the logs and the state; a fresh one each time.

    Raises:
        Unavailable: where it cannot be installed.
        TimeoutError: where it does not come up, with the end of its logs.
    """
    install()
    folder.mkdir(parents=True, exist_ok=True)
    for name in ('state', 'bin', *(f'spool-n{i}' for i in range(1, nodes + 1))):
        (folder / name).mkdir()
    (folder / 'slurm.conf').write_text(configuration(folder, nodes=nodes, cpus=cpus))
    (folder / 'cgroup.conf').write_text('CgroupPlugin=cgroup/v1\n')  # not used; its autodetection fails without any
    (folder / 'bin/sacct').write_text(SACCT)
    (folder / 'bin/sacct').chmod(0o755)
    before = dict(os.environ)
    os.environ['SLURM_CONF'] = str(folder / 'slurm.conf')
    os.environ['PATH'] = os.pathsep.join([str(folder / 'bin'), os.environ['PATH'], '/usr/sbin', '/sbin'])
    own_munge = not munge_works()
    try:
        if own_munge:
            MUNGE.mkdir(exist_ok=True)
            MUNGE.chmod(0o755)
            shutil.chown(MUNGE, 'munge', 'munge')
            subprocess.run(['munged'], user='munge', group='munge', check=True)
            wait_until(munge_works, what='waited for munged')
        subprocess.run(['slurmctld', '-c'], check=True)
        for i in range(1, nodes + 1):
            subprocess.run(['slurmd', '-N', f'n{i}'], check=True)
        try:
            wait_until(lambda: output('sinfo', '-h', '-N', '-p', 'main', '-o', '%T').split() == ['idle'] * nodes,
                       what='waited for idle nodes')
        except TimeoutError as error:
            logs = output('sinfo', '-N', '-l') + ''.join(log.read_text()[-1500:] for log in folder.glob('*.log'))
            raise TimeoutError(f'{error}:\n{logs}') from None
        yield
    finally:
        if jobs := output('squeue', '-h', '-o', '%A').split():
            subprocess.run(['scancel', *jobs])
            with contextlib.suppress(TimeoutError):
                wait_until(lambda: not output('squeue', '-h'), what='waited for the jobs to end', seconds=30)
        for pid_file in (*folder.glob('slurmd-*.pid'), folder / 'slurmctld.pid', *([MUNGE / 'munged.pid'] * own_munge)):
            stop(pid_file)
        os.environ.clear()
        os.environ.update(before)


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as parent, running(Path(parent) / 'cluster'):
        sys.exit(subprocess.run(sys.argv[1:] or ['sinfo']).returncode)
