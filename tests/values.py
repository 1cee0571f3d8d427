"""Values for Hypothesis: JSON of any shape, and now and then something that breaks a limit."""

from __future__ import annotations

import enum

from hypothesis import strategies as st


class Size(enum.IntEnum):
    LARGE = 3


class Colour(enum.StrEnum):
    RED = "red"


_scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=5)
    | st.just(4300).map(lambda digits: 10**digits)
    | st.sampled_from(["\0", "\ud800", "😀", '"', "\\", '"1":', "[{", b"x", Size.LARGE, Colour.RED])
)  # fmt: skip
_keys = st.text(st.characters(codec=None), max_size=3) | st.sampled_from(["1", "true", "\0", "\udfff", 1, None, 0.5])
VALUES = st.recursive(
    _scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(_keys, inner, max_size=4)
        | st.tuples(st.integers(30, 66), inner).map(lambda pair: _wrapped(*pair))
    ),
    max_leaves=12,
)


def _wrapped(times: int, value: object) -> object:
    for n in range(times):
        value = [value] if n % 2 else {"k": value}
    return value
