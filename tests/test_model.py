"""convert, restore and the routed call: reversible, refusing what doesn't fit, and still the stock interface."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from builders import (
    ALL,
    DEPTH,
    VOCABULARY,
    WIDTH,
    assert_close,
    assert_differs,
    dense_model,
    in_chunks,
    mod_model,
    routers,
    safe_threshold,
    save_folder,
    scatter_routers,
    tokens,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from modification import ConversionError, MoDConfig, MoDModel, convert, load, restore
from modification.architectures import structured

every_family = pytest.mark.parametrize("variant", ALL)
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 4, "num_attention_heads": 4,
    "intermediate_size": 48,
}


def identity(model):
    """What must come back: classes, configs, parameter names in order, other attributes' names."""
    return {
        "classes": [type(module) for module in model.modules()],
        "names": [name for name, _ in model.named_modules()],
        "keys": list(model.state_dict()),
        "config": copy.deepcopy(model.config.to_dict()),
        "config_class": type(model.config),
        "generation": copy.deepcopy(model.generation_config.to_dict()),
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "split": set(model._no_split_modules),
        "training": [module.training for module in model.modules()],
    }


# convert and restore


@every_family
@pytest.mark.parametrize("gate", ["straight_through", "paper"])
def test_restore_gives_the_dense_model_back(variant, gate):
    """Key for key, class for class, config for config; the same logits and weights."""
    model = dense_model(variant)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before, logits = identity(model), model(tokens(2)).logits
    assert restore(convert(model, MoDConfig(gate=gate))) is model
    assert identity(model) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(tokens(2)).logits, logits)


@every_family
def test_convert_works_in_place_and_adds_routers_only(variant):
    """The same object, its old keys untouched, two new ones per MoD layer."""
    model = dense_model(variant)
    before = set(model.state_dict())
    dense_class, dense_config = type(model), type(model.config)
    assert convert(model) is model
    assert isinstance(model, MoDModel)
    assert isinstance(model, dense_class)
    assert isinstance(model.config, dense_config)
    added = set(model.state_dict()) - before
    assert before <= set(model.state_dict())
    assert len(added) == 2 * (DEPTH - 2)
    assert all(".router." in name for name in added)


def test_fresh_routers_let_almost_every_token_run():
    """Conversion alone costs nothing at the default p."""
    model = convert(dense_model("llama"))
    routed = torch.stack(model(tokens(4), output_router_scores=True).routed)
    assert routed.float().mean() > 0.99


def test_convert_after_restore_works_again():
    """With another config."""
    model = restore(convert(dense_model("llama")))
    convert(model, MoDConfig(layers=[0, 4], p=0.25))
    assert model.mod_layers == (0, 4)
    assert model.mod_config.p == 0.25


def test_two_models_of_one_class_convert_apart():
    """Converting one leaves the other dense."""
    first, second = dense_model("llama"), dense_model("llama")
    convert(first)
    assert not isinstance(second, MoDModel)
    assert type(second.model.layers[1]) is LlamaDecoderLayer
    assert not hasattr(second.config, "mod")


def test_a_deep_copy_is_a_mod_model_of_its_own():
    """Copies route as their original does and share nothing."""
    model = mod_model("llama")
    other = copy.deepcopy(model)
    assert torch.equal(other(tokens(2), p=0.5).logits, model(tokens(2), p=0.5).logits)
    restore(other)
    assert isinstance(model, MoDModel)
    model(tokens(2), p=0.5)


def test_modes_survive_conversion():
    """A model in training mode stays there, routers included; one in eval mode too."""
    for training in (True, False):
        model = convert(dense_model("gpt2").train(training))
        assert all(module.training == training for module in model.modules())


def test_a_device_map_takes_a_routed_layer_as_one_piece():
    """The routed class's name is among the modules that must not be split."""
    model = convert(dense_model("llama"))
    assert type(model.model.layers[1]).__name__ in model._no_split_modules
    assert type(model.model.layers[0]).__name__ in model._no_split_modules


