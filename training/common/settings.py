"""The rows of a grid of settings (`training.evaluate_settings`): what each is called, which is best, and their table.

Plain Python: cards read results without torch, which takes seconds to import.
"""


def chosen(rows: list[dict], passes: float, tolerance: float) -> dict | None:
    """The row with an energy whose samples the judge finds best, of those that cost about so many passes."""
    near = [row for row in rows if row["window"] and abs(row["samples"]["passes"] / passes - 1) <= tolerance]
    return min(near, key=lambda row: row["samples"]["judge"]["mean"], default=None)


def label(row: dict) -> str:
    if row["window"] is None:
        return "MDLM"
    if row["corrector"][0]:
        rounds, size, temperature = row["corrector"]
        return f"{row['energy']}, k={row['num_candidates']}, {rounds} rounds of {size} at {temperature:g}"
    return f"{row['energy']}, k={row['num_candidates']}, t in [{row['window'][1]:g}, {row['window'][0]:g}]"


def kind_of(row: dict) -> str:
    if row["window"] is None:
        return "MDLM"
    return "corrector after them" if row["corrector"][0] else "energy within the steps"


def table(results: dict) -> str:
    """Markdown: every setting, the cheap ones first."""

    def cell(value: dict, digits: int = 3) -> str:
        return f"{value['mean']:.{digits}f} +- {value['stderr']:.{digits}f}"

    lines = ["| T | sampler | passes | bits per character, at most | judge's bits per character | known words |"]
    lines.append("|---:|---|---:|---:|---:|---:|")
    for row in sorted(results["rows"], key=lambda row: row["samples"]["passes"]):
        read = row["samples"]
        cells = (cell(row["bound"]) if row["bound"] else "", cell(read["judge"]), cell(read["known_words"]))
        lines.append(f"| {row['num_steps']} | {label(row)} | {read['passes']:.0f} | {' | '.join(cells)} |")
    best = results["chosen"]
    words = f"T = {best['num_steps']}, {label(best)}" if best else "none costs about so many"
    lines += ["", f"Best under the judge at about {results['arguments']['passes']:g} passes: {words}", ""]
    lines.append("| temperature | sampler | judge's bits per character | known words | token entropy |")
    lines.append("|---:|---|---:|---:|---:|")
    for row in results["temperatures"]:
        read = row["samples"]
        cells = [cell(read[name]) for name in ("judge", "known_words", "entropy")]
        lines.append(f"| {row['temperature']:g} | {label(row)} | {' | '.join(cells)} |")
    data = " | ".join(cell(results["data"][name]) for name in ("judge", "known_words", "entropy"))
    return "\n".join([*lines, f"| | held-out text | {data} |"])
