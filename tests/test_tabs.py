"""Handlers of the tabs, called as Gradio calls them, with a service that says what the test wants."""

import types
from types import SimpleNamespace

import gradio as gr
import pytest

from app import ui
from app.errors import UserError
from app.present import (
    best_sentence,
    conversion_estimate,
    conversion_sentence,
    duration,
    memory_sentence,
    size,
    snippet,
)
from app.service import Limits, Update
from app.service.library import Loading
from app.tabs import chat, convert, explore, model, sweep
from app.tabs.shared import OOPS, answered, guarded, numbers, status, table

SOMEONE = SimpleNamespace(session_hash="someone")
TAPE = """["h",{"id":"0","depth":4,"mod":[1,2],"anchors":1,"title":"t"}]
["c","Hi",0.5,"fff000","1","p",7]
["f",0.5,0.5,null,1,1,2,0.2,1,0.1]
["c"," you",0.5,"fff000","1","n",8,-0.1,[]]
["c","!",0.8,"fff000","0","n",9,-0.1,[]]
["e","Reached the limit of 2 new tokens."]
"""


class FakeService:
    """Answers from a script; whatever else is asked of it fails the test."""

    limits = Limits()

    def __init__(self, **script):
        self.asked, self.talks, self.lab = [], self, self  # its parts answer from the same script
        for name, answer in script.items():
            setattr(self, name, self._told(name, answer))

    def _told(self, name, answer):
        def tell(*arguments, **options):
            self.asked.append((name, arguments, options))
            if isinstance(answer, BaseException):
                raise answer
            return iter(answer) if isinstance(answer, list) else answer

        return tell

    def mod_layers(self, name):
        return (1, 2)

    def source_of(self, name):
        return f"/models/{name}"

    def parent_of(self, name):
        return "dense"

    def names(self):
        return ["m"]


def generate(service, **changes):
    asked = {"prompt": "Hi", "p": 0.5, "new_tokens": 2, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 3,
             "chat": True, "model": "m", "shifts": {}, **changes}
    return list(explore._generate(service)(*asked.values(), SOMEONE))


def lines(shown, at):
    """Status lines among the outputs of a handler."""
    return [one[at] for one in shown if isinstance(one[at], str) and "mod-status" in one[at]]


def closing(updates):
    """An iterator that the handler can close."""
    yield from updates


# Explore


def test_a_run_shows_waiting_loading_streaming_and_its_end():
    head = TAPE.partition("\n")[0] + "\n"
    updates = [Update(waiting=2), Update(loading=Loading(3.0)), Update(tape=head), Update(tape=TAPE)]
    shown = generate(FakeService(run=closing(updates)))
    told = " ".join(lines(shown, 1))
    for words in ("Starting", "2 ahead", "Loading m", "Streaming", "Reached the limit"):
        assert words in told
    assert [one[0]["d"] for one in shown if "d" in one[0]] == [head, TAPE, TAPE]
    assert "modification.generate" in shown[-2][3]


def test_settings_reach_the_service_as_they_were_set():
    service = FakeService(run=closing([Update(tape=TAPE)]))
    generate(service, seed=-1, shifts={"1": 0.25}, temperature=0.7)
    name, (session, p, request), _ = service.asked[0]
    assert (name, session, p) == ("run", "someone", 0.5)
    assert (request.shifts, request.temperature) == ((0.0, 0.25), 0.7)
    assert request.seed >= 0, "drawn here, so that the snippet can tell it"


@pytest.mark.parametrize("error", [UserError("Too long. Shorten it."), RuntimeError("secret detail")])
def test_an_error_is_a_sentence_and_never_a_trace(error):
    last = generate(FakeService(run=error))[-1]
    assert "mod-status error" in last[1]
    assert ("Too long" in last[1]) == isinstance(error, UserError)
    assert "secret" not in last[1]


def test_the_snippet_moves_p_as_the_user_did():
    request = SimpleNamespace(prompt="Hi", chat=True, max_new_tokens=2, temperature=0.0, top_p=1.0, top_k=0, seed=1)
    code = snippet(request, TAPE, "/models/m")
    assert "changes = [(-1, 0.5), (1, 0.8)]" in code
    space = {}
    exec(code[code.index("changes") : code.index("steps = modification")], space)
    assert [space["moving"]() for _ in range(4)] == [0.5, 0.5, 0.8, 0.8]
    same = snippet(request, TAPE.replace("0.8", "0.5"), "/models/m")
    assert "p=0.5" in same
    assert "moving" not in same


# The other tabs


def test_the_dense_side_is_the_one_chosen_or_the_parent():
    service = FakeService()
    assert chat.dense_side(service, "m-MoD", "other") == "other"
    assert chat.dense_side(service, "m-MoD", "the dense parent, or this model at p = 0") == "dense"
    service.parent_of = lambda name: None
    assert chat.dense_side(service, "m-MoD", None) == "m-MoD"


def test_regenerating_asks_for_the_last_message_again():
    service = FakeService(chat=closing([Update(tape="x")]), turns=("Hello", "More"))
    list(chat._answer(service, again=True)("", 0.5, "m", None, False, 10, 0.0, 0, SOMEONE))
    _, (session, pair, p, request, blind, turns), _ = service.asked[-1]
    assert (session, pair, p, blind, turns) == ("someone", ("dense", "m"), 0.5, False, 1)
    assert request.prompt == "More"


def test_regenerating_nothing_is_a_sentence():
    service = FakeService(turns=())
    shown = list(chat._answer(service, again=True)("", 0.5, "m", None, False, 10, 0.0, 0, SOMEONE))
    assert "Send a message first" in shown[-1][1]


