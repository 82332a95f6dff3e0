"""The numpy types are the structs of maps.h, octet by octet, as a C compiler lays them out."""

from __future__ import annotations

import re
import shutil
import subprocess
from ipaddress import ip_address, ip_network
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpd import model
from qpd.kernel import layout, sources
from qpd.kernel.bpf import F_NO_PREALLOC, MapType
from qpd.kernel.tell import Told
from qpd.model import Address, QueuePairKey

HEADER = sources.directory() / "maps.h"


def never_mapped(address: Address) -> bool:
    return address.version == 4 or address.ipv4_mapped is None


ADDRESSES = st.ip_addresses().filter(never_mapped)
SHIM = """
#include <stddef.h>
#include <stdio.h>
#include <stdbool.h>
#define BPF_TABLE_PINNED(...) extern int unused
#define BPF_TABLE_PINNED7(...) extern int unused
#include "maps.h"
int main(void) {
"""


def offsets(dtype: np.dtype[Any]) -> dict[str, int]:
    assert dtype.fields is not None
    return {name: field[1] for name, field in dtype.fields.items()}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Sizeof and offsetof of everything, and the values of all constants, from gcc."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc to lay the structs out independently; apt-get install gcc")
    folder = tmp_path_factory.mktemp("layout")
    (folder / "uapi").mkdir()
    (folder / "uapi/linux").symlink_to("/usr/include/linux")
    lines = [SHIM]
    for name, dtype in layout.STRUCTS.items():
        lines.append(f'printf("{name} %zu\\n", sizeof(struct {name}));')
        lines += [
            f'printf("{name}.{field} %zu\\n", offsetof(struct {name}, {field}));' for field in offsets(dtype)
        ]
    for name in (
        "PATHS_MAX", "SLOTS", "TABLES_MAX", "GROUPS_MAX", "DESTINATIONS_MAX", "NO_PATH", "NO_GROUP", "QPD_LAYOUT",
        "NEIGHBOURS_MAX", "QPS_MAX", "EVENTS_BYTES", "VERDICTS", "HOOKS", "LIVING_DAEMON", "LIVING_TAP",
        "LIVING_WORDS", "LOCKS", "EVENT_QP_NEW", "EVENT_PATH_STATE", "EVENT_QP_MOVED",
        "EVENT_CM", "PSN_KNOWN", "PSN_MASK", "STREAM_READ", "RTT_FIRST", "RTT_DOUBLINGS", "RTT_STEPS", "RTT_BUCKETS",
        "MARKS", "MARK_SHIFT", "SLOT_WATCHED", "TELL_WATCHED", *(f"MARK_EXPONENT({n})" for n in range(layout.MARKS)),
        "TELL_PEER", "TELL_HOME", "TELL_LIFE", *(f"TOLD_{told.name}" for told in Told),
        *(f"VERDICT_{verdict.name}" for verdict in model.Verdict),
        *(f"HOOK_{hook.name}" for hook in model.Hook),
        *(f"PLACEMENT_{placement.name}" for placement in model.Placement),
    ):  # fmt: skip
        lines.append(f'printf("{name} %zu\\n", (size_t){name});')
    (folder / "layout.c").write_text("\n".join([*lines, "return 0; }"]))
    program = folder / "layout"
    subprocess.run(
        ["gcc", "-I", str(folder), "-I", str(HEADER.parent), "-o", str(program), str(folder / "layout.c")],
        check=True,
    )
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in (line.split() for line in output.splitlines())}


def test_every_struct_of_the_header_is_mirrored() -> None:
    declared = set(re.findall(r"^struct (\w+) \{", HEADER.read_text(), re.MULTILINE))
    assert declared - {"address", "events_table_t"} == layout.STRUCTS.keys()


@pytest.mark.parametrize("name", layout.STRUCTS)
def test_size_and_offsets(compiled: dict[str, int], name: str) -> None:
    dtype = layout.STRUCTS[name]
    assert dtype.itemsize == compiled[name]
    assert offsets(dtype) == {field: compiled[f"{name}.{field}"] for field in offsets(dtype)}


