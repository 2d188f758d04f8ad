"""Train the dense storyteller from text: tokenizer, then weights. Resumable.

    PYTHONPATH=. python assets/make_parent.py TEXT.jsonl[.xz] [--work runs/storyteller]

TEXT holds one JSON object a line with `prompt` and `response`; rows whose `split`
is "val" are left out. Run it again after an interruption and it goes on from the
last checkpoint. `assets/make_pair.py` calls this, converts the result and writes
both model folders with their cards.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mixture import SECOND_READING, THIRD_READING, Kind, mixed_blocks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from modification.conversion.checks import last_checkpoint
from modification.conversion.data import Blocks, Documents, pack, read_documents
from modification.conversion.muon import MuonWithAdamW

VOCABULARY = 4096
CONTEXT = 2048
STEP_TOKENS = 8192
TOKENS = 10_020_000
SHORT_SHARE = 0.779  # of the tokens are seen in short blocks, which train faster; the rest in full contexts
SECOND_TOKENS = 6_500_000  # of the second pass, whole documents kept apart
SECOND = "second"  # the conversion's first stage begins with what this one left
THIRD_TOKENS, THIRD_LONG = 3_500_000, 1_000_000  # of the third pass, with chats of several turns; then in full contexts
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
    """A Llama of 12 layers of width 256, about 10 M parameters, freshly initialised."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=688, num_hidden_layers=12,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=CONTEXT,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ))


def train(
    model: LlamaForCausalLM, data: Dataset[Any], block: int, out: Path, lr: float, shape: Callable[[float], float]
) -> None:
    """One pass over the data, `block` tokens a row; `shape` maps progress in [0, 1] to a factor of `lr`."""
    steps = len(data) * block // STEP_TOKENS  # type: ignore[arg-type]
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in named if p.ndim != 2 or "embed" in n]
    optimizer = MuonWithAdamW(matrices, lr, [{"params": others, "lr": lr}], weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: shape(step / steps))
    bf16 = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=STEP_TOKENS // block,
        bf16=bf16, use_cpu=not torch.cuda.is_available(), torch_compile=True, max_grad_norm=1.0,
        save_steps=50, save_total_limit=1, logging_steps=10, report_to="none", dataloader_drop_last=True,
        seed=0, dataloader_num_workers=0, disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, optimizers=(optimizer, schedule))
    trainer.train(resume_from_checkpoint=last_checkpoint(out))
    trainer.save_model(str(out / "final"))
    (out / "log.json").write_text(json.dumps(trainer.state.log_history))


def make_parent(text: Path, work: Path, tokens: int = TOKENS, lr: float = 4e-3) -> Path:
    """Train in stages: short blocks at a steady rate, full contexts while it decays, a second and a third pass."""
    tokenizer = make_tokenizer(text, work / "tokenizer")
    model = make_model(tokenizer)
    documents = list(read_documents(text, tokenizer, split="train"))
    held = sum(map(len, documents))
    if held < tokens:
        raise ValueError(f"{text.name} holds {held:,} training tokens: ask for at most that many, not {tokens:,}")
    np.random.default_rng(0).shuffle(documents)
    stream = iter(documents)
    stages: list[tuple[str, int, int, Callable[[float], float]]] = [
        ("short", 512, int(tokens * SHORT_SHARE), lambda t: min(1.0, t / 0.05 + 0.01)),
        ("long", CONTEXT, tokens - int(tokens * SHORT_SHARE), lambda t: max(0.02, 1 - t)),
    ]
    for name, block, budget, shape in stages:
        blocks = pack(stream, block, budget)
        out = work / name
        if not (out / "final" / "model.safetensors").is_file():
            train(model, Blocks(blocks), block, out, lr, shape)
        model = LlamaForCausalLM.from_pretrained(out / "final", dtype=torch.float32)
    return _read_again(documents, tokenizer, work)


def _read_again(documents: list[list[int]], tokenizer: PreTrainedTokenizerFast, work: Path) -> Path:
    """The text twice more, no document seeing another: with facts to retrieve, then with chats of several turns too."""
    def rise_and_fall(done: float) -> float:
        return min(1.0, done / 0.04 + 0.01, max(0.02, 1.02 - done))

    stages: list[tuple[str, int, int, dict[Kind, float], float, Callable[[float], float]]] = [
        (SECOND, SECOND_TOKENS, CONTEXT, SECOND_READING, 2e-3, rise_and_fall),
        ("third", THIRD_TOKENS, CONTEXT // 2, THIRD_READING, 2e-3, lambda t: min(1.0, t / 0.04 + 0.01, 1.02 - 0.7 * t)),
        ("third-long", THIRD_LONG, CONTEXT, THIRD_READING, 6e-4, rise_and_fall),
    ]
    before = work / "long"
    for seed, (name, tokens, block, kinds, lr, shape) in enumerate(stages, 1):
        out = work / name
        if not (out / "final" / "model.safetensors").is_file():
            packed = mixed_blocks(random.Random(seed), documents, tokenizer, tokens, block, kinds, name != SECOND)
            model = LlamaForCausalLM.from_pretrained(before / "final", dtype=torch.float32)
            train(model, Documents(packed), block, out, lr, shape)
        before = out
    return before / "final"


def tokens_seen(work: Path, *stages: str) -> int:
    """Training tokens of these stages under ``work``, or of all that are finished."""
    found = [work / stage / "log.json" for stage in stages] or work.glob("*/log.json")
    return sum(json.loads(path.read_text())[-1]["step"] * STEP_TOKENS for path in found)


def _texts(text: Path) -> Iterator[str]:
    opener = lzma.open if text.suffix == ".xz" else open
    with opener(text, "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            if row.get("split") != "val":
                yield f"{row['prompt']}\n{row['response']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/storyteller"))
    parser.add_argument("--tokens", type=int, default=TOKENS, help="training tokens (default: %(default)s)")
    arguments = parser.parse_args()
    print(make_parent(arguments.text, arguments.work, arguments.tokens))


if __name__ == "__main__":
    main()
