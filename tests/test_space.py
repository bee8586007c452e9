"""The Space: what it does with a model and what it refuses; its API, where nothing else can be imported."""

import importlib
import inspect
import json
import math
import os
import re
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from gradio_client import Client
from gradio_client.exceptions import AppError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_edlm import EDLMModel
from support.space_server import MODEL, ROOT, SPACE, STORIES, serve
from training.common.metrics import bits_per_character
from training.tokenizer import train_tokenizer

SHORT = {"num_steps": 6, "num_candidates": 4, "window_low": 0.0, "length": 24}
PLAIN = {"window_high": 1.0, "shared_completion": False}  # of the model that most tests use, as in its own defaults
GAPS = "the [MASK 4] of [MASK] old [MASK 3]s"


@pytest.fixture(scope="module")
def space():
    """The modules of the Space, as app.py imports them."""
    sys.path.insert(0, str(SPACE))
    names = ("limits", "watch", "models", "engine", "panels", "app")
    yield {name: importlib.import_module(name) for name in names}
    sys.path.remove(str(SPACE))
    for name in names:
        del sys.modules[name]


@pytest.fixture(scope="module")
def engine(space):
    return space["engine"]


@pytest.fixture(scope="module")
def loaded(space):
    return space["models"].Loaded(str(MODEL))


@pytest.fixture(scope="module")
def stories(space):
    return space["models"].Loaded(str(STORIES))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return Client(server.url, verbose=False)


class Clock:
    """In place of the module `time`: it goes on when something is called."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def taking(self, seconds: float, function):
        def timed(*args, **kwargs):
            self.now += seconds
            return function(*args, **kwargs)

        return timed


def last(iterator):
    *_, result = iterator
    return result


def settings(engine, **changes):
    return engine.Settings(**PLAIN | SHORT | {"seed": 3} | changes)


# ---- what it does with a model


def test_write_is_generate(engine, loaded):
    """Looking on changes nothing: the text, the calls and the seed are those of the model's own generate()."""
    run = last(engine.write(loaded, "the city", settings(engine)))
    ids = loaded.tokenizer("the city", return_tensors="pt").input_ids
    out = loaded.model.generate(
        ids,
        max_length=24,
        num_steps=6,
        num_candidates=4,
        energy_window=(1.0, 0.0),
        seed=3,
        return_dict_in_generate=True,
        output_history=True,
    )
    assert engine.text_of(run) == loaded.tokenizer.decode(out.sequences[0])
    assert (run["nfe"], run["energy_nfe"]) == (int(out.nfe[0]), int(out.energy_nfe[0]))
    assert run["given"] == [True] * 8 + [False] * 16 and run["state"] == "done" and run["done"] == 6
    for i, step in enumerate(run["step"][8:], start=8):
        before, after = out.history[step][0, i], out.history[step + 1][0, i]
        assert before == loaded.mask and after == out.sequences[0, i]


def test_probabilities_are_the_proposals(engine, loaded):
    """p is what the denoiser, at this temperature, gave the token just before it was revealed."""
    run = last(engine.write(loaded, "the city", settings(engine, temperature=0.7)))
    ids = loaded.tokenizer(engine.text_of(run), return_tensors="pt").input_ids
    for step in sorted(set(run["step"][8:])):
        hidden = torch.tensor([s is not None and s >= step for s in run["step"]])
        log_p_LV = loaded.model.log_p_x0(ids.masked_fill(hidden, loaded.mask), t=0.5)[0] / 0.7
        for i in [i for i, s in enumerate(run["step"]) if s == step]:
            p = float(log_p_LV[i].detach().softmax(-1)[ids[0, i]])
            assert run["p"][i] == pytest.approx(p, abs=2e-3)


