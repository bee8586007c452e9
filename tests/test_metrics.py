"""training/common/metrics.py: exact values on small cases, laws by enumeration; the `evaluate` modules do the same."""

import importlib.util
import itertools
import math
import runpy
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import evaluate
import gradio
import numpy as np
import pytest
import torch
from huggingface_hub import RepoCard
from transformers import GPT2Config, GPT2LMHeadModel

from modeling_edlm import EDLMConfig, EDLMForCausalLM
from training.common import metrics
from training.common.data import character_tokenizer
from training.pretrain import ar_loss

ROOT = Path(__file__).parents[1]
MODULES = sorted(card.parent.name for card in (ROOT / "hub_cards" / "metrics").glob("*/README.md"))


def random_texts(count, length, seed=0, alphabet="abcd "):
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list(alphabet), size=length)) for _ in range(count)]


@pytest.fixture(scope="module")
def causal():
    torch.manual_seed(0)
    config = EDLMConfig(vocab_size=6, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, cond_dim=0)
    model = EDLMForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=6, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=5)
    ).eval()


# ---- under a scorer


def test_nll_is_that_of_the_training_loss(causal):
    x_BL = torch.randint(0, 5, (5, 12))
    expected = ar_loss(causal, x_BL, 5, 5).double().mean(-1)
    assert torch.allclose(metrics.generative_nll(causal, x_BL, 5, 5, batch_size=2), expected, atol=1e-6)
    assert torch.allclose(metrics.bits_per_character(causal, x_BL), expected / math.log(2), atol=1e-6)


def test_nll_of_a_uniform_scorer_and_without_padding(gpt2):
    def uniform(ids):
        return SimpleNamespace(logits=torch.zeros(*ids.shape, 7))

    x_BL = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
    assert metrics.generative_nll(uniform, x_BL, 6).tolist() == pytest.approx([math.log(7)] * 2)
    assert metrics.generative_nll(uniform, x_BL, 6, mask_token_id=6).tolist() == pytest.approx([math.log(6)] * 2)
    is_token_BL = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    alone = [metrics.generative_nll(gpt2, row[None, :n], 5) for row, n in zip(x_BL, (2, 4), strict=True)]
    assert torch.allclose(metrics.generative_nll(gpt2, x_BL, 5, None, is_token_BL), torch.cat(alone), atol=1e-6)
    with pytest.raises(ValueError, match="x_BL"):
        metrics.generative_nll(gpt2, x_BL, 5, None, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="bos_token_id"):
        metrics.generative_nll(gpt2, x_BL, None)


def test_hidden_features_are_the_last_hidden_states(gpt2, causal):
    x_BL = torch.randint(0, 5, (3, 7))
    inputs_BL = torch.cat((torch.full((3, 1), 5), x_BL[:, :-1]), 1)
    states_BLD = gpt2(inputs_BL, output_hidden_states=True).hidden_states[-1]
    assert torch.allclose(metrics.hidden_features(gpt2, x_BL, 5, batch_size=2), states_BLD.mean(1), atol=1e-6)
    assert torch.allclose(metrics.hidden_features(gpt2, x_BL, 5, pooling="last"), states_BLD[:, -1], atol=1e-6)
    is_token_BL = torch.arange(7) < torch.tensor([[7], [3], [1]])
    padded = metrics.hidden_features(gpt2, x_BL, 5, is_token_BL)
    assert torch.allclose(padded[1], states_BLD[1, :3].mean(0), atol=1e-6)
    last = metrics.hidden_features(gpt2, x_BL, 5, is_token_BL, "last")
    assert torch.allclose(last[1], states_BLD[1, 2], atol=1e-6)
    assert metrics.hidden_features(causal, x_BL, 5).shape == (3, 16)
    assert not gpt2.lm_head._forward_pre_hooks
    with pytest.raises(ValueError, match="pooling must be mean or last, got 'max'"):
        metrics.hidden_features(gpt2, x_BL, 5, pooling="max")


def test_mauve_tells_equal_laws_from_different_ones():
    torch.manual_seed(0)
    x, same, other = torch.randn(400, 4), torch.randn(400, 4), torch.randn(400, 4) * 0.3 + 2
    found = metrics.mauve(x, same, num_resamples=100)
    assert found["mauve"] > 0.9 and found["num_buckets"] == 40
    low, high = found["interval"]
    assert low < found["mauve"] <= high + 1e-9 and high - low < 0.2
    assert metrics.mauve(x, x)["mauve"] == pytest.approx(1, abs=1e-6)
    assert metrics.mauve(x, other)["mauve"] < 0.1
    assert metrics.mauve(x, same) == metrics.mauve(x, same)


