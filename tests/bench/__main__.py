"""Speed of `generate()` with random weights, and of the published sampler beside it.

    python -m tests.bench
    EDLM_REF=<checkout of MinkaiXu/Energy-Diffusion-LLM> python -m tests.bench
    python -m tests.bench --from_json hub_cards/results/bench-cpu.json

Every option that is a list has the usual value first: the grid "star" is the setting of all first values and those that
differ from it in one. Results are written after every row; --resume true goes on with what is there.
"""

import gc
import os
import shlex
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm.auto import tqdm

from training.results import machine, read_results, write_json, write_whole
from training.trainer import parse_arguments

from . import published, report
from .arguments import BenchArguments
from .measure import Bench, Ours, Published, Runs, Setting
from .roofline import ceilings

NOT_RECORDED = ("out", "resume", "from_json")
REFERENCE = "EDLM_REF"


class Session:
    """Measures what is not in the results yet, and writes them after every row."""

    def __init__(
        self, arguments: BenchArguments, results: dict, reference: SimpleNamespace | None, progress: tqdm, start: float
    ):
        self.arguments, self.results, self.reference, self.progress = arguments, results, reference, progress
        self.bench = Bench(arguments.device, getattr(torch, arguments.dtype), arguments.repeats)
        self.sizes = arguments.all_sizes()
        self.start = start - results["total_seconds"]
        self.sampler = lru_cache(maxsize=2)(self._sampler)

    def grid(self, size: str, energy: str) -> None:
        groups = [[("rows", setting)] for setting in self.arguments.settings(size, energy)]
        self.measure("grid", groups, self.arguments.row_seconds)

    def beside(self, size: str, energy: str) -> None:
        """Ours and the published sampler by turns, of which the latter cannot be compiled."""
        groups = {}
        for setting in self.arguments.published_settings(size, energy):
            groups.setdefault(replace(setting, compile=False), []).append(("rows", setting))
        groups = [[*ours, ("published", setting)] for setting, ours in groups.items()]
        self.measure("published", groups, self.arguments.published_row_seconds)

    def measure(self, part: str, groups: list[list[tuple[str, Setting]]], most: float) -> None:
        """Into the lists named: a row for each setting that is not there and takes at most so many seconds."""
        self.sampler.cache_clear()
        gc.collect()
        ceilings = self.results["ceilings"] if part == "grid" else None
        for group in groups:
            runs, batch_size = [], None
            for name, setting in group:
                if setting in (report.setting_of(row) for row in self.results[name] if row["part"] == part):
                    continue
                self.progress.set_description(f"{'published: ' * (name == 'published')}{setting.label()}")
                sampler = self.sampler(name, setting.size, setting.energy)
                with self.leaving_out(name, part, setting):
                    batch_size, about = self.plan(sampler, setting, batch_size, most)
                    runs.append((name, about, Runs(self.bench, sampler, setting, batch_size, ceilings)))
            with self.leaving_out("rows", part, group[0][1]):  # all of them, if memory ends only now
                self.bench.take_turns([run for *_, run in runs], most)
                for name, about, run in runs:
                    self.results[name].append({"part": part} | run.row() | about)
            self.write()

    def _sampler(self, name: str, size: str, energy: str) -> Ours | Published:
        size, bench, seed = self.sizes[size], self.bench, self.arguments.seed
        if name == "published":
            return Published(self.reference, energy, size, bench.device, seed)
        return Ours(energy, size, bench.device, bench.dtype, seed)

    @contextmanager
    def leaving_out(self, name: str, part: str, setting: Setting):
        try:
            yield
        except (LeftOut, torch.OutOfMemoryError) as error:
            reason = str(error) if isinstance(error, LeftOut) else "out of memory"
            about = {"list": name, "part": part, "label": setting.label(), "reason": reason}
            self.results["left_out"].append(about | asdict(setting))
            self.progress.write(f"left out, {setting.label()}: {reason}")

    def plan(
        self, sampler: Ours | Published, setting: Setting, batch_size: int | None, most: float
    ) -> tuple[int, dict]:
        """The batch size, if it is not given, and what the trials said."""
        speeds = {}
        if batch_size is None and setting.batch == "best":
            sizes = self.arguments.listed("trial_batch_sizes", int)
            speeds = self.bench.best(sampler, setting, sizes, most)
            if not speeds:
                raise LeftOut("out of memory at every batch size")
            batch_size = max(speeds, key=speeds.get)
            estimate = batch_size * sampler.length / speeds[batch_size]
        else:
            batch_size = setting.batch if batch_size is None else batch_size
            estimate = self.bench.estimate(sampler, setting, batch_size)
        if estimate > most:
            raise LeftOut(f"a run would take about {estimate:.0f} s, more than {most:g} s")
        return batch_size, {"estimated_seconds": estimate, "trial_tokens_per_second": speeds}

    def write(self) -> None:
        self.results["total_seconds"] = time.perf_counter() - self.start
        report.add_ratios(self.results)
        write_json(Path(self.arguments.out), self.results)


