"""One rank of a :class:`~tests.deepspeed.harness.RankPool`: joins the group, then runs what it is sent.

python -m tests.deepspeed.worker CONNECTION_FD RENDEZVOUS_FILE
"""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import random
import signal
import sys
import threading
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import deepspeed
import numpy
import torch
import torch.distributed as dist


def main(fd: int, rendezvous: str) -> None:
    """Join the group through a file, which unlike a port nobody else can take, and answer until killed."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    connection = Connection(fd)
    dist.distributed_c10d.ProcessGroupGloo = _GlooOnOneDevice
    # An op for tensor-parallel inference that DeepSpeed would otherwise compile here, for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        init_method=f"file://{rendezvous}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        auto_mpi_discovery=False,  # which would be tried for want of a MASTER_PORT
        verbose=False,
    )
    _answer(connection, True, None)
    while True:
        function, args, kwargs = pickle.loads(connection.recv_bytes())
        environment, folder = dict(os.environ), os.getcwd()
        try:
            _seed()
            _answer(connection, True, _find(function)(*args, **kwargs))
        except BaseException:  # also SystemExit: the pool decides when to end
            _answer(connection, False, traceback.format_exc())
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        gc.collect()  # engines are cyclic
        gc.freeze()  # what is left are the libraries' million objects, which need no look at every collection


def _die_with_parent() -> None:
    """End this process and its children when the pool's process is gone, however it went: stdin is closed."""
    os.read(sys.stdin.fileno(), 1)  # not through sys.stdin, whose lock would disturb an orderly exit
    os.killpg(0, signal.SIGKILL)


class _OneDevice(type):
    """Makes gloo's groups share what looks at the network, a hundred times a second for every group there is."""

    device = dist.ProcessGroupGloo.create_default_device()
    gloo = dist.ProcessGroupGloo

    def __call__(cls, store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroupGloo:
        options = cls.gloo._Options()
        options._devices, options._timeout = [cls.device], timeout
        return cls.gloo(store, rank, size, options)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.gloo)


class _GlooOnOneDevice(metaclass=_OneDevice):
    """For torch's class."""


def _answer(connection: Connection[bytes, bytes], succeeded: bool, value: Any) -> None:
    connection.send_bytes(pickle.dumps((succeeded, value)))


def _seed() -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


def _find(function: str) -> Any:
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
