"""Train a family of models within given minutes: denoiser, autoregressive model, energies, one stage after the other.

    python -m training.family --family training/families/wiki27.yaml --data data/wiki27 --out runs/wiki27
    python -m training.family --family training/families/wiki27.yaml --data data/wiki27 --out runs/wiki27 \
        --stages nce --given denoiser=hub_cards/edlm-wiki27

A stage has its minutes, and keeps to them: short trials choose the learning rate and measure the speed, from which
follow the steps of the run; a run that is slower than its trial is stopped, and saved, by the clock. What a stage has
made is in OUT/models/NAME, in the precision in which it will be published: later stages start from that. The same
command goes on where it was stopped, and leaves out what is there.

The file of a family has `tokenizer`, `dtype` and `max_shard_size` of what is kept, `trial_minutes`, `options` of all
stages, and for each stage its `script` (pretrain or train_energy), `minutes`, `learning_rates`, and `options`, where
{NAME} is the model of another stage.
"""

import json
import re
import shlex
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import monotonic

import yaml

from .common.arguments import CommaLists, answer_early, command, parse_arguments


@dataclass(kw_only=True)
class FamilyArguments(CommaLists):
    family: str = field(metadata={"help": "the file that says what is trained, .yaml"})
    data: str = field(metadata={"help": "text with a training and a validation split, or a folder of packed tokens"})
    out: str = field(metadata={"help": "folder of everything; OUT/models has what was made, OUT/family.json the story"})
    stages: str = field(default="", metadata={"help": "names, with commas between; default: all"})
    given: str = field(default="", metadata={"help": "models that are there already, e.g. ar=FOLDER,denoiser=FOLDER"})
    options: str = field(default="", metadata={"help": "in quotes, for all stages that know them; the last word"})
    time_scale: float = field(default=1.0, metadata={"help": "all minutes are multiplied by this"})
    max_minutes: float = field(
        default=0.0, metadata={"help": "in all: a stage that would pass it is shorter; 0: no limit"}
    )

    def __post_init__(self):
        for name, least in {"time_scale": 0.0, "max_minutes": 0.0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if any("=" not in item for item in self.listed("given")):
            raise ValueError(f"given must be name=FOLDER, with commas between, got {self.given!r}")


if __name__ == "__main__":
    answer_early(FamilyArguments, __doc__)

import torch
from matplotlib.figure import Figure
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from modeling_edlm import EDLMEnergyModel
from modeling_edlm.adapter import DESCRIPTION

from .common.checkpoint import run_facts
from .common.results import machine, read_lines, read_results, replaced_folder, write_json, write_whole
from .common.stages import run_script
from .pretrain import PretrainArguments, load_trained
from .train_energy import EnergyArguments

SCRIPTS = {"pretrain": PretrainArguments, "train_energy": EnergyArguments}
MARGIN = 0.93  # of the minutes are planned for: a run may be a little slower than its trial, and is evaluated
EVALUATIONS = 8  # of a run
WARMUP = 0.03  # of the steps of a run
TRIAL_WARMUP = 30  # steps


@dataclass(kw_only=True)
class Stage:
    name: str
    script: str
    minutes: float
    learning_rates: list[float]
    options: dict

    def __post_init__(self):
        if self.script not in SCRIPTS:
            raise ValueError(f"stage {self.name}: script must be one of {tuple(SCRIPTS)}, got {self.script!r}")
        if self.minutes <= 0 or not self.learning_rates:
            found = f"{self.minutes} and {self.learning_rates}"
            raise ValueError(f"stage {self.name} needs minutes and learning_rates, got {found}")
        if unknown := sorted(self.options.keys() - SCRIPTS[self.script].__dataclass_fields__.keys()):
            raise ValueError(f"stage {self.name}: training.{self.script} has no option {unknown}")


@dataclass(kw_only=True)
class Family:
    tokenizer: str
    dtype: str = "bfloat16"
    max_shard_size: str = "15MB"
    trial_minutes: float = 0.5
    options: dict = field(default_factory=dict)
    stages: dict = field(default_factory=dict)

    @classmethod
    def read(cls, path: str) -> "Family":
        """ValueError names what is wrong in the file."""
        try:
            family = cls(**yaml.safe_load(Path(path).read_text(encoding="utf-8")))
            stages = {name: Stage(name=name, **{"options": {}} | values) for name, values in family.stages.items()}
        except (OSError, yaml.YAMLError, TypeError, AttributeError) as error:
            raise ValueError(f"family {path!r} cannot be read: {error}") from error
        family.stages = stages
        if family.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"family {path!r}: dtype must be float32, bfloat16 or float16, got {family.dtype!r}")
        return family


