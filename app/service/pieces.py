"""Token ids -> the text that each adds. Knows tokenizers, nothing of models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from app.tape import Piece


class PieceReader:
    """Token ids -> what each reads as, holding back incomplete characters."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.special = tokenizer, set(tokenizer.all_special_ids)
        self._held: list[int] = []
        self._before: list[int] = []
        self._names: dict[int, str] = {}
        self._texts: dict[tuple[int, ...], str] = {}

    def read(self, token: int) -> Piece:
        """The piece of the next token."""
        if token in self.special:
            self._held, self._before = [], []
            return Piece(self.tokenizer.convert_ids_to_tokens(token), True)
        self._held.append(token)
        # Decoding after the token before keeps the leading space that decoding alone would lose.
        start, text = self._decoded(*self._before), self._decoded(*self._before, *self._held)
        if text.endswith("\ufffd") and len(self._held) < 8:
            return Piece("")
        self._before, self._held = self._held, []
        return Piece(text[len(start) :])

    def _decoded(self, *tokens: int) -> str:
        """What tokens read as together; kept, since texts repeat themselves."""
        found = self._texts.get(tokens)
        if found is None:
            found = self._texts[tokens] = str(self.tokenizer.decode(list(tokens)))
        return found

    def names(self, tokens: Iterable[int]) -> list[str]:
        """What tokens read as by themselves: those that might have come instead."""
        return [self._name(token) for token in tokens]

    def _name(self, token: int) -> str:
        found = self._names.get(token)
        if found is None:
            raw, text = str(self.tokenizer.convert_ids_to_tokens(token)), str(self.tokenizer.decode([token]))
            if token in self.special:
                text = raw
            elif raw.startswith("\u2581") and not text.startswith(" "):  # SentencePiece drops a leading space
                text = " " + text
            found = self._names[token] = text or raw
        return found
