"""The process that fetches a model's files into the Hub's cache: asked on its standard input, it tells on its output.

A process of its own, so that a download can be ended at any moment, one that stalls too; what it had fetched stays in
the cache, and the next one goes on from there. It imports nothing else of this package. ``hub.py`` starts it.

Asked: one JSON object with ``repository`` and ``files``, [name, revision] each. Tells one JSON object a line, with
``at``, the file's number: ``here``, its bytes so far, twice a second; ``place``, its path once it is whole; ``error``,
a class of exception. Asked with ``revision`` and ``patience``, seconds, and no ``files``, it tells what there are:
``files``, bytes by name, and ``commit``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from filelock import FileLock
from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    get_session,
    hf_hub_download,
    hf_hub_url,
)
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
from tqdm import tqdm

PART = ".part"  # ends the name of what has come of a file so far
_BEAT = 0.5  # seconds between two reports of a file under way
_TRIES = 3
_PIECE = 1 << 20  # bytes that are written at a time
_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]*")  # of a file's content, as the cache names it
_SHA256 = re.compile(r"[0-9a-f]{64}")  # the name of a large file's: its own hash


class _Silent(tqdm):
    """A progress bar that draws nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("name", None)
        super().__init__(*args, **{**kwargs, "disable": True})


def _tell(**what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def _weights(repository: str, name: str, revision: str | None, here: list[int]) -> None:
    """Fetch a file's content to where the cache looks for it, going on from what an earlier process left.

    The Hub's library begins a file anew in every process. ``here[0]`` counts the bytes.
    """
    url = hf_hub_url(repository, name, revision=revision)
    found = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    if not found.size or not _NAME.fullmatch(found.etag or ""):
        return  # left to the library
    whole = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "blobs" / str(found.etag)
    part = whole.with_name(f"{whole.name}{PART}")
    whole.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{part}.lock"):
        failure: Exception | None = None
        before, vain = 0, 0  # bytes at the last look, and tries since then that brought none
        while not whole.exists():
            size = part.stat().st_size if part.exists() else 0
            before, vain = max(before, size), 0 if size > before else vain + 1
            if size == found.size:
                if _is_named(part, str(found.etag)):
                    part.replace(whole)
                else:  # some proxy's page among it, say: begun anew
                    part.unlink()
                    before, failure = 0, ConnectionError("what came is not what the Hub had told of")
            elif size > found.size:
                part.unlink()
                raise ConnectionError("more came than the Hub had told of")
            elif vain > _TRIES:
                raise failure or ConnectionError("it did not come whole")
            else:
                try:
                    _go_on(url, found.location, part, size, found.size, here)
                except Exception as error:  # a connection that breaks leaves what came
                    failure = error


def _is_named(part: Path, name: str) -> bool:
    """Whether a file's content is the one of that name, where the name says."""
    if not _SHA256.fullmatch(name):
        return True
    with part.open("rb") as file:
        return _sha256(file) == name


def _sha256(file: BinaryIO) -> str:
    found = hashlib.sha256()
    while piece := file.read(_PIECE):
        found.update(piece)
    return found.hexdigest()


def _go_on(url: str, location: str, part: Path, start: int, most: int, here: list[int]) -> None:
    """Ask for the rest of a file, which has ``most`` bytes."""
    headers = {**build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes={start}-"}
    if urlsplit(url).netloc != urlsplit(location).netloc:
        headers.pop("authorization", None)  # the token is for the Hub alone
    with get_session().stream("GET", location, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as answer:
        answer.raise_for_status()
        told = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
        start = int(told[1]) if answer.status_code == 206 and told is not None and int(told[1]) <= start else 0
        if answer.headers.get("Content-Length", str(most - start)) != str(most - start):
            raise ConnectionError("another file was sent")  # before it takes the place of what is here
        with part.open("r+b" if start else "wb") as file:
            file.seek(start)
            for piece in answer.iter_bytes(_PIECE):
                file.write(piece)
                here[0] = file.tell()
                if here[0] > most:  # told by the caller, who deletes it
                    return


def _fetch(repository: str, at: int, name: str, revision: str | None) -> bool:
    """Fetch one file; whether that went well."""
    done, here = threading.Event(), [0]

    def beat() -> None:
        try:
            while not done.wait(_BEAT):
                _tell(at=at, here=here[0])
        except OSError:  # nobody listens any more
            os._exit(1)

    threading.Thread(target=beat, daemon=True).start()
    try:
        if name.endswith(".safetensors"):
            _weights(repository, name, revision, here)
        place = hf_hub_download(repository, name, revision=revision, tqdm_class=_Silent)
    except Exception as error:  # whatever the libraries make of a connection that broke
        _tell(at=at, error=type(error).__name__)
        return False
    finally:
        done.set()
    _tell(at=at, place=place)
    return True


def _list(repository: str, revision: str | None, patience: float) -> bool:
    """Tell what files a repository has; whether that went well. Twice ``patience`` seconds bound the whole of it."""
    end = threading.Timer(2 * patience, os._exit, (1,))  # the library's own patience is for each read
    end.daemon = True
    end.start()
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=patience)
        files = {str(one.rfilename): int(one.size or 0) for one in info.siblings or []}
    except Exception as error:  # away, too slow, or answering nonsense: whatever the libraries make of it
        _tell(at=0, error=type(error).__name__)
        return False
    _tell(at=0, files=files, commit=info.sha)
    return True


def main() -> int:
    """Fetch what was asked for, file by file, or list it; 1 if something could not be had."""
    asked = json.load(sys.stdin)
    if "files" not in asked:
        return int(not _list(asked["repository"], asked["revision"], asked["patience"]))
    return int(not all(_fetch(asked["repository"], at, *file) for at, file in enumerate(asked["files"])))


if __name__ == "__main__":
    sys.exit(main())
