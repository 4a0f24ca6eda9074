"""Which folder of compiled libraries is trusted: one that nobody but the user and root can change."""

import grp
import os
import pwd
from types import SimpleNamespace

import pytest

from megalr.ops.trust import distrust

NOBODY = 65534
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="gives files to others")


@pytest.fixture
def place(tmp_path):
    """A library in two folders of the user's; tmp_path lies in a sticky folder, as a rule."""
    path = tmp_path / "cache" / "ops" / "library.so"
    path.parent.mkdir(parents=True, mode=0o755)
    path.write_text("")
    path.chmod(0o644)
    for folder in path.parents[:3]:
        folder.chmod(0o755)
    assert distrust(path) == "" == distrust(path.parent)
    return path


@pytest.mark.parametrize("up", [0, 1, 2])
@pytest.mark.parametrize("mode", [0o777, 0o757, 0o775])
def test_others_may_write(place, up, mode, monkeypatch):
    monkeypatch.setattr("megalr.ops.trust._is_alone", lambda group: False)
    changed = [place, *place.parents][up]
    changed.chmod(mode)
    assert distrust(place) == f"others may write to {changed} (mode {mode:o})"


def test_a_sticky_folder_holds_what_is_the_users(place):
    place.parents[1].chmod(0o1777)
    assert distrust(place) == ""
    assert distrust(place.parents[1]).startswith("others may write to")  # and not what anybody has put there
    place.parent.chmod(0o1777)
    assert distrust(place) == ""


@needs_root
@pytest.mark.parametrize("up", [0, 1, 2])
@pytest.mark.parametrize("sticky", [0, 0o1777])
def test_what_belongs_to_others(place, up, sticky):
    """Also in a sticky folder, where they may have put it."""
    changed = [place, *place.parents][up]
    if sticky:
        changed.parent.chmod(sticky)
    os.chown(changed, NOBODY, NOBODY)
    assert distrust(place) == f"{changed} belongs to {pwd.getpwuid(NOBODY).pw_name}"
    os.chown(changed, 4_000_000, 0)
    assert distrust(place) == f"{changed} belongs to user 4000000"


def test_links_are_followed_and_looked_at(place, tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "first").symlink_to(place.parents[1])
    (tmp_path / "second").symlink_to("shared/../shared/first")
    through = tmp_path / "second" / "ops" / place.name
    assert distrust(through) == ""
    shared.chmod(0o777)  # where the link in between may be put in another's place
    assert distrust(through) == f"others may write to {tmp_path}/shared (mode 777)"
    shared.chmod(0o1777)
    assert distrust(through) == ""
    place.parent.chmod(0o777)
    assert distrust(through).startswith("others may write to")


@needs_root
def test_a_link_of_somebody_else(place, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(place.parent)
    os.chown(link, NOBODY, NOBODY, follow_symlinks=False)
    assert distrust(link / place.name) == f"{link} belongs to {pwd.getpwuid(NOBODY).pw_name}"


def test_what_cannot_be_looked_at(tmp_path):
    assert distrust(tmp_path / "nowhere") == f"{tmp_path}/nowhere cannot be looked at (No such file or directory)"
    (tmp_path / "loop").symlink_to("loop")
    assert distrust(tmp_path / "loop").endswith("leads through too many links")


@pytest.mark.parametrize(
    ("name", "members", "alone"),
    [("me", [], True), ("me", ["me"], True), ("me", ["me", "you"], False), ("us", [], False)],
)
@pytest.mark.parametrize("also", ["", "first group", "access list"])
def test_a_group_of_the_users_own(place, monkeypatch, name, members, alone, also):
    """Where everyone has one, files that the group may write to are common, and nobody else may."""
    gid = place.stat().st_gid
    me = SimpleNamespace(pw_gid=gid, pw_name="me", pw_uid=os.getuid())
    another = SimpleNamespace(pw_gid=gid if also == "first group" else gid + 1, pw_name="you", pw_uid=os.getuid() + 1)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: me)
    monkeypatch.setattr(pwd, "getpwall", lambda: [me, another])
    if also == "access list":  # whose members the group's bits are for
        monkeypatch.setattr("megalr.ops.trust._has_list", lambda path: path == place.parent)
    monkeypatch.setattr(grp, "getgrgid", lambda group: SimpleNamespace(gr_name=name, gr_mem=members))
    place.parent.chmod(0o775)
    assert (distrust(place) == "") == (alone and not also)
