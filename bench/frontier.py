"""Quality of free texts against forward passes: denoiser alone, with the energy, with rounds of revision, and others.

    python -m bench.frontier --model hub_cards/edlm-stories --judge hub_cards/edlm-stories:judge \
        --out hub_cards/results/frontier-stories.json --dtype bfloat16
    python -m bench.frontier --from_json hub_cards/results/frontier-stories.json

All methods have the same seeds and temperature:

- `mdlm`, the denoiser alone: as many steps as there may be passes. It has no use for more passes than tokens.
- `remdm`: the same, but tokens are masked again (bench/remdm.py).
- `mdlm-rounds`: steps of the denoiser with half the passes, `--num_steps` at most, then rounds of revision without an
  energy. It is the fair baseline of the other rounds, and is made wherever these are.
- `best-of-n`: n texts of `mdlm`, of which the likeliest under the energy's AR model is kept.
- `edlm`: the energy acts in the last steps. `edlm-rounds`: in the rounds alone. `edlm-both`: in both.
- `ar`: the AR model itself, a token a pass.

One run of rounds, or of n texts, gives all the points on its way. The judge has no part in any text. What is finished
is kept in a .jsonl beside `--out`, and the same command goes on where it was stopped. The chart is a .png beside it.

Shapes: B texts, K candidates, L length, M selected positions, V vocabulary.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from training.common.arguments import CommaLists, answer_early, command, generation_config, parse_arguments

METHODS = {
    "mdlm": "MDLM",
    "remdm": "MDLM, ReMDM",
    "mdlm-rounds": "MDLM, rounds",
    "best-of-n": "MDLM, best of n",
    "edlm": "EDLM",
    "edlm-rounds": "EDLM, rounds",
    "edlm-both": "EDLM, both",
    "ar": "AR",
}
ROUNDS = ("mdlm-rounds", "edlm-rounds", "edlm-both")
SCHEDULES = ("cap", "rescale", "loop")


@dataclass(kw_only=True)
class FrontierArguments(CommaLists):
    model: str = field(default="", metadata={"help": "folder or repo of a model with an AR energy, and its tokenizer"})
    judge: str = field(default="", metadata={"help": "folder or repo, with :subfolder where needed; not the energy"})
    out: str = field(default="", metadata={"help": "results, .json; the chart has the same name, but for .png"})
    methods: str = field(
        default=",".join(METHODS), metadata={"help": "with commas between; any with rounds brings mdlm-rounds along"}
    )
    passes: str = field(default="8,16,32,64,128,256,512,1024", metadata={"help": "about so many for a text"})
    num_samples: int = field(default=64, metadata={"help": "texts of each method"})
    batch_size: int = field(default=16, metadata={"help": "texts made at a time"})
    temperature: float | None = field(default=None, metadata={"help": "of all methods; default: the folder's own"})
    num_steps: int = field(default=64, metadata={"help": "steps before the rounds at most, and of each of n texts"})
    loop_candidates: int = field(default=2, metadata={"help": "k of the steps in which the energy acts"})
    loop_window: str = field(default="0.4:0", metadata={"help": "hi:lo, it acts at t in [lo, hi]"})
    corrector_candidates: int = field(default=2, metadata={"help": "k of the rounds"})
    corrector_size: int | None = field(default=None, metadata={"help": "of the rounds; default: the folder's own"})
    corrector_temperature: float | None = field(default=None, metadata={"help": "likewise"})
    remdm_schedule: str = field(default="cap", metadata={"help": "cap, rescale or loop"})
    remdm_eta: float | None = field(default=None, metadata={"help": "default: 0.04 for cap, 0.015, 0.02 for loop"})
    data: str = field(default="", metadata={"help": "held-out text, whose own scores are a row; default: no such row"})
    split: str = "validation"
    mauve: bool = field(default=False, metadata={"help": "MAUVE against `data`, from the judge's states"})
    dtype: str = field(default="float32", metadata={"help": "of the samplers: or bfloat16, where that is faster"})
    seed: int = 0
    num_threads: int = field(default=0, metadata={"help": "CPU threads; 0: torch's default"})
    from_json: str = field(default="", metadata={"help": "measure nothing, print and draw this file again"})

    def __post_init__(self):
        if self.from_json:
            return
        for name in ("model", "judge", "out"):
            if not getattr(self, name):
                raise ValueError(f"{name} must be given, got {getattr(self, name)!r}")
        if not self.out.endswith(".json"):
            raise ValueError(f"out must end in .json, got {self.out!r}")
        if not self.listed("methods") or not set(self.listed("methods")) <= METHODS.keys():
            raise ValueError(f"methods must be of {','.join(METHODS)}, got {self.methods!r}")
        if min(self.listed("passes", int), default=0) < 2:
            raise ValueError(f"passes must be at least 2, got {self.passes!r}")
        least = {"num_samples": 2, "batch_size": 1, "loop_candidates": 2, "corrector_candidates": 2, "num_threads": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}, got {getattr(self, name)}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")
        if self.remdm_schedule not in SCHEDULES:
            raise ValueError(f"remdm_schedule must be one of {','.join(SCHEDULES)}, got {self.remdm_schedule!r}")
        if self.remdm_eta is not None and not 0 <= self.remdm_eta <= 1:
            raise ValueError(f"remdm_eta must lie in [0, 1], got {self.remdm_eta}")
        if self.mauve and not self.data:
            raise ValueError(f"mauve needs data to compare with, got data={self.data!r}")
        given = ("temperature", "corrector_size", "corrector_temperature")
        given = {name: getattr(self, name) for name in given if getattr(self, name) is not None}
        generation_config(num_steps=self.num_steps, energy_window=self.window, **given)  # checks them

    @property
    def window(self) -> tuple[float, float]:
        try:
            hi, lo = (float(part) for part in self.loop_window.split(":"))
        except ValueError:
            raise ValueError(f"loop_window must be hi:lo, got {self.loop_window!r}") from None
        return hi, lo

    @property
    def chosen(self) -> list[str]:
        """The methods in their order, and the fair baseline of every method with rounds."""
        listed = self.listed("methods")
        return [m for m in METHODS if m in listed or (m == "mdlm-rounds" and set(listed) & set(ROUNDS))]


if __name__ == "__main__":
    answer_early(FrontierArguments, __doc__)

import torch
from matplotlib.figure import Figure
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hub_cards.demo import expected_passes
from modeling_edlm import EDLMGenerationConfig, EDLMModel
from training.common.checkpoint import fingerprint
from training.common.components import pass_cost
from training.common.continuation import continue_left
from training.common.data import spread_blocks
from training.common.judge import Judge, before_end, entropies, lead
from training.common.metrics import hidden_features, mauve, ratio, repetition_rate
from training.common.results import Store, machine, markdown, read_results, write_json, write_whole

from . import remdm

NEXT_TEXT = 1_000_003  # between the seeds of the n texts of one row
NUM_SHOWN = 2
SCORES = {
    "judge": "judge's bits per character",
    "known_words": "known words",
    "entropy": "token entropy, nats",
    "distinct_2": "distinct-2",
    "repetition": "rep-4",
}
NOTES = {
    "passes": "nfe + energy_nfe, as counted; of `ar` the tokens of the text, each a pass of one token; pass_cost: "
    "parameters of the energy over those of the denoiser, embeddings left out",
    "scores": "of texts up to their EOS, mean and standard error over texts; judge: bits per character under a model "
    "that is not the energy; known_words: share of the words that its training text has; entropy: of a text's own "
    "token frequencies, in nats; distinct_2: share of the pairs of tokens of a text that were not in it before; "
    "repetition: share of the runs of 4 tokens that were",
    "seconds_per_sample": "in batches of batch_size; of a point on the way of a longer run, until there",
}


def jobs(arguments: FrontierArguments, config: EDLMGenerationConfig, length: int) -> list[dict]:
    """The runs to make: method, settings, and points, each a target of passes and the mark at which the run has
    about so many: rounds, or texts of n, or 0 for its end."""
    targets, most, window = sorted(arguments.listed("passes", int)), arguments.num_steps, arguments.window
    names = ("corrector_candidates", "corrector_size", "corrector_temperature")
    of_rounds = {name: getattr(config, name) for name in names}
    in_loop = {"num_candidates": arguments.loop_candidates, "energy_window": list(window)}
    without = {"num_candidates": 2, "energy_window": [0.0, 0.0]}  # no step has t = 0; with k = 1 there are no rounds

    def cost(T: int, settings: dict) -> float:
        return expected_passes(length, T, generation_config(**settings).candidates_at)

    def steps(passes: float, settings: dict) -> int:
        return min(range(1, 8 * length), key=lambda T: abs(cost(T, settings) - passes))

    found: list[dict] = []
    for method in arguments.chosen:
        runs: dict[int, tuple[dict, list]] = {}  # by their steps
        for target in targets if method != "ar" else [length]:
            settings, mark, T = {}, 0, target
            if method == "remdm":
                schedule = arguments.remdm_schedule
                eta = remdm.ETA[schedule] if arguments.remdm_eta is None else arguments.remdm_eta
                settings = {"schedule": schedule, "eta": eta}
            elif method == "edlm":
                settings = in_loop
                if (T := steps(target, settings)) in runs:
                    continue  # it cannot use more
            elif method == "best-of-n":
                T, mark = most, round(target / (most + 1))
                if mark < 2:
                    continue
            elif method in ROUNDS:
                settings = (in_loop if method == "edlm-both" else without) | of_rounds
                T = min(most, steps(target / 2, settings))
                has_energy = method != "mdlm-rounds"
                of_each = config.corrector_candidates if has_energy else 1  # the present text was scored before
                mark = max(1, round((target - cost(T, settings) - has_energy) / of_each))
            runs.setdefault(T, (settings, []))[1].append([target, mark])
        for T, (settings, points) in runs.items():
            found.append({"method": method, "settings": {"num_steps": T} | settings, "points": points})
    return found


def to_the_end(x_BL: torch.Tensor, eos: int | None) -> list[list[int]]:
    """The ids of each text up to its end, that included."""
    return [x_L[end_L].tolist() for x_L, end_L in zip(x_BL, before_end(x_BL, eos), strict=True)]


class Writer:
    """The samplers of a model. Each gives what a row of the store holds: for each point the ids up to the end of each
    text, the passes of both networks, and the seconds that all of it took."""

    def __init__(self, model: EDLMModel, tokenizer: PreTrainedTokenizerBase, config: EDLMGenerationConfig, seed: int):
        self.model, self.tokenizer, self.config, self.seed = model, tokenizer, config, seed
        self.length, self.mask = model.config.max_position_embeddings, model.config.mask_token_id
        self.ar = Judge(model.energy_model, tokenizer, set())  # as a reader of texts

    def write(self, job: dict, first_row: int, size: int) -> list[dict]:
        self.begun, method, model, settings = time.perf_counter(), job["method"], self.model, job["settings"]
        if method == "best-of-n":
            return self.best(job, first_row, size)
        if method not in ("ar", "remdm"):
            return self.generated(job, first_row, size)
        if method == "ar":
            seed, blanks = self.seed + first_row * NEXT_TEXT, [self.mask] * self.length
            how = self.mask, size, self.config.temperature, seed
            x_BL = continue_left(model.energy_model, self.tokenizer, blanks, *how)
            nfe_B = before_end(x_BL, self.tokenizer.eos_token_id).sum(-1)
        else:
            moves = remdm.moves(settings["schedule"], settings["num_steps"], settings["eta"])
            how = moves, self.seed, first_row, self.at_temperature
            x_BL, nfe_B = remdm.sample(model.denoiser, size, self.length, *how)
        return [self.point(x_BL, nfe_B, torch.zeros_like(nfe_B))]

    def at_temperature(self, row_M, states_ML, logits_MV: torch.Tensor, positions_M) -> torch.Tensor:
        return logits_MV / self.config.temperature

    def point(self, x_BL: torch.Tensor, nfe_B: torch.Tensor, energy_nfe_B: torch.Tensor) -> dict:
        seconds = time.perf_counter() - self.begun
        ids = to_the_end(x_BL, self.tokenizer.eos_token_id)
        return {"ids": ids, "nfe": nfe_B.tolist(), "energy_nfe": energy_nfe_B.tolist(), "seconds": seconds}

    def generated(self, job: dict, first_row: int, size: int) -> list[dict]:
        """`generate()`, and the texts at each mark on the way of its rounds."""
        marks, T = [mark for _, mark in job["points"]], job["settings"]["num_steps"]
        model = self.model if job["method"].startswith("edlm") else self.model.denoiser
        kept, scored = {}, []

        def record(_, step: int, t: float, state: dict) -> None:
            if (done := step + 1 - T) < 1:
                return
            if model.scorer is not None:  # equal candidates are scored once, and the present text not again
                scored.append(torch.tensor([len(x_KL.unique(dim=0)) for x_KL in state["candidates"][:, 1:]]))
            if done in marks:
                none_B = torch.zeros(size, dtype=torch.int64)
                kept[done] = self.point(state["sequences"], none_B, none_B)

        output = model.generate(
            generation_config=self.config,
            batch_size=size,
            first_row=first_row,
            seed=self.seed,
            corrector_steps=max(marks),
            callback_on_step_end=record,
            **job["settings"],
        )
        if not max(marks):
            return [self.point(output.sequences, output.nfe, output.energy_nfe)]
        for mark, point in kept.items():  # what the later rounds have cost is not its cost
            point["nfe"] = (output.nfe - (max(marks) - mark)).tolist()
            point["energy_nfe"] = (output.energy_nfe - sum(scored[mark:])).tolist()
        return [kept[mark] for mark in marks]

    def best(self, job: dict, first_row: int, size: int) -> list[dict]:
        """The text with the fewest bits per token under the energy's AR model, of n."""
        marks, points = [mark for _, mark in job["points"]], []
        least_B, nfe_B = torch.full((size,), torch.inf, dtype=torch.float64), torch.zeros(size, dtype=torch.int64)
        best_BL = torch.full((size, self.length), self.mask)
        for n in range(1, max(marks) + 1):
            output = self.model.denoiser.generate(
                generation_config=self.config,
                batch_size=size,
                first_row=first_row,
                seed=self.seed + (n - 1) * NEXT_TEXT,
                **job["settings"],
            )
            ends_BL = before_end(output.sequences, self.tokenizer.eos_token_id)
            bits_B = torch.from_numpy(self.ar.read(output.sequences)["bits"]) / ends_BL.sum(-1)
            best_BL = torch.where((bits_B < least_B)[:, None], output.sequences, best_BL)
            least_B, nfe_B = torch.minimum(bits_B, least_B), nfe_B + output.nfe
            if n in marks:
                points.append(self.point(best_BL, nfe_B, torch.full_like(nfe_B, n)))
        return points


