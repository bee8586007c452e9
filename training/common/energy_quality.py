"""What a trained energy is worth on held-out text: told from proposals, calibrated, of use to the sampler.

Shapes: N held-out rows, J proposals of each, C bins of a curve.
"""

import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from modeling_edlm import EDLMModel
from modeling_edlm.draws import effective_sample_size
from modeling_edlm.likelihood import likelihood_terms, mean_and_stderr

from .contrast import accuracy, draw_contrast, energies, nce_loss, ranking_loss
from .loop import step_seed

NUM_BUCKETS = 5  # of t
NUM_BINS = 10  # of the calibration curve
NUM_CANDIDATES = 8  # k of the effective sample size and of the sampler's bound


@torch.no_grad()
def held_out(model, denoiser, blocks, num_blocks: int, arguments, accelerator) -> dict:
    """Losses, accuracies, mean energies and effective sample sizes, over all t and by bucket of t; calibration.

    Each held-out block is told from k proposals for one masked state, from a fixed seed. "ess": of k importance weights
    exp(-E), k if the energy is indifferent, 1 if one candidate takes all. "calibration": of pairs of the data and a
    proposal, how sure the energy is, sigmoid of the difference, and how often it is right.
    """
    seed, data, proposals, times, is_empty, first = step_seed(0, num_blocks), [], [], [], [], 0
    progress = tqdm(total=num_blocks, desc="held-out", leave=False, disable=not accelerator.is_main_process)
    for x0_BL, _ in blocks.validation_batches(num_blocks):
        rows_B = torch.arange(first, first + len(x0_BL))
        with accelerator.autocast():
            texts = draw_contrast(denoiser, x0_BL, rows_B, num_blocks, seed, arguments.energy_target, NUM_CANDIDATES)
            data_B, proposal_BJ = energies(model, *texts)
        data.append(data_B.double().cpu())
        proposals.append(proposal_BJ.double().cpu())
        times.append(texts[3].cpu())
        is_empty.append((texts[0] == texts[2]).all(-1).cpu())  # nothing is revealed, there is nothing to tell
        first += len(x0_BL)
        progress.update(len(x0_BL))
    progress.close()
    data_N, proposal_NJ, t_N, is_empty_N = map(torch.cat, (data, proposals, times, is_empty))
    correct_N = accuracy(data_N, proposal_NJ, arguments.loss).mean(-1)
    ess_N = effective_sample_size(proposal_NJ)
    result = {
        "all": {
            "validation_nce_loss": float(nce_loss(data_N, proposal_NJ)),
            "chance": 2 * math.log(2),
            "validation_ranking_loss": float(ranking_loss(data_N, proposal_NJ)),
            "ranking_chance": math.log(NUM_CANDIDATES + 1),
            "validation_accuracy": float(correct_N.mean()),
            "validation_blocks": len(t_N),
            "energy_of_data": float(data_N.mean()),
            "energy_of_proposals": float(proposal_NJ.mean()),
            "ess": float(ess_N[~is_empty_N].mean()),
        },
        "num_candidates": NUM_CANDIDATES,
        "by_t": [],
    }
    bucket_N = (t_N * NUM_BUCKETS).ceil().clamp(min=1) - 1
    for bucket in range(NUM_BUCKETS):
        if (chosen_N := (bucket_N == bucket) & ~is_empty_N).any():
            values = {
                "t": (bucket + 1) / NUM_BUCKETS,
                "blocks": int(chosen_N.sum()),
                "nce_loss": float(nce_loss(data_N[chosen_N], proposal_NJ[chosen_N])),
                "accuracy": float(correct_N[chosen_N].mean()),
                "ess": float(ess_N[chosen_N].mean()),
                "energy_of_data": float(data_N[chosen_N].mean()),
                "energy_of_proposals": float(proposal_NJ[chosen_N].mean()),
            }
            result["by_t"].append(values)
    result["calibration"] = calibration((proposal_NJ - data_N[:, None])[~is_empty_N].flatten())
    return result


