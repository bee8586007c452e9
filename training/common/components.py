"""One denoiser with several energies, put together for a comparison, and what a pass of each energy costs."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from modeling_edlm import EDLMForMaskedLM, EDLMModel

from .arguments import KINDS

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model")


def load_variants(model_folder: str, items: list[str]) -> dict[str, EDLMModel]:
    """The model with its own energy, if it has one, and with each of `items`, all sharing its denoiser.

    Args:
        model_folder: folder or repo of an EDLM or of a denoiser.
        items: `ar=SOURCE`, `coar=SOURCE` (any causal language model with the same token ids) or `nce=SOURCE` (an
            `EDLMEnergyModel`, or an adapter over the model's denoiser); SOURCE is a folder or repo, with `:subfolder`
            where needed. `nce@NAME=SOURCE` gives it a name.
    Returns:
        In float32 and eval mode, by name: the one given, else the energy type, but `step` for an energy of the next
        state. The model's own comes first. Empty where there is no energy at all.
    Raises:
        ValueError: an item of another form, that does not fit the denoiser, or whose label is there already.
    """
    own = EDLMModel.from_pretrained(model_folder, dtype=torch.float32).eval()
    variants = {} if own.energy_type == "none" else {label(own): own}
    for item in items:
        kind, _, source = item.partition("=")
        kind, _, name = kind.partition("@")
        if kind not in KINDS or not source:
            raise ValueError(f"energies must be ar=, coar= or nce= and a folder, got {item!r}")
        try:
            model = with_energy(own.denoiser, kind, source)
        except ValueError as error:
            raise ValueError(f"energies has {item!r}, which does not fit: {error}") from error
        if (name := name or label(model)) in variants:
            raise ValueError(f"energies must have different names (nce@NAME=), got a second {name!r} with {item!r}")
        variants[name] = model
    return variants


def with_energy(denoiser: EDLMForMaskedLM, kind: str, source: str) -> EDLMModel:
    """The denoiser, not copied, with the energy of a folder or repo (`:subfolder` where needed); float32, eval mode."""
    folder, _, subfolder = source.partition(":")
    if kind == "nce":
        return EDLMModel.from_components(denoiser).load_energy(folder, subfolder=subfolder).eval()
    energy = AutoModelForCausalLM.from_pretrained(folder, subfolder=subfolder, dtype=torch.float32)
    return EDLMModel.from_components(denoiser, energy, kind).eval()


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, energy: str, subfolder: str = "") -> None:
    """Raises ValueError unless the tokenizer beside an AR energy gives the same ids as the denoiser's.

    The one id that may be different is the mask token's. An energy without a tokenizer is taken at its word.
    """
    optional = {"subfolder": subfolder, "_raise_exceptions_for_missing_entries": False}
    if all(cached_file(energy, name, **optional) is None for name in TOKENIZER_FILES):
        print(f"{energy} has no tokenizer; its token ids are taken to be the denoiser's")
        return
    theirs = AutoTokenizer.from_pretrained(energy, subfolder=subfolder)
    size = min(len(tokenizer), len(theirs))
    ours_V, theirs_V = (t.convert_ids_to_tokens(list(range(size))) for t in (tokenizer, theirs))
    for i, (a, b) in enumerate(zip(ours_V, theirs_V, strict=True)):
        if a != b and i != tokenizer.mask_token_id:
            raise ValueError(
                f"energy {energy!r} has another tokenizer than the denoiser: id {i} is {b!r} there and {a!r} here. An "
                f"AR energy must know the denoiser's tokens: train one on the same tokenizer, with python -m "
                f"training.pretrain --objective ar --tokenizer DENOISER"
            )
    if abs(len(tokenizer) - len(theirs)) > 1:
        raise ValueError(
            f"energy {energy!r} has another tokenizer than the denoiser: {len(theirs)} tokens, not {len(tokenizer)}"
        )


def label(model: EDLMModel) -> str:
    return "step" if model.config.energy_target == "xs" else model.energy_type


def pass_cost(model: EDLMModel) -> float:
    """Cost of one pass of the energy in passes of the denoiser: the ratio of parameters outside the embeddings.

    The output projection counts as an embedding: its cost goes with the positions that are projected, not with the
    pass. Zero without an energy.
    """
    return 0.0 if model.energy_type == "none" else body_parameters(model.energy_model) / body_parameters(model.denoiser)


def body_parameters(model: PreTrainedModel) -> int:
    """Parameters without the input embedding and the output projection."""
    ends = [part for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None]
    outside = {id(parameter) for part in ends for parameter in part.parameters()}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in outside)
