"""The curves of a run as a picture."""

from pathlib import Path


CURVES = (
    ("reward", "reward"),
    ("eval_reward", "reward, held out"),
    ("policy_signal", "size of the policy gradient's signal"),
    ("frac_reward_zero_std", "share of groups with equal rewards"),
    ("completions/mean_length", "tokens per completion"),
    ("entropy", "entropy (nats)"),
    ("kl", "KL to the reference (nats)"),
    ("grad_norm", "norm of the gradient"),
    ("step_time", "seconds per step"),
)
"""Metrics that are drawn, where the log has them, and their titles."""


def plot_run(log_history: list[dict[str, float]], path: str | Path, title: str = "") -> None:
    """Draw the curves of a run as a PNG.

    Args:
        log_history: `trainer.state.log_history`.
        path: Where the picture goes; the folder is made.
        title: Stands above it.

    Raises:
        ValueError: The log has none of the metrics in `CURVES`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [(name, label) for name, label in CURVES if any(name in entry for entry in log_history)]
    if not drawn:
        raise ValueError(
            "log_history holds none of the metrics that are drawn; train for at least logging_steps steps."
        )
    columns = min(3, len(drawn))
    lines = -(-len(drawn) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (name, label) in enumerate(drawn, start=1):
        axes = figure.add_subplot(lines, columns, place)
        points = [(entry["step"], entry[name]) for entry in log_history if name in entry]
        axes.plot(*zip(*points, strict=True), marker="o" if len(points) < 15 else None, markersize=3, linewidth=1.4)
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("optimizer step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
