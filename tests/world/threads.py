"""Runs a function on several ranks that are threads of this process, in one torch.distributed group.

No process starts and nothing is pickled, so a call costs milliseconds. What the ranks call of ``torch.distributed``
is carried out here, and checked on the way: all ranks have to make the same calls in the same order.

One rank runs at a time, until it waits for others: threads that take Python's lock from each other at every operation
are twice as slow.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _set_thread_isolation_mode
from torch.testing._internal.distributed import multi_threaded_pg as torch_threads
from torch.utils._pytree import tree_leaves, tree_map

BACKEND = "rank_threads"
LAST_WORDS = 2.0  # seconds that ranks have to end after one has failed or the time is up

_here = threading.local()  # the world of each rank's thread
_running = threading.Lock()  # torch keeps which groups there are in one place


class WorldError(AssertionError):
    """A rank raised, ranks made different calls, or some did not answer in time."""


def world(size: int, function: Callable[..., Any], *args: Any, timeout: float = 200.0, **kwargs: Any) -> list[Any]:
    """Call a function on every rank, each a thread.

    Random seeds are set to 0 before the call and put back after it. torch's global generator is one for all
    ranks: what they draw has to come from generators of their own.

    Args:
        size: how many ranks.
        function: called with ``*args, **kwargs``; what it is given is shared, not copied.
        timeout: seconds after which ranks that wait are ended, and the others left to themselves.

    Returns:
        What the function returned, in rank order.

    Raises:
        WorldError: with the traceback of the rank that raised, the calls in which ranks differ, or who waits where.
    """
    if not _running.acquire(blocking=False):
        raise WorldError("world() was called inside world(), or by two threads at once")
    try:
        with _threads_as_ranks(), _seeds():
            return _World(size).run(lambda: function(*args, **kwargs), timeout)
    finally:
        _running.release()


class _World:
    """The ranks of one call, and where they meet."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._changed = threading.Condition(threading.Lock())  # held by the rank that runs
        self._arrived: dict[str, dict[int, tuple[Any, Any]]] = {}  # by group and rank: a collective and its data
        self._members: dict[str, set[int]] = {}
        self._rounds: dict[str, int] = {}  # collectives carried out, by group
        self._left: set[int] = set()  # ranks whose function is over
        self._problem = ""
        self._cause: BaseException | None = None
        self._results: list[Any] = [None] * size

    def run(self, function: Callable[[], Any], timeout: float) -> list[Any]:
        store = dist.HashStore()
        threads = [
            threading.Thread(target=self._be, args=(rank, store, function, timeout), name=f"rank {rank}", daemon=True)
            for rank in range(self.size)
        ]
        deadline = time.monotonic() + timeout
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
                if thread.is_alive():
                    self._stop(f"no answer within {timeout:g} s\n{self._whereabouts(threads)}")
                    break
        finally:  # also at Ctrl-C: no thread may wait for ever
            self._stop("the call is over")
            deadline = time.monotonic() + LAST_WORDS
            for thread in threads:
                if thread.ident is not None:
                    thread.join(max(0.0, deadline - time.monotonic()))
        if self._problem:
            raise WorldError(f"{self.size} ranks as threads: {self._problem}") from self._cause
        return self._results

    def meet(self, group: str, members: Sequence[int], rank: int, collective: Any, data: Any) -> None:
        """Wait for all members of a group; the last one carries the collective out."""
        self._go_on()
        now = self._rounds.setdefault(group, 0)
        self._members[group] = set(members)
        arrived = self._arrived.setdefault(group, {})
        arrived[rank] = (collective, data)
        if len(arrived) == len(members):
            _check(arrived)
            collective.work([arrived[member][1] for member in members])
            self._arrived[group] = {}
            self._rounds[group] += 1
        self._look_for_the_gone()
        self._changed.notify_all()
        while self._rounds[group] == now:
            self._go_on()
            self._changed.wait()

    def _be(self, rank: int, store: dist.Store, function: Callable[[], Any], timeout: float) -> None:
        """One rank's life."""
        _here.world = self
        with self._changed:
            self._live(rank, store, function, timeout)

    def _live(self, rank: int, store: dist.Store, function: Callable[[], Any], timeout: float) -> None:
        try:
            limit = timedelta(seconds=timeout)
            dist.init_process_group(BACKEND, rank=rank, world_size=self.size, store=store, timeout=limit)
            self._results[rank] = function()
            dist.destroy_process_group()
        except _Ended:
            pass
        except BaseException as error:  # also SystemExit, and pytest's outcomes
            self._end(f"rank {rank} raised\n{traceback.format_exc()}", error)
        finally:
            self._left.add(rank)
            self._look_for_the_gone()
            self._changed.notify_all()

    def _end(self, problem: str, cause: BaseException | None = None) -> None:
        """Have no rank meet others any more; the first problem is what is told."""
        if not self._problem and len(self._left) < self.size:
            self._problem, self._cause = problem, cause

    def _stop(self, problem: str) -> None:
        """The same by who is no rank. A rank that runs on and on keeps the others; it wakes them when it ends."""
        runs_on = not self._changed.acquire(timeout=LAST_WORDS)
        self._end(problem)
        if not runs_on:
            self._changed.notify_all()
            self._changed.release()

    def _go_on(self) -> None:
        if self._problem:
            raise _Ended

    def _look_for_the_gone(self) -> None:
        """Whether somebody waits for a rank that will not come."""
        for group, arrived in self._arrived.items():
            gone = self._left & self._members[group]
            if arrived and gone:
                self._end(f"rank {min(gone)} has returned, but {self._waiting()}")

    def _waiting(self) -> str:
        """Who waits in which call."""
        calls = [(r, _name(call)) for arrived in self._arrived.values() for r, call in sorted(arrived.items())]
        return ", ".join(f"rank {rank} waits in {call}" for rank, call in calls) or "no rank waits"

    def _whereabouts(self, threads: Sequence[threading.Thread]) -> str:
        """Who waits in which call, and what the others do."""
        waiting = {rank for arrived in list(self._arrived.values()) for rank in list(arrived)}
        frames, lines = sys._current_frames(), [self._waiting()]
        for rank, thread in enumerate(threads):
            if rank not in waiting and thread.is_alive() and thread.ident in frames:
                lines += [f"rank {rank} is at", *traceback.format_stack(frames[thread.ident])[-8:]]
        return "\n".join(lines)


