"""The training loop that every script shares: accelerate, EMA, schedule, metrics, checkpoints that resume exactly.

Data and randomness of a step are functions of (seed, step, row of the global batch), whatever the number of processes
and micro-batches; only dropout depends on the process. So a checkpoint needs the trained weights, their averages,
optimizer moments and the step number.

Shapes: B rows of one micro-batch of one process, G rows of a global batch, L length.
"""

import contextlib
import json
import math
import random
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from tqdm.auto import tqdm
from transformers import get_scheduler

from modeling_edlm.backbone import Block
from modeling_edlm.schedule import antithetic_times

from . import checkpoint
from .arguments import LoopArguments
from .checkpoint import Averages, whole
from .results import read_lines, replaced_folder

LEAST_TIME = 1e-3  # t below masks nothing in most blocks, and weighs a thousandfold in the bound when it does


def train(
    arguments: LoopArguments,
    model: torch.nn.Module,
    loss_fn: Callable[[torch.nn.Module, int, int], tuple[torch.Tensor, dict]],
    evaluate: Callable[[torch.nn.Module, bool], dict],
    save: Callable[[torch.nn.Module, dict[str, torch.Tensor], Path], None],
    accelerator: Accelerator,
    identity: dict[str, str] | None = None,
    batch: Callable[[int, int], torch.Tensor] | None = None,
    better: str | None = None,
) -> torch.nn.Module:
    """Run the loop over the parameters that require gradients; returns the model with its averaged weights.

    Args:
        loss_fn: `(model, step, micro_step) -> (loss, metrics)`; the global random generators are seeded before it.
        evaluate: `(averaged model, is_last) -> metrics`, run in eval mode without gradients.
        save: writes the model with these averaged weights (whole, on the CPU) into a folder, which takes its final name
            when whole.
        identity: fingerprints of what the run depends on besides its arguments; a resumed run must have the same.
        batch: `(step, micro_step) -> (B, L)`, kept in a file if the loss of a step is not finite.
        better: the metric of `evaluate` that `patience` watches; larger is better.
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
    optimizer = _optimizer(arguments, model)
    scheduler = get_scheduler(arguments.lr_schedule, optimizer, arguments.warmup_steps, arguments.max_steps)
    schedule = scheduler.lr_lambdas[0]  # used as a function of the step: nothing to save, nothing to restore
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    model = accelerator.unwrap_model(wrapped)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    averages = Averages(trained, arguments.ema_decay)

    step, seconds_before, best = 0, 0.0, {}  # best: the weights that `patience` has saved
    in_engine = accelerator.distributed_type == DistributedType.DEEPSPEED  # which keeps the optimizer to itself
    if checkpoint_path.exists():
        if in_engine:
            raise ValueError(f"resume is not possible with DeepSpeed: {checkpoint_path} lacks the optimizer's shards")
        step, seconds_before, best = checkpoint.load(checkpoint_path, arguments, identity, trained, averages, optimizer)
        accelerator.print(f"resumed {checkpoint_path} at step {step}")
    metrics_path = out_dir / "metrics.jsonl"
    if accelerator.is_main_process:
        _drop_metrics_after(metrics_path, step)
    accelerator.wait_for_everyone()

    def save_model():
        weights = averages.weights()  # every process takes part
        if accelerator.is_main_process:
            with replaced_folder(out_dir / "model") as folder:
                save(model, weights, folder)

    def save_checkpoint():
        tensors = {f"model.{k}": whole(v) for k, v in trained.items()}
        tensors |= {f"average.{k}": v for k, v in averages.weights().items()} if averages.decay else {}
        tensors |= {f"best.{k}": v for k, v in best.items()}
        for i, state in ({} if in_engine else optimizer.state_dict()["state"]).items():
            tensors |= {f"optimizer.{i}.{k}": whole(v) for k, v in state.items()}
        if accelerator.is_main_process:
            seconds = seconds_before + time.monotonic() - started
            checkpoint.save(checkpoint_path, arguments, identity, step, seconds, tensors)
        if not arguments.patience:
            save_model()
        accelerator.wait_for_everyone()

    def measure(is_last, weights=None):
        # not compiled: evaluations have many shapes, and few passes of each
        begun = time.monotonic()
        with torch.no_grad(), averages.shown(weights), _gathered(model), torch.compiler.set_stance("force_eager"):
            row = evaluate(model.eval(), is_last)
        now = time.monotonic()
        took = {"seconds": seconds_before + now - started, "evaluation_seconds": now - begun}
        _log(accelerator, metrics_path, step, took | row)
        shown = (f"{k} {v:.4g}" for k, v in row.items() if "<=" not in k)  # those by bucket are in the log
        accelerator.print(f"\nstep {step}: " + ", ".join(shown))

    def evaluate_step(is_end) -> bool:
        """Of the step that is now, whose checkpoint is there; whether `patience` is at its end."""
        nonlocal best
        measure(is_end and not arguments.patience)
        if not arguments.patience:
            return False
        is_best, is_over = _first_process(accelerator, _verdict(metrics_path, better, arguments.patience))
        if is_best:
            best = averages.weights()
            save_model()
            save_checkpoint()
        if is_over:
            accelerator.print(f"no better {better} in {arguments.patience} evaluations: stopped")
        if is_over or is_end:  # the last word is on what was saved
            measure(True, best)
        return is_over

    progress = tqdm(total=arguments.max_steps, initial=step, disable=not accelerator.is_main_process, smoothing=0.05)
    accumulation = arguments.gradient_accumulation_steps
    started = last_checkpoint = clock = time.monotonic()
    first, stretch = step, (step, started)  # a stretch of nothing but steps
    if step and (step % arguments.eval_steps == 0 or step == arguments.max_steps):
        logged = any(row["step"] == step and "seconds" in row for row in read_lines(metrics_path))
        if not _first_process(accelerator, [logged])[0]:  # it failed, or was killed
            evaluate_step(step == arguments.max_steps)
    with stop_signal() as stopped:
        while step < arguments.max_steps:
            wrapped.train()
            lr = arguments.learning_rate * schedule(step)
            for group in optimizer.param_groups:
                group["lr"] = lr
            rows = []
            for micro_step in range(accumulation):
                torch.manual_seed(step_seed(arguments.seed, step, micro_step, accelerator.process_index))
                with accelerator.accumulate(wrapped):  # divides the loss, and lets gradients wait for the last
                    loss, metrics = loss_fn(wrapped, step, micro_step)
                    accelerator.backward(loss)
                rows.append({"loss": loss.detach()} | metrics)
            norm = accelerator.clip_grad_norm_(list(trained.values()), arguments.max_grad_norm)
            if not math.isfinite(norm := float(whole(torch.as_tensor(norm)))):
                rows = [{k: float(v) for k, v in row.items()} for row in rows]
                kept = _keep_batch(out_dir, step, accelerator, batch, accumulation)
                raise FloatingPointError(
                    f"loss or gradient are not finite in step {step}: gradient norm {norm}, {rows}. {kept}The last "
                    f"checkpoint is of before; lower learning_rate"
                )
            optimizer.step()
            optimizer.zero_grad()
            averages.update(step)
            step += 1
            progress.update()

            is_end = step == arguments.max_steps
            if arguments.compile and step == first + 1:  # it has compiled: its time is not of the minutes
                clock = time.monotonic()
                stretch = step, clock
            out_of_time = 0 < 60 * arguments.max_minutes < time.monotonic() - clock
            stop = bool(stopped)
            if step % arguments.log_steps == 0 or is_end:
                row = _mean(rows, accelerator) | {"grad_norm": norm}
                if step > stretch[0]:
                    row |= {"steps_per_second": (step - stretch[0]) / (time.monotonic() - stretch[1])}
                _log(accelerator, metrics_path, step, row | {"lr": lr})
                progress.set_postfix({k: f"{v:.4g}" for k, v in row.items()} | _speed(row))
                stretch = step, time.monotonic()
            if step % arguments.eval_steps == 0 or is_end:
                save_checkpoint()  # first: an evaluation may fail
                last_checkpoint = time.monotonic()
                stop |= evaluate_step(is_end)
                stretch = step, time.monotonic()
            minutes = (time.monotonic() - last_checkpoint) / 60
            # every process must take the same branch: the first one decides
            due = minutes >= arguments.checkpoint_minutes
            due, stop, out_of_time = _first_process(accelerator, [due, stop, out_of_time])
            if due or stop or out_of_time:
                save_checkpoint()
                last_checkpoint = time.monotonic()
                stretch = step, last_checkpoint
            if out_of_time and not is_end and not arguments.patience:  # what its minutes have bought
                measure(True)
            if (stop or out_of_time) and not is_end:
                accelerator.print(f"stopped at step {step} of {arguments.max_steps}; add --resume true to go on")
                break
    progress.close()
    if not (out_dir / "model").exists():  # a run that was over, but for the last file
        save_model()
    averages.put(averages.weights())
    # DDP goes before the process group: its destructor holds the GIL, for which threads of a group freed there wait
    del wrapped
    accelerator.free_memory()
    accelerator.end_training()
    accelerator.print(f"model: {out_dir / 'model'}\nmetrics: {metrics_path}")
    return model


def _optimizer(arguments: LoopArguments, model: torch.nn.Module) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": arguments.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=(0.9, arguments.adam_beta2), fused=True)


def compile_blocks(model: torch.nn.Module, but_last: bool = False) -> None:
    """The transformer blocks through `torch.compile`, in place; equal ones are compiled once.

    Args:
        but_last: leave out the last one, where it works at a number of positions that is never the same.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks[: -1 if but_last else None]:
        block.compile()


