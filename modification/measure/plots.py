"""Plots of a bench, as HTML files that open without a network."""

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
