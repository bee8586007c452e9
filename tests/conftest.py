"""What all tests share: the cores of the machine, a fresh accelerate in each of them, and a Hub for those that ask."""

import os
import time

import huggingface_hub
import pytest
import torch
from accelerate.state import AcceleratorState

from support.fake_hub import HOSTS, FakeHub

# workers of one machine share its cores, and so do the processes that they start
if count := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    threads = max(1, (os.cpu_count() or 1) // count)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """One process runs many trainings here, in any order; accelerate keeps its state for the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the Hub, and a client that does not wait between its attempts (23 seconds in all)."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", ",".join(HOSTS))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with FakeHub() as hub:
        yield hub
