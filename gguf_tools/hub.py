"""Fetching models from the Hugging Face hub, through its own library and cache.

The library keeps what is downloaded, resumes what was interrupted, and knows about logins and
mirrors (HF_TOKEN, HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE). What it does not do is compare digests:
that is done here.
"""

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from gguf_tools.describe import short_size
from gguf_tools.errors import GGUFError, printable
from gguf_tools.hub_names import (
    PREFIX,
    HubFile,
    HubName,
    choose_adapter,
    choose_checkpoint,
    choose_config,
    choose_model,
)

Progress = Callable[[str, int, int], None]
"""Told while something is downloaded: what, bytes so far, bytes in all."""

TIMEOUT = 10  # seconds for the first answer
SHOWN_MODELS = 8  # of the cache, in one error
_TRANSPORTS = ("httpx2", "httpx", "httpcore", "requests", "urllib3")


def fetch_model(name: HubName, on_progress: Progress | None = None) -> Path:
    """The GGUF file that `name` means, from the cache or downloaded (all parts of a split one).

    Gives the path of the first part. Offline, what the cache holds of it is used.
    """
    return _fetch(name, choose_model, on_progress)[0]


def fetch_checkpoint(name: HubName, on_progress: Progress | None = None) -> Path:
    """The folder with a checkpoint's weights, configuration and tokenizer."""
    paths = _fetch(name, choose_checkpoint, on_progress)
    return next(path.parent for path in paths if path.name == "config.json")


def fetch_adapter(name: HubName, on_progress: Progress | None = None) -> Path:
    """The folder with a LoRA adapter's weights and configuration."""
    paths = _fetch(name, choose_adapter, on_progress)
    return next(path.parent for path in paths if path.name == "adapter_config.json")


def fetch_config(name: HubName, on_progress: Progress | None = None) -> Path:
    """The folder with a checkpoint's config.json, which alone is fetched."""
    return _fetch(name, choose_config, on_progress)[0].parent


def cached_models() -> list[tuple[str, Path]]:
    """The GGUF models in the hub's cache: `hf:OWNER/REPO:FILE`, and where each lies."""
    models: dict[str, Path] = {}
    for repo, folder in _cached_snapshots():
        for path in sorted(folder.rglob("*.gguf")):
            name = path.relative_to(folder).as_posix()
            with suppress(GGUFError):  # a file that is no model, or whose first part is missing
                chosen = choose_model(HubName(repo, name), _files_of(folder))
                if chosen[0].name == name:
                    models.setdefault(f"{PREFIX}{repo}:{name}", path)
    return sorted(models.items())


Choose = Callable[[HubName, list[HubFile]], Sequence[HubFile]]


def _fetch(name: HubName, choose: Choose, on_progress: Progress | None) -> list[Path]:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        revision, files = _list_files(name)
    except _Unreachable as error:
        return _from_cache(name, choose, str(error))
    chosen = [_checked(file, name) for file in choose(name, files)]
    found = {file.name: _cached(name.repo, file, revision) for file in chosen}
    missing = [file for file in chosen if found[file.name] is None]
    _check_room(name, missing)
    done, total = 0, sum(file.size or 0 for file in missing)
    for file in missing:
        try:
            found[file.name] = _download(name, file, revision, _part(on_progress, done, total))
        except _Unreachable as error:
            raise GGUFError(
                f"{name}: the download of {printable(file.name)} broke off ({error}); the same "
                "command takes it up again"
            ) from error
        done += file.size or 0
    return [path for path in found.values() if path is not None]


class _Unreachable(Exception):
    """The hub cannot be reached; the text says why."""


def _list_files(name: HubName) -> tuple[str, list[HubFile]]:
    """The revision that `main` is now, and its files."""
    from huggingface_hub import HfApi

    def ask() -> Any:
        return HfApi().model_info(name.repo, files_metadata=True, timeout=TIMEOUT)

    info = _calling(name, ask)
    files = []
    for file in info.siblings or ():
        lfs = file.lfs
        sha256 = "" if lfs is None else str(lfs["sha256"])
        sha1 = "" if lfs is not None else str(file.blob_id or "")
        files.append(HubFile(file.rfilename, file.size, sha256, sha1))
    return str(info.sha), files


