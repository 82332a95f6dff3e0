"""Where the next packet of each QP would go: the kernel's own choice, computed for many QPs at once.

An entry of the ``qps`` map holds what was true at its last packet; after a failure an idle QP's entry still names
the dead path. Operators want to see the present, so this repeats what ``steer`` does for a known QP.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qpd.model import NO_GROUP, NO_PATH, PATHS_MAX

_CHUNK = 4096
_Bytes = npt.NDArray[np.uint8]


def current_paths(
    homes: _Bytes,
    slots: npt.NDArray[Any],
    groups: npt.NDArray[Any],
    *,
    usable: Mapping[int, int],
    tables: Mapping[int, _Bytes],
) -> _Bytes:
    """The path id of each QP's next packet; NO_PATH: the kernel's own choice applies.

    Args:
        homes: path id of each QP's home, uint8[n].
        slots: its slot, [n].
        groups: the id of its destination's group now, NO_GROUP where none covers it, [n].
        usable: by group id, the living members as bits.
        tables: by group id, the slot table: uint8[4096, 64], NO_PATH behind the last.
    """
    words = np.zeros(NO_GROUP + 1, np.uint64)
    for group, word in usable.items():
        words[group] = word
    mine = words[groups]
    at_home = (homes < PATHS_MAX) & (
        mine >> np.minimum(homes, PATHS_MAX - 1).astype(np.uint64) & np.uint64(1) == 1
    )
    paths = np.where(at_home, homes, NO_PATH).astype(np.uint8)
    displaced = np.flatnonzero(~at_home & (mine != 0))
    for group in np.unique(groups[displaced]).tolist():
        members = displaced[groups[displaced] == group]
        for start in range(0, len(members), _CHUNK):
            some = members[start : start + _CHUNK]
            paths[some] = _first_usable(tables[group][slots[some]], usable[group])
    return paths


def _first_usable(orders: _Bytes, word: int) -> _Bytes:
    bits = np.array(
        [word >> path & 1 for path in range(PATHS_MAX)] + [0] * (NO_PATH + 1 - PATHS_MAX), np.bool_
    )
    found = bits[orders]
    first = found.argmax(axis=1)
    chosen = orders[np.arange(len(orders)), first]
    return np.where(found.any(axis=1), chosen, NO_PATH).astype(np.uint8)
