"""Files of every released shape evaluate to the recorded logits, run nothing, and where wrong are said to be."""
import argparse
import collections
import http.server
import io
import json
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

import models  # noqa: F401  registers MogaNet
import recipes
import reference
from builders import (
    Payload,
    averaged_file,
    bare_file,
    deit_file,
    legacy_timm_file,
    mmcv_file,
    put,
    safetensors_file,
    seeded,
    stripped_timm_file,
    timm_file,
    timm_file_of_numpy_1,
    timm_file_of_numpy_2,
    training_file,
    wrapped_file,
)
from models import download
from models.released import RELEASED
from models.weights import Weights, apply_weights, build_model, load_weights
from utils import UserError

XT = 'moganet_xtiny'
State = dict[str, Tensor]


# ---- Files shaped like the released ones ----------------------------------------------------------------------------

WITH_EMA = {'timm': timm_file, 'timm, NumPy 2': timm_file_of_numpy_2, 'timm, NumPy 1': timm_file_of_numpy_1,
            'timm, stripped': stripped_timm_file, 'timm, no zip': legacy_timm_file, 'mmcv': mmcv_file,
            'deit': deit_file, 'training': training_file}
WITHOUT = {**WITH_EMA, 'bare': bare_file, 'bare, wrapped': wrapped_file, 'bare, averaged': averaged_file,
           'safetensors': safetensors_file}
DOUBLE = ('mmcv', 'training')  # what these files say of themselves


def assert_recorded_logits(read: Weights) -> None:
    model = build_model(read, XT)
    with torch.inference_mode():
        logits = model(reference.seeded_images(2, 3, 224, 224))
    expected = reference.LOGITS[f'{XT}/224/double_gate' if read.gate == 'double' else f'{XT}/224']
    # round-off of float32 in another order of operations; the other weights differ by 1.4, the other gate by 2e-3
    assert reference.relative_error(logits, expected) <= 1e-5


@pytest.mark.parametrize('which', ['raw', 'ema'])
@pytest.mark.parametrize('kind', WITH_EMA)
def test_raw_and_averaged_weights_of_each_format_evaluate_to_the_recorded_logits(
        kind: str, which: str, tmp_path: Path) -> None:
    wanted, other = seeded(0), seeded(1)
    WITH_EMA[kind](tmp_path / 'file', *((wanted, other) if which == 'raw' else (other, wanted)))
    read = load_weights(tmp_path / 'file', which)
    assert (read.which, read.format, read.gate) == (
        which, kind.split(',')[0], 'double' if kind in DOUBLE else None)
    assert list(read.state_dict) == list(wanted)
    assert_recorded_logits(read)


@pytest.mark.parametrize('kind', WITHOUT)
def test_files_without_an_average_evaluate_to_the_recorded_logits(kind: str, tmp_path: Path) -> None:
    WITHOUT[kind](tmp_path / 'file', seeded(0), None)
    read = load_weights(tmp_path / 'file')
    assert (read.which, read.format) == ('raw', kind.split(',')[0])
    assert_recorded_logits(read)
    with pytest.raises(UserError, match='has no ema weights, only raw'):
        load_weights(tmp_path / 'file', 'ema')


@pytest.mark.parametrize('kind', WITH_EMA)
def test_auto_takes_the_average_where_there_is_one(kind: str, tmp_path: Path) -> None:
    WITH_EMA[kind](tmp_path / 'file', seeded(1), seeded(0))
    read = load_weights(tmp_path / 'file')
    assert read.which == 'ema'
    assert all(torch.equal(value, seeded(0)[name]) for name, value in read.state_dict.items())


def test_mmcv_buffers_without_a_twin_are_shared_and_a_lost_parameter_is_an_error(tmp_path: Path) -> None:
    mmcv_file(tmp_path / 'file', seeded(1), seeded(0))
    payload = torch.load(tmp_path / 'file')
    entries = payload['state_dict']
    for name in [name for name in entries if name.startswith('ema_') and name.endswith(
            ('running_mean', 'running_var', 'num_batches_tracked'))]:
        del entries[name]
    torch.save(payload, tmp_path / 'file')
    raw = load_weights(tmp_path / 'file', 'raw').state_dict
    assert torch.equal(raw['norm4.running_mean'], seeded(0)['norm4.running_mean'])
    assert torch.equal(raw['norm4.weight'], seeded(1)['norm4.weight'])
    del entries['ema_backbone_norm4_weight']
    torch.save(payload, tmp_path / 'file')
    with pytest.raises(UserError, match='not ema_backbone_norm4_weight'):
        load_weights(tmp_path / 'file')


@pytest.mark.parametrize(('config', 'gate'), [
    ('attn_force_fp32=True', 'double'), ("'attn_force_fp32': False", 'single'), ('attn_force_fp32 = True', 'double'),
    ("arch='xt'", None), ('a=dict(attn_force_fp32=True), b=dict(attn_force_fp32=False)', None)])
