"""Where the time of one step goes: an ordinary one and one in the energy's window, ours and the published sampler's.

    python -m bench.profile_step
    EDLM_REF=<checkout of MinkaiXu/Energy-Diffusion-LLM> python -m bench.profile_step
    python -m bench.profile_step --from_json hub_cards/results/profile-cpu.json

The time between the ends of two steps of one run, divided by the steps between: what a run does once is not in it, and
is given beside. On a GPU nothing waits for the device within these steps but the sampler itself. The profiler, and the
clocks of the stages, look at the same steps in runs of their own.
"""

import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from statistics import median
from types import SimpleNamespace

from tqdm.auto import tqdm

from training.common.arguments import answer_early, parse_arguments

from .arguments import WARM_UP_STEPS, ProfileArguments, Setting

if __name__ == "__main__":
    answer_early(ProfileArguments, __doc__)

import torch
from matplotlib.figure import Figure
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from training.common.results import markdown, read_results, write_json, write_whole

from .measure import COMPILE_SECONDS, Bench, Budget, LeftOut, Ours, Published, make_sampler, reason
from .record import reference_code, start_results
from .report import setting_of
from .stages import STAGES, clocks

MOST = 10  # kernels that are named
NAME = 160  # characters of a name
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")  # the profiler itself calls cudaDeviceSynchronize
REGION = "Torch-Compiled Region"  # the compiler's graphs: one for each pass of a network, unless something breaks it
HOST_CALLS = (*WAITS, "cudaMemcpyAsync", "cudaGraphLaunch", REGION)
HOST_CALLS += ("aten::_local_scalar_dense", "aten::item", "aten::nonzero")
CAPTION = (
    "{device_name} ({device}), {threads} threads, {dtype}, random weights; the first steps of a run of T={num_steps}, "
    "nearly all masks. Milliseconds of a step of the whole batch, median of {repeats} runs of {steps} steps. Busy: "
    "{busy}. Launches: {launches}. Waits: of the host for the device. Once: what a run does before its steps. Stages: "
    "{stages}."
)
WORDS = {
    "cuda": {
        "busy": "the device in kernels and copies, from torch's profiler",
        "launches": "of kernels and graphs",
        "stages": "the device waited for at each look at the clock",
    },
    "cpu": {"busy": "in operators, from torch's profiler", "launches": "operators", "stages": "as in the benchmark"},
}


class _Enough(Exception):
    pass


def run_up_to(
    sampler: Ours | Published,
    setting: Setting,
    steps: int,
    begin: Callable[[], None] = lambda: None,
    end: Callable[[], None] = lambda: None,
) -> None:
    """A run that is broken off after its first steps, with calls before and after those that are looked at."""
    taken = 0

    def step_end():
        nonlocal taken
        taken += 1
        if taken == WARM_UP_STEPS:
            begin()
        if taken == WARM_UP_STEPS + steps:
            end()
            raise _Enough

    try:
        sampler.run_steps(setting, setting.batch, setting.compile, is_in_window(setting), step_end)
    except _Enough:
        return
    raise LeftOut(f"{taken} steps of {setting.num_steps} reveal something, fewer than {WARM_UP_STEPS + steps}")


def is_in_window(setting: Setting) -> bool:
    return setting.num_candidates > 1


def time_steps(bench: Bench, sampler: Ours | Published, setting: Setting, steps: int) -> tuple[float, float]:
    """Seconds of a step, and of what is done once."""
    at = [bench.now()]
    run_up_to(sampler, setting, steps, *[lambda: at.append(bench.now())] * 2)
    start, first, last = at
    step = (last - first) / steps
    return step, max(0.0, first - start - WARM_UP_STEPS * step)


