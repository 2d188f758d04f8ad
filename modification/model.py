"""Dense model <-> MoD model: convert, restore, load, and the model class that carries a call's routing."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from modification.architectures import (
    FAMILIES,
    PREFIX,
    ConversionError,
    Family,
    entry_bytes,
    family_of,
    structure_of,
    window_of,
    windows_of,
)
from modification.cache import RaggedCache
from modification.config import MoDConfig, check_threshold
from modification.errors import out_of_memory, reason
from modification.layer import CALL, CURRENT_CALL, MoDLayer, routed_class
from modification.routing import INITIAL_BIAS, OPEN, Router, RoutingCall, RunBlock
from modification.threads import heed_limits

PATHS = ("gathered", "masked")
RULES = ("threshold", "top-k")
Thresholds = float | Sequence[float] | Tensor


@dataclass
class MoDCausalLMOutput(CausalLMOutputWithPast):
    """The stock output with, per MoD layer, the gates and decisions of this call's tokens.

    Attributes:
        router_scores: g in [0, 1] per MoD layer, [B, T] float32 each; with ``output_router_scores=True``.
        routed: whether the token ran there, [B, T] bool each; likewise.
    """

    router_scores: tuple[Tensor, ...] | None = None
    routed: tuple[Tensor, ...] | None = None


class Slot:
    """Room beside a model for what is worked out from its weights; stays behind when the model is copied or saved.

    Attributes:
        value: what was worked out, or None.
        signature: the state of the weights it was worked out from.
    """

    def __init__(self) -> None:
        self.value: Any = None
        self.signature: tuple[Any, ...] = ()

    def __deepcopy__(self, memo: Any) -> Slot:
        return Slot()

    def __reduce__(self) -> Any:
        return Slot, ()


class MoDModel(PreTrainedModel, GenerationMixin):
    """Mixed in before a family's causal LM; made by :func:`mod_model_class`."""

    family: Family
    takes_positions: bool  # whether the dense parent's forward has position_ids
    config: Any
    executor_slot: Slot

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        _install(self, self.mod_config)

    @property
    def mod_config(self) -> MoDConfig:
        """The model's MoD settings."""
        return MoDConfig.from_dict(self.config.mod)

    @property
    def mod_layers(self) -> tuple[int, ...]:
        """Indices of the MoD layers."""
        return self.mod_config.layer_indices(self.config.num_hidden_layers)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Sliding-window length of each layer in tokens, None where attention is full."""
        return windows_of(self.config)

    def new_cache(self) -> RaggedCache:
        """An empty cache for this model; belongs to one generation."""
        cache = RaggedCache(self.windows, self.mod_layers, entry_bytes(self.config, self.dtype))
        cache.owner = weakref.ref(self)
        return cache

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: RaggedCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        p: Thresholds | None = None,
        routing: str | None = None,
        rule: str = "threshold",
        between: Tensor | None = None,
        run_block: RunBlock | None = None,
        output_router_scores: bool = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MoDCausalLMOutput | tuple[Any, ...]:
        """The stock call, routed.

        Args:
            input_ids: [B, T].
            attention_mask: [B, past + T], 0 at padding, on either side.
            p: threshold for this call: a number, one per row [B], or one per row (or 1) and MoD layer [B or 1, M];
                the config's by default.
            routing: "gathered" really skips; "masked" computes all and hides (reference, training).
                By default masked while training, gathered otherwise.
            rule: "threshold", or "top-k", which looks ahead and is for training alone.
            between: for training, [B, M, T]: tokens whose value in a MoD layer is below 1 get that share of the
                block's output there, and teach their gate; the others' gates learn nothing from the loss.
            run_block: ``torch.compile(stock_block)``, to run MoD layers without a cache by compiled code, as pays in
                training; blocks with the paper's gate take no notice.
            position_ids: [B, T]; where they start anew in a row and there is neither mask nor cache, another packed
                document begins, which sees nothing of those before it.
            output_router_scores: fill ``router_scores`` and ``routed`` of the output.

        Raises:
            ValueError: a threshold, path, mask or cache that does not fit; the message says what would.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise ValueError("give input_ids or inputs_embeds")
        if use_cache is None:
            use_cache = bool(getattr(self.config, "use_cache", True)) and not self.training
        if use_cache and past_key_values is None:
            past_key_values = self.new_cache()
        check_cache(past_key_values)
        call = self._routing_call(given, attention_mask, past_key_values, p, routing)
        call.record, call.rule, call.between, call.run_block = output_router_scores, rule, between, run_block
        if rule not in RULES:
            raise ValueError(f"rule={rule!r}: expected one of {', '.join(RULES)}")
        if attention_mask is None and past_key_values is None and position_ids is not None:
            _note_documents(call, position_ids)
        if position_ids is not None and self.takes_positions:
            kwargs["position_ids"] = position_ids
        if self.family.passes_keywords:
            kwargs[CALL] = call
        token = CURRENT_CALL.set(call)
        try:
            out = super().forward(
                input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values,
                inputs_embeds=inputs_embeds, labels=labels, use_cache=use_cache, logits_to_keep=logits_to_keep,
                return_dict=True, **kwargs,
            )
        finally:
            CURRENT_CALL.reset(token)
        if past_key_values is not None:
            past_key_values.advance(given.shape[1])
        result = MoDCausalLMOutput(
            loss=out.loss, logits=out.logits, past_key_values=out.past_key_values,
            hidden_states=out.hidden_states, attentions=out.attentions,
        )
        if output_router_scores:
            result["router_scores"] = tuple(call.scores[layer] for layer in call.order)
            result["routed"] = tuple(call.routed[layer] for layer in call.order)
        return result.to_tuple() if return_dict is False else result

    def _routing_call(
        self, given: Tensor, attention_mask: Any, cache: RaggedCache | None, p: Thresholds | None, routing: str | None
    ) -> RoutingCall:
        config = self.mod_config
        path = routing or ("masked" if self.training else "gathered")
        if path not in PATHS:
            raise ValueError(f"routing={path!r}: expected one of {', '.join(PATHS)}")
        batch, tokens = given.shape[:2]
        past = 0 if cache is None else cache.get_seq_length()
        valid, places, shown = _places(attention_mask, batch, tokens, past, given.device)
        anchored = None
        if past < config.anchors or valid is not None:
            anchored = (places < config.anchors).expand(batch, tokens)
        order = config.layer_indices(self.config.num_hidden_layers)
        call = RoutingCall(
            config=config, p=thresholds(config.p if p is None else p, batch, len(order), given.device),
            path=path, columns=torch.arange(past, past + tokens, device=given.device),
            kernel=self.config._attn_implementation, order=order, valid=valid, anchored=anchored,
        )
        call.shown = shown
        return call

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Router):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} stores every token; a MoD model "
                "uses its own RaggedCache: leave cache_implementation unset"
            )
        cache = model_kwargs.get("past_key_values")
        check_cache(cache)
        if cache is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self.new_cache()


