"""What the documents name is there: files, tests that guard, programs and their flags."""

import argparse
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from megalr.comparison import compare
from megalr.errors import UserError
from megalr.train.arguments import parse_arguments

ROOT = Path(__file__).parents[2]
DOCUMENTS = (
    "README.md",
    "CHANGELOG.md",
    "csrc/README.md",
    *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))),
)
FOLDERS = "benchmarks|csrc|docs|ds_configs|examples|launchers|megalr|tests"


def text(document):
    return (ROOT / document).read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_is_there(document):
    named = set(re.findall(rf"(?<![\w./-])(?:{FOLDERS})/[\w./-]*\w", text(document)))
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_every_guarding_test_is_there():
    named = set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text("docs/development/regressions.md")))
    assert len(named) > 50
    assert [f"{path}::{name}" for path, name in sorted(named) if f"def {name}(" not in text(path)] == []


def commands(program):
    """The command lines of a program in all documents, without the program."""
    found = set()
    for document in DOCUMENTS:
        found |= set(re.findall(rf"{program}((?: +[^`\n#(,;]+)?)", text(document)))
    return sorted(line.strip() for line in found)


def parses(parse, line):
    try:
        parse(shlex.split(line))
    except (SystemExit, UserError):
        return False
    return True


def test_benchmarks_have_the_flags_that_are_shown():
    spec = importlib.util.spec_from_file_location("benchmark_launcher", ROOT / "launchers" / "benchmark.py")
    launcher = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launcher)
    shown = [line for line in commands(r"python launchers/benchmark\.py") if line != "methods"]
    assert len(shown) >= 5
    assert [line for line in shown if not parses(launcher.make_parser().parse_args, line)] == []


def test_the_comparison_has_the_flags_that_are_shown():
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    shown = [line for line in commands(r"python launchers/compare\.py") if line]
    assert len(shown) >= 2
    assert [line for line in shown if not parses(parser.parse_args, line)] == []


def test_pretraining_has_the_flags_that_are_shown():
    shown = [line for line in commands(r"launchers/pretrain\.py") if line and not re.search(r"\.\.\.|[$\\]", line)]
    assert len(shown) >= 8
    for line in shown:
        arguments = parse_arguments(["--deepspeed", "ds.json", *shlex.split(line)])  # the line's own counts
        assert arguments.deepspeed == "ds.json" or (ROOT / arguments.deepspeed).exists()


def test_modules_that_are_programs_are_there():
    named = {name for document in DOCUMENTS for name in re.findall(r"python -m ([\w.]+)", text(document))}
    missing = [name for name in sorted(named - {"deepspeed.launcher.runner"}) if importlib.util.find_spec(name) is None]
    assert len(named) > 3 and missing == []
