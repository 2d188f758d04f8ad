"""Recipes against their rivals on one parent, one text and one token budget. What is done is kept, and not redone.

    PYTHONPATH=. python -m benchmarks.recipes PARENT TEXT OUT --layers 1,3 --tokens 1500000 [--only any-p,dense]

Rivals: the dense parent tuned alike; whole layers dropped for good and the rest tuned alike (each alone and all where
there are three or fewer, else those that cost the parent least, one after the other); tokens skipped by chance, tuned
and untrained; and every recipe of the table, any-p with all three ways of tuning, with gates taught by the plain
straight-through slope, and with paired rows (twice the work for a token). Each is written to OUT/NAME.json; the table
and plots are made of what lies there. One JSON line ends it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modification import MoDConfig, convert, load
from modification.cli.shared import layers_of
from modification.conversion.data import Text
from modification.conversion.recipes import RECIPES, Recipe, named
from modification.conversion.sources import Reading, read_text
from modification.conversion.train import train
from modification.loading import load_dense_or_mod
from modification.measure.quality import evaluate
from modification.measure.tradeoff import shares, speed
from modification.routing import Router

LOADS = (1.0, 0.75, 0.5, 0.25)
GRID = tuple(round(0.05 * at, 2) for at in range(20))
TIMED = (0.0, 0.25, 0.5, 0.75)


class Bench:
    """A parent, its text and the budget."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.out = arguments, arguments.out
        self.layers = layers_of(arguments.layers)
        parent, self.tokenizer = self.parent()
        self.indices = MoDConfig(layers=self.layers).layer_indices(parent.config.num_hidden_layers)
        apart = arguments.held_out_split  # the same text's rows of another split
        reading = Reading(
            (str(arguments.text),), split=arguments.split, held_out=arguments.held_out,
            held_out_source=str(arguments.text) if apart else None, held_out_split=apart,
        )
        self.text: Text = read_text(reading, self.tokenizer, parent, arguments.tokens, arguments.block)

    def parent(self) -> tuple[Any, Any]:
        return load_dense_or_mod(self.arguments.parent, dtype=torch.float32)

    def recipe(self, name: str, **changes: Any) -> Recipe:
        a = self.arguments
        if RECIPES[name].fit:
            return named(name, block=a.block)
        return named(name, tokens=a.tokens, block=a.block, batch=a.batch, lr=a.lr, bf16=a.bf16, **changes)

    def drops(self) -> list[list[int]]:
        """Sets of layers to drop: every one alone where there are three or fewer, else the cheapest so many."""
        count = len(self.indices)
        if count <= 3:
            return [[at] for at in self.indices] + ([list(self.indices)] if count > 1 else [])
        order = cheapest(self.parent()[0], self.indices, count, self.text.blocks[:16])
        return [order[: max(1, round(count * share))] for share in (0.25, 0.5, 0.75, 1.0)]

    def converted(self, name: str, recipe: Recipe, model: Any = None, layers: Any = None) -> Any:
        """A conversion of the parent, or of ``model``; done at most once."""
        folder = self.out / "models" / name
        if not (folder / "report.json").is_file():
            teacher = None if model is None else self.parent()[0]  # a damaged parent learns from the whole one
            model = model or self.parent()[0]
            config = MoDConfig(layers=layers or self.layers)
            train(model, self.tokenizer, config, recipe, self.text, folder, None, teacher)
        return load(folder, dtype=torch.float32)[0]


def curve(model: Any, text: Text, timed: bool = True) -> list[dict[str, float]]:
    """Loss and compute over p, and measured time per token at some."""
    rows = []
    for p in GRID:
        one = evaluate(model, text.held_out, p)
        row = {"p": p, "load": one.load, "loss": one.loss, "error": one.error}
        if timed and p in TIMED:
            _, compute = shares(model, one, text.held_out.shape[1])
            row |= {"compute": compute, "seconds_per_token": 1 / speed(model, text.held_out, p)}
        rows.append(row)
    return rows


