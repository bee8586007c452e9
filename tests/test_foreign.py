"""ForeignModel: bounds and revision of other people's masked models, shifted logits, padded vocabularies.

LLaDA and Dream have code of their own on the Hub. Here are small models with the interface that it has.
"""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers
from test_custom_generate import Exact, make_bert, make_gpt2, randomize, table_energy
from torch import nn
from transformers import (
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.modeling_outputs import MaskedLMOutput

from modeling_edlm import ForeignModel
from support.toy import MASK, chain_law, completions, make_toy, p_value, path_bounds, revision_kernel

FREE = (MASK,) * 3
TEXTS = torch.tensor(completions(FREE, (0, 1, 2)))
FAST = {"denoiser_batch_size": 512, "energy_batch_size": 8192, "energy_window": (1.0, 0.0), "seed": 1}


class Shifted(BertForMaskedLM):
    """Its logits at a position are those of the next token, as in a model that was autoregressive once."""

    def forward(self, *args, **kwargs):
        return SimpleNamespace(logits=super().forward(*args, **kwargs).logits.roll(-1, dims=1))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["none", "ar", "coar", "step function"])
def test_the_bound_of_a_bert(kind):
    """Above the exact NLL of the sampler for every text; with many inner samples, its path bound."""
    bert, gpt2 = make_bert(std=0.4), make_gpt2()
    arguments = {"none": {}, "step function": {"energy": table_energy, "energy_target": "xs"}}
    arguments = arguments.get(kind, {"energy": gpt2, "energy_type": kind})
    exact = Exact(bert, gpt2, kind)
    if kind == "step function":
        exact = Exact(bert, function=table_energy, energy_target="xs")
    texts, k = [tuple(x) for x in TEXTS.tolist()], 1 if kind == "none" else 3
    law, path = chain_law(exact, FREE, 2, k), path_bounds(exact, texts, 2, k)
    assert (path >= torch.tensor([-math.log(law[x]) for x in texts]) - 1e-6).all()
    model = ForeignModel(bert, **arguments)
    output = model.likelihood(TEXTS, num_steps=2, num_candidates=k, num_times=256, num_samples=32, **FAST)
    difference = output.nll - path
    assert (difference / (output.stderr + 1e-5) > -4.5).all()
    assert abs(float(difference.mean())) < 4 * float(output.stderr.square().sum().sqrt()) / len(TEXTS) + 0.05
    assert (
        p_value(model.generate(batch_size=20_000, num_steps=2, num_candidates=k, energy_window=(1, 0), seed=0), law)
        > 1e-4
    )


@torch.no_grad()
@pytest.mark.parametrize("target", ["x0", "xs"])
def test_a_function_is_given_what_the_denoiser_says(target):
    """`energy()` itself finds log mu of the tokens that a candidate adds to its state."""
    seen = []

    def function(x, xt, t, attention_mask, log_mu):
        seen.append(log_mu)
        return table_energy(x, xt, t, attention_mask, log_mu)

    model = ForeignModel(make_bert(std=0.4), energy=function, energy_target=target)
    xt = torch.tensor([[MASK, 1, MASK]]).expand(2, -1)
    x = torch.tensor([[0, 1, 2], [2, 1, 0]] if target == "x0" else [[0, 1, MASK], [MASK, 1, 0]])
    t = torch.tensor(0.5)
    energy = model.energy(x, xt, t)
    log_p_NLV = model.log_p_x0(xt)
    added = [[(n, i, int(x[n, i])) for i in (0, 2) if x[n, i] != MASK] for n in range(2)]
    expected = torch.stack([sum(log_p_NLV[place] for place in places) for places in added])
    torch.testing.assert_close(seen[0], expected)
    torch.testing.assert_close(energy, table_energy(x, xt, t, None, expected))


@torch.no_grad()
@pytest.mark.parametrize(("energy_type", "target"), [("ar", "x0"), ("nce", "xs")])
def test_parts_of_an_edlm_have_its_bound(energy_type, target):
    toy = make_toy(energy_type, target)
    settings = {"num_steps": 3, "num_candidates": 4, "num_times": 16, "num_samples": 4, **FAST}
    expected = toy.likelihood(TEXTS, **settings)
    output = ForeignModel(toy.denoiser, toy.energy_model).likelihood(TEXTS, **settings)
    torch.testing.assert_close(output.nll, expected.nll)
    torch.testing.assert_close(output.gain, expected.gain)


