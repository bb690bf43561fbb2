"""What the Triton kernels of the delta rule share: tiles, factors of the decay and causal scores.

By channel, a chunk is halved again and again, as in `scores.py`: the scores of the late half with
the early one factor in the middle. Each halving takes a product of whole tiles, of which it keeps
the pairs that it parts. The exponents there are differences of sums of decay since the chunk began;
for float32 inputs `_delta_rule_sums_kernel` keeps what these round off, so that none is lost.
"""

import triton
import triton.language as tl

# The exponential of this is zero in float32; larger sums would only lose digits of the others.
MIN_LOG_DECAY: tl.constexpr = tl.constexpr(-150.0)


@triton.jit
def load_rows(p_x, b_rows, b_is_token, D: tl.constexpr, b_channels):  # type: ignore[no-untyped-def]
    """Load [C, channels] of an array [rows, D], zeros where there is no token, as float32."""
    p_tile = p_x + (b_rows[:, None] * D + b_channels[None, :])
    return tl.load(p_tile, mask=b_is_token[:, None], other=0.0).to(tl.float32)


@triton.jit
def store_rows(p_x, b_x, b_rows, b_is_token, D: tl.constexpr, b_channels):  # type: ignore[no-untyped-def]
    """Store [C, channels] into an array [rows, D]."""
    p_tile = p_x + (b_rows[:, None] * D + b_channels[None, :])
    tl.store(p_tile, b_x.to(p_x.dtype.element_ty), mask=b_is_token[:, None])


