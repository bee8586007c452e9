"""bench/infilling.py on toys: gaps, methods that leave the given text alone, the law of drafts, the judge's scores."""

import json
import shutil
import string
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer

from bench import infilling
from bench.infilling import KINDS, LEFT, METHODS, REFERENCE, TRUTH, WEIGHED, WEIGHED_SHARPENED, Gap, Left
from modeling_edlm import EDLMConfig, EDLMForCausalLM, EDLMForMaskedLM, EDLMModel
from modeling_edlm.energies import causal_log_prob
from support.toy import MASK, completions, law_p_k, make_toy, p_value
from training.common.judge import Judge

TOKENIZER = Path(__file__).parent.parent / "training" / "tokenizers" / "stories"
SIZES = {"vocab_size": 2048, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "cond_dim": 0}
SIZES |= {"max_position_embeddings": 100, "bos_token_id": 1}
WORDS = "the dog cat ran sat saw a big red tree and it was happy with his friend Tom".split()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("infilling")
    torch.manual_seed(0)
    denoiser, *causal = EDLMForMaskedLM(EDLMConfig(**SIZES)), *(EDLMForCausalLM(EDLMConfig(**SIZES)) for _ in range(2))
    for part in (denoiser, *causal):
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    EDLMModel.from_components(denoiser, causal[0], "ar").save_pretrained(root / "edlm")
    EDLMModel.from_components(denoiser).save_pretrained(root / "none")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        for folder in ("edlm", "none"):
            shutil.copy(TOKENIZER / name, root / folder)
    for name, judge in (("judge", causal[1]), ("energy", causal[0])):
        judge.save_pretrained(root / name)
        (root / name / "words.txt").write_text("\n".join(WORDS).lower())
    rng, texts = np.random.default_rng(0), []
    for i in range(24):
        sentences = [" ".join(rng.choice(WORDS, 9)).capitalize() + "." for _ in range(6 if i % 8 else 14)]
        texts.append(" ".join(sentences[:3]) + "\n" + " ".join(sentences[3:]))
    (root / "data").mkdir()
    for split, part in (("validation", texts[::2]), ("test", texts[1::2])):
        pq.write_table(pa.table({"text": part}), root / "data" / f"{split}.parquet")
    return root


def command(root: Path, out: str = "all.json", **changes) -> list[str]:
    options = {"model": root / "edlm", "judge": root / "judge", "data": root / "data", "out": root / "out" / out}
    options |= {"num_gaps": 4, "num_steps": 4, "num_candidates": 3, "rounds": 2, "limit_rounds": 3, "limit_gaps": 2}
    options |= {"batch_size": 3, "sharpened": 0.5} | changes
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]


@pytest.fixture(scope="module")
def results(root) -> dict:
    infilling.main(command(root))
    return json.loads((root / "out" / "all.json").read_text())


@pytest.fixture(scope="module")
def gaps(root) -> dict[str, list[Gap]]:
    arguments = infilling.parse_arguments(infilling.InfillingArguments, "", command(root))
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    texts = infilling.windows(arguments, tokenizer, 100)
    found = {kind: infilling.draw_gaps(kind, texts, tokenizer, 6, 0) for kind in KINDS}
    for kind in KINDS:  # fewer gaps are the first ones of more
        fewer = infilling.draw_gaps(kind, texts, tokenizer, 3, 0)
        assert all(torch.equal(a.free_L, b.free_L) for a, b in zip(fewer, found[kind], strict=False))
        with pytest.raises(ValueError, match=f"num_gaps must be at most .* of kind '{kind}' .*, got 99"):
            infilling.draw_gaps(kind, texts, tokenizer, 99, 0)
    return found


