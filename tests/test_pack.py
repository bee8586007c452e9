"""Packed ids are the ids of the text, whatever they are cut and limited to, or they are refused."""

import contextlib
import json
import lzma
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from training import pack
from training.common.checkpoint import fingerprint
from training.common.data import StreamedBlocks, character_tokenizer, read_texts, tokenize, vocabulary_hash
from training.pretrain import Blocks, PretrainArguments
from training.tokenizer import train_tokenizer

SAMPLE = str(Path(__file__).parent / "fixtures" / "wiki27-sample.parquet")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Documents of many lengths, one of them empty, of words that come again."""
    rng, whole = random.Random(0), next(read_texts(SAMPLE))
    words = whole.split()[:300]
    return [" ".join(rng.choices(words, k=k)).capitalize() for k in (0, 1, *rng.choices(range(5, 300), k=60))]


@pytest.fixture(scope="module")
def pieces(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer of more than 256 ids and an EOS."""
    folder = tmp_path_factory.mktemp("pieces")
    train_tokenizer(texts, 300).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def characters(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("characters")
    character_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def source(texts: list[str], tmp_path: Path) -> str:
    write_parquet(tmp_path / "text" / "train.parquet", texts)
    write_parquet(tmp_path / "text" / "validation.parquet", texts[::-2])
    return str(tmp_path / "text")


@pytest.fixture
def packed(source: str, pieces: str, tmp_path: Path) -> Path:
    run(f"--data {source} --tokenizer {pieces} --out {tmp_path / 'packed'}")
    return tmp_path / "packed"


def write_parquet(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path)


def run(options: str) -> None:
    pack.main(options.split())


def load(folder: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)


def described(packed: Path, **changes) -> dict:
    """The description of the training ids, with changes if there are any."""
    path = packed / "train.tokens.json"
    description = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(description))
    return description


# ---- the same ids


@pytest.mark.parametrize("kind", ["pieces", "characters"])
def test_the_ids_are_those_of_the_text(
    kind: str, source: str, texts: list[str], tmp_path: Path, request: pytest.FixtureRequest, monkeypatch
) -> None:
    folder = request.getfixturevalue(kind)
    tokenizer, out = load(folder), str(tmp_path / "packed")
    for split in ("train", "validation"):
        run(f"--data {source} --tokenizer {folder} --split {split} --out {out}")
        expected, tokens = (tokenize(s, tokenizer, tmp_path / "cache", split) for s in (source, out))
        assert isinstance(tokens, np.memmap) and tokens.dtype == expected.dtype and not tokens.flags.writeable
        assert np.array_equal(tokens, expected) and fingerprint(tokens) == fingerprint(expected)
        description = json.loads((tmp_path / "packed" / f"{split}.tokens.json").read_text())
        assert description["num_ids"] == len(tokens)
        assert description["sources"] == ["data/text"] and "--data data/text" in description["command"]
        assert str(tmp_path) not in json.dumps(description["sources"])
    assert len(list((tmp_path / "cache").iterdir())) == 4
    monkeypatch.setattr(lzma, "open", None)  # would fail if called: what is unpacked is kept
    tokenize(out, tokenizer, tmp_path / "cache")


def test_several_sources_are_one(source: str, pieces: str, packed: Path, tmp_path: Path) -> None:
    tokenizer = load(pieces)
    (tmp_path / "more.txt").write_text("One more document, in a file.")
    sources = [source, str(tmp_path / "more.txt"), SAMPLE]
    run(f"--data {','.join(sources)} --tokenizer {pieces} --out {tmp_path / 'all'}")
    each = [tokenize(one, tokenizer, tmp_path) for one in sources]
    assert np.array_equal(tokenize(str(tmp_path / "all"), tokenizer, tmp_path), np.concatenate(each))
    again = json.loads((tmp_path / "all" / "train.tokens.json").read_text())
    assert again["num_documents"] == again["of_documents"] == 62 + 1 + 6


def test_smaller_than_by_the_usual_settings(characters: str, pieces: str, source: str, tmp_path: Path) -> None:
    for text, folder in ((SAMPLE, characters), (source, pieces)):
        run(f"--data {text} --tokenizer {folder} --out {tmp_path / 'packed'}")
        ids = tokenize(text, load(folder), tmp_path)
        plain = lzma.compress(ids.tobytes(), preset=9 | lzma.PRESET_EXTREME)
        assert (tmp_path / "packed" / "train.tokens.xz").stat().st_size < len(plain)


