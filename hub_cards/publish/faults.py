"""How a push that broke off ends: one sentence that says what happened, what the repo holds now, and what to do next.

A sentence of SENTENCES is found by the Hub's status, or by one of the words below where there was no answer.
"""

import errno
import sys
import tempfile
from collections.abc import Iterator

from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

SERVER, LOST, UNREACHED, OFFLINE, FULL, STOPPED = 500, "lost", "unreached", "offline", "full", "stopped"
LOGIN = "log in with `hf auth login` or set HF_TOKEN"
RIGHTS = "take a token that may write there (https://huggingface.co/settings/tokens)"
SENTENCES = {  # what happened, and what is to be done before the same command is given again
    401: ("the Hub needs a valid token and got none", LOGIN),
    403: ("the token does not permit this", RIGHTS),
    404: ("the Hub has no such repo or branch, or hides it from this token", "check the names, and " + LOGIN),
    409: ("another change of the repo is under way", "wait until it is done"),
    412: ("another commit came first", "look at what it changed"),
    413: ("a file or the commit is too large for the Hub", "make it smaller (save_pretrained has max_shard_size)"),
    429: ("the Hub takes no more requests for now", "wait for as long as it asks"),
    SERVER: ("the Hub has trouble of its own", "wait some minutes (https://status.huggingface.co)"),
    LOST: ("the connection to the Hub was lost", "check the network"),
    UNREACHED: ("the Hub cannot be reached", "check the network, the proxy and HF_ENDPOINT"),
    OFFLINE: ("the Hub was not asked, as HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set", "unset it"),
    FULL: ("the disk is full", "make room on it, or set TMPDIR to a folder on another"),
    STOPPED: ("the push was stopped by Ctrl-C", ""),
    None: ("the push did not finish", "see to what is said above"),
}
MAYBE_MADE = (SERVER, LOST, FULL, STOPPED, None)  # what a commit may end with that the Hub did make


class NoRight(Exception):
    """The token is valid, but not for this."""


def closing(error: BaseException, repo: str, is_sending: bool = True, made: str | None = None) -> str:
    """The sentence that a push ends with.

    Args:
        is_sending: whether anything may have been uploaded.
        made: the page of the new commit or pull request, where there is one already.
    """
    kind = kind_of(error)
    happened, todo = SENTENCES[kind]
    if kind in (OFFLINE, STOPPED):
        details = None
    elif kind in (LOST, UNREACHED):
        details = " ".join(f"{type(error).__name__}: {error}".split())
    elif kind == FULL:
        details = getattr(error, "filename", None) or tempfile.gettempdir()
    elif isinstance(error, NoRight):
        details = error
    else:
        details = answered(error)
    happened += f" ({details})" if details else ""
    if made:
        state = f"the new revision is in place: {made}"
    elif not is_sending:
        state = f"nothing was uploaded, and {repo} still holds its old revision whole"
    elif kind in MAYBE_MADE and (answered(error) or SERVER) >= SERVER:
        state = f"{repo} holds its old revision whole, or the new one if only the answer to the commit was lost"
    else:
        state = f"{repo} still holds its old revision whole"
    return (
        f"{happened[0].upper()}{happened[1:]}; {state}; {f'{todo}, then ' if todo else ''}give the same command again."
    )


def says_all(error: BaseException) -> bool:
    """Whether the sentence leaves nothing of the error unsaid; the Hub's own words it does."""
    return kind_of(error) is not None and answered(error) is None or isinstance(error, KeyboardInterrupt)


def answered(error: BaseException) -> int | None:
    """The status of the first answer in what the error was raised from."""
    return next((number for number in map(status, chain(error)) if number), None)


def kind_of(error: BaseException) -> int | str | None:
    """The key in SENTENCES of an error, or of what it was raised from; of several the first that is no lost one."""
    found = [kind for kind in map(own_kind, chain(error)) if kind is not None]
    return next((kind for kind in found if kind not in (LOST, UNREACHED)), found[-1] if found else None)


def own_kind(error: BaseException) -> int | str | None:
    if isinstance(error, KeyboardInterrupt):
        return STOPPED
    if isinstance(error, OfflineModeIsEnabled):
        return OFFLINE
    if isinstance(error, LocalTokenNotFoundError):
        return 401
    if isinstance(error, NoRight):
        return 403
    if number := status(error):
        number = SERVER if number >= 500 else number
        return number if number in SENTENCES else None
    if is_lost(error):
        return UNREACHED if isinstance(error, of_clients("ConnectError", "ConnectTimeout", "ProxyError")) else LOST
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return FULL if is_full else None


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def status(error: BaseException) -> int | None:
    """Of the Hub's answer, where there was one."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def is_lost(error: BaseException) -> bool:
    """Whether no answer came, so that the next attempt may get one."""
    if isinstance(error, OfflineModeIsEnabled):  # a ConnectionError that no attempt changes
        return False
    return isinstance(error, (*of_clients("TransportError"), ConnectionError, LocalEntryNotFoundError))


def of_clients(*names: str) -> tuple[type, ...]:
    """These classes of the HTTP libraries that are there: each generation of the Hub's client has another."""
    return tuple(getattr(sys.modules[it], name) for it in ("httpx", "httpx2") if it in sys.modules for name in names)
