"""The scripts in examples/, each started by a launcher as its first line says."""

import re

import pytest

from tests.end_to_end.commands import ROOT, deepspeed, run, torchrun

PLUGINS = {"own_rule.py", "own_layers.py"}  # are no scripts: tests/deepspeed/test_plugins.py uses them
EXAMPLES = {
    "initialize.py": deepspeed,
    "deepspeed_optimizer.py": torchrun,
    "trainer.py": deepspeed,
}
UPDATES, MATRICES, PROCESSES = 40, 14, 2


def test_every_example_is_tested_and_short():
    scripts = {path.name: path for path in (ROOT / "examples").glob("*.py")}
    assert scripts.keys() == {*EXAMPLES, *PLUGINS}
    assert all(len(path.read_text().splitlines()) <= 40 for path in scripts.values())


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_learns_by_its_rule(tmp_path, name):
    result = run([*EXAMPLES[name](PROCESSES), ROOT / "examples" / name], tmp_path)

    assert result.code == 0, result.output
    losses = [float(found) for found in re.findall(r"loss'?:? '?(\d+\.\d+)", result.output)]
    assert len(losses) >= 4 and losses[-1] < losses[0] - 1 and losses[-1] < 6.5, result.output
    (calls,) = re.findall(r"(\d+) matrices updated by \w+ on this rank", result.output)
    # The two ranks share the 14 matrices' updates, about evenly.
    assert 0.3 * MATRICES * UPDATES < int(calls) < 0.7 * MATRICES * UPDATES
