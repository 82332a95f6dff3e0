"""The registry of paths: ids for life, names from the peers, planes, and the order in which slot tables know them."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping

from qpd.core.config import PlannerConfig
from qpd.core.health import Grayness, Health
from qpd.core.routes import Legs
from qpd.model import PATHS_MAX, Address, NextHopKey, Path, PathState, Reason


class PathRecord:
    """What the planner knows of one path."""

    __slots__ = (
        "addresses",
        "bfd_up_since",
        "dead_legs",
        "disagreed",
        "drained",
        "fib_dead",
        "gray",
        "health",
        "host_name",
        "id",
        "ifindex",
        "key",
        "legs",
        "linger_until",
        "name",
        "plane",
        "reason",
        "served",
        "since",
        "state",
        "tap_at",
        "tap_down",
        "tap_holds_since",
        "tapped",
        "uses",
        "weight",
    )

    def __init__(self, path_id: int, key: NextHopKey, config: PlannerConfig, now: float) -> None:
        self.id = path_id
        self.key = key
        """Interface, and the address that packets are sent to."""
        self.addresses: dict[Address, str] = {key.address: ""}
        """All addresses of the neighbour, with the MAC that each had last ('': never known)."""
        self.uses: Counter[Address] = Counter()
        """How many legs have each address as their next hop; none that is not used."""
        self.ifindex = 0
        self.host_name: str | None = None
        self.name = key.interface
        self.plane = key.interface
        self.weight: int | None = None
        """The configured weight; None: the routes' own."""
        self.health = Health(config)
        self.state = PathState.DOWN
        self.reason = Reason.NO_ROUTE
        self.since = now
        self.drained = False
        self.legs: dict[Legs, None] = {}
        """The sets of next hops that it is one of, in the order in which they came: ids must not hang on hashes."""
        self.dead_legs: set[Legs] = set()
        self.linger_until: float | None = None
        self.tap_down: Reason | None = None
        """What the kernel's BFD tap has against it."""
        self.tap_holds_since: float | None = None
        """bfdd has said Up since then, while the tap still holds the path down."""
        self.tap_at = 0.0
        self.tapped = False
        """The tap has reported of it at least once."""
        self.disagreed = 0
        """How often in a row tap and bfdd differed when bfdd was read."""
        self.bfd_up_since: float | None = None
        """What the tap's last report says of when its session came Up; until it has been judged."""
        self.fib_dead = False
        """The main table cannot know that it is dead: BFD or the neighbour told, and it has not served since."""
        self.gray = Grayness(config)
        self.served = False
        """It was in the word of living paths: QPs may call it their home."""


class Registry:
    """All known paths by any of their addresses. Ids are bits of the word of living paths: 0 to 63."""

    def __init__(self, config: PlannerConfig) -> None:
        self._config = config
        self._by_key: dict[NextHopKey, PathRecord] = {}
        self._by_id: dict[int, PathRecord] = {}
        # An id that was given back is the last to be given again: QPs may still call it their home.
        self._free = deque(range(PATHS_MAX))
        self._returned: list[int] = []
        self._on: dict[str, dict[PathRecord, None]] = {}

    def __iter__(self) -> Iterator[PathRecord]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, key: NextHopKey) -> PathRecord | None:
        """The path that has this address on this interface."""
        return self._by_key.get(key)

    def on(self, interface: str) -> Collection[PathRecord]:
        """The paths on an interface, the eldest first."""
        return self._on.get(interface, {}).keys()

    def by_id(self, path_id: int) -> PathRecord | None:
        """The path of this id."""
        return self._by_id.get(path_id)

    def add(self, key: NextHopKey, now: float, path_id: int | None = None) -> PathRecord | None:
        """A new path, with this id or the next free one; None: there is no free id."""
        if path_id is None:
            if not self._free:
                return None
            path_id = self._free.popleft()
        else:
            self._free.remove(path_id)
        record = PathRecord(path_id, key, self._config, now)
        self._by_key[key] = self._by_id[path_id] = record
        self._on.setdefault(key.interface, {})[record] = None
        return record

    def attach(self, record: PathRecord, address: Address) -> None:
        """The path's neighbour has this address, too; it must be no path's yet."""
        record.addresses[address] = ""
        self._by_key[NextHopKey(record.key.interface, address)] = record

    def detach(self, record: PathRecord, address: Address) -> None:
        """Forget one of a path's other addresses."""
        del record.addresses[address]
        del self._by_key[NextHopKey(record.key.interface, address)]

    def remove(self, record: PathRecord) -> None:
        """Forget a path; its id is free after ``recycle``."""
        for address in record.addresses:
            del self._by_key[NextHopKey(record.key.interface, address)]
        del self._by_id[record.id]
        del self._on[record.key.interface][record]
        self._returned.append(record.id)

    def recycle(self) -> bool:
        """Let the ids of removed paths be given again; True: there are any."""
        returned = bool(self._returned)
        self._free.extend(self._returned)
        self._returned.clear()
        return returned

    def sole(self, record: PathRecord) -> bool:
        """Whether it is the only path on its interface."""
        return len(self._on[record.key.interface]) == 1

    def rename(self) -> list[PathRecord]:
        """Give all paths their names, planes and configured weights; those that changed."""
        names = self._names()
        changed = []
        for record in self:
            name = names[record.key]
            base = record.host_name or record.key.interface
            words = (name, record.key.interface, base)
            plane = next((self._config.planes[word] for word in words if word in self._config.planes), name)
            weight = next(
                (self._config.weights[word] for word in words if word in self._config.weights), None
            )
            if (record.name, record.plane, record.weight) != (name, plane, weight):
                record.name, record.plane, record.weight = name, plane, weight
                changed.append(record)
        return changed

    def _names(self) -> Mapping[NextHopKey, str]:
        """Peer's host name, else interface; where that would be said of several, each says more."""
        base = {record.key: record.host_name or record.key.interface for record in self}
        names = dict(base)
        for longer in (
            {key: f"{name}:{key.interface}" for key, name in base.items()},
            {key: f"{name}:{key.address}" for key, name in base.items()},
            {key: f"{name}:{key}" for key, name in base.items()},
        ):
            uses = Counter(names.values())
            for key, name in list(names.items()):
                if uses[name] > 1:
                    names[key] = longer[key]
        return names

    def table_names(self) -> dict[int, str]:
        """Path id to the name that slot tables know it by: its plane, and its ordinal where paths share a plane."""
        names: dict[int, str] = {}
        ordinals: Counter[str] = Counter()
        for record in sorted(self, key=lambda record: (record.key.interface, str(record.key.address))):
            ordinal = ordinals[record.plane]
            names[record.id] = f"{record.plane}\0{ordinal}" if ordinal else record.plane
            ordinals[record.plane] += 1
        return names

    def view(self, record: PathRecord) -> Path:
        """The path as everyone else sees it."""
        return Path(
            id=record.id,
            name=record.name,
            interface=record.key.interface,
            ifindex=record.ifindex,
            next_hop=record.key.address,
            plane=record.plane,
            weight=record.weight or 1,
            state=record.state,
            reason=record.reason,
            since=record.since,
            sole=self.sole(record),
            aliases=tuple(address for address in record.addresses if address != record.key.address),
            gray=record.gray.found,
        )
