"""The page `python -m web`: predict.py's answers to the last digit, its bounds, and a real browser that uses it."""
import asyncio
import dataclasses
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import predict
import recipes
from builders import encoded, seeded, training_file
from conftest import ROOT
from recipes import RECIPES, Run
from tasks import create_task
from utils import UserError

gradio = pytest.importorskip('gradio', reason="gradio is not installed: pip install -e '.[web]'")
gradio_client = pytest.importorskip('gradio_client')
from web import models as web_models  # noqa: E402, after what may be missing
from web import page as web_page  # noqa: E402
from web import server  # noqa: E402
from web.__main__ import main as web_main  # noqa: E402

pytestmark = [pytest.mark.web, pytest.mark.usefixtures('one_thread', 'own_cache')]
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')
WAIT = 30_000  # milliseconds for whatever the browser waits for, on a machine that others share

# Notes each address that the server binds, looks up or connects to, and runs the page
WATCHED = '''
import runpy, sys
def watch(event, args):
    if event in ('socket.connect', 'socket.bind', 'socket.sendto'):
        address = args[1]
    elif event == 'socket.getaddrinfo':
        address = args[:2]
    else:
        return
    if isinstance(address, tuple):
        print(event, address[0], file=notes, flush=True)
notes = open(sys.argv.pop(1), 'w')
sys.addaudithook(watch)
runpy.run_module('web', run_name='__main__', alter_sys=True)
'''


def free_port() -> int:
    with socket.socket() as one:
        one.bind(('127.0.0.1', 0))
        return one.getsockname()[1]


def save(path: Path, row: str, classes: list[str], **fields: Any) -> Path:
    """A checkpoint of a tiny untrained network of a row, which finds things nevertheless."""
    recipe = dataclasses.replace(RECIPES[row], num_classes=len(classes), **fields)
    task = create_task(recipe, Run(device='cpu'))
    model = task.build_model()
    for name, parameter in model.named_parameters():
        if name.endswith('retina_cls.bias'):  # begins at a score of 0.01 for every box
            torch.nn.init.normal_(parameter, -2, 1)
    torch.save({'version': 1, 'model': model.state_dict(), 'recipe': recipes.to_dict(recipe), 'classes': classes}, path)
    return path


TINY = {'model_kwargs': {'dims': [8, 8, 16, 16], 'depths': [1, 1, 1, 1], 'ffn_ratios': [2, 2, 2, 2]}}


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """Checkpoints, and photographs of all kinds."""
    folder = tmp_path_factory.mktemp('web')
    training_file(folder / 'xt.pth', seeded(0), None)
    save(folder / 'small.pth', 'moganet_xtiny_digits', [f'small {i}' for i in range(10)], **TINY)
    save(folder / 'boxes.pth', 'retinanet_moganet_digits', [f'box {i}' for i in range(4)], **TINY)
    save(folder / 'labels.pth', 'semantic_fpn_moganet_digits', [f'label {i}' for i in range(4)], **TINY)
    return folder


@pytest.fixture(scope='module')
def photographs(folder: Path) -> dict[str, Path]:
    """Photographs by kind, in files."""
    rng = np.random.default_rng(0)
    color = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((400, 300), Image.Resampling.BICUBIC)
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = Image.fromarray(np.asarray(color.convert('L')).astype(np.uint16) * 257 - 3)
    clear = color.copy()
    clear.putalpha(color.convert('L'))
    files = {'exif.jpg': encoded(color, exif=turned), 'grey.jpg': encoded(color.convert('L')),
             'rgba.png': encoded(clear, 'PNG'), 'cmyk.jpg': encoded(color.convert('CMYK')),
             '16 bit.png': encoded(deep, 'PNG'), 'palette.gif': encoded(color, 'GIF'),
             'webp.webp': encoded(color, 'WEBP', lossless=True), 'bmp.bmp': encoded(color, 'BMP'),
             'tiff.tif': encoded(color, 'TIFF')}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return {Path(name).stem: folder / name for name in files} | {
        Path(path).stem: Path(path) for path in web_page.examples()}


