"""training/evaluate_samples.py on a toy model: the whole command, resumption, whose scorer it is, the tables."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from modeling_edlm import EDLMConfig, EDLMForCausalLM
from support.toy import MASK, make_toy
from training import evaluate_samples
from training.common.data import character_tokenizer

LENGTH = 12
METRICS = (
    "nats_per_token generative_perplexity bits_per_token bits_per_character token_entropy mauve mauve_missing "
    "energy_distance ngram_divergence repetition_rate real_word_share first_text"
).split()
COSTS = "nfe energy_nfe equivalent_passes seconds_per_sample rows_per_batch ess".split()
SETTING = "sampler network num_steps num_candidates window_low shared_completion temperature scorer_is_own".split()


def causal(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "cond_dim": 0}
    model = EDLMForCausalLM(EDLMConfig(vocab_size=MASK + 1, max_position_embeddings=LENGTH, **sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A toy EDLM with its tokenizer, four causal models and a text of the letters a, b and the space."""
    root = tmp_path_factory.mktemp("samples")
    make_toy("nce", length=LENGTH).save_pretrained(root / "edlm")
    character_tokenizer("ab ").save_pretrained(root / "edlm")
    for seed, name in enumerate(("scorer", "energy", "ranker")):
        causal(seed).save_pretrained(root / name)
    torch.manual_seed(3)
    ids = {"bos_token_id": MASK, "eos_token_id": 0, "pad_token_id": 0}
    GPT2LMHeadModel(
        GPT2Config(vocab_size=MASK + 1, n_embd=8, n_layer=1, n_head=2, n_positions=LENGTH + 1, **ids)
    ).save_pretrained(root / "gpt2")
    (root / "data").mkdir()
    letters = np.random.default_rng(0).choice(list("ab "), p=[0.5, 0.3, 0.2], size=2000)
    (root / "data" / "test.txt").write_text("".join(letters))
    return root


def command(root, out, *more, scorer="scorer"):
    options = {"model": root / "edlm", "scorer": root / scorer, "data": root / "data", "out": out}
    options |= {"cache_dir": root / "tokens", "num_samples": 8, "batch_size": 3, "num_resamples": 20}
    options |= {"num_steps": "2,4", "num_candidates": "1,3", "temperatures": "0.5,1.0,2.0", "device": "cpu"}
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)] + list(map(str, more))


@pytest.fixture(scope="module")
def out(root):
    out = root / "results" / "all.json"
    others = ["--energies", f"coar={root / 'energy'}", "--ar", root / "gpt2", "--mdlm_num_steps", "2,4,8"]
    others += ["--completions", "independent,shared"]
    evaluate_samples.main(command(root, out, *others, "--rerank", "2", "--ranker", root / "ranker"))
    return out


def test_every_setting_is_measured(out):
    results = json.loads(out.read_text())
    rows = results["rows"]
    names = ["AR", "MDLM", "MDLM, best of 2"]
    names += [f"EDLM {name}{c}, k=3, t in [0.8, 1]" for name in ("nce", "coar") for c in ("", ", shared")]
    assert [evaluate_samples.label(row) for row in rows] == [
        *[names[0]] * 3,
        *[names[1]] * 9,
        *(name for name in names[2:] for _ in range(6)),
    ]
    for row in rows:
        assert row.keys() == {*METRICS, *COSTS, *SETTING}
        assert not row["scorer_is_own"] and row["seconds_per_sample"] > 0 and len(row["first_text"]) == LENGTH
        assert row["bits_per_token"]["low"] <= row["bits_per_token"]["mean"] <= row["bits_per_token"]["high"]
        assert row["bits_per_character"]["mean"] == pytest.approx(row["bits_per_token"]["mean"])
        assert row["generative_perplexity"]["mean"] == pytest.approx(math.exp(row["nats_per_token"]["mean"]))
        assert row["mauve"] is not None and row["ngram_divergence"].keys() == {"1", "2", "3", "4"}
    assert results["data"].keys() == set(METRICS)
    assert results["ngram_floors"].keys() == {"1", "2", "3", "4"}
    assert results["command"].startswith("python -m training.evaluate_samples --model ")
    assert "--data data/data" in results["command"] and str(out.parent) not in results["command"]
    assert {"git_commit", "versions", "seed", "device_name", "cost", "weights"} <= results.keys()


def test_costs(out):
    results = json.loads(out.read_text())
    body, rows = results["body_parameters"], results["rows"]
    for row in rows:
        if row["sampler"] == "AR":
            assert (row["nfe"], row["energy_nfe"], row["ess"]) == (LENGTH, 0, None)
            assert row["equivalent_passes"] == pytest.approx(body["AR"] / body["denoiser"])
            continue
        assert 0 < row["nfe"] <= row["num_steps"] * (2 if row["sampler"] == "best of k" else 1)
        ratio = body[row["network"]] / body["denoiser"] if row["network"] else 0
        assert row["equivalent_passes"] == pytest.approx(row["nfe"] + row["energy_nfe"] * ratio)
        if row["sampler"] == "EDLM":  # the window holds the first step alone
            assert 0 < row["energy_nfe"] <= 3 and 1 <= row["ess"] <= 3
        else:
            assert row["energy_nfe"] == (2 if row["sampler"] == "best of k" else 0) and row["ess"] is None


