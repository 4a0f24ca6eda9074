"""What a run leaves at its end."""

import json
from types import SimpleNamespace

from megalr.train.run_folder import RunFolder
from megalr.train.summary import write_summary


def test_a_plot_that_cannot_be_written_takes_no_summary_with_it(tmp_path, caplog):
    folder = RunFolder(tmp_path)
    folder.plot.mkdir()
    write_summary({"perplexity": 7.0}, SimpleNamespace(folder=folder))
    assert json.loads(folder.summary.read_text()) == {"perplexity": 7.0}
    assert f"{folder.plot} cannot be written: Is a directory" in caplog.text