@pytest.fixture(scope='module')
def page(folder: Path) -> Iterator[SimpleNamespace]:
    """The page in a process of its own: url, process, seconds until it was ready, addresses it used."""
    port, notes, said = free_port(), folder / 'addresses.txt', folder / 'said.txt'
    sources = [str(folder / f'{name}.pth') for name in ('xt', 'small', 'boxes', 'labels')]
    begin = time.monotonic()
    with open(said, 'w') as output:
        process = subprocess.Popen(
            [sys.executable, '-c', WATCHED, str(notes), '--port', str(port), '--device', 'cpu', '--checkpoint',
             *sources], cwd=folder, env=os.environ | {'OMP_NUM_THREADS': '1', 'TMPDIR': str(folder)}, stdout=output,
            stderr=subprocess.STDOUT)
    url = f'http://127.0.0.1:{port}'
    try:
        while url not in said.read_text():
            assert process.poll() is None and time.monotonic() < begin + 400, said.read_text()
            time.sleep(0.1)
        yield SimpleNamespace(url=url, port=port, process=process, notes=notes, said=said, sources=sources,
                              seconds=time.monotonic() - begin)
    finally:
        process.terminate()
        assert process.wait(timeout=60) in (0, -signal.SIGTERM, 130), said.read_text()
    assert not list(folder.glob('moganet-web-*')), 'its folder stayed'


@pytest.fixture(scope='module')
def client(page: SimpleNamespace) -> Any:
    return gradio_client.Client(page.url, verbose=False, download_files=str(Path(page.said).parent / 'downloads'))


def predicted(capsys: pytest.CaptureFixture, path: Path, source: str, *words: str) -> list[dict[str, Any]]:
    """What `predict.py --json` says of an image."""
    capsys.readouterr()
    assert predict.main([str(path), '--checkpoint', source, '--device', 'cpu', '--json', *words]) == 0
    return json.loads(capsys.readouterr().out)[0]['predictions']


def ask(client: Any, path: Path | str, endpoint: str = '/classify', **others: Any) -> Any:
    return client.predict(gradio_client.handle_file(str(path)), api_name=endpoint, **others)


# ---- The same answers -----------------------------------------------------------------------------------------------

def test_probabilities_equal_those_of_predict_to_the_last_digit(client, page, photographs, capsys):
    assert len(photographs) == 15
    for path in photographs.values():
        for source in page.sources[:2]:
            assert ask(client, path, checkpoint=source) == predicted(capsys, path, source), path
    path = photographs['exif']
    turned = predicted(capsys, path, page.sources[0], '--exif', '--topk', '3')
    assert ask(client, path, exif=True, topk=3) == turned != predicted(capsys, path, page.sources[0], '--topk', '3')


def test_detect_and_segment_answer_as_predict_does(client, page, photographs, capsys, tmp_path):
    path, (*_, boxes, labels) = photographs['exif'], page.sources
    found = ask(client, path, '/detect')
    assert found == predicted(capsys, path, boxes) and len(found) > 10
    assert ask(client, path, '/detect', topk=2) == found[:2]
    shares, drawn = ask(client, path, '/segment', topk=3)
    assert shares == predicted(capsys, path, labels, '--labels', str(tmp_path), '--topk', '3')
    assert np.array_equal(np.asarray(Image.open(drawn)), np.asarray(Image.open(tmp_path / 'exif.png')))


def test_endpoints_are_named_and_typed(client):
    endpoints = client.view_api(return_format='dict', print_info=False)['named_endpoints']
    assert set(endpoints) == {'/classify', '/detect', '/segment'}
    for endpoint in endpoints.values():
        types = {one['parameter_name']: one['python_type']['type'] for one in endpoint['parameters']}
        assert types.pop('checkpoint').startswith('Literal')
        assert types == {'image': 'filepath', 'topk': 'int', 'exif': 'bool'}


# ---- Its bounds -----------------------------------------------------------------------------------------------------

