"""Whatever a manifest or a file of tensors says: a checkpoint, or a UserError, within a second, and nothing else.

Manifests are mutations of a real one, with a checksum that is right, and any bytes.
"""

import copy
import json
import os
import shutil
import time
import zlib
from contextlib import contextmanager, suppress

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalr.checkpoint import loading
from megalr.checkpoint.__main__ import main
from megalr.checkpoint.export.weights import Weights, check_model
from megalr.checkpoint.folders import candidates, latest, listed, newest_valid
from megalr.checkpoint.loading import _find
from megalr.checkpoint.manifest import (
    LARGEST_MANIFEST,
    LATEST,
    MANIFEST,
    VERSION,
    _checksum,
    problems,
    read_manifest,
    write_manifest,
)
from megalr.checkpoint.publishing import prune, tidy, written_now
from megalr.checkpoint.random_states import set_random_states
from megalr.checkpoint.reading import outlines, read_tensor
from megalr.checkpoint.verifying import verify
from megalr.errors import UserError
from tests import known_state
from tests.known_state import FILE

# There is no group: a process is alone, as torch says each time.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
EXAMPLES = settings(
    max_examples=100, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
SECONDS = 1.0
KEY = "weights/embedding.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A directory with two checkpoints, the second of which is damaged by each test in a copy."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for updates in (1, 2):
        known_state.write(folder, updates)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    shutil.copytree(original, tmp_path / "copy")
    return tmp_path / "copy"


def content_of(folder):
    return json.loads((folder / MANIFEST).read_text())["content"]


def put(folder, content, version=VERSION):
    """Write a manifest whose checksum is right, as a stranger can."""
    outer = {"version": version, "checksum": _checksum(content), "content": content}
    (folder / MANIFEST).write_text(json.dumps(outer))


@contextmanager
def in_time():
    start = time.process_time()
    yield
    assert time.process_time() - start < SECONDS


def use(directory):
    """All that is done with a directory of checkpoints without an engine; the newest one that is whole."""
    newest, _ = newest_valid(directory)
    listed(directory)
    for manifest in candidates(directory):
        outlines(manifest)
        for act in (lambda m=manifest: [read_tensor(m, key) for key in m.tensors], lambda m=manifest: Weights(m)):
            with suppress(UserError):
                act()
    for command, place in (("inspect", directory), ("inspect", directory / "step2"), ("verify", directory)):
        assert main([command, str(place)]) in (0, 1, 2)
    assert written_now(directory) > 0
    return newest


def check_hides_nothing(directory):
    """One way or the other: the second is what it says, or the first one is taken."""
    with in_time():
        newest = use(directory)
    assert newest is not None and newest.folder.name in ("step1", "step2")
    assert known_state.wrong(read_manifest(directory / "step1")) == []
    return newest.folder.name


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ODD = st.sampled_from(
    [None, True, 0, -1, 1, 2**31, 2**60, 2**63, 10**400, 0.5, float("nan"), "", "../x", "/dev/zero", [], [[]], {}, [-1]]
    + [[2**60], [0, 0], "BF16", "F4", FILE, {"bytes": 2**62, "header": 0}, "\x1b[2J", "é"]
)


def places(value, path=()):
    """Where something is in a value, itself included."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed(content, path, act, value):
    """A copy of a manifest's content in which something is replaced, removed, doubled or renamed."""
    if not path:
        return value
    content = copy.deepcopy(content)
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    last = path[-1]
    if act == "replace":
        parent[last] = value
    elif act == "remove":
        del parent[last]
    elif act == "more" and isinstance(parent[last], int) and not isinstance(parent[last], bool):
        parent[last] += value if isinstance(value, int) else 1
    elif isinstance(parent, list):
        parent.insert(last, copy.deepcopy(parent[last]))
    else:
        parent[str(value)[:20]] = parent.pop(last)
    return content


@EXAMPLES
@given(data=st.data())
def test_any_mutation_of_a_manifest(original, data, capsys):
    step = original / "step2"
    content = real = content_of(step)
    text = (step / MANIFEST).read_bytes()
    try:
        for _ in range(data.draw(st.integers(1, 2))):
            path = data.draw(st.sampled_from(list(places(content))))
            act = data.draw(st.sampled_from(["replace", "remove", "more", "double"]))
            content = changed(content, path, act, data.draw(ODD | JSON))
        put(step, content)
        newest = check_hides_nothing(original)
        if newest == "step2":  # then what it says of its tensors is what it said before
            found = read_manifest(step)
            assert all(real["tensors"][key]["shape"] == list(shape) for key, shape in found.shapes.items())
    finally:
        (step / MANIFEST).write_bytes(text)
        capsys.readouterr()


@settings(EXAMPLES, max_examples=60)
@given(content=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_for_a_manifest(original, content, capsys):
    step = original / "step2"
    text = (step / MANIFEST).read_bytes()
    try:
        (step / MANIFEST).write_bytes(content)
        assert check_hides_nothing(original) == "step1"
    finally:
        (step / MANIFEST).write_bytes(text)
        capsys.readouterr()


def header_of(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@settings(EXAMPLES, max_examples=60)
@given(data=st.data())
def test_any_header_of_a_file_of_tensors(original, data, capsys):
    """With a checksum that fits, since a stranger writes both."""
    step = original / "step2"
    before, text = (step / FILE).read_bytes(), (step / MANIFEST).read_bytes()
    header, values = header_of(before)
    try:
        if data.draw(st.booleans()):
            path = data.draw(st.sampled_from(list(places(header))))
            act = data.draw(st.sampled_from(["replace", "remove", "more", "double"]))
            head = json.dumps(changed(header, path, act, data.draw(ODD | JSON))).encode()
        else:
            head = data.draw(st.binary(max_size=100))
        length = data.draw(st.just(len(head)) | st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1]))
        head = length.to_bytes(8, "little") + head
        (step / FILE).write_bytes(head + values)
        content = content_of(step)
        content["files"][FILE] = {"bytes": len(head) + len(values), "header": zlib.crc32(head)}
        moved = len(head) - (len(before) - len(values))
        for tensor in content["tensors"].values():
            for piece in tensor["pieces"]:
                piece[3] += moved
        put(step, content)
        if check_hides_nothing(original) == "step2":
            assert known_state.wrong(read_manifest(step)) == []
    finally:
        (step / FILE).write_bytes(before)
        (step / MANIFEST).write_bytes(text)
        capsys.readouterr()


@EXAMPLES
@given(content=st.binary(max_size=300))
def test_any_bytes_for_latest(original, content):
    (original / LATEST).write_bytes(content)
    name = latest(original)
    assert name is None or (name.isprintable() and "/" not in name)
    assert newest_valid(original)[0].folder.name == "step2"


# --- what each mutation is refused for


def tensor(content, key=KEY):
    return content["tensors"][key]


def piece(content, key=KEY):
    return tensor(content, key)["pieces"][0]


def cut(content, *rectangles):
    """The first tensor's rows in several pieces that lie one after another."""
    offsets, sizes, file, begin, checksum = piece(content)
    tensor(content)["pieces"] = []
    for first, rows in rectangles:
        tensor(content)["pieces"].append([[first, 0], [rows, sizes[1]], file, begin, checksum])
        begin += rows * sizes[1] * 4


def elsewhere(content, name):
    """The file under another name, everywhere."""
    content["files"][name] = content["files"].pop(FILE)
    for each in content["tensors"].values():
        each["pieces"][0][2] = name


BAD = {
    "lacks tensors": lambda c: c.pop("tensors"),
    "lacks written": lambda c: c.pop("written"),
    "numbers.optimizer lacks updates": lambda c: c["numbers"]["optimizer"].clear(),
    "layout lacks stage": lambda c: c["layout"].pop("stage"),
    "layout.stage is true and not a whole number": lambda c: c["layout"].update(stage=True),
    'written is "now" and not a whole number': lambda c: c.update(written="now"),
    "written is negative": lambda c: c.update(written=-1),
    "the number of updates is negative": lambda c: c["numbers"]["optimizer"].update(updates=-3),
    "config.megalr.parametrization is 3 and not an object or null": lambda c: c["config"].update(
        megalr={"parametrization": 3}
    ),
    '"../rank-00000.safetensors" is no name': lambda c: elsewhere(c, "../rank-00000.safetensors"),
    '"/dev/zero" is no name': lambda c: elsewhere(c, "/dev/zero"),
    '"rank-00000.safetensors\\u0000" is no name': lambda c: elsewhere(c, FILE + "\0"),
    '"manifest.json" is no name': lambda c: elsewhere(c, MANIFEST),
    "cannot have -1 bytes": lambda c: c["files"][FILE].update(bytes=-1),
    "has the shape [1152921504606846976, 1152921504606846976]": lambda c: tensor(c).update(shape=[2**60, 2**60]),
    "has the shape [-50, 8]": lambda c: tensor(c).update(shape=[-50, 8]),
    "has the shape []": lambda c: tensor(c).update(shape=[]),
    "for which its files are too small": lambda c: tensor(c).update(shape=[2**40, 8]),
    'has the dtype "F31"': lambda c: tensor(c).update(dtype="F31"),
    "lies beyond the end of its file": lambda c: piece(c).__setitem__(3, 10**6),
    "no place in 2 whole numbers": lambda c: piece(c).__setitem__(0, [0]),
    "has no place in 2": lambda c: piece(c).__setitem__(0, [0, 2**64]),
    "has no place in": lambda c: piece(c).__setitem__(0, ["x" * 99, 0]),
    "has pieces beyond its shape": lambda c: piece(c).__setitem__(0, [1, 0]),
    "has pieces beyond": lambda c: piece(c).__setitem__(0, [-1, 0]),
    "in a file of which it says nothing else": lambda c: piece(c).__setitem__(2, "rank-00001.safetensors"),
    "is not [offsets, sizes": lambda c: piece(c).pop(),
    "overlap, or leave something out": lambda c: cut(c, (0, 25), (24, 25)),
    "or leave something out": lambda c: cut(c, (0, 20), (25, 25)),
    "overlap, or": lambda c: tensor(c).update(pieces=[]),
    "more than shape, dtype and pieces": lambda c: tensor(c).update(more=[]),
    "its tensors do not fill": lambda c: c["tensors"].pop("weights/norm.weight"),
    "lie more than 100 deep": lambda c: c["client"].update(deep=json.loads("[" * 200 + "]" * 200)),
}


@pytest.mark.parametrize("words", BAD)
def test_what_is_wrong_is_said(folder, words):
    content = content_of(folder / "step2")
    BAD[words](content)
    put(folder / "step2", content)
    with pytest.raises(UserError) as caught:
        read_manifest(folder / "step2")
    message = str(caught.value)
    assert message.startswith(f"{folder / 'step2' / MANIFEST} is damaged: ") and words in message
    assert message.isprintable() and len(message) < 400
    assert newest_valid(folder)[0].folder.name == "step1"


def test_pieces_that_cover_a_tensor(folder):
    """However it is cut, and with pieces of nothing."""
    content = content_of(folder / "step2")
    cut(content, (0, 20), (20, 0), (20, 29), (49, 1))
    put(folder / "step2", content)
    assert len(read_manifest(folder / "step2").tensors[KEY]["pieces"]) == 4


def test_many_pieces_take_no_time_that_grows_faster(folder):
    content = content_of(folder / "step2")
    offsets, sizes, file, begin, checksum = piece(content)
    grid = [(row, column) for row in range(sizes[0]) for column in range(sizes[1])]
    rest = [[[row, column], [1, 1], file, begin + 4 * i, checksum] for i, (row, column) in enumerate(grid)]
    tensor(content)["pieces"] = rest + [[[0, 0], [0, 0], file, begin, checksum]] * 20_000
    put(folder / "step2", content)
    with in_time():
        read_manifest(folder / "step2")
    rest[7][0] = rest[6][0]
    put(folder / "step2", content)
    with in_time(), pytest.raises(UserError, match="overlap"):
        read_manifest(folder / "step2")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"version": 2, "version": 2}', 'it has "version" twice in one object'),
        ("[" * 100_000, "its brackets lie too deep"),
        ('{"version": 1' + "0" * 5000 + "}", "Exceeds the limit"),
        ('{"version": "2"}', "it says no version"),
        ('{"version": true}', "it says no version"),
        ('{"version": 2}', "it lacks 'content'"),
        ("\ufeff{}", "Unexpected UTF-8 BOM"),
    ],
)
def test_json_that_no_manifest_is(folder, text, words):
    (folder / "step2" / MANIFEST).write_text(text)
    with in_time(), pytest.raises(UserError, match=f"is damaged: .*{words}"):
        read_manifest(folder / "step2")


