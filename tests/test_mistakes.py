"""The fifteen mistakes found in published code (DESIGN, section 5): none may come back."""

import ast
import inspect
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import modeling_edlm
import training
from modeling_edlm import EDLMConfig, EDLMForCausalLM, EDLMGenerationConfig, sampler
from modeling_edlm.energies import candidate_energies, causal_log_prob
from modeling_edlm.likelihood import log_mean_exp
from modeling_edlm.schedule import conditioning
from support.toy import MASK, chain_law, completions, exact_energy, law_p_k, log_mu, make_toy, p_value
from training.common.contrast import contrast

FREE = (MASK, MASK, MASK)
ALWAYS = {"energy_window": (1.0, 0.0), "seed": 0}


def test_01_the_weights_are_softmax_of_minus_energy():
    model = make_toy("nce")
    sequences = model.generate(batch_size=20_000, num_steps=2, num_candidates=3, **ALWAYS)
    assert p_value(sequences, chain_law(model, FREE, 2, 3)) > 1e-4
    worst = chain_law(model, FREE, 2, 3, law=lambda mu, energy, k: law_p_k(mu, -energy, k))
    assert p_value(sequences, worst) < 1e-12


def test_02_candidates_stay_with_their_row():
    """Every candidate that is scored completes the xt that it is scored for, and the kept one is its row's."""
    model = make_toy("nce", length=8)
    plain = model.energy

    def checked(x, xt, *rest):
        assert torch.equal(x[xt != MASK], xt[xt != MASK]) and (x != MASK).all()
        return plain(x, xt, *rest)

    model.energy = checked
    prompts = torch.randint(0, MASK, (27, 8), generator=torch.Generator().manual_seed(0))
    prompts[:, 3:] = MASK
    output = model.generate(prompts, num_steps=4, num_candidates=5, **ALWAYS)
    assert torch.equal(output[:, :3], prompts[:, :3])
    for size in (1, 4, 7):  # chunks that cut through the candidates of a row
        assert torch.equal(
            model.generate(prompts, num_steps=4, num_candidates=5, energy_batch_size=size, **ALWAYS), output
        )


def test_03_the_energy_sums_log_probabilities():
    """What the sampler hands to an AR energy is log mu of the candidate, not a sum of probabilities."""
    model = make_toy("ar")
    plain = model.energy

    def checked(x, xt, t, attention_mask, log_mu_N):
        log_p_NL = model.log_p_x0(xt, t).gather(-1, x[..., None])[..., 0]
        torch.testing.assert_close(log_mu_N, log_p_NL.sum(-1))
        assert (log_mu_N < 0).all()
        energy_N = plain(x, xt, t, attention_mask, log_mu_N)
        torch.testing.assert_close(energy_N, plain(x, xt, t))
        return energy_N

    model.energy = checked
    model.generate(batch_size=9, num_steps=3, num_candidates=4, **ALWAYS)


def test_04_time_is_converted_once():
    """Networks are told -log alpha, finite at t=1, and a step energy the time of xs."""
    model, told = make_toy("nce", "xs"), {"denoiser": [], "energy": []}
    for name, backbone in (("denoiser", model.denoiser.backbone), ("energy", model.energy_model.network.backbone)):
        backbone.time_embedding.register_forward_pre_hook(
            lambda module, args, name=name: told[name].append(float(args[0][0]))
        )
    model.generate(batch_size=64, num_steps=4, num_candidates=2, **ALWAYS)
    t = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    assert told["denoiser"] == pytest.approx(conditioning(t)[:-1].tolist(), rel=1e-5)
    assert told["energy"] == pytest.approx(conditioning(t)[1:].tolist(), rel=1e-5)
    assert told["denoiser"][0] == pytest.approx(-math.log(1e-3), rel=1e-4)


def test_05_a_half_precision_model_draws_in_full_precision(monkeypatch):
    """bfloat16 noise lowers the entropy of what is drawn; draws of a bfloat16 model are of float32 logits."""
    import modeling_edlm.proposal as module

    seen, plain = [], module.draw

    def checked(logits_MV, u_MK):
        seen.append((logits_MV.dtype, u_MK.dtype))
        x_MK, log_p_MK = plain(logits_MV, u_MK)
        log_p_MV = logits_MV.log_softmax(-1)
        entropy = -(log_p_MV.exp() * log_p_MV.clamp(min=-1e4)).sum(-1).mean()
        assert float(-log_p_MK.mean()) == pytest.approx(float(entropy), abs=0.02)
        return x_MK, log_p_MK

    monkeypatch.setattr(module, "draw", checked)
    model = make_toy("none", length=8).to(torch.bfloat16)
    model.generate(batch_size=20_000, num_steps=1, seed=0, denoiser_batch_size=20_000)
    assert seen == [(torch.float32, torch.float64)]


