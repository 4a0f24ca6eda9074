"""Texts and tokenizers that are damaged, empty, of another kind, or no files at all."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

from megalr.data.tokenizer import EMBEDDED_TOKENIZER
from tests.soak.json_files import NO_OBJECT
from tests.soak.trial import Case
from tests.soak.workshop import EVALUATE, TEXT, TRAIN

ROWS = "".join(json.dumps({"text": f"{line} of some length"}) + "\n" for line in TEXT.splitlines())
RUN = (*TRAIN, "--deepspeed", "good.json")
TRAIN_TOKENIZER = ("-m", "megalr.data.train_tokenizer", "--output", "new.json")
PROGRAMS = {
    "train": (*RUN, "--dataset"),
    "held out": (*RUN, "--eval-dataset"),
    "evaluate": (EVALUATE, "export", "--sequence-length", "32", "--dataset"),
    "tokenizer": TRAIN_TOKENIZER,
}
DAMAGES = 12


def bad_texts(rng: Random) -> Iterator[Case]:
    """Texts, for each program that reads one."""
    for program, words in PROGRAMS.items():
        for name, content in _texts(rng).items():
            needs = ("export",) if "export" in words else ()
            file = name.partition(" ")[0]
            enough = name == "bad.txt short" and program in ("held out", "tokenizer")
            yield Case(
                about=f"{program}: {name}",
                words=(*words, file),
                names=(file,),
                files={file: content},
                needs=needs,
                expect="either" if enough else "bad",
            )
        for name, prepare in {"a FIFO": os.mkfifo, "a folder": os.mkdir, "a link": _link_to_itself}.items():
            yield Case(
                about=f"{program}: {name}",
                words=(*words, "bad.txt"),
                names=("bad.txt",),
                needs=("export",) if "export" in words else (),
                prepare=lambda folder, make=prepare: make(folder / "bad.txt"),
            )


def _texts(rng: Random) -> dict[str, bytes]:
    """By a name, and after a space what is wrong."""
    text, rows = TEXT.encode(), ROWS.encode()
    lines = rows.splitlines(keepends=True)
    packed = gzip.compress(rows)
    middle = len(text) // 2
    found = {
        "bad.txt empty": b"",
        "bad.txt blank": b" \n\t\n" * 100,
        "bad.txt short": b"A word.",
        "bad.txt latin1": text[:middle] + "é".encode("latin-1") + text[middle:],
        "bad.txt UTF-16": TEXT.encode("utf-16"),
        "bad.txt random": rng.randbytes(5000),
        "bad.jsonl empty": b"",
        "bad.jsonl blank": b"\n" * 100,
        "bad.jsonl no text": b'{"text": ""}\n' * 100,
        "bad.jsonl null": b'{"text": null}\n' * 100,
        "bad.jsonl numbers": b'{"text": 1}\n' * 100,
        "bad.jsonl lists": b"[1]\n" * 100,
        "bad.jsonl other column": b'{"body": "words"}\n' * 100,
        "bad.jsonl UTF-16": ROWS.encode("utf-16"),
        "bad.jsonl random": rng.randbytes(5000),
        "bad.jsonl long number": rows + b'{"text": ' + b"9" * 5000 + b"}\n",
        "bad.jsonl deep": rows + b"[" * 100_000 + b"\n",
        "bad.jsonl.gz no gzip": rows,
        "bad.jsonl.gz empty": b"",
        "bad.jsonl.gz rest": packed + b"rest",
        "bad.parquet empty": b"",
        "bad.parquet no Parquet": rows,
        "bad.parquet cut": b"PAR1" + rng.randbytes(200) + b"PAR1",
        "bad.txt.gz unknown kind": gzip.compress(text),
        "bad.json.zst unknown kind": rng.randbytes(100),
        "bad.csv unknown kind": b"text\nword\n",
        "bad.zip unknown kind": b"PK\x03\x04",
    }
    for index in range(DAMAGES):
        line = rng.randrange(len(lines))
        cut = lines[line][: rng.randrange(2, len(lines[line]) - 2)] + b"\n"
        found[f"bad.jsonl line {line} cut"] = b"".join([*lines[:line], cut, *lines[line + 1 :]])
        place = rng.randrange(20, len(packed) - 20)
        found[f"bad.jsonl.gz cut at {place}"] = packed[:place]
        flipped = bytearray(packed)
        flipped[place] ^= 1 << index % 8
        found[f"bad.jsonl.gz bit of byte {place}"] = bytes(flipped)
        place = rng.randrange(len(text))
        found[f"bad.txt byte 0xff at {place}"] = text[:place] + b"\xff" + text[place:]
    return found


def bad_tokenizers(rng: Random) -> Iterator[Case]:
    """A tokenizer.json, or a folder of one."""
    right = EMBEDDED_TOKENIZER.read_text(encoding="utf-8")
    content = json.loads(right)
    wrong: dict[str, str | bytes] = {f"text {text!r}": text for text in NO_OBJECT}
    wrong |= {f"cut at {n}": right[:n] for n in (rng.randrange(1, len(right) - 1) for _ in range(DAMAGES))}
    wrong |= {f"without {key}": json.dumps(_without(content, key)) for key in ("model", "added_tokens")}
    for key in ("model", "added_tokens", "pre_tokenizer", "decoder", "normalizer", "post_processor"):
        for value in (1, "x", {"type": "Nonsense"}, [1]):
            if not (key == "added_tokens" and value == []):
                wrong[f"{key} = {value}"] = json.dumps({**content, key: value})
    wrong["no end of text"] = json.dumps({**content, "added_tokens": []})
    wrong["a vocabulary of strings"] = json.dumps({**content, "model": {**content["model"], "vocab": {"a": "b"}}})
    wrong["a negative id"] = json.dumps({**content, "model": {**content["model"], "vocab": {"a": -1}}})
    wrong["a huge id"] = right.replace('"id": 0', f'"id": {2**40}', 1)
    wrong["random"] = rng.randbytes(500)
    for about, text in wrong.items():
        for where, file in (("bad.json", "bad.json"), ("bad", "bad/tokenizer.json")):
            yield Case(
                about=f"{file}: {about}",
                words=(*RUN, "--tokenizer", where),
                names=(where,),
                files={file: text},
            )
    for about, text in {"a list": "[]", "cut": "{", "a class": '{"tokenizer_class": "Nonsense"}', "empty": ""}.items():
        files = {"bad/tokenizer.json": "{}", "bad/tokenizer_config.json": text}
        yield Case(
            about=f"tokenizer_config.json: {about}", words=(*RUN, "--tokenizer", "bad"), names=("bad",), files=files
        )


def _link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def _without(content: dict[str, object], key: str) -> dict[str, object]:
    return {name: value for name, value in content.items() if name != key}
