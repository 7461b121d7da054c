"""Files from the network, fetched once into torch's hub cache, whole or not at all."""
import contextlib
import hashlib
import json
import os
import ssl
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from utils import UserError, write_atomically, write_json

PATIENCE = 86400  # seconds that a process waits for another's download


def _note(path: Path) -> Path:
    """Where a downloaded file's address, size and hash are kept."""
    return path.with_name(f'{path.name}.json')


def remembered(path: Path) -> dict[str, Any]:
    """A downloaded file's `url`, `bytes` and `sha256`; nothing of a file that was put there by hand."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(_note(path).read_text())
    return {}


def forget(path: Path) -> None:
    """Removes a downloaded file that turned out to be useless, so that the next call fetches it again."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
        _note(path).unlink(missing_ok=True)


def download(url: str) -> Path:
    """A URL's file in torch's hub cache, fetched unless it is there. A file put there by hand is taken as it is.

    Raises:
        UserError: unreachable, not a file, broken off for good, or another hash than the URL's `#sha256=`.
    """
    url, _, wanted = url.partition('#sha256=')
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != 'https' and parts.hostname not in ('127.0.0.1', 'localhost'):
        raise UserError(f'{url}: plain http can be altered on its way: use https')
    name = Path(urllib.parse.unquote(parts.path)).name
    if name in ('', '..'):
        raise UserError(f'{url}: names no file')
    path = Path(torch.hub.get_dir()) / 'checkpoints' / name
    if _is_cached(path, url, wanted):
        return path
    # torchrun starts many processes at once: on each node one fetches, the others wait and find the file. The lock is a
    # local file, since not every shared file system has locks; two nodes may both fetch, and the last rename stands.
    key = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    lock = Path(tempfile.gettempdir()) / f'moganet-{getattr(os, "getuid", int)()}-{key}.lock'
    try:
        with FileLock(lock, timeout=PATIENCE):
            if not _is_cached(path, url, wanted):
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(path, lambda file: _fetch(url, file, wanted, path))
                    facts = {'url': url, 'bytes': path.stat().st_size, 'sha256': sha256_of(path)}
                    write_json(_note(path), facts)
                except OSError as error:
                    raise UserError(f'cannot write {path}: {error.strerror or error}') from None
                print(f'{path}: {facts["bytes"]:,} bytes, sha256 {facts["sha256"]}', file=sys.stderr)
    except Timeout:
        raise UserError(f'{url}: another process has been downloading this file for {PATIENCE} s; end that process '
                        f'(it holds {lock})') from None
    return path


def _is_cached(path: Path, url: str, wanted: str) -> bool:
    """Whether the cache's file is whole and the one asked for, as far as size and hash are known."""
    known = remembered(path)
    wanted = wanted.lower() or known.get('sha256', '')
    return path.is_file() and known.get('url', url) == url and (not wanted or sha256_of(path) == wanted)


def _fetch(url: str, file: BinaryIO, wanted: str, path: Path) -> None:
    """Downloads with a progress bar on stderr, taking a broken-off transfer up again where it stopped, three times."""
    cure = f'download it elsewhere and put it at {path}, or give its path'
    print(f'downloading {url}', file=sys.stderr)
    done, digest = 0, hashlib.sha256()
    with tqdm(desc=path.name, unit='B', unit_scale=True, leave=False, disable=None) as bar:
        for _ in range(4):
            request = urllib.request.Request(url, headers={'Range': f'bytes={done}-'} if done else {})
            try:
                with urllib.request.urlopen(request, timeout=30) as reply:
                    if url.startswith('https:') and not reply.url.startswith('https:'):
                        raise UserError(f'{url}: sends on to plain {reply.url}: refused')
                    if reply.headers.get_content_type() == 'text/html':
                        raise UserError(f'{url}: answers with a web page, not a file: give the link of the file itself')
                    if done and reply.status != 206:  # the server starts over
                        done, digest = 0, hashlib.sha256()
                        file.seek(0)
                        file.truncate()
                    length = reply.headers.get('Content-Length')
                    total = done + int(length) if length else None
                    bar.reset(total)
                    bar.update(done)
                    while block := reply.read(1 << 20):
                        file.write(block)
                        digest.update(block)
                        done += len(block)
                        bar.update(len(block))
                if total is None or done == total:
                    break
                failure = 'the connection closed'
            except urllib.error.HTTPError as error:
                raise UserError(f'{url}: the server answers {error.code} {error.reason}: check the address') from None
            except urllib.error.URLError as error:
                raise UserError(f'{url}: cannot be reached ({error.reason}): {cure}') from None
            except (HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
                failure = type(error).__name__
        else:
            raise UserError(f'{url}: broke off four times, at last after {done:,} bytes ({failure}), and nothing was '
                            f'kept: try again later, or {cure}')
    if wanted and digest.hexdigest() != wanted.lower():
        raise UserError(f'{url}: its sha256 is {digest.hexdigest()}, not {wanted} as asked for; nothing was kept: '
                        'check the address and the hash')


def sha256_of(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
