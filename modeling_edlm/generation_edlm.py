"""generate(): where schedule, denoiser and energy meet (EDLM, arXiv 2410.21357, Algorithm 1).

Shapes: B rows of the output, N rows stepped now, K candidates, L length, M selected positions (flat in N * L).
"""

import copy
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from transformers import GenerationConfig
from transformers.utils import ModelOutput

from .energy import candidate_energies
from .sampler import choose, uniforms
from .schedule import reveal_steps, times

REVEAL, CHOICE = -1, -2  # counters of the draws that belong to no step, and to no position


class EDLMGenerationConfig(GenerationConfig):
    """How to sample.

    Args:
        max_new_tokens, max_length: length of what is generated, or of prompt and result together; give one at most.
        num_return_sequences: samples for each prompt.
        num_steps: denoising steps T.
        num_candidates: candidates k that the energy chooses from; 1 is plain masked diffusion (MDLM).
        energy_window: (hi, lo), the energy acts at steps whose time t lies in [lo, hi]; t=1 is all mask.
        shared_completion: whether the candidates of a step differ only in what the step reveals, and share one draw of
            the rest. An extension of the paper, for energies of x0: no candidate is kept for what is thrown away.
        energy_temperature: tau in the importance weights exp(-E / tau).
        temperature: of the proposal's logits; the proposal so changed is the mu that the energy corrects.
        energy_batch_size: candidates scored in one pass of the energy network; None is all of a step.
        output_history: keep the state after every step.
        return_dict_in_generate: return an `EDLMGenerationOutput` and not just the sequences.

    Raises:
        ValueError: for a value out of range or a name that is not listed here.
    """

    # The many fields of the base class steer autoregressive decoding: none of them is taken over silently, so
    # super().__init__() is not called (as in the library's own diffusion language model).
    def __init__(self, **kwargs):
        self.max_new_tokens = kwargs.pop("max_new_tokens", None)
        self.max_length = kwargs.pop("max_length", None)
        self.num_return_sequences = kwargs.pop("num_return_sequences", 1)
        self.num_steps = kwargs.pop("num_steps", 128)
        self.num_candidates = kwargs.pop("num_candidates", 8)
        self.energy_window = kwargs.pop("energy_window", (1.0, 0.8))
        self.shared_completion = kwargs.pop("shared_completion", False)
        self.energy_temperature = kwargs.pop("energy_temperature", 1.0)
        self.energy_batch_size = kwargs.pop("energy_batch_size", None)
        self.temperature = kwargs.pop("temperature", 1.0)
        self.output_history = kwargs.pop("output_history", False)
        self.return_dict_in_generate = kwargs.pop("return_dict_in_generate", False)
        self.bos_token_id = kwargs.pop("bos_token_id", None)
        self.eos_token_id = kwargs.pop("eos_token_id", None)
        self.pad_token_id = kwargs.pop("pad_token_id", None)
        self.transformers_version = kwargs.pop("transformers_version", None)
        self._from_model_config = None
        for metadata in ("_commit_hash", "_from_model_config"):
            kwargs.pop(metadata, None)
        if kwargs:
            raise ValueError(f"EDLM's generation has no argument {sorted(kwargs)}")
        self.validate()

    def validate(self, **_):
        for name in ("num_steps", "num_candidates", "num_return_sequences"):
            _check_count(name, getattr(self, name))
        for name in ("max_new_tokens", "max_length", "energy_batch_size"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        if self.max_length is not None and self.max_new_tokens is not None:
            raise ValueError(f"give max_length or max_new_tokens, not both: {self.max_length}, {self.max_new_tokens}")
        window = self.energy_window
        if not isinstance(window, list | tuple) or len(window) != 2 or not 1 >= window[0] >= window[1] >= 0:
            raise ValueError(f"energy_window must be (hi, lo) with 1 >= hi >= lo >= 0, got {window}")
        self.energy_window = tuple(window)  # a list in JSON
        if not isinstance(self.shared_completion, bool):
            raise ValueError(f"shared_completion must be true or false, got {self.shared_completion!r}")
        for name in ("energy_temperature", "temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    @classmethod
    def from_model_config(cls, model_config):
        """There are no sampling parameters in a model configuration; the library then takes the defaults."""
        raise NotImplementedError

    def get_generation_mode(self, *args, **kwargs):
        raise NotImplementedError("masked diffusion has none of the autoregressive generation modes")


@dataclass
class EDLMGenerationOutput(ModelOutput):
    """
    Args:
        sequences: (B, L) int64, prompts included.
        nfe, energy_nfe: (B,) int64, forward passes of the denoiser and of the energy spent on each row.
        energies: (B, T) float32, energy of the kept candidate at each step, NaN where no energy acted.
        ess: (B, T) float32, effective sample size of the k importance weights, NaN likewise.
        history: T + 1 states (B, L), from the start to `sequences`, with `output_history=True`.
    """

    sequences: torch.LongTensor
    nfe: torch.LongTensor | None = None
    energy_nfe: torch.LongTensor | None = None
    energies: torch.FloatTensor | None = None
    ess: torch.FloatTensor | None = None
    history: tuple[torch.LongTensor, ...] | None = None


class EDLMGenerationMixin:
    """`generate()` for a class with a `denoiser`, an `energy_type` and, unless that is "none", an `energy`."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        generation_config: EDLMGenerationConfig | None = None,
        *,
        batch_size: int = 1,
        first_row: int = 0,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        callback_on_step_end: Callable | None = None,
        **kwargs,
    ) -> EDLMGenerationOutput | torch.LongTensor:
        """Sample text: unconditional, after a prompt, or in place of the mask tokens of `input_ids`.

        Args:
            input_ids: (B, L) prompts; tokens that are given never change. None: `batch_size` free samples.
            attention_mask: (B, L), 0 for padding on the left of shorter prompts.
            generation_config: default `self.generation_config`; keyword arguments change single fields of it.
            first_row: number of the first row, where this batch is one part of a larger one.
            seed: fixes each row by its number, whatever the batch. generator: a seed is drawn from it instead.
            callback_on_step_end: called as `(model, step, t, {"sequences": (B, L)})` after every step; the tensor is
                the canvas itself, so clone what is to be kept.
        Returns:
            sequences (B * num_return_sequences, L), or an `EDLMGenerationOutput`.
        Raises:
            ValueError: an argument that does not exist or does not fit, named with its value.
            FloatingPointError: a network gave NaN, or no candidate of a row a finite energy.
        """
        config = self._prepare_config(generation_config, kwargs)
        _check_count("batch_size", batch_size)
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
            raise ValueError(f"seed must be an integer, got {seed!r}")
        if seed is not None and generator is not None:
            raise ValueError(f"give seed or generator, not both: got seed={seed} and {generator}")
        if seed is None:
            seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator and generator.device))
        xt_BL, attention_mask = self._canvas(input_ids, attention_mask, config, batch_size)
        with in_eval_mode(self):
            output = self._denoise(xt_BL, attention_mask, config, seed, first_row, callback_on_step_end)
        return output if config.return_dict_in_generate else output.sequences

    def _denoise(self, xt_BL, attention_mask, config, seed, first_row, callback) -> EDLMGenerationOutput:
        """The sampling loop. What is revealed when is drawn first, on the CPU: it depends on no token value."""
        (B, L), T, K, device = xt_BL.shape, config.num_steps, config.num_candidates, xt_BL.device
        u_BL = uniforms(seed, torch.arange(first_row, first_row + B)[:, None], REVEAL, torch.arange(L), 0)
        free_BL = (xt_BL == self.config.mask_token_id) & (True if attention_mask is None else attention_mask.bool())
        reveal_BL = torch.where(free_BL.cpu(), reveal_steps(u_BL, T), -1)  # -1: given, never touched
        nfe_B, energy_nfe_B = torch.zeros(2, B, dtype=torch.int64)
        energies_BT, ess_BT = torch.full((2, B, T), float("nan"), device=device)
        health = Health(T, device)
        history = [xt_BL.clone()]
        hi, lo = config.energy_window

        for step, (t, s) in enumerate(pairwise(times(T).tolist())):
            rows_N = (reveal_BL == step).any(-1).nonzero()[:, 0]
            if len(rows_N):  # a row in which nothing is revealed costs nothing
                now_NL, masked_NL = reveal_BL[rows_N] == step, reveal_BL[rows_N] >= step
                mask_NL = None if attention_mask is None else attention_mask[rows_N.to(device)]
                state = State(xt_BL[rows_N.to(device)], mask_NL, rows_N + first_row, step, t, s, seed, health)
                if K > 1 and self.energy_type != "none" and lo - 1e-9 <= t <= hi + 1e-9:
                    x_NL, energy_N, ess_N = self._resample(state, now_NL, masked_NL, config)
                    energies_BT[rows_N, step], ess_BT[rows_N, step] = energy_N, ess_N
                    energy_nfe_B[rows_N] += K
                else:
                    x_NL = self._propose(state, now_NL, 1, config.temperature)[0][:, 0]
                xt_BL[rows_N.to(device)] = torch.where(now_NL.to(device), x_NL, state.xt_NL)
                nfe_B[rows_N] += 1
            if config.output_history:
                history.append(xt_BL.clone())
            if callback is not None:
                callback(self, step, t, {"sequences": xt_BL})

        health.check()
        history = tuple(history) if config.output_history else None
        return EDLMGenerationOutput(xt_BL, nfe_B.to(device), energy_nfe_B.to(device), energies_BT, ess_BT, history)

    def _resample(self, state: "State", now_NL, masked_NL, config):
        """Keep one of K candidates: x (N, L), its energy (N,) and the effective sample size (N,)."""
        is_x0 = self.config.energy_target == "x0"  # a step energy sees only what this step reveals
        varied_NL = now_NL if config.shared_completion else None
        x_NKL, log_mu_NK = self._propose(
            state, masked_NL if is_x0 else now_NL, config.num_candidates, config.temperature, varied_NL
        )
        energy_NK = candidate_energies(
            self.energy,
            x_NKL,
            state.xt_NL,
            state.t if is_x0 else state.s,
            log_mu_NK,
            state.attention_mask,
            config.energy_batch_size,
        )
        rows_N = state.rows_N.to(x_NKL.device)
        choice_N, ess_N = choose(
            energy_NK, config.energy_temperature, uniforms(state.seed, rows_N, state.step, CHOICE, 0)
        )
        state.health.note("energies", energy_NK.isnan().any() | ess_N.isnan().any(), state.step)
        n = torch.arange(len(x_NKL), device=x_NKL.device)
        return x_NKL[n, choice_N], energy_NK[n, choice_N], ess_N

    def _propose(self, state: "State", where_NL: torch.Tensor, K: int, temperature: float, varied_NL=None):
        counters = state.seed, state.rows_N, state.step
        x_NKL, log_mu_NK = self.denoiser.propose(
            state.xt_NL, where_NL, K, *counters, state.t, state.attention_mask, temperature, varied_NL
        )
        state.health.note("logits", log_mu_NK.isnan().any(), state.step)
        return x_NKL, log_mu_NK

    def _prepare_config(self, generation_config, changes: dict) -> EDLMGenerationConfig:
        config = copy.deepcopy(self.generation_config if generation_config is None else generation_config)
        if not isinstance(config, EDLMGenerationConfig):
            raise ValueError(f"generation_config must be an EDLMGenerationConfig, got {type(config).__name__}")
        if changes.get("max_length") or changes.get("max_new_tokens"):  # the caller's wish beats either default
            config.max_length = config.max_new_tokens = None
        allowed = config.__dict__.keys() - {"transformers_version", "bos_token_id", "eos_token_id", "pad_token_id"}
        if unknown := sorted(name for name in changes if name not in allowed or name.startswith("_")):
            raise ValueError(f"generate() has no argument {unknown}")
        config.__dict__.update(changes)
        config.validate()
        return config

    def _canvas(self, input_ids, attention_mask, config, batch_size):
        """The start: prompts, then masks up to the length; and the attention mask, None without padding."""
        longest, mask = self.config.max_position_embeddings, self.config.mask_token_id
        if input_ids is None:
            if attention_mask is not None:
                raise ValueError("attention_mask needs input_ids, got None")
            input_ids = torch.empty(batch_size, 0, dtype=torch.int64, device=self.device)
        else:
            check_prompt(input_ids, self.config.vocab_size)
            if batch_size != 1:
                raise ValueError(f"batch_size counts free samples; with input_ids leave it at 1, got {batch_size}")
            input_ids = input_ids.long()
            if attention_mask is not None:
                attention_mask = check_attention_mask(attention_mask, input_ids)
        B, prompt_length = input_ids.shape
        gaps_BL = input_ids == mask
        fills_gaps = bool((gaps_BL if attention_mask is None else gaps_BL & attention_mask.bool()).any())
        if config.max_new_tokens is not None:
            length = prompt_length + config.max_new_tokens
        else:
            length = config.max_length or (prompt_length if fills_gaps else longest)
        if prompt_length > length:
            raise ValueError(f"input_ids has {prompt_length} tokens, more than max_length={length}")
        if length > longest:
            raise ValueError(
                f"input_ids ({prompt_length} tokens) and max_new_tokens={config.max_new_tokens}, "
                f"max_length={config.max_length} make {length} tokens, more than max_position_embeddings={longest}"
            )
        new_BL = input_ids.new_full((B, length - prompt_length), mask)
        xt_BL = torch.cat((input_ids, new_BL), dim=1).to(self.device)
        if attention_mask is not None:
            attention_mask = torch.cat((attention_mask.to(new_BL.device), torch.ones_like(new_BL)), dim=1)
            attention_mask = attention_mask.repeat_interleave(config.num_return_sequences, dim=0).to(self.device)
            attention_mask = None if attention_mask.all() else attention_mask  # nothing is padded: nothing to mask
        return xt_BL.repeat_interleave(config.num_return_sequences, dim=0), attention_mask

    def adjust_generation_fn(
        self,
        generation_config,
        from_auto_class,
        from_pipeline,
        pretrained_model_name_or_path,
        cache_dir,
        force_download,
        proxies,
        local_files_only,
        token,
        revision,
        subfolder,
        trust_remote_code,
        **kwargs,
    ):
        """Called by `from_pretrained`: the checkpoint's generation_config.json, else the defaults."""
        if generation_config is not None:
            self.generation_config = self.generation_config_class.from_dict(generation_config.to_dict())
            return
        try:
            self.generation_config = self.generation_config_class.from_pretrained(
                pretrained_model_name_or_path,
                cache_dir=cache_dir,
                force_download=force_download,
                proxies=proxies,
                local_files_only=local_files_only,
                token=token,
                revision=revision,
                subfolder=subfolder,
                **kwargs,
            )
        except OSError as error:  # the checkpoint has no such file
            if "JSON" in str(error):  # it has one, but damaged: the defaults would be a silent change of the sampler
                raise
            self.generation_config = self.generation_config_class()


@dataclass
class State:
    """The rows stepped now: xt and attention mask (N, L), their numbers (N,), step, times t > s, seed."""

    xt_NL: torch.Tensor
    attention_mask: torch.Tensor | None
    rows_N: torch.Tensor
    step: int
    t: float
    s: float
    seed: int
    health: "Health"


class Health:
    """The first step at which something was NaN, kept on the device and read once, at the end."""

    def __init__(self, num_steps: int, device: torch.device):
        self.num_steps = num_steps
        self.first = {name: torch.tensor(num_steps, device=device) for name in ("logits", "energies")}

    def note(self, name: str, is_bad: torch.Tensor, step: int) -> None:
        self.first[name] = torch.where(is_bad, self.first[name].clamp(max=step), self.first[name])

    def check(self) -> None:
        for name, step in self.first.items():
            if (step := int(step)) < self.num_steps:
                what = "NaN" if name == "logits" else "NaN, or no finite value for any candidate of a row"
                raise FloatingPointError(f"{name} hold {what}, first at step {step} of {self.num_steps}")


@contextmanager
def in_eval_mode(model: torch.nn.Module):
    """Dropout off, and every module's own flag back at the end."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check_count(name: str, value) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def check_prompt(input_ids: torch.Tensor, vocab_size: int) -> None:
    """Raises ValueError unless these are token ids, (B, L) and not empty."""
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        shape = tuple(input_ids.shape) if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids must be an integer tensor (B, L), got {shape}")
    if input_ids.numel() == 0:
        raise ValueError(f"input_ids is empty, shape {tuple(input_ids.shape)}; leave it out to sample freely")
    outside = (input_ids < 0) | (input_ids >= vocab_size)
    if outside.any():
        raise ValueError(f"input_ids must lie in [0, vocab_size={vocab_size}), got {int(input_ids[outside][0])}")


def check_attention_mask(attention_mask: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """The mask as int64, if it pads on the left; ValueError if not."""
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids has {tuple(input_ids.shape)}"
        )
    attention_mask = attention_mask.long()
    if ((attention_mask != 0) & (attention_mask != 1)).any() or (attention_mask.diff(dim=1) < 0).any():
        raise ValueError("attention_mask must be 0 for padding on the left and 1 after it")
    if (attention_mask.sum(-1) == 0).any():
        raise ValueError("attention_mask leaves an empty prompt: a row of zeros")
    return attention_mask
