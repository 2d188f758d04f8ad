"""A bridge to lm-eval: any task of the harness, at any p. lm-eval is optional (the [eval] extra)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch


def evaluate_tasks(
    model: Any, tokenizer: Any, tasks: Sequence[str], grid: Sequence[float], limit: int | None = None, batch: int = 8
) -> str:
    """A Markdown table of lm-eval tasks over thresholds.

    Args:
        tasks: names as the harness knows them.
        grid: thresholds.
        limit: examples per task; None for all.

    Raises:
        ValueError: lm-eval is not installed, or it has no task of that name.
    """
    try:
        from lm_eval import simple_evaluate
    except ImportError:
        raise ValueError("lm-eval is not installed: pip install lm-eval") from None
    lines = ["| p | task | metric | value (measured) |", "|---|---|---|---|"]
    for p in grid:
        try:
            found = simple_evaluate(
                model=_at(model, tokenizer, p, batch), tasks=list(tasks), limit=limit, log_samples=False,
                bootstrap_iters=1000,
            )
        except (KeyError, ValueError) as error:
            raise ValueError(f"lm-eval could not run {', '.join(tasks)}: {error}") from error
        for task, metrics in found["results"].items():
            lines += [
                f"| {p:g} | {task} | {name.split(',')[0]} | {value:.4g} |"
                for name, value in metrics.items()
                if isinstance(value, float) and not name.split(",")[0].endswith("_stderr")
            ]
    return "\n".join(lines)


def _at(model: Any, tokenizer: Any, p: float, batch: int) -> Any:
    """The harness's view of a MoD model at one threshold."""
    from lm_eval.models.huggingface import HFLM

    class AtThreshold(HFLM):
        def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            with torch.inference_mode():
                logits: torch.Tensor = model(input_ids=inps, p=p, use_cache=False).logits
            return logits

        def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return super()._model_generate(context, *args, **kwargs, p=p)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AtThreshold(pretrained=model, tokenizer=tokenizer, batch_size=batch, device=str(model.device))
