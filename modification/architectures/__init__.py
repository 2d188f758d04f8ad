"""The one place that knows model families: where layers and sub-blocks live, what arguments are called.

Adding a family is adding a row to ``table.FAMILIES``; nothing else in the project names one.
"""

from modification.architectures.family import ConversionError, Family, Sublayers
from modification.architectures.find import ATTENTION_KERNELS, family_of, refuse, structure_of, structured
from modification.architectures.shapes import (
    PREFIX,
    entry_bytes,
    entry_width,
    head_width,
    rotate,
    window_of,
    windows_of,
)
from modification.architectures.table import FAMILIES

__all__ = [
    "ATTENTION_KERNELS",
    "FAMILIES",
    "PREFIX",
    "ConversionError",
    "Family",
    "Sublayers",
    "entry_bytes",
    "entry_width",
    "family_of",
    "head_width",
    "refuse",
    "rotate",
    "structure_of",
    "structured",
    "window_of",
    "windows_of",
]
