"""Configuration, networks, round trips through a folder, and loading without the package."""

import copy
import inspect
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from test_sampler import chi_square
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from modeling_edlm import EDLMConfig, EDLMEnergyModel, EDLMForCausalLM, EDLMForMaskedLM, EDLMModel
from modeling_edlm.backbone import CACHE, apply_linear, compiled
from modeling_edlm.energies import causal_log_prob
from modeling_edlm.vocabulary import log_prob_projected
from support.fake_hub import TOKEN
from support.toy import MASK, make_toy
from training.common.contrast import nce_loss

SMALL = {"vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "cond_dim": 4}
SMALL["max_position_embeddings"] = 16


def randomize(model, std=0.3):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, std)
    return model.eval()


def same_weights(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- configuration


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_sise": 3}, "hidden_sise.*hidden_size"),
        ({"energy_typ": "ar"}, "energy_typ.*energy_type"),
        ({"hidden_size": "16"}, "hidden_size"),
        ({"hidden_size": 18, "num_attention_heads": 4}, "hidden_size .*18 and 4"),
        ({"mask_token_id": 12}, "mask_token_id .*12"),
        ({"bos_token_id": -1}, "bos_token_id .*-1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers .*0"),
        ({"energy_type": "gan"}, "energy_type .*'gan'"),
        ({"energy_target": "xt"}, "energy_target .*'xt'"),
        ({"energy_pooling": "max"}, "energy_pooling .*'max'"),
        ({"energy_target": "xs", "energy_type": "ar"}, "energy_target='xs' needs energy_type='nce'"),
        ({"energy_target": "xs", "energy_pooling": "mean"}, "energy_target='xs' needs energy_pooling"),
        ({"time_conditioning": True, "cond_dim": 0}, "time_conditioning"),
        ({"dropout": 1.0}, "dropout .*1"),
        ({"num_layers": 3}, "num_layers.*num_hidden_layers"),
        ({"masked_token_id": 3}, "masked_token_id.*mask_token_id"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"energy_num_layers": 0}, "energy_num_layers .*0"),
        ({"prepend_bos": True}, "prepend_bos=True needs a bos_token_id"),  # by default that is the mask
    ],
    ids=str,
)
def test_config_is_strict(changes, message):
    with pytest.raises(Exception, match=message) as error:
        EDLMConfig(**SMALL | changes)
    assert isinstance(error.value, ValueError | TypeError) or "ValidationError" in type(error.value).__name__


def test_config_round_trip(tmp_path):
    config = EDLMConfig(**SMALL, energy_type="nce", energy_config={"hidden_size": 8}, energy_num_layers=1)
    config.save_pretrained(tmp_path)
    loaded = EDLMConfig.from_pretrained(tmp_path)
    fields = list(EDLMConfig.__annotations__)
    assert [getattr(loaded, name) for name in fields] == [getattr(config, name) for name in fields]
    assert (config.mask_token_id, config.bos_token_id, config.intermediate_size) == (11, 11, 64)
    assert config.for_energy().hidden_size == 8 and config.for_energy().vocab_size == 12
    json.loads((tmp_path / "config.json").read_text())


def test_defaults_build_denoiser_and_energy():
    model = EDLMModel(EDLMConfig(**SMALL, energy_type="nce", energy_num_layers=1))
    assert len(model.energy_model.network.backbone.blocks) == 1 and len(model.denoiser.backbone.blocks) == 2


# ---- networks


def test_adaptive_norms_and_heads_start_at_zero():
    """Zero at the leaf: a fresh block is the identity, a fresh denoiser uniform, a fresh energy zero."""
    model = EDLMModel(EDLMConfig(**SMALL, energy_type="nce")).eval()
    xt = torch.randint(0, 12, (2, 16))
    hidden, _ = model.denoiser.encode(xt)
    assert torch.equal(hidden, model.denoiser.backbone.embedding(xt)) and hidden.std() > 0
    assert (model.denoiser(xt).logits == 0).all()
    assert (model.energy(xt.clamp(max=10), xt) == 0).all()
    for name, parameter in model.named_parameters():
        is_zero = "modulation" in name or name.endswith(("bias", "network.fc2.weight", "denoiser.head.linear.weight"))
        assert (parameter == 0).all() == is_zero, name


def test_subs():
    model = randomize(EDLMForMaskedLM(EDLMConfig(**SMALL)))
    xt = torch.tensor([[1, 11, 3, 11]])
    p = model.log_p_x0(xt).exp()
    assert model.log_p_x0(xt).dtype == torch.float32
    torch.testing.assert_close(p.sum(-1), torch.ones(1, 4))
    assert (p[..., 11] == 0).all() and p[0, 0, 1] == 1 and p[0, 2, 3] == 1


@pytest.mark.parametrize("cls", [EDLMForMaskedLM, EDLMForCausalLM])
def test_products_without_gradients_are_the_same(cls, monkeypatch):
    """oneDNN's products, GELU within, and rotation in place give what autograd's kernels give."""
    model, x = randomize(cls(EDLMConfig(**SMALL))), torch.randint(0, 11, (3, 16))
    expected, made, product = model(x).logits, [], torch.ops.mkldnn._linear_pointwise
    fake = SimpleNamespace(_linear_pointwise=lambda *args: made.append(args[3]) or product(*args))
    monkeypatch.setattr(torch.ops, "mkldnn", fake)
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, expected, atol=1e-5, rtol=1e-5)
    assert made.count("gelu") == 2 and made.count("none") >= 2 * 3 + 1
    made.clear()
    assert model(x).logits.requires_grad and not made  # autograd would not know of them


