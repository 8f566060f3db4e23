"""`mythos train`: learn from text, watch it happen, leave a folder that says everything about the run."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    import torch

    from open_mythos.analysis.utilisation import Utilisation
    from open_mythos.data.corpus import Corpus
    from open_mythos.train.fit import Every, Run
    from open_mythos.train.parallel import World
    from open_mythos.train.progress import Progress
    from open_mythos.train.recipe import Recipe
    from open_mythos.train.step import TrainState
    from open_mythos.train.track import Tracker

SAMPLE_TOKENS = 64


@dataclass(frozen=True)
class Options:
    """Train a looped model: `mythos train demo`, `mythos train mythos_1b data=... steps=...`.

    Words right after the recipe override it, as in `mythos train demo steps=2000 model.loop.schedule.mean=6`;
    the config.json of any run lists what there is to override.
    """

    recipe: tyro.conf.Positional[str] = "demo"
    """A recipe (demo, tiny), a model (mythos_1b, parcae-140m, ...), or a config.json of an earlier run."""

    overrides: tyro.conf.Positional[tuple[str, ...]] = ()
    """Dotted assignments to the recipe; values are JSON."""

    data: tuple[str, ...] = ()
    """Text files or folders, a prepared token folder, files of token ids (.npy, .bin), a dataset of the Hub
    (streamed), or puzzles such as khop. Default: Python's own source."""

    out: Path | None = None
    """The run's folder. Default: runs/RECIPE."""

    resume: bool = False
    """Go on from the folder's newest intact checkpoint. What torchrun or SLURM start again does by itself."""

    fresh: bool = False
    """Start over, even if the folder already holds a run."""

    steps: int | None = None
    """End after so many updates."""

    seconds: float | None = None
    """End after so many seconds of training."""

    device: str | None = None
    """cpu, cuda, cuda:1, mps. Default: the best there is."""

    threads: Annotated[int | None, tyro.conf.arg(help="CPU threads. Default: one per core.")] = None

    wait: float = 600.0
    """Under torchrun: seconds to wait for the other processes."""

    track: Literal["auto", "none", "trackio", "wandb", "tensorboard"] = "auto"
    """Where to watch the run besides metrics.jsonl. auto: trackio (local, no account) if it is installed."""

    sweep: bool = True
    """At the end, measure held-out loss against the number of loops, and write the report."""


def main(argv: list[str]) -> int:
    options = tyro.cli(Options, prog="mythos train", args=argv)
    if "--out=" in argv or ("--out", "") in pairwise(argv):  # as a path it would be the folder one is in
        raise ValueError("--out should name a folder for the run, got none; leave it out for runs/RECIPE")
    launch(*_plan(options), options)
    return 0


def launch(recipe: Recipe, folder: Path, options: Options) -> None:
    """Train by `recipe` in `folder`, with the other processes of torchrun if it started this one.

    Raises `Stop` with the exit status after a signal, when everything is saved.
    """
    import torch

    from open_mythos.cli.named import device_named
    from open_mythos.train.allocator import keep_freed_memory
    from open_mythos.train.parallel import join, own_device
    from open_mythos.train.track import require

    require(options.track)
    keep_freed_memory()
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads should be at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    device = own_device(device_named(options.device))
    with join(device, options.wait, recipe.expert_parallel) as world:
        _run(recipe, folder, options, device, world)


def _run(recipe: Recipe, folder: Path, options: Options, device: torch.device, world: World) -> None:
    from open_mythos.cli.main import Stop

    try:
        _train_and_finish(recipe, folder, options, device, world)
    except KeyboardInterrupt:
        raise Stop(130, _interrupted(folder, options) if world.rank == 0 else "") from None


def _train_and_finish(
    recipe: Recipe, folder: Path, options: Options, device: torch.device, world: World
) -> None:
    from open_mythos.cli.main import Stop
    from open_mythos.cli.named import note
    from open_mythos.train.fit import Run, Stopped

    resume = world.first(lambda: _guard(folder, options))
    run = Run(recipe, _read(recipe, world), folder, device, world)
    state = (
        run.resume(note if world.rank == 0 else lambda said: None)
        if resume
        else run.begin(over=options.fresh)
    )
    if world.rank == 0 and recipe.progress(state.step, state.seconds) >= 1:
        print(f"{folder} is at its end, step {state.step}; with more --steps or --seconds it goes on")
    try:
        state = _train(run, state, options)
    except Stopped as stopped:
        if world.rank == 0:
            print(f"Saved at step {state.step}. Go on with: {_again(folder, options)}")
        raise Stop(128 + stopped.number) from None
    if options.sweep and world.rank == 0:
        _finish(run, state)


