"""tests/support/fake_hub.py: to the real client it acts as the Hub does, and it fails as it is told to."""

import hashlib
import http.client
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from support.fake_hub import INITIAL, FakeHub

REPO, TOKEN = "user/tiny", "hf_fake"
CARD = b"---\nlicense: apache-2.0\npipeline_tag: text-generation\ntags:\n- edlm\n---\n\n# Tiny\n"
LFS = {"model.safetensors": bytes(range(256)) * 4096, "ar/model.safetensors": b"more weights"}
FILES = {"README.md": CARD, "config.json": b"{}", "code/a b.py": b"pass\n", "empty.txt": b""} | LFS


@pytest.fixture
def api(hub) -> HfApi:
    api = HfApi(endpoint=hub.endpoint, token=TOKEN)
    api.create_repo(REPO)
    return api


@pytest.fixture(autouse=True)
def no_traceback(caplog):
    yield
    records = caplog.get_records("call")
    assert [record.message for record in records if record.name.startswith(("uvicorn", "asyncio"))] == []


def commit(api: HfApi, files: dict[str, bytes], **options):
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    return api.create_commit(REPO, operations, commit_message="a title", commit_description="and more", **options)


def request(hub: FakeHub, method: str, path: str, body=None, **headers) -> tuple[int, bytes]:
    with closing(http.client.HTTPConnection(hub.endpoint.removeprefix("http://"))) as connection:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read()


def statuses(hub: FakeHub, method: str, start: str) -> list[int | None]:
    return [status for asked, path, status in hub.log if asked == method and path.startswith(start)]


def refusal(status: int, action, *args, error=HfHubHTTPError, **options) -> HfHubHTTPError:
    """Of exactly that class, which for the client says what is wrong."""
    with pytest.raises(error) as caught:
        action(*args, **options)
    assert type(caught.value) is error and caught.value.response.status_code == status
    return caught.value


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_repos_come_and_go(hub, api):
    assert api.repo_exists(REPO) and hub.files(REPO) == INITIAL
    assert refusal(409, api.create_repo, REPO).response.json()["url"] == f"{hub.endpoint}/{REPO}"
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    api.create_repo("tiny", repo_type="dataset")  # in the same namespace
    api.delete_repo(REPO)
    assert not api.repo_exists(REPO) and api.repo_exists(REPO, repo_type="dataset")
    refusal(404, api.delete_repo, REPO, error=RepositoryNotFoundError)
    api.create_repo(REPO, repo_type="space", space_sdk="gradio")
    assert api.space_info(REPO).sdk == hub.repo(f"spaces/{REPO}").sdk == "gradio"
    space = json.dumps({"name": "x", "type": "space"})  # the client would not ask for one without SDK
    assert request(hub, "POST", "/api/repos/create", space, Authorization=f"Bearer {TOKEN}")[0] == 400


@pytest.mark.parametrize("kind", ["model", "dataset", "space"])
def test_what_is_uploaded_comes_back(hub, tmp_path, kind):
    api = HfApi(endpoint=hub.endpoint, token=TOKEN)
    api.create_repo(REPO, repo_type=kind, space_sdk="gradio" if kind == "space" else None)
    made = commit(api, FILES, repo_type=kind)
    name = REPO if kind == "model" else f"{kind}s/{REPO}"
    assert made.oid == hub.sha(name) and made.repo_url.repo_id == REPO and hub.files(name) == INITIAL | FILES
    assert hub.blobs == {sha256(content): content for content in LFS.values()} and hub.seen.count("put") == len(LFS)
    there = Path(api.snapshot_download(REPO, repo_type=kind, cache_dir=tmp_path))
    assert {name: (there / name).read_bytes() for name in hub.files(name)} == INITIAL | FILES
    assert statuses(hub, "GET", "/cdn/") == [200, 200]  # which refuses a token: the client sent none
    # the same again uploads nothing, and is no commit
    assert commit(api, FILES, repo_type=kind).oid == made.oid
    assert hub.seen.count("put") == len(LFS) and hub.seen.count("commit") == 1


