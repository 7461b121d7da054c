"""The walk over folders, and tar files, as they come: links, hidden folders, odd names, broken downloads."""
import bz2
import errno
import gzip
import io
import json
import lzma
import os
import random
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import predict
import runs
import utils
from pipeline import sources
from pipeline.files import cache_folder, find_files
from pipeline.sources import ImageFiles
from recipes import RECIPES, Run
from tools import check_dataset
from utils import UserError

pytestmark = pytest.mark.usefixtures('own_cache')
NAMES = ('x', 'Äpfel', 'A\u0308pfel', 'two words', '-dash', 'line\nend', os.fsdecode(b'caf\xe9'), 'folder.jpg')


def write(path, content=b'image'):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def found(root):
    """Path below the root and class of each image."""
    files = ImageFiles(root)
    return [(os.path.relpath(files.name(i), root), files.classes[files.read(i)[1]]) for i in range(len(files))]


def grow(rng, root):
    """A random tree of class folders; returns its folders. Links lead anywhere below the root."""
    folders = [root / name for name in rng.sample(NAMES, 3)]
    for folder in folders:
        folder.mkdir(parents=True)
    for _ in range(12):
        name = rng.choice(('', '.')) + rng.choice(NAMES)
        folder = rng.choice(folders) / name
        if not folder.exists():
            folder.mkdir()
            folders.append(folder)
    for folder in folders:
        for name in rng.sample(NAMES, 2):
            kind = rng.choice(('.jpg', '.JFIF', '.png', '.txt'))
            write(folder / f'{rng.choice(("", "", "."))}image {name}{kind}')
    for number in range(4):
        link = rng.choice(folders[3:]) / f'link{number}'
        link.symlink_to(rng.choice([root, root.parent, link, root / 'nowhere', *folders]))
    return folders


def plain(root):
    """What counts by os.walk alone, where no link is followed: path and class."""
    images = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if not name.startswith('.')]
        images += [os.path.relpath(os.path.join(folder, name), root) for name in names if not name.startswith('.')
                   and name.lower().endswith(('.jpg', '.jfif', '.png')) and os.path.isfile(os.path.join(folder, name))]
    return {(path, path.split(os.sep)[0]) for path in images if os.sep in path}


@pytest.mark.parametrize('seed', range(60))
def test_in_random_trees_each_real_image_is_found_once_and_links_take_nothing_away(tmp_path, seed):
    rng, root = random.Random(seed), tmp_path / 'data' / 'train'
    grow(rng, root)
    images = found(root)
    assert plain(root) <= set(images) and images == sorted(images, key=lambda item: (item[1], item[0]))
    real = [os.path.realpath(root / path) for path, _ in images]
    assert len(real) == len(set(real))
    more = {path for path, _ in set(images) - plain(root)}  # by links into hidden folders, which are visible so
    assert all('/link' in path and '/.' in os.path.realpath(root / path) for path in more)
    assert all(not part.startswith('.') for path, _ in images for part in path.split(os.sep))
    assert found(root) == images  # from the cache
    # predict.py finds the images of a class as training does
    name = images[0][1]
    assert {os.path.realpath(path) for path in predict.find_images([str(root / name)])} >= {
        os.path.realpath(root / path) for path, of in plain(root) if of == name}


def test_class_folders_that_are_links_count_by_their_names_and_one_folder_has_one_class(tmp_path):
    root = tmp_path / 'train'
    for name in 'ab':
        write(tmp_path / 'store' / name / '1.jpg')
        root.mkdir(exist_ok=True)
        (root / f'class {name}').symlink_to(tmp_path / 'store' / name)
    (root / 'train').symlink_to(root)
    (root / 'up').symlink_to(tmp_path)
    assert found(root) == [('class a/1.jpg', 'class a'), ('class b/1.jpg', 'class b')]
    assert ImageFiles(root).others == {'folders read by another path': 2}
    assert [*predict.find_images([str(root)])] == [str(root / f'class {name}' / '1.jpg') for name in 'ab']
    (root / 'class c').symlink_to(tmp_path / 'store' / 'a')
    with pytest.raises(UserError, match=r'class folders class a and class c are one folder, .*/store/a, .* remove one'):
        ImageFiles(root)


def test_of_two_paths_the_one_with_fewer_links_wins_then_the_first_in_the_alphabet(tmp_path):
    root = tmp_path / 'train'
    write(tmp_path / 'shared' / '1.jpg')
    for name in 'zb':
        write(root / name / 'own.jpg')
        (root / name / 'shared').symlink_to(tmp_path / 'shared')
        (root / name / 'a').symlink_to(root / 'z')
    assert found(root) == [('b/own.jpg', 'b'), ('b/shared/1.jpg', 'b'), ('z/own.jpg', 'z')]


