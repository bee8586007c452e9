"""What a run must compute and move at least, and how fast this machine multiplies and copies.

Counted are matrix products and attention, as they were called: 2 FLOPs for a multiplication with an addition, causal
attention by half; the bytes of their inputs (weights with them) and outputs, once for each call. Nothing elementwise.
"""

import time
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)
ATTENTION = (
    aten._scaled_dot_product_flash_attention_for_cpu,  # which FlopCounterMode does not know
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
)
MATRIX_SIZES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192, 16384)}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**32}
REPEATS = {"cpu": 5, "cuda": 20}  # of which the best counts
WARM_UP = {"cpu": 1, "cuda": 5}  # a GPU raises its clock under load


class Work(TorchDispatchMode):
    """Adds up `flops` and `bytes` of what runs within it."""

    def __init__(self):
        super().__init__()
        self.flops = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result, kind = function(*args, **kwargs), function._overloadpacket
        if kind in PRODUCTS:
            self.flops += flop_registry[kind](*args, **kwargs, out_val=result)
        elif kind is torch.ops.mkldnn._linear_pointwise:
            self.flops += 2 * result.numel() * args[1].shape[1]
        elif kind in ATTENTION:
            flops = sdpa_flop_count(*(x.shape for x in args[:3]))
            self.flops += flops // 2 if is_causal(function, args, kwargs) else flops
        else:
            return result
        self.bytes += sum(x.nbytes for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor))
        return result


def is_causal(function, args, kwargs) -> bool:
    names = [argument.name for argument in function._schema.arguments]
    place = names.index("is_causal")
    return args[place] if place < len(args) else kwargs.get("is_causal", False)


def ceilings(device: str, dtype: torch.dtype, wait: Callable[[], None]) -> dict:
    """FLOPs per second of the best square matrix product, bytes per second of a copy (read and written).

    Of random numbers: a GPU needs less power for constant ones, and is faster.
    """

    def best(call: Callable[[], object]) -> float:
        for _ in range(WARM_UP[device]):
            call()
        seconds = []
        for _ in range(REPEATS[device]):
            wait()
            start = time.perf_counter()
            call()
            wait()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    speeds = {}
    for size in MATRIX_SIZES[device]:
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        speeds[size] = 2 * size**3 / best(lambda a=a, b=b: a @ b)
    source = torch.randn(COPY_BYTES[device] // dtype.itemsize, device=device, dtype=dtype)
    target = torch.empty_like(source)
    size = max(speeds, key=speeds.get)
    return {
        "flops_per_second": speeds[size],
        "matrix_size": size,
        "bytes_per_second": 2 * source.nbytes / best(lambda: target.copy_(source)),
    }


def share(flops: int, num_bytes: int, seconds: float, ceilings: dict) -> float:
    """Time that the work takes at the ceilings, whichever binds, over the time that it took."""
    return max(flops / ceilings["flops_per_second"], num_bytes / ceilings["bytes_per_second"]) / seconds
