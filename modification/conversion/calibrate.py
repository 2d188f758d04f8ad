"""Routers without training: fitted in closed form to the measured benefit of their layers; and the dial made true,
by an affine change of the routers' logits that is folded into their weights."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from modification.layer import MoDLayer
from modification.measure.quality import batches, evaluate
from modification.routing import Router

_LEVELS = np.linspace(0.1, 0.9, 9)
_KNOTS = 19  # scores that the dial is bent at
_STEEP = 0.08  # a fall of load between neighbouring thresholds that is measured more finely
_ROUNDS = 4  # of measuring: everywhere, then where the load fell steeply
_EDGE = 1e-6  # no knot is nearer to 0 or 1
_RIDGE = 0.2  # of the features' mean square
_SPREAD = 1.8  # standard deviation of fitted logits: that of a logistic distribution, whose load is 1 - p
CALIBRATION_TOKENS = 8_192


@torch.no_grad()
def fit_routers(
    model: Any, blocks: npt.NDArray[np.int32], rounds: int = 12, batch: int = 8, seed: int = 0
) -> list[float]:
    """Fit each router to the benefit of its layer, token by token: no training.

    A randomised experiment: every token is skipped or run by chance in every MoD layer, half and half, and the
    harm to its next-token distribution is measured, as KL divergence from the dense one, in nats. What skipping in
    one layer adds to that harm, whatever happens in the others, is the layer's benefit for the token. Its
    expectation, given what the router sees, is a ridge regression in closed form, and that is the router's logit.
    Benefits are in one unit, so that the layers' scores compare; ``fit_dial`` then makes load 1 - p.

    Args:
        blocks: calibration text, [N, T] token ids; a few thousand tokens do.
        rounds: experiments with each token.

    Returns:
        Each MoD layer's mean benefit, nats per token.
    """
    model.eval()
    layers = model.family.decoder_layers(model)
    routers = [layers[index].router for index in model.mod_layers]
    sums = [_Regression(router.weight.shape[1]) for router in routers]
    noise = torch.Generator().manual_seed(seed)
    for ids in batches(blocks, batch, model.device):
        dense = F.log_softmax(model(input_ids=ids, p=0.0, use_cache=False).logits.float(), -1)
        for _ in range(rounds):
            with _by_chance(routers, noise) as seen:
                out = model(input_ids=ids, p=0.5, use_cache=False, output_router_scores=True)
            harm = (dense.exp() * (dense - F.log_softmax(out.logits.float(), -1))).sum(-1)
            harm = harm - harm.mean()
            for total, x, run in zip(sums, seen, out.routed, strict=True):
                # Twice the harm with a sign: its mean over chance is harm(skipped) - harm(run).
                total.add(x, torch.where(run, -2 * harm, 2 * harm))
    for router, total in zip(routers, sums, strict=True):
        total.solve(router)
    _standardise(routers, sums)
    return [total.mean_target for total in sums]


@contextlib.contextmanager
def _by_chance(routers: list[Router], noise: torch.Generator) -> Iterator[list[Tensor]]:
    """Scores drawn evenly from (0, 1), whatever a router sees; yields what each saw, normalised, [B, T, D]."""
    seen: list[Tensor] = []

    def draw(router: Any, args: Any, logit: Tensor) -> Tensor:
        seen.append(F.rms_norm(args[0].float(), args[0].shape[-1:]))
        return torch.logit(torch.rand(logit.shape, generator=noise).to(logit.device), eps=1e-6)

    handles = [router.register_forward_hook(draw) for router in routers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class _Regression:
    """Ridge regression with an intercept from running sums of features [n, D] and targets [n], in float64."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.x, self.xx = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
        self.y, self.xy = 0.0, torch.zeros(width, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        x, y = x.flatten(0, -2).cpu().double(), y.flatten().cpu().double()
        self.count += len(y)
        self.x += x.sum(0)
        self.xx += x.T @ x
        self.y += y.sum().item()
        self.xy += x.T @ y

    @property
    def mean_target(self) -> float:
        return self.y / self.count

    @property
    def covariance(self) -> Tensor:
        mean = self.x / self.count
        return self.xx / self.count - mean[:, None] * mean

    def solve(self, router: Router) -> None:
        """Write the fitted weights into a router."""
        mean, gram = self.x / self.count, self.covariance
        gram = gram + _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        weight = torch.linalg.solve(gram, self.xy / self.count - mean * self.mean_target)
        router.weight.copy_(weight[None])
        router.bias.fill_(self.mean_target - float(mean @ weight))


def _standardise(routers: list[Router], sums: list[_Regression]) -> None:
    """Bring the pooled logits to mean 0 and a logistic distribution's spread; their order stays."""
    means, variances = [], []
    for router, total in zip(routers, sums, strict=True):
        weight = router.weight[0].cpu().double()
        means.append(float(weight @ (total.x / total.count)) + router.bias.item())
        variances.append(float(weight @ total.covariance @ weight))
    centre = float(np.mean(means))
    spread = float(np.sqrt(np.mean(variances) + np.var(means)))
    scale = _SPREAD / max(spread, 1e-9)
    for router in routers:
        router.weight.mul_(scale)
        router.bias.sub_(centre).mul_(scale)


@dataclass(frozen=True, slots=True)
class Dial:
    """What made a model's dial true: routers' logits times ``scale`` plus ``shift``, then scores bent at ``knots``."""

    scale: float
    shift: float
    knots: tuple[float, ...]


@torch.no_grad()
def fit_dial(model: Any, blocks: npt.NDArray[np.int32]) -> Dial:
    """Make load about 1 - p, alike for all routers, which keeps the order of scores and what training learned.

    First one scale and shift of all logits, folded into the routers, bring the scores apart and to the middle; not
    where gates scale their blocks, which would change what the model says. What is then left between load and 1 - p is
    bent away: ``MoDConfig.dial`` gets the scores at which each load is reached.

    Args:
        blocks: calibration text, [N, T] token ids.
    """
    model.eval()
    set_dial(model, ())
    scale, shift = (1.0, 0.0) if model.mod_config.gate == "paper" else _stretch(model, blocks)
    return Dial(scale, shift, bend_dial(model, blocks))


@torch.no_grad()
def bend_dial(model: Any, blocks: npt.NDArray[np.int32]) -> tuple[float, ...]:
    """Make load 1 - p on one text [N, T] by bending the scores alone: no weight changes. The dial's knots."""
    model.eval()
    set_dial(model, ())
    knots = _knots(model, blocks)
    set_dial(model, knots)
    return knots


def _stretch(model: Any, blocks: npt.NDArray[np.int32]) -> tuple[float, float]:
    """Fit logit(1 - load) as a line in the threshold's logit and fold it into the routers."""
    reached = np.array([1 - evaluate(model, blocks, float(p)).load for p in _LEVELS]).clip(0.005, 0.995)
    wanted, current = _logit(reached), _logit(_LEVELS)
    slope, offset = np.polyfit(current, wanted, 1, w=np.sqrt(reached * (1 - reached)))
    slope = float(np.clip(slope, 0.1, 4.0))
    _rescale(model, slope, float(offset))
    return slope, float(offset)


def _knots(model: Any, blocks: npt.NDArray[np.int32]) -> tuple[float, ...]:
    """Thresholds at which the load is 1 - k / (n + 1), by interpolation; where it falls steeply, measured again."""
    wanted = [k / (_KNOTS + 1) for k in range(1, _KNOTS + 1)]
    skipped, places = {0.0: 0.0, 1.0: 1.0}, wanted
    for _ in range(_ROUNDS):
        skipped |= {p: 1 - evaluate(model, blocks, p).load for p in places}
        steep = [
            (low, high) for low, high in itertools.pairwise(sorted(skipped)) if skipped[high] - skipped[low] > _STEEP
        ]
        places = [p for p in _read_off(wanted, skipped) if any(low < p < high for low, high in steep)]
    return tuple(_read_off(wanted, skipped))


def _read_off(wanted: list[float], skipped: dict[float, float]) -> list[float]:
    """Thresholds at which shares are skipped, straight between measured ones in logits, for scores may crowd near 0 or
    1; rising."""
    places = sorted(skipped)
    logits = _logit(np.clip(places, _EDGE, 1 - _EDGE))
    # Decisions move later scores, if little.
    shares = np.maximum.accumulate([skipped[p] for p in places]) + 1e-9 * np.arange(len(places))
    return [float(p) for p in 1 / (1 + np.exp(-np.maximum.accumulate(np.interp(wanted, shares, logits))))]


def set_dial(model: Any, knots: tuple[float, ...]) -> None:
    """Put a dial into a model's settings."""
    model.config.mod = dataclasses.replace(model.mod_config, dial=knots).to_dict()


def _rescale(model: Any, slope: float, offset: float) -> None:
    for layer in model.family.decoder_layers(model):
        if isinstance(layer, MoDLayer):
            layer.router.weight.mul_(slope)
            layer.router.bias.mul_(slope).add_(offset)


def _logit(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(np.log(values / (1 - values)))