def test_an_unreadable_or_vanished_folder_is_named(tmp_path, monkeypatch):
    root, scan = tmp_path / 'train', os.scandir
    write(root / 'a' / 'deep' / '1.jpg')
    for closed in (root, root / 'a', root / 'a' / 'deep'):
        for number in (errno.EACCES, errno.ENOENT, errno.EIO, errno.ESTALE):
            def scandir(path, closed=closed, number=number):
                if os.path.normpath(path) == str(closed):
                    raise OSError(number, os.strerror(number), path)
                return scan(path)
            monkeypatch.setattr(os, 'scandir', scandir)
            with pytest.raises(UserError, match=rf'^{closed}/? cannot be read \({os.strerror(number)}'):
                ImageFiles(root)
            with pytest.raises(UserError, match='cannot be read'):
                list(predict.find_images([str(root)]))


def test_pipes_sockets_and_broken_links_are_left_out_unopened_and_told(tmp_path):
    data = tmp_path / 'data'
    for split in ('train', 'val'):
        write(data / split / 'a' / '1.jpg')
    folder = data / 'train' / 'a'
    os.mkfifo(folder / 'pipe.jpg')
    os.mkfifo(folder / 'other pipe')
    (folder / 'to a pipe.png').symlink_to('pipe.jpg')
    (folder / 'broken.jpg').symlink_to('nowhere')
    (folder / 'itself.jpg').symlink_to('itself.jpg')
    write(folder / 'notes.TXT')
    write(folder / 'README')
    for _ in range(2):
        report = check_dataset.check(RECIPES['moganet_small'], Run(data_path=str(data)))
        assert report['train']['images'] == 1 and not report['errors']
        assert report['train']['other_endings'] == {
            'special files': 3, 'broken links': 2, '.txt': 1, 'without an ending': 1}
        assert any('7 entries are no images and are left out: 3 special files' in line for line in report['warnings'])
    (folder / 'nowhere').write_bytes(b'image')  # a disk is mounted again: no folder that was read changes
    assert 'a/broken.jpg' in dict(found(data / 'train'))
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(UserError, match='cannot be read'):
        ImageFiles(tmp_path / 'pipe')


def test_every_ending_of_an_image_that_pillow_reads_counts_and_others_are_told_from_the_cache_too(tmp_path):
    yes = ('.jfif', '.JPE', '.jpg', '.Png', '.webp', '.bmp', '.dib', '.tiff', '.gif', '.jp2', '.tga', '.ppm', '.mpo')
    no = ('.pdf', '.eps', '.mpg', '.h5', '.fits', '.txt', '.heic', '.jpg.part')
    for ending in (*yes, *no):
        write(tmp_path / 'train' / 'a' / f'x{ending}')
    for _ in range(2):
        files = ImageFiles(tmp_path / 'train')
        assert len(files) == len(yes)
        assert files.others == {'.part' if ending == '.jpg.part' else ending: 1 for ending in no}
        assert any('8 entries are no images' in line for line in sources.check_files(files, None)[1])


def test_a_cache_of_former_rules_is_built_again(tmp_path):
    write(tmp_path / 'train' / 'a' / '1.jpg')
    ImageFiles(tmp_path / 'train')
    note, = (path for path in cache_folder().glob('train-*.json')
             if json.loads(path.read_text())['root'] == str(tmp_path / 'train'))
    facts = json.loads(note.read_text())
    for rules in ({}, {'rules': 'former'}):
        note.write_text(json.dumps({name: value for name, value in facts.items() if name != 'rules'} | rules
                                   | {'classes': ['wrong']}))
        assert ImageFiles(tmp_path / 'train').classes == ['a']


def test_names_that_are_not_unicode_are_shown_and_end_nothing(tmp_path, monkeypatch):
    for split in ('train', 'val'):
        write(tmp_path / split / os.fsdecode(b'caf\xe9') / '1.jpg')
        (tmp_path / split / os.fsdecode(b'empty\xff')).mkdir()
    monkeypatch.setattr(utils.sys, 'stdout', io.TextIOWrapper(io.BytesIO(), encoding='utf-8'))
    with pytest.raises(SystemExit) as done:
        utils.run_cli(lambda: check_dataset.main(['--data_path', str(tmp_path), '--report', str(tmp_path / 'x.json')]))
    utils.sys.stdout.flush()
    shown = utils.sys.stdout.buffer.getvalue().decode()
    assert done.value.code == 0 and 'hold no image (empty\\udcff)' in shown


