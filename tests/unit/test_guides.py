"""The guides: messages that megalr really has, JSON and recipes that it takes, links that lead somewhere."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from megalr.comparison.recipe import read_recipe
from megalr.config.settings import MegalrConfig
from megalr.config.text import parse
from megalr.hosts.features import refuse_features
from tests.registries import forgotten
from tests.structure import sources

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [DOCS / "getting_started.md", DOCS / "maturity.md", *sorted((DOCS / "guides").glob("*.md"))]
# Of the shell and of DeepSpeed, which the guide explains as well.
NOT_OURS = (
    "No such file or directory",
    "You are using ZeRO with an untested optimizer",
    "Setting accelerator to CPU",
    "Attempting to get learning rate from scheduler before it has started",
    "address already in use",
    "DEPRECATION: ...",
    "deepspeed",
)


@pytest.fixture(autouse=True)
def registries():
    """What a guide's plugin registers is forgotten after the test."""
    with forgotten():
        yield


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


def all_blocks(language: str) -> list[tuple[str, str]]:
    found = [(page.stem, text) for page in PAGES for text in blocks(page, language)]
    assert found
    return found


@cache
def said() -> str:
    """All that megalr's strings say, one a line; what an f-string puts in is a gap."""
    found = []
    for module in sources():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
    return "\n".join(found)


def messages() -> list[str]:
    """What the troubleshooting guide's tables have in their first columns, in backticks."""
    text = (DOCS / "guides" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row)]


def test_every_message_that_is_explained_is_one_of_ours():
    found = messages()
    assert len(found) > 90
    parts = [(message, part.strip()) for message in found for part in message.split("...") if part.strip(' "=:,;()')]
    assert [pair for pair in parts if pair[0] not in NOT_OURS and pair[1].strip('"') not in said()] == []


@pytest.mark.parametrize(("page", "text"), all_blocks("json"))
def test_every_json_is_taken(page, text, monkeypatch, tmp_path):
    example = (DOCS / "guides" / "own_rules_and_layers.md", "python")
    (tmp_path / "my_rules.py").write_text(blocks(*example)[0], encoding="utf-8")
    (tmp_path / "examples").symlink_to(DOCS.parent / "examples")
    monkeypatch.chdir(tmp_path)
    content = parse(text, page)
    MegalrConfig.from_json(content)
    refuse_features(content)


def test_every_recipe_is_taken(tmp_path):
    for number, (_, text) in enumerate(all_blocks("yaml")):
        assert yaml.safe_load(text)["base"] == "base.json"
        (tmp_path / "base.json").write_bytes((DOCS.parent / "launchers/recipes/base.json").read_bytes())
        recipe = tmp_path / f"{number}.yaml"
        recipe.write_text(text, encoding="utf-8")
        assert len(read_recipe(recipe).methods) == 3


def anchors(page: Path) -> set[str]:
    """What GitHub and MyST call the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_to_a_page_and_a_heading(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link
