"""Generates libs/common/contracts/messages.py from proto/, the one source of truth.

`python infra/generate_contracts.py` writes the file; `--check` exits 1 when the committed one is stale, so that
nobody edits a message in one place only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "libs/common/contracts/messages.py"

SCALARS = {
    "TYPE_STRING": ("str", '""'),
    "TYPE_BOOL": ("bool", "False"),
    "TYPE_DOUBLE": ("float", "0.0"),
    "TYPE_INT32": ("int", "0"),
    "TYPE_INT64": ("Int64", "0"),
    "TYPE_BYTES": ("Bytes", 'b""'),
}
TIMESTAMP = ".google.protobuf.Timestamp"
KINDS = {
    "KIND_EVENT": "EVENT",
    "KIND_COMMAND": "COMMAND",
    "KIND_REQUEST": "REQUEST",
    "KIND_QUERY": "QUERY",
    "KIND_FRAME": "FRAME",
}

HEADER = '''"""Every message on the bus. Generated from proto/ by infra/generate_contracts.py: edit there, not here."""

from __future__ import annotations

from datetime import datetime
from typing import ClassVar

from pydantic import Field

from libs.common.contracts.message import Bytes, Int64, Kind, Message, Route
'''


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail when the committed file is stale")
    check = parser.parse_args().check
    text = formatted(render(descriptors()))
    if check:
        if TARGET.read_text() != text:
            print(f"{TARGET.relative_to(ROOT)} is not what proto/ says. Run: python infra/generate_contracts.py")
            return 1
        return 0
    TARGET.write_text(text)
    return 0


def descriptors() -> list[dict[str, Any]]:
    """The FileDescriptorProtos of nabla's own files, dependencies first, as buf prints them in JSON."""
    command = [tool("buf"), "build", "-o", "-#format=json", "--as-file-descriptor-set"]
    image = json.loads(subprocess.run(command, cwd=ROOT / "proto", check=True, capture_output=True).stdout)
    files = [file for file in image["file"] if file["name"].startswith("nabla/")]
    return [file for file in files if not file["name"].startswith("nabla/options/")]


def render(files: list[dict[str, Any]]) -> str:
    messages = [part for file in files for part in message_classes(file)]
    names = [name for name, _ in messages]
    table = "MESSAGES: tuple[type[Message], ...] = (\n" + "".join(f"    {name},\n" for name in names) + ")\n"
    return HEADER + "\n\n" + "\n\n".join(text for _, text in messages) + "\n\n" + table


def message_classes(file: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and source of each message of one file; referenced messages come first, as proto allows any order."""
    comments = leading_comments(file)
    indexed = {message["name"]: (index, message) for index, message in enumerate(file.get("messageType", []))}
    done: set[str] = set()

    def visit(name: str) -> Iterator[tuple[str, str]]:
        if name in done or name not in indexed:
            return
        done.add(name)
        index, message = indexed[name]
        for field in message.get("field", []):
            if field["type"] == "TYPE_MESSAGE":
                yield from visit(short(field["typeName"]))
        yield name, message_class(message, comments, (4, index))

    for name in indexed:
        yield from visit(name)


def message_class(message: dict[str, Any], comments: dict[tuple[int, ...], str], path: tuple[int, ...]) -> str:
    lines = [f"class {message['name']}(Message):"]
    if comment := comments.get(path):
        lines += [f'    """{comment}"""', ""]
    if route := message.get("options", {}).get("[nabla.options.v1.route]"):
        reply = f", reply={route['reply']!r}" if route.get("reply") else ""
        kind = KINDS[route["kind"]]
        lines += [
            f"    ROUTE: ClassVar[Route] = Route(Kind.{kind}, {route['owner']!r}, {route['name']!r}{reply})",
            "",
        ]
    maps = {
        nested["name"]: nested for nested in message.get("nestedType", []) if nested.get("options", {}).get("mapEntry")
    }
    for index, field in enumerate(message.get("field", [])):
        if comment := comments.get((*path, 2, index)):
            lines += [f"    # {line}" for line in comment.split("\n")]
        lines.append(f"    {field['name']}: {annotation(field, maps)}")
    if len(lines) == 1:
        lines.append("    pass")
    return "\n".join(lines) + "\n"


def annotation(field: dict[str, Any], maps: dict[str, dict[str, Any]]) -> str:
    """The Python type and default of a field, with proto3's meaning of absence."""
    entry = maps.get(short(field.get("typeName", "")))
    if entry:
        key, value = (base_type(part)[0] for part in entry["field"])
        return f"dict[{key}, {value}] = Field(default_factory=dict)"
    kind, default = base_type(field)
    if field["label"] == "LABEL_REPEATED":
        return f"tuple[{kind}, ...] = ()"
    if field.get("proto3Optional") or kind == "datetime":
        return f"{kind} | None = None"
    return f"{kind} = {default}"


def base_type(field: dict[str, Any]) -> tuple[str, str]:
    if field["type"] != "TYPE_MESSAGE":
        return SCALARS[field["type"]]
    if field["typeName"] == TIMESTAMP:
        return "datetime", "None"
    name = short(field["typeName"])
    return name, f"Field(default_factory={name})"


def leading_comments(file: dict[str, Any]) -> dict[tuple[int, ...], str]:
    locations = file.get("sourceCodeInfo", {}).get("location", [])
    return {
        tuple(location["path"]): "\n".join(line.strip() for line in location["leadingComments"].strip().split("\n"))
        for location in locations
        if location.get("leadingComments")
    }


def short(type_name: str) -> str:
    return type_name.rsplit(".", 1)[-1]


def formatted(source: str) -> str:
    command = [tool("ruff"), "format", "--stdin-filename", str(TARGET), "-"]
    return subprocess.run(command, input=source, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)


if __name__ == "__main__":
    sys.exit(main())
