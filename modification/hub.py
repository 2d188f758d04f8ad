"""Models on the Hub: fetched into the Hub's own cache, file by file, with progress, and only files that are read here.

What is in the cache already is used when the Hub is away. A download that is broken off goes on where it stopped.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tqdm import tqdm

from modification.errors import LoadError

READ = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt", "README.md")

Progress = Callable[[int, int], None]


class HubError(LoadError):
    """A model can't be had from the Hub; the message is a sentence for the user."""


def fetch(repository: str, revision: str | None = None, progress: Progress | None = None) -> str:
    """The folder of a Hub model's files, downloaded if need be.

    Args:
        progress: told how many bytes are here, and how many there will be; what it raises ends the download.

    Raises:
        HubError: no such model, no safetensors in it, or the Hub is away and nothing is in the cache.
    """
    try:
        patience = constants.HF_HUB_ETAG_TIMEOUT  # seconds, from the environment variable of that name
        info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=patience)
        files = {str(one.rfilename): int(one.size or 0) for one in info.siblings or []}
        commit = info.sha
    except GatedRepoError:
        raise HubError(f"{repository} is gated: accept its terms on the Hub, and set HF_TOKEN") from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return _kept(repository, revision, f"There is no model {repository} on the Hub, or it is private")
    except Exception as error:  # away, too slow, or answering nonsense: whatever the libraries make of it
        return _kept(repository, revision, f"The Hub can't be reached for {repository} ({type(error).__name__})")
    wanted = {name: size for name, size in files.items() if _is_read(name)}
    if not any(name.endswith(".safetensors") for name in wanted):
        raise HubError(f"{repository} holds no .safetensors weights; other formats are not read")
    return _download(repository, revision, commit, wanted, progress or (lambda done, total: None))


def _is_read(name: str) -> bool:
    """Files at the top, and an adapter's."""
    folder, _, file = name.rpartition("/")
    return folder in ("", "adapter") and any(fnmatch.fnmatch(file, pattern) for pattern in READ)


def _kept(repository: str, revision: str | None, why: str) -> str:
    """The folder in the cache, or the reason why there is none."""
    try:
        folder: str = snapshot_download(repository, revision=revision, local_files_only=True)
    except Exception:
        raise HubError(f"{why}, and it is not among the models kept on this machine") from None
    return folder


def _download(
    repository: str, revision: str | None, commit: str | None, files: dict[str, int], progress: Progress
) -> str:
    total, done = sum(files.values()), 0
    progress(0, total)
    place = ""
    # The config first, by the revision's own name: the cache then knows which commit that is. Weights last.
    for name in sorted(files, key=lambda name: (name != "config.json", name.endswith(".safetensors"), name)):
        try:
            which = revision if name == "config.json" else commit or revision
            place = hf_hub_download(repository, name, revision=which, tqdm_class=_bar(progress, done, total))
        except Exception as error:  # whatever the libraries make of a connection that broke
            if isinstance(error, ValueError):  # what ``progress`` raised to end it
                raise
            raise HubError(
                f"{name} of {repository} could not be fetched ({type(error).__name__}): try again, what is here is kept"
            ) from error
        done += files[name]
        progress(done, total)
    return str(Path(place).parent.parent if "/" in name else Path(place).parent)


def _bar(progress: Progress, before: int, total: int) -> type[tqdm[Any]]:
    """A progress bar that draws nothing and tells how many bytes are here, those ``before`` this file included."""

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.here = int(kwargs.get("initial") or 0)
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self.here += int(n or 0)
            progress(before + self.here, total)

    return Silent