@pytest.mark.parametrize("change", ["hook", "other forward", "bfloat16", "autocast", "subclass", "input's gradient"])
def test_other_layers_are_called_as_they_are(change, monkeypatch):
    """What was changed about a layer (adapter, hook, quantised weight) must not be passed by."""
    layer, x, seen = nn.Linear(8, 8), torch.randn(2, 8), []
    expected = nn.functional.gelu(layer(x), approximate="tanh").detach()
    monkeypatch.setattr(torch.ops, "mkldnn", None)  # no product of oneDNN is possible
    layer.requires_grad_(False)
    if change == "hook":
        layer.register_forward_hook(lambda *_: seen.append("called"))
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    if change == "other forward":
        layer.forward = lambda x: seen.append("called") or nn.functional.linear(x, layer.weight, layer.bias)
    if change == "bfloat16":
        layer, x = layer.bfloat16(), x.bfloat16()
    if change == "subclass":
        layer.weight = nn.Parameter(TwoTensor(layer.weight.data, layer.weight.data), requires_grad=False)
    if change == "input's gradient":
        x.requires_grad_()
    with torch.autocast("cpu", enabled=change == "autocast"):
        y = apply_linear(layer, x, gelu=True)
    y = y.a if isinstance(y, TwoTensor) else y
    torch.testing.assert_close(y.float(), expected, atol=0.05, rtol=0)
    assert seen == ["called"] * (change in ("hook", "other forward")) and y.requires_grad == x.requires_grad


@pytest.mark.parametrize("cls", [EDLMForMaskedLM, EDLMForCausalLM])
def test_attention_backends_agree(cls):
    model = randomize(cls(EDLMConfig(**SMALL)))
    x = torch.randint(0, 11, (3, 9))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9, [0] + [1] * 8])
    results = []
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        results.append((model(x).logits, model(x, attention_mask=mask).logits[mask.bool()]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cls", [EDLMForMaskedLM, EDLMForCausalLM])
def test_padding_on_the_left_changes_no_output(cls):
    model = randomize(cls(EDLMConfig(**SMALL)))
    x = torch.randint(0, 11, (1, 6))
    padded = torch.cat((torch.full((1, 3), 5), x), dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 3:], model(x).logits, atol=1e-5, rtol=1e-4)


def test_the_autoregressive_model_never_writes_a_mask():
    """Its mask logit is never trained, so the stock sampler would draw it now and then."""
    model = randomize(EDLMForCausalLM(EDLMConfig(**SMALL)))
    model.head.linear.bias.data[11] = 20.0
    text = model.generate(max_new_tokens=12, do_sample=True, num_return_sequences=20, pad_token_id=0)
    assert text.shape == (20, 13) and (text[:, 0] == 11).all() and (text[:, 1:] != 11).all()


def test_the_callers_generation_configuration_is_taken():
    """Its BOS and its suppressed tokens, then those of the model's own; beside them never a mask."""
    model, given = randomize(small(EDLMForCausalLM)), GenerationConfig(max_new_tokens=4, bos_token_id=3, pad_token_id=0)
    model.generation_config = GenerationConfig(max_length=9, pad_token_id=0)
    model.head.linear.bias.data[[11, 5, 7]] = torch.tensor([30.0, 20.0, 10.0])
    assert model.generate(generation_config=given).tolist() == [[3, 5, 5, 5, 5]]
    assert model.generate(None, given, bos_token_id=None, suppress_tokens=None).tolist() == [[3, 5, 5, 5, 5]]
    given.suppress_tokens = [5]
    assert model.generate(generation_config=given).tolist() == [[3, 7, 7, 7, 7]]
    assert (given.suppress_tokens, given.bos_token_id) == ([5], 3)
    assert model.generate(generation_config=given, bos_token_id=2, suppress_tokens=[7])[0, :3].tolist() == [2, 5, 5]
    assert model.generate(max_new_tokens=2).tolist() == [[11, 5, 5]]  # the mask, where there is no BOS
    model.generation_config.update(bos_token_id=4, suppress_tokens=[5])
    assert model.generate().tolist() == [[4] + [7] * 8]
    assert model.generate(max_new_tokens=2, bos_token_id=6).tolist() == [[6, 7, 7]]
    given.update(bos_token_id=None, suppress_tokens=None)
    assert model.generate(generation_config=given).tolist() == [[4, 7, 7, 7, 7]]


def test_causal_model_sees_no_future_and_its_cache_changes_nothing():
    model = randomize(EDLMForCausalLM(EDLMConfig(**SMALL)))
    x = torch.randint(0, 11, (2, 10))
    changed = x.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 11
    logits = model(x).logits
    assert torch.equal(logits[:, :6], model(changed).logits[:, :6])
    for name in ("cache", "past_key_values"):  # the first since transformers 5.24
        past = model(x[:, :4], use_cache=True)[CACHE]
        step = model(x[:, 4:5], **{name: past}, use_cache=True)
        torch.testing.assert_close(step.logits[:, 0], logits[:, 4], atol=1e-5, rtol=1e-4)
    with compiled(), torch.no_grad():  # which has no place for a cache
        step = model(x[:, 4:5], cache=model(x[:, :4], use_cache=True)[CACHE], use_cache=True)
    torch.testing.assert_close(step.logits[:, 0], logits[:, 4], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="cache and past_key_values"):
        model(x[:, 4:5], cache=past, past_key_values=past)
    greedy = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(x, use_cache=True, **greedy), model.generate(x, use_cache=False, **greedy))


