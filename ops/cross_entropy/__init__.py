"""Cross entropy of a linear head, without holding the logits of all tokens.

Label smoothing as in PyTorch's `cross_entropy`; z-loss as in section 5 of arXiv:2204.02311.
"""

import torch

from ops.registry import FLOATS, Implementation, choose

IMPLEMENTATIONS = (
    Implementation(
        "triton",
        "ops.cross_entropy.triton_impl",
        ("cuda",),
        (torch.float32, torch.bfloat16, torch.float16),
        requires="ops.triton_runtime:explain_absence",
        on_request=("cpu",),
    ),
    Implementation("torch", "ops.cross_entropy.torch_impl", None, FLOATS),
    Implementation("reference", "ops.cross_entropy.reference", None, FLOATS),
)
DISTILLATION = (
    Implementation("torch", "ops.cross_entropy.distillation", None, FLOATS),
    Implementation("reference", "ops.cross_entropy.reference", None, FLOATS),
)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over tokens `(1 - s) (lse - logits[label]) + s (lse - mean(logits)) + z_loss lse^2`.

    logits = hidden weight^T, lse = logsumexp(logits) and s = label_smoothing. Gradients exist after
    the forward pass and the backward pass scales them in place, so it can run once.

    Args:
        hidden: hidden states [B, T, E] or [N, E].
        weight: head [V, E] of hidden's dtype.
        labels: int64 [B, T] or [N], each below V, or ignore_index for a token that does not count.
        ignore_index: the label of tokens that do not count.
        label_smoothing: share of the target that is spread over the vocabulary, 0 to 1.
        z_loss: factor on lse^2, which holds the normalizer near 1.
        impl: pin an implementation by name.

    Returns:
        loss_sum, a float32 scalar in nats, and num_valid, the int64 count of tokens in it.

    Raises:
        ValueError: shapes, dtypes or factors that do not fit; on a CPU also a label that is out of
            range. A GPU does not wait to see the labels: there the loss of such a label is NaN.
    """
    _check_shapes(hidden, weight, labels)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing={label_smoothing} must be within 0 and 1; 0.1 is usual")
    if z_loss < 0:
        raise ValueError(f"z_loss={z_loss} must not be negative; 1e-4 is usual, 0 is none")
    if labels.device.type == "cpu":
        _check_range(labels, weight.shape[0], ignore_index)
    function = choose("cross_entropy.linear_cross_entropy", IMPLEMENTATIONS, hidden, impl)
    loss_sum, num_valid = function(
        hidden.flatten(0, -2),
        weight,
        labels.flatten(),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )
    return loss_sum, num_valid


def linear_distillation(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    share: float = 0.5,
    temperature: float = 1.0,
    ignore_index: int = -100,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum over tokens `(1 - share) cross_entropy + share T^2 KL(p || q)` (arXiv:1503.02531).

    p and q are the softmax of the teacher's and of the student's logits over the temperature T;
    T^2 keeps the gradient's size as T grows. The logits of all tokens are never held. Gradients
    exist after the forward pass and the backward pass scales them in place, so it can run once;
    the teacher gets none.

    Args:
        hidden: the student's hidden states [B, T, E] or [N, E].
        weight: its head [V, E] of hidden's dtype.
        teacher_hidden: the teacher's hidden states [B, T, F] or [N, F].
        teacher_weight: its head [V, F] of their dtype.
        labels: int64 [B, T] or [N], each below V, or ignore_index for a token that does not count.
        share: of the divergence in the loss, 0 to 1.
        temperature: T, above 0.
        ignore_index: the label of tokens that do not count.
        impl: pin an implementation by name.

    Returns:
        loss_sum, the only one with a gradient; the sums of cross entropy and of KL(p || q), all
        float32 scalars in nats; and num_valid, the int64 count of tokens in them.

    Raises:
        ValueError: shapes, dtypes, labels (on a CPU) or factors that do not fit.
    """
    _check_shapes(hidden, weight, labels)
    _check_shapes(teacher_hidden, teacher_weight, labels)
    if teacher_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"the teacher's head has {teacher_weight.shape[0]} tokens, the student's "
            f"{weight.shape[0]}; they must share a vocabulary"
        )
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} must be within 0 and 1; 0.5 is usual")
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be above 0; 1 leaves logits as they are")
    if labels.device.type == "cpu":
        _check_range(labels, weight.shape[0], ignore_index)
    function = choose("cross_entropy.linear_distillation", DISTILLATION, hidden, impl)
    loss_sum, cross_entropy_sum, kl_sum, num_valid = function(
        hidden.flatten(0, -2),
        weight,
        teacher_hidden.flatten(0, -2),
        teacher_weight,
        labels.flatten(),
        share=share,
        temperature=temperature,
        ignore_index=ignore_index,
    )
    return loss_sum, cross_entropy_sum, kl_sum, num_valid


def _check_shapes(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> None:
    if hidden.dim() not in (2, 3) or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {list(hidden.shape)}, weight {list(weight.shape)}; give "
            "[tokens, size] or [batch, tokens, size] and [vocabulary, size]"
        )
    if labels.shape != hidden.shape[:-1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels are {labels.dtype} {list(labels.shape)}; give int64 {list(hidden.shape[:-1])}"
        )
    if weight.dtype != hidden.dtype:
        raise ValueError(f"weight is {weight.dtype}, hidden {hidden.dtype}; convert one of them")


def _check_range(labels: torch.Tensor, vocab_size: int, ignore_index: int) -> None:
    outside = labels[((labels < 0) | (labels >= vocab_size)) & (labels != ignore_index)]
    if len(outside):
        raise ValueError(
            f"labels hold {outside[0].item()}; give 0 to {vocab_size - 1}, or "
            f"ignore_index={ignore_index} for tokens that do not count"
        )
