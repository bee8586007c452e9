"""Training scripts end to end on little text: they resume exactly, refuse bad input, and learn what they should."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hub_cards.publish import cards
from modeling_edlm import EDLMEnergyModel, EDLMForCausalLM, EDLMForMaskedLM, EDLMModel
from modeling_edlm.backbone import Block
from support.toy import MASK, completions, log_mu, make_toy
from training import compose, pretrain, report, train_energy
from training.common.arguments import parse_arguments
from training.common.contrast import LOSSES, contrast, energies, step_times
from training.common.data import character_tokenizer
from training.common.loop import row_draws
from training.common.results import read_lines

DATA = str(Path(__file__).parent / "fixtures" / "wiki27-sample.parquet")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    character_tokenizer(model_max_length=32).save_pretrained(folder)
    return str(folder)


def options(out, tokenizer=None, **changes) -> list[str]:
    values = {
        "data": DATA,
        "validation_data": DATA,
        "output_dir": out,
        "max_steps": 6,
        "batch_size": 4,
        "eval_steps": 3,
        "log_steps": 1,
        "eval_blocks": 8,
        "final_eval_blocks": 8,
        "warmup_steps": 2,
        "report_to": "none",
        "num_threads": 1,
    }
    if tokenizer:
        values |= {"tokenizer": tokenizer, "length": 32, "hidden_size": 16, "num_hidden_layers": 1}
        values |= {"num_attention_heads": 2, "dropout": 0.1}
    return [part for k, v in (values | changes).items() for part in (f"--{k}", str(v))]


@pytest.fixture(scope="module")
def trained(tokenizer, tmp_path_factory):
    """A denoiser, an AR model and an energy of six steps each."""
    runs = tmp_path_factory.mktemp("runs")
    pretrain.main(options(runs / "ar", tokenizer, objective="ar"))
    pretrain.main(options(runs / "denoiser", tokenizer, init_from=runs / "ar" / "model"))
    train_energy.main(options(runs / "energy", base=runs / "denoiser" / "model"))
    return runs


def weights(run) -> dict:
    return load_file(Path(run) / "model" / "model.safetensors")


def assert_same_bits(a: dict, b: dict):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("objective", ["mdlm", "ar"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_stopped_run_resumes_to_the_same_weights(tokenizer, tmp_path, objective, precision):
    """Bit for bit: weights, average and optimizer, with dropout, EMA, accumulation and a cosine schedule."""
    same = {"objective": objective, "mixed_precision": precision, "gradient_accumulation_steps": 2}
    pretrain.main(options(tmp_path / "whole", tokenizer, **same))
    stopped = tmp_path / "stopped"
    pretrain.main(options(stopped, tokenizer, **same, max_minutes=1e-9))  # saves and stops after one step
    rows = [json.loads(line) for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1]
    pretrain.main(options(stopped, tokenizer, **same, resume="true"))
    assert_same_bits(weights(stopped), weights(tmp_path / "whole"))
    resumed, whole = (load_file(run / "checkpoint.safetensors") for run in (stopped, tmp_path / "whole"))
    assert_same_bits(resumed, whole)


def test_an_energy_run_resumes_to_the_same_weights(trained, tmp_path):
    base = trained / "denoiser" / "model"
    stopped = tmp_path / "stopped"
    train_energy.main(options(stopped, base=base, max_minutes=1e-9))
    train_energy.main(options(stopped, base=base, resume="true"))
    assert_same_bits(weights(stopped), weights(trained / "energy"))


def test_a_terminated_process_saves_and_resumes(tokenizer, tmp_path):
    """SIGTERM in the middle: the checkpoint is written, and the resumed run ends at the uninterrupted weights."""
    same = {"max_steps": 400, "eval_steps": 400}
    command = [sys.executable, "-m", "training.pretrain", *options(tmp_path / "killed", tokenizer, **same)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stderr=subprocess.DEVNULL)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 5):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    steps = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert 5 <= steps < 400 and (tmp_path / "killed" / "checkpoint.safetensors").exists()
    pretrain.main(options(tmp_path / "killed", tokenizer, **same, resume="true"))
    pretrain.main(options(tmp_path / "whole", tokenizer, **same))
    assert_same_bits(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


def test_a_checkpoint_is_never_overwritten_or_misread(tokenizer, tmp_path):
    out = tmp_path / "run"
    pretrain.main(options(out, tokenizer, max_minutes=1e-9))
    with pytest.raises(ValueError, match="output_dir has a checkpoint.*--resume"):
        pretrain.main(options(out, tokenizer))
    with pytest.raises(ValueError, match="made with learning_rate=0.001, got 0.5"):
        pretrain.main(options(out, tokenizer, resume="true", learning_rate=0.5))
    path = out / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="checkpoint.safetensors is corrupted"):
        pretrain.main(options(out, tokenizer, resume="true"))


def test_a_checkpoint_killed_while_written_leaves_the_old_one(tokenizer, tmp_path, monkeypatch):
    from training.common import checkpoint

    out = tmp_path / "run"
    pretrain.main(options(out, tokenizer, max_minutes=1e-9))
    before = (out / "checkpoint.safetensors").read_bytes()

    def killed(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save_file", killed)
        pretrain.main(options(out, tokenizer, resume="true"))
    assert (out / "checkpoint.safetensors").read_bytes() == before
    pretrain.main(options(out, tokenizer, resume="true"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"ema_decay": 1.0}, r"ema_decay .* 1\.0"),
        ({"max_grad_norm": 0}, r"max_grad_norm must be greater than 0 \(inf: no limit\), got 0\.0"),
        ({"max_grad_norm": "nan"}, "max_grad_norm must be greater than 0 .*got nan"),
        ({"learning_rate": -1e-3}, r"learning_rate must be at least 0, got -0\.001"),
        ({"learning_rate": "nan"}, "learning_rate must be at least 0, got nan"),
        ({"weight_decay": -1}, r"weight_decay must be at least 0, got -1\.0"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"adam_beta2": 1}, r"adam_beta2 must lie in \[0, 1\), got 1\.0"),
        ({"checkpoint_minutes": -1}, r"checkpoint_minutes must be at least 0, got -1\.0"),
        ({"report_to": "wandb"}, "report_to must be trackio, none or auto, got 'wandb'"),
        ({"eval_blocks": 1}, "eval_blocks must be at least 2, got 1"),
        ({"final_eval_blocks": 0}, "final_eval_blocks must be at least 2, got 0"),
        ({"document_stride": 0}, "document_stride must be at least 1, got 0"),
        ({"data": "nothing/at/all"}, "data: no such file or folder: nothing/at/all"),
        ({"validation_data": "./none*.txt"}, r"validation_data: no such file or folder: ./none\*.txt"),
        ({"text_column": ""}, "text_column must not be empty, got ''"),
        ({"data": ""}, "data must not be empty, got ''"),
        ({"data": " "}, "data must not be empty, got ' '"),
        ({"init_from": "runs/no/model"}, "init_from must be a folder or a repo, and there is no 'runs/no/model' here"),
        ({"init_from": "./no"}, "init_from must be a folder or a repo, and there is no './no' here"),
        ({"init_from": "tests/no"}, "init_from must be a folder or a repo, and there is no 'tests/no' here"),
        ({"lr_schedule": "step"}, "lr_schedule .*'step'"),
        ({"mixed_precision": "fp8"}, "mixed_precision .*'fp8'"),
        ({"objective": "gan"}, "objective .*'gan'"),
        ({"length": 10**6}, "do not make one block of length 1000000"),
        ({"validation_data": ""}, "validation_data must be given"),
        ({"data": "missing.parquet"}, "missing.parquet"),
        ({"hidden_size": 15}, "hidden_size"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(tokenizer, tmp_path, changes, message):
    with pytest.raises(Exception, match=message):
        pretrain.main(options(tmp_path / "run", tokenizer, **changes))


def test_an_output_folder_holds_no_other_model(tokenizer, tmp_path):
    """What is there would be deleted or written into."""
    (tmp_path / "a" / "model").mkdir(parents=True)
    with pytest.raises(ValueError, match="output_dir .*/a has a model that was not trained there: name another"):
        pretrain.main(options(tmp_path / "a", tokenizer))
    (tmp_path / "a" / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="output_dir .*/a/model is the folder of a model: name another one"):
        pretrain.main(options(tmp_path / "a" / "model", tokenizer))
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "model", "config.json"]
    with pytest.raises(ValueError, match="out must be another folder than ar, which is only read, got .*a/model"):
        model = str(tmp_path / "a" / "model")
        compose.main(["--denoiser", tokenizer, "--ar", model, "--out", model])


def test_a_failed_evaluation_loses_no_step(tokenizer, tmp_path, monkeypatch):
    """At a step on the way, and at the last one: what was trained is there, and resuming makes the evaluation up."""
    pretrain.main(options(tmp_path / "whole", tokenizer, max_steps=4, eval_steps=2))
    run = options(tmp_path / "run", tokenizer, max_steps=4, eval_steps=2)
    evaluate, allowed = pretrain.validation_nll, iter([False, True, False])
    for more in ([], ["--resume", "true"]):  # fails at step 2; resumed, is made up, and fails at step 4
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(pretrain, "validation_nll", lambda *a: evaluate(*a) if next(allowed) else 1 / 0)
            pretrain.main([*run, *more])
        assert (tmp_path / "run" / "model" / "config.json").exists()
    pretrain.main([*run, "--resume", "true"])
    assert_same_bits(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    found = []
    for name in ("run", "whole"):
        rows = read_lines(tmp_path / name / "metrics.jsonl")
        found.append([(row["step"], row["validation_nll"]) for row in rows if "seconds" in row])
    assert found[0] == found[1] and [step for step, _ in found[0]] == [2, 4]


def test_a_loss_that_is_not_finite_stops_the_run(tokenizer, tmp_path):
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        pretrain.main(options(tmp_path, tokenizer, learning_rate=1e30, max_grad_norm=1e30, warmup_steps=0))


def test_options_from_yaml(tokenizer, tmp_path):
    config = tmp_path / "run.yaml"
    values = dict(zip(*[iter(options(tmp_path / "run", tokenizer))] * 2, strict=True))
    config.write_text("\n".join(f"{k.removeprefix('--')}: {v}" for k, v in values.items()))
    pretrain.main(["--config", str(config), "--max_steps", "2"])
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2


def test_values_in_yaml(tokenizer, tmp_path):
    """Nothing is no value, and a list is one with commas."""
    config = tmp_path / "run.yaml"
    config.write_text("seed:\nmax_steps: 2\n")
    with pytest.raises(ValueError, match="config .*run.yaml: seed has no value"):
        parse_arguments(pretrain.PretrainArguments, "", [*options(tmp_path, tokenizer), "--config", str(config)])
    config.write_text("eval_num_steps: [4, 16]\n")
    asked = ["--base", tokenizer, "--data", DATA, "--output_dir", str(tmp_path / "no"), "--config", str(config)]
    assert parse_arguments(train_energy.EnergyArguments, "", asked).listed("eval_num_steps", int) == [4, 16]


def test_several_processes_train(tokenizer, tmp_path):
    """Two gloo processes with half the batch each see the same data as one process with all of it."""
    same = {"objective": "ar", "dropout": 0}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "training.pretrain", *options(tmp_path / "two", tokenizer, batch_size=2, **same)]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=Path(__file__).parents[1], env=env, check=True, capture_output=True)
    pretrain.main(options(tmp_path / "one", tokenizer, **same))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=1e-3)


def test_trained_parts_make_a_repo(trained, tmp_path):
    out = tmp_path / "repo"
    compose.main(
        ["--denoiser", str(trained / "denoiser/model"), "--energy", str(trained / "energy/model"), "--out", str(out)]
        + ["--energy_type", "nce", "--ar", str(trained / "ar/model"), "--generation", "{num_steps: 7}"]
    )
    model = EDLMModel.from_pretrained(out)
    assert model.generation_config.num_steps == 7 and model.energy_type == "nce"
    assert_same_bits(EDLMForMaskedLM.from_pretrained(out).state_dict(), weights(trained / "denoiser"))
    assert_same_bits(EDLMEnergyModel.from_pretrained(out).state_dict(), weights(trained / "energy"))
    assert_same_bits(EDLMForCausalLM.from_pretrained(out, subfolder="ar").state_dict(), weights(trained / "ar"))
    assert not list((out / "ar").glob("*.py")) and (out / "modeling_edlm.py").exists()
    compose.main(
        ["--denoiser", str(trained / "denoiser/model"), "--energy", str(trained / "ar/model"), "--energy_type", "coar"]
        + ["--out", str(tmp_path / "coar")]
    )
    assert EDLMModel.from_pretrained(tmp_path / "coar").generate(seed=0, num_steps=3).shape == (1, 32)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_is_stored_and_loads_as_float32(trained, tmp_path, precision):
    """A folder's weights are rounded; all else is what it is with float32 weights."""
    half, parts = getattr(torch, precision), {"denoiser": "denoiser", "energy": "energy", "ar": "ar", "judge": "ar"}
    parts = [part for k, v in parts.items() for part in (f"--{k}", str(trained / v / "model"))]
    for dtype in ("float32", precision):
        compose.main([*parts, "--dtype", dtype, "--out", str(tmp_path / dtype)])
    for folder, kind in (("", EDLMModel), ("ar", EDLMForCausalLM), ("judge", EDLMForCausalLM)):
        whole, out = tmp_path / "float32" / folder, tmp_path / precision / folder
        rounded = {name: value.to(half) for name, value in load_file(whole / "model.safetensors").items()}
        assert_same_bits(load_file(out / "model.safetensors"), rounded)
        assert (out / "config.json").read_bytes() == (whole / "config.json").read_bytes()
        model = kind.from_pretrained(out)
        assert {value.dtype for value in model.parameters()} == {torch.float32}
        assert_same_bits(model.state_dict(), {name: value.float() for name, value in rounded.items()})
        assert {value.dtype for value in kind.from_pretrained(out, dtype=half).parameters()} == {half}


