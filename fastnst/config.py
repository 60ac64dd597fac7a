"""YAML file <-> strict, typed config. Knows nobody's fields: each owner declares its own ``Config`` subclass.

Guards one convention: a config is checked whole, once, before anything slow begins, and every complaint names the
dotted key and what to do about it.
"""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator


class ConfigError(ValueError):
    """A config that cannot be used; the message names the file, the dotted key and the way to mend it."""


def _is_config(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Config)


class Config(BaseModel):
    """Base of every config: immutable, unknown keys refused, numbers finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_booleans_as_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would read `steps: true` as 1, in maps and lists too.
        annotation = cls.model_fields[info.field_name].annotation
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
        if annotation is not bool and not _is_config(annotation) and any(isinstance(part, bool) for part in inside):
            raise ValueError(f"got {value!r}, need no true or false")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _no_null_character(cls, value: Any) -> Any:
        if isinstance(value, str) and "\0" in value:  # no name of a file may hold one, and Python would not say which key does
            raise ValueError(f"got {value!r}, need no null character")
        return value


ConfigT = TypeVar("ConfigT", bound=Config)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 numbers (``1e5``, ``1e-3`` are floats), ``no`` stays text, and a key given twice is an error."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None  # others are refused by the base class
            if key is not None and key in seen:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: the key {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def load_config(model: type[ConfigT], path: str | Path, overrides: Iterable[str] = ()) -> ConfigT:
    """Read ``path``, apply ``overrides`` (``"key.sub=value"``, the value as YAML) and validate as ``model``.

    Raises ``FileNotFoundError`` where the file is missing and ``ConfigError`` for everything wrong inside it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no config file at {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file ({error.reason} at byte {error.start})") from error
    return parse_config(model, text, overrides, source=str(path))


def parse_config(model: type[ConfigT], text: str, overrides: Iterable[str] = (), source: str = "config") -> ConfigT:
    """Validate YAML ``text`` as ``model``; ``source`` names it in complaints, but for keys that ``overrides`` set."""
    overrides = list(overrides)
    return validate_config(model, parse_data(model, text, overrides, source), source, [override.partition("=")[0].strip() for override in overrides])


def parse_data(model: type[Config], text: str, overrides: Iterable[str] = (), source: str = "config") -> dict:
    """YAML ``text`` of a ``model`` with ``overrides`` applied, as plain data; its values are not validated."""
    data = _parse_yaml(text, source)
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: got {type(data).__name__}, need `key: value` lines")
    for override in overrides:
        _apply_override(model, data, override)
    return data


def validate_config(model: type[ConfigT], data: dict, source: str = "config", overridden: Iterable[str] = ()) -> ConfigT:
    """Validate a plain dict as ``model``; raises ``ConfigError`` with one line for each complaint, about --set where a key is ``overridden``, else about ``source``."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        complaints = _complaints(model, error.errors())
        by_set = tuple(f"{key}{end}" for key in overridden for end in ":.")
        raise ConfigError("\n".join(f"--set {complaint}" if complaint.startswith(by_set) else f"{source}: {complaint}" for complaint in complaints)) from None


def to_yaml(config: Config) -> str:
    """The complete config as YAML, defaults included; ``parse_config`` reads it back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def flatten(config: Config) -> dict[str, Any]:
    """``{"train.steps": 40000, ...}``: every leaf by its dotted key; a map of layers counts as one leaf."""

    def walk(value: Any, prefix: str) -> Iterable[tuple[str, Any]]:
        if isinstance(value, Config):
            for name in type(value).model_fields:
                yield from walk(getattr(value, name), f"{prefix}.{name}" if prefix else name)
        else:
            yield prefix, value

    return dict(walk(config, ""))


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # _Loader derives from SafeLoader: data only, no objects
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: such as a date that does not exist
        raise ConfigError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None


def _apply_override(model: type[Config], data: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"--set {override}: need key=value, for example --set train.steps=1000")
    value = _parse_yaml(text, f"--set {key}")
    at: Any = model
    *parents, last = key.split(".")
    for index, part in enumerate(parents):
        field = at.model_fields.get(part) if _is_config(at) else None
        if field is None:
            _complain_unknown(model, key, f"--set {override}")
        at = field.annotation
        if not isinstance(data.get(part), dict):
            default = field.get_default(call_default_factory=True)
            # A map of layers starts from its default, so that one entry can be changed alone.
            data[part] = dict(default) if isinstance(default, dict) else {}
        data = data[part]
        if not _is_config(at):
            last = ".".join([*parents[index + 1 :], last])  # a layer name such as features.3
            break
    if _is_config(at) and last not in at.model_fields:
        _complain_unknown(model, key, f"--set {override}")
    data[last] = value


def _complain_unknown(model: type[Config], key: str, source: str) -> None:
    raise ConfigError(f"{source}: {_unknown_key(model, key)}")


def _known_keys(model: type[Config], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if _is_config(field.annotation):
            keys += _known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _unknown_key(model: type[Config], key: str) -> str:
    known = [name for name in _known_keys(model) if not key.startswith(name + ".")]
    same_name = [candidate for candidate in known if candidate.rpartition(".")[2] == key.rpartition(".")[2]]
    near = same_name or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not near:
        near = [k for k in known if difflib.get_close_matches(key.rpartition(".")[2], [k.rpartition(".")[2]], cutoff=0.6)]
    siblings = [candidate for candidate in known if candidate.rpartition(".")[0] == key.rpartition(".")[0]]
    hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(siblings or [k for k in known if '.' not in k])}"
    return f"unknown key {key}; {hint}"


def _complaints(model: type[Config], details: list[dict]) -> list[str]:
    """One sentence for each key that is wrong."""
    entries = {detail["loc"][:-1] for detail in details}  # a list is called too short where its bad entries were left out
    found: dict[str, list[str]] = {}  # by key; two of one key are what the members of a union say
    for detail in details:
        if detail["type"] in ("too_short", "too_long") and detail["loc"] in entries:
            continue
        if detail["type"] == "missing" and isinstance(detail["loc"][-1], int):  # told of every entry that is
            number = 1 + max(other["loc"][-1] for other in details if other["loc"][:-1] == detail["loc"][:-1])
            detail = detail | {"type": "too_short", "loc": detail["loc"][:-1], "ctx": {"min_length": number}}
        key, complaint = _explain(model, detail)
        if complaint not in found.setdefault(key, []):
            found[key].append(complaint.removeprefix(f"got {detail['input']!r}, ") if found[key] else complaint)
    return [": ".join(part for part in (key, ", or ".join(filter(None, complaints))) if part) for key, complaints in found.items()]


def _explain(model: type[Config], detail: dict) -> tuple[str, str]:
    """The key, as messages name it, and what is wrong with it."""
    location, kind, got = _location(model, detail["loc"]), detail["type"], f"got {detail['input']!r}"
    key = ".".join(str(part) for part in location)
    if kind == "extra_forbidden":
        return _unknown_key(model, key), ""
    if kind == "missing":
        keys = _required_keys(model, location) or [key]
        return " and ".join(keys), f"not given; write it in the file or use --set {keys[0]}=VALUE"
    if "[key]" in detail["loc"]:
        return ".".join(map(str, location[:-1])), f"{got} as a key, need text"
    for index, part in enumerate(location):
        if isinstance(part, int):  # an entry of a list: the list is the key to mend
            key = ": ".join([".".join(map(str, location[:index])), f"entry {part + 1}", *map(str, location[index + 1 :])])
            break
    if kind == "value_error":
        return key, str(detail["ctx"]["error"])
    needed = {
        "model_type": "need `key: value` lines",
        "model_attributes_type": "need `key: value` lines",
        "path_type": "need a path",
        "too_short": f"need {detail.get('ctx', {}).get('min_length')} entries",
        "too_long": f"need {detail.get('ctx', {}).get('max_length')} entries at most",
    }
    return key, f"{got}, {needed.get(kind) or detail['msg'].replace('Input should be', 'need')}"


def _location(model: type[Config], parts: tuple[int | str, ...]) -> list[int | str]:
    """Where pydantic found an error, without its names for the members of a union and for keys of maps."""
    kept: list[int | str] = []
    at: Any = model
    for part in parts:
        if isinstance(part, int) or _is_config(at) or (get_origin(at) is dict and part != "[key]"):
            kept.append(part)
            fields = at.model_fields if _is_config(at) else {}
            at = fields[part].annotation if part in fields else next((kind for kind in get_args(at) if _is_config(kind)), None)
    return kept


def _required_keys(model: type[Config], location: list[int | str]) -> list[str]:
    """What must be given of the section at ``location``; empty where it is none."""
    for part in location:
        field = model.model_fields.get(part) if _is_config(model) else None
        model = field.annotation if field else None
    if not _is_config(model):
        return []
    return [".".join(map(str, [*location, name])) for name, field in model.model_fields.items() if field.is_required()]
