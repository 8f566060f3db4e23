"""What more loops than trained do to a model: our default recipe against the original's.

    python experiments/depth.py [--tokens 500000] [--seeds 3] [--dim 128] [--resume]

Three ways of training see the same text in the same batches, and have the same number of parameters:

    ours       train.recipes: last state as the answer, depth drawn per batch, Muon and AdamW
    original   open-mythos 0.5.0 as released, by the recipe of its script: ACT, always the same loops, AdamW
    random     the same with loops drawn per batch, as its users tried

Held-out bits per byte are then read at 1 .. 8 times the trained mean of loops. Two rules judge every way, on
the mean over seeds: the loss falls with every loop up to the trained mean; from there to 8 times the mean it
stays within 0.5 % of the lowest. Each run is a process of one thread, two at a time; what is finished stays
in runs/depth, and --resume goes on from there. Results go to bench/results/depth-extrapolation.json and .png.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal, NamedTuple, get_args

import tyro
import verdict

Arm = Literal["ours", "original", "random"]
ROOT = Path(__file__).parents[1]
TITLES: dict[Arm, str] = {
    "ours": "our default recipe",
    "original": "original, its own recipe",
    "random": "original, loops drawn per batch",
}
SETTINGS = ("tokens", "dim", "mean", "vocab", "length", "batch", "rows", "their_lr")


@dataclass(frozen=True)
class Options:
    """How large, and where to. The default takes about a quarter of an hour on two cores."""

    tokens: int = 500_000  # that each run learns from
    seconds: float | None = None  # instead: as many tokens as take so long, on the average of the three ways
    seeds: int = 3
    arms: tuple[Arm, ...] = get_args(Arm)
    dim: int = 128
    mean: int = 4  # loops, in training
    vocab: int = 2048
    length: int = 128
    batch: int = 16
    rows: int = 256  # of held-out text, for every depth
    their_lr: float = 3e-4  # that of the original's script; try 3e-3 too, at this size it learns faster
    processes: int = 2
    resume: bool = False  # keep the runs that are finished
    fresh: bool = False  # throw them away
    out: Path = ROOT / "runs" / "depth"
    results: Path = ROOT / "bench" / "results"

    @property
    def jobs(self) -> list["Job"]:
        return [Job(arm, seed) for seed in range(self.seeds) for arm in self.arms]

    @property
    def depths(self) -> list[int]:
        m = self.mean
        return sorted({*range(1, m + 1), round(1.5 * m), 2 * m, 4 * m, 8 * m})


class Job(NamedTuple):
    arm: Arm
    seed: int

    def path(self, folder: Path, kind: str = "json") -> Path:
        return folder / f"{self.arm}-{self.seed}.{kind}"


def main() -> None:
    if sys.argv[1:2] == ["--one"]:  # a run of its own process: FOLDER ARM SEED
        folder, arm, seed = sys.argv[2:]
        _train_one(Path(folder), Job(arm, int(seed)))  # type: ignore[arg-type]
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the runs must not be left behind
    try:
        _lead(tyro.cli(Options, description=__doc__))
    except ValueError as error:
        sys.exit(f"depth: {error}")
    except KeyboardInterrupt:
        sys.exit("depth: interrupted; what is finished stays, go on with --resume")


# The leading process: prepares, starts the others, watches, judges.


def _lead(options: Options) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    _prepare(options)
    settings = _settle(options)
    todo = [job for job in options.jobs if not job.path(options.out).exists()]
    print(f"{len(todo)} of {len(options.jobs)} runs to do, {settings['tokens']:,} tokens each", flush=True)
    if todo:
        _announce(todo, settings, options)
        _work(todo, options)
    _report(options, settings)


def _prepare(options: Options) -> None:
    """Tokenize the built-in corpus, once for all runs."""
    from open_mythos.data.shards import Prepare, read_index
    from open_mythos.data.tokenizer import BPE

    folder = _text(options.out, options.vocab)
    if not (folder / "index.json").exists() or not read_index(folder)["complete"]:
        print("tokenizing Python's own source (half a minute, once)", flush=True)
        Prepare(tokenizer=BPE(vocab_size=options.vocab)).write(folder)


def _text(folder: Path, vocab: int) -> Path:
    return folder / f"text-{vocab}"


def _settle(options: Options) -> dict[str, Any]:
    """The settings of the runs in the folder. Raises `ValueError` where old runs are of others."""
    path = options.out / "settings.json"
    found = [job for job in options.jobs if job.path(options.out).exists()]
    wanted = {name: getattr(options, name) for name in SETTINGS}
    if options.fresh:
        for job in found:
            job.path(options.out).unlink()
    elif found and not options.resume:
        raise ValueError(
            f"{options.out} holds {len(found)} finished runs; --resume keeps them, --fresh does not"
        )
    elif found:
        old = json.loads(path.read_text())
        free = {"tokens"} if options.seconds is not None else set()
        other = [f"{name} {old[name]}" for name in SETTINGS if old[name] != wanted[name] and name not in free]
        if other:
            raise ValueError(
                f"the runs in {options.out} have {', '.join(other)}; give the same, --fresh or --out"
            )
        _require_same_recipe(found, old, options.out)
        return dict(old)
    if options.seconds is not None:
        wanted["tokens"] = _affordable(options.seconds, wanted, options)
    path.write_text(json.dumps(wanted, indent=1) + "\n")
    return wanted


def _require_same_recipe(found: Sequence[Job], settings: dict[str, Any], folder: Path) -> None:
    """Recipes are code, and may have changed since."""
    from open_mythos.train.recipe import Recipe

    for job in found:
        saved = json.loads(job.path(folder).read_text())["recipe"]
        then, now = Recipe.from_dict(saved).to_dict(), _recipe(settings, job, folder).to_dict()
        if changed := [name for name in now if name != "data" and then[name] != now[name]]:
            raise ValueError(
                f"{job.arm}, seed {job.seed} is of another recipe ({', '.join(changed)}); give --fresh"
            )


def _affordable(seconds: float, settings: dict[str, Any], options: Options) -> int:
    paces = [_pace(settings, arm, options.out) for arm in options.arms]
    update = options.batch * options.length
    return max(1, round(seconds / mean(1 / pace for pace in paces) / update)) * update


def _announce(todo: Sequence[Job], settings: dict[str, Any], options: Options) -> None:
    """How long it will take, from a few updates of each way."""
    from open_mythos.analysis.compute import flops, parameters

    seconds = {}
    for arm in dict.fromkeys(job.arm for job in todo):
        seconds[arm] = settings["tokens"] / _pace(settings, arm, options.out)
        model = _recipe(settings, Job(arm, 0), options.out).model
        size, work = parameters(model).total, flops(model).token(options.mean, options.length // 2)
        each = f"{size:>11,} parameters, {work / 1e6:5.1f} MFLOP per token at {options.mean} loops"
        print(f"  {TITLES[arm]:32} {each}, {_clock(seconds[arm])} per run", flush=True)
    total = sum(seconds[job.arm] for job in todo) / min(options.processes, len(todo))
    print(f"about {_clock(1.15 * total)} in all; Ctrl-C loses only what is running", flush=True)


def _work(todo: list[Job], options: Options) -> None:
    """All runs, a few at a time. Raises `ValueError` when one fails; the others are then ended too."""
    waiting, running, done = list(todo), {}, 0
    began = shown = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < options.processes:
                job = waiting.pop(0)
                running[job] = _start(job, options.out)
            time.sleep(0.2)
            for job in [job for job, process in running.items() if process.poll() is not None]:
                _check(job, running.pop(job), options.out)
                done += 1
                print(f"{_line(job, options)}; {done} of {len(todo)} done", flush=True)
            if time.monotonic() - shown > 15 and running:
                shown = time.monotonic()
                _show(running, (done, len(todo), shown - began), options.out)
    finally:
        for process in running.values():
            process.kill()


def _start(job: Job, folder: Path) -> subprocess.Popen[bytes]:
    """In a session of its own, so that Ctrl-C reaches the leading process alone."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--one", str(folder), job.arm, str(job.seed)]
    with job.path(folder, "log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def _check(job: Job, process: subprocess.Popen[bytes], folder: Path) -> None:
    if process.returncode or not job.path(folder).exists():
        last = job.path(folder, "log").read_text().strip()[-2000:]
        raise ValueError(f"the run {job.arm}, seed {job.seed} failed with {process.returncode}:\n{last}")


def _line(job: Job, options: Options) -> str:
    run = json.loads(job.path(options.out).read_text())
    bits = dict(zip(run["loops"], run["bits_per_byte"], strict=True))
    at = ", ".join(f"{bits[n]:.3f} at {n}" for n in (1, options.mean, 8 * options.mean))
    return f"{TITLES[job.arm]}, seed {job.seed}: {at} loops, {_clock(run['seconds'])}"


def _show(running: dict[Job, Any], so_far: tuple[int, int, float], folder: Path) -> None:
    done, count, elapsed = so_far
    shares = {job: _share(job, folder) for job in running}
    whole = (done + sum(shares.values())) / count
    each = ", ".join(f"{job.arm} {job.seed} {share:.0%}" for job, share in shares.items())
    left = _clock(elapsed / whole - elapsed) if whole > 0 else "-:--"
    print(f"  {each}; {whole:.0%} of all, about {left} left", flush=True)


def _share(job: Job, folder: Path) -> float:
    path = job.path(folder, "share")
    return float(path.read_text() or 0) if path.exists() else 0.0


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


# A run.


def _recipe(settings: dict[str, Any], job: Job, folder: Path) -> Any:
    from open_mythos.analysis.rival import recipe_like
    from open_mythos.train.recipe import Prepared
    from open_mythos.train.recipes import for_model, small_mythos

    dim, loops, update = settings["dim"], settings["mean"], settings["batch"] * settings["length"]
    model = small_mythos(dim, max(1, dim // 64), settings["vocab"], mean=loops)
    recipe = for_model(model).replace(
        data=Prepared(folder=str(_text(folder, settings["vocab"]))),
        length=settings["length"],
        batch=settings["batch"],
        steps=max(1, round(settings["tokens"] / update)),
        seed=job.seed,
    )
    if job.arm == "ours":
        return recipe
    return recipe_like(recipe, random=job.arm == "random", lr=settings["their_lr"])


def _pace(settings: dict[str, Any], arm: Arm, folder: Path, updates: int = 3) -> float:
    """Tokens per second of one thread, from a few updates."""
    with _one_thread():
        recipe = _recipe(settings | {"tokens": 10**9}, Job(arm, 0), folder)
        steps = _updates(recipe, _corpus(folder, settings))
        next(steps)
        began = time.perf_counter()
        for _ in range(updates):
            next(steps)
        return updates * recipe.batch * recipe.length / (time.perf_counter() - began)


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _corpus(folder: Path, settings: dict[str, Any]) -> Any:
    from open_mythos.data.shards import open_corpus

    return open_corpus(_text(folder, settings["vocab"]))


def _updates(recipe: Any, corpus: Any) -> Iterator[tuple[Any, float]]:
    """Train: the state and the loss after every update."""
    import torch

    from open_mythos.train.step import TrainState, train_step

    state = TrainState.begin(recipe, corpus.loader(recipe.reading()), torch.device("cpu"))
    while state.step < recipe.steps:
        yield state, train_step(state, recipe, [next(state.loader)])["loss"]


def _train_one(folder: Path, job: Job) -> None:
    """Train, measure, write it down whole or not at all."""
    import torch

    from open_mythos.analysis.sweep import sweep
    from open_mythos.train.allocator import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(1)
    settings = json.loads((folder / "settings.json").read_text())
    recipe, corpus = _recipe(settings, job, folder), _corpus(folder, settings)
    began = told = time.monotonic()
    for state, loss in _updates(recipe, corpus):  # noqa: B007 (the last state is measured)
        if time.monotonic() - told > 1:
            told = time.monotonic()
            job.path(folder, "share").write_text(f"{state.step / recipe.steps:.4f}")
    seconds, busy = time.monotonic() - began, time.process_time()
    depths = Options(mean=settings["mean"]).depths
    found = sweep(
        state.model,
        corpus.held_out,
        recipe.length,
        loops=depths,
        rows=settings["rows"],
        precision=recipe.precision,
    )
    run = {
        "arm": job.arm,
        "seed": job.seed,
        "parameters": sum(p.numel() for p in state.model.parameters()),
        "tokens": state.tokens,
        "updates": state.step,
        "seconds": seconds,
        "cpu_seconds": busy,
        "last_loss": loss,
        "loops": found.loops,
        "bits_per_byte": found.bits_per_byte,
        "recipe": recipe.to_dict(),
    }
    fresh = job.path(folder, "new")
    fresh.write_text(json.dumps(run, indent=1) + "\n")
    os.replace(fresh, job.path(folder))
    job.path(folder, "share").unlink(missing_ok=True)


def _report(options: Options, settings: dict[str, Any]) -> None:
    runs = [json.loads(job.path(options.out).read_text()) for job in options.jobs]
    arms = {arm: [run for run in runs if run["arm"] == arm] for arm in options.arms}
    results = {arm: verdict.result(TITLES[arm], found, settings["mean"]) for arm, found in arms.items()}
    print("\n" + verdict.markdown(results, options.depths, settings) + "\n")
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / "depth-extrapolation.json"
    about = {"settings": settings, "seeds": options.seeds, "rule_within": verdict.WITHIN, **_machine()}
    path.write_text(json.dumps(about | {"arms": results}, indent=1) + "\n")
    _draw(results, settings["mean"], path.with_suffix(".png"))
    print(f"{path}\n{path.with_suffix('.png')}")


def _draw(results: dict[Arm, Any], trained: int, path: Path) -> None:
    """The line is the mean over seeds, the band their range."""
    import numpy as np

    from open_mythos.analysis.plots import DepthCurve, loss_against_loops, save_png

    curves = [
        DepthCurve(r["title"], np.array(r["loops"], float), np.array(r["bits_per_byte"]))
        for r in results.values()
    ]
    save_png(loss_against_loops(curves, trained), path)


def _machine() -> dict[str, Any]:
    import platform

    import torch

    return {"torch": torch.__version__, "machine": platform.machine(), "cores": os.cpu_count()}


if __name__ == "__main__":
    main()
