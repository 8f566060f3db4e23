"""Recipes that have been run: each is one function, and its name is what `mythos train NAME` takes.

demo    a small OpenMythos, all of it but ACT, on the standard library's source, in minutes on two cores
tiny    the same at toy size, for a look or a test
"""

from collections.abc import Callable

from open_mythos.data.corpus import CorpusConfig
from open_mythos.data.tokenizer import BPE
from open_mythos.loop import adapt, inject, mark, schedule, start, update
from open_mythos.loop.core import Loop
from open_mythos.model import Model
from open_mythos.nn.attention import MLA
from open_mythos.nn.block import PreNorm
from open_mythos.nn.ffn import SwiGLU
from open_mythos.nn.init import Normal
from open_mythos.nn.moe import MoE
from open_mythos.nn.ngram import NGrams
from open_mythos.nn.norm import RMSNorm
from open_mythos.nn.rope import Rope
from open_mythos.train.lr import WarmupStableDecay
from open_mythos.train.muon import Muon
from open_mythos.train.optim import AdamW, MuonAdamW
from open_mythos.train.recipe import Recipe


def small_mythos(dim: int, heads: int, vocab: int, mean: float = 4, grad: int | None = None) -> Model:
    """The architecture but for ACT at a small width, set up so that more loops than trained do no harm.

    Against the original: depth is drawn at random, now and then a great one; the loop begins with noise and
    its answer is the last state (no ACT average, which ties a model to its trained depth), its input is
    normalised, the loop index is a share of the stream, the maps into the stream begin at zero and the depth
    LoRA's scales at one. Steps past the mean are not told apart, so that from there on the loop is one map
    and can settle, and its linear part forgets fast, so that it does settle within a few steps. As many
    steps as the mean carry gradient, unless told otherwise.
    """
    mixer = MLA(
        heads=heads,
        q_rank=3 * dim // 8,
        kv_rank=dim // 4,
        rope_dim=16,
        nope_dim=32,
        value_dim=dim // heads,
        rope=Rope(base=100.0),  # a few hundred tokens need no slower turns; neighbours are told apart
    )
    dense = PreNorm(mixer=mixer, ffn=SwiGLU(width=2 * dim))
    moe = MoE(experts=8, chosen=2, width=dim // 2, shared=1, speed=1e-2)
    return Model(
        vocab=vocab,
        dim=dim,
        prelude=(dense,),
        enter=RMSNorm(),
        loop=Loop(
            layers=(PreNorm(mixer=mixer, ffn=moe),),
            start=start.Noise(),
            mark=mark.StepSinusoid(relative=True, amplitude=0.3, steps=round(mean)),
            inject=inject.NormedAdd(),
            adapt=adapt.DepthLoRA(rank=8, steps=round(mean)),
            update=update.LTI(decay=0.05),
            # Drawn per batch: rows of many depths leave a small machine with products too small to share out.
            schedule=schedule.LogNormalPoisson(mean=mean, grad=grad or round(mean), most=8 * round(mean)),
        ),
        coda=(dense,),
        tied=False,
        init=Normal(out=0.0),
    )


def for_model(model: Model) -> Recipe:
    """A recipe for any model: Muon and AdamW, warm up, stay, decay. Give it `steps`, `length` and `batch`."""
    muon = Muon(lr=0.02)
    adamw = AdamW(lr=1.3e-2, beta1=0.8, eps=1e-10, weight_decay=0.0, vector_scale=0.2)
    return Recipe(
        model=model,
        data=CorpusConfig(tokenizer=BPE(vocab_size=min(model.vocab, 32_768))),
        length=min(256, model.context),
        batch=16,
        steps=1000,
        optimiser=MuonAdamW(muon=muon, adamw=adamw),
        lr=WarmupStableDecay(warmup=5, decay=0.6, floor=0.02),
    )


def demo() -> Recipe:
    model = small_mythos(dim=256, heads=4, vocab=2048, mean=3, grad=1)  # cheap steps: it sees more text
    return for_model(model.replace(ngrams=NGrams(rows=32_768, orders=(2, 3)))).replace(
        batch=32,
        length=128,
        steps=None,
        seconds=260.0,
        eval_every=100,
        eval_stride=64,
        sample_every=100,
        save_every=100,
    )


def tiny() -> Recipe:
    model = small_mythos(dim=64, heads=2, vocab=512)
    return for_model(model).replace(
        steps=60, length=64, eval_every=20, sample_every=20, save_every=20, eval_rows=16
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"demo": demo, "tiny": tiny}
