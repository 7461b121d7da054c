"""`predict.py`: its probabilities are those of `main.py --eval`, its names the checkpoint's, a bad image only one."""
import functools
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo

import main
import predict
import recipes
import reference
import runs
from builders import make_image_folder, open_loaders, seeded, stripped_timm_file, timm_file
from conftest import ROOT
from models.released import RELEASED
from utils import UserError

XT = 'moganet_xtiny'
pytestmark = pytest.mark.usefixtures('one_thread', 'own_cache')


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    folder = make_image_folder(tmp_path_factory.mktemp('data'), classes=3, train=16, val=7)
    for path in folder.rglob('*.png'):  # wider than high, so that the crop's mode matters
        Image.open(path).resize((56, 40)).save(path)
    return folder


@pytest.fixture(scope='module')
def checkpoint(data: Path, tmp_path_factory) -> Path:
    """Of a short training that has learnt something and not all: raw weights and average differ."""
    folder = tmp_path_factory.mktemp('run')
    assert main.main([*runs.TINY, '--data_path', str(data), '--output_dir', str(folder), '--device', 'cpu', '--epochs',
                      '3', '--warmup_epochs', '1', '--lr', '5e-3', '--total_batch_size', '16', '--batch_size', '16',
                      '--num_workers', '0', '--mixup', '0', '--cutmix', '0', '--layer_scale_init_value', '0.1']) == 0
    return folder / 'checkpoint-last.pth'


def predicted(capsys: pytest.CaptureFixture, *words: Any, status: int = 0) -> list[dict[str, Any]]:
    """The JSON of a command line."""
    capsys.readouterr()
    assert predict.main([*map(str, words), '--json', '--device', 'cpu']) == status
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize('flags', [
    (), ('--weights', 'raw'), ('--gate', 'double'), ('--test_size', '48', '--crop_pct', '0.7'),
    ('--interpolation', 'nearest', '--crop_pct', '0.7'), ('--crop_mode', 'squash')])
def test_predictions_have_the_accuracy_and_the_loss_of_the_evaluation(flags: tuple[str, ...], data: Path,
                                                                      checkpoint: Path, tmp_path: Path, capsys) -> None:
    assert main.main(['--eval', '--checkpoint', str(checkpoint), '--data_path', str(data), '--output_dir',
                      str(tmp_path), '--device', 'cpu', '--num_workers', '0', *flags]) == 0
    result = json.loads((tmp_path / 'eval.json').read_text())
    answers = predicted(capsys, data / 'val', '--checkpoint', checkpoint, *flags, '--topk', 9, '--batch_size', 4)
    truths = [Path(answer['image']).parent.name for answer in answers]
    right = [answer['predictions'][0]['name'] == truth for answer, truth in zip(answers, truths, strict=True)]
    assert 100 * np.mean(right) == pytest.approx(result['acc1'], abs=1e-9)  # counts of 21
    of_truth = [next(p['probability'] for p in answer['predictions'] if p['name'] == truth)
                for answer, truth in zip(answers, truths, strict=True)]
    # float32 in batches of another size: round-off
    assert -np.log(of_truth).mean() == pytest.approx(result['loss'], rel=1e-5)


def test_flags_change_the_probabilities(data: Path, checkpoint: Path, capsys) -> None:
    """Else the agreement above would say nothing about them."""
    flags = ['', '--weights raw', '--gate double', '--test_size 48', '--crop_pct 0.7',
             '--crop_pct 0.7 --interpolation nearest', '--crop_pct 0.7 --crop_mode squash']
    tops = [predicted(capsys, data / 'val' / 'class0' / '0.png', '--checkpoint', checkpoint, *words.split())[0][
        'predictions'][0]['probability'] for words in flags]
    assert all(abs(a - b) > 1e-4 for i, a in enumerate(tops) for b in tops[:i]), tops


def test_pixels_are_those_of_the_validation_loader_bit_for_bit(data: Path, checkpoint: Path) -> None:
    classifier = predict.Classifier(str(checkpoint), device='cpu')
    recipe, run = recipes.resolve([*runs.TINY, '--data_path', str(data), '--device', 'cpu', '--num_workers', '0',
                                   '--total_batch_size', '16', '--val_batch_size', '32'])
    loaders = open_loaders(recipe, run)
    images = next(iter(loaders.val)).images
    ours = classifier.images([classifier.pixels(name) for name in predict.find_images([str(data / 'val')])])
    assert torch.equal(ours, images)
    loaders.close()


