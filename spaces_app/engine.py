"""What the page does with a model: write, compare, look inside, score. Knows no Gradio.

Each is an iterator of plain data (what JSON can hold) that grows while the model works; the last one is the result.
A run is a dictionary:

    tokens      pieces of text, None where it is masked     given       whether each was in the visitor's text
    step        the step that revealed it, None otherwise   p           its probability under the proposal at that step
    num_steps, done      steps in all, and taken            nfe, energy_nfe, seconds, seed
    acted       steps at which the energy chose             state       running, done, stopped or time
    revised     [step, place, piece before] of each change of the corrector, whose rounds are the last steps

A special token is the empty piece. So is what comes after an EOS; where that was still masked, it counts as revealed by
the step of the EOS, with p 1.
"""

import itertools
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from limits import MAX_CANDIDATES, MAX_SEED, MAX_STEPS, MAX_TEMPERATURE, SECONDS, Refused, number, shown, whole, words
from models import Loaded
from watch import Halt, Watch

MARK = re.compile(r"\[MASK(?: (\d{1,4}))?\]")  # [MASK 12] is twelve
SHOWN_TOKENS = 200_000  # of candidates, in one answer
ESTIMATORS = ("sampler", "mdlm", "paper")
ROUNDS, DRAWS = 8, 4  # of the likelihood's states: rounds of so many
SAMPLES = 8  # inner ones for each state


@dataclass(frozen=True)
class Settings:
    """How to sample; the names are those of the model's generate(), which has their meaning.

    window_high, window_low: the two ends of its energy_window.

    Raises:
        Refused: a value out of range.
    """

    num_steps: int
    num_candidates: int
    window_high: float
    window_low: float
    shared_completion: bool
    temperature: float = 1.0
    seed: int = 0
    length: int = 0

    def __post_init__(self):
        set_ = object.__setattr__
        set_(self, "num_steps", whole("num_steps", self.num_steps, 1, MAX_STEPS))
        set_(self, "num_candidates", whole("num_candidates", self.num_candidates, 1, MAX_CANDIDATES))
        set_(self, "window_high", number("window_high", self.window_high, 0, 1))
        set_(self, "window_low", number("window_low", self.window_low, 0, 1))
        if self.window_high < self.window_low:
            raise Refused(
                f"window_high must be at least window_low, got {self.window_high:g} and {self.window_low:g}: time runs "
                "from 1 to 0"
            )
        if not isinstance(self.shared_completion, bool):
            raise Refused(f"shared_completion must be true or false, got {shown(self.shared_completion)}")
        set_(self, "temperature", number("temperature", self.temperature, 0.05, MAX_TEMPERATURE))
        set_(self, "seed", whole("seed", self.seed, 0, MAX_SEED))

    @classmethod
    def of(cls, loaded: Loaded, **given) -> "Settings":
        """The model's own where a value is None or left out."""
        return cls(**own(loaded) | {name: value for name, value in given.items() if value is not None})

    @property
    def energy_window(self) -> tuple[float, float]:
        return self.window_high, self.window_low


def own(loaded: Loaded) -> dict:
    """How the model's generation_config.json says to sample, as far as this Space allows it."""
    config = loaded.model.generation_config
    high, low = config.energy_window
    return {
        "num_steps": min(config.num_steps, MAX_STEPS),
        "num_candidates": min(config.most_candidates, MAX_CANDIDATES),
        "window_high": high,
        "window_low": low,
        "shared_completion": config.shared_completion,
        "temperature": min(float(config.temperature), MAX_TEMPERATURE),
    }


def tokenize(loaded: Loaded, text: str, name: str = "text") -> list[int]:
    """Token ids, with the mask where the text has [MASK] or, for several, [MASK 12].

    Where a token begins with the space before its word, a space before a gap or at the end is left to the token that
    will be there.
    """
    ids, pieces = [], MARK.split(words(name, text))
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            ids += loaded.ids(piece.removesuffix(" ") if loaded.joins_spaces else piece)
        else:
            ids += [loaded.mask] * min(int(piece or 1), loaded.longest + 1)
    if len(ids) > loaded.longest:
        raise Refused(f"{name} must have at most {loaded.longest} tokens for this model, got {len(ids)}")
    return ids


