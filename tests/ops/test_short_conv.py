"""short_conv against its definition, the definition against torch's convolution, and decoding."""

import itertools
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from helpers.assertions import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.short_conv import short_conv, short_conv_step

NAMES = ("out", "final_state", "dx", "dweight", "dbias", "dstate")


def make(lengths: Sequence[int], C: int, K: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return inputs for packed documents and a gradient of each result."""
    T, N = sum(lengths), len(lengths)
    shapes = {"x": (1, T, C), "weight": (C, K), "bias": (C,), "state": (N, C, K - 1)}
    shapes |= {"dout": (1, T, C), "dfinal_state": (N, C, K - 1)}
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    bounds = [0, *itertools.accumulate(lengths)]
    return tensors | {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}


def run(
    impl: str,
    tensors: dict[str, torch.Tensor],
    dtype: torch.dtype,
    activation: str | None = None,
    absent: Sequence[str] = (),
) -> dict[str, torch.Tensor]:
    """Return outputs and gradients by name, computed in `dtype`."""
    t = {k: v if k == "cu_seqlens" else v.detach().to(dtype) for k, v in tensors.items()}
    inputs = {k: t[k].requires_grad_() for k in ("x", "weight", "bias", "state") if k not in absent}
    out, final_state = short_conv(
        inputs["x"],
        inputs["weight"],
        inputs.get("bias"),
        state=inputs.get("state"),
        output_final_state="final_state" not in absent,
        cu_seqlens=t.get("cu_seqlens"),
        activation=activation,
        impl=impl,
    )
    results = {"out": out} | ({} if final_state is None else {"final_state": final_state})
    douts = [t["d" + name] for name in results]
    grads = torch.autograd.grad(list(results.values()), list(inputs.values()), douts)
    return results | {f"d{k}": grad for k, grad in zip(inputs, grads, strict=True)}


def compare(
    impl: str,
    tensors: dict[str, torch.Tensor],
    activation: str | None = None,
    absent: Sequence[str] = (),
) -> None:
    dtype = tensors["x"].dtype
    actual = run(impl, tensors, dtype, activation, absent)
    expected = run("reference", tensors, torch.float64, activation, absent)
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        assert x.dtype == dtype, name
        assert_close(f"{impl} {name}", x, expected[name], dtype)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("K", [2, 4, 8])
def test_reference_is_a_convolution_per_document(K: int, activation: str | None) -> None:
    lengths = (1, 5, 2, 20)
    t = make(lengths, 3, K, torch.float64)
    inputs = [t[name].clone().requires_grad_() for name in ("x", "weight", "bias", "state")]
    x, weight, bias, state = inputs
    outs, final_states = [], []
    for n, document in enumerate(x[0].split(lengths)):
        channels = torch.cat([state[n], document.t()], 1)[None]
        outs.append(F.conv1d(channels, weight[:, None], bias, groups=3)[0].t())
        final_states.append(channels[0, :, -(K - 1) :])
    out = torch.cat(outs)[None]
    results = [F.silu(out) if activation else out, torch.stack(final_states)]
    results += torch.autograd.grad(results, inputs, [t["dout"], t["dfinal_state"]])
    actual = run("reference", t, torch.float64, activation)
    for name, expected in zip(NAMES, results, strict=True):
        assert_close(name, actual[name], expected, torch.float64)


LENGTHS = [(1,), (63,), (64,), (65,), (1, 1, 1), (1, 70, 2, 3, 100, 1), (0, 5, 0)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    ("impl", "lengths", "dtype"),
    # A thousand tokens take seconds in the interpreter: once.
    [("triton", (1000,), torch.float32)]
    + [("torch", (1000,), dtype) for dtype in DTYPES]
    + list(itertools.product(["torch", "triton"], LENGTHS, DTYPES)),
    ids=lambda value: "T" + "+".join(map(str, value)) if type(value) is tuple else str(value),
)
def test_implementations_equal_the_reference(
    impl: str, lengths: tuple[int, ...], dtype: torch.dtype
) -> None:
    compare(impl, make(lengths, 5, 4, dtype), "silu")


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    impl=st.sampled_from(["torch", "triton"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    C=st.integers(1, 70),
    K=st.integers(2, 8),
    activation=st.sampled_from([None, "silu"]),
    absent=st.sets(st.sampled_from(["bias", "state", "final_state"])),
)
def test_any_shape_and_any_option(impl, dtype, lengths, C, K, activation, absent):
    compare(impl, make(lengths, C, K, dtype), activation, sorted(absent))


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
def test_rows_are_documents_and_strides_do_not_matter(impl: str) -> None:
    packed = make((9, 9), 5, 4, torch.float32)
    rows = {k: v for k, v in packed.items() if k != "cu_seqlens"}
    for name in ("x", "dout"):  # [B, T, C] on the strides of [B, C, T]
        by_channel = packed[name].view(2, 9, 5).transpose(1, 2).contiguous()
        rows[name] = by_channel.transpose(1, 2)
    rows["state"] = packed["state"].transpose(1, 2).contiguous().transpose(1, 2)
    actual, expected = run(impl, rows, torch.float32), run("reference", packed, torch.float64)
    for name, x in actual.items():
        assert_close(name, x, expected[name].view(x.shape), torch.float32)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_one_result_may_go_unused(impl: str) -> None:
    t = make((3, 1), 2, 4, torch.float64 if impl == "torch" else torch.float32)
    grads = []
    for name in (impl, "reference"):
        x, state = t["x"].clone().requires_grad_(), t["state"].clone().requires_grad_()
        options = {"state": state, "cu_seqlens": t["cu_seqlens"], "output_final_state": True}
        _, final_state = short_conv(x, t["weight"], **options, impl=name)
        grads.append(torch.autograd.grad(final_state, (x, state), t["dfinal_state"]))
    for actual, expected in zip(*grads, strict=True):
        assert_close("gradient through the state", actual, expected, x.dtype)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_steps_and_pieces_equal_the_whole(dtype: torch.dtype, activation: str | None) -> None:
    t = make((11,), 3, 4, dtype)
    weights = t["weight"], t["bias"]
    whole, final_state = short_conv(
        t["x"], *weights, state=t["state"], output_final_state=True, activation=activation
    )
    out, state = short_conv(
        t["x"][:, :6], *weights, state=t["state"], output_final_state=True, activation=activation
    )
    outs = [out]
    for x in t["x"][:, 6:].unbind(1):
        outs.append(short_conv_step(x, *weights, state, activation)[:, None])
    assert_close("out", torch.cat(outs, 1), whole.double(), dtype)
    assert torch.equal(state, final_state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(3, 9)}, r"weight \(3, 9\) must be \[C, K\] with C=3 .* 2 to 8"),
        ({"weight": torch.ones(4, 4)}, r"weight \(4, 4\) must be \[C, K\] with C=3"),
        ({"bias": torch.ones(4)}, r"bias \(4,\) must be \[C\] with C=3"),
        ({"state": torch.ones(1, 3, 4)}, r"give \(1, 3, 3\) torch.float32"),
        ({"state": torch.ones(1, 3, 3).double()}, r"give \(1, 3, 3\) torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 4])}, r"cu_seqlens=\[0, 4\] must rise from 0 to the 5"),
        ({"x": torch.ones(2, 5, 3), "cu_seqlens": torch.tensor([0, 5])}, "B=1, not B=2"),
        ({"x": torch.ones(1, 0, 3)}, "holds no token"),
        ({"activation": "relu"}, "activation='relu' must be"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    options = {"x": torch.ones(1, 5, 3), "weight": torch.ones(3, 4)} | change
    with pytest.raises(ValueError, match=message):
        short_conv(**options)
