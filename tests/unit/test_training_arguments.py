"""The launchers' command lines."""

import pytest

from megalr.errors import UserError
from megalr.training.arguments import PretrainArguments, parse_arguments
from megalr.training.score import parse_score_arguments

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
    ],
)
def test_mistakes_are_user_errors(words, message):
    with pytest.raises(UserError, match=message):
        parse_arguments(words)


def test_help_lists_the_flags(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--help"])
    assert ended.value.code == 0
    assert "--galore-compatible-eval" in capsys.readouterr().out


def test_scoring_takes_only_the_text_flags_that_were_given():
    arguments = parse_score_arguments(["runs/x", "--sequence-length", "64", "--no-pack"])
    assert arguments.text == {"sequence_length": 64, "pack": False}
