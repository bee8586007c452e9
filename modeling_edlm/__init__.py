"""Energy-based Diffusion Language Models (EDLM, arXiv 2410.21357) for the Hugging Face stack."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from .configuration_edlm import EDLMConfig
from .foreign import ForeignModel
from .generation_edlm import EDLMGenerationConfig, EDLMGenerationOutput
from .likelihood import EDLMLikelihoodOutput
from .modeling_edlm import EDLMEnergyModel, EDLMForCausalLM, EDLMForMaskedLM, EDLMModel, EDLMPreTrainedModel

__version__ = "0.1.0"

AutoConfig.register("edlm", EDLMConfig)
AutoModel.register(EDLMConfig, EDLMModel)
AutoModelForMaskedLM.register(EDLMConfig, EDLMForMaskedLM)
AutoModelForCausalLM.register(EDLMConfig, EDLMForCausalLM)
AutoModelForSequenceClassification.register(EDLMConfig, EDLMEnergyModel)

# save_pretrained() then puts the code beside the weights: the folder works where this package is not installed
EDLMConfig.register_for_auto_class()
EDLMModel.register_for_auto_class("AutoModel")
EDLMForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
EDLMForCausalLM.register_for_auto_class("AutoModelForCausalLM")
EDLMEnergyModel.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = [
    "EDLMConfig",
    "EDLMEnergyModel",
    "EDLMForCausalLM",
    "EDLMForMaskedLM",
    "EDLMGenerationConfig",
    "EDLMGenerationOutput",
    "EDLMLikelihoodOutput",
    "EDLMModel",
    "EDLMPreTrainedModel",
    "ForeignModel",
]