@pytest.mark.parametrize("use_cache", [True, False])
def test_autoregressive_text_follows_its_models_own_law(use_cache):
    """Chi-square over all 27 texts of three tokens, 20,000 of them from one seed: wrong once in a million if right."""
    model = randomize(EDLMForCausalLM(EDLMConfig(**SMALL | {"vocab_size": 4, "cond_dim": 0})), std=0.5)
    texts_N3 = torch.cartesian_prod(*[torch.arange(3)] * 3)
    log_p_N = causal_log_prob(model, texts_N3, None, model.config.bos_token_id, model.config.mask_token_id)
    torch.manual_seed(0)
    options = {"max_new_tokens": 3, "do_sample": True, "top_k": 0, "num_return_sequences": 20_000, "pad_token_id": 0}
    text = model.generate(use_cache=use_cache, **options)[:, 1:]
    counts_N = torch.bincount(text @ torch.tensor([9, 3, 1]), minlength=27)
    assert chi_square(counts_N, log_p_N.detach().exp()) > 1e-6


CLASSES = [EDLMForMaskedLM, EDLMForCausalLM, EDLMEnergyModel, EDLMModel]


def small(cls, length=16, **changes):
    changes |= {"energy_type": "nce" if cls is EDLMEnergyModel else "none", "max_position_embeddings": length}
    return cls(EDLMConfig(**SMALL | changes))


@pytest.mark.parametrize("cls", CLASSES)
def test_an_argument_that_forward_does_not_know_is_an_error(cls):
    """One that is swallowed is how transformers 5.24 lost the cache of the autoregressive model. The library's own
    `return_dict` is known. What a Trainer keeps of a data set are the names in the signature.
    """
    model = small(cls)
    x = torch.zeros(1, 3, dtype=torch.int64)
    more = {"xt": x} if cls is EDLMEnergyModel else {}
    for name in ("the_cache", "label", "position_id"):
        with pytest.raises(TypeError, match=f"'{name}'"):
            model(x, **more, **{name: None})
    assert torch.equal(model(x, **more, return_dict=False)[0], model(x, **more, return_dict=True).logits)
    parameters = inspect.signature(cls.forward).parameters.values()
    assert {p.kind for p in parameters} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert {"input_ids", "attention_mask", "labels", "num_items_in_batch"} <= {p.name for p in parameters}
    shown = {"inputs_embeds": (torch.zeros(1, 3, 16), "a tensor .1, 3, 16."), "output_attentions": (True, "True")}
    for name, (value, text) in (shown | {"output_hidden_states": (True, "True")}).items():
        assert model(x, **more, **{name: None}).logits.shape[0] == 1  # PEFT names them to every model
        with pytest.raises(ValueError, match=f"{cls.__name__} does not support {name}, got {text}"):
            model(x, **more, **{name: value})


def test_a_whole_edlm_passes_on_all_that_its_denoiser_takes():
    model = randomize(EDLMModel(EDLMConfig(**SMALL | {"time_conditioning": True})))
    x, positions, t = torch.randint(0, 12, (2, 6)), torch.tensor([0, 3, 11]), torch.tensor([0.2, 0.9])
    mask, places = torch.ones_like(x), torch.arange(6).expand(2, -1) + 3
    mask[0, :2] = 0
    call = dict(attention_mask=mask, t=t, positions=positions, position_ids=places, labels=x % 11, num_items_in_batch=7)
    whole, denoiser = model(x, **call), model.denoiser(x, **call)
    assert torch.equal(whole.logits, denoiser.logits) and torch.equal(whole.loss, denoiser.loss)
    assert model(x, mask, t, positions).logits.shape == (3, 12)


def test_losses_are_means_over_the_labels_that_count():
    x, labels = torch.randint(0, 11, (3, 6)), torch.randint(0, 11, (3, 6), dtype=torch.int32)
    labels[0, :4] = labels[2] = -100
    for cls in (EDLMForMaskedLM, EDLMForCausalLM):
        model = randomize(small(cls))
        log_p, shift = model(x).logits[..., :11].log_softmax(-1), int(cls is EDLMForCausalLM)  # no mass on the mask
        places = [(n, i) for n in range(3) for i in range(shift, 6) if labels[n, i] != -100]
        nll = -sum(log_p[n, i - shift, labels[n, i]] for n, i in places)
        torch.testing.assert_close(model(x, labels=labels).loss, nll / len(places))
        torch.testing.assert_close(model(x, labels=labels, num_items_in_batch=40).loss, nll / 40)
    with pytest.raises(ValueError, match="labels need all logits"):
        model(x, labels=labels, logits_to_keep=1)
    energy, xt = randomize(small(EDLMEnergyModel)), torch.full_like(x, 11)
    e = energy(x, xt).logits[:, 0]
    loss = energy(x, xt, labels=torch.tensor([1, 0, -100])).loss
    torch.testing.assert_close(2 * loss, nce_loss(e[:1], e[1:2]))


