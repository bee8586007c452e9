"""custom_generate/: the sampler on masked language models of others, by enumeration, and as the library loads it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GenerationConfig,
    GenerationMixin,
    GPT2Config,
    GPT2LMHeadModel,
    TopKLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from modeling_edlm import EDLMConfig, EDLMForCausalLM, EDLMGenerationConfig, EDLMModel
from modeling_edlm.custom_generate import generate
from support.toy import MASK, chain_law, make_toy, p_value

ROOT = Path(__file__).resolve().parent.parent
FREE = (MASK, MASK, MASK)
N = 20_000


def randomize(model, std: float, seed: int = 0):
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm.weight" in name.lower() else 0.0, std)
    return model.eval()


def make_bert(vocab_size=MASK + 1, length=3, std=0.6, cls=BertForMaskedLM):
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=length,
        mask_token_id=vocab_size - 1,
    )
    return randomize(cls(config), std)


def make_gpt2(vocab_size=MASK, bos_token_id=1, length=8):
    """It lacks the mask token."""
    config = GPT2Config(
        vocab_size=vocab_size, n_embd=16, n_layer=1, n_head=2, n_positions=length, bos_token_id=bos_token_id
    )
    return randomize(GPT2LMHeadModel(config), 0.5, seed=1)


class Exact:
    """What the enumeration needs of a model, computed by itself from the logits of both networks."""

    def __init__(self, bert, gpt2=None, energy_type="ar", function=None, energy_target="x0"):
        self.bert, self.gpt2, self.energy_type, self.function = bert, gpt2, energy_type, function
        self.config = SimpleNamespace(energy_target=energy_target)

    @torch.no_grad()
    def log_p_x0(self, xt, t=None):
        logits = self.bert(xt).logits
        logits[..., MASK] = float("-inf")
        return logits.log_softmax(-1)

    @torch.no_grad()
    def energy(self, x, xt, t):
        is_masked = xt == MASK
        is_filled = is_masked & (x != MASK)
        log_mu = torch.where(is_filled, self.log_p_x0(xt).gather(-1, x[..., None])[..., 0], 0.0).sum(-1)
        if self.function is not None:
            return self.function(x, xt, t, None, log_mu)
        bos = torch.full_like(x[:, :1], self.gpt2.config.bos_token_id)
        log_p = self.gpt2(torch.cat((bos, x[:, :-1]), dim=1)).logits.log_softmax(-1).gather(-1, x[..., None])[..., 0]
        return log_mu - (log_p * (is_masked if self.energy_type == "coar" else 1)).sum(-1)


def table_energy(x, xt, t, attention_mask, log_mu):
    """It depends on all that it is given, and its best candidates are none of the proposal's."""
    weights = torch.tensor([[0.3, -1.2, 0.9, 0.1], [1.1, 0.2, -0.8, 0.0], [-0.5, 0.7, 0.4, -0.2]])
    per_position = weights[torch.arange(x.shape[1]), x]
    return 1.5 * t * per_position.sum(-1) + (per_position * (xt == MASK)).prod(-1) + 0.3 * log_mu


# ---- the law


@pytest.mark.parametrize("kind", ["ar", "coar", "function", "step function"])
def test_the_law_is_that_of_the_enumeration(kind):
    bert, gpt2 = make_bert(), make_gpt2()
    if "function" in kind:
        target = "xs" if "step" in kind else "x0"
        exact = Exact(bert, function=table_energy, energy_target=target)
        arguments = {"energy": table_energy, "energy_target": target}
    else:
        exact = Exact(bert, gpt2, kind)
        arguments = {"energy": gpt2, "energy_type": kind}
    fixed = {"num_steps": 2, "num_candidates": 3, "energy_window": (1.0, 0.0), "seed": 0}
    samples = generate(bert, batch_size=N, **fixed, **arguments)
    assert p_value(samples, chain_law(exact, FREE, 2, 3)) > 1e-4
    assert p_value(samples, chain_law(exact, FREE, 2, 1)) < 1e-12
    window = {"energy_window": (1.0, 0.9), "seed": 1}
    samples = generate(bert, torch.tensor([[2, MASK, MASK]]), num_return_sequences=N, **fixed | window, **arguments)
    assert p_value(samples, chain_law(exact, (2, MASK, MASK), 2, 3, (1.0, 0.9))) > 1e-4


