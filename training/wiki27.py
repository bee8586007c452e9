"""Make the text of the 27-letter models: Wikipedia in 27 symbols, a to z and the space, by the rule of text8.

    git clone https://github.com/jason-feng/wikiVisual
    git -C wikiVisual checkout 1c0fac92f29f17c1603bfffbe864e0dfdff66897 -- text
    python -m training.wiki27 --source wikiVisual/text --out data/wiki27
    python -m training.wiki27 --source wikimedia/wikipedia:20231101.en --out data/wiki27-2023

The first three give the text of the models in hub_cards/, byte for byte, from a dump of May 2015; the last one applies
the same rule to another dump, read over the network only as far as it is needed. The text is one stream of characters,
cut into train, validation and test in this order, and each of these into rows with nothing between them.
"""

import glob
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .common.arguments import answer_early, is_path, parse_arguments

SPLITS = ("train", "validation", "test")


@dataclass(kw_only=True)
class Wiki27Arguments:
    source: str = field(
        metadata={"help": "folder that WikiExtractor wrote; or parquet or text files, or a Hub data set, name:config"}
    )
    out: str = field(metadata={"help": "folder of train.parquet, validation.parquet and test.parquet"})
    train_characters: int = 90_000_000
    validation_characters: int = 5_000_000
    test_characters: int = 5_000_000
    row_characters: int = field(default=100_000, metadata={"help": "length of a row; the last of a split may be short"})
    text_column: str = field(default="text", metadata={"help": "of parquet files and data sets: one article a row"})

    def __post_init__(self):
        for name in (*(f"{split}_characters" for split in SPLITS), "row_characters"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        there = glob.glob(self.source) if glob.has_magic(self.source) else Path(self.source).exists()
        if not there and is_path(self.source.partition(":")[0]):
            raise FileNotFoundError(f"source: no such file or folder: {self.source}")
        for split in SPLITS:  # whoever trains on the folder would read these too, or instead
            if others := [x.name for x in sorted(Path(self.out).glob(f"{split}*")) if x.name != f"{split}.parquet"]:
                raise ValueError(f"out must have no other text of a split, and {self.out} has {others[0]}")


if __name__ == "__main__":
    answer_early(Wiki27Arguments, __doc__)

import hashlib
import html
import string

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from .common.data import DIGITS, read_texts
from .common.results import added_files

SHIPPED = "f2aae67662738113c8c3376ce41c5a01b316ca4bedb3fcab1d33697cc237d8e2"  # of the stream behind hub_cards/
ROWS = 100  # of a row group

DOCUMENT = re.compile(r'<doc id="[^"]*" url="[^"]*" title="(.*?)">\n(.*?)\n?</doc>', re.DOTALL)
TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
MARKUP = ("[[", "]]", "{{", "}}", "{|", "|}", "||", "__")  # left by an extractor; a line with one is no prose
DISAMBIGUATION = re.compile("(may|can) (also )?refer to")
LEAST = 500  # characters of an article

LETTERS = dict(zip(string.ascii_uppercase, string.ascii_lowercase, strict=True))
SPELLED = {digit: f" {name} " for digit, name in zip(string.digits, DIGITS, strict=True)}
TABLE = str.maketrans(LETTERS | SPELLED)


# ---- the rule


def cleaned(text: str) -> str:
    """Lines of prose: entities are unescaped, tags and lines with wiki markup left out, white space is one space."""
    lines = (TAG.sub("", html.unescape(line)) for line in text.split("\n"))
    lines = (" ".join(line.split()) for line in lines if not any(mark in line for mark in MARKUP))
    return "\n".join(line for line in lines if line)


def reduced(text: str) -> str:
    """In 27 symbols, as the end of Mahoney's wikifil.pl has it, with one space before the first word, none at the end.

    A-Z become small letters and each digit its name, a word of its own; every run of other characters is one space,
    and an accented letter is such a character.
    """
    return " ".join(["", *re.findall("[a-z]+", text.translate(TABLE))])


def stream(articles: Iterable[str]) -> Iterator[str]:
    """The articles that are kept, in 27 symbols: not stubs, nor pages that only say what a name may refer to."""
    for article in articles:
        text = cleaned(article)
        if len(text) >= LEAST and not DISAMBIGUATION.search(text[:300]):
            yield reduced(text)


# ---- from source to files


def read_articles(source: str, text_column: str) -> Iterator[str]:
    """In the order of the source. In files of WikiExtractor, FOLDER/AA/wiki_00 and so on, each begins with its title,
    which is left out.
    """
    files = sorted(Path(source).glob("*/wiki_*"))
    if not files:
        yield from read_texts(source, "train", text_column, streaming=True)
    for file in files:
        try:
            documents = DOCUMENT.findall(file.read_bytes().decode("utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read {file}: {error}") from error
        if not documents:
            raise ValueError(f"cannot read {file}: it has no <doc id url title> ... </doc>")
        for title, text in documents:
            first, _, rest = text.partition("\n")
            yield rest if html.unescape(first).strip() == html.unescape(title).strip() else text


def cut(pieces: Iterable[str], sizes: Iterable[int]) -> Iterator[str]:
    """What stands one after another in the stream of the pieces, in these sizes; ValueError where it ends before."""
    pieces, held, start, total = iter(pieces), "", 0, 0
    for size in sizes:
        while len(held) - start < size:
            if (piece := next(pieces, None)) is None:
                raise ValueError(f"the source has {total + len(held) - start:,} characters: ask for fewer in all")
            held, start = held[start:] + piece, 0
        yield held[start : start + size]
        start, total = start + size, total + size


def row_sizes(characters: int, row: int) -> list[int]:
    return [row] * (characters // row) + [characters % row] * (characters % row > 0)


def write_rows(path: Path, rows: Iterable[str]) -> None:
    schema, group = pa.schema({"text": pa.string()}), []
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as writer:
        for row in rows:
            group.append(row)
            if len(group) == ROWS:
                writer.write_table(pa.table({"text": group}, schema))
                group = []
        if group:
            writer.write_table(pa.table({"text": group}, schema))


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(Wiki27Arguments, __doc__, argv)
    sizes = {split: row_sizes(getattr(arguments, f"{split}_characters"), arguments.row_characters) for split in SPLITS}
    texts = cut(stream(read_articles(arguments.source, arguments.text_column)), [n for s in sizes.values() for n in s])
    digests = {split: hashlib.sha256() for split in (*SPLITS, "whole")}
    total, out = sum(map(sum, sizes.values())), Path(arguments.out)
    bar = {"desc": f"reading {arguments.source}", "unit": "char", "unit_scale": True, "disable": None}
    with added_files(out) as folder, tqdm(total=total, **bar) as progress:

        def hashed(split: str) -> Iterator[str]:
            for _ in sizes[split]:
                row = next(texts)
                for name in (split, "whole"):
                    digests[name].update(row.encode())
                yield row
                progress.update(len(row))

        for split in SPLITS:
            write_rows(folder / f"{split}.parquet", hashed(split))
    for split, rows in sizes.items():
        print(f"{split}: {sum(rows):,} characters in {len(rows):,} rows, sha256 {digests[split].hexdigest()}")
    whole = digests["whole"].hexdigest()
    verdict = "the text of the shipped models" if whole == SHIPPED else f"the shipped models have seen {SHIPPED}"
    print(f"whole: {total:,} characters, sha256 {whole} ({verdict}): {out}")


if __name__ == "__main__":
    main()
