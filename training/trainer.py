"""The training loop that every script shares: accelerate, EMA, schedule, metrics, checkpoints that resume exactly.

Data and randomness of a step are functions of (seed, step, micro-batch, rank) alone, so a checkpoint needs weights,
averages, optimizer moments and the step number, and nothing unpickled. It is one safetensors file, written under
a temporary name and renamed.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm
from transformers import HfArgumentParser, get_scheduler


@dataclass(kw_only=True)
class LoopArguments:
    output_dir: str = field(metadata={"help": "folder of the model, the checkpoint and metrics.jsonl"})
    max_steps: int = field(default=10_000, metadata={"help": "optimizer steps in all"})
    batch_size: int = field(default=32, metadata={"help": "sequences of one process in one forward pass"})
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    lr_schedule: str = field(default="cosine", metadata={"help": "cosine or constant_with_warmup"})
    warmup_steps: int = 200
    weight_decay: float = field(default=0.01, metadata={"help": "on matrices only"})
    adam_beta2: float = 0.99
    max_grad_norm: float = 1.0
    ema_decay: float = field(default=0.999, metadata={"help": "0: no average; else the average is the saved model"})
    mixed_precision: str = field(default="no", metadata={"help": "no or bf16"})
    gradient_checkpointing: bool = False
    seed: int = 0
    log_steps: int = 20
    eval_steps: int = 500
    checkpoint_minutes: float = 5.0
    max_minutes: float = field(default=0.0, metadata={"help": "save and stop after so long; 0: no limit"})
    num_threads: int = field(default=0, metadata={"help": "CPU threads; 0: torch's default"})
    resume: bool = field(default=False, metadata={"help": "go on from the checkpoint in output_dir"})
    report_to: str = field(default="auto", metadata={"help": "trackio, none, or auto: trackio where it is installed"})

    def __post_init__(self):
        for name in ("max_steps", "batch_size", "gradient_accumulation_steps", "log_steps", "eval_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        if self.lr_schedule not in ("cosine", "constant_with_warmup"):
            raise ValueError(f"lr_schedule must be cosine or constant_with_warmup, got {self.lr_schedule!r}")
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(f"mixed_precision must be no or bf16, got {self.mixed_precision!r}")


# What may differ between the first start and a resumption without changing the weights. Paths may: the files they
# lead to are held to their contents, by `identity`.
FREE_ARGUMENTS = set(
    "output_dir log_steps eval_steps checkpoint_minutes max_minutes num_threads resume report_to data validation_data "
    "cache_dir base init_from tokenizer gradient_checkpointing eval_blocks final_eval_blocks".split()
)


def parse_arguments(argument_class, description: str, argv: list[str] | None = None):
    """A dataclass from the command line; `--config file.yaml` gives defaults that later options override."""
    parser = HfArgumentParser(argument_class, description=description, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file of options; what stands on the command line wins")
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--config")
    known, argv = before.parse_known_args(argv)
    if known.config:
        with open(known.config, encoding="utf-8") as file:
            options = yaml.safe_load(file) or {}
        if not isinstance(options, dict):
            raise ValueError(f"config {known.config}: expected a mapping of option names to values")
        argv = [part for k, v in options.items() for part in (f"--{k}", str(v))] + argv
    return parser.parse_args_into_dataclasses(argv)[0]


def train(
    arguments: LoopArguments,
    model: torch.nn.Module,
    loss_fn: Callable[[torch.nn.Module, int, int], tuple[torch.Tensor, dict]],
    evaluate: Callable[[torch.nn.Module, bool], dict],
    save: Callable[[torch.nn.Module, Path], None],
    accelerator: Accelerator,
    identity: dict[str, str] | None = None,
) -> torch.nn.Module:
    """Run the loop; returns the averaged model (the model itself without EMA).

    Args:
        loss_fn: `(model, step, micro_step) -> (loss, metrics)`; the global random generators are seeded before it.
        evaluate: `(averaged model, is_last) -> metrics`, run in eval mode without gradients.
        save: writes the averaged model into a folder; the folder takes its final name when whole.
        identity: fingerprints of what the run depends on besides its arguments; a resumed run must have the same.
    Raises:
        ValueError: output_dir holds a checkpoint and `resume` is off, or one that is corrupted or of another run.
        FloatingPointError: loss or gradient are not finite; no checkpoint holds such weights.
    """
    identity = (identity or {}) | {"number of processes": str(accelerator.num_processes)}
    out_dir = Path(arguments.output_dir)
    checkpoint_path = out_dir / "checkpoint.safetensors"
    if checkpoint_path.exists() and not arguments.resume:
        raise ValueError(f"output_dir has a checkpoint, {checkpoint_path}: add --resume true, or name another folder")
    out_dir.mkdir(parents=True, exist_ok=True)
    if arguments.num_threads:
        torch.set_num_threads(arguments.num_threads)

    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.to(accelerator.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": arguments.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=(0.9, arguments.adam_beta2), fused=True)
    scheduler = get_scheduler(arguments.lr_schedule, optimizer, arguments.warmup_steps, arguments.max_steps)
    schedule = scheduler.lr_lambdas[0]  # used as a function of the step: nothing to save, nothing to restore
    average = AveragedModel(model, multi_avg_fn=_ema(arguments.ema_decay)) if arguments.ema_decay else None
    averaged = average.module if average else model
    averaged.eval()

    step, seconds_before = 0, 0.0
    if checkpoint_path.exists():
        step, seconds_before = _load(checkpoint_path, arguments, identity, model, averaged, average, optimizer)
        accelerator.print(f"resumed {checkpoint_path} at step {step}")
    if accelerator.is_main_process:
        _drop_metrics_after(out_dir / "metrics.jsonl", step)
    wrapped = accelerator.prepare_model(model)

    def checkpoint():
        if accelerator.is_main_process:
            seconds = seconds_before + time.monotonic() - started
            _save(checkpoint_path, arguments, identity, step, seconds, model, averaged, optimizer)
            with replaced_folder(out_dir / "model") as folder:
                save(averaged, folder)
        accelerator.wait_for_everyone()

    progress = tqdm(total=arguments.max_steps, initial=step, disable=not accelerator.is_main_process, smoothing=0.05)
    accumulation = arguments.gradient_accumulation_steps
    started = last_checkpoint = time.monotonic()
    with _stop_signal() as stopped:
        while step < arguments.max_steps:
            model.train()
            for micro_step in range(accumulation):
                torch.manual_seed(step_seed(arguments.seed, step, micro_step, accelerator.process_index))
                is_last = micro_step == accumulation - 1
                with contextlib.nullcontext() if is_last else accelerator.no_sync(wrapped):
                    loss, metrics = loss_fn(wrapped, step, micro_step)
                    accelerator.backward(loss / accumulation)
            norm = accelerator.clip_grad_norm_(parameters, arguments.max_grad_norm)
            lr = arguments.learning_rate * schedule(step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
            if average:
                average.update_parameters(model)
            step += 1
            progress.update()

            is_end = step == arguments.max_steps
            if step % arguments.log_steps == 0 or is_end:
                row = _finite({"loss": loss, "grad_norm": norm} | metrics, step)
                _log(accelerator, out_dir, step, row | {"lr": lr})
                progress.set_postfix({k: f"{v:.4g}" for k, v in row.items()} | _speed(progress, metrics))
            if step % arguments.eval_steps == 0 or is_end:
                with torch.no_grad():
                    row = evaluate(averaged.eval(), is_end)
                _log(accelerator, out_dir, step, {"seconds": seconds_before + time.monotonic() - started} | row)
                accelerator.print(f"\nstep {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in row.items()))
            minutes = (time.monotonic() - last_checkpoint) / 60
            out_of_time = arguments.max_minutes and time.monotonic() - started > 60 * arguments.max_minutes
            # every process must take the same branch: the first one decides
            decision = torch.tensor(
                [minutes >= arguments.checkpoint_minutes or is_end, bool(stopped or out_of_time)],
                device=accelerator.device,
                dtype=torch.float32,
            )
            due, stop = _first_process(accelerator, decision)
            if due or stop:
                _finite({"loss": loss, "grad_norm": norm}, step)  # a checkpoint with NaN would replace a good one
                checkpoint()
                last_checkpoint = time.monotonic()
            if stop and not is_end:
                accelerator.print(f"stopped at step {step} of {arguments.max_steps}; add --resume true to go on")
                break
    progress.close()
    accelerator.end_training()
    accelerator.print(f"model: {out_dir / 'model'}\nmetrics: {out_dir / 'metrics.jsonl'}")
    return averaged


def make_accelerator(arguments: LoopArguments, **kwargs) -> Accelerator:
    wants = arguments.report_to == "trackio" or (arguments.report_to == "auto" and find_spec("trackio"))
    log_with = "trackio" if wants else None
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision, log_with=log_with, **kwargs)
    if log_with:
        accelerator.init_trackers(Path(arguments.output_dir).name, config=asdict(arguments))
    return accelerator


def step_seed(seed: int, *counters: int) -> int:
    """A seed for torch from the run's seed and what is to be drawn for."""
    return random.Random(repr((seed, *counters))).getrandbits(63)


