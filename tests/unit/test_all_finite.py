"""The check of gradients is exact, whatever its road."""

import pytest
import torch

from megalr.optim.finiteness import all_finite


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, -2.0], True),
        ([3e38, -3e38], True),  # whose squares overflow
        ([1.0, float("inf")], False),
        ([float("-inf"), 0.0], False),
        ([0.0, float("nan")], False),
        ([3e38, float("nan")], False),
    ],
)
def test_one_bad_element_is_found(values, expected):
    assert all_finite([torch.ones(1000), torch.tensor(values)]) is expected


def test_nothing_is_finite():
    assert all_finite([])
