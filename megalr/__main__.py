"""``python -m megalr`` is the ``megalr`` command, for environments whose scripts are not on the PATH."""

import sys

from megalr.commands import main

if __name__ == "__main__":
    sys.exit(main())
