"""What every task's recipe has (all that can change accuracy), and the run (where and how); bounds beside each field.

Every flag is generated from a field. Nothing in this package imports torch, so that `--help`, `--list_recipes` and a
misspelt flag answer at once.
"""
import dataclasses
import importlib.util
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple

from utils import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The 15 corruptions of ImageNet-C (arXiv 1903.12261), in its order; the authors' four further ones count nowhere
Corruption = Literal[
    'gaussian_noise', 'shot_noise', 'impulse_noise', 'defocus_blur', 'glass_blur', 'motion_blur', 'zoom_blur', 'snow',
    'frost', 'fog', 'brightness', 'contrast', 'elastic_transform', 'pixelate', 'jpeg_compression']
UNIONS = (types.UnionType, typing.Union)  # int | None, and what typing makes of int | Literal['auto'] | None


class Bound(NamedTuple):
    """What a field's value must satisfy, and the end of the line that refuses it."""

    holds: Callable[[Any], bool]
    refusal: str


RATE = Bound(lambda value: 0 <= value <= 1, ' {value} is not a rate: give a value from 0 to 1')
BELOW_ONE = Bound(lambda value: value < 1, ' 1 leaves nothing: give a value below 1')
NOT_NEGATIVE = Bound(lambda value: value >= 0, ' {value} is negative')
POSITIVE = Bound(lambda value: value > 0, ' {value}: give a value above 0')
COUNT = Bound(lambda value: value > 0, ' {value}: give a whole number above 0')
MICRO_BATCH = Bound(lambda value: value == 'auto' or value > 0, ' {value}: give at least 1')


if typing.TYPE_CHECKING:
    MicroBatch = int  # what `fit_batch`, and for auto a trial, have made of it before it is reckoned with
else:
    MicroBatch = int | Literal['auto']

MADE_UP = ('digits', 'fake', 'digits_coco', 'digits_ade')  # data sets that read no --data_path


class DataSet(NamedTuple):
    """The data set that a task's published rows were trained on."""

    name: str
    classes: int
    images: int  # to train on
    gigabytes: float  # of all its files, 1e9 bytes
    benchmark: str = ''  # the subject of benchmarks/*.json that says how many images a second one core prepares


def doc(default: Any, text: str, *bounds: Bound, flag: bool = True, path: bool = False) -> Any:
    """A dataclass field: its default, the line that documents it, its bounds, and whether the command line may set it.

    None, where a field may be None, is within all bounds.

    Args:
        path: whether it names a file or a folder, or several, in which `~` stands for the home folder.
    """
    metadata = {'help': text, 'flag': flag, 'bounds': bounds, 'path': path}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check(holds: bool, message: str) -> None:
    """Refuses what cannot be meant. Raises UserError with the message, which names the flag."""
    if not holds:
        raise UserError(message)


def check_bounds(values: Any) -> None:
    """Refuses a recipe or a run with a field outside its bounds. Raises UserError that names the flag."""
    for field in fields(values):
        value = getattr(values, field.name)
        for bound in field.metadata['bounds'] if value is not None else ():
            check(bound.holds(value), f'--{field.name}{bound.refusal.format(value=value)}')


