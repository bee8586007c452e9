"""What a program gets that knows models by their names on the Hub alone: test_loading.py runs it as a process.

    python -P tests/support/by_name.py '{"function": {arguments}, ...}' FILE

FILE is for what they return and for the errors they end with, in JSON.

Its imports are those of a clean environment, torch and transformers; what needs more imports it itself.
"""

import json
import sys
import traceback
from importlib.metadata import distributions
from pathlib import Path

sys.modules["modeling_edlm"] = None  # an import of the package fails, where it is installed

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
    GenerationConfig,
    GenerationMixin,
    pipeline,
)

CODE = {"trust_remote_code": True}


class Bert(BertForMaskedLM, GenerationMixin):
    """The library's masked models have no generate()."""


def origin(thing) -> list[str]:
    return [type(thing).__name__, type(thing).__module__]


def refusal(load, *args, **kwargs) -> str:
    try:
        load(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def one(sample: dict) -> dict:
    """Where the number of samples is that of the prompts."""
    return {name: value for name, value in sample.items() if name != "batch_size"}


def written_by_ar(ar) -> list[list[list[int]]]:
    """Greedy with the cache of keys and values, without, and by the model's own logits of the whole text so far."""
    options = {"max_new_tokens": 40, "do_sample": False}
    text = torch.tensor([[ar.config.bos_token_id]])
    for _ in range(options["max_new_tokens"]):
        logits = ar(text).logits[:, -1]
        logits[:, ar.config.mask_token_id] = float("-inf")
        text = torch.cat((text, logits.argmax(-1, keepdim=True)), dim=1)
    return [*(ar.generate(use_cache=use_cache, **options).tolist() for use_cache in (True, False)), text.tolist()]


def everything(repo: str, light: str, bert: str, sample: dict, x: list, xt: list) -> dict:
    """Each Auto class, tokenizer, configurations and pipelines of a repo that has all of them."""
    tokenizer = AutoTokenizer.from_pretrained(repo)
    assert AutoTokenizer.from_pretrained(repo, **CODE).get_vocab() == tokenizer.get_vocab()
    x, xt = torch.tensor(x), torch.tensor(xt)
    config = AutoConfig.from_pretrained(repo, **CODE)
    model = AutoModel.from_pretrained(repo, **CODE)
    denoiser = AutoModelForMaskedLM.from_pretrained(repo, **CODE)
    energy = AutoModelForSequenceClassification.from_pretrained(repo, **CODE)
    ar = AutoModelForCausalLM.from_pretrained(repo, subfolder="ar", **CODE)
    write, fill = pipeline("text-generation", repo, **CODE), pipeline("fill-mask", repo, **CODE)
    defaults = GenerationConfig.from_pretrained(repo)
    half, auto = (AutoModel.from_pretrained(repo, dtype=dtype, **CODE) for dtype in (torch.bfloat16, "auto"))
    with torch.no_grad():
        result = {
            "tokens": model.generate(**sample).tolist(),
            "configured": model.generate(generation_config=defaults, **sample).tolist(),
            "tokens of the denoiser": denoiser.generate(**sample).tolist(),
            "tokens of the AR model": written_by_ar(ar),
            "tokens in bfloat16": half.generate(**sample).tolist(),
            "logits": denoiser(xt).logits.tolist(),
            "logits of the AR model": ar(x).logits.tolist(),
            "energy": energy(x, xt=xt).logits[:, 0].tolist(),
            "energy within": model.energy(x, xt).tolist(),
            "light energy": AutoModel.from_pretrained(repo, **CODE).load_energy(light).energy(x, xt).tolist(),
        }
    energy_by_name = {"custom_generate": repo, "energy": repo, "energy_kwargs": CODE}
    other = Bert.from_pretrained(bert).generate(xt, **energy_by_name, **one(sample), **CODE)
    return result | {
        "transformers": transformers.__version__,
        "lacks": sorted(
            {"accelerate", "peft", "modeling-edlm"} - {package.name.lower() for package in distributions()}
        ),
        "config": {name: getattr(config, name) for name in ("model_type", "vocab_size", "energy_type", "auto_map")},
        "generation_config": [model.generation_config.num_steps, defaults.num_steps, list(defaults.energy_window)],
        "text": tokenizer.decode(tokenizer("The  City, in 1902").input_ids),
        "mask": [tokenizer.mask_token_id, tokenizer.model_max_length],
        "written": write("the city", **one(sample))[0]["generated_text"],
        "filled": [answer["token"] for answer in fill("the c[MASK]ty")],
        "custom_generate": other.tolist(),
        "dtypes": [sorted({str(p.dtype) for p in m.parameters()}) for m in (model, half, auto)],
        "origins": [origin(thing) for thing in (config, model, denoiser, energy, ar, write, fill.model)],
        "not causal": refusal(AutoModelForCausalLM.from_pretrained, repo, **CODE),
        "not trusted": refusal(AutoModel.from_pretrained, repo, trust_remote_code=False),
        "without cache": refusal(AutoModel.from_pretrained, repo, cache_dir="empty", **CODE),
    }


def revisions(repo: str, sample: dict, pinned: list) -> list:
    return [revision_of(repo, sample, revision=revision) for revision in pinned]


def revision_of(repo: str, sample: dict, **at) -> dict | str:
    try:
        model, write = AutoModel.from_pretrained(repo, **at, **CODE), pipeline("text-generation", repo, **at, **CODE)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    configs = model.generation_config, GenerationConfig.from_pretrained(repo, **at)
    code = {origin(part)[1].rpartition(".")[0] for part in (model, model.config, model.energy_model, write)}
    return {
        "tokens": model.generate(**sample).tolist(),
        "written": write("the city", **one(sample))[0]["generated_text"],
        "num_steps": [config.num_steps for config in configs],
        "modules": sorted(code),
        "name": getattr(sys.modules[f"{min(code)}.schedule"], "NAME", None),
        "length": AutoTokenizer.from_pretrained(repo, **at).model_max_length,
    }


def adapters(base: str, adapter: str, whole: str, old: dict, x: list, xt: list) -> dict:
    """A LoRA energy in a repo of its own and within a whole model; `old` are revisions of theirs."""
    from peft import PeftModel

    x, xt = torch.tensor(x), torch.tensor(xt)
    model = AutoModel.from_pretrained(base, **CODE)
    own = sys.modules[type(model).__module__].EDLMEnergyModel.from_denoiser(model.denoiser, energy_target="xs")
    own = PeftModel.from_pretrained(own, adapter).eval()
    at = {"adapter_kwargs": {"revision": old[adapter]}}
    models = {
        "by its own name": AutoModel.from_pretrained(adapter, **CODE),
        "load_energy": AutoModel.from_pretrained(base, **CODE).load_energy(adapter),
        "within": AutoModel.from_pretrained(whole, **CODE),
        "old, by its own name": AutoModel.from_pretrained(adapter, **at, **CODE),
        "old, load_energy": AutoModel.from_pretrained(base, **CODE).load_energy(adapter, revision=old[adapter]),
        "old, within": AutoModel.from_pretrained(whole, revision=old[whole], **CODE),
    }
    with torch.no_grad():
        result = {name: model.energy(x, xt).tolist() for name, model in models.items()}
        return result | {"PEFT": own(x, xt=xt).logits[:, 0].tolist()}


def lacking(base: str, adapter: str) -> list[str]:
    """What is said where PEFT and accelerate are not installed."""
    model = AutoModel.from_pretrained(base, **CODE)
    return [
        refusal(AutoModel.from_pretrained, adapter, **CODE),
        refusal(model.load_energy, adapter),
        refusal(AutoModel.from_pretrained, base, device_map="auto", **CODE),
    ]


def placed(repo: str, sample: dict) -> dict:
    """By every way to say where the weights go."""
    result = {}
    for name in ("auto", "cpu", {"": "cpu"}, {"denoiser": "cpu", "energy_model": "disk"}):
        model = AutoModel.from_pretrained(repo, device_map=name, offload_folder="weights", **CODE)
        result[str(name)] = [model.generate(**sample).tolist(), sorted({str(p.device) for p in model.parameters()})]
    write = pipeline("text-generation", repo, device_map="auto", **CODE)
    return result | {"written": write("the city", **one(sample))[0]["generated_text"]}


def quantised(repo: str, adapter: str, sample: dict, x: list, xt: list) -> dict:
    """By torchao and bitsandbytes, and once more from a folder that was saved so."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import BitsAndBytesConfig, TorchAoConfig

    x, xt, result = torch.tensor(x), torch.tensor(xt), {}
    for name, way in {
        "torchao int8": TorchAoConfig(Int8WeightOnlyConfig()),
        "bitsandbytes int8": BitsAndBytesConfig(load_in_8bit=True),
        "bitsandbytes nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    }.items():
        model = AutoModel.from_pretrained(repo, quantization_config=way, **CODE)
        model.save_pretrained(name)
        again = AutoModel.from_pretrained(name, **CODE)
        blocks = [*model.denoiser.backbone.blocks, *model.energy_model.network.backbone.blocks]
        layers = [layer for block in blocks for layer in block.modules() if isinstance(layer, torch.nn.Linear)]
        with torch.no_grad():
            result[name] = {
                "weights": sorted({type(layer.weight).__name__ for layer in layers}),
                "head": type(model.denoiser.head.linear.weight).__name__,
                "logits": model(xt).logits.tolist(),
                "energy": model.energy(x, xt).tolist(),
                "tokens": model.generate(xt, **one(sample)).tolist(),
                "saved": torch.equal(again.energy(x, xt), model.energy(x, xt)),
            }
        result[name]["adapter"] = refusal(model.load_energy, adapter)
    return result


def main() -> None:
    calls, result = sys.argv[1:]
    found = {}
    for name, arguments in json.loads(calls).items():
        try:
            found[name] = [globals()[name](**arguments), None]
        except Exception:
            found[name] = [None, traceback.format_exc()]
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
