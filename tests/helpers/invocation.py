"""Prompts with and without the invocation tokens of an aLoRA adapter."""

import torch

INVOCATION = [7, 9]


def prompts(first: int = 10, sequences: int = 5) -> torch.Tensor:
    """Invocations in the middle, at the end, at the start, none, and two of which the last counts; [sequences, 9].

    The other tokens are drawn from ``first`` to 39.
    """
    found = torch.randint(first, 40, (sequences, 9))
    for row, at in ((0, 3), (1, 7), (2, 0), (4, 1), (4, 5)):
        found[row, at : at + 2] = torch.tensor(INVOCATION)
    return found