def test_revisions_can_be_played_back(engine, loaded, monkeypatch):
    """Undone from the last to the first, they lead to every state that generate() has gone through."""
    config = loaded.model.generation_config
    monkeypatch.setattr(config, "corrector_steps", 12)
    monkeypatch.setattr(config, "corrector_size", 6)
    settings = engine.Settings.of(loaded, num_steps=4, seed=3, length=24)
    runs = list(engine.write(loaded, "ab", settings))
    done = runs[-1]
    assert done["num_steps"] == done["done"] == 16 and done["acted"][-12:] == list(range(4, 16))
    output = loaded.model.generate(
        torch.tensor([engine.canvas(loaded, "ab", 24)]),
        max_length=24,
        num_steps=4,
        num_candidates=settings.num_candidates,
        energy_window=settings.energy_window,
        shared_completion=settings.shared_completion,
        seed=3,
        output_history=True,
        return_dict_in_generate=True,
    )
    assert (done["nfe"], done["energy_nfe"]) == (int(output.nfe), int(output.energy_nfe))
    pieces = list(done["tokens"])
    for step in range(15, 3, -1):
        assert pieces == [loaded.text([i]) for i in output.history[step + 1][0].tolist()]
        for _, i, before in [row for row in done["revised"] if row[0] == step]:
            pieces[i] = before
    assert done["revised"] and pieces == [loaded.text([i]) for i in output.history[4][0].tolist()]
    assert list(engine.write(loaded, "ab", engine.Settings.of(loaded, num_candidates=1)))[-1]["revised"] == []


def test_each_draft_has_fewer_masks(space, engine, loaded, monkeypatch):
    """The first draft is the empty canvas, the last one has no mask, and nothing that was revealed moves.

    Of all that is posted: whoever reads may miss some, and the last is read in any case.
    """
    runs, post = [], space["watch"].Watch.post
    monkeypatch.setattr(space["watch"].Watch, "post", lambda watch, run: (runs.append(run), post(watch, run)))
    *_, read = engine.write(loaded, "", settings(engine, num_steps=24))
    masked = [run["tokens"].count(None) for run in runs]
    assert masked[0] == 24 and masked[-1] == 0 and masked == sorted(masked, reverse=True) and len(runs) > 3
    assert read == runs[-1]
    for before, after in zip(runs, runs[1:], strict=False):
        assert all(a in (None, b) for a, b in zip(before["tokens"], after["tokens"], strict=True))


def test_gaps_are_filled_and_nothing_else(engine, loaded):
    run = last(engine.write(loaded, GAPS, settings(engine)))
    text = engine.text_of(run)
    assert re.fullmatch(r"the .{4} of . old .{3}s", text) and len(text) == 22
    assert run["given"].count(False) == 8


def test_inside_is_what_happened(engine, loaded):
    """Weights are exp(-E) normalised, and what a step revealed is what the kept candidate has there."""
    found = last(engine.inspect(loaded, "the city", settings(engine)))
    run, plain = found["run"], last(engine.write(loaded, "the city", settings(engine)))
    assert run["tokens"] == plain["tokens"]
    assert [choice["step"] for choice in found["choices"]] == run["acted"] != []
    for choice in found["choices"]:
        weights = torch.tensor(choice["energies"], dtype=torch.float64).neg().softmax(-1)
        assert choice["weights"] == pytest.approx(weights.tolist(), abs=2e-3)
        assert choice["ess"] == pytest.approx(1 / sum(w * w for w in choice["weights"]), rel=1e-3)
        kept = choice["candidates"][choice["kept"]]
        now = [i for i, step in enumerate(run["step"]) if step == choice["step"]]
        assert now and all(kept[i] == run["tokens"][i] for i in now)


def test_many_candidates_are_left_out_far_from_the_step(engine, loaded, monkeypatch):
    monkeypatch.setattr(engine, "SHOWN_TOKENS", 2 * 4 * 24)
    choices = last(engine.inspect(loaded, "", settings(engine), step=5))["choices"]
    assert [choice["candidates"] is not None for choice in choices] == [False] * 4 + [True] * 2


def test_shared_completions_differ_in_what_is_revealed(engine, loaded):
    found = last(engine.inspect(loaded, "", settings(engine, shared_completion=True)))
    for choice in found["choices"]:
        now = {i for i, step in enumerate(found["run"]["step"]) if step == choice["step"]}
        assert {i for i, pieces in enumerate(zip(*choice["candidates"], strict=True)) if len(set(pieces)) > 1} <= now


