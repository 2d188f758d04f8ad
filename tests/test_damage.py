"""Damaged and hostile model folders: each is refused with a sentence or loads whole; nothing hangs, nothing runs."""

from __future__ import annotations

import json
import pickle
import shutil
import signal
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import mod_model, tiny_tokenizer, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from app.errors import UserError
from app.service import Limits, Request, Service, sentence_of
from modification import generate, load
from modification.errors import LoadError
from modification.integrity import check_loaded
from modification.measure.estimate import estimate
from modification.measure.onpaper import config_of

SECONDS = 20  # for one folder
LAYERS = 3  # the fewer, the sooner a thousand are loaded


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A MoD model folder with nothing wrong, and its tensors."""
    folder = tmp_path_factory.mktemp("whole")
    mod_model("llama", num_hidden_layers=LAYERS).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder, load_file(folder / "model.safetensors")


@pytest.fixture
def folder(whole, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(whole[0], tmp_path / "model"))


def attempt(folder: Path) -> str:
    """Load and say a few tokens: "loaded", or the sentence of the refusal. Anything else is a failure."""
    def late(*_):
        raise AssertionError(f"{folder} took more than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, tokenizer = load(folder)
        assert not any(weight.is_meta for weight in model.parameters()), "half loaded"
        assert tokenizer is not None
        steps = list(generate(model, tokens(1, 4)[0], p=0.5, max_new_tokens=2, stop=()))
        assert len(steps) == 3
        return "loaded"
    except LoadError as error:
        sentence = str(error)
        assert "\n" not in sentence
        return sentence
    except (ValueError, FloatingPointError) as error:  # a context too short for the prompt, say
        if not any(word in str(error) for word in ("context", "token", "not a number")):
            raise
        return "loaded"
    finally:
        signal.alarm(0)


def tamper(folder: Path, change) -> None:
    """Rewrite the weights as ``change`` makes them."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit(path: Path, change) -> None:
    """Rewrite a JSON file."""
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value) or value))


def fill(name, value):
    """A change of one number in one tensor."""
    def change(tensors):
        tensors[name].view(-1)[3] = value

    return change


LAYER = "model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize(("change", "sentence"), [
    (fill(LAYER, float("nan")), r"up_proj.weight holds numbers that are none \(NaN or infinite\)"),
    (fill(LAYER, float("inf")), r"up_proj.weight holds numbers that are none"),
    (lambda tensors: tensors.pop(LAYER), r"lacks 1 of the model's weights, .*up_proj.weight"),
    (lambda tensors: tensors.update({LAYER: tensors[LAYER][:, :-1].contiguous()}), r"have other shapes"),
    (lambda tensors: tensors.pop("model.layers.1.router.weight"), r"lacks 1 of .*router.weight"),
])
def test_each_damage_of_the_weights_has_its_sentence(folder, change, sentence):
    tamper(folder, change)
    with pytest.raises(LoadError, match=sentence):
        load(folder)


def test_weights_that_stay_on_the_disk_are_looked_at_too(folder, tmp_path):
    """Where memory is short, accelerate leaves layers there; a whole model passes."""
    places = {f"model.layers.{at}": "disk" if at == 2 else "cpu" for at in range(LAYERS)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")

    def spread():
        return AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "disk")

    assert any(weight.is_meta for weight in spread().parameters())
    check_loaded("whole", spread(), tiny_tokenizer())
    tamper(folder, fill(LAYER, float("nan")))
    with pytest.raises(LoadError, match=r"up_proj.weight holds numbers that are none"):
        check_loaded("damaged", spread(), tiny_tokenizer())


def test_a_router_that_is_no_number_runs_its_layer_and_is_noted_once(folder, caplog):
    """A broken router must not lose tokens."""
    tamper(folder, fill("model.layers.1.router.weight", float("nan")))
    with caplog.at_level("WARNING"):
        model, _ = load(folder)
        steps = list(generate(model, tokens(1, 12)[0], p=0.99, max_new_tokens=3))
    assert all(step.routed[0].all() for step in steps)
    assert sum("router" in record.message for record in caplog.records) == 1


def header(folder: Path, tensors: str) -> None:
    """A weight file with a header of one's own and nothing after it."""
    (folder / "model.safetensors").write_bytes(len(tensors).to_bytes(8, "little") + tensors.encode())


@pytest.mark.parametrize("shape", [
    "[[0], 50000000]", "[" + "9" * 4000 + ", " + "9" * 4000 + "]", "[" + "1," * 1000 + "1]", "[-1, -1]", "[true]",
    '"ab"', "[1e3]", "{}",
])
def test_a_header_that_would_cost_memory_or_time_is_refused_at_once(folder, shape):
    """Nothing of it is multiplied before it is known to be a few whole numbers."""
    header(folder, f'{{"a": {{"dtype": "F32", "shape": {shape}, "data_offsets": [0, 0]}}}}')
    before = time.monotonic()
    with pytest.raises(LoadError, match="is not told of in full"):
        load(folder)
    assert time.monotonic() - before < 2


