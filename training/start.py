"""What a run starts from, and its parts, built.

The first that applies:
  1. the newest valid checkpoint in the run's folder (`--auto_resume`, on by default): the same command continues a run;
  2. `--resume FILE`: weights, optimizer, average and position of another run of the same recipe;
  3. `--finetune SOURCE` or `--pretrained`: weights alone;
  4. the model's own initialisation, from the recipe's seed.
"""
import contextlib
import dataclasses
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm  # torch's drops the activation of timm's BatchNormAct2d
from torch import nn

import engine
import optim_factory
import recipes
import utils
from models.weights import Weights, apply_weights, load_weights
from pipeline.files import cache_folder
from recipes import Recipe, Run
from tasks import Task
from training import checkpoint
from training.checkpoint import CheckpointFolder, TrainState
from utils import UserError, log

CONVOLUTIONS = 'conv2d'  # how this version computes them, in training


def settle_arithmetic(run: Run, device: torch.device, start: dict[str, Any] | None = None) -> Run:
    """The run with the layout and TF32 decided, which torch is told.

    Both change the order or the precision of sums, and so the bits: a flag wins, then what the checkpoint was trained
    with, then the faster of both where the device has it. On MPS channels-last is left out: nobody has run it there.

    Args:
        start: the state that the run goes on from, as `find_start` returns it.

    Raises:
        UserError: where the checkpoint's convolutions were computed in a form that this version does not know.
    """
    before: dict[str, Any] = start['arithmetic'] if start is not None else {
        'channels_last': device.type in ('cuda', 'cpu'), 'convolutions': CONVOLUTIONS,
        'tf32': device.type == 'cuda' and torch.cuda.get_device_capability(device) >= (8, 0)}
    if before['convolutions'] != CONVOLUTIONS:
        raise UserError(f'the checkpoint was trained with convolutions in the form {before["convolutions"]}, which '
                        'this version of the project does not know; update it')
    asked = {name: getattr(run, name) for name in ('channels_last', 'tf32')}
    run = dataclasses.replace(run, **{name: before[name] if value is None else value for name, value in asked.items()})
    changed = [f'--{name} {str(before[name]).lower()} -> {str(getattr(run, name)).lower()}' for name in asked
               if start is not None and getattr(run, name) != before[name]]
    if changed:
        log.warning('The checkpoint goes on with another arithmetic than it was written with (%s): on the same '
                    'batches, but not bit for bit.', ', '.join(changed))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = run.tf32
    return run


def arithmetic_of(run: Run) -> dict[str, Any]:
    """What a checkpoint says of the arithmetic that a settled run trains with."""
    return {'channels_last': run.channels_last, 'tf32': run.tf32, 'convolutions': CONVOLUTIONS}


def show_precision(recipe: Recipe, run: Run, device: torch.device) -> str:
    """The precision of a settled run for people; off CUDA there is no TF32 to be told apart."""
    if recipe.precision != 'fp32' or device.type != 'cuda':
        return recipe.precision
    return 'fp32 with TF32' if run.tf32 else 'strict fp32'


def adapt_to_device(recipe: Recipe, run: Run, device: torch.device) -> Recipe:
    """Sets what torch keeps globally, and falls back to fp32 where the device has no fp16."""
    torch.backends.cudnn.benchmark = not run.deterministic
    if run.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # what cuBLAS asks for in order to be so
        torch.use_deterministic_algorithms(True)
        # Nothing here reads what it has not written, and the fills are 1,000 of 3,500 launches a step
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property
    if recipe.precision == 'fp16' and device.type != 'cuda':
        log.info('fp16 needs a CUDA device: running in fp32 on this %s.', device.type)
        recipe = dataclasses.replace(recipe, precision='fp32')
    if recipe.sync_bn and recipe.plain_bn_without_cuda and (device.type != 'cuda' or run.world_size == 1):
        log.info('--sync_bn: %s, the batch norms are plain ones.',
                 'on one process' if device.type == 'cuda' else f'off CUDA, on this {device.type}')
        recipe = dataclasses.replace(recipe, sync_bn=False)
    if recipe.sync_bn and device.type != 'cuda':
        raise UserError(f'--sync_bn needs CUDA devices, and this is a {device.type}; leave it out')
    return recipe


def newest_for_all(folder: CheckpointFolder, processes: utils.Processes,
                   name: str) -> tuple[Path, dict[str, Any]] | None:
    """The newest valid checkpoint of a folder, as rank 0 finds it, on all ranks; None where there is none.

    On a network file system another rank may not see the newest yet, or rank 0 may still be writing.

    Args:
        name: of this question, for the exchange between the ranks.

    Raises:
        UserError: where none can be read, or a rank does not see rank 0's.
    """
    found = None

    def newest() -> str:
        nonlocal found
        found = folder.newest()
        return str(found[0]) if found else ''

    path = utils.from_rank_zero(name, newest)
    if path and found is None:
        try:
            found = Path(path), checkpoint.load(Path(path))
        except checkpoint.CheckpointError as error:
            raise UserError(f'rank {processes.rank}: {error}; --output_dir must be shared by all nodes') from None
    return found


