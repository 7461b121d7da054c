"""Segmentors compute the authors' function under their names; the figures are those of tests/dense_reference.py."""
import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dense_reference
import models
import optim_factory
import reference
from dense_reference import compare_gradients, relative
from models import segmentation
from models.detection import SyncedNorm
from models.segmentation import IGNORED, Pool, SemanticFPN, UPerNet
from recipes import RECIPES
from recipes.ade20k import ROWS
from utils import UserError

pytestmark = pytest.mark.usefixtures('one_thread')

NAMES = ('fpn', 'upernet')
RECORDED = {name: dense_reference.load(name) for name in NAMES}
RELEASED = dense_reference.load('state_dict_shapes')
XT = {'fpn': 'semantic_fpn_moganet_xtiny_80k', 'upernet': 'upernet_moganet_xtiny_160k'}
PUBLISHED = [row.name for row in ROWS if '_moganet_digits' not in row.name]
# Of each gradient's norm. Measured 2.6e-6 and 2.8e-5: UPerNet's 1x1 bins normalise three values a channel
TOLERANCES = {'fpn': 1e-5, 'upernet': 1e-4}


def file_of(row: str) -> str:
    """The stem of the authors' file."""
    return row.replace('semantic_fpn', 'fpn').replace('_80k', '_80k_ade20k').replace('_160k', '_512x512_160k_ade20k')


@pytest.fixture(scope='module', params=NAMES)
def case(request) -> tuple[str, segmentation.Segmentor]:
    """A recorded network in evaluation mode, without dropout as in the recording; tests leave it as it is."""
    model = models.create_dense(XT[request.param], dropout=0.0)
    model.load_state_dict(dense_reference.seeded_state_dict(RELEASED['shapes'][file_of(XT[request.param])]))
    return request.param, model.eval()


def small(kind: type[segmentation.Segmentor] = SemanticFPN, **kwargs: object) -> segmentation.Segmentor:
    """A segmentor small enough for a test of a few milliseconds, with fresh weights."""
    torch.manual_seed(0)
    widths = {'channels': 16} | ({'head_channels': 16} if kind is SemanticFPN else {'auxiliary_channels': 16})
    return kind(**{'backbone': 'convnext_atto', 'num_classes': 3, **widths, **kwargs})


def test_the_classifier_starts_with_the_deviation_that_is_asked_for():
    for kwargs, deviation in (({}, 0.01), ({'classifier_std': 0.2}, 0.2)):
        found = small(**kwargs).decode_head.conv_seg.weight.std().item()
        assert 0.7 * deviation < found < 1.3 * deviation  # of 48 numbers: three standard errors


# ---- Names and weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('row', PUBLISHED)
def test_the_state_dict_has_the_released_names_and_shapes_in_order(row):
    with torch.device('meta'):
        model = models.create_dense(row)
    released = RELEASED['shapes'][file_of(row)]
    assert [(name, list(value.shape)) for name, value in model.state_dict().items()] == list(released.items())
    parameters = sum(value.numel() for value in model.parameters())
    assert parameters == RELEASED['info'][file_of(row)]['params']
    if RECIPES[row].expected_parameters is not None:
        assert parameters / 1e6 == pytest.approx(RECIPES[row].expected_parameters, abs=0.06)


@pytest.mark.parametrize('name', NAMES)
def test_fresh_weights_are_distributed_as_the_recorded_ones(name):
    torch.manual_seed(0)
    recorded = dense_reference.load('init')[name]
    parameters = {key: value.detach().double() for key, value in models.create_dense(XT[name]).named_parameters()
                  if not key.startswith('backbone.')}
    assert parameters.keys() == recorded.keys() and len(recorded) == {'fpn': 39, 'upernet': 43}[name]
    for key, (mean, std, _, count) in recorded.items():
        value = parameters[key]
        assert value.numel() == count
        # Two draws of n: means differ by std * sqrt(2 / n); 5 such are one in a million. The deviations of the smallest
        # tensor, of 8,192 values, differ by 1.1 %
        assert value.mean().item() == pytest.approx(mean, abs=1e-3 * abs(mean) + 5 * std * math.sqrt(2 / count)), key
        assert value.std().item() == pytest.approx(std, rel=0.05, abs=1e-6), key


