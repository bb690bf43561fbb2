"""Suite `harness`: tasks of EleutherAI's lm-evaluation-harness, the optional extra `eval`.

Tasks come with the package or, as YAML files, from a folder of one's own; data that they name on a
hub must be there already where there is no network.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from conf.schema import STRICT, GenerateConfig, NonNegativeInt, PositiveInt
from trainer.data import TextStream, Tokenizer, load_tokenizer
from trainer.evaluation import Evaluation, Value
from trainer.evaluation.scoring import Piece, Progress, Scorer, windows
from trainer.generate import generate
from trainer.restore import Restored


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HarnessSuite:
    tasks: list[str]
    """Names of tasks or groups, as hellaswag or mmlu."""
    include_path: str | None
    """Folder of YAML files with further tasks."""
    num_fewshot: NonNegativeInt | None
    """Examples before each question; null: as the task has it."""
    limit: Annotated[int, Field(ge=1)] | None
    """Questions of each task; null: all."""
    seq_len: PositiveInt | None
    """Tokens that are read at most, the last ones; null: data.seq_len of the run."""
    max_new_tokens: PositiveInt
    """Of an answer whose task sets no limit."""
    batch_tokens: PositiveInt
    """Tokens computed at a time; a longer question is computed alone."""

    def evaluate(self, restored: Restored) -> Evaluation:
        """Return a row per task and metric."""
        if importlib.util.find_spec("lm_eval") is None:
            raise ValueError("suite=harness needs lm-eval: pip install 'longaxon[eval]'")
        from lm_eval import simple_evaluate
        from lm_eval.api.model import LM
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=self.include_path)
        unknown = sorted(task for task in self.tasks if not manager.match_tasks([task]))
        if unknown or not self.tasks:
            raise ValueError(
                f"suites.harness.tasks={self.tasks}: {unknown or 'nothing'} is no task; name tasks "
                "of lm-eval, or those of YAML files in suites.harness.include_path"
            )

        class Model(HarnessModel, LM):
            """The harness takes subclasses of its own class alone."""

        results = simple_evaluate(
            model=Model(restored, self),
            tasks=self.tasks,
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            task_manager=manager,
            bootstrap_iters=1000,
        )
        return Evaluation("harness", _rows(results))


class HarnessModel:
    """What the harness asks of a model, answered by ours.

    Requests carry their arguments in `args`, as the harness has them.
    """

    def __init__(self, restored: Restored, suite: HarnessSuite) -> None:
        super().__init__()
        data = restored.config.data
        self._suite = suite
        self._seq_len = suite.seq_len or data.seq_len
        self._tokenizer: Tokenizer = load_tokenizer(data.tokenizer)
        self._scorer = Scorer(restored.model, restored.config.ops)

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood in nats, whether it is greedy) of each continuation."""
        pieces = (self._continuation(*request.args) for request in requests)
        progress, answers = Progress("suite=harness"), []
        for _, score in self._scorer.score(pieces, self._suite.batch_tokens):
            total = float(score.losses.sum(dtype=np.float64))
            answers.append((-total, bool(score.is_likeliest.all())))
            progress.report(len(answers), f"of {len(requests)} continuations", f"{-total:.4g} last")
        return answers

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each text in nats, all its tokens predicted."""
        return [self._text(*request.args) for request in requests]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what follows each context, up to one of the request's stop strings."""
        progress, answers = Progress("suite=harness"), []
        for request in requests:
            answers.append(self._generate(*request.args))
            progress.report(len(answers), f"of {len(requests)} answers", f"{len(answers[-1])} long")
        return answers

    def _continuation(self, context: str, continuation: str) -> Piece:
        # Spaces belong to the token after them.
        spaces = context[len(context.rstrip()) :]
        context, continuation = context.rstrip(), spaces + continuation
        before = self._tokenizer.encode(context)
        tokens = self._tokenizer.encode(context + continuation)
        num_predicted = max(1, len(tokens) - len(before))
        if not len(before):
            tokens = np.concatenate([[self._tokenizer.eos_id], tokens])
        tokens = tokens[-max(self._seq_len + 1, num_predicted + 1) :]
        return Piece(tokens, min(num_predicted, len(tokens) - 1))

    def _text(self, text: str) -> float:
        tokens = np.concatenate([[self._tokenizer.eos_id], self._tokenizer.encode(text)])
        pieces = windows(tokens, self._seq_len, self._seq_len)
        scores = self._scorer.score(pieces, max(self._suite.batch_tokens, self._seq_len))
        return -sum(float(score.losses.sum(dtype=np.float64)) for _, score in scores)

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else [stop for stop in until if stop]
        config = GenerateConfig(
            run="",
            prompt="",
            max_new_tokens=int(settings.get("max_gen_toks") or self._suite.max_new_tokens),
            temperature=float(settings.get("temperature") or 0) * bool(settings.get("do_sample")),
            top_k=0,
            seed=0,
            stop_at_end=True,
            time_every=0,
        )
        prompt = self._tokenizer.encode(context)[-self._seq_len :].tolist()
        text = ""
        for piece in self._pieces(prompt or [self._tokenizer.eos_id], config):
            text += piece
            ends = [text.index(stop) for stop in until if stop in text]
            if ends:
                return text[: min(ends)]
        return text

    def _pieces(self, prompt: list[int], config: GenerateConfig) -> Iterator[str]:
        """Yield text as it is generated, to the end of the document."""
        stream = TextStream(self._tokenizer)
        context = self._scorer.context([len(prompt)])
        tokens = generate(self._scorer.model, prompt, config, context, self._tokenizer.vocab_size)
        for token in tokens:
            if token == self._tokenizer.eos_id:
                break
            yield stream.push(token)
        yield stream.finish()


def _rows(results: dict[str, Any]) -> list[dict[str, Value]]:
    """Return the harness's figures: {task: {"metric,filter": value, ...}} as rows."""
    rows: list[dict[str, Value]] = []
    for task, figures in results["results"].items():
        for name, value in figures.items():
            metric, _, kind = name.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or not kind:
                continue
            error = figures.get(f"{metric}_stderr,{kind}")
            count = results.get("n-samples", {}).get(task, {}).get("effective")
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": kind,
                    "value": float(value),
                    "standard_error": error if isinstance(error, float) else None,
                    "questions": count,
                }
            )
    return rows
