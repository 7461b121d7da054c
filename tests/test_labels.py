"""Labels: numbers and names of classes, and what decides where a checkpoint, the data and a class map differ."""
import contextlib
import random
import unicodedata
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo

import main
import runs
from builders import make_image_folder
from models import create_model
from pipeline import labels
from pipeline.files import read_ground_truth
from pipeline.labels import BadLabel
from pipeline.sources import ImageFiles, TimmSource, check_files
from recipes import RECIPES, Run
from tasks.classification import Classification, read_real_labels, read_valid_labels
from utils import UserError

pytestmark = pytest.mark.usefixtures('own_cache', 'one_thread')

IDS = ImageNetInfo('imagenet-1k').label_names()


def images(root: Path, counts: dict[str, int]) -> Path:
    """A folder of class folders with so many images in each."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(np.full((40, 40, 3), 16 * i, np.uint8)).save(root / name / f'{i}.png')
    return root


def labelled(files: ImageFiles) -> list[tuple[str, int]]:
    """Class folder and label of each image, in the order of the source."""
    return [(Path(files.name(i)).parent.name, files.read(i)[1]) for i in range(len(files))]


def task_of(num_classes: int | None, trained: Any = (), *, resumed: bool = False, **run: Any) -> Classification:
    task = Classification(replace(RECIPES['moganet_xtiny'], num_classes=num_classes), Run(**run))
    task.trained, task.resumed = trained, resumed
    return task


# ---- Names ----------------------------------------------------------------------------------------------------------

def test_names_are_found_in_any_unicode_form_and_order_but_no_other_name_is():
    draw = random.Random(0)
    alphabet = ['é', 'ü', 'ñ', 'Å', 'a', 'b', 'ß', '가', ' ', '-', '.', '\n', '\udcff', '1', '2']
    for _ in range(500):
        names = list({unicodedata.normalize('NFC', ''.join(draw.choices(alphabet, k=draw.randint(1, 6))))
                      for _ in range(draw.randint(1, 9))})
        others = [unicodedata.normalize(draw.choice(['NFC', 'NFD']), name) for name in draw.sample(names, len(names))]
        if labels.are_numbers(names):
            continue
        assert [unicodedata.normalize('NFC', others[i]) for i in labels.find(names, others)] == names
        assert not labels.difference(names, others, we='a', they='b')
        assert labels.find(['another', *names], others)[0] == -1


def test_numbers_are_sorted_as_numbers_and_equal_with_leading_zeros():
    draw = random.Random(1)
    for _ in range(200):
        numbers = draw.sample(range(2000), draw.randint(1, 30))
        names = [f'{number:0{draw.randint(1, 5)}d}' for number in numbers]
        assert [int(name) for name in labels.in_order(names)] == sorted(numbers)
        assert labels.find(names, [str(number) for number in numbers]) == list(range(len(names)))
        assert labels.in_order([*names, 'x']) == sorted([*names, 'x'])
    assert labels.find(['1', '01'], ['01', '1']) == [1, 0]  # two folders stay two classes


# ---- New runs and resumed ones --------------------------------------------------------------------------------------

def test_numbers_number_a_new_run_and_the_checkpoint_a_resumed_one(tmp_path):
    root = images(tmp_path / 'data', {str(i): 1 + i % 2 for i in range(12)})
    files, before = ImageFiles(root), sorted(str(i) for i in range(12))
    order = [name for name, _ in labelled(files)]
    assert all(label == int(name) for name, label in labelled(files))
    task_of(12, before, resumed=True).learn_classes([files])
    # The same images in the same places: the order of an epoch is drawn from these
    assert labelled(files) == [(name, before.index(name)) for name in order] and order == sorted(order)


def test_one_name_in_two_unicode_forms_is_one_class(tmp_path):
    names = ['\u00e9t\u00e9', 'hiver', 'f\u00eate', 'fzz']
    train = ImageFiles(images(tmp_path / 'train', dict.fromkeys(names, 1)))
    val = ImageFiles(images(tmp_path / 'val', {unicodedata.normalize('NFD', name): 1 for name in names}))
    assert check_files(train, val) == ([], [])
    task = task_of(None)
    task.learn_classes([train, val])
    number = {unicodedata.normalize('NFC', name): label for name, label in labelled(val)}
    assert number == dict(labelled(train)) and task.classes == train.classes
    task_of(4, sorted(unicodedata.normalize('NFD', name) for name in names), resumed=True).learn_classes([train, val])


@pytest.mark.parametrize('trained', [['a', 'z'], ['a'], ['a', 'b', 'c']])
def test_a_run_does_not_go_on_with_other_classes(tmp_path, trained):
    files = ImageFiles(images(tmp_path / 'data', {'a': 1, 'b': 1}))
    with pytest.raises(UserError, match=r'the classes changed since the checkpoint was written: .* only in the'):
        task_of(3, trained, resumed=True).learn_classes([files])
    task_of(3, trained).learn_classes([files])  # weights to fine-tune may have other classes
    assert dict(labelled(files)) == {'a': 0, 'b': 1}


def test_a_renamed_folder_and_another_class_map_are_refused_on_resume(tmp_path, capsys):
    data = make_image_folder(tmp_path / 'data', train=4, val=2)
    (tmp_path / 'map.txt').write_text('class1\nclass0\nclass2\n')
    (tmp_path / 'same.txt').write_text('\ufeffclass2 2\r\nclass1 0\r\n\r\nclass0 1\r\n')
    words = [*runs.TINY, '--data_path', str(data), '--total_batch_size', '4', '--epochs', '1', '--warmup_epochs', '0',
             '--num_workers', '0', '--device', 'cpu']
    mapped = [*words, '--output_dir', str(tmp_path / 'run'), '--class_map']
    assert main.main([*mapped, str(tmp_path / 'map.txt')]) == 0
    path = tmp_path / 'run' / 'checkpoint-3.pth'
    state = torch.load(path, weights_only=True)
    assert state['class_map'] == {'class0': 1, 'class1': 0, 'class2': 2}
    assert state['classes'] == ['class1', 'class0', 'class2']
    assert 'numbered by --class_map' in capsys.readouterr().out
    for file in path.parent.glob('checkpoint-*.pth'):
        if file != path:
            file.unlink()
    more = [*words, '--epochs', '2', '--resume_anyway', '--output_dir', str(tmp_path / 'run')]
    (tmp_path / 'other.txt').write_text('class0\nclass1\nclass2\n')
    for extra, said in ((['--class_map', str(tmp_path / 'other.txt')], 'the classes changed'),
                        ([], 'trained by another --class_map')):
        assert main.main([*more, *extra]) == 2
        assert said in capsys.readouterr().err
    state.pop('class_map')
    torch.save(state, path)  # as an older version wrote it
    assert main.main([*more, '--class_map', str(tmp_path / 'same.txt')]) == 0


# ---- Class maps -----------------------------------------------------------------------------------------------------

def test_class_maps_are_read_in_both_forms_however_they_are_written(tmp_path):
    draw, path = random.Random(2), tmp_path / 'map.txt'
    for _ in range(200):
        names = draw.sample(['cat', 'a dog', 'no 5', 'été', 'n01440764', '7', 'x.y', 'big 10'], draw.randint(1, 8))
        numbered = draw.random() < 0.5
        wanted = {name: draw.randint(0, 9) if numbered else i for i, name in enumerate(names)}
        lines = [f'{name}{draw.choice([" ", chr(9), "   "])}{label}' if numbered else name
                 for name, label in wanted.items()]
        text = ''.join(draw.choice(['', '\n', '  \n']) + line + draw.choice(['\n', '\r\n', ' \n']) for line in lines)
        text = unicodedata.normalize(draw.choice(['NFC', 'NFD']), text)
        path.write_bytes(text.encode(draw.choice(['utf-8', 'utf-8-sig'])))
        assert labels.read_class_map(str(path), names=names) == wanted


@pytest.mark.parametrize('content,said', [
    (b'', 'is empty'), (b'\xff\xfea\x00', 'cannot be read'), (b'a\nb\na\n', 'names a twice'),
    (b'a 1\na 2\n', 'names a twice'), (b'a 99999999999\n', 'the label of a is 99999999999')])
def test_odd_class_maps_are_one_line(tmp_path, content, said):
    (tmp_path / 'map.txt').write_bytes(content)
    with pytest.raises(UserError, match=f'--class_map .*{said}'):
        labels.read_class_map(str(tmp_path / 'map.txt'))
    (tmp_path / 'map.pkl').write_bytes(content)
    with pytest.raises(UserError, match='--class_map'):
        labels.read_class_map(str(tmp_path / 'map.pkl'))


def test_a_class_map_tells_what_it_leaves_out_and_is_refused_where_it_leaves_nothing(tmp_path):
    root = images(tmp_path / 'data', {'a': 2, 'b': 3, 'c': 1})
    (tmp_path / 'map.txt').write_text('a 0\nc 0\nd 2\n')
    files = ImageFiles(root, class_map=str(tmp_path / 'map.txt'))
    assert files.classes == ['a or c', '1', 'd'] and labelled(files) == [('a', 0), ('a', 0), ('c', 0)]
    _, warnings = check_files(files, None)
    assert any('1 names of --class_map have no folder (d)' in line for line in warnings)
    assert any('3 images in 1 class folders that --class_map does not name (b)' in line for line in warnings)
    (tmp_path / 'map.txt').write_text('n01440764 tench, Tinca tinca\n')
    with pytest.raises(UserError, match=r'--class_map .* names no class folder'):
        ImageFiles(root, class_map=str(tmp_path / 'map.txt'))


# ---- Evaluation -----------------------------------------------------------------------------------------------------

def test_a_subset_of_the_models_classes_in_any_order_is_mapped_by_name(tmp_path):
    draw, root = random.Random(3), images(tmp_path / 'data', dict.fromkeys(['9', '10', '11'], 1))
    words = ['owl', 'cat', 'dog', 'été', 'ant', 'bee']
    for number in range(100):
        known = draw.choice([words, [str(i) for i in range(20)], IDS])
        known = draw.sample(known, len(known)) if known is not IDS else known
        ours = labels.in_order(draw.sample(known, draw.randint(1, len(known))))
        found, _ = labels.classes_of_model(ours, known if known is not IDS or number % 2 else [], len(known), cure='')
        assert [found[i] for i in labels.find(ours, found)] == ours and found == known
    files = ImageFiles(root)
    task = task_of(12, [str(i) for i in reversed(range(12))], eval=True)
    task.learn_classes([files])
    assert dict(labelled(files)) == {'9': 2, '10': 1, '11': 0} and len(task.classes) == 12
    task_of(1000, eval=True).learn_classes([ImageFiles(root)])


def test_weights_without_names_take_numbers_and_imagenets_ids_for_their_classes(tmp_path):
    numbers = ImageFiles(images(tmp_path / 'numbers', {'5': 1, '17': 1, '999': 1}))
    task_of(1000, eval=True).learn_classes([numbers])
    assert dict(labelled(numbers)) == {'5': 5, '17': 17, '999': 999}
    ids = ImageFiles(images(tmp_path / 'ids', {IDS[i]: 1 for i in (900, 3, 40)}))
    task = task_of(1000, ['tench, Tinca tinca', *map(str, range(999))], eval=True)  # as released files are exported
    task.learn_classes([ids])
    assert dict(labelled(ids)) == {IDS[i]: i for i in (900, 3, 40)} and task.classes == IDS


def test_classes_that_the_model_has_not_are_refused_unless_the_user_says_which_they_are(tmp_path):
    root = images(tmp_path / 'data', {'cat': 1, 'yak': 1})
    for trained in (['ant', 'cat', 'dog'], ['ant', 'bee', 'dog']):
        with pytest.raises(UserError, match='--class_map'):
            task_of(3, trained, eval=True).learn_classes([ImageFiles(root)])
        (tmp_path / 'valid.txt').write_text('1 2')
        task_of(3, trained, eval=True, valid_labels=str(tmp_path / 'valid.txt')).learn_classes([ImageFiles(root)])
    with pytest.raises(UserError, match=r"1 of the 2 classes of the data .n99999999. are none of the model's 1000"):
        labels.classes_of_model([IDS[0], 'n99999999'], (), 1000, cure='rename them')


def test_the_accuracy_on_some_classes_is_that_of_the_right_ones(tmp_path, capsys):
    model = create_model('moganet_xtiny', num_classes=12)
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.nn.functional.one_hot(torch.tensor(2), 12).float()
    images(tmp_path / 'data' / 'val', {'2': 3, '10': 1})
    words = ['--eval', '--model', 'moganet_xtiny', '--data_path', str(tmp_path / 'data'), '--test_size', '32',
             '--device', 'cpu', '--num_workers', '0', '--checkpoint', str(tmp_path / 'w.pth')]
    names = sorted(map(str, range(12)))  # of a model trained under the order of the text, in which class 2 is folder 10
    for classes, right in (({}, 75), ({'classes': names}, 25)):
        torch.save({'model': model.state_dict()} | classes, tmp_path / 'w.pth')
        assert main.main(words) == 0
        assert f'top-1 {right}.000 %' in capsys.readouterr().out


# ---- Labels and files of labels -------------------------------------------------------------------------------------

@pytest.mark.parametrize('label', [None, 'cat', 1.5, float('nan'), -1, 3, 2**40, b'1', [1]])
def test_a_label_that_is_no_class_is_named(label):
    with pytest.raises(BadLabel, match='has label'):
        task_of(3)._check_label(label)
    assert [task_of(3)._check_label(good) for good in (2, np.int64(1), 2.0, torch.tensor(1))] == [2, 1, 2, 1]


def test_a_name_that_the_class_map_lacks_is_named():
    class Reader:
        def __getitem__(self, index: int) -> Any:
            raise KeyError('yak')

    source = TimmSource(SimpleNamespace(reader=Reader()), {'cat': 0})
    with pytest.raises(BadLabel, match="has label 'yak', which --class_map does not name"):
        source.read(0)


def test_a_damaged_ground_truth_is_one_line(tmp_path):
    draw = random.Random(4)
    rows = [f'ILSVRC2012_val_{i:08d},n0144{i:04d} {i} 2 3 400 n01440764 1 2 3 4 ' for i in range(1, 6)]
    whole = '\r\n'.join(['ImageId,PredictionString', *rows])
    path = tmp_path / 'LOC_val_solution.csv'
    path.write_text('\ufeff' + whole)
    truth = read_ground_truth(path)
    assert truth == {f'ILSVRC2012_val_{i:08d}': f'n0144{i:04d}' for i in range(1, 6)}
    for _ in range(300):
        damaged = bytearray(whole.encode())[:draw.randint(0, len(whole))]
        for _ in range(draw.randint(0, 2)):
            if damaged:
                damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(UserError):
            assert all('/' not in name for name in read_ground_truth(path).values())
    for text in ('../x\n', '9' * 5000, 'n1 n2\n', ''):
        path.write_text(text)
        with pytest.raises(UserError, match='ground-truth'):
            read_ground_truth(path)


@pytest.mark.parametrize('text', ['[[-1]]', '[[3]]', '[[null]]', '[[true]]', '[null]', '{}', '[]', '[' * 9999, '', '7',
                                  '[["a"]]', '[[0.5]]'])
def test_odd_real_labels_are_one_line(tmp_path, text):
    (tmp_path / 'real.json').write_text(text)
    with pytest.raises(UserError, match='--real_labels'):
        read_real_labels(str(tmp_path / 'real.json'), ['ILSVRC2012_val_00000001.JPEG'], num_classes=3)
    (tmp_path / 'real.json').write_text('\ufeff[[0, 2], []]')
    found = read_real_labels(str(tmp_path / 'real.json'), ['val_1.JPEG', 'val_2.JPEG'], num_classes=3)
    assert found.tolist() == [[True, False, True], [False] * 3]
    with pytest.raises(UserError, match='--real_labels'):
        read_real_labels(str(tmp_path / 'real.json'), ['val_0.JPEG'], num_classes=3)


@pytest.mark.parametrize('text', ['', '-1', '3', 'a', '1.0', '1 1', '9' * 5000, '0 1 2'])
def test_odd_valid_labels_are_one_line(tmp_path, text):
    (tmp_path / 'valid.txt').write_text(text)
    recipe = task_of(3).recipe
    with pytest.raises(UserError, match='--valid_labels'):
        read_valid_labels(str(tmp_path / 'valid.txt'), recipe, ['a', 'b'])
    (tmp_path / 'valid.txt').write_text('\ufeff2\r\n0\r\n')
    assert read_valid_labels(str(tmp_path / 'valid.txt'), recipe, ['a', 'b']) == [2, 0]


def trained_on(folder: Path, data: Path, *words: str) -> Path:
    """A checkpoint of one update on a folder's images."""
    base = [*runs.TINY, '--data_path', str(data), '--device', 'cpu', '--num_workers', '0', '--epochs', '1',
            '--warmup_epochs', '0', '--total_batch_size', '6', '--batch_size', '6', '--disable_eval']
    assert main.main([*base, '--output_dir', str(folder), *words]) == 0
    return folder / 'checkpoint-last.pth'


