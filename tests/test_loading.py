"""Loading by names on a Hub: online, pinned, quantised and offline, by the newest transformers and the oldest.

Each load is that of a process which cannot import this package and starts in an empty folder (by_name.py); there is one
online and one offline, with the cache of the first, in each of two environments. The oldest has torch, transformers and
what these need, nothing else.
"""

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi
from safetensors.torch import load, save
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM
from transformers import __version__ as library

from modeling_edlm import EDLMForCausalLM, EDLMModel
from modeling_edlm.adapter import CONFIG, DESCRIPTION, WEIGHTS
from modeling_edlm.configuration_edlm import AUTO_MAP
from modeling_edlm.custom_generate import generate
from support.fake_hub import HOSTS, FakeHub

ROOT = Path(__file__).resolve().parent.parent
SHIPPED, LIGHT_SHIPPED, BOOKS = (ROOT / "hub_cards" / f"edlm-wiki27{name}" for name in ("", "-light", "-books"))
REPO, PINNED, LIGHT, ADAPTER, WHOLE, BERT = (f"user/{x}" for x in ("edlm", "pinned", "light", "books", "whole", "bert"))
ENVIRONMENTS = {"newest": Path(sys.executable), "oldest": ROOT / ".venv-oldest" / "bin" / "python"}
IN_BOTH, IN_NEWEST, IN_OLDEST = ("everything", "revisions"), ("adapters", "placed", "quantised"), ("lacking",)
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}  # there is no Hub any more
FIXED = {"num_steps": 6, "num_candidates": 3, "energy_window": [1.0, 0.0], "max_length": 24, "seed": 7}
SAMPLE = FIXED | {"batch_size": 2}
X = torch.randint(0, 27, (4, 20), generator=torch.Generator().manual_seed(0))
XT = X.masked_fill(torch.arange(20) % 2 == 0, 27)

spec = importlib.util.spec_from_file_location("assemble", ROOT / "hub_cards" / "publish" / "assemble.py")
assemble = importlib.util.module_from_spec(spec)
spec.loader.exec_module(assemble)


# ---- what is on the Hub


