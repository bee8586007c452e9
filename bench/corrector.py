"""What a round of revision costs, beside the passes that it is made of, and what kept keys and values save.

    python -m bench.corrector --model hub_cards/edlm-stories --out hub_cards/results/corrector-cpu.json

The passes alone are those of the denoiser over texts of the model's length with `--size` masks, and of the energy over
k - 1 candidates each. All rows of a k take turns, and the smallest of `--repeats` times is kept.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

from training.common.arguments import CommaLists, answer_early, command, found_device, parse_arguments


@dataclass(kw_only=True)
class CorrectorArguments(CommaLists):
    model: str = field(metadata={"help": "folder or repo of a model with an autoregressive energy"})
    out: str = field(metadata={"help": "results, .json"})
    num_candidates: str = field(default="2,4,8", metadata={"help": "k, the present text among them"})
    size: int = field(default=12, metadata={"help": "positions masked in a round"})
    rounds: int = field(default=16, metadata={"help": "of each timed call"})
    batch_size: int = field(default=16, metadata={"help": "texts revised at a time"})
    repeats: int = field(default=3, metadata={"help": "timed calls of each row"})
    dtype: str = field(default="float32", metadata={"help": "or bfloat16"})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, or auto: cuda where there is one"})

    def __post_init__(self):
        self.device = found_device(self.device)
        if not self.out.endswith(".json"):
            raise ValueError(f"out must end in .json, got {self.out!r}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")
        if min(self.listed("num_candidates", int), default=0) < 2:
            raise ValueError(f"num_candidates must be at least 2, got {self.num_candidates!r}")
        for name in ("size", "rounds", "batch_size", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


if __name__ == "__main__":
    answer_early(CorrectorArguments, __doc__)

import torch

from modeling_edlm import EDLMModel
from modeling_edlm.backbone import fixed_weights
from training.common.results import machine, markdown, write_json

WAYS = {  # sets, and whether keys and values are kept
    "random sets": ("random", False),
    "random sets, kept": ("random", True),
    "neighbours": ("contiguous", False),
    "neighbours, kept": ("contiguous", True),
}


@torch.no_grad()
def passes_alone(model: EDLMModel, text_BL: torch.Tensor, size: int, k: int, rounds: int) -> None:
    """The networks' part of `rounds` rounds: what is drawn and chosen is left out."""
    masked_BL, mask = text_BL.clone(), model.config.mask_token_id
    places = torch.arange(size, device=text_BL.device) * (text_BL.shape[1] // size)
    masked_BL[:, places] = mask
    where_BL, log_mu_B = (masked_BL == mask).cpu(), torch.zeros(len(text_BL), device=text_BL.device)
    for _ in range(rounds):
        for _ in model.denoiser.logit_chunks(masked_BL, where_BL, 0.1):
            pass
        for _ in range(k - 1):
            model.energy(text_BL, masked_BL, 0.1, None, log_mu_B)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(CorrectorArguments, __doc__, argv)
    model = (
        EDLMModel.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).to(arguments.device).eval()
    )
    rounds, size = arguments.rounds, arguments.size
    settings = {"corrector_steps": 0, "num_candidates": 1, "batch_size": arguments.batch_size, "seed": 0}
    text_BL = model.generate(**settings | {"num_steps": 32, "eos_token_id": None})
    rows = []
    for k in arguments.listed("num_candidates", int):
        seconds: dict[str, list[float]] = {name: [] for name in ("passes alone", *WAYS)}
        tokens = {}
        for _ in range(arguments.repeats):
            for name in seconds:
                start = time.perf_counter()
                if name == "passes alone":
                    with fixed_weights():
                        passes_alone(model, text_BL, size, k, rounds)
                else:
                    sets, use_cache = WAYS[name]
                    output = model.revise(
                        text_BL,
                        corrector_steps=rounds,
                        corrector_size=size,
                        corrector_candidates=k,
                        corrector_sets=sets,
                        use_cache=use_cache,
                        eos_token_id=None,
                        seed=1,
                        return_dict_in_generate=True,
                    )
                    tokens[name] = float(output.energy_tokens.float().mean() / rounds)
                if arguments.device == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append((time.perf_counter() - start) / rounds)
        alone = min(seconds["passes alone"])
        rows += [
            {
                "num_candidates": k,
                "way": name,
                "seconds_per_round": min(values),
                "of_passes_alone": min(values) / alone,
                "energy_tokens_per_text": tokens.get(name),
            }
            for name, values in seconds.items()
        ]
    results = {"command": command("bench.corrector", arguments), "machine": machine(), "rows": rows}
    write_json(Path(arguments.out), results)
    print(table(results), f"\nresults: {arguments.out}")


def table(results: dict) -> str:
    head = ["k", "a round", "seconds", "of its passes alone", "tokens of the energy, for a text"]
    cells = [
        [
            str(row["num_candidates"]),
            row["way"],
            f"{row['seconds_per_round']:.3f}",
            f"{row['of_passes_alone']:.2f}",
            "-" if row["energy_tokens_per_text"] is None else f"{row['energy_tokens_per_text']:.0f}",
        ]
        for row in results["rows"]
    ]
    return markdown(head, cells, left=2)


if __name__ == "__main__":
    main()
