"""Options of the benchmark and of the profile, the sizes of their models and the settings that they measure."""

import itertools
from dataclasses import dataclass, field, replace

from training.common.arguments import KINDS, CommaLists, found_device, generation_config

ENERGY_TYPES = ("none", *KINDS)

OWN_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "length", "vocab_size", "cond_dim")
SIZES = {  # on a GPU the published size; on a CPU smaller, so that all of it takes less than ten minutes on two cores
    "cpu": {"characters": (256, 6, 4, 256, 28, 128), "subwords": (256, 6, 4, 256, 50258, 128)},
    "cuda": {"characters": (768, 12, 12, 256, 28, 128), "subwords": (768, 12, 12, 1024, 50258, 128)},
}
CHOICES = {
    "grid": ("star", "modes", "full"),
    "dtype": ("float32", "bfloat16"),
    "compile": ("false", "true", "both"),
}
LEAST = {"repeats": 1, "num_threads": 0, "max_minutes": 0, "row_seconds": 0, "published_row_seconds": 0, "steps": 1}
LEAST |= dict.fromkeys(OWN_SIZES, 1) | {"vocab_size": 2, "cond_dim": 0}
WARM_UP_STEPS = 2  # of a profiled run: constants are made, memory is reserved
AT_LEAST_ONE = ("num_candidates", "num_steps", "trial_batch_sizes", "published_candidates")  # lists


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


@dataclass(kw_only=True)
class CommonArguments(CommaLists):
    """What the benchmark and the profile have in common. Options whose default is None depend on the device."""

    device: str = field(default="auto", metadata={"help": "cpu, cuda, or auto: cuda where there is one"})
    sizes: str | None = field(default=None, metadata={"help": "characters, subwords: vocabularies of 28 and of 50,258"})
    energies: str | None = field(default=None, metadata={"help": "energy types"})
    batch_sizes: str | None = field(default=None, metadata={"help": "samples made at a time"})
    num_candidates: str | None = field(default=None, metadata={"help": "k, where there is an energy"})
    num_steps: str | None = field(default=None, metadata={"help": "denoising steps T"})
    compile: str | None = field(default=None, metadata={"help": "false, true, or both: batch 1 in both ways"})
    dtype: str | None = field(default=None, metadata={"help": "float32 or bfloat16"})
    repeats: int = field(default=3, metadata={"help": "timed runs of each row at most"})
    num_threads: int = field(default=0, metadata={"help": "CPU threads; 0: torch's default"})
    max_minutes: float = field(default=0.0, metadata={"help": "no row is begun that would end later; 0: no limit"})
    seed: int = 0
    hidden_size: int | None = field(default=None, metadata={"help": "this and the next five: instead of the sizes'"})
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    length: int | None = None
    vocab_size: int | None = None
    cond_dim: int | None = None
    out: str = field(default="", metadata={"help": "default: in hub_cards/results, named after the device"})
    resume: bool = field(default=False, metadata={"help": "keep the rows that are in `out`"})
    from_json: str = field(default="", metadata={"help": "measure nothing, print and draw this file again"})

    def __post_init__(self):
        self.device = found_device(self.device)
        options = vars(self)
        for name, value in self.DEFAULTS[self.device].items():
            if options[name] is None:
                options[name] = value
        for name in CHOICES.keys() & options.keys():
            _check_choice(name, options[name])
        for name in LEAST.keys() & options.keys():
            if options[name] is not None and options[name] < LEAST[name]:
                raise ValueError(f"{name} must be at least {LEAST[name]}, got {options[name]}")
        names = self.listed("sizes")
        if not names or not set(names) <= SIZES[self.device].keys():
            raise ValueError(f"sizes must be of {tuple(SIZES[self.device])}, with commas between, got {self.sizes!r}")
        for name in {"energies", "published_energies"} & options.keys():
            if not self.listed(name) or not set(self.listed(name)) <= set(ENERGY_TYPES):
                raise ValueError(f"{name} must be of {ENERGY_TYPES}, with commas between, got {options[name]!r}")
        for name in options.keys() & AT_LEAST_ONE:
            if min(self.listed(name, int), default=0) < 1:
                raise ValueError(f"{name} must be at least 1, got {options[name]!r}")
        for size in self.all_sizes().values():
            if size["hidden_size"] % (2 * size["num_attention_heads"]):
                heads = f"num_attention_heads={size['num_attention_heads']}"
                raise ValueError(f"hidden_size must be an even multiple of {heads}, got {size['hidden_size']}")
        self.out = self.out or f"hub_cards/results/{self.NAME}-{self.device}.json"
        if not self.out.endswith(".json"):  # the chart has the same name, but for .png
            raise ValueError(f"out must end in .json, got {self.out!r}")

    def all_sizes(self) -> dict[str, dict[str, int]]:
        changes = {name: getattr(self, name) for name in OWN_SIZES if getattr(self, name) is not None}
        table = SIZES[self.device]
        return {name: dict(zip(OWN_SIZES, table[name], strict=True)) | changes for name in self.listed("sizes")}


