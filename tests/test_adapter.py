"""An energy that is a LoRA adapter over the denoiser's own blocks: exact, shared, saved, loaded, refused elsewhere."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from modeling_edlm import EDLMEnergyModel, EDLMForMaskedLM, EDLMModel
from modeling_edlm.adapter import DESCRIPTION, WEIGHTS, add_lora, checksum, save_adapter
from modeling_edlm.backbone import twin
from support.toy import MASK, chain_law, completions, law_p_k, make_toy, p_value

KINDS = [{"energy_target": "x0", "energy_pooling": "mean"}, {"energy_target": "x0"}, {"energy_target": "xs"}]
KINDS = [*KINDS, {"energy_target": "xs", "energy_num_layers": 1}]


def denoiser_of(length=3, layers=2, seed=0) -> EDLMForMaskedLM:
    return make_toy("none", length=length, num_hidden_layers=layers, seed=seed).denoiser


def adapted(denoiser, rank=3, std=0.45, **fields):
    """A `PeftModel` over the denoiser whose trained part is random and far from zero."""
    model = add_lora(EDLMEnergyModel.from_denoiser(denoiser, share_weights=True, **fields), rank).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_(1.0 if "norm.weight" in name else 0.0, std, generator=generator)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folders `base` and `adapter`, and what the adapter gives for some texts."""
    root = tmp_path_factory.mktemp("adapter")
    denoiser = denoiser_of(length=8)
    denoiser.save_pretrained(root / "base")
    model = adapted(denoiser, energy_target="xs", energy_num_layers=1)
    save_adapter(root / "adapter", model, denoiser, str(root / "base"))
    x = torch.randint(0, MASK, (5, 8), generator=torch.Generator().manual_seed(2))
    xt = x.masked_fill(torch.arange(8) % 2 == 0, MASK)
    with torch.no_grad():
        energy = model(x, xt=xt, t=0.3).logits[:, 0]
    assert energy.std() > 0.1
    return root, (x, xt, 0.3), energy


# ---- the denoiser stays what it is


def test_a_twin_has_the_same_weights_and_a_life_of_its_own():
    denoiser = denoiser_of().train()
    other = twin(denoiser.backbone)
    assert all(a is b for a, b in zip(other.parameters(), denoiser.backbone.parameters(), strict=True))
    other.eval()
    other.blocks[0].fc1 = torch.nn.Identity()
    other.register_forward_hook(lambda *_: 1 / 0)
    assert denoiser.backbone.blocks[0].dropout.training and isinstance(denoiser.backbone.blocks[0].fc1, torch.nn.Linear)
    denoiser.backbone(torch.tensor([[0, 1, 2]]))
    denoiser.backbone.blocks[0].forward = lambda *_: None  # as accelerate's hooks do
    with pytest.raises(ValueError, match="forward of a Block was replaced"):
        twin(denoiser.backbone)


