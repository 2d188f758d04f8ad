"""Ten thousand odd requests, to the handlers and over HTTP: sentences, no traceback, no hang, nobody left inside."""

from __future__ import annotations

import asyncio
import json
import os
import random
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import gradio as gr
import httpx
import pytest
from gradio.utils import get_upload_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.middleware import Middleware
from talkers import talker

from app import ui
from app.calls import Calls
from app.errors import UserError
from app.service import Limits, Request, Service
from app.tabs import benchmark, chat, explore, sweep
from app.tabs.shared import OOPS
from app.uploads import Uploads
from app.web import Guard

HANDLED, OVER_HTTP = 7_500, 2_500
LEAKS = ("Traceback", 'File "/', "site-packages", "Error:")
TEXT = st.text(max_size=40) | st.sampled_from([
    "", "  ", "\x00", "\ud800", "<script>alert(1)</script>", "../../etc/passwd", "a" * 3000, "tiny", "tiny-MoD",
    "http://127.0.0.1/x", "file:///etc/passwd", "owner/name", "-rf", "~root", "tiny [bf16, cuda]", "[]", "‮drow",
])
NUMBER = st.sampled_from([
    0, 1, -1, 0.5, 2, 7, 1e9, -1e9, float("nan"), float("inf"), -float("inf"), 2**70, None, True, "many", "", [], {},
])


SHIFTS = st.dictionaries(st.sampled_from(["0", "1", "x"]), NUMBER, max_size=2)
GRID = TEXT | st.sampled_from(["0, 0.5", "0.5, 1e400", "nan", "0,,1", "2", "0.1 0.2"])


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    models = {
        "tiny-MoD": talker(root / "mod", chat=True), "tiny": talker(root / "dense", chat=True, dense=True),
    }
    return Service(models, limits=Limits(running=2, new_tokens=3, frame=0.0, free_models=False, convert=False))


def said(value: object) -> str:
    """All text of what a handler gave."""
    return json.dumps(value, default=str)


def told(handler, arguments) -> list[str]:
    """All that a handler shows, as text; Gradio's own error counts as shown."""
    try:
        made = handler(*arguments)
        return [said(shown) for shown in made] if isinstance(made, Iterator) else [said(made)]
    except gr.Error as error:
        return [str(error)]


