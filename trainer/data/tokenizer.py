"""Tokenizers: bytes, or a Hugging Face tokenizer read from local files.

Nothing is downloaded and no code of a tokenizer's folder runs: `tokenizers` reads tokenizer.json.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers

_KNOWN_EOS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")
_WINDOW = 16
_TAIL = 4


class Tokenizer(Protocol):
    """What data and generation need of a tokenizer."""

    vocab_size: int
    """Number of token ids, the end-of-document token included."""
    eos_id: int
    """Token that ends a document; `encode` does not add it."""
    fingerprint: str
    """Equal for two tokenizers only if they give the same tokens."""

    def encode(self, text: str) -> np.ndarray:
        """Return the int64 token ids of a text."""

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the int64 token ids of each text."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; special tokens leave no trace."""


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of UTF-8, 256 ends a document."""

    vocab_size = 257
    eos_id = 256
    fingerprint = "bytes"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(errors="replace"), np.uint8).astype(np.int64)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) for i in ids if i < 256).decode(errors="replace")


class HFTokenizer:
    """A tokenizer.json, without the truncation, padding and added tokens it may ask for."""

    def __init__(self, file: Path) -> None:
        """Read `file`; the name of its end-of-document token stands in the files beside it."""
        content = file.read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # The library raises bare Exception for every broken file.
            raise ValueError(
                f"data.tokenizer: {file} is no tokenizer.json ({error}); save the tokenizer again "
                "with save_pretrained or Tokenizer.save"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Ids may have holes, so that the number of entries is too small a vocabulary.
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.eos_id = self._find_eos(file)
        self.fingerprint = f"{hashlib.sha256(content).hexdigest()}-{self.eos_id}"

    def _find_eos(self, file: Path) -> int:
        token = _configured_eos(file.parent)
        if token is None:
            known = [name for name in _KNOWN_EOS if self._tokenizer.token_to_id(name) is not None]
            token = known[0] if len(known) == 1 else None
        eos_id = None if token is None else self._tokenizer.token_to_id(token)
        if eos_id is None:
            found = "names none" if token is None else f"names {token!r}, which it does not know"
            raise ValueError(
                f"data.tokenizer={str(file)!r} needs an end-of-document token and {found}; put "
                '{"eos_token": "<a token of its vocabulary>"} into tokenizer_config.json beside it'
            )
        return int(eos_id)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int64) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True))


class TextStream:
    """Text of tokens that come one by one; a character appears when all its bytes are there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._num_shown = 0  # characters of the text of `_ids` that were returned

    def push(self, token_id: int) -> str:
        """Add a token and return the text that is certain by now, often empty."""
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids)
        # An unfinished character decodes to replacement characters at the end.
        new = text.rstrip("\ufffd")[self._num_shown :]
        self._num_shown += len(new)
        if len(self._ids) >= _WINDOW and self._num_shown == len(text):
            self._forget(text)
        return new

    def finish(self) -> str:
        """Return what was held back, unfinished characters replaced, and start anew."""
        rest = self._tokenizer.decode(self._ids)[self._num_shown :]
        self._ids, self._num_shown = [], 0
        return rest

    def _forget(self, text: str) -> None:
        # Some tokens stay as context: many tokenizers drop a space before the first one. They
        # must decode alone to what they are in `text`, that is, not begin inside a character.
        tail = self._tokenizer.decode(self._ids[-_TAIL:])
        if "\ufffd" not in tail and text.endswith(tail):
            self._ids, self._num_shown = self._ids[-_TAIL:], len(tail)


def load_tokenizer(name: str) -> Tokenizer:
    """Load `bytes`, a tokenizer.json or a folder that holds one; ValueError if it cannot."""
    file = find_tokenizer_file(name)
    return ByteTokenizer() if file is None else HFTokenizer(file)


def find_tokenizer_file(name: str) -> Path | None:
    """Return the tokenizer.json that `name` stands for, None for bytes; ValueError if missing."""
    if name == "bytes":
        return None
    path = Path(name).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"data.tokenizer={name!r}: there is no file {str(file)!r}; use bytes, or a local "
            "folder with a tokenizer.json (nothing is downloaded)"
        )
    return file


def _configured_eos(folder: Path) -> str | None:
    for file in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        try:
            config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except ValueError as error:
            raise ValueError(f"data.tokenizer: {file} is no JSON ({error}); repair it") from error
        token = config.get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token:
            return str(token)
    return None
