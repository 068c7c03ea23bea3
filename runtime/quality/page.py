"""A report on a family of files as one HTML page that needs nothing else: no network, no script.

The page's own style sheet is the one thing that its Content-Security-Policy lets in, by its digest.
Names, metadata and texts come from files and are hostile: jinja2 escapes all that it is given, and
the plots escape their own.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from gguf_tools.describe import short_count, short_size
from gguf_tools.errors import OutputError, printable
from runtime.quality.advice import Advice, advise
from runtime.quality.facts import Facts
from runtime.quality.figures import colours, draw_figures, type_bars, type_names
from runtime.quality.measures import Estimate
from runtime.quality.plots import draw_bars, draw_plot
from runtime.quality.table import CLIFF_FACTOR, Result, header, rows, with_error

ENDINGS = (".html", ".htm")


@dataclass(frozen=True)
class Material:
    """A text, or a file of questions, that files were judged by."""

    name: str
    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class Report:
    """All that the page tells."""

    candidates: Sequence[Result]
    reference: Result | None
    command: str  # that makes it again
    text: Material | None
    task: Material | None
    windows: tuple[int, int] | None  # how many, and their tokens
    machine: str | None  # where speeds were measured


def material(path: Path) -> Material:
    """A file's name, size and digest."""
    data = path.read_bytes()
    return Material(printable(path.name), len(data), hashlib.sha256(data).hexdigest())


def check_target(path: Path, inputs: Iterable[Path]) -> None:
    """OutputError unless a page can become `path` and harms none of `inputs`."""
    shown = printable(path, limit=1000)
    if path.suffix.lower() not in ENDINGS:
        raise OutputError(f"--report {shown}: expected a name that ends in .html")
    if path.is_dir():
        raise OutputError(f"--report {shown}: that is a folder: give the name of a file in it")
    if not path.parent.is_dir():
        raise OutputError(f"--report {shown}: there is no such folder")
    targets = {path.resolve(), _part(path).resolve()}
    for each in inputs:
        if each.resolve() in targets or (path.exists() and each.exists() and path.samefile(each)):
            raise OutputError(f"--report {shown}: that is an input, {printable(each, limit=1000)}")


def write_page(path: Path, page: str) -> None:
    """Write the page, all or nothing; OutputError when that fails."""
    part = _part(path)
    try:
        with open(part, "w", encoding="utf-8", newline="\n") as file:
            file.write(page)
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):  # the first error is the one to tell
            part.unlink(missing_ok=True)
        raise OutputError(
            f"{printable(path, limit=1000)}: cannot be written: {error.strerror or error}"
        ) from error


def render(report: Report) -> str:
    """The page, the same for the same figures; files are shown the largest first."""
    folder = files("runtime.quality")
    style = folder.joinpath("page.css").read_text(encoding="utf-8")
    template = folder.joinpath("page.html.jinja").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    candidates = sorted(report.candidates, key=lambda result: -result.file_size)
    results = [*([] if report.reference is None else [report.reference]), *candidates]
    advice = advise(candidates, report.reference)
    figures = list(draw_figures(candidates, report.reference, advice))
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template).render(
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'",
        style=Markup(style),  # our own
        model=_model_name(results),
        facts=list(_facts(report, results)),
        advice=advice,
        columns=_columns(results),
        rows=list(_rows(results, report, advice)),
        details=list(_details(results)),
        plots=[(plot.title, draw_plot(plot), plot.note) for plot in figures],
        marks={point.kind for plot in figures for point in plot.points},
        types=_types(results),
        notes=[
            (printable(result.name, 60), result.facts.notes)
            for result in results
            if result.facts is not None and result.facts.notes
        ],
        has_distance=any(result.distance for result in results),
        has_evaluation=any(result.evaluation for result in results),
        has_accuracy=any(result.accuracy for result in results),
        has_speed=any(result.speed for result in results),
        machine=report.machine,
        cliff=f"{CLIFF_FACTOR:g}",
        command=report.command,
        version=_version(),
    )


