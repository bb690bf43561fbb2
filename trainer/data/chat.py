"""Conversations: records to messages, messages to text by a chat template, and what is learned.

Only what the assistant answers is learned, to the token that ends its turn. Inside the program a
conversation is a document like any other: the JSON of its messages.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from trainer.data.tokenizer import (
    Encoded,
    Tokenizer,
    configured_tokens,
    find_tokenizer_file,
    read_json,
)

CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else -%}
{{ message['content'] + '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_FORM = "[{role: ..., content: ...}, ...]"

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class MessagesField:
    """Where a record holds its conversation."""

    key: str

    def columns(self, names: list[str], place: str) -> list[str]:
        """Return the fields to read of a record that has these; ValueError if they lack."""
        if self.key in names:
            return [self.key]
        if {"prompt", "response"} <= set(names):
            return ["prompt", "response"]
        raise ValueError(
            f"data.messages_key={self.key!r} is no field of {place}; set data.messages_key to the "
            f"one that holds {_FORM}, or have the fields prompt and response; it has "
            f"{', '.join(names) or 'none'}"
        )

    def document(self, record: dict[str, Any], place: str) -> str:
        """Return the messages of a record as JSON; ValueError if they are none."""
        if self.key in record:
            messages = record[self.key]
        else:
            messages = [
                {"role": "user", "content": record["prompt"]},
                {"role": "assistant", "content": record["response"]},
            ]
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise ValueError(
                f"data.messages_key={self.key!r} is no conversation in {place}; it needs {_FORM}, "
                "both strings"
            )
        # Parquet gives every message all fields that one of them has.
        filled = [{k: v for k, v in message.items() if v is not None} for message in messages]
        return json.dumps(filled, ensure_ascii=False) if filled else ""


class ChatEncoder:
    """Turns conversations into tokens, and marks those that the assistant has to say."""

    def __init__(self, tokenizer: Tokenizer, tokenizer_name: str, template: str | None) -> None:
        """Read the template; see `data.chat_template`."""
        self.tokenizer = tokenizer
        file = find_tokenizer_file(tokenizer_name)
        self._variables = configured_tokens(file.parent) if file else {}
        self._template = _read_template(template, file.parent if file else None)
        self._marks_answers = _MARKS_ANSWERS.search(self._template) is not None
        self.fingerprint = json.dumps([tokenizer.fingerprint, self._template, self._variables])

    def encode_batch(self, documents: list[str]) -> list[Encoded]:
        """Return the tokens of each conversation; empty where nothing is answered."""
        return [self.encode(json.loads(document)) for document in documents]

    def encode(self, messages: Messages) -> Encoded:
        """Return the tokens of a conversation.

        Raises:
            ValueError: the template refuses it, or does not tell what the assistant says.
        """
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        if not answers:
            return Encoded(np.zeros(0, np.int64), np.zeros(0, bool), 0)
        text, spans = self.render(messages)
        ids, begins = self.tokenizer.encode_with_begins(text)
        is_learned = np.zeros(len(ids), bool)
        for start, stop in spans:
            is_learned |= (start <= begins) & (begins < stop)
        if ids[-1] != self.tokenizer.eos_id:
            ids = np.append(ids, self.tokenizer.eos_id)
            is_learned = np.append(is_learned, False)
        return Encoded(ids, is_learned, sum(len(answer.encode()) for answer in answers))

    def render(self, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        """Return a conversation as text, and the characters that are the assistant's."""
        if self._marks_answers:
            return self._render(messages)
        whole, _ = self._render(messages)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before, _ = self._render(messages[:i], add_generation_prompt=True)
                after, _ = self._render(messages[: i + 1])
                if not after.startswith(before) or not whole.startswith(after):
                    raise ValueError(
                        "data.chat_template does not tell what the assistant says: the first "
                        f"{i + 1} messages are rendered differently when others follow, or after "
                        "the prompt for an answer; put {% generation %} ... {% endgeneration %} "
                        "around answers, or use data.chat_template=chatml. Messages: "
                        f"{messages!s:.300}"
                    )
                spans.append((len(before), self._end_of_turn(after)))
        return whole, spans

    def prompt(self, messages: Messages) -> str:
        """Return a conversation as text, up to where the assistant answers."""
        return self._render(messages, add_generation_prompt=True)[0]

    def _end_of_turn(self, text: str) -> int:
        """Return where the last turn ends: white space after its last token is the template's."""
        stripped = text.rstrip()
        return len(stripped if stripped.endswith(self.tokenizer.special_tokens) else text)

    def _render(
        self, messages: Messages, *, add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        # To import it takes as long as all else here, and only conversations need it.
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                [messages],
                chat_template=self._template,
                return_assistant_tokens_mask=self._marks_answers,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(
                f"data.chat_template: {error}; repair the template or the conversation, or use "
                f"data.chat_template=chatml. Messages: {messages!s:.300}"
            ) from error
        return texts[0], list(spans[0]) if self._marks_answers else []


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(
        isinstance(message.get(key), str) for key in ("role", "content")
    )


def _read_template(name: str | None, folder: Path | None) -> str:
    """Return the source of the template that `data.chat_template` stands for."""
    if name == "chatml":
        return CHATML
    if name is not None:
        file = Path(name).expanduser()
        if not file.is_file():
            raise ValueError(
                f"data.chat_template={name!r} is no file; use chatml, a Jinja file, or null for "
                "the template of the tokenizer"
            )
        return file.read_text(encoding="utf-8")
    if folder is not None and (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    found = read_json(folder / "tokenizer_config.json").get("chat_template") if folder else None
    if isinstance(found, list):  # several, by name
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    if not found:
        raise ValueError(
            "data.chat_template=null: the tokenizer has no chat template; use "
            "data.chat_template=chatml, or the path of a Jinja file"
        )
    return str(found)
