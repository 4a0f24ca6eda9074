"""Python programs that start in milliseconds: forked from a server that has imported what they import.

:func:`start` is for tests what ``subprocess.Popen([sys.executable, ...])`` is: the program gets arguments, a folder, an
environment, streams and a process group of its own, and ends with its own exit code. What it starts with this Python
in turn, as launchers do, is forked as well. What differs from a real start is that modules are there before they are
imported, so that a few tests still start each kind of program as a user does.

python -m tests.warm SOCKET_FD LIFE_FD PADDING
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import inspect
import os
import pickle
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
MESSAGE_BYTES = 1 << 18
TITLE_BYTES = 1 << 14  # for the words of a program, as other processes see them
F_SETSIG = 10  # Linux' fcntl
LIFELINE = 500  # the number under which all have a pipe that ends with the process of the tests
FIRST_SPARE_FD = 512

# As of a rank that says little; what the libraries read while they are imported.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "TRANSFORMERS_VERBOSITY": "warning",
    "DATASETS_VERBOSITY": "warning",
    "TOKENIZERS_PARALLELISM": "false",
}
LIBRARIES = (
    "torch.utils.tensorboard",
    "torch.distributed.run",
    "torch._inductor.compile_fx",
    "deepspeed",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.moe.layer",
    "deepspeed.pipe",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.launcher.runner",
    "deepspeed.launcher.launch",
    "datasets",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "transformers",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "transformers.convert_slow_tokenizer",
    "tokenizers.trainers",
    "PIL.JpegImagePlugin",
    "psutil",
    "setuptools.config.pyprojecttoml",
    "yaml",
)
LAUNCHERS = ("torch.distributed.run", "deepspeed.launcher.runner", "deepspeed.launcher.launch")


class WarmProcess:
    """What :func:`start` has started; as far as it goes, a ``subprocess.Popen``."""

    def __init__(self, server: _Client, pid: int, stdin: Any, stdout: Any, stderr: Any) -> None:
        self.pid, self.returncode = pid, None
        self.stdin, self.stdout, self.stderr = stdin, stdout, stderr
        self._server, self._ended = server, os.pidfd_open(pid)

    returncode: int | None

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self._reap(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; the exit code."""
        code = self._reap(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """To the process, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def _reap(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._ended], [], [], timeout)[0]:
            self.returncode = self._server.ask("reap", self.pid)
            os.close(self._ended)
        return self.returncode


def start(
    words: Sequence[str],
    *,
    cwd: str | Path,
    env: Mapping[str, str],
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
    pass_fds: Sequence[int] = (),
) -> WarmProcess | subprocess.Popen[bytes]:
    """Start a program in a session of its own; it is killed at the latest when this process ends.

    Args:
        words: this interpreter, and what follows it on a command line.
        cwd, env, stdin, stdout, stderr, pass_fds: as for ``subprocess.Popen``, which does it where there is no Linux.
    """
    if not sys.platform.startswith("linux"):
        streams = {"stdin": stdin, "stdout": stdout, "stderr": stderr}
        return subprocess.Popen(words, cwd=cwd, env=env, pass_fds=pass_fds, start_new_session=True, **streams)
    global _client  # noqa: PLW0603  (one server serves the process)
    if _client is None or not _client.alive():
        _client = _Client()
    with contextlib.ExitStack() as ours:
        streams, fds = [], []
        for number, given in enumerate((stdin, stdout, stderr)):
            stream = None
            if given == subprocess.PIPE:
                reading, writing = os.pipe()
                theirs, mine = (reading, writing) if number == 0 else (writing, reading)
                ours.callback(os.close, theirs)
                stream = open(mine, "wb" if number == 0 else "rb", buffering=0)  # noqa: SIM115
            elif given == subprocess.DEVNULL:
                theirs = os.open(os.devnull, os.O_RDWR)
                ours.callback(os.close, theirs)
            elif given == subprocess.STDOUT:
                theirs = fds[1]
            elif given is None:
                theirs = number
            else:
                theirs = given if isinstance(given, int) else given.fileno()
            streams.append(stream)
            fds.append(theirs)
        request = (list(words), str(cwd), dict(env), [0, 1, 2, *pass_fds])
        return WarmProcess(_client, _client.ask("start", request, [*fds, *pass_fds]), *streams)


def popen(words: Sequence[str], **options: Any) -> WarmProcess | subprocess.Popen[bytes]:
    """:func:`start` with the options of a ``subprocess.Popen`` that begins a session and dies with this process."""
    assert options.pop("start_new_session")
    options.pop("preexec_fn", None)
    return start(words, **{"cwd": os.getcwd(), **options})


class _Client:
    """This process's end of the connection to its server."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        life, self._life = os.pipe()
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm", str(theirs.fileno()), str(life), " " * TITLE_BYTES],
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno(), life],
            start_new_session=True,
        )
        theirs.close()
        os.close(life)
        self._one_at_a_time = threading.Lock()
        atexit.register(self.close)

    def alive(self) -> bool:
        """Whether there is a server to ask."""
        return self._process.poll() is None

    def ask(self, what: str, about: Any, fds: Sequence[int] = ()) -> Any:
        """Send a request, and return the answer."""
        with self._one_at_a_time:
            socket.send_fds(self._socket, [pickle.dumps((what, about))], list(fds))
            answer = self._socket.recv(MESSAGE_BYTES)
        if not answer:
            raise RuntimeError(f"the server of warm processes has ended with exit code {self._process.wait()}")
        return pickle.loads(answer)

    def close(self) -> None:
        """End the server and all that was forked, however far from it."""
        os.close(self._life)
        self._process.wait()
        self._socket.close()


