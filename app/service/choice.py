"""How a model is named in the app: a source, and options in brackets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from app.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUANTIZATIONS = ("4bit", "8bit")
DEVICES = ("cpu", "cuda", "auto")
_CHOICE = re.compile(r"(?P<source>.*?)(?: \[(?P<options>[a-z0-9, ]+)\])?")


@dataclass(frozen=True, slots=True)
class Options:
    """How a model is loaded; None leaves the choice to the files and the machine."""

    dtype: str | None = None
    quantization: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        for value, known in ((self.dtype, DTYPES), (self.quantization, QUANTIZATIONS), (self.device, DEVICES)):
            if value is not None and value not in known:
                raise UserError(f"{value!r} is no way to load a model: choose among {', '.join(known)}.")

    @property
    def place(self) -> str:
        """The device it is loaded on: the one chosen, or the best there is."""
        best = "cuda" if torch.cuda.is_available() else "cpu"
        return best if self.device in (None, "auto") else str(self.device)

    @property
    def places(self) -> list[str]:
        """All devices whose memory it may take."""
        if self.device != "auto":
            return [self.place]
        return [*(f"cuda:{at}" for at in range(torch.cuda.device_count())), "cpu"]

    @property
    def spread(self) -> Any:
        """The device map."""
        return "auto" if self.device == "auto" else {"": self.place}

    def label(self, source: str) -> str:
        """The source with what was chosen in brackets; :func:`parse` reads it back."""
        chosen = [value for value in (self.dtype, self.quantization, self.device) if value]
        return f"{source} [{', '.join(chosen)}]" if chosen else source


def parse(choice: str) -> tuple[str, Options]:
    """A model choice such as ``folder [bf16, 4bit]`` as source and options."""
    found = _CHOICE.fullmatch(choice.strip())
    if found is None:
        raise UserError("A model's name is one line: a listed name, a folder or owner/name.")
    source, chosen = found["source"], dict[str, str]()
    kinds = {"dtype": DTYPES, "quantization": QUANTIZATIONS, "device": DEVICES}
    for word in filter(None, (part.strip() for part in (found["options"] or "").split(","))):
        kind = next((kind for kind, known in kinds.items() if word in known), None)
        if kind is None:
            known = ", ".join(word for words in kinds.values() for word in words)
            raise UserError(f"{word!r} is no way to load a model: choose among {known}.")
        chosen[kind] = word
    return source, Options(**chosen)
