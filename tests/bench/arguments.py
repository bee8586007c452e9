"""Options of the benchmark, the sizes of its models and the settings that it measures."""

import itertools
from dataclasses import dataclass, field, replace

import torch

from modeling_edlm import EDLMGenerationConfig
from modeling_edlm.configuration_edlm import ENERGY_TYPES
from training.results import CommaLists

from .measure import Setting

OWN_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "length", "vocab_size", "cond_dim")
SIZES = {  # on a GPU the published size; on a CPU smaller, so that all of it takes less than ten minutes on two cores
    "cpu": {"characters": (256, 6, 4, 256, 28, 128), "subwords": (256, 6, 4, 256, 50258, 128)},
    "cuda": {"characters": (768, 12, 12, 256, 28, 128), "subwords": (768, 12, 12, 1024, 50258, 128)},
}
DEFAULTS = {
    "cpu": {
        "dtype": "float32",
        "num_steps": "16,4,64",
        "trial_batch_sizes": "1,8,32",
        "compile": "false",
        "row_seconds": 20.0,
        "published_steps": 16,
        "published_batch_sizes": "1,8",
    },
    "cuda": {
        "dtype": "bfloat16",
        "num_steps": "128,32,1024",
        "trial_batch_sizes": "1,8,16,32,64,128",
        "compile": "both",
        "row_seconds": 20.0,
        "published_steps": 128,
        "published_batch_sizes": "1,8,best",
    },
}
CHOICES = {
    "device": ("auto", "cpu", "cuda"),
    "grid": ("star", "full"),
    "dtype": ("float32", "bfloat16"),
    "compile": ("false", "true", "both"),
}
LEAST = {"repeats": 1, "num_threads": 0, "row_seconds": 0, "published_steps": 0, "published_row_seconds": 0}
LEAST |= dict.fromkeys(OWN_SIZES, 1) | {"vocab_size": 2, "cond_dim": 0}


