"""A function replaced wherever a package binds it by name, now and while the patch is in place."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

from rlcore.integrations.patching import Patch


class ChangedPeer(RuntimeError):
    """A peer's function is not the one that an integration was written for; nothing is patched."""


def require_signature(function: Callable, *known: tuple[str, ...], version: str) -> None:
    """Refuses a function whose parameters are none of the `known` tuples of names.

    Raises:
        ChangedPeer: with the version, the function, what it takes and what is known.
    """
    found = tuple(inspect.signature(function).parameters)
    if found not in known:
        expected = " or ".join(f"({', '.join(names)})" for names in known)
        raise ChangedPeer(
            f"{version}: {function.__module__}.{function.__qualname__} takes "
            f"({', '.join(found)}), and rlcore knows it with {expected}: nothing was patched; use "
            "versions that fit each other"
        )


class NamePatch(Patch):
    """A Patch that replaces functions of one package under every name that its modules bind."""

    def __init__(self, package: str) -> None:
        super().__init__()
        self._package = package
        self._replaced: list[tuple[str, Callable, Callable]] = []  # (name, theirs, ours)

    def replace(self, name: str, theirs: Callable, ours: Callable) -> None:
        """Set every loaded module's `name` that is `theirs` to `ours`."""
        for module in self._binders(name, theirs):
            self.set(module, name, ours)
        self._replaced.append((name, theirs, ours))

    def undo(self) -> None:
        """Put everything back, also in modules that bound our function while it was in place."""
        remembered = {(id(owner), name) for owner, name, _, _ in self._set}
        for name, theirs, ours in self._replaced:
            for module in self._binders(name, ours):
                if (id(module), name) not in remembered:
                    setattr(module, name, theirs)
        self._replaced.clear()
        super().undo()

    def _binders(self, name: str, function: Callable) -> Iterator[ModuleType]:
        for path, module in list(sys.modules.items()):
            inside = path == self._package or path.startswith(f"{self._package}.")
            if inside and isinstance(module, ModuleType) and vars(module).get(name) is function:
                yield module
