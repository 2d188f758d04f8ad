"""The routed decoder layer: a subclass of the family's own layer with a router beside its children.

Two paths obey one decision. The masked path computes every token and hides what was skipped: it is
the reference, and gives skipped tokens' gates a gradient. The gathered path computes routed tokens
alone.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modification.architectures import Family
from modification.cache import RaggedLayer
from modification.presence import Presence
from modification.routing import Router, RoutingCall, Selection, select, straight_through
from modification.slots import NOWHERE, Slots

Arguments = dict[str, Any]
_LEAST = 1e-3  # share of a token's keys that is seen
CALL = "mod_call"  # keyword under which a RoutingCall travels through the stock model
# The same for models that hand no unknown keywords to their layers; set for the length of one call.
CURRENT_CALL: ContextVar[RoutingCall | None] = ContextVar("mod_call", default=None)


class MoDLayer(nn.Module):
    """Mixed in before a stock decoder layer class; made by :func:`routed_class`.

    Attributes:
        layer_index: the layer's place in the model.
        window: sliding-window length in tokens, or None.
    """

    family: ClassVar[Family]
    argument_names: ClassVar[tuple[str, ...]]
    router: Router
    layer_index: int
    window: int | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Taken here, not in forward: a checkpointed layer is run again after the call has ended.
        if not self.family.passes_keywords:
            kwargs[CALL] = CURRENT_CALL.get()
        return super().__call__(*args, **kwargs)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """[B, T, D] -> [B, T, D]. Without a routing call the layer is the dense parent's."""
        kwargs.update(zip(self.argument_names, args, strict=False))
        call: RoutingCall | None = kwargs.pop(CALL, None)
        out = stock_block(self, hidden_states, kwargs) if call is None else self._routed(hidden_states, call, kwargs)
        return (out, None) if self.family.returns_tuple else out

    def _routed(self, hidden_states: Tensor, call: RoutingCall, kwargs: Arguments) -> Tensor:
        cache = kwargs[self.family.cache_argument]
        store = None if cache is None else cache.layers[self.layer_index]
        logit = self.router(hidden_states)
        gate = torch.sigmoid(logit)
        run = call.decide(self.layer_index, call.read(gate))
        if call.path == "masked":
            return self._masked(hidden_states, logit, gate, run, call, store, kwargs)
        return self._gathered(hidden_states, gate, run, call, store, kwargs)

    def _masked(
        self, x: Tensor, logit: Tensor, gate: Tensor, run: Tensor, call: RoutingCall, store: RaggedLayer | None,
        kwargs: Arguments,
    ) -> Tensor:
        stays = run if call.config.kv == "evict" else call.real(run)
        columns = call.columns.to(x.device).expand(run.shape)
        slots = None if store is None else store.open(len(run), range(len(run)), columns, stays)
        keys = columns if slots is None else slots.key_columns()
        mask = self._visible(columns, keys, call.documents, call.shown)
        # A token sees itself even where it is skipped: what it would have been had it run.
        own = torch.eye(run.shape[1], dtype=torch.bool, device=x.device)
        taught = call.config.gate == "straight_through" and torch.is_grad_enabled()
        gradient = straight_through(logit, call.threshold(self.layer_index)) if taught else None
        share, seen = call.share(self.layer_index) if taught else None, None
        if share is not None and gradient is not None and call.config.kv == "evict" and slots is None:
            partial = (share < 1) & call.real(run)
            stays = stays | partial
            seen = torch.where(partial, torch.log(share.clamp_min(_LEAST) + gradient), 0)
        mask[..., mask.shape[-1] - run.shape[1] :] &= stays[:, None, None, :] | own
        by_mask = call.kernel == "eager" or call.run_block is not None  # compiled code doesn't look for modes
        arguments = self._arguments(kwargs, call, slots, mask, keys, None, seen if by_mask else None)
        with contextlib.nullcontext() if seen is None or by_mask else Presence(seen):
            y = self._block(x, gate, call, arguments)
        out = torch.where(run[..., None], y, x)
        return out if gradient is None else _teach(x, y, out, gradient, share)

    def _gathered(
        self, x: Tensor, gate: Tensor, run: Tensor, call: RoutingCall, store: RaggedLayer | None, kwargs: Arguments
    ) -> Tensor:
        if call.config.kv == "keep":
            store = RaggedLayer() if store is None else store
            self._store_skipped(x, call.real(run) & ~run, call, store, kwargs)
        chosen = select(run)
        if chosen is None:
            return x
        columns = call.columns.to(x.device)[chosen.index]
        slots = None if store is None else _open(store, len(run), columns, chosen)
        keys = _own_columns(columns, chosen) if slots is None else slots.key_columns()
        mask = self._gathered_mask(columns, keys, slots, chosen, call, kwargs)
        arguments = self._arguments(kwargs, call, slots, mask, keys, chosen.rows)
        if chosen.index.shape == run.shape and chosen.filled is None:
            return self._taught(x, self._block(x, gate, call, arguments), gate, call, chosen.rows)
        arguments.update(_gathered_positions(kwargs, chosen))
        some, some_gates = chosen.gather(x), chosen.gather(gate)
        y = self._block(some, some_gates, call, arguments)
        return chosen.scatter(x, self._taught(some, y, some_gates, call, chosen.rows))

    def _taught(self, x: Tensor, y: Tensor, gate: Tensor, call: RoutingCall, rows: Tensor) -> Tensor:
        """Outputs y [R, N, D] of tokens that ran, with the straight-through slope for their gates [R, N]."""
        if call.config.gate != "straight_through" or not gate.requires_grad:
            return y
        slope = straight_through(torch.logit(gate, eps=1e-6), call.threshold(self.layer_index)[rows])
        return y + slope[..., None].to(y.dtype) * (y - x).detach()

    def _store_skipped(
        self, x: Tensor, skipped: Tensor, call: RoutingCall, store: RaggedLayer, kwargs: Arguments
    ) -> None:
        """Keep mode: keys and values of skipped tokens [B, T], by running the block as far as its cache."""
        chosen = select(skipped)
        if chosen is None:
            return
        slots = _open(store, len(skipped), call.columns.to(x.device)[chosen.index], chosen)
        arguments = {**kwargs, **_gathered_positions(kwargs, chosen), self.family.cache_argument: _NoFurther(slots)}
        with contextlib.suppress(_Stored):
            stock_block(self, chosen.gather(x), {**arguments, "attention_mask": None})

    def _block(self, x: Tensor, gate: Tensor, call: RoutingCall, arguments: Arguments) -> Tensor:
        if call.config.gate == "paper":
            return self.family.gated_block(self, x, gate[..., None].to(x.dtype), arguments)
        # A cache's growing buffers are not for compiled code.
        run = stock_block if arguments[self.family.cache_argument] is not None else call.run_block or stock_block
        return run(self, x, arguments)

    def _arguments(
        self, kwargs: Arguments, call: RoutingCall, slots: Slots | None, mask: Tensor | None, keys: Tensor,
        rows: Tensor | None, seen: Tensor | None = None,
    ) -> Arguments:
        """The stock arguments with the cache window and mask [R, 1, N, K] of ``rows`` (None: all).

        ``seen`` [R, K] is added to the keys' scores.
        """
        found = {**kwargs, self.family.cache_argument: slots, "attention_mask": mask}
        if mask is None:
            return found
        bias, least = torch.zeros((), dtype=torch.float32, device=mask.device), torch.finfo(torch.float32).min
        if (alibi := kwargs.get("alibi")) is not None:
            own = _key_bias(alibi, len(call.p), rows, keys)
            found["alibi"] = own if alibi.dim() == 4 else own.flatten(0, 1)
            if alibi.dim() == 4:  # falcon looks for it in the mask, scaled
                width = getattr(self, self.family.attention).head_dim
                bias, least = own / math.sqrt(width), torch.finfo(own.dtype).min
        if seen is not None:
            bias = bias + seen[:, None, None, :]
        if call.kernel == "eager" or bias.dim():
            found["attention_mask"] = torch.where(mask, bias, least)
        return found

    def _gathered_mask(
        self, columns: Tensor, keys: Tensor, slots: Slots | None, chosen: Selection, call: RoutingCall,
        kwargs: Arguments,
    ) -> Tensor | None:
        """None where the kernel's own rule (all keys, or causal from the first) is already right."""
        past = 0 if slots is None else slots.past
        documents, shown = (
            None if part is None else part.to(columns.device)[chosen.rows] for part in (call.documents, call.shown)
        )
        plain = documents is None and shown is None and self.window is None and kwargs.get("alibi") is None
        plain = plain and call.kernel == "sdpa" and len(chosen.rows) == 1
        # A lone query sees all keys, unless the call has stored skipped tokens that come after it.
        last = columns.shape[1] == 1 and (call.config.kv == "evict" or len(call.columns) == 1)
        if plain and (last or not past):
            return None
        mask = self._visible(columns, keys, documents, shown)
        if chosen.filled is not None:
            mask |= ~chosen.filled[:, None, :, None]  # fillers are thrown away; keep their softmax finite
        return mask

    def _visible(
        self, columns: Tensor, key_columns: Tensor, documents: Tensor | None, shown: Tensor | None
    ) -> Tensor:
        """Which keys a query may see by place, document and mask: [R, N], [R, K] and [R, T] twice -> [R, 1, N, K]."""
        queries, keys = columns[:, :, None], key_columns[:, None, :]
        seen = queries >= keys  # their distance would be eight times as large as this
        if self.window is not None:
            seen &= keys > queries - self.window
        if documents is not None:
            own = documents.to(columns.device)
            there = own.gather(1, key_columns.clamp(max=own.shape[1] - 1))
            seen &= own.gather(1, columns)[:, :, None] == there[:, None, :]
        if shown is not None:
            kept = shown.to(columns.device)
            seen &= kept.gather(1, key_columns.clamp(max=kept.shape[1] - 1))[:, None, :]
        return seen[:, None]


