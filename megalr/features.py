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

- works: a test trains with it. If the table names no test, it is
  `{TRAINS}`,
  which compares every weight with those of one plain PyTorch process.
- refused: any value other than the default is an error that names the key, before anything is built. The error comes
  from `megalr.initialize`, `megalr.build_optimizer`, `megalr.trainer_optimizer` and the launchers, and from
  `deepspeed.initialize` if the optimizer is megalr's.
- untested: megalr passes the key on to DeepSpeed and has no test for it.

Inside a section, a key that this page does not list is refused. At the top level, such a key is refused if it resembles
a listed one or asks for something to be enabled; otherwise you get a warning. Keys that begin with `_`, `#`, `//` or
`comment` are yours and are not checked.
"""
TESTS = "tests/deepspeed/test_features.py::"
CALLS = (
    (
        "`engine.set_train_batch_size`, `engine.set_train_micro_batch_size`",
        "works",
        "between two updates; refused within an update",
        "test_batches_of_another_size",
    ),
    (
        "`engine.load_checkpoint` with `load_module_only=True`, or `load_optimizer_states=False`",
        "works",
        "loads the weights of the checkpoint that `tag` names; refused within an update",
        "test_weights_alone_are_loaded",
    ),
    (
        "parameters that only some ranks use, such as experts in a `ModuleList`",
        "works",
        "at stages 0, 1 and, with `leaf_module`, 3; at stage 2, and at stage 1 with `overlap_comm`, refused in the "
        "first update in which ranks differ",
        "test_ranks_that_use_different_parameters",
    ),
    ("layers of `deepspeed.moe`", "refused", "each rank has its own experts, which megalr would take for copies", ""),
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