def _interrupted(folder: Path, options: Options) -> str:
    """What is saved, and how to go on."""
    from open_mythos.train.checkpoint import steps_in

    if not (steps := steps_in(folder / "checkpoints")):
        return "mythos train: interrupted before anything was saved; to begin again give the same command"
    saved = f"mythos train: interrupted; {folder} is saved at step {max(steps)}"
    return f"{saved}. Go on (at its end, with the sweep and the report) with: {_again(folder, options)}"


def _again(folder: Path, options: Options) -> str:
    return shlex.join(["mythos", "train", options.recipe, "--out", str(folder), "--resume"])


def _plan(options: Options) -> tuple[Recipe, Path]:
    """The recipe with everything that the command line says, and where its run goes."""
    recipe, name = _recipe(options)
    changes: dict[str, Any] = {}
    if options.data:
        from open_mythos.train.recipe import data_named

        for word in options.data:
            if "=" in word and not Path(word).exists():
                raise ValueError(f"{word!r} reads like an override; these come right after the recipe's name")
        changes["data"] = data_named(options.data, recipe)
    if options.steps is not None:
        changes |= {"steps": options.steps, "seconds": None}
    if options.seconds is not None:
        changes |= {"seconds": options.seconds, "steps": options.steps}
    recipe = recipe.replace(**changes).override(*options.overrides).anchored()
    return recipe, options.out or Path("runs") / name


def _recipe(options: Options) -> tuple[Recipe, str]:
    from open_mythos.train.load import load_recipe
    from open_mythos.train.recipe import Recipe
    from open_mythos.train.recipes import RECIPES, for_model

    if options.resume and options.out is not None:
        return load_recipe(options.out), options.out.name
    spoken = options.recipe
    if spoken in RECIPES:
        recipe = RECIPES[spoken]()
        return (load_recipe(Path("runs") / spoken), spoken) if options.resume else (recipe, spoken)
    if Path(spoken).suffix == ".json" or Path(spoken).is_dir():
        path = Path(spoken)
        return (load_recipe(path), path.name) if path.is_dir() else (Recipe.load(path), path.stem)
    from open_mythos.cli.named import model_named

    return for_model(model_named(spoken)), spoken


def _guard(folder: Path, options: Options) -> bool:
    """Never write over a run by accident. Whether to resume."""
    from open_mythos.train.checkpoint import damage, steps_in
    from open_mythos.train.parallel import restarted

    if (file := next((place for place in (folder, *folder.parents) if place.is_file()), None)) is not None:
        raise ValueError(f"a run needs a folder, but {file} is a file; choose another with --out")
    steps = steps_in(folder / "checkpoints")
    if restarted():
        return bool(steps)
    if options.resume and options.fresh:
        raise ValueError("--resume goes on with a run and --fresh starts over; give one of them")
    if options.resume and not steps:
        why = damage(folder / "checkpoints") or "; it was ended before it saved one, begin without --resume"
        raise ValueError(f"{folder} has no whole checkpoint to resume from{why}")
    if not steps and not options.resume:
        _refuse_a_foreign_config(folder / "config.json")
    if steps and not options.resume and not options.fresh:
        last = max(steps)
        raise ValueError(
            f"{folder} already holds a run, at step {last}; go on with --resume, start over with --fresh, "
            "or choose another folder with --out"
        )
    return options.resume


def _refuse_a_foreign_config(path: Path) -> None:
    """Raise `ValueError` for a config.json that is not of a run, which a run would write over."""
    from open_mythos.train.recipe import Recipe

    if path.exists():
        try:
            Recipe.load(path)
        except ValueError as error:
            raise ValueError(
                f"{path} is not of a run, and a run would write over it; choose another folder with --out "
                f"({error})"
            ) from error


def _read(recipe: Recipe, world: World) -> Corpus:
    from rich.console import Console

    console = Console(stderr=True, quiet=world.rank > 0)
    with console.status("reading and tokenising the corpus"):
        corpus = recipe.data.build()
    if corpus.tokenizer.vocab_size > recipe.model.vocab:
        raise ValueError(
            f"the tokenizer has {corpus.tokenizer.vocab_size} ids, the model's vocabulary only "
            f"{recipe.model.vocab}; set model.vocab={corpus.tokenizer.vocab_size} or choose another tokenizer"
        )
    if corpus.puzzle is None and len(corpus.held_out) <= recipe.length:
        raise ValueError(
            f"the held-out text is too short: {len(corpus.held_out)} tokens make no row of {recipe.length}; "
            "give more text, hold out more of it, or take shorter rows (length)"
        )
    console.print(str(corpus), highlight=False)
    return corpus


