"""Folders of runs, checkpoints and exports: files cut, foreign, of other shapes, or changed by one bit."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from tests.soak.json_files import NO_OBJECT
from tests.soak.trial import Case
from tests.soak.workshop import EVALUATE, SIZES, TRAIN, good_config

PRETRAIN = TRAIN[0]
RESUME = (PRETRAIN, *SIZES, "--deepspeed", "good.json", "--output", "run", "--steps", "3", "--resume")
SCORE = (EVALUATE, "run")
TOOL = ("-m", "megalr.checkpoint")
STEP = "run/checkpoints/step2"
VERIFY, INSPECT = (*TOOL, "verify", STEP), (*TOOL, "inspect", STEP)
EXPORT = (*TOOL, "export", STEP, "out", "--to", "safetensors")
DAMAGES = 12
NUMBERS = ("-1", "1.5", '"1"', "null", "[]", "{}", "true", "1e400", str(2**70), "9" * 5000)
PATHS = ("../../../text.txt", "/etc/passwd", "/dev/zero", "fifo", "", ".", "..", "x" * 300, "nowhere", "\x00", "step1")


def bad_runs(rng: Random) -> Iterator[Case]:
    """A run's own files, for what goes on with it and what scores it."""
    programs = {"resume": RESUME, "evaluate": SCORE}
    for program, words in programs.items():
        for text in NO_OBJECT:
            expect = "bad" if program == "evaluate" else "either"
            yield _damage(f"{program}: run.json is {text!r}", words, "run/run.json", text, expect=expect)
        for key in ("deepspeed", "model", "data"):
            for value in ("null", "1", '"x"', "[]", "{}"):
                change = _changed(key, value)
                expect = "bad" if program == "evaluate" and (key, value) != ("data", "{}") else "either"
                yield _damage(f"{program}: {key} = {value}", words, "run/run.json", change, expect=expect)
        yield _damage(f"{program}: a folder for run.json", words, "run/run.json", _folder_instead, expect="either")
    rows = ("{", "[]", "1", '{"step": "x"}', '{"step": null, "loss": 1, "tokens": 1}', '{"step": 1}', '{"loss": NaN}')
    for row in (*rows, '{"step": 1, "loss": [], "tokens": 1}', "\x00" * 50, '{"step": 1e400, "loss": 1, "tokens": 1}'):
        yield _damage(
            f"resume: metrics.jsonl ends with {row[:40]!r}", RESUME, "run/metrics.jsonl", _appended(row), "either"
        )
    yield _damage("resume: random metrics", RESUME, "run/metrics.jsonl", rng.randbytes(400), expect="either")
    yield _damage("resume: a folder for metrics", RESUME, "run/metrics.jsonl", _folder_instead, expect="either")
    for name in ("summary.json", "run.json", "metrics.jsonl", "checkpoints"):
        new = (PRETRAIN, *SIZES, "--deepspeed", "good.json", "--output", "taken", "--steps", "1")
        for content in ("", "{}", "foreign"):
            yield Case(about=f"train: {name} is there", words=new, names=("taken",), files={f"taken/{name}": content})
    for name in ("loss.png", "routing.txt", "tensorboard/x", "csv_monitor/x", "profile/x"):
        new = (PRETRAIN, *SIZES, "--deepspeed", "good.json", "--output", "taken", "--steps", "1")
        for flags in ((), ("--overwrite",)):
            files = {f"taken/{name}": "mine"}
            yield Case(about=f"train {flags}: {name}", words=(*new, *flags), names=("taken",), files=files)
    for key, value in {"megalr": {"seed": 2**70}, "gradient_clipping": "1.0", "scheduler": {"type": "StepLR"}}.items():
        config = json.dumps({**good_config(), key: value})
        words = (*RESUME[:-1], "--overwrite", "--deepspeed", "bad.json")
        yield Case(
            about=f"overwrite: {key}", words=words, names=(key, "scheduler"), files={"bad.json": config}, needs=("run",)
        )