def test_lines_are_probabilities_and_names_and_add_up(data: Path, checkpoint: Path, capsys) -> None:
    path = data / 'val' / 'class1' / '3.png'
    assert predict.main([str(path), '--checkpoint', str(checkpoint), '--device', 'cpu']) == 0
    said = capsys.readouterr()
    head, *lines = said.out.splitlines()
    assert head == str(path) and len(lines) == 3  # all classes, where there are fewer than --topk
    percents, names = zip(*(line.split(' %  ') for line in lines), strict=True)
    assert sorted(names) == ['class0', 'class1', 'class2']
    assert sum(map(float, percents)) == pytest.approx(100, abs=0.02)  # of two decimals
    assert sorted(map(float, percents), reverse=True) == list(map(float, percents))
    assert said.err == (f'{checkpoint}: ema weights, training format, single gate; {XT}, single gate, at 32, '
                        'crop 0.9 (center), bicubic\n')


def test_drawn_pictures_show_the_image_over_a_bar_for_each_class(data: Path, checkpoint: Path, tmp_path: Path,
                                                                 capsys) -> None:
    path, drawn = data / 'val' / 'class1' / '3.png', tmp_path / 'drawn'
    answer, again = predicted(capsys, path, path, '--checkpoint', checkpoint, '--draw', drawn, '--topk', 2)
    assert answer == again and sorted(file.name for file in drawn.iterdir()) == ['3-1.png', '3.png']  # none is lost
    picture = np.asarray(Image.open(drawn / '3.png'))
    image = np.asarray(Image.open(path))
    height, width = image.shape[:2]
    assert picture.shape == (height + 2 * 22 + 6, 320, 3)
    left = (320 - width) // 2
    assert np.array_equal(picture[:height, left:left + width], image)
    for row, entry in enumerate(answer['predictions']):
        bar = (picture[height + 6 + 22 * row + 1] == (189, 215, 238)).all(1)
        assert bar.any() and abs(bar.nonzero()[0].max() - entry['probability'] * 320) <= 2  # whole pixels
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match=r'--draw .* cannot be written'):
        predict.main([str(path), '--checkpoint', str(checkpoint), '--device', 'cpu', '--draw', str(tmp_path / 'file')])


def test_embedded_features_are_what_the_classifier_takes_bit_for_bit(data: Path, checkpoint: Path, tmp_path: Path,
                                                                     capsys) -> None:
    (tmp_path / 'broken.png').write_bytes(b'no image')
    words = [str(data / 'val'), str(tmp_path / 'broken.png'), '--checkpoint', str(checkpoint), '--device', 'cpu',
             '--batch_size', '8']
    output = tmp_path / 'new' / 'features.npz'
    assert predict.main([*words, '--embed', str(output)]) == 2  # of the broken image; the others are there
    said = capsys.readouterr()
    assert not said.out and 'broken.png' in said.err
    with np.load(output) as archive:
        names, found = archive['names'].tolist(), archive['features']
    assert names == list(predict.find_images([str(data / 'val')])) and found.dtype == np.float32
    classifier, inputs = predict.Classifier(str(checkpoint), device='cpu'), []
    classifier.model.head.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    for start in range(0, len(names), 8):  # the same batches, and so the same bits
        classifier.probabilities(classifier.images([classifier.pixels(name) for name in names[start:start + 8]]))
    assert np.array_equal(found, torch.cat(inputs).numpy())
    with pytest.raises(UserError, match=r'features\.npz is there already; give another file'):
        predict.main([*words, '--embed', str(output)])
    for flags in (['--json'], ['--topk', '3']):
        with pytest.raises(UserError, match='--embed writes features in place of predictions; leave --json'):
            predict.main([*words, '--embed', str(tmp_path / 'more.npz'), *flags])
    with pytest.raises(UserError, match='no image could be read, and nothing is written'):
        predict.main([*words[1:], '--embed', str(tmp_path / 'none.npz')])


def test_exif_turns_a_photograph_where_the_flag_says_so(data: Path, checkpoint: Path, tmp_path: Path, capsys) -> None:
    image, note = Image.open(data / 'val' / 'class1' / '3.png').convert('RGB'), Image.Exif()
    note[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / 'noted.png', exif=note)
    image.save(tmp_path / 'plain.png')
    image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / 'turned.png')
    as_is, plain, turned = (predicted(capsys, tmp_path / f'{name}.png', '--checkpoint', checkpoint)[0]['predictions']
                            for name in ('noted', 'plain', 'turned'))
    upright = predicted(capsys, tmp_path / 'noted.png', '--checkpoint', checkpoint, '--exif', '--draw',
                        tmp_path / 'drawn')
    assert as_is == plain != turned == upright[0]['predictions']
    assert Image.open(tmp_path / 'drawn' / 'noted.png').height == 56 + 3 * 22 + 6  # of 56 x 40, upright


# ---- Names ----------------------------------------------------------------------------------------------------------

