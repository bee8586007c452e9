"""Text to token blocks: read a corpus, tokenize it once into a memory-mapped file, cut blocks, draw batches.

A corpus too large for that is streamed: read, tokenized, cut and shuffled while batches are drawn, and not kept. Either
way a batch is a pure function of (seed, step, rank), so that a resumed run sees what an uninterrupted one would have
seen.

Shapes: B batch of one rank, L length of a block, N tokens of the stream.
"""

import glob
import gzip
import hashlib
import io
import json
import lzma
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.lib.stride_tricks import sliding_window_view
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from .results import write_whole

SUFFIXES = (".parquet", ".txt", ".jsonl", ".txt.gz")
BATCH_CHARS = 4_000_000  # handed to the tokenizer at once: enough for all its threads, little in memory
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


# ---- reading


def read_texts(source: str, split: str = "train", text_column: str = "text", streaming: bool = False) -> Iterator[str]:
    """Yields the documents of `source`, one per parquet row or text file, in a fixed order.

    Parquet is read row group by row group; a text file is one document, held in memory whole.

    `source` is a .parquet, .jsonl, .txt or .txt.gz file, or a pattern of such files, as in "books/*.txt" (`split` then
    plays no part); a folder, whose `{split}*.parquet` are read in sorted order, else its `{split}*.txt`, `.jsonl` or
    `.txt.gz`, else, for "train" alone, all its *.txt; hidden files are left out; or the name of a data set
    on the Hub, `name` or `name:config`, for which the package `datasets` is needed. That is downloaded whole, in all
    its splits, before the first document comes, or with `streaming` read over the network as documents are asked for.

    Raises FileNotFoundError for a source that is not there, ImportError for a Hub name without `datasets`, and
    ValueError for a file that is empty, unreadable, not UTF-8 or without the column, each naming file and reason.
    """
    return _open(source, split, text_column, streaming)[1]()


def _open(source: str, split: str, text_column: str, streaming: bool) -> tuple[list, Callable[[], Iterator[str]]]:
    """What identifies the text of `source` (names, sizes, times, revision), and its documents: each call, all anew."""
    path = Path(source)
    if packed := packed_split(source, split):
        raise ValueError(f"{packed} is of packed token ids: there is no text to read, or to stream, in {source}")
    files = _files(glob.glob(str(source))) if glob.has_magic(str(source)) else []
    if path.exists() or files:
        files = files or (_split_files(path, split) if path.is_dir() else [path])
        origin = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return origin, lambda: (text for file in files for text in _file_texts(file, text_column))
    if str(source).endswith(SUFFIXES) or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?", source):
        raise FileNotFoundError(f"{source}: no such file or folder")
    try:
        from datasets import load_dataset
    except ImportError as error:
        message = f"{source!r} is no file or folder; to read a Hub data set of this name: pip install datasets"
        raise ImportError(message) from error
    name, _, config = source.partition(":")
    try:
        data = load_dataset(name, config or None, split=split, streaming=streaming)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"{source!r} is no file or folder, nor can the Hub give it: {error}") from error
    except ValueError as error:  # there is no such split or configuration
        raise ValueError(f"{source}: cannot load its split {split!r}: {error}") from error
    columns = data.column_names or list(next(iter(data), {}))  # a stream may know them from its rows only
    if text_column not in columns:
        raise ValueError(f"{source}: no column {text_column!r}; the columns are {columns}")
    if streaming:  # no fingerprint, but the addresses of the files, with the revision of the repo in them
        files = repr(getattr(data._ex_iterable, "kwargs", None))
        made_from = sorted(set(re.findall(r"hf://[^'\"]+", files)))
    else:
        made_from = data._fingerprint
    rows, where = data.select_columns([text_column]), f"{source}: column {text_column!r}"
    return [source, split, made_from], lambda: _checked((row[text_column] for row in rows), where)


def _split_files(folder: Path, split: str) -> list[Path]:
    # Only "train" may mean "every file": else a run would validate on its training text and not notice.
    patterns = [f"{split}*{suffix}" for suffix in SUFFIXES] + ["*.txt"] * (split == "train")
    for pattern in patterns:
        if files := _files(folder.glob(pattern)):
            return files
    names = sorted(file.name for file in folder.iterdir())[:10]
    raise FileNotFoundError(f"{folder}: no {' or '.join(patterns)} there; the folder has {names}")


