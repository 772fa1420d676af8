"""From a YAML file to a ClusterConfig, or to one clear sentence per mistake."""

import difflib
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cluster.config import ClusterConfig
from core.errors import ConfigError

Tree = dict[str, Any]

_BOOL = "tag:yaml.org,2002:bool"

_PLAIN = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "tuple_type": "a list",
    "model_type": "a section of keys",
    "model_attributes_type": "a section of keys",
}
"""Types of pydantic's errors whose own words speak of Python."""


class BadConfig(ConfigError):
    """The config cannot be used; `problems` has one sentence per mistake."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def load_config(
    path: Path | None, overrides: Mapping[str, object] | None = None, *, needs_model: bool = True
) -> ClusterConfig:
    """Read `path` (None: only defaults), then set each override, `{"model.path": ...}`. Where no
    model is needed, its path may be missing; it is the current folder then.

    Relative paths in the file start at the file's folder, those in overrides at the current one.
    Raises BadConfig.
    """
    tree = {} if path is None else _read(path)
    if not needs_model and isinstance(model := tree.setdefault("model", {}), dict):
        model.setdefault("path", Path.cwd())
    for key, value in (overrides or {}).items():
        _set(tree, key, value.absolute() if isinstance(value, Path) else value)
    base = Path.cwd() if path is None else path.absolute().parent
    try:
        return ClusterConfig.model_validate(tree, context={"base": base})
    except ValidationError as error:
        source = "the config" if path is None else str(path)
        raise BadConfig([_sentence(source, detail) for detail in error.errors()]) from error


def _read(path: Path) -> Tree:
    try:
        tree = yaml.load(path.read_text("utf-8"), _Loader)
    except OSError as error:
        raise BadConfig([f"{path}: cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise BadConfig([f"{path}: is not a text file in UTF-8"]) from error
    except yaml.YAMLError as error:
        raise BadConfig([f"{path}: is not valid YAML: {_yaml_reason(error)}"]) from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise BadConfig([f"{path}: holds {_kind(tree)}, not sections such as `model:`"])
    return tree


class _Loader(yaml.SafeLoader):
    """Refuses a key given twice, of which YAML would quietly drop the first; and a bare `off` or
    `no` is text, as in YAML 1.2: some settings have `off` among their values.
    """

    def construct_mapping(
        self, node: yaml.MappingNode, deep: bool = False
    ) -> dict[Hashable, object]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                break  # refused below
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in known if tag != _BOOL or first in "tTfF"]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _yaml_reason(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return str(error).splitlines()[0]


def _set(tree: Tree, dotted: str, value: object) -> None:
    *sections, last = dotted.split(".")
    for section in sections:
        child = tree.get(section)
        if not isinstance(child, dict):
            child = tree[section] = {}
        tree = child
    tree[last] = value


def _sentence(source: str, detail: ErrorDetails) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    if detail["type"] in {"extra_forbidden", "invalid_key"}:
        return f"{source}: {where} is not a known key{_nearest(detail['loc'])}"
    if detail["type"] == "missing":
        hint = "; set it, or give --model DIR" if where in {"model", "model.path"} else ""
        return f"{source}: {where} is missing{hint}"
    wanted = _PLAIN.get(detail["type"], detail["msg"].removeprefix("Input should be "))
    return f"{source}: {where} is {_shown(detail['input'])}, but should be {wanted}"


def _nearest(location: tuple[int | str, ...]) -> str:
    *sections, key = (str(part) for part in location)
    here = _known_keys(ClusterConfig, sections)
    if close := difflib.get_close_matches(key, here, n=1, cutoff=0.5):
        return f"; did you mean {'.'.join([*sections, close[0]])}?"
    elsewhere = [path for path in _all_keys(ClusterConfig) if path.rpartition(".")[2] == key]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return f"; known keys here: {', '.join(here)}"


def _known_keys(model: type[BaseModel], sections: list[str]) -> list[str]:
    for section in sections:
        inner = _section(model, section)
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def _all_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name in model.model_fields:
        inner = _section(model, name)
        keys += [prefix + name] if inner is None else _all_keys(inner, f"{prefix}{name}.")
    return keys


def _section(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    field = model.model_fields.get(name)
    if field is None:
        return None
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else _kind(value)


def _kind(value: object) -> str:
    names = {dict: "a section", list: "a list", str: "text", type(None): "nothing"}
    return names.get(type(value), f"a {type(value).__name__}")
