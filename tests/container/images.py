"""The images: a base by debootstrap, since no registry is asked, and this repository's Dockerfile on it."""

from __future__ import annotations

import ast
import os
import platform
import subprocess
import sys
from pathlib import Path

from .engine import Engine

REPOSITORY = Path(__file__).resolve().parents[2]
BASE, QPD, LEAF, PROMETHEUS = (f"qpdt-{name}" for name in ("base", "qpd", "leaf", "prometheus"))
BUILD = 540.0
"""Seconds that a build may take: the limit of the tier is nearer."""
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
PROXIES = ("http_proxy", "https_proxy", "no_proxy")


def build_all(engine: Engine, work: Path) -> None:
    """Build base, qpd and leaf, and a Prometheus for the lab; what the engine still has is not made anew."""
    if not _has(engine, BASE):
        system = platform.freedesktop_os_release()
        _build_base(engine, work, BASE, system["VERSION_CODENAME"], system["ID"])
    secrets = _secrets(work)
    for target, name in (("leaf", LEAF), ("qpd", QPD)):
        _build(engine, REPOSITORY / "Dockerfile", REPOSITORY, BASE, name, f"--target={target}", *secrets)
    _build(engine, Path(__file__).with_name("prometheus.Dockerfile"), Path(__file__).parent, BASE, PROMETHEUS)


def leaf(engine: Engine, work: Path, release: str) -> str:
    """The name of an image of the target `leaf` with a Debian release's FRR, built where it is not there yet.

    Args:
        engine: what holds the images.
        work: where a base is made.
        release: such as `trixie`; empty: this machine's own.
    """
    if not release:
        return LEAF
    base, name = f"{BASE}-{release}", f"{LEAF}-{release}"
    if not _has(engine, base):
        _build_base(engine, work, base, release, "debian")
    _build(engine, REPOSITORY / "Dockerfile", REPOSITORY, base, name, "--target=leaf", *_secrets(work))
    return name


def _has(engine: Engine, image: str) -> bool:
    return bool(engine.docker("images", "--quiet", image).stdout.strip())


def _build(engine: Engine, file: Path, context: Path, base: str, name: str, *options: str) -> None:
    proxies = [f"--build-arg={word}" for word in PROXIES if word in os.environ]
    engine.docker(
        "build", "--progress=plain", "--network=host", f"--build-arg=BASE={base}", *proxies, *options,
        f"--file={file}", f"--tag={name}", str(context), timeout=BUILD,
    )  # fmt: skip


def _mirror(distribution: str) -> list[str]:
    """From where this machine has its packages, where they are this distribution's: one URI, or none."""
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(RELEASE) $(ORIGIN) $(REPO_URI)", "Identifier: Packages"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    wanted = [platform.freedesktop_os_release()["VERSION_CODENAME"], distribution.capitalize()]
    return [words[2] for words in map(str.split, listed) if words[:2] == wanted][:1]


def _build_base(engine: Engine, work: Path, name: str, release: str, distribution: str) -> None:
    """Import a minimal system of a distribution's release, such as bookworm and debian."""
    root = work / "base"
    subprocess.run(["rm", "-rf", "--one-file-system", str(root)], check=True)
    made = subprocess.run(
        [
            "debootstrap", "--variant=minbase", "--include=ca-certificates",
            f"--components={'main,universe' if distribution == 'ubuntu' else 'main'}",
            release, str(root), *_mirror(distribution),
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=BUILD,
    )  # fmt: skip
    assert made.returncode == 0, " | ".join(made.stdout.splitlines()[-3:])
    with subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE) as archive:
        engine.docker("import", "-", name, stdin=archive.stdout, timeout=300)
    subprocess.run(["rm", "-rf", "--one-file-system", str(root)], check=True)


def _secrets(work: Path) -> list[str]:
    """The build's pip reaches the package index as pip does here: its configuration, and whom it trusts."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    ).stdout
    settings: dict[str, str] = {}
    # Sections in the order of precedence: global, then a command's own, then the environment's.
    for line in sorted(listed.splitlines(), key=lambda line: line.startswith(":env:")):
        key, _, value = line.partition("=")
        settings[key.rpartition(".")[2]] = str(ast.literal_eval(value))
    passed = (
        "index-url",
        "extra-index-url",
        "trusted-host",
        "proxy",
        "default-timeout",
        "timeout",
        "retries",
    )
    lines = [f"{key} = {' '.join(settings[key].split())}" for key in passed if key in settings]
    file = work / "pip.conf"
    certificates = Path(settings.get("cert", CERTIFICATES))
    if certificates.exists():
        lines.append("cert = /run/secrets/ca")
    file.write_text("\n".join(["[global]", *lines, ""]))
    file.chmod(0o600)
    return [f"--secret=id=pip,src={file}"] + (
        [f"--secret=id=ca,src={certificates}"] if certificates.exists() else []
    )
