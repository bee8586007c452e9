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
import types
import typing
from collections import defaultdict
from functools import cache
from pathlib import Path

import huggingface_hub
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modeling_edlm import EDLMEnergyModel, EDLMForCausalLM, EDLMForMaskedLM, EDLMModel
from modeling_edlm.backbone import log_probs
from modeling_edlm.convert_checkpoint import from_official, main, read_checkpoint, write_hub_folder
from modeling_edlm.energies import causal_log_prob
from modeling_edlm.schedule import alpha, conditioning
from training.common.contrast import nce_loss

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
    weight_B1 = (1 / (1 - alpha(t)))[:, None]  # -dalpha/dt is 1; dsigma / expm1(sigma): their 1e-3 cancels
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


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "model.", "module._orig_mod.", "model.module."])
def test_names_that_wrappers_give(wrapper: str) -> None:
    """torch.compile, DDP and a trainer's class, around the whole; torch.compile within."""
    assert_same(from_official(prefixed(wrapper + "backbone.", "denoiser"), "denoiser", HEADS), converted("denoiser"))
    within = {name.replace("blocks.", "_orig_mod.blocks."): value for name, value in tensors("ar").items()}
    assert_same(from_official(within, "ar", HEADS), converted("ar"))
    state = lightning("nce")
    state["state_dict"] = {wrapper + name: value for name, value in state["state_dict"].items()}
    assert_same(from_official(state, "nce", HEADS), converted("nce"))
    with pytest.raises(ValueError, match="weights twice, with and without"):
        from_official(prefixed(wrapper, "ar") | tensors("ar"), "ar", HEADS)


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


def test_a_whole_edlm_from_one_checkpoint() -> None:
    edlm = EDLMModel.from_components(converted("denoiser"), converted("nce"), "nce")
    state = prefixed("backbone.backbone.", "denoiser") | prefixed("ebm.", "nce")
    for checkpoint in (lightning("nce"), state):
        model = from_official(checkpoint, "edlm", HEADS)
        assert_same(model, edlm)
        assert not model.training and model.config.to_dict() == edlm.config.to_dict()
    model = from_official(state, "edlm", HEADS, max_position_embeddings=77, mask_token_id=5, time_conditioning=True)
    for config in (model.config, model.denoiser.config, model.energy_model.config):
        assert (config.max_position_embeddings, config.mask_token_id, config.time_conditioning) == (77, 5, True)
    with pytest.raises(ValueError, match="no network of kind 'nce'"):
        from_official(lightning("denoiser"), "edlm", HEADS)


def test_averages_that_do_not_fit() -> None:
    checkpoint = lightning("nce")
    shadow = checkpoint["ema"]["shadow_params"]
    for wrong in (shadow[:-1], shadow + shadow[:1], [*shadow[:3], shadow[4], shadow[3], *shadow[5:]], []):
        with pytest.raises(ValueError, match="shadow_params does not fit"):
            from_official(checkpoint | {"ema": {"shadow_params": wrong}}, "nce", HEADS)
    for ema in (None, {}, [], {"decay": 0.9}):
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
    with pytest.raises(ValueError, match="kind must be one of .*'edlm'.*, got 'diffusion'"):
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
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


