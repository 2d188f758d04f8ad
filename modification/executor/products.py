"""Products of many rows with a layer's matrices on a CPU: a prompt's. Shapes: N rows, I inputs, O outputs."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

SHARED = 4  # rows from which a weight of 16 bits is better widened


def direct_pays(dtype: torch.dtype) -> bool:
    """Whether torch has the product that :class:`Products` falls back on, and this processor none as good for dtype."""
    if not torch._C._has_mkldnn or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or not torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Products:
    """x W^T + b in float32, past torch's own choice (MKL), which takes a slow way on processors of some makers.

    Float32 goes through oneDNN, which uses what any processor has. bfloat16 goes through products.cpp; without a C++
    compiler, through oneDNN too, each matrix widened before. For one thread: memory is used again, since fresh memory
    would cost as much as few rows do.

    Args:
        library: the built kernels, if there are any.
    """

    def __init__(self, library: ctypes.CDLL | None) -> None:
        self._library, self._room = library, torch.empty(0, dtype=torch.float32, device="cpu")

    def __call__(self, x: Tensor, part: Any) -> Tensor:
        """A linear layer's result for x [N, I]: [N, O], of x's type."""
        if self._library is not None and _plain(x) and _plain(part.weight):
            return self._native(self._library, x.contiguous(), part)
        bias = None if part.bias is None else part.bias.float()
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x.float(), self._wide(part.weight), bias, "none", [], "")
        return out.to(x.dtype)

    def _native(self, library: ctypes.CDLL, x: Tensor, part: Any) -> Tensor:
        made = torch.empty(len(x), len(part.weight), dtype=x.dtype, device="cpu")
        sizes = (*x.shape, len(part.weight), torch.get_num_threads())
        room = self._floats(library.mod_product_room(*sizes))
        bias = None if part.bias is None else part.bias.data_ptr()
        library.mod_product(x.data_ptr(), part.weight.data_ptr(), bias, made.data_ptr(), room.data_ptr(), *sizes)
        return made

    def _wide(self, weight: Tensor) -> Tensor:
        """A weight in float32, until the next one is asked for."""
        if weight.dtype == torch.float32:
            return weight
        return self._floats(weight.numel()).view_as(weight).copy_(weight)

    def _floats(self, count: int) -> Tensor:
        if self._room.numel() < count:
            self._room = torch.empty(count, dtype=torch.float32, device="cpu")
        return self._room[:count]


def _plain(tensor: Tensor) -> bool:
    """Whether the kernel may read it: in mid-run autocast and a model that is moved make others."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu"
