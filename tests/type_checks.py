"""The checks of types and shapes that the tests switch on."""

import beartype


def check_outermost(function):
    """Check the calls of a function, unless it is defined in another one.

    Those are made anew in every call of that one, and so would be their checks.
    """
    return function if "<locals>" in function.__qualname__ else beartype.beartype(function)
