"""What communication brought is kept for a forward pass that runs again."""

import pytest
import torch

from parallel.recompute import Memory, Recompute, rebuilt, run_recomputed
from trainer.bench.memory import saved_bytes


class Calls:
    """Stands for communication: counts, and brings other numbers each time."""

    def __init__(self) -> None:
        self.count = 0

    def fetch(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.count += 1
        return (x * self.count, x + self.count)


class Fetch(torch.autograd.Function):
    """An algorithm: its forward pass asks the memory."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, memory: Memory, calls: Calls) -> torch.Tensor:  # type: ignore[no-untyped-def]
        product, _ = memory.remember(lambda: calls.fetch(x))
        ctx.save_for_backward(product)
        return product.clone()

    @staticmethod
    def backward(ctx, grad: torch.Tensor):  # type: ignore[no-untyped-def]
        (product,) = ctx.saved_tensors
        return grad * product, None, None


@pytest.mark.parametrize("recompute", [False, True])
def test_second_pass_communicates_nothing_and_gets_the_same(recompute: bool) -> None:
    calls, memory = Calls(), Memory()
    x = torch.tensor([2.0, 3.0], requires_grad=True)

    def function(x: torch.Tensor) -> torch.Tensor:
        return Fetch.apply(Fetch.apply(x, memory, calls), memory, calls).sin()  # type: ignore[no-any-return]

    out = run_recomputed(function, x, memory=memory) if recompute else function(x)
    assert calls.count == 2
    out.sum().backward()
    assert calls.count == 2
    # First x * 1, then (x * 1) * 2; each gradient is multiplied by what was brought.
    assert torch.equal(out, (2 * x).sin())
    assert x.grad is not None
    assert torch.allclose(x.grad, (2 * x).cos() * (2 * x) * x)


def test_without_a_memory_the_second_pass_runs_all() -> None:
    runs = []
    x = torch.randn(3, requires_grad=True)

    def function(x: torch.Tensor) -> torch.Tensor:
        runs.append(1)
        return x.exp().sin()

    run_recomputed(function, x).sum().backward()
    assert len(runs) == 2


def test_memory_holds_no_graph() -> None:
    memory, x = Memory(), torch.randn(3, requires_grad=True)
    (first,) = memory.remember(lambda: (x * 2,))
    assert first.requires_grad
    with memory.replay():
        (second,) = memory.remember(lambda: pytest.fail("it is remembered"))
    assert not second.requires_grad
    assert torch.equal(first, second)


def test_what_is_rebuilt_is_not_kept() -> None:
    x = torch.randn(50, 8, requires_grad=True)
    weight = torch.randn(3, 8, requires_grad=True)
    runs = []

    def build() -> torch.Tensor:
        runs.append(torch.is_grad_enabled())
        return x * x.detach().exp()

    def forward(recompute: bool) -> torch.Tensor:
        y = build()
        if not recompute:
            return torch.nn.functional.linear(y[10:], weight)
        with rebuilt(y, build):
            return torch.nn.functional.linear(y[10:], weight)  # which keeps a view of it

    expected = torch.autograd.grad(forward(False).square().sum(), (x, weight))
    runs.clear()
    actual = torch.autograd.grad(forward(True).square().sum(), (x, weight))
    assert runs == [True, False]
    assert all(map(torch.equal, actual, expected))
    assert saved_bytes(lambda: forward(False)) - saved_bytes(lambda: forward(True)) >= x.nbytes


@pytest.mark.parametrize(
    ("given", "dense", "moe", "inside"),
    [
        (Recompute(), False, False, Recompute()),
        (Recompute(moe="activation", above=7), False, False, Recompute(moe="activation", above=7)),
        (Recompute(moe="experts", above=7), False, False, Recompute(moe="experts")),
        (Recompute(moe="layer", above=7), False, True, Recompute()),
        (Recompute("selective", "layer", 7), True, True, Recompute()),
        (Recompute("full", "layer", 7), False, False, Recompute()),
    ],
    ids=str,
)
def test_nothing_runs_a_third_time(
    given: Recompute, dense: bool, moe: bool, inside: Recompute
) -> None:
    assert given.has_ffn(is_moe=False) == dense
    assert given.has_ffn(is_moe=True) == moe
    assert given.inside_moe == inside