def test_a_huge_manifest_is_not_read(folder):
    """Nor written: what could not be read again is refused before the checkpoint gets its name."""
    os.truncate(folder / "step2" / MANIFEST, 5 << 30)
    with in_time(), pytest.raises(UserError, match="more than the 71,303,168 bytes that it may have"):
        read_manifest(folder / "step2")
    content = {**known_state.content(1), "client": {"large": "x" * LARGEST_MANIFEST}}
    with pytest.raises(UserError, match="keep large values of client_state in a file of their own"):
        write_manifest(folder / "step1", content)
    content["client"] = json.loads('{"deep": ' + "[" * 120 + "]" * 120 + "}")
    with pytest.raises(UserError, match="more than 100 deep inside each other: make client_state simpler"):
        write_manifest(folder / "step1", content)
    assert newest_valid(folder)[0].folder.name == "step1"


@pytest.mark.parametrize("name", [MANIFEST, FILE, LATEST])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link out", "link to itself"])
def test_what_is_no_file_of_the_folder(folder, name, kind, tmp_path, capsys):
    """A pipe would be waited for, a device may never end, and a link may lead to any file of the user's."""
    path = folder / name if name == LATEST else folder / "step2" / name
    path.rename(tmp_path / name)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "link out": tmp_path / name, "link to itself": path}[kind])
    assert check_hides_nothing(folder) == ("step2" if name == LATEST else "step1")
    prune(folder, 1)
    tidy(folder)
    written = capsys.readouterr().out
    if name != LATEST and kind in ("device", "link out"):
        assert "outside of the folder" in written