@pytest.mark.parametrize("name", layout.STRUCTS)
def test_every_field_is_mirrored_in_order(name: str) -> None:
    found = re.search(rf"^struct {name} \{{\n(.*?)^\}};", HEADER.read_text(), re.MULTILINE | re.DOTALL)
    assert found
    text = re.sub(r"/\*.*?\*/", "", found[1], flags=re.DOTALL)
    assert re.findall(r"(\w+)(?:\[\w+\])*;", text) == list(offsets(layout.STRUCTS[name]))


def test_constants_of_the_model(compiled: dict[str, int]) -> None:
    for name in ("PATHS_MAX", "SLOTS", "TABLES_MAX", "GROUPS_MAX", "DESTINATIONS_MAX", "NO_PATH", "NO_GROUP"):
        assert getattr(model, name) == compiled[name], name
    assert {f"VERDICT_{v.name}": int(v) for v in model.Verdict}.items() <= compiled.items()
    assert len(model.Verdict) == compiled["VERDICTS"]
    assert {f"HOOK_{h.name}": int(h) for h in model.Hook}.items() <= compiled.items()
    assert len(model.Hook) == compiled["HOOKS"]
    assert {f"PLACEMENT_{p.name}": int(p) for p in model.Placement}.items() <= compiled.items()


def test_constants_of_the_layout(compiled: dict[str, int]) -> None:
    for name in ("NEIGHBOURS_MAX", "QPS_MAX", "EVENTS_BYTES", "LIVING_DAEMON", "LIVING_TAP", "PSN_KNOWN",
                 "PSN_MASK", "STREAM_READ", "RTT_FIRST", "RTT_DOUBLINGS", "RTT_STEPS", "RTT_BUCKETS",
                 "MARKS", "MARK_SHIFT", "SLOT_WATCHED"):  # fmt: skip
        assert getattr(layout, name) == compiled[name], name
    assert tuple(compiled[f"MARK_EXPONENT({n})"] for n in range(layout.MARKS)) == layout.MARK_EXPONENTS
    assert layout.MAPS["living"].entries == compiled["LIVING_WORDS"]
    assert layout.MAPS["locks"].entries == compiled["LOCKS"]
    assert sources.layout_version() == compiled["QPD_LAYOUT"]


def test_answers_of_tell(compiled: dict[str, int]) -> None:
    assert {f"TOLD_{told.name}": int(told) for told in Told}.items() <= compiled.items()


def test_event_kinds(compiled: dict[str, int]) -> None:
    from qpd.kernel.ring import EventKind

    assert {f"EVENT_{kind.name}": int(kind) for kind in EventKind}.items() <= compiled.items()


def test_every_map_of_the_header_is_listed() -> None:
    text = HEADER.read_text()
    assert set(re.findall(r'PIN_DIR "/(\w+)"', text)) == layout.MAPS.keys()
    assert (layout.MAPS["destinations"].type, layout.MAPS["destinations"].flags) == (
        MapType.LPM_TRIE,
        F_NO_PREALLOC,
    )


@pytest.mark.parametrize("text", ["192.0.2.1", "0.0.0.0", "2001:db8::1", "fe80::1", "::", "::1"])
def test_addresses_come_back(text: str) -> None:
    address = ip_address(text)
    octets = layout.pack_address(address)
    assert len(octets) == 16
    assert layout.unpack_address(octets) == address


def test_an_ipv4_address_is_mapped() -> None:
    assert layout.pack_address(ip_address("192.0.2.1")) == ip_address("::ffff:192.0.2.1").packed


@given(ADDRESSES, st.integers(0, 128))
def test_prefixes_come_back(address: Any, length: int) -> None:
    prefix = ip_network((address, min(length, address.max_prefixlen)), strict=False)
    record = np.array([layout.pack_destination(prefix)], layout.DESTINATION_KEY)[0]
    assert layout.unpack_destination(record) == prefix


@given(
    st.integers(0, 2**24 - 1),
    ADDRESSES,
    st.integers(0, 2**24 - 1),
)
def test_queue_pair_keys_come_back(vni: int, address: Any, dest_qp: int) -> None:
    key = QueuePairKey(vni, address, dest_qp)
    assert layout.unpack_qp_key(np.frombuffer(layout.pack_qp_key(key), layout.QP_KEY)[0]) == key


def test_mac_addresses() -> None:
    assert layout.unpack_mac(layout.pack_mac("02:00:5e:10:00:ff")) == "02:00:5e:10:00:ff"
    with pytest.raises(ValueError, match="six octets"):
        layout.pack_mac("02:00")
