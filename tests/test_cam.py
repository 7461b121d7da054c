"""`tools/cam.py`: Grad-CAM by the formula and where the object is; orders and gate as the model computes them."""
import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import models  # noqa: F401  registers MogaNet
import predict
import reference
from builders import training_file
from tools import cam
from utils import UserError

TINY = {'dims': [16, 16, 24, 32], 'depths': [1, 2, 1, 1], 'ffn_ratios': [2, 2, 2, 2]}
CLASSES = ['cat', 'great grey owl, great gray owl', '3']
# Relative, in float32: another order of the same sums; a wrong formula shows in the first digits
ROUND_OFF = 1e-5
pytestmark = pytest.mark.usefixtures('one_thread')


def tiny(**options: Any) -> nn.Module:
    """A seeded MogaNet of five blocks in which every branch counts."""
    model = timm.create_model('moganet_xtiny', num_classes=3, **TINY, **options).eval()
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict(reference.seeded_entries(shapes))
    return model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / 'checkpoint.pth'
    training_file(path, tiny().state_dict(), None)
    payload = torch.load(path)
    payload['recipe'] |= {'model_kwargs': TINY, 'test_size': 64, 'gate': 'single'}
    torch.save(payload | {'classes': CLASSES}, path)
    return path


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / 'photo.png'
    coarse = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
    Image.fromarray(coarse).resize((150, 120), Image.Resampling.BICUBIC).save(path)
    return path


def picture(photo: Path, checkpoint: Path, *flags: str) -> np.ndarray:
    """The pixels that a command line writes."""
    output = checkpoint.parent / 'new' / 'cam.png'
    cam.main([str(photo), '--checkpoint', str(checkpoint), '--device', 'cpu', '--output', str(output), *flags])
    return np.asarray(Image.open(output).convert('RGB'))


# ---- Grad-CAM -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('target', [0, 1, 2])
def test_cam_of_the_last_stage_is_the_classifiers_weight_on_its_channels(target: int) -> None:
    """The logit is the classifier of the mean: its gradient at every one of h x w places is weight / (h w)."""
    model, image = tiny(), reference.seeded_images(1, 3, 96, 96)
    with torch.no_grad():
        features = model.forward_features(image)[0]
        expected = F.relu(torch.einsum('c,chw->hw', model.head.weight[target], features)) / features[0].numel()
    ours = cam.grad_cam(model, cam.stage_layers(model, image)[3], image, target)
    assert reference.relative_error(ours, expected) < ROUND_OFF
    assert ours.shape == (3, 3) and ours.min() >= 0 and ours.max() > 0


def test_cam_of_a_lower_stage_weights_its_channels_by_their_mean_gradients() -> None:
    """The gradient by finite differences, in float64: what the logit gains as a channel rises everywhere."""
    model, image = tiny().double(), reference.seeded_images(1, 3, 64, 64).double()
    with torch.no_grad():
        features = model.forward_intermediates(image, indices=[1])[1][0]

        def logits(features: Tensor) -> Tensor:
            for part in ('patch_embed3', 'blocks3', 'norm3', 'patch_embed4', 'blocks4', 'norm4'):
                features = model.get_submodule(part)(features)
            return model.forward_head(features)[:, 1]

        step = 1e-5 * torch.eye(features.shape[1]).double()[:, :, None, None]  # an image for each raised channel
        gains = (logits(features + step) - logits(features - step)) / 2e-5
        expected = torch.einsum('c,chw->hw', gains, features[0]) / features[0, 0].numel()
    ours = cam.grad_cam(model, cam.stage_layers(model, image)[1], image, 1)
    assert ours.shape == (8, 8)
    # of differences at a step of 1e-5
    assert reference.relative_error(ours, F.relu(expected)) < 1e-5
    assert 0 < (ours > 0).float().mean() < 1  # something is cut off


