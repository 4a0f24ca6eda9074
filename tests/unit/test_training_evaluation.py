"""Held-out perplexity against a plain computation."""

import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from transformers import LlamaConfig

from megalr.data.examples import Examples, PackedExamples
from megalr.errors import UserError
from megalr.train.evaluation import FORWARD_SHARE, SHARE, evaluate, schedule_evaluations
from megalr.train.models import build_model
from megalr.train.ranks import Ranks

ALONE = Ranks(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
LENGTHS = [12, 3, 7, 12, 1, 5, 9]  # the fifth has nothing to predict


class Fixed(Examples):
    """Examples of given tokens."""

    def __init__(self, rows):
        super().__init__(12, 0, "fixed", tokens=sum(map(len, rows)), dropped=0)
        self._rows = [np.array(row) for row in rows]

    def __len__(self):
        return len(self._rows)

    def _content(self, index):
        return self._rows[index]


class Ragged(Fixed):
    """Random tokens, a number of them at the start of each example."""

    def __init__(self):
        rng = np.random.default_rng(0)
        super().__init__([rng.integers(0, 50, length) for length in LENGTHS])


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
    )
    return build_model(config, seed=0)


def losses(model, row):
    """Of each predicted token, without padding, in fp64."""
    ids = torch.tensor(row).long()[None]
    logits = model(input_ids=ids).logits[0, :-1].double()
    return functional.cross_entropy(logits, ids[0, 1:], reduction="none")


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 7, 10])
def test_every_predicted_token_counts_once(model, micro_batch_size):
    examples = Ragged()
    with torch.no_grad():
        single = torch.cat([losses(model, examples[i][0][:length]) for i, length in enumerate(LENGTHS)])

    found = evaluate(model, examples, micro_batch_size=micro_batch_size, ranks=ALONE)

    assert found.tokens == len(single) == sum(LENGTHS) - len(LENGTHS)
    assert found.loss == pytest.approx(single.mean().item(), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(single.mean().item()), rel=1e-5)


def test_the_published_figure_divides_by_one_batch_too_many(model):
    examples = Ragged()
    with torch.no_grad():
        by_row = [losses(model, examples[i][0][:length]) for i, length in enumerate(LENGTHS)]
    # two at a time; the third batch's second row is the example without a prediction
    batches = [torch.cat(by_row[0:2]), torch.cat(by_row[2:4]), torch.cat(by_row[4:6]), by_row[6]]
    mean_of_means = sum(batch.mean().item() for batch in batches) / 4

    found = evaluate(model, examples, micro_batch_size=2, ranks=ALONE)

    assert found.galore_compatible == pytest.approx(math.exp(mean_of_means * 4 / 5), rel=1e-5)
    assert found.galore_compatible < found.perplexity


def test_the_model_stays_in_its_mode(model):
    for training in (True, False):
        model.train(training)
        evaluate(model, Ragged(), micro_batch_size=4, ranks=ALONE)
        assert model.training is training


def test_an_evaluation_can_be_given_up(model):
    asked = []

    def give_up():
        asked.append(True)
        return len(asked) == 2

    assert evaluate(model, Ragged(), micro_batch_size=2, ranks=ALONE, give_up=give_up) is None
    assert len(asked) == 2


def text(sequences):
    """So many sequences of four tokens, counted up."""
    return PackedExamples(np.arange(4 * sequences), 4, pad_id=0, fingerprint="text", keep_tail=False)


@pytest.mark.parametrize("steps", [1, 12, 30, 70, 400, 2000, 60_000])
@pytest.mark.parametrize("sequences", [20, 476, 40_000])
def test_by_default_a_curve_has_points_and_they_cost_little(steps, sequences):
    batch = 12
    found = schedule_evaluations(None, text(sequences), batch=batch, steps=steps)
    evaluations = steps // found.every
    assert evaluations * len(found.examples) * FORWARD_SHARE <= SHARE * steps * batch
    assert evaluations >= min(10, steps // 7)
    assert found.every <= 100
    assert found.is_sample == (len(found.examples) < sequences)


def test_a_sample_is_spread_over_the_text():
    found = schedule_evaluations(None, text(100), batch=12, steps=140)
    assert [int(row[0]) // 4 for row, _ in found.examples] == [0, 8, 16, 25, 33, 41, 50, 58, 66, 75, 83, 91]
    assert found.examples.tokens == 48 and found.examples.predicted == 36
    assert found.examples.fingerprint != text(100).fingerprint


def test_whoever_asks_for_evaluations_gets_them_of_the_whole_text():
    held_out = text(476)
    found = schedule_evaluations(3, held_out, batch=12, steps=400)
    assert (found.every, found.examples, found.is_sample) == (3, held_out, False)


def test_a_run_with_more_steps_goes_on_with_its_sample():
    held_out = text(40_000)
    first = schedule_evaluations(None, held_out, batch=12, steps=140)
    for steps in (140, 2000, 7):
        found = schedule_evaluations(None, held_out, batch=12, steps=steps, before=len(first.examples))
        assert found.examples.fingerprint == first.examples.fingerprint and found.is_sample
        assert len(found.examples) * FORWARD_SHARE <= SHARE * found.every * 12
    whole = schedule_evaluations(None, text(476), batch=12, steps=140, before=476)
    assert (len(whole.examples), whole.is_sample) == (476, False) and whole.every * 12 * SHARE >= 476 * FORWARD_SHARE
    for strange in (0, -12, 7):  # from a file that anybody may have written
        found = schedule_evaluations(None, held_out, batch=12, steps=140, before=strange)
        assert len(found.examples) == len(first.examples)
    assert not schedule_evaluations(3, held_out, batch=12, steps=140, before=12).is_sample


def test_a_text_without_a_token_to_predict_has_no_perplexity(model):
    with pytest.raises(UserError, match="no token to predict"):
        evaluate(model, Fixed([[3], [4]]), micro_batch_size=2, ranks=ALONE)


def test_losses_without_numbers_are_no_figure(model):
    """Of one batch of two: the figure would be of the other one alone."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        nothing = torch.zeros(())

    def lose(module, args, output):
        output.loss = nothing if calls.append(None) or len(calls) == 2 else output.loss

    calls = []
    hook = model.register_forward_hook(lose)
    try:
        with pytest.raises(RuntimeError, match="to predict 4 tokens, and 2 have a loss"):
            evaluate(model, Fixed([[3, 4, 5], [6, 7, 8]]), micro_batch_size=1, ranks=ALONE)
    finally:
        hook.remove()
