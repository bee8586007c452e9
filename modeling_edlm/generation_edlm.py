"""generate() and revise(): arguments, the canvas, and who looks on while the sampler works (EDLM, arXiv 2410.21357).

Shapes: B rows of the output, N rows stepped now, K candidates, L length, T steps, V vocabulary, M selected positions
(flat in N * L).
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from .backbone import compiled, fixed_weights
from .checks import (
    MOST,
    check_attention_mask,
    check_count,
    check_prompt,
    check_size,
    choose_seed,
    described,
    is_number,
)
from .draws import uniforms
from .energies import Energy
from .proposal import ORDERS
from .sampler import LogitsProcess, Run, denoise, functions, in_eval_mode, revise

REVISE = -4  # of the seed of `revise()`: what it draws has nothing to do with how the text was made
SETS = ("random", "contiguous")  # of positions that a round of the corrector masks
# arguments of other samplers, and what they are called here; None: there is no such thing
PEERS = {
    **dict.fromkeys(("steps", "diffusion_steps", "num_inference_steps", "timesteps", "sampling_steps"), "num_steps"),
    **dict.fromkeys(("gen_length", "answer_length", "max_gen_length"), "max_new_tokens"),
    **dict.fromkeys(("remasking", "alg", "remasking_strategy"), f"order, of {', '.join(ORDERS)}"),
    **dict.fromkeys(("threshold", "conf_threshold"), "confidence_threshold, with order='confidence'"),
    "block_size": "block_length",
    "num_samples": "batch_size, or num_return_sequences with a prompt",
    **dict.fromkeys(("alg_temp", "cfg_scale", "guidance_scale", "negative_prompt_ids"), None),
}


class EDLMGenerationConfig(GenerationConfig):
    """How to sample.

    Args:
        max_new_tokens, max_length: length of what is generated, or of prompt and result together; give one at most.
        num_return_sequences: samples for each prompt.
        num_steps: denoising steps T.
        num_candidates: candidates k that the energy chooses from; 1 is plain masked diffusion (MDLM). Or pairs (t, k)
            with falling t, k candidates from that time on and one before the first: [(0.4, 4), (0.15, 8)].
        energy_window: (hi, lo), the energy acts at steps whose time t lies in [lo, hi]; t=1 is all mask. Not read where
            num_candidates has times itself.
        shared_completion: whether the candidates of a step differ only in what the step reveals, and share one draw of
            the rest. An extension of the paper, for energies of x0: no candidate is kept for what is thrown away.
        energy_temperature: tau in the importance weights exp(-E / tau).
        block_length: reveal blocks of so many masked positions one after the other, from left to right, and each in a
            random order; give a multiple of their number as num_steps, or some steps will belong to two. None: one
            block, all of it in a random order.
        order: "random"; or, within a block, first the positions whose mu_i, after every processor, has the largest
            probability of one token ("confidence"), difference of its two largest ("margin") or least entropy
            ("entropy"), in as equal numbers as the steps allow. These look at token values, so there is no bound.
        confidence_threshold: with order="confidence", a step also reveals all that has at least this probability; what
            is revealed early costs no step later (the parallel decoding of Fast-dLLM, arXiv 2505.22618).
        corrector_steps: rounds of revision after the last step. A round masks a random set of positions that are not
            given, proposes for it, and moves from the present text to a proposal, or stays, by the energy. With an AR
            energy it leaves p_AR(text | what is given) as it is, whatever the size, candidates and proposal, so that
            more rounds bring the text closer to it (Metropolised Gibbs sampling among the candidates, Liu 1996). Other
            energies, or another energy_temperature than 1, have no such law: each round is then a step of its own, and
            without an energy, which the denoiser alone is, one of mu to the power of 1 / corrector_temperature.
        corrector_size: positions masked in a round; all where fewer are free.
        corrector_sets: "random", or "contiguous" for positions side by side (among those that are free), of which an
            AR energy reads only what comes after, over the keys and values of what comes before.
        corrector_candidates: candidates of a round, the present text among them; with 1 nothing is revised. None is
            num_candidates (its largest), so that num_candidates=1 is plain masked diffusion, whatever the rest.
        corrector_temperature: of the law that the rounds go for, mu exp(-E) to the power of 1 / corrector_temperature:
            with an AR energy p_AR, which a round then leaves as it is to that power. Below 1: likelier texts.
        temperature, top_k, top_p: of the proposal's logits, in this order and after every `logits_processor`; the
            proposal so changed is the mu that the energy corrects. None (or 0 for `top_k`): all tokens.
        do_sample: False takes the most likely token at each position that is revealed, in a random order that is the
            same each time unless a seed is given; all candidates would be equal, so no energy acts.
        eos_token_id, pad_token_id: with an EOS (an id or several) what is generated after its first one becomes padding
            (None: the EOS), and a row is finished when nothing before that is masked. None: text of the full length.
        denoiser_batch_size, energy_batch_size: rows denoised, and candidates scored, in one pass; None is what keeps
            the device busy and fits into its free memory. They change speed and memory, and no result.
        use_cache: keep the keys and values of an AR energy for the tokens that all candidates of a row have in common,
            while they stay the same. It changes speed and memory, and no result but by rounding.
        compile: run the blocks through `torch.compile`, on a GPU as CUDA graphs. The first calls at a length are slow.
        output_history: keep the state after every step.
        return_dict_in_generate: return an `EDLMGenerationOutput` and not just the sequences.

    Raises:
        ValueError: for a value out of range or a name that is not listed here.
    """

    # The many fields of the base class steer autoregressive decoding: none of them is taken over silently, so
    # super().__init__() is not called (as in the library's own diffusion language model).
    def __init__(self, **kwargs: Any) -> None:
        self.max_new_tokens: int | None = kwargs.pop("max_new_tokens", None)
        self.max_length: int | None = kwargs.pop("max_length", None)
        self.num_return_sequences: int = kwargs.pop("num_return_sequences", 1)
        self.num_steps: int = kwargs.pop("num_steps", 128)
        self.num_candidates: int | Sequence[tuple[float, int]] = kwargs.pop("num_candidates", 8)
        self.energy_window: tuple[float, float] = kwargs.pop("energy_window", (1.0, 0.8))
        self.shared_completion: bool = kwargs.pop("shared_completion", False)
        self.energy_temperature: float = kwargs.pop("energy_temperature", 1.0)
        self.block_length: int | None = kwargs.pop("block_length", None)
        self.order: str = kwargs.pop("order", "random")
        self.confidence_threshold: float | None = kwargs.pop("confidence_threshold", None)
        self.corrector_steps: int = kwargs.pop("corrector_steps", 0)
        self.corrector_size: int = kwargs.pop("corrector_size", 4)
        self.corrector_sets: str = kwargs.pop("corrector_sets", "random")
        self.corrector_candidates: int | None = kwargs.pop("corrector_candidates", None)
        self.corrector_temperature: float = kwargs.pop("corrector_temperature", 1.0)
        self.temperature: float = kwargs.pop("temperature", 1.0)
        self.top_k: int | None = kwargs.pop("top_k", None)
        self.top_p: float | None = kwargs.pop("top_p", None)
        self.do_sample: bool = kwargs.pop("do_sample", True)
        self.denoiser_batch_size: int | None = kwargs.pop("denoiser_batch_size", None)
        self.energy_batch_size: int | None = kwargs.pop("energy_batch_size", None)
        self.use_cache: bool = kwargs.pop("use_cache", True)
        self.compile: bool = kwargs.pop("compile", False)
        self.output_history: bool = kwargs.pop("output_history", False)
        self.return_dict_in_generate: bool = kwargs.pop("return_dict_in_generate", False)
        self.bos_token_id: int | None = kwargs.pop("bos_token_id", None)
        self.eos_token_id: int | list[int] | tuple[int, ...] | None = kwargs.pop("eos_token_id", None)
        self.pad_token_id: int | None = kwargs.pop("pad_token_id", None)
        self.transformers_version: str | None = kwargs.pop("transformers_version", None)
        self._from_model_config = None
        for metadata in ("_commit_hash", "_from_model_config"):
            kwargs.pop(metadata, None)
        if kwargs:
            raise ValueError(unknown_arguments("EDLM's generation", kwargs))
        self.validate()

    def validate(self, **_: Any) -> None:
        for name in ("num_steps", "num_return_sequences", "corrector_size"):
            setattr(self, name, check_count(name, getattr(self, name)))
        if isinstance(self.num_candidates, list | tuple):
            self.num_candidates = _candidates_by_time(self.num_candidates)
        else:
            self.num_candidates = check_count("num_candidates", self.num_candidates)
        self.corrector_steps = check_count("corrector_steps", self.corrector_steps, least=0)
        optional = "max_new_tokens max_length block_length corrector_candidates denoiser_batch_size energy_batch_size"
        for name in [*optional.split(), "top_k"]:
            if getattr(self, name) is not None:
                setattr(self, name, check_count(name, getattr(self, name), least=int(name != "top_k")))
        special = "eos_token_id and pad_token_id"
        ids = [check_count(special, i, least=0) for i in self.eos_token_ids]
        if self.eos_token_id is not None:
            self.eos_token_id = ids if isinstance(self.eos_token_id, list | tuple) else ids[0]
        if self.pad_token_id is not None:
            self.pad_token_id = check_count(special, self.pad_token_id, least=0)
        if self.max_length is not None and self.max_new_tokens is not None:
            raise ValueError(f"give max_length or max_new_tokens, not both: {self.max_length}, {self.max_new_tokens}")
        window = self.energy_window
        is_pair = isinstance(window, list | tuple) and len(window) == 2 and all(map(is_number, window))
        if not is_pair or not 1 >= window[0] >= window[1] >= 0:
            raise ValueError(f"energy_window must be (hi, lo) with 1 >= hi >= lo >= 0, got {window}")
        self.energy_window = float(window[0]), float(window[1])  # a list in JSON
        booleans = "shared_completion do_sample use_cache compile output_history return_dict_in_generate"
        for name in booleans.split():
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name in ("energy_temperature", "corrector_temperature", "temperature"):
            if not is_number(value := getattr(self, name)) or not 0 < value < float("inf"):
                raise ValueError(f"{name} must be positive, got {value!r}")
            if not 1e-30 <= value <= 1e30:  # float32 has 38 digits
                raise ValueError(f"{name} must lie between 1e-30 and 1e30, got {value!r}")
            setattr(self, name, float(value))
        for name, allowed in {"order": ORDERS, "corrector_sets": SETS}.items():
            if not isinstance(value := getattr(self, name), str) or value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        for name in ("top_p", "confidence_threshold"):
            if (value := getattr(self, name)) is not None:
                if not is_number(value) or not 0 < value <= 1:
                    raise ValueError(f"{name} must lie in (0, 1], got {value!r}")
                setattr(self, name, float(value))
        if self.confidence_threshold is not None and self.order != "confidence":
            raise ValueError(
                f"confidence_threshold={self.confidence_threshold} needs order='confidence', got order={self.order!r}"
            )

    @property
    def most_candidates(self) -> int:
        """num_candidates, the largest where it changes with time."""
        several = self.num_candidates
        return several if isinstance(several, int) else max(k for _, k in several)

    def candidates_at(self, t: float, num_candidates: int | None = None) -> int:
        """How many there are at time t; where that is not said for each time, `num_candidates` in place of it."""
        edge = 1e-9  # times are rounded
        if isinstance(self.num_candidates, int):
            hi, lo = self.energy_window
            k = self.num_candidates if num_candidates is None else num_candidates
            return k if lo - edge <= t <= hi + edge else 1
        return next((k for start, k in reversed(self.num_candidates) if t <= start + edge), 1)

    @property
    def eos_token_ids(self) -> list[int]:
        eos = self.eos_token_id
        return [] if eos is None else list(eos) if isinstance(eos, list | tuple) else [eos]

    @classmethod
    def from_model_config(cls, model_config: PreTrainedConfig | dict) -> NoReturn:
        """There are no sampling parameters in a model configuration; the library then takes the defaults."""
        raise NotImplementedError

    def get_generation_mode(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError("masked diffusion has none of the autoregressive generation modes")


def own_config(config: GenerationConfig, default: EDLMGenerationConfig | None = None) -> EDLMGenerationConfig:
    """A copy in this file's class: the library reads generation_config.json into its own, and remote code has another
    copy of this one. Raises ValueError for what is set there and is no argument here.

    Args:
        default: what the library's own class cannot say, `num_steps` for one, is as it is there; None: the defaults.
    """
    if isinstance(config, EDLMGenerationConfig):
        return copy.deepcopy(config)
    if not isinstance(config, GenerationConfig):
        raise ValueError(f"generation_config must be a GenerationConfig, got {type(config).__name__}")
    fields = {name: value for name, value in config.to_dict().items() if value is not None}
    if default is not None and type(config) is GenerationConfig:
        lengths = {"max_length", "max_new_tokens"}
        replaced = lengths if fields.keys() & lengths else ()  # of the two, give one
        fields = default.to_dict() | dict.fromkeys(replaced) | fields
    return EDLMGenerationConfig(**fields)


def prepare_config(
    model: Any, generation_config: GenerationConfig | None, changes: dict[str, Any], name: str = "generate"
) -> EDLMGenerationConfig:
    """The configuration of a call: the one given or the model's own, with changes; ValueError for what does not fit."""
    default = own_config(model.generation_config)
    config = default if generation_config is None else own_config(generation_config, default)
    # what the library's Seq2SeqTrainer gives to every model
    idle = {"labels": changes.get("labels"), "synced_gpus": False, "num_beams": 1}
    changes = {n: x for n, x in changes.items() if n not in idle or (x is not None and x is not idle[n])}
    if any(
        changes.get(n) is not None for n in ("max_length", "max_new_tokens")
    ):  # the caller's wish beats either default
        config.max_length = config.max_new_tokens = None
    allowed = config.__dict__.keys() - {"transformers_version", "bos_token_id"}
    if unknown := {n: value for n, value in changes.items() if n not in allowed or n.startswith("_")}:
        raise ValueError(unknown_arguments(f"{name}()", unknown))
    config.__dict__.update(changes)
    config.validate()
    for i in config.eos_token_ids + ([] if config.pad_token_id is None else [config.pad_token_id]):
        if i >= model.config.vocab_size or i == model.config.mask_token_id:
            raise ValueError(f"eos_token_id and pad_token_id must be tokens of the vocabulary, got {i}")
    return config