def canvas(loaded: Loaded, text: str, length: int) -> list[int]:
    """The start: the text with masks in its gaps, or without gaps, masks after it up to the length (0: longest)."""
    ids = tokenize(loaded, text)
    ids = ids if text.strip() else []  # blanks alone are no beginning
    if loaded.mask in ids:
        return ids
    length = whole("length", length, 1, loaded.longest) if length else loaded.longest
    if len(ids) >= length:
        raise Refused(f"length must leave room after the text, which has {len(ids)} tokens, got {length}")
    return ids + [loaded.mask] * (length - len(ids))


class Recorder:
    """Takes down one run of generate() while it happens, and ends it when the watch says so.

    report: called with the run after each step. candidates: how many tokens of candidates to keep, None for no look
    inside; those of the steps nearest to `near` are kept first.
    """

    def __init__(self, loaded, start, settings, watch, report, candidates=None, near=0):
        self.loaded, self.settings, self.watch, self.report = loaded, settings, watch, report
        self.xt_L, self.known = torch.tensor(start), {}
        self.room, self.near, self.logits = candidates, near, []
        self.rounds = rounds(loaded, settings)
        given = [i != loaded.mask for i in start]
        self.tail = max((i + 1 for i, is_given in enumerate(given) if is_given), default=0)  # after the last given one
        self.run = {
            "tokens": self.pieces(start),
            "given": given,
            "step": [None] * len(start),
            "p": [None] * len(start),
            "num_steps": settings.num_steps + self.rounds,
            "done": 0,
            "nfe": 0,
            "energy_nfe": 0,
            "seconds": 0.0,
            "seed": settings.seed,
            "acted": [],
            "revised": [],
            "state": "running",
        }
        self.choices = []

    def generate(self) -> dict:
        settings, began = self.settings, time.monotonic()
        self.began = began
        self.report(self.run)
        try:
            output = self.loaded.model.generate(
                self.xt_L[None].to(self.loaded.model.device),
                max_length=len(self.xt_L),
                num_steps=settings.num_steps,
                num_candidates=settings.num_candidates,
                energy_window=settings.energy_window,
                shared_completion=settings.shared_completion,
                temperature=settings.temperature,
                seed=settings.seed,
                logits_processor=[self.see],
                callback_on_step_end=self.step_end,
                return_dict_in_generate=True,
            )
        except Halt as halt:
            self.run["state"] = str(halt)
        else:
            self.run |= {"state": "done", "energy_nfe": int(output.energy_nfe[0])}
        self.run["seconds"] = time.monotonic() - began
        return self.run

    def see(self, states_ML, logits_MV, positions):
        """Called with the proposal's logits before something is drawn; they stay as they are."""
        self.watch.check()
        self.logits.append((positions.cpu(), logits_MV))
        return logits_MV

    def step_end(self, model, step, t, state) -> None:
        """Called after each step, with the canvas and what the energy chose from."""
        xt_L, run = state["sequences"][0].cpu(), self.run
        now_L = xt_L != self.xt_L
        for positions_M, logits_MV in self.logits:
            is_now_M = now_L[positions_M]
            at_M = positions_M[is_now_M]
            p_MV = (logits_MV[is_now_M.to(logits_MV.device)].float() / self.settings.temperature).softmax(-1).cpu()
            for i, p in zip(at_M.tolist(), p_MV.gather(-1, xt_L[at_M, None])[:, 0].tolist(), strict=True):
                if step >= self.settings.num_steps:
                    run["p"][i] = round(p, 3)
                elif run["step"][i] is None:  # otherwise an EOS before it has come first
                    run["p"][i], run["step"][i] = round(p, 3), step
        before, run["tokens"] = run["tokens"], self.pieces(xt_L.tolist())
        if step >= self.settings.num_steps:
            pieces = enumerate(zip(before, run["tokens"], strict=True))
            run["revised"] += [[step, i, old] for i, (old, new) in pieces if old != new]
        for i, piece in enumerate(run["tokens"]):
            if piece is not None and not run["given"][i] and run["step"][i] is None:  # padding from now on
                run["p"][i], run["step"][i] = 1.0, step
        run["nfe"] += bool(self.logits)
        self.logits, self.xt_L = [], xt_L.clone()
        if "energies" in state:
            run["acted"].append(step)
            # of an AR energy the text that is revised has been scored by the round before
            is_known = step > self.settings.num_steps and model.energy_type == "ar"
            run["energy_nfe"] += state["candidates"][0][is_known:].unique(dim=0).shape[0]
            if self.room is not None:
                self.choices.append(self.choice(step, t, state))
                self.thin()
        run |= {"done": step + 1, "seconds": time.monotonic() - self.began}
        self.report(run)
        self.watch.check()

    def choice(self, step: int, t: float, state: dict) -> dict:
        """What the energy saw and did at one step."""
        energies_K = state["energies"][0].double().cpu()
        weights_K = (-energies_K).softmax(-1)
        return {
            "step": step,
            "t": t,
            "energies": [round(e, 3) for e in energies_K.tolist()],
            "weights": [round(w, 6) for w in weights_K.tolist()],
            "kept": int(state["kept"][0]),
            "ess": float(1 / weights_K.square().sum()),
            "ids": state["candidates"][0].cpu().to(torch.int32),
        }

    def thin(self) -> None:
        """Forget the candidates that are farthest from the step that was asked for, down to what an answer holds."""
        held = [choice for choice in self.choices if "ids" in choice]
        while sum(choice["ids"].numel() for choice in held) > self.room:
            farthest = max(held, key=lambda choice: abs(choice["step"] - self.near))
            del farthest["ids"]
            held.remove(farthest)

    def inside(self) -> list[dict]:
        """The choices, with the candidates as pieces of text; None for those that were forgotten."""
        found = [dict(choice) for choice in self.choices]
        for choice in found:
            rows = choice.pop("ids").tolist() if "ids" in choice else None
            choice["candidates"] = rows and [self.pieces(row) for row in rows]
        return found

    def pieces(self, ids: list[int]) -> list[str | None]:
        """The text of each token, None for the mask; nothing for special tokens and, after an EOS, for the padding."""
        end = self.end(ids)
        text, runs = [], itertools.groupby(ids[:end], lambda i: i == self.loaded.mask)
        for is_mask, run in [(is_mask, list(run)) for is_mask, run in runs]:
            text += [None] * len(run) if is_mask else pieces_of(self.read, run)
        return text + [""] * (len(ids) - end)

    def read(self, *ids: int) -> str:
        if ids not in self.known:
            self.known[ids] = self.loaded.text(list(ids))
        return self.known[ids]

    def end(self, ids: list[int]) -> int:
        """How long the text is: up to the first EOS after what was given, that included."""
        return next((i + 1 for i in range(self.tail, len(ids)) if ids[i] in self.loaded.ends), len(ids))


