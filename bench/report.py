"""Tables and charts of the results."""

from pathlib import Path

from matplotlib.figure import Figure

from training.common.results import markdown

from . import predictions
from .arguments import Setting
from .stages import STAGES

CAPTION = (
    "{device_name} ({device}), {threads} threads, {dtype}, random weights; median of up to {repeats} runs after a "
    "warm-up, at most {row_seconds:g} s for a row. Seconds of a run of the whole batch; NFE are means over its rows. "
    "Peak memory: weights and what a run adds{memory}. Roofline: time that the matrix products and attention take at "
    "the speed of the best square product ({gflops:,.0f} GFLOP/s) or of a copy ({gigabytes:,.1f} GB/s), whichever is "
    "longer, over the time of the run. Stages: shares of it."
)
PUBLISHED_CAPTION = (
    "The published sampler ({checkout}) and `generate()`, same sizes, T, k and window, by turns. Its own code, "
    "with torch's attention in place of flash-attn's and an equal function for its rotary positions; float32, on a GPU "
    "with its own bfloat16 autocast; the pass after its last step is in. {runs} after a trial. x: tokens/s of "
    "ours over its at the same batch, and over its at batch 1{best}. Stages in milliseconds for a step and sequence, "
    "theirs / ours; draw: softmax and draws."
)
PREDICTED_CAPTION = (
    "Predicted before anything was measured (bench/predictions.py), measured here, and measured over predicted."
)


def setting_of(row: dict, **changes) -> Setting:
    names = Setting.__dataclass_fields__
    row = {name: row[name] for name in names} | changes
    return Setting(**row | {"energy_window": tuple(row["energy_window"])})


def compared(results: dict) -> list[tuple[dict, dict | None, dict | None]]:
    """Our rows beside the published sampler's of the same batch and of batch 1, where these were measured."""
    theirs = {setting_of(row): row for row in results["published"]}
    rows = [row for row in results["rows"] if row["part"] == "published"]
    return [
        (row, *(theirs.get(setting_of(row, compile=False, **batch)) for batch in ({}, {"batch": 1}))) for row in rows
    ]


def add_ratios(results: dict) -> None:
    """Into our rows: tokens/s over the published sampler's, None where that was not measured."""
    best = {}
    for row in results["published"]:
        setting = setting_of(row, batch=None)
        best[setting] = max(best.get(setting, 0.0), row["tokens_per_second"])
    for row, same, first in compared(results):
        for name, other in (("ratio", same), ("ratio_to_batch_1", first)):
            row[name] = other and row["tokens_per_second"] / other["tokens_per_second"]
        other = best.get(setting_of(row, compile=False, batch=None))
        row["ratio_to_best"] = other and row["tokens_per_second"] / other


def grid_rows(results: dict) -> list[dict]:
    """Of ours, those whose work was counted, each setting once."""
    return list({setting_of(row): row for row in results["rows"] if "roofline_share" in row}.values())


def caption(results: dict) -> str:
    for_memory = "" if results["device"] == "cuda" else ", from the resident set"
    return CAPTION.format(
        **results,
        memory=for_memory,
        gflops=results["ceilings"]["flops_per_second"] / 1e9,
        gigabytes=results["ceilings"]["bytes_per_second"] / 1e9,
    )


def _setting_cells(row: dict) -> list[str]:
    hi, lo = row["energy_window"]
    choice = ["", ""] if row["energy"] == "none" else [str(row["num_candidates"]), f"[{lo:g}, {hi:g}]"]
    batch = f"best: {row['batch_size']}" if row["batch"] == "best" else str(row["batch_size"])
    return [row["size"], row["energy"], *choice, str(row["num_steps"]), batch + ", compiled" * row["compile"]]


def _gib(row: dict) -> str:
    return "" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 2**30:.3f}"


def grid_table(results: dict) -> str:
    head = "size energy k t T batch seconds s/sequence tokens/s NFE".split(" ") + ["energy NFE", "peak GiB"]
    rows = []
    for row in grid_rows(results):
        cells = [f"{row['seconds']:.3g}", f"{row['seconds_per_sequence']:.3g}", f"{row['tokens_per_second']:,.0f}"]
        cells += [f"{row['nfe']:.1f}", f"{row['energy_nfe']:.1f}", _gib(row), f"{row['roofline_share']:.0%}"]
        cells += [f"{row['stage_seconds'][stage] / row['clocked_seconds']:.0%}" for stage in STAGES]
        rows.append(_setting_cells(row) + cells)
    return markdown([*head, "roofline", *STAGES], rows, left=2)


