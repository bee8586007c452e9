"""`hub_cards.publish.push` and a stand-in for the Hub: one commit or none, the right files, and what it refuses."""

import errno
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
import transformers
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError

from hub_cards.publish import push, try_folder, upload
from hub_cards.publish.assemble import generate_code, model_code
from modeling_edlm.configuration_edlm import AUTO_MAP, CUSTOM_PIPELINES
from support.fake_hub import INITIAL, FakeHub
from support.fake_hub_answers import Repo
from support.toy import make_toy

ROOT = Path(__file__).parents[1]
REPO, BASE = "user/edlm-tiny", "user/edlm-base"
TOKEN = "hf_" + "s3cretS3cret" * 3
CARD = "---\nlicense: apache-2.0\ntags:\n- edlm\n---\n\n# Tiny\n"
ADAPTER_CARD = f"""---
library_name: peft
base_model: {BASE}
tags:
- base_model:adapter:{BASE}
- lora
---

# An adapter
"""
ADAPTER_FILES = {
    "README.md": ADAPTER_CARD,
    "adapter_config.json": json.dumps({"r": 4, "base_model_name_or_path": BASE}),
    "adapter_model.safetensors": "lora",
    "energy_config.json": json.dumps({"energy": {"energy_target": "xs"}, "base_model_name_or_path": BASE}),
}
SPACE_FILES = {
    "README.md": "---\ntitle: Tiny\nsdk: gradio\napp_file: app.py\n---\n",
    "app.py": "import gradio\n",
    "a.safetensors": "large",
    "b.safetensors": "larger",
    "empty.txt": "",
}
LEFTOVERS = ("checkpoint.safetensors", "metrics.jsonl", "model.safetensors.1.tmp", "tokens/a.npy", ".git/HEAD", ".env")
LEFTOVERS += ("__pycache__/a.pyc", "ar/checkpoint.safetensors", ".cache/huggingface/x.lock", "optimizer.pt")
LEFTOVERS += (
    "optimizer.safetensors",
    "checkpoint-50/model.safetensors",
    "random_states_0.pkl",
    "x/.env",
    "scheduler.pt",
)


