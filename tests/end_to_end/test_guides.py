"""Every Python snippet of the guides runs."""

import re

from tests.end_to_end.commands import run
from tests.end_to_end.guide_snippets import PAGES
from tests.processes import python
from tests.unit.test_guides import PAGES as ALL
from tests.unit.test_guides import blocks


def test_every_page_with_python_is_run():
    assert {page.stem for page in ALL if blocks(page, "python")} == set(PAGES)


def test_every_snippet_runs(tmp_path):
    result = run(python("from tests.end_to_end.guide_snippets import main; main()"), tmp_path)
    assert result.code == 0, result.output
    found = dict(re.findall(r"^(\w+): (\d+) snippets$", result.output, re.M))
    assert found == {page.stem: str(len(blocks(page, "python"))) for page in ALL if page.stem in PAGES}
