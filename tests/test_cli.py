"""The command line: it does what it says, and on bad input says why in one sentence and returns 2."""

from __future__ import annotations

import json
import lzma
import re
import runpy
import shutil
import sys

import pytest
import torch
from builders import DEPTH, WIDTH, dense_model, mod_model, save_folder, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from modification import MoDModel, generate, load
from modification.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny saved MoD model."""
    return save_folder(mod_model("llama"), tmp_path_factory.mktemp("cli") / "mod")


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A tiny saved dense model."""
    return save_folder(dense_model("llama"), tmp_path_factory.mktemp("cli") / "dense")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A little text."""
    path = tmp_path_factory.mktemp("cli") / "text.txt"
    path.write_text("\n<|endoftext|>\n".join(f"The {word} sat on the mat, and the cat sat on the {word}." for word in (
        "dog", "hen", "fox", "owl", "cow", "bee", "pig", "rat",
    )))
    return path


def refused(capsys, *argv):
    """Exit code 2, and one line that starts with ``error:`` and holds no traceback."""
    assert main([str(part) for part in argv]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in said if line.startswith("error: ")]
    assert len(errors) == 1
    assert said[-1] == errors[0]
    assert not any("Traceback" in line for line in said)
    return errors[0]


def test_generate_prints_the_greedy_text_and_what_was_measured(folder, capsys):
    """The text on stdout, load and bytes on stderr."""
    assert main(["generate", str(folder), "Hello", "--p", "0.4", "--max-new-tokens", "12"]) == 0
    out = capsys.readouterr()
    model, tokenizer = load(folder)
    steps = list(generate(model, tokenizer("Hello")["input_ids"], p=0.4, max_new_tokens=12))
    made = [step.token for step in steps if not step.prefill]
    assert out.out == tokenizer.decode(made, skip_special_tokens=True) + "\n"
    ran = sum(int(step.routed.sum()) for step in steps) / sum(step.routed.size for step in steps)
    assert f"p 0.4, load {ran:.2f} (measured)" in out.err
    assert f"KV {steps[-1].kv_stored:,} bytes (measured), dense parent {steps[-1].kv_dense:,} (estimated)" in out.err


def test_generate_samples_repeatably(folder, capsys):
    """Same seed, same text."""
    texts = []
    for seed in ("3", "3", "4"):
        argv = ["generate", str(folder), "Hello", "--temperature", "1", "--seed", seed, "--max-new-tokens", "20"]
        assert main(argv) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_generate_uses_the_chat_template_unless_told_not_to(tmp_path, capsys):
    """A template frames the prompt; --raw leaves it bare."""
    mod_model("llama").save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "[{{ messages[0]['content'] }}]"
    tokenizer.save_pretrained(tmp_path)
    texts = []
    for argv in (["Hi"], ["[Hi]", "--raw"], ["Hi", "--raw"]):
        assert main(["generate", str(tmp_path), *argv, "--max-new-tokens", "10"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_generate_takes_a_dense_model(parent, capsys):
    """It is converted on loading."""
    assert main(["generate", str(parent), "Hello", "--p", "0", "--max-new-tokens", "5"]) == 0
    assert "load 1.00" in capsys.readouterr().err


def test_inspect_describes_a_mod_model(folder, capsys):
    """As JSON, with its settings."""
    assert main(["inspect", str(folder)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["class"] == "MoDLlamaForCausalLM"
    assert found["layers"] == DEPTH
    assert found["mod_layers"] == [1, 2, 3]
    assert found["mod"]["kv"] == "evict"
    assert found["parameters"] == sum(weight.numel() for weight in mod_model("llama").parameters())


def test_inspect_describes_a_dense_model(parent, capsys):
    """Without converting it."""
    assert main(["inspect", str(parent)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["class"] == "LlamaForCausalLM"
    assert found["mod"] is None
    assert found["mod_layers"] == []
    assert found["family"] == "llama"
    assert found["can_be_mod_layers"] == list(range(DEPTH))
    assert found["conversion_adds_parameters_per_layer"] == WIDTH + 1


def test_inspect_says_why_a_model_cannot_be_converted(tmp_path, capsys):
    """By name and reason; one that is known by structure alone is called so."""
    mamba = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mamba", vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)
    )
    assert main(["inspect", str(save_folder(mamba, tmp_path / "mamba"))]) == 0
    assert "layers of kind linear_attention" in json.loads(capsys.readouterr().out)["refused"]
    phi = AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "phi", vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
    ))
    assert main(["inspect", str(save_folder(phi, tmp_path / "phi"))]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "phi, by its structure"


def test_convert_overwrites_nothing(parent, text, tmp_path, capsys):
    """Neither its own parent nor a folder of somebody else's; byte for byte."""
    whole = tmp_path / "parent"
    shutil.copytree(parent, whole)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("precious")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for out in (whole, tmp_path / "mine"):
        message = refused(capsys, "convert", str(whole), str(out), "--data", str(text), "--tokens", "256", "--block",
                          "16", "--batch", "4")
        assert "holds files that are no conversion's" in message
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_dial_makes_load_one_minus_p_on_another_text(tmp_path, capsys):
    """In the folder's config alone: weights stay, and what loads reads true on that text."""
    model = mod_model("llama", spread=0.6)
    folder = save_folder(model, tmp_path / "mod")
    weights = (folder / "model.safetensors").read_bytes()
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog, again and again. " * 60)
    assert main(["dial", str(folder), "--data", str(tmp_path / "text.txt"), "--tokens", "2048", "--block", "64"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("p ")]
    assert len(lines) == 5
    now = [float(line.split("before, ")[1].split()[0]) for line in lines]
    assert now == pytest.approx([0.9, 0.75, 0.5, 0.25, 0.1], abs=0.03)
    assert (folder / "model.safetensors").read_bytes() == weights
    assert len(load(folder)[0].mod_config.dial) == 19
    assert "no dial yet" in refused(
        capsys, "dial", str(save_folder(dense_model("llama"), tmp_path / "dense")), "--data", str(tmp_path / "text.txt")
    )


def test_sweep_prints_a_row_per_p(folder, text, capsys):
    """Eleven p's, loads falling from 1."""
    assert main(["sweep", str(folder), "--data", str(text), "--tokens", "256", "--block", "32"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| 0", "| 1"))]
    assert len(rows) == 11
    loads = [float(row.split("|")[2]) for row in rows]
    assert loads[0] == 1.0
    assert loads[-1] < 0.1


def test_convert_trains_and_writes_a_model(parent, text, tmp_path, capsys):
    """A few steps; the folder then loads as a MoD model with the chosen layers."""
    out = tmp_path / "out"
    with torch.enable_grad():
        code = main([
            "convert", str(parent), str(out), "--data", str(text), "--tokens", "256", "--block", "16", "--batch", "4",
            "--held-out", "4", "--layers", "1,3", "--kv", "keep",
        ])
    assert code == 0
    assert f"written to {out}" in capsys.readouterr().out
    model, _ = load(out)
    assert isinstance(model, MoDModel)
    assert model.mod_layers == (1, 3)
    assert model.mod_config.kv == "keep"
    assert len(json.loads((out / "report.json").read_text())["sweep"]) == 11


def test_the_module_runs_as_a_program(folder, monkeypatch, capsys):
    """python -m modification: the command's code is the program's."""
    for model, code in ((str(folder), 0), ("/no/model", 2)):
        monkeypatch.setattr(sys, "argv", ["modification", "inspect", model])
        with pytest.raises(SystemExit) as caught:
            runpy.run_module("modification", run_name="__main__")
        assert (caught.value.code or 0) == code
    assert json.loads(capsys.readouterr().out)["class"] == "MoDLlamaForCausalLM"


@pytest.mark.parametrize(
    "argv", [[], ["fly"], ["generate"], ["generate", "m", "x", "--p", "half"], ["sweep", "m"],
             ["convert", "a", "b", "--data", "c", "--kv", "lose"], ["--threads", "x", "inspect", "m"]],
)
def test_wrong_arguments_exit_with_2_and_the_usage(argv, capsys):
    """argparse's own way."""
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--p", "1.5"], "p=1.5: the threshold must be a number from 0 to 1"),
        (["--p", "nan"], "p=nan: the threshold must be a number from 0 to 1"),
        (["--temperature", "-1"], "temperature=-1.0"),
        (["--top-p", "0"], "top_p=0.0"),
        (["--max-new-tokens", "-5"], "max_new_tokens=-5"),
        (["--max-new-tokens", "1000"], "context of 256"),
    ],
)
def test_generate_refuses_values_out_of_bounds(folder, options, message, capsys):
    """Each with its bound."""
    assert message in refused(capsys, "generate", folder, "Hello", *options)


def test_an_empty_prompt_is_refused(folder, capsys):
    """There is nothing to go on from."""
    assert "prompt is empty" in refused(capsys, "generate", folder, "")


@pytest.mark.parametrize("command", [["generate", "/no/model", "Hello"], ["inspect", "/no/model"],
                                     ["sweep", "/no/model", "--data", "x.txt"],
                                     ["convert", "/no/model", "out", "--data", "x.txt"]])
def test_a_missing_model_is_refused(command, capsys):
    """By every command."""
    assert "/no/model" in refused(capsys, *command)


def test_a_damaged_model_is_refused(folder, tmp_path, capsys):
    """A truncated weights file."""
    save_folder(mod_model("llama"), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    assert str(tmp_path) in refused(capsys, "inspect", tmp_path)


def test_data_that_can_t_be_read_is_refused(folder, tmp_path, capsys):
    """Missing, of another type, damaged, too short, or with wrong lines."""
    cases = {
        "missing.txt": None, "table.csv": b"a,b", "cut.txt.xz": lzma.compress(b"text " * 99)[:-9],
        "short.txt": b"Hi", "rows.jsonl": b'{"title": 1}', "number.jsonl": b"3", "broken.jsonl": b"{",
    }
    for name, data in cases.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        refused(capsys, "sweep", folder, "--data", tmp_path / name, "--block", "32")


@pytest.mark.parametrize("block", ["0", "-3"])
def test_sweep_refuses_an_empty_block(folder, text, block, capsys):
    """A block holds tokens."""
    assert "block" in refused(capsys, "sweep", folder, "--data", text, "--block", block)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "1,x"], "--layers 1,x"),
        (["--layers", "1,9"], "index 9 is not in 0..4"),
        (["--layers", ""], "--layers"),
        (["--tokens", "5"], "tokens=5"),
        (["--block", "0"], "block=0"),
        (["--batch", "0"], "batch=0"),
        (["--held-out", "500"], "held"),
        (["--held-out", "0"], "held"),
        (["--held-out", "-2"], "held"),
        (["--lr", "-1"], "lr"),
        (["--lr", "nan"], "lr"),
    ],
)
def test_convert_refuses_values_out_of_bounds(parent, text, options, message, tmp_path, capsys):
    """Before any training; nothing is written."""
    small = ["--tokens", "128", "--block", "16", "--batch", "4", "--held-out", "4"]
    with torch.enable_grad():
        said = refused(capsys, "convert", parent, tmp_path / "out", "--data", text, *small, *options)
    assert message in said
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_convert_refuses_a_mod_model(folder, text, tmp_path, capsys):
    """It wants the dense parent."""
    assert "already" in refused(capsys, "convert", folder, tmp_path / "out", "--data", text)


