"""Energy-based Diffusion Language Models (EDLM, arXiv 2410.21357) for the Hugging Face stack."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from .configuration_edlm import EDLMConfig
from .generation_edlm import EDLMGenerationConfig, EDLMGenerationOutput
from .modeling_edlm import EDLMEnergyModel, EDLMForCausalLM, EDLMForMaskedLM, EDLMModel, EDLMPreTrainedModel

AutoConfig.register("edlm", EDLMConfig)
AutoModel.register(EDLMConfig, EDLMModel)
AutoModelForMaskedLM.register(EDLMConfig, EDLMForMaskedLM)
AutoModelForCausalLM.register(EDLMConfig, EDLMForCausalLM)
AutoModelForSequenceClassification.register(EDLMConfig, EDLMEnergyModel)

__all__ = [
    "EDLMConfig",
    "EDLMEnergyModel",
    "EDLMForCausalLM",
    "EDLMForMaskedLM",
    "EDLMGenerationConfig",
    "EDLMGenerationOutput",
    "EDLMModel",
    "EDLMPreTrainedModel",
]
