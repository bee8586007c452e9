"""See the energy choose: a Gradio page that shows an energy-based diffusion language model at work.

    EDLM_REPO=user/model python app.py

EDLM_REPO names the model (a Hub repo or a folder, of a whole model or an adapter); EDLM_ALLOWED more of them, which
visitors may pick. The code that runs a model is the model repo's own, by AutoModel.
"""

try:
    import spaces  # before torch: on a ZeroGPU Space it takes the device's place until a request has one
except ImportError:
    spaces = None

import functools
import importlib.util
import json
import secrets
import traceback
from collections.abc import Iterator
from html import escape
from pathlib import Path

import engine
import gradio as gr
import panels
from engine import Settings
from limits import MAX_CANDIDATES, MAX_QUEUE, MAX_SEED, MAX_STEPS, SECONDS, Refused, shown
from models import Models, allowed

HERE = Path(__file__).resolve().parent
MODELS = Models()
PAPER = "https://arxiv.org/abs/2410.21357"
EXAMPLES = {
    "Continue": "Once upon a time, there was a little girl named Lily. She",
    "Fill a gap": (
        "One day, Tom went to the park with his dog, Max. They saw a big red ball under a tree. Max wanted to play "
        'with the ball.[MASK 20] Tom was very happy. He said, "Thank you, Max! You are a good dog." Then they went '
        "home together."
    ),
    "From nothing": "",
}
TO_SCORE = (
    "Once upon a time, there was a little girl named Lily. She had a red ball. One day, the ball rolled into the "
    "pond. Lily was sad, but her dad helped her get it back."
)
# Fonts of the machine: nothing is fetched from elsewhere.
THEME = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
ONE_AT_A_TIME = {"concurrency_id": "model", "concurrency_limit": 1}
SHARED = {"model": None, "yes": True, "no": False}
ARGUMENTS = """text: what to continue; with [MASK], or [MASK 12] for twelve tokens, what to fill; empty for a free text.
        num_steps: denoising steps, 1 to 256; 0 is the model's own number.
        num_candidates: proposals that the energy chooses from at a step, 1 to 16; 1 is plain masked diffusion, 0 the
            model's own number.
        window_high: the time runs from 1 to 0, and the energy acts from this time on; -1 is the model's own value.
        window_low: the energy acts until this time, at most window_high; -1 is the model's own value.
        shared_completion: "yes" if the proposals of a step differ only in what the step reveals, "no" if they differ
            everywhere, "model" for the model's own choice.
        temperature: of the proposals; 0 is the model's own.
        seed: fixes the result; -1 draws a new one.
        length: tokens in all where the text has no gaps; 0 is as many as the model allows.
        model: one of the models of this Space; empty is its first."""
START = "document.dispatchEvent(new Event('edlm-start'));"
STOP = "() => { document.dispatchEvent(new Event('edlm-stop')); }"
SELECTION = """(text, start, end, model) => {
    const box = document.querySelector("#text textarea");
    return [text, box.selectionStart, box.selectionEnd, model];
}"""


def told(fn):
    """What goes wrong is a message to the visitor, who named the value, or a line in the log and an apology."""

    @functools.wraps(fn)
    def run(*args, **kwargs):
        try:
            yield from fn(*args, **kwargs)
        except ValueError as error:  # Refused, and what the model's own functions refuse
            raise gr.Error(escape(str(error), quote=False), print_exception=False) from error
        except Exception as error:
            traceback.print_exc()
            name = type(error).__name__
            message = f"This request failed ({name}); it is in the log, and the next one is not affected"
            raise gr.Error(message, print_exception=False) from error

    return run


def on_gpu(fn):
    """With a device for as long as a request may take, on a ZeroGPU Space."""
    return spaces.GPU(duration=int(SECONDS))(fn) if spaces else fn


def settings_of(
    loaded, num_steps, num_candidates, window_high, window_low, shared_completion, temperature, seed, length
) -> Settings:
    """From the arguments of an endpoint, or from the page, where shared_completion is a checkbox."""
    if shared_completion not in (*SHARED, True, False):
        raise Refused(f"shared_completion must be 'model', 'yes' or 'no', got {shown(shared_completion)}")
    return Settings.of(
        loaded,
        num_steps=None if num_steps == 0 else num_steps,
        num_candidates=None if num_candidates == 0 else num_candidates,
        window_high=None if window_high == -1 else window_high,
        window_low=None if window_low == -1 else window_low,
        shared_completion=SHARED.get(shared_completion, shared_completion),
        temperature=None if temperature == 0 else temperature,
        seed=secrets.randbelow(MAX_SEED) if seed == -1 else seed,
        length=length,
    )