def published_table(results: dict) -> str:
    names = {"ratio": "x", "ratio_to_batch_1": "x its batch 1"}
    names |= {"ratio_to_best": "x its best"} if has_best(results) else {}
    head = "size energy k t T batch".split(" ") + ["its tokens/s", "ours", *names.values(), "peak GiB", *STAGES]
    rows = []
    for row, same, _ in compared(results):
        ratios = ["" if row[name] is None else f"{row[name]:.1f}" for name in names]
        speeds = ["" if r is None else f"{r['tokens_per_second']:,.0f}" for r in (same, row)]
        memory = " / ".join("" if r is None else _gib(r) for r in (same, row))
        stages = [" / ".join("" if r is None else f"{_step(r, stage):.3g}" for r in (same, row)) for stage in STAGES]
        rows.append(_setting_cells(row) + speeds + ratios + [memory] + stages)
    return markdown(head, rows, left=2)


def has_best(results: dict) -> bool:
    """Older results do not compare with the best of its batches."""
    return all("ratio_to_best" in row for row, *_ in compared(results))


def predicted_table(results: dict) -> str:
    head = ["what", *"energy k t T batch predicted measured ratio".split()]
    rows = []
    for what, row, predicted, measured in predictions.compared(results):
        numbers = [f"{predicted:.3g}", f"{measured:.3g}", f"{measured / predicted:.2f}"]
        rows.append([what, *_setting_cells(row)[1:], *numbers])
    return markdown(head, rows, left=2)


def _step(row: dict, stage: str) -> float:
    """Milliseconds for each step and sequence."""
    return 1000 * row["stage_seconds"][stage] / row["num_steps"] / row["batch_size"]


def text(results: dict) -> str:
    parts = [caption(results), grid_table(results)]
    if results["published"]:
        checkout = f"diffusion.py with SHA-256 {results['published_sha256'][:12]}"
        runs = [len(row["all_seconds"]) for row in results["published"]]
        runs = "One run of it" if max(runs) == 1 else f"Up to {max(runs)} runs of it"
        best = ", and over its best of these batches" if has_best(results) else ""
        parts += [PUBLISHED_CAPTION.format(checkout=checkout, runs=runs, best=best), published_table(results)]
    if predictions.compared(results):
        parts += [PREDICTED_CAPTION, predicted_table(results)]
    if results["left_out"]:
        parts.append("Left out:\n" + "\n".join(f"- {row['label']}: {row['reason']}" for row in results["left_out"]))
    return "\n\n".join(parts)


def plot(results: dict, path: Path) -> None:
    """Tokens per second of every row; beside it the stages of both samplers, the published one's time being 1."""
    grid = grid_rows(results)
    pairs = [(row, same) for row, same, _ in compared(results) if same is not None]
    panels = [draw for draw, rows in ((_plot_grid, grid), (_plot_pairs, pairs)) if rows]
    height = 1.5 + 0.2 * max(len(grid), 2 * len(pairs))
    figure = Figure(figsize=(8 * max(len(panels), 1), height), layout="constrained")  # without pyplot: needs no display
    for number, draw in enumerate(panels):
        draw(figure.add_subplot(1, len(panels), number + 1), grid if draw is _plot_grid else pairs)
    figure.suptitle("{device_name} ({device}), {threads} threads, {dtype}".format(**results), fontsize="small")
    figure.savefig(path, dpi=120, format="png")


def _plot_grid(axes, rows: list[dict]) -> None:
    speeds = [row["tokens_per_second"] for row in rows]
    axes.plot(speeds, range(len(rows)), "o")
    for place, (row, speed) in enumerate(zip(rows, speeds, strict=True)):
        label = f"   {speed:,.0f} ({row['roofline_share']:.0%})"
        axes.text(speed, place, label, va="center", fontsize="x-small")
    axes.set_yticks(range(len(rows)), [setting_of(row).label() for row in rows], fontsize="x-small")
    axes.set(xscale="log", xlabel="tokens/s (share of the roofline)", xlim=(min(speeds) / 1.5, max(speeds) * 4))
    axes.grid(axis="x", alpha=0.3)
    axes.invert_yaxis()


def _plot_pairs(axes, pairs: list[tuple[dict, dict]]) -> None:
    for number, stage in enumerate(STAGES):  # for the legend
        axes.barh([0], [0], color=f"C{number}", label=stage)
    for i, (row, same) in enumerate(pairs):
        for place, kind, name in ((i - 0.2, same, "published"), (i + 0.2, row, f"ours, {row['ratio']:.1f}x")):
            left, share = 0.0, kind["seconds_per_sequence"] / same["seconds_per_sequence"]
            for number, stage in enumerate(STAGES):
                width = share * kind["stage_seconds"][stage] / kind["clocked_seconds"]
                axes.barh(place, width, 0.36, left=left, color=f"C{number}")
                left += width
            axes.text(left, place, f" {name}", va="center", fontsize="x-small")
    axes.set_yticks(range(len(pairs)), [setting_of(row).label() for row, _ in pairs], fontsize="x-small")
    axes.set(xlabel="seconds per sequence over the published sampler's", xmargin=0.15)
    axes.legend(fontsize="x-small", ncols=len(STAGES), loc="lower center", bbox_to_anchor=(0.5, 1))
    axes.invert_yaxis()
