"""Train the 3B OpenMythos on FineWeb-Edu: 30 billion tokens, on one GPU or many.

    python training/3b_fine_web_edu.py
    torchrun --nproc-per-node 8 training/3b_fine_web_edu.py
    python training/3b_fine_web_edu.py --smoke          # the same path on local text, in seconds

Started again, it goes on from its newest checkpoint. Words like `steps=2000` change the recipe. Needs
`pip install 'open_mythos[data]'` and the network for data and tokenizer; the smoke test needs neither.
"""

import argparse
from pathlib import Path

from open_mythos import get_vocab_size, mythos_3b
from open_mythos.cli.train import Options, launch
from open_mythos.data.corpus import Streamed
from open_mythos.data.text import Hub, Stdlib
from open_mythos.data.tokenizer import Bytes, HubTokenizer
from open_mythos.loop.schedule import Poisson
from open_mythos.model import Model
from open_mythos.train.checkpoint import steps_in
from open_mythos.train.lr import WarmupCosine
from open_mythos.train.muon import Muon
from open_mythos.train.optim import AdamW, MuonAdamW
from open_mythos.train.recipe import Recipe

TOKENIZER = "openai/gpt-oss-20b"
TOKENS, LENGTH, BATCH = 30_000_000_000, 2048, 256  # half a million tokens for each update

# The answer is the last state and each sequence draws its depth, so that more loops than trained do no harm.
DEPTH = Poisson(mean=16, grad=8, per="sequence", most=32)


def recipe_for(model: Model, data: Streamed) -> Recipe:
    return Recipe(
        model=model.replace(loop=model.loop.replace(schedule=DEPTH)),
        data=data,
        length=LENGTH,
        batch=BATCH,
        micro=4,
        steps=TOKENS // (LENGTH * BATCH),
        optimiser=MuonAdamW(muon=Muon(lr=0.02), adamw=AdamW(lr=3e-4)),
        lr=WarmupCosine(warmup=2000, floor=0.1),
        precision="auto",  # bfloat16, or float16 with a scaled loss where that is all there is
        remat=True,
        eval_every=500,
        sample_every=1000,
        save_every=500,
    )


def full() -> Recipe:
    model = mythos_3b(vocab_size=get_vocab_size(TOKENIZER), halting="last").model()
    data = Streamed(source=Hub(config="sample-10BT"), tokenizer=HubTokenizer(name=TOKENIZER))
    return recipe_for(model, data)


def smoke() -> Recipe:
    """Everything but the size: a few updates of a toy on Python's own source, streamed."""
    heads = {"n_heads": 2, "n_kv_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16}
    widths = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    small = {"dim": 32, "expert_dim": 16, "n_experts": 8, "prelude_layers": 1, "coda_layers": 1}
    config = mythos_3b(vocab_size=Bytes().build().vocab_size, halting="last", **heads, **widths, **small)
    data = Streamed(source=Stdlib(), tokenizer=Bytes(), held_out_documents=2, window=64)
    toy = {"length": 32, "batch": 8, "steps": 4, "eval_every": 4, "eval_rows": 4}
    return recipe_for(config.model(), data).replace(**toy, sample_every=4, save_every=2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="a toy on local text, in seconds")
    parser.add_argument("--out", type=Path, help="the run's folder (default: runs/3b_fine_web_edu)")
    parser.add_argument("--device", help="cpu, cuda, mps (default: the best there is)")
    given, overrides = parser.parse_known_args()
    folder = given.out or Path("runs") / ("smoke" if given.smoke else "3b_fine_web_edu")
    recipe = (smoke() if given.smoke else full()).override(*overrides)
    begun = bool(steps_in(folder / "checkpoints"))
    launch(recipe, folder, Options(recipe=str(folder), resume=begun, device=given.device, sweep=False))


if __name__ == "__main__":
    main()
