"""The spike path of one token through one projection: input, counts, trains, integer products."""

from dataclasses import dataclass
from io import StringIO

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from conf.schema import InspectConfig
from models.causal_lm import CausalLM
from models.layers import Projection
from models.quantize import IntegerProjection, quantize_weight
from models.spiking import Activation, SpikeEncoder, Spikes
from ops.int8_linear import int8_linear
from ops.spike import encode, spike_matmul, spike_statistics, step_weights
from ops.spike import spike_histogram as count_sizes
from ops.spike.coding import CODINGS
from parallel.comm import Comm
from parallel.layout import build_layout
from parallel.mesh import Mesh
from parallel.sequence import SequenceContext
from trainer.data import load_tokenizer
from trainer.restore import restore_model

SHOWN_STEPS = 16
"""Steps of a train that are shown."""
SIGNS = {-1: "-", 0: ".", 1: "+"}


@dataclass(frozen=True)
class Inspection:
    """One token at the input of one projection.

    Attributes:
        title: what is looked at.
        x: [in] input, float32.
        count: [in] int64.
        threshold: what a count of 1 stands for.
        trains: by coding, those of counts above 0 and below 0 (codings without a sign), or one;
            each [steps, in] int8.
        from_counts: [out] int32, INT8 weights times counts.
        from_trains: by coding, [out] int64, sum over the steps of their weight times INT8 weights
            times spikes.
        output: [out] float32, the product with its scales.
        dense: [out] float32, float weights times the input itself.
    """

    title: str
    x: torch.Tensor
    count: torch.Tensor
    threshold: float
    trains: dict[str, list[torch.Tensor]]
    from_counts: torch.Tensor
    from_trains: dict[str, torch.Tensor]
    output: torch.Tensor
    dense: torch.Tensor

    @property
    def is_exact(self) -> bool:
        """Whether all trains give the product of the counts, bit for bit."""
        expected = self.from_counts.long()
        return all(torch.equal(found, expected) for found in self.from_trains.values())

    def text(self, channels: int, outputs: int) -> str:
        """Lay out for a terminal, with the first input and output channels."""
        found = spike_statistics(count_sizes(self.count))
        mean = float(self.x.abs().mean())
        lines = [
            self.title,
            f"threshold {self.threshold:.6g} = mean |x| {mean:.6g} / k {mean / self.threshold:.4g}",
            f"counts of {len(self.count)} channels: {int(self.count.min())} to "
            f"{int(self.count.max())}, {found['share_silent']:.1%} silent, "
            f"{found['mean_spikes']:.3f} spikes per channel",
        ]
        spikes = Table(title="spikes over time, + is 1 and - is -1")
        for name in ("channel", "input", "count", "threshold x count"):
            spikes.add_column(name, justify="right")
        for coding, parts in self.trains.items():
            spikes.add_column(f"{coding.replace('_', ' ')}\n{len(parts[0])} steps")
        for i in range(min(channels, len(self.count))):
            value = float(self.threshold * self.count[i])
            trains = (_show_train(parts, i) for parts in self.trains.values())
            spikes.add_row(
                str(i), f"{self.x[i]:.5g}", str(int(self.count[i])), f"{value:.5g}", *trains
            )
        products = Table(title="INT8 weights times spikes")
        for name in ("output", "from counts", *(c.replace("_", " ") for c in self.from_trains)):
            products.add_column(name, justify="right")
        for name in ("with scales", "float weights x input"):
            products.add_column(name, justify="right")
        for i in range(min(outputs, len(self.output))):
            sums = (str(int(found[i])) for found in self.from_trains.values())
            products.add_row(
                str(i), str(int(self.from_counts[i])), *sums, f"{self.output[i]:.5g}",
                f"{self.dense[i]:.5g}",
            )  # fmt: skip
        verdict = "equal those from counts bit for bit" if self.is_exact else "DIFFER"
        out = StringIO()
        console = Console(file=out, width=180)
        console.print(*lines, sep="\n", markup=False, highlight=False, soft_wrap=True)
        console.print(spikes, products)
        error = float((self.output - self.dense).norm() / self.dense.norm().clamp_min(1e-30))
        console.print(
            f"All {len(self.output)} products from trains, in {len(self.trains)} codings, {verdict}"
            f". With scales they are {error:.2%} (root mean square) from float weights x input.",
            soft_wrap=True,
        )
        return out.getvalue()


def inspect_spikes(config: InspectConfig, device: torch.device) -> Inspection:
    """Run a prompt through a run's model and look at one token before one projection.

    Raises:
        ValueError: no such token, layer or projection, or it is not spiked.
    """
    run, model, checkpoint = restore_model(config.run, device, spike=config.spike)
    tokenizer = load_tokenizer(run.data.tokenizer)
    tokens = [int(i) for i in tokenizer.encode(config.prompt)]
    if not -len(tokens) <= config.token < len(tokens):
        raise ValueError(
            f"token={config.token} is none of the {len(tokens)} tokens of the prompt; use "
            + (f"-1 to {len(tokens) - 1}" if tokens else "a prompt with some text")
        )
    name = find_projection(model, config.layer, config.projection)
    layout = build_layout(torch.tensor([0, len(tokens)], dtype=torch.int32))
    context = SequenceContext(layout, run.ops, Comm(Mesh(0, 1, 0, device)))
    x, spikes = _capture(model, name, torch.tensor([tokens], device=device), context)
    index = config.token % len(tokens) + x.shape[1] - len(tokens)  # after the sinks
    piece = tokenizer.decode(torch.tensor([tokens[config.token]]).numpy())
    title = (
        f"{name} of {checkpoint}, token {config.token % len(tokens)} of {len(tokens)}: {piece!r}"
    )
    projection = model.get_submodule(name)
    assert isinstance(projection, Projection | IntegerProjection), "found as one"
    row = slice(index, index + 1)
    return inspect_row(title, x[0, row], spikes.count[0, row], spikes.threshold[0, row], projection)


