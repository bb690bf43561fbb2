"""The causal language model: embedding, a loop over the layer list, norm and head."""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from conf.schema import AdaptersConfig, LayerConfig, ModelConfig, OpsConfig, SpikeConfig
from models.cache import MixerCache
from models.layers import FFN, HeadProjection, Projection, RMSNorm, SwiGLU, multiply
from models.lora import adapters_of, add_adapters
from models.mixers import Mixer
from models.moe import Experts, MoE
from models.spiking import set_loss_scale, set_spiking
from ops.cross_entropy import linear_cross_entropy, linear_distillation
from parallel.pipeline import ModelPart
from parallel.recompute import Recompute, run_recomputed
from parallel.sequence import SequenceContext

Entry = TypeVar("Entry")

WHOLE = ModelPart()
KEEP_ALL = Recompute()


class Embedding(nn.Module):
    """Look up token vectors in a given compute dtype."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.dtype = dtype

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.embedding(tokens, self.weight).to(self.dtype)


class SinkTokens(nn.Module):
    """Learned vectors before every document: they see each other, and every token sees them.

    They see no token, so that they are the same before all documents; one copy stands in the rows
    before a rank's tokens and serves them all.
    """

    def __init__(self, num_sinks: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_sinks, hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [1, S + T, E] from [1, T, E]."""
        return torch.cat([self.weight.to(x.dtype)[None], x], dim=1)


