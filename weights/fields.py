"""Values that others wrote, read by kind: an error names the file, the field, what was expected and what was got."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from errors import InputError, quote

LARGEST_JSON = 64 * 2**20  # bytes; the index of a checkpoint of 400 billion parameters has 0.2 MB
LARGEST = 2**31 - 1  # of a whole number: a size that no array here may have
LONGEST_TEXT = 1000  # characters of a name, a path or a hash
REQUIRED = object()  # the default of a field that has none


@contextlib.contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turns a failure of the system to read `path` into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or path} cannot be read ({error.strerror or error})") from error


@contextlib.contextmanager
def in_file(path: Path | str) -> Iterator[None]:
    """Puts `path` before every InputError from within, and turns a failure to read it into one."""
    with reading(path):
        try:
            yield
        except InputError as error:
            raise type(error)(f"{path}: {error}") from error


def read_json(path: Path, largest: int = LARGEST_JSON) -> dict[str, Any]:
    """Reads a JSON object of at most `largest` bytes, with or without a byte order mark.

    Raises:
      InputError: no UTF-8, no JSON, no object, or one that is too large, too deep or has a number of too many digits.
    """
    with in_file(path):
        if (size := path.stat().st_size) > largest:
            raise InputError(f"{size} bytes, expected a JSON file of at most {largest}")
        try:
            value = json.loads(path.read_text(encoding="utf-8-sig"))
        except json.JSONDecodeError as error:
            raise InputError(f"not JSON ({error})") from error
        except UnicodeDecodeError as error:
            raise InputError(f"not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x})") from error
        except RecursionError as error:
            raise InputError("not JSON that can be read: its lists or objects stand too deep in one another") from error
        except ValueError as error:  # int() refuses more than 4,300 digits
            raise InputError("a number of more than 4,300 digits") from error
        if not isinstance(value, dict):
            raise InputError(f"expected a JSON object, got {quote(value)}")
    return value


@dataclasses.dataclass(frozen=True)
class Fields:
    """An object of a JSON file, or a file's metadata. A null is as good as a missing field where there is a default.

    Attributes:
      values: the object.
      prefix: where it stands, such as "rope_scaling.".
      names: for an error, what the file calls a field, where that is not our name.
    """

    values: Mapping[str, Any]
    prefix: str = ""
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def called(self, name: str) -> str:
        """How the file names the field."""
        return self.prefix + self.names.get(name, name)

    def _read(self, name: str, expected: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None and default is not REQUIRED:
            return default
        if name not in self.values:
            raise InputError(f"{self.called(name)} is missing; expected {expected}")
        return value

    def refused(self, name: str, expected: str) -> InputError:
        """The error for a value that is there and is not what is expected."""
        return InputError(f"{self.called(name)} must be {expected}, got {quote(self.values[name])}")

    def integer(self, name: str, low: int = 1, high: int = LARGEST, default: Any = REQUIRED) -> Any:
        """A whole number from `low` to `high`; true and "7" are none."""
        expected = f"a whole number of at least {low}"
        value = self._read(name, expected, default)
        if value is default:
            return default
        if type(value) is not int or value < low:
            raise self.refused(name, expected)
        if value > high:
            raise self.refused(name, f"a whole number of at most {high}")
        return value

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        """A finite number above 0, as float; "1e-05" is one, for some checkpoints write it so."""
        expected = "a number above 0"
        value = self._read(name, expected, default)
        if value is default:
            return default
        try:
            number = float(value) if type(value) in (int, float, str) else math.nan
        except (ValueError, OverflowError):  # other text; an int of more than 308 digits
            number = math.nan
        if not 0 < number < math.inf:
            raise self.refused(name, expected)
        return number

    def numbers(self, name: str, count: int, default: Any = REQUIRED) -> Any:
        """A list of `count` finite numbers above 0, as a tuple of floats."""
        expected = f"a list of {count} numbers above 0"
        value = self._read(name, expected, default)
        if value is default:
            return default
        if type(value) not in (list, tuple) or len(value) != count:
            raise self.refused(name, expected)
        return tuple(Fields({name: item}, self.prefix, self.names).number(name) for item in value)

    def _of_type(self, kind: type, name: str, expected: str, default: Any) -> Any:
        value = self._read(name, expected, default)
        if value is not default and type(value) is not kind:
            raise self.refused(name, expected)
        return value

    def boolean(self, name: str, default: Any = REQUIRED) -> Any:
        """True or false; 0 and "true" are neither."""
        return self._of_type(bool, name, "true or false", default)

    def text(self, name: str, default: Any = REQUIRED, longest: int = LONGEST_TEXT) -> Any:
        """Text of at most `longest` characters."""
        value = self._of_type(str, name, "text", default)
        if value is not default and len(value) > longest:
            raise self.refused(name, f"text of at most {longest} characters")
        return value

    def texts(self, name: str, default: Any = REQUIRED) -> Any:
        """A list of texts."""
        value = self._of_type(list, name, "a list of texts", default)
        if value is not default and any(type(item) is not str for item in value):
            raise self.refused(name, "a list of texts")
        return value

    def integers(self, name: str, low: int = 0, high: int = LARGEST, default: Any = REQUIRED) -> Any:
        """A list of whole numbers from `low` to `high`, as a tuple."""
        expected = f"a list of whole numbers from {low} to {high}"
        value = self._read(name, expected, default)
        if value is default:
            return default
        if type(value) not in (list, tuple) or any(type(item) is not int or not low <= item <= high for item in value):
            raise self.refused(name, expected)
        return tuple(value)

    def objects(self, name: str, most: int) -> list[Fields]:
        """The fields of each of a list of at most `most` objects."""
        items = self._of_type(list, name, "a list of objects", REQUIRED)
        if len(items) > most:
            raise InputError(f"{self.called(name)} must be a list of at most {most} objects, got {len(items)}")
        if any(type(item) is not dict for item in items):
            raise self.refused(name, "a list of objects")
        return [Fields(item, f"{self.called(name)}[{i}].") for i, item in enumerate(items)]

    def object(self, name: str, default: Any = REQUIRED) -> Any:
        """An object, as a dict."""
        return self._of_type(dict, name, "an object", default)

    def within(self, name: str) -> Fields:
        """The fields of an object that must be there."""
        return Fields(self.object(name), f"{self.called(name)}.")