def test_report_and_card(trained, tmp_path):
    """From three runs to a folder, its results file, its plot and its card."""
    folder = tmp_path / "edlm-tiny"
    parts = {"denoiser": "denoiser", "energy": "energy", "ar": "ar"}
    compose.main(
        [part for k, v in parts.items() for part in (f"--{k}", str(trained / v / "model"))] + ["--out", str(folder)]
    )
    settings = "--num_steps 2,4 --window_lows 0,0.5 --num_candidates 2 --num_samples 4"
    report.main(["--model", str(folder), "--runs", str(trained), "--data", DATA, *settings.split()])
    results = json.loads((tmp_path / "results" / "edlm-tiny.json").read_text())
    assert (tmp_path / "results" / "edlm-tiny.png").stat().st_size > 1000
    assert [row["sampler"] for row in results["samplers"]] == ["MDLM", "EDLM"] * 2
    assert results["samplers"][0]["energy_nfe"] == 0 < results["samplers"][1]["energy_nfe"] <= 4
    assert results["training"]["denoiser"]["tokens"] == 6 * 4 * 32
    assert "--init_from" in results["training"]["denoiser"]["command"]
    cards.main([str(folder)])
    card = (folder / "README.md").read_text()
    bits = results["training"]["ar"]["last_evaluation"]["validation_bits_per_token"]
    assert f"**{bits:.3f}**" in card and results["samples"]["EDLM"][2] in card
    assert card.startswith("---\nlibrary_name: transformers") and "{{" not in card and "{%" not in card
    assert "wiki27" not in card.replace(Path(DATA).name, "") and f"`{Path(DATA).name}`" in card
    files = cards.published(folder, "user/tiny")
    assert files["results/edlm-tiny.json"] == (tmp_path / "results" / "edlm-tiny.json").read_bytes()
    assert b"](https://huggingface.co/user/tiny/blob/main/results/edlm-tiny.json)" in files["README.md"]
    assert b'from_pretrained("user/tiny"' in files["README.md"] and b"this folder" not in files["README.md"]