def write(folder: Path, files: dict) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def as_bytes(files: dict) -> dict[str, bytes]:
    return {name: content.encode() for name, content in files.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def paths(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Of any kind: what is uploaded is not looked at."""
    return write(tmp_path / "space", SPACE_FILES)


@pytest.fixture
def model(tmp_path) -> Path:
    make_toy(length=8).save_pretrained(tmp_path / "model")
    return write(tmp_path / "model", {"README.md": CARD})


@pytest.fixture
def adapter(tmp_path) -> Path:
    return write(tmp_path / "adapter", ADAPTER_FILES)


# ---- one commit or none


def publish(hub: FakeHub, folder: Path, **options):
    return upload.upload(HfApi(endpoint=hub.endpoint, token="hf_fake"), paths(folder), REPO, **options)


def test_one_commit_with_these_files_and_no_others(hub, folder):
    done = publish(hub, folder)
    assert hub.files(REPO) == INITIAL | as_bytes(SPACE_FILES)
    assert hub.seen.count("commit") == 1 and done.oid == hub.sha(REPO) and done.oid in done.url
    # again: nothing to do
    assert publish(hub, folder).oid == done.oid and hub.seen.count("commit") == 1
    # what the folder no longer has goes, in the same commit; the old revision stays as it was
    (folder / "b.safetensors").rename(folder / "c.safetensors")
    write(folder, {"app.py": "import gradio  # new\n"})
    own = INITIAL | {".eval_results/a.yaml": b"the Hub's own"}
    hub.repo(REPO).commit("main", hub.files(REPO) | own)
    publish(hub, folder)
    assert hub.files(REPO) == own | contents(folder) and hub.seen.count("commit") == 2
    assert hub.files(REPO, done.oid) == INITIAL | as_bytes(SPACE_FILES)


FAULTS = {  # what fails, whether the push recovers by itself, else what the user reads, and seconds that are waited
    "info, bad token": ("info", {"status": 401, "text": "Invalid credentials"}, "Invalid credentials"),
    "commit, forbidden": ("commit", {"status": 403, "text": "Your token cannot write"}, "cannot write"),
    "preupload, repo gone": ("preupload", {"status": 404, "code": "RepoNotFound"}, "Repository Not Found"),
    "commit, conflict": ("commit", {"status": 409, "text": "another operation"}, "another operation"),
    "commit, stale": ("commit", {"status": 412, "text": "A commit has happened since"}, "A commit has happened since"),
    "commit, too many": ("commit", {"status": 429, "headers": {"Retry-After": "7"}, "times": 1}, None),
    "commit, far too many": ("commit", {"status": 429, "headers": {"Retry-After": "3600"}}, "429"),
    "create, busy": ("create", {"status": 503, "times": 2}, None),
    "info, busy": ("info", {"status": 503, "times": 1}, None),
    "commit, busy": ("commit", {"status": 503, "times": 3}, None),
    "commit, down": ("commit", {"status": 503}, "503"),
    "commit, dropped once": ("commit", {"times": 1}, None),
    "commit, dropped": ("commit", {}, "disconnected"),
    "commit, only the answer lost": ("commit", {"status": 503, "times": 1, "done": True}, None),
    "commit, only the answer dropped": ("commit", {"times": 1, "done": True}, None),
    "preupload, dropped": ("preupload", {}, "disconnected"),
    "batch, busy": ("batch", {"status": 503, "times": 1}, None),
    "second file, busy": ("put", {"status": 503, "after": 1, "times": 1}, None),
    "second file, down": ("put", {"status": 503, "after": 1}, "Error while uploading"),
    "second file, cut": ("put", {"cut": 3, "after": 1}, "Error while uploading"),
    "second file, cut once": ("put", {"cut": 3, "after": 1, "times": 1}, None),
    "verify, down": ("verify", {"status": 503}, "Error while uploading"),
    "download, busy": ("tree", {"status": 503, "times": 1}, None),
}
# The client takes this for a repo that is there already; it can do so only with HF_ENDPOINT, in a process of its own.
FORBIDDEN = ("create", {"status": 403, "text": "You have no rights to this namespace"}, None)


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_leaves_a_whole_revision(hub, folder, name):
    """The old one until the commit, the new one after it; a second push completes."""
    route, fault, message = FAULTS[name]
    old = publish(hub, folder).oid
    write(folder, {"a.safetensors": "new weights", "b.safetensors": "second", "app.py": "new"})
    hub.fail(route, **fault)
    if message is None:
        new = publish(hub, folder).oid
        assert hub.seen.count("commit") <= 6
    else:
        with pytest.raises(Exception, match=message) as error:
            publish(hub, folder)
        assert "hf_fake" not in str(error.value)
        assert hub.sha(REPO) == old and hub.files(REPO) == INITIAL | as_bytes(SPACE_FILES)
        hub.heal()
        new = publish(hub, folder).oid
    assert hub.sha(REPO) == new != old and hub.files(REPO) == INITIAL | contents(folder)
    assert list(hub.repo(REPO).commits)[-2:] == [old, new]  # once, even where only the answer was lost


def test_waiting_is_bounded_and_as_long_as_the_hub_asks(hub, folder, monkeypatch):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for fault, expected in (
        ({"status": 429, "headers": {"Retry-After": "7"}, "times": 2}, [7, 7]),
        ({"status": 429, "headers": {"ratelimit": '"api";r=0;t=55'}, "times": 1}, [55]),
        ({"status": 503, "times": 4}, [1, 2, 4, 8]),
        ({"status": 503}, [1, 2, 4, 8, 16]),
        ({"status": 429, "headers": {"Retry-After": "3600"}}, []),
        ({"status": 400}, []),
    ):
        waited.clear()
        write(folder, {"app.py": f"{fault}"})
        hub.fail("commit", **fault)
        try:
            publish(hub, folder)
        except Exception:
            assert "times" not in fault
        hub.heal()
        assert waited == expected


def test_a_first_push_that_breaks_off_shows_nothing(hub, folder):
    hub.fail("commit", 403)
    with pytest.raises(Exception, match="403"):
        publish(hub, folder)
    assert hub.files(REPO) == INITIAL
    hub.heal()
    publish(hub, folder)
    assert hub.files(REPO) == INITIAL | as_bytes(SPACE_FILES)


def test_two_pushes_do_not_mix(hub, folder, monkeypatch):
    """Nor does another's commit pass for ours, whose answer was lost."""
    publish(hub, folder)
    write(folder, {"a.safetensors": "mine"})
    create_commit = HfApi.create_commit

    def late(api, *args, **kwargs):
        if others:
            hub.repo(REPO).commit("main", {"a.safetensors": others.pop()})
        return create_commit(api, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", late)
    for fault in ({"after": 9}, {"status": 503, "times": 1}):
        others = [b"theirs"]
        hub.fail("commit", **fault)
        with pytest.raises(Exception, match="A commit has happened since"):
            publish(hub, folder)
        assert hub.files(REPO) == {"a.safetensors": b"theirs"} and not others
        hub.heal()


def test_what_came_back_is_compared(hub, folder, monkeypatch):
    verify = upload.verify

    def damaged(api, files, repo, kind, oid):
        hub.repo(REPO).commits[oid]["a.safetensors"] = b"lArge"
        verify(api, files, repo, kind, oid)

    monkeypatch.setattr(upload, "verify", damaged)
    with pytest.raises(RuntimeError, match="a.safetensors of user/edlm-tiny at .* is not the file that was sent"):
        publish(hub, folder)


def test_a_branch_a_tag_and_a_proposal(hub, folder):
    main = publish(hub, folder, tag="v1").oid
    write(folder, {"a.safetensors": "seed 2"})
    branch = publish(hub, folder, branch="seed-2").oid
    assert hub.sha(REPO) == hub.sha(REPO, "v1") == main and hub.sha(REPO, "seed-2") == branch
    assert hub.files(REPO, "seed-2") == INITIAL | contents(folder)
    with pytest.raises(ValueError, match="--tag v1 exists in user/edlm-tiny and has other files: a.safetensors"):
        publish(hub, folder, tag="v1")
    proposed = publish(hub, folder, create_pr=True)
    assert hub.sha(REPO) == main and proposed.pr_url.endswith(f"{REPO}/discussions/1")
    assert hub.files(REPO, "refs/pr/1") == INITIAL | contents(folder) and hub.sha(REPO, "refs/pr/1") == proposed.oid
    # the tag alone failed: the same command makes it
    hub.fail("tag", 503)
    with pytest.raises(Exception, match="503"):
        publish(hub, folder, tag="v2")
    hub.heal()
    assert publish(hub, folder, tag="v2").oid == hub.sha(REPO, "v2") == publish(hub, folder, tag="v2").oid


def test_private_is_private(hub, folder):
    publish(hub, folder, private=True)
    with pytest.raises(RepositoryNotFoundError):
        HfApi(endpoint=hub.endpoint, token=False).repo_info(REPO)
    publish(hub, folder, private=True)
    hub.repo(REPO).private = False
    sha = hub.sha(REPO)
    write(folder, {"a.safetensors": "a secret"})
    with pytest.raises(ValueError, match=f"--private, but --repo {REPO} exists and is public"):
        publish(hub, folder, private=True)
    assert hub.sha(REPO) == sha


# ---- what is published


def stage(folder: Path, target: Path, repo_type="model", base=None) -> tuple[dict[str, bytes], str]:
    files, kind = push.stage(folder, target / folder.name, REPO, repo_type, base)
    assert files == paths(target / folder.name)
    return contents(target / folder.name), kind


def test_a_model_gets_its_code(model, tmp_path):
    """Whatever copies lie beside it; and nothing that is not for the world."""
    write(model, dict.fromkeys(LEFTOVERS, "not for the world") | {"stale.py": "", "custom_generate/stale.py": ""})
    config = json.loads((model / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "someone/else--modeling_edlm.EDLMModel"}, "custom_pipelines": {}}
    write(model, {"config.json": json.dumps(config)})
    before = contents(model)
    files, kind = stage(model, tmp_path / "staged")
    assert contents(model) == before and kind == "model"
    code = model_code() | {f"custom_generate/{name}": content for name, content in generate_code().items()}
    own = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert files.keys() == code.keys() | own and all(files[name] == content for name, content in code.items())
    config = json.loads(files["config.json"])
    assert config["auto_map"] == AUTO_MAP and config["custom_pipelines"] == CUSTOM_PIPELINES


@pytest.mark.parametrize("local", ["/home/me/runs/base", "runs/energy/model", "adapter/here", "base", "./base", None])
def test_the_base_of_an_adapter_is_named_for_others(adapter, tmp_path, monkeypatch, local):
    monkeypatch.chdir(adapter.parent)
    (adapter / "here").mkdir()  # adapter/here has the form of a repo's name
    for name in ("adapter_config.json", "energy_config.json"):
        config = json.loads((adapter / name).read_text())
        write(adapter, {name: json.dumps(config | {"base_model_name_or_path": local})})
    write(adapter, {"README.md": ADAPTER_CARD.replace(BASE, str(local))})
    before = contents(adapter)
    with pytest.raises(ValueError, match=rf"adapter_config.json has base_model_name_or_path {local!r}.*--base USER/"):
        stage(adapter, tmp_path / "refused")
    files, kind = stage(adapter, tmp_path / "staged", base=BASE)
    assert kind == "adapter" and files.keys() == ADAPTER_FILES.keys() and files["README.md"].decode() == ADAPTER_CARD
    for name in ("adapter_config.json", "energy_config.json"):
        assert json.loads(files[name]) == json.loads(ADAPTER_FILES[name])
    assert contents(adapter) == before


@pytest.mark.parametrize("name", sorted(ADAPTER_FILES.keys() - {"adapter_model.safetensors"}))
def test_every_place_that_names_the_base_counts(adapter, tmp_path, name):
    write(adapter, {name: ADAPTER_FILES[name].replace(BASE, "/home/me/base")})
    with pytest.raises(ValueError, match=f"{name} has base_model.* '/home/me/base', which is no Hub repo"):
        stage(adapter, tmp_path / "staged")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.safetensors": None}, "no weights"),
        ({"model.safetensors": None, "checkpoint.safetensors": "of training"}, "no weights"),
        ({"config.json": None}, "no config.json or adapter_config.json"),
        ({"generation_config.json": None}, "no generation_config.json in it"),
        ({"config.json": '{"model_type": "bert"}'}, "not of an EDLM: model_type is 'bert'"),
        *(({name: "x"}, f"{name}: pickled") for name in ("a.bin", "b.pt", "ar/c.pth", "d.ckpt", "e.pkl", "F.PT")),
        ({"config.json": "{"}, "config.json cannot be parsed"),
        ({"notes.txt": f"my token is {TOKEN}"}, "notes.txt holds an access token"),
        ({"notes.txt": "my token is hf_fake"}, "notes.txt holds an access token"),
    ],
)
def test_mistakes_are_refused_by_name(model, tmp_path, monkeypatch, changes, message):
    monkeypatch.setenv("HF_TOKEN", "hf_fake")
    for name in (name for name, content in changes.items() if content is None):
        (model / name).unlink()
    write(model, {name: content for name, content in changes.items() if content is not None})
    with pytest.raises(ValueError, match=message):
        stage(model, tmp_path / "staged")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"README.md": None}, "no README.md"),
        ({"README.md": "---\ntags: [edlm\n---\n"}, "front matter of README.md cannot be parsed"),
        ({"README.md": "---\n- edlm\n---\n"}, "front matter of README.md cannot be parsed"),
        ({"README.md": "---\ntags: edlm\n# Tiny\n"}, "front matter of README.md cannot be parsed"),
        ({"README.md": CARD}, "must name sdk: gradio and as app_file"),
        ({"app.py": None}, "must name sdk: gradio and as app_file"),
        ({"app.py": "def f(:"}, "app.py cannot be compiled"),
        (dict.fromkeys(SPACE_FILES), "nothing to publish"),
    ],
)
def test_mistakes_of_a_space_are_refused_by_name(folder, tmp_path, changes, message):
    for name in (name for name, content in changes.items() if content is None):
        (folder / name).unlink()
    write(folder, {name: content for name, content in changes.items() if content is not None})
    with pytest.raises(ValueError, match=message):
        stage(folder, tmp_path / "staged", "space")


