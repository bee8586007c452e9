"""The training curves of several runs in one plot, and how far they are apart.

python -m bench.curves --runs runs/one,runs/two --names "one process,two" --out processes.json
"""

from dataclasses import dataclass, field
from pathlib import Path

from training.common.arguments import CommaLists, answer_early, command, parse_arguments


@dataclass(kw_only=True)
class CurvesArguments(CommaLists):
    runs: str = field(metadata={"help": "folders of runs, with commas between"})
    names: str = field(default="", metadata={"help": "what the plot calls them; default: their folders"})
    metric: str = field(default="loss", metadata={"help": "a column of metrics.jsonl"})
    out: str = field(metadata={"help": "results, .json; the plot has the same name"})

    def __post_init__(self):
        self.names = self.names or self.runs
        if len(self.listed("names")) != len(self.listed("runs")):
            raise ValueError(f"names must be different, one for each of runs={self.runs!r}, got {self.names!r}")


if __name__ == "__main__":
    answer_early(CurvesArguments, __doc__)

from matplotlib.figure import Figure

from training.common.results import read_lines, write_json, write_whole


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(CurvesArguments, __doc__, argv)
    curves = {}
    for name, run in zip(arguments.listed("names"), arguments.listed("runs"), strict=True):
        rows = [row for row in read_lines(Path(run) / "metrics.jsonl") if arguments.metric in row]
        if not rows:
            raise ValueError(f"runs has {run!r}, where no {arguments.metric!r} was logged")
        curves[name] = {row["step"]: row[arguments.metric] for row in rows}
    first, *others = curves.values()
    common = [step for step in first if all(step in other for other in others)]
    apart = max((abs(first[step] - other[step]) for step in common for other in others), default=0.0)
    results = {"command": command("curves", arguments), "metric": arguments.metric, "largest_difference": apart}
    results["curves"] = {name: [list(point) for point in curve.items()] for name, curve in curves.items()}
    out = Path(arguments.out)

    def plot(path: Path) -> None:
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for i, (name, curve) in enumerate(curves.items()):
            axes.plot(
                curve.keys(), curve.values(), label=name, linewidth=3 if i == 0 else 1.2, alpha=0.9 - 0.3 * (i == 0)
            )
        axes.set(xlabel="step", ylabel=arguments.metric, title=f"largest difference {apart:.1e}")
        axes.legend()
        figure.savefig(path, dpi=110, format="png")

    write_whole(out.with_suffix(".png"), plot)
    write_json(out, results)
    print(f"largest difference of {arguments.metric}: {apart:.3g}\nresults: {out}, .png")


if __name__ == "__main__":
    main()
