"""The loader and the classifier's start: what is pinned, what survives a restart, one clear line for each failure."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import pytest

from qpd.kernel import bpf, loader, sources
from qpd.kernel.classifier import Classifier, ClassifierError
from qpd.kernel.layout import MAPS
from qpd.kernel.maps import Maps
from qpd.kernel.pins import PROGRAMS, Pins
from qpd.model import Hook
from tests.conftest import BPFFS, PREFIX

ROOT = Path(__file__).parents[2]


@dataclass
class Settings:
    """The section ``bpf`` of the settings."""

    pin_dir: Path
    attach: Literal["auto", "tcx", "clsact"] = "auto"
    qps_max: int = 4096


@pytest.fixture
def pin_dir() -> Iterator[Path]:
    path = BPFFS / f"{PREFIX}-loader"
    yield path
    Pins.of(path).remove()
    assert not path.exists()


LITTLE = """
#include "maps.h"

int steer(struct __sk_buff *skb)
{
	return -1;
}

int observe(struct __sk_buff *skb)
{
	__u32 zero = 0;
	struct counters *found = counters.lookup(&zero);

	if (found)
		found->verdicts[HOOK_OBSERVE][0]++;
	return -1;
}

int tell(struct __sk_buff *skb)
{
	return 0;
}
"""
"""The loader's work does not depend on what the programs do, and these load in a fraction of the time."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sources to be changed: the real maps, and little programs."""
    copy = tmp_path / "ebpf"
    shutil.copytree(sources.directory(), copy)
    (copy / "qpd.c").write_text(LITTLE)
    return copy


@pytest.fixture
def spec(pin_dir: Path, folder: Path, headers_cache: Path) -> loader.Spec:
    return loader.Spec(str(pin_dir), 4096, str(headers_cache), str(folder))


def run(
    spec: loader.Spec, *, before: tuple[str, ...] = (), environment: dict[str, str] | None = None
) -> tuple[loader.Result, str]:
    """The loader as a process; its result and what it said beside that."""
    done = subprocess.run(
        [*before, sys.executable, "-m", "qpd.kernel.loader"],
        input=json.dumps(asdict(spec)),
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
    )
    result = loader.Result(**json.loads(done.stdout))
    assert done.returncode == (1 if result.error else 0), done.stderr
    assert "\n" not in result.error
    return result, done.stderr


def ids(pins: Pins) -> dict[str, int]:
    """The kernel's ids of everything that is pinned."""
    found = {}
    for name in PROGRAMS:
        fd = bpf.obj_get(pins.directory / name)
        found[name] = bpf.prog_info(fd).id
        os.close(fd)
    for name in MAPS:
        fd = bpf.obj_get(pins.map(name))
        found[name] = bpf.map_info(fd).id
        os.close(fd)
    return found


def prepend(file: Path, text: str) -> None:
    file.write_text(text + file.read_text())


# --- what works


def test_programs_and_maps_are_pinned_as_the_layout_says(pin_dir: Path, headers_cache: Path) -> None:
    spec = loader.Spec(str(pin_dir), 4096, str(headers_cache))
    result, said = run(spec)
    assert not result.error, said
    found = ids(spec.pins)
    for hook in Hook:
        fd = bpf.obj_get(spec.pins.program(hook))
        info = bpf.prog_info(fd)
        os.close(fd)
        assert (info.type, info.name) == (bpf.PROG_TYPE_SCHED_CLS, hook.name.lower())
        assert set(info.map_ids) <= {found[name] for name in MAPS}, "a map that nobody can open"
    loader.check_maps(spec)
    for name, declared in MAPS.items():
        fd = bpf.obj_get(spec.pins.map(name))
        info_of_map = bpf.map_info(fd)
        os.close(fd)
        assert info_of_map.max_entries == (declared.entries or spec.qps_max)
        assert info_of_map.flags & declared.flags == declared.flags


def test_a_changed_program_replaces_the_old_one_and_keeps_maps_and_their_content(
    spec: loader.Spec, folder: Path
) -> None:
    run(spec)
    before = ids(spec.pins)
    fd = bpf.obj_get(spec.pins.program(Hook.OBSERVE))
    bpf.prog_test_run(fd, bytes(64), repeat=7)
    os.close(fd)
    with Maps(spec.pins.directory) as maps:
        maps.set_living(5)
        counted = maps.counters().verdicts
        assert counted[Hook.OBSERVE].sum() == 7
    prepend(folder / "qpd.c", "/* changed */\n")
    assert not loader.is_current(spec)
    result, said = run(spec)
    assert not result.error, said
    after = ids(spec.pins)
    assert {name for name in before if before[name] != after[name]} == set(PROGRAMS)
    with Maps(spec.pins.directory) as maps:
        assert maps.living() == 5
        assert (maps.counters().verdicts == counted).all()


