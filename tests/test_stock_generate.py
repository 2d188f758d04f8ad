"""transformers' own generate() on a MoD model: every decoding method, with p as one more argument."""

from __future__ import annotations

import pytest
import torch
from builders import (
    ALL,
    FEW,
    PAD,
    assert_close,
    dense_model,
    mod_model,
    padded,
    safe_threshold,
    tiny_tokenizer,
    tokens,
)
from transformers import (
    DynamicCache,
    MaxLengthCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)

from modification import MoDConfig, RaggedCache

every_family = pytest.mark.parametrize("variant", ALL)
few_families = pytest.mark.parametrize("variant", FEW)
every_kv = pytest.mark.parametrize("kv", ["evict", "keep"])
NEW = 8


def greedy(model, ids, p=0.5, **options):
    """Plain greedy continuation, prompt included."""
    return model.generate(ids, p=p, do_sample=False, **{"max_new_tokens": NEW, **options})


@every_family
@every_kv
def test_greedy_is_the_argmax_of_recomputed_logits(variant, kv):
    """With the ragged cache, and without any; in one pass over the whole, each new token is what precedes it gives."""
    model, ids = mod_model(variant, MoDConfig(kv=kv)), tokens(1, 6)
    found = greedy(model, ids)
    assert found.shape[1] == 6 + NEW
    assert torch.equal(found[:, :6], ids)
    logits = model(found[:, :-1], p=0.5, use_cache=False).logits
    assert torch.equal(logits[:, 5:].argmax(-1), found[:, 6:])
    assert torch.equal(greedy(model, ids, use_cache=False), found)
    assert torch.equal(greedy(model, ids, routing="masked"), found)


@every_family
def test_p_zero_generates_what_the_dense_parent_does(variant):
    """Greedy and sampled from the same seed."""
    dense, model, ids = dense_model(variant), mod_model(variant), tokens(2, 6)
    for options in ({"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_k": 20}):
        torch.manual_seed(5)
        expected = dense.generate(ids, max_new_tokens=NEW, pad_token_id=PAD, **options)
        torch.manual_seed(5)
        assert torch.equal(model.generate(ids, max_new_tokens=NEW, pad_token_id=PAD, p=0.0, **options), expected)


def test_p_changes_what_is_generated():
    """The argument reaches the layers at every step."""
    model, ids = mod_model("llama"), tokens(1, 6)
    texts = {tuple(greedy(model, ids, p)[0].tolist()) for p in (0.0, 0.5, 0.9)}
    assert len(texts) > 1


def test_sampling_repeats_with_its_seed():
    """Same seed, same text; another seed, another."""
    model, ids = mod_model("llama"), tokens(1, 6)
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(model.generate(ids, p=0.5, do_sample=True, top_p=0.9, max_new_tokens=NEW))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


@every_family
def test_a_left_padded_batch_is_each_row_alone(variant):
    """Greedy, with one threshold per row."""
    model = mod_model(variant)
    rows, p = [tokens(1, length, length)[0] for length in (9, 4, 7)], torch.tensor([0.5, 0.3, 0.65])
    batch = padded(rows, "left")
    del batch["position_ids"]
    together = model.generate(**batch, p=p, do_sample=False, max_new_tokens=NEW, pad_token_id=PAD)
    for at, row in enumerate(rows):
        alone = greedy(model, row[None], p=p[at].item())
        assert torch.equal(together[at, -NEW:], alone[0, -NEW:])


def test_an_end_token_stops_its_row_and_pads_it():
    """The others go on as if alone."""
    model, ids = mod_model("llama"), tokens(2, 6)
    free = greedy(model, ids, pad_token_id=PAD)
    end = free[0, 6 + 3].item()
    stopped = greedy(model, ids, eos_token_id=end, pad_token_id=PAD)
    for row, text in zip(free[:, 6:].tolist(), stopped[:, 6:].tolist(), strict=True):
        kept = row[: row.index(end) + 1] if end in row else row
        assert text[: len(kept)] == kept[: len(text)]
        assert set(text[len(kept) :]) <= {PAD}


def test_stopping_criteria_stop():
    """max_length, a criterion, and stop strings."""
    model, ids, tokenizer = mod_model("llama"), tokens(1, 6), tiny_tokenizer()
    free = greedy(model, ids)
    assert torch.equal(greedy(model, ids, max_new_tokens=None, max_length=9), free[:, :9])
    criteria = StoppingCriteriaList([MaxLengthCriteria(max_length=11)])
    assert torch.equal(greedy(model, ids, stopping_criteria=criteria), free[:, :11])
    word = tokenizer.decode(free[0, 9:11])
    stopped = greedy(model, ids, stop_strings=[word], tokenizer=tokenizer)
    assert tokenizer.decode(stopped[0]).endswith(word)
    assert stopped.shape[1] <= 11


