"""What was predicted for one H200 before anything was measured there, beside what was measured.

A roofline estimate, made by counting passes and bytes by hand, at the published size (768 wide, 12 blocks, 12 heads,
length 1024, vocabulary 50,258) in bfloat16. Assumed: 550 TFLOP/s in the products of the blocks, 350 in attention (300
causal), 600 in the projection on the vocabulary, 4.0 TB/s, and 2.5 to 4 ms of launches for a pass of the published
denoiser at batch 1. Expected to be right to 30 %, at batch 1 without compiling to 40 %.
"""

from .arguments import OWN_SIZES, SIZES

FULL = SIZES["cuda"]["subwords"]
PAPER, ALL_TIMES = (1.0, 0.8), (1.0, 0.0)  # energy windows

# milliseconds of a step for one sequence, mean of T = 128 steps in the paper's window, by energy and k
MS_PER_STEP = {
    "published, batch 1": {("ar", 2): 5.09, ("ar", 8): 6.90, ("nce", 8): 6.35, ("ar", 16): 9.32},
    "ours, batch 1": {("ar", 2): 3.60, ("ar", 8): 4.64, ("nce", 8): 4.49, ("ar", 16): 6.04},
    "ours, batch 1, compiled": {("ar", 2): 1.24, ("ar", 8): 2.00, ("nce", 8): 1.85, ("ar", 16): 3.01},
    "ours, best batch": {("ar", 2): 0.83, ("ar", 8): 1.59, ("nce", 8): 1.43, ("ar", 16): 2.60},
}

# seconds for a sequence by T: the published sampler at batch 1, ours at the best batch
COLUMNS = ("none", 1, ALL_TIMES), ("ar", 2, PAPER), ("ar", 8, PAPER), ("nce", 8, PAPER), ("ar", 8, ALL_TIMES)
SECONDS_PER_SEQUENCE = {
    64: ((0.27, 0.035), (0.33, 0.053), (0.44, 0.102), (0.41, 0.092), (1.12, 0.33)),
    128: ((0.54, 0.069), (0.65, 0.106), (0.88, 0.203), (0.81, 0.184), (2.25, 0.67)),
    256: ((1.07, 0.135), (1.28, 0.208), (1.74, 0.399), (1.60, 0.360), (4.42, 1.31)),
    1024: ((3.08, 0.348), (3.63, 0.536), (4.81, 1.027), (4.45, 0.928), (11.7, 3.4)),
}


def is_of_the_size(results: dict) -> bool:
    """Whether the predictions are of what was measured."""
    named = "subwords" in results["sizes"].split(",")
    changed = [results[name] for name in OWN_SIZES]
    return results["device"] == "cuda" and named and all(x in (None, y) for x, y in zip(changed, FULL, strict=True))


def compared(results: dict) -> list[tuple[str, dict, float, float]]:
    """What, one of its rows, and the prediction and the measurement in one unit; only what was measured."""
    if not is_of_the_size(results):
        return []
    found = []
    for row, kind in [(row, "ours") for row in results["rows"]] + [(row, "published") for row in results["published"]]:
        what = f"{kind}, best batch" if row["batch"] == "best" else f"{kind}, batch {row['batch_size']}"
        what += ", compiled" * row["compile"]
        which = row["energy"], row["num_candidates"], tuple(row["energy_window"])
        if row["size"] != "subwords":
            continue
        if (row["num_steps"], which[2]) == (128, PAPER) and which[:2] in MS_PER_STEP.get(what, {}):
            measured = 1000 * row["seconds_per_sequence"] / 128
            found.append((f"ms per step: {what}", row, MS_PER_STEP[what][which[:2]], measured))
        place = {"published, batch 1": 0, "ours, best batch": 1}.get(what)
        if place is not None and which in COLUMNS and row["num_steps"] in SECONDS_PER_SEQUENCE:
            predicted = SECONDS_PER_SEQUENCE[row["num_steps"]][COLUMNS.index(which)][place]
            found.append((f"s per sequence: {what}", row, predicted, row["seconds_per_sequence"]))
    return found
