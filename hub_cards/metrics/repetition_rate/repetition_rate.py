"""`evaluate` module: share of repeated n-grams. The computation is in metrics.py."""

import datasets
import evaluate

from .metrics import bootstrap_interval, repetition_rate, split

DESCRIPTION = "rep-n: the share of the n-grams of a text that occurred before in the same text."
USAGE = """
Args:
    predictions: texts. n: length of the n-grams. units: "characters" or "words" (split at white space).
Returns:
    repetition_rate: in [0, 1), mean over texts. interval: its 95% bootstrap interval over texts. per_text: of each.
"""


class RepetitionRate(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=USAGE,
            features=datasets.Features({"predictions": datasets.Value("string")}),
            reference_urls=["https://arxiv.org/abs/1908.04319"],
        )

    def _compute(self, predictions, n=4, units="characters"):
        values = repetition_rate(split(predictions, units), n)
        return {
            "repetition_rate": float(values.mean()),
            "interval": list(bootstrap_interval(values)),
            "per_text": values.tolist(),
        }