def test_the_best_of_two_has_more_probability(out, root):
    """Samples of the best-of-2 baseline are MDLM's samples, the better of each pair."""
    arguments = evaluate_samples.parse_arguments(
        evaluate_samples.SampleArguments, "", command(root, out, "--rerank", "2", "--ranker", root / "ranker")
    )
    networks = evaluate_samples.Networks(arguments)
    setting = {"sampler": "best of k", "network": "ranker", "num_steps": 2, "num_candidates": 2}
    setting |= {"window_low": None, "shared_completion": False, "temperature": 1.0}
    best_BL, cost = evaluate_samples.sample(setting, networks, arguments)
    assert cost["rows_per_batch"] == 2
    pool = networks.denoiser.generate(batch_size=16, num_steps=2, num_candidates=1, seed=0)
    nll = evaluate_samples.metrics.generative_nll(networks.ranker, pool, MASK, MASK).view(8, 2)
    assert torch.equal(best_BL, pool.view(8, 2, LENGTH)[torch.arange(8), nll.argmin(-1)])


def test_the_autoregressive_baseline_goes_on_behind_an_eos_and_obeys_the_temperature(out, root):
    arguments = evaluate_samples.parse_arguments(
        evaluate_samples.SampleArguments, "", command(root, out, "--ar", root / "gpt2", "--num_samples", "300")
    )
    networks = evaluate_samples.Networks(arguments)
    setting = {"sampler": "AR", "network": "AR", "num_steps": None, "num_candidates": None}
    arguments.batch_size = 300
    law = torch.log_softmax(networks.ar(torch.tensor([[MASK]])).logits[0, -1, :MASK].double(), -1)
    for temperature in (1.0, 0.05):
        x_BL, _ = evaluate_samples.sample(
            setting | {"window_low": None, "shared_completion": False, "temperature": temperature}, networks, arguments
        )
        assert x_BL.shape == (300, LENGTH) and (x_BL[:, :-1] == 0).any()  # 0 is the EOS
        frequencies = torch.bincount(x_BL[:, 0], minlength=MASK) / 300
        assert (frequencies - (law / temperature).softmax(-1)).abs().max() < 0.12


def test_a_killed_command_goes_on(out, root, capsys, monkeypatch):
    before = json.loads(out.read_text())
    lines = out.with_suffix(".jsonl").read_text().splitlines()
    assert len(lines) == 1 + len(before["rows"])
    again = root / "results" / "again.json"
    again.with_suffix(".jsonl").write_text("\n".join(lines[:-2]) + "\n" + lines[-2][:50])  # cut off in mid-line
    measured = []
    sample = evaluate_samples.sample
    monkeypatch.setattr(evaluate_samples, "sample", lambda *a: measured.append(a[0]) or sample(*a))
    others = ["--energies", f"coar={root / 'energy'}", "--ar", root / "gpt2", "--mdlm_num_steps", "2,4,8"]
    others += ["--completions", "independent,shared"]
    others += ["--rerank", "2", "--ranker", root / "ranker"]
    evaluate_samples.main(command(root, again, *others))
    assert [row["num_steps"] for row in measured] == [4, 4]
    after = json.loads(again.read_text())
    timed = {"seconds_per_sample"}
    for old, new in zip(before["rows"], after["rows"], strict=True):
        assert {k: v for k, v in old.items() if k not in timed} == {k: v for k, v in new.items() if k not in timed}
    assert len(again.with_suffix(".jsonl").read_text().splitlines()) == len(lines)
    assert "results: " in capsys.readouterr().out
    # another number of samples is another measurement
    small = ["--num_samples", "6", "--num_steps", "2", "--temperatures", "1.0"]
    evaluate_samples.main(command(root, again, *small))
    assert len(measured) == 4 and len(json.loads(again.read_text())["rows"]) == 2


def test_a_network_does_not_judge_itself(root, tmp_path, capsys):
    copy = tmp_path / "a copy"  # under another path, and in another precision: the weights tell
    AutoModelForCausalLM.from_pretrained(root / "energy").save_pretrained(copy)
    own = ["--energies", f"coar={copy}", "--num_steps", "2", "--temperatures", "1.0", "--dtype", "bfloat16"]
    small = command(root, tmp_path / "own.json", *own, scorer="energy")
    with pytest.raises(ValueError, match=r"scorer=.* has the weights of \['coar'\]"):
        evaluate_samples.main(small)
    evaluate_samples.main([*small, "--allow_own_scorer", "true"])
    rows = json.loads((tmp_path / "own.json").read_text())["rows"]
    assert [(row["network"], row["scorer_is_own"]) for row in rows] == [
        (None, False),
        ("nce", False),
        ("coar", True),
    ]
    printed = capsys.readouterr().out
    assert "EDLM coar, k=3, t in [0.8, 1] (*)" in printed and "(*) The scorer has a part" in printed
    for name, more in (("AR", ["--ar"]), ("ranker", ["--rerank", "2", "--ranker"])):
        with pytest.raises(ValueError, match=f"has the weights of \\['{name}'\\]"):
            evaluate_samples.main(command(root, tmp_path / "own.json", *more, root / "scorer"))


