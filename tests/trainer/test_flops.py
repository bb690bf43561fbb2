"""FLOP counts against hand calculations from their definition.

Per token: projections, FFN, gate and head 2 x weights; linear attention 2 D_k D_v (H_state + H).
Per visible pair of query and key: softmax attention 4 H D. Training is 3 x forward; lookups,
biases and norms count nothing.
"""

from collections.abc import Sequence

import pytest
import torch
from helpers.models import OPS, build_model, compose_config, tiny_model_config
from helpers.moe import tiny_moe_config

from conf.schema import SpikeConfig
from models.causal_lm import CausalLM
from models.moe import MoE, Routing
from ops.linear_attention.torch_impl import CHUNK_SIZE
from parallel.recompute import Recompute
from trainer.flops import FlopCounter, active_parameters, measure_peak_flops, parameters_by_kind

DOCUMENTS = [(1,), (4,), (5,), (6,), (100,), (1, 3, 50, 10)]
H, H_KV, D, E, FFN, RANK, VOCAB, WINDOW = 4, 2, 8, 32, 48, 4, 40, 5
QKVO = E * (H + 2 * H_KV) * D + H * D * E
GATE = E * RANK + RANK * H_KV * D
"""The shapes of tiny_model_config."""


def visible_pairs(doc_lengths: Sequence[int], window: int | None) -> int:
    """Count query and key pairs one by one."""
    return sum(
        1
        for length in doc_lengths
        for t in range(length)
        for s in range(length)
        if s <= t and (window is None or s > t - window)
    )


def count(
    *layers: str, lengths: Sequence[int], recompute: str = "none", hardware: bool = False
) -> dict[str, float]:
    """Return the training FLOPs of a tiny model."""
    model = build_model(tiny_model_config(*layers), recompute=recompute)
    return FlopCounter(model).training(lengths, hardware=hardware)


@pytest.mark.parametrize("lengths", DOCUMENTS, ids=str)
@pytest.mark.parametrize(("layer", "window"), [("full", None), ("window", WINDOW)])
def test_softmax_attention_counts_visible_pairs(
    layer: str, window: int | None, lengths: tuple[int, ...]
) -> None:
    pairs, tokens = visible_pairs(lengths, window), sum(lengths)
    flops = count(layer, lengths=lengths)
    assert flops[f"{layer}_attention"] == 3 * (2 * QKVO * tokens + 4 * H * D * pairs)


def test_visible_pairs_have_the_closed_forms_of_the_definition() -> None:
    assert visible_pairs([100], None) == 100 * 101 // 2
    assert visible_pairs([100], 5) == 100 * 5 - 5 * 4 // 2


@pytest.mark.parametrize("lengths", DOCUMENTS, ids=str)
def test_linear_attention_updates_states_and_reads_heads(lengths: tuple[int, ...]) -> None:
    flops = count("linear", lengths=lengths)
    state = 2 * D * D * (H_KV + H)
    assert flops["linear_attention"] == 3 * sum(lengths) * (2 * (QKVO + GATE) + state)


def test_layers_add_up_by_kind() -> None:
    lengths = (7, 20)
    tokens = sum(lengths)
    flops = count("linear", "window", "linear+full", "window", lengths=lengths)
    window = 2 * QKVO * tokens + 4 * H * D * visible_pairs(lengths, WINDOW)
    linear = tokens * (2 * (QKVO + GATE) + 2 * D * D * (H_KV + H))
    full = 2 * QKVO * tokens + 4 * H * D * visible_pairs(lengths, None)
    assert flops == {
        "linear_attention": 3 * linear,
        "window_attention": 3 * 2 * window,
        "parallel": 3 * (linear + full),
        "ffn": 3 * 4 * 2 * 3 * E * FFN * tokens,
        "head_and_loss": 3 * 2 * E * VOCAB * tokens,
    }


def test_every_token_sees_the_sinks_in_softmax_layers() -> None:
    lengths, num_sinks = (1, 3, 50), 7
    layers, sinks = ("linear", "window", "linear+full"), [f"model.num_sinks={num_sinks}"]
    counter = FlopCounter(build_model(tiny_model_config(*layers, overrides=sinks)))
    for hardware in (False, True):
        more = counter.training(lengths, hardware=hardware)
        for kind, flops in count(*layers, lengths=lengths, hardware=hardware).items():
            has_softmax = kind in ("window_attention", "parallel")
            # Forward 4 H D, backward twice that, and as hardware the scores again.
            pairs = (14 if hardware else 12) * H * D * sum(lengths) * num_sinks
            assert more[kind] == flops + has_softmax * pairs, kind


def test_head_counts_once_whether_tied_or_not() -> None:
    for tied in ("true", "false"):
        model = build_model(tiny_model_config("full", overrides=[f"model.tie_embeddings={tied}"]))
        flops = FlopCounter(model).training([10])
        assert flops["head_and_loss"] == 3 * 2 * E * VOCAB * 10


@pytest.mark.parametrize(
    ("recompute", "mixer", "ffn"), [("none", 3, 3), ("selective", 3, 4), ("full", 4, 4)]
)
def test_only_hardware_flops_count_recomputation(recompute: str, mixer: int, ffn: int) -> None:
    layers = ("linear", "window")
    model = count(*layers, lengths=[64], recompute=recompute)
    assert model == count(*layers, lengths=[64])
    hardware = count(*layers, lengths=[64], recompute=recompute, hardware=True)
    assert hardware["ffn"] == pytest.approx(model["ffn"] * ffn / 3)
    # Beyond the model: 2 products of C x C per chunk forward and 5 backward; the scores backward.
    inside = 2 * CHUNK_SIZE * D * H * 64
    linear = model["linear_attention"] * mixer / 3 + (mixer - 2) * 2 * inside + 5 * inside
    assert hardware["linear_attention"] == pytest.approx(linear)
    scores = 2 * H * D * visible_pairs([64], WINDOW)
    window = model["window_attention"] * mixer / 3 + scores
    assert hardware["window_attention"] == pytest.approx(window)
    assert hardware["head_and_loss"] == model["head_and_loss"]


