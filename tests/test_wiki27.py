"""The text of the 27-letter models: the rule against values worked out by hand, and what is written of a stream."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from training import wiki27
from training.common.data import character_tokenizer, read_texts, tokenize
from training.wiki27 import SPLITS, Wiki27Arguments, cleaned, cut, read_articles, reduced, row_sizes, stream

SAMPLE = str(Path(__file__).parent / "fixtures" / "wiki27-sample.parquet")
PROSE = "The 3 caf\u00e9s of A&amp;B, est. 1905. " * 20
ROW = " the three caf s of a b est one nine zero five" * 20  # 920 characters


def make(source: Path | str, out: Path, **options: int | str) -> None:
    rest = (str(part) for name, value in options.items() for part in (f"--{name}", value))
    wiki27.main(["--source", str(source), "--out", str(out), *rest])


def small(**changes: int) -> dict[str, int]:
    sizes = {"train_characters": 900, "validation_characters": 500, "test_characters": 400, "row_characters": 200}
    return sizes | changes


def extracted(folder: Path, articles: list[tuple[str, str]], name: str = "AA/wiki_00") -> Path:
    """As WikiExtractor writes them; returns the folder."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f'<doc id="{i}" url="x?curid={i}" title="{t}">\n{b}\n</doc>\n' for i, (t, b) in enumerate(articles))
    path.write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    """Two files of articles, of which three are kept."""
    folder = extracted(tmp_path / "text", [("Tom &amp; Co", f"Tom & Co\n\n{PROSE}"), ("Stub", "Stub\n\nShort.")])
    name = f"Sun may also refer to:\n{PROSE}"
    return extracted(folder, [("B", PROSE), ("Sun", f"Sun\n\n{name}"), ("C", f"C\n\n{PROSE}")], "AB/wiki_00")


# ---- the rule


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Born in 1905.", " born in one nine zero five"),
        ("x2y", " x two y"),
        ("0123456789", " zero one two three four five six seven eight nine"),
        ("Caf\u00e9 \u00c5ngstr\u00f6m", " caf ngstr m"),  # an accented letter is no letter, in text8 as here
        ("\u212a \u0130 \u0661", ""),  # the Kelvin sign, a dotted capital I, an Arabic digit: not A-Z, not 0-9
        ("a  b\t\nc\u00a0d -- e", " a b c d e"),
        ("It's (e.g.) U.S.-led!", " it s e g u s led"),
        ("", ""),
        (" ... ", ""),
    ],
)
def test_the_rule_by_hand(text: str, expected: str) -> None:
    assert reduced(text) == expected
    assert reduced(expected) == expected


def test_the_rule_leaves_its_own_text_alone() -> None:
    sample = "".join(read_texts(SAMPLE))
    assert reduced(sample) == " " + sample.strip()
    assert cleaned(sample) == sample.strip() and list(stream([sample])) == [" " + sample.strip()]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("R&amp;D &lt;b&gt;bold&lt;/b&gt; <br/>x", "R&D bold x"),
        ("if a < b and c > d", "if a < b and c > d"),
        ("one\n{| class=x\n| a || b\n[[File:x.jpg]]\n__TOC__\n\n  two \t three ", "one\ntwo three"),
        ("&amp;amp;", "&amp;"),  # once
    ],
)
def test_markup_by_hand(text: str, expected: str) -> None:
    assert cleaned(text) == expected


def test_articles_are_kept_from_500_characters_and_without_disambiguation() -> None:
    long = "a" * 500
    assert list(stream([long, long[1:], f"It can refer to {long}", f"{long} may refer to x"])) == [
        f" {long}",
        f" {long} may refer to x",
    ]


def test_titles_are_left_out(dump: Path) -> None:
    assert list(stream(read_articles(str(dump), "text"))) == [ROW, ROW, ROW]
    assert list(read_articles(str(dump), "text"))[2] == PROSE  # where there is none, nothing is


def test_the_docs_have_the_hash_of_the_shipped_text() -> None:
    page = Path(__file__).parent.parent / "docs" / "training.md"
    assert f"| whole | 100,000,000 | `{wiki27.SHIPPED}` |" in page.read_text().splitlines()


# ---- files


