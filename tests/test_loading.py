"""Loading by names on a Hub: online, pinned, quantised and offline, by the newest transformers and the oldest.

Each load is that of a process which cannot import this package and starts in an empty folder (by_name.py). The oldest
environment has torch, transformers and what these need, nothing else.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from fake_hub import FakeHub
from huggingface_hub import CommitOperationAdd, HfApi
from safetensors.torch import load, save
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from modeling_edlm import EDLMForCausalLM, EDLMModel
from modeling_edlm.adapter import CONFIG, DESCRIPTION, WEIGHTS
from modeling_edlm.configuration_edlm import AUTO_MAP
from modeling_edlm.custom_generate import generate

ROOT = Path(__file__).resolve().parent.parent
CARDS = ROOT / "hub_cards"
INTERPRETERS = {"newest": Path(sys.executable), "oldest": ROOT / ".venv-oldest" / "bin" / "python"}
REPO, LIGHT, ADAPTER, WHOLE, BERT = (f"user/{name}" for name in ("edlm", "light", "books", "whole", "bert"))
FIXED = {"num_steps": 6, "num_candidates": 3, "energy_window": [1.0, 0.0], "max_length": 24, "seed": 7}
SAMPLE = FIXED | {"batch_size": 2}

spec = importlib.util.spec_from_file_location("assemble", CARDS / "assemble.py")
assemble = importlib.util.module_from_spec(spec)
spec.loader.exec_module(assemble)


def model_files(folder: Path) -> dict[str, bytes]:
    """A model folder as published, by name."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".py")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    return files | assemble.model_code() | {f"custom_generate/{k}": v for k, v in assemble.generate_code().items()}


def adapter_files(base: str) -> dict[str, bytes]:
    """The adapter that is in the repository, as published for this base."""
    files = {name: (CARDS / "edlm-wiki27-books" / name).read_bytes() for name in (CONFIG, DESCRIPTION, WEIGHTS)}
    return files | {name: with_fields(files[name], base_model_name_or_path=base) for name in (CONFIG, DESCRIPTION)}


def with_fields(content: bytes, **fields) -> bytes:
    return json.dumps(json.loads(content) | fields).encode()


def with_other(content: bytes, name: str) -> bytes:
    weights = load(content)
    return save(weights | {name: weights[name] + torch.linspace(-1, 1, weights[name].numel()).view_as(weights[name])})


class Hub:
    """The stand-in for the Hub, and processes that know no other and share a cache."""

    def __init__(self, fake: FakeHub, folder: Path):
        self.api = HfApi(endpoint=fake.endpoint, token="hf_fake")
        self.environment = {k: v for k, v in fake.environment(folder / "home").items() if k != "PYTHONPATH"}
        self.folder, self.runs = folder, 0

    def publish(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Change these files in one commit, whose hash is returned."""
        changes = [CommitOperationAdd(name, content) for name, content in files.items()]
        return self.api.create_commit(repo, changes, commit_message="files", revision=branch).oid

    def run(self, python: Path, function: str, offline: bool = False, **arguments):
        """What a function of by_name.py returns; offline, there is no Hub any more either."""
        self.runs += 1
        folder = self.folder / f"run{self.runs}"
        folder.mkdir()
        out = folder.with_suffix(".json")
        changes = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"} if offline else {}
        command = [python, "-P", ROOT / "tests" / "by_name.py", function, json.dumps(arguments), out]
        process = {"env": self.environment | changes, "cwd": folder, "stdin": subprocess.DEVNULL, "timeout": 300}
        done = subprocess.run(command, capture_output=True, text=True, **process)
        assert done.returncode == 0, done.stderr[-5000:]
        return json.loads(out.read_text())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """With the model of the repository at REPO."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with FakeHub() as fake:
        hub = Hub(fake, tmp_path)
        for repo in (REPO, LIGHT, ADAPTER, WHOLE, BERT):
            hub.api.create_repo(repo)
        hub.first = hub.publish(REPO, model_files(CARDS / "edlm-wiki27"))
        yield hub


@pytest.fixture(params=INTERPRETERS)
def python(request) -> Path:
    found = INTERPRETERS[request.param]
    if not found.exists():
        pytest.fail(f"{found} is missing; `make test` makes that environment")
    return found


@pytest.fixture(scope="module")
def model():
    return EDLMModel.from_pretrained(CARDS / "edlm-wiki27")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CARDS / "edlm-wiki27")


