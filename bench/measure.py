"""One row of the benchmark: a setting, and what a run of it takes, ours or the published sampler's."""

import ctypes
import gc
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch

import modeling_edlm.generation_edlm
import modeling_edlm.modeling_edlm
import modeling_edlm.proposal
import modeling_edlm.sampler
import modeling_edlm.vocabulary
from modeling_edlm import EDLMConfig, EDLMGenerationConfig, EDLMModel
from modeling_edlm.generation_edlm import Watch

from . import published
from .arguments import Setting
from .roofline import Work, share
from .stages import Target, clocks

TRIAL_STEPS = 3  # of a trial; the first also pays for reserving memory
TRIAL_SECONDS = 1.0  # after so long the second is the last
COMPILE_SECONDS = 60.0  # allowed for each network, until one was compiled


def random_model(energy: str, size: dict, device: str, dtype: torch.dtype, seed: int = 0) -> EDLMModel:
    """Noise on every weight: as initialised, the last layers are zero, proposals uniform and all candidates equal."""
    sizes = {name: value for name, value in size.items() if name != "length"}
    # an autoregressive model has no adaptive norms, as in the published code
    own = {"cond_dim": 0} if energy in ("ar", "coar") else {}
    torch.manual_seed(seed)
    config = EDLMConfig(**sizes, max_position_embeddings=size["length"], energy_type=energy, energy_config=own)
    model = EDLMModel(config)
    model.to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.to(dtype).eval()


def stage_targets(model: EDLMModel) -> list[Target]:
    """`generate()` never calls the denoiser as a whole: it projects only the positions that it draws."""
    return [
        (model.denoiser, "encode", "denoiser"),
        (model.denoiser.head, "forward", "projection"),
        (modeling_edlm.proposal, "uniforms", "draw"),
        (modeling_edlm.proposal, "draw", "draw"),
        (modeling_edlm.modeling_edlm, "draw_projected", "draw"),
        (modeling_edlm.vocabulary, "project", "projection"),
        (modeling_edlm.sampler, "candidate_energies", "energy"),
    ]


class LeftOut(Exception):
    """Why a row is not measured."""


def reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return str(error) if isinstance(error, LeftOut) else f"{type(error).__name__}: {error}".strip().splitlines()[0]


class Budget:
    """Of time: nothing is begun that would take longer than what is left."""

    def __init__(self, minutes: float, start: float):
        self.end = start + 60 * minutes if minutes else float("inf")

    @property
    def left(self) -> float:
        return self.end - time.perf_counter()

    def check(self, seconds: float) -> None:
        if seconds > (left := max(0.0, self.left)):
            raise LeftOut(f"it would take about {seconds:.0f} s, and {left:.0f} s are left")
        if not left:
            raise LeftOut("no time is left")


class _Enough(Exception):
    pass


class Ours:
    """`EDLMModel.generate()`."""

    def __init__(self, energy: str, size: dict, device: str, dtype: torch.dtype, seed: int):
        self.model, self.length, self.seed = random_model(energy, size, device, dtype, seed), size["length"], seed
        self.targets = stage_targets(self.model)
        self.num_networks = 1 + (energy != "none")
        self.recorded = {}  # bytes that recording CUDA graphs took, by what their shapes depend on

    def run(self, setting: Setting, batch_size: int, compile: bool, **changes) -> dict:
        """Forward passes for each row, their mean."""
        config = EDLMGenerationConfig(
            num_steps=setting.num_steps,
            num_candidates=setting.num_candidates,
            energy_window=setting.energy_window,
            return_dict_in_generate=True,
        )
        changes |= {"compile": True} if compile else {}
        output = self.model.generate(batch_size=batch_size, seed=self.seed, generation_config=config, **changes)
        return {name: float(output[name].double().mean()) for name in ("nfe", "energy_nfe")}

    def run_steps(
        self, setting: Setting, batch_size: int, compile: bool, in_window: bool, step_end: Callable[[], None]
    ) -> None:
        """A run with all of its steps in the window or outside; `step_end()` follows each that reveals something."""
        encode, end = self.model.denoiser.encode, Watch.step_end
        has_revealed = False

        def encode_noted(*args, **kwargs):
            nonlocal has_revealed
            has_revealed = True
            return encode(*args, **kwargs)

        def step_end_noted(*args):
            nonlocal has_revealed
            is_done, is_taken, has_revealed = end(*args), has_revealed, False
            if is_taken:
                step_end()
            return is_done

        window = {"energy_window": (1.0, 0.0)} if in_window else {"num_candidates": 1}
        # not a callback, for which a step in the window would collect its candidates
        with patch.object(self.model.denoiser, "encode", encode_noted), patch.object(Watch, "step_end", step_end_noted):
            self.run(setting, batch_size, compile, **window)

    def steps(self, setting: Setting) -> float:
        """Share of the steps that a row takes: one in which it reveals nothing costs nothing."""
        return 1 - (1 - 1 / setting.num_steps) ** self.length


