"""bench/frontier.py and bench/remdm.py on toys: ReMDM's law, counted passes, and points on the way of a longer run."""

import itertools
import json
import math
import shutil
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer

from bench import frontier, remdm
from bench.frontier import FrontierArguments, Writer, jobs, to_the_end
from modeling_edlm import EDLMConfig, EDLMForCausalLM, EDLMForMaskedLM, EDLMGenerationConfig, EDLMModel
from support.toy import MASK, chain_law, completions, log_mu, make_toy, p_value, total_variation
from training.common.arguments import answer_early
from training.common.judge import Judge, before_end

TOKENIZER = Path(__file__).parent.parent / "training" / "tokenizers" / "stories"
LENGTH, EOS = 16, 2
SIZES = {"vocab_size": 2048, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "cond_dim": 0}
SIZES |= {"max_position_embeddings": LENGTH, "bos_token_id": 1}


# ---- ReMDM


def remdm_law(denoiser, length: int, steps: list[remdm.Move]) -> dict[tuple, float]:
    """Exact distribution of what the sampler returns, by dynamic programming over the states."""

    @cache
    def mu(state: tuple, t: float, shown: tuple) -> list[float]:
        return log_mu(denoiser, state, t, shown).exp().tolist() if shown else [1.0]

    dist = {(MASK,) * length: 1.0}
    for move in steps:
        following = defaultdict(float)
        for state, p_state in dist.items():
            for moved in itertools.product((False, True), repeat=length):
                rates = [move.reveal if token == MASK else move.sigma for token in state]
                p = p_state * math.prod(r if m else 1 - r for m, r in zip(moved, rates, strict=True))
                if p == 0:
                    continue
                shown = tuple(i for i in range(length) if moved[i] and state[i] == MASK)
                hidden = tuple(MASK if m and token != MASK else token for m, token in zip(moved, state, strict=True))
                mu_C = mu(state, 1 - move.alpha_t, shown)
                for filled, p_filled in zip(completions(state, shown), mu_C, strict=True):
                    following[tuple(filled[i] if i in shown else hidden[i] for i in range(length))] += p * p_filled
        dist = following
    return dict(dist)


@pytest.mark.parametrize("schedule, eta", [("cap", 0.3), ("rescale", 0.5), ("loop", 0.1)])
def test_remdm_follows_its_law(schedule, eta):
    denoiser, steps = make_toy("none").denoiser, remdm.moves(schedule, 6, eta)
    law = remdm_law(denoiser, 3, steps)
    assert sum(law.values()) == pytest.approx(1) and not any(MASK in x for x in law)
    plain = remdm_law(denoiser, 3, remdm.moves("cap", 6, 0.0))
    assert total_variation(law, plain) > 0.01  # it is another law than that of MDLM
    x_BL, nfe_B = remdm.sample(denoiser, 4000, 3, steps, seed=1)
    assert p_value(x_BL, law) > 1e-3 > p_value(x_BL, plain)
    assert nfe_B.max() <= 6 and nfe_B.float().mean() < 6  # a step that shows nothing costs nothing


def test_without_masking_again_it_is_mdlm():
    model = make_toy("none")
    steps, plain = remdm.moves("cap", 4, 0.0), chain_law(model, (MASK,) * 3, 4, 1)
    assert total_variation(remdm_law(model.denoiser, 3, steps), plain) < 1e-6
    assert p_value(remdm.sample(model.denoiser, 4000, 3, steps, seed=2)[0], plain) > 1e-3


@pytest.mark.parametrize("schedule", frontier.SCHEDULES)
def test_the_schedules_keep_the_marginals(schedule):
    masked = 1.0
    for move in remdm.moves(schedule, 40, remdm.ETA[schedule]):
        assert 0 <= move.sigma <= remdm.ETA[schedule] and 0 <= move.reveal <= 1
        masked = masked * (1 - move.reveal) + (1 - masked) * move.sigma
        assert masked == pytest.approx(1 - move.alpha_s, abs=1e-12)
    assert masked == 0


def test_a_row_of_remdm_does_not_depend_on_its_batch():
    denoiser, steps = make_toy("none", length=8).denoiser, remdm.moves("cap", 8, 0.2)
    whole_BL, nfe_B = remdm.sample(denoiser, 5, 8, steps, seed=3)
    part_BL, part_B = remdm.sample(denoiser, 2, 8, steps, seed=3, first_row=3)
    assert torch.equal(whole_BL[3:], part_BL) and torch.equal(nfe_B[3:], part_B)


