"""Models from folders and the Hub: checked first, safetensors only, never remote code."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from modification.architectures import FAMILIES, PREFIX, structured
from modification.chat import written
from modification.config import MoDConfig
from modification.errors import LoadError, foreseen, out_of_memory, reason
from modification.hub import Progress, fetch
from modification.integrity import check_files, check_fit, check_loaded, check_sizes, header_of, read_config
from modification.model import MoDModel, convert, register_family

ADAPTER = "adapter"  # folder within a model's that holds a low-rank change of its weights
Quantization = Literal["4bit", "8bit"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_PROBE = "One day, 2 friends met."  # text that any tokenizer has to take
_LOCAL_PREFIXES = (".", "/", "~")


def load(
    path_or_hub_id: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    quantization: Quantization | None = None,
    revision: str | None = None,
) -> tuple[PreTrainedModel, Any]:
    """A MoD model, ready to run, and its tokenizer.

    A dense model is converted with default settings: its routers are untrained, so that its p is no
    useful dial yet.

    Args:
        path_or_hub_id: a folder, or ``owner/name`` on the Hub.
        dtype: of the weights; by default what the files hold.
        device_map: as in transformers, e.g. ``"auto"``.
        quantization: ``"4bit"`` or ``"8bit"`` weights through bitsandbytes; routers stay in full precision.
        revision: branch, tag or commit on the Hub.

    Raises:
        LoadError: no such folder, not a model, a family that isn't supported, or files that don't fit.
    """
    model, tokenizer = load_dense_or_mod(
        path_or_hub_id, dtype=dtype, device_map=device_map, quantization=quantization, revision=revision
    )
    return as_mod(model), tokenizer


def as_mod(model: PreTrainedModel, layers: Any = "inner") -> PreTrainedModel:
    """A MoD model as it is; a dense one converted, with the same fresh routers each time."""
    if isinstance(model, MoDModel):
        return model
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return convert(model, MoDConfig(layers=layers))


def load_dense_or_mod(
    path_or_hub_id: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    quantization: Quantization | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> tuple[PreTrainedModel, Any]:
    """Like :func:`load`, but a dense model stays dense; ``progress`` is told of a download, see ``hub.fetch``."""
    source = on_disk(path_or_hub_id, revision, progress)
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    weights: dict[str, Any] = {"use_safetensors": True, "dtype": dtype or "auto", "device_map": device_map}
    if quantization is not None:
        weights["quantization_config"] = _quantization(quantization)
        weights["dtype"] = dtype or torch.bfloat16  # what is not quantised; fp16 crawls on CPUs
    with _sentence(f"{path_or_hub_id}: config.json does not describe a model"):
        _know_family(source)
        config = AutoConfig.from_pretrained(source, **options)
    with _sentence(f"{path_or_hub_id}: its tokenizer can't be read"):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    with _sentence(f"{path_or_hub_id}: config.json does not describe a model"):
        check_fit(Path(source), config)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source, config=config, **options, **weights, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:
        if out_of_memory(error):
            raise
        raise LoadError(f"{path_or_hub_id} could not be loaded: {reason(error)}") from error
    _check_keys(str(path_or_hub_id), info)
    _put_on_adapter(model, source)
    check_loaded(str(path_or_hub_id), model, tokenizer)
    with _sentence(f"the tokenizer of {path_or_hub_id} fails"):
        tokenizer.decode(tokenizer(_PROBE)["input_ids"])
    model.eval()
    if quantization is not None or getattr(config, "quantization_config", None):
        _try_quantized(model, quantization or "quantised")
    return model, tokenizer


@contextlib.contextmanager
def _sentence(what: str) -> Iterator[None]:
    """Whatever a damaged or hostile folder makes the readers raise becomes a LoadError that says so."""
    try:
        yield
    except LoadError:
        raise
    except BaseException as error:
        if not foreseen(error):
            raise
        raise LoadError(f"{what} ({reason(error)})") from error


def _check_keys(source: str, info: dict[str, Any]) -> None:
    """Every weight of the model came from the files, in its own shape."""
    if wrong := sorted(info["mismatched_keys"], key=str):
        name, found, wanted = wrong[0]
        raise LoadError(
            f"{source}: {len(wrong)} of its weights have other shapes than its config says; {name} is {list(found)} in "
            f"the files and would be {list(wanted)}"
        )
    if missing := sorted(info["missing_keys"]):
        raise LoadError(
            f"{source} lacks {len(missing)} of the model's weights, {missing[0]} among them: the files are "
            "incomplete, or of another model"
        )


def on_disk(path_or_hub_id: str | Path, revision: str | None = None, progress: Progress | None = None) -> str:
    """The folder with a model's files, fetched from the Hub if need be, and checked.

    Raises:
        LoadError: no such model, or files that are damaged.
    """
    source = resolve(path_or_hub_id)
    if not Path(source).is_dir():
        source = fetch(source, revision, progress)
        check_folder(Path(source))
    return source


def _put_on_adapter(model: Any, source: str) -> None:
    """A low-rank change that a conversion left beside the parent's weights, in a local folder."""
    folder = Path(source) / ADAPTER
    if not folder.is_dir():
        return
    if not (folder / "adapter_model.safetensors").is_file():
        raise LoadError(f"{folder} holds no adapter_model.safetensors; other formats are not read")
    with _sentence(f"{folder} could not be read"):
        held = {_adapted(name) for name in header_of(folder / "adapter_model.safetensors")}
        targets = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("target_modules")
        if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
            raise LoadError(f"{folder / 'adapter_config.json'} must list its target_modules by name")
        try:
            model.load_adapter(str(folder))
        except ImportError:
            raise LoadError(f"{folder} holds an adapter, and reading it needs peft: pip install peft") from None
    wanted = {_adapted(name) for name, _ in model.named_parameters() if ".lora_" in name}
    if odd := sorted(wanted ^ held):
        raise LoadError(
            f"{folder} has {len(held)} tensors and the model takes {len(wanted)}; {odd[0][:80]} is on one side alone: "
            "it is incomplete, or another model's"
        )


