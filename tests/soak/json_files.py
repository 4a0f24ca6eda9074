"""Files that should hold JSON or YAML and do not: the configuration, a model's shape, a recipe."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from tests.end_to_end.commands import SMALL_MODEL
from tests.soak.trial import Case
from tests.soak.workshop import COMPARE, PLAN, TRAIN, good_config

CUTS = 12  # places at which a file is cut off
FLIPS = 12  # bytes that are replaced by one that no JSON has there
DEEP, HUGE = 100_000, 1 << 25

# By the file's part in the command: its words, and what is right in it.
ROLES: dict[str, tuple[tuple[str, ...], str]] = {
    "configuration": ((*TRAIN, "--deepspeed", "bad.json"), json.dumps(good_config())),
    "model of a run": ((*TRAIN, "--deepspeed", "good.json", "--model", "bad.json"), json.dumps(SMALL_MODEL)),
    "model of a plan": ((PLAN, "--models", "bad.json", "--ranks", "8"), json.dumps(SMALL_MODEL)),
    "recipe": ((COMPARE, "--recipe", "bad.json", "--output", "compared"), json.dumps({"base": "good.json"})),
}
NO_OBJECT = (
    "",
    " ",
    "null",
    "1",
    '"x"',
    "[]",
    "true",
    "{",
    "}",
    "{}{}",
    "[1, 2",
    '{"a": 1,}',
    "{'a': 1}",
    "\x00",
    "\ud7ff",
)
MODEL_VALUES = {
    "hidden_size": ("0", "-32", "1.5", '"32"', "null", "[]", "33", "NaN", "9" * 5000),
    "intermediate_size": ("0", "-1", '"x"', "null", "{}"),
    "num_hidden_layers": ("0", "-2", "1.5", '"2"', "null", "[]"),
    "num_attention_heads": ("0", "-4", "3", '"4"', "null", "1.5"),
    "vocab_size": ("0", "-1", '"x"', "null"),
    "max_position_embeddings": ("0", "-1", '"64"', "null"),
    "model_type": ('"gpt2"', "1", "null", '""', "[]"),
}
# Sizes of a model that is too small for the text.
TOO_SMALL = {"vocab_size": ("10", "4095"), "max_position_embeddings": ("8", "31")}


def damaged_json(rng: Random) -> Iterator[Case]:
    """Each file cut, in other encodings, no file at all, or without end."""
    for role, (words, right) in ROLES.items():
        for text in NO_OBJECT:
            yield _case(role, words, f"text {text!r}", text)
        for place in rng.sample(range(1, len(right) - 1), CUTS if len(right) > 99 else 4):
            yield _case(role, words, f"cut at {place}", right[:place])
        for place in rng.sample(range(len(right)), FLIPS if len(right) > 99 else 4):
            yield _case(role, words, f"byte 0xff at {place}", _with_byte(right, place))
        yield _case(role, words, "UTF-16", right.encode("utf-16"))
        yield _case(role, words, "UTF-32", right.encode("utf-32"))
        yield _case(role, words, "random bytes", rng.randbytes(300))
        yield _case(role, words, "deep lists", "[" * DEEP + "]" * DEEP)
        yield _case(role, words, "deep objects", '{"a":' * DEEP + "1" + "}" * DEEP)
        yield _case(role, words, "32 MB of one bracket", "[" * HUGE)
        for about, prepare in NO_FILES.items():
            yield Case(about=f"{role}: {about}", words=words, names=("bad.json",), prepare=prepare)
    words, right = ROLES["configuration"]
    bom = right.encode("utf-8-sig")
    yield Case(about="configuration with a BOM", words=words, expect="good", files={"bad.json": bom})


def wrong_models(rng: Random) -> Iterator[Case]:
    """A model's shape with values that make no model."""
    for role in ("model of a run", "model of a plan"):
        words, _ = ROLES[role]
        for key, values in MODEL_VALUES.items():
            for value in (*values, *(TOO_SMALL.get(key, ()) if words != ROLES["model of a plan"][0] else ())):
                text = json.dumps({**SMALL_MODEL, key: "@@"}).replace('"@@"', value)
                names = (key, "bad.json", key.removeprefix("num_"), key.removeprefix("max_position_"))
                yield Case(about=f"{role}: {key} = {value[:20]}", words=words, names=names, files={"bad.json": text})
        for key in SMALL_MODEL:
            twice = json.dumps(SMALL_MODEL)[:-1] + f', "{key}": {json.dumps(SMALL_MODEL[key])}}}'
            yield Case(about=f"{role}: {key} twice", words=words, names=(key,), files={"bad.json": twice})
            place = rng.randrange(1, len(key))
            spelt = key[:place] + key[place + 1 :]
            if spelt != key:
                other = json.dumps({spelt if k == key else k: v for k, v in SMALL_MODEL.items()})
                yield Case(about=f"{role}: {spelt}", words=words, names=(spelt,), files={"bad.json": other})


def _no_file(folder: Path) -> None:
    del folder


def _folder(folder: Path) -> None:
    (folder / "bad.json").mkdir()


def _fifo(folder: Path) -> None:
    os.mkfifo(folder / "bad.json")


def _link(target: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "bad.json").symlink_to(target)


NO_FILES: dict[str, Callable[[Path], None]] = {
    "missing": _no_file,
    "a folder": _folder,
    "a FIFO": _fifo,
    "a link to nothing": _link("nowhere"),
    "a link to itself": _link("bad.json"),
    "a device without end": _link("/dev/zero"),
    "a file that cannot be read": _link("/proc/self/mem"),
}


def _with_byte(text: str, place: int) -> bytes:
    data = bytearray(text.encode())
    data[place] = 0xFF
    return bytes(data)


def _case(role: str, words: tuple[str, ...], about: str, content: str | bytes) -> Case:
    return Case(about=f"{role}: {about}", words=words, names=("bad.json",), files={"bad.json": content})
