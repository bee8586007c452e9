"""Publish a folder as a Hub repo: a model, an energy, an adapter, a Space, a metric or a data set.

    python -m hub_cards.publish.push --folder hub_cards/edlm-wiki27 --repo USER/edlm-wiki27
    python -m hub_cards.publish.push --folder runs/lora/model --repo USER/edlm-lora --base USER/edlm-wiki27
    python -m hub_cards.publish.push --folder hub_cards/metrics/token_entropy --repo USER/token_entropy --space
    python -m hub_cards.publish.push --folder runs/samples --repo USER/samples --dataset

A copy of the folder gets its code, its card and the results that the card states, and is used in a process of its own;
then it is one commit, after which the branch holds these files and no others. What came back from the Hub is compared
with what was sent. The token is that of `hf auth login` or HF_TOKEN. The folder itself is only read.
"""

import argparse
import errno
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import yaml
from huggingface_hub import HfApi, RepoCard, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id

from . import cards
from .assemble import generate_code, metric_code, model_code
from .faults import closing, says_all
from .upload import Published, WrongArgument, again, check_access, upload

# Files and folders that stay here: hidden ones, and what training and evaluation leave behind.
LEFT_OUT = ("checkpoint*", "optimizer*", "scheduler*", "random_states*", "rng_state*", "trainer_state.json")
LEFT_OUT += ("training_args.bin", "metrics.jsonl", "*.tmp", "*.parts", "tokens", "wandb", "__pycache__", ".*")
SENT = (".gitattributes", ".eval_results")  # of the hidden ones
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
ROWS = (".jsonl", ".parquet", ".csv")
CARD, MODEL, ADAPTER, ENERGY = "README.md", "config.json", "adapter_config.json", "energy_config.json"
BASE = "base_model_name_or_path"
SECRET = re.compile(rb"hf_[A-Za-z0-9]{30,}")
SAMPLERS = ("EDLMModel", "EDLMForMaskedLM")
KINDS = dict.fromkeys(SAMPLERS, "model") | {"EDLMForCausalLM": "causal", "EDLMEnergyModel": "energy"}


# ---- what is published


def collect(folder: Path) -> dict[str, Path]:
    """The files of a folder that may be published, by their names in the repo; ValueError for what never is."""
    if not folder.is_dir():
        raise ValueError("there is no such folder")
    files, token = {}, (get_token() or "").encode()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part not in SENT and any(fnmatch(part, p) for p in LEFT_OUT) for part in name.parts):
            continue
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{name} is a link to something outside of it")
        if path.is_file():
            files[name.as_posix()] = path
    if not files:
        raise ValueError("there is nothing to publish in it")
    if pickled := [name for name in files if name.lower().endswith(PICKLED)]:
        raise ValueError(f"{', '.join(pickled)}: pickled files run code when they are loaded; save as safetensors")
    for name, path in files.items():
        if not name.endswith((".safetensors", ".parquet", ".png")):
            content = path.read_bytes()
            if SECRET.search(content) or token and token in content:
                raise ValueError(f"{name} holds an access token")
    return files


def stage(
    folder: Path, target: Path, repo: str, repo_type: str, base: str | None = None, benchmark: str | None = None
) -> tuple[dict[str, Path], str]:
    """Copy to the new folder `target` what is to be published, made whole, and say of what kind it is.

    Returns:
        the files by their names in the repo, and the kind as `try_folder.py` has it.
    Raises:
        ValueError: it is not a folder to publish.
    """
    for name, path in collect(folder).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)
    of_model = base if repo_type == "model" else None
    write(target, cards.published(folder, repo, of_model, benchmark))
    kind = STAGES[repo_type](target, repo, base)
    return {path.relative_to(target).as_posix(): path for path in sorted(target.rglob("*")) if path.is_file()}, kind


def stage_model(target: Path, repo: str, base: str | None) -> str:
    if not list(target.glob("*.safetensors")):
        raise ValueError("there are no weights (*.safetensors) in it")
    if (target / ADAPTER).exists():
        kind = "adapter"
    elif (target / MODEL).exists():
        kind = stage_code(target)
    else:
        raise ValueError(f"there is no {MODEL} or {ADAPTER} in it")
    read_card(target / CARD)
    if kind in ("adapter", "energy"):
        for name in (ADAPTER, ENERGY):
            if base is not None and (target / name).exists():
                write_json(target / name, read_json(target / name) | {BASE: base})
        check_base(target)
    elif base is not None:
        raise ValueError("--base is for adapters and energies, and it holds a whole model")
    return kind


