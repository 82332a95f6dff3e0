"""The classifier on real interfaces: every packet meets it once, others' programs go on, nothing stays behind."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from qpd.kernel import bpf, clsact, loader, sources, tcx
from qpd.kernel.attach import Attacher, AttachError, InterfaceGoneError, Mode, choose_mode, detach_all
from qpd.kernel.maps import Maps
from qpd.kernel.pins import Pins
from qpd.model import Hook, Verdict
from tests.conftest import BPFFS, PREFIX
from tests.ebpf.netns import Node, join, wire
from tests.ebpf.other_program import TC_ACT_OK, TC_ACT_UNSPEC, OtherProgram

UPLINK = "up0"
MODES: list[Mode] = ["tcx", "clsact"]


@dataclass
class Loaded:
    """The real classifier, pinned, and a second build of its programs on the same maps."""

    pins: Pins
    maps: Maps
    programs: dict[Hook, int]
    successors: dict[Hook, int]

    def attacher(self, mode: Mode, *, successor: bool = False) -> Attacher:
        return Attacher(self.pins, self.successors if successor else self.programs, mode)

    def counted(self, hook: Hook) -> int:
        """Packets that the program has seen on this hook."""
        return int(self.maps.counters().verdicts[hook].sum())

    def ids(self) -> set[int]:
        return {bpf.prog_info(fd).id for fd in self.programs.values()}


@pytest.fixture(scope="module")
def loaded(headers_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    pin_dir = BPFFS / f"{PREFIX}-attach"
    folder = tmp_path_factory.mktemp("sources")
    for file in sources.directory().glob("*.[ch]"):
        (folder / file.name).write_text(file.read_text())
    spec = loader.Spec(str(pin_dir), 4096, str(headers_cache), str(folder))
    builds: list[dict[Hook, int]] = []
    try:
        for build in range(2):
            (folder / "build.h").write_text(f"/* {build} */\n")
            loaded_in_child(spec)
            builds.append({hook: bpf.obj_get(spec.pins.program(hook)) for hook in Hook})
        with Maps(spec.pins.directory) as maps:
            yield Loaded(spec.pins, maps, *builds)
    finally:
        for build_ in builds:
            for fd in build_.values():
                os.close(fd)
        spec.pins.remove()
        assert not pin_dir.exists()


def loaded_in_child(spec: loader.Spec) -> None:
    from tests.ebpf.test_loader import run

    result, said = run(spec)
    assert not result.error, said


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    with wire(f"{PREFIX}-attach", UPLINK) as pair:
        yield pair


@pytest.fixture
def here(nodes: tuple[Node, Node], loaded: Loaded) -> Iterator[Node]:
    """The node whose uplink carries the classifier; it leaves none behind."""
    node, _ = nodes
    yield node
    for ifindex in loaded.pins.linked() | loaded.pins.filtered():
        node.call(loaded.attacher("tcx").detach, ifindex)
    assert not loaded.pins.linked()
    assert not loaded.pins.filtered()


@pytest.fixture
def others() -> Iterator[list[OtherProgram]]:
    made: list[OtherProgram] = []
    yield made
    for program in made:
        program.close()


def ran(node: Node, loaded: Loaded, packets: int) -> tuple[int, int]:
    """Send packets; how many left by the kernel's count, and how many the classifier saw."""
    left, seen = node.transmitted(UPLINK), loaded.counted(Hook.STEER)
    node.send(UPLINK, packets)
    return node.transmitted(UPLINK) - left, loaded.counted(Hook.STEER) - seen


def qdiscs(node: Node) -> list[str]:
    return [qdisc["kind"] for qdisc in json.loads(node.run("tc", "-j", "qdisc", "show", "dev", UPLINK))]


def tcx_programs(node: Node, hook: bpf.AttachType) -> tuple[int, ...]:
    return node.call(bpf.prog_query, node.ifindex(UPLINK), hook).prog_ids


@contextmanager
def other_filter(
    node: Node, program: OtherProgram, hook: str, *, priority: int, protocol: str
) -> Iterator[None]:
    """Somebody else's filter, put there by tc; it stays until the qdisc goes."""
    pin = program.pin(BPFFS / f"{PREFIX}-other-{priority}")
    try:
        where = ["dev", UPLINK, hook, "prio", str(priority), "protocol", protocol]
        node.run("tc", "filter", "add", *where, "bpf", "direct-action", "object-pinned", str(pin))
        yield
    finally:
        pin.unlink()


