"""Fine-tune an energy by noise contrastive estimation (EDLM, arXiv 2410.21357).

    python -m training.train_energy --base runs/denoiser/model --data FOLDER --output_dir runs/energy

The data are told from what the denoiser, frozen and in eval mode, proposes for the same masked text. The energy starts
from the denoiser's blocks. Negatives are drawn by the sampler's own code.

Shapes: B batch, K candidates, L length.
"""

import math
from dataclasses import dataclass, field

import torch
from transformers import AutoTokenizer

from modeling_edlm import EDLMEnergyModel, EDLMForMaskedLM
from modeling_edlm.energy import nce_loss
from modeling_edlm.schedule import antithetic_times, q_sample

from .pretrain import Blocks, DataArguments
from .trainer import LoopArguments, fingerprint, make_accelerator, parse_arguments, step_seed, train

NUM_BUCKETS = 5  # of t, in the evaluation


@dataclass(kw_only=True)
class EnergyArguments(LoopArguments, DataArguments):
    base: str = field(metadata={"help": "folder or repo of the denoiser (or of a whole EDLM)"})
    energy_target: str = field(default="x0", metadata={"help": "x0: full candidates, as published; xs: the next state"})
    energy_pooling: str = field(default="sum", metadata={"help": "sum over revealed positions, or mean, as published"})
    energy_num_layers: int = field(default=0, metadata={"help": "keep the denoiser's first blocks only; 0: all"})
    dropout: float = 0.0


def contrast(denoiser, x0_BL: torch.Tensor, t_B: torch.Tensor, s_B: torch.Tensor | None):
    """The data and a proposal for the same masked text.

    Args:
        x0_BL: data. t_B: times of xt. s_B: times of the next state for a step energy, None for energies of x0.
    Returns:
        positive, negative, xt: (B, L) each.
    Raises:
        ValueError: the denoiser is in training mode, where dropout would spoil the proposal.
    """
    if any(module.training for module in denoiser.modules()):
        raise ValueError("denoiser must be in eval mode: dropout would change the proposal")
    mask = denoiser.config.mask_token_id
    u_BL = torch.rand(x0_BL.shape, device=x0_BL.device)
    xt_BL = q_sample(x0_BL, t_B, u_BL, mask)
    # the same uniforms: what is clean at t is clean at s < t too
    positive_BL = x0_BL if s_B is None else q_sample(x0_BL, s_B, u_BL, mask)
    filled_BL = (xt_BL == mask) & (positive_BL != mask)
    seed = int(torch.randint(2**62, ()))
    x_BKL, _ = denoiser.propose(xt_BL, filled_BL.cpu(), num_candidates=1, seed=seed, t=t_B)
    return positive_BL, x_BKL[:, 0], xt_BL


def draw_times(batch_size: int, target: str, device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stratified t (B,), and for a step energy the s (B,) of a sampler with T steps, T log-uniform in [2, 128]."""
    t_B = antithetic_times(torch.rand((), device=device), batch_size)
    t_B = t_B[torch.randperm(batch_size, device=device)].clamp(min=1e-3)
    if target == "x0":
        return t_B, None
    num_steps_B = torch.exp2(1 + 6 * torch.rand(batch_size, device=device)).round()
    t_B = (t_B * num_steps_B).ceil() / num_steps_B
    return t_B, (t_B - 1 / num_steps_B).clamp(min=0)


def energies(model, positive_BL, negative_BL, xt_BL, t_B, s_B) -> tuple[torch.Tensor, torch.Tensor]:
    """E of the data and of the proposal, (B,) each, from one forward pass."""
    time_B = t_B if s_B is None else s_B
    both = model(torch.cat((positive_BL, negative_BL)), xt=xt_BL.repeat(2, 1), t=time_B.repeat(2)).logits[:, 0]
    return both.chunk(2)


def accuracy(data_B: torch.Tensor, proposal_B: torch.Tensor) -> torch.Tensor:
    """(B,) share of the pair that the sign of the energy gets right; an energy of exactly zero is half right."""
    return 0.5 + (proposal_B.sign() - data_B.sign()) / 4


def main(argv: list[str] | None = None):
    arguments = parse_arguments(EnergyArguments, __doc__, argv)
    accelerator = make_accelerator(arguments)
    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    # float32 whatever the folder holds: an average of bfloat16 weights would stand still
    denoiser = EDLMForMaskedLM.from_pretrained(arguments.base, dtype=torch.float32).to(accelerator.device)
    denoiser.eval().requires_grad_(False)
    if len(tokenizer) != denoiser.config.vocab_size:
        raise ValueError(f"base has vocab_size {denoiser.config.vocab_size}, its tokenizer has {len(tokenizer)} tokens")
    torch.manual_seed(arguments.seed)
    model = EDLMEnergyModel.from_denoiser(
        denoiser,
        energy_target=arguments.energy_target,
        energy_pooling=arguments.energy_pooling,
        energy_num_layers=arguments.energy_num_layers or None,
        dropout=arguments.dropout,
    )
    blocks = Blocks(arguments, tokenizer, denoiser.config.max_position_embeddings, accelerator)
    accelerator.print(f"energy: {sum(p.numel() for p in model.parameters()):,} parameters")

    def loss_fn(model, step, micro_step):
        x0_BL = blocks.batch(step, micro_step)
        times = draw_times(len(x0_BL), arguments.energy_target, x0_BL.device)
        with accelerator.autocast():
            data_B, proposal_B = energies(model, *contrast(denoiser, x0_BL, *times), *times)
        correct = accuracy(data_B, proposal_B).mean()
        tokens = x0_BL.numel() * arguments.gradient_accumulation_steps * accelerator.num_processes
        return nce_loss(data_B, proposal_B), {"accuracy": correct, "tokens": tokens}

    def evaluate(model, is_last):
        """NCE loss and accuracy on held-out text, over all t and by bucket of t; chance is 1.386 and 0.5."""
        num_blocks = arguments.final_eval_blocks if is_last else arguments.eval_blocks
        all_times, data, proposal = [], [], []
        with torch.random.fork_rng():
            torch.manual_seed(step_seed(0, num_blocks))
            for x0_BL, _ in blocks.validation_batches(num_blocks):
                times = draw_times(len(x0_BL), arguments.energy_target, x0_BL.device)
                with accelerator.autocast():
                    data_B, proposal_B = energies(model, *contrast(denoiser, x0_BL, *times), *times)
                for total, part in ((all_times, times[0]), (data, data_B), (proposal, proposal_B)):
                    total.append(part.float().cpu())
        t_N, data_N, proposal_N = map(torch.cat, (all_times, data, proposal))
        row = {"validation_nce_loss": float(nce_loss(data_N, proposal_N)), "chance": 2 * math.log(2)}
        correct_N = accuracy(data_N, proposal_N)
        row |= {"validation_accuracy": float(correct_N.mean()), "validation_blocks": len(t_N)}
        row |= {"energy_of_data": float(data_N.mean()), "energy_of_proposals": float(proposal_N.mean())}
        bucket_N = (t_N * NUM_BUCKETS).ceil().clamp(min=1) - 1
        for bucket in range(NUM_BUCKETS):
            if (chosen_N := bucket_N == bucket).any():
                row[f"accuracy_t<={(bucket + 1) / NUM_BUCKETS:g}"] = float(correct_N[chosen_N].mean())
        return row

    def save(model, folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    identity = {"text": blocks.fingerprint, "base": fingerprint(list(denoiser.state_dict().values()))}
    train(arguments, model, loss_fn, evaluate, save, accelerator, identity)


if __name__ == "__main__":
    main()
