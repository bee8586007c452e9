"""What the fake Hub knows and answers: repos with all their revisions, and a method for each route; no server.

Its refusals are the Hub's: the same status and X-Error-Code, in words of its own.
"""

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import PurePosixPath
from urllib.parse import parse_qs, quote

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

INITIAL = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
USER = "user"
API, NAMED, BATCH = "/api/{kind:kind}/{repo:repo}", "/{kind:kind}/{repo:repo}", ".git/info/lfs/objects/batch"
ROUTES = {  # a name for `fail` and `seen`, which also is the method that answers: what is asked
    "whoami": ("GET", "/api/whoami-v2"),
    "create": ("POST", "/api/repos/create"),
    "delete": ("DELETE", "/api/repos/delete"),
    "validate": ("POST", "/api/validate-yaml"),
    "settings": ("PUT", API + "/settings"),
    "preupload": ("POST", API + "/preupload/{rev:rev}"),
    "batch": ("POST", "/{repo:repo}" + BATCH, NAMED + BATCH),
    "put": ("PUT", "/lfs/{oid}"),
    "verify": ("POST", "/lfs/{oid}"),
    "commit": ("POST", API + "/commit/{rev:rev}"),
    "branch": ("POST", API + "/branch/{rev:rev}"),
    "delete_branch": ("DELETE", API + "/branch/{rev:rev}"),
    "tag": ("POST", API + "/tag/{rev:rev}"),
    "delete_tag": ("DELETE", API + "/tag/{rev:rev}"),
    "access": ("GET", API + "/auth-check", API + "/auth-check/{right:rest}"),
    "info": ("GET", API, API + "/revision/{rev:rev}"),
    "refs": ("GET", API + "/refs"),
    "commits": ("GET", API + "/commits/{rev:rev}"),
    "tree": ("GET", API + "/tree/{rev:rev}", API + "/tree/{rev:rev}/{path:rest}"),
    "paths": ("POST", API + "/paths-info/{rev:rev}"),
    "resolve": ("GET", "/{repo:repo}/resolve/{rev:rev}/{path:rest}", NAMED + "/resolve/{rev:rev}/{path:rest}"),
    "cdn": ("GET", "/cdn" + NAMED + "/{rev:rev}/{path:rest}"),
}
WRITES = {route for route, (method, *_) in ROUTES.items() if method != "GET"} - {"validate", "put", "paths"}
STORAGE = {"put", "cdn"}  # of the other host


class Refusal(Exception):
    """An error of the Hub: HTTP status, the code that the client tells errors by, text, and more headers."""


def refused(status: int, code: str, text: str, headers: dict | None = None, **body) -> Response:
    headers = {"X-Error-Code": code, "X-Error-Message": text} | (headers or {})
    return JSONResponse({"error": text} | body, status, headers)


@dataclass
class Repo:
    private: bool = False
    gated: str | bool = False
    sdk: str | None = None
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # sha: all files; the oldest first
    history: dict[str, dict] = field(default_factory=dict)  # sha: what is said of a commit
    refs: dict[str, str] = field(default_factory=dict)  # of branches, tags and pull requests
    tags: set[str] = field(default_factory=set)  # which of them are tags

    def sha(self, revision: str) -> str:
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def commit(self, branch: str, files: dict[str, bytes], parent: str | None = None, title="", message="") -> str:
        digest = hashlib.sha1(str(len(self.commits)).encode())  # a revert is a commit of its own
        for path, content in sorted(files.items()):
            digest.update(path.encode() + content)
        about = {"id": digest.hexdigest(), "parent": parent or self.refs.get(branch), "title": title}
        about |= {"message": message, "authors": [{"user": USER}]}
        about |= {"date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")}
        self.refs[branch] = sha = about["id"]
        self.commits[sha], self.history[sha] = files, about
        return sha


