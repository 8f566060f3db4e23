"""Every law fails when the code breaks it."""

from pathlib import Path

import pytest

from tests.mutate import survives
from tests.mutations import MUTATIONS, Mutation


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.law)
def test_is_noticed(mutation: Mutation, tmp_path: Path) -> None:
    assert survives(mutation, tmp_path) is None


def test_every_mutation_still_applies() -> None:
    """Seconds, not minutes: the text to be changed is there, once."""
    package = Path(__file__).parents[2] / "open_mythos"
    stale = [m.law for m in MUTATIONS if (package / m.file).read_text().count(m.old) != 1]
    assert not stale