# ---- for programs: the same, typed and without a page


def documented(fn):
    """With the arguments that these functions share written out: a client shows each function alone."""
    fn.__doc__ = fn.__doc__.replace("{arguments}", ARGUMENTS)
    return fn


@told
@on_gpu
@documented
def write(
    text: str = "",
    num_steps: int = 0,
    num_candidates: int = 0,
    window_high: float = -1.0,
    window_low: float = -1.0,
    shared_completion: str = "model",
    temperature: float = 0.0,
    seed: int = -1,
    length: int = 0,
    model: str = "",
) -> Iterator[dict]:
    """Write a text, continue one, or fill its gaps, step by step, with an energy-based diffusion language model.

    Args:
        {arguments}
    Returns:
        drafts and at last the result: text, masked, step, num_steps, nfe, energy_nfe, seconds, seed and state, which is
        running, done, or time for one cut off by the time limit.
    """
    loaded, sampler = MODELS.get(model), (num_steps, num_candidates, window_high, window_low, shared_completion)
    for run in engine.write(loaded, text, settings_of(loaded, *sampler, temperature, seed, length)):
        yield summary(run)


@told
@on_gpu
@documented
def compare(
    text: str = "",
    num_steps: int = 0,
    num_candidates: int = 0,
    window_high: float = -1.0,
    window_low: float = -1.0,
    shared_completion: str = "model",
    temperature: float = 0.0,
    seed: int = -1,
    length: int = 0,
    equal: str = "denoiser calls",
    model: str = "",
) -> Iterator[dict]:
    """Write one text with the energy (edlm) and one without (mdlm), from the same seed.

    Args:
        {arguments}
        equal: what both may spend, "denoiser calls" or "seconds".
    Returns:
        mdlm and edlm, each as from write, and facts about each: calls, seconds, tokens up to the end of the text,
        energy of the whole text, bits per character under the repo's left-to-right model, entropy of the tokens in
        bits.
    """
    loaded, sampler = MODELS.get(model), (num_steps, num_candidates, window_high, window_low, shared_completion)
    for runs in engine.compare(loaded, text, settings_of(loaded, *sampler, temperature, seed, length), equal):
        yield {name: runs[name] and summary(runs[name]) for name in ("mdlm", "edlm")} | {"facts": runs["facts"]}


@told
@on_gpu
@documented
def inspect(
    text: str = "",
    num_steps: int = 0,
    num_candidates: int = 0,
    window_high: float = -1.0,
    window_low: float = -1.0,
    shared_completion: str = "model",
    temperature: float = 0.0,
    seed: int = -1,
    length: int = 0,
    step: int = 0,
    model: str = "",
) -> Iterator[dict]:
    """What the energy chose from at a step, and how decided it was at every step.

    Args:
        {arguments}
        step: the step to look at, from 0; the nearest one at which the energy acts is taken.
    Returns:
        run as from write; choice with step, t, candidates (texts), energies, weights, kept (an index) and ess, or null
        where the energy acted at no step; ess as pairs of step and effective number of proposals.
    """
    loaded, sampler = MODELS.get(model), (num_steps, num_candidates, window_high, window_low, shared_completion)
    for found in engine.inspect(loaded, text, settings_of(loaded, *sampler, temperature, seed, length), step):
        choices = found["choices"]
        nearest = min(choices, key=lambda choice: abs(choice["step"] - step), default=None)
        if nearest is not None:
            texts = [engine.text_of({"tokens": pieces}) for pieces in nearest["candidates"]]
            nearest = nearest | {"candidates": texts}
        ess = [[choice["step"], choice["ess"]] for choice in choices]
        yield {"run": summary(found["run"]), "choice": nearest, "ess": ess}


