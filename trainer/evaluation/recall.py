"""Suite `recall`: multi-query associative recall (arXiv:2312.04927) by a trained model.

Pairs of words stand first, as in `apple: river`; after some text every key comes again and its
value is to follow. Words are single tokens, letters where the tokenizer has too few of them.
"""

import re
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from conf.schema import STRICT, NonNegativeInt, PositiveInt
from trainer.data import Tokenizer, load_tokenizer
from trainer.evaluation import Evaluation, Value
from trainer.evaluation.scoring import Progress, Scorer
from trainer.evaluation.texts import Format, collect_tokens, token_documents
from trainer.restore import Restored

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
WORD = re.compile(r"[a-z]{4,8}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RecallSuite:
    pairs: Annotated[list[PositiveInt], Field(min_length=1)]
    """Keys with their values, which stand first; all keys and values of a sequence differ."""
    fillers: Annotated[list[NonNegativeInt], Field(min_length=1)]
    """Tokens of text between the pairs and the questions."""
    samples: PositiveInt
    """Sequences of each; every key is asked for once."""
    path: str | list[str] | None
    """Files, folders or globs of that text; null: the validation documents of the run."""
    format: Format | None
    """null: by file ending."""
    text_key: str
    """Field that holds the text of a jsonl or parquet record."""
    seed: NonNegativeInt

    def evaluate(self, restored: Restored) -> Evaluation:
        """Return a row per number of pairs and length of the text between."""
        tokenizer = load_tokenizer(restored.config.data.tokenizer)
        words = _single_token_words(tokenizer)
        if 2 * max(self.pairs) > len(words):
            raise ValueError(
                f"suites.recall.pairs={self.pairs} needs {2 * max(self.pairs)} different words and "
                f"the tokenizer has {len(words)}; use {len(words) // 2} pairs at most"
            )
        text = self._text(restored, tokenizer)
        rng = np.random.default_rng(self.seed)
        scorer = Scorer(restored.model, restored.config.ops)
        progress = Progress("suite=recall")
        rows: list[dict[str, Value]] = []
        for num_pairs in self.pairs:
            for filler in self.fillers:
                sums = np.zeros(3)
                for number in range(1, self.samples + 1):
                    chosen = rng.choice(words, 2 * num_pairs, replace=False)
                    begin = rng.integers(len(text) - filler + 1)
                    sequence = _Sequence(tokenizer, chosen, text[begin : begin + filler], rng)
                    sums += sequence.score(scorer)
                    progress.report(number, f"of {self.samples}", f"{num_pairs} pairs")
                count = self.samples * num_pairs
                rows.append(
                    {
                        "pairs": num_pairs,
                        "tokens": len(sequence.tokens),
                        "accuracy": sums[0] / count,
                        "chance": 1 / num_pairs,
                        "exact": sums[1] / count,
                        "nats_per_value": sums[2] / count,
                        "questions": count,
                    }
                )
        note = (
            "accuracy: the value is the likeliest of the sequence's values; exact: the likeliest "
            "of all tokens."
        )
        return Evaluation("recall", rows, [note])

    def _text(self, restored: Restored, tokenizer: Tokenizer) -> np.ndarray:
        needed = max(self.fillers)
        if not needed:
            return np.zeros(0, np.int64)
        documents = token_documents(
            restored.config.data, tokenizer, "recall", self.path, self.format, self.text_key
        )
        tokens = collect_tokens(documents, 8 * needed)
        if len(tokens) < needed:
            raise ValueError(
                f"suites.recall.fillers={self.fillers} needs {needed} tokens of text and there are "
                f"{len(tokens)}; name more in suites.recall.path, or use fewer"
            )
        return tokens


class _Sequence:
    """Pairs, text and questions as tokens, and where the values are to come."""

    def __init__(
        self, tokenizer: Tokenizer, words: np.ndarray, text: np.ndarray, rng: np.random.Generator
    ) -> None:
        colon, newline = (tokenizer.encode(mark) for mark in (":", "\n"))
        self._values = words[1::2]
        parts: list[np.ndarray] = []
        for i in range(0, len(words), 2):
            parts += [words[i : i + 1], colon, words[i + 1 : i + 2], newline]
        parts += [text, newline]
        self._asked = rng.permutation(len(self._values))
        ends = []
        for index in self._asked:
            parts += [words[2 * index : 2 * index + 1], colon]
            ends.append(sum(map(len, parts)))
            parts += [self._values[index : index + 1], newline]
        self.tokens = np.concatenate(parts).astype(np.int64)
        self._rows = np.array(ends) - 1

    def score(self, scorer: Scorer) -> np.ndarray:
        """Return how many values were the likeliest value, the likeliest token, and their loss."""
        logits = scorer.logits(self.tokens, self._rows)
        right = torch.from_numpy(self._asked).to(logits.device)
        values = torch.from_numpy(self._values).to(logits.device)
        among = logits[:, values].argmax(1) == right
        exact = logits.argmax(1) == values[right]
        losses = torch.nn.functional.cross_entropy(logits, values[right], reduction="sum")
        return np.array([float(among.sum()), float(exact.sum()), float(losses)])


def _single_token_words(tokenizer: Tokenizer) -> np.ndarray:
    """Return tokens that are a word each, with a space before it, or letters if there are few."""
    found = {tokenizer.decode([token]).strip() for token in range(tokenizer.vocab_size)}
    words = sorted(word for word in found if WORD.fullmatch(word))
    encoded = tokenizer.encode_batch([f" {word}" for word in words])
    tokens = [int(ids[0]) for ids in encoded if len(ids) == 1]
    if len(tokens) < len(LETTERS):
        tokens = [int(tokenizer.encode(letter)[0]) for letter in LETTERS]
    return np.array(sorted(set(tokens)), np.int64)
