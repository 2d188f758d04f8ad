"""MoDConfig: everything that makes a model a Mixture-of-Depths one. Frozen and validated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Gate = Literal["straight_through", "paper"]
KeyValues = Literal["evict", "keep"]
LayerRule = Literal["inner", "interleaved"]
Threshold = float | tuple[float, ...]  # one p for all MoD layers, or one for each, [M]


@dataclass(frozen=True, slots=True)
class MoDConfig:
    """How a model routes.

    Attributes:
        p: default threshold in [0, 1]; a token runs through a MoD layer when its score g >= p.
        layers: which layers are MoD layers. ``"inner"`` is all but the first and last,
            ``"interleaved"`` every other one (the paper's choice, starting at layer 1),
            or explicit indices.
        gate: ``"straight_through"`` leaves an executed block unscaled and gives the router its
            gradient by a straight-through estimate; ``"paper"`` multiplies both sub-blocks by g:
            h = x + g * Attn(LN x), y = h + g * MLP(LN h) (MoDification, arXiv 2410.14268).
        anchors: leading tokens of each row that always run.
        kv: ``"evict"`` stores keys and values only of tokens that ran; ``"keep"`` computes and
            stores them for every token, so that skipped tokens stay visible to attention.
        dial: n rising raw scores in (0, 1), those that load 1 - k / (n + 1) was measured at, k from 1 to n. Scores
            are bent so that they read k / (n + 1) there, straight between, which makes load 1 - p. Empty: unbent.

    Raises:
        ValueError: a value out of bounds; the message names the value and the bound.
    """

    p: float = 0.5
    layers: LayerRule | tuple[int, ...] = "inner"
    gate: Gate = "straight_through"
    anchors: int = 1
    kv: KeyValues = "evict"
    dial: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_threshold(self.p)
        _check_choice("gate", self.gate, get_args(Gate))
        _check_choice("kv", self.kv, get_args(KeyValues))
        if isinstance(self.anchors, bool) or not isinstance(self.anchors, int) or self.anchors < 0:
            raise ValueError(f"anchors={self.anchors!r}: expected a whole number of tokens, 0 or more")
        object.__setattr__(self, "dial", _checked_dial(self.dial))
        if isinstance(self.layers, str):
            _check_choice("layers", self.layers, get_args(LayerRule))
        else:
            object.__setattr__(self, "layers", _checked_indices(self.layers))

    def layer_indices(self, depth: int) -> tuple[int, ...]:
        """Indices of the MoD layers in a model of ``depth`` layers.

        Raises:
            ValueError: an index beyond the model, or a rule that leaves no layer to route.
        """
        if self.layers == "inner":
            indices = tuple(range(1, depth - 1))
        elif self.layers == "interleaved":
            indices = tuple(range(1, depth, 2))
        else:
            indices = self.layers
            if indices[-1] >= depth:
                raise ValueError(f"layers={list(indices)}: index {indices[-1]} is not in 0..{depth - 1}")
        if not indices:
            raise ValueError(f"layers={self.layers!r} leaves no layer to route in a model of {depth} layers")
        return indices

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; ``from_dict`` reads it back."""
        values = dataclasses.asdict(self)
        if not isinstance(self.layers, str):
            values["layers"] = list(self.layers)
        return {**values, "dial": list(self.dial)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MoDConfig:
        """Read ``to_dict``'s form; unknown or missing fields are named in the error."""
        if not isinstance(values, Mapping):
            raise ValueError(f"MoD settings must be a dictionary, not {type(values).__name__}")
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown MoD settings: {', '.join(sorted(map(str, unknown)))}")
        return cls(**values)


def check_threshold(p: object, name: str = "p") -> float:
    """``p`` as a float, if it is a number in [0, 1]."""
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0.0 <= p <= 1.0:
        raise ValueError(f"{name}={p!r}: the threshold must be a number from 0 to 1")
    return float(p)


def check_thresholds(p: object, layers: int) -> Threshold:
    """``p`` as one threshold, or as one for each of ``layers`` MoD layers, [M]."""
    if not isinstance(p, (list, tuple)):
        return check_threshold(p)
    if len(p) != layers:
        raise ValueError(f"p has {len(p)} thresholds for {layers} MoD layers: give one number, or one per MoD layer")
    return tuple(check_threshold(value, f"p[{at}]") for at, value in enumerate(p))


def threshold_at(p: Threshold, layer: int) -> float:
    """The threshold of the ``layer``-th MoD layer."""
    return p[layer] if isinstance(p, tuple) else p


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(choices)}")


def _checked_dial(dial: object) -> tuple[float, ...]:
    if not isinstance(dial, (list, tuple)):
        raise ValueError(f"dial={dial!r}: expected rising scores between 0 and 1, or none")
    scores = [check_threshold(score, f"dial[{at}]") for at, score in enumerate(dial)]
    if scores != sorted(scores) or any(not 0 < score < 1 for score in scores):
        raise ValueError(f"dial={list(dial)}: the scores must rise and lie between 0 and 1")
    return tuple(scores)


def _checked_indices(layers: object) -> tuple[int, ...]:
    if not isinstance(layers, (list, tuple)) or not layers:
        raise ValueError(f"layers={layers!r}: expected 'inner', 'interleaved' or a non-empty list of layer indices")
    for index in layers:
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise ValueError(f"layers={layers!r}: {index!r} is not a layer index (0 or more)")
    if len(set(layers)) != len(layers):
        raise ValueError(f"layers={layers!r}: an index occurs twice")
    return tuple(sorted(layers))
