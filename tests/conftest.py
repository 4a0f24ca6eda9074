"""What holds for all tests."""

from pathlib import Path

import pytest

pytest_plugins = ["tests.limits", "tests.budget"]

# Files that take long first: where workers take file after file, both end at about the same time.
ORDER = ("end_to_end", "deepspeed", "kernels", "world", "installed", "unit")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by folder."""
    folder = {item: item.path.relative_to(Path(__file__).parent).parts[0] for item in items}
    items.sort(key=lambda item: ORDER.index(folder[item]) if folder[item] in ORDER else len(ORDER))
