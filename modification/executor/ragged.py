"""Decoding attention of many rows in one launch on a GPU, each row over exactly the entries of its own store.

Rows lie where their caches put them and have lengths of their own, so the kernels are told addresses instead of being
given one padded tensor: nothing is copied, and no row waits for a longer one (each span of keys is a program of its
own, as in flash decoding, https://pytorch.org/blog/flash-decoding). Needs Triton, which comes with torch for CUDA.
Shapes: R rows, H query heads, G key heads, D head width, S spans.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from modification.executor.blocks import attend, to_device
from modification.storage import Buffer, Row

BLOCK_BYTES = 128  # of one lane of the keys that a program reads at once
SHORTEST = 256  # keys of a span at least: shorter ones cost more in joining than they gain
FIELDS = tl.constexpr(7)  # of a row: addresses of keys, values and columns; capacity, start, end, own column
ALIGNED = tl.constexpr(16)  # bytes: what torch gives is
LOW = tl.constexpr(-1.0e30)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@triton.jit
def _store(k, v, table, k_head, k_row, v_head, v_row, D: tl.constexpr, WIDTH: tl.constexpr):
    """Write a row's new key and value, of one head, behind its others; its column too, if it keeps columns."""
    row, head = tl.program_id(0), tl.program_id(1)
    told = table + row * FIELDS
    keys = tl.multiple_of(tl.load(told), ALIGNED).to(tl.pointer_type(k.dtype.element_ty))
    values = tl.multiple_of(tl.load(told + 1), ALIGNED).to(tl.pointer_type(v.dtype.element_ty))
    columns, capacity, end = tl.load(told + 2), tl.load(told + 3), tl.load(told + 5)
    lanes = tl.arange(0, WIDTH)
    place = (head * capacity + end) * D + lanes
    tl.store(keys + place, tl.load(k + head * k_head + row * k_row + lanes, lanes < D), lanes < D)
    tl.store(values + place, tl.load(v + head * v_head + row * v_row + lanes, lanes < D), lanes < D)
    if (columns != 0) & (head == 0):
        tl.store(columns.to(tl.pointer_type(tl.int32)) + end, tl.load(told + 6).to(tl.int32))


@triton.jit
def _look(
    q, table, part, weight, q_head, q_row, scale, window, span, spans, GROUP: tl.constexpr, QUERIES: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):
    """One row's queries that share a key head, over one span of its keys: their mean of values and log-sum-exp."""
    row, head, at = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1) * GROUP
    told = table + row * FIELDS
    keys = tl.multiple_of(tl.load(told), ALIGNED).to(tl.pointer_type(q.dtype.element_ty))
    values = tl.multiple_of(tl.load(told + 1), ALIGNED).to(tl.pointer_type(q.dtype.element_ty))
    columns, capacity, start = tl.load(told + 2), tl.load(told + 3), tl.load(told + 4)
    end, own = tl.load(told + 5) + 1, tl.load(told + 6)  # the new entry is there by now
    lanes, queries = tl.arange(0, WIDTH), tl.arange(0, QUERIES)
    real = (queries < GROUP)[:, None] & (lanes < D)[None, :]
    asked = tl.load(q + (head * GROUP + queries)[:, None] * q_head + row * q_row + lanes[None, :], real, other=0.0)
    best = tl.full([QUERIES], LOW, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, WIDTH], tl.float32)
    first = start + at * span
    last = tl.minimum(first + span, end)
    for block in range(first, last, BLOCK):
        places = block + tl.arange(0, BLOCK)
        seen = places < last
        if window > 0:
            column = own - (end - 1 - places)  # a store without columns has all of them
            if columns != 0:
                column = tl.load(columns.to(tl.pointer_type(tl.int32)) + places, seen, other=0).to(tl.int64)
            seen = seen & (column > own - window)
        entries = (head * capacity + places) * D
        there = seen[:, None] & (lanes < D)[None, :]
        k = tl.load(keys + entries[:, None] + lanes[None, :], there, other=0.0)
        v = tl.load(values + entries[:, None] + lanes[None, :], there, other=0.0)
        score = tl.dot(asked, tl.trans(k), input_precision="ieee") * scale
        score = tl.where(seen[None, :], score, LOW)
        high = tl.maximum(best, tl.max(score, 1))
        chance = tl.where(seen[None, :], tl.exp(score - high[:, None]), 0.0)
        fade = tl.exp(best - high)
        total = total * fade + tl.sum(chance, 1)
        mixed = mixed * fade[:, None] + tl.dot(chance.to(v.dtype), v, input_precision="ieee")
        best = high
    out = (row * heads + head * GROUP + queries) * spans + at
    tl.store(part + out[:, None] * D + lanes[None, :], mixed / tl.maximum(total, 1.0e-30)[:, None], real)
    tl.store(weight + out, tl.where(total > 0.0, best + tl.log(tl.maximum(total, 1.0e-30)), LOW), queries < GROUP)