# ---- The whole model ------------------------------------------------------------------------------------------------


def compare(name: str, key: str, maps: Tensor, *, tolerance: float = 1e-5) -> None:
    """A map's sample, norm and mean against the recorded ones."""
    recorded = RECORDED[name]
    if key in recorded['shapes']:
        assert list(maps.shape) == recorded['shapes'][key]
    wanted = recorded[f'{key}/sample']
    assert relative(dense_reference.sample(maps, len(wanted)), wanted) <= tolerance
    norm, mean = recorded[f'{key}/stat'].tolist()
    assert maps.double().norm().item() == pytest.approx(norm, rel=tolerance)
    assert maps.double().mean().item() == pytest.approx(mean, abs=tolerance * norm / math.sqrt(maps.numel()))


def test_the_maps_equal_the_recorded_ones(case):
    name, model = case
    image = dense_reference.images(1, 3, 128, 192)
    with torch.inference_mode():
        maps = model.maps(image)
        heads = dict(zip(('decode', 'auxiliary'), model.heads(image), strict=False))
        keys = {f'plain/{head}': logits for head, logits in heads.items()}
        if name == 'fpn':
            keys |= {f'plain/neck{i}': level for i, level in enumerate(model.neck(maps))}
        keys['plain/probability'] = segmentation.resize(model.logits(image), (97, 150)).softmax(1)
    # Float32 sums in another order, through 40 to 100 layers: 1e-5
    for i, x in enumerate(maps):
        assert relative(x.mean((0, 2, 3)), RECORDED[name][f'plain/backbone{i}']) <= 1e-5
    for key, x in keys.items():
        compare(name, key, x)
    assert relative(heads['decode'][0, :, ::11, ::13], RECORDED[name]['plain/decode_pixel']) <= 1e-5
    recorded = [key for key in RECORDED[name] if key.startswith('plain/') and not key.endswith(('argmax', 'quantiles'))]
    assert len(recorded) == 4 + 2 * len(keys) + 1 == {'fpn': 17, 'upernet': 11}[name]


def test_the_label_map_equals_the_recorded_one(case):
    name, model = case
    found, = model.predict(dense_reference.images(1, 3, 128, 192), [(128, 192)], [(97, 150)])
    # All pixels; in the closest race of 14,550 the two best probabilities differ by 8e-8
    assert torch.equal(found['labels'], RECORDED[name]['plain/argmax'].long())