def stage_code(target: Path) -> str:
    """The code of this clone, the configuration that names it, and the kind of model; ValueError if it is not ours."""
    from modeling_edlm.configuration_edlm import AUTO_MAP, CUSTOM_PIPELINES  # torch takes seconds; others need none

    config = read_json(target / MODEL)
    architecture = (config.get("architectures") or [None])[0]
    if config.get("model_type") != "edlm" or architecture not in KINDS:
        raise ValueError(f"its {MODEL} is not of an EDLM: model_type is {config.get('model_type')!r}, {architecture}")
    is_sampler = architecture in SAMPLERS
    if is_sampler and not (target / "generation_config.json").exists():
        raise ValueError("there is no generation_config.json in it: model.save_pretrained writes one")
    config["auto_map"] = AUTO_MAP
    config |= {"custom_pipelines": CUSTOM_PIPELINES} if is_sampler else {}
    write_json(target / MODEL, config)
    for stale in target.glob("*.py"):
        stale.unlink()
    shutil.rmtree(target / "custom_generate", ignore_errors=True)
    write(target, model_code())
    if is_sampler:
        write(target, {f"custom_generate/{name}": content for name, content in generate_code().items()})
    return KINDS[architecture]


def check_base(target: Path) -> None:
    """ValueError if the base is not named in such a way that others find it."""
    places = [
        (name, BASE, read_json(target / name).get(BASE)) for name in (ADAPTER, ENERGY) if (target / name).exists()
    ]
    named = read_card(target / CARD).data.get("base_model")
    places += [(CARD, "base_model", value) for value in (named if isinstance(named, list) else [named])]
    for name, key, value in places:
        # A relative path may have the form of a repo's name.
        if not is_repo_id(value) or Path(value).exists():
            raise ValueError(
                f"{name} has {key} {value!r}, which is no Hub repo but a local path: nobody else could load it; give "
                "the repo of its base by --base USER/NAME"
            )


def stage_space(target: Path, repo: str, base: str | None) -> str:
    is_metric, card = (target / f"{target.name}.py").exists(), read_card(target / CARD)
    if is_metric:
        write(target, metric_code())
    data = card.data
    if base is not None:  # the page takes the first of these, where no variable says otherwise
        data.models = [base]
        card.save(target / CARD)
    write(target, {CARD: (target / CARD).read_bytes().replace(b"USER/SPACE", repo.encode())})
    if data.get("sdk") != "gradio" or not (target / str(data.get("app_file"))).is_file():
        raise ValueError(f"its {CARD} must name sdk: gradio and as app_file a file in it")
    for path in target.rglob("*.py"):
        try:
            compile(path.read_bytes(), path.name, "exec")
        except SyntaxError as error:
            raise ValueError(f"{path.relative_to(target)} cannot be compiled: {error}") from error
    return "metric" if is_metric else "space"


def stage_data_set(target: Path, repo: str, base: str | None) -> str:
    if not [path for path in target.rglob("*") if path.suffix in ROWS]:
        raise ValueError(f"there are no rows ({', '.join(ROWS)}) in it")
    read_card(target / CARD)
    return "dataset"


STAGES = {"model": stage_model, "space": stage_space, "dataset": stage_data_set}


def write(target: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be parsed: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return value


def read_card(path: Path) -> RepoCard:
    """The card; ValueError if there is none or what stands between its lines of --- is not metadata."""
    if not path.exists():
        raise ValueError(f"there is no {CARD} (the card) in it")
    try:
        text = path.read_bytes().decode()
        if not REGEX_YAML_BLOCK.search(text):
            raise ValueError("there are no lines --- with metadata between them")
        return RepoCard(text)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"the front matter of {CARD} cannot be parsed: {error}") from error


def is_repo_id(value) -> bool:
    """Whether it has the form USER/NAME."""
    try:
        validate_repo_id(value)
    except HFValidationError:
        return False
    return value is not None and "/" in value


# ---- and how


def base_of(target: Path, kind: str) -> str | None:
    """The repo of the base of an adapter or energy; None for what has none."""
    if kind not in ("adapter", "energy"):
        return None
    base = read_card(target / CARD).data.base_model
    return base[0] if isinstance(base, list) else base


