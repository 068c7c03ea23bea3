"""From a path to everything a conversation needs: file, model, tokenizer, template."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gguf_tools.describe import count_parameters, short_count, short_size
from gguf_tools.errors import FormatError, GGUFError, TemplateError, printable
from gguf_tools.reader import GGUFFile
from runtime import plan_text
from runtime.config import read_config
from runtime.decoders import build_program, check_architecture
from runtime.model import BATCH, Model, context_size
from runtime.offload import Offload
from runtime.split import measure_sizes, plan_split
from runtime.templates import ChatTemplate, named_templates
from runtime.tokenizer import Tokenizer
from runtime.tuned import recall

MAX_TEMPLATE_BYTES = 1 << 20
TEMPLATE_MARKS = ("{{", "{%")  # a text with one of them is no name of a file

# What a template contains, and the family it then belongs to; the first that fits.
TEMPLATE_FAMILIES = (
    ("<|im_start|>", "ChatML"),
    ("<|start_header_id|>", "Llama 3"),
    ("<|header_start|>", "Llama 4"),
    ("<start_of_turn>", "Gemma"),
    ("<|start|>", "Harmony"),
    ("<|start_of_role|>", "Granite"),
    ("<|START_OF_TURN_TOKEN|>", "Command R"),
    ("<|end_of_role|>", "Granite"),
    ("<\uff5cUser\uff5c>", "DeepSeek"),
    ("<<SYS>>", "Llama 2"),
    ("[INST]", "Mistral"),
    ("<|end|>", "Phi-3"),
    ("<|user|>", "Zephyr"),
)


@dataclass(frozen=True)
class Session:
    """An open model. `template` is None when it is to continue plain text."""

    file: GGUFFile
    model: Model
    tokenizer: Tokenizer
    template: ChatTemplate | None
    template_name: str
    notes: tuple[str, ...]

    def describe(self) -> list[str]:
        """What runs, on what, and how it will be talked to; lines for the user."""
        config, model = self.model.config, self.model
        weights = short_count(count_parameters(self.file))
        return [
            f"{printable(config.name, 60)}: {printable(config.architecture, 40)}, {weights} "
            f"parameters, {main_type(self.file)}, {short_size(self.file.file_size)}",
            f"context {model.n_ctx} of {config.n_ctx_train} tokens, "
            f"{count(model.n_threads, 'thread')}, device {' + '.join(model.devices)}",
            f"template: {self.template_name}",
        ]


@contextmanager
def open_session(
    path: Path,
    *,
    n_ctx: int | None = None,
    threads: int | None = None,
    backend: str = "cpu",
    kv_type: str = "f16",
    in_memory: bool = False,
    chat_template: str | None = None,
    raw: bool = False,
    offload: Offload | None = None,
    on_compile: Callable[[int, int], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Iterator[Session]:
    """Open the model at `path` for a conversation, and close it afterwards.

    `chat_template` is the name of one of the file's own, the path of another, or a template.

    `on_compile(done, total)` hears of kernels being compiled, on a first run; `on_note(text)` of
    what goes to GPUs, before it does.
    """
    refuse_checkpoint(path)
    with GGUFFile(path) as file:
        tokenizer = Tokenizer(file.metadata)
        template, template_name = _choose_template(
            tokenizer, named_templates(file.metadata), chat_template, raw=raw
        )
        offload = offload or Offload()
        tuned = recall(file, offload.wish)
        if tuned is not None:
            threads = threads or tuned.threads
            n_layers = tuned.layers_on(offload.devices)
            offload = offload if n_layers is None else offload.at_most(n_layers)
        with Model.load(
            file,
            n_ctx=n_ctx,
            threads=threads,
            backend=backend,
            kv_type=kv_type,
            in_memory=in_memory,
            offload=offload,
            on_compile=on_compile,
            on_note=on_note,
        ) as model:
            config = model.config
            if tokenizer.n_tokens > config.n_vocab:
                raise FormatError(
                    f"{printable(path)}: the tokenizer has {tokenizer.n_tokens} tokens and "
                    f"token_embd.weight only {config.n_vocab} rows: the file is damaged, or made "
                    "of two models; convert it again"
                )
            notes = [*tokenizer.notes, *model.notes]
            if model.n_ctx > config.n_ctx_train:
                notes.append(
                    f"the context of {model.n_ctx} tokens is longer than the "
                    f"{config.n_ctx_train} the model was trained for: beyond that, answers get "
                    "worse"
                )
            yield Session(file, model, tokenizer, template, template_name, tuple(notes))


def plan_lines(
    path: Path, offload: Offload, *, n_ctx: int | None, kv_type: str, as_json: bool
) -> list[str]:
    """What `run --plan` prints: where the layers of the model at `path` would go."""
    with GGUFFile(path) as file:
        check_architecture(file)
        config = read_config(file)
        size = context_size(config, n_ctx)
        program = build_program(file, config, n_ctx=size)
        sizes = measure_sizes(program, n_ctx=size, n_batch=min(BATCH, size), kv_type=kv_type)
    plan = plan_split(sizes, offload.devices, offload.wish)
    if as_json:
        return [json.dumps(plan_text.to_json(plan, n_ctx=size, kv_type=kv_type), indent=2)]
    return list(plan_text.describe(plan, n_ctx=size, kv_type=kv_type))


def refuse_checkpoint(path: Path) -> None:
    """A folder is not a model to run; say how to make it one."""
    if not path.is_dir():
        return
    shown = printable(path, 1000)
    if (path / "config.json").is_file():
        raise GGUFError(
            f"{shown} is a checkpoint folder, and `run` needs a GGUF file: "
            f"make one with `convert {shown}`, then run that"
        )
    files = sorted(path.glob("*.gguf"))
    if files:
        names = ", ".join(printable(file.name) for file in files[:5])
        raise GGUFError(f"{shown} is a folder; name one of the files in it: {names}")
    raise GGUFError(f"{shown} is a folder, and `run` needs a GGUF file")


def main_type(file: GGUFFile) -> str:
    """The type that most of the file's bytes have."""
    sizes: Counter[str] = Counter()
    for tensor in file.tensors.values():
        sizes[tensor.quant.name] += tensor.nbytes
    if not sizes:
        return "no tensors"
    name = sizes.most_common(1)[0][0]
    return name if len(sizes) == 1 else f"mostly {name}"