def rounds(loaded: Loaded, settings: Settings) -> int:
    """Of the model's own corrector; plain masked diffusion has none."""
    is_plain = settings.num_candidates == 1 or loaded.model.energy_type == "none"
    return 0 if is_plain else loaded.model.generation_config.corrector_steps


def copied(run: dict) -> dict:
    """A run as it is now; the recorder goes on to change its own."""
    return {key: list(value) if isinstance(value, list) else value for key, value in run.items()}


def pieces_of(read: Callable[..., str], ids: Iterable[int]) -> list[str]:
    """What each token adds to the text that `read` makes of those before it. Of a character of several tokens, as in a
    BPE of bytes, the last one has all.
    """
    pieces, before, now = [], (), ()
    for i in ids:
        now += (i,)
        head, whole = read(*before), read(*before, *now)
        pieces.append(whole[len(head) :] if whole.startswith(head) else read(*now))
        pieces[-len(now) : -1] = [""] * (len(now) - 1)
        if not pieces[-1].endswith("\ufffd"):
            before, now = now, ()
    return pieces


def text_of(run: dict, mask: str = "[MASK]") -> str:
    return "".join(mask if piece is None else piece for piece in run["tokens"])


def write(loaded: Loaded, text: str, settings: Settings, seconds: float = SECONDS) -> Iterator[dict]:
    """Runs of one text, from the empty canvas to the last step."""
    start = canvas(loaded, text, settings.length)

    def work(watch: Watch) -> None:
        run = Recorder(loaded, start, settings, watch, lambda run: watch.post(copied(run))).generate()
        watch.post(run)

    return Watch(seconds).results(work, loaded.lock)


