"""Writes what people read about the configuration from the model, so that it cannot go stale.

``python -m qpd.settings_docs`` prints ``docs/configuration.md``, with ``--yaml`` ``configs/qpd.yaml``.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator

from pydantic.fields import FieldInfo

from qpd.settings import DEFAULT_CONFIG, Settings, leaves, variable_of

_COMPUTED = {"node": ("null", "the host name")}
"""Keys whose default depends on the machine: how YAML says it, and what it is."""


_HEAD = f"""\
# Configuration

Written from `qpd/settings.py` by `python -m qpd.settings_docs`; change the model there.

qpd needs no configuration on an FRR leaf. What differs from the defaults goes into `{DEFAULT_CONFIG}`, or into a
YAML file named with `qpd run --config FILE`; [`configs/qpd.yaml`](../configs/qpd.yaml) lists every key.
`qpd check FILE` prints the configuration in effect, or everything that is wrong with the file:

```console
$ qpd check /etc/qpd/qpd.yaml
/etc/qpd/qpd.yaml:3: hold_up: '5x' is no duration; give seconds (1.5) or a number with ms, s, m or h (500ms)
/etc/qpd/qpd.yaml:7: bpf.atach: no such key; did you mean bpf.attach?
```

Environment variables win over the file: `QPD_`, the key in capitals, two underscores for each dot
(`QPD_BPF__PIN_DIR`). Lists are names with commas, mappings `eth1=a,eth2=b` or JSON. Unknown keys are errors,
as are variables that name one of the sections below or come close to a key.
"""

_TAIL = """
Durations are seconds, or a number with a unit: `500ms`, `2s`, `1.5m`, `1h`.

## Planes

A plane is a label that both ends of a QP's traffic give the same road. Inside one data centre the leaves see
the same spines by the same names, and the default (the path's name) already is such a label. Between two data
centres each end sees spines of its own; then both are told which of them belong together:

```yaml
# on the leaves of dc1             # on the leaves of dc2
planes:                            # planes:
  dc1-spine1: red                  #   dc2-spine1: red
  dc1-spine2: blue                 #   dc2-spine2: blue
```

Path names are those that `qpctl paths` shows. An interface's name, or the peer's host name where several paths
lead to one peer, works for all of these paths; the path's own name wins.
"""


def example_file() -> str:
    """``configs/qpd.yaml``: every key with its meaning and its default."""
    lines = [
        "# Configuration of qpd, with the default of every key. qpd needs none of it on an FRR leaf: keep only what",
        f"# differs. Read from {DEFAULT_CONFIG} or from the file given with --config; `qpd check FILE` examines it.",
        "# Every key can be set in the environment instead, as QPD_ and its name (QPD_BPF__PIN_DIR).",
        "# Written by `python -m qpd.settings_docs --yaml` from qpd/settings.py.",
    ]
    section = ""
    for key, info in leaves():
        group, _, name = key.rpartition(".")
        indent = "  " if group else ""
        lines.append("")
        if group != section:
            section = group
            lines += [*_comment(Settings.model_fields[group].description or "", ""), f"{group}:"]
        lines += _comment(_meaning(info), indent)
        lines += [f"{indent}# Example: {name}: {_text(example)}" for example in info.examples or ()]
        lines.append(f"{indent}{name}: {_default(key, info)[0]}")
    return "\n".join(lines) + "\n"


def document() -> str:
    """``docs/configuration.md``."""
    lines = [_HEAD, "| key | default | meaning | variable |", "|---|---|---|---|"]
    for key, info in leaves():
        _, said = _default(key, info)
        lines.append(f"| `{key}` | {said} | {_meaning(info)} | `{variable_of(key)}` |")
    return "\n".join([*lines, _TAIL])


def _meaning(info: FieldInfo) -> str:
    return info.description or ""


def _default(key: str, info: FieldInfo) -> tuple[str, str]:
    """The default as YAML, and as it is said in a table."""
    if key in _COMPUTED:
        value, said = _COMPUTED[key]
        return value, said
    value = info.get_default(call_default_factory=True)
    text = _text(str(value) if hasattr(value, "is_absolute") else value)
    return text, f"`{text}`"


def _text(value: object) -> str:
    """A value as YAML in one line; JSON is YAML, but for quotes that are not needed."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_text, value)) + "]"
    if isinstance(value, float) and value == int(value):
        return str(int(value))
    if isinstance(value, str):
        return value
    return json.dumps(value)


def _comment(text: str, indent: str) -> Iterator[str]:
    head = f"{indent}# "
    yield from textwrap.wrap(text, 110, initial_indent=head, subsequent_indent=head, break_on_hyphens=False)


if __name__ == "__main__":
    sys.stdout.write(example_file() if sys.argv[1:] == ["--yaml"] else document())
