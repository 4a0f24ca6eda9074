"""Whether values can be trained on. Checksums say only that they are those that were written."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from megalr.errors import UserError, printable

# Words for what is kept under the first part of a key. Buffers are the model's own: a mask in them may hold anything.
TRAINED = {
    "weights": "weights",
    "exp_avg": "first moments",
    "exp_avg_sq": "second moments",
    "rule": "a rule's state",
    "waiting": "rows that wait to be switched in",
    "directions": "directions of activations",
    "remainders": "remainders of frozen weights",
}
FROZEN = "frozen"
SQUARES = "exp_avg_sq"  # in the name of what is a mean of squares, of rules as well


def check_values(key: str, values: Tensor, folder: Path) -> None:
    """Refuse what no training goes on from: NaN, infinities, second moments below zero.

    A frozen parameter may hold minus infinity, with which a model masks.

    Args:
        key: of a tensor of the checkpoint, "kind/name".
        values: all or some of it, on the CPU; read once, without a copy.
        folder: the checkpoint's, for the message.

    Raises:
        UserError: naming the tensor.
    """
    kind, _, name = key.partition("/")
    if not (kind in TRAINED or kind == FROZEN) or not values.is_floating_point() or not values.numel():
        return
    least, largest = (bound.item() for bound in torch.aminmax(values))  # both NaN if one value is
    if not largest < math.inf or (least == -math.inf and kind != FROZEN):
        wrong = "not finite"
    elif least < 0 and SQUARES in (kind if kind != "rule" else name.rpartition("/")[2]):
        wrong = "negative, as no mean of squares is"
    else:
        return
    raise UserError(
        f"{folder} holds values that are {wrong}: {TRAINED.get(kind, 'frozen weights')} of {printable(name)}. They are "
        "as they were saved, and training cannot go on from them: load an older checkpoint, by its tag or by moving "
        "this one elsewhere"
    )
