"""Sending an export to the Hugging Face hub, by the hub's own client."""

from pathlib import Path

from stablelm.errors import ConfigError, StorageError


def prepare(name: str) -> None:
    """Makes the private repository `owner/name` unless it exists, so that a wrong name or token is found early.

    Raises ConfigError under --push.
    """
    import huggingface_hub
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
        if "/" not in name:
            raise HFValidationError("the owner is missing")
    except HFValidationError:
        raise ConfigError(f"--push {name} does not name a repository; write OWNER/NAME") from None
    try:
        huggingface_hub.HfApi().create_repo(name, private=True, exist_ok=True)
    # The hub's client has no common error class: any failure here means that nothing can be sent.
    except Exception as error:
        raise ConfigError(
            f"--push {name}: the hub does not let this user write there ({_words(error)}); log in by `hf auth login` "
            "or set HF_TOKEN to a token that may write"
        ) from None


def push(name: str, folder: Path, *, message: str) -> str:
    """Uploads the folder in one commit and returns its address. Raises StorageError; the folder stays."""
    import huggingface_hub

    try:
        done = huggingface_hub.HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    except Exception as error:
        raise StorageError(
            f"--push {name}: the upload failed ({_words(error)}); {folder} is complete: repeat with "
            f"`hf upload {name} {folder}`"
        ) from None
    return str(done.commit_url)


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
