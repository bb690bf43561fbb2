"""Delta rule: the recurrence against one linear system, the implementations against it."""

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from helpers import recurrent
from helpers.assertions import assert_close
from helpers.recurrent import Inputs, assert_all_close, make_decay, make_inputs, to_double

from ops.delta_rule import delta_rule, delta_rule_step

IMPLEMENTATIONS = ("torch", "triton")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
DECAYS = (None, "scalar", "vector")
NAMES = ("q", "k", "v", "beta", "log_decay", "initial_state")


Case = partial(recurrent.Case, max_beta=1.0)
CASES = [
    *[Case((T,), H=1, H_state=1, decay=decay) for T in (1, 63, 64, 65) for decay in DECAYS],
    *[Case((65,), decay=f"{size}-{cut}") for size in DECAYS[1:] for cut in ("50", "inf", "start")],
    *[Case((70,), decay=f"{size}-stronger", initial_state=True) for size in DECAYS[1:]],
    *[Case((70,), decay=decay, max_beta=2.0, initial_state=True) for decay in DECAYS],
    Case((65, 65), packed=False, initial_state=True),
    Case((1, 70, 1, 28), H=1, H_state=1, initial_state=True),
    Case((1, 130, 5), H=1, H_state=1, decay="scalar", initial_state=True),
    Case((5, 64, 64, 1), H=1, H_state=1, decay=None, initial_state=True),
    Case((3, 70), H=6, H_state=2, decay="scalar-inf", initial_state=True),
    Case((66,), H=3, H_state=3, D=64),
    Case((70, 2), H=7, H_state=1, decay="scalar", initial_state=True),
    Case((65,), H=7, H_state=1, decay="vector-stronger"),
    Case((66,), H=6, H_state=2, D=32, D_v=64, decay=None),
    Case((65, 1), H=3, H_state=1, D=64, D_v=32, initial_state=True),
    Case((70,), H=1, H_state=1, D=128),
]  # fmt: skip
TRITON_CASES = [  # the interpreter is slow; chunks are of 32 tokens in float32, else of 64
    Case((1,), H=1, H_state=1),
    Case((63,), H=1, H_state=1, decay="scalar"),
    Case((64,), H=1, H_state=1, max_beta=2.0, initial_state=True),
    Case((65,), H=1, H_state=1, decay=None, max_beta=2.0),
    Case((34, 34), H=1, H_state=1, packed=False, decay="scalar-stronger", initial_state=True),
    Case((1, 40, 1), H=1, H_state=1, decay="vector-stronger", initial_state=True),
    Case((3, 40), H=1, H_state=1, decay="scalar-inf", initial_state=True),
    Case((34,), H=1, H_state=1, decay="vector-50"),
    Case((34,), H=1, H_state=1, decay="vector-inf"),
    Case((9,), H=7, H_state=1),
    Case((20,), H=6, H_state=2, decay="scalar", initial_state=True),
    Case((20,), H=3, H_state=3, D=64, D_v=32, decay="scalar", initial_state=True),
    Case((10,), H=1, H_state=1, D=24, D_v=40, initial_state=True),
    Case((20,), H=1, H_state=1, D=128, decay="scalar"),
    Case((1000,), H=1, H_state=1, decay="scalar", initial_state=True),
]
TRITON_ROWS = [
    *[(case, torch.float32) for case in TRITON_CASES],
    *[(TRITON_CASES[i], torch.bfloat16) for i in (3, 5)],
]
LONG = [Case((1000,), H=1, H_state=1, decay=decay, initial_state=True) for decay in DECAYS]