class _Ended(BaseException):
    """Ends a rank because of another's problem."""


class _Group(dist.ProcessGroup):
    """The collectives that megalr calls. Results are there after ``wait()``, not before, as on a network."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._rank, self._size = rank, size
        self._world: _World = _here.world

    def size(self) -> int:
        return self._size

    def getBackendName(self) -> str:
        return BACKEND

    @property
    def group_name(self) -> str:
        return str(dist.distributed_c10d._world.pg_names[self])

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> _Work:
        return self._meet(torch_threads.AllReduce(opts.reduceOp), tensors, tensors)

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> _Work:
        return self._meet(torch_threads.Broadcast(opts.rootRank), tensors, tensors)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> _Work:
        return self._meet(torch_threads.AllGather(), (outputs, inputs), outputs)

    def all_to_all_single(
        self, output: Tensor, given: Tensor, out_sizes: list[int], in_sizes: list[int], opts: Any = None
    ) -> _Work:
        if output.is_floating_point():
            output.fill_(float("nan"))  # to be noticed by who does not wait
        return self._meet(torch_threads.AllToAllBase(), (output, given, out_sizes, in_sizes), [output])

    def barrier(self, opts: Any = None) -> _Work:
        nothing = [torch.zeros(1)]
        return self._meet(torch_threads.Broadcast(0), nothing, nothing)

    def _meet(self, collective: Any, data: Any, outputs: Any) -> _Work:
        copies = {id(t): t.detach().clone() for t in tree_leaves((data, outputs)) if isinstance(t, Tensor)}

        def copied(tree: Any) -> Any:
            return tree_map(lambda leaf: copies.get(id(leaf), leaf), tree)

        members = dist.get_process_group_ranks(self)
        self._world.meet(self.group_name, members, members[self._rank], collective, copied(data))
        return _Work(tree_leaves(outputs), tree_leaves(copied(outputs)))


class _Work:
    """A collective under way."""

    def __init__(self, outputs: list[Tensor], results: list[Tensor]) -> None:
        self._outputs, self._results = outputs, results

    def wait(self, timeout: Any = None) -> bool:
        for output, result in zip(self._outputs, self._results, strict=True):
            output.detach().copy_(result)
        self._outputs, self._results = [], []
        return True


def _name(call: tuple[Any, Any]) -> str:
    collective, data = call
    sizes = [t.numel() for t in tree_leaves(data) if isinstance(t, Tensor)]
    return f"{type(collective).__name__} of {', '.join(map(str, sizes))} elements"


def _check(calls: Mapping[int, tuple[Any, Any]]) -> None:
    """Make sure that ranks have made the same call, of the same sizes where these have to be."""
    kinds = {type(collective) for collective, _ in calls.values()}
    sizes = [[(t.shape, t.dtype) for t in tree_leaves(data) if isinstance(t, Tensor)] for _, data in calls.values()]
    free = kinds == {torch_threads.AllToAllBase}  # whose sizes are checked when they are copied
    settings = {str(vars(collective)) for collective, _ in calls.values()}
    if len(kinds) > 1 or len(settings) > 1 or (not free and any(other != sizes[0] for other in sizes)):
        told = ", ".join(f"rank {rank} calls {_name(call)}" for rank, call in sorted(calls.items()))
        raise WorldError(f"ranks make different calls: {told}")


def _create(store: Any, rank: int, size: int, timeout: timedelta) -> _Group:
    return _Group(rank, size)


@contextlib.contextmanager
def _threads_as_ranks() -> Iterator[None]:
    """Each thread has a default group of its own."""
    before, hook = dist.distributed_c10d._world, sys.excepthook
    _set_thread_isolation_mode(True)
    dist.distributed_c10d._world = torch_threads.ThreadLocalWorld()
    try:
        yield
    finally:
        dist.distributed_c10d._world = before
        _set_thread_isolation_mode(False)
        sys.excepthook = hook  # to which init_process_group has added the rank, once more on each rank


@contextlib.contextmanager
def _seeds() -> Iterator[None]:
    before = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    try:
        yield
    finally:
        random.setstate(before[0])
        numpy.random.set_state(before[1])
        torch.set_rng_state(before[2])


dist.Backend.register_backend(BACKEND, _create, devices=["cpu"])