def test_compare_is_two_runs_of_one_seed(engine, loaded):
    runs = last(engine.compare(loaded, "the city", settings(engine)))
    for name, k in (("mdlm", 1), ("edlm", 4)):
        alone = last(engine.write(loaded, "the city", settings(engine, num_candidates=k)))
        assert runs[name]["tokens"] == alone["tokens"]
    mdlm, edlm = runs["facts"]["mdlm"], runs["facts"]["edlm"]
    assert mdlm["nfe"] == edlm["nfe"] and mdlm["energy_nfe"] == 0 < edlm["energy_nfe"]
    ids = loaded.tokenizer(engine.text_of(runs["edlm"]), return_tensors="pt").input_ids
    ar = AutoModelForCausalLM.from_pretrained(MODEL, subfolder="ar", trust_remote_code=True, dtype=torch.float32)
    assert edlm["bits_per_character"] == pytest.approx(float(bits_per_character(ar, ids)[0]), rel=1e-5)
    start = ids.clone()
    start[0, 8:] = loaded.mask
    assert edlm["energy"] == pytest.approx(float(loaded.model.energy(ids, start, 1.0).detach()), rel=1e-5)


def test_equal_seconds_are_more_steps_without_energy(engine, loaded, monkeypatch):
    """MDLM gets as many more steps as EDLM took longer, by a clock on which a denoiser call takes 1 and an energy 2."""
    clock = Clock()
    monkeypatch.setattr(engine, "time", clock)
    for owner, name, seconds in ((type(loaded.model.denoiser), "propose", 1), (type(loaded.model), "energy", 2)):
        monkeypatch.setattr(owner, name, clock.taking(seconds, getattr(owner, name)))
    facts = last(engine.compare(loaded, "", settings(engine), "seconds"))["facts"]
    assert facts["edlm"]["seconds"] == 3 * facts["edlm"]["nfe"]
    assert facts["mdlm"]["num_steps"] == 18 and facts["mdlm"]["nfe"] > facts["edlm"]["nfe"]


def test_score_is_likelihood(engine, loaded):
    """The mean over rounds of the model's own estimates, in bits per character; the AR value is exact."""
    text = "the history of the city"
    result = last(engine.score(loaded, text, settings(engine)))
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids
    rounds = range(3 * engine.ROUNDS, 4 * engine.ROUNDS)
    outputs = [loaded.model.likelihood(ids, estimator="mdlm", num_times=engine.DRAWS, seed=seed) for seed in rounds]
    bits = [float(out.nll[0]) / math.log(2) / len(text) for out in outputs]
    assert result["estimates"]["mdlm"]["bits"] == pytest.approx(sum(bits) / len(bits), rel=1e-4)
    assert set(result["estimates"]) == {"sampler", "mdlm", "paper"} and result["done"] == engine.ROUNDS
    assert all(estimate["stderr"] > 0 for estimate in result["estimates"].values())
    ar = AutoModelForCausalLM.from_pretrained(MODEL, subfolder="ar", trust_remote_code=True, dtype=torch.float32)
    assert result["ar"] == pytest.approx(float(bits_per_character(ar, ids)[0]), rel=1e-5)


def test_an_adapter_brings_its_base(space, engine, monkeypatch):
    """An energy of the next state over the shipped model: its own choices, and no published form of the likelihood."""
    monkeypatch.chdir(ROOT)
    adapter = space["models"].Loaded("hub_cards/edlm-wiki27-books")
    assert adapter.scorer is not None and adapter.model.config.energy_target == "xs"
    run = last(engine.write(adapter, "the city", settings(engine)))
    own = EDLMModel.from_pretrained(MODEL, dtype=torch.float32).load_energy("hub_cards/edlm-wiki27-books")
    ids = AutoTokenizer.from_pretrained(MODEL, trust_remote_code=True)("the city", return_tensors="pt").input_ids
    expected = own.generate(ids, max_length=24, num_steps=6, num_candidates=4, energy_window=(1.0, 0.0), seed=3)
    assert engine.text_of(run) == adapter.tokenizer.decode(expected[0])
    result = last(engine.score(adapter, "the city", settings(engine)))
    assert set(result["estimates"]) == {"sampler", "mdlm"}
    assert "not defined" in space["panels"].score_bars(result)


