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
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from modification.conversion.checks import last_checkpoint
from modification.conversion.data import Blocks, Documents, pack, pack_whole, read_documents
from modification.measure.retrieval import conversation, cut

VOCABULARY = 4096
CONTEXT = 2048
STEP_TOKENS = 8192
TOKENS = 10_020_000
SHORT_SHARE = 0.779  # of the tokens are seen in short blocks, which train faster; the rest in full contexts
SECOND_TOKENS = 6_500_000  # of the second pass, whole documents kept apart
RETRIEVAL_SHARE = 0.12  # of its tokens are stories with facts to be found again
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


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the layers' matrices, AdamW for embeddings and norms, as one optimiser.

    Muon orthogonalises each update (https://kellerjordan.github.io/posts/muon/); it is
    defined for matrices only, so the rest needs AdamW beside it.
    """

    def __init__(self, model: torch.nn.Module, lr: float) -> None:
        named = list(model.named_parameters())
        matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in named if p.ndim != 2 or "embed" in n]
        self.muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        super().__init__(self.muon.param_groups + self.adamw.param_groups, {})
        # The two must see what a schedule writes into the joint groups.
        self.muon.param_groups = self.param_groups[:1]
        self.adamw.param_groups = self.param_groups[1:]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        self.muon.step()
        self.adamw.step()

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self.param_groups = self.muon.param_groups + self.adamw.param_groups


def train(
    model: LlamaForCausalLM, data: Dataset[Any], block: int, out: Path, lr: float, shape: Callable[[float], float]
) -> None:
    """One pass over the data, `block` tokens a row; `shape` maps progress in [0, 1] to a factor of `lr`."""
    steps = len(data) * block // STEP_TOKENS  # type: ignore[arg-type]
    optimizer = MuonWithAdamW(model, lr)
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
    """Train in three stages: short blocks at a steady rate, full contexts while it decays, and a second pass."""
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
    return _second_pass(model, tokenizer, documents, work / "second")


def _second_pass(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: list[list[int]], out: Path
) -> Path:
    """The text once more, no document seeing another, with facts to retrieve mixed in; the rate rises and decays."""
    if not (out / "final" / "model.safetensors").is_file():
        packed = mixed_blocks(random.Random(1), documents, tokenizer, SECOND_TOKENS, CONTEXT)
        train(model, Documents(packed), CONTEXT, out, 2e-3, lambda t: min(1.0, t / 0.04 + 0.01, max(0.02, 1.02 - t)))
    return out / "final"


def mixed_blocks(
    rng: random.Random, documents: list[list[int]], tokenizer: Any, tokens: int, block: int
) -> npt.NDArray[np.int32]:
    """Documents in another order, a share of chats about facts among them, whole in blocks: see ``pack_whole``."""
    mixed = list[list[int]]()
    order = iter(rng.sample(documents, len(documents)))
    while tokens > 0:
        one = retrieval_document(rng, documents, tokenizer) if rng.random() < RETRIEVAL_SHARE else next(order)
        mixed.append(one)
        tokens -= len(one)
    packed = pack_whole(mixed, block, tokenizer.pad_token_id)
    np.random.default_rng(1).shuffle(packed)
    return packed


def retrieval_document(rng: random.Random, documents: list[list[int]], tokenizer: Any) -> list[int]:
    """Token ids of a chat about facts hidden in one to three stories; as many short ones as long ones."""
    length = int(math.exp(rng.uniform(math.log(48), math.log(CONTEXT - 220))))
    picked = rng.sample(documents, 3)
    text = tokenizer.decode([token for ids in picked for token in ids], skip_special_tokens=True)
    messages = conversation(rng, cut(text, length, tokenizer))
    return list(tokenizer.apply_chat_template(messages)["input_ids"])


def tokens_seen(work: Path) -> int:
    """Training tokens of the finished stages under ``work``."""
    logs = [json.loads(path.read_text()) for path in work.glob("*/log.json")]
    return sum(log[-1]["step"] * STEP_TOKENS for log in logs)


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
