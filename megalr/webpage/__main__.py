"""``python -m megalr.webpage``: write a web page of a run, or one that compares several."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence

from megalr.errors import UserError, printable
from megalr.flags import PlainParser, path
from megalr.webpage.build import write_comparison, write_page

USER_ERROR_CODE = 2


def main(argv: Sequence[str]) -> int:
    """Do what the command line says.

    Args:
        argv: the command line without the program's name.

    Returns:
        The exit code: 0, or 2 after a UserError, of which the message alone is printed.
    """
    parser = PlainParser(
        prog="python -m megalr.webpage",
        description="Write a self-contained web page of a run: loss, learning rates, spectra, memory, settings. It "
        "needs no network, and the run may still train. Several runs are compared on one page. `megalr report` without "
        "a run prints the environment, for a bug report.",
    )
    parser.add_argument("run", type=path, nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--output",
        type=path,
        metavar="FILE",
        help="default: report.html in the run's folder; of several, ./comparison.html",
    )
    try:
        arguments = parser.parse_args(argv)
        runs = arguments.run
        out = arguments.output or (runs[0] / "report.html" if len(runs) == 1 else path("comparison.html"))
        if len(runs) == 1:
            write_page(runs[0], out)
        else:
            write_comparison(runs, out)
    except UserError as error:
        if os.environ.get("MEGALR_TRACEBACK"):
            traceback.print_exception(error)
        print("error: " + "\n".join(map(printable, str(error).splitlines())), file=sys.stderr)
        return USER_ERROR_CODE
    print(printable(str(out)))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main(sys.argv[1:]))
