"""The routed decoder layer: a subclass of the family's own layer with a router beside its children.

Two paths obey one decision. The masked path computes every token and hides what was skipped: it is
the reference, and gives skipped tokens' gates a gradient. The gathered path computes routed tokens
alone.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modification.architectures import Family
from modification.cache import NOWHERE, RaggedLayer, Slots
from modification.routing import Router, RoutingCall, Selection, select, straight_through

Arguments = dict[str, Any]
CALL = "mod_call"  # keyword under which a RoutingCall travels through the stock model


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

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, T, D] -> [B, T, D]. Without a routing call the layer is the dense parent's."""
        kwargs.update(zip(self.argument_names, args, strict=False))
        call: RoutingCall | None = kwargs.pop(CALL, None)
        if call is None:
            return self._stock(hidden_states, kwargs)
        cache = kwargs[self.family.cache_argument]
        store = None if cache is None else cache.layers[self.layer_index]
        logit = self.router(hidden_states)
        gate = torch.sigmoid(logit)
        run = call.decide(self.layer_index, gate)
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
        mask = self._visible(columns, columns if slots is None else slots.key_columns())
        # A token sees itself even where it is skipped: what it would have been had it run.
        own = torch.eye(run.shape[1], dtype=torch.bool, device=x.device)
        mask[..., mask.shape[-1] - run.shape[1] :] &= stays[:, None, None, :] | own
        y = self._block(x, gate, call, self._arguments(kwargs, slots, mask))
        out = torch.where(run[..., None], y, x)
        if call.config.gate == "straight_through" and torch.is_grad_enabled():
            gradient = straight_through(logit, call.threshold(self.layer_index))
            out = out + gradient[..., None].to(x.dtype) * (y - x).detach()
        return out

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
        arguments = self._arguments(kwargs, slots, self._gathered_mask(columns, slots, chosen, call))
        if chosen.index.shape == run.shape and chosen.filled is None:
            return self._block(x, gate, call, arguments)
        arguments.update(_gathered_positions(kwargs, chosen))
        return chosen.scatter(x, self._block(chosen.gather(x), chosen.gather(gate), call, arguments))

    def _store_skipped(
        self, x: Tensor, skipped: Tensor, call: RoutingCall, store: RaggedLayer, kwargs: Arguments
    ) -> None:
        """Keep mode: keys and values of skipped tokens [B, T], projected without running the block."""
        chosen = select(skipped)
        if chosen is None:
            return
        slots = _open(store, len(skipped), call.columns.to(x.device)[chosen.index], chosen)
        position = _gathered_positions(kwargs, chosen).get("position_embeddings")
        slots.update(*self.family.keys_values(self, chosen.gather(x), position))

    def _block(self, x: Tensor, gate: Tensor, call: RoutingCall, arguments: Arguments) -> Tensor:
        if call.config.gate == "paper":
            return self.family.gated_block(self, x, gate[..., None].to(x.dtype), arguments)
        return self._stock(x, arguments)

    def _stock(self, x: Tensor, arguments: Arguments) -> Tensor:
        out: Tensor = super().forward(x, **arguments)
        return out

    def _arguments(self, kwargs: Arguments, slots: Slots | None, mask: Tensor | None) -> Arguments:
        """The stock arguments with this layer's own cache window and mask [R, 1, N, K] in place."""
        if mask is not None and self._kernel() == "eager":
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)
        return {**kwargs, self.family.cache_argument: slots, "attention_mask": mask}

    def _gathered_mask(
        self, columns: Tensor, slots: Slots | None, chosen: Selection, call: RoutingCall
    ) -> Tensor | None:
        """None where the kernel's own rule (all keys, or causal from the first) is already right."""
        past = 0 if slots is None else slots.past
        plain = self._kernel() == "sdpa" and self.window is None and len(chosen.rows) == 1
        # A lone query sees all keys, unless the call has stored skipped tokens that come after it.
        last = columns.shape[1] == 1 and (call.config.kv == "evict" or len(call.columns) == 1)
        if plain and (last or not past):
            return None
        mask = self._visible(columns, _own_columns(columns, chosen) if slots is None else slots.key_columns())
        if chosen.filled is not None:
            mask |= ~chosen.filled[:, None, :, None]  # fillers are thrown away; keep their softmax finite
        return mask

    def _visible(self, columns: Tensor, key_columns: Tensor) -> Tensor:
        """Which keys a query may see by place: [R, N] and [R, K] -> [R, 1, N, K] bool."""
        distance = columns[:, :, None] - key_columns[:, None, :]
        seen = distance >= 0
        if self.window is not None:
            seen &= distance < self.window
        return seen[:, None]

    def _kernel(self) -> str:
        kernel: str = getattr(self, self.family.attention).config._attn_implementation
        return kernel


def _own_columns(columns: Tensor, chosen: Selection) -> Tensor:
    """Columns of the chosen tokens as keys, [R, N]; fillers are nowhere."""
    return columns if chosen.filled is None else columns.masked_fill(~chosen.filled, NOWHERE)


def _open(store: RaggedLayer, batch: int, columns: Tensor, chosen: Selection) -> Slots:
    """A cache window for the chosen tokens."""
    return store.open(batch, chosen.rows.tolist(), _own_columns(columns, chosen), chosen.filled)


def _gathered_positions(kwargs: Arguments, chosen: Selection) -> Arguments:
    """Position arguments of the chosen tokens: they keep their true places."""
    found: Arguments = {}
    if kwargs.get("position_ids") is not None:
        found["position_ids"] = chosen.gather(kwargs["position_ids"])
    if kwargs.get("position_embeddings") is not None:
        found["position_embeddings"] = tuple(chosen.gather(part) for part in kwargs["position_embeddings"])
    return found


@functools.cache
def routed_class(layer_class: type[nn.Module], family: Family) -> type[MoDLayer]:
    """The MoD subclass of a stock layer class; the same class at every call."""
    names = tuple(inspect.signature(layer_class.forward).parameters)[2:]
    body = {"family": family, "argument_names": names, "__module__": __name__, "__doc__": MoDLayer.__doc__}
    return type(f"MoD{layer_class.__name__}", (MoDLayer, layer_class), body)
