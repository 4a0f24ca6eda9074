"""One self-contained web page of a run: curves, events, spectra, memory and settings, without a network.

``build`` writes the page. ``run`` and ``history`` read the run's folder, ``spectra`` its newest checkpoint. ``axes``,
``chart``, ``lanes``, ``bars`` and ``tables`` draw. Everything that a folder holds is foreign input: see ``foreign``.
"""

from megalr.webpage.build import write_comparison, write_page

__all__ = ["write_comparison", "write_page"]
