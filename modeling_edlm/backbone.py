"""One transformer for the denoiser, the NCE energy and the autoregressive model; its head is separate.

Blocks of DiT (arXiv 2212.09748) with rotary positions (arXiv 2104.09864), as in MDLM. Causal or bidirectional, with
or without adaptive layer norm. Shapes: N rows (in a conditioning vector 1, where it is the same for all), L length, Q
positions that are needed, D hidden size, C conditioning width, H heads, M selected positions (flat in N * L).
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

CHUNK = 2**25  # entries of a (positions, vocabulary) table that exist at a time
# What the library calls the keys and values of earlier tokens: "past_key_values" before 5.24.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
Module = TypeVar("Module", bound=nn.Module)
PLAIN = (Tensor, nn.Parameter)  # weights that are neither quantised nor sharded


# All are of this thread: others go on as they were.
_is_sampling = ContextVar("is_sampling", default=False)
_compiling = ContextVar("compiling", default=False)
_constants: ContextVar[dict[nn.Module, tuple[Tensor | None, Any]] | None] = ContextVar("constants", default=None)


@contextmanager
def no_dropout() -> Iterator[None]:
    """Within it there is none, also where a callback or another thread has called `train()`."""
    token = _is_sampling.set(True)
    try:
        yield
    finally:
        _is_sampling.reset(token)


class Dropout(nn.Dropout):
    """None within `no_dropout`. A compiler goes by the module's flag alone, on which it compiles anew."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and _is_sampling.get():
            return x
        return super().forward(x)


@contextmanager
def fixed_weights() -> Iterator[None]:
    """Within it no weight changes, so that what a network without time makes of its weights alone is made once."""
    token = _constants.set({})
    try:
        yield
    finally:
        _constants.reset(token)


def once(module: nn.Module, source: Tensor | None, make: Callable[[], Any]) -> Any:
    """What `make` gives for this very `source`; within `fixed_weights` it is made again only for another one."""
    cache = None if torch.compiler.is_compiling() else _constants.get()
    if cache is None:
        return make()
    if module not in cache or cache[module][0] is not source:
        cache[module] = source, make()
    return cache[module][1]


@contextmanager
def compiled(enabled: bool = True) -> Iterator[None]:
    """Within it the blocks of every backbone run through `torch.compile`, on a GPU as CUDA graphs.

    Their shapes are static: rows are padded to a power of two, so a length has few of them.
    """
    token = _compiling.set(enabled)
    try:
        yield
    finally:
        _compiling.reset(token)


