"""Training an energy: what is trained, what survives a kill, a full disk and NaN, and that processes change nothing."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from peft import PeftModel
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from bench import curves, memory
from modeling_edlm import EDLMConfig, EDLMEnergyModel, EDLMForMaskedLM, EDLMModel
from modeling_edlm.adapter import checksum
from modeling_edlm.likelihood import log_mean_ratio
from support.toy import MASK, make_toy
from training import adapt, compose, train_energy
from training.common.contrast import draw_contrast, energies, nce_loss, ranking_loss
from training.common.data import character_tokenizer, read_texts
from training.common.energy_quality import calibration
from training.common.loop import make_accelerator

ROOT = Path(__file__).parents[1]
DATA = str(Path(__file__).parent / "fixtures" / "wiki27-sample.parquet")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A denoiser of two blocks with random weights, and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = EDLMConfig(
        vocab_size=28, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32
    )
    model = EDLMForMaskedLM(config)
    for parameter in model.head.linear.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.1)
    model.save_pretrained(folder)
    character_tokenizer(model_max_length=32).save_pretrained(folder)
    return str(folder)


def options(out, base, **changes) -> list[str]:
    values = {
        "base": base,
        "data": DATA,
        "validation_data": DATA,
        "output_dir": out,
        "lora_r": 2,
        "energy_target": "xs",
        "max_steps": 6,
        "batch_size": 4,
        "learning_rate": 0.01,
        "dropout": 0.1,
        "eval_steps": 3,
        "log_steps": 1,
        "eval_blocks": 8,
        "final_eval_blocks": 16,
        "eval_sequences": 4,
        "eval_num_steps": "2,4",
        "warmup_steps": 2,
        "report_to": "none",
        "num_threads": 1,
    }
    return [part for k, v in (values | changes).items() if v is not None for part in (f"--{k}", str(v))]


def adapter(run) -> dict:
    return load_file(Path(run) / "model" / "adapter_model.safetensors")


def assert_same_bits(a: dict, b: dict):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def log_of(run) -> list[dict]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def start(arguments, num_processes=1, script=None) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    what = [str(script)] if script else ["-m", "training.train_energy"]
    command = [sys.executable, *(launcher if num_processes > 1 else []), *what, *arguments]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def run_script(*args):
    process = start(*args)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


# ---- what is trained


@pytest.mark.parametrize(
    "changes", [{}, {"lora_r": 0, "head_only": "true"}, {"lora_r": 0}], ids=["lora", "head", "full"]
)
def test_a_run_trains_what_it_says_and_measures_it(base, tmp_path, changes):
    before = checksum(EDLMForMaskedLM.from_pretrained(base))
    train_energy.main(options(tmp_path, base, **changes, num_negatives=2))
    tensors = load_file(tmp_path / "checkpoint.safetensors")
    trained = {name.removeprefix("model.") for name in tensors if name.startswith("model.")}
    model = EDLMModel.from_pretrained(base).load_energy(str(tmp_path / "model"))
    assert checksum(model.denoiser) == before
    assert (model.config.energy_adapter is not None) == (changes != {"lora_r": 0})
    assert model.config.energy_num_layers == 1  # half of the blocks, for the next state
    assert any("lora_" in name for name in trained) == (not changes)
    assert any("blocks" in name and "lora_" not in name for name in trained) == (changes == {"lora_r": 0})
    quality = json.loads((tmp_path / "evaluation.json").read_text())
    assert (tmp_path / "evaluation.png").stat().st_size > 10_000
    assert quality["all"]["chance"] == pytest.approx(2 * math.log(2)) and quality["all"]["validation_blocks"] == 16
    assert 1 <= quality["all"]["ess"] <= 8 and {row["t"] for row in quality["by_t"]} <= {0.2, 0.4, 0.6, 0.8, 1.0}
    assert [row["num_steps"] for row in quality["gains"]] == [2, 4]
    assert all(row["bits_per_token"] <= row["most"] for row in quality["gains"])
    assert f"--base {base}" in quality["command"] and "--num_negatives 2" in quality["command"]
    last = log_of(tmp_path)[-1]
    assert last["gain_T4"] == quality["gains"][1]["bits_per_token"] and "ess_t<=1" in last
    # the gain in the file is that of the model in the folder
    arguments = train_energy.EnergyArguments(
        base=base, data=DATA, validation_data=DATA, output_dir=str(tmp_path), batch_size=4, report_to="none"
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    texts = train_energy.Blocks(arguments, tokenizer, 32, make_accelerator(arguments))
    x0 = torch.cat([x for x, _ in texts.validation_batches(4)])
    out = model.eval().likelihood(
        x0, num_steps=4, energy_window=(1.0, 0.0), num_samples=8, num_times=2, num_candidates=8
    )
    assert float(out.gain.mean()) / math.log(2) / 32 == pytest.approx(quality["gains"][1]["bits_per_token"], abs=1e-5)


def test_the_adapter_loads_by_peft_alone_with_its_card(base, tmp_path):
    train_energy.main(options(tmp_path, base))
    base_model = EDLMForMaskedLM.from_pretrained(base)
    energy = EDLMEnergyModel.from_denoiser(base_model, energy_target="xs", energy_num_layers=1)
    by_peft = PeftModel.from_pretrained(energy, tmp_path / "model").eval()
    x = torch.randint(0, 27, (3, 32))
    xt = x.masked_fill(torch.arange(32) % 3 == 0, 27)
    model = EDLMModel.from_pretrained(base).load_energy(str(tmp_path / "model"))
    assert torch.equal(by_peft(x, xt=xt).logits[:, 0], model.energy(x, xt)) and model.energy(x, xt).std() > 0
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"base_model: {base}\n" in card and "--lora_r 2" in card and "{" not in card


@pytest.mark.parametrize(
    "changes", [{"gradient_checkpointing": "true"}, {"gradient_accumulation_steps": 2, "batch_size": 2}]
)
def test_memory_can_be_saved_without_changing_the_weights(base, tmp_path, changes):
    """Gradient checkpointing, and two micro-batches of half the size: the same draws, the same step."""
    same = {"dropout": 0, "eval_sequences": 0}
    train_energy.main(options(tmp_path / "plain", base, **same))
    train_energy.main(options(tmp_path / "changed", base, **same | changes))
    plain, changed = adapter(tmp_path / "plain"), adapter(tmp_path / "changed")
    for name in plain:
        torch.testing.assert_close(changed[name], plain[name], atol=1e-5, rtol=1e-4)


def test_ranking_is_the_bound_of_the_sampler():
    """But for log k it is what an energy adds to the bound of k candidates: exactly, by `log_mean_ratio`."""
    generator = torch.Generator().manual_seed(0)
    data_N, proposal_NJ = (
        torch.randn(50, generator=generator).double(),
        torch.randn(50, 3, generator=generator).double(),
    )
    counters = 0, torch.arange(50), torch.zeros(50, dtype=torch.int64)
    gain_N = log_mean_ratio(-data_N[:, None], -proposal_NJ[:, None], 4, counters)
    assert float(ranking_loss(data_N, proposal_NJ)) == pytest.approx(math.log(4) - float(gain_N.mean()))
    assert float(nce_loss(data_N, proposal_NJ[:, :1])) == pytest.approx(float(nce_loss(data_N, proposal_NJ[:, 0])))


def test_calibration_of_an_energy_that_is_right():
    """Pairs drawn from the very probabilities that the energy gives lie on the diagonal; one twice as sure does not."""
    generator = torch.Generator().manual_seed(0)
    difference = 3 * torch.randn(100_000, generator=generator)
    right = torch.rand(100_000, generator=generator) < difference.abs().sigmoid()
    signed = torch.where(right, difference.abs(), -difference.abs())
    bins = calibration(signed)
    assert sum(row["pairs"] for row in bins) == 100_000
    assert all(abs(row["said"] - row["right"]) < 4 * 0.5 / math.sqrt(row["pairs"]) for row in bins)
    assert any(row["said"] - row["right"] > 0.1 for row in calibration(2 * signed))


def test_patience_keeps_the_best(base, tmp_path, monkeypatch):
    """Accuracy .6, .7, .65, .6: stops at the fourth evaluation with the weights of the second; a resumed run agrees."""
    steps, accuracies = [], {1: 0.6, 2: 0.7, 3: 0.65, 4: 0.6}
    original = train_energy.held_out

    def held_out(*args):
        quality = original(*args)
        steps.append(len(steps) + 1)
        quality["all"]["validation_accuracy"] = accuracies.get(len(steps), 0.0)
        return quality

    monkeypatch.setattr(train_energy, "held_out", held_out)
    same = {"eval_steps": 1, "eval_sequences": 0, "lr_schedule": "constant_with_warmup", "final_eval_blocks": 8}
    train_energy.main(options(tmp_path / "patient", base, **same, patience=2))
    assert len(steps) == 5 and log_of(tmp_path / "patient")[-1]["step"] == 4  # the fifth is that of what was saved
    accuracies.clear()
    train_energy.main(options(tmp_path / "two", base, **same, max_steps=2))
    assert_same_bits(adapter(tmp_path / "patient"), adapter(tmp_path / "two"))
    of_both = [json.loads((tmp_path / name / "evaluation.json").read_text())["by_t"] for name in ("patient", "two")]
    assert of_both[0] == of_both[1]
    accuracies.update({1: 0.6, 2: 0.7, 3: 0.65, 4: 0.6})
    steps.clear()
    train_energy.main(options(tmp_path / "stopped", base, **same, patience=2, max_minutes=1e-9))
    train_energy.main(options(tmp_path / "stopped", base, **same, patience=2, resume="true"))
    assert_same_bits(adapter(tmp_path / "stopped"), adapter(tmp_path / "two"))


# ---- what survives


def test_a_killed_run_resumes_to_the_same_weights(base, tmp_path):
    """kill -9 at some step after a checkpoint: the resumed run ends at the weights of the uninterrupted one."""
    same = {"max_steps": 60, "eval_steps": 60, "eval_sequences": 0, "lora_dropout": 0.1}
    process = start(options(tmp_path / "killed", base, **same, checkpoint_minutes=1e-9))
    deadline = time.monotonic() + 120
    while not ((tmp_path / "killed" / "metrics.jsonl").exists() and len(log_of(tmp_path / "killed")) > 9):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    train_energy.main(options(tmp_path / "killed", base, **same, resume="true"))
    train_energy.main(options(tmp_path / "whole", base, **same))
    assert_same_bits(adapter(tmp_path / "killed"), adapter(tmp_path / "whole"))
    assert [row["step"] for row in log_of(tmp_path / "killed")] == [row["step"] for row in log_of(tmp_path / "whole")]


def test_nan_stops_with_its_step_and_batch(base, tmp_path, monkeypatch):
    """The weights that are left are those of before, and the batch that did it is in a file."""
    original, calls = train_energy.energies, []

    def energies(*args):
        calls.append(len(calls))
        data_B, proposal_BJ = original(*args)
        return (data_B * float("nan") if calls[-1] == 3 else data_B), proposal_BJ

    monkeypatch.setattr(train_energy, "energies", energies)
    same = {"checkpoint_minutes": 1e-9, "eval_steps": 100, "eval_sequences": 0}
    with pytest.raises(FloatingPointError, match="not finite in step 3: gradient norm nan.*The batch is in .*step3"):
        train_energy.main(options(tmp_path / "run", base, **same))
    kept = load_file(tmp_path / "run" / "not-finite.step3.process0.safetensors")
    assert kept["input_ids.0"].shape == (4, 32) and kept["input_ids.0"].max() < 27
    weights = load_file(tmp_path / "run" / "checkpoint.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    monkeypatch.undo()
    AcceleratorState._reset_state(reset_partial_state=True)
    train_energy.main(options(tmp_path / "run", base, **same, resume="true"))  # goes on from before it
    AcceleratorState._reset_state(reset_partial_state=True)
    train_energy.main(options(tmp_path / "whole", base, **same))
    assert_same_bits(adapter(tmp_path / "run"), adapter(tmp_path / "whole"))


def test_a_full_disk_leaves_the_old_checkpoint(base, tmp_path):
    """Writes that fail for real, by a limit on the size of files: the run says so and goes on later where it was."""
    same = {"eval_steps": 100, "eval_sequences": 0}
    train_energy.main(options(tmp_path / "run", base, **same, max_minutes=1e-9))
    before = {name: (tmp_path / "run" / name).read_bytes() for name in ("checkpoint.safetensors",)}
    script = (
        "import resource, signal, sys; from training import train_energy\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"  # an error of the write, as a full disk gives
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))\n"
        "train_energy.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", script, *options(tmp_path / "run", base, **same, resume="true")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0 and "File too large" in result.stderr
    assert {name: (tmp_path / "run" / name).read_bytes() for name in before} == before
    assert not list((tmp_path / "run").glob("*.tmp"))
    train_energy.main(options(tmp_path / "run", base, **same, resume="true"))
    AcceleratorState._reset_state(reset_partial_state=True)
    train_energy.main(options(tmp_path / "whole", base, **same))
    assert_same_bits(adapter(tmp_path / "run"), adapter(tmp_path / "whole"))


SHARDED = """
import sys
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from training import train_energy

