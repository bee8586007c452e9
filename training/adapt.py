"""Fit a model to other text by an energy alone, and say what it gained: train, bound, sample, compare, in one command.

    python -m training.adapt --base hub_cards/edlm-wiki27 --data FOLDER --train "--lora_r 16 --max_steps 400" \
        --out hub_cards/results/adapt-books.json
    python -m training.adapt --from_json hub_cards/results/adapt-books.json

The denoiser is not changed. "Before" is the denoiser alone (MDLM) at the same number of steps; "after" is the same with
the energy. Started again, it goes on where it was stopped. The data need a train, a validation and a test split.

Shapes: B samples or texts, L length.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from .common.arguments import CommaLists, answer_early, command, parse_arguments

ENERGY = "adapted"


@dataclass(kw_only=True)
class AdaptArguments(CommaLists):
    base: str = field(default="", metadata={"help": "folder or repo of the model that is to be adapted"})
    data: str = field(default="", metadata={"help": "folder with train, validation and test splits, or a Hub data set"})
    train: str = field(default="--lora_r 16", metadata={"help": "options of training.train_energy, in quotes"})
    energies: str = field(default="", metadata={"help": "energies to compare with, e.g. nce@wiki=FOLDER"})
    num_steps: str = field(default="2,4,8,16,32", metadata={"help": "denoising steps T of the bound"})
    num_candidates: str = field(default="2,8", metadata={"help": "k of the bound; the samples have the largest"})
    num_sequences: int = field(default=200, metadata={"help": "test texts of the bound"})
    sample_steps: str = field(default="4,16", metadata={"help": "T of the samples"})
    num_samples: int = field(default=256, metadata={"help": "samples of each setting, and texts to compare with"})
    batch_size: int = 32
    energy_batch_size: int = 32
    mixed_precision: str = field(default="no", metadata={"help": "no or bf16, for training and bound"})
    seed: int = 0
    output_dir: str = field(default="", metadata={"help": "folder of the training run; default: runs/<name of out>"})
    cache_dir: str = field(default="", metadata={"help": "where token ids are kept; default: output_dir/tokens"})
    num_processes: int = field(default=1, metadata={"help": "processes of the bound, on CPUs"})
    num_threads: int = field(default=0, metadata={"help": "CPU threads; 0: torch's default"})
    out: str = field(default="", metadata={"help": "results, .json; the plot has the same name"})
    from_json: str = field(default="", metadata={"help": "measure nothing: tables and plot of this file again"})

    def __post_init__(self):
        if not self.output_dir:
            self.output_dir = str(Path("runs") / Path(self.out).stem)
        for name in ("base", "data", "out"):
            if not self.from_json and not getattr(self, name):
                raise ValueError(f"{name} must be given, got {getattr(self, name)!r}")
        for name in ("num_steps", "num_candidates", "sample_steps"):
            if not self.listed(name, int) or min(self.listed(name, int)) < 1:
                raise ValueError(f"{name} must be positive numbers with commas between, got {getattr(self, name)!r}")
        for name in ("num_sequences", "num_samples", "num_processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def stage(script: str, options: dict, more: str = "", num_processes: int = 1) -> None:
    if run_script(script, options, more, num_processes):
        raise SystemExit(f"training.{script} failed; the same command goes on")


def train(arguments: AdaptArguments, run: Path) -> dict:
    """Train the energy, unless it is there; what `train_energy` says of it."""
    if not (run / "evaluation.json").exists() or not (run / "model").exists():
        own = {name: getattr(arguments, name) for name in ("base", "data", "mixed_precision", "num_threads", "seed")}
        own |= {"output_dir": run, "cache_dir": cache(arguments)}
        own |= {"resume": "true"} if (run / "checkpoint.safetensors").exists() else {}
        stage("train_energy", own, arguments.train)
    return json.loads((run / "evaluation.json").read_text(encoding="utf-8"))


def cache(arguments: AdaptArguments) -> Path:
    return Path(arguments.cache_dir or Path(arguments.output_dir) / "tokens")


def energies(arguments: AdaptArguments) -> list[str]:
    return [f"nce@{ENERGY}={Path(arguments.output_dir) / 'model'}", *arguments.listed("energies")]


if __name__ == "__main__":
    answer_early(AdaptArguments, __doc__)

import torch
from matplotlib.figure import Figure
from transformers import AutoTokenizer

from modeling_edlm import EDLMModel

from .common.components import load_variants
from .common.data import PackedTokens, tokenize
from .common.metrics import ngram_divergence
from .common.results import machine, markdown, read_results, write_json, write_whole
from .common.stages import run_script
from .evaluate_likelihood import NUM_BUCKETS, name_of, number

NGRAMS = (1, 2, 3, 4)
NOT_RECORDED = {"output_dir", "cache_dir", "num_threads", "from_json", "num_processes"}


def bounds(arguments: AdaptArguments, run: Path) -> dict:
    """The sampler's bound on test texts, before and after: results of `evaluate_likelihood`."""
    out = run / "likelihood.json"
    names = [item.partition("=")[0].partition("@")[2] or item for item in energies(arguments)]
    options = {
        "model": arguments.base,
        "energies": ",".join(energies(arguments)),
        "only": ",".join(names),
        "data": arguments.data,
        "num_sequences": arguments.num_sequences,
        "estimators": "sampler,mdlm",
        "num_steps": arguments.num_steps,
        "num_candidates": arguments.num_candidates,
        "mixed_precision": arguments.mixed_precision,
        "batch_size": arguments.batch_size,
        "energy_batch_size": arguments.energy_batch_size,
        "seed": arguments.seed,
        "cache_dir": cache(arguments),
        "num_threads": -(-arguments.num_threads // arguments.num_processes),
        "out": out,
    }
    stage("evaluate_likelihood", options, num_processes=arguments.num_processes)
    return read_results(out)["data"][0]


@torch.no_grad()
def samples(arguments: AdaptArguments) -> tuple[list[dict], list[dict]]:
    """n-gram divergences of samples to test texts, before and after; and those of other texts of the data."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = EDLMModel.from_components(EDLMModel.from_pretrained(arguments.base, dtype=torch.float32).denoiser).eval()
    variants = load_variants(arguments.base, energies(arguments))
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    length, B = before.config.max_position_embeddings, arguments.num_samples

    def texts(split):
        tokens = tokenize(arguments.data, tokenizer, cache(arguments), split)
        blocks = PackedTokens(tokens, length)
        return [blocks[i * len(blocks) // B]["input_ids"].tolist() for i in range(min(B, len(blocks)))]

    references, others = texts("test"), texts("validation")
    floor = [{"n": n} | ngram_divergence(others, references, n, 200, arguments.seed) for n in NGRAMS]
    chosen = [("before", before, 1)] + [
        (name, model, max(arguments.listed("num_candidates", int)))
        for name, model in variants.items()
        if name in [item.partition("=")[0].partition("@")[2] for item in energies(arguments)]
    ]
    rows = []
    for name, model, k in chosen:
        model.to(device)
        for num_steps in arguments.listed("sample_steps", int):
            started, drawn, ess = time.perf_counter(), [], []
            for first in range(0, B, arguments.batch_size):
                output = model.generate(
                    batch_size=min(arguments.batch_size, B - first),
                    first_row=first,
                    num_steps=num_steps,
                    num_candidates=k,
                    energy_window=(1.0, 0.0),
                    corrector_steps=0,
                    energy_batch_size=arguments.energy_batch_size,
                    seed=arguments.seed,
                    return_dict_in_generate=True,
                )
                drawn += output.sequences.tolist()
                ess.append(output.ess)
            divergences = [{"n": n} | ngram_divergence(drawn, references, n, 200, arguments.seed) for n in NGRAMS]
            row = {"energy": name, "num_steps": num_steps, "num_candidates": k, "divergences": divergences}
            row["ess"] = float(torch.cat(ess).nanmean()) if k > 1 else None
            row |= {"seconds_per_sample": (time.perf_counter() - started) / B, "shown": tokenizer.decode(drawn[0])}
            rows.append(row)
            print(f"{name}, T={num_steps}: {B} samples", flush=True)
    return rows, floor


# ---- what is shown


def table(results: dict) -> str:
    """Markdown: the bound before and after with the gain and ESS, and the n-gram divergences of samples."""
    data = results["bounds"]
    steps = sorted({row["num_steps"] for row in data["rows"] if row["num_steps"]})
    head, lines = ["test text, bits per character, at most", *(f"T={T}" for T in steps)], []
    by_name = {}
    for row in data["rows"]:
        if row["estimator"] == "sampler":
            by_name.setdefault(name_of(row), {})[row["num_steps"]] = row
    scale = data["tokens"] / data["characters"]
    for name, rows in by_name.items():
        name = "before: MDLM" if name == "MDLM" else name
        lines.append([name, *(number(rows[T]["bits_per_character"]) for T in steps)])
    for name, rows in by_name.items():
        if name != "MDLM":
            lines.append(
                [f"gain, {name.removeprefix('EDLM ')}", *(number(rows[T]["gain"], scale, "+.4f") for T in steps)]
            )
            lines.append([f"ESS, {name.removeprefix('EDLM ')}", *(f"{rows[T]['ess']:.2f}" for T in steps)])
    bounds = markdown(head, lines)
    head = ["samples: divergence of n-grams to test text, bits", "T", "ESS", "s/sample", *(f"n={n}" for n in NGRAMS)]

    def cells(divergences):
        return [f"{d['divergence']:.4f} [{d['interval'][0]:.4f}, {d['interval'][1]:.4f}]" for d in divergences]

    lines = [["other text of the same kind", "", "", "", *cells(results["floor"])]]
    for row in results["samples"]:
        name = "before: MDLM" if row["energy"] == "before" else f"{row['energy']}, k={row['num_candidates']}"
        ess = "" if row["ess"] is None else f"{row['ess']:.2f}"
        lines.append([name, str(row["num_steps"]), ess, f"{row['seconds_per_sample']:.2f}", *cells(row["divergences"])])
    return f"{bounds}\n\n{markdown(head, lines)}"


def plot(results: dict, path: Path) -> None:
    """With the most candidates: gain against steps, ESS against t; divergences of samples against n."""
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    data = results["bounds"]
    rows = [row for row in data["rows"] if row["estimator"] == "sampler" and row["energy"]]
    k = max(row["num_candidates"] for row in rows)
    scale = data["tokens"] / data["characters"]
    for name in dict.fromkeys(row["energy"] for row in rows):
        here = [row for row in rows if (row["energy"], row["num_candidates"]) == (name, k)]
        gains = [scale * row["gain"]["mean"] for row in here]
        errors = [2 * scale * (row["gain"]["stderr"] or 0) for row in here]
        left.errorbar([row["num_steps"] for row in here], gains, errors, marker="o", capsize=3, label=name)
        last = here[-1]
        points = [(b["t_at_most"] - 0.5 / NUM_BUCKETS, b["ess"]) for b in last["by_time"] if b["ess"] is not None]
        middle.plot(*zip(*points, strict=True), marker="o", label=f"{name}, T={last['num_steps']}")
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter("{x:g}")
    left.axhline(0, color="gray", linewidth=0.8)
    left.set(xlabel="denoising steps T", ylabel="bits per character", title=f"gain over MDLM on test text, k={k}")
    middle.set(xlabel="t (1: all mask)", ylabel=f"effective sample size of {k}", xlim=(0, 1), ylim=(1, k))
    floor = results["floor"]
    right.plot([d["n"] for d in floor], [d["divergence"] for d in floor], "k--", label="other text of the same kind")
    for row in results["samples"]:
        divergences = row["divergences"]
        right.errorbar(
            [d["n"] for d in divergences],
            [d["divergence"] for d in divergences],
            [[max(0.0, d["divergence"] - d["interval"][0]) for d in divergences],
             [max(0.0, d["interval"][1] - d["divergence"]) for d in divergences]],
            marker="o", capsize=3, label=f"{row['energy']}, T={row['num_steps']}",
        )  # fmt: skip
    right.set(xlabel="n", ylabel="divergence of n-grams (bits)", yscale="log", title="samples", xticks=NGRAMS)
    for axes in (left, middle, right):
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110, format="png")


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(AdaptArguments, __doc__, argv)
    if arguments.from_json:
        results = read_results(arguments.from_json)
        write_whole(Path(arguments.from_json).with_suffix(".png"), lambda path: plot(results, path))
        print(table(results))
        return
    if arguments.num_threads:
        torch.set_num_threads(arguments.num_threads)
    run, out = Path(arguments.output_dir), Path(arguments.out)
    results = {"command": command("adapt", arguments, NOT_RECORDED), "seed": arguments.seed} | machine()
    results["training"] = train(arguments, run)
    results["bounds"] = bounds(arguments, run)
    results["samples"], results["floor"] = samples(arguments)
    write_whole(out.with_suffix(".png"), lambda path: plot(results, path))
    write_json(out, results)
    print(f"{table(results)}\n\nresults: {out}, .png\nadapter: {run / 'model'}")


if __name__ == "__main__":
    main()
