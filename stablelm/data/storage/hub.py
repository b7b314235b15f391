"""File lists of data sets on the Hugging Face hub, by `datasets`' own builder."""

import os
import re

from stablelm.data.storage import options
from stablelm.data.storage.retry import persist, words
from stablelm.errors import ConfigError, DataError

PREFIX = "hf://datasets/"
PINNED = re.compile(re.escape(PREFIX) + r"([^@]+)@([0-9a-f]{40})/(.+)")
"""(data set, commit, path) of a file whose content never changes."""
UNREACHABLE = {"ConnectError", "ConnectTimeout", "ConnectionError", "LocalEntryNotFoundError", "OfflineModeIsEnabled"}
FORM = "hf://datasets/<owner>/<name>[@<revision>]/<file or pattern>"


def expand(url: str, *, key: str) -> list[str]:
    """URLs of the files that `hf://datasets/<owner>/<name>[@<revision>]/<pattern>` matches.

    The revision in the URLs is the commit that was found, so that later reads see the same files.
    Raises ConfigError under `key` when the form is wrong, nothing matches or the hub is out of reach.
    """
    match = re.fullmatch(re.escape(PREFIX) + r"([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", url)
    if match is None:
        raise ConfigError(f"{key}: {url!r} does not name files of a data set on the hub; write {FORM}")
    name, revision, pattern = match.groups()
    # datasets looks for a folder of this name first.
    if os.path.isdir(name):
        raise ConfigError(
            f"{key}: {url!r} would be looked up in the local folder {name!r}; give that folder itself as the path, "
            "or start from another folder"
        )
    reach(url, key=key)
    import datasets  # takes seconds: pandas and pyarrow come with it

    datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(
            name, data_files={"train": pattern}, revision=revision and revision.replace("%2F", "/")
        )
        files = [str(file) for file in (builder.config.data_files or {})["train"]]
    # The hub's client has no common error class: any failure here means that the list cannot be had.
    except Exception as error:
        raise ConfigError(sentence(error, url, key)) from error
    return files


def reach(url: str, *, key: str) -> None:
    """Raises ConfigError under `key` unless the hub answers within seconds; its own client tries for half a minute."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return
    seconds = options.FIRST_ANSWER
    try:
        persist(
            lambda: get_session().head(constants.ENDPOINT, timeout=seconds),
            name=constants.ENDPOINT,
            budget=seconds,
            first_answer=seconds,
        )
    except DataError as error:
        cause = words(error.__cause__ or error)
        raise ConfigError(
            f"{key}: cannot reach the hub for {url!r}; give the https URL of a mirror or a folder with its files "
            f"({constants.ENDPOINT} does not answer: {cause})"
        ) from error


def sentence(error: Exception, url: str, key: str) -> str:
    """Why `url` cannot be had from the hub, and what to do."""
    links = _chain(error)
    names = {type(link).__name__ for link in links}
    # datasets tells a failed connection as a missing file, with the client's error named in the text.
    if names & UNREACHABLE or any(name in str(link) for link in links for name in UNREACHABLE):
        return f"{key}: cannot reach the hub for {url!r}; give the https URL of a mirror or a folder with its files"
    if "GatedRepoError" in names:
        return f"{key}: {url!r} is behind a licence; accept it on the hub and set HF_TOKEN"
    if names & {"DatasetNotFoundError", "RepositoryNotFoundError", "RevisionNotFoundError"}:
        return f"{key}: the hub has no data set or revision {url!r}; check owner, name and revision, or set HF_TOKEN"
    if names & {"FileNotFoundError", "EntryNotFoundError", "DataFilesNotFoundError"}:
        return f"{key}: no file on the hub matches {url!r}; check the pattern against the data set's file list"
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return f"{key}: the hub gave no file list for {url!r} ({reason}); try again, or give a mirror or a folder"


def _chain(error: BaseException | None) -> list[BaseException]:
    links: list[BaseException] = []
    while error is not None and error not in links:
        links.append(error)
        error = error.__cause__ or error.__context__
    return links