def test_nothing_from_outside_the_folder(folder, tmp_path):
    secret = write(tmp_path, {"secret.txt": "mine"}) / "secret.txt"
    (folder / "inside.txt").symlink_to(folder / "app.py")
    assert stage(folder, tmp_path / "staged", "space")[0]["inside.txt"] == b"import gradio\n"
    for target in (secret, tmp_path):
        (folder / "link").symlink_to(target)
        with pytest.raises(ValueError, match="link is a link to something outside of it"):
            stage(folder, tmp_path / "refused", "space")
        (folder / "link").unlink()


def test_a_metric_and_rows(tmp_path):
    metric = ROOT / "hub_cards" / "metrics" / "token_entropy"
    files, kind = stage(metric, tmp_path / "staged", "space")
    assert kind == "metric" and files["metrics.py"] == (ROOT / "training" / "common" / "metrics.py").read_bytes()
    rows = write(tmp_path / "rows", {"README.md": CARD, "train.jsonl": '{"text": "a"}\n'})
    assert stage(rows, tmp_path / "staged", "dataset")[1] == "dataset"
    (rows / "train.jsonl").unlink()
    with pytest.raises(ValueError, match="no rows"):
        stage(rows, tmp_path / "refused", "dataset")


# ---- the command


@pytest.fixture
def run(hub, tmp_path):
    """The real client in a process of its own, that does not wait between attempts. No token is in what it writes."""
    write(tmp_path / "site", {"sitecustomize.py": "import time\ntime.sleep = lambda seconds: None\n"})
    hub.tokens[TOKEN] = "write"
    environment = hub.environment(tmp_path / "home") | {"HF_TOKEN": TOKEN, "PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}"}

    def run(*arguments, **changes):
        command = [sys.executable, "-m", "hub_cards.publish.push", *map(str, arguments)]
        options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "cwd": tmp_path}
        return subprocess.run(command, env=environment | changes, **options)

    return run


