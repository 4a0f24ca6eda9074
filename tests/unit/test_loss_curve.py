"""The loss curve and what it reads."""

import json

import numpy as np
import pytest
from matplotlib.image import imread

from megalr.train.loss_curve import (
    _perplexity_ticks,
    _short,
    _smooth,
    plot_losses,
    read_history,
)


@pytest.fixture
def write(tmp_path):
    def _write(*rows, end=""):
        path = tmp_path / "metrics.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
        return path

    return _write


def train(step, loss, *events):
    return {"step": step, "tokens": 10 * step, "loss": loss, "lr": 0.1, "events": list(events)}


def evaluate(step, loss):
    return {"step": step, "tokens": 10 * step, "eval_loss": loss}


def test_history_separates_training_from_evaluation(write):
    path = write(
        evaluate(0, 8.0),
        train(1, 7.5),
        train(2, 7.0, "refactorization", "momentum_reset"),
        evaluate(2, 7.1),
        train(3, 6.0, "refactorization"),
    )
    history = read_history(path)
    assert history.tokens.tolist() == [10, 20, 30] and history.losses.tolist() == [7.5, 7.0, 6.0]
    assert history.eval_tokens.tolist() == [0, 20] and history.eval_losses.tolist() == [8.0, 7.1]
    assert history.events == {"refactorization": [20, 30], "momentum_reset": [20]}


def test_samples_are_a_curve_of_their_own(write, tmp_path):
    sample = {"eval_is_sample": True}
    path = write(
        evaluate(0, 8.0),
        *(train(step, 8 - step / 10) for step in (1, 2, 3)),
        evaluate(2, 7.9) | sample,
        evaluate(3, 7.8) | sample,
        evaluate(3, 7.7),
    )
    history = read_history(path)
    assert history.eval_tokens.tolist() == [0, 30] and history.eval_losses.tolist() == [8.0, 7.7]
    assert history.sample_tokens.tolist() == [20, 30] and history.sample_losses.tolist() == [7.9, 7.8]
    plot_losses(path, tmp_path / "both.png")
    write(evaluate(2, 7.9) | sample)
    plot_losses(path, tmp_path / "samples.png")
    assert imread(tmp_path / "both.png").shape == imread(tmp_path / "samples.png").shape


def test_a_resumed_run_replaces_what_it_did_again(write):
    before = [train(s, 8 - s, *(["momentum_reset"] if s == 4 else [])) for s in (1, 2, 3, 4, 5)]
    after = [evaluate(2, 6.5), train(3, 5.1), train(4, 4.1), evaluate(4, 4.2)]
    history = read_history(write(*before[:2], evaluate(2, 6.6), *before[2:4], evaluate(4, 4.6), before[4], *after))
    assert history.tokens.tolist() == [10, 20, 30, 40]  # the old step 5 was never reached again
    assert history.losses.tolist() == [7, 6, 5.1, 4.1]
    assert history.eval_losses.tolist() == [6.5, 4.2]
    assert history.events == {}


def test_broken_rows_and_values_are_left_out(write):
    path = write(train(1, 5.0), train(2, float("nan")), train(3, None), {"note": "x"}, [1], end='{"step": 4, "tok')
    assert read_history(path).losses.tolist() == [5.0]


def test_smoothing_keeps_a_line_and_lowers_noise():
    line = np.linspace(9, 4, 600)
    np.testing.assert_allclose(_smooth(line)[:590], line[:590])
    noise = np.random.default_rng(0).normal(size=600)
    assert _smooth(noise).std() < 0.4
    assert _smooth(line[:3]).shape == (3,)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (np.log(40), np.log(600), [50, 100, 200, 500]),
        (np.log(90), np.log(101), [90, 92, 94, 96, 98, 100]),
        (np.log(2), np.log(9e6), [10**k for k in range(1, 7)]),
        (1, 900, [10.0 ** (17 * k) for k in range(1, 18)]),
    ],
)
def test_perplexity_ticks(low, high, ticks):
    assert _perplexity_ticks(low - 1e-9, high + 1e-9) == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (250, "250"), (1500, "1.5k"), (2.5e6, "2.5M"), (1.31e10, "13.1B")]
)
def test_short_numbers(number, text):
    assert _short(number) == text


EVENTS = ["refactorization", "momentum_reset", "other"]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [train(1, 8.0, "refactorization")],
        [evaluate(0, 8.3), *(train(s, 8 * 0.99**s, *EVENTS) for s in range(1, 200)), evaluate(199, 1.1)],
        [evaluate(0, 800.0), evaluate(1, 5.0)],
    ],
    ids=["empty", "one step", "a run", "huge loss"],
)
def test_plot(write, tmp_path, rows):
    plot_losses(write(*rows), tmp_path / "loss.png", "a run")
    picture = imread(tmp_path / "loss.png")
    assert picture.shape[:2] == (750, 1350)
    coloured = np.ptp(picture[..., :3], axis=-1) > 0.2  # text and axes are grey
    assert coloured.any() == (len(rows) > 0)


def test_a_title_is_a_folders_name_whatever_that_is(write, tmp_path):
    for title in ("a $\\no formula$", "no text \udcff"):
        plot_losses(write(train(1, 7.5)), tmp_path / "loss.png", title)
        assert imread(tmp_path / "loss.png").std() > 0
