"""MoDification: any pretrained decoder as a Mixture-of-Depths model, with a threshold p that is a dial."""

from modification.architectures import ConversionError
from modification.cache import RaggedCache
from modification.config import MoDConfig
from modification.errors import LoadError
from modification.generate import generate, generate_batch
from modification.loading import load
from modification.model import MoDModel, convert, register, restore
from modification.trace import RoutingTrace, Step

__all__ = [
    "ConversionError", "LoadError", "MoDConfig", "MoDModel", "RaggedCache", "RoutingTrace", "Step",
    "convert", "generate", "generate_batch", "load", "restore",
]
__version__ = "0.1.0"

# The one effect of importing: saved MoD folders load through transformers' Auto classes.
register()