def model_files(folder: Path) -> dict[str, bytes]:
    """A model folder as published, by name."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc"))
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    return files | assemble.model_code() | {f"custom_generate/{k}": v for k, v in assemble.generate_code().items()}


def with_fields(content: bytes, **fields) -> bytes:
    return json.dumps(json.loads(content) | fields).encode()


def with_other(content: bytes, name: str) -> bytes:
    """Weights of which one is changed a lot."""
    weights = load(content)
    return save(weights | {name: weights[name] + torch.linspace(-1, 1, weights[name].numel()).view_as(weights[name])})


@pytest.fixture(scope="module")
def files():
    """Of the shipped model, of a commit that changes a part of each kind, of the shipped adapter, and of another."""
    old = model_files(SHIPPED)
    changes = {
        "model.safetensors": with_other(old["model.safetensors"], "denoiser.head.linear.bias"),
        "schedule.py": old["schedule.py"] + b"\nNAME = 'other'\n",
        "generation_config.json": with_fields(old["generation_config.json"], num_steps=9),
        "tokenizer_config.json": with_fields(old["tokenizer_config.json"], model_max_length=99),
    }
    adapter = {name: (BOOKS / name).read_bytes() for name in (CONFIG, DESCRIPTION, WEIGHTS)}
    adapter |= {name: with_fields(adapter[name], base_model_name_or_path=REPO) for name in (CONFIG, DESCRIPTION)}
    newer = adapter | {WEIGHTS: with_other(adapter[WEIGHTS], "base_model.model.network.fc2.weight")}
    return {"old": old, "changes": changes, "adapter": adapter, "newer adapter": newer}


@pytest.fixture(scope="module")
def bert():
    sizes = {"vocab_size": 28, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 24, "initializer_range": 0.5, "mask_token_id": 27}
    return BertForMaskedLM(BertConfig(**sizes)).eval()


@pytest.fixture(scope="module")
def hub(tmp_path_factory, files, bert):
    """The stand-in with all repos, and the hashes of commits by name."""
    folder = tmp_path_factory.mktemp("published")
    bert.save_pretrained(folder / "bert")
    write(folder / "adapter", files["adapter"])
    EDLMModel.from_pretrained(SHIPPED).load_energy(str(folder / "adapter")).save_pretrained(folder / "whole")
    with pytest.MonkeyPatch.context() as patch, FakeHub() as hub:
        patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        patch.setenv("NO_PROXY", ",".join(HOSTS))
        api = HfApi(endpoint=hub.endpoint, token="hf_fake")

        def publish(repo: str, files: dict[str, bytes], branch: str = "main") -> str:
            changes = [CommitOperationAdd(name, content) for name, content in files.items()]
            return api.create_commit(repo, changes, commit_message="files", revision=branch).oid

        for repo in (REPO, PINNED, LIGHT, ADAPTER, WHOLE, BERT):
            api.create_repo(repo)
        commits = {
            "first": publish(REPO, files["old"]),
            "pinned": publish(PINNED, files["old"]),
            "adapter": publish(ADAPTER, files["adapter"]),
            "whole": publish(WHOLE, model_files(folder / "whole")),
        }
        publish(BERT, {path.name: path.read_bytes() for path in (folder / "bert").iterdir()})
        publish(LIGHT, model_files(LIGHT_SHIPPED))
        publish(ADAPTER, files["newer adapter"])
        publish(WHOLE, {f"energy/{WEIGHTS}": files["newer adapter"][WEIGHTS]})
        api.create_tag(PINNED, tag="v1", revision=commits["pinned"])
        api.create_branch(PINNED, branch="other")
        commits["other"] = publish(PINNED, files["changes"], "other")
        publish(PINNED, files["changes"] | {"schedule.py": b"raise RuntimeError('broken on purpose')\n"})
        yield hub, commits


def write(folder: Path, files: dict[str, bytes]) -> str:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return str(folder)


# ---- processes that know it


class Results(dict):
    """What functions returned, by name; the error of one is its readers' failure alone."""

    def __getitem__(self, name):
        value, error = super().__getitem__(name)
        assert error is None, error
        return value


@pytest.fixture(scope="module")
def loads(hub, tmp_path_factory):
    """By environment: what the functions of by_name.py gave online, and offline."""
    hub, commits = hub
    texts, names = {"x": X.tolist(), "xt": XT.tolist()}, {"base": REPO, "adapter": ADAPTER}
    pinned = [commits["pinned"], "v1", "other", None, commits["pinned"]]
    calls = {
        "everything": {"repo": REPO, "light": LIGHT, "bert": BERT, "sample": SAMPLE, **texts},
        "revisions": {"repo": PINNED, "sample": SAMPLE, "pinned": pinned},
        "adapters": {**names, "whole": WHOLE, "old": {ADAPTER: commits["adapter"], WHOLE: commits["whole"]}, **texts},
        "placed": {"repo": REPO, "sample": SAMPLE},
        "quantised": {"repo": REPO, "adapter": ADAPTER, "sample": SAMPLE, **texts},
        "lacking": names,
    }

    def run(python: Path, environment: dict, functions: tuple) -> Results:
        folder = tmp_path_factory.mktemp("run")
        arguments = json.dumps({name: calls[name] for name in functions})
        command = [python, "-P", ROOT / "tests" / "support" / "by_name.py", arguments, folder.with_suffix(".json")]
        process = {"env": environment, "cwd": folder, "stdin": subprocess.DEVNULL, "timeout": 600}
        done = subprocess.run(command, capture_output=True, text=True, **process)
        assert done.returncode == 0, done.stderr[-5000:]
        return Results(json.loads(folder.with_suffix(".json").read_text()))

    @functools.cache
    def loads(name: str) -> tuple[Results, Results]:
        python = ENVIRONMENTS[name]
        if not python.exists():
            pytest.fail(f"{python} is missing; `make test` makes it")
        environment = hub.environment(tmp_path_factory.mktemp("home"))
        environment.pop("PYTHONPATH", None)
        online = run(python, environment, IN_BOTH + (IN_NEWEST if name == "newest" else IN_OLDEST))
        again = IN_BOTH + (IN_NEWEST[:1] if name == "newest" else ())
        return online, run(python, environment | OFFLINE, again)

    return loads


