"""What a generation costs, counted from shapes: FLOPs and bytes, routed against dense. Pure arithmetic.

A matrix product of [n, a] by [a, b] counts 2nab FLOPs (one multiply, one add); norms, softmax and
activations are left out, as is usual (e.g. https://arxiv.org/abs/2001.08361, section 2.1). In a layer with a
sliding window a token meets the keys in its window alone.

Decoding one token per row reads every weight that runs once, however many rows share it, and every stored key
and value of each row that runs: that traffic, not FLOPs, bounds its speed (https://arxiv.org/abs/2211.05102,
section 2).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from modification.architectures import entry_width, head_width, windows_of
from modification.trace import Step


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes that cost depends on.

    Attributes:
        depth: decoder layers.
        mod_layers: indices of the routed ones.
        layer_weights: weights in each layer's matrices; of its experts, if it has any, those that one token meets.
        head_weights: weights of the output head.
        attention_width: query heads times head width.
        router_weights: weights of one router.
        keep: whether skipped tokens' keys and values are kept (``kv="keep"``).
        kv_weights: weights of one layer's key and value projections.
        entry_width: numbers in one token's keys and values in one layer.
        expert_weights: the experts' part of each layer's weights; empty if no layer has any.
        expert_share: of all experts, those that one token meets.
        windows: each layer's sliding window in tokens, None where attention is full; empty if it is everywhere.
    """

    depth: int
    mod_layers: tuple[int, ...]
    layer_weights: tuple[int, ...]
    head_weights: int
    attention_width: int
    router_weights: int
    keep: bool = False
    kv_weights: int = 0
    entry_width: int = 0
    expert_weights: tuple[int, ...] = ()
    expert_share: float = 1.0
    windows: tuple[int | None, ...] = ()

    @classmethod
    def of(cls, model: Any) -> ModelShape:
        """Read the shape off a MoD model."""
        layers = model.family.decoder_layers(model)
        return cls.from_config(model.config, layers, model.mod_layers, model.mod_config.kv == "keep")

    @classmethod
    def from_config(
        cls, config: Any, layers: Iterable[Any], mod_layers: Sequence[int], keep: bool = False
    ) -> ModelShape:
        """The shape of a model of that config with such layers; they may be on the meta device."""
        sizes = [_sizes(layer, config) for layer in layers]
        windows, entry = windows_of(config), entry_width(config)
        return cls(
            depth=config.num_hidden_layers, mod_layers=tuple(mod_layers),
            layer_weights=tuple(all_of for all_of, _, _ in sizes),
            head_weights=config.vocab_size * config.hidden_size,
            attention_width=config.num_attention_heads * head_width(config),
            router_weights=config.hidden_size, keep=keep, kv_weights=config.hidden_size * entry, entry_width=entry,
            expert_weights=tuple(part for _, part, _ in sizes) if any(part for _, part, _ in sizes) else (),
            expert_share=min(share for _, _, share in sizes), windows=windows if any(windows) else (),
        )

    @property
    def each_experts(self) -> tuple[int, ...]:
        """The experts' part of every layer's weights, 0 where there are none."""
        return self.expert_weights or (0,) * self.depth

    def window(self, layer: int) -> int | None:
        """Sliding window of a layer in tokens, None where attention is full."""
        return self.windows[layer] if self.windows else None

    def visible(self, layer: int, context: int) -> int:
        """Tokens of a context that the last of them can see in a layer, itself included."""
        window = self.window(layer)
        return context if window is None else min(context, window)

    def prefill_flops(self, tokens: int, ran: Sequence[int] | None = None, end: float | None = None) -> int:
        """FLOPs of a prompt of ``tokens`` from an empty cache, logits of the last token alone.

        Args:
            ran: tokens that ran in each MoD layer, [M], evenly spread over the prompt where there are sliding windows;
                None for the dense parent.
            end: where the last layer makes keys and values, and the last token's result alone, as in the fast
                executor: whether that token runs there (on paper, how likely). None: all results, as in transformers.
        """
        counts = [tokens] * self.depth
        for layer, count in zip(self.mod_layers if ran is not None else (), ran or (), strict=True):
            counts[layer] = count
        routers = 0 if ran is None else 2 * tokens * self.router_weights * len(self.mod_layers)
        layers = sum(
            layer_flops(self, layer, n, pairs(n, max(1, round(self.visible(layer, tokens) * n / tokens))))
            for layer, n in enumerate(counts)
        )
        unneeded = 0 if end is None else self._unneeded(tokens, counts[-1], end)
        return layers - unneeded + 2 * self.head_weights + routers

    def _unneeded(self, tokens: int, count: int, end: float) -> int:
        """FLOPs of ``count`` tokens' results in the last layer, keys and values not counted, less the last token's."""
        layer = self.depth - 1
        met, weights = round(self.visible(layer, tokens) * count / tokens), self.layer_weights[layer] - self.kv_weights
        own = end * flops(weights, self.attention_width, 1, max(1, met))
        return flops(weights, self.attention_width, count, pairs(count, max(1, met))) - round(own)

    def decode_bytes(
        self, itemsize: int, entries: npt.NDArray[np.int64], ran: npt.NDArray[np.bool_] | None = None,
        layer_bytes: Sequence[tuple[float, float]] | None = None,
    ) -> int:
        """Bytes read to decode one token of each of B rows.

        Args:
            itemsize: bytes of a weight, key or value.
            entries: entries that attention meets, the token's own included, [depth, B].
            ran: whether the row's token runs in each MoD layer, [M, B]; None for the dense parent.
            layer_bytes: of each layer's weights but its experts, and of all its experts, where ``itemsize`` doesn't
                tell them.
        """
        runs = np.ones(entries.shape, bool)
        routers = 0
        if ran is not None:
            runs[list(self.mod_layers)] = ran
            routers = 4 * self.router_weights * len(self.mod_layers)  # float32
        if layer_bytes is None:
            layer_bytes = [
                (itemsize * (weights - experts), itemsize * experts / self.expert_share)
                for weights, experts in zip(self.layer_weights, self.each_experts, strict=True)
            ]
        # An expert is read if any row meets it; rows choose by themselves.
        layers: int = round(sum(
            common + experts * (1 - (1 - self.expert_share) ** rows)
            for (common, experts), rows in zip(layer_bytes, runs.sum(1).tolist(), strict=True) if rows
        ))
        return layers + itemsize * (self.head_weights + int((entries * runs).sum()) * self.entry_width) + routers