def count(n: int, noun: str) -> str:
    """`1 token`, `2 tokens`."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def template_family(source: str) -> str:
    """The name people know a template by, told from the markers in it."""
    return next((name for marker, name in TEMPLATE_FAMILIES if marker in source), "custom")


def _choose_template(
    tokenizer: Tokenizer, own: Mapping[str, str], wanted: str | None, *, raw: bool
) -> tuple[ChatTemplate | None, str]:
    """The template to use, if any, and its name for the user; `own` are the file's."""
    if raw:
        return None, "none (--raw): plain text is continued"
    if wanted is None and not own:
        return None, "none in the file: plain text is continued"
    name = next(iter(own)) if wanted is None else wanted
    if name in own:
        source, origin = own[name], "of the file" if len(own) == 1 else _among(name, own)
    elif any(mark in name for mark in TEMPLATE_MARKS):
        source, origin = name, "given as a text"
    else:
        source, origin = _read_template(Path(name), own), printable(name, 1000)
    bos, eos = (_token_text(tokenizer, i) for i in (tokenizer.bos_id, tokenizer.eos_id))
    try:
        template = ChatTemplate(source, bos_token=bos, eos_token=eos)
    except TemplateError as error:
        raise TemplateError(
            f"{error}; --chat-template gives another one, --raw continues plain text"
        ) from error
    return template, f"{template_family(source)}, {origin}"


def _token_text(tokenizer: Tokenizer, token_id: int | None) -> str:
    return "" if token_id is None else tokenizer.token_text(token_id)


def _among(name: str, own: Mapping[str, str]) -> str:
    others = ", ".join(printable(other, 40) for other in own if other != name)
    return f"'{printable(name, 40)}' of the file (--chat-template chooses: {others})"


def _read_template(path: Path, own: Mapping[str, str]) -> str:
    shown = printable(path, 1000)
    if not path.exists():
        names = ", ".join(printable(name, 40) for name in own)
        raise TemplateError(
            f"--chat-template {shown}: no such file, and the model's own templates are "
            f"{names or 'none'}"
        )
    if not path.is_file():
        raise TemplateError(f"{shown}: a chat template is a text file, and this is none")
    with path.open("rb") as stream:
        data = stream.read(MAX_TEMPLATE_BYTES + 1)
    if len(data) > MAX_TEMPLATE_BYTES:
        raise TemplateError(f"{shown}: larger than a chat template can be ({MAX_TEMPLATE_BYTES})")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TemplateError(f"{shown}: not UTF-8 text (byte {error.start})") from error