# ---- the model of a clone: word pieces, an end of the text, a window that does not begin at 1, a judge


def ends_at(place: int):
    """A logits processor: an EOS at this place of a text, and no special token anywhere else."""

    def process(states_ML, logits_MV, positions):
        logits_MV[:, :3] = -math.inf
        logits_MV[positions == place, 2] = 1e4
        return logits_MV

    return process


@pytest.fixture
def ends(engine, monkeypatch):
    """Ends every text of a Recorder at its place 12."""
    see = engine.Recorder.see

    def forced(self, states_ML, logits_MV, positions):
        return see(self, states_ML, ends_at(12)(states_ML, logits_MV, positions), positions)

    monkeypatch.setattr(engine.Recorder, "see", forced)


def test_the_default_is_the_model_of_stories(space, monkeypatch):
    for name in ("EDLM_REPO", "EDLM_ALLOWED"):
        monkeypatch.delenv(name, raising=False)
    assert space["models"].allowed() == [str(STORIES)]


def test_what_is_left_out_is_the_models_own(space, engine, stories, monkeypatch):
    """In a program's call, on the page, and in part."""
    config = json.loads((STORIES / "generation_config.json").read_text())
    high, low = config["energy_window"]
    own = (config["num_steps"], config["num_candidates"], high, low, config["shared_completion"])
    names = ("num_steps", "num_candidates", "window_high", "window_low", "shared_completion")
    app = space["app"]
    for endpoint in (app.write, app.compare, app.inspect, app.score):
        arguments = inspect.signature(endpoint).parameters
        left_out = app.settings_of(stories, *(arguments[name].default for name in names), 1.0, 0, 0)
        assert tuple(getattr(left_out, name) for name in names) == own
    monkeypatch.setattr(app.MODELS, "get", lambda name: stories)
    assert app.meet("")[1:6] == own
    some = app.settings_of(stories, 7, 0, 0.9, -1, "no" if own[-1] else "yes", 1.0, 0, 0)
    assert tuple(getattr(some, name) for name in names) == (7, own[1], 0.9, low, not own[-1])
    for number, most in (("num_steps", space["limits"].MAX_STEPS), ("num_candidates", space["limits"].MAX_CANDIDATES)):
        monkeypatch.setattr(stories.model.generation_config, number, 10 * most)
        assert getattr(engine.Settings.of(stories), number) == most


def test_the_energy_acts_within_the_window(engine, stories):
    changes = {"num_steps": 8, "num_candidates": 2, "window_high": 0.625, "window_low": 0.25}
    run = last(engine.write(stories, "Once upon a time", settings(engine, **changes)))
    revealing = {step for step in run["step"] if step is not None}
    rounds = stories.model.generation_config.corrector_steps
    assert run["acted"] == [step for step in range(3, 7) if step in revealing] + list(range(8, 8 + rounds))
    assert run["acted"][0] < 8
    ids = torch.tensor([stories.ids("Once upon a time")])
    common = {"num_steps": 8, "num_candidates": 2, "shared_completion": False, "seed": 3, "max_length": 24}
    common["temperature"] = 1.0
    out = stories.model.generate(ids, energy_window=(0.625, 0.25), return_dict_in_generate=True, **common)
    assert engine.text_of(run) == stories.text(out.sequences[0]) and run["energy_nfe"] == int(out.energy_nfe[0])
    scored = last(engine.score(stories, "She sat.", settings(engine, num_steps=4, window_high=0.0)))  # at no step
    assert scored["estimates"]["sampler"]["gain"] == 0


