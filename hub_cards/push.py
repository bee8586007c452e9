"""Publish a folder as a Hub repo: a model, an energy, or an energy that is a PEFT adapter.

    python hub_cards/push.py --folder hub_cards/edlm-wiki27 --repo USER/edlm-wiki27
    python hub_cards/push.py --folder runs/lora/model --repo USER/edlm-lora --base USER/edlm-wiki27

It is one commit, after which the branch holds the files of the folder and no others: whoever loads meanwhile, or after
a push that broke off, gets the old revision whole. The token is that of `hf auth login` or HF_TOKEN. The folder is only
read.
"""

import argparse
import json
from fnmatch import fnmatch
from pathlib import Path

import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id

LEFT_OUT = ("checkpoint.safetensors", "metrics.jsonl", "*.tmp", "tokens", "__pycache__", ".*")  # files and folders
SENT = (".gitattributes", ".eval_results")  # of the hidden ones
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
CARD, MODEL, ADAPTER, ENERGY = "README.md", "config.json", "adapter_config.json", "energy_config.json"
BASE = "base_model_name_or_path"


def collect(folder: Path) -> dict[str, bytes | Path]:
    """The files to publish, by their names in the repo; ValueError if the folder is not one to publish."""
    if not folder.is_dir():
        raise ValueError("there is no such folder")
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        left_out = [part for part in name.parts if part not in SENT and any(fnmatch(part, p) for p in LEFT_OUT)]
        if path.is_file() and not left_out:
            files[name.as_posix()] = path
    if not files:
        raise ValueError("there is nothing to publish in it")
    if pickled := [name for name in files if name.lower().endswith(PICKLED)]:
        raise ValueError(f"{', '.join(pickled)}: pickled files run code when they are loaded; save as safetensors")
    if CARD not in files:
        raise ValueError(f"there is no {CARD} (the card) in it")
    if not any(name.endswith(".safetensors") and "/" not in name for name in files):
        raise ValueError("there are no weights (*.safetensors) in it")
    if MODEL not in files and ADAPTER not in files:
        raise ValueError(f"there is no {MODEL} or {ADAPTER} in it")
    config = read_json(files, MODEL)
    pipelines = config.get("custom_pipelines", {}).values()
    for target in [*config.get("auto_map", {}).values(), *(pipeline["impl"] for pipeline in pipelines)]:
        code = f"{target.partition('.')[0]}.py"
        if "--" not in target and code not in files:  # user/name--module.Class is the code of another repo
            raise ValueError(f"there is no {code} in it, which its {MODEL} names: python hub_cards/assemble.py")
    return files


def read_json(files: dict[str, bytes | Path], name: str) -> dict:
    """The object in a JSON file; {} where there is no such file."""
    if name not in files:
        return {}
    content = files[name] if isinstance(files[name], bytes) else files[name].read_bytes()
    try:
        value = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{name} cannot be parsed: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} holds no JSON object")
    return value


def read_card(path: Path) -> ModelCard:
    """The card; ValueError if what stands between its lines of --- is not metadata."""
    try:
        text = path.read_bytes().decode()
        if text.lstrip().startswith("---") and not REGEX_YAML_BLOCK.search(text):
            raise ValueError("the line --- that ends it is missing")  # ModelCard would see a card without any
        return ModelCard(text)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"the front matter of {CARD} cannot be parsed: {error}") from error


def is_repo_id(value) -> bool:
    """Whether it has the form USER/NAME."""
    try:
        validate_repo_id(value)
    except HFValidationError:
        return False
    return value is not None and "/" in value