class Work:
    """One family being trained in one folder."""

    def __init__(self, arguments: FamilyArguments):
        self.arguments, self.family, self.out = arguments, Family.read(arguments.family), Path(arguments.out)
        names = arguments.listed("stages") or list(self.family.stages)
        if unknown := [name for name in names if name not in self.family.stages]:
            raise ValueError(f"stages must be of {list(self.family.stages)}, got {unknown}")
        self.stages = [self.family.stages[name] for name in names]
        self.given = dict(item.split("=", 1) for item in arguments.listed("given"))
        more = shlex.split(arguments.options)
        if len(more) % 2 or any(not name.startswith("--") for name in more[::2]):
            raise ValueError(f"options must be --name value, in quotes, got {arguments.options!r}")
        self.more = {name[2:]: value for name, value in zip(more[::2], more[1::2], strict=True)}
        self.started, self.not_run = monotonic(), []

    def model(self, name: str) -> str:
        """The folder of the model of a stage, made here or given."""
        if name not in self.given and name not in self.family.stages:
            raise ValueError(f"{{{name}}} is no stage of {self.arguments.family!r}, and no model of that name is given")
        return self.given.get(name) or str(self.out / "models" / name)

    def options(self, stage: Stage) -> dict:
        known = SCRIPTS[stage.script].__dataclass_fields__
        own = {"data": self.arguments.data, "cache_dir": self.out / "tokens"}
        own |= {"tokenizer": self.family.tokenizer} if "tokenizer" in known else {}
        options = own | {k: v for k, v in self.family.options.items() if k in known} | stage.options
        options |= {k: v for k, v in self.more.items() if k in known}
        filled = {k: re.sub(r"\{(\w+)\}", lambda m: self.model(m[1]), v) if isinstance(v, str) else v
                  for k, v in options.items()}  # fmt: skip
        return {k: str(v).lower() if isinstance(v, bool) else v for k, v in filled.items()}

    def minutes(self, stage: Stage) -> float:
        """What a stage has, trials included."""
        minutes = stage.minutes * self.arguments.time_scale
        if self.arguments.max_minutes:
            minutes = min(minutes, self.arguments.max_minutes - (monotonic() - self.started) / 60)
        return minutes

    def train(self, stage: Stage) -> None:
        run, kept = self.out / stage.name, Path(self.model(stage.name))
        if kept.exists():
            print(f"{stage.name}: {kept} is there")
            return
        begun, minutes = monotonic(), self.minutes(stage)
        plan_path = run / "plan.json"
        if not plan_path.exists():
            plan = None
            if minutes > 2 * self.trial_minutes * len(stage.learning_rates):
                trials = [self.trial(stage, rate) for rate in stage.learning_rates]
                minutes -= (monotonic() - begun) / 60
                plan = planned(trials, minutes, stage.name)
            if plan is None:
                self.not_run.append(stage.name)
                print(f"{stage.name}: not run, its minutes are too few for its trials and a run")
                return
            write_json(plan_path, plan)
        plan = json.loads(plan_path.read_text(encoding="utf-8"))
        own = {name: plan[name] for name in ("learning_rate", "max_steps", "warmup_steps", "eval_steps")}
        own = own | {k: v for k, v in self.options(stage).items() if k != "learning_rate"} | {"output_dir": run}
        used = 0.0
        if (run / "checkpoint.safetensors").exists():
            own |= {"resume": "true"}
            with safe_open(run / "checkpoint.safetensors", "pt") as file:
                used = float(file.metadata()["seconds"]) / 60
        own |= {"max_minutes": max(min(minutes, plan["minutes"] - used), 1e-9)}
        if run_script(stage.script, own):
            raise SystemExit(f"{stage.name}: training.{stage.script} failed; the same command goes on")
        keep(run / "model", kept, self.family)
        print(f"{stage.name}: {kept}")

    @property
    def trial_minutes(self) -> float:
        return self.family.trial_minutes * self.arguments.time_scale

    def trial(self, stage: Stage, learning_rate: float) -> dict:
        """A short run at a constant rate, and an evaluation as the run will have on its way."""
        folder = self.out / stage.name / "trials" / f"{learning_rate:g}"
        shutil.rmtree(folder, ignore_errors=True)
        own, known = self.options(stage), SCRIPTS[stage.script].__dataclass_fields__
        own |= {"learning_rate": learning_rate, "lr_schedule": "constant_with_warmup", "warmup_steps": TRIAL_WARMUP}
        own |= {"max_steps": 10**9, "eval_steps": 10**9, "max_minutes": self.trial_minutes, "output_dir": folder}
        own |= {"final_eval_blocks": own.get("eval_blocks", known["eval_blocks"].default)}
        own |= {"eval_sequences": 0} if "eval_sequences" in known else {}
        begun = monotonic()
        found = {"learning_rate": learning_rate, "failed": run_script(stage.script, own) != 0}
        rows = read_lines(folder / "metrics.jsonl")
        for weights in (folder / "checkpoint.safetensors", folder / "model"):  # large, and of no more use
            shutil.rmtree(weights) if weights.is_dir() else weights.unlink(missing_ok=True)
        curve = [[row["step"], row["loss"]] for row in rows if "loss" in row]
        if found["failed"]:
            return found
        if len(curve) < 4:
            logged = f"a trial of {self.trial_minutes:g} minutes logged {len(curve)} times"
            raise ValueError(f"{stage.name}: {logged}: it needs more trial_minutes, or fewer log_steps")
        speeds = [row["steps_per_second"] for row in rows if "steps_per_second" in row]
        speed = median(speeds[len(speeds) // 2 :])
        return found | {
            "steps_per_second": speed,
            "evaluation_seconds": rows[-1]["evaluation_seconds"],
            "other_seconds": monotonic() - begun - curve[-1][0] / speed - rows[-1]["evaluation_seconds"],
            "curve": curve,
        }

    def story(self) -> dict:
        """What was done in this folder, by all commands so far: of runs that are no longer there, what was written."""
        path = self.out / "family.json"
        stages = read_results(str(path))["stages"] if path.exists() else {}
        for name, stage in self.family.stages.items():
            if facts := run_facts(self.out / name, stage.script, SCRIPTS[stage.script]):
                plan = json.loads((self.out / name / "plan.json").read_text(encoding="utf-8"))
                stages[name] = facts | {"plan": plan}
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        about = {"command": command("family", self.arguments), "device_name": device} | machine()
        return about | {"stages": stages, "not_run": self.not_run}


def planned(trials: list[dict], minutes: float, name: str) -> dict | None:
    """The learning rate of the lowest loss at the same steps, and how many steps the minutes have; None for none.

    A trial's loss is the mean over the second half of the steps that all trials which did not fail have made.
    """
    whole = [trial for trial in trials if not trial["failed"]]
    if not whole:
        raise SystemExit(f"{name}: every trial failed")
    common = min(trial["curve"][-1][0] for trial in whole)
    for trial in whole:
        late = [loss for step, loss in trial["curve"] if common / 2 < step <= common]
        trial["loss"] = sum(late) / len(late)
    best = min(whole, key=lambda trial: trial["loss"])
    seconds = MARGIN * 60 * minutes - best["other_seconds"] - EVALUATIONS * best["evaluation_seconds"]
    max_steps = int(best["steps_per_second"] * seconds)
    if max_steps < 1:
        return None
    return {
        "learning_rate": best["learning_rate"],
        "minutes": minutes - best["other_seconds"] / 60,
        "max_steps": max_steps,
        "warmup_steps": max(1, round(WARMUP * max_steps)),
        "eval_steps": max(1, max_steps // EVALUATIONS),
        "trials": trials,
    }


def keep(model: Path, kept: Path, family: Family) -> None:
    """What a run has made, in the precision and the files in which it is published. An adapter stays as it is."""
    with replaced_folder(kept) as folder:
        if (model / DESCRIPTION).exists():
            shutil.copytree(model, folder, dirs_exist_ok=True)
            return
        is_energy = AutoConfig.from_pretrained(model).architectures == ["EDLMEnergyModel"]
        whole = EDLMEnergyModel.from_pretrained(model) if is_energy else load_trained(str(model))
        whole.to(getattr(torch, family.dtype)).save_pretrained(folder, max_shard_size=family.max_shard_size)
        AutoTokenizer.from_pretrained(model).save_pretrained(folder)


def plot(story: dict, path: Path) -> None:
    """Validation bits per token against minutes, and the accuracy of energies."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, metric, label in (
        (left, "validation_bits_per_token", "validation bits per token"),
        (right, "validation_accuracy", "held-out accuracy (chance 0.5)"),
    ):
        for name, stage in story["stages"].items():
            if points := [(row["seconds"] / 60, row[metric]) for row in stage["curve"] if metric in row]:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
                axes.legend()
        axes.set(xlabel="minutes", ylabel=label)
    figure.suptitle(story["device_name"] or story["cpu_name"], fontsize="small")
    figure.savefig(path, dpi=110, format="png")


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(FamilyArguments, __doc__, argv)
    work = Work(arguments)
    for stage in work.stages:
        work.options(stage)  # raises before anything has run
    out = work.out / "family.json"
    try:
        for stage in work.stages:
            work.train(stage)
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on") from None
    finally:
        story = work.story()
        write_json(out, story)
        write_whole(out.with_suffix(".png"), lambda path: plot(story, path))
        for name, stage in story["stages"].items():
            last = stage["last_evaluation"] or {}
            found = ", ".join(f"{k} {v:.4g}" for k, v in last.items() if k.startswith("validation_") and "<=" not in k)
            steps = f"{stage['steps']} of {stage['planned_steps']} steps"
            print(f"{name}: {steps}, {stage['minutes']:.1f} min; {found}")
        print(f"models: {work.out / 'models'}\nresults: {out}, .png")


if __name__ == "__main__":
    main()
