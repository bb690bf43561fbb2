"""`suite=decode`: a token after long contexts, beside full attention of the same sizes.

The caches are filled with random numbers of the right shape and dtype instead of a prompt, which
full attention would take hours to read; decoding is the real one. Transformers, which copies its
cache at every token, stands beside our full attention.
"""

import dataclasses
from collections.abc import Callable, Iterator

import psutil
import torch

from conf.schema import BenchConfig, LayerConfig, ModelConfig, OpsConfig, SpikeConfig
from models.cache import KeyValueCache, LinearState, MixerCache
from models.causal_lm import CausalLM, layer_list
from models.mixers.softmax_attention import SoftmaxAttention, SoftmaxAttentionConfig
from parallel.comm import Comm
from parallel.layout import build_layout
from parallel.mesh import Mesh
from parallel.sequence import SequenceContext
from trainer.accelerator import Accelerator
from trainer.bench.rows import Row, median_seconds
from trainer.bench.train_step import build_llama
from trainer.restore import restore_model

REPORTED = {65536: 4.04, 131072: 7.52, 262144: 15.39}
"""Speed over full attention that arXiv:2509.05276 reports by context: a model of 1B parameters with
weights in 4 bits, on a CPU."""
TOKENS = 4
"""Tokens of a timed repetition."""


def bench_decode(config: BenchConfig, accelerator: Accelerator, peak: float) -> Iterator[Row]:
    """Yield seconds per token and bytes of the cache at each of `config.contexts`.

    Raises:
        ValueError: the cache of full attention does not fit into memory.
    """
    device = accelerator.device(0)
    ours = _our_model(config, device)
    base = _full_attention_model(ours)
    _check_memory(config, base)
    first = min(config.contexts)
    reference = _Decoding(ours, first)
    for context in sorted(config.contexts):
        hybrid, full = _Decoding(ours, context), _Decoding(base, context)
        sides = [hybrid.run, full.run, reference.run]
        if context <= config.max_peer_seq_len and (peer := _peer(base, context)):
            sides.append(peer)
        seconds = median_seconds(sides, config.repeats, accelerator.synchronize)
        per_token = [taken / TOKENS for taken in seconds]
        yield from _rows(context, per_token, hybrid.num_bytes, full.num_bytes)
        flatness = per_token[0] / per_token[2]
        name = f"time over that at {first:,}"
        yield Row(f"decode, {context:,} tokens of context", name, flatness, "x")


def _rows(context: int, per_token: list[float], ours: int, base: int) -> Iterator[Row]:
    """Yield the rows of a context.

    Args:
        per_token: seconds of this model, full attention, the reference and, if there, the peer.
        ours, base: bytes of their caches.
    """
    case = f"decode, {context:,} tokens of context"
    mine, full = per_token[:2]
    name = "full attention"
    yield Row(case, "seconds_per_token", mine, "s", name, full, full / mine)
    yield Row(case, "cache_bytes", ours, "bytes", name, base, base / ours)
    yield Row(case, "cache_bytes_per_token", ours / context, "bytes", name, base / context,
              base / ours)  # fmt: skip
    if len(per_token) > 3:
        peer = per_token[3]
        yield Row(f"{case}, full attention", "seconds_per_token", full, "s", "transformers",
                  peer, peer / full)  # fmt: skip
    if context in REPORTED:
        reported = REPORTED[context]
        yield Row(case, "speed over base", full / mine, "x", "reported, 1B in 4 bits", reported,
                  full / mine / reported)  # fmt: skip


class _Decoding:
    """A model that decodes one token after the other behind a context that was made up."""

    def __init__(self, model: CausalLM, context: int) -> None:
        self._model, self._position = model, context
        self._token = torch.zeros(1, 1, dtype=torch.int64, device=model.embed.weight.device)
        self._cache = _made_up_cache(model, context)
        self.num_bytes = sum(cache.num_bytes for entry in self._cache for cache in entry.values())

    @torch.inference_mode()
    def run(self) -> None:
        for _ in range(TOKENS):
            self._model.decode(self._token, self._cache, self._position)
            self._position += 1