def trouble(handler, fields, count: int, *after) -> list:
    """Call a handler with so many odd arguments: those that it answered with a leak or an apology."""
    found, calls = [], Counter()

    @settings(
        max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(values=st.tuples(*fields))
    def each(values):
        calls["made"] += 1
        for text in told(handler, (*values, *after)):
            if OOPS in text or any(leak in text for leak in LEAKS):
                found.append((values, text))

    each()
    assert calls["made"] >= count
    return found


SOMEONE = SimpleNamespace(session_hash="odd")
HANDLERS = {
    "generate": (explore._generate, [TEXT, *[NUMBER] * 7, TEXT, SHIFTS], 0.3, [SOMEONE]),
    "chat": (
        lambda service: chat._answer(service, again=False), [TEXT, NUMBER, TEXT, TEXT, NUMBER, *[NUMBER] * 3], 0.2,
        [SOMEONE],
    ),
    "sweep": (sweep._sweep, [TEXT, GRID, NUMBER, TEXT], 0.15, [SOMEONE]),
    "bench": (benchmark._bench, [TEXT, GRID, GRID, NUMBER, NUMBER, st.booleans()], 0.1, [SOMEONE]),
    "estimate": (benchmark._estimate, [TEXT, NUMBER, NUMBER, NUMBER, TEXT, TEXT, TEXT], 0.1, []),
    "trace": (explore._read_trace, [st.binary(max_size=200) | st.just(b"[" * 100_000)], 0.1, [SOMEONE]),
    "text": (sweep._read, [st.binary(max_size=200)], 0.05, []),
    "move": (explore._move, [NUMBER | TEXT], 0.05, [SOMEONE]),
}


@pytest.mark.parametrize("name", HANDLERS)
def test_odd_values_get_sentences(service, name):
    """Any value in any field of a page: it ends, and what it says holds no traceback and no apology."""
    make, fields, share, after = HANDLERS[name]
    wrong = trouble(make(service), fields, int(share * HANDLED), *after)
    assert not wrong, wrong[:3]
    assert service.desk.turnstile.count() == (0, 0)


@pytest.fixture(scope="module")
def demo(service):
    return ui.build(service)


@pytest.fixture(scope="module")
def address(service, demo):
    """The app over HTTP, as `python app.py` serves it."""
    _, url, _ = demo.launch(
        server_port=None, prevent_thread_lock=True, quiet=True, max_file_size=service.limits.file_bytes,
        app_kwargs={"middleware": [Middleware(Guard, service=service, calls=Calls(demo))]},
    )
    yield url.rstrip("/")
    demo.close(verbose=False)


ODD = [
    None, "", 0, -1, 10**30, "x" * 5000, [], {}, [[[]]], {"path": "/etc/passwd"}, {"path": "/etc/passwd", "meta": {
        "_type": "gradio.FileData"}}, {"url": "http://127.0.0.1:9/", "meta": {"_type": "gradio.FileData"}},
    {"__type__": "update"}, "<img src=x onerror=alert(1)>", "\u202e", {"a": {"b": {"c": 1}}}, True, 1e308,
]
PLACES = [
    "/gradio_api/file=/etc/passwd", "/gradio_api/file=../../../../etc/passwd", "/file=/etc/passwd",
    "/gradio_api/file=http://127.0.0.1:9/x", "/gradio_api/proxy=http://127.0.0.1:9/", "/static/../../etc/passwd",
    "/assets/..%2f..%2f..%2fetc%2fpasswd", "/gradio_api/stream/x/y/z/playlist.m3u8", "/gradio_api/info", "/config",
    "/nowhere", "/theme.css", "/robots.txt",  # no endless answers: the heartbeat and the progress of uploads are such
]


RAW = [b"{", b"\xff\xfe", b"[" * 50_000, b'{"data": NaN}', b"null", b'{"data":' + b"1" * 10_000 + b"}"]


TAKES = {"generate": 9, "chat": 6, "sweep": 4, "estimate": 7}


def plain(prompt: str) -> list:
    """Values for ``generate`` with nothing odd about them."""
    return [prompt, 0.5, "tiny-MoD", 3, 0.0, 1.0, 0, 0, True]


def one(client: httpx.Client, at: int) -> httpx.Response | None:
    """An odd request: number ``at`` decides which; None where the server's answer has no end."""
    chosen = random.Random(at)
    data = [chosen.choice(ODD) for _ in range(chosen.randint(0, 12))]
    session = chosen.choice(["s", "", "x" * 300, "../s", None, 5])
    kind = at % 10
    if kind < 3:
        name = chosen.choice(["generate", "chat", "sweep", "estimate", "load", "convert", "nothing"])
        if chosen.random() < 0.7:  # as many values as it takes: they get as far as the handler
            data = [chosen.choice(ODD) for _ in range(TAKES.get(name, 1))]
        body: object = {"data": data} if chosen.random() < 0.8 else chosen.choice(ODD)
        made = client.post(f"/gradio_api/call/{name}", json=body)
        if made.status_code == 200 and "event_id" in made.json():
            return client.get(f"/gradio_api/call/{name}/{made.json()['event_id']}")
        return made
    if kind < 6:
        path = chosen.choice(["/gradio_api/run/predict", "/gradio_api/queue/join", "/gradio_api/api/predict"])
        body = {"data": data, "fn_index": chosen.choice([*range(-2, 70), "x", None, 10**20]), "session_hash": session}
        return client.post(path, json=body)
    if kind == 6:
        path = chosen.choice(["/gradio_api/component_server", "/gradio_api/cancel", "/gradio_api/reset"])
        wild = {"component_id": chosen.choice(ODD), "fn_name": chosen.choice(["ls", "__class__", 3]), "data": data,
                "session_hash": session, "event_id": "e", "fn_index": 1}
        return client.post(path, json=wild)
    if kind == 7:
        name = chosen.choice(["a.json", "../../evil", "x" * 400, "a\x00b", "con.txt", ".."])
        return client.post("/gradio_api/upload", files={"files": (name, b"x" * chosen.randint(0, 2000))})
    if kind == 8:
        method = chosen.choice(["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"])
        return client.request(method, chosen.choice(PLACES))
    raw = chosen.choice(RAW)
    kinds = ["application/json", "text/plain", "multipart/form-data"]
    path = chosen.choice(["/gradio_api/queue/join", "/gradio_api/call/generate"])
    return client.post(path, content=raw, headers={"content-type": chosen.choice(kinds)})


def test_odd_requests_over_http(address, service):
    """Every one is answered, none with a traceback, a file or an address fetched; the app then works as before."""
    codes, local = Counter(), threading.local()

    def go(at):
        if not hasattr(local, "client"):
            local.client = httpx.Client(base_url=address, timeout=20, headers={"connection": "close"})
        try:
            answer = one(local.client, at)
        except (ValueError, TypeError):  # what the client itself would not send
            codes["unsent"] += 1
            return
        codes[answer.status_code // 100] += 1
        text = answer.text[:100_000]
        assert not any(leak in text for leak in LEAKS[:3]), (at, text[:500])
        assert "root:x:0" not in text, at

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(go, range(OVER_HTTP)))
    assert sum(codes.values()) == OVER_HTTP
    assert codes["unsent"] < OVER_HTTP / 20, codes
    assert codes[5] <= OVER_HTTP // 500, "Gradio's queue loses a call where its session is reset at that moment"
    with httpx.Client(base_url=address, timeout=60) as client:
        assert client.get("/health").text == "ok\n"
        made = client.post("/gradio_api/call/generate", json={"data": plain("Hello")})
        assert '"new_tokens": 3' in client.get(f"/gradio_api/call/generate/{made.json()['event_id']}").text
        assert "mod_requests_total" in client.get("/metrics").text
    assert service.desk.turnstile.count() == (0, 0)


def test_nobody_moves_the_p_of_a_programs_run(service, monkeypatch):
    """Its dial has a name that nobody can think of; two runs of one address share none."""
    names, hold = [], service.dials.hold
    monkeypatch.setattr(service.dials, "hold", lambda name, dial: names.append(name) or hold(name, dial))
    for _ in range(2):
        service.generate(0.5, Request("Hello", "tiny-MoD", 3), "api-127.0.0.1")
    assert len(set(names)) == 2
    assert not any("127.0.0.1" in name or len(name) < 30 for name in names)


@pytest.mark.parametrize(("path", "call", "sentence"), [
    ("call/generate", {"data": ["a secret text"]}, "takes 9 values, and 1 came"),
    ("call/sweep", {"data": [{"path": "a secret text", "meta": {}}, None, "", 0]}, "value 1 has to be"),
    ("call/estimate", {"data": ["llama-2-7b", ["a secret text"], 1, 0.5, "bf16", "own", "h200"]}, "value 2 has to be"),
    ("call/nothing", {"data": ["a secret text"]}, "no endpoint nothing"),
    ("call/v2/nothing", {"prompt": "a secret text"}, "no endpoint nothing"),
    ("call/v2/generate", {"a secret text": 1}, "takes prompt, p, model"),
    ("call/v2/generate", {"p": 0.5}, "needs prompt"),
    ("call/v2/generate", {"prompt": {"path": "a secret text", "meta": {}}}, "value 1 has to be"),
    ("call/generate", {"data": ["\ud800", *plain("")[1:]]}, "half a character"),
    ("call/v2/generate", {"prompt": "\ud800"}, "half a character"),
    ("queue/join", {"data": ["a secret text"] * 40, "fn_index": "1", "session_hash": "s"}, "fn_index has to be"),
    ("run/generate", {"data": ["a secret text"] * 40, "fn_index": 1}, "and 40 came"),
    ("queue/join", {"data": ["a secret text"] * 40, "fn_index": 1, "session_hash": "s"}, "and 40 came"),
    ("queue/join", {"data": ["a secret text"], "fn_index": 99999, "session_hash": "s"}, ""),
    ("run/predict", {"data": ["a secret text"] * 40, "fn_index": -1}, ""),
])
def test_calls_that_do_not_fit_are_told_so_and_leave_no_text_in_the_log(address, capfd, path, call, sentence):
    """Gradio would write them there, values and all."""
    sent = {"content": json.dumps(call), "headers": {"content-type": "application/json"}, "timeout": 20}
    answer = httpx.post(f"{address}/gradio_api/{path}", **sent)
    assert answer.status_code == 422 or not sentence  # Gradio's own refusal
    assert sentence in answer.text
    assert "a secret text" not in answer.text
    assert "a secret text" not in "".join(capfd.readouterr())


def test_calls_that_fit_pass(service):
    """Numbers whole or not, settings left out or cleared, a model that is not in the list, an uploaded file."""
    demo = ui.build(service)
    calls = Calls(demo)

    def said(path, call):
        return calls.complaint(f"/gradio_api/{path}", json.dumps(call).encode())

    assert said("call/generate", {"data": ["Hello", 1, "", 3, 0, 1, 0, 0, True]}) is None
    assert said("call/generate", {"data": ["Hello", 0.5, *[None] * 7]}) is None
    assert said("call/v2/generate", {"prompt": "Hello", "p": 0, "oauth_token": "x"}) is None
    assert said("call/v2/sweep", {"text": "Hello", "thresholds": [0, 0.5]}) is None
    made = SimpleNamespace(blocks_config=SimpleNamespace(fns={10**6: SimpleNamespace(fn=len)}))
    demo.state_holder.session_data["s"] = made
    assert said("queue/join", {"data": ["a"] * 40, "fn_index": 10**6, "session_hash": "s"}) is None
    for session in ("other", None, 5, ["s"]):
        told = said("queue/join", {"data": ["a"], "fn_index": 10**6, "session_hash": session})
        assert told == "There is no endpoint number 1000000."
    for sort, value in (
        ("Dropdown", "owner/name"), ("Slider", 1), ("Slider", 0.5), ("Checkbox", False), ("Number", 7),
        ("UploadButton", uploaded(f"{get_upload_folder()}/a.json")),
    ):
        for number, fn in demo.fns.items():
            if fn.fn is None:  # done in the browser
                continue
            data = [value if type(block).__name__ == sort else None for block in fn.inputs]
            assert said("queue/join", {"data": data, "fn_index": number, "session_hash": "s"}) is None


def test_texts_are_bounded_wherever_they_are(service):
    """Before Gradio keeps them for a session."""
    calls = Calls(ui.build(service), 1000)
    for number in (0, 10**6):
        for value in ("a" * 1001, [{"a": ["b" * 1001]}]):
            call = {"data": [value], "fn_index": number, "session_hash": "s"}
            said = calls.complaint("/gradio_api/queue/join", json.dumps(call).encode())
            assert said == "A text of 1,001 characters came; at most 1,000 are read. Shorten it."


@pytest.mark.parametrize(
    "path", ["process_recording", "deep_link", "run-history/list", "process_recording/", "component_server"]
)
def test_what_nobody_needs_is_closed(address, path):
    """Of Gradio's own."""
    for method in ("GET", "POST"):
        assert httpx.request(method, f"{address}/gradio_api/{path}", timeout=20).status_code == 404


def uploaded(path: str) -> dict:
    """A file as a page names it."""
    return {"path": path, "orig_name": "a.json", "meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize("path", [
    "http://127.0.0.1:9/bomb", "https://example.com/x.json", "HTTP://x", "/etc/passwd", "", "a\0b", "x" * 5000,
    f"{get_upload_folder()}/../../etc/passwd", "file:///etc/passwd", 7,
])
def test_a_file_in_a_call_is_one_that_was_uploaded_here(address, demo, path, monkeypatch):
    """At every input that takes one; Gradio would fetch an address, however much comes from there."""
    fetched = []
    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_get", lambda url: fetched.append(url))
    tried = 0
    for number, fn in demo.fns.items():
        for at, block in enumerate(fn.inputs):
            if type(block).__name__ == "UploadButton":
                data = [uploaded(path) if place == at else None for place in range(len(fn.inputs))]
                call = {"data": data, "fn_index": number, "session_hash": "s"}
                answer = httpx.post(f"{address}/gradio_api/queue/join", json=call, timeout=20)
                assert (answer.status_code, "an uploaded file" in answer.text) == (422, True)
                tried += 1
    assert tried >= 2
    call = {"data": [uploaded(path)], "fn_index": 10**6, "session_hash": "s"}  # as of a session's own control
    answer = httpx.post(f"{address}/gradio_api/queue/join", json=call, timeout=20)
    assert (answer.status_code, "none is taken" in answer.text) == (422, True)
    assert not fetched


