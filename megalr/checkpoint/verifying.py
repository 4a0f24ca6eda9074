"""``verify``: whether every file of checkpoints is as it was written."""

from __future__ import annotations

from pathlib import Path

from megalr.checkpoint.folders import Listed, is_one, listed
from megalr.checkpoint.manifest import problems, read_manifest
from megalr.errors import UserError


def verify(place: Path) -> bool:
    """Read every byte, print what is wrong, and say of how many bytes nothing is.

    Args:
        place: a checkpoint's folder, or the directory of several.

    Returns:
        Whether all is as it was written.

    Raises:
        UserError: there is no checkpoint.
    """
    return all([_verify_one(each) for each in (_one(place) if is_one(place) else listed(place))])


def _one(place: Path) -> list[Listed]:
    try:
        return [Listed(place, read_manifest(place))]
    except UserError as error:
        return [Listed(place, None, str(error))]


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
