"""The tape, the figures and the sentences, without a browser and without torch."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.figures import load_per_layer
from app.present import estimate_rows, snippet, waiting_sentence
from app.service.requests import Request
from app.tape import FIGURES, Piece, Tape, Window, bits, ending, records, summary, tape_of_trace
from modification.measure.cost import CostMeter, ModelShape
from modification.measure.estimate import estimate
from modification.measure.presets import preset
from modification.trace import RoutingTrace, Step

SHAPE = ModelShape(4, (1, 2), layer_weights=(1000,) * 4, head_weights=500, attention_width=8, router_weights=10)


def step(routed, prefill=False, p=0.5, seconds=0.1):
    routed = np.asarray(routed, bool)
    count = routed.shape[1]
    logprobs = np.full(count, np.nan if prefill else -1.0, np.float32)
    scores = np.where(routed, 0.9, 0.1)
    return Step(np.arange(count), logprobs, scores, routed, p, 800, 840, 1600, seconds, prefill)


def test_tape_only_grows_so_that_updates_travel_as_appends():
    tape = Tape(SHAPE, "a model")
    before = tape.text
    for at in range(5):
        tape.add(step([[1], [0]]), [Piece(f"t{at}")])
        assert tape.text.startswith(before)
        assert len(tape.text) - len(before) < 400
        before = tape.text


def test_a_column_carries_text_threshold_scores_and_decisions():
    tape = Tape(SHAPE, "m")
    tape.add(step([[1, 0], [0, 0]], prefill=True, p=0.25), [Piece("<s>", True), Piece("Once")])
    header, first, second, figures = list(records(tape.text))
    assert header[1]["depth"] == 4
    assert header[1]["mod"] == [1, 2]
    assert first == ["c", "<s>", 0.25, "e6619a", "1", "s", 0]
    assert second == ["c", "Once", 0.25, "19a19a", "0", "p", 1]
    assert dict(zip(FIGURES, figures[1:], strict=True))["load"] == 0.25


def test_figures_of_a_run():
    tape = Tape(SHAPE, "m")
    tape.add(step([[1, 1], [1, 1]], prefill=True, seconds=9.0), [Piece("a"), Piece("b")])
    tape.add(step([[0], [0]], seconds=0.25), [Piece("c")])
    tape.add(step([[1], [0]], seconds=0.25), [Piece("d")])
    last = dict(zip(FIGURES, list(records(tape.text))[-1][1:], strict=True))
    assert last["load"] == pytest.approx(1 / 4), "of the new tokens"
    assert last["total"] == pytest.approx(5 / 8), "prompt included"
    assert last["speed"] == 4.0, "prefill time is not decode speed"
    assert [last[name] for name in ("stored", "allocated", "dense")] == [800, 840, 1600]
    assert 0 < last["saved"] < 1


def test_load_and_speed_answer_when_p_moves():
    tape = Tape(SHAPE, "m")
    tape.add(step([[1], [1]], prefill=True), [Piece("a")])
    for _ in range(100):
        tape.add(step([[1], [1]], seconds=0.2), [Piece("b")])
    for _ in range(40):
        tape.add(step([[0], [0]], seconds=0.1), [Piece("c")])
    last = dict(zip(FIGURES, list(records(tape.text))[-1][1:], strict=True))
    assert (last["load"], last["speed"]) == (0.0, 10.0)


def test_hostile_token_text_stays_one_json_line():
    """And whatever reads tapes reads it as one: some characters count as ends of lines elsewhere."""
    tape = Tape(SHAPE, "m")
    nasty = 'a"\n</script><img src=x onerror=alert(1)>\u2028\u2029\x85\x1e\x0c'
    tape.add(step([[1], [0]], prefill=True), [Piece(nasty)])
    tape.add(step([[1], [0]]), [Piece(nasty)])
    tape.end(nasty)
    assert json.loads(tape.text.split("\n")[1])[1] == nasty
    assert summary(tape.text)["text"] == summary(tape.text)["ended"] == nasty
    assert list(load_per_layer(tape.text).data[0].y) == [1.0, 1.0, 0.0, 1.0]
    assert "load(" in snippet(Request("x", "m"), tape.text, "'m'")


def test_half_characters_of_a_trace_can_be_sent():
    """A message to a page has to be UTF-8."""
    tape = Tape(SHAPE, "\ud800")
    tape.add(step([[1], [1]]), [Piece("a\udfff")])
    assert tape.text.encode()
    assert [record[1] for record in records(tape.text)][1] == "a?"


def test_two_runs_never_share_a_header():
    assert Tape(SHAPE, "m").text[:48] != Tape(SHAPE, "m").text[:48]


@given(st.lists(st.booleans(), max_size=90))
def test_bits_hold_every_decision(routed):
    value = int(bits(routed), 16)
    assert [bool(value >> at & 1) for at in range(len(routed))] == routed


def test_a_stored_trace_makes_the_tape_of_its_run():
    trace = RoutingTrace(4, (1, 2), info={
        "title": "Example", "special": [0], "note": "A recorded run.",
        "shape": {"depth": 4, "mod_layers": [1, 2], "layer_weights": 1, "head_weights": 1, "attention_width": 1,
                  "router_weights": 1},
    })
    trace.append(step([[1, 1], [0, 0]], prefill=True), ["<s>", "Once"])
    trace.append(step([[0], [1]]), [" upon"])
    tape = tape_of_trace(RoutingTrace.from_json(trace.to_json()))
    assert [record[1] for record in records(tape) if record[0] == "c"] == ["<s>", "Once", " upon"]
    assert ending(tape) == "A recorded run."


def test_per_layer_chart_counts_each_layer():
    tape = Tape(SHAPE, "m")
    tape.add(step([[1, 0], [0, 0]], prefill=True), [Piece("a"), Piece("b")])
    assert list(load_per_layer(tape.text).data[0].y) == [1.0, 0.5, 0.0, 1.0]


def test_sentences():
    assert "2 ahead" in waiting_sentence(2)
    assert waiting_sentence(0).startswith("Next in line")


def test_counted_flops_fall_as_load_falls():
    saved = []
    for ran in (1, 0):
        meter = CostMeter(SHAPE)
        meter.add(step([[1] * 8, [ran] * 8], prefill=True))
        meter.add(step([[ran], [ran]]))
        saved.append(meter.saved)
    assert saved[0] < saved[1]


def test_an_estimate_that_keeps_nothing_is_shown():
    """All layers routed and no token run: no keys and values to divide by."""
    config = preset("llama-10m")
    found = estimate(config, context=64, load=0.0, layers=tuple(range(config.num_hidden_layers)))
    cells = {row[0]: row for row in estimate_rows(found)}
    assert cells["keys and values, GB"][2:] == ["0", ""]


def test_all_run_costs_the_dense_parent_plus_its_routers():
    meter = CostMeter(SHAPE)
    meter.add(step([[1] * 8, [1] * 8], prefill=True))
    meter.add(step([[1], [1]]))
    assert meter.routed - meter.dense == 2 * 9 * 2 * SHAPE.router_weights


def test_windows_on_a_growing_tape_overlap_and_miss_no_line():
    """Put together by line number they are the tape, even if every second one is lost; the last is whole."""
    tape, window, lines = Tape(SHAPE, "m"), Window(), []
    sizes = []
    for at in range(1500):
        tape.add(step([[1], [0]]), [Piece(f"word {at} \U0001f98a")])
        seen = window.of(tape.text)
        sizes.append(len(seen["d"]))
        if at % 2:
            assert seen["at"] <= len(lines)
            lines[seen["at"] :] = seen["d"].splitlines(keepends=True)
    assert "".join(lines) == tape.text
    assert max(sizes) < Window.MOST + 500 < len(tape.text)
    assert Window.whole(tape.text)["d"] == tape.text
    assert Window.whole("") == {"id": "", "at": 0, "d": ""}
