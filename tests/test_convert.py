"""Published checkpoints: our numbers against those of the published code, and every way to read a checkpoint.

    python -m tests.test_convert [--json FILE]

prints the largest differences as a table. `fixtures/README.md` says where the numbers come from.
Shapes: B batch, K candidates, L length, V vocabulary.
"""

import argparse
import json
import os
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from modeling_edlm import EDLMEnergyModel, EDLMForCausalLM, EDLMForMaskedLM, EDLMModel
from modeling_edlm.backbone import log_probs
from modeling_edlm.convert_checkpoint import from_official, main, read_checkpoint, write_hub_folder
from modeling_edlm.energy import causal_log_prob, nce_loss
from modeling_edlm.schedule import alpha, conditioning, dalpha

FIXTURES = Path(__file__).parent / "fixtures" / "parity"
MANIFEST = json.loads((FIXTURES / "manifest.json").read_text(encoding="utf-8"))
MASK = MANIFEST["config"]["mask_index"]
HEADS = MANIFEST["config"]["heads"]
KINDS = {"denoiser": EDLMForMaskedLM, "ar": EDLMForCausalLM, "nce": EDLMEnergyModel}
INPUTS = {"x0", "xt", "sigma", "kernel_t", "kernel_dt", "cand", "loss_t", "loss_xt", "loss_x0_neg"}
# The published sampler hands probabilities to an energy that sums log-probabilities. Our functions do not give these
# numbers; the test makes the mistake on purpose, to show that it is the only difference.
MISTAKEN = {"energy_ar_as_sampled", "energy_coar_as_sampled"}
QUANTITIES = sorted(set(MANIFEST["keys"]) - INPUTS)


def tensors(kind: str) -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / f"{kind}.safetensors")


@cache
def published() -> dict[str, torch.Tensor]:
    return tensors("expected")


@cache
def converted(kind: str, time_conditioning: bool = False):
    return from_official(tensors(kind), kind, HEADS, time_conditioning=time_conditioning)


def time_of(sigma_B: torch.Tensor) -> torch.Tensor:
    """The t whose conditioning is sigma."""
    return -torch.expm1(-sigma_B) / (1 - 1e-3)


def gathered(log_p_BLV: torch.Tensor, x_BL: torch.Tensor) -> torch.Tensor:
    return log_p_BLV.gather(-1, x_BL[..., None])[..., 0]


def published_ar_sum(x0_BL: torch.Tensor, where_BL: torch.Tensor) -> torch.Tensor:
    """sum over i >= 1 of log p_AR(x0_i | x0_{<i}) without a BOS: ours, with each row's first token as the BOS."""
    sums = [
        causal_log_prob(converted("ar"), x_L[None, 1:], where_L[None, 1:], int(x_L[0]), MASK)
        for x_L, where_L in zip(x0_BL, where_BL, strict=True)
    ]
    return torch.cat(sums)


def published_ar_energy(x0_BL, xt_BL, carry_over: bool, log_p_BLV) -> torch.Tensor:
    """log mu of all positions minus the AR sum of all but the first: theirs has no BOS, so it leaves position 0 out."""
    where_BL = xt_BL == MASK if carry_over else torch.ones_like(xt_BL, dtype=torch.bool)
    return gathered(log_p_BLV, x0_BL).sum(-1) - published_ar_sum(x0_BL, where_BL)