def inspect(loaded: Loaded, text: str, settings: Settings, step: int = 0, seconds: float = SECONDS) -> Iterator[dict]:
    """{"run", "choices"}: a run and, when it is over, what the energy chose from at its steps."""
    start = canvas(loaded, text, settings.length)
    near = whole("step", step, 0, settings.num_steps + rounds(loaded, settings) - 1)

    def work(watch: Watch) -> None:
        recorder = Recorder(
            loaded,
            start,
            settings,
            watch,
            lambda run: watch.post({"run": copied(run), "choices": [], "step": near}),
            SHOWN_TOKENS,
            near,
        )
        run = recorder.generate()
        watch.post({"run": run, "choices": recorder.inside(), "step": near})

    return Watch(seconds).results(work, loaded.lock)


def compare(
    loaded: Loaded, text: str, settings: Settings, equal: str = "denoiser calls", seconds: float = SECONDS
) -> Iterator[dict]:
    """{"mdlm", "edlm"}: two runs of one seed, without the energy and with it; "facts" of each when both are over.

    equal: "denoiser calls", as many steps as EDLM has, its rounds of revision too; "seconds", MDLM gets the steps that
        take as long as EDLM's.
    """
    if equal not in ("denoiser calls", "seconds"):
        raise Refused(f"equal must be 'denoiser calls' or 'seconds', got {equal!r}")
    start = canvas(loaded, text, settings.length)

    def work(watch: Watch) -> None:
        shown = {"mdlm": None, "edlm": None, "facts": None}

        def run(name: str, **changes) -> dict:
            def report(run: dict) -> None:
                shown[name] = copied(run)
                watch.post(dict(shown))

            recorders[name] = Recorder(loaded, start, Settings(**vars(settings) | changes), watch, report)
            return recorders[name].generate()

        recorders = {}
        shown["edlm"] = run("edlm")
        plain = {"num_candidates": 1}
        if equal == "denoiser calls":
            plain["num_steps"] = min(MAX_STEPS, shown["edlm"]["num_steps"])
        if equal == "seconds" and shown["edlm"]["state"] == "done":
            began, mdlm_steps = time.monotonic(), settings.num_steps
            # a first run at EDLM's own steps tells how long a step takes; the second one is shown
            run("mdlm", **plain)
            ratio = shown["edlm"]["seconds"] / max(time.monotonic() - began, 1e-6)
            plain["num_steps"] = min(MAX_STEPS, max(1, round(mdlm_steps * ratio)))
        if shown["edlm"]["state"] == "done":
            shown["mdlm"] = run("mdlm", **plain)
        if shown["mdlm"] is not None and shown["mdlm"]["state"] == "done":
            shown["facts"] = {name: facts(start, recorders[name]) for name in ("mdlm", "edlm")}
        watch.post(shown)

    return Watch(seconds).results(work, loaded.lock)


