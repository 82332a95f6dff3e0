"""Generated labs: any description gives a lab that is consistent with itself, and a wrong one gives one line."""

from __future__ import annotations

import json
from ipaddress import ip_interface
from itertools import pairwise
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from qpd.lab import description, frr, frrconf, generate, labfolder, topology, wan
from qpd.lab.errors import LabError
from qpd.lab.topology import Role, Topology

ROOT = Path(__file__).parents[3]
FOUR_SITE = ROOT / "deploy/containerlab/four-site"

SMALL = """
name: small
spines: 2
sites:
  a: {leaves: 3, uplinks: 4, hosts: 2}
  b: {spines: 1}
wan:
  - {between: [a, b], links: 3, profile: paper, rate: 100mbit}
"""


def write(text: str, folder: Path) -> Topology:
    source = folder / "lab.yaml"
    source.write_text(text)
    labfolder.make(source, folder)
    return topology.load(folder)


def check(lab: Topology) -> None:
    """Both ends of every underlay link speak of the same addresses and AS numbers, and nothing is used twice."""
    confs = {}
    for node in lab.routers:
        file = node.bound(frr.FRR_CONF)
        assert file is not None
        confs[node.name] = (frrconf.parse(file.read_text()), file.read_text())
    every = [a for conf, _ in confs.values() for values in conf.addresses.values() for a in values]
    assert len({a.ip for a in every}) == len(every)
    for link in lab.fabric_links:
        (a,), (b,) = (confs[end.node][0].addresses[end.interface] for end in link.ends)
        assert a.network == b.network
        for near, far, far_address in ((link.a, link.b, b), (link.b, link.a, a)):
            line = f" neighbor {far_address.ip} remote-as {confs[far.node][0].asn}\n"
            assert line in confs[near.node][1], (near, line)
    leaves = [conf.asn for name, (conf, _) in confs.items() if lab.nodes[name].role is Role.LEAF]
    assert len(set(leaves)) == len(leaves)
    assert all(64512 <= conf.asn < 65535 for conf, _ in confs.values())
    for node in lab.routers:
        conf = confs[node.name][0]
        assert conf.hostname == node.name
        assert {link.end(node.name).interface for link in lab.uplinks(node.name)} == set(conf.addresses) - {
            "lo"
        }
    hosts = [line for node in lab.of_role(Role.HOST) for line in node.exec]
    addresses = [ip_interface(line.split()[3]) for line in hosts]
    assert len(set(addresses)) == len(addresses)
    assert all(" nodad" in line or ip_interface(line.split()[3]).version == 4 for line in hosts)


def test_a_description_becomes_a_lab(tmp_path: Path) -> None:
    lab = write(SMALL, tmp_path)
    check(lab)
    assert lab.name == "small"
    assert lab.sites == ["a", "b"]
    assert [len(lab.of_role(role)) for role in (Role.SPINE, Role.LEAF, Role.HOST, Role.QPD)] == [3, 5, 8, 5]
    assert [str(lab.link(f"a-leaf2:eth{u}").other("a-leaf2")) for u in (1, 2, 3, 4)] == [
        "a-spine1:eth3", "a-spine2:eth3", "a-spine1:eth4", "a-spine2:eth4",
    ]  # fmt: skip
    assert [str(link) for link in lab.inter_site_links] == [
        "a-spine1:eth7--b-spine1:eth3", "a-spine1:eth8--b-spine1:eth5", "a-spine2:eth7--b-spine1:eth4",
    ]  # fmt: skip
    shapes = wan.shapes(lab)
    assert set(shapes) == {end for link in lab.inter_site_links for end in link.ends}
    assert set(shapes.values()) == {wan.Shape(11.0, 1.0, rate=100_000_000)}
    for node in lab.nodes.values():
        for bind in node.binds:
            assert bind.source.exists(), bind


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(0, 3), st.integers(0, 2)),
        min_size=1,
        max_size=5,
    ),
    links=st.integers(0, 6),
)
def test_any_description_is_consistent(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[tuple[int, int, int, int]], links: int
) -> None:
    sites = {
        f"s{n}": {"spines": spines, "leaves": leaves, "uplinks": spines + more, "hosts": hosts}
        for n, (spines, leaves, more, hosts) in enumerate(sizes)
    }
    names = list(sites)
    wans = [
        {"between": [a, b], "links": max(sites[a]["spines"], sites[b]["spines"]) + links, "rtt_ms": 10}
        for a, b in pairwise(names)
    ]
    text = yaml.safe_dump({"name": "any", "sites": sites, "wan": wans}, sort_keys=False)
    lab = write(text, tmp_path_factory.mktemp("lab"))
    check(lab)
    for node in lab.of_role(Role.SPINE):
        far = {lab.site(link.other(node.name).node) for link in lab.uplinks(node.name)} - {
            lab.site(node.name)
        }
        at = names.index(lab.site(node.name))
        assert far == {*names[max(at - 1, 0) : at], *names[at + 1 : at + 2]}, "a spine has no way to a site"