@dataclass(kw_only=True)
class BenchArguments(CommonArguments):
    energy_windows: str = field(default="1.0:0.8,1.0:0.0", metadata={"help": "hi:lo, the energy acts at t in [lo, hi]"})
    grid: str | None = field(
        default=None,
        metadata={
            "help": "star; modes: a star of k, windows and T, each at every batch and way; full: all combinations"
        },
    )
    trial_batch_sizes: str | None = field(default=None, metadata={"help": "among which the best is"})
    row_seconds: float = field(default=20.0, metadata={"help": "a longer run is left out, more are not begun"})
    published_steps: str | None = field(default=None, metadata={"help": "T beside the published sampler; 0: without"})
    published_candidates: str | None = field(default=None, metadata={"help": "k beside it"})
    published_energies: str | None = field(default=None, metadata={"help": "energy types beside it"})
    published_batch_sizes: str | None = field(default=None, metadata={"help": "as batch_sizes, beside it"})
    published_row_seconds: float | None = field(default=None, metadata={"help": "as row_seconds, beside it"})

    NAME = "bench"
    DEFAULTS = {
        "cpu": {
            "sizes": "characters,subwords",
            "energies": "none,ar,nce",
            "batch_sizes": "1,8,best",
            "num_candidates": "2,8,16",
            "num_steps": "16,4,64",
            "compile": "false",
            "dtype": "float32",
            "grid": "star",
            "trial_batch_sizes": "1,8,32",
            "published_steps": "16",
            "published_candidates": "2",
            "published_energies": "none,ar",
            "published_batch_sizes": "1,8",
            "published_row_seconds": 300.0,
        },
        "cuda": {
            "sizes": "subwords",
            "energies": "none,ar,coar,nce",
            "batch_sizes": "1,best",
            "num_candidates": "8,2,16",
            "num_steps": "128,1024",
            "compile": "both",
            "dtype": "bfloat16",
            "grid": "modes",
            "trial_batch_sizes": "8,16,32,64",
            "published_steps": "128,1024",
            "published_candidates": "8,2,16",
            "published_energies": "none,ar,coar,nce",
            "published_batch_sizes": "1,best",
            "published_row_seconds": 30.0,
        },
    }

    def __post_init__(self):
        super().__post_init__()
        if min(self.listed("published_steps", int), default=-1) < 0:
            raise ValueError(f"published_steps must be at least 0, got {self.published_steps!r}")
        for name in ("batch_sizes", "published_batch_sizes"):
            if min((1 if b == "best" else b for b in self.batches(name)), default=0) < 1:
                raise ValueError(f"{name} must be at least 1, or best, got {getattr(self, name)!r}")
        self.windows()

    def batches(self, name: str) -> list[int | str]:
        return self.listed(name, lambda part: part if part == "best" else int(part))

    def windows(self) -> list[tuple[float, float]]:
        windows = []
        for part in self.listed("energy_windows"):
            try:
                windows.append(generation_config(energy_window=[float(x) for x in part.split(":")]).energy_window)
            except ValueError:
                raise ValueError(f"energy_windows must be hi:lo with 1 >= hi >= lo >= 0, got {part!r}") from None
        if not windows:
            raise ValueError(f"energy_windows must be hi:lo, with commas between, got {self.energy_windows!r}")
        return windows

    def choices(self, energy: str, prefix: str = "") -> dict[str, list]:
        """T, windows and k, the usual ones first; `prefix`: beside the published sampler."""
        acts = energy != "none"
        return {
            "num_steps": [T for T in self.listed(f"{prefix}steps" if prefix else "num_steps", int) if T],
            "energy_window": self.windows() if acts else [(1.0, 0.0)],
            "num_candidates": self.listed(f"{prefix}candidates" if prefix else "num_candidates", int) if acts else [1],
        }

    def settings(self, size: str, energy: str) -> list[Setting]:
        """Of the grid."""
        axes = self.choices(energy)
        ways = {
            "batch": self.batches("batch_sizes"),
            "compile": {"false": [False], "true": [True], "both": [False, True]}[self.compile],
        }
        if self.grid == "star":
            return [Setting(size=size, energy=energy, **values) for values in _star(axes | ways)]
        rows = [
            Setting(size=size, energy=energy, **values, **way)
            for values in (_star if self.grid == "modes" else _all)(axes)
            for way in _all(ways)
        ]
        return [row for row in rows if not (self.compile == "both" and row.compile and row.batch != 1)]

    def published_settings(self, size: str, energy: str) -> list[Setting]:
        """Of the published sampler. In the grid "modes" another batch than the first is for the usual setting alone."""
        axes, batches = self.choices(energy, "published_"), self.batches("published_batch_sizes")
        rows = []
        for number, values in enumerate((_star if self.grid == "modes" else _all)(axes)):
            for batch in batches[:1] if self.grid == "modes" and number else batches:
                rows.append(Setting(size=size, energy=energy, **values, batch=batch))
        return rows

    def groups(self, with_published: bool) -> list[tuple[str, list[tuple[str, Setting]]]]:
        """What is measured by turns, with the name of the list that each goes into and of the part that they make.

        The usual k, window and T come first, then other k, other windows, other T; of these first the first batch size
        for each energy. A time budget thus leaves out what matters least.
        """
        groups, beside = {}, set()
        for size, energy in itertools.product(self.listed("sizes"), self.listed("energies")):
            for setting in self.settings(size, energy):
                groups.setdefault(replace(setting, compile=False), []).append(("rows", setting))
        for size, energy in itertools.product(self.listed("sizes"), self.listed("published_energies")):
            for setting in self.published_settings(size, energy) if with_published else ():
                ways = {"false": [False], "true": [True], "both": [False, True][: 1 + (setting.batch == 1)]}
                ours = [("rows", replace(setting, compile=way)) for way in ways[self.compile]]
                group = groups.setdefault(setting, [])
                group += [row for row in ours if row not in group] + [("published", setting)]
                beside.add(replace(setting, batch=None))

        def rank(setting: Setting) -> tuple:
            axes = self.choices(setting.energy)
            places = [_place(values, getattr(setting, name)) for name, values in axes.items()]
            batches = self.batches("batch_sizes")
            names = ("sizes", setting.size), ("energies", setting.energy)
            return *places, _place(batches, setting.batch), *(_place(self.listed(n), value) for n, value in names)

        return [
            ("published" if replace(setting, batch=None) in beside else "grid", groups[setting])
            for setting in sorted(groups, key=rank)
        ]


