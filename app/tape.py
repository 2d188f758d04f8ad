"""Steps -> the tape that the live view reads, and sentences for people. No tensors, no gradio.

A tape is one growing string, a JSON array a line, so that each update sends only what is new:

    ["h", {...}]                          header: id of the run, layers, MoD layers, anchors, title
    ["c", text, p, scores, routed, kind, id, logprob, likely]
                                          a column: a token; p, or one for each MoD layer; hex scores (three digits
                                          a MoD layer), hex bits; kind is p (prompt), n (new) or s (special); for new
                                          tokens the log-probability and the likeliest tokens as [text, id, logprob]
    ["f", ...]                            figures after a step, in the order of FIGURES
    ["e", text]                           the end, as a sentence
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modification.measure.cost import CostMeter, ModelShape
from modification.trace import RoutingTrace, Step

FIGURES = ("load", "total", "speed", "stored", "allocated", "dense", "saved", "tokens", "seconds")
_HEX = tuple(f"{level:03x}" for level in range(4096))
RECENT = 32  # tokens over which load and speed are averaged
_PER_LAYER = ("layer_weights", "expert_weights", "windows")  # of a ModelShape


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token reads as.

    Attributes:
        text: its text; may be empty while a character is incomplete.
        special: whether it is a control token such as a turn marker.
    """

    text: str
    special: bool = False


@dataclass(slots=True)
class Tape:
    """Builds the tape of one generation."""

    shape: ModelShape
    title: str
    anchors: int = 0
    lines: list[str] = field(default_factory=list)
    columns: int = 0
    ran: int = 0
    scored: int = 0
    new_tokens: int = 0
    recent: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=RECENT))  # load, seconds
    meter: CostMeter = field(init=False)

    def __post_init__(self) -> None:
        self.meter = CostMeter(self.shape)
        self._add("h", {
            "id": secrets.token_hex(4), "depth": self.shape.depth, "mod": list(self.shape.mod_layers),
            "anchors": self.anchors, "title": self.title, "shape": dataclasses.asdict(self.shape),
        })

    def add(
        self, step: Step, pieces: Iterable[Piece], seconds: float | None = None, likely: Sequence[str] = ()
    ) -> None:
        """Record a step, what its tokens and its likeliest ones read as, and how long it took by the user's clock."""
        self.meter.add(step)
        ran, scored = int(step.routed.sum()), step.routed.size
        self.ran, self.scored = self.ran + ran, self.scored + scored
        if not step.prefill:
            self.new_tokens += 1
            self.recent.append((ran / scored if scored else 1.0, step.seconds if seconds is None else seconds))
        threshold = [round(p, 3) for p in step.layer_p] or round(step.p, 3)
        rivals = [
            [text, token, round(value, 3)]
            for text, token, value in zip(likely, step.likely, step.likely_logprobs, strict=False)
        ]
        for at, piece in enumerate(pieces):
            kind = "s" if piece.special else ("p" if step.prefill else "n")
            scores = "".join(_HEX[level] for level in np.rint(step.scores[:, at] * 4095).astype(int).tolist())
            record = ["c", piece.text, threshold, scores, bits(step.routed[:, at]), kind, int(step.tokens[at])]
            self._add(*record, *(() if step.prefill else (round(step.logprob, 3), rivals)))
            self.columns += 1
        self._add("f", *self.figures(step).values())

    def end(self, text: str) -> None:
        """Close the tape with a sentence."""
        self._add("e", text)

    def figures(self, step: Step) -> dict[str, Any]:
        """The live figures after ``step``: raw numbers; the view adds unit and label.

        Load and speed are those of the last tokens, so that they answer when p moves.
        """
        loads = [load for load, _ in self.recent] or [step.load]
        seconds = sum(seconds for _, seconds in self.recent)
        return {
            # In the order of FIGURES.
            "load": round(sum(loads) / len(loads), 4),
            "total": round(self.ran / self.scored, 4) if self.scored else 1.0,
            "speed": round(len(self.recent) / seconds, 2) if seconds else None,
            "stored": step.kv_stored, "allocated": step.kv_allocated, "dense": step.kv_dense,
            "saved": round(self.meter.saved, 4),
            "tokens": self.columns,
            "seconds": round(step.seconds, 5),
        }

    @property
    def text(self) -> str:
        """The tape so far."""
        return "".join(self.lines)

    def _add(self, *record: Any) -> None:
        line = json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n"
        # A trace may bring half characters (lone surrogates), which no message to a page can hold.
        self.lines.append(line.encode("utf-8", "replace").decode("utf-8"))


