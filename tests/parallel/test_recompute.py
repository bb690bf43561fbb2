"""What communication brought is kept for a forward pass that runs again."""

import pytest
import torch

from parallel.recompute import Memory, run_recomputed


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
