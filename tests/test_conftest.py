"""The fixtures that every test gets do what they say."""

import torch


def test_unwritten_memory_is_nan() -> None:
    x = torch.zeros(3, dtype=torch.bfloat16)
    made = [torch.empty(3), torch.empty_like(x), x.new_empty(2, 2), torch.empty(2, device="cpu")]
    assert all(tensor.isnan().all() for tensor in made)
    assert torch.empty(3, requires_grad=True).requires_grad
    assert torch.empty(3, dtype=torch.int64).shape == (3,)


def test_meta_tensors_still_take_no_memory() -> None:
    with torch.device("meta"):
        assert torch.empty(2**50).is_meta


def test_one_thread_computes() -> None:
    assert torch.get_num_threads() == 1