HARM = {  # what makes the file `target`, and how the message names it
    "open": (lambda target: Malicious(open, str(target), "w"), r"GLOBAL io\.open"),
    "system": (lambda target: Malicious(os.system, f"echo > {target}"), r"GLOBAL \w+\.system"),
    "exec": (lambda target: Malicious(exec, f"open({str(target)!r}, 'w').close()"), "GLOBAL exec"),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("form", ["zip", "legacy", "folder", "pickle 2", "pickle 4"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, form: str, harm: str) -> None:
    target, path = tmp_path / "made", tmp_path / "bad.ckpt"
    make, called = HARM[harm]
    content = {"state_dict": {}, "hyper_parameters": make(target)}
    if form.startswith("pickle"):
        path.write_bytes(pickle.dumps(content, int(form[-1])))
        called = "" if form == "pickle 4" else called  # 4 is refused before that
    else:
        if form == "folder":
            (tmp_path / "folder").mkdir()
            (tmp_path / "folder" / "config.json").write_text('{"n_heads": 4}')
            path = tmp_path / "folder" / "pytorch_model.bin"
        torch.save(content | lightning("ar"), path, _use_new_zipfile_serialization=form != "legacy")
    given = path.parent if form == "folder" else path
    # the message names the file and what it would have called
    with pytest.raises(ValueError, match=rf"{path.name} holds more than weights.*{called}"):
        read_checkpoint(given)
    with pytest.raises(ValueError, match="holds more than weights"):
        main(f"--checkpoint {given} --kind ar --num_heads 4 --out {tmp_path / 'out'}".split())
    assert not target.exists() and not (tmp_path / "out").exists()
    pickle.loads(path.read_bytes()) if form.startswith("pickle") else torch.load(path, weights_only=False)
    assert target.exists()  # the file could have done harm


def install(patched: pytest.MonkeyPatch, name: str, thing=None):
    """Something of a package that is not here, by default a class, where pickle finds it by its name."""
    package, _, last = name.rpartition(".")
    for module in (package.partition(".")[0], package):
        patched.setitem(sys.modules, module, sys.modules.get(module) or types.ModuleType(module))
    thing = type(last, (), {}) if thing is None else thing
    thing.__module__, thing.__qualname__ = package, last
    patched.setattr(sys.modules[package], last, thing, raising=False)
    return thing


def test_a_class_of_an_unknown_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        thing = install(patched, "nowhere.at_all.Thing")()
        torch.save(lightning("ar") | {"hyper_parameters": {"config": thing}}, tmp_path / "a.ckpt")
        with pytest.raises(ValueError, match=r"a\.ckpt holds more than weights.*GLOBAL nowhere\.at_all\.Thing"):
            read_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"a\.ckpt holds more than weights.*GLOBAL nowhere\.at_all\.Thing"):
        read_checkpoint(tmp_path / "a.ckpt")


def hyper_parameters(patched: pytest.MonkeyPatch, tokenizer, **settings) -> dict:
    """What the published code lets Lightning save of its arguments: an omegaconf tree, and the tokenizer."""
    container, node, metadata = (
        install(patched, f"omegaconf.{name}") for name in ("dictconfig.DictConfig", "nodes.AnyNode", "base.Metadata")
    )

    def tree(value, parent=None):
        made = (container if isinstance(value, dict) else node)()
        made._metadata, made._parent = metadata(), parent
        vars(made._metadata).update(
            ref_type=typing.Any, object_type=dict, key=None, optional=True, resolver_cache=defaultdict(dict)
        )
        if isinstance(value, dict):
            made._content = {name: tree(child, made) for name, child in value.items()}
        else:
            made._val = value
        return made

    return {"config": tree(settings), "tokenizer": tokenizer}


def test_the_arguments_in_a_lightning_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published files hold them, as objects: they are read without their packages, and nothing of them is run."""
    target, path = tmp_path / "made", tmp_path / "a.ckpt"
    tokenizer = AutoTokenizer.from_pretrained(gpt2_folder(tmp_path / "gpt2"))

    def touch(place):
        Path(place).touch()

    harmful = install(monkeypatch, "transformers.harmful.touch", touch)  # stays importable
    with monkeypatch.context() as patched:
        model = {"n_heads": HEADS, "length": 32, "name": "small"}
        arguments = hyper_parameters(patched, tokenizer, model=model, time_conditioning=True)
        arguments["callback"] = Malicious(harmful, str(target))
        torch.save(lightning("denoiser") | {"hyper_parameters": arguments}, path)
    assert "omegaconf" not in sys.modules
    main(f"--checkpoint {path} --kind denoiser --out {tmp_path / 'out'}".split())
    model = EDLMForMaskedLM.from_pretrained(tmp_path / "out")
    assert_same(model, converted("denoiser"))
    assert model.config.time_conditioning and model.config.max_position_embeddings == 32
    with pytest.raises(ValueError, match=r"a\.ckpt says n_heads=4, the model has 8|num_heads=8 needs"):
        main(f"--checkpoint {path} --kind denoiser --num_heads 8 --out {tmp_path / 'other'}".split())
    assert not target.exists()
    pickle.loads(pickle.dumps(Malicious(harmful, str(target))))
    assert target.exists()


def test_arguments_that_say_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for arguments in ({}, {"model": {}}, {"model": {"n_heads": "${other.place}"}}, {"model": "small"}):
        with monkeypatch.context() as patched:
            saved = {"hyper_parameters": hyper_parameters(patched, None, **arguments)}
            torch.save(lightning("ar") | saved, tmp_path / "a.ckpt")
        with pytest.raises(SystemExit):
            main(f"--checkpoint {tmp_path / 'a.ckpt'} --kind ar --out {tmp_path / 'out'}".split())
        assert "--num_heads must be given" in capsys.readouterr().err


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


def gpt2_folder(folder: Path, size: int = 127) -> str:
    """A tokenizer in the files of the one that published models read: byte-level BPE, <|endoftext|> last, no mask."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = pyarrow.parquet.read_table(Path(__file__).parent / "fixtures" / "wiki27-sample.parquet")["text"][0].as_py()
    backend.train_from_iterator([text], trainers.BpeTrainer(vocab_size=size - 1, show_progress=False))
    folder.mkdir()
    backend.model.save(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text()) | {"<|endoftext|>": size - 1}
    assert len(vocabulary) == size
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    return str(folder)


def tokenizer_folder(folder: Path, size: int = 127, **special) -> str:
    """A tokenizer of `size` words, which has no mask token unless `special` names one."""
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=backend, **{"bos_token": "w1"} | special).save_pretrained(folder)
    return str(folder)


