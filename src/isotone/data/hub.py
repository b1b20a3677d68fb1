"""Documents from a data set on the hub: streamed, and pinned to a commit before the first one is read."""

import re
from collections.abc import Iterator
from typing import Any

from isotone.config import Data
from isotone.data.corpora import Corpus
from isotone.data.document import Document
from isotone.data.local_files import Fields
from isotone.errors import IsotoneError, UsageError

_COMMIT = re.compile(r"[0-9a-f]{40}")


def open_hub(config: Data, pinned: str | None = None) -> Corpus:
    """Open a data set of the hub, or what ``hf download`` left of it in HF_HOME where the hub cannot be reached.

    Raises:
        UsageError: there is no such data set, revision, configuration or split, it is not public, or neither the hub
            nor a downloaded copy can be reached.
    """
    asked = pinned or config.revision
    place, commit = _find(config.source, asked)

    def read(skip: int) -> Iterator[Document]:
        return _read(config, place, commit, skip)

    identity = {
        "kind": "hub",
        "name": config.source,
        "config_name": config.config_name,
        "split": config.split,
        "commit": commit,
    }
    return Corpus(identity, read, revision=commit)


def _find(name: str, revision: str | None) -> tuple[str, str]:
    """Return what ``load_dataset`` is given, the hub's name or a downloaded folder, and the commit."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub import errors as hub

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UsageError(f"data.source: {name!r} is neither a file or folder that exists nor a name on the hub")
    try:
        if constants.is_offline_mode():
            raise hub.OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
        found = HfApi().dataset_info(name, revision=revision, timeout=20)
    except hub.RevisionNotFoundError as error:
        raise UsageError(f"data.revision: {name} has no revision {revision!r} on the hub") from error
    except hub.GatedRepoError as error:
        raise UsageError(f"data.source: {name} asks for consent; give it on the hub, then: hf auth login") from error
    except hub.RepositoryNotFoundError as error:
        raise UsageError(
            f"data.source: there is no file or folder {name} here and no public data set of that name on the hub"
        ) from error
    except (hub.OfflineModeIsEnabled, hub.HTTPError, OSError) as error:
        return _find_downloaded(name, revision, error)
    return name, str(found.sha)


def _find_downloaded(name: str, revision: str | None, why: Exception) -> tuple[str, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True)
    except LocalEntryNotFoundError:
        option = f" --revision {revision}" if revision else ""
        raise UsageError(
            f"data.source: {name} is not a local file and the hub cannot be reached ({_first_line(why)}); where there "
            f"is a network (a login node) run: hf download {name} --repo-type dataset{option}, with the same HF_HOME, "
            "or name a local file or folder"
        ) from why
    return folder, folder.rstrip("/").rsplit("/", 1)[-1]


def _read(config: Data, place: str, commit: str, skip: int) -> Iterator[Document]:
    from huggingface_hub.errors import HTTPError

    fields = Fields.of(config)
    try:
        rows = iter(_load(config, place, commit).skip(skip))
        for number, row in enumerate(rows, skip + 1):
            place = f"{config.source}, row {number} of {config.split}"
            yield fields.document(f"{config.split}:{number}", row, place)
    except (HTTPError, OSError) as error:
        raise IsotoneError(
            f"{config.source} broke off while it was read ({_first_line(error)}); what was read is kept: run again"
        ) from error


def _load(config: Data, place: str, commit: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(
            place,
            config.config_name,
            split=config.split,
            revision=commit if _COMMIT.fullmatch(commit) and place == config.source else None,
            streaming=True,
        )
    except (ValueError, RuntimeError, FileNotFoundError) as error:  # unknown configuration, split, or no data files
        raise UsageError(
            f"data: {config.source} cannot be opened with config_name {config.config_name!r} and split "
            f"{config.split!r} ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
