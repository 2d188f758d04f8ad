"""Token ids -> the text that each adds. Knows tokenizers, nothing of models."""

from __future__ import annotations

from typing import Any

from app.present import Piece


class PieceReader:
    """Token ids -> what each reads as, holding back incomplete characters."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.special = tokenizer, set(tokenizer.all_special_ids)
        self._held: list[int] = []
        self._before: list[int] = []

    def read(self, token: int) -> Piece:
        """The piece of the next token."""
        if token in self.special:
            self._held, self._before = [], []
            return Piece(self.tokenizer.convert_ids_to_tokens(token), True)
        self._held.append(token)
        # Decoding after the token before keeps the leading space that decoding alone would lose.
        start = self.tokenizer.decode(self._before)
        text = self.tokenizer.decode(self._before + self._held)
        if text.endswith("\ufffd") and len(self._held) < 8:
            return Piece("")
        self._before, self._held = self._held, []
        return Piece(text[len(start) :])