def test_the_losses_are_what_they_are_called(trained):
    """mdlm: averaged over t and masks it is the exact bound; ar: the negative log-likelihood."""
    model = make_toy("none")
    x0, t = torch.tensor([[0, 2, 1]]), 0.6
    exact = 0.0
    for masked in [m for m in torch.cartesian_prod(*[torch.arange(2)] * 3).bool() if m.any()]:
        xt = torch.where(masked, MASK, x0)
        log_p = model.log_p_x0(xt, t).gather(-1, x0[..., None])[0, :, 0]
        probability = t ** int(masked.sum()) * (1 - t) ** int((~masked).sum())
        exact += probability * float(-log_p.detach()[masked].sum()) / t
    n = 50_000
    with torch.no_grad():
        loss_N = pretrain.mdlm_loss(model, x0.expand(n, -1), torch.full((n,), t), torch.rand(n, 3), MASK)
    assert abs(float(loss_N.mean()) - exact) < 4 * float(loss_N.std()) / math.sqrt(n)

    q = (torch.arange(n) + 0.5) / n  # strata of (0, 1): as uniforms, with less noise
    with torch.no_grad():  # the bound by times of another density
        plain_N = pretrain.mdlm_loss(model, x0.expand(n, -1), q, torch.rand(n, 3), MASK)
        loss_N = pretrain.mdlm_training_loss(model, x0.expand(n, -1), q, torch.rand(n, 3), MASK)
    stderr = math.sqrt(float(plain_N.var() + loss_N.var()) / n)
    assert abs(float(plain_N.mean() - loss_N.mean())) < 4 * stderr < 0.1 * float(loss_N.mean())

    lm = EDLMForCausalLM.from_pretrained(trained / "ar" / "model")
    x = torch.tensor([[3, 1, 4]])
    nll = pretrain.ar_loss(lm, x, lm.config.bos_token_id, lm.config.mask_token_id)
    logits = lm(torch.tensor([[27, 3, 1]])).logits[..., :27]
    torch.testing.assert_close(nll, torch.nn.functional.cross_entropy(logits[0], x[0], reduction="none")[None])


