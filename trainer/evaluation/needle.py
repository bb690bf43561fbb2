"""Suite `needle`: find one sentence in a long text that is about something else.

With a real tokenizer the haystack is text; with bytes it is random letters, the task NIAH-S: one
key and its value at a chosen depth, the key again at the end.
"""

import logging
import math
from dataclasses import dataclass as plain_dataclass
from typing import Annotated, Literal

import numpy as np
from matplotlib.figure import Figure
from pydantic import Field
from pydantic.dataclasses import dataclass

from conf.schema import STRICT, NonNegativeInt, PositiveInt, Ratio
from trainer.data import Tokenizer, load_tokenizer
from trainer.evaluation import Evaluation, Value
from trainer.evaluation.scoring import Progress, Scorer
from trainer.evaluation.texts import Format, collect_tokens, token_documents
from trainer.figure import FULL, LIGHT, render
from trainer.restore import Restored

KEYS = (
    "Amsterdam", "Budapest", "Cairo", "Delhi", "Edinburgh", "Florence", "Geneva", "Havana",
    "Istanbul", "Jakarta", "Kyoto", "Lisbon", "Madrid", "Nairobi", "Oslo", "Prague",
)  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyz "

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NeedleSuite:
    haystack: Literal["auto", "text", "letters"]
    """text: documents; letters: random ones (NIAH-S); auto: letters where tokens are bytes."""
    path: str | list[str] | None
    """Files, folders or globs of the haystack; null: the validation documents of the run."""
    format: Format | None
    """null: by file ending."""
    text_key: str
    """Field that holds the text of a jsonl or parquet record."""
    lengths: Annotated[list[PositiveInt], Field(min_length=1)]
    """Tokens of the whole prompt, needle and question included."""
    depths: Annotated[list[Ratio], Field(min_length=1)]
    """Share of the haystack before the needle."""
    samples: PositiveInt
    """Prompts of each length and depth."""
    distractors: Annotated[int, Field(ge=1, le=1000)]
    """Wrong answers whose likelihood is compared with the right one."""
    seed: NonNegativeInt

    def evaluate(self, restored: Restored) -> Evaluation:
        """Return a row per length and depth."""
        tokenizer = load_tokenizer(restored.config.data.tokenizer)
        rng = np.random.default_rng(self.seed)
        is_text = self.haystack == "text" or (
            self.haystack == "auto" and tokenizer.fingerprint != "bytes"
        )
        haystack = self._text(restored, tokenizer) if is_text else None
        tasks = [
            (length, depth, self._task(tokenizer, haystack, length, depth, rng))
            for length in self.lengths
            for depth in self.depths
            for _ in range(self.samples)
        ]
        scorer = Scorer(restored.model, restored.config.ops)
        progress = Progress("suite=needle")
        found: dict[tuple[int, float], list[_Answer]] = {}
        for number, (length, depth, task) in enumerate(tasks, 1):
            answer = _ask(scorer, task)
            found.setdefault((length, depth), []).append(answer)
            progress.report(number, f"of {len(tasks)} prompts", f"rank {answer.rank} last")
        rows = [_row(length, depth, answers) for (length, depth), answers in found.items()]
        note = (
            "exact: share of prompts after which greedy decoding gives the answer. likeliest: "
            f"share for which it is likelier than each of {self.distractors} others (by chance "
            f"{1 / (1 + self.distractors):.3f}); mean_rank: its place among them, from 1."
        )
        return Evaluation("needle", rows, [note], {"needle": _figure(rows)})

    def _text(self, restored: Restored, tokenizer: Tokenizer) -> np.ndarray:
        """Return enough text to begin anywhere in."""
        documents = token_documents(
            restored.config.data, tokenizer, "needle", self.path, self.format, self.text_key
        )
        longest = max(self.lengths)
        tokens = collect_tokens(documents, 8 * longest)
        if len(tokens) < longest:
            raise ValueError(
                f"suites.needle.lengths={self.lengths} needs {longest} tokens of text and there are"
                f" {len(tokens)}; name more in suites.needle.path, or use shorter lengths"
            )
        return tokens

    def _task(
        self,
        tokenizer: Tokenizer,
        haystack: np.ndarray | None,
        length: int,
        depth: float,
        rng: np.random.Generator,
    ) -> "_Task":
        """Draw a needle and put it into `length` tokens."""
        key, right, wrong = _draw_answers(haystack is not None, self.distractors, rng)
        if haystack is None:
            needle, question = f"{key}={right};", f"{key}="
        else:
            needle = f" The special magic number of {key} is{right}. "
            question = f" The special magic number of {key} is"
        parts = [tokenizer.encode(part) for part in (needle, question)]
        room = length - sum(len(part) for part in parts)
        if room < 1:
            raise ValueError(
                f"suites.needle.lengths={self.lengths}: needle and question alone have "
                f"{length - room} tokens; use {length - room + 1} or more"
            )
        if haystack is None:
            letters = rng.choice(list(LETTERS), room)
            hay = tokenizer.encode("".join(letters))[:room]
        else:
            begin = rng.integers(len(haystack) - room + 1)
            hay = haystack[begin : begin + room]
        place = round(depth * len(hay))
        prompt = np.concatenate([hay[:place], parts[0], hay[place:], parts[1]])
        return _Task(prompt, [tokenizer.encode(answer) for answer in (right, *wrong)])