@dataclass(kw_only=True)
class BenchArguments(CommaLists):
    device: str = field(default="auto", metadata={"help": "cpu, cuda, or auto: cuda where there is one"})
    sizes: str = field(default="characters,subwords", metadata={"help": "vocabularies of 28 and of 50,258"})
    energies: str = field(default="none,ar,nce", metadata={"help": "energy types"})
    batch_sizes: str = field(default="1,8,best", metadata={"help": "samples made at a time; best: found by trials"})
    num_candidates: str = field(default="2,8,16", metadata={"help": "k, where there is an energy"})
    energy_windows: str = field(default="1.0:0.8,1.0:0.0", metadata={"help": "hi:lo, the energy acts at t in [lo, hi]"})
    num_steps: str | None = field(default=None, metadata={"help": "denoising steps T"})
    compile: str | None = field(default=None, metadata={"help": "false, true, or both: batch 1 in both ways"})
    grid: str = field(default="star", metadata={"help": "star, or full: all combinations"})
    trial_batch_sizes: str | None = field(default=None, metadata={"help": "among which the best is"})
    dtype: str | None = field(default=None, metadata={"help": "float32 or bfloat16"})
    repeats: int = field(default=3, metadata={"help": "timed runs of each row at most"})
    row_seconds: float | None = field(default=None, metadata={"help": "a longer run is left out, more are not begun"})
    num_threads: int = field(default=0, metadata={"help": "CPU threads; 0: torch's default"})
    seed: int = 0
    published_steps: int | None = field(default=None, metadata={"help": "T beside the published sampler; 0: without"})
    published_candidates: str = field(default="2", metadata={"help": "k beside it"})
    published_energies: str = field(default="none,ar", metadata={"help": "energy types beside it"})
    published_batch_sizes: str | None = field(default=None, metadata={"help": "as batch_sizes, beside it"})
    published_row_seconds: float = field(default=300.0, metadata={"help": "as row_seconds, beside it"})
    hidden_size: int | None = field(default=None, metadata={"help": "this and the next five: instead of the sizes'"})
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    length: int | None = None
    vocab_size: int | None = None
    cond_dim: int | None = None
    out: str = field(default="", metadata={"help": "default: hub_cards/results/bench-<device>.json"})
    resume: bool = field(default=False, metadata={"help": "keep the rows that are in `out`"})
    from_json: str = field(default="", metadata={"help": "measure nothing, print and draw this file again"})

    def __post_init__(self):
        _check_choice("device", self.device)
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device must be one that torch finds here, got 'cuda'")
        for name, value in DEFAULTS[self.device].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name in CHOICES:
            _check_choice(name, getattr(self, name))
        for name, least in LEAST.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        names = self.listed("sizes")
        if not names or not set(names) <= SIZES[self.device].keys():
            raise ValueError(f"sizes must be of {tuple(SIZES[self.device])}, with commas between, got {self.sizes!r}")
        for name in ("energies", "published_energies"):
            if not self.listed(name) or not set(self.listed(name)) <= set(ENERGY_TYPES):
                raise ValueError(f"{name} must be of {ENERGY_TYPES}, with commas between, got {getattr(self, name)!r}")
        for name in ("num_candidates", "num_steps", "trial_batch_sizes", "published_candidates"):
            if min(self.listed(name, int), default=0) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        for name in ("batch_sizes", "published_batch_sizes"):
            if min((1 if b == "best" else b for b in self.batches(name)), default=0) < 1:
                raise ValueError(f"{name} must be at least 1, or best, got {getattr(self, name)!r}")
        self.windows()
        for size in self.all_sizes().values():
            if size["hidden_size"] % (2 * size["num_attention_heads"]):
                heads = f"num_attention_heads={size['num_attention_heads']}"
                raise ValueError(f"hidden_size must be an even multiple of {heads}, got {size['hidden_size']}")
        self.out = self.out or f"hub_cards/results/bench-{self.device}.json"
        if not self.out.endswith(".json"):  # the chart has the same name, but for .png
            raise ValueError(f"out must end in .json, got {self.out!r}")

    def all_sizes(self) -> dict[str, dict]:
        own = {name: getattr(self, name) for name in OWN_SIZES if getattr(self, name) is not None}
        table = SIZES[self.device]
        return {name: dict(zip(OWN_SIZES, table[name], strict=True)) | own for name in self.listed("sizes")}

    def batches(self, name: str) -> list[int | str]:
        try:
            return [part if part == "best" else int(part) for part in self.listed(name)]
        except ValueError:
            raise ValueError(f"{name} must be numbers, or best, got {getattr(self, name)!r}") from None

    def windows(self) -> list[tuple[float, float]]:
        windows = []
        for part in self.listed("energy_windows"):
            try:
                windows.append(EDLMGenerationConfig(energy_window=[float(x) for x in part.split(":")]).energy_window)
            except ValueError:
                raise ValueError(f"energy_windows must be hi:lo with 1 >= hi >= lo >= 0, got {part!r}") from None
        if not windows:
            raise ValueError(f"energy_windows must be hi:lo, with commas between, got {self.energy_windows!r}")
        return windows

    def settings(self, size: str, energy: str) -> list[Setting]:
        """Of the grid, the usual one first."""
        axes = {
            "num_candidates": self.listed("num_candidates", int) if energy != "none" else [1],
            "energy_window": self.windows() if energy != "none" else [(1.0, 0.0)],
            "num_steps": self.listed("num_steps", int),
            "batch": self.batches("batch_sizes"),
            "compile": {"false": [False], "true": [True], "both": [False, True]}[self.compile],
        }
        usual = Setting(size=size, energy=energy, **{name: values[0] for name, values in axes.items()})
        if self.grid == "star":
            star = (replace(usual, **{name: value}) for name, values in axes.items() for value in values)
            return list(dict.fromkeys([usual, *star]))
        full = [replace(usual, **dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]
        return [row for row in full if not (self.compile == "both" and row.compile and row.batch != 1)]

    def published_settings(self, size: str, energy: str) -> list[Setting]:
        """Ours beside the published sampler, in the windows of the grid."""
        choices = [(1, (1.0, 0.0))]
        if energy != "none":
            choices = itertools.product(self.listed("published_candidates", int), self.windows())
        rows = []
        for batch, (k, window) in itertools.product(self.batches("published_batch_sizes"), list(choices)):
            row = Setting(
                size=size,
                energy=energy,
                num_candidates=k,
                energy_window=window,
                num_steps=self.published_steps,
                batch=batch,
                compile=self.compile == "true",
            )
            rows += [row] + [replace(row, compile=True)] * (self.compile == "both" and batch == 1)
        return rows


def _check_choice(name: str, value: str) -> None:
    if value not in CHOICES[name]:
        raise ValueError(f"{name} must be one of {CHOICES[name]}, got {value!r}")
