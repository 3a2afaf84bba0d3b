"""Folders for unfinished files, and what is said when their disk is full."""

import tempfile
from pathlib import Path


def scratch_folder(prefix: str, parent: Path | str | None) -> Path:
    """A new folder for unfinished files under `parent` (made where it is missing), by default in the temp folder."""
    if parent is not None:
        Path(parent).mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))


def no_space(folder: Path | str | None) -> str:
    """`folder` as in `scratch_folder`, or one that it made."""
    where = folder or tempfile.gettempdir()
    return f"no space left on the disk of {where}; free some, or name another folder with encode.scratch"