@pytest.fixture(scope="module")
def texts():
    """x (4, 20) and xt, with half of it masked."""
    x = torch.randint(0, 27, (4, 20), generator=torch.Generator().manual_seed(0))
    return x, x.masked_fill(torch.arange(20) % 2 == 0, 27)


def written(model, tokenizer, **options) -> str:
    return tokenizer.decode(model.generate(tokenizer("the city", return_tensors="pt").input_ids, **options)[0])


def close(values, expected: torch.Tensor):
    """To a rounding error of sums in another order."""
    torch.testing.assert_close(torch.tensor(values), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_all_that_a_repo_has_by_its_name(hub, python, model, tokenizer, texts, tmp_path):
    """The same as from the folder by the package; then once more from the cache, without a Hub."""
    x, xt = texts
    light = CARDS / "edlm-wiki27-light"
    hub.publish(LIGHT, model_files(light))
    bert = BertForMaskedLM(
        BertConfig(28, 16, 1, 2, 32, max_position_embeddings=24, mask_token_id=27, initializer_range=0.5)
    ).eval()
    bert.save_pretrained(tmp_path / "bert")
    hub.publish(BERT, {path.name: path.read_bytes() for path in (tmp_path / "bert").iterdir()})
    arguments = {"repo": REPO, "light": LIGHT, "bert": BERT, "sample": SAMPLE, "x": x.tolist(), "xt": xt.tolist()}
    result = hub.run(python, "everything", **arguments)

    denoiser, ar = model.denoiser, EDLMForCausalLM.from_pretrained(CARDS / "edlm-wiki27", subfolder="ar")
    tokens = model.generate(**SAMPLE).tolist()
    assert result["tokens"] == result["configured"] == tokens
    assert result["tokens of the denoiser"] == denoiser.generate(**SAMPLE).tolist() != tokens
    assert result["tokens of the AR model"] == ar.generate(max_new_tokens=9, do_sample=False).tolist()
    close(result["logits"], denoiser(xt).logits[0])
    close(result["logits of the AR model"], ar(x).logits[0])
    close(result["energy"], model.energy(x, xt))
    close(result["energy within"], model.energy(x, xt))
    close(result["light energy"], EDLMModel.from_components(denoiser).load_energy(str(light)).energy(x, xt))
    assert result["custom_generate"] == generate(bert, xt, energy=model.energy_model, **FIXED).tolist()
    half = EDLMModel.from_pretrained(CARDS / "edlm-wiki27", dtype=torch.bfloat16)
    assert result["tokens in bfloat16"] == half.generate(**SAMPLE).tolist()
    assert result["dtypes"] == [["torch.float32"], ["torch.bfloat16"], ["torch.float32"]]

    assert result["config"] == {"model_type": "edlm", "vocab_size": 28, "energy_type": "nce", "auto_map": AUTO_MAP}
    assert result["generation_config"] == [128, 128, [1.0, 0.8]]
    assert result["text"] == "the city in one nine zero two" and result["mask"] == [27, 256]
    assert result["written"] == written(model, tokenizer, **FIXED)
    masked = torch.tensor([result["ids"]])
    assert result["filled"] == denoiser(masked).logits[0, 5].topk(5).indices.tolist()
    assert [name for name, _ in result["origins"]] == [
        *("EDLMConfig", "EDLMModel", "EDLMForMaskedLM", "EDLMEnergyModel", "EDLMForCausalLM"),
        *("EDLMTextGenerationPipeline", "EDLMForMaskedLM"),
    ]
    assert {module.rpartition(".")[0] for _, module in result["origins"]} == {modules(REPO, hub.first)}
    assert "EDLMForCausalLM needs energy_type in ('ar', 'coar'), the checkpoint has 'nce'" in result["not causal"]
    assert "trust_remote_code=True" in result["not trusted"]
    assert result["without cache"] == "none"

    again = hub.run(python, "everything", offline=True, **arguments)
    assert again.pop("without cache").startswith("OSError: We couldn't connect to")
    assert again == {name: value for name, value in result.items() if name in again}
    assert result.keys() - again.keys() == {"without cache"}


def modules(repo: str, sha: str) -> str:
    """The package that the library makes of a repo's code."""
    return f"transformers_modules.{repo.replace('/', '.')}.{sha}"


def test_the_environments_are_what_they_say(hub, python):
    found = hub.run(python, "environment")
    constraints = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    if python == INTERPRETERS["oldest"]:
        assert found["transformers"] == "5.17.0" and not {"accelerate", "peft", "edlm"} & set(found["installed"])
    else:
        assert found["transformers"] == constraints["transformers"]


def test_a_revision_pins_code_and_weights(hub, python, model, tokenizer):
    """A branch has other weights, defaults and code, and the newest commit's code is broken."""
    name, weights = "denoiser.head.linear.bias", "model.safetensors"
    files = model_files(CARDS / "edlm-wiki27")
    hub.api.create_tag(REPO, tag="v1", revision=hub.first)
    hub.api.create_branch(REPO, branch="other")
    changes = {
        weights: with_other(files[weights], name),
        "schedule.py": files["schedule.py"] + b"\nNAME = 'other'\n",
        "generation_config.json": json.dumps(json.loads(files["generation_config.json"]) | {"num_steps": 9}).encode(),
        "tokenizer_config.json": json.dumps(
            json.loads(files["tokenizer_config.json"]) | {"model_max_length": 99}
        ).encode(),
    }
    second = hub.publish(REPO, changes, branch="other")
    hub.publish(REPO, changes | {"schedule.py": b"raise RuntimeError('broken on purpose')\n"})
    arguments = {"repo": REPO, "sample": SAMPLE, "pinned": [hub.first, "v1", "other", None, hub.first]}
    results = hub.run(python, "revisions", **arguments)

    def expected(model, sha, num_steps, length):
        return {
            "tokens": model.generate(**SAMPLE).tolist(),
            "written": written(model, tokenizer, **FIXED),
            "num_steps": [num_steps, num_steps],
            "modules": [modules(REPO, sha)],
            "length": length,
        }

    other = EDLMModel.from_pretrained(CARDS / "edlm-wiki27")
    other.load_state_dict(load(changes[weights]))
    old = expected(model, hub.first, 128, 256) | {"name": None}
    new = expected(other, second, 9, 99) | {"name": "other"}
    assert new["tokens"] != old["tokens"]
    assert results == [old, old, new, "RuntimeError: broken on purpose", old]
    assert hub.run(python, "revisions", offline=True, **arguments) == results


@torch.no_grad()
def test_adapters_find_their_base(hub, model, texts, tmp_path):
    """By the adapter's own name, by load_energy, by PEFT, and within a whole model; each of them pinned as well."""
    x, xt = texts
    adapter, head = adapter_files(REPO), "base_model.model.network.fc2.weight"
    old = {ADAPTER: hub.publish(ADAPTER, adapter)}
    expected = energy_of(adapter, tmp_path / "adapter", x, xt)
    local = EDLMModel.from_pretrained(CARDS / "edlm-wiki27").load_energy(str(tmp_path / "adapter"))
    local.save_pretrained(tmp_path / "whole")
    old[WHOLE] = hub.publish(WHOLE, model_files(tmp_path / "whole"))
    newer = adapter | {WEIGHTS: with_other(adapter[WEIGHTS], head)}
    changed = energy_of(newer, tmp_path / "newer", x, xt)
    assert not torch.allclose(changed, expected, atol=0.1)
    hub.publish(ADAPTER, newer)
    hub.publish(WHOLE, {f"energy/{WEIGHTS}": newer[WEIGHTS]})
    arguments = {"base": REPO, "adapter": ADAPTER, "whole": WHOLE, "old": old, "x": x.tolist(), "xt": xt.tolist()}
    results = hub.run(INTERPRETERS["newest"], "adapters", **arguments)
    assert len(results) == 7
    for name, energies in results.items():
        close(energies, expected if name.startswith("old") else changed)
    assert hub.run(INTERPRETERS["newest"], "adapters", offline=True, **arguments) == results


def energy_of(adapter: dict[str, bytes], folder: Path, x, xt) -> torch.Tensor:
    folder.mkdir()
    for name, content in adapter.items():
        (folder / name).write_bytes(content)
    return EDLMModel.from_pretrained(CARDS / "edlm-wiki27").load_energy(str(folder)).energy(x, xt)


def test_what_a_clean_environment_lacks_is_named(hub):
    hub.publish(ADAPTER, adapter_files(REPO))
    by_name, by_load_energy, by_map = hub.run(INTERPRETERS["oldest"], "lacking", base=REPO, adapter=ADAPTER)
    assert by_load_energy == "ImportError: an energy that is a LoRA adapter needs the package peft: pip install peft"
    assert "accelerate" in by_map


def test_weights_go_where_they_are_told(hub, model, tokenizer):
    result = hub.run(INTERPRETERS["newest"], "placed", repo=REPO, sample=SAMPLE)
    assert result.pop("written") == written(model, tokenizer, **FIXED)
    assert result == dict.fromkeys(result, [model.generate(**SAMPLE).tolist(), ["cpu"]]) and len(result) == 3