def test_a_command_without_models_needs_no_torch():
    """It takes seconds to import: a wrong argument of a push, or a card, is not to wait for it."""
    names = "{'torch', 'transformers'} & sys.modules.keys()"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, hub_cards.publish.push; sys.exit(bool({names}))"], cwd=ROOT
    )
    assert done.returncode == 0


def test_a_dry_run_asks_no_hub(hub, run, folder):
    done = run("--folder", folder, "--repo", REPO, "--space", "--dry-run")
    assert done.returncode == 0 and done.stdout.endswith("nothing was uploaded\n"), done.stderr
    assert "0.0 KiB  a.safetensors" in done.stdout and f"KiB  in {len(SPACE_FILES)} files" in done.stdout
    assert not hub.log


def test_the_command_publishes_what_it_has_tried(hub, run, model):
    done = run("--folder", model, "--repo", REPO, "--private", "--tag", "v1")
    assert done.returncode == 0, done.stderr
    assert "as others would use it: generated [" in done.stdout
    assert f"published: {hub.endpoint}/{REPO}/commit/{hub.sha(REPO)}" in done.stdout
    assert f'AutoModel.from_pretrained("{REPO}", revision="{hub.sha(REPO)}", trust_remote' in done.stdout
    assert hub.repo(REPO).private and hub.sha(REPO, "v1") == hub.sha(REPO)
    write(model, {"model.safetensors": "not weights"})
    before = hub.sha(REPO)
    done = run("--folder", model, "--repo", REPO)
    assert done.returncode == 2 and "it cannot be used as it would be published" in done.stderr
    assert hub.sha(REPO) == before


