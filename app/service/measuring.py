"""Sweeps, benches and estimates: the engine's measurements on behalf of a page."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.errors import UserError
from app.service.choice import DTYPES
from app.service.jobs import Report
from app.service.loaded import Loaded
from app.service.requests import Limits
from modification.conversion.data import pack
from modification.measure.bench import Result, bench, dense_twin
from modification.measure.estimate import Estimate, devices, estimate
from modification.measure.memory import available_bytes
from modification.measure.onpaper import config_of, own_layers
from modification.measure.presets import presets
from modification.measure.tradeoff import Point, largest_within, point

LEAST_TOKENS, BLOCK = 32, 512
_CARD = 50_000  # characters of a model card that are shown
_REPORT = 5_000_000  # characters of a report that are read
_TAG, _UNSEEN = re.compile(r"<(?=[A-Za-z/!?])|!(?=\[)"), "\u200b"


@dataclass(frozen=True, slots=True)
class Sweep:
    """A text's points over p so far, and the dense parent's loss on it.

    Attributes:
        dense: nats per token of the dense parent; of the model at p = 0 where no parent was given.
        dense_speed: the same side's tokens per second of prefill.
        parent: what ``dense`` is the loss of.
        tokens: scored.
        given: tokens of the whole text, of which the first were scored.
        within: share by which the loss may exceed ``dense``, and the point with the largest p that stays within.
    """

    points: tuple[Point, ...]
    dense: float
    dense_speed: float
    parent: str
    tokens: int
    given: int
    within: float
    best: Point | None


def sweep_text(
    loaded: Loaded, parent: Loaded | None, text: str, grid: Sequence[float], within: float, limits: Limits,
    report: Report,
) -> Sweep:
    """Measure a text over a grid of p; reports the sweep as it grows.

    Raises:
        UserError: a text too short or a grid out of bounds.
    """
    blocks, given = _blocks(loaded, text, limits)
    if len(grid) > limits.thresholds:
        raise UserError(f"{len(grid)} thresholds are too many: at most {limits.thresholds} are measured at once.")
    if not grid or not all(0 <= p <= 1 for p in grid):
        raise UserError(f"The grid {list(grid)} has to be one or more numbers from 0 to 1.")
    report(None)  # whoever left while this waited is noticed here
    name = f"{parent.name} (dense)" if parent else f"{loaded.name} at p = 0"
    with (parent or loaded).lock:
        reference = point((parent or loaded).model, _blocks(parent, text, limits)[0] if parent else blocks, 0.0)
    dense = reference.quality.loss
    points: list[Point] = []
    for p in grid:
        with loaded.lock:
            points.append(point(loaded.model, blocks, p))
        best = largest_within(points, dense, within)
        found = Sweep(tuple(points), dense, reference.speed, name, int(blocks.size), given, within, best)
        report(found)
    return found


def _blocks(loaded: Loaded, text: str, limits: Limits) -> tuple[Any, int]:
    """A text in blocks as its model reads it, and its tokens, which may be more."""
    if not isinstance(text, str) or len(text) > limits.text_characters:  # before anything looks at it
        raise UserError(f"A sweep reads a text of at most {limits.text_characters:,} characters. Shorten it.")
    ids = list(loaded.tokenizer(text)["input_ids"])
    if len(ids) < LEAST_TOKENS:
        raise UserError(f"The text has {len(ids)} tokens; a sweep wants at least {LEAST_TOKENS}. Give more text.")
    count = -(-len(ids) // min(BLOCK, loaded.context))  # as few blocks as will do, alike, so that little is cut off
    width = len(ids) // count
    return pack([ids], width, limits.text_tokens), len(ids)


def bench_model(
    loaded: Loaded, parent: Loaded | None, contexts: Sequence[int], loads: Sequence[float], new_tokens: int,
    rounds: int, stock: bool, report: Report,
) -> list[Result]:
    """Time a model against its dense parent; reports sentences, gives the results.

    Raises:
        UserError: a value out of bounds.
    """
    for name, values, most in (
        ("contexts", contexts, 8), ("loads", loads, 8), ("decode steps", range(new_tokens), 512),
        ("rounds", range(rounds), 20),
    ):
        if len(values) > most:
            raise UserError(f"{len(values):,} {name} are too many here: at most {most}.")
    # A dense model is held with routers of its own, for the other tabs: stock generate must not meet them.
    taken = sum(weight.nbytes for weight in (parent or loaded).model.parameters())
    free = available_bytes(loaded.model.device.type)
    if taken > free:
        raise UserError(
            f"A benchmark copies the dense model, {taken / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free. Try on the "
            "command line: python -m modification bench"
        )
    dense = dense_twin((parent or loaded).model)

    def tell(done: str) -> None:
        """Between two timings: others' runs get the model for as long as this one had it."""
        report(done)
        loaded.lock.give_way()

    try:
        with loaded.lock:
            return bench(
                loaded.model, dense, contexts=contexts, batches=[1], loads=loads, new_tokens=new_tokens,
                rounds=rounds, stock=stock, say=report, tell=tell,
            )
    except ValueError as error:
        raise UserError(f"{error}.") from error