class RaggedAttention:
    """Stores the rows' new keys and values, and attends over all that each row holds.

    Args:
        groups: key heads of a layer, G.
        head: width of a head, D.
        dtype: of keys and values.
        device: where they are.
    """

    def __init__(self, groups: int, head: int, dtype: torch.dtype, device: torch.device) -> None:
        self.groups, self.head, self.device = groups, head, device
        self.like = torch.empty(groups, 0, head, dtype=dtype, device=device)
        self.block = BLOCK_BYTES // dtype.itemsize
        self.lanes = max(16, triton.next_power_of_2(head))
        on_gpu = device.type == "cuda"
        self.programs = 4 * torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 16

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, stores: Sequence[Buffer], columns: Sequence[int], window: int | None
    ) -> Tensor:
        """Attention of new tokens of R rows: -> [R, H * D].

        Args:
            q: [H, R, D].
            k, v: [G, R, D].
            stores: each row's keys and values in this layer; each gets one entry.
            columns: of the new tokens, R.
            window: sliding window in tokens, or None.

        Raises:
            ValueError: a store has keys of another type.
        """
        q, k, v = (part.to(self.like.dtype) for part in (q, k, v))  # autocast may have made others of them
        q, k, v = (part if part.stride(-1) == 1 else part.contiguous() for part in (q, k, v))
        for store in stores:
            store.make_place(self.like)
        with torch.cuda.device_of(q):
            mixed = self._launch(q, k, v, stores, columns, window)
        for store in stores:
            store.end += 1
        return mixed

    def _launch(
        self, q: Tensor, k: Tensor, v: Tensor, stores: Sequence[Buffer], columns: Sequence[int], window: int | None
    ) -> Tensor:
        """On the device that is current."""
        told = [self._told(store, column) for store, column in zip(stores, columns, strict=True)]
        table = to_device(told, torch.int64, self.device)
        rows, heads, sizes = len(stores), q.shape[0], {"D": self.head, "WIDTH": self.lanes}
        _store[rows, self.groups](k, v, table, *k.stride()[:2], *v.stride()[:2], **sizes)
        spans, span = self._spans(rows, max(store.length for store in stores) + 1)
        part = torch.empty(rows, heads, spans, self.head, dtype=torch.float32, device=self.device)
        weight = torch.empty(rows, heads, spans, dtype=torch.float32, device=self.device)
        group = heads // self.groups
        _look[rows, self.groups, spans](
            q, table, part, weight, *q.stride()[:2], self.head**-0.5, window or 0, span, spans, GROUP=group,
            QUERIES=max(16, triton.next_power_of_2(group)), BLOCK=self.block, **sizes,
        )
        mixed = (torch.softmax(weight, -1)[..., None] * part).sum(2)  # no product, whose precision has settings
        return mixed.reshape(rows, heads * self.head).to(q.dtype)

    def _told(self, store: Buffer, column: int) -> list[int]:
        rooms = [store.keys_at, store.values_at, store.columns_at]
        return [*rooms, store.capacity, store.start, store.end, column]

    def _spans(self, rows: int, longest: int) -> tuple[int, int]:
        """How many spans keep the device busy, and the keys of each."""
        wanted = max(1, self.programs // (rows * self.groups))
        span = self.block * -(-max(SHORTEST, -(-longest // wanted)) // self.block)
        return -(-longest // span), span

    def difference(self, heads: int) -> float:
        """Largest difference from attention row by row, over values of about 1: on rows of MoD and of dense layers made
        for it, of unlike lengths, with and without entries dropped at the front and a window."""
        noise = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, self.head, generator=noise, device="cpu").to(self.like)

        worst, lengths = 0.0, (5, SHORTEST + 1, 0)
        for kind, window in ((Row, None), (Row, 9), (Buffer, None), (Buffer, 9)):
            q, k, v = drawn(heads, 3), drawn(self.groups, 3), drawn(self.groups, 3)
            stores = [filled(kind(), drawn(self.groups, length), drawn(self.groups, length)) for length in lengths]
            expected = []
            for at, (store, length) in enumerate(zip(stores, lengths, strict=True)):
                one, shape = slice(at, at + 1), (self.groups, -1, self.head)
                keys, values = (
                    torch.cat([past.reshape(shape), new[:, one]], 1)
                    for past, new in ((store.keys, k), (store.values, v))
                )
                columns = torch.arange(length - store.length, length + 1, device=self.device)
                expected.append(attend(q[:, one], keys, values, columns, window))
            found = self(q, k, v, stores, lengths, window)
            worst = max(worst, (found.float() - torch.cat(expected).float()).abs().max().item())
        return worst


def filled(store: Buffer, keys: Tensor, values: Tensor) -> Buffer:
    """A store with entries [H, n, D], all but the first of them."""
    if isinstance(store, Row):
        store.add(keys, values, torch.arange(keys.shape[1], dtype=torch.int32, device=keys.device))
    else:
        store.append(keys[None], values[None])
    store.drop(min(1, store.length))
    return store


def ragged_attention(heads: int, groups: int, head: int, dtype: torch.dtype, device: torch.device) -> RaggedAttention:
    """Attention of many rows at once, tried here against attention row by row.

    Raises:
        RuntimeError: it does not give the same.
    """
    made = RaggedAttention(groups, head, dtype, device)
    difference = made.difference(heads)
    if not difference <= TOLERANCE[dtype]:
        raise RuntimeError(f"attention of many rows at once differs by {difference:.2g}")
    return made

