"""Which buffers every thread may fill for itself."""

import numpy as np

from runtime.backends.flow import owned_buffers
from runtime.program import Add, Attend, Instruction, LayerNorm, MatMul, RMSNorm, Route, StoreKV
from runtime.stages import whole
from tests.programs import mixture, program_of, random_matrix

RNG = np.random.default_rng(0)
DIM = 16
ONES = np.ones(DIM, np.float32)
BUFFERS = dict.fromkeys(("normed", "again", "delta", "scores", "routes", "k", "v"), DIM)


def owned(*steps: Instruction) -> set[str]:
    return owned_buffers(whole(program_of(steps, DIM, buffers=BUFFERS)))


def product(source: str, target: str) -> MatMul:
    return MatMul(source, target, random_matrix(RNG, DIM, DIM))


NORM = RMSNorm("x", "normed", ONES, 1e-5)
UPDATE = (product("normed", "scores"), product("scores", "delta"), Add("delta", "x"))


def test_norms_attention_and_routes_are_own() -> None:
    assert owned(NORM, *UPDATE) == {"normed"}
    assert owned(LayerNorm("x", "normed", ONES, None, 1e-5), *UPDATE) == {"normed"}
    assert owned(Attend("k", "delta", 0, 1.0, 0)) == {"delta"}
    assert owned(Route("scores", "routes", 2)) == {"routes"}
    assert owned_buffers(whole(mixture(RNG))) == {"normed", "routes"}


def test_what_threads_share() -> None:
    # written by a product as well; norms of parts of a row; the KV cache's sources; the state
    assert owned(NORM, product("x", "normed")) == set()
    assert owned(RMSNorm("x", "normed", ONES[:4], 1e-5)) == set()
    assert owned(RMSNorm("x", "k", ONES, 1e-5), StoreKV("k", "v", 0)) == set()
    assert owned(RMSNorm("x", "x", ONES, 1e-5)) == set()


def test_not_what_is_read_after_its_source_has_changed() -> None:
    """A late thread would make it of the new source, and may still claim what reads it."""
    assert owned(NORM, *UPDATE, product("normed", "scores")) == set()
    assert owned(NORM, *UPDATE, NORM, product("normed", "scores")) == {"normed"}
    # nor what was made of such a thing
    again = RMSNorm("normed", "again", ONES, 1e-5)
    assert owned(NORM, again, *UPDATE, product("again", "scores")) == {"normed"}


def test_not_what_is_read_while_its_source_changes() -> None:
    """A thread that adds its part changes what a late one makes the other part of."""
    assert owned(NORM, Add("normed", "x")) == set()
    # a sum is claimed together with the product before it
    assert owned(NORM, product("normed", "delta"), Add("delta", "x")) == set()
    delta = RMSNorm("delta", "normed", ONES, 1e-5)
    assert owned(product("x", "delta"), delta, Add("normed", "x")) == {"normed"}
