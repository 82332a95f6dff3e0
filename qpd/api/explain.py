"""Why a queue pair uses its path, or which one it would use: the facts that decided, in the order in which they did.

Pure; the choices themselves are those of :mod:`qpd.core.slots`, which the classifier makes alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qpd.api.schemas import ExplainStep, Explanation, QpRow
from qpd.core.slots import choose, place, qp_hash, slot_of, source_port_of
from qpd.model import NO_PATH, SLOTS, Address, Group, Network, Path, Placement, QueuePairKey


@dataclass(frozen=True, slots=True)
class Case:
    """What is known when the question is put.

    ``prefix``, ``group``: the route that covers ``destination`` (the outer address) and its paths; None: no route does.
    ``order``: path ids of the QP's slot, best first, padding allowed. ``living``: bits of the paths that serve.
    ``homes``: active QPs that send, by home. ``row``: the QP where it has been seen, with ``home_id``, the id of its
    home; not ``counted``: it has only answered so far, and is none of ``homes``. ``reverse``: its other direction,
    where that is known.
    """

    key: QueuePairKey
    destination: Address
    prefix: Network | None
    group: Group | None
    order: Sequence[int]
    paths: Mapping[int, Path]
    living: int
    homes: Mapping[int, int]
    placement: Placement
    row: QpRow | None = None
    home_id: int | None = None
    counted: bool = True
    reverse: QpRow | None = None


def explain(case: Case) -> Explanation:
    """The answer to ``qpctl explain``."""
    hash_ = qp_hash(case.key)
    order = [id_ for id_ in case.order if id_ != NO_PATH and id_ in case.paths]
    members = 0 if case.group is None else case.group.members
    usable = members & case.living
    home, path = _choice(case, order, usable)
    steps = _steps(case, order, usable)
    return {
        "seen": case.row is not None,
        "fields": {"vni": case.key.vni, "dst": str(case.key.dst), "dest_qp": case.key.dest_qp},
        "destination": str(case.destination),
        "prefix": None if case.prefix is None else str(case.prefix),
        "group": None if case.group is None else case.group.id,
        "hash": hash_,
        "slot": slot_of(hash_),
        "source_port": source_port_of(hash_),
        "order": steps,
        "home": _name(case, home),
        "path": _name(case, path),
        "why": _why(case, steps, home, path),
        "qp": case.row,
        "fares": [] if case.row is None else _fares(case, case.row, path),
        "reverse": case.reverse,
    }


def _choice(case: Case, order: Sequence[int], usable: int) -> tuple[int | None, int | None]:
    """Home and path of the QP's next packet."""
    if case.group is None:
        return case.home_id, None
    if case.row is None:
        home = place(order, usable, case.placement, _Homes(case.homes), case.group.weights)
        return home, home
    if case.home_id is not None and usable >> case.home_id & 1:
        return case.home_id, case.home_id
    return case.home_id, choose(order, usable)


class _Homes(dict[int, int]):
    """Paths without active QPs hold none."""

    def __missing__(self, path: int) -> int:
        return 0