def test_revision_leaves_the_law_of_the_causal_model():
    bert, gpt2 = make_bert(std=0.4), make_gpt2()
    exact, texts = Exact(bert, gpt2), [tuple(x) for x in TEXTS.tolist()]
    kernel = revision_kernel(exact, 2, 3, (0, 1, 2), texts)
    log_p = -exact.energy(TEXTS, TEXTS, None).double()  # nothing is masked: log p_AR alone
    torch.testing.assert_close(log_p.softmax(0) @ kernel, log_p.softmax(0), atol=1e-6, rtol=0)
    start = torch.tensor([[2, 0, 1]]).repeat(20_000, 1)
    revised = ForeignModel(bert, gpt2).revise(start, num_candidates=3, corrector_steps=1, corrector_size=2, seed=0)
    assert p_value(revised, dict(zip(texts, kernel[texts.index((2, 0, 1))].tolist(), strict=True))) > 1e-4


def test_shifted_logits_and_padded_vocabularies():
    """A model whose logits stand one place to the left gives, with logits_shift=1, what the straight one gives."""
    bert, shifted = make_bert(12, 10), make_bert(12, 10, cls=Shifted)
    prompt = torch.tensor([[3] + [11] * 9])
    mask = torch.tensor([[0] * 3 + [1] * 7, [1] * 7 + [0] * 3])
    padded = torch.tensor([[0, 0, 0, 3] + [11] * 6, [3] + [11] * 6 + [0] * 3])
    for ids, attention_mask in ((prompt, None), (padded, mask)):
        arguments = {"attention_mask": attention_mask, "num_steps": 4, "num_return_sequences": 50, "seed": 0}
        expected = ForeignModel(bert).generate(ids, **arguments)
        assert torch.equal(ForeignModel(shifted, logits_shift=1).generate(ids, **arguments), expected)
        assert not torch.equal(ForeignModel(shifted).generate(ids, **arguments), expected)
    assert (expected >= 7).any()
    few = ForeignModel(bert, num_tokens=7)
    assert (few.generate(prompt, num_return_sequences=50, num_steps=4, seed=0) < 7).all()
    assert (few.log_p_x0(prompt).exp().sum(-1) - 1).abs().max() < 1e-5
    assert torch.equal(
        few.likelihood(torch.tensor([[3, 8], [3, 4]]), num_times=8, num_steps=4).nll.isinf(),
        torch.tensor([True, False]),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits_shift": 2}, "logits_shift must be 0 or 1, got 2"),
        ({"num_tokens": 0}, "num_tokens must lie in .1, 12., got 0"),
        ({"num_tokens": 13}, "num_tokens .* 13"),
        ({"mask_token_id": 12}, "mask_token_id must lie in .0, 12., got 12"),
        ({"energy_type": "coar"}, "energy_type is ar or coar and for a causal"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ForeignModel(make_bert(12, 8), **change)


# ---- the classes of the library

SIZES = {"vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
SIZES |= {"max_position_embeddings": 16}
DISTILBERT = {"vocab_size": 12, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "max_position_embeddings": 16}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
MODELS = {  # a class, its sizes, and the longest text that it takes
    "Bert": (SIZES, 16),
    "ModernBert": (SIZES | TOKENS, 16),
    "Roberta": (SIZES, 14),
    "XLMRoberta": (SIZES, 14),
    "MPNet": (SIZES, 14),
    "DistilBert": (DISTILBERT, 16),
    "Electra": (SIZES | {"embedding_size": 8}, 16),
    "FNet": (SIZES, 16),  # its forward has no attention mask
    # its embedding of a token is made from the tokens beside it, padding or not
    "MobileBert": (SIZES | {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16}, 16),
}
QWEN = {"num_key_value_heads": 2}
EVERY_STEP = {"num_steps": 3, "num_candidates": 3, "energy_window": (1.0, 0.0), "seed": 0}


def make_model(name):
    config = getattr(transformers, f"{name}Config")(**MODELS[name][0])
    return randomize(getattr(transformers, f"{name}ForMaskedLM")(config), 0.3)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_models_of_the_library(name):
    bert, longest = make_model(name), MODELS[name][1]
    model = ForeignModel(bert, make_gpt2(12, length=16), mask_token_id=11)
    texts = model.generate(batch_size=2, **EVERY_STEP)
    assert texts.shape == (2, longest) and (texts != 11).all()
    assert model.likelihood(texts, num_times=4, **EVERY_STEP).nll.isfinite().all()
    revised = model.revise(texts, texts > 4, corrector_steps=3, num_candidates=3, seed=0)
    assert torch.equal(revised[texts <= 4], texts[texts <= 4])
    revise = partial(model.revise, corrector_steps=1, num_candidates=2)
    for call, token in ((model.likelihood, 3), (revise, 3), (model.log_p_x0, 11)):
        with pytest.raises(ValueError, match=f"max_position_embeddings={longest}"):
            call(torch.full((1, 17), token))
    # a pass made by hand, and the same text beside a longer one
    text = torch.tensor([[3, 11, 5, 11]])
    logits_LV = bert(input_ids=text).logits[0].float()
    logits_LV[:, 11] = float("-inf")
    expected_LV = torch.where(text[0, :, None] == 11, logits_LV.log_softmax(-1), torch.zeros(4, 12))
    padded = torch.tensor([[0, 0, 3, 11, 5, 11], [3, 4, 11, 11, 5, 6], [3, 11, 5, 11, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [1, 1, 1, 1, 0, 0]])
    log_p = model.log_p_x0(padded.int(), attention_mask=mask)
    for row in (log_p[0, 2:], log_p[2, :4]):
        torch.testing.assert_close(row[[1, 3]], expected_LV[[1, 3]])
    alone = model.generate(text, first_row=2, **EVERY_STEP)
    batch = model.generate(padded.int(), attention_mask=mask, **EVERY_STEP)
    assert torch.equal(batch[2, :4], alone[0])


# ---- LLaDA and Dream


class LLaDAConfig(PreTrainedConfig):
    """Its longest text is called max_sequence_length, and 115 rows of its vocabulary belong to no token."""

    model_type = "llada"

    def __init__(self, d_model=4, vocab_size=126464, mask_token_id=126336, max_sequence_length=16, **kwargs):
        super().__init__(**kwargs)
        self.d_model, self.vocab_size, self.mask_token_id = d_model, vocab_size, mask_token_id
        self.max_sequence_length = max_sequence_length


class LLaDA(PreTrainedModel):
    """It takes an attention mask, and its attention does not look at it."""

    config_class = LLaDAConfig

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.wpe = nn.Embedding(config.max_sequence_length, config.d_model)
        self.ff_out = nn.Linear(config.d_model, config.vocab_size + 64, bias=False)  # an embedding_size beyond it
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None, attention_bias=None, **kwargs):
        x_NLD = self.wte(input_ids) + self.wpe.weight[: input_ids.shape[1]]
        x_NLD = nn.functional.scaled_dot_product_attention(x_NLD, x_NLD, x_NLD)
        return MaskedLMOutput(logits=self.ff_out(x_NLD))


class DreamConfig(PreTrainedConfig):
    model_type = "Dream"

    def __init__(self, hidden_size=4, vocab_size=152064, mask_token_id=151666, max_position_embeddings=16, **kwargs):
        super().__init__(**kwargs)
        self.hidden_size, self.vocab_size, self.mask_token_id = hidden_size, vocab_size, mask_token_id
        self.max_position_embeddings = max_position_embeddings


class Dream(PreTrainedModel):
    """Its attention mask is "full" or bool (N, 1, L, L), and the logits at i are those of the token at i + 1."""

    config_class = DreamConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, num_logits_to_keep=0, **kwargs):
        position_ids = torch.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
        x_NHLD = (self.embed_tokens(input_ids) + self.positions(position_ids))[:, None]
        mask = attention_mask if isinstance(attention_mask, torch.Tensor) else None  # int64 is an error in torch
        x_NHLD = nn.functional.scaled_dot_product_attention(x_NHLD, x_NHLD, x_NHLD, attn_mask=mask)
        return MaskedLMOutput(logits=self.lm_head(x_NHLD[:, 0])[:, -num_logits_to_keep:])


def by_hand(logits_NLV, mask_token_id, num_tokens):
    logits_NLV = logits_NLV.float().clone()
    logits_NLV[..., num_tokens:] = float("-inf")
    logits_NLV[..., mask_token_id] = float("-inf")
    return logits_NLV.log_softmax(-1)


def all_of_it(model, prompt, mask_token_id, num_tokens):
    """Generation, revision and the bound hold to the tokens that there are."""
    settings = EVERY_STEP | {"num_steps": 2, "max_new_tokens": 3}
    out = model.generate(prompt, return_dict_in_generate=True, **settings)
    texts = out.sequences
    assert torch.equal(texts[:, : prompt.shape[1]], prompt)
    assert (texts < num_tokens).all() and (texts != mask_token_id).all()
    assert out.energies.isfinite().any() and (out.energy_nfe > 1).all()
    revised = model.revise(texts, corrector_steps=2, corrector_size=2, num_candidates=2, seed=0)
    assert (revised < num_tokens).all() and (revised != mask_token_id).all()
    bound = model.likelihood(texts, num_times=2, num_steps=2, num_candidates=2, energy_window=(1.0, 0.0))
    assert bound.nll.isfinite().all()
    texts[:, -1] = num_tokens
    assert model.likelihood(texts, num_times=2, num_steps=2, num_candidates=1).nll.isinf().all()


def text_energy(x, xt, t, attention_mask, log_mu):
    return (x % 7).float().mean(-1)


@torch.no_grad()
def test_llada():
    llada, mask, num_tokens = randomize(LLaDA(LLaDAConfig()), 1.0), 126336, 126349
    with pytest.raises(ValueError, match="max_position_embeddings must be given: the configuration of LLaDA has none"):
        ForeignModel(llada)
    model = ForeignModel(llada, text_energy, max_position_embeddings=16, num_tokens=num_tokens)
    short = torch.tensor([[5, mask, 126000, mask]])
    batch = torch.tensor([[5, mask, 126000, mask, 0, 0], [5, mask, mask, 9, 8, mask]])
    attention_mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    log_p = model.log_p_x0(batch, attention_mask=attention_mask)
    expected = (
        by_hand(llada(short).logits[..., :126464], mask, num_tokens),
        by_hand(llada(batch[1:]).logits[..., :126464], mask, num_tokens),
    )
    torch.testing.assert_close(log_p[0, [1, 3]], expected[0][0, [1, 3]])
    torch.testing.assert_close(log_p[1, [1, 2, 5]], expected[1][0, [1, 2, 5]])
    settings = {"num_steps": 1, "do_sample": False}
    greedy = model.generate(batch, attention_mask=attention_mask, **settings)
    assert greedy[0, [1, 3]].tolist() == expected[0][0, [1, 3]].argmax(-1).tolist()
    assert torch.equal(greedy[:1, :4], model.generate(short, **settings))
    all_of_it(model, torch.tensor([[5, 126000]]), mask, num_tokens)


@torch.no_grad()
def test_dream():
    """Against a pass in the way of its own sampler: a mask of pairs, positions of the text, logits moved by one."""
    dream, mask, num_tokens = randomize(Dream(DreamConfig()), 1.0), 151666, 151667
    qwen = randomize(Qwen2ForCausalLM(Qwen2Config(**SIZES | QWEN | {"vocab_size": 151936}, bos_token_id=3)), 0.1)
    with pytest.raises(ValueError, match="energy has vocab_size 151936, the denoiser has 152064"):
        ForeignModel(dream, qwen, logits_shift=1)
    model = ForeignModel(dream, qwen, logits_shift=1, num_tokens=num_tokens)
    batch = torch.tensor([[0, 0, 5, mask, 150000, mask], [5, mask, mask, 9, 8, mask]])
    attention_mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    is_text = attention_mask.bool()
    pairs = (is_text[:, None, None, :] & is_text[:, None, :, None]) | torch.eye(6, dtype=torch.bool)
    logits = dream(batch, pairs, (attention_mask.cumsum(-1) - 1).clamp(min=0)).logits
    expected = by_hand(torch.cat((logits[:, :1], logits[:, :-1]), dim=1), mask, num_tokens)
    masked = batch == mask
    log_p = model.log_p_x0(batch, attention_mask=attention_mask)
    torch.testing.assert_close(log_p[masked], expected[masked])
    greedy = model.generate(batch, attention_mask=attention_mask, num_steps=1, do_sample=False)
    assert torch.equal(greedy[masked], expected[masked].argmax(-1)) and torch.equal(greedy[~masked], batch[~masked])
    first = dream(torch.tensor([[mask, 5]]), "full").logits[:, :1]  # the first token has the first logits
    torch.testing.assert_close(model.log_p_x0(torch.tensor([[mask, 5]]))[:, 0], by_hand(first, mask, num_tokens)[:, 0])
    all_of_it(model, torch.tensor([[5, 150000]]), mask, num_tokens)


# ---- energies


def make_causal(name, **sizes):
    if name == "gpt2":
        return make_gpt2(12, length=sizes.get("max_position_embeddings", 16))
    config, cls = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[name]
    return randomize(cls(config(**SIZES | QWEN | sizes, bos_token_id=1)), 0.3)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
def test_an_energy_of_any_causal_model(name, dtype):
    """Float32 sums of the log-softmax, in float32, of whatever logits the model gives; also for int32 ids."""
    bert, causal = make_bert(12, 16), make_causal(name).to(dtype)
    model = ForeignModel(bert, causal)
    x, xt = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]]), torch.tensor([[3, 11, 5, 11], [11, 11, 9, 10]])
    logits = causal(torch.cat((torch.ones(2, 1, dtype=torch.int64), x[:, :-1]), dim=1)).logits.float()
    logits[..., 11] = float("-inf")
    log_p = logits.log_softmax(-1).gather(-1, x[..., None])[..., 0].sum(-1)
    log_mu = torch.where(xt == 11, model.log_p_x0(xt).gather(-1, x[..., None])[..., 0], 0.0).sum(-1)
    energy = model.energy(x.int(), xt.int())
    assert energy.dtype == torch.float32
    torch.testing.assert_close(energy, log_mu - log_p, atol=1e-4, rtol=1e-4)
    out = model.generate(xt.int(), return_dict_in_generate=True, **EVERY_STEP)
    assert out.energies.dtype == torch.float32 and out.energies.isfinite().any()
    assert out.sequences.dtype == torch.int64 and (out.sequences != 11).all()
    texts = out.sequences
    assert model.likelihood(texts, num_times=4, **EVERY_STEP).nll.isfinite().all()
    revise = partial(model.revise, corrector_steps=3, num_candidates=3, seed=0)
    assert torch.equal(revise(texts.int()), revise(texts))