def try_it(target: Path, kind: str, base_oid: str | None = None) -> str:
    """What the folder did when a stranger's process used it; ValueError with its error if it did not work."""
    base = base_of(target, kind)
    with tempfile.TemporaryDirectory() as empty:
        environment = os.environ | {"HF_MODULES_CACHE": f"{empty}/modules", "HF_DATASETS_CACHE": f"{empty}/datasets"}
        if base is None:  # all that it needs is in it
            environment |= {"HF_HUB_OFFLINE": "1"}
        script = Path(__file__).with_name("try_folder.py")
        command = [sys.executable, "-P", script, kind, target, *([base, base_oid or "main"] if base else [])]
        done = subprocess.run(
            command, env=environment, cwd=empty, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    if done.returncode:
        if os.strerror(errno.ENOSPC) in done.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise ValueError(f"it cannot be used as it would be published:\n{done.stderr.strip()}")
    return done.stdout.strip()


def how_to_load(kind: str, repo: str, oid: str, base: str | None = None, base_oid: str | None = None) -> str:
    """A line of Python that always gives this very revision, and that of its base which it was tried with."""
    pinned = f'"{repo}", revision="{oid}"'
    if base is not None:
        model = f'AutoModel.from_pretrained("{base}", revision="{base_oid}", trust_remote_code=True)'
        return f"{model}.load_energy({pinned})"
    if kind == "dataset":
        return f"datasets.load_dataset({pinned})"
    if kind == "metric":
        return f"evaluate.load({pinned})"
    if kind == "space":
        return f'huggingface_hub.snapshot_download({pinned}, repo_type="space")'
    return f"AutoModel{'ForCausalLM' if kind == 'causal' else ''}.from_pretrained({pinned}, trust_remote_code=True)"


def size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:,.1f} KiB"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="what is to be published")
    parser.add_argument("--repo", required=True, metavar="USER/NAME", help="made if there is none")
    types = parser.add_mutually_exclusive_group()
    for name, help in (("space", "a Gradio app, or a metric"), ("dataset", "rows of training/generate.py, or others")):
        types.add_argument(f"--{name}", dest="type", action="store_const", const=name, default="model", help=help)
    parser.add_argument(
        "--base", metavar="USER/NAME", help="the repo of the base of an adapter or energy; of a Space: of its model"
    )
    parser.add_argument("--benchmark", metavar="USER/NAME", help="a benchmark's data set: .eval_results for its board")
    parser.add_argument("--dry-run", action="store_true", help="do everything but upload")
    parser.add_argument("--private", action="store_true", help="make the repo a private one")
    parser.add_argument("--revision", default="main", metavar="BRANCH", help="made from main if there is none")
    parser.add_argument("--create-pr", action="store_true", help="propose the commit, as a pull request")
    parser.add_argument("--tag", help="for the commit")
    parser.add_argument("--message", help="of the commit; default: Upload and the folder's name")
    arguments = parser.parse_args(argv)
    repo = arguments.repo
    for name, value in (("--repo", repo), ("--base", arguments.base), ("--benchmark", arguments.benchmark)):
        if value is not None and not is_repo_id(value):
            parser.error(f"{name} {value}: must have the form USER/NAME")
    if arguments.tag and arguments.create_pr:
        parser.error(f"--tag {arguments.tag}: is for what is published, and --create-pr only proposes it")

    if not arguments.folder.is_dir():
        parser.error(f"--folder {arguments.folder}: there is no such folder")
    progress = Progress()
    try:
        with tempfile.TemporaryDirectory() as temporary:
            publish(arguments, parser, Path(temporary), progress)
        return
    except WrongArgument as error:
        parser.error(without_token(str(error)))
    except (Exception, KeyboardInterrupt) as error:
        said = "" if says_all(error) else f"{type(error).__name__}: {error}\n"
        last = closing(error, repo, progress.is_sending, progress.made)
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
    if progress.is_sending:  # the error held progress bars, which write to the terminal once more as they go
        gc.collect()
    print(without_token(said + last), file=sys.stderr)
    sys.exit(code)


@dataclass
class Progress:
    """How far a push has come, for the sentence that it ends with where it breaks off."""

    is_sending: bool = False
    made: str | None = None  # the page of the commit or pull request

    def on_commit(self, published: Published) -> None:
        self.made = published.pr_url or published.url


def publish(
    arguments: argparse.Namespace, parser: argparse.ArgumentParser, temporary: Path, progress: Progress
) -> None:
    """What the command does."""
    api, repo, folder = HfApi(), arguments.repo, arguments.folder.resolve()
    target, base_oid = temporary / folder.name, None
    if not arguments.dry_run:  # first, as what follows may take minutes
        check_access(api, repo, arguments.type, proposes=arguments.create_pr)
    try:
        files, kind = stage(folder, target, repo, arguments.type, arguments.base, arguments.benchmark)
        for name, path in files.items():
            print(f"{size(path.stat().st_size):>12}  {name}")
        print(f"{size(sum(path.stat().st_size for path in files.values())):>12}  in {len(files)} files")
        base = base_of(target, kind)
        if base is not None and not arguments.dry_run:
            base_oid = again(f"reading {base}", lambda: api.repo_info(base)).sha
        if kind != "space":
            print(f"as others would use it: {try_it(target, kind, base_oid)}")
    except ValueError as error:
        parser.error(without_token(f"--folder {arguments.folder}: {error}"))
    if arguments.dry_run:
        print("nothing was uploaded")
        return
    progress.is_sending = True
    published = upload(
        api,
        files,
        repo,
        arguments.type,
        branch=arguments.revision,
        private=arguments.private,
        create_pr=arguments.create_pr,
        tag=arguments.tag,
        message=arguments.message or f"Upload {folder.name}",
        on_commit=progress.on_commit,
    )
    done = "proposed" if arguments.create_pr else "published"
    if not published.is_new:
        done = f"nothing changes, as {arguments.revision} of {repo} has these very files"
        done += ", so nothing was proposed" if arguments.create_pr else ""
    print(f"{done}: {published.pr_url or published.url}")
    print(f"load it by: {how_to_load(kind, repo, published.oid, base, base_oid)}")


def without_token(text: str) -> str:
    text, token = SECRET.sub(b"hf_***", text.encode()).decode(), get_token()
    return text.replace(token, "***") if token else text


if __name__ == "__main__":
    main()
