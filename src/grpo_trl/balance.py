"""Completions move between ranks once they are written and their sizes known, so that no rank waits long for another."""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from .policy import Completion, Packer, by_prompt, deal


@dataclass
class Balancer:
    """Moves completions between ranks, in step with the other ranks.

    Args:
        rank: Of this process.
        gather: From a list of objects on this rank to the concatenated lists of all ranks.
        exchange: From one parcel for each rank to the parcels that all ranks have for this one.
    """

    rank: int
    gather: Callable[[list[Any]], list[Any]]
    exchange: Callable[[list[Any]], list[Any]]

    def balance(
        self, parts: Sequence[Sequence[Completion]], trains: Callable[[Completion], bool], packer: Packer
    ) -> list[list[Completion]]:
        """This rank's share of each part of a window, after those that train were dealt anew among ranks.

        Args:
            parts: This rank's share before; work moves within a part.
            trains: Whether a completion is computed at all; others stay.
            packer: Knows what a group costs.
        """
        groups = [_groups(part, trains) for part in parts]
        sizes = [
            [packer.group_size([part[i] for i in group]) for group in groups_of_part]
            for part, groups_of_part in zip(parts, groups, strict=True)
        ]
        reports = self.gather([sizes])
        parcels: list[list[list[Completion]]] = [[[] for _ in parts] for _ in reports]
        shares, moves = [], False
        for place, part in enumerate(parts):
            held = deal([report[place] for report in reports])
            moves |= any(home != rank for rank, holding in enumerate(held) for home, _ in holding)
            sent = set()
            for rank, holding in enumerate(held):
                for (home, group), members in sorted(holding.items()):
                    if home == self.rank != rank:
                        indices = [groups[place][group][member] for member in members]
                        parcels[rank][place] += [part[i] for i in indices]
                        sent |= set(indices)
            shares.append([completion for i, completion in enumerate(part) if i not in sent])
        for parcel in self.exchange(parcels) if moves else ():
            for share, received in zip(shares, parcel, strict=True):
                share += received
        return shares


def exchange(parcels: list[Any], device: torch.device) -> list[Any]:
    """What every rank has for this one, in the order of ranks; `parcels` has one object for each rank. A collective.

    Args:
        parcels: What pickle takes.
        device: One that the process group serves.
    """
    sent = [torch.frombuffer(bytearray(pickle.dumps(parcel)), dtype=torch.uint8) for parcel in parcels]
    sizes = torch.tensor([len(data) for data in sent], device=device)
    sizes_received = torch.empty_like(sizes)
    distributed.all_to_all_single(sizes_received, sizes)
    counts = sizes_received.tolist()
    received = torch.empty(sum(counts), dtype=torch.uint8, device=device)
    distributed.all_to_all_single(received, torch.cat(sent).to(device), counts, sizes.tolist())
    return [pickle.loads(data.cpu().numpy().tobytes()) for data in received.split(counts)]


def _groups(part: Sequence[Completion], trains: Callable[[Completion], bool]) -> list[list[int]]:
    """Indices of the completions that train, by prompt."""
    indices = [i for i, completion in enumerate(part) if trains(completion)]
    return [[indices[j] for j in group] for group in by_prompt([part[i] for i in indices])]