def profiled(bench: Bench, sampler: Ours | Published, setting: Setting, steps: int) -> dict:
    """What torch's profiler says of a step."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * bench.on_cuda
    profiler = profile(activities=activities)

    def begin():
        bench.wait()
        profiler.start()

    def end():
        bench.wait()
        profiler.stop()

    run_up_to(sampler, setting, steps, begin, end)
    return summary(profiler.events(), steps, bench.on_cuda)


def summary(events, steps: int, on_cuda: bool) -> dict:
    seconds, calls, host = defaultdict(float), Counter(), Counter()
    launches = 0
    for event in events:
        is_of_device = event.device_type != DeviceType.CPU
        if is_of_device and event.is_user_annotation:
            continue
        if not is_of_device:
            host[REGION if event.name.startswith(REGION) else event.name] += 1
            is_launch = event.name.startswith(("cudaLaunch", "cuLaunch", "cudaGraphLaunch"))
            launches += is_launch if on_cuda else not event.cpu_children
        if is_of_device == on_cuda:
            microseconds = event.time_range.elapsed_us() if on_cuda else event.self_cpu_time_total
            seconds[event.name[:NAME]] += microseconds / 1e6
            calls[event.name[:NAME]] += 1
    top = sorted(seconds, key=seconds.get, reverse=True)[:MOST]
    return {
        "busy_ms": 1000 * sum(seconds.values()) / steps,
        "launches": launches / steps,
        "waits": sum(host[name] for name in WAITS) / steps,
        "host_calls": {name: host[name] / steps for name in HOST_CALLS if host[name]},
        "top": [{"name": n, "ms": 1000 * seconds[n] / steps, "calls": calls[n] / steps} for n in top],
    }


def stage_ms(bench: Bench, sampler: Ours | Published, setting: Setting, steps: int) -> dict[str, float]:
    seen = []
    with clocks(sampler.targets, bench.wait) as running:

        def look():
            running.lap()
            seen.append(dict(running.seconds))

        run_up_to(sampler, setting, steps, look, look)
    return {stage: 1000 * (seen[1][stage] - seen[0][stage]) / steps for stage in STAGES}


def measure(bench: Bench, sampler: Ours | Published, setting: Setting, steps: int) -> dict:
    """A row; LeftOut where it does not end in time."""
    bench.tidy()
    step, once = bench.trial(sampler, setting, setting.batch, is_in_window(setting))
    run = once + (WARM_UP_STEPS + steps) * step
    compiling = COMPILE_SECONDS * (1 + is_in_window(setting)) * setting.compile
    bench.budget.check(compiling + (bench.repeats + 3 + setting.compile) * run)
    for _ in range(1 + setting.compile):  # to compile, and to record CUDA graphs
        run_up_to(sampler, setting, steps)
    all_steps, all_once = zip(*(time_steps(bench, sampler, setting, steps) for _ in range(bench.repeats)), strict=True)
    row = asdict(setting) | {"ms": 1000 * median(all_steps), "all_ms": [1000 * s for s in all_steps]}
    row |= {"once_ms": 1000 * median(all_once)} | profiled(bench, sampler, setting, steps)
    row["idle_share"] = max(0.0, 1 - row["busy_ms"] / row["ms"])
    return row | {"stage_ms": stage_ms(bench, sampler, setting, steps)}


def rows_to_measure(arguments: ProfileArguments, with_published: bool) -> list[tuple[str, Setting]]:
    """The sampler's name and the setting: k=1 is an ordinary step, the same for all energies."""
    energies = arguments.listed("energies")
    todo = []
    for size in arguments.listed("sizes"):
        for batch in arguments.listed("batch_sizes", int):
            candidates = [k for k in arguments.listed("num_candidates", int) if k > 1]
            in_window = [(energy, k) for k in candidates for energy in energies if energy != "none"]
            for energy, k in [(energies[0], 1), *in_window]:
                setting = Setting(
                    size=size,
                    energy=energy,
                    num_candidates=k,
                    energy_window=(1.0, 0.0),
                    num_steps=int(arguments.num_steps),
                    batch=batch,
                )
                todo += [("published", setting)] * with_published
                ways = {"false": [False], "true": [True], "both": [False, True]}[arguments.compile]
                todo += [("ours", Setting(**vars(setting) | {"compile": way})) for way in ways]
    return todo


def label(row: dict) -> str:
    kind = f"in the window, {row['energy']}, k={row['num_candidates']}" if row["num_candidates"] > 1 else "ordinary"
    return f"{row['size']}, {kind}, batch {row['batch']}: {row['sampler']}" + ", compiled" * row["compile"]