class Answer:
    """To one request: a method for each route, with what address and body say at hand."""

    def __init__(self, hub, route: str, request: Request, body: bytes):
        self.hub, self.body, self.query, self.headers = hub, body, request.query_params, request.headers
        address = {"kind": "models", "rev": "main", "path": ""} | request.path_params
        self.rev, self.path, self.oid = address["rev"], address["path"], address.get("oid")
        self.right = address.get("right", "read")
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if route in STORAGE and token:
            raise Refusal(400, "", "Only one auth mechanism allowed")
        if token and token not in hub.tokens:
            text = "Invalid user token." if route == "whoami" else "Invalid credentials in Authorization header"
            raise Refusal(401, "", text)
        self.role = hub.tokens.get(token)
        if route in WRITES and self.role != "write":
            raise Refusal(403, "", "a write token is needed") if token else Refusal(401, "RepoNotFound", "no token")
        self.kind, self.name = address["kind"], address.get("repo")
        if route in ("create", "delete"):
            self.kind = f"{self.asked.get('type') or 'model'}s"
            self.name = f"{self.asked.get('organization') or USER}/{self.asked['name']}"
        self.url = f"{hub.endpoint}/{'' if self.kind == 'models' else self.kind + '/'}{self.name}"
        self.repo = hub.repos.get(f"{self.kind}/{self.name}")
        hidden = self.repo is None or self.repo.private and self.role is None
        if hidden and self.name and route not in ("create", "cdn"):  # who knows an address of the other host may read
            raise Refusal(404 if self.role else 401, "RepoNotFound", "Repository not found")

    @cached_property
    def asked(self) -> dict:
        return json.loads(self.body or b"{}")

    @cached_property
    def files(self) -> dict[str, bytes]:
        return self.repo.commits[self.repo.sha(self.rev)]

    def whoami(self):
        if self.role is None:
            raise Refusal(401, "", "Invalid username or password.")
        auth = {"type": "access_token", "accessToken": {"displayName": "fake", "role": self.role}}
        return {"type": "user", "name": USER, "fullname": USER, "email": None, "orgs": [], "auth": auth}

    def access(self):
        if self.right == "write" and (self.role != "write" or self.name.split("/")[0] != USER):
            raise Refusal(403, "", "You do not have write access to this repo")

    def create(self):
        if self.repo:
            return refused(409, "", f"You already created this {self.kind[:-1]} repo", url=self.url)
        if self.kind == "spaces" and not self.asked.get("sdk"):
            raise Refusal(400, "", '"sdk" is required')
        repo = Repo(private=self.asked.get("visibility") == "private", sdk=self.asked.get("sdk"))
        repo.commit("main", INITIAL, title="initial commit")
        self.hub.repos[f"{self.kind}/{self.name}"] = repo
        return {"url": self.url}

    def delete(self):
        del self.hub.repos[f"{self.kind}/{self.name}"]

    def settings(self):
        if "visibility" in self.asked:
            self.repo.private = self.asked["visibility"] == "private"
        self.repo.gated = self.asked.get("gated", self.repo.gated)

    def validate(self):
        try:
            data = metadata(self.asked["content"])
            if not isinstance(data.get("license", ""), str):
                raise ValueError('"license" must be a string')
        except ValueError as error:
            return JSONResponse({"errors": [{"message": str(error)}], "warnings": []}, 400)
        return {"errors": [], "warnings": [] if data else [{"message": "empty or missing yaml metadata in repo card"}]}

    def preupload(self):
        answers = []
        for path, size in ((file["path"], file["size"]) for file in self.asked["files"]):
            old = {"oid": etag(path, self.files[path])} if path in self.files else {}
            mode = "lfs" if is_lfs(path, size) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False} | old)
        return {"files": answers}

    def batch(self):
        hosts = {"upload": self.hub.storage, "verify": self.hub.endpoint}
        for item in self.asked["objects"]:
            if item["oid"] not in self.hub.blobs:
                item["actions"] = {action: {"href": f"{host}/lfs/{item['oid']}"} for action, host in hosts.items()}
        return {"transfer": "basic", "objects": self.asked["objects"]}

    def put(self):
        if hashlib.sha256(self.body).hexdigest() != self.oid:
            raise Refusal(400, "", "not what was announced")
        self.hub.blobs[self.oid] = self.body

    def verify(self):
        if len(self.hub.blobs.get(self.oid, b"")) != self.asked["size"]:
            raise Refusal(404, "", "not what was announced")

    def commit(self):
        branch, parent, files, about = self.rev, self.repo.sha(self.rev), dict(self.files), {}
        for line in self.body.splitlines():
            about |= self.change(files, parent, **json.loads(line))
        answer = {"success": True}
        if self.query.get("create_pr"):
            number = 1 + sum(ref.startswith("refs/pr/") for ref in self.repo.refs)
            branch, answer["pullRequestUrl"] = f"refs/pr/{number}", f"{self.url}/discussions/{number}"
        elif branch not in self.repo.refs.keys() - self.repo.tags:
            raise Refusal(400, "", f"{branch} is no branch")
        sha = self.repo.commit(branch, files, parent, **about)
        return answer | {"commitUrl": f"{self.url}/commit/{sha}", "commitOid": sha}

    def change(self, files: dict[str, bytes], parent: str, key: str, value: dict) -> dict[str, str]:
        """One line of a commit, done to `files`; returns what it says about the commit."""
        path = value.get("path")
        if key == "header":
            if value.get("parentCommit", parent) != parent:
                raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
            return {"title": value["summary"], "message": value["description"]}
        if key == "file":
            files[path] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            if value["oid"] not in self.hub.blobs:
                raise Refusal(400, "", f"the LFS file of {path} was not uploaded")
            files[path] = self.hub.blobs[value["oid"]]
        else:  # deletedFile or deletedFolder
            gone = {path} & files.keys() if key == "deletedFile" else {name for name in files if is_in(path, name)}
            if not gone:
                raise Refusal(404, "EntryNotFound", f"{path} does not exist")
            for name in gone:
                del files[name]
        return {}

    def branch(self):
        self.point(self.rev, self.asked.get("startingPoint", "main"))

    def tag(self):
        self.point(self.asked["tag"], self.rev)
        self.repo.tags.add(self.asked["tag"])

    def point(self, ref: str, rev: str):
        if ref in self.repo.refs:
            raise Refusal(409, "", f"Reference {ref} already exists")
        self.repo.refs[ref] = self.repo.sha(rev)

    def delete_branch(self):
        self.drop(self.repo.refs.keys() - self.repo.tags - {"main"})

    def delete_tag(self):
        self.drop(self.repo.tags)
        self.repo.tags.remove(self.rev)

    def drop(self, refs: set[str]):
        if self.rev not in refs:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {self.rev}")
        del self.repo.refs[self.rev]

    def info(self):
        said = self.repo.history[self.repo.sha(self.rev)]
        siblings = [{"rfilename": path} for path in self.files]
        if self.query.get("blobs"):
            siblings = [entry(path, content) | {"rfilename": path} for path, content in self.files.items()]
        try:
            card = metadata(self.files.get("README.md", b"").decode())
        except ValueError:
            card = {}
        tags = (card.get("tags") or []) + ([f"license:{card['license']}"] if "license" in card else [])
        about = {"id": self.name, "author": self.name.split("/")[0], "sha": said["id"], "lastModified": said["date"]}
        about |= {"private": self.repo.private, "gated": self.repo.gated, "tags": tags, "cardData": card}
        about |= {key: card[key] for key in ("library_name", "pipeline_tag") if key in card}
        if self.kind == "spaces":
            about |= {"sdk": self.repo.sdk, "runtime": {"stage": "RUNNING"}}
        return about | {"siblings": siblings}

    def refs(self):
        kinds = {"branches": [], "tags": [], "pullRequests": [], "converts": []}
        for name, sha in self.repo.refs.items():
            kind, ref = ("tags", "refs/tags/") if name in self.repo.tags else ("branches", "refs/heads/")
            if name.startswith("refs/pr/"):
                kind, ref = "pullRequests", ""
            kinds[kind].append({"name": name.removeprefix("refs/pr/"), "ref": ref + name, "targetCommit": sha})
        return kinds

    def commits(self):
        sha, listed = self.repo.sha(self.rev), []
        while sha:
            listed.append(self.repo.history[sha])
            sha = listed[-1]["parent"]
        return listed

    def tree(self):
        found = listing(self.files)
        names = [name for name in found if not self.path or is_in(self.path, name)]
        if self.path and not names:
            raise Refusal(404, "EntryNotFound", f"{self.path} does not exist on {self.rev}")
        if self.query.get("recursive", "").lower() not in ("true", "1"):
            names = [name for name in names if str(PurePosixPath(name).parent) == (self.path or ".")]
        return [entry(name, found[name]) for name in names]

    def paths(self):
        found, asked = listing(self.files), parse_qs(self.body.decode()).get("paths", [])
        return [entry(name, found[name]) for name in asked if name in found]

    def resolve(self):
        sha, content = self.repo.sha(self.rev), self.files.get(self.path)
        known = {"X-Repo-Commit": sha}
        if content is None:
            raise Refusal(404, "EntryNotFound", f"{self.path} does not exist on {self.rev}", known)
        if not is_lfs(self.path, len(content)):
            return self.content(self.path, content, known)
        known |= {"X-Linked-Etag": f'"{etag(self.path, content)}"', "X-Linked-Size": str(len(content))}
        there = f"{self.hub.storage}/cdn/{self.kind}/{self.name}/{sha}/{quote(self.path)}"
        return Response("", 302, known | {"Location": there})

    def cdn(self):
        return self.content(self.path, self.files[self.path], {})

    def content(self, path: str, content: bytes, headers: dict[str, str]) -> Response:
        """All of it, or the range that is asked for."""
        headers = headers | {"ETag": f'"{etag(path, content)}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return Response(content, 200, headers)
        start, end = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if start > end:
            return Response("", 416, headers | {"Content-Range": f"bytes */{len(content)}"})
        return Response(
            content[start : end + 1], 206, headers | {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
        )


def is_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(".safetensors") or size > 10e6)


def is_in(folder: str, path: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")


def listing(files: dict[str, bytes]) -> dict[str, bytes | None]:
    """Files, and the folders they are in (None), by name."""
    return {str(folder): None for path in files for folder in PurePosixPath(path).parents if folder.name} | files


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def etag(path: str, content: bytes) -> str:
    """What the client compares files by."""
    return hashlib.sha256(content).hexdigest() if is_lfs(path, len(content)) else git_oid(content)


def entry(path: str, content: bytes | None) -> dict:
    """What listings say of a file or (None) of a folder, with the names that any of them has for it."""
    if content is None:
        return {"type": "directory", "path": path, "size": 0, "oid": git_oid(path.encode())}
    sha256, size = etag(path, content), len(content)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    lfs = {"oid": sha256, "sha256": sha256, "size": size, "pointerSize": len(pointer)}
    lfs = {"lfs": lfs} if is_lfs(path, size) else {}
    oid = git_oid(pointer if lfs else content)
    return {"type": "file", "path": path, "size": size, "oid": oid, "blobId": oid} | lfs


def metadata(card: str) -> dict:
    """The front matter of a README.md, {} if there is none; ValueError where it cannot be parsed."""
    block = REGEX_YAML_BLOCK.search(card)
    try:
        data = yaml.safe_load(block[2]) if block else None
    except yaml.YAMLError as error:
        raise ValueError(f"the metadata cannot be parsed: {error}") from error
    if not isinstance(data or {}, dict):
        raise ValueError("the metadata must be an object")
    return data or {}
