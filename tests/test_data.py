"""Reading, tokenizing, packing, batching and streaming; needs no network, no GPU and, but for Hub names, no `datasets`.

Shapes: B batch, L length, N blocks.
"""

import contextlib
import gzip
import itertools
import random
import shutil
import string
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import chisquare
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from training.common import data
from training.common.arguments import names_files
from training.common.data import (
    PackedTokens,
    StreamedBlocks,
    character_tokenizer,
    evenly_spaced,
    read_texts,
    step_batch_indices,
    tokenize,
)
from training.pretrain import Blocks, PretrainArguments

SAMPLE = str(Path(__file__).parent / "fixtures" / "wiki27-sample.parquet")


@pytest.fixture(autouse=True)
def _no_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs as if `datasets` were not installed, unless it brings its own."""
    monkeypatch.setitem(sys.modules, "datasets", None)


@pytest.fixture(scope="module")
def characters() -> PreTrainedTokenizerFast:
    return character_tokenizer()


@pytest.fixture(scope="module")
def sample() -> str:
    return "".join(pq.read_table(SAMPLE).column("text").to_pylist())


@pytest.fixture(scope="module")
def bpe(sample: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE with an end-of-text token and more than 256 ids, as GPT-2's but small."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([sample], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def write_parquet(path: Path, texts: list, column: str = "text", rows: int = 2) -> str:
    pq.write_table(pa.table({column: texts}), path, row_group_size=rows)
    return str(path)


# ---- reading


def test_the_sample_is_one_stream_in_rows(sample: str) -> None:
    rows = list(read_texts(SAMPLE))
    assert [len(row) for row in rows] == [10_000] * 6
    assert "".join(rows) == sample
    assert set(sample) == set(" " + string.ascii_lowercase) and "  " not in sample


def test_a_folder_gives_the_shards_of_the_split_in_order(tmp_path: Path) -> None:
    for i in (1, 0):
        write_parquet(tmp_path / f"train-0000{i}.parquet", [f"shard {i} row {r}" for r in range(3)])
    write_parquet(tmp_path / "validation.parquet", ["held out"])
    (tmp_path / "notes.txt").write_text("not data")
    assert list(read_texts(str(tmp_path))) == [f"shard {i} row {r}" for i in range(2) for r in range(3)]
    assert list(read_texts(str(tmp_path), "validation")) == ["held out"]


def test_a_folder_of_text_files(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes("zweite\r\nZeile \u00e9".encode())
    (tmp_path / "a.txt").write_text("first")
    assert list(read_texts(str(tmp_path))) == ["first", "zweite\r\nZeile \u00e9"]
    # Text of no split is for training only; validating on it must be asked for, by a file's name.
    with pytest.raises(FileNotFoundError, match=r"no validation\*.parquet or validation\*.txt or .*a.txt"):
        read_texts(str(tmp_path), "validation")
    (tmp_path / "validation.txt").write_text("held out")
    (tmp_path / "train.txt").write_text("seen")
    assert list(read_texts(str(tmp_path), "validation")) == ["held out"]
    assert list(read_texts(str(tmp_path))) == ["seen"]


def test_lines_of_json_compressed_text_and_patterns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one\\n"}\n\n{"text": "zwei \u00e9", "n": 2}\n', encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("drei \u00e9\n".encode()))
    (tmp_path / "c.txt").write_text("four")
    (tmp_path / ".c.txt").write_text("an editor's")
    (tmp_path / "d.txt").mkdir()
    assert list(read_texts(str(tmp_path / "a.jsonl"))) == ["one\n", "zwei \u00e9"]
    assert list(read_texts(str(tmp_path / "b.txt.gz"))) == ["drei \u00e9\n"]
    assert list(read_texts(str(tmp_path / "[a-c]*"), "validation")) == ["one\n", "zwei \u00e9", "drei \u00e9\n", "four"]
    assert list(read_texts(str(tmp_path))) == ["four"]
    for source in (tmp_path / "*.nothing", tmp_path / "none.jsonl", "none.jsonl", "none.txt.gz"):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            read_texts(str(source))
    (tmp_path / "train-1.jsonl").write_text('{"text": "of the split"}')
    assert list(read_texts(str(tmp_path))) == ["of the split"]
    assert (
        names_files(str(tmp_path / "*.txt")) and names_files(str(tmp_path / "c.txt")) and not names_files(str(tmp_path))
    )


def test_missing_sources(tmp_path: Path) -> None:
    for source in (tmp_path / "none.parquet", tmp_path / "none", "none.txt", "./none/there", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="none|a/b/c"):
            read_texts(str(source))
    with pytest.raises(FileNotFoundError, match=r"no train\*.parquet"):
        read_texts(str(tmp_path))


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("empty.parquet", b"", "0 bytes"),
        ("noise.parquet", b"this is no parquet file at all", "arquet"),
        ("empty.txt", b"", "empty"),
        ("latin.txt", "caf\u00e9".encode("latin-1"), "utf-8.*position 3"),
        ("table.csv", b"text\nhello", "expected a file of .parquet, .txt, .jsonl, .txt.gz"),
        ("cut.txt.gz", gzip.compress(b"text", mtime=0)[:-9], "end-of-stream"),
        ("noise.txt.gz", b"this is no gzip", "gzip"),
        ("broken.jsonl", b'{"text": "a"}\n{"te', "Unterminated"),
        ("other.jsonl", b'{"body": "a"}', "field 'text' has None in row 0, which is not text"),
        ("empty.jsonl", b"", "the file has no rows"),
    ],
)
def test_bad_files_are_named_with_the_reason(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s){name}.*{reason}"):
        list(read_texts(str(tmp_path / name)))


def test_bad_parquet_contents_are_named_with_the_reason(tmp_path: Path) -> None:
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(Path(SAMPLE).read_bytes()[:-100])
    damaged = bytearray(Path(SAMPLE).read_bytes())  # the footer is whole, the pages are not
    damaged[3000:12000] = bytes(9000)
    (tmp_path / "damaged.parquet").write_bytes(damaged)
    write_parquet(tmp_path / "rows.parquet", pa.array([], pa.string()))
    write_parquet(tmp_path / "column.parquet", ["x"], column="body")
    write_parquet(tmp_path / "null.parquet", ["x", "y", None])
    write_parquet(tmp_path / "number.parquet", [1, 2])
    write_parquet(tmp_path / "binary.parquet", [b"ok"])
    for name, reason in {
        "cut": "",
        "damaged": "",
        "rows": "no rows",
        "column": r"no column 'text'; the columns are \['body'\]",
        "null": "None in row 2",
        "number": "1 in row 0",
        "binary": "b'ok' in row 0",
    }.items():
        with pytest.raises(ValueError, match=f"{name}.parquet: .*{reason}"):
            list(read_texts(str(tmp_path / f"{name}.parquet")))


def test_hub_names_need_datasets() -> None:
    with pytest.raises(ImportError, match="'owner/name' is no file or folder.*pip install datasets"):
        read_texts("owner/name")


class FakeHub:
    """As much of a `datasets.Dataset` as is used."""

    column_names, _fingerprint = ["id", "text"], "f1"

    def select_columns(self, names: list[str]) -> list[dict[str, str]]:
        return [{name: f"{name} {i}" for name in names} for i in range(3)]


def test_hub_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bpe: PreTrainedTokenizerFast) -> None:
    def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> FakeHub:
        assert not streaming
        calls.append((name, config, split))
        if name == "owner/none":
            raise ConnectionError("no network")
        return FakeHub()

    calls: list[tuple] = []
    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)

    assert list(read_texts("owner/name:config", "test")) == ["text 0", "text 1", "text 2"]
    assert list(read_texts("name")) == ["text 0", "text 1", "text 2"]
    assert calls == [("owner/name", "config", "test"), ("name", None, "train")]
    with pytest.raises(FileNotFoundError, match="'owner/none' is no file or folder.*no network"):
        read_texts("owner/none")
    with pytest.raises(ValueError, match=r"owner/name: no column 'body'; the columns are \['id', 'text'\]"):
        read_texts("owner/name", text_column="body")

    tokens = tokenize("owner/name:config", bpe, tmp_path)
    assert bpe.decode(tokens) == "".join(f"text {i}<|endoftext|>" for i in range(3))
    monkeypatch.setattr(FakeHub, "_fingerprint", "f2")
    tokenize("owner/name:config", bpe, tmp_path)
    assert len(list(tmp_path.glob("name-config-train.*.npy"))) == 2


# ---- tokenizing


def test_the_stream_of_the_sample_is_its_text(tmp_path: Path, characters: PreTrainedTokenizerFast, sample: str) -> None:
    tokens = tokenize(SAMPLE, characters, tmp_path)
    assert isinstance(tokens, np.memmap) and not tokens.flags.writeable
    assert tokens.dtype == np.uint8 and tokens.shape == (60_000,)
    assert tokens.tolist() == characters(sample)["input_ids"]
    assert characters.decode(tokens) == sample


def test_documents_are_followed_by_eos(
    tmp_path: Path, bpe: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["first one", "", "zwei\u00e9 \U0001f600\n", "as text: <|endoftext|>", "x" * 100]
    source = write_parquet(tmp_path / "texts.parquet", texts)
    backend = data.plain_backend(bpe)
    ids = [backend.encode(text).ids for text in texts]
    assert bpe.eos_token_id not in sum(ids, [])  # also where a text spells it

    for chars in (1, 20, 4_000_000):  # the batches do not show
        monkeypatch.setattr(data, "BATCH_CHARS", chars)
        with_eos = tokenize(source, bpe, tmp_path / str(chars))
        assert with_eos.tolist() == sum([i + [bpe.eos_token_id] for i in ids], [])
        assert with_eos.dtype == np.uint16
    without = tokenize(source, bpe, tmp_path, join="none")
    assert without.tolist() == sum(ids, [])
    assert bpe.decode(without) == "".join(texts)
    with pytest.raises(ValueError, match="'eos' or 'none', not 'space'"):
        tokenize(source, bpe, tmp_path, join="space")


def test_earlier_calls_of_the_tokenizer_do_not_matter(tmp_path: Path, bpe: PreTrainedTokenizerFast) -> None:
    source = write_parquet(tmp_path / "texts.parquet", ["a long text", "b"])
    before = tokenize(source, bpe, tmp_path)
    bpe("a long text", truncation=True, max_length=2)
    assert np.array_equal(before, tokenize(source, bpe, tmp_path / "other"))
    tokenize(source, bpe, tmp_path)
    assert len(list(tmp_path.glob("*.npy"))) == 1


def test_the_cache_is_used_and_follows_its_sources(
    tmp_path: Path, characters: PreTrainedTokenizerFast, bpe: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copy(SAMPLE, tmp_path / "text.parquet")
    out = tmp_path / "cache"
    first = tokenize(source, characters, out)
    with monkeypatch.context() as patch:
        patch.setattr(data, "_write_npy", None)  # would fail if called
        assert np.array_equal(tokenize(source, characters, out), first)
    tokenize(source, bpe, out)
    tokenize(source, bpe, out, join="none")
    tokenize(source, character_tokenizer(string.ascii_lowercase + " "), out)
    assert len(list(out.iterdir())) == 4
    write_parquet(Path(source), ["another text"])
    assert characters.decode(tokenize(source, characters, out)) == "another text"
    assert len(list(out.iterdir())) == 5


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_broken_off_run_leaves_nothing(
    tmp_path: Path, characters: PreTrainedTokenizerFast, sample: str, monkeypatch: pytest.MonkeyPatch, error: type
) -> None:
    def breaks_off(*args):
        yield from list(complete(*args))[:3]
        assert len(list(tmp_path.glob("*.tmp"))) == 1 and not list(tmp_path.glob("*.npy"))
        raise error

    monkeypatch.setattr(data, "BATCH_CHARS", 10_000)
    complete = data._encode
    monkeypatch.setattr(data, "_encode", breaks_off)
    with pytest.raises(error):
        tokenize(SAMPLE, characters, tmp_path)
    assert not list(tmp_path.iterdir())

    monkeypatch.setattr(data, "_encode", complete)
    (tmp_path / "wiki27-sample.0.tmp").write_bytes(b"of a process that was killed")
    assert characters.decode(tokenize(SAMPLE, characters, tmp_path)) == sample


def test_texts_without_tokens_or_that_cannot_be_tokenized(tmp_path: Path) -> None:
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})))  # no id for the rest
    source = write_parquet(tmp_path / "texts.parquet", ["a", "a", "b"])
    with pytest.raises(ValueError, match="texts.parquet: documents 0 to 2 cannot be tokenized: .*UNK"):
        tokenize(source, words, tmp_path)
    source = write_parquet(tmp_path / "empty.parquet", ["", ""])
    with pytest.raises(ValueError, match="no tokens"):
        tokenize(source, words, tmp_path)
    assert not list(tmp_path.glob("*.npy")) + list(tmp_path.glob("*.tmp"))


def test_evenly_spaced() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 100, 200)
    for limit in (0, 1, 50, 1000, 5000, sizes.sum() - 1):
        chosen = evenly_spaced(sizes, limit)
        assert sizes[chosen].sum() <= limit
        assert sizes[chosen].sum() > 0.8 * limit or limit < 1000
        assert len(chosen) < 2 or set(np.diff(chosen)) <= {200 // len(chosen), 200 // len(chosen) + 1}
    assert evenly_spaced(sizes, sizes.sum()).tolist() == list(range(200))


# ---- characters


def test_ids_follow_the_alphabet_and_the_mask_is_last(characters: PreTrainedTokenizerFast) -> None:
    assert characters("abc")["input_ids"] == [1, 2, 3]
    assert characters(" " + string.ascii_lowercase)["input_ids"] == list(range(27))
    assert len(characters) == 28 and characters.mask_token_id == 27
    assert characters.all_special_tokens == ["[MASK]"] and characters.model_max_length == 256


@pytest.mark.parametrize(
    "text, becomes",
    [
        ("", ""),
        (" spaces at the ends ", " spaces at the ends "),
        ("the [MASK][MASK][MASK] cat", "the [MASK][MASK][MASK] cat"),
        ("[MASK]", "[MASK]"),
        ("a [MASK] b", "a [MASK] b"),
        ("In 1984, the END\u00e9!\n", "in one nine eight four the end "),
        ("caf\u00e9s  and\t\ttabs", "caf s and tabs"),
        ("42", " four two "),
        ("\U0001f600", " "),
    ],
)
def test_any_text_can_be_encoded(characters: PreTrainedTokenizerFast, text: str, becomes: str) -> None:
    ids = characters(text)["input_ids"]
    assert characters.decode(ids) == becomes
    assert len(ids) == len(becomes.replace("[MASK]", "#")) == ids.count(27) + sum(i < 27 for i in ids)


def test_saved_and_loaded_it_is_the_same(tmp_path: Path, characters: PreTrainedTokenizerFast) -> None:
    characters.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.backend_tokenizer.to_str() == characters.backend_tokenizer.to_str()
    assert (loaded.mask_token_id, loaded.model_max_length, len(loaded)) == (27, 256, 28)
    text = " In 1984 the [MASK][MASK] cat, "
    assert loaded(text)["input_ids"] == characters(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == " in one nine eight four the [MASK][MASK] cat "


@pytest.mark.parametrize("alphabet", [" abcdefghijklmnopqrstuvwxyz", string.printable, "ab]^-[\\&\u00e9\u4e2d", "01"])
def test_the_table_equals_the_tokenizer(tmp_path: Path, alphabet: str) -> None:
    tokenizer = character_tokenizer(alphabet)
    lookup = data._character_lookup(data.plain_backend(tokenizer))
    assert lookup(alphabet).tolist() == list(range(len(alphabet)))
    rng = random.Random(0)
    others = ["A", "7", "  ", "\u00e9", "\U0001f600", "[MASK]", "\n", "\u0130"]
    texts = ["".join(rng.choices(alphabet, k=50)) for _ in range(50)]
    texts += ["".join(rng.choices(list(alphabet) + others, k=20)) for _ in range(50)] + ["", "[MASK]"]
    tokens = tokenize(write_parquet(tmp_path / "texts.parquet", texts), tokenizer, tmp_path)
    assert tokens.tolist() == sum(tokenizer(texts, split_special_tokens=True)["input_ids"], [])
    assert tokens.max() < tokenizer.mask_token_id  # text is never taken for the mask


def test_the_table_serves_no_other_tokenizer(bpe: PreTrainedTokenizerFast) -> None:
    assert data._character_lookup(data.plain_backend(bpe))("abc") is None
    other = Tokenizer(models.WordLevel({"a": 0, "b": 1}))
    assert data._character_lookup(other)("ab") is None


def test_alphabets_that_are_none() -> None:
    for alphabet in ("", "aba"):
        with pytest.raises(ValueError, match=f"each character once, not {alphabet!r}"):
            character_tokenizer(alphabet)


# ---- blocks and batches


@pytest.mark.parametrize("num_tokens, length", [(7, 7), (8, 7), (13, 7), (14, 7), (100, 1), (60, 16)])
def test_every_token_is_new_in_one_block(num_tokens: int, length: int) -> None:
    tokens = np.arange(num_tokens, dtype=np.uint16)
    blocks = list(PackedTokens(tokens, length))
    assert len(blocks) == len(PackedTokens(tokens, length)) == -(-num_tokens // length)
    assert all(block["input_ids"].shape == (length,) for block in blocks)
    assert all(block["input_ids"].dtype == torch.int64 for block in blocks)
    assert torch.cat([block["input_ids"][length - block["num_new"] :] for block in blocks]).tolist() == tokens.tolist()
    assert blocks[-1]["input_ids"][-1] == num_tokens - 1


@pytest.mark.parametrize("num_tokens, length", [(7, 7), (13, 7), (14, 7), (100, 1), (60, 16)])
def test_a_batch_is_its_blocks(tmp_path: Path, num_tokens: int, length: int) -> None:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 60_000, num_tokens, np.uint16))
    blocks = PackedTokens(np.load(tmp_path / "ids.npy", mmap_mode="r"), length)
    indices = step_batch_indices(len(blocks), 2 * len(blocks) + 1, 0, 0)  # each block twice, the last one too
    batch_BL = blocks.blocks(indices)
    assert batch_BL.dtype == torch.int64 and batch_BL.shape == (len(indices), length)
    for i, block_L in zip(indices.tolist(), batch_BL, strict=True):
        end = min((i + 1) * length, num_tokens)
        assert block_L.tolist() == blocks.tokens[end - length : end].tolist() == blocks[i]["input_ids"].tolist()
    batch_BL.zero_()  # a copy, not the file
    for wrong in (-1, len(blocks)):
        with pytest.raises(IndexError, match=f"block {wrong} of {len(blocks)}"):
            blocks.blocks(torch.tensor([0, wrong]))


def test_too_few_tokens_for_a_block() -> None:
    with pytest.raises(ValueError, match="5 tokens .* length 6"):
        PackedTokens(np.zeros(5, np.uint8), 6)
    with pytest.raises(IndexError):
        PackedTokens(np.zeros(5, np.uint8), 5)[1]


@pytest.mark.parametrize(
    "num_blocks, batch_size, world_size", [(12, 2, 3), (13, 2, 3), (5, 4, 2), (1, 2, 1), (7, 3, 1)]
)
def test_every_block_once_per_epoch(num_blocks: int, batch_size: int, world_size: int) -> None:
    def batch(step: int, rank: int) -> torch.Tensor:
        return step_batch_indices(num_blocks, batch_size, step, 3, rank, world_size)

    num_steps = 5 * num_blocks
    stream = torch.cat([batch(step, rank) for step in range(num_steps) for rank in range(world_size)])
    assert stream.dtype == torch.int64
    for epoch in stream[: len(stream) // num_blocks * num_blocks].view(-1, num_blocks):
        assert sorted(epoch.tolist()) == list(range(num_blocks))
    for step in (17 % num_steps, 0, num_steps - 1):  # in any order, and in a new process
        data._permutation.cache_clear()
        whole = step_batch_indices(num_blocks, batch_size * world_size, step, 3)
        assert torch.equal(torch.cat([batch(step, rank) for rank in range(world_size)]), whole)
        assert torch.equal(stream.view(num_steps, -1)[step], whole)


def test_epochs_and_seeds_differ() -> None:
    first, second = step_batch_indices(50, 50, 0, 0), step_batch_indices(50, 50, 1, 0)
    assert not torch.equal(first, second)
    assert not torch.equal(first, step_batch_indices(50, 50, 0, 1))


# ---- blocks that begin with a document


def test_document_blocks_begin_with_each_document_once():
    """Whatever the lengths, one of a token included; the last blocks go on with the first document."""
    rng, length = np.random.default_rng(0), 6
    documents = [np.append(rng.integers(1, 9, n), 0) for n in (9, 0, 5, 2, 20, 1)]
    tokens = np.concatenate(documents).astype(np.uint8)
    blocks, endless = data.DocumentBlocks(tokens, length, 0), np.tile(tokens, 2)
    starts = np.cumsum([0, *map(len, documents)])[:-1]
    assert len(blocks) == len(documents)
    for i, start in enumerate(starts):
        assert blocks[i]["input_ids"].tolist() == endless[start : start + length].tolist()
        assert blocks[i]["num_new"] == length
    batch_BL = blocks.blocks(torch.tensor([3, 0, 3]))
    assert batch_BL.dtype == torch.int64 and batch_BL.tolist() == [blocks[i]["input_ids"].tolist() for i in (3, 0, 3)]
    for stride in (1, 2, 4, 7):
        assert data.every_document(tokens, 0, stride).tolist() == np.concatenate(documents[::stride]).tolist()
    for eos, text in ((None, tokens), (0, tokens[:-1]), (11, tokens)):
        with pytest.raises(ValueError, match=f"eos_token_id, got {eos}"):
            data.DocumentBlocks(text, length, eos)


# ---- streamed blocks


@pytest.fixture(scope="module")
def datasets() -> ModuleType:
    return pytest.importorskip("datasets")  # before `_no_datasets` hides it


@pytest.fixture
def documents(tmp_path: Path) -> str:
    """Two shards of documents of many lengths, one of them empty."""
    rng = random.Random(0)
    texts = ["".join(rng.choices(string.ascii_lowercase, k=k)) for k in (40, 0, 300, 7, 90, 1, 160, 55, 200, 33)]
    (tmp_path / "documents").mkdir()
    for i, part in enumerate((texts[:6], texts[6:])):
        write_parquet(tmp_path / "documents" / f"train-{i}.parquet", part)
    return str(tmp_path / "documents")


@pytest.fixture
def whole_NL(documents: str, bpe: PreTrainedTokenizerFast, tmp_path: Path) -> torch.Tensor:
    """The blocks of length 16 in the order of the text; a few tokens are left behind them."""
    tokens = tokenize(documents, bpe, tmp_path / "ids").astype(np.int64)
    assert len(tokens) % 16 and (tokens == bpe.eos_token_id).sum() == 10
    blocks_NL = torch.from_numpy(tokens[: len(tokens) // 16 * 16]).view(-1, 16)
    assert len(blocks_NL.unique(dim=0)) == len(blocks_NL)
    return blocks_NL


def numbers(blocks_BL: torch.Tensor, whole_NL: torch.Tensor) -> list[int]:
    """Which of the blocks of the text each one is; an error if it is none or several of them."""
    return [(whole_NL == block_L).all(-1).nonzero().item() for block_L in blocks_BL]


@pytest.mark.parametrize("batch_size, world_size", [(1, 1), (2, 3), (7, 2), (200, 1)])
@pytest.mark.parametrize("shuffle_buffer", [1, 8, 1000])
def test_every_streamed_block_once_per_epoch(
    documents: str,
    bpe: PreTrainedTokenizerFast,
    whole_NL: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
    world_size: int,
    shuffle_buffer: int,
) -> None:
    """Over all processes; an epoch is what `tokenize` gives, cut, documents followed by eos as there."""
    N, global_size = len(whole_NL), batch_size * world_size
    num_steps = -(-3 * N // global_size)
    ranks = [StreamedBlocks(documents, bpe, 16, 5, shuffle_buffer) for _ in range(world_size)]
    steps = [
        torch.cat([blocks.batch(batch_size, step, rank, world_size) for rank, blocks in enumerate(ranks)])
        for step in range(num_steps)
    ]
    assert all(step_BL.dtype == torch.int64 and step_BL.shape == (global_size, 16) for step_BL in steps)
    epochs = torch.tensor(numbers(torch.cat(steps), whole_NL)[: 3 * N]).view(3, N)
    for epoch in epochs.tolist():
        assert sorted(epoch) == list(range(N))
        # the buffer is bounded: a block comes out no earlier than it has come in
        assert all(place > number - shuffle_buffer for place, number in enumerate(epoch))
        assert (epoch == list(range(N))) == (shuffle_buffer == 1)
    assert shuffle_buffer == 1 or len(epochs.unique(dim=0)) == 3  # each epoch in its own order

    monkeypatch.setattr(data, "BATCH_CHARS", 1)  # how many documents are tokenized at once does not show
    one = StreamedBlocks(documents, bpe, 16, 5, shuffle_buffer)
    assert all(torch.equal(one.batch(global_size, step), steps[step]) for step in range(num_steps))


def test_the_buffer_draws_uniformly() -> None:
    """Of four blocks through a buffer of three, one of the first three comes first, the rest in any order: 18 ways."""
    orders = [p for p in itertools.permutations(range(4)) if p[0] < 3]
    counts = dict.fromkeys(orders, 0)
    for seed in range(3600):
        counts[tuple(data._shuffled(iter(range(4)), 3, np.random.default_rng(seed)))] += 1
    assert len(counts) == 18 and chisquare(list(counts.values())).pvalue > 1e-3


def test_the_seed_makes_the_order_of_a_stream(documents: str, bpe: PreTrainedTokenizerFast) -> None:
    def stream(seed: int, shuffle_buffer: int = 10) -> torch.Tensor:
        return StreamedBlocks(documents, bpe, 16, seed, shuffle_buffer).batch(20, 0)

    assert torch.equal(stream(1), stream(1))
    assert not torch.equal(stream(1), stream(2)) and not torch.equal(stream(1), stream(1, 11))


@pytest.mark.parametrize("rank", [0, 1])
def test_any_step_of_the_stream_can_be_asked_for(documents: str, bpe: PreTrainedTokenizerFast, rank: int) -> None:
    def fresh() -> StreamedBlocks:
        return StreamedBlocks(documents, bpe, 16, 0, 10)

    blocks = fresh()
    steps = [blocks.batch(4, step, rank, 2) for step in range(20)]  # some three epochs
    for step in (0, 7, 19):
        blocks = fresh()
        assert torch.equal(blocks.batch(4, step, rank, 2), steps[step])
    for step in (19, 3, 4, 9, 0):  # again, back, on, ahead, back
        assert torch.equal(blocks.batch(4, step, rank, 2), steps[step])


def test_a_stream_reads_no_further_than_it_must(
    tmp_path: Path, bpe: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(9):
        write_parquet(tmp_path / f"train-{i}.parquet", ["x" * 64])
    opened, file_texts = [], data._file_texts
    monkeypatch.setattr(data, "BATCH_CHARS", 1)
    monkeypatch.setattr(data, "_file_texts", lambda file, column: opened.append(file) or file_texts(file, column))
    num_tokens = len(bpe("x" * 64)["input_ids"]) + 1
    blocks = StreamedBlocks(str(tmp_path), bpe, num_tokens, 0, 3)
    assert not opened
    blocks.batch(2, 0)
    assert len(opened) == 5  # three in the buffer, two for those that left it


def test_a_broken_off_stream_starts_anew(
    documents: str, bpe: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks_off(*args):
        yield from ()
        raise KeyboardInterrupt

    steps = [StreamedBlocks(documents, bpe, 16, 0, 10).batch(30, step) for step in range(3)]
    blocks = StreamedBlocks(documents, bpe, 16, 0, 10)
    blocks.batch(30, 0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "_encode", breaks_off)
        blocks.batch(30, 1)  # goes over the end of the first epoch
    assert torch.equal(blocks.batch(30, 1), steps[1]) and torch.equal(blocks.batch(30, 2), steps[2])


def test_a_stream_without_a_block_is_an_error(tmp_path: Path, bpe: PreTrainedTokenizerFast) -> None:
    source = write_parquet(tmp_path / "short.parquet", ["abc"])
    num_tokens = len(bpe("abc")["input_ids"]) + 1
    assert StreamedBlocks(source, bpe, num_tokens, 0).batch(3, 0).shape == (3, num_tokens)
    blocks = StreamedBlocks(source, bpe, num_tokens + 1, 0)
    for step in (0, 0, 1):
        with pytest.raises(ValueError, match=f"short.parquet does not make one block of length {num_tokens + 1}"):
            blocks.batch(1, step)
    source = write_parquet(tmp_path / "blank.parquet", ["", ""])
    with pytest.raises(ValueError, match="blank.parquet does not make one block of length 4"):
        StreamedBlocks(source, character_tokenizer(), 4, 0).batch(1, 0)


def test_bad_arguments_of_a_stream(tmp_path: Path, documents: str, bpe: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        StreamedBlocks(documents, bpe, 0, 0)
    with pytest.raises(ValueError, match="shuffle_buffer must be at least 1, got -1"):
        StreamedBlocks(documents, bpe, 16, 0, -1)
    with pytest.raises(FileNotFoundError, match="none.parquet"):
        StreamedBlocks("none.parquet", bpe, 16, 0)
    source = write_parquet(tmp_path / "null.parquet", ["x", None])
    with pytest.raises(ValueError, match="null.parquet: .*None in row 1"):
        StreamedBlocks(source, bpe, 16, 0).batch(1, 0)


def test_the_fingerprint_of_a_stream_follows_what_it_depends_on(
    tmp_path: Path, documents: str, bpe: PreTrainedTokenizerFast, characters: PreTrainedTokenizerFast
) -> None:
    def fingerprint(tokenizer=bpe, length=16, seed=0, shuffle_buffer=10, **others) -> str:
        return StreamedBlocks(documents, tokenizer, length, seed, shuffle_buffer, **others).fingerprint

    before = fingerprint()
    assert fingerprint() == before
    changes = ({"tokenizer": characters}, {"length": 17}, {"seed": 1}, {"shuffle_buffer": 11}, {"text_column": "t"})
    assert len({before} | {fingerprint(**change) for change in changes}) == 6
    write_parquet(Path(documents) / "train-1.parquet", ["another text"])
    assert fingerprint() != before


def make_blocks(
    out: Path, tokenizer: PreTrainedTokenizerFast, source: str, rank: int = 0, world_size: int = 1, **changes
) -> Blocks:
    values = {"validation_data": SAMPLE, "batch_size": 3, "gradient_accumulation_steps": 2, "streaming": True}
    arguments = PretrainArguments(data=source, output_dir=str(out), tokenizer="", **(values | changes))
    accelerator = SimpleNamespace(
        process_index=rank, num_processes=world_size, device="cpu", main_process_first=contextlib.nullcontext
    )
    return Blocks(arguments, tokenizer, 16, accelerator)


def test_batches_of_a_training_from_a_stream(tmp_path: Path, documents: str, bpe: PreTrainedTokenizerFast) -> None:
    places = [(step, micro_step) for step in range(8) for micro_step in range(2)]
    one = make_blocks(tmp_path, bpe, documents, batch_size=6, shuffle_buffer=10)
    two = [make_blocks(tmp_path, bpe, documents, rank, 2, shuffle_buffer=10) for rank in range(2)]
    batches = [one.batch(*place) for place in places]
    for place, batch_BL in zip(places, batches, strict=True):
        assert torch.equal(torch.cat([blocks.batch(*place) for blocks in two]), batch_BL)
    direct = StreamedBlocks(documents, bpe, 16, one.arguments.seed, 10)
    assert torch.equal(direct.batch(6 * len(places), 0), torch.cat(batches))
    assert one.fingerprint == two[1].fingerprint == direct.fingerprint

    resumed = make_blocks(tmp_path, bpe, documents, batch_size=6, shuffle_buffer=10)
    assert torch.equal(resumed.batch(7, 0), batches[14]) and torch.equal(resumed.batch(7, 1), batches[15])
    resumed.train = None  # a step asked for again is not read again
    assert torch.equal(resumed.batch(7, 0), batches[14]) and torch.equal(resumed.batch(7, 1), batches[15])
    # Of the ids of the text only those of the validation text are kept.
    assert [path.name.split(".")[0] for path in (tmp_path / "tokens").iterdir()] == [Path(SAMPLE).stem]
    assert torch.equal(
        next(one.validation_batches(2))[0],
        next(make_blocks(tmp_path, bpe, documents, streaming=False).validation_batches(2))[0],
    )


def test_hub_names_are_streamed(
    tmp_path: Path, bpe: PreTrainedTokenizerFast, datasets: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {"train": [f"text {i}" for i in range(30)], "validation": ["held out text"] * 9}
    revision, calls = "a" * 40, []

    def generate(files: list[str], column: str):
        for text in texts[files[0].rsplit("/", 1)[1]]:
            yield {"id": 0, column: text}

    def load_dataset(name: str, config: str | None, split: str, streaming: bool):
        calls.append((name, config, split, streaming))
        if split == "validation" and name == "owner/only-train":
            raise ValueError("Bad split: validation. Available splits: ['train']")
        column = "body" if name == "owner/body" else "text"
        if not streaming:
            return datasets.Dataset.from_dict({column: texts[split]})
        kwargs = {"files": [f"hf://datasets/{name}@{revision}/{split}"], "column": column}
        return datasets.IterableDataset.from_generator(generate, gen_kwargs=kwargs)

    monkeypatch.setitem(sys.modules, "datasets", datasets)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    source = write_parquet(tmp_path / "texts.parquet", texts["train"])
    blocks = make_blocks(tmp_path, bpe, "owner/name:config", validation_data="", shuffle_buffer=4)
    assert calls[0] == ("owner/name", "config", "train", True)
    assert calls[1:] == [("owner/name", "config", "validation", streaming) for streaming in (True, False)]
    assert torch.equal(blocks.train.batch(40, 0), StreamedBlocks(source, bpe, 16, 0, 4).batch(40, 0))  # two epochs
    assert bpe.decode(blocks.validation.tokens) == "held out text<|endoftext|>" * 9

    same = make_blocks(tmp_path, bpe, "owner/name:config", validation_data="", shuffle_buffer=4)
    assert same.fingerprint == blocks.fingerprint
    revision = "b" * 40
    other = make_blocks(tmp_path, bpe, "owner/name:config", validation_data="", shuffle_buffer=4)
    assert other.fingerprint != blocks.fingerprint

    calls.clear()
    with pytest.raises(ValueError, match="validation_data='' gives no .*owner/only-train: .*'validation': Bad split"):
        make_blocks(tmp_path, bpe, "owner/only-train", validation_data="")
    assert all(streaming for *_, streaming in calls)  # nothing is downloaded before the error
    make_blocks(tmp_path, bpe, "owner/only-train")
    with pytest.raises(ValueError, match=r"owner/body: no column 'text'; the columns are \['id', 'body'\]"):
        make_blocks(tmp_path, bpe, "owner/body")
    texts["train"] = []
    with pytest.raises(ValueError, match="owner/name: no column 'text'"):
        make_blocks(tmp_path, bpe, "owner/name")
