"""`evaluate` module: share of words that are words. The computation is in metrics.py."""

import datasets
import evaluate

from .metrics import bootstrap_interval, real_word_share, word_list

DESCRIPTION = "The share of the words of a text that occur in reference texts."
USAGE = """
Args:
    predictions: texts. references: as many real texts; their words are the word list.
    words: more words, from as much text as there is; default: none.
Returns:
    real_word_share: in [0, 1], mean over texts. interval: its 95% bootstrap interval over texts. per_text: of each.
    The first and last word of a text may be cut: they are left out, of the word list too.
"""


class RealWordShare(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=USAGE,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
            reference_urls=[],
        )

    def _compute(self, predictions, references, words=()):
        values = real_word_share(predictions, word_list(references) | set(words))
        return {
            "real_word_share": float(values.mean()),
            "interval": list(bootstrap_interval(values)),
            "per_text": values.tolist(),
        }
