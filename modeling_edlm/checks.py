"""What an argument has to be: its value in the form that is used, or a ValueError that names it. No network.

Shapes: B rows, L length.
"""

import operator
from numbers import Real
from typing import Any

import torch
from torch import Tensor

MOST = {  # what would never end, or fit into no memory, is a mistake; other counts only have to fit into 32 bits
    **dict.fromkeys(("num_steps", "corrector_steps", "num_times"), 2**20),
    **dict.fromkeys(("num_candidates", "corrector_candidates", "num_samples"), 2**16),
    "first_row": 2**62,
}
MOST_ENTRIES = 2**27  # of a table with all rows and tokens, or all rows and steps, of a call


def choose_seed(seed: int | None, generator: torch.Generator | None) -> int:
    """The seed of a call; ValueError unless it is an integer and the only source."""
    if seed is not None and generator is not None:
        raise ValueError(f"give seed or generator, not both: got seed={seed!r} and {generator}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator must be a torch.Generator, got {generator!r}")
    if seed is None:
        return int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device if generator else "cpu"))
    return check_seed(seed)


def check_seed(seed: Any) -> int:
    """Any integer; ValueError if it is none."""
    if (number := as_integer(seed)) is None:
        raise ValueError(f"seed must be an integer, got {seed!r}")
    return number


def as_integer(value: Any) -> int | None:
    """An integer of any library as one of Python; None for what is no integer, as true and false are."""
    try:
        return None if isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool else operator.index(value)
    except TypeError:
        return None


def check_count(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """An integer of any library as one of Python; ValueError if it is none, too small, or too large (see `MOST`)."""
    if (number := as_integer(value)) is None or number < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    if number > (most := most or MOST.get(name, 2**31 - 1)):
        raise ValueError(f"{name} must be at most {most}, got {value!r}")
    return number


def check_size(config: Any, rows: int, length: int, steps: int, batch_size: int = 1) -> None:
    """Raises ValueError where the tables of a call cannot fit into memory, before they are made."""
    rows *= config.num_return_sequences
    if rows * max(length, steps) > MOST_ENTRIES:
        raise ValueError(
            f"batch_size={batch_size}, num_return_sequences={config.num_return_sequences}, "
            f"num_steps={config.num_steps} and corrector_steps={config.corrector_steps} make {rows} rows of {length} "
            f"tokens and {steps} steps, more than {MOST_ENTRIES} entries: make fewer rows in a call, and count on by "
            "first_row"
        )


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def described(value: Any) -> str:
    """Type and shape of a tensor, the type of anything else."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def check_prompt(input_ids: Tensor, vocab_size: int) -> Tensor:
    """Token ids as int64; ValueError unless they are some, (B, L) and not empty."""
    is_integer = isinstance(input_ids, Tensor) and not (input_ids.is_floating_point() or input_ids.is_complex())
    if not is_integer or input_ids.dtype == torch.bool or input_ids.ndim != 2:
        raise ValueError(f"input_ids must be an integer tensor (B, L), got {described(input_ids)}")
    if input_ids.numel() == 0:
        raise ValueError(f"input_ids is empty, shape {tuple(input_ids.shape)}; leave it out to sample freely")
    input_ids = input_ids.long()
    outside = (input_ids < 0) | (input_ids >= vocab_size)
    if outside.any():
        raise ValueError(f"input_ids must lie in [0, vocab_size={vocab_size}), got {int(input_ids[outside][0])}")
    return input_ids


def check_mask(name: str, mask: Tensor, input_ids: Tensor, meaning: str) -> Tensor:
    """A mask of zeros and ones, of any type, as int64; ValueError for another one, with what its values mean."""
    if not isinstance(mask, Tensor):
        raise ValueError(f"{name} must be a tensor {tuple(input_ids.shape)}, got {described(mask)}")
    if mask.shape != input_ids.shape:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}, input_ids has {tuple(input_ids.shape)}")
    if ((mask != 0) & (mask != 1)).any():
        raise ValueError(f"{name} must be {meaning}")
    return mask.bool().long()


def check_attention_mask(attention_mask: Tensor, input_ids: Tensor) -> Tensor:
    """The mask as int64, if each row has one text with padding around it; ValueError if not."""
    attention_mask = check_mask("attention_mask", attention_mask, input_ids, "0 for padding and 1 for text")
    num_starts_B = attention_mask[:, 0] + (attention_mask.diff(dim=1) > 0).sum(-1)
    if (num_starts_B > 1).any():
        row = int((num_starts_B > 1).nonzero()[0])
        raise ValueError(f"attention_mask must have its zeros before or after the text, row {row} has some within it")
    if (num_starts_B == 0).any():
        raise ValueError("attention_mask leaves an empty prompt: a row of zeros")
    return attention_mask
