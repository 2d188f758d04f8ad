"""How many bytes a chunk of a prompt takes on its way through the layers, found without running it.

What the fast executor holds is known from its code: a formula, and on a CPU, where a process takes several times what
its tensors do, one that was found by measuring. The stock layers are transformers', of any family: there a chunk goes
through the model on PyTorch's fake tensors, which have shapes and no memory
(https://docs.pytorch.org/docs/stable/torch.compiler_fake_tensor.html), and each storage counts as long as it lives.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modification.architectures import entry_bytes, family_of, windows_of
from modification.cache import RaggedCache, margin
from modification.executor.base import CHUNK, stock_chunk
from modification.measure.cost import ModelShape

_MOST_CHUNKS = 2000  # that are looked at one by one


def fast_bytes(
    config: Any, shape: ModelShape, context: int, itemsize: int, load: float | None = None
) -> int:
    """Most that the tensors of a prompt's chunk hold at once in the fast executor, where all of it goes through a layer
    together, as on a GPU.

    Per token, inside the MLP: three tensors as wide as it is; residual, the sum with attention's result, and its norm;
    attention's result. Or before attention: residual, norm, and queries on their way to turned ones, or (16 bits, where
    there are norms of queries) through a norm in float32. Or in attention through a sliding window: residual, queries,
    keys and values, result, and the mask, as it is and added to scores. In a MoD layer what runs, its cos, sin and
    columns lie beside all tokens'. All along cos and sin, the column, and each router's score and decision.

    Args:
        load: of the MoD layers; None for the dense parent.
    """
    wide, width, queries = config.intermediate_size, config.hidden_size, shape.attention_width
    turns = 2 * _head(config, shape) * itemsize
    inside = (3 * (wide + width) + queries) * itemsize
    before = (2 * width + (4 if itemsize == 4 else 5) * queries) * itemsize
    windowed = [layer for layer in range(shape.depth) if shape.visible(layer, context) < context]
    keys = [held(shape, layer, context, most=True) for layer in windowed]
    through = (width + 2 * queries + shape.entry_width) * itemsize + max(keys) * (1 + itemsize) if keys else 0
    most = max(inside, before, through)
    if load is not None and load < 1:
        plain = set(range(shape.depth - 1)) - set(shape.mod_layers)
        routed = width * itemsize + round(load * (max(inside, before + turns, through) + 16))
        most = max(most if plain else 0, routed)
    per_token = most + turns + 8 + 5 * len(shape.mod_layers)
    return int(min(context, CHUNK) * per_token + 4 * config.vocab_size)


def held(shape: ModelShape, layer: int, context: int, most: bool = False) -> int:
    """Tokens whose entries a layer of ours holds at p = 0, afterwards or at ``most``."""
    window = shape.window(layer)
    return context if window is None else min(context, window - 1 + margin(window) + CHUNK * most)


def process_bytes(config: Any, shape: ModelShape, context: int, itemsize: int) -> int:
    """Most that a process takes for a prompt's chunk in the fast executor on a CPU.

    Fewer tokens go through a layer's products together there, so that tensors hold a third of that or less; malloc,
    and what products keep or rearrange, take the rest. Per token it comes to about three tensors as wide as the MLP,
    five as wide as the model, queries and attention's output, keys and values, and twice cos and sin. That was fitted
    to prompts of many chunks (within 10% of a process's peak, keys and values included); those of less than one were
    20 to 40% off, and four chunks of a model of 22 M parameters in bfloat16 took 30% more.
    """
    wide = 3 * config.intermediate_size + 5 * config.hidden_size + 2 * shape.attention_width
    per_token = wide + shape.entry_width + 4 * _head(config, shape)
    return int(min(context, CHUNK) * per_token * itemsize + 4 * config.vocab_size)


def _head(config: Any, shape: ModelShape) -> int:
    return shape.attention_width // int(config.num_attention_heads)


def stock_bytes(model: nn.Module, context: int, dtype: torch.dtype) -> int:
    """Most that a chunk of a prompt of ``context`` tokens holds at once in a dense model's own layers, run as here.

    Keys and values that are stored are not counted, copies of them that attention makes are.

    Args:
        model: on the meta device; it is left with fewer layers.
    """
    config: Any = model.config
    windows, chunks = windows_of(config), [0]
    while chunks[-1] < context and len(chunks) < _MOST_CHUNKS:
        chunks.append(chunks[-1] + stock_chunk(chunks[-1], windows, config._attn_implementation))
    if chunks[-1] < context:  # very long: the last one, whose keys are the most, from its end
        chunks.append(context - stock_chunk(context, windows, config._attn_implementation))
        chunks.append(context)
    parts = [(start, min(end, context)) for start, end in itertools.pairwise(chunks)]
    parts = [part for part in parts if part[1] - part[0] <= CHUNK]
    # Of those that need masks over a past, the one with most tokens times keys takes most.
    parts = [parts[0], *sorted(parts[1:], key=lambda ends: (ends[1] - ends[0]) * ends[1])[-1:]]
    _keep_kinds(model, windows)
    for part in model.modules():
        if isinstance(getattr(part, "rope_type", None), str):  # others look at positions, and fake ones say nothing
            vars(part)["rope_type"] = "default"
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # what fails is told by the caller
    model = model.to(dtype).eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cpu")
        return max(_traced(model, past, end - past, windows) for past, end in parts)


def _keep_kinds(model: nn.Module, windows: tuple[int | None, ...]) -> None:
    """Leave the first layers alone: as many as have all kinds among them, and a second one, since models hold on to
    what went into the first."""
    layers = family_of(model).decoder_layers(model)
    kinds = [
        (type(layer), window, tuple(part.shape for part in layer.parameters()))
        for layer, window in zip(layers, windows, strict=True)
    ]
    del layers[max(1, *(kinds.index(kind) for kind in kinds)) + 1 :]
    config: Any = model.config
    config.num_hidden_layers = len(layers)


@torch.no_grad()  # inference mode would hand operations over whole, what they take inside unseen
def _traced(model: Any, past: int, tokens: int, windows: tuple[int | None, ...]) -> int:
    """Peak of ``tokens`` after ``past`` ones, in bytes."""
    alive = _Alive()
    cache = _Stored(windows, past, entry_bytes(model.config, model.dtype), alive)
    ids = torch.zeros((1, tokens), dtype=torch.long)
    with alive:
        masks = _masks(model.config, past, tokens, any(windows))
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        del masks
    return alive.most


def _masks(config: Any, past: int, tokens: int, windowed: bool) -> list[Tensor]:
    """Those that a MoD layer makes by itself."""
    eager, biased = config._attn_implementation == "eager", bool(getattr(config, "alibi", False))
    if not (eager or biased or past or windowed):
        return []
    seen = torch.zeros(1, 1, tokens, past + tokens, dtype=torch.bool)
    if not (eager or biased):
        return [seen]
    heads = config.num_attention_heads if biased else 1
    return [seen, seen.float().expand(-1, heads, -1, -1).clone(memory_format=torch.contiguous_format)]


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that were made inside and still live.

    Attributes:
        now, most: at present, and at their peak.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known: set[int] = set()
        self._counting = True

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """What is made inside costs nothing."""
        self._counting = False
        try:
            yield
        finally:
            self._counting = True

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.ops.aten._grouped_mm.default:  # mixtures of experts; fake ones of other types are refused
            out = args[0].new_empty(len(args[0]), args[1].shape[-1])
        else:
            out = function(*args, **(kwargs or {}))
        given = {id(part.untyped_storage()) for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor)}
        for part in tree_leaves(out) if self._counting else ():
            if isinstance(part, Tensor) and id(storage := part.untyped_storage()) not in given:
                self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class _Stored(RaggedCache):
    """A cache that says it holds ``past`` tokens, and gives attention what it would be given."""

    def __init__(self, windows: tuple[int | None, ...], past: int, entry_bytes: int, alive: _Alive) -> None:
        super().__init__(windows, (), entry_bytes)
        self._alive = alive
        for layer in self.layers:
            layer.advance(past)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Keys and values [1, H, T, D] in, those of all that is held out."""
        held, _ = self.layers[layer_idx].get_mask_sizes(key_states.shape[2])
        with self._alive.uncounted():
            return tuple(part.new_empty(*part.shape[:2], held, part.shape[3]) for part in (key_states, value_states))
