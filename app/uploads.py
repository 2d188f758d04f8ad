"""Room for uploads: what lies in Gradio's folder, and what requests under way may still bring. No gradio page."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path

_BLOCK = 8192  # bytes on disk that the smallest file takes, its folder included
_PART = 100  # bytes of a request that the smallest file takes
_PARTS = 1000  # files in a request at most: Gradio's own bound
_FRESH, _OLD = 60.0, 4500.0  # seconds in which a folder may still get its file, and after which no upload is wanted
_OWN = re.compile(r"[0-9a-f]{32,}|tmp\w*")  # how Gradio names what it puts into its folder


class Uploads:
    """Lets uploads in as far as there is room.

    Args:
        folder: where they lie until they are deleted.
        most: bytes on disk, of all together.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.most, self._promised, self._looking = folder, most, 0, asyncio.Lock()

    @contextlib.asynccontextmanager
    async def room(self, told: int) -> AsyncIterator[bool]:
        """Whether a request of so many bytes may bring files; while it does, they count as promised."""
        promised = max(told, _BLOCK * min(_PARTS, told // _PART))
        self._promised += promised  # before anybody else is asked
        try:
            async with self._looking:
                alone = self._promised == promised  # a folder that is empty may be about to get another's file
                kept = await asyncio.to_thread(self.kept, alone)
            yield kept + self._promised <= self.most
        finally:
            self._promised -= promised

    def kept(self, tidy: bool = True) -> int:
        """Bytes on disk of the files that lie here.

        What Gradio forgets goes: files of uploads that broke off, once they are old, and (``tidy``) folders that were
        left empty.
        """
        total = 0
        for path in sorted(self.folder.rglob("*"), reverse=True):  # what is in a folder before the folder
            with contextlib.suppress(OSError):  # deleted meanwhile, or a folder that isn't empty
                found, gradios = path.lstat(), _OWN.fullmatch(path.relative_to(self.folder).parts[0]) is not None
                age = time.time() - found.st_mtime
                if path.is_dir() and not path.is_symlink():
                    if tidy and gradios and age > _FRESH:
                        path.rmdir()
                elif gradios and age > _OLD:
                    path.unlink()
                else:
                    total += max(found.st_size, _BLOCK)
        return total
