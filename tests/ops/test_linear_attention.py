"""Linear attention: the recurrence against a masked product, the implementations against it."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from helpers import recurrent
from helpers.assertions import assert_close
from helpers.recurrent import Case, Inputs, assert_all_close, make_decay, make_inputs, to_double

from ops.linear_attention import linear_attention, linear_attention_step
from ops.linear_attention.torch_impl import _chunk_size

IMPLEMENTATIONS = ("torch", "triton")
DTYPES = {
    "torch": (torch.float64, torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16),
}
DECAYS = (None, "scalar", "vector")
NAMES = ("q", "k", "v", "log_decay", "initial_state")


CASES = [
    *[Case((T,), decay=decay) for T in (1, 63, 64, 65, 300) for decay in DECAYS],
    *[Case((65,), decay=f"{size}-{cut}") for size in DECAYS[1:] for cut in ("50", "inf")],
    *[Case((128,), decay=f"{size}-inf") for size in DECAYS[1:]],  # cut where a chunk begins
    Case((300,), decay="vector-50", initial_state=True),
    Case((100,), decay="vector-strong"),
    Case((100,), decay="scalar-strong", initial_state=True),
    Case((64,), decay=None, initial_state=True),
    Case((65,), decay="scalar", initial_state=True),
    Case((63, 63, 63), packed=False, initial_state=True),
    Case((128, 128), packed=False, decay=None),
    Case((1, 70, 1, 28), initial_state=True),
    Case((1, 130, 5), decay="scalar", initial_state=True),
    Case((5, 64, 64, 1), decay=None, initial_state=True),
    Case((3, 70), decay="vector-inf", initial_state=True),
    Case((3, 0, 70, 0), initial_state=True),
    Case((100,), H=3, H_state=3, D=64),
    Case((70,), H=6, H_state=2, initial_state=True),
    Case((70, 2), H=7, H_state=1, decay="scalar", initial_state=True),
    Case((65,), H=7, H_state=1, decay="vector-strong"),
    Case((70,), H=6, H_state=2, D=32, D_v=64, decay=None),
    Case((65, 1), H=3, H_state=1, D=64, D_v=32, initial_state=True),
]  # fmt: skip
SMALL = [case for case in CASES if sum(case.lengths) <= 140 and 0 not in case.lengths]
# The interpreter takes a millisecond for a few operations of a block: fewer and smaller rows.
TRITON_CASES = {
    torch.float32: [
        *[Case((T,), H=1, H_state=1, decay=decay) for T in (1, 63, 64, 65) for decay in DECAYS],
        *[
            Case((65,), H=1, H_state=1, decay=f"{n}-{cut}")
            for n in DECAYS[1:]
            for cut in (50, "inf")
        ],
        *[Case((128,), H=1, H_state=1, decay=f"{size}-inf") for size in DECAYS[1:]],
        Case((1000,), H=1, H_state=1, initial_state=True),
        Case((100,), H=2, H_state=1, decay="vector-strong"),
        Case((100,), H=2, H_state=1, decay="scalar-strong", initial_state=True),
        Case((63, 63, 63), H=1, H_state=1, packed=False, initial_state=True),
        Case((1, 70, 0, 1, 28), H=1, H_state=1, initial_state=True),
        Case((1, 130, 5), H=1, H_state=1, decay="scalar", initial_state=True),
        Case((5, 64, 64, 1), H=1, H_state=1, decay=None, initial_state=True),
        Case((3, 70), H=1, H_state=1, decay="vector-inf", initial_state=True),
        Case((20, 2), H=7, H_state=1, decay="scalar", initial_state=True),
        Case((20,), H=7, H_state=1),
        Case((20,), H=6, H_state=2, D=32, D_v=64, decay=None),
        Case((20,), H=3, H_state=3, D=64, initial_state=True),
        Case((20, 1), H=3, H_state=1, D=64, D_v=32, initial_state=True),
        Case((20,), H=1, H_state=1, D=128, initial_state=True),
        Case((20,), H=1, H_state=1, D=128, decay="scalar"),
        Case((20,), D=24, D_v=40, initial_state=True),
    ],
    torch.bfloat16: [
        *[Case((65,), H=1, H_state=1, decay=decay, initial_state=True) for decay in DECAYS],
        Case((3, 20), H=3, H_state=1, decay="vector-inf", initial_state=True),
        Case((20,), H=1, H_state=1, D=128, D_v=64),
    ],
}
ROWS = [
    *[(case, dtype, "torch") for dtype in DTYPES["torch"] for case in CASES],
    *[(case, dtype, "triton") for dtype in DTYPES["triton"] for case in TRITON_CASES[dtype]],
]


def masked_product(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out and final states from the T x T table of decays, without a recurrence."""
    B, T, H, D = x.q.shape
    group = H // x.k.shape[2]
    decay = torch.ones_like(x.k) if x.log_decay is None else x.log_decay.exp()
    decay = (decay if decay.dim() == 4 else decay[..., None]).expand_as(x.k)
    ends = [0, T] if x.cu_seqlens is None else x.cu_seqlens.tolist()
    outs: list[torch.Tensor] = []
    finals: list[torch.Tensor] = []
    for b in range(B):
        for start, stop in pairwise(ends):
            q, k, v, g = (t[b, start:stop] for t in (x.q, x.k, x.v, decay))
            t = torch.arange(stop - start)
            later = (t[None] > t[:, None])[..., None, None]
            kept = torch.where(later, g[None], 1.0).cumprod(1)  # [s, t, H_state, D]
            kept = kept * (t[None] >= t[:, None])[..., None, None]
            weighted = kept * k[:, None]
            scores = torch.einsum("thd,sthd->hts", q, weighted.repeat_interleave(group, 2))
            out = torch.einsum("hts,shv->thv", scores, v.repeat_interleave(group, 1))
            final = torch.einsum("shd,shv->hdv", weighted[:, -1], v)
            if x.initial_state is not None:
                since = g.cumprod(0)
                state = x.initial_state[len(finals)]
                entering = since[..., None] * state  # [t, H_state, D_k, D_v]
                out = out + torch.einsum("thd,thdv->thv", q, entering.repeat_interleave(group, 1))
                final = final + entering[-1]
            outs.append(out * D**-0.5)
            finals.append(final)
    return torch.cat(outs).view(B, T, H, -1), torch.stack(finals)