# ---- Sorting the test folder ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('number', [errno.EACCES, errno.EROFS, errno.EXDEV, errno.ENOSPC])
@pytest.mark.parametrize('call', ['mkdir', 'rename'])
def test_sort_val_tells_in_one_line_that_a_folder_may_not_be_written(tmp_path, monkeypatch, call, number):
    write(tmp_path / 'val' / 'ILSVRC2012_val_00000001.JPEG')
    write(tmp_path / 'truth.txt', b'n01\n')

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(UserError, match=rf'val cannot be sorted \({os.strerror(number)}; 0 images were moved\); copy'):
        check_dataset.sort_val(tmp_path / 'val', tmp_path / 'truth.txt')
    assert (tmp_path / 'val' / 'ILSVRC2012_val_00000001.JPEG').exists()


def test_sort_val_overwrites_nothing_and_stays_in_its_folder(tmp_path):
    name, truth = 'ILSVRC2012_val_00000001.JPEG', tmp_path / 'truth.txt'
    write(tmp_path / 'val' / name)
    write(truth, b'n01\n')
    write(tmp_path / 'val' / 'n01' / name, b'another')
    with pytest.raises(UserError, match='is there already'):
        check_dataset.sort_val(tmp_path / 'val', truth)
    assert (tmp_path / 'val' / 'n01' / name).read_bytes() == b'another'
    for label in (b'..', b'../n01', b'/tmp', b'.'):
        write(truth, label)
        with pytest.raises(UserError, match='is no ground-truth file'):
            check_dataset.sort_val(tmp_path / 'val', truth)
    (tmp_path / 'val' / 'n02').write_bytes(b'a file')
    write(truth, b'n02')
    with pytest.raises(UserError, match='cannot be sorted'):
        check_dataset.sort_val(tmp_path / 'val', truth)
    assert (tmp_path / 'val' / name).read_bytes() == b'image'


# ---- Tar files ------------------------------------------------------------------------------------------------------

def tar(members, form=tarfile.GNU_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w', format=form) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


IMAGES = [(f'{name}/{number}.jpg', bytes([number + 1]) * (300 + 400 * number)) for name in 'ab' for number in range(4)]
FORMS = {'flat': tar(IMAGES),
         'pax': tar([(f'ü{"long" * 40}/{name}', data) for name, data in IMAGES], tarfile.PAX_FORMAT),
         'nested': tar([(f'{name}.tar', tar([(f'{n}.jpg', d) for n, d in IMAGES])) for name in 'ab'])}


@pytest.mark.parametrize('form', FORMS)
def test_a_tar_file_cut_anywhere_before_its_end_is_told_in_one_line(tmp_path, form):
    whole, rng = FORMS[form], random.Random(form)
    end = len(whole.rstrip(b'\0'))
    end = -(-end // 512) * 512  # where the last image's block ends
    cuts = {*rng.sample(range(end), 60), *range(0, end, 512), 1, 511, 513, end, end + 100}
    path = tmp_path / 'x.tar'
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r'x\.tar\S* is (cut off|empty|no tar)') as told:
            ImageFiles(path)
        assert '\n' not in str(told.value) and ';' in str(told.value)
    path.write_bytes(whole)
    files = ImageFiles(path)
    assert len(files) == len({name for name, _ in IMAGES}) * (2 if form == 'nested' else 1)
    assert files.read(0)[0] == IMAGES[0][1]


@pytest.mark.parametrize('form', FORMS)
def test_random_damage_to_a_tar_file_is_read_or_told(tmp_path, form):
    rng, path = random.Random(form), tmp_path / 'x.tar'
    headers = [at for at in range(0, len(FORMS[form]), 512) if b'ustar' in FORMS[form][at:at + 512]]
    for _ in range(100):
        data = bytearray(FORMS[form])
        at = rng.choice(headers)
        for _ in range(rng.choice((1, 4, 40))):
            data[at + rng.randrange(512)] = rng.randrange(256)
        if rng.random() < 0.5:  # a checksum that fits, so that the fields are believed
            field = bytes(data[at:at + 148]) + b' ' * 8 + bytes(data[at + 156:at + 512])
            data[at + 148:at + 156] = b'%06o\0 ' % sum(field)
        path.write_bytes(data)
        try:
            files = ImageFiles(path)
            for number in range(len(files)):
                files.read(number)
        except UserError as error:
            assert str(path) in str(error) and '\n' not in str(error)


def test_compressed_and_other_files_are_called_by_their_kind(tmp_path):
    plain_tar, packed = FORMS['flat'], io.BytesIO()
    with zipfile.ZipFile(packed, 'w') as archive:
        archive.writestr('a/1.jpg', b'image')
    kinds = {'gzip': gzip.compress(plain_tar), 'bzip2': bz2.compress(plain_tar), 'xz': lzma.compress(plain_tar),
             'zstd': b'(\xb5/\xfd' + bytes(900), 'zip': packed.getvalue()}
    for kind, data in kinds.items():
        for name in ('x.tar', 'x.tar.gz', 'x'):
            write(tmp_path / name, data)
            with pytest.raises(UserError, match=rf'{name} is compressed \({kind}\); unpack'):
                ImageFiles(tmp_path / name)
        write(tmp_path / 'x.tar', tar([('a.tar', data)]))
        with pytest.raises(UserError, match=rf'x\.tar:a\.tar is compressed \({kind}\)'):
            ImageFiles(tmp_path / 'x.tar')
    noise = random.Random(0).randbytes(5000)
    for data, told in ((b'', 'is empty'), (b'<html>not found', 'is no tar file'), (noise, 'is no tar file')):
        write(tmp_path / 'x.tar', data)
        with pytest.raises(UserError, match=told):
            ImageFiles(tmp_path / 'x.tar')


def test_odd_members_of_a_tar_file(tmp_path):
    path = tmp_path / 'x.tar'
    buffer = io.BytesIO(tar([
        ('/abs/1.jpg', b'1'), ('../up/2.jpg', b'2'), ('./c/./3.jpg', b'3'), ('c/.hidden/4.jpg', b'4'),
        ('./5.jpg', b'5'), ('d/6.jpg', b'old'), ('d/6.jpg', b'new'), ('d/7.txt', b'7')]))
    with tarfile.open(fileobj=buffer, mode='a') as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f'd/{kind.decode()}.jpg')
            info.type, info.linkname = kind, 'd/6.jpg'
            archive.addfile(info)
    path.write_bytes(buffer.getvalue())
    files = ImageFiles(path)
    content = {files.classes[files.read(i)[1]]: files.read(i)[0] for i in range(len(files))}
    assert content == {'abs': b'1', 'up': b'2', 'c': b'3', 'd': b'new'} and len(files) == 4 and files.loose == 1
    assert files.others == {'links': 2, 'special files': 1, '.txt': 1, 'members that a later one replaces': 1}


