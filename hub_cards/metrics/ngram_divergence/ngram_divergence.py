"""`evaluate` module: Jensen-Shannon divergence of n-gram frequencies. The computation is in metrics.py."""

import datasets
import evaluate

from .metrics import ngram_divergence, ngram_floor, split

DESCRIPTION = "Jensen-Shannon divergence, in bits, between the n-gram frequencies of texts and of reference texts."
USAGE = """
Args:
    predictions: texts. references: as many real texts; the pairs mean nothing.
    max_n: n-grams of n = 1 ... max_n. units: "characters" or "words" (split at white space).
    num_resamples: of the bootstrap; 0: no intervals.
Returns:
    js_1 ... js_<max_n>: bits, in [0, 1]. floor_<n>: the same between two disjoint halves of the references.
    interval_<n>: 95% bootstrap interval over predictions.
"""


class NgramDivergence(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=USAGE,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
            reference_urls=["https://doi.org/10.1109/18.61115"],
        )

    def _compute(self, predictions, references, max_n=4, units="characters", num_resamples=200):
        samples, real = split(predictions, units), split(references, units)
        results = {}
        for n in range(1, max_n + 1):
            found = ngram_divergence(samples, real, n, num_resamples)
            results |= {f"js_{n}": found["divergence"], f"floor_{n}": ngram_floor(real, n)}
            if num_resamples:
                results[f"interval_{n}"] = found["interval"]
        return results