def test_values_of_a_wrong_type_are_told_so_and_leave_no_text_in_the_log(address, demo, capfd):
    """At every input of the page that takes one sort of value; Gradio would write them there."""
    sorts, tried = ("Slider", "Number", "Checkbox", "Radio", "Dropdown", "UploadButton"), Counter()
    with httpx.Client(base_url=address, timeout=20) as client:
        for number, fn in demo.fns.items():
            for at, block in enumerate(fn.inputs if fn.fn else ()):  # the others run in the browser
                if type(block).__name__ not in sorts:
                    continue
                for value in (["a secret text"], {"a": "a secret text"}, "a secret text" * 999):
                    data = [value if place == at else None for place in range(len(fn.inputs))]
                    call = {"data": data, "fn_index": number, "session_hash": "s"}
                    answer = client.post("/gradio_api/run/predict", json=call)
                    assert answer.status_code == 422
                    assert f"value {at + 1} has to be" in answer.text
                    assert "secret" not in answer.text
                    tried[type(block).__name__] += 1
    assert set(tried) == set(sorts)
    assert "secret" not in "".join(capfd.readouterr())


def test_who_leaves_while_gradio_hands_out_work_stops_nobody(service):
    """A session whose messages are gone and whose request is still in line, as when a visitor leaves just then."""
    demo = ui.build(service)
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True)
    queue = demo._queue
    try:
        with httpx.Client(base_url=url, timeout=20) as client:
            queue.active_jobs[:] = [[] for _ in queue.active_jobs]  # nothing is handed out for now
            left = [client.post("/gradio_api/call/generate", json={"data": plain("Bye")}).json() for _ in range(3)]
            for one in left:
                queue.pending_messages_per_session.pop(one["event_id"])
            queue.active_jobs[:] = [None for _ in queue.active_jobs]
            made = client.post("/gradio_api/call/generate", json={"data": plain("Hello")})
            assert '"new_tokens": 3' in client.get(f"/gradio_api/call/generate/{made.json()['event_id']}").text
        assert not queue.stopped
    finally:
        demo.close(verbose=False)