_client: _Client | None = None
_execute_child: Any = subprocess.Popen._execute_child  # type: ignore[attr-defined]
_installed: list[str] = []  # where imports come from beside a program's own folder and PYTHONPATH; the server's


def serve(connection: socket.socket) -> Callable[[], object]:
    """Fork what is asked for; returns in the forked process, with what it shall do."""
    while True:
        message, fds, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 64)
        if not message:
            os._exit(0)
        what, about = pickle.loads(message)
        if what == "reap":
            answer = os.waitstatus_to_exitcode(os.waitpid(about, 0)[1])
        else:
            answer = os.fork()
            if not answer:
                connection.close()
                words, folder, env, numbers = about
                os.setsid()
                _place(fds, numbers)
                return _program(words, folder, env)
        for fd in fds:
            os.close(fd)
        connection.send(pickle.dumps(answer))


def _die_with_tests() -> None:
    """Have the kernel kill this process when nobody can write to the lifeline any more.

    A death of its parent would not do: ranks outlive a launcher that is killed.
    """
    own = os.open(f"/proc/self/fd/{LIFELINE}", os.O_RDONLY | os.O_NONBLOCK)  # whom to tell is kept by opening
    os.dup2(own, LIFELINE, inheritable=False)
    os.close(own)
    fcntl.fcntl(LIFELINE, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(LIFELINE, F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(LIFELINE, fcntl.F_SETFL, os.O_RDONLY | os.O_NONBLOCK | os.O_ASYNC)
    if select.select([LIFELINE], [], [], 0)[0]:  # too late to be told
        os._exit(1)


def _place(fds: Sequence[int], numbers: Sequence[int]) -> None:
    """Let open files have other numbers."""
    spare = [fcntl.fcntl(fd, fcntl.F_DUPFD, FIRST_SPARE_FD) for fd in fds]
    for fd in {*fds} - {*numbers}:
        os.close(fd)
    for fd, number in zip(spare, numbers, strict=True):
        os.dup2(fd, number)
        os.close(fd)


def _program(words: Sequence[str], folder: str, env: Mapping[str, str]) -> Callable[[], object]:
    """Make this process one that has just been started, and return what runs its program."""
    _die_with_tests()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _set_title(words)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()  # as random does
    own, first, *rest = words
    assert own == sys.executable, words
    if first == "-u":
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)
        first, *rest = rest
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    sys.path[:] = ["", *filter(None, env.get("PYTHONPATH", "").split(os.pathsep)), *_installed]
    if first == "-m":
        module, *arguments = rest
        sys.path[0] = os.getcwd()
        sys.argv[:] = ["-m", *arguments]
        if module in LAUNCHERS:
            _fork_instead_of_starting()
        return lambda: runpy._run_module_as_main(module)
    if first == "-c":
        code, *arguments = rest
        sys.argv[:] = ["-c", *arguments]
        return lambda: exec(compile(code, "<string>", "exec"), main.__dict__)
    sys.argv[:] = [first, *rest]
    sys.path[0] = os.path.dirname(os.path.realpath(first))
    main.__file__ = first
    return lambda: exec(compile(Path(first).read_bytes(), first, "exec"), main.__dict__)


def _fork_instead_of_starting() -> None:
    """Let ``subprocess`` of this process fork what is a program of this interpreter."""
    signature = inspect.signature(_execute_child)

    def execute_child(self: Any, *given: Any) -> None:
        bound = signature.bind(self, *given).arguments
        words = bound["args"]
        if bound["shell"] or isinstance(words, str | bytes | os.PathLike) or str(words[0]) != sys.executable:
            _execute_child(self, *given)
            return
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid:
            self._child_created = True
            ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
            self._close_pipe_fds(*(bound[end] for end in ends))
            return
        try:
            if bound["start_new_session"]:
                os.setsid()
            ends = ("p2cread", "c2pwrite", "errwrite")
            streams = {number: bound[end] for number, end in enumerate(ends) if bound[end] != -1}
            _place([*streams.values()], [*streams])
            _hide_open_files(bound["pass_fds"])
            folder, env = bound["cwd"] or os.getcwd(), bound["env"] or dict(os.environ)
            _end_as_a_program(_program([*map(str, words)], folder, env))
        finally:
            os._exit(1)

    subprocess.Popen._execute_child = execute_child  # type: ignore[attr-defined]


def _hide_open_files(but: Sequence[int]) -> None:
    """As after a start, none is open; their numbers stay taken, for objects that may close them yet."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd != LIFELINE and fd not in but:
            with contextlib.suppress(OSError):  # that of the listing is gone
                os.fstat(fd)
                os.dup2(nothing, fd, inheritable=False)


def _end_as_a_program(program: Callable[[], object]) -> None:
    """Run it and end this process as Python does, but for taking a million objects apart, which takes half a second."""
    code: Any = 0
    interrupted = False
    try:
        program()
    except SystemExit as ended:
        code = ended.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:
        traceback.print_exc()
        code, interrupted = 1, isinstance(error, KeyboardInterrupt)
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit((code or 0) & 0xFF)


def _set_title(words: Sequence[str]) -> None:
    """Show a program's words as those of this process, where the server's were."""
    first, last = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:47])
    title = "".join(f"{word}\0" for word in words).encode()[: last - first - 1]
    ctypes.memset(first, 0, last - first)
    ctypes.memmove(first, title, len(title))


def main(fd: int, life: int) -> Callable[[], object]:
    """Import everything, then serve; returns in forked processes."""
    os.dup2(life, LIFELINE, inheritable=False)
    os.close(life)
    _die_with_tests()
    added = ["", str(ROOT), *os.environ["PYTHONPATH"].split(os.pathsep)]
    _installed[:] = [path for path in sys.path if path not in added]
    for name in LIBRARIES:
        importlib.import_module(name)
    import deepspeed

    import megalr

    # An op for tensor-parallel inference, which DeepSpeed would compile, for a minute; megalr's ranks do without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for module in pkgutil.walk_packages(megalr.__path__, "megalr."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in LAUNCHERS:
        del sys.modules[name]  # are run as programs
    gc.collect()
    gc.freeze()
    return serve(socket.socket(fileno=fd))


if __name__ == "__main__":
    _end_as_a_program(main(int(sys.argv[1]), int(sys.argv[2])))
