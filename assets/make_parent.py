"""Train the dense storyteller from text: tokenizer, then weights. Resumable.

    PYTHONPATH=. python assets/make_parent.py TEXT.jsonl[.xz] [--work runs/Llama-Storyteller-22M]

TEXT holds one JSON object a line with `prompt` and `response`; rows whose `split`
is "val" are left out. Run it again after an interruption and it goes on from the
last checkpoint. `assets/make_pair.py` calls this, converts the result and writes
both model folders. It is for a GPU with some 30 GB.
"""

from __future__ import annotations

import argparse
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from mixture import CONTEXT, readings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from modification.conversion.checks import last_checkpoint
from modification.conversion.data import Documents
from modification.conversion.muon import MuonWithAdamW

VOCABULARY = 4096
TOKENS = 100_000_000  # in all
READINGS, LONG_READINGS = 6, 4  # of the text, each in another order
LONG_SHARE = 0.2  # of the tokens, read last, in blocks that fill the context
BLOCK = 1280  # of the others: all but the longest stories fit in
STEP_TOKENS = 81_920
LR, WEIGHT_DECAY, DROPOUT = 3e-3, 0.2, 0.1  # stories are read some six times
SPECIAL = ["<|pad|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(text: Path, out: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 4,096 entries with a chat template, trained on the train split."""
    if not (out / "tokenizer.json").is_file():
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        bpe.train_from_iterator(
            _texts(text), trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet)
        )
        start = (SPECIAL[1], bpe.token_to_id(SPECIAL[1]))
        bpe.post_processor = processors.TemplateProcessing(single=f"{start[0]} $A", special_tokens=[start])
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=bpe, bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|pad|>",
            model_max_length=CONTEXT, clean_up_tokenization_spaces=False,
        )
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.save_pretrained(out)
    return PreTrainedTokenizerFast.from_pretrained(out)


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 14 layers of width 384, 21.5 M parameters, freshly initialised."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=384, intermediate_size=896, num_hidden_layers=14,
        num_attention_heads=6, num_key_value_heads=2, head_dim=64, max_position_embeddings=CONTEXT,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ))


def train(
    model: LlamaForCausalLM, data: npt.NDArray[np.int32], tokens: int, out: Path, shape: Callable[[float], float]
) -> None:
    """Read ``tokens`` of packed blocks [N, 2, T]; ``shape`` maps progress in [0, 1] to a factor of the rate."""
    block, cuda = data.shape[-1], torch.cuda.is_available()
    rows = STEP_TOKENS // block
    steps = tokens // (rows * block)
    if not steps or len(data) < rows:
        raise ValueError(f"{tokens:,} tokens from {len(data)} blocks make no step: one takes {rows} blocks of {block}")
    model.to("cuda" if cuda else "cpu")
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in named if p.ndim != 2 or "embed" in n]
    optimizer = MuonWithAdamW(matrices, LR, [{"params": others, "lr": LR}], weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: shape(step / steps))
    _drop_out(model)
    for layer in model.model.layers:
        layer.compile()  # one compilation serves them all
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=rows,
        bf16=cuda or torch.cpu._is_avx512_bf16_supported(), use_cpu=not cuda, max_grad_norm=1.0,
        save_steps=max(50, steps // 4), save_total_limit=1, logging_steps=20, report_to="none",
        dataloader_drop_last=True, dataloader_num_workers=4 if cuda else 0, seed=0, disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Documents(data), optimizers=(optimizer, schedule))
    trainer.train(resume_from_checkpoint=last_checkpoint(out))
    (out / "log.json").write_text(json.dumps(trainer.state.log_history))
    trainer.save_model(str(out / "final"))


def _drop_out(model: LlamaForCausalLM) -> None:
    """Drop a share of what each half of a layer adds, while this model object trains; nothing of it is saved."""
    def drop(module: nn.Module, given: Any, out: Tensor) -> Tensor:
        return F.dropout(out, DROPOUT, module.training)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)


def make_parent(text: Path, work: Path, tokens: int = TOKENS) -> Path:
    """Train in two stages, no document seeing another: fast in short blocks, then slower in full contexts."""
    tokenizer = make_tokenizer(text, work / "tokenizer")
    model = make_model(tokenizer)
    long = int(tokens * LONG_SHARE)
    stages: list[tuple[str, int, int, int, Callable[[float], float]]] = [
        ("base", BLOCK, READINGS, tokens - long, lambda t: min(1.0, t / 0.04 + 0.01, 1.6 - 1.2 * t)),
        ("long", CONTEXT, LONG_READINGS, long, lambda t: min(t / 0.05 + 0.01, 0.4 * (1 - t) + 0.005)),
    ]
    for name, block, count, budget, shape in stages:
        out = work / name
        if not (out / "final" / "model.safetensors").is_file():
            train(model, readings(work, text, tokenizer, block, count), budget, out, shape)
        model = LlamaForCausalLM.from_pretrained(out / "final", dtype=torch.float32)
    return work / "long" / "final"


def masks_by_cudnn() -> None:
    """On a GPU, leave attention with masks to cuDNN: 2.6 times as fast on an H200 as the kernel that torch prefers."""
    torch.backends.cuda.enable_mem_efficient_sdp(not torch.cuda.is_available())


def tokens_seen(work: Path) -> int:
    """Training tokens of the stages that are finished under ``work``."""
    return sum(json.loads(path.read_text())[-1]["step"] * STEP_TOKENS for path in work.glob("*/log.json"))


def _texts(text: Path) -> Iterator[str]:
    opener = lzma.open if text.suffix == ".xz" else open
    with opener(text, "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            if row.get("split") != "val":
                yield f"{row['prompt']}\n{row['response']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/Llama-Storyteller-22M"))
    parser.add_argument("--tokens", type=int, default=TOKENS, help="training tokens (default: %(default)s)")
    arguments = parser.parse_args()
    masks_by_cudnn()
    print(make_parent(arguments.text, arguments.work, arguments.tokens))


if __name__ == "__main__":
    main()
