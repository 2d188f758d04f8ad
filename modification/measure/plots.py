"""Plots of a bench and of a conversion, as HTML files that open without a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modification.measure.bench import Result


def plot(results: Sequence[Result], folder: Path) -> list[Path]:
    """Write speed and efficiency over context, one file a batch size; plotly's script lies beside them once."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for batch in sorted({result.batch for result in results}):
        rows = [result for result in results if result.batch == batch]
        for name, figure in (("speed", _speed(rows)), ("efficiency", _efficiency(rows))):
            path = folder / f"{name}-batch-{batch}.html"
            figure.write_html(path, include_plotlyjs="directory")
            written.append(path)
    return written


def plot_run(log: Sequence[dict[str, Any]], folder: Path) -> Path:
    """Write a conversion's loss, load, load per MoD layer and throughput over steps as one file.

    Args:
        log: the records of ``log.jsonl``.
    """
    from plotly.subplots import make_subplots

    folder.mkdir(parents=True, exist_ok=True)
    titles = ("loss, nats per token", "load", "load per MoD layer, in order", "training tokens per second")
    figure = make_subplots(rows=2, cols=2, subplot_titles=titles)
    steps = [record["step"] for record in log]
    for name in ("cross_entropy", "kl", "hidden_distance"):
        if log and name in log[0]:
            figure.add_scatter(x=steps, y=[record[name] for record in log], name=name, row=1, col=1)
    figure.add_scatter(x=steps, y=[record["load"] for record in log], name="load", row=1, col=2)
    for at in range(len(log[0]["layer_loads"]) if log else 0):
        loads = [record["layer_loads"][at] for record in log]
        figure.add_scatter(x=steps, y=loads, name=f"MoD layer {at + 1} of {len(log[0]['layer_loads'])}", row=2, col=1)
    speeds = [record.get("tokens_per_second") for record in log]
    figure.add_scatter(x=steps, y=speeds, name="tokens per second", row=2, col=2)
    figure.update_layout(title="A conversion (measured)", template="plotly_white")
    path = folder / "run.html"
    figure.write_html(path, include_plotlyjs="directory")
    return path


def _speed(rows: Sequence[Result]) -> Any:
    """Decode tokens per second over context, a line a side."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for side in dict.fromkeys(row.side for row in rows):
        mine = [row for row in rows if row.side == side]
        figure.add_scatter(
            x=[row.context for row in mine], y=[row.decode_tps for row in mine], name=side, mode="lines+markers",
            error_y={"array": [row.decode_spread for row in mine]},
        )
    return _dressed(figure, "Decode speed (measured)", "new tokens per second, all rows")


def _efficiency(rows: Sequence[Result]) -> Any:
    """Speed-up over ideal, prefill and decode, a bar a load."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for at, phase in enumerate(("prefill", "decode")):
        mine = [row for row in rows if row.efficiency is not None]
        figure.add_bar(
            x=[f"{row.context:,} tokens, {row.side}" for row in mine],
            y=[row.efficiency[at] for row in mine if row.efficiency], name=phase,
        )
    figure.add_hline(y=1, line_dash="dot", annotation_text="ideal")
    return _dressed(figure, "Efficiency: measured speed-up over counted ideal", "1 = all that routing saves", None)


def _dressed(figure: Any, title: str, y: str, x: str | None = "context, tokens") -> Any:
    figure.update_layout(title=title, xaxis_title=x, yaxis_title=y, yaxis_rangemode="tozero", template="plotly_white")
    return figure
