"""The real package open-mythos 0.5.0, beside ours although both are called `open_mythos`.

Its model is one file that imports nothing but torch, so it is loaded from an unpacked wheel under a name of
its own.
"""

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType

REQUIREMENT = "open-mythos==0.5.0"
NAME = "original_open_mythos"


def unpacked(folder: Path | None) -> Path:
    """`folder` itself, or a fresh one with the wheel that pip downloads. Raises `ValueError` if it cannot."""
    return folder if folder is not None else _download()


def load(folder: Path) -> ModuleType:
    """`open_mythos.main` of the original. Raises `ValueError` if `folder` does not hold it."""
    path = folder / "open_mythos" / "main.py"
    if not path.is_file():
        raise ValueError(
            f"there is no {path}; --original takes the folder of an unpacked {REQUIREMENT} wheel"
        )
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def _download() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="open-mythos-"))
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        REQUIREMENT,
    ]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise ValueError(
            f"pip could not download {REQUIREMENT}: {done.stderr.strip()}; give --original FOLDER"
        )
    zipfile.ZipFile(wheels[0]).extractall(folder)
    return folder
