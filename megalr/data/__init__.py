"""Text to tokens to examples to batches."""

from megalr.data.batches import Batches, evaluation_batches
from megalr.data.config import DataConfig
from megalr.data.examples import Examples
from megalr.data.load import Data, load_data
from megalr.data.sources import is_hub_dataset
from megalr.data.tokenizer import load_tokenizer
from megalr.data.unigram import unigram_perplexity

__all__ = [
    "Batches",
    "Data",
    "DataConfig",
    "Examples",
    "evaluation_batches",
    "is_hub_dataset",
    "load_data",
    "load_tokenizer",
    "unigram_perplexity",
]
