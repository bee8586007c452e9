"""Many samples into one file: free ones, or some for each of many prompts; killed, the same command goes on.

    python -m training.generate --model hub_cards/edlm-wiki27 --num_samples 1000 --out runs/samples.jsonl
    torchrun --nproc_per_node 2 -m training.generate --model hub_cards/edlm-wiki27 --prompts prompts.txt \
        --num_return_sequences 4 --out runs/continued.parquet

Rows are numbered: sample j of prompt i is row i * num_return_sequences + j. The text of a row is a function of the
seed, its number, its prompt and the settings, whatever the batch and the process that it is made in (up to rounding:
kernels may sum in another order for another batch size).

Each batch is a file in the folder `<out>.parts/`, which all processes must see, and has its name when it is whole. So a
kill costs the batch that was at work. A new start, with any number of processes, makes the rows that are missing;
batch_size, compile, device and num_threads may be others, what the rows depend on may not. The last act joins all rows
in their order and gives the file its name; beside samples.jsonl it puts samples.settings.yaml, which says what the rows
depend on.

The rows have the columns row, prompt (null for a free sample), text (the prompt included, special tokens left out),
tokens (ids, all of the text), nfe, energy_nfe (passes of denoiser and energy) and seed.

Shapes: B rows of a batch, L length.
"""

import copy
import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import yaml
from tqdm.auto import tqdm

from .common.arguments import CommaLists, answer_early, found_device, generation_config, parse_arguments

LENGTHS = ("max_length", "max_new_tokens")
SAMPLING = ("num_steps", "num_candidates", "energy_window", "energy_temperature", "shared_completion")
SAMPLING += ("corrector_steps", "corrector_size", "corrector_candidates", "corrector_temperature")
SAMPLING += ("temperature", "top_k", "top_p", "do_sample")  # options of generate() that a text depends on