def _train(run: Run, state: TrainState, options: Options) -> TrainState:
    from open_mythos.analysis.utilisation import Utilisation
    from open_mythos.train.progress import Progress
    from open_mythos.train.track import Tracker

    recipe = run.recipe
    if run.world.rank:
        return run.fit(state, _hooks(run))
    used = Utilisation(recipe, run.device, run.world.size)
    with (
        Tracker(options.track, run.folder, recipe.to_dict(), state.step) as tracker,
        Progress(recipe.steps, recipe.seconds) as progress,
    ):
        return run.fit(state, _hooks(run, (progress, tracker, used)))


def _hooks(run: Run, audience: tuple[Progress, Tracker, Utilisation] | None = None) -> list[Every]:
    """All ranks evaluate and sample, since all hold a part of the weights; the first also shows it."""
    from open_mythos.train.evaluate import evaluate
    from open_mythos.train.fit import Every, Metrics

    recipe = run.recipe
    said = False

    def look(state: TrainState, metrics: Metrics) -> None:
        done = recipe.progress(state.step, state.seconds) >= 1
        rows = None if done else recipe.eval_rows  # at the end, all of the held-out text
        metrics |= evaluate(state.model, run.corpus, recipe, rows)

    def sample(state: TrainState, metrics: Metrics) -> None:
        metrics["sample"] = _sample(run, state)
        if audience is not None:
            audience[0].print_sample(metrics["sample"], f"sample at step {state.step}")

    def show(state: TrainState, metrics: Metrics) -> None:
        nonlocal said
        if audience is not None:
            progress, tracker, used = audience
            if not said and not math.isfinite(metrics.get("eval_bits_per_byte", 0.0)):
                said = True
                progress.note(
                    f"the held-out loss at step {state.step} is not finite; checkpoints where it is not have "
                    "no score, and none of them counts as the best"
                )
            metrics["mfu"] = used.of(metrics)
            progress.update(metrics)
            tracker.log(metrics)

    return [Every(recipe.eval_every, look), Every(recipe.sample_every, sample), Every(1, show)]


def _sample(run: Run, state: TrainState) -> str:
    """A continuation of the beginning of the held-out text."""
    from open_mythos.infer.generate import generate
    from open_mythos.infer.sample import Sampling
    from open_mythos.train.parallel import gathered

    prompt = _prompt(run)
    room = min(SAMPLE_TOKENS, run.recipe.model.context - len(prompt))
    with gathered(state.model):
        done = generate(
            state.model, [prompt], max_new_tokens=room, sampling=Sampling(temperature=0.7, seed=state.step)
        )[0]
    return run.corpus.tokenizer.decode([*prompt, *done.tokens])


def _prompt(run: Run) -> list[int]:
    """The beginning of the held-out text, or a puzzle's question."""
    puzzle, held_out = run.corpus.puzzle, run.corpus.held_out
    if puzzle is None:
        return [
            int(token) for token in held_out.read(0, min(32, max(1, run.recipe.length // 2), len(held_out)))
        ]
    from open_mythos.data.puzzles.puzzle import encode, examples_of

    return encode(puzzle, examples_of(puzzle, puzzle.train[0], 1)[0].question)


def _finish(run: Run, state: TrainState) -> None:
    """Sweep the depth on held-out text, compress it for comparison, write the page."""
    import json

    from open_mythos.analysis.report import write_report
    from open_mythos.analysis.sweep import sweep, write_sweep
    from open_mythos.train.evaluate import compressors
    from open_mythos.train.load import load_run
    from open_mythos.whole import write_whole

    model = state.model if run.world.size == 1 else load_run(run.folder)[0].to(run.device)
    if model.loop is not None and run.corpus.puzzle is None:
        write_sweep(run.folder, sweep(model, run.corpus.held_out, run.recipe.length))
    if run.corpus.held_out_text:
        write_whole(run.folder / "baselines.json", json.dumps(compressors(run.corpus.held_out_text)))
    print(f"report: {write_report(run.folder)}")
