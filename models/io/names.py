"""Names of parameters: ours, those of Transformers, and those of the official SpikingBrain code."""

import re
from collections.abc import Iterable
from typing import NamedTuple

_LAYER = re.compile(r"layers\.(\d+)\.(mixer_norm|ffn_norm|ffn|mixer)\.(?:branches\.\w+\.)?(.+)")


class Naming(NamedTuple):
    """Their names for our embedding, and for the parts of a layer."""

    embed: str
    mixer_norm: str
    mixer: str
    ffn_norm: str
    ffn: str

    def translate(self, names: Iterable[str]) -> dict[str, str]:
        """Return their names by ours, of a model with one mixer per layer."""
        return {name: self._translate(name) for name in names}

    def _translate(self, name: str) -> str:
        if match := _LAYER.fullmatch(name):
            number, part, rest = match.groups()
            return f"model.layers.{number}.{getattr(self, part)}.{rest}"
        module, _, rest = name.partition(".")
        return {"embed": self.embed, "norm": "model.norm", "head": "lm_head"}[module] + "." + rest


TRANSFORMERS = Naming(
    embed="model.embed_tokens",
    mixer_norm="input_layernorm",
    mixer="self_attn",
    ffn_norm="post_attention_layernorm",
    ffn="mlp",
)
GLA_SWA = Naming(
    embed="model.embeddings", mixer_norm="attn_norm", mixer="attn", ffn_norm="mlp_norm", ffn="mlp"
)
