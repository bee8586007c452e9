"""The published sampler, run from a checkout of github.com/MinkaiXu/Energy-Diffusion-LLM as it is.

Its `_sample` and networks are unmodified. Only packages that it imports and sampling does not need, or that need a GPU,
are replaced while it is imported: flash-attn's attention by torch's, and its rotary positions by an equal function, of
five kernels where flash-attn has one. Its objects are made without `__init__`, which loads checkpoints by fixed paths.
Shapes: B batch, L length, H heads, D width of a head, P all B * L positions.
"""

import importlib
import sys
import warnings
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import torch
from torch import nn

from .stages import Target

OWN = ("diffusion", "noise_schedule", "models", "models.dit", "models.autoregressive")
EBM_BACKBONES = {"ar": "ar", "coar": "ar", "nce": "dit"}
# how TorchScript and cuBLAS, which know no OutOfMemoryError, say it
FULL = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class LightningModule(nn.Module):
    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def rearrange(x: torch.Tensor, pattern: str, h: int = 1, b: int = 1, **_) -> torch.Tensor:
    """einops, as far as it is used there."""
    if pattern == "b s (three h d) -> b s three h d":
        return x.unflatten(-1, (3, h, -1))
    if pattern == "b s ... -> (b s) ...":
        return x.flatten(0, 1)
    if pattern == "(b s) h d -> b s (h d)":
        return x.flatten(1).unflatten(0, (b, -1))
    raise NotImplementedError(f"rearrange: {pattern}")


def attention(qkv_P3HD, cu_seqlens, max_seqlen, dropout_p, causal=False) -> torch.Tensor:
    """Packed sequences of equal length: (P, 3, H, D) to (P, H, D)."""
    query, key, value = qkv_P3HD.unflatten(0, (-1, max_seqlen)).permute(2, 0, 3, 1, 4)
    y_BHLD = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
    return y_BHLD.transpose(1, 2).flatten(0, 1)


