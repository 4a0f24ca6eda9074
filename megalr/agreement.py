"""All ranks say what they have before they train, and all hear who has something else.

Ranks with another JSON, another version of a package or another text train without an error, and wrongly. They compare
one digest of 32 bytes; only where it differs do they send each other what it is of.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megalr.errors import UserError
from megalr.version import __version__

T = TypeVar("T")

PACKAGES = ("torch", "deepspeed", "transformers")
# What of a DeepSpeed JSON ranks may have on their own: what they print and report, and where they write.
OWN = (
    "autotuning",
    "comet",
    "comms_logger",
    "csv_monitor",
    "dump_state",
    "flops_profiler",
    "memory_breakdown",
    "steps_per_print",
    "tensorboard",
    "wall_clock_breakdown",
    "wandb",
)
LONGEST = 60  # characters of a value in a message
SHOWN = 5  # differences in a message
SHOWN_RANKS = 4


def agree(facts: Mapping[str, str], more: Callable[[], Mapping[str, str]] = dict) -> None:
    """Make sure that all ranks have the same. Collective.

    Args:
        facts: what has to be the same, by its name for the user, in the same order on all ranks.
        more: further facts that take long to find; only asked for where these differ.

    Raises:
        UserError: on all ranks alike, with who differs in what.
    """
    if not has_ranks():
        return
    own = torch.frombuffer(bytearray(hashlib.sha256(json.dumps(facts).encode()).digest()), dtype=torch.uint8)
    with _group_on_cpu() as group:
        digests = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(digests, own, group=group)
        if all(torch.equal(digest, digests[0]) for digest in digests):
            return
        everyone = _gathered((socket.gethostname(), {**facts, **_more(more)}), group)
    hosts, found = zip(*everyone, strict=True)
    raise UserError(
        "ranks that train one model have to have the same, and they do not:\n"
        + "\n".join(differences(found, hosts))
        + "\nStart them all with the same files, packages and arguments"
    )


def has_ranks() -> bool:
    """Whether this process has met others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first() -> bool:
    """Whether this is rank 0, which logs for all; where processes have not met, as the launcher says."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def gathered(value: T) -> list[T]:
    """Every rank's picklable value, in rank order. Collective, on the CPU: nobody may have said which GPU is whose."""
    with _group_on_cpu() as group:
        return _gathered(value, group)


def differences(found: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> list[str]:
    """A line for each fact that ranks differ in.

    What the majority has is expected, and what the first rank has where there is none.

    Args:
        found: the facts of each rank.
        hosts: the machine of each rank.
    """
    lines = []
    for key in dict.fromkeys(key for facts in found for key in facts):
        values = [facts.get(key, "none") for facts in found]
        value, votes = Counter(values).most_common(1)[0]
        expected = value if 2 * votes > len(values) else values[0]
        others = [
            f"{other} on {_in_words([rank for rank, each in enumerate(values) if each == other], hosts)}"
            for other in dict.fromkeys(values)
            if other != expected
        ]
        if others:
            lines.append(f"  {key}: {', '.join(others)}, and {expected} on the others")
    more = len(lines) - SHOWN
    return lines if more <= 0 else [*lines[:SHOWN], f"  and {more} more"]


@cache
def code_facts() -> Mapping[str, str]:
    """What runs: versions, and a hash of megalr's own source, which a version does not tell in a working copy."""
    facts = {"Python": platform.python_version(), "megalr": __version__}
    folder = Path(__file__).parent
    facts["megalr's source"] = digest_of_files(sorted(folder.rglob("*.py")), folder)
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    return facts


def json_facts(content: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """The values of a DeepSpeed JSON, by keys as in ``megalr.refactorization.interval``.

    Left out are :data:`OWN`, paths, which may be others on other nodes, and the names of plugins for the same reason.
    """
    facts: dict[str, str] = {}
    for key, value in sorted(content.items(), key=lambda item: str(item[0])):
        name = f"{prefix}{key}"
        if name in OWN or name == "megalr.plugins" or str(key).endswith("path"):
            continue
        if isinstance(value, Mapping):
            facts |= json_facts(value, f"{name}.")
        else:
            facts[name] = _short(json.dumps(value, default=str))
    return facts


def digest_of_files(files: Sequence[Path], folder: Path | None = None) -> str:
    """A hash of what is in some files, and of their names in a folder."""
    found = hashlib.sha256()
    for file in files:
        found.update((file.name if folder is None else file.relative_to(folder).as_posix()).encode())
        found.update(hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()[:12]


def _more(find: Callable[[], Mapping[str, str]]) -> Mapping[str, str]:
    try:
        return find()
    except Exception as error:  # whatever it is: the others wait for an answer
        return {"what else was looked for": str(error)}


def _short(value: str) -> str:
    if len(value) <= LONGEST:
        return value
    return f"{value[:LONGEST]}... ({hashlib.sha256(value.encode()).hexdigest()[:12]})"


def _in_words(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Ranks with their machines, as in "rank 3 (node-b)"."""
    words = [f"rank {rank} ({hosts[rank]})" for rank in ranks[:SHOWN_RANKS]]
    more = len(ranks) - SHOWN_RANKS
    return ", ".join([*words, f"{more} more ranks"] if more > 0 else words)


@contextmanager
def _group_on_cpu() -> Iterator[dist.ProcessGroup | None]:
    """A group of all ranks whose messages lie on the CPU; None for the default one."""
    if dist.get_backend() != "nccl":
        yield None
        return
    group = dist.new_group(backend="gloo")
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


def _gathered(value: T, group: dist.ProcessGroup | None) -> list[T]:
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