def bomb() -> bytes:
    """A PNG of 400 megapixels in 50 kB."""
    return encoded(Image.new('1', (20_000, 20_000)), 'PNG')


@pytest.mark.parametrize('name, content, said', [
    ('broken.jpg', b'\xff\xd8\xff\xe0 no photograph', 'Truncated File Read'),
    ('cut.png', encoded(form='PNG')[:2000], ''),
    ('text.txt', b'hello', 'is no image'),
    ('drawing.eps', encoded(form='EPS'), 'is a EPS file; give one of JPEG'),
    ('bomb.png', bomb(), 'more than 50 million'),
    ('large.tif', encoded(Image.new('1', (8_000, 7_000)), 'TIFF', compression='group4'), 'has 8000 x 7000 pixels')])
def test_bad_file_gives_one_line_and_the_page_lives(name, content, said, client, folder):
    (folder / name).write_bytes(content)
    with pytest.raises(gradio_client.exceptions.AppError) as caught:
        ask(client, folder / name)
    assert said in str(caught.value) and '\n' not in str(caught.value) and str(folder) not in str(caught.value)
    assert len(ask(client, next(iter(web_page.examples())))) == 5


@pytest.mark.parametrize('others, said', [
    ({'topk': 0}, 'less than minimum value 1'), ({'checkpoint': '/etc/passwd'}, 'not in the list of choices'),
    ({'checkpoint': 'boxes'}, 'not in the list of choices')])
def test_wrong_arguments_give_one_line(others, said, client, page, photographs):
    others = {name: page.sources[2] if value == 'boxes' else value for name, value in others.items()}
    with pytest.raises(gradio_client.exceptions.AppError, match=said):
        ask(client, photographs['grey'], **others)


