"""What a MoD layer hands to its stock attention in a cache's place: stores new entries, gives all of them to attend to.

Boundary: knows rows and the order of their entries, not whose they are. Rows of unlike lengths stay where they
lie; only attention that insists on one tensor gets them copied into one, filled up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from modification.storage import Row

NOWHERE = 2**31 - 1  # the column of a padding entry: later than every query


class Slots:
    """What a MoD layer hands to its attention as the cache: stores new entries, returns all keys.

    Args:
        rows: those that take part, R of them.
        columns: of the new tokens, [R, N].
        stored: which of these stay, [R, N]; None: all.
        fillers: the others are nobody's, and what they attend to is thrown away; else each still sees itself.

    Attributes:
        past: keys that were stored before, padding included; ``update`` returns them and the N new ones.
    """

    def __init__(self, rows: list[Row], columns: Tensor, stored: Tensor | None, fillers: bool = False) -> None:
        self._rows, self._columns, self._stored = rows, columns, stored
        self._whole = len(rows) == 1 and stored is None
        self._apart = stored is None or fillers
        self.past = max(row.length for row in rows)

    def key_columns(self) -> Tensor:
        """Columns of the keys that ``update`` will return, [R, past + N]; ask before it."""
        if not self.past:
            return self._columns
        return torch.cat([_stack_columns(self._rows, self.past, self._columns), self._columns], dim=1)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Store [R, H, N, D] and return all keys and values, [R, H, K, D] each: a tensor or :class:`Entries`."""
        if self._whole:
            row = self._rows[0]
            row.add(keys[0], values[0], self._columns[0])
            return row.keys[None], row.values[None]
        if self.past and self._apart and not keys.requires_grad:
            self._store(keys, values)
            return (Entries([row.keys for row in self._rows], self.past, keys, self._stored),
                    Entries([row.values for row in self._rows], self.past, values, self._stored))
        found = keys, values
        if self.past:
            found = (_stack([row.keys if row.length else None for row in self._rows], self.past, keys),
                     _stack([row.values if row.length else None for row in self._rows], self.past, values))
        self._store(keys, values)
        return found

    def _store(self, keys: Tensor, values: Tensor) -> None:
        for at, row in enumerate(self._rows):
            where = slice(None) if self._stored is None else self._stored[at]
            row.add(keys[at][:, where], values[at][:, where], self._columns[at][where])


class Entries:
    """Keys or values of R rows where they lie, which passes for a tensor [R, H, past + N, D].

    ``scaled_dot_product_attention`` is run row by row over them, by PyTorch's ``__torch_function__``
    (https://docs.pytorch.org/docs/stable/notes/extending.html); anything else gets one tensor, copied together.

    Attributes:
        parts: each row's stored entries, its new ones at the end, [H, n, D].
        past: longest row's entries before the new ones; shorter ones are filled up behind what they had.
        fresh: the new entries, [R, H, N, D].
        stored: those of them that ``parts`` have, [R, N], where some are fillers; None: all.
        repeats: query heads that share a head, if each is to have its own: that many times H heads seem to be there.
    """

    def __init__(
        self, parts: list[Tensor], past: int, fresh: Tensor, stored: Tensor | None = None, repeats: int = 1
    ) -> None:
        self.parts, self.past, self.fresh, self.stored, self.repeats = parts, past, fresh, stored, repeats
        self.dtype, self.device = fresh.dtype, fresh.device
        rows, heads, new, width = fresh.shape
        self.shape = torch.Size((rows, heads * repeats, past + new, width))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.padded(), name)

    def __getitem__(self, where: Any) -> Any:
        whole = slice(None)
        return _Spread(self) if where == (whole, whole, None, whole, whole) else self.padded()[where]

    def padded(self) -> Tensor:
        """A copy of all, [R, H, past + N, D], zeros where a row has less."""
        counts = [self.fresh.shape[2]] * len(self.parts) if self.stored is None else self.stored.sum(1).tolist()
        held = [part[:, : part.shape[1] - new] for part, new in zip(self.parts, counts, strict=True)]
        whole = _stack([*held], self.past, self.fresh)
        return whole if self.repeats == 1 else whole.repeat_interleave(self.repeats, 1)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if function is F.scaled_dot_product_attention and (found := _row_by_row(*args, **named)) is not None:
            return found
        return function(*tree_map(_tensor, args), **tree_map(_tensor, named))


class _Spread:
    """``Entries[:, :, None]``, which transformers expands and reshapes to give every query head keys of its own.

    Anything else that is asked of it is asked of the tensor.
    """

    def __init__(self, entries: Entries, sizes: tuple[int, ...] = ()) -> None:
        self._entries, self._sizes = entries, sizes

    def __getattr__(self, name: str) -> Any:
        whole = self._entries.padded()[:, :, None]
        return getattr(whole.expand(self._sizes) if self._sizes else whole, name)

    def expand(self, *sizes: Any) -> Any:
        """To [R, H, repeats, K, D], which is not done yet."""
        return _Spread(self._entries, _listed(sizes))

    def reshape(self, *sizes: Any) -> Any:
        """To [R, H * repeats, K, D]: entries still, if that is what is asked for."""
        whole, asked = self._entries, self._sizes
        if len(asked) == 5 and _listed(sizes) == (asked[0], asked[1] * asked[2], *asked[3:]):
            return Entries(whole.parts, whole.past, whole.fresh, whole.stored, whole.repeats * asked[2])
        return self.__getattr__("reshape")(*sizes)


def _listed(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    """Sizes as torch takes them: one by one, or in one sequence."""
    return tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes


def _row_by_row(
    query: Tensor, key: Any, value: Any, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, **options: Any,
) -> Tensor | None:
    """Attention [R, H, N, D] of each row over its own entries; None where one row's can't be told from another's."""
    if not (isinstance(key, Entries) and isinstance(value, Entries)) or attn_mask is None or is_causal:
        return None
    if attn_mask.dim() != 4 or len(attn_mask) != len(key.parts):
        return None
    out, options = [], {**options, "enable_gqa": options.get("enable_gqa", False) or key.repeats > 1}
    for at, (keys, values) in enumerate(zip(key.parts, value.parts, strict=True)):
        fresh = attn_mask[at : at + 1, ..., key.past :]
        fresh = fresh if key.stored is None else fresh[..., key.stored[at]]
        seen = torch.cat([attn_mask[at : at + 1, ..., : keys.shape[1] - fresh.shape[-1]], fresh], dim=-1)
        out.append(F.scaled_dot_product_attention(
            query[at : at + 1], keys[None], values[None], seen, dropout_p=dropout_p, **options
        ))
    return torch.cat(out)


def _tensor(value: Any) -> Any:
    return value.padded() if isinstance(value, Entries) else value


def _stack(parts: list[Tensor | None], past: int, new: Tensor) -> Tensor:
    """Rows' entries [H, n, D], filled up with zeros to ``past``, then new ones [R, H, N, D]: [R, H, past + N, D]."""
    rows, heads, count, width = new.shape
    out = new.new_empty((rows, heads, past + count, width))
    out[:, :, past:] = new
    for at, part in enumerate(parts):
        held = 0 if part is None else part.shape[1]
        if part is not None:
            out[at, :, :held] = part
        out[at, :, held:past] = 0
    return out


def _stack_columns(rows: list[Row], length: int, like: Tensor) -> Tensor:
    out = like.new_full((len(rows), length), NOWHERE)
    for at, row in enumerate(rows):
        out[at, : row.length] = row.columns.to(like.device)
    return out
