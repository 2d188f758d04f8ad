"""A model in memory, as everything in the app holds it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from app.service.crew import Crew
from app.service.dials import Dial
from app.service.jobs import Mailbox
from app.service.requests import Request
from app.service.turnstile import FairLock
from app.service.zero import Zero
from modification.batching import Stream
from modification.executor import executor_of
from modification.measure.cost import ModelShape
from modification.measure.estimate import kv_bytes
from modification.storage import SPARE

_CONTEXT = 2048  # tokens, of models that know no bound


@dataclass  # no slots: chats hold it weakly
class Loaded:
    """A model in memory, shared between users; ``lock`` gives one step at a time."""

    name: str
    model: Any
    tokenizer: Any
    shape: ModelShape
    trained: bool = True
    source: str = ""
    lock: FairLock = field(default_factory=FairLock)
    users: int = 0
    used: float = field(default_factory=time.monotonic)
    crew: Crew = field(init=False)
    zero: Zero | None = None

    def __post_init__(self) -> None:
        self.crew = Crew(self.model, self.lock)

    def run(self, stream: Stream, ids: list[int], dial: Dial, budget: int, request: Request) -> Mailbox:
        """Begin a run that is checked: with the others of this model, or in a fork that gets a GPU."""
        if self.zero is not None:
            return self.zero.run(self, ids, dial, budget, request)
        return self.crew.run(stream)

    def cache_bytes(self, tokens: int) -> int:
        """Most that keys and values of so many tokens take (estimated): at p = 0, with the buffers' spare room."""
        columns = 4 * tokens * len(self.shape.mod_layers)
        entries = kv_bytes(self.shape, tokens, 1, 1.0, self.model.dtype.itemsize, most=True)
        return entries + columns + columns // SPARE

    def describe(self) -> str:
        """A line about the model."""
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        line = (
            f"{self.name}: {millions:.1f} M parameters, {self.shape.depth} layers, "
            f"{len(self.shape.mod_layers)} of them MoD layers, context {self.context:,} tokens"
        )
        line += f", executor {executor_of(self.model).note}"
        if not self.trained:
            line += ". A dense model: its routers are untrained, so p is no useful dial. Convert it first."
        return line

    @property
    def anchors(self) -> int:
        """Leading tokens that always run."""
        return int(self.model.mod_config.anchors)

    @property
    def context(self) -> int:
        """Longest prompt plus continuation, in tokens."""
        return int(getattr(self.model.config, "max_position_embeddings", None) or _CONTEXT)
