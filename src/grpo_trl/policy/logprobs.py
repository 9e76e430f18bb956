"""Log-probabilities of completions under a model.

Axes: B completions, S tokens of a row, K positions whose logits are computed, T completion tokens, V vocabulary.
"""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .completion import Completion
from .packing import Piece, make_piece


@dataclass(frozen=True)
class Scores:
    """What a model says of a piece; 0 where the piece's mask is False."""

    logps_BT: Tensor
    """Log-probabilities (nats) at the sampling temperature, float32, with gradient where it is enabled."""
    entropy_BT: Tensor
    """Entropy (nats) of the distribution each token was drawn from, float32, detached."""


def score(model: nn.Module, piece: Piece, temperature: float) -> Scores:
    """Evaluate the completions of `piece` under `model`, in the mode that it is in.

        logp_it = log softmax(logits_it / temperature)[token_it]

    Args:
        model: A causal language model, wrapped or not.
        piece: What to evaluate.
        temperature: The sampling temperature, above 0.
    """
    first = piece.shortest_prompt - 1
    kept = piece.input_ids_BS.shape[1] - first
    limit = {"logits_to_keep": kept} if _takes_logits_to_keep(model) else {}
    logits_BKV = model(input_ids=piece.input_ids_BS, use_cache=False, **limit).logits[:, -kept:-1]
    labels_BK = piece.input_ids_BS[:, first + 1 :]
    logps_BK, entropy_BK = _token_logps(logits_BKV, labels_BK, temperature)

    width = piece.mask_BT.shape[1]
    start_B1 = (piece.prompt_lengths_B - 1 - first).unsqueeze(1)
    index_BT = start_B1 + torch.arange(width, device=start_B1.device)
    index_BT = index_BT.clamp(max=labels_BK.shape[1] - 1)
    return Scores(
        logps_BT=torch.where(piece.mask_BT, logps_BK.gather(1, index_BT), 0.0),
        entropy_BT=torch.where(piece.mask_BT, entropy_BK.gather(1, index_BT), 0.0),
    )


@torch.no_grad()
def score_completions(
    model: nn.Module, completions: Sequence[Completion], *, temperature: float, batch_size: int, pad_token_id: int
) -> list[Tensor]:
    """Log-probabilities of each completion's tokens, on the CPU, without gradient and without dropout.

    Args:
        model: A causal language model, wrapped or not; its mode is restored.
        completions: What to evaluate, on any number of rows.
        temperature: The sampling temperature.
        batch_size: Rows per forward.
        pad_token_id: Any valid token.

    Returns:
        For each completion a tensor of shape (its number of tokens,), float32, 0 where its mask is False.
    """
    device = next(model.parameters()).device
    logps: list[Tensor] = []
    with evaluation_mode(model):
        for start in range(0, len(completions), batch_size):
            batch = completions[start : start + batch_size]
            piece = make_piece(batch, num_completions=len(batch), pad_token_id=pad_token_id, device=device)
            scores_BT = score(model, piece, temperature).logps_BT.cpu()
            logps += [row[: len(c.ids)].clone() for row, c in zip(scores_BT, batch, strict=True)]
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


def _token_logps(logits_BKV: Tensor, labels_BK: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each label, and the detached entropy, both of shape (B, K), float32."""
    logits_BKV = logits_BKV.float() if temperature == 1 else logits_BKV.float() / temperature
    normaliser_BK = logits_BKV.logsumexp(-1)
    logps_BK = logits_BKV.gather(-1, labels_BK.unsqueeze(-1)).squeeze(-1) - normaliser_BK
    with torch.no_grad():
        entropy_BK = torch.special.entr(logits_BKV.softmax(-1)).sum(-1)
    return logps_BK, entropy_BK


def _takes_logits_to_keep(model: Any) -> bool:
    """Whether some module on the way from the wrapper to the language model names `logits_to_keep` in its forward."""
    while True:
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            return True
        inner = getattr(model, "module", None) or (model.get_base_model() if hasattr(model, "get_base_model") else None)
        if not isinstance(inner, nn.Module) or inner is model:
            return False
        model = inner