def _files(found: Iterable[str | Path]) -> list[Path]:
    """In sorted order, without folders and hidden files, which editors and downloads leave."""
    return sorted(path for path in map(Path, found) if path.is_file() and path.name[0] != ".")


def _file_texts(file: Path, text_column: str) -> Iterator[str]:
    try:
        if file.name.endswith((".txt", ".txt.gz")):
            content = file.read_bytes()
            content = gzip.decompress(content) if file.suffix == ".gz" else content
            text = content.decode("utf-8-sig")  # from bytes: line ends stay as they are
            if not text:
                raise ValueError("the file is empty")
            yield text
        elif file.suffix == ".jsonl":
            with open(file, encoding="utf-8-sig") as lines:
                rows = [json.loads(line) for line in lines if line.strip()]
            if not rows:
                raise ValueError("the file has no rows")
            texts = (row.get(text_column) if isinstance(row, dict) else row for row in rows)
            yield from _checked(texts, f"field {text_column!r}")
        elif file.suffix == ".parquet":
            with pq.ParquetFile(file) as parquet:
                if text_column not in parquet.schema_arrow.names:
                    raise ValueError(f"no column {text_column!r}; the columns are {parquet.schema_arrow.names}")
                if parquet.metadata.num_rows == 0:
                    raise ValueError("the file has no rows")
                batches = parquet.iter_batches(batch_size=64, columns=[text_column])  # one row group at a time
                texts = (text for batch in batches for text in batch.column(0).to_pylist())
                yield from _checked(texts, f"column {text_column!r}")
        else:
            raise ValueError(f"expected a file of {', '.join(SUFFIXES)}")
    except (OSError, EOFError, zlib.error, ValueError, pa.ArrowException) as error:  # UnicodeDecodeError is one
        raise ValueError(f"cannot read {file}: {error}") from error


def _checked(texts: Iterator, where: str) -> Iterator[str]:
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{where} has {text!r} in row {row}, which is not text")
        yield text


# ---- tokenizing


def tokenize(
    source: str,
    tokenizer: PreTrainedTokenizerFast,
    out_dir: str | Path,
    split: str = "train",
    text_column: str = "text",
    join: Literal["eos", "none"] = "eos",
) -> np.memmap:
    """The token ids of `source` as one read-only stream (N,), made once and kept in `out_dir`.

    A folder that `training.pack` has written is a source too: its ids are those of the text.

    With `join="eos"` each document is followed by the tokenizer's `eos_token_id`, if it has one; with "none", or
    without an eos, documents follow each other with nothing between. There is no other special token: where a text
    has the characters "[MASK]" they are encoded like any others. The dtype is the smallest unsigned one that holds
    every id.

    The file carries a hash of what it was made from (names, sizes and times of the source, tokenizer, separator), and
    gets its name only when whole: a kill leaves a *.tmp at most. Several processes may call this at the same time.

    Raises what `read_texts` raises, and ValueError if there is no token, the tokenizer refuses a text, or packed ids
    are damaged or of another tokenizer.
    """
    if packed := packed_split(source, split):
        made_from, encode, dtype = _unpacker(packed, tokenizer, join)
    else:
        made_from, encode, dtype = encoder(source, tokenizer, split, text_column, join)
    label = Path(source).stem if Path(source).is_file() else f"{Path(source).name}-{split}"
    label = re.sub(r"[^\w.-]", "-", label)
    path = Path(out_dir) / f"{label}.{_sha256(made_from)[:16]}.npy"
    if not path.exists():
        write_whole(path, lambda temporary: _write_npy(temporary, encode(), dtype))
    return np.load(path, mmap_mode="r")


def encoder(
    source: str, tokenizer: PreTrainedTokenizerFast, split: str, text_column: str, join: str, streaming: bool = False
) -> tuple[list, Callable[[], Iterator[list[np.ndarray]]], np.dtype]:
    """What identifies the ids of `source`; those of its documents, many at a time, each call anew; and their dtype."""
    separator = _separator(tokenizer, join)
    origin, texts = _open(source, split, text_column, streaming)
    backend = plain_backend(tokenizer)
    dtype = np.min_scalar_type(max(tokenizer.get_vocab().values()))
    made_from = [origin, text_column, backend.to_str(), separator]
    return made_from, lambda: _encode(source, texts(), backend, separator, dtype, streaming), dtype


