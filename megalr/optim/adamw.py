"""AdamW on what an engine hands to a step, element by element (arXiv 1711.05101)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from megalr.ops import low_rank_adam
from megalr.optim.events.base import Step
from megalr.optim.sharded import gradient_of


def adamw(
    parameters: Sequence[Tensor], states: Mapping[Tensor, Mapping[str, Tensor]], step: Step, *, reset: bool
) -> None:
    """Update parameters and their moments, in place.

    Args:
        parameters: of any shape and one dtype, with gradients or without.
        states: of each, "exp_avg" and "exp_avg_sq" of its shape.
        step: the settings.
        reset: leave zeros in the place of the moments.
    """
    low_rank_adam(
        [parameter.data.view(-1) for parameter in parameters],
        [gradient_of(parameter).reshape(-1) for parameter in parameters],
        *([states[parameter][key].view(-1) for parameter in parameters] for key in ("exp_avg", "exp_avg_sq")),
        steps=[step.count] * len(parameters),
        lr=step.lr,
        betas=step.betas,
        eps=step.eps,
        weight_decay=step.weight_decay,
        reset=reset,
    )