def timed_again(bench: Bench, name: str, rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """The same rows with seconds per token measured now, on a machine that may be quieter."""
    folder = bench.out / "models" / name
    if not folder.is_dir() or not any("seconds_per_token" in row for row in rows):
        return rows
    model = load(folder, dtype=torch.float32)[0]
    return [
        {**row, "seconds_per_token": 1 / speed(model, bench.text.held_out, row["p"])}
        if "seconds_per_token" in row else row for row in rows
    ]


def dense(bench: Bench) -> list[dict[str, float]]:
    """The parent tuned on the same tokens, nothing skipped."""
    model = bench.converted("dense", bench.recipe("any-p", dense_share=1.0, load="none", start="open"))
    return curve(model, bench.text)[:1]


def static(bench: Bench, dropped: list[int]) -> list[dict[str, float]]:
    """Layers dropped for good and the rest tuned alike; load is of the layers that would be MoD layers."""
    model = bench.parent()[0]
    depth, whole = model.config.num_hidden_layers, len(bench.indices)
    without(model, dropped)
    recipe = bench.recipe("any-p", dense_share=1.0, load="none", start="open")
    tuned = bench.converted(_static_name(dropped), recipe, model, (depth - len(dropped) - 1,))
    one = curve(tuned, bench.text)[0]
    # Near enough: the head's share of compute is left out.
    return [{**one, "load": 1 - len(dropped) / whole, "compute": 1 - len(dropped) / depth}]


def _static_name(dropped: list[int]) -> str:
    return "static-" + "-".join(map(str, sorted(dropped)))


def random_skipping(bench: Bench) -> list[dict[str, float]]:
    """any-p with scores drawn by chance, in training and after."""
    with _scores_by_chance():
        model = bench.converted("random", bench.recipe("any-p", load="none", between=0.0, start="open"))
        return curve(model, bench.text, timed=False)


def untrained_skipping(bench: Bench) -> list[dict[str, float]]:
    """The parent as it is, tokens skipped by chance: what ``calibrate`` has to beat."""
    with _scores_by_chance():
        return curve(convert(bench.parent()[0], MoDConfig(layers=bench.layers)), bench.text, timed=False)


@contextlib.contextmanager
def _scores_by_chance() -> Iterator[None]:
    """Every router scores by chance meanwhile."""

    def draw(module: Any, args: Any, out: Any) -> Any:
        if isinstance(module, Router):
            return torch.logit(torch.rand(out.shape), eps=1e-6).detach()
        return None

    handle = torch.nn.modules.module.register_module_forward_hook(draw)
    try:
        yield
    finally:
        handle.remove()


def recipe_curve(bench: Bench, name: str, **changes: Any) -> list[dict[str, float]]:
    label = "-".join([name, *(str(value) for value in changes.values() if isinstance(value, str))])
    return curve(bench.converted(label, bench.recipe(name, **changes)), bench.text)


@torch.no_grad()
def cheapest(model: Any, among: tuple[int, ...], count: int, blocks: Any) -> list[int]:
    """The layers whose loss costs the parent least, one after the other."""
    dropped: list[int] = []
    for _ in range(count):
        costs = {}
        for at in among:
            if at not in dropped:
                trial = copy.deepcopy(model).eval()
                without(trial, [*dropped, at])
                ids = torch.from_numpy(blocks.astype(np.int64))
                costs[at] = trial(input_ids=ids, labels=ids, use_cache=False).loss.item()
        dropped.append(min(costs, key=costs.__getitem__))
    return dropped


def without(model: Any, dropped: list[int]) -> None:
    """Take layers out of a Llama-shaped dense model."""
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList([layer for at, layer in enumerate(layers) if at not in dropped])
    model.config.num_hidden_layers = len(model.model.layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [kind for at, kind in enumerate(model.config.layer_types) if at not in dropped]
    for at, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = at


def entries(bench: Bench) -> dict[str, Callable[[], list[dict[str, float]]]]:
    """What is compared, by name."""
    return {
        "dense": lambda: dense(bench),
        **{_static_name(drop): (lambda drop=drop: static(bench, drop)) for drop in bench.drops()},
        "random": lambda: random_skipping(bench),
        "random-untrained": lambda: untrained_skipping(bench),
        "calibrate": lambda: recipe_curve(bench, "calibrate"),
        "paper": lambda: recipe_curve(bench, "paper"),
        "paper-controlled": lambda: recipe_curve(bench, "paper-controlled"),
        "top-k": lambda: recipe_curve(bench, "top-k"),
        "fixed-p": lambda: recipe_curve(bench, "fixed-p"),
        "any-p-slope": lambda: curve(
            bench.converted("any-p-slope", bench.recipe("any-p", between=0.0)), bench.text
        ),
        "any-p-paired": lambda: curve(
            bench.converted("any-p-paired", bench.recipe("any-p", paired=True)), bench.text
        ),
        "any-p-router": lambda: recipe_curve(bench, "any-p", tune="router"),
        "any-p-lora": lambda: recipe_curve(bench, "any-p", tune="lora"),
        "any-p-full": lambda: recipe_curve(bench, "any-p", tune="full"),
    }


def at_load(rows: list[dict[str, float]], load: float) -> float | None:
    """Loss at a load, straight between measured points; None outside them."""
    ordered = sorted(rows, key=lambda row: row["load"])
    loads, losses = [row["load"] for row in ordered], [row["loss"] for row in ordered]
    if not loads[0] - 0.03 <= load <= loads[-1] + 0.03:
        return None
    return float(np.interp(load, loads, losses))


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: held-out loss at four loads; all static droppings are one line."""
    curves = {name: value["curve"] for name, value in found.items() if not name.startswith("static")}
    drops = [row for name, value in found.items() if name.startswith("static") for row in value["curve"]]
    if drops and "dense" in found:
        curves = {"static dropping (straight between)": [*_best(drops), *found["dense"]["curve"]], **curves}
    lines = ["| recipe | " + " | ".join(f"load {load:g}" for load in LOADS) + " |", "|---" * (1 + len(LOADS)) + "|"]
    for name, rows in curves.items():
        cells = [at_load(rows, load) for load in LOADS]
        lines.append(f"| {name} | " + " | ".join("" if cell is None else f"{cell:.3f}" for cell in cells) + " |")
    return "\n".join(lines)


def _best(drops: list[dict[str, float]]) -> list[dict[str, float]]:
    """The best static dropping at each load."""
    return [min((row for row in drops if row["load"] == load), key=lambda row: row["loss"])
            for load in {row["load"] for row in drops}]


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Held-out loss over load, over counted compute, and over measured seconds per token; a line a recipe."""
    from plotly.subplots import make_subplots

    axes = {"load": "load of the MoD layers (measured)", "compute": "compute, share of dense (counted)",
            "seconds_per_token": "prefill seconds per token (measured)"}
    figure = make_subplots(rows=1, cols=len(axes), subplot_titles=list(axes.values()), shared_yaxes=True)
    statics = [row for name, value in found.items() if name.startswith("static") for row in value["curve"]]
    lines = {name: value["curve"] for name, value in found.items() if not name.startswith(("static", "dense"))}
    if statics and "dense" in found:
        lines["static dropping"] = [*_best(statics), *({**row, "compute": 1.0} for row in found["dense"]["curve"])]
    colours = (
        "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#888888", "#b8860b", "#cc6600", "#8866dd",
        "#009988", "#000000", "#dd2222",
    )
    for at, (name, rows) in enumerate(lines.items()):
        for column, axis in enumerate(axes, 1):
            mine = sorted((row for row in rows if axis in row), key=lambda row: row[axis])
            figure.add_scatter(
                x=[row[axis] for row in mine], y=[row["loss"] for row in mine], name=name, legendgroup=name,
                showlegend=column == 1, mode="lines+markers" if axis != "load" else "lines",
                line={"color": colours[at % len(colours)], "dash": "dot" if name == "static dropping" else "solid"},
                row=1, col=column,
            )
    best = min(row["loss"] for rows in lines.values() for row in rows)
    figure.update_yaxes(range=[best - 0.05, best + 0.9])  # what rises out of the picture is far behind
    figure.update_layout(template="plotly_white", yaxis_title="held-out loss, nats per token (measured)",
                         title="Recipes at equal tokens")
    figure.write_html(path, include_plotlyjs="directory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent")
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", default="inner")
    parser.add_argument("--split")
    parser.add_argument("--held-out-split", help="hold out rows of this split in the place of some of the others")
    parser.add_argument("--tokens", type=int, default=1_500_000)
    parser.add_argument("--held-out", type=int, default=96)
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--only", help="names with commas between them; 'static' for all droppings")
    parser.add_argument("--time-again", action="store_true", help="measure seconds per token anew for what is done")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments)
    compared = entries(bench)
    for name, measure in compared.items():
        path = arguments.out / f"{name}.json"
        if path.is_file() and arguments.time_again:
            done = json.loads(path.read_text())
            path.write_text(json.dumps({**done, "curve": timed_again(bench, name, done["curve"])}), encoding="utf-8")
        called = "static" if name.startswith("static-") else name
        if path.is_file() or (arguments.only and called not in arguments.only.split(",")):
            continue
        began = time.monotonic()
        rows = measure()
        path.write_text(json.dumps({"curve": rows, "seconds": round(time.monotonic() - began, 1)}), encoding="utf-8")
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    found = {name: json.loads((arguments.out / f"{name}.json").read_text()) for name in compared
             if (arguments.out / f"{name}.json").is_file()}
    print(table(found))
    plot(found, arguments.out / "recipes.html")
    told = dataclasses.asdict(bench.recipe("any-p"))
    losses = {name: [at_load(value["curve"], load) for load in LOADS] for name, value in found.items()}
    print(json.dumps({"parent": arguments.parent, "layers": list(bench.indices), "any-p": told, "losses": losses}))


if __name__ == "__main__":
    main()