def test_two_energies_of_a_kind_have_two_names(root, tmp_path):
    make_toy("nce", seed=5, length=LENGTH).save_pretrained(tmp_path / "light" / "model")
    more = ["--energies", f"nce={tmp_path / 'light' / 'model'}"]
    arguments = evaluate_samples.parse_arguments(
        evaluate_samples.SampleArguments, "", command(root, tmp_path / "x.json", *more)
    )
    networks = evaluate_samples.Networks(arguments)
    assert list(networks.edlms) == ["nce", "nce light"]
    assert networks.edlms["nce light"].denoiser is networks.denoiser
    arguments.energies += "," + arguments.energies
    with pytest.raises(ValueError, match="energies must have different names, got 'nce light' again"):
        evaluate_samples.Networks(arguments)


def test_a_scorer_with_a_tokenizer_of_its_own(root, tmp_path):
    """Two letters at a time: fewer tokens, and bits per character that can be compared."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pairs = [a + b for a in "ab " for b in "ab "] + list("ab ") + ["[PAD]"]
    backend = Tokenizer(models.WordLevel({pair: i for i, pair in enumerate(pairs)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]{2}"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]")
    tokenizer.save_pretrained(tmp_path / "pairs")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(pairs), n_embd=8, n_layer=1, n_head=2, bos_token_id=12, eos_token_id=12)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "pairs")
    more = ["--num_steps", "2", "--num_candidates", "1", "--temperatures", "1.0"]
    small = command(root, tmp_path / "pairs.json", *more, scorer=tmp_path / "pairs")
    with pytest.raises(ValueError, match="scorer must have the model's token ids, got vocab_size 13 and not 4"):
        evaluate_samples.main(small)
    evaluate_samples.main([*small, "--scorer_tokenizer", str(tmp_path / "pairs")])
    row = json.loads((tmp_path / "pairs.json").read_text())["rows"][0]
    assert row["bits_per_token"]["mean"] == pytest.approx(2 * row["bits_per_character"]["mean"], rel=1e-6)


def test_tables_and_chart_come_from_the_file(out, capsys):
    results = json.loads(out.read_text())
    evaluate_samples.main(["--from_json", str(out)])
    printed = capsys.readouterr().out
    assert printed == evaluate_samples.table(results) + "\n"
    first, second = [part.splitlines() for part in printed.split("\n\n") if part.startswith("|")]
    assert len(first) == 2 + 1 + len(results["rows"]) and len({line.count("|") for line in first}) == 1
    assert len(second) == 2 + len(results["matched_entropy"]) and len({line.count("|") for line in second}) == 1
    assert first[2].startswith("| data |") and "outside of the sweep" not in second[0]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.parent.glob("*.tmp"))
    with pytest.raises(ValueError, match="from_json must be a file of results, got 'nowhere.json'"):
        evaluate_samples.main(["--from_json", "nowhere.json"])


def test_matched_entropy_is_on_the_line_between_two_temperatures():
    base = {"sampler": "MDLM", "network": None, "num_candidates": 1, "scorer_is_own": False}
    base |= {"seconds_per_sample": 0.5, "equivalent_passes": 8.0}

    def row(num_steps, temperature, entropy, bits):
        setting = {"num_steps": num_steps, "temperature": temperature}
        return base | setting | {"token_entropy": {"mean": entropy}, "bits_per_token": {"mean": bits}}

    rows = [row(8, 0.8, 1.0, 2.0), row(8, 1.2, 3.0, 6.0), row(8, 1.0, 2.0, 3.0), row(16, 1.0, 2.0, 3.0)]
    inside, outside = evaluate_samples.matched_entropy(rows, 2.25)
    assert (inside["bits_per_token"], inside["temperature"]) == pytest.approx((3.75, 1.05))
    assert inside["entropy_range"] == [1.0, 3.0] and inside["num_steps"] == 8
    assert outside["bits_per_token"] is None and outside["num_steps"] == 16


@pytest.mark.parametrize(
    "option, value",
    [
        ("scorer", ""),
        ("out", "results.txt"),
        ("num_steps", "0,2"),
        ("num_steps", "two"),
        ("num_candidates", "0"),
        ("window_lows", "1.5"),
        ("completions", "shared,none"),
        ("temperatures", "-1.0"),
        ("energies", "lstm=folder"),
        ("rerank", "1"),
        ("rerank", "2"),
        ("dtype", "float8"),
        ("num_samples", "1"),
        ("num_samples", "5000"),
    ],
)
def test_bad_options_are_named(root, tmp_path, option, value):
    with pytest.raises(ValueError, match=option.removesuffix("s")) as error:
        evaluate_samples.main([*command(root, tmp_path / "x.json"), f"--{option}", value])
    assert value in str(error.value)
