"""OpenMythos from 1B to 1T parameters: one row per size, one function per row.

The rows are those of the package open-mythos 0.5.0, whose README also speaks of a `mythos_7b` that it lacks;
that row is ours. Any field can be given anew: `mythos_1b(max_loop_iters=8)`. Counts on the meta device are in
tests/unit/test_variants.py.
"""

from typing import Any

from open_mythos.classic.config import MythosConfig

SHARED: dict[str, Any] = {"vocab_size": 32000, "prelude_layers": 2, "coda_layers": 2, "attn_type": "mla"}
SMALL = SHARED | {"n_experts": 64, "n_shared_experts": 2, "n_experts_per_tok": 4, "lora_rank": 8}
LONG = SHARED | {"max_seq_len": 1_000_000, "max_output_tokens": 131_072, "n_experts_per_tok": 8}


def _heads(
    n_heads: int, n_kv_heads: int, q: int, kv: int, rope: int, nope: int, value: int
) -> dict[str, int]:
    return {
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "q_lora_rank": q,
        "kv_lora_rank": kv,
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": nope,
        "v_head_dim": value,
    }


ROWS: dict[str, dict[str, Any]] = {
    "1b": SMALL
    | _heads(16, 4, q=512, kv=256, rope=32, nope=64, value=64)
    | {"dim": 2048, "expert_dim": 2048, "max_loop_iters": 16, "max_seq_len": 4096},
    "3b": SMALL
    | _heads(24, 6, q=768, kv=384, rope=32, nope=96, value=96)
    | {"dim": 3072, "expert_dim": 4096, "max_loop_iters": 16, "max_seq_len": 4096},
    "7b": SMALL
    | _heads(28, 7, q=896, kv=448, rope=64, nope=128, value=128)
    | {"dim": 3584, "expert_dim": 4480, "max_loop_iters": 20, "max_seq_len": 8192, "n_experts": 128},
    "10b": SMALL
    | _heads(32, 8, q=1024, kv=512, rope=64, nope=128, value=128)
    | {"dim": 4096, "expert_dim": 5632, "max_loop_iters": 24, "max_seq_len": 8192, "n_experts": 128}
    | {"lora_rank": 16},
    "50b": SMALL
    | _heads(48, 8, q=1536, kv=512, rope=64, nope=128, value=128)
    | {"dim": 6144, "expert_dim": 9728, "max_loop_iters": 32, "max_seq_len": 8192, "n_experts": 256}
    | {"n_shared_experts": 4, "lora_rank": 32, "prelude_layers": 3, "coda_layers": 3},
    "100b": LONG
    | _heads(64, 8, q=2048, kv=512, rope=64, nope=128, value=128)
    | {"dim": 8192, "expert_dim": 13568, "max_loop_iters": 32, "n_experts": 256, "n_shared_experts": 4}
    | {"lora_rank": 64, "prelude_layers": 4, "coda_layers": 4, "rope_theta": 1_000_000.0},
    "500b": LONG
    | _heads(96, 16, q=3072, kv=1024, rope=64, nope=128, value=128)
    | {"dim": 12288, "expert_dim": 23040, "max_loop_iters": 48, "n_experts": 512, "n_shared_experts": 8}
    | {"lora_rank": 128, "prelude_layers": 4, "coda_layers": 4, "rope_theta": 1_000_000.0}
    | {"vocab_size": 100_000},
    "1t": LONG
    | _heads(128, 16, q=4096, kv=1024, rope=64, nope=128, value=128)
    | {"dim": 16384, "expert_dim": 34560, "max_loop_iters": 64, "n_experts": 512, "n_shared_experts": 8}
    | {"lora_rank": 256, "prelude_layers": 6, "coda_layers": 6, "rope_theta": 2_000_000.0}
    | {"vocab_size": 100_000},
}


def mythos_1b(**changes: Any) -> MythosConfig:
    """For research and fine-tuning: 16 loops, 4k context."""
    return MythosConfig(**(ROWS["1b"] | changes))


def mythos_3b(**changes: Any) -> MythosConfig:
    """For compact inference: 16 loops, 4k context."""
    return MythosConfig(**(ROWS["3b"] | changes))


def mythos_7b(**changes: Any) -> MythosConfig:
    """Between 3B and 10B in every respect: 128 experts, 20 loops, 8k context."""
    return MythosConfig(**(ROWS["7b"] | changes))


def mythos_10b(**changes: Any) -> MythosConfig:
    """128 experts, 24 loops, 8k context."""
    return MythosConfig(**(ROWS["10b"] | changes))


def mythos_50b(**changes: Any) -> MythosConfig:
    """256 experts, 32 loops, 8k context."""
    return MythosConfig(**(ROWS["50b"] | changes))


def mythos_100b(**changes: Any) -> MythosConfig:
    """256 experts, 32 loops, a context of a million tokens."""
    return MythosConfig(**(ROWS["100b"] | changes))


def mythos_500b(**changes: Any) -> MythosConfig:
    """512 experts, 48 loops, a context of a million tokens."""
    return MythosConfig(**(ROWS["500b"] | changes))


def mythos_1t(**changes: Any) -> MythosConfig:
    """512 experts, 64 loops, a context of a million tokens."""
    return MythosConfig(**(ROWS["1t"] | changes))


VARIANTS = {
    name.removeprefix("mythos_"): make for name, make in list(globals().items()) if name.startswith("mythos_")
}