def table(results: dict) -> str:
    head = ["step", "ms", "busy ms", "idle", "launches", "waits", "once ms", *STAGES]
    lines = []
    for row in results["rows"]:
        cells = [label(row), _ms(row["ms"]), _ms(row["busy_ms"]), f"{row['idle_share']:.0%}"]
        cells += [f"{row['launches']:.0f}", f"{row['waits']:.1f}", _ms(row["once_ms"])]
        lines.append(cells + [_ms(row["stage_ms"][stage]) for stage in STAGES])
    return markdown(head, lines)


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def most_expensive(results: dict) -> str:
    parts = []
    for row in results["rows"]:
        names = [f"  {x['ms']:8.3f} ms {x['calls']:7.1f} x  {x['name'][:100]}" for x in row["top"]]
        calls = ", ".join(f"{name} {count:.1f}" for name, count in row["host_calls"].items())
        parts.append("\n".join([label(row), *names] + ([f"  calls of the host: {calls}"] if calls else [])))
    return "\n\n".join(parts)


def text(results: dict) -> str:
    parts = [CAPTION.format(**results, **WORDS[results["device"]]), table(results), most_expensive(results)]
    if results["left_out"]:
        parts.append("Left out:\n" + "\n".join(f"- {row['label']}: {row['reason']}" for row in results["left_out"]))
    return "\n\n".join(parts)


def plot(results: dict, path: Path) -> None:
    rows = results["rows"]
    figure = Figure(figsize=(9, 1.5 + 0.3 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    busy = [min(row["busy_ms"], row["ms"]) for row in rows]
    idle = [row["ms"] - ms for row, ms in zip(rows, busy, strict=True)]
    axes.barh(range(len(rows)), busy, 0.7, label="busy")
    axes.barh(range(len(rows)), idle, 0.7, left=busy, color="lightgray", label="idle")
    for place, row in enumerate(rows):
        axes.text(row["ms"], place, f" {row['launches']:.0f} launches", va="center", fontsize="x-small")
    axes.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize="x-small")
    axes.set(xlabel="milliseconds of a step", xmargin=0.15)
    axes.invert_yaxis()
    axes.legend(fontsize="small")
    figure.suptitle("{device_name} ({device}), {threads} threads, {dtype}".format(**results), fontsize="small")
    figure.savefig(path, dpi=120, format="png")


def show(results: dict, out: Path) -> None:
    write_whole(out.with_suffix(".png"), lambda path: plot(results, path))
    print(text(results))


def fill(
    arguments: ProfileArguments, results: dict, reference: SimpleNamespace | None, bench: Bench, start: float
) -> None:
    """Rows for what is not in the results yet, written one by one."""
    sampler_of = cache(lambda *which: make_sampler(arguments, reference, *which))
    out, start = Path(arguments.out), start - results["total_seconds"]
    there = {(row["sampler"], setting_of(row)) for row in results["rows"]}
    with tqdm([row for row in rows_to_measure(arguments, reference is not None) if row not in there]) as progress:
        for name, setting in progress:
            about = {"sampler": name}
            progress.set_description(label(asdict(setting) | about))
            try:
                bench.budget.check(0.0)
                sampler = sampler_of(name, setting.size, setting.energy)
                results["rows"].append(about | measure(bench, sampler, setting, arguments.steps))
            except (LeftOut, RuntimeError) as error:
                about |= asdict(setting) | {"label": label(asdict(setting) | about), "reason": reason(error)}
                results["left_out"].append(about)
                progress.write(f"left out, {about['label']}: {about['reason']}")
            results["total_seconds"] = time.perf_counter() - start
            write_json(out, results)


def main(argv: list[str] | None = None) -> None:
    start, argv = time.perf_counter(), sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(ProfileArguments, __doc__, argv)
    if arguments.from_json:
        show(read_results(arguments.from_json), Path(arguments.from_json))
        return
    if arguments.num_threads:
        torch.set_num_threads(arguments.num_threads)
    # the profiler must not be taken down and set up again between replays of CUDA graphs
    os.environ |= {"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"}
    reference = reference_code()
    results = {"rows": []} | start_results(arguments, "bench.profile_step", argv, reference, kept=("rows",))
    budget = Budget(arguments.max_minutes, start)
    bench = Bench(arguments.device, getattr(torch, arguments.dtype), arguments.repeats, budget)
    if bench.on_cuda:
        with profile(activities=[ProfilerActivity.CUDA]):  # its first use sets it up
            torch.ones(1, device="cuda")
    fill(arguments, results, reference, bench, start)
    out = Path(arguments.out)
    show(results, out)
    print(f"\nresults: {out}, {out.with_suffix('.png')}; {results['total_seconds']:.0f} s in all")


if __name__ == "__main__":
    main()
