"""SIGTERM, SIGUSR1 and Ctrl-C."""

import os
import signal
import sys

import pytest

from megalr.train import interruption
from megalr.train.interruption import StopRequest, agreed_reason, exit_code
from tests.processes import python, run, started

REQUESTS = (*interruption._REQUESTS, signal.SIGINT)  # without SIGHUP where these tests run under nohup


@pytest.fixture(autouse=True)
def _handlers_as_before():
    before = {number: signal.getsignal(number) for number in REQUESTS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_request_is_told_once_and_at_once():
    told = []
    with StopRequest(told.append):
        os.kill(os.getpid(), signal.SIGINT)
        assert told == ["SIGINT"]
        os.kill(os.getpid(), signal.SIGTERM)
    assert told == ["SIGINT"]


def test_a_launcher_that_is_gone_is_told_once(monkeypatch):
    told = []
    monkeypatch.setattr(interruption, "_launchers", lambda: [(os.getpid(), os.getppid() + 1)])
    request = StopRequest(told.append)
    assert request.reason == request.reason == "the launcher is gone"
    assert told == ["the launcher is gone"]


@pytest.mark.parametrize("number", REQUESTS)
def test_a_signal_is_a_request(number):
    with StopRequest() as request:
        assert request.reason is None
        os.kill(os.getpid(), number)
        assert request.reason == number.name


def test_a_launcher_may_repeat_itself():
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # forwarded, within moments
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.reason == "SIGINT"
    os.kill(os.getpid(), signal.SIGTERM)  # still writing its last lines
    os.kill(os.getpid(), signal.SIGUSR1)


def test_a_second_ctrl_c_ends_the_process_at_once(monkeypatch):
    codes = []
    times = iter([100.0, 103.0])
    monkeypatch.setattr(interruption.os, "_exit", codes.append)
    monkeypatch.setattr(interruption.time, "monotonic", lambda: next(times))
    with StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        assert codes == []
        os.kill(os.getpid(), signal.SIGINT)
    assert codes == [130]


def test_only_ctrl_c_is_an_end_that_was_wanted():
    assert [exit_code(reason) for reason in ("SIGINT", "SIGTERM", "SIGUSR1", "the launcher is gone")] == [0, 75, 75, 75]


def test_ctrl_c_on_one_rank_is_ctrl_c():
    assert agreed_reason([None, "SIGTERM", "SIGINT"]) == "SIGINT"
    assert agreed_reason([None, "SIGUSR1", None]) == "SIGUSR1"
    assert agreed_reason([None]) is None


def test_handlers_are_put_back_where_nothing_happened():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_launcher_that_is_gone_is_a_request(monkeypatch):
    me, parent = os.getpid(), os.getppid()
    monkeypatch.setattr(interruption, "_launchers", lambda: [(me, parent)])
    assert StopRequest().reason is None
    monkeypatch.setattr(interruption, "_launchers", lambda: [(me, parent + 1)])
    assert StopRequest().reason == "the launcher is gone"


@pytest.mark.parametrize(
    ("commands", "watched"),
    [
        ({1: ["python", "-u", "-m", "deepspeed.launcher.launch"], 2: ["python", "/venv/bin/deepspeed"]}, 2),
        ({1: ["python", "-u", "-m", "deepspeed.launcher.launch"], 2: ["python", "-m", "deepspeed.launcher.runner"]}, 2),
        ({1: ["python", "-u", "-m", "deepspeed.launcher.launch"], 2: ["bash"]}, 1),
        ({1: ["bash"], 2: ["python", "/venv/bin/deepspeed"]}, 0),
    ],
)  # fmt: skip
def test_only_launchers_are_watched(monkeypatch, commands, watched):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(interruption.os, "getppid", lambda: 1)
    monkeypatch.setattr(interruption, "_parent", lambda process: process + 1)
    monkeypatch.setattr(interruption, "_command", commands.__getitem__)
    assert len(interruption._launchers()) == watched


LAUNCH = ["python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x"]
OF_DEEPSPEED = {"CROSS_RANK": "0", "CROSS_SIZE": "1"}
OF_TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}


