"""What the card of a family of stories shows: how it was trained, unpicked texts side by side, and what a judge says.

    python -m hub_cards.publish.showcase --model hub_cards/edlm-stories --out hub_cards/results/edlm-stories.json \
        --runs "denoiser=runs/stories/denoiser,step=runs/stories/step"

Texts of the autoregressive model, of MDLM and of EDLM with the folder's defaults, at one temperature; MDLM has as many
passes as EDLM, or as many as it can use: free ones, continued prompts, and a filled gap. Of free texts the judge also
reads those of MDLM with rounds of revision: EDLM's steps and rounds without its energy, and with the passes of the
energy as further rounds. Runs are added to those that the file has already, part by part. A chart of the runs, if there
are any, lies beside it.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from training.common.arguments import CommaLists, answer_early, command, parse_arguments


@dataclass(kw_only=True)
class ShowcaseArguments(CommaLists):
    model: str = field(metadata={"help": "the finished folder, with a judge in judge/"})
    out: str = field(metadata={"help": "results, .json; the chart has the same name, but for .png"})
    runs: str = field(default="", metadata={"help": "runs to add, e.g. ar=FOLDER,denoiser=FOLDER"})
    num_samples: int = field(default=32, metadata={"help": "free texts of each sampler that the judge reads"})
    num_shown: int = field(default=6, metadata={"help": "of these, the first so many are shown"})
    dtype: str = field(default="float32", metadata={"help": "of the samplers: or bfloat16, where that is faster"})
    seed: int = 0

    def __post_init__(self):
        if not 2 <= self.num_shown <= self.num_samples:
            raise ValueError(f"num_shown must lie in [2, num_samples={self.num_samples}], got {self.num_shown}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")
        for item in self.listed("runs"):
            if not Path(item.partition("=")[2], "metrics.jsonl").is_file():
                raise ValueError(f"runs must be part=FOLDER with a metrics.jsonl in each folder, got {item!r}")


if __name__ == "__main__":
    answer_early(ShowcaseArguments, __doc__)

import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from transformers import AutoTokenizer

from modeling_edlm import EDLMModel
from training.common.checkpoint import run_facts
from training.common.continuation import continue_left
from training.common.judge import Judge, before_end, entropies, lead
from training.common.metrics import ratio, summary
from training.common.results import machine, read_lines, read_results, write_json, write_whole
from training.pretrain import PretrainArguments
from training.train_energy import EnergyArguments

from ..demo import GAP, steps_of_mdlm, with_blanks

PROMPTS = (
    "Once upon a time, there was a little dog named Max. Max",
    "One day, a boy named Tim went to the park with his mom.",
    "The big bear was sad because",
)
ENERGIES = ("step",)
REVISED = "MDLM, revised"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
DEFAULTS = ("num_steps", "num_candidates", "energy_window", "corrector_steps", "corrector_size", "temperature")
DEFAULTS += ("corrector_temperature",)


class Writer:
    """The samplers of a folder."""

    def __init__(self, arguments: ShowcaseArguments):
        self.model = EDLMModel.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        self.judge, self.seed = Judge.load(f"{arguments.model}:judge", self.tokenizer), arguments.seed
        self.mask, self.longest = self.model.config.mask_token_id, self.model.config.max_position_embeddings

    def write(self, sampler: str, start: list[int], size: int) -> dict:
        """`size` texts in place of the masks of `start`: ids (B, L), passes of each text, seconds of all."""
        blanks, defaults = start.count(self.mask), self.model.generation_config
        begun = time.perf_counter()
        if sampler == "AR":
            how = self.mask, size, defaults.temperature, self.seed
            x_BL = continue_left(self.model.energy_model, self.tokenizer, start, *how)
        elif sampler == REVISED:
            k = defaults.corrector_candidates or defaults.most_candidates  # passes of a round with an energy
            output = self.model.denoiser.generate(
                torch.tensor([start]),
                generation_config=defaults,
                num_return_sequences=size,
                seed=self.seed,
                corrector_steps=defaults.corrector_steps * k,
                return_dict_in_generate=True,
            )
            x_BL, passes_B = output.sequences, output.nfe
        else:
            of_mdlm = {"num_steps": steps_of_mdlm(self.model, blanks, defaults.num_steps), "num_candidates": 1}
            settings = of_mdlm if sampler == "MDLM" else {}
            output = self.model.generate(
                torch.tensor([start]),
                num_return_sequences=size,
                seed=self.seed,
                return_dict_in_generate=True,
                **settings,
            )
            x_BL, passes_B = output.sequences, output.nfe + output.energy_nfe
        if sampler == "AR":  # one pass for each new token, up to the end of the text
            passes_B = before_end(x_BL, self.tokenizer.eos_token_id).sum(-1).clamp(max=blanks)
        return {"ids": x_BL, "passes": passes_B.tolist(), "seconds": time.perf_counter() - begun}


def measured(writer: Writer, found: dict, start: list[int]) -> dict:
    """What the judge says of texts, from the first blank on."""
    x_BL, first = found["ids"], start.index(writer.mask)
    read = writer.judge.read(x_BL, (torch.arange(x_BL.shape[1]) >= first).expand_as(x_BL))
    entropy = torch.tensor(entropies(x_BL, writer.tokenizer.eos_token_id), dtype=torch.float64)
    return {
        "judge": ratio(read["bits"], read["characters"]),
        "known_words": summary(torch.tensor(read["known_words"])),
        "token_entropy": summary(entropy),
        "passes": float(np.mean(found["passes"])),
        "seconds_per_sample": found["seconds"] / len(x_BL),
        "per_sample": {name: read[name].tolist() for name in ("bits", "characters")},
    }


def adapters(folder: Path) -> dict[str, int]:
    """Parameters of the energies that lie in the folder as adapters."""
    sizes = {}
    for part in ENERGIES:
        if (weights := folder / part / ADAPTER_WEIGHTS).exists():
            sizes[part] = sum(value.numel() for value in load_file(weights).values())
    return sizes


def curve(run: Path) -> list[dict]:
    """The evaluations of a run, by its minutes."""
    names = ("validation_bits_per_character", "validation_bits_per_token", "validation_bits_stderr")
    names += ("validation_accuracy", "validation_nce_loss")
    rows = [row for row in read_lines(run / "metrics.jsonl") if "seconds" in row]
    return [
        {"step": row["step"], "minutes": row["seconds"] / 60} | {n: row[n] for n in names if n in row} for row in rows
    ]


def add_runs(training: dict, arguments: ShowcaseArguments) -> dict:
    """The runs of each part, the earlier ones first; one that is there already, by its command, is replaced."""
    for item in arguments.listed("runs"):
        part, _, folder = item.partition("=")
        script = ("train_energy", EnergyArguments) if part in ENERGIES else ("pretrain", PretrainArguments)
        facts = run_facts(Path(folder), *script)
        kept = ("command", "steps", "planned_steps", "tokens", "minutes", "num_threads")
        run = {name: facts[name] for name in kept} | {"curve": curve(Path(folder)), "machine": machine()["cpu_name"]}
        others = [run_ for run_ in training.get(part, []) if run_["command"] != run["command"]]
        training[part] = [*others, run]
    return training


def plot(training: dict, path: Path) -> None:
    """Validation bits per character against minutes; the runs of a part one after another."""
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    for part, runs in training.items():
        before, points = 0.0, []
        for run in runs:
            name = "validation_bits_per_character"
            points += [(before + row["minutes"], row[name]) for row in run["curve"] if name in row]
            before += run["minutes"]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=part)
    axes.set(xlabel="minutes on two CPU cores", ylabel="validation bits per character")
    axes.set_ylim(top=2.0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110, format="png")


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(ShowcaseArguments, __doc__, argv)
    out = Path(arguments.out)
    earlier = read_results(arguments.out) if out.exists() else {}
    writer = Writer(arguments)
    tokenizer, free = writer.tokenizer, [writer.mask] * writer.longest
    tasks = {"free": free}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        tasks[prompt] = ids + [writer.mask] * (writer.longest // 2 - len(ids))
    tasks[GAP] = with_blanks(GAP, tokenizer, writer.mask, writer.longest)
    texts, samplers = [], {}
    with tqdm(total=3 * len(tasks) + 1, unit="text") as bar:
        for task, start in tasks.items():
            for sampler in ("AR", "MDLM", REVISED, "EDLM"):
                if sampler == REVISED and (task != "free" or not writer.model.generation_config.corrector_steps):
                    continue
                size = arguments.num_samples if task == "free" else 1
                found = writer.write(sampler, start, size)
                shown = range(arguments.num_shown if task == "free" else 1)
                facts = {"task": task, "sampler": sampler, "seconds": found["seconds"] / size}
                texts += (
                    []
                    if sampler == REVISED
                    else [
                        facts | {"row": i, "passes": found["passes"][i], "text": text(found["ids"][i], writer)}
                        for i in shown
                    ]
                )
                if task == "free":
                    samplers[sampler] = measured(writer, found, start)
                bar.update()
    defaults = writer.model.generation_config
    results = {
        "command": command("hub_cards.publish.showcase", arguments, {"runs"}),
        **machine(),
        "num_samples": arguments.num_samples,
        "num_shown": arguments.num_shown,
        "seed": arguments.seed,
        "dtype": arguments.dtype,
        "parameters": {
            "denoiser": writer.model.denoiser.num_parameters(),
            "ar": writer.model.energy_model.num_parameters(),
            "judge": writer.judge.scorer.num_parameters(),
        }
        | adapters(Path(arguments.model)),
        "defaults": {name: getattr(defaults, name) for name in DEFAULTS},
        "samplers": samplers,
        "lead": lead(samplers["MDLM"], samplers["EDLM"]),
        "lead_of_energy": lead(samplers[REVISED], samplers["EDLM"]) if REVISED in samplers else None,
        "texts": texts,
        "training": add_runs(earlier.get("training", {}), arguments),
    }
    write_json(out, results)
    if results["training"]:
        write_whole(out.with_suffix(".png"), lambda path: plot(results["training"], path))
        print(f"chart: {out.with_suffix('.png')}")
    for sampler, row in samplers.items():
        print(f"{sampler}: judge {row['judge']['mean']:.3f} +- {row['judge']['stderr']:.3f} bits per character, "
              f"known words {row['known_words']['mean']:.3f} +- {row['known_words']['stderr']:.3f}, "
              f"{row['passes']:.0f} passes, {row['seconds_per_sample']:.2f} s")  # fmt: skip
    print(f"results: {out}")


def text(x_L: torch.Tensor, writer: Writer) -> str:
    return writer.judge.text(x_L[before_end(x_L[None], writer.tokenizer.eos_token_id)[0]])


if __name__ == "__main__":
    main()
