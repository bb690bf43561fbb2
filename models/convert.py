"""The parameters of a model from those of another: conversions make what is new in a layer, all
else is copied. MoE upcycling follows eq. 15-18 of arXiv:2509.05276.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal, Protocol

import torch

from conf.schema import ModelConfig, MoEConfig
from models.causal_lm import CausalLM, Layer, layer_list, seeded
from models.layers import SwiGLU
from models.moe import MoE

ROTARY = ("rope_theta", "rope_scaling")
"""Settings that all softmax attention of a converted layer shares with that before."""


@dataclass(frozen=True)
class Recipe:
    """How a tensor of the new model is made.

    Attributes:
        make: from the tensors of the old model that `sources` names, in this order.
        copies: the result is repeated so often in a new first dimension; None: it stays as it is.
        is_new: its parameters are none of the old model's, even if those decide where they begin.
    """

    sources: tuple[str, ...]
    make: Callable[..., torch.Tensor]
    copies: int | None = None
    is_new: bool = False

    @property
    def origin(self) -> Literal["copied", "transformed", "new"]:
        """Where the tensor comes from."""
        if self.is_new:
            return "new"
        return "copied" if self.make is _same and self.copies is None else "transformed"


class Conversion(Protocol):
    """Knows how a part of a model becomes one of another kind."""

    def recipes(self, old: CausalLM, new: CausalLM) -> dict[str, Recipe]:
        """Return the recipes of what it makes, by the names of the new model.

        There are none where it does not apply. The models are on the meta device.
        """


@dataclass(frozen=True)
class Upcycling:
    """A dense FFN becomes a mixture of experts that are copies of it.

    All experts, S shared and N routed, have the dense projections times alpha = (S + share)^(-1/3),
    see `upcycling_scale`. With g = W_gate x, u = W_up x, s the logistic function and P the sum of
    the weights of a token's experts, the dense FFN gives f = W_down (g s(g) u). As long as no token
    is dropped, the mixture gives

        y = (S + P) / (S + share) W_down (g s(alpha g) u)

    exactly: W_down, W_up and the first factor of silu(g) = g s(g) are linear and yield alpha^3, but
    the logistic function is not scaled. With c = max z^2 s'(z) = 0.4393 the integral of g^2 s'(t g)
    over t from alpha to 1 shows |g s(alpha g) - g s(g)| <= c |1/alpha - 1| for every g. Therefore,
    channel by channel,

        |y - f| <= |P - share| / (S + share) |f|
                   + (S + P) / (S + share) c |1/alpha - 1| |W_down| |u|.

    The second part is small: c |1/alpha - 1| = 0.0090 for S, k, N = 1, 1, 16. The first one is the
    router's: a softmax over logits within -d and d gives |P - share| <= (exp(2 d) - 1) share, so a
    router drawn small keeps it small and chooses as randomly as any.

    Attributes:
        router_std: standard deviation of the router's weights.
        seed: with the name of the layer, decides the router's weights.
    """

    router_std: float
    seed: int

    def recipes(self, old: CausalLM, new: CausalLM) -> dict[str, Recipe]:
        """See `Conversion`."""
        layers, made = dict(old.named_layers()), dict[str, Recipe]()
        for name, layer in new.named_layers():
            if name in layers:
                made |= self._upcycle(name, layers[name], layer)
        return made

    def _upcycle(self, name: str, old: Layer, new: Layer) -> dict[str, Recipe]:
        if not isinstance(old.ffn, SwiGLU) or not isinstance(new.ffn, MoE):
            return {}
        config, ffn = new.ffn.config, f"{name}.ffn"
        num_experts, num_shared = config.num_experts, config.num_shared_experts
        scale = upcycling_scale(config)
        draw = partial(self._draw_router, ffn, new.ffn.router.weight.shape)
        made = {
            f"{ffn}.router.weight": Recipe((), draw, is_new=True),
            f"{ffn}.router.load": Recipe((), partial(torch.full, (num_experts,), 1 / num_experts)),
            f"{ffn}.router.bias": Recipe((), partial(torch.zeros, num_experts)),
        }
        for projection in ("gate_proj", "up_proj", "down_proj"):
            source = (f"{ffn}.{projection}.weight",)
            one = partial(_tile, scale, (1, 1))
            made[f"{ffn}.experts.{projection}"] = Recipe(source, one, num_experts)
            if num_shared:
                # They are one SwiGLU, of whose inner channels each is a part.
                tiles = (1, num_shared) if projection == "down_proj" else (num_shared, 1)
                shared = partial(_tile, scale, tiles)
                made[f"{ffn}.shared.{projection}.weight"] = Recipe(source, shared)
        return made

    def _draw_router(self, name: str, shape: torch.Size) -> torch.Tensor:
        with seeded(self.seed, f"{name}.router"):
            return torch.randn(shape) * self.router_std


def upcycling_scale(config: MoEConfig) -> float:
    """Return alpha = (S + share)^(-1/3), by which each projection of an expert is scaled.

    `share` is what the weights of a token's k experts sum to if the router prefers none of N: 1 if
    they are normalised, k/N for softmax scores (eq. 18), k/2 for sigmoid scores.
    """
    share = config.top_k / (config.num_experts if config.score == "softmax" else 2)
    return float((config.num_shared_experts + (1 if config.normalize else share)) ** (-1 / 3))


def copy_of(name: str) -> Recipe:
    """Return the recipe of a tensor that is another one as it is."""
    return Recipe((name,), _same)


def plan_conversion(
    old: CausalLM,
    new: CausalLM,
    conversions: Sequence[Conversion],
    *,
    changes_settings: bool = False,
) -> dict[str, Recipe]:
    """Return the recipe of every parameter and buffer of `new`.

    What no conversion makes is copied, and must be the same in both models. Only shapes are looked
    at: build the models on the meta device.

    Args:
        changes_settings: settings of mixers that no weight shows, such as a window's size, may be
            others than they were.

    Raises:
        ValueError: names, shapes or settings that do not match, all of them.
    """
    given, wanted = _tensors(old), _tensors(new)
    made = dict[str, Recipe]()
    for conversion in conversions:
        made |= conversion.recipes(old, new)
    used = {source for recipe in made.values() for source in recipe.sources}
    recipes = {
        name: made[name] if name in made else copy_of(name)
        for name in wanted
        if name in made or name in given
    }
    problems = [f"missing: {name}" for name in wanted if name not in recipes]
    problems += [f"unexpected: {name}" for name in given if name not in wanted.keys() | used]
    for name, recipe in recipes.items():
        shape = _shape(recipe, given)
        if shape != wanted[name].shape:
            problems.append(f"shape: {name} would be {list(shape)}, not {list(wanted[name].shape)}")
    if old.config.norm_eps != new.config.norm_eps:
        problems.append(f"norm_eps: {new.config.norm_eps} was {old.config.norm_eps}")
    problems += [] if changes_settings else _changed_settings(old.config, new.config)
    if problems:
        raise ValueError(
            "model differs from the source's by more than attention that becomes other mixers and "
            "dense FFNs that become mixtures of experts of their width; let it be the same in:\n  "
            + "\n  ".join(problems)
        )
    return recipes


def _tensors(model: CausalLM) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _tile(scale: float, tiles: tuple[int, int], weight: torch.Tensor) -> torch.Tensor:
    return (scale * weight).repeat(tiles)


def _shape(recipe: Recipe, given: dict[str, torch.Tensor]) -> torch.Size:
    with torch.no_grad():
        shape = recipe.make(*(given[name] for name in recipe.sources)).shape
    return shape if recipe.copies is None else torch.Size([recipe.copies, *shape])


def _changed_settings(old: ModelConfig, new: ModelConfig) -> list[str]:
    """Return the settings of mixers that no weight shows and that differ."""
    changed = dict[str, None]()
    for before, after in zip(layer_list(old), layer_list(new), strict=False):
        for name in after.mixers:
            source = name if name in before.mixers else before.mixers[0]
            was, is_now = (asdict(c.mixers[n]) for c, n in ((old, source), (new, name)))
            keys = was.keys() | is_now.keys() if source == name else ROTARY
            if type(old.mixers[source]) is not type(new.mixers[name]):
                continue  # other mixers have other settings
            for key in sorted(keys):
                if was.get(key) != is_now.get(key):
                    changed[f"mixers.{name}.{key}: {is_now.get(key)} was {was.get(key)}"] = None
    return list(changed)
