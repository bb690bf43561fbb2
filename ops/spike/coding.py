"""The codings of counts as spike trains (eq. 22 and 23 of arXiv:2509.05276).

A train s_t of T steps stands for the count s = sum_t c_t s_t, with c_t = 1 in unary codings and
c_t = 2^t in bitwise ones, so that W s = sum_t c_t (W s_t) for every linear map of integers.
"""

import torch

CODINGS = ("binary", "ternary", "bitwise", "bitwise_bidirectional", "bitwise_twos_complement")
UNARY = ("binary", "ternary")
MOST_BITS = 63
LIMIT = 2**62


def step_weights(coding: str, num_steps: int) -> torch.Tensor:
    """Return the weight c_t of every step of a train.

    Args:
        coding: see `ops.spike.encode`.
        num_steps: length of the train, at least 1; of bitwise codings at most 63.

    Returns:
        int64 [num_steps] on the CPU.

    Raises:
        ValueError: an unknown coding or an impossible number of steps.
    """
    check_coding(coding)
    _check_range(coding, num_steps)
    if coding in UNARY:
        return torch.ones(num_steps, dtype=torch.int64)
    weights = 2 ** torch.arange(num_steps, dtype=torch.int64)
    if coding == "bitwise_twos_complement":
        weights[-1] *= -1
    return weights


def check_coding(coding: str) -> None:
    """Raise ValueError unless the coding exists."""
    if coding not in CODINGS:
        raise ValueError(f"coding={coding!r} is unknown; there are {', '.join(CODINGS)}")


def find_span(count: torch.Tensor) -> tuple[int, int]:
    """Return the smallest and the largest count.

    Raises:
        ValueError: something in `count` is not an integer below 2^62 in size.
    """
    if count.numel() == 0:
        return 0, 0
    if count.is_floating_point() and not torch.equal(count, count.round()):
        wrong = count[count != count.round()]  # NaN among them
        raise ValueError(
            f"count holds {wrong[0].item()}, which is no integer; round it, as spike_count does"
        )
    least, most = (x.item() for x in count.aminmax())
    if max(-least, most) >= LIMIT:
        raise ValueError(f"count holds {max(-least, most)} in size; only integers below 2^62 work")
    return int(least), int(most)


def check_num_steps(least: int, most: int, coding: str, num_steps: int | None) -> int:
    """Return the steps of a train for counts from `least` to `most`.

    Raises:
        ValueError: the coding has no sign for them, or num_steps are too few.
    """
    if least < 0 and coding in ("binary", "bitwise"):
        signed = "ternary" if coding == "binary" else "bitwise_bidirectional"
        raise ValueError(f"count holds {least}; coding={coding} has no sign, use {signed}")
    largest = least if -least > most else most
    needed = max(1, _count_steps(least, coding), _count_steps(most, coding))
    if num_steps is None:
        return needed
    _check_range(coding, num_steps)
    if num_steps < needed:
        raise ValueError(
            f"num_steps={num_steps} cannot hold the count {largest} in coding={coding}; "
            f"it needs {needed}"
        )
    return num_steps


def _count_steps(count: int, coding: str) -> int:
    if coding in UNARY:
        return abs(count)
    if coding == "bitwise_twos_complement":
        return (count if count >= 0 else ~count).bit_length() + 1
    return abs(count).bit_length()


def _check_range(coding: str, num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1")
    if coding not in UNARY and num_steps > MOST_BITS:
        raise ValueError(f"num_steps={num_steps} exceeds the {MOST_BITS} bits of coding={coding}")
