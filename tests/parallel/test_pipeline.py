"""The cut of a layer list into stages is the best of all cuts."""

import itertools
import random

import pytest

from parallel.pipeline import cut_layers


def all_cuts(count: int, num_stages: int) -> list[list[range]]:
    cuts = itertools.combinations(range(1, count), num_stages - 1)
    return [[range(a, b) for a, b in itertools.pairwise((0, *inner, count))] for inner in cuts]


def costliest(stages: list[range], layers: list[float], embedding: float, head: float) -> float:
    costs = [sum(layers[i] for i in stage) for stage in stages]
    costs[0] += embedding
    costs[-1] += head
    return max(costs)


@pytest.mark.parametrize("seed", range(40))
def test_no_cut_has_a_cheaper_costliest_stage(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randint(1, 9)
    layers = [float(rng.choice([1, 2, 3, 10])) for _ in range(count)]
    embedding, head = rng.choice([0.0, 5.0]), rng.choice([0.0, 4.0, 20.0])
    for num_stages in range(1, count + 1):
        stages = cut_layers(layers, num_stages, embedding=embedding, head=head)
        assert [i for stage in stages for i in stage] == list(range(count))
        assert len(stages) == num_stages
        assert all(stages), "every stage has a layer"
        best = min(costliest(s, layers, embedding, head) for s in all_cuts(count, num_stages))
        assert costliest(stages, layers, embedding, head) == best


def test_earlier_stages_get_fewer_of_equal_layers() -> None:
    assert cut_layers([1.0] * 5, 2) == [range(2), range(2, 5)]
    assert cut_layers([1.0] * 7, 4) == [range(1), range(1, 3), range(3, 5), range(5, 7)]


def test_head_and_embedding_count() -> None:
    assert cut_layers([1.0] * 4, 2, head=2.0) == [range(3), range(3, 4)]
    assert cut_layers([1.0] * 4, 2, embedding=2.0) == [range(1), range(1, 4)]


@pytest.mark.parametrize("num_stages", [0, 4])
def test_more_stages_than_layers_are_refused(num_stages: int) -> None:
    with pytest.raises(ValueError, match=f"num_stages={num_stages} must be within 1 and the 3 lay"):
        cut_layers([1.0] * 3, num_stages)
