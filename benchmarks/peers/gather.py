"""The engines of a run: made, and their logits checked before anything is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from benchmarks.peers.engine import CHECK, Engine, Fed, FloatArray, Settings, Stock, Unsupported, random_ids, stock_name
from benchmarks.peers.files import load_dense, store_of
from benchmarks.peers.host import first_line, say
from benchmarks.peers.llamacpp import llama_engines, rounded
from benchmarks.peers.ort import ort_engines
from benchmarks.peers.ours import load_pair, our_engines

LIMITS = {"f32": 2e-2, "bf16": 1e-1, "q8_0": 1e-1, "q4_0": 1e-1}  # by type of weights; of the largest logit


@dataclass(slots=True)
class Peers:
    """The engines of a run, and for each one that can't be timed the reason."""

    vocabulary: int
    engines: list[Engine]
    missing: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    differences: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, name: str, make: Callable[[], list[Engine]]) -> None:
        """Add what ``make`` gives, or note why it can't."""
        try:
            self.engines += make()
        except Unsupported as error:
            self.missing[name] = str(error)
        except ImportError as error:
            self.missing[name] = f"not installed ({first_line(error)})"
        except Exception as error:
            self.missing[name] = f"failed: {first_line(error)}"

    def check(self, model: Any) -> None:
        """Drop engines whose logits are too far from those of ``model``, a float32 one, on weights of their type."""
        prompt, follow = random_ids(self.vocabulary, *CHECK, seed=1)
        checked = [engine for engine in self.engines if isinstance(engine, Fed)]
        expected = {
            kind: Stock(rounded(model, kind), kind).logits(prompt, follow)
            for kind in ("f32", *sorted({engine.kind for engine in checked} - {"f32"}))
        }
        for engine in checked:
            logits, limit = engine.logits(prompt, follow), LIMITS[engine.kind]
            difference = apart(logits, expected[engine.kind])
            self.differences[engine.name] = {
                "to_same_weights": difference, "to_float32_weights": apart(logits, expected["f32"]), "limit": limit
            }
            say(f"{engine.name}: logits differ by {difference:.2g} of the largest, {limit:g} is allowed")
            if not difference <= limit:
                self.refused[engine.name] = f"logits differ by {difference:.2g} of the largest, {limit:g} is allowed"
        self.refused |= {
            engine.name: f"{engine.vouched_by} was refused"
            for engine in self.engines if engine.vouched_by in self.refused
        }
        self.engines = [engine for engine in self.engines if engine.name not in self.refused]


def apart(logits: FloatArray, expected: FloatArray) -> float:
    """The largest difference, over the largest expected logit."""
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


def gather(settings: Settings) -> Peers:
    """Make all engines and check their logits."""
    plain, routed = load_pair(settings.folder, settings.dtype)
    reference = plain if settings.dtype == "f32" else load_dense(settings.folder, "f32")
    if settings.room > reference.config.max_position_embeddings:
        raise ValueError(f"the model has {reference.config.max_position_embeddings} positions, not {settings.room}")
    store, peers = store_of(settings), Peers(reference.config.vocab_size, [Stock(plain, settings.dtype)])
    makers = {"llamacpp": llama_engines, "ort": ort_engines}
    for name in settings.engines:
        peers.add(name, partial(makers[name], reference, settings, store))
    peers.engines += our_engines(routed, settings)
    peers.check(reference)
    if (name := stock_name(settings.dtype)) in peers.refused:
        raise ValueError(f"{name} can't be what the others are compared with: {peers.refused[name]}")
    return peers