def test_gate_is_read_from_an_mmcv_config(config: str, gate: str | None, tmp_path: Path) -> None:
    mmcv_file(tmp_path / 'file', seeded(0), None, config=config)
    assert load_weights(tmp_path / 'file').gate == gate


def test_training_file_of_the_best_average_holds_only_the_average(tmp_path: Path) -> None:
    training_file(tmp_path / 'file', seeded(0), None)
    torch.save({**torch.load(tmp_path / 'file'), 'which': 'ema'}, tmp_path / 'file')
    assert load_weights(tmp_path / 'file').which == 'ema'
    with pytest.raises(UserError, match='has no raw weights, only ema'):
        load_weights(tmp_path / 'file', 'raw')


def test_meta_tells_how_to_evaluate(tmp_path: Path) -> None:
    training_file(tmp_path / 'file', seeded(0), None)
    meta = load_weights(tmp_path / 'file').meta
    assert (meta['model'], meta['test_size'], meta['crop_pct'], meta['interpolation'], meta['crop_mode']) == (
        XT, 256, 0.8, 'bicubic', 'center')
    assert meta['classes'][7] == 'class 7' and meta['recipe']['name'] == 'moganet_xtiny_3aug_256' and meta['epoch'] == 3
    timm_file_of_numpy_1(tmp_path / 'file', seeded(0), None)
    meta = load_weights(tmp_path / 'file').meta
    assert (meta['model'], meta['metric'], meta['epoch'], meta['args']['lr']) == (XT, 76.5, 299, 1e-3)
    assert 'test_size' not in meta and 'mean' not in meta  # its args name none
    deit_file(tmp_path / 'file', seeded(0), None)
    assert load_weights(tmp_path / 'file').meta['test_size'] == 224


@pytest.mark.parametrize('scalar', [
    np.float64(76.5), np.float32(0.5), np.float16(0.5), np.int64(-3), np.uint8(200), np.bool_(True),
    np.dtype('>f8').type(1.5), np.array(2.5, '>f8')[()]], ids=repr)
def test_numpy_scalars_become_the_plain_numbers_they_are(scalar: Any, tmp_path: Path) -> None:
    torch.save({'state_dict': {'w': torch.ones(1)}, 'metric': scalar}, tmp_path / 'file')
    metric = load_weights(tmp_path / 'file').meta['metric']
    assert metric == scalar.item() and type(metric) is type(scalar.item())


# ---- Nothing runs ---------------------------------------------------------------------------------------------------

class TensorSubclass(Tensor):
    """Its state is set by a method of its own, which is code in a file's name."""

    def __setstate__(self, state: Any) -> None:
        Path(state['marker']).touch()


def shell(marker: Path) -> Payload:
    return Payload(os.system, f'touch {marker}')


def evil_tensor(marker: Path) -> Tensor:
    tensor = torch.ones(2).as_subclass(TensorSubclass)
    tensor.marker = str(marker)
    return tensor


MALICIOUS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    'os.system': (lambda path, marker: torch.save(shell(marker), path), 'posix.system'),
    'nested in args': (lambda path, marker: torch.save(
        {'state_dict': seeded(0), 'args': argparse.Namespace(model=XT, hook=[{'a': shell(marker)}])}, path),
        'posix.system'),
    'among the weights': (lambda path, marker: torch.save({'w': torch.ones(1), 'x': shell(marker)}, path),
                          'posix.system'),
    'legacy, no zip': (lambda path, marker: torch.save(
        {'model': {}, 'x': shell(marker)}, path, _use_new_zipfile_serialization=False), 'posix.system'),
    'plain pickle': (lambda path, marker: path.write_bytes(pickle.dumps(shell(marker), 2)), 'posix.system'),
    'plain pickle of protocol 4': (lambda path, marker: path.write_bytes(pickle.dumps(shell(marker), 4)),
                                   'posix.system'),
    'protocol 4 in a zip': (lambda path, marker: torch.save([shell(marker)], path, pickle_protocol=4), 'posix.system'),
    'eval': (lambda path, marker: torch.save(Payload(eval, f'open({str(marker)!r}, "w")'), path), 'eval'),
    'getattr': (lambda path, marker: torch.save(
        Payload(getattr, Payload(__import__, 'pathlib'), 'Path'), path), 'getattr'),
    'tensor subclass': (lambda path, marker: torch.save({'w': evil_tensor(marker)}, path), 'TensorSubclass'),
    'torch.load itself': (lambda path, marker: torch.save(Payload(torch.load, str(marker)), path),
                          'torch.serialization.load'),
    'a whole model': (lambda path, marker: torch.save(nn.Linear(2, 2), path), 'torch.nn.modules.linear.Linear'),
    'defaultdict with a factory': (lambda path, marker: torch.save(
        collections.defaultdict(os.getcwd, a=1), path), 'collections.defaultdict'),
    'NumPy array of objects': (lambda path, marker: torch.save({'a': np.array([shell(marker)], object)}, path),
                               'multiarray._reconstruct'),
}


