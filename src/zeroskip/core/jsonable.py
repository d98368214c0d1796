"""Frozen dataclasses to JSON values and back, driven by their type hints."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from typing import Any, TypeVar

from zeroskip.core.errors import FileFormatError

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """A JSON value (dicts, lists, strings, numbers, booleans, None) holding what ``value`` holds."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"no JSON form for {type(value).__name__}: {value!r}")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def from_json(kind: type[T], data: Any, path: str = "$") -> T:
    """The inverse of ``to_json`` for type ``kind``.

    Raises:
        FileFormatError: ``data`` does not have that type; the message names the place in the document.
    """
    return typing.cast(T, _read(kind, data, path))


def _read(kind: Any, data: Any, path: str) -> Any:
    if kind is Any:
        return data
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return _read(option, data, path)
            except FileFormatError:
                continue
        raise _mismatch(kind, data, path)
    if origin is typing.Literal:
        if data in arguments and isinstance(data, str | int):
            return data
        raise _mismatch(kind, data, path)
    if kind is None or kind is type(None):
        if data is None:
            return None
        raise _mismatch(kind, data, path)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(typing.cast(type, kind), data, path)
    if origin is tuple:
        if not isinstance(data, list):
            raise _mismatch(kind, data, path)
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_read(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(data))
        if len(arguments) != len(data):
            raise _mismatch(kind, data, path)
        return tuple(_read(a, item, f"{path}[{i}]") for i, (a, item) in enumerate(zip(arguments, data, strict=True)))
    if origin is dict:
        if not isinstance(data, dict):
            raise _mismatch(kind, data, path)
        return {key: _read(arguments[1], item, f"{path}.{key}") for key, item in data.items()}
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if isinstance(kind, type) and isinstance(data, kind) and (kind is bool or not isinstance(data, bool)):
        return data
    raise _mismatch(kind, data, path)


def _read_dataclass(kind: type, data: Any, path: str) -> Any:
    if not isinstance(data, dict):
        raise _mismatch(kind, data, path)
    hints = _hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    unknown = sorted(set(data) - set(fields))
    required = {
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(data))
    if unknown or missing:
        raise FileFormatError(f"{path}: a {kind.__name__} has unknown fields {unknown} and lacks {missing}")
    try:
        return kind(**{name: _read(hints[name], item, f"{path}.{name}") for name, item in data.items()})
    except (ValueError, TypeError) as error:
        raise FileFormatError(f"{path}: not a valid {kind.__name__}: {error}") from error


def _mismatch(kind: Any, data: Any, path: str) -> FileFormatError:
    shown = repr(data)
    return FileFormatError(f"{path}: expected {getattr(kind, '__name__', kind)}, got {shown[:80]}")
