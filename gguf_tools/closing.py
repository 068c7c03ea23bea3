"""What is closed at the end of a `with` block."""

from abc import ABC, abstractmethod
from typing import TypeVar

T = TypeVar("T", bound="Closeable")


class Closeable(ABC):
    """Something with a `close`; as a context manager it gives itself, and is closed at the end."""

    @abstractmethod
    def close(self) -> None:
        """Give back what it holds."""

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