class LeftOut(Exception):
    """Why a row is not measured."""


def start_results(arguments: BenchArguments, argv: list[str], reference: SimpleNamespace | None) -> dict:
    """The results so far: those of the file where they go on, else no rows."""
    options = {name: value for name, value in asdict(arguments).items() if name not in NOT_RECORDED}
    prefix = f"{REFERENCE}=CHECKOUT " if reference is not None else ""
    about = {"command": prefix + shlex.join(["python", "-m", "tests.bench", *argv])} | options | machine()
    about["device_name"] = torch.cuda.get_device_name() if arguments.device == "cuda" else about["cpu_name"]
    about["published_sha256"] = reference and reference.sha256
    if arguments.resume and Path(arguments.out).exists():
        results = read_results(arguments.out)
        names = [*options, "device_name", "threads"]
        names += ["published_sha256"] if reference is not None and results.get("published") else []
        for name in names:
            if results.get(name) != about[name]:
                raise ValueError(f"resume: {arguments.out} has {name}={results.get(name)!r}, not {about[name]!r}")
        kept = {name: results[name] for name in ("rows", "published", "ceilings", "total_seconds")}
        about["published_sha256"] = about["published_sha256"] or results["published_sha256"]
        return about | kept | {"left_out": []}  # these are tried again
    wait = torch.cuda.synchronize if arguments.device == "cuda" else lambda: None
    measured = ceilings(arguments.device, getattr(torch, arguments.dtype), wait)
    return about | {"ceilings": measured, "total_seconds": 0.0, "rows": [], "published": [], "left_out": []}


def show(results: dict, out: Path) -> None:
    write_whole(out.with_suffix(".png"), lambda path: report.plot(results, path))
    print(report.text(results))


def main(argv: list[str] | None = None) -> None:
    start, argv = time.perf_counter(), sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(BenchArguments, __doc__, argv)
    if arguments.from_json:
        show(read_results(arguments.from_json), Path(arguments.from_json))
        return
    if arguments.num_threads:
        torch.set_num_threads(arguments.num_threads)
    reference = None
    if os.environ.get(REFERENCE) and arguments.published_steps:
        reference = published.load(os.environ[REFERENCE])
    results = start_results(arguments, argv, reference)
    todo = [(Session.grid, size, energy) for size in arguments.all_sizes() for energy in arguments.listed("energies")]
    if reference is not None:
        energies = arguments.listed("published_energies")
        todo += [(Session.beside, size, energy) for size in arguments.all_sizes() for energy in energies]
    with tqdm(todo) as progress:
        session = Session(arguments, results, reference, progress, start)
        for part, size, energy in progress:
            part(session, size, energy)
    out = Path(arguments.out)
    session.write()
    show(results, out)
    print(f"\nresults: {out}, {out.with_suffix('.png')}; {results['total_seconds']:.0f} s in all")


if __name__ == "__main__":
    main()