class Reader:
    """What the judge says of texts."""

    def __init__(self, judge: Judge, reference_BL: torch.Tensor | None, with_mauve: bool):
        self.judge, self.eos = judge, judge.tokenizer.eos_token_id
        self.reference = self.states(reference_BL) if with_mauve else None

    def states(self, x_BL: torch.Tensor) -> torch.Tensor:
        bos = self.judge.scorer.config.bos_token_id
        return hidden_features(self.judge.scorer, x_BL, bos, before_end(x_BL, self.eos))

    def read(self, ids: list[list[int]]) -> dict:
        x_BL = pad_sequence([torch.tensor(text) for text in ids], batch_first=True, padding_value=self.eos or 0)
        found = self.judge.read(x_BL)
        scores = {
            "judge": ratio(found["bits"], found["characters"]),
            "known_words": ratio(found["known_words"]),
            "entropy": ratio(entropies(x_BL, self.eos)),
            "distinct_2": ratio(1 - repetition_rate(ids, 2)),
            "repetition": ratio(repetition_rate(ids, 4)),
            "characters": ratio(found["characters"]),
        }
        if self.reference is not None:
            scores["mauve"] = mauve(self.states(x_BL), self.reference, num_resamples=200)
        texts = [self.judge.text(torch.tensor(text)) for text in ids[:NUM_SHOWN]]
        per_sample = {name: found[name].tolist() for name in ("bits", "characters")}
        return scores | {"texts": texts, "per_sample": per_sample}