@pytest.mark.parametrize("cls", CLASSES)
def test_accumulation_in_the_librarys_trainer_gives_the_step_of_the_large_batch(cls, tmp_path):
    """Rows with different numbers of labels, one at a time or all at once: the same loss, gradient and weights. A
    Trainer keeps the columns that `forward` names.
    """
    torch.manual_seed(0)
    x = torch.randint(0, 11, (4, 6))
    labels = x.clone()
    for row, gone in enumerate((0, 5, 3, 1)):
        labels[row, :gone] = -100
    rows = [{"input_ids": a, "labels": b} for a, b in zip(x, labels, strict=True)]
    if cls is EDLMEnergyModel:
        rows = [{"input_ids": a, "xt": torch.full((6,), 11), "labels": n % 2} for n, a in enumerate(x)]
    data = Dataset.from_list(
        [{k: v.tolist() if torch.is_tensor(v) else v for k, v in r.items()} | {"n": 1} for r in rows]
    )
    steps = []
    for batch_size in (1, 4):
        model = randomize(small(cls, dropout=0.0))
        accumulation = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 4 // batch_size}
        more = {"max_steps": 1, "logging_steps": 1, "optim": "sgd", "learning_rate": 0.1, "report_to": "none"}
        options = TrainingArguments(tmp_path, **accumulation, **more, use_cpu=True, disable_tqdm=True)
        trainer = Trainer(model, options, train_dataset=data, eval_dataset=data)
        trainer.train()
        log = trainer.state.log_history[0]
        steps.append((log["loss"], log["grad_norm"], model.state_dict()))
        evaluated = trainer.evaluate()["eval_loss"]
    for one, four in zip(steps[0][2].values(), steps[1][2].values(), strict=True):
        torch.testing.assert_close(one, four, atol=1e-6, rtol=1e-5)
    assert steps[0][:2] == pytest.approx(steps[1][:2], rel=1e-4) and steps[0][1] > 0
    batch = {k: torch.stack([torch.as_tensor(row[k]) for row in rows]) for k in rows[0]}
    assert evaluated == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    assert steps[0][0] == pytest.approx(randomize(small(cls, dropout=0.0))(**batch).loss.item(), rel=1e-4)


def test_texts_of_the_librarys_sequence_trainer(tmp_path):
    """Its own arguments of `generate()` (`synced_gpus`, the labels) pass through the autoregressive model."""
    model, x = randomize(small(EDLMForCausalLM, pad_token_id=0, eos_token_id=0)), torch.randint(1, 11, (3, 4))
    options = {"predict_with_generate": True, "generation_max_length": 7, "generation_num_beams": 2}
    arguments = Seq2SeqTrainingArguments(tmp_path, **options, report_to="none", use_cpu=True, disable_tqdm=True)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in x]
    found = Seq2SeqTrainer(model, arguments).predict(rows)
    expected = model.generate(x, attention_mask=torch.ones_like(x), max_length=7, num_beams=2)
    assert torch.equal(torch.tensor(found.predictions)[:, :7], expected)  # the rest is padding
    assert found.metrics["test_loss"] == pytest.approx(model(x, labels=x).loss.item(), rel=1e-5)