def test_find_files_tells_a_folder_that_may_not_be_entered(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, 'Permission denied')
    monkeypatch.setattr(Path, 'exists', refuse)
    with pytest.raises(UserError, match='cannot be read'):
        find_files(SimpleNamespace(exists=refuse), 'train')


RANK = '''
import os
import utils
from pathlib import Path
from pipeline import files
os.environ.update(LOCAL_RANK=str(rank % 2), LOCAL_WORLD_SIZE='2', XDG_CACHE_HOME={cache!r}.format(node=rank // 2))
{lacking}
for name in ('_scan_folder', '_unchanged'):
    def told(*args, call=getattr(files, name), name=name):
        print(f'{{name}} by {{rank}};', flush=True)
        return call(*args)
    setattr(files, name, told)
utils.init_processes('cpu')
try:
    with files.indexing():
        records, _ = files.load_index(Path({images!r}))
    print(f'{{len(records)}} images for {{rank}};', flush=True)
except utils.UserError as error:
    print(f'error of {{rank}}: {{error}};', flush=True)
utils.leave_processes()
os._exit(0)
'''


def test_each_node_builds_the_index_once_and_rank_zero_alone_looks_whether_it_is_current(tmp_path):
    """Two nodes of two ranks, whose homes are not shared; then homes that are; then nodes with other images."""
    for name in ('a/1.jpg', 'a/2.jpg', 'b/3.jpg'):
        write(tmp_path / 'images' / name)

    def index(cache: str, lacking: str = '') -> list[str]:
        before = RANK.format(cache=str(tmp_path / cache), images=str(tmp_path / 'images'), lacking=lacking)
        said = runs.run((), tmp_path / 'out.txt', world_size=4, before=before)
        return sorted(line.strip() for line in said.replace('\n', ' ').split(';') if ' by ' in line or ' for ' in line
                      or 'error' in line)

    read = [f'3 images for {rank}' for rank in range(4)]
    assert index('cache{node}') == [*read, '_scan_folder by 0', '_scan_folder by 2']
    assert index('cache{node}') == [*read, '_unchanged by 0']
    assert index('shared') == [*read, '_scan_folder by 0']
    write(tmp_path / 'images' / 'b' / '4.jpg')
    read = [f'4 images for {rank}' for rank in range(4)]
    assert index('shared') == [*read, '_scan_folder by 0', '_unchanged by 0']
    said = index('own{node}', lacking='files.is_image = lambda name: name != "4.jpg" or rank < 2')
    assert said[:3] == ['4 images for 0', '4 images for 1', '_scan_folder by 0']
    assert [line.split(':')[0] for line in said if line.startswith('error')] == ['error of 2', 'error of 3']
    assert 'images holds other images here, on ' in said[-1]
