"""The documentation is complete, and what it shows works: names, methods, keys, and every snippet."""

import argparse
import builtins
import sys
from pathlib import Path

import pytest

import megalr
import megalr.layers.base
import megalr.optim.layer_events
import megalr.rules.base
from megalr.config.guards import GuardsConfig
from megalr.layers.registry import PARAMETRIZATIONS
from megalr.rules.registry import RULES
from tests.processes import run
from tests.registries import forgotten

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "_ext"))

import site_figures  # noqa: E402
import site_methods  # noqa: E402
import site_programs  # noqa: E402
import site_settings  # noqa: E402
import site_snippets  # noqa: E402
from site_snippets import Snippet  # noqa: E402

SURFACES = (megalr.rules.base, megalr.layers.base, megalr.optim.layer_events)
SNIPPETS = [snippet for page in site_snippets.pages() for snippet in site_snippets.snippets(page)]


def read(page):
    return (DOCS / page).read_text(encoding="utf-8")


def checked(*languages):
    return [snippet for snippet in SNIPPETS if snippet.language in languages and snippet.is_checked]


def test_every_public_name_is_documented():
    lines = read("reference/api.md").splitlines()
    described = {line.split(":: ")[1] for line in lines if line.startswith(".. auto")}
    assert [name for name in megalr.__all__ if not {name, f"megalr.{name}"} & described] == []
    assert [surface.__name__ for surface in SURFACES if surface.__name__ not in described] == []


@pytest.mark.parametrize("surface", SURFACES, ids=lambda module: module.__name__)
def test_what_plugins_use_has_docstrings(surface):
    own = [value for value in vars(surface).values() if getattr(value, "__module__", None) == surface.__name__]
    members = [(cls, name) for cls in own if isinstance(cls, type) for name in vars(cls) if not name.startswith("_")]
    functions = [f"{cls.__name__}.{name}" for cls, name in members if callable(getattr(cls, name))]
    assert [value.__name__ for value in own if callable(value) and not value.__doc__] == []
    inherited = {name for cls in own if isinstance(cls, type) for base in cls.__mro__[1:] for name in vars(base)}
    bare = [each for each in functions if not (eval(each, vars(surface)).__doc__ or each.split(".")[1] in inherited)]
    assert bare == []


def test_every_method_has_a_page_and_every_page_a_method():
    ours = {name for name, rule in RULES.items() if rule is None or rule.__module__.startswith("megalr.")}
    ours |= {name for name, kind in PARAMETRIZATIONS.items() if kind.__module__.startswith("megalr.")}
    pages = site_methods.pages()
    assert ours | set(site_methods.OTHERS) == set(pages)
    written = {path.relative_to(DOCS).as_posix() for path in (DOCS / "methods").glob("*.md")}
    assert set(pages.values()) == written
    index = read("methods.md")
    assert [page for page in written if f"]({page})" not in index] == []


@pytest.mark.parametrize("name", [name for name in site_methods.pages() if name not in ("AdamW", "full")])
def test_a_methods_page_says_what_there_is_to_say(name):
    page = read(site_methods.pages()[name])
    section = {"velora": "activations"}.get(name, name)
    assert f"```{{settings}} {section}\n" in page
    assert "\n$$\n" in page
    assert "json" in {snippet.language for snippet in SNIPPETS if snippet.page.endswith(site_methods.pages()[name])}
    for heading in ("State", "Settings", "When to use it", "Measurements", "Source and differences"):
        assert f"\n## {heading}\n" in page, heading
    if name not in site_methods.OTHERS:
        assert f"```{{facts}} {name}\n" in page


def test_a_page_quotes_measurements_that_are_there():
    quotes = [snippet for snippet in SNIPPETS if snippet.language == "{measurements}"]
    assert len(quotes) > 15
    for quote in quotes:
        source = (ROOT / quote.page).read_text(encoding="utf-8").splitlines()[quote.line - 1].split()[-1]
        assert site_figures.quoted(source, quote.text.splitlines()).count("\n") >= 4
    with pytest.raises(LookupError, match="no table"):
        site_figures.quoted("paper_tiny", ["a method of tomorrow"])


def test_settings_are_tried_on_the_real_reader():
    place = site_settings.place_of("guards")
    table = site_settings.table(place)
    assert "| `max_skipped` | integer ≥ 0 | `20` |" in table
    assert "| `spike_deviations` | number or `null` > 0 | `null` |" in table
    assert all(f"| `{field}` |" in table for field in vars(GuardsConfig()))
    assert "number in (0, 1)" in site_settings.table(site_settings.place_of("sltrain"))
    assert "[0, `interval` - 1]" in site_settings.table(site_settings.place_of("momentum_reset"))
    assert "≥ 2 · `frozen_steps`" in site_settings.table(site_settings.place_of("switchlora"))


@pytest.mark.parametrize("name", ["Muon", "GoLoreAdamW", "low_rank"])
def test_a_table_has_every_key_of_a_method(name):
    place = site_settings.place_of(name)
    table = site_settings.table(place)
    assert len(place.keys) > 3 and all(f"| `{key}` |" in table for key in place.keys)
    for key in place.keys:
        assert not place.accepts("nonsense")(1)
        assert not place.accepts(key)({"no": "value"})