def as_recorded(relu: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Of 491,520 inputs of a ReLU one is 1.5e-7 here; when the gradients were recorded, round-off made it negative."""
    x, = inputs
    near = x.detach().abs() < 1e-6
    assert near.sum() == 1 and x[near].item() > 0
    return torch.where(near, x - 1e-6, x),


@pytest.mark.parametrize('tag', ['train', 'train_all_ignored'])
def test_a_step_in_training_mode_equals_the_recorded_one(case, tag):
    name, model = case
    recorded, model = RECORDED[name], copy.deepcopy(model).train()
    images = dense_reference.images(3, 3, 128, 160, seed=200)
    labels = recorded['train/labels']
    if tag == 'train_all_ignored':
        labels = torch.full_like(labels, IGNORED)
    assert (labels == IGNORED).double().mean().item() == pytest.approx(recorded[f'{tag}/ignored_fraction'])
    if name == 'fpn':
        model.decode_head.scale_heads[0][0].relu.register_forward_pre_hook(as_recorded)
    losses = model(images, labels)
    wanted = {key: value for key, value in recorded[f'{tag}/losses'].items() if 'loss' in key}
    assert losses.keys() == wanted.keys()
    for key, value in losses.items():  # two runs of the original differ by 2e-6 under round-off of the images
        assert value.item() == pytest.approx(wanted[key], rel=1e-5), key
    assert sum(losses.values()).item() == pytest.approx(recorded[f'{tag}/total'], rel=1e-5)
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters()) and not recorded[f'{tag}/no_grad']
    compare_gradients(recorded[f'{tag}/grad_norm'], model, TOLERANCES[name])
    state = model.state_dict()
    for kind in ('mean', 'var'):
        norms = recorded[f'{tag}/running_{kind}_norm']
        assert len(norms) == len([key for key in state if key.endswith(f'running_{kind}')])
        for key, norm in norms.items():
            assert state[key].norm().item() == pytest.approx(norm, rel=1e-5), key


def test_the_accuracy_of_the_recorded_step_is_that_of_our_logits(case):
    name, model = case
    recorded, model = RECORDED[name], copy.deepcopy(model).train()
    labels = recorded['train/labels']
    with torch.no_grad():
        heads = model.heads(dense_reference.images(3, 3, 128, 160, seed=200))
    for head, logits in zip(('decode', 'aux'), heads, strict=False):
        right = segmentation.resize(logits, labels.shape[-2:]).argmax(1) == labels
        accuracy = 100 * right[labels != IGNORED].double().mean().item()
        # Of 43,808 labelled pixels one may change sides: 0.0023 %
        assert accuracy == pytest.approx(recorded['train/losses'][f'{head}.acc_seg'], abs=0.003)


# ---- The parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('bins,size', [*itertools.product((1, 2, 3, 6), ((4, 6), (16, 16), (5, 7), (1, 3)))])
def test_pooling_is_torchs_adaptive_one(bins, size):
    maps = torch.randn(2, 3, *size, requires_grad=True, dtype=torch.float32)
    ours, torchs = Pool(bins)(maps), F.adaptive_avg_pool2d(maps, bins)
    # Sums of at most 256 numbers in another order
    assert torch.allclose(ours, torchs, atol=1e-6)
    weights = torch.randn_like(ours)
    grads = [torch.autograd.grad((pooled * weights).sum(), maps)[0] for pooled in (ours, torchs)]
    assert torch.allclose(*grads, atol=1e-6)


def test_pooling_keeps_float32_under_autocast():
    maps = torch.full((1, 1, 200, 200), 8.0).half()  # their sum is above fp16's largest number
    with torch.autocast('cpu', dtype=torch.bfloat16):
        pooled = Pool(3)(maps)
    assert pooled.dtype == torch.float32 and torch.allclose(pooled, torch.tensor(8.0), rtol=1e-6)


def test_the_cross_entropy_counts_ignored_pixels_in_its_mean():
    logits, labels = torch.randn(2, 4, 5, 6), torch.randint(0, 4, (2, 5, 6))
    labels[0, :2] = IGNORED
    wanted = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction='none').sum() / 60
    assert segmentation.cross_entropy(logits, labels.to(torch.uint8)).item() == pytest.approx(wanted.item(), rel=1e-6)


def test_a_label_map_is_the_arg_max_of_all_classes():
    logits = torch.randn(1, 70, 9, 13)
    wanted = F.interpolate(logits, size=(40, 31), mode='bilinear', align_corners=False)[0].argmax(0)
    assert torch.equal(segmentation.label_map(logits, (40, 31)), wanted)
    assert not segmentation.label_map(torch.zeros(1, 70, 2, 2), (4, 4)).any()  # of equals, the first


@pytest.mark.parametrize('side,starts', [(30, [0]), (48, [0]), (49, [0, 1]), (80, [0, 32]), (100, [0, 32, 52])])
def test_windows_overlap_by_a_third_and_end_with_the_image(side, starts):
    assert segmentation.window_starts(side, 48) == starts


# ---- The rows -------------------------------------------------------------------------------------------------------

OPTIM = reference.load_json('dense_optim.json.gz')


@pytest.mark.parametrize('row', PUBLISHED)
def test_the_rows_have_the_recorded_groups_and_rates(row):
    recipe, kind = RECIPES[row], 'fpn' if row.startswith('semantic') else 'upernet'
    schedule = OPTIM['schedule'][{'fpn': 'fpn_80k', 'upernet': 'upernet_160k'}[kind]]
    ours = optim_factory.schedule_of(recipe, updates_per_epoch=632)
    assert ours.total_updates == schedule['max_iterations'] == recipe.updates
    for update, (rate,) in schedule['lr'].items():
        assert optim_factory.learning_rate(int(update), schedule=ours) == pytest.approx(rate, rel=1e-11), update
    if 'xtiny' not in row:
        return
    recorded = OPTIM['groups'][file_of(row)]
    with torch.device('meta'):
        optimizer = optim_factory.create_optimizer(models.create_dense(row), recipe)
    assert (optimizer.defaults['betas'], optimizer.defaults['eps']) == ((0.9, 0.999), 1e-8)
    found = {name: [group['lr_scale'], group['weight_decay']]
             for group in optimizer.param_groups for name in group['names']}
    assert found == {name: recorded['kinds'][number] for name, (number, _) in recorded['parameters'].items()}


def test_the_rows_hold_the_published_values():
    table = {  # mIoU, mAcc, GMACs, drop path
        'semantic_fpn_moganet_xtiny_80k': (40.3, 52.4, 101.4, 0.05),
        'semantic_fpn_moganet_tiny_80k': (43.1, 55.4, 107.8, 0.1),
        'semantic_fpn_moganet_small_80k': (47.7, 59.8, 189.7, 0.1),
        'semantic_fpn_moganet_base_80k': (49.3, 61.6, 293.6, 0.2),
        'semantic_fpn_moganet_large_80k': (50.2, 63.0, 418.7, 0.3),
        'upernet_moganet_xtiny_160k': (42.2, 55.1, 855.7, 0.05), 'upernet_moganet_tiny_160k': (43.7, 57.1, 862.4, 0.1),
        'upernet_moganet_small_160k': (49.2, 61.6, 946.4, 0.1), 'upernet_moganet_base_160k': (50.1, 63.4, 1050.4, 0.2),
        'upernet_moganet_large_160k': (50.9, 63.5, 1176.1, 0.3), 'upernet_moganet_xlarge_160k': (54.0, None, None, 0.4)}
    assert table.keys() == set(PUBLISHED)
    for name, values in table.items():
        row = RECIPES[name]
        assert (row.expected_miou, row.expected_macc, row.expected_flops, row.drop_path) == values
        semantic = name.startswith('semantic')
        assert (row.lr, row.weight_decay, row.total_batch_size, row.micro_batch_size) == (
            (2e-4, 1e-4, 32, 4) if semantic else (1e-4, 0.01, 16, 2))
        assert (row.crop_size, row.scale_range, row.max_class_share, row.image_scale, row.align_resize) == (
            512, (0.5, 2.0), 0.75, (2048, 512), True)
        assert not row.sync_bn and 'plain batch norms in the backbone' in row.source
    assert 'no file' in RECIPES['upernet_moganet_xlarge_160k'].source


# ---- What a user relies on ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', [SemanticFPN, UPerNet])
@pytest.mark.parametrize('name', ['resnet18', 'swin_tiny_patch4_window7_224', 'moganet_xtiny'])
def test_any_backbone_with_strides_4_to_32_takes_sizes_that_no_stride_divides_and_waits_for_no_device(name, kind):
    # On the device meta there are no values: an operation that waits for one, or takes a tensor of the CPU, fails
    free = {'strict_img_size': False} if name.startswith('swin') else {}
    with torch.device('meta'):
        model = small(kind, backbone=name, **free)
        losses = model(torch.zeros(2, 3, 104, 168), torch.zeros(2, 104, 168, dtype=torch.uint8))
    assert tuple(losses) == model.LOSSES
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.eval().logits(torch.zeros(1, 3, 100, 60, device='meta')).shape == (1, 3, 100, 60)


def test_one_image_alone_is_too_few_for_upernets_batch_norms():
    model, image, labels = small(UPerNet), torch.zeros(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.uint8)
    with pytest.raises(UserError, match=r'--batch_size 1: .* give at least 2'):
        model.train()(image, labels)
    assert model.eval()(image, labels)['aux.loss_ce'] > 0


def test_a_backbone_with_other_strides_is_refused_with_the_cure():
    with pytest.raises(UserError, match=r'strides 4, 8, 16 and 32, .* vit_tiny_patch16_224 are at 16, 16, 16, 16;'):
        UPerNet('vit_tiny_patch16_224')


@pytest.mark.parametrize('kind', [SemanticFPN, UPerNet])
def test_gradients_repeat_to_the_bit_and_losses_are_float32_under_autocast(kind):
    images, labels = torch.randn(2, 3, 64, 96), torch.randint(0, 3, (2, 64, 96))
    gradients, sums = [], []
    for dtype in (None, None, torch.bfloat16):
        model = small(kind).train()
        with torch.autocast('cpu', dtype=dtype, enabled=dtype is not None):
            torch.manual_seed(1)
            losses = model(images, labels)
        assert all(loss.dtype == torch.float32 for loss in losses.values())
        sum(losses.values()).backward()
        sums.append(sum(losses.values()).item())
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients[:2]))
    assert sums[2] == pytest.approx(sums[0], rel=0.02)  # bfloat16 has 8 bits: 0.004 a number


def test_an_image_gets_the_same_labels_alone_and_beside_a_larger_one():
    model = small(UPerNet, backbone='moganet_xtiny').eval()
    images = torch.zeros(2, 3, 64, 96)
    images[0, :, :50, :70], images[1] = torch.randn(3, 50, 70), torch.randn(3, 64, 96)
    together = model.predict(images, [(50, 70), (64, 96)], [(100, 140), (33, 47)])
    alone, = model.predict(images[:1, :, :50, :70], [(50, 70)], [(100, 140)])
    assert torch.equal(together[0]['labels'], alone['labels'])
    assert [tuple(found['labels'].shape) for found in together] == [(100, 140), (33, 47)]


def test_one_window_over_the_whole_image_is_the_whole_image_and_smaller_ones_average_what_overlaps():
    model = small().eval()
    nn.init.normal_(model.decode_head.conv_seg.weight)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(model._logits(image, 96), model.logits(image))
        found = model._logits(image, 48)
        windows = {(top, left): model.logits(image[:, :, top:top + 48, left:left + 48])
                   for top in (0, 16) for left in (0, 32, 48)}
    assert torch.allclose(found[..., 0, 0], windows[0, 0][..., 0, 0])
    both = (windows[0, 0][..., 20, 0] + windows[16, 0][..., 4, 0]) / 2
    assert torch.allclose(found[..., 20, 0], both, atol=1e-6)


def test_flips_and_views_average_probabilities():
    model = small().eval()
    nn.init.normal_(model.decode_head.conv_seg.weight)
    image = torch.randn(1, 3, 64, 96)
    mirrored, = model.predict(image.flip(-1), [(64, 96)], [(64, 96)], flip=True)
    found, = model.predict(image, [(64, 96)], [(64, 96)], flip=True)
    assert torch.equal(found['labels'], mirrored['labels'].flip(-1))
    with torch.no_grad():
        views = [model.logits(image), model.logits(image[..., :32, :48])]
    wanted = sum(segmentation.resize(view, (64, 96)).softmax(1) for view in views)[0].argmax(0)
    padded = torch.cat([image, F.pad(image[..., :32, :48], (0, 48, 0, 32))])
    found, = model.predict(padded, [(64, 96), (32, 48)], [(64, 96)])
    assert torch.equal(found['labels'], wanted)


def test_the_heads_norms_are_those_over_all_ranks_and_the_backbones_plain():
    with torch.device('meta'):
        model = models.create_dense(XT['upernet'])
    kinds = {name: {type(module) for module in part.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
             for name, part in model.named_children()}
    assert kinds == {'backbone': {nn.BatchNorm2d}, 'decode_head': {SyncedNorm}, 'auxiliary_head': {SyncedNorm}}
    x = torch.randn(4, 3, 5, 5)
    ours, torchs = SyncedNorm(3), nn.SyncBatchNorm(3)  # of one process, which exchange nothing
    assert torch.equal(nn.SyncBatchNorm.forward(ours, x), torchs(x)) and torch.equal(ours(x), torchs(x))
    assert torch.equal(ours.running_var, torchs.running_var)