class Window:
    """The end of a growing tape, as the view takes it: ``{"id", "at", "d"}`` with the lines from number ``at`` on.

    Gradio's page works through the whole value at every update, so a long run must not send all of itself each time.
    A window keeps the latest 8 to 64 thousand characters, more than some pictures add; the last one is whole.
    """

    KEPT, MOST = 8_192, 65_536

    def __init__(self) -> None:
        self._start, self._lines = 0, 0

    def of(self, tape: str) -> dict[str, Any]:
        """The window on a tape that is still growing."""
        if len(tape) - self._start > self.MOST:
            start = tape.rfind("\n", 0, len(tape) - self.KEPT) + 1
            self._lines += tape.count("\n", self._start, start)
            self._start = start
        return {"id": run_id(tape), "at": self._lines, "d": tape[self._start :]}

    @staticmethod
    def whole(tape: str) -> dict[str, Any]:
        """All of a tape."""
        return {"id": run_id(tape), "at": 0, "d": tape}


def run_id(tape: str) -> str:
    """The id in a tape's header; empty for an empty tape."""
    return str(json.loads(tape.partition("\n")[0])[1]["id"]) if tape else ""


def bits(routed: Iterable[Any]) -> str:
    """Decisions of one column as hex, the first MoD layer in the lowest bit."""
    return f"{sum(1 << at for at, ran in enumerate(routed) if ran):x}"


def tape_of_trace(trace: RoutingTrace) -> str:
    """The tape of a stored trace."""
    shape = _shape_of(trace)
    tape = Tape(shape, str(trace.info.get("title", "Example")), int(trace.info.get("anchors", 0)))
    at = 0
    special = set(trace.info.get("special", ()))
    likely = trace.info.get("likely", ())
    for number, step in enumerate(trace.steps):
        texts = trace.texts[at : at + len(step.tokens)] or [f"[{token}]" for token in step.tokens]
        rivals = likely[number] if number < len(likely) else [f"[{token}]" for token in step.likely]
        tape.add(step, [Piece(text, at + i in special) for i, text in enumerate(texts)], likely=rivals)
        at += len(step.tokens)
    tape.end(str(trace.info.get("note", "A recorded run.")))
    return tape.text


def _shape_of(trace: RoutingTrace) -> ModelShape:
    """The model's sizes that the trace notes; without them every layer counts alike."""
    given = trace.info.get("shape") or {
        "layer_weights": 1, "head_weights": 0, "attention_width": 0, "router_weights": 0}
    names = {field.name for field in dataclasses.fields(ModelShape)} - {"mod_layers", *_PER_LAYER}
    sizes: dict[str, Any] = {name: float(value) if name == "expert_share" else int(value)
                             for name, value in given.items() if name in names}
    windows = tuple(None if window is None else int(window) for window in given.get("windows", ()))
    if any(window is not None and window < 1 for window in windows):
        raise ValueError("a sliding window below 1 token")
    weights = given["layer_weights"]  # one number in older traces
    each = {
        "layer_weights": tuple(map(int, weights)) if isinstance(weights, list) else (int(weights),) * trace.depth,
        "expert_weights": tuple(map(int, given.get("expert_weights") or ())), "windows": windows,
    }
    for name, values in each.items():
        if len(values) not in ((trace.depth,) if name == "layer_weights" else (0, trace.depth)):
            raise ValueError(f"{name} of {len(values)} layers, where the trace has {trace.depth}")
    return ModelShape(**{**sizes, **each, "depth": trace.depth, "mod_layers": trace.mod_layers})


def records(tape: str) -> Iterator[Any]:
    """A tape's lines, read. Texts may hold what ``splitlines`` takes for the end of a line."""
    return (json.loads(line) for line in tape.split("\n") if line)


def summary(tape: str) -> dict[str, Any]:
    """A finished tape for a program: the new text and the last figures, bytes and shares as numbers."""
    text, figures, steps = [], dict[str, Any](), 0
    for record in records(tape):
        if record[0] == "c" and record[5] == "n":
            text.append(record[1])
        elif record[0] == "f":
            figures, steps = dict(zip(FIGURES, record[1:], strict=True)), steps + 1
    return {
        "text": "".join(text), "new_tokens": steps - 1,  # the first is the prompt
        "load": figures["total"], "tokens_per_second": figures["speed"], "kv_stored": figures["stored"],
        "kv_allocated": figures["allocated"], "kv_dense": figures["dense"], "compute_saved": figures["saved"],
        "ended": ending(tape),
    }


def ending(tape: str) -> str:
    """The sentence that a finished tape ends with."""
    last = tape.rstrip("\n").rpartition("\n")[2]
    record = json.loads(last) if last else ["e", ""]
    return str(record[1]) if record[0] == "e" else ""