# Refusals


STRUCTURED = {
    "phi": {}, "gemma": {"head_dim": 8}, "olmo": {}, "helium": {"head_dim": 8}, "persimmon": {}, "codegen": {},
    "glm4": {"head_dim": 8, "pad_token_id": None},
    "cohere2": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
}
REFUSED = {
    "mamba": "layers of kind linear_attention", "recurrent_gemma": "layers of kind|looked for",
    "t5": "encoder-decoder", "llava": "wraps a language model", "qwen3_next": "layers of kind linear_attention",
    "bert": "is an encoder",
}


def small(model_type):
    """A tiny model of a type that is not in the table."""
    settings = {**SMALL, "num_key_value_heads": 4, **STRUCTURED.get(model_type, {})}
    if model_type == "codegen":
        settings = {"vocab_size": 97, "n_embd": WIDTH, "n_layer": 4, "n_head": 4, "rotary_dim": 4, "n_positions": 64,
                    "n_ctx": 64, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings)).eval()


@pytest.mark.parametrize("model_type", STRUCTURED)
def test_a_family_that_is_not_in_the_table_is_read_off_its_structure(model_type, tmp_path):
    """Converted, it obeys the laws; saved, it loads again; restored, it is the dense model."""
    dense = small(model_type)
    ids = tokens(2) % dense.config.vocab_size
    expected = dense(ids).logits
    model = convert(copy.deepcopy(dense))
    assert model.config.mod_structure["layers"] == model.family.layers
    scatter_routers(model)
    assert_close(model(ids, p=0.0).logits, expected)
    p = safe_threshold(model, ids)
    gathered = model(ids, p=p).logits
    assert_close(gathered, model(ids, p=p, routing="masked").logits)
    assert_differs(gathered, expected)
    assert_close(in_chunks(model, ids, [5, 1, 8], p=p)["logits"], gathered)
    again, _ = load(save_folder(model, tmp_path))
    assert_close(again(ids, p=p).logits, gathered)
    restore(model)
    assert type(model) is type(dense)
    assert not hasattr(model.config, "mod_structure")
    assert torch.equal(model(ids).logits, expected)


def test_layers_that_fail_when_routed_are_refused_and_left_whole():
    """MPT's take a mask of another kind: a sentence, and the dense model as it was."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("mpt", vocab_size=97, d_model=32, n_layers=4, n_heads=4, max_seq_len=64)
    dense = AutoModelForCausalLM.from_config(config).eval()
    ids, name = tokens(1), type(dense)
    expected = dense(ids).logits
    with pytest.raises(ConversionError, match="MptForCausalLM is known by its structure alone, and its layers fail"):
        convert(dense)
    assert type(dense) is name
    assert torch.equal(dense(ids).logits, expected)


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_be_routed_is_refused_by_name_and_reason(model_type):
    """State-space and hybrid layers, encoder-decoders, wrappers of several models: before any work."""
    config = AutoConfig.for_model(model_type)
    fake = torch.nn.Module()
    fake.config = config
    if model_type == "mamba":
        fake = AutoModelForCausalLM.from_config(type(config)(vocab_size=97, hidden_size=32, num_hidden_layers=2))
    with pytest.raises(ConversionError, match=REFUSED[model_type]) as caught:
        convert(fake)
    assert model_type in str(caught.value)


@pytest.mark.parametrize("saved", [None, {}, {"layers": "model.layers"}, {
    "layers": "model.layers; import os", "attention": "self_attn", "cache_argument": "past_key_values",
    "returns_tuple": False,
}])
def test_a_saved_structure_that_is_none_is_refused(saved):
    """A config from a stranger names parts of a model, or nothing."""
    with pytest.raises(ConversionError, match=r"structure|not names"):
        structured("phi", saved)


@pytest.mark.parametrize("model_class", [LlamaModel, LlamaForSequenceClassification])
def test_a_model_without_a_language_head_is_refused(model_class):
    """Only causal language models can be converted; the model stays what it was."""
    model = model_class(LlamaConfig(**SMALL, pad_token_id=0))
    with pytest.raises(ConversionError, match=r"looked for|causal"):
        convert(model)
    assert type(model) is model_class


def test_a_missing_child_is_named():
    """The message says which sub-block was looked for and not found."""
    model = dense_model("llama")
    del model.model.layers[2].mlp
    with pytest.raises(ConversionError, match=r"layer 2 .*no attribute 'mlp'"):
        convert(model)


def test_an_attention_kernel_without_masks_is_refused():
    """The message names the kernel and those that work."""
    model = dense_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConversionError, match=r"flash_attention_2.*sdpa, eager"):
        convert(model)


class Amplified(LlamaDecoderLayer):
    """A layer whose forward does more than the family's."""

    def forward(self, hidden_states, *args, **kwargs):
        return 1.5 * super().forward(hidden_states, *args, **kwargs)


