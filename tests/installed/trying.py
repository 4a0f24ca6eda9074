"""Use an installed megalr as its users do: in an environment of its own, with a new home, from another folder."""

from __future__ import annotations

import os
import re
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megalr.processes import free_port
from tests.processes import ROOT, ProcessError, run

INSTALL_SECONDS = 1800.0
SECONDS = 300.0  # for one program
COMPARISON_SECONDS = 1500.0
NOBODY = "65534"  # the user and the group without rights
SMALL = ["--steps", "4", "--batch-size", "4", "--sequence-length", "64", "--max-train-tokens", "20000"]
SMALL += ["--max-eval-tokens", "2000"]
COMPILERS = re.compile(r"^([\w.]+-)*(g\+\+|gcc|c\+\+|cc|cpp|clang|clang\+\+|nvcc)(-[\d.]+)?$")
# Of whoever starts this, and nothing to a new user.
NOT_INHERITED = ("PYTHONPATH", "VIRTUAL_ENV", "CXX", "CC", "CUDA_HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR", "MAKEFLAGS")
OF_LIBRARIES = re.compile("^(MEGALR|HF|TRANSFORMERS|DS|DEEPSPEED|TRITON|TORCH)_")
UNWRITABLE = "/dev/null/home"  # for root as well


@dataclass(frozen=True)
class Check:
    """A program that a user runs.

    Attributes:
        name: for the line that is printed.
        words: the program.
        expected: what it prints, among other things.
        environment: what it has beside a new user's.
        limit: seconds.
        as_nobody: whether it is run by an ordinary user, where this process may choose one.
    """

    name: str
    words: Sequence[str | Path]
    expected: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    limit: float = SECONDS
    as_nobody: bool = False


@dataclass(frozen=True)
class Installation:
    """megalr in an environment of its own.

    Attributes:
        folder: of the environment.
        is_whole: whether everything that megalr needs is in it; otherwise it is in this Python's own.
    """

    folder: Path
    is_whole: bool

    @property
    def python(self) -> Path:
        """The interpreter."""
        return self.folder / "bin" / "python"

    def program(self, name: str) -> list[str | Path]:
        """The words that run a script of the environment; DeepSpeed's is not there if DeepSpeed is elsewhere."""
        script = self.folder / "bin" / name
        return [script] if script.exists() else [self.python, "-m", "deepspeed.launcher.runner"]