def request(page: SimpleNamespace, method: str, path: str, body: Any = None,
            headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    """The status and the answer of a request whose path is sent as it is written."""
    connection = http.client.HTTPConnection('127.0.0.1', page.port, timeout=60)
    connection.request(method, path, body, headers or {})
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_no_file_of_the_server_is_read_for_a_stranger(page, folder):
    secret = folder / 'secret.png'
    secret.write_bytes(encoded(form='PNG'))
    ways = [f'/gradio_api/file={path}' for path in (
        secret, '/etc/passwd', f'{folder}/../{folder.name}/secret.png', '../secret.png', ROOT / 'predict.py',
        page.sources[0], f'file://{secret}', 'http://127.0.0.1:1/x', 'https://example.org/x.png')]
    kept, = folder.glob('moganet-web-*')
    ways += [f'/gradio_api/file={kept}/../secret.png', f'/gradio_api/file={kept}/%2e%2e/secret.png',
             f'/gradio_api/file={kept}/..%2fsecret.png', '/gradio_api/file/etc/passwd', '/file=/etc/passwd',
             '/static/../../../../../../etc/passwd', '/assets/..%2f..%2f..%2f..%2f..%2fetc%2fpasswd',
             '/gradio_api/proxy=https://example.org/', '/gradio_api/custom_component/a/client/component/../x',
             '/monitoring', '/gradio_api/vibe-code', '/gradio_api/deep_link', '/gradio_api/runs', '/svelte/../x']
    for way in ways:
        status, answer = request(page, 'GET', way)
        assert status in (403, 404) and b'root:' not in answer and b'PNG' not in answer, way


@pytest.mark.parametrize('path', ['SECRET', '/etc/passwd', 'KEPT/../secret.png', 'https://example.org/x.png',
                                  'http://127.0.0.1:1/x.png'])
def test_no_path_and_no_address_is_taken_for_an_upload(path, page, folder):
    (folder / 'secret.png').write_bytes(encoded(form='PNG'))
    kept, = folder.glob('moganet-web-*')
    path = path.replace('SECRET', str(folder / 'secret.png')).replace('KEPT', str(kept))
    for extra in ({}, {'url': path}):
        data = [{'path': path, 'meta': {'_type': 'gradio.FileData'}} | extra, page.sources[0], 5, False]
        status, answer = request(page, 'POST', '/gradio_api/call/classify', json.dumps({'data': data}),
                                 {'Content-Type': 'application/json'})
        assert status == 200
        status, answer = request(page, 'GET', f'/gradio_api/call/classify/{json.loads(answer)["event_id"]}')
        assert b'event: error' in answer and b'probability' not in answer, answer


def test_uploads_are_refused_that_are_too_large_or_of_unknown_length(page):
    def upload(size: int, headers: dict[str, str]) -> int:
        form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n'
        try:
            return request(page, 'POST', '/gradio_api/upload', form + bytes(size) + b'\r\n--x--\r\n',
                           {'Content-Type': 'multipart/form-data; boundary=x'} | headers)[0]
        except (BrokenPipeError, ConnectionResetError):  # it is refused before it is sent
            return 413
    assert upload(1000, {}) == 200
    assert upload(30 * 2**20, {}) == 413
    status, _ = request(page, 'POST', '/gradio_api/upload', iter([b'x']), {
        'Content-Type': 'multipart/form-data; boundary=x', 'Transfer-Encoding': 'chunked'})
    assert status == 411


def test_no_call_passes_by_the_queue(page, photographs):
    config = json.loads(request(page, 'GET', '/config')[1])
    number, = (one['id'] for one in config['dependencies'] if one['api_name'] == 'classify')
    image = {'path': str(photographs['grey']), 'meta': {'_type': 'gradio.FileData'}}
    for name in ('classify', 'predict'):
        body = {'data': [image, page.sources[0], 5, True], 'fn_index': number}
        status, answer = request(page, 'POST', f'/gradio_api/run/{name}', json.dumps(body),
                                 {'Content-Type': 'application/json'})
        assert status == 404 and b'queue' in answer, answer


def test_photographs_are_refused_when_there_is_no_room(tmp_path):
    doors = server.Doors(None, tmp_path, web_models.Limits(room=2000))
    scope = {'type': 'http', 'path': '/gradio_api/upload', 'method': 'POST', 'headers': [(b'content-length', b'1000')]}
    (tmp_path / 'kept').write_bytes(bytes(1000))
    assert doors._refuse(scope) is None
    (tmp_path / 'kept').write_bytes(bytes(1001))
    assert doors._refuse(scope).status_code == 503


def resident(process: subprocess.Popen) -> float:
    """MB of memory that a process has at present."""
    text = Path(f'/proc/{process.pid}/status').read_text()
    return int(re.search(r'VmRSS:\s+(\d+)', text)[1]) / 1024


def test_twenty_calls_at_once_are_answered_in_bounded_memory(client, page, photographs, capsys, record_property):
    paths = list(photographs.values()) * 2
    paths = paths[:20]
    expected = {path: predicted(capsys, path, page.sources[0]) for path in set(paths)}
    ask(client, paths[0])
    before, most = resident(page.process), 0.0
    with ThreadPoolExecutor(20) as pool:
        jobs = [pool.submit(ask, client, path) for path in paths]
        while not all(job.done() for job in jobs):
            most = max(most, resident(page.process))
            time.sleep(0.02)
    assert [job.result(timeout=1) for job in jobs] == [expected[path] for path in paths]
    print(f'memory: {before:.0f} MB before, at most {most:.0f} MB under 20 calls')
    record_property('memory', f'{before:.0f} to {most:.0f} MB')
    assert most < before + 400  # one photograph and one forward pass at a time; 20 at once would be 20 times as many


def test_an_answer_ends_after_its_time_and_the_next_is_given(folder, photographs):
    models = web_models.Models([str(folder / 'small.pth')], limits=web_models.Limits(seconds=0), device='cpu')
    path = str(photographs['grey'])

    def work(predictor: predict.Predictor) -> Any:
        return models.look(predictor, path, exif=False).result
    with pytest.raises(web_models.Refused, match='took longer than 0 s'):
        asyncio.run(models.ask(models.sources[0], work))
    models.limits = web_models.Limits()
    assert len(asyncio.run(models.ask(models.sources[0], work))) == 10


def test_one_model_is_in_memory_whatever_is_asked(folder, photographs):
    import gc
    import weakref
    models = web_models.Models([str(folder / f'{name}.pth') for name in ('small', 'boxes')],
                               limits=web_models.Limits(), device='cpu')
    first = weakref.ref(models.load(models.sources[0]).model)
    models.load(models.sources[1])
    gc.collect()
    assert first() is None


def test_queue_has_a_length(folder, photographs, monkeypatch):
    for name in ('GRADIO_TEMP_DIR', 'GRADIO_EXAMPLES_CACHE', 'GRADIO_ANALYTICS_ENABLED'):
        monkeypatch.setenv(name, '')
    going_on, port = threading.Event(), free_port()
    models = web_models.Models([str(folder / 'small.pth')], limits=web_models.Limits(queue=3), device='cpu')
    look = models.look
    monkeypatch.setattr(models, 'look', lambda *a, **b: going_on.wait(60) and look(*a, **b))
    with server.opened(models, port=port), ThreadPoolExecutor(8) as pool:
        client = gradio_client.Client(f'http://127.0.0.1:{port}', verbose=False)
        jobs = [pool.submit(ask, client, photographs['grey']) for _ in range(8)]
        while not any(job.done() for job in jobs):
            time.sleep(0.05)
        time.sleep(1)
        going_on.set()
        errors = [job.exception(timeout=60) for job in jobs]
    # One computes, three wait
    assert [bool(error) for error in errors].count(True) in (4, 5), errors
    assert all('queue' in str(error).lower() for error in errors if error)


# ---- How it starts --------------------------------------------------------------------------------------------------

def test_wrong_starts_give_one_line(folder, capsys):
    with pytest.raises(UserError, match=r'none\.pth'):
        web_main(['--checkpoint', str(folder / 'none.pth'), '--device', 'cpu'])
    with pytest.raises(UserError, match='--port 0'):
        web_main(['--port', '0'])
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f'port {port} of 127.0.0.1 is taken; give another by --port'):
            web_main(['--checkpoint', str(folder / 'small.pth'), '--device', 'cpu', '--port', str(port)])


