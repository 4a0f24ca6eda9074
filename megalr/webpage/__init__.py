"""One self-contained web page of a run: curves, events, spectra, memory and settings, without a network.

``build`` writes the page. ``run`` and ``history`` read the run's folder, ``spectra`` its newest checkpoint. ``axes``,
``chart``, ``lanes`` and ``bars`` draw. Everything that a folder holds is foreign input: see ``foreign``.
"""
