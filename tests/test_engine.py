"""The training step, its health checks and evaluation, in one process."""
import copy
import itertools
from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import engine
import models  # noqa: F401, registers the MogaNets
from engine import Buffers, NonFiniteError, TrainStep, precise_bn, train_updates
from optim_factory import ModelEma
from tasks.classification import Accuracy, Labelled

CPU = torch.device('cpu')


def tiny(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('moganet_xtiny', dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), ffn_ratios=(2, 2, 2, 2),
                             num_classes=3, layer_scale_init_value=0.1, **kwargs)


def plain() -> nn.Module:
    """A network without BN."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.GroupNorm(2, 8), nn.GELU(), nn.Flatten(), nn.Linear(8 * 15 * 15, 3))


def batches(size: int = 4, *, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield Labelled(torch.randn(size, 3, 32, 32, generator=generator),
                       torch.randint(3, (size,), generator=generator))


class CrossEntropy:
    """A task of one loss, all that the training step asks of a task."""

    losses = ()

    def loss(self, model: nn.Module, batch: Labelled) -> dict[str, torch.Tensor]:
        return {'loss': F.cross_entropy(model(batch.images), batch.targets)}


def forward(model: nn.Module, batch: Labelled) -> torch.Tensor:
    return model(batch.images)


def split(batch: Labelled, size: int) -> list[Labelled]:
    return [Labelled(*parts) for parts in zip(batch.images.split(size), batch.targets.split(size), strict=True)]


def step_of(model: nn.Module, **kwargs) -> TrainStep:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    return TrainStep(model, CrossEntropy(), optimizer, device=CPU, **kwargs)


def train(step: TrainStep, items, *, updates: int, **kwargs):
    return train_updates(step, items, begin=0, end=updates, set_schedule=lambda update: 1e-3, images_per_update=4,
                         **kwargs)


def largest_difference(a: nn.Module, b: nn.Module) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_accumulated_micro_batches_equal_the_big_batch_to_round_off():
    big, small = step_of(plain()), step_of(plain(), update_freq=4)
    for step in (big, small):  # Adam's step is lr * sign(g) at first, which would magnify round-off in a tiny gradient
        step.optimizer = torch.optim.SGD(step.model.parameters(), lr=0.1)
    stream = list(itertools.islice(batches(8), 3))
    train(big, stream, updates=3)
    train(small, [part for batch in stream for part in split(batch, 2)], updates=3)
    assert largest_difference(big.model, small.model) < 1e-6  # float32 sums in another order, weights of about 0.1
    assert torch.allclose(big.sums.values, small.sums.values, rtol=1e-5)


def test_the_loss_is_the_mean_over_the_images():
    model = plain()
    step = step_of(model)
    step.optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    stream = [*itertools.islice(batches(4), 2), *itertools.islice(batches(2), 1)]
    expected = sum(F.cross_entropy(model(batch.images), batch.targets, reduction='sum') for batch in stream) / 10
    assert train(step, stream, updates=3)['train_loss'] == pytest.approx(expected.item(), rel=1e-6)  # float32 losses


def test_a_step_reads_no_value_from_the_device_outside_logging_and_the_optimizer():
    model = tiny(drop_path_rate=0.1)
    step = step_of(model, ema=ModelEma(model, decay=0.9), clip_grad=1.0, update_freq=2)
    stream = batches(2)
    step(stream, 0)
    optimizer_step = step.optimizer.step
    reads = {'inside': 0, 'all': 0}

    def count(profile) -> int:
        return sum(event.count for event in profile.key_averages()
                   if event.key in ('aten::item', 'aten::_local_scalar_dense'))

    def counted_step(*args, **kwargs):
        with torch.profiler.record_function('optimizer'):
            return optimizer_step(*args, **kwargs)

    step.optimizer.step = counted_step
    with torch.profiler.profile() as profile:
        for update in range(1, 21):
            step(stream, update)
    reads['all'] = count(profile)
    for event in profile.events():
        parent = event.cpu_parent
        while parent is not None and parent.name != 'optimizer':
            parent = parent.cpu_parent
        reads['inside'] += event.name in ('aten::item', 'aten::_local_scalar_dense') and parent is not None
    assert reads['all'] == reads['inside']
    with torch.profiler.profile() as profile:
        step.check()
    assert count(profile) == 0  # tolist reads once, and is no item
    with torch.profiler.profile() as profile:
        step.sums['loss'].item()
    assert count(profile) > 0  # what the test looks for is there to be seen


@pytest.mark.gpu
def test_a_cuda_step_does_not_wait_for_the_device():
    device = torch.device('cuda')
    model = tiny(drop_path_rate=0.1).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    step = TrainStep(model, CrossEntropy(), optimizer, device=device, precision='fp16', clip_grad=1.0,
                     ema=ModelEma(model, decay=0.9))
    stream = itertools.repeat(next(batches(4)).to(device))
    for update in range(3):
        step(stream, update)
    torch.cuda.set_sync_debug_mode('error')
    try:
        for update in range(3, 23):
            step(stream, update)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert step.check()['loss'] > 0


@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp16'])
@pytest.mark.parametrize('mode', ['norm', 'value', 'agc'])
def test_gradients_are_clipped_in_every_precision(precision, mode):
    model = tiny()
    step = step_of(model, precision=precision, clip_grad=1e-3, clip_mode=mode)
    step.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = copy.deepcopy(model)
    step(batches(), 0)
    moved = torch.stack([(a - b).detach().norm()
                         for a, b in zip(model.parameters(), before.parameters(), strict=True)])
    if mode == 'norm':
        assert moved.norm() == pytest.approx(1e-3, rel=1e-2)  # float32 subtraction of weights far larger than steps
    elif mode == 'value':
        assert largest_difference(model, before) <= 1e-3 * 1.01
    else:
        norms = torch.stack([param.detach().norm() for param in before.parameters()])
        assert (moved <= 1e-3 * norms.clamp(min=1e-3) * 30)[:-2].all()
        for net in (model, before):  # the classifier is left out
            net.reset_classifier(0)
    free = tiny()
    loose = step_of(free, precision=precision)
    loose.optimizer = torch.optim.SGD(free.parameters(), lr=1.0)
    loose(batches(), 0)
    if mode == 'agc':
        free.reset_classifier(0)
    assert largest_difference(free, before) > 10 * largest_difference(model, before)


def test_bf16_autocast_changes_the_result_and_trains():
    plain_step, half_step = step_of(tiny()), step_of(tiny(), precision='bf16')
    losses = [train(step, batches(), updates=6, print_freq=1)['train_loss'] for step in (plain_step, half_step)]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.05)
    assert all(param.dtype == torch.float32 for param in half_step.model.parameters())


def overflowing(model: nn.Module, **kwargs) -> TrainStep:
    """A step whose first update overflows the scaled loss; the next ones do not."""
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0 ** 126, backoff_factor=2.0 ** -120)
    return step_of(model, scaler=scaler, **kwargs)


def too_large() -> Labelled:
    batch = next(batches())
    return Labelled(batch.images * 1e30, batch.targets)


def test_a_skipped_step_leaves_weights_statistics_and_average_as_they_were():
    model = tiny()
    ema = ModelEma(model, decay=0.9)
    step = overflowing(model, ema=ema)
    before = copy.deepcopy((model.state_dict(), ema.module.state_dict()))
    step(iter([too_large()]), 0)
    for old, new in zip(before, (model.state_dict(), ema.module.state_dict()), strict=True):
        for name, value in old.items():
            assert torch.equal(new[name], value), name
    figures = step.check()
    assert figures == {'loss': 0.0, 'bad_images': 0.0, 'skipped': 1.0, 'skips_in_row': 1.0}
    step(batches(), 1)  # at the scale that the overflow left behind
    figures = step.check()
    assert figures['skipped'] == 1 and figures['skips_in_row'] == 0 and figures['loss'] > 0
    assert largest_difference(model, ema.module) > 0
    assert not torch.equal(model.state_dict()['norm1.running_mean'], before[0]['norm1.running_mean'])


def test_the_scalers_state_goes_on_where_it_was():
    step = overflowing(tiny())
    step(iter([too_large()]), 0)
    again = overflowing(tiny())
    again.scaler.load_state_dict(step.scaler.state_dict())
    assert again.scaler.get_scale() == step.scaler.get_scale() == 2.0 ** 6


def test_too_many_skips_in_a_row_stop_the_run():
    step = step_of(tiny(), scaler=torch.amp.GradScaler('cpu', init_scale=2.0 ** 126, backoff_factor=0.999))
    stream = itertools.repeat(too_large())
    with pytest.raises(NonFiniteError, match='6 updates in a row'):
        train(step, stream, updates=20, print_freq=3, max_skips=6)
    assert (step.skips['all'], step.skips['in_a_row']) == (6, 6)


@pytest.mark.parametrize('place', ['parameter', 'buffer', 'average', 'loss'])
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_what_is_not_finite_is_found_wherever_it_is(place, value):
    model = tiny()
    ema = ModelEma(model, decay=0.9)
    step = step_of(model, ema=ema)
    step.check()
    with torch.no_grad():
        {'parameter': model.head.weight, 'buffer': model.norm2.running_var, 'average': ema.module.head.bias,
         'loss': step.sums.values}[place].view(-1)[0] = value
    with pytest.raises(NonFiniteError):
        step.check()


def test_training_stops_where_it_is_told_and_reports_on_time():
    seen = []
    result = train(step_of(plain()), batches(), updates=20, print_freq=4, report=lambda p: seen.append(p.update),
                   after_update=lambda done: done == 10)
    assert seen == [4, 8, 10] and result['done'] == 10
    assert 0 <= result['data_wait'] < 1 and result['images_per_second'] > 0


def test_drop_path_depends_on_seed_update_and_rank_alone():
    def loss(update: int, seed: int, rank: int) -> float:
        step = step_of(tiny(drop_path_rate=0.9), seed=seed, rank=rank)
        torch.manual_seed(update * 7 + 1)  # the state that other code left
        step(batches(), update)
        return step.sums['loss'].item()

    reference = loss(3, 0, 0)
    assert loss(3, 0, 0) == reference
    assert len({reference, loss(4, 0, 0), loss(3, 1, 0), loss(3, 0, 1)}) == 4


def evaluate(model: nn.Module, items: list[Labelled], *, count: int) -> dict[str, float]:
    return engine.evaluate({'': model}, items, Accuracy(CPU), count=count, device=CPU)['']


def test_evaluation_weighs_every_image_equally():
    model = tiny()
    batch = next(batches(11))
    targets = batch.targets
    with torch.no_grad():
        logits = model.eval()(batch.images)
    model.train()
    result = evaluate(model, split(batch, 4), count=11)
    assert result['count'] == 11 and result['acc5'] == 100  # three classes: top-3
    assert result['acc1'] == pytest.approx(100 * (logits.argmax(1) == targets).float().mean().item(), rel=1e-6)
    assert result['loss'] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)  # batches of other sizes
    assert model.training
    with pytest.raises(RuntimeError, match='11 images were evaluated, but the data set has 12'):
        evaluate(model, split(batch, 4), count=12)


def test_several_models_are_evaluated_in_one_pass_each_as_alone():
    first, second = tiny(), tiny()
    with torch.no_grad():
        second.head.bias += torch.tensor([0.0, 5.0, 0.0])
    items, read = split(next(batches(11)), 4), []
    both = engine.evaluate({'a': first, 'b': second}, (read.append(1) or batch for batch in items), Accuracy(CPU),
                           count=11, device=CPU)
    assert len(read) == 3 and both['a'] != both['b']
    assert both == {'a': evaluate(first, items, count=11), 'b': evaluate(second, items, count=11)}


def test_single_losses_of_a_task_are_summed_beside_their_total():
    class Two(CrossEntropy):
        losses = ('near', 'far')

        def loss(self, model, batch):
            loss = super().loss(model, batch)['loss']
            return {'near': loss, 'far': 2 * loss}

    model = plain()
    step = TrainStep(model, Two(), torch.optim.SGD(model.parameters(), lr=0.1), device=CPU)
    result = train(step, batches(), updates=2)
    assert result['train_far'] == pytest.approx(2 * result['train_near'], rel=1e-6)  # float32
    assert result['train_loss'] == pytest.approx(3 * result['train_near'], rel=1e-6)


def test_precise_bn_takes_the_mean_of_the_batches_and_leaves_the_rest():
    model = tiny(drop_path_rate=0.5)
    stream = list(itertools.islice(batches(8), 3))
    before = copy.deepcopy(model)
    precise_bn(model, stream, forward)
    first = before.patch_embed1.projection[0]
    expected = torch.stack([first(batch.images).mean((0, 2, 3)) for batch in stream]).mean(0)
    assert torch.allclose(model.patch_embed1.projection[1].running_mean, expected, atol=1e-6)  # float32 means
    assert largest_difference(model, before) == 0 and model.training
    assert model.norm1.momentum == 0.1 and model.norm1.num_batches_tracked == 0


def test_precise_bn_of_a_compiled_model_compiles_nothing_and_is_that_of_a_plain_one():
    """Compiled, each norm would break the graph, and each batch compile it anew: momentum None reads a count."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled, eager, stream = tiny(), tiny(), list(itertools.islice(batches(8), 3))
    compiled.compile(backend=backend)
    for model in (compiled, eager):
        precise_bn(model, stream, forward)
    assert not graphs
    assert all(torch.equal(a, b) for a, b in zip(compiled.buffers(), eager.buffers(), strict=True))
    compiled(stream[0].images)
    assert graphs  # what was looked for is there to be seen


