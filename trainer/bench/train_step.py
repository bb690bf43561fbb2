"""A whole training step (forward, backward, clipping, AdamW) beside Hugging Face Transformers."""

from collections.abc import Callable
from typing import Any

import torch

from conf.schema import (
    BenchConfig,
    ModelConfig,
    OpsConfig,
    OptimConfig,
    ParallelConfig,
    SpikeConfig,
)
from models.causal_lm import CausalLM, layer_list
from models.mixers.softmax_attention import SoftmaxAttentionConfig
from parallel.comm import Comm
from parallel.engine import Engine, MicroBatch
from parallel.layout import build_layout
from parallel.mesh import Mesh, World, init_mesh
from parallel.sequence import SequenceContext
from trainer.accelerator import Accelerator
from trainer.bench.rows import Row, median_seconds
from trainer.flops import FlopCounter
from trainer.optim import build_optimizer

OPTIM = OptimConfig(
    lr=1e-4,
    betas=[0.9, 0.95],
    eps=1e-8,
    weight_decay=0.1,
    max_grad_norm=1.0,
    schedule="constant",
    warmup_steps=0,
    decay_steps=0,
    min_lr_ratio=0.0,
)
PARALLEL = ParallelConfig(
    dp=None,
    pp=1,
    ep=1,
    ulysses=1,
    ring=1,
    layout="contiguous",
    linear="gather",
    zero_stage=0,
    offload="none",
    recompute="none",
    timeout_seconds=600.0,
    sync="none",
)
OPS = OpsConfig()


def bench_train_step(config: BenchConfig, accelerator: Accelerator, peak: float) -> list[Row]:
    """Return tokens/s, seconds and MFU of a step of `config.model`, ours and the peer's."""
    device = accelerator.device(0)
    mesh = init_mesh(World(0, 1, 0), device, accelerator.backend, PARALLEL.timeout_seconds)
    generator = torch.Generator().manual_seed(0)
    shape = (config.micro_batch_size, config.seq_len + 1)
    tokens = torch.randint(config.model.vocab_size, shape, generator=generator).to(device)
    ours, flops = _our_step(config, mesh, tokens)
    sides = [ours]
    peer = _peer_step(config, tokens)
    if peer is not None:
        sides.append(peer)
    seconds = median_seconds(sides, config.repeats)
    count = config.micro_batch_size * config.seq_len
    case = f"train step, {config.micro_batch_size} x {config.seq_len} tokens"
    name = "transformers" if peer is not None else None
    rows = []
    for metric, unit, figure in (
        ("tokens_per_second", "tokens/s", lambda s: count / s),
        ("step_seconds", "s", lambda s: s),
        ("mfu", "of measured peak", lambda s: flops / s / peak),
    ):
        values = [figure(s) for s in seconds]
        ratio = seconds[1] / seconds[0] if peer is not None else None
        rows.append(Row(case, metric, values[0], unit, name, values[1] if name else None, ratio))
    return rows


def _our_step(
    config: BenchConfig, mesh: Mesh, tokens: torch.Tensor
) -> tuple[Callable[[], None], float]:
    """Return a function that takes one step, and the step's model FLOPs."""
    spike = SpikeConfig(enabled=False, k=3.0)
    model = CausalLM(config.model, spike, OPS, dtype=getattr(torch, config.dtype))
    model.reset_parameters(0)
    model.to(mesh.device)
    lengths = [config.seq_len] * config.micro_batch_size
    flops = sum(FlopCounter(model).training(lengths).values())
    comm = Comm(mesh)
    engine = Engine(
        model,
        build_optimizer(model, OPTIM),
        parallel=PARALLEL,
        optim=OPTIM,
        comm=comm,
        grad_accum_steps=1,
        micro_batch_size=config.micro_batch_size,
    )
    ends = torch.arange(0, config.micro_batch_size + 1) * config.seq_len
    context = SequenceContext(build_layout(ends.int()), OPS, comm)
    inputs, labels = tokens[:, :-1].reshape(1, -1), tokens[:, 1:].reshape(1, -1)
    batch = MicroBatch(inputs, labels, context)

    def step() -> None:
        engine.accumulate([batch], 1 / labels.numel())
        engine.step(OPTIM.lr)

    return step, flops


def _peer_step(config: BenchConfig, tokens: torch.Tensor) -> Callable[[], None] | None:
    """The same shapes as LlamaForCausalLM with its fastest attention here and fused AdamW."""
    attention = _full_attention(config.model)
    if attention is None:
        return None
    model = build_llama(config.model, attention, getattr(torch, config.dtype), config.seq_len)
    model.to(tokens.device)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=OPTIM.lr, fused=True)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> None:
        out = model(input_ids=inputs, labels=labels, shift_labels=labels)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def build_llama(
    model: ModelConfig, attention: SoftmaxAttentionConfig, dtype: torch.dtype, max_positions: int
) -> Any:
    """Return a LlamaForCausalLM of the sizes of `model`, with random weights.

    Args:
        attention: the mixer of all its layers.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM._from_config(
        LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=attention.num_heads,
            num_key_value_heads=attention.num_kv_heads,
            head_dim=attention.head_dim,
            intermediate_size=model.ffns[model.layers[0].ffn].intermediate_size,
            rms_norm_eps=model.norm_eps,
            tie_word_embeddings=model.tie_embeddings,
            max_position_embeddings=max_positions,
            use_cache=False,
            attention_bias=attention.qkv_bias,
        ),
        attn_implementation="sdpa",
        dtype=dtype,
    )


def _full_attention(model: ModelConfig) -> SoftmaxAttentionConfig | None:
    """Return the one mixer of a model that Llama can express, else None."""
    names = {name for layer in layer_list(model) for name in layer.mixers}
    if len(names) != 1 or len(model.layers) != 1 or len(model.layers[0].mixers) != 1:
        return None
    mixer = model.mixers[names.pop()]
    if not isinstance(mixer, SoftmaxAttentionConfig) or mixer.qk_norm or mixer.rope_scaling:
        return None
    return mixer if mixer.window_size is None and mixer.rope_theta else None
