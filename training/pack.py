"""Pack a corpus as compressed token ids, for a machine that is not to have the text, or that a small file must reach.

    python -m training.pack --data data/wikipedia-en-2015,data/classic-books \\
        --tokenizer training/tokenizers/wikibooks --out packed/wikibooks

Where `--data` asks for text to train on, the folder will do: the ids are those that the text would give. It has each
split as `SPLIT.tokens.xz` and `SPLIT.tokens.json`, the latter written last and described by `data.PackedIds`.
"""

import hashlib
import lzma
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from .common.arguments import CommaLists, answer_early, command, parse_arguments


@dataclass(kw_only=True)
class PackArguments(CommaLists):
    data: str = field(metadata={"help": "parquet or text files, folders or Hub data sets, with commas between"})
    tokenizer: str = field(metadata={"help": "folder or repo of the tokenizer"})
    out: str = field(metadata={"help": "folder of the packed ids"})
    split: str = field(default="train", metadata={"help": "train, validation or test"})
    text_column: str = "text"
    max_megabytes: float = field(
        default=0.0, metadata={"help": "pack so many evenly spaced documents that they need no more; 0: all"}
    )
    max_file_megabytes: float = field(default=0.0, metadata={"help": "cut into files of this size; 0: one file"})

    def __post_init__(self):
        for name in ("data", "tokenizer", "out", "split"):
            if not self.listed(name):
                raise ValueError(f"{name} must be given, got {getattr(self, name)!r}")
        for name in ("max_megabytes", "max_file_megabytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


if __name__ == "__main__":
    answer_early(PackArguments, __doc__)

import numpy as np
from transformers import AutoTokenizer

from .common.data import PackedIds, encoder, evenly_spaced, vocabulary_hash
from .common.results import write_json, write_whole
from .tokenizer import public

MEGABYTE = 1_000_000


def compressed(documents: list[np.ndarray], dtype: np.dtype) -> bytes:
    """The ids as .xz, with literals told apart by their place in a number of so many bytes."""
    content = np.concatenate(documents).astype(dtype).tobytes()
    place = dtype.itemsize.bit_length() - 1
    settings = {"preset": 9 | lzma.PRESET_EXTREME, "lc": 4 - place, "lp": place, "pb": place}
    settings["dict_size"] = min(max(len(content), 1 << 12), 1 << 28)  # all that came before, if there is memory
    packer = lzma.LZMACompressor(filters=[{"id": lzma.FILTER_LZMA2} | settings])
    pieces, bar = [], {"desc": "compressing", "unit": "B", "unit_scale": True, "disable": None}
    with tqdm(total=len(content), **bar) as progress:
        for first in range(0, len(content), MEGABYTE):
            pieces.append(packer.compress(content[first : first + MEGABYTE]))
            progress.update(len(content[first : first + MEGABYTE]))
    return b"".join([*pieces, packer.flush()])


def largest_packed(documents: list[np.ndarray], dtype: np.dtype, max_bytes: float) -> tuple[bytes, np.ndarray]:
    """Evenly spaced documents in `max_bytes` (0: all of them), and which they are."""
    sizes = np.fromiter(map(len, documents), np.int64)
    limit = sizes.sum()
    while True:
        chosen = evenly_spaced(sizes, limit)
        if not len(chosen):
            raise ValueError(f"max_megabytes={max_bytes / MEGABYTE:g} does not hold one document")
        packed = compressed([documents[i] for i in chosen], dtype)
        if not max_bytes or len(packed) <= max_bytes:
            return packed, chosen
        limit = 0.999 * sizes[chosen].sum() * max_bytes / len(packed)  # fewer documents compress a little worse


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(PackArguments, __doc__, argv)
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    documents, sources = [], arguments.listed("data")
    for source in sources:
        _, encode, dtype = encoder(source, tokenizer, arguments.split, arguments.text_column, "eos")
        for batch in encode():
            documents += batch
    if not any(map(len, documents)):
        raise ValueError(f"data={arguments.data!r} has no tokens")
    packed, chosen = largest_packed(documents, dtype.newbyteorder("<"), arguments.max_megabytes * MEGABYTE)
    ids = np.concatenate([documents[i] for i in chosen])

    out, name = Path(arguments.out), f"{arguments.split}.tokens.xz"
    step = int(arguments.max_file_megabytes * MEGABYTE) or len(packed)
    cuts = range(0, len(packed), step)
    files = {f"{name}.{i:03}" if len(cuts) > 1 else name: packed[first : first + step] for i, first in enumerate(cuts)}
    description = PackedIds(
        files={name: len(content) for name, content in files.items()},
        num_ids=len(ids),
        sha256=hashlib.sha256(ids.astype(dtype.newbyteorder("<"))).hexdigest(),
        vocabulary=vocabulary_hash(tokenizer),
        separator=[] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id],
        num_documents=len(chosen),
        of_documents=len(documents),
        split=arguments.split,
        sources=public(sources).split(","),
        command=command("pack", (PackArguments, vars(arguments) | {"data": public(sources), "out": out.name})),
    )
    json_path = out / f"{arguments.split}.tokens.json"
    for old in sorted(out.glob(f"{arguments.split}.tokens.*")):  # the description first: nothing to read from then on
        old.unlink()
    for name, content in files.items():
        write_whole(out / name, lambda path, content=content: path.write_bytes(content))
    for _ in description.read(json_path, dtype):  # an error here, not where the text is missing
        pass
    write_json(json_path, asdict(description))
    print(
        f"{arguments.split}: {len(ids):,} ids of {len(chosen):,} documents, of {len(documents):,}, in "
        f"{len(packed) / MEGABYTE:.2f} MB ({8 * len(packed) / len(ids):.3f} bits each): {json_path}"
    )


if __name__ == "__main__":
    main()
