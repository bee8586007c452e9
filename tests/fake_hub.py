"""A stand-in for the Hub, on 127.0.0.1: it keeps repos and all their revisions in memory, and fails where told to.

    with FakeHub() as hub:
        api = HfApi(endpoint=hub.endpoint, token="any")
        hub.fail_at = "put"  # from now on the upload of an LFS file is cut off

It speaks what create_repo, create_branch, create_tag, create_commit, repo_info, snapshot_download and from_pretrained
ask for, for models, datasets and spaces. Not Xet: the client must run with HF_HUB_DISABLE_XET=1, see `environment`.
LFS files come from the same address as all others, where the Hub would send the client on to its storage.
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

INITIAL = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
KIND, REPO = r"(models|datasets|spaces)", r"([^/]+/[^/]+)"
API, FILES = f"/api/{KIND}/{REPO}", f"/(?:{KIND}/)?{REPO}"
ROUTES = {  # a name for `fail_at` and `seen`, which also is the method that answers: what is asked
    "create": "POST /api/repos/create",
    "validate": "POST /api/validate-yaml",
    "preupload": f"POST {API}/preupload/([^/]+)",
    "batch": rf"POST {FILES}\.git/info/lfs/objects/batch",
    "put": r"PUT /lfs/(\w+)",
    "verify": r"POST /lfs/(\w+)",
    "commit": f"POST {API}/commit/([^/]+)",
    "branch": f"POST {API}/branch/([^/]+)",
    "tag": f"POST {API}/tag/([^/]+)",
    "info": f"GET {API}(?:/revision/([^/]+))?",
    "tree": f"GET {API}/tree/([^/]+)(?:/(.+))?",
    "resolve": f"(?:GET|HEAD) {FILES}/resolve/([^/]+)/(.+)",
}
WRITES = ("create", "preupload", "batch", "commit", "branch", "tag")  # need a token


class Refusal(Exception):
    """An error of the Hub: HTTP status, the code that the client tells errors by, and text."""


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # sha: all files; the oldest first
    refs: dict[str, str] = field(default_factory=dict)  # of branches and tags

    def sha(self, revision: str) -> str:
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"no revision {revision}")
        return sha

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1(str(len(self.commits)).encode())  # a revert is a commit of its own
        for path, content in sorted(files.items()):
            digest.update(path.encode() + content)
        self.refs[branch] = sha = digest.hexdigest()
        self.commits[sha] = files
        return sha


class FakeHub:
    """Attributes: endpoint; fail_at: the name of a route (see ROUTES) at which, from now on, the connection drops
    before anything is done; seen: the names of all routes so far that were asked for."""

    def __init__(self):
        self.repos, self.blobs, self.seen, self.fail_at = {}, {}, [], None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "FakeHub":
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def repo(self, repo: str) -> Repo:
        """By user/name of a model, datasets/user/name, or spaces/user/name."""
        return self.repos[repo if repo.count("/") == 2 else f"models/{repo}"]

    def sha(self, repo: str, revision: str = "main") -> str:
        return self.repo(repo).sha(revision)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """All files of a revision, by name."""
        return dict(self.repo(repo).commits[self.sha(repo, revision)])

    def environment(self, home) -> dict[str, str]:
        """For a process that takes this for the Hub; `home` holds its cache and token."""
        changes = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_TOKEN": "hf_fake", "NO_PROXY": "127.0.0.1"}
        return os.environ | changes | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": f"{home}/hub"}


class Handler(BaseHTTPRequestHandler):
    """Answers one request; a method for each route, whose arguments are the route's groups."""

    def answer(self):
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        asked = f"{self.command} {url.path}"
        matches = {route: re.fullmatch(pattern, asked) for route, pattern in ROUTES.items()}
        route, match = next(((route, match) for route, match in matches.items() if match), (None, None))
        if route is None:
            return self.reply({"error": f"no route for {asked}"}, 404)
        self.hub.seen.append(route)
        if route == self.hub.fail_at:
            return  # no answer: the connection is closed
        try:
            if route in WRITES and not self.headers.get("Authorization"):
                raise Refusal(401, "RepoNotFound", "a token is needed")
            getattr(self, route)(*(unquote(group) if group else group for group in match.groups()))
        except Refusal as refusal:
            status, code, text = refusal.args
            self.reply({"error": text}, status, {"X-Error-Code": code, "X-Error-Message": text} | self.known)

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815 (the names are the library's)
    known = {}  # headers of every answer, errors too

    def reply(self, body, status: int = 200, headers: dict | None = None):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": len(content)} | (headers or {})).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass

    def repo(self, kind: str | None, name: str) -> Repo:
        repo = self.hub.repos.get(f"{kind or 'models'}/{name}")
        if repo is None or repo.private and not self.headers.get("Authorization"):
            raise Refusal(404, "RepoNotFound", f"no repo {name}")
        return repo

    def create(self):
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        kind = f"{asked.get('type') or 'model'}s"
        url = f"{self.hub.endpoint}/{'' if kind == 'models' else kind + '/'}{name}"
        if f"{kind}/{name}" in self.hub.repos:
            return self.reply({"error": "You already created this repo", "url": url}, 409)
        repo = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
        repo.commit("main", INITIAL)
        self.hub.repos[f"{kind}/{name}"] = repo
        self.reply({"url": url})

    def validate(self):
        self.reply({"errors": [], "warnings": []})

    def preupload(self, kind, name, revision):
        repo = self.repo(kind, name)
        files, answers = repo.commits[repo.sha(revision)], []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            mode = "lfs" if is_lfs(path, file["size"]) else "regular"
            old = {"oid": entry(path, files[path])["etag"]} if path in files else {}
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False} | old)
        self.reply({"files": answers})

    def batch(self, kind, name):
        self.repo(kind, name)
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.blobs:
                link = {"href": f"{self.hub.endpoint}/lfs/{item['oid']}"}
                item["actions"] = {"upload": link, "verify": link}
        self.reply({"transfer": "basic", "objects": objects})

    def put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.reply({"error": "not what was announced"}, 400)
        self.hub.blobs[oid] = self.body
        self.reply(b"")

    def verify(self, oid):
        self.reply({}, 200 if len(self.hub.blobs.get(oid, b"")) == json.loads(self.body)["size"] else 404)

    def commit(self, kind, name, branch):
        repo = self.repo(kind, name)
        parent = repo.sha(branch)
        files = dict(repo.commits[parent])
        for line in self.body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header" and value.get("parentCommit", parent) != parent:
                raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(branch, files)
        self.reply({"success": True, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{sha}", "commitOid": sha})

    def branch(self, kind, name, branch):
        self.point(kind, name, branch, json.loads(self.body or b"{}").get("startingPoint", "main"))

    def tag(self, kind, name, revision):
        self.point(kind, name, json.loads(self.body)["tag"], revision)

    def point(self, kind, name, new, revision):
        repo = self.repo(kind, name)
        if new in repo.refs:
            raise Refusal(409, "", f"{new} exists")
        repo.refs[new] = repo.sha(revision)
        self.reply({})

    def info(self, kind, name, revision):
        repo = self.repo(kind, name)
        sha = repo.sha(revision or "main")
        siblings = [{"rfilename": path} for path in repo.commits[sha]]
        self.reply({"id": name, "sha": sha, "private": repo.private, "tags": [], "siblings": siblings})

    def tree(self, kind, name, revision, folder):
        """Files alone, no folders."""
        repo = self.repo(kind, name)
        files, start = repo.commits[repo.sha(revision)], f"{folder}/" if folder else ""
        paths = [path for path in files if path.startswith(start)]
        if folder and not paths:
            raise Refusal(404, "EntryNotFound", f"no folder {folder}")
        if self.query.get("recursive", "").lower() not in ("true", "1"):
            paths = [path for path in paths if "/" not in path[len(start) :]]
        self.reply([entry(path, files[path]) for path in paths])

    def resolve(self, kind, name, revision, path):
        repo = self.repo(kind, name)
        sha = repo.sha(revision)
        self.known = {"X-Repo-Commit": sha}
        content = repo.commits[sha].get(path)
        if content is None:
            raise Refusal(404, "EntryNotFound", f"no file {path}")
        self.reply(content, 200, self.known | {"ETag": f'"{entry(path, content)["etag"]}"'})


def is_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(".safetensors") or size > 10e6)


def entry(path: str, content: bytes) -> dict:
    """What a listing says of a file; `etag` is what the client compares files by."""
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    found = {"type": "file", "path": path, "size": len(content), "oid": oid, "etag": oid}
    if is_lfs(path, len(content)):
        sha256 = hashlib.sha256(content).hexdigest()
        found |= {"etag": sha256, "lfs": {"oid": sha256, "size": len(content), "pointerSize": 130}}
    return found
