"""What a run leaves behind to go on from: weights, their averages and the optimizer in one safetensors file.

Nothing is unpickled, and the file is written under a temporary name and renamed. Weights are whole, whatever shards
they are kept in.
"""

import contextlib
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from .arguments import FREE_ARGUMENTS, NOT_RECORDED, command
from .results import read_lines, write_whole


class Averages:
    """Exponential averages of the trained parameters, whose decay warms up as in the published code.

    The decay is min(decay, (1 + n) / (10 + n)), and 0 in the first step; with `decay` 0 there is no average, and the
    parameter stands for it.
    """

    def __init__(self, trained: dict[str, torch.nn.Parameter], decay: float):
        self.trained, self.decay = trained, decay
        self.values = [p.detach().clone() for p in trained.values()] if decay else []

    @torch.no_grad()
    def update(self, n: int) -> None:
        if self.decay:
            decay = min(self.decay, (1 + n) / (10 + n)) if n else 0.0
            torch._foreach_lerp_(self.values, list(self.trained.values()), 1 - decay)

    def by_name(self) -> dict[str, torch.Tensor]:
        return dict(zip(self.trained, self.values or self.trained.values(), strict=True))

    def weights(self) -> dict[str, torch.Tensor]:
        """The averages by name, whole, on the CPU."""
        return {name: whole(value) for name, value in self.by_name().items()}

    @torch.no_grad()
    def put(self, values: dict[str, torch.Tensor]) -> None:
        """Give the parameters these values."""
        for name, parameter in self.trained.items():
            copy_into(parameter, values[name])

    @contextlib.contextmanager
    def shown(self, values: dict[str, torch.Tensor] | None = None):
        """The parameters have these values for a while; None: the averages."""
        before = {name: p.detach().clone() for name, p in self.trained.items()}
        self.put(self.by_name() if values is None else values)
        try:
            yield
        finally:
            self.put(before)


def save(path: Path, arguments, identity: dict, step: int, seconds: float, tensors: dict) -> None:
    metadata = {"step": str(step), "seconds": str(seconds), "arguments": json.dumps(asdict(arguments))}
    metadata |= {"identity": json.dumps(identity)}
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata))


def load(path: Path, arguments, identity: dict, trained: dict, averages, optimizer) -> tuple[int, float, dict]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        step, seconds = int(metadata["step"]), float(metadata["seconds"])
        saved, saved_identity = json.loads(metadata["arguments"]), json.loads(metadata["identity"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the checkpoint {path} is corrupted: {error}") from error
    for name, value in asdict(arguments).items():
        if name not in FREE_ARGUMENTS and name in saved and saved[name] != value:
            raise ValueError(f"the checkpoint {path} was made with {name}={saved[name]!r}, got {value!r}")
    for name, value in identity.items():
        if saved_identity.get(name) != value:
            raise ValueError(
                f"the checkpoint {path} was made with another {name}: {saved_identity.get(name)} != {value}"
            )

    for name, parameter in trained.items():
        copy_into(parameter, tensors[f"model.{name}"])
    for name, value in zip(trained, averages.values, strict=False):
        copy_into(value, tensors[f"average.{name}"])
    groups = optimizer.state_dict()["param_groups"]
    in_order = [p for group in optimizer.param_groups for p in group["params"]]
    state = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            parameter = in_order[int(index)]
            moment = torch.zeros_like(parameter) if value.shape == parameter.shape else torch.zeros_like(value)
            copy_into(moment, value)
            state.setdefault(int(index), {})[key] = moment
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return step, seconds, {k.removeprefix("best."): v for k, v in tensors.items() if k.startswith("best.")}


def run_facts(run: Path, script: str, argument_class) -> dict | None:
    """Command, length, cost and evaluations of a run, from its checkpoint and its metrics; None where there is none."""
    if not (run / "checkpoint.safetensors").exists():
        return None
    with safe_open(run / "checkpoint.safetensors", "pt") as file:
        metadata = file.metadata()
    arguments, steps = json.loads(metadata["arguments"]), int(metadata["step"])
    rows = read_lines(run / "metrics.jsonl")
    curve = [row for row in rows if "seconds" in row]
    return {
        "command": command(script, (argument_class, arguments), NOT_RECORDED),
        "steps": steps,
        "planned_steps": arguments["max_steps"],
        "tokens": steps * next(int(row["tokens"]) for row in rows if "tokens" in row),
        "minutes": float(metadata["seconds"]) / 60,
        "num_threads": arguments["num_threads"],
        "last_evaluation": curve[-1] if curve else None,
        "curve": curve,
    }


def fingerprint(arrays) -> str:
    """SHA-256 of the contents of a numpy array, or of tensors."""
    digest = hashlib.sha256()
    for array in arrays if isinstance(arrays, list) else [arrays]:
        digest.update(array.detach().cpu().view(torch.uint8).numpy() if isinstance(array, torch.Tensor) else array)
    return digest.hexdigest()


def weights_hash(module: torch.nn.Module) -> str:
    """SHA-256 of all weights of a network."""
    return fingerprint([value for _, value in sorted(module.state_dict().items())])


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU, gathered from all processes where it is in shards."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous().clone()


@torch.no_grad()
def copy_into(target: torch.Tensor, value: torch.Tensor) -> None:
    """In place; a whole value is cut where the target is in shards."""
    if isinstance(target, DTensor) and not isinstance(value, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)
