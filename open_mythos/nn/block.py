"""One transformer block: mix across tokens, then transform each token.

    PreNorm     x + s f(norm(x))                       Xiong et al. 2020 (arXiv 2002.04745)
                s: LayerScale, one factor per channel  Touvron et al. 2021 (arXiv 2103.17239)
    PostNorm    norm(x + f(x))                         Vaswani et al. 2017; Universal Transformer
    Sandwich    norm2(x + f(norm1(x)))                 Huginn, Geiping et al. 2025 (arXiv 2502.05171)
    BothNorm    x + norm2(f(norm1(x)))                 Ouro, Zhu et al. 2025 (arXiv 2510.25741)
    BranchNorm  x + norm(f(x))                         OLMo 2, Walsh et al. 2025 (arXiv 2501.00656)
    Parallel    x + mixer(norm(x)) + ffn(norm(x))      Wang & Komatsuzaki 2021 (GPT-J)

f is first the mixer, then the feed-forward.
"""

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from open_mythos.config import Config
from open_mythos.nn.attention import Mixer
from open_mythos.nn.context import Context
from open_mythos.nn.ffn import FFN, check_dropout
from open_mythos.nn.norm import Norm, RMSNorm
from open_mythos.shapes import Hidden


class PreNorm(Config):
    mixer: Mixer
    ffn: FFN
    norm: Norm = RMSNorm()
    scale: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_dropout(self)

    def build(self, dim: int) -> "PreNormBlock":
        return PreNormBlock(self, dim)


class PostNorm(Config):
    mixer: Mixer
    ffn: FFN
    norm: Norm = RMSNorm()
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_dropout(self)

    def build(self, dim: int) -> "PostNormBlock":
        return PostNormBlock(self, dim)


class Sandwich(Config):
    mixer: Mixer
    ffn: FFN
    norm: Norm = RMSNorm()

    def build(self, dim: int) -> "SandwichBlock":
        return SandwichBlock(self, dim)


class BothNorm(Config):
    mixer: Mixer
    ffn: FFN
    norm: Norm = RMSNorm()

    def build(self, dim: int) -> "BothNormBlock":
        return BothNormBlock(self, dim)


class BranchNorm(Config):
    mixer: Mixer
    ffn: FFN
    norm: Norm = RMSNorm()

    def build(self, dim: int) -> "BranchNormBlock":
        return BranchNormBlock(self, dim)


class Parallel(Config):
    mixer: Mixer
    ffn: FFN
    norm: Norm = RMSNorm()

    def build(self, dim: int) -> "ParallelBlock":
        return ParallelBlock(self, dim)


@final
class PreNormBlock(nn.Module):
    def __init__(self, config: PreNorm, dim: int) -> None:
        super().__init__()
        self.config = config
        self.mixer_norm, self.mixer = config.norm.build(dim), config.mixer.build(dim)
        self.ffn_norm, self.ffn = config.norm.build(dim), config.ffn.build(dim)
        self.mixer_scale = nn.Parameter(torch.empty(dim)) if config.scale is not None else None
        self.ffn_scale = nn.Parameter(torch.empty(dim)) if config.scale is not None else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for scale in (self.mixer_scale, self.ffn_scale):
            if scale is not None and self.config.scale is not None:
                nn.init.constant_(scale, self.config.scale)

    def forward(self, x: Hidden, ctx: Context) -> Hidden:
        x = x + self._branch(self.mixer(self.mixer_norm(x), ctx), self.mixer_scale)
        return x + self._branch(self.ffn(self.ffn_norm(x), ctx), self.ffn_scale)

    def _branch(self, y: Hidden, scale: Tensor | None) -> Hidden:
        y = F.dropout(y, self.config.dropout) if self.training else y
        return y if scale is None else y * scale.to(y.dtype)


@final
class PostNormBlock(nn.Module):
    def __init__(self, config: PostNorm, dim: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.mixer, self.mixer_norm = config.mixer.build(dim), config.norm.build(dim)
        self.ffn, self.ffn_norm = config.ffn.build(dim), config.norm.build(dim)

    def forward(self, x: Hidden, ctx: Context) -> Hidden:
        x = self.mixer_norm(x + F.dropout(self.mixer(x, ctx), self.dropout, self.training))
        return self.ffn_norm(x + F.dropout(self.ffn(x, ctx), self.dropout, self.training))


@final
class SandwichBlock(nn.Module):
    def __init__(self, config: Sandwich, dim: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(config.norm.build(dim) for _ in range(4))
        self.mixer, self.ffn = config.mixer.build(dim), config.ffn.build(dim)

    def forward(self, x: Hidden, ctx: Context) -> Hidden:
        before, middle, mix, after = self.norms
        x = middle(x + self.mixer(before(x), ctx))
        return after(x + self.ffn(mix(x), ctx))


@final
class BothNormBlock(nn.Module):
    def __init__(self, config: BothNorm, dim: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(config.norm.build(dim) for _ in range(4))
        self.mixer, self.ffn = config.mixer.build(dim), config.ffn.build(dim)

    def forward(self, x: Hidden, ctx: Context) -> Hidden:
        before_mixer, after_mixer, before_ffn, after_ffn = self.norms
        x = x + after_mixer(self.mixer(before_mixer(x), ctx))
        return x + after_ffn(self.ffn(before_ffn(x), ctx))


@final
class BranchNormBlock(nn.Module):
    def __init__(self, config: BranchNorm, dim: int) -> None:
        super().__init__()
        self.mixer, self.mixer_norm = config.mixer.build(dim), config.norm.build(dim)
        self.ffn, self.ffn_norm = config.ffn.build(dim), config.norm.build(dim)

    def forward(self, x: Hidden, ctx: Context) -> Hidden:
        x = x + self.mixer_norm(self.mixer(x, ctx))
        return x + self.ffn_norm(self.ffn(x, ctx))


@final
class ParallelBlock(nn.Module):
    def __init__(self, config: Parallel, dim: int) -> None:
        super().__init__()
        self.norm = config.norm.build(dim)
        self.mixer, self.ffn = config.mixer.build(dim), config.ffn.build(dim)

    def forward(self, x: Hidden, ctx: Context) -> Hidden:
        seen = self.norm(x)
        return x + self.mixer(seen, ctx) + self.ffn(seen, ctx)


Block = PreNorm | PostNorm | Sandwich | BothNorm | BranchNorm | Parallel
