"""What an AR energy keeps of shared first tokens changes nothing but the tokens that it computes."""

import pytest
import torch
from test_corrector import TEXTS, law_of_moves, moves
from test_custom_generate import make_bert, make_gpt2

from modeling_edlm import EDLMModel, ForeignModel, prefix_cache
from modeling_edlm.energies import causal_log_prob
from support.toy import MASK, make_toy, p_value, revision_kernel

LENGTH = 24


@pytest.fixture(params=[(1, 1), (4, 4)])
def small(request, monkeypatch):
    """It pays from the first token on, or is kept in fours."""
    for name, value in zip(("LEAST", "WIDTH"), request.param, strict=True):
        monkeypatch.setattr(prefix_cache, name, value)
    monkeypatch.setitem(prefix_cache.PASS, "cpu", 4)


def make_model(kind: str) -> EDLMModel | ForeignModel:
    if kind == "gpt2":
        return ForeignModel(make_bert(MASK + 1, LENGTH), make_gpt2(MASK + 1, length=LENGTH), mask_token_id=MASK)
    model = make_toy(kind, length=LENGTH)
    for parameter in model.denoiser.head.linear.parameters():
        parameter.data *= 0.1
    return model


def both(model, call: str, *args, **settings) -> list:
    settings = settings | {"return_dict_in_generate": True, "seed": 0}
    return [getattr(model, call)(*args, **settings, use_cache=use_cache) for use_cache in (True, False)]


GAPS = torch.tensor([[0, 1, 2, 0, 1, 2, 2, 1] + [MASK] * 8 + [1] * 8, [1] * 20 + [MASK] * 4, [MASK] * 24, [2] * 24])
RIGHT = torch.ones_like(GAPS).index_fill(1, torch.tensor([22, 23]), 0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ar", "coar", "gpt2"])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_the_same_texts_for_fewer_tokens(small, kind, padding):
    model, rows = make_model(kind), GAPS
    mask = None if padding == "none" else RIGHT if padding == "right" else RIGHT.flip(-1)
    settings = {"num_steps": 6, "num_candidates": 3, "energy_window": (1.0, 0.0), "attention_mask": mask}
    for shared in (True, False):
        kept, plain = both(model, "generate", rows, num_return_sequences=3, shared_completion=shared, **settings)
        assert torch.equal(kept.sequences, plain.sequences) and torch.equal(kept.energy_nfe, plain.energy_nfe)
        torch.testing.assert_close(kept.energies, plain.energies, equal_nan=True, atol=1e-4, rtol=1e-4)
        assert torch.equal(plain.energy_tokens, plain.energy_nfe * LENGTH)
        assert (kept.energy_tokens <= plain.energy_tokens).all()
        assert float(kept.energy_tokens[:6].sum()) < 0.85 * float(plain.energy_tokens[:6].sum())
        assert torch.equal(kept.energy_tokens[9:], plain.energy_tokens[9:]) and not kept.energy_tokens[9:].any()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ar", "gpt2"])
@pytest.mark.parametrize("sets", ["contiguous", "random"])
def test_rounds_of_revision(small, kind, sets):
    model, texts = make_model(kind), torch.arange(4 * LENGTH).view(4, LENGTH) * 7 % 3
    may_change = torch.ones_like(texts, dtype=torch.bool)
    may_change[1, :12] = False
    rounds = {"corrector_steps": 12, "corrector_size": 4, "num_candidates": 3, "corrector_sets": sets}
    kept, plain = both(model, "revise", texts, may_change, **rounds)
    assert torch.equal(kept.sequences, plain.sequences) and torch.equal(kept.energy_nfe, plain.energy_nfe)
    torch.testing.assert_close(kept.energies, plain.energies, atol=1e-4, rtol=1e-4)
    assert not torch.equal(plain.sequences, texts)
    if sets == "contiguous":
        assert float(kept.energy_tokens.sum()) < 0.85 * float(plain.energy_tokens.sum())
        assert float(kept.energy_tokens[1]) < 0.6 * float(plain.energy_tokens[1])


@torch.no_grad()
def test_blocks_keep_what_is_finished(small):
    model = make_model("ar")
    settings = {"num_steps": 12, "num_candidates": 3, "energy_window": (1.0, 0.0), "block_length": 4}
    kept, plain = both(model, "generate", batch_size=4, **settings)
    assert torch.equal(kept.sequences, plain.sequences)
    assert float(kept.energy_tokens.sum()) < 0.75 * float(plain.energy_tokens.sum())


@torch.no_grad()
@pytest.mark.parametrize(("k", "size"), [(2, 1), (3, 2), (8, 2), (2, 3)])
def test_law_of_a_contiguous_round(small, k, size):
    """Its kernel is enumerated over the three sets of neighbours, and leaves the law of the AR model as it is."""
    model, rows = make_toy("ar"), TEXTS
    sets = [tuple(sorted((start + i) % 3 for i in range(size))) for start in range(3)]
    kernel = sum(revision_kernel(model, size, k, now, rows) for now in sets) / 3
    log_p = causal_log_prob(model.energy_model, torch.tensor(rows), None, model.energy_model.config.bos_token_id, MASK)
    law = log_p.double().softmax(0)
    assert float((law @ kernel - law).abs().max()) < 1e-6
    settings = {"corrector_size": size, "corrector_candidates": k, "corrector_sets": "contiguous"}
    assert p_value(moves(model, **settings), law_of_moves(kernel)) > 1e-4


@torch.no_grad()
def test_rows_beyond_the_memory_are_right(small, monkeypatch):
    """Where two rows fit, the others are scored as without it."""
    model = make_model("ar")
    row_bytes = 2 * 1 * 16 * LENGTH * 4
    monkeypatch.setattr(prefix_cache, "BYTES", 2 * row_bytes)
    kept, plain = both(model, "generate", GAPS, num_steps=6, num_candidates=3, energy_window=(1.0, 0.0))
    assert torch.equal(kept.sequences, plain.sequences)
    assert (kept.energy_tokens < plain.energy_tokens).tolist() == [True, True, False, False]


def test_models_that_keep_something_else():
    """A sliding window forgets tokens, a recurrent state cannot be cut: neither is kept."""
    from transformers import MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16}
    assert prefix_cache.cache_argument(MambaForCausalLM(MambaConfig(**sizes))) is None
    assert prefix_cache.cache_argument(MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=4))) is None
    whole = MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=None))
    assert prefix_cache.cache_argument(whole) in ("cache", "past_key_values")
