"""The fast executor for Llama-shaped families: no framework between the kernels, no work for skipped tokens.

Prefill gathers the routed tokens of a chunk in each MoD layer; of the last layer it makes keys, values and the last
token's result. Decode scores a row at every router at once after each layer that ran: a skipped layer leaves the row as
it is, so its score for the next one is known already, and skipping costs nothing. Shapes: N tokens of a chunk, W width,
M MoD layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modification.cache import RaggedCache
from modification.config import Threshold, threshold_at
from modification.executor.base import Executor, Pass
from modification.executor.blocks import Block, Rotation, attend, stacked_routers, to_device
from modification.executor.native import NativeDecoder, native_obstacle
from modification.executor.products import Products, direct_pays
from modification.routing import OPEN, bend

if TYPE_CHECKING:  # it needs Triton
    from modification.executor.ragged import RaggedAttention

PIECE = 512  # tokens that go through a layer's products together on a CPU


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some tokens of a chunk: ``count`` of them, and where they are, with fillers whose results mean nothing."""

    count: int
    where: slice | Tensor

    def of(self, x: Tensor) -> Tensor:
        """Their rows of x."""
        return x[self.where] if isinstance(self.where, slice) else x.index_select(0, self.where)

    def put(self, x: Tensor, rows: Tensor) -> None:
        """Replace their rows of x."""
        if isinstance(self.where, slice):
            x[self.where] = rows
        else:
            x.index_copy_(0, self.where[: self.count], rows[: self.count])


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the new token of each row stands: its column, for the host and on the device, and its rotation."""

    columns: list[int]
    there: Tensor
    rotation: Rotation


class Fast(Executor):
    """Runs a model's layers through :class:`Block`; on a CPU, decodes with compiled kernels.

    Args:
        model: a MoD model that ``choose.obstacle`` has nothing against.
        blocks: its layers; without routers it runs as its dense parent.
        native: kernels for decoding, or None to decode in torch.
        compiled: put ``torch.compile`` around the pieces of a layer (worth it on CUDA).
        together: attention of several rows in one launch, or None for row by row.
    """

    name, short_end = "fast", True

    def __init__(
        self, model: Any, blocks: Sequence[Block], native: NativeDecoder | None, note: str, compiled: bool = False,
        together: RaggedAttention | None = None,
    ) -> None:
        self.model, self.blocks, self.native, self.note = model, blocks, native, note
        self.together = together
        self.base, self.anchors = model.model, model.mod_config.anchors
        self.on_cpu = model.device.type == "cpu"
        direct = not compiled and native_obstacle(model, blocks) is None and direct_pays(model.dtype)
        for block in blocks:
            block.direct = direct
        ours = direct and native is not None and model.dtype == torch.bfloat16
        self.rounded = self.on_cpu and not ours and (model.dtype == torch.bfloat16 or direct)
        self.routers, self.biases = stacked_routers(blocks, model.config.hidden_size)
        dial = model.mod_config.dial
        self.dial = torch.tensor(dial, dtype=torch.float32, device=model.device) if dial else None
        self._project: Any = torch.compile(Block.project, dynamic=True) if compiled else Block.project
        self._finish: Any = torch.compile(Block.finish, dynamic=True) if compiled else Block.finish

    def _own_blocks(self) -> Sequence[Block]:
        """The layers, for one thread."""
        if not self.blocks[0].direct:
            return self.blocks
        products = Products(None if self.native is None else self.native.library)
        return [block.using(products) for block in self.blocks]

    def _chunk(self, ids: Tensor, cache: RaggedCache, p: Threshold, last: bool) -> Pass:
        past = cache.get_seq_length()
        columns = torch.arange(past, past + len(ids), device=ids.device)
        x = self.base.embed_tokens(ids)
        rotation = self._rotation(x, columns)
        # Made before the layers run: what outlives a layer would lie amid its activations, and keep malloc from using
        # their room for the next layer's.
        scores = torch.empty(len(self.routers), len(ids), dtype=torch.float32, device=ids.device)
        routed = torch.empty(scores.shape, dtype=torch.bool, device=ids.device)
        at, blocks = 0, self._own_blocks()
        for index, block in enumerate(blocks):
            chosen = None
            if block.router is not None:
                scores[at] = self._score(x, slice(at, at + 1))[:, 0]
                routed[at] = (scores[at] >= threshold_at(p, at)) | (columns < self.anchors)
                chosen, at = routed[at].nonzero().squeeze(1), at + 1
                if len(chosen) == len(ids):
                    chosen = None
            pieces, store = self._pieces(len(ids), chosen), cache.layers[index]
            own = columns if chosen is None else columns[chosen]
            if index + 1 < len(blocks):
                self._layer(block, x, pieces, own, rotation, store)
            else:
                ran = None if chosen is None else routed[at - 1]
                x = self._end(block, x, pieces, own, rotation, store, last, ran)
        cache.advance_all(len(ids))
        logits = self._head(x) if last else x.new_empty(0)
        return Pass(logits, scores.cpu().numpy(), routed.cpu().numpy())

    def _layer(
        self, block: Block, x: Tensor, pieces: Sequence[_Piece], columns: Tensor, rotation: Rotation, store: Any
    ) -> None:
        """One layer on the pieces' tokens of x [N, W], in place; they stand at ``columns``."""
        if not pieces:
            return
        mixed = self._mixed(block, x, pieces, columns, rotation, store)
        parts = torch.split_with_sizes(mixed, [piece.count for piece in pieces])
        for piece, part in zip(pieces, parts, strict=True):
            given = piece.of(x)
            filled = part if len(given) == piece.count else F.pad(part, (0, 0, 0, len(given) - piece.count))
            piece.put(x, self._finish(block, given, filled))

    def _mixed(
        self, block: Block, x: Tensor, pieces: Sequence[_Piece], columns: Tensor, rotation: Rotation, store: Any
    ) -> Tensor:
        """Attention's result for the pieces' tokens, [N, H * D]."""
        q, k, v = _in_pieces(self._project, block, x, pieces, rotation)
        return _attend(block, q, store.add(k, v, columns), store)  # all at once: a store that grows is copied

    def _end(
        self, block: Block, x: Tensor, pieces: Sequence[_Piece], columns: Tensor, rotation: Rotation, store: Any,
        last: bool, ran: Tensor | None,
    ) -> Tensor:
        """The last layer, of which nobody needs more than keys, values and the last token's result: that one, [1, W].

        Args:
            last: whether the token's result is needed at all.
            ran: which tokens go through the layer, [N]; None: all.
        """
        stored = store.add(*_in_pieces(Block.entries, block, x, pieces, rotation), columns) if pieces else None
        x = x[-1:].clone()  # no view: it would keep the whole of x
        if stored is None or not last:
            return x
        q = block.queries(x, (rotation[0][-1:], rotation[1][-1:]))
        end: Tensor = self._finish(block, x, _attend(block, q, stored, store))
        return end if ran is None else torch.where(ran[-1:, None], end, x)  # asking would wait for the device

    def _pieces(self, length: int, chosen: Tensor | None) -> list[_Piece]:
        """A layer's tokens in parts, each filled up by at most an eighth or not at all.

        On a CPU all but attention goes few tokens at a time: what lives inside a layer would take more memory than all
        else. oneDNN compiles its products for every number of rows that occurs, and keeps them, which comes to hundreds
        of MB over a long prompt. So few numbers should occur there.
        """
        count, pieces = length if chosen is None else len(chosen), list[_Piece]()
        parts = -(-count // PIECE) if self.on_cpu else min(count, 1)
        for at in range(parts):
            first, end = count * at // parts, count * (at + 1) // parts
            step = 1 << max(0, (end - first).bit_length() - 4) if self.rounded else 1
            filled = -(end - first) % step
            if chosen is None and not filled:
                pieces.append(_Piece(end - first, slice(first, end)))
            else:
                some = torch.arange(first, end, device="cpu") if chosen is None else chosen[first:end]
                pieces.append(_Piece(end - first, F.pad(some, (0, filled))))
        return pieces

    def _decode(self, tokens: Sequence[int], caches: Sequence[RaggedCache], p: Sequence[Threshold]) -> Pass:
        if self.native is not None:
            return self.native.decode(tokens, caches, p)
        return self._in_torch(tokens, caches, p)

    @torch.inference_mode()
    def _in_torch(self, tokens: Sequence[int], caches: Sequence[RaggedCache], p: Sequence[Threshold]) -> Pass:
        device = self.model.device
        places = [cache.get_seq_length() for cache in caches]
        x = self.base.embed_tokens(to_device(tokens, torch.int64, device))
        there = to_device(places, torch.int64, device)
        place = _Place(places, there, self._rotation(x, there))
        ahead: list[list[float]] | None = None  # every router's gates for x as it is, [B, M]
        scores, routed = np.empty((len(self.routers), len(tokens)), np.float32), list[list[bool]]()
        for index, block in enumerate(self._own_blocks()):
            rows = list(range(len(tokens)))
            if block.router is not None:
                at = len(routed)
                ahead = self._score(x).tolist() if ahead is None else ahead  # the one host synchronisation
                scores[at] = [gates[at] for gates in ahead]
                bounds = [threshold_at(one, at) for one in p]
                runs = [bool(scores[at, row] >= bounds[row]) or places[row] < self.anchors for row in rows]
                routed.append(runs)
                rows = [row for row in rows if runs[row]]
            if rows:
                x, ahead = self._decode_layer(index, block, x, rows, place, caches), None
        for cache in caches:
            cache.advance_all(1)
        return Pass(self._head(x), scores, np.array(routed, bool).reshape(scores.shape))

    def _decode_layer(
        self, index: int, block: Block, x: Tensor, rows: list[int], place: _Place, caches: Sequence[RaggedCache]
    ) -> Tensor:
        """x [B, W] with the rows given run through one layer, each over its own cache."""
        every = len(rows) == len(x)
        where = None if every else to_device(rows, torch.int64, x.device)
        cos, sin = place.rotation
        given, turned = (x, (cos, sin)) if where is None else (x[where], (cos[where], sin[where]))
        (q, k, v), stores = self._project(block, given, turned), [caches[row].layers[index] for row in rows]
        if self.together is not None and len(rows) > 1:
            columns = [place.columns[row] for row in rows]
            mixed = self.together(q, k, v, [store.row() for store in stores], columns, block.window)
        else:
            mixed = _one_by_one(block, (q, k, v), stores, [place.there[row : row + 1] for row in rows])
        y: Tensor = self._finish(block, given, mixed)
        return y if where is None else x.index_copy(0, where, y)

    def _score(self, x: Tensor, which: slice = slice(None)) -> Tensor:
        """Gates of all routers, or of some, for x [N, W]: [N, M]. Normalised after the product, which is narrower."""
        wide = x.float()
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / wide.shape[-1]
        scale = torch.rsqrt(square + torch.finfo(torch.float32).eps)
        logits = F.linear(wide, self.routers[which]) * scale + self.biases[which]
        gates = torch.sigmoid(torch.nan_to_num(logits, nan=OPEN))
        return gates if self.dial is None else bend(gates, self.dial)

    def _head(self, x: Tensor) -> Tensor:
        if self.native is not None:
            return self.native.head(x)
        out: Tensor = self.model.lm_head(self.base.norm(x))
        return out

    def _rotation(self, x: Tensor, columns: Tensor) -> Rotation:
        cos, sin = self.base.rotary_emb(x, columns[None])
        return cos[0], sin[0]


def _in_pieces(
    project: Any, block: Block, x: Tensor, pieces: Sequence[_Piece], rotation: Rotation
) -> Sequence[Tensor]:
    """What a block makes of the pieces' rows of x [N, W] before attention: [., N, D] each."""
    made = []
    for piece in pieces:
        projected = project(block, piece.of(x), (piece.of(rotation[0]), piece.of(rotation[1])))
        made.append([part[:, : piece.count] for part in projected])
    return made[0] if len(made) == 1 else [torch.cat(parts, 1) for parts in zip(*made, strict=True)]


def _one_by_one(
    block: Block, projected: Sequence[Tensor], stores: Sequence[Any], columns: Sequence[Tensor]
) -> Tensor:
    """Attention of new tokens [R, H * D], each over its own store."""
    mixed = []
    for at, (store, column) in enumerate(zip(stores, columns, strict=True)):
        q, k, v = (part[:, at : at + 1] for part in projected)
        mixed.append(_attend(block, q, store.add(k, v, column), store))
    return torch.cat(mixed)


def _attend(block: Block, q: Tensor, stored: tuple[Tensor, Tensor], store: Any) -> Tensor:
    return attend(q, *stored, None if block.window is None else store.row_columns(), block.window)
