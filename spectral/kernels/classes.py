"""The classes of rows and the strips of a page, as constants of the kernels (spectral.layout has the format).

A kind says how many rows a class has: of a page that is transformed, class 0 is of kind 0, class 1 of kind 1, and so
on; the one class of a page that is not has the kind of as many rows as the page.
"""

from __future__ import annotations

import triton


@triton.constexpr_function
def kind_rows(kind):
    return 1 if int(kind) == 0 else 2 ** (int(kind) - 1)


@triton.constexpr_function
def class_kind(number, classes, page):
    """Of class `number` of a page of `page` rows."""
    return int(page).bit_length() if int(classes) == 1 else int(number)


@triton.constexpr_function
def class_rows(number, classes, page):
    return kind_rows(class_kind(number, classes, page))


@triton.constexpr_function
def first_row(number, classes):
    """First row of a class."""
    return 0 if int(classes) == 1 or int(number) == 0 else 2 ** (int(number) - 1)


@triton.constexpr_function
def size_log2(bits, rows):
    """Of a cell's bytes."""
    return (4 * int(rows) * max(1, int(bits) // 2)).bit_length() - 1


@triton.constexpr_function
def strip_order(classes):
    """(bits, class) of a page's strips in the order of spectral.layout: largest cells first."""
    every = [(bits, c) for bits in (8, 4, 2, 1) for c in range(int(classes))]
    return sorted(every, key=lambda s: -max(1, s[0] // 2) * (1 if s[1] == 0 else 2 ** (s[1] - 1)))


@triton.constexpr_function
def strip_bits(classes, number):
    return strip_order(classes)[int(number)][0]


@triton.constexpr_function
def strip_class(classes, number):
    return strip_order(classes)[int(number)][1]


@triton.constexpr_function
def strip_plane(classes, number):
    return {8: 0, 4: 1, 2: 2, 1: 3}[strip_order(classes)[int(number)][0]]


@triton.constexpr_function
def strip_rows(classes, page, number):
    return class_rows(strip_class(classes, number), classes, page)


@triton.constexpr_function
def strip_first(classes, number):
    """First row of a strip's class."""
    return first_row(strip_class(classes, number), classes)


@triton.constexpr_function
def score_step(classes):
    from spectral.kernels.tables import step_entries

    return step_entries(int(classes))


@triton.constexpr_function
def log2(x):
    return int(x).bit_length() - 1


@triton.constexpr_function
def item_quarters(bits):
    """Quarters of a cell that a lane of the mix kernel has (spectral.kernels.items)."""
    return 4 if int(bits) in (2, 4) else 2


@triton.constexpr_function
def item_tiles(bits):
    """Tiles of eight columns, one a lane g, in an item: one for every field of a lane's row."""
    return 8 if int(bits) == 8 else 16