def test_more_ids_than_16_bits(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(70_000)}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.save_pretrained(tmp_path / "words")
    write_parquet(tmp_path / "text" / "train.parquet", ["w69999 w0 w65536 w65535 w3", "w3 w3"])
    run(f"--data {tmp_path / 'text'} --tokenizer {tmp_path / 'words'} --out {tmp_path / 'packed'}")
    tokens = tokenize(str(tmp_path / "packed"), tokenizer, tmp_path)
    assert tokens.tolist() == [69999, 0, 65536, 65535, 3, 3, 3] and tokens.dtype == np.uint32


def test_training_from_packed_ids(source: str, pieces: str, packed: Path, tmp_path: Path) -> None:
    """The batches, the fingerprint that a checkpoint is held to, and the validation text are those of the text."""
    run(f"--data {source} --tokenizer {pieces} --split validation --out {packed}")
    accelerator = SimpleNamespace(
        process_index=0, num_processes=1, device="cpu", main_process_first=contextlib.nullcontext
    )
    both = [
        Blocks(
            PretrainArguments(data=str(data), tokenizer=pieces, output_dir=str(tmp_path), batch_size=5),
            load(pieces),
            16,
            accelerator,
        )
        for data in (source, packed)
    ]
    assert both[0].fingerprint == both[1].fingerprint
    assert all(torch.equal(both[0].batch(step, 0), both[1].batch(step, 0)) for step in range(9))
    assert np.array_equal(both[0].validation.tokens, both[1].validation.tokens)