@pytest.mark.parametrize(
    ("variables", "parents", "is_gone"),
    [
        # Of DeepSpeed's command, which has started the process that starts the ranks.
        ({}, {50: LAUNCH, 1: ["/sbin/init"]}, True),
        ({}, {50: LAUNCH, 40: ["/usr/lib/systemd/systemd", "--user"]}, True),
        ({}, {50: LAUNCH, 40: ["bash"]}, False),  # written out, by somebody who sits there
        ({}, {50: [*LAUNCH, "--node_rank=0"], 1: ["/sbin/init"]}, False),  # from another node
        ({}, {50: LAUNCH, 1: ["/usr/bin/python3", "/usr/bin/deepspeed"]}, False),  # a container's first process
        ({}, {50: LAUNCH, 1: ["/usr/bin/python3", "start.py"]}, False),  # the same, as somebody else calls it
        ({interruption.LAUNCHER: "40"}, {50: LAUNCH, 40: ["python", "renamed"]}, False),
        ({interruption.LAUNCHER: "39"}, {50: LAUNCH, 40: ["tini"]}, True),
        ({interruption.LAUNCHER: "39"}, {50: [*LAUNCH, "--node_rank=0"], 40: ["sshd"]}, False),
        # Of what starts the ranks.
        (OF_DEEPSPEED, {1: ["/sbin/init"]}, True),
        (OF_DEEPSPEED, {50: ["bash", "train.sh"], 1: ["/sbin/init"]}, False),  # deepspeed --no_python
        (OF_TORCHRUN, {1: ["tini", "--", "train.sh"]}, True),
        (OF_TORCHRUN, {1: ["/usr/bin/python3", "/usr/bin/torchrun"]}, False),
        # There was none: nohup, and a container's first process.
        ({}, {1: ["/sbin/init"]}, False),
        ({}, {50: ["bash"], 1: ["/sbin/init"]}, False),
        ({"RANK": "0", "WORLD_SIZE": "1"}, {1: ["/sbin/init"]}, False),
    ],
)
def test_a_launcher_may_be_gone_before_the_rank_is_there(monkeypatch, variables, parents, is_gone):
    """Parents by process id, from this process's own upwards; orphans are taken in by 1, or by the user's systemd."""
    for name in ("TORCHELASTIC_RUN_ID", *OF_DEEPSPEED, interruption.LAUNCHER):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    above = dict(zip([os.getpid(), *parents], [*parents, 0], strict=True))
    monkeypatch.setattr(interruption.os, "getppid", lambda: above[os.getpid()])
    monkeypatch.setattr(interruption, "_parent", above.__getitem__)
    monkeypatch.setattr(interruption, "_command", parents.__getitem__)
    assert StopRequest().reason == ("the launcher is gone" if is_gone else None)


START = """
import hashlib, multiprocessing, os, signal
from megalr.train.interruption import StopRequest, end_at_once_when_asked
end_at_once_when_asked()
"""


@pytest.mark.parametrize("number", interruption._REQUESTS)
def test_before_there_is_something_to_save_it_ends_at_once(number):
    """Also in a library that does not come back to Python, as others are waited for."""
    script = "print('ready', flush=True); hashlib.pbkdf2_hmac('sha256', b'', b'', 2_000_000_000)"
    with started(python(START + script)) as process:
        process.read_until("ready\n")
        process.send_signal(number)
        assert process.wait().code == 75


@pytest.mark.parametrize("has_trained", [False, True])
def test_a_launcher_that_goes_ends_what_has_nothing_to_save(has_trained):
    """Also in a library that does not come back to Python. In a run and after a request there is time to save."""
    rank = """
import hashlib, os, sys, time
from megalr.train import interruption
interruption._launchers = lambda: [(os.getpid(), os.getppid())]
interruption.end_with_launcher()
if HAS_TRAINED:
    with interruption.StopRequest() as request:
        print("ready", flush=True)
        while request.reason is None:
            time.sleep(0.05)
        time.sleep(2.5)
    time.sleep(1.5)
    print("saved:", request.reason, flush=True)
    sys.exit()
print("ready", flush=True)
hashlib.pbkdf2_hmac('sha256', b'', b'', 2_000_000_000)
""".replace("HAS_TRAINED", str(has_trained))
    with started(["sh", "-c", '"$0" -c "$1" & wait', sys.executable, rank]) as process:
        process.read_until("ready\n")
        process.send_signal(signal.SIGTERM)
        stopped = process.wait()  # for what holds its output open
    assert stopped.stdout == ("ready\nsaved: the launcher is gone\n" if has_trained else "ready\n")


def test_nohup_stays_nohup():
    script = """
import os, signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)
from megalr.train.interruption import StopRequest, end_at_once_when_asked
end_at_once_when_asked()
os.kill(os.getpid(), signal.SIGHUP)
with StopRequest() as request:
    os.kill(os.getpid(), signal.SIGHUP)
    print(request.reason)
"""
    assert run(python(script)).stdout == "None\n"


def test_requests_and_processes_that_are_forked_off_do_not_end_it():
    script = """
def wait():
    signal.pause()

if __name__ == "__main__":
    child = multiprocessing.get_context("fork").Process(target=wait)
    child.start()
    child.terminate()
    child.join()
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGUSR1)
    print("ready", child.exitcode, request.reason)
"""
    assert run(python(START + script)).stdout == "ready -15 SIGUSR1\n"
