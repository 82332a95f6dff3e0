"""Labs from a short description: the topology file, one folder a node, the address plan. Pure: text in, text out.

The plan, with site D (1 to 9), spine S, leaf L, uplink U, host H of its leaf:

==================================  ============================================
loopback of a spine, of a leaf      10.255.D.S, 10.255.D.(10+L) (its VTEP)
leaf's uplink U                     10.D.(10+L).(2U-2) spine, +1 leaf (/31)
inter-site link k (from 0)          10.0.(k/128).(2(k mod 128)), +1 (/31)
host                                172.(15+H).D.L/12, fd00:100::H:D:L/64
AS number of a site's spines        64500 + 100 D
AS number of a leaf                 64500 + 100 D + 10 + L
==================================  ============================================
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from qpd.lab import wan
from qpd.lab.description import DESCRIPTION, Description, Site
from qpd.lab.generate_readme import readme
from qpd.lab.wan import Shape

_UNDERLAY_MTU, _HOST_MTU = 9100, 4200

_CONFIGS = "../../../configs"
DASHBOARD = f"{_CONFIGS}/grafana-dashboard.json"
"""Where the folder of the nodes' scripts sees the dashboard; in the repository only."""


@dataclass(frozen=True)
class _Port:
    """An underlay port of a router."""

    interface: str
    address: str
    neighbor: str
    neighbor_as: int
    peer: str
    group: str
    shape: Shape = wan.PLAIN


@dataclass(frozen=True)
class _Router:
    name: str
    role: str
    site: Site
    number: int
    asn: int
    loopback: str
    ports: tuple[_Port, ...]


def files(lab: Description, common: str, *, monitoring: bool = False) -> dict[str, str]:
    """Every file of the lab by its path in the lab's folder.

    Args:
        lab: what it shall be.
        common: the folder with the nodes' scripts, as the lab's folder sees it.
        monitoring: with Prometheus and Grafana, whose files lie about `common` in the repository.
    """
    routers = list(_routers(lab))
    made = {DESCRIPTION: lab.text, f"{lab.name}.clab.yml": _topology(lab, routers, common, monitoring)}
    made |= {"qpd.yaml": _qpd(lab), "README.md": readme(lab)}
    if monitoring:
        made["prometheus/prometheus.yml"] = _prometheus(lab)
    for router in routers:
        made |= {
            f"{router.name}/frr.conf": _frr_conf(lab, router),
            f"{router.name}/daemons": _DAEMONS,
            f"{router.name}/vtysh.conf": "service integrated-vtysh-config\n",
        }
    return made


def _routers(lab: Description) -> Iterator[_Router]:
    between: dict[str, list[_Port]] = {}
    number = 0
    for one in lab.wans:
        for i, j in one.ends():
            low = f"10.0.{number // 128}.{2 * (number % 128)}"
            high = f"10.0.{number // 128}.{2 * (number % 128) + 1}"
            near, far = one.a.spine(i), one.b.spine(j)
            ports = between.setdefault(near, []), between.setdefault(far, [])
            interfaces = _next_port(one.a, i, ports[0]), _next_port(one.b, j, ports[1])
            ports[0].append(_Port(interfaces[0], low, high, one.b.spine_as, far, "SITES", one.shape))
            ports[1].append(_Port(interfaces[1], high, low, one.a.spine_as, near, "SITES", one.shape))
            number += 1
    for site in lab.sites:
        yield from _spines(site, between)
        yield from _leaves(site)


def _next_port(site: Site, spine: int, taken: Sequence[_Port]) -> str:
    """A spine's next free interface after those to its leaves."""
    to_leaves = site.leaves * sum(site.spine_of(uplink) == spine for uplink in range(1, site.uplinks + 1))
    return f"eth{to_leaves + len(taken) + 1}"


def _spines(site: Site, between: Mapping[str, Sequence[_Port]]) -> Iterator[_Router]:
    for spine in range(1, site.spines + 1):
        uplinks = [u for u in range(1, site.uplinks + 1) if site.spine_of(u) == spine]
        down = [
            _Port(
                f"eth{(leaf - 1) * len(uplinks) + index}",
                f"10.{site.number}.{10 + leaf}.{2 * uplink - 2}",
                f"10.{site.number}.{10 + leaf}.{2 * uplink - 1}",
                site.leaf_as(leaf),
                site.leaf(leaf),
                "LEAVES",
            )
            for leaf in range(1, site.leaves + 1)
            for index, uplink in enumerate(uplinks, 1)
        ]
        name = site.spine(spine)
        loopback = f"10.255.{site.number}.{spine}"
        yield _Router(name, "spine", site, spine, site.spine_as, loopback, (*down, *between.get(name, ())))


