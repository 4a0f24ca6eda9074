"""Tables and numbers as text."""

import numpy as np
import pytest

from megalr.formatting import _cell, human_bytes, markdown_table, summary_table


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (7_414_000, "7.41 MB"),
        (12_340_000, "12.3 MB"),
        (999_400_000, "999 MB"),
        (999_600_000, "1.00 GB"),
        (3_655_864_320, "3.66 GB"),
        (5e15, "5.00 PB"),
    ],
)
def test_human_bytes(number, words):
    assert human_bytes(number) == words


def test_summary_table():
    rows = [("perplexity", 96.4142), ("unigram", 1234.5), None, ("tokens", 1228800), ("weights", "5.46 MB")]
    assert summary_table(rows).splitlines() == [
        "======================",
        "perplexity       96.41",
        "unigram          1,234",
        "----------------------",
        "tokens       1,228,800",
        "weights        5.46 MB",
        "======================",
    ]
    assert summary_table([]) == "===\n==="


@pytest.mark.parametrize(
    ("value", "text"), [(True, "True"), (None, "None"), (0.001234567, "0.001235"), (np.pi, "3.142")]
)
def test_table_cells(value, text):
    assert _cell(value) == text


def test_short_rows_of_a_table_are_filled():
    lines = markdown_table(("name", "a", "b"), [["x", "1", "2"], ["y", "missing"]]).splitlines()
    assert lines == ["| name | a | b |", "| --- | ---: | ---: |", "| x | 1 | 2 |", "| y | missing |  |"]