@torch.no_grad()  # with gradients the products are another library's
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_denoiser_is_the_same_bit_for_bit(kind):
    """While the adapter is there and while it is used, after it has raised, and after `generate()` with it."""
    denoiser = denoiser_of(length=8)
    xt = torch.randint(0, MASK + 1, (6, 8), generator=torch.Generator().manual_seed(0))
    before = denoiser.log_p_x0(xt, 0.6)
    weights = {name: value.clone() for name, value in denoiser.state_dict().items()}
    energy = adapted(denoiser, **kind).get_base_model()
    model = EDLMModel.from_components(denoiser, energy, "nce").eval()
    x = model.generate(xt, num_steps=3, num_candidates=4, energy_window=(1.0, 0.0), seed=0)
    seen = []
    layer = energy.network.backbone.blocks[0].fc1  # LoRA's
    hook = layer.register_forward_hook(lambda *_: seen.append(denoiser.log_p_x0(xt, 0.6)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):  # in the middle of the energy's pass
        model.energy(x, xt, 0.6)
    hook.remove()
    for now in (*seen, denoiser.log_p_x0(xt, 0.6)):
        assert torch.equal(now, before)
    assert len(seen) == 1 and all(torch.equal(value, weights[name]) for name, value in denoiser.state_dict().items())


def test_there_is_one_copy_of_the_blocks():
    denoiser = denoiser_of()
    energy = adapted(denoiser, rank=2).get_base_model()
    model = EDLMModel.from_components(denoiser, energy, "nce")
    theirs = {p.data_ptr() for p in denoiser.backbone.parameters()}
    assert theirs <= {p.data_ptr() for p in energy.parameters()}
    own = [p for p in energy.parameters() if p.data_ptr() not in theirs]
    separate = EDLMEnergyModel.from_denoiser(denoiser)
    extra = sum(p.numel() for p in model.parameters()) - denoiser.num_parameters()
    assert extra == sum(p.numel() for p in own) < separate.num_parameters()
    moved = model.to(torch.bfloat16)
    assert moved.energy_model.network.backbone.embedding.weight is moved.denoiser.backbone.embedding.weight


@pytest.mark.parametrize("rank", [0, 2])
def test_only_adapter_and_head_are_trained(rank):
    denoiser = denoiser_of(length=8)
    model = adapted(denoiser, rank=rank)
    x = torch.randint(0, MASK, (3, 8))
    model(x, xt=torch.full_like(x, MASK), t=1.0).logits.sum().backward()
    graded = {name for name, p in model.named_parameters() if p.grad is not None}
    heads = tuple(f"network.{name}.modules_to_save" for name in ("projection", "head", "fc1", "fc2"))
    assert graded and all("lora_" in name or any(head in name for head in heads) for name in graded)
    assert any("lora_" in name for name in graded) == bool(rank)
    assert all(p.grad is None for p in denoiser.parameters())
    with pytest.raises(ValueError, match="rank must not be negative, got -1"):
        add_lora(EDLMEnergyModel.from_denoiser(denoiser, share_weights=True), -1)


# ---- the law


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_samples_follow_the_law(kind):
    """The same enumeration as for any energy, p_k over what is revealed; 20,000 samples, an error of 1e-4."""
    denoiser = denoiser_of(layers=1)
    model = EDLMModel.from_components(denoiser, adapted(denoiser, **kind).get_base_model(), "nce").eval()
    free, k = (MASK,) * 3, 3
    samples = model.generate(batch_size=20_000, num_steps=2, num_candidates=k, energy_window=(1.0, 0.0), seed=0)
    assert p_value(samples, chain_law(model, free, 2, k)) > 1e-4
    assert p_value(samples, chain_law(model, free, 2, k, law=lambda mu, e, k: law_p_k(mu, -e, k))) < 1e-12


def test_threads_do_not_disturb_each_other():
    """Two threads generate while a third scores: what each gets is what it gets alone."""
    denoiser = denoiser_of(length=8)
    model = EDLMModel.from_components(denoiser, adapted(denoiser, energy_target="xs").get_base_model(), "nce").eval()
    options = {"batch_size": 4, "num_steps": 8, "num_candidates": 4, "energy_window": (1.0, 0.0)}
    text = torch.randint(0, MASK, (4, 8))

    def generate(seed):
        return lambda: model.generate(seed=seed, **options)

    def score():
        return model.likelihood(text, num_steps=4, num_candidates=4, energy_window=(1.0, 0.0), num_times=4).nll

    jobs, results = [generate(0), generate(1), score], [[], [], []]
    alone = [job() for job in jobs]

    def work(i):
        for _ in range(8):
            results[i].append(jobs[i]())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, got in zip(alone, results, strict=True):
        assert len(got) == 8 and all(torch.equal(value, expected) for value in got)


# ---- folders


@torch.no_grad()
def test_an_adapter_loads_four_ways(folders, tmp_path):
    """By `load_energy`, by its own name through AutoModel, by PEFT's own loader, and merged, which needs no PEFT."""
    root, inputs, energy = folders
    x, xt, t = inputs
    model = EDLMModel.from_pretrained(root / "base").load_energy(str(root / "adapter"))
    assert (model.config.energy_target, model.config.energy_num_layers) == ("xs", 1)
    assert torch.equal(model.energy(*inputs), energy)
    again = EDLMModel.from_pretrained(root / "base").load_energy(str(root / "adapter"))
    assert checksum(again) == checksum(model)  # nothing in it is drawn at random
    assert torch.equal(AutoModel.from_pretrained(root / "adapter").energy(*inputs), energy)
    base = EDLMForMaskedLM.from_pretrained(root / "base")
    own = EDLMEnergyModel.from_denoiser(base, energy_target="xs", energy_num_layers=1)
    assert torch.equal(PeftModel.from_pretrained(own, root / "adapter").eval()(x, xt=xt, t=t).logits[:, 0], energy)
    before = checksum(base)
    merged = EDLMEnergyModel.from_adapter(base, str(root / "adapter"), merge=True)
    merged.save_pretrained(tmp_path / "merged")
    assert checksum(base) == before
    assert not any("lora" in name for name in load_file(tmp_path / "merged" / "model.safetensors"))
    alone = EDLMEnergyModel.from_pretrained(tmp_path / "merged")
    scale = float(energy.abs().max())  # an energy is a sum of scalars that may cancel
    torch.testing.assert_close(alone(x, xt=xt, t=t).logits[:, 0], energy, atol=1e-5 * scale, rtol=0)
    other = EDLMModel.from_pretrained(root / "base").load_energy(str(tmp_path / "merged"))  # a network of its own
    assert other.config.energy_adapter is None
    torch.testing.assert_close(other.energy(*inputs), energy, atol=1e-5 * scale, rtol=0)


@torch.no_grad()
def test_a_whole_model_keeps_its_adapter(folders, tmp_path):
    root, inputs, energy = folders
    model = EDLMModel.from_pretrained(root / "base").load_energy(str(root / "adapter"))
    model.save_pretrained(tmp_path / "whole")
    names = load_file(tmp_path / "whole" / "model.safetensors").keys()
    assert all(name.startswith("denoiser.") for name in names)  # the blocks are there once
    loaded = EDLMModel.from_pretrained(pretrained_model_name_or_path=tmp_path / "whole")
    assert torch.equal(loaded.energy(*inputs), energy)
    options = {"batch_size": 3, "num_steps": 4, "energy_window": (1.0, 0.0), "seed": 0}
    assert torch.equal(loaded.generate(**options), model.generate(**options))
    with pytest.raises(ValueError, match="push_to_hub=True would leave the adapter behind"):
        model.save_pretrained(tmp_path / "no", push_to_hub=True)
    with pytest.raises(ValueError, match="this energy is an adapter: save the EDLMModel"):
        model.energy_model.save_pretrained(tmp_path / "no")
    moved = tmp_path / "elsewhere"
    shutil.move(tmp_path / "whole", moved)  # nothing in it says where it was
    assert torch.equal(EDLMModel.from_pretrained(moved).energy(*inputs), energy)
    assert checksum(EDLMForMaskedLM.from_pretrained(moved)) == checksum(model.denoiser)
    with pytest.raises(ValueError, match="EDLMEnergyModel loads no adapter, got energy_adapter='energy'"):
        EDLMEnergyModel.from_pretrained(moved)
    # from its own code, in a process that has not imported this package
    script = (
        "import sys, torch; sys.modules['modeling_edlm'] = None; from transformers import AutoModel\n"
        f"model = AutoModel.from_pretrained({str(moved)!r}, trust_remote_code=True)\n"
        f"x, xt = torch.tensor({inputs[0].tolist()}), torch.tensor({inputs[1].tolist()})\n"
        "print(model.energy(x, xt, 0.3).tolist())"
    )
    env = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True, check=True)
    torch.testing.assert_close(torch.tensor(json.loads(result.stdout.splitlines()[-1])), energy, atol=1e-5, rtol=1e-5)


