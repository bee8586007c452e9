"""Whether the sampler is right on this device: its law against enumeration, its parts, and the published numbers.

    python -m bench.on_device
    python -m bench.on_device --device cpu --rows 10000 --compiled_energies ar,step
    python -m bench.on_device --from_json hub_cards/results/laws-cpu.json

Every row is one check. Its verdict is "ok", "bad", "reported" (numbers alone) or "not run" (the minutes were over); the
exit code is 1 if one is bad. What is bad:

- law: chi-square of the samples against the enumerated law. All p-values of a run together call a right sampler wrong
  once in 10,000 runs: each is held to 1e-4 over their number. In float32 the law is that of the eager network in both
  modes, so that what a compiler does wrong is wrong here. In bfloat16 it is that of the very network that sampled, in
  its mode and with about as many rows, for rounding may depend on both; draws and weights are not rounded, so the
  p-value is held to the same limit. How far rounding moves the law, `tv_rounding` (total variation to the float32
  law), is held to ROUNDING: a wrong network is not a rounded one. Beside it stand the same distance of the samples,
  `tv_float32`, what draws from the float32 law itself would have, `tv_noise`, and how far the law moves if the network
  is given 64 rows at a time, `tv_64_rows`.
- power, in float32: the samples of k = 8 that are not told from the law of k = 1 at the same limit; with shared
  completions also from that of independent ones.
- primitives, adapter: what is not equal bit for bit, or below float32; p-values as above.
- parity: in float32, a number outside the tolerance of the fixture.
- same seed: in float32, if more than SHARE of the rows have another text or an energy that differs by more than CLOSE
  (which also happens where rounding moves a draw that is not kept).

Shapes: N rows, L length, V vocabulary, S states of the toy, masks included, P all pairs of two of them, C completions,
M rows of logits, D hidden size, K draws.
"""

import copy
import itertools
import math
import shlex
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache, partial
from pathlib import Path
from unittest import mock

from tqdm.auto import tqdm

from training.common.arguments import CommaLists, answer_early, found_device, parse_arguments

DTYPES, MODES = ("float32", "bfloat16"), ("eager", "compiled")
ENERGIES = ("ar", "coar", "nce", "step", "lora", "shared")  # step, lora: of xs; shared: completions, with nce
CANDIDATES = (1, 2, 8)


@dataclass(kw_only=True)
class OnDeviceArguments(CommaLists):
    device: str = field(default="auto", metadata={"help": "cpu, cuda, or auto: cuda where there is one"})
    dtypes: str = field(default=",".join(DTYPES), metadata={"help": "of the weights"})
    modes: str = field(default=",".join(MODES), metadata={"help": "compiled: on a GPU as CUDA graphs"})
    energies: str = field(default=",".join(ENERGIES), metadata={"help": "whose laws are checked"})
    compiled_energies: str = field(default=",".join(ENERGIES), metadata={"help": "of these, compiled too"})
    num_candidates: str = field(default=",".join(map(str, CANDIDATES)), metadata={"help": "values of k"})
    rows: int = field(default=40_000, metadata={"help": "samples for each law"})
    max_minutes: float = field(default=5.0, metadata={"help": "no check is begun later; what is left is not run"})
    seed: int = 0
    out: str = field(default="", metadata={"help": "default: hub_cards/results/laws-<device>.json"})
    from_json: str = field(default="", metadata={"help": "check nothing, print and draw this file again"})

    def __post_init__(self):
        for name, kind, allowed in (
            ("dtypes", str, DTYPES),
            ("modes", str, MODES),
            ("energies", str, ENERGIES),
            ("compiled_energies", str, ENERGIES),
            ("num_candidates", int, CANDIDATES),
        ):
            if not self.listed(name, kind) or not set(self.listed(name, kind)) <= set(allowed):
                raise ValueError(f"{name} must be of {allowed}, with commas between, got {getattr(self, name)!r}")
        if self.rows < 1:
            raise ValueError(f"rows must be at least 1, got {self.rows}")
        if self.max_minutes < 0:
            raise ValueError(f"max_minutes must not be negative, got {self.max_minutes}")
        self.device = found_device(self.device)
        self.out = self.out or f"hub_cards/results/laws-{self.device}.json"


if __name__ == "__main__":
    answer_early(OnDeviceArguments, __doc__)

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # where pytest finds the modules of the tests

