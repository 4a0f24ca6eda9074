"""The wheel has everything in it that an installation needs, and nothing of the checkout besides."""

import tarfile
import zipfile

import pytest

from megalr import resources
from tests.installed.building import build, files_of
from tests.installed.trying import checks, install, perform
from tests.processes import ROOT


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(tmp_path_factory.mktemp("dist"))


def test_the_wheel_is_for_every_platform_and_holds_all_files(built):
    _, wheel = built
    assert wheel.name.endswith("-py3-none-any.whl")
    files = files_of(wheel)
    for kind, source in resources.IN_CHECKOUT.items():
        expected = {f"megalr/{kind}/{path.name}" for path in (ROOT / source).iterdir() if path.is_file()}
        assert {file for file in files if file.startswith(f"megalr/{kind}/")} == expected
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "megalr").rglob("*.py")}
    assert {file for file in files if file.endswith(".py")} == modules
    novels = {path.relative_to(ROOT).as_posix() for path in (ROOT / "megalr/data/austen").iterdir()}
    assert novels | {"megalr/py.typed", "megalr/csrc/adam.h", "megalr/csrc/cuda/binding.cpp"} <= files
    assert {file.split("/")[0] for file in files if not file.startswith("megalr-")} == {"megalr"}
    assert not [file for file in files if "emulation" in file or "prebuilt" in file or "__pycache__" in file]


def test_the_sdist_holds_what_the_wheel_is_made_of(built):
    sdist, _ = built
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for source in (*resources.IN_CHECKOUT.values(), "csrc/cpu"):
        assert {f"{source}/{path.name}" for path in (ROOT / source).iterdir() if path.is_file()} <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "requirements.txt"} <= names


def test_the_command_and_the_extras_are_declared(built):
    _, wheel = built
    (metadata,) = (file for file in files_of(wheel) if file.endswith(".dist-info/entry_points.txt"))
    assert "megalr = megalr.commands:main" in _read(wheel, metadata)
    extras = _read(wheel, metadata.replace("entry_points.txt", "METADATA"))
    for name in ("mpi", "trainer", "evaluate", "dev"):
        assert f"Provides-Extra: {name}\n" in extras


@pytest.mark.slow
def test_the_wheel_works_outside_of_the_checkout(built, tmp_path):
    _, wheel = built
    installation = install(wheel, tmp_path / "an environment", whole=False)
    for check in checks(installation, tmp_path, comparison=False):
        perform(check, installation, tmp_path)


@pytest.mark.slow
def test_a_wheel_with_compiled_ops_is_for_one_platform(tmp_path):
    _, wheel = build(tmp_path, compiled=True)
    assert "-none-any" not in wheel.name and "linux" in wheel.name
    assert [file for file in files_of(wheel) if file.startswith("megalr/ops/prebuilt/megalr_cpu-")]


def _read(wheel, name):
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name).decode()
