"""Parts that do not fit each other are refused in a sentence, before or while they are read."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gguf_tools.checkpoint import open_checkpoint
from gguf_tools.errors import GGUFError
from tests.packed.recorded import NAMES, QUANTISED, Recorded, make, read

DOWN = QUANTISED[1]


def refusal(folder: Path, recorded: Recorded) -> str:
    make(folder, recorded)
    with pytest.raises(GGUFError) as caught:
        for tensor in open_checkpoint(folder).tensors.values():
            tensor.load(0, tensor.n_rows)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


def parts(name: str) -> list[str]:
    unused = (".input_scale", "weight_format", ".workspace")
    return [part for part in read(name).parts if DOWN in part and not part.endswith(unused)]


EVERY_PART = [(name, part) for name in NAMES for part in parts(name)]
# Without it a weight can be read all the same: as one of inputs in order, or symmetric.
OPTIONAL = (".g_idx", "_zero_point", "_global_scale")


@pytest.mark.parametrize(("name", "part"), EVERY_PART)
def test_a_part_is_missing(tmp_path: Path, name: str, part: str) -> None:
    recorded = read(name)
    del recorded.parts[part]
    if part.endswith(OPTIONAL) or (name == "awq" and part.endswith(".qzeros")):
        make(tmp_path, recorded)
        open_checkpoint(tmp_path)
        return
    make(tmp_path, recorded)
    wanted = f"{DOWN}.weight"
    try:
        found = open_checkpoint(tmp_path).tensors.get(wanted)
    except GGUFError as error:
        assert "expected a tensor" in str(error)
    else:  # what else is there is no weight: the plan names it as missing or of no float dtype
        assert found is None or found.dtype in ("U8", "I8")


@pytest.mark.parametrize(("name", "part"), EVERY_PART)
@pytest.mark.parametrize("change", ["shorter", "longer", "flat", "dtype"])
def test_a_part_of_another_shape(tmp_path: Path, name: str, part: str, change: str) -> None:
    recorded = read(name)
    dtype, shape, data = recorded.parts[part]
    size = len(data) // int(np.prod(shape, dtype=int))
    if change == "dtype":
        recorded.parts[part] = "BOOL", [len(data)], data
    elif change == "flat":
        recorded.parts[part] = dtype, [1, 1, 1, 1, int(np.prod(shape, dtype=int))], data
    elif not shape or len(data) == size:
        recorded.parts[part] = dtype, [2], data * 2
    elif change == "longer":
        row = len(data) // shape[0]
        recorded.parts[part] = dtype, [shape[0] + 1, *shape[1:]], data + data[:row]
    else:
        row = len(data) // shape[0]
        recorded.parts[part] = dtype, [shape[0] - 1, *shape[1:]], data[:-row]
    if part.endswith(".weight_shape") and change in ("shorter", "longer"):
        assert "expected (2,)" in refusal(tmp_path, recorded)
        return
    make(tmp_path, recorded)
    try:
        weights = open_checkpoint(tmp_path).tensors[f"{DOWN}.weight"]
    except GGUFError as error:
        assert str(tmp_path) in str(error)
        return
    # Some other number of rows is a matrix, too: config.json tells that it is not this one.
    assert weights.shape != (64, 96) or weights.dtype not in ("F32", "F16", "BF16")


def first_of(value: int) -> Callable[[np.ndarray], None]:
    def change(values: np.ndarray) -> None:
        values[0] = value

    return change


@pytest.mark.parametrize("value", [3, 1 << 30, -4, -(1 << 31)])
def test_groups_that_there_are_not(tmp_path: Path, value: int) -> None:
    recorded = read("gptq-4-asym-act")
    recorded.integers(f"{DOWN}.g_idx", first_of(value))
    assert "expected groups from 0 to 2" in refusal(tmp_path, recorded)


@pytest.mark.parametrize("value", [0, -1, 1 << 62, 64 << 32, 65])
def test_sizes_that_do_not_fit_the_words(tmp_path: Path, value: int) -> None:
    recorded = read("ct-pack4-group")
    recorded.integers(f"{DOWN}.weight_shape", first_of(value))
    refusal(tmp_path, recorded)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"shape": [64, 96]}', "blocksize"),
        ('{"shape": [64, 96], "blocksize": 0}', "blocksize"),
        ('{"shape": [64, 96], "blocksize": 1.5}', "blocksize"),
        ('{"shape": [4294967295, 4294967295], "blocksize": 64}', "expected"),
        ('{"shape": [64, -96], "blocksize": 64}', "two sizes"),
        ('{"shape": [64, true], "blocksize": 64}', "two sizes"),
        ('{"shape": 6144, "blocksize": 64}', "two sizes"),
        ("[]", "JSON object"),
        ("{", "JSON"),
        ("[" * 3000, "JSON"),
        (" " * 5000, "at most 4,096"),
        ('{"blocksize": ' + "9" * 4050 + "}", "expected"),
    ],
)
def test_the_state_of_four_bits(tmp_path: Path, text: str, words: str) -> None:
    recorded = read("bnb-nf4")
    name = f"{DOWN}.weight.quant_state.bitsandbytes__nf4"
    recorded.parts[name] = "U8", [len(text)], text.encode()
    assert words in refusal(tmp_path, recorded)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gptq-4", {"bits": 5}, "bits: expected one of 2, 3, 4, 8, found 5"),
        ("gptq-4", {"bits": None}, "bits"),
        ("gptq-4", {"checkpoint_format": "bitblas"}, "gptq, gptq_v2 or marlin (the layouts of"),
        ("gptq-4", {"checkpoint_format": 2}, "a text"),
        ("gptq-4", {"pack_dtype": "int64"}, "expected int32"),
        ("awq", {"version": "gemv_fast"}, "expected gemm, gemv or marlin (the layouts of other"),
        ("awq", {"version": ["gemm"]}, "expected gemm, gemv or marlin"),
        ("awq-gemv", {"group_size": 0}, "group_size: expected a whole number"),
        ("awq-gemv", {"group_size": 24}, "group_size: expected groups that divide 64 inputs"),
        ("awq-marlin", {"group_size": 40}, "group_size: expected groups that divide 96 inputs"),
        ("awq-marlin", {"group_size": 16}, "scales: expected (6, 64), found (3, 64)"),
        ("awq-gemv", {"group_size": None}, "group_size: expected a whole number"),
        ("awq-gemv", {"group_size": 1}, "inputs in groups of 1"),
        ("gptq-marlin", {"bits": 8}, "bits: expected 4, as Marlin's layout has"),
        ("gptq-marlin", {"is_marlin_format": "yes"}, "is_marlin_format"),
        ("awq", {"bits": 3}, "expected 4, found 3"),
        ("fp8-block", {"weight_block_size": [0, 128]}, "two sizes"),
        ("fp8-block", {"weight_block_size": 128}, "two sizes"),
        ("fp8-block", {"weight_block_size": [128, 128]}, "expected (1, 1)"),
        ("fp8-block", {"weight_block_size": None}, "weight_scale_inv: expected"),
        ("ct-int-channel", {"format": "marlin-24"}, "expected one of dense"),
        ("ct-int-channel", {"config_groups": []}, "an object"),
        ("ct-int-channel", {"config_groups": {"a": 1}}, "an object"),
        ("ct-int-channel", {"config_groups": {"a": {"weights": {"num_bits": 9}}}}, "num_bits"),
        ("ct-pack4-group", {"config_groups": {"a": {"weights": {"num_bits": 8}}}}, "of 8 bits"),
        ("ct-pack4-group", {"config_groups": {}}, "integers"),
    ],
)
def test_settings(tmp_path: Path, name: str, changes: dict[str, object], words: str) -> None:
    recorded = read(name)
    recorded.config.update(changes)
    assert words in refusal(tmp_path, recorded)


def test_weights_that_are_no_numbers_are_found(tmp_path: Path) -> None:
    from tests.test_conversion import convert_to

    recorded = read("fp8-block")
    dtype, shape, data = recorded.parts[f"{DOWN}.weight"]
    recorded.parts[f"{DOWN}.weight"] = dtype, shape, data[:100] + b"\x7f" + data[101:]
    make(tmp_path / "model", recorded)
    with pytest.raises(GGUFError, match=r"down_proj\.weight\[1, 4\] is nan"):
        convert_to(tmp_path / "model", tmp_path / "out.gguf")


def test_a_weight_both_quantised_and_not(tmp_path: Path) -> None:
    recorded = read("gptq-4")
    recorded.parts[f"{DOWN}.weight"] = "F32", [64, 96], bytes(64 * 96 * 4)
    assert "there twice" in refusal(tmp_path, recorded)


def test_gpt2_is_refused(tmp_path: Path) -> None:
    recorded = read("gptq-4")
    make(tmp_path, recorded, model_type="gpt2")
    with pytest.raises(GGUFError, match="a quantised gpt2 cannot be converted"):
        open_checkpoint(tmp_path)
