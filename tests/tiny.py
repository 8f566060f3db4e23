"""Every variant at a size that runs in milliseconds. A new preset is added here once."""

from open_mythos.loop import adapt, halt, inject, mark, schedule, update
from open_mythos.loop.core import Loop
from open_mythos.model import Model
from open_mythos.nn.attention import GQA, MLA
from open_mythos.nn.block import PreNorm
from open_mythos.nn.ffn import MoE, SwiGLU
from open_mythos.nn.ngram import NGrams
from open_mythos.presets import (
    baseline,
    chen,
    dreamer,
    huginn,
    kohli,
    olmo,
    ouro,
    parcae,
    recursions,
    relaxed,
    retrofit,
    saunshi,
    universal,
)

VOCAB, DIM = 61, 32
GROUPED = GQA(heads=4, kv_heads=2)
LATENT = MLA(heads=4, q_rank=12, kv_rank=10, rope_dim=4, nope_dim=6, value_dim=8)
EXPERTS = MoE(experts=8, chosen=2, width=16, shared=1)
DENSE = PreNorm(mixer=GROUPED, ffn=SwiGLU(width=48))
_LLAMA = baseline.Shape(vocab=VOCAB, dim=DIM, layers=2, heads=4, kv_heads=2, width=48)


def tiny(loop: Loop | None, block: object = DENSE, **options: object) -> Model:
    return Model(vocab=VOCAB, dim=DIM, prelude=(block,), loop=loop, coda=(block,), **options)


def mythos(mixer: object, act: bool) -> Model:
    return tiny(
        Loop(
            layers=(PreNorm(mixer=mixer, ffn=EXPERTS),),
            mark=mark.StepSinusoid(channels=8),
            inject=inject.NormedAdd(),
            adapt=adapt.DepthLoRA(rank=4, steps=3),
            update=update.LTI(),
            halt=halt.ACT(threshold=0.9) if act else halt.Last(),
            schedule=schedule.Fixed(steps=3),
        ),
        PreNorm(mixer=mixer, ffn=SwiGLU(width=40)),
    )


MODELS = {
    "mythos-mla": mythos(LATENT, act=False),
    "mythos-mla-act": mythos(LATENT, act=True),
    "mythos-gqa-act": mythos(GROUPED, act=True),
    "ngrams": mythos(LATENT, act=False).replace(ngrams=NGrams(rows=97, orders=(2, 3))),
    "parcae": parcae.assemble(parcae.Size(DIM, 4, 2), vocab=VOCAB, context=1_000_000, mean=3, grad=2),
    "huginn": huginn.assemble(
        huginn.Size(DIM, 4, 48, prelude=1, loop=2, coda=1), vocab=VOCAB, context=1_000_000, mean=3, grad=2
    ),
    "universal": universal.universal(
        universal.Size(vocab=VOCAB, dim=DIM, width=64, heads=4, most=3, dropout=0.0)
    ),
    "ouro": ouro.ouro(
        ouro.Size(
            vocab=VOCAB, dim=DIM, width=48, heads=4, layers=2, steps=3, threshold=0.8, context=1_000_000
        )
    ),
    "chen": chen.chen(
        chen.Size(
            vocab=VOCAB,
            dim=DIM,
            width=64,
            heads=4,
            table=4,
            low=2,
            high=4,
            dropout=0.0,
            full=False,
            context=99,
        )
    ),
    "kohli": kohli.kohli(
        kohli.Size(vocab=VOCAB, dim=DIM, layers=2, heads=4, context=99, out=1.0, injected=True)
    ),
    "saunshi": saunshi.saunshi(
        saunshi.Size(vocab=VOCAB, dim=DIM, width=48, heads=4, k=1, loops=3, untied=1, context=99)
    ),
    "dreamer": dreamer.dreamer(
        dreamer.Size(vocab=VOCAB, dim=DIM, heads=4, steps=3, experts=8, chosen=2, width=16)
    ),
    "relaxed": relaxed.relaxed(baseline.llama(_LLAMA.replace(layers=6)), loops=3, rank=2),
    "retrofit": retrofit.retrofit(
        baseline.llama(_LLAMA.replace(layers=5)), retrofit.Cut(prelude=1, core=2, coda=1, mean=3.0, grad=2)
    ),
    "olmo2": olmo.olmo2(_LLAMA),
    "fixed-depth": baseline.llama(_LLAMA.replace(layers=2, bias=True, head_norm=True)),
}
# Tokens decide for themselves when to leave; a law that cannot hold for them says why.
ROUTED = {
    name: recursions.recursions(recursions.Size(shape=_LLAMA.replace(layers=8), **options))
    for name, options in {
        "recursions": {},
        "recursions-token": {"tokens_choose": True},
        "recursions-shared": {"share_keys": True},
    }.items()
}
# Every token sees every other; not for the laws of causality and of caches.
ENCODERS = {
    "universal": universal.universal(
        universal.Size(vocab=VOCAB, dim=DIM, width=64, heads=4, most=3, dropout=0.0, attention="full")
    ),
    "chen": chen.chen(
        chen.Size(vocab=VOCAB, dim=DIM, width=64, heads=4, table=4, low=2, high=4, dropout=0.0, context=99)
    ),
}