make_accelerator = train_energy.make_accelerator

def make_sharded(arguments):  # what the launcher does with fsdp2.yaml on GPUs; on CPUs it does not
    accelerator = make_accelerator(arguments)
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"]
    )
    accelerator.state.distributed_type = DistributedType.FSDP
    assert accelerator.is_fsdp2 and accelerator.num_processes == 2
    return accelerator

train_energy.make_accelerator = make_sharded
train_energy.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def one_process(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    train_energy.main(options(out, base, **TOGETHER))
    AcceleratorState._reset_state(reset_partial_state=True)
    return out


TOGETHER = {"dropout": 0, "eval_sequences": 0, "num_negatives": 2, "max_steps": 12, "eval_steps": 4}


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(base, one_process, tmp_path, way):
    """The same global batch: the same loss at every step, and the same adapter but for the order of sums.

    With the weights in shards a run is stopped too, and resumed.
    """
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    arguments = options(tmp_path / "two", base, **TOGETHER, batch_size=2)
    if way == "ddp":
        run_script(arguments, 2)
    else:
        run_script([*arguments, "--max_minutes", "1e-9"], 2, script)
        assert [row["step"] for row in log_of(tmp_path / "two")] == [1, 1]  # and an evaluation
        run_script([*arguments, "--resume", "true"], 2, script)
    one, two = ([row["loss"] for row in log_of(run) if "loss" in row] for run in (one_process, tmp_path / "two"))
    assert len(one) == 12 and one == pytest.approx(two, rel=1e-5)
    assert len(set(one)) >= 11  # the energy is zero in the first two: the warm-up starts at zero
    for name, value in adapter(one_process).items():
        torch.testing.assert_close(adapter(tmp_path / "two")[name], value, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["fsdp2", "deepspeed"])
def test_the_launcher_reads_its_configurations(name):
    config = load_config_from_file(str(ROOT / "training" / "launch" / f"{name}.yaml"))  # raises for an unknown key
    assert config.distributed_type.value == {"fsdp2": "FSDP", "deepspeed": "DEEPSPEED"}[name]
    text = (ROOT / "training" / "launch" / f"{name}.yaml").read_text()
    assert "What was tried" in text and "What was not tried" in text
    block = config.fsdp_config.get("fsdp_transformer_layer_cls_to_wrap", "Block")
    assert block in {type(module).__name__ for module in make_toy("none").modules()}


# ---- what is refused


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lora_r": -1}, "lora_r must not be negative, got -1"),
        ({"num_negatives": 0}, "num_negatives must be at least 1, got 0"),
        ({"loss": "gan"}, "loss must be one of .*'nce', 'ranking'.*got 'gan'"),
        ({"head_only": "true"}, "head_only trains no adapter: leave lora_r at 0, got 2"),
        ({"eval_num_steps": "x"}, "eval_num_steps must be numbers with commas between, got 'x'"),
        ({"patience": -1}, "patience must be at least 0, got -1"),
        ({"energy_num_layers": 3}, "'energy_num_layers': 3.*2 blocks"),
        ({"energy_pooling": "mean"}, "energy_target='xs' needs energy_pooling='sum'"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(base, tmp_path, changes, message):
    with pytest.raises(Exception, match=message):
        train_energy.main(options(tmp_path, base, **changes))


def test_bad_data_are_named(base, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="empty.txt: the file is empty"):
        train_energy.main(options(tmp_path / "run", base, data=tmp_path / "empty.txt"))
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ValueError, match="9 tokens do not make one block of length 32"):
        train_energy.main(options(tmp_path / "run", base, data=tmp_path / "short.txt"))


def test_a_tokenizer_of_another_size_is_refused(base, tmp_path):
    EDLMForMaskedLM.from_pretrained(base).save_pretrained(tmp_path / "wrong")
    character_tokenizer("abc", 32).save_pretrained(tmp_path / "wrong")
    with pytest.raises(ValueError, match="base has vocab_size 28, its tokenizer has 4 tokens"):
        train_energy.main(options(tmp_path / "run", str(tmp_path / "wrong")))


# ---- parts put together


def test_compose_keeps_or_merges_an_adapter(base, tmp_path):
    train_energy.main(options(tmp_path / "run", base))
    parts = ["--denoiser", base, "--energy", str(tmp_path / "run" / "model"), "--energy_type", "nce", "--out"]
    compose.main([*parts, str(tmp_path / "kept")])
    compose.main([*parts, str(tmp_path / "merged"), "--merge", "true"])
    compose.main([*parts, str(tmp_path / "alone"), "--merge", "true", "--energy_only", "true"])
    x = torch.randint(0, 27, (3, 32))
    xt = x.masked_fill(torch.arange(32) % 3 == 0, 27)
    kept, merged = (EDLMModel.from_pretrained(tmp_path / name) for name in ("kept", "merged"))
    assert (kept.config.energy_adapter, merged.config.energy_adapter) == ("energy", None)
    torch.testing.assert_close(merged.energy(x, xt), kept.energy(x, xt), atol=1e-5, rtol=1e-5)
    assert not (tmp_path / "merged" / "energy").exists()
    alone = EDLMEnergyModel.from_pretrained(tmp_path / "alone")
    assert torch.equal(alone(x, xt=xt).logits[:, 0], merged.energy(x, xt))

    # into a folder of an older composition: its weights and its adapter go, what is not of a model stays
    (tmp_path / "kept" / "notes.txt").write_text("mine")
    compose.main([*parts, str(tmp_path / "kept"), "--merge", "true", "--max_shard_size", "20KB"])
    again = EDLMModel.from_pretrained(tmp_path / "kept")
    assert torch.equal(again.energy(x, xt), merged.energy(x, xt))
    assert not list((tmp_path / "kept" / "energy").iterdir()) and (tmp_path / "kept" / "notes.txt").exists()
    assert not (tmp_path / "kept" / "model.safetensors").exists()
    compose.main([*parts, str(tmp_path / "kept")])
    again = EDLMModel.from_pretrained(tmp_path / "kept")
    assert again.config.energy_adapter == "energy" and torch.equal(again.energy(x, xt), kept.energy(x, xt))
    assert [file.name for file in (tmp_path / "kept").glob("model*.safetensors*")] == ["model.safetensors"]
    with pytest.raises(ValueError, match="run/model holds an adapter, adapter_config.json, that would be loaded too"):
        compose.main([*parts, str(tmp_path / "run" / "model")])
    with pytest.raises(ValueError, match="energy_only writes a merged adapter"):
        compose.main([*parts, str(tmp_path / "no"), "--energy_only", "true"])


def test_an_ar_energy_must_know_the_denoisers_tokens(base, tmp_path, capsys):
    """GPT-2 without the mask id over the same characters goes; the same size with other characters does not."""
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=27, n_embd=16, n_layer=1, n_head=2, n_positions=33, bos_token_id=0, eos_token_id=0)
    )
    for name, alphabet in (("same", " abcdefghijklmnopqrstuvwxyz"), ("other", "abcdefghijklmnopqrstuvwxyz ")):
        gpt2.save_pretrained(tmp_path / name)
        character_tokenizer(alphabet, 32).save_pretrained(tmp_path / name)
    gpt2.save_pretrained(tmp_path / "none")
    character_tokenizer("abc", 32).save_pretrained(tmp_path / "small")
    gpt2.save_pretrained(tmp_path / "small")

    def run(name):
        out = tmp_path / f"out-{name}"
        compose.main(f"--denoiser {base} --energy {tmp_path / name} --energy_type coar --out {out}".split())
        return EDLMModel.from_pretrained(out)

    assert run("same").generate(batch_size=2, num_steps=3, seed=0).shape == (2, 32)
    assert "has no tokenizer" not in capsys.readouterr().out
    assert run("none").energy_type == "coar" and "has no tokenizer" in capsys.readouterr().out
    with pytest.raises(ValueError, match="another tokenizer.*: id 0 is 'a' there and ' ' here.*training.pretrain"):
        run("other")
    with pytest.raises(ValueError, match="another tokenizer"):
        run("small")