def test_positions_project_the_same_rows():
    for cls in (EDLMForMaskedLM, EDLMForCausalLM):
        model = randomize(cls(EDLMConfig(**SMALL)))
        x = torch.randint(0, 12, (10, 16))
        for positions in (torch.tensor([0, 5, 9, 20]), torch.randperm(160)[:101]):  # the second is padded inside
            expected = model(x).logits.flatten(0, 1)[positions]
            torch.testing.assert_close(model(x, positions=positions).logits, expected, atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = randomize(EDLMForMaskedLM(EDLMConfig(**SMALL, dropout=0.0))).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.backbone.blocks[0].gradient_checkpointing
        x = torch.arange(16)[None] % 12
        model(x, labels=x.clamp(max=10)).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_energy_pooling():
    """Sum: only positions masked in xt and given in x count. Mean: hidden states over all positions, then the head."""
    xt, x = torch.tensor([[1, 11, 11, 4]]), torch.tensor([[1, 2, 11, 4]])
    model = randomize(EDLMEnergyModel(EDLMConfig(**SMALL, energy_type="nce", energy_pooling="sum")))
    assert model(xt, xt=xt).logits.item() == 0 != model(x, xt=xt).logits.item()
    model.network.config.energy_pooling = "mean"
    assert model(xt, xt=xt).logits.item() != 0
    with pytest.raises(ValueError, match="xt must be given"):
        model(x)
    denoiser = EDLMForMaskedLM(EDLMConfig(**SMALL))
    with pytest.raises(ValueError, match="'energy_num_layers': 3.*2 blocks"):
        EDLMEnergyModel.from_denoiser(denoiser, energy_num_layers=3)


def test_a_bos_tells_where_a_text_begins():
    """Positions are relative: without a BOS, masks alone give the same at every place. It counts for no position."""
    texts = torch.full((2, 5), 11)
    texts[1, 3] = 4
    positions = torch.tensor([0, 3, 6, 8])
    where = torch.zeros(2, 5, dtype=torch.bool).flatten().index_fill(0, positions, True).view(2, 5)
    for prepend_bos in (False, True):
        model = randomize(EDLMForMaskedLM(EDLMConfig(**SMALL, prepend_bos=prepend_bos, bos_token_id=1)))
        with torch.no_grad():
            logits = model(texts).logits
            assert logits.shape == (2, 5, 12)
            assert torch.allclose(logits[0, 0], logits[0, 4], atol=1e-5) != prepend_bos
            by_hand = model.head(*model.backbone(torch.nn.functional.pad(texts, (1, 0), value=1)))[:, 1:]
            torch.testing.assert_close(model(texts, positions=positions).logits, logits.flatten(0, 1)[positions])
            torch.testing.assert_close(
                model(texts, position_ids=torch.arange(5)[None]).logits, logits, atol=1e-5, rtol=1e-5
            )
            (_, some), *rest = model.logit_chunks(texts, where)
            assert not rest
            torch.testing.assert_close(some[:, :-1], logits.flatten(0, 1)[positions][:, :-1])
            if prepend_bos:
                torch.testing.assert_close(by_hand, logits)
            for sides in ((3, 0), (0, 2)):
                padded, mask = (torch.nn.functional.pad(x, sides) for x in (texts, torch.ones_like(texts)))
                start = sides[0]
                torch.testing.assert_close(
                    model(padded, attention_mask=mask).logits[:, start : start + 5], logits, atol=1e-5, rtol=1e-5
                )


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_an_energy_of_a_denoiser_with_a_bos_has_it_too(pooling):
    config = EDLMConfig(**SMALL, prepend_bos=True, bos_token_id=1)
    energy = randomize(EDLMEnergyModel.from_denoiser(randomize(EDLMForMaskedLM(config)), energy_pooling=pooling))
    xt, x = torch.tensor([[11, 3, 11, 11], [11, 11, 3, 11]]), torch.tensor([[5, 3, 6, 2], [5, 6, 3, 2]])
    with torch.no_grad():
        values = energy(x, xt=xt).logits
        padded, mask = (torch.nn.functional.pad(v, (2, 1)) for v in (x, torch.ones_like(x)))
        again = energy(padded, xt=torch.nn.functional.pad(xt, (2, 1)), attention_mask=mask).logits
    assert values[0] != values[1]
    torch.testing.assert_close(values, again, atol=1e-5, rtol=1e-5)


def test_time_must_be_given_to_a_time_conditioned_model():
    with pytest.raises(ValueError, match="t must be given"):
        make_toy("none").log_p_x0(torch.tensor([[MASK, 1, 2]]))


# ---- putting parts together


def test_from_components_keeps_the_parts(tmp_path):
    denoiser = randomize(EDLMForMaskedLM(EDLMConfig(**SMALL)))
    lm = randomize(EDLMForCausalLM(EDLMConfig(**SMALL | {"hidden_size": 8, "cond_dim": 0})))
    nce = EDLMEnergyModel.from_denoiser(denoiser, energy_num_layers=1, energy_pooling="mean")
    for energy, energy_type in ((None, "none"), (lm, "ar"), (lm, "coar"), (nce, "nce")):
        model = EDLMModel.from_components(denoiser, energy, energy_type)
        assert model.denoiser is denoiser and model.energy_model is energy
        model.save_pretrained(tmp_path / energy_type)
        loaded = EDLMModel.from_pretrained(tmp_path / energy_type)
        assert same_weights(loaded, model) and loaded.energy_type == energy_type
        kwargs = {"num_steps": 3, "num_candidates": 3, "seed": 1, "max_length": 8}
        assert torch.equal(loaded.generate(**kwargs), model.generate(**kwargs))
        assert same_weights(EDLMForMaskedLM.from_pretrained(tmp_path / energy_type), denoiser)
    assert same_weights(EDLMForCausalLM.from_pretrained(tmp_path / "coar"), lm)
    assert same_weights(EDLMEnergyModel.from_pretrained(tmp_path / "nce"), nce)
    with pytest.raises(ValueError, match="EDLMForCausalLM needs energy_type .*'nce'"):
        EDLMForCausalLM.from_pretrained(tmp_path / "nce")


def test_a_denoiser_folder_is_an_edlm_without_energy(tmp_path):
    denoiser = randomize(EDLMForMaskedLM(EDLMConfig(**SMALL)))
    denoiser.save_pretrained(tmp_path)
    model = EDLMModel.from_pretrained(tmp_path)
    assert model.energy_model is None and same_weights(model.denoiser, denoiser)
    xt = torch.full((2, 5), 11)
    assert (model.energy(xt.clamp(max=3), xt) == 0).all()


def test_an_energy_starts_from_its_denoiser():
    denoiser = randomize(EDLMForMaskedLM(EDLMConfig(**SMALL)))
    energy = EDLMEnergyModel.from_denoiser(denoiser)
    assert torch.equal(energy.network.backbone.blocks[1].fc1.weight, denoiser.backbone.blocks[1].fc1.weight)
    x = torch.randint(0, 11, (2, 8))
    embed = energy.network.backbone.embedding
    joined = energy.network.projection(torch.cat((embed(x), embed(x)), dim=-1))
    torch.testing.assert_close(joined, denoiser.backbone.embedding(x), atol=1e-6, rtol=1e-5)
    xt = torch.where(x > 5, 11, x)
    assert (energy(x, xt=xt).logits == 0).all()  # the proposal is left as it is


def test_a_gpt2_energy_without_the_mask_token(tmp_path):
    """Any causal language model over the same ids: the mask may be the one id that it lacks."""
    denoiser = randomize(EDLMForMaskedLM(EDLMConfig(**SMALL)))
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=11, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=10, eos_token_id=10)
    ).eval()
    model = EDLMModel.from_components(denoiser, gpt2, "coar").eval()
    x = torch.randint(0, 10, (2, 6))
    xt = x.clone()
    xt[:, ::2] = 11
    with torch.no_grad():
        inputs = torch.cat((torch.full((2, 1), 10), x[:, :-1]), dim=1)
        log_p = gpt2(inputs).logits.log_softmax(-1).gather(-1, x[..., None])[..., 0]
        log_mu = model.log_p_x0(xt).gather(-1, x[..., None])[..., 0]
        torch.testing.assert_close(model.energy(x, xt), (log_mu - log_p)[:, ::2].sum(-1))
    model.save_pretrained(tmp_path)
    loaded = EDLMModel.from_pretrained(tmp_path)
    assert same_weights(loaded, model)
    assert torch.equal(loaded.generate(seed=0, num_steps=3), model.generate(seed=0, num_steps=3))


