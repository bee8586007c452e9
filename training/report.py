"""Measure a finished folder and say how it was trained: the results JSON that the card is made from, and its plot.

    python -m training.report --model hub_cards/edlm-wiki27 --runs runs --data FOLDER

Reads `runs/denoiser`, `runs/ar` and `runs/energy` as the training scripts leave them, or what `training.family` says of
its stages. The AR model of the folder's
`ar/` is the scorer; it is not the energy.

Shapes: B samples, L length.
"""

import platform
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from tqdm.auto import tqdm

from .common.arguments import CommaLists, answer_early, command, parse_arguments


@dataclass(kw_only=True)
class ReportArguments(CommaLists):
    model: str = field(metadata={"help": "the finished folder, with a scorer in ar/"})
    runs: str = field(metadata={"help": "folder of the runs ar, denoiser and energy, or training.family's family.json"})
    energy: str = field(default="energy", metadata={"help": "the stage of a family that has trained the energy"})
    data: str = field(metadata={"help": "the text whose validation split is the reference"})
    out: str = field(default="", metadata={"help": "default: results/<name of the folder>.json beside the folder"})
    num_steps: str = field(default="8,16,128", metadata={"help": "settings of T, with commas between"})
    window_lows: str = field(
        default="0,0,0.8", metadata={"help": "for each of them, the energy acts at t in [this, 1]"}
    )
    num_candidates: int = 8
    num_samples: int = 32
    num_shown: int = field(default=3, metadata={"help": "samples that the card shows: the first ones, last setting"})
    seed: int = 0
    cache_dir: str = field(default="", metadata={"help": "where token ids are kept; default: tokens/ beside out"})

    def __post_init__(self):
        if len(self.listed("num_steps", int, False)) != len(self.listed("window_lows", float, False)):
            raise ValueError(
                f"window_lows needs one value for each of num_steps={self.num_steps}, got {self.window_lows}"
            )


if __name__ == "__main__":
    answer_early(ReportArguments, __doc__)

import matplotlib
import torch
from transformers import AutoTokenizer

from modeling_edlm import EDLMForCausalLM, EDLMModel

from .common.checkpoint import run_facts
from .common.data import PackedTokens, tokenize
from .common.metrics import bits_per_character, summary, token_entropy
from .common.results import read_results, write_json
from .pretrain import PretrainArguments
from .train_energy import EnergyArguments

matplotlib.use("Agg")
PRETRAIN = ("pretrain", PretrainArguments)
SCRIPTS = {"ar": PRETRAIN, "denoiser": PRETRAIN, "energy": ("train_energy", EnergyArguments)}


def training_facts(arguments: ReportArguments) -> dict[str, dict]:
    """By part: what is known of its training."""
    if arguments.runs.endswith(".json"):
        stages = read_results(arguments.runs)["stages"]
        return {name: stages[arguments.energy if name == "energy" else name] for name in SCRIPTS}
    return {name: run_facts(Path(arguments.runs) / name, *script) for name, script in SCRIPTS.items()}


def main(argv: list[str] | None = None):
    arguments = parse_arguments(ReportArguments, __doc__, argv)
    folder = Path(arguments.model)
    out = Path(arguments.out or folder.parent / "results" / f"{folder.name}.json")
    model, scorer = EDLMModel.from_pretrained(folder), EDLMForCausalLM.from_pretrained(folder, subfolder="ar")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    L = model.config.max_position_embeddings

    blocks = PackedTokens(
        tokenize(arguments.data, tokenizer, arguments.cache_dir or out.parent / "tokens", "validation"), L
    )
    chosen = torch.linspace(0, len(blocks) - 1, arguments.num_samples).long().tolist()
    data_BL = torch.stack([blocks[i]["input_ids"] for i in chosen])
    data = {"bits_per_character": summary(bits_per_character(scorer, data_BL))}
    data |= {"token_entropy": summary(token_entropy(data_BL))}
    rows, samples = [], {}
    windows = arguments.listed("window_lows", float, distinct=False)
    for num_steps, low in zip(arguments.listed("num_steps", int, distinct=False), windows, strict=True):
        for name, k in (("MDLM", 1), ("EDLM", arguments.num_candidates)):
            progress = tqdm(total=num_steps, desc=f"{name}, {num_steps} steps", mininterval=1)
            started = time.perf_counter()
            output = model.generate(
                batch_size=arguments.num_samples,
                num_steps=num_steps,
                num_candidates=k,
                energy_window=(1.0, low),
                corrector_steps=0,
                seed=arguments.seed,
                return_dict_in_generate=True,
                callback_on_step_end=lambda *_, bar=progress: bar.update(),
            )
            progress.close()
            rows.append(
                {
                    "sampler": name,
                    "num_steps": num_steps,
                    "num_candidates": k,
                    "window_low": low,
                    "nfe": float(output.nfe.double().mean()),
                    "energy_nfe": float(output.energy_nfe.double().mean()),
                    "seconds_per_sample": (time.perf_counter() - started) / arguments.num_samples,
                    "bits_per_character": summary(bits_per_character(scorer, output.sequences)),
                    "token_entropy": summary(token_entropy(output.sequences)),
                    "ess": None if k == 1 else float(output.ess.nanmean()),
                }
            )
            samples[name] = tokenizer.batch_decode(output.sequences[: arguments.num_shown])  # of the last setting
    results = {
        "command": command("report", arguments, {"cache_dir", "out"}),
        "num_samples": arguments.num_samples,
        "num_shown": arguments.num_shown,
        "seed": arguments.seed,
        "config": model.config.fields(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "validation_characters": len(blocks.tokens),
        "parameters": {"denoiser": model.denoiser.num_parameters(), "energy": model.energy_model.num_parameters()}
        | {"ar": scorer.num_parameters()},
        "training": training_facts(arguments),
        "data": data,
        "samplers": rows,
        "samples": samples,
        "machine": f"{platform.machine()}, {model.device.type}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "accelerate")},
    }
    write_json(out, results)
    plot(results["training"], out.with_suffix(".png"))
    print(f"results: {out}\nplot: {out.with_suffix('.png')}")


def plot(training: dict, path: Path) -> None:
    """Validation bits per character, and NCE accuracy, against minutes of training."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for name, label in (("denoiser", "denoiser (MDLM bound)"), ("ar", "autoregressive")):
        curve = training[name]["curve"]
        minutes, bits = zip(*((row["seconds"] / 60, row["validation_bits_per_token"]) for row in curve), strict=True)
        left.plot(minutes, bits, marker="o", label=label)
    left.set(xlabel="minutes", ylabel="validation bits per character")
    left.legend()
    curve = training["energy"]["curve"]
    right.plot([row["seconds"] / 60 for row in curve], [row["validation_accuracy"] for row in curve], marker="o")
    right.axhline(0.5, color="gray", linestyle="--")
    right.set(xlabel="minutes", ylabel="held-out NCE accuracy (chance 0.5)")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