def _teach(x: Tensor, y: Tensor, out: Tensor, gradient: Tensor, share: Tensor | None) -> Tensor:
    """The output with a gradient for the gate, the straight-through one of sigmoid(logit(g) - logit(p)).

    What that gradient meets should be what running the token is worth, loss(skipped) - loss(run). The slope of
    the loss where the token is (run: at y, skipped: at x) is far from it: a trained block is near its best, so
    that tokens that run seem to gain nothing by it. With ``between``, some tokens get x + u (y - x) with u drawn
    evenly from (0, 1), and others see their keys with weight u; the mean slope there is the difference itself, and
    the other tokens' gates are left alone.

    Args:
        x, y, out: [B, T, D] before the layer, after its block, and as decided.
        gradient: zeros that carry it, [B, T].
        share: u, and 1 or more elsewhere, [B, T]; None without ``between``.
    """
    gradient = gradient[..., None].to(x.dtype)
    if share is not None:
        share = share[..., None].to(x)
        out = torch.where(share < 1, x + share * (y - x), out)
        gradient = torch.where(share < 1, gradient, 0)
    return out + gradient * (y - x).detach()


def stock_block(layer: Any, x: Tensor, arguments: Arguments) -> Tensor:
    """The family's own layer on x, [R, N, D], as if it were no MoD layer. A plain function, so that it can be compiled
    once for all layers."""
    out = super(MoDLayer, layer).forward(x, **arguments)
    hidden: Tensor = out[0] if isinstance(out, tuple) else out
    return hidden


