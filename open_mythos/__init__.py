"""Build, train, verify, probe and serve recurrent-depth (looped) transformers.

The public names, each fetched from its home when first asked for, so that `import open_mythos` costs nothing.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_HOMES = {
    "open_mythos.main": (
        "MythosConfig",
        "OpenMythos",
        "RMSNorm",
        "GQAttention",
        "MLAttention",
        "Expert",
        "MoEFFN",
        "LoRAAdapter",
        "TransformerBlock",
        "LTIInjection",
        "ACTHalting",
        "RecurrentBlock",
        "precompute_rope_freqs",
        "apply_rope",
        "loop_index_embedding",
    ),
    "open_mythos.variants": (
        "mythos_1b",
        "mythos_3b",
        "mythos_7b",
        "mythos_10b",
        "mythos_50b",
        "mythos_100b",
        "mythos_500b",
        "mythos_1t",
    ),
    "open_mythos.tokenizer": ("MythosTokenizer", "load_tokenizer", "get_vocab_size"),
    "open_mythos.train.load": ("from_pretrained",),
    "open_mythos.hub.load": ("save_pretrained",),
    "open_mythos.config": ("Config",),
    "open_mythos.model": ("Model", "LoopedLM"),
    "open_mythos.loop.core": ("Loop",),
    "open_mythos.loop.schedule": ("Plan",),
    "open_mythos.loop.state": ("State",),
    "open_mythos.nn.cache": ("KVCache",),
    "open_mythos.nn.context": ("Context",),
    "open_mythos.infer.generate": ("generate", "stream"),
    "open_mythos.infer.sample": ("Sampling",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [*_HOME, "__version__"]  # noqa: PLE0604 (all of them are strings)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOME:
        raise AttributeError(f"module 'open_mythos' has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    try:
        return version("open_mythos")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "0+unknown"
