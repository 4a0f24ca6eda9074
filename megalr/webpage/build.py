"""Write the page of a run, or of several that are compared."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megalr.errors import UserError
from megalr.webpage.comparing import MOST_RUNS, comparison
from megalr.webpage.document import Section, header_of, page
from megalr.webpage.evaluations import evaluations_section
from megalr.webpage.machine import memory_sections, speed_sections
from megalr.webpage.run import Run, read_run
from megalr.webpage.settings import settings_section
from megalr.webpage.spectra import read_spectra
from megalr.webpage.training import (
    exchange_section,
    gradient_section,
    loss_section,
    perplexity_section,
    rates_section,
    skipped_section,
    tokens_axis,
)
from megalr.webpage.weights import spectra_sections


def write_page(run: Path, out: Path) -> None:
    """Write one self-contained HTML file about a run, which may still train.

    Args:
        run: the run's folder; nothing in it is changed, but for ``out`` if that lies there.
        out: the file, which is replaced if it is there.

    Raises:
        UserError: ``run`` holds no run, or ``out`` cannot be written.
    """
    _write(out, page_of(read_run(run)))


def write_comparison(runs: Sequence[Path], out: Path) -> None:
    """The same, about several runs: their curves, results, memory, and the settings in which they differ.

    Raises:
        UserError: a folder holds no run, a folder is named twice, there are too many, or ``out`` cannot be written.
    """
    places = [run.expanduser().resolve() for run in runs]
    twice = next((place for place in places if places.count(place) > 1), None)
    if twice is not None:
        raise UserError(f"{twice} is named twice")
    if len(runs) > MOST_RUNS:
        raise UserError(f"{len(runs)} runs are too many for one page: name at most {MOST_RUNS}")
    found = [read_run(run) for run in runs]
    header, sections = comparison(found)
    _write(out, page(f"{len(found)} runs", header, sections))


def page_of(run: Run) -> str:
    """The HTML of a run's page."""
    x = tokens_axis([run.history])
    spectra = read_spectra(run.path)
    about, charts = spectra_sections(spectra)
    training = [f(run, x) for f in (perplexity_section, rates_section, gradient_section, exchange_section)]
    return page(
        f"{run.name} · megalr",
        header_of(run),
        [
            Section("training", "Training", loss_section(run, x) + _grid(training) + skipped_section(run)),
            Section("weights", "Spectra of weights", about + _grid(charts, "grid small")),
            Section("throughput", "Throughput", _grid(speed_sections(run, x))),
            Section("use", "Memory", _grid(memory_sections(run, spectra, x))),
            Section("evaluations", "Held-out text", evaluations_section(run)),
            Section("settings", "Settings", settings_section(run)),
        ],
    )


def _grid(parts: Sequence[str], name: str = "grid") -> str:
    shown = "".join(parts)
    return f'<div class="{name}">{shown}</div>' if shown else ""


def _write(out: Path, text: str) -> None:
    """Replace a file by a whole one; a link at its place is replaced, not followed."""
    out = out.expanduser().absolute()
    if out.is_dir() and not out.is_symlink():
        raise UserError(f"{out} is a folder: name a file")
    try:
        handle, part = tempfile.mkstemp(prefix=f".{out.name[:40]}.", dir=out.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(part, 0o666 & ~_umask())
            os.replace(part, out)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(part)
            raise
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}. Name another file with --output") from error


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
