"""Suite decode of the benchmarks, and what makes decoding fast: the numbers stay the same."""

import pytest
import torch
from helpers.models import TINY, build_model, compose_config, compose_tree, one_rank_context

from cluster.accelerators.cpu import ACCELERATOR
from conf.schema import BenchConfig, build
from models.cache import KeyValueCache
from models.causal_lm import CausalLM
from trainer.bench.decode import bench_decode

HYBRID = (
    *TINY, "model.num_layers=3", "model.num_sinks=2",
    "model.layers=[{mixers:[linear],ffn:dense},{mixers:[full],ffn:dense},"
    "{mixers:[linear,window],ffn:dense}]",
)  # fmt: skip
EXPERTS = ("model=tiny_moe", "model.hidden_size=64")


def bench_config(*overrides: str) -> BenchConfig:
    tree = compose_tree("suite=decode", *TINY, *overrides, config_name="bench")
    return build(BenchConfig, tree)


def test_rows_compare_with_full_attention_and_transformers() -> None:
    config = bench_config(
        "contexts=[40,8]", "max_peer_seq_len=10", "dtype=float32", "num_threads=1",
        "model.layers=[{mixers:[linear],ffn:dense},{mixers:[window],ffn:dense}]",
        "model.num_layers=2",
    )  # fmt: skip
    rows = list(bench_decode(config, ACCELERATOR, 1.0))
    by_metric = {(row.case, row.metric): row for row in rows}
    short, long = (f"decode, {n} tokens of context" for n in (8, 40))
    # 2 layers keep 2 heads of 8 channels of keys and of values; one state is 2 heads of 8 x 8.
    assert by_metric[long, "cache_bytes"].peer_value == 2 * 40 * 2 * 2 * 8 * 4
    assert by_metric[long, "cache_bytes"].value == 2 * 8 * 8 * 4 + 5 * 2 * 2 * 8 * 4
    assert by_metric[short, "cache_bytes"].value == by_metric[long, "cache_bytes"].value
    seconds = by_metric[long, "seconds_per_token"]
    assert seconds.ratio == pytest.approx(seconds.peer_value / seconds.value)
    assert [row.case for row in rows if row.peer == "transformers"] == [f"{short}, full attention"]
    assert by_metric[short, "time over that at 8"].value > 0


def test_more_context_than_memory_is_refused() -> None:
    config = bench_config("contexts=[1000000000000]")
    with pytest.raises(ValueError, match="use contexts up to"):
        next(bench_decode(config, ACCELERATOR, 1.0))


@pytest.mark.parametrize("overrides", [HYBRID, EXPERTS], ids=["hybrid", "experts"])
def test_prepared_models_say_the_same_bit_for_bit(overrides: tuple[str, ...]) -> None:
    config = compose_config(*overrides).model
    plain, prepared = (build_model(config, dtype=torch.bfloat16).eval() for _ in range(2))
    prepared.prepare_inference()
    assert prepared.head.weight.dtype == torch.bfloat16
    tokens = torch.randint(config.vocab_size, (1, 12))
    assert torch.equal(*(_decode(m, tokens) for m in (plain, prepared)))


@torch.inference_mode()
def _decode(model: CausalLM, tokens: torch.Tensor) -> torch.Tensor:
    cache = model.new_cache()
    logits = [model.prefill(tokens[:, :4], one_rank_context([4]), cache)]
    logits += [model.decode(tokens[:, i : i + 1], cache, i) for i in range(4, tokens.shape[1])]
    return torch.stack(logits)


def test_cache_counts_what_it_holds_and_not_its_room() -> None:
    cache = KeyValueCache(None)
    assert cache.num_bytes == 0
    keys = torch.randn(1, 7, 3, 4)
    cache.fill(keys, keys)
    assert cache.num_bytes == 2 * keys.nbytes
    cache.append(keys[:, :1], keys[:, :1])
    assert cache.num_bytes == 2 * 8 * 3 * 4 * 4
