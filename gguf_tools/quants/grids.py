"""The code tables of the IQ1, IQ2 and IQ3 formats: what a code of 8 to 11 bits stands for.

They are data of the formats. The gguf package carries them; it is imported when one is asked for.
"""

import numpy as np
import numpy.typing as npt


def read_grid(name: str) -> npt.NDArray[np.int8]:
    """The table of a format: 8 weights (IQ3: 4) for each code, without sign and scale."""
    import gguf

    quant = getattr(gguf.quants, name)
    quant.init_grid()
    grid: npt.NDArray[np.int8] = quant.grid[0, 0].astype(np.int8)
    return grid
