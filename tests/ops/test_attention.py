"""Attention: the definition against PyTorch's own, the implementations against the definition."""

from contextlib import ExitStack
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers.assertions import assert_close

from ops.attention import attention, merge, torch_impl, triton_impl
from ops.attention.settings import Settings
from ops.attention.torch_forward import attend, attend_portable
from ops.attention.torch_impl import attention_bwd, attention_fwd
from ops.cpp_build import explain_no_amx
from ops.triton_runtime import trying

# Triton's interpreter computes with what is not there before it hides it.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

IMPLEMENTATIONS = ("torch",)
CPP_ABSENCE = explain_no_amx("cpu")
ROWS = (
    ("torch", torch.float64),
    ("torch", torch.float32),
    ("torch", torch.bfloat16),
    pytest.param(
        "cpp", torch.bfloat16, marks=pytest.mark.skipif(bool(CPP_ABSENCE), reason=str(CPP_ABSENCE))
    ),
)
TRITON_ROW = ("triton", torch.float32)


def name_row(value: object) -> str:
    """Return the name of an implementation or a dtype."""
    return str(value).removeprefix("torch.")


class Case(NamedTuple):
    """One row: documents packed in a row, or the rows of a batch of equally long ones."""

    lengths: tuple[int, ...]
    H: int = 3
    H_kv: int = 3
    D: int = 64
    window_size: int | None = None
    num_sinks: int = 0
    causal: bool = True
    packed: bool = True
    scale: float | None = None
    magnitude: float = 1.0

    def __str__(self) -> str:
        lengths = "+".join(map(str, self.lengths)) if self.packed else f"{len(self.lengths)}x"
        lengths += "" if self.packed else str(self.lengths[0])
        options = {
            "-w": self.window_size,
            "-sinks": self.num_sinks,
            "-scale": self.scale,
            "-x": self.magnitude if self.magnitude != 1.0 else None,
        }
        suffix = "".join(f"{name}{value}" for name, value in options.items() if value)
        full = "" if self.causal else "-full"
        return f"T{lengths}-H{self.H}/{self.H_kv}-D{self.D}{suffix}{full}"


CASES = [
    *[Case((T,), window_size=w) for T in (1, 63, 64, 65, 300) for w in (None, 1, 16, 1000)],
    Case((300,), H=6, H_kv=2),
    Case((300,), H=7, H_kv=1, window_size=70),
    Case((65,), H=7, H_kv=1, D=32),
    Case((300,), D=32, window_size=100),
    Case((600,), H=1, H_kv=1, window_size=300),
    Case((65, 65), H=6, H_kv=2, packed=False),
    Case((300, 300), H=6, H_kv=2, window_size=16, num_sinks=3, packed=False),
    Case((1, 300, 1)),
    Case((1, 70, 70, 70, 2), window_size=16),
    Case((64, 64, 0, 64), H=6, H_kv=2, num_sinks=2),
    Case((1, 300, 3), H=6, H_kv=2, window_size=16, num_sinks=4),
    Case((300,), num_sinks=65),
    Case((65,), num_sinks=100),
    Case((65,), num_sinks=1, window_size=1),
    Case((300,), H=6, H_kv=2, D=32, num_sinks=5, window_size=100),
    Case((65,), H=7, H_kv=1, causal=False),
    Case((300, 300), causal=False, packed=False),
    Case((1, 63, 64), H=6, H_kv=2, causal=False),
    Case((100,), scale=0.3),
    Case((37, 333, 130), H=6, H_kv=2, window_size=128),
    Case((20, 411, 33), H=4, H_kv=2, D=96),
    Case((130,), H=2, H_kv=1, D=256),
]  # fmt: skip
SMALL = [case for case in CASES if sum(case.lengths) <= 130]
INTERPRETED = [
    *[Case((T,), H=1, H_kv=1, D=32, window_size=w) for T in (1, 63, 64, 65) for w in (None, 16)],
    Case((65,), H=1, H_kv=1, window_size=1),
    Case((63,), H=3, H_kv=1),
    Case((65,), H=1, H_kv=1, D=128),
    Case((65, 65), H=2, H_kv=2, D=32, window_size=40, packed=False),
    Case((70, 70), H=2, H_kv=1, D=32, window_size=16, num_sinks=3, packed=False),
    Case((1, 100, 1), H=2, H_kv=1, D=32),
    Case((1, 50, 50, 2), H=1, H_kv=1, D=32, window_size=16),
    Case((33, 0, 64), H=2, H_kv=1, D=32, num_sinks=2),
    Case((3, 1, 5, 1, 2, 8), H=1, H_kv=1, D=32, num_sinks=2, window_size=3),
    Case((30, 100, 7), H=1, H_kv=1, D=32, window_size=16, num_sinks=20),
    Case((65,), H=1, H_kv=1, D=32, num_sinks=100),
    Case((65,), H=2, H_kv=1, D=32, causal=False),
    Case((1, 63, 34), H=1, H_kv=1, D=32, causal=False),
    Case((40,), H=1, H_kv=1, D=24, scale=-0.3),
    Case((40,), H=1, H_kv=1, D=256),
]
EXTREME = [
    Case((65,), magnitude=100.0),
    Case((65,), magnitude=100.0, window_size=16, num_sinks=2),
    Case((65,), H=2, H_kv=1, D=32, magnitude=100.0, causal=False),
]


