"""A few training steps of a MoD model, sharded by FSDP2 over CPU processes or whole; for test_scale.py."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from builders import dense_model, tokens
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from modification import MoDConfig, convert
from modification.conversion.objectives import draw_thresholds, load_penalty, next_token_loss, row_loads

BATCH, STEPS = 4, 3


def steps(model: torch.nn.Module, rows: slice) -> list[float]:
    """Train on the same rows each step, or a slice of them; the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # Adam would blow rounding up where gradients vanish
    losses = []
    for step in range(STEPS):
        ids, p = tokens(BATCH, 12, seed=step)[rows], draw_thresholds(
            BATCH, 0.25, (0.0, 1.0), torch.Generator().manual_seed(step)
        )[rows]
        out = model(input_ids=ids, p=p, use_cache=False, output_router_scores=True, routing="masked")
        loss = next_token_loss(out.logits, ids) + load_penalty(row_loads(out.router_scores, out.routed, p), p)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def fresh() -> torch.nn.Module:
    """The same MoD model in every process."""
    dense = dense_model("llama")
    torch.manual_seed(0)
    return convert(dense, MoDConfig()).train()


def shard(out: Path) -> None:
    """The steps in each of several processes; the first writes what was found."""
    dist.init_process_group("gloo")
    rank, model = dist.get_rank(), fresh()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    share = BATCH // dist.get_world_size()
    losses = torch.tensor(steps(model, slice(rank * share, (rank + 1) * share)))
    dist.all_reduce(losses)
    sizes = sum(weight.to_local().numel() for weight in model.parameters())
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save({"losses": losses / dist.get_world_size(), "local": sizes, "weights": weights}, out)
    dist.destroy_process_group()
