"""A damaged checkpoint is recognised, whichever byte is wrong."""
import random
from pathlib import Path

import pytest
import torch

from training.checkpoint import KEYS, CheckpointError, CheckpointFolder, load

STATE = {**dict.fromkeys(KEYS, 0), 'version': 1, 'model': {'weight': torch.arange(6.0)}, 'step': 3}


@pytest.fixture
def file(tmp_path) -> Path:
    torch.save(STATE, tmp_path / 'checkpoint-3.pth')
    return tmp_path / 'checkpoint-3.pth'


def test_any_wrong_byte_is_either_harmless_or_found(file):
    content = file.read_bytes()
    assert torch.equal(load(file)['model']['weight'], STATE['model']['weight'])
    found = 0
    for position in range(len(content)):
        for value in {content[position] ^ 1, 255 - content[position]}:
            file.write_bytes(content[:position] + bytes([value]) + content[position + 1:])
            try:
                state = load(file)
            except CheckpointError as error:
                found += 1
                assert '\n' not in str(error)
            else:  # a byte that nobody reads: a time stamp, padding
                assert torch.equal(state['model']['weight'], STATE['model']['weight'])
                assert {key: state[key] for key in KEYS - {'model'}} == {key: STATE[key] for key in KEYS - {'model'}}
    assert found > len(content)


@pytest.mark.parametrize('length', [0, 1, 100, -1])
def test_a_cut_file_is_found(file, length):
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CheckpointError):
        load(file)


def test_an_error_of_any_kind_while_writing_is_not_taken_for_a_success(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path, keep=1)

    def fail(*_: object) -> None:
        raise MemoryError('no memory')

    monkeypatch.setattr(torch, 'save', fail)
    folder.save(STATE)
    assert not folder.wait() and not list(tmp_path.iterdir())
    monkeypatch.undo()
    folder.save(STATE)
    assert folder.wait() and (tmp_path / 'checkpoint-3.pth').exists()


def test_files_are_sorted_as_numbers_and_the_newest_good_one_is_taken(tmp_path):
    for step in (9, 100, 20):
        torch.save({**STATE, 'step': step}, tmp_path / f'checkpoint-{step}.pth')
    folder = CheckpointFolder(tmp_path, keep=2)
    assert [path.name for path in folder.numbered()] == [f'checkpoint-{step}.pth' for step in (9, 20, 100)]
    assert folder.newest()[1]['step'] == 100
    (tmp_path / 'checkpoint-100.pth').write_bytes(random.Random(0).randbytes(3000))
    assert folder.newest()[1]['step'] == 20