@contextlib.contextmanager
def replaced_folder(folder: Path):
    """Write a folder under a temporary name; it replaces the old one when whole."""
    temporary, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():  # killed between the two renames below
        old.rename(folder)
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _ema(decay: float):
    """Exponential average whose decay warms up as in the published code: min(decay, (1 + n) / (10 + n))."""

    @torch.no_grad()
    def update(averages, currents, count):
        n = int(count)
        torch._foreach_lerp_(averages, currents, 1 - min(decay, (1 + n) / (10 + n)))

    return update


def fingerprint(arrays) -> str:
    """SHA-256 of the contents of a numpy array, or of tensors."""
    digest = hashlib.sha256()
    for array in arrays if isinstance(arrays, list) else [arrays]:
        digest.update(array.detach().cpu().view(torch.uint8).numpy() if isinstance(array, torch.Tensor) else array)
    return digest.hexdigest()


def _finite(row: dict, step: int) -> dict[str, float]:
    row = {k: float(v.detach() if isinstance(v, torch.Tensor) else v) for k, v in row.items()}
    if not all(map(math.isfinite, row.values())):
        raise FloatingPointError(f"loss or gradient are not finite at step {step}: {row}; lower learning_rate")
    return row


def _drop_metrics_after(path: Path, step: int) -> None:
    """What was logged after the checkpoint, or by another run in this folder, is logged anew."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(line for line in lines if 0 < json.loads(line)["step"] <= step), encoding="utf-8")


def _save(path: Path, arguments, identity: dict, step: int, seconds: float, model, averaged, optimizer) -> None:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    if averaged is not model:
        tensors |= {f"average.{k}": v for k, v in averaged.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    metadata = {"step": str(step), "seconds": str(seconds), "arguments": json.dumps(asdict(arguments))}
    metadata |= {"identity": json.dumps(identity)}
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary, metadata)
    os.replace(temporary, path)


def _load(path: Path, arguments, identity: dict, model, averaged, average, optimizer) -> tuple[int, float]:
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

    def part(prefix):
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    model.load_state_dict(part("model."))
    if average:
        averaged.load_state_dict(part("average."))
        average.n_averaged.fill_(step)
    state = {}
    for name, value in part("optimizer.").items():
        index, key = name.split(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return step, seconds


def _log(accelerator, out_dir: Path, step: int, row: dict) -> None:
    accelerator.log(row, step=step)
    if accelerator.is_main_process:
        with open(out_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | row) + "\n")


def _speed(progress: tqdm, metrics: dict) -> dict:
    rate = progress.format_dict["rate"]
    return {"tokens/s": f"{rate * metrics['tokens']:.0f}"} if rate and "tokens" in metrics else {}


def _first_process(accelerator, decision: torch.Tensor) -> list[bool]:
    from accelerate.utils import broadcast

    return [bool(x) for x in (broadcast(decision) if accelerator.num_processes > 1 else decision)]


@contextlib.contextmanager
def _stop_signal():
    """A list that fills on the first SIGINT or SIGTERM: the loop then saves and stops. A second one kills."""
    received, old = [], {}

    def handler(number, frame):
        received.append(number)
        signal.signal(number, old[number])

    with contextlib.suppress(ValueError):  # signals can be set in the main thread only
        for number in (signal.SIGINT, signal.SIGTERM):
            old[number] = signal.signal(number, handler)
    try:
        yield received
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
