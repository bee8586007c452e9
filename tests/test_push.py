"""hub_cards/push.py against a stand-in for the Hub: one commit or none, the right files, and what it refuses."""

import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
from fake_hub import INITIAL, FakeHub
from huggingface_hub import HfApi

SCRIPT = Path(__file__).parents[1] / "hub_cards" / "push.py"
REPO, BASE = "user/edlm-tiny", "user/edlm-base"
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
MODEL_FILES = {
    "README.md": CARD,
    "config.json": json.dumps(
        {
            "architectures": ["EDLMModel"],
            "auto_map": {"AutoModel": "modeling_edlm.EDLMModel", "AutoModelForCausalLM": "modeling_edlm.Other"},
            "custom_pipelines": {"text-generation": {"impl": "pipeline_edlm.Pipe", "pt": ["AutoModel"]}},
        }
    ),
    "modeling_edlm.py": "pass\n",
    "pipeline_edlm.py": "pass\n",
    "custom_generate/generate.py": "pass\n",
    "model.safetensors": "weights",
    "ar/model.safetensors": "more weights",
    "empty.txt": "",
}
ADAPTER_FILES = {
    "README.md": ADAPTER_CARD,
    "adapter_config.json": json.dumps({"r": 4, "base_model_name_or_path": BASE}),
    "adapter_model.safetensors": "lora",
    "energy_config.json": json.dumps({"energy": {"energy_target": "xs"}, "base_model_name_or_path": BASE}),
}
LEFTOVERS = ("checkpoint.safetensors", "metrics.jsonl", "model.safetensors.1.tmp", "tokens/a.npy", ".git/HEAD", ".env")
LEFTOVERS += ("__pycache__/a.pyc", "ar/checkpoint.safetensors", ".cache/huggingface/x.lock")

spec = importlib.util.spec_from_file_location("push", SCRIPT)
push = importlib.util.module_from_spec(spec)
spec.loader.exec_module(push)


def write(folder: Path, files: dict) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def as_bytes(files: dict) -> dict[str, bytes]:
    return {name: content.encode() for name, content in files.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path) -> Path:
    return write(tmp_path / "model", MODEL_FILES)


@pytest.fixture
def adapter(tmp_path) -> Path:
    return write(tmp_path / "adapter", ADAPTER_FILES)


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits 23 seconds in all, between attempts
    with FakeHub() as hub:
        yield hub


def publish(hub: FakeHub, folder: Path, base=None, private=False, branch="main"):
    api = HfApi(endpoint=hub.endpoint, token="hf_fake")
    return push.push(api, push.prepare(folder, base), REPO, private, branch, "a message")


def test_one_commit_with_the_files_of_the_folder_and_no_others(hub, folder):
    write(folder, dict.fromkeys(LEFTOVERS, "not for the world"))
    commit = publish(hub, folder)
    assert hub.files(REPO) == INITIAL | as_bytes(MODEL_FILES)
    assert hub.seen.count("commit") == 1 and commit.oid == hub.sha(REPO) and commit.oid in commit.commit_url
    # again: nothing to do
    assert publish(hub, folder).oid == commit.oid and hub.seen.count("commit") == 1
    # what the folder no longer has goes, in the same commit; the old revision stays as it was
    (folder / "ar" / "model.safetensors").rename(folder / "model-2.safetensors")
    write(folder, {"modeling_edlm.py": "pass  # new\n"})
    own = INITIAL | {".eval_results/a.yaml": b"the Hub's own"}
    hub.repo(REPO).commit("main", hub.files(REPO) | own)
    publish(hub, folder)
    expected = as_bytes(MODEL_FILES) | {"modeling_edlm.py": b"pass  # new\n", "model-2.safetensors": b"more weights"}
    del expected["ar/model.safetensors"]
    assert hub.files(REPO) == own | expected and hub.seen.count("commit") == 2
    assert hub.files(REPO, commit.oid) == INITIAL | as_bytes(MODEL_FILES)


