"""Thousands of bad inputs to everything that a user can start or call; see :mod:`tests.soak.__main__`."""