def test_a_link_that_stays_in_the_folder(folder):
    path = folder / "step2" / FILE
    path.rename(folder / "step2" / "data")
    path.symlink_to("data")
    assert newest_valid(folder)[0].folder.name == "step2"
    (folder / "step2").rename(folder.parent / "moved")
    (folder / "step2").symlink_to(folder.parent / "moved")
    assert newest_valid(folder)[0].folder.name == "step2"
    assert known_state.wrong(read_manifest(folder / "step2")) == []


def test_a_checkpoint_that_is_a_link_is_not_pruned(folder):
    """What it leads to is not in the directory."""
    (folder / "step1").rename(folder.parent / "elsewhere")
    (folder / "step1").symlink_to(folder.parent / "elsewhere")
    prune(folder, 1)
    assert (folder / "step1").is_symlink()
    known_state.write(folder, 3, "step1")  # which replaces the link
    assert not (folder / "step1").is_symlink()
    assert problems(read_manifest(folder.parent / "elsewhere")) == []


def test_a_file_that_two_tensors_share(folder):
    """Places that overlap in the file are found when it is checked: a small file cannot stand for large tensors."""
    content = content_of(folder / "step2")
    keys = [key for key in content["tensors"] if key.endswith("layers.0.weight")]
    first, second = (content["tensors"][key]["pieces"][0] for key in keys)
    second[3:] = first[3:]
    put(folder / "step2", content)
    (line,) = problems(read_manifest(folder / "step2"))
    assert "a header that says something else of its tensors than the manifest does" in line


