"""Random arguments of `generate()`, `revise()`, `likelihood()` and custom_generate/: each call gives a result as it is
documented, or an error that names an argument. The suite makes 2,000 calls; more of them, and how they ended:

    EDLM_FUZZ_EXAMPLES=20000 python -m pytest tests/test_fuzz.py --hypothesis-show-statistics

Wrong values are of every type, size and shape. No call may take longer than SECONDS or more than BYTES of memory.
"""

import os
import re
import resource
import signal
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from test_custom_generate import make_bert, make_gpt2
from transformers import GenerationConfig, TopKLogitsWarper

from modeling_edlm import EDLMConfig, EDLMGenerationConfig, ForeignModel
from modeling_edlm.custom_generate import generate as custom_generate
from support.toy import MASK, make_toy

EXAMPLES = int(os.environ.get("EDLM_FUZZ_EXAMPLES", 2000))
SECONDS, BYTES, LONGEST = 20, 2**31, 6
INTS = (bool, *(getattr(torch, name) for name in "uint8 int16 int32 int64 uint32 uint64".split()))
NUMBERS = [0, 1, 2, -1, 10**9, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400, 0.5, 1.0, 2.5, -0.1, 1e-320, 1e-30, 1e308]
ODD = [
    *NUMBERS,
    *(float("nan"), float("inf"), -float("inf"), 1 + 2j, None, True, False, "", "a", "2", b"2", "random"),
    *(np.int64(2), np.uint8(1), np.float32(0.5), np.float64(0.5), np.bool_(True), np.array([1, 2]), np.array([[0, 1]])),
    *(torch.tensor(2), torch.tensor(0.5), torch.tensor(True), torch.tensor([1, 2]), torch.tensor([]), torch.ones(1, 2)),
    *([], [1], [None], ["a"], [[0, 1], [1, 2]], (), (1,), (1, 0), ("a", "b"), (None, None), {}, {"a": 1}, {1}),
    *([(0.5, 2)], [(0.5, "a")], [(float("nan"), 2)], [(0.5, 0)], [(0.5, 10**9)], [0.5, 2]),
    *(object(), lambda *_: None, TopKLogitsWarper, torch.Generator()),
]


class Mute:
    """A streamer."""

    def put(self, value):
        pass

    def end(self):
        pass


