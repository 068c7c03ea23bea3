"""Rounding with error feedback, 16 rows of weights at once, one in each lane.

Columns depend on one another, rows do not. So a column of 16 rows is a vector, all rows take the
same steps, and what a row becomes has nothing to do with the rows beside it. ../reference.py does
the same in NumPy: read that first.

Memory, by address:

    x         vectors: weights as they are by now, errors of earlier columns fed back
    errors    vectors: (rounded - weight) / U[j, j] of columns that are rounded
    strip     float32: the columns of U of one group, row by row
    tile      the square of U in a strip that is the group's own
    pivots    float32: 1 / U[j, j]
    ones      float32: of each group, a row of ones divided by its tile, negative
    ranges    three float32 each
    facts     int64, see rounding.py
"""