@dataclass(frozen=True)
class Recipe:
    """All that can change the accuracy of a run. Two runs of one recipe differ by round-off and hardware only.

    A task has a subclass with its own fields.
    """

    task: ClassVar[str] = ''  # the class of the task, as `module:Class`
    metrics: ClassVar[dict[str, tuple[str, str]]] = {}  # by column of the log: name and unit for people
    best: ClassVar[str] = ''  # the metric that decides which checkpoint is the best; higher is better
    published_data: ClassVar[DataSet | None] = None  # of the rows with a published value
    # Fields that change no result: they say where a row comes from, or were applied when the row was resolved
    descriptive: ClassVar[tuple[str, ...]] = ('name', 'source', 'hardware', 'micro_batch_size', 'scale_lr')
    # Fields that name a file, which may move: a resumed run goes by the checksum of its content, in the checkpoint
    by_content: ClassVar[tuple[str, ...]] = ()
    # What a checkpoint's state depends on, so that a run cannot be resumed with other values
    fixed: ClassVar[tuple[str, ...]] = ('model', 'model_kwargs', 'num_classes', 'opt', 'layer_decay', 'param_groups',
                                        'freeze_stages', 'total_batch_size')
    # Whether synchronised batch norms, which exist on CUDA alone, may be plain ones elsewhere
    plain_bn_without_cuda: ClassVar[bool] = False
    # The weights of a classifier's file from which a model starts that has the classifier as its backbone
    backbone_weights: ClassVar[Literal['raw', 'ema'] | None] = None

    # Where the row comes from
    name: str = doc('', 'name of the row', flag=False)
    source: str = doc('', 'where its values and its accuracy were published', flag=False)
    hardware: str = doc('8 GPUs', 'what it was trained on', flag=False)
    micro_batch_size: int = doc(128, 'images per GPU and micro-step on that hardware', flag=False)

    # Model
    model: str = doc('moganet_small', 'model name, one of timm.list_models()')
    num_classes: int | None = doc(None, 'classes of the head; found from the data set where not given', POSITIVE)
    drop_path: float = doc(0.1, 'stochastic depth rate of the last block; rises linearly from 0', RATE, BELOW_ONE)
    model_kwargs: dict[str, Any] = doc({}, 'further arguments of the model, as name=value ...')

    # Data
    data_set: str = doc('image_folder', "image_folder, digits, fake, or a name of timm's create_dataset, as hfds/...")
    repeated_aug: int = doc(1, 'augmented copies of one image in an epoch (DeiT: 3); 1 is none', POSITIVE)
    on_bad_image: Literal['stop', 'skip'] = doc('stop', 'at an unreadable training image: stop, or take another and '
                                                        'count it')
    mean: tuple[float, float, float] = doc(IMAGENET_MEAN, 'mean of the normalisation, of values in 0..1')
    std: tuple[float, float, float] = doc(IMAGENET_STD, 'standard deviation of the normalisation')

    # Fine-tuning
    freeze_stages: int = doc(0, 'keep the stem and the first N stages as they are, BN statistics included',
                             NOT_NEGATIVE)

    # Optimisation
    epochs: int | None = doc(300, 'passes over the training set', POSITIVE)
    updates: int | None = doc(None, 'length of the run in updates, instead of --epochs', COUNT)
    total_batch_size: int = doc(1024, 'images per update, over all GPUs and micro-steps', POSITIVE)
    opt: Literal['adamw', 'lamb', 'sgd'] = doc('adamw', 'optimizer')
    opt_eps: float = doc(1e-8, 'epsilon of AdamW and LAMB', NOT_NEGATIVE)
    opt_betas: tuple[float, float] = doc((0.9, 0.999), 'betas of AdamW and LAMB')
    momentum: float = doc(0.9, 'momentum of SGD', RATE, BELOW_ONE)
    param_groups: Literal['ours', 'authors', 'authors_layers', 'all'] = doc(
        'ours', 'rule by which parameters share a learning rate and a weight decay (optim_factory.RULES); the others '
                "are of the authors' dense models", flag=False)
    lr: float = doc(1e-3, 'peak learning rate', NOT_NEGATIVE)
    scale_lr: bool = doc(False, "scale lr and min_lr linearly from the row's total batch to the one given")
    min_lr: float = doc(1e-5, 'learning rate of the last update; step does not go below it', NOT_NEGATIVE)
    sched: Literal['cosine', 'step', 'poly'] = doc('cosine', 'course of the learning rate after the warm-up')
    milestones: tuple[float, ...] = doc((), 'step: the epochs, or in a run of --updates the updates, after which the '
                                            'rate falls')
    gamma: float = doc(0.1, 'step: factor of the rate at each milestone', POSITIVE)
    power: float = doc(1.0, 'poly: exponent of the remaining share of the run', POSITIVE)
    warmup_epochs: float = doc(5, 'epochs of linear warm-up', NOT_NEGATIVE)
    warmup_steps: int | None = doc(None, 'updates of linear warm-up, instead of --warmup_epochs', NOT_NEGATIVE)
    warmup_ratio: float | None = doc(None, 'rate of the first update as a share of the one that the schedule has '
                                           'there; one warm-up step of the peak where not given', RATE)
    weight_decay: float = doc(0.05, 'weight decay; none on biases, norms, layer scales', NOT_NEGATIVE)
    weight_decay_end: float | None = doc(None, 'weight decay of the last update, reached on a cosine', NOT_NEGATIVE)
    layer_decay: float = doc(1.0, 'factor of the learning rate from one group of layers to the one below; 1 is none',
                             POSITIVE)
    clip_grad: float | None = doc(None, 'bound of gradient clipping; none is off', POSITIVE)
    clip_mode: Literal['norm', 'value', 'agc'] = doc('norm', 'clip by global norm, by value, or adaptively')
    precision: Literal['fp32', 'fp16', 'bf16'] = doc('fp32', 'fp32, or automatic mixed precision in fp16 or bf16')
    seed: int = doc(0, 'seed from which all randomness is derived')

    # Batch norm and averaging
    model_ema: bool = doc(True, 'keep an exponential moving average of the model')
    model_ema_decay: float = doc(0.9999, 'decay of the average, per update', RATE, BELOW_ONE)
    model_ema_warmup: bool = doc(False, 'let the decay rise as (1 + t) / (10 + t) at the beginning')
    dist_bn: Literal['reduce', 'broadcast', 'none'] = doc('reduce', 'before evaluating and saving, give all ranks the '
                                                                    "mean of their BN statistics, or rank 0's")
    sync_bn: bool = doc(False, 'BN statistics of the batch over all ranks')
    precise_bn: int = doc(0, 're-estimate the BN statistics on so many training images before evaluating',
                          NOT_NEGATIVE)

    def check(self) -> None:
        """Refuses values that cannot be meant. Raises UserError that names the flag."""
        check_bounds(self)
        check((self.epochs is None) != (self.updates is None),
              '--epochs and --updates both give the length of the run; give one, and none for the other')
        check(self.layer_decay <= 1, f'--layer_decay {self.layer_decay} speeds up lower layers: give at most 1')
        check(self.min_lr <= self.lr, f'--min_lr {self.min_lr} is above --lr {self.lr}')
        check(self.warmup_steps is not None or self.epochs is None or self.warmup_epochs <= self.epochs,
              f'--warmup_epochs {self.warmup_epochs:g} is longer than the run: give at most its {self.epochs} epochs')
        check(all(value > 0 for value in self.std), f'--std {self.std}: give values above 0')
        check(all(0 <= beta < 1 for beta in self.opt_betas), f'--opt_betas {self.opt_betas}: give values in [0, 1)')
        check(self.clip_grad is not None or self.clip_mode == 'norm', '--clip_mode needs --clip_grad')
        check((self.sched == 'step') == bool(self.milestones),
              '--milestones go with --sched step: give both or neither')
        check(self.sched == 'step' or self.gamma == Recipe.gamma, '--gamma goes with --sched step')
        check(self.sched == 'poly' or self.power == Recipe.power, '--power goes with --sched poly')
        check(list(self.milestones) == sorted(self.milestones) and all(self.milestones),
              f'--milestones {self.milestones}: give rising numbers above 0')

    def check_run(self, run: 'Run') -> None:
        """Refuses a way to run that this task cannot take. Raises UserError that names the flag."""
        for name in ('train_json', 'val_json', 'image_dir', 'save_predictions'):
            check(getattr(run, name) is None, f'--{name} is for detectors, and {self.name or self.model} is no '
                                              'detector; leave it out')

    def expected(self) -> dict[str, float | None]:
        """The published values of the row by metric, None where none was published."""
        return {}

    def gpus(self) -> int:
        """The number of GPUs that the row was trained on; 1 for what is at home on a CPU."""
        return int(self.hardware.split()[0]) if 'GPU' in self.hardware else 1

    def settings(self) -> dict[str, Any]:
        """How the model and its images are prepared for a test, as eval.json holds it."""
        return {}

    def arguments(self) -> dict[str, Any]:
        """The arguments of the model's constructor, beside its classes and `model_kwargs`."""
        # Many timm models have no drop path; a rate of 0 is not passed on
        return {'drop_path_rate': self.drop_path or None}

    def freezes(self) -> bool:
        """Whether a part of the model keeps the weights that it starts from."""
        return self.freeze_stages > 0

    def check_micro_batch(self, size: int) -> None:
        """Refuses a micro-batch for which the model is not defined. Raises UserError."""

    def total_updates(self, updates_per_epoch: int) -> int:
        """The length of the run in updates."""
        return self.updates or self.epochs * updates_per_epoch

    def length(self) -> str:
        """The length of the run, for people."""
        return f'{self.epochs} epochs' if self.updates is None else f'{self.updates:,} updates'

    def cells(self) -> dict[str, str]:
        """The row in the table of recipes, by column."""
        expected = ', '.join(f'{self.metrics[name][0]} {value:.1f}' for name, value in self.expected().items() if value)
        return {'recipe': self.name, 'length': self.length(), 'batch': str(self.total_batch_size), 'opt': self.opt,
                'lr': f'{self.lr:g}', 'decay': f'{self.weight_decay:g}', 'drop path': f'{self.drop_path:g}',
                'EMA': f'{self.model_ema_decay:g}' if self.model_ema else '-', 'precision': self.precision,
                'published': expected or '-'}

    def useless(self, model: str) -> list[str]:
        """The fields that do nothing for a model."""
        return []