def test_06_long_sums_of_ar_log_probabilities_are_float32():
    config = EDLMConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, cond_dim=0)
    torch.manual_seed(0)
    lm = EDLMForCausalLM(config).eval().to(torch.bfloat16)
    torch.nn.init.normal_(lm.head.linear.weight)
    x0_NL = torch.randint(0, 49, (2, 1024))
    inputs = torch.cat((torch.full((2, 1), 49), x0_NL[:, :-1]), dim=1)
    logits = lm(inputs).logits.double()
    logits[..., 49] = -torch.inf
    exact = logits.log_softmax(-1).gather(-1, x0_NL[..., None]).sum((1, 2))
    ours = causal_log_prob(lm, x0_NL, torch.ones_like(x0_NL, dtype=torch.bool), 49, 49)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=0)
    assert (exact.bfloat16().double() - exact).abs().max() > 1  # what half precision would cost


@torch.no_grad()
@pytest.mark.parametrize("energy_type", ["ar", "coar"])
def test_07_the_first_token_counts_on_both_sides(energy_type):
    """With the BOS the AR model is a distribution: exp(log p_AR) sums to 1 over all sequences."""
    model = make_toy(energy_type)
    x = torch.tensor(completions(FREE, (0, 1, 2)))
    xt = torch.full_like(x, MASK)
    log_mu_N = model.log_p_x0(xt, 1.0).gather(-1, x[..., None])[..., 0].sum(-1)
    log_p_ar_N = log_mu_N - model.energy(x, xt, 1.0)
    assert float(log_p_ar_N.exp().sum()) == pytest.approx(1, abs=1e-5)


def test_08_the_proposal_has_no_dropout():
    model = make_toy("nce", length=8)
    x0, t, u = torch.randint(0, MASK, (4, 8)), torch.full((4,), 0.7), torch.rand(4, 8)
    model.denoiser.train()
    with pytest.raises(ValueError, match="denoiser must be in eval mode"):
        contrast(model.denoiser, x0, t, None, u, 0)
    model.denoiser.eval()
    positive, negatives, xt = contrast(model.denoiser, x0, t, None, u, 0)
    assert torch.equal(positive, x0) and torch.equal(negatives[:, 0][xt != MASK], x0[xt != MASK])