@pytest.mark.parametrize('name', MALICIOUS)
def test_malicious_file_is_refused_with_the_name_of_what_it_needs_and_nothing_runs(name: str, tmp_path: Path) -> None:
    write, needed = MALICIOUS[name]
    marker = tmp_path / 'it-ran'
    write(tmp_path / 'file', marker)
    with pytest.raises(UserError, match='refused') as refusal:
        load_weights(tmp_path / 'file')
    assert needed in str(refusal.value) and '\n' not in str(refusal.value)
    assert not marker.exists()


@pytest.mark.parametrize('name', ['os.system', 'legacy, no zip', 'tensor subclass', 'eval'])
def test_malicious_files_do_run_where_they_are_trusted(name: str, tmp_path: Path) -> None:
    """Else the test above would prove nothing."""
    MALICIOUS[name][0](tmp_path / 'file', tmp_path / 'it-ran')
    torch.load(tmp_path / 'file', weights_only=False)
    assert (tmp_path / 'it-ran').exists()


@pytest.mark.parametrize('dtype', ['O', 'U3', 'V8', 'M8[s]'])
def test_no_forged_numpy_scalar_reaches_numpy(dtype: str, tmp_path: Path) -> None:
    scalar = np.float64(1).__reduce__()[0]
    torch.save({'state_dict': {}, 'metric': Payload(scalar, np.dtype(dtype), b'\x01' * 8)}, tmp_path / 'file')
    with pytest.raises(UserError, match='damaged or no checkpoint'):
        load_weights(tmp_path / 'file')


def test_no_forged_format_reaches_struct(tmp_path: Path) -> None:
    scalar = np.float64(1).__reduce__()[0]
    torch.save({'state_dict': {}, 'metric': Payload(scalar, argparse.Namespace(format='8s'), b'8 bytes.')},
               tmp_path / 'file')
    with pytest.raises(UserError, match='a scalar of Namespace'):
        load_weights(tmp_path / 'file')


def test_torchscript_program_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / 'file')
    with pytest.raises(UserError, match='TorchScript'):
        load_weights(tmp_path / 'file')


# ---- Wrong files ----------------------------------------------------------------------------------------------------

def good_bytes() -> bytes:
    buffer = io.BytesIO()
    torch.save({'state_dict': {'w': torch.arange(40000.0)}, 'arch': 'x'}, buffer)
    return buffer.getvalue()


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:]


@pytest.mark.parametrize(('content', 'message'), [
    (b'', 'is empty'),
    (b'<!DOCTYPE html>\n<html><body>Not Found</body></html>', 'web page'),
    (b'\n  <html lang="en">', 'web page'),
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n', 'git lfs pull'),
    (b'{"model": "no checkpoint"}', 'damaged or no checkpoint'),
    (np.random.default_rng(0).bytes(3000), 'damaged or no checkpoint'),
    (good_bytes()[:100000], 'damaged or no checkpoint'),
    (good_bytes()[:20], 'damaged or no checkpoint'),
    (flipped(good_bytes()), 'damaged or no checkpoint'),
    (safetensors.torch.save({'w': torch.ones(1000)})[:2000], 'damaged or no checkpoint'),
], ids=['empty', 'html', 'fragment', 'lfs pointer', 'json', 'noise', 'truncated', 'stub', 'one bit', 'safetensors'])
def test_wrong_file_gives_one_clear_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / 'file.pth').write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_weights(tmp_path / 'file.pth')
    assert '\n' not in str(error.value) and str(tmp_path / 'file.pth') in str(error.value)


@pytest.mark.parametrize(('payload', 'message'), [
    ([1, 2], 'holds a list'), ({}, 'holds a dict'), ({'epoch': 3, 'loss': 1.0}, 'only epoch, loss'),
    ({'state_dict': {'w': 'text'}}, 'other than tensors'), ({'model': None}, 'other than tensors'),
    ({'model': torch.ones(2), 'epoch': 1}, 'other than tensors')], ids=str)
def test_checkpoint_without_weights_is_said(payload: Any, message: str, tmp_path: Path) -> None:
    torch.save(payload, tmp_path / 'file.pth')
    with pytest.raises(UserError, match=message):
        load_weights(tmp_path / 'file.pth')


def test_missing_files_directories_and_unknown_names_are_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='No such file'):
        load_weights(tmp_path / 'none.pth')
    with pytest.raises(UserError, match='is a directory'):
        load_weights(tmp_path)
    with pytest.raises(UserError, match="no released checkpoint 'moganet_tinny'; did you mean moganet_tiny"):
        load_weights('released:moganet_tinny')


