"""Plain cards for what others make by training/: a trained folder, generated texts; and for a Space that shows models.

They say what the files say. Language, licence and use are not known: who publishes a folder adds them by hand.
"""

import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import yaml
from huggingface_hub import DatasetCardData, ModelCardData
from safetensors import safe_open

from training.common.results import read_json

from .card import ADAPTER, ENERGY, MODEL, TAGS, Card
from .shipped_cards import Names, evaluations, num_parameters, report_facts

ARCHITECTURES = {
    "EDLMModel": ("An energy-based diffusion language model: denoiser and energy", "AutoModel", "text-generation"),
    "EDLMForMaskedLM": ("A masked diffusion language model", "AutoModelForMaskedLM", "text-generation"),
    "EDLMForCausalLM": ("An autoregressive model, a part of an EDLM", "AutoModelForCausalLM", "text-generation"),
    "EDLMEnergyModel": ("An energy for a masked diffusion model", "load_energy", "text-classification"),
    "adapter": ("A LoRA adapter, the energy for a masked diffusion model", "load_energy", "text-generation"),
}
HERE = "this folder or repo"  # in the card that training.train_energy writes, too
# Of the options of a run: where it was, and how it was watched.
OF_THE_MACHINE = "output_dir cache_dir num_threads report_to resume checkpoint_minutes log_steps max_minutes".split()
SIZES = {1e3: "n<1K", 1e4: "1K<n<10K", 1e5: "10K<n<100K", 1e6: "100K<n<1M", math.inf: "n>1M"}  # as the Hub has them
COLUMNS = ("row", "prompt", "text", "tokens", "nfe", "energy_nfe", "seed")


def trained(folder: Path) -> Card:
    """For a folder that a script of training/ wrote: what its files and those of its run say.

    Raises:
        ValueError: there is no config.json or adapter_config.json of ours in it.
    """
    given, folder = folder, folder.resolve()
    if report := report_of(folder):
        return reported(report, folder.name)
    is_adapter = (folder / ADAPTER).exists()
    if not is_adapter and not (folder / MODEL).exists():
        raise ValueError(f"there is no {MODEL} or {ADAPTER} in {given}")
    config = read_json(folder / (ADAPTER if is_adapter else MODEL))
    architecture = "adapter" if is_adapter else (config.get("architectures") or [None])[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{MODEL} in {given} is of {architecture}, not one of {', '.join(ARCHITECTURES)}")
    what, auto, task = ARCHITECTURES[architecture]
    is_energy = auto == "load_energy"
    run = facts_of_run(folder)
    trained_with = run.pop("base")
    base = config.get("base_model_name_or_path") or trained_with if is_energy else None
    example = f'model = {auto}.from_pretrained("{HERE}", trust_remote_code=True)'
    if is_energy:
        example = f'model = AutoModel.from_pretrained("{base}", trust_remote_code=True).load_energy("{HERE}")'
    name = folder.parent.name if folder.name == "model" else folder.name
    facts = run | {
        "name": name,
        "what": what,
        "is_energy": is_energy,
        "parameters": num_parameters(*sorted(folder.glob("*.safetensors"))),
        "over": "over" if is_adapter else "in",
        "sizes": read_json(folder / ENERGY)["base"] if is_adapter else config,
        "example": f"from transformers import {'AutoModel' if is_energy else auto}\n\n{example}",
    }
    data = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=task,
        base_model=base,
        base_model_relation=base and ("adapter" if is_adapter else "finetune"),
        tags=[*TAGS, "lora" if is_adapter else "custom_code"],
    )
    return Card("trained", data, facts, "trained.md")


def report_of(folder: Path) -> Path | None:
    """The results of `training.report` of a folder."""
    path = folder.parent / "results" / f"{folder.name}.json"
    return path if path.exists() else None