PROCESSORS = [
    TopKLogitsWarper(2),
    lambda ids, scores: scores + 1,
    lambda ids, scores, cur_step, positions: scores - positions[:, None],
    lambda ids, scores: scores.double(),
    lambda ids, scores: scores.half(),
    lambda ids, scores: None,
    lambda ids, scores: scores[:, :-1],
    lambda ids, scores: scores[0],
    lambda ids, scores: scores.long(),
    lambda ids, scores: scores.tolist(),
    lambda ids, scores: scores * float("nan"),
    lambda ids, scores: torch.full_like(scores, -torch.inf),
    lambda ids, scores: scores.index_fill(-1, torch.tensor([0]), -torch.inf),
]
nothing = PROCESSORS[-2]  # of this all logits are -inf
CRITERIA = [
    lambda ids, scores: torch.zeros(len(ids), dtype=torch.bool),
    lambda ids, scores: torch.arange(len(ids)) == 0,
    *(lambda ids, scores, x=x: x for x in (True, False, None, 1, "a", np.bool_(True), torch.tensor(True), [True])),
    lambda ids, scores: torch.ones(len(ids)),
    lambda ids, scores: torch.ones(len(ids), dtype=torch.int64),
    lambda ids, scores: torch.ones(len(ids), 1, dtype=torch.bool),
    lambda ids, scores: torch.ones(len(ids) + 1, dtype=torch.bool),
]
CALLBACKS = [lambda *_: None, lambda *_: "a", lambda model, step, t, state: state]
CONFIGS = [
    *(
        GenerationConfig(),
        GenerationConfig(num_beams=4),
        GenerationConfig(max_length=4),
        EDLMConfig(),
        {"num_steps": 2},
    ),
    *(EDLMGenerationConfig(num_steps=2), EDLMGenerationConfig, EDLMGenerationConfig(order="margin", num_steps=3)),
]
PAIRS = [
    [(1.0, 2)],
    [(0.9, 3), (0.4, 2)],
    ((0.5, np.int64(2)),),
    [(0.4, 2), (0.9, 3)],
    [[1, 1]],
    [(np.float32(0.5), 2)],
]
COUNTS = [1, 2, 3, 4, np.int64(2), torch.tensor(2)]
SIZES = [None, 1, 2, 3, 5, np.int32(2), 10**9]
BOTH = {  # arguments of generate(), revise() and likelihood(), with values that mostly fit
    "num_steps": COUNTS,
    "num_candidates": COUNTS + PAIRS,
    "energy_window": [(1.0, 0.0), [0.8, 0.2], (1, 0), (np.float32(1), 0)],
    "shared_completion": [True, False],
    "energy_temperature": [0.5, 1, 2.0, np.float32(0.7)],
    "block_length": SIZES,
    "order": ["random", "confidence", "margin", "entropy"],
    "confidence_threshold": [None, 0.5, 1, 1e-9],
    "corrector_steps": [0, 1, 2, np.int64(2)],
    "corrector_size": SIZES[1:],
    "corrector_sets": ["random", "contiguous"],
    "corrector_candidates": [None, 1, 2, 3],
    "corrector_temperature": [0.5, 1, 2.0],
    "temperature": [0.5, 1, 2.0, np.float32(0.7), 1e-30],
    "top_k": [None, 0, 1, 2, 100, np.int64(2)],
    "top_p": [None, 0.5, 1, 1e-9],
    "do_sample": [True, False],
    "eos_token_id": [None, 0, 1, [0, 1], (2,), [], np.int64(1), 3, 4],
    "pad_token_id": [None, 0, 2, np.int64(1), 3],
    "denoiser_batch_size": SIZES,
    "energy_batch_size": SIZES,
    "use_cache": [True, False],
    "compile": [False],
    "output_history": [True, False],
    "return_dict_in_generate": [True, False],
    "seed": [0, 7, -1, 10**30, np.int64(3), np.uint64(2**63), None],
    "first_row": [0, 1, 1000, 2**40, np.int64(3)],
    "logits_processor": [None, [], *PROCESSORS, *([p] for p in PROCESSORS)],
    "generation_config": [None, *CONFIGS],
    "num_return_sequences": [1, 2, np.int64(2)],
    "max_new_tokens": [None, 1, 2, 6],
    "max_length": [None, 3, 6, 7],
}
SAMPLED = {
    "generator": [torch.Generator()],
    "stopping_criteria": [None, [], *CRITERIA, *([c] for c in CRITERIA)],
    "streamer": [None, Mute()],
    "callback_on_step_end": [None, *CALLBACKS],
}
OWN = {
    "generate": SAMPLED | {"batch_size": [1, 2, 3, np.int64(2)]},
    "revise": SAMPLED,
    "likelihood": {
        "estimator": ["sampler", "paper", "mdlm"],
        "num_samples": COUNTS,
        "num_times": COUNTS,
        "settings": [None, [(2, 1.0)]],
    },
    "custom_generate": SAMPLED
    | {
        "energy_type": ["ar", "coar"],
        "energy_target": ["x0", "xs"],
        "energy_kwargs": [None, {}],
        "mask_token_id": [MASK, 2, np.int64(3)],
        "max_position_embeddings": [3, LONGEST],
        "logits_shift": [0, 1],
        "num_tokens": [None, 3, 4],
        "token_type_ids": [torch.zeros(1, 2), torch.ones(1, 2)],
        "assistant_model": [None, 3],
    },
}
BASE = {"num_steps": 2, "num_candidates": 2, "energy_window": (1.0, 0.0), "seed": 0}
MODELS = ("none", "ar", "coar", "nce", "step", "bert", "bert ar", "function")


@cache
def model_of(kind):
    if kind == "function":
        return ForeignModel(make_bert(length=LONGEST), lambda x, xt, t, mask, log_mu: x.sum(-1) - log_mu)
    if "bert" in kind:
        return ForeignModel(make_bert(length=LONGEST), make_gpt2() if kind == "bert ar" else None)
    return make_toy("nce" if kind == "step" else kind, "xs" if kind == "step" else "x0", length=LONGEST)


CHANGES = [
    *(
        lambda x: x[0],
        lambda x: x[0, 0],
        lambda x: x[None],
        lambda x: x[:, :0],
        lambda x: x[:0],
        lambda x: x.repeat(1, 3),
    ),
    *(lambda x: x.long() - 1, lambda x: x.long() + 1, lambda x: x.tolist(), lambda x: x.numpy()),
]


