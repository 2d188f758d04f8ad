"""The door to the engine: models, sessions, limits, streams and long jobs. Handlers hold no tensors.

The rest of the app reads the engine's records and formulas (trace, measure.cost) but calls nothing else in it.
Safe to call from several threads.
"""

from app.service.door import Service
from app.service.faults import sentence_of
from app.service.requests import Limits, Request, number
from app.service.runs import Update
from app.service.zero import Zero, gpu_decorator
from modification.errors import foreseen

__all__ = ["Limits", "Request", "Service", "Update", "Zero", "foreseen", "gpu_decorator", "number", "sentence_of"]
