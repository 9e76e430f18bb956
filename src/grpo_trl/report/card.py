"""The model card."""

from pathlib import Path

from ..objective import ObjectiveOptions, make_objective


def append_objective(card: Path, options: ObjectiveOptions) -> None:
    """Add the training objective and its papers to a model card, where there is one."""
    if not card.exists():
        return
    names = ("loss_level", "loss_type", "importance_sampling_level")
    settings = [f'{name}="{getattr(options, name)}"' for name in names if getattr(options, name) is not None]
    papers = [f"[arXiv {number}](https://arxiv.org/abs/{number})" for number in make_objective(options).papers]
    text = f"GRPO, `{', '.join(settings)}` ({' and '.join(papers)}), with grpo_trl."
    card.write_text(f"{card.read_text()}\n## Training objective\n\n{text}\n")
