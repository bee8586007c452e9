"""Cards say what results files say, and nothing else; the shipped model is what its card says."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from huggingface_hub import DatasetCard, ModelCard, SpaceCard, parse_eval_result_entries
from safetensors.torch import save_file
from transformers import AutoTokenizer

from bench import corrector, frontier, infilling, memory
from hub_cards.publish import cards, other_cards
from hub_cards.publish.card import FENCED, check, lacks, parse, split_sections
from hub_cards.publish.shipped_cards import BASE as SHIPPED_BASE
from hub_cards.publish.shipped_cards import SHIPPED, WHOLE, render, results_files, shipped
from modeling_edlm import EDLMForCausalLM, EDLMModel
from modeling_edlm.schedule import antithetic_times
from support.toy import make_toy
from support.words import words
from training import adapt, evaluate_likelihood, evaluate_samples, generate
from training.common.contrast import accuracy, contrast, draw_contrast, energies
from training.common.data import PackedTokens, character_tokenizer, tokenize
from training.common.metrics import bits_per_character
from training.pretrain import mdlm_loss

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "hub_cards" / "results" / "edlm-wiki27.json"
FOLDER = ROOT / "hub_cards" / "edlm-wiki27"
METRICS = sorted((ROOT / "hub_cards" / "metrics").glob("*/README.md"))
REPO, BASE = "user/tiny", "user/base"
LOCAL = re.compile(r"hub_cards|\.\./|\]\((?!https://)|(?<![\w/:.])/\w")  # a path, or a link that is relative


def card_file(name: str) -> Path:
    return ROOT / "hub_cards" / name / "README.md"


def base_of(name: str) -> str | None:
    return None if name in WHOLE else BASE


# ---- the shipped cards


def test_the_cards_are_right():
    """What `python -m hub_cards.publish.cards --check` looks at: all of it, in every run of the tests."""
    assert cards.problems() == []


@pytest.mark.parametrize("name", SHIPPED)
def test_a_card_is_made_from_its_results(name):
    assert card_file(name).read_text() == render(name)


def changed_digits(text: str) -> list[str]:
    """The text with one digit changed, the last of each number of its prose, tables and model-index."""
    spared = [match.span() for match in FENCED.finditer(text)]
    spared += [match.span() for match in re.finditer(r"`[^`\n]*`|\]\([^)]*\)|[\w.-]*[A-Za-z][\w.-]*\d[\w.-]*", text)]
    spared += [match.span() for match in re.finditer(r"arXiv \d{4}\.\d{5}", text)]
    texts = []
    for match in re.finditer(r"\d(?![\d,.]*\d)", text):
        i = match.start()
        if not any(start <= i < end for start, end in spared):
            texts.append(text[:i] + str((int(text[i]) + 1) % 10) + text[i + 1 :])
    return texts


@pytest.mark.parametrize("name", SHIPPED)
def test_a_changed_digit_is_found(name):
    card = shipped(name)
    texts = changed_digits(card.text)
    assert len(texts) > 100
    lines = set(card.text.splitlines())
    assert not [line for text in texts if not check(text, card) for line in text.splitlines() if line not in lines]


def test_a_card_may_be_edited_but_not_invent():
    """Other words may stand around a number of the results, at any rounding, and around no other."""
    card = shipped("edlm-wiki27")

    def with_line(line):
        return card.text.replace("## Limits\n", f"## Limits\n\n{line}\n")

    loss = json.loads(RESULTS.read_text())["training"]["energy"]["last_evaluation"]["validation_nce_loss"]
    for right in ("Nothing is known of it.", f"The loss is {loss:.2f}.", f"A loss of {loss:.4f}, see `T=77`."):
        assert check(with_line(right), card) == []
    for wrong in ("0.3131", "7,000", "-2.997", "0.29771", "88"):
        (problem,) = check(with_line(f"The loss is {wrong}, they say."), card)
        assert problem.startswith(f"{wrong}: in no results file")
    # the words of the template: a number of the results is not enough, it must be the one that belongs there
    swapped = card.text.replace("| 3000 | 12.3M | 33 |", "| 3200 | 12.3M | 33 |")
    assert "of another place" in check(swapped, card)[0] and len(check(swapped, card)) == 1


def test_results_that_change_make_the_old_card_wrong():
    card = shipped("edlm-wiki27-step")
    facts = card.facts | {"e": card.facts["e"] | {"validation_nce_loss": 0.9961}}
    assert check(card.text, dataclasses.replace(card, facts=card.facts)) == []
    assert check(card.text.replace("loss 0.996", "loss 0.997"), dataclasses.replace(card, facts=facts))
    facts["e"]["validation_nce_loss"] = 1.25
    assert check(card.text, dataclasses.replace(card, facts=facts))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_required_part_is_missed(name):
    card = shipped(name)
    fields = [field for field in card.data.to_dict() if field != "co2_eq_emissions"]
    assert {"license", "library_name", "pipeline_tag", "tags", "model-index", "language"} <= set(fields)
    for field in {"license", "language", "library_name", "pipeline_tag", "tags", "model-index"}:
        without = ModelCard(card.text)
        front = without.data.to_dict()
        del front[field]
        text = f"---\n{yaml.safe_dump(front)}---\n{without.text}"
        assert f"the field {field} is missing" in check(text, card)
    for section in ("Use", "Intended use", "Limits", "Training data", "Energy use of training", "Citation"):
        body = split_sections(card.text)[section]
        assert f"the section '{section}' is missing or empty" in check(card.text.replace(body, ""), card)
    for section in ("Training", "Evaluation"):
        text = card.text.replace(f"\n## {section}\n", "\n## Other\n")
        problems = {f"the section '{section}' {what}" for what in ("is missing or empty", "has no command")}
        assert problems <= set(check(text, card))
    for text in (card.text.replace("---\n", "", 1), card.text.replace("tags:", "tags: ["), "", "# A card\n"):
        assert "front matter" in check(text, card)[0]


def test_the_check_as_a_command(capsys, monkeypatch, tmp_path):
    with pytest.raises(SystemExit) as passed:
        cards.main(["--check"])
    assert passed.value.code == 0 and capsys.readouterr().out == "the cards are right\n"
    for name in SHIPPED:
        (tmp_path / "hub_cards" / name).mkdir(parents=True)
        shutil.copy(card_file(name), tmp_path / "hub_cards" / name)
    (tmp_path / "spaces_app").mkdir()
    shutil.copy(ROOT / "spaces_app" / "README.md", tmp_path / "spaces_app")
    monkeypatch.setattr(cards, "HUB_CARDS", tmp_path / "hub_cards")
    light = tmp_path / "hub_cards" / "edlm-wiki27-light" / "README.md"
    light.write_text(light.read_text().replace("accuracy 0.680", "accuracy 0.780"))
    step = tmp_path / "hub_cards" / "edlm-wiki27-step" / "README.md"
    step.write_text(step.read_text() + "\nNo more than that.\n")
    with pytest.raises(SystemExit) as failed:
        cards.main(["--check"])
    printed = capsys.readouterr().out.strip().splitlines()
    assert failed.value.code == 1 and len(printed) == 2
    assert "edlm-wiki27-step/README.md: it is not what its template gives" in printed[0]
    assert "edlm-wiki27-light/README.md: 0.780: in no results file" in printed[1]
    cards.main([])
    assert cards.problems() == [] and light.read_text() == render("edlm-wiki27-light")
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("name", SHIPPED)
def test_the_model_index_has_the_values_of_the_results(name):
    card = ModelCard(card_file(name).read_text())
    found = {(r.dataset_split, r.metric_name): r.metric_value for r in card.data.eval_results}
    assert len(found) == len(card.data.eval_results) > 5 and card.data.model_name == name
    if name == "edlm-wiki27":
        results = json.loads(RESULTS.read_text())
        for s in results["samplers"]:
            which = f"{s['sampler']} samples, {s['num_steps']} steps, k={s['num_candidates']}"
            assert found["validation", f"{which}: bits per character under the AR scorer"] == round(
                s["bits_per_character"]["mean"], 4
            )
        bound = found["validation", "denoiser, bits per character at most (MDLM in continuous time)"]
        assert bound == round(results["training"]["denoiser"]["last_evaluation"]["validation_bits_per_token"], 4)
    if name == "edlm-stories":
        results = json.loads((ROOT / "hub_cards" / "results" / "edlm-stories.json").read_text())
        for sampler, row in results["samplers"].items():
            bits = found["validation", f"{sampler} samples: bits per character under the judge"]
            assert bits == round(row["judge"]["mean"], 4)
        for part, runs in results["training"].items():
            if part == "step":  # an energy has no bits per character
                continue
            (bits,) = (
                value for (_, metric), value in found.items() if metric.startswith(f"{part}, bits per character")
            )
            assert bits == round(runs[-1]["curve"][-1]["validation_bits_per_character"], 4)
        return
    file, label = {
        "edlm-wiki27": ("likelihood-wiki27.json", "nce"),
        "edlm-wiki27-step": ("likelihood-wiki27.json", "step"),
        "edlm-wiki27-light": ("likelihood-wiki27-light.json", "blocks-2"),
        "edlm-wiki27-books": ("adapt-books.json", "adapted"),
    }[name]
    results = json.loads((ROOT / "hub_cards" / "results" / file).read_text())
    rows = results["bounds"]["rows"] if "bounds" in results else results["data"][0]["rows"]
    (row,) = [
        row for row in rows
        if (row["energy"], row["num_steps"], row["num_candidates"], row["energy_temperature"]) == (label, 16, 8, 1)
    ]  # fmt: skip
    assert found["test", "EDLM, 16 steps, k=8, bits per character at most"] == round(
        row["bits_per_character"]["mean"], 4
    )
    gain = f"{row['gain']['mean']:+.4f} +- {row['gain']['stderr']:.4f} | {row['ess']:.2f} |"
    assert re.search(rf"^\| 16 \|.*\| {re.escape(gain)}$", card.text, re.MULTILINE)


# ---- as published


@pytest.mark.parametrize("name", SHIPPED)
def test_a_published_card_names_the_hub_and_nothing_of_the_clone(name):
    files = cards.published(card_file(name).parent, REPO, base_of(name))
    text = files.pop("README.md").decode()
    assert files == {f"results/{path.name}": path.read_bytes() for path in results_files(name)}
    assert not LOCAL.findall(text) and "make model" not in text
    assert check(text, shipped(name, REPO, base_of(name))) == []
    card = ModelCard(text)
    named = f'"{REPO}"'
    assert named in split_sections(text)["Use"]
    linked = set(re.findall(rf"https://huggingface.co/{REPO}/blob/main/(\S+?)\)", text))
    assert linked == files.keys()
    assert {r.source_url.partition("/blob/main/")[2] for r in card.data.eval_results} <= files.keys()
    if base_of(name):
        assert card.data.base_model == BASE and f'"{BASE}"' in text and f"--base {BASE}" in text
        assert f"](https://huggingface.co/{BASE})" in text or name.endswith("light")
        with pytest.raises(ValueError, match="--base USER/NAME"):
            cards.published(card_file(name).parent, REPO)
    # the numbers are those of the card in the clone
    assert re.findall(r"\d+\.\d{3,}", FENCED.sub("", card.text)) == re.findall(
        r"\d+\.\d{3,}", FENCED.sub("", ModelCard(render(name)).text)
    )


def test_a_card_that_was_edited_is_not_published(tmp_path, monkeypatch):
    monkeypatch.setattr(cards, "HUB_CARDS", tmp_path)
    folder = tmp_path / "edlm-wiki27"
    folder.mkdir()
    for content in (None, render("edlm-wiki27").replace("1.911", "1.811")):
        if content:
            (folder / "README.md").write_text(content)
        with pytest.raises(ValueError, match="is not what its results say: python -m hub_cards.publish.cards"):
            cards.published(folder, REPO)
    (folder / "README.md").write_text(render("edlm-wiki27"))
    assert cards.published(folder, REPO)["README.md"].decode() == render("edlm-wiki27", REPO)


def test_results_for_a_leaderboard():
    """Only where a data set is named: without one on the Hub there is nothing that they could be results of."""
    assert not [name for name in cards.published(FOLDER, REPO) if name.startswith(".")]
    files = cards.published(FOLDER, REPO, benchmark="user/wiki27")
    entries = parse_eval_result_entries(yaml.safe_load(files[".eval_results/wiki27.yaml"]))
    shown = {r.metric_name: r for r in shipped("edlm-wiki27", REPO).data.eval_results if r.dataset_split == "test"}
    assert len(entries) == len(shown) > 10 and len({entry.task_id for entry in entries}) == len(entries)
    for entry in entries:
        assert entry.dataset_id == "user/wiki27" and re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", entry.task_id)
        assert (entry.value, entry.source_url) == (shown[entry.notes].metric_value, shown[entry.notes].source_url)


@pytest.mark.parametrize("path", METRICS, ids=lambda path: path.parent.name)
def test_a_metric_as_published(path):
    name = path.parent.name
    text = cards.published(path.parent, REPO)["README.md"].decode()
    assert f'evaluate.load("{REPO}")' in text and not LOCAL.findall(text)
    assert "clone" not in text and "make model" not in text
    assert lacks(parse(text, "metric"), "metric") == []
    assert f'evaluate.load("hub_cards/metrics/{name}")' in path.read_text() and "`make model`" in path.read_text()


# ---- what users make


def run_folder(folder: Path, model: torch.nn.Module, arguments: dict, last: dict) -> Path:
    """As `training.trainer` leaves it."""
    model.save_pretrained(folder / "model")
    rows = [
        {"step": 5, "loss": 2.0, "tokens": 64.0},
        {"step": 5, "seconds": 10.0},
        {"step": 9, "seconds": 5400.0} | last,
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metadata = {"arguments": json.dumps(arguments), "step": "9"}
    save_file({"x": torch.zeros(1)}, folder / "checkpoint.safetensors", metadata)
    return folder / "model"


def test_a_plain_card_of_a_trained_model(tmp_path):
    arguments = {"objective": "mdlm", "data": "/home/me/mine.txt", "max_steps": 9, "output_dir": "/home/me/runs/x"}
    model = make_toy("none", length=8).denoiser
    folder = run_folder(tmp_path / "mine", model, arguments, {"validation_bits_per_token": 2.345678})
    card = other_cards.trained(folder)
    assert check(card.text, card) == [] and card.text.startswith("---\nlibrary_name: transformers\n")
    for part in ("# mine", f"{model.num_parameters():,} parameters in", "| `validation_bits_per_token` | 2.3457 |",
                 "1.50 hours", "After 9 steps", "python -m training.pretrain --config options.yaml", "data: mine.txt",
                 'AutoModelForMaskedLM.from_pretrained("this folder or repo"'):  # fmt: skip
        assert part in card.text
    assert "license" not in card.data.to_dict() and "under which licence" in card.text
    assert check(card.text.replace("2.3457", "2.3458"), card) and check(
        card.text.replace("1.50 hours", "1.60 hours"), card
    )
    files = cards.published(folder, REPO)
    text = files["README.md"].decode()
    assert files.keys() == {"README.md"} and f'from_pretrained("{REPO}"' in text and "/home/me" not in text
    assert not LOCAL.findall(text)
    cards.main([str(folder)])
    assert (folder / "README.md").read_text() == card.text and cards.published(folder, REPO) == files
    with pytest.raises(SystemExit):  # it may have been completed by hand
        cards.main([str(folder)])


def test_a_plain_card_of_a_model_of_which_nothing_is_known(tmp_path):
    make_toy("nce", length=8).save_pretrained(tmp_path / "model")
    (tmp_path / "metrics.jsonl").write_text("")
    card = other_cards.trained(tmp_path / "model")
    assert check(card.text, card) == []
    assert "The settings of the training are not beside the weights" in card.text and "None" not in card.text
    (tmp_path / "model" / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(ValueError, match="config.json in .* is of BertModel, not one of EDLMModel"):
        other_cards.trained(tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(ValueError, match="there is no README.md .* and no model or generated texts"):
        cards.published(tmp_path / "model", REPO)


def test_a_plain_card_of_an_energy(tmp_path):
    """A network of its own, whose base only its run knows; and an adapter, which knows it."""
    arguments = {"lora_r": 0, "data": "user/books", "base": "runs/denoiser/model"}
    folder = run_folder(
        tmp_path / "own", make_toy("nce", length=8).energy_model, arguments, {"validation_accuracy": 0.75}
    )
    card = other_cards.trained(folder)
    assert card.data.base_model == "runs/denoiser/model" and check(card.text, card) == []
    text = cards.published(folder, REPO, BASE)["README.md"].decode()
    assert f'"{BASE}", trust_remote_code=True).load_energy("{REPO}")' in text and "Text: `user/books`" in text
    assert ModelCard(text).data.base_model == BASE and ModelCard(text).data.base_model_relation == "finetune"
    adapter = tmp_path / "adapter"
    shutil.copytree(card_file("edlm-wiki27-books").parent, adapter, ignore=shutil.ignore_patterns("README.md"))
    card = other_cards.trained(adapter)
    assert card.data.base_model == f"hub_cards/{SHIPPED_BASE}" and card.data.library_name == "peft"
    assert "345,024 parameters over 4 blocks of width 192" in " ".join(card.text.split())


def test_a_card_of_their_own_gets_the_base(tmp_path):
    old = "---\nbase_model: {0}\ntags:\n- base_model:adapter:{0}\n---\n\n# An energy for {0}\n\n"
    old += 'from_pretrained("{0}").load_energy("this folder or repo")\n'
    for path in ("runs/denoiser/model", "/home/me/base"):
        (tmp_path / "README.md").write_text(old.format(path))
        for base in (None, BASE):
            new = old.format(base or path).replace("this folder or repo", REPO)
            assert cards.published(tmp_path, REPO, base) == {"README.md": new.encode()}
    (tmp_path / "README.md").write_text("---\ntags: [\n---\n")
    with pytest.raises(ValueError, match="front matter of README.md cannot be parsed"):
        cards.published(tmp_path, REPO, BASE)


ROWS = [
    {
        "row": i,
        "prompt": "a" if i else None,
        "text": "abc",
        "tokens": [0] * (3 + i),
        "nfe": 8,
        "energy_nfe": 4 * i,
        "seed": 7,
    }
    for i in range(3)
]


def test_the_card_of_generated_texts(tmp_path):
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS[:1]), tmp_path / "two.parquet")
    (tmp_path / "one.settings.yaml").write_text("model: /home/me/edlm-mine\nenergy: ''\nnum_steps: 8\n")
    card = other_cards.data_set(tmp_path)
    assert check(card.text, card) == []
    assert "| one.jsonl | 3 | 2 | 3 to 5 | 8.0 | 4.0 | 7 |" in card.text
    assert "| two.parquet | 1 | 0 | 3 to 3 | 8.0 | 0.0 | 7 |" in card.text
    assert "num_steps: 8" in card.text and "The settings are not beside the rows" in card.text
    assert check(card.text.replace("| 3 to 5 |", "| 3 to 6 |"), card)
    files = cards.published(tmp_path, REPO)
    text = files["README.md"].decode()
    assert "/home/me" not in text and files["one.settings.yaml"].startswith(b"model: edlm-mine\n")
    data = DatasetCard(text).data
    assert data.size_categories == "n<1K" and data.configs[0]["data_files"] == ["one.jsonl", "two.parquet"]
    assert f'load_dataset("{REPO}")' in text and "synthetic" in data.tags and data.pretty_name == tmp_path.name
    (tmp_path / "one.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="one.jsonl is not of training.generate: a row has no row, prompt"):
        cards.published(tmp_path, REPO)
    (tmp_path / "one.jsonl").write_text("")
    with pytest.raises(ValueError, match="one.jsonl has no row"):
        cards.published(tmp_path, REPO)


def test_texts_that_were_generated_load_with_their_card(tmp_path):
    """The settings that `training.generate` puts beside its file are in the card, and are no rows."""
    folder, tokenizer = tmp_path / "made", character_tokenizer()
    make_toy("nce", length=12, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "edlm-toy")
    tokenizer.save_pretrained(tmp_path / "edlm-toy")
    options = {
        "model": tmp_path / "edlm-toy",
        "out": folder / "texts.jsonl",
        "num_samples": 4,
        "num_steps": 3,
        "seed": 5,
        "device": "cpu",
    }
    generate.main([part for name, value in options.items() for part in (f"--{name}", str(value))])
    files = cards.published(folder, REPO)
    assert files.keys() == {"README.md", "texts.settings.yaml"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    settings = yaml.safe_load(files["texts.settings.yaml"])
    assert (settings["model"], settings["num_steps"], settings["seed"]) == ("edlm-toy", 3, 5)
    assert "by `python -m training.generate`" in (text := files["README.md"].decode()) and "num_steps: 3\n" in text
    assert "that a model wrote (edlm-toy)" in text and "| texts.jsonl | 4 | 0 | 12 to 12 | 3.0 |" in text
    rows = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))["train"]
    assert rows["row"][:] == [0, 1, 2, 3] and {len(text) for text in rows["text"][:]} == {12}


def test_the_cards_of_spaces():
    """Written by hand: they have all fields, and the version of Gradio that is tested."""
    text = (ROOT / "spaces_app" / "README.md").read_text()
    assert lacks(parse(text, "space"), "space") == [] and len(SpaceCard(text).data.short_description) <= 60
    for field in ("emoji", "colorFrom", "short_description"):
        assert lacks(parse(text.replace(f"\n{field}:", "\nother:"), "space"), "space") == [
            f"the field {field} is missing"
        ]
    versions = {SpaceCard(path.read_text()).data.sdk_version for path in (*METRICS, ROOT / "spaces_app" / "README.md")}
    assert len(versions) == 1 and f"gradio=={versions.pop()}\n" in (ROOT / "constraints.txt").read_text()


# ---- what is shipped, and what README.md and docs/ say of it


def test_the_docs_have_the_tables_of_the_results():
    """Every row of figures in README.md and docs/ is, to the letter, one of a card or of what a results file prints."""
    printed = "".join(card_file(name).read_text() for name in WHOLE)
    modules = {"likelihood": evaluate_likelihood, "samples": evaluate_samples, "adapt": adapt, "memory": memory}
    modules |= {"frontier": frontier, "infilling": infilling, "corrector": corrector}
    for results in (ROOT / "hub_cards" / "results").glob("*.json"):
        module = modules.get(results.name.partition("-")[0])
        if module is not None:
            printed += module.table(json.loads(results.read_text())) + "\n"
    names = r"data \||MDLM|EDLM|AR \||AR, exact|autoregressive \||denoiser \||NCE energy \||published form"
    names += (
        r"|before|gain, |ESS, |other text|adapted|wiki|small \||full \||\d \| (?:passes alone|random sets|neighbours)"
    )
    rows = [row for row in words().splitlines() if re.match(rf"\| ({names})", row)]
    assert len(rows) >= 30 and not [row for row in rows if row not in printed]


@pytest.mark.parametrize("name", ["step", "light"])
def test_the_cards_of_step_energies_say_what_their_metrics_say(name):
    card = " ".join(card_file(f"edlm-wiki27-{name}").read_text().split())
    last = json.loads((ROOT / "hub_cards" / "results" / f"edlm-wiki27-{name}.jsonl").read_text().splitlines()[-1])
    assert f"loss {last['validation_nce_loss']:.3f} (chance {last['chance']:.3f})" in card
    assert f"accuracy {last['validation_accuracy']:.3f}" in card and f"{last['seconds'] / 60:.0f} minutes" in card
    for name, value in last.items():
        if name.startswith("accuracy_t"):
            assert f"{name.removeprefix('accuracy_')}: {value:.3f}" in card


def test_the_card_of_the_adapter_says_what_was_measured():
    card = " ".join(card_file("edlm-wiki27-books").read_text().split())
    training = json.loads((ROOT / "hub_cards" / "results" / "adapt-books.json").read_text())["training"]
    overall = training["all"]
    assert f"NCE loss {overall['validation_nce_loss']:.3f} (chance {overall['chance']:.3f})" in card
    assert f"accuracy {overall['validation_accuracy']:.3f}" in card and f"weights {overall['ess']:.2f}" in card
    assert all(f"{gain['bits_per_token']:.4f} +- {gain['stderr']:.4f}" in card for gain in training["gains"])
    assert training["command"] in card
    # its log is that of the same run
    log = (ROOT / "hub_cards" / "results" / "energy-books-nce.jsonl").read_text().splitlines()
    assert overall.items() <= json.loads(log[-1]).items()


def test_the_shipped_folder_is_small_and_whole():
    files = [*FOLDER.glob("*.safetensors"), *FOLDER.glob("ar/*.safetensors")]
    assert 0 < sum(file.stat().st_size for file in files) <= 25e6
    assert not [file for file in FOLDER.rglob("*") if file.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    parameters = json.loads(RESULTS.read_text())["parameters"]
    model, scorer = EDLMModel.from_pretrained(FOLDER), EDLMForCausalLM.from_pretrained(FOLDER, subfolder="ar")
    assert parameters == {
        "denoiser": model.denoiser.num_parameters(),
        "energy": model.energy_model.num_parameters(),
        "ar": scorer.num_parameters(),
    }


@pytest.mark.parametrize("name", ["step", "light", "books"])
def test_shipped_energies_fit_the_shipped_model(name, held_out):
    """An adapter by its checksum; and each has something to say of the next state."""
    folder = ROOT / "hub_cards" / f"edlm-wiki27-{name}"
    model = EDLMModel.from_pretrained(FOLDER).load_energy(str(folder))
    assert (model.config.energy_adapter is not None) == (name == "books")
    positive, negatives, xt, t, s = draw_contrast(model.denoiser, held_out, torch.arange(16), 16, 0, "xs", 3)
    with torch.no_grad():
        energy = model.energy(torch.cat((positive, negatives[:, 0])), torch.cat((xt, xt)), torch.cat((s, s)))
    assert energy.isfinite().all() and energy.std() > 0.1
    assert f"edlm-wiki27-{name}" in words()


def test_the_shipped_samples_come_again():
    """The first sample of the card, from its seed. Rounding differs between machines: most letters must agree."""
    results = json.loads(RESULTS.read_text())
    model, tokenizer = EDLMModel.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
    ids = model.generate(num_steps=results["samplers"][-1]["num_steps"], num_candidates=1, seed=results["seed"])
    expected = torch.tensor(tokenizer(results["samples"]["MDLM"][0]).input_ids)
    assert float((ids[0] == expected).float().mean()) > 0.9


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> torch.Tensor:
    """(16, 256) characters of validation text."""
    source = str(ROOT / "tests" / "fixtures" / "wiki27-sample.parquet")
    tokens = tokenize(source, AutoTokenizer.from_pretrained(FOLDER), tmp_path_factory.mktemp("tokens"))
    blocks = PackedTokens(tokens, 256)
    return torch.stack([blocks[i * len(blocks) // 16]["input_ids"] for i in range(16)])


def test_the_trained_energy_tells_data_from_proposals(held_out):
    model = EDLMModel.from_pretrained(FOLDER)
    times, u = (torch.full((16,), 0.8), None), torch.rand(held_out.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        data, proposal = energies(model.energy_model, *contrast(model.denoiser, held_out, *times, u, 0), *times)
    assert float(accuracy(data, proposal, "nce").mean()) > 0.75
    assert float(data.mean()) < 0 < float(proposal.mean())


def test_bits_per_character_of_the_shipped_models(held_out):
    """Far below single letters (4.1 bits), and near what the card says; 4,096 characters are a small sample."""
    evaluation = {k: v["last_evaluation"] for k, v in json.loads(RESULTS.read_text())["training"].items()}
    model, scorer = EDLMModel.from_pretrained(FOLDER), EDLMForCausalLM.from_pretrained(FOLDER, subfolder="ar")
    bits = float(bits_per_character(scorer, held_out).mean())
    assert abs(bits - evaluation["ar"]["validation_bits_per_token"]) < 0.25
    torch.manual_seed(0)
    t = antithetic_times(torch.rand(()), 256)
    x0 = held_out.repeat(16, 1)
    with torch.no_grad():
        nats = mdlm_loss(model.denoiser, x0, t, torch.rand(x0.shape), model.config.mask_token_id)
    assert abs(float(nats.mean()) / 256 / math.log(2) - evaluation["denoiser"]["validation_bits_per_token"]) < 0.4
