"""What csrc/check_cuda.py reads from ptxas, and that a spill is an error."""

import importlib.util
import shutil

import pytest

from tests.kernels.emulated import CSRC

SAID = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN6megalr4cuda12_GLOBAL__N_16updateIfEEvT_' for 'sm_90'
ptxas info    : Function properties for _ZN6megalr4cuda12_GLOBAL__N_16updateIfEEvT_
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 47 registers, used 0 barriers
ptxas info    : Compile time = 65.423 ms
"""


@pytest.fixture
def check():
    spec = importlib.util.spec_from_file_location("check_cuda", CSRC / "check_cuda.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="there is no c++filt")
def test_registers_and_spills_are_read(check, capsys):
    (kernel,) = check.read_ptxas("adam.cu", SAID.format(stack=8, stores=4, loads=12))
    assert kernel == ("adam.cu", "update", "sm_90", 47, 8, 4, 12)
    check.print_table([kernel, kernel._replace(registers=50)])
    assert capsys.readouterr().out.splitlines()[-1].split() == ["adam.cu", "update", "sm_90", "2", "47-50", "8", "32"]


@pytest.mark.parametrize(("loads", "fails"), [(0, False), (12, True)])
def test_a_spill_is_an_error(check, monkeypatch, loads, fails):
    kernel = check.Kernel("adam.cu", "update", "sm_90", 47, 0, 0, loads)
    monkeypatch.setattr(check, "compile_kernels", lambda: [kernel])
    monkeypatch.setattr("sys.argv", ["check_cuda.py"])
    if fails:
        with pytest.raises(SystemExit, match="1 kernels spill registers"):
            check.main()
    else:
        check.main()


def test_output_without_kernels_is_an_error(check):
    """Silence must not pass for no spills."""
    with pytest.raises(SystemExit, match="names no kernel"):
        check.read_ptxas("adam.cu", "ptxas info    : 0 bytes gmem\n")
