"""The network of the NCE energy (EDLM, arXiv 2410.21357).

Shapes: N rows, L length, D hidden size, M selected positions (flat indices into N * L).
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .backbone import Backbone, Head, ZeroLinear, apply_linear, prepend_bos


class EnergyNetwork(nn.Module):
    """The NCE energy: both token sequences embedded, joined by a projection, read by bidirectional blocks.

    `energy_pooling="mean"` is the published form: hidden states averaged over all positions, then the scalar head.
    `"sum"` gives every position its scalar and adds those that are masked in xt and given in x. With `backbone` the
    blocks are not its own.
    """

    def __init__(self, config: PreTrainedConfig, backbone: Backbone | None = None):
        super().__init__()
        self.config = config
        self.backbone = Backbone(config, num_layers=config.energy_num_layers) if backbone is None else backbone
        self.projection = nn.Linear(2 * config.hidden_size, config.hidden_size)
        self.head = Head(config, config.hidden_size, zero=False)
        self.fc1 = nn.Linear(config.hidden_size, config.hidden_size)
        # starts at zero: an untrained energy leaves the proposal as it is
        self.fc2 = ZeroLinear(config.hidden_size, 1, bias=False)

    def forward(
        self, x_NL: Tensor, xt_NL: Tensor, noise_N: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Energies (N,) float32 of x_NL (x0, or xs with masks left) as a completion of xt_NL."""
        if self.config.prepend_bos:
            x_NL, _ = prepend_bos(x_NL, self.config.bos_token_id)
            xt_NL, attention_mask = prepend_bos(xt_NL, self.config.bos_token_id, attention_mask)
        embed = self.backbone.embedding
        joined_NLD = apply_linear(self.projection, torch.cat((embed(xt_NL), embed(x_NL)), dim=-1))
        if self.config.energy_pooling == "mean":
            y_NLD = self.head(*self.backbone(inputs_embeds=joined_NLD, noise_N=noise_N, attention_mask=attention_mask))
            weight_NL = torch.ones_like(x_NL) if attention_mask is None else attention_mask
            weight_NL1 = (weight_NL / weight_NL.sum(-1, keepdim=True))[..., None].to(y_NLD.dtype)
            return self.scalar((y_NLD * weight_NL1).sum(1))[:, 0].float()
        is_revealed = (xt_NL == self.config.mask_token_id) & (x_NL != self.config.mask_token_id)
        where_NL = is_revealed.cpu()
        hidden = self.backbone(None, noise_N, attention_mask, inputs_embeds=joined_NLD, where_NL=where_NL)
        positions_M = where_NL.flatten().nonzero()[:, 0].to(x_NL.device, non_blocking=True)
        scalar_M = self.scalar(self.head(*hidden, positions_M))[:, 0].float()
        return scalar_M.new_zeros(x_NL.numel()).scatter(0, positions_M, scalar_M).view(x_NL.shape).sum(-1)

    def scalar(self, y: Tensor) -> Tensor:
        return self.fc2(nn.functional.relu(self.fc1(y)))
