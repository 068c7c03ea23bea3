"""Which buffers every thread may fill for itself."""

import numpy as np

from runtime.backends.flow import owned_buffers
from runtime.program import Add, Attend, Instruction, LayerNorm, MatMul, RMSNorm, Route, StoreKV
from tests.programs import mixture, program_of, random_matrix

RNG = np.random.default_rng(0)
DIM = 16
ONES = np.ones(DIM, np.float32)
BUFFERS = dict.fromkeys(("normed", "again", "delta", "scores", "routes", "k", "v"), DIM)


def owned(*steps: Instruction) -> set[str]:
    return owned_buffers(program_of(steps, DIM, buffers=BUFFERS))


def product(source: str, target: str) -> MatMul:
    return MatMul(source, target, random_matrix(RNG, DIM, DIM))


NORM = RMSNorm("x", "normed", ONES, 1e-5)


def test_norms_attention_and_routes_are_own() -> None:
    assert owned(NORM, product("normed", "delta"), Add("delta", "x")) == {"normed"}
    layer = LayerNorm("x", "normed", ONES, None, 1e-5)
    assert owned(layer, product("normed", "delta"), Add("delta", "x")) == {"normed"}
    assert owned(Attend("k", "delta", 0, 1.0, 0)) == {"delta"}
    assert owned(Route("scores", "routes", 2)) == {"routes"}
    assert owned_buffers(mixture(RNG)) == {"normed", "routes"}


def test_what_threads_share() -> None:
    # written by a product as well; norms of parts of a row; the KV cache's sources; the state
    assert owned(NORM, product("x", "normed")) == set()
    assert owned(RMSNorm("x", "normed", ONES[:4], 1e-5)) == set()
    assert owned(RMSNorm("x", "k", ONES, 1e-5), StoreKV("k", "v", 0)) == set()
    assert owned(RMSNorm("x", "x", ONES, 1e-5)) == set()


def test_not_what_is_read_after_its_source_has_changed() -> None:
    """A late thread would make it of the new source, and may still claim what reads it."""
    update = (product("normed", "delta"), Add("delta", "x"))
    assert owned(NORM, *update, product("normed", "scores")) == set()
    assert owned(NORM, *update, NORM, product("normed", "scores")) == {"normed"}
    # nor what was made of such a thing
    again = RMSNorm("normed", "again", ONES, 1e-5)
    assert owned(NORM, again, *update, product("again", "scores")) == {"normed"}