def _sizes(layer: Any, config: Any) -> tuple[int, int, float]:
    """Weights of a layer's matrices that one token meets, its experts' part of them, and the share of all experts that
    this is; experts come stacked, [E, ., .]."""
    # Packed weights hide their sizes; an adapter's parts are not counted, what it adapts is.
    linear = [
        part for name, part in layer.named_modules()
        if hasattr(part, "in_features") and not hasattr(part, "base_layer") and "lora_" not in name
    ]
    weights = sum(part.in_features * part.out_features for part in linear) or sum(
        p.numel() for n, p in layer.named_parameters()
        if p.dim() == 2 and not n.startswith("router.") and "lora_" not in n
    )
    stacked: list[Any] = [p for p in layer.parameters() if p.dim() == 3]
    if not stacked:
        return weights, 0, 1.0
    met = int(config.num_experts_per_tok)
    experts = met * sum(p.numel() // len(p) for p in stacked)
    return weights + experts, experts, met / len(stacked[0])


@dataclass(slots=True)
class CostMeter:
    """Adds up FLOPs step by step, for the model as routed and for its dense parent, all layers counted whole.

    Attributes:
        routed: FLOPs counted for the MoD model.
        dense: FLOPs counted for the dense parent on the same tokens.
    """

    shape: ModelShape
    routed: int = 0
    dense: int = 0
    _seen: int = 0
    _stored: list[int] = field(init=False)  # entries of each MoD layer
    _columns: list[deque[int]] = field(init=False)  # theirs, where there is a window
    _all: Counter[tuple[int, int | None]] = field(init=False)  # layers by weights and window
    _plain: Counter[tuple[int, int | None]] = field(init=False)  # those that are no MoD layers

    def __post_init__(self) -> None:
        shape = self.shape
        self._stored, self._columns = [0] * len(shape.mod_layers), [deque() for _ in shape.mod_layers]
        kinds = [(shape.layer_weights[layer], shape.window(layer)) for layer in range(shape.depth)]
        self._all = Counter(kinds)
        self._plain = self._all - Counter(kinds[layer] for layer in shape.mod_layers)

    def add(self, step: Step) -> None:
        """Count one step: N tokens of which some ran in each MoD layer."""
        shape, new, end = self.shape, len(step.tokens), self._seen + len(step.tokens)
        met = {window: pairs(end, window) - pairs(self._seen, window) for _, window in self._all}
        cost = {kind: flops(kind[0], shape.attention_width, new, met[kind[1]]) for kind in self._all}
        head = 2 * shape.head_weights  # logits are computed for the last token alone
        self.dense += sum(count * cost[kind] for kind, count in self._all.items()) + head
        self.routed += sum(count * cost[kind] for kind, count in self._plain.items()) + head
        for at, ran in enumerate(step.routed.tolist()):
            self._add_routed(at, ran)
        self._seen = end

    @property
    def saved(self) -> float:
        """Share of the dense parent's FLOPs that were not spent, 0 to 1."""
        return 1 - self.routed / self.dense if self.dense else 0.0

    def _add_routed(self, at: int, ran: list[bool]) -> None:
        """The tokens of the ``at``-th MoD layer."""
        layer, met = self.shape.mod_layers[at], 0
        window = self.shape.window(layer)
        for column, runs in enumerate(ran, self._seen):
            if runs or self.shape.keep:
                self._stored[at] += 1
            if window is not None:
                self._stored[at] -= self._leave(self._columns[at], column, window, runs or self.shape.keep)
            if runs:
                met += self._stored[at]
        count = sum(ran)
        self.routed += layer_flops(self.shape, layer, count, met) + 2 * len(ran) * self.shape.router_weights
        if self.shape.keep:
            self.routed += 2 * (len(ran) - count) * self.shape.kv_weights

    @staticmethod
    def _leave(columns: deque[int], column: int, window: int, stays: bool) -> int:
        """Move a layer's window on to ``column``: how many entries left it."""
        before = len(columns)
        while columns and columns[0] <= column - window:
            columns.popleft()
        gone = before - len(columns)
        if stays:
            columns.append(column)
        return gone


def pairs(tokens: int, window: int | None = None) -> int:
    """Keys that so many tokens in a row meet in all: each itself and those before it, at most ``window``."""
    inside = tokens if window is None else min(tokens, window)
    return inside * (inside + 1) // 2 + (tokens - inside) * inside


def layer_flops(shape: ModelShape, layer: int, tokens: int, met: int) -> int:
    """FLOPs of a layer for ``tokens`` queries that meet so many keys in all."""
    return flops(shape.layer_weights[layer], shape.attention_width, tokens, met)


def flops(weights: int, attention_width: int, tokens: int, met: int) -> int:
    """The same by a layer's sizes, see :class:`ModelShape`."""
    return 2 * tokens * weights + 4 * met * attention_width