def unknown_arguments(what: str, values: dict[str, Any]) -> str:
    """The error for arguments that do not exist, with our name for those that other samplers have."""
    known = [f"{n}={v!r} is {PEERS[n] or 'not offered'} here" for n, v in sorted(values.items()) if n in PEERS]
    return "; ".join([f"{what} has no argument {sorted(values)}", *known])


def _candidates_by_time(pairs: Sequence[Any]) -> tuple[tuple[float, int], ...]:
    """The pairs (t, k), from JSON too; ValueError for what are none."""
    if not pairs or any(not isinstance(pair, list | tuple) or len(pair) != 2 for pair in pairs):
        raise ValueError(f"num_candidates must be an integer or pairs (t, k), got {pairs!r}")
    counts = [check_count("num_candidates at each time", k, most=MOST["num_candidates"]) for _, k in pairs]
    starts = [t for t, _ in pairs]
    is_time = all(is_number(t) and 0 < t <= 1 for t in starts)
    if not is_time or any(a <= b for a, b in pairwise(starts)):
        raise ValueError(f"the times of num_candidates must fall within (0, 1], got {starts}")
    return tuple((float(t), k) for t, k in zip(starts, counts, strict=True))


@dataclass
class EDLMGenerationOutput(ModelOutput):
    """
    Args:
        sequences: (B, L) int64, prompts included.
        nfe, energy_nfe: (B,) int64, forward passes of the denoiser and of the energy spent on each row.
        energy_tokens: (B,) int64, tokens that these passes of the energy really computed: fewer than the texts have
            where keys and values of their first ones were kept.
        energies: (B, T) float32, energy of the kept candidate at each step and corrector round (T is the number of both
            together), NaN where no energy acted.
        ess: (B, T) float32, effective sample size of the k importance weights, NaN likewise.
        acceptance: (B,) float32, share of its corrector rounds in which a row changed, NaN where it had none.
        history: T + 1 states (B, L), from the start to `sequences`, with `output_history=True`.
    """

    sequences: Tensor
    nfe: Tensor | None = None
    energy_nfe: Tensor | None = None
    energy_tokens: Tensor | None = None
    energies: Tensor | None = None
    ess: Tensor | None = None
    acceptance: Tensor | None = None
    history: tuple[Tensor, ...] | None = None