def test_a_text_ends_at_its_eos(space, engine, stories, ends):
    """What comes after it is padding, and no special token is shown; the rest is as generate() writes it."""
    changes = {"num_steps": 8, "num_candidates": 2}
    run = last(engine.write(stories, "Once upon a time", settings(engine, **changes)))
    ids = torch.tensor([stories.ids("Once upon a time")])
    common = {"num_steps": 8, "num_candidates": 2, "shared_completion": False, "energy_window": (1.0, 0.0), "seed": 3}
    common["temperature"] = 1.0
    expected = stories.model.generate(ids, max_length=24, logits_processor=[ends_at(12)], **common)[0]
    assert expected[12] == 2 and set(expected[13:].tolist()) == {0}
    text = engine.text_of(run)
    assert text == stories.text(expected) == "".join(run["tokens"][:12]) and "[" not in text
    assert run["state"] == "done" and run["tokens"][12:] == [""] * 12
    assert None not in run["step"][4:] and None not in run["p"][4:]
    assert space["app"].summary(run)["text"] == text and space["app"].summary(run)["masked"] == 0
    found = last(engine.inspect(stories, "", settings(engine, **changes)))
    for choice in found["choices"]:
        assert not any("[" in piece for pieces in choice["candidates"] for piece in pieces)
    facts = last(engine.compare(stories, "", settings(engine, **changes)))["facts"]
    for name in ("mdlm", "edlm"):
        assert facts[name]["tokens"] == 13 and math.isfinite(facts[name]["energy"] + facts[name]["bits_per_character"])


def test_pieces_keep_their_spaces_and_typed_brackets_are_text(space, engine, stories):
    text = space["app"].TO_SCORE + " [EOS][PAD]"
    ids = engine.tokenize(stories, text)
    assert "".join(stories.text([i]) for i in ids) == text and not set(ids) & {0, 1, 2, stories.mask}
    assert stories.text([0, 1, 2]) == ""
    # a space before a gap or at the end belongs to the token that will be there
    assert engine.tokenize(stories, "She sat [MASK 2] down. ") == engine.tokenize(stories, "She sat[MASK 2] down.")


def test_characters_of_several_tokens_are_whole(engine):
    """In a BPE of bytes: what the tokens add up to is the text, a part of a character is shown where it is cut off."""
    tokenizer = train_tokenizer(["the city of the old"] * 9, vocab_size=268)

    def pieces(ids):
        return engine.pieces_of(lambda *ids: tokenizer.decode(list(ids)), ids)

    text = "the naïve 世界, \U0001f642 the \ufffd end"
    ids = tokenizer(text).input_ids
    found = pieces(ids)
    assert len(ids) > len(text) - 12 and len(found) == len(ids) and "".join(found) == text
    assert [piece for piece in found if piece and not piece.isascii()] == ["ï", "世", "界", "\U0001f642", "\ufffd "]
    cut = tokenizer("a世").input_ids[:-1]
    assert pieces(cut) == ["a", "", "\ufffd"] and pieces(tokenizer("ab").input_ids) == ["a", "b"] and pieces([]) == []

    words = {"un": "un", "##told": "told"}  # as word pieces are read: with a space before each but those of "##"
    read = lambda *ids: " ".join(ids).replace(" ##", "")  # noqa: E731
    assert engine.pieces_of(read, [*words, "story"]) == ["un", "told", " story"]


def test_examples_fit_the_model(space, engine, stories):
    examples = space["app"].EXAMPLES
    start = engine.canvas(stories, examples["Fill a gap"], 0)
    first, last_ = start.index(stories.mask), len(start) - start[::-1].index(stories.mask)
    assert 60 <= len(start) <= 100 and 16 <= start.count(stories.mask) == last_ - first <= 24
    assert 20 < first and last_ < len(start) - 20
    assert len(engine.canvas(stories, examples["Continue"], 0)) == stories.longest
    assert set(engine.canvas(stories, examples["From nothing"], 0)) == {stories.mask}


def test_the_judge_is_the_scorer_and_not_the_energy(space, stories, tmp_path):
    """A causal model in `ar` beside an AR energy is that energy; a repo may have neither."""
    judge = load_file(STORIES / "judge" / "model.safetensors")
    weights = stories.scorer.state_dict()
    assert all(torch.equal(weights[name], value.float()) for name, value in judge.items())
    assert stories.model.energy_type == "ar" and not stories.scores_itself
    folder = shutil.copytree(STORIES, tmp_path / "model", copy_function=os.symlink)
    (folder / "judge").rename(folder / "ar")
    assert space["models"].Loaded(str(folder)).scores_itself
    shutil.rmtree(folder / "ar")
    without = space["models"].Loaded(str(folder))
    assert without.scorer is None and not without.scores_itself


