"""Likelihood of held-out text: bounds of MDLM and of EDLM with several energies, steps and candidates, on same draws.

    python -m training.evaluate_likelihood --model hub_cards/edlm-wiki27 --energies coar=runs/ar/model \
        --ar runs/ar/model --data FOLDER --num_sequences 200 --out hub_cards/results/likelihood-wiki27.json
    python -m training.evaluate_likelihood --from_json hub_cards/results/likelihood-wiki27.json

The work is cut into parts, each kept in a file of its own beside `--out`: the same command goes on where it was
stopped, and several processes (`torchrun`, `accelerate launch`; on CPUs with ACCELERATE_USE_CPU=true) share the parts.
A part's file is named after all that determines its numbers: weights, tokens, settings, seed, precision and the code
of the estimators, whatever its layout and comments.

Shapes: B sequences, J draws for each, C settings (k, tau), L length.
"""

import ast
import csv
import hashlib
import io
import json
import math
import os
import re
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

from tqdm.auto import tqdm

from .common.arguments import (
    COMPLETIONS,
    CommaLists,
    answer_early,
    command,
    generation_config,
    parse_arguments,
    public_data,
)

NOT_RECORDED = {"out", "cache_dir", "num_threads", "from_json"}
LEAST = dict.fromkeys(
    ("num_samples", "num_shared_samples", "num_times", "num_times_plain", "batch_size", "energy_batch_size", "chunk"), 1
)
LEAST |= {"num_sequences": 0, "num_threads": 0}


@dataclass(kw_only=True)
class LikelihoodArguments(CommaLists):
    model: str = field(default="", metadata={"help": "folder or repo of the model or denoiser, with its tokenizer"})
    energies: str = field(default="", metadata={"help": "more energies, e.g. coar=FOLDER,nce@name=FOLDER"})
    only: str = field(
        default="", metadata={"help": "names of the energies to measure; default: all, the model's own too"}
    )
    ar: str = field(default="", metadata={"help": "autoregressive model for the exact AR row; same token ids"})
    data: str = field(default="", metadata={"help": "files, folders or Hub data sets, with commas between"})
    split: str = "test"
    text_column: str = "text"
    num_sequences: int = field(default=0, metadata={"help": "evenly spaced blocks of the model's length; 0: all"})
    estimators: str = field(default="sampler,mdlm,paper", metadata={"help": "paper: for energies of x0 only"})
    num_steps: str = field(default="2,4,8,16,32,64,128,256", metadata={"help": "denoising steps T"})
    num_candidates: str = field(default="1,2,4,8,16", metadata={"help": "k; 1 is MDLM, which is always measured"})
    energy_temperatures: str = field(default="1", metadata={"help": "tau, with commas between"})
    window_low: float = field(default=0.0, metadata={"help": "the energy acts at t in [this, 1]"})
    num_samples: int = field(default=16, metadata={"help": "inner samples: completions, and proposals at least"})
    completions: str = field(default="independent", metadata={"help": "independent (the paper's), shared, or both"})
    num_shared_samples: int = field(default=4, metadata={"help": "shared completions, each with its own candidates"})
    num_times: int = field(default=1, metadata={"help": "draws (t, xt) for each sequence, with an energy"})
    num_times_plain: int = field(default=16, metadata={"help": "the same for bounds without one, which are cheap"})
    mixed_precision: str = field(default="no", metadata={"help": "no or bf16"})
    batch_size: int = field(default=32, metadata={"help": "states in one pass of the denoiser"})
    energy_batch_size: int = field(default=64, metadata={"help": "candidates in one pass of the energy"})
    seed: int = 0
    chunk: int = field(default=50, metadata={"help": "sequences of one part"})
    cache_dir: str = field(default="", metadata={"help": "where token ids are kept; default: tokens/ beside out"})
    out: str = field(default="", metadata={"help": "results, .json; .csv, .tex and .png have the same name"})
    from_json: str = field(default="", metadata={"help": "measure nothing, print the tables of this file again"})
    num_threads: int = field(default=0, metadata={"help": "CPU threads; 0: torch's default"})

    def __post_init__(self):
        if self.from_json:
            return
        for name in ("model", "data", "out"):
            if not getattr(self, name):
                raise ValueError(f"{name} must be given, got {getattr(self, name)!r}")
        if not self.out.endswith(".json"):
            raise ValueError(f"out must end in .json, got {self.out!r}")
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(f"mixed_precision must be no or bf16, got {self.mixed_precision!r}")
        if not self.listed("completions") or not set(self.listed("completions")) <= set(COMPLETIONS):
            raise ValueError(f"completions must be of {COMPLETIONS}, with commas between, got {self.completions!r}")
        if "paper" in self.listed("estimators") and self.num_samples < 2:
            raise ValueError(f"num_samples must be at least 2 for the estimator 'paper', got {self.num_samples}")
        if not 0 <= self.window_low <= 1:
            raise ValueError(f"window_low must lie in [0, 1], got {self.window_low}")
        names = [data_name(source) for source in self.listed("data")]
        if len(set(names)) < len(names):
            raise ValueError(f"data must have different names, got {self.data!r}")
        from modeling_edlm.likelihood import ESTIMATORS  # with torch, so checked last

        if not self.listed("estimators") or not set(self.listed("estimators")) <= set(ESTIMATORS):
            raise ValueError(f"estimators must be of {ESTIMATORS}, with commas between, got {self.estimators!r}")
        for name, kind, option in (
            ("num_steps", int, "num_steps"),
            ("num_candidates", int, "num_candidates"),
            ("energy_temperatures", float, "energy_temperature"),
        ):
            if not self.listed(name, kind):
                raise ValueError(f"{name} must be numbers with commas between, got {getattr(self, name)!r}")
            for value in self.listed(name, kind):
                generation_config(**{option: value})  # checks it

    def settings(self) -> list[tuple[int, float]]:
        """(k, tau) where the energy has a choice."""
        taus = self.listed("energy_temperatures", float)
        return [(k, tau) for k in sorted(self.listed("num_candidates", int)) if k > 1 for tau in taus]

    def recorded(self) -> dict:
        """The arguments, with the data where a card says that it is."""
        return {k: v for k, v in asdict(self).items() if k not in NOT_RECORDED} | {"data": public_data(self.data)}


