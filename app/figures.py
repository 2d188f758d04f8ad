"""Finished runs, sweeps, benches, estimates and trainings -> Plotly figures. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from app.tape import records

# Blue against amber stays apart for colour-blind eyes; dashes tell lines apart where colours fail.
BLUE, AMBER, GREY, TEAL = "#2f6fd6", "#d98214", "#78828f", "#0f8b8d"
_GRID = "rgba(128,138,152,.25)"


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
    figure.update_yaxes(range=[0, 1.02], tickformat=".0%", title="tokens processed (measured)")
    return _dressed(figure, 240)


def sweep_figure(sweep: Any) -> go.Figure:
    """Loss, then what is saved, then speed, over p; the dense parent's loss as a line."""
    points = sorted(sweep.points, key=lambda one: one.quality.p)
    p = [one.quality.p for one in points]
    figure = make_subplots(rows=1, cols=3, horizontal_spacing=0.09)
    figure.add_scatter(
        x=p, y=[one.quality.loss for one in points], error_y={"array": [one.quality.error for one in points]},
        name="loss", mode="lines+markers", line={"color": BLUE}, row=1, col=1,
    )
    figure.add_scatter(
        x=[0, 1], y=[sweep.dense] * 2, name=sweep.parent, mode="lines", line={"color": GREY, "dash": "dash"},
        row=1, col=1,
    )
    shares = (("load (measured)", BLUE, "solid", [one.quality.load for one in points]),
              ("KV of dense (counted)", AMBER, "dash", [one.kv for one in points]),
              ("compute of dense (counted)", TEAL, "dot", [one.compute for one in points]))
    for name, colour, dash, values in shares:
        figure.add_scatter(x=p, y=values, name=name, mode="lines+markers", line={"color": colour, "dash": dash},
                           row=1, col=2)
    figure.add_scatter(x=p, y=[one.speed for one in points], name="prefill speed", mode="lines+markers",
                       line={"color": BLUE, "dash": "dashdot"}, row=1, col=3)
    figure.add_scatter(x=[0, 1], y=[sweep.dense_speed] * 2, name=f"{sweep.parent}, speed", mode="lines",
                       line={"color": GREY, "dash": "dot"}, row=1, col=3)
    if sweep.best is not None:
        figure.add_vline(x=sweep.best.quality.p, line={"color": AMBER, "width": 1, "dash": "dot"}, row=1, col=1)
    for at, title in enumerate(("nats per token (measured)", "share of dense", "tokens per second (measured)"), 1):
        figure.update_yaxes(title=title, row=1, col=at)
        figure.update_xaxes(title="threshold p", row=1, col=at)
    figure.update_yaxes(range=[0, 1.05], tickformat=".0%", row=1, col=2)
    figure.update_yaxes(rangemode="tozero", row=1, col=3)
    return _dressed(figure, 380, legend=True)


def training_figure(log: Sequence[dict[str, Any]]) -> go.Figure:
    """Loss and load over steps, and the last load of each MoD layer."""
    steps = [record["step"] for record in log]
    figure = make_subplots(rows=1, cols=3, horizontal_spacing=0.09)
    figure.add_scatter(x=steps, y=[r["cross_entropy"] for r in log], name="loss", line={"color": BLUE}, row=1, col=1)
    figure.add_scatter(x=steps, y=[r["load"] for r in log], name="load", line={"color": AMBER, "dash": "dash"},
                       row=1, col=2)
    loads = log[-1].get("layer_loads", [])
    figure.add_bar(x=[f"{at + 1}" for at in range(len(loads))], y=loads, name="load per MoD layer",
                   marker_color=TEAL, row=1, col=3)
    for at, (x, y) in enumerate((("step", "nats per token (measured)"), ("step", "load (measured)"),
                                 ("MoD layer, in order", "load of the last steps (measured)")), 1):
        figure.update_xaxes(title=x, row=1, col=at)
        figure.update_yaxes(title=y, row=1, col=at)
    figure.update_yaxes(range=[0, 1.05], tickformat=".0%", row=1, col=3)
    return _dressed(figure, 340)