# ---- what it refuses, and how a run ends


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_steps": 0}, "num_steps must be a whole number from 1 to 256, got 0"),
        ({"num_steps": 257}, "num_steps must be a whole number from 1 to 256, got 257"),
        ({"num_steps": 2.5}, "got 2.5"),
        ({"num_steps": float("nan")}, "got nan"),
        ({"num_steps": "many"}, "got 'many'"),
        ({"num_steps": True}, "got True"),
        ({"num_candidates": 17}, "num_candidates must be a whole number from 1 to 16, got 17"),
        ({"window_low": -0.1}, "window_low must be a number from 0 to 1, got -0.1"),
        ({"window_high": 1.1}, "window_high must be a number from 0 to 1, got 1.1"),
        ({"window_high": "all"}, "window_high must be a number from 0 to 1, got 'all'"),
        ({"window_high": 0.2, "window_low": 0.4}, "window_high must be at least window_low, got 0.2 and 0.4"),
        ({"shared_completion": 1}, "shared_completion must be true or false, got 1"),
        ({"temperature": 0}, "temperature must be a number from 0.05 to 4, got 0"),
        ({"temperature": float("inf")}, "got inf"),
        ({"seed": -2}, "seed must be a whole number from 0 to 2147483647, got -2"),
        ({"length": 257}, "length must be a whole number from 1 to 256, got 257"),
        ({"length": 3}, "length must leave room after the text, which has 8 tokens, got 3"),
    ],
)
def test_settings_out_of_bounds(space, engine, loaded, changes, message):
    with pytest.raises(space["limits"].Refused, match=re.escape(message)):
        engine.write(loaded, "the city", settings(engine, **changes))


@pytest.mark.parametrize(
    "text, message",
    [
        ("a" * 257, "text must have at most 256 tokens for this model, got 257"),
        ("a[MASK 9999]", "text must have at most 256 tokens"),
        ("[MASK 9999]" * 100, "text must have at most 256 tokens"),
        ("a" * 8193, "text must have at most 8192 characters, got 8193"),
        (None, "text must be a text, got None"),
    ],
)
def test_texts_that_do_not_fit(space, engine, loaded, text, message):
    with pytest.raises(space["limits"].Refused, match=re.escape(message)):
        engine.write(loaded, text, settings(engine))


def test_nothing_and_gaps_are_not_scored(space, engine, loaded):
    for text, message in (("  ", "got an empty text"), ("a[MASK 2]b", "got 2 [MASK]")):
        with pytest.raises(space["limits"].Refused, match=re.escape(message)):
            engine.score(loaded, text, settings(engine))


def test_only_listed_models_are_loaded(space, monkeypatch):
    monkeypatch.setenv("EDLM_REPO", "user/mine")
    monkeypatch.setenv("EDLM_ALLOWED", "user/second, user/third")
    models = space["models"]
    assert models.allowed() == ["user/mine", "user/second", "user/third"]
    monkeypatch.setattr(models, "Loaded", lambda name: name)
    assert models.Models().get() == "user/mine" and models.Models().get("user/third") == "user/third"
    for name in ("user/evil", "/etc", str(MODEL), "../hub_cards/edlm-wiki27"):
        with pytest.raises(space["limits"].Refused, match=f"got {re.escape(repr(name))}".replace("...", "")[:30]):
            models.Models().get(name)


def test_without_a_model_it_says_what_to_set(space, monkeypatch, tmp_path):
    monkeypatch.delenv("EDLM_REPO", raising=False)
    monkeypatch.setattr(space["models"], "NEARBY", tmp_path / "none")
    with pytest.raises(space["limits"].Refused, match="set the variable EDLM_REPO"):
        space["models"].Models().get()
    assert "EDLM_REPO" in space["app"].meet("")[0]
    (tmp_path / "README.md").write_text("---\nmodels: [user/named, user/too]\n---\n")
    monkeypatch.setattr(space["models"], "CARD", tmp_path / "README.md")
    assert space["models"].allowed() == [
        "user/named",
        "user/too",
    ]  # as `hub_cards.publish.push --space --base` writes it


