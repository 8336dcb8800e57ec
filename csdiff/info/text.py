"""What `csdiff info` found, for people."""

from __future__ import annotations


def as_text(facts: dict) -> str:
    """An aligned list under the names of `--json`: single facts, a paragraph a section, the problems last."""
    facts = dict(facts)
    problems = facts.pop("problems")
    title = f"{facts.pop('kind').capitalize()} {facts.pop('path')}"
    size = f"{_bytes(facts.pop('bytes'))} in {facts.pop('files')} files"
    plain, sections = _split(facts)
    lines = [title, *_rows({"size": size, **plain}, "  ")]
    for name, section in sections.items():
        lines += ["", name, *_section(section)]
    lines += ["", "problems" if problems else "no problems found", *(f"  {problem}" for problem in problems)]
    return "\n".join(lines)


def _section(section: dict) -> list[str]:
    """A section's facts with dotted names; parts that are alike (columns, components) one a line."""
    if section and all(isinstance(value, dict) for value in section.values()) and not _deep(section):
        width = max(map(len, section)) + 2
        return [f"  {name:<{width}}{_inline(value)}" for name, value in section.items()]
    return _rows(_flat(section), "  ")


def _deep(section: dict) -> bool:
    return any(isinstance(inner, dict) for value in section.values() for inner in value.values())


def _inline(part: dict) -> str:
    return ", ".join(
        _value(key, value) if key == "class" else f"{key} {_value(key, value)}" for key, value in part.items()
    )


def _split(facts: dict) -> tuple[dict, dict]:
    facts = {name: value for name, value in facts.items() if value is not None and value != {}}
    sections = {name: value for name, value in facts.items() if isinstance(value, dict)}
    return {name: value for name, value in facts.items() if name not in sections}, sections


def _rows(values: dict, indent: str) -> list[str]:
    if not values:
        return []
    width = max(map(len, values)) + 2
    return [f"{indent}{name:<{width}}{_value(name, value)}" for name, value in values.items()]


def _flat(values: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            flat[prefix + name] = value
    return flat


def _value(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name == "weights":
        return _bytes(value) if isinstance(value, int) else str(value)
    if name.endswith("sha256"):
        return str(value)[:12]
    if isinstance(value, int):
        return f"{value:,}" if name not in ("seed",) else str(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return str(value)


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return str(count)