# ---- limits


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
def test_a_limit_keeps_evenly_spaced_documents(
    share: float, source: str, pieces: str, packed: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    run(f"--data {source} --tokenizer {pieces} --out {packed}")
    limit = share * described(packed)["files"]["train.tokens.xz"]
    run(f"--data {source} --tokenizer {pieces} --max_megabytes {limit / 1e6} --out {packed}")
    description = described(packed)
    assert 0.7 * limit < description["files"]["train.tokens.xz"] <= limit
    number = description["num_documents"]
    assert 0.7 * share * 62 < number < 62 == description["of_documents"]
    assert f"{description['num_ids']:,} ids of {number} documents, of 62" in capsys.readouterr().out

    texts = list(read_texts(source))
    write_parquet(tmp_path / "chosen.parquet", [texts[i * 62 // number] for i in range(number)])
    expected = tokenize(str(tmp_path / "chosen.parquet"), load(pieces), tmp_path)
    assert np.array_equal(tokenize(str(packed), load(pieces), tmp_path), expected)


def test_a_limit_that_holds_nothing(source: str, pieces: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_megabytes=5e-05 does not hold one document"):
        run(f"--data {source} --tokenizer {pieces} --max_megabytes 0.00005 --out {tmp_path / 'packed'}")
    assert not (tmp_path / "packed").exists()


def test_files_of_a_size(source: str, pieces: str, packed: Path, tmp_path: Path) -> None:
    tokenizer = load(pieces)
    whole, ids = (packed / "train.tokens.xz").read_bytes(), tokenize(str(packed), tokenizer, tmp_path / "1")
    run(f"--data {source} --tokenizer {pieces} --max_file_megabytes 0.001 --out {packed}")
    parts = sorted(packed.glob("train.tokens.xz*"))
    assert [part.name for part in parts] == [f"train.tokens.xz.{i:03}" for i in range(-(-len(whole) // 1000))]
    assert b"".join(part.read_bytes() for part in parts) == whole
    assert {part.stat().st_size for part in parts[:-1]} == {1000}
    assert np.array_equal(tokenize(str(packed), tokenizer, tmp_path / "2"), ids)
    run(f"--data {source} --tokenizer {pieces} --out {packed}")
    assert {path.name for path in packed.iterdir()} == {"train.tokens.json", "train.tokens.xz"}


# ---- what is refused


def test_ids_of_another_tokenizer(packed: Path, pieces: str, characters: str, tmp_path: Path) -> None:
    mine, other = vocabulary_hash(load(pieces)), vocabulary_hash(load(characters))
    with pytest.raises(ValueError, match=f"train.tokens.json has ids of a tokenizer of hash {mine}.* has {other}"):
        tokenize(str(packed), load(characters), tmp_path)
    with pytest.raises(ValueError, match=r"train.tokens.json has \[2\] behind each .*join='none' asks for \[\]"):
        tokenize(str(packed), load(pieces), tmp_path, join="none")
    assert not list(tmp_path.glob("*.npy"))


def test_where_text_is_needed(packed: Path, pieces: str, tmp_path: Path) -> None:
    for use in (lambda: read_texts(str(packed)), lambda: StreamedBlocks(str(packed), load(pieces), 16, 0)):
        with pytest.raises(
            ValueError, match="train.tokens.json is of packed token ids: there is no text to read, or to"
        ):
            use()
    with pytest.raises(FileNotFoundError, match=r"no test\*.parquet or .* the folder has \['train.tokens.json'"):
        tokenize(str(packed), load(pieces), tmp_path, "test")


def cut(packed: Path) -> None:
    """As a copy that broke off, whose length nobody wrote down."""
    content = (packed / "train.tokens.xz").read_bytes()[:-100]
    (packed / "train.tokens.xz").write_bytes(content)
    described(packed, files={"train.tokens.xz": len(content)})


def shortened(packed: Path) -> None:
    (packed / "train.tokens.xz").write_bytes((packed / "train.tokens.xz").read_bytes()[:-1])


def flipped(packed: Path) -> None:
    content = bytearray((packed / "train.tokens.xz").read_bytes())
    content[len(content) // 2] ^= 1
    (packed / "train.tokens.xz").write_bytes(content)


DAMAGE = {
    "cut": (cut, "ended before the end-of-stream"),
    "shortened": (shortened, "train.tokens.xz has [0-9]+ bytes, not [0-9]+"),
    "flipped": (flipped, "Corrupt|hash"),
    "no file": (lambda packed: (packed / "train.tokens.xz").unlink(), "No such file"),
    "no JSON": (lambda packed: (packed / "train.tokens.json").write_text("{"), "Expecting"),
    "no description": (lambda packed: (packed / "train.tokens.json").write_text("{}"), "missing 10 required"),
    "another hash": (lambda packed: described(packed, sha256="0"), "the ids have the hash [0-9a-f]{64}, not 0$"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files(name: str, packed: Path, pieces: str, tmp_path: Path) -> None:
    damage, reason = DAMAGE[name]
    damage(packed)
    with pytest.raises(ValueError, match=f"train.tokens.json: .*({reason})"):
        tokenize(str(packed), load(pieces), tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))


@pytest.mark.parametrize("place", ["compressed", "write_whole", "write_json"])
def test_broken_off(place: str, source: str, pieces: str, packed: Path, tmp_path: Path, monkeypatch) -> None:
    """What was there stays until the new is ready; what is not whole is not read; run again."""

    def breaks_off(*args):
        raise KeyboardInterrupt

    before = tokenize(str(packed), load(pieces), tmp_path / "1")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pack, place, breaks_off)
        run(f"--data {source} --tokenizer {pieces} --out {packed}")
    if place != "compressed":
        with pytest.raises(FileNotFoundError):
            tokenize(str(packed), load(pieces), tmp_path / "2")
        run(f"--data {source} --tokenizer {pieces} --out {packed}")
    assert np.array_equal(tokenize(str(packed), load(pieces), tmp_path / "3"), before)


def test_wrong_arguments(source: str, pieces: str, tmp_path: Path) -> None:
    for options, message in {
        "--max_megabytes -1": "max_megabytes must not be negative, got -1.0",
        "--max_file_megabytes -2": "max_file_megabytes must not be negative, got -2.0",
        "--data ,": "data must be given, got ','",
    }.items():
        with pytest.raises(ValueError, match=message):
            run(f"--data {source} --tokenizer {pieces} --out {tmp_path / 'out'} {options}")
    write_parquet(tmp_path / "blank" / "train.parquet", ["", ""])
    character_tokenizer().save_pretrained(tmp_path / "characters")
    with pytest.raises(ValueError, match="data='.*blank' has no tokens"):
        run(f"--data {tmp_path / 'blank'} --tokenizer {tmp_path / 'characters'} --out {tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()
