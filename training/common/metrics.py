"""What samples are measured by: plain functions, in two kinds.

Under a causal language model, the scorer: `generative_nll`, `bits_per_character`, `hidden_features` and `mauve`.
Without one: the others, on sequences of anything that can be compared: a str, a list of words, a row of ids.
Generative perplexity and entropy alone can be gamed (arXiv 2606.08417): report them beside a distance between
distributions, and compare samplers at matched entropy (arXiv 2604.02718).

This file stands on its own (torch, numpy and the standard library): `make model` puts copies beside the `evaluate`
modules.

Shapes: B samples, R reference texts, L length, V vocabulary, D hidden size, F features, G n-grams.
"""

import math
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

LN2 = math.log(2)


# ---- under a scorer


@torch.no_grad()
def generative_nll(
    scorer: torch.nn.Module,
    x_BL: torch.Tensor,
    bos_token_id: int,
    mask_token_id: int | None = None,
    is_token_BL: torch.Tensor | None = None,
    batch_size: int = 8,
) -> torch.Tensor:
    """(B,) float64, nats per token of each sample: the mean of -log p(x_i | bos, x_{<i}) over its tokens.

    Generative perplexity is exp of the mean over samples. Log-probabilities come from float32 logits.

    Args:
        scorer: any causal language model in eval mode: `scorer(input_ids).logits` (B, L, V).
        bos_token_id: put in front, so that the first token counts too. mask_token_id: an id that no text holds; the
            scorer's probabilities are those of the other ids.
        is_token_BL: bool, False for padding on the right. batch_size: samples in one pass.
    Raises:
        ValueError: a sample without tokens, or no bos_token_id.
    """
    is_token_BL = torch.ones_like(x_BL, dtype=torch.bool) if is_token_BL is None else is_token_BL.bool()
    if not x_BL.numel() or not is_token_BL.any(-1).all():
        raise ValueError(f"x_BL must hold a token in every row, got shape {tuple(x_BL.shape)}")
    nll = []
    for start in range(0, len(x_BL), batch_size):
        now_BL, counts_BL = x_BL[start : start + batch_size], is_token_BL[start : start + batch_size]
        logits_BLV = scorer(_behind_bos(now_BL, bos_token_id)).logits.float()
        if mask_token_id is not None:
            logits_BLV[..., mask_token_id] = float("-inf")
        nll_BL = torch.nn.functional.cross_entropy(logits_BLV.transpose(1, 2), now_BL, reduction="none").double()
        nll.append(torch.where(counts_BL, nll_BL, 0.0).sum(-1) / counts_BL.sum(-1))
    return torch.cat(nll)


def bits_per_character(scorer: torch.nn.Module, x_BL: torch.Tensor) -> torch.Tensor:
    """(B,) bits per token under an `EDLMForCausalLM`, which are bits per character for a character tokenizer."""
    return generative_nll(scorer, x_BL, scorer.config.bos_token_id, scorer.config.mask_token_id) / LN2


@torch.no_grad()
def hidden_features(
    scorer: torch.nn.Module,
    x_BL: torch.Tensor,
    bos_token_id: int,
    is_token_BL: torch.Tensor | None = None,
    pooling: str = "mean",
    batch_size: int = 8,
) -> torch.Tensor:
    """(B, D) float32: what the scorer's output projection reads, pooled over the inputs bos, x_1 ... x_{L-1}.

    `pooling="last"` takes the state at the last input alone, as MAUVE was proposed with (arXiv 2102.01454): apt for a
    large scorer; `"mean"` averages over inputs, since a small one remembers little of a text at its end.

    Args:
        scorer: a transformers causal language model in eval mode. is_token_BL: bool, False for padding on the right.
    Raises:
        ValueError: another pooling.
    """
    if pooling not in ("mean", "last"):
        raise ValueError(f"pooling must be mean or last, got {pooling!r}")
    weight_BL = torch.ones_like(x_BL) if is_token_BL is None else is_token_BL.long()
    if pooling == "last":
        weight_BL = torch.nn.functional.one_hot(weight_BL.sum(-1) - 1, x_BL.shape[1])
    weight_BL1 = (weight_BL / weight_BL.sum(-1, keepdim=True))[..., None]
    features, read = [], []
    # A hook, since the models of one library name their hidden states alike and those of others do not.
    hook = scorer.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    try:
        for start in range(0, len(x_BL), batch_size):
            scorer(_behind_bos(x_BL[start : start + batch_size], bos_token_id))
            features.append((read.pop().float() * weight_BL1[start : start + batch_size]).sum(1))
    finally:
        hook.remove()
    return torch.cat(features)


