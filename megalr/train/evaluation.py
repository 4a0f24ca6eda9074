"""Held-out perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megalr.data import Examples, evaluation_batches
from megalr.train.ranks import Ranks

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a model scores on a text.

    Attributes:
        loss: mean negative log-likelihood in nats, every predicted token of the text counting once.
        tokens: how many those are.
        galore_compatible: the perplexity as GaLore's evaluation and its descendants compute it, for
            comparison with published tables: exp of the mean of the batches' mean losses times N / (N + 1),
            with N batches a rank. Their divisor starts at one and not at zero, so the figure is too low.
    """

    loss: float
    tokens: int
    galore_compatible: float

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return _exp(self.loss)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    examples: Examples,
    *,
    micro_batch_size: int,
    ranks: Ranks,
    give_up: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Score the whole of ``examples``, shared among the ranks. Collective.

    Args:
        model: a DeepSpeed engine or a plain transformers model; left in the mode it was in.
        examples: the held-out text.
        micro_batch_size: sequences at a time on one rank; the perplexity does not depend on it.
        ranks: this process among the others.
        give_up: asked before every batch; must say the same on all ranks.

    Returns:
        None where ``give_up`` said so.
    """
    training = model.training
    model.eval()
    # Sums in fp64: loss, tokens, means of the batches, batches with anything to predict.
    sums = torch.zeros(4, dtype=torch.float64, device=ranks.device)
    batches = 0
    for batch in evaluation_batches(
        examples, micro_batch_size=micro_batch_size, rank=ranks.data_rank, world_size=ranks.data_size
    ):
        if give_up():
            model.train(training)
            return None
        batches += 1
        tokens = predicted_tokens(batch)
        # With one item "in the batch", transformers' loss is the sum over its tokens.
        output: Any = model(**to_device(batch, ranks.device), num_items_in_batch=1)
        loss = output.loss.double()
        if tokens:
            sums += torch.stack([loss, loss.new_tensor(tokens), loss / tokens, loss.new_tensor(1)])
    model.train(training)
    loss_sum, tokens_sum, means, count = ranks.sum_of_data(sums.tolist())
    return Evaluation(
        loss=loss_sum / tokens_sum,
        tokens=round(tokens_sum),
        galore_compatible=_exp(means / count * batches / (batches + 1)),
    )


def predicted_tokens(batch: dict[str, Tensor]) -> int:
    """Tokens that the batch asks the model to predict: each sequence's labels but the first, without pads."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch's tensors on ``device``."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
