"""Whether a model folder's files are whole and fit together, told before anything is loaded; and after, NaNs.

Boundary: reads headers and configs; loads nothing. Every refusal is a sentence that names the file.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from modification.errors import LoadError, reason
from modification.routing import is_router

INDEX = "model.safetensors.index.json"
_HEADER_BYTES = 100_000_000  # as safetensors itself bounds it
_JSON_BYTES = 100_000_000  # the largest tokenizers have some tens of MB
_CONFIG_BYTES = 4_000_000
_CONFIGS = ("config.json", "generation_config.json", "chat_template.jinja", "adapter_config.json")
_READ_WHOLE = ("*.json", "*.jinja", "*.txt", "*.model")
_DIMENSIONS = 16
_PACKED, _SLACK = 2, 1.5  # weights in a byte of quantised files; tied or shared weights are held once
_MOST = 1 << 40  # no count in a config is above this
_SIZES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}
_POSITIVE = (
    "max_position_embeddings", "n_positions", "hidden_size", "vocab_size", "num_attention_heads", "num_hidden_layers",
    "n_layer", "num_layers", "n_layers", "num_key_value_heads", "num_kv_heads",
)
_WORD = re.compile(r"\w+")
_LAYERS = re.compile(r"(?:num_|n_)(?:hidden_|decoder_|encoder_)?layers?|(?:decoder|encoder)_layers")
_EXPERTS, _MOST_EXPERTS = re.compile(r"(?:num_|n_)\w*experts"), 65_536
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
log = logging.getLogger(__name__)


class Damaged(LoadError):
    """A file is not whole, or does not fit the others; the message says which and how."""


def check_files(folder: Path, config: dict[str, Any]) -> None:
    """Headers of all weight files, their lengths, the index, and the config's counts.

    Raises:
        Damaged: with a sentence for the user.
    """
    if (folder / "adapter_config.json").exists():  # with peft at hand its files would be read too, pickles among them
        raise Damaged(f"{folder} holds an adapter beside its weights (adapter_config.json): merge it into them first")
    tensors = 0
    for path in sorted(folder.glob("*.safetensors")):
        tensors += len(header_of(path))
    if not tensors:
        raise Damaged(f"{folder} has weight files without a single tensor in them")
    if (folder / INDEX).is_file():
        _check_index(folder)
    _check_counts(folder / "config.json", config, tensors)


def check_sizes(folder: Path) -> None:
    """No file that is read whole is longer than any model's.

    Raises:
        Damaged: one is.
    """
    for path in (path for pattern in _READ_WHOLE for path in folder.glob(pattern)):
        most = _CONFIG_BYTES if path.name in _CONFIGS else _JSON_BYTES
        try:
            size = path.stat().st_size
        except OSError as error:
            raise Damaged(f"{path} can't be read: {error.strerror}") from error
        if size > most:
            raise Damaged(f"{path} has {size:,} bytes, more than any model's: at most {most:,} are read")


def read_config(path: Path) -> dict[str, Any]:
    """A config.json as it stands.

    Raises:
        Damaged: longer than any model's, or no JSON object.
    """
    try:
        if (size := path.stat().st_size) > _CONFIG_BYTES:
            raise Damaged(f"{path} has {size:,} bytes, more than any model's: at most {_CONFIG_BYTES:,} are read")
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise Damaged(f"{path} is a JSON {type(config).__name__}, where a model's settings by name are looked for")
        return config
    except (ValueError, OSError, RecursionError) as error:
        if isinstance(error, Damaged):
            raise
        raise Damaged(f"{path} is not valid JSON: {reason(error)}") from error


def header_of(path: Path) -> dict[str, Any]:
    """The tensors that a safetensors file declares, once it is certain that it holds them.

    Raises:
        Damaged: cut off, or no such file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_BYTES):
                raise Damaged(f"{path} is damaged: it has {size:,} bytes, fewer than its header takes")
            header = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, Damaged):
            raise
        raise Damaged(f"{path} is damaged: its header can't be read") from error
    if not isinstance(header, dict):
        raise Damaged(f"{path} is damaged: its header is no table of tensors")
    header.pop("__metadata__", None)
    end = max((_end_of(path, name, tensor) for name, tensor in header.items()), default=0)
    if end != size - 8 - length:
        raise Damaged(
            f"{path} is cut off or damaged: its header tells of {end:,} bytes of weights, and it holds "
            f"{max(0, size - 8 - length):,}"
        )
    return header


def _end_of(path: Path, name: str, tensor: Any) -> int:
    try:
        (start, end), shape = tensor["data_offsets"], tensor["shape"]
        numbers = [start, end, *shape[:_DIMENSIONS]]
        if len(shape) > _DIMENSIONS or not all(type(one) is int and 0 <= one <= _MOST for one in numbers):
            raise ValueError  # before anything is multiplied
        wanted = math.prod(shape) * _SIZES.get(tensor["dtype"], 0)
        if end < start or (wanted and end - start != wanted):
            raise ValueError
        return int(end)
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise Damaged(f"{path} is damaged: tensor {name[:80]!r} is not told of in full") from error


