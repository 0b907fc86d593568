"""The artefacts in deploy/ as data: units, services of the compose file, containers of the ECS template."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import msgspec
import yaml  # type: ignore[import-untyped]

from db.settings import Settings

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))
BIN = Path(sys.executable).parent
VARIABLES = {field.encode_name for field in msgspec.structs.fields(Settings)}


class TemplateLoader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads a CloudFormation template; `!Ref X` becomes the text X."""


def read_tagged(loader: TemplateLoader, suffix: str, node: yaml.Node) -> Any:
    return loader.construct_scalar(node) if isinstance(node, yaml.ScalarNode) else loader.construct_sequence(node)


TemplateLoader.add_multi_constructor("!", read_tagged)


def unit_settings(unit: Path, name: str) -> list[str]:
    """The values of a setting of a unit; a backslash continues a line."""
    text = unit.read_text().replace("\\\n", "")
    return re.findall(rf"^{name}=(.*)$", text, re.MULTILINE)


def unit_setting(unit: Path, name: str) -> str:
    """The one value of a setting of a unit."""
    [value] = unit_settings(unit, name)
    return value


def compose_services() -> dict[str, dict[str, Any]]:
    """The services of the compose file."""
    services: dict[str, dict[str, Any]] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    return services


def ecs_containers() -> dict[str, dict[str, Any]]:
    """The containers of the ECS template by their names."""
    template = yaml.load((DEPLOY / "ecs.yaml").read_text(), TemplateLoader)  # noqa: S506  a SafeLoader
    tasks = [each for each in template["Resources"].values() if each["Type"] == "AWS::ECS::TaskDefinition"]
    containers = [container for task in tasks for container in task["Properties"]["ContainerDefinitions"]]
    return {container["Name"]: container for container in containers}
