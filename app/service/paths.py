"""Which folders and files a page may name: those within allowed folders, whatever links or dots are in between."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from app.errors import UserError


def real(path: str | Path) -> Path:
    """Where a path leads, links followed.

    Raises:
        UserError: a path that no system can have.
    """
    try:
        found = Path(path).expanduser().resolve()
        found.exists()  # not every name may even be looked up
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name too long; ~nobody; a null byte
        raise UserError("That is no path.") from None
    return found


def check_folder_within(path: str | Path, folders: Sequence[Path]) -> None:
    """A model folder, and every file in it, lies within one of ``folders``; anywhere, where there are none.

    Raises:
        UserError: it does not.
    """
    if not folders:
        return
    left, seen = [real(path)], set[Path]()
    while left:
        place = left.pop()
        if not _within(place, folders):
            raise UserError(f"{path} is not among the folders that this app opens models from.")
        if place.is_dir() and place not in seen:  # links to folders are gone into, and may lead round
            seen.add(place)
            with contextlib.suppress(OSError):  # what can't be looked into can't be read either
                left += [real(one) for one in place.iterdir()]


def check_text_within(path: str | Path, folders: Sequence[Path]) -> None:
    """A text file was uploaded, or lies within one of ``folders``; anywhere, where there are none.

    Raises:
        UserError: it does not.
    """
    uploads = Path(os.environ.get("GRADIO_TEMP_DIR") or Path(tempfile.gettempdir()) / "gradio").resolve()
    if folders and not _within(real(path), (*folders, uploads)):
        raise UserError(f"{path} is not among the folders that this app reads from: upload the text instead.")


def _within(path: Path, folders: Sequence[Path]) -> bool:
    return any(path.is_relative_to(folder.resolve()) for folder in folders)
