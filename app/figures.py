"""Finished runs -> Plotly figures. No torch."""

from __future__ import annotations

import json
from typing import Any

import plotly.graph_objects as go

BLUE, AMBER, GREY = "#1e5ec8", "#d98214", "#78828f"


def load_per_layer(tape: str) -> go.Figure:
    """Share of tokens that ran through each layer of a finished tape; dense layers are always 1."""
    header, columns = _parse(tape)
    depth, mod = header["depth"], {layer: at for at, layer in enumerate(header["mod"])}
    shares = []
    for layer in range(depth):
        place = mod.get(layer)
        ran = len(columns) if place is None else sum(int(bits, 16) >> place & 1 for bits in columns)
        shares.append(ran / max(1, len(columns)))
    figure = go.Figure(go.Bar(
        x=[f"L{layer}" for layer in range(depth)], y=shares,
        marker_color=[BLUE if layer in mod else GREY for layer in range(depth)],
        hovertemplate="%{x}: %{y:.0%} of tokens processed<extra></extra>",
    ))
    figure.update_layout(
        height=240, margin={"l": 50, "r": 10, "t": 10, "b": 30}, paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)", font={"color": "#808a98"}, showlegend=False,
    )
    figure.update_yaxes(
        range=[0, 1.02], tickformat=".0%", title="tokens processed (measured)", gridcolor="rgba(128,138,152,.25)"
    )
    return figure


def _parse(tape: str) -> tuple[dict[str, Any], list[str]]:
    header: dict[str, Any] = {"depth": 0, "mod": []}
    columns: list[str] = []
    for line in tape.splitlines():
        record = json.loads(line)
        if record[0] == "h":
            header = record[1]
        elif record[0] == "c":
            columns.append(record[4])
    return header, columns