def facts_of_run(folder: Path) -> dict:
    """What `output_dir` has beside `output_dir/model`."""
    facts = dict.fromkeys(("text", "options", "script", "command", "metrics", "step", "hours", "base"))
    run = folder.parent
    if folder.name != "model" or not (run / "metrics.jsonl").exists():
        return facts
    if found := evaluations(run / "metrics.jsonl"):
        last = found[-1]
        facts |= {"step": last["step"], "hours": last["seconds"] / 3600}
        facts["metrics"] = {key: value for key, value in last.items() if key not in ("step", "seconds")}
    if (run / "evaluation.json").exists():
        facts["command"] = public(read_json(run / "evaluation.json")["command"])
    if (run / "checkpoint.safetensors").exists():
        with safe_open(run / "checkpoint.safetensors", "np") as file:
            options = json.loads(file.metadata()["arguments"])
        facts["script"] = "pretrain" if "objective" in options else "train_energy"
        facts["text"] = public(options["data"])
        facts["base"] = options.get("base")
        options = {key: value for key, value in options.items() if key not in OF_THE_MACHINE and value != ""}
        options = {key: public(value) if isinstance(value, str) else value for key, value in options.items()}
        facts["options"] = yaml.safe_dump(options, sort_keys=False).rstrip()
    return facts


def public(text: str) -> str:
    """Absolute paths, which nobody else has, are cut to their last part."""
    return re.sub(r"(?<![^\s='\":])/(?:[^\s/'\":]+/)*([^\s/'\":]+)", r"\1", text)


def reported(report: Path, name: str) -> Card:
    """From three runs to a whole model, and `training.report` of it."""
    results, names = read_json(report), Names(name)
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=[*TAGS, "custom_code"])
    facts = report_facts(results, names)
    for run in facts["training"].values():
        run["command"] = public(run["command"])
    command = shlex.split(results["command"])
    facts |= {
        "shipped": False,
        "here": HERE,
        "text": Path(command[command.index("--data") + 1]).name,
        "command": public(results["command"]),
        "files": names.link(report.name),
        "bounds": None,
    }
    return Card("trained", data, facts, "model.md")


def data_set(folder: Path) -> Card:
    """For a folder of generated texts: .jsonl and .parquet files of `training.generate`.

    Raises:
        ValueError: they have other columns, or no row.
    """
    paths = row_files(folder)
    files = [facts_of_rows(path) for path in paths]
    num_rows = sum(file["rows"] for file in files)
    models = sorted({file["model"] for file in files if file["model"]})
    name = folder.resolve().name
    data = DatasetCardData(
        pretty_name=name,
        task_categories=["text-generation"],
        size_categories=next(size for most, size in SIZES.items() if num_rows < most),
        tags=["synthetic", *TAGS],
        configs=[{"config_name": "default", "data_files": [path.name for path in paths]}],
    )
    facts = {"name": name, "here": HERE, "model": ", ".join(models), "files": files}
    return Card("data set", data, facts, "data_set.md")


def row_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.jsonl"), *folder.glob("*.parquet")])


def settings_files(folder: Path) -> list[Path]:
    """What `training.generate` says of each, beside it."""
    return sorted(folder.glob("*.settings.yaml"))


def facts_of_rows(path: Path) -> dict:
    """Of one file, and of the settings beside it."""
    counts, lengths, seeds = Counter(), [], set()
    for row in read_rows(path):
        if missing := [column for column in COLUMNS if column not in row]:
            raise ValueError(f"{path.name} is not of training.generate: a row has no {', '.join(missing)}")
        counts += Counter(rows=1, prompts=row["prompt"] is not None, nfe=row["nfe"], energy_nfe=row["energy_nfe"])
        lengths.append(len(row["tokens"]))
        seeds.add(row["seed"])
    if not lengths:
        raise ValueError(f"{path.name} has no row")
    beside = path.with_suffix(".settings.yaml")
    settings = yaml.safe_load(beside.read_text(encoding="utf-8")) if beside.exists() else {}
    return {
        "name": path.name,
        "rows": counts["rows"],
        "prompts": counts["prompts"],
        "nfe": counts["nfe"] / counts["rows"],
        "energy_nfe": counts["energy_nfe"] / counts["rows"],
        "shortest": min(lengths),
        "longest": max(lengths),
        "seeds": sorted(seeds),
        "model": public(settings.get("model", "")),
        "settings": public(yaml.safe_dump(settings, sort_keys=False).rstrip()) if settings else None,
    }


def read_rows(path: Path) -> Iterator[dict]:
    if path.suffix == ".jsonl":
        with open(path, encoding="utf-8") as file:
            yield from map(json.loads, file)
    else:
        import pyarrow.parquet as pq  # not needed by who has no parquet

        for batch in pq.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
