"""OpenMythos by its own interface: `OpenMythos(cfg)`, its config, and its parts under their original names.

    ids --embed--> prelude --> e, h_0 = e
    h_{t+1} = A h_t + B e + (1 + lora_t) block(norm(h_t + t-signal + e)),  halting by ACT
    logits  = head(norm(coda(sum_t w_t h_t)))

All of it is `LoopedLM` of the core (`model.lm`); this file only speaks the original's language. Code written
for the package open-mythos 0.5.0 runs unchanged, and its weights give the same logits. docs/compatibility.md
lists what is different and why.
"""

from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import Any, SupportsIndex, cast

import torch
from torch import Tensor, nn

from open_mythos.classic.cache import DictCache, Entries
from open_mythos.classic.config import MythosConfig
from open_mythos.classic.parts import (
    ACTHalting,
    Expert,
    GQAttention,
    LoRAAdapter,
    LTIInjection,
    MLAttention,
    MoEFFN,
    RecurrentBlock,
    RMSNorm,
    TransformerBlock,
    apply_rope,
    loop_index_embedding,
    precompute_rope_freqs,
)
from open_mythos.hub import original
from open_mythos.loop.schedule import Plan
from open_mythos.model import LoopedLM
from open_mythos.nn.block import PreNormBlock
from open_mythos.nn.context import Context
from open_mythos.shapes import Logits, Tokens

__all__ = [
    "ACTHalting",
    "Expert",
    "GQAttention",
    "LTIInjection",
    "LoRAAdapter",
    "MLAttention",
    "MoEFFN",
    "MythosConfig",
    "OpenMythos",
    "RMSNorm",
    "RecurrentBlock",
    "TransformerBlock",
    "apply_rope",
    "loop_index_embedding",
    "precompute_rope_freqs",
]


