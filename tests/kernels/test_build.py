"""Finding, compiling, sharing and doing without the compiled libraries; with a source that compiles in a second."""

import logging
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from megalr.ops import build, library, toolchain
from tests.processes import python, run

ROOT = Path(__file__).parents[2]
FORK = multiprocessing.get_context("fork")  # torch is imported already

pytestmark = pytest.mark.skipif(toolchain.cxx() is None, reason="no C++ compiler")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A library of one small source, an empty cache, and nothing loaded; returns the source."""
    source = tmp_path / "csrc/cpu/tiny.cpp"
    source.parent.mkdir(parents=True)
    source.write_text("int megalr_tiny() { return 7; }\n", encoding="utf-8")
    monkeypatch.setattr(build, "CSRC", tmp_path / "csrc")
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setattr(build, "LIBRARIES", {"cpu": ("cpu/tiny.cpp",)})
    monkeypatch.setattr(library, "_loaded", {})
    monkeypatch.setattr(library, "_IN_LIBRARY", {"cpu": set()})
    monkeypatch.setenv("MEGALR_OPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MEGALR_OPS", "auto")
    monkeypatch.delenv("RANK", raising=False)
    return source


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """The compiler, behind a script that notes every call and takes its time; returns the number of compilations."""
    log = tmp_path / "calls"
    script = tmp_path / "counted-g++"
    note = f'[ "$1" = --version ] || {{ echo "$@" >> "{log}"; sleep 0.3; }}'
    script.write_text(f'#!/bin/sh\n{note}\nexec "{toolchain.cxx().command[0]}" "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    toolchain.cxx.cache_clear()
    yield lambda: sum(" -c " in line for line in log.read_text(encoding="utf-8").splitlines()) if log.exists() else 0
    toolchain.cxx.cache_clear()


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    toolchain.cxx.cache_clear()
    yield
    toolchain.cxx.cache_clear()


def in_processes(count, work):
    """What ``work(queue, i)`` puts into the queue in so many processes at once."""
    queue = FORK.Queue()
    processes = [FORK.Process(target=work, args=(queue, i)) for i in range(count)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    return results


def test_compiled_once_and_found_again(tiny, counted):
    assert build.find("cpu") == []
    first = build.build("cpu")
    assert first.origin == "compiled now"
    torch.ops.load_library(str(first.path))
    assert build.find("cpu") == [build.Library(first.path, "cache")]
    assert build.build("cpu").origin == "cache" and counted() == 1


@pytest.mark.parametrize("what", ["source", "header", "flag", "torch", "compiler"])
def test_what_a_library_depends_on(tiny, monkeypatch, what):
    before = build._name("cpu")
    if what == "source":
        tiny.write_text("int megalr_tiny() { return 8; }\n", encoding="utf-8")
    elif what == "header":
        (tiny.parent / "new.h").write_text("", encoding="utf-8")
    elif what == "flag":
        monkeypatch.setattr(toolchain, "CXX_FLAGS", [*toolchain.CXX_FLAGS, "-g"])
    elif what == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9")
    else:
        monkeypatch.setattr(toolchain, "cxx", lambda: toolchain.Compiler(("g++",), "another"))
    assert build._name("cpu") != before


def test_one_of_many_processes_compiles(tiny, counted):
    results = in_processes(4, lambda queue, _: queue.put(build.build("cpu").origin))
    assert sorted(results) == ["cache"] * 3 + ["compiled now"]
    assert counted() == 1


def test_a_failure_is_told_to_those_that_wait(tiny, counted):
    tiny.write_text("#error broken on purpose\n", encoding="utf-8")

    def work(queue, _):
        try:
            build.build("cpu")
        except build.BuildError as error:
            queue.put(str(error))

    start = FORK.Barrier(3)
    results = in_processes(3, lambda queue, i: (start.wait(), work(queue, i)))
    assert all("broken on purpose" in text for text in results)
    assert counted() == 1
    with pytest.raises(build.BuildError, match="failed with exit code 1:\n"):
        build.build("cpu")  # another run tries again
    assert counted() == 2


def test_a_killed_build_holds_nobody_up(tiny, counted):
    def work(queue, _):
        queue.put(None)
        build.build("cpu")

    queue = FORK.Queue()
    process = FORK.Process(target=work, args=(queue, 0))
    process.start()
    queue.get(timeout=60)
    while not counted():  # until the compiler runs
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    cache = tiny.parents[2] / "cache"
    assert list(cache.glob("*.lock"))  # it is left behind, and means nothing
    assert list(cache.glob("*.build-*"))
    start = time.monotonic()
    path = build.build("cpu").path
    assert time.monotonic() - start < 60
    assert sorted(one.suffix for one in cache.iterdir()) == [".lock", ".so"] and path.is_file()


def test_a_prebuilt_library_is_taken_whatever_compiled_it(tiny, monkeypatch):
    (built,) = build.prebuild()
    monkeypatch.setattr(toolchain, "cxx", lambda: toolchain.Compiler(("g++",), "another"))
    assert build.find("cpu") == [build.Library(built, "prebuilt")]
    tiny.write_text("int megalr_tiny() { return 8; }\n", encoding="utf-8")
    assert build.find("cpu") == []  # but not that of other sources


def test_what_is_in_the_cache_needs_no_compiler(tiny, request):
    path = build.build("cpu").path
    request.getfixturevalue("no_compiler")
    assert build.find("cpu") == [build.Library(path, "cache")]


def test_no_compiler(tiny, no_compiler, monkeypatch, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert library.load("cpu").library is None
    assert [record.getMessage() for record in caplog.records] == [
        "the ops run as torch calls on cpu tensors, more slowly: no C++ compiler: install g++ (apt install g++), or "
        "write its path into CXX"
    ]
    monkeypatch.setattr(library, "_loaded", {})
    monkeypatch.setenv("RANK", "1")
    caplog.clear()
    assert library.load("cpu").library is None and not caplog.records  # rank 0 has said it
    monkeypatch.setenv("MEGALR_OPS", "compiled")
    monkeypatch.setattr(library, "_loaded", {})
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
        library.load("cpu")


def test_a_compiler_that_fails(tiny, monkeypatch, caplog):
    tiny.write_text("#error broken on purpose\n", encoding="utf-8")
    kernels = library.load("cpu")
    assert kernels.library is None and "broken on purpose" in kernels.why and len(caplog.records) == 1
    monkeypatch.setattr(library, "_loaded", {})
    monkeypatch.setenv("MEGALR_OPS", "compiled")
    with pytest.raises(build.BuildError, match="broken on purpose"):
        library.load("cpu")


def test_loading(tiny, caplog):
    kernels = library.load("cpu")
    assert kernels.why == "compiled now" and Path(kernels.library).is_file()
    assert library.load("cpu") is kernels and not caplog.records


@pytest.mark.parametrize("damage", ["half", "zeros", "nothing", "a byte"])
def test_a_damaged_library_is_not_loaded_but_compiled_again(tiny, damage):
    """What a machine that goes down leaves. The dynamic linker takes half of a file, and the process ends by SIGBUS."""
    path = build.build("cpu").path
    content = path.read_bytes()
    half = len(content) // 2
    zeros, other = bytes(len(content)), content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
    path.unlink()  # and not overwritten: it may be loaded
    path.write_bytes({"half": content[:half], "zeros": zeros, "nothing": b"", "a byte": other}[damage])
    assert build.find("cpu") == []
    assert library.load("cpu").why == "compiled now"
    (found,) = build.find("cpu")
    torch.ops.load_library(str(found.path))


def replaced(path, content):
    """A library that is whole, and is not one; in place of one in the same folder."""
    path.unlink()
    path.write_bytes(content)
    new = path.with_name(f"{path.stem.rpartition('-')[0]}-{build._hash(path)}.so")
    path.rename(new)
    return new


def test_what_does_not_load_is_compiled_again(tiny, caplog):
    """Though it was prebuilt, and though the cache holds another that does not load either."""
    paths = [*build.prebuild(), build.build("cpu").path]
    paths = [replaced(path, b"a text") for path in paths]
    assert [one.path for one in build.find("cpu")] == paths
    kernels = library.load("cpu")
    assert kernels.why == "compiled now" and caplog.text.count("does not load and is compiled again") == 2
    assert not paths[1].exists() and Path(kernels.library).exists()


def test_a_library_without_our_ops_is_none(tiny, counted, monkeypatch, caplog):
    build.build("cpu")
    monkeypatch.setattr(library, "_IN_LIBRARY", {"cpu": {"refactorize"}})
    monkeypatch.setattr(library, "_is_compiled", lambda name, device_type: False)
    kernels = library.load("cpu")
    assert kernels == library.Kernels(None, "there is no megalr::refactorize for cpu tensors in it")
    assert "does not load and is compiled again: there is no megalr::refactorize" in caplog.text and counted() == 2


@pytest.fixture
def compiler(monkeypatch):
    """Sets CXX."""

    def choose(command):
        monkeypatch.setenv("CXX", command)
        toolchain.cxx.cache_clear()

    yield choose
    toolchain.cxx.cache_clear()


def test_a_compiler_with_a_wrapper_or_flags(tiny, compiler):
    before = build._name("cpu")
    compiler("env g++ -g0")
    assert toolchain.cxx().command[1:] == ("g++", "-g0") and build._name("cpu") != before
    assert build.build("cpu").origin == "compiled now"


def test_a_compiler_in_a_folder_with_spaces(tiny, compiler, tmp_path):
    script = tmp_path / "my tools/g++"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{toolchain.cxx().command[0]}" "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    compiler(str(script))
    assert toolchain.cxx().command == (str(script),)
    assert build.build("cpu").origin == "compiled now"


@pytest.mark.parametrize("command", ["/nonexistent", "no-such-wrapper g++", "env /nonexistent", 'a "quotation'])
def test_a_compiler_that_is_asked_for_and_does_not_run(tiny, compiler, command):
    """It is said, and no other is taken."""
    compiler(command)
    assert toolchain.cxx() is None
    message = f"CXX={command} does not run: write a C++ compiler that does, as in CXX=g++, or unset it"
    assert library.load("cpu").why == message


def test_a_folder_that_cannot_be_written_to(tiny, tmp_path, monkeypatch, caplog):
    blocked = tmp_path / "a file"
    blocked.write_text("", encoding="utf-8")
    monkeypatch.setenv("MEGALR_OPS_CACHE", str(blocked))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    path = build.build("cpu").path
    assert path.parent == tmp_path / f"megalr-ops-{os.getuid()}" and str(blocked) in caplog.text
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert [one.path for one in build.find("cpu")] == [path]
    path.parent.chmod(0o777)  # then anybody may have put a library there
    assert build.find("cpu") == []
    with pytest.raises(build.BuildError, match="others may write to .*MEGALR_OPS_CACHE"):
        build.build("cpu")


def test_no_kernels_for_other_devices(tiny):
    assert library.load("xpu").why == "there are no kernels for xpu tensors"


def test_cuda_needs_a_cuda_build_of_torch(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(build.BuildError, match="is a build without CUDA"):
        build.build("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(toolchain, "nvcc", lambda: None)
    with pytest.raises(build.BuildError, match=r"no nvcc: install the CUDA toolkit 13.0, or .* CUDA_HOME"):
        build.build("cuda")
    monkeypatch.setattr(toolchain, "nvcc", lambda: toolchain.Compiler(("nvcc",), "Cuda tools, release 12.4, V12.4.1"))
    with pytest.raises(build.BuildError, match="is of another CUDA"):
        build.build("cuda")


def test_importing_compiles_and_loads_nothing(tmp_path):
    code = "import megalr, megalr.ops, megalr.ops.adam; print('megalr_' in open('/proc/self/maps').read())"
    environment = {"MEGALR_OPS_CACHE": str(tmp_path / "cache"), "MEGALR_OPS": "compiled"}
    done = run(python(code), env=environment)
    assert done.stdout == "False\n" and not (tmp_path / "cache").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_the_library_shares_torchs_threads():
    """A second OpenMP runtime would have threads of its own, which torch.set_num_threads does not reach."""
    code = """