@told
@on_gpu
def score(
    text: str,
    num_steps: int = 0,
    num_candidates: int = 0,
    window_high: float = -1.0,
    window_low: float = -1.0,
    shared_completion: str = "model",
    seed: int = 0,
    model: str = "",
) -> Iterator[dict]:
    """Bits per character of a text by three estimators, with standard errors.

    Args:
        text: without gaps.
        num_steps, num_candidates, window_high, window_low, shared_completion: of the sampler whose bound is estimated,
            as for write: 0, 0, -1, -1 and "model" are the model's own.
        seed: of the estimates; -1 draws a new one.
        model: one of the models of this Space; empty is its first.
    Returns:
        after each round: estimates by name (sampler, mdlm, paper) with bits, stderr and gain, ar for the exact value of
        the repo's left-to-right model or null, characters, tokens, done, rounds, state.
    """
    loaded, sampler = MODELS.get(model), (num_steps, num_candidates, window_high, window_low, shared_completion)
    yield from engine.score(loaded, text, settings_of(loaded, *sampler, 1.0, seed, 0))


def summary(run: dict) -> dict:
    facts = {name: run[name] for name in ("num_steps", "nfe", "energy_nfe", "seconds", "seed", "state")}
    return {"text": engine.text_of(run), "masked": run["tokens"].count(None), "step": run["done"]} | facts


# ---- for the page


@told
@on_gpu
def show_write(text, model, *sampler):
    loaded = MODELS.get(model)
    yield from engine.write(loaded, text, settings_of(loaded, *sampler))


@told
@on_gpu
def show_compare(text, model, equal, *sampler):
    loaded = MODELS.get(model)
    for runs in engine.compare(loaded, text, settings_of(loaded, *sampler), equal):
        yield runs["mdlm"], runs["edlm"], panels.compare_table(runs["facts"], loaded.scores_itself)


@told
@on_gpu
def show_inside(text, model, *sampler):
    loaded = MODELS.get(model)
    yield from engine.inspect(loaded, text, settings_of(loaded, *sampler))


@told
@on_gpu
def show_score(text, model, *sampler):
    loaded = MODELS.get(model)
    for result in engine.score(loaded, text, settings_of(loaded, *sampler)):
        yield panels.score_bars(result)


def meet(model):
    """What is loaded, its own settings, and the range of lengths that it allows."""
    try:
        loaded = MODELS.get(model)
    except Exception as error:
        return f"<div class='edlm-hint'>{escape(str(error))}</div>", *[gr.skip()] * 7
    kind = {"none": "no energy", "nce": "a trained energy"}.get(loaded.model.energy_type, "an autoregressive energy")
    if loaded.model.config.energy_target == "xs":
        kind += " of the next state"
    size = sum(parameter.numel() for parameter in loaded.model.parameters()) / 1e6
    name = escape(loaded.name)
    if Path(loaded.name).is_dir():
        name = escape(Path(loaded.name).name)
    else:
        name = f"<a href='https://huggingface.co/{name}' target='_blank' rel='noopener'>{name}</a>"
    words = f"Model: {name}, {size:.1f} million parameters, {kind}, {loaded.longest} tokens at most."
    length = gr.Slider(maximum=loaded.longest, value=loaded.longest)
    return f"<div class='edlm-hint'>{words}</div>", *engine.own(loaded).values(), length


def hint(text, length, model):
    """What pressing the button will do with this text."""
    loaded = MODELS.ready(model)
    if loaded is None:
        return "<div class='edlm-hint'>The model is being loaded.</div>" if allowed() else ""
    try:
        start = engine.canvas(loaded, text, int(length or 0))
    except ValueError as error:
        return f"<div class='edlm-hint'>{escape(str(error))}</div>"
    masked, given = start.count(loaded.mask), len(start) - start.count(loaded.mask)
    reads = loaded.text([i for i in start if i != loaded.mask])
    if not given:
        words = f"Write fills {masked} masked tokens, from nothing."
    elif loaded.mask not in engine.tokenize(loaded, text):
        words = f"Write fills {masked} masked tokens after your {given} tokens."
    else:
        words = f"Write fills {masked} masked tokens and keeps your other {given} tokens."
    typed = engine.MARK.sub("", text)
    if given and reads != typed:
        words += f" The model reads: <q>{escape(reads)}</q>"
    return f"<div class='edlm-hint'>{words}</div>"


