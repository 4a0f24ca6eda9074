"""Held-out perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megalr.data import Examples, evaluation_batches
from megalr.data.examples import SampledExamples
from megalr.errors import UserError
from megalr.train.ranks import Ranks

IGNORED = -100

# How often a run is evaluated by default: about so many times, and at least every so many updates.
EVALUATIONS, LARGEST_INTERVAL = 20, 100
# What evaluations on the way may cost, as a share of the updates' operations. A forward pass is a third of an update.
SHARE, FORWARD_SHARE = 0.05, 1 / 3


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


@dataclass(frozen=True)
class Schedule:
    """The evaluations on the way; a run begins and ends with one of the whole text.

    Attributes:
        every: updates between two.
        examples: what they read.
        is_sample: whether that is a part of the held-out text.
    """

    every: int
    examples: Examples
    is_sample: bool


def schedule_evaluations(
    every: int | None, held_out: Examples, *, batch: int, steps: int, before: int | None = None
) -> Schedule:
    """When to evaluate on the way, and on what; the same however the run is cut into processes.

    By default it is often enough for a curve, and evaluations cost at most ``SHARE`` of the updates: where the
    held-out text is too long for that, they read an evenly spread sample of it, always the same.

    Args:
        every: what the user asked for: the whole text every so many updates; None for the default.
        held_out: the whole text.
        batch: sequences of one update; a sample is a multiple of that, so that all ranks have work.
        steps: updates of the run.
        before: sequences that a run which is resumed has read until now, with perhaps fewer steps to come: its curve
            is of the same text from end to end. None for a run that begins, or that has not noted it.
    """
    if every is not None:
        return Schedule(every, held_out, is_sample=False)
    budget = SHARE / FORWARD_SHARE  # batches that may be read for each update
    every = max(min(steps // EVALUATIONS, LARGEST_INTERVAL), math.ceil(1 / budget))
    count = int(every * budget) * batch
    if before is not None and (before >= len(held_out) or (before > 0 and before % batch == 0)):
        count = min(before, len(held_out))
        every = max(every, math.ceil(count / (budget * batch)))  # so that they cost no more
    if count >= len(held_out):
        return Schedule(every, held_out, is_sample=False)
    return Schedule(every, SampledExamples(held_out, count), is_sample=True)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    examples: Examples,
    *,
    micro_batch_size: int,
    ranks: Ranks,
    give_up: Callable[[], bool] = lambda: False,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Evaluation | None:
    """Score the whole of ``examples``, shared among the ranks. Collective.

    Args:
        model: a DeepSpeed engine or a plain transformers model; left in the mode it was in.
        examples: the held-out text.
        micro_batch_size: sequences at a time on one rank; the perplexity does not depend on it.
        ranks: this process among the others.
        give_up: asked before every batch; must say the same on all ranks.
        advance: told after every batch how many tokens this rank has predicted.

    Returns:
        None where ``give_up`` said so.

    Raises:
        UserError: on all ranks: there is no token to predict.
        RuntimeError: on all ranks: losses are not in the sum, because the model has returned no numbers.
    """
    training = model.training
    model.eval()
    # Sums in fp64: loss, tokens, means of the batches, batches with anything to predict.
    sums = torch.zeros(4, dtype=torch.float64, device=ranks.device)
    batches = predicted = 0
    for batch in evaluation_batches(
        examples, micro_batch_size=micro_batch_size, rank=ranks.data_rank, world_size=ranks.data_size
    ):
        if give_up():
            model.train(training)
            return None
        batches += 1
        tokens = predicted_tokens(batch)
        predicted += tokens
        # With one item "in the batch", transformers' loss is the sum over its tokens.
        output: Any = model(**to_device(batch, ranks.device), num_items_in_batch=1)
        loss = output.loss.double()
        if tokens:
            sums += torch.stack([loss, loss.new_tensor(tokens), loss / tokens, loss.new_tensor(1)])
        advance(tokens)
    model.train(training)
    *of_losses, expected = ranks.sum_of_data([*sums.tolist(), predicted])
    loss_sum, tokens_sum, means, count = of_losses
    if not expected:
        raise UserError("the held-out text has no token to predict: each of its examples has one token or none")
    if round(tokens_sum) != round(expected):  # a figure of the rest would look like one of the whole text
        raise RuntimeError(
            f"the model was asked to predict {round(expected):,} tokens, and {round(tokens_sum):,} have a loss: "
            "on some rank it returns tensors without numbers, such as FakeTensors that somebody's layer has kept"
        )
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