def _separator(tokenizer: PreTrainedTokenizerFast, join: str) -> list[int]:
    if join not in ("eos", "none"):
        raise ValueError(f"join must be 'eos' or 'none', not {join!r}")
    return [] if join == "none" or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _sha256(made_from: list) -> str:
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()


def plain_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy without the padding and truncation of earlier calls, to which "[MASK]" in a text is only text."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    return backend


def _encode(
    source: str, texts: Iterator[str], backend: Tokenizer, separator: list[int], dtype: np.dtype, quiet: bool
) -> Iterator[list[np.ndarray]]:
    """Yields the ids of the documents, each with `separator` behind it, many documents at a time."""
    lookup = _character_lookup(backend)
    first = 0
    with tqdm(desc=f"tokenizing {source}", unit="char", unit_scale=True, disable=quiet or None) as progress:
        for batch in text_batches(texts):
            ids = [lookup(text) for text in batch]
            rest = [text for text, known in zip(batch, ids, strict=True) if known is None]
            try:
                encodings = iter(backend.encode_batch_fast(rest, add_special_tokens=False))
            except Exception as error:  # the type that tokenizers raises
                last = first + len(batch) - 1
                raise ValueError(f"{source}: documents {first} to {last} cannot be tokenized: {error}") from error
            ids = [next(encodings).ids if known is None else known for known in ids]
            yield [np.concatenate((document, separator), dtype=dtype, casting="unsafe") for document in ids]
            first += len(batch)
            progress.update(sum(map(len, batch)))