def install(distribution: Path, folder: Path, *, whole: bool) -> Installation:
    """Make a virtual environment, and install a wheel or an sdist there.

    Args:
        distribution: the file.
        folder: for the environment.
        whole: whether to install what megalr needs, too, in the versions of requirements.txt. Otherwise the environment
            sees the packages of this Python, all but megalr.
    """
    run([_interpreter(whole), "-m", "venv", folder], env={"PYTHONPATH": None})
    installation = Installation(folder, whole)
    pip = [installation.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if whole:
        pip += ["--constraint", ROOT / "requirements.txt"]
    else:
        (packages,) = folder.glob("lib/python*/site-packages")
        (packages / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
        pip += ["--no-deps", "--ignore-installed"]  # an sdist is built with setuptools of its own, which pip downloads
    run([*pip, distribution.absolute()], cwd=folder, env={"PYTHONPATH": None}, limit=INSTALL_SECONDS)
    return installation


def checks(installation: Installation, place: Path, *, comparison: bool) -> Iterator[Check]:
    """What is tried, in this order, in one folder.

    Args:
        installation: what to try.
        place: a folder for tools.
        comparison: whether methods are compared, which takes five minutes.
    """
    megalr, main_job = installation.program("megalr"), ["--deepspeed", "zero2_lowrank.json", *SMALL]
    deepspeed = [*installation.program("deepspeed"), "--master_port", str(free_port())]
    module = [installation.python, "-m", "megalr.pretrain", *main_job, "--output"]
    yield Check("megalr report", [*megalr, "report"], [f"in {installation.folder}/lib/"])
    yield Check("megalr plan", [*megalr, "plan", "--models", "9m", "--ranks", "32"], ["| 9m | low-rank 32 | 8,508,544"])
    yield Check(
        "deepspeed --module megalr.pretrain",
        [*deepspeed, "--module", "megalr.pretrain", *main_job, "--export", "a dense model"],
        ["held-out perplexity", "(2 processes x 2)", "bytes per rank"],
        {"LOCAL_SIZE": "2"},
    )
    run_folder = "runs/zero2_lowrank"
    resumed = ["--deepspeed", "zero2_lowrank.json", *SMALL[2:], "--steps", "6", "--output", run_folder, "--resume"]
    yield Check("megalr pretrain --resume", [*megalr, "pretrain", *resumed], ["after step 4", "held-out perplexity"])
    yield Check("a named model", [*module, "named", "--model", "9m"], ["model: 8,508,544 parameters"])
    inspected = [*megalr, "checkpoint", "inspect", f"{run_folder}/checkpoints"]
    yield Check("megalr checkpoint inspect", inspected, ["step6", "step4"])
    yield Check("megalr checkpoint verify", [*megalr, "checkpoint", "verify", f"{run_folder}/checkpoints"], ["step6"])
    exported = [*megalr, "checkpoint", "export", f"{run_folder}/checkpoints", "exported", "--to", "hf"]
    yield Check("megalr checkpoint export", exported, ["exported: hf, float32"])
    yield Check("megalr evaluate, a run", [*megalr, "evaluate", run_folder], ["held-out perplexity"])
    text = ["--sequence-length", "64", "--max-eval-tokens", "2000"]
    yield Check("megalr evaluate, an export", [*megalr, "evaluate", "a dense model", *text], ["held-out perplexity"])
    home = place / "an empty home"  # where nothing has been compiled before
    home.mkdir()
    bare = {"PATH": str(_without_compilers(place)), "HOME": str(home)}
    yield Check("without a compiler", [*module, "bare"], ["no C++ compiler", "held-out perplexity"], bare)
    nobody = {"HOME": UNWRITABLE}
    yield Check("as an ordinary user without a home", [*module, "x"], ["held-out perplexity"], nobody, as_nobody=True)
    if comparison:
        compared = ["compare", "--recipe", "paper_smoke", "--output", "compared", "--jobs", "2"]
        yield Check("megalr compare", [*megalr, *compared], ["| Muon |"], limit=COMPARISON_SECONDS)


def perform(check: Check, installation: Installation, place: Path) -> str:
    """Run a program as a new user, in a folder with a space in its name.

    Args:
        check: the program.
        installation: whose it is.
        place: gets the user's home and folder.

    Returns:
        A line: how long it took, or why it was not run.

    Raises:
        ProcessError: it failed, or printed something else.
    """
    words, owner = list(check.words), "nobody" if check.as_nobody else "me"
    folder, home, temporary = (place / f"{kind} of {owner}" for kind in ("a folder", "a home", "temporary files"))
    for each in (folder, home, temporary):
        each.mkdir(exist_ok=True)
    if check.as_nobody and os.getuid() == 0:
        setpriv = shutil.which("setpriv")
        hidden = next((each for each in _ways_to(installation.python, folder) if not each.stat().st_mode & 1), None)
        if setpriv is None or hidden is not None:
            return "not run: " + ("there is no setpriv" if setpriv is None else f"{hidden} is for its owner alone")
        for each in (folder, home, temporary):
            os.chown(each, int(NOBODY), int(NOBODY))
        words = [setpriv, f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--", *words]
    unset = dict.fromkeys([*NOT_INHERITED, *filter(OF_LIBRARIES.match, os.environ)])
    binaries = f"{installation.folder / 'bin'}{os.pathsep}"
    given = {"HOME": str(home), "TMPDIR": str(temporary), "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    env = {**unset, **given, **check.environment}
    env["PATH"] = binaries + str(env["PATH"])
    start = time.monotonic()
    output = run(words, cwd=folder, env=env, limit=check.limit).output
    missing = [words for words in check.expected if words not in output]
    if missing:
        raise ProcessError(f"{check.name} did not print {missing}, but\n{output}")
    return f"{time.monotonic() - start:.0f} s"


def _interpreter(whole: bool) -> str:
    """This Python or, where others cannot reach it, the system's, which needs its packages in the environment."""
    own = Path(sys.executable).resolve()
    system = Path("/usr/bin/python3")
    is_hidden = any(not each.stat().st_mode & 1 for each in own.parents)
    if not (whole and is_hidden and system.exists()):
        return str(own)
    code = "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))"
    return str(own if run([system, "-c", code], check=False).code else system)


def _ways_to(*files: Path) -> list[Path]:
    """Every folder that has to be passed on the way to files, and to what they are links to."""
    found = [each for file in files for path in (file.absolute(), file.resolve()) for each in path.parents]
    return [*found, *(file for file in files if file.is_dir())]


def _without_compilers(place: Path) -> Path:
    """A folder with links to all programs of the PATH but compilers."""
    folder = place / "programs"
    folder.mkdir(exist_ok=True)
    for directory in os.environ["PATH"].split(os.pathsep):
        for file in sorted(Path(directory).glob("*")) if directory else ():
            link = folder / file.name
            if not COMPILERS.match(file.name) and not os.path.lexists(link) and os.access(file, os.X_OK):
                link.symlink_to(file)
    return folder
