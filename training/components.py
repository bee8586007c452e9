"""One denoiser with several energies, put together for a comparison, and what a pass of each energy costs."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from modeling_edlm import EDLMEnergyModel, EDLMForMaskedLM, EDLMModel

KINDS = ("ar", "coar", "nce")
COMPLETIONS = ("independent", "shared")  # of the candidates of a step


def load_variants(model_folder: str, items: list[str]) -> dict[str, EDLMModel]:
    """The model with its own energy, if it has one, and with each of `items`, all sharing its denoiser.

    Args:
        model_folder: folder or repo of an EDLM or of a denoiser.
        items: `ar=SOURCE`, `coar=SOURCE` (any causal language model with the same token ids) or `nce=SOURCE` (an
            `EDLMEnergyModel`); SOURCE is a folder or repo, with `:subfolder` where needed.
    Returns:
        In float32 and eval mode, by energy type, but `step` for an energy of the next state. The model's own comes
        first. Empty where there is no energy at all.
    Raises:
        ValueError: an item of another form, that does not fit the denoiser, or whose label is there already.
    """
    own = EDLMModel.from_pretrained(model_folder, dtype=torch.float32).eval()
    variants = {} if own.energy_type == "none" else {label(own): own}
    for item in items:
        kind, _, source = item.partition("=")
        if kind not in KINDS or not source:
            raise ValueError(f"energies must be ar=, coar= or nce= and a folder, got {item!r}")
        try:
            model = with_energy(own.denoiser, kind, source)
        except ValueError as error:
            raise ValueError(f"energies has {item!r}, which does not fit: {error}") from error
        if label(model) in variants:
            raise ValueError(f"energies must be different, got a second {label(model)!r} with {item!r}")
        variants[label(model)] = model
    return variants


def with_energy(denoiser: EDLMForMaskedLM, kind: str, source: str) -> EDLMModel:
    """The denoiser, not copied, with the energy of a folder or repo (`:subfolder` where needed); float32, eval mode."""
    folder, _, subfolder = source.partition(":")
    energy_class = EDLMEnergyModel if kind == "nce" else AutoModelForCausalLM
    energy = energy_class.from_pretrained(folder, subfolder=subfolder, dtype=torch.float32)
    return EDLMModel.from_components(denoiser, energy, kind).eval()


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