IN_A_PROCESS = (
    "create, forbidden",
    "info, bad token",
    "commit, far too many",
    "commit, down",
    "second file, cut",
    "second file, busy",
)


@pytest.mark.parametrize("name", IN_A_PROCESS)
def test_the_command_and_faults(hub, run, folder, tmp_path, name):
    """Old files in any case, no traceback, no token anywhere; and the same command completes."""
    route, fault, message = (FAULTS | {"create, forbidden": FORBIDDEN})[name]
    command = ("--folder", folder, "--repo", REPO, "--space")
    assert run(*command).returncode == 0 and hub.repos[f"spaces/{REPO}"].sdk == "gradio"
    old = hub.files(f"spaces/{REPO}")
    write(folder, {"a.safetensors": "new", "b.safetensors": "second"})
    hub.fail(route, **fault)
    done = run(*command)
    written = done.stdout + done.stderr
    if message is not None:
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
        assert re.search(rf"; {REPO} (still )?holds its old revision whole.*again\.\n$", done.stderr)
        assert hub.files(f"spaces/{REPO}") == old
        hub.heal()
        done = run(*command)
        written += done.stdout + done.stderr
    assert done.returncode == 0 and hub.files(f"spaces/{REPO}") == INITIAL | contents(folder)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    everything = [written.encode(), *(path.read_bytes() for path in files), *hub.files(f"spaces/{REPO}").values()]
    assert not [text for text in everything if TOKEN.encode() in text]


def test_tokens_that_do_not_suffice(hub, run, folder):
    hub.tokens["hf_reader"] = "read"
    for token, message in (("hf_nobody", "Invalid"), ("hf_reader", "may only read")):
        done = run("--folder", folder, "--repo", REPO, "--space", HF_TOKEN=token)
        assert done.returncode == 1 and message in done.stderr and token not in done.stdout + done.stderr
    assert not hub.repos


