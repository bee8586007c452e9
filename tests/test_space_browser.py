"""The Space as visitors see it, in a headless Chromium: each tab, stop, scrub, phone, dark, markup in a prompt."""

import contextlib
import json
import os
import re
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright
from transformers import AutoTokenizer

from support.chromium import ADVICE, find
from support.space_server import STORIES, serve

# With a folder here, what each test sees is saved into it: this is how spaces_app/screenshots/ was made.
SHOTS = os.environ.get("SPACE_SCREENSHOTS")
MASKED = "el => Number(el.dataset.masked)"
PATIENCE = 60_000  # milliseconds, for a busy machine
WATCH_MASKED = """() => {
    const canvas = document.querySelector("#text-canvas .edlm-canvas");
    window.masked = [];
    new MutationObserver(() => {
        const blank = [...canvas.querySelectorAll(".text span")].filter((span) => span.textContent === "\\u00b7");
        if (blank.length !== window.masked.at(-1)) window.masked.push(blank.length);
    }).observe(canvas, { attributes: true, attributeFilter: ["data-masked"] });
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("server"), STORIES) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    if (path := find()) is None:
        pytest.fail(ADVICE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, server):
    """Opens the page as a visitor; afterwards nothing may have gone wrong in its console."""
    contexts, wrong = [], []

    def open_page(width=1280, height=900, query="") -> Page:
        contexts.append(browser.new_context(viewport={"width": width, "height": height}))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("dialog", lambda dialog: wrong.append(f"a dialog: {dialog.message}"))
        page.goto(server.url + query, wait_until="domcontentloaded")
        expect(page.locator("#about-model")).to_contain_text("million parameters")
        return page

    yield open_page
    for context in contexts:
        context.close()
    # fonts and the like from elsewhere are not reachable in a test, and not needed
    assert [line for line in wrong if "ERR_" not in line] == []


def canvas(page: Page, name: str = "text-canvas"):
    return page.locator(f"#{name} .edlm-canvas")


OWN = json.loads((STORIES / "generation_config.json").read_text())


def set_sliders(page: Page, **values) -> None:
    """Open the settings, change some, and close them."""
    page.locator("#settings > button").click()
    for label, value in values.items():
        box = page.get_by_label(f"number input for {label.replace('_', ' ')}")
        slider = page.get_by_label(f"range slider for {label.replace('_', ' ')}")
        for _ in range(3):  # on a busy machine the page may not listen yet when it is first seen
            box.fill(str(value))
            box.press("Enter")
            page.wait_for_timeout(200)
            if slider.input_value() == str(value):
                break
        expect(slider).to_have_value(str(value))
    page.locator("#settings > button").click()
    expect(page.get_by_label("number input for Steps")).not_to_be_visible()


def shoot(page: Page, name: str) -> None:
    if SHOTS:
        path = Path(SHOTS) / f"{name}.png"
        page.screenshot(path=path)
        Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)  # a third of the size


def finished(page: Page, name: str = "text-canvas") -> None:
    expect(canvas(page, name)).to_have_attribute("data-state", "done")
    expect(canvas(page, name)).to_have_attribute("data-masked", "0")


def test_write_fills_and_scrubs_back(visit):
    """The masks on the screen fall to zero while it writes; back at step 0 all are there again; replay fills them."""
    page = visit()
    page.evaluate(WATCH_MASKED)
    page.get_by_role("button", name="Write", exact=True).click()
    finished(page)
    masked = page.evaluate("window.masked")
    assert masked[0] > 200 and masked[-1] == 0 and masked == sorted(masked, reverse=True) and len(masked) >= 5
    text = canvas(page).locator(".text")
    # a story may end before the last place; masks would be "_" and special tokens "[EOS]"
    whole = r"^Once upon a time, there was a little girl named Lily\. She[^_\[\]]{40,}$"
    expect(text).to_have_attribute("aria-label", re.compile(whole))
    written, last = text.text_content(), canvas(page).get_attribute("data-step")
    shoot(page, "write")
    scrubber = page.get_by_role("slider", name="Step shown, Text")
    scrubber.focus()
    scrubber.press("Home")
    assert canvas(page).evaluate(MASKED) == masked[0] and text.text_content().count("\u00b7") == masked[0]
    for _ in range(3):
        scrubber.press("ArrowRight")
    assert 0 < canvas(page).evaluate(MASKED) < masked[0]
    page.get_by_role("button", name="Replay").click()
    expect(canvas(page)).to_have_attribute("data-step", last)
    assert text.text_content() == written


def test_the_settings_are_the_models_own(visit):
    page = visit()
    page.locator("#settings > button").click()
    shown = {"Steps": OWN["num_steps"], "Proposals k": OWN["num_candidates"]}
    shown |= dict(zip(("Energy acts from t =", "Energy acts until t ="), OWN["energy_window"], strict=True))
    for label, value in shown.items():
        expect(page.get_by_label(f"number input for {label}")).to_have_value(f"{value:g}")
    expect(page.get_by_label("Proposals differ only in what the step reveals")).to_be_checked(
        checked=OWN["shared_completion"]
    )


def test_same_seed_same_text_and_another_one(visit):
    page = visit()
    set_sliders(page, Steps=8, Length=64)
    texts = []
    page.locator("#settings > button").click()
    for keep in (False, True, False):
        page.get_by_label("A new seed for each text").set_checked(not keep)
        before = page.get_by_label("Seed", exact=True).input_value()
        page.get_by_role("button", name="Write", exact=True).click()
        expect(canvas(page)).to_have_attribute("data-state", "running")  # no longer the text before, of the same seed
        if not keep:
            expect(page.get_by_label("Seed", exact=True)).not_to_have_value(before)
        seed = page.get_by_label("Seed", exact=True).input_value()
        expect(canvas(page).locator(".status")).to_contain_text(f"seed {seed}.")
        finished(page)
        texts.append(canvas(page).locator(".text").text_content())
    assert texts[0] == texts[1] != texts[2]


def test_stop(visit):
    """Stop leaves what is there, says so, and the next text is written as if nothing had been."""
    page = visit()
    set_sliders(page, Steps=256, Proposals_k=16, **{"Energy_acts_from_t_=": 1, "Energy_acts_until_t_=": 0})
    page.get_by_role("button", name="Write", exact=True).click()
    expect(canvas(page)).to_have_attribute("data-step", re.compile(r"^[1-9]"))
    page.locator("#stop-write").click()
    expect(canvas(page)).to_have_attribute("data-state", "stopped")
    expect(canvas(page).locator(".status")).to_contain_text("Stopped.")
    assert canvas(page).evaluate(MASKED) > 0
    set_sliders(page, Steps=8, Proposals_k=2, Length=64)
    for _ in range(3):  # on a busy machine Gradio may drop a click that comes before the stop is through
        page.get_by_role("button", name="Write", exact=True).click()
        with contextlib.suppress(AssertionError):
            expect(canvas(page)).to_have_attribute("data-state", re.compile("running|done"), timeout=15_000)
            break
    finished(page)


def test_gaps_by_erasing(visit):
    """A word that is selected becomes a gap of its tokens; the rest of the text stays."""
    page = visit()
    set_sliders(page, Steps=8)
    box = page.get_by_label("Your text")
    box.fill("Lily saw a grasshopper in the grass.")
    box.evaluate("box => box.setSelectionRange(11, 22)")
    tokens = len(AutoTokenizer.from_pretrained(STORIES)(" grasshopper").input_ids)
    page.get_by_role("button", name="Make a gap").click()
    expect(box).to_have_value(f"Lily saw a[MASK {tokens}] in the grass.")
    expect(page.locator("#hint")).to_contain_text(f"Write fills {tokens} masked tokens and keeps")
    page.get_by_role("button", name="Write", exact=True).click()
    finished(page)
    assert re.fullmatch(r"Lily saw a.* in the grass\.", canvas(page).locator(".text").text_content(), re.DOTALL)
    assert canvas(page).locator(".text .new, .text .written").count() == tokens


def test_compare(visit):
    page = visit(height=1080)
    set_sliders(page, Steps=16, Length=96)
    page.get_by_role("tab", name="Compare").click()
    page.locator("#go-compare").click()
    expect(page.locator("#facts")).to_contain_text("Bits per character")
    finished(page, "mdlm-canvas")
    finished(page, "edlm-canvas")
    row = page.locator("#facts tr", has_text="Denoiser calls").locator("td")
    steps = 16 + OWN.get("corrector_steps", 0)  # those of revision too
    for i, name in enumerate(("mdlm-canvas", "edlm-canvas")):  # those in which nothing was to be revealed cost nothing
        assert 8 < int(row.nth(i).text_content()) <= int(canvas(page, name).get_attribute("data-step")) <= steps
    assert page.locator("#facts tr", has_text="Steps").locator("td").all_text_contents() == [str(steps)] * 2
    row = page.locator("#facts tr", has_text="Energy calls").locator("td")
    assert row.nth(0).text_content() == "0" != row.nth(1).text_content()
    shoot(page, "compare")
    page.get_by_label("seconds", exact=True).check()
    page.locator("#go-compare").click()
    expect(row.nth(0)).to_have_text("0")
    expect(page.locator("#facts tr", has_text="Steps").locator("td").nth(0)).not_to_have_text(str(steps))


def test_look_inside(visit):
    """One proposal of k is kept at each choice, weights sum to one, and the slider goes from choice to choice."""
    page = visit()
    set_sliders(page, Steps=32, Proposals_k=4, Length=128)
    page.get_by_role("tab", name="Look inside").click()
    page.locator("#go-inside").click()
    rows = page.locator("#inside li")
    expect(rows).to_have_count(4)
    expect(page.locator("#inside li.kept")).to_have_count(1)
    expect(page.locator("#inside svg.plot circle")).not_to_have_count(0)
    first = page.locator("#inside .edlm-inside").get_attribute("data-step")
    slider = page.get_by_role("slider", name="Choice shown")
    slider.press("ArrowRight")
    expect(page.locator("#inside .edlm-inside")).not_to_have_attribute("data-step", first)
    shares = rows.locator(".bar").evaluate_all("bars => bars.map(b => Number(b.style.getPropertyValue('--share')))")
    assert abs(sum(shares) - 1) < 1e-3
    expect(page.locator("#inside li.kept .now:not(:empty)").first).to_be_visible()
    shoot(page, "inside")


def test_score(visit):
    page = visit()
    set_sliders(page, Steps=16, Proposals_k=2)
    page.get_by_role("tab", name="Score").click()
    page.locator("#go-score").click()
    expect(page.locator("#bars .edlm-bars")).to_have_attribute("data-state", "done")
    names = page.locator("#bars .row").evaluate_all("rows => rows.map(row => row.dataset.estimator)")
    assert names == ["sampler", "mdlm", "paper", "ar"]
    assert re.search(r"\d\.\d{3} \u00b1 \d\.\d{3}", page.locator("#bars .row").first.text_content())
    shoot(page, "score")


def test_markup_in_a_prompt_stays_text(visit, server):
    """Nothing that is typed becomes an element, in the box, the hint, the canvas or a message."""
    page = visit()
    set_sliders(page, Steps=4, Length=120)
    evil = "<img src=x onerror=alert(1)><b>bold</b> "
    page.get_by_label("Your text").fill(evil)
    expect(page.locator("#hint")).to_contain_text("The model reads")
    page.get_by_role("button", name="Write", exact=True).click()
    finished(page)
    page.locator("#settings > button").click()
    page.locator("#model input").fill("<img src=x onerror=alert(2)>")
    page.locator("#model input").press("Enter")
    page.get_by_role("button", name="Write", exact=True).click()
    expect(page.get_by_text("model must be one of")).not_to_have_count(0)
    assert page.locator("img[src=x]").count() == 0
    assert page.locator("#hint b, #text-canvas b").count() == 0


def test_tokens_are_text_nodes(visit):
    """Whatever a model's vocabulary holds, a token is text: also one that is an element's markup."""
    page = visit()
    set_sliders(page, Steps=2, Length=48)
    page.route(
        "**/queue/data*",
        lambda route: route.fulfill(
            response=(answer := route.fetch()), body=answer.text().replace('"."', '"<img src=x onerror=alert(3)>"')
        ),
    )
    page.get_by_role("button", name="Write", exact=True).click()
    finished(page)
    expect(canvas(page).locator(".text")).to_contain_text("<img src=x onerror=alert(3)>")
    assert page.locator("img[src=x]").count() == 0


def test_wrong_value_is_a_message_and_the_next_request_works(visit):
    page = visit()
    text = "a b " * 300
    tokens = len(AutoTokenizer.from_pretrained(STORIES)(text.rstrip()).input_ids)
    page.get_by_label("Your text").fill(text)
    expect(page.locator("#hint")).to_contain_text("at most 256 tokens")
    page.get_by_role("button", name="Write", exact=True).click()
    refused = f"text must have at most 256 tokens for this model, got {tokens}"
    expect(page.get_by_text(refused).last).to_be_visible()
    page.get_by_role("button", name="From nothing").click()
    set_sliders(page, Steps=4, Length=64)
    page.get_by_role("button", name="Write", exact=True).click()
    finished(page)


@pytest.mark.parametrize("tab", ["Write", "Compare", "Look inside", "Score", "What is this?"])
def test_phone(visit, tab):
    """At 390 pixels every tab works and nothing sticks out to the side."""
    page = visit(390, 844)
    set_sliders(page, Steps=8, Proposals_k=2, Length=96)
    if not page.get_by_role("tab", name=tab).is_visible():
        page.locator(".overflow-menu button").first.click()
        page.locator(".overflow-dropdown button", has_text=tab).click()
    else:
        page.get_by_role("tab", name=tab).click()
    done = {
        "Write": "#text-canvas .edlm-canvas[data-state=done]",
        "Compare": "#facts table",
        "Look inside": "#inside li.kept",
        "Score": "#bars .edlm-bars[data-state=done]",
        "What is this?": ".edlm-about svg",
    }
    if tab == "Score":
        page.get_by_label("A text to score").fill("She had a red ball. It was big.")
    if tab != "What is this?":
        page.locator(f"#go-{tab.rpartition(' ')[2].lower()}").click()
    expect(page.locator(done[tab])).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    if tab == "Write":
        page.locator("#go-write").evaluate("button => button.scrollIntoView({ block: 'start' })")
        shoot(page, "phone")


def test_dark(visit):
    """In the dark the text is light, and readable on every colour behind it."""
    page = visit(query="/?__theme=dark")
    set_sliders(page, Steps=16, Length=128)
    page.get_by_role("button", name="Write", exact=True).click()
    finished(page)
    shoot(page, "dark")
    colours = page.evaluate(
        """() => [getComputedStyle(document.querySelector('.gradio-container')).backgroundColor,
                  getComputedStyle(document.querySelector("#text-canvas .written")).color]"""
    )
    background, text = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
    assert background < 200 < 500 < text


def test_by_keyboard(visit):
    """From the text box the button is reached by Tab and works by Enter."""
    page = visit()
    set_sliders(page, Steps=4, Length=64)
    page.get_by_label("Your text").focus()
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "go-write":
            break
    assert page.evaluate("document.activeElement.id") == "go-write"
    page.keyboard.press("Enter")
    finished(page)
