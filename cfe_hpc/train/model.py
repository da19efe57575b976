"""A decoder-only transformer over tokens, with rotary (`rope`) or interleaved (`irope`) positions.

Shapes are told by suffixes: B sequences, T positions, D model width, H heads, K width of a head, F inner width of
the feed-forward block, V vocabulary. There are no complex numbers and no float64: Gaudi has neither.

`irope` is the arrangement of Llama 4: most layers rotate queries and keys (RoPE, Su et al., arXiv 2104.09864), and
layer l, counted from 0, has no positional encoding iff (l + 1) % G == 0 (NoPE, Kazemnejad et al., arXiv 2305.19466;
`no_rope_layer_interval`, 4, in Meta's and Hugging Face's Llama4TextConfig). On those layers softmax flattens as the
context grows, so the query at position p is scaled by 1 + a ln(1 + floor((p + 1) / f)), with a = 0.1 (`attn_scale`)
and f = 8192 (`floor_scale`): `attn_temperature_tuning` there, after Nakanishi, "Scalable-Softmax Is Superior for
Attention" (arXiv 2501.19399).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfe_hpc.train.config import Params

__all__ = ["Transformer", "has_positions", "query_scale_T", "rotary_tables_TK", "rotate_BHTK"]

NORM_EPS = 1e-5
INIT_STD = 0.02


def has_positions(layer: int, params: Params) -> bool:
    """Whether layer `layer`, counted from 0, rotates its queries and keys."""
    return params.rope_variant == "rope" or (layer + 1) % params.irope_groups != 0


def rotary_tables_TK(seq_len: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """(cosines, sines), float32, each (seq_len, head_dim / 2): angle p * theta^(-2k / head_dim)."""
    pair = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    position = torch.arange(seq_len, dtype=torch.float32, device=device)
    angle_TK = torch.outer(position, theta ** (-pair / head_dim))
    return angle_TK.cos(), angle_TK.sin()


def rotate_BHTK(x_BHTK: Tensor, tables_TK: tuple[Tensor, Tensor]) -> Tensor:
    """`x_BHTK` with the pair (k, k + K/2) at each position rotated by that position's angle; in x's own type."""
    cos_TK, sin_TK = (table.to(x_BHTK.dtype) for table in tables_TK)
    first, second = x_BHTK.chunk(2, dim=-1)
    return torch.cat((first * cos_TK - second * sin_TK, second * cos_TK + first * sin_TK), dim=-1)


def query_scale_T(seq_len: int, device: torch.device, *, scale: float = 0.1, floor: float = 8192.0) -> Tensor:
    """float32 (seq_len,): 1 + scale * ln(1 + floor((p + 1) / floor)), which is exactly 1 below `floor` tokens."""
    position = torch.arange(1, seq_len + 1, dtype=torch.float32, device=device)
    return 1.0 + scale * torch.log1p(torch.floor(position / floor))


class RMSNorm(nn.Module):
    """Root-mean-square norm with a gain, computed in float32 whatever the type of its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + NORM_EPS)
        return normed.to(x.dtype) * self.weight.to(x.dtype)


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, params: Params, layer: int) -> None:
        super().__init__()
        self.heads = params.heads
        self.rotates = has_positions(layer, params)
        self.wqkv = nn.Linear(params.d_model, 3 * params.d_model, bias=False)
        self.wo = nn.Linear(params.d_model, params.d_model, bias=False)

    def forward(self, x_BTD: Tensor, tables_TK: tuple[Tensor, Tensor], scale_T: Tensor) -> Tensor:
        batch, length, width = x_BTD.shape
        qkv = self.wqkv(x_BTD).view(batch, length, 3, self.heads, width // self.heads)
        q_BHTK, k_BHTK, v_BHTK = (part.squeeze(2).transpose(1, 2) for part in qkv.split(1, dim=2))
        if self.rotates:
            q_BHTK, k_BHTK = rotate_BHTK(q_BHTK, tables_TK), rotate_BHTK(k_BHTK, tables_TK)
        else:
            q_BHTK = q_BHTK * scale_T[:, None].to(q_BHTK.dtype)
        mixed_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        out: Tensor = self.wo(mixed_BHTK.transpose(1, 2).reshape(batch, length, width))
        return out


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202)."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.w_in = nn.Linear(params.d_model, 2 * params.ff_dim, bias=False)
        self.w_out = nn.Linear(params.ff_dim, params.d_model, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF, up_BTF = self.w_in(x_BTD).chunk(2, dim=-1)
        out: Tensor = self.w_out(F.silu(gate_BTF) * up_BTF)
        return out


class Block(nn.Module):
    """Attention and feed-forward, each normed before and added after."""

    def __init__(self, params: Params, layer: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(params.d_model)
        self.attn = Attention(params, layer)
        self.ff_norm = RMSNorm(params.d_model)
        self.ff = FeedForward(params)

    def forward(self, x_BTD: Tensor, tables_TK: tuple[Tensor, Tensor], scale_T: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attn(self.attn_norm(x_BTD), tables_TK, scale_T)
        out: Tensor = x_BTD + self.ff(self.ff_norm(x_BTD))
        return out


class Transformer(nn.Module):
    """Token ids to the loss of the next token, or to its logits.

    Weights are drawn from torch's global generator: seed it with the same number on every rank.
    """

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.params = params
        self.embed = nn.Embedding(params.vocab_size, params.d_model)
        self.blocks = nn.ModuleList(Block(params, layer) for layer in range(params.layers))
        self.norm = RMSNorm(params.d_model)
        self.head = nn.Linear(params.d_model, params.vocab_size, bias=False)
        # Not buffers: casting the module to bf16 would cast them too, and angles need float32.
        self._positions: tuple[tuple[Tensor, Tensor], Tensor] | None = None
        self._initialize()

    def _initialize(self) -> None:
        for name, weight in self.named_parameters():
            if weight.dim() >= 2:
                residual = name.endswith(("wo.weight", "w_out.weight"))
                nn.init.normal_(weight, std=INIT_STD / (math.sqrt(2 * self.params.layers) if residual else 1.0))

    def _position_tables(self, length: int, device: torch.device) -> tuple[tuple[Tensor, Tensor], Tensor]:
        if self._positions is None or len(self._positions[1]) != length or self._positions[1].device != device:
            tables_TK = rotary_tables_TK(length, self.params.head_dim, self.params.rope_theta, device)
            self._positions = tables_TK, query_scale_T(length, device)
        return self._positions

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) in the model's type; given targets, each sequence's mean cross entropy in nats,
        (B,), float32."""
        tables_TK, scale_T = self._position_tables(tokens_BT.shape[1], tokens_BT.device)
        x_BTD = self.embed(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, tables_TK, scale_T)
        logits_BTV: Tensor = self.head(self.norm(x_BTD))
        if targets_BT is None:
            return logits_BTV
        loss_BT = F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction="none")
        return loss_BT.view(targets_BT.shape).mean(dim=1)
