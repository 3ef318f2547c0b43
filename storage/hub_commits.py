"""Files sent to a repository of the Hugging Face Hub: several in one commit, through its client."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .address import HUB_KINDS

F = TypeVar("F")

# The Hub counts commits: a file each would soon be refused.
FILES_A_COMMIT, BYTES_A_COMMIT = 64, 2_000_000_000
_IS_THERE = 409  # the Hub's answer


def in_commits(files: Sequence[tuple[F, int]]) -> Iterator[list[F]]:
    """Files, given with their sizes, in groups that go into one commit each."""
    group: list[F] = []
    size = 0
    for file, n_bytes in files:
        if group and (len(group) == FILES_A_COMMIT or size + n_bytes > BYTES_A_COMMIT):
            yield group
            group, size = [], 0
        group.append(file)
        size += n_bytes
    if group:
        yield group


def commit(system: Any, root: str, files: Sequence[tuple[Path | bytes, str]]) -> None:
    """Add files to a repository in one commit.

    system: an HfFileSystem, whose endpoint and token are used; root: its path of the store, such as
    datasets/USER/REPO/acts.zarr; files: a file or its content, and its name below the root.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # the push has one of its own
    where = system.resolve_path(root)
    names = [name for _, name in files]
    shown = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    HfApi(endpoint=system.endpoint, token=system.token).create_commit(
        repo_id=where.repo_id,
        repo_type=where.repo_type,
        revision=where.revision,
        operations=[
            CommitOperationAdd(
                path_in_repo=f"{where.path_in_repo}/{name}".lstrip("/"),
                path_or_fileobj=str(content) if isinstance(content, Path) else content,
            )
            for content, name in files
        ],
        commit_message=f"sae-pipe: {shown}",
    )


def create(system: Any, root: str, *, private: bool) -> bool:
    """Make the repository of a store; False when it is there already. private: of a new one."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    kind, *rest = root.split("/")
    kind, rest = (kind, rest) if kind in HUB_KINDS else ("models", [kind, *rest])
    try:
        HfApi(endpoint=system.endpoint, token=system.token).create_repo(
            "/".join(rest[:2]).partition("@")[0],
            repo_type=kind.removesuffix("s"),
            private=private or None,
        )
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code != _IS_THERE:
            raise
        return False
    return True
