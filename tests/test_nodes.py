"""Several nodes: network namespaces joined by a veth; each hosts file maps its own name to loopback, as Debian's."""
import contextlib
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import utils
from builders import assert_same_run, state_of
from runs import TINY

ROOT = Path(__file__).resolve().parent.parent
TRAIN = (*TINY, '--data_set', 'fake', '--num_classes', '5', '--total_batch_size', '16', '--num_workers', '0',
         '--warmup_epochs', '0', '--device', 'cpu')
SIGNAL = '''
import os, signal
def observe(state):
    if rank == 1 and state.step == {update}:
        os.kill(os.getpid(), signal.SIGTERM)
'''


@dataclasses.dataclass
class Nodes:
    """Two nodes, 10.9.0.1 and 10.9.0.2, each in a namespace of its own."""

    names: list[str]
    folder: Path
    started: list[subprocess.Popen] = dataclasses.field(default_factory=list)

    def start(self, node: int, *command: str, **environment: str) -> None:
        """Starts a command on a node, whose output goes to the file `node<N>.txt`."""
        hosts = self.folder / f'hosts{node}'
        hosts.write_text(f'127.0.0.1 localhost\n127.0.1.1 node{node}\n10.9.0.{2 - node} node{1 - node}\n')
        inside = f'mount --bind {hosts} /etc/hosts && hostname node{node} && exec "$@"'
        with open(self.folder / f'node{node}.txt', 'w') as output:
            self.started.append(subprocess.Popen(
                ['ip', 'netns', 'exec', self.names[node], 'unshare', '--uts', '--mount', 'sh', '-c', inside, 'sh',
                 *command], cwd=ROOT, stdout=output, stderr=output, start_new_session=True,
                env=os.environ | {'OMP_NUM_THREADS': '1'} | environment))

    def start_ranks(self, words: tuple[str, ...], *, before: str = '') -> None:
        """Starts one rank of main.py on each node, without torchrun; all know node 0 by its name, as from Slurm."""
        code = f'{before}\nimport sys, main; sys.exit(main.main(sys.argv[1:], observer=globals().get("observe")))'
        for node in range(2):
            self.start(node, sys.executable, '-c', f'rank = {node}\n{code}', *words, RANK=str(node), WORLD_SIZE='2',
                       LOCAL_RANK='0', LOCAL_WORLD_SIZE='1', MASTER_ADDR='node0', MASTER_PORT='29555')

    def text(self, node: int) -> str:
        return (self.folder / f'node{node}.txt').read_text()

    def wait(self, timeout: float = 100) -> list[int]:
        """The exit status of each node's command, in the order of their starts."""
        statuses = [process.wait(timeout=timeout) for process in self.started]
        self.started.clear()
        return statuses


@pytest.fixture
def nodes(tmp_path):
    if not hasattr(os, 'getuid') or os.getuid() or not all(map(shutil.which, ('ip', 'unshare', 'mount'))):
        pytest.skip('network namespaces need root, iproute2 and util-linux')
    names = [f'moganet-{os.getpid()}-{node}' for node in range(2)]
    veths = [f'mn{os.getpid()}{end}' for end in 'ab']
    made = Nodes(names, tmp_path)

    def ip(*words: str) -> None:
        done = subprocess.run(['ip', *words], capture_output=True, text=True, timeout=30)
        if done.returncode:
            pytest.skip(f'no network namespaces here: {done.stderr.strip()}')

    try:
        for name in names:
            ip('netns', 'add', name)
        ip('link', 'add', veths[0], 'netns', names[0], 'type', 'veth', 'peer', 'name', veths[1], 'netns', names[1])
        for node, (name, veth) in enumerate(zip(names, veths, strict=True)):
            ip('-n', name, 'address', 'add', f'10.9.0.{node + 1}/24', 'dev', veth)
            for link in (veth, 'lo'):
                ip('-n', name, 'link', 'set', link, 'up')
            ip('-n', name, 'route', 'add', 'default', 'dev', veth)  # as every host of a cluster has
        yield made
    finally:
        for process in made.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=10)
        for name in names:
            subprocess.run(['ip', 'netns', 'del', name], capture_output=True, timeout=30)


def test_two_nodes_whose_names_are_loopback_train_by_torchrun(nodes):
    words = (*TRAIN, '--epochs', '1', '--output_dir', str(nodes.folder / 'run'))
    for node in range(2):
        nodes.start(node, sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', f'--node-rank={node}',
                    '--nproc_per_node=1', '--master-addr=10.9.0.1', '--master-port=29555', 'main.py', *words)
    assert nodes.wait() == [0, 0], nodes.text(0) + nodes.text(1)
    assert 'Training is complete' in nodes.text(0)


