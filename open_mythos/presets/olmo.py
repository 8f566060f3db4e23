"""OLMo, the open decoders of the Allen Institute: baselines, and what retrofitted recurrence starts from.

    OLMo     x + f(norm(x))      LayerNorm without gain or bias     Groeneveld et al. 2024 (arXiv 2402.00838)
    OLMo 2   x + norm(f(x))      RMSNorm; queries and keys normed over all heads at once, before rotation
                                                                    Walsh et al. 2025 (arXiv 2501.00656)

f is first grouped attention, then SwiGLU. Exact in parameters, forward pass and checkpoint (hub/olmo.py).

    name       parameters      dim   layers  heads  ffn
    olmo-1b    1,176,764,416   2048  16      16     8192
    olmo2-1b   1,484,916,736   2048  16      16     8192
    olmo2-7b   7,298,617,344   4096  32      32     11008
"""

from open_mythos.model import Model
from open_mythos.nn.attention import GQA, HeadNorm
from open_mythos.nn.block import BranchNorm
from open_mythos.nn.norm import LayerNorm
from open_mythos.presets.baseline import Shape, block, llama

BARE = LayerNorm(eps=1e-5, weight=False)


def olmo(shape: Shape) -> Model:
    """A decoder of the first kind. `shape.eps` has no say: it is always 1e-5."""
    return llama(shape).replace(prelude=shape.layers * (block(shape).replace(norm=BARE),), norm=BARE)


def olmo2(shape: Shape) -> Model:
    """A decoder of the second kind."""
    like = block(shape)
    assert isinstance(like.mixer, GQA)
    mixer = like.mixer.replace(head_norm=HeadNorm(eps=shape.eps, whole=True))
    layer = BranchNorm(mixer=mixer, ffn=like.ffn, norm=like.norm)
    return llama(shape).replace(prelude=shape.layers * (layer,))


_ONE = Shape(
    vocab=50_304, dim=2048, layers=16, heads=16, kv_heads=16, width=8192, context=2048, base=10_000.0
)
_TWO = Shape(
    vocab=100_352,
    dim=2048,
    layers=16,
    heads=16,
    kv_heads=16,
    width=8192,
    context=4096,
    eps=1e-6,
    tied=False,
)
MODELS = {
    "olmo-1b": olmo(_ONE),
    "olmo2-1b": olmo2(_TWO),
    "olmo2-7b": olmo2(_TWO.replace(dim=4096, layers=32, heads=32, kv_heads=32, width=11_008)),
}
