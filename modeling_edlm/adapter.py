"""An energy as a LoRA adapter: low-rank weights and a small head over the denoiser's own frozen blocks.

The energy runs through a second tree of modules over the same parameters (`backbone.twin`), and the adapter is put into
that tree alone. So nothing is ever switched on or off: the denoiser stays as it is, bit for bit, whatever the energy
does, raises, or does at the same time in another thread.

A folder of PEFT's format, with one file more: `energy_config.json` says what energy it is and which weights it is for.
"""

import hashlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from .backbone import PLAIN

BLOCKS = r"network\.backbone\.blocks\.\d+\.(attention\.qkv|attention\.out|fc1|fc2)"
HEAD = ["network.projection", "network.head", "network.fc1", "network.fc2"]
ENERGY_FIELDS = ("energy_target", "energy_pooling", "energy_num_layers")
BASE_FIELDS: tuple[str, ...] = ("vocab_size", "mask_token_id", "hidden_size", "num_hidden_layers")
BASE_FIELDS += ("num_attention_heads", "cond_dim", "intermediate_size", "time_conditioning", "rope_theta")
DESCRIPTION, CONFIG, WEIGHTS = "energy_config.json", "adapter_config.json", "adapter_model.safetensors"


def add_lora(energy: nn.Module, rank: int, alpha: float | None = None, dropout: float = 0.0) -> Any:
    """Put a fresh adapter into an energy (`EDLMEnergyModel`), in place: all but it and the head is frozen, and with it
    the denoiser where that shares its weights.

    Args:
        rank: of the LoRA matrices of every linear layer of the blocks; 0: the head alone is trained.
        alpha: the adapter's scale is alpha / rank; None: 2 * rank.
    Returns:
        the `peft.PeftModel` around the energy. Source: LoRA, arXiv 2106.09685.
    """
    if rank < 0:
        raise ValueError(f"rank must not be negative, got {rank}")
    config = _peft().LoraConfig(
        r=max(rank, 1),
        lora_alpha=2 * max(rank, 1) if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=BLOCKS if rank else "dummy-target-modules",  # PEFT's name for no layer at all
        modules_to_save=HEAD,
    )
    return _peft().get_peft_model(energy, config)


def save_adapter(
    folder: str | Path, energy: Any, denoiser: PreTrainedModel, base: str | None, weights: dict | None = None
) -> None:
    """Write the adapter of an energy that `add_lora` or `load_adapter` gave, or its `get_base_model()`.

    Args:
        base: folder or repo of the denoiser, for whoever finds the adapter; None where it lies beside it.
        weights: what to write in place of the weights of `energy` (an average), by the names of its parameters.
    """
    peft, folder = _peft(), Path(folder)
    config = energy.peft_config["default"]
    config.base_model_name_or_path = base
    mode, config.inference_mode = config.inference_mode, True
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    config.inference_mode = mode
    weights = peft.get_peft_model_state_dict(energy, state_dict=weights, save_embedding_layers=False)
    prefix = "base_model.model."
    weights = {k if k.startswith(prefix) else prefix + k: v.contiguous() for k, v in weights.items()}
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    description = {
        "energy": {name: getattr(energy.config, name) for name in ENERGY_FIELDS},
        "base": {name: getattr(denoiser.config, name) for name in BASE_FIELDS}
        | {"sha256": checksum(denoiser), "sha256_float16": checksum(denoiser, torch.float16)},
        "base_model_name_or_path": base,
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def find_adapter(path: str | Path, **where: Any) -> Path | None:
    """The local folder of an adapter's files, fetched if need be; None where the folder or repo holds no adapter."""
    optional = {"_raise_exceptions_for_missing_entries": False}
    if (found := cached_file(path, DESCRIPTION, **where, **optional)) is None:
        return None
    for name in (CONFIG, WEIGHTS):
        cached_file(path, name, **where)
    return Path(found).parent


def energy_fields(folder: Path, denoiser: PreTrainedModel) -> dict[str, Any]:
    """What kind of energy an adapter is: arguments of `EDLMEnergyModel.from_denoiser`.

    Raises ValueError if it was trained over another denoiser, and names what is different.
    """
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        base, fields = description["base"], {name: description["energy"][name] for name in ENERGY_FIELDS}
        theirs = {name: base[name] for name in (*BASE_FIELDS, "sha256")}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / DESCRIPTION} is damaged: {error!r}") from error
    named = f"the adapter {folder} was trained over {description.get('base_model_name_or_path')!r}"
    for name in BASE_FIELDS:
        if theirs[name] != getattr(denoiser.config, name):
            raise ValueError(f"{named} with {name}={theirs[name]}; this base has {getattr(denoiser.config, name)}")
    for name, value in denoiser.named_parameters():
        if type(value) not in PLAIN:
            raise ValueError(f"{named}; {name} of this base is quantised or sharded ({type(value).__name__})")
    if (ours := checksum(denoiser)) not in (theirs["sha256"], base.get("sha256_float16")):
        raise ValueError(
            f"{named}, whose weights are others: checksum {theirs['sha256'][:12]}, this base has {ours[:12]} "
            f"(in {denoiser.dtype}; float32 and bfloat16 have the same)"
        )
    return fields


def load_adapter(energy: nn.Module, folder: Path) -> Any:
    """Put the adapter of a folder into an energy, in place, for inference. Returns the `peft.PeftModel` around it.

    Raises ValueError if the weights are damaged or not those of this adapter.
    """
    peft = _peft()
    grads = [(p, p.requires_grad) for p in energy.parameters()]
    config = peft.PeftConfig.from_pretrained(str(folder))
    config.base_model_name_or_path = None  # PEFT would compare it with a name that this energy does not have
    model = peft.get_peft_model(energy, config)
    for parameter, requires_grad in grads:  # PEFT froze them, and they are the denoiser's own
        parameter.requires_grad_(requires_grad)
    fill_adapter(model, folder)
    for module in model.modules():  # the untrained head, drawn at random, is in nobody's way and in no checksum
        if isinstance(module, peft.utils.ModulesToSaveWrapper):
            module.original_module = module.modules_to_save["default"]
    return model


def fill_adapter(model: nn.Module, folder: Path) -> None:
    """Give the adapter that is in a model (`add_lora`) the weights of a folder.

    Raises ValueError if they are damaged or not those of an adapter of this form.
    """
    try:
        weights = load_file(folder / WEIGHTS)
        result = _peft().set_peft_model_state_dict(model, weights)
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged or does not fit: {error}") from error
    own = [name for name in result.missing_keys if ".default" in name]
    if wrong := sorted(own) + sorted(result.unexpected_keys):
        raise ValueError(f"{folder / WEIGHTS} lacks, or has in excess, {len(wrong)} weights: {wrong[0]}, ...")


def checksum(module: nn.Module, stored_in: torch.dtype | None = None) -> str:
    """SHA-256 of all weights, rounded to bfloat16: the same for a model in float32 and in bfloat16. With `stored_in`
    that of a copy of the model which was rounded to this dtype before.
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        value = value.detach().cpu().to(stored_in or value.dtype)
        digest.update(value.bfloat16().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise ImportError("an energy that is a LoRA adapter needs the package peft: pip install peft") from error
    return peft
