"""`evaluate` module: perplexity of texts under a causal language model. The computation is in metrics.py."""

import math

import datasets
import evaluate
import torch
import transformers

from .metrics import bootstrap_interval, generative_nll

DESCRIPTION = "Perplexity and bits per character of texts under a causal language model that reads a BOS in front."
USAGE = """
Args:
    predictions: texts.
    model_id: folder or repo of a causal language model, not one that had a part in making the texts.
    subfolder: where the model is in it. tokenizer_id: default model_id.
    trust_remote_code: for models with code of their own. batch_size: texts in one pass.
    max_length: longer texts are cut to so many tokens; None: never. bos_token_id: default the model's own.
Returns:
    generative_perplexity: exp of nats_per_token. nats_per_token: mean over texts of the mean over tokens, the first
    token given the BOS. bits_per_character: of the tokens that count. interval: 95% bootstrap interval of
    generative_perplexity over texts. per_text: nats per token of each text.
"""


class GenerativePerplexity(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=USAGE,
            features=datasets.Features({"predictions": datasets.Value("string")}),
            reference_urls=["https://arxiv.org/abs/2606.08417"],
        )

    def _compute(
        self,
        predictions,
        model_id,
        subfolder="",
        tokenizer_id=None,
        trust_remote_code=False,
        batch_size=8,
        max_length=None,
        bos_token_id=None,
    ):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            model_id, subfolder=subfolder, trust_remote_code=trust_remote_code, dtype=torch.float32
        ).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            tokenizer_id or model_id, trust_remote_code=trust_remote_code
        )
        ids = [tokenizer(text, add_special_tokens=False).input_ids[:max_length] for text in predictions]
        if not ids or not all(ids):
            raise ValueError(f"predictions must be texts with a token at least, got {list(predictions)!r:.200}")
        counts = torch.tensor([len(own) for own in ids])
        x = torch.nn.utils.rnn.pad_sequence([torch.tensor(own) for own in ids], batch_first=True)
        is_token = torch.arange(x.shape[1]) < counts[:, None]
        # an EDLM has a mask token that no text holds; a masked language model's [MASK] is no concern of a causal one
        mask_token_id = model.config.mask_token_id if model.config.model_type == "edlm" else None
        bos_token_id = model.config.bos_token_id if bos_token_id is None else bos_token_id
        nats = generative_nll(model, x, bos_token_id, mask_token_id, is_token, batch_size)
        characters = sum(len(tokenizer.decode(own)) for own in ids)
        low, high = bootstrap_interval(nats)
        return {
            "generative_perplexity": math.exp(nats.mean()),
            "nats_per_token": float(nats.mean()),
            "bits_per_character": float((nats * counts).sum()) / characters / math.log(2),
            "interval": [math.exp(low), math.exp(high)],
            "per_text": nats.tolist(),
        }
