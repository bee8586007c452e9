"""What all tests share: the cores of the machine, and a fresh accelerate in each of them."""

import os

import pytest
import torch
from accelerate.state import AcceleratorState

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