def test_where_a_file_lies(hub, api, tmp_path):
    sha = commit(api, FILES).oid
    found = {name: get_hf_file_metadata(hf_hub_url(REPO, name, endpoint=hub.endpoint)) for name in FILES}
    assert {name: (file.size, file.commit_hash) for name, file in found.items()} == {
        name: (len(content), sha) for name, content in FILES.items()
    }
    assert found["config.json"].etag == "9e26dfeeb6e641a33dae4961196235bdb965b21b"  # printf '{}' | git hash-object
    assert found["config.json"].location.startswith(hub.endpoint)
    file = found["model.safetensors"]
    assert file.etag == sha256(FILES["model.safetensors"]) and not file.location.startswith(hub.endpoint)
    path = file.location.removeprefix(hub.storage)
    assert request(hub, "GET", path, Range="bytes=10-12") == (206, b"\x0a\x0b\x0c")
    assert request(hub, "GET", path, Range=f"bytes={(1 << 20) - 3}-") == (206, b"\xfd\xfe\xff")
    assert request(hub, "GET", path, Range=f"bytes={1 << 20}-")[0] == 416
    assert request(hub, "GET", path, Authorization=f"Bearer {TOKEN}")[0] == 400
    missing = {"filename": "no.txt", "cache_dir": tmp_path}
    error = refusal(404, api.hf_hub_download, REPO, **missing, error=RemoteEntryNotFoundError)
    assert error.response.headers["X-Repo-Commit"] == sha


def test_listings(hub, api):
    commit(api, FILES)
    assert {file.path for file in api.list_repo_tree(REPO)} == {*INITIAL, *FILES, "code", "ar"} - {
        "code/a b.py",
        "ar/model.safetensors",
    }
    assert {file.path for file in api.list_repo_tree(REPO, recursive=True)} == {*INITIAL, *FILES, "code", "ar"}
    assert [file.path for file in api.list_repo_tree(REPO, "code")] == ["code/a b.py"]
    refusal(404, lambda: list(api.list_repo_tree(REPO, "cod")), error=RemoteEntryNotFoundError)
    file, folder = api.get_paths_info(REPO, ["ar/model.safetensors", "ar", "none"])
    assert (folder.path, file.size, file.lfs.sha256) == ("ar", 12, sha256(b"more weights"))
    info = api.model_info(REPO, files_metadata=True)
    assert (info.private, info.gated, info.pipeline_tag) == (False, False, "text-generation")
    assert (info.card_data.license, info.tags) == ("apache-2.0", ["edlm", "license:apache-2.0"])
    assert {file.rfilename: file.size for file in info.siblings} == {
        name: len(content) for name, content in hub.files(REPO).items()
    }
    lfs = {file.rfilename: file.lfs.sha256 for file in info.siblings if file.lfs}
    assert lfs == {name: sha256(content) for name, content in LFS.items()}
    commits = api.list_repo_commits(REPO)
    assert [(each.commit_id, each.title, each.message) for each in commits] == [
        (hub.sha(REPO), "a title", "and more"),
        (commits[1].commit_id, "initial commit", ""),
    ]


def test_a_commit_also_deletes(hub, api):
    first = commit(api, FILES).oid
    gone = [CommitOperationDelete("ar/"), CommitOperationDelete("config.json")]
    api.create_commit(REPO, gone, commit_message="less")
    assert hub.files(REPO).keys() == {*INITIAL, *FILES} - {"ar/model.safetensors", "config.json"}
    for path in ("config.json", "ar/"):
        gone = [CommitOperationAdd("new.txt", b"new"), CommitOperationDelete(path)]
        refusal(404, api.create_commit, REPO, gone, commit_message="nothing", error=RemoteEntryNotFoundError)
    assert "new.txt" not in hub.files(REPO)  # all of a commit or nothing
    assert commit(api, FILES).oid != first and hub.files(REPO) == hub.files(REPO, first)


def test_a_commit_that_the_hub_refuses(hub, api, monkeypatch):
    old = hub.sha(REPO)
    new = commit(api, {"a.txt": b"a"}, parent_commit=old).oid
    assert "A commit has happened since" in str(refusal(412, commit, api, {"b.txt": b"b"}, parent_commit=old))
    for card in (b"---\ntags: [edlm\n---\n", b"---\n- edlm\n---\n", b"---\nlicense: 3\n---\n"):
        with pytest.raises(ValueError, match="Invalid metadata in README.md"):
            commit(api, {"README.md": card})
    api.create_branch(REPO, branch="other")
    with pytest.warns(UserWarning, match="empty or missing"):
        commit(api, {"README.md": b"# Tiny"}, revision="other")
    refusal(404, commit, api, {"b.txt": b"b"}, revision="none", error=RevisionNotFoundError)
    api.create_tag(REPO, tag="v1")
    with pytest.raises(Exception, match="v1 is no branch"):
        commit(api, {"b.txt": b"b"}, revision="v1")
    monkeypatch.setattr(HfApi, "preupload_lfs_files", lambda *args, **options: None)
    with pytest.raises(Exception, match="model.safetensors was not uploaded"):
        operation = CommitOperationAdd("model.safetensors", b"weights")
        operation._upload_mode, operation._should_ignore = "lfs", False
        api.create_commit(REPO, [operation], commit_message="no weights")
    assert hub.sha(REPO) == new and hub.files(REPO) == INITIAL | {"a.txt": b"a"}


