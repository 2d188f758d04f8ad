"""Tiny random models on disk for tests of the app: a byte tokenizer, scattered routers, a context of 128 or more."""


import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from app.tape import records
from modification import MoDConfig, convert

CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_tokenizer(chat=False):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: at for at, token in enumerate(["<s>", "</s>", *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    if chat:
        tokenizer.chat_template = CHAT
    return tokenizer


def talker(path, chat=False, context=128, dense=False):
    """Write a model folder; the dense one has the MoD one's weights."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer(chat)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=context, bos_token_id=0, eos_token_id=1,
    ))
    if not dense:
        convert(model, MoDConfig())
        with torch.no_grad():
            for layer in model.model.layers[1:3]:
                layer.router.weight.normal_()
                layer.router.bias.zero_()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def columns(tape):
    """All tokens of a run's tape, with their scores and decisions."""
    return [record for record in records(tape) if record[0] == "c"]