@triton.jit
def _delta_rule_sums_kernel(  # type: ignore[no-untyped-def]
    p_log_decay, p_chunks, p_sums, p_rest, H, D_K: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum the decay of each chunk by channel; grid (chunks, state heads, D_K / BLOCK).

    p_rest, where present, holds what p_sums rounds off (Knuth's two-sum).
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    start, num_tokens = tl.load(p_chunks + 2 * chunk), tl.load(p_chunks + 2 * chunk + 1)
    b_offsets = (start.to(tl.int64) * H + head) * D_K
    b_offsets += tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    b_sum, b_rest = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for _ in range(num_tokens):
        b_decay = tl.maximum(tl.load(p_log_decay + b_offsets), MIN_LOG_DECAY) + b_rest
        b_next = b_sum + b_decay
        b_added = b_next - b_sum
        b_rest = (b_sum - (b_next - b_added)) + (b_decay - b_added)
        b_sum = b_next
        tl.store(p_sums + b_offsets, b_sum)
        if p_rest is not None:
            tl.store(p_rest + b_offsets, b_rest)
        b_offsets += H * D_K


@triton.jit
def load_sums(p_sums, b_t, num_tokens, H, D: tl.constexpr, b_channels):  # type: ignore[no-untyped-def]
    """Load the sums of decay up to tokens of the chunk, [len(b_t), channels]; past it the last."""
    b_rows = tl.minimum(b_t, num_tokens - 1) * H
    return tl.load(p_sums + (b_rows[:, None] * D + b_channels[None, :]))


@triton.jit
def load_factors(  # type: ignore[no-untyped-def]
    p_decay, p_rest, b_t, num_tokens, H, D: tl.constexpr, b_channels, VECTOR: tl.constexpr
):
    """Return exp(b), exp(r) and exp(b_C), [C, channels] and [1, channels], or of 1 channel.

    p_decay holds the sums of decay by channel, or else the decay of each token.
    """
    b_rows, b_is_token = b_t * H, b_t < num_tokens
    if VECTOR:
        b_last = tl.full((1,), num_tokens - 1, tl.int32)
        b_up = load_sums(p_decay, b_t, num_tokens, H, D, b_channels)
        b_total = load_sums(p_decay, b_last, num_tokens, H, D, b_channels)
        b_down = b_total - b_up
        if p_rest is not None:
            b_rest = load_sums(p_rest, b_t, num_tokens, H, D, b_channels)
            b_total_rest = load_sums(p_rest, b_last, num_tokens, H, D, b_channels)
            b_up += b_rest
            b_total += b_total_rest
            b_down += b_total_rest - b_rest
    else:
        b_decay = tl.load(p_decay + b_rows, mask=b_is_token, other=0.0)[:, None]
        b_is_inner = b_t + 1 < num_tokens
        b_next = tl.load(p_decay + b_rows + H, mask=b_is_inner, other=0.0)[:, None]
        b_up = tl.cumsum(b_decay, 0)
        b_down = tl.cumsum(b_next, 0, reverse=True)
        b_total = tl.sum(b_decay, 0)[None, :]
    return tl.exp(b_up), tl.exp(b_down), tl.exp(b_total)


@triton.jit
def scalar_decays(p_decay, b_rows, b_is_token, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """exp(g_{s+1} + ... + g_t) for s <= t, else 0, [C, C]."""
    b_t = tl.arange(0, C)
    b_decay = tl.load(p_decay + b_rows, mask=b_is_token, other=0.0)
    b_terms = tl.where(b_t[:, None] > b_t[None, :], b_decay[:, None], 0.0)
    b_is_causal = b_t[:, None] >= b_t[None, :]
    return tl.where(b_is_causal, tl.exp(tl.cumsum(b_terms, 0)), 0.0)


@triton.jit
def halving_factor(p_sums, p_rest, b_t, num_tokens, H, D: tl.constexpr, b_channels, level):  # type: ignore[no-untyped-def]
    """exp of the decay from the middle of 2^(level + 1) tokens to late rows, from early to it."""
    b_middle = (b_t >> (level + 1) << (level + 1)) + (1 << level) - 1
    b_decay = load_sums(p_sums, b_t, num_tokens, H, D, b_channels)
    b_decay -= load_sums(p_sums, b_middle, num_tokens, H, D, b_channels)
    if p_rest is not None:
        b_decay += load_sums(p_rest, b_t, num_tokens, H, D, b_channels) - load_sums(
            p_rest, b_middle, num_tokens, H, D, b_channels
        )
    return tl.exp(-tl.abs(b_decay))


@triton.jit
def is_parted(level, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether halving 2^(level + 1) tokens parts two, [C, C]; symmetric."""
    b_t = tl.arange(0, C)
    return ((b_t[:, None] ^ b_t[None, :]) >> level) == 1


@triton.jit
def _delta_rule_scores_fwd_kernel(  # type: ignore[no-untyped-def]
    p_x, p_k, p_decay, p_rest, p_chunks, p_scores, scale, H, group,
    D_K: tl.constexpr, VECTOR: tl.constexpr, DOT: tl.constexpr,
    C: tl.constexpr, LOG_C: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Score the rows of x, queries or keys, with the keys up to them; grid (chunks, heads of x)."""
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, num_tokens = tl.load(p_chunks + 2 * chunk), tl.load(p_chunks + 2 * chunk + 1)
    b_t = tl.arange(0, C)
    b_rows, b_is_token = b_t * H, b_t < num_tokens
    row, x_row = start.to(tl.int64) * H + head // group, start.to(tl.int64) * H * group + head
    p_x, p_k = p_x + x_row * D_K, p_k + row * D_K
    p_decay += row * (D_K if VECTOR else 1)
    if p_rest is not None:
        p_rest += row * D_K
    b_scores, b_diagonal = tl.zeros((C, C), tl.float32), tl.zeros((C,), tl.float32)
    if VECTOR:
        for level in range(LOG_C):
            # Levels outside: inside, the masks of all of them would take the registers.
            b_products = tl.zeros((C, C), tl.float32)
            for i in range(0, D_K, BK):
                b_keys = i + tl.arange(0, BK)
                b_x = load_rows(p_x, b_rows * group, b_is_token, D_K, b_keys)
                b_k = load_rows(p_k, b_rows, b_is_token, D_K, b_keys)
                b_diagonal += tl.where(level == 0, tl.sum(b_x * b_k, 1), 0.0)
                b_factor = halving_factor(p_decay, p_rest, b_t, num_tokens, H, D_K, b_keys, level)
                b_early = tl.trans((b_k * b_factor).to(DOT))
                b_products += tl.dot((b_x * b_factor).to(DOT), b_early, input_precision="ieee")
            b_scores = tl.where(is_parted(level, C), b_products, b_scores)
        b_scores = tl.where(b_t[:, None] > b_t[None, :], b_scores, 0.0)
        b_scores = tl.where(b_t[:, None] == b_t[None, :], b_diagonal[:, None], b_scores)
    else:
        for i in range(0, D_K, BK):
            b_keys = i + tl.arange(0, BK)
            b_x = load_rows(p_x, b_rows * group, b_is_token, D_K, b_keys).to(DOT)
            b_k = load_rows(p_k, b_rows, b_is_token, D_K, b_keys).to(DOT)
            b_scores += tl.dot(b_x, tl.trans(b_k), input_precision="ieee")
        b_scores *= scalar_decays(p_decay, b_rows, b_is_token, C)
    p_tile = p_scores + (chunk * H * group + head) * C * C + b_t[:, None] * C + b_t[None, :]
    tl.store(p_tile, (b_scores * scale).to(p_scores.dtype.element_ty))


@triton.jit
def _delta_rule_scores_bwd_kernel(  # type: ignore[no-untyped-def]
    p_x, p_k, p_decay, p_rest, p_chunks, p_dscores, p_dx, p_dk_scores, p_dsums,
    scale, H, group, num_rows,
    D_K: tl.constexpr, VECTOR: tl.constexpr, DOT: tl.constexpr,
    C: tl.constexpr, LOG_C: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, heads of x, D_K / BK); the gradient of the keys is one for each head of x.

    So is that of the sum of decay up to each token. A pair adds to the sum of its row what it takes
    from that of its column: rounded alike, both cancel in all decays but those between. If there is
    one decay for all channels, p_dsums has num_rows values for each block of channels.
    """
    chunk, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, num_tokens = tl.load(p_chunks + 2 * chunk), tl.load(p_chunks + 2 * chunk + 1)
    b_t = tl.arange(0, C)
    b_rows, b_is_token = b_t * H, b_t < num_tokens
    row, x_row = start.to(tl.int64) * H + head // group, start.to(tl.int64) * H * group + head
    b_keys = tl.program_id(2) * BK + tl.arange(0, BK)
    b_x = load_rows(p_x + x_row * D_K, b_rows * group, b_is_token, D_K, b_keys)
    b_k = load_rows(p_k + row * D_K, b_rows, b_is_token, D_K, b_keys)
    p_tile = p_dscores + (chunk * H * group + head) * C * C + b_t[:, None] * C + b_t[None, :]
    b_dscores = tl.load(p_tile).to(tl.float32) * scale
    b_diagonal = tl.sum(tl.where(b_t[:, None] == b_t[None, :], b_dscores, 0.0), 1)[:, None]
    b_dx, b_dk = b_diagonal * b_k, b_diagonal * b_x
    b_dscores = tl.where(b_t[:, None] > b_t[None, :], b_dscores, 0.0)
    if VECTOR:
        p_decay += row * D_K
        if p_rest is not None:
            p_rest += row * D_K
        b_dscores = b_dscores.to(DOT)
        b_dsums = tl.zeros((C, BK), tl.float32)
        for level in range(LOG_C):
            b_factor = halving_factor(p_decay, p_rest, b_t, num_tokens, H, D_K, b_keys, level)
            b_dproducts = tl.where(is_parted(level, C), b_dscores, 0.0)
            b_late, b_early = (b_x * b_factor).to(DOT), (b_k * b_factor).to(DOT)
            b_dlate = tl.dot(b_dproducts, b_early, input_precision="ieee")
            b_dsums += b_late.to(tl.float32) * b_dlate
            b_dx += b_dlate * b_factor
            b_dearly = tl.dot(tl.trans(b_dproducts), b_late, input_precision="ieee")
            b_dsums -= b_early.to(tl.float32) * b_dearly
            b_dk += b_dearly * b_factor
        store_rows(p_dsums + x_row * D_K, b_dsums, b_rows * group, b_is_token, D_K, b_keys)
    else:
        b_products = tl.dot(b_x.to(DOT), tl.trans(b_k.to(DOT)), input_precision="ieee")
        b_dproducts = b_dscores * scalar_decays(p_decay + row, b_rows, b_is_token, C)
        b_dx += tl.dot(b_dproducts.to(DOT), b_k.to(DOT), input_precision="ieee")
        b_dk += tl.dot(tl.trans(b_dproducts.to(DOT)), b_x.to(DOT), input_precision="ieee")
        b_dpairs = b_dproducts * b_products
        p_dsums += tl.program_id(2).to(tl.int64) * num_rows + x_row
        b_dsums = tl.sum(b_dpairs, 1) - tl.sum(b_dpairs, 0)
        tl.store(p_dsums + b_rows * group, b_dsums, mask=b_is_token)
    store_rows(p_dx + x_row * D_K, b_dx, b_rows * group, b_is_token, D_K, b_keys)
    store_rows(p_dk_scores + x_row * D_K, b_dk, b_rows * group, b_is_token, D_K, b_keys)
