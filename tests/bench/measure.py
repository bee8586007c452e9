"""One row of the benchmark: a setting, and what a run of it takes, ours or the published sampler's."""

import ctypes
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

import modeling_edlm.generation_edlm
import modeling_edlm.modeling_edlm
import modeling_edlm.proposal
import modeling_edlm.vocabulary
from modeling_edlm import EDLMConfig, EDLMGenerationConfig, EDLMModel

from . import published
from .roofline import Work, share
from .stages import Target, clocks

TRIAL_SECONDS = 1.0  # a trial shorter than this is made twice: the first also pays for reserving memory


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is sampled. Batch "best" is the fastest of some, found by trials."""

    size: str
    energy: str
    num_candidates: int
    energy_window: tuple[float, float]
    num_steps: int
    batch: int | str
    compile: bool = False

    def label(self) -> str:
        window = f", k={self.num_candidates}, t in [{self.energy_window[1]:g}, {self.energy_window[0]:g}]"
        window = "" if self.energy == "none" else window
        compiled = ", compiled" if self.compile else ""
        return f"{self.size}, {self.energy}{window}, T={self.num_steps}, batch {self.batch}{compiled}"


def random_model(energy: str, size: dict, device: str, dtype: torch.dtype, seed: int = 0) -> EDLMModel:
    """Noise on every weight: as initialised, the last layers are zero, proposals uniform and all candidates equal."""
    sizes = {name: value for name, value in size.items() if name != "length"}
    # an autoregressive model has no adaptive norms, as in the published code
    own = {"cond_dim": 0} if energy in ("ar", "coar") else {}
    torch.manual_seed(seed)
    config = EDLMConfig(**sizes, max_position_embeddings=size["length"], energy_type=energy, energy_config=own)
    model = EDLMModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.to(device, dtype).eval()


def stage_targets(model: EDLMModel) -> list[Target]:
    """`generate()` never calls the denoiser as a whole: it projects only the positions that it draws."""
    return [
        (model.denoiser, "encode", "denoiser"),
        (model.denoiser.head, "forward", "projection"),
        (modeling_edlm.proposal, "uniforms", "draw"),
        (modeling_edlm.proposal, "draw", "draw"),
        (modeling_edlm.modeling_edlm, "draw_projected", "draw"),
        (modeling_edlm.vocabulary, "project", "projection"),
        (modeling_edlm.generation_edlm, "candidate_energies", "energy"),
    ]


class _Enough(Exception):
    pass


class Ours:
    """`EDLMModel.generate()`."""

    def __init__(self, energy: str, size: dict, device: str, dtype: torch.dtype, seed: int):
        self.model, self.length, self.seed = random_model(energy, size, device, dtype, seed), size["length"], seed
        self.targets = stage_targets(self.model)

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

    def step(self, setting: Setting, batch_size: int, in_window: bool) -> None:
        """The first step in which something is revealed, and no further."""

        def stop(model, step, t, state):
            if (state["sequences"] != model.config.mask_token_id).any():
                raise _Enough

        window = {"energy_window": (1.0, 0.0)} if in_window else {"num_candidates": 1}
        try:
            self.run(setting, batch_size, False, callback_on_step_end=stop, **window)
        except _Enough:
            pass

    def steps(self, setting: Setting) -> float:
        """Share of the steps that a row takes: one in which it reveals nothing costs nothing."""
        return 1 - (1 - 1 / setting.num_steps) ** self.length


class Published:
    """Its `_sample`, see `published.py`."""

    def __init__(self, reference, energy: str, size: dict, device: str, seed: int):
        self.model = published.make_sampler(reference, energy, size, seed).to(device)
        self.length, self.seed = size["length"], seed
        self.targets = published.stage_targets(reference, self.model)

    def run(self, setting: Setting, batch_size: int, compile: bool) -> dict:
        torch.manual_seed(self.seed)
        k, window = setting.num_candidates, setting.energy_window
        published.generate(self.model, setting.num_steps, batch_size, k, window)
        return {}  # its passes are counted by the clocks

    def step(self, setting: Setting, batch_size: int, in_window: bool) -> None:
        window = (1.0, 0.0) if in_window else (-1.0, -1.0)
        published.generate(self.model, 1, batch_size, setting.num_candidates, window, last_pass=False)

    def steps(self, setting: Setting) -> float:
        return 1 + 1 / setting.num_steps  # the last pass


class Bench:
    """Measures on one device."""

    def __init__(self, device: str, dtype: torch.dtype, repeats: int):
        self.device, self.dtype, self.repeats = device, dtype, repeats
        self.wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def now(self) -> float:
        self.wait()
        return time.perf_counter()

    def trial(self, sampler: Ours | Published, setting: Setting, batch_size: int, in_window: bool) -> float:
        """Seconds of a step."""
        seconds = []
        while not seconds or (len(seconds) < 2 and seconds[0] < TRIAL_SECONDS):
            start = self.now()
            sampler.step(setting, batch_size, in_window)
            seconds.append(self.now() - start)
        return min(seconds)

    def estimate(self, sampler: Ours | Published, setting: Setting, batch_size: int) -> float:
        """Seconds of a run, from a step in the window and one outside."""
        hi, lo = setting.energy_window
        times = [1 - step / setting.num_steps for step in range(setting.num_steps)]
        inside = 0 if setting.energy == "none" else sum(lo - 1e-9 <= t <= hi + 1e-9 for t in times)
        seconds = inside * self.trial(sampler, setting, batch_size, True) if inside else 0.0
        if inside < len(times):
            seconds += (len(times) - inside) * self.trial(sampler, setting, batch_size, False)
        return sampler.steps(setting) * seconds

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

    def take_turns(self, runs: list["Runs"], most: float) -> None:
        """One run of each, again and again: how fast a machine is changes by the minute.

        Args:
            most: seconds; no further turn is begun when the next run of one would pass it, but there is always one.
        """
        for _ in range(self.repeats):
            for r in runs:
                r.once()
            if any(sum(r.seconds) + r.seconds[-1] >= most for r in runs):
                break


class Runs:
    """The runs of a sampler in a setting, after what warms it up, and the row that they make."""

    def __init__(
        self, bench: Bench, sampler: Ours | Published, setting: Setting, batch_size: int, ceilings: dict | None = None
    ):
        """`ceilings` of the machine, where the work is to be counted."""
        self.bench, self.sampler, self.setting, self.batch_size = bench, sampler, setting, batch_size
        self.ceilings, self.work, self.seconds, self.on_cuda = ceilings, Work(), [], bench.device == "cuda"
        if ceilings is not None:
            with self.work:  # it warms up as well; what is compiled cannot be counted
                self.run(compile=False)
        with PeakMemory(bench.device) as self.recorded:
            for _ in range(2 * setting.compile):  # to compile, and to record CUDA graphs
                self.run(setting.compile)

    def run(self, compile: bool) -> dict:
        return self.sampler.run(self.setting, self.batch_size, compile)

    def once(self) -> None:
        # on a CPU the clocks cost microseconds; on a GPU each waits for it: they have a run of their own
        with PeakMemory(self.bench.device) if not self.seconds else nullcontext(self.memory) as self.memory:
            with nullcontext() if self.on_cuda else self.clocks() as self.stages:
                start = self.bench.now()
                self.counts = self.run(self.setting.compile)
                self.seconds.append(self.bench.now() - start)

    def clocks(self):
        return clocks(self.sampler.targets, self.bench.wait)

    def row(self) -> dict:
        memory = self.memory.bytes
        if self.on_cuda:
            memory = max(
                memory, self.recorded.bytes
            )  # a replayed graph reserves nothing: its memory was counted before
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
