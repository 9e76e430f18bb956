"""Collectives over Python objects, and errors that reach every rank."""

import pickle
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import distributed

from ..errors import OutOfStep, RunStopped, StopRequested
from ..types import Ranks


Result = TypeVar("Result")


class _Report(NamedTuple):
    """What a rank tells the others about its error."""

    rank: int
    kind: Literal["stop", "guard", "error"]
    text: str


def run_on_all_ranks(work: Callable[[], Result], ranks: Ranks) -> Result:
    """Run `work()` on every rank, and raise what any rank raises on all of them, so that none waits for it.

    Args:
        work: Contains no collective at a point where it may raise another error than `OutOfStep`.
        ranks: Gathers once.

    Raises:
        StopRequested: A signal has reached some rank.
        RunStopped: Every rank that failed raised one, so all ranks can save together.
        OutOfStep: At once, since the others do not get here.
        RuntimeError: Another rank raised another error; a rank's own errors are raised unchanged.
    """
    error: BaseException | None = None
    try:
        result = work()
    except OutOfStep:
        raise
    except (Exception, StopRequested) as raised:
        error = raised
    reports = [report for report in ranks.gather([_report(error, ranks.rank)]) if report is not None]
    failures = [report for report in reports if report.kind != "stop"]
    all_guards = all(report.kind == "guard" for report in failures)  # saving takes all ranks, or none
    if isinstance(error, RunStopped) and not all_guards:
        raise RuntimeError(str(error)) from error
    if error is not None and (not failures or not isinstance(error, StopRequested)):
        raise error
    if failures:
        raise (RunStopped if all_guards else RuntimeError)(f"Rank {failures[0].rank}: {failures[0].text}")
    if reports:
        raise StopRequested(f"rank {reports[0].rank} was asked to stop")
    return result


def _report(error: BaseException | None, rank: int) -> _Report | None:
    if error is None:
        return None
    if isinstance(error, StopRequested):
        return _Report(rank, "stop", repr(error))
    return _Report(rank, "guard" if isinstance(error, RunStopped) else "error", repr(error))


def exchange(outgoing: list[Any], device: torch.device) -> list[Any]:
    """Send one object to each rank, and return what each rank sent to this one, in the order of ranks. A collective.

    Args:
        outgoing: One object per rank, which pickle accepts.
        device: One that the process group serves.
    """
    sent = [torch.frombuffer(bytearray(pickle.dumps(item)), dtype=torch.uint8) for item in outgoing]
    sizes = torch.tensor([len(data) for data in sent], device=device)
    sizes_received = torch.empty_like(sizes)
    distributed.all_to_all_single(sizes_received, sizes)
    counts = sizes_received.tolist()
    received = torch.empty(sum(counts), dtype=torch.uint8, device=device)
    distributed.all_to_all_single(received, torch.cat(sent).to(device), counts, sizes.tolist())
    return [pickle.loads(data.cpu().numpy().tobytes()) for data in received.split(counts)]
