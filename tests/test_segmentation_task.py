"""Segmentation from end to end: a made-up set in ADE20K's form, trained, interrupted, evaluated, told and drawn."""
import csv
import io
import itertools
import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dense_reference
import main
import predict
import recipes
import runs
from builders import differences, log_of, put, run_whole_and_interrupted, state_of
from models.released import RELEASED_DENSE
from models.segmentation import IGNORED
from pipeline import ade20k_classes, digits_coco
from pipeline.dense import normalise_padded
from recipes import RECIPES, Run
from tasks import pictures
from tasks.segmentation import colors_of, count_pixels, summarise
from tools import export
from training.evaluation import load_task
from utils import UserError

pytestmark = pytest.mark.usefixtures('one_thread', 'own_cache')

ROW = 'semantic_fpn_moganet_digits'
XT = {'fpn': 'semantic_fpn_moganet_xtiny_80k', 'upernet': 'upernet_moganet_xtiny_160k'}
FILES = {'fpn': 'fpn_moganet_xtiny_80k_ade20k', 'upernet': 'upernet_moganet_xtiny_512x512_160k_ade20k'}
NETWORK = ('--model_kwargs', 'dims=[8,8,16,16]', 'depths=[1,1,1,1]', 'ffn_ratios=[2,2,2,2]')
WIDTHS = ('--network_kwargs', 'channels=16', 'head_channels=16')
SMALL = ('--recipe', ROW, '--data_set', 'ade20k', *NETWORK, '--image_scale', '96', '96', '--crop_size', '64',
         '--device', 'cpu', '--warmup_steps', '2')
# 6 updates an epoch, of which each accumulates two micro-batches on one process
WORDS = (*SMALL, *WIDTHS, '--num_workers', '1', '--epochs', '2', '--total_batch_size', '4', '--model_ema_decay', '0.9',
         '--print_freq', '2')


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    """26 images to train and 9 to test, with their classes named."""
    folder = tmp_path_factory.mktemp('digits')
    digits_coco.write(folder, train=26, val=9)
    (folder / 'classes.txt').write_text('\n'.join(digits_coco.LABELS[1:]))
    return folder


@pytest.fixture(scope='module')
def words(data) -> tuple[str, ...]:
    return (*WORDS, '--data_path', str(data))


@pytest.fixture(scope='module')
def trained(words, tmp_path_factory) -> Path:
    """A whole run of two epochs on one process; what it printed is beside it."""
    folder = tmp_path_factory.mktemp('segmentor') / 'run'
    runs.run((*words, '--batch_size', '2', '--output_dir', str(folder)), folder.with_suffix('.txt'))
    return folder


@pytest.fixture(scope='module')
def unsure(trained, tmp_path_factory) -> Path:
    """The trained segmentor with weights by which it finds several classes."""
    state = torch.load(trained / 'checkpoint-last.pth', weights_only=True)
    torch.manual_seed(0)
    for name in ('weight', 'bias'):
        value = state['model_ema'][f'decode_head.conv_seg.{name}']
        state['model_ema'][f'decode_head.conv_seg.{name}'] = torch.randn_like(value)
    path = tmp_path_factory.mktemp('unsure') / 'file.pth'
    torch.save(state, path)
    return path


# ---- Training -------------------------------------------------------------------------------------------------------

def test_the_best_is_chosen_by_the_mean_iou_and_the_classes_are_the_folders(trained):
    log = log_of(trained)
    assert len(log) == 2 and log[-1]['step'] == 12
    assert log[-1]['train_loss'] < log[0]['train_loss'] and 'train_decode' not in log[0]  # one loss has no parts
    assert {f'test_{name}{of}' for name in ('miou', 'macc', 'pixel_acc') for of in ('', '_ema')} <= log[-1].keys()
    assert state_of(trained)['best']['test_miou'] == max(entry['test_miou'] for entry in log)
    text = trained.with_suffix('.txt').read_text()
    assert 'mIoU' in text and 'best miou' in text
    assert state_of(trained)['classes'] == list(digits_coco.LABELS[1:])
    saved = json.loads((trained / 'recipe.json').read_text())
    assert saved['task'] == 'tasks.segmentation:Segmentation' and recipes.from_dict(saved).crop_size == 64


