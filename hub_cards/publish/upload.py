"""One commit to the Hub, sent again where that may help, and a look at whether it is there as it should be.

The client sends uploads of files and listings again by itself; creating a repo, the commit and a tag it does not.
"""

import hashlib
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from .faults import NoRight, is_lost, status

ATTEMPTS, LONGEST = 6, 120  # seconds
PASSING = (408, 429, 500, 502, 503, 504)  # answers that may be others a little later


class WrongArgument(ValueError):
    """What is there does not go with an argument; nothing was changed."""


@dataclass(frozen=True)
class Published:
    """Where it is: the commit's hash, its page, and the page of the pull request if it is one.

    Where the branch had these very files already, there is no new commit and `is_new` is False.
    """

    oid: str
    url: str
    pr_url: str | None = None
    is_new: bool = True


def check_access(api: HfApi, repo: str, kind: str = "model", *, proposes: bool = False) -> None:
    """Raise what the Hub has against the token, as far as it tells that without a change of anything.

    A Hub that cannot be reached is not asked again: nothing is lost by giving up here.

    Args:
        proposes: only a pull request is to be made, which needs no right to write to the repo.
    """
    user = again("reading whose token it is", api.whoami, lost=False)
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise NoRight(f"that of {user['name']} may only read")
    try:
        again(f"reading {repo}", lambda: api.auth_check(repo, repo_type=kind, write=not proposes))
    except HfHubHTTPError as error:
        if status(error) != 404:
            raise
        owner = repo.partition("/")[0]  # of a repo that is still to be made
        if owner not in (user["name"], *(organization["name"] for organization in user.get("orgs", []))):
            raise NoRight(f"{user['name']} is no member of {owner}") from None


def upload(
    api: HfApi,
    files: dict[str, Path],
    repo: str,
    kind: str = "model",
    *,
    branch: str = "main",
    private: bool = False,
    create_pr: bool = False,
    tag: str | None = None,
    message: str = "Upload",
    on_commit: Callable[[Published], object] = lambda made: None,
) -> Published:
    """Make the repo and the branch where they are missing, and bring the branch to `files` in one commit.

    Whoever loads meanwhile, or after it broke off, gets the old revision whole. Files that are not among these are
    removed, but for hidden ones, which are the Hub's own. Then everything is downloaded and compared, and tagged.

    Args:
        files: names in the repo, and where they are. kind: model, space or dataset. create_pr: propose the commit.
        on_commit: called with the new commit, if there is one, before it is downloaded and tagged.
    Raises:
        WrongArgument: a public repo that should be private; a tag that is there for something else.
        RuntimeError: what came back is not what was sent. HfHubHTTPError and others: what the Hub said at last.
    """
    sdk = {"space_sdk": "gradio"} if kind == "space" else {}
    again(
        f"creating {repo}", lambda: api.create_repo(repo, repo_type=kind, private=private or None, exist_ok=True, **sdk)
    )
    now = again(f"reading {repo}", lambda: api.repo_info(repo, repo_type=kind))
    if private and not now.private:
        raise WrongArgument(f"--private, but --repo {repo} exists and is public: change that in its settings first")
    refs = again(f"reading {repo}", lambda: api.list_repo_refs(repo, repo_type=kind))
    is_tagged = tag in (ref.name for ref in refs.tags)
    if is_tagged and (other := differences(api, files, repo, kind, tag)):
        raise WrongArgument(f"--tag {tag} exists in {repo} and has other files: {', '.join(other[:8])}")
    if branch != "main":
        again(f"creating {branch}", lambda: api.create_branch(repo, branch=branch, repo_type=kind, exist_ok=True))
        now = again(f"reading {repo}", lambda: api.repo_info(repo, repo_type=kind, revision=branch))

    # Weights of an older revision would be loaded beside or in place of these.
    stale = sorted(file.rfilename for file in now.siblings if file.rfilename not in files and file.rfilename[0] != ".")
    if stale:
        print(f"not in the folder, so removed from {branch} of {repo}: {', '.join(stale)}")
    operations = [CommitOperationAdd(name, path) for name, path in files.items()]
    operations += [CommitOperationDelete(name) for name in stale]
    lost = []

    def commit() -> Published:
        # Not upload_folder, which makes several commits of a folder when it uploads by Xet. With parent_commit the Hub
        # refuses the commit if another one came between.
        options = {"commit_message": message, "revision": branch, "create_pr": create_pr, "parent_commit": now.sha}
        try:
            done = api.create_commit(repo, operations, repo_type=kind, **options)
            return Published(done.oid, done.commit_url, done.pr_url, is_new=done.oid != now.sha)
        except Exception as error:
            # the one that came between may be this very commit, of which only the answer was lost
            if lost and status(error) == 412 and not differences(api, files, repo, kind, branch):
                oid = api.repo_info(repo, repo_type=kind, revision=branch).sha
                return Published(
                    oid, f"{api.endpoint}/{constants.REPO_TYPES_URL_PREFIXES.get(kind, '')}{repo}/commit/{oid}"
                )
            lost.append(error)
            raise

    published = again("the commit", commit)
    if published.is_new:
        on_commit(published)
    again("downloading it", lambda: verify(api, files, repo, kind, published.oid))
    if tag is not None and not is_tagged:
        again("the tag", lambda: api.create_tag(repo, tag=tag, revision=published.oid, repo_type=kind))
    return published