def run(x: Inputs, impl: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Run on the CPU, in Triton's interpreter if need be; Triton on a GPU where there is one."""
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    x = Inputs(*(None if t is None else t.to(device) for t in x))
    out, final = linear_attention(
        x.q,
        x.k,
        x.v,
        x.log_decay,
        initial_state=x.initial_state,
        output_final_state=True,
        cu_seqlens=x.cu_seqlens,
        impl=impl,
    )
    assert final is not None
    return out.cpu(), final.cpu()


def outputs_and_gradients(x: Inputs, impl: str | None) -> dict[str, torch.Tensor]:
    compute = partial(run, impl=impl) if impl else masked_product
    return recurrent.outputs_and_gradients(x, compute)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_reference_equals_the_masked_product(case: Case) -> None:
    x = make_inputs(case)
    assert_all_close(
        outputs_and_gradients(x, "reference"), outputs_and_gradients(x, None), torch.float64
    )


@pytest.mark.parametrize(("case", "dtype", "impl"), ROWS, ids=str)
def test_implementation_equals_the_reference(case: Case, dtype: torch.dtype, impl: str) -> None:
    x = make_inputs(case, dtype)
    actual = outputs_and_gradients(x, impl)
    assert actual["out"].dtype == dtype
    assert actual["final_state"].dtype == torch.promote_types(dtype, torch.float32)
    assert_all_close(actual, outputs_and_gradients(to_double(x), "reference"), dtype)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("used", ["out", "final_state"])
def test_either_output_may_be_used_alone(used: str, decay: str | None, impl: str) -> None:
    x = make_inputs(Case((2, 67), H=1, H_state=1, decay=decay, initial_state=True), torch.float32)
    results = []
    for y, name in ((x, impl), (to_double(x), "reference")):
        leaves = [None if t is None else t.clone().requires_grad_() for t in y[:5]]
        out, final = run(Inputs(*leaves, x.cu_seqlens), name)
        output = out if used == "out" else final
        named = {n: t for n, t in zip(NAMES, leaves, strict=True) if t is not None}
        weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype)
        loss = (output.flatten() * weight).sum()
        gradients = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
        results.append(dict(zip(named, gradients, strict=True)))
    assert_all_close(*results, torch.float32)


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_keys_may_be_what_the_decay_leaves(impl: str) -> None:
    """HGRN2: k = 1 - exp(log_decay), so that a gate's gradient takes both ways."""
    case = Case((5, 66), H=1, H_state=1, D=16)
    dtype = torch.float32 if impl == "triton" else torch.float64
    x = make_inputs(case, dtype)
    gate = torch.randn(x.k.shape).to(dtype)
    results = []
    for wide, function in ((dtype, lambda y: run(y, impl)), (torch.float64, masked_product)):
        leaf = gate.to(wide).requires_grad_()
        log_decay = torch.nn.functional.logsigmoid(leaf)
        inputs = [x.q.to(wide), 1 - log_decay.exp(), x.v.to(wide), log_decay, None, x.cu_seqlens]
        out, final = function(Inputs(*inputs))
        (dgate,) = torch.autograd.grad(out.square().sum() + final.square().sum(), leaf)
        results.append({"out": out.detach(), "final_state": final.detach(), "dgate": dgate})
    assert_all_close(*results, dtype)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("rate", [0.1, 0.5, 5.0])