def _leaves(site: Site) -> Iterator[_Router]:
    for leaf in range(1, site.leaves + 1):
        up = tuple(
            _Port(
                f"eth{uplink}",
                f"10.{site.number}.{10 + leaf}.{2 * uplink - 1}",
                f"10.{site.number}.{10 + leaf}.{2 * uplink - 2}",
                site.spine_as,
                site.spine(site.spine_of(uplink)),
                "SPINES",
            )
            for uplink in range(1, site.uplinks + 1)
        )
        loopback = f"10.255.{site.number}.{10 + leaf}"
        yield _Router(site.leaf(leaf), "leaf", site, leaf, site.leaf_as(leaf), loopback, up)


_DAEMONS = """\
# Which of FRR's daemons run on this node, and with which options.
zebra=yes
bgpd=yes
bfdd=yes

vtysh_enable=yes
zebra_options="  -A 127.0.0.1"
bgpd_options="   -A 127.0.0.1"
bfdd_options="   -A 127.0.0.1"
"""


def _frr_conf(lab: Description, router: _Router) -> str:
    groups = list(dict.fromkeys(port.group for port in router.ports))
    lines = [
        f"! {router.name}: {router.role} {router.number} of site {router.site.name}",
        "frr version 8.4",
        "frr defaults datacenter",
        f"hostname {router.name}",
        "service integrated-vtysh-config",
        "!",
        "! FRR 8.4 and recent kernels disagree about nexthop objects (seen with 6.18): after a link flap",
        '! "Route install failed", and ECMP does not come back. Routes with inline next hops do not have that fault.',
        "no zebra nexthop kernel enable",
        "!",
        "interface lo",
        f" description router id{' and VTEP' if router.role == 'leaf' else ''}",
        f" ip address {router.loopback}/32",
        "exit",
        "!",
    ]
    for port in router.ports:
        far = ", inter-site" if port.group == "SITES" else ""
        lines += [
            f"interface {port.interface}",
            f" description {port.peer}{far}",
            f" ip address {port.address}/31",
        ]
        lines += ["exit", "!"]
    lines.append("bfd")
    for name, (interval, multiplier) in {"fabric": lab.bfd, "fast": (10, 3)}.items():
        lines += [f" profile {name}", f"  transmit-interval {interval}", f"  receive-interval {interval}"]
        lines += [f"  detect-multiplier {multiplier}", " exit"]
    lines += ["exit", "!", f"router bgp {router.asn}", f" bgp router-id {router.loopback}"]
    lines += [
        " no bgp ebgp-requires-policy",
        " no bgp default ipv4-unicast",
        " bgp bestpath as-path multipath-relax",
    ]
    for group in groups:
        lines += [f" neighbor {group} peer-group", f" neighbor {group} bfd profile fabric"]
        lines += [f" neighbor {group} timers connect 1"]
    for port in router.ports:
        lines += [f" neighbor {port.neighbor} remote-as {port.neighbor_as}"]
        lines += [f" neighbor {port.neighbor} peer-group {port.group}"]
        lines += [f" neighbor {port.neighbor} description {port.peer}"]
    lines += [" !", " address-family ipv4 unicast", "  redistribute connected route-map LOOPBACK"]
    lines += [f"  neighbor {group} activate" for group in groups]
    lines += ["  maximum-paths 64", " exit-address-family", " !", " address-family l2vpn evpn"]
    lines += [f"  neighbor {group} activate" for group in groups]
    lines += ["  advertise-all-vni"] if router.role == "leaf" else []
    lines += [" exit-address-family", "exit", "!"]
    lines += ["route-map LOOPBACK permit 10", " match interface lo", "exit", "!"]
    return "\n".join(lines) + "\n"


def _qpd(lab: Description) -> str:
    most = max(site.uplinks for site in lab.sites)
    planes = "".join(f"  eth{uplink}: plane{uplink}\n" for uplink in range(1, most + 1))
    return (
        "# qpd beside every leaf. The sites' leaves see different spines: the planes say which of them belong\n"
        "# together, so that both directions of a QP pair's traffic take spines of one plane.\n"
        f"planes:\n{planes}"
    )


