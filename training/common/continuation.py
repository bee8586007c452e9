"""Text of an autoregressive model in the blanks of another text. Shapes: B texts, L length."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def continue_left(
    ar: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    start: list[int],
    mask_token_id: int,
    size: int,
    temperature: float,
    seed: int,
) -> torch.Tensor:
    """`size` texts (B, L): `start` with its masks, which are all in one place, filled from left to right. What stands
    behind them the model has not seen; what is left after the end of a text is padding.
    """
    first, blanks = start.index(mask_token_id), start.count(mask_token_id)
    torch.manual_seed(seed)
    new = ar.generate(
        torch.tensor([[ar.config.bos_token_id, *start[:first]]]).expand(size, -1),
        max_new_tokens=blanks,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        suppress_tokens=None if start[-1] == mask_token_id else [tokenizer.eos_token_id],  # a gap has no end
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )[:, 1 + first :]
    end = torch.tensor(start[first + blanks :])
    x_BL = torch.tensor(start).expand(size, -1).clone()
    x_BL[:, first : first + new.shape[1]] = new
    x_BL[x_BL == mask_token_id] = tokenizer.pad_token_id
    if len(end):
        x_BL[:, -len(end) :] = end
    return x_BL
