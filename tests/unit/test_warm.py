"""A program that is forked finds what one that is started finds, and ends as that does."""

import json
import signal
import sys

import psutil
import pytest

from megalr.processes import free_port
from tests.processes import ProcessError, python, run, started

FACTS = """
import atexit, json, os, signal, sys, threading
streams = (sys.stdin, sys.stdout, sys.stderr)
print(json.dumps({
    "argv": sys.argv,
    "path": sys.path,
    "name": __name__,
    "file": globals().get("__file__"),
    "main": vars(sys.modules["__main__"]) is globals(),
    "folder": os.getcwd(),
    "environment": {key: value for key, value in os.environ.items() if key != "LC_CTYPE"},
    "group": (os.getpgid(0) == os.getpid(), os.getsid(0) == os.getpid()),
    "handlers": {int(number): str(signal.getsignal(number)) for number in signal.valid_signals()},
    "files": sorted(int(fd) for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}"))[:3],
    "encodings": [stream.encoding for stream in streams],
    "input": sys.stdin.read(),
}))
atexit.register(lambda: print("at the end"))
threading.Thread(target=lambda: (threading.Event().wait(0.3), print("a thread"))).start()
print("an error", file=sys.stderr)
sys.exit({"code": 3, "words": "so it ends", "none": None}[sys.argv[1]])
"""


def alike(words, folder, **options):
    """What a program ends with, once started and once forked."""
    cold = run(words, cwd=folder, check=False, **options)
    forked = run(words, cwd=folder, check=False, warm=True, **options)
    assert (forked.code, forked.stderr) == (cold.code, cold.stderr)
    first, *rest = forked.stdout.splitlines()
    assert rest == cold.stdout.splitlines()[1:]
    found, expected = json.loads(first), json.loads(cold.stdout.splitlines()[0])
    assert found == expected
    return cold


@pytest.mark.parametrize(("how", "code"), [("code", 3), ("words", 1), ("none", 0)])
def test_a_script(tmp_path, how, code):
    script = tmp_path / "a folder" / "a script.py"
    script.parent.mkdir()
    script.write_text(FACTS)
    done = alike([sys.executable, script, how, "--flag"], tmp_path, env={"OURS": "é"})
    assert done.code == code
    assert done.stdout.splitlines()[1:] == ["a thread", "at the end"]


def test_a_module_and_code(tmp_path):
    (tmp_path / "module_of_ours.py").write_text(FACTS)
    alike([sys.executable, "-m", "module_of_ours", "none", "more"], tmp_path, one_stream=True)
    alike([sys.executable, "-u", "-m", "module_of_ours", "code"], tmp_path)
    alike(python(FACTS, "none"), tmp_path)


def test_other_processes_see_its_words_and_its_signals_arrive(tmp_path):
    program = "import time; print('ready', flush=True); time.sleep(60)"
    for number, code in ((signal.SIGTERM, -15), (signal.SIGKILL, -9), (signal.SIGINT, -2)):
        with started([sys.executable, "-c", program, "a word"], warm=True) as process:
            process.read_until("ready")
            words = psutil.Process(process.pid).cmdline()
            assert [word for word in words if word] == [sys.executable, "-c", program, "a word"]
            process.send_signal(number)
            done = process.wait()
            assert done.code == code
            assert ("KeyboardInterrupt" in done.stderr) == (number == signal.SIGINT)


def test_everything_is_imported_and_what_it_changes_is_forgotten():
    warm = "import sys; print({'deepspeed', 'transformers.trainer', 'megalr.api'} <= {*sys.modules})\n"
    warm += "import torch; print(hasattr(torch, 'mark')); torch.mark = 1"
    for _ in range(2):
        assert run(python(warm), warm=True).stdout == "True\nFalse\n"
    with pytest.raises(ProcessError, match="did not end within 1 s"):
        run(python("import time; time.sleep(60)"), warm=True, limit=1)


LAUNCHED = """
import json, os, pathlib, sys, time, psutil
parents = [parent.cmdline() for parent in psutil.Process().parents()]
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
ranks = [os.environ[name] for name in names]
found = {"argv": sys.argv[1:], "ranks": ranks, "parent": parents[0][:4]}
pathlib.Path(ranks[0] + ".new").write_text(json.dumps(found))
os.replace(ranks[0] + ".new", ranks[0])
while not pathlib.Path("0").exists():  # a launcher ends the other rank when this one fails
    time.sleep(0.01)
sys.exit(int(os.environ["RANK"]) * 5)
"""
RUNNERS = {
    "deepspeed": ["deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port"],
    "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "--master_port"],
}


@pytest.mark.parametrize("launcher", RUNNERS)
def test_launchers_start_ranks_that_are_their_children(tmp_path, launcher):
    script = tmp_path / "a script.py"
    script.write_text(LAUNCHED)
    words = [sys.executable, "-m", *RUNNERS[launcher]]
    found = {}
    for warm in (False, True):
        start = [*words, str(free_port()), script, "--flag"]
        done = run(start, warm=warm, check=False, cwd=tmp_path, one_stream=True, env={"CUDA_VISIBLE_DEVICES": ""})
        assert done.code, done.output
        ranks = [tmp_path / rank for rank in "01"]
        found[warm] = done.code, [json.loads(file.read_text()) for file in ranks]
        for file in ranks:
            file.unlink()
    assert found[True] == found[False]