def solve_documents(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out and final states from one T x T system per document and head, no recurrence.

    The errors e solve (I + A diag(beta)) e = v - k (decay state), A the decayed k k^T before each.
    """
    B, T, H, D = x.q.shape
    group = H // x.k.shape[2]
    decay = torch.ones_like(x.k) if x.log_decay is None else x.log_decay.exp()
    decay = (decay if decay.dim() == 4 else decay[..., None]).expand_as(x.k)
    ends = [0, T] if x.cu_seqlens is None else x.cu_seqlens.tolist()
    outs: list[torch.Tensor] = []
    finals: list[torch.Tensor] = []
    for b in range(B):
        for start, stop in pairwise(ends):
            q, k, v, beta, g = (t[b, start:stop] for t in (x.q, x.k, x.v, x.beta, decay))
            t = torch.arange(stop - start)
            later = (t[None] > t[:, None])[..., None, None]
            kept = torch.where(later, g[None], 1.0).cumprod(1) * k[:, None]  # [s, t, H_state, D]
            since = g.cumprod(0)[..., None]
            state = torch.zeros(k.shape[1], D, v.shape[2]).to(k)
            state = since * (state if x.initial_state is None else x.initial_state[len(finals)])
            system = torch.einsum("thd,sthd->hts", k, kept * later)
            system = torch.eye(len(t)).to(k) + system * beta.T[:, None]
            error = v - torch.einsum("thd,thdv->thv", k, state)
            update = beta.T[..., None] * torch.linalg.solve(system, error.transpose(0, 1))
            kept = kept * (t[None] >= t[:, None])[..., None, None]
            scores = torch.einsum("thd,sthd->hts", q, kept.repeat_interleave(group, 2))
            out = scores @ update.repeat_interleave(group, 0)
            entering = state.repeat_interleave(group, 1)
            outs.append((out + torch.einsum("thd,thdv->htv", q, entering)).transpose(0, 1))
            finals.append(state[-1] + torch.einsum("shd,hsv->hdv", kept[:, -1], update))
    return torch.cat(outs).view(B, T, H, -1) * D**-0.5, torch.stack(finals)


def tensors_of(x: Inputs) -> tuple[torch.Tensor | None, ...]:
    return x.q, x.k, x.v, x.beta, x.log_decay


def run(x: Inputs, impl: str) -> tuple[torch.Tensor, torch.Tensor]:
    out, final = delta_rule(
        *tensors_of(x),
        initial_state=x.initial_state,
        output_final_state=True,
        cu_seqlens=x.cu_seqlens,
        impl=impl,
    )
    assert final is not None
    return out, final


def outputs_and_gradients(x: Inputs, impl: str | None) -> dict[str, torch.Tensor]:
    return recurrent.outputs_and_gradients(
        x, lambda y: run(y, impl) if impl else solve_documents(y)
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_equals_the_linear_system(case: recurrent.Case) -> None:
    x = make_inputs(case)
    assert_all_close(
        outputs_and_gradients(x, "reference"), outputs_and_gradients(x, None), torch.float64
    )


@pytest.mark.parametrize("case", [*CASES, *LONG], ids=str)
def test_torch_equals_the_reference(case: recurrent.Case) -> None:
    for dtype in DTYPES:
        x = make_inputs(case, dtype)
        actual = outputs_and_gradients(x, "torch")
        assert actual["out"].dtype == actual["dq"].dtype == actual["dbeta"].dtype == dtype
        assert actual["final_state"].dtype == torch.promote_types(dtype, torch.float32)
        assert_all_close(actual, outputs_and_gradients(to_double(x), "reference"), dtype)


@pytest.mark.parametrize(
    ("case", "dtype"), TRITON_ROWS, ids=lambda x: str(x).removeprefix("torch.")
)
def test_triton_equals_the_reference(case: recurrent.Case, dtype: torch.dtype) -> None:
    x = make_inputs(case, dtype)
    actual = outputs_and_gradients(x, "triton")
    assert actual["out"].dtype == actual["dq"].dtype == actual["dbeta"].dtype == dtype
    assert actual["final_state"].dtype == torch.float32
    assert_all_close(actual, outputs_and_gradients(to_double(x), "reference"), dtype)


@pytest.mark.parametrize(
    ("impl", "rate"), [("torch", 1.0), ("torch", 5.0), ("torch", 20.0), ("triton", 20.0)]
)
@pytest.mark.parametrize("shape", [(1, 40, 1), (1, 40, 1, 32)], ids=["scalar", "vector"])
def test_no_decay_costs_digits(shape: tuple[int, ...], rate: float, impl: str) -> None:
    x = make_inputs(Case((40,), H=1, H_state=1), torch.float32)
    x = x._replace(log_decay=-rate * (0.8 + 0.4 * torch.rand(shape)))
    expected = outputs_and_gradients(to_double(x), "reference")
    assert_all_close(outputs_and_gradients(x, impl), expected, torch.float32)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_equal_keys_do_not_blow_up(impl: str) -> None:
    """Powers of the chunk's triangle overflow here, which a solver must therefore not form."""
    x = make_inputs(Case((64,), H=1, H_state=1, decay=None), torch.float32)
    x = x._replace(k=x.k[:, :1].expand_as(x.k), beta=torch.ones_like(x.beta))
    expected = outputs_and_gradients(to_double(x), "reference")
    assert_all_close(outputs_and_gradients(x, impl), expected, torch.float32)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_inputs_need_not_be_contiguous(impl: str) -> None:
    case = Case((15, 3), H=4, H_state=2, initial_state=True)
    x = make_inputs(case, torch.float32, strided=True)
    x = x._replace(k=F.normalize(x.k.transpose(1, 2), dim=-1).transpose(1, 2))
    x = x._replace(log_decay=make_decay(case, 1, 18)[..., :1].expand_as(x.k))
    assert not any(t.is_contiguous() for t in tensors_of(x) if t is not None)
    dense = Inputs(*(None if t is None else t.contiguous() for t in x))
    strided, expected = outputs_and_gradients(x, impl), outputs_and_gradients(dense, impl)
    assert_all_close(strided, expected, torch.float32)


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_state_is_returned_on_request_and_scale_multiplies_the_output(impl: str) -> None:
    x = make_inputs(Case((20,), H=1, H_state=1), torch.float32)
    out, none = delta_rule(*tensors_of(x), impl=impl)
    assert none is None
    scaled, _ = delta_rule(*tensors_of(x), scale=3 * 32**-0.5, impl=impl)
    assert_close("scaled", scaled, 3 * out, torch.float32)


@pytest.mark.parametrize(
    ("impl", "decay"),
    [*[(impl, decay) for impl in ("reference", "torch") for decay in DECAYS], ("triton", "vector")],
)
def test_two_halves_chained_by_the_state_equal_the_whole(impl: str, decay: str | None) -> None:
    case = Case((40,), H=1, H_state=1, decay=decay, initial_state=True, packed=False)
    x = make_inputs(case, torch.float32)
    out, final = run(x, impl)
    halves = []
    state = x.initial_state
    assert state is not None
    for part in (slice(0, 33), slice(33, 40)):
        tensors = [None if t is None else t[:, part] for t in tensors_of(x)]
        q, k, v, beta, log_decay = tensors
        half, state = run(Inputs(q, k, v, log_decay, state, None, beta), impl)
        halves.append(half)
    assert_close("out", torch.cat(halves, 1), out, torch.float32)
    assert_close("final_state", state, final, torch.float32)


def test_triton_refuses_wide_heads() -> None:
    x, beta = torch.zeros(1, 3, 1, 256), torch.zeros(1, 3, 1)
    with pytest.raises(ValueError, match="takes heads of 128 channels at most, not 256"):
        delta_rule(x, x, x, beta, impl="triton")
    with pytest.raises(ValueError, match=r"does not take torch\.float64"):
        delta_rule(x.double(), x.double(), x.double(), beta, impl="triton")


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
        token = (x.q[:, t], x.k[:, t], x.v[:, t], x.beta[:, t])
        outs.append(delta_rule_step(*token, decay_t, state))
    out, final = run(x, "torch")
    assert_close("out", torch.stack(outs, 1), out, torch.float32)
    assert_close("final_state", state, final, torch.float32)


def test_step_reads_with_the_given_scale_and_keeps_the_dtype() -> None:
    q, k, v = (torch.randn(1, 2, 8).bfloat16() for _ in range(3))
    beta = torch.rand(1, 2)
    first = delta_rule_step(q, k, v, beta, None, torch.zeros(1, 2, 8, 8), scale=1.0)
    second = delta_rule_step(q, k, v, beta, None, torch.zeros(1, 2, 8, 8), scale=2.0)
    assert first.dtype == torch.bfloat16
    assert torch.equal(2 * first, second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (1, 9, 2, 8)}, "must be .B, T, H_state, D."),
        ({"k": (1, 10, 2, 6)}, "must be .B, T, H_state, D."),
        ({"v": (2, 10, 2, 8)}, "must be .B, T, H_state, D."),
        ({"k": (1, 10, 3, 8), "v": (1, 10, 3, 8)}, "3 state heads must divide the 4"),
        ({"beta": (1, 10, 4)}, "beta .1, 10, 4. must be .1, 10, 2."),
        ({"beta": (1, 10, 2, 8)}, "beta .1, 10, 2, 8. must be .1, 10, 2."),
        ({"log_decay": (1, 10, 4)}, "log_decay .1, 10, 4. must be"),
        ({"log_decay": (1, 10, 2, 1)}, "log_decay .1, 10, 2, 1. must be"),
        ({"initial_state": (2, 2, 8, 8)}, "initial_state .2, 2, 8, 8. must be .1, 2, 8, 8."),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    change: dict[str, tuple[int, ...]], message: str
) -> None:
    shapes = {"q": (1, 10, 4, 8), "k": (1, 10, 2, 8), "v": (1, 10, 2, 8), "beta": (1, 10, 2)}
    x = {name: torch.zeros(shape) for name, shape in (shapes | change).items()}
    with pytest.raises(ValueError, match=message):
        delta_rule(
            *(x[name] for name in shapes),
            x.get("log_decay"),
            initial_state=x.get("initial_state"),
        )


def test_packing_is_for_one_row_and_states_are_one_per_document() -> None:
    x, beta = torch.zeros(2, 10, 1, 8), torch.zeros(2, 10, 1)
    cu_seqlens = torch.tensor([0, 4, 10], dtype=torch.int32)
    with pytest.raises(ValueError, match="B=1, not B=2"):
        delta_rule(x, x, x, beta, cu_seqlens=cu_seqlens)
    x, beta = x[:1], beta[:1]
    with pytest.raises(ValueError, match=r"must be \(2, 1, 8, 8\)"):
        delta_rule(x, x, x, beta, cu_seqlens=cu_seqlens, initial_state=torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="delta_rule=cuda: no such implementation"):
        delta_rule(x, x, x, beta, impl="cuda")
    with pytest.raises(ValueError, match=r"from 0 to 9; it must run from 0 to T=10"):
        delta_rule(x, x, x, beta, cu_seqlens=torch.tensor([0, 9], dtype=torch.int32))
    with pytest.raises(ValueError, match="T must be 1"):
        delta_rule(x[:, :0], x[:, :0], x[:, :0], beta[:, :0])
