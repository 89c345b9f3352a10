"""Send an exported folder to the Hub: exactly the files that were shown, and over nothing that is there already unless asked to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from trimlingual.run.artifacts import ARTIFACT_FILE, WORK_FILE
from trimlingual.run.hub_errors import hub_errors
from trimlingual.run.lineage import LINEAGE_FILE, read_lineage
from trimlingual.run.progress import LOG_FILE

OUR_RECORDS = (ARTIFACT_FILE, WORK_FILE, LOG_FILE)  # they name files and settings of this machine
WEIGHTS = (".safetensors", ".gguf")
THE_HUBS = (".gitattributes",)  # in every repository from its first commit


class PushError(ValueError):
    """A folder that must not be sent, or a repository that cannot be sent to."""


@dataclass(frozen=True)
class File:
    """A file that would be sent, by its name in the repository."""

    name: str
    path: Path
    num_bytes: int


def files_to_send(folder: Path) -> list[File]:
    """What of an exported folder goes to the Hub: all but this tool's records and hidden files. Nothing is sent.

    Raises PushError for a folder that is no export, or has a link or the list of clips of a training in it.
    """
    if not (folder / "README.md").is_file() or not _is_ours(folder / "README.md"):
        raise PushError(f"{folder} is no exported folder: it has no model card of this tool; run `trimlingual export`")
    if (folder / LINEAGE_FILE).is_file() and read_lineage(folder).seen:
        raise PushError(
            f"{folder / LINEAGE_FILE} lists the clips of the training: this is a folder of a run; run `trimlingual export`"
        )
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if links := [str(path) for path in paths if path.is_symlink()]:
        raise PushError(f"{', '.join(links[:3])}: links are not followed; put the file itself there")
    found = [
        File(path.relative_to(folder).as_posix(), path, path.stat().st_size)
        for path in paths
        if path.is_file() and path.name not in OUR_RECORDS
    ]
    if not any(file.name.endswith(WEIGHTS) for file in found):
        raise PushError(f"{folder} has no weights ({', '.join(WEIGHTS)}): the export is not whole; run it again")
    return found


def check_repo(repo: str) -> None:
    """PushError for what is no `owner/name` of the Hub."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise PushError(f"{repo!r} is no name of a repository: {error}") from error
    if "/" not in repo:
        raise PushError(f"{repo!r} names no owner; the repository must be given as owner/name")


def would_overwrite(files: Sequence[File], there: Sequence[str]) -> list[str]:
    """Names of files that the repository has already, but for the Hub's own."""
    return sorted({file.name for file in files} & (set(there) - set(THE_HUBS)))


def push(folder: Path, repo: str, private: bool, force: bool, say: Callable[[str], None]) -> str:
    """Send the folder to the model repository `repo`, which is made if it is not there; returns the commit's address.

    One commit, on top of what was looked at: if somebody changes the repository meanwhile, nothing is written. Nothing is ever removed.
    Raises PushError where a file is there already, unless `force`, and for whatever the Hub refuses.
    """
    check_repo(repo)
    files, api = files_to_send(folder), HfApi()
    try:
        there, commit = _there(api, repo)
        same = would_overwrite(files, there)
        if same and not force:
            raise PushError(
                f"{repo} has {len(same)} of these files already ({', '.join(same[:5])}{', ...' if len(same) > 5 else ''}): "
                "choose another name, or overwrite them with --force"
            )
        if commit is None:
            api.create_repo(repo, private=private)
            commit = api.repo_info(repo).sha
        say(f"sending {len(files)} files to {repo}")
        operations = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=str(file.path)) for file in files]
        sent = api.create_commit(repo, operations, commit_message="Model exported by trimlingual", parent_commit=commit)
    except hub_errors() as error:
        reason = (str(error).splitlines() or ["no message"])[0]
        raise PushError(
            f"{repo} could not be reached or did not take the files ({type(error).__name__}: {reason}). "
            "Log in with `hf auth login` with a token that may write, and check the network"
        ) from error
    return str(sent.commit_url)


def _there(api: HfApi, repo: str) -> tuple[list[str], str | None]:
    """Names of the repository's files and its commit; nothing and None where there is no such repository."""
    try:
        info: Any = api.repo_info(repo)
    except RepositoryNotFoundError:
        return [], None
    return [sibling.rfilename for sibling in info.siblings or ()], info.sha


def _is_ours(card: Path) -> bool:
    try:
        data = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return "trimlingual" in (data.get("tags") or [])