@pytest.mark.slow
def test_a_signal_to_one_node_stops_both_after_the_same_update_and_the_pair_goes_on_in_equal_bits(nodes):
    words = (*TRAIN, '--epochs', '2', '--output_dir')
    whole, parts = nodes.folder / 'whole', nodes.folder / 'parts'
    nodes.start_ranks((*words, str(whole)))
    assert nodes.wait() == [0, 0], nodes.text(0) + nodes.text(1)
    nodes.start_ranks((*words, str(parts)), before=SIGNAL.format(update=2))
    assert nodes.wait() == [128 + signal.SIGTERM] * 2, nodes.text(0) + nodes.text(1)
    assert state_of(parts)['step'] == 3
    nodes.start_ranks((*words, str(parts)))
    assert nodes.wait() == [0, 0], nodes.text(0) + nodes.text(1)
    assert_same_run(parts, whole)


@pytest.mark.slow
def test_a_node_that_is_cut_off_ends_the_other_with_one_line_and_the_restarted_pair_goes_on_in_equal_bits(nodes):
    words, veth = (*TRAIN, '--epochs', '500', '--print_freq', '1', '--output_dir'), f'mn{os.getpid()}b'
    whole, parts = nodes.folder / 'whole', nodes.folder / 'parts'
    # The node without rank 0 may just be asking its store, which only the limit of all waits ends
    nodes.start_ranks((*words, str(parts)), before='import utils\n'
                      'utils.RANK_PATIENCE, utils.ERROR_PATIENCE, utils.STALL = 15, 2, 30')
    end = time.monotonic() + 60
    while 'epoch 1 of 500 done' not in nodes.text(0) and time.monotonic() < end:
        time.sleep(0.05)
    subprocess.run(['ip', '-n', nodes.names[1], 'link', 'set', veth, 'down'], check=True, timeout=30)
    assert nodes.wait() == [1, 1], nodes.text(0) + nodes.text(1)
    for node in range(2):
        assert nodes.text(node).count('error: ') == 1 and 'Traceback' not in nodes.text(node), nodes.text(node)
    for repair in (('link', 'set', veth, 'up'), ('route', 'replace', 'default', 'dev', veth)):
        subprocess.run(['ip', '-n', nodes.names[1], *repair], check=True, timeout=30)
    stop = state_of(parts)['step'] + 2  # both runs end there by a signal, since 500 epochs take long
    for folder in (parts, whole):
        nodes.start_ranks((*words, str(folder)), before=SIGNAL.format(update=stop))
        assert nodes.wait() == [128 + signal.SIGTERM] * 2, nodes.text(0) + nodes.text(1)
    assert_same_run(parts, whole)


def test_the_interface_of_an_address_is_none_for_the_loopback_and_for_no_address():
    assert [utils.interface_to(address) for address in ('127.0.0.1', 'localhost', '::1', 'no such host')] == [None] * 4


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_all_ranks_stop_after_the_same_update_whoever_has_a_signal_and_however_far_ahead(device, monkeypatch):
    """A rank is ahead of another by what the exchange of gradients allows, on CUDA by `CUDA_LEAD` updates more."""
    ahead = utils.CUDA_LEAD if device == 'cuda' else 0
    monkeypatch.setattr(utils.StopRequest, '_bound_lead', lambda self: None)
    draw = random.Random(0)
    for _ in range(300):
        store = dist.HashStore()
        monkeypatch.setattr(utils, '_store', store)
        ranks = [utils.StopRequest(utils.Processes(torch.device(device), rank, 4), ()) for rank in range(4)]
        done, stopped, signalled, first = [0] * 4, {}, set(), None
        while able := [rank for rank in range(4)  # the run ends after 12 updates
                       if rank not in stopped and done[rank] < 12 and done[rank] - min(done) <= ahead]:
            rank = draw.choice(able)
            if draw.random() < 0.1:
                ranks[rank]._received = 15
                signalled.add(rank)
            done[rank] += 1
            first = first or (done[rank] if rank in signalled else None)
            if ranks[rank].agreed():
                stopped[rank] = done[rank]
        last = first + 1 + ahead if first else 13
        assert stopped == (dict.fromkeys(range(4), last) if last <= 12 else {})
