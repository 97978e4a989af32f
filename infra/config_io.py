"""Strict YAML in, validated trees out: overrides, error messages, resolved dump, hash. Torch-free."""

import difflib
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from infra.redaction import redacted, secret_in_address

ModelT = TypeVar("ModelT", bound=BaseModel)


class ConfigError(Exception):
    """A configuration that cannot be used. `problems` holds one line per fault."""

    def __init__(self, source: str, problems: list[str]) -> None:
        self.source = source
        self.problems = problems
        lines = "".join(f"\n  - {problem}" for problem in problems)
        super().__init__(f"{source}: {len(problems)} problem{'s' if len(problems) > 1 else ''}{lines}")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML 1.2 file whose top level is a mapping.

    YAML 1.2 means `3e-5` is a number, `on` and `1:30` stay text. A key written twice, an anchor, a tag or a
    second document is an error. Raises ConfigError with the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(str(path), [_missing_file(path)]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"cannot be read as UTF-8 text: {error}"]) from error
    return parse_mapping(text, str(path))


def parse_mapping(text: str, source: str) -> dict[str, Any]:
    """Parse YAML text with a mapping at its top; an empty text is an empty mapping."""
    tree = _parse(text, source)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            source, [f"the top level is a {_kind(tree)}; expected `key: value` lines (a mapping)"]
        )
    return tree