def thresholds(p: Thresholds, batch: int, layers: int, device: torch.device) -> Tensor:
    """``p`` as one threshold per row, [B, 1], or per row and MoD layer, [B, M]; float32, validated."""
    if isinstance(p, (int, float)):
        return torch.full((batch, 1), check_threshold(p), dtype=torch.float32, device=device)
    values = torch.as_tensor(p, dtype=torch.float32, device=device)
    if values.dim() < 2:
        values = values.reshape(-1, 1)
        if len(values) not in (1, batch):
            raise ValueError(f"p has {len(values)} values for a batch of {batch}: give one number, or one per row")
    elif values.dim() > 2 or values.shape[0] not in (1, batch) or values.shape[1] != layers:
        raise ValueError(f"p of shape {tuple(values.shape)}: per row and MoD layer it is [1 or {batch}, {layers}]")
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(f"p={values.tolist()}: every threshold must be a number from 0 to 1")
    return values.expand(batch, -1)


def check_cache(cache: object) -> None:
    """Refuse a cache that is not this project's."""
    if cache is not None and not isinstance(cache, RaggedCache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}, which stores every token: a MoD model needs the cache "
            "that model.new_cache() makes"
        )


def convert(model: PreTrainedModel, config: MoDConfig | None = None) -> PreTrainedModel:
    """Make a dense causal LM a MoD model, in place, its config object included; ``restore`` undoes it.

    Fresh routers let (almost) every token run. A probe input then checks that the model with its
    gates open gives the dense logits; if not, the model is restored and refused.

    Raises:
        ConversionError: the model can't be converted; says what was looked for and not found.
    """
    if isinstance(model, MoDModel):
        raise ConversionError(f"{type(model).__name__} is a MoD model already: restore(model) first to convert anew")
    config = config or MoDConfig()
    family = family_of(model)
    known = type(model.config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if not known or not isinstance(model, MODEL_FOR_CAUSAL_LM_MAPPING[type(model.config)]):
        raise ConversionError(f"{type(model).__name__}: looked for a causal language model with a head, found none")
    settings: Any = model.config
    config.layer_indices(settings.num_hidden_layers)
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise ConversionError(
            f"{type(model).__name__} is spread over devices by hooks that would bypass routing: convert it on one "
            "device, save it, then load the converted folder with a device map"
        )
    heed_limits()
    before, in_tuple = _probe_dense(model, family)
    family = dataclasses.replace(family, returns_tuple=in_tuple)
    dense_config: Any = type(settings)
    dense_class: Any = type(model)
    settings.__class__ = mod_config_class(dense_config)
    settings.mod = config.to_dict()
    if (structure := structure_of(family)) is not None:
        settings.mod_structure = structure
    model.__class__ = mod_model_class(dense_class, family)
    _install(model, config)
    try:
        difference = (_probe_open(model) - before).abs().max().item()
        if not difference <= _tolerance(before):
            raise ConversionError(
                f"{dense_class.__name__}: with every gate open the logits differ from the dense model's by "
                f"{difference:.2g} (at most {_tolerance(before):.2g} allowed); the layers do more than the family's"
            )
        if structure is not None:
            _check_paths(model)
    except Exception as error:
        restore(model)
        if structure is None or isinstance(error, ConversionError) or out_of_memory(error):
            raise
        raise ConversionError(
            f"{dense_class.__name__} is known by its structure alone, and its layers fail where a MoD layer calls "
            f"them: {reason(error)}"
        ) from error
    return model


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """The dense model again, in place: same classes, same keys, same weights as before ``convert``."""
    if not isinstance(model, MoDModel):
        raise ConversionError(f"{type(model).__name__} is not a MoD model: nothing to restore")
    for layer in model.family.decoder_layers(model):
        if isinstance(layer, MoDLayer):
            del layer.router, layer.layer_index, layer.window
            layer.__class__ = type(layer).__mro__[2]
    del model.executor_slot
    config: Any = model.config
    del config.mod
    if hasattr(config, "mod_structure"):
        del config.mod_structure
    config.__class__ = type(config).__mro__[1]
    dense_class: Any = type(model).__mro__[2]
    model.__class__ = dense_class
    model._no_split_modules = set(dense_class._no_split_modules or [])
    return model


def _install(model: Any, config: MoDConfig) -> None:
    """Give each MoD layer its class, place and router."""
    settings = model.config
    for index in config.layer_indices(settings.num_hidden_layers):
        layer = model.family.decoder_layers(model)[index]
        layer_class: Any = type(layer)
        layer.__class__ = routed_class(layer_class, model.family)
        like = next(layer.parameters())
        layer.router = Router(settings.hidden_size, INITIAL_BIAS[config.gate]).to(like.device)
        layer.layer_index, layer.window = index, window_of(settings, index)
        layer.router.train(layer.training)
    model.executor_slot = Slot()
    # Device maps must treat a routed layer as one piece too.
    model._no_split_modules = {*(model._no_split_modules or []), type(layer).__name__}


@functools.cache
def mod_model_class(dense_class: type[PreTrainedModel], family: Family) -> type[MoDModel]:
    """The MoD subclass of a causal LM class; the same class at every call."""
    body = {
        "family": family,
        "takes_positions": "position_ids" in inspect.signature(dense_class.forward).parameters,
        "config_class": mod_config_class(dense_class.config_class),
        "_no_split_modules": [*(dense_class._no_split_modules or [])],
        "_keep_in_fp32_modules_strict": {*(dense_class._keep_in_fp32_modules_strict or []), r"\d+\.router"},
        "__module__": __name__,
        "__doc__": MoDModel.__doc__,
    }
    return type(f"MoD{dense_class.__name__}", (MoDModel, dense_class), body)


@functools.cache
def mod_config_class(dense_config: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The MoD subclass of a config class, under its own model type."""
    body = {"model_type": PREFIX + dense_config.model_type, "__module__": __name__}
    return type(f"MoD{dense_config.__name__}", (dense_config,), body)


def register() -> None:
    """Teach transformers' Auto classes the MoD model types, so that saved folders load with no remote code."""
    for family in FAMILIES.values():
        register_family(family)


def register_family(family: Family) -> None:
    """Teach transformers' Auto classes one MoD model type.

    Raises:
        ConversionError: transformers has no causal language model of that type.
    """
    known = family.model_type in CONFIG_MAPPING
    dense_config: Any = CONFIG_MAPPING[family.model_type] if known else None
    if dense_config not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConversionError(f"model type {family.model_type!r} is no causal language model of this transformers")
    model_class: Any = mod_model_class(MODEL_FOR_CAUSAL_LM_MAPPING[dense_config], family)
    config_class = model_class.config_class
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)


def _places(
    mask: Any, batch: int, tokens: int, past: int, device: torch.device
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Real tokens [B, T] (None: all), each new token's place among its row's real tokens, and columns that new tokens
    may look at, [B, past + T] (None: all)."""
    plain = torch.arange(past, past + tokens, device=device)[None]
    if mask is None:
        return None, plain, None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape != (batch, past + tokens):
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask is {found}: expected shape {(batch, past + tokens)}, 0 at padding")
    real = mask.to(device).bool()
    if bool(real.all()):
        return None, plain, None
    # Padding was never stored; but a column that was real may be hidden later on.
    shown = F.pad(real[:, :past], (0, tokens), value=True) if past and not bool(real[:, :past].all()) else None
    return real[:, past:], (real.long().cumsum(1) - 1)[:, past:], shown


def _note_documents(call: RoutingCall, position_ids: Tensor) -> None:
    """Packed documents, told by positions that start anew; each has anchors of its own."""
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not bool(starts.any()):
        return
    documents = F.pad(starts.long().cumsum(1), (1, 0)).expand(len(call.p), -1)
    call.documents = documents
    if call.config.anchors:
        first = F.pad(starts, (1, 0), value=True).expand(len(call.p), -1)
        columns = torch.arange(first.shape[1], device=first.device)
        begun = torch.where(first, columns, 0).cummax(1).values
        call.anchored = columns - begun < call.config.anchors


@torch.no_grad()
def _probe(model: PreTrainedModel, **kwargs: Any) -> Tensor:
    """Logits of a short fixed input, [1, T, V] with T = 16 or the context if that is shorter."""
    config: Any = model.config
    length = min(16, getattr(config, "max_position_embeddings", None) or 16)
    ids = torch.arange(length, device=model.device)[None] % config.vocab_size
    training = model.training
    model.eval()
    try:
        logits: Tensor = model(input_ids=ids, use_cache=False, **kwargs).logits
    finally:
        model.train(training)
    return logits.float()


@torch.no_grad()
def _probe_open(model: Any) -> Tensor:
    """The probe at p = 0 with every gate at 1, which is what makes the paper's scaled block the stock one."""
    routers = [layer.router for layer in model.family.decoder_layers(model) if isinstance(layer, MoDLayer)]
    saved = [router.bias.clone() for router in routers]
    for router in routers:
        router.bias.fill_(OPEN)
    try:
        return _probe(model, p=0.0)
    finally:
        for router, bias in zip(routers, saved, strict=True):
            router.bias.copy_(bias)


def _probe_dense(model: PreTrainedModel, family: Family) -> tuple[Tensor, bool]:
    """The probe's logits, and whether the decoder layers returned tuples."""
    kinds: list[bool] = []
    layer = family.decoder_layers(model)[0]
    handle = layer.register_forward_hook(lambda module, args, out: kinds.append(isinstance(out, tuple)))
    try:
        return _probe(model), kinds[0]
    finally:
        handle.remove()


@torch.no_grad()
def _check_paths(model: Any) -> None:
    """For a family known by structure alone: really skipping must give what hiding gives, cached and not, of two rows
    that are not equally long."""
    name, length = type(model).__name__, min(16, getattr(model.config, "max_position_embeddings", None) or 16)
    ids = torch.arange(2 * length, device=model.device).view(2, length) % model.config.vocab_size
    real = torch.ones_like(ids)
    real[1, : length // 4] = 0
    training, p = model.training, [float(at % 2) for at in range(len(model.mod_layers))]
    model.eval()
    try:
        whole = model(input_ids=ids, attention_mask=real, p=[p, p], routing="masked", use_cache=False)
        masked, cache, pieces = whole.logits.float(), model.new_cache(), []
        for first, end in itertools.pairwise(sorted({0, length // 2, length - 1, length})):
            pieces.append(model(
                input_ids=ids[:, first:end], attention_mask=real[:, :end], p=[p, p], routing="gathered",
                past_key_values=cache,
            ).logits)
        stored, entries = cache.nbytes().stored, sum(sum(rows) for rows in cache.lengths().values())
    finally:
        model.train(training)
    difference = (torch.cat(pieces, 1).float() - masked)[real.bool()].abs().max().item()
    if not difference <= _tolerance(masked):
        raise ConversionError(f"{name}: skipping tokens gives logits {difference:.2g} from those of hiding them; its "
                              "layers look at other tokens in ways that routing can't follow")
    dense = 2 * length * (model.config.num_hidden_layers - len(model.mod_layers))
    told = (dense + entries) * cache.entry_bytes
    if stored != told:
        raise ConversionError(f"{name}: its cache holds {stored} bytes where its config tells {told}; keys and values "
                              "of other widths aren't known here")


def _tolerance(logits: Tensor) -> float:
    return 1e-3 * max(1.0, logits.abs().max().item())