def _adapted(name: str) -> str:
    """A tensor of an adapter, in its file or in the model, by one name."""
    return name.removeprefix("base_model.model.").replace(".default.", ".")


def _try_quantized(model: Any, quantization: str) -> None:
    """Kernels for quantised weights have conditions of their own, which show only when they run."""
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    except Exception as error:
        raise LoadError(
            f"{quantization} weights of this model can't run on {model.device.type} ({reason(error)}): "
            "choose another quantization, or none"
        ) from error


def encode_prompt(tokenizer: Any, prompt: str, chat: bool = True) -> list[int]:
    """Token ids of a prompt: as a user's message if the tokenizer has a chat template and ``chat`` is set.

    Raises:
        ValueError: the template fails.
    """
    if chat and tokenizer.chat_template:
        text = written(tokenizer, [{"role": "user", "content": prompt}])
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(prompt)["input_ids"])


def resolve(path_or_hub_id: str | Path) -> str:
    """A checked local folder, or a Hub id, as a string for transformers.

    Raises:
        LoadError: neither, or a folder without a usable config.
    """
    text = str(path_or_hub_id)
    try:
        folder = Path(text).expanduser()
        found = folder.is_dir()
    except (RuntimeError, OSError, ValueError):  # ~someone who does not exist; a name too long, or with a null byte
        found = False
    if found:
        check_folder(folder)
        return str(folder)
    if text.startswith(_LOCAL_PREFIXES) or not HUB_ID.fullmatch(text):
        raise LoadError(f"{text!r} is neither a folder here nor a Hub id of the form owner/name")
    return text


def check_folder(folder: Path) -> dict[str, Any]:
    """The parsed config of a model folder.

    Raises:
        LoadError: the folder is no model folder, or of a family that isn't supported.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise LoadError(f"{folder} is not a model folder: it has no config.json")
    check_sizes(folder)
    config = read_config(path)
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise LoadError(f"{path} names no model_type")
    dense = model_type.removeprefix(PREFIX)
    if dense not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise LoadError(f"model type {model_type!r} in {folder} is no causal language model of this transformers")
    if not any(folder.glob("*.safetensors")):
        raise LoadError(f"{folder} holds no .safetensors weights; other formats are not read")
    check_files(folder, config)
    if model_type.startswith(PREFIX):
        try:
            MoDConfig.from_dict(cast(Any, config.get("mod")))
            if dense not in FAMILIES:
                structured(dense, config.get("mod_structure"))
        except ValueError as error:
            raise LoadError(f"{path}: {error}") from error
    return dict(config)


def _know_family(source: str) -> None:
    """Register the MoD type of a converted model whose family is known by its saved structure alone."""
    config, _ = PreTrainedConfig.get_config_dict(source, local_files_only=True)
    model_type = str(config.get("model_type"))
    dense = model_type.removeprefix(PREFIX)
    if dense != model_type and dense not in FAMILIES:
        register_family(structured(dense, config.get("mod_structure")))


def _quantization(bits: str) -> Any:
    from transformers import BitsAndBytesConfig

    # bitsandbytes replaces Linear layers; head and routers are compared or sampled from, so they stay as they are.
    skip = ["router", "lm_head", "embed_out"]
    if bits == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=skip,
        )
    if bits == "8bit":
        # It says at every product that it computes in float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    raise LoadError(f"quantization={bits!r}: expected '4bit', '8bit' or None")
