"""The report: one HTML page about one or several runs, with all that it needs inside.

Charts are plotly's. Text of completions travels as JSON and is shown as text, never parsed as HTML; a content security
policy keeps the page from any request.
"""

import json
import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from .groups import MOST_CHARACTERS, MOST_COMPLETIONS, evaluations_of, groups_of, stride
from .log import plain
from .run import Run
from .tolerant import clean


CHARTS: tuple[dict[str, Any], ...] = (
    {
        "title": "Reward",
        "hint": "mean; band: 10th to 90th percentile",
        "metrics": ["reward"],
        "band": ["reward/quantile_10", "reward/quantile_90"],
    },
    {"title": "Held-out reward", "hint": "mean over the evaluation set", "metrics": ["eval_reward"]},
    {"title": "Rewards by function", "hint": "mean", "metrics": "rewards/*/mean"},
    {"title": "Groups with equal rewards", "hint": "share; they teach nothing", "metrics": ["frac_reward_zero_std"]},
    {
        "title": "Policy signal",
        "hint": "0: nothing can be learned from these completions",
        "metrics": ["policy_signal"],
    },
    {"title": "KL to the reference", "hint": "nats", "metrics": ["kl"]},
    {"title": "Entropy", "hint": "nats per token", "metrics": ["entropy"]},
    {
        "title": "Completion length",
        "hint": "tokens; band: shortest to longest",
        "metrics": ["completions/mean_length"],
        "band": ["completions/min_length", "completions/max_length"],
    },
    {"title": "Cut off", "hint": "share at max_completion_length", "metrics": ["completions/clipped_ratio"]},
    {
        "title": "Clipped ratios",
        "hint": "share below and above the bounds",
        "metrics": ["clip_ratio/low_mean", "clip_ratio/high_mean"],
    },
    {"title": "Gradient norm", "hint": "before clipping", "metrics": ["grad_norm"]},
    {"title": "Loss", "hint": "near 0 on policy; see the policy signal", "metrics": ["loss"]},
    {"title": "Seconds per step by phase", "hint": "stacked", "metrics": "time/*", "stack": True},
    {"title": "Sampling speed", "hint": "tokens per second and rank", "metrics": ["sampling/tokens_per_second"]},
    {
        "title": "Sampler and trainer differ by",
        "hint": "nats per token",
        "metrics": ["sampling/sampling_logp_difference/mean"],
    },
    {"title": "Peak memory", "hint": "GiB of the first rank", "metrics": ["memory/peak_gib"]},
    {"title": "Learning rate", "metrics": ["learning_rate"]},
)


def write_report(folders: Sequence[str | Path], path: str | Path) -> Path:
    """Write a page about the runs in `folders`: curves, completions, evaluations, plan, options.

    Args:
        folders: Output directories; the runs are compared if there are several.
        path: The file to write; its folder is made.

    Returns:
        The path.

    Raises:
        ValueError: A folder holds no log of a run.
        ImportError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError("The report needs plotly: pip install 'grpo_trl[report]'.") from error
    runs = [Run.read(folder) for folder in folders]
    _tell_apart(runs)
    data = _page_data(runs, [Path(folder) for folder in folders])
    page = resources.files(__package__) / "page"
    text = Template((page / "page.html").read_text(encoding="utf-8")).substitute(
        title=_as_html(" / ".join(run.name for run in runs)),
        style=(page / "page.css").read_text(encoding="utf-8"),
        script=(page / "page.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs().replace("</script", "<\\/script"),
        data=_as_script(data),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _tell_apart(runs: list[Run]) -> None:
    """Number runs whose folders have the same name."""
    names = [run.name for run in runs]
    for number, run in enumerate(runs, start=1):
        run.name = clean(run.name if names.count(run.name) == 1 else f"{run.name} ({number})")


def _as_html(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _as_script(data: Any) -> str:
    """JSON that no HTML parser sees an end of script or a comment in."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def _page_data(runs: list[Run], folders: list[Path]) -> dict[str, Any]:
    groups = [groups_of(folder, run) for folder, run in zip(folders, runs, strict=True)]
    evaluations = [evaluations_of(folder, run) for folder, run in zip(folders, runs, strict=True)]
    counts = [sum(len(group["rows"]) for group in of_run) for of_run in groups]
    _thin_out(groups, evaluations)
    series = [_series(run) for run in runs]
    names = list(dict.fromkeys(name for of_run in series for name in of_run))
    charts = [chart | {"metrics": _matching(chart["metrics"], names)} for chart in CHARTS]
    charted = {name for chart in charts for name in [*chart["metrics"], *chart.get("band", [])]}
    return {
        "runs": [
            {
                "name": run.name,
                "step": run.step,
                "max_steps": run.max_steps,
                "over": clean(run.over),
                "model": clean(str(run.environment.get("model", ""))),
                "seconds": run.entries[-1]["time"] - run.started if run.entries else None,
                "series": series[r],
                "groups": groups[r],
                "completion_count": counts[r],
                "evaluations": evaluations[r],
                "planned": planned_and_measured(run),
                "setup": _flat(run.config | run.environment),
            }
            for r, run in enumerate(runs)
        ],
        "charts": charts,
        "others": sorted(name for name in names if name not in charted),
    }


def _thin_out(groups: list[list[dict[str, Any]]], evaluations: list[list[dict[str, Any]]]) -> None:
    """Leave out groups evenly, so that the page stays within its bounds; a quarter of it is for evaluations."""
    kept = stride([group for of_run in groups for group in of_run], MOST_COMPLETIONS, MOST_CHARACTERS)
    for of_run in groups:
        of_run[:] = of_run[::kept]
    every = [evaluation["pairs"] for of_run in evaluations for evaluation in of_run]
    kept = stride([pair for pairs in every for pair in pairs], MOST_COMPLETIONS // 4, MOST_CHARACTERS // 4)
    for pairs in every:
        pairs[:] = pairs[::kept]


def _series(run: Run) -> dict[str, tuple[list[int], list[Any]]]:
    """Steps and values of each metric; values that are not finite are gaps."""
    names = dict.fromkeys(name for entry in run.entries for name in entry if name not in ("time", "step"))
    series = {name: run.series(name) for name in names}
    return {
        clean(name): (steps, [value if math.isfinite(value) else None for value in values])
        for name, (steps, values) in series.items()
        if steps
    }


def _matching(metrics: str | list[str], names: list[str]) -> list[str]:
    """A list as it is; of a pattern with one star, the names that match."""
    if not isinstance(metrics, str):
        return metrics
    head, tail = metrics.split("*")
    return [name for name in names if name.startswith(head) and name.endswith(tail)]


def planned_and_measured(run: Run) -> list[tuple[str, Any, Any]]:
    """Set side by side what a run was planned to take and what it took: a name, the plan, the measurement."""
    on_gpu = bool(run.environment.get("hardware", {}).get("accelerators"))
    measured = {
        "peak memory (GiB)": run.last("memory/peak_gib") if on_gpu else None,  # of a CPU: that of all libraries, too
        "seconds per optimizer step": _median(run.series("step_time")[1]),
    }
    planned = run.plan.get("summary")
    if not planned:
        return []
    return [(name, plain(value), plain(measured.get(name))) for name, value in planned.items()]


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options of nested dictionaries, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[clean(prefix + name)] = clean(value) if isinstance(value, str) else plain(value)
    return flat