@plain_dataclass(frozen=True)
class _Task:
    """A prompt, the answer to it and wrong ones after that."""

    prompt: np.ndarray
    answers: list[np.ndarray]


@plain_dataclass(frozen=True)
class _Answer:
    """What became of a task."""

    is_exact: bool
    rank: int
    """Of the right answer by likelihood, 1 is best."""


def _draw_answers(
    is_text: bool, distractors: int, rng: np.random.Generator
) -> tuple[str, str, list[str]]:
    """Return a key, its value and other values, as many digits long."""
    digits = 5 if is_text else max(2, len(str(distractors)))
    low = 10 ** (digits - 1)
    values = [str(value) for value in rng.choice(9 * low, distractors + 1, replace=False) + low]
    if is_text:
        values = [f" {value}" for value in values]
        return str(rng.choice(KEYS)), values[0], values[1:]
    return "".join(rng.choice(list("ABCDEFGHIJKLMNOP"), 2)), values[0], values[1:]


def _ask(scorer: Scorer, task: _Task) -> _Answer:
    scores = scorer.score_answers(task.prompt, task.answers)
    (right, is_exact), *wrong = scores
    return _Answer(is_exact, 1 + sum(score >= right for score, _ in wrong))


def _row(length: int, depth: float, answers: list[_Answer]) -> dict[str, Value]:
    count = len(answers)
    return {
        "length": length,
        "depth": depth,
        "exact": sum(answer.is_exact for answer in answers) / count,
        "likeliest": sum(answer.rank == 1 for answer in answers) / count,
        "mean_rank": math.fsum(answer.rank for answer in answers) / count,
        "prompts": count,
    }


def _figure(rows: list[dict[str, Value]]) -> str:
    """Draw a cell per length and depth, as strong as its share."""
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    depths = list(dict.fromkeys(row["depth"] for row in rows))

    def draw(figure: Figure) -> None:
        for axes, (key, title) in zip(
            figure.subplots(1, 2, sharey=True),
            [("exact", "Exact answer"), ("likeliest", "Likelier than all others")],
            strict=True,
        ):
            for row in rows:
                x, y = lengths.index(row["length"]), depths.index(row["depth"])
                share = float(row[key] or 0.0)
                color = (LIGHT["green"], round(0.08 + 0.92 * share, 3))
                axes.bar([x], 0.94, 0.94, bottom=y - 0.47, color=[color])
                axes.text(x, y, f"{share:.2f}", ha="center", va="center", fontsize=7.5)
            axes.set_title(title)
            axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
            axes.set_ylim(len(depths) - 0.5, -0.5)
            axes.set_xlabel("tokens of the prompt")
            axes.grid(visible=False)
        figure.axes[0].set_ylabel("depth of the needle")

    return render("needle", (FULL, 1.2 + 0.32 * len(depths)), draw)