def test_float16_survives_every_decay(rate: float, impl: str) -> None:
    x = make_inputs(Case((80,), H=1, H_state=1), torch.float16)
    x = x._replace(log_decay=torch.full(x.k.shape, -rate))
    expected = outputs_and_gradients(to_double(x), "reference")
    # float16 rounds finer than bfloat16, whose tolerance therefore holds.
    assert_all_close(outputs_and_gradients(x, impl), expected, torch.bfloat16)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_inputs_need_not_be_contiguous(impl: str) -> None:
    case = Case((67, 3), H=4, H_state=2, D=16, initial_state=True)
    x = make_inputs(case, torch.float32, strided=True)
    x = x._replace(log_decay=make_decay(case, 1, 70)[..., :1].expand_as(x.k))
    assert not any(t.is_contiguous() for t in x[:4] if t is not None)
    dense = Inputs(*(None if t is None else t.contiguous() for t in x))
    strided, expected = outputs_and_gradients(x, impl), outputs_and_gradients(dense, impl)
    assert_all_close(strided, expected, torch.float32)


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_state_is_returned_on_request_and_scale_multiplies_the_output(impl: str) -> None:
    x = make_inputs(Case((70,)), torch.float32)
    if impl == "triton" and torch.cuda.is_available():
        x = Inputs(*(None if t is None else t.cuda() for t in x))
    out, none = linear_attention(x.q, x.k, x.v, x.log_decay, impl=impl)
    assert none is None
    scaled, _ = linear_attention(x.q, x.k, x.v, x.log_decay, scale=3 * 32**-0.5, impl=impl)
    assert_close("scaled", scaled, 3 * out, torch.float32)


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("decay", DECAYS)
def test_two_halves_chained_by_the_state_equal_the_whole(decay: str | None, impl: str) -> None:
    dtype = torch.float32 if impl == "triton" else torch.float64
    x = make_inputs(
        Case((100,), H=2, H_state=1, decay=decay, initial_state=True, packed=False), dtype
    )
    out, final = run(x, impl)
    halves = []
    state = x.initial_state
    assert state is not None
    for part in (slice(0, 37), slice(37, 100)):
        tensors = [None if t is None else t[:, part] for t in x[:4]]
        half, state = run(Inputs(*tensors, state, None), impl)
        halves.append(half)
    assert_close("out", torch.cat(halves, 1), out, dtype)
    assert_close("final_state", state, final, dtype)


