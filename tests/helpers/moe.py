"""A mixture-of-experts layer by its definition: a loop over experts in float64, for autograd."""

import math
from typing import Any, NamedTuple

import torch
from helpers.models import compose_config
from torch.nn.functional import silu

from conf.schema import FFNConfig, ModelConfig, MoEConfig, OpsConfig, SpikeConfig
from models.moe import MoE
from parallel.pipeline import ModelPart
from parallel.recompute import Recompute

E, I, G = 16, 24, 6  # noqa: E741
"""Channels, channels of an expert and experts of the layers here."""
WHOLE = ModelPart()
KEEP_ALL = Recompute()


def moe_config(**fields: Any) -> MoEConfig:
    """Return a config of G experts whose other fields are those given."""
    defaults: dict[str, Any] = {
        "num_experts": G, "top_k": 1, "num_shared_experts": 1, "score": "softmax",
        "normalize": False, "balance_loss": 0.0, "z_loss": 0.0, "bias_rate": 0.0, "capacity": None,
        "spiking_router": False,
    }  # fmt: skip
    return MoEConfig(**(defaults | fields))


def build_moe(
    config: MoEConfig,
    *,
    size: int = E,
    intermediate_size: int = I,
    spiking: bool = False,
    part: ModelPart = WHOLE,
    recompute: Recompute = KEEP_ALL,
) -> MoE:
    """Return a layer; its weights depend on the config alone and are large enough to matter."""
    ffn = FFNConfig(intermediate_size=intermediate_size, moe=config)
    spike = SpikeConfig(enabled=spiking, k=3.0)
    layer = MoE(ffn, size, spike, OpsConfig(), part, recompute)
    torch.manual_seed(0)
    layer.reset(0.3, 0.3)
    return layer


def tiny_moe_config(*overrides: str) -> ModelConfig:
    """Compose tiny_moe at 32 channels: a layer with a dense FFN and one with experts."""
    mixers = ("linear", "window", "full")
    heads = ("num_heads=4", "num_kv_heads=2", "head_dim=8")
    return compose_config(
        "model=tiny_moe", "model.hidden_size=32", "model.vocab_size=40", "model.num_layers=2",
        "model.ffns.dense.intermediate_size=96", "model.ffns.moe.intermediate_size=96",
        "model.num_sinks=2", "model.init_std=0.1",
        *(f"model.mixers.{mixer}.{shape}" for mixer in mixers for shape in heads), *overrides,
    ).model  # fmt: skip


class Defined(NamedTuple):
    """What the definition says of a layer and some tokens."""

    out: torch.Tensor
    """[N, E]."""
    loss: torch.Tensor
    """What is added to the model's loss."""
    experts: torch.Tensor
    """int64 [N, k]."""
    is_dropped: torch.Tensor
    """bool [N, k]."""
    scores: torch.Tensor
    """[N, G], each token's with sum 1."""
    logits: torch.Tensor


def define_moe(
    weights: dict[str, torch.Tensor],
    x: torch.Tensor,
    config: MoEConfig,
    *,
    load: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    num_sinks: int = 0,
    loss_scale: float = 0.0,
    spiking: bool = False,
    num_rows: int | None = None,
) -> Defined:
    """Compute a layer on tokens x [N, E] with its weights by name, as in its state.

    Args:
        num_rows: tokens that the capacity is a multiple of; None: those of x.
    """
    logits = (encode(x) if spiking and config.spiking_router else x) @ weights["router.weight"].T
    scores = logits.softmax(1) if config.score == "softmax" else 1 / (1 + (-logits).exp())
    keys = scores.detach() if bias is None else scores.detach() + bias
    # Stable: of equal ones the first.
    experts = keys.sort(dim=1, descending=True, stable=True).indices[:, : config.top_k]
    gates = scores.gather(1, experts)
    if config.normalize:
        gates = gates / gates.sum(1, keepdim=True)
    is_dropped = find_dropped(experts, config, len(x) if num_rows is None else num_rows)
    out = torch.zeros_like(x)
    for g in range(config.num_experts):
        gate = (gates * ((experts == g) & ~is_dropped)).sum(1, keepdim=True)
        three = [weights[f"experts.{name}_proj"][g] for name in ("gate", "up", "down")]
        rows = (gate > 0)[:, 0]
        out = out.index_add(0, rows.nonzero()[:, 0], gate[rows] * expert(x[rows], *three, spiking))
    if config.num_shared_experts:
        three = [weights[f"shared.{name}_proj.weight"] for name in ("gate", "up", "down")]
        out = out + expert(x, *three, spiking)
    shares = scores / scores.sum(1, keepdim=True)
    tokens = slice(num_sinks, None)
    loss = config.z_loss * logits.logsumexp(1)[tokens].square().sum()
    if load is not None:
        balance = (shares[tokens] * load).sum() * config.num_experts
        loss = loss + config.balance_loss * balance
    return Defined(out, loss * loss_scale, experts, is_dropped, shares, logits)


def expert(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, spiking: bool
) -> torch.Tensor:
    """Return down(silu(gate x) * up x)."""
    x = encode(x) if spiking else x
    inner = silu(x @ gate.T) * (x @ up.T)
    return (encode(inner) if spiking else inner) @ down.T


def encode(x: torch.Tensor) -> torch.Tensor:
    """Return x in whole multiples of its threshold, with the gradient of x (eq. 19 and 21)."""
    threshold = (x.detach().abs().mean(-1, keepdim=True) / 3).clamp(1e-5, 1e4)
    return x + ((x / threshold).round() * threshold - x).detach()


def find_dropped(experts: torch.Tensor, config: MoEConfig, num_rows: int) -> torch.Tensor:
    """Go through the choices in token order; each expert takes so many."""
    is_dropped = torch.zeros_like(experts, dtype=torch.bool)
    if config.capacity is None:
        return is_dropped
    capacity = math.ceil(config.capacity * num_rows * config.top_k / config.num_experts)
    taken = [0] * config.num_experts
    for token, choices in enumerate(experts.tolist()):
        for slot, g in enumerate(choices):
            is_dropped[token, slot] = taken[g] == capacity
            taken[g] += taken[g] < capacity
    return is_dropped