def estimate_config(
    source: str, context: int, batch: int, load: float, dtype: str, layers: str | None, device: str, anything: bool
) -> Estimate:
    """Cost of any config on paper; of presets alone unless ``anything``.

    Raises:
        UserError: no such config, or a value out of bounds.
    """
    if dtype not in DTYPES:
        raise UserError(f"{dtype!r} is no data type here: choose among {', '.join(DTYPES)}.")
    if not anything and source not in presets():
        raise UserError(f"{source} is not among the shapes offered here. Choose one from the list.")
    if device not in devices():
        raise UserError(f"{device!r} is no device here: choose among {', '.join(devices())}.")
    try:
        config = config_of(source.strip())
        return estimate(
            config, context=context, batch=batch, load=load, dtype=DTYPES[dtype], device=devices()[device],
            layers=own_layers(config) if layers in (None, "", "own") else layers,  # type: ignore[arg-type]
        )
    except ValueError as error:
        raise UserError(f"{error}.") from error


def known_presets() -> list[str]:
    """Names of the shapes that ship with the engine."""
    return list(presets())


def known_devices() -> list[str]:
    """Names of the devices that estimates know."""
    return list(devices())


def layer_rows(loaded: Loaded) -> list[list[str]]:
    """One row a layer: index, kind, class and parameters."""
    rows = []
    for index, layer in enumerate(loaded.model.family.decoder_layers(loaded.model)):
        routed = index in loaded.shape.mod_layers
        count = sum(p.numel() for n, p in layer.named_parameters() if not n.startswith("router."))
        rows.append([str(index), "MoD layer" if routed else "dense", type(layer).__name__, f"{count:,}"])
    return rows


def report_of(folder: str) -> dict[str, Any]:
    """A converted model's report.json, or nothing."""
    path = Path(folder) / "report.json"
    try:
        found = json.loads(_beginning(path, _REPORT)) if path.is_file() else {}
        rows = found.get("sweep", [])
        if not all(0 <= row[name] <= 1e6 for row in rows for name in ("p", "load", "loss")):
            return {}
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return {}
    return dict(found)


def _beginning(path: Path, most: int) -> str:
    """The first characters of a text file."""
    with path.open(encoding="utf-8") as file:
        return file.read(most)


def card_of(folder: str) -> str:
    """A model folder's card without its front matter."""
    path = Path(folder) / "README.md"
    try:
        text = _beginning(path, _CARD) if path.is_file() else ""
    except (OSError, UnicodeDecodeError):
        text = ""
    text = text.split("---\n", 2)[-1].strip() if text.startswith("---\n") else text
    return _plain(text) or "No card beside this model."


def _plain(card: str) -> str:
    """Markdown without HTML and pictures: a stranger's card must not make a visitor's browser fetch anything.

    In code too: what is code, and what only looks like it, is the browser's to say.
    """
    return _TAG.sub(lambda found: found.group() + _UNSEEN, card)
