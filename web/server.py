"""Serves the page: to this machine alone unless asked; no file and no address is read for a stranger."""
import contextlib
import os
import re
import signal
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from utils import UserError
from web.models import Limits, Models
from web.page import build

# Of Gradio's routes, those that the page and gradio_client use. `file=` is for uploads and what is shown; Gradio itself
# would also fetch addresses through it, and through `proxy=`. `run` answers only what has no queue: an example's click
DOORS = re.compile(
    r'/|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json)/?|/(assets|static|svelte)/.*|'
    r'/gradio_api/((info|openapi\.json|app_id|queue/join|queue/data|upload|upload_progress|cancel|reset|startup-events|'
    r'theme\.css)/?|heartbeat/\w+|run/\w+|call/.*|file=/.*)')


class Doors:
    """Answers only what the page needs, and refuses what is too large before it is read."""

    def __init__(self, app: ASGIApp, folder: Path, limits: Limits):
        """
        Args:
            folder: in which photographs are kept.
        """
        self._app, self._folder, self._limits = app, folder, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refuse(scope) if scope['type'] == 'http' else None
        await (refusal or self._app)(scope, receive, send)

    def _refuse(self, scope: Scope) -> PlainTextResponse | None:
        if not DOORS.fullmatch(scope['path']):
            return PlainTextResponse('not found', 404)
        if scope['method'] in ('GET', 'HEAD', 'OPTIONS'):
            return None
        length = dict(scope['headers']).get(b'content-length', b'')
        if not length.isdigit():
            return PlainTextResponse('say the length of what you send', 411)
        # The frame of a form around a file has some hundred bytes
        if int(length) > self._limits.file_size + 2**16:
            return PlainTextResponse(f'larger than {self._limits.file_size / 2**20:g} MB', 413)
        if size_of(self._folder) + int(length) > self._limits.room:
            return PlainTextResponse('there are too many photographs at present; try again in some minutes', 503)
        return None


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder, from which others delete some meanwhile."""
    size = 0
    for file in folder.rglob('*'):
        with contextlib.suppress(OSError):
            size += file.stat().st_size
    return size


@contextlib.contextmanager
def opened(models: Models, *, first: str = '', second: str = '', host: str = '127.0.0.1',
           port: int = 7860) -> Iterator[gr.Blocks]:
    """The page, which answers within. Uploads, and what is shown, are files of a folder that then goes.

    Args:
        first, second: the sources that are chosen at first; '' for none.
        host: the address at which it answers; 0.0.0.0 for all.

    Raises:
        UserError: where the port is taken.
    """
    limits = models.limits
    with tempfile.TemporaryDirectory(prefix='moganet-web-') as name:
        folder = Path(name).resolve()
        os.environ |= {'GRADIO_TEMP_DIR': str(folder), 'GRADIO_EXAMPLES_CACHE': str(folder / 'examples'),
                       'GRADIO_ANALYTICS_ENABLED': 'False'}
        page = build(models, first=first, second=second)
        page.queue(max_size=limits.queue, api_open=False)
        try:
            page.launch(server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, ssr_mode=False,
                        max_file_size=limits.file_size, max_threads=8, footer_links=['api'], share=False,
                        mcp_server=False, enable_monitoring=False, run_history=False,
                        app_kwargs={'middleware': [Middleware(Doors, folder=folder, limits=limits)]})
        except OSError:
            raise UserError(f'port {port} of {host} is taken; give another by --port') from None
        try:
            yield page
        finally:
            page.close(verbose=False)


def serve(sources: Sequence[str], *, chosen: int = 2, host: str = '127.0.0.1', port: int = 7860,
          limits: Limits | None = None, **others: Any) -> None:
    """Serves the page until it is interrupted.

    Args:
        sources: checkpoints: paths, https URLs or `released:NAME`.
        chosen: how many of them are shown at first, side by side; the others may be chosen.
        others: as of `Models`: exif, and what `Predictor` takes.

    Raises:
        UserError: where a checkpoint cannot be read, or the port is taken.
    """
    models = Models(sources, limits=limits or Limits(), **others)
    first, second = (*models.sources[:chosen], '', '')[:2]
    for source in filter(None, (second, first)):  # the first is the one that stays in memory
        models.load(source)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the folder shall go then too
    with opened(models, first=first, second=second, host=host, port=port) as page:
        print(f'http://{host}:{port}', flush=True)
        page.block_thread()
