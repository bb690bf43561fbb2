"""Generation from a conversation: the template around the prompt, and the answer alone."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.evaluation import restored_model
from helpers.models import compose_tree

import trainer.generate
from conf.schema import GenerateConfig, build
from trainer.generate import stream_text


@pytest.mark.parametrize("chat", [False, True])
def test_the_chat_template_surrounds_the_prompt(
    chat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[bytes] = []

    def generate(model: Any, prompt: list[int], *_: Any) -> Iterator[int]:
        read.append(bytes(prompt))
        yield from (*b"Hello.", 256)

    restored = restored_model("+data.chat_template=chatml")
    monkeypatch.setattr(trainer.generate, "restore_model", lambda *_: restored)
    monkeypatch.setattr(trainer.generate, "generate", generate)
    tree = compose_tree("run=none", f"chat={chat}", "prompt=Hi", config_name="generate")
    text = "".join(stream_text(build(GenerateConfig, tree), torch.device("cpu")))
    expected = b"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert read == [expected if chat else b"Hi"]
    assert text == ("Hello." if chat else "HiHello.")