def bad_manifests(rng: Random) -> Iterator[Case]:
    """Structured lies, with a checksum that matches, and damage without."""
    place = f"{STEP}/manifest.json"
    for program, words in {"verify": VERIFY, "inspect": INSPECT, "export": EXPORT}.items():
        for text in NO_OBJECT:
            yield _damage(f"{program}: manifest is {text!r}", words, place, text)
        for about, lie in _lies(rng):
            yield _damage(f"{program}: {about}", words, place, lie, expect="either")
        for about, lie in _certain_lies():
            expect = "bad" if program != "inspect" else "either"
            yield _damage(f"{program}: {about}", words, place, lie, expect=expect)
        deep = '{"version": 2, "checksum": 0, "content": ' + "[" * 100_000 + "]" * 100_000 + "}"
        yield _damage(f"{program}: deep nesting", words, place, deep)
        for version in (0, 1, 3, 99, "2", None, -1, 2.5):
            yield _damage(
                f"{program}: version {version}",
                words,
                place,
                lambda text, version=version: json.dumps({**json.loads(text), "version": version}),
            )


def damaged_bytes(rng: Random) -> Iterator[Case]:
    """One bit of a file of tensors or a manifest, a cut, or something behind its end."""
    for program, words in {"verify": VERIFY, "export": EXPORT, "evaluate": SCORE, "resume": RESUME}.items():
        one = STEP in words
        for index in range(6 * DAMAGES):
            seed = rng.randrange(1 << 30)
            how = ("bit", "cut", "more")[index % 3]
            # A run has an older checkpoint, with which it may go on, having said so.
            expect = "bad" if one else "either"
            yield Case(
                about=f"{program}: {how} {seed}",
                words=words,
                names=("step2", "step1", "checkpoint"),
                needs=("run",),
                prepare=lambda at, seed=seed, how=how: _harm(at / STEP, how, Random(seed)),
                expect=expect,  # type: ignore[arg-type]
                says=("step2",),
                writes="run",
                damage_code=1 if "verify" in words else None,
            )


