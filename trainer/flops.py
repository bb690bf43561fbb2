"""Model FLOPs by walking the layer list, and the peak to hold them against.

Definition (the README repeats it): projections, FFN, gate and head 2 x parameters per token, the
embedding lookup nothing; causal softmax 4 H D per visible pair, pairs with sinks included; linear
attention 2 D_k D_v (H_state + H) per token. Training is 3 x forward. Recomputation, the padding of
experts and what chunked kernels spend beyond the definition count as hardware FLOPs only. The rows
of the sinks themselves, which each rank computes once per micro batch whatever its documents, count
nowhere.
"""

import copy
import dataclasses
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from models.causal_lm import CausalLM
from models.layers import projection_weights
from models.mixers import Mixer
from models.moe import MoE, Routing


@dataclass(frozen=True)
class _LayerCost:
    kind: str
    ffn_kind: str
    mixer_weights: int
    ffn_weights: int
    ffn_hardware_weights: float
    mixers: tuple[Mixer, ...]


class FlopCounter:
    """FLOPs of training steps of one model. Build it before ZeRO partitions the parameters."""

    def __init__(self, model: CausalLM) -> None:
        self.recomputes_layers = model.recompute.layers == "full"
        self.num_sinks = model.config.num_sinks
        self.head_weights = model.head.weight.numel()
        self.layers = []
        for _, layer in model.named_layers():
            mixers = tuple(mixer for _, mixer in layer.mixer.named_branches())
            computed, again = layer.ffn.computed_weights()
            if layer.recomputes_ffn or self.recomputes_layers:
                again = computed
            weights = projection_weights(layer.mixer), layer.ffn.active_weights()
            cost = _LayerCost(
                layer.mixer.kind, layer.ffn.kind, *weights, 3 * computed + again, mixers
            )
            self.layers.append(cost)
        self.expert_weights = {
            f"{name}.router": module.expert_weights()
            for name, module in model.named_modules()
            if isinstance(module, MoE)
        }
        self.kinds = list(self.training([1]))

    def recomputed(self, routings: Mapping[str, Routing]) -> float:
        """Return the hardware FLOPs of what ran again since experts had many rows.

        Args:
            routings: what routers saw, by their names.
        """
        rows = {name: float(routing.recomputed) for name, routing in routings.items()}
        return sum(2.0 * self.expert_weights[name] * count for name, count in rows.items())

    def layer_costs(self, seq_len: int) -> tuple[list[float], float]:
        """Return the forward FLOPs of each layer and of the head, over one sequence."""
        layers = [
            2.0 * (layer.mixer_weights + layer.ffn_weights) * seq_len
            + sum(mixer.mixing_flops([seq_len], self.num_sinks) for mixer in layer.mixers)
            for layer in self.layers
        ]
        return layers, 2.0 * self.head_weights * seq_len

    def forward(self, doc_lengths: Sequence[int]) -> float:
        """Return the model FLOPs of a forward pass over the documents."""
        return sum(self.training(doc_lengths).values()) / 3

    def part(self, layers: Sequence[int], mixers: Sequence[int]) -> "FlopCounter":
        """Return the counter of these layers, of some of which the mixers alone; not of the head.

        Nothing of it is recomputed.
        """
        part = copy.copy(self)
        part.recomputes_layers, part.head_weights = False, 0
        part.layers = [self.layers[i] for i in layers] + [
            dataclasses.replace(self.layers[i], ffn_weights=0, ffn_hardware_weights=0.0)
            for i in mixers
        ]
        return part

    def training(self, doc_lengths: Sequence[int], *, hardware: bool = False) -> dict[str, float]:
        """Return the FLOPs of forward and backward over the documents, by kind of layer.

        Args:
            doc_lengths: tokens of each document.
            hardware: count recomputation and what kernels spend beyond the model.
        """
        tokens = sum(doc_lengths)
        mixer_passes = 4 if hardware and self.recomputes_layers else 3
        flops: dict[str, float] = defaultdict(float)
        for layer in self.layers:
            mixing = sum(m.mixing_flops(doc_lengths, self.num_sinks) for m in layer.mixers)
            flops[layer.kind] += mixer_passes * (2 * layer.mixer_weights * tokens + mixing)
            for mixer in layer.mixers if hardware else ():
                forward, backward = mixer.extra_flops(doc_lengths, self.num_sinks)
                flops[layer.kind] += (mixer_passes - 2) * forward + backward
            ffn_weights = layer.ffn_hardware_weights if hardware else 3 * layer.ffn_weights
            flops[layer.ffn_kind] += 2 * ffn_weights * tokens
        flops["head_and_loss"] += 3 * 2 * self.head_weights * tokens
        return dict(flops)


def parameters_by_kind(model: CausalLM) -> dict[str, int]:
    """Return the parameters of each kind of layer; a tied head counts with the embedding."""
    counts: dict[str, int] = defaultdict(int)
    for _, layer in model.named_layers():
        counts[layer.mixer.kind] += sum(p.numel() for p in layer.mixer.parameters())
        counts[layer.ffn.kind] += sum(p.numel() for p in layer.ffn.parameters())
        norms = layer.mixer_norm.weight.numel() + layer.ffn_norm.weight.numel()
        counts["embedding_and_norms"] += norms
    counts["embedding_and_norms"] += model.embed.weight.numel() + model.norm.weight.numel()
    if model.sinks is not None:
        counts["embedding_and_norms"] += model.sinks.weight.numel()
    if model.head.weight is not model.embed.weight:
        counts["head_and_loss"] += model.head.weight.numel()
    return dict(counts)


def active_parameters(model: CausalLM) -> int:
    """Return the parameters that a token meets: of routed experts those it chose, of the embedding
    none, unless the head shares it.
    """
    counts = sum(parameters_by_kind(model).values())
    for _, layer in model.named_layers():
        if isinstance(layer.ffn, MoE):
            config = layer.ffn.config
            counts -= (config.num_experts - config.top_k) * layer.ffn.expert_weights()
    is_shared = model.head.weight is model.embed.weight
    return counts - (0 if is_shared else model.embed.weight.numel())


def measure_peak_flops(
    device: torch.device, dtype: torch.dtype, *, size: int = 2048, seconds: float = 1.0
) -> float:
    """Return the FLOP/s of a square matrix product of `dtype`, the fastest of several runs."""
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)

    def run() -> float:
        start = time.perf_counter()
        product = a @ b
        float(product[0, 0])  # waits for the device
        return time.perf_counter() - start

    run()
    best, deadline = run(), time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        best = min(best, run())
    return 2.0 * size**3 / best
