"""The chain of segments hands on what a recurrence over the tokens would, in both directions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.layout import SequenceLayout, build_layout
from parallel.sequence.chain import Chain

D_K, D_V = 3, 2


@st.composite
def layouts(draw: st.DrawFn) -> SequenceLayout:
    size = draw(st.integers(1, 5))
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    lengths[0] += max(0, 2 * size - sum(lengths))
    return build_layout(
        torch.tensor([0, *lengths]).cumsum(0).int(),
        kind=draw(st.sampled_from(["contiguous", "zigzag"])),
        sp_rank=draw(st.integers(0, size - 1)),
        sp_size=size,
    )


def transitions_of(kind: str, T: int, generator: torch.Generator) -> torch.Tensor | None:
    """Draw what one token does to a state [D_K, D_V]: nothing, a factor, one per row, a matrix."""
    shapes = {"scalar": (1, 1), "vector": (D_K, 1), "matrix": (D_K, D_K)}
    if kind == "none":
        return None
    return torch.rand(T, *shapes[kind], generator=generator, dtype=torch.float64)


def apply(transition: torch.Tensor | None, state: torch.Tensor) -> torch.Tensor:
    if transition is None:
        return state
    return transition * state if transition.shape[-1] == 1 else transition @ state


@pytest.mark.parametrize("kind", ["none", "scalar", "vector", "matrix"])
@given(layout=layouts(), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_states_that_enter_are_those_of_the_recurrence(
    kind: str, layout: SequenceLayout, seed: int
) -> None:
    """And their gradients, which the chain hands on backwards, those of autograd."""
    generator = torch.Generator().manual_seed(seed)
    T = layout.documents[-1]
    by_token = transitions_of(kind, T, generator)
    added = torch.randn(T, D_K, D_V, generator=generator, dtype=torch.float64)
    chain, back = Chain(layout), Chain(layout, is_reverse=True)

    # By tokens: each segment's entering state, and its own effect from zero.
    leaves, entering, transitions = [], [], []
    state = torch.zeros(D_K, D_V, dtype=torch.float64)
    for rank, index in chain.order:
        segment = layout.segments[rank][index]
        begins = layout.document(segment.start).start == segment.start
        entering.append(torch.zeros_like(state) if begins else state)
        local = torch.zeros_like(state)
        total = torch.eye(D_K, dtype=torch.float64) if kind == "matrix" else 1.0
        state = entering[-1]
        for t in range(segment.start, segment.stop):
            one = None if by_token is None else by_token[t]
            if layout.document(t).start == t:
                state, local = torch.zeros_like(state), torch.zeros_like(local)
            state, local = apply(one, state) + added[t], apply(one, local) + added[t]
            total = total if one is None else apply(one, total)
        # What the segment adds is a leaf of its own, so that autograd tells its gradient.
        leaf = local.clone().requires_grad_()
        leaves.append(leaf)
        state = state - local + leaf
        transitions.append(None if by_token is None else total)

    left = torch.zeros_like(added[0])
    for place, expected in enumerate(entering):
        entered = chain.enter(place, left)
        assert torch.allclose(entered, expected, atol=1e-12)
        left = chain.leave(place, transitions[place], leaves[place].detach(), entered)

    douts = torch.randn(len(entering), D_K, D_V, generator=generator, dtype=torch.float64)
    loss = sum((x * d).sum() for x, d in zip(entering, douts, strict=True))
    assert isinstance(loss, torch.Tensor)
    gradients = [torch.zeros_like(state)] * len(leaves)
    if loss.requires_grad:
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        gradients = [g if g is not None else torch.zeros_like(state) for g in found]
    left = torch.zeros_like(added[0])
    for place in range(len(leaves)):
        forward = len(leaves) - 1 - place
        entered = back.enter(place, left)
        assert torch.allclose(entered, gradients[forward], atol=1e-12)
        left = back.leave(place, transitions[forward], douts[forward], entered)


@given(layouts())
@settings(max_examples=50, deadline=None, derandomize=True)
def test_places_are_in_the_order_of_the_sequence(layout: SequenceLayout) -> None:
    chain, back = Chain(layout), Chain(layout, is_reverse=True)
    starts = [layout.segments[rank][index].start for rank, index in chain.order]
    assert starts == sorted(starts)
    assert back.order == chain.order[::-1]
    own = [layout.segments[rank][index] for rank, index in (chain.order[i] for i in chain.own)]
    assert own == sorted(layout.own, key=lambda segment: segment.start)
    assert [back.order[i] for i in back.own] == [chain.order[i] for i in reversed(chain.own)]