@pytest.mark.parametrize('world_size', [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_and_killed_at_any_update_ends_with_the_same_bits(world_size, words, tmp_path):
    batch = {1: ('--batch_size', '2'), 2: (), 3: ('--total_batch_size', '6')}[world_size]
    # UPerNet, which has two losses, and a length in updates, in the middle of an interval of evaluations
    upernet = ('--recipe', 'upernet_moganet_xtiny_160k', *NETWORK, '--network_kwargs', 'channels=16',
               'auxiliary_channels=16', '--warmup_steps', '2', '--epochs', 'none', '--updates', '5', '--val_steps', '4',
               '--lr', '1e-3')
    words = (*words, *upernet, *batch, '--print_freq', '1')
    whole, parts = run_whole_and_interrupted(words, tmp_path, world_size=world_size)
    assert state_of(parts)['step'] == 5
    assert differences(state_of(whole), state_of(parts)) == []
    logs = [[{name: value for name, value in entry.items() if 'second' not in name and 'wait' not in name}
             for entry in log_of(folder)] for folder in (whole, parts)]
    assert logs[0] == logs[1]
    assert logs[0][0]['train_decode'] + logs[0][0]['train_aux'] == pytest.approx(logs[0][0]['train_loss'], rel=1e-6)


# ---- Evaluation -----------------------------------------------------------------------------------------------------

def evaluate(checkpoint: Path, data: Path, folder: Path, *flags: str, world_size: int = 1) -> dict[str, object]:
    """What eval.json holds."""
    runs.run(('--eval', '--recipe', ROW, '--data_set', 'ade20k', '--checkpoint', str(checkpoint), '--device', 'cpu',
              '--data_path', str(data), '--num_workers', '0', '--output_dir', str(folder), *flags),
             folder.with_suffix('.txt'), world_size=world_size)
    return json.loads((folder / 'eval.json').read_text())


def test_an_evaluation_is_equal_on_one_two_and_three_processes_and_writes_a_table(unsure, data, tmp_path):
    results = [evaluate(unsure, data, tmp_path / f'{world_size}', world_size=world_size) for world_size in (1, 2, 3)]
    names = ('miou', 'macc', 'pixel_acc', 'count')
    first, *others = ([result[name] for name in names] for result in results)
    assert first[-1] == 9 and all(other == first for other in others)  # whole numbers, added up
    assert len({(tmp_path / f'{size}' / 'eval-classes.csv').read_text() for size in (1, 2, 3)}) == 1
    rows = list(csv.DictReader((tmp_path / '1' / 'eval-classes.csv').open()))
    assert [row['name'] for row in rows] == list(digits_coco.LABELS[1:])
    labels = [np.array(Image.open(path)) for path in sorted((data / 'annotations' / 'validation').iterdir())]
    assert sum(int(row['pixels']) for row in rows) == sum(int((label > 0).sum()) for label in labels)
    shares = [float(row['iou']) for row in rows if row['iou']]
    assert np.mean(shares) == pytest.approx(first[0], rel=1e-12) and first[0] > 0


def test_several_checkpoints_have_their_classes_in_one_table(unsure, data, tmp_path):
    evaluate(unsure, data, tmp_path / 'one')
    evaluate(unsure, data, tmp_path / 'two', '--checkpoint', str(unsure), str(unsure))
    one, two = (list(csv.DictReader((tmp_path / name / 'eval-classes.csv').open())) for name in ('one', 'two'))
    assert two == one + one and len(one) == 11


def test_precise_batch_norms_are_those_of_the_training_in_both_heads(data, tmp_path):
    """One image at a time, as in a test, the pyramid pooling has one value a channel, of which a norm has no variance.
    """
    words = ['--recipe', XT['upernet'], *SMALL[2:], '--network_kwargs', 'channels=8', 'auxiliary_channels=8',
             '--data_path', str(data), '--num_workers', '0', '--batch_size', '2', '--total_batch_size', '2',
             '--updates', '1', '--warmup_steps', '0', '--warmup_ratio', 'none', '--val_steps', '1', '--precise_bn', '4',
             '--output_dir', str(tmp_path / 'run')]
    assert main.main(words) == 0
    state = state_of(tmp_path / 'run')['model']
    for name in ('decode_head.psp_modules.0.1', 'auxiliary_head.convs.0'):
        mean, variance = (state[f'{name}.bn.{kind}'] for kind in ('running_mean', 'running_var'))
        assert mean.abs().min() > 0 and not (variance == 1).any()  # 0 and 1 are those of a norm that saw nothing


def test_each_way_to_test_gives_another_result(unsure, data, tmp_path):
    ways = {'plain': (), 'aligned': ('--align_resize', 'false'), 'slide': ('--test_mode', 'slide'),
            'flip': ('--test_flip', 'true'), 'scales': ('--test_scales', '0.75', '1.5')}
    results = {name: evaluate(unsure, data, tmp_path / name, *flags) for name, flags in ways.items()}
    for a, b in itertools.combinations(results, 2):
        tables = [(tmp_path / name / 'eval-classes.csv').read_text() for name in (a, b)]
        assert tables[0] != tables[1] and results[a]['macc'] != results[b]['macc'], (a, b)
    assert results['slide']['test_mode'] == 'slide' and results['scales']['test_scales'] == [0.75, 1.5]


def test_the_counted_pixels_give_the_recorded_values():
    arrays = dense_reference.load('resize_metrics')
    recorded, classes = arrays['miou'], arrays['miou']['num_classes']
    pixels = sum(count_pixels(arrays[f'miou/label{i}'], arrays[f'miou/prediction{i}'].long(), classes)
                 for i in range(3)).view(classes, classes)
    result = summarise(pixels, names=list('abcdefgh'))
    # Quotients of whole numbers, which the original sums in another order
    found = [result[name] / 100 for name in ('miou', 'macc', 'pixel_acc')]
    assert found == pytest.approx([recorded[name] for name in ('mIoU', 'mAcc', 'aAcc')], rel=1e-12)
    for name, key in (('IoU', 'iou'), ('Acc', 'accuracy')):
        for wanted, values in zip(recorded[name], result['classes'], strict=True):
            assert values[key] == (None if wanted is None else pytest.approx(100 * wanted, rel=1e-12))


def test_pixels_that_count_for_nothing_are_not_counted_and_nothing_to_count_is_refused():
    truth, found = torch.tensor([[0, 1, IGNORED]], dtype=torch.uint8), torch.tensor([[1, 1, 0]])
    assert count_pixels(truth, found, 2).tolist() == [0, 1, 0, 1]
    with pytest.raises(UserError, match='no pixel of the test images has a class; check --ignore_label'):
        summarise(torch.zeros(2, 2, dtype=torch.int64), None)


# ---- Released files -------------------------------------------------------------------------------------------------

def write(path: Path, name: str) -> None:
    """A file as mmseg writes it, with the weights of the recording."""
    shapes = dense_reference.load('state_dict_shapes')['shapes'][FILES[name]]
    torch.save({'meta': {'iter': 160000, 'mmseg_version': '0.29.1', 'CLASSES': tuple(ade20k_classes.NAMES)},
                'state_dict': dense_reference.seeded_state_dict(shapes), 'optimizer': {}}, path)


@pytest.mark.parametrize('name', XT)
def test_a_released_file_gives_the_recorded_label_maps_of_the_recorded_image(name, cache):
    put(cache, XT[name], write, name)
    asked = replace(RECIPES['default'], model='')
    task, model, weights = load_task(f'released:{XT[name]}', asked, Run(eval=True, device='cpu'), torch.device('cpu'))
    assert task.recipe == replace(RECIPES[XT[name]], num_classes=150) and task.classes == ade20k_classes.NAMES
    assert weights.meta['miou'] == RECIPES[XT[name]].expected_miou
    recorded = dense_reference.load(name)
    pixels = recorded['pipeline/image_bgr'].numpy()[:, :, ::-1].copy()
    # The recording has the scale (512, 128) in place of (2048, 512)
    task._transform.scale = (512, 128)
    view, = task._transform.views(pixels)
    aligned = recorded['pipeline/aligned_rgb'].numpy()
    assert view.shape == aligned.shape and np.abs(view.astype(int) - aligned).max() <= 2  # OpenCV rounds both otherwise
    sample = task.prepare(pixels) | {'views': [aligned]}
    images = normalise_padded(torch.from_numpy(aligned)[None], [aligned.shape[:2]], mean=task.recipe.mean,
                              std=task.recipe.std)
    wanted = recorded['pipeline/network_input/sample']
    assert dense_reference.relative(dense_reference.sample(images.contiguous(), len(wanted)), wanted) <= 1e-6
    with torch.inference_mode():
        logits = model.logits(images)
    wanted = recorded['pipeline/logits_network_size/sample']
    assert dense_reference.relative(dense_reference.sample(logits.contiguous(), len(wanted)), wanted) <= 1e-5
    found, = task.predict(model, [sample])
    assert torch.equal(found, recorded['pipeline/argmax'].long())


def test_ten_files_are_released_and_each_is_the_recipe_of_its_name():
    files = {name: row.url for name, row in RELEASED_DENSE.items() if 'seg-weights' in row.url}
    assert len(files) == 10 and 'upernet_moganet_xlarge_160k' not in files
    stems = dense_reference.load('state_dict_shapes')['shapes']
    for name, url in files.items():
        assert url.rsplit('/', 1)[1].removesuffix('.pth') in stems and RECIPES[name].expected_macc


def test_other_classes_renew_the_classifiers_alone_and_say_so(trained, data, tmp_path, capsys):
    mine = tmp_path / 'mine'
    for split, own in (('training', 'train'), ('validation', 'val')):
        (mine / 'labels' / own).mkdir(parents=True)
        (mine / 'images').mkdir(exist_ok=True)
        (mine / 'images' / own).symlink_to(data / 'images' / split)
        for path in (data / 'annotations' / split).iterdir():
            Image.fromarray((np.array(Image.open(path)) > 1).astype(np.uint8)).save(mine / 'labels' / own / path.name)
    (mine / 'classes.txt').write_text('paper\nink\n')
    words = [*SMALL, *WIDTHS, '--data_path', str(mine), '--num_workers', '0', '--batch_size', '4',
             '--total_batch_size', '4', '--epochs', 'none', '--updates', '1', '--warmup_steps', '0', '--lr', '0',
             '--min_lr', '0', '--model_ema', 'false', '--disable_eval', '--finetune',
             str(trained / 'checkpoint-last.pth'), '--output_dir', str(tmp_path / 'run')]
    assert main.main(words) == 0
    said = capsys.readouterr().out
    assert 'decode_head.conv_seg.weight, decode_head.conv_seg.bias' in said and '2 classes' in said
    ours, theirs = state_of(tmp_path / 'run')['model'], state_of(trained)['model_ema']
    assert ours['decode_head.conv_seg.weight'].shape[0] == 2
    moved = [name for name in ours if 'conv_seg' not in name and 'running' not in name and 'batches' not in name
             and not torch.equal(ours[name], theirs[name])]
    assert moved == []  # at a learning rate of 0 all that was kept is as it was


# ---- Prediction -----------------------------------------------------------------------------------------------------

def test_labels_are_told_drawn_and_written_at_the_size_of_the_photograph(unsure, data, tmp_path, capsys):
    photo = sorted((data / 'images' / 'validation').iterdir())[0]
    width, height = Image.open(photo).size
    words = [str(photo), '--checkpoint', str(unsure), '--device', 'cpu', '--topk', '20']
    assert predict.main([*words, '--json', '--draw', str(tmp_path / 'a'), '--labels', str(tmp_path / 'b')]) == 0
    entry, = json.loads(capsys.readouterr().out)
    numbers = np.array(Image.open(tmp_path / 'b' / f'{photo.stem}.png'))  # a palette's picture: its numbers
    assert numbers.shape == (height, width) and len(np.unique(numbers)) > 1
    assert {found['class']: found['share'] for found in entry['predictions']} == {
        int(number): pytest.approx((numbers == number).mean()) for number in np.unique(numbers)}
    assert all(found['name'] == digits_coco.LABELS[1:][found['class']] for found in entry['predictions'])
    drawn = np.array(Image.open(tmp_path / 'a' / f'{photo.stem}.png'))
    pixels, colors = np.array(Image.open(photo).convert('RGB')), np.array(colors_of(11))
    blended = np.abs(drawn[:height, :width].astype(int) - (pixels.astype(int) + colors[numbers]) / 2)
    assert blended.max() <= 1 and drawn.shape[1] > width  # to the right, the legend
    assert tuple(colors[entry['predictions'][0]['class']]) in set(map(tuple, drawn[:, width:].reshape(-1, 3).tolist()))
    assert predict.main(words) == 0
    assert '%' in capsys.readouterr().out


def test_a_classifier_has_no_labels_of_pixels(data, tmp_path, capsys):
    from models import create_model
    torch.save({'state_dict': create_model('moganet_xtiny', num_classes=3).state_dict()}, tmp_path / 'file.pth')
    photo = next((data / 'images' / 'validation').iterdir())
    with pytest.raises(UserError, match='leave --labels out'):
        predict.main([str(photo), '--checkpoint', str(tmp_path / 'file.pth'), '--model', 'moganet_xtiny', '--device',
                      'cpu', '--labels', str(tmp_path / 'labels')])


def test_ade20k_has_150_classes_with_a_name_and_a_colour_each():
    names, colors = ade20k_classes.NAMES, ade20k_classes.COLORS
    assert len(names) == len(set(names)) == len(colors) == 150
    assert (names[0], names[12], names[149]) == ('wall', 'person', 'flag') and colors[2] == (6, 230, 230)
    assert len(set(pictures.distinct_colors(60))) == 60


@pytest.mark.parametrize('form', ['safetensors', 'torch_export', 'onnx'])
def test_an_exported_segmentor_computes_the_same(form, unsure, tmp_path, capsys):
    if form == 'onnx':
        pytest.importorskip('onnxscript')
    export.main(['--checkpoint', str(unsure), '--format', form, '--output', str(tmp_path / 'file'), '--input_size',
                 '96'])
    assert 'logits within' in capsys.readouterr().out  # it compares them before it writes
    assert (tmp_path / 'file').stat().st_size > 10_000


# ---- Real labels ----------------------------------------------------------------------------------------------------

def microscopy(folder: Path) -> Path:
    """stardist's photograph of 125 cell nuclei and their masks as tiles of 128 pixels: 12 to train, the rest to test.

    Its wheel is fetched and read as a zip, and never imported; the test is skipped where it cannot be fetched.
    """
    wheel = [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--only-binary=:all:', '-d', str(folder),
             'stardist==0.9.2']
    done = subprocess.run(wheel, capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.skip(f'the wheel of stardist cannot be fetched: {done.stderr.strip().splitlines()[-1]}')
    with zipfile.ZipFile(next(folder.glob('stardist*.whl'))) as archive:
        image, mask = (np.array(Image.open(io.BytesIO(archive.read(f'stardist/data/images/{name}2d.tif'))))
                       for name in ('img', 'mask'))
    assert image.shape == mask.shape == (512, 512) and len(np.unique(mask)) == 126
    for i, (row, column) in enumerate(itertools.product(range(4), range(4))):
        split, part = 'train' if i < 12 else 'val', np.s_[128 * row:128 * row + 128, 128 * column:128 * column + 128]
        for kind, pixels in (('images', image[part].astype(np.uint8)), ('labels', (mask[part] > 0).astype(np.uint8))):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / kind / split / f'{i}.png')
    (folder / 'classes.txt').write_text('background\nnucleus\n')
    return folder


@pytest.mark.slow
def test_cell_nuclei_in_microscopy_are_told_from_the_background(tmp_path):
    data = microscopy(tmp_path)
    words = (*WORDS, '--data_path', str(data), '--image_scale', '128', '128', '--crop_size', '96', '--epochs', 'none',
             '--updates', '60', '--val_steps', '60', '--lr', '5e-3', '--hflip', '0.5', '--print_freq', '20')
    runs.run((*words, '--output_dir', str(tmp_path / 'run')), tmp_path / 'log.txt')
    # Measured 62.7; all background would be about 42
    assert log_of(tmp_path / 'run')[-1]['test_miou'] > 52


@pytest.mark.slow
def test_the_demo_tells_the_digits_of_photographs_that_it_has_not_seen(tmp_path):
    """As `make demo-segmentation`: about fifteen minutes of one core."""
    assert main.main(['--recipe', ROW, '--device', 'cpu', '--num_workers', '0', '--val_interval', '4',
                      '--output_dir', str(tmp_path)]) == 0
    best = tmp_path / 'checkpoint-best-ema.pth'
    runs.run(('--eval', '--checkpoint', str(best), '--device', 'cpu', '--output_dir', str(tmp_path)), tmp_path / 'log')
    assert json.loads((tmp_path / 'eval.json').read_text())['miou'] > 38  # measured, of one seed: 48.6


# ---- What cannot be -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('flags,said', [
    (('--compile',), 'vary in size'), (('--class_map', 'x'), '--class_map is for classification'),
    (('--train_json', 'x'), '--train_json is for detectors'), (('--data_set', 'digits'), 'has no label pictures'),
    (('--scale_range', '2', '1'), '--scale_range (2.0, 1.0)'), (('--test_scales', '0'), '--test_scales (0.0,)'),
    (('--max_class_share', '0'), '--max_class_share 0'), (('--ignore_label', '70000'), 'give at most 65535'),
    (('--data_path', 'nowhere'), 'nowhere is no folder'), (('--num_classes', '5'), '11 classes')])
def test_what_cannot_be_is_one_line(flags, said, data, tmp_path, capsys):
    words = [*SMALL, *WIDTHS, '--data_path', str(data), '--num_workers', '0', '--output_dir', str(tmp_path / 'run'),
             *flags]
    assert main.main(words) == 2
    assert said in capsys.readouterr().err and not (tmp_path / 'run').exists()
