"""Stream text from a checkpoint, one token at a time, with a cache."""

import logging
import time
from collections.abc import Iterator

import torch

from conf.schema import GenerateConfig
from models.causal_lm import CausalLM
from parallel.comm import Comm
from parallel.layout import build_layout
from parallel.mesh import Mesh
from parallel.sequence import SequenceContext
from trainer.data import TextStream, load_tokenizer
from trainer.data.chat import ChatEncoder
from trainer.restore import restore_model

logger = logging.getLogger(__name__)


def stream_text(config: GenerateConfig, device: torch.device) -> Iterator[str]:
    """Yield the prompt, then text as it is generated.

    Raises:
        ValueError: no sound checkpoint, or an empty prompt.
    """
    run, model, checkpoint = restore_model(config.run, device)
    model.prepare_inference()
    tokenizer = load_tokenizer(run.data.tokenizer)
    given = config.prompt
    if config.chat and given:
        chat = ChatEncoder(tokenizer, run.data.tokenizer, run.data.chat_template)
        given = chat.prompt([{"role": "user", "content": given}])
    prompt = [int(i) for i in tokenizer.encode(given)]
    if not prompt:
        raise ValueError("prompt='' has no token; give at least one character")
    logger.info("generating from %s", checkpoint)
    text = TextStream(tokenizer)
    if not config.chat:
        yield config.prompt
    start = time.perf_counter()
    tokens = generate(model, prompt, config, SequenceContext(
        build_layout(torch.tensor([0, len(prompt)], dtype=torch.int32)),
        run.ops,
        Comm(Mesh(0, 1, 0, device)),
    ), tokenizer.vocab_size)  # fmt: skip
    for n, token in enumerate(tokens, 1):
        if token == tokenizer.eos_id and config.stop_at_end:
            break
        yield text.push(token)
        if config.time_every and n % config.time_every == 0:
            now = time.perf_counter()
            logger.info("token %d: %.3f ms per token", n, (now - start) / config.time_every * 1e3)
            start = now
    yield text.finish()


@torch.inference_mode()
def generate(
    model: CausalLM,
    prompt: list[int],
    config: GenerateConfig,
    context: SequenceContext,
    vocab_size: int,
) -> Iterator[int]:
    """Yield `config.max_new_tokens` tokens that follow `prompt`.

    Args:
        context: of one document as long as the prompt.
        vocab_size: tokens of the tokenizer; the padding of the head beyond them is never drawn.
    """
    device = context.comm.mesh.device
    generator = torch.Generator(device).manual_seed(config.seed)
    cache = model.new_cache()
    logits = model.prefill(torch.tensor([prompt], device=device), context, cache)
    for position in range(len(prompt), len(prompt) + config.max_new_tokens):
        token = _pick(logits[0, :vocab_size].float(), config, generator)
        yield int(token)
        logits = model.decode(token.view(1, 1), cache, position)


def _pick(logits: torch.Tensor, config: GenerateConfig, generator: torch.Generator) -> torch.Tensor:
    """Draw one token from [vocab] logits."""
    if config.temperature == 0:
        return logits.argmax()
    if 0 < config.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(config.top_k).values[-1], -torch.inf)
    probabilities = (logits / config.temperature).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator)