def test_gaps_are_of_their_kind(gaps):
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    eos = tokenizer.eos_token_id
    for kind, found in gaps.items():
        assert len({tuple(gap.x_L.tolist()) for gap in found}) == len(found)  # one in a text
        for gap in found:
            sizes, end = [b - a for a, b in gap.spans], len(gap.x_L) - int(gap.x_L[-1] == eos)
            assert len(gap.x_L) <= 100 and gap.first > 0 and eos not in gap.x_L[gap.free_L]
            assert len(sizes) == (3 if kind == "scattered" else 1) and sum(sizes) == int(gap.free_L.sum())
            text = tokenizer.decode(gap.x_L[gap.free_L])
            if kind in ("middle", "ending"):
                assert 8 <= sizes[0] <= 32 and (gap.spans[0][1] == end) == (kind == "ending")
            elif kind == "scattered":
                assert all(4 <= size <= 12 for size in sizes) and gap.spans[-1][1] <= end - 8
            elif kind == "sentence":
                assert text.strip()[0].isupper() and text.strip()[-1] == "." and text.count(".") == 1
            else:
                assert text.strip().lower() in {word.lower() for word in WORDS}


def test_given_text_stays_and_nothing_ends_in_a_gap(root, gaps):
    model = EDLMModel.from_pretrained(root / "edlm").eval()
    arguments = infilling.parse_arguments(infilling.InfillingArguments, "", command(root))
    methods = infilling.Methods(model, 2, 0.5, arguments, 1.0)
    for kind, name in [(kind, name) for kind in KINDS for name in METHODS]:
        now = gaps[kind][:3]
        filled = methods.fill(name, now, 0, [4] * 3)
        if kind == "scattered":  # whatever is filled beside it
            assert torch.equal(methods.fill(name, now[1:2], 1, [4]).x[0], filled.x[1])
        for gap, x_L in zip(now, filled.x, strict=True):
            assert x_L.shape == gap.x_L.shape and torch.equal(x_L[~gap.free_L], gap.x_L[~gap.free_L])
            assert not set(x_L[gap.free_L].tolist()) & {2, model.config.mask_token_id}
        if name not in (TRUTH, LEFT, WEIGHED, WEIGHED_SHARPENED):
            longest = max(len(gap.x_L) for gap in now)
            for gap, n, e, tokens in zip(now, filled.nfe, filled.energy_nfe, filled.tokens, strict=True):
                computed = tokens - n * len(gap.x_L)  # by the energy: what is kept is not computed again
                assert 0 <= computed <= e * methods.cost * longest and (computed > 0) == (e > 0)