def test_loading_leaves_the_denoiser_trainable(folders):
    root, _, _ = folders
    model = EDLMModel.from_pretrained(root / "base")
    model.denoiser.head.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.denoiser.named_parameters()}
    model.load_energy(str(root / "adapter"))
    assert before == {name: p.requires_grad for name, p in model.denoiser.named_parameters()} and len(set(before)) > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision_is_the_same_base(folders, dtype, tmp_path):
    root, inputs, energy = folders
    model = EDLMModel.from_pretrained(root / "base", dtype=dtype).load_energy(str(root / "adapter"))
    assert {p.dtype for p in model.parameters()} == {dtype}
    scale = float(energy.abs().max())  # bfloat16 has 8 bits, and these weights are large
    torch.testing.assert_close(model.energy(*inputs), energy, atol=0.1 * scale, rtol=0)
    model.denoiser.save_pretrained(tmp_path)  # rounded once, whatever it is loaded as
    assert EDLMModel.from_pretrained(tmp_path, dtype=torch.float32).load_energy(str(root / "adapter")).energy_model
    model.denoiser.head.linear.bias.data[0] += 1
    with pytest.raises(ValueError, match="whose weights are others"):
        model.load_energy(str(root / "adapter"))


def test_an_adapter_of_an_older_version_has_one_checksum(folders, tmp_path):
    root, _, _ = folders
    folder = shutil.copytree(root / "adapter", tmp_path / "adapter")
    description = json.loads((folder / DESCRIPTION).read_text())
    del description["base"]["sha256_float16"]
    (folder / DESCRIPTION).write_text(json.dumps(description))
    assert EDLMModel.from_pretrained(root / "base", dtype=torch.bfloat16).load_energy(str(folder)).energy_model
    with pytest.raises(ValueError, match="whose weights are others"):
        EDLMModel.from_pretrained(root / "base", dtype=torch.float16).load_energy(str(folder))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "trained over '.*base', whose weights are others: checksum [0-9a-f]{12}, this base has"),
        ({"num_hidden_layers": 3}, "with num_hidden_layers=2; this base has 3"),
        ({"hidden_size": 32}, "with hidden_size=16; this base has 32"),
        ({"vocab_size": 9}, "with vocab_size=4; this base has 9"),
    ],
    ids=str,
)
def test_another_base_is_refused(folders, changes, message):
    root, _, _ = folders
    other = make_toy("none", seed=7, **{"length": 8, "num_hidden_layers": 2} | changes)
    with pytest.raises(ValueError, match=message):
        other.load_energy(str(root / "adapter"))
    assert other.energy_model is None and other.energy_type == "none"  # as it was


