"""Speed of `generate()` with random weights, and of the published sampler beside it.

    python -m bench
    EDLM_REF=<checkout of MinkaiXu/Energy-Diffusion-LLM> python -m bench
    python -m bench --from_json hub_cards/results/bench-cpu.json

Every option that is a list has the usual value first: the grid "star" is the setting of all first values and those that
differ from it in one. What matters most is measured first, and results are written after every row. --max_minutes
leaves out what would not end in time, and --resume true goes on with it.
"""

import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from tqdm.auto import tqdm

from training.common.arguments import answer_early, parse_arguments

from .arguments import BenchArguments, Setting

if __name__ == "__main__":
    answer_early(BenchArguments, __doc__)

import torch

from training.common.results import read_results, write_json, write_whole

from . import report
from .measure import Bench, Budget, LeftOut, Ours, Published, Runs, make_sampler, reason
from .record import reference_code, start_results
from .roofline import ceilings

NEARLY_BEST = 0.98  # of the speed: a batch size that is smaller takes less time to measure


class Session:
    """Measures what is not in the results yet, and writes them after every row."""

    def __init__(
        self,
        arguments: BenchArguments,
        results: dict,
        reference: SimpleNamespace | None,
        bench: Bench,
        progress: tqdm,
        start: float,
    ):
        self.arguments, self.results, self.bench, self.progress = arguments, results, bench, progress
        self.start = start - results["total_seconds"]
        self.sampler = cache(lambda *which: make_sampler(arguments, reference, *which))

    def measure(self, part: str, group: list[tuple[str, Setting]]) -> None:
        """Into the lists named: a row for each setting that is not there and does not take too long."""
        runs, reserved = [], 0.0
        known = [row["batch_size"] for row in self.results["rows"] if report.setting_of(row) == group[0][1]]
        batch_size = known[-1] if known else None
        with_published = any(name == "published" for name, _ in group)
        most = self.arguments.published_row_seconds if with_published else self.arguments.row_seconds
        for name, setting in group:
            if self.has(name, part, setting):
                continue
            self.progress.set_description(f"{'published: ' * (name == 'published')}{setting.label()}")
            self.bench.tidy()
            with self.leaving_out(name, part, setting):
                self.bench.budget.check(reserved)
                sampler = self.sampler(name, setting.size, setting.energy)
                batch_size, about = self.plan(sampler, setting, batch_size, most, reserved)
                counted = self.results["ceilings"] if name == "rows" else None
                runs.append((name, about, Runs(self.bench, sampler, setting, batch_size, counted)))
                reserved += about["estimated_seconds"] * self.bench.least_runs
        if runs:
            with self.leaving_out("rows", part, group[0][1]):  # all of them, if memory ends only now
                self.bench.take_turns([run for *_, run in runs], most)
                for name, about, run in runs:
                    self.results[name].append({"part": part} | run.row() | about)
        self.write()

    def has(self, name: str, part: str, setting: Setting) -> bool:
        """Whether it was measured, beside the published sampler if that is asked for."""
        found = [row for row in self.results[name] if report.setting_of(row) == setting]
        return any(part == "grid" or row["part"] == part for row in found)

    @contextmanager
    def leaving_out(self, name: str, part: str, setting: Setting):
        try:
            yield
        except (LeftOut, RuntimeError) as error:
            label = "published: " * (name == "published") + setting.label()
            about = {"list": name, "part": part, "label": label, "reason": reason(error)}
            self.results["left_out"].append(about | asdict(setting))
            self.progress.write(f"left out, {label}: {about['reason']}")

    def plan(
        self, sampler: Ours | Published, setting: Setting, batch_size: int | None, most: float, reserved: float
    ) -> tuple[int, dict]:
        """The batch size, if it is not given, and what the trials said."""
        speeds = {}
        if batch_size is None and setting.batch == "best":
            if isinstance(sampler, Published):
                raise LeftOut("there is no best batch of ours")
            sizes = self.arguments.listed("trial_batch_sizes", int)
            speeds = self.bench.best(sampler, setting, sizes, most)
            if not speeds:
                raise LeftOut("out of memory at every batch size")
            batch_size = min(b for b, speed in speeds.items() if speed >= NEARLY_BEST * max(speeds.values()))
            estimate = batch_size * sampler.length / speeds[batch_size]
        else:
            batch_size = setting.batch if batch_size is None else batch_size
            estimate = self.bench.estimate(sampler, setting, batch_size)
        if estimate > most:
            raise LeftOut(f"a run would take about {estimate:.0f} s, more than {most:g} s")
        self.bench.budget.check(reserved + self.bench.least_seconds(sampler, setting, batch_size, estimate))
        return batch_size, {"estimated_seconds": estimate, "trial_tokens_per_second": speeds}

    def write(self) -> None:
        self.results["total_seconds"] = time.perf_counter() - self.start
        report.add_ratios(self.results)
        write_json(Path(self.arguments.out), self.results)


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
    reference = reference_code() if any(arguments.listed("published_steps", int)) else None
    results = start_results(arguments, "bench", argv, reference, kept=("rows", "published", "ceilings"))
    budget, dtype = Budget(arguments.max_minutes, start), getattr(torch, arguments.dtype)
    bench = Bench(arguments.device, dtype, arguments.repeats, budget)
    if "ceilings" not in results:
        results |= {"ceilings": ceilings(arguments.device, dtype, bench.wait), "rows": [], "published": []}
    with tqdm(arguments.groups(reference is not None)) as progress:
        session = Session(arguments, results, reference, bench, progress, start)
        for part, group in progress:
            session.measure(part, group)
    out = Path(arguments.out)
    show(results, out)
    print(f"\nresults: {out}, {out.with_suffix('.png')}; {results['total_seconds']:.0f} s in all")


if __name__ == "__main__":
    main()