def test_threads_out_of_bounds_are_refused(folder, capsys):
    """A count of threads is positive."""
    assert "threads" in refused(capsys, "--threads", "-1", "inspect", folder)


@pytest.mark.parametrize(("flags", "sentence"), [
    (["--lora-rank", "4"], "--lora-rank: only --tune lora"), (["--keep-adapter"], "--keep-adapter: only --tune lora"),
    (["--recipe", "calibrate", "--tune", "lora"], "calibrate trains nothing"),
    (["--optimizer", "muon", "--tune", "router"], "routers have no matrices"),
    (["--recipe", "paper", "--start", "ordered"], "paper has its own start"),
    (["--compile", "--recipe", "paper"], "has neither"), (["--compile", "--recipe", "calibrate"], "has no loss"),
    (["--held-out-split", "val"], "give --held-out-data with it"), (["--save-steps", "0"], "--save-steps 0: must be 1"),
    (["--block", "1"], "--block 1: must be 2 or more"), (["--block", "4096"], "--block 4096: the model has a context"),
    (["--layers", "auto:x"], "expected auto:K"), (["--layers", "auto:99"], "K must be from 1 to 5"),
    (["--layers", "none"], "indices like 1,3,5 or .convert. auto:K"),
    (["--responses"], "plain text: it has no responses"),
])
def test_flags_that_would_do_nothing_are_refused(parent, text, tmp_path, capsys, flags, sentence):
    """Before anything is trained."""
    said = refused(capsys, "convert", parent, tmp_path / "out", "--data", text, "--tokens", 40_000, *flags)
    assert re.search(sentence, said)


def test_what_is_not_routed_is_not_swept(parent, folder, text, capsys):
    """A dense model has untrained routers, whose figures would mean nothing; a MoD model is no dense parent."""
    assert "no p to sweep over" in refused(capsys, "sweep", parent, "--data", text)
    assert "is a MoD model" in refused(capsys, "sweep", folder, "--data", text, "--dense", folder)