@torch.no_grad()
def test_half_precision_of_a_denoiser_and_of_a_function():
    bert = make_bert(12, 16).to(torch.bfloat16)
    model = ForeignModel(bert, lambda x, xt, t, mask, log_mu: (x.float() / 8).mean(-1).half())
    texts = model.generate(batch_size=3, **EVERY_STEP)
    assert model.log_p_x0(texts).dtype == model.energy(texts, texts).dtype == torch.float32
    assert model.likelihood(texts, num_times=4, **EVERY_STEP).nll.isfinite().all()


class Judge(nn.Module):
    """A function that is a module, without a configuration."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x, xt, t, attention_mask, log_mu):
        return self.drop(x.float()).mean(-1)


def test_dropout_is_off_in_a_function_too():
    judge = Judge()
    model = ForeignModel(make_bert(12, 16), judge)
    texts = model.generate(batch_size=4, **EVERY_STEP)
    assert torch.equal(model.generate(batch_size=4, **EVERY_STEP), texts) and judge.drop.training
    assert torch.equal(ForeignModel(make_bert(12, 16), judge.eval()).generate(batch_size=4, **EVERY_STEP), texts)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_an_energy_with_fewer_positions(name):
    """Rotary positions have no table, so a Llama would read on. The canvas ends where the shorter of the two does."""
    bert, causal = make_bert(12, 16), make_causal(name, max_position_embeddings=8)
    model, long = ForeignModel(bert, causal), torch.full((1, 9), 3)
    assert model.generate(**EVERY_STEP).shape == (1, 8)
    message = "max_position_embeddings=8"
    for call in (
        lambda: model.generate(max_length=9, **EVERY_STEP),
        lambda: model.likelihood(long),
        lambda: model.revise(long, corrector_steps=1, num_candidates=2),
        lambda: model.energy(long, long),
        lambda: ForeignModel(bert, causal, max_position_embeddings=16),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert ForeignModel(bert, causal, max_position_embeddings=6).generate(**EVERY_STEP).shape == (1, 6)


@pytest.mark.parametrize("name", ["Bert", "Roberta", "DistilBert"])
def test_a_model_without_a_mask(name):
    with pytest.raises(ValueError, match=f"mask_token_id must be given: the configuration of {name}ForMaskedLM has no"):
        ForeignModel(make_model(name))


def test_a_masked_model_is_no_energy():
    with pytest.raises(ValueError, match="energy must be a causal language model.*BertForMaskedLM"):
        ForeignModel(make_bert(12, 16), make_bert(12, 16))