REMOTE = """
import sys
sys.modules["modeling_edlm"] = None  # the package must not be importable
import torch, transformers
folder, name, inputs = sys.argv[1], sys.argv[2], torch.load(sys.argv[3])
model = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
assert tokenizer.mask_token_id == model.config.mask_token_id == 127 and tokenizer.mask_token == "[MASK]"
assert tokenizer.bos_token_id == model.config.bos_token_id == 126
assert tokenizer.decode(tokenizer("the city of", return_tensors="pt").input_ids[0]) == "the city of"
with torch.no_grad():
    result = {"logits": model(**inputs["forward"]).logits}
    if model.config.energy_type == "nce" and name == "AutoModel":
        result["energy"] = model.energy(inputs["x0"], inputs["xt"])
if name == "AutoModelForCausalLM":
    sequences = model.generate(max_new_tokens=15, do_sample=True, num_return_sequences=2, pad_token_id=0)
    assert sequences.shape == (2, 16), sequences
elif name != "AutoModelForSequenceClassification":
    sequences = model.generate(max_length=16, batch_size=2, num_steps=4, num_candidates=2, seed=0)
    assert sequences.shape == (2, 16) and (sequences != 127).all(), sequences
torch.save(result, sys.argv[4])
"""


def remote(folder: Path, auto_class: str, inputs: dict, tmp_path: Path) -> dict[str, torch.Tensor]:
    """The numbers that a process without this package gets from the folder's own code; it generates text too."""
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
        ("edlm", "AutoModel", "logits"),
    ],
)
def test_command_line_to_remote_code(kind: str, auto_class: str, quantity: str, tmp_path: Path) -> None:
    """From a checkpoint as Lightning writes it, and GPT-2's tokenizer files, to the published numbers."""
    torch.save(lightning("nce" if kind == "edlm" else kind), tmp_path / "official.ckpt")
    folder, e = tmp_path / "converted", published()
    command = f"--checkpoint {tmp_path / 'official.ckpt'} --kind {kind} --num_heads 4 --out {folder}"
    command += f" --tokenizer {gpt2_folder(tmp_path / 'gpt2')} --max_position_embeddings 32"
    main(command.split())
    if kind == "edlm":
        model = EDLMModel.from_pretrained(folder)
        assert_same(model.denoiser, converted("denoiser"))
        assert_same(model.energy_model, converted("nce"))
    else:
        assert_same(KINDS[kind].from_pretrained(folder), converted(kind))
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 32
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*"))

    forward = {"nce": {"input_ids": e["x0"], "xt": e["xt"]}, "ar": {"input_ids": e["x0"]}}
    inputs = {"forward": forward.get(kind, {"input_ids": e["xt"]}), "x0": e["x0"], "xt": e["xt"]}
    result = remote(folder, auto_class, inputs, tmp_path)
    torch.testing.assert_close(result["logits"].view_as(e[quantity]), e[quantity], **MANIFEST["suggested_tolerance"])
    assert ("energy" in result) == (kind == "edlm")
    if kind == "edlm":
        torch.testing.assert_close(result["energy"], e["energy_nce_x0"], **MANIFEST["suggested_tolerance"])
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


