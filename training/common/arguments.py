"""Options of the commands: dataclasses, read from the command line, and the command line that gives them again.

Nothing here imports torch: --help and a wrong option are answered before it is, which takes seconds.
"""

import argparse
import glob
import logging
import math
import re
import shlex
import sys
from collections.abc import Collection
from dataclasses import MISSING, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path

import yaml
from transformers import HfArgumentParser

KINDS = ("ar", "coar", "nce")  # of energies
COMPLETIONS = ("independent", "shared")  # of the candidates of a step
MODELS = "ar base denoiser energy init_from judge model ranker scorer tokenizer".split()  # options: a folder or a repo
PUBLIC_DATA = Path("data")  # where a recorded command looks for a data set, wherever it was when it ran


class CommaLists:
    """For a dataclass of arguments with options such as "1,2,4"."""

    def listed(self, name: str, kind: type = str, distinct: bool = True) -> list:
        """The (different) values of a comma list, in order; ValueError names the option where one is no `kind`."""
        try:
            values = [kind(part.strip()) for part in str(getattr(self, name)).split(",") if part.strip()]
            return list(dict.fromkeys(values)) if distinct else values
        except ValueError:
            raise ValueError(f"{name} must be numbers with commas between, got {getattr(self, name)!r}") from None

    def tuples(self, name: str, kind: type, form: str) -> list[tuple]:
        """The values of a comma list of tuples such as "0.4:0"; `form` is what a message calls their parts."""
        try:
            found = [tuple(kind(part) for part in item.split(":")) for item in self.listed(name)]
        except ValueError:
            found = [()]
        if any(len(item) != len(form.split(":")) for item in found):
            raise ValueError(f"{name} must be {form} with commas between, got {getattr(self, name)!r}")
        return found


