"""``verify``: whether every file of checkpoints is as it was written."""

from __future__ import annotations

from pathlib import Path

from megalr.checkpoint.folders import Listed, is_one, listed, look_at
from megalr.checkpoint.manifest import ReplacedError, problems
from megalr.errors import UserError


def verify(place: Path) -> bool:
    """Read every byte, print what is wrong, and say of how many bytes nothing is.

    Args:
        place: a checkpoint's folder, or the directory of several.

    Returns:
        Whether all is as it was written.

    Raises:
        UserError: there is no checkpoint; or none is damaged, but one is of another version of megalr, or was replaced
            while it was read.
    """
    found = [look_at(place)] if is_one(place) else listed(place)
    whole, others = True, [each.wrong for each in found if each.manifest is None and not each.is_damaged]
    for each in found:
        if each.manifest is not None or each.is_damaged:
            try:
                whole = _verify_one(each) and whole
            except ReplacedError as error:
                others.append(str(error))
    if others and whole:
        raise UserError("\n  ".join(["not all could be checked:", *others]))
    for line in others:
        print(f"not checked: {line}")
    return whole


def _verify_one(each: Listed) -> bool:
    if not each.is_open:
        print(each.wrong)
        return False
    wrong = [each.wrong] if each.manifest is None else problems(each.manifest)
    if each.manifest is None or wrong:
        print("\n  ".join([f"{each.folder} is damaged:", *wrong]))
        return False
    files = len(each.manifest.content["files"])
    print(f"{each.folder} is whole: {each.manifest.size:,} bytes of {files} file{'s' * (files != 1)} were read")
    return True
