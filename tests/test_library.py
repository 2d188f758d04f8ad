"""Models in memory: named, weighed, loaded once, let go."""

import contextlib
import shutil
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from talkers import talker

from app.errors import UserError
from app.service import Limits, Service
from app.service import library as library_module
from app.service.choice import Options, parse
from app.service.conversions import Plan
from app.service.library import Library
from modification.errors import LoadError
from modification.loading import HUB_ID


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return talker(tmp_path_factory.mktemp("model"))


@pytest.fixture
def library(folder):
    return Library({"tiny": folder}, Limits(models=2, idle=10.0))


WAYS = [Options(), Options("bf16"), Options("fp32", "4bit", "cpu"), Options(device="cuda")]


@pytest.mark.parametrize("options", WAYS)
def test_a_label_reads_back_as_source_and_options(options):
    assert parse(options.label("owner/name")) == ("owner/name", options)


@pytest.mark.parametrize("choice", ["x [int9]", "x [bf16, gpu]", "x [bf16; rm]"])
def test_an_unknown_option_is_a_sentence_or_part_of_the_name(library, choice):
    with pytest.raises(UserError):
        library.open(choice)


def test_options_are_kept_apart(library):
    """The same folder twice, in two types."""
    import torch

    assert library.open("tiny [bf16]").model.dtype == torch.bfloat16
    assert library.open("tiny").model.dtype == torch.float32
    assert library.open("tiny [bf16]").name == "tiny [bf16]"