def tiny(**kwargs: Any) -> nn.Module:
    """A MogaNet of four blocks."""
    return timm.create_model(XT, dims=[8, 8, 16, 16], depths=[1] * 4, ffn_ratios=[2] * 4, num_classes=3, **kwargs)


def random_file(path: Path, plain: State, rng: np.random.Generator) -> tuple[dict[str, State], bool]:
    """Writes a checkpoint of a random form. Returns its sets by 'raw' and 'ema', and whether they are damaged."""
    def choose(*values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    names = [name for name in plain if 'tracked' not in name]
    kind = choose(*[torch.float32] * 3, torch.float16, torch.bfloat16, torch.float64)
    sets: dict[str, State] = {which: {
        name: (value + offset).to(kind) if value.is_floating_point() else value for name, value in plain.items()}
        for offset, which in enumerate(('raw', 'ema'))}
    hurt = rng.random() < 0.3
    for state in sets.values() if hurt else ():
        name = names[int(rng.integers(len(names)))]
        state[name] = choose(state[name][:-1], state[name][None], state[name].to(torch.int8), state[name].cfloat(),
                             state[name].to_sparse(), None)
        if state[name] is None:
            del state[name]
    prefix = choose('', '', '', 'module.', '_orig_mod.', 'module._orig_mod.', 'model.', 'net.', 'model.module.',
                    'backbone.', 'teacher.', 'encoder.x.')
    raw, ema = ({prefix + name: value for name, value in state.items()} for state in sets.values())
    stray = choose({}, {'n_averaged': torch.tensor(3)}, {'criterion.weight': torch.ones(3)}, {'module.x': None}, {5: 5},
                   {'epoch': 7}, {'model': 'text'})
    payload = choose(
        raw, {**raw, **stray}, {'state_dict': raw}, {'state_dict': {**raw, **stray}}, {'model': raw, 'model_ema': ema},
        {'state_dict': raw, 'state_dict_ema': ema}, {'state_dict_ema': ema}, {'model_ema': ema}, {'net': raw},
        {'weights': raw}, {'model': {'model': raw}}, {'model': {'state_dict': {'net': raw}}}, {'params': {'lr': 1.0}},
        {'teacher': ema, 'student': raw}, {'model': raw, 'net': ema}, {'model': [raw]}, [raw], {'model': {}}, 3,
        raw | {f'net.{name}': value for name, value in ema.items()})
    for _ in range(int(rng.integers(3)) if isinstance(payload, dict) else 0):
        name = choose('epoch', 'args', 'classes', 'recipe', 'gate', 'meta', 'which', 'arch', 'optimizer', 9)
        payload = {**payload, name:
                   choose(1, 'ema', None, [], {}, [3], {'model': 5}, {'config': 7}, argparse.Namespace(input_size=[]),
                          {'state': {0: torch.ones(2)}}, torch.ones(2), float('nan'))}
    flat = isinstance(payload, dict) and payload and all(
        isinstance(name, str) and isinstance(value, Tensor) and not value.is_sparse for name, value in payload.items())
    if flat and rng.random() < 0.5:
        note = choose(None, {}, {'moganet': 'no json'}, {'moganet': '{}'}, {'moganet': '[1]'},
                      {'moganet': '{"which": "x", "gate": null, "meta": {}}'},
                      {'moganet': '{"which": "raw", "gate": 3, "meta": {}}'},
                      {'moganet': '{"which": "raw", "gate": null, "meta": 3}'})
        safetensors.torch.save_file({name: value.clone().contiguous() for name, value in payload.items()}, path, note)
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=bool(rng.integers(2)))
    return sets, hurt


def test_a_random_checkpoint_gives_the_right_tensors_or_one_clear_line(tmp_path: Path) -> None:
    rng, plain, target, outcomes = np.random.default_rng(0), tiny().state_dict(), tiny(), collections.Counter()
    for number in range(200):
        path = tmp_path / f'{number}.pth'
        sets, hurt = random_file(path, plain, rng)
        try:
            read = load_weights(path, ('auto', 'raw', 'ema')[number % 3])
            apply_weights(target, read)
        except UserError as error:
            assert str(path) in str(error) and '\n' not in str(error), error
            outcomes['refused'] += 1
            continue
        finally:
            path.unlink()
        assert not hurt, f'{number}: {read}'
        given = target.state_dict()
        assert any(all(torch.equal(value, state[name].to(value.dtype)) for name, value in given.items())
                   for state in sets.values()), f'{number}: {read}'  # all of one set
        outcomes['read'] += 1
    assert outcomes['read'] > 40 and outcomes['refused'] > 60, outcomes


