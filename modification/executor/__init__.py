"""How a generation runs through a model: fast where the model allows it, stock transformers layers elsewhere."""

from modification.executor.base import Executor, Pass, Stock
from modification.executor.choose import executor_of

__all__ = ["Executor", "Pass", "Stock", "executor_of"]