def test_a_pull_request_leaves_main_alone(hub, api, tmp_path):
    old = hub.sha(REPO)
    for number in (1, 2):
        made = commit(api, FILES, create_pr=True)
        assert (made.pr_num, made.pr_revision) == (number, f"refs/pr/{number}")
        assert made.pr_url == f"{hub.endpoint}/{REPO}/discussions/{number}"
    more = commit(api, {"more.txt": b"more"}, revision="refs/pr/1")
    assert hub.sha(REPO) == old and hub.files(REPO) == INITIAL
    assert hub.files(REPO, "refs/pr/1") == INITIAL | FILES | {"more.txt": b"more"}
    assert api.list_repo_commits(REPO, revision="refs/pr/1")[0].commit_id == more.oid
    there = api.hf_hub_download(REPO, "more.txt", revision="refs/pr/1", cache_dir=tmp_path)
    assert Path(there).read_bytes() == b"more"
    refs = api.list_repo_refs(REPO, include_pull_requests=True)
    assert [ref.ref for ref in refs.pull_requests] == ["refs/pr/1", "refs/pr/2"]
    assert [(ref.name, ref.target_commit) for ref in refs.branches] == [("main", old)]


def test_branches_and_tags(hub, api):
    first = hub.sha(REPO)
    second = commit(api, {"a.txt": b"a"}).oid
    api.create_branch(REPO, branch="seed/2", revision=first)
    api.create_tag(REPO, tag="v1", revision=first)
    refusal(409, api.create_branch, REPO, branch="seed/2")
    refusal(409, api.create_tag, REPO, tag="v1")
    api.create_branch(REPO, branch="seed/2", exist_ok=True)
    other = commit(api, {"b.txt": b"b"}, revision="seed/2").oid
    refs = api.list_repo_refs(REPO)
    assert {ref.ref: ref.target_commit for ref in refs.branches} == {
        "refs/heads/main": second,
        "refs/heads/seed/2": other,
    }
    assert {ref.ref: ref.target_commit for ref in refs.tags} == {"refs/tags/v1": first}
    assert api.repo_info(REPO, revision="v1").sha == first and hub.files(REPO, other) == INITIAL | {"b.txt": b"b"}
    for delete, name in ((api.delete_branch, {"branch": "v1"}), (api.delete_tag, {"tag": "seed/2"})):
        refusal(404, delete, REPO, **name, error=RevisionNotFoundError)
    api.delete_branch(REPO, branch="seed/2")
    api.delete_tag(REPO, tag="v1")
    for revision in ("seed/2", "v1", "0" * 40):
        refusal(404, api.repo_info, REPO, revision=revision, error=RevisionNotFoundError)


def test_who_may_do_what(hub, api, tmp_path):
    hub.tokens["hf_read"] = "read"
    reader, nobody, stranger = (HfApi(endpoint=hub.endpoint, token=token) for token in ("hf_read", False, "hf_unknown"))
    assert [each.whoami()["auth"]["accessToken"]["role"] for each in (api, reader)] == ["write", "read"]
    assert "Invalid user token" in str(refusal(401, stranger.whoami))
    assert "Invalid credentials in Authorization header" in str(refusal(401, stranger.repo_info, REPO))
    assert nobody.repo_info(REPO).sha == hub.sha(REPO)
    for action in (reader.create_repo, reader.delete_repo):
        assert "write token" in str(refusal(403, action, REPO))
    refusal(403, commit, reader, {"a.txt": b"a"})
    refusal(401, nobody.create_repo, REPO, error=RepositoryNotFoundError)
    refusal(401, commit, nobody, {"a.txt": b"a"}, error=RepositoryNotFoundError)
    api.update_repo_settings(REPO, private=True, gated="auto")
    assert hub.repo(REPO).private and reader.repo_info(REPO).private and reader.repo_info(REPO).gated == "auto"
    for repo in (REPO, "user/none"):
        refusal(401, nobody.repo_info, repo, error=RepositoryNotFoundError)
        refusal(401, nobody.hf_hub_download, repo, "a.txt", cache_dir=tmp_path, error=RepositoryNotFoundError)
    refusal(404, reader.repo_info, "user/none", error=RepositoryNotFoundError)
    api.create_repo("user/secret", private=True)
    assert hub.repo("user/secret").private and not nobody.repo_exists("user/secret")


