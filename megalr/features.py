"""DeepSpeed's features and whether they work, as Markdown: ``python -m megalr.features > docs/deepspeed.md``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megalr.formatting import markdown_table
from megalr.hosts.features import FEATURES, TRAINS, VERSION, Feature, sections

COLUMNS = ("key", "with megalr", "note", "test")
HEAD = f"""# DeepSpeed's features

`python -m megalr.features > docs/deepspeed.md` writes this page from the table in `megalr/hosts/features.py`.

The keys are those of DeepSpeed {VERSION}'s JSON.

- works: a test trains with it. Where no other is named, that is `{TRAINS}`,
  which compares every weight with those of one plain PyTorch process.
- refused: a value other than its default is refused by name, before anything is built. `megalr.initialize`,
  `megalr.build_optimizer`, `megalr.trainer_optimizer` and the launchers refuse it, and so does `deepspeed.initialize`
  with an optimizer of megalr's.
- untested: left to DeepSpeed.

A key that is not here is refused in a section, and at the top where it resembles one that is or asks for something to
be enabled; of others at the top a warning is given. Keys that begin with `_`, `#`, `//` or `comment` are yours.
"""
TESTS = "tests/deepspeed/test_features.py::"
CALLS = (
    (
        "`engine.set_train_batch_size`, `engine.set_train_micro_batch_size`",
        "works",
        "between two updates; within one refused",
        "test_batches_of_another_size",
    ),
    (
        "`engine.load_checkpoint` with `load_module_only=True`, or `load_optimizer_states=False`",
        "works",
        "loads the weights of the checkpoint that `tag` names; within an update refused",
        "test_weights_alone_are_loaded",
    ),
    (
        "parameters that some ranks use and others do not, as experts in a `ModuleList`",
        "works",
        "at stages 0, 1 and, with `leaf_module`, 3; at stage 2, and at stage 1 with `overlap_comm`, refused in the "
        "first update where ranks differ",
        "test_ranks_that_use_different_parameters",
    ),
    ("layers of `deepspeed.moe`", "refused", "ranks have experts of their own, which megalr takes for copies", ""),
)


def page() -> str:
    """The Markdown of docs/deepspeed.md, without its last line break."""
    parts = [HEAD, "## The JSON\n", _table(""), ""]
    for section in sections():
        parts += [f"## {section}\n", _table(section), ""]
    calls = [[what, status, says, f"`{TESTS}{test}`" if test else ""] for what, status, says, test in CALLS]
    return "\n".join([*parts, "## Beside the JSON\n", markdown_table(COLUMNS, calls, numbers=False)])


def _table(section: str) -> str:
    """The features whose keys are those of a section, "" for the whole JSON."""
    dotted = f"{section}." if section else ""
    own = [each for each in FEATURES if _section(each) == section]
    return markdown_table(COLUMNS, [_line(each, len(dotted)) for each in own], numbers=False)


def _section(feature: Feature) -> str:
    parent = feature.keys[0].rpartition(".")[0]
    return parent if parent in sections() else ""


def _line(feature: Feature, skipped: int) -> Sequence[str]:
    keys = ", ".join(f"`{key[skipped:]}`" for key in feature.keys)
    return keys, feature.status, feature.says, f"`{feature.test}`" if feature.test not in ("", TRAINS) else ""


def main() -> int:
    """Print the page."""
    print(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
