"""Headers are found wherever distributions put them, and merged into one tree."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from qpd.kernel import headers
from qpd.kernel.headers import HeadersMissingError, System

COMMON = ("include/linux/kconfig.h", "include/uapi/linux/bpf.h")
FLAVOUR = ("include/generated/autoconf.h", "include/config/BPF")


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"/* {root.name} */\n")
    return root


def common(root: Path, arch: str = "x86") -> Path:
    return touch(
        root, *COMMON, f"arch/{arch}/include/uapi/asm/byteorder.h", f"arch/{arch}/include/asm/page.h"
    )


def flavour(root: Path, arch: str = "x86") -> Path:
    return touch(root, *FLAVOUR, f"arch/{arch}/include/generated/uapi/asm/types.h")


def whole(root: Path, arch: str = "x86") -> Path:
    return flavour(common(root, arch), arch)


@pytest.fixture
def system(tmp_path: Path) -> System:
    return System(tmp_path / "root", "6.18.0", "x86_64")


@pytest.fixture
def sources(system: System) -> Path:
    return system.root / "usr/src"


def complete(tree: Path, system: System) -> bool:
    return all((tree / name).is_file() for name in system.needed())


def test_debians_two_halves_become_one_tree(system: System, sources: Path, tmp_path: Path) -> None:
    flavour(sources / "linux-headers-6.1.0-56-amd64")
    common(sources / "linux-headers-6.1.0-56-common")
    tree = headers.find(tmp_path / "cache", system)
    assert complete(tree, system)
    assert (tree / "include/config/BPF").is_file()
    assert (tree / "arch/x86/include/asm/page.h").is_file()


def test_debians_two_halves_on_arm64(sources: Path, tmp_path: Path) -> None:
    system = System(tmp_path / "root", "6.18.0", "aarch64")
    flavour(sources / "linux-headers-6.1.0-56-arm64", "arm64")
    common(sources / "linux-headers-6.1.0-56-common", "arm64")
    tree = headers.find(tmp_path / "cache", system)
    assert complete(tree, system)
    assert (tree / "arch/arm64/include/asm/page.h").is_file()


def test_a_real_time_flavour_takes_its_own_common_half(system: System, sources: Path, tmp_path: Path) -> None:
    flavour(sources / "linux-headers-6.1.0-56-rt-amd64")
    common(sources / "linux-headers-6.1.0-56-common")
    common(sources / "linux-headers-6.1.0-56-common-rt")
    tree = headers.find(tmp_path / "cache", system)
    assert "common-rt" in (tree / "include/linux/kconfig.h").read_text()


@pytest.mark.parametrize("name", ["linux-headers-6.8.0-40", "linux-hwe-6.8-headers-6.8.0-40"])
def test_ubuntus_halves_that_link_to_each_other(
    system: System, sources: Path, tmp_path: Path, name: str
) -> None:
    base = common(sources / name)
    generic = flavour(sources / "linux-headers-6.8.0-40-generic")
    (generic / "include/linux").symlink_to(base / "include/linux")
    tree = headers.find(tmp_path / "cache", system)
    assert complete(tree, system)


def test_the_running_kernels_headers_come_first(system: System, sources: Path, tmp_path: Path) -> None:
    whole(sources / "linux-headers-9.9.9-1-amd64")
    build = whole(system.root / "lib/modules/6.18.0/build")
    assert headers.find(tmp_path / "cache", system) == build


def test_the_running_kernels_build_and_source_are_halves(
    system: System, sources: Path, tmp_path: Path
) -> None:
    modules = system.root / "lib/modules/6.18.0"
    modules.mkdir(parents=True)
    (modules / "build").symlink_to(flavour(sources / "linux-headers-6.18-amd64"))
    (modules / "source").symlink_to(common(sources / "elsewhere"))
    assert complete(headers.find(tmp_path / "cache", system), system)


def test_a_dangling_build_link_is_passed_over(system: System, sources: Path, tmp_path: Path) -> None:
    modules = system.root / "lib/modules/6.18.0"
    modules.mkdir(parents=True)
    (modules / "build").symlink_to("/usr/src/removed")
    expected = whole(sources / "linux-headers-6.1.0-56-amd64")
    assert headers.find(tmp_path / "cache", system) == expected


def test_the_newest_version_by_number_not_by_spelling(system: System, sources: Path, tmp_path: Path) -> None:
    whole(sources / "linux-headers-6.9.0-1-amd64")
    newest = whole(sources / "linux-headers-6.10.0-1-amd64")
    assert headers.find(tmp_path / "cache", system) == newest


def test_an_incomplete_tree_is_passed_over(system: System, sources: Path, tmp_path: Path) -> None:
    flavour(sources / "linux-headers-6.10.0-1-amd64")
    older = whole(sources / "linux-headers-6.1.0-1-amd64")
    assert headers.find(tmp_path / "cache", system) == older


def test_another_architectures_headers_are_passed_over(system: System, sources: Path, tmp_path: Path) -> None:
    whole(sources / "linux-headers-6.10.0-1-arm64", "arm64")
    with pytest.raises(HeadersMissingError):
        headers.find(tmp_path / "cache", system)


def test_the_kernels_own_archive(system: System, tmp_path: Path) -> None:
    contents = whole(tmp_path / "contents")
    archive = system.root / "sys/kernel/kheaders.tar.xz"
    archive.parent.mkdir(parents=True)
    with tarfile.open(archive, "w:xz") as file:
        file.add(contents, ".")
    tree = headers.find(tmp_path / "cache", system)
    assert complete(tree, system)
    marker = tree / "include/linux/kconfig.h"
    marker.write_text("kept")
    assert headers.find(tmp_path / "cache", system) == tree
    assert marker.read_text() == "kept"


def test_a_merged_tree_is_made_once(system: System, sources: Path, tmp_path: Path) -> None:
    flavour(sources / "linux-headers-6.1.0-56-amd64")
    common(sources / "linux-headers-6.1.0-56-common")
    first = headers.find(tmp_path / "cache", system)
    made = first.stat().st_ctime_ns
    assert headers.find(tmp_path / "cache", system) == first
    assert first.stat().st_ctime_ns == made
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.name]


def test_the_cache_is_forgotten_and_nothing_else(system: System, sources: Path, tmp_path: Path) -> None:
    flavour(sources / "linux-headers-6.1.0-56-amd64")
    common(sources / "linux-headers-6.1.0-56-common")
    tree = headers.find(tmp_path / "cache", system)
    touch(tmp_path / "cache", "qpd.sock")
    headers.forget(tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["qpd.sock"]
    assert (sources / "linux-headers-6.1.0-56-common/include/linux/kconfig.h").is_file()
    assert not tree.exists()


def test_a_broken_merged_tree_is_made_again(system: System, sources: Path, tmp_path: Path) -> None:
    flavour(sources / "linux-headers-6.1.0-56-amd64")
    common(sources / "linux-headers-6.1.0-56-common")
    tree = headers.find(tmp_path / "cache", system)
    (tree / "include/uapi").unlink()
    assert complete(headers.find(tmp_path / "cache", system), system)


@pytest.mark.parametrize(
    ("release", "machine", "package"),
    [
        ('ID=debian\nVERSION_ID="12"\n', "x86_64", "linux-headers-amd64"),
        ("ID=debian\n", "aarch64", "linux-headers-arm64"),
        ("ID=ubuntu\nID_LIKE=debian\n", "x86_64", "linux-headers-generic"),
        ('ID=linuxmint\nID_LIKE="ubuntu debian"\n', "x86_64", "linux-headers-generic"),
        ("ID=something\n", "x86_64", "linux-headers-amd64"),
    ],
)
def test_without_headers_one_line_names_the_package(
    tmp_path: Path, release: str, machine: str, package: str
) -> None:
    system = System(tmp_path, "6.18.0", machine)
    touch(tmp_path, "etc/os-release").joinpath("etc/os-release").write_text(release)
    with pytest.raises(HeadersMissingError) as caught:
        headers.find(tmp_path / "cache", system)
    assert package in str(caught.value)
    assert "\n" not in str(caught.value)
