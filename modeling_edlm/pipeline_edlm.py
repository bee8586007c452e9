"""`pipeline("text-generation", model=..., trust_remote_code=True)` with the sampler of EDLM."""

import copy
import re
from typing import Any

import torch
from transformers import TextGenerationPipeline
from transformers.utils import ModelOutput


class EDLMTextGenerationPipeline(TextGenerationPipeline):
    """The library's pipeline for text, for a model whose `generate()` fills in masks.

    Keyword arguments, of the pipeline or of a call, are those of `generate()`: `num_steps`, `num_candidates`, `seed`,
    `max_new_tokens`, ... (and `batch_size`, here the number of prompts in a batch). What is not given is as the
    checkpoint's generation_config.json has it, so texts are as long as the model takes.

    A prompt that has mask tokens is filled in and comes back as a whole; `[MASK 12]` or `[MASK:12]` is twelve of them.
    With `best_of=n` it is filled in n times, and the `num_return_sequences` likeliest come back, the best one first,
    each with its "score" (see `EnergyMixin.score`). An empty prompt gives a free sample. A seed fixes the text of
    every batch by itself: without `batch_size`, equal prompts get equal texts. A model that is passed as an object
    needs `pipeline_class=EDLMTextGenerationPipeline`: the library looks for this class only in a folder or repo.
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

    def preprocess(self, prompt_text: Any, *args: Any, **kwargs: Any) -> Any:
        written = prompt_text
        if isinstance(prompt_text, str) and (mask := self.tokenizer.mask_token):
            several = re.compile(re.escape(mask[:-1]) + r"[ :](\d+)" + re.escape(mask[-1]))
            if found := [number for number in several.findall(prompt_text) if int(number) == 0]:
                raise ValueError(f"a gap must have at least one token, got {mask[:-1]} {found[0]}{mask[-1]}")
            prompt_text = several.sub(lambda match: mask * int(match[1]), prompt_text)
        return super().preprocess(prompt_text, *args, **kwargs) | {"prompt_text": written}

    def _forward(
        self, model_inputs: dict[str, Any], prefix_length: int = 0, best_of: int | None = None, **generate_kwargs: Any
    ) -> dict[str, Any]:
        input_ids, attention_mask = model_inputs["input_ids"], model_inputs.get("attention_mask")
        number = generate_kwargs.get("num_return_sequences") or self.model.generation_config.num_return_sequences
        if best_of is not None:
            if not isinstance(best_of, int) or best_of < number:
                raise ValueError(
                    f"best_of must be an integer of at least num_return_sequences={number}, got {best_of!r}"
                )
            if not (input_ids == self.tokenizer.mask_token_id).any(-1).all():
                raise ValueError(f"best_of={best_of} compares ways to fill gaps, and a prompt has no mask token")
            generate_kwargs["num_return_sequences"] = best_of
        if input_ids.shape[1] == 0:
            input_ids = attention_mask = None
        B = 1 if input_ids is None else len(input_ids)
        output = self.model.generate(input_ids=input_ids, attention_mask=attention_mask, **generate_kwargs)
        fields = dict(output) if isinstance(output, ModelOutput) else {"sequences": output}
        if "history" in fields:
            fields["history"] = torch.stack(fields["history"], dim=1)
        fields = {name: value.unflatten(0, (B, -1)) for name, value in fields.items()}  # of each prompt
        if best_of is not None:
            fields["score"] = self._scores(input_ids, fields["sequences"], attention_mask)
            best_BR = fields["score"].topk(number, dim=1).indices
            fields = {name: torch.stack([x[i] for x, i in zip(v, best_BR, strict=True)]) for name, v in fields.items()}
        return {
            "generated_sequence": fields.pop("sequences"),
            "input_ids": input_ids,
            "prompt_text": model_inputs["prompt_text"],
            **fields,
        }

    def _scores(self, canvas_BL: torch.Tensor, x_BRL: torch.Tensor, mask_BL: torch.Tensor | None) -> torch.Tensor:
        """(B, R): what comes after an EOS that was drawn does not count."""
        (B, R, _), mask_BL = x_BRL.shape, torch.ones_like(canvas_BL) if mask_BL is None else mask_BL
        canvas_NL, mask_NL = (z.repeat_interleave(R, dim=0) for z in (canvas_BL, mask_BL))
        x_NL, eos = x_BRL.flatten(0, 1), self.model.generation_config.eos_token_ids
        is_given_NL = (canvas_NL != self.tokenizer.mask_token_id) & mask_NL.bool()
        is_tail_NL = is_given_NL.flip(-1).cumsum(-1).flip(-1) == 0
        is_end_NL = torch.isin(x_NL, torch.tensor(eos, device=x_NL.device)) & is_tail_NL
        mask_NL = mask_NL * (is_end_NL.cumsum(-1) - is_end_NL.long() == 0)
        return self.model.score(x_NL, canvas_NL, attention_mask=mask_NL).view(B, R)

    def postprocess(self, model_outputs: dict[str, Any], **kwargs: Any) -> list[dict[str, Any]]:
        names = ("generated_sequence", "input_ids", "prompt_text")
        parts = {name: model_outputs[name] for name in names}
        mask, prompt = self.tokenizer.mask_token, parts["prompt_text"]
        if isinstance(prompt, str) and mask is not None and mask[:-1] in prompt:
            parts |= {"input_ids": None, "prompt_text": ""}  # as if all of it were new
        records = super().postprocess(parts, **kwargs)
        for name in model_outputs.keys() - set(names):
            for record, value in zip(records, model_outputs[name][0].tolist(), strict=True):
                record[name] = value
        return records
