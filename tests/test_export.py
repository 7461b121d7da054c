"""Exported files compute what the checkpoint does, say what they are, and can be read by those they are for."""
import dataclasses
import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import safetensors
import timm
import torch
from torch import Tensor, nn

import reference
from builders import mmcv_file, put, seeded, training_file
from conftest import ROOT
from models.dense import build_dense
from models.download import sha256_of
from models.moganet import MogaNet
from models.weights import build_model, load_weights
from recipes import RECIPES, to_dict
from tools import export, strip_checkpoint
from utils import UserError

TINY = {'dims': (16, 16, 16, 16), 'depths': (1, 1, 1, 1)}
MEAN, STD = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)


def randomised(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """A state dict in which every branch and every statistic counts, with activations of order 1."""
    return {name: reference._entry(name, list(value.shape), seed) for name, value in model.state_dict().items()}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A training checkpoint of a tiny MogaNet with the double gate, an average, and normalisation of its own."""
    model = MogaNet(num_classes=3, **TINY)
    path = tmp_path / 'checkpoint.pth'
    training_file(path, randomised(model, 0), randomised(model, 1))
    payload = torch.load(path)
    payload['classes'] = ['cat', 'dog', 'owl']
    payload['recipe'] |= {'model_kwargs': TINY, 'test_size': 64, 'mean': MEAN.flatten().tolist(),
                          'std': STD.flatten().tolist()}
    torch.save(payload, path)
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / 'new' / 'exported'


def run(checkpoint: Path, format: str, output: Path, *flags: str) -> None:
    export.main(['--checkpoint', str(checkpoint), '--format', format, '--output', str(output), *flags])


def images(batch: int, size: int = 64) -> Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


@torch.inference_mode()
def expected(checkpoint: Path, batch: Tensor, which: str = 'auto', **kwargs: Any) -> Tensor:
    return build_model(load_weights(checkpoint, which), **kwargs)(batch)


def assert_close(logits: Tensor, of_checkpoint: Tensor) -> None:
    # float32 in another runtime's order of operations comes to 1e-6; the other gate would differ by 1e-3
    assert reference.relative_error(logits, of_checkpoint) <= 1e-5


# ---- Weights --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('which', ['raw', 'ema'])
def test_safetensors_read_back_as_the_checkpoint_they_came_from(which: str, checkpoint: Path, output: Path) -> None:
    run(checkpoint, 'safetensors', output, '--weights', which)
    read, source = load_weights(output), load_weights(checkpoint, which)
    assert (read.format, read.which, read.gate) == ('safetensors', which, 'double')
    assert read.meta['classes'] == ['cat', 'dog', 'owl'] and read.meta['crop_pct'] == 0.8
    assert read.meta['recipe'] == json.loads(json.dumps(source.meta['recipe']))
    assert read.state_dict.keys() == source.state_dict.keys()
    assert all(torch.equal(value, source.state_dict[name]) for name, value in read.state_dict.items())
    with safetensors.safe_open(output, 'pt') as file:
        assert file.metadata()['format'] == 'pt'


def test_safetensors_load_into_timm_without_this_repositorys_reader(checkpoint: Path, output: Path) -> None:
    run(checkpoint, 'safetensors', output.with_suffix('.safetensors'))
    model = timm.create_model('moganet_xtiny', num_classes=3, gate='double', **TINY).eval()
    timm.models.load_checkpoint(model, str(output.with_suffix('.safetensors')), strict=True)
    with torch.inference_mode():
        assert torch.equal(model(images(2)), expected(checkpoint, images(2)))


def test_hugging_face_folder_opens_in_timm(checkpoint: Path, output: Path) -> None:
    run(checkpoint, 'huggingface', output)
    model = timm.create_model(f'local-dir:{output}', pretrained=True).eval()
    with torch.inference_mode():
        assert torch.equal(model(images(2)), expected(checkpoint, images(2)))
    data = timm.data.resolve_model_data_config(model)
    assert (*data['input_size'], data['crop_pct'], data['interpolation']) == (3, 64, 64, 0.8, 'bicubic')
    assert data['mean'] == pytest.approx((0.4, 0.5, 0.6))
    assert json.loads((output / 'config.json').read_text())['label_names'] == ['cat', 'dog', 'owl']
    card = (output / 'README.md').read_text()
    assert card.startswith('---\nlibrary_name: timm') and '- ema weights, double gate' in card
    assert load_weights(output / 'model.safetensors').gate == 'double'
    with pytest.raises(UserError, match='is a folder already'):
        run(checkpoint, 'huggingface', output)


def test_any_timm_model_is_exported(tmp_path: Path, output: Path) -> None:
    model = timm.create_model('resnet18', num_classes=3)
    torch.save(randomised(model, 0), tmp_path / 'resnet.pth')
    with pytest.raises(UserError, match='does not say which model'):
        run(tmp_path / 'resnet.pth', 'safetensors', output)
    run(tmp_path / 'resnet.pth', 'huggingface', output, '--model', 'resnet18', '--input_size', '32')
    again = timm.create_model(f'local-dir:{output}', pretrained=True).eval()
    with torch.inference_mode():
        assert torch.equal(again(images(2)), expected(tmp_path / 'resnet.pth', images(2), name='resnet18'))
    with pytest.raises(UserError, match='--fuse is for MogaNet models, not for'):
        run(tmp_path / 'resnet.pth', 'onnx', output / 'a file', '--model', 'resnet18', '--fuse')


# ---- Programs -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('flags', [[], ['--fuse', '--normalize']], ids=['plain', 'fused, normalising'])
def test_onnx_computes_the_same_at_any_batch_size(flags: list[str], checkpoint: Path, output: Path) -> None:
    run(checkpoint, 'onnx', output, *flags)
    onnx.checker.check_model(output)
    session = onnxruntime.InferenceSession(output, providers=['CPUExecutionProvider'])
    for batch in (1, 5):
        logits, = session.run(['logits'], {'images': images(batch).numpy()})
        normalised = (images(batch) - MEAN) / STD if flags else images(batch)
        assert_close(torch.from_numpy(logits), expected(checkpoint, normalised))
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about['classes']) == ['cat', 'dog', 'owl'] and about['model'] == 'moganet_xtiny'
    assert json.loads(about['normalized']) == bool(flags) and about['gate'] == 'double'
    norms = sum(node.op_type == 'BatchNormalization' for node in onnx.load(output).graph.node)
    assert (norms == 0) == bool(flags)


def test_torch_export_computes_the_same_at_any_batch_size(checkpoint: Path, output: Path) -> None:
    run(checkpoint, 'torch_export', output, '--gate', 'single', '--input_size', '96')
    extra = {'about.json': ''}
    program = torch.export.load(output, extra_files=extra).module()
    for batch in (1, 5):
        assert_close(program(images(batch, 96)), expected(checkpoint, images(batch, 96), gate='single'))
    about = json.loads(extra['about.json'])
    assert (about['gate'], about['test_size'], about['classes'][2]) == ('single', 96, 'owl')


def test_released_files_carry_the_names_of_imagenets_classes(cache: Path, output: Path) -> None:
    put(cache, 'moganet_xtiny_3aug_256', mmcv_file, seeded(0), None, config='')
    export.main(['--checkpoint', 'released:moganet_xtiny_3aug_256', '--format', 'safetensors', '--input_size', '64',
                 '--output', str(output)])
    meta = load_weights(output).meta
    assert len(meta['classes']) == 1000 and 'tench' in meta['classes'][0] and 'toilet' in meta['classes'][999]
    assert meta['acc1'] == 77.6 and load_weights(output).gate == 'double'


def test_export_that_differs_is_refused_and_leaves_nothing(
        checkpoint: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module) -> nn.Module:
        model = build_model(load_weights(checkpoint))
        model.head.weight.data *= 1.001
        return model
    monkeypatch.setattr(export, 'fuse', wrong)
    with pytest.raises(UserError, match='differ from the checkpoint'):
        run(checkpoint, 'torch_export', output, '--fuse')
    assert list(output.parent.iterdir()) == []


def test_flags_that_would_change_nothing_are_refused(checkpoint: Path, output: Path) -> None:
    for flag in ('--fuse', '--normalize'):
        for format in ('safetensors', 'huggingface'):
            with pytest.raises(UserError, match='holds weights alone'):
                run(checkpoint, format, output, flag)


def test_unwritable_output_is_said(checkpoint: Path) -> None:
    with pytest.raises(UserError, match='cannot write'):
        run(checkpoint, 'safetensors', checkpoint / 'below' / 'a file')


# ---- Stripping ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('which', ['raw', 'ema'])
def test_stripped_checkpoint_holds_the_chosen_weights_and_no_optimizer(
        which: str, checkpoint: Path, output: Path, capsys: pytest.CaptureFixture) -> None:
    strip_checkpoint.main([str(checkpoint), str(output), '--weights', which])
    payload = torch.load(output)  # opens without this repository's reader
    assert set(payload) == {'model', 'which', 'gate', 'arch', 'epoch', 'classes', 'recipe'}
    read = load_weights(output)
    assert (read.which, read.gate, read.meta['classes']) == (which, 'double', ['cat', 'dog', 'owl'])
    assert torch.equal(expected(output, images(2)), expected(checkpoint, images(2), which))
    assert capsys.readouterr().out.splitlines()[-1] == f'sha256 {hashlib.sha256(output.read_bytes()).hexdigest()}'


def test_a_checkpoint_is_not_stripped_over_itself(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / 'link').hardlink_to(checkpoint)
    before = checkpoint.read_bytes()
    for output in (checkpoint, tmp_path / 'link'):
        with pytest.raises(UserError, match='is the checkpoint itself'):
            strip_checkpoint.main([str(checkpoint), str(output)])
    assert checkpoint.read_bytes() == before


def test_stripping_keeps_what_a_foreign_file_says(tmp_path: Path, output: Path) -> None:
    mmcv_file(tmp_path / 'file', seeded(1), seeded(0))
    strip_checkpoint.main([str(tmp_path / 'file'), str(output)])
    read = load_weights(output)
    assert (read.which, read.gate) == ('ema', 'double') and read.state_dict.keys() == seeded(0).keys()
    assert output.stat().st_size < 0.6 * (tmp_path / 'file').stat().st_size


def test_tools_run_from_the_repository_root_and_say_errors_in_one_line(checkpoint: Path, output: Path) -> None:
    def start(*words: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                text=True)
    good = start('tools/strip_checkpoint.py', str(checkpoint), str(output))
    bad = start('tools/export.py', '--checkpoint', 'none.pth', '--format', 'onnx', '--output', str(output))
    printed, errors = good.communicate()
    assert good.returncode == 0 and f'sha256 {sha256_of(output)}' in printed, errors
    assert bad.communicate()[1] == 'error: none.pth: cannot be read (No such file or directory): check the path\n'
    assert bad.returncode == 2


@pytest.mark.slow
def test_exported_program_needs_nothing_of_this_repository(checkpoint: Path, output: Path, tmp_path: Path) -> None:
    run(checkpoint, 'torch_export', output)
    buffer = io.BytesIO()
    torch.save(images(2), buffer)
    (tmp_path / 'images.pt').write_bytes(buffer.getvalue())
    code = (f'import torch; y = torch.export.load({str(output)!r}).module()(torch.load("images.pt")); '
            'torch.save(y.detach(), "logits.pt")')
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True, env={'PATH': ''})
    assert_close(torch.load(tmp_path / 'logits.pt'), expected(checkpoint, images(2)))


# ---- Detectors ------------------------------------------------------------------------------------------------------

DETECTORS = {'retinanet': {'channels': 16, 'depth': 1}, 'mask_rcnn': {'channels': 16, 'hidden': 32},
             'cascade_mask_rcnn': {'channels': 16, 'hidden': 32}}


def detector(path: Path, network: str) -> nn.Module:
    """Writes a training checkpoint of a tiny detector that finds a hundred things; returns its model."""
    row = 'retinanet_moganet_xtiny_1x' if network == 'retinanet' else f'{network}_moganet_small_3x'
    recipe = dataclasses.replace(RECIPES[row], model='moganet_xtiny', model_kwargs=TINY, num_classes=3,
                                 network_kwargs=DETECTORS[network], image_scale=(96, 90))
    torch.manual_seed(0)
    model = build_dense(recipe, num_classes=3, **TINY)
    for name, value in model.named_parameters():
        if name.endswith(('fc_cls.weight', 'fc_reg.weight', 'rpn_cls.weight', 'retina_cls.weight')):
            nn.init.normal_(value, std=0.3)
        elif name.endswith('conv_logits.weight'):
            nn.init.normal_(value)
        elif name.endswith('retina_cls.bias'):
            nn.init.zeros_(value)
    training_file(path, model.state_dict(), model.state_dict())
    payload = torch.load(path) | {'classes': ['cat', 'dog', 'owl'], 'recipe': to_dict(recipe)}
    torch.save(payload, path)
    return model.eval()


@pytest.mark.parametrize('network', ['retinanet', 'mask_rcnn'])
def test_onnx_finds_what_a_detector_finds_its_nms_inside(network: str, tmp_path: Path) -> None:
    model = detector(tmp_path / 'file.pth', network)
    run(tmp_path / 'file.pth', 'onnx', tmp_path / 'out.onnx')  # of 96 pixels
    onnx.checker.check_model(tmp_path / 'out.onnx')
    assert b'NonMaxSuppression' in (tmp_path / 'out.onnx').read_bytes()  # in a graph within the graph
    session = onnxruntime.InferenceSession(tmp_path / 'out.onnx', providers=['CPUExecutionProvider'])
    names = ['boxes', 'scores', 'labels'] + ['masks'] * (network == 'mask_rcnn')
    assert [output.name for output in session.get_outputs()] == names
    for seed in (5, 6):
        image = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            expected, = model.predict(image, [(96, 96)], [(96, 96)])
        found = dict(zip(names, map(torch.from_numpy, session.run(None, {'images': image.numpy()})), strict=True))
        assert found.keys() == expected.keys() and len(expected['boxes'])
        assert torch.equal(found['labels'], expected['labels'])
        # Pixels and probabilities, by float32 in another order: 5e-5 and 2e-6
        assert (found['boxes'] - expected['boxes']).abs().max() <= 1e-3
        assert (found['scores'] - expected['scores']).abs().max() <= 1e-5
        if 'masks' in names:
            assert found['masks'].dtype == torch.bool and expected['masks'].any()
            assert (found['masks'] != expected['masks']).float().mean() <= 1e-4
    assert json.loads(session.get_modelmeta().custom_metadata_map['classes']) == ['cat', 'dog', 'owl']


@pytest.mark.parametrize('network,format,flags,said', [
    ('cascade_mask_rcnn', 'onnx', [], 'is a cascade, which is not exported'),
    ('retinanet', 'torch_export', [], 'choose --format onnx'),
    ('retinanet', 'onnx', ['--input_size', '100'], 'multiple of 32; give 128')])
def test_what_cannot_be_exported_of_a_detector_is_one_line(network, format, flags, said, tmp_path, output):
    detector(tmp_path / 'file.pth', network)
    with pytest.raises(UserError, match=said):
        run(tmp_path / 'file.pth', format, output, *flags)
    assert not output.exists()
