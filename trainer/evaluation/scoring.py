"""Log-likelihood of tokens under a model: windows of documents packed into bounded batches.

Every suite that reads text goes through here. Logits exist for few tokens at a time and only for
those that are predicted.
"""

import copy
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from conf.schema import OpsConfig
from models.cache import MixerCache
from models.causal_lm import CausalLM
from parallel.comm import Comm
from parallel.layout import build_layout
from parallel.mesh import Mesh
from parallel.sequence import SequenceContext

LOGIT_BYTES = 1 << 26
"""Most bytes of float32 logits at a time."""
LOG_SECONDS = 10.0

logger = logging.getLogger(__name__)


class Piece(NamedTuple):
    """Consecutive tokens of a document: all but the last are read, the last ones predicted."""

    tokens: np.ndarray
    """int64 [n + 1]."""
    num_predicted: int
    """1 to n; the tokens before them are context only."""


class Score(NamedTuple):
    """What a model says of the predicted tokens of a piece."""

    losses: np.ndarray
    """float32 [num_predicted], nats."""
    is_likeliest: np.ndarray
    """bool [num_predicted]: whether greedy decoding would have given this token."""


def windows(tokens: np.ndarray, seq_len: int, stride: int) -> Iterator[Piece]:
    """Cut a document so that every token but the first is predicted once.

    A window reads `seq_len` tokens. Predicted tokens have all tokens before them as context, and
    from the second window on at least seq_len - stride + 1 of them.
    """
    end = 0  # tokens up to this one are predicted
    for start in range(0, len(tokens) - 1, stride):
        stop = min(start + seq_len, len(tokens) - 1)
        if stop > end:
            yield Piece(tokens[start : stop + 1], stop - end)
            end = stop


class Scorer:
    """Scores text with a model that is restored for inference."""

    def __init__(self, model: CausalLM, ops: OpsConfig) -> None:
        self.model, self.ops = model, ops
        self.device = next(model.parameters()).device
        vocab_bytes = 4 * model.config.vocab_size
        self._rows = max(1, LOGIT_BYTES // vocab_bytes)

    def context(self, lengths: Sequence[int]) -> SequenceContext:
        """Return the context of packed documents of these lengths."""
        cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
        return SequenceContext(build_layout(cu_seqlens), self.ops, Comm(Mesh(0, 1, 0, self.device)))

    def score(self, pieces: Iterable[Piece], batch_tokens: int) -> Iterator[tuple[Piece, Score]]:
        """Yield every piece with its score, in order, as soon as its batch is full.

        Args:
            batch_tokens: tokens that are computed at a time; a longer piece is computed alone.
        """
        batch: list[Piece] = []
        size = 0
        for piece in pieces:
            if batch and size + len(piece.tokens) - 1 > batch_tokens:
                yield from self._score_batch(batch)
                batch, size = [], 0
            batch.append(piece)
            size += len(piece.tokens) - 1
        if batch:
            yield from self._score_batch(batch)

    @torch.inference_mode()
    def _score_batch(self, batch: list[Piece]) -> Iterator[tuple[Piece, Score]]:
        lengths = [len(piece.tokens) - 1 for piece in batch]
        tokens = torch.from_numpy(np.concatenate([piece.tokens[:-1] for piece in batch]))[None]
        hidden = self.model.hidden(tokens.to(self.device), self.context(lengths))[0]
        ends = np.cumsum(lengths)
        rows = np.concatenate(
            [np.arange(e - p.num_predicted, e) for e, p in zip(ends, batch, strict=True)]
        )
        labels = np.concatenate([piece.tokens[-piece.num_predicted :] for piece in batch])
        parts = [
            self._score_rows(hidden[rows[i : i + self._rows]], labels[i : i + self._rows])
            for i in range(0, len(rows), self._rows)
        ]
        losses, hits = (np.concatenate(part) for part in zip(*parts, strict=True))
        start = 0
        for piece in batch:
            stop = start + piece.num_predicted
            yield piece, Score(losses[start:stop], hits[start:stop])
            start = stop

    def _score_rows(self, hidden: torch.Tensor, labels: np.ndarray) -> tuple[np.ndarray, ...]:
        logits = self.model.head.logits(hidden).float()
        label = torch.from_numpy(labels).to(self.device)[:, None]
        chosen = logits.gather(1, label).squeeze(1)
        losses = logits.logsumexp(1) - chosen
        return losses.cpu().numpy(), (chosen >= logits.amax(1)).cpu().numpy()

    @torch.inference_mode()
    def logits(self, tokens: np.ndarray, rows: np.ndarray) -> torch.Tensor:
        """Return the float32 logits [len(rows), vocab] that follow these rows of a document.

        Args:
            tokens: int64 [T].
            rows: int64, of 0 to T - 1.
        """
        batch = torch.from_numpy(tokens).to(self.device)[None]
        hidden = self.model.hidden(batch, self.context([len(tokens)]))[0]
        return self.model.head.logits(hidden[rows]).float()

    @torch.inference_mode()
    def score_answers(
        self, prompt: np.ndarray, answers: Sequence[np.ndarray]
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood in nats, whether greedy decoding gives it) of each answer.

        The prompt is read once; the answers follow it one by one from copies of the cache.

        Args:
            prompt: int64 [T], T >= 1.
            answers: int64 [n] each, n >= 1.
        """
        cache = self.model.new_cache()
        tokens = torch.from_numpy(prompt).to(self.device)[None]
        first = self.model.prefill(tokens, self.context([len(prompt)]), cache)
        return [self._score_answer(first, cache, len(prompt), answer) for answer in answers]

    def _score_answer(
        self,
        logits: torch.Tensor,
        cache: list[dict[str, MixerCache]],
        position: int,
        answer: np.ndarray,
    ) -> tuple[float, bool]:
        if len(answer) > 1:
            cache = copy.deepcopy(cache)
        total, is_greedy = 0.0, True
        for offset, token in enumerate(answer):
            if offset:
                previous = torch.tensor([[answer[offset - 1]]], device=self.device)
                logits = self.model.decode(previous, cache, position + offset - 1)
            log_probs = logits[0].float().log_softmax(-1)
            total += float(log_probs[token])
            is_greedy &= bool(log_probs[token] >= log_probs.max())
        return total, is_greedy


class Progress:
    """Logs what a long evaluation has done so far, at most every few seconds."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._start = self._last = time.monotonic()

    def report(self, done: int, unit: str, figure: str) -> None:
        """Say how much is done, at which speed, and a figure of it."""
        now = time.monotonic()
        if now - self._last >= LOG_SECONDS:
            self._last = now
            speed = done / (now - self._start)
            logger.info(
                "%s: %s %s, %s (%.1f per second)", self._what, f"{done:,}", unit, figure, speed
            )