class OpenMythos(nn.Module):
    """A recurrent-depth transformer: prelude, one block looped as often as asked, coda."""

    def __init__(self, cfg: MythosConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.lm: LoopedLM = cfg.model().build()

    @property
    def embed(self) -> nn.Embedding:
        return self.lm.embed

    @property
    def head(self) -> nn.Linear:
        """Shares its weight with `embed`."""
        return self.lm.head

    @property
    def norm(self) -> nn.Module | None:
        return self.lm.norm

    @property
    def prelude(self) -> list[TransformerBlock]:
        return [TransformerBlock(self.cfg, core=cast(PreNormBlock, block)) for block in self.lm.prelude]

    @property
    def coda(self) -> list[TransformerBlock]:
        return [TransformerBlock(self.cfg, core=cast(PreNormBlock, block)) for block in self.lm.coda]

    @property
    def recurrent(self) -> RecurrentBlock:
        return RecurrentBlock(self.cfg, self.lm.loop)

    def forward(
        self,
        input_ids: Tokens,
        n_loops: int | None = None,
        kv_cache: Entries | None = None,
        start_pos: int | None = None,
        **options: Any,
    ) -> Logits:
        """Logits for the token after each of `input_ids`.

        `n_loops` is the depth, by default `cfg.max_loop_iters`; more are allowed. `kv_cache` is a dict, empty
        at first, that remembers what it has seen: later calls give the tokens that follow, one or many, and
        `start_pos` need not be given. Further options (watch, exit, tally, ...) as for `LoopedLM.features`.

        Raises `ValueError` for empty input, ids outside the vocabulary, more tokens than `cfg.max_seq_len`,
        `n_loops` below one and a `start_pos` that is not where the cache ends.
        """
        _check_ids(input_ids)
        cache = None if kv_cache is None else DictCache(kv_cache, self._kv_rank)
        start = (start_pos or 0) if cache is None else _follow(cache.length(), start_pos)
        ctx = Context.counting(input_ids, start, cache)
        logits: Logits = self.lm(input_ids, Plan(self._loops(n_loops)), ctx=ctx, **options)
        return logits

    def generate(  # noqa: PLR0913 (all but the original's five by name)
        self,
        input_ids: Tokens | Sequence[Sequence[int]],
        max_new_tokens: int = 64,
        n_loops: SupportsIndex | Iterable[SupportsIndex] = 8,
        temperature: float = 1.0,
        top_k: int | None = 50,
        *,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        pad: int | None = None,
        **options: Any,
    ) -> Tensor | list[list[int]]:
        """Prompts with their continuations: (B, T + new) for a tensor, lists for lists of unequal lengths.

        A temperature of 0 is greedy. Without a `seed` one is drawn from torch's own generator. `n_loops` may
        be a number per prompt. Options as for `infer.generate.stream`: mask (for padded prompts), eos, stop,
        exit, policy, compile, on_token. Rows that end early are filled up with `pad`, by default the first
        `eos`.
        """
        from open_mythos.infer.generate import generate, whole
        from open_mythos.infer.sample import Sampling

        if max_new_tokens == 0:
            return input_ids if isinstance(input_ids, Tensor) else [list(prompt) for prompt in input_ids]
        sampling = Sampling(
            temperature=float(temperature),
            top_k=top_k if top_k is not None and top_k > 0 else None,  # the original takes any other for none
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=int(torch.randint(2**31, ())) if seed is None else seed,
        )
        ends = () if options.get("eos") is None else whole(options["eos"])
        options |= {"loops": n_loops, "sampling": sampling, "eos": ends}
        done = generate(self.lm, input_ids, max_new_tokens=max_new_tokens, **options)
        new = [completion.tokens for completion in done]
        if not isinstance(input_ids, Tensor):
            return [[*prompt, *tokens] for prompt, tokens in zip(input_ids, new, strict=True)]
        filler = next(iter(ends), 0) if pad is None else pad
        return torch.cat([input_ids, _rectangle(new, filler).to(input_ids)], dim=1)

    @classmethod
    def from_original(
        cls, state_dict: Mapping[str, Tensor], cfg: Any, *, released: bool = True
    ) -> "OpenMythos":
        """The model whose weights the package open-mythos 0.5.0 saved, in their dtype and on their device.

        `cfg` is a `MythosConfig`, a mapping of its fields or the package's own. With `released`, the default,
        it computes what the package did, also where that was wrong; without, the same weights run as they
        should. Raises `ValueError` for missing or unknown weights and wrong shapes.
        """
        with torch.device("meta"):
            model = cls(MythosConfig.of(cfg, released=released))
        model._assign(original.to_core(state_dict, model.lm.config))
        return model

    def to_original(self) -> dict[str, Tensor]:
        """The weights as the package's own `load_state_dict` takes them."""
        weights = original.from_core(self.lm.state_dict(), self.lm.config)
        cfg = self.cfg
        tables = original.rope_tables(
            cfg.dim // cfg.n_heads, cfg.qk_rope_head_dim, cfg.max_seq_len, cfg.rope_theta
        )
        return weights | tables

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As ever; also takes what the package open-mythos 0.5.0 saved (see `from_original`), a part of it
        unless `strict`."""
        if original.is_original(state_dict):
            weights = original.to_core(state_dict, self.lm.config, strict)
            state_dict = {f"lm.{name}": weight for name, weight in weights.items()}
        return super().load_state_dict(state_dict, strict, assign)

    def _assign(self, weights: Mapping[str, Tensor]) -> None:
        self.lm.load_state_dict(weights, assign=True)
        self.lm.head.weight = self.lm.embed.weight

    @property
    def _kv_rank(self) -> int:
        return self.cfg.kv_lora_rank if self.cfg.attn_type == "mla" else 0

    def _loops(self, n_loops: int | None) -> int:
        return self.cfg.max_loop_iters if n_loops is None else index(n_loops)


def _check_ids(ids: Tensor) -> None:
    if ids.ndim != 2 or ids.is_floating_point():
        raise ValueError(
            f"input_ids should be whole numbers of shape (B, T), got {ids.dtype} {tuple(ids.shape)}"
        )


def _follow(remembered: int, start_pos: int | None) -> int:
    """Where the new tokens begin: behind what is remembered. A 0, the original's default, says nothing."""
    if start_pos and start_pos != remembered:
        raise ValueError(
            f"start_pos={start_pos}, but the cache holds {remembered} tokens, so the next is {remembered}; "
            "leave start_pos out"
        )
    return remembered


def _rectangle(rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows])
