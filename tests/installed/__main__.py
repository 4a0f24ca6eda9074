"""Build an sdist and a wheel into dist/, and try both outside of the checkout: ``make dist``."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.installed.building import build
from tests.installed.trying import checks, install, perform
from tests.processes import ROOT, ProcessError


def main() -> int:
    """Build and try; returns the exit code, 1 where a check failed."""
    parser = argparse.ArgumentParser(prog="make dist", description=__doc__)
    parser.add_argument("--borrow", action="store_true", help="do not download what megalr needs: use .venv's packages")
    parser.add_argument(
        "--compiled", action="store_true", help="a wheel for this platform, with the compiled ops in it"
    )
    parser.add_argument("--no-comparison", action="store_true", help="leave the comparison of methods out: 5 minutes")
    arguments = parser.parse_args()
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    sdist, wheel = build(dist, compiled=arguments.compiled)
    print(f"built {sdist.relative_to(ROOT)} and {wheel.relative_to(ROOT)}", flush=True)
    with tempfile.TemporaryDirectory(prefix="megalr-dist-") as scratch:
        Path(scratch).chmod(0o755)  # for the ordinary user
        for distribution, whole in ((wheel, not arguments.borrow), (sdist, False)):
            place = Path(scratch, distribution.suffix.removeprefix("."))
            place.mkdir()
            start = time.monotonic()
            installation = install(distribution, place / "env", whole=whole)
            source = "its requirements" if whole else ".venv's packages"
            print(f"installed {distribution.name} with {source}: {time.monotonic() - start:.0f} s", flush=True)
            for check in checks(installation, place, comparison=whole and not arguments.no_comparison):
                try:
                    print(f"  {check.name}: {perform(check, installation, place)}", flush=True)
                except ProcessError as error:
                    print(f"  {check.name}: failed\n{error}", file=sys.stderr, flush=True)
                    return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
