"""What is compiled for a program: all that runs, and nothing else."""

import numpy as np
import pytest

from gguf_tools.jit import Kernel
from gguf_tools.kernel_files import CACHE_FOLDER
from runtime.backends.cpu import CPUBackend
from runtime.kernels import attention, elementwise, experts, gates
from runtime.stages import whole
from tests.programs import attention_program, mixture, program_of, run

HEADS = (6, 2, 64, 64)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(2)


def test_only_what_is_needed_is_compiled(rng: np.random.Generator) -> None:
    plain = whole(attention_program(HEADS, rng))
    capped = whole(attention_program(HEADS, rng, softcap=1.0))
    mixed = whole(mixture(rng))
    assert attention.cap_scores not in CPUBackend.kernels(plain)
    assert attention.cap_scores in CPUBackend.kernels(capped)
    mine = {k for k in vars(experts).values() if hasattr(k, "address")}
    assert not mine & {*CPUBackend.kernels(plain), *gates.GATES.values()}
    assert experts.expert_matmul in CPUBackend.kernels(mixed)
    assert gates.gate_gelu not in CPUBackend.kernels(mixed)
    assert elementwise.layer_norm not in CPUBackend.kernels(mixed)


@pytest.mark.skipif(CACHE_FOLDER is None, reason="kernels are kept in memory only")
@pytest.mark.parametrize("kernel", [*gates.GATES.values(), *gates.ALONE.values()], ids=repr)
def test_gates_are_kept_on_disk(kernel: Kernel) -> None:
    assert kernel.address
    assert Kernel(kernel.function, kernel.letters).is_ready


def test_all_that_runs_was_announced(rng: np.random.Generator) -> None:
    """No kernel is compiled behind the progress display."""
    programs = [
        mixture(rng, biases=True),
        mixture(rng, quant="Q8_0"),
        attention_program(HEADS, rng, softcap=1.0, sinks=True),
    ]
    for stage in map(whole, programs):
        announced = {kernel.address for kernel in CPUBackend.kernels(stage)}
        backend = CPUBackend(stage, n_ctx=32, n_threads=1, n_batch=8)
        (span,) = backend.spans
        for part in (*span.decode, *span.body_many, *span.head_many):
            assert set(part.operations[:, 0].tolist()) <= announced
        backend.close()


def test_an_instruction_that_is_not_known() -> None:
    class Unheard:
        source = target = "x"

    with pytest.raises(ValueError, match="no such instruction"):
        run(program_of([Unheard()], 8), (1,), 1)  # type: ignore[list-item]