class Head(nn.Module):
    """The vocabulary projection and its loss, which never holds all logits."""

    def __init__(self, hidden_size: int, vocab_size: int, impl: str | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.impl = impl

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed loss and the number of labels that count."""
        weight = self.weight.to(x.dtype)
        loss_sum, num_valid = linear_cross_entropy(x, weight, labels, impl=self.impl)
        return loss_sum, num_valid

    def distill(
        self,
        x: torch.Tensor,
        labels: torch.Tensor,
        teacher: "Head",
        teacher_x: torch.Tensor,
        *,
        share: float,
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return loss, cross entropy, divergence and labels; see `linear_distillation`."""
        return linear_distillation(
            x,
            self.weight.to(x.dtype),
            teacher_x,
            teacher.weight.to(teacher_x.dtype),
            labels,
            share=share,
            temperature=temperature,
            impl="reference" if self.impl == "reference" else None,
        )

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return [..., vocab] logits."""
        return multiply(x, self.weight.to(x.dtype))


class ParallelMixers(nn.Module):
    """One mixer, or several on the same input whose normalised outputs are summed (eq. 6)."""

    def __init__(
        self, mixers: dict[str, Mixer], hidden_size: int, norm_eps: float, impl: str | None
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleDict(mixers)
        parallel = len(mixers) > 1
        self.kind = "parallel" if parallel else next(iter(mixers.values())).kind
        self.norms = nn.ModuleDict(
            {name: RMSNorm(hidden_size, norm_eps, impl) for name in mixers} if parallel else {}
        )

    def named_branches(self) -> Iterator[tuple[str, Mixer]]:
        for name, mixer in self.branches.items():
            assert isinstance(mixer, Mixer)
            yield name, mixer

    def reset_norms(self, std: float) -> None:
        """Let the branches begin as small as an embedding; at 1 they would drown it."""
        for norm in self.norms.values():
            assert isinstance(norm, RMSNorm)
            nn.init.constant_(norm.weight, std)

    def _sum(self, outs: dict[str, torch.Tensor]) -> torch.Tensor:
        if len(outs) == 1:
            return next(iter(outs.values()))
        return torch.stack([self.norms[name](out) for name, out in outs.items()]).sum(0)

    def forward(
        self,
        x: torch.Tensor,
        context: SequenceContext,
        cache: dict[str, MixerCache] | None = None,
    ) -> torch.Tensor:
        outs = {
            name: mixer(x, context.at(kind=mixer.kind), None if cache is None else cache[name])
            for name, mixer in self.named_branches()
        }
        return self._sum(outs)

    def decode(self, x: torch.Tensor, cache: dict[str, MixerCache], position: int) -> torch.Tensor:
        return self._sum(
            {name: m.decode(x, cache[name], position) for name, m in self.named_branches()}
        )


class Layer(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x))."""

    def __init__(
        self,
        layer: LayerConfig,
        config: ModelConfig,
        spike: SpikeConfig,
        ops: OpsConfig,
        part: ModelPart,
        recompute: Recompute,
    ) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.norm_eps
        mixers = {n: config.mixers[n].build(size, eps, spike, ops) for n in layer.mixers}
        self.mixer_norm = RMSNorm(size, eps, ops.rms_norm)
        self.mixer = ParallelMixers(mixers, size, eps, ops.rms_norm)
        self.ffn_norm = RMSNorm(size, eps, ops.rms_norm)
        ffn = config.ffns[layer.ffn]
        self.ffn: FFN = (
            MoE(ffn, size, spike, ops, part, recompute.inside_moe)
            if ffn.moe
            else SwiGLU(ffn, size, spike, ops)
        )
        self.recomputes_ffn = recompute.has_ffn(is_moe=ffn.moe is not None)

    def forward(
        self,
        x: torch.Tensor,
        context: SequenceContext,
        cache: dict[str, MixerCache] | None = None,
    ) -> torch.Tensor:
        return self.add_ffn(x, self.mixer(self.mixer_norm(x), context, cache), context)

    def add_ffn(
        self, x: torch.Tensor, mixed: torch.Tensor, context: SequenceContext
    ) -> torch.Tensor:
        """Return what leaves the layer, from what entered it and what the mixer made of that."""
        if self.recomputes_ffn:
            x = x + mixed
            return x + run_recomputed(lambda h: self.ffn(self.ffn_norm(h), context), x)
        normed, x = self.ffn_norm.add(mixed, x)
        return x + self.ffn(normed, context)

    def decode(self, x: torch.Tensor, cache: dict[str, MixerCache], position: int) -> torch.Tensor:
        mixed = self.mixer.decode(self.mixer_norm(x), cache, position)
        normed, x = self.ffn_norm.add(mixed, x)
        return x + self.ffn(normed)


class CausalLM(nn.Module):
    """A language model built from a layer list.

    Args:
        config: the architecture.
        spike: spiking of the inputs of every projection but the head.
        ops: pins of operator implementations.
        dtype: compute dtype; parameters are float32.
        recompute: what runs again in the backward pass.
        part: what of the model this is; names of parameters do not depend on it.
        adapters: low-rank adapters of projections.
    """

    def __init__(
        self,
        config: ModelConfig,
        spike: SpikeConfig,
        ops: OpsConfig,
        *,
        dtype: torch.dtype = torch.float32,
        recompute: Recompute = KEEP_ALL,
        part: ModelPart = WHOLE,
        adapters: AdaptersConfig | None = None,
    ) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.recompute, self.part = recompute, part
        size, is_tied = config.hidden_size, config.tie_embeddings
        layers = layer_list(config)
        if part.has_embedding or (is_tied and part.has_head):
            self.embed = Embedding(config.vocab_size, size, dtype)
        has_sinks = part.has_embedding and config.num_sinks
        self.sinks = SinkTokens(config.num_sinks, size) if has_sinks else None
        self.layers = nn.ModuleDict(
            {
                str(i): Layer(layers[i], config, spike, ops, part, recompute)
                for i in part.layers or range(len(layers))
            }
        )
        if part.has_head:
            self.norm = RMSNorm(size, config.norm_eps, ops.rms_norm)
            self.head = Head(size, config.vocab_size, ops.cross_entropy)
            if is_tied:
                self.head.weight = self.embed.weight
        if adapters is not None:
            add_adapters(self, adapters, is_whole=part == WHOLE)
        self.has_rate_loss = spike.rate_weight > 0
        set_spiking(self, spike, num_sinks=config.num_sinks, is_whole=part == WHOLE)

    @property
    def tied(self) -> nn.Parameter | None:
        """The embedding that another part of the model has as well."""
        is_shared = self.config.tie_embeddings and self.part.has_embedding != self.part.has_head
        return self.embed.weight if is_shared else None

    def named_layers(self) -> Iterator[tuple[str, Layer]]:
        """Yield the layers that are here by name, as in layers.0."""
        for name, layer in self.layers.items():
            assert isinstance(layer, Layer)
            yield f"layers.{name}", layer

    def forward(
        self, tokens: torch.Tensor, labels: torch.Tensor, context: SequenceContext
    ) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
        """Return the summed loss in nats (float32) and the number of labels that count (int64).

        A part without the head returns hidden states [1, S + T, E].

        Args:
            tokens: int64 [1, T], this rank's tokens of packed documents, or the hidden states of
                the part before this one.
            labels: int64 [1, T], the token that follows each, -100 where none.
        """
        if not self.part.has_head:
            return self._run(tokens, context)
        loss_sum, num_valid = self.head(self.hidden(tokens, context), labels)
        return loss_sum, num_valid

    def hidden(self, tokens: torch.Tensor, context: SequenceContext) -> torch.Tensor:
        """Return what the head reads of the tokens of packed documents, [1, T, E] from [1, T]."""
        hidden: torch.Tensor = self.norm(self._run(tokens, context)[:, self.config.num_sinks :])
        return hidden

    def _run(self, tokens: torch.Tensor, context: SequenceContext) -> torch.Tensor:
        """Return the rows [1, S + T, E] that leave the last layer that is here."""
        x, context = self.begin(tokens, context)
        if self.has_rate_loss:
            set_loss_scale(self, context.aux_loss_scale)
        for name, layer in self.named_layers():
            here = context.at(layer=name)
            if self.recompute.layers == "full":
                here = here.remembering()
                x = run_recomputed(layer, x, here, memory=here.memory)
            else:
                x = layer(x, here)
        return x

    def begin(
        self, tokens: torch.Tensor, context: SequenceContext
    ) -> tuple[torch.Tensor, SequenceContext]:
        """Return the rows of the sinks and of the tokens, and the context that knows of them."""
        x = self.embed(tokens) if self.part.has_embedding else tokens
        if not self.config.num_sinks:
            return x, context
        context = dataclasses.replace(context, num_sinks=self.config.num_sinks)
        return x if self.sinks is None else self.sinks(x), context

    def prepare_inference(self) -> None:
        """Round the matrices to the compute dtype, once and for all instead of at every token.

        What comes out stays the same bit for bit; the model cannot be trained any more.
        """
        kinds = Projection | HeadProjection | Embedding | Head | Experts
        for module in self.modules():
            if isinstance(module, kinds) and getattr(module, "adapter", None) is None:
                for weight in module.parameters(recurse=False):
                    if weight.dim() > 1:
                        weight.data = weight.data.to(self.embed.dtype)
        self.requires_grad_(False)

    def new_cache(self) -> list[dict[str, MixerCache]]:
        """Return an empty decoding cache: per layer, one entry per mixer."""
        return [
            {name: mixer.new_cache() for name, mixer in layer.mixer.named_branches()}
            for _, layer in self.named_layers()
        ]

    def prefill(
        self, tokens: torch.Tensor, context: SequenceContext, cache: list[dict[str, MixerCache]]
    ) -> torch.Tensor:
        """Read a prompt [1, T] into an empty cache; return the last token's logits [1, vocab]."""
        x, context = self.begin(tokens, context)
        for (_, layer), entry in zip(self.named_layers(), cache, strict=True):
            x = layer(x, context, entry)
        return self.head.logits(self.norm(x[:, -1]))

    def decode(
        self, token: torch.Tensor, cache: list[dict[str, MixerCache]], position: int
    ) -> torch.Tensor:
        """Return the logits [B, vocab] that follow `token` [B, 1] at `position`.

        Raises:
            ValueError: there are sinks and no prompt, with which they enter the cache.
        """
        if self.config.num_sinks and position == 0:
            raise ValueError(
                f"position=0 finds no sinks in the cache (model.num_sinks={self.config.num_sinks});"
                " give the first token to prefill"
            )
        x = self.embed(token)
        for (_, layer), entry in zip(self.named_layers(), cache, strict=True):
            x = layer.decode(x, entry, self.config.num_sinks + position)
        return self.head.logits(self.norm(x[:, -1]))

    def reset_parameters(self, seed: int) -> None:
        """Draw initial weights; they depend on the seed and on names alone."""
        std = self.config.init_std
        out_std = std / (2 * self.config.num_layers) ** 0.5
        for name, module in self.named_children():
            is_tied = isinstance(module, Head) and self.config.tie_embeddings
            if isinstance(module, Embedding | SinkTokens | Head) and not is_tied:
                with seeded(seed, name):
                    nn.init.normal_(module.weight, std=std)
        for module in self.modules():
            if isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        for name, layer in self.named_layers():
            layer.mixer.reset_norms(std)
            with seeded(seed, name):
                for _, mixer in layer.mixer.named_branches():
                    mixer.reset(std, out_std)
                layer.ffn.reset(std, out_std)
        self.reset_adapters(seed)

    def reset_adapters(self, seed: int) -> None:
        """Draw adapters that add nothing yet; they depend on the seed and on names alone."""
        for name, _, adapter in adapters_of(self):
            with seeded(seed, f"{name}.adapter"):
                adapter.reset()


@contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Draw inside from a stream of random numbers of this name's own."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[:6]))
        yield


def layer_list(config: ModelConfig) -> list[LayerConfig]:
    """Return the `num_layers` layers: the configured list, repeated in order."""
    return [config.layers[i % len(config.layers)] for i in range(config.num_layers)]


def shortest_period(layers: Sequence[Entry]) -> list[Entry]:
    """Return the shortest list that gives these layers when it is repeated, see `layer_list`."""
    n = len(layers)
    lengths = (m for m in range(1, n + 1) if all(layers[i] == layers[i % m] for i in range(n)))
    return list(layers[: next(lengths, n)])
