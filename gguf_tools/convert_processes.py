"""The processes that a conversion waits for: they take a while to load, and begin before all else.

What is imported here is what it takes to begin them.
"""

from contextlib import ExitStack
from types import TracebackType

from gguf_tools.convert_options import Options
from gguf_tools.cores import default_threads
from gguf_tools.self_check import SelfCheck
from gguf_tools.vocab import begin_trial
from gguf_tools.vocab.trial import RunningTrial


class Processes:
    """One that checks the file, and one that tries the tokenizer out; for a `with` block."""

    def __init__(self, options: Options) -> None:
        self.n_threads = options.threads or default_threads()
        self.check: SelfCheck | None = None  # None: nothing is to be looked at
        self._options = options
        self._trial: RunningTrial | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "Processes":
        options = self._options
        if options.dry_run or options.lora_only:
            return self
        with ExitStack() as stack:
            if not options.no_check or options.quality or options.raise_cliff:
                self.check = stack.enter_context(self._new_check())
            self._trial = stack.enter_context(begin_trial(options.model_dir))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def renew_check(self) -> None:
        """Begin another check, of a file that is made again."""
        self.check = self._stack.enter_context(self._new_check())

    @property
    def is_tried(self) -> bool:
        """Whether the tokenizer's trial is under way."""
        return self._trial is not None

    def take_trial(self) -> RunningTrial | None:
        """The tokenizer's trial, for who asks first: it answers once."""
        trial, self._trial = self._trial, None
        return trial

    def _new_check(self) -> SelfCheck:
        options = self._options
        return SelfCheck(threads=self.n_threads, strict=options.strict, checks=not options.no_check)