def test_uploads_do_not_fill_the_disk(address, service, monkeypatch, tmp_path):
    """What is kept is bounded, whoever sends it."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    assert httpx.post(f"{address}/gradio_api/upload", files={"files": ("a.txt", b"x" * 1000)}).status_code == 200
    (tmp_path / "small").write_text("x")
    (tmp_path / "large").write_text("x" * 10_000)
    assert Uploads(tmp_path, 0).kept() == 8192 + 10_000
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(50 * service.limits.file_bytes)
    guard, said = Guard(None, service), []  # the one that serves was made before the folder

    async def note(message):
        said.append(message)

    scope = {"type": "http", "path": "/gradio_api/upload", "method": "POST", "headers": [(b"content-length", b"1000")]}
    asyncio.run(guard(scope, None, note))
    assert said[0]["status"] == 507
    assert b"no room for uploads" in said[1]["body"]


def test_uploads_under_way_count_and_many_small_files_do(tmp_path):
    """Room is taken before a file is there, and given back; a tiny file takes a block of the disk."""
    async def tries():
        room = Uploads(tmp_path, 30_000_000)
        async with room.room(20_000_000) as first, room.room(9_000_000) as second, room.room(2_000_000) as third:
            assert (first, second, third) == (True, True, False)
        async with room.room(20_000_000) as again:
            assert again
        async with Uploads(tmp_path, 8_000_000).room(100_000) as crowd:  # up to a thousand files
            assert not crowd

    asyncio.run(tries())


def test_folders_that_uploads_left_empty_go(tmp_path):
    """Once they are not fresh; so do files of uploads that broke off. What has a file stays, and what others made."""
    old, new, full, others = ("a" * 64, "b" * 64, "c" * 64, "others")
    for name in (old, new, full, others):
        (tmp_path / name).mkdir()
    (tmp_path / full / "a").write_text("x")
    (tmp_path / "tmp1234").write_text("broken off")
    (tmp_path / "kept").write_text("not Gradio's")
    for name in (old, full, others, "tmp1234", "kept"):
        os.utime(tmp_path / name, (1, 1))
    assert Uploads(tmp_path, 0).kept() == 2 * 8192
    assert {path.name for path in tmp_path.iterdir()} == {new, full, others, "kept"}


def test_no_link_of_gradios_writes_a_page_to_the_disk(address):
    """It would stay there for good."""
    assert httpx.get(f"{address}/gradio_api/deep_link?session_hash=s").status_code == 404


def test_pages_fetch_nothing_from_elsewhere(address):
    """Every answer says so to the browser."""
    for path in ("/", "/config", "/health"):
        policy = httpx.get(f"{address}{path}").headers["content-security-policy"]
        assert "img-src 'self' data: blob:" in policy


def test_ten_million_characters_are_refused_cheaply(address, service, monkeypatch):
    """Over HTTP before they are read; by the service before its tokenizer sees them."""
    text = "ten million " * 834_000
    monkeypatch.setattr(service.open("tiny"), "tokenizer", None)
    for wanted in (Request(text, "tiny", 3), Request(text, "tiny", 3, chat=False)):
        with pytest.raises(UserError, match=r"10,008,000 characters"):
            list(service.run("a", 0.5, wanted))
    with pytest.raises(UserError, match=r"at most 400,000 characters"):
        list(service.lab.sweep("tiny", None, text, [0.5], 0.02))
    assert httpx.post(f"{address}/gradio_api/call/generate", json={"data": plain(text)}, timeout=60).status_code == 413


def test_what_is_too_long_is_refused_unread(address, service):
    """By its told length, and by what comes where none is told."""
    with httpx.Client(base_url=address, timeout=60) as client:
        told = client.post("/gradio_api/queue/join", content=b"x" * (service.limits.body_bytes + 1))
        assert (told.status_code, "8,000,000 bytes" in told.text) == (413, True)
        pieces = (b"x" * 1_000_000 for _ in range(9))
        untold = client.post("/gradio_api/queue/join", content=pieces, headers={"content-type": "application/json"})
        assert untold.status_code == 413
        long = client.post("/gradio_api/call/generate", json={"data": plain("x" * 1_000_000)})
        answer = client.get(f"/gradio_api/call/generate/{long.json()['event_id']}").text
        assert "1,000,000 characters; at most 200,000" in answer
        assert client.post("/gradio_api/upload", files={"files": ("a", b"x" * 22_000_000)}).status_code == 413