def _own_columns(columns: Tensor, chosen: Selection) -> Tensor:
    """Columns of the chosen tokens as keys, [R, N]; fillers are nowhere."""
    return columns if chosen.filled is None else columns.masked_fill(~chosen.filled, NOWHERE)


def _open(store: RaggedLayer, batch: int, columns: Tensor, chosen: Selection) -> Slots:
    """A cache window for the chosen tokens."""
    return store.open(batch, chosen.rows.tolist(), _own_columns(columns, chosen), chosen.filled, fillers=True)


def _gathered_positions(kwargs: Arguments, chosen: Selection) -> Arguments:
    """Position arguments of the chosen tokens: they keep their true places."""
    found: Arguments = {}
    if kwargs.get("position_ids") is not None:
        found["position_ids"] = chosen.gather(kwargs["position_ids"])
    if kwargs.get("position_embeddings") is not None:
        found["position_embeddings"] = tuple(chosen.gather(part) for part in kwargs["position_embeddings"])
    return found


class _Stored(Exception):
    """Ends a block once its keys and values are in the cache."""


class _NoFurther:
    """A cache window after whose update nothing more is wanted."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> None:
        self.slots.update(keys, values)
        raise _Stored


def _key_bias(alibi: Tensor, batch: int, rows: Tensor | None, keys: Tensor) -> Tensor:
    """ALiBi of some rows' keys: [B * H, 1, all] or [B, H, 1, all], and columns [R, K], -> [R, H, 1, K]."""
    whole = alibi.reshape(batch, -1, alibi.shape[-1])
    whole = whole if rows is None else whole[rows]
    places = keys.clamp(max=whole.shape[-1] - 1)[:, None].expand(-1, whole.shape[1], -1)
    return whole.gather(2, places)[:, :, None]


@functools.cache
def routed_class(layer_class: type[nn.Module], family: Family) -> type[MoDLayer]:
    """The MoD subclass of a stock layer class; the same class at every call."""
    names = tuple(inspect.signature(layer_class.forward).parameters)[2:]
    body = {"family": family, "argument_names": names, "__module__": __name__, "__doc__": MoDLayer.__doc__}
    return type(f"MoD{layer_class.__name__}", (MoDLayer, layer_class), body)