def erase(text, start, end, model):
    """The text with the selected part, or the word at the cursor, made a gap of as many tokens.

    The space before a word is in the gap where it is in the word's token.
    """
    start, end = (min(int(x or 0), len(text)) for x in (start, end))
    if start == end:
        start, end = text.rfind(" ", 0, start) + 1, (text + " ").find(" ", end)
    loaded = MODELS.ready(model)
    if loaded is None or start >= end:
        return text
    if loaded.joins_spaces and text[:start].endswith(" "):
        start -= 1
    try:
        count = len(engine.tokenize(loaded, text[start:end]))
    except Refused:
        return text
    return f"{text[:start]}[MASK {count}]{text[end:]}" if count else text


def script(name: str) -> str:
    return (HERE / "common.js").read_text() + (HERE / name).read_text()


def canvas(title: str) -> gr.HTML:
    template = f'<div class="edlm-canvas" data-title="{title}"></div>'
    return gr.HTML(
        html_template=template, js_on_load=script("canvas.js"), elem_id=title.split(":")[0].lower() + "-canvas"
    )


def buttons(label: str, name: str) -> tuple[gr.Button, gr.Button]:
    """The one that starts it and the one that stops it."""
    with gr.Row():
        go = gr.Button(label, variant="primary", size="lg", scale=3, min_width=120, elem_id=f"go-{name}")
        return go, gr.Button("Stop", size="lg", scale=1, min_width=80, elem_id=f"stop-{name}")


