"""Gaps in held-out texts filled by every method, and what a judge that is not the energy's model says of them.

    python -m bench.infilling --model hub_cards/edlm-stories --judge hub_cards/edlm-stories:judge \
        --data data/tinystories-sample --out hub_cards/results/infilling-stories.json --dtype bfloat16
    python -m bench.infilling --from_json hub_cards/results/infilling-stories.json

Every method is given the text around the gap and its exact length; an EOS is never drawn. Each text has one gap of a
kind. Of several gaps in a text (`scattered`) the methods from the left fill each in turn, and read the text between.
The same seed gives the same gaps, whatever is measured on them, and the same samples. What is finished is kept in a
.jsonl beside `--out`, and the same command goes on where it was stopped.

Cost is counted in tokens computed: each token of a text that a pass of a network reads, and for a pass that goes on
from a key-value cache each token that is new. A token of the autoregressive model counts `pass_cost`, its parameters
over those of the denoiser without embeddings. `passes` are these tokens over the length of the text: a pass over the
whole text is 1, a new token of a draft 1 / L. `calls` are passes one after another: side by side many count as one.
`AR, re-weighted` has so many drafts that its tokens are those that `EDLM, rounds` took for the same gap, unless
`--drafts` says how many. `sharpened` is with p_AR to the power of 1 / `--sharpened`: as what rounds go for, and in the
weights of the same drafts.

Shapes: B texts, L length, D drafts, V vocabulary, C tokens read together.
"""

import copy
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from training.common.arguments import CommaLists, answer_early, command, generation_config, parse_arguments

TRUTH, LEFT, WEIGHED, MDLM, REFERENCE = "true text", "AR, left", "AR, re-weighted", "MDLM", "EDLM, rounds"
ALONE = "MDLM, rounds", "MDLM, rounds, sharpened"  # as many passes without an energy
SHARPENED, LIMIT, WEIGHED_SHARPENED = "EDLM, rounds, sharpened", "AR posterior", "AR, re-weighted, sharpened"
METHODS = (TRUTH, MDLM, *ALONE, "EDLM", REFERENCE, SHARPENED, LEFT, WEIGHED, WEIGHED_SHARPENED, LIMIT)
ALWAYS = (TRUTH, MDLM, REFERENCE)  # what the others are compared with, and the cost of one of them
KINDS = ("middle", "sentence", "ending", "scattered", "word")
SHOWN = 10  # gaps whose texts are kept, of each kind
NOTES = {
    "bits": "of gap and text on the right given the left, under the judge; over_truth: minus those of the true text; "
    "difference: minus those of EDLM, rounds, on the same gaps; standard errors over gaps",
    "to_sharpened": "minus those of EDLM, rounds, sharpened, on the same gaps; none where it was not measured",
    "recovered": "share of the distance between MDLM and the true text, in bits; none where MDLM is not significantly "
    "(two standard errors) above it",
    "bits_per_character": "bits over the characters of gap and right; per_gap_character: over those of the gap alone",
    "known": "1 where all words that the gap has a part in are words of the judge's training text",
    "repetition": "share of the pairs of tokens in what was filled in that occurred before in it",
    "entropy": "of the token frequencies of what was filled in, in nats",
    "seconds": "of a gap: rows side by side share the time of their batch; the methods from the left take a gap at a "
    "time, with its drafts side by side, and the sharpened weights are of drafts whose seconds are counted once",
}


