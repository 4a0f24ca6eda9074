"""The harness itself: values come back, and failures are told, killed and survived."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.deepspeed.harness import ROOT, RankError, RankPool, run_ranks
from tests.processes import python, run

pytestmark = pytest.mark.distributed
HERE = "tests.deepspeed.test_harness"


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """A pool of two that the tests here may break."""
    with RankPool(2) as pool:
        yield pool


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


# --- what the ranks run


def add_up(values: torch.Tensor, *, times: int) -> tuple[int, torch.Tensor]:
    total = values * times * (dist.get_rank() + 1)
    dist.all_reduce(total)
    return dist.get_rank(), total


def disturb() -> tuple[float, float, str, bool]:
    drawn = random.random(), torch.rand(()).item(), os.getcwd(), "DISTURBED" in os.environ
    os.environ["DISTURBED"] = "yes"
    os.chdir("/")
    return drawn


def fail_on_one(fifo: str) -> None:
    if dist.get_rank() == 1:
        # A grandchild says that it lives, and holds the pipe open until it is killed.
        script = f"exec 3>'{fifo}'; echo alive >&3; echo ready; exec sleep 600"
        child = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
    print(f"rank {dist.get_rank()} was here")
    dist.barrier()
    if dist.get_rank() == 0:
        raise ValueError("a mistake on purpose")
    dist.barrier()


def die() -> None:
    if dist.get_rank() == 1:
        os._exit(7)


def hang() -> None:
    if dist.get_rank() == 1:
        threading.Event().wait()


def hold_open(fifo: str) -> None:
    os.write(os.open(fifo, os.O_WRONLY), b"alive\n")


def environment(name: str) -> str | None:
    return os.environ.get(name)


def unpicklable() -> Callable[[], None]:
    return lambda: None


# --- tests


def test_values_come_back_in_rank_order(pool):
    answers = pool.run(f"{HERE}:add_up", torch.tensor([1.0, 2.0]), times=10)
    assert [rank for rank, _ in answers] == [0, 1]
    for _, total in answers:
        assert torch.equal(total, torch.tensor([30.0, 60.0]))


def test_the_same_processes_serve_every_call_and_start_it_alike(pool):
    first, pids = pool.run(f"{HERE}:disturb"), pool.pids()
    again = pool.run(f"{HERE}:disturb")
    assert again == first
    assert pool.pids() == pids
    assert first[0][2:] == (str(ROOT), False)


def test_a_failing_rank_is_shown_and_the_others_are_killed(pool, fifo):
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(RankError) as raised:
        pool.run(f"{HERE}:fail_on_one", str(fifo))
    message = str(raised.value)
    assert "fail_on_one on 2 ranks: rank 0 failed" in message
    assert "ValueError: a mistake on purpose" in message
    for rank in (0, 1):
        assert f"rank {rank} was here" in message
    assert read_to_end(reader) == b"alive\n"
    assert pool.pids() == []
    assert len(pool.run(f"{HERE}:environment", "RANK")) == 2  # with new processes


def test_a_dying_rank_is_told_with_its_exit_code(pool):
    with pytest.raises(RankError, match="rank 1: died with exit code 7"):
        pool.run(f"{HERE}:die")


def test_a_hanging_rank_is_killed_when_the_time_is_up(pool):
    pool.run(f"{HERE}:environment", "RANK")
    pids = pool.pids()
    with pytest.raises(RankError, match=r"(?s)no answer within 0.5 s.*rank 0: returned.*rank 1: killed"):
        pool.run(f"{HERE}:hang", timeout=0.5)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_environment_of_a_pool_and_an_answer_that_cannot_be_sent():
    with RankPool(1, env={"MEGALR_TEST": "here"}) as pool:
        assert pool.run(f"{HERE}:environment", "MEGALR_TEST") == ["here"]
        with pytest.raises(RankError, match="pickle"):
            pool.run(f"{HERE}:unpicklable")


def test_a_single_call():
    assert run_ranks(f"{HERE}:environment", 1, "WORLD_SIZE") == ["1"]


def test_nothing_outlives_the_process_that_started_it(fifo):
    """Neither a pool's ranks nor those of a launcher, which a launcher's own death would leave."""
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    holds = f"import time; from {HERE} import hold_open; hold_open({str(fifo)!r}); print('held', flush=True); "
    script = fifo.with_name("script.py")
    script.write_text(holds + "time.sleep(600)")
    program = f"""
import os, signal, subprocess, sys
from tests import warm
from tests.deepspeed.harness import RankPool
pool = RankPool(1)
pool.run("{HERE}:hold_open", {str(fifo)!r})
words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "--master_port", "0", {str(script)!r}]
launcher = warm.start(words, cwd=".", env=dict(os.environ), stdout=subprocess.PIPE)
assert launcher.stdout.read(4) == b"held"
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert run(python(program), check=False).code == -signal.SIGKILL
    assert read_to_end(reader) == 2 * b"alive\n"


def read_to_end(reader: int, timeout: float = 30.0) -> bytes:
    """All that is written to a pipe until its last writer is gone, which must be so within ``timeout``."""
    text = b""
    while select.select([reader], [], [], timeout)[0]:
        chunk = os.read(reader, 100)
        if not chunk:
            os.close(reader)
            return text
        text += chunk
    raise AssertionError(f"the pipe is still held open; read so far: {text!r}")