@pytest.mark.parametrize("damage", ["cut", "headless", "lacking", "excess", "description", "none"])
def test_damaged_folders_are_refused(folders, tmp_path, damage):
    root, _, _ = folders
    folder = shutil.copytree(root / "adapter", tmp_path / "adapter")
    weights = load_file(folder / WEIGHTS)
    error, message = ValueError, f"{WEIGHTS} lacks, or has in excess, 1 weights: .*"
    if damage == "cut":
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:500])
        message = f"{WEIGHTS} is damaged"
    elif damage == "headless":
        save_file({name: v for name, v in weights.items() if "projection.bias" not in name}, folder / WEIGHTS)
        message = f"{WEIGHTS} is damaged or does not fit: .*projection.bias"
    elif damage == "lacking":
        save_file({name: v for name, v in weights.items() if "0.fc1.lora_B" not in name}, folder / WEIGHTS)
        message += "fc1.lora_B"
    elif damage == "excess":
        save_file(weights | {"base_model.model.network.none.weight": torch.zeros(1)}, folder / WEIGHTS)
    elif damage == "description":
        (folder / DESCRIPTION).write_text("{}")
        message = f"{DESCRIPTION} is damaged"
    else:
        (folder / WEIGHTS).unlink()
        error, message = OSError, WEIGHTS
    with pytest.raises(error, match=message):
        EDLMModel.from_pretrained(root / "base").load_energy(str(folder))


def test_without_peft_the_error_says_so(folders, monkeypatch):
    root, _, _ = folders
    model = EDLMModel.from_pretrained(root / "base")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="needs the package peft: pip install peft"):
        model.load_energy(str(root / "adapter"))


def test_a_folder_without_an_energy(folders, tmp_path):
    root, _, _ = folders
    denoiser = EDLMForMaskedLM.from_pretrained(root / "base")
    with pytest.raises(OSError, match="base holds no adapter of an energy"):
        EDLMEnergyModel.from_adapter(denoiser, str(root / "base"))
    with pytest.raises(ValueError, match="'energy_num_layers': 3.*2 blocks"):
        EDLMEnergyModel.from_denoiser(denoiser, share_weights=True, energy_num_layers=3)


def test_the_energy_of_all_completions_is_finite():
    """The head starts at zero: a fresh adapter leaves the proposal as it is."""
    denoiser = denoiser_of()
    model = add_lora(EDLMEnergyModel.from_denoiser(denoiser, share_weights=True), 2).eval()
    x = torch.tensor(completions((MASK,) * 3, (0, 1, 2)))
    assert (model(x, xt=torch.full_like(x, MASK), t=1.0).logits == 0).all()
    assert not Path("energy").exists()