def test_without_a_checkpoint_the_demos_is_shown_or_the_released_ones_are_offered(folder, monkeypatch):
    started = []
    monkeypatch.setattr(server, 'serve', lambda sources, **others: started.append((sources, others)))
    monkeypatch.setattr('web.__main__.DEMO', folder / 'small.pth')
    web_main(['--exif', '--weights', 'raw', '--host', '0.0.0.0'])
    monkeypatch.setattr('web.__main__.DEMO', folder / 'none.pth')
    web_main([])
    (demo, flags), (offered, others) = started
    assert demo == [str(folder / 'small.pth')]
    assert (flags['exif'], flags['weights'], flags['host'], flags['chosen']) == (True, 'raw', '0.0.0.0', 1)
    assert 'released:moganet_small' in offered and (others['exif'], others['host'], others['chosen']) == (
        False, '127.0.0.1', 0)
    page = web_page.build(web_models.Models(offered, limits=web_models.Limits()))  # which downloads none of them
    endpoints = page.get_api_info()['named_endpoints']
    assert set(endpoints) == {'/classify', '/detect', '/segment'}
    assert 'released:retinanet_moganet_tiny_1x' in str(endpoints['/detect']['parameters'][1])


# ---- In a browser ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def browser(page: SimpleNamespace) -> Iterator[Any]:
    sync_api = pytest.importorskip('playwright.sync_api', reason="pip install -e '.[test-web]'")
    if CHROMIUM is None:
        pytest.skip('chromium is not installed: apt-get install chromium')
    with sync_api.sync_playwright() as playwright:
        # Its sandbox cannot run as root
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[
            '--no-sandbox', '--use-fake-device-for-media-stream', '--use-fake-ui-for-media-stream'])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser: Any, page: SimpleNamespace, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page in a new window, of which all requests stay here and the console shows no error."""
    context = browser.new_context(viewport=getattr(request, 'param', {'width': 1400, 'height': 1000}))
    context.set_default_timeout(WAIT)
    tab, asked, errors = context.new_page(), [], []
    tab.on('request', lambda one: asked.append(one.url))
    tab.on('console', lambda one: errors.append(f'{one.text} {one.location}') if one.type == 'error' else None)
    tab.on('pageerror', lambda error: errors.append(str(error)))
    tab.goto(page.url)
    tab.get_by_text('What a network sees').wait_for()
    yield tab
    shot(tab, request.node.name)
    context.close()
    assert not [url for url in asked if not url.startswith((page.url, 'blob:', 'data:'))]
    assert not errors


def shot(tab: Any, name: str) -> None:
    """A screenshot for people, where SCREENSHOTS names a folder."""
    if os.environ.get('SCREENSHOTS'):
        tab.screenshot(path=Path(os.environ['SCREENSHOTS'], re.sub(r'\W+', '_', name) + '.png'), full_page=True)


def give(tab: Any, path: Path | str) -> None:
    """Uploads a photograph, in place of the one before."""
    clear = tab.get_by_label('Clear', exact=True).or_(tab.get_by_label('Remove Image')).first
    if clear.is_visible():
        clear.click()
    tab.locator('input[type=file]').first.set_input_files(str(path))


def answers(tab: Any, *, panel: int = 0) -> Any:
    """The text box with a panel's answer as JSON, once the part that holds it is open."""
    part = tab.locator('.answer').nth(panel)
    part.wait_for()
    box = part.locator('textarea')
    if not box.is_visible():
        part.get_by_text('As predict.py --json prints it').click()
    return box


