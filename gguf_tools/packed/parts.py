"""The stored tensors that a weight is made of: found by name, with dtype and shape checked."""

from collections.abc import Iterable
from dataclasses import replace

from gguf_tools.errors import CheckpointError, MissingTensorError, printable
from gguf_tools.safetensors_file import LazyTensor

Shape = tuple[int, ...]


class Parts:
    """A checkpoint's tensors while weights are put together: parts are taken, weights are added.

    What is never taken stays in the result as it is.
    """

    def __init__(self, tensors: dict[str, LazyTensor], where: str) -> None:
        self.where = where  # the checkpoint, for messages
        self._rest = dict(tensors)
        self._made: dict[str, LazyTensor] = {}

    def modules(self, ending: str) -> list[str]:
        """What comes before `ending` in the names that have it."""
        return [name.removesuffix(ending) for name in self._rest if name.endswith(ending)]

    def of_dtype(self, dtypes: Iterable[str]) -> list[str]:
        """Names of the tensors of these dtypes."""
        wanted = set(dtypes)
        return [name for name, tensor in self._rest.items() if tensor.dtype in wanted]

    def has(self, name: str) -> bool:
        return name in self._rest

    def take(self, name: str, dtypes: Iterable[str], n_dims: Iterable[int] = (2,)) -> LazyTensor:
        """The part of this name; an error if it is not there, or of another kind."""
        if name not in self._rest:
            raise MissingTensorError(
                f"{self.where}: expected a tensor {printable(name)}, which its quantisation needs, "
                "found none; download the checkpoint again, whole"
            )
        tensor = self._rest.pop(name)
        allowed = tuple(dtypes)
        if tensor.dtype not in allowed:
            raise self.refuse(tensor, f"{' or '.join(allowed)}", tensor.dtype)
        counts = tuple(n_dims)
        if len(tensor.shape) not in counts or 0 in tensor.shape:
            dims = " or ".join(map(str, counts))
            raise self.refuse(tensor, f"{dims} dimensions, none of them 0", tensor.shape)
        return tensor

    def expect(self, tensor: LazyTensor, *shapes: Shape) -> None:
        """An error unless the tensor has one of the shapes."""
        if tensor.shape not in shapes:
            raise self.refuse(tensor, " or ".join(map(str, shapes)), tensor.shape)

    def refuse(self, tensor: LazyTensor, expected: str, found: object) -> CheckpointError:
        return CheckpointError(
            f"{self.where}: tensor {printable(tensor.name)}: expected {expected}, "
            f"found {printable(found)}"
        )

    def drop(self, endings: tuple[str, ...]) -> None:
        """Forget tensors that weights do not need, such as scales of activations."""
        self._rest = {
            name: tensor for name, tensor in self._rest.items() if not name.endswith(endings)
        }

    def add(self, tensor: LazyTensor) -> None:
        """A weight that has been put together."""
        if tensor.name in self._rest or tensor.name in self._made:
            raise CheckpointError(
                f"{self.where}: tensor {printable(tensor.name)} is there twice, quantised and not"
            )
        self._made[tensor.name] = tensor

    def result(self, scheme: str) -> dict[str, LazyTensor]:
        """All tensors; those that were put together are marked with the scheme."""
        made = {name: replace(tensor, scheme=scheme) for name, tensor in self._made.items()}
        return {**self._rest, **made}
