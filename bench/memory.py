"""Peak memory of an energy that shares the denoiser's blocks against one with blocks of its own.

    python -m bench.memory --out hub_cards/results/memory-cpu.json
    python -m bench.memory --from_json hub_cards/results/memory-cpu.json

Each figure is that of a process of its own: what it needed at most, less what it had before there was a model. Weights
are random, float32.
"""

import json
import resource
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from training.common.arguments import CommaLists, answer_early, command, parse_arguments

SIZES = {  # hidden, blocks, heads, vocabulary
    "small": (192, 4, 3, 28),
    "full": (768, 12, 12, 50258),
}


@dataclass(kw_only=True)
class MemoryArguments(CommaLists):
    sizes: str = field(default="small,full", metadata={"help": "small: the shipped one; full: the published one"})
    length: int = 256
    batch_size: int = 2
    num_candidates: int = 4
    lora_r: int = 16
    only: str = field(default="", metadata={"help": "measure SIZE:KIND:TASK in this process and print bytes"})
    out: str = field(default="", metadata={"help": "results, .json"})
    from_json: str = field(default="", metadata={"help": "measure nothing, print the table of this file again"})

    def __post_init__(self):
        if unknown := set(self.listed("sizes")) - SIZES.keys():
            raise ValueError(f"sizes must be of {tuple(SIZES)}, got {sorted(unknown)}")
        if not (self.out or self.from_json or self.only):
            raise ValueError(f"out must be given, got {self.out!r}")


if __name__ == "__main__":
    answer_early(MemoryArguments, __doc__)

import torch

from modeling_edlm import EDLMConfig, EDLMEnergyModel, EDLMForMaskedLM, EDLMModel
from modeling_edlm.adapter import add_lora
from training.common.checkpoint import Averages
from training.common.contrast import LOSSES, draw_contrast, energies
from training.common.results import machine, markdown, read_results, write_json

KINDS = ("shared", "separate")
TASKS = ("sample", "train")


def peak() -> int:
    """Bytes that this process has needed at most: of the GPU where there is one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(arguments: MemoryArguments, size: str, kind: str, task: str) -> dict:
    """Bytes at most, and parameters, of sampling four steps or of training two."""
    device, before = torch.device("cuda" if torch.cuda.is_available() else "cpu"), peak()
    hidden, blocks, heads, vocabulary = SIZES[size]
    config = EDLMConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        cond_dim=0,
        max_position_embeddings=arguments.length,
        dropout=0.0,
    )
    denoiser = EDLMForMaskedLM(config).to(device).eval()
    energy = EDLMEnergyModel.from_denoiser(denoiser, share_weights=kind == "shared", energy_target="xs")
    trained = add_lora(energy, arguments.lora_r) if kind == "shared" else energy
    denoiser.requires_grad_(False)
    if task == "sample":
        model = EDLMModel.from_components(denoiser, energy, "nce").eval()
        options = {"num_steps": 4, "num_candidates": arguments.num_candidates, "energy_window": (1.0, 0.0), "seed": 0}
        model.generate(batch_size=arguments.batch_size, **options)
    else:
        parameters = {name: p for name, p in trained.named_parameters() if p.requires_grad}
        optimizer, averages = torch.optim.AdamW(parameters.values(), fused=True), Averages(parameters, 0.999)
        rows = torch.arange(arguments.batch_size)
        x0_BL = torch.randint(0, vocabulary - 1, (arguments.batch_size, arguments.length), device=device)
        for step in range(2):
            texts = draw_contrast(denoiser, x0_BL, rows, len(rows), step, "xs", 1)
            LOSSES["nce"](*energies(trained.train(), *texts)).backward()
            optimizer.step()
            optimizer.zero_grad()
            averages.update(step)
    together = {p.data_ptr(): p.numel() for part in (denoiser, energy) for p in part.parameters()}
    return {"bytes": peak() - before, "parameters": sum(together.values())}


def table(results: dict) -> str:
    head, lines = ["size", "task", "shared, MB", "separate, MB", "parameters, shared", "separate"], []
    rows = {(row["size"], row["task"], row["kind"]): row for row in results["rows"]}
    for size, task in dict.fromkeys((row["size"], row["task"]) for row in results["rows"]):
        pair = [rows[size, task, kind] for kind in KINDS]
        cells = [f"{row['bytes'] / 1e6:,.0f}" for row in pair] + [f"{row['parameters'] / 1e6:.1f}M" for row in pair]
        lines.append([size, task, *cells])
    return markdown(head, lines, left=2)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(MemoryArguments, __doc__, argv)
    if arguments.from_json:
        print(table(read_results(arguments.from_json)))
        return
    if arguments.only:
        print(json.dumps(measure(arguments, *arguments.only.split(":"))))
        return
    rows = []
    for size in arguments.listed("sizes"):
        for task in TASKS:
            for kind in KINDS:
                options = [f"--{name}={getattr(arguments, name)}" for name in ("length", "batch_size", "lora_r")]
                options += [f"--num_candidates={arguments.num_candidates}", f"--only={size}:{kind}:{task}"]
                run = [sys.executable, "-m", "bench.memory", *options]
                result = subprocess.run(run, check=True, stdout=subprocess.PIPE, text=True)
                rows.append({"size": size, "task": task, "kind": kind} | json.loads(result.stdout.splitlines()[-1]))
                print(rows[-1], flush=True)
    results = {"command": command("memory", arguments), "rows": rows} | machine()
    write_json(Path(arguments.out), results)
    print(f"{table(results)}\n\nresults: {arguments.out}")


if __name__ == "__main__":
    main()
