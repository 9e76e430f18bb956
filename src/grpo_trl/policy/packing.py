"""What one forward and backward sees.

Axes: B completions of the piece, S tokens of prompt and completion, T completion tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .completion import Completion


@dataclass(frozen=True)
class Piece:
    """Some completions of an optimizer step as padded tensors.

    A row holds prompt, completion, padding, in this order: under causal attention padding on the right changes nothing
    on its left, so that no attention mask and no positions are needed.
    """

    input_ids_BS: Tensor
    prompt_lengths_B: Tensor
    shortest_prompt: int
    mask_BT: Tensor
    """True for trained tokens."""
    advantages_B: Tensor
    old_logps_BT: Tensor | None
    ref_logps_BT: Tensor | None
    sampler_logps_BT: Tensor | None
    num_completions: int
    """Completions of the whole optimizer step on all ranks: what the loss is divided by."""


def make_piece(
    completions: Sequence[Completion],
    *,
    num_completions: int,
    pad_token_id: int,
    device: torch.device | str = "cpu",
) -> Piece:
    """Pad `completions` into one piece on `device`.

    Args:
        completions: At least one.
        num_completions: Completions of the whole optimizer step on all ranks.
        pad_token_id: Any valid token; its logits are computed and never read.
        device: Where the tensors go.
    """
    width = max(1, max(len(c.ids) for c in completions))

    def stack(values: list[Tensor] | None) -> Tensor | None:
        if values is None:
            return None
        return _right_pad([torch.as_tensor(v, dtype=torch.float32) for v in values], width, 0.0).to(device)

    def optional(name: str) -> list[Tensor] | None:
        values = [getattr(c, name) for c in completions]
        return None if any(v is None for v in values) else values

    rows = [torch.tensor(c.prompt_ids + c.ids) for c in completions]
    return Piece(
        input_ids_BS=_right_pad(
            rows, max(len(c.prompt_ids) + max(1, len(c.ids)) for c in completions), pad_token_id
        ).to(device),
        shortest_prompt=min(len(c.prompt_ids) for c in completions),
        prompt_lengths_B=torch.tensor([len(c.prompt_ids) for c in completions], device=device),
        mask_BT=_right_pad([torch.tensor(c.mask, dtype=torch.bool) for c in completions], width, False).to(device),
        advantages_B=torch.tensor([c.advantage for c in completions], dtype=torch.float32, device=device),
        old_logps_BT=stack(optional("old_logps")),
        ref_logps_BT=stack(optional("ref_logps")),
        sampler_logps_BT=stack(optional("sampler_logps")),
        num_completions=num_completions,
    )


def _right_pad(rows: list[Tensor], width: int, value: float) -> Tensor:
    padded = rows[0].new_full((len(rows), width), value)
    for row, values in enumerate(rows):
        padded[row, : len(values)] = values
    return padded