def _behind_bos(x_BL: torch.Tensor, bos_token_id: int) -> torch.Tensor:
    if bos_token_id is None:
        raise ValueError("bos_token_id must be the id that starts a text of the scorer, got None")
    return torch.cat((torch.full_like(x_BL[:, :1], bos_token_id), x_BL[:, :-1]), dim=1)


def mauve(
    samples_BD: torch.Tensor, references_RD: torch.Tensor, num_resamples: int = 0, seed: int = 25
) -> dict[str, float | int | list[float]]:
    """MAUVE of feature sets (Pillutla et al., arXiv 2102.01454), in (0, 1], 1 for equal laws; from `hidden_features`.

    Both sets are quantised by k-means into `num_buckets` = max(2, min(B, R) / 10) cells. The value depends on the
    sizes: compare only values of equal sizes, and with that of real data; thousands of samples are customary.
    `mauve_star` is the form with smoothed histograms (arXiv 2212.14578), less biased for few samples.

    Returns:
        `mauve`, `mauve_star`, `num_buckets` and, with `num_resamples`, `interval`: a centred 95% bootstrap interval of
        `mauve` over samples, the cells held fixed.
    Raises:
        ImportError: the package mauve-text is not installed.
    """
    try:
        import mauve as package
        from mauve.compute_mauve import get_divergence_curve_for_multinomials
    except ImportError as error:
        raise ImportError("MAUVE needs the package mauve-text: pip install mauve-text") from error
    features = [features.cpu().numpy() for features in (samples_BD, references_RD)]
    found = package.compute_mauve(p_features=features[0], q_features=features[1], seed=seed)
    result = {"mauve": float(found.mauve), "mauve_star": float(found.mauve_star), "num_buckets": found.num_buckets}
    if num_resamples:
        cells = np.repeat(np.arange(len(found.p_hist)), np.rint(found.p_hist * len(features[0])).astype(int))

        def area(cells_B: np.ndarray) -> float:
            p = np.bincount(cells_B, minlength=len(found.q_hist)) / len(cells_B)
            weights = np.linspace(1e-6, 1 - 1e-6, 25)  # these and the scale 5: the package's defaults
            x, y = get_divergence_curve_for_multinomials(p, found.q_hist, weights, 5).T
            by_x, by_y = np.argsort(x), np.argsort(y)
            return (np.trapezoid(y[by_x], x[by_x]) + np.trapezoid(x[by_y], y[by_y])) / 2

        low, high = bootstrap_interval(cells, area, num_resamples, seed=seed, centred=True)
        result["interval"] = [max(low, 0.0), min(high, 1.0)]
    return result


# ---- without a language model


def token_entropy(x_BL: torch.Tensor) -> torch.Tensor:
    """(B,) nats: entropy of each sample's own token frequencies, at most log min(L, V) (as in arXiv 2409.02908).

    Raises ValueError if there are no tokens.
    """
    if not x_BL.numel():
        raise ValueError(f"x_BL must hold tokens, got shape {tuple(x_BL.shape)}")
    counts = torch.zeros(len(x_BL), int(x_BL.max()) + 1, dtype=torch.float64, device=x_BL.device)
    counts.scatter_add_(1, x_BL, torch.ones_like(x_BL, dtype=torch.float64))
    p = counts / counts.sum(-1, keepdim=True)
    return -(p * p.clamp(min=1e-300).log()).sum(-1)


