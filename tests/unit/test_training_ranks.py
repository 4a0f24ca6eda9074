"""The variables that say which process of a run this one is."""

import pytest

from megalr.errors import UserError
from megalr.train.ranks import start_ranks

WHOLE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
OTHERS = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "PMI_SIZE", "PMI_RANK", "DEEPSPEED_TIMEOUT")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"RANK": None}, "WORLD_SIZE is 1, but RANK is not set: start with `deepspeed`"),
        ({"WORLD_SIZE": None}, "RANK is set, but WORLD_SIZE is not"),
        ({"LOCAL_RANK": None}, "RANK is set, but LOCAL_RANK is not"),
        ({"MASTER_ADDR": ""}, "RANK is set, but MASTER_ADDR is not"),
        ({"MASTER_PORT": None}, "RANK is set, but MASTER_PORT is not"),
        ({"RANK": "5", "WORLD_SIZE": "2"}, "variable RANK is '5': expected a whole number from 0 to 1"),
        ({"RANK": "x"}, "variable RANK is 'x'"),
        ({"WORLD_SIZE": "0"}, "variable WORLD_SIZE is '0': expected a whole number from 1"),
        ({"LOCAL_RANK": "-1"}, "variable LOCAL_RANK is '-1'"),
        ({"MASTER_PORT": "70000"}, "variable MASTER_PORT is '70000': expected a whole number from 0 to 65535"),
        ({"MASTER_ADDR": "nowhere.invalid"}, "MASTER_ADDR is nowhere.invalid, which has no address"),
        ({"DEEPSPEED_TIMEOUT": "1.5"}, "variable DEEPSPEED_TIMEOUT is '1.5'"),
        (dict.fromkeys(WHOLE) | {"OMPI_COMM_WORLD_SIZE": "two"}, "variable OMPI_COMM_WORLD_SIZE is 'two'"),
    ],
)
def test_what_describes_no_process_is_refused_at_once(monkeypatch, changes, words):
    for name, value in {**dict.fromkeys(OTHERS), **WHOLE, **changes}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        start_ranks()
