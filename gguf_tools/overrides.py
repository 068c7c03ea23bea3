"""What a user asks for beside the file type: types of tensors by pattern, of head and embedding."""

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gguf_tools.errors import GGUFError, UnsupportedQuantError, printable
from gguf_tools.quants import QUANTS

EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
WRITTEN = tuple(quant.name for quant in QUANTS if quant.quantize is not None)


@dataclass(frozen=True)
class Pattern:
    """Tensors whose name has a match of `regex` anywhere get `type`."""

    regex: re.Pattern[str]
    type: str


@dataclass(frozen=True)
class Overrides:
    """Options with the meaning that llama-quantize gives them, and `keep`, which is ours."""

    patterns: tuple[Pattern, ...] = ()  # the first that matches a tensor holds
    output: str = ""
    embedding: str = ""
    pure: bool = False  # no exceptions: the file type's base type for all
    keep: tuple[str, ...] = ()  # names, with * for anything, of what stays as in the checkpoint

    def by_pattern(self, name: str) -> str:
        """The type that the first matching pattern gives, or nothing."""
        return next((p.type for p in self.patterns if p.regex.search(name)), "")

    def final(self, name: str) -> str:
        """The type that is not to be changed even where it does not fit, or nothing."""
        # The second table is large and a thing of its own: a pattern may name it.
        named = name != EMBEDDINGS[0] and self.by_pattern(name)
        if name in EMBEDDINGS and self.embedding and not named:
            return self.embedding
        return self.output if name == "output.weight" else ""

    def keeps(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, kept) for kept in self.keep)

    def check(self, names: Sequence[str], *, is_mix: bool, file_type: str) -> None:
        """Refuse what would have no effect: a misspelt name must not go unnoticed."""
        if not is_mix and (self.patterns or self.pure):
            option = "--tensor-type" if self.patterns else "--pure"
            raise GGUFError(
                f"{option} was given with --type {file_type}, where all matrices are {file_type}; "
                "choose a quantised type, such as Q8_0"
            )
        asked = [("--tensor-type", p.regex.pattern, p.regex.search) for p in self.patterns]
        for option, text, matches in asked:
            if not any(matches(name) for name in names):
                raise GGUFError(_no_match(option, text, names))
        for kept in self.keep:
            if not any(fnmatch.fnmatchcase(name, kept) for name in names):
                raise GGUFError(_no_match("--keep", kept, names))


NO_OVERRIDES = Overrides()


def parse_overrides(
    *,
    tensor_types: Iterable[str] = (),
    output: str | None = None,
    embedding: str | None = None,
    pure: bool = False,
    keep: Iterable[str] = (),
) -> Overrides:
    """From the texts of the command line; errors name the option."""
    return Overrides(
        tuple(map(_parse_pattern, tensor_types)),
        _parse_type("--output-type", output) if output is not None else "",
        _parse_type("--embedding-type", embedding) if embedding is not None else "",
        pure,
        tuple(keep),
    )


def _parse_pattern(text: str) -> Pattern:
    regex, equals, type_ = text.rpartition("=")
    if not equals or not regex:
        raise GGUFError(
            f"--tensor-type {printable(text)}: expected REGEX=TYPE, such as ffn_down=Q6_K"
        )
    try:
        compiled = re.compile(regex, re.IGNORECASE)
    except re.error as error:
        raise GGUFError(
            f"--tensor-type {printable(text)}: {printable(regex)} is no regular expression: {error}"
        ) from error
    return Pattern(compiled, _parse_type("--tensor-type", type_))


def _parse_type(option: str, text: str) -> str:
    name = text.upper()
    if name not in WRITTEN:
        raise UnsupportedQuantError(
            f"{option}: type {printable(text)} cannot be written; known are {', '.join(WRITTEN)}"
        )
    return name


def _no_match(option: str, text: str, names: Sequence[str]) -> str:
    few = ", ".join(printable(name) for name in names[:6])
    return (
        f"{option} {printable(text)}: no tensor of this model has such a name; names are {few} and "
        f"{max(0, len(names) - 6):,} more (--dry-run lists them)"
    )