def ngrams(sequences: Sequence[Sequence], n: int) -> tuple[np.ndarray, np.ndarray]:
    """All n-grams of all sequences: (G,) int64, equal where the n-grams are, and (G,) the number of their sequence."""
    _, symbol_S, owner_S = _flatten(sequences)
    gram_G = symbol_S
    for i in range(1, n):  # numbered anew for each length: the products stay small
        gram_G = gram_G[:-1] * (symbol_S.max() + 1) + symbol_S[i:]
        gram_G = np.unique(gram_G, return_inverse=True)[1].astype(np.int64)
    whole_G = owner_S[: len(gram_G)] == owner_S[n - 1 :]  # not across two sequences
    return gram_G[whole_G], owner_S[: len(gram_G)][whole_G]


def ngram_divergence(
    samples: Sequence[Sequence], references: Sequence[Sequence], n: int, num_resamples: int = 0, seed: int = 0
) -> dict[str, float | list[float]]:
    """Jensen-Shannon divergence between the n-gram frequencies of two sets of sequences, in bits, in [0, 1].

    Source: Lin 1991. It is computed from counts, and counts of few n-grams differ by chance: for laws that are equal it
    is above 0, by about (number of kinds of n-grams - 1) / (8 ln 2) * (1 / G_samples + 1 / G_references) once each kind
    is common, and near 1 while most occur once. Compare values of equal sizes only, and with the same of real data or
    `ngram_floor`.

    Returns:
        `divergence` and, with `num_resamples`, `interval`: a 95% bootstrap interval over samples, centred.
    Raises:
        ValueError: a set without n-grams.
    """
    gram_G, owner_G = ngrams([*samples, *references], n)
    is_sample_G = owner_G < len(samples)
    if is_sample_G.all() or not is_sample_G.any():
        raise ValueError(f"samples and references must both hold n-grams of n={n}, one of them is too short")
    num_grams = int(gram_G.max()) + 1
    q = np.bincount(gram_G[~is_sample_G], minlength=num_grams)
    q = q / q.sum()
    gram_S, owner_S = gram_G[is_sample_G], owner_G[is_sample_G]

    def divergence(chosen_B: np.ndarray) -> float:
        times_B = np.bincount(chosen_B, minlength=len(samples))
        p = np.bincount(gram_S, weights=times_B[owner_S], minlength=num_grams)
        p = p / p.sum()
        between = _entropy_bits((p + q) / 2) - (_entropy_bits(p) + _entropy_bits(q)) / 2
        return min(max(0.0, between), 1.0)  # not past them by rounding

    indices_B = np.arange(len(samples))
    result = {"divergence": divergence(indices_B)}
    if num_resamples:
        low, high = bootstrap_interval(indices_B, divergence, num_resamples, seed=seed, centred=True)
        result["interval"] = [max(low, 0.0), min(high, 1.0)]
    return result


def ngram_floor(references: Sequence[Sequence], n: int) -> float:
    """`ngram_divergence` between two disjoint halves of the reference, every second text: what chance alone gives.

    The halves are half as large, so it lies above the floor of the whole set.
    """
    return ngram_divergence(references[::2], references[1::2], n)["divergence"]


def text_features(sequences: Sequence[Sequence], num_buckets: int = 64) -> np.ndarray:
    """(B, F) float64, F = 3 * num_buckets + 3, hand-made features for `energy_distance` that need no language model.

    For n = 1, 2, 3 the square roots of the frequencies of n-grams hashed into `num_buckets` (so that each n has unit
    length, and the distance is Hellinger's but for a factor); the share of kinds among tokens; rep-4; log of the length
    over 10. A text's features do not depend on the others.
    """
    symbols, symbol_S, owner_S = _flatten(sequences)
    B, lengths_B = len(sequences), np.bincount(owner_S, minlength=len(sequences))
    hashed = np.array([zlib.crc32(str(symbol).encode()) for symbol in symbols.tolist()], dtype=np.uint64)
    columns, state_G = [], np.zeros(len(symbol_S), dtype=np.uint64)
    for n in (1, 2, 3):
        last_G = hashed[symbol_S[n - 1 :]]
        state_G = (state_G[: len(last_G)] ^ last_G) * np.uint64(0x9E3779B97F4A7C15)  # wraps: a multiplicative hash
        state_G ^= state_G >> np.uint64(32)
        whole_G = owner_S[: len(state_G)] == owner_S[n - 1 :]
        bucket_G = (state_G[whole_G] % np.uint64(num_buckets)).astype(np.int64)
        counts = np.bincount(owner_S[: len(state_G)][whole_G] * num_buckets + bucket_G, minlength=B * num_buckets)
        counts_BH = counts.reshape(B, num_buckets)
        columns.append(np.sqrt(counts_BH / np.maximum(counts_BH.sum(-1, keepdims=True), 1)))
    kinds_B = 1 - repetition_rate(sequences, 1)
    rates_B3 = np.stack((kinds_B, repetition_rate(sequences, 4), np.log1p(lengths_B) / 10), axis=1)
    return np.concatenate((*columns, rates_B3), axis=1)


