"""The same seed gives the same text as it did when tests/fixtures/same-text.json was written.

python tests/test_same_text.py    writes it anew: only where texts are meant to change, which a commit then says
"""

import json
from pathlib import Path

import pytest
import torch

from support.toy import MASK, make_toy

FIXTURE = Path(__file__).parent / "fixtures" / "same-text.json"
FREE = {"batch_size": 6, "num_steps": 5, "energy_window": (1.0, 0.0), "num_candidates": 3}
PROMPTS = torch.tensor([[0, 1, MASK, 2, MASK, MASK, MASK, 1], [2, 0, 0, 1, MASK, MASK, 1, 2]])
PADDED = {"input_ids": PROMPTS, "attention_mask": torch.tensor([[1] * 8, [0, 0] + [1] * 6]), "max_new_tokens": 2}
CASES = {
    "mdlm": ("none", "x0", FREE),
    "window": ("nce", "x0", FREE | {"energy_window": (0.8, 0.3)}),
    "step energy": ("nce", "xs", FREE),
    "ar": ("ar", "x0", FREE | {"energy_temperature": 2.0}),
    "coar, shared": ("coar", "x0", FREE | {"shared_completion": True}),
    "padded": ("coar", "x0", PADDED | {"num_steps": 4, "num_return_sequences": 2, "energy_window": (1.0, 0.0)}),
    "proposal": ("nce", "x0", FREE | {"temperature": 0.7, "top_k": 2, "top_p": 0.9}),
    "greedy": ("ar", "x0", FREE | {"do_sample": False, "seed": None}),
    "end": ("ar", "x0", FREE | {"eos_token_id": 1, "pad_token_id": 0}),
    "corrector": ("ar", "x0", FREE | {"corrector_steps": 6, "corrector_size": 2}),
    "pseudo-Gibbs": ("nce", "xs", FREE | {"corrector_steps": 6, "corrector_size": 3, "corrector_candidates": 4}),
}


def written(name: str) -> dict:
    energy_type, target, options = CASES[name]
    model = make_toy(energy_type, target, length=10)
    output = model.generate(return_dict_in_generate=True, **{"seed": 7} | options)
    return {
        "sequences": output.sequences.tolist(),
        "nfe": output.nfe.tolist(),
        "energy_nfe": output.energy_nfe.tolist(),
    }


@pytest.mark.parametrize("name", CASES)
def test_the_same_text_as_before(name):
    assert written(name) == json.loads(FIXTURE.read_text())[name]


if __name__ == "__main__":
    FIXTURE.write_text(json.dumps({name: written(name) for name in CASES}) + "\n")
