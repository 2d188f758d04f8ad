"""ONNX Runtime GenAI: the export with its model builder, and its engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from benchmarks.peers.engine import Engine, Fed, FloatArray, Settings, Unsupported
from benchmarks.peers.files import made
from benchmarks.peers.host import first_line


def write_onnx(model: Any, out: Path, dtype: str) -> None:
    """Export with GenAI's model builder, logits for the last token alone."""
    from onnxruntime_genai.models import builder

    precision = {"f32": "fp32", "bf16": "bf16"}[dtype]
    staged, cache = out.with_name("source"), out.with_name("cache")
    stage(model, staged)
    places = ("", str(staged), str(out), precision, "cpu", str(cache))
    options = builder.parse_extra_options(*places, ["prune_lm_head=true", "hf_token=false"])
    builder.create_model(*places, **options)


def stage(model: Any, folder: Path) -> None:
    """Save what the builder reads: weights, special tokens, and a tokenizer, which it wants but which is not used."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    model.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["bos_token_id"] = config["eos_token_id"] = config["pad_token_id"] = 0
    path.write_text(json.dumps(config))
    (folder / "generation_config.json").unlink(missing_ok=True)
    words = Tokenizer(WordLevel({"<0>": 0}, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<0>").save_pretrained(folder)


class OnnxRuntime(Fed):
    """ONNX Runtime GenAI on an exported folder; a generator is made for every run, outside of the time."""

    def __init__(self, folder: Path, dtype: str, settings: Settings) -> None:
        import onnxruntime_genai

        self.name, self.kind = f"ONNX Runtime {dtype}", dtype
        self.note = "GenAI, CPU, one buffer for past and present keys and values"
        self._api = onnxruntime_genai
        self._generator: Any = None
        onnxruntime_genai.disable_telemetry_events()
        config = onnxruntime_genai.Config(str(folder))
        session = {"intra_op_num_threads": settings.threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = onnxruntime_genai.Model(config)

    def reset(self, room: int) -> None:
        """A fresh generator."""
        self._generator = None  # frees its buffers before there are new ones
        parameters = self._api.GeneratorParams(self._model)
        parameters.set_search_options(max_length=room, batch_size=1, do_sample=False)
        self._generator = self._api.Generator(self._model, parameters)

    def feed(self, ids: list[int]) -> None:
        """Append, which runs them."""
        self._generator.append_tokens(np.array(ids, dtype=np.int32))

    def last_logits(self) -> FloatArray:
        """Of the last token fed."""
        found: FloatArray = self._generator.get_logits()[0, -1]
        return found


def ort_engines(model: Any, settings: Settings, store: Path) -> list[Engine]:
    """ONNX Runtime GenAI on the weights."""
    import onnxruntime_genai  # noqa: F401  (before files are written for it)

    dtype = settings.dtype
    folder = made(store / f"onnx-{dtype}", write_onnx, model, dtype)
    try:
        return [OnnxRuntime(folder, dtype, settings)]
    except Exception as error:
        if dtype == "f32":
            raise
        raise Unsupported(f"{dtype} is not supported by this CPU build ({first_line(error)})") from error
