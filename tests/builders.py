"""What several test files make or read: image folders, data sets in files, loaders, the state and the log of a run."""
import argparse
import dataclasses
import functools
import gzip
import hashlib
import io
import json
import pickle
import signal
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

import datasets
import main
import recipes
import reference
import runs
from models.released import RELEASED, RELEASED_DENSE
from pipeline.sources import Digits
from recipes import Recipe, Run
from tasks import Task, create_task

XT = 'moganet_xtiny'
State = dict[str, Tensor]
TIMINGS = {'images_per_second', 'data_wait'}


# ---- Image folders --------------------------------------------------------------------------------------------------

Draw = Callable[[np.random.Generator, int], Image.Image]


def tinted(rng: np.random.Generator, label: int, size: int = 40) -> Image.Image:
    """Noise with a tint of the class."""
    pixels = rng.integers(0, 128, (size, size, 3)) + np.array([label == c for c in range(3)]) * 127
    return Image.fromarray(pixels.astype(np.uint8))


def smooth(rng: np.random.Generator, _: int) -> Image.Image:
    """A smooth colour picture, wider than high."""
    return Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((64, 48), Image.Resampling.BICUBIC)


def make_image_folder(root: Path, *, classes: int = 3, train: int = 16, val: int = 5, seed: int = 0,
                      draw: Draw = tinted) -> Path:
    """A small image folder: `train` and `val` PNGs in each of the folders class0, class1, ..."""
    rng = np.random.default_rng(seed)
    for split, count in (('train', train), ('val', val)):
        for label in range(classes):
            folder = root / split / f'class{label}'
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                draw(rng, label).save(folder / f'{i}.png')
    return root


def make_digit_folder(root: Path, counts: Sequence[int]) -> Path:
    """scikit-learn's digits as an image folder, of each class so many to train, the first ones; all 360 to test."""
    for split, most in (('train', counts), ('val', [360] * 10)):
        digits = Digits(split)
        for label, count in enumerate(most):
            (root / split / str(label)).mkdir(parents=True)
            for index in np.flatnonzero(digits.labels == label)[:count]:
                Image.fromarray(digits.read(index)[0]).save(root / split / str(label) / f'{index}.png')
    return root


# A MogaNet of four blocks, without its average, that learns digits in seconds
LEARNING = ('--recipe', 'moganet_xtiny_digits', '--data_set', 'image_folder', '--layer_scale_init_value', '0.1',
            '--drop_path', '0', '--model_ema', 'false', '--disable_eval', '--device', 'cpu', '--num_workers', '0',
            '--print_freq', '1000', '--model_kwargs', 'depths=[1,1,1,1]', 'ffn_ratios=[2,2,2,2]')


def class_accuracy(folder: Path, data: Path, dims: str, *flags: str) -> float:
    """Trains that MogaNet of `dims` channels; gives the mean accuracy over the classes, %, at its end."""
    assert main.main([*LEARNING, dims, '--data_path', str(data), '--output_dir', str(folder), *flags]) == 0
    assert main.main(['--eval', '--checkpoint', str(folder / 'checkpoint-last.pth'), '--data_path', str(data),
                      '--device', 'cpu', '--num_workers', '0']) == 0
    return json.loads((folder / 'eval.json').read_text())['mean_class_acc1']


# ---- Images and data sets -------------------------------------------------------------------------------------------

def photo() -> Image.Image:
    """A photograph of 120 x 90 pixels."""
    from skimage import data
    return Image.fromarray(data.astronaut()).resize((120, 90))


def encoded(image: Image.Image | None = None, form: str = 'JPEG', **options: Any) -> bytes:
    """The bytes of an image file; of `photo` by default."""
    buffer = io.BytesIO()
    (photo() if image is None else image).save(buffer, form, **options)
    return buffer.getvalue()