def mean(values: list[int]) -> float:
    return sum(values) / len(values)


def row_of(job: dict, i: int, parts: list[list[dict]], reader: Reader) -> dict:
    """The i-th point of a job, of all its chunks."""
    whole = {name: [x for part in parts for x in part[i][name]] for name in ("ids", "nfe", "energy_nfe")}
    target, mark = job["points"][i]
    nfe, energy_nfe = mean(whole["nfe"]), mean(whole["energy_nfe"])
    return {
        "method": job["method"],
        "settings": job["settings"],
        "target": target,
        "mark": mark,
        "passes": nfe + energy_nfe,
        "nfe": nfe,
        "energy_nfe": energy_nfe,
        "seconds_per_sample": sum(part[i]["seconds"] for part in parts) / len(whole["ids"]),
    } | reader.read(whole["ids"])


# ---- telling


def setting(row: dict) -> str:
    if row["method"] == "ar":
        return "one token a pass"
    what = {"best-of-n": f", n = {row['mark']}"} | dict.fromkeys(ROUNDS, f", {counted(row['mark'], 'round')}")
    return counted(row["settings"]["num_steps"], "step") + what.get(row["method"], "")


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def table(results: dict) -> str:
    """Markdown: methods side by side at each number of passes, and the held-out text."""
    order = list(METHODS)
    rows = sorted(results["rows"], key=lambda row: (row["method"] == "ar", row["target"], order.index(row["method"])))
    has_mauve = "mauve" in rows[0]
    head = ["method", "setting", "passes", "denoiser's", "energy's", *SCORES.values(), "below MDLM", "s/sample"]
    plain = {row["target"]: row for row in rows if row["method"] == "mdlm"}

    def scores(row: dict) -> list[str]:
        return [f"{row[name]['mean']:.3f} +- {row[name]['stderr']:.3f}" for name in SCORES]

    lines = []
    for row in rows:
        cells = [METHODS[row["method"]], setting(row), *(f"{row[n]:.0f}" for n in ("passes", "nfe", "energy_nfe"))]
        ahead = (
            lead(plain[row["target"]], row) if row["target"] in plain and row["method"] not in ("mdlm", "ar") else None
        )
        cells += [*scores(row), f"{ahead['mean']:.3f} +- {ahead['stderr']:.3f}" if ahead else ""]
        cells.append(f"{row['seconds_per_sample']:.2f}")
        lines.append(cells + ([f"{row['mauve']['mauve']:.3f}"] if has_mauve else []))
    if results["data"]:
        lines.append(["held-out text", "", "", "", "", *scores(results["data"]), "", ""] + [""] * has_mauve)
    return markdown(head + ["MAUVE"] * has_mauve, lines, left=2)