def _prometheus(lab: Description) -> str:
    targets = [
        f"          - {site.leaf(leaf)}:9791\n" for site in lab.sites for leaf in range(1, site.leaves + 1)
    ]
    return _PROMETHEUS + "".join(targets)


def _topology(lab: Description, routers: Sequence[_Router], common: str, monitoring: bool) -> str:
    nodes: list[str] = []
    for site in lab.sites:
        mine = [router for router in routers if router.site == site]
        for router in mine:
            nodes += _router_lines(router)
        for leaf in range(1, site.leaves + 1):
            nodes += [
                f"    {site.leaf(leaf)}-qpd:",
                "      group: qpd",
                f"      network-mode: container:{site.leaf(leaf)}",
                f"      stages: {{create: {{wait-for: [{{node: {site.leaf(leaf)}, stage: healthy}}]}}}}",
            ]
        for leaf in range(1, site.leaves + 1):
            for number in range(1, site.hosts + 1):
                nodes += [
                    f"    {site.host(leaf, number)}:",
                    "      group: host",
                    *_site_label(site),
                    "      exec:",
                ]
                nodes += [
                    f"        - ip address add 172.{15 + number}.{site.number}.{leaf}/12 dev eth1",
                    f"        - ip address add fd00:100::{number}:{site.number}:{leaf}/64 dev eth1 nodad",
                ]
    head = _HEAD.format(name=lab.name, image=lab.image, common=common, description=DESCRIPTION)
    if monitoring:
        nodes += _MONITORING.format(common=common, configs=f"{common}/{_CONFIGS}").splitlines()
    return head + "\n".join(nodes) + "\n\n  links:\n" + "\n".join(_links(lab, routers)) + "\n"


def _router_lines(router: _Router) -> list[str]:
    lines = [f"    {router.name}:", f"      group: {router.role}", *_site_label(router.site)]
    execs = [
        f"sh /etc/qplab/wan.sh {port.interface} {' '.join(words)}"
        for port in router.ports
        if (words := port.shape.words())
    ]
    if router.role == "leaf" and router.site.hosts:
        ports = " ".join(f"eth{router.site.uplinks + number}" for number in range(1, router.site.hosts + 1))
        execs.append(f"sh /etc/qplab/vtep.sh /etc/frr/frr.conf {ports}")
    elif router.role == "leaf":
        execs.append("sh /etc/qplab/vtep.sh /etc/frr/frr.conf")
    return lines + (["      exec:", *(f"        - {line}" for line in execs)] if execs else [])


def _site_label(site: Site) -> list[str]:
    return ["      labels:", f"        qplab.site: {site.name}"]


def _links(lab: Description, routers: Sequence[_Router]) -> Iterator[str]:
    def line(a: str, b: str, mtu: int) -> str:
        return f'    - {{endpoints: ["{a}", "{b}"], mtu: {mtu}}}'

    by_address = {
        port.address: f"{router.name}:{port.interface}" for router in routers for port in router.ports
    }
    seen: set[str] = set()
    for group, remark in (("SPINES", None), ("SITES", "between the sites")):
        chosen = [(r, p) for r in routers for p in r.ports if p.group == group]
        if chosen and remark:
            yield f"    # {remark}"
        for router, port in chosen:
            if port.neighbor not in seen:
                seen.add(port.address)
                yield line(f"{router.name}:{port.interface}", by_address[port.neighbor], _UNDERLAY_MTU)
    if any(site.hosts for site in lab.sites):
        yield "    # hosts"
    for site in lab.sites:
        for leaf in range(1, site.leaves + 1):
            for number in range(1, site.hosts + 1):
                port_ = f"{site.leaf(leaf)}:eth{site.uplinks + number}"
                yield line(port_, f"{site.host(leaf, number)}:eth1", _HOST_MTU)