# --- on, and off


@pytest.mark.parametrize("mode", MODES)
def test_every_packet_meets_the_classifier_once_until_it_is_detached(
    here: Node, loaded: Loaded, mode: Mode
) -> None:
    ifindex = here.ifindex(UPLINK)
    attacher = loaded.attacher(mode)
    here.call(attacher.attach, ifindex, UPLINK)
    left, seen = ran(here, loaded, 500)
    assert left == seen >= 500
    assert here.call(attacher.attached) == {ifindex: mode}
    assert here.call(attacher.detach, ifindex)
    assert here.call(attacher.attached) == {}
    assert ran(here, loaded, 100)[1] == 0
    assert "clsact" not in qdiscs(here)
    assert not here.call(attacher.detach, ifindex), "a second time there is nothing to take off"


@pytest.mark.parametrize("mode", MODES)
def test_what_arrives_is_observed(nodes: tuple[Node, Node], here: Node, loaded: Loaded, mode: Mode) -> None:
    there = nodes[1]
    here.call(loaded.attacher(mode).attach, here.ifindex(UPLINK), UPLINK)
    left, seen = there.transmitted(UPLINK), loaded.counted(Hook.OBSERVE)
    there.run("ping", "-q", "-c", "20", "-i", "0.01", "192.0.2.1")
    assert loaded.counted(Hook.OBSERVE) - seen == there.transmitted(UPLINK) - left >= 20


@pytest.mark.parametrize("mode", MODES)
def test_replacing_leaves_no_gap_and_meets_no_packet_twice(here: Node, loaded: Loaded, mode: Mode) -> None:
    ifindex = here.ifindex(UPLINK)
    here.call(loaded.attacher(mode).attach, ifindex, UPLINK)
    builds = [loaded.attacher(mode, successor=True), loaded.attacher(mode)]
    left, seen = here.transmitted(UPLINK), loaded.counted(Hook.STEER)

    stop = threading.Event()

    def traffic() -> None:
        while not stop.is_set():
            here.send(UPLINK, 200)

    thread = threading.Thread(target=traffic)
    thread.start()
    try:
        number = 0
        # Both at once for long enough, however the machine shares its time between them.
        while number < 60 or here.transmitted(UPLINK) - left <= 1000:
            here.call(builds[number % 2].attach, ifindex, UPLINK)
            number += 1
    finally:
        stop.set()
        thread.join()
    sent = here.transmitted(UPLINK) - left
    assert loaded.counted(Hook.STEER) - seen == sent


@pytest.mark.parametrize("mode", MODES)
def test_attaching_again_puts_the_new_program_in_place_of_the_old_one(
    here: Node, loaded: Loaded, mode: Mode
) -> None:
    ifindex = here.ifindex(UPLINK)
    for successor in (False, False, True):
        here.call(loaded.attacher(mode, successor=successor).attach, ifindex, UPLINK)
    wanted = [bpf.prog_info(loaded.successors[hook]).id for hook in Hook]
    if mode == "tcx":
        found = [tcx_programs(here, kind) for kind in (bpf.AttachType.TCX_EGRESS, bpf.AttachType.TCX_INGRESS)]
    else:
        found = [tuple(one.prog_id for one in here.call(clsact.filters, ifindex, hook)) for hook in Hook]
    assert found == [(wanted[0],), (wanted[1],)]


# --- beside others


@pytest.mark.tcx
@pytest.mark.parametrize("other_first", [True, False])
def test_another_tcx_program_on_the_hook_is_run_as_before(
    here: Node, loaded: Loaded, others: list[OtherProgram], *, other_first: bool
) -> None:
    ifindex = here.ifindex(UPLINK)
    other = OtherProgram(TC_ACT_OK)
    others.append(other)
    attacher = loaded.attacher("tcx")
    if not other_first:
        here.call(attacher.attach, ifindex, UPLINK)
    link = here.call(bpf.link_create, other.fd, ifindex, bpf.AttachType.TCX_EGRESS)
    try:
        here.call(attacher.attach, ifindex, UPLINK)
        before = other.seen()
        left, seen = ran(here, loaded, 300)
        assert left == seen == other.seen() - before >= 300
        here.call(attacher.detach, ifindex)
        before = other.seen()
        left, _ = ran(here, loaded, 50)
        assert left == other.seen() - before
    finally:
        os.close(link)