@dataclass(frozen=True)
class Run:
    """Where and how a recipe is run. Nothing here is meant to change the accuracy."""

    # Files
    data_path: str = doc('data/ImageNet', 'folder with train/ and val/, or the root the data set needs', path=True)
    eval_data_path: str | None = doc(None, 'folder of the test images, where it is not under --data_path',
                                     path=True)
    train_json: str | None = doc(None, "COCO JSON of the training images, where it is not COCO's in --data_path",
                                 path=True)
    val_json: str | None = doc(None, "COCO JSON of the test images, where it is not COCO's in --data_path", path=True)
    image_dir: str | None = doc(None, "folder of the images that --train_json and --val_json name; the JSON's own by "
                                      'default', path=True)
    download: bool = doc(False, "fetch a --data_set torch/NAME into --data_path, from its authors' server, where it is "
                                'not there yet')
    class_map: str | None = doc(None, "file that maps class names to indices (timm's class map)", path=True)
    output_dir: str = doc('', "the run's folder; runs/<recipe> by default", path=True)
    log_dir: str | None = doc(None, "TensorBoard's folder; <output_dir>/tensorboard by default", path=True)

    # Processes, device, batch
    device: str = doc('auto', "'auto', 'cuda', 'mps' or 'cpu'")
    batch_size: MicroBatch | None = doc(None, 'micro-batch: images per process and micro-step; auto (CUDA) '
                                                         'finds the largest that fits', MICRO_BATCH)
    update_freq: int | None = doc(None, 'micro-steps per update; derived where not given', COUNT)
    world_size: int = doc(1, 'number of processes, from the launcher', flag=False)
    given: tuple[str, ...] = doc((), 'fields of the recipe that the command line gave', flag=False)
    num_workers: int | None = doc(None, 'data-loading processes per rank; the cores of a rank, at most 10, by default',
                                  NOT_NEGATIVE)
    pin_mem: bool = doc(True, 'load into pinned memory (CUDA)')
    compile: bool = doc(False, 'torch.compile the model')
    channels_last: bool | None = doc(None, 'memory layout; by default channels-last on CUDA and the CPU, and in a '
                                           'resumed run as it was')
    grad_checkpointing: bool = doc(False, 'recompute activations in the backward pass to save memory')
    deterministic: bool = doc(False, 'deterministic CUDA kernels: two runs are bit-identical, and slower')
    tf32: bool | None = doc(None, 'TensorFloat-32 in float32 matrix products and convolutions; by default where the '
                                  'device has it (CUDA from Ampere on), and in a resumed run as it was')
    model_ema_force_cpu: bool = doc(False, 'keep the moving average on the CPU')

    # Starting
    finetune: str | None = doc(None, 'checkpoint whose weights the model starts from', path=True)
    pretrained: bool = doc(False, "start from timm's pretrained weights of the model")
    resume: str | None = doc(None, 'training checkpoint to continue from', path=True)
    auto_resume: bool = doc(True, "continue from the newest valid checkpoint of the run's folder")
    resume_anyway: bool = doc(False, 'resume although the recipe differs')
    no_resume_opt: bool = doc(False, 'with --resume: take the weights and the position, not the optimizer')

    # Saving and stopping
    save_ckpt: bool = doc(True, 'save checkpoints')
    save_ckpt_freq: int = doc(1, 'epochs between checkpoints', COUNT)
    save_ckpt_steps: int | None = doc(None, 'updates between further checkpoints inside an epoch', COUNT)
    save_ckpt_num: int = doc(3, 'checkpoints to keep beside the best', COUNT)
    stop_signals: tuple[Literal['TERM', 'INT', 'HUP', 'USR1', 'USR2'], ...] = doc(
        ('TERM', 'INT', 'HUP', 'USR1', 'USR2'), 'signals on which the run saves and stops; all others keep their '
                                                'usual effect')
    max_skips: int = doc(50, 'updates that the fp16 scaler may skip in a row before the run is stopped', COUNT)
    on_nan: Literal['stop', 'rollback'] = doc('stop', 'at a NaN: stop, or go back to the last checkpoint with another '
                                                      'data order, at most 3 times')

    # Evaluating
    eval: bool = doc(False, 'evaluate --checkpoint and exit')
    checkpoint: tuple[str, ...] = doc((), 'checkpoints to evaluate', path=True)
    weights: Literal['auto', 'raw', 'ema'] = doc('auto', 'weights of a checkpoint: auto takes its average where it '
                                                         'has one')
    valid_labels: str | None = doc(None, "file of the model's classes that the test set has, one index a line, in the "
                                         'order of its labels', path=True)
    real_labels: str | None = doc(None, 'JSON of the reassessed labels of the ImageNet test images (ReaL)', path=True)
    suite: str | None = doc(None, 'folder of ImageNet sets to evaluate on, each by its usual name: val, V2, A, R, '
                                  'Sketch, C', path=True)
    corruptions: tuple[Literal[Corruption, 'all'], ...] = doc(
        (), 'with --suite: evaluate val under these corruptions too, made on the fly at five severities')
    corruption: tuple[str, int] | None = doc(None, 'corruption of the test crops, and its severity', flag=False)
    test_sizes: tuple[int, ...] = doc((), 'the test sizes, where --test_size gives several', flag=False)
    tta: Literal['hflip'] | None = doc(None, 'evaluate the mean of the logits of an image and of its mirror image')
    knn: int | None = doc(None, 'classify by so many nearest training images, in the features before the classifier, '
                                'in place of the classifier', COUNT)
    throughput: bool = doc(False, 'measure the images/s of the model alone too')
    results_file: str | None = doc(None, 'CSV file to which the results are appended', path=True)
    save_predictions: str | None = doc(None, "JSON file for what a detector finds in the test images, in COCO's form",
                                       path=True)
    val_batch_size: int | None = doc(None, 'images per process in an evaluation; by default 1.5 micro-batches', COUNT)
    val_interval: int = doc(1, 'epochs between evaluations', COUNT)
    val_steps: int | None = doc(None, 'updates between evaluations, instead of --val_interval', COUNT)
    disable_eval: bool = doc(False, 'do not evaluate while training')
    model_ema_eval: bool = doc(True, 'evaluate the moving average beside the raw weights')

    # Planning
    plan: bool = doc(False, 'print what the run will cost, counted without a GPU and without images, and exit')
    card: Literal['h100', 'a100', 'v100', '4090'] | None = doc(None, '--plan: the card; by default all four')
    gpus: int | None = doc(None, "--plan: the number of GPUs; by default that of the recipe's hardware", COUNT)
    price: float | None = doc(None, '--plan: what one GPU costs an hour, in any currency', NOT_NEGATIVE)

    # Reporting
    print_freq: int = doc(50, 'updates between log lines, and between checks for NaN', COUNT)
    print_param_groups: bool = doc(False, "print the optimizer's parameter groups")
    wandb: bool = doc(False, 'show the run on Weights & Biases too; an interruption may cost its last seconds there')
    project: str = doc('moganet', 'project on Weights & Biases')
    wandb_ckpt: bool = doc(False, 'upload the best checkpoints there when the run is complete')

    def check(self) -> None:
        """Refuses values that cannot be meant. Raises UserError that names the flag."""
        check_bounds(self)
        for name in ('valid_labels', 'real_labels', 'suite', 'tta', 'knn', 'throughput', 'results_file'):
            check(self.eval or not getattr(self, name), f'--{name} goes with --eval')
        for name in ('data_path', 'eval_data_path', 'class_map'):
            check(not self.suite or getattr(self, name) == getattr(Run, name),
                  f'--suite knows its sets; leave --{name} out')
        for name in ('suite', 'valid_labels', 'compile'):
            check(self.knn is None or not getattr(self, name),
                  f'--knn compares the features of training and test images of --data_path; leave --{name} out')
        check(all(size > 0 for size in self.test_sizes), f'--test_size {self.test_sizes}: give values above 0')
        check(self.suite is not None or not self.corruptions, '--corruptions go with --suite FOLDER')
        check('all' not in self.corruptions or len(self.corruptions) == 1,
              '--corruptions all includes every corruption; leave the others out')
        check(not (self.eval and not self.checkpoint and not self.pretrained),
              'there is nothing to evaluate: say --checkpoint FILE')
        check(not (self.checkpoint and self.pretrained),
              '--checkpoint and --pretrained both name the weights; give one')
        check(not (self.eval and self.batch_size == 'auto'), '--batch_size auto is for training; give --val_batch_size')
        check(self.eval or not self.checkpoint, '--checkpoint goes with --eval; to continue a run say --resume, '
                                                'to start from its weights --finetune')
        check(not (self.finetune and self.pretrained),
              '--finetune and --pretrained both name the initial weights; give one')
        for name in ('resume', 'finetune'):
            check(not (self.eval and getattr(self, name)),
                  f'--{name} is for training; what to evaluate is --checkpoint FILE')
        check(self.eval or self.finetune is not None or self.pretrained or self.weights == 'auto',
              '--weights chooses from a file: it goes with --eval, --finetune FILE or --pretrained')
        check(self.resume is not None or not self.no_resume_opt, '--no_resume_opt goes with --resume FILE')
        for name in ('card', 'gpus', 'price'):
            check(self.plan or getattr(self, name) is None, f'--{name} goes with --plan')
        check(not (self.plan and self.eval), '--plan says what a training costs; leave --eval out')
        check(not (self.plan and self.world_size > 1),
              '--plan needs no GPU and no second process: start it by python main.py, and say --gpus N')
        check(not (self.plan and self.batch_size == 'auto'),
              '--batch_size auto tries a GPU; leave it out, and --plan says which micro-batch fits which card')
        check(self.val_steps is None or self.val_interval == 1,
              '--val_steps and --val_interval both say when to evaluate; give one')
        check(not (self.wandb and self.eval), '--wandb shows a training; leave it out with --eval')
        check(self.wandb or self.project == Run.project, '--project goes with --wandb')
        check(self.wandb or not self.wandb_ckpt, '--wandb_ckpt goes with --wandb')
        check(not self.wandb_ckpt or (self.save_ckpt and not self.disable_eval),
              '--wandb_ckpt uploads the best checkpoints; leave out --save_ckpt false and --disable_eval')
        # A folder `wandb`, such as the package leaves behind, passes for a package without origin
        check(not self.wandb or getattr(importlib.util.find_spec('wandb'), 'origin', None) is not None,
              '--wandb needs its package: pip install wandb')
