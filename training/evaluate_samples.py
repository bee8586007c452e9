"""Measure samplers against each other: samples of every setting of a grid, their cost, and how far they are from data.

    python -m training.evaluate_samples --model hub_cards/edlm-wiki27 --scorer hub_cards/edlm-wiki27:ar --data FOLDER \
        --num_steps 8,32,128 --temperatures 0.8,0.9,1.0 --out results/samples.json
    python -m training.evaluate_samples --from_json results/samples.json

Samplers: MDLM (k = 1), EDLM with the model's own and other energies, an autoregressive model, best-of-k by a ranker.
The scorer may be none of the networks that had a part in the samples: their weights are compared. A setting that is
finished is kept in a .jsonl beside `--out`, so the same command goes on where it was stopped.

Shapes: B samples, R reference blocks, L length.
"""

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from tqdm.auto import tqdm

from .common.arguments import (
    COMPLETIONS,
    KINDS,
    CommaLists,
    answer_early,
    command,
    found_device,
    generation_config,
    parse_arguments,
    public_data,
)

NOT_RECORDED = {"out", "cache_dir", "num_threads", "from_json"}  # of the recorded command


@dataclass(kw_only=True)
class SampleArguments(CommaLists):
    model: str = field(default="", metadata={"help": "folder or repo of the model, with its tokenizer"})
    scorer: str = field(default="", metadata={"help": "any causal LM: folder or repo, with :subfolder where needed"})
    scorer_tokenizer: str = field(default="", metadata={"help": "default: the scorer reads the model's token ids"})
    data: str = field(default="", metadata={"help": "real text: file, folder or Hub data set"})
    split: str = "test"
    text_column: str = "text"
    cache_dir: str = field(default="", metadata={"help": "where token ids are kept; default: tokens/ beside out"})
    out: str = field(default="", metadata={"help": "results, .json; the plot has the same name, but for .png"})
    num_steps: str = field(default="8,32,128", metadata={"help": "denoising steps T, with commas between"})
    mdlm_num_steps: str = field(default="", metadata={"help": "T of MDLM, whose steps cost less; default: num_steps"})
    num_candidates: str = field(default="1,8", metadata={"help": "k, with commas between; 1 is MDLM"})
    window_lows: str = field(default="0.8", metadata={"help": "the energy acts at t in [this, 1]"})
    completions: str = field(default="independent", metadata={"help": "of candidates: independent, shared, or both"})
    temperatures: str = field(default="1.0", metadata={"help": "of the proposal, with commas between"})
    energies: str = field(default="", metadata={"help": "more energies, e.g. coar=FOLDER,nce=FOLDER"})
    ar: str = field(default="", metadata={"help": "autoregressive baseline: any causal LM with the same token ids"})
    rerank: int = field(default=0, metadata={"help": "k of the best-of-k baseline by log-probability; 0: none"})
    ranker: str = field(default="", metadata={"help": "causal LM that chooses there; not the scorer"})
    allow_own_scorer: bool = field(default=False, metadata={"help": "score by a network of the samplers, and say so"})
    num_samples: int = 256
    num_references: int = field(default=0, metadata={"help": "real blocks to compare with; 0: as many as samples"})
    num_resamples: int = field(default=500, metadata={"help": "of the bootstrap"})
    batch_size: int = 64
    seed: int = 0
    dtype: str = field(default="float32", metadata={"help": "of the samplers: float32 or bfloat16"})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, or auto: cuda where there is one"})
    num_threads: int = field(default=0, metadata={"help": "CPU threads; 0: torch's default"})
    from_json: str = field(default="", metadata={"help": "measure nothing, print the tables of this file again"})

    def __post_init__(self):
        if self.from_json:
            return
        for name in ("model", "scorer", "data", "out"):
            if not getattr(self, name):
                raise ValueError(f"{name} must be given, got {getattr(self, name)!r}")
        if not self.out.endswith(".json"):
            raise ValueError(f"out must end in .json, got {self.out!r}")
        for name, least in {"num_samples": 2, "num_references": 0, "num_resamples": 1, "batch_size": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("num_steps", self.mdlm_steps, "num_candidates"):
            if min(self.listed(name, int), default=0) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if not all(0 <= low <= 1 for low in self.listed("window_lows", float)):
            raise ValueError(f"window_lows must lie in [0, 1], got {self.window_lows!r}")
        if not set(self.listed("completions")) <= set(COMPLETIONS):
            raise ValueError(f"completions must be of {COMPLETIONS}, with commas between, got {self.completions!r}")
        for item in filter(None, self.energies.split(",")):
            if item.partition("=")[0] not in KINDS or not item.partition("=")[2]:
                raise ValueError(f"energies must be ar=, coar= or nce= and a folder, with commas between, got {item!r}")
        if self.rerank == 1 or self.rerank < 0 or bool(self.rerank) != bool(self.ranker):
            raise ValueError(f"rerank must be 2 or more, with a ranker, got {self.rerank} and ranker={self.ranker!r}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")
        for temperature in self.listed("temperatures", float):
            generation_config(temperature=temperature)  # checks it
        self.device = found_device(self.device)
        self.num_references = self.num_references or self.num_samples

    @property
    def mdlm_steps(self) -> str:
        return "mdlm_num_steps" if self.mdlm_num_steps else "num_steps"


if __name__ == "__main__":
    answer_early(SampleArguments, __doc__)

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from modeling_edlm import EDLMModel
from modeling_edlm.energies import causal_log_prob

from .common import metrics
from .common.checkpoint import fingerprint
from .common.components import body_parameters, with_energy
from .common.components import label as energy_name
from .common.data import PackedTokens, tokenize
from .common.loop import step_seed
from .common.results import Store, machine, markdown, read_results, write_json, write_whole

NGRAMS = (1, 2, 3, 4)
WORD_BLOCKS = 4096  # the word list comes from the reference and so many blocks in all: a short list lacks many words
COST = (
    "equivalent_passes: passes of the denoiser over a whole text that cost as many parameter uses, nfe + energy_nfe * "
    "(parameters of the energy / of the denoiser), input embedding and output projection left out. The autoregressive "
    "model with its cache reads every position once, in nfe = length calls one after the other: one pass by this count."
)


# ---- what is sampled from, and by whom it is scored


def load_causal(source: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    folder, _, subfolder = source.partition(":")
    return AutoModelForCausalLM.from_pretrained(folder, subfolder=subfolder, dtype=dtype).to(device).eval()


def weights(model: PreTrainedModel, dtype: torch.dtype) -> str:
    """A fingerprint of all weights, rounded to `dtype`: a sampler in bfloat16 must not hide whose weights it has."""
    return fingerprint([value.to(dtype).float().contiguous() for _, value in sorted(model.state_dict().items())])


class Networks:
    """The models of all samplers by name, the scorer, and which names share the scorer's weights."""

    def __init__(self, arguments: SampleArguments):
        dtype, device = getattr(torch, arguments.dtype), arguments.device
        own = EDLMModel.from_pretrained(arguments.model, dtype=dtype).eval()
        self.denoiser, self.length = own.denoiser, own.config.max_position_embeddings
        self.edlms = {} if own.energy_type == "none" else {energy_name(own): own}
        for item in filter(None, arguments.energies.split(",")):
            kind, _, source = item.partition("=")
            model, path = with_energy(own.denoiser, kind, source), Path(source.replace(":", "/"))
            name = energy_name(model)
            if name in self.edlms:  # say which of two energies of a kind; scripts leave models in runs/NAME/model
                name += f" {path.parent.name if path.name == 'model' else path.name}"
            if name in self.edlms:
                raise ValueError(f"energies must have different names, got {name!r} again by {item!r}")
            self.edlms[name] = model
        for model in (own, *self.edlms.values()):
            model.to(device, dtype)
        self.ar = load_causal(arguments.ar, device, dtype) if arguments.ar else None
        self.ranker = load_causal(arguments.ranker, device, torch.float32) if arguments.ranker else None
        self.scorer = load_causal(arguments.scorer, device, torch.float32)
        self.by_name = {name: model.energy_model for name, model in self.edlms.items()}
        self.by_name |= {"AR": self.ar} if arguments.ar else {}
        self.by_name |= {"ranker": self.ranker} if arguments.rerank else {}
        every = self.by_name | {"denoiser": self.denoiser, "scorer": self.scorer}
        self.weights = {name: weights(model, dtype) for name, model in every.items()}
        self.scorer_is = {name for name in self.by_name if self.weights[name] == self.weights["scorer"]}
        if self.scorer_is and not arguments.allow_own_scorer:
            raise ValueError(
                f"scorer={arguments.scorer!r} has the weights of {sorted(self.scorer_is)}, which took part in the "
                "samples and may not judge itself: give another, or --allow_own_scorer true to have the rows marked"
            )
        for name, model in (("ar", self.ar), ("ranker", self.ranker), ("scorer", self.scorer)):
            foreign = name == "scorer" and arguments.scorer_tokenizer
            if model is not None and not foreign and own.config.vocab_size - model.config.vocab_size not in (0, 1):
                raise ValueError(
                    f"{name} must have the model's token ids, got vocab_size {model.config.vocab_size} and not "
                    f"{own.config.vocab_size}" + ("; or give scorer_tokenizer" if name == "scorer" else "")
                )
            if model is not None and model.config.bos_token_id is None:
                raise ValueError(f"{name} must say in its configuration which id starts a text, bos_token_id is None")


def settings(arguments: SampleArguments, networks: Networks) -> list[dict]:
    """The grid, the cheap samplers first. `network` names what chose or wrote the texts besides the denoiser."""
    grid = []

    def add(sampler, network, num_steps=None, num_candidates=None, window_low=None, is_shared=False):
        setting = {"sampler": sampler, "network": network, "num_steps": num_steps, "num_candidates": num_candidates}
        setting |= {"window_low": window_low, "shared_completion": is_shared}
        grid.extend(setting | {"temperature": value} for value in arguments.listed("temperatures", float))

    steps, candidates = arguments.listed("num_steps", int), arguments.listed("num_candidates", int)
    if arguments.ar:
        add("AR", "AR")
    for num_steps in arguments.listed(arguments.mdlm_steps, int) if 1 in candidates else []:
        add("MDLM", None, num_steps, 1)
    for num_steps in steps if arguments.rerank else []:
        add("best of k", "ranker", num_steps, arguments.rerank)
    for name, model in networks.edlms.items():
        for completion in arguments.listed("completions"):
            if completion == "shared" and model.config.energy_target == "xs":
                continue  # a step energy has no completion
            for k in (k for k in candidates if k > 1):
                for low in arguments.listed("window_lows", float):
                    for num_steps in steps:
                        add("EDLM", name, num_steps, k, low, completion == "shared")
    return grid


def label(row: dict) -> str:
    """Of a sampler, whatever its number of steps and temperature."""
    if row["sampler"] == "EDLM":
        shared = ", shared" if row["shared_completion"] else ""
        return f"EDLM {row['network']}{shared}, k={row['num_candidates']}, t in [{row['window_low']:g}, 1]"
    return f"MDLM, best of {row['num_candidates']}" if row["sampler"] == "best of k" else row["sampler"]


# ---- sampling


def draw(
    setting: dict, networks: Networks, arguments: SampleArguments, start: int, size: int, bar: tqdm | None = None
) -> tuple[torch.Tensor, int, int, torch.Tensor]:
    """The samples from `start` on: ids (B, L), passes spent in all of the denoiser (or the autoregressive model) and of
    the other network, and effective sample sizes. Without a progress bar it is a short trial.
    """
    L, k = networks.length, setting["num_candidates"]
    if setting["sampler"] == "AR":
        torch.manual_seed(step_seed(arguments.seed, start))
        x_BL = continue_bos(networks, size, L if bar is not None else 2, setting["temperature"])
        return x_BL, L * size, 0, torch.empty(0)
    is_edlm, each = setting["sampler"] == "EDLM", k if setting["sampler"] == "best of k" else 1
    output = (networks.edlms[setting["network"]] if is_edlm else networks.denoiser).generate(
        batch_size=size * each,
        first_row=start * each,
        seed=arguments.seed,
        max_length=L,
        num_steps=setting["num_steps"] if bar is not None else 1,
        num_candidates=k if is_edlm else 1,
        energy_window=(1.0, setting["window_low"] or 0.0),
        shared_completion=setting["shared_completion"],
        corrector_steps=0,
        temperature=setting["temperature"],
        return_dict_in_generate=True,
        callback_on_step_end=lambda *_: bar is not None and bar.update(),
    )
    x_NL, nfe, energy_nfe = output.sequences, int(output.nfe.sum()), int(output.energy_nfe.sum())
    if each > 1:  # keep the best of each
        where_NL, ranker = torch.ones_like(x_NL, dtype=torch.bool), networks.ranker
        with torch.no_grad():
            ids = ranker.config.bos_token_id, networks.denoiser.config.mask_token_id
            best_B = causal_log_prob(ranker, x_NL, where_NL, *ids).view(size, k).argmax(-1)
        x_NL, energy_nfe = x_NL.view(size, k, L)[torch.arange(size, device=x_NL.device), best_B], size * k
    return x_NL, nfe, energy_nfe, output.ess.flatten()


def continue_bos(networks: Networks, size: int, length: int, temperature: float) -> torch.Tensor:
    """(B, L) ids from the autoregressive model's own `generate`, with its cache."""
    config, mask = networks.ar.config, networks.denoiser.config.mask_token_id
    bos_B1 = torch.full((size, 1), config.bos_token_id, device=networks.ar.device)
    x_BL = networks.ar.generate(
        bos_B1,
        attention_mask=torch.ones_like(bos_B1),
        max_new_tokens=length,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        suppress_tokens=[mask] if mask < config.vocab_size else None,  # no text holds it
        eos_token_id=-1,  # never drawn: a text goes on behind an EOS, as those of the denoiser and the data do
        pad_token_id=config.bos_token_id,
    )
    return x_BL[:, 1:]


def sample(setting: dict, networks: Networks, arguments: SampleArguments) -> tuple[torch.Tensor, dict]:
    """(B, L) ids, and what they cost; every figure is the mean over samples."""
    wait = torch.cuda.synchronize if arguments.device == "cuda" else lambda: None
    B, T, each = arguments.num_samples, setting["num_steps"], 1
    if setting["sampler"] == "best of k":
        each = setting["num_candidates"]
    per_batch = min(B, max(1, arguments.batch_size // each))
    starts = range(0, B, per_batch)
    draw(setting, networks, arguments, 0, per_batch)  # what a first call costs more is no part of the measurement
    kept, ess, passes, seconds = [], [], np.zeros(2), 0.0
    description = label(setting) + (f", {T} steps" if T else "")
    with tqdm(total=len(starts) * (T or 1), leave=False, desc=description, mininterval=1) as bar:
        for start in starts:
            wait()
            started = time.perf_counter()
            x_BL, nfe, energy_nfe, ess_S = draw(setting, networks, arguments, start, min(per_batch, B - start), bar)
            wait()
            seconds += time.perf_counter() - started
            passes += nfe / B, energy_nfe / B
            kept.append(x_BL)
            ess.append(ess_S.float())
            bar.update(0 if T else 1)
    body, ess_S = body_parameters(networks.denoiser), torch.cat(ess)
    if setting["sampler"] == "AR":
        equivalent = body_parameters(networks.ar) / body
    else:
        other = networks.by_name.get(setting["network"], networks.denoiser)
        equivalent = passes[0] + passes[1] * body_parameters(other) / body
    return torch.cat(kept), {
        "nfe": float(passes[0]),
        "energy_nfe": float(passes[1]),
        "equivalent_passes": float(equivalent),
        "seconds_per_sample": seconds / B,
        "rows_per_batch": per_batch * each,
        "ess": None if ess_S.isnan().all() else float(ess_S.nanmean()),
    }


def _mask_token_id(model: PreTrainedModel) -> int | None:
    """The id that no text holds, where the causal model has one."""
    return model.config.mask_token_id if model.config.model_type == "edlm" else None


# ---- measuring


class Judge:
    """The scorer, the reference, and everything that is computed of it once."""

    def __init__(self, arguments: SampleArguments, networks: Networks, tokenizer: PreTrainedTokenizerBase):
        self.arguments, self.scorer, self.tokenizer = arguments, networks.scorer, tokenizer
        own = arguments.scorer_tokenizer
        self.scorer_tokenizer = AutoTokenizer.from_pretrained(own) if own else None
        if own and self.scorer_tokenizer.pad_token_id is None:
            self.scorer_tokenizer.pad_token = self.scorer_tokenizer.eos_token
        cache_dir = arguments.cache_dir or Path(arguments.out).parent / "tokens"
        tokens = tokenize(arguments.data, tokenizer, cache_dir, arguments.split, arguments.text_column)
        blocks, B, R = PackedTokens(tokens, networks.length), arguments.num_samples, arguments.num_references
        whole = len(tokens) // networks.length  # the last block may overlap the one before
        if whole < B + R:
            raise ValueError(
                f"num_samples={B} and num_references={R} need {B + R} blocks, {arguments.split} has {whole}"
            )
        order = torch.randperm(whole, generator=torch.Generator().manual_seed(step_seed(arguments.seed, whole)))
        chosen = torch.stack([blocks[i]["input_ids"] for i in order[: max(B + R, B + WORD_BLOCKS)].tolist()])
        self.data_BL, self.reference_RL = chosen[:B], chosen[B : B + R]
        special = set(tokenizer.all_special_tokens)
        is_character = all(len(token) == 1 for token in tokenizer.get_vocab() if token not in special)
        self.words = metrics.word_list(tokenizer.batch_decode(chosen[B:])) if is_character else None
        self.reference_features = metrics.text_features(self.reference_RL.numpy())
        self.floors = {str(n): metrics.ngram_floor(self.reference_RL.numpy(), n) for n in NGRAMS}
        self.reference_states = None

    def fingerprints(self) -> dict[str, str]:
        return {"data": fingerprint(self.data_BL.numpy()), "reference": fingerprint(self.reference_RL.numpy())}

    def _score_inputs(self, x_BL: torch.Tensor, texts: list[str]) -> tuple[torch.Tensor, int, torch.Tensor | None]:
        bos = self.scorer.config.bos_token_id
        if self.scorer_tokenizer is None:
            return x_BL.to(self.arguments.device), bos, None
        batch = self.scorer_tokenizer(
            texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt"
        ).to(self.arguments.device)
        return batch.input_ids, bos, batch.attention_mask

    def __call__(self, x_BL: torch.Tensor) -> dict:
        """All metrics of one set of samples (B, L), each with its interval where it has one."""
        x_BL, resamples, seed = x_BL.cpu(), self.arguments.num_resamples, self.arguments.seed
        texts, rows = self.tokenizer.batch_decode(x_BL), x_BL.numpy()
        inputs_BL, bos, is_token_BL = self._score_inputs(x_BL, texts)
        mask = _mask_token_id(self.scorer)
        nats_B = metrics.generative_nll(self.scorer, inputs_BL, bos, mask, is_token_BL).cpu()
        counts_B = torch.full_like(nats_B, inputs_BL.shape[1]) if is_token_BL is None else is_token_BL.sum(-1).cpu()
        characters_B = torch.tensor([len(text) for text in texts])
        bits = self._mean(nats_B / metrics.LN2)
        words_B = None if self.words is None else metrics.real_word_share(texts, self.words)
        reference = self.reference_RL.numpy()
        divergences = {str(n): metrics.ngram_divergence(rows, reference, n, resamples, seed) for n in NGRAMS}
        features_BF = metrics.text_features(rows)
        return {
            "nats_per_token": self._mean(nats_B),
            "generative_perplexity": {name: 2**value for name, value in bits.items()},
            "bits_per_token": bits,
            "bits_per_character": self._mean(nats_B * counts_B / characters_B / metrics.LN2),
            "token_entropy": self._mean(metrics.token_entropy(x_BL)),
            **self._mauve(inputs_BL, bos, is_token_BL),
            "energy_distance": metrics.energy_distance(features_BF, self.reference_features, 199, resamples, seed),
            "ngram_divergence": divergences,
            "repetition_rate": self._mean(metrics.repetition_rate(rows, 4)),
            "real_word_share": None if words_B is None else self._mean(words_B),
            "first_text": texts[0],
        }

    def _mean(self, values_B) -> dict[str, float]:
        low, high = metrics.bootstrap_interval(values_B, None, self.arguments.num_resamples, seed=self.arguments.seed)
        return {"mean": float(values_B.mean()), "low": low, "high": high}

    def _mauve(self, inputs_BL, bos, is_token_BL) -> dict:
        """`mauve`, and `mauve_missing` with the reason where the package is not installed."""
        if self.reference_states is None:
            texts = self.tokenizer.batch_decode(self.reference_RL)
            self.reference_states = metrics.hidden_features(self.scorer, *self._score_inputs(self.reference_RL, texts))
        states_BD = metrics.hidden_features(self.scorer, inputs_BL, bos, is_token_BL)
        try:
            found = metrics.mauve(states_BD, self.reference_states, self.arguments.num_resamples)
            return {"mauve": found, "mauve_missing": None}
        except ImportError as error:
            return {"mauve": None, "mauve_missing": str(error)}


def matched_entropy(rows: list[dict], target: float) -> list[dict]:
    """Bits per token of each sampler at the data's token entropy, on the line between the two nearest settings of its
    temperature sweep; None where the data's entropy lies outside of the sweep."""
    sweeps = {}
    for row in rows:
        sweeps.setdefault((label(row), row["num_steps"]), []).append(row)
    found = []
    for (name, num_steps), sweep in sweeps.items():
        sweep = sorted(sweep, key=lambda row: row["token_entropy"]["mean"])
        entropies = [row["token_entropy"]["mean"] for row in sweep]
        is_inside = entropies[0] <= target <= entropies[-1]

        def at_target(values, entropies=entropies, is_inside=is_inside):
            return float(np.interp(target, entropies, values)) if is_inside else None

        found.append(
            {
                "label": name,
                "num_steps": num_steps,
                "temperature": at_target([row["temperature"] for row in sweep]),
                "bits_per_token": at_target([row["bits_per_token"]["mean"] for row in sweep]),
                "entropy_range": [entropies[0], entropies[-1]],
                "seconds_per_sample": float(np.mean([row["seconds_per_sample"] for row in sweep])),
                "equivalent_passes": float(np.mean([row["equivalent_passes"] for row in sweep])),
                "scorer_is_own": sweep[0]["scorer_is_own"],
            }
        )
    return found


# ---- telling


def _interval(value: dict | None, digits: int = 3, name: str = "mean") -> str:
    if value is None:
        return ""
    low, high = value["interval"] if "interval" in value else (value["low"], value["high"])
    return f"{value[name]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def table(results: dict) -> str:
    """Markdown: all settings, then samplers at the data's token entropy."""
    head = ["sampler", "T", "temp.", "passes", "energy passes", "s/sample", "ESS", "gen. PPL", "bits/token"]
    head += ["entropy, nats", "MAUVE", "energy distance (p)", "JS 1/2/3/4, bits", "rep-4", "real words"]
    lines = []
    for row in [results["data"], *results["rows"]]:
        is_data = row is results["data"]
        cells = ["data"] + [""] * 6
        if not is_data:
            cells = [label(row) + (" (*)" if row["scorer_is_own"] else ""), f"{row['num_steps'] or ''}"]
            cells += [f"{row['temperature']:g}", f"{row['nfe']:.1f}", f"{row['energy_nfe']:.1f}"]
            cells += [f"{row['seconds_per_sample']:.3g}", "" if row["ess"] is None else f"{row['ess']:.2f}"]
        distance = row["energy_distance"]
        divergences = [f"{row['ngram_divergence'][str(n)]['divergence']:.3f}" for n in NGRAMS]
        cells += [_interval(row["generative_perplexity"], 2), _interval(row["bits_per_token"])]
        cells += [_interval(row["token_entropy"]), _interval(row["mauve"], 3, "mauve")]
        cells += [f"{_interval(distance, 4, 'distance')} ({distance['p_value']:.3f})", " / ".join(divergences)]
        cells += [_interval(row["repetition_rate"]), _interval(row["real_word_share"])]
        lines.append(cells)
    settings_table = markdown(head, lines)
    caption = (
        "{num_samples} samples, batches of {batch_size}, {dtype}, {device_name} ({threads} threads); scorer {scorer}; "
        "95% bootstrap intervals over samples."
    ).format(**results)
    if any(row["scorer_is_own"] for row in results["rows"]):
        caption += " (*) The scorer has a part in these samples: its judgement of them is worth nothing."
    if results["data"]["mauve"] is None:
        caption += f" No MAUVE: {results['data']['mauve_missing']}."
    head, lines = ["sampler", "T", "bits/token", "temp.", "s/sample", "equivalent passes"], []
    for row in results["matched_entropy"]:
        cells = [row["label"] + (" (*)" if row["scorer_is_own"] else ""), f"{row['num_steps'] or ''}"]
        cells += ["outside of the sweep", ""] if row["bits_per_token"] is None else [f"{row['bits_per_token']:.3f}"]
        cells += [] if row["bits_per_token"] is None else [f"{row['temperature']:.3f}"]
        lines.append(cells + [f"{row['seconds_per_sample']:.3g}", f"{row['equivalent_passes']:.1f}"])
    entropy = results["data"]["token_entropy"]["mean"]
    return (
        f"{caption}\n\n{settings_table}\n\nAt the data's token entropy, {entropy:.3f} nats:\n\n{markdown(head, lines)}"
    )


def plot(results: dict, path: Path) -> None:
    """A line for each sampler, against seconds and against passes: bits per token at the temperature nearest to 1 and
    at the data's entropy, and 4-gram divergence, which needs no scorer. Dashes: the scorer had a part in the text."""
    nearest = min((row["temperature"] for row in results["rows"]), key=lambda value: abs(math.log(value)))
    rows = [row | {"label": label(row)} for row in results["rows"] if row["temperature"] == nearest]
    names = list(dict.fromkeys(row["label"] for row in rows))
    matched = [row for row in results["matched_entropy"] if row["bits_per_token"] is not None]
    bits, divergence = "bits per token under the scorer", "4-gram divergence, bits"
    panels = [(f"temperature {nearest:g}", bits, rows, lambda row: row["bits_per_token"]["mean"])]
    panels += [("at the data's entropy", bits, matched, lambda row: row["bits_per_token"])] if matched else []
    panels += [(f"temperature {nearest:g}", divergence, rows, lambda row: row["ngram_divergence"]["4"]["divergence"])]
    costs = {"seconds_per_sample": "seconds per sample", "equivalent_passes": "denoiser-equivalent passes"}
    figure = Figure(figsize=(11, 4 * len(panels)), layout="constrained")  # without pyplot Agg draws: no display needed
    all_axes = figure.subplots(len(panels), 2)
    for (title, ylabel, points, value), pair in zip(panels, all_axes, strict=True):
        of_data = results["data"]["bits_per_token"]["mean"]
        of_data = of_data if ylabel == bits else results["data"]["ngram_divergence"]["4"]["divergence"]
        for axes, (cost, xlabel) in zip(pair, costs.items(), strict=True):
            for i, name in enumerate(names):
                own = [row for row in points if row["label"] == name]
                if own:
                    style = "--" if own[0]["scorer_is_own"] and ylabel == bits else "-"
                    x, y = zip(*sorted((row[cost], value(row)) for row in own), strict=True)
                    axes.plot(x, y, style, marker="o", color=f"C{i % 10}", label=name)
            axes.axhline(of_data, color="gray", linestyle=":", label="data")
            axes.set(xscale="log", xlabel=xlabel, ylabel=ylabel, title=title)
    all_axes[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=120, format="png")


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(SampleArguments, __doc__, argv)
    if arguments.from_json:
        print(table(read_results(arguments.from_json)))
        return
    if arguments.num_threads:
        torch.set_num_threads(arguments.num_threads)
    networks = Networks(arguments)
    judge = Judge(arguments, networks, AutoTokenizer.from_pretrained(arguments.model))
    out = Path(arguments.out)
    store = Store(out.with_suffix(".jsonl"))
    what = "num_samples num_references num_resamples batch_size seed dtype device scorer_tokenizer".split()
    identity = {name: getattr(arguments, name) for name in what} | judge.fingerprints()
    identity |= {name: networks.weights[name] for name in ("denoiser", "scorer")}

    def row_of(setting: dict | None) -> dict:
        if setting is None:
            return judge(judge.data_BL)
        x_BL, cost = sample(setting, networks, arguments)
        return setting | {"scorer_is_own": setting["network"] in networks.scorer_is} | cost | judge(x_BL)

    def key_of(setting: dict | None) -> str:
        made_from = [setting, networks.weights.get(setting and setting["network"]), identity]
        return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()

    grid = [None, *settings(arguments, networks)]
    grid = tqdm(grid, desc="settings")
    data, *rows = [store.row(key_of(setting), lambda setting=setting: row_of(setting)) for setting in grid]
    about = machine()
    about["versions"] |= _versions("evaluate", "mauve-text", "numpy")
    results = {"command": command("evaluate_samples", arguments, NOT_RECORDED - {"out"})}
    results |= {k: v for k, v in asdict(arguments).items() if k not in NOT_RECORDED}
    results |= {"data": data, "rows": rows, "matched_entropy": matched_entropy(rows, data["token_entropy"]["mean"])}
    results |= {
        "data_set": public_data(arguments.data),
        "length": networks.length,
        "ngram_floors": judge.floors,
        "mauve_features": "mean over positions of what the scorer's output projection reads",
        "cost": COST,
        "weights": networks.weights,
        "parameters": {name: model.num_parameters() for name, model in networks.by_name.items()}
        | {"denoiser": networks.denoiser.num_parameters(), "scorer": networks.scorer.num_parameters()},
        "body_parameters": {name: body_parameters(model) for name, model in networks.by_name.items()}
        | {"denoiser": body_parameters(networks.denoiser)},
        "device_name": torch.cuda.get_device_name() if arguments.device == "cuda" else about["cpu_name"],
    } | about
    write_json(out, results)
    write_whole(out.with_suffix(".png"), lambda path: plot(results, path))
    print(table(results))
    print(f"\nresults: {out}\nplot: {out.with_suffix('.png')}\nfinished settings: {store.path}")


def _versions(*names: str) -> dict[str, str | None]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except ImportError:  # PackageNotFoundError is one
            found[name] = None
    return found


if __name__ == "__main__":
    main()