def build() -> gr.Blocks:
    hidden = {"api_visibility": "private"}
    quick = hidden | {"queue": False, "show_progress": "hidden"}
    works = hidden | ONE_AT_A_TIME | {"show_progress": "minimal"}
    names = allowed()
    with gr.Blocks(title="See the energy choose", analytics_enabled=False) as page:
        gr.HTML(
            '<div class="edlm-head"><h1>See the energy choose</h1><p>This model starts from masked tokens and fills '
            "them in any order, several at a step. At a step it can make several proposals for all that is missing. "
            "Then an <b>energy</b>, a network that reads whole texts, chooses one of them. Press Write to see it. "
            f'<a href="{PAPER}" target="_blank" rel="noopener">Paper</a></p></div>'
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                text = gr.Textbox(
                    EXAMPLES["Continue"],
                    label="Your text",
                    info="A beginning, a text with gaps, or nothing. [MASK 12] is a gap of twelve tokens",
                    lines=3,
                    max_lines=8,
                    elem_id="text",
                )
                with gr.Row():
                    for label, example in EXAMPLES.items():
                        button = gr.Button(label, size="sm", min_width=80)
                        button.click(None, outputs=text, js=f"() => {json.dumps(example)}", **hidden)
                    eraser = gr.Button("Make a gap", size="sm", min_width=80, elem_id="erase")
                told_hint = gr.HTML(elem_id="hint")
                with gr.Accordion("Settings", open=False, elem_id="settings"):
                    # these values stand until the model is loaded and brings its own
                    steps = gr.Slider(1, MAX_STEPS, 64, step=1, label="Steps", info="More steps: fewer tokens at once")
                    candidates = gr.Slider(
                        1,
                        MAX_CANDIDATES,
                        8,
                        step=1,
                        label="Proposals k",
                        info="The energy chooses one. 1: there is no choice",
                    )
                    high = gr.Slider(
                        0,
                        1,
                        1.0,
                        step=0.05,
                        label="Energy acts from t =",
                        info="Time t is the share of masked tokens. It runs from 1 to 0",
                    )
                    low = gr.Slider(
                        0,
                        1,
                        0.8,
                        step=0.05,
                        label="Energy acts until t =",
                        info="From 1 until 0, it acts at every step",
                    )
                    shared = gr.Checkbox(
                        False,
                        label="Proposals differ only in what the step reveals",
                        info="All share the rest, which is not kept (an extension of the paper)",
                    )
                    temperature = gr.Slider(0.1, 2, 1.0, step=0.05, label="Temperature", info="Of the proposals")
                    length = gr.Slider(8, 256, 256, step=1, label="Length", info="In tokens, for texts without gaps")
                    with gr.Row():
                        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=100)
                        renew = gr.Checkbox(True, label="A new seed for each text", min_width=100)
                    model = gr.Dropdown(
                        names or [""],
                        value=names[0] if names else "",
                        label="Model",
                        info="A repo or an adapter from this Space's list",
                        allow_custom_value=True,
                        elem_id="model",
                    )
                about_model = gr.HTML(elem_id="about-model")
            with gr.Column(scale=3, min_width=320), gr.Tabs():
                with gr.Tab("Write"):
                    go_write, stop_write = buttons("Write", "write")
                    out_write = canvas("Text")
                    gr.HTML(
                        '<div class="edlm-legend"><span><i class="ramp"></i> first to last step</span>'
                        '<span><i class="ramp sure"></i> probability of the token, 0 to 1</span>'
                        '<span><i class="tall"></i> chosen by the energy</span></div>'
                    )
                with gr.Tab("Compare"):
                    go_compare, stop_compare = buttons("Compare", "compare")
                    equal = gr.Radio(
                        ["denoiser calls", "seconds"],
                        value="denoiser calls",
                        label="Same seed, same number of",
                    )
                    with gr.Row():
                        with gr.Column(min_width=280):
                            out_mdlm = canvas("MDLM: no energy")
                        with gr.Column(min_width=280):
                            out_edlm = canvas("EDLM: the energy chooses")
                    out_facts = gr.HTML(elem_id="facts")
                with gr.Tab("Look inside"):
                    go_inside, stop_inside = buttons("Look inside", "inside")
                    out_inside = gr.HTML(
                        html_template='<div class="edlm-inside"></div>',
                        js_on_load=script("inside.js"),
                        elem_id="inside",
                    )
                with gr.Tab("Score"):
                    to_score = gr.Textbox(
                        TO_SCORE,
                        label="A text to score",
                        info="How likely the model finds it, in bits per character",
                        lines=3,
                        max_lines=10,
                        elem_id="to-score",
                    )
                    go_score, stop_score = buttons("Score", "score")
                    out_score = gr.HTML(elem_id="bars")
                with gr.Tab("What is this?"):
                    gr.HTML((HERE / "about.html").read_text())

        own = [steps, candidates, high, low, shared, temperature]
        sampler = [*own, seed, length]
        fresh = f"(seed, renew) => {{ {START} return renew ? Math.floor(Math.random() * {MAX_SEED}) : seed; }}"
        first = gr.on([go_write.click, text.submit], None, [seed, renew], seed, js=fresh, **hidden)
        # always_last: a click while the last run is still being stopped is not lost
        works |= {"js": f"(...all) => {{ {START} return all; }}", "trigger_mode": "always_last"}
        of_compare = [out_mdlm, out_edlm, out_facts]
        events = {
            stop_write: first.then(show_write, [text, model, *sampler], out_write, **works),
            stop_compare: go_compare.click(show_compare, [text, model, equal, *sampler], of_compare, **works),
            stop_inside: go_inside.click(show_inside, [text, model, *sampler], out_inside, **works),
            stop_score: go_score.click(show_score, [to_score, model, *sampler], out_score, **works),
        }
        for stop, event in events.items():
            stop.click(None, js=STOP, cancels=[event], **hidden)
        gr.on([text.change, length.change], hint, [text, length, model], told_hint, trigger_mode="always_last", **quick)
        gr.on([page.load, model.change], meet, model, [about_model, *own, length], **quick).then(
            hint, [text, length, model], told_hint, **quick
        )
        selection = [gr.Number(visible=False) for _ in range(2)]
        eraser.click(erase, [text, *selection, model], text, js=SELECTION, **quick)
        for endpoint in (write, compare, inspect, score):
            gr.api(endpoint, api_name=endpoint.__name__, **ONE_AT_A_TIME)
    return page.queue(max_size=MAX_QUEUE, default_concurrency_limit=1)


def launch(page: gr.Blocks, **options):
    """With what belongs to the page: its style, and its tools over MCP where the package is installed."""
    has_mcp = importlib.util.find_spec("mcp") is not None
    return page.launch(css_paths=[HERE / "app.css"], theme=THEME, mcp_server=has_mcp, **options)


if __name__ == "__main__":
    if spaces and allowed():
        MODELS.get()  # in this process: the ones that requests run in are copies of it
    else:
        MODELS.start_loading()
    launch(build())