def matched(results: dict) -> tuple[int, list[dict]]:
    """The most passes that are no more than the tokens of a text, and each method's row there, or its last before."""
    targets = sorted({row["target"] for row in results["rows"] if row["method"] != "ar"}) or [results["length"]]
    at = max((target for target in targets if target <= results["length"]), default=targets[0])
    nearest: dict[str, dict] = {}
    for row in sorted(results["rows"], key=lambda row: row["target"]):
        if row["target"] <= at or row["method"] == "ar":
            nearest[row["method"]] = row
    return at, list(nearest.values())


def plot(results: dict, path: Path) -> None:
    """Judge's bits against passes, a line for each method, and against token entropy at one number of passes. Two
    standard errors."""
    figure = Figure(figsize=(14, 5.4), layout="constrained")
    of_passes, of_entropy = figure.subplots(1, 2)
    colors = {method: f"C{i}" for i, method in enumerate(METHODS)} | {"mdlm": "black", "ar": "gray"}
    for method, name in METHODS.items():
        rows = sorted((r for r in results["rows"] if r["method"] == method), key=lambda row: row["passes"])
        if not rows:
            continue
        means, errors = zip(*((row["judge"]["mean"], 2 * row["judge"]["stderr"]) for row in rows), strict=True)
        if method == "ar":
            name = f"AR, {rows[0]['passes']:.0f} passes of one token"
            of_passes.axhline(means[0], color=colors[method], linestyle="-.", label=name)
            of_passes.axhspan(means[0] - errors[0], means[0] + errors[0], color=colors[method], alpha=0.08, lw=0)
            continue
        spent = [row["passes"] for row in rows]
        of_passes.plot(spent, means, marker="o", markersize=4, color=colors[method], label=name)
        of_passes.errorbar(spent, means, errors, linestyle="", elinewidth=1, color=colors[method], alpha=0.5)
        low, high = zip(*((m - e, m + e) for m, e in zip(means, errors, strict=True)), strict=True)
        of_passes.fill_between(spent, low, high, color=colors[method], alpha=0.12, linewidth=0)
    at, rows = matched(results)
    for row in rows:
        x, y = row["entropy"], row["judge"]
        label = f"{METHODS[row['method']]}, {row['passes']:.0f} passes"
        errors = 2 * y["stderr"], 2 * x["stderr"]
        of_entropy.errorbar(
            x["mean"], y["mean"], *errors, marker="o", capsize=3, linestyle="", color=colors[row["method"]], label=label
        )
    if data := results["data"]:
        of_passes.axhline(data["judge"]["mean"], color="gray", linestyle=":", label="held-out text")
        where = data["entropy"]["mean"], data["judge"]["mean"]
        of_entropy.plot(*where, "*", markersize=12, color="gray", label="held-out text")
    of_passes.set_xscale("log", base=2)
    of_passes.xaxis.set_major_formatter("{x:g}")
    ylabel = f"{SCORES['judge']} (lower is better)"
    of_passes.set(xlabel="passes for a text", ylabel=ylabel, title=f"temperature {results['temperature']:g}")
    of_entropy.set(xlabel="token entropy of a text, nats", ylabel=ylabel, title=f"at about {at} passes")
    for axes in (of_passes, of_entropy):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110, format="png")