import test_convert
from test_adapter import adapted, denoiser_of
from test_sampler import chi_square

from modeling_edlm import EDLMModel, draws, proposal, sampler
from modeling_edlm.adapter import save_adapter
from modeling_edlm.backbone import compiled, linear, suppress
from modeling_edlm.draws import draw, uniforms
from modeling_edlm.vocabulary import draw_projected
from support.toy import MASK, chain_law, law_p_k, make_broad_toy, make_toy, p_value, total_variation
from training.common.results import machine, read_results, write_json, write_whole

ALPHA = 1e-4  # of all p-values of a run together
ROUNDING = 0.04  # 0.012 is the largest that was found; without its energy a law of k = 8 is 0.2 away
SHARE = 0.01  # of the texts: where rounding moves one draw, all that follows in its text is another
CLOSE = 1e-4  # of energies, absolute and relative to the largest
WINDOWS = ((1.0, 0.0), (0.7, 0.5))  # all three steps, and the second alone
FREE, STEPS = (MASK, MASK, MASK), 3
STATES_SL = torch.cartesian_prod(*[torch.arange(MASK + 1)] * len(FREE))
VOCABULARY = 50_258

# Blocks are compiled for each number of rows, padded to a power of two. Of 5,000 rows 3,500 reveal something in a step:
# 4,096. The different ones of their candidates come to 8,192 or 16,384 as long as they are one batch; cut into batches,
# what is left over would have any size. (CUDA's attention ends at 65,535 rows.)
PART = 5000
BATCHES = {"denoiser_batch_size": PART, "energy_batch_size": max(CANDIDATES) * PART}
PASS = 4096  # rows that a network is enumerated with


class Enumerated:
    """What `toy.chain_law` asks of a model, looked up on the CPU in tables that the model's own device has made.

    compile: whether the blocks are compiled. num_rows: in one pass of the network.
    """

    def __init__(self, model: EDLMModel, compile: bool, num_rows: int):
        self.model, self.config, self.compile, self.num_rows = model, model.config, compile, num_rows
        self.log_p_at, self.energy_at = cache(self._log_p_at), cache(self._energy_at)

    def log_p_x0(self, xt_NL: torch.Tensor, t: float) -> torch.Tensor:
        return self.log_p_at(t)[place(xt_NL)]

    def energy(self, x_NL: torch.Tensor, xt_NL: torch.Tensor, t: float) -> torch.Tensor:
        return self.energy_at(t)[place(x_NL) * len(STATES_SL) + place(xt_NL)]

    def equals(self, other: "Enumerated") -> bool:
        """Bit for bit."""
        tables = ((self.log_p_at, other.log_p_at), (self.energy_at, other.energy_at))
        return all(
            torch.equal(ours(1 - i / STEPS).nan_to_num(), theirs(1 - i / STEPS).nan_to_num())
            for i in range(STEPS + 1)
            for ours, theirs in tables
        )

    def _log_p_at(self, t: float) -> torch.Tensor:
        """(S, L, V). Each state is there 64 times, which makes as many rows as there are pairs."""
        xt_PL = STATES_SL.repeat(len(STATES_SL), 1)
        return self.passes(lambda xt_NL: self.model.log_p_x0(xt_NL, t), xt_PL)[: len(STATES_SL)]

    def _energy_at(self, t: float) -> torch.Tensor:
        """(P,), x by xt. Pairs in which x is no completion of xt are never looked up."""
        x_PL, xt_PL = STATES_SL.repeat_interleave(len(STATES_SL), 0), STATES_SL.repeat(len(STATES_SL), 1)
        rows = [x_PL, xt_PL]
        if self.config.energy_type != "nce":  # these need log mu, and in the sampler it is that of the proposal's pass
            log_p_PL = self.log_p_x0(xt_PL, t).gather(-1, x_PL[..., None])[..., 0]
            rows.append(log_p_PL.where(xt_PL == MASK, 0.0).sum(-1))
        return self.passes(lambda x_NL, xt_NL, *log_mu_N: self.model.energy(x_NL, xt_NL, t, None, *log_mu_N), *rows)

    @torch.no_grad()
    def passes(self, network: Callable, *rows: torch.Tensor) -> torch.Tensor:
        parts = zip(*(x.to(self.model.device).split(self.num_rows) for x in rows), strict=True)
        with compiled(self.compile):
            return torch.cat([network(*part).cpu() for part in parts])


