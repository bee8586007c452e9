"""`evaluate` module: entropy of a text's own token frequencies. The computation is in metrics.py."""

import datasets
import evaluate
import numpy as np
import torch

from .metrics import bootstrap_interval, split, token_entropy

DESCRIPTION = "Entropy, in nats, of each text's own frequencies of characters or words."
USAGE = """
Args:
    predictions: texts. units: "characters" or "words" (split at white space).
Returns:
    token_entropy: nats, mean over texts. interval: its 95% bootstrap interval over texts. per_text: of each text.
"""


class TokenEntropy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=USAGE,
            features=datasets.Features({"predictions": datasets.Value("string")}),
            reference_urls=["https://arxiv.org/abs/2409.02908"],
        )

    def _compute(self, predictions, units="characters"):
        ids = [np.unique(list(own), return_inverse=True)[1] for own in split(predictions, units)]
        values = torch.cat([token_entropy(torch.from_numpy(own)[None].long()) for own in ids])
        return {
            "token_entropy": float(values.mean()),
            "interval": list(bootstrap_interval(values)),
            "per_text": values.tolist(),
        }