@pytest.mark.parametrize("route", ["preupload", "put", "verify", "commit"])
def test_a_push_that_breaks_off_leaves_the_old_revision_whole(hub, folder, route):
    old = publish(hub, folder).oid
    write(folder, {"model.safetensors": "new weights", "new.safetensors": "second", "config.json": "{}"})
    hub.fail_at = route
    with pytest.raises(Exception, match="disconnected|Error while uploading"):
        publish(hub, folder)
    assert hub.seen[-1] == route
    assert hub.sha(REPO) == old and hub.files(REPO) == INITIAL | as_bytes(MODEL_FILES)
    hub.fail_at = None
    new = publish(hub, folder).oid
    assert hub.sha(REPO) == new != old and hub.files(REPO) == INITIAL | contents(folder)


def test_a_first_push_that_breaks_off_shows_nothing(hub, folder):
    hub.fail_at = "commit"
    with pytest.raises(Exception, match="disconnected"):
        publish(hub, folder)
    assert hub.files(REPO) == INITIAL
    hub.fail_at = None
    publish(hub, folder)
    assert hub.files(REPO) == INITIAL | as_bytes(MODEL_FILES)


def test_two_pushes_do_not_mix(hub, folder, monkeypatch):
    publish(hub, folder)
    write(folder, {"model.safetensors": "mine"})
    create_commit = HfApi.create_commit

    def late(api, *args, **kwargs):
        hub.repo(REPO).commit("main", {"model.safetensors": b"theirs"})
        return create_commit(api, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", late)
    with pytest.raises(Exception, match="A commit has happened since"):
        publish(hub, folder)
    assert hub.files(REPO) == {"model.safetensors": b"theirs"}


def test_what_is_pushed_comes_back_byte_for_byte(hub, folder, tmp_path):
    first = publish(hub, folder).oid
    write(folder, {"model.safetensors": "new weights"})
    publish(hub, folder)
    api = HfApi(endpoint=hub.endpoint, token=False)
    for revision, weights in ((None, "new weights"), (first, "weights")):
        there = api.snapshot_download(REPO, revision=revision, cache_dir=tmp_path / "cache")
        assert contents(Path(there)) == INITIAL | as_bytes(MODEL_FILES | {"model.safetensors": weights})


def test_a_branch(hub, folder):
    main = publish(hub, folder).oid
    write(folder, {"model.safetensors": "seed 2"})
    branch = publish(hub, folder, branch="seed-2").oid
    assert hub.sha(REPO) == main and hub.sha(REPO, "seed-2") == branch
    assert hub.files(REPO, "seed-2") == INITIAL | contents(folder)
    assert publish(hub, folder, branch="seed-2").oid == branch


def test_private_is_private(hub, folder):
    publish(hub, folder, private=True)
    with pytest.raises(huggingface_hub.errors.RepositoryNotFoundError):
        HfApi(endpoint=hub.endpoint, token=False).repo_info(REPO)
    publish(hub, folder, private=True)
    hub.repo(REPO).private = False
    sha = hub.sha(REPO)
    write(folder, {"model.safetensors": "a secret"})
    with pytest.raises(ValueError, match=f"--private, but --repo {REPO} exists and is public"):
        publish(hub, folder, private=True)
    assert hub.sha(REPO) == sha


@pytest.mark.parametrize("local", ["/home/me/runs/base", "runs/energy/model", "adapter/here", "base", "./base", None])
def test_the_base_of_an_adapter_is_named_for_others(hub, adapter, monkeypatch, local):
    monkeypatch.chdir(adapter.parent)
    (adapter / "here").mkdir()  # adapter/here has the form of a repo's name
    for name in ("adapter_config.json", "energy_config.json"):
        config = json.loads((adapter / name).read_text())
        write(adapter, {name: json.dumps(config | {"base_model_name_or_path": local})})
    write(adapter, {"README.md": ADAPTER_CARD.replace(BASE, str(local))})
    before = contents(adapter)
    with pytest.raises(ValueError, match=rf"adapter_config.json has base_model_name_or_path {local!r}.*--base USER/"):
        push.prepare(adapter)
    publish(hub, adapter, base=BASE)
    files = hub.files(REPO)
    assert files.keys() == {*INITIAL, *ADAPTER_FILES} and files["README.md"].decode() == ADAPTER_CARD
    for name in ("adapter_config.json", "energy_config.json"):
        assert json.loads(files[name]) == json.loads(ADAPTER_FILES[name])
    assert contents(adapter) == before


@pytest.mark.parametrize("name", sorted(ADAPTER_FILES.keys() - {"adapter_model.safetensors"}))
def test_every_place_that_names_the_base_counts(adapter, name):
    write(adapter, {name: ADAPTER_FILES[name].replace(BASE, "/home/me/base")})
    with pytest.raises(ValueError, match=f"{name} has base_model.* '/home/me/base', which is no Hub repo"):
        push.prepare(adapter)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"README.md": None}, "no README.md"),
        ({"model.safetensors": None}, "no weights"),
        ({"model.safetensors": None, "checkpoint.safetensors": "of training"}, "no weights"),
        ({"config.json": None}, "no config.json or adapter_config.json"),
        *(({f"{name}_edlm.py": None}, f"no {name}_edlm.py in it.*assemble.py") for name in ("modeling", "pipeline")),
        *(({name: "x"}, f"{name}: pickled") for name in ("a.bin", "b.pt", "ar/c.pth", "d.ckpt", "e.pkl", "F.PT")),
        ({"README.md": "---\ntags: [edlm\n---\n"}, "front matter of README.md cannot be parsed"),
        ({"README.md": "---\n- edlm\n---\n"}, "front matter of README.md cannot be parsed"),
        ({"README.md": "---\ntags: edlm\n# Tiny\n"}, "front matter of README.md cannot be parsed"),
        ({"config.json": "{"}, "config.json cannot be parsed"),
        (dict.fromkeys(MODEL_FILES), "nothing to publish"),
    ],
)
def test_mistakes_are_refused_by_name(folder, monkeypatch, capsys, changes, message):
    for name in (name for name, content in changes.items() if content is None):
        (folder / name).unlink()
    write(folder, {name: content for name, content in changes.items() if content is not None})
    refused(monkeypatch, capsys, f"--folder {folder}: .*{message}", "--folder", folder, "--repo", REPO)