def test_many_at_once(hub, api):
    weights = {f"{number}.safetensors": b"%d" % number * 100_000 for number in range(12)}
    commit(api, weights)  # the client uploads them in parallel
    assert hub.files(REPO) == INITIAL | weights
    names = {f"{number}.txt": b"%d" % number for number in range(12)}
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda name: commit(api, {name: names[name]}), names))
    assert hub.files(REPO) == INITIAL | weights | names and len(api.list_repo_commits(REPO)) == 14


def test_the_connection_drops(hub, api):
    hub.fail("info")
    with pytest.raises(Exception, match="disconnected"):
        api.repo_info(REPO)
    assert hub.log[-1] == ("GET", f"/api/models/{REPO}", None) and hub.seen[-1] == "info"
    hub.heal()
    assert api.repo_info(REPO).sha == hub.sha(REPO)


def test_an_error_with_headers_and_a_number_of_times(hub, api, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    hub.fail("preupload", 503, headers={"Retry-After": "7"}, times=2)
    hub.fail("info", 403, code="GatedRepo", text="ask first")
    commit(api, FILES)
    assert waits == [8, 8] and statuses(hub, "POST", f"/api/models/{REPO}/preupload") == [503, 503, 200]
    assert "ask first" in str(refusal(403, api.repo_info, REPO, error=GatedRepoError))


def test_an_error_after_some_requests(hub, api):
    hub.fail("put", 503, after=1)
    with pytest.raises(Exception, match="Error while uploading"):
        commit(api, FILES)
    put = statuses(hub, "PUT", "/lfs/")
    assert put.count(200) == len(hub.blobs) == 1 and set(put) == {200, 503} and hub.files(REPO) == INITIAL


@pytest.mark.parametrize(("status", "message"), [(503, "503"), (None, "disconnected")])
def test_done_but_the_answer_is_lost(hub, api, status, message):
    hub.fail("commit", status, done=True, times=1)
    with pytest.raises(Exception, match=message):
        commit(api, FILES)
    assert hub.log[-1][2] == status and hub.files(REPO) == INITIAL | FILES
    commit(api, {"new.txt": b"new"})  # an end to it
    hub.fail("commit", status)
    with pytest.raises(Exception, match=message):
        commit(api, {"newer.txt": b"newer"})
    assert hub.files(REPO) == INITIAL | FILES | {"new.txt": b"new"}


def test_an_upload_is_cut(hub, api):
    read, step = 0, b"x" * (1 << 20)

    def body():
        nonlocal read
        for _ in range(64):
            read += len(step)
            yield step

    hub.fail("put", cut=1 << 20, times=1)
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        request(hub, "PUT", "/lfs/0", body(), **{"Content-Length": str(64 << 20)})
    assert read < 64 << 20 and hub.blobs == {}
    hub.fail("put", cut=1000, times=1)
    commit(api, {"model.safetensors": LFS["model.safetensors"]})  # the client tries again
    assert statuses(hub, "PUT", "/lfs/") == [None, None, 200] and len(hub.blobs) == 1


def test_a_damaged_upload_is_refused(hub):
    oid = sha256(b"weights")
    assert request(hub, "PUT", f"/lfs/{oid}", b"weightz")[0] == 400 and hub.blobs == {}
    assert request(hub, "PUT", f"/lfs/{oid}", b"weights")[0] == 200
    for size, status in ((6, 404), (7, 200)):
        said = json.dumps({"oid": oid, "size": size})
        assert request(hub, "POST", f"/lfs/{oid}", said, Authorization=f"Bearer {TOKEN}")[0] == status


def test_a_download_is_cut_and_resumed(hub, api, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 100_000)  # what was read of one is lost
    commit(api, FILES)
    hub.fail("cdn", cut=300_000, times=1)
    there = api.hf_hub_download(REPO, "model.safetensors", cache_dir=tmp_path)
    assert Path(there).read_bytes() == FILES["model.safetensors"] and statuses(hub, "GET", "/cdn/") == [None, 206]


def test_what_cannot_fail(hub):
    with pytest.raises(ValueError, match="route 'upload' must be one of whoami, create, "):
        hub.fail("upload")
    with pytest.raises(ValueError, match="route 'commit' must be .*; for cut, "):
        hub.fail("commit", cut=3)
    assert request(hub, "GET", "/api/nothing")[0] == 404 and hub.log == [("GET", "/api/nothing", 404)]


def test_a_hanging_upload_does_not_hold_up_the_end():
    with FakeHub() as hub:
        client = socket.create_connection(("127.0.0.1", int(hub.endpoint.rpartition(":")[2])))
        client.sendall(b"PUT /lfs/0 HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 100")
    client.close()
    assert hub.log == [("PUT", "/lfs/0", None)] and hub.blobs == {}