def rotate_in_place(qkv_BL3HD, cos_LD, sin_LD) -> torch.Tensor:
    """The first half of the channels of queries and keys against the second."""
    first, second = qkv_BL3HD[:, :, :2].chunk(2, dim=-1)
    cos, sin = cos_LD[:, None, None], sin_LD[:, None, None]
    rotated = (first * cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(rotated)
    return qkv_BL3HD


def _module(name: str, **contents) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(contents)
    return module


def _stand_ins(checkout: Path) -> dict[str, ModuleType]:
    rotary = _module("flash_attn.layers.rotary", apply_rotary_emb_qkv_=rotate_in_place)
    layers = _module("flash_attn.layers", rotary=rotary)
    functions = _module("flash_attn.flash_attn_interface", flash_attn_varlen_qkvpacked_func=attention)
    utils, aggregation = _module("hydra.utils"), _module("torchmetrics.aggregation", MeanMetric=object)
    modules = (
        _module("flash_attn", layers=layers, flash_attn_interface=functions),
        _module("hydra", utils=utils),
        _module("torchmetrics", aggregation=aggregation),
        _module("lightning", LightningModule=LightningModule),
        _module("einops", rearrange=rearrange),
        # the package itself imports every backbone, those that need further packages too
        _module("models", __path__=[str(checkout / "models")]),
        *(_module(name) for name in ("omegaconf", "dataloader", "utils")),
    )
    return {module.__name__: module for module in (*modules, rotary, layers, functions, utils, aggregation)}


@contextmanager
def _imports(checkout: Path):
    stand_ins = _stand_ins(checkout)
    before = {name: sys.modules.pop(name, None) for name in stand_ins.keys() | set(OWN)}
    writes_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # the checkout stays as it is
    sys.modules.update(stand_ins)
    sys.path.insert(0, str(checkout))
    try:
        yield
    finally:
        sys.path.remove(str(checkout))
        sys.dont_write_bytecode = writes_bytecode
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def load(checkout: str) -> SimpleNamespace:
    """The modules of a checkout, and the SHA-256 of its sampler; ValueError where there is none."""
    path = Path(checkout).resolve()
    if not (path / "diffusion.py").is_file():
        raise ValueError(f"EDLM_REF must be a checkout of MinkaiXu/Energy-Diffusion-LLM, got {checkout!r}")
    with _imports(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = ("diffusion", "noise_schedule", "models.dit", "models.autoregressive")
        modules = {name.split(".")[-1]: importlib.import_module(name) for name in names}
    return SimpleNamespace(**modules, sha256=sha256((path / "diffusion.py").read_bytes()).hexdigest())


def make_sampler(reference: SimpleNamespace, energy: str, size: dict, seed: int = 0, device: str = "cpu") -> nn.Module:
    """A `Diffusion`, or an `EBM`, with noise on every weight, in eval mode and float32."""
    model = SimpleNamespace(
        hidden_size=size["hidden_size"],
        n_blocks=size["num_hidden_layers"],
        n_heads=size["num_attention_heads"],
        cond_dim=size["cond_dim"],
        length=size["length"],
        dropout=0.1,
        scale_by_sigma=True,
        causal=False,
    )
    sampling = SimpleNamespace(
        predictor="ddpm_cache", noise_removal=True, is_temp=1, ar_carry_over=energy == "coar", steps=None
    )
    config = SimpleNamespace(
        model=model,
        sampling=sampling,
        noise=SimpleNamespace(type="loglinear"),
        loader=SimpleNamespace(eval_batch_size=1),
        ebm_backbone=EBM_BACKBONES.get(energy),
    )
    V = size["vocab_size"]
    torch.manual_seed(seed)
    kind = reference.diffusion.Diffusion if energy == "none" else reference.diffusion.EBM
    sampler = object.__new__(kind)
    nn.Module.__init__(sampler)
    sampler.config, sampler.sampler, sampler.parameterization = config, "ddpm_cache", "subs"
    sampler.vocab_size, sampler.mask_index, sampler.neg_infinity = V, V - 1, -1000000.0
    sampler.time_conditioning, sampler.T, sampler.subs_masking = False, 0, False
    sampler.noise = reference.noise_schedule.get_noise(config)
    sampler.backbone = reference.dit.DIT(config, vocab_size=V)
    if energy in ("ar", "coar"):
        causal = SimpleNamespace(model=SimpleNamespace(**vars(model) | {"causal": True}))
        sampler.ebm = reference.autoregressive.AR(causal, vocab_size=V, mask_index=V - 1)
    elif energy == "nce":
        D = size["hidden_size"]
        sampler.ebm = reference.dit.DIT(config, vocab_size=V)
        sampler.ebm.vocab_proj = nn.Linear(2 * D, D)
        sampler.ebm.output_layer = reference.dit.DDitFinalLayer(D, D, size["cond_dim"])
        sampler.ebm.energy_head = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 1, bias=False))
    sampler.to(device)
    with torch.no_grad():
        for parameter in sampler.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return sampler.eval()


def generate(sampler: nn.Module, num_steps: int, batch_size: int, num_candidates: int, window, last_pass: bool = True):
    """Tokens (B, L). `last_pass`: the pass after the last step that fills what is left, as in its configuration.

    Raises torch.OutOfMemoryError, whatever the library that ran out of memory raised.
    """
    config = sampler.config
    config.loader.eval_batch_size, config.sampling.noise_removal = batch_size, last_pass
    config.sampling.is_size, (config.sampling.is_start, config.sampling.is_end) = num_candidates, window
    # the name by which it asks for autocast is deprecated, and warns at a cost of microseconds forty times in a pass
    autocast = patch.object(torch.cuda.amp, "autocast", partial(torch.amp.autocast, "cuda"))
    with autocast, warnings.catch_warnings():  # on a CPU it does nothing
        warnings.simplefilter("ignore")
        try:
            return sampler._sample(num_steps=num_steps)
        except RuntimeError as error:
            if any(words in str(error) for words in FULL):
                raise torch.OutOfMemoryError("out of memory") from None
            raise


def stage_targets(reference: SimpleNamespace, sampler: nn.Module) -> list[Target]:
    """Everything but the networks is their draw, its softmax included, or the rest: the loop and the choice."""
    targets = [
        (sampler.backbone, "forward", "denoiser"),
        (sampler.backbone.output_layer, "forward", "projection"),
        (sampler, "_subs_parameterization", "draw"),
        (sampler, "_ddpm_caching_update", "draw"),
        (reference.diffusion, "_sample_categorical", "draw"),
    ]
    return targets + ([(sampler, "ebm_forward", "energy")] if sampler.config.ebm_backbone else [])