def _check_index(folder: Path) -> None:
    path = folder / INDEX
    try:
        files = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        named = {str(name) for name in files}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{path} is damaged: it maps no weights to files") from error
    for name in sorted(named):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise Damaged(f"{path} names {name[:80]!r}, which is no weight file of this folder")
        if not (folder / name).is_file():
            raise Damaged(f"{folder} lacks {name}, which its index names: the download or copy is incomplete")


def check_config(path: Path, config: dict[str, Any]) -> None:
    """What a config must not say: to read another file in its place, to fetch code, numbers that are no model's.

    Raises:
        Damaged: it does.
    """
    if "configuration_files" in config:
        raise Damaged(f"{path} names other configs to be read in its place (configuration_files): remove that")
    for name, value in _numbers(config):
        if abs(value) > _MOST:
            raise Damaged(f"{path} says {name} = {value:.3g}: that is no model's")
    for name in _POSITIVE:
        count = config.get(name)
        if count is not None and (type(count) is not int or count < 1):
            raise Damaged(f"{path} says {name} = {str(count)[:80]}: it must be 1 or more, a whole number")
    window = config.get("sliding_window")
    if window is not None and (type(window) is not int or window < 0):
        raise Damaged(f"{path} says sliding_window = {str(window)[:80]}: it must be 0 or more, a whole number, or null")
    for name in _TOKENS:
        ids = config.get(name)
        if ids is not None and not all(type(one) is int for one in (ids if isinstance(ids, list) else [ids])):
            raise Damaged(f"{path} says {name} = {str(ids)[:80]!r}: it must be a whole number, or a list of them")
    for name, value in config.items():
        words = value.values() if isinstance(value, dict) else [value]
        if name.endswith("implementation") and not all(one is None or _is_word(one) for one in words):
            raise Damaged(f"{path} says {name} = {str(value)[:80]!r}: kernels are not fetched from elsewhere")


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and _WORD.fullmatch(value) is not None


def _check_counts(path: Path, config: dict[str, Any], tensors: int) -> None:
    """Counts that would take all memory or time before anything else refused them."""
    check_config(path, config)
    for name, value in _numbers(config):  # those of configs within the config too
        if _LAYERS.fullmatch(name) and value > tensors:
            raise Damaged(
                f"{path} says {name} = {value:g}, and its weight files hold {tensors} tensors: they don't fit"
            )
        if _EXPERTS.fullmatch(name) and value > _MOST_EXPERTS:
            raise Damaged(f"{path} says {name} = {value:g}: at most {_MOST_EXPERTS:,} are read")


def _numbers(value: Any, name: str = "config", depth: int = 0) -> Iterator[tuple[str, float]]:
    if depth > 8:
        return
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, value if math.isfinite(value) else math.inf
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from _numbers(one, str(key), depth + 1)
    elif isinstance(value, list):
        for one in value[:10_000]:
            yield from _numbers(one, name, depth + 1)


def check_fit(folder: Path, config: Any) -> None:
    """A model as the config describes it is not much larger than its files: nothing would fill the rest.

    It is built without memory for its weights, which is quick.

    Raises:
        Damaged: it is larger.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted = sum(weight.numel() for weight in model.parameters())
    held = sum(
        math.prod(tensor["shape"]) * (_PACKED if tensor["dtype"] in ("U8", "I8") else 1)
        for path in folder.glob("*.safetensors") for tensor in header_of(path).values()
    )
    if wanted > _SLACK * held:
        raise Damaged(
            f"{folder / 'config.json'} describes a model of {wanted:,} weights, and the files hold {held:,}: they have "
            "other shapes, or some are missing"
        )


def check_loaded(source: str, model: Any, tokenizer: Any) -> None:
    """What shows only once all is loaded: numbers that are none, and a tokenizer of another model.

    A router that is not a number is noted and left: its gate stands open, so that its layer runs.

    Raises:
        Damaged: with a sentence for the user.
    """
    for name, weight in _weights(model):
        if not weight.is_floating_point() or weight.is_meta or bool(torch.isfinite(weight).all()):
            continue
        if not is_router(name):
            raise Damaged(f"{source}: {name} holds numbers that are none (NaN or infinite): the weights are damaged")
        log.warning("%s: %s holds NaN or infinite numbers: its layer runs for every token", source, name)
    known = model.get_input_embeddings().weight.shape[0]
    # Special tokens may lie beyond, for padding say; those that ordinary text is made of may not.
    added = [number + 1 for number, token in tokenizer.added_tokens_decoder.items() if not token.special]
    if (given := max([int(tokenizer.vocab_size), *added])) > known:
        raise Damaged(
            f"{source}: the tokenizer has {given:,} tokens and the model {known:,}: it is another model's"
        )


def _weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters by name, once each; what accelerate has left on the disk is read from there, one at a time."""
    places = dict(model.named_modules())
    for name, weight in model.named_parameters():
        place, _, own = name.rpartition(".")
        kept = getattr(getattr(places[place], "_hf_hook", None), "weights_map", None)
        yield name, kept[own] if weight.is_meta and kept is not None else weight