def test_forward_flops_of_spikingbrain_7b_per_token() -> None:
    with torch.device("meta"):
        config = compose_config("model=spikingbrain_7b").model
        model = CausalLM(config, SpikeConfig(enabled=True, k=3.0), OPS)
    length = 131072
    flops = FlopCounter(model).training([length])
    qkvo = 3584 * 3584 * 2 + 2 * 3584 * 512
    linear = 2 * (qkvo + 3584 * 16 + 16 * 512) + 2 * 128 * 128 * (4 + 28)
    pairs = length * 4096 - 4096 * 4095 // 2
    assert flops == {
        "linear_attention": 3 * 14 * linear * length,
        "window_attention": 3 * 14 * (2 * qkvo * length + 4 * 28 * 128 * pairs),
        "ffn": 3 * 28 * 2 * 3 * 3584 * 18944 * length,
        "head_and_loss": 3 * 2 * 3584 * 152064 * length,
    }


MOE_E, EXPERT, EXPERTS = 32, 3 * 32 * 96, 8
"""The shapes of tiny_moe_config."""
SPARSE = ("model.ffns.moe.moe.top_k=3", "model.ffns.moe.moe.num_shared_experts=2")


def test_only_active_experts_count() -> None:
    model = build_model(tiny_moe_config(*SPARSE))
    active = (3 + 2) * EXPERT + EXPERTS * MOE_E
    flops = FlopCounter(model).training([70])
    assert flops["moe"] == 3 * 2 * active * 70
    assert flops["ffn"] == 3 * 2 * EXPERT * 70  # of its size
    assert parameters_by_kind(model)["moe"] == (EXPERTS + 2) * EXPERT + EXPERTS * MOE_E
    idle = (EXPERTS - 3) * EXPERT * sum(isinstance(m, MoE) for m in model.modules())
    assert active_parameters(model) == sum(p.numel() for p in model.parameters()) - idle
    forward, _ = FlopCounter(model).layer_costs(70)
    assert forward[1] - forward[0] == 2 * (active - EXPERT) * 70


@pytest.mark.parametrize(
    ("recompute", "routed", "shared", "router"),
    [
        (Recompute(), 3, 3, 3),
        (Recompute(moe="activation"), 3, 3, 4),
        (Recompute(moe="experts"), 4, 4, 4),
        (Recompute(moe="layer"), 4, 4, 4),
        (Recompute("selective", "experts"), 4, 4, 4),
        (Recompute("full", "layer"), 4, 4, 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("capacity", [None, 1.5])
def test_hardware_flops_count_recomputed_and_padded_experts(
    recompute: Recompute, routed: int, shared: int, router: int, capacity: float | None
) -> None:
    config = tiny_moe_config(*SPARSE, f"model.ffns.moe.moe.capacity={capacity or 'null'}")
    model = CausalLM(config, SpikeConfig(enabled=False, k=3.0), OPS, recompute=recompute)
    counter = FlopCounter(model)
    weights = routed * 3 * EXPERT * (capacity or 1) + shared * 2 * EXPERT + router * EXPERTS * MOE_E
    assert counter.training([70], hardware=True)["moe"] == 2 * weights * 70
    assert counter.training([70]) == FlopCounter(build_model(tiny_moe_config(*SPARSE))).training(
        [70]
    )


def test_experts_that_ran_again_for_their_many_rows_count() -> None:
    counter = FlopCounter(build_model(tiny_moe_config("model.num_layers=3")))
    routings = {f"layers.{i}.ffn.router": Routing.empty(EXPERTS) for i in (1, 2)}
    assert counter.recomputed(routings) == 0
    routings["layers.2.ffn.router"].recomputed += 5
    assert counter.recomputed(routings) == 2 * EXPERT * 5


@pytest.mark.parametrize("tied", ["true", "false"])
def test_parameters_by_kind_add_up(tied: str) -> None:
    layers = ("linear", "window", "linear+full")
    overrides = [f"model.tie_embeddings={tied}", "model.num_sinks=7"]
    model = build_model(tiny_model_config(*layers, overrides=overrides))
    kinds = parameters_by_kind(model)
    lookup = 0 if tied == "true" else E * VOCAB  # the head's own weight, else, is what is met
    assert active_parameters(model) == sum(kinds.values()) - lookup
    assert sum(kinds.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert kinds["linear_attention"] == QKVO + GATE + H_KV * D + D  # gate bias, norm of a head
    assert kinds["window_attention"] == QKVO
    assert kinds["ffn"] == 3 * 3 * E * FFN
    assert kinds["embedding_and_norms"] == (VOCAB + 7 + 2 * 3 + 1) * E
    assert kinds.get("head_and_loss", 0) == (0 if tied == "true" else E * VOCAB)


def test_peak_is_a_rate() -> None:
    slow, fast = (
        measure_peak_flops(torch.device("cpu"), torch.float32, size=size, seconds=0.02)
        for size in (16, 256)
    )
    assert 1e5 < slow < 1e12
    assert 1e7 < fast < 1e14
