"""The sampler of EDLM (arXiv 2410.21357) for any masked language model, with any energy.

In a Hub repo this file is custom_generate/generate.py, where the library's own `generate()` finds it:

    class Bert(BertForMaskedLM, GenerationMixin):
        "A masked language model of the library lacks `generate()`."

    model = Bert.from_pretrained("...")
    model.generate(**tokenizer("A [MASK] [MASK].", return_tensors="pt"), mask_token_id=tokenizer.mask_token_id,
                   custom_generate="user/edlm", trust_remote_code=True, energy=causal_lm, energy_type="coar")

Shapes: N rows, L length.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from .foreign import ForeignModel, load_energy
from .generation_edlm import EDLMGenerationOutput, own_config

# arguments of the library's generate() that mean something else, or nothing, here
UNSUPPORTED = (
    "prefix_allowed_tokens_fn",
    "synced_gpus",
    "assistant_model",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
)
# what the library has used itself, to find this file, and hands on
USED = ("cache_dir", "force_download", "local_files_only", "proxies", "repo_type", "revision", "token")


def generate(
    model: PreTrainedModel,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    energy: nn.Module | Callable[..., Tensor] | str | None = None,
    energy_type: str | None = None,
    energy_target: str | None = None,
    energy_kwargs: dict | None = None,
    mask_token_id: int | None = None,
    max_position_embeddings: int | None = None,
    logits_shift: int = 0,
    num_tokens: int | None = None,
    input_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    **kwargs: Any,
) -> EDLMGenerationOutput | Tensor:
    """Sample text: unconditional, after a prompt, or in place of the mask tokens of `input_ids`.

    Args:
        model: any masked language model.
        inputs, input_ids: (N, L), one name or the other.
        generation_config: an `EDLMGenerationConfig`, or the library's with no fields set but its; keyword arguments
            change single fields.
        energy, energy_type, energy_target, mask_token_id, max_position_embeddings, logits_shift, num_tokens: see
            `ForeignModel`. The energy may also be the folder or Hub repo of a model, then loaded in every call.
        energy_kwargs: for the `from_pretrained` of an energy that is a name: `subfolder`, `trust_remote_code`, ...
        token_type_ids: what a tokenizer gives; only zeros.
        kwargs: every argument of EDLM's `generate()`: `num_steps`, `num_candidates`, `energy_window`, `seed`,
            `batch_size`, `max_length`, `logits_processor`, `streamer`, ... (not `compile`).
    Returns:
        sequences, or an `EDLMGenerationOutput`.
    Raises:
        ValueError: an argument that does not exist or does not fit, named with its value.
        FloatingPointError: a network gave NaN, or no candidate of a row a finite energy.
    """
    for name in UNSUPPORTED:
        if (value := kwargs.pop(name, None)) is not None and value is not False:
            raise ValueError(f"{name} is not supported by the sampler of EDLM, got {value!r}")
    kwargs = {name: value for name, value in kwargs.items() if name not in USED}
    if inputs is not None and input_ids is not None:
        raise ValueError("give inputs or input_ids, not both")
    if token_type_ids is not None and not (isinstance(token_type_ids, Tensor) and (token_type_ids == 0).all()):
        raise ValueError("token_type_ids must be zeros: what is generated has type 0")
    if isinstance(energy, str):
        energy = load_energy(energy, **energy_kwargs or {}).to(model.device)  # type: ignore[arg-type]
    elif energy_kwargs is not None:
        raise ValueError(f"energy_kwargs are for an energy that is a name, got {energy_kwargs}")
    sizes = mask_token_id, max_position_embeddings, logits_shift, num_tokens
    sampler = ForeignModel(model, energy, energy_type, energy_target, *sizes)  # type: ignore[arg-type]
    generation_config = own_config(sampler.generation_config if generation_config is None else generation_config)
    if kwargs.get("compile", generation_config.compile) is True:
        raise ValueError("compile=True compiles EDLM's own blocks, and not this model: call model.compile()")
    return sampler.generate(inputs if input_ids is None else input_ids, generation_config=generation_config, **kwargs)
