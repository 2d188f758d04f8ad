"""Models in memory: loaded once, shared between users, let go when unused."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from app.errors import UserError
from app.service.choice import DTYPES, Options, parse
from app.service.faults import sentence_of
from app.service.loaded import Loaded
from app.service.paths import check_folder_within, real
from app.service.requests import Limits
from app.service.zero import Zero
from modification import MoDModel
from modification.config import MoDConfig
from modification.executor import executor_of
from modification.hub import broken_off
from modification.loading import HUB_ID, as_mod, check_folder, load_dense_or_mod, on_disk, resolve
from modification.measure.cost import ModelShape
from modification.measure.memory import available_bytes, weight_bytes

_PAIR = 2  # models that a chat holds together
_NAME = 4096  # characters of a name: as many as a path may have
_BEAT = 0.25  # seconds between two looks at a load
_LOAD_ROOM = 1.2  # files are read into buffers beside the weights


class Library:
    """Models by name, folder or Hub id.

    Args:
        listed: model folders, or Hub ids, by the name shown.
        limits: how many are held, for how long, and whether others than the listed may be opened.
        zero: runs in forks that get a GPU, where there is such a thing.
    """

    def __init__(self, listed: dict[str, Path | str], limits: Limits, zero: Zero | None = None) -> None:
        self.listed, self.limits, self.zero = dict(listed), limits, zero
        self._models: dict[str, Loaded] = {}
        if zero is not None:
            zero.models = self._models
        self._loading: dict[str, _Job] = {}
        self._table = threading.Lock()
        self._turn = threading.Lock()  # one load at a time

    def held(self) -> list[str]:
        """Names of the models in memory, the least recently used first."""
        with self._table:
            return list(self._models)

    @contextlib.contextmanager
    def lend(self, name: str) -> Iterator[Loaded]:
        """The model of that name, kept in memory until given back.

        Raises:
            UserError: it can't be loaded; the message says why.
        """
        key, loaded = self.check(name), None
        while loaded is None:  # let go again between being loaded and being lent: once more
            for _ in self.loading(key):
                pass
            with self._table:
                if (loaded := self._touch(key)) is not None:
                    loaded.users += 1
        try:
            yield loaded
        finally:
            with self._table:
                loaded.users -= 1
                loaded.used = time.monotonic()

    def open(self, name: str) -> Loaded:
        """The model, loaded if need be."""
        with self.lend(name) as loaded:
            return loaded

    def loading(self, name: str) -> Iterator[Loading]:
        """Load a model in the background: how far it is, until it is there. Whoever stops reading leaves a load to
        finish for the next one who asks; a download ends once nobody reads, and goes on from there the next time.

        Raises:
            UserError: it can't be loaded.
        """
        key = self.check(name)
        with self._table:
            if self._touch(key) is not None:
                return
            job = self._loading.get(key)
            if job is None:
                job = _Job()
                job.readers = 1  # before it looks
                threading.Thread(target=self._work, args=(key, job), daemon=True).start()  # may fail
                self._loading[key] = job
            else:
                job.readers += 1
        try:
            while not job.done.wait(_BEAT):
                yield Loading(time.monotonic() - job.began, job.here, job.total)
        finally:
            with self._table:
                job.readers -= 1
        if job.error is not None:
            raise UserError(job.error)

    def broken_off(self) -> dict[str, int]:
        """Unfinished downloads by model, with the bytes that are here; none where only the list is open."""
        return broken_off() if self.limits.free_models else {}

    def check(self, name: str) -> str:
        """The name as it is looked up; UserError if nothing can be loaded by it."""
        key = name.strip() if isinstance(name, str) else ""
        if not key:
            raise UserError("Choose a model, or type the path of a model folder.")
        if len(key) > _NAME:
            raise UserError(f"A model's name has at most {_NAME:,} characters; this one has {len(key):,}.")
        source, options = parse(key)
        if parse(options.label(source)) != (source, options):
            raise UserError(f"{key[:80]} is no name of a model: give brackets once, at the end.")
        if options.device == "cuda" and not torch.cuda.is_available():
            raise UserError("There is no CUDA device on this machine: choose cpu, or best.")
        if source not in self.listed and not self.limits.free_models:
            raise UserError(f"{source} is not among the models offered here. Choose one from the list.")
        if source not in self.listed and (not HUB_ID.fullmatch(source) or real(source).exists()):
            check_folder_within(source, self.limits.folders)
        return options.label(source)

    def needs(self, name: str) -> tuple[int, int]:
        """Bytes that loading a model takes (estimated), and bytes that are free (measured).

        Raises:
            UserError: no such model.
        """
        source, options = parse(self.check(name))
        with self._about(options.label(source)) as (shown, _):
            return self._needs(resolve(shown), options)

    def mod_layers(self, name: str) -> tuple[int, ...]:
        """Indices of a model's MoD layers, from memory or from its folder's config; empty where that can't be told."""
        try:
            key = self.check(name)
            if (found := self._held(key)) is not None:
                return found.shape.mod_layers
            folder = Path(self.listed.get(parse(key)[0], parse(key)[0]))
            config = check_folder(folder)
            return MoDConfig.from_dict(config["mod"]).layer_indices(int(config["num_hidden_layers"]))
        except (UserError, ValueError, KeyError, TypeError, OSError):
            return ()

    def unload_idle(self, now: float | None = None) -> list[str]:
        """Let go of models that nobody has used for a while; their names."""
        now = time.monotonic() if now is None else now
        with self._table:
            idle = [k for k, m in self._models.items() if not m.users and now - m.used > self.limits.idle]
            for key in idle:
                del self._models[key]
        return idle

    def _held(self, key: str) -> Loaded | None:
        """A model in memory, marked as used last."""
        with self._table:
            return self._touch(key)

    def _touch(self, key: str) -> Loaded | None:
        """The same, with the table locked already."""
        if key in self._models:
            self._models[key] = self._models.pop(key)
            self._models[key].used = time.monotonic()
        return self._models.get(key)

    def _work(self, key: str, job: _Job) -> None:
        try:
            place = self._fetch(key, job)  # a download keeps no other load waiting
            with self._turn:
                self._put(key, self._load(key, place))
        except BaseException as error:  # whoever waits must hear of it
            sentence = sentence_of(error)
            job.error = sentence or f"{key} could not be loaded: {type(error).__name__}."
            if sentence is None:
                raise
        finally:
            with self._table:
                self._loading.pop(key, None)
            job.done.set()

    def _put(self, key: str, loaded: Loaded) -> None:
        with self._table:
            spare = [name for name, model in self._models.items() if not model.users]
            while len(self._models) >= self.limits.models and spare:
                del self._models[spare.pop(0)]
            self._models[key] = loaded

    def _check_room(self, key: str, place: str, options: Options) -> None:
        """A model and its weights must fit; models that nobody uses make room."""
        with self._table:
            lent = sum(model.users > 0 for model in self._models.values())
        if lent >= max(self.limits.models, _PAIR):
            raise UserError(
                f"{lent} models are in use here, as many as are held at a time. Try again once one of them is free."
            )
        taken, free = self._needs(place, options)
        if taken > free and self._let_go():
            taken, free = self._needs(place, options)
        if taken > free:
            raise UserError(
                f"{key} needs about {taken / 1e9:.1f} GB (estimated), and beside what is kept for keys and values "
                f"{free / 1e9:.1f} GB are free: choose a smaller model, 4-bit or 8-bit weights, or close something."
            )

    def _needs(self, place: str, options: Options) -> tuple[int, int]:
        """Bytes that weights take, and that are free for them: keys and values keep what they were promised."""
        taken = weight_bytes(place, DTYPES.get(options.dtype or ""), options.quantization)
        free = sum(map(available_bytes, options.places))
        return int(taken * _LOAD_ROOM), free - min(self.limits.cache_bytes, free // 4)

    def _let_go(self) -> int:
        """Drop all models that nobody uses right now; how many there were."""
        with self._table:
            spare = [key for key, model in self._models.items() if not model.users]
            for key in spare:
                del self._models[key]
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return len(spare)

    def _fetch(self, key: str, job: _Job) -> str:
        """The model's folder, downloaded if need be."""
        with self._about(key) as (shown, _):
            return on_disk(shown, progress=job.fetched)

    @contextlib.contextmanager
    def _about(self, key: str, place: str = "") -> Iterator[tuple[str, Options]]:
        """Where the model is, and its options; what is wrong with it is a sentence that calls it what the user did.
        ``place``: the folder that it was fetched into.
        """
        source, options = parse(key)
        shown = str(self.listed.get(source, source))
        try:
            yield shown, options
        except ValueError as error:  # LoadError and ConversionError are sentences too
            said = str(error).replace(place, source) if place else str(error)
            raise UserError(said.replace(f"{Path(shown)}", source)) from error

    def _load(self, key: str, place: str) -> Loaded:
        with self._about(key, place) as (shown, options):
            self._check_room(key, place, options)
            found, tokenizer = load_dense_or_mod(
                place, dtype=DTYPES.get(options.dtype or ""),
                quantization=options.quantization,  # type: ignore[arg-type]
                device_map=options.spread,
            )
            trained, model = isinstance(found, MoDModel), as_mod(found)
            executor_of(model)  # compiled and checked now, not in the first run
            return Loaded(key, model, tokenizer, ModelShape.of(model), trained, shown, zero=self.zero)


@dataclass(frozen=True, slots=True)
class Loading:
    """How far a load is: seconds, and bytes that are here and that there will be where files are being fetched."""

    seconds: float
    here: int = 0
    total: int = 0


class _Job:
    """A load under way."""

    def __init__(self) -> None:
        self.done, self.began = threading.Event(), time.monotonic()
        self.error: str | None = None
        self.here = self.total = self.readers = 0

    def fetched(self, here: int, total: int) -> None:
        """Told by a download as it goes."""
        self.here, self.total = here, total
        if not self.readers:
            raise UserError("The download was stopped. What is here already is kept: load the model again to go on.")