def test_file_with_1000_classes_answers_in_imagenets_words(tmp_path: Path, capsys) -> None:
    """A file of timm's script without class names, as the released ones are."""
    timm_file(tmp_path / 'file.pth.tar', seeded(0), None)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (300, 260, 3), np.uint8)).save(tmp_path / 'noise.png')
    answer, = predicted(capsys, tmp_path / 'noise.png', '--checkpoint', tmp_path / 'file.pth.tar')
    model = timm.create_model(XT).eval()
    model.load_state_dict(seeded(0))
    transform = timm.data.create_transform(224, interpolation='bicubic', crop_pct=0.9)
    with torch.inference_mode():
        expected = model(transform(Image.open(tmp_path / 'noise.png'))[None]).softmax(1)[0].topk(5)
    assert [entry['class'] for entry in answer['predictions']] == expected.indices.tolist()
    # float32, normalised by multiplication and not by division
    assert [entry['probability'] for entry in answer['predictions']] == pytest.approx(expected.values.tolist(),
                                                                                      rel=1e-4)
    names = ImageNetInfo()
    assert [entry['name'] for entry in answer['predictions']] == [
        names.index_to_description(index) for index in expected.indices.tolist()]


def with_classes(checkpoint: Path, path: Path, classes: list[str]) -> list[str]:
    torch.save(torch.load(checkpoint) | {'classes': classes}, path)
    return predict.Classifier(str(path), device='cpu').names


def test_wordnet_ids_are_described_and_other_names_kept(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / 'file'
    assert with_classes(checkpoint, path, ['n01440764', 'n02123045', 'n07753592']) == [
        'tench, Tinca tinca', 'tabby, tabby cat', 'banana']
    unknown = ['n01440764', 'n02123045', 'n99999999']
    assert with_classes(checkpoint, path, unknown) == unknown
    assert with_classes(checkpoint, path, ['Kätzchen', '猫', 'n1']) == ['Kätzchen', '猫', 'n1']
    assert with_classes(checkpoint, path, []) == ['0', '1', '2']
    assert with_classes(checkpoint, path, ['only one']) == ['only one', '1', '2']


def test_other_models_are_read_at_timms_settings(tmp_path: Path) -> None:
    cfg = timm.get_pretrained_cfg('resnet18')
    torch.manual_seed(0)
    torch.save(timm.create_model('resnet18').state_dict(), tmp_path / 'file')
    recipe = predict.Classifier(str(tmp_path / 'file'), device='cpu', settings={'model': 'resnet18'}).recipe
    assert (recipe.test_size, recipe.crop_pct, recipe.interpolation) == (
        cfg.test_input_size[-1], cfg.test_crop_pct, cfg.interpolation)
    assert (recipe.test_size, recipe.crop_pct) != (224, 0.9)  # the default recipe's, which would otherwise do


# ---- Where images come from -----------------------------------------------------------------------------------------

def save(path: Path, seed: int = 0, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)).save(path, **options)
    return path


