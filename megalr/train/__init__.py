"""The training program behind ``launchers/pretrain.py`` and the scoring behind ``launchers/evaluate.py``.

A run reads one DeepSpeed JSON and a few flags, trains, and leaves everything it made in one folder. Nothing
here knows how an update is computed or how ZeRO cuts a weight: that is :mod:`megalr.api`'s.
"""
