"""The processes of a run: how they start, agree and fail together."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megalr.agreement import agree
from megalr.errors import UserError
from megalr.hosts.deepspeed_start import join_processes
from megalr.processes import free_port

T = TypeVar("T")

_OF_MPI = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")
_BY_LAUNCHER = (
    "start with `deepspeed` or torchrun, which set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or set "
    "none of them"
)

# Rank 0 may read and tokenize a large text while the others wait.
_PATIENCE = timedelta(hours=1)


class AgreedError(UserError):
    """A UserError that every rank has raised at the same point."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among the others.

    Attributes:
        rank, local_rank, world_size: as usual.
        device: where this rank computes.
        tensor_parallel: how many ranks, one behind the other, share each layer and get the same data.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    tensor_parallel: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which prints and writes."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which share of the data is this rank's."""
        return self.rank // self.tensor_parallel

    @property
    def data_size(self) -> int:
        """Into how many shares the data is cut."""
        return self.world_size // self.tensor_parallel

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that all ranks run: a UserError or OSError on one becomes an :class:`AgreedError` on all. Collective.

        Inside, ranks may wait for each other with :meth:`barrier` alone.
        """
        error: str | None = None
        try:
            yield
        except AgreedError:
            raise
        except (UserError, OSError) as found:  # a path that cannot be read or written is the user's to mend, too
            error = str(found)
        self._agree(error)

    def barrier(self) -> None:
        """Wait for all ranks; raises what another one failed with on its way here. Collective."""
        self._agree(None)

    def from_first(self, compute: Callable[[], T]) -> T:
        """What ``compute``, run on rank 0 alone, returns; a UserError there is raised on all. Collective."""
        box: list[Any] = [None]
        with self.together():
            if self.is_first:
                box[0] = compute()
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        result: T = box[0]
        return result

    def agree(self, facts: Mapping[str, str], more: Callable[[], Mapping[str, str]] = dict) -> None:
        """Make sure that all ranks have the same; see :func:`megalr.agreement.agree`. Collective."""
        try:
            agree(facts, more)
        except UserError as error:
            raise AgreedError(str(error)) from error

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over the ranks, in fp64. Collective."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def sum_of_data(self, values: Sequence[float]) -> list[float]:
        """:meth:`sum` of what was found in the data, of which tensor-parallel ranks have the same. Collective."""
        return [value / self.tensor_parallel for value in self.sum(values)]

    def gather(self, value: T) -> list[T]:
        """Every rank's picklable value, in rank order, on every rank. Collective."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def _agree(self, error: str | None) -> None:
        errors = [found for found in self.gather(error) if found is not None]
        if errors:
            raise AgreedError(errors[0])


def world_size_from_environment() -> int:
    """How many processes the launcher started; 1 without a launcher."""
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if name in os.environ:
            return _whole(name, 1)
    return 1


def start_ranks() -> Ranks:
    """Join the process group that the launcher's environment describes; a group of one without a launcher.

    Raises:
        UserError: they cannot reach each other, or the environment describes no process of a group.
    """
    if not dist.is_initialized():
        _check_environment()
    if "RANK" not in os.environ and world_size_from_environment() == 1:
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
        )
    # Compiling ops takes ninja, which lies beside this Python, also where the environment is not activated.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    try:
        join_processes(None if "DEEPSPEED_TIMEOUT" in os.environ else _PATIENCE)
    except ModuleNotFoundError as error:  # mpi4py, by which DeepSpeed asks MPI who is who
        raise UserError(f"the variables of MPI are set, and to ask MPI takes {error.name}: {_BY_LAUNCHER}") from error
    except dist.DistNetworkError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"the processes cannot meet at {address}: {error}. If another run has the port, give the launcher "
            "another one (--master_port)"
        ) from error
    return Ranks(
        rank=dist.get_rank(),
        local_rank=local_rank,
        world_size=dist.get_world_size(),
        device=torch.device("cuda", local_rank) if cuda else torch.device("cpu"),
    )


def _check_environment() -> None:
    """Refuse what torch would wait for, half an hour, or fail at with a traceback."""
    size = world_size_from_environment()
    if "DEEPSPEED_TIMEOUT" in os.environ:
        _whole("DEEPSPEED_TIMEOUT", 1, 60 * 24 * 365)  # minutes
    if "RANK" not in os.environ:
        if "WORLD_SIZE" in os.environ and not any(name in os.environ for name in _OF_MPI):
            raise UserError(f"WORLD_SIZE is {size}, but RANK is not set: {_BY_LAUNCHER}")
        return
    if "WORLD_SIZE" not in os.environ:
        raise UserError(f"RANK is set, but WORLD_SIZE is not: {_BY_LAUNCHER}")
    _whole("RANK", 0, size - 1)
    if "LOCAL_RANK" not in os.environ:
        raise UserError(f"RANK is set, but LOCAL_RANK is not: {_BY_LAUNCHER}")
    _whole("LOCAL_RANK", 0, size - 1)
    if not os.environ.get("MASTER_ADDR"):
        raise UserError(f"RANK is set, but MASTER_ADDR is not: {_BY_LAUNCHER}")
    if "MASTER_PORT" not in os.environ:
        raise UserError(f"RANK is set, but MASTER_PORT is not: {_BY_LAUNCHER}")
    _whole("MASTER_PORT", 0, 65535)
    try:
        socket.getaddrinfo(os.environ["MASTER_ADDR"], None)
    except OSError as error:
        raise UserError(f"MASTER_ADDR is {os.environ['MASTER_ADDR']}, which has no address: {error}") from error


def _whole(name: str, least: int, most: int = 1 << 31) -> int:
    """A variable that is to be a whole number."""
    text = os.environ[name]
    if not re.fullmatch(r"\d{1,10}", text, re.ASCII) or not least <= int(text) <= most:
        raise UserError(f"the variable {name} is {text!r}: expected a whole number from {least} to {most}")
    return int(text)


def stop_ranks() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