# ---- what is shown


def test_adapt_in_one_command(base, tmp_path):
    """Train, bound, sample, compare; a second call measures nothing again; the tables hold what was measured."""
    data = tmp_path / "data"
    data.mkdir()
    text = "".join(read_texts(DATA))
    for i, split in enumerate(("train", "validation", "test")):
        (data / f"{split}.txt").write_text(text[i * 8000 : (i + 1) * 8000])
    train = (
        "--lora_r 2 --energy_target xs --max_steps 4 --batch_size 4 --eval_steps 2 --eval_sequences 4 --report_to none"
    )
    command = f"--base {base} --data {data} --output_dir {tmp_path / 'run'} --out {tmp_path / 'adapt.json'} "
    command += "--num_steps 2,4 --num_candidates 2 --num_sequences 4 --sample_steps 4 --num_samples 6 --num_threads 1"
    adapt.main([*command.split(), "--train", train])
    results = json.loads((tmp_path / "adapt.json").read_text())
    assert (tmp_path / "adapt.png").stat().st_size > 10_000
    rows = [row for row in results["bounds"]["rows"] if row["estimator"] == "sampler"]
    assert {(row["energy"], row["num_candidates"]) for row in rows} == {(None, 1), ("adapted", 2)}
    assert [(row["energy"], row["num_steps"]) for row in results["samples"]] == [("before", 4), ("adapted", 4)]
    assert all(0 <= d["divergence"] <= 1 for row in results["samples"] for d in row["divergences"])
    table = adapt.table(results)
    gain = next(row["gain"]["mean"] for row in rows if row["gain"] and row["num_steps"] == 4)
    assert f"{gain:+.4f}" in table and "before: MDLM" in table
    assert "--train '--lora_r 2" in results["command"] and str(tmp_path / "run") not in results["command"]
    before = (tmp_path / "run" / "checkpoint.safetensors").stat().st_mtime_ns
    adapt.main([*command.split(), "--train", train])
    assert (tmp_path / "run" / "checkpoint.safetensors").stat().st_mtime_ns == before
    again = json.loads((tmp_path / "adapt.json").read_text())
    assert again["bounds"]["rows"] == results["bounds"]["rows"]
    with pytest.raises(ValueError, match="base must be given"):
        adapt.main(["--data", str(data)])