def calibration(difference_P: torch.Tensor) -> list[dict]:
    """How sure and how right, from E(proposal) - E(data) of pairs (P,): bins of equal width of the larger probability.

    A calibrated energy that says "this one is the data" with probability p is right in a share p of the pairs.
    """
    sure_P, right_P = difference_P.abs().sigmoid(), 0.5 + difference_P.sign() / 2
    bin_P = ((sure_P - 0.5) * 2 * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    rows = []
    for c in range(NUM_BINS):
        if (chosen_P := bin_P == c).any():
            count = int(chosen_P.sum())
            rows.append(
                {"said": float(sure_P[chosen_P].mean()), "right": float(right_P[chosen_P].mean()), "pairs": count}
            )
    return rows


@torch.no_grad()
def sampler_gains(model, denoiser, blocks, arguments, accelerator) -> list[dict]:
    """By how many bits per token the energy lowers the sampler's bound on held-out texts, for each number of steps."""
    energy = model.get_base_model() if arguments.is_adapter else model
    # float32 and at any precision the same draws: the difference is that of the energy alone
    edlm = EDLMModel.from_components(denoiser, energy, "nce").eval()
    x0_BL = torch.cat([x0_BL for x0_BL, _ in blocks.validation_batches(arguments.eval_sequences)])
    rows = []
    for num_steps in arguments.listed("eval_num_steps", int):
        with accelerator.autocast():
            terms = likelihood_terms(
                edlm,
                x0_BL,
                settings=[(NUM_CANDIDATES, 1.0)],
                num_steps=num_steps,
                energy_window=(1.0, 0.0),
                num_samples=NUM_CANDIDATES,
                denoiser_batch_size=arguments.batch_size,
                num_times=2,
            )
        bits = math.log(2) * x0_BL.shape[1]
        gain_B = mean_and_stderr(terms.mdlm_BJ - terms.nll_BJC[..., 0])[0] / bits
        rows.append(
            {
                "num_steps": num_steps,
                "num_candidates": NUM_CANDIDATES,
                "sequences": len(gain_B),
                "mdlm_bits_per_token": float(terms.mdlm_BJ.mean() / bits),
                "bits_per_token": float(gain_B.mean()),
                "stderr": float(gain_B.std() / math.sqrt(len(gain_B))),
                "most": num_steps * math.log2(NUM_CANDIDATES) / x0_BL.shape[1],
                "ess": float(terms.ess_BJC.nanmean()),
            }
        )
    return rows


def plot(quality: dict, log: list[dict], path: Path) -> None:
    """Loss against steps, accuracy and ESS against t, calibration, and the gain of the sampler's bound."""
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    (loss, told, sure), (ess, gain, energy) = figure.subplots(2, 3)
    curve = [(row["step"], row["loss"]) for row in log if "loss" in row]
    if curve:
        loss.plot(*zip(*curve, strict=True), linewidth=0.7, label="training")
    loss.set(xlabel="step", ylabel="loss (nats)", title="training loss")
    t = [row["t"] - 0.5 / NUM_BUCKETS for row in quality["by_t"]]
    told.bar(t, [row["accuracy"] for row in quality["by_t"]], width=0.17)
    told.axhline(0.5, color="gray", linestyle="--")
    told.set(xlabel="t (1: all mask)", ylabel="accuracy", ylim=(0.4, 1), title="data told from proposals, held-out")
    sure.plot([0.5, 1], [0.5, 1], color="gray", linestyle="--")
    bins = quality["calibration"]
    sure.plot([row["said"] for row in bins], [row["right"] for row in bins], marker="o")
    sure.set(xlabel="probability that the energy gives", ylabel="share that is right", title="calibration, pairs")
    k = quality["num_candidates"]
    ess.bar(t, [row["ess"] for row in quality["by_t"]], width=0.17)
    ess.set(xlabel="t", ylabel=f"ESS of {k} weights", ylim=(0, k), title="effective sample size")
    if rows := quality.get("gains"):
        x = range(len(rows))
        gain.bar(x, [row["bits_per_token"] for row in rows], yerr=[row["stderr"] for row in rows], capsize=4)
        gain.set_xticks(x, [f"T={row['num_steps']}" for row in rows])
        gain.axhline(0, color="gray", linewidth=0.8)
    gain.set(ylabel="bits per token", title=f"gain of the sampler's bound, k={k}")
    for name, label in (("energy_of_data", "data"), ("energy_of_proposals", "proposals")):
        energy.plot(t, [row[name] for row in quality["by_t"]], marker="o", label=label)
    energy.set(xlabel="t", ylabel="mean energy", title="energies")
    energy.legend()
    figure.savefig(path, dpi=110, format="png")