def test_buffers_come_back_after_what_was_made_of_them():
    model = tiny()
    buffers = Buffers(model)
    own = buffers.get()
    assert own.numel() == sum(b.numel() for b in model.buffers() if b.is_floating_point())
    with buffers.equal('reduce', first=lambda: model.norm1.running_mean.fill_(5.0)):
        assert (model.norm1.running_mean == 5).all()
        assert torch.equal(buffers.own(), own)
    assert torch.equal(buffers.get(), own)


def test_a_compiled_model_keeps_its_names_and_its_losses():
    eager, compiled = step_of(tiny()), step_of(tiny())
    compiled.model.compile(backend='eager')
    names = list(compiled.model.state_dict())
    losses = [train(step, batches(), updates=3)['train_loss'] for step in (eager, compiled)]
    assert names == list(eager.model.state_dict())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # the same kernels, some in another order


@pytest.mark.parametrize('training', [True, False])
def test_evaluating_compiles_no_second_graph(training):
    """A graph of the training stays the one graph; an evaluation alone compiles for its batches, not for the last."""
    torch._dynamo.reset()
    compiled, ran = [], []

    def backend(graph: torch.fx.GraphModule, _: object):
        compiled.append(graph)
        return lambda *inputs: ran.append(graph) or graph.forward(*inputs)

    eager, model = plain(), plain()
    model.compile(backend=backend)
    if training:
        step = step_of(model)
        train(step, batches(), updates=1)
        eager.load_state_dict(model.state_dict())
    items = split(next(batches(11)), 4)
    found = engine.evaluate({'': model}, items, Accuracy(CPU), count=11, device=CPU, compiling=not training)
    assert len(compiled) == 1 and len(ran) == (1 if training else 2)  # of three batches, the last has three images
    expected = engine.evaluate({'': eager}, items, Accuracy(CPU), count=11, device=CPU)
    assert found['']['loss'] == pytest.approx(expected['']['loss'], rel=1e-6)  # the same kernels, some in another order
    if training:
        train(step, batches(), updates=1)
        assert len(compiled) == 1 and len(ran) == 2


def test_wrapping_without_a_process_group_changes_nothing():
    model = tiny()
    assert engine.wrap_distributed(model, CPU) is model
