"""What each optimisation of the sampler is worth: milliseconds of a step with all of them, and without one at a time.

    python -m bench.ablation
    python -m bench.ablation --from_json hub_cards/results/ablation-cpu.json

Random weights of the benchmark's sizes; the candidates that are equal are counted on a trained model. All variants of a
row take turns, and the best of some runs counts. "Without" is the plain form of the same law, by replacing a function.
"""

import shlex
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

from tqdm.auto import tqdm

from training.common.arguments import CommaLists, answer_early, parse_arguments

from .arguments import OWN_SIZES, SIZES


@dataclass(kw_only=True)
class AblationArguments(CommaLists):
    num_steps: int = field(default=16, metadata={"help": "denoising steps T"})
    num_candidates: int = field(default=4, metadata={"help": "k, where there is an energy"})
    batch_sizes: str = "1"
    repeats: int = field(default=4, metadata={"help": "runs of each variant, of which the best counts"})
    trained: str = field(default="hub_cards/edlm-wiki27", metadata={"help": "model whose candidates are compared"})
    trained_energy: str = field(default="hub_cards/edlm-wiki27-light", metadata={"help": "its energy"})
    trained_steps: str = field(default="16,64,256", metadata={"help": "T of these"})
    out: str = "hub_cards/results/ablation-cpu.json"
    from_json: str = field(default="", metadata={"help": "measure nothing, print and draw this file again"})


if __name__ == "__main__":
    answer_early(AblationArguments, __doc__)

import torch
from matplotlib.figure import Figure

import modeling_edlm.backbone
import modeling_edlm.energies
import modeling_edlm.generation_edlm
import modeling_edlm.proposal
from modeling_edlm import EDLMModel
from training.common.results import machine, read_results, write_json, write_whole

from .measure import random_model


def draw_over_the_whole_vocabulary(logits_MV, u_MK):
    """One cumulative sum in float64 over the log-probabilities of each row."""
    log_p_MV = logits_MV.log_softmax(-1)
    cdf_MV = (log_p_MV - log_p_MV.amax(-1, keepdim=True)).to(u_MK.dtype).exp().cumsum(-1)
    x_MK = torch.searchsorted(cdf_MV, u_MK * cdf_MV[:, -1:], right=True).clamp_(max=log_p_MV.shape[-1] - 1)
    return x_MK, log_p_MV.gather(-1, x_MK)


def draw_each_candidate(logits_MV, u_MK):
    """A Gumbel pass over the vocabulary for each candidate, as published, but with float32 noise."""
    x = [(logits_MV - torch.rand_like(logits_MV).log_().neg_().log_()).argmax(-1) for _ in range(u_MK.shape[1])]
    x_MK = torch.stack(x, dim=-1)
    return x_MK, logits_MV.log_softmax(-1).gather(-1, x_MK)


def every_position(where_NL, device):
    return None


def all_different(x_NKL):
    P = torch.arange(x_NKL.shape[0] * x_NKL.shape[1], device=x_NKL.device)
    return P, P


MODULES = modeling_edlm.backbone, modeling_edlm.proposal, modeling_edlm.energies, modeling_edlm.generation_edlm
table = (MODULES[0].Head, "is_large", property(lambda self: False))
WITHOUT = {  # what is replaced by what; draws from a table need the table
    "all of them": (),
    "vocabulary in blocks": (table,),
    "vocabulary in blocks, draws of two levels": (table, (MODULES[1], "draw", draw_over_the_whole_vocabulary)),
    "vocabulary in blocks, one pass for all candidates": (table, (MODULES[1], "draw", draw_each_candidate)),
    "last block at needed positions": ((MODULES[0], "needed_positions", every_position),),
    "oneDNN": ((MODULES[0], "_has_onednn", lambda x, weight: False),),
    "constants made once": ((MODULES[3], "fixed_weights", ExitStack),),
}


def measure(call: Callable[[], object], repeats: int) -> dict[str, list[float]]:
    """Seconds of each variant."""
    seconds = {name: [] for name in WITHOUT}
    for repeat in range(repeats + 1):
        for name, replacements in WITHOUT.items():
            with ExitStack() as stack:
                for replacement in replacements:
                    stack.enter_context(patch.object(*replacement))
                start = time.perf_counter()
                call()
                if repeat:  # the first warms up
                    seconds[name].append(time.perf_counter() - start)
    return seconds