# ---- what is measured


def data_name(source: str) -> str:
    return Path(source).stem if Path(source).is_file() else Path(source).name


if __name__ == "__main__":
    answer_early(LikelihoodArguments, __doc__)

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from matplotlib.figure import Figure
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import modeling_edlm
from modeling_edlm import EDLMForMaskedLM, EDLMGenerationConfig, EDLMModel
from modeling_edlm.energies import causal_log_prob
from modeling_edlm.likelihood import likelihood_terms
from modeling_edlm.schedule import times

from .common.checkpoint import fingerprint
from .common.components import body_parameters, load_variants, pass_cost, with_energy
from .common.data import PackedTokens, tokenize
from .common.results import machine, markdown, read_results, write_json, write_whole

NUM_BUCKETS = 5  # of t
SHARED = ", shared"  # behind the name of an energy whose candidates share a completion
# what the numbers come from
CODE = (
    "backbone",
    "draws",
    "energies",
    "energy_network",
    "likelihood",
    "modeling_edlm",
    "proposal",
    "sampler",
    "schedule",
)
OTHERS = {"ar": "AR, exact", "mdlm": "MDLM in continuous time, at most"}
NOTES = {
    "bits": "sums of bits over sums of units; stderr over sequences, that of a ratio; all rows have the same sequences",
    "bound": "of EDLM: that of MDLM from num_times_plain draws, less the gain",
    "gain": "bits per token by which the energy lowers the bound of the same draws without it; in the buckets of t the "
    "share of each in this gain: they add up to it",
    "ess": "effective sample size of the k weights, mean over draws; a draw is a revealed position",
    "passes": "expected steps that reveal something, T (1 - (1 - 1/T)^L), and k for each of them in the window; an "
    "energy pass counts as pass_cost denoiser passes, the ratio of parameters without embedding and output projection",
    "versus_equal_cost": "EDLM minus MDLM with as many equivalent passes, interpolated between the measured numbers of "
    "steps in the logarithm of passes; beyond the largest one, minus MDLM with that many steps",
    "seconds": "of evaluation for each sequence: all k and temperatures of an energy at one T are measured together",
    "paper": "published estimator with the lower and the asymptotic upper form of log Z, no bound: docs/evaluate.md",
}


@dataclass
class Text:
    """Sequences x0_BL of a data set, and how many characters and UTF-8 bytes each has without its special tokens."""

    name: str
    x0_BL: torch.Tensor
    characters_B: np.ndarray
    bytes_B: np.ndarray

    @property
    def units(self) -> dict[str, np.ndarray]:
        tokens_B = np.full(len(self.x0_BL), self.x0_BL.shape[1])
        return {"token": tokens_B, "character": self.characters_B, "byte": self.bytes_B}