import os; os.environ["MEGALR_OPS"] = "compiled"
from megalr.ops import library
before = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rsplit("/", 1)[-1]}
library.load("cpu")
after = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rsplit("/", 1)[-1]}
assert before == after, (before, after)
"""
    run(python(code))


def test_the_report(capsys):
    from megalr import report

    report.main()
    printed = capsys.readouterr().out
    for name in (*library.SCHEMAS, "torch", "deepspeed", "transformers", "C++ compiler", "cuda library", "GPUs"):
        assert f"\n{name} " in printed, name
    assert library.runs_from("low_rank_adam", "cpu") == ("compiled" if library.load("cpu").library else "torch calls")


def test_the_sources_are_shipped(tmp_path):
    """An installed package holds what it is compiled from."""
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "base"), "--build-lib"]
    egg_info = ["egg_info", "--egg-base", str(tmp_path)]
    words = [*command[:3], *egg_info, *command[3:], str(tmp_path / "lib")]
    run(words, env={"MEGALR_BUILD_OPS": "0"})
    shipped = tmp_path / "lib/megalr/csrc"
    for names in build.LIBRARIES.values():
        for name in names:
            assert (shipped / name).is_file() == (build.CSRC / name).is_file(), name
    assert (shipped / "adam.h").is_file() and not (shipped / "emulation").exists()
    assert not (tmp_path / "lib/megalr/ops/prebuilt").exists()


@pytest.mark.parametrize("what", ["the cache", "above it", "the library"])
def test_a_library_that_others_could_have_put_there_is_not_loaded(tiny, tmp_path, monkeypatch, caplog, what):
    """Nor is anything compiled into such a folder: into a private one instead, and one line says why."""
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "private"))
    cache = tmp_path / "open" / "cache"
    monkeypatch.setenv("MEGALR_OPS_CACHE", str(cache))
    path = build.build("cpu").path
    assert build.find("cpu") == [build.Library(path, "cache")] and path.parent == cache
    {"the cache": cache, "above it": cache.parent, "the library": path}[what].chmod(0o777)
    assert build.find("cpu") == []
    caplog.clear()
    again = build.build("cpu")
    assert again.origin == "compiled now"
    if what == "the library":  # it is made anew, where nobody else may write
        assert again.path == path and path.stat().st_mode & 0o777 == 0o644
    else:
        assert again.path.parent == tmp_path / "private" / f"megalr-ops-{os.getuid()}"
        (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert f"as {cache} is not to be trusted: others may write to" in line
    assert build.find("cpu") == [build.Library(again.path, "cache")]


def test_what_is_compiled_is_private_whatever_the_umask(tiny):
    before = os.umask(0)
    try:
        path = build.build("cpu").path
    finally:
        os.umask(before)
    assert build.find("cpu") == [build.Library(path, "cache")]
