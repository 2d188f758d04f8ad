"""A model that is copied often: its structure pickled once, which is several times as fast as to walk through it."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch


class Original:
    """Keeps a model as it is now; :meth:`copied` gives one of its own, shared weights shared."""

    def __init__(self, model: Any) -> None:
        self.apart: list[Any] = []  # weights, which are copied as they are, and classes, some made at run time
        written, places = io.BytesIO(), {}

        class Pickler(pickle.Pickler):
            def persistent_id(_, part: Any) -> int | None:
                if not isinstance(part, (torch.Tensor, type)):
                    return None
                if id(part) not in places:
                    places[id(part)] = len(self.apart)
                    self.apart.append(part)
                return places[id(part)]

        Pickler(written, pickle.HIGHEST_PROTOCOL).dump(model)
        self.structure = written.getvalue()

    def copied(self) -> Any:
        """Another model with the same weights, type and settings."""
        memo: dict[int, Any] = {}

        class Unpickler(pickle.Unpickler):
            def persistent_load(_, place: int) -> Any:
                return copy.deepcopy(self.apart[place], memo)

        return Unpickler(io.BytesIO(self.structure)).load()