# --- words -----------------------------------------------------------------------------------


def _model_name(results: Sequence[Result]) -> str:
    known = [each.facts.model for each in results if each.facts is not None and each.facts.model]
    return known[0] if known else printable(results[0].name, 60)


def _facts(report: Report, results: Sequence[Result]) -> Iterator[tuple[str, str]]:
    """What the head of the page lists: (label, text)."""
    known: list[Facts] = [each.facts for each in results if each.facts is not None]
    if known:
        yield "Architecture", known[0].architecture or "not said"
        yield "Parameters", f"{short_count(known[0].parameters)} ({known[0].parameters:,})"
    if report.reference is not None:
        size = short_size(report.reference.file_size)
        yield "Reference", f"{printable(report.reference.name, 60)} ({size})"
    if report.text is not None:
        yield "Text", _about(report.text)
    scored = [each.evaluation.tokens for each in results if each.evaluation is not None]
    if scored and report.windows is not None:
        n, n_ctx = report.windows
        yield "Tokens scored", f"{scored[0]:,}, in {n:,} {_plural('window', n)} of {n_ctx:,}"
    asked = [each.accuracy.questions for each in results if each.accuracy is not None]
    if report.task is not None and asked:
        yield "Questions", f"{asked[0]:,}, of {_about(report.task)}"
    if report.machine is not None:
        yield "Speeds measured on", report.machine


def _about(source: Material) -> str:
    return f"{source.name} ({short_size(source.n_bytes)}, SHA-256 {source.sha256[:12]}...)"


def _plural(noun: str, n: int) -> str:
    return noun if n == 1 else f"{noun}s"


def _version() -> str:
    try:
        return version("gguf-tools")
    except PackageNotFoundError:
        return ""


# --- tables ----------------------------------------------------------------------------------


def _columns(results: Sequence[Result]) -> list[str]:
    first, *others = header(results)
    return [first, "type", *others]


def _rows(results: Sequence[Result], report: Report, advice: Advice) -> Iterator[dict[str, Any]]:
    for result, (name, *texts) in zip(results, rows(results), strict=True):
        yield {
            "name": name,
            "cells": [_cell(text) for text in (_type(result), *texts)],
            "mark": "reference" if result is report.reference else advice.mark(result),
        }


def _cell(text: str) -> tuple[str, str]:
    """A figure and its error, to be shown below it."""
    figure, sign, error = text.partition(" \N{PLUS-MINUS SIGN} ")
    return figure, f"\N{PLUS-MINUS SIGN} {error}" if sign else ""


def _type(result: Result) -> str:
    return "" if result.facts is None else result.facts.type


def _details(results: Sequence[Result]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """More figures of those that were held against a reference."""
    for result in results:
        apart = result.distance
        if apart is not None:
            change, rms = apart.probability_change, apart.probability_rms
            yield (
                printable(result.name, 60),
                (
                    with_error(apart.perplexity_ratio, 4),
                    f"{apart.kl_median:.5f}",
                    f"{apart.kl_largest:.3f}",
                    with_error(Estimate(100 * change.value, 100 * change.error), 2),
                    with_error(Estimate(100 * rms.value, 100 * rms.error), 2),
                ),
            )


def _types(results: Sequence[Result]) -> dict[str, Any] | None:
    """Where the bytes of each file are, as bars and as a table of tensors by type."""
    names = type_names(results)
    if not names:
        return None
    bars = type_bars(results)
    described = (
        f"{bar.label}: {', '.join(f'{name} {short_size(size)}' for name, size in bar.segments)}"
        for bar in bars
    )
    return {
        "names": names,
        "rows": [
            (
                printable(result.name, 60),
                [facts.types[name].tensors if name in facts.types else "" for name in names],
            )
            for result, facts in ((result, result.facts) for result in results)
            if facts is not None
        ],
        "bars": draw_bars("types", "Bytes by type", "; ".join(described), bars, colours(results)),
        "legend": list(enumerate(colours(results))),
    }


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")
