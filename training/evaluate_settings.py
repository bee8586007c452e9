"""Which steps, candidates, window and corrector a model should have: a grid of them on the valid bound and on samples.

    python -m training.evaluate_settings --model hub_cards/edlm-stories --judge hub_cards/edlm-stories:judge \
        --data data/tinystories-sample --out hub_cards/results/settings-stories.json
    python -m training.evaluate_settings --from_json hub_cards/results/settings-stories.json

The bound of every k and window at one T comes from the same draws: outside its window an energy adds nothing. Samples
of all settings have the same seeds; those of the corrector have no bound. The setting that is chosen is the one whose
samples the judge finds best, among those that cost about `--passes` passes; it and MDLM, which may take as many steps,
are sampled at each of `--temperatures`, all others at the first one. What is finished is kept in a .jsonl beside
`--out`, and the same command goes on where it was stopped.

Shapes: B texts, J draws for each, C values of k, L length.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from .common.arguments import CommaLists, answer_early, command, generation_config, parse_arguments


@dataclass(kw_only=True)
class SettingsArguments(CommaLists):
    model: str = field(default="", metadata={"help": "folder or repo of the model, with its tokenizer"})
    energies: str = field(default="", metadata={"help": "more energies, e.g. nce=hub_cards/edlm-stories-step"})
    judge: str = field(default="", metadata={"help": "folder or repo, with :subfolder where needed; not the energy"})
    data: str = field(default="", metadata={"help": "held-out text for the bound"})
    split: str = "validation"
    out: str = field(default="", metadata={"help": "results, .json; the chart has the same name, but for .png"})
    num_steps: str = field(default="8,16,32,64", metadata={"help": "T, with commas between"})
    num_candidates: str = field(default="2,4,8", metadata={"help": "k besides 1, which is MDLM"})
    windows: str = field(default="1:0,0.4:0,0.25:0", metadata={"help": "hi:lo, the energy acts at t in [lo, hi]"})
    correctors: str = field(default="", metadata={"help": "rounds:size:k:temperature, e.g. 64:8:2:0.25,64:8:2:1"})
    temperatures: str = field(default="1", metadata={"help": "of the samples: the first; of the chosen setting: all"})
    shared_completion: bool = field(default=True, metadata={"help": "of candidates, for energies of x0"})
    num_sequences: int = field(default=48, metadata={"help": "texts of the bound, evenly spaced"})
    num_times: int = field(default=4, metadata={"help": "draws of the bound for each text"})
    inner_samples: int = field(default=4, metadata={"help": "inner samples of the bound for each draw"})
    num_samples: int = field(default=24, metadata={"help": "of each setting"})
    frontier_samples: int = field(
        default=0, metadata={"help": "of the chosen setting, and MDLM, at each temperature; 0: num_samples"}
    )
    sample_dtype: str = field(default="float32", metadata={"help": "or bfloat16, where the machine is faster in it"})
    passes: float = field(default=64, metadata={"help": "the setting that is chosen costs about so many"})
    tolerance: float = field(default=0.15, metadata={"help": "what about means: up to this share more or fewer"})
    seed: int = 0
    num_threads: int = field(default=0, metadata={"help": "CPU threads; 0: torch's default"})
    from_json: str = field(default="", metadata={"help": "measure nothing, print the tables of this file again"})

    def __post_init__(self):
        if self.from_json:
            return
        for name in ("model", "judge", "data", "out"):
            if not getattr(self, name):
                raise ValueError(f"{name} must be given, got {getattr(self, name)!r}")
        if not self.out.endswith(".json"):
            raise ValueError(f"out must end in .json, got {self.out!r}")
        if self.sample_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"sample_dtype must be float32 or bfloat16, got {self.sample_dtype!r}")
        least = {
            "num_sequences": 2,
            "frontier_samples": 0,
            "num_times": 1,
            "inner_samples": 1,
            "num_samples": 2,
            "passes": 1,
        }
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}, got {getattr(self, name)}")
        for name, smallest in {"num_steps": 1, "num_candidates": 2}.items():
            if min(self.listed(name, int), default=0) < smallest:
                raise ValueError(f"{name} must be at least {smallest}, got {getattr(self, name)!r}")
        for window in self.all_windows:
            generation_config(energy_window=window)  # checks it
        for rounds, size, k, temperature in self.all_correctors:
            revision = {"corrector_steps": rounds, "corrector_size": size, "corrector_temperature": temperature}
            generation_config(num_candidates=k, **revision)
        for temperature in self.listed("temperatures", float):
            generation_config(temperature=temperature)

    @property
    def all_windows(self) -> list[tuple[float, float]]:
        return self.tuples("windows", float, "hi:lo")

    @property
    def all_correctors(self) -> list[tuple[int, int, int, float]]:
        found = self.tuples("correctors", float, "rounds:size:k:temperature")
        return [(int(rounds), int(size), int(k), temperature) for rounds, size, k, temperature in found]


if __name__ == "__main__":
    answer_early(SettingsArguments, __doc__)

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import AutoTokenizer

from modeling_edlm import EDLMGenerationConfig, EDLMModel
from modeling_edlm.likelihood import likelihood_terms

from .common.checkpoint import fingerprint, weights_hash
from .common.components import load_variants, pass_cost
from .common.data import spread_blocks
from .common.judge import Judge, entropies
from .common.metrics import LN2, ratio
from .common.results import Store, machine, read_results, write_json, write_whole
from .common.settings import chosen, kind_of, label, table

NOTES = {
    "bound": "bits per character of whole rows, an upper bound for the sampler that runs; gain: by how much the energy "
    "lowers it on the same draws; stderr over texts",
    "corrector": "rounds after the last step, positions masked in each, temperature; the energy acts in no step then",
    "samples": "up to their EOS; judge: bits per character under a model that is not the energy; known_words: share of "
    "the words that its training text has; entropy: of a text's own token frequencies, in nats",
    "passes": "nfe + pass_cost * energy_nfe, each as counted by generate(); pass_cost: parameters of the energy over "
    "those of the denoiser, embeddings left out",
}


def bounds(model: EDLMModel, x0_BL: torch.Tensor, characters_B, num_steps: int, arguments) -> list[dict]:
    """The bound without energy, and with it for each k and window, at one T."""
    ks = sorted(arguments.listed("num_candidates", int))
    parts = [
        likelihood_terms(
            model,
            x0_BL[b : b + 1],
            generation_config=EDLMGenerationConfig(),  # of the proposal as it is, and before any revision
            settings=[(k, 1.0) for k in ks],
            num_steps=num_steps,
            energy_window=(1.0, 0.0),
            shared_completion=arguments.shared_completion,
            num_samples=arguments.inner_samples,
            num_times=arguments.num_times,
            seed=arguments.seed,
            first_row=b,
        )
        for b in tqdm(range(len(x0_BL)), desc=f"bound, T={num_steps}", leave=False)
    ]
    t_BJ, mdlm_BJ = (torch.cat([getattr(part, name) for part in parts]) for name in ("t_BJ", "mdlm_BJ"))
    nll_BJC = torch.cat([part.nll_BJC for part in parts])
    rows = [{"num_candidates": 1, "window": None} | {"bound": ratio(mdlm_BJ.mean(1) / LN2, characters_B)}]
    for window in arguments.all_windows:
        inside_BJ = (window[1] - 1e-9 <= t_BJ) & (t_BJ <= window[0] + 1e-9)
        for c, k in enumerate(ks):
            nll_B = torch.where(inside_BJ, nll_BJC[..., c], mdlm_BJ).mean(1) / LN2
            gain = ratio(mdlm_BJ.mean(1) / LN2 - nll_B, characters_B)
            rows.append(
                {"num_candidates": k, "window": list(window), "bound": ratio(nll_B, characters_B), "gain": gain}
            )
    return rows


def samples(model: EDLMModel, judge: Judge, setting: dict, size: int, arguments) -> dict:
    """What the samples of a setting cost and what the judge says of them."""
    model.to(getattr(torch, arguments.sample_dtype))
    begun = time.perf_counter()
    output = model.generate(
        batch_size=size,
        num_steps=setting["num_steps"],
        num_candidates=setting["num_candidates"],
        energy_window=tuple(setting["window"] or (1.0, 0.0)),
        corrector_steps=setting["corrector"][0],
        corrector_size=setting["corrector"][1],
        corrector_temperature=setting["corrector"][2],
        shared_completion=arguments.shared_completion,
        temperature=setting["temperature"],
        seed=arguments.seed,
        return_dict_in_generate=True,
    )
    seconds = time.perf_counter() - begun
    model.float()  # the bounds are exact in this alone
    x_BL, eos = output.sequences, judge.tokenizer.eos_token_id
    found = judge.read(x_BL)
    return {
        "judge": ratio(found["bits"], found["characters"]),
        "known_words": ratio(found["known_words"]),
        "entropy": ratio(entropies(x_BL, eos)),
        "characters": ratio(found["characters"]),
        "nfe": float(output.nfe.double().mean()),
        "energy_nfe": float(output.energy_nfe.double().mean()),
        "passes": float((output.nfe + pass_cost(model) * output.energy_nfe).double().mean()),
        "seconds_per_sample": seconds / size,
        "per_sample": {name: found[name].tolist() for name in ("bits", "characters", "known_words")},
    }


def steps_of_mdlm(passes: float, length: int) -> int:
    """At which MDLM is expected to take as many passes: a step that reveals none of `length` tokens costs nothing."""
    return min(range(1, 8 * length), key=lambda T: abs(T * (1 - (1 - 1 / T) ** length) - passes))


def plot(results: dict, path: Path) -> None:
    """The gain in the bound against T, a line for each k and window; judge's bits and known words against passes, a
    point for each setting. Two standard errors.
    """
    figure = Figure(figsize=(16, 4.6), layout="constrained")
    of_bound, *of_samples = figure.subplots(1, 3)
    rows = results["rows"]
    by_label = {}
    for row in rows:
        if row.get("gain"):
            by_label.setdefault(label(row), []).append(row)
    for name, group in by_label.items():
        steps = [row["num_steps"] for row in group]
        gains, errors = zip(*((row["gain"]["mean"], 2 * row["gain"]["stderr"]) for row in group), strict=True)
        of_bound.errorbar(steps, gains, errors, marker="o", markersize=4, capsize=2, label=name)
    of_bound.axhline(0, color="black", linewidth=1)
    of_bound.set(xlabel="steps", title="bits per character that the energy takes off the bound")
    kinds = {"MDLM": "black", "energy within the steps": "tab:orange", "corrector after them": "tab:blue"}
    panels = (("judge's bits per character", "judge"), ("share of known words", "known_words"))
    for axes, (title, name) in zip(of_samples, panels, strict=True):
        for kind, color in kinds.items():
            group = [row for row in rows if kind_of(row) == kind]
            if not group:
                continue
            spent = [row["samples"]["passes"] for row in group]
            values = [row["samples"][name] for row in group]
            means, errors = zip(*((value["mean"], 2 * value["stderr"]) for value in values), strict=True)
            line = "-" if kind == "MDLM" else ""
            axes.errorbar(
                spent, means, errors, linestyle=line, marker="o", markersize=4, color=color, label=kind, alpha=0.7
            )
        axes.axhline(results["data"][name]["mean"], color="gray", linestyle="--", label="held-out text")
        axes.set(xlabel="passes for a sample", title=title)
    for axes in (of_bound, *of_samples):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=110, format="png")


def plot_frontier(results: dict, path: Path) -> None:
    """Judge's bits against token entropy, a point for each temperature; one standard error both ways."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes, groups = figure.subplots(), {}
    for row in results["temperatures"]:
        groups.setdefault(row["energy"] is None, []).append(row)
    for is_mdlm, color in ((True, "black"), (False, "tab:blue")):
        group = groups.get(is_mdlm, [])
        if not group:
            continue
        name = f"{'MDLM' if is_mdlm else 'EDLM'}, {np.mean([row['samples']['passes'] for row in group]):.0f} passes"
        (x, of_x), (y, of_y) = (
            zip(*((row["samples"][key]["mean"], row["samples"][key]["stderr"]) for row in group), strict=True)
            for key in ("entropy", "judge")
        )
        axes.errorbar(x, y, of_y, of_x, marker="o", capsize=3, color=color, label=name)
        for row, where in zip(group, zip(x, y, strict=True), strict=True):
            axes.annotate(f"{row['temperature']:g}", where, xytext=(5, 5), textcoords="offset points", fontsize="small")
    data = results["data"]
    axes.plot(data["entropy"]["mean"], data["judge"]["mean"], "*", markersize=12, color="gray", label="held-out text")
    axes.set(xlabel="token entropy of a text, nats", ylabel="judge's bits per character (lower is better)")
    axes.set_title("equal passes; the numbers are temperatures", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110, format="png")


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(SettingsArguments, __doc__, argv)
    if arguments.from_json:
        print(table(read_results(arguments.from_json)))
        return
    if arguments.num_threads:
        torch.set_num_threads(arguments.num_threads)
    out, tokenizer = Path(arguments.out), AutoTokenizer.from_pretrained(arguments.model)
    variants = load_variants(arguments.model, arguments.listed("energies"))
    if not variants:
        raise ValueError(f"model must have an energy, or energies be given, got {arguments.model!r}")
    judge = Judge.load(arguments.judge, tokenizer)
    weights = {name: weights_hash(model) for name, model in variants.items()}
    weights_of_judge = judge.weights_hash([model.energy_model for model in variants.values()], arguments.judge)

    first = next(iter(variants.values()))
    length, eos = first.config.max_position_embeddings, tokenizer.eos_token_id
    of_text = out.parent / "tokens", arguments.split, arguments.num_sequences
    x0_BL = spread_blocks(arguments.data, tokenizer, length, *of_text)
    characters_B = np.array([len(judge.text(x0_L)) for x0_L in x0_BL])
    of_data = judge.read(x0_BL)

    store, rows = Store(out.with_suffix(".jsonl")), []
    knobs = ("seed", "shared_completion", "inner_samples", "num_times", "num_sequences", "num_candidates", "windows")
    same = {name: getattr(arguments, name) for name in knobs} | {"text": fingerprint(x0_BL)}
    for num_steps in arguments.listed("num_steps", int):
        for name, model in variants.items():
            key = same | {"bound": name, "num_steps": num_steps, "weights": weights[name]}
            make = (bounds, model, x0_BL, characters_B, num_steps, arguments)
            for row in store.row(key, lambda make=make: make[0](*make[1:])):
                if row["window"] is None and name != next(iter(variants)):
                    continue  # MDLM is the same for all
                rows.append({"energy": name if row["window"] else None, "num_steps": num_steps} | row)
            for rounds, size, k, of_rounds in arguments.all_correctors:
                setting = {"num_steps": num_steps, "num_candidates": k, "window": [0.0, 0.0]}  # no step has t = 0
                rows.append({"energy": name} | setting | {"corrector": [rounds, size, of_rounds], "bound": None})

    temperature = arguments.listed("temperatures", float)[0]

    def sampled(row: dict, size: int = arguments.num_samples) -> dict:
        row = row | {"corrector": row.get("corrector", [0, 1, 1.0]), "temperature": row.get("temperature", temperature)}
        model = variants[row["energy"]] if row["energy"] else first
        knobs = ("num_steps", "num_candidates", "window", "corrector", "temperature")
        setting = {name: row[name] for name in knobs}
        key = setting | {"samples": size, "seed": arguments.seed, "judge": weights_of_judge}
        key |= {"weights": weights[row["energy"] or next(iter(variants))], "shared": arguments.shared_completion}
        key |= {"dtype": arguments.sample_dtype}
        return row | {"samples": store.row(key, lambda: samples(model, judge, setting, size, arguments))}

    rows = [sampled(row) for row in tqdm(rows, desc="samples", unit="setting")]
    best = chosen(rows, arguments.passes, arguments.tolerance)
    temperatures = []
    for other in arguments.listed("temperatures", float) if best else ():
        steps = steps_of_mdlm(best["samples"]["passes"], length)
        plain = {"energy": None, "num_steps": steps, "num_candidates": 1, "window": None, "temperature": other}
        size = arguments.frontier_samples or arguments.num_samples
        temperatures += [sampled(plain, size), sampled(best | {"temperature": other}, size)]
    recorded = {"out", "num_threads", "from_json"}
    results = {
        "command": command("evaluate_settings", arguments, recorded - {"out"}),
        "arguments": {name: value for name, value in vars(arguments).items() if name not in recorded | {"data"}},
        **machine(),
        "notes": NOTES,
        "pass_cost": {name: pass_cost(model) for name, model in variants.items()},
        "data": {
            "judge": ratio(of_data["bits"], of_data["characters"]),
            "known_words": ratio(of_data["known_words"]),
            "entropy": ratio(entropies(x0_BL, eos)),
        },
        "chosen": best,
        "rows": rows,
        "temperatures": temperatures,
    }  # fmt: skip
    write_json(out, results)
    charts = {out.with_suffix(".png"): plot, out.with_name(f"{out.stem}-frontier.png"): plot_frontier}
    for path, draw in charts.items():
        write_whole(path, lambda temporary, draw=draw: draw(results, temporary))
    print(table(results))
    print(f"\nresults: {out}\ncharts: {', '.join(map(str, charts))}")


if __name__ == "__main__":
    main()
