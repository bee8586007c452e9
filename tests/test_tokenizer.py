"""The byte-level tokenizer: what its ids are, that any text comes back, that the same text gives the same file."""

import json
import random
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from training.common.data import tokenize
from training.tokenizer import LEAST_SIZE, main, train_tokenizer

SHIPPED = Path(__file__).parent.parent / "training" / "tokenizers" / "wikibooks"
TEXT = "the city of London was founded in 1066 and in 1999 they didn't know\nwhy; caf\u00e9 \u201cquoted\u201d (it's)"


def documents(number: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(TEXT.split(" "), k=rng.randint(5, 80))) for _ in range(number)]


def write(folder: Path, **splits: list[str]) -> str:
    folder.mkdir(exist_ok=True)
    for split, texts in splits.items():
        pq.write_table(pa.table({"text": texts}), folder / f"{split}.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def small() -> PreTrainedTokenizerFast:
    return train_tokenizer(documents(100), 310)


@pytest.fixture(scope="module")
def shipped() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(SHIPPED)


def test_the_ids(small: PreTrainedTokenizerFast) -> None:
    assert len(small) == 310 and sorted(small.get_vocab().values()) == list(range(310))
    assert small.convert_ids_to_tokens([0, 1, 2, 309]) == ["[PAD]", "[BOS]", "[EOS]", "[MASK]"]
    special = (small.pad_token_id, small.bos_token_id, small.eos_token_id, small.mask_token_id)
    assert special == (0, 1, 2, 309) and len(small.all_special_tokens) == 4
    pieces = [small.decode([i]) for i in range(3, 309)]
    assert " the" in pieces and "19" in pieces
    assert not [piece for piece in pieces if re.search(r"\w\s", piece)]  # words are cut apart
    assert {len(piece) for piece in pieces if re.search(r"\d", piece) and piece.isdigit()} == {1, 2}
    assert not [piece for piece in pieces if re.search(r"\d", piece) and not piece.isdigit()]


ODD = [
    "",
    " ",
    " a space in front, two  within and one behind ",
    "\x00 and \x7f and \ufeff",
    "lines\nwith\r\nevery\r\n\r\n\n end\n",
    "\ttabs\t\tand \u00a0\u2003\u3000 spaces  \n  ",
    "1999 12345 0x1F 3.14 \u00bd \u0664\u0662 x2y",
    "emoji \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "cafe\u0301 caf\u00e9 \u0130\u0131 \u4e2d\u6587 \u05e9\u05dc\u05d5\u05dd \U000e0001 \U0010ffff",
    "don't DON'T 'tis ''ll \u2019s",
    "[PAD][BOS] a [MASK] b[MASK][EOS]",
    "[mask] [MASK ] G\u0120\u010a",
]


@pytest.mark.parametrize("which", ["small", "shipped"])
def test_any_text_comes_back(which: str, request: pytest.FixtureRequest) -> None:
    tokenizer, rng = request.getfixturevalue(which), random.Random(1)
    some = [chr(c) for c in (*range(0x300), *range(0x2000, 0x2100), 0x1F600, 0xE000, 0x10FFFD)]
    for text in ODD + ["".join(rng.choices(some, k=60)) for _ in range(50)]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("which", ["small", "shipped"])
def test_special_tokens_come_only_where_they_are_written(which: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(which)
    encoded = tokenizer("the city of [MASK]")
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert encoded.input_ids[-1] == tokenizer.mask_token_id
    assert not set(encoded.input_ids[:-1]) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(encoded.input_ids, skip_special_tokens=True) == "the city of "


def test_training_text_that_spells_a_special_token(tmp_path: Path, small: PreTrainedTokenizerFast) -> None:
    texts = ["fill [MASK] here[EOS]", "[BOS]"]
    tokens = tokenize(write(tmp_path / "spelled", train=texts), small, tmp_path)
    assert [i for i in tokens if i in small.all_special_ids] == [small.eos_token_id] * 2  # behind each document
    assert small.decode(tokens) == "".join(text + "[EOS]" for text in texts)


def test_trained_and_loaded(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """From the command to `AutoTokenizer`; twice the same file; the numbers of the report are right."""
    splits = {"train": documents(60), "validation": documents(9, seed=1)}
    data = write(tmp_path / "one", **splits) + "," + write(tmp_path / "two", train=["x y z " * 50], validation=["zz x"])
    for out in ("a", "b"):
        main(f"--data {data} --vocab_size 320 --out {tmp_path / out}".split())
    assert "320 ids from 61 of 61 documents" in capsys.readouterr().out
    names = {"tokenizer.json", "tokenizer_config.json", "compression.json"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    loaded = AutoTokenizer.from_pretrained(tmp_path / "a")
    trained = train_tokenizer(splits["train"] + ["x y z " * 50], 320)
    assert loaded.get_vocab() == trained.get_vocab() and (len(loaded), loaded.mask_token_id) == (320, 319)
    assert not loaded.clean_up_tokenization_spaces and loaded.decode(loaded("it 's , so").input_ids) == "it 's , so"
    for text in (*splits["validation"], *ODD):
        assert loaded(text).input_ids == trained(text).input_ids

    report = json.loads((tmp_path / "a" / "compression.json").read_text())
    assert "--data data/one,data/two" in report["command"]
    assert report["trained_on"]["documents"] == 61
    row, whole = report["validation"]["one"], "".join(splits["validation"])
    tokens = sum(len(trained(text).input_ids) for text in splits["validation"])
    assert (row["characters"], row["bytes"], row["tokens"]) == (len(whole), len(whole.encode()), tokens)
    assert row["characters_per_token"] == len(whole) / tokens < row["bytes_per_token"] == len(whole.encode()) / tokens
    assert report["validation"]["two"]["characters"] == 4


def test_a_part_of_the_documents(tmp_path: Path) -> None:
    texts = [f"{word} " * 40 for word in ("alpha", "bravo", "gamma", "delta", "hotel", "india", "lemon", "mango")]
    data = write(tmp_path / "data", train=texts, validation=["alpha"])
    main(f"--data {data} --vocab_size 262 --max_characters 1000 --out {tmp_path / 'out'}".split())
    assert json.loads((tmp_path / "out" / "compression.json").read_text())["trained_on"]["documents"] == 4
    vocabulary = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert vocabulary == train_tokenizer(texts[::2], 262).get_vocab()
    assert vocabulary != train_tokenizer(texts, 262).get_vocab()
    with pytest.raises(ValueError, match="max_characters=100 is less than a document"):
        main(f"--data {data} --vocab_size 262 --max_characters 100 --out {tmp_path / 'no'}".split())
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (f"--vocab_size {LEAST_SIZE - 1}", f"vocab_size must be at least {LEAST_SIZE}, got {LEAST_SIZE - 1}"),
        ("--max_characters -1", "max_characters must be at least 0, got -1"),
        ("--min_frequency 0", "min_frequency must be at least 1, got 0"),
        ("--data ,", "data must be given, got ','"),
        ("--vocab_size 100000", "vocab_size=100000 is too large: the texts give [0-9]+ with min_frequency=2"),
        ("--data {}/train.parquet", "validation_data must be given when data has a file, .*train.parquet"),
    ],
)
def test_wrong_arguments(tmp_path: Path, options: str, message: str) -> None:
    data = write(tmp_path / "data", train=documents(5), validation=["a"])
    with pytest.raises(ValueError, match=message):
        main(f"--data {data} --out {tmp_path / 'out'} {options.format(data)}".split())
    assert not (tmp_path / "out").exists()


def test_the_shipped_one(shipped: PreTrainedTokenizerFast) -> None:
    assert len(shipped) == 8192 and shipped.mask_token_id == 8191 and shipped.mask_token == "[MASK]"
    assert (shipped.pad_token_id, shipped.bos_token_id, shipped.eos_token_id) == (0, 1, 2)
    report = json.loads((SHIPPED / "compression.json").read_text())
    assert min(row["characters_per_token"] for row in report["validation"].values()) > 3.5
    text = "In 1984, the people of the city didn't know of the Mediterranean."
    pieces = [shipped.decode([i]) for i in shipped(text).input_ids]
    assert "|".join(pieces) == "In| |19|84|,| the| people| of| the| city| didn|'t| know| of| the| Mediterranean|."