def test_09_the_average_of_the_weights_is_what_is_saved(tmp_path):
    """See also test_training.py (resume) and test_convert.py (shadow weights of published checkpoints)."""
    from accelerate import Accelerator

    from training.common.arguments import LoopArguments
    from training.common.loop import train

    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    saved, seen = {}, []
    arguments = LoopArguments(
        output_dir=str(tmp_path), max_steps=50, learning_rate=1.0, warmup_steps=0, ema_decay=0.9, report_to="none"
    )

    def loss_fn(model, step, micro_step):
        seen.append(float(model.weight.detach()))
        return -model.weight.sum(), {}

    train(
        arguments,
        model,
        loss_fn=loss_fn,
        evaluate=lambda m, is_last: {},
        save=lambda m, weights, folder: saved.update(weight=float(weights["weight"])),
        accelerator=Accelerator(cpu=True),
    )
    weights = seen[1:] + [float(load_file(tmp_path / "checkpoint.safetensors")["model.weight"])]
    assert float(model.weight.detach()) == saved["weight"]  # what is returned is the average too
    average = weights[0]
    for n, weight in enumerate(weights[1:], start=1):
        decay = min(0.9, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * weight
    assert saved["weight"] == pytest.approx(average, rel=1e-5)
    assert saved["weight"] < weights[-1] - 0.1


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("energy_type", ["nce", "coar"])
def test_10_no_candidate_gets_a_copy_of_the_vocabulary(energy_type, monkeypatch):
    """Nothing larger than (L, V) lives at a time, although the K candidates are scored in one pass; the same with a
    processor, for which there must be logits."""
    V, L, K = 40_001, 12, 16
    sizes = {"vocab_size": V, "mask_token_id": V - 1, "bos_token_id": V - 1, "hidden_size": 4}
    model = make_toy(energy_type, length=L, num_attention_heads=1, **sizes)
    whole = model.generate(batch_size=1, num_steps=3, num_candidates=K, **ALWAYS)
    monkeypatch.setattr("modeling_edlm.backbone.CHUNK", L * V)
    monkeypatch.setitem(modeling_edlm.vocabulary.BLOCK, "cpu", L * V)
    with LargestTensor() as largest:
        in_pieces = model.generate(batch_size=1, num_steps=3, num_candidates=K, **ALWAYS)
        model.generate(batch_size=1, num_steps=3, num_candidates=K, top_k=40, **ALWAYS)
    assert largest.numel <= L * V
    assert torch.equal(in_pieces, whole)


def test_11_every_draw_is_used(monkeypatch):
    """One draw for each candidate and position of a step, and one choice: nothing is drawn twice."""
    import modeling_edlm.proposal as module

    shapes, plain = [], module.draw
    monkeypatch.setattr(module, "draw", lambda p, u: shapes.append(tuple(u.shape)) or plain(p, u))
    model = make_toy("nce", length=6)
    output = model.generate(num_steps=4, num_candidates=3, output_history=True, return_dict_in_generate=True, **ALWAYS)
    masked = [int((state == MASK).sum()) for state in output.history]
    expected = [(before, 3) for before, after in zip(masked, masked[1:], strict=False) if before > after]
    assert shapes == expected
    shapes.clear()
    output = model.generate(num_steps=4, num_candidates=1, seed=0, output_history=True, return_dict_in_generate=True)
    revealed = [-int(n) for n in torch.tensor([int((state == MASK).sum()) for state in output.history]).diff()]
    assert shapes == [(n, 1) for n in revealed if n]


def test_12_a_row_without_a_reveal_is_not_computed():
    """Decided row by row and before the loop, from the reveal schedule: no test of the batch on the device."""
    model, rows = make_toy("nce", length=3), []
    model.denoiser.backbone.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    output = model.generate(batch_size=500, num_steps=64, num_candidates=1, seed=0, return_dict_in_generate=True)
    assert sum(rows) == int(output.nfe.sum()) and int(output.nfe.max()) <= 3
    expected = 64 * (1 - (1 - 1 / 64) ** 3)  # performance notes, 3.1
    assert float(output.nfe.float().mean()) == pytest.approx(expected, abs=0.05)
    source = inspect.getsource(sampler.denoise)
    assert "allclose" not in source and ".item()" not in source


def test_13_log_z_is_estimated_from_many_samples():
    def estimate(model, state, t, num_samples):
        xt_1L = torch.tensor([state])
        proposal = model.denoiser.propose(xt_1L, xt_1L == MASK, num_samples, (0, torch.arange(1), 0), t)
        log_w_NK = -candidate_energies(model.energy, proposal.x_NKL, xt_1L, t, proposal.log_mu_NK)[0].double()
        log_z, _ = log_mean_exp(log_w_NK)
        return float(log_z), float((log_w_NK - log_z).exp().std()) / num_samples**0.5

    model = make_toy("nce")
    state = (MASK, 1, MASK)
    log_mu_C = log_mu(model, state, 0.6, (0, 2))
    energy_C = exact_energy(model, completions(state, (0, 2)), state, 0.6, 0.0)
    exact = float((log_mu_C - energy_C).logsumexp(0))
    with torch.no_grad():
        log_z, stderr = estimate(model, state, 0.6, 40_000)
        assert abs(log_z - exact) < 4 * stderr and stderr < 0.05
        log_z, stderr = estimate(make_toy("coar"), FREE, 1.0, 4096)
        assert abs(log_z) < 4 * stderr  # Z = 1 by construction
    with pytest.raises(ValueError, match="num_samples .* 1"):
        model.likelihood(torch.tensor([[0, 1, 2]]), estimator="paper", num_samples=1)


def test_14_no_path_is_written_into_the_code():
    folders = [Path(package.__file__).parent for package in (modeling_edlm, training)]
    path = re.compile(r"^(\.{0,2}/|~|[A-Za-z]:\\)\S+|\.(ckpt|pt|bin)$|^[\w-]+/[\w-]+$")
    allowed = {"tokens/s", "s/sample", "bits/token", "Ctrl-C", "/proc/cpuinfo"}
    for file in (file for folder in folders for file in folder.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in allowed:
                assert not path.search(node.value), f"{file.name}:{node.lineno}: {node.value!r}"


def test_15_the_default_window_is_the_papers():
    assert EDLMGenerationConfig().energy_window == (1.0, 0.8)
    assert make_toy("nce").generation_config.energy_window == (1.0, 0.8)
    output = make_toy("nce", length=64).generate(num_steps=10, seed=0, return_dict_in_generate=True)
    assert (~output.ess[0].isnan()).nonzero()[:, 0].tolist() == [0, 1, 2]  # t = 1, 0.9, 0.8