# ---- without a language model


def test_token_entropy():
    x_BL = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 3], [7, 7, 2, 2]])
    expected = [0, math.log(4), math.log(2)]
    assert metrics.token_entropy(x_BL).tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="x_BL must hold tokens"):
        metrics.token_entropy(x_BL[:, :0])


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_ngrams_are_those_of_a_counter(n):
    texts = ["", "ab", *random_texts(5, 30), "a"]
    gram_G, owner_G = metrics.ngrams(texts, n)
    expected = [(i, text[j : j + n]) for i, text in enumerate(texts) for j in range(len(text) - n + 1)]
    assert owner_G.tolist() == [i for i, _ in expected]
    names = {}
    assert all(names.setdefault(gram, text) == text for gram, (_, text) in zip(gram_G.tolist(), expected, strict=True))
    assert len(set(names.values())) == len(names)
    repeated = []
    for text in texts:
        grams = [text[j : j + n] for j in range(len(text) - n + 1)]
        repeated.append(1 - len(set(grams)) / len(grams) if grams else 0)
    assert metrics.repetition_rate(texts, n).tolist() == pytest.approx(repeated)


def test_ngram_divergence_of_known_distributions():
    def js(p, q):
        def entropy(law):
            return -sum(v * math.log2(v) for v in law if v)

        return entropy([(a + b) / 2 for a, b in zip(p, q, strict=True)]) - (entropy(p) + entropy(q)) / 2

    found = metrics.ngram_divergence(["ab", "ba"], ["abbb"], 1)["divergence"]
    assert found == pytest.approx(js((0.5, 0.5), (0.25, 0.75)))
    assert metrics.ngram_divergence(["ab"], ["cd"], 2)["divergence"] == pytest.approx(1)
    assert metrics.ngram_divergence(["ab", "ab"], ["ab"], 2)["divergence"] == 0  # no n-gram across two texts
    words, ids = [["the", "cat"]], np.array([[0, 1]])
    assert metrics.ngram_divergence(words, [["the", "dog"]], 1)["divergence"] == pytest.approx(0.5)
    assert metrics.ngram_divergence(ids, np.array([[0, 2]]), 1)["divergence"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="n=3"):
        metrics.ngram_divergence(["abcd"], ["ab"], 3)


def test_ngram_divergence_of_equal_laws_is_the_bias_that_is_said():
    texts = random_texts(400, 100)
    chance = metrics.ngram_divergence(texts[:200], texts[200:], 1, 200)
    G = 200 * 100
    assert chance["divergence"] == pytest.approx((5 - 1) / (8 * math.log(2)) * (2 / G), rel=0.9)
    assert metrics.ngram_floor(texts, 4) > metrics.ngram_floor(texts, 2) > 0
    four = metrics.ngram_divergence(texts[:20], texts[200:], 4, 200)
    assert four["interval"][0] < four["divergence"] < four["interval"][1]


def test_energy_distance_has_no_bias():
    """Its mean over all pairs of samples that two small laws can give is the distance of the laws."""
    points, N, M = np.array([0.0, 1.0, 3.0]), 2, 3
    gaps = abs(points[:, None] - points)
    for p, q in (((0.2, 0.5, 0.3), (0.2, 0.5, 0.3)), ((0.2, 0.5, 0.3), (0.6, 0.3, 0.1))):
        p, q = np.array(p), np.array(q)
        population = 2 * p @ gaps @ q - p @ gaps @ p - q @ gaps @ q
        mean = 0.0
        for x in itertools.product(range(3), repeat=N):
            for y in itertools.product(range(3), repeat=M):
                sets = points[list(x), None], points[list(y), None]
                mean += p[list(x)].prod() * q[list(y)].prod() * metrics.energy_distance(*sets, 0)["distance"]
        assert mean == pytest.approx(population, abs=1e-9)
    assert population > 0.1


