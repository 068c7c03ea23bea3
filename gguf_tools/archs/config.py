"""config.json, read with care: every look-up says what was expected and what was found."""

import math
from collections.abc import Mapping
from typing import Any

from gguf_tools.errors import CheckpointError, printable

MAX_LAYERS = 2048
MAX_SIZE = 1 << 24  # rows, columns and heads of any model that exists are far below
MAX_CONTEXT = 1 << 30


class HFConfig:
    """Typed, bounded look-ups. A null counts as absent, as it does in transformers."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where  # the file, for messages; with a part of it for nested objects

    @property
    def class_name(self) -> str:
        """The first of `architectures`, or nothing."""
        names = self.values.get("architectures")
        if names is None or names == []:
            return ""
        if not isinstance(names, list) or not isinstance(names[0], str):
            raise self.refuse("architectures", "a list of names", names)
        return names[0]

    @property
    def model_type(self) -> str:
        return self.text("model_type", default="")

    def refuse(self, key: str, expected: str, found: object) -> CheckpointError:
        shown = "nothing" if found is None else printable(_shorten(found))
        return CheckpointError(
            f"{self.where}: {printable(key)}: expected {expected}, found {shown}"
        )

    def integer(
        self, key: str, *, low: int = 1, high: int = MAX_SIZE, default: int | None = None
    ) -> int:
        value = self.values.get(key)
        if value is None:
            value = default
        if type(value) is not int or not low <= value <= high:
            raise self.refuse(key, f"a whole number from {low:,} to {high:,}", value)
        return value

    def real(self, key: str, *, low: float, high: float, default: float | None = None) -> float:
        value = self.values.get(key)
        if value is None:
            value = default
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is None or not number or not low <= value <= high or not math.isfinite(value):
            raise self.refuse(key, f"a number from {low:g} to {high:g}", value)
        return float(value)

    def reals(self, key: str, n: int, *, low: float, high: float) -> tuple[float, ...]:
        """A list of n numbers."""
        values = self.values.get(key)
        if not isinstance(values, list) or len(values) != n:
            found = len(values) if isinstance(values, list) else values
            raise self.refuse(key, f"a list of {n} numbers", found)
        where = f"{self.where}: {key}"
        items = HFConfig({f"[{i}]": value for i, value in enumerate(values)}, where)
        return tuple(items.real(f"[{i}]", low=low, high=high) for i in range(n))

    def flag(self, key: str, *, default: bool | None) -> bool | None:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(key, "true or false", value)
        return value

    def text(self, key: str, *, default: str | None = None) -> str:
        value = self.values.get(key)
        if value is None:
            value = default
        if not isinstance(value, str):
            raise self.refuse(key, "a text", value)
        return value

    def nested(self, key: str) -> "HFConfig | None":
        """The object under `key`; nothing when it is absent, null or empty."""
        value = self.values.get(key)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise self.refuse(key, "an object", value)
        return HFConfig(value, f"{self.where}: {key}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None


def _shorten(found: object) -> str:
    """A huge number by its length: Python itself refuses to print more than 4300 digits."""
    if isinstance(found, int) and abs(found) >= 10**30:
        return f"a number of about {int(found.bit_length() * 0.30103) + 1} digits"
    return repr(found)
