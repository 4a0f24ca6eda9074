"""Variables that launchers, libraries and megalr read, with values that are none or contradict each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from random import Random
from typing import Literal

from tests.soak.flags import RUN, TOOL
from tests.soak.trial import Case
from tests.soak.workshop import EVALUATE

NO_NUMBER = ("x", "", "1.5", "-1", "9" * 30, "0x1", " ")
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
PROGRAMS = {"train": RUN, "evaluate": (EVALUATE, "export", "--dataset", "text.txt", "--sequence-length", "32")}
INSPECT = (*TOOL, "inspect", "run/checkpoints")
NO_FOLDERS = ("text.txt", "text.txt/cache", "/dev/null", "/proc/cache", "/dev/full")
# What libraries read: they may go on without. Without a folder for compiled libraries the ops run as torch calls.
LIBRARIES = (
    ("train", RUN, ("MEGALR_OPS_CACHE", "TORCH_EXTENSIONS_DIR", "TMPDIR", "HF_HOME", "XDG_CACHE_HOME"), NO_FOLDERS),
    ("train", RUN, ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "LOCAL_SIZE", "CXX", "CUDA_HOME"), ("x", "-1", "/dev/null")),
    ("inspect", INSPECT, ("LANG", "LC_ALL", "COLUMNS", "TERM", "PYTHONHASHSEED", "HOME"), ("", "x", "-1", "/dev/null")),
)
# The variables, and what is named.
WRONG: tuple[tuple[dict[str, str | None], tuple[str, ...]], ...] = (
    ({"RANK": "0"}, ("WORLD_SIZE",)),
    ({"WORLD_SIZE": "2"}, ("RANK",)),
    ({**ALONE, "RANK": None}, ("RANK",)),
    ({**ALONE, "WORLD_SIZE": None}, ("WORLD_SIZE",)),
    ({**ALONE, "WORLD_SIZE": "0"}, ("WORLD_SIZE",)),
    ({**ALONE, "RANK": "1"}, ("RANK",)),
    ({**ALONE, "RANK": "5", "WORLD_SIZE": "2"}, ("RANK",)),
    ({**ALONE, "MASTER_PORT": None}, ("MASTER_PORT",)),
    ({**ALONE, "MASTER_PORT": "70000"}, ("MASTER_PORT", "70000")),
    ({**ALONE, "MASTER_ADDR": None}, ("MASTER_ADDR",)),
    ({**ALONE, "MASTER_ADDR": ""}, ("MASTER_ADDR",)),
    ({**ALONE, "MASTER_ADDR": "nowhere.invalid"}, ("nowhere.invalid",)),
    ({"OMPI_COMM_WORLD_SIZE": "x"}, ("OMPI_COMM_WORLD_SIZE",)),
    ({"PMI_SIZE": "x"}, ("PMI_SIZE",)),
)


def wrong_variables(rng: Random) -> Iterator[Case]:
    """All of them, for the programs that read them."""
    del rng
    for program, words in PROGRAMS.items():
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
            for value in NO_NUMBER:
                yield _case(program, words, {**ALONE, name: value}, (name,))
        for folder in NO_FOLDERS:
            yield _case(program, words, {"MEGALR_CACHE": folder}, ("MEGALR_CACHE", folder))
        for variables, names in WRONG:
            yield _case(program, words, variables, names)
    for value in NO_NUMBER:
        yield _case("train", RUN, {"DEEPSPEED_TIMEOUT": value}, ("DEEPSPEED_TIMEOUT",))
    for value in ("fast", "Torch", ""):
        yield _case("train", RUN, {"MEGALR_OPS": value}, ("MEGALR_OPS",))
    for program, words, names, values in LIBRARIES:
        for name in names:
            for value in values:
                yield _case(program, words, {name: value}, (), expect="either")


def _case(
    program: str,
    words: tuple[str, ...],
    env: Mapping[str, str | None],
    names: tuple[str, ...],
    expect: Literal["bad", "either"] = "bad",
) -> Case:
    needs = tuple(name for name in ("export", "run") if name in words or f"{name}/checkpoints" in words)
    shown = ", ".join(f"{key}={value}" for key, value in env.items())
    return Case(about=f"{program} with {shown}", words=words, names=names, needs=needs, env=env, expect=expect)
