"""Results as HTML tables and bars: words of ours and numbers, nothing that a visitor typed."""

ESTIMATORS = {
    "sampler": (
        "EDLM sampler",
        "An upper bound for the sampler with these settings, its steps and proposals included. Compare models by "
        "this one.",
    ),
    "mdlm": (
        "MDLM, no energy",
        "An upper bound for the denoiser alone, in the limit of many steps.",
    ),
    "paper": (
        "As published",
        "The value that published tables report. It is not a bound: it can be too low, because the denoiser fills "
        "tokens independently of each other.",
    ),
    "ar": (
        "Left to right",
        "Exact, under the causal model of this repo, which reads the text from left to right.",
    ),
}
LIMIT = "Stopped at the time limit of this Space; this is the result so far."


def compare_table(facts: dict | None, scores_itself: bool) -> str:
    """MDLM beside EDLM; nothing while they run."""
    if facts is None:
        return ""
    rows = [
        ("Steps", "num_steps", "{:,}"),
        ("Denoiser calls", "nfe", "{:,}"),
        ("Energy calls", "energy_nfe", "{:,}"),
        ("Seconds", "seconds", "{:.2f}"),
        ("Tokens of the text", "tokens", "{:,}"),
        ("Energy of the whole text", "energy", "{:.2f}"),
        ("Bits per character, left-to-right model", "bits_per_character", "{:.3f}"),
        ("Entropy of its tokens, bits", "entropy", "{:.3f}"),
    ]
    body = "".join(
        f"<tr><th scope=row>{label}</th>"
        + "".join(f"<td class=n>{_cell(facts[name][key], form)}</td>" for name in ("mdlm", "edlm"))
        + "</tr>"
        for label, key, form in rows
    )
    own = " Here that model is the energy itself, which flatters EDLM." if scores_itself else ""
    return (
        '<div class="edlm-table"><table><tr><td></td><th scope=col>MDLM</th><th scope=col>EDLM</th></tr>'
        f"{body}</table><p class=note>Fewer bits per character are better, unless the text repeats itself: then the "
        f"entropy is low too.{own} The energy is a sum over the text, so compare it for texts of the same length. "
        "These are two texts; averages over many are in the model's card.</p></div>"
    )


def score_bars(result: dict | None) -> str:
    """Bits per character by each estimator, with error bars of two standard errors."""
    if result is None:
        return ""
    estimates = dict(result["estimates"])
    if result["ar"] is not None:
        estimates["ar"] = {"bits": result["ar"], "stderr": 0.0}
    longest = max([1.0, *(e["bits"] + 2 * e["stderr"] for e in estimates.values())]) * 1.05
    rows = "".join(_bar(name, estimate, longest) for name, estimate in estimates.items())
    progress = f"Round {result['done']} of {result['rounds']}. " if result["state"] == "running" else ""
    end = LIMIT + " " if result["state"] == "time" else ""
    missing = ""
    if result["done"] and "paper" not in result["estimates"]:
        missing = "The published value is not defined for this model's energy. "
    return (
        f'<div class="edlm-bars" data-state="{result["state"]}">{rows}</div><div class="edlm-table"><p class=note>'
        f"{progress}{end}{missing}{result['characters']:,} characters as the model reads them, {result['tokens']:,} "
        "tokens. Bits per character: lower is better. Thin bars: two standard errors to each side.</p>"
        "</div>"
    )


def _bar(name: str, estimate: dict, longest: float) -> str:
    title, meaning = ESTIMATORS[name]
    bits, error = estimate["bits"], 2 * estimate["stderr"]
    width = 100 * max(bits, 0) / longest
    left, right = (100 * min(max(x, 0), longest) / longest for x in (bits - error, bits + error))
    whisker = f"<b style='left:{left:.2f}%;width:{right - left:.2f}%'></b>" if error else ""
    value = f"{bits:.3f}" + (f" &plusmn; {estimate['stderr']:.3f}" if error else "")
    gain = estimate.get("gain")
    if name == "sampler" and gain is not None:
        meaning += f" The energy changes it by {-gain:+.4f}."
    return (
        f'<div class="row" data-estimator="{name}"><span>{title}: <span class="value">{value}</span></span>'
        f"<div class=axis aria-hidden=true><i style='width:{width:.2f}%'></i>{whisker}</div><p>{meaning}</p></div>"
    )


def _cell(value, form: str) -> str:
    return "-" if value is None else form.format(value)