def test_a_tensor_that_is_another_one_in_the_file(folder):
    """Read without a check of all files, as one tensor may be."""
    data = (folder / "step2" / FILE).read_bytes()
    header, values = header_of(data)
    name = f"{KEY}@0,0"
    header[name]["shape"] = [header[name]["shape"][0] * header[name]["shape"][1]]
    head = json.dumps(header).encode()
    (folder / "step2" / FILE).write_bytes(len(head).to_bytes(8, "little") + head + values)
    manifest = read_manifest(folder / "step2")
    with pytest.raises(UserError, match="has another shape or dtype. Check the checkpoint with `verify`"):
        read_tensor(manifest, KEY)
    (folder / "step2" / FILE).unlink()
    with pytest.raises(UserError, match="cannot be read: .*No such file"):
        read_tensor(manifest, KEY)


def test_a_newer_version_is_called_that(folder, capsys):
    """By everybody, and it is not touched."""
    put(folder / "step2", {"otherwise": []}, VERSION + 1)
    words = f"{folder / 'step2' / MANIFEST} was written by a newer megalr: it is of version 3, and this megalr ("
    found = listed(folder)
    assert [each.folder.name for each in found] == ["step1", "step2"] and words in found[1].wrong
    assert main(["inspect", str(folder)]) == 0
    output = capsys.readouterr().out
    assert words in output and "damaged" not in output
    assert main(["inspect", str(folder / "step2")]) == 2
    with pytest.raises(UserError, match="^not all could be checked:\n  .* was written by a newer megalr"):
        verify(folder)
    (folder / "step1" / FILE).unlink()
    assert not verify(folder)
    output = capsys.readouterr().out
    assert f"not checked: {words}" in output and "step2 is damaged" not in output
    for tag in (None, "step2"):
        with pytest.raises(UserError) as caught:
            _find(folder, tag)
        assert words in str(caught.value) and "step2/manifest.json is damaged" not in str(caught.value)
    hidden = folder / ".step2.part"
    (folder / "step2").rename(hidden)
    tidy(folder)
    prune(folder, 1)
    assert (hidden / FILE).exists()


