"""A step of the loop is one graph without a break, and one graph serves every depth."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_one_graph_serves_every_step() -> None:
    """Latent attention, experts, halting and all. (With gradient the first step has a graph of its own:
    the mass left has no gradient before it and one after.)"""
    command = [sys.executable, "-m", "tests.unit.loop.one_graph", "mythos-mla-act"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["2", "1"]
