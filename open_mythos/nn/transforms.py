"""Whether somebody transforms the function that is being computed: `torch.func` (grad, vmap, jvp, ...) or
forward-mode differentiation.

These have to see the operations themselves, so what has a gradient written out by hand, or looks at numbers
on the host to choose a faster way, goes the plain way meanwhile.
"""

import torch
from torch.autograd import forward_ad


def transformed() -> bool:
    if torch.compiler.is_compiling():
        return False
    interpreted = torch._C._functorch.peek_interpreter_stack() is not None
    return interpreted or forward_ad._current_level >= 0
