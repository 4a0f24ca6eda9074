"""The order of examples: one stream at every world size, resumed anywhere, nothing lost or repeated."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from megalr.data import Batches, evaluation_batches
from megalr.data.examples import Examples, PackedExamples, TruncatedExamples
from megalr.errors import UserError

PAD, END = 90, 91


def packed(count: int, length: int = 4, tail: int = 0, fingerprint: str = "text") -> PackedExamples:
    """Example i starts with token i * length."""
    tokens = np.arange(count * length + tail, dtype=np.uint16)
    return PackedExamples(tokens, length, pad_id=PAD, fingerprint=fingerprint, keep_tail=tail > 0)


def truncated(lengths: list[int], length: int = 4) -> TruncatedExamples:
    ends = np.cumsum(lengths)
    tokens = np.arange(ends[-1], dtype=np.uint32)
    tokens[ends - 1] = END
    return TruncatedExamples(tokens, ends, length, pad_id=PAD, end_id=END, fingerprint="documents")


def batches(
    examples: Examples, micro: int = 1, accumulation: int = 1, rank: int = 0, world: int = 1, seed: int = 7
) -> Batches:
    return Batches(
        examples,
        micro_batch_size=micro,
        accumulation_steps=accumulation,
        rank=rank,
        world_size=world,
        seed=seed,
    )


def read(streams: list[Batches], micro_steps: int) -> list[int]:
    """The ids of the examples that the ranks of a run read, micro-step by micro-step and rank by rank."""
    length = streams[0].examples.sequence_length
    return [
        int(row[0]) // length for _ in range(micro_steps) for stream in streams for row in next(stream)["input_ids"]
    ]


SHAPES = [
    (12, 1, 1),
    (3, 4, 1),
    (6, 1, 2),
    (4, 1, 3),
    (1, 4, 3),
    (3, 2, 2),
]  # micro, accumulation, world: 12 a step


@pytest.mark.parametrize(("micro", "accumulation", "world"), SHAPES)
def test_each_step_reads_the_same_examples_whatever_the_ranks(micro: int, accumulation: int, world: int) -> None:
    examples = packed(17)  # a step of 12 crosses the end of the epoch
    streams = [batches(examples, micro, accumulation, rank, world) for rank in range(world)]
    expected = batches(examples).order(0, 60)
    assert read(streams, 5 * accumulation) == expected


def test_every_example_comes_once_an_epoch_and_epochs_differ() -> None:
    stream = batches(packed(17))
    epochs = [stream.order(17 * epoch, 17 * epoch + 17) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(17)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != list(range(17))


def test_the_order_follows_from_the_seed_alone() -> None:
    assert batches(packed(17)).order(0, 40) == batches(packed(17, length=8)).order(0, 40)
    assert batches(packed(17)).order(0, 17) != batches(packed(17), seed=8).order(0, 17)


def test_a_step_longer_than_the_text_reads_it_several_times() -> None:
    ids = read([batches(packed(3), micro=10)], 1)
    assert sorted(Counter(ids).values()) == [3, 3, 4]


@pytest.mark.parametrize("done", [1, 2, 3])  # steps of 12 examples before the interruption: the first epoch has 17
@pytest.mark.parametrize(("micro", "accumulation", "world"), SHAPES)
def test_resuming_goes_on_where_the_stream_was_left(done: int, micro: int, accumulation: int, world: int) -> None:
    first = batches(packed(17), micro=6, accumulation=2)
    read([first], 2 * done)
    state = first.state_dict()
    assert state["position"] == 12 * done
    streams = [batches(packed(17), micro, accumulation, rank, world) for rank in range(world)]
    for stream in streams:
        stream.load_state_dict(state)
    assert read(streams, 2 * accumulation) == first.order(12 * done, 12 * done + 24)
    assert all(stream.state_dict() == {**state, "position": 12 * done + 24} for stream in streams)


def test_an_unfinished_step_is_read_again() -> None:
    stream = batches(packed(17), micro=2, accumulation=3)
    read([stream], 4)
    assert stream.state_dict()["position"] == 6
    assert stream.epoch == 6 / 17


def test_the_state_survives_a_checkpoint_that_holds_plain_values_only(tmp_path: Any) -> None:
    stream = batches(packed(17), micro=5)
    next(stream)
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    other = batches(packed(17), micro=5)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(next(other)["input_ids"], next(stream)["input_ids"])


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (batches(packed(17, fingerprint="other text")), "another text"),
        (batches(packed(17), seed=8), "seed of the order: 7, now 8"),
        (batches(packed(17, length=8)), "another text"),
    ],
)
def test_the_state_of_another_stream_is_refused(other: Batches, words: str) -> None:
    with pytest.raises(UserError, match=words):
        other.load_state_dict(batches(packed(17)).state_dict())
    assert other.position == 0


def test_full_sequences_have_equal_labels_and_no_mask() -> None:
    batch = next(batches(packed(5), micro=3))
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["input_ids"].shape == (3, 4)
    assert torch.equal(batch["input_ids"], batch["labels"])


def test_pads_are_neither_labels_nor_attended_to() -> None:
    batch = next(evaluation_batches(truncated([2, 4, 7]), micro_batch_size=3, rank=0, world_size=1))
    assert batch["input_ids"].tolist() == [[0, END, PAD, PAD], [2, 3, 4, END], [6, 7, 8, END]]
    assert batch["labels"].tolist() == [[0, END, -100, -100], [2, 3, 4, END], [6, 7, 8, END]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]


def test_the_tail_of_the_text_is_dropped_in_training_and_padded_in_evaluation() -> None:
    tokens = np.arange(10, dtype=np.uint16)
    train = PackedExamples(tokens, 4, pad_id=PAD, fingerprint="text", keep_tail=False)
    assert (len(train), train.tokens, train.dropped) == (2, 8, 2)
    held_out = packed(2, tail=2)
    assert (len(held_out), held_out.tokens, held_out.dropped) == (3, 10, 0)
    row, valid = held_out[2]
    assert (row.tolist(), valid) == ([8, 9, PAD, PAD], 2)
    assert row.dtype == np.int32
    with pytest.raises(IndexError):
        held_out[3]


def test_a_tail_of_one_token_has_nothing_to_predict() -> None:
    assert len(packed(2, tail=1)) == 2


def test_truncation_keeps_the_end_of_text_token_and_says_what_it_cuts() -> None:
    examples = truncated([2, 4, 7])
    assert (len(examples), examples.tokens, examples.dropped) == (3, 10, 3)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("micro", [1, 3, 8])
def test_evaluation_scores_every_token_once_in_as_many_batches_on_every_rank(world: int, micro: int) -> None:
    examples = packed(10, tail=3)
    shares = [
        list(evaluation_batches(examples, micro_batch_size=micro, rank=rank, world_size=world)) for rank in range(world)
    ]
    assert len({len(share) for share in shares}) == 1
    every = [batch for share in shares for batch in share]
    assert all(batch["input_ids"].shape == (micro, 4) for batch in every)
    scored = torch.cat([batch["labels"].flatten() for batch in every])
    assert sorted(scored[scored != -100].tolist()) == list(range(43))
    assert all(bool(batch["attention_mask"][:, 0].all()) for batch in every if "attention_mask" in batch)


def test_token_counts_are_the_targets() -> None:
    tokens = np.array([5, 1, 2, 1, 5, 5, 2], dtype=np.uint16)
    examples = PackedExamples(tokens, 4, pad_id=0, fingerprint="text", keep_tail=True)  # [5 1 2 1] [5 5 2 pad]
    assert examples.token_counts(6).tolist() == [0, 2, 2, 0, 0, 1]
    for vocabulary in (1, 4, 5):
        with pytest.raises(UserError, match=f"token id 5, but the model's vocabulary has {vocabulary} entries"):
            examples.token_counts(vocabulary)