def point(p, loss):
    quality = SimpleNamespace(p=p, loss=loss, error=0.01, load=1 - p, layer_loads=(1 - p,), tokens=64)
    return SimpleNamespace(quality=quality, kv=1 - p / 2, compute=1 - p / 2, speed=100.0)


def swept(*points, best=None, given=64):
    return SimpleNamespace(
        points=points, dense=2.0, dense_speed=50.0, parent="dense (dense)", tokens=64, given=given, within=0.02,
        best=best,
    )


def test_a_sweep_fills_table_plot_and_sentence():
    best = point(0.3, 2.01)
    service = FakeService(sweep=closing([Update(result=swept(point(0, 2.0))),
                                         Update(result=swept(point(0, 2.0), best, best=best))]))
    shown = list(sweep._sweep(service)("text", "0.3, 0", 2, "m", SOMEONE))
    assert service.asked[0][1][3] == [0.0, 0.3], "in order"
    assert shown[-2][2].count("<tr>") == 3
    assert "**p = 0.3**" in shown[-1][3]
    assert shown[-1][4] == 0.3
    assert shown[-1][5]["visible"]


def test_a_text_that_was_cut_is_said_to_be():
    service = FakeService(sweep=closing([Update(result=swept(point(0, 2.0), given=50_000))]))
    assert "64 tokens (the first of 50,000)" in list(sweep._sweep(service)("text", "0", 2, "m", SOMEONE))[-1][0]


def test_no_p_within_reach_is_said_and_hands_nothing_over():
    assert "No p of the grid stays within 2%" in best_sentence(swept(point(0.5, 3.0)))


def test_a_model_s_way_of_loading_becomes_its_label():
    updates = [Update(loading=Loading(1.0)), Update(result=("m", [["0"]], {}, "card"))]
    service = FakeService(label="m [bf16]", load=closing(updates))
    shown = list(model._load(service)("m", "bf16", "none", "best"))
    assert service.asked[0][1] == ("m", "bf16", None, None)
    assert shown[-1][4]["value"] == "m [bf16]"
    assert shown[-1][3] == "card"


def test_a_conversion_shows_progress_and_offers_the_model():
    record = {"step": 10, "cross_entropy": 2.5, "load": 0.6, "layer_loads": [0.5, 0.7]}
    going = SimpleNamespace(steps=20, log=(record,), seconds=5.0, left=5.0, ended="", failed=False)
    done = SimpleNamespace(steps=20, log=(record,), seconds=9.0, left=0.0, ended="Converted: out", failed=False)
    shown = list(convert._convert(FakeService(convert=closing([going, done])))(
        "p", "name", "data", "any-p", "full", "inner", 5000, 16, 8, False))
    assert "Step 10 of 20: loss 2.500 nats/token, load 60% (measured), about 5 s left (estimated)" in shown[1][0]
    assert shown[-1][3] == "name"
    assert shown[-1][2]["visible"]


# Words


def test_durations_sizes_and_memory_in_words():
    assert [duration(s) for s in (12, 600, 9000)] == ["12 s", "10 min", "2.5 h"]
    assert [size(b) for b in (12, 1500, 2.5e6, 3.2e9)] == ["12 B", "1.5 KB", "2.5 MB", "3.20 GB"]
    assert memory_sentence(10, 20).endswith("It fits.")
    assert "does not fit" in memory_sentence(30, 20)
    assert "does not fit" in conversion_estimate(5, 30, 20)
    assert "failed" in conversion_sentence(SimpleNamespace(ended="The conversion failed: x", failed=True))


def test_numbers_are_read_or_refused():
    assert numbers("1, 2,3", int, "N") == [1, 2, 3]
    for text in ("", "one", "1;2"):
        with pytest.raises(UserError, match="N"):
            numbers(text, int, "N")


def test_what_people_typed_stays_text():
    nasty = "<script>alert(1)</script>"
    assert "<script>" not in status(nasty)
    assert "<script>" not in table(nasty, [nasty], [[nasty]])


def test_a_guarded_handler_keeps_its_signature_and_says_oops():
    @guarded(lambda line: line)
    def handler(text, request: gr.Request):
        yield text
        raise KeyError("x")

    assert isinstance(handler("a", SOMEONE), types.GeneratorType)
    first, last = handler("a", SOMEONE)
    assert first == "a"
    assert OOPS in last


def test_an_answered_handler_keeps_its_signature_and_says_what_was_wrong():
    @answered(lambda line: (line, None))
    def handler(number, request: gr.Request):
        if not number:
            raise UserError("An answer is still being made.")
        return number, {}[number]

    assert "still being made" in handler(0, SOMEONE)[0]
    assert OOPS in handler(1, SOMEONE)[0]


def test_what_was_broken_off_is_named_when_the_app_starts_again(tmp_path):
    """A conversion that the last app was killed in, with a checkpoint or without one, as ``calibrate`` has none."""
    from app.service import Service

    for name, step, done in (("half", 40, False), ("half", 120, False), ("whole", 60, True)):
        checkpoint = tmp_path / name / "checkpoints" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text("{}")
        if done:
            (tmp_path / name / "report.json").write_text("{}")
    (tmp_path / "half" / "checkpoints" / "checkpoint-160").mkdir()  # not whole
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "run.json").write_text("{}")
    service = Service({}, converted=tmp_path)
    assert service.conversions.unfinished() == {"early": 0, "half": 120}
    said = convert.opening(service)
    assert "Broken off, and kept: half (120 steps)." in said
    assert "before anything was kept: early." in said
    assert "whole" not in said


def test_the_page_builds_and_offers_four_endpoints_by_name(tmp_path):
    """Everything else is private to the page."""
    from app.service import Service

    demo = ui.build(Service({}, converted=tmp_path))
    public = {f.api_name for f in demo.fns.values() if f.api_visibility == "public"}
    assert public == {"generate", "chat", "sweep", "estimate"}
