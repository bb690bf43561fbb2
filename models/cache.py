"""What decoding keeps of the past, per mixer: a state, a ring of the window, or every key.

Sinks stay: the state begins from them, and their keys keep the first slots.
"""

import torch


class LinearState:
    """State of linear attention: float32 [B, H_state, D_k, D_v], whatever the length."""

    def __init__(self) -> None:
        self.state: torch.Tensor | None = None


class KeyValueCache:
    """Rotated keys and values of the sinks and of the tokens that the next query may see.

    With a window the tokens' slots are a ring of `window_size`, so neither its size nor the time to
    read it grows; without one the buffers double when full. The order of the slots does not matter,
    since positions were rotated in when the keys came.
    """

    def __init__(self, window_size: int | None) -> None:
        self.window_size = window_size
        self.num_sinks = 0
        self.num_tokens = 0
        self._k: torch.Tensor | None = None
        self._v: torch.Tensor | None = None

    def fill(self, k: torch.Tensor, v: torch.Tensor, num_sinks: int = 0) -> None:
        """Take the keys and values [B, S + T, H_kv, D] of the sinks and of a prompt."""
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
        """Add one token, [B, 1, H_kv, D], and return all that its query sees."""
        if self._k is None or self._v is None:
            self.fill(k, v)
            assert self._k is not None
            assert self._v is not None
        else:
            if self.window_size is None and self.num_sinks + self.num_tokens == self._k.shape[1]:
                self._k = torch.cat([self._k, torch.zeros_like(self._k)], 1)
                self._v = torch.cat([self._v, torch.zeros_like(self._v)], 1)
            slot = self.num_sinks + self.num_tokens % (self._k.shape[1] - self.num_sinks)
            self._k[:, slot], self._v[:, slot] = k[:, 0], v[:, 0]
            self.num_tokens += 1
        seen = min(self.num_sinks + self.num_tokens, self._k.shape[1])
        return self._k[:, :seen], self._v[:, :seen]


MixerCache = LinearState | KeyValueCache
