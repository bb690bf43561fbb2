"""Time by kind of layer: every moment of a profiled step belongs to exactly one kind."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from models.causal_lm import CausalLM


class StepProfiler:
    """Attributes the seconds of profiled steps to kinds; the innermost open kind gets them.

    Args:
        synchronize: waits for the device, so that a reading covers the work given before it.
    """

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.steps = 0
        self._synchronize = synchronize
        self._stack: list[str] = []
        self._since = 0.0

    @contextmanager
    def step(self, enabled: bool) -> Iterator[None]:
        """Profile one step if `enabled`; what no kind claims is `other`."""
        if not enabled:
            yield
            return
        self._stack, self._since = ["other"], self._now()
        try:
            yield
        finally:
            self._charge()
            self._stack = []
        self.steps += 1

    @contextmanager
    def kind(self, kind: str) -> Iterator[None]:
        """Charge what runs inside to `kind`."""
        self._enter(kind)
        try:
            yield
        finally:
            self._leave()

    def watch(self, model: CausalLM) -> None:
        """Charge the forward and backward passes of the model's parts to their kinds."""
        for name, module in model.named_children():
            if name == "embed":  # its input has no gradient
                self._watch(module, "embedding_and_norms", backward=False)
            elif name in ("norm", "head"):
                self._watch(module, {"norm": "embedding_and_norms", "head": "head_and_loss"}[name])
        # Below the first parameter that is trained, nothing has a gradient either.
        has_gradient = not model.part.has_embedding or _is_trained(model.embed)
        has_gradient |= model.sinks is not None and _is_trained(model.sinks)
        for _, layer in model.named_layers():
            for module, kind in (
                (layer.mixer_norm, "embedding_and_norms"),
                (layer.mixer, layer.mixer.kind),
                (layer.ffn_norm, "embedding_and_norms"),
                (layer.ffn, layer.ffn.kind),
            ):
                self._watch(module, kind, backward=has_gradient)
                has_gradient |= _is_trained(module)

    def seconds_per_step(self) -> dict[str, float]:
        """Return the mean seconds of each kind over the profiled steps."""
        return {kind: seconds / max(1, self.steps) for kind, seconds in self.seconds.items()}

    def _watch(self, module: nn.Module, kind: str, *, backward: bool = True) -> None:
        module.register_forward_pre_hook(lambda *_: self._enter(kind))
        module.register_forward_hook(lambda *_: self._leave())
        if not backward:
            return
        module.register_full_backward_pre_hook(lambda *_: self._enter(kind))
        module.register_full_backward_hook(lambda *_: self._leave())

    def _enter(self, kind: str) -> None:
        if self._stack:
            self._charge()
            self._stack.append(kind)

    def _leave(self) -> None:
        if len(self._stack) > 1:
            self._charge()
            self._stack.pop()

    def _charge(self) -> None:
        now = self._now()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def _now(self) -> float:
        if self._stack:
            self._synchronize()
        return time.perf_counter()


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
