"""Attention becomes other mixers: its projections go into every branch unchanged (section 3.1 of
arXiv:2509.05276), what attention does not have begins so that the layer still does sensibly.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from conf.schema import ModelConfig, OpsConfig, SpikeConfig
from models.causal_lm import CausalLM, Layer, ParallelMixers, seeded
from models.convert import Recipe, copy_of
from models.layers import RMSNorm
from models.mixers import Mixer
from models.mixers.softmax_attention import SoftmaxAttention
from parallel.layout import build_layout
from parallel.pipeline import ModelPart
from parallel.sequence import SequenceContext

MEASURED_TOKENS = 256
LINEAR_SHARE = 0.1


@dataclass(frozen=True)
class Scale:
    """Root mean square of what leaves the heads of a layer's attention, and the attention."""

    heads: float
    out: float


@dataclass(frozen=True)
class Remapping:
    """A layer of one softmax attention gets other mixers, alone or in parallel.

    Every branch has the tensors of the attention under their names: q, k, v and o, biases, norms of
    q and k. New ones begin as follows.

    * Gates: their last matrix at 0 and its bias as the mixer's config says (`half_life`; output
      gates open), the one before it random, so that gradients reach it. A state then forgets alike
      whatever the token, until training tells tokens apart.
    * Feature maps: the identity.
    * Norms of a head or of a branch: they make of whatever comes a vector of root mean square 1,
      while the residual stream and all that follows expect what the attention gave: `scales`, from
      0.1 to 8.5 over the layers of SmolLM2-135M. Of branches in parallel those with softmax
      attention share this scale, for what they give is what the attention gave where it looked not
      too far back; the others, which give something else before training, add LINEAR_SHARE of it
      each: enough for gradients to reach them. Where there is no softmax attention they share it.
    * Sinks: random, as large as embeddings of tokens, or the embedding of a token. A pretrained
      attention rests on the first tokens of a document (arXiv:2309.17453), which a window no longer
      sees; one sink that begins as the end-of-document token takes their place.

    Attributes:
        std: standard deviation of random weights.
        seed: with the name of the layer and of the branch, decides them.
        scales: of the layers by name, see `measure_scales`; 1 where there is none.
        sink_token: whose embedding new sinks begin as; None: random.
    """

    std: float
    seed: int
    scales: Mapping[str, Scale] = field(default_factory=dict)
    sink_token: int | None = None

    def recipes(self, old: CausalLM, new: CausalLM) -> dict[str, Recipe]:
        """See `models.convert.Conversion`."""
        layers, made = dict(old.named_layers()), dict[str, Recipe]()
        for name, layer in new.named_layers():
            if name in layers:
                made |= self._remap(name, layers[name], layer)
        if new.sinks is not None and old.sinks is None:
            draw = partial(self._draw_sinks, new.sinks.weight.shape)
            made["sinks.weight"] = Recipe(("embed.weight",), draw, is_new=True)
        return made

    def _draw_sinks(self, shape: torch.Size, embedding: torch.Tensor) -> torch.Tensor:
        if self.sink_token is not None:
            return embedding[self.sink_token].expand(shape).clone()
        with seeded(self.seed, "sinks"):
            return torch.randn(shape).to(embedding) * embedding.std()

    def _remap(self, name: str, old: Layer, new: Layer) -> dict[str, Recipe]:
        """Return the recipes of a layer's mixers; none where they stay or are not of attention."""
        branches = dict(old.mixer.named_branches())
        first, attention = next(iter(branches.items()))
        is_same = {n: type(m) for n, m in branches.items()} == {
            n: type(m) for n, m in new.mixer.named_branches()
        }
        if is_same or len(branches) > 1 or not isinstance(attention, SoftmaxAttention):
            return {}
        given, prefix = dict(attention.named_parameters()), f"{name}.mixer"
        scale = self.scales.get(name, Scale(1.0, 1.0))
        made = dict[str, Recipe]()
        for branch, mixer in new.mixer.named_branches():
            path = f"{prefix}.branches.{branch}"
            keys = [key for key, _ in mixer.named_parameters()]
            made |= {
                f"{path}.{key}": copy_of(f"{prefix}.branches.{first}.{key}")
                for key in keys
                if key in given
            }
            keys = [key for key in keys if key not in given]
            draw = partial(_draw, mixer, path, keys, self.std, self.seed)
            for key in keys:
                make = partial(draw, key)
                if key == "g_norm.weight":
                    make = partial(torch.full, mixer.get_parameter(key).shape, scale.heads)
                made[f"{path}.{key}"] = Recipe((), make, is_new=True)
        for branch, share in _shares(new.mixer).items():
            shape = new.mixer.norms[branch].weight.shape
            make = partial(torch.full, shape, share * scale.out)
            made[f"{prefix}.norms.{branch}.weight"] = Recipe((), make, is_new=True)
        return made