def test_curves_of_two_runs(tmp_path):
    for name, shift in (("a", 0.0), ("b", 0.25)):
        (tmp_path / name).mkdir()
        rows = [{"step": step, "loss": 1 / step + shift * (step == 2)} for step in (1, 2, 3)] + [
            {"step": 3, "seconds": 1}
        ]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "curves.json"
    curves.main(["--runs", f"{tmp_path / 'a'},{tmp_path / 'b'}", "--names", "one,two", "--out", str(out)])
    results = json.loads(out.read_text())
    assert results["largest_difference"] == pytest.approx(0.25) and results["curves"]["one"][0] == [1, 1.0]
    assert out.with_suffix(".png").stat().st_size > 5000
    with pytest.raises(ValueError, match="names must be different, one for each"):
        curves.main(["--runs", "a,b", "--names", "one", "--out", str(out)])
    with pytest.raises(ValueError, match="'nowhere', where no 'loss' was logged"):
        curves.main(["--runs", "nowhere", "--out", str(out)])


@pytest.mark.parametrize("task", memory.TASKS)
def test_memory_counts_shared_weights_once(task):
    arguments = memory.MemoryArguments(length=16, batch_size=1, num_candidates=2, lora_r=2, only="small")
    shared, separate = (memory.measure(arguments, "small", kind, task) for kind in memory.KINDS)
    assert shared["parameters"] < separate["parameters"] and shared["bytes"] >= 0
    rows = [{"size": "small", "task": task, "kind": "shared"} | shared]
    rows.append({"size": "small", "task": task, "kind": "separate"} | separate)
    assert f"| small | {task} |" in memory.table({"rows": rows})