@cache
@torch.no_grad()
def ours() -> dict[str, torch.Tensor]:
    """Every number of the fixtures that is not an input, from our models and functions."""
    e, denoiser, ar, nce = published(), converted("denoiser"), converted("ar"), converted("nce")
    x0, xt, cand, t = e["x0"], e["xt"], e["cand"], e["loss_t"]
    loss_xt, loss_x0_neg = e["loss_xt"], e["loss_x0_neg"]

    def energy_nce(x_BL, xt_BL, sigma_B=None):
        model = nce if sigma_B is None else converted("nce", True)
        return model(x_BL, xt=xt_BL, t=None if sigma_B is None else time_of(sigma_B)).logits[:, 0]

    def per_candidate(function):
        return torch.stack([function(x_BL) for x_BL in cand])

    out = {
        "logits": denoiser(xt).logits,
        "logits_sigma": converted("denoiser", True)(xt, t=time_of(e["sigma"])).logits,
        "subs_log_probs": (log_p := denoiser.log_p_x0(xt)),
        "log_mu_cand": per_candidate(lambda x: gathered(log_p, x).sum(-1)),
        "ar_logits": (ar_logits := ar(x0).logits),
        "ar_log_probs": log_probs(ar_logits, MASK),
        "energy_nce": per_candidate(lambda x: energy_nce(x, xt)),
        "energy_nce_x0": energy_nce(x0, xt),
        "energy_nce_sigma": per_candidate(lambda x: energy_nce(x, xt, e["sigma"])),
    }
    for name, carry_over in (("energy_ar", False), ("energy_coar", True)):
        out[name] = per_candidate(lambda x, c=carry_over: published_ar_energy(x, xt, c, log_p))
        # probabilities in place of log-probabilities: see MISTAKEN
        out[f"{name}_as_sampled"] = per_candidate(lambda x, c=carry_over: published_ar_energy(x, xt, c, log_p.exp()))

    # the unnormalised posterior: a token with mass alpha(s) - alpha(t), the mask with mass 1 - alpha(s)
    s_B11, t_B11 = (time[:, None, None] for time in (e["kernel_t"] - e["kernel_dt"], e["kernel_t"]))
    kernel_q = log_p.exp() * (alpha(s_B11) - alpha(t_B11))
    kernel_q[..., MASK] = 1 - alpha(s_B11)[..., 0]
    out["kernel_q"] = kernel_q

    with torch.enable_grad():
        time = t.clone().requires_grad_()
        sigma = conditioning(time)
        (dsigma,) = torch.autograd.grad(sigma.sum(), time)
    out |= {"loss_sigma": sigma.detach(), "loss_dsigma": dsigma}
    weight_B1 = (-dalpha(t) / (1 - alpha(t)))[:, None]  # dsigma / expm1(sigma): their 1e-3 cancels
    log_p_loss = denoiser.log_p_x0(loss_xt)
    nll_BL = -gathered(log_p_loss, x0)
    energy_data, energy_neg = energy_nce(x0, loss_xt), energy_nce(loss_x0_neg, loss_xt)
    length = x0.shape[1]
    out["loss_mdlm"] = nll_BL * weight_B1
    # their logarithm of sigmoid + 1e-8 differs from our softplus by less than 1e-8 / sigmoid
    softplus = torch.nn.functional.softplus
    out["loss_nce_train"] = (softplus(energy_data) + softplus(-energy_neg))[:, None]
    # one sample stands for the partition function, and for AR energies it is left out
    out["loss_nce_val"] = (nll_BL + (energy_data - energy_neg)[:, None] / length) * weight_B1
    for name, carry_over in (("loss_ar_val", False), ("loss_coar_val", True)):
        energy = published_ar_energy(x0, loss_xt, carry_over, log_p_loss)
        out[name] = (nll_BL + energy[:, None] / length) * weight_B1
    return out