def energy_distance(
    x_BF: np.ndarray, y_RF: np.ndarray, num_permutations: int = 199, num_resamples: int = 0, seed: int = 0
) -> dict[str, float | list[float]]:
    """Energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'| of two sets of features, in units of the features.

    Source: Szekely & Rizzo, J. Stat. Plan. Inference 143 (2013). 0 for equal laws and else positive; this is the
    U-statistic, without bias, so it is negative half the time when the laws are equal. Memory grows as (B + R)^2.

    Returns:
        `distance`; `p_value` of a permutation test of equal laws (None for `num_permutations=0`); with `num_resamples`,
        `interval`: 95% percentile bootstrap over samples. Pairs of a sample with itself are left out there too, or
        resampling would add a bias.
    Raises:
        ValueError: fewer than two samples or references.
    """
    N, M = len(x_BF), len(y_RF)
    if min(N, M) < 2:
        raise ValueError(f"x_BF and y_RF must have two rows at least, got {N} and {M}")
    pooled = torch.from_numpy(np.concatenate((x_BF, y_RF)).astype(np.float64))
    # not by matrix products, which leave 1e-8 between equal rows
    d_TT = torch.cdist(pooled, pooled, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    total, per_row_T = d_TT.sum(), d_TT.sum(1)

    def distance(is_x_PT: np.ndarray) -> np.ndarray:
        xx = np.einsum("pt,pt->p", is_x_PT @ d_TT, is_x_PT)
        xy = is_x_PT @ per_row_T - xx
        return 2 * xy / (N * M) - xx / (N * (N - 1)) - (total - xx - 2 * xy) / (M * (M - 1))

    result = {"distance": float(distance((np.arange(N + M) < N)[None].astype(float))[0]), "p_value": None}
    if num_permutations:
        rng = np.random.default_rng(seed)
        order_PT = rng.permuted(np.tile(np.arange(N + M), (num_permutations, 1)), axis=1)
        as_extreme = distance((order_PT < N).astype(float)) >= result["distance"] - 1e-12
        result["p_value"] = (1 + int(as_extreme.sum())) / (1 + num_permutations)
    if num_resamples:
        yy = d_TT[N:, N:].sum() / (M * (M - 1))

        def resampled(chosen_B: np.ndarray) -> float:
            times_B = np.bincount(chosen_B, minlength=N).astype(float)
            pairs = max(N * N - (times_B**2).sum(), 1)  # 0 where one sample was drawn N times: no spread
            return 2 * (times_B @ d_TT[:N, N:]).mean() / N - times_B @ d_TT[:N, :N] @ times_B / pairs - yy

        result["interval"] = list(bootstrap_interval(np.arange(N), resampled, num_resamples, seed=seed))
    return result


def split(texts: Iterable[str], units: str) -> list[Sequence[str]]:
    """Texts as sequences of "characters" or of "words", split at white space. Raises ValueError for other units."""
    if units not in ("characters", "words"):
        raise ValueError(f"units must be characters or words, got {units!r}")
    return [text.split() if units == "words" else text for text in _texts(texts)]


def _texts(texts: Iterable[str]) -> Iterable[str]:
    if isinstance(texts, str):  # whose characters would be taken for texts
        raise ValueError(f"texts must be a list of texts, got the text {texts[:20]!r}")
    return texts


def repetition_rate(sequences: Sequence[Sequence], n: int = 4) -> np.ndarray:
    """(B,) rep-n: share of the n-grams of a sequence that occurred before in it; 0 for one shorter than n.

    Source: Welleck et al., arXiv 1908.04319 (1 - distinct / all). Real text has some: compare with the data's.
    """
    gram_G, owner_G = ngrams(sequences, n)
    B = len(sequences)
    distinct = np.unique(owner_G * (gram_G.max(initial=0) + 1) + gram_G, return_index=True)[1]
    counts_B = np.bincount(owner_G, minlength=B)
    return 1 - np.bincount(owner_G[distinct], minlength=B) / np.maximum(counts_B, 1) - (counts_B == 0)


def words_of(text: str) -> list[str]:
    """Runs of letters, with apostrophes inside, in small letters: "Don't stop!" is don't, stop. An accent is a part of
    its letter, whether or not it is a character of its own.
    """
    return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*", unicodedata.normalize("NFC", text.lower()))


def word_list(texts: Iterable[str]) -> set[str]:
    """The words of reference texts; the first and last of each may be cut and are left out."""
    return {word for text in _texts(texts) for word in words_of(text)[1:-1]}


def real_word_share(texts: Sequence[str], words: set[str]) -> np.ndarray:
    """(B,) share of the words of each text that are in `words`.

    The first and the last of a text may be cut and do not count; a text without other words has share 0.
    """
    whole = [words_of(text)[1:-1] for text in _texts(texts)]
    return np.array([sum(word in words for word in own) / max(len(own), 1) for own in whole])


# ---- how sure


def bootstrap_interval(
    values_B: np.ndarray | torch.Tensor,
    statistic: Callable[[np.ndarray], float] | None = None,
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    centred: bool = False,
) -> tuple[float, float]:
    """Percentile bootstrap interval (Efron 1979): `statistic` of the values of samples drawn with replacement.

    Args:
        values_B: one entry for each sample. statistic: of resampled values; default: their mean. For a statistic of
            whole samples give `np.arange(B)`, and it gets the indices drawn.
        centred: move the interval by minus the bootstrap's own bias. Resampling repeats samples, which makes a
            divergence from counts larger: without this its interval need not hold the value itself.
    Raises:
        ValueError: no values, num_resamples < 1, or a level outside (0, 1).
    """
    values_B = np.asarray(values_B.cpu() if isinstance(values_B, torch.Tensor) else values_B)
    if not len(values_B) or num_resamples < 1 or not 0 < level < 1:
        raise ValueError(
            f"values_B must hold something, num_resamples be at least 1 and level lie in (0, 1), got "
            f"{len(values_B)} values, num_resamples={num_resamples}, level={level}"
        )
    statistic = statistic or (lambda values: values.mean())
    rng = np.random.default_rng(seed)
    found = [statistic(values_B[rng.integers(len(values_B), size=len(values_B))]) for _ in range(num_resamples)]
    bias = float(np.mean(found)) - statistic(values_B) if centred else 0.0
    low, high = np.quantile(found, ((1 - level) / 2, (1 + level) / 2)) - bias
    return float(low), float(high)


def ratio(values, weights=None) -> dict:
    """Sum of values over sum of weights (None: their number) and its standard error over texts: of bits per character
    a short text then weighs little."""
    values = np.asarray(values, dtype=np.float64)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=np.float64)
    found = values.sum() / weights.sum()
    spread = (values - found * weights).std(ddof=1) / np.sqrt(len(values)) / abs(weights.mean())
    return {"mean": float(found), "stderr": float(spread)}


def summary(values: torch.Tensor) -> dict:
    return {"mean": float(values.mean()), "stderr": float(values.std()) / math.sqrt(len(values))}


def _flatten(sequences: Sequence[Sequence]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct symbols in order; the symbols of all sequences in a row, as indices (S,); and whose they are (S,)."""
    lengths = [len(sequence) for sequence in sequences]
    if not sum(lengths):
        raise ValueError(f"sequences must not all be empty, got {len(lengths)} without content")
    parts = [np.asarray(list(s) if isinstance(s, str) else s) for s in sequences if len(s)]
    symbols, symbol_S = np.unique(np.concatenate(parts), return_inverse=True)
    return symbols, symbol_S.astype(np.int64), np.repeat(np.arange(len(lengths)), lengths)


def _entropy_bits(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum())