def place(states_NL: torch.Tensor) -> torch.Tensor:
    """Of each state in STATES_SL."""
    return (states_NL * (MASK + 1) ** torch.arange(len(FREE)).flip(0)).sum(-1)


def known_law(log_mu_C: torch.Tensor, energy_C: torch.Tensor, k: int) -> torch.Tensor:
    """`law_p_k`, which is asked for the same law again and again."""
    return _known_law(tuple(log_mu_C.tolist()), tuple(energy_C.tolist()), k)


@cache
def _known_law(log_mu: tuple, energy: tuple, k: int) -> torch.Tensor:
    return law_p_k(torch.tensor(log_mu, dtype=torch.float64), torch.tensor(energy), k)


def make_model(energy: str) -> EDLMModel:
    if energy == "lora":
        denoiser = denoiser_of(layers=1, seed=4)  # a broad one, where the energy matters
        adapter = adapted(denoiser, energy_target="xs").get_base_model()
        return EDLMModel.from_components(denoiser, adapter, "nce").eval()
    if energy == "shared":
        return make_broad_toy("nce")
    return make_toy("nce" if energy == "step" else energy, "xs" if energy == "step" else "x0")


@dataclass
class Row:
    """One check. `check` gives its numbers, and whether they are right: None where they are only reported."""

    kind: str
    what: str
    dtype: str
    mode: str
    check: Callable[[], tuple[dict, bool | None]]
    has_p_value: bool = False
    numbers: dict = field(default_factory=dict)
    verdict: str = "not run"

    def run(self) -> None:
        try:
            self.numbers, is_right = self.check()
            self.verdict = "reported" if is_right is None else "ok" if is_right else "bad"
        except Exception as error:  # what does not run is not right, and the others are still worth doing
            first = (str(error).splitlines() or [""])[0]
            self.numbers, self.verdict = {"error": f"{type(error).__name__}: {first[:200]}"}, "bad"
            tqdm.write(traceback.format_exc(), file=sys.stderr)
        if self.verdict == "bad":
            tqdm.write(f"bad: {self.what}, {self.dtype}, {self.mode}: {shown(self.numbers)}", file=sys.stderr)

    def as_json(self) -> dict:
        return {name: getattr(self, name) for name in ("kind", "what", "dtype", "mode", "numbers", "verdict")}


