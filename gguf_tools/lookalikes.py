"""What a file is that was offered as GGUF and is not."""

from gguf_tools.errors import printable

MAX_SAFETENSORS_HEADER = 1 << 30

# How files begin that are offered as GGUF and are not.
LOOKALIKES = (
    (b"FUGG", "a byte-swapped GGUF file (made for a big-endian machine)"),
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself; run `git lfs pull`"),
    (b"lmgg", "a GGML file from before GGUF; convert the model again"),
    (b"fmgg", "a GGMF file from before GGUF; convert the model again"),
    (b"tjgg", "a GGJT file from before GGUF; convert the model again"),
    (b"algg", "a GGLA adapter from before GGUF; convert the adapter again"),
    (b"PK\3\4", "a zip archive, or a PyTorch checkpoint in one"),
    (b"\x80\2", "a Python pickle, such as an old PyTorch checkpoint"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"BZh", "a bzip2 archive; unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"\xfd7zXZ", "an xz archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive; unpack it first"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x7fELF", "a program (ELF)"),
    (b"MZ\x90", "a program (Windows)"),
)


def describe_beginning(start: bytes) -> str:
    """What a file that is not GGUF looks like, in words; `start` is its first kilobyte or less."""
    for magic, what in LOOKALIKES:
        if start.startswith(magic):
            return what
    if not start.strip(b"\0"):
        return "zero bytes, as of a download that never finished"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < MAX_SAFETENSORS_HEADER:
        return "a safetensors file; `convert` its folder"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "a web page, as of a download that was refused"
    printed = start.translate(None, b"\t\r\n\f\x1b")
    if printed and min(printed) >= 32:
        kind = "JSON text" if text.startswith((b"{", b"[")) else "text"
        return f"{kind} beginning '{printable(start[:40].decode('utf-8', 'replace'))}'"
    return f"the bytes {start[:4].hex(' ')}"