def test_weights_in_several_files_are_read_by_their_index(tmp_path: Path) -> None:
    state = tiny().state_dict()
    names = list(state)
    files = {f'model-0000{part}-of-00002.safetensors': names[part - 1::2] for part in (1, 2)}
    for file, some in files.items():
        safetensors.torch.save_file({name: state[name].contiguous() for name in some}, tmp_path / file)
    index = tmp_path / 'model.safetensors.index.json'
    places = {name: file for file, some in files.items() for name in some}
    index.write_text(json.dumps({'metadata': {}, 'weight_map': places}))
    read = load_weights(index)
    target = tiny()
    apply_weights(target, read)
    assert all(torch.equal(value, state[name]) for name, value in target.state_dict().items())
    with pytest.raises(UserError, match=r'is one of 2 parts: give the index beside it'):
        load_weights(tmp_path / 'model-00001-of-00002.safetensors')
    index.write_text(json.dumps({'weight_map': dict.fromkeys(names, 'model-00001-of-00002.safetensors')}))
    with pytest.raises(UserError, match=r'its parts lack \d+ of its \d+ tensors'):
        load_weights(index)
    (tmp_path / 'model-00002-of-00002.safetensors').unlink()
    index.write_text(json.dumps({'weight_map': dict.fromkeys(names, '../model-00002-of-00002.safetensors')}))
    with pytest.raises(UserError, match=r'its part model-00002-of-00002\.safetensors cannot be read'):
        load_weights(index)
    for text in ('{}', '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{'):
        index.write_text(text)
        with pytest.raises(UserError, match='damaged or no checkpoint'):
            load_weights(index)


# ---- Into a model ---------------------------------------------------------------------------------------------------

def small_model(**kwargs: Any) -> nn.Module:
    return timm.create_model('resnet18', **kwargs)


def weights_of(model: nn.Module, **changes: Any) -> Weights:
    return Weights({**model.state_dict(), **changes}, None, 'raw', 'bare', {}, 'file.pth')


def test_any_timm_model_takes_its_weights() -> None:
    source, target = small_model(), small_model()
    report = apply_weights(target, weights_of(source))
    assert len(report.matched) == len(source.state_dict()) and not report.missing + report.unexpected
    assert torch.equal(target.fc.weight, source.fc.weight)
    assert str(report) == f'{len(report.matched)} tensors loaded'


def test_report_names_what_is_unexpected_and_counters_may_be_missing() -> None:
    target = small_model()
    given = weights_of(small_model(), extra=torch.ones(1))
    del given.state_dict['layer1.0.bn1.num_batches_tracked']
    given.state_dict['head_dist.weight'] = torch.ones(3)
    report = apply_weights(target, given)
    assert report.missing == ['layer1.0.bn1.num_batches_tracked']
    assert report.unexpected == ['extra', 'head_dist.weight']
    assert str(report).endswith('1 missing: layer1.0.bn1.num_batches_tracked; 2 unexpected: extra, head_dist.weight')


@pytest.mark.parametrize('drop', [False, True])
@pytest.mark.parametrize(('name', 'value', 'said'), [
    ('layer1.0.bn1.bias', None, '1 are missing, 0 of another shape (layer1.0.bn1.bias)'),
    ('bn1.running_var', None, '1 are missing, 0 of another shape (bn1.running_var)'),
    ('conv1.weight', torch.ones(64, 1, 7, 7), '0 are missing, 1 of another shape (conv1.weight)'),
    ('conv1.weight', torch.ones(64, 3, 7, 7, dtype=torch.uint8), '0 are missing, 1 of another shape (conv1.weight)')])
def test_no_tensor_of_the_backbone_keeps_random_numbers(name: str, value: Any, said: str, drop: bool) -> None:
    target, given = small_model(), weights_of(small_model())
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    if value is None:
        del given.state_dict[name]
    else:
        given.state_dict[name] = value
    with pytest.raises(UserError, match='do not fit resnet18') as error:
        apply_weights(target, given, drop_classifier=drop)
    assert said in str(error.value) and '--model_kwargs' in str(error.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in target.state_dict().items())


def test_position_embedding_of_another_size_is_resampled_as_timm_does_and_said() -> None:
    def tiny_vit(**kwargs: Any) -> nn.Module:
        return timm.create_model('vit_tiny_patch16_224', num_classes=2, depth=1, **kwargs)
    source, target = tiny_vit(img_size=32), tiny_vit(img_size=64)
    report = apply_weights(target, weights_of(source))
    assert report.resampled == ['pos_embed'] and report.wrong_shape == []
    assert '1 resampled to the size of the model: pos_embed' in str(report)
    from timm.layers import resample_abs_pos_embed
    torch.testing.assert_close(target.pos_embed, resample_abs_pos_embed(source.pos_embed, [4, 4]), rtol=0, atol=0)
    wider = timm.create_model('vit_tiny_patch16_224', num_classes=2, depth=1, img_size=64, embed_dim=96)
    with pytest.raises(UserError, match=r'do not fit vit_tiny_patch16_224: .*cls_token, pos_embed'):
        apply_weights(wider, weights_of(source))


