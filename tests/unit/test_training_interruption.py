"""SIGTERM, SIGUSR1 and Ctrl-C."""

import os
import signal

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
