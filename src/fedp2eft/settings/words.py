"""Words of YAML made into typed settings; a word stays as it is written until a type asks for more.

YAML 1.1, which PyYAML reads, takes `no` for false, `010` for 8, `1:30` for 90 and `2024-01-01` for
a date, before anybody knows that a language, a client or a class is meant. Here every plain scalar
but null is text, and the type of the setting decides: `true` and `false` where it wants a boolean,
numbers as in the core schema of YAML 1.2 (`010` is ten, `1e-3` is a float) where it wants a number.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from fedp2eft.errors import UserError, nearest

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}
_TRUTH = {"true": True, "false": False}


class _Loader(yaml.SafeLoader):
    """YAML whose plain scalars are text; only null and the merge key `<<` mean something else."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return a mapping; keys are words too, and each may stand once."""
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "", key.start_mark)
            if key.value in seen:
                raise UserError(
                    f"Key {key.value!r} occurs twice, the second time at line "
                    f"{key.start_mark.line + 1}: remove one."
                )
            seen.add(key.value)
        self.flatten_mapping(node)  # what is merged in comes first, so that the own keys win
        return {key.value: self.construct_object(each, deep=deep) for key, each in node.value}


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag.endswith((":null", ":merge"))]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.yaml_constructors = {  # the rest, `!!int` and the like, is refused
    tag: construct
    for tag, construct in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.endswith((":null", ":str", ":seq", ":map"))
}


def load_words(text: str) -> Any:
    """Return what a YAML or JSON text says: mappings, lists, words and null.

    Raises:
        UserError: A key occurs twice in one mapping.
        yaml.YAMLError: Not YAML.
    """
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def typed(kind: Any, value: Any, where: str) -> Any:
    """Return a value as a setting of type `kind`.

    Args:
        kind: A dataclass, or the type of one of its fields.
        value: Words as `load_words` gives them, or the Python value itself. Text in the place of a
            list or mapping, as the command line gives it, is read as YAML.
        where: Name of the setting, for messages.

    Raises:
        UserError: An unknown key, or a value of another type.
    """
    if is_dataclass(kind):
        return _section(kind, value, where)
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _first_that_fits(kind, args, value, where)
    if origin is Literal:
        if value in args and type(value) in {type(arg) for arg in args}:
            return value
        known = [str(arg) for arg in args]
        raise _wrong(where, value, f"one of {', '.join(known)}", nearest(str(value), known))
    if origin in (list, tuple):
        items = parsed(value)
        if not isinstance(items, list | tuple):
            raise _wrong(where, value, "a list, [a, b]")
        made = [typed(args[0], item, f"{where}[{n}]") for n, item in enumerate(items)]
        return made if origin is list else tuple(made)
    if origin is dict:
        items = parsed(value)
        if not isinstance(items, Mapping):
            raise _wrong(where, value, "a mapping, {name: …}")
        return {name: typed(args[1], item, f"{where}.{name}") for name, item in _named(items)}
    return _scalar(kind, value, where)


def _section(kind: Any, value: Any, where: str) -> Any:
    """Return a dataclass of its fields; those not named keep their defaults."""
    if isinstance(value, kind):
        return value
    hints = types_of(kind)
    value = parsed(value)
    if not isinstance(value, Mapping):
        raise UserError(
            f"Setting {where!r} must be a mapping, not {value!r}. Known here: {', '.join(hints)}."
        )
    given = {}
    for key, item in _named(value):
        name = f"{where}.{key}" if where else key
        if key not in hints:
            options = ", ".join(sorted(hints))
            hint = nearest(key, sorted(hints))
            raise UserError(f"Unknown setting {name!r}.{hint} Known here: {options}.")
        given[key] = typed(hints[key], item, name)
    missing = [f.name for f in fields(kind) if f.name not in given and _is_required(f)]
    if missing:
        raise UserError(f"Setting {where!r} has no {missing[0]!r}: add {missing[0]}.")
    return kind(**given)


def types_of(kind: Any) -> dict[str, Any]:
    """Return the type of every field of a dataclass, in their order."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _is_required(field: Any) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _named(items: Mapping[Any, Any]) -> list[tuple[str, Any]]:
    """Return a mapping's items; refuse a key that is no text (only Python can give one)."""
    for key in items:
        if not isinstance(key, str):
            raise UserError(f"Key {key!r} is not text: put it in quotes.")
    return list(items.items())


def parsed(value: Any) -> Any:
    """Return the list or mapping that text stands for; what is no text, or no YAML, as it is."""
    if not isinstance(value, str):
        return value
    try:
        return load_words(value)
    except yaml.YAMLError:
        return value


def _first_that_fits(kind: Any, args: tuple[Any, ...], value: Any, where: str) -> Any:
    """Return a value of one of several types, text last: every word is text."""
    if value is None and NoneType in args:
        return None
    kinds = sorted((each for each in args if each is not NoneType), key=lambda each: each is str)
    for each in kinds:
        try:
            return typed(each, value, where)
        except UserError as error:
            problem = error
    if len(kinds) == 1:
        raise problem
    raise _wrong(where, value, " or ".join(_named_kind(each) for each in kinds))


def _scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is str:
        if isinstance(value, str):
            return value
        if value is None:
            raise _wrong(where, None, "text", " For the word itself write it in quotes: 'null'.")
        raise _wrong(where, value, "text", f" Write it in quotes: '{value}'.")
    if kind is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in _TRUTH:
            return _TRUTH[value.lower()]
        raise _wrong(where, value, "true or false")
    if kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, str) and _INT.fullmatch(value):
            return int(value, 0 if value[:2] in ("0o", "0x") else 10)
        raise _wrong(where, value, "a whole number")
    if kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str) and (_FLOAT.fullmatch(value) or value.lower() in _NOT_FINITE):
            return float(_NOT_FINITE.get(value.lower(), value))
        raise _wrong(where, value, "a number")
    return value


def _named_kind(kind: Any) -> str:
    """Return a type in a user's words."""
    names = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    return names.get(kind, "a list")


def _wrong(where: str, value: Any, wanted: str, hint: str = "") -> UserError:
    shown = "null" if value is None else repr(value)
    return UserError(f"{where} is {shown}; give {wanted}.{hint}")