class Published:
    """Its `_sample`, see `published.py`."""

    def __init__(self, reference, energy: str, size: dict, device: str, seed: int):
        self.model = published.make_sampler(reference, energy, size, seed, device)
        self.length, self.seed = size["length"], seed
        self.targets = published.stage_targets(reference, self.model)

    def run(self, setting: Setting, batch_size: int, compile: bool) -> dict:
        torch.manual_seed(self.seed)
        k, window = setting.num_candidates, setting.energy_window
        published.generate(self.model, setting.num_steps, batch_size, k, window)
        return {}  # its passes are counted by the clocks

    def run_steps(
        self, setting: Setting, batch_size: int, compile: bool, in_window: bool, step_end: Callable[[], None]
    ) -> None:
        """As of ours; here `step_end()` follows each step that calls the denoiser."""
        update, forward = self.model._ddpm_caching_update, self.model.backbone.forward
        last_t, has_called = None, False

        def forward_noted(*args):
            nonlocal has_called
            has_called = True
            return forward(*args)

        def end():
            nonlocal has_called
            if has_called:
                has_called = False
                step_end()

        def update_noted(x, t, dt, p_x0=None):
            nonlocal last_t
            if t is not last_t:  # it is called once or twice in a step, with the same t
                end()
            last_t = t
            return update(x, t, dt, p_x0=p_x0)

        window = (1.0, 0.0) if in_window else (-1.0, -1.0)
        torch.manual_seed(self.seed)
        with (
            patch.object(self.model, "_ddpm_caching_update", update_noted),
            patch.object(self.model.backbone, "forward", forward_noted),
        ):
            published.generate(
                self.model, setting.num_steps, batch_size, setting.num_candidates, window, last_pass=False
            )
            end()

    def steps(self, setting: Setting) -> float:
        return 1 + 1 / setting.num_steps  # the last pass


def make_sampler(arguments, reference, name: str, size: str, energy: str) -> Ours | Published:
    """The "published" one, or ours."""
    size, device, seed = arguments.all_sizes()[size], arguments.device, arguments.seed
    if name == "published":
        return Published(reference, energy, size, device, seed)
    return Ours(energy, size, device, getattr(torch, arguments.dtype), seed)


class Bench:
    """Measures on one device."""

    def __init__(self, device: str, dtype: torch.dtype, repeats: int, budget: Budget):
        self.device, self.dtype, self.repeats, self.budget = device, dtype, repeats, budget
        self.on_cuda = device == "cuda"
        self.wait = torch.cuda.synchronize if self.on_cuda else lambda: None
        # a timed run, and on a GPU, where every look at the clock waits for it, one with clocks
        self.least_runs = 1 + self.on_cuda
        self.compiling = []  # seconds for a network, where it was new

    def now(self) -> float:
        self.wait()
        return time.perf_counter()

    def tidy(self) -> None:
        """On a GPU: memory that nobody holds is free for others."""
        if self.on_cuda:
            gc.collect()
            torch.cuda.empty_cache()

    def trial(
        self, sampler: Ours | Published, setting: Setting, batch_size: int, in_window: bool
    ) -> tuple[float, float]:
        """Seconds of a step, and of what is done once in a run. The canvas is nearly all masks, so this is the most."""
        at = [self.now()]

        def step_end():
            at.append(self.now())
            self.budget.check(0.0)
            if len(at) > TRIAL_STEPS or (len(at) > 2 and at[-1] - at[0] > TRIAL_SECONDS):
                raise _Enough

        try:
            sampler.run_steps(setting, batch_size, False, in_window, step_end)
        except _Enough:
            pass
        first, *others = [end - start for start, end in pairwise(at)]
        step = min(others, default=first)
        return step, max(0.0, first - step)

    def estimate(self, sampler: Ours | Published, setting: Setting, batch_size: int) -> float:
        """Seconds of a run, from steps in the window and outside."""
        hi, lo = setting.energy_window
        times = [1 - step / setting.num_steps for step in range(setting.num_steps)]
        inside = 0 if setting.energy == "none" else sum(lo - 1e-9 <= t <= hi + 1e-9 for t in times)
        seconds, once = 0.0, 0.0
        for steps, in_window in ((inside, True), (len(times) - inside, False)):
            if steps:
                step, once = self.trial(sampler, setting, batch_size, in_window)
                seconds += steps * step
        return once + sampler.steps(setting) * seconds

    def best(self, sampler: Ours | Published, setting: Setting, sizes: list[int], most: float) -> dict[int, float]:
        """Tokens per second by batch size, estimated; sizes that would take more than `most` seconds are not tried."""
        speeds, before = {}, None
        for batch_size in sorted(sizes):
            if before is not None and before[1] * batch_size / before[0] > most:
                break
            try:
                seconds = self.estimate(sampler, setting, batch_size)
            except torch.OutOfMemoryError:
                break
            before = batch_size, seconds
            speeds[batch_size] = batch_size * sampler.length / seconds
        return speeds

    def least_seconds(self, sampler: Ours | Published, setting: Setting, batch_size: int, run: float) -> float:
        """Of a row, warming up included, where a run takes so long."""
        warm_up = isinstance(sampler, Ours) + 2 * setting.compile
        seconds = (warm_up + self.least_runs) * run
        if setting.compile and shapes(setting, batch_size) not in sampler.recorded:
            seconds += max(self.compiling, default=COMPILE_SECONDS) * sampler.num_networks
        return seconds

    def take_turns(self, runs: list["Runs"], most: float) -> None:
        """One run of each, again and again: how fast a machine is changes by the minute.

        Args:
            most: seconds; no further turn is begun when the next run of one would pass it, or the budget, but there is
                always one.
        """
        for _ in range(self.repeats):
            for r in runs:
                r.once()
            turn = sum(r.seconds[-1] for r in runs) * self.least_runs  # and what follows the last one
            if turn > self.budget.left or any(sum(r.seconds) + r.seconds[-1] >= most for r in runs):
                break