def test_permutation_p_values():
    rng = np.random.default_rng(0)
    null = [metrics.energy_distance(*rng.normal(size=(2, 15, 3)), 99, seed=i)["p_value"] for i in range(100)]
    assert 0.4 < np.mean(null) < 0.6 and np.mean(np.array(null) <= 0.1) < 0.2
    shifted = metrics.energy_distance(rng.normal(size=(30, 3)), rng.normal(size=(20, 3)) + 1, 99, num_resamples=200)
    assert shifted["p_value"] == 0.01
    assert 0 < shifted["interval"][0] < shifted["distance"] < shifted["interval"][1]
    with pytest.raises(ValueError, match="got 1 and 3"):
        metrics.energy_distance(np.zeros((1, 2)), np.zeros((3, 2)))


def test_text_features_are_a_text_s_own_and_tell_texts_apart():
    texts = random_texts(40, 60) + ["ab", "a"]
    features_BF = metrics.text_features(texts)
    assert features_BF.shape == (42, 3 * 64 + 3) and np.isfinite(features_BF).all()
    assert np.allclose(features_BF[3], metrics.text_features([texts[3]])[0])
    assert np.allclose((features_BF[:40, :192].reshape(40, 3, 64) ** 2).sum(-1), 1)
    other = metrics.text_features([text.replace("a", "b") for text in texts[20:40]])
    assert metrics.energy_distance(features_BF[:20], features_BF[20:40])["p_value"] > 0.05
    assert metrics.energy_distance(features_BF[:20], other)["p_value"] < 0.01


def test_real_words():
    words = metrics.word_list(["xx the cat sat yy", "zz on mat ww"])
    assert words == {"the", "cat", "sat", "on", "mat"}
    shares = metrics.real_word_share(["he cat szt on m", "cat", "", "a the b"], words)
    assert shares.tolist() == pytest.approx([2 / 3, 0, 0, 1])


# ---- how sure


def test_values_at_the_edges():
    """Empty texts, one text, duplicates, other alphabets: what the definitions give, or an error."""
    assert metrics.repetition_rate(["", "abcde abcde", "abc", "abcde abcde"]).tolist() == [0, 0.25, 0, 0.25]
    assert metrics.repetition_rate(["\u65e5\u672c\u8a9e" * 4]).tolist() == pytest.approx([6 / 9])
    assert metrics.ngram_divergence(["ab"], ["cd"], 2) == {"divergence": 1.0}
    assert metrics.ngram_divergence(["aaaa"] * 3, ["", "ab", "abcdef"], 2)["divergence"] <= 1.0
    assert metrics.ngram_divergence(["abc"] * 5, ["abc"], 3) == {"divergence": 0.0}  # of frequencies, not of counts
    assert metrics.ngram_floor(["abc", "abc"], 2) == 0
    composed, apart = "el \u00f1and\u00fa corre", "el n\u0303andu\u0301 corre"
    assert metrics.words_of(composed) == metrics.words_of(apart) == ["el", "\u00f1and\u00fa", "corre"]
    assert metrics.real_word_share([composed, apart, "", "one"], metrics.word_list([apart])).tolist() == [1, 1, 0, 0]
    for function in (metrics.repetition_rate, metrics.text_features, lambda x: metrics.ngrams(x, 1)):
        for nothing in ([], [""], ["", ""]):
            with pytest.raises(ValueError, match="sequences must not all be empty"):
                function(nothing)
    calls = (metrics.word_list, lambda x: metrics.real_word_share(x, set()), lambda x: metrics.split(x, "words"))
    for function in calls:
        with pytest.raises(ValueError, match="texts must be a list of texts, got the text 'one text'"):
            function("one text")