class Checks:
    """All checks of a run, as `rows`, and what several of them need."""

    def __init__(self, arguments: OnDeviceArguments):
        self.arguments, self.device, self.seed = arguments, arguments.device, arguments.seed
        self.model, self.law, self.enumerated = cache(self._model), cache(self._law), cache(self._enumerated)
        self.parity = cache(self._parity)
        self.samples = lru_cache(maxsize=1)(self._samples)  # power is that of the law just before it
        self.rows = list(self.plan())
        self.alpha = ALPHA / max(1, sum(row.has_p_value for row in self.rows))

    def plan(self) -> Iterator[Row]:
        """What takes longest to compile comes last."""
        dtypes, modes = self.arguments.listed("dtypes"), self.arguments.listed("modes")
        yield Row("primitives", "uniforms: as on the CPU", "float64", "eager", self.uniforms_are_the_same)
        for dtype in dtypes:
            what = f"draw: {VOCABULARY:,} logits"
            yield Row("primitives", what, dtype, "eager", partial(self.draws, dtype), True)
            yield Row("primitives", "dtypes: draws, weights", dtype, "eager", partial(self.dtypes_within, dtype))
        what = f"draw: a projection on {VOCABULARY:,}"
        yield Row("primitives", what, "float32", "eager", self.projected_draws, True)
        for dtype, name in itertools.product(dtypes, test_convert.QUANTITIES):
            yield Row("parity", f"parity: {name}", dtype, "eager", partial(self.published_number, name, dtype))
        for dtype in dtypes:
            yield Row("adapter", "adapter: the denoiser's numbers", dtype, "eager", partial(self.adapter_off, dtype))
        for mode, dtype in itertools.product(modes, dtypes):
            energies = self.arguments.listed("energies")
            if mode == "compiled":
                energies = [e for e in energies if e in self.arguments.listed("compiled_energies")]
            for energy in [e for e in ("nce", "ar") if e in energies]:
                if mode == "compiled":
                    check = partial(self.same_seed, energy, dtype, True)
                    yield Row("same seed", f"same seed: {energy}, as eager", dtype, mode, check)
                elif self.device != "cpu" and dtype == "float32":
                    check = partial(self.same_seed, energy, dtype, False)
                    yield Row("same seed", f"same seed: {energy}, as on the CPU", dtype, mode, check)
            yield from self.plan_laws(energies, dtype, mode)

    def plan_laws(self, energies: list[str], dtype: str, mode: str) -> Iterator[Row]:
        candidates = self.arguments.listed("num_candidates", int)
        if 1 in candidates:
            check = partial(self.sampled_law, "nce", 1, WINDOWS[0], dtype, mode)
            yield Row("law", "law: k=1", dtype, mode, check, True)
        for energy, k, window in itertools.product(energies, [k for k in candidates if k > 1], WINDOWS):
            what = f"law: {energy}, k={k}, t in [{window[1]:g}, {window[0]:g}]"
            yield Row("law", what, dtype, mode, partial(self.sampled_law, energy, k, window, dtype, mode), True)
            if k == max(CANDIDATES) and window == WINDOWS[0] and dtype == "float32":
                what, check = f"power: {energy}, k={k}", partial(self.power, energy, k, dtype, mode)
                yield Row("power", what, dtype, mode, check)

    # ---- the law

    def _model(self, energy: str, dtype: str) -> EDLMModel:
        return make_model(energy).to(self.device, getattr(torch, dtype))

    def _enumerated(self, energy: str, dtype: str, compile: bool, num_rows: int = PASS) -> Enumerated:
        return Enumerated(self.model(energy, dtype), compile, num_rows)

    def _law(self, energy: str, k: int, window: tuple, *network) -> dict[tuple, float]:
        """`network`: dtype, whether it is compiled, and the rows of a pass."""
        tables = self.enumerated(energy, *network)
        return chain_law(tables, FREE, STEPS, k, window, known_law, shared=energy == "shared")

    def _samples(self, energy: str, k: int, window: tuple, dtype: str, mode: str) -> torch.Tensor:
        """(rows, L) on the CPU. Every law has a seed of its own, so that the p-values are independent."""
        settings = list(itertools.product(ENERGIES, CANDIDATES, WINDOWS, DTYPES, MODES))
        rows = torch.arange(self.arguments.rows)
        parts = [
            self.model(energy, dtype).generate(
                batch_size=len(part),
                first_row=int(part[0]),
                seed=self.seed * len(settings) + settings.index((energy, k, window, dtype, mode)),
                num_steps=STEPS,
                num_candidates=k,
                energy_window=window,
                shared_completion=energy == "shared",
                compile=mode == "compiled",
                **BATCHES,
            )
            for part in rows.tensor_split(math.ceil(len(rows) / PART))
        ]
        return torch.cat([x_NL.cpu() for x_NL in parts])

    def sampled_law(self, energy: str, k: int, window: tuple, dtype: str, mode: str) -> tuple[dict, bool]:
        samples_NL = self.samples(energy, k, window, dtype, mode)
        exact = self.law(energy, k, window, "float32", False)
        if dtype == "float32":
            p = p_value(samples_NL, exact)
            return {"p": p}, p >= self.alpha
        law = self.law(energy, k, window, dtype, mode == "compiled")
        n, counts = len(samples_NL), Counter(map(tuple, samples_NL.tolist()))
        numbers = {
            "p": p_value(samples_NL, law),
            "tv_rounding": total_variation(law, exact),
            "tv_float32": total_variation({x: count / n for x, count in counts.items()}, exact),
            "tv_noise": sum(math.sqrt(p * (1 - p) / (2 * math.pi * n)) for p in exact.values()),
        }
        if mode == "eager":
            few = (dtype, False, len(STATES_SL))
            is_same = self.enumerated(energy, *few).equals(self.enumerated(energy, dtype, False))
            numbers["tv_64_rows"] = 0.0 if is_same else total_variation(law, self.law(energy, k, window, *few))
        return numbers, numbers["p"] >= self.alpha and numbers["tv_rounding"] <= ROUNDING

    def power(self, energy: str, k: int, dtype: str, mode: str) -> tuple[dict, bool]:
        samples_NL, tables = self.samples(energy, k, WINDOWS[0], dtype, mode), self.enumerated(energy, dtype, False)
        others = {"p_of_k=1": chain_law(tables, FREE, STEPS, 1)}
        if energy == "shared":
            others["p_of_independent"] = chain_law(tables, FREE, STEPS, k, WINDOWS[0], known_law)
        numbers = {name: p_value(samples_NL, law) for name, law in others.items()}
        return numbers, max(numbers.values()) < self.alpha

    # ---- what it is made of

    def uniforms_are_the_same(self) -> tuple[dict, bool]:
        """Rows, steps, positions and candidates as the sampler counts them, and seeds at the ends of 64 bits."""
        counters = (torch.arange(500)[:, None, None], -1, torch.arange(-2, 32)[:, None], torch.arange(8))
        unequal = total = 0
        for seed in (self.seed, -1, 2**63, 2**64 - 2):
            here = uniforms(seed, *(c.to(self.device) if isinstance(c, torch.Tensor) else c for c in counters))
            there = uniforms(seed, *counters)
            unequal, total = unequal + int((here.cpu() != there).sum()), total + there.numel()
            is_double = here.dtype == there.dtype == torch.float64
        return {"unequal": unequal, "of": total}, unequal == 0 and is_double

    def projection(self, dtype: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """hidden (1, D), weight (V, D), bias (V,)."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = (1, 16), (VOCABULARY, 16), (VOCABULARY,)
        return tuple(torch.randn(*s, generator=generator).to(self.device, getattr(torch, dtype)) for s in shapes)

    def count(self, draw_at: Callable, log_p_V: torch.Tensor) -> tuple[dict, bool]:
        """What `draw_at`, of uniforms (M, K), draws in 50 rows of each sample of a law, against these logarithms."""
        counts_V = torch.zeros(VOCABULARY, dtype=torch.int64)
        row_M1, sample_K = torch.arange(50, device=self.device)[:, None], torch.arange(self.arguments.rows)
        for part_K in sample_K.to(self.device).split(400):
            x_MK = draw_at(uniforms(self.seed, row_M1, part_K))
            counts_V += torch.bincount(x_MK.flatten().cpu(), minlength=VOCABULARY)
        p = chi_square(counts_V, log_p_V.cpu().softmax(-1))
        return {"p": p, "draws": int(counts_V.sum())}, p >= self.alpha and counts_V[-1] == 0

    def draws(self, dtype: str) -> tuple[dict, bool]:
        logits_1V = suppress(linear(*self.projection(dtype)), VOCABULARY - 1)
        return self.count(lambda u_MK: draw(logits_1V.expand(len(u_MK), -1), u_MK)[0], logits_1V[0].double())

    def projected_draws(self) -> tuple[dict, bool]:
        """Without the table of logits; the law is of a product in float64."""
        hidden_1D, weight_VD, bias_V = self.projection("float32")
        logits_V = weight_VD.double() @ hidden_1D[0].double() + bias_V
        logits_V[-1] = -torch.inf

        def draw_at(u_MK):
            return draw_projected(hidden_1D.repeat(len(u_MK), 1), weight_VD, bias_V, VOCABULARY - 1, u_MK)[0]

        return self.count(draw_at, logits_V)

    def dtypes_within(self, dtype: str) -> tuple[dict, bool]:
        """Of what goes into the draws of candidates and into the choice among them, and of what comes out."""
        seen = {}

        def watched(function, *names):
            def call(*arguments):
                results = function(*arguments)
                for name, x in zip(names, (*arguments, *results), strict=True):
                    if isinstance(x, torch.Tensor) and x.is_floating_point():
                        seen[name] = str(x.dtype).removeprefix("torch.")
                return results

            return call

        with ExitStack() as patches:
            for module, function, *names in (
                (proposal, "draw", "logits", "u", "x", "log_mu"),
                (sampler, "choose", "energies", "tau", "u_choice", "is_move", "kept", "ess"),
                (draws, "draw", "log_w", "u_choice", "kept", "log_p_kept"),
            ):
                watcher = watched(getattr(module, function), *names)
                patches.enter_context(mock.patch.object(module, function, watcher))
            self.model("nce", dtype).generate(batch_size=8, num_steps=STEPS, energy_window=WINDOWS[0], seed=self.seed)
        names = {"logits", "u", "log_mu", "energies", "u_choice", "ess", "log_w", "log_p_kept"}
        return seen, seen.keys() == names and set(seen.values()) <= {"float32", "float64"}

    # ---- the published numbers

    def _parity(self, dtype: str) -> tuple[dict, dict]:
        """Of `test_convert`, made here: every number, and how far it is from the published one."""
        published, converted = test_convert.published(), test_convert.converted
        inputs = {name: value.to(self.device) for name, value in published.items()}

        @cache
        def here(*kind):
            return copy.deepcopy(converted(*kind)).to(self.device, getattr(torch, dtype))

        with mock.patch.multiple(test_convert, published=lambda: inputs, converted=here):
            ours = {name: value.float().cpu() for name, value in test_convert.ours.__wrapped__().items()}
        with mock.patch.object(test_convert, "ours", lambda: ours):
            pairs = {name: test_convert.compared(name) for name in test_convert.QUANTITIES}
            return pairs, test_convert.report()

    def published_number(self, name: str, dtype: str) -> tuple[dict, bool | None]:
        pairs, report = self.parity(dtype)
        names = ("max_abs_difference", "largest_value")
        is_close = torch.isclose(*pairs[name], **test_convert.MANIFEST["suggested_tolerance"]).all()
        return {n: report[name][n] for n in names}, bool(is_close) if dtype == "float32" else None

    # ---- an adapter, and the same seed

    @torch.no_grad()
    def adapter_off(self, dtype: str) -> tuple[dict, bool]:
        """Entries of the denoiser's logits, and tokens of its texts, that an energy over its own blocks changes."""
        donor = denoiser_of(length=8)
        model = EDLMModel.from_components(denoiser_of(length=8)).to(self.device, getattr(torch, dtype)).eval()
        xt_NL = torch.randint(0, MASK + 1, (64, 8), generator=torch.Generator().manual_seed(self.seed)).to(self.device)
        options = {"num_steps": 4, "energy_window": WINDOWS[0], "seed": self.seed}

        def logits():
            return model.denoiser(xt_NL, t=0.6).logits

        before, text_before, unequal = logits(), model.generate(xt_NL, num_candidates=1, **options), {}
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(folder, adapted(donor, energy_target="xs"), donor, None)
            model.load_energy(folder)
        unequal["attached"] = int((logits() != before).sum())
        within = []
        layer = model.energy_model.network.backbone.blocks[0].fc1
        hook = layer.register_forward_hook(lambda *_: within.append(int((logits() != before).sum())))
        text = model.generate(xt_NL, num_candidates=4, **options)
        hook.remove()
        unequal |= {"within the energy": max(within), "afterwards": int((logits() != before).sum())}
        unequal["text of k=1"] = int((model.generate(xt_NL, num_candidates=1, **options) != text_before).sum())
        changed = int((text != text_before).sum())  # the energy does something
        return unequal | {"text of k=4": changed}, not any(unequal.values()) and changed > 0

    def same_seed(self, energy: str, dtype: str, compile: bool) -> tuple[dict, bool | None]:
        """Texts of 24 tokens, compiled against eager, or eager on this device against the CPU."""
        model = make_toy(energy, length=24).to(getattr(torch, dtype))
        # 246 of 256 rows reveal something in a step, and their candidates are padded to 512: few graphs again
        options = {"batch_size": 256, "num_steps": 8, "num_candidates": 2, "energy_window": WINDOWS[0]}
        options |= {"energy_batch_size": 512, "seed": self.seed, "return_dict_in_generate": True}
        other = None if compile else model.generate(**options)
        model.to(self.device)
        here = model.generate(compile=compile, **options)
        other = model.generate(**options) if other is None else other
        sequences, energies = ([x[name].cpu() for x in (here, other)] for name in ("sequences", "energies"))
        is_equal_N = (sequences[0] == sequences[1]).all(-1)
        difference_N, scale = (x.nan_to_num() for x in energies), 1 + float(energies[1].nan_to_num().abs().max())
        difference_N = torch.sub(*difference_N).abs().amax(-1)  # NaN where a row reveals nothing in a step
        is_close_N = is_equal_N & (difference_N <= CLOSE * scale)  # else another candidate was kept, or it is wrong
        of_equal = difference_N[is_equal_N]
        numbers = {
            "equal_texts": float(is_equal_N.double().mean()),
            "close_energies_too": float(is_close_N.double().mean()),
            "median_difference": float(of_equal.median()) if len(of_equal) else None,
            "max_difference": float(of_equal.max()) if len(of_equal) else None,
            "largest_energy": scale - 1,
        }
        return numbers, numbers["close_energies_too"] >= 1 - SHARE if dtype == "float32" else None


def torch_settings() -> dict:
    """What the precision of products depends on."""
    cuda, settings = torch.backends.cuda, {"cuda": torch.version.cuda}
    if torch.cuda.is_available():
        settings["compute_capability"] = list(torch.cuda.get_device_capability())
    return settings | {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "allow_tf32": {"matmul": cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
        "allow_bf16_reduced_precision_reduction": cuda.matmul.allow_bf16_reduced_precision_reduction,
        "sdp": [n for n in ("flash", "mem_efficient", "math", "cudnn") if getattr(cuda, f"{n}_sdp_enabled")()],
    }


def shown(numbers: dict) -> str:
    return ", ".join(f"{n} {value:.3g}" if isinstance(value, float) else f"{n} {value}" for n, value in numbers.items())


def text(results: dict) -> str:
    lines = ["| what | dtype | mode | numbers | verdict |", "| --- " * 5 + "|"]
    for row in results["rows"]:
        lines.append("| {what} | {dtype} | {mode} | {shown} | {verdict} |".format(**row, shown=shown(row["numbers"])))
    counts = Counter(row["verdict"] for row in results["rows"])
    counted = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("ok", "bad", "reported", "not run"))
    about = "{device_name} ({options[device]}), {options[rows]:,} samples of each law, p-values held to "
    about += "{alpha_of_a_row:.2g}, {total_seconds:.0f} s"
    return "\n".join([*lines, "", f"{counted}; {about.format(**results)}"])


def plot(results: dict, path: Path) -> None:
    """The p-values of the laws in order, over those that a uniform variable would have."""
    groups = {}
    for row in results["rows"]:
        if row["kind"] == "law" and "p" in row["numbers"]:
            groups.setdefault(f"{row['dtype']}, {row['mode']}", []).append(row["numbers"]["p"])
    figure = Figure(figsize=(5, 5), layout="constrained")  # without pyplot: needs no display
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="gray", linewidth=1)
    for name, values in groups.items():
        expected = [(i + 0.5) / len(values) for i in range(len(values))]
        axes.plot(expected, sorted(values), "o", markersize=4, label=f"{name} ({len(values)})")
    axes.set(xlabel="expected of a uniform variable", ylabel="p-value of a law", xlim=(0, 1), ylim=(0, 1))
    axes.set_title("{device_name}, {options[rows]:,} samples of each".format(**results), fontsize="small")
    if groups:
        axes.legend(loc="upper left", fontsize="small")
    figure.savefig(path, dpi=120, format="png")