_HEAD = """\
# Made by `qplab generate` from {description}: change that and make it anew. README.md has the address plan.
# Comes up by `containerlab deploy` and by `qplab up`.
name: {name}
prefix: ""

topology:
  defaults:
    kind: linux
    privileged: false
  groups:
    spine:
      image: ${{QPLAB_SPINE_IMAGE:={image}}}
      entrypoint: sh /etc/qplab/start-frr.sh
      cap-add: &frr [NET_ADMIN, SYS_ADMIN]
      healthcheck: &answers
        test: [CMD, sh, /etc/qplab/frr-answers.sh]
        interval: 5
        timeout: 10
        retries: 12
      labels:
        qplab.role: spine
      binds:
        - __clabNodeName__/frr.conf:/etc/frr/frr.conf
        - __clabNodeName__/daemons:/etc/frr/daemons
        - __clabNodeName__/vtysh.conf:/etc/frr/vtysh.conf
        - {common}/start-frr.sh:/etc/qplab/start-frr.sh
        - {common}/frr-answers.sh:/etc/qplab/frr-answers.sh
        - {common}/wan.sh:/etc/qplab/wan.sh
      sysctls: &router
        net.ipv4.ip_forward: 1
        net.ipv6.conf.all.forwarding: 1
        # ECMP by the outer 5-tuple, and never over a link whose carrier is gone.
        net.ipv4.fib_multipath_hash_policy: 1
        net.ipv4.conf.all.ignore_routes_with_linkdown: 1
        net.ipv4.conf.default.ignore_routes_with_linkdown: 1
        # With ECMP a packet may rightly come in by another link than the one its answer takes.
        net.ipv4.conf.all.rp_filter: 0
        net.ipv4.conf.default.rp_filter: 0
    leaf:
      image: ${{QPLAB_LEAF_IMAGE:={image}}}
      entrypoint: sh /etc/qplab/start-frr.sh
      cap-add: *frr
      healthcheck: *answers
      labels:
        qplab.role: leaf
      binds:
        - __clabNodeName__/frr.conf:/etc/frr/frr.conf
        - __clabNodeName__/daemons:/etc/frr/daemons
        - __clabNodeName__/vtysh.conf:/etc/frr/vtysh.conf
        - {common}/start-frr.sh:/etc/qplab/start-frr.sh
        - {common}/frr-answers.sh:/etc/qplab/frr-answers.sh
        - {common}/vtep.sh:/etc/qplab/vtep.sh
      volumes:
        - __clabLabName__-__clabNodeName__-qpd:/var/run/frr
      sysctls: *router
    host:
      image: ${{QPLAB_HOST_IMAGE:={image}}}
      entrypoint: sleep infinity
      cap-add: [NET_ADMIN]
      labels:
        qplab.role: host
    qpd:
      image: ${{QPLAB_QPD_IMAGE:=qpd}}
      entrypoint: sh /etc/qplab/start-qpd.sh
      labels:
        qplab.role: qpd
      # docs/containers.md: what each is for, and what to set where the engine does not know the last two.
      cap-add: [NET_ADMIN, "${{QPLAB_CAP_BPF:=BPF}}", "${{QPLAB_CAP_PERFMON:=PERFMON}}"]
      binds:
        - qpd.yaml:/etc/qpd/qpd.yaml
        - {common}/start-qpd.sh:/etc/qplab/start-qpd.sh
        - /sys/fs/bpf:/sys/fs/bpf
      volumes:
        - __clabLabName__-__clabNodeName__:/var/run/frr
      env:
        # On the management network, for Prometheus.
        QPD_METRICS__LISTEN: 0.0.0.0:9791

  nodes:
"""

_MONITORING = """\
    prometheus:
      image: ${{QPLAB_PROMETHEUS_IMAGE:=prom/prometheus:v3.5.0}}
      binds:
        - prometheus/prometheus.yml:/etc/prometheus/prometheus.yml
        - {configs}/rules.yml:/etc/prometheus/rules.yml
      ports:
        - 9090:9090
    grafana:
      image: ${{QPLAB_GRAFANA_IMAGE:=grafana/grafana:12.1.0}}
      binds:
        - {common}/grafana/datasources.yml:/etc/grafana/provisioning/datasources/qpd.yml
        - {common}/grafana/dashboards.yml:/etc/grafana/provisioning/dashboards/qpd.yml
        - {configs}/grafana-dashboard.json:/var/lib/grafana/dashboards/qpd.json
      env:
        GF_AUTH_ANONYMOUS_ENABLED: "true"
        GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH: /var/lib/grafana/dashboards/qpd.json
      ports:
        - 3000:3000
"""

_PROMETHEUS = """\
# The qpd of every leaf, by the leaf's name on the management network.
global:
  scrape_interval: 5s
  evaluation_interval: 5s

rule_files:
  - rules.yml

scrape_configs:
  - job_name: qpd
    static_configs:
      - targets:
"""