@contextlib.contextmanager
def _gathered(model: torch.nn.Module):
    """Where weights are in shards (FSDP), those of the root are there for whatever part is called, and afterwards no
    gathered copy is left: the next step would take it for the weights."""
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if shards:
        model.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.reshard()


def global_rows(arguments: LoopArguments, accelerator: Accelerator, micro_step: int) -> tuple[torch.Tensor, int]:
    """Which rows of a step's global batch this micro-batch of this process is, int64 (B,), and their number G."""
    B, world = arguments.batch_size, accelerator.num_processes
    first = (micro_step * world + accelerator.process_index) * B
    return torch.arange(first, first + B), arguments.gradient_accumulation_steps * world * B


def row_draws(seed: int, num_rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stratified times (G,) in random order and uniforms (G, L), on the CPU: the masks of a global batch."""
    generator = torch.Generator().manual_seed(seed)
    t_G = antithetic_times(torch.rand((), generator=generator), num_rows).clamp(min=LEAST_TIME)
    t_G = t_G[torch.randperm(num_rows, generator=generator)]
    return t_G, torch.rand(num_rows, length, generator=generator)


def make_accelerator(arguments: LoopArguments, **kwargs) -> Accelerator:
    wants = arguments.report_to == "trackio" or (arguments.report_to == "auto" and find_spec("trackio"))
    log_with = "trackio" if wants else None
    accelerator = Accelerator(
        mixed_precision=arguments.mixed_precision,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        log_with=log_with,
        **kwargs,
    )
    if log_with:
        accelerator.init_trackers(Path(arguments.output_dir).name, config=asdict(arguments))
    return accelerator


def step_seed(seed: int, *counters: int) -> int:
    """A seed for torch from the run's seed and what is to be drawn for."""
    return random.Random(repr((seed, *counters))).getrandbits(63)


def _mean(rows: list[dict], accelerator: Accelerator) -> dict[str, float]:
    """Means over micro-batches and processes."""
    table = torch.tensor([[float(v) for v in row.values()] for row in rows], dtype=torch.float64).mean(0)
    table = accelerator.reduce(table.to(accelerator.device, torch.float32), "mean").tolist()
    return dict(zip(rows[0], table, strict=True))


def _keep_batch(out_dir: Path, step: int, accelerator, batch, accumulation: int) -> str:
    """Writes what this process was given in a step; says where."""
    if batch is None:
        return ""
    path = out_dir / f"not-finite.step{step}.process{accelerator.process_index}.safetensors"
    save_file({f"input_ids.{m}": batch(step, m).cpu() for m in range(accumulation)}, path, {"step": str(step)})
    return f"The batch is in {path}. "


def _verdict(path: Path, better: str, patience: int) -> list[bool]:
    """Whether the last evaluation is the best so far, and whether the best is `patience` evaluations ago."""
    values = [row[better] for row in read_lines(path) if better in row]
    if not values:  # a process that logs nothing
        return [False, False]
    best = max(range(len(values)), key=lambda i: (values[i], -i))
    return [best == len(values) - 1, len(values) - 1 - best >= patience]


def _drop_metrics_after(path: Path, step: int) -> None:
    """What was logged after the checkpoint, or by another run in this folder, is logged anew."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(line for line in lines if 0 < json.loads(line)["step"] <= step), encoding="utf-8")


def _log(accelerator, path: Path, step: int, row: dict) -> None:
    accelerator.log(row, step=step)
    if accelerator.is_main_process:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | row) + "\n")


def _speed(row: dict) -> dict:
    known = row.keys() >= {"tokens", "steps_per_second"}
    return {"tokens/s": f"{row['steps_per_second'] * row['tokens']:.0f}"} if known else {}


def _first_process(accelerator, decisions: list[bool]) -> list[bool]:
    """What the first process has decided."""
    if accelerator.num_processes == 1:
        return decisions
    flags = torch.tensor(decisions, device=accelerator.device, dtype=torch.float32)
    return [bool(flag) for flag in broadcast(flags)]


@contextlib.contextmanager
def stop_signal(then: Callable[[], None] = lambda: None):
    """A list that fills on the first SIGINT or SIGTERM, and `then` is called: whoever looks saves and stops. A second
    one kills."""
    received, old = [], {}

    def handler(number, frame):
        received.append(number)
        signal.signal(number, old[number])
        then()

    with contextlib.suppress(ValueError):  # signals can be set in the main thread only
        for number in (signal.SIGINT, signal.SIGTERM):
            old[number] = signal.signal(number, handler)
    try:
        yield received
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