@dataclass(kw_only=True)
class GenerateArguments(CommaLists):
    model: str = field(default="", metadata={"help": "folder or repo of the model, with its tokenizer"})
    energy: str = field(default="", metadata={"help": "an NCE energy or its adapter: folder or repo, :subfolder"})
    out: str = field(default="", metadata={"help": "a .jsonl or .parquet file"})
    num_samples: int | None = field(default=None, metadata={"help": "free samples; with prompts there are none"})
    prompts: str = field(default="", metadata={"help": ".txt, one on a line; .jsonl, .parquet, or a Hub data set"})
    prompt_column: str = field(default="prompt", metadata={"help": "where the prompts are, but for a .txt"})
    split: str = field(default="train", metadata={"help": "of a Hub data set of prompts"})
    num_return_sequences: int | None = field(default=None, metadata={"help": "samples of each prompt"})
    max_length: int | None = field(default=None, metadata={"help": "tokens of a text; default: the model's length"})
    max_new_tokens: int | None = field(default=None, metadata={"help": "tokens after the prompt; or give max_length"})
    num_steps: int | None = field(default=None, metadata={"help": "this and the next eleven: the checkpoint's default"})
    num_candidates: int | None = None
    energy_window: str = field(default="", metadata={"help": "hi,lo: the energy acts at times in [lo, hi]"})
    energy_temperature: float | None = None
    shared_completion: bool | None = None
    corrector_steps: int | None = None
    corrector_size: int | None = None
    corrector_candidates: int | None = None
    corrector_temperature: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    do_sample: bool | None = None
    compile: bool | None = field(default=None, metadata={"help": "compile the networks first"})
    seed: int = 0
    batch_size: int = field(default=0, metadata={"help": "rows at a time; 0: as many as fit"})
    dtype: str = field(default="float32", metadata={"help": "float32 or bfloat16"})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, or auto: cuda where there is one"})
    num_threads: int = field(default=0, metadata={"help": "CPU threads; 0: torch's default"})
    overwrite: bool = field(default=False, metadata={"help": "start anew, and replace what out names"})

    def __post_init__(self):
        for name in ("model", "out"):
            if not getattr(self, name):
                raise ValueError(f"{name} must be given, got {getattr(self, name)!r}")
        if Path(self.out).suffix not in (".jsonl", ".parquet"):
            raise ValueError(f"out must end in .jsonl or .parquet, got {self.out!r}")
        if self.prompts and self.num_samples is not None:
            raise ValueError(
                f"num_samples counts free samples, with prompts there is num_return_sequences, got {self.num_samples}"
            )
        if not self.prompts and self.num_return_sequences is not None:
            raise ValueError(
                f"num_return_sequences counts samples of a prompt, without there is num_samples, "
                f"got {self.num_return_sequences}"
            )
        if not self.prompts and (self.num_samples or 0) < 1:
            raise ValueError(f"num_samples must be at least 1, or give prompts, got {self.num_samples}")
        for name in ("batch_size", "num_threads"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must lie in [0, 2**63), got {self.seed}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")
        found_device(self.device)
        generation_config(**self.given(*SAMPLING, *LENGTHS, "num_return_sequences"))  # checks them

    def given(self, *names: str) -> dict:
        """Those of the options of `generate()` that were set; the others are the checkpoint's."""
        values = {name: getattr(self, name) for name in names} | {"energy_window": None}
        if self.energy_window and "energy_window" in names:
            values["energy_window"] = tuple(self.listed("energy_window", float, distinct=False))
        return {name: value for name, value in values.items() if value is not None}


if __name__ == "__main__":
    answer_early(GenerateArguments, __doc__)

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modeling_edlm import EDLMGenerationConfig, EDLMModel
from modeling_edlm.backbone import rows_at_once

from .common.checkpoint import fingerprint
from .common.data import read_texts
from .common.results import read_json, write_json, write_whole

ROW_GROUP = 1000  # rows of a parquet file that are in memory together
ENDS = ("eos_token_id", "pad_token_id")  # in the checkpoint's settings alone
SCHEMA = pa.schema(
    {"row": pa.int64(), "prompt": pa.string(), "text": pa.string(), "tokens": pa.list_(pa.int64())}
    | {"nfe": pa.int64(), "energy_nfe": pa.int64(), "seed": pa.int64()}
)


# ---- what the rows start from


def read_prompts(arguments: GenerateArguments) -> list[str]:
    """Raises ValueError for a source that is not there, has no prompt, or has one that is empty or no text."""
    source, path = arguments.prompts, Path(arguments.prompts)
    if path.suffix not in (".txt", ".jsonl", ".parquet") and path.exists():
        raise ValueError(f"prompts must be .txt, .jsonl, .parquet or a Hub data set, got {source!r}")
    try:
        if path.suffix in (".txt", ".jsonl"):
            text = path.read_bytes().decode("utf-8-sig").removesuffix("\n")
            prompts = [line.removesuffix("\r") for line in text.split("\n")] if text else []
            if path.suffix == ".jsonl":
                prompts = [_prompt_of(line, arguments.prompt_column, i) for i, line in enumerate(prompts)]
        else:
            prompts = list(read_texts(source, arguments.split, arguments.prompt_column))
    except (OSError, ValueError) as error:  # a UnicodeDecodeError is a ValueError
        raise ValueError(f"prompts={source!r} cannot be read: {error}") from error
    if not prompts:
        raise ValueError(f"prompts={source!r} is empty")
    return prompts


def _prompt_of(line: str, column: str, i: int) -> str:
    try:
        value = json.loads(line)[column]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"line {i + 1} is no JSON object with {column!r}: {line[:80]!r}") from error
    if not isinstance(value, str):
        raise ValueError(f"line {i + 1} has {value!r}, which is not text")
    return value


def _place(source: str, i: int) -> str:
    return f"line {i + 1}" if Path(source).suffix in (".txt", ".jsonl") else f"row {i}"