def test_classifier_of_another_size_is_dropped_only_for_fine_tuning() -> None:
    source, target = small_model(), small_model(num_classes=7)
    before = target.fc.weight.detach().clone()
    with pytest.raises(UserError, match=r'fc\.weight is 1000 x 512 in the file and 7 x 512 in the model.*--finetune'):
        apply_weights(target, weights_of(source))
    assert not torch.equal(target.conv1.weight, source.conv1.weight)  # nothing was loaded
    report = apply_weights(target, weights_of(source), drop_classifier=True)
    assert report.dropped == ['fc.weight', 'fc.bias'] and 'classifier of another size dropped (fc.weight' in str(report)
    assert torch.equal(target.fc.weight, before) and torch.equal(target.conv1.weight, source.conv1.weight)
    same = small_model()
    assert apply_weights(same, weights_of(source), drop_classifier=True).dropped == []
    assert torch.equal(same.fc.weight, source.fc.weight)


def test_file_without_classifier_serves_fine_tuning_alone() -> None:
    headless, target = small_model(num_classes=0), small_model(num_classes=7)
    with pytest.raises(UserError, match=r"classifier's fc\.weight is none in the file"):
        apply_weights(target, weights_of(headless))
    assert apply_weights(target, weights_of(headless), drop_classifier=True).missing == ['fc.weight', 'fc.bias']


@pytest.mark.parametrize('missing', [0.005, 0.02])
def test_fewer_than_99_percent_of_the_backbone_is_an_error(missing: float) -> None:
    source = small_model()
    names = [name for name in source.state_dict() if not name.startswith('fc.') and 'tracked' not in name]
    given = weights_of(source)
    for name in names[:int(missing * len(names))]:
        del given.state_dict[name]
    if missing < 0.01:
        apply_weights(small_model(), given)
    else:
        with pytest.raises(UserError, match=f'do not fit resnet18: of its {len(names)} tensors 98 match'):
            apply_weights(small_model(), given)


@pytest.mark.parametrize(('theirs', 'ours'), [('moganet_tiny', 'moganet_xtiny'), ('moganet_xtiny', 'moganet_tiny'),
                                              ('resnet34', 'resnet18'), ('resnet18', 'resnet34')])
def test_another_architecture_is_an_error_though_it_be_a_deeper_one_of_equal_widths(theirs: str, ours: str) -> None:
    with torch.device('meta'):
        given, target = timm.create_model(theirs), timm.create_model(ours)
    for drop in (False, True):
        with pytest.raises(UserError, match=f'do not fit {ours}.*--model'):
            apply_weights(target, weights_of(given), drop_classifier=drop)


def test_model_is_built_as_the_file_says(tmp_path: Path) -> None:
    training_file(tmp_path / 'file', {**seeded(0), 'head.weight': torch.ones(5, 192), 'head.bias': torch.ones(5)}, None)
    read = load_weights(tmp_path / 'file')
    model = build_model(read)
    assert model.num_classes == 5 and not model.training and model.blocks1[0].attn.double_gate
    assert not build_model(read, gate='single').blocks1[0].attn.double_gate
    resnet = small_model(num_classes=4)
    assert build_model(weights_of(resnet), 'resnet18').num_classes == 4
    with pytest.raises(UserError, match='give --model'):
        build_model(weights_of(resnet))
    with pytest.raises(UserError, match='unknown model resnett18; did you mean'):
        build_model(weights_of(resnet), 'resnett18')


# ---- The released files ---------------------------------------------------------------------------------------------

def test_table_of_released_files_agrees_with_the_recipes() -> None:
    assert len(RELEASED) == 24 and len({row.url for row in RELEASED.values()}) == 24
    for name, row in RELEASED.items():
        recipe = recipes.RECIPES[name.split('_openmixup')[0]]
        assert (row.model, row.test_size, row.crop_pct) == (recipe.model, recipe.test_size, recipe.crop_pct), name
        assert row.acc1 is None or abs(row.acc1 - recipe.expected_acc1) <= 0.11, name  # two sources round differently
        assert (row.weights == 'ema') == recipe.model_ema, name
        if 'openmixup' not in name:
            assert row.gate == recipe.gate, name


