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
    Table,
    TransformerBlock,
    apply_rope,
    loop_index_embedding,
    precompute_rope_freqs,
)
from open_mythos.classic.shell import Shell
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


class OpenMythos(Shell):
    """A recurrent-depth transformer: prelude, one block looped as often as asked, coda.

    `cfg` is a `MythosConfig`, or a mapping or an object with its fields.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.cfg = cfg if isinstance(cfg, MythosConfig) else MythosConfig.of(cfg)
        self.lm: LoopedLM = self.cfg.model().build()
        self.register_load_state_dict_pre_hook(_loading)

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
    def prelude(self) -> nn.ModuleList:
        return self._shells(self.lm.prelude)

    @property
    def coda(self) -> nn.ModuleList:
        return self._shells(self.lm.coda)

    @property
    def recurrent(self) -> RecurrentBlock:
        return RecurrentBlock(self.cfg, self.lm.loop)

    @property
    def freqs_cis(self) -> Table:
        """The rotary table that GQA's layers take, for `max_seq_len` positions; made when asked for."""
        return self._table(self.cfg.dim // self.cfg.n_heads)

    @property
    def freqs_cis_mla(self) -> Table:
        """The same for MLA's."""
        return self._table(self.cfg.qk_rope_head_dim)

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
        self.lm.check(input_ids)
        if kv_cache is not None and not isinstance(kv_cache, dict):
            raise TypeError(f"kv_cache should be a dict, empty at first, got {type(kv_cache).__name__}")
        cache = None if kv_cache is None else DictCache(kv_cache, self._kv_rank)
        start = _first(start_pos) if cache is None else _follow(cache.length(), start_pos)
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

        `state_dict` may be the checkpoint of a training script, with its weights under "model". `cfg` is a
        `MythosConfig`, a mapping of its fields or the package's own. With `released`, the default,
        it computes what the package did, also where that was wrong; without, the same weights run as they
        should. Raises `ValueError` for missing or unknown weights and wrong shapes.
        """
        with torch.device("meta"):
            model = cls(MythosConfig.of(cfg, released=released))
        weights = original.to_core(original.plain_weights(state_dict), model.lm.config)
        model.lm.load_state_dict(weights, assign=True)
        return model

    def to_original(self) -> dict[str, Tensor]:
        """The weights as the package's own `load_state_dict` takes them."""
        weights = original.from_core(self.lm.state_dict(), self.lm.config)
        cfg = self.cfg
        tables = original.rope_tables(
            cfg.dim // cfg.n_heads, cfg.qk_rope_head_dim, cfg.max_seq_len, cfg.rope_theta
        )
        return weights | tables

    def _shells(self, blocks: nn.ModuleList) -> nn.ModuleList:
        made = nn.ModuleList(TransformerBlock(self.cfg, core=cast(PreNormBlock, block)) for block in blocks)
        made.training = self.training
        return made

    def _table(self, width: int) -> Table:
        table = precompute_rope_freqs(width, self.cfg.max_seq_len, self.cfg.rope_theta)
        return table.to(self.embed.weight.device)

    @property
    def _kv_rank(self) -> int:
        return self.cfg.kv_lora_rank if self.cfg.attn_type == "mla" else 0

    def _loops(self, n_loops: int | None) -> int:
        if n_loops is not None and not hasattr(n_loops, "__index__"):
            raise ValueError(f"n_loops should be a whole number, got {n_loops!r}")
        return self.cfg.max_loop_iters if n_loops is None else index(n_loops)


def _loading(model: OpenMythos, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """What the package open-mythos 0.5.0 saved is understood too, or a part of it."""
    _, _, missing, _, complaints = rest
    held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    complaints += original.adopt(state, prefix, original.joints_of(model.lm.config, "lm."), held, missing)


def _first(start_pos: int | None) -> int:
    """Where tokens begin without a cache."""
    if start_pos is not None and (not hasattr(start_pos, "__index__") or start_pos < 0):
        raise ValueError(f"start_pos should be a whole number of at least 0, got {start_pos!r}")
    return 0 if start_pos is None else index(start_pos)


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
