"""The model card."""

from pathlib import Path


PAPERS = {"token": ["2402.03300"], "sequence": ["2405.04434", "2412.19437"]}
"""The papers of each `loss_level`, by their number on arXiv."""


def append_objective(card: Path, loss_level: str) -> None:
    """Add the training objective and its papers to a model card, where there is one."""
    if card.exists():
        papers = " and ".join(f"[arXiv {number}](https://arxiv.org/abs/{number})" for number in PAPERS[loss_level])
        text = f'GRPO, `loss_level="{loss_level}"` ({papers}), with grpo_trl.'
        card.write_text(f"{card.read_text()}\n## Training objective\n\n{text}\n")