def shows(tab: Any, expected: Any, *, panel: int = 0) -> None:
    from playwright.sync_api import expect
    expect(answers(tab, panel=panel)).to_have_value(json.dumps(expected, indent=1), timeout=WAIT)


def test_every_kind_of_photograph_is_uploaded_and_answered_by_both_checkpoints(tab, page, photographs, capsys):
    for kind in ('exif', 'grey', 'rgba', 'cmyk', '16 bit'):
        give(tab, photographs[kind])
        for panel in (0, 1):
            shows(tab, predicted(capsys, photographs[kind], page.sources[panel]), panel=panel)
    tab.get_by_label('Turn it as its EXIF data say').check()
    give(tab, photographs['exif'])
    shows(tab, predicted(capsys, photographs['exif'], page.sources[0], '--exif'))


def test_example_is_shown_with_its_crop_its_maps_and_a_line_on_the_model(tab, page, capsys):
    tab.locator('.gallery-item, .gallery button').first.click()
    path = Path(next(iter(web_page.examples())))
    shows(tab, predicted(capsys, path, page.sources[0]))
    line = tab.get_by_text(re.compile(r'ema weights|raw weights')).first.inner_text()
    assert re.search(r'xt\.pth: \w+ weights, .*double gate; moganet_xtiny, .*at 256, crop 0\.8.*; \d+ ms', line), line
    assert tab.get_by_text('CC BY 2.0').count()


def images_of(tab: Any) -> list[bytes]:
    """The pictures that the first panel shows: the crop, the heat map, the parts of the aggregation."""
    urls = tab.locator('.maps img').evaluate_all('found => found.map(one => one.src)')
    return [tab.request.get(url).body() for url in urls]


def test_heat_map_is_of_the_chosen_class_and_stage(tab, page, folder, photographs):
    give(tab, photographs['chelsea'])
    tab.get_by_text(re.compile(r'xt\.pth: ')).first.wait_for()
    tab.wait_for_timeout(2000)
    before = images_of(tab)
    tab.get_by_label('Heat map of the class').first.fill('class 7')
    tab.get_by_role('option', name='class 7', exact=True).first.click()
    changed(tab, before)
    second = images_of(tab)
    tab.get_by_label('2', exact=True).first.check()
    changed(tab, second)
    assert images_of(tab)[0] == before[0] != before[1]  # the crop stays


