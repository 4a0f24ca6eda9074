"""Model FLOPs: the floating-point operations of a forward and a backward pass, counted, not estimated.

What is counted is what the model computes with the layers that it has. The real layers run forward and backward on
tensors without numbers, and torch counts the matrix products. So low-rank layers count their two thin products, frozen
weights have no gradient of their own, and layers that form W from its parts count that as well.

- A product of (m, k) and (k, n) is 2 m k n operations.
- Attention counts all T x T scores of a sequence of T tokens, as if there were no causal mask: for each layer and token
  12 T d, d the width of all heads. That is the convention of PaLM (arXiv 2204.02311, appendix B) and torchtitan.
- Not counted: element-wise operations, norms, softmax, look-ups in embeddings and matrix-vector products; activations
  that are computed again for ``--activation-checkpointing``; the optimizer, with its decompositions, refreshes and
  refactorizations; full gradients that projected layers form for a refresh.

MFU (model FLOP utilization) is these operations for each second, divided by the peak of the device in dense matrix
products of the dtype that the model computes in.
"""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megalr.config.settings import MegalrConfig
from megalr.layers import parametrize
from megalr.layers.velora import compress_activations, compressed_layers
from megalr.train.models import empty_model

if TYPE_CHECKING:
    from transformers import LlamaConfig

logger = logging.getLogger(__name__)


def model_flops(model: LlamaConfig, megalr: MegalrConfig, *, sequences: int, sequence_length: int) -> int:
    """Count the operations of one forward and one backward pass of the whole model.

    Nothing is computed and no memory is needed. Attention is counted as explicit products, whatever kernel trains.

    Args:
        model: the shape of the dense model.
        megalr: its parametrization, and whether activations are compressed.
        sequences: of the pass, a micro-batch.
        sequence_length: tokens of each, pads included.

    Returns:
        Operations; a multiplication and an addition are two.
    """
    with torch.random.fork_rng(devices=[]):  # the first rank alone counts, and ranks' random numbers stay alike
        return _counted(model, megalr, sequences, sequence_length)


def flops_of_update(
    model: LlamaConfig, megalr: MegalrConfig, *, sequences: int, passes: int, sequence_length: int
) -> int | None:
    """:func:`model_flops` of a whole update: of all its passes on all ranks.

    Args:
        model, megalr, sequence_length: see :func:`model_flops`.
        sequences: of one pass.
        passes: micro-batches of the update, over all ranks that read data of their own.

    Returns:
        None, with a warning, where a layer of a plugin cannot run on tensors without numbers.
    """
    try:
        return passes * model_flops(model, megalr, sequences=sequences, sequence_length=sequence_length)
    except Exception as error:  # of any kind, in somebody else's layer
        logger.warning("the model's operations cannot be counted: %s. TFLOP/s and MFU are left out.", error)
        return None


def _counted(model: LlamaConfig, megalr: MegalrConfig, sequences: int, sequence_length: int) -> int:
    outline = parametrize(empty_model(model), megalr.parametrization)
    if megalr.activations is not None:
        compress_activations(outline, megalr.activations)
    counter = FlopCounterMode(display=False)
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        warnings.simplefilter("ignore")  # layers compare addresses, of which these tensors have none
        outline.train().to_empty(device="cpu")
        for layer in compressed_layers(outline).values():  # as from the second update on
            layer.direction = torch.zeros(layer.in_features // layer.groups)
        tokens = torch.zeros(sequences, sequence_length, dtype=torch.long)
        # An explicit mask: transformers would look into the tokens to choose one.
        mask = torch.zeros(sequences, 1, sequence_length, sequence_length)
        with counter, sdpa_kernel(SDPBackend.MATH):
            output = outline(input_ids=tokens, labels=tokens, attention_mask=mask, use_cache=False)
            output.loss.backward()
    return int(counter.get_total_flops())