def text_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of texts with some BATCH_CHARS characters in all."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_npy(path: Path, parts: Iterator[list[np.ndarray]], dtype: np.dtype) -> None:
    """Writes the arrays of all parts one after another as one .npy (N,), with N known only at the end."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (0,)}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)  # padded by numpy so that N can grow in place
        start = file.tell()
        for part in parts:
            file.write(np.concatenate(part))
        header["shape"] = ((file.tell() - start) // dtype.itemsize,)
        if header["shape"] == (0,):
            raise ValueError("there are no tokens in the text")
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header)
        assert file.tell() == start


def evenly_spaced(sizes: np.ndarray, limit: float) -> np.ndarray:
    """Which documents to take so that they spread evenly over all and their sizes add up to `limit` at most."""
    number = len(sizes) if sizes.sum() <= limit else int(len(sizes) * limit / sizes.sum())
    while number:
        chosen = np.arange(number) * len(sizes) // number
        if sizes[chosen].sum() <= limit:
            return chosen
        number -= 1
    return np.empty(0, np.int64)


# ---- packed ids


def packed_split(source: str, split: str) -> Path | None:
    """The description of the ids that `training.pack` wrote of a split; None where it did not."""
    path = Path(source) / f"{split}.tokens.json"
    return path if path.is_file() else None


def vocabulary_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """Of what each id stands for. Not of the whole tokenizer: other versions of the library write the same one anew."""
    return _sha256(sorted(tokenizer.get_vocab().items()))


def _unpacker(
    path: Path, tokenizer: PreTrainedTokenizerFast, join: str
) -> tuple[list, Callable[[], Iterator[list[np.ndarray]]], np.dtype]:
    """As `encoder`, of packed ids; a part is not a document."""
    separator, vocabulary = _separator(tokenizer, join), vocabulary_hash(tokenizer)
    dtype = np.min_scalar_type(max(tokenizer.get_vocab().values()))
    try:
        packed = PackedIds(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if packed.vocabulary != vocabulary:
        raise ValueError(f"{path} has ids of a tokenizer of hash {packed.vocabulary}, the one given has {vocabulary}")
    if packed.separator != separator:
        raise ValueError(f"{path} has {packed.separator} behind each document, {join=} asks for {separator}")
    return ["packed", packed.sha256], lambda: packed.read(path, dtype), dtype


@dataclass(frozen=True)
class PackedIds:
    """The description of compressed ids: a JSON file `{split}.tokens.json`, written when the others are whole.

    The `files`, one after another, are one .xz of the ids, little-endian, in the smallest dtype that holds all of the
    tokenizer's.
    """

    files: dict[str, int]  # names and bytes
    num_ids: int
    sha256: str  # of the ids
    vocabulary: str  # hash of the tokenizer's
    separator: list[int]  # ids behind each document
    num_documents: int
    of_documents: int  # so many were there to choose from
    split: str
    sources: list[str]
    command: str

    def read(self, path: Path, dtype: np.dtype) -> Iterator[list[np.ndarray]]:
        """Yields the ids. ValueError naming file and reason, at the latest when all have come, if they are damaged."""
        digest = hashlib.sha256()
        try:
            for file, size in self.files.items():
                if (found := path.with_name(Path(file).name).stat().st_size) != size:
                    raise ValueError(f"{file} has {found} bytes, not {size}")
            packed = b"".join(path.with_name(Path(file).name).read_bytes() for file in self.files)
            bar = {"desc": "unpacking ids", "total": self.num_ids, "unit": "id", "unit_scale": True, "disable": None}
            with lzma.open(io.BytesIO(packed)) as ids, tqdm(**bar) as progress:
                while part := ids.read(dtype.itemsize << 20):
                    digest.update(part)
                    yield [np.frombuffer(part, dtype.newbyteorder("<"))]
                    progress.update(len(part) // dtype.itemsize)
            if digest.hexdigest() != self.sha256:
                raise ValueError(f"the ids have the hash {digest.hexdigest()}, not {self.sha256}")
        except (OSError, ValueError, EOFError, lzma.LZMAError) as error:
            raise ValueError(f"cannot unpack {path}: {error}") from error


# ---- characters


def character_tokenizer(
    alphabet: str = " abcdefghijklmnopqrstuvwxyz", model_max_length: int = 256
) -> PreTrainedTokenizerFast:
    """One token per character, ids in the order of `alphabet`, and `[MASK]` as the last id; no other special token.

    Any text can be encoded. As in text8, what is outside the alphabet becomes one space per run (nothing if the
    alphabet has no space) and capitals become small letters if the alphabet has no capitals; if it has the space but
    no digit, digits are spelled out and runs of spaces become one. `[MASK]` in a text is the mask token.

    Raises ValueError if `alphabet` is empty or has a character twice.
    """
    if not alphabet or len(set(alphabet)) < len(alphabet):
        raise ValueError(f"alphabet must have each character once, not {alphabet!r}")
    steps = [normalizers.Lowercase()] if alphabet == alphabet.lower() else []
    outside = normalizers.Replace(Regex(f"[^{re.escape(alphabet)}]+"), " " if " " in alphabet else "")
    if " " in alphabet and not re.search("[0-9]", alphabet):
        steps += [normalizers.Replace(str(digit), f" {name} ") for digit, name in enumerate(DIGITS)]
        steps += [outside, normalizers.Replace(Regex(" {2,}"), " ")]
    else:
        steps += [outside]
    backend = Tokenizer(models.WordLevel({character: i for i, character in enumerate(alphabet)}))
    backend.normalizer = normalizers.Sequence(steps)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        mask_token="[MASK]",
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def _character_lookup(backend: Tokenizer) -> Callable[[str], np.ndarray | None]:
    """text -> ids, or None where the backend itself is needed. Serves the tokenizers of `character_tokenizer` only.

    Some 40 times as fast as the backend: a text that normalization leaves as it is needs no more than a table.
    """
    vocab = backend.get_vocab(with_added_tokens=False)
    alphabet = "".join(sorted(vocab, key=vocab.get))
    if max(map(len, vocab)) > 1 or backend.to_str() != plain_backend(character_tokenizer(alphabet)).to_str():
        return lambda text: None
    table = np.full(0x110000, -1, np.int32)
    table[[ord(character) for character in alphabet]] = range(len(alphabet))

    def lookup(text: str) -> np.ndarray | None:
        ids = table[np.frombuffer(text.encode("utf-32-le"), np.uint32)]
        return None if "  " in text or (ids < 0).any() else ids

    return lookup


# ---- blocks and batches


class PackedTokens(Dataset):
    """Consecutive blocks (L,) of a token stream (N,). The last block is shifted back to end at the last token.

    So no token is lost, but the last block repeats some: `num_new` of a block says how many tokens, at its end, the
    blocks before did not have. Counting only these counts each token once.

    Raises ValueError if the stream is shorter than one block.
    """

    def __init__(self, tokens: np.ndarray, length: int):
        if not 1 <= length <= len(tokens):
            raise ValueError(f"{len(tokens)} tokens do not make one block of length {length}")
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.length)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor | int]:
        """{"input_ids": int64 (L,), "num_new": int}"""
        num_new = min(self.length, len(self.tokens) - i * self.length)
        return {"input_ids": self.blocks(torch.tensor([i]))[0], "num_new": num_new}

    def blocks(self, indices_B: torch.Tensor) -> torch.Tensor:
        """int64 (B, L), in one copy from the stream."""
        indices = indices_B.numpy()
        if len(outside := indices[(indices < 0) | (indices >= len(self))]):
            raise IndexError(f"block {outside[0]} of {len(self)}")
        starts = np.minimum(indices * self.length, len(self.tokens) - self.length)
        return torch.from_numpy(sliding_window_view(self.tokens, self.length)[starts].astype(np.int64))


def document_starts(tokens: np.ndarray, eos_token_id: int | None) -> np.ndarray:
    """Where the documents of a stream begin; ValueError if it has no `eos_token_id` behind each."""
    ends = np.flatnonzero(tokens == (-1 if eos_token_id is None else eos_token_id))
    if not len(ends) or ends[-1] != len(tokens) - 1:
        raise ValueError(f"documents must end with eos_token_id, got {eos_token_id} and a text without it")
    return np.concatenate(([0], ends[:-1] + 1))


def every_document(tokens: np.ndarray, eos_token_id: int | None, stride: int) -> np.ndarray:
    """The stream of the documents 0, `stride`, 2 `stride`, ... of a stream."""
    starts = document_starts(tokens, eos_token_id)
    lengths = np.diff(np.append(starts, len(tokens)))
    return np.asarray(tokens)[np.repeat(np.arange(len(starts)) % stride == 0, lengths)]


class DocumentBlocks(PackedTokens):
    """Blocks (L,) of a token stream (N,) that each begin with a document: block i is document i and what follows it.

    So a model learns how texts begin and end. What a document has beyond L tokens is in no block; the tokens after a
    shorter one are those of the next documents, so they are in several. The last blocks go on with the first document.

    Raises ValueError if the stream is shorter than one block or has no `eos_token_id` behind its documents.
    """

    def __init__(self, tokens: np.ndarray, length: int, eos_token_id: int | None):
        super().__init__(tokens, length)
        self.starts = document_starts(tokens, eos_token_id)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor | int]:
        """{"input_ids": int64 (L,), "num_new": L}"""
        return {"input_ids": self.blocks(torch.tensor([i]))[0], "num_new": self.length}

    def blocks(self, indices_B: torch.Tensor) -> torch.Tensor:
        """int64 (B, L), in one copy from the stream."""
        places_BL = (self.starts[indices_B.numpy()][:, None] + np.arange(self.length)) % len(self.tokens)
        return torch.from_numpy(self.tokens[places_BL].astype(np.int64))


def spread_blocks(
    source: str, tokenizer: PreTrainedTokenizerFast, length: int, cache_dir: Path, split: str, number: int
) -> torch.Tensor:
    """(B, L) blocks of a data set, evenly spaced: so many, or all where there are fewer. Each begins with a document
    where the tokenizer has an EOS, as in training."""
    tokens, eos = tokenize(source, tokenizer, cache_dir, split), tokenizer.eos_token_id
    blocks = PackedTokens(tokens, length) if eos is None else DocumentBlocks(tokens, length, eos)
    B = min(number, len(blocks))
    return blocks.blocks(torch.arange(B) * len(blocks) // B)


def step_batch_indices(
    num_blocks: int, batch_size: int, step: int, seed: int, rank: int = 0, world_size: int = 1
) -> torch.Tensor:
    """The blocks, int64 (B,), that `rank` trains on in `step` (from 0): a pure function of its arguments.

    Each epoch is a permutation of all blocks. The global batches, of batch_size * world_size, are cut from the
    epochs laid end to end, so a batch may straddle two; each rank takes its contiguous slice.
    """
    place = (step * world_size + rank) * batch_size + np.arange(batch_size)
    epoch, offset = divmod(place, num_blocks)
    indices = np.empty(batch_size, np.int64)
    for e in range(epoch[0], epoch[-1] + 1):
        indices[epoch == e] = _permutation(num_blocks, seed, int(e))[offset[epoch == e]]
    return torch.from_numpy(indices)


@lru_cache(maxsize=4)  # this epoch's and the next one's, for a training and another set
def _permutation(num_blocks: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_blocks)


# ---- streamed blocks


class StreamedBlocks:
    """Blocks (L,) of `source`, read, tokenized and shuffled as they are asked for, epoch after epoch; none is kept.

    An epoch has the consecutive whole blocks of the token stream of `tokenize`, each once; the tokens behind the last
    whole block are dropped, in every epoch. A buffer of `shuffle_buffer` blocks gives up a random one for each that
    comes in, and empties at the end of the epoch: a permutation of all blocks where it holds them all, the order of
    the text where it holds one. What is drawn depends on the seed and the epoch alone.

    Every process reads the whole text and skips the blocks of the others.

    `fingerprint` is a hash of what the blocks depend on: names, sizes and times of the files, or the revision of the
    data set; tokenizer, length, seed and buffer.

    Raises what `read_texts` raises, and ValueError if length or shuffle_buffer are less than 1.
    """

    def __init__(
        self,
        source: str,
        tokenizer: PreTrainedTokenizerFast,
        length: int,
        seed: int,
        shuffle_buffer: int = 10_000,
        split: str = "train",
        text_column: str = "text",
    ):
        for name, value in {"length": length, "shuffle_buffer": shuffle_buffer}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        made_from, self._encode, self._dtype = encoder(source, tokenizer, split, text_column, "eos", streaming=True)
        self.fingerprint = _sha256([*made_from, length, seed, shuffle_buffer])
        self.source, self.length, self.seed, self.shuffle_buffer = source, length, seed, shuffle_buffer
        self._place, self._blocks = 0, self._endless()

    def batch(self, batch_size: int, step: int, rank: int = 0, world_size: int = 1) -> torch.Tensor:
        """The blocks, int64 (B, L), that `rank` trains on in `step` (from 0): a pure function of its arguments.

        As with `step_batch_indices`, the global batches, of batch_size * world_size, are cut from the epochs laid end
        to end, and each rank takes its contiguous slice. A later step than the next is reached by reading on, an
        earlier one by reading from the beginning.

        Raises ValueError if the text cannot be read or tokenized, or does not make one block.
        """
        place = (step * world_size + rank) * batch_size
        if place < self._place:
            self._place, self._blocks = 0, self._endless()
        skipped = range(self._place, place)
        self._place = math.inf  # broken off by an error or a key, the stream is of no more use
        bar = {"desc": f"skipping blocks of {self.source}", "unit": "block", "delay": 5, "leave": False}
        for _ in tqdm(skipped, **bar, disable=True if rank else None):
            next(self._blocks)
        blocks = [next(self._blocks) for _ in range(batch_size)]
        self._place = place + batch_size
        return torch.from_numpy(np.stack(blocks).astype(np.int64))

    def _endless(self) -> Iterator[np.ndarray]:
        for epoch in count():
            block = None
            for block in _shuffled(self._epoch(), self.shuffle_buffer, np.random.default_rng((self.seed, epoch))):
                yield block
            if block is None:
                raise ValueError(f"the text of {self.source} does not make one block of length {self.length}")

    def _epoch(self) -> Iterator[np.ndarray]:
        """The blocks (L,) in the order of the text."""
        rest = np.empty(0, self._dtype)
        for ids in self._encode():
            rest = np.concatenate((rest, *ids))
            whole = len(rest) - len(rest) % self.length
            for block in rest[:whole].reshape(-1, self.length):
                yield block.copy()  # a view in the buffer would keep all of `rest` in memory
            rest = rest[whole:]


def _shuffled(blocks: Iterator[np.ndarray], size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    buffer = []
    for block in blocks:
        if len(buffer) < size:
            buffer.append(block)
        else:
            i = rng.integers(size)
            yield buffer[i]
            buffer[i] = block
    for i in rng.permutation(len(buffer)):
        yield buffer[i]
