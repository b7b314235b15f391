"""The tokenizer files of a model on the Hugging Face hub, by the hub's own client and in its cache."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from stablelm.errors import ConfigError

FORM = "hf://<owner>/<name>[@<revision>][/<file>]"
SECONDS = 10.0  # for the hub to answer
_ADDRESS = re.compile(r"(?:hf://)?(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/\s]+))?(?:/(?P<file>\S+))?")


@dataclass(frozen=True)
class HubModel:
    """A model: `files` are the names in its top folder at `commit`, `file` the one that the user names.

    `asked` is what the user wrote, `key` its key or argument.
    """

    name: str
    revision: str
    commit: str
    files: list[str]
    file: str | None
    asked: str
    key: str

    def fetch(self, file: str, commit: str | None = None) -> Path:
        """The file in the hub's cache, `snapshots/<commit>/<file>`, downloaded unless it is there.

        Without a commit it is that of the revision, which the cache remembers. Raises ConfigError.
        """
        import huggingface_hub

        try:
            return Path(huggingface_hub.hf_hub_download(self.name, file, revision=commit or self.revision))
        # The hub's client has no common error class: any failure here means that the file cannot be had.
        except Exception as error:
            raise ConfigError(_sentence(error, self.asked, self.key)) from None


def find(asked: str, *, key: str) -> HubModel:
    """The model that `hf://org/name[@revision][/file]` or `org/name[@revision]` names.

    Asks the hub at HF_ENDPOINT which files there are; its cache answers where the hub cannot be reached.
    Raises ConfigError under `key`.
    """
    match = _ADDRESS.fullmatch(asked)
    if match is None or asked.startswith("hf://datasets/"):
        raise ConfigError(f"{key}: {asked!r} does not name a model on the hub; write {FORM}")
    name, revision, file = match["name"], (match["revision"] or "main").replace("%2F", "/"), match["file"]
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        found = huggingface_hub.HfApi().model_info(name, revision=revision, timeout=SECONDS)
        files = [each.rfilename for each in found.siblings or () if "/" not in each.rfilename]
        return HubModel(name, revision, found.sha or revision, files, file, asked, key)
    except Exception as error:
        if _cause(error) is None and (cached := _cached(name, revision)) is not None:
            return HubModel(name, revision, cached.name, sorted(os.listdir(cached)), file, asked, key)
        raise ConfigError(_sentence(error, asked, key)) from None


def _cached(name: str, revision: str) -> Path | None:
    """The snapshot in the hub's cache that the revision was when the hub was last reached."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # nothing of it is in the cache, or the name is none
        return None


def _cause(error: BaseException) -> str | None:
    """What the hub refuses, None where it gave no answer."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in names:
        return "is gated; accept its licence on the hub and set HF_TOKEN"
    if "RevisionNotFoundError" in names:
        return "has no such revision; give a branch, a tag or a commit that it has"
    if "EntryNotFoundError" in names and "LocalEntryNotFoundError" not in names:
        return "has no such file; give one that it has"
    if "RepositoryNotFoundError" in names:
        return "is neither here nor on the hub as you may see it; check owner and name, or set HF_TOKEN"
    if "HFValidationError" in names:
        return f"is not a name on the hub; write {FORM}"
    return None


def _sentence(error: BaseException, asked: str, key: str) -> str:
    cause = _cause(error)
    if cause is not None:
        return f"{key}: {asked!r} {cause}"
    words = " ".join(str(error).split())[:160].rstrip(".") or type(error).__name__
    return (
        f"{key}: the hub does not answer for {asked!r}, which is neither here nor in its cache ({words}); give the "
        "path of a tokenizer.json, or try again"
    )