def test_a_config_that_asks_for_much_more_than_the_files_hold_is_refused(folder):
    """Before memory is taken for it."""
    edit(folder / "config.json", lambda config: config.update(vocab_size=8_000_000))
    with pytest.raises(LoadError, match=r"describes a model of 512,[\d,]+ weights, and the files hold"):
        load(folder)


@pytest.mark.parametrize(("said", "sentence"), [
    ({"configuration_files": ["config.1.0.json"]}, "names other configs to be read in its place"),
    ({"attn_implementation": "owner/kernel"}, "kernels are not fetched"),
    ({"sliding_window": -1}, "sliding_window = -1"),
    ({"_attn_implementation": {"text_config": "owner/kernel"}}, "kernels are not fetched"),
    ({"experts_implementation": ["owner/kernel"]}, "kernels are not fetched"),
])
def test_a_config_that_leads_elsewhere_is_refused(folder, said, sentence):
    """Another file would be read after this one was checked."""
    (folder / "config.1.0.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 123_456_789}))
    edit(folder / "config.json", lambda config: config.update(said))
    before = time.monotonic()
    for reads in (load, lambda source: config_of(str(source))):
        with pytest.raises(ValueError, match=sentence):
            reads(folder)
    assert time.monotonic() - before < 2


@pytest.mark.parametrize("said", [
    {"n_layers": 10**9}, {"decoder_layers": 10**9}, {"text_config": {"num_hidden_layers": 10**9}},
    {"num_hidden_layers": "1000000000"}, {"num_hidden_layers": 1e9}, {"num_local_experts": 10**9},
    {"eos_token_id": [[1]]}, {"bos_token_id": "one"},
])
def test_counts_that_no_model_has_are_refused_at_once(folder, said):
    """Wherever they stand, and of whatever type they are."""
    edit(folder / "config.json", lambda config: {**config, **said})
    name = next(iter(said)) if "text_config" not in said else "num_hidden_layers"
    assert f"says {name} = " in attempt(folder)


@pytest.mark.parametrize("change", [
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
    {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}],
                        "pair": [{"Sequence": {"id": "A", "type_id": 0}}], "special_tokens": {}}},
    {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
])
def test_a_tokenizer_that_panics_has_its_sentence(folder, change):
    """Which is no Exception of Python's."""
    edit(folder / "tokenizer.json", lambda tokenizer: {**tokenizer, **change})
    assert "tokenizer" in attempt(folder)


def test_a_shape_of_endless_layers_is_not_estimated(folder):
    """It would be built, layer by layer."""
    edit(folder / "config.json", lambda config: config.update(num_hidden_layers=2_000_000))
    with pytest.raises(ValueError, match=r"1 to 2,048 are estimated"):
        estimate(config_of(str(folder)), context=10)


def test_an_adapter_at_the_top_is_refused(folder):
    """With peft installed transformers would read its files, pickles among them."""
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]}))
    (folder / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(LoadError, match="holds an adapter beside its weights"):
        load(folder)


def test_files_that_are_read_whole_are_bounded(folder):
    for name in ("config.json", "chat_template.jinja"):
        kept = (folder / name).read_bytes() if (folder / name).exists() else b""
        (folder / name).write_bytes(kept + b" " * 5_000_000)
        with pytest.raises(LoadError, match="more than any model's"):
            load(folder)
        (folder / name).write_bytes(kept)


def test_an_index_that_names_files_elsewhere_is_refused(folder):
    """No path outside the folder, by any name."""
    for name in ("../../secret.safetensors", "/etc/passwd", "weights.bin"):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(LoadError, match="no weight file of this folder"):
            load(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "other.safetensors"}}))
    with pytest.raises(LoadError, match=r"lacks other\.safetensors, which its index names"):
        load(folder)


class Bomb:
    """Pickled, it would write a file when read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "tokenizer.pkl", "optimizer.pt", "tokenizer.model"])
def test_no_pickle_is_read_and_no_code_is_run(folder, tmp_path, name):
    """Pickles beside safetensors stay shut; code that a config names is not imported."""
    mark = tmp_path / "ran"
    (folder / name).write_bytes(pickle.dumps(Bomb(mark)))
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    edit(folder / "config.json", lambda config: config.update(
        auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    ))
    edit(folder / "tokenizer_config.json", lambda config: config.update(auto_map={"AutoTokenizer": ["evil.T", None]}))
    attempt(folder)
    assert not mark.exists()


def test_pickles_alone_are_refused(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(LoadError, match=r"no \.safetensors weights"):
        load(folder)
    assert not (tmp_path / "ran").exists()


WORDS = st.sampled_from(["llama", "gpt2", "float16", "../..", "silu", "cpu"])
NUMBERS = st.integers(-3, 3) | st.sampled_from([2**31, 2**63, -(2**40), 10**12, 0.5, 1e300])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=5,
)


def cut(path: Path, share: float) -> None:
    """Keep the beginning of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])


