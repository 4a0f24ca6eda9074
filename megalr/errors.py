"""The one exception that means: the user gave something that cannot work, and the message says what to write."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in a configuration, a flag or a file, worded for the person who made it.

    Launchers print the message alone, on rank 0, and exit with code 2; a library user sees an ordinary ``ValueError``.
    """