@pytest.mark.parametrize(("H", "H_state"), [(2, 2), (6, 2), (7, 1)])
@pytest.mark.parametrize("decay", [None, "scalar", "vector", "vector-50", "scalar-inf"])
def test_step_by_step_equals_the_parallel_form(decay: str | None, H: int, H_state: int) -> None:
    case = Case((67, 67), H=H, H_state=H_state, decay=decay, initial_state=True, packed=False)
    x = make_inputs(case, torch.float32)
    assert x.initial_state is not None
    state = x.initial_state.clone()
    outs = []
    for t in range(67):
        decay_t = None if x.log_decay is None else x.log_decay[:, t]
        outs.append(linear_attention_step(x.q[:, t], x.k[:, t], x.v[:, t], decay_t, state))
    out, final = run(x, "torch")
    assert_close("out", torch.stack(outs, 1), out, torch.float32)
    assert_close("final_state", state, final, torch.float32)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("H", "H_state"), [(2, 2), (7, 1)])
@pytest.mark.parametrize("decay", [None, "scalar", "vector", "vector-inf"])
def test_step_equals_the_reference(decay: str | None, H: int, H_state: int, impl: str) -> None:
    case = Case((3, 3), H, H_state, 24, 40, decay, initial_state=True, packed=False)
    for dtype in (torch.float32, torch.bfloat16):
        x = make_inputs(case, dtype, strided=True)
        assert x.initial_state is not None
        expected_state = x.initial_state.clone()
        # Decoding may be handed a view of a larger cache, which must be written through.
        cache = x.initial_state.new_zeros(2, H_state, 24, 80)
        state = cache[..., ::2].copy_(x.initial_state)
        for t in range(3):
            tokens = [None if y is None else y[:, t] for y in x[:4]]
            out = step(*tokens, state, impl)
            expected = step(*tokens, expected_state, "reference")
            assert out.dtype == dtype
            assert_close("out", out, expected, dtype)
        assert_close("state", cache[..., ::2], expected_state, torch.float32)
        assert not cache[..., 1::2].any()


def step(q, k, v, log_decay, state, impl):
    """Take one step, on the device of `run`; the state stays in its place."""
    if impl != "triton" or not torch.cuda.is_available():
        return linear_attention_step(q, k, v, log_decay, state, impl=impl)
    moved = [None if x is None else x.cuda() for x in (q, k, v, log_decay, state)]
    out = linear_attention_step(*moved, impl=impl)
    state.copy_(moved[-1])
    return out.cpu()


def test_step_reads_with_the_given_scale_and_keeps_the_dtype() -> None:
    q, k, v = (torch.randn(1, 2, 8).bfloat16() for _ in range(3))
    first = linear_attention_step(q, k, v, None, torch.zeros(1, 2, 8, 8), scale=1.0)
    second = linear_attention_step(q, k, v, None, torch.zeros(1, 2, 8, 8), scale=2.0)
    assert first.dtype == torch.bfloat16
    assert torch.equal(2 * first, second)


