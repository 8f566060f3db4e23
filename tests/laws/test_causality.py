"""No token sees a later one, however often the loop turns."""

import pytest
import torch

from tests.tiny import VOCAB
from tests.zoo import EVERY, awake, close, words


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_a_token_shows_in_itself_and_later_but_not_before(name: str) -> None:
    model, tokens = awake(EVERY[name]), words()
    before = model(tokens)
    for changed in (1, 4):
        other = tokens.clone()
        other[:, changed] = (other[:, changed] + 1) % VOCAB
        after = model(other)
        close(after[:, :changed], before[:, :changed])
        assert ((after - before)[:, changed:].abs().amax(-1) > 1e-5).all()


def test_full_attention_looks_ahead() -> None:
    """The exception that is asked for, or the law above might hold for want of trying."""
    config = EVERY["ouro"]
    assert config.loop is not None
    layers = tuple(b.replace(mixer=b.mixer.replace(attention="full")) for b in config.loop.layers)
    model, tokens = awake(config.replace(loop=config.loop.replace(layers=layers))), words()
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % VOCAB
    assert (model(other) - model(tokens))[:, 0].abs().max() > 1e-4
