"""The Transformer over neighbourhoods that teacher and student share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Attention(nn.Module):
    """Multi-head attention; the queries may be fewer than the tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, queries: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        key, value = self.key_value(tokens).chunk(2, dim=-1)
        x = F.scaled_dot_product_attention(split(self.query(queries)), split(key), split(value), attn_mask=mask)
        return self.out(x.transpose(1, 2).flatten(2))


class _Block(nn.Module):
    """Pre-norm Transformer block; ``only_center`` updates and returns the first token alone."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, dropout: float, *, only_center: bool) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.only_center = only_center
        self.norm_1 = nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.norm_2 = nn.LayerNorm(width)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        normed = self.norm_1(tokens)
        if self.only_center:
            tokens = tokens[:, :1]
        x = tokens + self.dropout(self.attention(normed[:, : tokens.shape[1]], normed, mask))
        return x + self.dropout(self.mlp(self.norm_2(x)))


class RelativePosition(nn.Module):
    """Embedding of the position of a token relative to the cell, in units of the radius.

    Sines and cosines of both axes at a few frequencies, and the distance, through one linear layer.
    """

    def __init__(self, width: int, n_frequencies: int = 3) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.pi * 2.0 ** torch.arange(-1, n_frequencies - 1), persistent=False)
        self.linear = nn.Linear(4 * n_frequencies + 1, width)

    def forward(self, offsets: Tensor) -> Tensor:
        angles = (offsets.unsqueeze(-1) * self.frequencies).flatten(-2)
        distance = offsets.square().sum(-1, keepdim=True).clamp_min(1e-12).sqrt()
        return self.linear(torch.cat([angles.sin(), angles.cos(), distance], dim=-1))


class NeighborhoodTransformer(nn.Module):
    """Set Transformer over the cells of a neighbourhood, read out at the cell itself.

    The result does not depend on the order of the neighbours. The last block computes the cell's token alone, which
    saves most of its cost and changes nothing in what is read out.

    Parameters
    ----------
    width
        Width of the tokens and of the Transformer.
    depth
        Number of blocks, at least 1.
    heads
        Attention heads; must divide the width.
    mlp_ratio
        Hidden width of the feed-forward layers as a multiple of the width.
    dropout
        Share of what a block adds that is dropped in training.
    """

    def __init__(self, width: int, depth: int, heads: int, mlp_ratio: float = 2.0, dropout: float = 0.0) -> None:
        super().__init__()
        if depth < 1 or width % heads:
            msg = f"depth must be at least 1 and heads must divide width, got depth={depth}, width={width}, heads={heads}."
            raise ValueError(msg)
        self.position = RelativePosition(width)
        self.is_cell = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(
            _Block(width, heads, mlp_ratio, dropout, only_center=layer == depth - 1) for layer in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, offsets: Tensor, mask: Tensor) -> Tensor:
        """Embed neighbourhoods.

        Parameters
        ----------
        tokens
            (B, T, width) embedded features; token 0 is the cell.
        offsets
            (B, T, 2) positions relative to the cell in units of the radius.
        mask
            (B, T) bool, true where there is a token.

        Returns
        -------
        (B, width).
        """
        x = tokens + self.position(offsets)
        x = torch.cat([x[:, :1] + self.is_cell, x[:, 1:]], dim=1)
        attend = mask[:, None, None, :]
        for block in self.blocks:
            x = block(x, attend)
        return self.norm(x[:, 0])


def masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that are there, (B, d)."""
    weights = mask.to(tokens.dtype)
    return torch.einsum("bt,btd->bd", weights, tokens) / weights.sum(1, keepdim=True)