def test_layers_that_do_more_than_the_family_s_are_refused_and_left_alone():
    """The probe notices that the paper's block is not this layer's block; the model is dense again."""
    model = dense_model("llama")
    for layer in model.model.layers:
        layer.__class__ = Amplified
    before = identity(model)
    with pytest.raises(ConversionError, match="logits differ"):
        convert(model, MoDConfig(gate="paper"))
    assert identity(model) == before


def test_layers_beyond_the_model_are_refused_before_anything_changes():
    """A ValueError with the bound; the model is still dense."""
    model = dense_model("llama")
    before = identity(model)
    with pytest.raises(ValueError, match=r"index 9 is not in 0\.\.4"):
        convert(model, MoDConfig(layers=[1, 9]))
    assert identity(model) == before


def test_converting_twice_and_restoring_dense_are_refused():
    """Each message says what to do or why not."""
    model = convert(dense_model("llama"))
    with pytest.raises(ConversionError, match="already"):
        convert(model)
    with pytest.raises(ConversionError, match="not a MoD model"):
        restore(dense_model("llama"))


def test_an_object_that_is_no_model_is_refused():
    """No config, no conversion."""
    with pytest.raises(ConversionError, match="no model type"):
        convert(torch.nn.Linear(2, 2))


# The call


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), True, [0.5, 2.0], torch.tensor([0.1, float("nan")])])
def test_a_threshold_out_of_bounds_is_refused(p):
    """Numbers, lists and tensors alike."""
    with pytest.raises(ValueError, match="from 0 to 1"):
        mod_model("llama")(tokens(2), p=p)


def test_thresholds_must_fit_the_batch():
    """One number, or one per row."""
    with pytest.raises(ValueError, match=r"3 values for a batch of 2"):
        mod_model("llama")(tokens(2), p=torch.tensor([0.1, 0.2, 0.3]))


def test_an_unknown_path_is_refused():
    """The message names both paths."""
    with pytest.raises(ValueError, match=r"routing='fast'.*gathered, masked"):
        mod_model("llama")(tokens(2), routing="fast")


@pytest.mark.parametrize("mask", [torch.ones(2, 5), torch.ones(2, 1, 14, 14), torch.ones(1, 14), [[1] * 14] * 2])
def test_a_mask_that_does_not_fit_is_refused(mask):
    """The message gives the shape that would fit."""
    with pytest.raises(ValueError, match=r"expected shape \(2, 14\)"):
        mod_model("llama")(tokens(2), attention_mask=mask)


def test_nothing_to_read_is_refused():
    """Neither ids nor embeddings."""
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        mod_model("llama")()


def test_the_config_s_p_is_the_default():
    """A call without p reads it from the config."""
    model = mod_model("llama", MoDConfig(p=0.35))
    assert torch.equal(model(tokens(2)).logits, model(tokens(2), p=0.35).logits)


