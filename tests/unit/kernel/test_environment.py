"""What must be there before anything can be loaded: a bpffs, capabilities."""

from __future__ import annotations

from pathlib import Path

import pytest

from qpd.kernel import bpffs, capabilities
from qpd.kernel.bpffs import BpffsMissingError
from qpd.kernel.capabilities import Capability

MOUNTS = """\
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
24 22 0:22 / /sys rw,nosuid shared:7 - sysfs sysfs rw
30 24 0:27 / /sys/fs/bpf rw,nosuid shared:11 - bpf bpf rw,mode=700
31 22 0:28 / /srv/my\\040bpf rw - bpf none rw
"""


def bits(*capabilities_: Capability) -> int:
    return sum(1 << capability for capability in capabilities_)


@pytest.mark.parametrize("path", ["/sys/fs/bpf/qpd", "/sys/fs/bpf", "/srv/my bpf/qpd"])
def test_a_folder_in_a_bpffs(path: str) -> None:
    bpffs.check(Path(path), MOUNTS)


@pytest.mark.parametrize("path", ["/tmp/qpd", "/sys/fs/other", "/sys/fs/bpffs/qpd"])
def test_elsewhere_one_line_says_how_to_mount_it(path: str) -> None:
    with pytest.raises(BpffsMissingError, match="mount -t bpf bpf /sys/fs/bpf") as caught:
        bpffs.check(Path(path), MOUNTS)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_fresh_sys_hides_the_bpffs() -> None:
    fresh = MOUNTS + "40 24 0:40 / /sys rw - sysfs sysfs rw\n41 40 0:41 / /sys/fs/bpf rw - tmpfs tmpfs rw\n"
    with pytest.raises(BpffsMissingError, match="nsenter"):
        bpffs.check(Path("/sys/fs/bpf/qpd"), fresh)


def test_dots_are_not_for_bpffs() -> None:
    with pytest.raises(BpffsMissingError, match="no dots"):
        bpffs.check(Path("/sys/fs/bpf/qpd.1"), MOUNTS)


def test_which_capabilities_are_missing() -> None:
    assert capabilities.missing(0) == ["CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN"]
    assert capabilities.missing(bits(Capability.CAP_BPF, Capability.CAP_PERFMON)) == ["CAP_NET_ADMIN"]
    assert capabilities.missing(bits(Capability.CAP_NET_ADMIN, Capability.CAP_BPF)) == ["CAP_PERFMON"]
    assert not capabilities.missing(
        bits(Capability.CAP_BPF, Capability.CAP_PERFMON, Capability.CAP_NET_ADMIN)
    )


def test_cap_sys_admin_implies_the_two_that_came_out_of_it() -> None:
    assert capabilities.missing(bits(Capability.CAP_SYS_ADMIN)) == ["CAP_NET_ADMIN"]


def test_this_process_has_a_word_of_capabilities() -> None:
    assert capabilities.effective() >= 0