def test_streamers_hear_every_token(capsys):
    """TextStreamer prints the text, TextIteratorStreamer yields it."""
    model, ids, tokenizer = mod_model("llama"), tokens(1, 6), tiny_tokenizer()
    expected = tokenizer.decode(greedy(model, ids)[0, 6:])
    iterator = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=10)
    greedy(model, ids, streamer=iterator)
    assert "".join(iterator) == expected
    greedy(model, ids, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == expected.strip()


@few_families
@every_kv
def test_a_cache_is_carried_over_turns(variant, kv):
    """past_key_values of one generation continues in the next, as one whole text would."""
    model, ids = mod_model(variant, MoDConfig(kv=kv)), tokens(1, 6)
    first = greedy(model, ids, max_new_tokens=4, return_dict_in_generate=True)
    assert isinstance(first.past_key_values, RaggedCache)
    longer = torch.cat([first.sequences, tokens(1, 3, seed=7)], 1)
    again = greedy(model, longer, past_key_values=first.past_key_values)
    assert torch.equal(again, greedy(model, longer))


@every_family
def test_scores_and_hidden_states_come_back(variant):
    """output_scores and output_hidden_states have the stock shapes and the recomputed values."""
    model, ids = mod_model(variant), tokens(2, 6)
    out = greedy(
        model, ids, max_new_tokens=4, pad_token_id=PAD, return_dict_in_generate=True, output_scores=True,
        output_hidden_states=True,
    )
    whole = model(out.sequences, p=0.5, output_hidden_states=True)
    assert len(out.scores) == len(out.hidden_states) == 4
    for at in range(4):
        assert_close(out.scores[at], whole.logits[:, 5 + at])
        assert len(out.hidden_states[at]) == len(whole.hidden_states) == 6
        for ours, theirs in zip(out.hidden_states[at], whole.hidden_states, strict=True):
            assert_close(ours[:, -1], theirs[:, 5 + at])


@few_families
@every_kv
def test_beam_search_is_beam_search_without_a_cache(variant, kv):
    """Reordering rows of the ragged cache gives the beams of recomputation, scored by their mean log-probability."""
    model, ids = mod_model(variant, MoDConfig(kv=kv)), tokens(2, 6)
    options = {
        "num_beams": 3, "num_return_sequences": 2, "pad_token_id": PAD, "return_dict_in_generate": True,
        "output_scores": True,
    }
    cached, plain = greedy(model, ids, **options), greedy(model, ids, use_cache=False, **options)
    assert torch.equal(cached.sequences, plain.sequences)
    assert_close(cached.sequences_scores, plain.sequences_scores)
    logits = model(cached.sequences, p=0.5).logits[:, 5:-1].log_softmax(-1)
    mean = logits.gather(2, cached.sequences[:, 6:, None])[..., 0].mean(1)
    assert_close(cached.sequences_scores, mean)


def test_beam_search_takes_a_threshold_per_row():
    """Each row's beams are those it gets alone."""
    model, ids, p = mod_model("llama"), tokens(2, 6), torch.tensor([0.3, 0.7])
    together = greedy(model, ids, p=p, num_beams=3, pad_token_id=PAD)
    for at in range(2):
        assert torch.equal(together[at], greedy(model, ids[at : at + 1], p=p[at].item(), num_beams=3)[0])


def test_beam_search_works_where_nothing_runs():
    """p = 1 without anchors: MoD layers store nothing and beams are reordered all the same."""
    model, ids = mod_model("llama", MoDConfig(anchors=0)), tokens(1, 6)
    expected = greedy(model, ids, p=1.0, num_beams=3, use_cache=False)
    assert torch.equal(greedy(model, ids, p=1.0, num_beams=3), expected)


def test_several_samples_of_one_prompt_are_all_routed():
    """num_return_sequences repeats p with the prompt."""
    model, ids = mod_model("llama"), tokens(2, 6)
    out = model.generate(
        ids, p=torch.tensor([0.2, 0.8]), do_sample=True, num_return_sequences=3, max_new_tokens=5, pad_token_id=PAD
    )
    assert out.shape == (6, 11)


@few_families
@every_kv
def test_prompt_lookup_decoding_is_greedy(variant, kv):
    """Guessing ahead and cropping the ragged cache changes nothing but speed."""
    model = mod_model(variant, MoDConfig(kv=kv))
    ids = tokens(1, 5).repeat(1, 3)
    p = safe_threshold(model, greedy(model, ids, max_new_tokens=20))
    expected = greedy(model, ids, p=p, max_new_tokens=20)
    assert torch.equal(greedy(model, ids, p=p, max_new_tokens=20, prompt_lookup_num_tokens=4), expected)


def test_assisted_decoding_is_greedy():
    """Another MoD model proposes, this one decides."""
    model, assistant, ids = mod_model("llama"), mod_model("llama", seed=1), tokens(1, 6)
    assert torch.equal(greedy(model, ids, assistant_model=assistant), greedy(model, ids))


def test_a_cache_that_stores_every_token_is_refused():
    """A DynamicCache, in generate and in a plain call, with a sentence that says what would do."""
    model, ids = mod_model("llama"), tokens(1, 6)
    for call in (greedy, lambda model, ids, **options: model(ids, **options)):
        with pytest.raises(ValueError, match=r"DynamicCache.*new_cache\(\)"):
            call(model, ids, past_key_values=DynamicCache())


@pytest.mark.parametrize("implementation", ["static", "quantized"])
def test_a_cache_implementation_is_refused(implementation):
    """Static and quantised caches store every token."""
    with pytest.raises(ValueError, match=rf"{implementation}.*leave cache_implementation unset"):
        greedy(mod_model("llama"), tokens(1, 6), cache_implementation=implementation)


def test_a_threshold_out_of_bounds_is_refused():
    """Before the first token."""
    with pytest.raises(ValueError, match="from 0 to 1"):
        greedy(mod_model("llama"), tokens(1, 6), p=1.5)
