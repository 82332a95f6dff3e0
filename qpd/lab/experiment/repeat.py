"""What the trials of two runs of one seed have in common: queue pairs, times of faults, paths. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qpd.lab.experiment.raw import Row

Tables = Mapping[str, Sequence[Row]]


@dataclass
class Common:
    """Counts over the trials that went well in both runs."""

    trials: int = 0
    queue_pairs: int = 0
    """Trials with the same queue pair numbers and UDP source ports."""
    fault_times: int = 0
    """Trials with the same faults planned at the same times."""
    same_path: int = 0
    """Queue pairs that were seen first on the same uplink of their leaf in both; of `seen`."""
    seen: int = 0


def common(one: Tables, other: Tables) -> dict[str, Common]:
    """By condition."""
    first, second = _trials(one), _trials(other)
    found: dict[str, Common] = {}
    for key, row in first.items():
        if key not in second:
            continue
        count = found.setdefault(key[0], Common())
        pair = ((one, row["trial"]), (other, second[key]["trial"]))
        count.trials += 1
        mine, theirs = (_rows(tables, "qps", number) for tables, number in pair)
        count.queue_pairs += _chosen(mine) == _chosen(theirs)
        planned, planned_too = (_planned(_rows(tables, "faults", number)) for tables, number in pair)
        count.fault_times += planned == planned_too
        links, links_too = (_first_links(tables, number) for tables, number in pair)
        both = links.keys() & links_too.keys()
        count.seen += len(both)
        count.same_path += sum(links[qp] == links_too[qp] for qp in both)
    return found


def _trials(tables: Tables) -> dict[tuple[str, str, int], Row]:
    return {
        (row["condition"], row["sweep"], row["repetition"]): row
        for row in tables["trials"]
        if row["status"] == "ok"
    }


def _rows(tables: Tables, name: str, trial: int) -> list[Row]:
    return [row for row in tables[name] if row["trial"] == trial]


def _chosen(qps: Sequence[Row]) -> set[tuple[Any, ...]]:
    return {(row["source"], row["destination"], row["qp"], row["source_port"]) for row in qps}


def _planned(faults: Sequence[Row]) -> list[tuple[str, float]]:
    return sorted((row["fault"], float(row["planned_s"])) for row in faults)


def _first_links(tables: Tables, trial: int) -> dict[tuple[str, int], str]:
    leaf = {row["link"] for row in _rows(tables, "loads", trial) if row["tier"] == "leaf"}
    data = {(row["destination"], row["qp"]) for row in _rows(tables, "qps", trial)}
    found: dict[tuple[str, int], str] = {}
    for row in sorted(_rows(tables, "paths", trial), key=lambda row: float(row["time_s"])):
        key = (row["destination"], row["qp"])
        if row["link"] in leaf and key in data:
            found.setdefault(key, row["link"])
    return found