def verify(api: HfApi, files: dict[str, Path], repo: str, kind: str, oid: str) -> None:
    """Download the revision to an empty cache; RuntimeError if a file is not what was sent."""
    with tempfile.TemporaryDirectory() as cache:
        there = Path(api.snapshot_download(repo, repo_type=kind, revision=oid, cache_dir=cache))
        for name, path in files.items():
            copy = there / name
            if not copy.is_file() or digest(copy) != digest(path):
                raise RuntimeError(f"{name} of {repo} at {oid} is not the file that was sent")


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differences(api: HfApi, files: dict[str, Path], repo: str, kind: str, revision: str) -> list[str]:
    """Names of files that are not the same in this revision, by the hashes in its listing."""
    listing = api.list_repo_tree(repo, recursive=True, revision=revision, repo_type=kind)
    there = {entry.path: entry for entry in listing if hasattr(entry, "blob_id")}  # folders have none
    different = [name for name in there if name not in files and name[0] != "."]
    for name, path in files.items():
        entry = there.get(name)
        if entry is None or not (digest(path) == entry.lfs.sha256 if entry.lfs else blob_id(path) == entry.blob_id):
            different.append(name)
    return different


def blob_id(path: Path) -> str:
    """As git has it."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def again(what: str, call: Callable, *, lost: bool = True):
    """`call()`, at most ATTEMPTS times while what it meets may pass: 1, 2, 4, ... seconds between, or as the Hub asks.

    Raises the last error, at once where the Hub asks for more than LONGEST seconds. lost: a lost connection may pass.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except Exception as error:
            seconds = pause(error, attempt)
            if seconds is None or seconds > LONGEST or attempt == ATTEMPTS or not lost and is_lost(error):
                raise
            reason = status(error) or type(error).__name__
            print(f"{what}: {reason}; again in {seconds} s ({attempt} of {ATTEMPTS - 1})", file=sys.stderr)
            time.sleep(seconds)


def pause(error: Exception, attempt: int) -> int | None:
    """Seconds until the next attempt, None if there is to be none."""
    if status(error) in PASSING:
        headers = error.response.headers
        asked = re.search(r"^\s*(\d+)\s*$|\bt=(\d+)", headers.get("retry-after") or headers.get("ratelimit") or "")
        return int(asked[1] or asked[2]) if asked else 2 ** (attempt - 1)
    return 2 ** (attempt - 1) if is_lost(error) else None
