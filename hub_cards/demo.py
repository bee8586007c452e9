"""Watch EDLM write: the opening of a story, then a gap in the middle of one, each without the energy and with it.

    python hub_cards/demo.py --model hub_cards/edlm-stories

A masked diffusion model (MDLM) fills all blanks of a text in parallel, some at each step. EDLM (arXiv 2410.21357) lets
it propose several versions, and an energy, a network that reads the whole text, chooses one: at a step, or when the
text is complete and is revised. Both may spend the same number of network passes, of which MDLM can use one for each
blank. At the end a judge, a model that had no part in the texts, compares many of them.

Everything comes from the model folder, the code too, as it would from the Hub: the package is not imported.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import logging
import math
import os
import platform
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:  # these take seconds to import: --help and a wrong value are answered without them
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPT = "Once upon a time, there was a little girl named Lily. She"
GAP = (
    "Tom had a red ball. He loved to play with it in the park. One day, the ball rolled into the pond. [MASK 24] Tom "
    'was so happy to have his ball back. He said, "Thank you!" and gave the dog a big hug.'
)
NEW_TOKENS = 56  # of the story's opening
SAMPLES = 16  # that the verdict is about, of each sampler
SURE = 2  # standard errors that make a difference
MARK = re.compile(r"\[MASK(?: (\d{1,4}))?\]")  # [MASK 12] is twelve
FRAME_SECONDS = 1 / 15
MAX_WIDTH = 100
GIVEN, MASK, NEW, OLD = "1", "2", "1;32", ""  # ANSI styles: bold, dim, bold green, none
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[0m\x1b[?25h"


class Canvas:
    """Shows a text being unmasked: redrawn in place in a terminal, elsewhere printed about five times.

    Args:
        start: token ids before the first step. label: stands before the progress bar.
        window: (hi, lo), the times at which an energy acts; None for never. rounds: of revision, after the steps.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mask_token_id: int,
        start: list[int],
        num_steps: int,
        label: str,
        window: tuple[float, float] | None,
        rounds: int = 0,
    ):
        self.mask, self.start, self.num_steps, self.label, self.window = mask_token_id, start, num_steps, label, window
        self.total = num_steps + rounds
        self.eos = tokenizer.eos_token_id
        self.live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.color = self.live and not os.environ.get("NO_COLOR")
        self.read = functools.cache(lambda *ids: tokenizer.decode(list(ids), skip_special_tokens=True))
        self.snapshots = {round(num_steps * quarter / 4) for quarter in range(5)}  # and the text after its revision
        self.shown, self.height = start, 0  # the last frame: its tokens, its lines
        self.last = self.seconds = 0.0  # when it was drawn; what all drawing took

    def callback(self, model: PreTrainedModel, step: int, t: float, state: dict[str, torch.Tensor]) -> None:
        """For `generate(callback_on_step_end=...)`. Steps that come too fast for a frame of their own get none."""
        done = step + 1
        if self.live:
            is_due = time.perf_counter() - self.last >= FRAME_SECONDS
        else:
            is_due = done in self.snapshots
        if is_due and done < self.total:
            ids = state["sequences"][0].tolist()  # waits for the device: that is sampling, not drawing
            started = time.perf_counter()
            in_window = self.window is not None and self.window[1] - 1e-9 <= t <= self.window[0] + 1e-9
            self.draw(ids, done, in_window or done > self.num_steps)
            self.seconds += time.perf_counter() - started

    def draw(self, ids: list[int], done: int, energy_acts: bool = False) -> None:
        """The state after `done` steps. What follows the end of the text is not shown."""
        size = shutil.get_terminal_size((MAX_WIDTH, 24))
        width = max(10, min(MAX_WIDTH, size.columns - 1))
        cells = []
        for token, piece, before, first in zip(ids, self.pieces(ids), self.shown, self.start, strict=True):
            if token == self.eos and first == self.mask:
                break
            is_new = before != token and done < self.total  # the finished text has no marks of the last step
            style = MASK if token == self.mask else GIVEN if first != self.mask else NEW if is_new else OLD
            cells += [(character, style) for character in printable(piece)]
        lines = [self.paint(line) for line in wrapped(cells, width)]
        progress = f"{done}/{self.num_steps} t={1 - done / self.num_steps:.2f}"
        if done > self.num_steps:
            progress = f"revision {done - self.num_steps}/{self.total - self.num_steps}"
        if not self.live:
            print(f"-- {self.label} {progress}", *lines, sep="\n", flush=True)
            return
        head, tail = f"{self.label} |", f"| {progress} {'energy chooses' if energy_acts else ''}"
        room = max(0, width - len(head) - len(tail))
        if done < self.total:  # a cursor does not go up past the top of the screen; the finished text may be longer
            lines = lines[-max(1, size.lines - 3) :]
        lines.append((head + ("#" * (room * done // self.total)).ljust(room, "-") + tail)[:width])
        up = f"\x1b[{self.height}A\r" if self.height else HIDE_CURSOR
        sys.stdout.write(up + "".join(f"\x1b[2K{line}\n" for line in lines) + "\x1b[J")
        sys.stdout.flush()
        self.shown, self.height, self.last = ids, len(lines), time.perf_counter()

    def pieces(self, ids: list[int]) -> list[str]:
        """What each token adds to the text before it; a character of several tokens, as in a BPE of bytes, is the last
        one's. A mask is a point.
        """
        pieces, before, now = [], (), ()
        for token in ids:
            if token == self.mask:
                pieces.append(" .")
                before = now = ()
                continue
            now += (token,)
            head, whole = self.read(*before), self.read(*before, *now)
            pieces.append(whole[len(head) :] if whole.startswith(head) else self.read(*now))
            pieces[-len(now) : -1] = [""] * (len(now) - 1)
            if not pieces[-1].endswith("\ufffd"):
                before, now = now, ()
        return pieces

    def paint(self, cells: list[tuple[str, str]]) -> str:
        """One line of (character, style); neighbours of one style share an escape sequence."""
        runs = [
            (style, "".join(c for c, _ in run)) for style, run in itertools.groupby(cells, key=lambda cell: cell[1])
        ]
        return "".join(f"\x1b[{style}m{text}\x1b[0m" if style and self.color else text for style, text in runs)

    def close(self) -> None:
        if self.live:
            sys.stdout.write(SHOW_CURSOR)
            sys.stdout.flush()


def wrapped(cells: list[tuple[str, str]], width: int) -> list[list[tuple[str, str]]]:
    """Lines of at most `width` cells, broken at spaces where there are any."""
    lines = []
    while len(cells) > width:
        cut = next((i for i in range(width, 0, -1) if cells[i][0] == " "), width)
        lines.append(cells[:cut])
        cells = cells[cut + (cells[cut][0] == " ") :]
    return [*lines, cells]


def printable(text: str) -> str:
    """Sampled text must not steer the terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


class Judge:
    """A causal model of the folder that is not the energy, and the words that its training text has, where listed."""

    def __init__(self, folder: Path, part: str, device: str):
        from transformers import AutoModelForCausalLM

        # configuration and weights from the subfolder, code from the folder itself
        self.model = AutoModelForCausalLM.from_pretrained(folder, subfolder=part, trust_remote_code=True)
        self.model.to(device).eval()
        words = folder / part / "words.txt"
        self.words = set(words.read_text(encoding="utf-8").split()) if words.is_file() else None

    def read(self, ids_BL: torch.Tensor, start_L: list[int], tokenizer) -> dict[str, list[float]]:
        """Of each text: bits and characters of the first blank and all that follows, and the share of known words."""
        import torch

        config, first = self.model.config, start_L.index(self.model.config.mask_token_id)
        eos_BL = (ids_BL == (-1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id)).long()
        within_BL = eos_BL.cumsum(-1) - eos_BL == 0
        inputs_BL = ids_BL.roll(1, dims=1)
        inputs_BL[:, 0] = config.bos_token_id
        logits_BLV = self.model(input_ids=inputs_BL).logits.float()
        logits_BLV[..., config.mask_token_id] = float("-inf")  # no text contains the mask
        log_p_BL = logits_BLV.log_softmax(-1).gather(-1, ids_BL[..., None])[..., 0]
        counted_BL = within_BL & (torch.arange(ids_BL.shape[1], device=ids_BL.device) >= first)
        bits_B = -(log_p_BL * counted_BL).sum(-1) / math.log(2)

        def text(where_BL, b):
            return tokenizer.decode(ids_BL[b, where_BL[b]], skip_special_tokens=True)

        rows = range(len(ids_BL))
        found = {"bits": bits_B.tolist(), "characters": [len(text(counted_BL, b)) for b in rows]}
        if self.words is not None:
            found["known_words"] = [known_share(text(within_BL, b), self.words) for b in rows]
        return found


def known_share(text: str, words: set[str]) -> float:
    """The first and the last word may be cut and do not count."""
    own = re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*", text.lower())[1:-1]
    return sum(word in words for word in own) / max(1, len(own))


def expected_passes(blanks: int, num_steps: int, candidates_at: Callable[[float], int] = lambda t: 1) -> float:
    """Of both networks: a step that reveals nothing costs nothing, and more than one candidate are scored."""
    candidates = [candidates_at(1 - i / num_steps) for i in range(num_steps)]
    return (1 - (1 - 1 / num_steps) ** blanks) * (num_steps + sum(k for k in candidates if k > 1))


def revision_passes(model: PreTrainedModel) -> int:
    """A round costs a pass of the denoiser and those of the new candidates; the present text is scored once, or by an
    energy that depends on the blanks each time.
    """
    config = model.generation_config
    k, rounds = config.corrector_candidates or config.most_candidates, config.corrector_steps
    is_ar = model.energy_type == "ar"
    return rounds * (k if is_ar else 1 + k) + is_ar if rounds and k > 1 and config.most_candidates > 1 else 0


def steps_of_mdlm(model: PreTrainedModel, blanks: int, num_steps: int) -> int:
    """At which MDLM is expected to spend as many passes as EDLM with its `num_steps`, or nearly one for each blank: it
    has no use for more.
    """
    config = model.generation_config
    passes = expected_passes(blanks, num_steps, config.candidates_at) + revision_passes(model)
    return min(range(1, 8 * blanks + 1), key=lambda T: abs(expected_passes(blanks, T) - passes))


class Task:
    """A text with blanks, and how each sampler fills it."""

    def __init__(self, name: str, start: list[int], model: PreTrainedModel, options: argparse.Namespace):
        self.name, self.start, self.model, self.options = name, start, model, options
        defaults, blanks = model.generation_config, start.count(model.config.mask_token_id)
        self.rounds = {"MDLM": 0, "EDLM": defaults.corrector_steps if revision_passes(model) else 0}
        T, k = options.steps or defaults.num_steps, defaults.num_candidates
        self.settings = {"MDLM": {"num_steps": T, "num_candidates": 1}}
        if model.energy_type != "none":
            self.settings["MDLM"]["num_steps"] = steps_of_mdlm(model, blanks, T)
            self.settings["EDLM"] = {"num_steps": T, "num_candidates": k}

    def generate(self, sampler: str, **options):
        import torch

        start_1L = torch.tensor([self.start], device=self.model.device)
        return self.model.generate(start_1L, **self.settings[sampler], return_dict_in_generate=True, **options)

    def show(self, sampler: str, tokenizer: PreTrainedTokenizerBase) -> dict:
        """One text, on the screen while it is filled."""
        setting, window = self.settings[sampler], None
        if sampler == "EDLM":
            window = self.model.generation_config.energy_window
        mask, T, rounds = self.model.config.mask_token_id, setting["num_steps"], self.rounds[sampler]
        canvas = Canvas(tokenizer, mask, self.start, T, sampler, window, rounds)
        try:
            canvas.draw(self.start, 0)
            started = time.perf_counter()
            output = self.generate(sampler, seed=self.options.seed, callback_on_step_end=canvas.callback)
            seconds = time.perf_counter() - started - canvas.seconds
            canvas.draw(output.sequences[0].tolist(), T + rounds)
        finally:
            canvas.close()
        facts = {"nfe": int(output.nfe), "energy_nfe": int(output.energy_nfe), "seconds": seconds}
        print(f"{sampler}: {facts['nfe']} + {facts['energy_nfe']} passes, {seconds:.1f} s\n")
        text = tokenizer.decode(output.sequences[0], skip_special_tokens=True)
        return {"task": self.name, "sampler": sampler} | setting | facts | {"text": text}

    def judged(self, judge: Judge, tokenizer: PreTrainedTokenizerBase) -> dict:
        """What the judge says of SAMPLES texts of each sampler."""
        from tqdm import tqdm

        found = {}
        for sampler, setting in self.settings.items():
            steps = setting["num_steps"] + self.rounds[sampler]
            bar = tqdm(total=steps, desc=f"{self.name}, {sampler}, {SAMPLES} texts", leave=False)
            with bar:
                output = self.generate(
                    sampler,
                    num_return_sequences=SAMPLES,
                    seed=self.options.seed,
                    callback_on_step_end=lambda *_, bar=bar: bar.update(),
                )
            found[sampler] = judge.read(output.sequences, self.start, tokenizer)
            found[sampler]["passes"] = (output.nfe + output.energy_nfe).tolist()
        return found


def mean(values: list[float]) -> tuple[float, float]:
    """Mean and standard error."""
    average = sum(values) / len(values)
    return average, math.sqrt(sum((v - average) ** 2 for v in values) / (len(values) - 1) / len(values))


def per_character(found: dict[str, list[float]]) -> tuple[float, list[float]]:
    """Bits per character of all texts together, and what each text adds to its error."""
    bits, characters = found["bits"], found["characters"]
    ratio, average = sum(bits) / sum(characters), sum(characters) / len(characters)
    return ratio, [(b - ratio * c) / average for b, c in zip(bits, characters, strict=True)]


def verdict(found: dict[str, dict[str, list[float]]]) -> str:
    """EDLM against MDLM on the same seeds, in the words that the numbers allow."""
    (mdlm, of_mdlm), (edlm, of_edlm) = per_character(found["MDLM"]), per_character(found["EDLM"])
    gain, stderr = mdlm - edlm, mean([a - b for a, b in zip(of_mdlm, of_edlm, strict=True)])[1]
    if abs(gain) <= SURE * stderr:
        return f"no difference seen ({gain:+.2f} +- {stderr:.2f} bits per character)"
    return f"EDLM is {'better' if gain > 0 else 'worse'} by {abs(gain):.2f} +- {stderr:.2f} bits per character"


def report(judged: dict[str, dict]) -> str:
    rows = [f"{'':<8}{'sampler':<9}{'passes':>7}  {'bits per character':<20}{'known words':<14}".rstrip()]
    for task, found in judged.items():
        for sampler, values in found.items():
            ratio, errors = per_character(values)
            cells = [f"{ratio:.2f} +- {mean(errors)[1]:.2f}"]
            if "known_words" in values:
                cells.append("{:.3f} +- {:.3f}".format(*mean(values["known_words"])))
            passes = mean(values["passes"])[0]
            rows.append(f"{task:<8}{sampler:<9}{passes:>7.0f}  {cells[0]:<20}{''.join(cells[1:])}".rstrip())
    return "\n".join([*rows, *(f"{task}: {verdict(found)}" for task, found in judged.items() if "EDLM" in found)])


def with_blanks(text: str, tokenizer: PreTrainedTokenizerBase, mask: int, longest: int) -> list[int]:
    """Token ids, with the mask where the text has [MASK] or, for several, [MASK 12]."""
    ids = []
    for i, piece in enumerate(MARK.split(text)):
        if i % 2:
            ids += [mask] * int(piece or 1)
        elif piece:
            ids += tokenizer(piece, add_special_tokens=False).input_ids
    if not 0 < ids.count(mask) <= len(ids) <= longest:
        raise SystemExit(f"demo: --gap must have [MASK] and at most {longest} tokens, got {len(ids)} in {text!r}")
    return ids


def run(options: argparse.Namespace) -> None:
    folder = options.model
    missing = [name for name in ("config.json", "tokenizer.json", "modeling_edlm.py") if not (folder / name).is_file()]
    if missing:
        give_up(folder, f"no {', no '.join(missing)}")
    print(f"Loading {folder}", flush=True)
    import torch
    import transformers
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoTokenizer

    transformers.utils.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:  # torch's own words are many lines
        raise SystemExit(f"demo: --device {options.device!r} is not here: {str(error).splitlines()[0]}") from None
    judge = None
    try:
        model = AutoModel.from_pretrained(folder, trust_remote_code=True).to(options.device).eval()
        # A tokenizer without code of its own; but the library reads config.json for it, and would ask about the code.
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        parts = ["judge"] + ["ar"] * (
            model.energy_type not in ("ar", "coar")
        )  # the energy is no judge of its own texts
        if part := next((part for part in parts if (folder / part / "config.json").is_file()), None):
            judge = Judge(folder, part, options.device)
    except (OSError, ValueError, SafetensorError) as error:
        give_up(folder, str(error).splitlines()[0])
    assert "modeling_edlm" not in sys.modules, "the model folder alone must do"

    mask, longest, config = model.config.mask_token_id, model.config.max_position_embeddings, model.generation_config
    prompt = tokenizer(options.prompt, add_special_tokens=False).input_ids
    if not len(prompt) < longest:
        raise SystemExit(f"demo: --prompt must have fewer than {longest} tokens, got {len(prompt)}")
    opening = prompt + [mask] * min(NEW_TOKENS, longest - len(prompt))
    tasks = [Task("story", opening, model, options)]
    tasks.append(Task("gap", with_blanks(options.gap, tokenizer, mask, longest), model, options))
    where = torch.cuda.get_device_name(options.device) if model.device.type == "cuda" else platform.machine()
    sizes = (
        f"{model.num_parameters():,} parameters, energy {model.energy_type}, {model.dtype} on {model.device} ({where})"
    )
    print(sizes)
    hi, lo = config.energy_window
    if model.energy_type != "none" and hi > 0:
        print(f"The energy chooses among {config.most_candidates} proposals while t, from 1 to 0, is in [{lo}, {hi}].")
    if revision_passes(model):
        k, size = config.corrector_candidates or config.most_candidates, config.corrector_size
        print(
            f"{config.corrector_steps} rounds of revision: {size} tokens are masked, and the energy chooses between",
            end=" ",
        )
        print("the text and another proposal." if k == 2 else f"the text and {k - 1} other proposals.")
    print()
    samples = [task.show(sampler, tokenizer) for task in tasks for sampler in task.settings]
    judged = {}
    if judge is None:
        print(f"No verdict: {folder} has no model that could judge, in judge/ or in ar/ where that is not the energy.")
    else:
        judged = {task.name: task.judged(judge, tokenizer) for task in tasks}
        print(f"The verdict of a judge that had no part in it, over {SAMPLES} texts each:\n\n{report(judged)}")
    if options.json:
        result = {
            "command": shlex.join(["python", *sys.argv]),
            "options": {
                name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()
            },
            "config": model.config.to_dict(),
            "generation_config": config.to_dict(),
            "device": f"{model.device} ({where})",
            "dtype": str(model.dtype),
            "num_threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "samples": samples,
            "judged": judged,
        }
        temporary = options.json.with_name(f"{options.json.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(result, indent=2) + "\n")
        os.replace(temporary, options.json)


def give_up(folder: Path, reason: str) -> NoReturn:
    raise SystemExit(
        f"demo: --model {folder} is not a complete model folder: {reason}; `make model` puts the code files there"
    )


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        raise SystemExit(f"demo: {message}")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def number(text: str) -> int:
    if not re.fullmatch(r"-?\d{1,18}", text):
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}")
    return int(text)


def main() -> int:
    for name in ("torchao", "torch.utils._pytree"):  # what another package says of itself, which the demo does not use
        logging.getLogger(name).setLevel(logging.ERROR)
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "edlm-stories", help="model folder")
    parser.add_argument("--prompt", default=PROMPT, help="beginning of the story (%(default)r)")
    parser.add_argument("--gap", default=GAP, help="a text with [MASK 12] where twelve tokens are missing")
    parser.add_argument("--steps", type=positive, help="denoising steps of EDLM (the model's own)")
    parser.add_argument("--seed", type=number, default=0)
    parser.add_argument("--device", default="auto", help="auto is cuda where there is one, else cpu")
    parser.add_argument("--json", type=Path, help="write texts and numbers to this file")
    options = parser.parse_args()
    if not options.prompt.strip():
        parser.error("--prompt is empty")
    if not MARK.search(options.gap):
        parser.error(f"--gap must have [MASK] or [MASK 12] where something is missing, got {options.gap!r}")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.parent}")
    try:
        run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print()
        return 130
    except BrokenPipeError:  # whoever read has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