# config.json of kuleshov-group/mdlm-owt, its sizes those of the fixture
MDLM = {"architectures": ["MDLM"], "model_type": "mdlm", "return_dict": False, "dropout": 0.1, "cond_dim": 32}
MDLM |= {"auto_map": {"AutoConfig": "configuration_mdlm.MDLMConfig", "AutoModelForMaskedLM": "modeling_mdlm.MDLM"}}
MDLM |= {"vocab_size": 128, "hidden_dim": 64, "n_blocks": 2, "n_heads": 4, "model_length": 32}
MDLM |= {"time_conditioning": False, "torch_dtype": "float32", "transformers_version": "4.38.2"}


def published_folder(folder: Path, weights: str, **changes) -> str:
    """A folder of MDLM's remote code: `weights` names its file, or the index of two that share them."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MDLM | changes))
    (folder / "modeling_mdlm.py").write_text("raise RuntimeError('this code must not run')")
    state = prefixed("backbone.", "denoiser")
    save = save_file if "safetensors" in weights else torch.save
    parts = {weights: list(state)}
    if weights.endswith(".index.json"):
        stem, suffix = weights.removesuffix(".index.json").split(".")
        parts = {f"{stem}-0000{i + 1}-of-00002.{suffix}": list(state)[i::2] for i in range(2)}
        places = {key: name for name, keys in parts.items() for key in keys}
        (folder / weights).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for name, keys in parts.items():
        save({key: state[key] for key in keys}, folder / name)
    return str(folder)


WEIGHTS = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_folder_of_published_remote_code(tmp_path: Path, weights: str) -> None:
    folder = published_folder(tmp_path / "mdlm", weights)
    main(f"--checkpoint {folder} --kind denoiser --out {tmp_path / 'ours'}".split())
    model = EDLMForMaskedLM.from_pretrained(tmp_path / "ours")
    assert_same(model, converted("denoiser"))
    assert not model.config.time_conditioning and model.config.max_position_embeddings == 32
    with torch.no_grad():
        logits = model(published()["xt"]).logits
    torch.testing.assert_close(logits, published()["logits"], **MANIFEST["suggested_tolerance"])


def test_a_folder_with_time_conditioning(tmp_path: Path) -> None:
    folder = published_folder(tmp_path / "mdlm", "model.safetensors", time_conditioning=True)
    main(f"--checkpoint {folder} --kind denoiser --out {tmp_path / 'ours'}".split())
    with torch.no_grad():
        logits = EDLMForMaskedLM.from_pretrained(tmp_path / "ours")(
            published()["xt"], t=time_of(published()["sigma"])
        ).logits
    torch.testing.assert_close(logits, published()["logits_sigma"], **MANIFEST["suggested_tolerance"])


@pytest.mark.parametrize(
    "changes, arguments, message",
    [
        ({"n_blocks": 3}, "", "says n_blocks=3, the model has 2"),
        ({"hidden_dim": 768}, "", "says hidden_dim=768, the model has 64"),
        ({"vocab_size": 127}, "", "says vocab_size=127, the model has 128"),
        ({"n_heads": 8}, "", "num_heads=8 needs 4 frequencies"),
        ({"n_heads": 8}, "--num_heads 4", "says n_heads=8, the model has 4"),
    ],
)
def test_a_configuration_that_does_not_fit(tmp_path: Path, changes: dict, arguments: str, message: str) -> None:
    folder = published_folder(tmp_path / "mdlm", "model.safetensors", **changes)
    with pytest.raises(ValueError, match=message):
        main(f"--checkpoint {folder} --kind denoiser --out {tmp_path / 'ours'} {arguments}".split())
    assert not (tmp_path / "ours").exists()


def test_a_part_of_the_weights_is_missing(tmp_path: Path) -> None:
    folder = published_folder(tmp_path / "mdlm", "model.safetensors.index.json")
    (Path(folder) / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no such file: .*model-00002-of-00002.safetensors"):
        main(f"--checkpoint {folder} --kind denoiser --out {tmp_path / 'ours'}".split())


def test_a_repo_of_published_remote_code(hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights and configuration are downloaded, of the revision asked for, and nothing else."""
    repo, api = "kuleshov-group/mdlm-owt", huggingface_hub.HfApi(endpoint=hub.endpoint, token="hf_fake")
    api.create_repo(repo)
    api.create_branch(repo, branch="old")
    for branch, weights in (("main", "model.safetensors"), ("old", "pytorch_model.bin.index.json")):
        folder = published_folder(tmp_path / branch, weights, time_conditioning=branch == "old")
        if branch == "main":
            (Path(folder) / "pytorch_model.bin").write_text("not needed where there are safetensors")
        api.upload_folder(repo_id=repo, folder_path=folder, revision=branch)
    for name, value in (
        ("ENDPOINT", hub.endpoint),
        ("HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"),
        ("HF_HUB_CACHE", str(tmp_path / "cache")),
    ):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    hub.log.clear()
    for branch in ("main", "old"):
        revision = "--revision old" if branch == "old" else ""
        main(f"--checkpoint {repo} {revision} --kind denoiser --out {tmp_path / branch / 'ours'}".split())
        model = EDLMForMaskedLM.from_pretrained(tmp_path / branch / "ours")
        assert_same(model, converted("denoiser"))
        assert model.config.time_conditioning == (branch == "old")
    fetched = {path.rpartition("/")[2] for _, path, _ in hub.log if "/resolve/" in path}
    parts = {f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)}
    assert fetched == {"config.json", "model.safetensors", "pytorch_model.bin.index.json"} | parts
    with pytest.raises(huggingface_hub.errors.RepositoryNotFoundError, match="nobody/nothing"):
        main(f"--checkpoint nobody/nothing --kind denoiser --out {tmp_path / 'out'}".split())


