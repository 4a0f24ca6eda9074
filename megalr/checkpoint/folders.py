"""What a folder is that the command line was given: a checkpoint, the directory of several, or something else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megalr.checkpoint.manifest import LATEST, MANIFEST, Manifest, newest_valid, problems, read_manifest, read_whole
from megalr.errors import UserError

# Of what engine.save_checkpoint writes: model states, ZeRO's states, layers of a pipeline.
DEEPSPEED_FILES = ("mp_rank_*_model_states.pt", "*zero_pp_rank_*_states.pt", "layer_*-model_*.pt")
RANK_FILES = "rank-*.safetensors"


@dataclass(frozen=True)
class Listed:
    """One folder of a directory of checkpoints.

    Attributes:
        folder: where it is.
        manifest: what it says of itself; None where that cannot be read.
        wrong: why not; empty where it can.
    """

    folder: Path
    manifest: Manifest | None
    wrong: str = ""


def is_one(place: Path) -> bool:
    """Whether a folder is one checkpoint; a damaged one is, too. Otherwise it is the directory of several.

    Raises:
        UserError: it is neither, and what it is instead.
    """
    if not place.is_dir():
        raise UserError(f"{place} is a file: name a checkpoint's folder" if place.exists() else f"there is no {place}")
    if _is_checkpoint(place):
        return True
    if any(_is_checkpoint(folder) for folder in _folders(place)):
        return False
    if any(next(place.glob(f"{depth}{files}"), None) for depth in ("", "*/", "*/*/") for files in DEEPSPEED_FILES):
        raise UserError(
            f"{place} holds checkpoints of DeepSpeed's own, which engine.save_checkpoint writes: load them with "
            "engine.load_checkpoint, or make fp32 weights of one with the zero_to_fp32.py that lies beside it. This "
            "tool reads what megalr.save_checkpoint writes"
        )
    raise UserError(f"{place} holds no checkpoint that megalr.save_checkpoint has written")


def listed(directory: Path) -> list[Listed]:
    """The checkpoints in a directory, newest first, their data not looked at; those that cannot be read come last."""
    found = []
    for folder in _folders(directory):
        hidden = folder.name.startswith(".")  # what an interrupted save or deletion has left
        if _is_checkpoint(folder) and ((folder / MANIFEST).is_file() or not hidden):
            try:
                found.append(Listed(folder, read_manifest(folder)))
            except UserError as error:
                found.append(Listed(folder, None, str(error)))
    return sorted(found, key=lambda each: each.manifest.order if each.manifest else -1, reverse=True)


def latest(directory: Path) -> str | None:
    """The name in the file ``latest``; None where there is no such file."""
    try:
        return (directory / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None


def whole_checkpoint(place: Path) -> tuple[Manifest, list[str]]:
    """A checkpoint all of whose files have been read and are as they were written.

    Args:
        place: a checkpoint's folder, or the directory of several, of which it is the newest that is whole.

    Returns:
        The checkpoint, and which newer ones were passed over and why.

    Raises:
        UserError: it is damaged, naming what is and the newest other one that is not; or there is none.
    """
    if not is_one(place):
        manifest, skipped = newest_valid(place)
        if manifest is None:
            raise UserError("\n  ".join([f"no checkpoint in {place} is whole:", *skipped]))
        return manifest, skipped
    try:
        manifest = read_whole(place)
    except UserError as error:
        others = [each.manifest for each in listed(place.parent) if each.manifest and each.folder.name != place.name]
        other = next((manifest for manifest in others if not problems(manifest)), None)
        offer = f"{other.folder} is whole, the newest that is" if other else "no other one beside it is whole"
        raise UserError(f"{error}\nNothing was written; {offer}") from error
    return manifest, []


def _is_checkpoint(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() or next(folder.glob(RANK_FILES), None) is not None


def _folders(directory: Path) -> list[Path]:
    return sorted(folder for folder in directory.iterdir() if folder.is_dir())
