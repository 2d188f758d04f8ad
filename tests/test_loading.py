"""Folders: saved, loaded by this project and by the stock Auto classes, and refused with a sentence."""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from builders import ALL, assert_close, dense_model, mod_model, routers, save_folder, tiny_tokenizer, tokens
from transformers import AutoConfig, AutoModelForCausalLM
from warm import Forked, python

from modification import LoadError, MoDConfig, MoDModel, chat, load, restore
from modification.chat import written
from modification.loading import load_dense_or_mod, resolve

every_family = pytest.mark.parametrize("variant", ALL)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A saved tiny MoD model with its tokenizer."""
    return save_folder(mod_model("llama"), tmp_path / "mod")


def edit_config(folder: Path, **changes) -> None:
    """Change or (None) remove fields of a folder's config.json."""
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


# What is saved is what is loaded


@every_family
@pytest.mark.parametrize("gate", ["straight_through", "paper"])
def test_a_saved_model_loads_the_same(variant, gate, tmp_path):
    """Through the stock Auto class: same class, settings, weights and logits."""
    config = MoDConfig(p=0.4, layers=[1, 3], gate=gate, anchors=2, kv="keep")
    model = mod_model(variant, config)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    assert again.mod_config == config
    weights = model.state_dict()
    assert list(again.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())
    for p in (None, 0.0, 0.6):
        assert_close(again(tokens(2), p=p).logits, model(tokens(2), p=p).logits)


@every_family
def test_a_loaded_model_restores_to_the_dense_parent(variant, tmp_path):
    """Saving and loading loses nothing of it; saved again it is a stock folder."""
    mod_model(variant).save_pretrained(tmp_path / "mod")
    again = restore(AutoModelForCausalLM.from_pretrained(tmp_path / "mod").eval())
    dense = dense_model(variant)
    assert type(again) is type(dense)
    assert_close(again(tokens(2)).logits, dense(tokens(2)).logits)
    again.save_pretrained(tmp_path / "dense")
    values = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert values["model_type"] == dense.config.model_type
    assert values["architectures"] == [type(dense).__name__]
    assert "mod" not in values


def test_load_gives_a_model_ready_to_run_and_its_tokenizer(folder):
    """In eval mode, as saved."""
    model, tokenizer = load(folder)
    assert isinstance(model, MoDModel)
    assert not model.training
    assert tokenizer("Hi")["input_ids"] == [40, 73]
    assert tokenizer.decode([40, 73]) == "Hi"
    assert_close(model(tokens(2)).logits, mod_model("llama")(tokens(2)).logits)


@every_family
def test_a_dense_folder_is_converted_on_loading(variant, tmp_path):
    """With default settings; at p = 0 it is the dense model."""
    dense = dense_model(variant)
    model, _ = load(save_folder(dense, tmp_path))
    assert isinstance(model, MoDModel)
    assert model.mod_config == MoDConfig()
    assert_close(model(tokens(2), p=0.0).logits, dense(tokens(2)).logits)


def test_a_dense_folder_may_stay_dense(tmp_path):
    """load_dense_or_mod converts nothing."""
    model, _ = load_dense_or_mod(save_folder(dense_model("llama"), tmp_path))
    assert type(model).__name__ == "LlamaForCausalLM"


def test_the_auto_class_needs_the_import_and_no_remote_code(folder, tmp_path):
    """In a fresh process: ``import modification`` is enough, and the folder holds no code."""
    values = json.loads((folder / "config.json").read_text())
    assert "auto_map" not in values
    assert not list(folder.glob("*.py"))
    script = (
        "import sys; assert 'modification' not in sys.modules; import modification; "
        "from transformers import AutoModelForCausalLM as A; "
        "m = A.from_pretrained(sys.argv[1], trust_remote_code=False); print(type(m).__name__, m.mod_config.p)"
    )
    printed, errors = Forked(python, script, str(folder)).end()
    assert printed.split() == ["MoDLlamaForCausalLM", "0.5"], errors


def test_the_auto_config_knows_the_model_type(folder):
    """A config of the family's class, under its own type, with the settings."""
    config = AutoConfig.from_pretrained(folder)
    assert config.model_type == "mod_llama"
    assert MoDConfig.from_dict(config.mod) == MoDConfig()


