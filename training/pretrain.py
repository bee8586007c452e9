"""Train a denoiser (masked diffusion) or an autoregressive model of the same blocks on text.

    python -m training.pretrain --objective mdlm --data FOLDER --tokenizer FOLDER --output_dir runs/denoiser

The saved model, `output_dir/model`, is the exponential average of the weights. Ctrl-C saves and stops; `--resume true`
goes on to the weights that an uninterrupted run would have had. Several processes: `torchrun` or `accelerate launch`.

Shapes: B batch, L length, M masked positions (flat), V vocabulary.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from .common.arguments import DataArguments, LoopArguments, answer_early, names_files, parse_arguments


@dataclass(kw_only=True)
class PretrainArguments(LoopArguments, DataArguments):
    objective: str = field(default="mdlm", metadata={"help": "mdlm: a denoiser; ar: an autoregressive model"})
    tokenizer: str = field(metadata={"help": "folder or repo of the tokenizer; it needs a mask token"})
    length: int = field(default=256, metadata={"help": "tokens of a block"})
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    cond_dim: int = field(default=0, metadata={"help": "adaptive layer norm of the denoiser; 0: plain layer norm"})
    time_conditioning: bool = False
    prepend_bos: bool = field(default=False, metadata={"help": "the denoiser sees a BOS before every block"})
    dropout: float = 0.0
    init_from: str = field(
        default="", metadata={"help": "start from the weights of this model of the same sizes, mdlm or ar"}
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_data()
        if self.patience:
            raise ValueError(f"patience is for energies, got {self.patience}")
        if self.objective not in ("mdlm", "ar"):
            raise ValueError(f"objective must be mdlm or ar, got {self.objective!r}")


if __name__ == "__main__":
    answer_early(PretrainArguments, __doc__)

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from modeling_edlm import EDLMConfig, EDLMForCausalLM, EDLMForMaskedLM
from modeling_edlm.backbone import log_probs
from modeling_edlm.schedule import antithetic_times, q_sample

from .common.checkpoint import fingerprint
from .common.data import (
    DocumentBlocks,
    PackedTokens,
    StreamedBlocks,
    every_document,
    read_texts,
    step_batch_indices,
    tokenize,
)
from .common.loop import LEAST_TIME, compile_blocks, global_rows, make_accelerator, row_draws, step_seed, train


def mdlm_loss(model, x0_BL: torch.Tensor, t_B: torch.Tensor, u_BL: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """(B,) nats: (1/t) sum over masked positions of -log mu_i(x0_i | xt), the continuous-time bound of MDLM."""
    xt_BL = q_sample(x0_BL, t_B, u_BL, mask_token_id)
    positions_M = (xt_BL == mask_token_id).flatten().nonzero()[:, 0]
    logits_MV = model(xt_BL, t=t_B, positions=positions_M).logits
    log_p_M = log_probs(logits_MV, mask_token_id).gather(-1, x0_BL.flatten()[positions_M, None])[:, 0]
    rows_M = positions_M // x0_BL.shape[1]
    return log_p_M.new_zeros(len(t_B)).index_add_(0, rows_M, -log_p_M / t_B[rows_M])


def mdlm_training_loss(model, x0_BL, q_B: torch.Tensor, u_BL: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """(B,) nats: the same bound from uniforms q, at t = q^2 and weighted by dt/dq.

    Rows of small t hold few masked positions, each with the large weight 1/t. Drawn more often and weighted less, they
    leave less noise in the gradient. The bound does not depend on the schedule (MDLM, arXiv 2406.07524).
    """
    t_B = q_B.square().clamp(min=LEAST_TIME)
    return 2 * q_B * mdlm_loss(model, x0_BL, t_B, u_BL, mask_token_id)


def ar_loss(model, x0_BL: torch.Tensor, bos_token_id: int, mask_token_id: int) -> torch.Tensor:
    """(B, L) nats: -log p_AR(x0_i | bos, x0_{<i})."""
    bos_B1 = torch.full_like(x0_BL[:, :1], bos_token_id)
    logits_BLV = model(torch.cat((bos_B1, x0_BL[:, :-1]), dim=1)).logits
    return -log_probs(logits_BLV, mask_token_id).gather(-1, x0_BL[..., None])[..., 0]


def load_trained(path: str) -> EDLMForMaskedLM | EDLMForCausalLM:
    """A denoiser or an autoregressive model, whichever the folder or repo holds."""
    names = AutoConfig.from_pretrained(path).architectures or []
    return (EDLMForCausalLM if "EDLMForCausalLM" in names else EDLMForMaskedLM).from_pretrained(path)


def take_weights(model: torch.nn.Module, start: torch.nn.Module, init_from: str) -> None:
    """Give a model the weights of another; ValueError where its sizes are others."""
    try:
        model.load_state_dict(start.state_dict())
    except RuntimeError as error:
        raise ValueError(f"init_from={init_from!r} has other sizes: {error}") from error


class Blocks:
    """Training and validation blocks, and the batch of any step of this process.

    `train` is a `PackedTokens`, with `align_documents` a `DocumentBlocks`, or with `streaming` a `StreamedBlocks`,
    which has no length. `fingerprint` is a hash of the training tokens, or with `streaming` of what they are made from.
    """

    def __init__(self, arguments: DataArguments, tokenizer: PreTrainedTokenizerFast, length: int, accelerator):
        cache_dir = arguments.cache_dir or Path(arguments.output_dir) / "tokens"
        validation = arguments.validation_data or arguments.data
        split = "train" if arguments.validation_data and names_files(validation) else "validation"
        if not arguments.validation_data and names_files(validation):
            raise ValueError(f"validation_data must be given when data is one file or a pattern, {arguments.data}")
        if arguments.streaming and (arguments.align_documents or arguments.document_stride > 1):
            raise ValueError("align_documents and document_stride need the text at hand: leave streaming out")

        def cut(tokens):
            aligned = arguments.align_documents
            return DocumentBlocks(tokens, length, tokenizer.eos_token_id) if aligned else PackedTokens(tokens, length)

        with accelerator.main_process_first():  # the others read what the first has written
            if arguments.streaming:
                self.train = StreamedBlocks(
                    arguments.data,
                    tokenizer,
                    length,
                    arguments.seed,
                    arguments.shuffle_buffer,
                    text_column=arguments.text_column,
                )
                self.fingerprint = self.train.fingerprint
                try:  # first as a stream: a Hub data set would be downloaded before it shows to lack the split
                    read_texts(validation, split, arguments.text_column, streaming=True)
                except (FileNotFoundError, ValueError) as error:
                    value = arguments.validation_data
                    raise ValueError(f"validation_data={value!r} gives no validation text: {error}") from error
            else:
                tokens = tokenize(arguments.data, tokenizer, cache_dir, "train", arguments.text_column)
                if arguments.document_stride > 1:
                    tokens = every_document(tokens, tokenizer.eos_token_id, arguments.document_stride)
                self.train, self.fingerprint = cut(tokens), fingerprint(tokens)
            validation_tokens = tokenize(validation, tokenizer, cache_dir, split, arguments.text_column)
        self.validation = cut(validation_tokens)
        if len(self.validation) < 2:
            raise ValueError(f"validation_data must make 2 blocks of length {length} or more, for an error, got 1")
        self.arguments, self.accelerator, self.tokenizer = arguments, accelerator, tokenizer
        self.step, self.step_batches = -1, {}

    def batch(self, step: int, micro_step: int) -> torch.Tensor:
        """(B, L) int64 on the device: a function of the seed, the step and the process."""
        arguments, accelerator = self.arguments, self.accelerator
        batch_size, number = arguments.batch_size, step * arguments.gradient_accumulation_steps + micro_step
        process = accelerator.process_index, accelerator.num_processes
        if arguments.streaming:
            if step != self.step:
                self.step, self.step_batches = step, {}
            if micro_step not in self.step_batches:  # kept for the step: what is past is read from the beginning
                self.step_batches[micro_step] = self.train.batch(batch_size, number, *process)
            return self.step_batches[micro_step].to(accelerator.device)
        indices = step_batch_indices(len(self.train), batch_size, number, arguments.seed, *process)
        return self.train.blocks(indices).to(accelerator.device)

    def validation_batches(self, num_blocks: int):
        """(B, L) batches of evenly spaced validation blocks, and whether each position counts: no token twice."""
        num_blocks = min(num_blocks, len(self.validation))
        chosen = torch.linspace(0, len(self.validation) - 1, num_blocks).round().long().tolist()
        for start in range(0, num_blocks, self.arguments.batch_size):
            blocks = [self.validation[i] for i in chosen[start : start + self.arguments.batch_size]]
            x0_BL = torch.stack([block["input_ids"] for block in blocks])
            num_new_B = torch.tensor([block["num_new"] for block in blocks])
            counts_BL = torch.arange(x0_BL.shape[1])[None] >= x0_BL.shape[1] - num_new_B[:, None]
            yield x0_BL.to(self.accelerator.device), counts_BL.to(self.accelerator.device)

    def characters(self, x0_BL: torch.Tensor, counts_BL: torch.Tensor) -> int:
        """Characters of the text at the positions that count; special tokens have none."""
        texts = [row[counts] for row, counts in zip(x0_BL.cpu(), counts_BL.cpu(), strict=True)]
        return sum(map(len, self.tokenizer.batch_decode(texts, skip_special_tokens=True)))


@torch.no_grad()
def validation_nll(model, objective: str, blocks: Blocks, num_blocks: int) -> dict[str, float]:
    """Nats and bits per token with the standard error over blocks: exact for ar, the continuous-time bound for mdlm.

    The bound takes one t for each block, stratified over all blocks, from a fixed seed. The last block of the
    validation text is shifted back; for mdlm its repeated tokens count like others (one block in thousands).
    """
    config, nlls, tokens, characters = model.config, [], 0, 0
    num_blocks = min(num_blocks, len(blocks.validation))
    generator = torch.Generator().manual_seed(step_seed(0, num_blocks))
    t_all = antithetic_times(torch.rand((), generator=generator), num_blocks)
    t_all = t_all[torch.randperm(num_blocks, generator=generator)]
    for x0_BL, counts_BL in blocks.validation_batches(num_blocks):
        counted_BL = counts_BL if objective == "ar" else torch.ones_like(counts_BL)
        tokens += int(counted_BL.sum())
        characters += blocks.characters(x0_BL, counted_BL)
        with blocks.accelerator.autocast():
            if objective == "ar":
                nll_BL = ar_loss(model, x0_BL, config.bos_token_id, config.mask_token_id)
                nlls += (nll_BL * counts_BL).sum(-1).tolist()
            else:
                t_B = t_all[len(nlls) :][: len(x0_BL)].to(x0_BL.device)
                u_BL = torch.rand(x0_BL.shape, generator=generator).to(x0_BL.device)
                nlls += mdlm_loss(model, x0_BL, t_B, u_BL, config.mask_token_id).tolist()
    nll_N = torch.tensor(nlls, dtype=torch.float64)
    per_token = len(nlls) / tokens
    nats, stderr = float(nll_N.mean()) * per_token, float(nll_N.std()) / math.sqrt(len(nlls)) * per_token
    return {
        "validation_nll": nats,
        "validation_bits_per_token": nats / math.log(2),
        "validation_bits_per_character": nats / math.log(2) * tokens / max(characters, 1),
        "validation_bits_stderr": stderr / math.log(2),
        "validation_blocks": len(nlls),
    }


def main(argv: list[str] | None = None):
    arguments = parse_arguments(PretrainArguments, __doc__, argv)
    accelerator = make_accelerator(arguments)
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    if tokenizer.mask_token_id is None:
        raise ValueError(f"tokenizer {arguments.tokenizer!r} has no mask token: add one as its last id")
    is_ar = arguments.objective == "ar"
    config = EDLMConfig(
        vocab_size=len(tokenizer),
        mask_token_id=tokenizer.mask_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.num_hidden_layers,
        num_attention_heads=arguments.num_attention_heads,
        cond_dim=0 if is_ar else arguments.cond_dim,
        time_conditioning=not is_ar and arguments.time_conditioning,
        prepend_bos=not is_ar and arguments.prepend_bos,
        dropout=arguments.dropout,
        max_position_embeddings=arguments.length,
    )
    blocks = Blocks(arguments, tokenizer, arguments.length, accelerator)
    torch.manual_seed(arguments.seed)
    model = (EDLMForCausalLM if is_ar else EDLMForMaskedLM)(config)
    if arguments.init_from:
        take_weights(model, load_trained(arguments.init_from), arguments.init_from)
    if arguments.compile:
        compile_blocks(model)
    num_parameters = sum(p.numel() for p in model.parameters())
    num_blocks = "streamed" if arguments.streaming else f"{len(blocks.train):,}"
    accelerator.print(f"{arguments.objective}: {num_parameters:,} parameters, {num_blocks} training blocks")

    def loss_fn(model, step, micro_step):
        x0_BL = blocks.batch(step, micro_step)
        tokens = x0_BL.numel() * arguments.gradient_accumulation_steps * accelerator.num_processes
        with accelerator.autocast():
            if is_ar:
                loss = ar_loss(model, x0_BL, config.bos_token_id, config.mask_token_id).mean()
            else:
                rows_B, num_rows = global_rows(arguments, accelerator, micro_step)
                q_G, u_GL = row_draws(step_seed(arguments.seed, step), num_rows, x0_BL.shape[1])
                q_B, u_BL = q_G[rows_B].to(x0_BL.device), u_GL[rows_B].to(x0_BL.device)
                loss = mdlm_training_loss(model, x0_BL, q_B, u_BL, config.mask_token_id).mean() / x0_BL.shape[1]
        return loss, {"tokens": tokens}

    def evaluate(model, is_last):
        num_blocks = arguments.final_eval_blocks if is_last else arguments.eval_blocks
        return validation_nll(model, arguments.objective, blocks, num_blocks)

    def save(model, weights, folder):
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)

    train(arguments, model, loss_fn, evaluate, save, accelerator, {"text": blocks.fingerprint}, blocks.batch)


if __name__ == "__main__":
    main()
