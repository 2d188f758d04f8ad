"""What a run asks of its folder, its machine and its processes before it begins, and what it finds there.

Boundary: files and refusals; nothing here trains.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import PreTrainedModel

from modification.config import MoDConfig
from modification.conversion.data import Text
from modification.conversion.recipes import Recipe

RUN, REPORT, CHECKPOINTS = "run.json", "report.json", "checkpoints"


@dataclass(frozen=True, slots=True)
class Options:
    """What a run does beside its recipe.

    Attributes:
        resume: go on from the last checkpoint.
        keep_adapter: leave LoRA's change beside the model instead of merging it.
        report_to: Trainer's trackers, as it names them.
        save_steps: steps between checkpoints; None: a tenth of the run, 20 to 200.
        fsdp: shard the model over processes (FSDP2), layer by layer.
        compile: compile the MoD layers' blocks, unless they have the paper's gate, the teacher's layers, and a loss
            with a divergence from a teacher in it (once, up to a minute; needs a C++ compiler on CPUs). Layers that are
            no MoD layers are not compiled.
        facts: more for the report.
    """

    resume: bool = False
    keep_adapter: bool = False
    report_to: Sequence[str] = ()
    save_steps: int | None = None
    fsdp: bool = False
    compile: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


def processes() -> tuple[int, int]:
    """This process's rank, and how many processes there are, as launchers tell them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def prepare_folder(
    out: Path, model: PreTrainedModel, recipe: Recipe, config: MoDConfig, text: Text, options: Options
) -> str | None:
    """Take ``out`` for this run, the first process first; the checkpoint to go on from, if any.

    Raises:
        FileExistsError, OSError, ValueError: as ``train`` has them.
    """
    _check_launch(recipe, options)
    with _first_process_first():
        last = _claim(out, options.resume)
        _check_room(out, model, recipe)
        _check_same_run(out / RUN, recipe, config, text, options, resumed=last is not None)
    return last


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint; a half-written one, left by a kill, is removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    while found:
        if _is_json(found[-1] / "trainer_state.json"):  # written last
            return str(found[-1])
        shutil.rmtree(found.pop())
    return None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _claim(out: Path, resume: bool) -> str | None:
    """Take the folder for this run; the checkpoint to go on from, if any."""
    if (out / REPORT).exists():
        raise FileExistsError(f"{out} holds a finished conversion: choose another folder, or remove it first")
    if out.is_dir() and not (out / RUN).is_file() and any(out.iterdir()):
        raise FileExistsError(f"{out} holds files that are no conversion's: choose another folder")
    last = last_checkpoint(out / CHECKPOINTS)
    if last and not resume:
        raise FileExistsError(f"{out} holds an unfinished conversion: add --resume to go on, or remove the folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.write_text("")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"{out} can't be written: {error.strerror or error}") from error
    return last


def _check_room(out: Path, model: PreTrainedModel, recipe: Recipe) -> None:
    """Three checkpoints may lie there at a time, of weights and Adam's moments of those trained; and the model."""
    weights = sum(weight.numel() * 4 for weight in model.parameters())
    copies = 0 if recipe.fit else 9 if recipe.tune == "full" else 3
    wanted, free = (copies + 1) * weights, shutil.disk_usage(out).free
    if free < wanted:
        raise OSError(f"{out} has {free / 1e9:.1f} GB free and checkpoints may take {wanted / 1e9:.1f} GB (estimated): "
                      "make room, or choose a folder on another disk")


def _check_launch(recipe: Recipe, options: Options) -> None:
    """What this machine or these processes can't do, before anything is done."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # torch takes no other
    if options.compile and not torch.cuda.is_available() and not shutil.which(compiler):
        raise ValueError(f"compiling needs a C++ compiler, and {compiler} is not there: leave --compile out")
    if recipe.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise ValueError(f"optimizer='muon' needs torch 2.9 or newer; this is {torch.__version__}: choose 'adamw'")
    if recipe.optimizer == "muon" and options.fsdp:
        raise ValueError("Muon's steps need whole matrices, which FSDP cuts up: choose 'adamw', or leave FSDP out")
    (_, world), gpus = processes(), torch.cuda.device_count()
    if options.fsdp and (world == 1 or not gpus):
        raise ValueError("FSDP needs several processes (accelerate launch), each with an accelerator of its own")
    if options.fsdp and recipe.tune == "lora":
        raise ValueError("FSDP with LoRA is not supported: tune all weights, or leave FSDP out")
    if world == 1 and gpus > 1 and recipe.steps:
        raise ValueError(f"one process and {gpus} GPUs: start with accelerate launch, or set CUDA_VISIBLE_DEVICES=0")
    if recipe.batch % (recipe.accumulate * world):
        raise ValueError(f"a batch of {recipe.batch} rows can't be split over {world} processes and "
                         f"{recipe.accumulate} parts: choose another --batch")


@contextlib.contextmanager
def _first_process_first() -> Iterator[None]:
    """Where there are several processes, the first one goes through before the others."""
    if processes()[1] == 1:
        yield
        return
    # Not told of a CPU, it takes several processes that a launcher started there for one each.
    with PartialState(cpu=not torch.cuda.is_available()).main_process_first():
        yield


def _check_same_run(
    path: Path, recipe: Recipe, config: MoDConfig, text: Text, options: Options, resumed: bool
) -> None:
    """A resumed run must be the one that was started: same recipe, settings and text."""
    run = {
        **dataclasses.asdict(recipe), **config.to_dict(), "training_tokens": int(text.blocks.size),
        "sources": list(text.names), "reweight": text.reweight, "parent": options.facts.get("parent"),
        "text": hashlib.sha256(text.blocks.tobytes() + text.held_out.tobytes()).hexdigest()[:16],
    }
    run = json.loads(json.dumps(run))
    if resumed and path.is_file():
        # A setting that an earlier version did not know was as it is by default.
        usual = {one.name: one.default for one in dataclasses.fields(Recipe)}
        before = {**usual, **json.loads(path.read_text(encoding="utf-8"))}
        changed = [f"{name} {before.get(name)} (now {run[name]})" for name in run if before.get(name) != run[name]]
        if changed:
            raise ValueError(f"{path.parent} was started with {', '.join(changed)}: resume with the same settings")
    if processes()[0] == 0:
        path.write_text(json.dumps(run, indent=1), encoding="utf-8")


@contextlib.contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A folder to write a model to; its files then move into ``out``, each whole, the report last: it says that all is
    there. A kill before that leaves ``out`` without a model, and its last checkpoint."""
    aside = out / "partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    yield aside
    for path in sorted(aside.iterdir(), key=lambda path: path.name == REPORT):
        if path.is_dir():
            shutil.rmtree(out / path.name, ignore_errors=True)
        path.replace(out / path.name)
    aside.rmdir()


@contextlib.contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """What writers raise on a full disk, as an OSError."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{out}: weights could not be written ({error}); the last checkpoint stays") from error
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error) and "file write failed" not in str(error):
            raise
        raise OSError(f"{out}: a checkpoint could not be written, is the disk full? The last one stays") from error