async def test_a_restart_with_the_same_sources_compiles_nothing(
    pin_dir: Path, folder: Path, headers_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_CANDIDATES", (folder,))
    settings = Settings(pin_dir)
    first = await Classifier.load(settings, headers_cache)
    before = ids(first.pins)
    first.close()
    # A Python that cannot run: were it needed, the load would fail.
    second = await Classifier.load(settings, headers_cache, python=str(tmp_path / "missing"))
    second.close()
    assert ids(second.pins) == before


def test_a_program_whose_map_was_unpinned_is_not_current(spec: loader.Spec) -> None:
    run(spec)
    assert loader.is_current(spec)
    spec.pins.map("counters").unlink()
    assert not loader.is_current(spec)
    result, said = run(spec)
    assert not result.error, said
    assert loader.is_current(spec)


def test_a_load_that_was_cut_short_is_not_current(spec: loader.Spec) -> None:
    run(spec)
    spec.pins.forget_made()
    assert not loader.is_current(spec)


async def test_the_classifier_opens_what_was_loaded(pin_dir: Path, headers_cache: Path) -> None:
    classifier = await Classifier.load(Settings(pin_dir), headers_cache)
    try:
        assert bpf.prog_info(classifier.program(Hook.STEER)).name == "steer"
        with classifier.open_maps() as maps:
            assert maps.qps_max() == 4096
        ring = classifier.open_ring()
        assert ring.read() == []
        ring.close()
        assert classifier.mode in {"tcx", "clsact"}
    finally:
        classifier.close()


# --- what fails, each in one line


def test_a_map_of_another_size(spec: loader.Spec) -> None:
    run(spec)
    other = loader.Spec(spec.pin_dir, 8192, spec.cache, spec.sources)
    result, _ = run(other)
    assert f"{spec.pins.map('qps')} has lru_hash of 4096 entries" in result.error
    assert "qpd detach" in result.error
    assert loader.is_current(spec), "a refused load changes nothing"


def test_missing_headers(spec: loader.Spec, tmp_path: Path) -> None:
    # A mount namespace where nothing that might hold headers has anything in it.
    hide = 'mount -t tmpfs none /usr/src; test -d /lib/modules && mount -t tmpfs none /lib/modules; exec "$@"'
    spec = loader.Spec(spec.pin_dir, spec.qps_max, str(tmp_path / "cache"), spec.sources)
    result, _ = run(spec, before=("unshare", "--mount", "sh", "-c", hide, "sh"))
    assert "no kernel headers" in result.error
    assert "install" in result.error
    assert "linux-headers-" in result.error


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("raise ModuleNotFoundError(\"No module named 'bcc'\")", "cannot import bcc (No module named 'bcc')"),
        ("class BPF: ...\n__version__ = '0.18.0'", "bcc 0.18.0 is too old"),
        ("LATTICE = 'body-centred cubic'", "is not the BPF compiler collection"),
    ],
)
def test_missing_or_wrong_bcc(spec: loader.Spec, tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow/bcc.py").write_text(content + "\n")
    result, _ = run(spec, environment={"PYTHONPATH": f"{tmp_path / 'shadow'}:{ROOT}"})
    assert expected in result.error
    assert "python3-bpfcc" in result.error


@pytest.mark.parametrize(
    ("dropped", "named"),
    [
        ("-bpf,-sys_admin", ["CAP_BPF"]),
        ("-bpf,-perfmon,-net_admin,-sys_admin", ["CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN"]),
        ("-net_admin", ["CAP_NET_ADMIN"]),
    ],
)
def test_missing_capability(spec: loader.Spec, dropped: str, named: list[str]) -> None:
    result, _ = run(spec, before=("setpriv", f"--bounding-set={dropped}", f"--inh-caps={dropped}", "--"))
    listed = result.error.partition("missing capabilities: ")[2].partition(".")[0]
    assert listed == ", ".join(named)


def test_enough_capabilities_without_sys_admin(spec: loader.Spec) -> None:
    result, said = run(spec, before=("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", "--"))
    assert not result.error, said


def test_no_bpffs(spec: loader.Spec, tmp_path: Path) -> None:
    elsewhere = loader.Spec(str(tmp_path / "pins"), spec.qps_max, spec.cache, spec.sources)
    result, _ = run(elsewhere)
    assert "mount -t bpf bpf /sys/fs/bpf" in result.error
    assert not (tmp_path / "pins").exists()


def test_a_program_that_does_not_compile(spec: loader.Spec, folder: Path) -> None:
    with (folder / "qpd.c").open("a") as file:
        file.write("\nint broken = ;\n")
    lines = (folder / "qpd.c").read_text().splitlines()
    result, said = run(spec)
    assert f"qpd.c:{len(lines)}:14: error: expected expression" in result.error
    assert "expected expression" in said, "the whole of it is for the debug log"


def test_a_program_that_the_verifier_rejects_leaves_the_old_one(spec: loader.Spec, folder: Path) -> None:
    run(spec)
    before = ids(spec.pins)
    text = (folder / "qpd.c").read_text()
    # A read from the packet that nothing has checked against its end.
    (folder / "qpd.c").write_text(text.replace("__u32 zero = 0", "__u32 zero = *(int *)(long)skb->data"))
    result, _ = run(spec)
    assert "rejects the program observe" in result.error
    assert "invalid access to packet" in result.error
    assert ids(spec.pins) == before


async def test_the_daemon_gets_the_loaders_line(pin_dir: Path, tmp_path: Path, headers_cache: Path) -> None:
    with pytest.raises(ClassifierError, match=r"mount -t bpf bpf /sys/fs/bpf"):
        await Classifier.load(Settings(tmp_path / "pins"), headers_cache)
    with pytest.raises(ClassifierError, match=r"cannot start the loader"):
        await Classifier.load(Settings(pin_dir), headers_cache, python=str(tmp_path / "missing"))


async def test_a_loader_that_dies_says_how(pin_dir: Path, tmp_path: Path, headers_cache: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho last words >&2\nkill -KILL $$\n")
    python.chmod(0o755)
    with pytest.raises(ClassifierError, match=r"killed by SIGKILL \(out of memory\?\).*last words"):
        await Classifier.load(Settings(pin_dir), headers_cache, python=str(python))
