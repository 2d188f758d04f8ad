"""Models on the Hub: fetched into the Hub's own cache, file by file, with progress, and only files that are read here.

What is in the cache already is used when the Hub is away. A download that is broken off goes on where it stopped. It
runs in a process of its own (``fetching.py``), which ends with whoever waits for it.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download

from modification.errors import LoadError
from modification.fetching import PART

READ = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt", "README.md")

_CHILD = Path(__file__).with_name("fetching.py")

Progress = Callable[[int, int], None]


class HubError(LoadError):
    """A model can't be had from the Hub; the message is a sentence for the user."""


def fetch(repository: str, revision: str | None = None, progress: Progress | None = None) -> str:
    """The folder of a Hub model's files, downloaded if need be.

    Args:
        progress: told how many bytes are here, and how many there will be, twice a second or more often; what it raises
            ends the download.

    Raises:
        HubError: no such model, no safetensors in it, or the Hub is away and nothing is in the cache.
    """
    patience = float(constants.HF_HUB_ETAG_TIMEOUT)  # seconds, from the environment variable of that name
    asked = {"repository": repository, "revision": revision, "patience": patience}
    with contextlib.closing(_told(asked)) as said:
        listed: dict[str, Any] = next(said, {"error": "Timeout"})
    if (why := listed.get("error")) == "GatedRepoError":
        raise HubError(f"{repository} is gated: accept its terms on the Hub, and set HF_TOKEN")
    if why in ("RepositoryNotFoundError", "RevisionNotFoundError"):
        return _kept(repository, revision, f"There is no model {repository} on the Hub, or it is private")
    if why:
        return _kept(repository, revision, f"The Hub can't be reached for {repository} ({why})")
    files, commit = listed["files"], listed["commit"]
    wanted = {name: size for name, size in files.items() if _is_read(name)}
    if not any(name.endswith(".safetensors") for name in wanted):
        raise HubError(f"{repository} holds no .safetensors weights; other formats are not read")
    return _download(repository, revision, commit, wanted, progress or (lambda done, total: None))


def broken_off() -> dict[str, int]:
    """Models whose download was broken off, with the bytes that the next one goes on from."""
    found = dict[str, int]()
    for path in Path(constants.HF_HUB_CACHE).glob(f"models--*/blobs/*{PART}"):
        with contextlib.suppress(OSError):  # just finished
            name = path.parents[1].name.removeprefix("models--").replace("--", "/")
            found[name] = found.get(name, 0) + path.stat().st_size
    return found


def _is_read(name: str) -> bool:
    """Files at the top, and an adapter's."""
    folder, _, file = name.rpartition("/")
    return folder in ("", "adapter") and any(fnmatch.fnmatch(file, pattern) for pattern in READ)


def _kept(repository: str, revision: str | None, why: str) -> str:
    """The folder in the cache, or the reason why there is none."""
    try:
        folder: str = snapshot_download(repository, revision=revision, local_files_only=True)
    except Exception:
        raise HubError(f"{why}, and it is not among the models kept on this machine") from None
    return folder


def _download(
    repository: str, revision: str | None, commit: str | None, files: dict[str, int], progress: Progress
) -> str:
    total, whole, place = sum(files.values()), 0, ""
    _check_room(repository, total)
    progress(0, total)
    # The config first, by the revision's own name: the cache then knows which commit that is. Weights last.
    names = sorted(files, key=lambda name: (name != "config.json", name.endswith(".safetensors"), name))
    asked = [(name, revision if name == "config.json" else commit or revision) for name in names]
    at = 0
    with contextlib.closing(_told({"repository": repository, "files": asked})) as lines:
        for told in lines:
            if told["at"] < at:  # said late
                continue
            if "error" in told:
                raise _broken_off(repository, names[at], told["error"])
            if "place" in told:
                whole, place, at = whole + files[names[at]], told["place"], at + 1
            progress(whole + told.get("here", 0), total)
    if at < len(names):
        raise _broken_off(repository, names[at], "the process that fetched it ended")
    return str(Path(place).parent.parent if "/" in names[-1] else Path(place).parent)


def _check_room(repository: str, total: int) -> None:
    """The disk holds what is still to come: what is in the cache of this model already is not fetched again.

    Raises:
        HubError: it does not.
    """
    cache = Path(constants.HF_HUB_CACHE)
    kept = cache / f"models--{repository.replace('/', '--')}" / "blobs"
    here = 0
    for path in kept.glob("*"):
        with contextlib.suppress(OSError):  # just finished, under another name
            here += path.stat().st_size
    disk = next(path for path in (cache, *cache.absolute().parents) if path.is_dir())
    if total - here > (free := shutil.disk_usage(disk).free):
        raise HubError(
            f"{repository} takes {total / 1e6:,.1f} MB on the disk, and {free / 1e6:,.1f} MB are free for the "
            "Hub's cache (HF_HOME)"
        )


def _told(asked: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
    """What a process that fetches says; it ends with whoever reads."""
    # Plain HTTP: a transfer by Xet tells its progress otherwise, and does not go on where it stopped.
    environment = {**os.environ, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')", str(_CHILD)]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps(asked))
            child.stdin.close()
            yield from map(json.loads, child.stdout)
        finally:
            child.kill()


def _broken_off(repository: str, name: str, why: str) -> HubError:
    return HubError(f"{name} of {repository} could not be fetched ({why}): try again, what is here is kept")
