"""A judge of texts that had no part in them: another causal model, and the words that its training text has.

Shapes: B texts, L length.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from modeling_edlm.energies import causal_log_prob

from .checkpoint import weights_hash
from .metrics import LN2, real_word_share, token_entropy

WORDS = "words.txt"  # beside the judge's weights


@dataclass
class Judge:
    scorer: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    words: set[str]

    @classmethod
    def load(cls, source: str, tokenizer: PreTrainedTokenizerBase | None = None) -> "Judge":
        """From a folder or repo, with `:subfolder` where needed. ValueError if its `words.txt` is not there."""
        folder, _, subfolder = source.partition(":")
        path = cached_file(folder, WORDS, subfolder=subfolder, _raise_exceptions_for_missing_entries=False)
        if path is None:
            raise ValueError(f"judge must have a list of words, {WORDS}, beside its weights, got {source!r}")
        scorer = AutoModelForCausalLM.from_pretrained(folder, subfolder=subfolder, dtype=torch.float32).eval()
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder)
        return cls(scorer, tokenizer, set(Path(path).read_text(encoding="utf-8").split()))

    def weights_hash(self, energies: list[torch.nn.Module], source: str) -> str:
        """SHA-256 of its weights; ValueError, which names its source, where these are those of an energy."""
        if (found := weights_hash(self.scorer)) in map(weights_hash, energies):
            raise ValueError(f"judge={source!r} is the energy itself, which may not judge its own texts")
        return found

    @torch.no_grad()
    def read(self, x_BL: torch.Tensor, where_BL: torch.Tensor | None = None) -> dict[str, np.ndarray]:
        """Of each text up to its first EOS, that included: bits, and characters of the positions that count.

        Args:
            x_BL: without masks. where_BL: bool, the positions that count; the others are only read. None: all.
        Returns:
            `bits`, `characters` and `bits_per_character` (B,) float64; `known_words` (B,) share of the words of the
            whole text that the list has, the first and the last, which may be cut, left out.
        """
        ids = self.scorer.config.bos_token_id, self.scorer.config.mask_token_id
        within_BL = before_end(x_BL, self.tokenizer.eos_token_id)
        where_BL = within_BL if where_BL is None else within_BL & where_BL
        bits_B = -causal_log_prob(self.scorer, x_BL, where_BL, *ids).double().numpy() / LN2
        texts = [self.text(x_L[where_L]) for x_L, where_L in zip(x_BL, where_BL, strict=True)]
        characters_B = np.array([len(text) for text in texts])
        whole = [self.text(x_L[within_L]) for x_L, within_L in zip(x_BL, within_BL, strict=True)]
        return {
            "bits": bits_B,
            "characters": characters_B,
            "bits_per_character": bits_B / np.maximum(characters_B, 1),
            "known_words": real_word_share(whole, self.words),
        }

    def text(self, x_L: torch.Tensor) -> str:
        return self.tokenizer.decode(x_L, skip_special_tokens=True)


def before_end(x_BL: torch.Tensor, eos_token_id: int | None) -> torch.Tensor:
    """(B, L) bool: the positions up to the first EOS, that included."""
    if eos_token_id is None:
        return torch.ones_like(x_BL, dtype=torch.bool)
    is_eos_BL = x_BL == eos_token_id
    return is_eos_BL.cumsum(-1) - is_eos_BL.long() == 0


def entropies(x_BL: torch.Tensor, eos: int | None) -> list[float]:
    """Of each text up to its end, of its own token frequencies, in nats."""
    ends_BL = before_end(x_BL, eos)
    return [float(token_entropy(x_L[where_L][None])) for x_L, where_L in zip(x_BL, ends_BL, strict=True)]


def lead(mdlm: dict, edlm: dict) -> dict:
    """Bits per character of one sampler, MDLM, minus those of another on the same seeds, and its standard error (of two
    ratios). Both are rows with the judge's mean and `per_sample` bits and characters."""
    parts = []
    for row in (mdlm, edlm):
        bits_B, characters_B = (np.array(row["per_sample"][name]) for name in ("bits", "characters"))
        parts.append((bits_B - row["judge"]["mean"] * characters_B) / characters_B.mean())
    spread = (parts[0] - parts[1]).std(ddof=1) / len(parts[0]) ** 0.5
    return {"mean": mdlm["judge"]["mean"] - edlm["judge"]["mean"], "stderr": float(spread)}