def candidates(arguments: AblationArguments) -> list[dict]:
    """Energy passes of a trained model with equal candidates scored once, and all of them."""
    model, rows = EDLMModel.from_pretrained(arguments.trained).load_energy(arguments.trained_energy), []
    for num_steps in arguments.listed("trained_steps", int):
        options = {"num_steps": num_steps, "num_candidates": arguments.num_candidates, "energy_window": (1.0, 0.0)}
        options |= {"batch_size": 8, "seed": 0, "return_dict_in_generate": True}
        row = {"num_steps": num_steps}
        for name, replacement in (("distinct", None), ("all", all_different)):
            with ExitStack() as stack:
                if replacement is not None:
                    stack.enter_context(patch.object(modeling_edlm.energies, "distinct", replacement))
                start = time.perf_counter()
                output = model.generate(**options)
                row[name] = {
                    "energy_nfe": float(output.energy_nfe.double().mean()),
                    "seconds_per_sample": (time.perf_counter() - start) / 8,
                }
        rows.append(row)
    return rows


def text(results: dict) -> str:
    names = list(WITHOUT)[1:]
    lines = ["| size | energy | batch | ms per step | " + " | ".join(f"without {name}" for name in names) + " |"]
    lines.append("| --- | --- | ---: | ---: |" + " ---: |" * len(names))
    for row in results["rows"]:
        best = {name: min(seconds) / results["num_steps"] * 1e3 for name, seconds in row["seconds"].items()}
        cells = [row["size"], row["energy"], str(row["batch_size"]), f"{best['all of them']:.1f}"]
        cells += [f"{best[name]:.1f} ({best[name] / best['all of them']:.2f}x)" for name in names]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| T | energy passes, equal candidates once | all | s/sample, once | all |"]
    lines.append("| ---: | ---: | ---: | ---: | ---: |")
    for row in results["candidates"]:
        once, every = row["distinct"], row["all"]
        cells = [f"{row['num_steps']}", f"{once['energy_nfe']:.0f}", f"{every['energy_nfe']:.0f}"]
        cells += [f"{once['seconds_per_sample']:.2f}", f"{every['seconds_per_sample']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results: dict, path: Path) -> None:
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes, rows = figure.add_subplot(), results["rows"]
    for i, name in enumerate(list(WITHOUT)[1:]):
        ratios = [min(row["seconds"][name]) / min(row["seconds"]["all of them"]) for row in rows]
        axes.barh([j + (i - 2.5) * 0.14 for j in range(len(rows))], ratios, 0.13, label=f"without {name}")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"{row['size']}, {row['energy']}, batch {row['batch_size']}" for row in rows])
    axes.set(xlabel="time of a step, with all of them = 1")
    axes.invert_yaxis()
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120, format="png")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(AblationArguments, __doc__, argv)
    if arguments.from_json:
        results, out = read_results(arguments.from_json), Path(arguments.from_json)
    else:
        out = Path(arguments.out)
        recorded = shlex.join(["python", "-m", "bench.ablation", *argv])
        results = {"command": recorded, "num_steps": arguments.num_steps, "num_candidates": arguments.num_candidates}
        results |= machine() | {"rows": [], "candidates": candidates(arguments)}
        todo = [(size, energy) for size in SIZES["cpu"] for energy in ("none", "ar", "nce")]
        for size, energy in tqdm(todo):
            model = random_model(energy, dict(zip(OWN_SIZES, SIZES["cpu"][size], strict=True)), "cpu", torch.float32)
            for batch_size in arguments.listed("batch_sizes", int):

                def call(model=model, batch_size=batch_size):
                    window = {"energy_window": (1.0, 0.8), "num_candidates": arguments.num_candidates}
                    model.generate(batch_size=batch_size, num_steps=arguments.num_steps, seed=0, **window)

                seconds = measure(call, arguments.repeats)
                results["rows"].append({"size": size, "energy": energy, "batch_size": batch_size, "seconds": seconds})
                write_json(out, results)
    write_whole(out.with_suffix(".png"), lambda path: plot(results, path))
    print(text(results))
    print(f"\nresults: {out}, {out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