def test_sixty_four_leaves_are_valid_for_containerlab(tmp_path: Path) -> None:
    lab = write("{name: big, spines: 2, leaves: 64, sites: {dc1: }}", tmp_path)
    check(lab)
    schema = json.loads(
        (ROOT / "tests/data/clab.schema.json").read_text().replace("[\\\\p{N}\\\\p{L}]", "[\\\\w]")
    )
    document = yaml.safe_load(lab.path.read_text())
    assert not [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(document)]


def test_the_four_site_lab_is_what_its_description_gives() -> None:
    text = (FOUR_SITE / "lab.yaml").read_text()
    made = generate.files(description.parse(text, "lab.yaml"), "../common", monitoring=True)
    there = {str(file.relative_to(FOUR_SITE)) for file in FOUR_SITE.rglob("*") if file.is_file()}
    assert there == set(made)
    assert [name for name, content in made.items() if (FOUR_SITE / name).read_text() != content] == [], (
        "run `qplab generate --force deploy/containerlab/four-site/lab.yaml`"
    )


def test_what_generated_labs_share_with_the_written_ones() -> None:
    """One kind of leaf, spine and sidecar: a change of two-dc's groups belongs into generate.py, too."""
    written = yaml.safe_load((ROOT / "deploy/containerlab/two-dc/two-dc.clab.yml").read_text())["topology"]
    made = yaml.safe_load((FOUR_SITE / "four-site.clab.yml").read_text())["topology"]
    for topology_ in (written, made):
        for group in topology_["groups"].values():
            group["binds"] = [
                bind for bind in group.get("binds", []) if "/common/" not in bind.replace("..", "")
            ]
            group.pop("exec", None)
    assert made["groups"] == written["groups"]
    assert made["defaults"] == written["defaults"]


def test_a_lab_is_not_written_over_another(tmp_path: Path) -> None:
    write(SMALL, tmp_path)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    with pytest.raises(LabError, match="is there already; give another folder, or --force"):
        labfolder.make(tmp_path / "lab.yaml")
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before
    labfolder.make(tmp_path / "lab.yaml", force=True)
    check(topology.load(tmp_path))


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("name: small", "name: Small", "name: 'Small': give 1 to 20"),
        ("spines: 2\n", "spines: two\n", "sites.a: spines: 'two': give 1 to 10"),
        ("spines: 2\n", "spine: 2\n", "the file: 'spine' is not among name, sites"),
        ("uplinks: 4", "uplinks: 1", "sites.a: uplinks: 1: some of 2 spines"),
        ("leaves: 3", "leaves: 90", "sites.a: leaves: 90: give 1 to 89"),
        ("  b: {spines: 1}", "  b-1: {spines: 1}", "sites: 'b-1': give 1 to 8"),
        ("between: [a, b]", "between: [a, c]", r"wan\[0\]: between: there is no site 'c'; sites are a, b"),
        ("between: [a, b]", "between: [a, a]", r"wan\[0\]: between: \['a', 'a'\]: give two sites"),
        ("links: 3", "links: 1", r"wan\[0\]: links: 1: give 2 to 64"),
        ("profile: paper", "profile: moon", r"wan\[0\].profile: 'moon' is none of paper"),
        ("rate: 100mbit", "rate: fast", r"wan\[0\]: rate: 'fast': write it as tc does"),
        ("rate: 100mbit", "jitter_ms: 20", r"wan\[0\]: delay 11 ms \+- 20 ms"),
        ("  - {between", "  #- {between", "wan: nothing leads to site b"),
        ("name: small", "bfd: fast\nname: small", "bfd: 'fast': write 100x3"),
        ("name: small", "name: [", "not YAML"),
    ],
)
def test_what_is_wrong_is_one_line_with_its_key(before: str, after: str, says: str) -> None:
    assert before in SMALL
    with pytest.raises(LabError, match=says) as caught:
        description.parse(SMALL.replace(before, after), "here.yaml")
    assert str(caught.value).startswith("here.yaml: ")
    assert "\n" not in str(caught.value)