def test_numbers_that_an_engine_cannot_take_up(folder, monkeypatch):
    """They are JSON of any kind, which is looked at by those that use it."""

    class Contents:
        def __init__(self, engine):
            pass

        def check(self, numbers, saved, read):
            return numbers["optimizer"]["clocks"]

    monkeypatch.setattr(loading, "Contents", Contents)
    with pytest.raises(UserError, match=r"step2 says of the optimizer's .* \(KeyError: 'clocks'\)"):
        loading.load_whole(None, read_manifest(folder / "step2"))


@pytest.mark.parametrize("text", ["", "{}", "[" * 5000, '{"python": 3}', "null"])
def test_random_states_that_are_none(text):
    with pytest.raises((ValueError, TypeError, KeyError)):
        set_random_states(torch.frombuffer(bytearray(text.encode() + b" "), dtype=torch.uint8))


def test_more_of_a_model_than_there_are_weights(folder):
    """Nothing is built: that alone would take for ever."""
    manifest = read_manifest(folder / "step2")
    for key, value in (("num_hidden_layers", 10**9), ("num_labels", 10**12), ("n_layer", 6)):
        with pytest.raises(UserError, match=f"says {key}: {value:,}, and .* has 5 tensors of 1,022 elements"):
            check_model({key: value}, manifest)
    check_model({"num_hidden_layers": 5, "max_window_layers": 28, "num_labels": 2, "vocab_size": 10**9}, manifest)


def test_names_that_a_checkpoint_gives_and_lacks(folder):
    content = content_of(folder / "step2")
    content["numbers"] |= {"names": {"alias": "gone"}, "shapes": {"bias": [2, 5], "norm.weight": [1, 19, 1]}}
    put(folder / "step2", content)
    weights = Weights(read_manifest(folder / "step2"))
    assert weights["norm.weight"].shape == (1, 19, 1)
    with pytest.raises(UserError, match="lacks gone, which it names"):
        weights["alias"]
    with pytest.raises(UserError, match=r"gives bias the shapes \(11,\) and \(2, 5\)"):
        weights["bias"]


def test_a_parametrization_with_a_wrong_value_names_the_manifest(folder):
    content = content_of(folder / "step2")
    content["config"]["megalr"] = {"parametrization": {"type": "low_rank", "rank": True}}
    put(folder / "step2", content)
    with pytest.raises(UserError, match=r"step2/manifest.json .*megalr.parametrization.rank is true; expected a whole"):
        Weights(read_manifest(folder / "step2"))