# ---- the frontier


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("frontier") / "edlm-tiny"
    torch.manual_seed(0)
    denoiser, *causal = EDLMForMaskedLM(EDLMConfig(**SIZES)), *(EDLMForCausalLM(EDLMConfig(**SIZES)) for _ in range(2))
    for part in (denoiser, *causal):
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        part.head.linear.bias.data[EOS] += 4  # some texts end early
    model = EDLMModel.from_components(denoiser, causal[0], "ar")
    options = {"temperature": 0.8, "corrector_size": 3, "corrector_temperature": 0.5}
    model.generation_config = EDLMGenerationConfig(num_steps=8, eos_token_id=EOS, pad_token_id=0, **options)
    model.save_pretrained(folder)
    for name, part in (("judge", causal[1]), ("energy", causal[0])):
        part.save_pretrained(folder / name)
        (folder / name / "words.txt").write_text("the\ndog\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    (folder / "data").mkdir()
    texts = [f"The {name} ran to the park and sat." for name in ("dog", "cat", "boy", "girl", "bear", "bird", "ball")]
    pq.write_table(pa.table({"text": texts}), folder / "data" / "validation.parquet")
    return folder


def command(folder: Path, results: Path, **changes) -> list[str]:
    options = {"model": folder, "judge": f"{folder}:judge", "out": results, "data": folder / "data", "num_samples": 5}
    options |= {"batch_size": 3, "passes": "4,8,24", "num_steps": 4, "corrector_candidates": 3}
    return [str(part) for name, value in (options | changes).items() for part in (f"--{name}", value)]


@pytest.fixture(scope="module")
def results(folder, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("out") / "frontier.json"
    frontier.main(command(folder, out))
    return json.loads(out.read_text()) | {"out": out}


@pytest.fixture(scope="module")
def writer(folder) -> Writer:
    model = EDLMModel.from_pretrained(folder).eval()
    config = EDLMGenerationConfig(
        **{"temperature": 0.8, "num_candidates": 1, "shared_completion": True, "return_dict_in_generate": True},
        **{"eos_token_id": EOS, "pad_token_id": 0},
    )
    return Writer(model, AutoTokenizer.from_pretrained(folder), config, seed=5)


def test_every_method_has_a_row(results):
    rows = results["rows"]
    assert {row["method"] for row in rows} == set(frontier.METHODS)
    for row in rows:
        assert row["passes"] == pytest.approx(row["nfe"] + row["energy_nfe"])
        assert len(row["texts"]) == 2 and len(row["per_sample"]["bits"]) == 5 and row["seconds_per_sample"] > 0
        bits, characters = (sum(row["per_sample"][name]) for name in ("bits", "characters"))
        assert row["judge"]["mean"] == pytest.approx(bits / characters)
        assert 0 <= row["known_words"]["mean"] <= 1 and row["distinct_2"]["mean"] <= 1
        if row["method"] in ("mdlm", "remdm", "mdlm-rounds", "ar"):
            assert row["energy_nfe"] == 0 and row["nfe"] <= max(row["target"], LENGTH)
        if row["method"] in frontier.ROUNDS:
            assert row["passes"] == pytest.approx(row["target"], rel=0.5)
    assert results["data"]["judge"]["stderr"] > 0
    lines = frontier.table(results).splitlines()
    assert len(lines) == 2 + len(rows) + 1 and "| MDLM, rounds | 4 steps, 20 rounds |" in "\n".join(lines)
    assert results["out"].with_suffix(".png").stat().st_size > 1000
    assert results["command"].startswith("python -m bench.frontier --model")


@pytest.mark.parametrize("method", frontier.ROUNDS)
def test_points_on_the_way_are_those_of_runs_that_end_there(writer, method):
    """Texts and passes, bit for bit."""
    settings = {"num_steps": 4, "num_candidates": 3, "corrector_size": 3, "corrector_temperature": 0.5}
    settings |= {"energy_window": (0.6, 0.0) if method == "edlm-both" else (0.0, 0.0)}
    marks = [1, 2, 7]
    job = {"method": method, "settings": settings, "points": [[0, mark] for mark in marks]}
    model = writer.model.denoiser if method == "mdlm-rounds" else writer.model
    for mark, point in zip(marks, writer.write(job, 2, 6), strict=True):
        options = settings | {"batch_size": 6, "first_row": 2, "seed": 5, "corrector_steps": mark}
        output = model.generate(generation_config=writer.config, **options)
        assert point["ids"] == to_the_end(output.sequences, EOS)
        assert point["nfe"] == output.nfe.tolist() and point["energy_nfe"] == output.energy_nfe.tolist()
    assert {len(text) for text in point["ids"]} != {LENGTH}  # some have an end


def test_the_likeliest_of_n_texts_is_kept(writer):
    job = {"method": "best-of-n", "settings": {"num_steps": 4}, "points": [[0, 2], [0, 3]]}
    reader, plain = Judge(writer.model.energy_model, writer.tokenizer, set()), []
    for n in range(3):
        seed = 5 + n * frontier.NEXT_TEXT
        options = {"batch_size": 4, "first_row": 1, "seed": seed, "num_steps": 4}
        plain.append(writer.model.denoiser.generate(generation_config=writer.config, **options))
    bits = [
        torch.from_numpy(reader.read(output.sequences)["bits"]) / before_end(output.sequences, EOS).sum(-1)
        for output in plain
    ]
    for (_, n), point in zip(job["points"], writer.write(job, 1, 4), strict=True):
        best_B = torch.stack(bits[:n]).argmin(0).tolist()
        assert point["ids"] == [to_the_end(plain[j].sequences[b : b + 1], EOS)[0] for b, j in enumerate(best_B)]
        assert point["nfe"] == sum(output.nfe for output in plain[:n]).tolist() and point["energy_nfe"] == [n] * 4


def test_a_run_that_was_killed_goes_on(results, folder, tmp_path, monkeypatch):
    out, whole, calls = tmp_path / "frontier.json", Writer.write, []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(Writer, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        frontier.main(command(folder, out))
    assert not out.exists()
    with open(out.with_suffix(".jsonl"), "a") as file:
        file.write('{"key": {"met')  # a line that was cut off
    frontier.main(command(folder, out))
    again = json.loads(out.read_text())
    assert len(calls) == 1 + len(results["out"].with_suffix(".jsonl").read_text().splitlines())
    for row, other in zip(again["rows"], results["rows"], strict=True):
        assert row | {"seconds_per_sample": other["seconds_per_sample"]} == other
    assert again["data"] == results["data"]

    monkeypatch.setattr(Writer, "write", None)  # nothing is made again, not even for another score
    monkeypatch.setattr(frontier, "mauve", lambda *states, num_resamples: {"mauve": len(states[0]) / len(states[1])})
    frontier.main(command(folder, out, mauve=True))
    whole_again = json.loads(out.read_text())
    assert whole_again["rows"] == [row | {"mauve": {"mauve": 1.0}} for row in again["rows"]]
    assert frontier.table(whole_again).splitlines()[2].endswith(" 1.000 |")


def test_printed_and_drawn_again(results, tmp_path, capsys):
    copy = tmp_path / "copy.json"
    copy.write_text(json.dumps({name: value for name, value in results.items() if name != "out"}))
    frontier.main(["--from_json", str(copy)])
    assert frontier.table(results) in capsys.readouterr().out and copy.with_suffix(".png").exists()


def test_rounds_bring_their_baseline_along():
    options = {"model": "x", "judge": "x", "out": "x.json"}
    assert FrontierArguments(**options, methods="edlm-both").chosen == ["mdlm-rounds", "edlm-both"]
    assert FrontierArguments(**options, methods="ar,mdlm").chosen == ["mdlm", "ar"]


def test_as_many_passes_as_were_asked_for():
    arguments = FrontierArguments(model="x", judge="x", out="x.json")
    found = {}
    for job in jobs(arguments, EDLMGenerationConfig(corrector_candidates=2), 256):
        found.setdefault(job["method"], []).append((job["settings"]["num_steps"], job["points"]))
    assert found["mdlm"] == found["remdm"] == [(p, [[p, 0]]) for p in (8, 16, 32, 64, 128, 256, 512, 1024)]
    assert found["best-of-n"] == [(64, [[128, 2], [256, 4], [512, 8], [1024, 16]])]
    *early, (T, points) = found["edlm-rounds"]
    assert (
        [T for T, _ in early] == [4, 8, 16, 32]
        and T == 64
        and [target for target, _ in points] == [128, 256, 512, 1024]
    )
    assert points[-1][1] == pytest.approx((1024 - 64) / 2, abs=2)
    assert len(found["edlm"]) == 7  # with 1,024 passes it would do no more than with 512


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"judge": ""}, "judge must be given"),
        ({"out": "x.txt"}, "out must end in .json, got 'x.txt'"),
        ({"methods": "mdlm,best"}, "methods must be of mdlm,.* got 'mdlm,best'"),
        ({"passes": "8,x"}, "passes must be numbers .* got '8,x'"),
        ({"passes": "1"}, "passes must be at least 2, got '1'"),
        ({"num_samples": "1"}, "num_samples must be at least 2, got 1"),
        ({"temperature": "0"}, "temperature must be positive, got 0.0"),
        ({"loop_window": "0.4"}, "loop_window must be hi:lo, got '0.4'"),
        ({"loop_window": "0:0.4"}, "energy_window must be"),
        ({"dtype": "float16"}, "dtype must be float32 or bfloat16, got 'float16'"),
        ({"remdm_schedule": "conf"}, "remdm_schedule must be one of cap,rescale,loop, got 'conf'"),
        ({"remdm_eta": "2"}, r"remdm_eta must lie in \[0, 1\], got 2.0"),
        ({"mauve": "true", "data": ""}, "mauve needs data"),
    ],
)
def test_bad_arguments_are_one_line(folder, tmp_path, monkeypatch, capsys, changes, message):
    monkeypatch.setattr(sys, "argv", ["frontier", *(argv := command(folder, tmp_path / "x.json", **changes))])
    with pytest.raises(SystemExit):
        answer_early(FrontierArguments, frontier.__doc__)
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    with pytest.raises(ValueError, match=message):
        frontier.main(argv)


def test_the_energy_may_not_judge(folder, tmp_path):
    with pytest.raises(ValueError, match="judge=.* is the energy itself"):
        frontier.main(command(folder, tmp_path / "x.json", judge=f"{folder}:energy"))
