"""The same model twice, with the same weights: the original's and ours, and what can be run on both.

Their halting is pinned (its bias at -6) so that both run all loops: untrained, the original stops after three
of eight. Ours is built by `OpenMythos.from_original`, with the original's own halting rule.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from open_mythos.data.batch import Batch
from open_mythos.infer.alone import AloneVerbs, apart
from open_mythos.infer.compiled import CompiledVerbs
from open_mythos.loop.schedule import Plan
from open_mythos.main import OpenMythos
from open_mythos.model import LoopedLM
from open_mythos.nn.attention import GroupedAttention, LatentAttention
from open_mythos.nn.cache import KVCache, Place, Span
from open_mythos.nn.context import Context
from open_mythos.train.optim import AdamW
from open_mythos.train.recipe import Recipe
from open_mythos.train.step import TrainState, train_step

Mixer = Literal["gqa", "mla"]
# In bfloat16 both run under autocast. Lowered, our weights are in bfloat16 too, in which the original raises.
Precision = Literal["float32", "bfloat16", "lowered"]
Run = Callable[[], Any]
RUNS_ALL = -6.0  # bias of the halting unit: 0.25 % of the mass per loop


@dataclass(frozen=True)
class Size:
    """dim 256 with 16 experts of which a token uses 2, or dim 512 with 64 of which it uses 4."""

    dim: int
    experts: int
    chosen: int
    rows: int  # sequences of 256 tokens in a forward pass or a train step
    loops: int = 8

    def settings(self, mixer: Mixer) -> dict[str, Any]:
        head = self.dim // 8
        latent = {"kv_lora_rank": 2 * head, "q_lora_rank": 4 * head, "qk_rope_head_dim": head // 2}
        return {
            "vocab_size": 8192,
            "dim": self.dim,
            "n_heads": 8,
            "n_kv_heads": 2,
            "max_seq_len": 8448,
            "max_loop_iters": self.loops,
            "attn_type": mixer,
            **latent,
            "qk_nope_head_dim": head,
            "v_head_dim": head,
            "n_experts": self.experts,
            "n_experts_per_tok": self.chosen,
            "expert_dim": 128,
        }


# The attention of the two smallest configs of the original's own: MythosConfig() and mythos_1b().
LATENT_LAYERS = {
    "default": {"dim": 2048, "n_heads": 16},
    "mythos_1b": {
        "dim": 2048,
        "n_heads": 16,
        "kv_lora_rank": 256,
        "q_lora_rank": 512,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
    },
}
ONE_LAYER = {
    "vocab_size": 64,
    "max_seq_len": 8448,
    "max_loop_iters": 1,
    "prelude_layers": 1,
    "coda_layers": 0,
}
ONE_LAYER |= {"n_experts": 1, "n_experts_per_tok": 1, "n_shared_experts": 0, "expert_dim": 16}
SIZES = {256: Size(256, 16, 2, rows=4), 512: Size(512, 64, 4, rows=2)}


@dataclass
class Sides:
    """The two models, and on what they run."""

    theirs: Any
    ours: OpenMythos
    device: torch.device
    precision: Precision = "float32"
    verbs: LoopedLM | AloneVerbs | CompiledVerbs | None = None  # none for those that `generate` takes

    @classmethod
    def build(cls, original: ModuleType, settings: dict[str, Any], device: torch.device) -> "Sides":
        torch.manual_seed(0)
        theirs = original.OpenMythos(original.MythosConfig(**settings)).to(device)
        torch.nn.init.constant_(theirs.recurrent.act.halt.bias, RUNS_ALL)
        ours = OpenMythos.from_original(theirs.state_dict(), settings)
        return cls(theirs, ours, device)

    def at(self, precision: Precision) -> "Sides":
        """The same two in that precision."""
        ours = self.ours
        if precision == "lowered":
            ours = copy.deepcopy(ours).to(torch.bfloat16)
        return replace(self, ours=ours, precision=precision)

    @property
    def lm(self) -> LoopedLM:
        return self.ours.lm

    def tokens(self, rows: int, length: int) -> Tensor:
        rng = torch.Generator().manual_seed(rows * length)
        return torch.randint(0, self.ours.cfg.vocab_size, (rows, length), generator=rng).to(self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision != "float32")

    def forward(self, rows: int, length: int) -> tuple[Run, Run]:
        """All logits of `rows` sequences."""
        tokens = self.tokens(rows, length)
        return self._theirs(lambda: self.theirs(tokens)), self._ours(lambda: self.ours(tokens))

    def train(self, rows: int, length: int) -> tuple[Run, Run]:
        """Loss, gradients, clipping, AdamW: torch's default as the original's script has it; our own step."""
        tokens, targets = self.tokens(rows, length), self.tokens(rows, length + 1)[:, 1:].contiguous()
        return self._their_step(tokens, targets), self._our_step(tokens, targets)

    def decode(self, rows: int, context: int) -> tuple[Run, Run]:
        """One token per row, `context` tokens after the start: each side as its own `generate` runs it, the
        original's under `no_grad`, ours under `inference_mode`."""
        tokens = self.tokens(rows, 1)
        seen, cache = self._caches(rows, context)
        theirs, ours, plan = self.theirs, self.lm, Plan(self.ours.cfg.max_loop_iters)
        verbs = self.verbs or apart(ours)

        def theirs_next() -> Tensor:
            # It puts grown copies into the dict and leaves the tensors alone: a copy of the dict suffices.
            return theirs(tokens, None, dict(seen), context)

        def ours_next() -> Tensor:
            with torch.inference_mode():
                ctx = Context.counting(tokens, context, cache)
                state = ours.loop(verbs.encode(tokens, ctx), ctx, plan, take=verbs.step)
                return ours.head(verbs.decode(state, ctx))

        return self._theirs(theirs_next), self._ours(ours_next)

    def attention(self, rows: int, context: int) -> tuple[Run, Run]:
        """The first layer's attention on one token per row, each side in the mode that it decodes in."""
        seen, cache = self._caches(rows, context, layers=1)
        theirs, ours = self.theirs.prelude[0].attn, self.lm.prelude[0].mixer
        x = torch.randn(rows, 1, self.ours.cfg.dim, device=self.device)
        turns = self.theirs.freqs_cis_mla if self.ours.cfg.attn_type == "mla" else self.theirs.freqs_cis
        turns, tokens = (
            turns[context : context + 1],
            torch.zeros(rows, 1, dtype=torch.long, device=self.device),
        )

        # Both get the turns of this position ready made: the original a row of its table, ours the context's.
        ctx = Context.counting(tokens, context, cache).at("prelude", 0)

        def mix() -> Tensor:
            with torch.inference_mode():
                return ours(x, ctx)

        return self._theirs(lambda: theirs(x, turns, None, dict(seen), "prelude_0")), self._ours(mix)

    def cache_bytes(self) -> tuple[float, float]:
        """Bytes per token that each side remembers, over all layers and loops."""
        seen, cache = self._caches(1, 64)
        theirs = sum(part.nbytes for entry in seen.values() for part in entry.values())
        return theirs / 64, cache.nbytes / (cache.capacity + 1)

    def _theirs(self, run: Run) -> Run:
        return _quiet(self.theirs, run, self.autocast)

    def _ours(self, run: Run) -> Run:
        return _quiet(self.lm, run, nullcontext if self.precision == "lowered" else self.autocast)

    def _their_step(self, tokens: Tensor, targets: Tensor) -> Run:
        model = self.theirs
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)

        def step() -> float:
            with self.autocast():
                logits = model(tokens)
                loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return step

    def _our_step(self, tokens: Tensor, targets: Tensor) -> Run:
        rows, length = tokens.shape
        recipe = Recipe(
            model=self.lm.config,
            length=length,
            batch=rows,
            steps=1000,
            optimiser=AdamW(lr=3e-4),
            precision=self.precision,
        )
        state = TrainState(
            self.lm.train(),
            recipe.optimiser.build(self.lm),
            None,  # type: ignore[arg-type] (the batch is handed in)
            torch.Generator().manual_seed(0),
            torch.amp.GradScaler(self.device.type, enabled=False),
        )
        return lambda: train_step(state, recipe, [Batch(tokens, targets)])["loss"]

    def _caches(self, rows: int, context: int, layers: int | None = None) -> tuple[dict[str, Any], KVCache]:
        """Both sides remember the same `context` random tokens."""
        cfg, rng = self.ours.cfg, torch.Generator(self.device).manual_seed(0)
        seen: dict[str, Any] = {}
        cache = KVCache(rows, context + 1)
        positions = torch.arange(context, device=self.device).expand(rows, -1)
        span = Span(positions, 0, context)
        places = [(f"prelude_{i}", Place("prelude", i)) for i in range(cfg.prelude_layers)]
        places += [(f"recurrent_loop_{t}", Place("loop", 0, t)) for t in range(cfg.max_loop_iters)]
        places += [(f"coda_{i}", Place("coda", i)) for i in range(cfg.coda_layers)]
        for key, place in places[:layers]:
            seen[key], entries = self._entries(place, rows, context, rng)
            for part, entry in enumerate(entries):
                cache.extend(place._replace(part=part), entry, span)
        return seen, cache

    @torch.no_grad()
    def _entries(
        self, place: Place, rows: int, context: int, rng: torch.Generator
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """What the layer at `place` remembers, as the original keeps it and as we do."""
        block = getattr(self.lm, place.stage)
        mixer = (block.layers if place.stage == "loop" else block)[place.layer].mixer
        dtype = arithmetic(self.precision)

        def draw(*shape: int) -> Tensor:
            return torch.randn(rows, context, *shape, generator=rng, device=self.device).to(dtype)

        if isinstance(mixer, LatentAttention):
            c = mixer.config
            latent, k_rope = draw(c.kv_rank), draw(c.rope_dim)
            every = k_rope[:, :, None].expand(-1, -1, c.heads, -1).contiguous()
            return {"c_kv": latent, "k_rope": every}, [torch.cat([mixer.kv_norm(latent), k_rope], dim=-1)]
        assert isinstance(mixer, GroupedAttention)
        k, v = draw(mixer.kv_heads, mixer.width), draw(mixer.kv_heads, mixer.width)
        return {"k": k, "v": v}, [k.transpose(1, 2), v.transpose(1, 2)]


def arithmetic(precision: Precision) -> torch.dtype:
    """In which products are."""
    return torch.float32 if precision == "float32" else torch.bfloat16


def _quiet(model: torch.nn.Module, run: Run, context: Callable[[], AbstractContextManager[Any]]) -> Run:
    """Without gradient or dropout."""
    model.eval()

    def quietly() -> Tensor:
        with torch.no_grad(), context():
            return run()

    return quietly