class Results(NamedTuple):
    out: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


def make_inputs(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return q, k, v, dout and dlse."""
    rows = (1, sum(case.lengths)) if case.packed else (len(case.lengths), case.lengths[0])
    shapes = [(*rows, H, case.D) for H in (case.H, case.H_kv, case.H_kv, case.H)]
    q, k, v, dout = (torch.randn(shape).to(dtype) for shape in shapes)
    return [q * case.magnitude, k, v, dout, torch.randn(rows[0], case.H, rows[1])]


def run(case: Case, inputs: list[torch.Tensor], impl: str) -> Results:
    *qkv, dout, dlse = inputs
    leaves = [x.detach().requires_grad_() for x in qkv]
    bounds = torch.tensor([0, *case.lengths]).cumsum(0).int() if case.packed else None
    out, lse = attention(
        *leaves,
        causal=case.causal,
        window_size=case.window_size,
        num_sinks=case.num_sinks,
        scale=case.scale,
        cu_seqlens=bounds,
        impl=impl,
    )
    assert out.dtype == qkv[0].dtype
    assert lse.dtype == torch.float32
    return Results(out, lse, *torch.autograd.grad((out, lse), leaves, (dout, dlse)))


def lse_tolerance(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in whose tolerance the log-sum-exp of `dtype` inputs is."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def visible_keys(case: Case, T: int) -> torch.Tensor:
    """Return [T, T], key by key from the words of the contract."""
    visible = torch.zeros(T, T, dtype=torch.bool)
    start = 0
    for length in case.lengths if case.packed else case.lengths[:1]:
        for t in range(length):
            for s in range(length):
                in_window = case.window_size is None or s > t - case.window_size
                if s < case.num_sinks or not case.causal or (s <= t and in_window):
                    visible[start + t, start + s] = True
        start += length
    return visible


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_reference_is_masked_softmax_attention(case: Case) -> None:
    inputs = make_inputs(case, torch.float64)
    results = run(case, inputs, "reference")
    leaves = [x.requires_grad_() for x in inputs[:3]]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    group, mask = case.H // case.H_kv, visible_keys(case, q.shape[2])
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=case.scale)
    scores = (q * (case.scale or case.D**-0.5)) @ k.mT
    lse = torch.log(torch.where(mask, scores.exp(), 0.0).sum(-1))
    grads = torch.autograd.grad((out.transpose(1, 2), lse), leaves, inputs[3:])
    assert_close("lse", results.lse, lse, torch.float32)
    for name, value in zip(("dq", "dk", "dv"), grads, strict=True):
        # The gradient for lse enters the implementations in float32.
        assert_close(name, getattr(results, name), value, torch.float64)
    assert_close("out", results.out, out.transpose(1, 2), torch.float64)


@pytest.mark.parametrize(("impl", "dtype"), ROWS, ids=name_row)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_implementation_equals_reference(case: Case, dtype: torch.dtype, impl: str) -> None:
    inputs = make_inputs(case, dtype)
    expected = run(case, [x.double() for x in inputs[:4]] + inputs[4:], "reference")
    actual = run(case, inputs, impl)
    for name, value in actual._asdict().items():
        tolerance = lse_tolerance(dtype) if name == "lse" else dtype
        assert_close(name, value, getattr(expected, name), tolerance)


@pytest.mark.parametrize("blocks", [(32, 16), (16, 32)], ids=["Q32-K16", "Q16-K32"])
@pytest.mark.parametrize("case", INTERPRETED, ids=str)
def test_triton_equals_reference(case: Case, blocks: tuple[int, int]) -> None:
    inputs = make_inputs(case, torch.float32)
    expected = run(case, [x.double() for x in inputs[:4]] + inputs[4:], "reference")
    settings = {"BLOCK_Q": blocks[0], "BLOCK_K": blocks[1], "num_warps": 4, "num_stages": 1}
    with ExitStack() as stack:  # short rows have many blocks
        for kernel in ("fwd", "bwd_keys", "bwd_queries"):
            stack.enter_context(trying("attention", f"attention_{kernel}_fp32", 256, settings))
        actual = run(case, inputs, "triton")
    for name, value in actual._asdict().items():
        assert_close(name, value, getattr(expected, name), torch.float32)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Case((1000,), H=1, H_kv=1, D=32, window_size=300, num_sinks=4), torch.float32),
        (Case((63, 1, 66), H=2, H_kv=1, D=64), torch.bfloat16),
        (Case((65, 65), H=3, H_kv=3, D=32, window_size=16, packed=False), torch.bfloat16),
        (Case((65,), H=2, H_kv=1, D=128, num_sinks=3, window_size=20), torch.float16),
    ],
    ids=name_row,
)
def test_triton_equals_reference_with_its_own_blocks(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    expected = run(case, [x.double() for x in inputs[:4]] + inputs[4:], "reference")
    for name, value in run(case, inputs, "triton")._asdict().items():
        tolerance = lse_tolerance(dtype) if name == "lse" else dtype
        assert_close(name, value, getattr(expected, name), tolerance)


@pytest.mark.parametrize("num_sinks", [0, 3])
def test_triton_does_not_visit_keys_out_of_the_window(num_sinks: int) -> None:
    case = Case((200,), H=1, H_kv=1, D=32, window_size=20, num_sinks=num_sinks)
    inputs = make_inputs(case, torch.float32)
    for x in inputs[:4]:
        x[:, num_sinks:40] = torch.nan  # hiding it would not help: 0 times NaN is NaN
    results = run(case, inputs, "triton")
    for name in ("out", "dq", "dk", "dv"):
        assert getattr(results, name)[:, 128:].isfinite().all(), name


def test_triton_names_the_largest_head_dim() -> None:
    x = torch.zeros(1, 8, 1, 264)
    with pytest.raises(ValueError, match="at most 256; use"):
        attention(x, x, x, impl="triton")


@pytest.mark.parametrize(("impl", "dtype"), [*ROWS[1:], TRITON_ROW], ids=name_row)
@pytest.mark.parametrize("case", EXTREME, ids=str)
def test_extreme_scores_give_no_overflow(case: Case, dtype: torch.dtype, impl: str) -> None:
    inputs = make_inputs(case, dtype)
    expected = run(case, [x.double() for x in inputs[:4]] + inputs[4:], "reference")
    for name, value in run(case, inputs, impl)._asdict().items():
        # Scores of several hundred leave no more than 16-bit accuracy to their exponentials.
        assert_close(name, value, getattr(expected, name), torch.bfloat16)


@pytest.mark.parametrize(("impl", "dtype"), [*ROWS[1:], TRITON_ROW], ids=name_row)
@pytest.mark.parametrize("num_sinks", [0, 3])
def test_inputs_need_not_be_contiguous(num_sinks: int, dtype: torch.dtype, impl: str) -> None:
    case = Case((100,), H=6, H_kv=2, num_sinks=num_sinks, window_size=16)
    inputs = make_inputs(case, dtype)
    expected = run(case, inputs, impl)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:4]]
    strided += [inputs[4].mT.contiguous().mT]
    for name, value in run(case, strided, impl)._asdict().items():
        assert_close(name, value, getattr(expected, name), dtype)


@pytest.mark.parametrize(("impl", "dtype"), [ROWS[0], TRITON_ROW], ids=name_row)
@pytest.mark.parametrize("only", ["out", "lse"])
def test_each_result_can_be_differentiated_alone(only: str, dtype: torch.dtype, impl: str) -> None:
    inputs = [x.requires_grad_() for x in make_inputs(Case((65,)), dtype)[:3]]
    results = [
        dict(zip(("out", "lse"), attention(*inputs, impl=x), strict=True))
        for x in ("reference", impl)
    ]
    grads = [torch.autograd.grad(x[only].sum(), inputs, allow_unused=True) for x in results]
    for name, expected, actual in zip(("dq", "dk", "dv"), *grads, strict=True):
        expected = torch.zeros_like(actual) if expected is None else expected
        assert_close(name, actual, expected, dtype)


@pytest.mark.parametrize(("impl", "dtype"), [ROWS[0], ROWS[3], TRITON_ROW], ids=name_row)
@pytest.mark.parametrize(("T", "T_k"), [(30, 140), (140, 30)])
def test_keys_may_be_more_or_fewer_than_queries_without_causal(
    T: int, T_k: int, dtype: torch.dtype, impl: str
) -> None:
    q, k, v, dout, dlse = make_inputs(Case((140,), H=6, H_kv=2), dtype)
    leaves = [x.clone().requires_grad_() for x in (q[:, :T], k[:, :T_k], v[:, :T_k])]
    results = []
    for name in ("reference", impl):
        out, lse = attention(*leaves, causal=False, impl=name)
        grads = torch.autograd.grad((out, lse), leaves, (dout[:, :T], dlse[:, :, :T]))
        results.append((out, *grads))
    for name, expected, actual in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert_close(name, actual, expected, dtype)
    plain = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves), enable_gqa=True)
    assert_close("out", results[0][0].transpose(1, 2), plain, dtype)


def test_gradients_of_parts_of_the_keys_sum_to_those_of_the_whole() -> None:
    q, k, v, dout, dlse = make_inputs(Case((70,), H=6, H_kv=2), torch.float64)
    settings = Settings(False, None, 0, 0.125, None)
    out, lse = attention_fwd(q, k, v, settings)
    dq, dk, dv = attention_bwd(dout, dlse, q, k, v, out, lse, settings)
    parts = [
        attention_bwd(dout, dlse, q, k[:, keys], v[:, keys], out, lse, settings)
        for keys in (slice(0, 30), slice(30, 70))
    ]
    assert_close("dq", parts[0][0] + parts[1][0], dq, torch.float64)
    assert_close("dk", torch.cat([part[1] for part in parts], 1), dk, torch.float64)
    assert_close("dv", torch.cat([part[2] for part in parts], 1), dv, torch.float64)


class Partial(NamedTuple):
    out: torch.Tensor
    lse: torch.Tensor


def make_partials(count: int, dtype: torch.dtype) -> list[Partial]:
    """Return results over disjoint keys, of 50 queries and 3 heads of 40."""
    return [
        Partial(torch.randn(1, 50, 3, 40).to(dtype), 3 * torch.randn(1, 3, 50))
        for _ in range(count)
    ]


MERGE_ROWS = (
    ("cpp", torch.float32),
    ("torch", torch.float32),
    ("torch", torch.bfloat16),
    ("triton", torch.float32),
    ("triton", torch.bfloat16),
)


@pytest.mark.parametrize(("impl", "dtype"), MERGE_ROWS, ids=name_row)
@pytest.mark.parametrize("is_first_wide", [False, True], ids=["same", "float32-first"])
def test_merge_equals_its_reference(is_first_wide: bool, dtype: torch.dtype, impl: str) -> None:
    first, other = make_partials(2, dtype)
    if is_first_wide:
        first = first._replace(out=first.out.float())
    first.lse[:, :, :20] = other.lse[:, :, 10:30] = float("-inf")  # 10 queries without any key
    inputs = [*first, *other]
    grads = torch.randn(first.out.shape), torch.randn(first.lse.shape)
    results = []
    for name in ("reference", impl):
        wide = torch.double if name == "reference" else first.out.dtype
        leaves = [x.detach().clone() for x in inputs]
        if name == "reference":
            leaves[0], leaves[2] = leaves[0].double(), leaves[2].double()
        leaves = [x.requires_grad_() for x in leaves]
        out, lse = merge(*leaves, impl=name)
        assert out.dtype == wide
        douts = grads[0].to(first.out.dtype).to(wide), grads[1]
        results.append((out, lse, *torch.autograd.grad((out, lse), leaves, douts)))
    names = ("out", "lse", "dout", "dlse", "dother_out", "dother_lse")
    for name, expected, actual in zip(names, *results, strict=True):
        empty = expected == float("-inf")
        assert torch.equal(empty, actual == float("-inf"))
        exact = "lse" in name or (name in ("out", "dout") and is_first_wide)
        tolerance = torch.float32 if exact else dtype
        assert_close(name, actual.masked_fill(empty, 0), expected.masked_fill(empty, 0), tolerance)


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS, "triton"])
def test_merged_attention_equals_attention_to_all_keys(impl: str) -> None:
    q, k, v, dout, dlse = make_inputs(Case((40,), H=4, H_kv=2, D=32), torch.float32)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    whole = attention(*leaves, causal=False, impl="reference")
    expected = (*whole, *torch.autograd.grad(whole, leaves, (dout, dlse)))
    parts = [
        attention(q, k[:, keys], v[:, keys], causal=False, impl=impl)
        for keys in (slice(0, 13), slice(13, 40))
    ]
    merged = merge(*parts[0], *parts[1], impl=impl)
    actual = (*merged, *torch.autograd.grad(merged, leaves, (dout, dlse)))
    for name, a, b in zip(Results._fields, actual, expected, strict=True):
        assert_close(name, a, b, torch.float32)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_merges_of_eight_parts_in_any_order_give_the_same(impl: str) -> None:
    parts = make_partials(8, torch.float32)
    lse = torch.stack([part.lse for part in parts]).double()
    weights = lse.softmax(0).mT[..., None]
    out = (weights * torch.stack([part.out for part in parts])).sum(0)
    for _ in range(2):
        order = torch.randperm(8).tolist()
        total = Partial(torch.zeros_like(parts[0].out), torch.full_like(parts[0].lse, -torch.inf))
        for i in order:
            total = Partial(*merge(*total, *parts[i], impl=impl))
        assert_close("out", total.out, out, torch.float32)
        assert_close("lse", total.lse, lse.logsumexp(0), torch.float32)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_partial_results_far_apart_merge_without_overflow(impl: str) -> None:
    first, other = make_partials(2, torch.float32)
    far = other._replace(lse=other.lse + 1000.0)
    for pair in ((first, far), (far, first)):
        leaves = [x.clone().requires_grad_() for part in pair for x in part]
        out, lse = merge(*leaves, impl=impl)
        assert torch.equal(out, far.out)
        assert torch.equal(lse, far.lse)
        for grad in torch.autograd.grad((out.sum() + lse.sum()), leaves):
            assert grad.isfinite().all()


@pytest.mark.parametrize(("impl", "dtype"), MERGE_ROWS[1:], ids=name_row)
def test_shards_of_the_keys_add_up_as_in_a_ring(dtype: torch.dtype, impl: str) -> None:
    case = Case((80,), H=4, H_kv=2, D=32)
    inputs = make_inputs(case, dtype)
    expected = run(case, [x.double() for x in inputs[:4]] + inputs[4:], "reference")
    q, k, v, dout, dlse = inputs
    module = {"torch": torch_impl, "triton": triton_impl}[impl]
    before, own = (Settings(causal, None, 0, 32**-0.5, None) for causal in (False, True))
    halves = slice(0, 40), slice(40, 80)

    # The second half of the queries sees its own keys causally and all of the first half's.
    out, lse = module.attention_fwd(q[:, halves[1]], k[:, halves[1]], v[:, halves[1]], own)
    part = module.attention_fwd(q[:, halves[1]], k[:, halves[0]], v[:, halves[0]], before)
    out, lse = merge(out.float(), lse, *part, impl=impl)
    assert_close("out", out, expected.out[:, halves[1]], dtype)
    assert_close("lse", lse, expected.lse[:, :, halves[1]], lse_tolerance(dtype))

    first = module.attention_fwd(*(x[:, halves[0]] for x in (q, k, v)), own)
    grads = [torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v)]
    late = (out.to(dtype), lse)
    for queries, keys, results, settings in (
        (halves[0], halves[0], first, own),
        (halves[1], halves[1], late, own),
        (halves[1], halves[0], late, before),
    ):
        parts = module.attention_bwd(
            dout[:, queries],
            dlse[:, :, queries],
            q[:, queries],
            k[:, keys],
            v[:, keys],
            *results,
            settings,
        )
        for grad, share, rows in zip(grads, parts, (queries, keys, keys), strict=True):
            grad[:, rows] += share
    for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
        assert_close(name, grad, getattr(expected, name), dtype)


@pytest.mark.parametrize("kind", ["open", "causal", "biased"])
def test_portable_forward_equals_the_fused_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ops.attention.torch_forward.MAX_SCORES", 10_000)  # several blocks of rows
    inputs = make_inputs(Case((65, 65), H=6, H_kv=2, packed=False), torch.float32)
    q, k, v = (x.transpose(1, 2) for x in inputs[:3])
    hidden = torch.rand(65, 65).gt(0.5).fill_diagonal_(False)
    bias = torch.zeros(65, 65).masked_fill(hidden, float("-inf")) if kind == "biased" else None
    results = [
        f(q, k, v, 0.3, causal=kind == "causal", bias=bias) for f in (attend, attend_portable)
    ]
    for name, expected, actual in zip(("out", "lse"), *results, strict=True):
        assert_close(name, actual, expected, torch.float32)


def test_long_rows_are_cut_into_tiles_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ops.attention.torch_backward.TILE_KEYS", 50)
    case = Case((1, 300), H=6, H_kv=2, window_size=200, num_sinks=60)
    inputs = make_inputs(case, torch.float64)
    expected = run(case, inputs, "reference")
    for name, value in run(case, inputs, "torch")._asdict().items():
        dtype = torch.float32 if name == "lse" else torch.float64
        assert_close(name, value, getattr(expected, name), dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 8, 4, 16)}, "v has shape"),
        ({"k": torch.zeros(1, 8, 4, 16), "v": torch.zeros(1, 8, 4, 16)}, "do not divide the 6"),
        ({"k": torch.zeros(1, 9, 2, 16), "v": torch.zeros(1, 9, 2, 16)}, "needs as many"),
        ({"k": torch.zeros(1, 8, 2, 16).double()}, "convert k"),
        ({"q": torch.zeros(8, 6, 16)}, "q has shape"),
        ({"q": torch.zeros(1, 8, 6, 32)}, "batch and dim must be equal"),
        ({"window_size": 0}, "window_size=0 must be at least 1"),
        ({"window_size": 4, "causal": False}, "needs causal=True"),
        ({"num_sinks": -1}, "num_sinks=-1 must not be negative"),
        ({"cu_seqlens": torch.tensor([0, 8])}, "give int32"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "must rise from 0 to the 8"),
        ({"cu_seqlens": torch.tensor([0, 5, 3, 8], dtype=torch.int32)}, "must rise from 0"),
        ({"impl": "cuda"}, "no such implementation"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    k = torch.zeros(1, 8, 2, 16)
    arguments = {"q": torch.zeros(1, 8, 6, 16), "k": k, "v": k, **change}
    with pytest.raises(ValueError, match=message):
        attention(**arguments)


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
def test_no_tokens_give_empty_results(impl: str) -> None:
    q, k = torch.zeros(1, 0, 2, 32), torch.zeros(1, 5, 2, 32)
    results = attention(q, q, q, impl=impl)
    assert [list(x.shape) for x in results] == [[1, 0, 2, 32], [1, 2, 0]]
    assert [list(x.shape) for x in merge(*results, *results, impl=impl)] == [
        [1, 0, 2, 32],
        [1, 2, 0],
    ]
    out, lse = attention(k, q, q, causal=False, impl=impl)
    assert torch.equal(out, torch.zeros_like(k))
    assert torch.equal(lse, torch.full((1, 2, 5), -torch.inf))


def test_packed_documents_need_a_batch_of_one() -> None:
    x = torch.zeros(2, 8, 2, 16)
    with pytest.raises(ValueError, match="flatten the batch"):
        attention(x, x, x, cu_seqlens=torch.tensor([0, 8], dtype=torch.int32))