def prepare(folder: Path, base: str | None = None) -> dict[str, bytes | Path]:
    """The files to publish, where `base` is given with it as their base model; ValueError if they should not be."""
    files = collect(folder)
    card = read_card(files[CARD])
    configs = {name: read_json(files, name) for name in (ADAPTER, ENERGY) if name in files}
    if base is not None:
        for name, config in configs.items():
            files[name] = (json.dumps(config | {BASE: base}, indent=2) + "\n").encode()
        card.data.base_model = base
        if card.data.tags:  # PEFT writes one that names the base
            tag = "base_model:adapter:"
            card.data.tags = [tag + base if old.startswith(tag) else old for old in card.data.tags]
        files[CARD] = str(card).encode()
    elif ADAPTER in files:
        bases = [(name, BASE, config.get(BASE)) for name, config in configs.items()]
        named = card.data.base_model or []
        bases += [(CARD, "base_model", value) for value in (named if isinstance(named, list) else [named])]
        for name, key, value in bases:
            # A relative path may have the form of a repo's name.
            if not is_repo_id(value) or Path(value).exists():
                raise ValueError(
                    f"{name} has {key} {value!r}, which is no Hub repo but a local path: nobody else could load the "
                    "adapter; give the repo of its base by --base USER/NAME"
                )
    return files


def push(api: HfApi, files: dict[str, bytes | Path], repo: str, private: bool, branch: str, message: str) -> CommitInfo:
    """Make `repo` and `branch` where they are missing, and bring the branch to `files` in one commit."""
    api.create_repo(repo, private=private or None, exist_ok=True)
    now = api.repo_info(repo)
    if private and not now.private:
        raise ValueError(f"--private, but --repo {repo} exists and is public: change that in its settings first")
    if branch != "main":
        api.create_branch(repo, branch=branch, exist_ok=True)
        now = api.repo_info(repo, revision=branch)
    # Weights of an older revision would be loaded beside or in place of these. Hidden files are the Hub's own.
    stale = sorted(file.rfilename for file in now.siblings if file.rfilename not in files and file.rfilename[0] != ".")
    if stale:
        print(f"not in the folder, so removed from {branch} of {repo}: {', '.join(stale)}")
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    operations += [CommitOperationDelete(name) for name in stale]
    # Not upload_folder, which makes several commits of a folder when it uploads by Xet. With parent_commit the Hub
    # refuses the commit if another one came between.
    return api.create_commit(repo, operations, commit_message=message, revision=branch, parent_commit=now.sha)


def how_to_load(files: dict[str, bytes | Path], repo: str, branch: str) -> str:
    """A line of Python."""
    where = f'"{repo}"' if branch == "main" else f'"{repo}", revision="{branch}"'
    if ADAPTER in files:
        return f'EDLMModel.from_pretrained("{read_json(files, ADAPTER)[BASE]}").load_energy({where})'
    config = read_json(files, MODEL)
    architecture = (config.get("architectures") or ["EDLMModel"])[0]
    classes = {target.rpartition(".")[2]: auto for auto, target in config.get("auto_map", {}).items()}
    return f"{classes.get(architecture, 'AutoModel')}.from_pretrained({where}, trust_remote_code=True)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="with README.md, weights as safetensors, and config")
    parser.add_argument("--repo", required=True, metavar="USER/NAME", help="made if there is none")
    parser.add_argument("--private", action="store_true", help="make the repo a private one")
    parser.add_argument("--revision", default="main", metavar="BRANCH", help="made from main if there is none")
    parser.add_argument("--message", help="of the commit; default: Upload and the folder's name")
    parser.add_argument("--base", metavar="USER/NAME", help="published as the base model; the folder stays as it is")
    arguments = parser.parse_args()
    repo, base, branch = arguments.repo, arguments.base, arguments.revision
    for name, value in (("--repo", repo), ("--base", base)):
        if value is not None and not is_repo_id(value):
            parser.error(f"{name} {value}: must have the form USER/NAME")
    try:
        files = prepare(arguments.folder, base)
    except ValueError as error:
        parser.error(f"--folder {arguments.folder}: {error}")
    message = arguments.message or f"Upload {arguments.folder.resolve().name}"
    try:
        commit = push(HfApi(), files, repo, arguments.private, branch, message)
    except Exception as error:  # the classes of network errors are another library's in each generation of the client
        raise SystemExit(
            f"{type(error).__name__}: {error}\nThe push to {repo} did not finish. What is there is whole: the old "
            "revision, unless the answer to the commit was all that got lost. The same command may be given again."
        ) from error
    print(f"published: {commit.commit_url}\nload it by: {how_to_load(files, repo, branch)}")


if __name__ == "__main__":
    main()