def write(path: Path, content: bytes | None = None) -> None:
    """Writes a file into a folder that may be missing; `photo` as a JPEG by default."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded() if content is None else content)


def tar(members: dict[str, bytes]) -> bytes:
    """The bytes of a tar file of these members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write_meta(path: Path, names: dict[int, str]) -> None:
    """The development kit's meta.mat: classes by their numbers, and one inner node."""
    from scipy.io import savemat
    kind = [('ILSVRC2012_ID', 'f8'), ('WNID', 'O'), ('words', 'O'), ('gloss', 'O'), ('num_children', 'f8')]
    rows = [(number, name, 'word', 'gloss', 0) for number, name in names.items()]
    savemat(path, {'synsets': np.array([*rows, (len(names) + 1, 'n99999999', 'node', 'gloss', 2)], kind)[:, None]})


def write_parquet(root: Path) -> None:
    """A Hugging Face data set of three classes: 40 images to train and 13 to test, two files each."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    features = {'image': {'_type': 'Image'}, 'label': {'names': ['x', 'y', 'z'], '_type': 'ClassLabel'}}
    note = {b'huggingface': json.dumps({'info': {'features': features}}).encode()}
    (root / 'data').mkdir(parents=True)
    for split, count in (('train', 40), ('validation', 13)):
        table = pa.table({'image': [{'bytes': encoded(), 'path': f'{i}.jpg'} for i in range(count)],
                          'label': [i % 3 for i in range(count)]}).replace_schema_metadata(note)
        for part, (start, length) in enumerate(((0, count // 2), (count // 2, count))):
            pq.write_table(table.slice(start, length), root / 'data' / f'{split}-0000{part}-of-00002.parquet')


def write_shards(root: Path, shards: int = 3, *, ending: str = 'jpg', broken: Sequence[tuple[str, int]] = ()) -> None:
    """A WebDataset of three classes: 48 images to train and 13 to test; of those in `broken`, the first 100 bytes."""
    splits = {}
    for split, count in (('train', 48), ('validation', 13)):
        names, lengths = [], []
        for shard in range(shards):
            numbers = range(shard, count, shards)
            members = {f'{i:04d}.{kind}': content for i in numbers for kind, content in (
                (ending, encoded()[:100 if (split, i) in broken else None]), ('cls', str(i % 3).encode()))}
            write(root / f'{split}-{shard}.tar', tar(members))
            names.append(f'{split}-{shard}.tar')
            lengths.append(len(numbers))
        splits[split] = {'name': split, 'num_samples': count, 'filenames': names, 'shard_lengths': lengths}
    (root / '_info.json').write_text(json.dumps({'name': 'made up', 'splits': splits}))


def write_cifar(path: Path, kind: Any, monkeypatch: Any, *, images: int = 8) -> bytes:
    """An archive of CIFAR's official form, `images` in each of its files, and its bytes.

    torchvision opens what has the official checksums; here those of the class become these files' own.

    Args:
        kind: torchvision's CIFAR10 or CIFAR100.
    """
    rng, key = np.random.default_rng(0), 'labels' if kind.meta['key'] == 'label_names' else 'fine_labels'
    members = {name: pickle.dumps({'data': rng.integers(0, 256, (images, 3072), np.uint8),
                                   key: [number % 10 for number in range(images)]})
               for name, _ in (*kind.train_list, *kind.test_list)}
    names = [f'class {number:02d}' for number in range(10 if key == 'labels' else 100)]
    members[kind.meta['filename']] = pickle.dumps({kind.meta['key']: names})
    content = gzip.compress(tar({f'{kind.base_folder}/{name}': member for name, member in members.items()}))
    sums = {name: hashlib.md5(member).hexdigest() for name, member in members.items()}
    for halves in ('train_list', 'test_list'):
        monkeypatch.setattr(kind, halves, [[name, sums[name]] for name, _ in getattr(kind, halves)])
    monkeypatch.setattr(kind, 'meta', kind.meta | {'md5': sums[kind.meta['filename']]})
    monkeypatch.setattr(kind, 'tgz_md5', hashlib.md5(content).hexdigest())
    write(path / kind.filename, content)
    return content


# ---- Boxes, and labels of pixels ------------------------------------------------------------------------------------

COCO_SIZES = [(64, 40), (40, 64), (48, 48)]  # width and height: wider, higher, square


def coco_data(images: int = 9) -> dict[str, Any]:
    """A COCO data set: ids with gaps, a category without boxes, a crowd, every fourth image without boxes."""
    data = {'info': {'year': 2017}, 'images': [], 'annotations': [],
            'categories': [{'id': number, 'name': name} for number, name in ((7, 'dog'), (3, 'cat'), (90, 'none yet'))]}
    for place in range(images):
        width, height = COCO_SIZES[place % 3]
        data['images'].append({'id': 100 + 5 * place, 'file_name': f'{place}.jpg', 'width': width, 'height': height})
        for box in range(place % 4):
            data['annotations'].append({
                'id': 1000 + 3 * len(data['annotations']), 'image_id': 100 + 5 * place, 'category_id': (3, 7)[box % 2],
                'bbox': [2.5 + box, 3, 20, 15.5], 'area': 200.25, 'iscrowd': int((place, box) == (3, 2)),
                'segmentation': [[2.5, 3, 22.5, 3, 22.5, 18.5 + box]]})
    return data


def write_coco(root: Path, data: Any, *, split: str = 'train', missing: int | None = None, **options: Any) -> Path:
    """A data set in COCO's folder, with the pictures 0.jpg, 1.jpg, ... but one; `data` may be text. Gives the JSON."""
    for folder in (root / f'{split}2017', root / 'annotations'):
        folder.mkdir(parents=True, exist_ok=True)
    path = root / 'annotations' / f'instances_{split}2017.json'
    path.write_text(data if isinstance(data, str) else json.dumps(data, **options), encoding='utf-8')
    for place in range(len(data['images']) if isinstance(data, dict) else 0):
        if place != missing:
            width, height = COCO_SIZES[place % 3]
            noise = np.random.default_rng(place).integers(0, 256, (height, width, 3), np.uint8)
            Image.fromarray(noise).save(root / f'{split}2017' / f'{place}.jpg')
    return path