@pytest.mark.parametrize("p", [0.5, [0.5, 0.5], torch.tensor(0.5), torch.tensor([0.5]), torch.full((2,), 0.5).double()])
def test_a_threshold_may_come_in_any_form(p):
    """Number, list, scalar tensor, one-element tensor, tensor per row."""
    model = mod_model("llama")
    assert torch.equal(model(tokens(2), p=p).logits, model(tokens(2), p=0.5).logits)


@every_family
def test_the_output_reports_each_mod_layer(variant):
    """Scores in [0, 1] and decisions, [B, T] each, one per MoD layer; only on request."""
    model = mod_model(variant, MoDConfig(anchors=0))
    out = model(tokens(2), p=0.5, output_router_scores=True)
    assert len(out.router_scores) == len(out.routed) == len(model.mod_layers) == DEPTH - 2
    for scores, routed in zip(out.router_scores, out.routed, strict=True):
        assert scores.shape == routed.shape == (2, 14)
        assert scores.dtype == torch.float32
        assert torch.equal(routed, scores >= 0.5)
    silent = model(tokens(2), p=0.5)
    assert silent.router_scores is None
    assert silent.routed is None


@every_family
def test_the_stock_arguments_still_work(variant):
    """Embeddings for ids, labels, logits_to_keep, a tuple for return_dict=False."""
    model, ids = mod_model(variant), tokens(2)
    logits = model(ids, p=0.5).logits
    embeds = model.get_input_embeddings()(ids)
    assert_close(model(inputs_embeds=embeds, p=0.5).logits, logits)
    assert_close(model(ids, p=0.5, logits_to_keep=3).logits, logits[:, -3:])
    as_tuple = model(ids, p=0.5, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert_close(as_tuple[0], logits)
    loss = model(ids, p=0.5, labels=ids).loss
    by_hand = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, by_hand)


@pytest.mark.parametrize("name", ["position_ids", "labels", "logits_to_keep"])
def test_arguments_that_transformers_looks_for_are_named(name):
    """generate() and Trainer read the signature: without the name, padded rows get no positions, labels are dropped."""
    assert name in inspect.signature(dense_model("llama").forward).parameters
    assert name in inspect.signature(mod_model("llama").forward).parameters


def test_hidden_states_show_who_skipped():
    """A skipped token leaves a MoD layer as it came in; one that ran does not."""
    model = mod_model("llama", MoDConfig(layers=[1]))
    out = model(tokens(2), p=0.5, output_hidden_states=True, output_router_scores=True)
    before, after, run = out.hidden_states[1], out.hidden_states[2], out.routed[0]
    assert torch.equal(after[~run], before[~run])
    assert (after[run] != before[run]).any(-1).all()


def test_without_a_routing_call_the_base_model_is_dense():
    """Feature extraction from the bare decoder ignores routers."""
    dense, model, ids = dense_model("llama"), mod_model("llama"), tokens(2)
    assert_close(model.model(ids, use_cache=False)[0], dense.model(ids, use_cache=False)[0])


def test_no_cache_is_built_in_training_mode():
    """Training keeps no keys and values unless asked to."""
    model = mod_model("llama")
    assert model(tokens(1)).past_key_values is not None
    assert model.train()(tokens(1)).past_key_values is None


@every_family
def test_saved_weights_load_into_the_dense_class(variant):
    """State-dict keys stay stock: the dense class takes them all, and routers are all that is left over."""
    model, dense = mod_model(variant), type(dense_model(variant))(dense_model(variant).config)
    left = dense.load_state_dict(model.state_dict(), strict=False)
    assert not left.missing_keys
    assert all(".router." in name for name in left.unexpected_keys)
    assert_close(dense.eval()(tokens(2)).logits, model(tokens(2), p=0.0).logits)


def test_routers_move_the_decisions():
    """Closing one router changes the logits: it is really asked."""
    model, ids = mod_model("llama", MoDConfig(anchors=0)), tokens(2)
    before = model(ids, p=0.5).logits
    routers(model)[1].bias.fill_(-50.0)
    out = model(ids, p=0.5, output_router_scores=True)
    assert not out.routed[1].any()
    assert_differs(out.logits, before)
