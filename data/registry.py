"""Modules of a package as the values of a setting: each file that is added to the package is one more value."""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Generic, TypeVar

Entry = TypeVar("Entry")


class Registry(Generic[Entry]):
    """The objects called `attribute` in the modules of `package`, by the names of the modules.

    key: the setting that chooses one, for errors.  Modules without such an object are helpers of the others.
    """

    def __init__(self, package: str, folders: Iterable[str], attribute: str, key: str):
        self._package, self._folders, self._attribute, self._key = package, folders, attribute, key

    def all(self) -> Mapping[str, Entry]:
        """Every entry by its name, in order; imports every module."""
        return self._all

    def names(self) -> list[str]:
        """Of all entries; imports every module."""
        return list(self.all())

    def find(self, name: str) -> Entry:
        """The entry of this name; imports its module.  Raises ValueError, with the names there are, for any other."""
        entry = self._entry(name) if name in self._modules else None
        if entry is None:
            near = difflib.get_close_matches(str(name), self.names(), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{self._key}={name}: must be one of {', '.join(self.names())}{hint}")
        return entry

    @cached_property
    def _modules(self) -> frozenset[str]:
        return frozenset(module.name for module in pkgutil.iter_modules(self._folders))

    @cached_property
    def _all(self) -> dict[str, Entry]:
        found = {name: self._entry(name) for name in sorted(self._modules)}
        return {name: entry for name, entry in found.items() if entry is not None}

    def _entry(self, name: str) -> Entry | None:
        return getattr(importlib.import_module(f"{self._package}.{name}"), self._attribute, None)
