"""A card (README.md) of a Hub repo: what it is made of, and the check that it says nothing else and lacks nothing.

A template prints the facts of its card: numbers of results files, and a few that are made of them. It only rounds.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import jinja2
import yaml
from huggingface_hub import CardData, DatasetCard, ModelCard, RepoCard, SpaceCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK

HUB_CARDS = Path(__file__).resolve().parents[1]
TEMPLATES = HUB_CARDS / "publish" / "templates"
CARD, MODEL, ADAPTER, ENERGY = "README.md", "config.json", "adapter_config.json", "energy_config.json"
TAGS = ["edlm", "masked-diffusion", "energy-based-model"]

FIELDS = {
    "model": "license language library_name pipeline_tag tags model-index",
    "energy": "license language library_name pipeline_tag tags model-index base_model",
    "adapter": "license language library_name pipeline_tag tags model-index base_model base_model_relation",
    "trained": "library_name pipeline_tag tags",
    "metric": "title sdk sdk_version app_file license tags",
    "space": "title emoji colorFrom colorTo sdk sdk_version app_file python_version tags license short_description",
    "data set": "pretty_name task_categories size_categories tags configs",
}
OF_A_MODEL = ("Use", "Intended use", "Limits", "Training data", "Training", "Energy use of training", "Evaluation")
SECTIONS = {
    **dict.fromkeys(("model", "energy", "adapter"), (*OF_A_MODEL, "Citation")),
    "trained": ("Use", "Limits", "Training data", "Training", "Energy use of training", "Citation"),
    "metric": ("How to use", "Limitations"),
    "space": ("Run it", "Limits"),
    "data set": ("Use", "Columns", "How it was made", "Limits"),
}
CLASSES = {"space": SpaceCard, "data set": DatasetCard, "metric": SpaceCard}  # the others are models
WITH_COMMANDS = ("Training", "Evaluation")  # of the kinds that have all of OF_A_MODEL
MOST_DECIMALS = 8
# Numbers of prose that no results file can hold, and why.
ALLOWED = {
    "27 symbols": "a property of the text",
    "90 million characters": "a property of the text",
    "169 classic books": "a property of the text",
    "May 2015": "a date",
    "Eldan and Li 2023": "a date",
    "CC BY-SA 3.0": "a licence",
    "(chance 0.5)": "of telling two apart",
    "t = 1": "a definition: all is masked",
    "between 1 and k": "a definition: the range of ESS",
    "near 1": "the end of that range",
}
PHRASES = re.compile(rf"(?<![\w.])(?:{'|'.join(map(re.escape, ALLOWED))})(?![\d.]*\d)")
FENCED = re.compile(r"^```.*?^```[^\S\n]*$", re.MULTILINE | re.DOTALL)
NOT_PROSE = re.compile(r"`[^`\n]*`|\]\([^)]*\)|https?://\S+|arXiv[: ]\d{4}\.\d{4,5}")
# Not a part of a name (wiki27, x0, GPT-2); with its sign where that cannot be a dash.
NUMBER = re.compile(r"(?<![\w.])(?<![A-Za-z]-)(?:(?<![^\s(\[|])[+-])?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")


@dataclass(frozen=True)
class Card:
    """What a card is made of.

    kind: see FIELDS. facts: what the template may print; every number in it comes from a results file.
    """

    kind: str
    data: CardData
    facts: dict
    template: str

    @cached_property
    def text(self) -> str:
        of_kind = CLASSES.get(self.kind, ModelCard)
        path = str(TEMPLATES / self.template)
        return str(of_kind.from_template(self.data, template_path=path, m=macros(), **self.facts)).rstrip() + "\n"

    @cached_property
    def blocks(self) -> dict[str, Counter]:
        """For the words of each of its blocks, the numbers that stand among them, and how often."""
        found = defaultdict(Counter)
        for block in blocks(self.text):
            found[NUMBER.sub("#", block)][tuple(NUMBER.findall(block))] += 1
        return found


@cache
def macros():
    """The macros of parts.md, for the templates of cards: those are rendered where there is nothing to include from."""
    loader = jinja2.FileSystemLoader(TEMPLATES)
    return jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined).get_template("parts.md").module


# ---- the check


def check(text: str, card: Card) -> list[str]:
    """What is wrong with the text of a card that should have the facts of `card`: the empty list if nothing is.

    Fields and sections must be those of the kind of card, and not empty. The values of the model-index must be those of
    the results. A number in prose or tables must be one of the facts, rounded to the digits that it shows, or stand in
    a phrase of ALLOWED; where the words around it are the template's, it must be the very number that belongs there.
    Code, links and names are not looked at.
    """
    try:
        parsed = parse(text, card.kind)
    except ValueError as error:
        return [str(error)]
    problems = lacks(parsed, card.kind)
    expected = {(r.dataset_split, r.metric_name): r.metric_value for r in card.data.get("eval_results", [])}
    for r in parsed.data.get("eval_results", []):
        if expected.get((r.dataset_split, r.metric_name)) != r.metric_value:
            problems.append(f"model-index: {r.metric_name!r} is {r.metric_value}, which the results do not say")
    values = set(numbers(card.facts))
    rounded = {decimals: {f"{value:.{decimals}f}" for value in values} for decimals in range(MOST_DECIMALS + 1)}
    for block in blocks(text):
        found, stated = tuple(NUMBER.findall(block)), NUMBER.findall(PHRASES.sub(" ", block))
        foreign = [n for n in stated if n.replace(",", "").lstrip("+") not in rounded.get(len(n.partition(".")[2]), ())]
        those_there = card.blocks.get(NUMBER.sub("#", block))
        if foreign:
            problems.append(f"{', '.join(foreign)}: in no results file, but it says {block[:200]!r}")
        elif those_there is not None and not those_there[found]:
            problems.append(f"the numbers here are of another place: {block[:200]!r}")
    return problems


def parse(text: str, kind: str) -> RepoCard:
    """The card; ValueError if what stands between its lines of --- is not metadata."""
    try:
        if not REGEX_YAML_BLOCK.search(text):
            raise ValueError("there are no lines --- with metadata between them")
        return CLASSES.get(kind, ModelCard)(text)
    except (ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise ValueError(f"the front matter of {CARD} cannot be parsed: {error}") from error


def lacks(card: RepoCard, kind: str) -> list[str]:
    """Which fields and sections of a card of this kind are missing."""
    fields = card.data.to_dict()
    sections = split_sections(card.text)
    problems = [f"the field {name} is missing" for name in FIELDS[kind].split() if not fields.get(name)]
    problems += [f"the section {name!r} is missing or empty" for name in SECTIONS[kind] if not sections.get(name)]
    for name in WITH_COMMANDS if "Evaluation" in SECTIONS[kind] else ():
        if "python -m " not in "".join(FENCED.findall(sections.get(name, ""))):
            problems.append(f"the section {name!r} has no command")
    return problems


def blocks(text: str) -> Iterator[str]:
    """Paragraphs, rows of tables and items of lists of a card, each on one line, without code and links."""
    body = FENCED.sub("\n\n", REGEX_YAML_BLOCK.sub("", text, count=1))
    for block in re.split(r"\n\s*\n|\n(?=[|#]|- )", body):
        block = " ".join(NOT_PROSE.sub(" ", block).split())
        if block:
            yield block


def numbers(facts) -> Iterator[float]:
    """All that are in a fact, at any depth."""
    if isinstance(facts, dict | list):
        for value in facts.values() if isinstance(facts, dict) else facts:
            yield from numbers(value)
    elif isinstance(facts, int | float) and not isinstance(facts, bool):
        yield facts


def split_sections(text: str) -> dict[str, str]:
    """The parts of a card by their headings of second order."""
    hidden = FENCED.sub(lambda match: re.sub("^#", " ", match[0], flags=re.MULTILINE), text)
    places = [*re.finditer(r"^## (.+)$", hidden, re.MULTILINE)]
    ends = [match.start() for match in places[1:]] + [len(text)]
    return {match[1].strip(): text[match.end() : end].strip() for match, end in zip(places, ends, strict=True)}
