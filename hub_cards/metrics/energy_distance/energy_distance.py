"""`evaluate` module: energy distance of hand-made features of texts. The computation is in metrics.py."""

import datasets
import evaluate

from .metrics import energy_distance, split, text_features

DESCRIPTION = "Energy distance between texts and reference texts, on hand-made features that need no language model."
USAGE = """
Args:
    predictions: texts, two at least. references: as many real texts; the pairs mean nothing.
    units: "characters" or "words" (split at white space). num_buckets: n-grams of each n are hashed into so many.
    num_permutations: of the test. num_resamples: of the bootstrap. seed: of both.
Returns:
    energy_distance: without bias, 0 in the mean for equal laws. p_value: of the permutation test of equal laws.
    interval: 95% bootstrap interval over predictions.
"""


class EnergyDistance(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=USAGE,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
            reference_urls=["https://doi.org/10.1016/j.jspi.2013.03.018"],
        )

    def _compute(
        self,
        predictions,
        references,
        units="characters",
        num_buckets=64,
        num_permutations=199,
        num_resamples=200,
        seed=0,
    ):
        features = [text_features(split(texts, units), num_buckets) for texts in (predictions, references)]
        found = energy_distance(*features, num_permutations, num_resamples, seed)
        return {"energy_distance": found.pop("distance")} | found