@dataclass(kw_only=True)
class LoopArguments:
    output_dir: str = field(metadata={"help": "folder of the model, the checkpoint and metrics.jsonl"})
    max_steps: int = field(default=10_000, metadata={"help": "optimizer steps in all"})
    batch_size: int = field(default=32, metadata={"help": "sequences of one process in one forward pass"})
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    lr_schedule: str = field(default="cosine", metadata={"help": "cosine or constant_with_warmup"})
    warmup_steps: int = 200
    weight_decay: float = field(default=0.01, metadata={"help": "on matrices only"})
    adam_beta2: float = 0.99
    max_grad_norm: float = 1.0
    ema_decay: float = field(default=0.999, metadata={"help": "0: no average; else the average is the saved model"})
    mixed_precision: str = field(default="no", metadata={"help": "no or bf16"})
    gradient_checkpointing: bool = False
    compile: bool = field(default=False, metadata={"help": "run the blocks through torch.compile"})
    seed: int = 0
    log_steps: int = 20
    eval_steps: int = 500
    checkpoint_minutes: float = 5.0
    max_minutes: float = field(default=0.0, metadata={"help": "save, evaluate and stop after so long; 0: no limit"})
    num_threads: int = field(default=0, metadata={"help": "CPU threads; 0: torch's default"})
    patience: int = field(
        default=0, metadata={"help": "stop after so many evaluations without a better one; the best is saved. 0: never"}
    )
    resume: bool = field(default=False, metadata={"help": "go on from the checkpoint in output_dir"})
    report_to: str = field(default="auto", metadata={"help": "trackio, none, or auto: trackio where it is installed"})

    def __post_init__(self):
        counts = ("max_steps", "batch_size", "gradient_accumulation_steps", "log_steps", "eval_steps")
        amounts = ("learning_rate", "warmup_steps", "weight_decay", "seed", "num_threads", "patience")
        amounts += ("checkpoint_minutes", "max_minutes")
        for name, least in dict.fromkeys(counts, 1).items() | dict.fromkeys(amounts, 0).items():
            if not least <= getattr(self, name) < math.inf:  # nor NaN
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.max_grad_norm > 0:  # every gradient would be scaled to 0
            raise ValueError(f"max_grad_norm must be greater than 0 (inf: no limit), got {self.max_grad_norm}")
        for name in ("ema_decay", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if self.report_to not in ("auto", "trackio", "none"):
            raise ValueError(f"report_to must be trackio, none or auto, got {self.report_to!r}")
        if self.report_to == "trackio" and not find_spec("trackio"):
            raise ValueError("report_to='trackio' needs the package trackio: pip install trackio")
        out_dir = Path(self.output_dir)
        if (out_dir / "config.json").exists():
            raise ValueError(f"output_dir {self.output_dir} is the folder of a model: name another one")
        if (out_dir / "model").exists() and not (out_dir / "checkpoint.safetensors").exists():
            raise ValueError(f"output_dir {self.output_dir} has a model that was not trained there: name another one")
        if self.lr_schedule not in ("cosine", "constant_with_warmup"):
            raise ValueError(f"lr_schedule must be cosine or constant_with_warmup, got {self.lr_schedule!r}")
        if self.mixed_precision not in ("no", "bf16"):
            raise ValueError(f"mixed_precision must be no or bf16, got {self.mixed_precision!r}")


# What may differ between the first start and a resumption without changing the weights. Paths may: the files they
# lead to are held to their contents, by `identity`.
FREE_ARGUMENTS = set(
    "output_dir log_steps eval_steps checkpoint_minutes max_minutes num_threads resume report_to data validation_data "
    "cache_dir base init_from tokenizer gradient_checkpointing eval_blocks final_eval_blocks patience eval_num_steps "
    "eval_sequences".split()
)

NOT_RECORDED = {"num_threads", "cache_dir", "report_to", "resume", "checkpoint_minutes", "log_steps", "max_minutes"}


def parse_arguments(argument_class, description: str, argv: list[str] | None = None):
    """A dataclass from the command line; `--config file.yaml` gives defaults that later options override."""
    for name in ("torchao", "torch.utils._pytree"):  # what another package says of itself at its import
        logging.getLogger(name).setLevel(logging.ERROR)
    parser = HfArgumentParser(argument_class, description=description, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file of options; what stands on the command line wins")
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--config")
    known, argv = before.parse_known_args(argv)
    if known.config:
        with open(known.config, encoding="utf-8") as file:
            options = yaml.safe_load(file) or {}
        if not isinstance(options, dict):
            raise ValueError(f"config {known.config}: expected a mapping of option names to values")
        for name, value in options.items():
            if value is None:
                raise ValueError(f"config {known.config}: {name} has no value")
            options[name] = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        argv = [part for name, value in options.items() for part in (f"--{name}", value)] + argv
    arguments = parser.parse_args_into_dataclasses(argv)[0]
    for option in fields(arguments):
        value = getattr(arguments, option.name)
        if option.default is MISSING and option.default_factory is MISSING and not str(value).strip():
            raise ValueError(f"{option.name} must not be empty, got {value!r}")
        folder = str(value or "").partition(":")[0]  # a subfolder may follow
        if option.name in MODELS and folder and is_path(folder) and not Path(folder).exists():
            raise ValueError(f"{option.name} must be a folder or a repo, and there is no {value!r} here")
        for part in str(value).split(",") if option.name in ("data", "validation_data") else ():
            there = (
                glob.glob(part) if glob.has_magic(part) else Path(part).exists() or not is_path(part.partition(":")[0])
            )
            if part and not there:
                raise FileNotFoundError(f"{option.name}: no such file or folder: {part}")
    return arguments


def is_path(value: str) -> bool:
    """Whether a name can be no repo of the Hub, OWNER/NAME, or begins with a folder that is here."""
    parts = Path(value).parts
    return not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", value) or (len(parts) == 2 and Path(parts[0]).is_dir())


def answer_early(argument_class, description: str) -> None:
    """End a command that asks for --help or has a wrong option, before it imports torch, which takes seconds."""
    try:
        parse_arguments(argument_class, description)
    except (OSError, ValueError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def generation_config(**settings):
    """The EDLMGenerationConfig of these settings; ValueError names a wrong one. It imports torch: checked last."""
    from modeling_edlm import EDLMGenerationConfig

    return EDLMGenerationConfig(**settings)


def found_device(name: str) -> str:
    """cpu or cuda for a name that may be auto; ValueError where there is no such device."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    if name == "cpu":
        return name
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be one that torch finds here, got 'cuda'")
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(kw_only=True)
class DataArguments:
    data: str = field(
        metadata={"help": "a file (parquet, jsonl, txt, txt.gz), a pattern or folder of them, or a Hub data set"}
    )
    validation_data: str = field(default="", metadata={"help": "the same for evaluation; default: data's own split"})
    text_column: str = "text"
    cache_dir: str = field(default="", metadata={"help": "where token ids are kept; default: output_dir/tokens"})
    align_documents: bool = field(
        default=False, metadata={"help": "every block begins where a document begins, and goes on into the next"}
    )
    document_stride: int = field(default=1, metadata={"help": "train on every so many-th document: 2 is half of them"})
    streaming: bool = field(
        default=False, metadata={"help": "read and tokenize the training text, not validation's, while training"}
    )
    shuffle_buffer: int = field(
        default=10_000, metadata={"help": "streaming: blocks held, of which a random one is drawn; 1: no shuffling"}
    )
    eval_blocks: int = field(default=256, metadata={"help": "validation blocks of the evaluations on the way"})
    final_eval_blocks: int = field(default=4096, metadata={"help": "validation blocks of the last evaluation"})

    def check_data(self) -> None:
        """Called by the class that has these arguments beside others."""
        least = {"eval_blocks": 2, "final_eval_blocks": 2, "document_stride": 1, "shuffle_buffer": 1}  # 2: for an error
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}, got {getattr(self, name)}")
        if not self.text_column:
            raise ValueError(f"text_column must not be empty, got {self.text_column!r}")


def names_files(source: str) -> bool:
    """Whether it is a file or a pattern of files, of which no split is known."""
    return Path(source).is_file() or glob.has_magic(source)


def public_data(data: str) -> str:
    """Data sets, with commas between, those that are files here where a card says that they are."""
    return ",".join(str(PUBLIC_DATA / Path(part).name) if Path(part).exists() else part for part in data.split(","))


def command(script: str, arguments, leave_out: Collection[str] = ()) -> str:
    """The command line of `training.<script>`, or of a module with a dot in its name, that gives these arguments (a
    dataclass, or its class and a dictionary).

    Defaults and what is in `leave_out` are not in it; data are where a card says that they are.
    """
    kind, values = arguments if isinstance(arguments, tuple) else (type(arguments), vars(arguments))
    fields = kind.__dataclass_fields__
    changed = {k: v for k, v in values.items() if k in fields and k not in leave_out and v != fields[k].default}
    for name in {"data", "validation_data"} & changed.keys():
        changed[name] = public_data(changed[name])
    if Path(changed.get("out", "")).is_absolute():
        changed["out"] = Path(changed["out"]).name
    module = script if "." in script else f"training.{script}"
    return shlex.join(["python", "-m", module, *(str(x) for k, v in changed.items() for x in (f"--{k}", v))])
