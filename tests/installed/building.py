"""Build an sdist from a copy of the checkout, and a wheel from the sdist."""

from __future__ import annotations

import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from tests.processes import ROOT, run

# What a checkout has beside sources; the backend writes build/ and *.egg-info, which would be in the way of a rebuild.
NOT_SOURCES = (".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "prebuilt")
BUILD_SDIST = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
COMPILE_SECONDS = 900.0


def build(dist: Path, *, compiled: bool = False) -> tuple[Path, Path]:
    """Build into a folder, which is made.

    Args:
        dist: gets both files.
        compiled: whether the wheel has the compiled ops in it, which makes it one for this platform.

    Returns:
        The sdist and the wheel.
    """
    dist.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        sources = Path(scratch, "sources")
        shutil.copytree(ROOT, sources, symlinks=True, ignore=shutil.ignore_patterns(*NOT_SOURCES))
        alone = {"PYTHONPATH": None, "MEGALR_BUILD_OPS": "1" if compiled else None}
        run([sys.executable, "-c", BUILD_SDIST, dist.absolute()], cwd=sources, env=alone)
        (sdist,) = dist.glob("megalr-*.tar.gz")
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        run([*pip, "--wheel-dir", scratch, sdist.absolute()], cwd=Path(scratch), env=alone, limit=COMPILE_SECONDS)
        (built,) = Path(scratch).glob("megalr-*.whl")
        wheel = Path(shutil.copy(built, dist))
    return sdist, wheel


def files_of(wheel: Path) -> set[str]:
    """The files in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}
