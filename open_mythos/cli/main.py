"""The `mythos` command: finds the verb, runs it, and turns what goes wrong into one sentence.

    mythos VERB [options]        ->        open_mythos.cli.VERB.main(options) -> exit status

A verb is a module of this package with `main(argv: list[str]) -> int`. It is imported when it is
used, and it imports torch only after its options are parsed, so `--help` answers at once.

Exit status: 0 done; 1 the work failed; 2 the input was bad; 130 interrupted; or what `Stop` says.
Bad input is a `ValueError`, a failure an `OSError` or a missing package; anything else is a bug and
keeps its traceback. MYTHOS_DEBUG=1 keeps every traceback.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from importlib import metadata

VERBS = {
    "show": "draw a model: its loop, parameters by role, FLOPs and cache bytes per token",
    "train": "train a model on text or puzzles, or resume a run",
    "generate": "continue a prompt with a trained model, at any depth",
    "sweep": "measure held-out loss against the number of loops",
    "report": "write one HTML page about a run",
    "data": "prepare a corpus, or show examples of a task",
    "plan": "memory, speed, days and cost of training a model on a cluster",
    "match": "find the model of equal parameters, FLOPs or memory to compare with",
}


class Stop(SystemExit):
    """Ends the command with this exit status, after one last sentence where there is something to say."""

    def __init__(self, code: int, message: str = "") -> None:
        super().__init__(code)
        self.status = code
        self.message = message


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit status. `argv` excludes the program's name."""
    verb, *rest = list(sys.argv[1:] if argv is None else argv) or [""]
    if verb in ("-h", "--help", "help"):
        return _help(rest)
    if verb in ("-V", "--version"):
        print(_version())
        return 0
    if verb in VERBS:
        return _guarded(verb, rest)
    _say(_unknown(verb) if verb else _overview())
    return 2


def _help(rest: list[str]) -> int:
    if rest and rest[0] in VERBS:
        return _guarded(rest[0], ["--help"])
    print(_overview())
    return 0


def _overview() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {about}" for verb, about in VERBS.items())
    return (
        "usage: mythos VERB [options]\n\n"
        "Build, train, verify, probe and serve recurrent-depth (looped) transformers.\n\n"
        f"{verbs}\n\n"
        "mythos VERB --help lists a verb's options; mythos --version says what is installed."
    )


def _version() -> str:
    python = ".".join(map(str, sys.version_info[:3]))
    return f"mythos {_installed('open_mythos')} (torch {_installed('torch')}, Python {python})"


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _unknown(verb: str) -> str:
    close = difflib.get_close_matches(verb, VERBS, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(VERBS)}"
    return f"mythos: there is no verb {verb!r}; {hint}"


def _guarded(verb: str, argv: list[str]) -> int:
    """Run a verb; what a user can mend is said in one sentence, without a traceback."""
    if os.environ.get("MYTHOS_DEBUG", "0") not in ("", "0"):
        return _run(verb, argv)
    try:
        return _run(verb, argv)
    except Stop as stop:
        _say(stop.message)
        return stop.status
    except BrokenPipeError:
        # The reader left, as in `mythos show | head`; the interpreter must not complain of it at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, ModuleNotFoundError, ValueError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("open_mythos"):
            raise
        status, sentence = _verdict(error)
        _say(f"mythos {verb}: {sentence}")
        return status


def _run(verb: str, argv: list[str]) -> int:
    module = importlib.import_module(f"open_mythos.cli.{verb}")
    status: int = module.main(argv)
    sys.stdout.flush()  # so that a broken pipe shows here and not while the interpreter ends
    return status


def _verdict(error: BaseException) -> tuple[int, str]:
    """The exit status for an error, and the sentence for the user."""
    match error:
        case KeyboardInterrupt():
            return 130, "interrupted"
        case ModuleNotFoundError():
            package = str(error.name).partition(".")[0]
            remedy = f"pip install {_extra_with(package)}"
            return 1, f"this needs the package {package}, which is not installed; {remedy}"
        case ValueError():
            return 2, str(error)
        case OSError(strerror=str(reason), filename=file):
            return 1, reason if file is None else f"{reason}: {file}"
    return 1, str(error) or type(error).__name__


def _extra_with(package: str) -> str:
    """The extra of open_mythos which brings a package, quoted for the shell; else the package itself."""
    try:
        requirements = metadata.requires("open_mythos") or []
    except metadata.PackageNotFoundError:
        return package
    for requirement in requirements:
        name, _, marker = requirement.partition(";")
        extra = marker.partition("extra == ")[2].strip().strip("\"'")
        if extra and name.startswith(package.replace("_", "-")):
            return f"'open_mythos[{extra}]'"
    return package


def _say(text: str) -> None:
    if text:
        print(text, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