def _calling(name: HubName, call: Callable[[], Any]) -> Any:
    """What `call` gives; the hub library's errors become sentences, or _Unreachable."""
    from huggingface_hub import errors

    try:
        return call()
    except errors.GatedRepoError as error:
        raise GGUFError(
            f"{name}: its owner asks for consent first; give it on the repository's page, and log "
            "in with `hf auth login`"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise GGUFError(
            f"{name}: the hub knows no such model; check the name, or log in with "
            "`hf auth login` if it is private"
        ) from error
    except errors.EntryNotFoundError as error:
        if isinstance(error, errors.LocalEntryNotFoundError):  # how a lost connection is told
            raise _Unreachable(_reason(error)) from error
        raise GGUFError(f"{name}: a file that was listed is gone; try again") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status >= 500 or status in (408, 429):
            raise _Unreachable(f"it answered {status}") from error
        raise GGUFError(f"{name}: the hub refused with status {status}") from error
    except Exception as error:
        # The library lets the errors of its transport through, another one in each version.
        modules = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
        if isinstance(error, OSError) or modules.intersection(_TRANSPORTS):
            if isinstance(error, OSError) and error.errno is not None and error.filename:
                raise  # of the disk
            raise _Unreachable(_reason(error)) from error
        raise


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return printable(text, 200).rstrip(".")


def _checked(file: HubFile, name: HubName) -> HubFile:
    """The file, unless its name would lead out of the cache."""
    parts = PurePosixPath(file.name).parts
    if not parts or file.name.startswith("/") or ".." in parts or set(file.name) & set("\\:\0"):
        raise GGUFError(
            f"{name}: the repository lists a file called {printable(file.name)}, which is no name "
            "for a file; nothing was downloaded"
        )
    return file


def _cached(repo: str, file: HubFile, revision: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, file.name, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _check_room(name: HubName, files: Iterable[HubFile]) -> None:
    """Refuse what the disk has no room for."""
    from huggingface_hub import constants

    needed = sum(file.size or 0 for file in files)
    folder = Path(constants.HF_HUB_CACHE)
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise GGUFError(
            f"{name}: {short_size(needed)} are to be downloaded, and {printable(folder)} has room "
            f"for {short_size(free)}; make room, or set HF_HOME to a folder on another disk"
        )


def _download(name: HubName, file: HubFile, revision: str, report: Callable[[int], None]) -> Path:
    from huggingface_hub import hf_hub_download

    def get() -> Any:
        return hf_hub_download(
            name.repo, file.name, revision=revision, tqdm_class=_bar_class(report)
        )

    path = Path(_calling(name, get))
    if not _is_intact(path, file):
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise GGUFError(
            f"{name}: {printable(file.name)} is not what the hub says it is (its SHA-256 or size "
            "differs), and was removed; download it again"
        )
    return path


def _is_intact(path: Path, file: HubFile) -> bool:
    """Whether a file has the size and the digest that the hub's list gives it."""
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return False
    expected = file.sha256 or file.git_sha1
    if not expected:
        return True
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(usedforsecurity=False)
    if not file.sha256:
        digest.update(b"blob %d\0" % size)
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == expected.lower()


def _part(on_progress: Progress | None, before: int, total: int) -> Callable[[int], None]:
    """Reports on one of several files as part of the whole."""
    done = before

    def report(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        if on_progress is not None:
            on_progress("downloading", done, total)

    return report


def _bar_class(report: Callable[[int], None]) -> Any:
    """What the hub library takes for a progress bar: it tells `report` of every piece."""

    class Bar:
        total: int | None = None
        n = 0

        def __init__(self, *args: object, initial: int = 0, **options: object) -> None:
            if initial:
                self.update(initial)

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *exception: object) -> None:
            return None

        def update(self, n_bytes: float | None = 1) -> None:
            self.n += int(n_bytes or 0)
            report(int(n_bytes or 0))

        def _ignore(self, *args: object, **options: object) -> None:
            """Shown by other bars."""

        # With `update_transfer`, the bytes that arrive and those written are told to one bar.
        update_transfer = set_transfer_postfix_str = set_postfix_str = _ignore
        set_description = set_description_str = refresh = close = _ignore

    return Bar


# --- without the hub ----------------------------------------------------------------------------


def _from_cache(name: HubName, choose: Choose, reason: str) -> list[Path]:
    """What the newest snapshot in the cache has of `name`, when the hub cannot be reached."""
    for repo, folder in _cached_snapshots():
        if repo.lower() == name.repo.lower():
            with suppress(GGUFError):  # this snapshot holds something else
                return [folder / file.name for file in choose(name, _files_of(folder))]
    from huggingface_hub import constants

    kept = [model for model, _ in cached_models()]
    shown = ", ".join(printable(model) for model in kept[:SHOWN_MODELS])
    more = f" and {len(kept) - SHOWN_MODELS} more" if len(kept) > SHOWN_MODELS else ""
    held = f"the cache holds {shown}{more}" if kept else "the cache holds no GGUF file yet"
    raise GGUFError(
        f"{name}: the hub at {constants.ENDPOINT} cannot be reached ({reason}), and this is not "
        f"in the cache; {held}"
    )


def _cached_snapshots() -> list[tuple[str, Path]]:
    """Repositories of models in the cache, each with the folder of a snapshot; newest first."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        cache = scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return []
    found = [
        (revision.last_modified, repo.repo_id, revision.snapshot_path)
        for repo in cache.repos
        if repo.repo_type == "model"
        for revision in repo.revisions
    ]
    return [(repo, path) for _, repo, path in sorted(found, reverse=True)]


def _files_of(folder: Path) -> list[HubFile]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return [HubFile(path.relative_to(folder).as_posix()) for path in sorted(files)]