def test_folder_gives_all_images_below_it_sorted_and_names_may_be_any(checkpoint: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / 'Fotos von früher'
    wanted = [save(folder / name, seed) for seed, name in enumerate(['a 1.png', 'b/z/猫.webp', 'b/ü.JPG', 'ж.gif'])]
    (folder / 'notes.txt').write_text('no image')
    save(folder / '.hidden.png')
    (folder / 'folder.png').mkdir()
    answers = predicted(capsys, folder, wanted[1], '--checkpoint', checkpoint)
    assert [answer['image'] for answer in answers] == [*map(str, wanted), str(wanted[1])]
    assert answers[4]['predictions'] == answers[1]['predictions'] != answers[0]['predictions']
    assert predict.main([str(folder), '--checkpoint', str(checkpoint), '--device', 'cpu']) == 0
    assert f'{wanted[1]}\n' in capsys.readouterr().out


def test_file_name_that_is_not_unicode_is_shown(checkpoint: Path, tmp_path: Path, capsys) -> None:
    name = os.path.join(os.fsencode(tmp_path), b'caf\xe9.png')
    try:
        os.rename(save(tmp_path / 'cafe.png'), name)
    except OSError:
        pytest.skip('this file system takes Unicode names alone')
    assert predict.main([str(tmp_path), '--checkpoint', str(checkpoint), '--device', 'cpu']) == 0
    assert 'caf\\udce9.png\n' in capsys.readouterr().out


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """The address of a server of the folder `tmp_path`/site."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    save(tmp_path / 'site' / 'picture.png')
    (tmp_path / 'site' / 'page.html').write_text('<html></html>')
    handler = functools.partial(Quiet, directory=str(tmp_path / 'site'))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


def test_url_is_read_like_a_file(site: str, checkpoint: Path, tmp_path: Path, capsys) -> None:
    file, address = predicted(capsys, tmp_path / 'site' / 'picture.png', f'{site}/picture.png', '--checkpoint',
                              checkpoint)
    assert address['image'] == f'{site}/picture.png' and address['predictions'] == file['predictions']


def test_bad_images_are_named_and_the_others_answered(site: str, checkpoint: Path, tmp_path: Path, capsys) -> None:
    good = save(tmp_path / 'good.jpg')
    (tmp_path / 'cut.jpg').write_bytes(save(tmp_path / 'whole.jpg', quality=95).read_bytes()[:900])
    (tmp_path / 'text.png').write_text('no image')
    huge = (tmp_path / 'whole.jpg').read_bytes()
    sides = huge.index(b'\xff\xc0') + 5
    (tmp_path / 'huge.jpg').write_bytes(huge[:sides] + b'\xff\xdc\xff\xdc' + huge[sides + 4:])  # 65,500 x 65,500
    (tmp_path / 'empty').mkdir()
    bad = {str(tmp_path / 'none.png'): 'No such file or directory', str(tmp_path / 'cut.jpg'): 'truncated',
           str(tmp_path / 'text.png'): 'is no image', str(tmp_path / 'huge.jpg'): 'DecompressionBombError',
           str(tmp_path / 'empty'): 'is a folder without an image',
           f'{site}/none.png': 'HTTP Error 404', f'{site}/page.html': 'is no image',
           'http://127.0.0.1:1/picture.png': 'refused'}
    words = [str(word) for source in bad for word in (source, good)]
    assert predict.main([*words, '--checkpoint', str(checkpoint), '--device', 'cpu', '--json', '--batch_size',
                         '3']) == 2
    said = capsys.readouterr()
    answers = json.loads(said.out)
    assert [answer['image'] for answer in answers] == [str(good)] * len(bad)
    for line, (source, why) in zip(said.err.splitlines()[1:], bad.items(), strict=True):
        assert line.startswith(f'error: {source}: ') and why in line


def test_command_prints_json_alone_and_exits_with_2_after_a_bad_image(checkpoint: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, ROOT / 'predict.py', save(tmp_path / 'a.png'), tmp_path / 'none.png',
                           '--checkpoint', checkpoint, '--json', '--device', 'cpu'], capture_output=True, text=True)
    assert done.returncode == 2 and len(json.loads(done.stdout)) == 1
    assert 'none.png: No such file' in done.stderr and 'Traceback' not in done.stderr


# ---- Wrong command lines --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('flags, said', [
    ((), 'does not say which model it is; give --model'), (('--model', 'resnet18'), 'do not fit resnet18'),
    (('--model', XT, '--gate', 'triple'), '--gate triple: choose from single, double'),
    (('--model', XT, '--weights', 'ema'), 'has no ema weights'), (('--model', XT, '--topk', '0'), 'at least 1'),
    (('--model', 'moganet_xtinny'), 'did you mean moganet_xtiny'),
    (('--model', 'resnet18.none'), 'Invalid pretrained tag')])
def test_wrong_command_line_is_one_line(flags: tuple[str, ...], said: str, tmp_path: Path) -> None:
    torch.save(seeded(0), tmp_path / 'file')
    with pytest.raises(UserError, match=said) as error:
        predict.main([str(save(tmp_path / 'a.png')), '--checkpoint', str(tmp_path / 'file'), *flags])
    assert '\n' not in str(error.value)


def test_file_without_a_classifier_is_refused(tmp_path: Path) -> None:
    state = {name: value for name, value in reference.seeded_state_dict(XT).items() if not name.startswith('head')}
    stripped_timm_file(tmp_path / 'file', state, None)
    with pytest.raises(UserError, match='holds no classifier'):
        predict.Classifier(str(tmp_path / 'file'))


def test_released_file_needs_no_further_word(tmp_path: Path, monkeypatch, capsys) -> None:
    """Model, size, crop and which weights come from the table of released files."""
    row = RELEASED[f'{XT}_256']
    path = tmp_path / 'hub' / 'checkpoints' / row.url.rsplit('/', 1)[1]
    path.parent.mkdir(parents=True)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    timm_file(path, seeded(0), seeded(1))
    answer, = predicted(capsys, save(tmp_path / 'a.png'), '--checkpoint', f'released:{XT}_256')
    classifier = predict.Classifier(f'released:{XT}_256', device='cpu')
    assert (classifier.recipe.test_size, classifier.recipe.model) == (256, XT)
    assert torch.equal(classifier.model.head.bias, seeded(0)['head.bias'])  # the raw ones reach its accuracy
    assert answer['predictions'][0]['name'] in ImageNetInfo().label_descriptions()
