"""A law is finished when a mutation of the code fails it.

Each mutation changes one place in a copy of the package; the test named with it must then fail (and not
merely break while it is being read).

    python -m tests.mutate                  all of them, a line each
    python -m tests.mutate causality rope   those whose law has one of these words in it

Exit status 1 if any survives. Under pytest: tests/system/test_mutations.py (slow).
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[1]
FAILED = 1  # pytest: tests ran, and some failed


def survives(mutation: Mutation, folder: Path) -> str | None:
    """None if the test notices; else what happened. `folder` is empty and receives the mutated copy."""
    for name in ("open_mythos", "tests"):
        shutil.copytree(ROOT / name, folder / name)  # with what was compiled, to save doing it again
    shutil.copy(ROOT / "pyproject.toml", folder)
    path = folder / "open_mythos" / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        return f"{mutation.old!r} occurs {text.count(mutation.old)} times in {mutation.file}, not once"
    path.write_text(text.replace(mutation.old, mutation.new))
    test, *options = mutation.test.split()
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", f"tests/{test}", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode == FAILED:
        return None
    return f"{mutation.test} ended with {done.returncode}: {done.stdout[-300:]}"


def main(wanted: list[str]) -> int:
    survivors = 0
    for mutation in MUTATIONS:
        if wanted and not any(word in mutation.law for word in wanted):
            continue
        with tempfile.TemporaryDirectory() as folder:
            fate = survives(mutation, Path(folder))
        survivors += fate is not None
        print(f"{mutation.law:70} {fate or 'noticed'}", flush=True)  # noqa: T201
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