def apply_overrides(tree: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return a copy of `tree` with `stages.0.learning_rate=1e-3` style assignments applied.

    Values are parsed as YAML. A list index must exist or be the next free one. Whether a key is known is
    decided later by `validate`. Raises ConfigError naming every override that does not fit.
    """
    result = _deep_copy(tree)
    problems: list[str] = []
    for override in overrides:
        path, sign, text = override.partition("=")
        if not sign or not path or not all(path.split(".")):
            problems.append(
                f"{override!r} is not of the form key.path=value, such as stages.0.learning_rate=1e-3"
            )
            continue
        try:
            value = _parse(text, f"value of {path}")
        except ConfigError as error:
            problems.append(f"{override!r}: {'; '.join(error.problems)}")
            continue
        problem = _assign(result, path.split("."), value)
        if problem:
            problems.append(f"{override!r}: {problem}")
    if problems:
        raise ConfigError("command-line overrides", problems)
    return result


def validate(model: type[ModelT], tree: Mapping[str, Any], source: str) -> ModelT:
    """Build the typed tree; a ConfigError lists every fault with key, value found, rule and nearest key.

    An address with a password or signature is a fault: the tree is stored and shown in many places.
    """
    if problems := list(_secrets_in(tree)):
        raise ConfigError(source, problems)
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        problems = [_describe(model, fault) for fault in error.errors(include_url=False)]
        raise ConfigError(source, problems) from None


def load_config(model: type[ModelT], path: Path, overrides: Iterable[str] = ()) -> ModelT:
    """Read a file, apply overrides, validate."""
    return validate(model, apply_overrides(read_yaml(path), overrides), str(path))


def dump_yaml(config: BaseModel) -> str:
    """The resolved tree as YAML text that `read_yaml` reads back to an equal tree."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = None  # type: ignore[assignment]  # short lists stay on one line
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[attr-defined]  # keep the order of the fields
    yaml.width = 100
    buffer = io.StringIO()
    yaml.dump(config.model_dump(mode="json"), buffer)
    return buffer.getvalue()


def config_hash(config: BaseModel | Mapping[str, Any]) -> str:
    """sha256 (hex) of the canonical JSON of a tree: keys sorted, no spaces, NaN refused."""
    tree = config.model_dump(mode="json") if isinstance(config, BaseModel) else config
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _parse(text: str, source: str) -> Any:
    yaml = YAML(typ="safe", pure=True)
    yaml.version = "1.2"  # type: ignore[assignment]
    yaml.allow_duplicate_keys = False
    try:
        return yaml.load(text)
    except MarkedYAMLError as error:
        raise ConfigError(source, [_syntax_problem(error)]) from None
    except (YAMLError, ValueError, NotImplementedError) as error:
        raise ConfigError(source, [f"is not valid YAML: {' '.join(str(error).split())}"]) from None


def _syntax_problem(error: MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    problem = error.problem or error.context or "is not valid YAML"
    if problem.startswith("found duplicate key"):
        key = problem.removeprefix("found duplicate key").split(" with value")[0].strip().strip('"')
        first = f" (first at line {error.context_mark.line + 1} or later)" if error.context_mark else ""
        return f"{where}key '{key}' stands twice in one mapping{first}; keep one of them"
    return f"{where}{problem}"


def _missing_file(path: Path) -> str:
    siblings = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f"; did you mean '{path.parent / near[0]}'?" if near else ""
    return f"no such file{hint}"


def _deep_copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _deep_copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_deep_copy(item) for item in value]
    return value


def _assign(root: Any, keys: list[str], value: Any) -> str | None:
    """Set one value in place; returns what is wrong instead of raising."""
    node = root
    for depth, key in enumerate(keys):
        is_last = depth == len(keys) - 1
        at = ".".join(keys[:depth]) or "the top level"
        if isinstance(node, list):
            if not key.isdigit() or int(key) > len(node):
                return f"{at} is a list of {len(node)}; '{key}' is not an index from 0 to {len(node)}"
            index = int(key)
            if index == len(node):
                node.append({})
            if is_last:
                node[index] = value
            else:
                node = node[index]
        elif isinstance(node, dict):
            if is_last:
                node[key] = value
            else:
                if node.get(key) is None:
                    node[key] = {}
                node = node[key]
        else:
            return f"{at} is the {_kind(node)} {node!r} and has no key '{key}'"
    return None


def _describe(model: type[BaseModel], fault: Mapping[str, Any]) -> str:
    location = tuple(fault["loc"])
    path = ".".join(str(part) for part in location) or "the whole tree"
    kind = fault["type"]
    if kind == "extra_forbidden":
        known = _known_keys(model, location[:-1])
        near = _nearest(str(location[-1]), known)
        hint = f"; did you mean '{near}'?" if near else f"; valid keys: {', '.join(known)}" if known else ""
        return f"{path}: unknown key (value found: {_short(fault['input'])}){hint}"
    if kind == "missing":
        return f"{path}: missing; it has no default and must be set"
    rule = str(fault["msg"])
    rule = rule.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    rule = rule[:1].lower() + rule[1:] if rule[:1].isupper() and not rule[:2].isupper() else rule
    if isinstance(fault["input"], Mapping | BaseModel):
        return f"{path}: {rule}"
    hint = ""
    if kind in ("literal_error", "enum") and isinstance(fault["input"], str):
        choices = (
            str(fault.get("ctx", {}).get("expected", "")).replace("'", "").replace(" or ", ", ").split(", ")
        )
        near = _nearest(fault["input"], choices)
        hint = f"; did you mean '{near}'?" if near else ""
    return f"{path}: found {_short(fault['input'])}; {rule}{hint}"


def _secrets_in(value: Any, path: str = "") -> Iterator[str]:
    """A problem for every text of a tree that must not be stored."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _secrets_in(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _secrets_in(item, f"{path}.{index}")
    elif isinstance(value, str) and (what := secret_in_address(value)) is not None:
        yield (
            f"{path}: the address {redacted(value)} holds {what}, which would be stored with the run. Write it "
            "without, and put secrets into the environment: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or PGPASSWORD"
        )


def _nearest(word: str, choices: list[str]) -> str | None:
    close = difflib.get_close_matches(word.lower(), choices, n=1, cutoff=0.6)
    return close[0] if close else None


def _known_keys(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Field names of the model that `location` leads to through nested models, lists and unions."""
    candidates = [model]
    for part in location:
        if isinstance(part, int):
            continue
        followed = [m.model_fields[part] for m in candidates if part in m.model_fields]
        if followed:
            candidates = [m for field in followed for m in _models_in(field)]
    return sorted({name for m in candidates for name in m.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, FieldInfo):
        return _models_in(annotation.annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in get_args(annotation) for found in _models_in(inner)]


def _kind(value: Any) -> str:
    names = {
        list: "list",
        str: "text",
        bool: "yes/no value",
        int: "number",
        float: "number",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)


def _short(value: Any) -> str:
    text = redacted(repr(value))
    return text if len(text) <= 80 else text[:77] + "..."