@torch.inference_mode()
def _made_up_cache(model: CausalLM, context: int) -> list[dict[str, MixerCache]]:
    """Return a cache as after `context` tokens: of random numbers, its sinks real."""
    device = model.embed.weight.device
    cache = model.new_cache()
    one = SequenceContext(build_layout(torch.tensor([0, 1], dtype=torch.int32)), model.ops,
                          Comm(Mesh(0, 1, 0, device)))  # fmt: skip
    model.prefill(torch.zeros(1, 1, dtype=torch.int64, device=device), one, cache)
    for (_, layer), entry in zip(model.named_layers(), cache, strict=True):
        for name, mixer in layer.mixer.named_branches():
            kept = entry[name]
            if isinstance(kept, LinearState):
                assert kept.state is not None, "the prompt has filled it"
                kept.state = torch.randn_like(kept.state)
            elif isinstance(kept, KeyValueCache) and isinstance(mixer, SoftmaxAttention):
                num_rows = model.config.num_sinks + min(context, kept.window_size or context)
                shape = (1, num_rows, mixer.config.num_kv_heads, mixer.config.head_dim)
                numbers = torch.empty(shape, dtype=model.embed.dtype, device=device).normal_()
                kept.fill(numbers, numbers, model.config.num_sinks)
    return cache


def _our_model(config: BenchConfig, device: torch.device) -> CausalLM:
    if config.run is not None:
        model = restore_model(config.run, device).model
    else:
        dtype, spike = getattr(torch, config.dtype), SpikeConfig(enabled=False, k=3.0)
        model = CausalLM(config.model, spike, OpsConfig(), dtype=dtype).eval()
        model.reset_parameters(0)
        model.to(device)
    model.prepare_inference()
    return model


def _full_attention_model(ours: CausalLM) -> CausalLM:
    """Return a model of the same sizes whose layers all have full attention and no spikes."""
    config = ours.config
    model = CausalLM(
        dataclasses.replace(
            config,
            layers=[LayerConfig(mixers=["base"], ffn=layer.ffn) for layer in layer_list(config)],
            mixers={"base": _full_attention(config)},
        ),
        SpikeConfig(enabled=False, k=3.0),
        ours.ops,
        dtype=ours.embed.dtype,
    ).eval()
    model.reset_parameters(0)
    model.to(ours.embed.weight.device)
    model.prepare_inference()
    return model


def _full_attention(config: ModelConfig) -> SoftmaxAttentionConfig:
    mixers = [config.mixers[name] for layer in layer_list(config) for name in layer.mixers]
    for mixer in mixers:
        if isinstance(mixer, SoftmaxAttentionConfig):
            return dataclasses.replace(mixer, window_size=None)
    return SoftmaxAttentionConfig(
        num_heads=mixers[0].num_heads,
        num_kv_heads=mixers[0].num_kv_heads,
        head_dim=mixers[0].head_dim,
        window_size=None,
        rope_theta=10000.0,
        qkv_bias=mixers[0].qkv_bias,
    )


def _peer(base: CausalLM, context: int) -> Callable[[], None] | None:
    """Return decoding by Transformers of a model like `base`; None if Llama cannot be like it."""
    config = base.config
    if config.num_sinks or any(config.ffns[layer.ffn].moe for layer in config.layers):
        return None
    from transformers import DynamicCache

    attention = config.mixers["base"]
    device, dtype = base.embed.weight.device, base.embed.dtype
    model = build_llama(config, attention, dtype, context).to(device).eval()
    cache = DynamicCache(config=model.config)
    shape = (1, attention.num_kv_heads, context, attention.head_dim)
    numbers = torch.empty(shape, dtype=dtype, device=device).normal_()
    for layer in range(config.num_layers):
        cache.update(numbers, numbers, layer)
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def run() -> None:
        for _ in range(TOKENS):
            model(input_ids=token, past_key_values=cache, use_cache=True)

    return run


def _check_memory(config: BenchConfig, base: CausalLM) -> None:
    attention = base.config.mixers["base"]
    per_token = (
        2 * base.config.num_layers * attention.num_kv_heads * attention.head_dim
        * base.embed.dtype.itemsize
    )  # fmt: skip
    free = psutil.virtual_memory().available
    longest = max(config.contexts)
    if per_token * longest > 0.9 * free:
        raise ValueError(
            f"contexts: full attention keeps {per_token * longest / 1e9:.1f} GB of {longest:,} "
            f"tokens and {free / 1e9:.1f} GB of memory are free; use contexts up to "
            f"{int(0.9 * free / per_token):,}"
        )
