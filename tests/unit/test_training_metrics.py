"""metrics.jsonl: rows survive a full disk, and whatever else stands in the file."""

import json
import os

import pytest

from megalr.train.loss_curve import read_history
from megalr.train.metrics import MetricsLog, read_rows

STRANGE = [
    "",
    "{",
    "[]",
    "7",
    "null",
    '{"step": "1"}',
    '{"step": true}',
    "{}",
    "[" * 100_000,
    '{"step": 1' + "0" * 5000 + "}",
]


@pytest.mark.parametrize("line", STRANGE, ids=lambda line: line[:12])
def test_lines_that_are_no_rows(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 0, "tokens": 0, "eval_loss": 2.0, "eval_perplexity": 7.0}, {"step": 2, "tokens": 8, "loss": 1.0}]
    path.write_text(f"{line}\n{json.dumps(rows[0])}\n{line}\n{json.dumps(rows[1])}\n{line}")
    assert list(read_rows(path)) == rows
    log = MetricsLog(path, enabled=True)
    assert log.untrained_perplexity() == 7.0
    assert read_history(path).losses.tolist() == [1.0]
    log.cut(1)
    assert path.read_text() == f"{line}\n{json.dumps(rows[0])}\n{line}\n"  # but what a kill has cut off


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'\xff\xfe\r\n{"step": 4}\n{"step": 3}\n\x00')
    assert list(read_rows(path)) == [{"step": 4}, {"step": 3}]
    MetricsLog(path, enabled=True).cut(3)
    assert path.read_bytes() == b'\xff\xfe\r\n{"step": 3}\n'


def test_a_full_disk_ends_nothing_and_rows_come_later(tmp_path, monkeypatch, caplog):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, enabled=True)
    log.append({"step": 1})
    room, opened = [False], type(path).open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, text):
            self.file.write(text[:3])  # a disk takes what it has room for
            self.file.flush()
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        type(path), "open", lambda self, *a, **k: opened(self, *a, **k) if room[0] else Full(opened(self, *a, **k))
    )
    log.append({"step": 2})
    log.append({"step": 3})
    assert caplog.text.count("No space left on device") == 1
    assert os.path.getsize(path) == len('{"step": 1}\n')
    room[0] = True
    log.append({"step": 4})
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4]


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/proc/self/mem")  # opened, but not read: the error of a disk
    with pytest.raises(OSError, match="Input/output error: '.*metrics.jsonl'"):
        list(read_rows(path))
