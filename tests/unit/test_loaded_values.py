"""What no training goes on from is refused when it is loaded, whole as its files may be."""

from __future__ import annotations

import pytest
import torch

from megalr.checkpoint.loading import read_entries
from megalr.checkpoint.manifest import read_whole
from megalr.checkpoint.saving import write_entries
from megalr.errors import UserError
from megalr.layout.rectangles import Entry
from tests import known_state

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
NAN, INF = float("nan"), float("inf")


def load(folder, key, values):
    """Save a tensor, and load it into zeros, which it returns."""
    write_entries(folder, "one", known_state.document(1), {key: Entry.of(values)}, {}, keep=None, asynchronous=False)
    target = torch.zeros_like(values)
    read_entries(read_whole(folder / "one"), {key: Entry.of(target)}, None)
    return target


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("weights/head.weight", NAN, "not finite: weights of head.weight"),
        ("weights/head.weight", INF, "not finite: weights of head.weight"),
        ("weights/head.weight", -INF, "not finite: weights of head.weight"),
        ("exp_avg/norm.weight", -INF, "not finite: first moments of norm.weight"),
        ("exp_avg_sq/norm.weight", NAN, "not finite: second moments of norm.weight"),
        ("exp_avg_sq/norm.weight", -1e-30, "negative, as no mean of squares is: second moments of norm.weight"),
        ("rule/q.weight/exp_avg", NAN, "not finite: a rule's state of q.weight/exp_avg"),
        ("rule/q.weight/exp_avg_sq_row", -1.0, "negative, .*: a rule's state of q.weight/exp_avg_sq_row"),
        ("frozen/q.weight", NAN, "not finite: frozen weights of q.weight"),
        ("frozen/q.weight", INF, "not finite: frozen weights of q.weight"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_cannot_be_trained_on_are_refused(tmp_path, key, value, words, dtype):
    values = torch.ones(3, 5, dtype=dtype)
    values[2, 3] = value
    with pytest.raises(UserError, match=f"one holds values that are {words}.* load an older checkpoint"):
        load(tmp_path, key, values)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("buffers/mask", -INF),
        ("buffers/mask", NAN),
        ("frozen/mask", -INF),
        ("weights/head.weight", 3e38),
        ("exp_avg/norm.weight", -3e38),
        ("exp_avg_sq/norm.weight", -0.0),
        ("rule/exp_avg_sq/exp_avg", -1.0),  # a parameter of that name
    ],
)
def test_what_may_be_is_loaded(tmp_path, key, value):
    values = torch.ones(3, 5)
    values[2, 3] = value
    assert torch.equal(load(tmp_path, key, values).nan_to_num(7), values.nan_to_num(7))


def test_codes_and_nothing_are_loaded(tmp_path):
    codes = torch.arange(6, dtype=torch.uint8).view(2, 3)
    assert torch.equal(load(tmp_path / "codes", "rule/q.weight/exp_avg_sq", codes), codes)
    assert load(tmp_path / "empty", "weights/none", torch.zeros(0, 3)).numel() == 0