def show(results: dict, out: Path) -> int:
    """Prints and draws; the exit code."""
    write_whole(out.with_suffix(".png"), lambda path: plot(results, path))
    print(text(results))
    return int(any(row["verdict"] == "bad" for row in results["rows"]))


def main(argv: list[str] | None = None) -> int:
    start, argv = time.perf_counter(), sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(OnDeviceArguments, __doc__, argv)
    if arguments.from_json:
        return show(read_results(arguments.from_json), Path(arguments.from_json))
    torch.set_float32_matmul_precision("highest")  # no TF32
    checks, out = Checks(arguments), Path(arguments.out)
    options = {name: value for name, value in asdict(arguments).items() if name not in ("out", "from_json")}
    results = {"command": shlex.join(["python", "-m", "bench.on_device", *argv]), "options": options} | machine()
    results["device_name"] = torch.cuda.get_device_name() if arguments.device == "cuda" else results["cpu_name"]
    results |= {"torch_settings": torch_settings(), "alpha": ALPHA, "alpha_of_a_row": checks.alpha}
    for row in (progress := tqdm(checks.rows)):
        progress.set_description(f"{row.what}, {row.dtype}, {row.mode}")
        if time.perf_counter() - start < 60 * arguments.max_minutes:
            row.run()
        results |= {"total_seconds": time.perf_counter() - start, "rows": [r.as_json() for r in checks.rows]}
        write_json(out, results)
    code = show(results, out)
    print(f"results: {out}, {out.with_suffix('.png')}")
    return code


if __name__ == "__main__":
    sys.exit(main())
