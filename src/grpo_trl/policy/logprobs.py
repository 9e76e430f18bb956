"""Log-probabilities of completions under a model.

Axes: B completions, T completion tokens, M trained tokens.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .completion import Completion
from .head import Scored
from .packing import Packer, Piece
from .shared_prefix import serve_shared_prefix


@dataclass(frozen=True)
class Scores:
    """What a model says of a piece; 0 where the piece's mask is False."""

    logps_BT: Tensor
    """Log-probabilities (nats) at the sampling temperature, at least float32, with gradient where it is enabled."""
    entropy_BT: Tensor
    """Entropy (nats) of the distribution each token was drawn from, detached."""


def score(model: nn.Module, piece: Piece, temperature: float) -> Scores:
    """Evaluate the completions of `piece` under `model`, in the mode that it is in.

        logp_it = log softmax(logits_it / temperature)[token_it]

    Args:
        model: A causal language model, wrapped or not, that went through `enable_scoring`.
        piece: What to evaluate.
        temperature: The sampling temperature, above 0.
    """
    scored = Scored(piece.positions_M, piece.targets_M, temperature, piece.input_ids_RS.shape[1])
    if piece.layout is None:
        logps_M, entropy_M = model(input_ids=piece.input_ids_RS, use_cache=False, scored=scored)
    else:
        with serve_shared_prefix(model):
            logps_M, entropy_M = model(
                input_ids=piece.input_ids_RS,
                position_ids=piece.position_ids_RS,
                use_cache=False,
                scored=scored,
                shared_prefix=piece.layout,
            )
    nothing_BT = logps_M.new_zeros(piece.mask_BT.shape)
    return Scores(
        logps_BT=nothing_BT.masked_scatter(piece.mask_BT, logps_M),
        entropy_BT=nothing_BT.masked_scatter(piece.mask_BT, entropy_M),
    )


@torch.no_grad()
def score_completions(
    model: nn.Module, completions: Sequence[Completion], packer: Packer, temperature: float
) -> list[Tensor]:
    """Log-probabilities of each completion's tokens, on the CPU, without gradient and without dropout.

    Args:
        model: As in `score`; its mode is restored.
        completions: What to evaluate.
        packer: Cuts them into pieces.
        temperature: The sampling temperature.

    Returns:
        For each completion a tensor of shape (its number of tokens,), 0 where its mask is False.
    """
    logps = [torch.zeros(0)] * len(completions)
    with evaluation_mode(model):
        for indices in packer.cut(completions):
            piece = packer.piece([completions[i] for i in indices], num_completions=len(completions))
            logps_BT = score(model, piece, temperature).logps_BT.cpu()
            for i, logps_T in zip(indices, logps_BT, strict=True):
                logps[i] = logps_T[: len(completions[i].ids)].clone()
    return logps


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout inside; each module in the mode that it was in after."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training