def test_a_text_is_no_longer_than_the_energy_can_read(tmp_path):
    """Of its 8 positions GPT-2 has none more; EDLM's own model would read on, past what it was trained for."""
    sizes = dict(vocab_size=12, n_embd=16, n_layer=1, n_head=2, bos_token_id=10, eos_token_id=None)
    for energy in (GPT2LMHeadModel(GPT2Config(n_positions=8, **sizes)), small(EDLMForCausalLM, length=8)):
        model = EDLMModel.from_components(randomize(small(EDLMForMaskedLM)), randomize(energy))
        model.save_pretrained(tmp_path)
        for whole in (model, EDLMModel.from_pretrained(tmp_path)):
            assert whole.generate(seed=0, num_steps=2, num_candidates=2).shape == (1, 8)
            with pytest.raises(ValueError, match="make 9 tokens, more than max_position_embeddings=8"):
                whole.generate(max_length=9)
            with pytest.raises(ValueError, match="has 9 tokens, more than max_position_embeddings=8"):
                whole.likelihood(torch.zeros(1, 9, dtype=torch.int64))
            assert whole.energy_model.config.max_position_embeddings == 8
    model = EDLMModel.from_components(small(EDLMForMaskedLM), GPT2LMHeadModel(GPT2Config(n_positions=32, **sizes)))
    assert model.config.max_position_embeddings == 16 and model.energy_model.config.n_positions == 32


@pytest.mark.parametrize(
    "changes, energy_type, message",
    [
        ({"vocab_size": 20}, "ar", "vocab_size 20, the denoiser has 12"),
        ({"mask_token_id": 3}, "ar", "mask_token_id 11"),
        ({}, "nce", "energy_type='nce' does not go with .*EDLMForCausalLM"),
        ({}, "none", "energy_type='none' does not go with"),
    ],
    ids=str,
)
def test_parts_that_do_not_fit(changes, energy_type, message):
    denoiser, lm = EDLMForMaskedLM(EDLMConfig(**SMALL)), EDLMForCausalLM(EDLMConfig(**SMALL | changes))
    with pytest.raises(ValueError, match=message):
        EDLMModel.from_components(denoiser, lm, energy_type)


# ---- folders


def test_a_folder_is_not_taken_for_another_network(tmp_path):
    """Denoiser and AR model have the same layers: the wrong class would load them without a word."""
    EDLMForMaskedLM(EDLMConfig(**SMALL)).save_pretrained(tmp_path / "denoiser")
    EDLMForCausalLM(EDLMConfig(**SMALL)).save_pretrained(tmp_path / "ar")
    with pytest.raises(ValueError, match="holds an EDLMForMaskedLM; this class loads EDLMForCausalLM"):
        EDLMForCausalLM.from_pretrained(tmp_path / "denoiser")
    for cls in (EDLMModel, EDLMForMaskedLM, EDLMEnergyModel):
        with pytest.raises(ValueError, match="holds an EDLMForCausalLM"):
            cls.from_pretrained(tmp_path / "ar")


@torch.no_grad()
@pytest.mark.parametrize("dtype, device", [(torch.float64, None), (torch.bfloat16, None), (torch.float32, "meta")])
def test_the_defaults_of_torch_are_not_the_models(dtype, device):
    """What is made within: an energy from its denoiser, log-probabilities without a table of logits."""
    denoiser = randomize(small(EDLMForMaskedLM))
    x, ids = torch.randint(0, 12, (2, 6)), torch.randint(0, 11, (9,))
    hidden, weight, bias = torch.randn(9, 16), torch.randn(11, 16), torch.randn(11)

    def results():
        start = {} if device else EDLMEnergyModel.from_denoiser(denoiser).network.backbone.state_dict()
        return *start.values(), denoiser.log_p_x0(x), log_prob_projected(hidden, weight, bias, 3, ids)

    expected = results()
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        found = results()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