def test_wrong_arguments_are_refused_by_name(folder, monkeypatch, capsys):
    """No network is asked: a refusal comes before."""
    monkeypatch.setattr(push, "HfApi", None)
    for message, *arguments in (
        ("--folder nowhere: there is no such", "--folder", "nowhere", "--repo", REPO),
        ("--repo edlm: must", "--folder", folder, "--repo", "edlm"),
        ("--base ./me/x: must", "--folder", folder, "--repo", REPO, "--base", "./me/x"),
        ("--tag v1: is for", "--folder", folder, "--repo", REPO, "--tag", "v1", "--create-pr"),
        ("not allowed with", "--folder", folder, "--repo", REPO, "--space", "--dataset"),
    ):
        with pytest.raises(SystemExit) as stopped:
            push.main([str(argument) for argument in arguments])
        assert stopped.value.code == 2 and re.search(message, capsys.readouterr().err)


def test_how_to_load():
    def line(kind, *base):
        return push.how_to_load(kind, REPO, "abc", *base)

    assert line("model") == f'AutoModel.from_pretrained("{REPO}", revision="abc", trust_remote_code=True)'
    assert line("causal").startswith("AutoModelForCausalLM.from_pretrained(")
    pinned = f'("{BASE}", revision="def", trust_remote_code=True).load_energy("{REPO}", revision="abc")'
    assert line("adapter", BASE, "def") == "AutoModel.from_pretrained" + pinned
    assert 'repo_type="space"' in line("space") and line("dataset").startswith("datasets.load_dataset(")


# ---- what the command says


@pytest.fixture
def command(hub, monkeypatch, capsys):
    """The command in this process: its exit status, and what it writes."""
    monkeypatch.setattr(push, "try_it", lambda target, kind, base_oid=None: "it works")
    monkeypatch.setattr(push.gc, "collect", lambda: None)  # slow where torch is loaded

    def run(*arguments, endpoint=hub.endpoint, token="hf_fake"):
        monkeypatch.setattr(push, "HfApi", partial(HfApi, endpoint=endpoint, token=token))
        try:
            push.main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def rows(tmp_path):
    """The arguments that publish a data set, which is staged at once."""
    folder = write(tmp_path / "rows", {"README.md": CARD, "train.jsonl": '{"text": "a"}\n'})
    return "--folder", folder, "--repo", REPO, "--dataset"


def test_a_push_that_changes_nothing_says_so(hub, command, rows):
    """Also where it would propose something: then there is no pull request."""
    name = f"datasets/{REPO}"
    assert f"published: {hub.endpoint}/{name}/commit/" in command(*rows)[1]
    sha, page = hub.sha(name), f"{hub.endpoint}/{name}/commit/{hub.sha(name)}\n"
    same = f"nothing changes, as main of {REPO} has these very files"
    assert f"\n{same}: {page}" in command(*rows)[1]
    code, out, _ = command(*rows, "--create-pr")
    assert code == 0 and f"\n{same}, so nothing was proposed: {page}" in out
    assert list(hub.repo(name).refs) == ["main"] and hub.sha(name) == sha and hub.seen.count("commit") == 1
    write(rows[1], {"train.jsonl": '{"text": "b"}\n'})
    assert f"\nproposed: {hub.endpoint}/{name}/discussions/1\n" in command(*rows, "--create-pr")[1]


WHOLE, MAYBE = (f"; {REPO} {kept} its old revision whole" for kept in ("still holds", "holds"))
MAYBE += ", or the new one if only the answer to the commit was lost"
LOGIN, AGAIN = "log in with `hf auth login` or set HF_TOKEN", ", then give the same command again."
RIGHTS = "take a token that may write there (https://huggingface.co/settings/tokens)"
BUSY = f"The Hub has trouble of its own ({{}}){MAYBE}; wait some minutes (https://status.huggingface.co){AGAIN}"
LATER = {"Retry-After": "3600"}
ENDINGS = {
    400: f"The push did not finish (400){WHOLE}; see to what is said above{AGAIN}",
    401: f"The Hub needs a valid token and got none (401){WHOLE}; {LOGIN}{AGAIN}",
    403: f"The token does not permit this (403){WHOLE}; {RIGHTS}{AGAIN}",
    404: f"The Hub has no such repo or branch, or hides it from this token (404){WHOLE}; check the names, and {LOGIN}"
    + AGAIN,
    409: f"Another change of the repo is under way (409){WHOLE}; wait until it is done{AGAIN}",
    412: f"Another commit came first (412){WHOLE}; look at what it changed{AGAIN}",
    413: f"A file or the commit is too large for the Hub (413){WHOLE}; make it smaller (save_pretrained has "
    f"max_shard_size){AGAIN}",
    429: f"The Hub takes no more requests for now (429){WHOLE}; wait for as long as it asks{AGAIN}",
    500: BUSY.format(500),
    503: BUSY.format(503),
}


