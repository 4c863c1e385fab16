"""The way of an adapter to a model hub, and back."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
    snapshot_download,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from .files import COMPOSITION, CONFIG
from .package import BESIDE, CARD, OF_ADAPTERS, Package

_NO_ANSWER = cast(type[Exception], HfHubHTTPError.__bases__[0])
"""What the HTTP library raises where nobody answers; the hub's own errors are of it."""


def check_name(repo: str) -> None:
    """Raises ValueError where a repository cannot be called so."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"{repo!r} cannot be the name of a repository: {error}") from error
    if "/" not in repo:
        raise ValueError(f"{repo!r} does not say whose repository it is. Write USER/{repo}.")


def ready_to_send(token: str | None = None) -> None:
    """Raises ValueError where nothing could be sent: no token, or no network wanted."""
    if constants.HF_HUB_OFFLINE:
        raise ValueError("HF_HUB_OFFLINE is set, so nothing is sent. Unset it to push.")
    if token is None and get_token() is None:
        raise ValueError("There is no token of the hub. Log in with `hf auth login`, or set HF_TOKEN.")


def send(
    package: Package,
    repo: str,
    *,
    message: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Puts the files into a repository in one commit, and takes away what an earlier push left; the commit's address.

    The repository and the branch are made where they are not there.

    Raises:
        ValueError: the name is taken by something else, the token may not, or nobody answers.
    """
    check_name(repo)
    ready_to_send(token)
    api = HfApi(token=token)
    with _in_words(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        there = api.list_repo_files(repo, revision=revision)
        others = [name for name in there if name not in (".gitattributes", CARD)]
        if others and not any(name.rpartition("/")[2] in (CONFIG, COMPOSITION) for name in others):
            raise ValueError(f"{repo} is taken: it holds {', '.join(others[:4])}, and no adapter. Choose another name.")
        gone = [name for name in there if _is_ours(name) and name not in package.files]
        done = api.create_commit(
            repo,
            operations=[
                *(CommitOperationAdd(path_in_repo=n, path_or_fileobj=c) for n, c in package.files.items()),
                *(CommitOperationDelete(path_in_repo=name) for name in gone),
            ],
            commit_message=message,
            revision=revision,
        )
    return done.commit_url


def _is_ours(name: str) -> bool:
    """Whether a push may have put a file there; a card stays."""
    folder, _, file = name.rpartition("/")
    return file in OF_ADAPTERS if folder else file in (*OF_ADAPTERS, *BESIDE) and file != CARD


@contextmanager
def _in_words(repo: str) -> Iterator[None]:
    """One sentence for what a hub refuses."""
    try:
        yield
    except (OfflineModeIsEnabled, RuntimeError, _NO_ANSWER) as error:
        # A file that could not be sent is a RuntimeError, with the reason behind it.
        reason = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        raise ValueError(f"{repo}: {_said(reason)}.") from error


def _said(error: BaseException) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the hub is not asked. Unset it"
    if not isinstance(error, HfHubHTTPError):
        nobody = isinstance(error, _NO_ANSWER)
        return f"nobody answers at {constants.ENDPOINT} ({type(error).__name__})" if nobody else str(error)
    status = error.response.status_code
    known = {
        401: "the hub does not know this token. Log in with `hf auth login`, or set HF_TOKEN",
        403: "the token has no right to write there. Take one with the right, or a name of your own",
        404: "there is no such repository or revision, or the token may not see it",
        409: "the name is taken",
        413: "the files are larger than the hub takes",
    }
    return known.get(status, f"the hub answered {status}: {error.server_message or 'without a reason'}")


# ---- and back --------------------------------------------------------------------------------------------------------


def fetch(name: str, revision: str | None = None) -> Path:
    """What a repository holds that belongs to adapters, in the cache of the hub.

    Raises:
        FileNotFoundError: it is not there, or it is not here yet and the hub cannot be asked.
    """
    files = [*OF_ADAPTERS, *BESIDE, *(f"*/{file}" for file in OF_ADAPTERS)]
    try:
        with _in_words(name):
            return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"There is no folder {name!r}; if a repository of the hub is meant, it was not downloaded yet, and the hub "
            f"{'is not asked (HF_HUB_OFFLINE)' if constants.HF_HUB_OFFLINE else 'cannot be reached'}."
        ) from error
    except ValueError as error:
        raise FileNotFoundError(f"There is no folder {name!r}; and on the hub, {error}") from error
