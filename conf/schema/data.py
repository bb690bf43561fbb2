"""What is trained on, and how it is cut into sequences."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from conf.schema.base import STRICT, PositiveFloat, PositiveInt

Source = Literal["stdlib", "text", "chat"]
Packing = Literal["stream", "documents", "domain"]
TooLong = Literal["cut", "truncate", "drop"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MixPart:
    """One domain of a mix; what it leaves out is as in `DataConfig`."""

    name: str
    """Name of the domain, in logs and in `data.validation`."""
    weight: PositiveFloat
    """Its share of the samples is this over the sum of all weights."""
    source: Source = "text"
    path: str | list[str] | None = None
    format: Literal["txt", "jsonl", "parquet"] | None = None
    text_key: str = "text"
    messages_key: str = "messages"
    packing: Packing | None = None
    """null: `data.packing`."""
    too_long: TooLong | None = None
    """null: `data.too_long`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    source: Literal[Source, "mix"]
    path: str | list[str] | None
    """Files, folders or globs, local or fsspec URLs (text, chat)."""
    format: Literal["txt", "jsonl", "parquet"] | None
    """null: by file ending."""
    text_key: str
    """Field that holds the text of a jsonl or parquet record."""
    messages_key: str = "messages"
    """Field that holds the conversation of a record (chat): [{role, content}, ...]; a record
    without it has the fields prompt and response."""
    chat_template: str | None = None
    """null: the tokenizer's own; chatml; or the path of a Jinja template (chat)."""
    mix: list[MixPart] | None = None
    """Domains that samples are taken from in proportion to their weights (mix)."""
    validation: str | None = None
    """Part of the mix to validate on; null: all of them by weight (mix)."""
    packing: Packing = "stream"
    """stream: windows of all documents laid end to end; documents: each inside one long document;
    domain: filled with whole documents, which are never cut where they fit."""
    min_doc_tokens: Annotated[int, Field(ge=2)] | None = None
    """Shortest document that packing=documents takes; null: one that fills a window."""
    too_long: TooLong = "cut"
    """What packing=domain does with a document longer than a window: cut it into several, keep what
    fits, or leave it out."""
    tokenizer: str
    """bytes, or the path of a Hugging Face tokenizer (folder or tokenizer.json)."""
    cache_dir: str
    """Where tokenised shards are kept, keyed by a hash of input and tokenizer."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)]
    """Share of the documents kept for validation."""
    seq_len: PositiveInt
    """Tokens of one sequence."""
    global_batch_size: PositiveInt
    """Sequences of one optimizer step."""
    micro_batch_size: PositiveInt
    """Sequences one rank computes at a time."""

    def __post_init__(self) -> None:
        if self.mix is None and self.source == "mix":
            raise ValueError(
                "source=mix with mix=null; list the parts, as in "
                "mix=[{name: web, path: web/, weight: 0.7}, {name: books, path: books/, ...}]"
            )
        if self.mix is not None and self.source != "mix":
            raise ValueError(
                f"source={self.source} with a mix of {len(self.mix)} parts; use data.source=mix, "
                "or data.mix=null"
            )
        if self.source == "chat" and self.packing != "domain":
            raise ValueError(
                f"packing={self.packing} would cut conversations of source=chat; use packing=domain"
            )
        if self.mix is not None:
            self._check_mix(self.mix)
        elif self.validation is not None:
            raise ValueError(f"validation={self.validation!r} names a part, and there is no mix")

    def _check_mix(self, mix: list[MixPart]) -> None:
        names = [part.name for part in mix]
        if not names or len(set(names)) != len(names) or not all(names):
            raise ValueError(f"mix has parts named {names}; it needs one or more, all different")
        if self.path is not None:
            raise ValueError(f"path={self.path!r} beside a mix, whose parts have paths; use null")
        if self.validation not in (None, *names):
            raise ValueError(f"validation={self.validation!r} is no part; use one of {names}")
        for part in mix:
            if part.source == "chat" and (part.packing or self.packing) != "domain":
                raise ValueError(
                    f"mix: part {part.name!r} of source=chat would be cut by packing="
                    f"{part.packing or self.packing}; give it packing: domain"
                )
