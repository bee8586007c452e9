"""Fine-tune an energy by noise contrastive estimation (EDLM, arXiv 2410.21357): a LoRA adapter or a whole network.

    python -m training.train_energy --base hub_cards/edlm-wiki27 --data my.txt --validation_data held-out.txt \
        --lora_r 16 --energy_target xs --output_dir runs/energy

The data are told from what the denoiser, frozen and in eval mode, proposes for the same masked text. The energy starts
from the denoiser's blocks: with `--lora_r` or `--head_only` it shares them and `output_dir/model` is an adapter, else
it has a copy of its own. Negatives are drawn by the sampler's own code. What the trained energy is worth on held-out
text is in `output_dir/evaluation.json` and `.png`.

Shapes: B rows of one micro-batch of one process, L length.
"""

from dataclasses import dataclass, field
from pathlib import Path

from .common.arguments import (
    NOT_RECORDED,
    CommaLists,
    DataArguments,
    LoopArguments,
    answer_early,
    command,
    parse_arguments,
)


@dataclass(kw_only=True)
class EnergyArguments(LoopArguments, DataArguments, CommaLists):
    base: str = field(metadata={"help": "folder or repo of the denoiser (or of a whole EDLM)"})
    lora_r: int = field(default=0, metadata={"help": "rank of LoRA over the denoiser's own blocks; 0: train a copy"})
    lora_alpha: float = field(default=0.0, metadata={"help": "the adapter's scale is lora_alpha / lora_r; 0: 2 lora_r"})
    lora_dropout: float = 0.0
    init_from: str = field(
        default="", metadata={"help": "start from this energy or adapter, of the same form, in place of the denoiser"}
    )
    head_only: bool = field(default=False, metadata={"help": "train the head over the denoiser's blocks alone"})
    loss: str = field(
        default="nce", metadata={"help": "nce, as published; ranking: the sampler's bound with num_negatives + 1"}
    )
    num_negatives: int = field(default=1, metadata={"help": "proposals that each text is told from"})
    energy_target: str = field(default="x0", metadata={"help": "x0: full candidates, as published; xs: the next state"})
    energy_pooling: str = field(default="sum", metadata={"help": "sum over revealed positions, or mean, as published"})
    energy_num_layers: int = field(
        default=0, metadata={"help": "first blocks of the denoiser that the energy has; 0: half for xs, all for x0"}
    )
    dropout: float = 0.0
    eval_blocks: int = field(default=64, metadata={"help": "validation blocks of the evaluations on the way"})
    final_eval_blocks: int = field(default=256, metadata={"help": "validation blocks of the last evaluation"})
    eval_num_steps: str = field(default="4,16", metadata={"help": "steps of the sampler whose bound is measured last"})
    eval_sequences: int = field(default=64, metadata={"help": "held-out texts for that bound; 0: leave it out"})

    def __post_init__(self):
        super().__post_init__()
        self.check_data()
        if self.eval_sequences == 1:
            raise ValueError("eval_sequences must be 0, or at least 2 for an error, got 1")
        for name in ("lora_r", "lora_alpha", "eval_sequences", "energy_num_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.num_negatives < 1:
            raise ValueError(f"num_negatives must be at least 1, got {self.num_negatives}")
        if self.head_only and self.lora_r:
            raise ValueError(f"head_only trains no adapter: leave lora_r at 0, got {self.lora_r}")
        if self.eval_sequences and not self.listed("eval_num_steps", int):
            raise ValueError(f"eval_num_steps must be numbers with commas between, got {self.eval_num_steps!r}")
        from .common.contrast import LOSSES  # with torch, so checked last

        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {tuple(LOSSES)}, got {self.loss!r}")

    @property
    def is_adapter(self) -> bool:
        return self.head_only or self.lora_r > 0

    def command(self) -> str:
        return command("train_energy", self, NOT_RECORDED | {"output_dir"})


if __name__ == "__main__":
    answer_early(EnergyArguments, __doc__)

import torch
from transformers import AutoTokenizer

from modeling_edlm import EDLMEnergyModel, EDLMForMaskedLM
from modeling_edlm.adapter import (
    ENERGY_FIELDS,
    add_lora,
    checksum,
    energy_fields,
    fill_adapter,
    find_adapter,
    save_adapter,
)

from .common.contrast import LOSSES, accuracy, draw_contrast, energies
from .common.energy_quality import held_out, plot, sampler_gains
from .common.loop import compile_blocks, global_rows, make_accelerator, step_seed, train
from .common.results import read_lines, write_json, write_whole
from .pretrain import Blocks, take_weights

CARD = """---
library_name: peft
base_model: {base}
pipeline_tag: text-generation
tags:
- edlm
- lora
- masked-diffusion
- energy-based-model
---
# An energy for {base}

A LoRA adapter over the blocks of a masked diffusion model: it chooses among the model's own proposals (EDLM,
[arXiv 2410.21357](https://arxiv.org/abs/2410.21357)). The model itself stays as it is.

```python
import modeling_edlm  # or trust_remote_code=True with AutoModel, where the code stands beside the base's weights
model = modeling_edlm.EDLMModel.from_pretrained("{base}").load_energy("this folder or repo")
ids = model.generate(batch_size=4, num_steps=8, num_candidates=8, energy_window=(1.0, 0.0), seed=0)
```

Energy of {target}; {trainable} trained parameters; {steps} steps.
Loss: {loss}. Trained by

```
{command}
```
"""


def new_energy(arguments: EnergyArguments, denoiser: EDLMForMaskedLM):
    """The energy to be trained: an adapter over the denoiser, or a copy of its blocks."""
    torch.manual_seed(arguments.seed)
    all_blocks = denoiser.config.num_hidden_layers
    # half of them gain as much on a next state (docs/results-wiki27.md, "The light energy")
    default = None if arguments.energy_target == "x0" else -(-all_blocks // 2)
    energy = EDLMEnergyModel.from_denoiser(
        denoiser,
        share_weights=arguments.is_adapter,
        energy_target=arguments.energy_target,
        energy_pooling=arguments.energy_pooling,
        energy_num_layers=arguments.energy_num_layers or default,
        dropout=arguments.dropout,
    )
    if not arguments.is_adapter:
        if arguments.init_from:
            start = EDLMEnergyModel.from_pretrained(arguments.init_from, dtype=torch.float32)
            check_form(arguments.init_from, vars(start.config), energy)
            take_weights(energy, start, arguments.init_from)
        return energy
    model = add_lora(energy, arguments.lora_r, arguments.lora_alpha or None, arguments.lora_dropout)
    if arguments.init_from:
        if (folder := find_adapter(arguments.init_from)) is None:
            raise ValueError(
                f"init_from must be an adapter where lora_r or head_only is given, {arguments.init_from!r}"
            )
        check_form(arguments.init_from, energy_fields(folder, denoiser), energy)
        fill_adapter(model, folder)
    return model


def check_form(init_from: str, fields: dict, energy: EDLMEnergyModel) -> None:
    """Raises ValueError unless an energy with these fields of its configuration can be gone on with."""
    for name in ENERGY_FIELDS:
        if fields[name] != (ours := getattr(energy.config, name)):
            raise ValueError(f"init_from={init_from!r} has {name}={fields[name]!r}, this energy has {ours!r}")


def main(argv: list[str] | None = None):
    arguments = parse_arguments(EnergyArguments, __doc__, argv)
    accelerator = make_accelerator(arguments)
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    # float32 whatever the folder holds: an average of bfloat16 weights would stand still
    denoiser = EDLMForMaskedLM.from_pretrained(arguments.base, dtype=torch.float32).to(accelerator.device)
    denoiser.eval().requires_grad_(False)
    if len(tokenizer) != denoiser.config.vocab_size:
        raise ValueError(f"base has vocab_size {denoiser.config.vocab_size}, its tokenizer has {len(tokenizer)} tokens")
    model = new_energy(arguments, denoiser)
    if arguments.compile:
        compile_blocks(denoiser, but_last=True)
        compile_blocks(model, but_last=True)
    blocks = Blocks(arguments, tokenizer, denoiser.config.max_position_embeddings, accelerator)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    accelerator.print(f"energy: {trainable:,} trained of {sum(p.numel() for p in model.parameters()):,} parameters")
    out_dir = Path(arguments.output_dir)
    base_checksum = checksum(denoiser)

    def loss_fn(model, step, micro_step):
        x0_BL = blocks.batch(step, micro_step)
        rows_B, num_rows = global_rows(arguments, accelerator, micro_step)
        seed = step_seed(arguments.seed, step)
        with accelerator.autocast():
            texts = draw_contrast(
                denoiser, x0_BL, rows_B, num_rows, seed, arguments.energy_target, arguments.num_negatives
            )
            data_B, proposal_BJ = energies(model, *texts)
        correct = accuracy(data_B.detach(), proposal_BJ.detach(), arguments.loss).mean()
        return LOSSES[arguments.loss](data_B, proposal_BJ), {
            "accuracy": correct,
            "tokens": num_rows * x0_BL.shape[1],
        }

    def evaluate(model, is_last):
        num_blocks = min(arguments.final_eval_blocks if is_last else arguments.eval_blocks, len(blocks.validation))
        quality = held_out(model, denoiser, blocks, num_blocks, arguments, accelerator)
        if is_last:
            if arguments.eval_sequences:
                quality["gains"] = sampler_gains(model, denoiser, blocks, arguments, accelerator)
            if accelerator.is_main_process:
                write_json(out_dir / "evaluation.json", {"command": arguments.command()} | quality)
                curve = read_lines(out_dir / "metrics.jsonl")
                write_whole(out_dir / "evaluation.png", lambda path: plot(quality, curve, path))
                accelerator.print(f"\nevaluation: {out_dir / 'evaluation.json'}, .png")
        gains = {f"gain_T{row['num_steps']}": row["bits_per_token"] for row in quality.get("gains", [])}
        by_t = {f"{k}_t<={row['t']:g}": row[k] for row in quality["by_t"] for k in ("accuracy", "nce_loss", "ess")}
        return quality["all"] | by_t | gains

    def save(model, weights, folder):
        if not arguments.is_adapter:
            model.save_pretrained(folder, state_dict=weights)
            tokenizer.save_pretrained(folder)
            return
        save_adapter(folder, model, denoiser, arguments.base, weights)
        card = CARD.format(
            base=arguments.base,
            target="the next state" if arguments.energy_target == "xs" else "full candidates",
            trainable=f"{trainable:,}",
            steps=f"{'at most ' if arguments.patience else ''}{arguments.max_steps}",
            loss=f"{arguments.loss}, {arguments.num_negatives} negatives",
            command=arguments.command(),
        )
        (folder / "README.md").write_text(card, encoding="utf-8")

    identity = {"text": blocks.fingerprint, "base": base_checksum}
    train(arguments, model, loss_fn, evaluate, save, accelerator, identity, blocks.batch, "validation_accuracy")
    if checksum(denoiser) != base_checksum:
        raise RuntimeError("the denoiser has changed while its energy was trained")


if __name__ == "__main__":
    main()