def test_without_an_energy_it_is_masked_diffusion():
    bert = make_bert()
    samples = generate(bert, batch_size=N, num_steps=2, seed=0)
    assert p_value(samples, chain_law(Exact(bert), FREE, 2, 1)) > 1e-4


@pytest.mark.parametrize(("energy_type", "target"), [("none", "x0"), ("ar", "x0"), ("nce", "x0"), ("nce", "xs")])
def test_parts_of_an_edlm_give_what_the_edlm_gives(energy_type, target):
    """Token for token: the sampler, the time, and the energy's own kind are the same."""
    toy = make_toy(energy_type, target, length=6)
    arguments = {"batch_size": 9, "num_steps": 4, "num_candidates": 4, "energy_window": (1.0, 0.0), "seed": 3}
    arguments["return_dict_in_generate"] = True
    expected = toy.generate(**arguments)
    energies = {"none": [None]}.get(energy_type, [toy.energy_model, toy.energy])
    for energy in energies:
        is_function = energy is not None and energy is not toy.energy_model
        output = generate(toy.denoiser, energy=energy, energy_target=target if is_function else None, **arguments)
        assert torch.equal(output.sequences, expected.sequences)
        assert torch.equal(output.energy_nfe, expected.energy_nfe)
        torch.testing.assert_close(output.energies, expected.energies, equal_nan=True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_text(side):
    """The BERT has absolute positions, so it must see every text where it would stand alone."""
    bert, gpt2 = make_bert(12, 24), make_gpt2(12, length=24)
    prompts = [[1, 2, 3, 4, 5], [6], [7, 11, 8]]
    arguments = {"energy": gpt2, "num_steps": 6, "num_candidates": 4, "energy_window": (1.0, 0.0), "seed": 5}
    arguments |= {"max_new_tokens": 7}
    texts = [generate(bert, torch.tensor([p]), first_row=row, **arguments)[0] for row, p in enumerate(prompts)]
    padding = [[0] * (5 - len(p)) for p in prompts]
    parts = zip(padding, prompts, strict=True)
    ids = torch.tensor([zeros + p if side == "left" else p + zeros for zeros, p in parts])
    batch = generate(bert, ids, attention_mask=(ids != 0).long(), **arguments)
    for row, text in zip(batch, texts, strict=True):
        start = len(row) - len(text) if side == "left" else 0
        assert torch.equal(row[start : start + len(text)], text)


def test_chunks_and_dropout_change_nothing(monkeypatch):
    bert, gpt2 = make_bert(12, 16), make_gpt2(12, length=16)
    arguments = {"energy": gpt2, "batch_size": 5, "num_steps": 4, "num_candidates": 3, "seed": 0}
    expected = generate(bert, **arguments)
    for module in (bert, gpt2):
        module.train()
    monkeypatch.setattr("modeling_edlm.backbone.CHUNK", 2 * 16 * 12)  # two rows' logits at a time
    assert torch.equal(generate(bert, **arguments, denoiser_batch_size=4, energy_batch_size=3), expected)
    assert bert.training and gpt2.training and gpt2.transformer.drop.training


class Drafts(BaseStreamer):
    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen.append(value.shape[-1])

    def put_draft(self, value):
        self.seen.append("draft")

    def end(self):
        self.seen.append("end")


def test_arguments_of_generate_arrive():
    bert, streamer = make_bert(12, 10), Drafts()
    prompt = torch.tensor([[1, 2]])
    arguments = {"num_steps": 3, "seed": 0, "streamer": streamer}
    text = generate(bert, prompt, token_type_ids=torch.zeros_like(prompt), **arguments, revision="main")
    assert text.shape == (1, 10) and (text[:, :2] == prompt).all() and (text != 11).all()
    assert streamer.seen == [2, "draft", "draft", "draft", 8, "end"]
    config = EDLMGenerationConfig(num_steps=3, max_length=6, do_sample=False)
    greedy = generate(bert, input_ids=prompt, generation_config=config)
    top = generate(bert, prompt, num_steps=3, max_length=6, seed=0, logits_processor=[TopKLogitsWarper(1)])
    assert greedy.shape == (1, 6) and torch.equal(greedy, top)
    stopped = generate(bert, prompt, num_steps=3, stopping_criteria=[lambda ids, _: torch.ones(len(ids)).bool()])
    assert (stopped == 11).any()


def no_bos():
    return randomize(GPT2LMHeadModel(GPT2Config(vocab_size=12, n_embd=8, n_layer=1, n_head=1, bos_token_id=None)), 0.1)


SMALL = {"vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"assistant_model": "x"}, "assistant_model is not supported.*'x'"),
        ({"prefix_allowed_tokens_fn": print}, "prefix_allowed_tokens_fn is not supported"),
        ({"negative_prompt_ids": torch.ones(1, 2)}, "negative_prompt_ids is not supported"),
        ({"synced_gpus": True}, "synced_gpus is not supported"),
        ({"num_stepz": 3}, "no argument .*num_stepz"),
        ({"compile": True}, "compile=True"),
        ({"generation_config": GenerationConfig(num_beams=4)}, "no argument .*num_beams"),
        ({"inputs": torch.ones(1, 2).long(), "input_ids": torch.ones(1, 2).long()}, "inputs or input_ids, not both"),
        ({"token_type_ids": torch.ones(1, 2)}, "token_type_ids must be zeros"),
        ({"mask_token_id": 12}, r"mask_token_id must lie in \[0, 12\), got 12"),
        ({"max_length": 17}, "17 tokens, more than max_position_embeddings=16"),
        ({"energy": 3}, "energy must be a model, a function or the name.*3"),
        ({"energy": make_gpt2(20)}, "energy has vocab_size 20, the denoiser has 12 with mask_token_id 11"),
        ({"energy": make_gpt2(11), "mask_token_id": 4}, "energy has vocab_size 11.*mask_token_id 4"),
        ({"energy": EDLMForCausalLM(EDLMConfig(**SMALL, mask_token_id=3))}, "energy has vocab_size 12"),
        ({"energy": EDLMModel(EDLMConfig(**SMALL))}, "got an EDLMModel"),
        ({"energy": no_bos()}, "bos_token_id None"),
        ({"energy": make_gpt2(11), "energy_type": "nce"}, "energy_type is ar or coar.*'nce'"),
        ({"energy": table_energy, "energy_type": "ar"}, "energy_type .*for a causal language model"),
        ({"energy": make_gpt2(11), "energy_target": "xs"}, "energy_target .*for a function"),
        ({"energy_kwargs": {"subfolder": "ar"}}, "energy_kwargs are for an energy that is a name"),
        ({"energy": lambda *_: torch.zeros(())}, r"energy must give a tensor \(\d+,\).*torch.Size\(\[\]\)"),
        ({"energy": lambda *_: 0.0}, "energy must give a tensor.*float"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(make_bert(12, 16), **{"num_steps": 2, "seed": 0} | arguments)


def test_a_model_must_say_what_its_mask_is_and_how_much_it_takes():
    bert = make_bert(12, 16)
    bert.config.mask_token_id = None
    with pytest.raises(ValueError, match="mask_token_id must be given: the configuration of BertForMaskedLM has none"):
        generate(bert)
    expected = generate(make_bert(12, 16), seed=0, num_steps=2, max_length=9)
    assert torch.equal(generate(bert, mask_token_id=11, seed=0, num_steps=2, max_position_embeddings=9), expected)


# ---- as the library loads it


def load_script(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Bert(BertForMaskedLM, GenerationMixin):
    """The library's masked models have no generate()."""


REMOTE = """
import json, sys
sys.modules["modeling_edlm"] = None  # an import of the package would fail
import torch
from transformers import (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification,
                          BertForMaskedLM, GenerationMixin, GPT2LMHeadModel)

class Bert(BertForMaskedLM, GenerationMixin):
    pass

repo, parts, out = sys.argv[1:]
trust = {"trust_remote_code": True}
bert, gpt2 = Bert.from_pretrained(parts + "/bert"), GPT2LMHeadModel.from_pretrained(parts + "/gpt2")
prompt = torch.tensor([[1, 2, 3]])
common = {"custom_generate": repo, "num_steps": 4, "num_candidates": 4, "energy_window": (1.0, 0.0), "seed": 0} | trust
result = {
    "none": bert.generate(prompt, **common),
    "ar": bert.generate(input_ids=prompt, energy=gpt2, **common),
    "named": bert.generate(prompt, energy=parts + "/gpt2", energy_type="coar", revision="main", **common),
}
ar = AutoModelForCausalLM.from_pretrained(repo, subfolder="ar", **trust)
result["ar of edlm"] = bert.generate(prompt, energy=ar, **common)
named = {"energy": repo, "energy_kwargs": {"subfolder": "ar"} | trust}
result["named ar of edlm"] = bert.generate(prompt, **named, **common)
edlm = AutoModel.from_pretrained(repo, **trust)
result["nce"] = bert.generate(prompt, energy=edlm.energy_model, **common)
result["named nce"] = bert.generate(prompt, energy=repo, energy_kwargs=trust, **common)
result["config"] = bert.generate(prompt, generation_config=edlm.generation_config, **common)
# none of the repo's own models is changed by it
result["greedy"] = ar.generate(prompt, max_new_tokens=5, do_sample=False)
result["edlm"] = edlm.generate(prompt, num_steps=4, seed=0)
result["denoiser"] = AutoModelForMaskedLM.from_pretrained(repo, **trust).generate(prompt, num_steps=4, seed=0)
json.dump({name: value.tolist() for name, value in result.items()}, open(out, "w"))
"""


def test_the_library_finds_it_and_it_finds_its_imports(tmp_path):
    """In a process that cannot import modeling_edlm; and the AR model of the same repo goes on as it was."""
    assemble = load_script(ROOT / "hub_cards" / "publish" / "assemble.py")
    repo, parts = tmp_path / "repo", tmp_path / "parts"
    sizes = SMALL | {"cond_dim": 0, "max_position_embeddings": 12}
    edlm = randomize(EDLMModel(EDLMConfig(**sizes, energy_type="nce")), 0.4)
    ar = randomize(EDLMForCausalLM(EDLMConfig(**sizes)), 0.4, seed=1)
    edlm.save_pretrained(repo)
    ar.save_pretrained(repo / "ar")
    for copy in (*repo.glob("*.py"), *(repo / "ar").glob("*.py")):
        copy.unlink()
    assemble.assemble(repo, assemble.model_code())
    assemble.assemble(repo / "custom_generate", assemble.generate_code())
    bert, gpt2 = make_bert(12, 12, cls=Bert), make_gpt2(12, length=12)
    bert.save_pretrained(parts / "bert")
    gpt2.save_pretrained(parts / "gpt2")

    result = run_remote(tmp_path, REMOTE, repo, parts, tmp_path / "result.json")
    prompt = torch.tensor([[1, 2, 3]])
    common = {"num_steps": 4, "num_candidates": 4, "energy_window": (1.0, 0.0), "seed": 0}
    expected = {
        "none": generate(bert, prompt, **common),
        "ar": generate(bert, prompt, energy=gpt2, **common),
        "named": generate(bert, prompt, energy=gpt2, energy_type="coar", **common),
        "ar of edlm": generate(bert, prompt, energy=ar, **common),
        "nce": generate(bert, prompt, energy=edlm.energy_model, **common),
        "greedy": ar.generate(prompt, max_new_tokens=5, do_sample=False),
        "edlm": edlm.generate(prompt, num_steps=4, seed=0),
        "denoiser": edlm.denoiser.generate(prompt, num_steps=4, seed=0),
    }
    again = {"named ar of edlm": "ar of edlm", "named nce": "nce", "config": "none"}
    expected |= {name: expected[same] for name, same in again.items()}
    assert result == {name: value.tolist() for name, value in expected.items()}
    assert len({json.dumps(result[name]) for name in ("none", "ar", "named", "ar of edlm", "nce")}) == 5


def run_remote(tmp_path: Path, code: str, *arguments) -> dict:
    script, target = tmp_path / "remote.py", Path(arguments[-1])
    script.write_text(code)
    env = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    env |= {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    env.pop("PYTHONPATH", None)
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, env=env, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(target.read_text())


def test_assembled_folders_hold_what_is_imported_and_nothing_else(tmp_path):
    assemble = load_script(ROOT / "hub_cards" / "publish" / "assemble.py")
    code = assemble.generate_code()
    assert {
        "generate.py",
        "generation_edlm.py",
        "energies.py",
        "foreign.py",
        "proposal.py",
        "sampler.py",
    } <= code.keys()
    assert not {"modeling_edlm.py", "configuration_edlm.py", "custom_generate.py"} & code.keys()
    assert "custom_generate.py" not in assemble.model_code() and "pipeline_edlm.py" in assemble.model_code()
    folder = tmp_path / "custom_generate"
    assert sorted(assemble.assemble(folder, code)) == sorted(code) and assemble.assemble(folder, code) == []
    (folder / "old.py").write_text("")
    assert assemble.assemble(folder, code) == ["old.py"] and {p.name for p in folder.iterdir()} == code.keys()