class Starts:
    """What each row starts from, whole: its prompt, then masks up to the length.

    With max_length all rows are as long. With max_new_tokens they are not, and a batch is padded on the left.
    """

    def __init__(
        self,
        arguments: GenerateArguments,
        tokenizer: PreTrainedTokenizerBase,
        model: EDLMModel,
        config: EDLMGenerationConfig,
    ):
        self.mask_token_id, self.pad_token_id = model.config.mask_token_id, tokenizer.pad_token_id
        if self.pad_token_id is None:  # any id will do where the attention mask is 0
            self.pad_token_id = self.mask_token_id
        longest, self.max_new_tokens = model.config.max_position_embeddings, config.max_new_tokens
        self.max_length = config.max_length or self.max_new_tokens or longest  # of a free sample
        if self.max_length > longest:
            name = "max_length" if config.max_length else "max_new_tokens"
            raise ValueError(f"{name} must be at most {longest}, the model's, got {self.max_length}")
        self.prompts, self.ids, self.each = None, [[]], arguments.num_samples
        if arguments.prompts:
            self.prompts, self.each = read_prompts(arguments), config.num_return_sequences
            self.ids = tokenizer(self.prompts, add_special_tokens=False).input_ids
            room, why = self.max_length, f"max_length={self.max_length}"
            if self.max_new_tokens:
                room, why = (
                    longest - self.max_new_tokens,
                    f"the model's {longest} less max_new_tokens={self.max_new_tokens}",
                )
            for i, ids in enumerate(self.ids):
                if not 0 < len(ids) <= room:
                    problem = f"{len(ids)} tokens, more than {why}" if ids else f"no token: {self.prompts[i][:80]!r}"
                    raise ValueError(f"prompts={arguments.prompts!r}: {_place(arguments.prompts, i)} has {problem}")
        self.num_rows = len(self.ids) * self.each

    def prompt(self, row: int) -> str | None:
        return self.prompts and self.prompts[row // self.each]

    def length(self, row: int) -> int:
        return len(self.ids[row // self.each]) + self.max_new_tokens if self.max_new_tokens else self.max_length

    def num_new(self, row: int) -> int:
        """Tokens to generate: those behind the prompt, and the masks within it."""
        ids = self.ids[row // self.each]
        return self.length(row) - len(ids) + ids.count(self.mask_token_id)

    def batch(self, rows: range) -> dict:
        """The arguments of `generate()` for these rows."""
        L = max(map(self.length, rows))
        if self.prompts is None:
            return {"batch_size": len(rows), "max_length": L}
        pads = [L - self.length(row) for row in rows]
        canvas = [[self.pad_token_id] * pad + self.ids[row // self.each] for row, pad in zip(rows, pads, strict=True)]
        canvas = [ids + [self.mask_token_id] * (L - len(ids)) for ids in canvas]
        mask_BL = torch.arange(L) >= torch.tensor(pads)[:, None]
        return {"input_ids": torch.tensor(canvas), "attention_mask": mask_BL.long(), "max_length": L}


# ---- finished rows


class Parts:
    """The finished rows: a file for each batch, which has its name when it is whole.

    The name holds the rows and a hash of what they are made from. So processes that outlive a killed run do no harm:
    they write what the next run would write, or what nobody reads.
    """

    def __init__(self, out: str):
        self.folder = Path(f"{out}.parts")
        self.about = self.folder / "arguments.json"

    def begin(self, made_from: dict, arguments: GenerateArguments) -> str:
        """The hash; ValueError if there are rows that were made from anything else."""
        if arguments.overwrite:
            self.remove()
        made_from = json.loads(json.dumps(made_from))
        if self.about.exists() and next(self.folder.glob("*.jsonl"), None):
            theirs = read_json(self.about)["made_from"]
            for name in made_from | theirs:
                if made_from.get(name) != theirs.get(name):
                    raise ValueError(
                        f"{self.folder} has rows made with {name}={theirs.get(name)!r}, got {made_from.get(name)!r}: "
                        "give the same to go on with them, or --overwrite true to start anew"
                    )
        else:
            write_json(self.about, {"made_from": made_from, "arguments": asdict(arguments)})
        return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]

    def add(self, key: str, rows: range, made: list[dict]) -> None:
        # ASCII: U+2028 and the like, which some readers take for the end of a line, are escaped
        lines = "".join(json.dumps(row) + "\n" for row in made)
        write_whole(self.folder / f"{rows[0]:09}-{rows[-1]:09}.{key}.jsonl", lines)

    def index(self, key: str) -> dict[int, tuple[Path, int]]:
        """By number, in order, the file and the line of every finished row."""
        found = {}
        for path in self.folder.glob(f"*.{key}.jsonl"):
            first, last = map(int, path.name.partition(".")[0].split("-"))
            found |= {row: (path, row - first) for row in range(first, last + 1)}
        return dict(sorted(found.items()))

    def lines(self, key: str) -> Iterator[bytes]:
        for path, group in groupby(self.index(key).values(), key=itemgetter(0)):
            lines = path.read_bytes().splitlines(keepends=True)
            yield from (lines[i] for _, i in group)

    def remove(self) -> None:
        """All or nothing: a kill must not leave some of the parts."""
        aside = Path(f"{self.folder}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        if self.folder.exists():
            self.folder.rename(aside)
            shutil.rmtree(aside)


def write_rows(lines: Iterator[bytes], path: Path, suffix: str) -> None:
    """The rows as one file."""
    if suffix == ".jsonl":
        with open(path, "wb") as file:
            file.writelines(lines)
        return
    with pq.ParquetWriter(path, SCHEMA) as writer:
        for _, group in groupby(enumerate(lines), key=lambda item: item[0] // ROW_GROUP):
            writer.write_table(pa.Table.from_pylist([json.loads(line) for _, line in group], SCHEMA))


# ---- the command


def load(arguments: GenerateArguments, device: torch.device) -> tuple[EDLMModel, PreTrainedTokenizerBase]:
    model = EDLMModel.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()
    if arguments.energy:
        folder, _, subfolder = arguments.energy.partition(":")
        model.load_energy(folder, subfolder=subfolder)
    return model.to(device), AutoTokenizer.from_pretrained(arguments.model)


def settings(arguments: GenerateArguments, model: EDLMModel) -> EDLMGenerationConfig:
    """Those of the checkpoint, but for what was given."""
    config, given = copy.deepcopy(model.generation_config), arguments.given(*SAMPLING, *LENGTHS, "num_return_sequences")
    if given.keys() & set(LENGTHS):
        config.max_length = config.max_new_tokens = None
    config.__dict__.update(given)
    config.validate()
    return config


def origin(arguments: GenerateArguments, model: EDLMModel, config: EDLMGenerationConfig, starts: Starts) -> dict:
    """All that the rows are a function of; what the eye can compare comes first."""
    found = {name: value for name, value in vars(config).items() if name in SAMPLING + ENDS}
    found |= {"seed": arguments.seed, "dtype": arguments.dtype}
    found |= {
        "max_length": None if starts.max_new_tokens else starts.max_length,
        "max_new_tokens": starts.max_new_tokens,
    }
    if starts.prompts is None:
        found["num_samples"] = arguments.num_samples
    else:
        texts = json.dumps([starts.prompts, starts.ids])
        found["num_return_sequences"] = starts.each
        found["fingerprint of the prompts"] = hashlib.sha256(texts.encode()).hexdigest()[:16]
    tensors = [value.reshape(-1) for _, value in sorted(model.state_dict().items())]
    fields = json.dumps(model.config.fields(), sort_keys=True, default=str)
    weights = hashlib.sha256((fingerprint(tensors) + fields).encode()).hexdigest()[:16]
    return found | {"fingerprint of the model": weights}


def make_rows(
    rows: range, model: EDLMModel, tokenizer: PreTrainedTokenizerBase, starts: Starts, arguments: GenerateArguments
) -> list[dict]:
    output = model.generate(
        **starts.batch(rows),
        first_row=rows.start,
        seed=arguments.seed,
        num_return_sequences=1,
        output_history=False,
        return_dict_in_generate=True,
        **arguments.given(*SAMPLING, "compile"),
    )
    counts = zip(output.sequences.tolist(), output.nfe.tolist(), output.energy_nfe.tolist(), strict=True)
    made = []
    for row, (ids, nfe, energy_nfe) in zip(rows, counts, strict=True):
        ids = ids[-starts.length(row) :]  # without the padding
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        values = (row, starts.prompt(row), text, ids, nfe, energy_nfe, arguments.seed)
        made.append(dict(zip(SCHEMA.names, values, strict=True)))
    return made


def run(arguments: GenerateArguments, state: PartialState, parts: Parts) -> None:
    with state.main_process_first():  # the others find what the first has fetched
        model, tokenizer = load(arguments, state.device)
        config = settings(arguments, model)
        starts = Starts(arguments, tokenizer, model, config)
    N = starts.num_rows
    fitting = rows_at_once(model.denoiser, max(starts.length(row) for row in range(0, N, starts.each)))
    size = arguments.batch_size or min(fitting, math.ceil(N / state.num_processes))
    begun, is_main = [None], state.is_main_process
    if is_main:
        key = parts.begin(origin(arguments, model, config, starts), arguments)
        done = set(parts.index(key))
        blocks = [range(first, min(first + size, N)) for first in range(0, N, size)]
        begun = [(key, done, [block for block in blocks if not done.issuperset(block)])]
    key, done, blocks = broadcast_object_list(begun)[0]  # all must have the same ones to share
    started = looked = time.perf_counter()
    with (
        tqdm(total=N, initial=len(done), unit="row", disable=not is_main, smoothing=0) as bar,
        state.split_between_processes(blocks) as mine,
    ):
        for block in mine:  # whole, even where some of its rows are done: a batch of the same shape rounds the same
            parts.add(key, block, make_rows(block, model, tokenizer, starts, arguments))
            if is_main and (time.perf_counter() > looked + 1 or block is mine[-1]):  # the others' rows are in the bar
                bar.update(len(parts.index(key)) - bar.n)
                looked = time.perf_counter()
        while is_main and bar.n < N and state.num_processes > 1:
            time.sleep(0.5)
            bar.update(len(parts.index(key)) - bar.n)
    state.wait_for_everyone()
    seconds = time.perf_counter() - started
    if is_main:
        finish(Path(arguments.out), parts, key, N)
        missing = [row for row in range(N) if row not in done]
        tokens = sum(starts.num_new(row) for row in missing)
        speed = f"{len(missing) / seconds:.4g} samples/s, {tokens / seconds:.4g} tokens/s"
        where = f"{state.num_processes} x {state.device.type}, {arguments.dtype}"
        print(f"results: {arguments.out}, {N} rows")
        print(f"this run: {len(missing)} rows, {tokens} new tokens in {seconds:.1f} s, {speed} ({where})")


def finish(out: Path, parts: Parts, key: str, num_rows: int) -> None:
    """One file of all rows in place of the parts; ValueError if rows are missing."""
    index = parts.index(key)
    if missing := [row for row in range(num_rows) if row not in index]:
        raise ValueError(f"{parts.folder} lacks {len(missing)} rows, the first is {missing[0]}: were files removed?")
    begun = read_json(parts.about)
    settings = {name: begun["arguments"][name] for name in ("model", "energy")} | begun["made_from"]
    write_whole(out.with_suffix(".settings.yaml"), yaml.safe_dump(settings, sort_keys=False))
    write_whole(out, lambda path: write_rows(parts.lines(key), path, out.suffix))
    parts.remove()


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(GenerateArguments, __doc__, argv)
    parts = Parts(arguments.out)
    if Path(arguments.out).exists() and not parts.about.exists() and not arguments.overwrite:
        raise ValueError(f"out is there already, {arguments.out}: name another file, or --overwrite true to replace it")
    if arguments.num_threads:
        torch.set_num_threads(arguments.num_threads)
    on_cpu = arguments.device == "cpu" or not torch.cuda.is_available()  # told, accelerate needs no ACCELERATE_USE_CPU
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=30))  # a process may have to wait long for the others
    try:
        run(arguments, state, parts)
    except KeyboardInterrupt:
        if state.is_main_process:
            print(f"\nstopped: {len(parts.index('*'))} rows are kept in {parts.folder}; the same command goes on")
        raise SystemExit(130) from None
    state.destroy_process_group()


if __name__ == "__main__":
    main()
