"""Every variant at a size that runs in milliseconds. A new preset is added here once."""

from open_mythos.loop import adapt, halt, inject, mark, schedule, start, update
from open_mythos.loop.core import Loop
from open_mythos.model import FinalNorm, Matrix, Model
from open_mythos.nn.attention import GQA, MLA, HeadNorm, ValueEmbedding
from open_mythos.nn.block import BothNorm, PostNorm, PreNorm, Sandwich
from open_mythos.nn.ffn import MLP, MoE, SwiGLU
from open_mythos.nn.linear import LoRA
from open_mythos.nn.norm import LayerNorm

VOCAB, DIM = 61, 32
GROUPED = GQA(heads=4, kv_heads=2)
LATENT = MLA(heads=4, q_rank=12, kv_rank=10, rope_dim=4, nope_dim=6, value_dim=8)
EXPERTS = MoE(experts=8, chosen=2, width=16, shared=1)
DENSE = PreNorm(mixer=GROUPED, ffn=SwiGLU(width=48))


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
    "parcae": tiny(
        Loop(
            layers=2
            * (
                PreNorm(
                    mixer=GQA(
                        heads=4,
                        head_norm=HeadNorm(weight=False, after_rotation=True),
                        values=ValueEmbedding(vocab=VOCAB, gate=8),
                    ),
                    ffn=MLP(width=64, activation="half_relu2"),
                ),
            ),
            start=start.Noise(),
            inject=inject.Diagonal(),
            schedule=schedule.Poisson(mean=3, grad=2),
        ),
        leave=Matrix(),
    ),
    "huginn": tiny(
        Loop(
            layers=2 * (Sandwich(mixer=GQA(heads=4, qk_bias=True), ffn=SwiGLU(width=48)),),
            start=start.Noise(),
            inject=inject.Concat(),
            schedule=schedule.LogNormalPoisson(mean=3, grad=2),
        ),
        leave=FinalNorm(),
        embed_scale=DIM**0.5,
    ),
    "universal": tiny(
        Loop(
            layers=(PostNorm(mixer=GQA(heads=4, rope=None), ffn=MLP(width=64, activation="relu")),),
            mark=mark.PositionStep(steps=3),
            halt=halt.ACT(),
            schedule=schedule.Fixed(steps=3),
        )
    ),
    "ouro": Model(
        vocab=VOCAB,
        dim=DIM,
        loop=Loop(
            layers=2 * (BothNorm(mixer=GQA(heads=4), ffn=SwiGLU(width=48)),),
            adapt=adapt.NormedStep(),
            schedule=schedule.Fixed(steps=3),
        ),
        norm=None,
        tied=False,
    ),
    "chen": tiny(
        Loop(
            layers=(PreNorm(mixer=GQA(heads=4), ffn=MLP(width=64, bias=True), norm=LayerNorm(), scale=1e-4),),
            mark=mark.StepTable(steps=4),
            update=update.Gate(),
            schedule=schedule.Uniform(low=2, high=4),
        )
    ),
    "relaxed": tiny(
        Loop(
            layers=(
                PreNorm(
                    mixer=GQA(heads=4, linear=LoRA(rank=2, steps=2)),
                    ffn=SwiGLU(width=48, linear=LoRA(rank=2, steps=2)),
                ),
            ),
            inject=inject.Add(),
            start=start.Zeros(),
            schedule=schedule.Fixed(steps=3),
        )
    ),
    "fixed-depth": tiny(None),
}
