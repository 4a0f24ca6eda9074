"""``inspect``: what a checkpoint says of itself, without reading its tensors."""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from megalr.checkpoint.folders import Listed, is_one, latest, listed
from megalr.checkpoint.format import itemsize
from megalr.checkpoint.manifest import MANIFEST, Manifest, ReplacedError, missing_or_cut, read_manifest
from megalr.errors import UserError, printable
from megalr.formatting import human_bytes

LABEL = 22  # characters
# What is kept under the first part of a key, in the order in which it is shown; others follow.
KINDS = {
    "weights": "fp32 masters of what is trained",
    "exp_avg": "first moments",
    "exp_avg_sq": "second moments",
    "rule": "a rule's states",
    "frozen": "weights that are not trained",
    "buffers": "of the model",
    "remainders": "what frozen weights lost in rounding",
    "waiting": "rows that wait to be switched in",
    "directions": "of compressed activations",
    "random": "states of random numbers, one of a process",
}


def inspect(place: Path, pattern: str | None) -> None:
    """Print what a checkpoint is, or a line for each of several.

    Args:
        place: a checkpoint's folder, or the directory of several.
        pattern: list the tensors of one whose key matches, as a shell matches names, or contains it; None for none.

    Raises:
        UserError: there is no checkpoint, the one's manifest cannot be read, or there are several of which tensors are
            to be listed.
    """
    if not is_one(place):
        if pattern is not None:
            raise UserError(f"{place} holds several checkpoints: name one of them, as {listed(place)[0].folder}")
        _print_several(place)
    elif pattern is None:
        _print_one(read_manifest(place))
    else:
        _print_tensors(read_manifest(place), pattern)


def _print_several(directory: Path) -> None:
    named, found = latest(directory), listed(directory)
    width = max(len(each.folder.name) for each in found)
    for each in found:
        mark = "latest" if each.folder.name == named else ""
        print(printable(f"{each.folder.name:<{width}}  {mark:<6}  {_line(each)}"))
    if named is not None and all(each.folder.name != named for each in found):
        print(f"`latest` names {named}, which is not there")


def _line(each: Listed) -> str:
    if each.manifest is None:
        return f"damaged: {each.wrong}" if each.is_damaged else each.wrong
    manifest = each.manifest
    try:
        wrong = missing_or_cut(manifest)
    except ReplacedError as error:
        return str(error)
    line = f"{manifest.updates:,} updates, {_written(manifest)}, {human_bytes(manifest.size)}, {_layout(manifest)}"
    return f"{line}; damaged: {'; '.join(wrong)}" if wrong else line


def _print_one(manifest: Manifest) -> None:
    content = manifest.content
    print(manifest.folder)
    rows = [
        ("updates", f"{manifest.updates:,}"),
        ("written", _written(manifest)),
        ("by", ", ".join(f"{name} {version}" for name, version in content["versions"].items())),
        ("layout", _layout(manifest)),
        ("model", _model(content["model"])),
        *_method(manifest),
        *_parameters(manifest),
        ("client state", ", ".join(content["client"]) or "none"),
    ]
    for label, value in rows:
        print(f"{printable(label):<{LABEL}}{printable(value)}")
    print(f"\n{'kind':<{LABEL}}{'tensors':>10}{'bytes':>12}")
    sizes = _kinds(manifest)
    for kind in sorted(sizes, key=lambda kind: list(KINDS).index(kind) if kind in KINDS else len(KINDS)):
        tensors, size = sizes[kind]
        print(f"{printable(kind):<{LABEL}}{tensors:>10,}{human_bytes(size):>12}   {KINDS.get(kind, '')}".rstrip())
    files = {name: file["bytes"] for name, file in content["files"].items()}
    files[MANIFEST] = (manifest.folder / MANIFEST).stat().st_size
    print(f"\n{'file':<{LABEL + 10}}{'bytes':>12}")
    for name, size in files.items():
        print(f"{name:<{LABEL + 10}}{human_bytes(size):>12}")
    for line in missing_or_cut(manifest):
        print(f"damaged: {line}")


def _print_tensors(manifest: Manifest, pattern: str) -> None:
    keys = [key for key in manifest.tensors if pattern in key or fnmatch.fnmatchcase(key, pattern)]
    if not keys:
        print(f"no tensor's key contains or matches {pattern}")
        return
    shapes = {key: "x".join(map(str, manifest.tensors[key]["shape"])) for key in keys}
    name_width, shape_width = max(len(printable(key)) for key in keys), max(map(len, shapes.values()))
    for key in sorted(keys):
        found = manifest.tensors[key]
        pieces = len(found["pieces"])
        print(
            f"{printable(key):<{name_width}}  {shapes[key]:>{shape_width}}  {found['dtype']:<4}  "
            f"{pieces} piece{'s' * (pieces != 1)}"
        )


def _method(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """The sections that decide how it is trained, and the forms of state that follow from them."""
    config, numbers = manifest.content["config"], manifest.content["numbers"]["optimizer"]
    section = config.get("megalr", {})
    yield "optimizer", _words(section.get("optimizer", config.get("optimizer", {"type": "AdamW"})))
    yield "parametrization", _words(section.get("parametrization", {"type": "full"}))
    for key, value in section.items():
        if key not in ("optimizer", "parametrization") and value is not None:
            yield key, _words(value)
    yield "state of", _words({**numbers.get("rule", {}), **numbers.get("layers", {})})


def _words(section: Any) -> str:
    """A section as "AdamW: lr 0.003, betas [0.9, 0.99]", anything else as JSON has it."""
    if not isinstance(section, Mapping):
        return json.dumps(section)
    params = section.get("params")
    rest = {**section, **params} if isinstance(params, Mapping) else dict(section)
    kind = rest.pop("type", None)
    rest.pop("params", None)
    values = ", ".join(f"{key} {_word(value)}" for key, value in rest.items())
    return ": ".join(part for part in (None if kind is None else _word(kind), values) if part) or "defaults"


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _parameters(manifest: Manifest) -> Iterator[tuple[str, str]]:
    for label, kind in (("trained", "weights"), ("frozen", "frozen")):
        sizes = [math.prod(s) for key, s in manifest.shapes.items() if key.startswith(f"{kind}/")]
        yield label, f"{sum(sizes):,} parameters in {len(sizes):,} tensors"


def _kinds(manifest: Manifest) -> dict[str, tuple[int, int]]:
    """Number of tensors and bytes, by kind."""
    found: dict[str, tuple[int, int]] = {}
    for key, tensor in manifest.tensors.items():
        kind = key.partition("/")[0]
        tensors, size = found.get(kind, (0, 0))
        found[kind] = tensors + 1, size + math.prod(tensor["shape"]) * itemsize(tensor["dtype"])
    return found


def _model(config: Mapping[str, Any] | None) -> str:
    if config is None:
        return "unknown: it has no configuration of transformers"
    names = config.get("architectures")
    return f"{', '.join(map(_word, names if isinstance(names, list) else ())) or '?'} ({config.get('model_type')})"


def _layout(manifest: Manifest) -> str:
    layout = manifest.content["layout"]
    processes, tensor = layout["processes"], layout["tensor_parallel"]
    words = f"stage {layout['stage']}, {processes} process{'es' * (processes != 1)}"
    return (
        f"{words}, {tensor} of them tensor-parallel, {layout['dtype']}" if tensor > 1 else f"{words}, {layout['dtype']}"
    )


def _written(manifest: Manifest) -> str:
    """In local time."""
    try:
        return f"{datetime.fromtimestamp(manifest.order / 1e9):%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError, OSError):  # of no calendar
        return "at an unknown time"
