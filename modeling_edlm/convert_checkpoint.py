"""Published MDLM, EDLM and AR checkpoints to a folder of ours.

    python -m modeling_edlm.convert_checkpoint --checkpoint edlm.ckpt --kind edlm --tokenizer gpt2 --out FOLDER

Reads the Lightning checkpoints of the codes of MDLM (arXiv 2406.07524) and EDLM (arXiv 2410.21357), flat state dicts,
and folders and Hub repos of MDLM's remote code, which is neither downloaded nor run. Nothing is unpickled but tensors.
"""

import argparse
import json
import os
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from .configuration_edlm import EDLMConfig
from .modeling_edlm import EDLMEnergyModel, EDLMForCausalLM, EDLMForMaskedLM, EDLMModel

# What each kind becomes, the prefixes its keys may have, the most specific first, and its settings. In an EDLM
# checkpoint the energy network stands twice, as `ebm` and inside the denoiser's `backbone`.
KINDS: dict[str, tuple[type[PreTrainedModel], tuple[str, ...], dict[str, Any]]] = {
    "denoiser": (EDLMForMaskedLM, ("backbone.backbone.", "backbone.", ""), {}),
    "ar": (EDLMForCausalLM, ("backbone.ebm.", "ebm.", "backbone.", ""), {}),
    "nce": (EDLMEnergyModel, ("backbone.ebm.", "ebm.", ""), {"energy_type": "nce", "energy_pooling": "mean"}),
}
EDLM = "edlm"  # the kind that is a denoiser and an NCE energy
ENERGY_PREFIXES = ("backbone.ebm.", "ebm.")
NO_WEIGHTS: tuple[str, ...] = ("noise.", "train_metrics.", "valid_metrics.", "test_metrics.")
NO_WEIGHTS += ("gen_ppl_metric.", "entropy_metric.", "time_metric.")
WRAPPERS = re.compile(r"^((module|model)\.)+")
ROTARY = "rotary_emb.inv_freq"
SIZES = {"vocab_size": "vocab_size", "hidden_dim": "hidden_size"}  # by their names in a published config.json
SIZES |= {"n_blocks": "num_hidden_layers", "n_heads": "num_attention_heads"}
FILES = tuple(f".{kind}" for kind in ("ckpt", "pt", "pth", "bin", "safetensors"))
# Beside the weights a published Lightning checkpoint holds its configuration and its tokenizer, objects of these
# packages. They are read as `Inert`: nothing here is imported or called. What other code a file names is refused.
INERT_PACKAGES = ("omegaconf", "transformers", "tokenizers", "lightning", "pytorch_lightning")
INERT_NAMES: tuple[str, ...] = ("typing.Any", "collections.defaultdict")
INERT_NAMES += tuple(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str", "tuple"))
# Our names to the published ones, replaced in this order.
RENAMED = (
    ("network.fc1.", "energy_head.0."),
    ("network.fc2.", "energy_head.2."),
    ("network.projection.", "vocab_proj."),
    ("network.", ""),
    ("head.norm.norm.", "output_layer.norm_final."),
    ("head.norm.modulation.", "output_layer.adaLN_modulation."),
    ("head.linear.", "output_layer.linear."),
    ("backbone.embedding.weight", "vocab_embed.embedding"),
    ("backbone.time_embedding.fc1.", "sigma_map.mlp.0."),
    ("backbone.time_embedding.fc2.", "sigma_map.mlp.2."),
    ("backbone.blocks.", "blocks."),
    (".norm.", "."),
    (".norm1.modulation.", ".adaLN_modulation."),  # one layer for both norms
    (".norm2.modulation.", ".adaLN_modulation."),
    (".attention.", ".attn_"),
    (".fc1.", ".mlp.0."),
    (".fc2.", ".mlp.2."),
)


def from_official(
    state_dict: Mapping,
    kind: str,
    num_heads: int,
    *,
    time_conditioning: bool = False,
    max_position_embeddings: int = 1024,
    mask_token_id: int | None = None,
    bos_token_id: int | None = None,
) -> PreTrainedModel:
    """A model of ours with published weights, float32, in eval mode.

    Args:
        state_dict: tensors by the published names, with or without the prefixes of a whole checkpoint; or a Lightning
            checkpoint `{"state_dict": ..., "ema": ...}`, of which the exponential averages are taken.
        kind: `"denoiser"`, `"ar"`, `"nce"`, the energy with mean pooling, or `"edlm"`, denoiser and NCE energy.
        num_heads: the one size that the shapes do not tell.
        time_conditioning: whether the model was trained to see sigma, whose place our t takes (log-linear schedule).
        mask_token_id: `None`: the last id. bos_token_id: `None`: the mask id. A published AR model has never read
            that one: for an AR energy give the token its texts begin with.
    Raises:
        ValueError: an unknown kind; missing, unknown or misshapen tensors; averages that do not fit the weights.
    """
    if kind not in (*KINDS, EDLM):
        raise ValueError(f"kind must be one of {(*KINDS, EDLM)}, got {kind!r}")
    settings: dict[str, Any] = {
        "time_conditioning": time_conditioning,
        "max_position_embeddings": max_position_embeddings,
        "mask_token_id": mask_token_id,
        "bos_token_id": bos_token_id,
    }
    if "state_dict" in state_dict:
        tensors: Mapping = _averaged({**state_dict, "state_dict": _unwrapped(state_dict["state_dict"])})
    else:
        tensors = _unwrapped(state_dict)
    if kind == EDLM:
        denoiser, energy = (from_official(tensors, part, num_heads, **settings) for part in ("denoiser", "nce"))
        return EDLMModel.from_components(denoiser, energy, "nce").eval()  # type: ignore[arg-type]
    model_class, prefixes, fixed = KINDS[kind]
    if strays := [key for key, value in tensors.items() if not isinstance(value, torch.Tensor)]:
        raise ValueError(f"not tensors: {_listed(strays)}")
    prefix = next((p for p in prefixes if f"{p}vocab_embed.embedding" in tensors), None)
    if prefix is None:
        raise ValueError(
            f"no network of kind {kind!r}: vocab_embed.embedding is missing under the prefixes {prefixes}; "
            f"there are {_listed(list(tensors))}"
        )

    network, unknown = {}, []
    for key, value in tensors.items():
        if key.startswith(prefix) and not (kind == "denoiser" and key.startswith(ENERGY_PREFIXES)):
            network[key.removeprefix(prefix)] = value
        elif not key.startswith((*NO_WEIGHTS, "backbone.", "ebm.")):
            unknown.append(key)

    def size(key: str, axis: int) -> int:
        if key not in network:
            raise ValueError(f"missing for kind {kind!r}: {prefix + key}")
        if network[key].ndim != 2:
            raise ValueError(f"{prefix + key} must have two axes, got the shape {tuple(network[key].shape)}")
        return network[key].shape[axis]

    hidden_size = size("vocab_embed.embedding", 1)
    _check_heads(num_heads, hidden_size, network.get(ROTARY))
    try:
        config = EDLMConfig(
            vocab_size=size("vocab_embed.embedding", 0),
            hidden_size=hidden_size,
            num_hidden_layers=len({key.split(".")[1] for key in network if key.startswith("blocks.")}),
            num_attention_heads=num_heads,
            intermediate_size=size("blocks.0.mlp.0.weight", 0),
            cond_dim=0 if kind == "ar" else size("sigma_map.mlp.2.weight", 0),
            **settings,
            **fixed,
        )
    except StrictDataclassError as error:
        raise ValueError(str(error)) from error
    model = model_class(config)

    converted, used, missing, misshapen = {}, {ROTARY}, [], []
    for name, parameter in model.state_dict().items():
        key, shape = _official_name(name), parameter.shape
        used.add(key)
        shared = "blocks." in name and ".modulation." in name
        if shared:  # shift, scale and gate of the attention, then of the MLP
            shape = (2 * shape[0], *shape[1:])
        if key not in network:
            missing.append(prefix + key)
        elif network[key].shape != shape:
            misshapen.append(f"{prefix + key} {tuple(network[key].shape)} instead of {tuple(shape)}")
        else:
            converted[name] = network[key].chunk(2)[".norm2." in name] if shared else network[key]
    unknown += [prefix + key for key in network if key not in used and not key.startswith(NO_WEIGHTS)]
    for what, keys in (("missing", missing), ("unknown", unknown), ("of the wrong shape", misshapen)):
        if keys:
            raise ValueError(f"{what} for kind {kind!r}: {_listed(keys)}")
    model.load_state_dict(converted)
    return model.eval()


class Inert:
    """In place of an object of another package; keeps the state that the object had."""

    state: Any = None

    def __new__(cls, *args: Any) -> Self:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        """A part of the state, if that is a dictionary with such a part."""
        return self.state.get(name) if isinstance(self.state, dict) else None


def read_checkpoint(path: str | os.PathLike) -> Mapping:
    """The content of a checkpoint file, or of the weights of a folder, in one file or several.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a file is damaged or holds code.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    try:
        is_zip = zipfile.is_zipfile(path)
        foreign = get_unsafe_globals_in_checkpoint(path) if is_zip else []
        inert = [n for n in foreign if n.partition(".")[0] in INERT_PACKAGES or n in INERT_NAMES]
        with safe_globals([(Inert, name) for name in inert]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # the restricted unpickler meets damaged files with many kinds of errors
        reason = str(error.__context__ or error).partition("\n")[0].partition(". Please")[0]  # torch's has more advice
        raise ValueError(
            f"{path} holds more than weights, or is damaged, and was not unpickled ({type(error).__name__}: {reason})"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a dictionary, got {type(content).__name__}")
    return content


def download(repo: str, revision: str | None = None) -> Path:
    """A folder with the configuration and the weights of a Hub repo, safetensors where it has them, and no code."""
    for name, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        pattern = name.replace(".", "*.")  # shards too
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=["config.json", pattern, index]))
        if any(folder.glob(pattern)):
            break
    return folder


def write_hub_folder(model: PreTrainedModel, folder: str | os.PathLike, tokenizer: Any = None) -> None:
    """Weights, configuration, code and tokenizer; the folder, new or empty, takes its name when it is whole."""
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help=f"a file ({', '.join(FILES)}), a folder, or a Hub repo")
    parser.add_argument("--revision", help="of the Hub repo")
    parser.add_argument("--kind", required=True, choices=(*KINDS, EDLM))
    parser.add_argument("--num_heads", type=int, help="default: what the checkpoint says, where it does")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--tokenizer", help="folder or repo; where it has no mask token, one is added as the last id")
    parser.add_argument("--time_conditioning", action="store_true", help="the model was trained to see the noise level")
    parser.add_argument("--max_position_embeddings", type=int, help="default: what the checkpoint says, else 1024")
    arguments = parser.parse_args(argv)
    path = Path(arguments.checkpoint)
    is_repo = not path.exists() and path.suffix not in FILES
    if arguments.revision and not is_repo:
        parser.error(f"--revision is that of a Hub repo, --checkpoint is {path}")
    if is_repo:
        path = download(arguments.checkpoint, arguments.revision)
    content = read_checkpoint(path)
    published = _published(path, content)
    num_heads = arguments.num_heads or published.get("n_heads")
    if num_heads is None:
        parser.error("--num_heads must be given: the weights do not tell it")
    tokenizer, ids = None, {}
    if arguments.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer, trust_remote_code=False)
        if tokenizer.mask_token_id is None:
            tokenizer.add_special_tokens({"mask_token": "[MASK]"})
        # published texts begin with [CLS] where there is no BOS
        start = tokenizer.cls_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        ids = {"mask_token_id": tokenizer.mask_token_id, "bos_token_id": start}
    elif arguments.kind == "ar":
        print("without --tokenizer the AR model's first input is the mask token, which published models never read")
    model = from_official(
        content,
        arguments.kind,
        num_heads,
        time_conditioning=arguments.time_conditioning or bool(published.get("time_conditioning")),
        max_position_embeddings=arguments.max_position_embeddings or published.get("model_length", 1024),
        **ids,
    )
    for name, field in SIZES.items():
        if published.get(name, value := getattr(model.config, field)) != value:
            raise ValueError(f"{arguments.checkpoint} says {name}={published[name]}, the model has {value}")
    if tokenizer is not None and len(tokenizer) != model.config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}")
    write_hub_folder(model, arguments.out, tokenizer)
    print(f"wrote {arguments.out}: {type(model).__name__}, {model.num_parameters():,} parameters")


def _read_folder(folder: Path) -> Mapping:
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        file = folder / name
        if not file.is_file():
            continue
        if file.suffix != ".json":
            return read_checkpoint(file)
        parts = sorted(set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()))
        return {key: value for part in parts for key, value in read_checkpoint(folder / part).items()}
    raise FileNotFoundError(f"no such file: {folder / SAFE_WEIGHTS_NAME}, and no {WEIGHTS_NAME}, whole or in parts")


def _published(path: Path, content: Mapping) -> dict[str, Any]:
    """What is said of the model, by its published names, in a folder's config.json or in a Lightning checkpoint."""
    if path.is_dir():
        return json.loads((path / "config.json").read_text(encoding="utf-8"))
    said = {}
    for name, place in (("n_heads", "model.n_heads"), ("model_length", "model.length"), ("time_conditioning",) * 2):
        node = (content.get("hyper_parameters") or {}).get("config")
        for key in place.split("."):  # of a tree of omegaconf's nodes
            children = node.get("_content") if isinstance(node, Inert) else None
            node = children.get(key) if isinstance(children, dict) else None
        if isinstance(node, Inert) and isinstance(node.get("_val"), int):  # and no reference to another place
            said[name] = node.get("_val")
    return said


def _unwrapped(tensors: Mapping) -> dict[str, Any]:
    """Without what `torch.compile`, DDP and a trainer's class put into the names."""
    names = {key: WRAPPERS.sub("", key.replace("_orig_mod.", "")) for key in tensors}
    if len(set(names.values())) < len(names):
        raise ValueError("the checkpoint has weights twice, with and without _orig_mod., module. or model. in the name")
    return {names[key]: value for key, value in tensors.items()}


def _averaged(checkpoint: Mapping) -> dict[str, torch.Tensor]:
    """The tensors of a Lightning checkpoint, the exponential averages in place of the raw weights.

    The list of averages has no names: it follows the order of the trained parameters. Those of an EDLM checkpoint are
    the energy network's alone; its denoiser is frozen and has no averages.
    """
    tensors, ema = checkpoint["state_dict"], checkpoint.get("ema")
    if not isinstance(ema, Mapping) or "shadow_params" not in ema:
        raise ValueError(
            "the checkpoint has no ema.shadow_params; pass its state_dict alone if the raw weights are wanted"
        )
    trained = next((p for p in ENERGY_PREFIXES if any(key.startswith(p) for key in tensors)), "backbone.")
    averages = ema["shadow_params"]
    names = [key for key in tensors if key.startswith((trained, "noise.")) and not key.endswith(ROTARY)]
    misfits = [name for name, p in zip(names, averages, strict=False) if tensors[name].shape != p.shape]
    if misfits or len(names) != len(averages):
        raise ValueError(
            f"ema.shadow_params does not fit: {len(averages)} averages for {len(names)} parameters under {trained}"
            + (f"; other shapes at {_listed(misfits)}" if misfits else "")
        )
    return {**tensors, **dict(zip(names, averages, strict=True))}


def _official_name(name: str) -> str:
    for ours, theirs in RENAMED:
        name = name.replace(ours, theirs)
    return name


def _check_heads(num_heads: int, hidden_size: int, inv_freq: torch.Tensor | None) -> None:
    """The shapes tell nothing of the heads, but where the rotary frequencies were saved they do."""
    if num_heads < 1 or hidden_size % (2 * num_heads):
        raise ValueError(f"num_heads must divide hidden_size={hidden_size} into even parts, got {num_heads}")
    if inv_freq is None:
        return
    head_dim = hidden_size // num_heads
    expected = 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    if inv_freq.shape != expected.shape or not torch.allclose(inv_freq.float(), expected, rtol=1e-2):
        raise ValueError(
            f"num_heads={num_heads} needs {len(expected)} frequencies of base 10000 in {ROTARY}, which has "
            f"{inv_freq.numel()} or others"
        )


def _listed(keys: list[str]) -> str:
    return ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")


if __name__ == "__main__":
    main()
