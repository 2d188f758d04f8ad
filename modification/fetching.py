"""The process that fetches a model's files into the Hub's cache: asked on its standard input, it tells on its output.

A process of its own, so that a download can be ended at any moment, one that stalls too; what it had fetched stays in
the cache, and the next one goes on from there. It imports nothing else of this package. ``hub.py`` starts it.

Asked: one JSON object with ``repository`` and ``files``, [name, revision] each. Tells one JSON object a line, with
``at``, the file's number: ``here``, its bytes so far, twice a second; ``place``, its path once it is whole; ``error``,
a class of exception.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

from huggingface_hub import hf_hub_download
from tqdm import tqdm

_BEAT = 0.5  # seconds between two reports of a file under way


def _tell(**what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def _bar(here: list[int]) -> type[tqdm[Any]]:
    """A progress bar that draws nothing and counts the bytes of the file under way in ``here[0]``."""

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            here[0] = int(kwargs.get("initial") or 0)
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            here[0] += int(n or 0)

    return Silent


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
        place = hf_hub_download(repository, name, revision=revision, tqdm_class=_bar(here))
    except Exception as error:  # whatever the libraries make of a connection that broke
        _tell(at=at, error=type(error).__name__)
        return False
    finally:
        done.set()
    _tell(at=at, place=place)
    return True


def main() -> int:
    """Fetch what was asked for, file by file; 1 if one could not be had."""
    asked = json.load(sys.stdin)
    return int(not all(_fetch(asked["repository"], at, *file) for at, file in enumerate(asked["files"])))


if __name__ == "__main__":
    sys.exit(main())