@pytest.mark.parametrize("status", ENDINGS)
def test_how_a_refused_push_ends(hub, command, rows, status):
    """What the Hub says, and one sentence: what happened, what is there now, and what to do."""
    command(*rows)
    old = hub.files(f"datasets/{REPO}")
    write(rows[1], {"train.jsonl": '{"text": "b"}\n'})
    hub.fail("commit", status, text="in the words of the Hub", headers=LATER if status == 429 else None)
    code, _, said = command(*rows)
    assert code == 1 and said.endswith(f"\n{ENDINGS[status]}\n") and "in the words of the Hub" in said
    assert hub.files(f"datasets/{REPO}") == old


def test_how_a_push_ends_whose_connection_is_lost(hub, command, rows):
    """One line, whichever route it is, behind those of the attempts."""
    for route in ("commit", "preupload"):
        hub.fail(route)
        code, _, said = command(*rows)
        *attempts, last = said.splitlines()
        assert code == 1 and all("; again in " in line for line in attempts) and len(attempts) == upload.ATTEMPTS - 1
        assert last.startswith("The connection to the Hub was lost (RemoteProtocolError: ")
        assert last.endswith(f"){MAYBE}; check the network{AGAIN}")
        hub.heal()


def test_how_a_push_ends_whose_commit_was_made(hub, command, rows):
    hub.fail("tag", 403)
    code, _, said = command(*rows, "--tag", "v1")
    page = f"{hub.endpoint}/datasets/{REPO}/commit/{hub.sha(f'datasets/{REPO}')}"
    happened = "The token does not permit this (403); the new revision is in place"
    assert code == 1 and said.endswith(f"\n{happened}: {page}; {RIGHTS}{AGAIN}\n")
    hub.heal()
    assert command(*rows, "--tag", "v1")[0] == 0 and hub.sha(f"datasets/{REPO}", "v1") == page[-40:]


def test_arguments_that_do_not_go_with_what_is_there(hub, command, rows):
    command(*rows, "--tag", "v1")
    write(rows[1], {"train.jsonl": '{"text": "b"}\n'})
    for arguments, message in ((["--private"], "--private, but --repo"), (["--tag", "v1"], "--tag v1 exists in")):
        code, _, said = command(*rows, *arguments)
        assert code == 2 and f"error: {message}" in said and "again" not in said
    assert hub.seen.count("commit") == 1


NOTHING = f"; nothing was uploaded, and {REPO} still holds its old revision whole; "