def tell(results: dict, out: Path) -> None:
    write_whole(out.with_suffix(".png"), lambda path: plot(results, path))
    print(f"{table(results)}\n\nresults: {out}\nchart: {out.with_suffix('.png')}")


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(FrontierArguments, __doc__, argv)
    if arguments.from_json:
        tell(read_results(arguments.from_json), Path(arguments.from_json))
        return
    if arguments.num_threads:
        torch.set_num_threads(arguments.num_threads)
    out, tokenizer = Path(arguments.out), AutoTokenizer.from_pretrained(arguments.model)
    model = EDLMModel.from_pretrained(arguments.model, dtype=torch.float32).eval()
    if model.energy_type != "ar":
        raise ValueError(f"model must have an AR energy, got {arguments.model!r} with {model.energy_type!r}")
    judge = Judge.load(arguments.judge, tokenizer)
    parts = {"model": model, "energy": model.energy_model, "judge": judge.scorer}
    weights = {name: fingerprint([v for _, v in sorted(m.state_dict().items())]) for name, m in parts.items()}
    if weights["judge"] == weights["energy"]:
        raise ValueError(f"judge={arguments.judge!r} is the energy itself, which may not judge its own texts")
    own, length = model.generation_config, model.config.max_position_embeddings
    names = ("temperature", "corrector_size", "corrector_temperature")
    given = {name: getattr(arguments, name) for name in names}
    config = EDLMGenerationConfig(
        **{name: getattr(own, name) if value is None else value for name, value in given.items()},
        corrector_candidates=arguments.corrector_candidates,
        num_candidates=1,
        shared_completion=True,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
        return_dict_in_generate=True,
    )
    x0_BL = None
    if arguments.data:
        of_text = out.parent / "tokens", arguments.split, arguments.num_samples
        x0_BL = spread_blocks(arguments.data, tokenizer, length, *of_text)
        if len(x0_BL) < 2:
            raise ValueError(f"data must hold at least 2 texts, got {arguments.data!r} with {len(x0_BL)}")
    reader = Reader(judge, x0_BL, arguments.mauve)
    writer = Writer(model.to(getattr(torch, arguments.dtype)), tokenizer, config, arguments.seed)

    store, todo, rows = Store(out.with_suffix(".jsonl")), jobs(arguments, config, length), []
    same = {"seed": arguments.seed, "temperature": config.temperature, "dtype": arguments.dtype}
    same |= {"weights": weights["model"]}
    total = arguments.num_samples * sum(job["points"][-1][0] for job in todo)
    with tqdm(total=total, unit="pass", unit_scale=True) as bar:
        for job in todo:
            parts = []
            bar.set_description(METHODS[job["method"]])
            for first in range(0, arguments.num_samples, arguments.batch_size):
                size = min(arguments.batch_size, arguments.num_samples - first)
                make = (writer.write, job, first, size)
                key = job | same | {"first_row": first, "size": size}
                parts.append(store.row(key, lambda make=make: make[0](*make[1:])))
                bar.update(size * job["points"][-1][0])
            rows += [row_of(job, i, parts, reader) for i in range(len(job["points"]))]
    recorded = {"num_threads", "from_json"}
    results = {
        "command": command("bench.frontier", arguments, recorded),
        "arguments": {k: v for k, v in vars(arguments).items() if k not in recorded | {"data", "out"}},
        **machine(),
        "notes": NOTES,
        "length": length,
        "temperature": config.temperature,
        "pass_cost": pass_cost(model),
        "data": None if x0_BL is None else reader.read(to_the_end(x0_BL, tokenizer.eos_token_id)),
        "rows": rows,
    }  # fmt: skip
    write_json(out, results)
    tell(results, out)


if __name__ == "__main__":
    main()