@pytest.mark.parametrize("target", ["x0", "xs"])
def test_negatives_stay_with_their_row(target):
    """Each energy of the one pass is that of its own text, state and time."""
    model = make_toy("nce", target, length=8)
    x0 = torch.randint(0, MASK, (16, 8), generator=torch.Generator().manual_seed(0))
    positive, negatives, xt, t, s = draw_contrast(model.denoiser, x0, torch.arange(16), 16, 3, target, 3)
    data, proposal = energies(model.energy_model, positive, negatives, xt, t, s)
    time = t if target == "x0" else s
    torch.testing.assert_close(data, model.energy(positive, xt, time))
    for j in range(3):
        torch.testing.assert_close(proposal[:, j], model.energy(negatives[:, j], xt, time))
    assert proposal.shape == (16, 3) and len(proposal.unique()) > 6  # they are told apart


def test_negatives_of_a_row_do_not_depend_on_the_batch():
    """Whatever process and micro-batch a row is in: times, masks and proposals are those of its number."""
    model = make_toy("none", length=8).denoiser
    x0 = torch.randint(0, MASK, (8, 8))
    whole = train_energy.draw_contrast(model, x0, torch.arange(8), 8, 5, "xs", 2)
    parts = [
        train_energy.draw_contrast(model, x0[i : i + 2], torch.arange(i, i + 2), 8, 5, "xs", 2) for i in range(0, 8, 2)
    ]
    for a, b in zip(whole, map(torch.cat, zip(*parts, strict=True)), strict=True):
        assert torch.equal(a, b)
