"""Tokenizers: bytes, or a Hugging Face tokenizer read from local files.

Nothing is downloaded and no code of a tokenizer's folder runs: `tokenizers` reads tokenizer.json.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import tokenizers

_KNOWN_EOS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")
_WINDOW = 16
_TAIL = 4


class Encoded(NamedTuple):
    """A document as tokens."""

    ids: np.ndarray
    """int64 [num_tokens], the last one ends the document; empty: there is nothing to learn."""
    is_learned: np.ndarray | None
    """bool [num_tokens]: which are to be predicted; None: all, but for the first."""
    num_bytes: int
    """UTF-8 bytes of the text that is to be predicted."""


class Tokenizer(Protocol):
    """What data and generation need of a tokenizer."""

    vocab_size: int
    """Number of token ids, the end-of-document token included."""
    eos_id: int
    """Token that ends a document; `encode` does not add it."""
    fingerprint: str
    """Equal for two tokenizers only if they give the same tokens."""
    special_tokens: tuple[str, ...]
    """Tokens that stand for no text."""

    def encode(self, text: str) -> np.ndarray:
        """Return the int64 token ids of a text."""

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the int64 token ids of each text."""

    def encode_with_begins(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the int64 token ids of a text, and the character that each begins at or in."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; special tokens leave no trace."""


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of UTF-8, 256 ends a document."""

    vocab_size = 257
    eos_id = 256
    fingerprint = "bytes"
    special_tokens: tuple[str, ...] = ()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(errors="replace"), np.uint8).astype(np.int64)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def encode_with_begins(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        widths = [len(character.encode(errors="replace")) for character in text]
        return self.encode(text), np.repeat(np.arange(len(text)), widths)

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
        added = self._tokenizer.get_added_tokens_decoder().values()
        self.special_tokens = tuple(token.content for token in added if token.special)
        self.fingerprint = f"{hashlib.sha256(content).hexdigest()}-{self.eos_id}"

    def _find_eos(self, file: Path) -> int:
        token = configured_tokens(file.parent).get("eos_token")
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

    def encode_with_begins(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        begins = [begin for begin, _ in encoding.offsets]
        return np.array(encoding.ids, np.int64), np.array(begins, np.int64)

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


def configured_tokens(folder: Path) -> dict[str, str]:
    """Return the special tokens that the files beside a tokenizer.json name, as eos_token."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, token in read_json(folder / name).items():
            token = token.get("content") if isinstance(token, dict) else token
            if key.endswith("_token") and isinstance(token, str) and token:
                found[key] = token
    return found


def read_json(file: Path) -> dict[str, Any]:
    """Return what a JSON file of a tokenizer's folder holds; nothing if it is not there."""
    try:
        tree = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"data.tokenizer: {file} is no JSON ({error}); repair it") from error
    return tree if isinstance(tree, dict) else {}


class TextEncoder:
    """Turns texts into tokens, all of which are learned."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.fingerprint = tokenizer.fingerprint

    def encode_batch(self, documents: list[str]) -> list[Encoded]:
        """Return the tokens of each text; empty where the tokenizer leaves nothing of it."""
        eos_id = self.tokenizer.eos_id
        return [
            Encoded(np.append(ids, eos_id) if len(ids) else ids, None, len(text.encode()))
            for text, ids in zip(documents, self.tokenizer.encode_batch(documents), strict=True)
        ]