def position_chunks(positions_M: Tensor, vocab_size: int) -> Iterator[Tensor]:
    """Flat positions in pieces whose logits fit into CHUNK; none for no positions."""
    return iter(positions_M.split(max(1, CHUNK // vocab_size)) if len(positions_M) else ())


class Rotary(nn.Module):
    """Rotary angles in float32, computed from the positions: no buffer to keep in step with the weights."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.theta = config.rope_theta

    def forward(self, position_ids_NL: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        exponent = torch.arange(0, self.head_dim, 2, device=position_ids_NL.device, dtype=torch.float32) / self.head_dim
        angle = position_ids_NL[:, None, :, None].float() * self.theta**-exponent
        return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x_NHLD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first half of the channels against the second."""
    first, second = x_NHLD.chunk(2, dim=-1)
    # a compiler fuses it anyway, and would break its graph at `out=`
    if x_NHLD.requires_grad or cos.requires_grad or torch.compiler.is_compiling():
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    y_NHLD = torch.empty_like(x_NHLD)  # filled in place: what is reserved and freed again costs more than the products
    y_first, y_second = y_NHLD.chunk(2, dim=-1)
    torch.mul(first, cos, out=y_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=y_second).addcmul_(first, sin)
    return y_NHLD


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """`x @ weight.T + bias`, then if asked for the tanh form of GELU, in place where no gradient needs its input.

    On a CPU in float32 and without gradients it is oneDNN's product, GELU in the same kernel: on a CPU that is not
    Intel's it is faster than MKL's, which torch takes.
    """
    if _has_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(
            x, weight, bias, "gelu" if gelu else "none", [], "tanh" if gelu else ""
        )
    y = nn.functional.linear(x, weight, bias)
    return _gelu(y) if gelu else y


def _gelu(x: Tensor) -> Tensor:
    return nn.functional.gelu(x, approximate="tanh") if x.requires_grad else torch.ops.aten.gelu_(x, approximate="tanh")


def _has_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and type(weight) in PLAIN
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch.backends.mkldnn.is_available()
    )


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether its weights are all that a linear layer does: no adapter, other `forward` or hook, nothing quantised."""
    hooked = "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks
    return type(layer) in (nn.Linear, ZeroLinear) and type(layer.weight) in PLAIN and not hooked


def apply_linear(layer: nn.Module, x: Tensor, gelu: bool = False) -> Tensor:
    """A linear layer of the model, by `linear` where that is all it does. It is torch's own class and has no `forward`
    of ours, because quantisers take no other.
    """
    if is_plain(layer):
        return linear(x, layer.weight, layer.bias, gelu)
    return _gelu(layer(x)) if gelu else layer(x)


class TimeEmbedding(nn.Module):
    """Sinusoidal features of the noise level, then two layers: (N,) to (N, C)."""

    num_frequencies = 128

    def __init__(self, cond_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(2 * self.num_frequencies, cond_dim)
        self.fc2 = nn.Linear(cond_dim, cond_dim)

    def forward(self, noise_N: Tensor) -> Tensor:
        steps = torch.arange(self.num_frequencies, device=noise_N.device, dtype=torch.float32)
        angle = noise_N[:, None].float() * torch.exp(-math.log(10000) * steps / self.num_frequencies)
        features = torch.cat((angle.cos(), angle.sin()), dim=-1).to(self.fc1.weight.dtype)
        return self.fc2(nn.functional.silu(self.fc1(features)))


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero. A class of its own, because weights are initialised leaf by leaf."""


class AdaLayerNorm(nn.Module):
    """Layer norm without bias, then shift and scale from the conditioning; a plain layer norm where cond_dim is 0.

    `num_gates` further chunks of the modulation gate the residual branch that follows.
    """

    def __init__(self, config: PreTrainedConfig, num_gates: int):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, bias=False)
        self.num_chunks = 2 + num_gates
        self.modulation = ZeroLinear(config.cond_dim, self.num_chunks * config.hidden_size) if config.cond_dim else None

    def forward(self, x_NLD: Tensor, cond_NC: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.modulation is None:
            return self.norm(x_NLD), None
        assert cond_NC is not None
        if len(cond_NC) == 1:  # the same for all rows: one affine layer norm
            weight_D, shift_D, gate = self.constants(cond_NC)
            return nn.functional.layer_norm(x_NLD, weight_D.shape, weight_D, shift_D, self.norm.eps), gate
        shift, scale, gate = self.modulate(cond_NC)
        return torch.addcmul(shift, self.norm(x_NLD), 1 + scale), gate

    def modulate(self, cond_NC: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Shift, scale and gate, (N, 1, D) each; a gate only where a residual branch follows."""
        shift, scale, *gate = self.modulation(cond_NC)[:, None].chunk(self.num_chunks, dim=-1)  # type: ignore[misc]
        return shift, scale, gate[0] if gate else None

    def constants(self, cond_1C: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Weight (D,) and shift (D,) of the whole norm, and the gate: made once for a conditioning that is `once`."""
        return once(self, cond_1C, lambda: self._constants(cond_1C))

    def _constants(self, cond_1C: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        shift, scale, gate = self.modulate(cond_1C)
        weight_D = self.norm.weight * (1 + scale[0, 0])
        return weight_D, shift[0, 0].to(weight_D.dtype), gate


def add_gated(x_NLD: Tensor, gate: Tensor | None, y_NLD: Tensor) -> Tensor:
    return x_NLD + y_NLD if gate is None else torch.addcmul(x_NLD, gate, y_NLD)


def eager_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """The specification of the attention backends: (N, H, L, D) to (N, L, H, D)."""
    scores = (query @ key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class Attention(nn.Module):
    def __init__(self, config: PreTrainedConfig, is_causal: bool, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = is_causal
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        x_NLD: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        needed_NQ: Tensor | None = None,
    ) -> Tensor:
        N, L, D = x_NLD.shape
        query, key, value = apply_linear(self.qkv, x_NLD).view(N, L, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        if needed_NQ is not None:
            query = query.gather(2, needed_NQ[:, None, :, None].expand(-1, query.shape[1], -1, self.head_dim))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        y_NLHD, _ = attend(
            self, query, key, value, attention_mask, scaling=self.head_dim**-0.5, is_causal=self.is_causal and L > 1
        )
        return apply_linear(self.out, y_NLHD.reshape(N, -1, D))


class Block(GradientCheckpointingLayer):
    def __init__(self, config: PreTrainedConfig, is_causal: bool, layer_idx: int):
        super().__init__()
        self.norm1 = AdaLayerNorm(config, num_gates=1)
        self.attention = Attention(config, is_causal, layer_idx)
        self.norm2 = AdaLayerNorm(config, num_gates=1)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        x_NLD: Tensor,
        cond_NC: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        needed_NQ: Tensor | None = None,
    ) -> Tensor:
        """With `needed_NQ`, different positions of each row, (N, L, D) that is what it should be at these alone."""
        y_NLD, gate = self.norm1(x_NLD, cond_NC)
        y_NLD = self.dropout(self.attention(y_NLD, rotary, attention_mask, cache, needed_NQ))
        whole_NLD = x_NLD
        if needed_NQ is not None:
            index_NQD = needed_NQ[..., None].expand(-1, -1, x_NLD.shape[-1])
            x_NLD = x_NLD.gather(1, index_NQD)
        x_NLD = add_gated(x_NLD, gate, y_NLD)
        y_NLD, gate = self.norm2(x_NLD, cond_NC)
        y_NLD = apply_linear(self.fc2, apply_linear(self.fc1, y_NLD, gelu=True))
        x_NLD = add_gated(x_NLD, gate, self.dropout(y_NLD))
        return x_NLD if needed_NQ is None else whole_NLD.scatter(1, index_NQD, x_NLD.to(whole_NLD.dtype))


class Backbone(nn.Module):
    """Embedding and blocks: token ids (or embeddings) to the last hidden states and the conditioning vector."""

    def __init__(self, config: PreTrainedConfig, is_causal: bool = False, num_layers: int | None = None):
        super().__init__()
        self.config = config
        self.is_causal = is_causal
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.time_embedding = TimeEmbedding(config.cond_dim) if config.cond_dim else None
        self.rotary = Rotary(config)
        num_layers = config.num_hidden_layers if num_layers is None else num_layers
        self.blocks = nn.ModuleList(Block(config, is_causal, i) for i in range(num_layers))

    def forward(
        self,
        input_ids_NL: Tensor | None = None,
        noise_N: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids_NL: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        where_NL: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Args:
            input_ids_NL: token ids; `inputs_embeds` (N, L, D) takes their place.
            noise_N: `schedule.conditioning(t)`, None where the network does not see time.
            attention_mask: (N, L), 1 for tokens and 0 for padding. position_ids_NL: counted over tokens when None.
            where_NL: bool on the CPU, the positions whose hidden states are needed; None: all. The last block does
                not work for the others.
        Returns:
            hidden states (N, L, D) and the conditioning (N, C), None without adaptive norms.
        """
        x_NLD = self.embedding(input_ids_NL) if inputs_embeds is None else inputs_embeds
        N, L, _ = x_NLD.shape
        given_position_ids_NL = position_ids_NL  # the library looks for packed texts in them, and waits for the device
        if position_ids_NL is None:
            start = cache.get_seq_length() if cache is not None else 0
            if attention_mask is None:
                position_ids_NL = torch.arange(start, start + L, device=x_NLD.device)[None]
            else:
                position_ids_NL = (attention_mask.long().cumsum(-1) - 1).clamp_(min=0)[:, -L:]
        rotary = self.rotary(position_ids_NL, x_NLD.dtype)
        if self.is_causal:
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=x_NLD,
                attention_mask=attention_mask,
                **{CACHE: cache},
                position_ids=given_position_ids_NL,
            )
        else:
            mask = create_bidirectional_mask(config=self.config, inputs_embeds=x_NLD, attention_mask=attention_mask)
        cond_NC = None
        if self.time_embedding is not None:
            if noise_N is None:  # without time the conditioning is a constant
                cond_NC = once(self, None, lambda: self.conditioning(x_NLD.new_zeros(1, dtype=torch.float32)))
            else:
                cond_NC = self.conditioning(noise_N)
        needed_NQ = None
        if where_NL is not None and mask is None and not self.is_causal and not _compiling.get():
            needed_NQ = needed_positions(where_NL, x_NLD.device)
        if _compiling.get() and cache is None:  # a cache grows: each length would be compiled anew
            return run_compiled(self, x_NLD, cond_NC, rotary, mask), cond_NC
        return self.run_blocks(x_NLD, cond_NC, rotary, mask, cache, needed_NQ), cond_NC

    def conditioning(self, noise_N: Tensor) -> Tensor:
        return nn.functional.silu(self.time_embedding(noise_N))  # type: ignore[misc]

    def run_blocks(
        self,
        x_NLD: Tensor,
        cond_NC: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Cache | None = None,
        needed_NQ: Tensor | None = None,
    ) -> Tensor:
        *blocks, last = self.blocks
        for block in blocks:
            x_NLD = block(x_NLD, cond_NC, rotary, mask, cache)
        return last(x_NLD, cond_NC, rotary, mask, cache, needed_NQ)


def needed_positions(where_NL: Tensor, device: torch.device) -> Tensor | None:
    """(N, Q) different positions of each row with those of `where` first, or None where nearly all are needed."""
    most = int(where_NL.sum(-1).max())
    if most > 0.75 * where_NL.shape[1]:
        return None
    needed_NQ = where_NL.byte().argsort(dim=-1, descending=True, stable=True)[:, : max(most, 1)]
    return needed_NQ.to(device, non_blocking=True)


@cache
def _compiled_blocks() -> Callable[..., Tensor]:
    """Compiled once for all backbones: parameters are inputs of the graph."""
    on_gpu: dict[str, Any] = {"mode": "reduce-overhead"} if torch.cuda.is_available() else {}
    return torch.compile(Backbone.run_blocks, dynamic=False, **on_gpu)


def run_compiled(
    backbone: Backbone, x_NLD: Tensor, cond_NC: Tensor | None, rotary: tuple[Tensor, Tensor], mask: Tensor | None
) -> Tensor:
    """`run_blocks` by the compiler, for rows padded to a power of two with copies of the last one."""
    N = len(x_NLD)
    extra = (1 << (N - 1).bit_length()) - N

    def pad(x: Tensor | None) -> Tensor | None:
        return x if x is None or len(x) != N or not extra else torch.cat((x, x[-1:].expand(extra, *x.shape[1:])))

    # one code object serves denoiser and energy at every size
    with torch._dynamo.config.patch(recompile_limit=256):
        return _compiled_blocks()(backbone, *(pad(x) for x in (x_NLD, cond_NC)), tuple(map(pad, rotary)), pad(mask))[:N]


def pad_rows(x_MD: Tensor) -> Tensor:
    """Few different shapes: on a CPU the kernels of half-precision products are made, and cached, for each one."""
    M = len(x_MD)
    return nn.functional.pad(x_MD, (0, 0, 0, -M % 64)) if M > 64 else x_MD


class Head(nn.Module):
    """Last norm and projection. `positions_M` (flat indices into N * L) projects just those rows."""

    def __init__(self, config: PreTrainedConfig, out_features: int, zero: bool = True):
        super().__init__()
        self.norm = AdaLayerNorm(config, num_gates=0)
        self.linear = (ZeroLinear if zero else nn.Linear)(config.hidden_size, out_features)

    def forward(self, x_NLD: Tensor, cond_NC: Tensor | None = None, positions_M: Tensor | None = None) -> Tensor:
        x = self.select(x_NLD, cond_NC, positions_M)
        return apply_linear(self.linear, x if positions_M is None else pad_rows(x))[: len(x)]

    def select(self, x_NLD: Tensor, cond_NC: Tensor | None = None, positions_M: Tensor | None = None) -> Tensor:
        """What the projection is given, (M, D), or (N, L, D) without positions."""
        if positions_M is None:
            return self.norm(x_NLD, cond_NC)[0]
        if cond_NC is not None and len(cond_NC) > 1:
            cond_NC = cond_NC[positions_M // x_NLD.shape[1]]
        return self.norm(x_NLD.flatten(0, 1)[positions_M][:, None], cond_NC)[0][:, 0]

    @property
    def is_large(self) -> bool:
        """Whether `vocabulary.py` is to project: where the table of logits would be large, and weights can be read."""
        return is_plain(self.linear) and self.linear.out_features > 1024


def prepend_bos(
    ids_NL: Tensor, bos_token_id: int, attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """A BOS before each row, (N, L + 1), and the attention mask with it: what tells a network, whose positions are
    relative, where a text begins. Before padding on the left too: positions are counted over tokens.
    """
    ids_NL = nn.functional.pad(ids_NL, (1, 0), value=bos_token_id)
    return ids_NL, attention_mask if attention_mask is None else nn.functional.pad(attention_mask, (1, 0), value=1)


def twin(module: Module) -> Module:
    """A second tree of modules over the very same parameters: what is wrapped, hooked or switched in one is not in the
    other, and no weight is there twice.

    Raises ValueError where a `forward` was replaced (`device_map`, `torch.compile`): it would lead back to the first.
    """
    state = {k: copy.copy(v) if isinstance(v, dict) else v for k, v in vars(module).items()}
    if "forward" in state or state.get("_compiled_call_impl") is not None:
        raise ValueError(f"the forward of a {type(module).__name__} was replaced: share its weights before you do so")
    other = object.__new__(type(module))
    vars(other).update(state)
    other._modules = {name: child and twin(child) for name, child in module._modules.items()}
    return other


def log_probs(logits: Tensor, mask_token_id: int) -> Tensor:
    """Float32 log-softmax over the last axis with no mass on the mask token (a network may lack its column)."""
    return suppress(logits.float().clone(), mask_token_id).log_softmax(-1)


def suppress(logits: Tensor, token_id: int) -> Tensor:
    """Logits of a network in float32 without the token, in place where they are that already."""
    logits = logits.float()
    if token_id < logits.shape[-1]:  # a network may lack its column
        logits[..., token_id] = float("-inf")
    return logits


def rows_at_once(model: Any, length: int) -> int:
    """Rows of this length that one pass of a network takes: what keeps the device busy, if it fits into free memory."""
    sizes = model.config.get_text_config()
    bytes_of_row = 24 * length * sizes.hidden_size * model.dtype.itemsize  # of activations, at the widest place
    if model.device.type == "cuda":
        unused = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
        budget, busy = (torch.cuda.mem_get_info(model.device)[0] + unused) // 2, 2**14  # tokens
    else:  # more than the caches hold makes a CPU slower
        budget, busy = 2**26, 2**14
    return max(1, min(busy // length, budget // bytes_of_row))


def initialize(module: nn.Module, std: float) -> None:
    """Initial weights of one leaf; the functions of `transformers.initialization` leave loaded weights alone."""
    if isinstance(module, nn.Linear):
        if isinstance(module, ZeroLinear):
            init.zeros_(module.weight)
        else:
            init.normal_(module.weight, 0.0, std)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        init.normal_(module.weight, 0.0, std)
    elif isinstance(module, nn.LayerNorm):
        init.ones_(module.weight)