def refused(monkeypatch, capsys, message: str, *arguments):
    """No network is asked: a refusal comes before."""
    monkeypatch.setattr(push, "HfApi", None)
    monkeypatch.setattr(sys, "argv", ["push.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        push.main()
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_wrong_arguments_are_refused_by_name(folder, monkeypatch, capsys):
    refused(monkeypatch, capsys, "--folder nowhere: there is no such", "--folder", "nowhere", "--repo", REPO)
    refused(monkeypatch, capsys, "--repo edlm: must", "--folder", folder, "--repo", "edlm")
    refused(monkeypatch, capsys, "--base ./me/x: must", "--folder", folder, "--repo", REPO, "--base", "./me/x")


def run(hub: FakeHub, home: Path, *arguments):
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, env=hub.environment(home), capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_the_command_line(hub, adapter, tmp_path):
    done = run(hub, tmp_path, "--folder", adapter, "--repo", REPO, "--private", "--base", "user/other")
    assert done.returncode == 0, done.stderr
    assert f"{hub.endpoint}/{REPO}/commit/{hub.sha(REPO)}" in done.stdout
    assert f'EDLMModel.from_pretrained("user/other").load_energy("{REPO}")' in done.stdout
    assert hub.repo(REPO).private and b"base_model: user/other" in hub.files(REPO)["README.md"]
    hub.fail_at = "commit"
    done = run(hub, tmp_path, "--folder", adapter, "--repo", REPO)
    assert done.returncode == 1 and f"The push to {REPO} did not finish" in done.stderr
    assert "Traceback" not in done.stderr


def test_how_to_load(folder, adapter):
    line = push.how_to_load(push.prepare(folder), REPO, "seed-2")
    assert line == f'AutoModel.from_pretrained("{REPO}", revision="seed-2", trust_remote_code=True)'
    assert push.how_to_load(push.prepare(adapter), REPO, "main").endswith(f'("{BASE}").load_energy("{REPO}")')