def test_released_file_brings_its_gate_weights_and_evaluation(cache: Path) -> None:
    put(cache, 'moganet_xtiny_3aug_256', mmcv_file, seeded(0), None, config='')
    read = load_weights('released:moganet_xtiny_3aug_256')
    assert (read.gate, read.which, read.format) == ('double', 'raw', 'mmcv')
    assert [read.meta[key] for key in ('model', 'test_size', 'crop_pct', 'acc1', 'acc5')] == [XT, 256, 0.9, 77.6, None]
    assert_recorded_logits(read)
    path = put(cache, 'moganet_xtiny', timm_file, seeded(0), seeded(1))
    for source in ('released:moganet_xtiny', path):  # also by the file's name, wherever it lies
        read = load_weights(source)
        assert (read.gate, read.which, read.meta['released']) == ('single', 'raw', 'moganet_xtiny')
        assert_recorded_logits(read)
    assert load_weights('released:moganet_xtiny', 'ema').which == 'ema'


def test_files_own_word_on_the_gate_goes_before_the_table(cache: Path) -> None:
    put(cache, 'moganet_xtiny_3aug_256', mmcv_file, seeded(0), None, config='attn_force_fp32=False')
    assert load_weights('released:moganet_xtiny_3aug_256').gate == 'single'


def test_released_mmcv_file_stripped_of_its_twins_still_holds_the_average(cache: Path) -> None:
    put(cache, 'moganet_small_openmixup', mmcv_file, seeded(0), None)
    assert load_weights('released:moganet_small_openmixup').which == 'ema'
    with pytest.raises(UserError, match='has no raw weights, only ema'):
        load_weights('released:moganet_small_openmixup', 'raw')


def test_timm_creates_pretrained_models_from_the_table(cache: Path) -> None:
    put(cache, 'moganet_xtiny', timm_file_of_numpy_1, seeded(0), None)
    put(cache, 'moganet_xtiny_3aug_256', mmcv_file, seeded(0), None, config='')
    images = reference.seeded_images(2, 3, 224, 224)
    with torch.inference_mode():
        single = timm.create_model(XT, pretrained=True).eval()
        assert reference.relative_error(single(images), reference.LOGITS[f'{XT}/224']) <= 1e-5
        double = timm.create_model(f'{XT}.in1k_3aug_256', pretrained=True).eval()
        assert reference.relative_error(double(images), reference.LOGITS[f'{XT}/224/double_gate']) <= 1e-5
        own = timm.create_model(f'{XT}.in1k_3aug_256', pretrained=True, gate='single').eval()
        assert torch.equal(own(images), single(images))
    assert double.pretrained_cfg['input_size'] == (3, 256, 256) and 'state_dict' not in double.pretrained_cfg
    headless = timm.create_model(XT, pretrained=True, num_classes=7)
    assert headless.head.weight.shape[0] == 7
    assert torch.equal(headless.patch_embed1.projection[0].weight, single.patch_embed1.projection[0].weight)
    gray = timm.create_model(XT, pretrained=True, in_chans=1)
    torch.testing.assert_close(gray.patch_embed1.projection[0].weight,
                               single.patch_embed1.projection[0].weight.sum(1, keepdim=True))
    features = timm.create_model(XT, pretrained=True, features_only=True).eval()
    with torch.inference_mode():
        torch.testing.assert_close(features(images)[-1], single.forward_features(images))


def test_timm_takes_any_format_from_a_file(tmp_path: Path) -> None:
    training_file(tmp_path / 'file', seeded(0), seeded(1))
    model = timm.create_model(XT, pretrained=True, pretrained_cfg_overlay={'file': str(tmp_path / 'file')})
    assert torch.equal(model.head.weight, seeded(1)['head.weight']) and model.blocks1[0].attn.double_gate


def test_timm_says_clearly_when_the_network_cannot_be_reached(cache: Path) -> None:
    with pytest.raises(UserError, match=r'/127\.0\.0\.1:9/x\.pth: cannot be reached .*put it at .*x\.pth'):
        timm.create_model(XT, pretrained=True, pretrained_cfg_overlay={'url': 'https://127.0.0.1:9/x.pth'})


def test_every_released_file_is_a_pretrained_cfg() -> None:
    for name, row in RELEASED.items():
        cfg = timm.get_pretrained_cfg(f'{row.model}.in1k{name.removeprefix(row.model)}')
        assert (cfg.url, cfg.input_size[1], cfg.crop_pct) == (row.url, row.test_size, row.crop_pct)
    assert timm.get_pretrained_cfg('moganet_base').url == RELEASED['moganet_base'].url  # the default


# ---- Downloads ------------------------------------------------------------------------------------------------------

