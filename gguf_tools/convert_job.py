"""One call of `convert`: what is to be written is settled, then written, then told.

Where the file lies beyond a precision cliff and that is asked for, the tensors that cost most get
more bits, and it is written again.
"""

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gguf_tools.calibration import COST_LEFT, ROOM, SCALING, Calibrated, remove_work
from gguf_tools.calibration_bar import calibrate_with_bar
from gguf_tools.cliffs import (
    ATTEMPTS,
    ROOM_IN_FILE,
    raised_types,
    raising_lines,
    request_sheet,
    with_room,
    with_types,
)
from gguf_tools.conversion import refuse_output
from gguf_tools.convert_inputs import find_inputs, read_wishes, repeating
from gguf_tools.convert_options import Options
from gguf_tools.convert_processes import Processes
from gguf_tools.file_types import FileType
from gguf_tools.journal import Journal
from gguf_tools.losses import Losses
from gguf_tools.overrides import Overrides
from gguf_tools.plan import Plan, refuse_fallbacks
from gguf_tools.report import Row, aligned, closing_rows, loss_notes, plan_lines, quality_rows
from gguf_tools.self_check import CliffFoundError, SheetRequest, Source
from gguf_tools.target_bar import settle_with_bar
from gguf_tools.target_size import Settled
from gguf_tools.type_trials import TypeTrials
from gguf_tools.writing_bar import write_with_bar


@dataclass(frozen=True)
class Draft:
    """What is to be written, before a weight of it is rounded."""

    plan: Plan
    output: Path
    source: Source
    sheet: SheetRequest | None  # the quality sheet that the file is to get
    settled: Settled | None  # where types were chosen for a size


@dataclass(frozen=True)
class Made:
    """A file that is there."""

    plan: Plan
    seconds: float
    losses: Losses
    calibrated: Calibrated | None
    raised: tuple[str, ...]  # what got more bits, and why


@dataclass(frozen=True)
class Told:
    """What the user is told in the end."""

    lines: tuple[str, ...]
    notes: tuple[str, ...]