def test_step_refuses_a_state_that_would_lose_tokens_or_does_not_fit() -> None:
    q, k, v = (torch.randn(1, 2, 8).bfloat16() for _ in range(3))
    with pytest.raises(ValueError, match=r"state is torch.bfloat16 and must be float32"):
        linear_attention_step(q, k, v, None, torch.zeros(1, 2, 8, 8).bfloat16())
    with pytest.raises(ValueError, match=r"must be \(1, 2, 8, 8\)"):
        linear_attention_step(q, k, v, None, torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="linear_attention=cpp: no such implementation"):
        linear_attention_step(q, k, v, None, torch.zeros(1, 2, 8, 8), impl="cpp")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (1, 9, 2, 8)}, "must be .B, T, H_state, D."),
        ({"k": (1, 10, 2, 6)}, "must be .B, T, H_state, D."),
        ({"v": (2, 10, 2, 8)}, "must be .B, T, H_state, D."),
        ({"k": (1, 10, 3, 8), "v": (1, 10, 3, 8)}, "3 state heads must divide the 4"),
        ({"log_decay": (1, 10, 4)}, "log_decay .1, 10, 4. must be"),
        ({"log_decay": (1, 10, 2, 1)}, "log_decay .1, 10, 2, 1. must be"),
        ({"initial_state": (2, 2, 8, 8)}, "initial_state .2, 2, 8, 8. must be .1, 2, 8, 8."),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    change: dict[str, tuple[int, ...]], message: str
) -> None:
    shapes = {"q": (1, 10, 4, 8), "k": (1, 10, 2, 8), "v": (1, 10, 2, 8)} | change
    x = {name: torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        linear_attention(
            x["q"],
            x["k"],
            x["v"],
            x.get("log_decay"),
            initial_state=x.get("initial_state"),
        )


def test_packing_is_for_one_row_and_states_are_one_per_document() -> None:
    x = torch.zeros(2, 10, 1, 8)
    cu_seqlens = torch.tensor([0, 4, 10], dtype=torch.int32)
    with pytest.raises(ValueError, match="B=1, not B=2"):
        linear_attention(x, x, x, cu_seqlens=cu_seqlens)
    state = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match=r"must be \(2, 1, 8, 8\)"):
        linear_attention(x[:1], x[:1], x[:1], cu_seqlens=cu_seqlens, initial_state=state)
    with pytest.raises(ValueError, match="linear_attention=cuda: no such implementation"):
        linear_attention(x, x, x, impl="cuda")


@pytest.mark.parametrize("ends", [[0, 5], [0, 20], [2, 10]], ids=str)
def test_documents_must_cover_the_tokens(ends):
    q, k, v = torch.randn(3, 1, 10, 2, 4).unbind(0)
    with pytest.raises(ValueError, match=r"must run from 0 to T=10"):
        linear_attention(q, k, v, cu_seqlens=torch.tensor(ends, dtype=torch.int32))


def test_no_token_is_refused():
    q, k, v = torch.randn(3, 1, 0, 2, 4).unbind(0)
    with pytest.raises(ValueError, match=r"T must be 1"):
        linear_attention(q, k, v)


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strong_decays_take_smaller_chunks(strength, dtype):
    ends = torch.tensor([0, 100, 101, 260], dtype=torch.int32)
    q, k, v = (torch.randn(1, 260, heads, 16).to(dtype) for heads in (4, 2, 2))
    log_decay = -strength * (0.8 + 0.4 * torch.rand(1, 260, 2, 16))
    dout = torch.randn(1, 260, 4, 16).to(dtype)
    results = []
    for impl, wide in (("torch", dtype), ("reference", torch.float64)):
        inputs = [x.to(wide).requires_grad_() for x in (q, k, v)]
        inputs.append(log_decay.to(torch.promote_types(wide, torch.float32)).requires_grad_())
        out, _ = linear_attention(*inputs, cu_seqlens=ends, impl=impl)
        results.append([out, *torch.autograd.grad(out, inputs, dout.to(wide))])
    names = ("out", "dq", "dk", "dv", "dlog_decay")
    for name, actual, expected in zip(names, *results, strict=True):
        assert_close(name, actual, expected, dtype)


def test_chunks_shrink_with_the_decay():
    sizes = [_chunk_size(torch.full((256, 1, 4), -x), [256], 40.0) for x in (0.5, 1.0, 2.0, 5.0)]
    assert sizes == [64, 32, 16, None]