@torch.no_grad()
def inspect_row(
    title: str,
    x: torch.Tensor,
    count: torch.Tensor,
    threshold: torch.Tensor,
    projection: Projection | IntegerProjection,
) -> Inspection:
    """Compute the products of one token's spikes with the INT8 weights of a projection.

    Args:
        x, count: [1, in].
        threshold: [1, 1].
        projection: float weights are rounded to INT8, one scale per output channel.
    """
    if isinstance(projection, IntegerProjection):
        weight, scale, size = projection.weight, projection.scale, projection.config.group_size
        groups = scale.repeat_interleave(size or weight.shape[1], dim=1)[:, : weight.shape[1]]
        floats = weight * groups
    else:
        (weight, scale), size = quantize_weight(projection.weight.float(), None), None
        floats = projection.weight.float()
    trains = {coding: _encode_signs(count[0].long(), coding) for coding in CODINGS}
    from_trains = {coding: _multiply(parts, coding, weight) for coding, parts in trains.items()}
    output = int8_linear(count.float(), threshold.float(), weight, scale, group_size=size)
    return Inspection(
        title,
        x[0].float(),
        count[0].long(),
        float(threshold),
        trains,
        spike_matmul(count.long(), weight)[0],
        from_trains,
        output[0],
        F.linear(x.float(), floats)[0],
    )


def find_projection(model: CausalLM, layer: int, projection: str) -> str:
    """Return the full name of a projection of a layer, given by the end of its name.

    Raises:
        ValueError: there is no such layer or projection, or there are several.
    """
    layers = dict(model.named_layers())
    if f"layers.{layer}" not in layers:
        raise ValueError(f"layer={layer} is none of the model's; use 0 to {len(layers) - 1}")
    names = [
        f"layers.{layer}.{name}"
        for name, module in layers[f"layers.{layer}"].named_modules()
        if isinstance(module, Projection | IntegerProjection)
    ]
    found = [name for name in names if f".{name}".endswith(f".{projection}")]
    if len(found) != 1:
        said = "means several" if found else "is none"
        raise ValueError(
            f"projection={projection} {said} of the projections of layer={layer}; name one of "
            f"{', '.join(found or names)}"
        )
    return found[0]


@torch.no_grad()
def _capture(
    model: CausalLM, name: str, tokens: torch.Tensor, context: SequenceContext
) -> tuple[torch.Tensor, Spikes]:
    """Return the input [1, T, in] of the encoder before a projection, and its spikes."""
    encoded: list[tuple[torch.Tensor, Activation]] = []
    taken: list[Activation] = []

    def keep_encoded(_: nn.Module, inputs: tuple[torch.Tensor, ...], out: Activation) -> None:
        encoded.append((inputs[0], out))

    def keep_taken(_: nn.Module, inputs: tuple[Activation, ...]) -> None:
        taken.append(inputs[0])

    layer = ".".join(name.split(".")[:2])
    encoders = (m for m in model.get_submodule(layer).modules() if isinstance(m, SpikeEncoder))
    handles = [encoder.register_forward_hook(keep_encoded) for encoder in encoders]
    handles.append(model.get_submodule(name).register_forward_pre_hook(keep_taken))
    try:
        model.hidden(tokens, context)
    finally:
        for handle in handles:
            handle.remove()
    for x, out in encoded:
        if isinstance(out, Spikes) and out is taken[0]:
            return x, out
    raise ValueError(
        f"spike: the input of {name} is not spiked in this run; use spike={{enabled:true,k:3.0}}"
    )


def _encode_signs(count: torch.Tensor, coding: str) -> list[torch.Tensor]:
    """Return one train, or those of the sizes of counts above and below 0 if there is no sign."""
    if coding not in ("binary", "bitwise"):
        return [encode(count, coding)]
    whole = encode(count.abs(), coding)
    return [whole * (count > 0).to(torch.int8), whole * (count < 0).to(torch.int8)]


def _multiply(parts: list[torch.Tensor], coding: str, weight: torch.Tensor) -> torch.Tensor:
    """Return sum_t c_t (W s_t), less that of counts below 0 where there are two trains."""
    steps = step_weights(coding, len(parts[0])).to(weight.device)
    sums = [(steps[:, None] * spike_matmul(train, weight)).sum(0) for train in parts]
    return sums[0] - sums[1] if len(sums) == 2 else sums[0]


def _show_train(parts: list[torch.Tensor], channel: int) -> str:
    """Return one channel's spikes, earliest first; those of counts below 0 are marked."""
    spikes = sum(int(part[:, channel].sum()) for part in parts[1:])
    train = parts[1 if spikes else 0][:SHOWN_STEPS, channel].tolist()
    text = "".join(SIGNS[spike] for spike in train)
    more = " \N{HORIZONTAL ELLIPSIS}" if len(parts[0]) > SHOWN_STEPS else ""
    return f"{text}{more} (of -W)" if spikes else text + more