def load_text(source: str, tokenizer: PreTrainedTokenizerBase, length: int, arguments: LikelihoodArguments) -> Text:
    """Evenly spaced whole blocks; what is left behind the last of them is not scored, so no token is scored twice."""
    cache_dir = arguments.cache_dir or Path(arguments.out).parent / "tokens"
    tokens = tokenize(source, tokenizer, cache_dir, arguments.split, arguments.text_column)
    blocks, num_whole = PackedTokens(tokens, length), len(tokens) // length
    B = min(arguments.num_sequences or num_whole, num_whole)
    x0_BL = torch.stack([blocks[i * num_whole // B]["input_ids"] for i in range(B)])
    texts = [tokenizer.decode(x0_L, skip_special_tokens=True, clean_up_tokenization_spaces=False) for x0_L in x0_BL]
    counts = [np.array([len(text) for text in texts]), np.array([len(text.encode()) for text in texts])]
    return Text(data_name(source), x0_BL, *counts)


class Networks:
    """The models by label, each one that `likelihood_terms` takes, and a fingerprint of each one's weights."""

    def __init__(self, arguments: LikelihoodArguments, device: torch.device):
        self.variants = load_variants(arguments.model, arguments.listed("energies"))
        if unknown := set(only := arguments.listed("only")) - self.variants.keys():
            raise ValueError(f"only must name energies of {list(self.variants)}, got {sorted(unknown)}")
        self.variants = {name: model for name, model in self.variants.items() if not only or name in only}
        # without any energy the denoiser stands alone
        variant = next(iter(self.variants.values()), None)
        alone = None if variant else EDLMForMaskedLM.from_pretrained(arguments.model, dtype=torch.float32)
        self.denoiser = (variant or alone).denoiser.eval()
        self.by_label = {"mdlm": self.denoiser} | self.variants
        if arguments.ar:
            try:
                self.by_label["AR"] = with_energy(self.denoiser, "ar", arguments.ar)
            except ValueError as error:
                raise ValueError(f"ar={arguments.ar!r} does not fit the model: {error}") from error
        for model in self.by_label.values():
            model.to(device)
        self.weights = {}
        for name, model in self.by_label.items():
            tensors = [value.reshape(-1) for _, value in sorted(model.state_dict().items())]
            config = json.dumps(model.config.fields(), sort_keys=True, default=str)
            self.weights[name] = hashlib.sha256((fingerprint(tensors) + config).encode()).hexdigest()

    def facts(self) -> dict:
        """Of each energy: what it is and what a pass of it costs."""
        return {
            name: {
                "energy_type": model.energy_type,
                "energy_target": model.config.energy_target,
                "pass_cost": pass_cost(model),
                "body_parameters": body_parameters(model.energy_model),
                "weights": self.weights[name],
            }
            for name, model in self.variants.items()
        }


@dataclass(frozen=True)
class Job:
    """An estimator of a model: `label` is one of `Networks.by_label`."""

    estimator: str
    label: str
    num_steps: int | None = None
    is_shared: bool = False

    @property
    def energy(self) -> str:
        return self.label + SHARED * self.is_shared


def jobs(arguments: LikelihoodArguments, networks: Networks) -> list[Job]:
    """The cheap ones first; MDLM at a number of steps before the energies, whose gains are taken off it."""
    estimators, todo = arguments.listed("estimators"), []
    if arguments.ar:
        todo.append(Job("ar", "AR"))
    if "mdlm" in estimators:
        todo.append(Job("mdlm", "mdlm"))
    if "paper" in estimators:
        todo += [Job("paper", name) for name, m in networks.variants.items() if m.config.energy_target == "x0"]
    if "sampler" in estimators:
        labels = ["mdlm", *(networks.variants if arguments.settings() else [])]
        steps = sorted(arguments.listed("num_steps", int))
        shared = [name for name in labels[1:] if networks.variants[name].config.energy_target == "x0"]
        for num_steps in steps:
            if "independent" in arguments.listed("completions"):
                todo += [Job("sampler", name, num_steps) for name in labels]
            else:
                todo.append(Job("sampler", "mdlm", num_steps))
            if "shared" in arguments.listed("completions"):
                todo += [Job("sampler", name, num_steps, is_shared=True) for name in shared]
    return todo


def code_fingerprint() -> str:
    """Of the code that the numbers come from, whatever its comments, docstrings and layout."""
    trees = []
    for name in CODE:
        tree = ast.parse((Path(modeling_edlm.__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value = ast.Constant(None)
        trees.append(ast.dump(tree))
    return hashlib.sha256("".join(trees).encode()).hexdigest()


class Parts:
    """The files of the parts: which there are, how one is made, and all rows of a job from them."""

    def __init__(self, arguments: LikelihoodArguments, networks: Networks, texts: list[Text], device: torch.device):
        self.arguments, self.networks, self.device = arguments, networks, device
        self.folder = Path(arguments.out).with_suffix(".parts")
        self.folder.mkdir(parents=True, exist_ok=True)
        precision, code = [device.type, arguments.mixed_precision], code_fingerprint()
        self.todo = []  # (text, job, first row, path)
        for text in texts:
            for job in jobs(arguments, networks):
                for first in range(0, len(text.x0_BL), arguments.chunk):
                    rows_BL = text.x0_BL[first : first + arguments.chunk]
                    made_from = [code, precision, networks.weights[job.label], fingerprint(rows_BL), first]
                    made_from += [asdict(job), self.options(job)]
                    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:20]
                    names = [text.name, job.estimator, job.energy, f"T{job.num_steps}" if job.num_steps else "", first]
                    name = re.sub(r"[^\w.-]", "-", "-".join(str(part) for part in names if part != ""))
                    self.todo.append((text, job, first, self.folder / f"{name}-{first + len(rows_BL) - 1}.{key}.npz"))

    def options(self, job: Job) -> dict:
        """What `likelihood_terms` is told, but for the size of batches, on which nothing depends."""
        arguments = self.arguments
        if job.estimator == "ar":
            return {}
        has_energy = job.label in self.networks.variants
        options = {"seed": arguments.seed, "num_samples": arguments.num_samples if has_energy else 1}
        options["num_times"] = arguments.num_times if has_energy else arguments.num_times_plain
        if job.estimator != "sampler":
            return options
        options["settings"] = arguments.settings() if has_energy else [(1, 1.0)]
        if job.is_shared:
            options |= {"shared_completion": True, "num_samples": arguments.num_shared_samples}
        return options | {"num_steps": job.num_steps, "energy_window": (1.0, arguments.window_low)}

    def make(self, text: Text, job: Job, first: int, path: Path) -> None:
        x0_BL = text.x0_BL[first : first + self.arguments.chunk].to(self.device)
        model, started = self.networks.by_label[job.label], time.perf_counter()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.arguments.mixed_precision == "bf16"):
            if job.estimator == "ar":
                arrays = {"nll_BJC": exact_nll(model, x0_BL, self.arguments.batch_size)[:, None, None]}
            else:
                terms = likelihood_terms(
                    model,
                    x0_BL,
                    estimator=job.estimator,
                    first_row=first,
                    generation_config=EDLMGenerationConfig(
                        denoiser_batch_size=self.arguments.batch_size,
                        energy_batch_size=self.arguments.energy_batch_size,
                    ),
                    **self.options(job),
                )
                arrays = {name: getattr(terms, name) for name in ("t_BJ", "mdlm_BJ", "nll_BJC", "ess_BJC")}
        arrays = {name: values.numpy() for name, values in arrays.items()}
        arrays["seconds"] = time.perf_counter() - started

        def save(temporary: Path) -> None:
            with open(temporary, "wb") as file:  # numpy would give a path another suffix
                np.savez(file, **arrays)

        write_whole(path, save)

    def merged(self, text: Text, job: Job) -> dict[str, np.ndarray]:
        """The arrays of all sequences of a text, in order; `seconds` for each sequence."""
        files = []
        for path in (path for t, j, _, path in self.todo if t is text and j == job):
            try:
                with np.load(path, allow_pickle=False) as file:
                    files.append(dict(file))
            except (OSError, ValueError, zipfile.BadZipFile) as error:
                raise ValueError(f"the part {path} is corrupted, delete it and start again: {error}") from error
        arrays = {name: np.concatenate([file[name] for file in files]) for name in files[0] if name != "seconds"}
        return arrays | {"seconds": sum(float(file["seconds"]) for file in files) / len(text.x0_BL)}


@torch.no_grad()
def exact_nll(model: EDLMModel, x0_BL: torch.Tensor, batch_size: int) -> torch.Tensor:
    """(B,) float64 nats on the CPU, -log p_AR(x0) of the autoregressive energy of `model`."""
    ar, mask = model.energy_model, model.config.mask_token_id
    parts = [causal_log_prob(ar, x_BL, None, ar.config.bos_token_id, mask).cpu() for x_BL in x0_BL.split(batch_size)]
    nll_B = -torch.cat(parts).double()
    if nll_B.isnan().any():
        raise FloatingPointError(f"the logits of ar give NaN, first in row {int(nll_B.isnan().nonzero()[0])}")
    return nll_B


# ---- from draws to rows


def ratio(bits_B: np.ndarray, units_B: np.ndarray) -> dict:
    """Bits per unit over all sequences, and the standard error of this ratio; None for one sequence."""
    mean, B = bits_B.sum() / units_B.sum(), len(bits_B)
    deviation_B = bits_B - mean * units_B
    stderr = math.sqrt(B * deviation_B.var(ddof=1)) / units_B.sum() if B > 1 else None
    return {"mean": float(mean), "stderr": stderr}


def mean_ess(ess: np.ndarray) -> float | None:
    return None if np.isnan(ess).all() else float(np.nanmean(ess))


def by_time(t_BJ: np.ndarray, gain_BJ: np.ndarray, ess_BJ: np.ndarray, tokens_B: np.ndarray) -> list[dict]:
    """Gain, in bits per token of the whole, and ESS of the draws in each bucket (a, b] of t."""
    bucket_BJ = np.ceil(t_BJ * NUM_BUCKETS - 1e-9).clip(1) - 1
    return [
        {
            "t_at_most": (i + 1) / NUM_BUCKETS,
            "num_draws": int((bucket_BJ == i).sum()),
            "gain": ratio(np.where(bucket_BJ == i, gain_BJ, 0).mean(-1), tokens_B),
            "ess": mean_ess(ess_BJ[bucket_BJ == i]),
        }
        for i in range(NUM_BUCKETS)
    ]


def passes(num_steps: int, num_candidates: int, window_low: float, length: int) -> dict:
    """Expected forward passes for one sample of `length` tokens: a step that reveals nothing costs nothing.

    `generate()` may take fewer of the energy: it scores equal candidates once.
    """
    reveals = 1 - (1 - 1 / num_steps) ** length
    active = int((times(num_steps)[:-1] >= window_low - 1e-9).sum()) if num_candidates > 1 else 0
    return {"denoiser_passes": num_steps * reveals, "energy_passes": num_candidates * active * reveals}


def measure(text: Text, parts: Parts) -> dict:
    """All rows of a data set, and EDLM at T against MDLM at 2T on the same sequences."""
    arguments, networks, units = parts.arguments, parts.networks, text.units
    rows, bits = [], {}  # bits: (B,) of the sampler rows, by energy, T, k and tau

    def add(estimator, bits_B, seconds, **more):
        empty = dict.fromkeys(("energy", "num_steps", "num_candidates", "energy_temperature", "log_z", "gain", "ess"))
        empty |= dict.fromkeys(("denoiser_passes", "energy_passes", "denoiser_equivalent_passes"))
        per_unit = {f"bits_per_{unit}": ratio(bits_B, units_B) for unit, units_B in units.items()}
        rows.append({"estimator": estimator} | empty | per_unit | {"seconds_per_sequence": seconds} | more)

    def add_sampler(bits_B, seconds, energy, num_steps, num_candidates, energy_temperature, **more):
        names = "energy", "num_steps", "num_candidates", "energy_temperature"
        values = energy, num_steps, num_candidates, energy_temperature
        bits[values] = bits_B
        add("sampler", bits_B, seconds, **dict(zip(names, values, strict=True)), **cost(*values[:3]), **more)

    def cost(name, num_steps, k):
        row = passes(num_steps, k, arguments.window_low, text.x0_BL.shape[1])
        extra = row["energy_passes"] * pass_cost(networks.variants[name.removesuffix(SHARED)]) if name else 0.0
        return row | {"denoiser_equivalent_passes": row["denoiser_passes"] + extra}

    for job in jobs(arguments, networks):
        arrays = parts.merged(text, job)
        seconds, nll_BJC = arrays["seconds"], arrays["nll_BJC"] / math.log(2)
        if job.estimator == "paper":
            for i, form in enumerate(("lower", "upper")):
                add("paper", nll_BJC[..., i].mean(-1), seconds, energy=job.label, log_z=form)
        elif job.estimator != "sampler":
            add(job.estimator, nll_BJC[..., 0].mean(-1), seconds)
        else:
            mdlm_BJ = arrays["mdlm_BJ"] / math.log(2)
            if job.label == "mdlm":
                add_sampler(mdlm_BJ.mean(-1), seconds, None, job.num_steps, 1, None)
            for i, setting in enumerate(arguments.settings() if job.label != "mdlm" else []):
                gain_BJ, ess_BJ = mdlm_BJ - nll_BJC[..., i], arrays["ess_BJC"][..., i]
                more = {"gain": ratio(gain_BJ.mean(-1), units["token"]), "ess": mean_ess(ess_BJ)}
                more["by_time"] = by_time(arrays["t_BJ"], gain_BJ, ess_BJ, units["token"])
                bits_B = bits[None, job.num_steps, 1, None] - gain_BJ.mean(-1)  # MDLM has more draws: less noise
                add_sampler(bits_B, seconds, job.energy, job.num_steps, *setting, **more)
    double = []
    for (energy, T, k, tau), bits_B in bits.items():
        if energy and (None, 2 * T, 1, None) in bits:
            difference = ratio(bits_B - bits[None, 2 * T, 1, None], units["token"])
            double.append(
                {"energy": energy, "num_steps": T, "num_candidates": k, "energy_temperature": tau}
                | {"difference": difference, "is_at_most_zero": difference["mean"] <= 0}
                | {"denoiser_equivalent_passes": cost(energy, T, k)["denoiser_equivalent_passes"]}
                | {"denoiser_passes_at_double": cost(None, 2 * T, 1)["denoiser_passes"]}
            )
    plain = sorted((cost(None, T, 1)["denoiser_passes"], T) for energy, T, _, _ in bits if energy is None)
    equal_cost = []
    for (energy, T, k, tau), bits_B in bits.items():
        spent = cost(energy, T, k)["denoiser_equivalent_passes"]
        if energy and plain and plain[0][0] <= spent:
            plain_B = interpolated(spent, [(passes, bits[None, T, 1, None]) for passes, T in plain])
            equal_cost.append(
                {"energy": energy, "num_steps": T, "num_candidates": k, "energy_temperature": tau}
                | {"denoiser_equivalent_passes": spent, "difference": ratio(bits_B - plain_B, units["token"])}
            )
    return {
        "name": text.name,
        "num_sequences": len(text.x0_BL),
        "length": text.x0_BL.shape[1],
        "tokens": int(units["token"].sum()),
        "characters": int(units["character"].sum()),
        "bytes": int(units["byte"].sum()),
        "tokens_sha256": fingerprint(text.x0_BL),
        "rows": rows,
        "versus_double": double,
        "versus_equal_cost": equal_cost,
    }


def interpolated(spent: float, points: list[tuple[float, np.ndarray]]) -> np.ndarray:
    """Bits (B,) of MDLM with `spent` passes, from (passes, bits) in ascending order: linear in the logarithm of passes
    between two that were measured, and those of the most passes beyond them."""
    for (a, a_B), (b, b_B) in pairwise(points):
        if a <= spent <= b:
            share = math.log(spent / a) / math.log(b / a)
            return a_B + share * (b_B - a_B)
    return points[-1][1]


# ---- what is shown


def name_of(row: dict) -> str:
    """Of a sampler, whatever its number of steps."""
    if row["energy"] is None:
        return "MDLM"
    tau = row["energy_temperature"]
    return f"EDLM {row['energy']}, k={row['num_candidates']}" + (f", tau={tau:g}" if tau != 1 else "")


def number(value: dict, scale: float = 1.0, spec: str = ".3f") -> str:
    stderr = "" if value["stderr"] is None else f" +- {scale * value['stderr']:{spec.lstrip('+')}}"
    return f"{scale * value['mean']:{spec}}{stderr}"


def small(name: str, scale: float) -> Callable[[dict], str]:
    """A cell with four digits and a sign, for differences."""
    return lambda row: number(row[name], scale, "+.4f")


def grid(rows: list[dict], cell: Callable[[dict], str]) -> tuple[list[int], dict[str, dict[int, str]]]:
    """The numbers of steps, and for each sampler its cells by number of steps."""
    steps, cells = sorted({row["num_steps"] for row in rows}), {}
    for row in rows:
        cells.setdefault(name_of(row), {})[row["num_steps"]] = cell(row)
    return steps, cells


def by_steps(rows: list[dict], cell: Callable[[dict], str], head: str) -> str:
    steps, cells = grid(rows, cell)
    lines = [[name, *(own.get(T, "") for T in steps)] for name, own in cells.items()]
    return markdown([head, *(f"T={T}" for T in steps)], lines)


def table(results: dict) -> str:
    """Markdown, for each data set: bits per character with gains, the other estimates, EDLM at T against MDLM at 2T."""
    blocks = []
    for data in results["data"]:
        per_character = data["tokens"] / data["characters"]
        caption = "{name}: {num_sequences} sequences of {length} tokens, {characters} characters; ".format(**data)
        caption += f"{results['device_name']}, precision {results['precision']}, +- one standard error over sequences."

        blocks.append(caption)
        if rows := [row for row in data["rows"] if row["estimator"] == "sampler"]:
            blocks.append(by_steps(rows, lambda row: number(row["bits_per_character"]), "bits per character, at most"))
        if acting := [row for row in rows if row["gain"]]:
            blocks.append(
                by_steps(acting, small("gain", per_character), "gain over MDLM at the same T, bits per character")
            )
            ess = by_steps(
                acting, lambda row: "" if row["ess"] is None else f"{row['ess']:.2f}", "ESS of the k weights"
            )
            blocks.append(ess)
        rows = [row for row in data["rows"] if row["estimator"] != "sampler"]
        lines = []
        for row in rows:
            name = OTHERS.get(row["estimator"]) or f"published form, no bound: {row['energy']}, {row['log_z']} log Z"
            lines.append([name, number(row["bits_per_character"])])
        blocks += [markdown(["other estimates", "bits per character"], lines)] if rows else []
        if data["versus_double"]:
            head = "EDLM at T minus MDLM at 2T, bits per character"
            blocks.append(by_steps(data["versus_double"], small("difference", per_character), head))
        if rows := data.get("versus_equal_cost"):
            head = "EDLM minus MDLM of equal cost, bits per character (equivalent passes)"

            def cell(row, scale=per_character):
                return f"{number(row['difference'], scale, '+.4f')} ({row['denoiser_equivalent_passes']:.1f})"

            blocks.append(by_steps(rows, cell, head))
    if len(results["data"]) > 1:
        blocks.append(across(results["data"]))
    return "\n\n".join(blocks)


def across(data_sets: list[dict]) -> str:
    """Markdown: one column for each data set, at the largest number of steps."""
    most, cells = 0, {}
    for data in data_sets:
        most = max([most] + [row["num_steps"] or 0 for row in data["rows"]])
    for data in data_sets:
        for row in data["rows"]:
            if row["estimator"] != "paper" and row["num_steps"] in (None, most):
                name = OTHERS.get(row["estimator"]) or name_of(row)
                cells.setdefault(name, []).append(number(row["bits_per_character"]))
    head = [f"bits per character, T={most}", *(data["name"] for data in data_sets)]
    return markdown(head, [[name, *row] for name, row in cells.items()])


def latex(results: dict) -> str:
    """A booktabs tabular for each data set: bits per character; MDLM in continuous time stands at T = infinity."""

    def escaped(text):
        return re.sub(r"([&%$#_{}])", r"\\\1", text)

    tabulars = []
    for data in results["data"]:
        rows = [row for row in data["rows"] if row["estimator"] == "sampler"]
        steps, cells = grid(rows, lambda row: number(row["bits_per_character"]).replace("+-", r"$\pm$"))
        others = {row["estimator"]: row for row in data["rows"] if row["estimator"] != "sampler"}
        columns = [*steps, *([math.inf] if "mdlm" in others else [])]
        if "mdlm" in others:
            cell = number(others["mdlm"]["bits_per_character"]).replace("+-", r"$\pm$")
            cells = {"MDLM": cells.get("MDLM", {}) | {math.inf: cell}} | {k: v for k, v in cells.items() if k != "MDLM"}
        lines = [rf"\begin{{tabular}}{{l{'r' * max(1, len(columns))}}}", r"\toprule"]
        heads = [r"$\infty$" if T == math.inf else str(T) for T in columns]
        lines += [" & ".join(["$T$", *heads]) + r" \\", r"\midrule"]
        if "ar" in others:
            cell = number(others["ar"]["bits_per_character"]).replace("+-", r"$\pm$")
            lines.append(rf"AR & \multicolumn{{{max(1, len(columns))}}}{{c}}{{{cell}}} \\")
        for name, by_steps in cells.items():
            lines.append(" & ".join([escaped(name), *(by_steps.get(T, "") for T in columns)]) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}"]
        about = "{name}: bits per character, {num_sequences} sequences of {length} tokens".format(**data)
        tabulars.append("\n".join([f"% {about}", *lines]))
    return "\n\n".join(tabulars) + "\n"


def flat(row: dict) -> dict:
    """Without nesting: `gain` and `gain_stderr`; the buckets of t as `t_at_most_0.2_ess` and the like."""
    flattened = {}
    for name, value in row.items():
        if name == "by_time":
            for bucket in value:
                start = f"t_at_most_{bucket['t_at_most']:g}"
                flattened |= {f"{start}_{k}": v for k, v in flat(bucket).items() if k != "t_at_most"}
        elif isinstance(value, dict):
            flattened |= {name: value["mean"], f"{name}_stderr": value["stderr"]}
        else:
            flattened[name] = value
    return flattened


def comma_separated(results: dict) -> str:
    rows = [{"data": data["name"]} | flat(row) for data in results["data"] for row in data["rows"]]
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def plot(results: dict, path: Path) -> None:
    """For each data set: bits per character against T and against cost, two standard errors; ESS by time at the most
    steps."""
    figure = Figure(figsize=(16, 4 * len(results["data"])), layout="constrained")  # without pyplot it is Agg that draws
    all_axes = figure.subplots(len(results["data"]), 3, squeeze=False)
    for data, (left, middle, right) in zip(results["data"], all_axes, strict=True):
        rows = [row for row in data["rows"] if row["estimator"] == "sampler"]
        acting = [row for row in rows if row["energy"]]
        if acting:  # one k and temperature for all energies
            ks = sorted({row["num_candidates"] for row in acting})
            k = max((k for k in ks if k <= 8), default=ks[0])
            tau = acting[0]["energy_temperature"]
            acting = [row for row in acting if (row["num_candidates"], row["energy_temperature"]) == (k, tau)]
        shown = [row for row in rows if not row["energy"]] + acting
        colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(map(name_of, shown)))}
        for name, color in colors.items():
            points = [(row["num_steps"], row["bits_per_character"]) for row in shown if name_of(row) == name]
            steps, bits = zip(*points, strict=True)
            errors = [2 * (value["stderr"] or 0) for value in bits]
            means = [value["mean"] for value in bits]
            left.errorbar(steps, means, errors, marker="o", capsize=3, color=color, label=name)
            spent = [row["denoiser_equivalent_passes"] for row in shown if name_of(row) == name]
            middle.errorbar(spent, means, errors, marker="o", capsize=3, color=color, label=name)
        for row in data["rows"]:
            if row["estimator"] in ("ar", "mdlm"):
                style, name = (":", "AR, exact") if row["estimator"] == "ar" else ("--", "MDLM, continuous time")
                left.axhline(row["bits_per_character"]["mean"], color="gray", linestyle=style, label=name)
        for axes in (left, middle):
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        middle.set(xlabel="cost of a sample, denoiser passes", ylabel="bits per character, at most")
        left.set(xlabel="denoising steps T", ylabel="bits per character, at most", title=data["name"])
        most = max((row["num_steps"] for row in acting), default=None)
        for row in acting:
            points = [(bucket["t_at_most"], bucket["ess"]) for bucket in row["by_time"] if bucket["ess"] is not None]
            if row["num_steps"] == most and points:
                t, ess = zip(*points, strict=True)
                right.plot(
                    [end - 0.5 / NUM_BUCKETS for end in t],
                    ess,
                    marker="o",
                    color=colors[name_of(row)],
                    label=name_of(row),
                )
        right.set(xlabel="t (1: all mask)", ylabel="effective sample size of the k weights", xlim=(0, 1))
        right.set_title(f"T = {most}" if most else "no energy")
        for axes in (left, middle, right):
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize="small")
    figure.savefig(path, dpi=120, format="png")


def write(results: dict, out: Path) -> None:
    """Results and all that is made from them; each file takes its name when whole."""
    write_whole(out.with_suffix(".csv"), comma_separated(results))
    write_whole(out.with_suffix(".tex"), latex(results))
    write_whole(out.with_suffix(".png"), lambda path: plot(results, path))
    write_json(out, results)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(LikelihoodArguments, __doc__, argv)
    if arguments.from_json:
        print(table(read_results(arguments.from_json)))
        return
    if arguments.num_threads:
        torch.set_num_threads(arguments.num_threads)
    waiting = InitProcessGroupKwargs(timeout=timedelta(days=30))  # a process may have to wait long for the others
    accelerator = Accelerator(kwargs_handlers=[waiting])
    if (started := int(os.environ.get("WORLD_SIZE", 1))) != accelerator.num_processes:
        raise ValueError(f"WORLD_SIZE is {started}, but each process is alone; on CPUs set ACCELERATE_USE_CPU=true")
    networks = Networks(arguments, accelerator.device)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    length = networks.denoiser.config.max_position_embeddings
    with accelerator.main_process_first():  # the others read what the first has written
        texts = [load_text(source, tokenizer, length, arguments) for source in arguments.listed("data")]
    parts = Parts(arguments, networks, texts, accelerator.device)
    # of all parts, not of the missing ones: which are missing changes while others work
    mine = parts.todo[accelerator.process_index :: accelerator.num_processes]
    with tqdm(total=len(mine), unit="part", disable=not accelerator.is_main_process) as progress:
        for text, job, first, path in mine:
            progress.set_description(path.name.rsplit(".", 2)[0])
            if not path.exists():
                parts.make(text, job, first, path)
            progress.update()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        about = machine()
        about["versions"] |= {name: version(name) for name in ("accelerate", "numpy")}
        recorded = command("evaluate_likelihood", arguments, NOT_RECORDED - {"out"})
        results = {"command": recorded, "arguments": arguments.recorded(), "seed": arguments.seed} | about
        on_cuda = accelerator.device.type == "cuda"
        results |= {
            "device": accelerator.device.type,
            "device_name": torch.cuda.get_device_name() if on_cuda else about["cpu_name"],
            "num_processes": accelerator.num_processes,
            "dtype": "float32",
            "precision": "bf16 autocast" if arguments.mixed_precision == "bf16" else "float32",
            "notes": NOTES,
            "energies": networks.facts(),
            "denoiser": {"body_parameters": body_parameters(networks.denoiser), "weights": networks.weights["mdlm"]},
            "data": [measure(text, parts) for text in texts],
        }
        out = Path(arguments.out)
        write(results, out)
        print(table(results))
        print(f"\nresults: {out}, and .csv, .tex, .png beside it\nparts: {parts.folder}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