def test_closing_stops_within_a_step(engine, loaded, monkeypatch):
    """The thread that works takes no further step once its reader is gone, and gives the model back."""
    taken, here, on = [], threading.Event(), threading.Event()
    step_end = engine.Recorder.step_end

    def slow(self, *args):
        taken.append(1)
        here.set()
        on.wait(30)
        step_end(self, *args)

    monkeypatch.setattr(engine.Recorder, "step_end", slow)
    runs = engine.write(loaded, "", settings(engine, num_steps=200, length=200))
    next(runs)
    assert here.wait(30)
    runs.close()
    on.set()
    assert loaded.lock.acquire(timeout=30)
    loaded.lock.release()
    assert len(taken) == 1


@pytest.mark.parametrize("what", ["write", "inspect", "compare", "score"])
def test_time_limit_gives_what_there_is(space, engine, loaded, monkeypatch, what):
    """By a clock on which every call of the model takes forty seconds."""
    clock = Clock()
    monkeypatch.setattr(space["watch"], "time", clock)
    monkeypatch.setattr(space["watch"], "UNREAD_SECONDS", math.inf)
    for owner, name in ((type(loaded.model.denoiser), "propose"), (type(loaded.model), "likelihood")):
        monkeypatch.setattr(owner, name, clock.taking(40, getattr(owner, name)))
    text = "the city" if what == "score" else ""
    result = last(getattr(engine, what)(loaded, text, settings(engine)))
    run = {"inspect": result.get("run"), "compare": result.get("edlm")}.get(what, result)
    assert run["state"] == "time"
    assert run["estimates"] == {} if what == "score" else run["done"] == 1 and 0 < run["tokens"].count(None) < 24