def find_start(recipe: Recipe, run: Run, folder: CheckpointFolder,
               processes: utils.Processes) -> tuple[dict[str, Any] | None, bool]:
    """The state to start from, and whether it is the run's own: the newest of its folder, else that of --resume.

    Raises:
        UserError: where the folder holds a run that would be overwritten or mixed with another.
    """
    found = newest_for_all(folder, processes, 'start')
    own = found is not None
    if own and not run.auto_resume:
        raise UserError(f'{run.output_dir} holds a run already; continue it with --auto_resume true, or give another '
                        '--output_dir')
    if run.resume:
        named = Path(run.resume)
        try:
            state = checkpoint.load(named)
        except checkpoint.CheckpointError as error:
            raise UserError(f'--resume {error}; give a checkpoint-*.pth of a training run') from None
        if state['optimizer'] is None:
            raise UserError(f'--resume {named} holds weights alone; give checkpoint-last.pth, or say --finetune')
        if not own:
            found = named, state
        elif named.resolve().parent == folder.folder.resolve() and state['step'] < found[1]['step']:
            raise UserError(f'--resume {named} is older than {found[0].name} beside it, which would be lost; to branch '
                            'off there give another --output_dir')
    if found is None:
        return None, False
    path, state = found
    state.setdefault('arithmetic', checkpoint.earlier_arithmetic(path, processes.device))
    same = dataclasses.replace(recipe, num_classes=recipe.num_classes or state['recipe']['num_classes'])
    if run.finetune or run.pretrained:
        same = follow_gate(same, run, state['recipe'].get('gate'))
    checkpoint.check_recipe(state, same, path=path, anyway=run.resume_anyway)
    if state['step'] < recipe.total_updates(state['updates_per_epoch']):
        log.info('Continuing from %s: in epoch %d, after %d updates in all.', path, state['epoch'] + 1, state['step'])
    return state, own


def find_initial(recipe: Recipe, run: Run, start: dict[str, Any] | None) -> tuple[Recipe, Weights | None]:
    """The weights of --finetune, unless the run goes on from a checkpoint, and the recipe with the gate they need.

    Raises:
        UserError: where the source cannot be read.
    """
    source = run.finetune
    if run.pretrained and recipes.is_moganet(recipe.model) and 'pretrained_cfg_overlay' not in recipe.model_kwargs:
        source = f'released:{recipe.model}'
    if source is None:
        return recipe, None
    if start is not None:
        return follow_gate(recipe, run, start['recipe'].get('gate')), None
    with utils.rank_zero_first('finetune'):  # it may be a download
        initial = load_weights(source, run.weights, of_backbone=recipe.backbone_weights)
    return follow_gate(recipe, run, initial.gate), initial


def follow_gate(recipe: Recipe, run: Run, gate: str | None) -> Recipe:
    """The recipe with the gate that the weights to fine-tune were trained with, unless the command line gave one."""
    if 'gate' not in recipe.arguments() or 'gate' in run.given or gate in (None, recipe.arguments()['gate']):
        return recipe
    changes: dict[str, Any] = {'gate': gate}
    return dataclasses.replace(recipe, **changes)


def set_grad_checkpointing(model: nn.Module, recipe: Recipe) -> None:
    """Recomputes a model's activations in the backward pass. Raises UserError where the model has no way to it."""
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):
        raise UserError(f'{recipe.model} has no gradient checkpointing; leave --grad_checkpointing out') from None


def prepare_model(task: Task, run: Run, device: torch.device, *, initial: Weights | None = None,
                  pretrained: bool = False) -> nn.Module:
    """The task's model on the device, with its own initial weights or those of `initial` (the head where it fits).

    Raises:
        UserError: for an unknown model, or weights that are not of it.
    """
    recipe = task.recipe
    model = task.build_model(pretrained=pretrained and initial is None)
    if initial is not None:
        log.info('Starting from %s: %s', initial, apply_weights(model, initial, drop_classifier=True))
    task.freeze(model)
    if run.grad_checkpointing:
        set_grad_checkpointing(model, recipe)
    if recipe.sync_bn:
        model = convert_sync_batchnorm(model)
    layout = torch.channels_last if settle_arithmetic(run, device).channels_last else torch.contiguous_format
    return model.to(device, memory_format=layout)


