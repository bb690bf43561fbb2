"""The cut of the layer list into pipeline stages of even cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise


@dataclass(frozen=True)
class ModelPart:
    """What of a model a rank holds.

    Attributes:
        layers: [first, last) of the layer list; None: all.
        has_embedding: the embedding and the sinks are here.
        has_head: the last norm and the head are here.
        ep_rank: which part of the experts is here,
        ep_size: of so many equal ones.
    """

    layers: range | None = None
    has_embedding: bool = True
    has_head: bool = True
    ep_rank: int = 0
    ep_size: int = 1


def cut_layers(
    layers: Sequence[float], num_stages: int, *, embedding: float = 0.0, head: float = 0.0
) -> list[range]:
    """Return the layers of each stage, such that the costliest stage costs least.

    Among equal cuts the earlier stages get fewer layers, for they keep more micro batches in
    flight.

    Args:
        layers: cost of each layer, in any unit.
        num_stages: at most as many as layers.
        embedding: cost of what the first stage has besides.
        head: cost of what the last stage has besides.

    Raises:
        ValueError: there are more stages than layers.
    """
    count = len(layers)
    if not 1 <= num_stages <= count:
        raise ValueError(
            f"num_stages={num_stages} must be within 1 and the {count} layers, one for each stage"
        )
    total = list(accumulate(layers, initial=0.0))

    def cost(start: int, stop: int) -> float:
        ends = (embedding if start == 0 else 0.0) + (head if stop == count else 0.0)
        return total[stop] - total[start] + ends

    # best[stop]: least cost of the costliest stage over layers [0, stop), and where the last began.
    best = [(cost(0, stop), 0) for stop in range(count + 1)]
    begins = [[begin for _, begin in best]]
    for stage in range(2, num_stages + 1):
        best = [
            min(
                (
                    (max(best[begin][0], cost(begin, stop)), begin)
                    for begin in range(stage - 1, stop)
                ),
                default=(float("inf"), 0),
            )
            for stop in range(count + 1)
        ]
        begins.append([begin for _, begin in best])
    bounds = [count]
    for row in reversed(begins):
        bounds.append(row[bounds[-1]])
    bounds.reverse()
    return [range(start, stop) for start, stop in pairwise(bounds)]
