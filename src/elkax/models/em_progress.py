"""A progress bar, or lines where there is none."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def show_progress(total: int) -> Iterator[Callable[[int, float], None]]:
    """Show how far an iteration is.

    Yields:
        A function of the number of steps taken and of the log posterior.
    """
    try:
        from fastprogress.fastprogress import progress_bar
    except ImportError:
        yield lambda done, value: print(f"iteration {done} of {total}  log posterior {value:.6g}")
        return
    bar = progress_bar(range(total))
    bar.update(0)

    def show(done: int, value: float) -> None:
        bar.comment = f"log posterior {value:.6g}"
        bar.update(done)

    yield show
