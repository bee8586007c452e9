"""The cards (README.md) of Hub repos: written from results files, checked, and as they are published.

python -m hub_cards.publish.cards                    # writes those of hub_cards/
python -m hub_cards.publish.cards --check            # says what is wrong with them; exit status 1 if anything is
python -m hub_cards.publish.cards runs/lora/model    # writes that of what training/ left there, to be completed by hand
"""

import argparse
import re
import sys
from pathlib import Path

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from training.common.results import write_whole

from .card import ADAPTER, CARD, HUB_CARDS, MODEL, Card, check, lacks, parse
from .other_cards import HERE, data_set, public, report_of, row_files, settings_files, trained
from .shipped_cards import SHIPPED, WHOLE, render, results_files, shipped


def published(folder: Path, repo: str, base: str | None = None, benchmark: str | None = None) -> dict[str, bytes]:
    """The card of a folder as it is to stand in `repo`, and the results that it names, by their names in the repo.

    A card that is not one of hub_cards/ stays as it is, but for the names of its repo and base. What has none gets a
    plain one.

    Args:
        base: the repo of the base of an energy or adapter.
        benchmark: see `eval_results`.
    Raises:
        ValueError: the card is not one to publish, and why; or there is none, and none can be made.
    """
    folder, files = folder.resolve(), {}
    name, own = folder.name, folder / CARD
    if folder.parent == HUB_CARDS and name in SHIPPED:
        if name not in WHOLE and base is None:
            raise ValueError("its card names its base: give the repo of that by --base USER/NAME")
        if not own.exists() or own.read_text(encoding="utf-8") != render(name):
            raise ValueError(f"its {CARD} is not what its results say: python -m hub_cards.publish.cards writes it")
        text = render(name, repo, base)
        files = {f"results/{path.name}": path.read_bytes() for path in results_files(name)}
        files |= eval_results(name, repo, benchmark) if benchmark else {}
    elif own.exists() and folder.parent == HUB_CARDS / "metrics":
        text = own.read_text(encoding="utf-8").replace(f"hub_cards/metrics/{name}", repo)
        text = re.sub(r"^#.*\bin a clone\b.*\n", "", text, flags=re.MULTILINE)
    else:
        text = own.read_text(encoding="utf-8") if own.exists() else plain(folder).text
        text = text.replace(HERE, repo)
        if base is not None:
            text = with_base(text, base)
        report = report_of(folder)
        if report and (link := f"](../results/{report.name})") in text:
            text = text.replace(link, f"](https://huggingface.co/{repo}/blob/main/results/{report.name})")
            files[f"results/{report.name}"] = report.read_bytes()
        for path in settings_files(folder):
            files[path.name] = public(path.read_text(encoding="utf-8")).encode()
    return {CARD: text.encode()} | files


def plain(folder: Path) -> Card:
    """The card of a model or of generated texts that are not of hub_cards/; ValueError if it is neither."""
    if (folder / MODEL).exists() or (folder / ADAPTER).exists():
        return trained(folder)
    if row_files(folder):
        return data_set(folder)
    raise ValueError(f"there is no {CARD} (the card) in it, and no model or generated texts to write one for")


def with_base(text: str, base: str) -> str:
    """The card of an adapter or energy with another base than the path that it was trained with."""
    card = parse(text, "trained")
    old, tag = card.data.get("base_model"), "base_model:adapter:"  # PEFT's
    card.data.base_model = base
    card.data.tags = [tag + base if name.startswith(tag) else name for name in card.data.get("tags", [])] or None
    text = str(card)
    if isinstance(old, str):
        text = text.replace(f'"{old}"', f'"{base}"')
    if isinstance(old, str) and "/" in old:  # else it may be a word
        text = re.sub(rf"(?<![\w./-]){re.escape(old)}(?![\w/-])", base, text)
    return text


def eval_results(name: str, repo: str, benchmark: str) -> dict[str, bytes]:
    """`.eval_results/<data set>.yaml`: the results on test text for the leaderboard of a data set on the Hub.

    Args:
        benchmark: the repo of that data set. The Hub takes results of one that is registered as a benchmark (an
            eval.yaml in it, and on the Hub's list) and whose tasks have the ids `task_id` gives to the metrics.
    """
    entries = [
        EvalResultEntry(
            dataset_id=benchmark,
            task_id=task_id(found.metric_name),
            value=found.metric_value,
            source_url=found.source_url,
            source_name=found.source_name,
            notes=found.metric_name,
        )
        for found in shipped(name, repo).data.eval_results
        if found.dataset_split == "test"
    ]
    text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
    return {f".eval_results/{benchmark.partition('/')[2]}.yaml": text.encode()}


def task_id(metric: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", metric.lower()).strip("-")


def problems() -> list[str]:
    """What is wrong with the cards of hub_cards/."""
    found = []
    for name in SHIPPED:
        path = HUB_CARDS / name / CARD
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        wrong = check(text, shipped(name))
        if not wrong and text != shipped(name).text:
            wrong = ["it is not what its template gives: python -m hub_cards.publish.cards writes it"]
        found += [f"{path.relative_to(HUB_CARDS.parent)}: {problem}" for problem in wrong]
    spaces = [(HUB_CARDS.parent / "spaces_app" / CARD, "space")]
    spaces += [(path, "metric") for path in sorted(HUB_CARDS.glob(f"metrics/*/{CARD}"))]
    for path, kind in spaces:  # written by hand; they state nothing measured
        wrong = lacks(parse(path.read_text(encoding="utf-8"), kind), kind)
        found += [f"{path.relative_to(HUB_CARDS.parent)}: {problem}" for problem in wrong]
    return found


def write(path: Path, text: str) -> None:
    write_whole(path, text)
    print(f"wrote {path}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="of a model or of generated texts; default: hub_cards/")
    parser.add_argument("--check", action="store_true", help="write nothing, say what is wrong with hub_cards/")
    arguments = parser.parse_args(argv)
    folder = arguments.folder
    if arguments.check:
        found = problems()
        print(*(found or ["the cards are right"]), sep="\n")
        sys.exit(bool(found))
    if folder is None:
        for name in SHIPPED:
            write(HUB_CARDS / name / CARD, render(name))
        return
    if (folder / CARD).exists():
        parser.error(f"{folder / CARD} is there already")
    try:
        write(folder / CARD, plain(folder).text)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