def blocks(seed: int = 0, size: tuple[int, int] = (60, 80), classes: int = 4) -> np.ndarray:
    """Labels 0 to `classes` - 1 in blocks of 10 pixels, uint8."""
    coarse = np.random.default_rng(seed).integers(0, classes, (size[0] // 10, size[1] // 10), np.uint8)
    return coarse.repeat(10, 0).repeat(10, 1)


def write_labelled(root: Path, *, own: bool = True, count: int = 3, classes: int = 4,
                   size: tuple[int, int] = (60, 80)) -> Path:
    """Both halves of a data set, in one's own form or in ADE20K's, whose labels count from 1."""
    for split in (('train', 'val') if own else ('training', 'validation')):
        images, files = root / 'images' / split, root / ('labels' if own else 'annotations') / split
        for folder in (images, files):
            folder.mkdir(parents=True)
        for number in range(count):
            noise = np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)
            Image.fromarray(noise).save(images / f'{number}.jpg')
            Image.fromarray(blocks(number, size, classes) + (0 if own else 1)).save(files / f'{number}.png')
    return root


# ---- Loaders --------------------------------------------------------------------------------------------------------

@dataclass
class Opened(datasets.Loaders):
    """The loaders of a recipe and a run, and their task, which knows the classes."""

    task: Task = None


def open_loaders(recipe: Recipe, run: Run, **others: Any) -> Opened:
    """The loaders of a recipe and a run; `others` as of `datasets.build_loaders`."""
    task = create_task(recipe, run)
    loaders = datasets.build_loaders(task, run, **others)
    return Opened(loaders.train, loaders.val, task=task)


def pairs(batches: Iterable[Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches as pairs of images and targets."""
    return ((batch.images, batch.targets) for batch in batches)


# ---- Checkpoint files, shaped like the released ones ----------------------------------------------------------------

@functools.cache
def seeded(seed: int) -> State:
    """Seeded weights of the smallest MogaNet."""
    return reference.seeded_state_dict(XT, seed)


def timm_file(path: Path, raw: State, ema: State | None, *, metric: Any = 76.5) -> None:
    """A full training checkpoint of timm's script."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    payload = {'epoch': 299, 'arch': XT, 'state_dict': raw, 'optimizer': optimizer.state_dict(), 'version': 2,
               'args': argparse.Namespace(model=XT, lr=1e-3, opt_betas=None, input_size=None, img_size=None, mean=None),
               'amp_scaler': {'scale': 65536.0, 'growth_factor': 2.0}, 'metric': metric}
    torch.save(payload if ema is None else {**payload, 'state_dict_ema': ema}, path)


def timm_file_of_numpy_2(path: Path, raw: State, ema: State | None) -> None:
    timm_file(path, raw, ema, metric=np.float64(76.5))


def timm_file_of_numpy_1(path: Path, raw: State, ema: State | None) -> None:
    """The same with the module name under which NumPy 1 pickled its scalars."""
    buffer = io.BytesIO()
    timm_file(buffer, raw, ema, metric=np.float64(76.5))
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, 'w') as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith('data.pkl'):
                assert data.count(b'numpy._core.multiarray') + data.count(b'numpy.core.multiarray') == 1
                data = data.replace(b'numpy._core.multiarray', b'numpy.core.multiarray')
            new.writestr(entry, data)


def stripped_timm_file(path: Path, raw: State, ema: State | None) -> None:
    torch.save({'arch': XT, 'state_dict': raw, 'metric': 76.5} | ({'state_dict_ema': ema} if ema else {}), path)


def legacy_timm_file(path: Path, raw: State, ema: State | None) -> None:
    """Not a zip, as torch wrote them before 1.6."""
    payload = {'arch': XT, 'state_dict': raw, 'args': argparse.Namespace(model=XT)}
    torch.save(payload if ema is None else {**payload, 'state_dict_ema': ema}, path,
               _use_new_zipfile_serialization=False)


def mmcv_names(state: State) -> State:
    return {name.replace('head.', 'head.fc.') if name.startswith('head.') else f'backbone.{name}': value
            for name, value in state.items()}


def mmcv_file(path: Path, raw: State, ema: State | None, *, config: str = 'attn_force_fp32=True') -> None:
    """OpenMixup's: with EMA the plain names hold the average, and the raw parameters bear names without dots."""
    entries = mmcv_names(raw if ema is None else ema)
    if ema is not None:
        entries |= {f'ema_{name.replace(".", "_")}': value for name, value in mmcv_names(raw).items()}
    config = f"model = dict(\n    backbone=dict(type='MogaNet', {config}),\n    head=dict(type='ClsMixupHead'))\n"
    torch.save({'meta': {'epoch': 300, 'iter': 375300, 'config': config, 'hook_msgs': {}}, 'state_dict': entries}, path)


def deit_file(path: Path, raw: State, ema: State | None) -> None:
    args = argparse.Namespace(model=XT, input_size=224)
    torch.save({'model': raw, 'model_ema': ema, 'epoch': 299, 'args': args}, path)


def bare_file(path: Path, raw: State, ema: State | None) -> None:
    torch.save(raw, path)


def wrapped_file(path: Path, raw: State, ema: State | None) -> None:
    """Saved from inside DistributedDataParallel around a compiled model, whose blocks were compiled too."""
    state = {f'module._orig_mod.{name.replace("blocks1.", "blocks1._orig_mod.")}': value for name, value in raw.items()}
    torch.save(state, path)


def averaged_file(path: Path, raw: State, ema: State | None) -> None:
    """torch's AveragedModel."""
    torch.save({'n_averaged': torch.tensor(10)} | {f'module.{name}': value for name, value in raw.items()}, path)


def safetensors_file(path: Path, raw: State, ema: State | None) -> None:
    safetensors.torch.save_file(raw, path)


def training_file(path: Path, raw: State, ema: State | None) -> None:
    """This project's."""
    recipe = dataclasses.replace(recipes.RECIPES['moganet_xtiny_3aug_256'], crop_pct=0.8)
    values = recipes.to_dict(recipe)
    torch.save({'version': 1, 'model': raw, 'model_ema': ema, 'optimizer': {'state': {}, 'param_groups': []},
                'scaler': {}, 'epoch': 3, 'step': 30, 'best': {'test_acc1': 50.0}, 'recipe': values,
                'classes': [f'class {i}' for i in range(1000)]}, path)


class Payload:
    """Unpickles by calling something."""

    def __init__(self, function: Callable, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple:
        return self.call


def put(cache: Path, name: str, write: Callable, *args: Any, **kwargs: Any) -> Path:
    """Writes a released file into the cache, where a download would have put it."""
    path = cache / (RELEASED | RELEASED_DENSE)[name].url.rsplit('/', 1)[1]
    write(path, *args, **kwargs)
    return path


# ---- A run's folder -------------------------------------------------------------------------------------------------

def differences(a: object, b: object, path: str = '') -> list[str]:
    """Where two nested states differ, bit for bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) and a.dtype == b.dtype else [path]
    if isinstance(a, dict):
        return [path] if a.keys() != b.keys() else [
            found for key in a for found in differences(a[key], b[key], f'{path}/{key}')]
    if isinstance(a, (list, tuple)):
        return [path] if len(a) != len(b) else [
            found for i, (x, y) in enumerate(zip(a, b, strict=True)) for found in differences(x, y, f'{path}/{i}')]
    return [] if a == b else [path]


def state_of(folder: Path, name: str = 'last') -> dict[str, Any]:
    """A checkpoint of a run."""
    return torch.load(folder / f'checkpoint-{name}.pth', weights_only=True)


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The entries of a run's log.txt."""
    return [json.loads(line) for line in (folder / 'log.txt').read_text().splitlines()]


def untimed_log(folder: Path) -> list[dict[str, Any]]:
    """The entries of a run's log.txt but for the timings, which no two runs share."""
    return [{key: value for key, value in entry.items() if key not in TIMINGS} for entry in log_of(folder)]


def assert_same_run(folder: Path, other: Path) -> None:
    """Weights, average, optimizer, scaler, position, best, and log (but for timings) are equal bit for bit."""
    for name in ('last', 'best', 'best-ema'):
        assert differences(state_of(folder, name), state_of(other, name)) == []
    assert untimed_log(folder) == untimed_log(other)
    assert not list(folder.glob('.*.part'))


def run_whole_and_interrupted(words: tuple[str, ...], folder: Path, *, world_size: int) -> tuple[Path, Path]:
    """Runs `main.py` once without a stop, and once stopped by SIGTERM after update 1 and killed after update 3.

    The last rank has the signals. Returns the two runs' folders.
    """
    whole, parts = folder / 'whole', folder / 'parts'
    runs.run((*words, '--output_dir', str(whole)), folder / 'whole.txt', world_size=world_size)
    for number, update in ((signal.SIGTERM, 1), (signal.SIGKILL, 3)):
        stop = f'''
import os
def observe(state):
    if state.step == {update} and rank == {world_size - 1}:
        os.kill(os.getpid(), {int(number)})
'''
        job = runs.start((*words, '--output_dir', str(parts), '--save_ckpt_steps', '1'), folder / f'{update}.txt',
                         world_size=world_size, before=stop)
        if number == signal.SIGKILL:
            job.ranks[-1].join(timeout=120)
            job.kill()
        statuses = job.wait()
        if number == signal.SIGTERM:
            assert statuses == [128 + number] * world_size, job.text()
            assert state_of(parts)['step'] in (update, update + 1)  # several ranks agree an update later
    runs.run((*words, '--output_dir', str(parts)), folder / 'rest.txt', world_size=world_size)
    return whole, parts