@dataclass(kw_only=True)
class ProfileArguments(CommonArguments):
    steps: int = field(default=4, metadata={"help": "steps that are timed and profiled, after two that warm up"})

    NAME = "profile"
    DEFAULTS = {
        "cpu": {
            "sizes": "subwords",
            "energies": "ar,nce",
            "batch_sizes": "1",
            "num_candidates": "8",
            "num_steps": "16",
            "compile": "false",
            "dtype": "float32",
        },
        "cuda": {
            "sizes": "subwords",
            "energies": "ar,nce",
            "batch_sizes": "1",
            "num_candidates": "8",
            "num_steps": "128",
            "compile": "both",
            "dtype": "bfloat16",
        },
    }

    def __post_init__(self):
        super().__post_init__()
        if min(self.listed("batch_sizes", int), default=0) < 1:
            raise ValueError(f"batch_sizes must be at least 1, got {self.batch_sizes!r}")
        least = self.steps + WARM_UP_STEPS
        if len(self.listed("num_steps", int)) > 1 or int(self.num_steps) < least:
            raise ValueError(f"num_steps must be one number, at least {least}, got {self.num_steps!r}")


def _all(axes: dict[str, list]) -> list[dict]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _star(axes: dict[str, list]) -> list[dict]:
    """All first values, and what differs from these in one."""
    usual = {name: values[0] for name, values in axes.items()}
    return [usual] + [usual | {name: value} for name, values in axes.items() for value in values[1:]]


def _place(values: list, value) -> int:
    return values.index(value) if value in values else len(values)


def _check_choice(name: str, value: str) -> None:
    if value not in CHOICES[name]:
        raise ValueError(f"{name} must be one of {CHOICES[name]}, got {value!r}")