def test_a_chosen_dtype_leaves_routers_in_full_precision(folder):
    """bf16 weights, fp32 routers with their exact values."""
    model, _ = load(folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    for ours, saved in zip(routers(model), routers(mod_model("llama")), strict=True):
        assert ours.weight.dtype == torch.float32
        assert torch.equal(ours.weight, saved.weight)


def test_a_bf16_model_is_saved_and_loaded_as_such(tmp_path):
    """The dtypes of the files are kept, routers apart; loaded twice, it gives the same bits."""
    model = mod_model("llama", dtype=torch.bfloat16)
    again, _ = load(save_folder(model, tmp_path))
    assert again.dtype == torch.bfloat16
    assert all(router.weight.dtype == torch.float32 for router in routers(again))
    assert_close(again(tokens(1), p=0.0).logits, model(tokens(1), p=0.0).logits)
    assert torch.equal(load(tmp_path)[0](tokens(1)).logits, again(tokens(1)).logits)


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_a_device_map_is_accepted(folder, device_map, tmp_path):
    """As in transformers; for a dense folder too, where one device holds it all."""
    model, _ = load(folder, device_map=device_map)
    assert_close(model(tokens(2).to(model.device)).logits.cpu(), mod_model("llama")(tokens(2)).logits)
    dense, _ = load(save_folder(dense_model("llama"), tmp_path / "dense"), device_map=device_map)
    assert isinstance(dense, MoDModel)


def test_tied_embeddings_stay_tied(tmp_path):
    """Saved once, loaded as one."""
    model = mod_model("llama", tie_word_embeddings=True)
    model.tie_weights()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert_close(again(tokens(2)).logits, model(tokens(2)).logits)


def test_real_weights_load_and_survive_a_round_trip(stories_folder, tmp_path):
    """stories260K: loaded, converted, saved, loaded, with its tokenizer."""
    model, tokenizer = load(stories_folder)
    assert isinstance(model, MoDModel)
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, other = load(tmp_path)
    assert other("Once upon a time")["input_ids"] == ids[0].tolist()
    assert_close(again(ids).logits, model(ids).logits)


# What can't be loaded is refused with a sentence


def refused(source, match, **options):
    """LoadError, one sentence on one line."""
    with pytest.raises(LoadError, match=match) as caught:
        load(source, **options)
    assert "\n" not in str(caught.value)
    assert str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "no such thing", "./missing", "/missing/folder", "~missing", "https://example.org/x/y", "a/b/c",
             "../secret", "name", "owner/", "owner/na me", "-x/y"],
)
def test_a_source_that_is_neither_folder_nor_hub_id_is_refused(text):
    """Before any network or file is touched."""
    refused(text, r"neither a folder here nor a Hub id|not a model folder")


def test_a_hub_id_is_passed_on():
    """By its form alone; a folder of that name wins."""
    assert resolve("owner/name-1.0_x") == "owner/name-1.0_x"


def test_a_hub_model_that_can_t_be_reached_is_refused():
    """The message names it."""
    refused("nobody/nothing-here", "nobody/nothing-here .* not among the models kept on this machine")


def test_a_folder_without_a_config_is_refused(tmp_path):
    """It is no model folder."""
    refused(tmp_path, r"has no config\.json")


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '"llama"', "{}", '{"model_type": 3}'])
def test_a_damaged_config_is_refused(folder, text):
    """Not JSON, or no model type in it."""
    (folder / "config.json").write_text(text)
    refused(folder, r"not valid JSON|names no model_type|is a JSON (list|str|NoneType)")


def test_a_binary_config_is_refused(folder):
    """Bytes that are no text."""
    (folder / "config.json").write_bytes(b"\xff\xfe\x00\x80")
    refused(folder, "not valid JSON")


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("t5", "no causal language model"), ("mod_", "no causal language model"), ("", "no causal language model"),
        ("mod_gemma", "structure must be saved"), ("bert", "lacks .* of the model's weights"),
    ],
)
def test_another_kind_of_model_is_refused(folder, model_type, message):
    """By its type, or by what its files lack."""
    edit_config(folder, model_type=model_type)
    refused(folder, message)


def test_a_folder_without_safetensors_is_refused(folder):
    """Pickled weights are not read."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "no .safetensors weights")


@pytest.mark.parametrize(
    "mod", [None, [], {"p": 2.0}, {"gate": "soft"}, {"layers": []}, {"layers": [99]}, {"unknown": 1}, {"anchors": -1}]
)
def test_damaged_mod_settings_are_refused(folder, mod):
    """Each with the config's own sentence."""
    edit_config(folder, mod=mod)
    refused(folder, r"MoD settings|p=2\.0|gate='soft'|layers=|anchors=-1")


def test_damaged_weights_are_refused(folder):
    """A truncated safetensors file."""
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    refused(folder, r"model.safetensors is damaged: it has 100 bytes, fewer than its header takes")
    path.write_bytes(whole[:-100])
    refused(folder, r"model.safetensors is cut off or damaged: its header tells of [\d,]+ bytes of weights")


