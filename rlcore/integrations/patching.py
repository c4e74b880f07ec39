"""Attributes set on other people's objects, every one put back later."""

from __future__ import annotations

from types import TracebackType
from typing import Any

_ABSENT = object()


class Patch:
    """Remembers what each attribute was before it was set; undone by `undo()` or as a `with` ends.

    An attribute that the object only inherited is deleted again, and is then inherited as before.
    """

    def __init__(self) -> None:
        self._set: list[tuple[Any, str, Any, Any]] = []  # (owner, name, what was there, ours)

    @property
    def in_place(self) -> bool:
        return bool(self._set)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set `owner.name` on a module, class or instance that has it.

        Raises:
            AttributeError: there is no attribute of that name to stand in for.
        """
        getattr(owner, name)
        # a class's own dictionary keeps its static methods and descriptors as they are
        self._set.append((owner, name, vars(owner).get(name, _ABSENT), value))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Put everything back, the last first; a second call does nothing.

        Raises:
            RuntimeError: someone else has replaced an attribute since. The others are back.
        """
        lost = []
        while self._set:
            owner, name, old, ours = self._set.pop()
            if vars(owner).get(name) is not ours:
                lost.append(f"{owner.__name__}.{name}")
            elif old is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, old)
        if lost:
            raise RuntimeError(
                f"{', '.join(lost)} was replaced after patching, and is left as it is: undo "
                "patches in the opposite order"
            )

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()