# ---- what the package makes of the same files


@pytest.fixture(scope="module")
def model():
    return EDLMModel.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED)


def written(model, tokenizer) -> str:
    return tokenizer.decode(model.generate(tokenizer("the city", return_tensors="pt").input_ids, **FIXED)[0])


def modules(repo: str, sha: str) -> str:
    """The package that the library makes of a repo's code."""
    return f"transformers_modules.{repo.replace('/', '.')}.{sha}"


def close(values, expected: torch.Tensor, atol=1e-4):
    torch.testing.assert_close(torch.tensor(values), expected, atol=atol, rtol=1e-4)


# ---- tests


@torch.no_grad()
@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_all_that_a_repo_has(loads, environment, hub, model, tokenizer, bert):
    """The same as from the folder by the package; then once more from the cache, without a Hub."""
    result, again = (part["everything"] for part in loads(environment))
    oldest = environment == "oldest"
    # those of constraints.txt under `make test`, the newest there are under `make test-newest`
    versions = (ROOT / "constraints-oldest.txt").read_text().split() if oldest else [f"transformers=={library}"]
    assert f"transformers=={result['transformers']}" in versions
    assert result["lacks"] == (["accelerate", "modeling-edlm", "peft"] if oldest else [])

    denoiser, ar = model.denoiser, EDLMForCausalLM.from_pretrained(SHIPPED, subfolder="ar")
    tokens = model.generate(**SAMPLE).tolist()
    assert result["tokens"] == result["configured"] == tokens
    assert result["tokens of the denoiser"] == denoiser.generate(**SAMPLE).tolist() != tokens
    assert result["tokens of the AR model"] == [ar.generate(max_new_tokens=40, do_sample=False).tolist()] * 3
    half = EDLMModel.from_pretrained(SHIPPED, dtype=torch.bfloat16)
    assert result["tokens in bfloat16"] == half.generate(**SAMPLE).tolist()
    assert result["dtypes"] == [["torch.float32"], ["torch.bfloat16"], ["torch.float32"]]
    close(result["logits"], denoiser(XT).logits)
    close(result["logits of the AR model"], ar(X).logits)
    close(result["energy"], model.energy(X, XT))
    close(result["energy within"], model.energy(X, XT))
    light = EDLMModel.from_components(denoiser).load_energy(str(LIGHT_SHIPPED))
    close(result["light energy"], light.energy(X, XT))
    assert result["custom_generate"] == generate(bert, XT, energy=model.energy_model, **FIXED).tolist()

    assert result["config"] == {"model_type": "edlm", "vocab_size": 28, "energy_type": "nce", "auto_map": AUTO_MAP}
    assert result["generation_config"] == [128, 128, [1.0, 0.8]]
    assert result["text"] == "the city in one nine zero two " and result["mask"] == [27, 256]
    assert result["written"] == written(model, tokenizer)
    expected = denoiser(tokenizer("the c[MASK]ty", return_tensors="pt").input_ids).logits[0, 5].topk(5).indices
    assert result["filled"] == expected.tolist()
    assert [name for name, _ in result["origins"]] == [
        *("EDLMConfig", "EDLMModel", "EDLMForMaskedLM", "EDLMEnergyModel", "EDLMForCausalLM"),
        *("EDLMTextGenerationPipeline", "EDLMForMaskedLM"),
    ]
    assert {module.rpartition(".")[0] for _, module in result["origins"]} == {modules(REPO, hub[1]["first"])}
    assert "EDLMForCausalLM needs energy_type in ('ar', 'coar'), the checkpoint has 'nce'" in result["not causal"]
    assert "trust_remote_code=True" in result["not trusted"]

    assert result["without cache"] == "none" and again["without cache"].startswith("OSError: We couldn't connect to")
    assert again | {"without cache": "none"} == result


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_a_revision_pins_code_and_weights(loads, environment, hub, files, model, tokenizer):
    """A branch has other weights, defaults and code, and the newest commit's code is broken."""
    online, offline = (part["revisions"] for part in loads(environment))

    def expected(model, commit, num_steps, length, name):
        tokens, text, code = model.generate(**SAMPLE).tolist(), written(model, tokenizer), modules(PINNED, commit)
        found = {"tokens": tokens, "written": text, "modules": [code], "name": name}
        return found | {"num_steps": [num_steps, num_steps], "length": length}

    other = EDLMModel.from_pretrained(SHIPPED)
    other.load_state_dict(load(files["changes"]["model.safetensors"]))
    old = expected(model, hub[1]["pinned"], 128, 256, None)
    new = expected(other, hub[1]["other"], 9, 99, "other")
    assert new["tokens"] != old["tokens"]
    assert online == offline == [old, old, new, "RuntimeError: broken on purpose", old]