def test_a_run_that_nobody_reads_stops(space, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(space["watch"], "time", clock)
    watch = space["watch"].Watch()
    watch.check()
    clock.now += 16
    with pytest.raises(space["watch"].Halt):
        watch.check()


def test_an_exception_is_a_message_and_the_next_request_works(space, loaded, monkeypatch, capsys):
    app = space["app"]
    monkeypatch.setattr(app.MODELS, "get", lambda name: loaded)
    monkeypatch.setattr(type(loaded.model), "generate", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(app.gr.Error, match="This request failed .ZeroDivisionError"):
        list(app.write("the city", **SHORT))
    assert "ZeroDivisionError" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(app.MODELS, "get", lambda name: loaded)
    assert last(app.write("the city", **SHORT))["state"] == "done"


def test_messages_and_hints_are_escaped(space, loaded, monkeypatch):
    app = space["app"]
    monkeypatch.setenv("EDLM_REPO", "user/mine")
    with pytest.raises(app.gr.Error, match="&lt;img"):
        list(app.write("a", model="<img src=x onerror=alert(1)>"))
    monkeypatch.setattr(app.MODELS, "ready", lambda name: loaded)
    monkeypatch.setattr(loaded.tokenizer, "decode", lambda ids, **options: "<script>")
    said = app.hint("<b>", 24, "")
    assert "&lt;script&gt;" in said and "<script>" not in said


@pytest.mark.parametrize(
    "text, start, end, expected",
    [
        ("the old city", 4, 7, "the [MASK 3] city"),
        ("the old city", 5, 5, "the [MASK 3] city"),
        ("the old city", 12, 12, "the old [MASK 4]"),
        ("", 0, 0, ""),
    ],
)
def test_erase(space, loaded, monkeypatch, text, start, end, expected):
    monkeypatch.setattr(space["app"].MODELS, "ready", lambda name: loaded)
    assert space["app"].erase(text, start, end, "") == expected


def test_erase_takes_the_space_of_a_word_piece(space, stories, monkeypatch):
    monkeypatch.setattr(space["app"].MODELS, "ready", lambda name: stories)
    assert space["app"].erase("She had a ball.", 5, 5, "") == "She[MASK 1] a ball."


# ---- the API, of a process in which nothing but the Space's folder and its requirements can be imported


def test_endpoints_are_named_and_typed(client):
    described = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(described) == {"/write", "/compare", "/inspect", "/score"}
    for endpoint in described.values():
        for parameter in endpoint["parameters"]:
            assert parameter["python_type"]["type"] in ("str", "int", "float", "bool"), parameter


@pytest.mark.parametrize("name", ["write", "compare", "inspect", "score"])
def test_every_argument_is_described(space, name):
    function = getattr(space["app"], name)
    for argument in inspect.signature(function).parameters:
        assert re.search(rf"^ +(\w+, )*{argument}(, \w+)*: ", function.__doc__, re.MULTILINE), argument


def test_api_does_what_the_engine_does(client, engine, loaded):
    expected = engine.text_of(last(engine.write(loaded, "the city", settings(engine))))
    job = client.submit("the city", **SHORT, seed=3, api_name="/write")
    result = job.result()
    assert (job.outputs()[-1]["text"], job.outputs()[-1]["masked"]) == (expected, 0)
    assert result in job.outputs()
    found = client.submit("the city", **SHORT, seed=3, step=2, api_name="/inspect")
    found.result()
    found = found.outputs()[-1]
    assert len(found["choice"]["candidates"]) == 4 and found["choice"]["step"] == 2 and found["run"]["text"] == expected
    both = client.submit("the city", **SHORT, seed=3, api_name="/compare")
    both.result()
    both = both.outputs()[-1]
    assert both["edlm"]["text"] == expected and both["facts"]["mdlm"]["energy_nfe"] == 0
    scored = client.submit("the city", num_steps=6, num_candidates=2, api_name="/score")
    scored.result()
    assert scored.outputs()[-1]["estimates"]["sampler"]["bits"] > 0


def test_api_names_what_is_wrong(client):
    with pytest.raises(AppError, match="num_steps must be a whole number from 1 to 256, got 1000"):
        client.predict("the city", num_steps=1000, api_name="/write")
    with pytest.raises(AppError, match="window_high must be at least window_low, got 0.5 and 0.8"):
        client.predict("the city", window_high=0.5, api_name="/write")
    with pytest.raises(AppError, match="shared_completion must be 'model', 'yes' or 'no', got 'maybe'"):
        client.predict("the city", shared_completion="maybe", api_name="/write")
    with pytest.raises(AppError, match="model must be one of"):
        client.predict("the city", model="user/evil", api_name="/write")
    assert client.predict("the city", **SHORT, api_name="/write")


def test_twenty_visitors_at_once(server, engine, loaded):
    """Each gets the text of its own prompt and seed, or is told that the queue is full."""
    prompts = [f"the {letter} of" for letter in "abcdefghijklmnopqrst"]

    def visit(i: int) -> str:
        job = Client(server.url, verbose=False).submit(prompts[i], **SHORT, seed=i, api_name="/write")
        try:
            job.result()
        except Exception as error:
            return str(error)
        return job.outputs()[-1]["text"]

    with ThreadPoolExecutor(20) as visitors:
        answers = list(visitors.map(visit, range(20)))
    written = [i for i, answer in enumerate(answers) if "Queue is full" not in answer]
    for i in written:
        expected = last(engine.write(loaded, prompts[i], settings(engine, seed=i)))
        assert answers[i] == engine.text_of(expected)
    assert len(written) >= sys.modules["limits"].MAX_QUEUE


def test_memory_is_flat(server, client):
    """A hundred requests after the first twenty add less than 16 MB to a process of several hundred.

    bench/space_load.py sends more of them.
    """
    request = {"num_steps": 2, "num_candidates": 2, "length": 16, "api_name": "/write"}
    for _ in range(20):
        client.predict("the", **request)
    before = server.resident_mb()
    for _ in range(100):
        client.predict("the", **request)
    assert server.resident_mb() - before < 16


def test_requirements_and_card():
    """The card is what a Space's card must be, and asks for the Gradio that the tests ran with."""
    import gradio
    from huggingface_hub import SpaceCard

    data = SpaceCard.load(SPACE / "README.md").data
    assert data.sdk == "gradio" and data.sdk_version == gradio.__version__ and (SPACE / data.app_file).is_file()
    assert len(data.short_description) <= 60 and data.license == "apache-2.0"


def test_screenshots_are_small():
    shots = sorted((SPACE / "screenshots").glob("*.png"))
    assert {"write", "compare", "inside", "score", "phone", "dark"} <= {path.stem for path in shots}
    assert all(path.stat().st_size < 200_000 for path in shots)