@pytest.mark.parametrize("cls", CLASSES)
def test_copies_pickles_and_shards_are_the_same_model(cls, tmp_path):
    model = randomize(small(cls))
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 5
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), cls.from_pretrained(tmp_path)):
        assert same_weights(other, model) and not same_storage(other, model)
        assert other.config.fields() == model.config.fields()


@pytest.mark.parametrize("cls", CLASSES)
def test_a_folder_of_older_weights_holds_the_new_ones(cls, tmp_path):
    """Whole or in shards, and the other way round: transformers would load the whole ones, whichever are new."""
    old, new = randomize(small(cls)), randomize(small(cls), std=0.5)
    for sizes in (("5GB", "5KB"), ("5KB", "5GB"), ("5KB", "9KB")):
        for model, size in zip((old, new), sizes, strict=True):
            model.save_pretrained(tmp_path, max_shard_size=size)
        assert same_weights(cls.from_pretrained(tmp_path), new)
        assert (tmp_path / "model.safetensors").exists() != (tmp_path / "model.safetensors.index.json").exists()
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter, adapter_config.json"):
        old.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    assert same_weights(cls.from_pretrained(tmp_path), new)


def same_storage(a, b) -> bool:
    return bool({p.data_ptr() for p in a.parameters()} & {p.data_ptr() for p in b.parameters()})


@pytest.mark.parametrize("cls", CLASSES)
def test_the_vocabulary_is_not_resized(cls):
    """The mask id, the energy's vocabulary and a checkpoint's say how large it is."""
    model = randomize(small(cls))
    before = copy.deepcopy(model)
    for call in ({"new_num_tokens": 15}, {"new_num_tokens": 5}, {"pad_to_multiple_of": 8}):
        with pytest.raises(ValueError, match="resize_token_embeddings cannot change a vocabulary of 12 tokens"):
            model.resize_token_embeddings(**call)
    assert model.resize_token_embeddings(12) is model.resize_token_embeddings() is model.get_input_embeddings()
    assert same_weights(model, before) and model.config.vocab_size == 12


@pytest.mark.parametrize("cls", [EDLMForMaskedLM, EDLMForCausalLM, EDLMModel])
def test_a_model_under_the_compiler_generates_the_same(cls):
    """`torch.compile(model)` stands before it; `model.compile()` is within."""
    model, x = randomize(small(cls)), torch.randint(0, 11, (2, 3))
    options = {"do_sample": False, "pad_token_id": 0} if cls is EDLMForCausalLM else {"num_steps": 2, "seed": 0}
    expected = model.generate(x, max_new_tokens=3, **options)
    assert torch.equal(torch.compile(model, backend="eager").generate(x, max_new_tokens=3, **options), expected)
    if cls is EDLMForCausalLM:  # compiled anew at each length: seconds
        return
    model.compile(backend="eager")
    assert torch.equal(model.generate(x, max_new_tokens=3, **options), expected)


def test_an_autoregressive_model_is_pushed_alone(hub, tmp_path, monkeypatch):
    """With its code, and without the pipeline of the sampler."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    api = HfApi(endpoint=hub.endpoint, token=TOKEN)
    monkeypatch.setattr("transformers.utils.hub._hf_api", api)  # made once for a process
    model = randomize(small(EDLMForCausalLM))
    model.push_to_hub("me/ar", token=TOKEN)
    folder = api.snapshot_download("me/ar", local_dir=tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    assert found["architectures"] == ["EDLMForCausalLM"] and "custom_pipelines" not in found
    assert found["auto_map"]["AutoModelForCausalLM"] == "modeling_edlm.EDLMForCausalLM"
    assert (tmp_path / "modeling_edlm.py").exists() and not (tmp_path / "custom_generate").exists()
    assert same_weights(EDLMForCausalLM.from_pretrained(folder), model)


def test_dtype_round_trip(tmp_path):
    model = randomize(EDLMModel(EDLMConfig(**SMALL, energy_type="nce"))).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert {v.dtype for v in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert EDLMModel.from_pretrained(tmp_path).dtype == torch.bfloat16
    full = EDLMModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert full.dtype == torch.float32 and torch.equal(
        full.denoiser.backbone.embedding.weight, model.denoiser.backbone.embedding.weight.float()
    )
    assert model.generate(seed=0, num_steps=3, num_candidates=2).shape == (1, 16)


def test_missing_weights_are_an_error(tmp_path):
    """The library would fill them with noise and report it in a table."""
    randomize(EDLMModel(EDLMConfig(**SMALL, energy_type="nce"))).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["energy_model.network.fc1.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights: energy_model.network.fc1.weight"):
        EDLMModel.from_pretrained(tmp_path)


def test_corrupted_weights_are_an_error(tmp_path):
    randomize(EDLMModel(EDLMConfig(**SMALL))).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Exception, match="(?i)incomplete|safetensor|header"):
        EDLMModel.from_pretrained(tmp_path)
    path.write_bytes(whole)
    tensors = load_file(path)
    tensors["denoiser.head.linear.weight"] = torch.zeros(3, 3)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(RuntimeError, match="(?i)mismatch"):
        EDLMModel.from_pretrained(tmp_path)


REMOTE = """
import json, sys, torch
sys.modules["modeling_edlm"] = None  # an import of the package would fail
from transformers import (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM,
                          AutoModelForSequenceClassification)
