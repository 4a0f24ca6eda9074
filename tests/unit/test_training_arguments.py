"""The launchers' command lines."""

import pytest

from megalr.errors import UserError
from megalr.train.arguments import Interval, PretrainArguments, parse_arguments
from megalr.train.score import parse_score_arguments

JSON = "ds_configs/zero2_lowrank.json"


def test_defaults_of_the_parser_and_of_the_dataclass_agree():
    assert parse_arguments(["--deepspeed", JSON]) == PretrainArguments(deepspeed=JSON)


@pytest.mark.parametrize(
    "words",
    [
        ["--local_rank=1", "--deepspeed", JSON],  # the deepspeed launcher
        ["--deepspeed_config", JSON],
        ["--local-rank", "0", "--deepspeed", JSON],
    ],
)
def test_what_launchers_add_is_accepted(words):
    assert parse_arguments(words).deepspeed == JSON


def test_several_texts():
    arguments = parse_arguments(["--deepspeed", JSON, "--dataset", "a.txt", "b.txt", "--no-pack"])
    assert (arguments.dataset, arguments.pack) == (("a.txt", "b.txt"), False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--deepspeed"),
        (["--deepspeed", JSON, "--step", "3"], "unrecognized arguments: --step"),
        (["--deepspeed", JSON, "--steps", "0"], "--steps: 0 is not a positive whole number"),
        (["--deepspeed", JSON, "--steps", "many"], "--steps"),
        (["--deepspeed", JSON, "--resume", "--overwrite"], "give one of them"),
        (
            ["--deepspeed", JSON, "--save-every", "0"],
            "--save-every: 0 is neither a number of updates",
        ),
        (["--deepspeed", JSON, "--save-every", "30x"], "30x is neither"),
        (["--deepspeed", JSON, "--save-every", "m"], "m is neither"),
        (["--deepspeed", JSON, "--save-every=-5m"], "-5m is neither"),
        (["--deepspeed", JSON, "--save-every", "infm"], "infm is neither"),
        (["--deepspeed", JSON, "--save-every", "nans"], "nans is neither"),
        (["--deepspeed", JSON, "--save-every", ""], "is neither"),
        (["--deepspeed", JSON, "--steps=--"], "--steps: expected a value, not --"),
        (["--deepspeed", JSON, "--output", ""], "--output: expected a name, found an empty one"),
        (["--deepspeed", JSON, "--dataset", "a.txt", " "], "--dataset: expected a name"),
    ],
)
def test_mistakes_are_user_errors(words, message):
    with pytest.raises(UserError, match=message):
        parse_arguments(words)


@pytest.mark.parametrize(
    ("word", "interval"),
    [
        ("500", Interval(updates=500)),
        ("90s", Interval(seconds=90)),
        ("30m", Interval(seconds=1800)),
        ("1.5h", Interval(seconds=5400)),
    ],
)
def test_checkpoints_come_by_updates_or_by_time(word, interval):
    assert parse_arguments(["--deepspeed", JSON, "--save-every", word]).save_every == interval


def test_when_an_interval_is_over():
    assert [Interval(updates=3).is_over(n, 1e9) for n in (1, 2, 3, 4, 6)] == [False, False, True, False, True]
    assert [Interval(seconds=60).is_over(3, seconds) for seconds in (0.0, 59.9, 60.0, 61.0)] == [
        False,
        False,
        True,
        True,
    ]


def test_help_lists_the_flags(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--help"])
    assert ended.value.code == 0
    assert "--galore-compatible-eval" in capsys.readouterr().out


def test_scoring_takes_only_the_text_flags_that_were_given():
    arguments = parse_score_arguments(["runs/x", "--sequence-length", "64", "--no-pack"])
    assert arguments.text == {"sequence_length": 64, "pack": False}