def test_bootstrap_intervals_cover_the_mean():
    rng = np.random.default_rng(0)
    intervals = [metrics.bootstrap_interval(rng.normal(size=40), num_resamples=300, seed=i) for i in range(300)]
    assert 0.89 < np.mean([low < 0 < high for low, high in intervals]) < 0.98
    values = torch.randn(30)
    assert metrics.bootstrap_interval(values) == metrics.bootstrap_interval(values.numpy())
    low, high = metrics.bootstrap_interval(values, lambda v: v.max(), centred=True)
    assert low <= float(values.max()) <= high + 1e-6
    for wrong in ({"values_B": []}, {"num_resamples": 0}, {"level": 1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            metrics.bootstrap_interval(**{"values_B": [1.0]} | wrong)


# ---- as `evaluate` modules


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """`evaluate.load` of a folder as published, with no network."""
    spec = importlib.util.spec_from_file_location("assemble", ROOT / "hub_cards" / "publish" / "assemble.py")
    assemble = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(assemble)
    root = tmp_path_factory.mktemp("metrics")

    def refuse(*args):
        raise OSError("no network in this test")

    def load(name):
        shutil.copytree(ROOT / "hub_cards" / "metrics" / name, root / name, dirs_exist_ok=True)
        assemble.copy(root / name, assemble.metric_code())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(socket.socket, "connect", refuse)
            return evaluate.load(str(root / name), cache_dir=str(root / "cache"))

    load.root = root
    return load


@pytest.mark.parametrize("name", MODULES)
def test_a_module_folder_is_whole(name):
    folder = ROOT / "hub_cards" / "metrics" / name
    card = RepoCard.load(folder / "README.md", ignore_metadata_errors=False)
    assert card.data.sdk == "gradio" and {"evaluate", "metric"} == set(card.data.tags)
    assert (folder / card.data.app_file).is_file() and (folder / f"{name}.py").is_file()
    assert "evaluate" in (folder / "requirements.txt").read_text().split()
    module = (folder / f"{name}.py").read_text()
    usage = module.split('USAGE = """\n')[1].split('"""')[0]
    assert usage in card.text


@pytest.mark.parametrize("name", MODULES)
def test_the_page_of_a_metric(load, name, monkeypatch):
    """One app.py for all: it asks for the texts that the module wants, and shows what that gives."""
    load(name)
    monkeypatch.setattr(gradio.Interface, "launch", lambda page: None)
    page = runpy.run_path(str(load.root / name / "app.py"))
    columns = ["predictions", "references"] if len(page["asked"]) == 2 else ["predictions"]
    assert page["asked"] == columns == [c for c in page["metric"].features]
    assert page["has_model"] == (name == "generative_perplexity")
    if not page["has_model"]:
        found = page["compute"](*["abab\nthe cat sat there"] * len(columns))
        assert found == page["metric"].compute(**dict.fromkeys(columns, ["abab", "the cat sat there"]))


def test_modules_give_what_the_functions_give(load):
    texts, real = random_texts(12, 40), random_texts(12, 40, seed=1)
    entropy = load("token_entropy").compute(predictions=["abcd", "aabb"])
    assert entropy["per_text"] == pytest.approx([math.log(4), math.log(2)])
    words = load("token_entropy").compute(predictions=["a b a b"], units="words")
    assert words["token_entropy"] == pytest.approx(math.log(2))
    rates = load("repetition_rate").compute(predictions=texts, n=2)
    assert rates["per_text"] == pytest.approx(metrics.repetition_rate(texts, 2).tolist())
    found = load("ngram_divergence").compute(predictions=texts, references=real, max_n=3)
    for n in (1, 2, 3):
        assert found[f"js_{n}"] == metrics.ngram_divergence(texts, real, n)["divergence"]
        assert found[f"floor_{n}"] == metrics.ngram_floor(real, n)
    found = load("energy_distance").compute(predictions=texts, references=real)
    expected = metrics.energy_distance(metrics.text_features(texts), metrics.text_features(real), num_resamples=200)
    assert (found["energy_distance"], found["p_value"]) == (expected["distance"], expected["p_value"])
    found = load("real_word_share").compute(predictions=texts, references=real, words=["abc"])
    shares = metrics.real_word_share(texts, metrics.word_list(real) | {"abc"})
    assert found["real_word_share"] == pytest.approx(shares.mean()) and len(found["interval"]) == 2
    with pytest.raises(ValueError, match="units must be characters or words, got 'bytes'"):
        load("token_entropy").compute(predictions=texts, units="bytes")


def test_the_perplexity_module(load, causal, tmp_path):
    tokenizer = character_tokenizer("abcd ")
    causal.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path)
    arguments = {"model_id": str(tmp_path), "subfolder": "lm"}
    found = load("generative_perplexity").compute(predictions=["ab cd", "dd"], **arguments)
    ids = [torch.tensor([tokenizer(text).input_ids]) for text in ("ab cd", "dd")]
    expected = [float(metrics.generative_nll(causal, x, 5, 5)) for x in ids]
    assert found["per_text"] == pytest.approx(expected, abs=1e-6)
    assert found["generative_perplexity"] == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)
    nats = expected[0] * 5 + expected[1] * 2
    assert found["bits_per_character"] == pytest.approx(nats / 7 / math.log(2), rel=1e-5)
    with pytest.raises(ValueError, match="predictions"):
        load("generative_perplexity").compute(predictions=[""], **arguments)
