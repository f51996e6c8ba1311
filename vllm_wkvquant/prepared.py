"""What kernels make of a layer's parameters: once per object, dropped with it."""

import weakref
from collections.abc import Callable
from typing import TypeVar

from vllm_wkvquant.reference import KVParams

T = TypeVar("T")


class PreparedTables(dict[int, tuple[weakref.ref[KVParams], T]]):
    """id(params) -> (reference that says whether it is still that object, what was made of it)."""

    def __init__(self, make: Callable[[KVParams], T], release: Callable[[T], object] = lambda _: None) -> None:
        super().__init__()
        self._make, self._release = make, release

    def find(self, params: KVParams) -> T | None:
        """What was made of `params`; None where nothing was."""
        entry = self.get(id(params))
        return entry[1] if entry is not None and entry[0]() is params else None

    def of(self, params: KVParams) -> T:
        """What was made of `params`, made now if it was not."""
        made = self.find(params)
        if made is None:
            made = self._make(params)
            self[id(params)] = weakref.ref(params), made
            weakref.finalize(params, self._drop, id(params)).atexit = False
        return made

    def make_again(self, params: KVParams) -> None:
        """Make anew what was made of `params`, if it was, and release the old."""
        old = self.find(params)
        if old is not None:
            self[id(params)] = weakref.ref(params), self._make(params)
            self._release(old)

    def _drop(self, key: int) -> None:
        entry = self.pop(key, None)
        if entry is not None:
            self._release(entry[1])