class Job:
    """One call; `processes` have begun, and end after it."""

    def __init__(self, options: Options, processes: Processes) -> None:
        """Read what the options name. GGUFError says what is wrong with it."""
        self._options, self._processes = options, processes
        self._wishes = read_wishes(options)
        self._inputs = find_inputs(options)
        if processes.check:
            processes.check.prepare(self._inputs.source(), is_tried=processes.is_tried)
        self._start = time.monotonic()

    def run(self) -> Told:
        """Write the file, or say what it would be."""
        journal = self._new_journal()  # what the inputs are before they are read
        draft = self._draft()
        if self._options.strict:
            refuse_fallbacks(draft.plan)
        gc.freeze()  # the plan stays until the end
        gc.enable()
        made = None if self._options.dry_run else self._make(draft, journal)
        return Told(tuple(self._lines(draft, made)), tuple(self._notes(draft, made)))

    def _new_journal(self) -> Journal:
        options = self._options
        return Journal(self._inputs.read, options=options.deciding, resume=not options.no_resume)

    # --- what is to be written ------------------------------------------------------------------

    def _draft(self) -> Draft:
        plan = self._plan(self._wishes.file_type, self._wishes.overrides)
        output = self._inputs.output(self._wishes.name)
        self._inputs.protect(output)
        sheet, source = self._request_sheet(plan), self._inputs.source(plan)
        settled = None
        if self._wishes.target:
            settled = self._settle(plan, output, source, has_sheet=sheet is not None)
            plan = settled.plan
            sheet = self._request_sheet(plan) if sheet else None
        if sheet:
            plan = with_room(plan)
        return Draft(plan, output, source, sheet, settled)

    def _plan(self, file_type: FileType, overrides: Overrides) -> Plan:
        trial = self._processes.take_trial()
        return self._inputs.plan(file_type, overrides, self._wishes, trial)

    def _request_sheet(self, plan: Plan) -> SheetRequest | None:
        options, settings = self._options, self._wishes.settings
        if options.lora_only:
            return None
        return request_sheet(
            plan,
            asked=True if options.raise_cliff else options.quality,
            checks=not options.no_check,
            compiles=bool(options.quality),
            is_scaled=settings is not None and settings.method in SCALING,
        )

    def _settle(self, plan: Plan, output: Path, source: Source, *, has_sheet: bool) -> Settled:
        """Choose the types for the target."""
        options, wishes = self._options, self._wishes
        assert wishes.target is not None
        if not options.dry_run:
            refuse_output(plan, output, force=options.force)
        trials = TypeTrials(
            source,
            text=wishes.target.text,
            imatrix=options.imatrix,
            threads=self._processes.n_threads,
        )
        room = (ROOM if wishes.settings else 0) + (ROOM_IN_FILE if has_sheet else 0)
        return settle_with_bar(
            wishes.target,
            plan,
            wishes.overrides,
            self._plan,
            trials,
            room=room,
            cost_left=COST_LEFT[wishes.settings.method] if wishes.settings else 1.0,
            others=repeating(options, wishes.settings, self._processes.n_threads),
        )

    # --- writing it -----------------------------------------------------------------------------

    def _make(self, draft: Draft, journal: Journal) -> Made:
        plan = draft.plan
        raised: list[str] = []
        for attempt in range(ATTEMPTS):
            calibrated = self._calibrate(plan, draft)
            if calibrated:
                journal.add_option(calibrated.digest)
            rounded = calibrated.plan if calibrated else plan
            raises = self._options.raise_cliff and attempt < ATTEMPTS - 1
            try:
                losses = self._write(rounded, draft, journal, raises=raises)
                break
            except CliffFoundError as cliff:
                types = raised_types(cliff.sheet, plan, steps=2 * attempt)
                raised += raising_lines(cliff.sheet, plan, types)
                plan = with_types(plan, types)
                self._processes.renew_check()
                journal = self._new_journal()
        if calibrated:
            remove_work(calibrated)
        return Made(rounded, time.monotonic() - self._start, losses, calibrated, tuple(raised))

    def _calibrate(self, plan: Plan, draft: Draft) -> Calibrated | None:
        options, settings = self._options, self._wishes.settings
        if settings is None:
            return None
        return calibrate_with_bar(
            plan,
            draft.source,
            draft.output,
            settings,
            inputs=self._inputs.weights,
            threads=self._processes.n_threads,
            force=options.force,
            resume=not options.no_resume,
        )

    def _write(self, plan: Plan, draft: Draft, journal: Journal, *, raises: bool) -> Losses:
        """CliffFoundError where the file is to be made again."""
        check = self._processes.check
        begun: Callable[[Path], None] | None = None
        if check:
            begun = partial(
                check.begin,
                source=draft.source,
                output=draft.output,
                sheet=draft.sheet,
                raises=raises,
            )
        return write_with_bar(
            plan,
            draft.output,
            threads=self._processes.n_threads,
            force=self._options.force,
            begun=begun,
            check=check.end if check else None,
            journal=journal,
        )

    # --- telling of it --------------------------------------------------------------------------

    def _lines(self, draft: Draft, made: Made | None) -> Iterator[str]:
        if made is None:
            yield from plan_lines(draft.plan)
            yield ""
        if draft.settled:
            yield from draft.settled.lines
        yield from aligned([*self._rows(draft, made)])
        check = self._processes.check
        if check and self._options.check_details:
            yield from check.details

    def _rows(self, draft: Draft, made: Made | None) -> Iterator[Row]:
        """The closing table."""
        yield from closing_rows(
            made.plan if made else draft.plan,
            draft.output,
            made.seconds if made else None,
            self._self_check() if made else "",
            calibration=made.calibrated.line if made and made.calibrated else "",
        )
        if draft.settled:
            yield "target", draft.settled.line
        yield from quality_rows(self._processes.check, draft.sheet, made.raised if made else ())

    def _self_check(self) -> str:
        """What came of it, or why there was none."""
        check = self._processes.check
        if check and not self._options.no_check:
            return check.line
        if self._options.lora_only:
            return "left out: an adapter does not run without its base"
        return "left out, as --no-check asks"

    def _notes(self, draft: Draft, made: Made | None) -> Iterator[str]:
        plan = made.plan if made else draft.plan
        yield from plan.notes
        if made:
            yield from loss_notes(plan, made.losses)
        if self._processes.check:
            yield from self._processes.check.problems