def shapes(setting: Setting, batch_size: int) -> tuple:
    """What the shapes of compiled networks depend on."""
    return batch_size, setting.num_candidates, setting.energy_window


class Runs:
    """The runs of a sampler in a setting, after what warms it up, and the row that they make."""

    def __init__(
        self, bench: Bench, sampler: Ours | Published, setting: Setting, batch_size: int, ceilings: dict | None = None
    ):
        """`ceilings` of the machine, where the work is to be counted."""
        self.bench, self.sampler, self.setting, self.batch_size = bench, sampler, setting, batch_size
        self.ceilings, self.work, self.seconds = ceilings, Work(), []
        start = bench.now()
        if ceilings is not None:
            with self.work:  # it warms up as well; what is compiled cannot be counted
                self.run(compile=False)
        if setting.compile:
            with PeakMemory(bench.device) as recorded:
                for _ in range(2):  # to compile, and to record CUDA graphs
                    self.run(compile=True)
            # graphs of the same shapes are recorded once; a replayed one reserves nothing
            key, before = shapes(setting, batch_size), sampler.recorded
            if key not in before:
                bench.compiling.append((bench.now() - start) / sampler.num_networks)
            self.recorded_bytes = before[key] = max(before.get(key, 0), recorded.bytes or 0)
        self.warm_up_seconds = bench.now() - start

    def run(self, compile: bool) -> dict:
        return self.sampler.run(self.setting, self.batch_size, compile)

    def once(self) -> None:
        # on a CPU the clocks cost microseconds; on a GPU each waits for it: they have a run of their own
        with PeakMemory(self.bench.device) if not self.seconds else nullcontext(self.memory) as self.memory:
            with nullcontext() if self.bench.on_cuda else self.clocks() as self.stages:
                start = self.bench.now()
                self.counts = self.run(self.setting.compile)
                self.seconds.append(self.bench.now() - start)

    def clocks(self):
        return clocks(self.sampler.targets, self.bench.wait)

    def row(self) -> dict:
        memory = self.memory.bytes
        if self.bench.on_cuda:
            memory = max(memory, self.recorded_bytes) if self.setting.compile else memory
            with self.clocks() as self.stages:
                self.run(self.setting.compile)
        counts, stages, setting, seconds = self.counts, self.stages, self.setting, median(self.seconds)
        if not isinstance(self.sampler, Ours):
            energy_nfe = stages.calls["energy"] * setting.num_candidates
            counts = {"nfe": float(stages.calls["denoiser"]), "energy_nfe": float(energy_nfe)}
        model = self.sampler.model
        weights = {x.data_ptr(): x.nbytes for x in (*model.parameters(), *model.buffers())}
        row = asdict(setting) | {
            "batch_size": self.batch_size,
            "seconds": seconds,
            "all_seconds": self.seconds,
            "seconds_per_sequence": seconds / self.batch_size,
            "tokens_per_second": self.batch_size * self.sampler.length / seconds,
            **counts,
            "warm_up_seconds": self.warm_up_seconds,
            "peak_memory_bytes": None if memory is None else memory + sum(weights.values()),
            "clocked_seconds": sum(stages.seconds.values()),
            "stage_seconds": stages.seconds,
        }
        if self.ceilings is not None:
            work = self.work
            shares = {"roofline_share": share(work.flops, work.bytes, seconds, self.ceilings)}
            row |= {"flops": work.flops, "bytes": work.bytes} | shares
        return row


class PeakMemory:
    """`bytes`: what was needed at most within, more than at its start; None where the system does not say."""

    def __init__(self, device: str):
        self.device, self.bytes = device, None

    def __enter__(self):
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        elif sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # what was freed is no longer resident
            try:
                Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident set starts anew
                self.start = _status("VmRSS")
            except OSError:
                self.device = "unknown"
        else:
            self.device = "unknown"
        return self

    def __exit__(self, *_):
        if self.device == "cuda":
            self.bytes = torch.cuda.max_memory_allocated() - self.start
        elif self.device == "cpu":
            self.bytes = max(0, _status("VmHWM") - self.start)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
