"""Conversions by the command line's own words, each in two processes (DDP, gloo) that are forked from this one.

What they import is imported once: that takes longer than they do.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

from app.headless import free_port
from modification.cli import main

importlib.import_module("modification.conversion.train")  # which `main` would import after the forks


def one_of(rank: int, port: int, words: list[str]) -> int:
    """Fork one of two processes, told what a launcher tells: its id."""
    if child := os.fork():
        return child
    os.environ.update({
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    })
    code = 1
    try:
        code = main(words)
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    for words in json.loads(Path(sys.argv[1]).read_text()):
        port = free_port()
        children = [one_of(rank, port, words) for rank in (0, 1)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert codes == [0, 0], words