def compile_model(model: nn.Module, device: torch.device) -> None:
    """Has torch compile a model in place, so that its state dict keeps its names.

    On CUDA the whole graph is told to be channels-last: torch 2.13 and 2.14 take the layout of a backward graph from
    the depthwise weights [C, 1, k, k], whose strides fit both layouts, and rewrite each of their gradients and inputs.
    A step of XT with one block a stage has 482 compiled kernels that move 148 MB an image, and 443 and 131 when told.
    What is compiled is kept in the user's cache, in a folder of this node: the folder for temporary files, where torch
    keeps it, is often a job's own, which a preempted job would lose.
    """
    from torch._inductor import config
    os.environ.setdefault('TORCHINDUCTOR_CACHE_DIR', str(cache_folder() / 'inductor' / platform.node()))
    option = 'force_layout_optimization'
    model.compile(**({'options': {option: True}} if device.type == 'cuda' and hasattr(config, option) else {}))


@contextlib.contextmanager
def compile_errors() -> Iterator[None]:
    """Makes one line of what torch.compile raises: at the first call, and not when it is asked to compile."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(('torch._dynamo', 'torch._inductor', 'torch._functorch', 'triton')):
            raise
        reason = str(error).strip().split('\n')[0][:200] or type(error).__name__
        raise UserError(f'--compile: torch cannot compile the model here ({reason}); install a C++ compiler (g++; on a '
                        'GPU Triton too), or leave --compile out') from error


def find_micro_batch(task: Task, run: Run, processes: utils.Processes) -> int:
    """The largest micro-batch that divides the recipe's batch and fits the GPU's memory (`--batch_size auto`)."""
    recipe = task.recipe
    if processes.device.type != 'cuda':
        raise UserError('--batch_size auto measures the memory of a CUDA device; give a number here')
    # The number of classes is not known before the data is, which needs the micro-batch
    teacher, classes = task.teacher, task.teacher.num_classes if task.teacher else 1000
    task = type(task)(dataclasses.replace(recipe, num_classes=recipe.num_classes or classes), run)
    task.teacher = teacher
    model = prepare_model(task, run, processes.device)
    share, rest = divmod(recipe.total_batch_size, run.world_size * (run.update_freq or 1))
    if rest:
        raise UserError(f'a batch of {recipe.total_batch_size} cannot be divided among {run.world_size} processes; '
                        'give --total_batch_size')
    sizes = [size for size in range(share, 0, -1) if share % size == 0]
    size = engine.largest_micro_batch(model, task, sizes, device=processes.device, precision=recipe.precision)
    log.info('--batch_size auto: %d', size)
    return size


def build_step(task: Task, run: Run, processes: utils.Processes, model: nn.Module) -> engine.TrainStep:
    """The training step of a model on its device, with optimizer, scaler and average."""
    recipe = task.recipe
    ema = optim_factory.ModelEma(
        model, decay=recipe.model_ema_decay, warmup=recipe.model_ema_warmup,
        device=torch.device('cpu') if run.model_ema_force_cpu else None) if recipe.model_ema else None
    optimizer = optim_factory.create_optimizer(model, recipe)
    if run.print_param_groups:
        log.info(optim_factory.describe_param_groups(optimizer.param_groups))
    if run.compile:
        compile_model(model, processes.device)
        if run.grad_checkpointing:  # torch before 2.14 cannot split a graph with recomputation in it for DDP
            torch._dynamo.config.optimize_ddp = False
    return engine.TrainStep(
        engine.wrap_distributed(model, processes.device), task, optimizer, device=processes.device,
        precision=recipe.precision, scaler=engine.create_scaler(processes.device, recipe.precision), ema=ema,
        clip_grad=recipe.clip_grad, clip_mode=recipe.clip_mode, update_freq=run.update_freq, seed=recipe.seed,
        rank=processes.rank)


def build_state(task: Task, run: Run, step: engine.TrainStep, *, updates_per_epoch: int,
                start: dict[str, Any] | None, own: bool) -> TrainState:
    """The state of a run, put where `start` was taken.

    Args:
        own: whether `start` is of this run, and not of the one that --resume names.
    """
    state = TrainState(model=step.unwrapped, optimizer=step.optimizer, scaler=step.scaler, ema=step.ema,
                       sums=step.sums.values, skips=step.skips.values, recipe=task.recipe, classes=task.classes,
                       class_map=task.class_map, updates_per_epoch=updates_per_epoch, micro_batch_size=run.batch_size,
                       arithmetic=arithmetic_of(run), sources=task.sources())
    if start is not None:
        checkpoint.check_sources(start, state.sources, anyway=run.resume_anyway)
        state.load_state_dict(start, optimizer=own or not run.no_resume_opt)
    step.warm_up(task.example_batch(run.batch_size, step.device))
    return state
