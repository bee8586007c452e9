"""The results file of a measuring script: what is recorded of how it was made, and how it is gone on with."""

import os
import shlex
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch

from training.common.results import machine, read_results

from . import published
from .arguments import CommonArguments

NOT_RECORDED = ("out", "resume", "from_json", "max_minutes")
REFERENCE = "EDLM_REF"


def reference_code() -> SimpleNamespace | None:
    """The published code, where the environment names a checkout."""
    return published.load(os.environ[REFERENCE]) if os.environ.get(REFERENCE) else None


def start_results(
    arguments: CommonArguments, script: str, argv: list[str], reference: SimpleNamespace | None, kept: tuple[str, ...]
) -> dict:
    """What describes this measurement and, where it goes on, what is kept of the file; else this is missing.

    Raises ValueError where the file is of other options, another machine or another published sampler.
    """
    options = {name: value for name, value in asdict(arguments).items() if name not in NOT_RECORDED}
    prefix = f"{REFERENCE}=CHECKOUT " if reference is not None else ""
    about = {"command": prefix + shlex.join(["python", "-m", script, *argv])} | options | machine()
    about["device_name"] = torch.cuda.get_device_name() if arguments.device == "cuda" else about["cpu_name"]
    about["published_sha256"] = reference and reference.sha256
    about |= {"total_seconds": 0.0, "left_out": []}  # what was left out is tried again
    if not (arguments.resume and Path(arguments.out).exists()):
        return about
    results = read_results(arguments.out)
    names = [*options, "device_name", "threads"]
    names += ["published_sha256"] if reference is not None and results["published_sha256"] else []
    for name in names:
        if results.get(name) != about[name]:
            raise ValueError(f"resume: {arguments.out} has {name}={results.get(name)!r}, not {about[name]!r}")
    about["published_sha256"] = about["published_sha256"] or results["published_sha256"]
    return about | {name: results[name] for name in (*kept, "total_seconds")}