@pytest.mark.parametrize("verdict", [TC_ACT_OK, TC_ACT_UNSPEC])
@pytest.mark.parametrize("priority", [1, 7, 49152])
def test_another_clsact_filter_on_the_hook_is_run_as_before(
    here: Node, loaded: Loaded, others: list[OtherProgram], priority: int, verdict: int
) -> None:
    other = OtherProgram(verdict)
    others.append(other)
    ifindex = here.ifindex(UPLINK)
    attacher = loaded.attacher("clsact")
    here.run("tc", "qdisc", "add", "dev", UPLINK, "clsact")
    with other_filter(here, other, "egress", priority=priority, protocol="all"):
        here.call(attacher.attach, ifindex, UPLINK)
        before = other.seen()
        left, seen = ran(here, loaded, 300)
        assert left == seen == other.seen() - before >= 300
        here.call(attacher.detach, ifindex)
        assert "clsact" in qdiscs(here), "the qdisc is not ours"
        assert [one.prog_id for one in here.call(clsact.filters, ifindex, Hook.STEER)] == [other.id]
        assert here.call(clsact.filters, ifindex, Hook.OBSERVE) == []


def test_others_have_the_first_priorities_for_one_protocol(
    here: Node, loaded: Loaded, others: list[OtherProgram]
) -> None:
    others.append(OtherProgram(TC_ACT_UNSPEC))
    ifindex = here.ifindex(UPLINK)
    here.run("tc", "qdisc", "add", "dev", UPLINK, "clsact")
    with other_filter(here, others[0], "egress", priority=1, protocol="ip"):
        with other_filter(here, others[0], "egress", priority=2, protocol="ipv6"):
            here.call(loaded.attacher("clsact").attach, ifindex, UPLINK)
        left, seen = ran(here, loaded, 100)
        assert left == seen
        here.call(loaded.attacher("clsact").detach, ifindex)
        remaining = here.call(clsact.filters, ifindex, Hook.STEER)
        assert [one.prog_id for one in remaining] == [others[0].id] * 2


def test_a_qdisc_of_ours_stays_while_others_use_it(
    here: Node, loaded: Loaded, others: list[OtherProgram]
) -> None:
    others.append(OtherProgram(TC_ACT_OK))
    ifindex = here.ifindex(UPLINK)
    attacher = loaded.attacher("clsact")
    here.call(attacher.attach, ifindex, UPLINK)
    with other_filter(here, others[0], "ingress", priority=5, protocol="all"):
        here.call(attacher.detach, ifindex)
    assert "clsact" in qdiscs(here)
    assert [one.prog_id for one in here.call(clsact.filters, ifindex, Hook.OBSERVE)] == [others[0].id]
    loaded.pins.qdisc(ifindex).rmdir()


# --- interfaces that go, modes that change, older layouts


@pytest.mark.parametrize("mode", MODES)
def test_an_interface_is_deleted_and_another_gets_its_index(
    nodes: tuple[Node, Node], here: Node, loaded: Loaded, mode: Mode
) -> None:
    ifindex = here.ifindex(UPLINK)
    attacher = loaded.attacher(mode)
    here.call(attacher.attach, ifindex, UPLINK)
    here.run("ip", "link", "del", UPLINK)
    assert here.call(attacher.attached) == {}
    with pytest.raises(InterfaceGoneError, match=rf"{UPLINK} \(ifindex {ifindex}\) does not exist"):
        here.call(attacher.attach, ifindex, UPLINK)
    join(here, nodes[1], UPLINK, index=ifindex)
    assert here.call(attacher.attached) == {}
    here.call(attacher.attach, ifindex, UPLINK)
    assert here.call(attacher.attached) == {ifindex: mode}
    left, seen = ran(here, loaded, 100)
    assert left == seen


