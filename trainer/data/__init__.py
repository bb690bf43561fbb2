"""Text to batches: sources -> tokenizer -> memory-mapped shards -> packed batches.

One file per step; the names below are what the rest of the program uses.
"""

from trainer.data.batches import Batch, Dataset, TokenDataset, micro_batches, validation_batches
from trainer.data.mix import check_data, open_data, prepare_data
from trainer.data.shards import prepare
from trainer.data.tokenizer import TextStream, Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "Dataset",
    "TextStream",
    "TokenDataset",
    "Tokenizer",
    "check_data",
    "load_tokenizer",
    "micro_batches",
    "open_data",
    "prepare",
    "prepare_data",
    "validation_batches",
]
