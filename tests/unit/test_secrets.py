"""Keys and passwords of the JSON are for their services alone."""

import logging

import pytest

from megalr.config import text
from megalr.config.secrets import is_secret, secrets_in, without_secrets
from megalr.errors import UserError
from megalr.train.quiet import hide

CONTENT = {
    "comet": {"enabled": True, "api_key": "of comet", "experiment_key": "a name"},
    "services": [{"authToken": "of one", "passwords": ["p", "q"], "port": 1}],
    "credentials": {"user": "me", "inner": {"word": "w"}},
    "megalr": {"seed": 1},
}


@pytest.mark.parametrize(
    "key", ["api_key", "apiKey", "WANDB_API_KEY", "token", "hf-token", "Password", "client_secret"]
)
def test_these_are_secrets(key):
    assert is_secret(key, "s")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_train_tokens", "5"),
        ("eos_token_id", "2"),
        ("tokenizer", "t5-base"),
        ("key", "q"),
        ("token", 3),
        ("secret", True),
    ],
)
def test_these_are_not(key, value):
    assert not is_secret(key, value)


def test_they_are_left_out_wherever_they_are():
    assert without_secrets(CONTENT) == {
        "comet": {"enabled": True, "experiment_key": "a name"},
        "services": [{"port": 1}],
        "megalr": {"seed": 1},
    }
    assert secrets_in(CONTENT) == {"of comet", "of one", "p", "q", "me", "w"}
    assert CONTENT["comet"]["api_key"] == "of comet"


def test_a_key_that_is_given_twice_is_not_shown():
    with pytest.raises(UserError, match='has "api_key" twice in one object: remove one') as error:
        text.parse('{"comet": {"api_key": "first", "api_key": "second"}}', "mine.json")
    assert "first" not in str(error.value) and "second" not in str(error.value)


def test_a_library_that_logs_the_whole_json_does_not_log_them(caplog):
    logger = logging.getLogger("DeepSpeed")
    before = list(logger.filters)
    try:
        hide(secrets_in(CONTENT))
        logger.addHandler(caplog.handler)
        logger.warning("json = %s", CONTENT)
        logger.warning("100 %")
    finally:
        logger.removeHandler(caplog.handler)
        logger.filters[:] = before
    assert "'api_key': '***'" in caplog.text and "of comet" not in caplog.text
    assert "'experiment_key': 'a name'" in caplog.text and "100 %" in caplog.text
