"""Steps of a generation and the trace they add up to. numpy only, no torch.

A trace is what the app draws, what is exported and what is shipped as an example.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from modification.config import check_threshold, check_thresholds

FORMAT = 1
MOST_LAYERS, MOST_TOKENS, MOST_SCORES = 1024, 100_000, 4_000_000  # in a trace that is read
MOST_TEXT = 1000  # characters of a text in it that is shown: a token's, a rival's, those of ``_SHOWN``
_SHOWN = ("title", "note", "likely")  # of its notes
_SCORE_DIGITS = 4


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One forward pass of a generation: the whole prompt first, then one token each.

    Attributes:
        tokens: ids that went through the model, [N]; N = 1 after the prompt.
        logprobs: natural-log probability with which each was chosen, [N]; NaN for the prompt.
        scores: router gates g, [M, N] for M MoD layers.
        routed: whether the token ran through the layer, [M, N].
        p: the threshold that decided.
        kv_stored: bytes of keys and values held after the step.
        kv_allocated: bytes that the cache's buffers take.
        kv_dense: bytes that the dense parent would hold.
        seconds: wall-clock time of the step, routing and sampling included.
        prefill: whether this is the prompt.
        layer_p: the MoD layers' thresholds, [M], where they differ; ``p`` is their mean then.
        likely: the likeliest tokens at the choice of this one, best first, [K]; empty if not asked for.
        likely_logprobs: their log-probabilities, [K].
    """

    tokens: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    routed: npt.NDArray[np.bool_]
    p: float
    kv_stored: int
    kv_allocated: int
    kv_dense: int
    seconds: float
    prefill: bool = False
    layer_p: tuple[float, ...] = ()
    likely: tuple[int, ...] = ()
    likely_logprobs: tuple[float, ...] = ()

    @property
    def token(self) -> int:
        """The step's last token id."""
        return int(self.tokens[-1])

    @property
    def logprob(self) -> float:
        """The step's last log-probability."""
        return float(self.logprobs[-1])

    @property
    def load(self) -> float:
        """Share of (MoD layer, token) pairs that ran."""
        return float(self.routed.mean())


@dataclass(slots=True, eq=False)
class RoutingTrace:
    """A generation, column by column (a column is a token, prompt included).

    Attributes:
        depth: layers of the model.
        mod_layers: indices of its MoD layers, M of them.
        steps: the steps so far.
        texts: what each column reads as, if known.
        info: free notes (model name, prompt, settings).
    """

    depth: int
    mod_layers: tuple[int, ...]
    steps: list[Step] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def collect(cls, steps: Iterable[Step], depth: int, mod_layers: Iterable[int]) -> RoutingTrace:
        """A trace of all steps of an iterator."""
        return cls(depth, tuple(mod_layers), list(steps))

    def append(self, step: Step, texts: Iterable[str] = ()) -> None:
        """Add a step, and what its tokens read as."""
        self.steps.append(step)
        self.texts.extend(texts)

    @property
    def tokens(self) -> npt.NDArray[np.int64]:
        """Token ids, [T]."""
        return np.concatenate([step.tokens for step in self.steps]) if self.steps else np.empty(0, np.int64)

    @property
    def scores(self) -> npt.NDArray[np.float32]:
        """Router gates, [M, T]."""
        return self._columns([step.scores for step in self.steps], np.float32)

    @property
    def routed(self) -> npt.NDArray[np.bool_]:
        """Decisions, [M, T]."""
        return self._columns([step.routed for step in self.steps], np.bool_)

    @property
    def p(self) -> npt.NDArray[np.float64]:
        """The threshold at each column, [T]."""
        return np.repeat([step.p for step in self.steps], [len(step.tokens) for step in self.steps])

    @property
    def load(self) -> float:
        """Share of (MoD layer, token) pairs that ran; 1 for an empty trace."""
        total = sum(step.routed.size for step in self.steps)
        return sum(int(step.routed.sum()) for step in self.steps) / total if total else 1.0

    def to_json(self) -> str:
        """The trace as JSON; ``from_json`` reads it back. Scores keep four digits."""
        return json.dumps({
            "format": FORMAT, "depth": self.depth, "mod_layers": list(self.mod_layers), "texts": self.texts,
            "info": self.info, "steps": [_step_to_dict(step) for step in self.steps],
        })

    @classmethod
    def from_json(cls, text: str) -> RoutingTrace:
        """Read ``to_json``'s form.

        Raises:
            ValueError: not a trace, with what is wrong.
        """
        try:
            values = json.loads(text)
            if values["format"] != FORMAT:
                raise ValueError(f"format {values['format']!r}: this version reads format {FORMAT}")
            trace = cls(int(values["depth"]), tuple(int(i) for i in values["mod_layers"]))
            if not 1 <= trace.depth <= MOST_LAYERS:
                raise ValueError(f"{trace.depth} layers: expected 1 to {MOST_LAYERS}")
            if list(trace.mod_layers) != sorted({*trace.mod_layers} & {*range(trace.depth)}):
                layers = str(trace.mod_layers)[:80]
                raise ValueError(f"MoD layers {layers}: expected rising indices in a model of {trace.depth} layers")
            _check_size(len(trace.mod_layers), sum(len(step["tokens"]) for step in values["steps"]))
            trace.steps = [_step_from_dict(step, len(trace.mod_layers)) for step in values["steps"]]
            trace.texts = [str(part) for part in values["texts"]]
            trace.info = dict(values["info"])
            _check_texts([trace.texts, *(trace.info.get(name) for name in _SHOWN)])
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            lacks = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"not a routing trace ({lacks})") from error
        if trace.texts and len(trace.texts) != len(trace.tokens):
            raise ValueError(f"not a routing trace: {len(trace.texts)} texts for {len(trace.tokens)} tokens")
        return trace

    def _columns(self, parts: list[npt.NDArray[Any]], dtype: Any) -> npt.NDArray[Any]:
        return np.concatenate(parts, axis=1) if parts else np.empty((len(self.mod_layers), 0), dtype)


