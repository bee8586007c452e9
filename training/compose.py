"""Put trained parts together into one folder that is a Hub repo: weights, code, tokenizer, generation defaults.

    python -m training.compose --denoiser runs/denoiser/model --energy runs/energy/model --energy_type nce --out FOLDER
    python -m training.compose --denoiser DENOISER --energy openai-community/gpt2 --energy_type coar --out FOLDER

An energy that is an adapter stays one, in OUT/energy; with `--merge true` it becomes a network of its own, which needs
no PEFT. An AR energy needs no training, but the denoiser's token ids (and it may lack the mask's).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from .common.arguments import answer_early, generation_config, parse_arguments


@dataclass
class ComposeArguments:
    denoiser: str = field(metadata={"help": "folder or repo of the denoiser, with its tokenizer"})
    out: str = field(metadata={"help": "folder to write; files in it that are no weights of the model stay"})
    energy: str = field(default="", metadata={"help": "folder or repo of the energy: an EDLM one or a causal LM"})
    energy_type: str = field(default="nce", metadata={"help": "ar, coar or nce; plays no part without an energy"})
    merge: bool = field(default=False, metadata={"help": "add an adapter into a copy of the denoiser's blocks"})
    energy_only: bool = field(default=False, metadata={"help": "write the energy alone (with merge)"})
    ar: str = field(default="", metadata={"help": "folder of an autoregressive EDLM to put into OUT/ar as a scorer"})
    judge: str = field(default="", metadata={"help": "the same into OUT/judge: one that is not the energy, for demos"})
    words: str = field(default="", metadata={"help": "text, as for training, whose words OUT/judge/words.txt lists"})
    generation: str = field(
        default="", metadata={"help": "defaults of generate(), a YAML mapping: '{num_steps: 32, num_candidates: 4}'"}
    )
    dtype: str = field(
        default="float32", metadata={"help": "of the weights files: float32, bfloat16, float16; all load as float32"}
    )
    max_shard_size: str = field(default="5GB", metadata={"help": "of a weights file"})

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {self.dtype!r}")
        if self.energy_only and not self.merge:
            raise ValueError("energy_only writes a merged adapter: add --merge true")
        if self.words and not self.judge:
            raise ValueError(f"words are the judge's: give judge, or leave words out, got {self.words!r}")
        if not isinstance(settings := yaml.safe_load(self.generation) or {}, dict):
            raise ValueError(f"generation must be a mapping of names to values, got {self.generation!r}")
        self.generation_config = generation_config(**settings)


if __name__ == "__main__":
    answer_early(ComposeArguments, __doc__)

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_edlm import EDLMEnergyModel, EDLMForCausalLM, EDLMForMaskedLM, EDLMModel
from modeling_edlm.adapter import CONFIG, DESCRIPTION, WEIGHTS
from modeling_edlm.modeling_edlm import ADAPTER_FOLDER, check_folder

from .common.components import check_tokenizer
from .common.data import read_texts
from .common.judge import WORDS
from .common.metrics import word_list
from .common.results import added_files

ADAPTER_FILES = (CONFIG, DESCRIPTION, WEIGHTS)


def with_parts(denoiser, tokenizer, arguments: ComposeArguments) -> EDLMModel | EDLMEnergyModel:
    if arguments.merge:
        energy = EDLMEnergyModel.from_adapter(denoiser, arguments.energy, merge=True)
        if arguments.energy_only:
            return energy
        model = EDLMModel.from_components(denoiser, energy, "nce")
    elif not arguments.energy:
        model = EDLMModel.from_components(denoiser)
    elif arguments.energy_type == "nce":
        model = EDLMModel.from_components(denoiser).load_energy(arguments.energy)
    else:
        check_tokenizer(tokenizer, arguments.energy)
        energy = AutoModelForCausalLM.from_pretrained(arguments.energy, dtype=torch.float32)
        model = EDLMModel.from_components(denoiser, energy, arguments.energy_type)
    model.generation_config = arguments.generation_config
    return model


def main(argv: list[str] | None = None):
    arguments = parse_arguments(ComposeArguments, __doc__, argv)
    check_folder(arguments.out)
    for name in ("denoiser", "energy", "ar", "judge"):
        part = getattr(arguments, name)
        if part and Path(part).exists() and Path(part).resolve() == Path(arguments.out).resolve():
            raise ValueError(f"out must be another folder than {name}, which is only read, got {arguments.out}")
    denoiser = EDLMForMaskedLM.from_pretrained(arguments.denoiser)
    tokenizer = AutoTokenizer.from_pretrained(arguments.denoiser)
    model = with_parts(denoiser, tokenizer, arguments).to(getattr(torch, arguments.dtype))
    out = Path(arguments.out)
    # of an older composition: of two sets of weights the library loads the wrong one
    parts = ["", *(f"{name}/" for name in ("ar", "judge") if getattr(arguments, name))]
    old = [f"{part}model*.safetensors*" for part in parts] + [f"{ADAPTER_FOLDER}/{name}" for name in ADAPTER_FILES]
    with added_files(out, replaced=old) as temporary:
        model.save_pretrained(temporary, max_shard_size=arguments.max_shard_size)
        tokenizer.save_pretrained(temporary)
        for name, source in {"ar": arguments.ar, "judge": arguments.judge}.items():
            if source:
                scorer = EDLMForCausalLM.from_pretrained(source).to(getattr(torch, arguments.dtype))
                scorer.save_pretrained(temporary / name, max_shard_size=arguments.max_shard_size)
                for copy in (temporary / name).glob("*.py"):  # a subfolder takes its code from the root
                    copy.unlink()
        if arguments.words:
            listed = sorted(word_list(read_texts(arguments.words)))
            (temporary / "judge" / WORDS).write_text("\n".join(listed) + "\n", encoding="utf-8")
        # half precision saves space, but computing in it is slow on most CPUs
        for file in temporary.rglob("config.json"):
            config = json.loads(file.read_text(encoding="utf-8")) | {"dtype": "float32"}
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
