"""What is trained on, and how it is cut into sequences."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from conf.schema.base import STRICT, PositiveInt


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    source: Literal["stdlib", "text"]
    path: str | list[str] | None
    """Files, folders or globs, local or fsspec URLs (text)."""
    format: Literal["txt", "jsonl", "parquet"] | None
    """null: by file ending."""
    text_key: str
    """Field that holds the text of a jsonl or parquet record."""
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
