"""Forward attention to one set of keys: all of them, or a causal band.

Tensors are [B, H, T, D] here, so that a band can be a strided view that repeats keys.
"""

import torch

# Queries per block of a band. A block computes window + block keys for window visible ones.
MIN_BLOCK, MAX_BLOCK = 64, 256
MAX_SCORES = 1 << 24  # float32 scores the portable form holds at a time (64 MiB)

Partial = tuple[torch.Tensor, torch.Tensor]
"""out [B, H, T, D] in the inputs' dtype and lse [B, H, T]."""


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    *,
    causal: bool = False,
    bias: torch.Tensor | None = None,
) -> Partial:
    """Attend to all keys, to those up to each query (causal), or with a bias [T, T_k]."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=bias, scale=scale
        )
    return attend_portable(q, k, v, scale, causal=causal, bias=bias)


def attend_band(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window_size: int | None, scale: float
) -> Partial:
    """Attend causally to the last window_size keys; T queries and as many keys.

    The first window_size queries see what plain causal attention sees. The others go in blocks,
    each with the keys of its own window: one call with overlapping views of k and v, and one for
    the incomplete block at the end.
    """
    num_tokens = q.shape[2]
    if window_size is None or window_size >= num_tokens:
        return attend(q, k, v, scale, causal=True)
    block = min(MAX_BLOCK, max(MIN_BLOCK, window_size // 2))
    bias = _band_bias(block, window_size, q)
    count, rest = divmod(num_tokens - window_size, block)
    head = slice(0, window_size)
    parts = [attend(q[:, :, head], k[:, :, head], v[:, :, head], scale, causal=True)]
    if count:
        queries = _blocks(q[:, :, window_size:], block, block, count)
        keys, values = (_blocks(x[:, :, 1:], bias.shape[1], block, count) for x in (k, v))
        out, lse = attend(queries, keys, values, scale, bias=bias)
        batch = q.shape[:1]
        parts.append(
            (
                out.unflatten(0, (*batch, count)).transpose(1, 2).flatten(2, 3),
                lse.unflatten(0, (*batch, count)).transpose(1, 2).flatten(2, 3),
            )
        )
    if rest:
        keys, values = (x[:, :, num_tokens - rest - window_size + 1 :] for x in (k, v))
        tail = bias[:rest, : keys.shape[2]]
        parts.append(attend(q[:, :, num_tokens - rest :], keys, values, scale, bias=tail))
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def attend_portable(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    *,
    causal: bool = False,
    bias: torch.Tensor | None = None,
) -> Partial:
    """Compute `attend` by plain matrix products; scores and statistics are at least float32."""
    group, num_queries = q.shape[1] // k.shape[1], q.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=dtype)
    scaled, keys = q.to(dtype) * scale, k.to(dtype).mT
    rows = max(1, MAX_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    for start in range(0, num_queries, rows):
        block = slice(start, min(start + rows, num_queries))
        visible = slice(0, block.stop if causal else None)
        queries = scaled[:, :, block].unflatten(1, (-1, group))
        scores = queries @ keys[:, :, None, :, visible]  # [B, H_kv, group, rows, keys]
        if bias is not None:
            scores += bias[block]
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
            scores.masked_fill_(later.triu(start + 1), float("-inf"))
        block_lse = scores.logsumexp(-1, keepdim=True)
        probs = scores.sub_(block_lse).exp_().to(v.dtype)
        out[:, :, block] = (probs @ v[:, :, None, visible]).flatten(1, 2)
        lse[:, :, block] = block_lse[..., 0].flatten(1, 2)
    return out, lse


def _band_bias(block: int, window_size: int, like: torch.Tensor) -> torch.Tensor:
    """Return [block, window_size + block - 1]: 0 where row r sees column s, r <= s < r + window."""
    r = torch.arange(block, device=like.device)[:, None]
    s = torch.arange(window_size + block - 1, device=like.device)
    bias = like.new_zeros(block, window_size + block - 1)
    return bias.masked_fill_((s < r) | (s >= r + window_size), float("-inf"))


def _blocks(x: torch.Tensor, length: int, step: int, count: int) -> torch.Tensor:
    """View [B, H, T, D] as its windows [B * count, H, length, D]; copies only where B > 1."""
    windows = x.unfold(2, length, step)[:, :, :count]  # [B, H, count, D, length]
    return windows.permute(0, 2, 1, 4, 3).flatten(0, 1)