def squares(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Grey noise [B, 3, 32, 32] with a red (class 0) or a blue square in one of its quarters; class, and quarter."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 32, 32, generator=rng) * 0.3
    labels, quarters = (torch.randint(high, (count,), generator=rng) for high in (2, 4))
    for image, label, quarter in zip(images, labels.tolist(), quarters.tolist(), strict=True):
        top, left = 16 * (quarter // 2) + 4, 16 * (quarter % 2) + 4
        image[2 * label, top:top + 8, left:left + 8] += 3
    return images, labels, quarters


def test_cam_of_a_trained_model_lies_where_the_object_is() -> None:
    torch.manual_seed(0)
    model = timm.create_model('moganet_xtiny', num_classes=2, **TINY).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(30):
        images, labels, _ = squares(32, step)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    images, labels, quarters = squares(16, 1000)
    with torch.no_grad():
        assert (model(images).argmax(1) == labels).all()
    layers, hits = cam.stage_layers(model, images[:1]), 0
    for image, label, quarter in zip(images, labels.tolist(), quarters.tolist(), strict=True):
        found = cam.grad_cam(model, layers[1], image[None], label)  # 4 x 4
        sums = found.view(2, 2, 2, 2).sum((1, 3)).flatten()
        hits += sums.argmax().item() == quarter
    assert hits >= 15  # by chance 4


# ---- The aggregation ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('gate', ['single', 'double'])
def test_orders_are_the_inputs_of_the_mixture_and_the_gate_its_factor(gate: str) -> None:
    """Against the convolutions written out, from what enters the two branches."""
    model, image = tiny(gate=gate), reference.seeded_images(1, 3, 96, 96)
    attn, seen = model.blocks2[1].attn, []
    handle = attn.value.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(image)
        handle.remove()
        y, value = seen[0], attn.value
        assert value.dims == [2, 6, 8]  # 1/8, 3/8 and 4/8 of 16 channels
        x = F.conv2d(y, value.DW_conv0.weight, value.DW_conv0.bias, padding=2, groups=16)
        low, middle, high = x[:, :2], x[:, 2:8], x[:, 8:]
        middle = F.conv2d(middle, value.DW_conv1.weight, value.DW_conv1.bias, padding=4, dilation=2, groups=6)
        high = F.conv2d(high, value.DW_conv2.weight, value.DW_conv2.bias, padding=9, dilation=3, groups=8)
        factor = F.silu(F.conv2d(y, attn.gate.weight, attn.gate.bias))
        factor = F.silu(factor) if gate == 'double' else factor
    parts = cam.aggregation(model, attn, image)
    assert len(parts) == len(cam.PARTS)
    for ours, expected in zip(parts, (low, middle, high, factor), strict=True):
        assert ours.shape == (12, 12)
        assert reference.relative_error(ours, expected[0].square().mean(0).sqrt()) < ROUND_OFF


def test_block_is_chosen_by_its_number(checkpoint: Path, photo: Path) -> None:
    classifier = predict.Classifier(str(checkpoint), device='cpu')
    image = classifier.images([classifier.pixels(str(photo))])
    first, last, default = (cam.explain(classifier, image, 0, stages=[2], block=block)[0] for block in (1, 2, None))
    assert first.label.startswith('stage 2, block 1 of 2') and default.label == last.label
    assert np.array_equal(first.cam, last.cam)  # of the stage, whichever block
    for number in range(4):
        assert np.array_equal(last.parts[number], default.parts[number])
        assert not np.allclose(first.parts[number], last.parts[number])
    assert np.array_equal(first.parts[0], cam.aggregation(classifier.model, classifier.model.blocks2[0].attn, image)[0])


# ---- The picture ----------------------------------------------------------------------------------------------------

def test_picture_has_a_row_a_stage_and_says_what_is_explained(checkpoint: Path, photo: Path, capsys) -> None:
    whole = picture(photo, checkpoint)
    said = capsys.readouterr().out
    answer = predict.Classifier(str(checkpoint), device='cpu')
    probabilities = answer.probabilities(answer.images([answer.pixels(str(photo))]))[0]
    best = probabilities.argmax().item()
    assert f'\n{CLASSES[best]} ({100 * probabilities[best]:.1f} %)\n' in said and said.endswith('cam.png\n')
    assert whole.shape[0] > picture(photo, checkpoint, '--stages', '3').shape[0]
    image = answer.images([answer.pixels(str(photo))])
    figure = cam.draw(answer.pixels(str(photo)), cam.explain(answer, image, best, stages=None, block=None), 'title')
    assert [axis.get_title() for axis in figure.axes[:6]] == ['image', 'Grad-CAM', *cam.PARTS]
    assert [axis.get_ylabel().splitlines() for axis in figure.axes[::6]] == [
        ['stage 1, block 1 of 1', '16x16'], ['stage 2, block 2 of 2', '8x8'], ['stage 3, block 1 of 1', '4x4'],
        ['stage 4, block 1 of 1', '2x2']]


def test_stage_target_block_and_gate_change_the_picture(checkpoint: Path, photo: Path, capsys) -> None:
    flags = ('--stages 2', '--stages 3', '--stages 2 --target cat', '--stages 2 --target 2', '--stages 2 --block 1',
             '--stages 2 --gate double')
    drawn = [picture(photo, checkpoint, *words.split()) for words in flags]
    shown = capsys.readouterr().out
    assert 'why ' in shown and ', and not ' in shown
    middle = [image[image.shape[0] // 3:] for image in drawn]  # below the titles
    same = [words for number, words in enumerate(flags) for other in middle[:number]
            if np.array_equal(middle[number], other)]
    # one of the targets is the model's own answer, whose picture is the first
    assert set(same) <= {'--stages 2 --target cat', '--stages 2 --target 2'} and len(same) < 2


@pytest.mark.parametrize('word, index', [('cat', 0), ('Great Gray Owl', 1), ('great grey owl, great gray owl', 1),
                                         ('3', 2), ('1', 1)])
def test_target_is_a_name_a_synonym_or_a_number(word: str, index: int) -> None:
    assert cam.find_class(word, CLASSES) == index


def test_other_convolutional_models_have_their_stages_without_the_aggregation(photo: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model('resnet18', num_classes=3).eval()
    torch.save(model.state_dict(), tmp_path / 'resnet')
    classifier = predict.Classifier(str(tmp_path / 'resnet'), device='cpu',
                                    settings={'model': 'resnet18', 'test_size': 96})
    image = classifier.images([classifier.pixels(str(photo))])
    rows = cam.explain(classifier, image, 1, stages=None, block=None)
    assert [row.cam.shape for row in rows] == [(48, 48), (24, 24), (12, 12), (6, 6), (3, 3)]
    assert not any(row.parts for row in rows)
    with torch.no_grad():
        features = classifier.model.forward_features(image)[0]
        expected = F.relu(torch.einsum('c,chw->hw', classifier.model.fc.weight[1], features)) / 9
    assert reference.relative_error(torch.from_numpy(rows[-1].cam), expected) < ROUND_OFF
    assert len(cam.draw(classifier.pixels(str(photo)), rows, 'title').axes) == 10


# ---- Files and wrong words ------------------------------------------------------------------------------------------

def test_nothing_is_overwritten_unasked_and_a_failure_leaves_the_old_file(checkpoint: Path, photo: Path, tmp_path: Path,
                                                                          monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(photo), '--checkpoint', str(checkpoint), '--device', 'cpu', '--stages', '4']
    cam.main(words)
    assert Image.open('photo-cam.png').format == 'PNG'
    with pytest.raises(UserError, match=r'photo-cam.png exists already; to replace it say --output photo-cam.png'):
        cam.main(words)
    Path('photo-cam.png').write_bytes(b'old')
    before = set(os.listdir())
    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', lambda _: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
        with pytest.raises(UserError, match=r'cannot write photo-cam.png: No space left'):
            cam.main([*words, '--output', 'photo-cam.png'])
    assert Path('photo-cam.png').read_bytes() == b'old' and set(os.listdir()) == before
    cam.main([*words, '--output', 'photo-cam.png'])
    assert Image.open(io.BytesIO(Path('photo-cam.png').read_bytes())).size[0] > 500


@pytest.mark.parametrize('flags, said', [
    ('--stages 5', '--stages 5: moganet_xtiny has stages 1 to 4'), ('--stages 0', 'has stages 1 to 4'),
    ('--block 2', '--block 2: stage 1 has blocks 1 to 1'), ('--target cart', 'none of the 3 classes; did you mean cat'),
    ('--target 7', '--target 7 is none of the 3 classes')])
def test_wrong_flag_is_one_line(flags: str, said: str, checkpoint: Path, photo: Path) -> None:
    with pytest.raises(UserError, match=said):
        picture(photo, checkpoint, *flags.split())
    assert not (checkpoint.parent / 'new').exists()


def test_image_that_is_none_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'none.png: No such file'):
        picture(tmp_path / 'none.png', checkpoint)


@pytest.mark.parametrize('name', ['deit_tiny_patch16_224', 'swin_tiny_patch4_window7_224'])
def test_transformer_is_refused(name: str) -> None:
    model = timm.create_model(name, num_classes=3).eval()
    with pytest.raises(UserError, match=r'has no stages of feature maps'):
        cam.stage_layers(model, torch.zeros(1, 3, 224, 224))


@pytest.mark.parametrize('package', ['captum', 'matplotlib'])
def test_missing_package_is_one_line(package: str, checkpoint: Path, photo: Path, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.split('.')[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf'tools/cam.py needs {package}.*: pip install -e'):
        picture(photo, checkpoint)