class EDLMGenerationMixin:
    """`generate()` for a class with a `denoiser`, `energy()` and a `scorer`, see sampler.py."""

    config: Any
    device: torch.device
    scorer: Energy | None
    generation_config_class: type[GenerationConfig]

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        batch_size: int = 1,
        first_row: int = 0,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        logits_processor: list[Callable] | None = None,
        stopping_criteria: list[Callable] | None = None,
        streamer: BaseStreamer | None = None,
        callback_on_step_end: Callable | None = None,
        **kwargs: Any,
    ) -> EDLMGenerationOutput | Tensor:
        """Sample text: unconditional, after a prompt, or in place of the mask tokens of `input_ids`.

        Args:
            input_ids: (B, L) prompts; tokens that are given never change. None: `batch_size` free samples.
            attention_mask: (B, L), 0 for padding on the left or the right of shorter prompts. New tokens follow each
                prompt at once; padding on the right stays on the right.
            generation_config: of this class, or the library's with no fields set but these; default
                `self.generation_config`. Keyword arguments change single fields of it.
            first_row: number of the first row, where this batch is one part of a larger one.
            seed: fixes each row by its number, whatever the batch. generator: a seed is drawn from it instead.
            logits_processor: one or a list, called as in the library, `(input_ids, scores)` to scores (M, V), for the
                M positions that are drawn; `input_ids` (M, L) are the states they stand in, masks included. One that
                has the arguments `cur_step` or `positions` is given the step and the place (M,) of each in its text.
            stopping_criteria: one or a list, called as in the library after each step, `(states (B, L), None)` to bool
                (B,): rows to be left as they are, masks included.
            streamer: gets the prompt, each state by `put_draft` if it has that, and what was generated at the end.
            callback_on_step_end: called as `(model, step, t, state)` after every step. state["sequences"] (B, L) is the
                canvas itself, so clone what is to be kept; where an energy acted there are also "rows" (N,),
                "candidates" (N, K, L), their "energies" (N, K) and the index "kept" (N,).
        Returns:
            sequences (B * num_return_sequences, L), or an `EDLMGenerationOutput`.
        Raises:
            ValueError: an argument that does not exist or does not fit, named with its value.
            FloatingPointError: a network gave NaN, or no candidate of a row a finite energy.
        """
        config = prepare_config(self, generation_config, kwargs)
        batch_size, first_row = check_count("batch_size", batch_size), check_count("first_row", first_row, least=0)
        seed = 0 if seed is None and generator is None and not config.do_sample else choose_seed(seed, generator)
        xt_BL, attention_mask = self._canvas(input_ids, attention_mask, config, batch_size)
        rounds = config.corrector_steps if self._revises(config) and config.most_candidates > 1 else 0
        keeps = config.use_cache and not config.compile
        run = Run(self, xt_BL, attention_mask, seed, first_row, config.num_steps + rounds, keeps)
        watch = Watch(self, run, config, stopping_criteria, streamer, callback_on_step_end, not rounds)
        process = LogitsProcess.of(config, logits_processor, self.config.mask_token_id)
        with in_eval_mode(self), fixed_weights(), compiled(config.compile):
            denoise(self, run, config, process, watch)
            revise(self, run, config, process, watch, range(config.num_steps, config.num_steps + rounds))
        return self._output(run, config, watch, logits_processor)

    @torch.no_grad()
    def revise(
        self,
        input_ids: Tensor,
        mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        first_row: int = 0,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        logits_processor: list[Callable] | None = None,
        stopping_criteria: list[Callable] | None = None,
        streamer: BaseStreamer | None = None,
        callback_on_step_end: Callable | None = None,
        **kwargs: Any,
    ) -> EDLMGenerationOutput | Tensor:
        """Revise a finished text by `corrector_steps` rounds of the corrector (see `EDLMGenerationConfig`).

        Args:
            input_ids: (B, L) texts without mask tokens. mask: (B, L) bool, what may be revised; None: everything.
            attention_mask: (B, L), 0 for padding, that after an EOS too. The rest: as in `generate()`.
        Returns:
            sequences (B * num_return_sequences, L), or an `EDLMGenerationOutput`; its T is the number of rounds.
        Raises:
            ValueError: an argument that does not exist or does not fit, named with its value.
            FloatingPointError: a network gave NaN.
        """
        config = prepare_config(self, generation_config, kwargs)
        check_count("corrector_steps", config.corrector_steps)
        first_row = check_count("first_row", first_row, least=0)
        input_ids = check_prompt(input_ids, self.config.vocab_size)
        if (input_ids == self.config.mask_token_id).any():
            raise ValueError("input_ids hold mask tokens: generate() fills them, revise() changes finished text")
        longest = self.config.max_position_embeddings
        if input_ids.shape[1] > longest:
            raise ValueError(f"input_ids has {input_ids.shape[1]} tokens, more than max_position_embeddings={longest}")
        mask = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
        if not isinstance(mask, Tensor) or mask.shape != input_ids.shape or mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool {tuple(input_ids.shape)}, got {described(mask)}")
        if attention_mask is not None:
            attention_mask = check_attention_mask(attention_mask, input_ids)
            mask = mask & attention_mask.bool()
        check_size(config, len(input_ids), input_ids.shape[1], config.corrector_steps)
        repeated: list[Any] = [
            x if x is None else x.repeat_interleave(config.num_return_sequences, dim=0).to(self.device)
            for x in (input_ids, attention_mask, mask)
        ]
        seed = int(uniforms(choose_seed(seed, generator), REVISE) * 2**52)
        keeps = config.use_cache and not config.compile
        run = Run(self, repeated[0], repeated[1], seed, first_row, config.corrector_steps, keeps)
        watch = Watch(self, run, config, stopping_criteria, streamer, callback_on_step_end, False, repeated[2])
        process = LogitsProcess.of(config, logits_processor, self.config.mask_token_id)
        rounds = range(config.corrector_steps if self._revises(config) else 0)
        with in_eval_mode(self), fixed_weights(), compiled(config.compile):
            revise(self, run, config, process, watch, rounds)
        return self._output(run, config, watch, logits_processor)

    def _output(
        self, run: Run, config: EDLMGenerationConfig, watch: "Watch", logits_processor: list[Callable] | None
    ) -> EDLMGenerationOutput | Tensor:
        run.health.check(logits_processor)  # before the streamer hears that all is well
        sequences_BL = watch.end()
        if not config.return_dict_in_generate:
            return sequences_BL
        acceptance_B = run.changed_B.float() / run.rounds_B  # 0 / 0 is NaN
        counts = run.nfe_B, run.energy_nfe_B, run.energy_tokens_B, run.energies_BT, run.ess_BT
        return EDLMGenerationOutput(sequences_BL, *counts, acceptance_B, watch.history)

    def _revises(self, config: EDLMGenerationConfig) -> bool:
        return config.do_sample and (config.corrector_candidates or config.most_candidates) > 1

    def _canvas(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, config: EDLMGenerationConfig, batch_size: int
    ) -> tuple[Tensor, Tensor | None]:
        """The start: prompts, each with masks after it; and the attention mask, None without padding."""
        longest, mask = self.config.max_position_embeddings, self.config.mask_token_id
        if input_ids is None:
            if attention_mask is not None:
                raise ValueError("attention_mask needs input_ids, got None")
            input_ids = torch.empty(batch_size, 0, dtype=torch.int64, device=self.device)
        else:
            input_ids = check_prompt(input_ids, self.config.vocab_size)
            if batch_size != 1:
                raise ValueError(f"batch_size counts free samples; with input_ids leave it at 1, got {batch_size}")
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
        check_size(config, B, length, config.num_steps + config.corrector_steps, batch_size)
        new_BL = input_ids.new_full((B, length - prompt_length), mask)
        xt_BL = torch.cat((input_ids, new_BL), dim=1)
        if attention_mask is not None:
            attention_mask = torch.cat((attention_mask.to(new_BL.device), torch.ones_like(new_BL)), dim=1)
            # padding on the right of a prompt, with a text before it, goes to the end of the row
            is_right_BL = (attention_mask == 0) & (attention_mask.cumsum(-1) > 0)
            order_BL = is_right_BL.byte().argsort(dim=-1, stable=True)
            xt_BL, attention_mask = xt_BL.gather(1, order_BL), attention_mask.gather(1, order_BL)
            attention_mask = attention_mask.repeat_interleave(config.num_return_sequences, dim=0).to(self.device)
            attention_mask = None if attention_mask.all() else attention_mask  # nothing is padded: nothing to mask
        return xt_BL.repeat_interleave(config.num_return_sequences, dim=0).to(self.device), attention_mask

    def adjust_generation_fn(
        self,
        generation_config: GenerationConfig | None,
        from_auto_class: bool,
        from_pipeline: str | None,
        pretrained_model_name_or_path: Any,
        cache_dir: Any,
        force_download: bool,
        proxies: dict[str, str] | None,
        local_files_only: bool,
        token: str | bool | None,
        revision: str,
        subfolder: str,
        trust_remote_code: bool,
        **kwargs: Any,
    ) -> None:
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