def test_step_energy_times_are_those_of_a_sampler():
    t, u = row_draws(0, 1000, 8)
    t, s = step_times(t, 1, "xs")
    assert (s >= 0).all() and (t <= 1).all() and (t > s).all()
    steps = 1 / (t - s)
    torch.testing.assert_close(steps, steps.round(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(t * steps, (t * steps).round(), rtol=1e-3, atol=1e-3)
    x0 = torch.randint(0, 3, (1000, 8), generator=torch.Generator().manual_seed(0))
    model = make_toy("nce", "xs", length=8)
    positive, negatives, xt = contrast(model.denoiser, x0, t, s, u, 0, num_negatives=2)
    revealed = (xt == MASK) & (positive != MASK)
    assert torch.equal(positive[revealed], x0[revealed])
    for negative in negatives.unbind(1):
        assert torch.equal(positive == MASK, negative == MASK)
        assert torch.equal(positive[~revealed], negative[~revealed])
    assert not torch.equal(*negatives.unbind(1))
    assert float(revealed.sum() / (xt == MASK).sum()) == pytest.approx(float((t - s).sum() / t.sum()), abs=0.03)


@pytest.mark.parametrize("target, loss, num_negatives", [("x0", "nce", 1), ("xs", "nce", 3), ("xs", "ranking", 3)])
def test_nce_finds_log_mu_minus_log_q(target, loss, num_negatives):
    """On a toy language of three tokens the trained energy approaches its optimum, at every completion of a state.

    Ranking leaves a constant free that no choice among candidates depends on.
    """
    model = make_toy("nce", target, seed=2, dropout=0.0)
    for parameter in model.denoiser.head.linear.parameters():
        parameter.data *= 0.1  # a proposal that covers the language, as a trained one does
    torch.manual_seed(0)
    language = torch.randn(27).mul(1.5).softmax(0)
    texts = torch.tensor(completions((MASK,) * 3, (0, 1, 2)))
    state, t = (MASK, 1, MASK), 0.7
    s = None if target == "x0" else 0.0  # revealing all: the next state is a full text
    energy = model.energy_model.train()
    optimizer = torch.optim.Adam(energy.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1200)
    rows = 1024 // (1 + num_negatives)
    xt = torch.tensor([state]).expand(rows, -1)
    times = torch.full((rows,), t if s is None else s)
    consistent = (texts[:, 1] == 1).float() * language

    def network(x, xt, t):  # the same energies and gradients: each of the nine texts goes through it once
        x, which = x.unique(dim=0, return_inverse=True)
        return SimpleNamespace(logits=energy(x, xt=xt[: len(x)], t=t[: len(x)]).logits[which])

    for _ in range(1200):
        x0 = texts[torch.multinomial(consistent, rows, replacement=True)]
        counters = int(torch.randint(2**62, ())), torch.arange(rows), 0
        x_BKL = model.denoiser.propose(xt, xt == MASK, num_negatives, counters, t).x_NKL
        optimizer.zero_grad()
        LOSSES[loss](*energies(network, x0, x_BKL, xt, times, None)).backward()
        optimizer.step()
        schedule.step()
    candidates = torch.tensor(completions(state, (0, 2)))
    q = torch.stack([consistent[(texts == x).all(-1)].sum() for x in candidates])
    optimum = log_mu(model, state, t, (0, 2)) - (q / q.sum()).log().double()
    with torch.no_grad():
        learned = model.eval().energy(candidates, torch.tensor([state]).expand(9, -1), float(times[0])).double()
    mu = log_mu(model, state, t, (0, 2)).exp()
    if loss == "ranking":
        learned = learned + (mu * (optimum - learned)).sum()
    assert float(optimum.std()) > 0.5  # there is something to learn
    assert float((mu * (learned - optimum).abs()).sum()) < 0.1
    corrected = (mu.log() - learned).softmax(0)
    assert float((corrected - q / q.sum()).abs().sum()) / 2 < 0.03 < float((mu - q / q.sum()).abs().sum()) / 2


@pytest.mark.parametrize("script", ["pretrain", "train_energy"])
def test_compiled_blocks_train_to_the_same_weights(tokenizer, tmp_path, monkeypatch, script):
    """Through torch.compile, but for its code generator, which needs a C++ compiler; evaluations stay as they are."""
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    if script == "train_energy":
        pretrain.main(options(tmp_path / "base", tokenizer, num_hidden_layers=2, max_steps=1))
    monkeypatch.setattr(Block, "compile", lambda block: torch.nn.Module.compile(block, backend=backend, fullgraph=True))
    for name in ("false", "true"):
        out = tmp_path / name
        if script == "pretrain":
            pretrain.main(options(out, tokenizer, num_hidden_layers=2, dropout=0, compile=name))
        else:
            form = {"lora_r": 2, "energy_target": "xs", "energy_num_layers": 2}
            train_energy.main(options(out, base=tmp_path / "base" / "model", **form, compile=name))
        assert bool(calls) == (name == "true")
    plain, compiled = (load_file(next((tmp_path / n / "model").glob("*model.safetensors"))) for n in ("false", "true"))
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("form", "wrong"),
    [
        (
            {"lora_r": 2},
            {
                "has energy_pooling='sum', this energy has 'mean'": {"energy_pooling": "mean"},
                "init_from must be an adapter": {"init_from": "denoiser"},
                "was trained over": {"base": "wide"},
                "does not fit": {"lora_r": 3},
            },
        ),
        (
            {"energy_target": "xs", "energy_num_layers": 1},
            {
                "has energy_target='xs', this energy has 'x0'": {"energy_target": "x0"},
                "has other sizes": {"base": "wide"},
            },
        ),
    ],
    ids=["lora", "whole"],
)
def test_an_energy_goes_on_from_another(tokenizer, trained, tmp_path, form, wrong):
    """With no step of its own it is the energy that it started from; another form or base is refused."""
    pretrain.main(options(tmp_path / "wide", tokenizer, hidden_size=32, max_steps=1))
    folders = {"denoiser": trained / "denoiser" / "model", "wide": tmp_path / "wide" / "model"}
    same = form | {"base": folders["denoiser"], "ema_decay": 0}
    train_energy.main(options(tmp_path / "first", **same))
    same |= {"init_from": tmp_path / "first" / "model", "learning_rate": 0, "max_steps": 1}
    train_energy.main(options(tmp_path / "second", **same))
    before, after = (load_file(next((tmp_path / n / "model").glob("*model.safetensors"))) for n in ("first", "second"))
    assert_same_bits(before, after)
    for message, changes in wrong.items():
        changes = {name: folders.get(value, value) for name, value in changes.items()}
        with pytest.raises(ValueError, match=message):
            train_energy.main(options(tmp_path / "wrong", **same | changes))