@dataclass(kw_only=True)
class InfillingArguments(CommaLists):
    model: str = field(default="", metadata={"help": "folder or repo of the model, with its tokenizer"})
    ar: str = field(default="", metadata={"help": "autoregressive model, energy too; default: the model's own"})
    judge: str = field(default="", metadata={"help": "folder or repo, with :subfolder where needed; not the energy"})
    data: str = field(default="", metadata={"help": "held-out text"})
    split: str = field(default="validation,test", metadata={"help": "of the data, with commas between"})
    out: str = field(default="", metadata={"help": "results, .json; the chart has the same name, but for .png"})
    kinds: str = field(default=",".join(KINDS), metadata={"help": "of gaps"})
    methods: str = field(
        default=";".join(METHODS), metadata={"help": f"with ; between; {', '.join(ALWAYS)} are always there"}
    )
    num_gaps: int = field(default=256, metadata={"help": "of each kind, one in a text"})
    temperatures: str = field(default="1", metadata={"help": "of the logits of denoiser and autoregressive model"})
    num_steps: int = field(default=128, metadata={"help": "T; a step that reveals nothing costs nothing"})
    num_candidates: int = field(default=8, metadata={"help": "k of EDLM"})
    window: str = field(default="0.4:0", metadata={"help": "hi:lo, the energy of EDLM acts at t in [lo, hi]"})
    start: str = field(default=MDLM, metadata={"help": "MDLM or EDLM: what the rounds with an energy begin with"})
    rounds: int = field(default=64, metadata={"help": "of the corrector; without an energy as many passes of rounds"})
    corrector_size: int = field(default=2, metadata={"help": "tokens masked in a round, or all of a smaller gap"})
    corrector_sets: str = field(default="contiguous", metadata={"help": "or random"})
    corrector_candidates: int = field(default=2, metadata={"help": "of a round, the present text among them"})
    drafts: int = field(default=0, metadata={"help": f"of {WEIGHED}; 0: as many tokens as {REFERENCE} computed"})
    sharpened: float = field(default=0.0, metadata={"help": "a lower corrector_temperature; 0: the folder's"})
    limit_rounds: int = field(default=1024, metadata={"help": f"rounds of {LIMIT}"})
    limit_gaps: int = field(default=32, metadata={"help": f"gaps of each kind for {LIMIT}"})
    batch_size: int = field(default=16, metadata={"help": "gaps filled and stored together"})
    dtype: str = field(default="float32", metadata={"help": "of the methods: or bfloat16, where that is faster"})
    seed: int = 0
    num_threads: int = field(default=0, metadata={"help": "CPU threads; 0: torch's default"})
    from_json: str = field(default="", metadata={"help": "measure nothing, print and draw this file again"})

    def __post_init__(self):
        if self.from_json:
            return
        for name in ("model", "judge", "data", "out"):
            if not getattr(self, name):
                raise ValueError(f"{name} must be given, got {getattr(self, name)!r}")
        if not self.out.endswith(".json"):
            raise ValueError(f"out must end in .json, got {self.out!r}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")
        if self.start not in (MDLM, "EDLM"):
            raise ValueError(f"start must be MDLM or EDLM, got {self.start!r}")
        least = {"num_gaps": 2, "limit_gaps": 2, "rounds": 1, "limit_rounds": 1, "batch_size": 1}
        for name, value in (least | {"num_candidates": 2, "corrector_candidates": 2}).items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}, got {getattr(self, name)}")
        for name, found, known in (("kinds", self.listed("kinds"), KINDS), ("methods", self.chosen, METHODS)):
            if not found or set(found) - set(known):
                raise ValueError(f"{name} must be of {'; '.join(known)}, got {getattr(self, name)!r}")
        for name in ("sharpened", "drafts"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if len(self.tuples("window", float, "hi:lo")) != 1:
            raise ValueError(f"window must be one hi:lo, got {self.window!r}")
        for temperature in self.listed("temperatures", float) or [0.0]:
            settings = {"temperature": temperature, "energy_window": self.tuples("window", float, "hi:lo")[0]}
            sets = {"corrector_size": self.corrector_size, "corrector_sets": self.corrector_sets}
            generation_config(num_steps=self.num_steps, **sets, **settings)

    @property
    def chosen(self) -> list[str]:
        return [part.strip() for part in self.methods.split(";") if part.strip()]


if __name__ == "__main__":
    answer_early(InfillingArguments, __doc__)

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel, SuppressTokensLogitsProcessor

from modeling_edlm import EDLMGenerationConfig, EDLMModel
from modeling_edlm.backbone import suppress
from modeling_edlm.draws import draw, uniforms
from training.common.checkpoint import fingerprint, weights_hash
from training.common.components import pass_cost, with_energy
from training.common.data import document_starts, tokenize
from training.common.judge import Judge
from training.common.metrics import ratio, repetition_rate, token_entropy
from training.common.results import Store, machine, markdown, read_results, write_json, write_whole

DRAFT, KEPT = -11, -12  # counters of the draws from the left, apart from those of the sampler
DRAFTS_AT_ONCE = 64
WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")  # as the judge's list has them


# ---- the gaps


@dataclass(eq=False)
class Gap:
    """A text x (L,), what is missing in it, bool (L,), and which gap of its kind it is."""

    number: int
    x_L: torch.Tensor
    free_L: torch.Tensor

    @property
    def first(self) -> int:
        return int(self.free_L.nonzero()[0])

    @property
    def spans(self) -> list[tuple[int, int]]:
        edge = self.free_L.long().diff(prepend=torch.zeros(1, dtype=int), append=torch.zeros(1, dtype=int))
        return list(zip((edge == 1).nonzero()[:, 0].tolist(), (edge == -1).nonzero()[:, 0].tolist(), strict=True))


def windows(arguments: InfillingArguments, tokenizer, longest: int) -> list[np.ndarray]:
    """The beginning of each text, with its EOS where that is among so many tokens; blocks where there is no EOS."""
    found, eos, folder = [], tokenizer.eos_token_id, Path(arguments.out).parent / "tokens"
    for part in arguments.listed("split"):
        tokens = np.asarray(tokenize(arguments.data, tokenizer, folder, part))
        starts = np.arange(0, len(tokens), longest) if eos is None else document_starts(tokens, eos)
        found += [text[:longest].astype(np.int64) for text in np.split(tokens, starts[1:])]
    return found


def draw_gaps(kind: str, texts: list[np.ndarray], tokenizer, number: int, seed: int) -> list[Gap]:
    """The first gaps of a kind, in an order of the texts that the seed gives; those with no room for one are left out.

    ValueError where there are fewer than `number`.
    """
    rng, gaps = np.random.default_rng((seed, KINDS.index(kind))), []
    for i in rng.permutation(len(texts)):
        spans = draw_spans(kind, rng, texts[i], tokenizer)
        if spans:
            free_L = torch.zeros(len(texts[i]), dtype=torch.bool)
            for a, b in spans:
                free_L[a:b] = True
            gaps.append(Gap(len(gaps), torch.from_numpy(texts[i]), free_L))
        if len(gaps) == number:
            return gaps
    raise ValueError(f"num_gaps must be at most {len(gaps)} for gaps of kind {kind!r} in these texts, got {number}")


def draw_spans(kind: str, rng: np.random.Generator, ids: np.ndarray, tokenizer) -> list[tuple[int, int]]:
    """(start, end) of each missing piece; none where the text has no room."""
    has_end = tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id
    length = len(ids) - has_end
    if kind in ("middle", "scattered"):
        sizes = rng.integers(8, 33, 1) if kind == "middle" else rng.integers(4, 13, 3)
        least = np.array([8] + [4] * (len(sizes) - 1))  # tokens given before each, and eight after the last one
        room = length - sizes.sum() - least.sum() - 8
        if room < 0:
            return []
        starts = np.sort(rng.integers(0, room + 1, len(sizes))) + least.cumsum() + sizes.cumsum() - sizes
        return list(zip(starts.tolist(), (starts + sizes).tolist(), strict=True))
    if kind == "ending":
        size = int(rng.integers(8, 33))
        return [(length - size, length)] if has_end and length >= size + 8 else []
    text = tokenizer.decode(ids[:length])
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if encoded.input_ids != ids[:length].tolist():
        return []
    token_at = {0: 0} | {end: i + 1 for i, (_, end) in enumerate(encoded.offset_mapping)}  # of a character
    if kind == "word":
        pieces = [match.span() for match in WORD.finditer(text)]
        pieces = [(a - 1 if text[a - 1] == " " and a - 1 in token_at else a, b) for a, b in pieces[1:-1]]
    else:
        ends = [match.end() for match in re.finditer(r"[.!?][\"']?(?:\n+|(?= )|$)", text)]
        pieces = list(zip(ends[:-2], ends[1:-1], strict=True))  # neither the first sentence nor the last
    found = [(token_at[a], token_at[b]) for a, b in pieces if a in token_at and b in token_at]
    found = [(a, b) for a, b in found if a > 0 and (kind == "word" or 4 <= b - a <= 64)]
    return [found[rng.integers(len(found))]] if found else []


# ---- the methods


@dataclass
class Filled:
    """Texts x of gaps, each (L,), and per gap: passes of the denoiser and of the energy, tokens computed, calls."""

    x: list[torch.Tensor]
    nfe: list[int]
    energy_nfe: list[int]
    tokens: list[float]
    calls: list[int]


class Left:
    """Drafts of an autoregressive model, which has not seen what is on the right of the token it draws."""

    def __init__(
        self,
        ar: PreTrainedModel,
        mask_token_id: int,
        banned: list[int],
        seed: int,
        temperature: float,
        sharpened: float = 1.0,
    ):
        self.ar, self.mask, self.banned, self.seed = ar, mask_token_id, banned, seed
        self.temperature, self.sharpened = temperature, sharpened
        self.found: dict[tuple[Gap, int], tuple] = {}  # of drafts that two methods weigh

    def log_p(self, ids_DC: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """log p of what follows each of these new tokens, (D, C, V)."""
        logits_DCV = self.ar(ids_DC, past_key_values=cache, use_cache=True).logits
        return (suppress(logits_DCV, self.mask) / self.temperature).log_softmax(-1)

    @torch.no_grad()
    def drafts(self, gap: Gap, number: int, to_end: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
        """Drafts (D, L); log of their importance weights (D,), p of all tokens from the gap on over the probability of
        what was drawn: p of the text given behind it, up to what is banned; log of that p (D,); tokens computed; calls.

        With `to_end` the weights are of the whole text, else nothing is read that comes after the last gap.
        """
        bos, first = self.ar.config.get_text_config().bos_token_id, gap.first
        end = len(gap.x_L) if to_end else gap.spans[-1][1]
        prefix = torch.cat((torch.tensor([bos]), gap.x_L[:first]))[None]
        cache_of_prefix, found = DynamicCache(config=self.ar.config), []
        log_p_1V = self.log_p(prefix, cache_of_prefix)[:, -1]
        for chunk_D in torch.arange(number).split(DRAFTS_AT_ONCE):
            cache = copy.deepcopy(cache_of_prefix)
            cache.batch_repeat_interleave(len(chunk_D))
            found.append(self._go_on(gap, chunk_D, first, end, log_p_1V.expand(len(chunk_D), -1), cache))
        x_DL, log_w_D, log_p_D = (torch.cat([part[i] for part in found]) for i in range(3))
        return x_DL, log_w_D, log_p_D, first + 1 + number * (end - first - 1), 1 + found[0][3]

    def _go_on(
        self, gap: Gap, chunk_D: torch.Tensor, first: int, end: int, log_p_DV: torch.Tensor, cache: DynamicCache
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        x_DL, calls = gap.x_L.repeat(len(chunk_D), 1), 0
        log_w_D, log_q_D = torch.zeros(2, len(chunk_D), dtype=torch.float64)
        i = first
        while i < end:
            if gap.free_L[i]:
                u_D = uniforms(self.seed, DRAFT, gap.number, i, chunk_D)
                log_q_DV = log_p_DV.clone()
                log_q_DV[:, self.banned] = -torch.inf
                drawn_D1, log_q_D1 = draw(log_q_DV, u_D[:, None])
                log_w_D += (log_p_DV.gather(-1, drawn_D1) - log_q_D1)[:, 0]
                log_q_D += log_q_D1[:, 0]
                x_DL[:, i : i + 1], after = drawn_D1, i + 1
            else:  # what is given, up to the next gap
                after = i + 1
                while after < end and not gap.free_L[after]:
                    after += 1
                log_w_D += log_p_DV[:, gap.x_L[i]]
            new_DC = x_DL[:, i : after if after < end else end - 1]
            if new_DC.shape[1]:
                log_p_DCV = self.log_p(new_DC, cache)
                calls += 1
                inside_DC1 = x_DL[:, i + 1 : after, None]
                log_w_D += log_p_DCV[:, : inside_DC1.shape[1]].gather(-1, inside_DC1).sum((1, 2))
                log_p_DV = log_p_DCV[:, -1]
            i = after
        return x_DL, log_w_D, log_w_D + log_q_D, calls

    def fill(self, gap: Gap) -> tuple[torch.Tensor, int, int]:
        x_DL, _, _, tokens, calls = self.drafts(gap, 1, to_end=False)
        return x_DL[0], tokens, calls

    def fill_weighed(self, gap: Gap, number: int, is_sharpened: bool = False) -> tuple[torch.Tensor, int, int]:
        """One of the drafts, by its importance weight, that for p to a power if asked for."""
        key = gap, number
        if key not in self.found:
            x_DL, log_w_D, log_p_D, tokens, calls = self.drafts(gap, number, to_end=True)
            weights = log_w_D, log_w_D + (1 / self.sharpened - 1) * log_p_D
            kept = [x_DL[int(self.keep(log_w[None], torch.tensor([gap.number])))] for log_w in weights]
            self.found[key] = *kept, tokens, calls
        *kept, tokens, calls = self.found[key]
        return kept[is_sharpened], tokens, calls

    def keep(self, log_w_BD: torch.Tensor, number_B: torch.Tensor) -> torch.Tensor:
        """Which draft of each gap is kept, (B,)."""
        return draw(log_w_BD, uniforms(self.seed, KEPT, number_B)[:, None])[0][:, 0]


class Methods:
    """Every method at one temperature of the logits."""

    def __init__(self, model: EDLMModel, eos: int | None, sharpened: float, arguments, temperature: float):
        self.model, self.arguments, self.temperature = model, arguments, temperature
        self.banned = [] if eos is None else [eos]
        self.cost = pass_cost(model)
        left = model.energy_model, model.config.mask_token_id, self.banned, arguments.seed, temperature, sharpened
        self.left = Left(*left)
        k, of_start = arguments.corrector_candidates, arguments.start == "EDLM"
        steps = {"num_steps": arguments.num_steps, "temperature": temperature, "shared_completion": True}
        window = arguments.tuples("window", float, "hi:lo")[0]
        in_loop = {"num_candidates": arguments.num_candidates, "energy_window": window}
        start = in_loop if of_start else {"num_candidates": k, "energy_window": (0.0, 0.0)}  # no step has t = 0
        start |= {"corrector_size": arguments.corrector_size, "corrector_candidates": k}
        start |= {"corrector_sets": arguments.corrector_sets}
        alone = {"energy_window": (0.0, 0.0), "corrector_steps": arguments.rounds * k}
        self.settings = {
            MDLM: {"num_candidates": 1},
            "EDLM": in_loop,
            ALONE[0]: start | alone,
            ALONE[1]: start | alone | {"corrector_temperature": sharpened},
            REFERENCE: start | {"corrector_steps": arguments.rounds},
            SHARPENED: start | {"corrector_steps": arguments.rounds, "corrector_temperature": sharpened},
            LIMIT: start | {"corrector_steps": arguments.limit_rounds},
        }
        self.settings = {name: steps | setting for name, setting in self.settings.items()}

    def drafts(self, gap: Gap, tokens: float) -> int:
        """How many of them `AR, re-weighted` has: what is asked for, or may be for so many tokens computed."""
        if self.arguments.drafts:
            return self.arguments.drafts
        return max(1, round((tokens / self.cost - gap.first - 1) / (len(gap.x_L) - gap.first - 1)))

    def fill(self, method: str, gaps: list[Gap], first_row: int, drafts: list[int]) -> Filled:
        if method == TRUTH:
            return Filled([gap.x_L for gap in gaps], *([0] * len(gaps) for _ in range(4)))
        if method in (LEFT, WEIGHED, WEIGHED_SHARPENED):
            is_sharpened = method == WEIGHED_SHARPENED
            done = [
                self.left.fill(gap) if method == LEFT else self.left.fill_weighed(gap, number, is_sharpened)
                for gap, number in zip(gaps, drafts, strict=True)
            ]
            x, tokens, calls = (list(part) for part in zip(*done, strict=True))
            return Filled(x, [0] * len(gaps), calls, [self.cost * number for number in tokens], calls)
        x_BL, is_text_BL, free_BL = padded(gaps)
        model = self.model.denoiser if method in ALONE else self.model
        output = model.generate(
            x_BL.masked_fill(free_BL, model.config.mask_token_id),
            is_text_BL.long(),
            EDLMGenerationConfig(**self.settings[method], return_dict_in_generate=True),
            first_row=first_row,
            seed=self.arguments.seed,
            logits_processor=[SuppressTokensLogitsProcessor(self.banned)] if self.banned else None,
        )
        lengths_B = is_text_BL.sum(-1)
        tokens_B = output.nfe * lengths_B + self.cost * output.energy_tokens
        calls_B = output.nfe + (0 if model.scorer is None else (~output.energies.isnan()).sum(-1))
        x = [x_L[:length] for x_L, length in zip(output.sequences, lengths_B.tolist(), strict=True)]
        return Filled(x, *(part_B.tolist() for part_B in (output.nfe, output.energy_nfe, tokens_B, calls_B)))


def padded(gaps: list[Gap]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(B, L): texts with anything behind them, which positions are text, and which are missing."""
    parts = ([gap.x_L for gap in gaps], [torch.ones_like(gap.free_L) for gap in gaps], [gap.free_L for gap in gaps])
    return tuple(torch.nn.utils.rnn.pad_sequence(part, batch_first=True) for part in parts)  # type: ignore[return-value]


# ---- the scores


def scores(judge: Judge, gaps: list[Gap], x: list[torch.Tensor]) -> dict[str, list]:
    """What the judge says of texts in which gaps were filled, see `NOTES`; a list over gaps each."""
    x_BL, is_text_BL, free_BL = padded([Gap(gap.number, x_L, gap.free_L) for gap, x_L in zip(gaps, x, strict=True)])
    read = judge.read(x_BL, is_text_BL & (free_BL.cumsum(-1) > 0))
    rows = {"bits": read["bits"].tolist(), "characters": read["characters"].tolist()}
    rows |= {"gap_characters": [], "known": [], "exact": [], "entropy": [], "repetition": []}
    for gap, x_L in zip(gaps, x, strict=True):
        new = x_L[gap.free_L]
        rows["gap_characters"].append(sum(len(text) for text in pieces(judge, gap, x_L)))
        rows["known"].append(float(all(word in judge.words for word in words_in_gap(judge, gap, x_L))))
        rows["exact"].append(float(torch.equal(x_L, gap.x_L)))
        rows["entropy"].append(float(token_entropy(new[None])))
        rows["repetition"].append(float(repetition_rate([new.tolist()], 2)[0]))
    return rows


def pieces(judge: Judge, gap: Gap, x_L: torch.Tensor) -> list[str]:
    return [judge.text(x_L[a:b]) for a, b in gap.spans]


def words_in_gap(judge: Judge, gap: Gap, x_L: torch.Tensor) -> list[str]:
    """The words that the gaps have a part in."""
    text, found = judge.text(x_L), []
    for a, b in gap.spans:
        start, end = len(judge.text(x_L[:a])), len(judge.text(x_L[:b]))
        found += [match[0].lower() for match in WORD.finditer(text) if match.start() < end and match.end() > start]
    return found


def summarise(rows: list[dict]) -> list[dict]:
    """The averages, with standard errors over gaps, of what was measured of each gap, of which the bits are kept."""
    of = {(row["kind"], row["temperature"], row["method"]): row["per_gap"]["bits"] for row in rows}
    for row in rows:
        own = {name: np.array(values) for name, values in row["per_gap"].items()}
        n, bits = len(own["bits"]), own["bits"]
        truth, mdlm, ours = (np.array(of[row["kind"], row["temperature"], name][:n]) for name in ALWAYS)
        row["num_gaps"] = n
        row["over_truth"], row["difference"] = ratio(bits - truth), ratio(bits - ours)
        sharpened, distance = of.get((row["kind"], row["temperature"], SHARPENED)), ratio(mdlm - truth)
        row["to_sharpened"] = None if sharpened is None else ratio(bits - np.array(sharpened[:n]))
        is_far = distance["mean"] > 2 * distance["stderr"]
        row["recovered"] = ratio(mdlm - bits, mdlm - truth) if is_far else None
        row["bits_per_character"] = ratio(bits, own["characters"])
        row["per_gap_character"] = ratio(bits, own["gap_characters"])
        names = ("bits", "known", "exact", "entropy", "repetition", "passes", "tokens", "calls", "nfe", "energy_nfe")
        row |= {name: ratio(own[name]) for name in (*names, "seconds")}
        row["per_gap"] = {"bits": [round(float(value), 4) for value in bits]}
    return rows


# ---- the table and the chart


def table(results: dict) -> str:
    """Markdown: a table for each kind of gap and temperature, the best first."""

    def cell(value: dict | None, digits: int) -> str:
        return "-" if value is None else f"{value['mean']:.{digits}f} +- {value['stderr']:.{digits}f}"

    head = ["method", "gaps", "bits over the true text", f"minus {REFERENCE}", f"minus {SHARPENED}"]
    head += ["of the way from MDLM to the true text"]
    head += ["bits per character", "known", "exact", "entropy", "repetition", "passes", "calls", "seconds"]
    lines = ["Judge's bits of gap and right side given the left, per gap: lower is better.", ""]
    for (kind, temperature), rows in groups(results).items():
        cells = [
            [row["method"], str(row["num_gaps"]), cell(row["over_truth"], 1), cell(row["difference"], 1)]
            + [cell(row["to_sharpened"], 1)]
            + [cell(row["recovered"], 2), cell(row["bits_per_character"], 3), cell(row["known"], 2)]
            + [f"{row[name]['mean']:.2f}" for name in ("exact", "entropy", "repetition")]
            + [f"{row[name]['mean']:.{digits}f}" for name, digits in (("passes", 0), ("calls", 0), ("seconds", 2))]
            for row in sorted(rows, key=lambda row: row["over_truth"]["mean"])
        ]
        lines += [f"{kind}, temperature {temperature:g}", "", markdown(head, cells), ""]
    return "\n".join(lines)


def groups(results: dict) -> dict[tuple[str, float], list[dict]]:
    found: dict[tuple[str, float], list[dict]] = {}
    for row in results["rows"]:
        found.setdefault((row["kind"], row["temperature"]), []).append(row)
    return found


def plot(results: dict, path: Path) -> None:
    """Judge's bits over those of the true text, a panel for each kind of gap and temperature; two standard errors."""
    found = groups(results)
    names = [name for name in METHODS if name != TRUTH and any(row["method"] == name for row in results["rows"])]
    colors = {
        MDLM: "black",
        "MDLM, rounds": "dimgray",
        LEFT: "tab:green",
        WEIGHED: "tab:olive",
        WEIGHED_SHARPENED: "y",
        LIMIT: "tab:red",
    }
    figure = Figure(figsize=(3.5 + 3 * len(found), 1.4 + 0.36 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    for axes, ((kind, temperature), rows) in zip(panels, found.items(), strict=True):
        for row in rows:
            if row["method"] != TRUTH:
                color = colors.get(row["method"], "tab:blue")
                over, y = row["over_truth"], names[::-1].index(row["method"])
                axes.errorbar(over["mean"], y, xerr=2 * over["stderr"], marker="o", capsize=3, color=color)
        axes.axvline(0, color="gray", linestyle="--")
        axes.set(title=kind if temperature == 1 else f"{kind}, temperature {temperature:g}")
        axes.grid(alpha=0.3, axis="x")
    panels[0].set_yticks(range(len(names)), names[::-1])
    figure.supxlabel("judge's bits of a gap and what follows it, over those of the true text", fontsize="medium")
    figure.savefig(path, dpi=110, format="png")


# ---- all of it


def measure(method: str, gaps: list[Gap], methods: Methods, judge: Judge, store: Store, key: dict, spent, bar) -> dict:
    """Of each gap, in the order of their numbers: what the method took and what the judge says of it."""
    size, parts = methods.arguments.batch_size, []
    ordered = sorted(gaps, key=lambda gap: (len(gap.x_L), gap.number))  # little padding
    for start in range(0, len(ordered), size):
        now = ordered[start : start + size]
        drafts = [methods.drafts(gap, spent[gap.number]) if "weighted" in method else 1 for gap in now]

        def make(now=now, start=start, drafts=drafts) -> dict:
            begun = time.perf_counter()
            filled = methods.fill(method, now, start, drafts)
            seconds = (time.perf_counter() - begun) / len(now)
            cost = {name: part for name, part in vars(filled).items() if name != "x"}
            passes = [tokens / len(gap.x_L) for tokens, gap in zip(filled.tokens, now, strict=True)]
            cost |= {"passes": passes, "seconds": [seconds] * len(now), "number": [gap.number for gap in now]}
            texts = [pieces(judge, gap, x_L) for gap, x_L in zip(now, filled.x, strict=True)]
            return cost | scores(judge, now, filled.x) | {"text": texts}

        settings = methods.settings.get(method, {"temperature": methods.temperature, "drafts": drafts})
        of_batch = fingerprint([part for gap in now for part in (gap.x_L, gap.free_L)])
        parts.append(store.row(key | {"method": method, "first_row": start, "gaps": of_batch} | settings, make))
        bar.update(len(now))
    per_gap = {name: [value for part in parts for value in part[name]] for name in parts[0]}
    order = np.argsort(per_gap.pop("number"))
    return {name: [values[i] for i in order] for name, values in per_gap.items()}


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(InfillingArguments, __doc__, argv)
    if arguments.from_json:
        report(read_results(arguments.from_json), Path(arguments.from_json))
        return
    if arguments.num_threads:
        torch.set_num_threads(arguments.num_threads)
    out, tokenizer = Path(arguments.out), AutoTokenizer.from_pretrained(arguments.model)
    model = EDLMModel.from_pretrained(arguments.model, dtype=torch.float32).eval()
    sharpened = arguments.sharpened or model.generation_config.corrector_temperature
    model = with_energy(model.denoiser, "ar", arguments.ar) if arguments.ar else model
    if model.energy_type != "ar":
        raise ValueError(f"model must have an AR energy, or ar be given, got {arguments.model!r}")
    judge = Judge.load(arguments.judge, tokenizer)
    key = {"weights": weights_hash(model), "judge": judge.weights_hash([model.energy_model], arguments.judge)}
    key |= {"seed": arguments.seed, "dtype": arguments.dtype}
    model.to(getattr(torch, arguments.dtype))

    texts = windows(arguments, tokenizer, model.config.max_position_embeddings)
    gaps = {k: draw_gaps(k, texts, tokenizer, arguments.num_gaps, arguments.seed) for k in arguments.listed("kinds")}
    store, rows, shown = Store(out.with_suffix(".jsonl")), [], []
    names = [name for name in METHODS if name in (*ALWAYS, *arguments.chosen)]
    temperatures = arguments.listed("temperatures", float)
    limit = {name: arguments.limit_gaps if name == LIMIT else arguments.num_gaps for name in names}
    total = sum(min(limit[name], len(part)) for name in names for part in gaps.values()) * len(temperatures)
    with tqdm(total=total, unit="gap") as bar:
        for temperature in temperatures:
            methods = Methods(model, tokenizer.eos_token_id, sharpened, arguments, temperature)
            for kind, all_gaps in gaps.items():
                spent: list[float] = []
                shown += [shown_gap(kind, temperature, gap, judge) for gap in all_gaps[:SHOWN]]
                for name in names:
                    bar.set_postfix_str(f"{kind}: {name}")
                    now = all_gaps[: limit[name]]
                    per_gap = measure(name, now, methods, judge, store, key | {"kind": kind}, spent, bar)
                    spent = per_gap["tokens"] if name == REFERENCE else spent
                    for row, text in zip(shown[-len(all_gaps[:SHOWN]) :], per_gap.pop("text"), strict=False):
                        row["filled"][name] = text
                    rows.append({"kind": kind, "temperature": temperature, "method": name, "per_gap": per_gap})
    recorded = {"out", "num_threads", "from_json"}
    results = {
        "command": command("bench.infilling", arguments, recorded - {"out"}),
        "arguments": {name: value for name, value in asdict(arguments).items() if name not in recorded | {"data"}},
        **machine(),
        "notes": NOTES,
        "pass_cost": pass_cost(model),
        "sharpened": sharpened,
        "rows": summarise(rows),
        "texts": shown,
    }
    write_json(out, results)
    report(results, out)


def shown_gap(kind: str, temperature: float, gap: Gap, judge: Judge) -> dict:
    """A gap as people may read it: the text with [...] where something is missing."""
    ends = [0, *(end for span in gap.spans for end in span), len(gap.x_L)]
    given = [judge.text(gap.x_L[a:b]) for a, b in zip(ends[::2], ends[1::2], strict=True)]
    return {"kind": kind, "temperature": temperature, "number": gap.number, "given": "[...]".join(given), "filled": {}}


def report(results: dict, out: Path) -> None:
    write_whole(out.with_suffix(".png"), lambda path: plot(results, path))
    print(table(results))
    print(f"results: {out}\nchart: {out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
