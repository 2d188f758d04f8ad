"""Command line: convert, dial, sweep, generate, inspect, bench, estimate. One file a group of commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from modification.architectures import ConversionError
from modification.cli import measuring, running, training
from modification.errors import LoadError
from modification.threads import heed_limits


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 2 and a sentence on bad input."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.threads is not None:
            _set_threads(arguments.threads)
        heed_limits()
        arguments.run(arguments)
    except (LoadError, ConversionError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def _set_threads(count: int) -> None:
    if count < 1:
        raise ValueError(f"--threads {count}: must be 1 or more")
    torch.set_num_threads(count)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="modification", description="Mixture-of-Depths models with a dial.")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    commands = parser.add_subparsers(required=True, metavar="command")
    for group in (training, running, measuring):
        group.add(commands)
    return parser