def _check_size(layers: int, tokens: int) -> None:
    """Before anything is built of it."""
    if tokens > MOST_TOKENS or tokens * layers > MOST_SCORES:
        raise ValueError(
            f"{tokens:,} tokens over {layers} MoD layers: at most {MOST_TOKENS:,} tokens and {MOST_SCORES:,} scores "
            "are read"
        )


def _check_texts(values: Any) -> None:
    """Whatever stands in them."""
    left = [values]
    while left:
        value = left.pop()
        if isinstance(value, str) and len(value) > MOST_TEXT:
            raise ValueError(f"a text of {len(value):,} characters: at most {MOST_TEXT:,} are read")
        left.extend(value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())


def _step_to_dict(step: Step) -> dict[str, Any]:
    logprobs = [None if np.isnan(value) else round(float(value), _SCORE_DIGITS) for value in step.logprobs]
    return {
        "tokens": step.tokens.tolist(), "logprobs": logprobs,
        "scores": [[round(float(g), _SCORE_DIGITS) for g in row] for row in step.scores],
        "routed": step.routed.astype(int).tolist(), "p": step.p,
        "kv": [step.kv_stored, step.kv_allocated, step.kv_dense], "seconds": round(step.seconds, 6),
        "prefill": step.prefill,
        **({"layer_p": list(step.layer_p)} if step.layer_p else {}),
        **({"likely": [[token, round(value, _SCORE_DIGITS)] for token, value in _alternatives(step)]} if step.likely
           else {}),
    }


def _alternatives(step: Step) -> Iterable[tuple[int, float]]:
    return zip(step.likely, step.likely_logprobs, strict=True)


def _step_from_dict(values: dict[str, Any], layers: int) -> Step:
    tokens = np.asarray(values["tokens"], np.int64)
    shape = (layers, len(tokens))
    scores, routed = np.asarray(values["scores"], np.float32), np.asarray(values["routed"], np.bool_)
    if not (np.isfinite(scores).all() and (scores >= 0).all() and (scores <= 1).all()):
        raise ValueError("a score is not from 0 to 1")
    if not math.isfinite(float(values["seconds"])):
        raise ValueError(f"seconds {values['seconds']}: not a number")
    if not len(tokens) or scores.shape != shape or routed.shape != shape or len(values["logprobs"]) != len(tokens):
        raise ValueError(f"a step of {len(tokens)} tokens has scores of shape {scores.shape}, not {shape}")
    logprobs = np.asarray([np.nan if v is None else v for v in values["logprobs"]], np.float32)
    stored, allocated, dense = (int(size) for size in values["kv"])
    layer_p = check_thresholds(values["layer_p"], layers) if values.get("layer_p") else ()
    likely = [(int(token), float(value)) for token, value in values.get("likely", ())]
    return Step(
        tokens, logprobs, scores, routed, check_threshold(values["p"]), stored, allocated, dense,
        float(values["seconds"]), bool(values["prefill"]), layer_p if isinstance(layer_p, tuple) else (),
        tuple(token for token, _ in likely), tuple(value for _, value in likely),
    )