@pytest.mark.parametrize("free", [(1, 2), (0, 2)])
def test_law_of_drafts(free, monkeypatch):
    """What is drawn, its importance weights, and the one that is kept, against an enumeration; token 1 is banned."""
    monkeypatch.setattr(infilling, "DRAFTS_AT_ONCE", 10**6)
    model = make_toy("ar", length=4)
    ar, truth = model.energy_model, torch.tensor([2, 0, 1, 0])
    is_free_L = torch.zeros(4, dtype=torch.bool)
    is_free_L[list(free)] = True
    state = tuple(truth.masked_fill(is_free_L, MASK).tolist())
    texts = [x for x in completions(state, free) if all(x[i] != 1 for i in free)]
    x_CL, bos = torch.tensor(texts), ar.config.bos_token_id

    def log_p(i: int) -> torch.Tensor:
        where_CL = (torch.arange(4) == i).expand_as(x_CL)
        return causal_log_prob(ar, x_CL, where_CL, bos, MASK).double()

    def log_p_of_banned(i: int) -> torch.Tensor:
        other_CL = x_CL.clone()
        other_CL[:, i] = 1
        return causal_log_prob(ar, other_CL, (torch.arange(4) == i).expand_as(x_CL), bos, MASK).double()

    log_q_C = sum(log_p(i) - torch.log1p(-log_p_of_banned(i).exp()) for i in free).detach()
    log_w_C = (sum(log_p(i) for i in range(free[0], 4)) - log_q_C).detach()
    left = Left(ar, MASK, [1], seed=0, temperature=1.0)
    x_DL, log_w_D, log_p_D, tokens, calls = left.drafts(Gap(0, truth, is_free_L), 12_000, to_end=True)
    assert (tokens, calls) == (free[0] + 1 + 12_000 * (3 - free[0]), 3 if free == (1, 2) else 4)
    assert p_value(x_DL, dict(zip(texts, log_q_C.exp().tolist(), strict=True))) > 1e-4
    which_D = (x_DL[:, None] == x_CL).all(-1).long().argmax(-1)
    assert log_w_D == pytest.approx(log_w_C[which_D], abs=1e-5)
    kept_B = left.keep(log_w_D.view(-1, 3), torch.arange(4000))
    kept_BL = x_DL.view(-1, 3, 4)[torch.arange(4000), kept_B]
    law_C = law_p_k(log_q_C, -log_w_C, 3)
    assert p_value(kept_BL, dict(zip(texts, law_C.tolist(), strict=True))) > 1e-4
    assert p_value(kept_BL, dict(zip(texts, log_q_C.exp().tolist(), strict=True))) < 1e-4  # the test can tell
    assert log_p_D == pytest.approx((log_w_C + log_q_C)[which_D], abs=1e-5)
    left.sharpened = 0.5
    kept = {
        is_sharpened: left.fill_weighed(Gap(0, truth, is_free_L), 12_000, is_sharpened)[0] for is_sharpened in (0, 1)
    }
    sharp_D, number = log_w_D + log_p_D, torch.tensor([0])  # p to the power of 2 over what was drawn
    assert torch.equal(kept[0], x_DL[int(left.keep(log_w_D[None], number))])
    assert torch.equal(kept[1], x_DL[int(left.keep(sharp_D[None], number))])
    few, *_ = left.drafts(Gap(0, truth, is_free_L), 1, to_end=False)
    assert torch.equal(few[0], x_DL[0])  # the first draft