def test_data_that_shares_some_classes_with_the_model_is_refused_however_many_it_has(tmp_path, capsys):
    for split in ('train', 'val'):
        images(tmp_path / 'd' / split, {'ant': 3, 'bee': 3, 'cat': 3})
        images(tmp_path / 'other' / split, {'bee': 3, 'cat': 3, 'zebra': 3})
    checkpoint = trained_on(tmp_path / 'run', tmp_path / 'd')
    assert main.main(['--eval', '--checkpoint', str(checkpoint), '--data_path', str(tmp_path / 'other'), '--device',
                      'cpu', '--num_workers', '0', '--output_dir', str(tmp_path / 'e')]) == 2
    said = capsys.readouterr().err
    assert "1 of the 3 classes of the data (zebra) are none of the model's 3 by the checkpoint" in said


def test_an_evaluation_wants_the_class_map_of_the_training(tmp_path, capsys):
    for split in ('train', 'val'):
        images(tmp_path / 'd' / split, {'ant': 3, 'bee': 3, 'cat': 3})
    (tmp_path / 'map.txt').write_text('ant 0\nbee 0\ncat 1\n')
    (tmp_path / 'other.txt').write_text('bee 0\ncat 0\nant 1\n')
    checkpoint = trained_on(tmp_path / 'run', tmp_path / 'd', '--class_map', str(tmp_path / 'map.txt'))
    words = ['--eval', '--checkpoint', str(checkpoint), '--data_path', str(tmp_path / 'd'), '--device', 'cpu',
             '--num_workers', '0', '--output_dir', str(tmp_path / 'e')]
    assert main.main([*words, '--class_map', str(tmp_path / 'map.txt')]) == 0
    capsys.readouterr()
    assert main.main([*words, '--class_map', str(tmp_path / 'other.txt')]) == 2
    assert 'was trained with another --class_map (ant, bee, cat); give its file' in capsys.readouterr().err
    assert main.main(words) == 2
    assert 'was trained with a --class_map (ant, bee, cat); give its file' in capsys.readouterr().err


def test_halves_of_a_foreign_set_with_other_classes_are_refused():
    def source(names: list[str]) -> Any:
        return TimmSource(SimpleNamespace(class_to_idx={name: i for i, name in enumerate(names)}))
    with pytest.raises(UserError, match=r'1 of the classes of one half of the data \(d\) are none of a, b, c'):
        task_of(None).learn_classes([source(['a', 'b', 'c']), source(['a', 'c', 'd'])])
