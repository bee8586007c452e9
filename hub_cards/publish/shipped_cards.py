"""The cards of the folders of hub_cards/, from the files in hub_cards/results.

In this repository a card names folders and files of it; as published, Hub repos.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from safetensors import safe_open

from training.common.results import read_json, read_lines
from training.common.settings import chosen, kind_of

from .card import ADAPTER, HUB_CARDS, MODEL, TAGS, Card

RESULTS = HUB_CARDS / "results"
BASE, STORIES = WHOLE = "edlm-wiki27", "edlm-stories"  # with a denoiser of their own; the others are energies of BASE
# The files that the numbers of a card come from; they are published with it.
SHIPPED = {
    "edlm-stories": ("edlm-stories.json", "settings-stories.json", "edlm-stories-seed-6.json"),
    "edlm-wiki27": ("edlm-wiki27.json", "likelihood-wiki27.json", "denoiser-from-scratch.jsonl"),
    "edlm-wiki27-step": ("edlm-wiki27-step.jsonl", "likelihood-wiki27.json"),
    "edlm-wiki27-light": ("edlm-wiki27-light.jsonl", "likelihood-wiki27-light.json"),
    "edlm-wiki27-books": ("energy-books-nce.jsonl", "adapt-books.json", "likelihood-books.json"),
}
# As noted when they were trained: their logs have seconds, but not what machine they are of.
TRAINED_ON = {
    "edlm-wiki27-step": "two shared CPU cores",
    "edlm-wiki27-light": "one busy CPU core",
    "edlm-wiki27-books": "one busy CPU core",
}
# Options of training.train_energy that their logs do not have.
COMMANDS = {
    "edlm-wiki27-step": "--energy_num_layers 4 --max_steps 1600 --batch_size 32 --learning_rate 1e-3 --warmup_steps 50 "
    "--ema_decay 0.995 --mixed_precision bf16 --eval_steps 200 --eval_blocks 512 --final_eval_blocks 2048 "
    "--output_dir runs/step",
    "edlm-wiki27-light": "--energy_num_layers 2 --max_steps 1600 --batch_size 32 --learning_rate 1e-3 "
    "--warmup_steps 50 --ema_decay 0.995 --mixed_precision bf16 --eval_steps 200 --output_dir runs/step-2",
}


@dataclass(frozen=True)
class Names:
    """What the card of the folder `name` calls itself, its base and its results: paths, or as published repos."""

    name: str
    repo: str | None = None
    base_repo: str | None = None

    @property
    def here(self) -> str:
        return self.repo or f"hub_cards/{self.name}"

    @property
    def base(self) -> str:
        return self.base_repo or f"hub_cards/{BASE}"

    def facts(self) -> dict:
        link = f"https://huggingface.co/{self.base}" if self.repo else f"../{BASE}/README.md"
        return {"name": self.name, "here": self.here, "published": self.repo is not None, "shipped": True} | {
            "base": self.base,
            "base_name": BASE,
            "base_link": f"[{self.base if self.repo else BASE}]({link})",
        }

    def url(self, file: str) -> str | None:
        return self.repo and f"https://huggingface.co/{self.repo}/blob/main/results/{file}"

    def link(self, file: str) -> str:
        return f"[results/{file}]({self.url(file)})" if self.repo else f"[{file}](../results/{file})"

    def other(self, name: str) -> str:
        """Another folder of hub_cards: as published, nothing says whether there is a repo of it."""
        return name if self.repo else f"[{name}](../{name}/README.md)"

    def command(self, text: str) -> str:
        """A recorded command with the names of repos."""
        if self.repo is None:
            return text
        names = {self.name: self.here, BASE: self.here if self.name == BASE else self.base}
        text = text.replace("hub_cards/results/", "results/")
        return re.sub(r"hub_cards/([\w.-]+)", lambda match: names.get(match[1], match[1]), text)


def shipped(name: str, repo: str | None = None, base: str | None = None) -> Card:
    """The card of a folder of hub_cards/; `repo` and `base`: the Hub repos of it and of its base, once published."""
    names = Names(name, repo, base)
    if name in WHOLE:
        return model_card(names) if name == BASE else stories_card(names)
    return adapter_card(names) if (HUB_CARDS / name / ADAPTER).exists() else energy_card(names)


def render(name: str, repo: str | None = None, base: str | None = None) -> str:
    """The text of `hub_cards/<name>/README.md`, or as it is published in `repo` (an energy: for the repo `base`)."""
    return shipped(name, repo, base).text


def results_files(name: str) -> list[Path]:
    """The files that the numbers of the card of `hub_cards/<name>` come from."""
    return [RESULTS / file for file in SHIPPED[name]]


def model_card(names: Names) -> Card:
    results_file, likelihood, from_scratch = SHIPPED[names.name]
    results = read_json(RESULTS / results_file)
    facts = report_facts(results, names) | {
        "text": "wiki27",
        "files": ", ".join(map(names.link, (results_file, likelihood))),
        "bounds": bounds(likelihood, "nce", names),
        "scratch": evaluations(RESULTS / from_scratch)[-1] | {"file": names.link(from_scratch)},
    }
    facts["bounds"]["ar"] = row_of(likelihood, estimator="ar")["bits_per_character"]
    measured = {"dataset": "wiki27", "split": "validation", "file": results_file}
    found = [
        (f"{part}, {what}", facts["training"][key]["last_evaluation"]["validation_bits_per_token"])
        for key, part, what in (
            ("denoiser", "denoiser", "bits per character at most (MDLM in continuous time)"),
            ("ar", "autoregressive model", "bits per character"),
        )
    ]
    for s in results["samplers"]:
        where = f"{s['sampler']} samples, {s['num_steps']} steps, k={s['num_candidates']}"
        found.append((f"{where}: bits per character under the AR scorer", s["bits_per_character"]["mean"]))
        found.append((f"{where}: entropy of letters, nats", s["token_entropy"]["mean"]))
    evaluated = [result(names, metric, value, **measured) for metric, value in found]
    accuracy = facts["training"]["energy"]["last_evaluation"]["validation_accuracy"]
    evaluated += [result(names, "NCE energy, accuracy in telling data from a proposal", accuracy, **measured)]
    evaluated += bound_results(names, facts["bounds"], likelihood)
    evaluated += [result(names, "autoregressive model, bits per character", facts["bounds"]["ar"]["mean"],
                         "wiki27", "test", likelihood)]  # fmt: skip
    data = ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*TAGS, "custom_code"],
        model_name=names.name,
        eval_results=evaluated,
    )
    return Card("model", data, facts, "model.md")


def settings_facts(settings: dict) -> dict:
    """Of a grid of settings: the best one, the best at about 64 passes, and both samplers by temperature."""
    at_64 = chosen(settings["rows"], 64, settings["arguments"]["tolerance"])
    plain = [row for row in settings["rows"] if row["window"] is None and row["num_steps"] == 64]
    names = ("judge", "known_words", "entropy")
    return {
        "passes": settings["arguments"]["passes"],
        "best": settings["chosen"],
        "at_64": at_64 and {"kind": kind_of(at_64), "judge": at_64["samples"]["judge"]},
        "mdlm_64": plain[0]["samples"]["judge"] if plain else None,
        "temperatures": [
            {"temperature": row["temperature"], "sampler": "EDLM" if row["window"] else "MDLM"}
            | {name: row["samples"][name] for name in names}
            for row in settings["temperatures"]
        ],
        "data": settings["data"],
    }


def stories_card(names: Names) -> Card:
    results_file, settings_file, fresh_file = SHIPPED[names.name]
    results, config = read_json(RESULTS / results_file), read_json(HUB_CARDS / names.name / MODEL)
    fresh = read_json(RESULTS / fresh_file)
    sizes = ("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
    as_they_are = ("parameters", "num_samples", "num_shown", "seed", "dtype", "samplers", "lead", "defaults")
    training, texts = {}, {}
    for part, runs in results["training"].items():
        training[part] = [
            {"steps": run["steps"], "minutes": run["minutes"], "millions": run["tokens"] / 1e6}
            | {"command": names.command(run["command"])}
            | {"bits": run["curve"][-1].get("validation_bits_per_character")}
            for run in runs
        ]
    for row in results["texts"]:
        task = (
            f"Free, seed {row['row']}" if row["task"] == "free" else "A gap" if "[MASK" in row["task"] else row["task"]
        )
        texts.setdefault(task, []).append(row)
    settings = read_json(RESULTS / settings_file)
    facts = names.facts() | {name: results[name] for name in as_they_are} | {
        "config": {size: config[size] for size in sizes},
        "command": names.command(results["command"]),
        "training": training,
        "hours": sum(run["minutes"] for runs in training.values() for run in runs) / 60,
        "texts": texts,
        "fresh": {name: fresh[name] for name in ("num_samples", "seed", "samplers", "lead", "lead_of_energy")}
        | {"file": names.link(fresh_file)},
        "files": names.link(results_file),
        "settings": settings_facts(settings)
        | {"command": names.command(settings["command"]), "file": names.link(settings_file)},
    }  # fmt: skip
    measured = {"dataset": "tinystories-sample", "split": "validation", "file": results_file}
    found = [
        (
            f"{part}, bits per character{' at most (MDLM in continuous time)' if part == 'denoiser' else ''}",
            runs[-1]["bits"],
        )
        for part, runs in training.items()
        if runs[-1]["bits"]
    ]
    for sampler, row in results["samplers"].items():
        found.append((f"{sampler} samples: bits per character under the judge", row["judge"]["mean"]))
        found.append((f"{sampler} samples: share of known words", row["known_words"]["mean"]))
    data = ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="text-generation",
        datasets=["roneneldan/TinyStories"],
        tags=[*TAGS, "custom_code"],
        model_name=names.name,
        eval_results=[result(names, metric, value, **measured) for metric, value in found],
    )
    return Card("model", data, facts, "stories.md")


def report_facts(results: dict, names: Names) -> dict:
    """Of the results of `training.report`."""
    as_they_are = ("num_samples", "num_shown", "seed", "dtype", "validation_characters", "parameters", "data")
    sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
    parts = {}
    for part, run in results["training"].items():
        parts[part] = {key: run[key] for key in ("steps", "minutes", "num_threads", "last_evaluation")}
        parts[part] |= {"command": names.command(run["command"]), "millions": run["tokens"] / 1e6}
    threads = [run["num_threads"] for run in parts.values()]  # 0: torch's default, which is not recorded
    return {key: results[key] for key in (*as_they_are, "samplers", "samples", "machine")} | names.facts() | {
        "command": names.command(results["command"]),
        "config": {size: results["config"][size] for size in sizes},
        "k": results["samplers"][-1]["num_candidates"],
        "window_high": 1.0,  # of every window of training.report
        "training": parts,
        "by_t": accuracies(parts["energy"]["last_evaluation"]),
        "hours": sum(run["minutes"] for run in parts.values()) / 60,
        "core_hours": sum(run["minutes"] * run["num_threads"] for run in parts.values()) / 60 if all(threads) else None,
        "threads": threads,
    }  # fmt: skip


def energy_card(names: Names) -> Card:
    log, likelihood = SHIPPED[names.name]
    is_light = names.name.endswith("-light")
    label = "blocks-2" if is_light else "step"  # what the results call it
    rows, results = read_lines(RESULTS / log), read_json(RESULTS / likelihood)
    last, config = evaluations(RESULTS / log)[-1], read_json(HUB_CARDS / names.name / MODEL)
    facts = names.facts() | training_time(rows, last) | {
        "text": "wiki27",
        "e": last,
        "by_t": accuracies(last),
        "metrics": names.link(log),
        "command": names.command(
            f"python -m training.train_energy --base hub_cards/{BASE} --data data/wiki27 --energy_target xs "
            + COMMANDS[names.name]
        ),
        "machine_of_training": TRAINED_ON[names.name],
        "bounds": bounds(likelihood, label, names),
        "pass_cost": results["energies"][label]["pass_cost"],
        "rename": label if is_light else None,
    }  # fmt: skip
    if is_light:
        whole = read_json(HUB_CARDS / BASE / MODEL)["num_hidden_layers"]
        facts |= {"layers": config["energy_num_layers"] or config["num_hidden_layers"], "all_layers": whole}
        facts |= {
            "other": names.other(f"{BASE}-step"),
            "pass_cost_of_other": results["energies"]["blocks-4"]["pass_cost"],
        }
    evaluated = telling_results(names, last, "wiki27", log) + bound_results(names, facts["bounds"], likelihood)
    data = ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="text-classification",
        base_model=names.base,
        base_model_relation="finetune",
        tags=[*TAGS, "custom_code"],
        model_name=names.name,
        eval_results=evaluated,
    )
    return Card("energy", data, facts, "energy.md")


def adapter_card(names: Names) -> Card:
    log, adapted, likelihood = SHIPPED[names.name]
    rows, results = read_lines(RESULTS / log), read_json(RESULTS / adapted)
    last, folder = evaluations(RESULTS / log)[-1], HUB_CARDS / names.name
    of_run = results["training"]
    training = {"num_candidates": of_run["num_candidates"], "command": names.command(of_run["command"])}
    gained = ("num_steps", "bits_per_token", "stderr")
    training["gains"] = [{key: gain[key] for key in gained} for gain in of_run["gains"]]
    facts = names.facts() | training_time(rows, last) | {
        "text": "classic-books",
        "training": training,
        "e": of_run["all"],
        "r": read_json(folder / ADAPTER)["r"],
        "parameters": num_parameters(folder / "adapter_model.safetensors"),
        "metrics": names.link(log),
        "file": names.link(adapted),
        "command": names.command(results["command"]),
        "machine_of_training": TRAINED_ON[names.name],
        "bounds": bounds(adapted, "adapted", names),
        "bounds_at_many": bounds(likelihood, "books", names),
    }  # fmt: skip
    evaluated = telling_results(names, last, "classic-books", log) + bound_results(names, facts["bounds"], adapted)
    data = ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="peft",
        pipeline_tag="text-generation",
        base_model=names.base,
        base_model_relation="adapter",
        tags=[*TAGS, "lora"],
        model_name=names.name,
        eval_results=evaluated,
    )
    return Card("adapter", data, facts, "adapter.md")


# ---- their facts and results


def evaluations(log: Path) -> list[dict]:
    """The rows of a metrics.jsonl that are measured on held-out text."""
    return [row for row in read_lines(log) if "seconds" in row]


def accuracies(evaluation: dict) -> list[dict]:
    """By bucket of t."""
    prefix = "accuracy_t<="
    return [{"t": float(key.removeprefix(prefix)), "accuracy": v} for key, v in evaluation.items() if prefix in key]


def training_time(rows: list[dict], last: dict) -> dict:
    tokens = next(row["tokens"] for row in rows if "tokens" in row)  # of one step
    seconds = last["seconds"]
    return {"steps": last["step"], "millions": last["step"] * tokens / 1e6} | {
        "minutes": seconds / 60,
        "hours": seconds / 3600,
    }


def rows_of(file: str) -> tuple[dict, dict]:
    """The file, and its part on the first data set."""
    results = read_json(RESULTS / file)
    return results, results["bounds"] if "bounds" in results else results["data"][0]


def row_of(file: str, **values) -> dict:
    (row,) = [row for row in rows_of(file)[1]["rows"] if row.items() >= values.items()]
    return row


def bounds(file: str, energy: str, names: Names, k: int = 8) -> dict:
    """The sampler's bound without and with an energy, for each number of steps, from a file of likelihoods."""
    results, data = rows_of(file)
    scale = data["tokens"] / data["characters"]
    plain = {row["num_steps"]: row for row in data["rows"] if row["estimator"] == "sampler" and row["energy"] is None}
    rows = [
        {
            "num_steps": row["num_steps"],
            "mdlm": plain[row["num_steps"]]["bits_per_character"],
            "edlm": row["bits_per_character"],
            "gain": {key: scale * value for key, value in row["gain"].items()},
            "ess": row["ess"],
        }
        for row in data["rows"]
        if (row["energy"], row["num_candidates"], row["energy_temperature"]) == (energy, k, 1)
    ]
    return {key: data[key] for key in ("name", "num_sequences", "length")} | {
        "k": k,
        "rows": sorted(rows, key=lambda row: row["num_steps"]),
        "continuous": row_of(file, estimator="mdlm")["bits_per_character"],
        "command": names.command(results["command"]),
        "file": names.link(file),
        "device_name": results.get("device_name"),
        "precision": results.get("precision"),
    }


