"""A run directory that begins with the weights of another run, or of somebody else's checkpoint,
in a model of another kind.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from conf.schema import Config, ConvertConfig, SpikeConfig, build
from models.causal_lm import CausalLM
from models.convert import Recipe, Upcycling, plan_conversion
from models.convert_mixers import Remapping, measure_scales, needs_scales
from models.io import is_foreign, read_foreign
from models.pattern import remap
from parallel.layout import Segment
from trainer.checkpoint_adapters import load_merged
from trainer.checkpoint_tensors import rows_name
from trainer.checks import check_model
from trainer.conversion import Conversion, describe
from trainer.new_run import check_out, write_run
from trainer.restore import find_run
from trainer.run_dir import TOKENIZER

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Converted:
    """A checkpoint of step 0 and what it is made of."""

    checkpoint: Path
    conversion: Conversion


@dataclass(frozen=True)
class _Source:
    """Where weights come from.

    Attributes:
        config: of a run of its model.
        get: reads a tensor of the model.
        save_tokenizer: writes its tokenizer into a folder; None: config.data names one already.
    """

    config: Config
    get: Callable[[str], torch.Tensor]
    save_tokenizer: Callable[[Path], None] | None = None


def convert_run(
    config: ConvertConfig, imported: Config | None = None, *, max_shard_bytes: int = 2 * 10**9
) -> Converted:
    """Write a run directory with a checkpoint of step 0.

    Tensors are made one by one, so that no more than a shard and a tensor are in memory. The
    directory appears when all is written; conversion.json in it lists every tensor.

    Args:
        imported: settings of a run, but for the model and the tokenizer, that begins with somebody
            else's checkpoint.

    Raises:
        ValueError: no sound checkpoint, models that do not match, or `out` is not empty.
        CheckpointWriteError: a file could not be written; nothing is left of it.
    """
    check_out(config.out)
    logger.info("reading and checking %s", config.source)
    source = _open(config, imported)
    new = _new_config(config, source.config)
    check_model(new)
    model = _build_on_meta(new)
    recipes = _plan(config, source, model)
    conversion = describe(recipes, model)

    def save_more(folder: Path) -> None:
        if source.save_tokenizer is not None:
            source.save_tokenizer(folder / TOKENIZER)
        conversion.save(folder / "conversion.json")

    checkpoint = write_run(
        new,
        _make(recipes, source.get),
        config.out,
        total_bytes=sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        save_more=save_more,
        max_shard_bytes=max_shard_bytes,
    )
    return Converted(checkpoint, conversion)


def _plan(config: ConvertConfig, source: _Source, model: CausalLM) -> dict[str, Recipe]:
    old, seed = _build_on_meta(source.config), source.config.run.seed
    upcycling = Upcycling(config.router_std, seed)
    sink_token = config.pattern.sink_token
    if sink_token is not None and sink_token >= model.config.vocab_size:
        raise ValueError(
            f"pattern.sink_token={sink_token} is no token; there are 0 to "
            f"{model.config.vocab_size - 1}"
        )
    remapping = Remapping(model.config.init_std, seed, sink_token=sink_token)
    changes_settings = config.pattern.layers is not None
    recipes = plan_conversion(old, model, [upcycling, remapping], changes_settings=changes_settings)
    if not needs_scales(recipes):
        return recipes
    logger.info("measuring the scale of every layer's attention")
    scales = measure_scales(source.config.model, source.config.ops, source.get, seed)
    remapping = dataclasses.replace(remapping, scales=scales)
    return plan_conversion(old, model, [upcycling, remapping], changes_settings=changes_settings)


def _open(config: ConvertConfig, imported: Config | None) -> _Source:
    if is_foreign(config.source):
        assert imported is not None, "a foreign checkpoint has no settings of a run"
        foreign = read_foreign(config.source)
        data = dataclasses.replace(
            imported.data, tokenizer=(Path(config.out) / TOKENIZER).as_posix()
        )
        # What `auto` stands for is for a run to say; float32 has the source's own logits.
        run = dataclasses.replace(imported, model=foreign.config, data=data, dtype="float32")
        return _Source(run, foreign.tensors.get, foreign.save_tokenizer)
    run, checkpoint = find_run(config.source)
    if run.quantization is not None:
        raise ValueError(
            f"source={config.source} holds integers; convert the run that was quantised"
        )
    tensors = load_merged(checkpoint)
    return _Source(run, lambda name: tensors.get(f"model/{name}"))


def _new_config(config: ConvertConfig, old: Config) -> Config:
    changes = {key: value for key, value in config.spike.items() if value is not None}
    return dataclasses.replace(
        old,
        model=config.model or remap(old.model, config.pattern),
        run=dataclasses.replace(old.run, dir=config.out, resume=config.out),
        spike=build(SpikeConfig, dataclasses.asdict(old.spike) | changes),
        adapters=None,
    )


def _build_on_meta(config: Config) -> CausalLM:
    with torch.device("meta"):
        return CausalLM(config.model, config.spike, config.ops)


def _make(
    recipes: dict[str, Recipe], get: Callable[[str], torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the new model's tensors by name, every copy of one as a row of its own."""
    for name, recipe in recipes.items():
        made = recipe.make(*(get(source) for source in recipe.sources))
        if recipe.copies is None:
            # Branches have tensors in common, and files none that share memory.
            yield f"model/{name}", made.clone()
        for row in range(recipe.copies or 0):
            yield rows_name(f"model/{name}", Segment(row, row + 1)), made[None].clone()
