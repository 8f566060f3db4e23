"""Mixture of experts: many small feed-forwards, of which each token uses a few.

    y = sum over chosen e of  g_e E_e(x)  +  shared(x)          E, shared: SwiGLU
    s = W_r x;    chosen = top k of s + b;    g = softmax of s over the chosen

DeepSeekMoE, Dai et al. 2024 (arXiv 2401.06066): fine-grained experts and shared ones that are always on.
Balance without a loss, Wang et al. 2024 (arXiv 2408.15664): the bias b only moves the choice, and after
every optimizer step `rebalance` raises it for experts with less than their share, by `speed`. An optional
sequence-level loss (DeepSeek-V3, arXiv 2412.19437, eqs. 17-20) is reported to the tally as "balance".

All experts are one stacked tensor; tokens are sorted by expert and go through `experts.py` in one call, or,
where processes share them out, travel to their owners (`spread.py`).
`naive` computes every expert on every token and is the oracle.
"""

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from open_mythos.config import Config
from open_mythos.nn.context import Context
from open_mythos.nn.experts import Rows, run_experts, swiglu
from open_mythos.nn.linear import Projection
from open_mythos.nn.precision import lowered, outside_autocast, working_dtype
from open_mythos.nn.spread import Spread
from open_mythos.shapes import Hidden


class MoE(Config):
    experts: int
    chosen: int
    width: int
    shared: int = 1
    shared_width: int | None = None  # of each shared expert; by default chosen * width, as in OpenMythos
    speed: float = 1e-3
    balance: float = 0.0

    def __post_init__(self) -> None:
        if self.experts < 1 or self.width < 1 or self.shared < 0:
            raise ValueError(f"MoE needs experts and width of at least 1, got {self.experts}, {self.width}")
        if not 1 <= self.chosen <= self.experts:
            raise ValueError(f"each token can choose 1 to {self.experts} experts, got chosen={self.chosen}")
        if self.shared_width is not None and self.shared_width < 1:
            raise ValueError(
                f"MoE.shared_width must be at least 1, got {self.shared_width}; shared=0 for none"
            )

    def build(self, dim: int) -> "MixtureOfExperts":
        return MixtureOfExperts(self, dim)


@final
class MixtureOfExperts(nn.Module):
    bias: Tensor

    def __init__(self, config: MoE, dim: int) -> None:
        super().__init__()
        self.config = config
        self.spread: Spread | None = None  # set where the experts lie on several processes
        shared = config.shared * (config.shared_width or config.chosen * config.width)
        self.router = nn.Parameter(torch.empty(config.experts, dim))
        self.gate_up = nn.Parameter(torch.empty(config.experts, 2 * config.width, dim))  # gate first
        self.down = nn.Parameter(torch.empty(config.experts, dim, config.width))
        # Several shared SwiGLUs side by side are one wider SwiGLU.
        self.shared_gate_up = Projection(dim, 2 * shared) if shared else None
        self.shared_down = Projection(shared, dim) if shared else None
        self.register_buffer("bias", torch.empty(config.experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.router, self.gate_up, self.down):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        nn.init.zeros_(self.bias)

    def matrices(self) -> dict[str, int]:
        """Which parameters hold several matrices on top of each other, and how many."""
        shared = {"shared_gate_up.weight": 2} if self.shared_gate_up is not None else {}
        return {"gate_up": 2, "down": 1} | shared

    def forward(self, x: Hidden, ctx: Context) -> Hidden:
        flat = x.flatten(0, -2)
        chosen, weights, scores = self.route(flat)
        if ctx.tally is not None:
            self._report(chosen, scores, x.shape[:-1], ctx)
        dtype, seen = working_dtype(x), lowered(x)
        y = self._routed(ctx, seen.flatten(0, -2).to(dtype), chosen, weights.to(dtype))
        return y.to(x.dtype).view_as(x) + self.always(seen)

    def _routed(
        self, ctx: Context, x: Rows, chosen: Int[Tensor, "M k"], weights: Float[Tensor, "M k"]
    ) -> Rows:
        if self.spread is None:
            gate_up, down = (ctx.cast(stack, x.dtype) for stack in (self.gate_up, self.down))
            return run_experts(x, gate_up, down, chosen, weights)
        fetch = self.spread.fetch
        gate_up, down = (ctx.fetched(stack, x.dtype, fetch) for stack in (self.gate_up, self.down))
        return self.spread.run(x, gate_up, down, chosen, weights)

    def route(
        self, x: Float[Tensor, "M D"]
    ) -> tuple[Int[Tensor, "M k"], Float[Tensor, "M k"], Float[Tensor, "M E"]]:
        """The chosen experts of each token, their weights (sum one), and all scores, in float32."""
        with outside_autocast(x):
            scores = x.float() @ self.router.float().mT
        chosen = (scores.detach() + self.bias.float()).topk(self.config.chosen, dim=-1).indices
        return chosen, scores.gather(-1, chosen).softmax(-1), scores

    def always(self, x: Hidden) -> Hidden:
        """What the shared experts say."""
        if self.shared_gate_up is None or self.shared_down is None:
            return torch.zeros_like(x)
        return self.shared_down(swiglu(self.shared_gate_up(x)))

    def naive(self, x: Hidden) -> Hidden:
        """Every expert on every token, weighted. The oracle of `forward`."""
        chosen, weights, _ = self.route(x.flatten(0, -2))
        dense = weights.new_zeros(len(chosen), self.config.experts).scatter(1, chosen, weights)
        gate, up = torch.einsum("md,efd->mef", x.flatten(0, -2), self.gate_up).chunk(2, dim=-1)
        y = torch.einsum("mef,edf,me->md", F.silu(gate) * up, self.down, dense.to(x.dtype))
        return y.view_as(x) + self.always(x)

    @torch.no_grad()
    def rebalance(self, load: Int[Tensor, "E"]) -> None:
        """Raise the bias of experts that got less than their share of the tokens, lower the others'."""
        load = load.to(self.bias.device, torch.float32)
        self.bias += (self.config.speed * torch.sign(load.mean() - load)).to(self.bias.dtype)

    def _report(
        self, chosen: Int[Tensor, "M k"], scores: Float[Tensor, "M E"], shape: torch.Size, ctx: Context
    ) -> None:
        assert ctx.tally is not None
        flat = chosen.flatten()
        load = flat.new_zeros(self.config.experts).scatter_add_(0, flat, torch.ones_like(flat))
        ctx.tally.load((ctx.place.stage, ctx.place.layer), load)
        if self.config.balance:
            ctx.tally.cost("balance", self.config.balance * sequence_balance(chosen, scores, shape))


def sequence_balance(
    chosen: Int[Tensor, "M k"], scores: Float[Tensor, "M E"], shape: torch.Size
) -> Float[Tensor, ""]:
    """E / k * sum_e f_e P_e, mean over sequences; one when the load is even (arXiv 2412.19437, eq. 17)."""
    experts, k = scores.shape[-1], chosen.shape[-1]
    share = F.one_hot(chosen, experts).sum(1).view(*shape, experts).float().mean(-2)  # B E
    probability = scores.softmax(-1).view(*shape, experts).mean(-2)  # B E
    return (experts / k * share * probability).sum(-1).mean()