def changed(tab: Any, before: list[bytes]) -> None:
    """Waits until other maps are shown."""
    end = time.monotonic() + WAIT / 1000
    while images_of(tab) == before:
        assert time.monotonic() < end
        tab.wait_for_timeout(200)


def test_another_checkpoint_is_chosen_and_finds_boxes_and_labels(tab, page, photographs, capsys):
    give(tab, photographs['grey'])
    shows(tab, predicted(capsys, photographs['grey'], page.sources[1]), panel=1)
    for source in page.sources[2:]:
        tab.get_by_label('Second checkpoint').click()
        tab.get_by_role('option', name=source).last.click()
        shows(tab, predicted(capsys, photographs['grey'], source), panel=1)
        shot(tab, Path(source).stem)
    assert tab.get_by_label('In words').last.input_value().count('label')


def test_webcam_gives_a_photograph(tab):
    tab.get_by_label('Capture from camera').or_(tab.get_by_label('webcam')).first.click()
    tab.get_by_text('Click to Access Webcam').click()
    tab.get_by_label('capture photo').or_(tab.get_by_text('Capture', exact=True)).first.click()
    tab.get_by_text(re.compile(r'xt\.pth: ')).first.wait_for()


def test_broken_and_too_large_files_are_refused_in_a_line_and_the_page_lives(tab, page, folder, photographs, capsys):
    (folder / 'bad.jpg').write_bytes(b'no photograph')
    (folder / 'large.png').write_bytes(encoded(form='PNG') + bytes(30 * 2**20))
    give(tab, folder / 'bad.jpg')
    tab.get_by_text('is no image, or of a format that Pillow does not know').first.wait_for()
    give(tab, photographs['grey'])
    shows(tab, predicted(capsys, photographs['grey'], page.sources[0]))


@pytest.mark.parametrize('tab', [{'width': 390, 'height': 844}], indirect=True)
def test_on_a_phone_nothing_is_wider_than_the_window(tab, photographs, page, capsys):
    give(tab, photographs['astronaut'])
    shows(tab, predicted(capsys, photographs['astronaut'], page.sources[0]))
    assert tab.evaluate('document.documentElement.scrollWidth') <= 390


def test_keyboard_alone_suffices(tab, page, capsys):
    for _ in range(40):
        tab.keyboard.press('Tab')
        if tab.evaluate("document.activeElement.closest('.gallery, .gallery-item') !== null"):
            break
    tab.keyboard.press('Enter')
    path = Path(next(iter(web_page.examples())))
    tab.get_by_text(re.compile(r'xt\.pth: ')).first.wait_for()
    for _ in range(90):  # a list that closes may leave the focus with the whole page for one step
        tab.keyboard.press('Tab')
        if tab.evaluate("document.activeElement.matches('button') && "
                        "document.activeElement.innerText.includes('predict.py --json')"):
            break
    tab.keyboard.press('Enter')
    from playwright.sync_api import expect
    expect(tab.locator('.answer textarea').first).to_have_value(
        json.dumps(predicted(capsys, path, page.sources[0]), indent=1), timeout=WAIT)


def test_the_server_has_talked_to_this_machine_alone(page):
    """The last: of all that the tests above did."""
    used = {line.split()[1] for line in page.notes.read_text().splitlines()}
    assert '127.0.0.1' in used
    assert used <= {'127.0.0.1', 'localhost', '::1'}, used
    print(f'ready after {page.seconds:.1f} s; addresses: {used}')
    # What Gradio refuses before a handler sees it; a handler's refusals are lines for the browser alone
    raised = re.findall(r'^ *([\w.]+(?:Error|Exception)):', page.said.read_text(), re.MULTILINE)
    assert set(raised) <= {'gradio.exceptions.Error', 'gradio.exceptions.InvalidPathError'}, page.said.read_text()