@torch.no_grad()
def facts(start: list[int], recorder: Recorder) -> dict:
    """What can be said of a finished text: its cost, its length, its energy, bits per character, entropy."""
    loaded, model, device = recorder.loaded, recorder.loaded.model, recorder.loaded.model.device
    tokens = recorder.end(recorder.xt_L.tolist())  # the rest is padding, or was not filled
    x_1L = recorder.xt_L[None, :tokens].to(device)
    xt_1L = torch.tensor([start[:tokens]], device=device)
    time_of = 1.0 if model.config.energy_target == "x0" else 0.0  # of xt, or of what it became
    counts = torch.unique(x_1L, return_counts=True)[1].double() / x_1L.shape[1]
    result = {name: recorder.run[name] for name in ("num_steps", "nfe", "energy_nfe", "seconds")}
    return result | {
        "tokens": tokens,
        "energy": float(model.energy(x_1L, xt_1L, time_of)[0]) if model.energy_type != "none" else None,
        "bits_per_character": bits_per_character(loaded, x_1L),
        "entropy": float(-(counts * counts.log2()).sum()),
    }


@torch.no_grad()
def bits_per_character(loaded: Loaded, x_1L: torch.Tensor) -> float | None:
    """Of a whole text under the repo's causal model, exactly; None without one, or for a text of no characters."""
    characters = len(loaded.text(x_1L[0].tolist()))
    if loaded.scorer is None or not characters:
        return None
    bos_11 = torch.full_like(x_1L[:, :1], loaded.scorer.config.bos_token_id)
    logits_LV = loaded.scorer(torch.cat((bos_11, x_1L[:, :-1]), dim=1)).logits[0].float()
    if loaded.mask < logits_LV.shape[-1]:
        logits_LV[:, loaded.mask] = -torch.inf  # no text holds it
    nats = torch.nn.functional.cross_entropy(logits_LV, x_1L[0], reduction="sum").double()
    return float(nats / math.log(2) / characters)


def score(loaded: Loaded, text: str, settings: Settings, seconds: float = SECONDS) -> Iterator[dict]:
    """Bits per character of a given text by each estimator, with standard errors that shrink from round to round."""
    ids = tokenize(loaded, text)
    if not ids or not text.strip():
        raise Refused("text must hold something to score, got an empty text")
    if loaded.mask in ids:
        raise Refused(f"text must have no gaps to be scored, got {ids.count(loaded.mask)} [MASK]")
    x_1L = torch.tensor([ids], device=loaded.model.device)
    characters = len(loaded.text(ids))

    def work(watch: Watch) -> None:
        model, result = loaded.model, {"characters": characters, "tokens": len(ids), "rounds": ROUNDS, "done": 0}
        result |= {"state": "running", "ar": bits_per_character(loaded, x_1L), "estimates": {}}
        common = {"num_times": DRAWS, "energy_batch_size": 16, "denoiser_batch_size": DRAWS}
        sampler = {  # before any revision, and of the proposal as it is
            "corrector_steps": 0,
            "temperature": 1.0,
            "num_steps": settings.num_steps,
            "num_candidates": settings.num_candidates,
            "energy_window": settings.energy_window,
            "shared_completion": settings.shared_completion,
        }
        arguments = {"sampler": sampler | {"num_samples": SAMPLES}, "mdlm": {}, "paper": {"num_samples": SAMPLES}}
        if model.energy_type == "none" or model.config.energy_target != "x0":
            del arguments["paper"]
        sums = {name: (0.0, 0.0, 0.0) for name in arguments}
        watch.post(dict(result))
        try:
            for done in range(1, ROUNDS + 1):
                for name, own in arguments.items():
                    watch.check()
                    seed = (settings.seed * ROUNDS + done - 1) % MAX_SEED
                    output = model.likelihood(x_1L, estimator=name, seed=seed, **common, **own)
                    per = math.log(2) * characters
                    gain = float(output.gain[0]) / per if output.gain is not None else 0.0
                    now = float(output.nll[0]) / per, (float(output.stderr[0]) / per) ** 2, gain
                    sums[name] = tuple(a + b for a, b in zip(sums[name], now, strict=True))
                estimates = {
                    name: {"bits": total / done, "stderr": math.sqrt(squares) / done, "gain": gain / done}
                    for name, (total, squares, gain) in sums.items()
                }
                result |= {"done": done, "estimates": estimates}
                watch.post(dict(result))
        except Halt as halt:
            result["state"] = str(halt)
        else:
            result["state"] = "done"
        watch.post(dict(result))

    return Watch(seconds).results(work, loaded.lock)