def test_many_who_ask_at_once_share_one_load(library, monkeypatch):
    loads, load = [], library_module.load_dense_or_mod
    monkeypatch.setattr(library_module, "load_dense_or_mod", lambda *a, **o: loads.append(a) or load(*a, **o))
    found = []
    threads = [threading.Thread(target=lambda: found.append(library.open("tiny"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1
    assert len(found) == 8
    assert all(one is found[0] for one in found)


def test_only_folders_that_are_allowed_are_opened(folder, tmp_path):
    """By no name, dots or link; what is listed, and the Hub, are not concerned."""
    inside, outside = tmp_path / "models", tmp_path / "private"
    shutil.copytree(folder, inside / "fine")
    shutil.copytree(folder, outside)
    (inside / "linked").symlink_to(outside)
    shutil.copytree(folder, inside / "half")
    (inside / "half" / "model.safetensors").unlink()
    (inside / "half" / "model.safetensors").symlink_to(outside / "model.safetensors")
    shutil.copytree(folder, inside / "nested")  # a link within what a link leads to
    (inside / "store").mkdir()
    (inside / "nested" / "adapter").symlink_to(inside / "store")
    (inside / "store" / "adapter_model.safetensors").symlink_to(outside / "model.safetensors")
    (inside / "store" / "round").symlink_to(inside / "store")
    library = Library({"listed": outside}, Limits(folders=(inside,)))
    assert library.open(str(inside / "fine"))
    assert library.open("listed")
    linked = [inside / name for name in ("linked", "half", "nested")]
    for name in (outside, inside / ".." / "private", *linked, "/", "~", "~nobody/x", "a\0b"):
        with pytest.raises(UserError, match=r"not among the folders|no path"):
            library.open(str(name))
    service = Service({}, limits=Limits(folders=(inside,)))
    with pytest.raises(UserError, match="not among the folders"):
        service.lab.estimate(str(outside), 10, 1, 0.5, "bf16", "own", "h200")
    with pytest.raises(UserError, match="reads from"):
        list(service.convert(Plan(str(inside / "fine"), "new", "/etc/passwd")))


@pytest.fixture(scope="module")
def walled(folder, tmp_path_factory):
    """A library that opens folders within one alone, where that is, and what it read of them or asked the Hub for."""
    root = tmp_path_factory.mktemp("walled")
    shutil.copytree(folder, root / "models" / "fine")
    shutil.copytree(folder, root / "private")
    (root / "models" / "linked").symlink_to(root / "private")
    return Library({}, Limits(folders=(root / "models",), idle=0.0)), root


PARTS = st.sampled_from([
    "models", "private", "fine", "linked", "..", ".", "", "~", "\0", " ", "fine [bf16]", "[cpu]", "%2e%2e", "..\\",
    "a\nb", "file:", "hf:", "config.json", "model.safetensors", "\ud800", "x" * 300,
]) | st.text(max_size=6)


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(start=st.sampled_from(["ROOT/", "ROOT/models/", "", "/", "../", "http://127.0.0.1:9/"]),
       parts=st.lists(PARTS, max_size=5))
def test_any_name_opens_what_is_allowed_or_is_a_sentence(walled, start, parts):
    """An open loader behind a wall: a model from within, or a UserError; the Hub is away."""
    library, root = walled
    name = (start + "/".join(parts)).replace("ROOT", str(root))
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library_module, "on_disk", lambda source, progress=None: asked.append(source) or _there(source))
        with contextlib.suppress(UserError):
            library.open(name)
        library.unload_idle(time.monotonic() + 1)
    for source in asked:
        place = Path(source).expanduser().resolve()
        assert place.is_relative_to(root / "models") or (HUB_ID.fullmatch(source) and not place.exists()), source


def _there(source):
    """The folder, and no Hub."""
    if not Path(source).is_dir():
        raise LoadError(f"{source} is not here")
    return source


@pytest.mark.parametrize("name", ["tiny [ ] [ ]", "tiny [cpu] [bf16]", "tiny [bf16] []", "tiny [ ]"])
def test_a_name_reads_back_as_itself_or_is_refused(library, name):
    """Otherwise it would be looked up under one key and loaded under another, for ever."""
    try:
        key = library.check(name)
    except UserError:
        return
    assert library.check(key) == key


def test_who_stops_waiting_leaves_the_load_to_the_next(library, monkeypatch):
    gate, load = threading.Event(), library_module.load_dense_or_mod
    monkeypatch.setattr(library_module, "load_dense_or_mod", lambda *a, **o: gate.wait() and load(*a, **o))
    waiting = library.loading("tiny")
    assert next(waiting).seconds >= 0
    waiting.close()
    gate.set()
    end = time.monotonic() + 30
    while "tiny" not in library.held():
        assert time.monotonic() < end
        time.sleep(0.02)
    assert list(library.loading("tiny")) == []


def test_a_model_that_cannot_fit_is_refused_before_it_is_read(library, monkeypatch):
    monkeypatch.setattr(library_module, "available_bytes", lambda device=None: 1000)
    monkeypatch.setattr(library_module, "load_dense_or_mod", lambda *a, **o: pytest.fail("was read"))
    with pytest.raises(UserError, match="are free: choose a smaller model"):
        library.open("tiny")


def test_needs_are_the_weights_in_the_type_asked_for(library, folder):
    import torch
    from safetensors.torch import load_file

    stored = sum(t.numel() * t.element_size() for t in load_file(folder / "model.safetensors").values())
    whole, free = library.needs("tiny")
    assert whole == int(1.2 * stored)
    assert library.needs("tiny [bf16]")[0] == int(1.2 * stored / 2)
    assert library.needs("tiny [4bit]")[0] < library.needs("tiny [8bit]")[0] < whole
    assert free > 0
    assert torch.float32.itemsize == 4


def test_a_model_nobody_uses_is_let_go_and_one_in_use_is_not(library):
    with library.lend("tiny"):
        assert library.unload_idle(time.monotonic() + 100) == []
        assert library.held() == ["tiny"]
    assert library.unload_idle(time.monotonic() + 5) == []
    assert library.unload_idle(time.monotonic() + 100) == ["tiny"]
    assert library.held() == []


def test_a_model_in_use_is_not_pushed_out(folder):
    library = Library({"a": folder, "b": folder, "c": folder}, Limits(models=2))
    with library.lend("a") as kept:
        library.open("b")
        library.open("c")
        assert library.open("a") is kept


def test_no_more_models_are_held_than_may_be(folder):
    """Where all are in use, the next one waits for its user to come again."""
    library = Library(dict.fromkeys("abc", folder), Limits(models=2))
    with library.lend("a"), library.lend("b"):
        with pytest.raises(UserError, match=r"2 models are in use here, as many as are held at a time"):
            library.open("c")
        assert library.held() == ["a", "b"]
    assert library.open("c").name == "c"
    assert len(library.held()) == 2


def test_loading_leaves_keys_and_values_their_memory(library, monkeypatch):
    """What runs were promised is not taken for weights."""
    taken, _ = library.needs("tiny")
    monkeypatch.setattr("app.service.library.available_bytes", lambda device: 8 * taken)
    kept = Library(library.listed, Limits(cache_bytes=taken))
    assert kept.needs("tiny") == (taken, 7 * taken)
    assert Library(library.listed, Limits(cache_bytes=100 * taken)).needs("tiny") == (taken, 6 * taken)


def test_a_listed_models_folder_is_nobodys_business(folder, tmp_path):
    """Errors call it by its name."""
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": "no"}')
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    service = Service({"mine": tmp_path}, limits=Limits(free_models=False))
    for ask in (
        lambda: service.open("mine"), lambda: service.library.needs("mine"),
        lambda: service.lab.estimate("mine", 10, 1, 0.5, "bf16", "own", "h200"),
    ):
        with pytest.raises(UserError) as told:
            ask()
        assert str(tmp_path) not in str(told.value)


def test_a_shared_app_opens_listed_models_alone(folder, tmp_path):
    service = Service({"tiny": folder}, limits=Limits(free_models=False, convert=False))
    assert service.open("tiny").name == "tiny"
    for name in (str(folder), "owner/name", str(tmp_path)):
        with pytest.raises(UserError, match="not among the models offered"):
            service.open(name)
    with pytest.raises(UserError, match="not among the shapes"):
        service.lab.estimate(str(folder), 10, 1, 0.5, "bf16", "own", "h200")


def test_mod_layers_are_known_without_loading(library):
    assert library.mod_layers("tiny") == (1, 2)
    assert library.held() == []
    assert library.mod_layers("owner/name") == ()
    assert library.mod_layers("") == ()