def test_scores_are_the_judges(root, gaps):
    """Bits of gap and right side token by token, whatever is beside a row; words that reach beyond a gap."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    judge = Judge.load(str(root / "judge"), tokenizer)
    now = gaps["middle"][:2] + gaps["scattered"][:1]
    read = infilling.scores(judge, now, [gap.x_L for gap in now])
    for i, gap in enumerate(now):
        with torch.no_grad():
            logits_LV = judge.scorer(torch.cat((torch.tensor([1]), gap.x_L[:-1]))[None]).logits[0]
        logits_LV[:, tokenizer.mask_token_id] = -torch.inf
        bits_L = -logits_LV.double().log_softmax(-1).gather(-1, gap.x_L[:, None])[:, 0] / np.log(2)
        assert read["bits"][i] == pytest.approx(float(bits_L[gap.first :].sum()), rel=1e-5)
        assert read["characters"][i] == len(tokenizer.decode(gap.x_L[gap.first :], skip_special_tokens=True))
        assert read["gap_characters"][i] == len("".join(tokenizer.decode(gap.x_L[a:b]) for a, b in gap.spans))
    assert read["exact"] == [1, 1, 1] and read["known"] == [1, 1, 1]
    ids = tokenizer("The dog ran to a catx tree.").input_ids
    x_L, free_L = torch.tensor(ids), torch.tensor([tokenizer.decode(i) == " cat" for i in ids])
    assert infilling.words_in_gap(judge, Gap(0, x_L, free_L), x_L) == ["catx"]
    assert infilling.scores(judge, [Gap(0, x_L, free_L)], [x_L])["known"] == [0]


def test_what_is_reported(root, results):
    assert [(row["kind"], row["method"]) for row in results["rows"]] == [(k, m) for k in KINDS for m in METHODS]
    rows = {(row["kind"], row["method"]): row for row in results["rows"]}
    for (kind, method), row in rows.items():
        bits, truth, mdlm, ours = (
            np.array(rows[kind, name]["per_gap"]["bits"][: row["num_gaps"]]) for name in (method, *infilling.ALWAYS)
        )
        assert row["num_gaps"] == (2 if method == infilling.LIMIT else 4)
        spread = (bits - ours).std(ddof=1) / len(bits) ** 0.5
        assert row["difference"]["mean"] == pytest.approx((bits - ours).mean(), abs=1e-3)
        assert row["difference"]["stderr"] == pytest.approx(spread, abs=1e-3)
        assert row["over_truth"]["mean"] == pytest.approx((bits - truth).mean(), abs=1e-3)
        gain = mdlm - truth
        if gain.mean() > 2 * gain.std(ddof=1) / len(gain) ** 0.5:
            assert row["recovered"]["mean"] == pytest.approx((mdlm - bits).sum() / gain.sum(), rel=0.01)
        else:
            assert row["recovered"] is None
    for kind in KINDS:  # equal cost, but for one draft more or less
        assert rows[kind, WEIGHED]["passes"]["mean"] == pytest.approx(rows[kind, REFERENCE]["passes"]["mean"], abs=1)
        assert rows[kind, TRUTH]["exact"]["mean"] == 1 and rows[kind, TRUTH]["passes"]["mean"] == 0
    assert (root / "out" / "all.png").stat().st_size > 1000
    for text in results["texts"]:
        assert len(text["filled"][TRUTH]) == text["given"].count("[...]") == (3 if text["kind"] == "scattered" else 1)
    assert infilling.table(results).count(f"| {REFERENCE} |") == 5 * 1


def test_an_interrupted_run_goes_on(root, results, monkeypatch, capsys):
    again = root / "again"
    again.mkdir()
    lines = (root / "out" / "all.jsonl").read_text().splitlines(keepends=True)
    (again / "all.jsonl").write_text("".join(lines[:-5]) + lines[-5][:100])  # killed while it wrote
    infilling.main(command(root, out=again / "all.json"))
    found = json.loads((again / "all.json").read_text())
    for row in (*found["rows"], *results["rows"]):
        del row["seconds"]
    assert found["rows"] == results["rows"] and found["texts"] == results["texts"]
    monkeypatch.setattr(infilling.Methods, "fill", None)  # all is there
    infilling.main(command(root, methods="EDLM", kinds="word"))
    printed = capsys.readouterr().out
    infilling.main(["--from_json", str(root / "out" / "all.json")])
    assert capsys.readouterr().out in printed and set(printed) <= set(string.printable)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"judge": "energy"}, "judge=.* is the energy itself"),
        ({"model": "none"}, "model must have an AR energy, or ar be given"),
        ({"kinds": "middle,end"}, "kinds must be of middle; .*, got 'middle,end'"),
        ({"methods": "AR"}, "methods must be of true text; .*, got 'AR'"),
        ({"window": "0.4"}, "window must be hi:lo .*0.4"),
        ({"window": "0.1:0.4"}, "energy_window must be"),
        ({"temperatures": "0"}, "temperature must be positive, got 0.0"),
        ({"start": "AR"}, "start must be MDLM or EDLM, got 'AR'"),
        ({"corrector_size": 0}, "corrector_size must be an integer of at least 1, got 0"),
        ({"drafts": -1}, "drafts must not be negative, got -1"),
        ({"num_gaps": 1}, "num_gaps must be at least 2, got 1"),
        ({"dtype": "float16"}, "dtype must be float32 or bfloat16, got 'float16'"),
        ({"out": "x.txt"}, "out must end in .json, got '.*x.txt'"),
        ({"data": ""}, "data must be given"),
    ],
)
def test_bad_arguments_are_named(root, changes, message):
    folders = {name: root / changes[name] for name in ("judge", "model") if name in changes}
    with pytest.raises(ValueError, match=message) as raised:
        infilling.main(command(root, **changes | folders))
    assert "\n" not in str(raised.value)