def compared(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Our numbers and theirs, their -1e6 (and the AR model's -1000) for no mass replaced by -inf."""
    theirs = published()[name]
    if name in ("subs_log_probs", "ar_log_probs"):
        theirs = theirs.masked_fill(theirs < -900, float("-inf"))
    return ours()[name], theirs


def report() -> dict[str, dict]:
    """The largest absolute difference of every quantity, over its finite entries."""
    rows = {}
    for name in QUANTITIES:
        mine, theirs = compared(name)
        finite = theirs.isfinite()
        difference = (mine - theirs)[finite].abs()
        rows[name] = {
            "entries": theirs.numel(),
            "infinite": int((~finite).sum()),
            "same_infinite": bool((mine.isfinite() == finite).all()),
            "largest_value": float(theirs[finite].abs().max()),
            "max_abs_difference": float(difference.max()),
            "max_rel_difference": float(difference.max() / theirs[finite].abs().max()),
        }
    return rows


def test_every_published_number_is_compared_or_an_input() -> None:
    assert ours().keys() == set(QUANTITIES) and ours().keys() >= MISTAKEN
    assert INPUTS < set(MANIFEST["keys"]) == set(published())


@pytest.mark.parametrize("name", QUANTITIES)
def test_parity(name: str) -> None:
    mine, theirs = compared(name)
    assert mine.shape == theirs.shape
    torch.testing.assert_close(mine, theirs, **MANIFEST["suggested_tolerance"])


@pytest.mark.parametrize("name", sorted(MISTAKEN))
def test_our_energy_does_not_make_the_samplers_mistake(name: str) -> None:
    right, mistaken = published()[name.removesuffix("_as_sampled")], published()[name]
    # row 0 of xt is all masks: the mistake moves its energies; the last row has none, and 1 is summed in place of 0
    assert ((right - mistaken)[:, 0].abs() > 1).all()
    torch.testing.assert_close((mistaken - right)[:, -1], torch.full((4,), float(right.new_tensor(32))))
    assert not torch.allclose(ours()[name.removesuffix("_as_sampled")], mistaken, atol=1)


@pytest.mark.parametrize("energy_type", ["ar", "coar"])
@torch.no_grad()
def test_ar_energy_with_bos(energy_type: str) -> None:
    """Our own convention: a BOS in front, so that position 0 counts in both sums. A BOS changes every conditional of
    the AR model: the published number is not this one plus a term of position 0."""
    denoiser, ar, e = converted("denoiser"), converted("ar"), published()
    model = EDLMModel.from_components(denoiser, ar, energy_type)
    assert model.config.for_energy().bos_token_id == MASK
    for x_BL in e["cand"]:
        x_BT = torch.cat((torch.full_like(x_BL[:, :1], MASK), x_BL), dim=1)
        log_p_BL = gathered(log_probs(ar(x_BT).logits, MASK)[:, :-1], x_BL)
        if energy_type == "coar":
            log_p_BL = log_p_BL * (e["xt"] == MASK)
        expected = gathered(denoiser.log_p_x0(e["xt"]), x_BL).sum(-1) - log_p_BL.sum(-1)
        torch.testing.assert_close(model.energy(x_BL, e["xt"]), expected, atol=2e-4, rtol=1e-5)


@torch.no_grad()
def test_energies_of_the_composed_model_and_its_training_loss() -> None:
    e = published()
    model = EDLMModel.from_components(converted("denoiser"), converted("nce"), "nce")
    for x_BL, energy in zip(e["cand"], e["energy_nce"], strict=True):
        torch.testing.assert_close(model.energy(x_BL, e["xt"]), energy, atol=2e-4, rtol=1e-4)
    loss = nce_loss(model.energy(e["x0"], e["loss_xt"]), model.energy(e["loss_x0_neg"], e["loss_xt"]))
    torch.testing.assert_close(loss, e["loss_nce_train"].mean(), atol=2e-4, rtol=1e-4)


def assert_same(model, other) -> None:
    assert type(model) is type(other)
    theirs = other.state_dict()
    assert model.state_dict().keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())


def prefixed(prefix: str, kind: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in tensors(kind).items()}


# as DIT and AR register their parameters: the averages of a checkpoint have this order and no names
ORDER = (
    "vocab_embed sigma_map.mlp.0 sigma_map.mlp.2 rotary_emb blocks norm1 attn_qkv attn_out norm2 mlp.0 mlp.2 "
    "adaLN_modulation output_layer norm_final linear vocab_proj energy_head.0 energy_head.2"
).split()


def registered(kind: str) -> dict[str, torch.Tensor]:
    """The tensors in the order of the published module, in which weight stands before bias."""

    def place(name: str):
        top, *rest = name.split(".")
        if top == "blocks":
            return ORDER.index(top), int(rest[0]), ORDER.index(".".join(rest[1:-1])), rest[-1] != "weight"
        if top == "output_layer":
            last = ["norm_final", "linear", "adaLN_modulation"].index(rest[0])
            return ORDER.index(top), last, 0, rest[-1] != "weight"
        return ORDER.index(name.rpartition(".")[0]), 0, 0, rest[-1] != "weight"

    return dict(sorted(tensors(kind).items(), key=lambda item: place(item[0])))


def lightning(kind: str) -> dict:
    """A whole checkpoint: raw weights that differ from the averages, which are the fixture's."""
    fixture = registered(kind)
    shadow = [value for name, value in fixture.items() if not name.endswith("inv_freq")]
    raw = {name: value if name.endswith("inv_freq") else value + 1 for name, value in fixture.items()}
    if kind == "nce":  # a frozen denoiser of remote code, whose backbone holds the energy network a second time
        state = prefixed("backbone.backbone.", "denoiser")
        state |= {f"backbone.ebm.{name}": value for name, value in raw.items()}
        state |= {f"ebm.{name}": value for name, value in raw.items()}
    else:
        state = {f"backbone.{name}": value for name, value in raw.items()}
    state["train_metrics.train/nll.weight"] = torch.zeros(())
    ema = {"decay": 0.9999, "num_updates": 7, "shadow_params": shadow}
    return {"epoch": 1, "global_step": 7, "state_dict": state, "ema": ema, "optimizer_states": [{"state": {}}]}


@pytest.mark.parametrize(
    "prefix, kind",
    [("backbone.", "denoiser"), ("backbone.backbone.", "denoiser"), ("backbone.", "ar")]
    + [(prefix, kind) for prefix in ("ebm.", "backbone.ebm.") for kind in ("ar", "nce")],
)
def test_prefixes(prefix: str, kind: str) -> None:
    assert_same(from_official(prefixed(prefix, kind), kind, HEADS), converted(kind))


@pytest.mark.parametrize("kind", ["ar", "nce"])
def test_both_networks_of_one_state_dict(kind: str) -> None:
    state = prefixed("backbone.", "denoiser") | prefixed("ebm.", kind) | prefixed("backbone.ebm.", kind)
    assert_same(from_official(state, "denoiser", HEADS), converted("denoiser"))
    assert_same(from_official(state, kind, HEADS), converted(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_averages_are_taken_from_a_lightning_checkpoint(kind: str) -> None:
    assert_same(from_official(lightning(kind), kind, HEADS), converted(kind))


def test_the_frozen_denoiser_of_an_energy_checkpoint() -> None:
    assert_same(from_official(lightning("nce"), "denoiser", HEADS), converted("denoiser"))


def test_averages_that_do_not_fit() -> None:
    checkpoint = lightning("nce")
    shadow = checkpoint["ema"]["shadow_params"]
    for wrong in (shadow[:-1], shadow + shadow[:1], [*shadow[:3], shadow[4], shadow[3], *shadow[5:]], []):
        with pytest.raises(ValueError, match="shadow_params does not fit"):
            from_official(checkpoint | {"ema": {"shadow_params": wrong}}, "nce", HEADS)
    for ema in (None, {}, {"decay": 0.9}):
        with pytest.raises(ValueError, match="no ema.shadow_params"):
            from_official(checkpoint | {"ema": ema}, "nce", HEADS)
    raw = from_official(checkpoint["state_dict"], "nce", HEADS)  # asked for in so many words
    assert not torch.equal(raw.network.fc1.weight, converted("nce").network.fc1.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_and_settings(kind: str) -> None:
    model = from_official(tensors(kind), kind, HEADS, max_position_embeddings=77, mask_token_id=5, bos_token_id=6)
    config, sizes = model.config, MANIFEST["config"]
    assert type(model) is KINDS[kind] and not model.training and not config.time_conditioning
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (128, 64, 2)
    assert (config.intermediate_size, config.num_attention_heads) == (256, HEADS)
    assert config.cond_dim == (0 if kind == "ar" else sizes["cond_dim"])
    assert (config.max_position_embeddings, config.mask_token_id, config.bos_token_id) == (77, 5, 6)
    if kind == "nce":
        assert (config.energy_type, config.energy_target, config.energy_pooling) == ("nce", "x0", "mean")
    assert converted(kind).config.mask_token_id == converted(kind).config.bos_token_id == MASK


@pytest.mark.parametrize(
    "kind, change, message",
    [
        ("denoiser", {"blocks.1.norm2.weight": None}, r"missing.*: blocks\.1\.norm2\.weight"),
        ("denoiser", {"blocks.0.mlp.0.weight": None}, r"missing.*: blocks\.0\.mlp\.0\.weight"),
        ("denoiser", {"vocab_embed.embedding": None}, r"vocab_embed\.embedding is missing"),
        ("denoiser", {"sigma_map.mlp.2.weight": None}, r"missing.*: sigma_map"),
        ("nce", {"vocab_proj.bias": None}, r"missing.*: vocab_proj\.bias"),
        ("ar", {"blocks.3.norm1.weight": torch.zeros(64)}, r"missing.*blocks\.2\.norm1\.weight"),
        ("ar", {"blocks.1.attn_qkv.bias": torch.zeros(192)}, r"unknown.*: blocks\.1\.attn_qkv\.bias"),
        ("ar", {"label_embed.weight": torch.zeros(2)}, r"unknown.*: label_embed"),
        ("denoiser", {"output_layer.linear.bias": torch.zeros(127)}, r"wrong shape.*bias \(127,\) instead of \(128,\)"),
        ("denoiser", {"blocks.0.adaLN_modulation.bias": torch.zeros(192)}, r"\(192,\) instead of \(384,\)"),
        ("denoiser", {"blocks.0.adaLN_modulation.bias": torch.zeros(())}, r"\(\) instead of \(384,\)"),
        ("denoiser", {"vocab_embed.embedding": torch.zeros(128)}, r"vocab_embed\.embedding must have two axes"),
        ("denoiser", {"vocab_embed.embedding": torch.zeros(100, 64)}, r"wrong shape.*linear\.weight"),
        ("denoiser", {"blocks.0.norm1.weight": "text"}, r"not tensors: blocks\.0\.norm1\.weight"),
    ],
)
def test_wrong_tensors(kind: str, change: dict, message: str) -> None:
    state = {name: value for name, value in (tensors(kind) | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        from_official(state, kind, HEADS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_the_kind_must_be_that_of_the_tensors(kind: str, other: str) -> None:
    if kind != other:
        with pytest.raises(ValueError, match=f"kind {kind!r}"):
            from_official(tensors(other), kind, HEADS)
        with pytest.raises(ValueError, match=f"kind {kind!r}"):
            from_official(prefixed("backbone.", other), kind, HEADS)


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="kind must be one of .*, got 'diffusion'"):
        from_official(tensors("ar"), "diffusion", HEADS)


@pytest.mark.parametrize(
    "kind, settings, message",
    [
        ("denoiser", {"mask_token_id": 128}, "mask_token_id must lie in"),
        ("ar", {"bos_token_id": -1}, "bos_token_id must lie in"),
        ("ar", {"time_conditioning": True}, "time_conditioning=True needs cond_dim > 0"),
        ("nce", {"max_position_embeddings": 0}, "max_position_embeddings must be at least 1"),
    ],
)
def test_wrong_settings(kind: str, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_official(tensors(kind), kind, HEADS, **settings)


@pytest.mark.parametrize("num_heads", [0, -4, 3, 5, 64, 2, 8])
def test_wrong_num_heads(num_heads: int) -> None:
    with pytest.raises(ValueError, match="num_heads"):  # 2 and 8 divide: the rotary frequencies tell
        from_official(tensors("denoiser"), "denoiser", num_heads)


def test_another_base_of_the_rotary_frequencies() -> None:
    state = tensors("ar")
    state["rotary_emb.inv_freq"] = 500000.0 ** -(torch.arange(0, 16, 2) / 16)
    with pytest.raises(ValueError, match="frequencies of base 10000"):
        from_official(state, "ar", HEADS)


def test_without_rotary_frequencies_the_argument_is_believed() -> None:
    state = tensors("denoiser")
    del state["rotary_emb.inv_freq"]
    assert from_official(state, "denoiser", 8).config.num_attention_heads == 8
    assert_same(from_official(state, "denoiser", HEADS), converted("denoiser"))


@pytest.mark.parametrize("as_zip", [True, False])
def test_files_of_weights(tmp_path: Path, as_zip: bool) -> None:
    for kind, name in (("denoiser", "a.ckpt"), ("nce", "b.pt")):
        torch.save(lightning(kind), tmp_path / name, _use_new_zipfile_serialization=as_zip)
        assert_same(from_official(read_checkpoint(tmp_path / name), kind, HEADS), converted(kind))
    torch.save(tensors("ar"), tmp_path / "c.bin", _use_new_zipfile_serialization=as_zip)
    assert_same(from_official(read_checkpoint(tmp_path / "c.bin"), "ar", HEADS), converted("ar"))


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [None, 2, 4])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, protocol: int | None) -> None:
    target, path = tmp_path / "made", tmp_path / "bad.ckpt"
    content = {"state_dict": {}, "hyper_parameters": Malicious(target)}
    if protocol is None:
        torch.save(content | lightning("ar"), path)
    else:
        path.write_bytes(pickle.dumps(content, protocol))
    # the message names the file and what it would have called, and says how to keep the weights
    called = "" if protocol == 4 else r"GLOBAL io\.open.*"  # 4 is refused before that
    with pytest.raises(ValueError, match=rf"bad\.ckpt holds more than weights.*{called}'state_dict', 'ema'"):
        read_checkpoint(path)
    with pytest.raises(ValueError, match="holds more than weights"):
        main(f"--checkpoint {path} --kind ar --num_heads 4 --out {tmp_path / 'out'}".split())
    assert not target.exists() and not (tmp_path / "out").exists()
    torch.load(path, weights_only=False) if protocol is None else pickle.loads(path.read_bytes())
    assert target.exists()  # the file could have done harm


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt", "a.bin"])
@pytest.mark.parametrize("damage", ["empty", "cut", "noise"])
def test_damaged_files(tmp_path: Path, name: str, damage: str) -> None:
    path = tmp_path / name
    save_file(tensors("ar"), path) if name == "a.safetensors" else torch.save(tensors("ar"), path)
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "noise": b"no weights here" * 99}[damage])
    with pytest.raises(ValueError, match=name):
        read_checkpoint(path)


def test_files_that_are_missing_or_hold_something_else(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "a.ckpt", tmp_path / "a.safetensors"):
        with pytest.raises(FileNotFoundError, match="no such file"):
            read_checkpoint(path)
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="list.pt must hold a dictionary"):
        read_checkpoint(tmp_path / "list.pt")


def tokenizer_folder(folder: Path, size: int = 127, **special) -> str:
    """A tokenizer of `size` words, which has no mask token unless `special` names one."""
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="w1", **special).save_pretrained(folder)
    return str(folder)


REMOTE = """
import sys
sys.modules["modeling_edlm"] = None  # the package must not be importable
import torch, transformers
folder, name, inputs = sys.argv[1], sys.argv[2], torch.load(sys.argv[3])
model = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
assert tokenizer.mask_token_id == model.config.mask_token_id == 127 and model.config.bos_token_id == 1
with torch.no_grad():
    result = model(**inputs).logits
if name == "AutoModel":
    sequences = model.generate(max_length=16, batch_size=2, num_steps=4, seed=0)
    assert sequences.shape == (2, 16) and (sequences != 127).all(), sequences
torch.save(result, sys.argv[4])
"""


def remote(folder: Path, auto_class: str, inputs: dict, tmp_path: Path) -> torch.Tensor:
    """The logits that a process without this package gets from the folder's own code."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    torch.save(inputs, elsewhere / "in.pt")
    environment = os.environ | {"PYTHONPATH": "", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    command = [sys.executable, "-c", REMOTE, str(folder), auto_class, "in.pt", "out.pt"]
    done = subprocess.run(command, cwd=elsewhere, env=environment, stdin=subprocess.DEVNULL, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return torch.load(elsewhere / "out.pt")


@pytest.mark.parametrize(
    "kind, auto_class, quantity",
    [
        ("denoiser", "AutoModel", "logits"),
        ("denoiser", "AutoModelForMaskedLM", "logits"),
        ("ar", "AutoModelForCausalLM", "ar_logits"),
        ("nce", "AutoModelForSequenceClassification", "energy_nce_x0"),
    ],
)
def test_command_line_to_remote_code(kind: str, auto_class: str, quantity: str, tmp_path: Path) -> None:
    torch.save(lightning(kind), tmp_path / "official.ckpt")
    folder, e = tmp_path / "converted", published()
    command = f"--checkpoint {tmp_path / 'official.ckpt'} --kind {kind} --num_heads 4 --out {folder}"
    command += f" --tokenizer {tokenizer_folder(tmp_path / 'tokenizer')} --max_position_embeddings 32"
    main(command.split())
    assert_same(KINDS[kind].from_pretrained(folder), converted(kind))
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 32
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*"))

    inputs = {"nce": {"input_ids": e["x0"], "xt": e["xt"]}, "ar": {"input_ids": e["x0"]}}
    logits = remote(folder, auto_class, inputs.get(kind, {"input_ids": e["xt"]}), tmp_path)
    torch.testing.assert_close(logits.view_as(e[quantity]), e[quantity], **MANIFEST["suggested_tolerance"])
    with pytest.raises(ValueError, match="not an empty folder"):
        main(command.split())


def test_edlm_from_a_denoiser_folder(tmp_path: Path) -> None:
    write_hub_folder(converted("denoiser"), tmp_path / "denoiser")
    model = EDLMModel.from_pretrained(tmp_path / "denoiser")
    assert_same(model.denoiser, converted("denoiser"))
    assert model.config.energy_type == "none"
    assert model.generate(max_length=8, num_steps=4, seed=0).shape == (1, 8)


def test_composed_edlm_to_a_folder_and_back(tmp_path: Path) -> None:
    model = EDLMModel.from_components(converted("denoiser"), converted("nce"), "nce")
    write_hub_folder(model, tmp_path / "edlm")
    assert_same(EDLMModel.from_pretrained(tmp_path / "edlm"), model)


def test_a_folder_of_published_remote_code(tmp_path: Path) -> None:
    folder = tmp_path / "mdlm"
    folder.mkdir()
    save_file(prefixed("backbone.", "denoiser"), folder / "model.safetensors")
    config = {"model_type": "mdlm", "n_heads": 4, "model_length": 32, "time_conditioning": True}
    (folder / "config.json").write_text(json.dumps(config))
    main(f"--checkpoint {folder} --kind denoiser --out {tmp_path / 'ours'}".split())
    model = EDLMForMaskedLM.from_pretrained(tmp_path / "ours")
    assert_same(model, converted("denoiser"))
    assert model.config.time_conditioning and model.config.max_position_embeddings == 32
    with torch.no_grad():
        logits = model(published()["xt"], t=time_of(published()["sigma"])).logits
    torch.testing.assert_close(logits, published()["logits_sigma"], **MANIFEST["suggested_tolerance"])


def test_command_line_errors(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_file(tensors("ar"), tmp_path / "ar.safetensors")
    command = f"--checkpoint {tmp_path / 'ar.safetensors'} --kind ar --out {tmp_path / 'out'}"
    with pytest.raises(SystemExit):
        main(command.split())
    assert "--num_heads must be given" in capsys.readouterr().err
    small = tokenizer_folder(tmp_path / "small", 126)
    with pytest.raises(ValueError, match="tokenizer has 127 tokens, the model 128"):
        main(f"{command} --num_heads 4 --tokenizer {small}".split())
    large = tokenizer_folder(tmp_path / "large", 200)
    with pytest.raises(ValueError, match="mask_token_id must lie in"):
        main(f"{command} --num_heads 4 --tokenizer {large}".split())
    assert not (tmp_path / "out").exists()
    main(f"{command} --num_heads 4".split())
    assert "the AR model's first input is the mask token" in capsys.readouterr().out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    path = parser.parse_args().json
    figures = report()
    print(f"{'quantity':24} {'entries':>8} {'largest value':>14} {'largest difference':>19}")
    for name, row in figures.items():
        print(f"{name:24} {row['entries']:8} {row['largest_value']:14.4g} {row['max_abs_difference']:19.2e}")
    if path:
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