def bench_figure(results: Sequence[Any]) -> go.Figure:
    """Decode speed of every side over context, and the speed-up against the ideal."""
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.1)
    colours = (GREY, TEAL, BLUE, AMBER, "#8a4fbf", "#b3364a")
    for at, side in enumerate(dict.fromkeys(result.side for result in results)):
        mine = [result for result in results if result.side == side]
        figure.add_bar(
            x=[f"{r.context:,} tokens" for r in mine], y=[r.decode_tps for r in mine], name=side,
            error_y={"array": [r.decode_spread for r in mine]}, marker_color=colours[at % len(colours)], row=1, col=1,
        )
    routed = [result for result in results if result.speed_up is not None]
    names = [f"{r.context:,} tokens, {r.side}" for r in routed]
    for at, phase in enumerate(("prefill", "decode")):
        colour = (AMBER, BLUE)[at]
        figure.add_bar(x=names, y=[r.speed_up[at] for r in routed], name=f"{phase} speed-up (measured)",
                       marker_color=colour, offsetgroup=phase, row=1, col=2)
        figure.add_scatter(
            x=names, offsetgroup=phase, y=[r.ideal[at] for r in routed], name=f"{phase} ideal (counted)",
            mode="markers",
            marker={"symbol": "line-ew-open", "size": 28, "color": colour, "line": {"width": 3}}, row=1, col=2,
        )
    figure.update_yaxes(title="decode, tokens per second (measured)", row=1, col=1)
    figure.update_yaxes(title="times faster than dense", row=1, col=2)
    figure.update_layout(scattermode="group")
    return _dressed(figure, 400, legend=True)


def estimate_figure(found: Any) -> go.Figure:
    """Memory of both sides as stacked bars, and the time of a decode step."""
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.12)
    sides = (("dense", found.dense), ("MoD", found.mod))
    for (name, label), colour in zip(
        (("weights", "weights"), ("kv", "keys and values"), ("activations", "activations")), (GREY, AMBER, TEAL),
        strict=True,
    ):
        figure.add_bar(x=[side for side, _ in sides], y=[getattr(cost, name) / 1e9 for _, cost in sides], name=label,
                       marker_color=colour, row=1, col=1)
    figure.add_bar(x=[side for side, _ in sides], y=[cost.decode_seconds * 1e3 for _, cost in sides],
                   name="decode step", marker_color=BLUE, row=1, col=2)
    figure.update_yaxes(title="memory, GB (estimated)", row=1, col=1)
    figure.update_yaxes(title="decode step at the peak, ms (estimated)", row=1, col=2)
    figure.update_layout(barmode="stack")
    return _dressed(figure, 340, legend=True)


def report_figure(report: dict[str, Any]) -> go.Figure:
    """A converted model's own report: loss and load over p on its held-out text."""
    rows = report["sweep"]
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.12)
    p = [row["p"] for row in rows]
    figure.add_scatter(x=p, y=[row["loss"] for row in rows], name="held-out loss", mode="lines+markers",
                       line={"color": BLUE}, row=1, col=1)
    figure.add_scatter(x=p, y=[row["load"] for row in rows], name="load", mode="lines+markers",
                       line={"color": AMBER, "dash": "dash"}, row=1, col=2)
    for at, title in enumerate(("held-out loss, nats per token (measured)", "load (measured)"), 1):
        figure.update_yaxes(title=title, row=1, col=at)
        figure.update_xaxes(title="threshold p", row=1, col=at)
    figure.update_yaxes(range=[0, 1.05], tickformat=".0%", row=1, col=2)
    return _dressed(figure, 320)


def _dressed(figure: go.Figure, height: int, legend: bool = False) -> go.Figure:
    """Sizes and colours that fit the page, light or dark."""
    figure.update_layout(
        height=height, margin={"l": 55, "r": 10, "t": 10, "b": 40}, paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)", font={"color": "#76808e"}, showlegend=legend,
        legend={"orientation": "h", "y": -0.25},
    )
    figure.update_xaxes(gridcolor=_GRID, zeroline=False)
    figure.update_yaxes(gridcolor=_GRID, zeroline=False)
    return figure


def _parse(tape: str) -> tuple[dict[str, Any], list[str]]:
    header: dict[str, Any] = {"depth": 0, "mod": []}
    columns: list[str] = []
    for record in records(tape):
        if record[0] == "h":
            header = record[1]
        elif record[0] == "c":
            columns.append(record[4])
    return header, columns
