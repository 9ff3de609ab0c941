"""YAML files that others wrote: plain values, without aliases."""

from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """A loader without aliases, by which a short text can stand for one of any length."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)


def read_yaml(file: Path) -> Any:
    """Read a YAML file; PyYAML's constructors raise errors of many kinds."""
    return yaml.load(file.read_text(encoding="utf-8"), _Loader)
