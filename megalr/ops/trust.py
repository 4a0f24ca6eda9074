"""Who can change what a path leads to: a library that is loaded runs with the user's rights."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
from pathlib import Path

MOST_LINKS = 40  # on one path, as the kernel has it
ACCESS_LIST = "system.posix_acl_access"


def distrust(path: Path) -> str:
    """Why somebody else than this user and root can change what is at a path; empty if nobody can.

    The file or folder and all that it lies in, through links, must belong to the user or root, and nobody else may
    write there. Into a sticky folder, as /tmp is, others may write, but replace only what is theirs.

    Args:
        path: of a file or folder that exists.
    """
    place, left, links = Path("/"), list(path.absolute().parts[1:]), 0
    try:
        why = _others_change(place, last=not left)
        while left and not why:
            place = place / left.pop(0)
            why = _others_change(place, last=not left)
            if place.is_symlink():
                links += 1
                if links > MOST_LINKS:
                    return f"{path} leads through too many links"
                to = Path(os.readlink(place))
                left = [*to.parts[to.is_absolute() :], *left]
                place = Path("/") if to.is_absolute() else place.parent
    except OSError as error:
        return f"{place} cannot be looked at ({error.strerror})"
    return why


def _others_change(place: Path, *, last: bool) -> str:
    state = place.lstat()
    if state.st_uid not in (0, os.getuid()):
        return f"{place} belongs to {_name(state.st_uid)}"
    if stat.S_ISLNK(state.st_mode):  # whose permissions mean nothing
        return ""
    sticky = stat.S_ISDIR(state.st_mode) and state.st_mode & stat.S_ISVTX and not last
    # With an access control list, the group's bits are those of all whom it names.
    shared = state.st_mode & stat.S_IWGRP and (_has_list(place) or not _is_alone(state.st_gid))
    if (shared or state.st_mode & stat.S_IWOTH) and not sticky:
        return f"others may write to {place} (mode {stat.S_IMODE(state.st_mode):o})"
    return ""


def _is_alone(group: int) -> bool:
    """Whether a group is this user's own, as many systems give everyone one and let it write by default."""
    try:
        user, found = pwd.getpwuid(os.getuid()), grp.getgrgid(group)
    except KeyError:
        return False
    if user.pw_gid != group or found.gr_name != user.pw_name or not set(found.gr_mem) <= {user.pw_name}:
        return False
    # Whose first group it is does not stand among its members.
    return all(each.pw_gid != group or each.pw_uid == user.pw_uid for each in pwd.getpwall())


def _has_list(place: Path) -> bool:
    try:
        os.getxattr(place, ACCESS_LIST)
    except OSError as error:
        return error.errno not in (errno.ENODATA, errno.ENOTSUP)  # none, or a file system that knows none
    return True


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