def scratch(path: Path, share: float, seed: int, count: int) -> None:
    """Overwrite a few bytes from a place on."""
    data = bytearray(path.read_bytes())
    start, noise = int(share * (len(data) - 1)), np.random.default_rng(seed).bytes(count)
    data[start : start + count] = noise[: len(data) - start]
    path.write_bytes(data)


def put(value: object, path: list[int], new: object) -> object:
    """The JSON value with one part, found by going down ``path``, replaced."""
    if not path or not isinstance(value, (dict, list)) or not value:
        return new
    keys = sorted(value) if isinstance(value, dict) else list(range(len(value)))
    at = keys[path[0] % len(keys)]
    value[at] = put(value[at], path[1:], new)
    return value


FILES = st.sampled_from([
    "model.safetensors", "config.json", "config.json", "tokenizer.json", "tokenizer_config.json",
    "generation_config.json",
])
SHARE = st.floats(0, 1)
DAMAGE = st.one_of(
    st.tuples(st.just("cut"), FILES, SHARE),
    st.tuples(st.just("scratch"), FILES, SHARE | st.floats(0, 0.05), st.integers(0, 10**6), st.integers(1, 40)),
    st.tuples(st.just("json"), FILES, st.lists(st.integers(0, 40), min_size=1, max_size=3), JSON),
    st.tuples(st.just("remove"), FILES),
    st.tuples(st.just("garbage"), FILES, st.binary(max_size=64)),
)


def damage(folder: Path, how: tuple) -> None:
    """Do one damage to a folder."""
    kind, path, *rest = how[0], folder / how[1], *how[2:]
    if kind == "cut":
        cut(path, *rest)
    elif kind == "scratch":
        scratch(path, *rest)
    elif kind == "remove":
        path.unlink()
    elif kind == "garbage":
        path.write_bytes(*rest)
    elif path.suffix == ".json":
        path.write_text(json.dumps(put(json.loads(path.read_text()), *rest)))
    else:
        cut(path, 0.9)


def for_each_damage(count, whole, tmp_path, check):
    """``check`` so many copies of a whole model's folder, each damaged in another way."""
    @settings(
        max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(how=DAMAGE)
    def each(how):
        copy = tmp_path / "damaged"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole[0], copy)
        damage(copy, how)
        check(copy)

    each()


def test_a_thousand_damaged_folders(whole, tmp_path):
    """Cut, scratched, rewritten, emptied: a sentence or a whole model, and both happen."""
    outcomes = Counter()

    def check(copy):
        outcomes["loaded" if attempt(copy) == "loaded" else "refused"] += 1

    for_each_damage(1000, whole, tmp_path, check)
    assert sum(outcomes.values()) >= 1000
    assert min(outcomes["loaded"], outcomes["refused"]) > 100, outcomes


def test_damaged_folders_in_the_app(whole, tmp_path):
    """A sentence for the page or an answer; whatever came before, the next whole model answers."""
    outcomes = Counter()

    def check(copy):
        service = Service({"damaged": copy, "whole": whole[0]}, limits=Limits(frame=0.0))
        for name in ("damaged", "whole"):
            try:
                *_, last = service.run("one", 0.5, Request("Hello", name, 2, 0.0, chat=False))
                outcomes[name, "answered"] += last.tape.count('"n"') > 0 or name == "damaged"
            except (UserError, FloatingPointError) as error:
                outcomes[name, "refused" if sentence_of(error) else "failed"] += 1
        assert service.desk.turnstile.count() == (0, 0)

    for_each_damage(50, whole, tmp_path, check)
    assert outcomes["whole", "answered"] >= 50
    assert not any(how == "failed" for _, how in outcomes), outcomes
    assert min(outcomes["damaged", "answered"], outcomes["damaged", "refused"]) > 5, outcomes


def test_a_refused_model_leaves_the_random_numbers_alone(folder):
    """Fresh weights were drawn for nothing."""
    tamper(folder, fill(LAYER, float("nan")))
    before = torch.get_rng_state()
    with pytest.raises(LoadError):
        load(folder)
    assert torch.equal(torch.get_rng_state(), before)