def telling_results(names: Names, last: dict, dataset: str, file: str) -> list[EvalResult]:
    told = {"accuracy in telling the next state of the data from a proposal": last["validation_accuracy"]}
    told |= {"NCE loss": last["validation_nce_loss"]}
    where = {"dataset": dataset, "split": "validation", "file": file, "task": "text-classification"}
    return [result(names, metric, value, **where) for metric, value in told.items()]


def bound_results(names: Names, found: dict, file: str) -> list[EvalResult]:
    evaluated = [("MDLM in continuous time, bits per character at most", found["continuous"]["mean"])]
    for row in found["rows"]:
        T = row["num_steps"]
        evaluated.append((f"MDLM, {T} steps, bits per character at most", row["mdlm"]["mean"]))
        evaluated.append((f"EDLM, {T} steps, k={found['k']}, bits per character at most", row["edlm"]["mean"]))
    return [result(names, metric, value, found["name"], "test", file) for metric, value in evaluated]


def result(
    names: Names, metric: str, value: float, dataset: str, split: str, file: str, task: str = "text-generation"
) -> EvalResult:
    """An entry of the model-index. Its type is what the Hub calls an unknown metric: a name of its own."""
    kinds = {"accuracy": "accuracy", "NCE loss": "nce_loss", "nats": "token_entropy", "known words": "known_words"}
    kind = next((kind for word, kind in kinds.items() if word in metric), "bits_per_character")
    source = {"source_name": f"results/{file}", "source_url": names.url(file)} if names.repo else {}
    return EvalResult(
        task_type=task,
        dataset_type=dataset,
        dataset_name=dataset,
        dataset_split=split,
        metric_type=kind,
        metric_name=metric,
        metric_value=round(value, 4),
        **source,
    )


def num_parameters(*weights: Path) -> int:
    total = 0
    for path in weights:
        with safe_open(path, "np") as file:
            total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    return total