@torch.no_grad()
def test_adapters_find_their_base(loads, files, tmp_path):
    """By the adapter's own name, by load_energy, by PEFT, and within a whole model; each of them pinned as well."""
    online, offline = (part["adapters"] for part in loads("newest"))
    old, new = (
        EDLMModel.from_pretrained(SHIPPED).load_energy(write(tmp_path / name, files[name])).energy(X, XT)
        for name in ("adapter", "newer adapter")
    )
    assert (old - new).abs().min() > 0.1
    assert len(online) == 7
    for name, energies in online.items():
        close(energies, old if name.startswith("old") else new)
    assert online == offline


def test_what_a_clean_environment_lacks_is_named(loads):
    by_name, by_load_energy, by_map = loads("oldest")[0]["lacking"]
    assert ADAPTER in by_name  # the library then takes it for a model
    assert by_load_energy == "ImportError: an energy that is a LoRA adapter needs the package peft: pip install peft"
    assert "accelerate" in by_map


def test_weights_go_where_they_are_told(loads, model, tokenizer):
    result = dict(loads("newest")[0]["placed"])
    assert result.pop("written") == written(model, tokenizer)
    tokens, devices = zip(*result.values(), strict=True)
    assert all(found == model.generate(**SAMPLE).tolist() for found in tokens)
    assert devices == (["cpu"], ["cpu"], ["cpu"], ["cpu", "meta"])  # the last is on disk


@torch.no_grad()
@pytest.mark.parametrize(
    ("way", "weights", "error"),
    [
        ("torchao int8", "Int8Tensor", 0.01),
        ("bitsandbytes int8", "Int8Params", 0.03),
        ("bitsandbytes nf4", "Params4bit", 0.1),
    ],
)
def test_quantised(loads, model, way, weights, error):
    """Every layer of the blocks, and not the last projection; what was saved so is loaded so."""
    result = loads("newest")[0]["quantised"][way]
    assert (result["weights"], result["head"], result["saved"]) == ([weights], "Parameter", True)
    for found, expected in ((result["logits"], model(XT).logits), (result["energy"], model.energy(X, XT))):
        close(found, expected, atol=error * float(expected.abs().max()))
    tokens, given = torch.tensor(result["tokens"]), XT < 27
    assert tokens.shape == (4, 24) and (tokens < 27).all() and torch.equal(tokens[:, :20][given], X[given])
    assert f"of this base is quantised or sharded ({weights})" in result["adapter"]