class Server(http.server.ThreadingHTTPServer):
    """Serves `content` under any name, badly where the name says so."""
    content: bytes
    requests: list[tuple[str, str | None]]
    breaks: int  # how many more transfers to break off in the middle

    @property
    def url(self) -> str:
        return f'http://127.0.0.1:{self.server_port}'


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        wanted = self.headers.get('Range')
        self.server.requests.append((self.path, wanted))
        if 'missing' in self.path:
            self.send_error(404)
            return
        content, start = self.server.content, 0
        if wanted and 'no-ranges' not in self.path:
            start = int(wanted.removeprefix('bytes=').removesuffix('-'))
        if 'page' in self.path:
            content = b'<html><body>Sign in</body></html>'
        self.send_response(206 if start else 200)
        self.send_header('Content-Type', 'text/html' if 'typed-page' in self.path else 'application/octet-stream')
        if 'no-length' not in self.path:
            self.send_header('Content-Length', str(len(content) - start))
        self.end_headers()
        content = content[start:]
        if self.server.breaks:
            self.server.breaks -= 1
            content = content[:len(content) // 2]
        self.wfile.write(content)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(('127.0.0.1', 0), Handler)
    server.content, server.requests, server.breaks = good_bytes(), [], 0
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_download_happens_once_and_its_size_and_hash_are_shown_and_remembered(
        server: Server, cache: Path, capsys: pytest.CaptureFixture) -> None:
    read = load_weights(f'{server.url}/x.pth')
    assert read.state_dict['w'][-1] == 39999
    sha256 = download.sha256_of(cache / 'x.pth')
    assert f'{len(server.content):,} bytes, sha256 {sha256}' in capsys.readouterr().err
    assert json.loads((cache / 'x.pth.json').read_text()) == {
        'url': f'{server.url}/x.pth', 'bytes': len(server.content), 'sha256': sha256}
    again = load_weights(f'{server.url}/x.pth')
    assert len(server.requests) == 1 and again.meta['sha256'] == sha256 == read.meta['sha256']
    assert sorted(path.name for path in cache.iterdir()) == ['x.pth', 'x.pth.json']


def test_many_processes_on_a_node_download_once(server: Server, cache: Path) -> None:
    threads = [threading.Thread(target=load_weights, args=(f'{server.url}/x.pth',)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.requests) == 1


@pytest.mark.parametrize('name', ['x.pth', 'no-ranges.pth'])
def test_broken_off_download_is_taken_up_again(name: str, server: Server, cache: Path) -> None:
    server.breaks = 2 if name == 'x.pth' else 1
    half = len(server.content) // 2
    read = load_weights(f'{server.url}/{name}')
    assert read.state_dict['w'][-1] == 39999 and (cache / name).read_bytes() == server.content
    assert [wanted for _, wanted in server.requests][:2] == [None, f'bytes={half}-']


@pytest.mark.parametrize(('name', 'breaks', 'message'), [
    ('x.pth', 99, 'broke off four times'), ('no-length.pth', 1, 'damaged or no checkpoint'),
    ('typed-page.pth', 0, 'answers with a web page'), ('page.pth', 0, 'is a web page'),
    ('missing.pth', 0, 'answers 404'), ('x.pth#sha256=' + 64 * 'a', 0, 'its sha256 is'), ('', 0, 'names no file')])
def test_failed_download_gives_one_line_and_leaves_nothing(
        name: str, breaks: int, message: str, server: Server, cache: Path) -> None:
    server.breaks = breaks
    with pytest.raises(UserError, match=message) as error:
        load_weights(f'{server.url}/{name}')
    assert '\n' not in str(error.value) and server.url in str(error.value)
    assert list(cache.iterdir()) == []


def test_right_hash_is_accepted_and_a_cached_file_with_another_fetched_anew(server: Server, cache: Path) -> None:
    load_weights(f'{server.url}/x.pth')
    sha256 = download.sha256_of(cache / 'x.pth')
    load_weights(f'{server.url}/x.pth#sha256={sha256.upper()}')
    assert len(server.requests) == 1
    (cache / 'x.pth').write_bytes(flipped(server.content))  # a bit rots in the cache
    load_weights(f'{server.url}/x.pth')
    assert len(server.requests) == 2 and (cache / 'x.pth').read_bytes() == server.content
    load_weights(f'{server.url}/other/x.pth')  # the same name from another address
    assert len(server.requests) == 3


def test_interrupted_download_leaves_nothing(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt
    monkeypatch.setattr(download.tqdm, 'update', interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_weights(f'{server.url}/x.pth')
    assert list(cache.iterdir()) == []


def test_unreachable_network_is_said_with_a_cure(cache: Path) -> None:
    with pytest.raises(UserError, match=r'cannot be reached \(.*put it at .*x\.pth, or give its path'):
        load_weights('https://127.0.0.1:9/x.pth')
    with pytest.raises(UserError, match='use https'):
        load_weights('http://example.org/x.pth')


def test_unwritable_cache_is_said(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'file'))
    (tmp_path / 'file').write_text('in the way')
    with pytest.raises(UserError, match='cannot write'):
        load_weights(f'{server.url}/x.pth')
