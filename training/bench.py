"""Speed of `generate()` with random weights: what an energy costs on this machine.

    python -m training.bench --size small
    python -m training.bench --from_json hub_cards/results/bench-small-cpu.json

A row is the median of some runs after a warm-up, all with one seed, so that they do the same work. The split into
denoiser, energy and rest comes from one more run: its hooks wait for the device and slow it down.
"""

import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from modeling_edlm import EDLMConfig, EDLMGenerationConfig, EDLMModel
from modeling_edlm.configuration_edlm import ENERGY_TYPES

from .results import CommaLists, read_results, write_json, write_whole
from .trainer import parse_arguments

OWN_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "length", "vocab_size", "cond_dim")
SIZES = {  # of the model that is trained here, and of the published one
    "small": dict(zip(OWN_SIZES, (192, 4, 3, 256, 28, 0), strict=True)),
    "full": dict(zip(OWN_SIZES, (768, 12, 12, 1024, 50258, 128), strict=True)),
}
CHOICES = {"size": tuple(SIZES), "dtype": ("float32", "bfloat16"), "device": ("auto", "cpu", "cuda")}
LEAST = dict.fromkeys(OWN_SIZES, 1) | {"vocab_size": 2, "cond_dim": 0}
LEAST |= {"repeats": 1, "num_threads": 0, "energy_batch_size": 0}
CAPTION = (
    "{size}: {hidden_size} wide, {num_hidden_layers} blocks, {num_attention_heads} heads, length {length}, vocabulary "
    "{vocab_size}; random weights; {dtype}; {device_name} ({device}), {threads} threads; median of {repeats} runs"
)


@dataclass(kw_only=True)
class BenchArguments(CommaLists):
    size: str = field(default="small", metadata={"help": "small or full (for a GPU)"})
    energies: str = field(default="none,coar,nce", metadata={"help": "energy types, with commas between"})
    num_candidates: int = field(default=8, metadata={"help": "k, where there is an energy"})
    num_steps: int = field(default=64, metadata={"help": "denoising steps T"})
    energy_window: str = field(default="1.0,0.8", metadata={"help": "hi,lo: the energy acts at times in [lo, hi]"})
    energy_batch_size: int = field(default=0, metadata={"help": "candidates in one pass of the energy; 0: all"})
    batch_sizes: str = field(default="1,16", metadata={"help": "samples made at a time, with commas between"})
    dtype: str = field(default="float32", metadata={"help": "float32 or bfloat16"})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, or auto: cuda where there is one"})
    repeats: int = field(default=3, metadata={"help": "timed runs of each row"})
    num_threads: int = field(default=0, metadata={"help": "CPU threads; 0: torch's default"})
    seed: int = 0
    hidden_size: int | None = field(default=None, metadata={"help": "this and the next four: instead of --size's"})
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    length: int | None = None
    vocab_size: int | None = None
    cond_dim: int | None = field(default=None, metadata={"help": "adaptive layer norms; 0: plain; default: --size's"})
    out: str = field(default="", metadata={"help": "default: hub_cards/results/bench-<size>-<device>.json"})
    from_json: str = field(default="", metadata={"help": "measure nothing, print the table of this file again"})

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device must be one that torch finds here, got 'cuda'")
        for name in OWN_SIZES:
            if getattr(self, name) is None:
                setattr(self, name, SIZES[self.size][name])
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.hidden_size % (2 * self.num_attention_heads):
            heads = f"num_attention_heads={self.num_attention_heads}"
            raise ValueError(f"hidden_size must be an even multiple of {heads}, got {self.hidden_size}")
        if not self.energies or not set(self.listed("energies")) <= set(ENERGY_TYPES):
            raise ValueError(f"energies must be of {ENERGY_TYPES}, with commas between, got {self.energies!r}")
        if min(self.listed("batch_sizes", int), default=0) < 1:
            raise ValueError(f"batch_sizes must be at least 1, got {self.batch_sizes!r}")
        self.out = self.out or f"hub_cards/results/bench-{self.size}-{self.device}.json"
        if not self.out.endswith(".json"):  # the chart has the same name, but for .png
            raise ValueError(f"out must end in .json, got {self.out!r}")
        self.generation_config("nce")  # checks T, k and the window

    def generation_config(self, energy: str) -> EDLMGenerationConfig:
        return EDLMGenerationConfig(
            num_steps=self.num_steps,
            num_candidates=1 if energy == "none" else self.num_candidates,  # there is nothing to choose by
            energy_window=self.listed("energy_window", float),
            energy_batch_size=self.energy_batch_size or None,
            return_dict_in_generate=True,
        )


def random_model(energy: str, arguments: BenchArguments) -> EDLMModel:
    """Noise on every weight: as initialised, the last layers are zero, proposals uniform and all candidates equal."""
    sizes = {name: getattr(arguments, name) for name in OWN_SIZES if name != "length"}
    torch.manual_seed(arguments.seed)
    model = EDLMModel(EDLMConfig(**sizes, max_position_embeddings=arguments.length, energy_type=energy))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.to(arguments.device, getattr(torch, arguments.dtype))


