"""What the user sees while a run trains: lines, and one progress bar, on rank 0 alone."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from tqdm import tqdm

_BAR = "{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class Screen:
    """Prints on rank 0 and is silent elsewhere.

    A closed pipe (the reader was killed by the same Ctrl-C, say) never fails a run that is about to write its
    checkpoint: from then on nothing more is printed.
    """

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._bar: tqdm[Any] | None = None

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if not self._enabled:
            return
        try:
            if self._bar is None:
                print(f"{text}\n", end="", flush=True)  # one write, which say_at_once does not come into
            else:
                self._bar.write(text, file=sys.stdout)
                sys.stdout.flush()
        except (OSError, ValueError):
            self._give_up()

    def say_at_once(self, text: str) -> None:
        """Print a line from the handler of a signal, which may have interrupted this object's printing."""
        if not self._enabled:
            return
        line = f"{text}\n" if self._bar is None else f"\n{text}\n"
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.stdout.fileno(), line.encode(errors="replace"))

    def start_bar(self, done: int, total: int) -> None:
        """Show a bar of ``total`` steps, ``done`` of which lie behind."""
        if self._enabled:
            # A log file gets a line now and then; a terminal is redrawn.
            interval = 0.2 if sys.stderr.isatty() else 20.0
            self._bar = tqdm(total=total, initial=done, bar_format=_BAR, mininterval=interval, maxinterval=interval)

    def advance(self, *, loss: float | None, tokens_per_second: float, lr: float) -> None:
        """One step further; ``loss`` is None where there was nothing to predict."""
        shown = "none" if loss is None else f"{loss:.3f}"
        self.advance_by(1, f"loss {shown}, {tokens_per_second:,.0f} tokens/s, lr {lr:.2e}")

    def advance_by(self, count: int, text: str = "") -> None:
        """Some steps further; the text stands behind the bar."""
        if self._bar is None:
            return
        try:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(count)
        except (OSError, ValueError):
            self._give_up()

    def end_bar(self) -> None:
        """Leave the bar as it is and print below it from now on."""
        if self._bar is not None:
            bar, self._bar = self._bar, None
            try:
                bar.close()
            except (OSError, ValueError):
                self._give_up()

    def _give_up(self) -> None:
        self._enabled = False
        self._bar = None
