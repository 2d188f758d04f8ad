"""Rows that teach to look far back: chats about facts whose places leap, as if much more text lay between, and stories.

What a row says is the same without its leap (positional skip-wise training, arXiv 2309.10400), so a teacher can read it
without. Rows of 700 tokens so have keys from as far back as 2,048 have, for a third of the work. Knows the text and how
it is learnt, and nothing of what is done with it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from mixture import CONTEXT, answers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

Ids = list[int]
LENGTH = 704
_STORIES = 3  # one row in so many is a story as it is


class Rows(Dataset[dict[str, Tensor]]):
    """``count`` rows of at most ``length`` tokens, each a dict of [T].

    ``input_ids``, ``position_ids``, and of what kind a token is: ``answer`` is true at answers about facts, ``story``
    at all tokens of a row that is a story.
    """

    def __init__(self, documents: Sequence[Ids], tokenizer: Any, count: int, length: int = LENGTH) -> None:
        self.documents, self.tokenizer, self.count, self.length = documents, tokenizer, count, length

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rng = random.Random(index)
        return self._story(rng) if index % _STORIES == 0 else self._leaping(rng)

    def _story(self, rng: random.Random) -> dict[str, Tensor]:
        ids = torch.tensor(rng.choice(self.documents)[: self.length])
        whole = torch.ones(len(ids), dtype=torch.bool)
        return {"input_ids": ids, "position_ids": torch.arange(len(ids)), "answer": ~whole, "story": whole}

    def _leaping(self, rng: random.Random) -> dict[str, Tensor]:
        """Somewhere before the first answer the places leap, far more often than near, within the context."""
        length = int(rng.uniform(0.1, 0.7) * self.length)
        written = torch.tensor(answers(rng, self.documents, self.tokenizer, length)[: self.length])
        answer = written >= 0
        places = torch.arange(len(written))
        at = rng.randrange(1, int(answer.nonzero()[0]))
        places[at:] += int(rng.random() ** 0.6 * (CONTEXT - len(written)))
        ids = torch.where(answer, written, -1 - written)
        return {"input_ids": ids, "position_ids": places, "answer": answer, "story": torch.zeros_like(answer)}


def batch_of(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows side by side, [B, T], filled up at their ends; ``real`` is false there."""
    real = [{"real": torch.ones_like(row["story"]), **row} for row in rows]
    return {name: pad_sequence([row[name] for row in real], batch_first=True) for name in real[0]}