@contextmanager
def clocks(model: EDLMModel, wait):
    """Seconds spent in the networks, by name; `wait()` precedes every look at the clock."""
    # generate() never calls the denoiser as a whole: it projects only the positions that it draws
    parts = [("denoiser", model.denoiser.backbone), ("denoiser", model.denoiser.head)]
    # nor an autoregressive energy: its parts are called one by one
    parts += [("energy", part) for part in model.energy_model.children()] if model.energy_model is not None else []
    seconds, hooks = {"denoiser": 0.0, "energy": 0.0}, []

    def add(name: str, sign: int) -> None:
        wait()
        seconds[name] += sign * time.perf_counter()

    for name, module in parts:
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: add(name, -1)))
        hooks.append(module.register_forward_hook(lambda *_, name=name: add(name, +1)))
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def measure(model: EDLMModel, energy: str, batch_size: int, arguments: BenchArguments, progress: tqdm) -> dict:
    """One row of the results."""
    config, on_cuda = arguments.generation_config(energy), arguments.device == "cuda"
    wait = torch.cuda.synchronize if on_cuda else lambda: None
    progress.set_description(f"{energy}, batch {batch_size}")

    def run():
        wait()
        start = time.perf_counter()
        output = model.generate(batch_size=batch_size, seed=arguments.seed, generation_config=config)
        wait()
        seconds = time.perf_counter() - start
        progress.update()
        return seconds, output

    run()  # a first run also pays for loading kernels and reserving memory
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    all_seconds = [run()[0] for _ in range(arguments.repeats)]
    memory = {"peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30} if on_cuda else {}
    with clocks(model, wait) as split:
        total, output = run()
    return {
        "energy": energy,
        "num_candidates": config.num_candidates,
        "num_steps": config.num_steps,
        "batch_size": batch_size,
        "seconds": median(all_seconds),
        "all_seconds": all_seconds,
        "tokens_per_second": output.sequences.numel() / median(all_seconds),
        "nfe": float(output.nfe.double().mean()),
        "energy_nfe": float(output.energy_nfe.double().mean()),
        "instrumented_seconds": total,
        "denoiser_seconds": split["denoiser"],
        "energy_seconds": split["energy"],
        "rest_seconds": total - sum(split.values()),  # log-softmax, draws, choice, the loop itself
    } | memory


def machine() -> dict:
    """What a speed depends on besides the options; `git_commit` is None outside a repository."""
    cpuinfo, root = Path("/proc/cpuinfo"), Path(__file__).resolve().parent.parent
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    commit = None
    if (root / ".git").exists() and shutil.which("git"):  # "-dirty" is added where tracked files differ from it
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip() or None
    return {
        "cpu_name": names[0] if names else platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "transformers")},
        "git_commit": commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def table(results: dict) -> str:
    """Markdown; NFE are means over the samples of a batch, the last columns are shares of the instrumented run."""
    head = ["energy", "k", "T", "batch", "seconds", "tokens/s", "NFE", "energy NFE", "denoiser", "in energy", "rest"]
    head += ["peak GiB"] if results["device"] == "cuda" else []
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for row in results["rows"]:
        cells = [str(row[name]) for name in ("energy", "num_candidates", "num_steps", "batch_size")]
        cells += [f"{row['seconds']:.3g}", f"{row['tokens_per_second']:,.0f}"]
        cells += [f"{row['nfe']:.1f}", f"{row['energy_nfe']:.1f}"]
        cells += [f"{row[f'{p}_seconds'] / row['instrumented_seconds']:.0%}" for p in ("denoiser", "energy", "rest")]
        cells += [f"{row['peak_memory_gib']:.2f}"] if results["device"] == "cuda" else []
        lines.append(cells)
    return CAPTION.format(**results) + ".\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def plot(results: dict, path: Path) -> None:
    """Tokens per second: a group of bars for each energy, in it a bar for each batch size."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")  # without pyplot it is Agg that draws: no display needed
    axes, rows = figure.add_subplot(), results["rows"]
    labels = list(dict.fromkeys(f"{row['energy']}, k={row['num_candidates']}" for row in rows))
    batch_sizes = list(dict.fromkeys(row["batch_size"] for row in rows))
    width = 0.8 / len(batch_sizes)
    for i, batch_size in enumerate(batch_sizes):
        speeds = [row["tokens_per_second"] for row in rows if row["batch_size"] == batch_size]
        places = [group - 0.4 + (i + 0.5) * width for group in range(len(labels))]
        axes.bar_label(axes.bar(places, speeds, width, label=f"batch {batch_size}"), fmt="{:,.0f}")
    axes.set_xticks(range(len(labels)), labels)
    axes.set(ylabel="tokens/s", ymargin=0.1)
    axes.set_title(CAPTION.format(**results).replace("; random", ";\nrandom"), fontsize="small")
    axes.legend()
    figure.savefig(path, dpi=120, format="png")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(BenchArguments, __doc__, argv)
    if arguments.from_json:
        print(table(read_results(arguments.from_json)))
        return
    if arguments.num_threads:
        torch.set_num_threads(arguments.num_threads)
    results = {"command": shlex.join(["python", "-m", "training.bench", *argv])} | asdict(arguments) | machine()
    del results["out"], results["from_json"]
    results["device_name"] = torch.cuda.get_device_name() if arguments.device == "cuda" else results["cpu_name"]
    energies, batch_sizes = arguments.listed("energies"), arguments.listed("batch_sizes", int)
    with tqdm(total=len(energies) * len(batch_sizes) * (arguments.repeats + 2)) as progress:
        results["rows"] = []
        for energy in energies:
            model = random_model(energy, arguments)
            results["rows"] += [measure(model, energy, size, arguments, progress) for size in batch_sizes]
    out = Path(arguments.out)
    write_json(out, results)
    write_whole(out.with_suffix(".png"), lambda path: plot(results, path))
    print(table(results))


if __name__ == "__main__":
    main()