def _steps(case: Case, order: Sequence[int], usable: int) -> list[ExplainStep]:
    weights = {} if case.group is None else case.group.weights
    candidates = [id_ for id_ in order if usable >> id_ & 1]
    total = sum(weights[id_] for id_ in candidates)
    active = sum(case.homes.get(id_, 0) for id_ in candidates) + 1
    steps: list[ExplainStep] = []
    for number, id_ in enumerate(order, 1):
        path = case.paths[id_]
        bounded = case.placement is Placement.BALANCED and id_ in candidates
        steps.append(
            {
                "place": number,
                "path": path.name,
                "plane": path.plane,
                "weight": weights.get(id_, path.weight),
                "member": id_ in weights,
                "state": path.state.value,
                "reason": path.reason.value,
                "homes": case.homes.get(id_, 0),
                "share": -(-active * weights[id_] // total) if bounded else None,
            }
        )
    return steps


def _name(case: Case, id_: int | None) -> str | None:
    path = None if id_ is None else case.paths.get(id_)
    return None if path is None else path.name


def _why(case: Case, steps: Sequence[ExplainStep], home: int | None, path: int | None) -> list[str]:
    key, hash_ = case.key, qp_hash(case.key)
    name = f"VNI {key.vni}, destination {key.dst} and destination QP {key.dest_qp:#x}"
    sentences = [f"{name} hash to {hash_:#010x}: slot {slot_of(hash_)} of {SLOTS}."]
    if case.group is None:
        sentences.append(
            f"No route by an uplink covers the outer destination {case.destination}: "
            "its packets pass untouched, the kernel's own choice."
        )
        return sentences
    names = ", ".join(step["path"] for step in steps if step["member"]) or "no path"
    sentences.append(
        f"{case.prefix} covers the outer destination {case.destination}; its next hops are {names}."
    )
    if path is None:
        sentences.append("None of them serves: its packets pass untouched, the kernel's own choice.")
    if case.row is None:
        sentences += _unseen(case, steps, path)
    else:
        preferred = choose(case.order, case.group.members & case.living)
        sentences += _seen(case, case.row, home, path, preferred)
    return sentences


def _unseen(case: Case, steps: Sequence[ExplainStep], path: int | None) -> list[str]:
    if path is None:
        return ["It has not been seen, so it has no home yet."]
    chosen = case.paths[path].name
    sentences = []
    for step in steps:
        if step["path"] == chosen:
            break
        if not step["member"]:
            passed = "is no next hop of this route"
        elif step["share"] is None and not _lives(case, step["path"]):
            passed = _state(step["state"], step["reason"])
        else:
            passed = f"already is home to {_senders(step['homes'])}, its share is {step['share']}"
        sentences.append(f"{step['path']} is preferred but {passed}: passed over.")
    sentences.append(f"It has not been seen; if its first packet came now, {chosen} would become its home.")
    return sentences + _unseen_answer(case, chosen)


def _unseen_answer(case: Case, chosen: str) -> list[str]:
    usable = 0 if case.group is None else case.group.members & case.living
    preferred = _name(case, choose(case.order, usable))
    return [] if preferred == chosen else [f"A first packet that only answers would make it {preferred}."]


def _seen(case: Case, row: QpRow, home: int | None, path: int | None, preferred: int | None) -> list[str]:
    if home is None or home not in case.paths:
        known = "Its home is a path that is no more."
    else:
        known = f"Its home has been {case.paths[home].name} since its first packet, {_ago(row['age_s'])} ago."
    sentences = [known]
    if not case.counted and case.placement is Placement.BALANCED:
        sentences.append(
            "It has only sent answers so far (ACKs, NAKs, CNPs): it began where its slot's order says; "
            "no share counts it."
        )
    if path is not None and path == home:
        sentences.append(f"{case.paths[path].name} serves, so its packets take it.")
        if preferred != path and preferred is not None:
            sentences.append(
                f"{case.paths[preferred].name} comes first in its slot's order now; a home is kept all the same."
            )
    elif path is not None:
        sentences.append(
            f"{_absence(case, home)}, so its packets take {case.paths[path].name}, the first in its slot's order "
            "that serves" + (", and go home when it serves again." if _member(case, home) else ".")
        )
    used = _name(case, path)
    if row["path"] != used and row["path"] is not None:
        sentences.append(f"Its last packet, {_ago(row['idle_s'])} ago, still took {row['path']}.")
    return sentences


def _fares(case: Case, row: QpRow, path: int | None) -> list[str]:
    """What happened to its packets, and what is known of the other direction."""
    return [_losses(row), *_congestion(row), _pair(case, row, path), *_round_trip(row)]


def _losses(row: QpRow) -> str:
    sent = _packets(row["packets"])
    if row["lost_at_host"] is None:
        if row["transport"] == "ud":
            return f"{sent} left; datagrams do not tell whether one is missing."
        return f"{sent} left, acknowledgements and the like, which do not tell whether one is missing."
    before = f"{row['lost_at_host'] or 'none'} of them lost before this leaf"
    if row["lost"] is None:
        return f"{sent} left, {before}; nothing is sent again, so what is lost behind it does not show here."
    again = f", {row['retransmitted']} sent again" if row["retransmitted"] else ""
    return f"{sent} left{again}; {before}, {row['lost'] or 'none'} in the fabric behind it."


def _congestion(row: QpRow) -> list[str]:
    counted = (row["naks"], "NAK"), (row["cnps"], "CNP"), (row["ecn_marked"], "ECN CE mark")
    seen = [f"{count} {name}{'' if count == 1 else 's'}" for count, name in counted if count]
    return [f"Among them: {', '.join(seen)}."] if seen else []


def _pair(case: Case, row: QpRow, path: int | None) -> str:
    if row["peer_qp"] is None:
        return "Which QP speaks with it is not known: its packets have not shown it for sure."
    peer = f"QP {row['peer_qp']:#x} of {row['src']} speaks with it"
    if case.reverse is None or case.reverse["path"] is None:
        return f"{peer}; what it is sent has not arrived by an uplink."
    planes = {known.name: known.plane for known in case.paths.values()}
    arrives = case.reverse["path"]
    used = _name(case, path)
    if used is None or planes.get(arrives) != planes.get(used):
        return f"{peer}; the other direction arrives by {arrives}."
    return f"{peer}; the other direction arrives by {arrives}, on the same plane."


def _round_trip(row: QpRow) -> list[str]:
    if row["rtt_us"] is None or row["rtt_min_us"] is None or row["rtt_mean_us"] is None:
        return []
    last, least, mean = (f"{row[key]:.4g} us" for key in ("rtt_us", "rtt_min_us", "rtt_mean_us"))
    count = row["rtt_samples"]
    return [
        f"Its round trips take {last} (the last one), {least} at least and {mean} in the mean of {count}."
    ]


def _packets(count: int) -> str:
    return "1 packet" if count == 1 else f"{count} packets"


def _absence(case: Case, home: int | None) -> str:
    if home is None or home not in case.paths:
        return "That path is gone"
    name = case.paths[home].name
    if not _member(case, home):
        return f"{name} no longer is a next hop of this route"
    path = case.paths[home]
    return f"{name} {_state(path.state.value, path.reason.value)}"


def _member(case: Case, id_: int | None) -> bool:
    return id_ is not None and case.group is not None and id_ in case.group.weights


def _lives(case: Case, name: str) -> bool:
    return any(path.name == name and case.living >> id_ & 1 for id_, path in case.paths.items())


def _state(state: str, reason: str) -> str:
    if state == "up":  # the kernel's tap was quicker than the daemon
        return "does not live in the kernel's word"
    said = {"hold": "is held up", "down": "is down", "drained": "is drained"}[state]
    return f"{said} ({reason})" if reason and reason != state else said


def _senders(qps: int) -> str:
    return "1 QP that sends" if qps == 1 else f"{qps} QPs that send"


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
