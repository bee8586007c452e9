"""README.md, CONTRIBUTING.md and docs/: what they link to and name is there, and the README is short."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import yaml

import modeling_edlm
from support.words import DOCS, README, ROOT

FOLDERS = [ROOT / name / "README.md" for name in ("training", "hub_cards", "bench")]
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *FOLDERS]
ALL = [README, *OTHERS, *DOCS]
FENCED = re.compile(r"^```.*?^```|^(?:    [^\n]*\n)+", re.M | re.S)  # a block of code, fenced or indented
SPAN = re.compile(r"`([^`]+)`")
MAKE = re.compile(r"^\s*(?:[A-Z_]+=(?:<[^>]*>|\S+) )*make (?:[A-Z_]+=\S+ )*([a-z][\w-]*)", re.M)
OURS = "modeling_edlm|training|hub_cards|bench|spaces_app|tests|docs"  # folders
OF_ONE = pytest.mark.parametrize("page", ALL, ids=lambda path: str(path.relative_to(ROOT)))


def code(page: Path) -> str:
    """Blocks and spans of code, a line each."""
    text = page.read_text()
    spans = SPAN.findall(FENCED.sub("", text))
    return "\n".join([*FENCED.findall(text), *(" ".join(span.split()) for span in spans)])


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as both GitHub and mkdocs call them."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_the_readme_is_for_who_arrives():
    assert len(README.read_text().splitlines()) <= 200


@OF_ONE
def test_links_lead_somewhere(page):
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", page.read_text())):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.is_relative_to(ROOT) or not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert not wrong


def test_every_page_is_in_the_navigation():
    def pages(nav):
        for entry in nav:
            values = entry.values() if isinstance(entry, dict) else [entry]
            for value in values:
                yield from pages(value) if isinstance(value, list) else [value]

    nav = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(nav) == sorted(str(page.relative_to(ROOT / "docs")) for page in DOCS)


@OF_ONE
def test_commands_are_there(page):
    """Modules that are run, scripts, and targets of make."""
    text, wrong = code(page), []
    for name in set(re.findall(r"(?<!\w)-m ([a-z_]\w*(?:\.\w+)*)", text)):
        place = ROOT / name.replace(".", "/")
        if not (place.with_suffix(".py").is_file() or (place / "__main__.py").is_file()):
            if re.match(rf"({OURS})\b", name) or importlib.util.find_spec(name) is None:
                wrong.append(name)
    wrong += [name for name in set(re.findall(r"python (?:-P )?([\w/]+\.py)", text)) if not (ROOT / name).is_file()]
    rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    wrong += [f"make {target}" for target in set(MAKE.findall(text)) - set(rules)]
    assert not wrong


@OF_ONE
def test_files_that_are_named_are_there(page):
    """Pages of docs/ name cards and code by their paths, which are no links: a site has no such files."""
    named = set(re.findall(rf"(?<![\w/.-])((?:{OURS})/[\w./-]*\w)", code(page)))
    made = {"hub_cards/edlm-wiki27/custom_generate"}  # by `make model`
    assert not [name for name in sorted(named - made) if not (ROOT / name).exists()]


def test_the_readme_quotes_the_docs():
    """A figure with its error stands in docs/ too, where the table and the command are."""
    readme, *pages = (" ".join(FENCED.sub("", page.read_text()).split()) for page in (README, *DOCS))
    figures = set(re.findall(r"[+-]?\d+\.\d+ \+- \d+\.\d+", readme))
    assert figures and not [figure for figure in sorted(figures) if not any(figure in page for page in pages)]


def test_the_api_pages_have_what_is_public():
    documented = re.findall(r"^::: (\S+)$", "\n".join(page.read_text() for page in DOCS), re.M)
    for name in documented:
        parts = name.split(".")
        found = importlib.import_module(".".join(parts[:2])) if parts[1].islower() else modeling_edlm
        for part in parts[2 if parts[1].islower() else 1 :]:
            found = getattr(found, part)
        assert found.__doc__, name
    public = {f"modeling_edlm.{name}" for name in modeling_edlm.__all__} - {"modeling_edlm.EDLMPreTrainedModel"}
    assert public <= set(documented)