@st.composite
def texts(draw, has_masks):
    """input_ids, an attention mask or None, and their shape; mostly as they should be."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, LONGEST)))
    ids = np.array(draw(st.lists(st.integers(0, MASK if has_masks else MASK - 1), min_size=18, max_size=18)))
    ids = torch.tensor(np.resize(ids, shape))
    pads = torch.tensor(draw(st.lists(st.integers(0, shape[1] - 1), min_size=shape[0], max_size=shape[0])))
    mask = torch.arange(shape[1]) >= pads[:, None]
    mask = draw(st.sampled_from([None, mask, mask.flip(1)]))
    as_type = st.sampled_from([torch.int64] * 60 + [torch.bool, torch.float32, torch.complex64, *INTS[1:]])
    ids, mask = ids.to(draw(as_type)), None if mask is None else mask.to(draw(as_type))
    change = draw(st.integers(0, 80))
    return CHANGES[change](ids) if change < len(CHANGES) else ids, mask


@st.composite
def calls(draw):
    """The kind of model, the function, and what is given to it."""
    kind, function = (
        draw(st.sampled_from(MODELS)),
        draw(st.sampled_from(["generate", "generate", "revise", "likelihood"])),
    )
    function = "custom_generate" if function == "generate" and "bert" in kind and draw(st.booleans()) else function
    given, base, options = {}, BASE | {"corrector_steps": 1} if function == "revise" else BASE, BOTH | OWN[function]
    if function == "likelihood":
        base = base | {"num_times": 2}
    if function in ("revise", "likelihood") or draw(st.booleans()):
        ids, mask = draw(texts(has_masks="generate" in function))
        given["input_ids"] = ids
        if mask is not None:
            given["attention_mask"] = mask
        of_text = {"revise": "mask", "likelihood": "prompt_mask"}.get(function)
        if of_text and getattr(ids, "ndim", 0) and isinstance(ids, torch.Tensor) and draw(st.integers(0, 2)) == 0:
            choice = torch.arange(ids.numel()).reshape(ids.shape) % 3 == draw(st.integers(0, 2))
            given[of_text] = draw(
                st.sampled_from([choice, choice, choice, choice.long(), choice.float(), choice[..., 1:]])
            )
    names = draw(st.lists(st.sampled_from(sorted(options)), unique=True, max_size=5))
    for name in names:
        if draw(st.integers(0, 7)) != 1:
            given[name] = draw(st.sampled_from(options[name]))
        else:  # to compile takes a minute
            given[name] = draw(st.sampled_from([x for x in ODD if name != "compile" or x is not True]))
    if draw(st.integers(0, 29)) == 7:
        others = ["input_ids", "attention_mask", "mask", "prompt_mask", "num_stepz", "steps"]
        given[draw(st.sampled_from(others))] = draw(st.sampled_from(ODD))
    base = {n: x for n, x in base.items() if n != "seed" or "generator" not in given}
    return kind, function, base, given


@contextmanager
def limits():
    """An error after some seconds, or where more memory is asked for."""

    def too_slow(*_):
        raise TimeoutError(f"more than {SECONDS} seconds")

    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, too_slow)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, before[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def run(kind, function, base, given):
    """What the call gave, or its error."""
    model = model_of(kind)
    call = getattr(model, function, None)
    if function == "custom_generate":
        energy = {"bert ar": make_gpt2, "bert": lambda: None}[kind]()
        call = lambda **kwargs: custom_generate(model.denoiser.model, energy=energy, **kwargs)  # noqa: E731
    with limits():
        return call(**base | given)


def check(function, base, given, result):
    """That a result is what the documentation says."""
    options, ids = base | given, given.get("input_ids")
    B = int(options.get("batch_size", 1)) if ids is None else len(ids)
    if function == "likelihood":
        assert result.nll.shape == (B,) and result.nll.dtype == torch.float64 and (result.nll > -torch.inf).all()
        return
    config = given.get("generation_config")
    R = int(options.get("num_return_sequences", 1))
    is_output = options.get("return_dict_in_generate", getattr(config, "return_dict_in_generate", False))
    sequences = result.sequences if is_output else result
    assert sequences.dtype == torch.int64 and sequences.ndim == 2 and len(sequences) == B * R
    if is_output:
        assert all(
            x.shape == (B * R,) and (x >= 0).all() for x in (result.nfe, result.energy_nfe, result.energy_tokens)
        )
    if ids is None:
        ids = sequences.new_empty(B, 0)
    ids, mask = ids.long(), given.get("attention_mask")
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    stops, mask_token_id = (
        "stopping_criteria" in given,
        int(MASK if given.get("mask_token_id") is None else given["mask_token_id"]),
    )
    frozen = torch.ones_like(ids, dtype=torch.bool)
    if function == "revise":
        frozen = ~given.get("mask") if given.get("mask") is not None else ~frozen
    for i, row in enumerate(sequences.tolist()):
        given_row, is_text = ids[i // R].tolist(), mask[i // R].tolist()
        start = is_text.index(True) if is_text else 0
        n = sum(is_text)
        end = len(row) - (len(is_text) - start - n)
        for j in range(n):
            token = given_row[start + j]
            assert token == mask_token_id or not frozen[i // R, start + j] or row[start + j] == token
        assert stops or mask_token_id not in row[start:end]


def outcome(kind, function, base, given):
    """One word for what a call came to; AssertionError where it broke its promise."""
    try:
        result = run(kind, function, base, given)
    except (ValueError, TypeError, FloatingPointError) as error:
        names = given.keys() | getattr(given.get("generation_config"), "__dict__", {}).keys()
        named = re.search(rf"\b({'|'.join(sorted(names) or ['-'])})\b", str(error).lower())
        assert named, f"the error names no argument: {type(error).__name__}: {error}"
        return type(error).__name__
    check(function, base, given, result)
    return "a result"


@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    report_multiple_bugs=False,
)
@given(calls())
def test_a_result_or_an_error_that_names_an_argument(call):
    event(f"{call[1]}: {outcome(*call)}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 10**9}, "num_steps must be at most 1048576, got 1000000000"),
        ({"num_candidates": 10**9}, "num_candidates must be at most 65536, got 1000000000"),
        ({"batch_size": 10**9}, "batch_size=1000000000.* make 1000000000 rows of 6 tokens and 2 steps, more than"),
        ({"num_return_sequences": 10**9}, "num_return_sequences=1000000000"),
        ({"first_row": 10**30}, "first_row must be at most"),
        ({"temperature": "hot"}, "temperature must be positive, got 'hot'"),
        ({"temperature": 1e-320}, "temperature must lie between 1e-30 and 1e30, got 1e-320"),
        ({"logits_processor": lambda ids, scores: None}, r"logits_processor must return a .* \(6, 4\); .* gave None"),
        ({"logits_processor": TopKLogitsWarper}, "logits_processor must be a list of functions"),
        ({"stopping_criteria": lambda ids, scores: None}, r"stopping_criteria must return bool \(1,\).*gave NoneType"),
        ({"streamer": print}, "streamer must have the methods put and end"),
        ({"generator": 0, "seed": None}, "generator must be a torch.Generator, got 0"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_was_found(arguments, message):
    with limits(), pytest.raises(ValueError, match=message):
        model_of("ar").generate(**BASE | arguments)


def test_other_types_that_fit():
    """Numbers of numpy and torch, and one function for a list of one, give the same text, and JSON."""
    model, warper = model_of("nce"), TopKLogitsWarper(2)
    plain = BASE | {"batch_size": 4, "seed": 3, "temperature": 0.5, "logits_processor": [warper]}
    other = {"batch_size": np.int64(4), "seed": np.uint8(3), "temperature": np.float32(0.5), "logits_processor": warper}
    assert torch.equal(model.generate(**plain), model.generate(**BASE | other | {"num_steps": torch.tensor(2)}))
    config = EDLMGenerationConfig(num_candidates=[(np.float32(0.5), np.int64(2))], top_p=np.float32(0.5))
    assert '"top_p": 0.5' in config.to_json_string()


def test_an_energy_without_the_mask_is_never_shown_one():
    """Not as padding, and not where the logits were NaN."""
    model = model_of("bert ar")
    ids, mask = torch.tensor([[MASK, MASK, 2, MASK, 0, MASK]]), torch.tensor([[0, 0, 1, 1, 1, 1]])
    expected = model.generate(ids.masked_fill(mask == 0, 0), mask, **BASE)
    assert torch.equal(model.generate(ids, mask, **BASE)[:, 2:], expected[:, 2:])
    for call in (model.generate, model.likelihood):
        with pytest.raises(FloatingPointError, match="logits.* with the given logits_processor"):
            call(ids[:, 4:5], **BASE | {"max_length": 6} if call == model.generate else BASE, logits_processor=nothing)
