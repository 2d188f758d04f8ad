"""Arguments, and the run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.peers.engine import QUANTISED, Settings
from benchmarks.peers.files import DTYPES
from benchmarks.peers.gather import gather
from benchmarks.peers.host import cores, first_line, say
from benchmarks.peers.measure import Row, measure, report, summarise, table
from modification.cli.shared import numbers


def main(argv: Sequence[str] | None = None) -> int:
    """Run; 1 if an engine was refused for its logits, 2 and a sentence on bad input."""
    try:
        settings, out = parse(argv)
        torch.set_num_threads(settings.threads)
        peers = gather(settings)
        rows: list[Row] = []
        for context in settings.contexts:
            times = measure(peers.engines, context, peers.vocabulary, settings)
            rows += summarise(times, context, settings.dtype)
    except (ValueError, OSError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 2
    for quantised in (False, True):
        if some := [row for row in rows if row.engine.endswith(QUANTISED) is quantised]:
            print(table(some), end="\n\n")
    for name, why in (peers.missing | peers.refused).items():
        print(f"{name}: {why}", end="\n\n")
    line = json.dumps(report(settings, peers, rows))
    print(line, flush=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(line + "\n")
    return 1 if peers.refused else 0


def parse(argv: Sequence[str] | None) -> tuple[Settings, Path | None]:
    """Settings from the command line, and where JSON goes.

    Raises:
        ValueError: an option out of bounds.
    """
    asked = parser().parse_args(argv)
    names = tuple(name for name in asked.engines.split(",") if name)
    if unknown := set(names) - {"llamacpp", "ort"}:
        raise ValueError(f"--engines {','.join(sorted(unknown))}: expected llamacpp, ort or both")
    settings = Settings(
        asked.folder, tuple(numbers("--contexts", asked.contexts, int)), asked.new_tokens, asked.rounds,
        asked.threads, names, tuple(dict.fromkeys((1.0, *numbers("--load", asked.load, float)))),
        asked.dtype, asked.quantised, asked.work,
    )
    if min(*settings.contexts, settings.new_tokens, settings.rounds, settings.threads, 1) < 1:
        raise ValueError("contexts, --new-tokens, --rounds and --threads must be 1 or more")
    if not all(0 <= load <= 1 for load in settings.loads):
        raise ValueError(f"--load {asked.load}: a load is a share, from 0 to 1")
    if settings.threads > cores():
        say(f"warning: {settings.threads} threads on {cores()} cores")
    return settings, asked.json


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description="Time engines on the weights of one Llama."
    )
    add = made.add_argument
    add("folder", type=Path, help="Hugging Face folder: config.json and safetensors")
    add("--contexts", default="512,2048", help="prompt lengths (default: %(default)s)")
    add("--new-tokens", type=int, default=64, help="tokens decoded (default: %(default)s)")
    add("--rounds", type=int, default=5, help="rounds after one that is dropped (default: %(default)s)")
    add("--threads", type=int, default=2, help="of every engine (default: %(default)s)")
    add("--engines", default="llamacpp,ort", help="beside stock and this project's (default: %(default)s)")
    add("--load", default="1,0.5,0.25", help="of this project's MoD layers; 1 always runs (default: %(default)s)")
    add("--dtype", choices=sorted(DTYPES), default="f32", help="of the weights (default: %(default)s)")
    add("--quantised", action="store_true", help="llama.cpp on q8_0 and q4_0 too")
    add("--work", type=Path, default=Path("runs/peers"), help="for exports (default: %(default)s)")
    add("--json", type=Path, help="write the JSON line here too")
    return made


if __name__ == "__main__":
    sys.exit(main())
