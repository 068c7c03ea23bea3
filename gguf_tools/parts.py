"""Models split into several files: the names of the parts, as llama-gguf-split gives them."""

import re
from dataclasses import dataclass

_NAME = re.compile(r"(?P<prefix>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)


@dataclass(frozen=True)
class PartName:
    """`PREFIX-00001-of-00003.gguf`."""

    prefix: str
    number: int  # from 1
    count: int

    def __str__(self) -> str:
        return f"{self.prefix}-{self.number:05}-of-{self.count:05}.gguf"

    def sibling(self, number: int) -> "PartName":
        """Another part of the same model."""
        return PartName(self.prefix, number, self.count)


def parse_part_name(name: str) -> PartName | None:
    """What the name of a file says; None when it is not the name of a part."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    part = PartName(found["prefix"], int(found["number"]), int(found["count"]))
    return part if 1 <= part.number <= part.count else None
