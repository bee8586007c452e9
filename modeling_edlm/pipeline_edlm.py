"""`pipeline("text-generation", model=..., trust_remote_code=True)` with the sampler of EDLM."""

import copy
from typing import Any

import torch
from transformers import TextGenerationPipeline
from transformers.utils import ModelOutput


class EDLMTextGenerationPipeline(TextGenerationPipeline):
    """The library's pipeline for text, for a model whose `generate()` fills in masks.

    Keyword arguments, of the pipeline or of a call, are those of `generate()`: `num_steps`, `num_candidates`, `seed`,
    `max_new_tokens`, ... (and `batch_size`, here the number of prompts in a batch). What is not given is as the
    checkpoint's generation_config.json has it, so texts are as long as the model takes.

    A prompt that has mask tokens is filled in and comes back as a whole. An empty one gives a free sample. A seed fixes
    the text of every batch by itself: without `batch_size`, equal prompts get equal texts. A model that is passed as an
    object needs `pipeline_class=EDLMTextGenerationPipeline`: the library looks for this class only in a folder or repo.
    """

    # The library would put defaults of autoregressive decoding, such as 256 new tokens, before the checkpoint's own.
    _pipeline_calls_generate = False
    prefix = assistant_model = assistant_tokenizer = None
    model: Any
    tokenizer: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.tokenizer.pad_token_id is None:  # batches need one, and what stands in the padding is never looked at
            self.tokenizer = copy.deepcopy(self.tokenizer)
            self.tokenizer.pad_token = self.tokenizer.mask_token

    def check_model_type(self, supported_models: list[str] | dict) -> None:
        """The library's table of models has none of ours."""

    def _sanitize_parameters(self, stop_sequence: Any = None, handle_long_generation: Any = None, **kwargs: Any) -> Any:
        for name, value in (("stop_sequence", stop_sequence), ("handle_long_generation", handle_long_generation)):
            if value is not None:
                raise ValueError(f"{name} is of autoregressive decoding and has no meaning here, got {value!r}")
        return super()._sanitize_parameters(**kwargs)

    def _forward(self, model_inputs: dict[str, Any], prefix_length: int = 0, **generate_kwargs: Any) -> dict[str, Any]:
        input_ids, attention_mask = model_inputs["input_ids"], model_inputs.get("attention_mask")
        if input_ids.shape[1] == 0:
            input_ids = attention_mask = None
        B = 1 if input_ids is None else len(input_ids)
        output = self.model.generate(input_ids=input_ids, attention_mask=attention_mask, **generate_kwargs)
        fields = dict(output) if isinstance(output, ModelOutput) else {"sequences": output}
        if "history" in fields:
            fields["history"] = torch.stack(fields["history"], dim=1)
        fields = {name: value.unflatten(0, (B, -1)) for name, value in fields.items()}  # of each prompt
        return {
            "generated_sequence": fields.pop("sequences"),
            "input_ids": input_ids,
            "prompt_text": model_inputs["prompt_text"],
            **fields,
        }

    def postprocess(self, model_outputs: dict[str, Any], **kwargs: Any) -> list[dict[str, Any]]:
        names = ("generated_sequence", "input_ids", "prompt_text")
        parts = {name: model_outputs[name] for name in names}
        mask, prompt = self.tokenizer.mask_token, parts["prompt_text"]
        if isinstance(prompt, str) and mask is not None and mask in prompt:
            parts |= {"input_ids": None, "prompt_text": ""}  # as if all of it were new
        records = super().postprocess(parts, **kwargs)
        for name in model_outputs.keys() - set(names):
            for record, value in zip(records, model_outputs[name][0].tolist(), strict=True):
                record[name] = value
        return records