def test_the_splits_are_the_stream_in_order(dump: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    make(dump, out, **small())
    rows = {split: list(read_texts(str(out), split)) for split in SPLITS}
    assert {split: [len(row) for row in texts] for split, texts in rows.items()} == {
        "train": [200, 200, 200, 200, 100],
        "validation": [200, 200, 100],
        "test": [200, 200],
    }
    texts = {split: "".join(texts) for split, texts in rows.items()}
    assert "".join(texts.values()) == (ROW * 3)[:1800]
    printed = capsys.readouterr().out.splitlines()
    for line, (split, text) in zip(printed, texts.items(), strict=False):
        digest = hashlib.sha256(text.encode()).hexdigest()
        assert line == f"{split}: {len(text):,} characters in {len(rows[split])} rows, sha256 {digest}"
    digest = hashlib.sha256((ROW * 3)[:1800].encode()).hexdigest()
    verdict = f"the shipped models have seen {wiki27.SHIPPED}"
    assert printed[3:] == [f"whole: 1,800 characters, sha256 {digest} ({verdict}): {out}"]
    ids = tokenize(str(out), character_tokenizer(), tmp_path / "cache")
    assert len(ids) == 900  # the tokenizer of the models leaves it as it is
    make(dump, out, **small(row_characters=1000))  # again, over the old files
    assert "".join(read_texts(str(out))) == texts["train"] and len(list(out.iterdir())) == 3


def test_other_sources_give_the_same_text(dump: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(dump, tmp_path / "out", **small())
    pq.write_table(pa.table({"body": [PROSE, "Short.", PROSE, PROSE]}), tmp_path / "articles.parquet")
    make(tmp_path / "articles.parquet", tmp_path / "again", text_column="body", **small())

    def hub(source: str, split: str, column: str, streaming: bool) -> Iterator[str]:
        assert (source, split, column, streaming) == ("wikimedia/wikipedia:20231101.en", "train", "text", True)
        yield from [PROSE] * 2
        raise AssertionError("there was enough")

    monkeypatch.setattr(wiki27, "read_texts", hub)
    make("wikimedia/wikipedia:20231101.en", tmp_path / "hub", **small(test_characters=440))
    for split in SPLITS:
        text = "".join(read_texts(str(tmp_path / "out"), split))
        assert "".join(read_texts(str(tmp_path / "again"), split)) == text
        assert "".join(read_texts(str(tmp_path / "hub"), split))[:400] == text[:400]


def test_cutting() -> None:
    assert row_sizes(10, 4) == [4, 4, 2] and row_sizes(8, 4) == [4, 4]
    assert list(cut(["ab", "", "cdefg"], [1, 3, 3])) == ["a", "bcd", "efg"]
    with pytest.raises(ValueError, match="the source has 3 characters: ask for fewer in all"):
        list(cut(["ab", "c"], [2, 2]))


def test_too_little_text_leaves_what_was_there(dump: Path, tmp_path: Path) -> None:
    make(dump, tmp_path / "out", **small())
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ValueError, match="the source has 2,760 characters"):
        make(dump, tmp_path / "out", **small(test_characters=4000))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    file = extracted(tmp_path, []) / "AA" / "wiki_00"
    with pytest.raises(ValueError, match="cannot read .*wiki_00: it has no <doc"):
        list(read_articles(str(tmp_path), "text"))
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="cannot read .*wiki_00: .*utf-8"):
        list(read_articles(str(tmp_path), "text"))


def test_wrong_options(tmp_path: Path) -> None:
    for name in ("train_characters", "validation_characters", "test_characters", "row_characters"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            Wiki27Arguments(source=SAMPLE, out="out", **{name: 0})
    for source in ("no/such/folder", "none/*.txt", str(tmp_path / "none")):
        with pytest.raises(FileNotFoundError, match="source: no such file or folder"):
            Wiki27Arguments(source=source, out="out")
    assert Wiki27Arguments(source="wikimedia/wikipedia:20231101.en", out="out").text_column == "text"
    (tmp_path / "train-00000-of-00002.parquet").touch()
    with pytest.raises(ValueError, match="out must have no other text of a split, and .* has train-00000"):
        Wiki27Arguments(source=SAMPLE, out=str(tmp_path))