def test_the_first_token_of_a_tokenizer_with_cls(tmp_path: Path) -> None:
    """The published code lets the texts of BERT's tokenizer begin with [CLS]; its mask is one of its own tokens."""
    folder = tokenizer_folder(tmp_path / "bert", 128, bos_token=None, cls_token="w7", mask_token="w9")
    save_file(tensors("ar"), tmp_path / "ar.safetensors")
    command = f"--checkpoint {tmp_path / 'ar.safetensors'} --kind ar --num_heads 4 --tokenizer {folder}"
    main(f"{command} --out {tmp_path / 'out'}".split())
    config = EDLMForCausalLM.from_pretrained(tmp_path / "out").config
    assert (config.bos_token_id, config.mask_token_id, config.vocab_size) == (7, 9, 128)


def test_command_line_errors(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_file(tensors("ar"), tmp_path / "ar.safetensors")
    command = f"--checkpoint {tmp_path / 'ar.safetensors'} --kind ar --out {tmp_path / 'out'}"
    with pytest.raises(SystemExit):
        main(command.split())
    assert "--num_heads must be given" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(f"{command} --revision main".split())
    assert "--revision is that of a Hub repo" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="no such file: .*none.ckpt"):  # a file's name is no repo's
        main(f"--checkpoint runs/none.ckpt --kind ar --out {tmp_path / 'out'}".split())
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
