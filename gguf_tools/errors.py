"""The exceptions a user can meet. Each message is one sentence for the user.

A message says what was asked, what was found and what to do. It is printed as it stands, after
`error: `, so names that come from a file go through `printable` first.
"""


class GGUFError(Exception):
    """Base of every error that is the input's or the machine's fault, not ours."""


class CheckpointError(GGUFError):
    """The Hugging Face folder is incomplete, unreadable or contradicts itself."""


class FormatError(GGUFError):
    """Not a GGUF file, a truncated one, or one whose numbers contradict each other."""


class UnsupportedModelError(GGUFError):
    """An architecture or tokenizer that is not known; the message lists those that are."""


class UnsupportedQuantError(GGUFError):
    """A block format or a shape that cannot be held; names tensor, width and block size."""


class MissingTensorError(GGUFError):
    """Tensors are missing, unexpected or of the wrong shape; names all of them at once."""


class OutputError(GGUFError):
    """The output cannot be written: it exists, the disk is full, permission is denied."""


class TemplateError(GGUFError):
    """The chat template is broken, refuses the conversation, or exceeds its limits."""


class DeviceError(GGUFError):
    """The device asked for is absent or too small; says what would fit."""


class DeviceMemoryError(DeviceError):
    """A device has no room for what it was to hold; fewer layers may fit."""

    def __init__(self, message: str, *, room: int | None = None) -> None:
        """`room` is the bytes that it did hold, where that is known."""
        super().__init__(message)
        self.room = room


class DeviceLostError(DeviceError):
    """A device stopped answering: it was unplugged or reset, or its driver failed."""


class ContextFullError(GGUFError):
    """The conversation outgrew the context."""


def printable(text: object, limit: int = 120) -> str:
    """`text` from an untrusted file, fit for a terminal: escapes shown, at most `limit` long.

    Control characters (terminal escapes among them) become backslash sequences.
    """
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."