def test_without_a_network_a_push_ends_at_once(hub, command, rows, monkeypatch):
    """With one line, and without a second attempt."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    code, out, said = command(*rows, endpoint="http://127.0.0.1:9")
    assert code == 1 and out == "" and said.count("\n") == 1
    assert re.fullmatch(r"The Hub cannot be reached \(ConnectError: .*\)" + re.escape(NOTHING) + ".*\n", said)
    assert said.endswith(f"; check the network, the proxy and HF_ENDPOINT{AGAIN}\n")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    happened = "The Hub was not asked, as HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"
    assert command(*rows) == (1, "", f"{happened}{NOTHING}unset it{AGAIN}\n")
    with pytest.raises(ConnectionError):
        publish(hub, rows[1])
    assert not waited and not hub.log


def test_the_token_is_checked_first(hub, command, rows, monkeypatch):
    """Before the copy and the minute that a model is tried in, and without a change of anything."""
    hub.tokens |= {"hf_reader": "read"}
    for name in ("user/there", "other/there"):
        hub.repos[f"datasets/{name}"] = Repo()
        hub.repo(f"datasets/{name}").commit("main", INITIAL)
    for name in ("stage", "try_it"):
        monkeypatch.setattr(push, name, lambda *args: pytest.fail("the token comes first"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "nowhere")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for token, repo, happened in (
        (None, REPO, "The Hub needs a valid token and got none"),
        ("hf_nobody", REPO, "The Hub needs a valid token and got none (401)"),
        ("hf_reader", REPO, "The token does not permit this (that of user may only read)"),
        ("hf_reader", "user/there", "The token does not permit this (that of user may only read)"),
        ("hf_fake", "other/new", "The token does not permit this (user is no member of other)"),
        ("hf_fake", "other/there", "The token does not permit this (403)"),
    ):
        code, out, said = command(*rows[:3], repo, *rows[4:], token=token)
        kept = f"{happened}; nothing was uploaded, and {repo} still holds its old revision whole; "
        assert code == 1 and out == "" and said.splitlines()[-1].startswith(kept) and "hf_" not in said
    assert not {"create", "commit", "preupload"} & set(hub.seen)


def test_a_proposal_needs_no_right_to_write(hub, command, rows):
    hub.repos["datasets/other/there"] = Repo()
    hub.repo("datasets/other/there").commit("main", INITIAL)
    code, out, _ = command(*rows[:3], "other/there", *rows[4:], "--create-pr")
    assert code == 0 and f"proposed: {hub.endpoint}/datasets/other/there/discussions/1\n" in out


@pytest.mark.parametrize("base", [BASE, f"[{BASE}]"])
def test_the_base_of_an_adapter_is_pinned(hub, command, adapter, monkeypatch, base):
    """To the revision that the adapter was tried with."""
    hub.repos[f"models/{BASE}"] = Repo()
    sha = hub.repo(BASE).commit("main", INITIAL)
    write(adapter, {"README.md": ADAPTER_CARD.replace(f"base_model: {BASE}", f"base_model: {base}")})
    tried = []
    monkeypatch.setattr(push, "try_it", lambda target, kind, base_oid: tried.append(base_oid))
    pinned = f'from_pretrained("{BASE}", revision="{sha}", trust_remote_code=True)'
    _, out, said = command("--folder", adapter, "--repo", REPO)
    assert f'{pinned}.load_energy("{REPO}", revision="{hub.sha(REPO)}")\n' in out, said
    assert tried == [sha]


def test_an_adapter_is_tried_with_this_revision_of_its_base(adapter, monkeypatch):
    started, loaded = [], []

    def start(command, **options):
        started.append(command)
        return subprocess.CompletedProcess(command, 0, "it works", "")

    class Loaded(Exception):
        pass

    def load(*args, **options):
        loaded.append((*args, options["revision"]))
        raise Loaded

    monkeypatch.setattr(subprocess, "run", start)
    assert push.try_it(adapter, "adapter", "abc") == "it works"
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", load)
    with pytest.raises(Loaded):
        try_folder.main(*map(str, started[0][3:]))
    assert loaded == [(BASE, "abc")]


NO_ROOM = OSError(errno.ENOSPC, "No space left on device", "/full/weights")
FULL = "The disk is full ({})", f"make room on it, or set TMPDIR to a folder on another{AGAIN}\n"
CTRL_C = "The push was stopped by Ctrl-C", "give the same command again.\n"


@pytest.mark.parametrize(("error", "code", "ending"), [(NO_ROOM, 1, FULL), (KeyboardInterrupt(), 130, CTRL_C)])
def test_a_full_disk_and_an_interrupt(hub, command, rows, tmp_path, monkeypatch, error, code, ending):
    """One line in each phase, that says what is there; nothing is left here; and the same command completes."""
    command(*rows)
    name = f"datasets/{REPO}"
    old = hub.files(name)
    write(rows[1], {"train.jsonl": '{"text": "b"}\n'})
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))

    def fail(*args, **options):
        raise error

    happened, todo = ending[0].format("/full/weights"), ending[1]
    for place, function, state in (
        (shutil, "copyfile", NOTHING),
        (push, "try_it", NOTHING),
        (HfApi, "create_commit", f"{MAYBE}; "),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(place, function, fail)
            assert command(*rows)[::2] == (code, f"{happened}{state}{todo}")
        assert hub.files(name) == old and not list((tmp_path / "tmp").iterdir())
    with monkeypatch.context() as patched:
        patched.setattr(upload, "verify", fail)
        there = f"{hub.endpoint}/{name}/commit/"
        broken, _, said = command(*rows)
    assert (broken, said) == (code, f"{happened}; the new revision is in place: {there}{hub.sha(name)}; {todo}")
    assert hub.files(name) == INITIAL | contents(rows[1])
    assert command(*rows)[0] == 0 and not list((tmp_path / "tmp").iterdir())


def test_a_disk_that_is_full_while_it_is_tried(adapter, monkeypatch):
    said = "Traceback (most recent call last):\nOSError: [Errno 28] No space left on device"
    monkeypatch.setattr(subprocess, "run", lambda command, **options: subprocess.CompletedProcess(command, 1, "", said))
    with pytest.raises(OSError, match="No space left") as error:
        push.try_it(adapter, "adapter")
    assert error.value.errno == errno.ENOSPC
