"""What spike encoders and routers saw in a step, summed over the ranks that have them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from models.causal_lm import CausalLM
from models.moe import Router, Routing
from models.spiking import spike_encoders
from ops.spike import MAX_COUNT, spike_statistics


class SpikeStatistics:
    """The histograms of all enabled spike encoders, wherever in the pipeline they are.

    Args:
        whole: the whole model, on the meta device.
        model: the part of it that this rank has.
    """

    def __init__(self, whole: CausalLM, model: CausalLM) -> None:
        self._names = list(spike_encoders(whole))
        self._here = spike_encoders(model)
        self._device = next(model.parameters()).device

    def take(self) -> torch.Tensor:
        """Return what this rank has seen, as a float64 vector to be summed over the ranks."""
        size, device = MAX_COUNT + 1, self._device
        flat = torch.zeros(len(self._names), size, dtype=torch.float64, device=device)
        for i, name in enumerate(self._names):
            if name in self._here:
                flat[i] = self._here[name].take_histogram()
        return flat.flatten()

    def name(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the histograms by the names of their encoders."""
        return dict(zip(self._names, flat.view(-1, MAX_COUNT + 1), strict=True))

    def sample(self) -> dict[str, Any] | None:
        """Return counts of a token that was seen last, of an input in the middle of this rank's."""
        seen = {name: e.sample for name, e in self._here.items() if e.sample is not None}
        if not seen:
            return None
        name, counts = list(seen.items())[len(seen) // 2]
        return {"name": name, "k": self._here[name].k, "counts": counts.long().tolist()}

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Inside, passes in evaluation mode are seen as well, their padding included."""
        for encoder in self._here.values():
            encoder.observes = True
        try:
            yield
        finally:
            for encoder in self._here.values():
                encoder.observes = False


def spike_metrics(histograms: Mapping[str, torch.Tensor], prefix: str = "") -> dict[str, float]:
    """Return what metrics.jsonl says of all inputs together; nothing without spikes.

    Args:
        histograms: by the name of the encoder.
        prefix: of the names.
    """
    if not histograms:
        return {}
    whole = spike_statistics(torch.stack(list(histograms.values())).sum(0))
    names = {
        "spike_sparsity": "sparsity_all",
        "spike_sparsity_within_7": "sparsity_within_7",
        "mean_spikes": "mean_spikes",
        "spike_share_silent": "share_silent",
        "spike_share_within_7": "share_within_7",
        "spike_share_above_16": "share_above_16",
    }
    return {
        prefix + name: value
        for name, key in names.items()
        if isinstance(value := whole[key], float)
    }


class RouterStatistics:
    """What all routers saw, wherever in the pipeline they are; it balances their loads.

    Args:
        whole: the whole model, on the meta device.
        model: the part of it that this rank has.
    """

    def __init__(self, whole: CausalLM, model: CausalLM) -> None:
        self._all, self._here = _routers(whole), _routers(model)
        self._device = next(model.parameters()).device

    def take(self) -> torch.Tensor:
        """Return what this rank has seen, as a float64 vector to be summed over the ranks."""
        routings = [
            self._here[name].take_routing()
            if name in self._here
            else Routing.empty(router.config.num_experts, self._device)
            for name, router in self._all.items()
        ]
        empty = torch.zeros(0, dtype=torch.float64, device=self._device)
        return torch.cat([empty, *(routing.flatten() for routing in routings)])

    def name(self, flat: torch.Tensor) -> dict[str, Routing]:
        """Return what was seen by the names of the routers."""
        counts = [router.config.num_experts for router in self._all.values()]
        sizes = [len(Routing.empty(count).flatten()) for count in counts]
        parts = [Routing.unflatten(part) for part in flat.split(sizes)] if sizes else []
        return dict(zip(self._all, parts, strict=True))

    def balance(self, routings: dict[str, Routing]) -> None:
        """Tell each router its load over all ranks."""
        for name, router in self._here.items():
            router.balance(routings[name].load)

    def metrics(self, routings: dict[str, Routing]) -> dict[str, float]:
        """Return what metrics.jsonl says of a step; nothing without routers.

        router_max_load is the load of the busiest expert of the worst layer, as a multiple of the
        mean; the other figures are means over the layers. The losses are before their weights.
        """
        if not routings:
            return {}
        layers = [routing_figures(routing) for routing in routings.values()]
        worst = {"router_max_load": max(figures.pop("router_max_load") for figures in layers)}
        return worst | {
            name: sum(figures[name] for figures in layers) / len(layers) for name in layers[0]
        }


def routing_figures(routing: Routing) -> dict[str, float]:
    """Return the figures of `RouterStatistics.metrics` for one layer."""
    load = routing.load / routing.load.sum().clamp_min(1)
    tokens = routing.tokens.clamp_min(1)
    return {
        "router_max_load": float(load.max()) * len(load),
        "router_entropy": float(routing.entropy / tokens),
        "router_drop_rate": float(routing.dropped / routing.load.sum().clamp_min(1)),
        "balance_loss": float((load * routing.score / tokens).sum()) * len(load),
        "z_loss": float(routing.z / tokens),
    }


def _routers(model: CausalLM) -> dict[str, Router]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Router)}
