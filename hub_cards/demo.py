"""Watch EDLM write: a prompt completed and a text out of nothing, each without the energy (MDLM) and with it.

    python hub_cards/demo.py --model hub_cards/edlm-wiki27

EDLM (arXiv 2410.21357): a masked diffusion model proposes all tokens in parallel, and at each step an energy of the
whole sequence chooses among k proposals. Everything comes from the model folder, the code too, as it would from the
Hub: the package `modeling_edlm` is not imported.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:  # these take seconds to import: --help and a wrong path are answered without them
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FRAME_SECONDS = 1 / 15
MAX_WIDTH = 100
GIVEN, MASK, NEW, OLD = "1", "2", "1;32", ""  # ANSI styles: bold, dim, bold green, none
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[0m\x1b[?25h"


class Canvas:
    """Shows a text being unmasked: redrawn in place in a terminal, elsewhere printed about five times.

    Args:
        start: token ids before the first step. label: stands before the progress bar.
        window: (hi, lo), the times at which an energy acts; None for never.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mask_token_id: int,
        start: list[int],
        num_steps: int,
        label: str,
        window: tuple[float, float] | None,
    ):
        self.mask, self.start, self.num_steps, self.label, self.window = mask_token_id, start, num_steps, label, window
        self.live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.color = self.live and not os.environ.get("NO_COLOR")
        self.piece = functools.cache(lambda token: printable(tokenizer.decode([token])))
        self.snapshots = {round(num_steps * quarter / 4) for quarter in range(5)}
        self.shown, self.height = start, 0  # the last frame: its tokens, its lines
        self.last = self.seconds = 0.0  # when it was drawn; what all drawing took

    def callback(self, model: PreTrainedModel, step: int, t: float, state: dict[str, torch.Tensor]) -> None:
        """For `generate(callback_on_step_end=...)`. Steps that come too fast for a frame of their own get none."""
        done = step + 1
        if done == self.num_steps:
            is_due = True
        elif self.live:
            is_due = time.perf_counter() - self.last >= FRAME_SECONDS
        else:
            is_due = done in self.snapshots
        if is_due:
            ids = state["sequences"][0].tolist()  # waits for the device: that is sampling, not drawing
            started = time.perf_counter()
            self.draw(ids, done, self.window is not None and self.window[1] - 1e-9 <= t <= self.window[0] + 1e-9)
            self.seconds += time.perf_counter() - started

    def draw(self, ids: list[int], done: int, energy_acts: bool = False) -> None:
        """The state after `done` steps."""
        size = shutil.get_terminal_size((MAX_WIDTH, 24))
        width = max(10, min(MAX_WIDTH, size.columns - 1))
        cells = []
        for token, before, first in zip(ids, self.shown, self.start, strict=True):
            is_new = before == self.mask and done < self.num_steps  # the finished text has no marks of the last step
            style = MASK if token == self.mask else GIVEN if first != self.mask else NEW if is_new else OLD
            cells += [(character, style) for character in ("." if style == MASK else self.piece(token))]
        lines = [self.paint(cells[i : i + width]) for i in range(0, len(cells), width)]
        progress = f"{done}/{self.num_steps} t={1 - done / self.num_steps:.2f}"
        if not self.live:
            print(f"-- {self.label} {progress}", *lines, sep="\n", flush=True)
            return
        head, tail = f"{self.label} |", f"| {progress} {'energy chooses' if energy_acts else ''}"
        room = max(0, width - len(head) - len(tail))
        if done < self.num_steps:  # a cursor does not go up past the top of the screen; the finished text may be longer
            lines = lines[-max(1, size.lines - 3) :]
        lines.append((head + ("#" * (room * done // self.num_steps)).ljust(room, "-") + tail)[:width])
        up = f"\x1b[{self.height}A\r" if self.height else HIDE_CURSOR
        sys.stdout.write(up + "".join(f"\x1b[2K{line}\n" for line in lines) + "\x1b[J")
        sys.stdout.flush()
        self.shown, self.height, self.last = ids, len(lines), time.perf_counter()

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


def printable(text: str) -> str:
    """Sampled text must not steer the terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def bits_per_character(
    ar: PreTrainedModel, ids_1L: torch.Tensor, start_1L: torch.Tensor, tokenizer: PreTrainedTokenizerBase
) -> float:
    """-log2 p_AR of the generated tokens, each given the BOS and all before it, over the number of characters."""
    is_generated_L = start_1L[0] == ar.config.mask_token_id
    inputs_1L = ids_1L.roll(1, dims=1)
    inputs_1L[:, 0] = ar.config.bos_token_id
    logits_LV = ar(input_ids=inputs_1L).logits[0].float()
    logits_LV[:, ar.config.mask_token_id] = float("-inf")  # no text contains the mask
    log_p_L = logits_LV.log_softmax(-1).gather(-1, ids_1L[0, :, None])[:, 0]
    return -log_p_L[is_generated_L].sum().item() / math.log(2) / len(tokenizer.decode(ids_1L[0, is_generated_L]))


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ar: PreTrainedModel | None,
    prompt_1P: torch.Tensor | None,
    num_candidates: int,
    options: argparse.Namespace,
) -> dict:
    """Write one text, show it, and say what it cost and what the energy and the AR model give it."""
    label, mask, window = "MDLM", model.config.mask_token_id, None
    task = f"{'writes freely' if prompt_1P is None else 'completes the prompt'}: {options.num_steps} steps"
    if num_candidates > 1:
        label, window = "EDLM", model.generation_config.energy_window
        task += f", the energy chooses among {num_candidates} at t in [{window[1]}, {window[0]}]"
    given = [] if prompt_1P is None else prompt_1P[0].tolist()
    start = given + [mask] * (options.length - len(given))
    canvas = Canvas(tokenizer, mask, start, options.num_steps, label, window)
    print(f"\n{label} {task}")
    try:
        canvas.draw(start, 0)
        started = time.perf_counter()
        output = model.generate(
            prompt_1P,
            max_length=options.length,
            num_steps=options.num_steps,
            num_candidates=num_candidates,
            seed=options.seed,
            return_dict_in_generate=True,
            callback_on_step_end=canvas.callback,
        )
        seconds = time.perf_counter() - started - canvas.seconds
    finally:
        canvas.close()
    ids_1L, start_1L = output.sequences, output.sequences.new_tensor([start])
    time_told = 1.0 if model.config.energy_target == "x0" else 0.0  # a step energy is told the time of xs
    return {
        "text_is": "unconditional" if prompt_1P is None else "completion",
        "sampler": label,
        "num_candidates": num_candidates,
        "prompt": tokenizer.decode(given),
        "text": tokenizer.decode(ids_1L[0]),
        "nfe": int(output.nfe),
        "energy_nfe": int(output.energy_nfe),
        "seconds": seconds,
        "energy": model.energy(ids_1L, start_1L, time_told).item(),
        "ar_bits_per_character": None if ar is None else bits_per_character(ar, ids_1L, start_1L, tokenizer),
    }


def report(samples: list[dict], energy_type: str, folder: Path) -> str:
    """The table of all samples, and what it does not say."""
    has_ar = samples[0]["ar_bits_per_character"] is not None
    rows = ["text           sampler  nfe  energy_nfe  seconds   energy" + "  AR bits/char" * has_ar]
    for s in samples:
        row = f"{s['text_is']:<15}{s['sampler']:<7}{s['nfe']:>5}{s['energy_nfe']:>12}{s['seconds']:>9.2f}"
        rows.append(row + f"{s['energy']:>9.2f}" + (f"{s['ar_bits_per_character']:>14.3f}" if has_ar else ""))
    rows += ["", "Energy: of the finished text, proposed in one go for the starting canvas; low is good."]
    rows.append(f"One sample each is an anecdote: the measured numbers are in the card, {folder / 'README.md'}")
    if not has_ar:
        rows.append(f"No AR bits per character: {folder / 'ar'} holds no model.")
    elif energy_type == "nce":
        rows.append("The AR model only scores here; the energy is a network of its own (nce).")
    elif energy_type in ("ar", "coar"):
        rows.append(f"The energy ({energy_type}) is an AR model too: bits/char is no independent judge of EDLM here.")
    return "\n".join(rows)


def run(options: argparse.Namespace) -> None:
    folder = options.model
    missing = [name for name in ("config.json", "tokenizer.json", "modeling_edlm.py") if not (folder / name).is_file()]
    if missing:
        give_up(folder, f"no {', no '.join(missing)}")
    print(f"Loading {folder}", flush=True)
    import torch
    import transformers
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    ar = None
    try:
        model = AutoModel.from_pretrained(folder, trust_remote_code=True).to(options.device).eval()
        # A tokenizer without code of its own; but the library reads config.json for it, and would ask about the code.
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        if (folder / "ar" / "config.json").is_file():  # configuration and weights from ar/, code from the folder itself
            ar = AutoModelForCausalLM.from_pretrained(folder, subfolder="ar", trust_remote_code=True)
            ar = ar.to(options.device).eval()
    except (OSError, ValueError, SafetensorError) as error:
        give_up(folder, str(error).splitlines()[0])
    assert "modeling_edlm" not in sys.modules, "the model folder alone must do"

    prompt_1P = tokenizer(options.prompt, add_special_tokens=False, return_tensors="pt").input_ids.to(options.device)
    given, longest = prompt_1P.shape[1], model.config.max_position_embeddings
    options.length = options.length or min(256, longest)
    if not given < options.length <= longest:
        raise SystemExit(
            f"demo: --length must lie above {given} (the prompt) and up to {longest}, got {options.length}"
        )
    where = torch.cuda.get_device_name(options.device) if model.device.type == "cuda" else platform.machine()
    print(
        f"{model.num_parameters():,} parameters, energy {model.energy_type}, {model.dtype} on {model.device} ({where})"
    )

    # Both ways to step once, untimed: what is set up at first use is no sample's cost.
    model.generate(max_length=options.length, num_steps=2, num_candidates=options.num_candidates, seed=0)
    candidates = [1] if model.energy_type == "none" else sorted({1, options.num_candidates})
    samples = [sample(model, tokenizer, ar, prompt, k, options) for prompt in (prompt_1P, None) for k in candidates]
    print("", report(samples, model.energy_type, folder), sep="\n")
    if options.json:
        result = {
            "command": shlex.join(["python", *sys.argv]),
            "options": {
                name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()
            },
            "config": model.config.to_dict(),
            "generation_config": model.generation_config.to_dict(),
            "device": f"{model.device} ({where})",
            "dtype": str(model.dtype),
            "num_threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "samples": samples,
        }
        temporary = options.json.with_name(f"{options.json.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(result, indent=2) + "\n")
        os.replace(temporary, options.json)


def give_up(folder: Path, reason: str) -> NoReturn:
    raise SystemExit(
        f"demo: {folder} is not a complete model folder: {reason}\n"
        "`make model` puts the code files (*.py) there; configuration, tokenizer and weights it cannot make."
    )


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "edlm-wiki27", help="model folder")
    parser.add_argument("--prompt", default="the history of the city begins in the ")
    parser.add_argument(
        "--length", type=positive, help="tokens of a text, its prompt included (256 or the most it can)"
    )
    parser.add_argument("--num_steps", type=positive, default=64, help="denoising steps (%(default)s)")
    parser.add_argument("--num_candidates", type=positive, default=8, help="of EDLM; MDLM has one (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto is cuda where there is one, else cpu")
    parser.add_argument("--json", type=Path, help="write texts and numbers to this file")
    options = parser.parse_args()
    if not options.prompt:
        parser.error("--prompt is empty")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.parent}")
    try:
        run(options)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