folder, out = sys.argv[1:]
kwargs = {"trust_remote_code": True}
model = AutoModel.from_pretrained(folder, **kwargs)
energy = AutoModelForSequenceClassification.from_pretrained(folder, **kwargs)
lm = AutoModelForCausalLM.from_pretrained(folder, subfolder="ar", **kwargs)
x = torch.tensor([[1, 2, 3, 4]])
xt = torch.tensor([[1, 11, 11, 4]])
result = {
    "classes": [type(m).__name__ for m in (model, AutoModelForMaskedLM.from_pretrained(folder, **kwargs), energy, lm)],
    "config": type(AutoConfig.from_pretrained(folder, **kwargs)).__name__,
    "generation_config": [type(model.generation_config).__name__, model.generation_config.num_steps],
    "tokens": model.generate(torch.tensor([[1, 2]]), max_length=8, num_candidates=3, seed=0).tolist(),
    "energy": energy(x, xt=xt).logits.item(),
    "log_p": lm(x).logits.log_softmax(-1).sum().item(),
}
model.save_pretrained(out)
json.dump(result, open(out + "/result.json", "w"))
"""


def test_folder_works_without_the_package(tmp_path):
    """All Auto classes, from one flat folder, in a process that cannot import modeling_edlm; and saved again."""
    model = randomize(EDLMModel(EDLMConfig(**SMALL, energy_type="nce")))
    model.generation_config.num_steps = 5
    lm = randomize(EDLMForCausalLM(EDLMConfig(**SMALL)))
    model.save_pretrained(tmp_path / "repo")
    lm.save_pretrained(tmp_path / "repo" / "ar")
    for code in (tmp_path / "repo" / "ar").glob("*.py"):
        code.unlink()
    result = run_remote(tmp_path / "repo", tmp_path / "again")
    x, xt = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 11, 11, 4]])
    assert result["classes"] == ["EDLMModel", "EDLMForMaskedLM", "EDLMEnergyModel", "EDLMForCausalLM"]
    assert result["config"] == "EDLMConfig" and result["generation_config"] == ["EDLMGenerationConfig", 5]
    tokens = model.generate(torch.tensor([[1, 2]]), max_length=8, num_candidates=3, seed=0)
    assert result["tokens"] == tokens.tolist()
    assert result["energy"] == pytest.approx(model.energy(x, xt).item(), rel=1e-5)
    assert result["log_p"] == pytest.approx(lm(x).logits.log_softmax(-1).sum().item(), rel=1e-5)
    (tmp_path / "repo" / "ar").rename(tmp_path / "again" / "ar")
    assert run_remote(tmp_path / "again", tmp_path / "third")["tokens"] == tokens.tolist()


def run_remote(folder: Path, out: Path) -> dict:
    out.mkdir()
    script = out / "remote.py"
    script.write_text(REMOTE)
    env = os.environ | {"HF_HOME": str(out / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    env.pop("PYTHONPATH", None)
    subprocess.run([sys.executable, script, folder, out], env=env, cwd=out, check=True, stdin=subprocess.DEVNULL)
    return json.loads((out / "result.json").read_text())


def test_folder_without_code_works_with_the_package(tmp_path):
    """The example of docs/loading.md as a user of `pip install .` runs it on a clone, where the code copies are not."""
    model = randomize(EDLMModel(EDLMConfig(**SMALL)))
    model.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.py"):
        file.unlink()
    code = "import sys, modeling_edlm; from transformers import AutoModel; "
    code += (
        "print(AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).generate(seed=0, num_steps=3).tolist())"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path], check=True, capture_output=True, text=True)
    assert json.loads(run.stdout) == model.generate(seed=0, num_steps=3).tolist()


def test_remote_files_import_only_torch_transformers_and_the_standard_library():
    import ast

    import modeling_edlm

    # huggingface_hub and safetensors are there wherever transformers is; what stands in a try is optional
    allowed = sys.stdlib_module_names | {"torch", "transformers", "huggingface_hub", "safetensors"}
    for file in Path(modeling_edlm.__file__).parent.glob("*.py"):
        if file.name in ("__init__.py", "convert_checkpoint.py"):
            continue
        tree = ast.parse(file.read_text())
        optional = {id(node) for part in ast.walk(tree) if isinstance(part, ast.Try) for node in ast.walk(part)}
        for node in (node for node in ast.walk(tree) if id(node) not in optional):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, file.name
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in allowed, file.name
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 and node.module and "." not in node.module, file.name


# ---- NCE


def test_nce_loss_is_the_formula():
    data, proposal = torch.tensor([0.3, -1.0]), torch.tensor([2.0, -0.4])
    expected = (-(torch.sigmoid(-data)).log() - torch.sigmoid(proposal).log()).mean()
    torch.testing.assert_close(nce_loss(data, proposal), expected)