def measure_scales(
    config: ModelConfig, ops: OpsConfig, get: Callable[[str], torch.Tensor], seed: int
) -> dict[str, Scale]:
    """Return the scales of a model's attention over random tokens, layer by layer.

    Text would give about the same (in SmolLM2-135M 0.6 to 2 times as much), but is not needed. One
    layer is in memory at a time.

    Args:
        get: reads a tensor of the model by name.
        seed: decides the tokens.
    """
    with seeded(seed, "scales"):
        x = torch.randint(config.vocab_size, (1, MEASURED_TOKENS))
    cu_seqlens = torch.tensor([0, MEASURED_TOKENS], dtype=torch.int32)
    context, scales = SequenceContext(build_layout(cu_seqlens), ops), dict[str, Scale]()
    for i in range(config.num_layers):
        part = ModelPart(range(i, i + 1), has_embedding=i == 0, has_head=False)
        model = CausalLM(config, SpikeConfig(enabled=False, k=3.0), ops, part=part).eval()
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                tensor.copy_(get(name))
            seen = _watch(model)
            x = model(x, x, context)
        scales[f"layers.{i}"] = seen[0]
    return scales


def needs_scales(recipes: Mapping[str, Recipe]) -> bool:
    """Return whether some of the recipes of `Remapping` depend on its scales."""
    return any(
        recipe.is_new and (name.endswith("g_norm.weight") or ".mixer.norms." in name)
        for name, recipe in recipes.items()
    )


def _watch(model: CausalLM) -> list[Scale]:
    """Return a list that gets the scales of each mixer when the model runs."""
    seen = list[Scale]()

    def see(module: nn.Module, args: tuple[torch.Tensor], out: torch.Tensor) -> None:
        seen.append(Scale(*(float(x.square().mean().sqrt()) for x in (args[0], out))))

    for _, layer in model.named_layers():
        for _, mixer in layer.mixer.named_branches():
            mixer.get_submodule("o_proj").register_forward_hook(see)
    return seen


def _shares(mixer: ParallelMixers) -> dict[str, float]:
    """Return how much of the attention's scale each of several branches begins with."""
    softmax = [n for n, m in mixer.named_branches() if isinstance(m, SoftmaxAttention)]
    return {
        name: 1 / len(softmax or mixer.norms) if name in softmax or not softmax else LINEAR_SHARE
        for name in mixer.norms
    }


def _draw(mixer: Mixer, path: str, new: list[str], std: float, seed: int, key: str) -> torch.Tensor:
    """Return the tensor `key` of those of a mixer that are new; the mixer is on the meta device."""
    fresh = copy.deepcopy(mixer)
    for name in new:
        module = fresh.get_submodule(name.rpartition(".")[0])
        begin = 1.0 if isinstance(module, RMSNorm) else torch.nan
        parameter = torch.full(fresh.get_parameter(name).shape, begin)
        setattr(module, name.rpartition(".")[2], nn.Parameter(parameter))
    with seeded(seed, path):
        fresh.reset_additions(std, 0.0)
    made = fresh.get_parameter(key).detach()
    assert not made.isnan().any(), f"{type(mixer).__name__}.reset_additions leaves out {key}"
    return made
