"""The comparison of methods when something goes wrong: runs that fail, benchmarks that are killed."""

import pytest

from megalr.benchmarks.results import Results
from tests.unit.method_recipes import compare, method, starts


@pytest.mark.parametrize(("rate", "code"), [(7, 2), (8, -9)])
def test_a_run_that_fails_holds_no_other_up(write, launchers, capsys, rate, code):
    given = {"a": {**method(), "learning_rates": [0.01, rate, 0.04]}, "b": {**method(), "learning_rates": [0.02]}}
    path = write(methods=given)
    with pytest.raises(SystemExit) as ended:
        compare(path, launchers)
    first = ["0.01 0", f"{rate} 0", "0.04 0", "0.02 0", "0.02 1", "0.02 2"]  # "a" is not repeated
    assert starts(launchers) == first
    log = next((path.parent / "out put" / "runs").glob("*.log"))
    lines = str(ended.value.code).strip().splitlines()  # Python prints it and exits with 1
    assert lines[1:] == [f"  a, learning rate {rate}, seed 0: {log}"]
    printed = capsys.readouterr().out
    assert f"[2/8] error: a, learning rate {rate}, seed 0 failed with exit code {code}; its last lines" in printed
    assert ("  something is broken\n" in printed) == (rate == 7)
    assert "a: a run of its grid failed; not repeated" in printed
    assert "[6/6] b" in printed
    table = (path.parent / "out put" / "table.md").read_text()
    assert f"| a | - | - | 0.01: 110.00; {rate}: -; 0.04: 120.00 |" in table
    assert "| b | 148.00 (" in table
    assert "Incomplete" in table
    with pytest.raises(SystemExit):
        compare(path, launchers)
    assert starts(launchers) == [*first, f"{rate} 0"]
    assert len(Results(path.parent / "out put" / "results.jsonl").rows()) == 5
