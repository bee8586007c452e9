"""Train a byte-level BPE tokenizer, with a mask token as its last id, and say how far it compresses.

    python -m training.tokenizer --data data/wikipedia-en-2015,data/classic-books --out training/tokenizers/wikibooks

Any text can be encoded and comes back as it was. `compression.json` beside the tokenizer has what is printed.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from tqdm.auto import tqdm

from .common.arguments import PUBLIC_DATA, CommaLists, answer_early, command, names_files, parse_arguments

SPECIAL = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]"}  # ids 0, 1, 2
LEAST_SIZE = 256 + len(SPECIAL) + 1


@dataclass(kw_only=True)
class TokenizerArguments(CommaLists):
    data: str = field(metadata={"help": "parquet or text files, folders or Hub data sets, with commas between"})
    out: str = field(metadata={"help": "folder of the tokenizer"})
    vocab_size: int = field(default=8192, metadata={"help": "ids in all: bytes, merges and four special tokens"})
    max_characters: int = field(
        default=0, metadata={"help": "train on evenly spaced documents of so many characters at most; 0: all"}
    )
    min_frequency: int = field(default=2, metadata={"help": "a merge must occur so often"})
    validation_data: str = field(default="", metadata={"help": "to measure on; default: the data's own splits"})
    text_column: str = "text"

    def __post_init__(self):
        for name in ("data", "out"):
            if not self.listed(name):
                raise ValueError(f"{name} must be given, got {getattr(self, name)!r}")
        least = {"vocab_size": LEAST_SIZE, "max_characters": 0, "min_frequency": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}, got {getattr(self, name)}")
        files = [source for source in self.listed("data") if names_files(source)]
        if files and not self.validation_data:
            raise ValueError(f"validation_data must be given when data has a file, {files[0]}")


if __name__ == "__main__":
    answer_early(TokenizerArguments, __doc__)

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .common.data import evenly_spaced, plain_backend, read_texts, text_batches
from .common.results import added_files, machine, write_json

# Words, numbers, punctuation and white space are cut apart before bytes are merged: the pattern of Llama 3, but with
# two digits where that has three. A year is then its century and its year, a number has no token of its own in a small
# vocabulary, and nothing is lost by it: on Wikipedia and books texts come out no longer than by the pattern of GPT-2.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MASK = "[MASK]"  # the last id


def train_tokenizer(texts: Iterable[str], vocab_size: int, min_frequency: int = 2) -> PreTrainedTokenizerFast:
    """Exactly `vocab_size` ids: [PAD], [BOS], [EOS], 256 bytes, merges, [MASK]. The same texts give the same ones.

    `tokenizer(text)` adds no special token; "[MASK]" in a text is the mask there, and to `tokenize` only text.

    Raises ValueError if the texts do not have so many merges.
    """
    if vocab_size < LEAST_SIZE:
        raise ValueError(f"vocab_size must be at least {LEAST_SIZE}, got {vocab_size}")
    backend = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **SPECIAL,
        mask_token=MASK,
        clean_up_tokenization_spaces=False,
    )
    if len(tokenizer) < vocab_size:
        raise ValueError(f"vocab_size={vocab_size} is too large: the texts give {len(tokenizer)} with {min_frequency=}")
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Each file whole or not there; what else the folder has stays."""
    with added_files(folder) as temporary:
        tokenizer.save_pretrained(temporary)


def compression(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> dict[str, float]:
    """Characters, bytes and tokens of the texts, and how many of those a token has."""
    backend, counts = plain_backend(tokenizer), np.zeros(3, np.int64)
    for batch in text_batches(texts):
        encodings = backend.encode_batch_fast(batch, add_special_tokens=False)
        counts += [
            sum(map(len, batch)),
            sum(len(text.encode()) for text in batch),
            sum(len(encoding.ids) for encoding in encodings),
        ]
    characters, num_bytes, tokens = counts.tolist()
    return {
        "characters": characters,
        "bytes": num_bytes,
        "tokens": tokens,
        "characters_per_token": characters / tokens,
        "bytes_per_token": num_bytes / tokens,
    }


def public(sources: list[str]) -> str:
    """As they stand in a recorded command: where a card says that data are, wherever they were."""
    return ",".join(str(PUBLIC_DATA / Path(source).name) if Path(source).exists() else source for source in sources)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(TokenizerArguments, __doc__, argv)
    sources, column = arguments.listed("data"), arguments.text_column

    def documents(task: str) -> Iterable[str]:
        texts = chain.from_iterable(read_texts(source, "train", column) for source in sources)
        return tqdm(texts, desc=task, unit=" documents", disable=None)

    start = time.perf_counter()
    sizes = np.fromiter(map(len, documents("counting")), np.int64)
    chosen = evenly_spaced(sizes, arguments.max_characters or int(sizes.sum()))
    if not len(chosen):
        raise ValueError(f"max_characters={arguments.max_characters} is less than a document")
    kept = np.zeros(len(sizes), bool)
    kept[chosen] = True
    texts = (text for text, is_kept in zip(documents("reading"), kept, strict=True) if is_kept)
    tokenizer = train_tokenizer(texts, arguments.vocab_size, arguments.min_frequency)
    seconds = time.perf_counter() - start
    validation = arguments.listed("validation_data") or sources
    measured = {}
    for source in validation:
        split = "train" if names_files(source) else "validation"
        measured[Path(source).name] = compression(tokenizer, read_texts(source, split, column))

    out = Path(arguments.out)
    save_tokenizer(tokenizer, out)
    public_names = {"data": public(sources), "validation_data": public(arguments.listed("validation_data"))}
    results = {
        "command": command("tokenizer", (TokenizerArguments, vars(arguments) | public_names)),
        "trained_on": {"documents": len(chosen), "characters": int(sizes[chosen].sum()), "seconds": round(seconds, 1)},
        "validation": measured,
    }
    write_json(out / "compression.json", results | machine())
    print(f"{len(tokenizer):,} ids from {len(chosen):,} of {len(sizes):,} documents in {seconds:.0f} s: {out}")
    for name, row in measured.items():
        print(f"{name}: {row['characters_per_token']:.3f} characters, {row['bytes_per_token']:.3f} bytes per token")


if __name__ == "__main__":
    main()
