"""What decoding keeps of the past, per mixer: a state, a ring of the window, or every key.

Sinks stay: the state begins from them, and their keys keep the first slots. Both kinds can be kept
in INT8.
"""

import torch
from torch import nn

LARGEST = 127
"""Of INT8 values: symmetric, so -128 is left out."""
TINY = 1e-30


class LinearState:
    """State of linear attention: float32 [B, H_state, D_k, D_v], whatever the length.

    In INT8 every column and then every row of a head has a scale, which its largest value sets anew
    whenever the state is written: after each token. Columns have their own because that of the sum
    of weights, where there is one, is far larger than the others.
    """

    def __init__(self, *, is_int8: bool = False) -> None:
        self.is_int8 = is_int8
        self._state: torch.Tensor | None = None
        self._scales: list[torch.Tensor] = []

    @property
    def state(self) -> torch.Tensor | None:
        """The state; of INT8 a copy, which has to be written back."""
        state = self._state
        for scale in self._scales:
            assert state is not None, "it has scales"
            state = state * scale
        return state

    @state.setter
    def state(self, state: torch.Tensor | None) -> None:
        self._state, self._scales = state, []
        if state is None or not self.is_int8:
            return
        for dim, largest in ((-2, 1), (-1, LARGEST)):
            # Zeros alone have a scale too, so that they stay zeros.
            scale = (state.abs().amax(dim, keepdim=True) / largest).clamp_min_(TINY)
            self._scales.append(scale)
            state = state / scale
        self._state = state.round_().to(torch.int8)

    @property
    def num_bytes(self) -> int:
        """Bytes that hold the past."""
        held = self._scales if self._state is None else [self._state, *self._scales]
        return sum(tensor.nbytes for tensor in held)


class KeyValueScales(nn.Module):
    """Symmetric INT8 scales of keys and values, per head and channel, fixed by calibration.

    Attention reads integers: the scales of keys go into the queries, those of values into what
    comes out, so that prefill, evaluation and decoding compute with the very same numbers.
    """

    key: torch.Tensor
    value: torch.Tensor

    def __init__(self, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        for name in ("key", "value"):
            self.register_buffer(name, torch.ones(num_kv_heads, head_dim))

    def encode(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return scaled q [B, T, H, D], and k and v [B, T, H_kv, D] as integers in their dtype.

        What calibration has not seen the like of is cut at 127.
        """
        q = (q.float() * self._per_query_head(self.key, q)).to(q.dtype)
        k, v = (
            (x / scale).round_().clamp_(-LARGEST, LARGEST).to(x.dtype)
            for x, scale in ((k, self.key), (v, self.value))
        )
        return q, k, v

    def decode(self, out: torch.Tensor) -> torch.Tensor:
        """Return attention's sums of integer values [B, T, H, D] in the units of v."""
        return (out.float() * self._per_query_head(self.value, out)).to(out.dtype)

    @staticmethod
    def _per_query_head(scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return scale.repeat_interleave(x.shape[-2] // len(scale), 0)


class KeyValueCache:
    """Rotated keys and values of the sinks and of the tokens that the next query may see.

    With a window the tokens' slots are a ring of `window_size`, so neither its size nor the time to
    read it grows; without one the buffers double when full. The order of the slots does not matter,
    since positions were rotated in when the keys came. In INT8 they hold the integers of
    `KeyValueScales`.
    """

    def __init__(self, window_size: int | None, *, is_int8: bool = False) -> None:
        self.window_size = window_size
        self.is_int8 = is_int8
        self.num_sinks = 0
        self.num_tokens = 0
        self._k: torch.Tensor | None = None
        self._v: torch.Tensor | None = None

    def fill(self, k: torch.Tensor, v: torch.Tensor, num_sinks: int = 0) -> None:
        """Take the keys and values [B, S + T, H_kv, D] of the sinks and of a prompt."""
        k, v = self._narrow(k), self._narrow(v)
        B, num_rows, H_kv, D = k.shape
        S, T = num_sinks, num_rows - num_sinks
        size = self.window_size or max(64, 2 * T)
        sinks = torch.arange(S, device=k.device)
        kept = torch.arange(max(0, T - size), T, device=k.device)
        rows, slots = torch.cat([sinks, S + kept]), torch.cat([sinks, S + kept % size])
        self._k, self._v = k.new_zeros(B, S + size, H_kv, D), v.new_zeros(B, S + size, H_kv, D)
        self._k[:, slots], self._v[:, slots] = k[:, rows], v[:, rows]
        self.num_sinks, self.num_tokens = S, T

    def append(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add one token, [B, 1, H_kv, D], and return all that its query sees, in their dtype."""
        dtype = k.dtype
        if self._k is None or self._v is None:
            self.fill(k, v)
            assert self._k is not None
            assert self._v is not None
        else:
            if self.window_size is None and self.num_sinks + self.num_tokens == self._k.shape[1]:
                self._k = torch.cat([self._k, torch.zeros_like(self._k)], 1)
                self._v = torch.cat([self._v, torch.zeros_like(self._v)], 1)
            slot = self.num_sinks + self.num_tokens % (self._k.shape[1] - self.num_sinks)
            self._k[:, slot], self._v[:, slot] = self._narrow(k)[:, 0], self._narrow(v)[:, 0]
            self.num_tokens += 1
        seen = min(self.num_sinks + self.num_tokens, self._k.shape[1])
        return self._k[:, :seen].to(dtype), self._v[:, :seen].to(dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes that hold the past, without the room for tokens to come."""
        if self._k is None or self._v is None:
            return 0
        seen = min(self.num_sinks + self.num_tokens, self._k.shape[1])
        return self._k[:, :seen].nbytes + self._v[:, :seen].nbytes

    def _narrow(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.int8) if self.is_int8 else x


MixerCache = LinearState | KeyValueCache