def bad_exports(rng: Random) -> Iterator[Case]:
    """An exported model, damaged, given to the program that scores it."""
    words = (EVALUATE, "export", "--dataset", "text.txt", "--sequence-length", "32")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        for text in NO_OBJECT if name.endswith(".json") else ("", "x", "{}"):
            yield _damage(f"{name} is {text!r}", words, f"export/{name}", text, needs="export", names=("export",))
        for _ in range(DAMAGES // 2):
            share = rng.random()
            cut = lambda data, share=share: data[: int(share * len(data))]  # noqa: E731
            yield _damage(f"{name} cut at {share:.3f}", words, f"export/{name}", cut, needs="export", names=("export",))
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        gone = lambda folder, name=name: (folder / "export" / name).unlink()  # noqa: E731
        yield Case(about=f"no {name}", words=words, names=("export",), needs=("export",), prepare=gone)


def _lies(rng: Random) -> Iterator[tuple[str, Callable[[str], str]]]:
    """A random value of a manifest replaced; most of what comes of it is refused, and nothing is a traceback."""
    for _ in range(5 * DAMAGES):
        seed, value = rng.randrange(1 << 30), rng.choice(NUMBERS)

        def lie(text: str, seed: int = seed, value: str = value) -> str:
            content = json.loads(text)["content"]
            *path, last = _somewhere(content, Random(seed))
            inner = content
            for key in path:
                inner = inner[key]
            inner[last] = "@@"
            return _signed_raw(json.dumps(content).replace('"@@"', value))

        yield f"{value[:20]} at random place {seed}", lie
    for section in ("numbers", "client", "layout", "config", "model", "versions", "written", "files", "tensors"):
        yield f"no {section}", _edit(lambda content, section=section: content.pop(section, None))
        yield f"{section} is null", _edit(lambda content, section=section: content.update({section: None}))
        yield f"{section} is a list", _edit(lambda content, section=section: content.update({section: []}))


def _certain_lies() -> Iterator[tuple[str, Callable[[str], str]]]:
    """What cannot be true of the files that are there."""
    for path in PATHS:
        yield f"a piece in {path[:30]!r}", _edit(lambda content, path=path: _piece(content).__setitem__(2, path))
        yield f"a file {path[:30]!r}", _edit(lambda content, path=path: _renamed(content, path))
    for begin in (-1, 1 << 40, 2**70, "0", None):
        yield f"a piece from {begin}", _edit(lambda content, begin=begin: _piece(content).__setitem__(3, begin))
    for shape in ([-1, 8], [1 << 40, 1 << 40], [], [0, 0], ["8"], None, [[8]], [37.5, 8]):
        yield f"sizes {shape}", _edit(lambda content, shape=shape: _piece(content).__setitem__(1, shape))
        yield f"shape {shape}", _edit(lambda content, shape=shape: _tensor(content).update(shape=shape))
    for dtype in ("float8", "", None, 1, "object"):
        yield f"dtype {dtype!r}", _edit(lambda content, dtype=dtype: _tensor(content).update(dtype=dtype))


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    def edited(text: str) -> str:
        content = json.loads(text)["content"]
        change(content)
        return _signed_raw(json.dumps(content))

    return edited


def _signed_raw(content: str) -> str:
    """A manifest with the checksum that its content has, as far as it can be read."""
    try:
        checksum = zlib.crc32(json.dumps(json.loads(content)).encode())
    except ValueError:
        checksum = 0
    return f'{{"version": 2, "checksum": {checksum}, "content": {content}}}'


def _tensor(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(tensor for key, tensor in content["tensors"].items() if key.startswith("weights/"))
    return found


def _piece(content: dict[str, Any]) -> list[Any]:
    found: list[Any] = _tensor(content)["pieces"][0]
    return found


def _renamed(content: dict[str, Any], path: str) -> None:
    name, file = content["files"].popitem()
    content["files"][path] = file
    for tensor in content["tensors"].values():
        for piece in tensor["pieces"]:
            piece[2] = path if piece[2] == name else piece[2]


def _somewhere(content: Any, rng: Random) -> list[Any]:
    """The path to a random value."""
    path: list[Any] = []
    while isinstance(content, dict | list) and content and (len(path) < 1 or rng.random() < 0.9):
        key = rng.choice(list(content) if isinstance(content, dict) else range(len(content)))
        path.append(key)
        content = content[key]
    return path


def _damage(
    about: str,
    words: tuple[str, ...],
    place: str,
    change: str | bytes | Callable[..., Any],
    expect: str = "bad",
    needs: str = "run",
    names: tuple[str, ...] = (),
) -> Case:
    """A case in which one file is replaced; change: its content, or what makes it of what was there."""

    def prepare(folder: Path) -> None:
        path = folder / place
        if change is _folder_instead:
            path.unlink()
            path.mkdir()
            return
        old = path.read_bytes()
        new = change
        if callable(change):
            new = change(old if path.suffix == ".safetensors" or "cut at" in about else old.decode())
        path.write_bytes(new if isinstance(new, bytes) else new.encode())  # type: ignore[union-attr]
        if "fifo" in about:
            os.mkfifo(path.parent / "fifo")

    names = names or (place.rpartition("/")[2], "checkpoint", "run")
    return Case(
        about=about,
        words=words,
        names=names,
        needs=(needs,),
        prepare=prepare,
        expect=expect,  # type: ignore[arg-type]
        writes="run",
        damage_code=1 if "verify" in words else None,
    )


def _folder_instead() -> None:
    """Stands for a folder where a file should be."""


def _changed(key: str, value: str) -> Callable[[str], str]:
    return lambda text: json.dumps({**json.loads(text), key: "@@"}).replace('"@@"', value)


def _appended(row: str) -> Callable[[str], str]:
    return lambda text: f"{text}{row}\n"


def _harm(folder: Path, how: str, rng: Random) -> None:
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json"))
    path = rng.choice(files)
    data = bytearray(path.read_bytes())
    if how == "bit":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del data[rng.randrange(len(data)) :]
    else:
        data += rng.randbytes(rng.randrange(1, 100))
    path.write_bytes(data)
