"""The figure of the MoD model's card, as SVG: which layers run as p rises, and for which kinds of tokens at p = 0.5."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

_CELL, _KIND, _HIGH = 38, 104, 22  # widths of a p and of a kind, height of a layer
_LEFT, _TOP, _GAP = 62, 58, 40
_FEW, _MANY = (241, 245, 249), (29, 78, 216)  # colours of load 0 and 1


def routers_figure(f: dict[str, Any]) -> str:
    """Both heatmaps side by side; ``f``: the pair's facts."""
    layers, kinds = f["kinds"]["layers"], f["kinds"]["kinds"]
    over_p = [row["layer_loads"] for row in f["sweep"]]
    right = _LEFT + _CELL * len(over_p) + _GAP
    wide, high = right + _KIND * len(kinds) + 16, _TOP + _HIGH * len(layers) + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{high}" viewBox="0 0 {wide} {high}" '
        'font-family="system-ui, sans-serif" font-size="11" fill="#0f172a">',
        f'<rect width="{wide}" height="{high}" fill="#ffffff"/>',
        _text(_LEFT, 18, "Share of tokens that run in each MoD layer, over p (measured)", "start", bold=True),
        _text(right, 18, "and by kind of token at p = 0.5 (measured)", "start", bold=True),
    ]
    for at, row in enumerate(f["sweep"]):
        parts.append(_text(_LEFT + _CELL * (at + 0.5), _TOP - 8, f"{row['p']:g}"))
    for at, kind in enumerate(kinds):
        parts.append(_text(right + _KIND * (at + 0.5), _TOP - 8, kind.removesuffix(" in the block")))
    for down, layer in enumerate(layers):
        y = _TOP + _HIGH * down
        parts.append(_text(_LEFT - 8, y + 15, f"layer {layer}", "end"))
        parts += _row(_LEFT, y, _CELL, [loads[down] for loads in over_p])
        parts += _row(right, y, _KIND, f["kinds"]["loads"][down])
    return "\n".join([*parts, "</svg>"]) + "\n"


def _row(x: float, y: float, wide: float, loads: Sequence[float]) -> list[str]:
    parts = []
    for at, load in enumerate(loads):
        colour = "".join(f"{round(few + (many - few) * load):02x}" for few, many in zip(_FEW, _MANY, strict=True))
        parts.append(f'<rect x="{x + wide * at:g}" y="{y}" width="{wide - 1}" height="{_HIGH - 1}" fill="#{colour}"/>')
        ink = "#ffffff" if load > 0.5 else "#0f172a"
        parts.append(_text(x + wide * (at + 0.5), y + 15, f"{load:.0%}", ink=ink))
    return parts


def _text(x: float, y: float, text: str, anchor: str = "middle", ink: str = "#0f172a", bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{ink}"{weight}>{escape(text)}</text>'