class Watch:
    """What looks on while a canvas is filled, and says which rows are done: EOS, stopping criteria, streamer, callback.

    free_BL: what is to be filled, or revised, on the device. done_B: rows that are finished or stopped, on the CPU.
    With `may_finish` a row is finished at its EOS; a text to be revised needs all its tokens.
    """

    def __init__(
        self,
        model: Any,
        run: Run,
        config: EDLMGenerationConfig,
        stopping_criteria: list[Callable] | None,
        streamer: BaseStreamer | None,
        callback: Callable | None,
        may_finish: bool,
        free_BL: Tensor | None = None,
    ) -> None:
        if streamer is not None and not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
            raise ValueError(f"streamer must have the methods put and end, got {streamer!r}")
        if callback is not None and (not callable(callback) or isinstance(callback, type)):
            raise ValueError(f"callback_on_step_end must be a function, got {callback!r}")
        xt_BL, attention_mask = run.xt_BL, run.attention_mask
        self.model, self.xt_BL, self.streamer, self.callback = model, xt_BL, streamer, callback
        self.may_finish = may_finish
        self.mask_token_id, self.eos = model.config.mask_token_id, config.eos_token_ids
        self.pad = next((i for i in (config.pad_token_id, *self.eos) if i is not None), None)
        self.criteria = functions("stopping_criteria", stopping_criteria)
        self.history: tuple[Tensor, ...] | None = (xt_BL.clone(),) if config.output_history else None
        is_text_BL = torch.ones_like(xt_BL, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        self.free_BL = (xt_BL == self.mask_token_id) & is_text_BL if free_BL is None else free_BL
        is_given_BL = is_text_BL & ~self.free_BL
        self.tail_BL = is_text_BL & (is_given_BL.flip(-1).cumsum(-1).flip(-1) == 0)  # after the last given token
        self.done_B = torch.zeros(len(xt_BL), dtype=torch.bool, device="cpu")
        self.choices: list[tuple[Tensor, ...]] = []
        if streamer is not None:  # the prompt: what stands before the first position that is to be filled
            is_before_L = ~self.free_BL.any(0).cumsum(-1).bool()
            self.start = int(is_before_L.sum())
            streamer.put(xt_BL[:, : self.start].cpu())

    def choice(self, rows_N: Tensor, x_NKL: Tensor, energy_NK: Tensor, kept_N: Tensor) -> None:
        if self.callback is not None:
            self.choices.append((rows_N, x_NKL, energy_NK, kept_N))

    def step_end(self, step: int, t: float) -> bool:
        """Whether all rows are done."""
        if self.history is not None:
            self.history += (self.xt_BL.clone(),)
        if self.callback is not None:
            names = ("rows", "candidates", "energies", "kept")
            parts = (
                dict(zip(names, map(torch.cat, zip(*self.choices, strict=True)), strict=True)) if self.choices else {}
            )
            self.callback(self.model, step, t, {"sequences": self.xt_BL} | parts)
            self.choices = []
        if hasattr(self.streamer, "put_draft"):  # given a copy: the canvas goes on changing
            self.streamer.put_draft(self.xt_BL[:, self.start :].to("cpu", copy=True))  # type: ignore[union-attr]
        if self.eos and self.may_finish:  # nothing that is still masked comes before the first EOS
            is_open_BL = (self.xt_BL == self.mask_token_id) & self.free_BL & ~self.after_eos()
            self.done_B |= ~is_open_BL.any(-1).cpu()
        for criterion in self.criteria:
            stops = criterion(self.xt_BL, None)
            is_tensor = isinstance(stops, Tensor) and stops.dtype == torch.bool
            if not isinstance(stops, bool) and not (is_tensor and stops.shape in ((), self.done_B.shape)):
                wanted = f"bool {tuple(self.done_B.shape)}, one for each row"
                raise ValueError(f"stopping_criteria must return {wanted}; {criterion!r} gave {described(stops)}")
            self.done_B |= stops if isinstance(stops, bool) else stops.cpu()
        return bool((self.eos or self.criteria) and self.done_B.all())

    def after_eos(self) -> Tensor:
        """(B, L) bool: what comes after the first EOS that follows the last given token."""
        is_eos_BL = torch.isin(self.xt_BL, torch.tensor(self.eos, device=self.xt_BL.device)) & self.tail_BL
        return self.tail_BL & (is_eos_BL.cumsum(-1) - is_eos_BL.long() > 0)

    def end(self) -> Tensor:
        """The sequences."""
        if self.eos:
            self.xt_BL.masked_fill_(self.after_eos(), self.pad)  # type: ignore[arg-type]
        if self.streamer is not None:
            self.streamer.put(self.xt_BL[:, self.start :].cpu())
            self.streamer.end()
        return self.xt_BL
