"""Which example goes where: one global order, cut by rank and micro-batch, that can be left and resumed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megalr.data.examples import Examples
from megalr.errors import UserError
from megalr.seeding import seed_for

_IGNORED = -100  # the label that torch's and transformers' cross-entropy leave out

_STATE_WORDS = {
    "data": "text (or tokenizer, or way of cutting it)",
    "seed": "seed of the order",
    "sequence_length": "sequence length",
    "examples": "number of examples",
    "order": "order of examples (another version of numpy?)",
}


class Batches:
    """An endless iterator over this rank's micro-batches of the training examples.

    All ranks read one global stream. Its position p holds example ``permutation(epoch)[p mod N]`` of epoch
    ``p // N``, where the permutation follows from the seed and the epoch alone. An optimizer step reads the
    next ``micro_batch_size * accumulation_steps * world_size`` positions, micro-step by micro-step, and
    within one, rank by rank. So the examples of a step do not depend on how they are spread over ranks and
    micro-steps, and every example comes once an epoch; a step may span epochs.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        micro_batch_size: int,
        accumulation_steps: int,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        self.examples = examples
        self.examples_per_step = micro_batch_size * accumulation_steps * world_size
        self._micro_batch_size = micro_batch_size
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._start = 0  # position of the first step since the start or the last load_state_dict
        self._position = 0  # of the next micro-step
        self._permutations: dict[int, NDArray[np.uint32]] = {}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        """The next micro-batch.

        Returns:
            ``input_ids`` (micro, L) int64; ``labels`` (micro, L) int64, equal to them (transformers shifts
            them itself) and -100 at pads; ``attention_mask`` (micro, L) int64 only if there are pads.
        """
        first = self._position + self._rank * self._micro_batch_size
        self._position += self._world_size * self._micro_batch_size
        return _batch([self.examples[index] for index in self.order(first, first + self._micro_batch_size)])

    @property
    def position(self) -> int:
        """The global stream's first position that no finished step has read."""
        steps = (self._position - self._start) // self.examples_per_step
        return self._start + steps * self.examples_per_step

    @property
    def epoch(self) -> float:
        """How many times the text has been read."""
        return self.position / len(self.examples)

    def order(self, start: int, stop: int) -> list[int]:
        """The example ids at positions start .. stop - 1 of the global stream."""
        count = len(self.examples)
        return [int(self._permutation(position // count)[position % count]) for position in range(start, stop)]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, in plain numbers and strings; the same on all ranks.

        In the middle of an accumulation this is the start of the unfinished step, whose gradients a
        checkpoint does not hold.
        """
        return {"position": self.position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where ``state`` was taken, at any world size, micro-batch size and accumulation.

        Raises:
            UserError: the state is of another stream.
        """
        for key, own in self._identity().items():
            if state.get(key) != own:
                values = "" if key == "data" else f": {state.get(key)}, now {own}"
                raise UserError(
                    f"the checkpoint was trained with another {_STATE_WORDS[key]}{values}. "
                    "Resume with the data settings it was started with, or start a new run"
                )
        self._start = self._position = int(state["position"])

    def _identity(self) -> dict[str, Any]:
        return {
            "data": self.examples.fingerprint,
            "seed": self._seed,
            "sequence_length": self.examples.sequence_length,
            "examples": len(self.examples),
            "order": self.order(0, 8),
        }

    def _permutation(self, epoch: int) -> NDArray[np.uint32]:
        if epoch not in self._permutations:
            while len(self._permutations) > 1:  # a step may span two epochs, and 50M examples take 200 MB each
                del self._permutations[min(self._permutations)]
            order = np.arange(len(self.examples), dtype=np.uint32)
            np.random.Generator(np.random.Philox(seed_for(self._seed, "order of examples", epoch))).shuffle(order)
            self._permutations[epoch] = order
        return self._permutations[epoch]


def evaluation_batches(
    examples: Examples, *, micro_batch_size: int, rank: int, world_size: int
) -> Iterator[dict[str, Tensor]]:
    """This rank's share of all examples, each once, in batches as ``Batches`` gives them.

    Every rank gets the same number of batches of the same size, as a sharded model's forward needs all ranks.
    What that takes beyond the examples is rows of pads whose labels are all -100; a batch may have no other
    rows, and its mean loss is then NaN, so weigh by labels instead.
    """
    surplus = np.full(examples.sequence_length, examples.pad_id, dtype=np.int32), 0
    for first in range(0, len(examples), micro_batch_size * world_size):
        start = first + rank * micro_batch_size
        indices = range(start, start + micro_batch_size)
        yield _batch([examples[index] if index < len(examples) else surplus for index in indices])


def _batch(rows: list[tuple[NDArray[np.int32], int]]) -> dict[str, Tensor]:
    tokens = torch.from_numpy(np.stack([row for row, _ in rows])).long()  # (micro, L)
    lengths = torch.tensor([length for _, length in rows])
    labels = tokens.clone()
    batch = {"input_ids": tokens, "labels": labels}
    place = torch.arange(tokens.shape[1])
    if int(lengths.min()) < tokens.shape[1]:
        labels[place >= lengths[:, None]] = _IGNORED
        # a row without any visible token would make attention divide by zero
        batch["attention_mask"] = (place < lengths.clamp(min=1)[:, None]).long()
    return batch