@pytest.mark.parametrize("mode", MODES)
def test_what_is_left_of_a_deleted_interface_is_forgotten(here: Node, loaded: Loaded, mode: Mode) -> None:
    ifindex = here.ifindex(UPLINK)
    attacher = loaded.attacher(mode)
    here.call(attacher.attach, ifindex, UPLINK)
    assert here.call(attacher.forget_gone) == []
    here.run("ip", "link", "del", UPLINK)
    assert here.call(attacher.forget_gone) == [ifindex]
    assert not loaded.pins.linked() | loaded.pins.filtered()
    assert not here.call(attacher.detach, ifindex)


@pytest.mark.parametrize(("old", "new"), [("tcx", "clsact"), ("clsact", "tcx")])
def test_another_mode_takes_over(here: Node, loaded: Loaded, old: Mode, new: Mode) -> None:
    ifindex = here.ifindex(UPLINK)
    here.call(loaded.attacher(old).attach, ifindex, UPLINK)
    here.call(loaded.attacher(new).attach, ifindex, UPLINK)
    assert here.call(loaded.attacher(new).attached) == {ifindex: new}
    left, seen = ran(here, loaded, 100)
    assert left == seen, "and the old one is off"


@pytest.mark.tcx
def test_an_older_layouts_programs_go_when_ours_come(here: Node, loaded: Loaded) -> None:
    ifindex = here.ifindex(UPLINK)
    older = Pins(loaded.pins.pin_dir, 0)
    older.directory.mkdir()
    here.call(Attacher(older, loaded.successors, "tcx").attach, ifindex, UPLINK)
    here.call(loaded.attacher("tcx").attach, ifindex, UPLINK)
    assert tcx_programs(here, bpf.AttachType.TCX_EGRESS) == (bpf.prog_info(loaded.programs[Hook.STEER]).id,)
    older.remove()


# --- the end of it


@pytest.mark.tcx
@pytest.mark.parametrize("mode", MODES)
def test_detach_leaves_no_trace(here: Node, loaded: Loaded, mode: Mode) -> None:
    ifindex = here.ifindex(UPLINK)
    before = qdiscs(here)
    pin_dir = BPFFS / f"{PREFIX}-detach"
    older, ours = Pins(pin_dir, 0), Pins.of(pin_dir)
    try:
        for pins, programs in ((ours, loaded.programs), (older, loaded.successors)):
            pins.directory.mkdir(parents=True)
            pins.note_made("0123456789abcdef")
            for hook in Hook:
                bpf.obj_pin(programs[hook], pins.program(hook))
        # An older daemon's programs, which nobody took off when ours came.
        here.call(Attacher(ours, loaded.programs, mode).attach, ifindex, UPLINK)
        for hook in Hook:
            here.call(tcx.attach, older, ifindex, hook, loaded.successors[hook])
        assert here.call(detach_all, pin_dir) == [ifindex]
        assert not pin_dir.exists()
    finally:
        older.remove()
        ours.remove()
    assert qdiscs(here) == before
    assert ran(here, loaded, 50)[1] == 0
    assert here.call(detach_all, pin_dir) == []


def test_detach_finds_filters_whose_notes_are_lost(here: Node, loaded: Loaded) -> None:
    ifindex = here.ifindex(UPLINK)
    here.call(loaded.attacher("clsact").attach, ifindex, UPLINK)
    for path in list(loaded.pins.filters.iterdir()):
        path.rmdir()
    assert here.call(detach_all, BPFFS / f"{PREFIX}-nothing") == [ifindex]
    assert ran(here, loaded, 50)[1] == 0


# --- what this kernel has


def test_the_mode_is_chosen_by_asking_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_mode("clsact") == "clsact"
    assert choose_mode("auto") == ("tcx" if tcx.supported() else "clsact")
    monkeypatch.setattr(tcx, "supported", lambda: False)
    assert choose_mode("auto") == "clsact"
    with pytest.raises(AttachError, match="no TCX hooks"):
        choose_mode("tcx")


@pytest.mark.tcx
def test_the_classifier_counts_under_its_verdicts(here: Node, loaded: Loaded) -> None:
    here.call(loaded.attacher("tcx").attach, here.ifindex(UPLINK), UPLINK)
    before = loaded.maps.counters().verdicts[Hook.STEER, Verdict.NOT_ROCE]
    here.send(UPLINK, 10)
    assert loaded.maps.counters().verdicts[Hook.STEER, Verdict.NOT_ROCE] - before >= 10