def test_the_reference_has_every_section():
    page = read("reference/json.md")
    names = ("optimizer.params", "adamw", "rules", "megalr", "parametrizations", *site_settings.SECTIONS)
    assert [name for name in names if f"```{{settings}} {name}\n" not in page] == []


def test_the_reference_has_every_program():
    page, known = read("reference/commands.md"), set(site_programs.programs())
    shown = [line.split(" ", 1)[1].split(", ") for line in page.splitlines() if line.startswith("```{program-help} ")]
    assert [names for names in shown if not known & set(names)] == (
        [] if site_programs.commands() else [["megalr report"]]
    )
    named = {name for names in shown for name in names}
    # `python -m megalr.pretrain` is what launchers start, with the flags of `megalr pretrain`.
    assert known - named - {"megalr.pretrain"} == set()


def test_help_is_markdown_with_every_flag():
    parser = site_programs.parser_of("launchers/pretrain.py")
    text = site_programs.help_of(parser)
    flags = [action.option_strings[0] for action in parser._actions if action.help != argparse.SUPPRESS]
    assert len(flags) > 20
    assert [flag for flag in flags if flag != "-h" and f"`{flag}" not in text] == []


@pytest.mark.parametrize("snippet", checked("json"), ids=str)
def test_json_is_valid(snippet):
    with forgotten():  # plugins that it names
        assert site_snippets.fault_of_json(snippet) == ""


@pytest.mark.parametrize("snippet", checked("python"), ids=str)
def test_python_compiles(snippet):
    compile(snippet.text, str(snippet), "exec")


@pytest.mark.parametrize("page", sorted({snippet.page for snippet in SNIPPETS if snippet.runs}))
def test_python_runs(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "snippets", "__builtins__": builtins}
    for snippet in SNIPPETS:
        if snippet.page == page and snippet.runs:
            exec(compile(snippet.text, str(snippet), "exec"), namespace)


def test_command_lines_are_valid():
    shown = [(each, words) for each in checked(*site_snippets.SHELLS) for words in site_snippets.commands(each)]
    faults = [(str(each), site_snippets.fault_of_command(words)) for each, words in shown]
    assert sum(fault is not None for _, fault in faults) >= 10
    assert [(where, fault) for where, fault in faults if fault] == []


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("json", '{"optimizer": {"type": "GaLore"}}'),
        ("json", '"megalr": {"guards": {"max_skiped": 3}}'),
        ("json", '{"optimizer": '),
        ("sh", "python launchers/pretrain.py --deepspeed ds.json --no-such-flag"),
        ("sh", "LOCAL_SIZE=2 deepspeed --num_accelerators 2 launchers/pretrain.py --deepspeed ds.json --step 3"),
        ("sh", "deepspeed --acelerators 2 launchers/pretrain.py --deepspeed ds.json"),
        ("sh", "torchrun --nproc_per_node 2 examples/nothing.py"),
        ("sh", "python -m megalr.checkpoint export checkpoints out --to onnx"),
    ],
)
def test_a_wrong_snippet_is_found(language, text):
    snippet = Snippet("page.md", 1, language, text, "")
    if language == "json":
        assert site_snippets.fault_of_json(snippet)
    else:
        assert [site_snippets.fault_of_command(words) for words in site_snippets.commands(snippet)] != [""]
        assert all(map(site_snippets.fault_of_command, site_snippets.commands(snippet)))


def test_blocks_are_found_with_their_comments(tmp_path, monkeypatch):
    text = "<!-- run -->\n```python\nx = 1\n```\n\n- a list\n\n  ````sh\n  ls\n  ````\n"
    text += "<!-- not checked: a sketch -->\n```json\n{\n```\n"
    (tmp_path / "page.md").write_text(text, encoding="utf-8")
    monkeypatch.setattr(site_snippets, "ROOT", tmp_path)
    found = list(site_snippets.snippets("page.md"))
    assert [(each.language, each.text, each.runs, each.is_checked) for each in found] == [
        ("python", "x = 1", True, True),
        ("sh", "ls", False, True),
        ("json", "{", False, False),
    ]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    """Every link, anchor and reference leads somewhere; skipped without what requirements-docs.txt adds."""
    pytest.importorskip("furo")
    strict = ("--nitpicky", "--fail-on-warning", "--keep-going", "--quiet")
    command = [sys.executable, "-m", "sphinx", *strict, "-d", tmp_path / "trees", DOCS, tmp_path / "site"]
    assert run(command, limit=600).output == ""
    pages = {path.relative_to(tmp_path / "site").with_suffix(".md").as_posix() for path in tmp_path.rglob("*.html")}
    assert {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} <= pages
    api = (tmp_path / "site/reference/api.html").read_text(encoding="utf-8")
    assert [name for name in megalr.__all__ if f'id="megalr.{name}"' not in api] == []
