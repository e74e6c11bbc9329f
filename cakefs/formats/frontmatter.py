"""The YAML at the head of a model card (README.md), as the tools of the Hub read it. Pure."""

from typing import Any

import yaml

LIMIT = 64 * 1024  # Characters; a longer one is no head.


def parse_front_matter(text: str) -> dict[str, Any]:
    """What stands between the first line `---` and the next; empty where there is no such head or it is no YAML."""
    lines = text.splitlines()
    if not lines or lines[0] != "---":
        return {}
    stop = lines.index("---", 1) if "---" in lines[1:] else len(lines)
    head = "\n".join(lines[1:stop]) + "\n"
    if len(head) > LIMIT:
        return {}
    head = head.replace("- no\n", '- "no"\n').replace("\t", "  ")  # Norwegian is a language, and not `false`.
    try:
        found = yaml.load(head, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


class _Loader(yaml.SafeLoader):
    """Without aliases: a few lines of them say as much as fills the memory."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)