def test_weights_of_another_shape_are_refused(folder):
    """Config and weights that don't fit each other."""
    edit_config(folder, intermediate_size=64)
    refused(folder, r"other shapes than its config says; .* is \[32, 48\] in the files and would be \[32, 64\]")


@pytest.mark.parametrize("changes", [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"hidden_act": "no such"}])
def test_a_config_that_builds_no_model_is_refused(folder, changes):
    """Values that transformers itself can't use."""
    edit_config(folder, **changes)
    refused(folder, "could not be loaded|does not describe a model|must be 1 or more")


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"max_position_embeddings": -3}, "max_position_embeddings = -3: it must be 1 or more"),
    ({"attn_implementation": "evil/kernel"}, "kernels are not fetched"),
    ({"_attn_implementation": "evil/kernel@main"}, "kernels are not fetched"),
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "can't run|could not be loaded"),
])
def test_a_config_that_would_mislead_is_refused(folder, changes, sentence):
    """Values that load, and then break a run or fetch code."""
    edit_config(folder, **changes)
    refused(folder, sentence)


def test_a_word_that_the_model_has_no_weights_for_is_refused(folder):
    """A token that ordinary text would be split into."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    word = {"id": 5000, "content": "cat", "single_word": False, "lstrip": False, "rstrip": False, "normalized": True,
            "special": False}
    path.write_text(json.dumps({**tokenizer, "added_tokens": [*tokenizer["added_tokens"], word]}))
    refused(folder, r"the tokenizer has [\d,]+ tokens and the model 97")


def test_a_missing_tokenizer_is_refused(tmp_path):
    """Weights alone can't speak."""
    mod_model("llama").save_pretrained(tmp_path)
    refused(tmp_path, "its tokenizer can't be read")


def test_a_damaged_tokenizer_is_refused(folder):
    """Half a tokenizer.json."""
    path = folder / "tokenizer.json"
    path.write_text(path.read_text()[:200])
    refused(folder, "its tokenizer can't be read")


def test_an_unknown_quantization_is_refused(folder):
    """The message names the two that exist."""
    refused(folder, r"quantization='2bit'.*'4bit', '8bit'", quantization="2bit")


# Chat templates


@pytest.mark.parametrize(
    "template",
    ["{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ nothing.at.all }}",
     "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "{{ raise_exception('no') }}", "{{ 9 ** 9 ** 9 }}",
     "{{ 3**20000 > 0 }}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
     "{{ 'a' * 999_999_999 }}", "{{ 0x7fffffff*'a' }}", "{{ 'a' * 9999 * 9999 * 9999 }}",
     "{% set n = namespace(v=9) %}{{ n.v*n.v*n.v*n.v*n.v*n.v }}"],
)
def test_a_template_that_fails_or_never_ends_is_told(template):
    """In a sentence, and what else traces the thread goes on."""
    tokenizer, before = tiny_tokenizer(), sys.gettrace()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="the model's chat template fails: "):
        written(tokenizer, [{"role": "user", "content": "Hi"}], seconds=0.3)
    assert sys.gettrace() is before


def test_a_template_that_takes_all_memory_is_ended(monkeypatch):
    """By what the process has grown meanwhile."""
    tokenizer, seen = tiny_tokenizer(), itertools.count()
    tokenizer.chat_template = "{% for a in range(9999) %}{{ a ~ 'b' }}{% endfor %}"
    monkeypatch.setattr(chat, "_resident", lambda: next(seen) * chat._GROWTH)
    with pytest.raises(ValueError, match=r"it takes more than 1\.1 GB of memory"):
        written(tokenizer, [{"role": "user", "content": "Hi"}])


def test_waiting_for_its_turn_is_not_held_against_a_template(monkeypatch):
    """On a busy machine a thread may stand still for long."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    real = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **more: time.sleep(0.4) or real(*a, **more))
    assert written(tokenizer, [{"role": "user", "content": "Hi"}], seconds=0.2) == "[Hi]"


def test_a_chat_is_written_as_its_template_says():
    """Or as its texts alone."""
    tokenizer, messages = tiny_tokenizer(), [{"role": "user", "content": text} for text in ("a", "b")]
    assert written(tokenizer, messages) == "a\n\nb"
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}{{ '>' * add_generation_prompt }}"
    assert written(tokenizer, messages) == "[a][b]>"
    tokenizer.chat_template = "**Rules** * 99999 {{ '-' * 9 }}{{ 2 * (1 + messages | length) }}"
    assert written(tokenizer, messages) == "**Rules** * 99999 ---------6"
