"""The ``megalr`` command: its subcommands, the launcher that it starts, and the files that come with the package."""

import importlib.util
import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from megalr import commands, resources
from megalr.flags import PlainParser, typed_as
from megalr.train.arguments import parse_arguments
from tests.processes import ROOT
from tests.unit.web_runs import write_run


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in commands.OF_A_LAUNCHER:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package with its files inside, as setup.py builds it, and no checkout around it."""
    package = tmp_path / "site-packages" / "megalr"
    for kind, source in resources.IN_CHECKOUT.items():
        shutil.copytree(ROOT / source, package / kind)
    monkeypatch.setattr(resources, "_PACKAGE", package)
    return package


@pytest.fixture
def replaced(monkeypatch):
    """What os.execv was called with, and the environment then, in place of the call."""
    found = []

    def execv(path, words):
        found.append((path, words, dict(os.environ)))
        raise SystemExit(0)

    environment = dict(os.environ)
    monkeypatch.setattr(os, "execv", execv)
    yield found
    os.environ.clear()
    os.environ.update(environment)


def printed_by(capsys, *words, code=0):
    assert commands.main(words) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


def test_help_names_every_command_and_every_shipped_file(capsys):
    printed = printed_by(capsys)
    assert printed == printed_by(capsys, "--help")
    for name in ("pretrain", "evaluate", "plan", "compare", "checkpoint", "report"):
        assert f"\n  {name} " in printed
    for word in ("zero2_lowrank", "9m", "paper_smoke"):
        assert f" {word} " in printed
    assert printed_by(capsys, "--version").startswith("megalr 0.")


@pytest.mark.parametrize("name", [*commands.COMMANDS])
def test_every_command_explains_itself_by_the_name_that_was_typed(capsys, name):
    try:
        assert commands.main([name, "--help"]) == 0
    except SystemExit as ended:  # argparse's
        assert ended.code == 0
    printed = capsys.readouterr().out
    assert f"usage: megalr {name} " in printed
    assert ".py [" not in printed


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["plna"], "there is no command 'plna': did you mean plan?"),
        (["train"], "there is no command 'train': write one of pretrain, evaluate, plan, compare, checkpoint, report"),
        (["plan", "--foo"], "(`megalr plan --help` lists the flags)"),
        (["checkpoint", "inspect"], "(`megalr checkpoint inspect --help` lists the flags)"),
        (["compare", "--recipe", "nowhere", "--output", "x"], "no recipe at nowhere; ready ones are merge_rounding, "),
        (["pretrain", "--foo", "--deepspeed", "zero2_lowrank.json"], "unrecognized arguments: --foo"),
        (["pretrain", "--deepspeed", "nowhere.json"], "no DeepSpeed configuration at nowhere.json; ready ones are in"),
        (["report", "--output", "x.html"], "arguments are required: RUN\n(`megalr report --help` lists the flags)"),
        (["report", "nowhere"], "there is no "),
    ],
)
def test_a_mistake_is_answered_with_a_sentence(capsys, monkeypatch, tmp_path, words, sentence):
    monkeypatch.chdir(tmp_path)
    printed = printed_by(capsys, *words, code=2)
    assert printed.startswith("error: ") and sentence in printed
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", resources.IN_CHECKOUT)
def test_shipped_files_are_found_in_a_checkout_and_in_an_installation(request, kind):
    names = resources.names(kind)
    assert len(names) >= 7
    assert resources.folder(kind) == ROOT / resources.IN_CHECKOUT[kind]
    package = request.getfixturevalue("installed")
    assert resources.folder(kind) == package / kind
    assert resources.names(kind) == names


@pytest.mark.parametrize("name", ["zero2_lowrank.json", "zero2_lowrank", "ds_configs/zero2_lowrank.json"])
def test_a_shipped_file_has_three_names(installed, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    shipped = installed / "ds_configs" / "zero2_lowrank.json"
    assert resources.find(name, "ds_configs") == shipped
    assert parse_arguments(["--deepspeed", name, "--steps", "4"]).deepspeed == str(shipped)
    assert parse_arguments([f"--deepspeed_config={name}"]).deepspeed == str(shipped)


@pytest.mark.parametrize("name", ["my/zero2_lowrank.json", "zero9.json", "x" * 300, "recipes/base.json"])
def test_other_names_stay_as_they_are(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    assert parse_arguments(["--deepspeed", name]).deepspeed == name


def test_a_file_of_the_users_comes_first(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero2_lowrank.json").write_text("{}")
    assert parse_arguments(["--deepspeed", "zero2_lowrank.json"]).deepspeed == "zero2_lowrank.json"


def test_plan_knows_shipped_shapes(capsys, installed, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "| 9m | low-rank 32 | 8,508,544 |" in printed_by(capsys, "plan", "--models", "9m", "--ranks", "32")


def test_pretrain_starts_deepspeed(capsys, monkeypatch, tmp_path, replaced):
    monkeypatch.chdir(tmp_path)
    for name in ("LOCAL_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    flags = ["--deepspeed", "zero2_lowrank.json", "--steps", "4"]
    with pytest.raises(SystemExit):
        commands.main(["pretrain", "--processes", "3", *flags, "--port", "31300", "--output", "my run"])
    ((path, words, environment),) = replaced
    assert path == words[0] == sys.executable
    assert words[1:] == [
        *("-m", "deepspeed.launcher.runner", "--num_accelerators", "3", "--master_port", "31300"),
        *("--module", "megalr.pretrain", *flags, "--output", "my run"),
    ]
    assert (environment["LOCAL_SIZE"], environment["OMP_NUM_THREADS"]) == ("3", "2")
    assert environment["MALLOC_MMAP_MAX_"] == "0"
    assert capsys.readouterr().out == (
        "deepspeed --num_accelerators 3 --master_port 31300 --module megalr.pretrain --deepspeed zero2_lowrank.json "
        "--steps 4 --output 'my run'\n"
    )


def test_processes_and_threads_that_are_set_stay(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert commands.launcher_environment({}, None)["OMP_NUM_THREADS"] == "3"
    added = commands.launcher_environment({"LOCAL_SIZE": "6", "PATH": "/bin"}, None)
    assert "LOCAL_SIZE" not in added and added["OMP_NUM_THREADS"] == "1"
    assert added["PATH"].endswith(":/bin")
    assert "OMP_NUM_THREADS" not in commands.launcher_environment({"OMP_NUM_THREADS": "9"}, None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert set(commands.launcher_environment({}, None)) == {"PATH"}


@pytest.mark.parametrize("name", commands.OF_A_LAUNCHER)
def test_pretrain_under_a_launcher_is_one_of_its_processes(monkeypatch, replaced, name):
    monkeypatch.setenv(name, "0")
    monkeypatch.setattr(sys, "argv", ["somewhere/megalr", "pretrain"])
    given = []
    monkeypatch.setattr("megalr.pretrain.main", lambda words: given.append(list(words)) or 75)
    assert commands.main(["pretrain", "--deepspeed", "ds.json"]) == 75
    assert given == [["--deepspeed", "ds.json"]] and not replaced
    assert sys.argv == ["megalr", "pretrain", "--deepspeed", "ds.json"]


@pytest.mark.parametrize("runs", [["run"], ["run", "other"]])
def test_report_writes_the_page_of_runs(capsys, monkeypatch, tmp_path, runs):
    monkeypatch.chdir(tmp_path)
    for run in runs:
        write_run(tmp_path / run)
    assert printed_by(capsys, "report", *runs, "--output", "page.html") == "page.html\n"
    assert all(f">{run}<" in (tmp_path / "page.html").read_text() for run in runs)


def test_report_without_a_run_prints_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("MEGALR_OPS", "torch")
    printed = printed_by(capsys, "report")
    assert "deepspeed " in printed and "MEGALR_OPS" in printed


def test_the_name_that_was_typed_is_for_its_own_parsers_alone():
    with typed_as("megalr x"):
        parser = PlainParser(prog="x.py")
        (sub,) = [parser.add_subparsers().add_parser("y")]
    assert (parser.prog, sub.prog) == ("megalr x", "megalr x y")
    assert PlainParser(prog="x.py").prog == "x.py"


LAUNCHERS = ROOT / "launchers"


@pytest.mark.parametrize("launcher", sorted(path.stem for path in LAUNCHERS.glob("*.py")))
def test_launchers_hide_no_package(launcher, monkeypatch):
    """Such as Hugging Face's evaluate, which tasks of lm-evaluation-harness import."""
    monkeypatch.setattr(sys, "path", [str(LAUNCHERS), f"{ROOT}/docs/../launchers/", *sys.path])  # as Python starts it
    runpy.run_path(str(LAUNCHERS / f"{launcher}.py"), run_name="launcher")
    hidden = [
        path.stem for path in LAUNCHERS.iterdir() if (spec := importlib.util.find_spec(path.stem)) and is_in(spec)
    ]
    assert not hidden


def is_in(spec):
    """Whether a module is found in the launchers' folder."""
    places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
    return any(LAUNCHERS in Path(place).resolve().parents for place in places)
