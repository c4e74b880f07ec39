"""Counts what a kernel reads and writes, element by element, under Triton's interpreter.

with count_memory() as traffic:
    rl.token_logprob(logits, target, backend="triton")
assert traffic.of(logits).loads == logits.numel()
assert not traffic.out_of_bounds
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass
class Access:
    """One load, store or atomic of one program: the addresses of its active lanes."""

    addresses: np.ndarray
    itemsize: int


@dataclass(frozen=True)
class TensorTraffic:
    """Elements moved between kernels and one tensor; `loads_each` has the tensor's shape."""

    loads_each: Tensor
    stores_each: Tensor

    @property
    def loads(self) -> int:
        return int(self.loads_each.sum())

    @property
    def stores(self) -> int:
        return int(self.stores_each.sum())


@dataclass
class Traffic:
    """What was recorded. Storages are kept alive, so an address never means two tensors."""

    loads: list[Access] = field(default_factory=list)
    stores: list[Access] = field(default_factory=list)
    atomics: list[Access] = field(default_factory=list)
    storages: dict[int, torch.UntypedStorage] = field(default_factory=dict)

    def of(self, tensor: Tensor) -> TensorTraffic:
        """Loads and stores of each element of `tensor`, which may be a view of a larger storage."""
        assert not self.atomics, "the kernels used atomics, whose order is not fixed"
        return TensorTraffic(_per_element(self.loads, tensor), _per_element(self.stores, tensor))

    @property
    def launches(self) -> bool:
        return bool(self.storages)

    @property
    def out_of_bounds(self) -> int:
        """Accesses that touch no storage which any launch was given."""
        ends = [(start, start + s.nbytes()) for start, s in self.storages.items()]
        outside = 0
        for access in self.loads + self.stores + self.atomics:
            inside = np.zeros(access.addresses.shape, dtype=bool)
            for start, end in ends:
                last = access.addresses + np.uint64(access.itemsize)
                inside |= (access.addresses >= start) & (last <= end)
            outside += int((~inside).sum())
        return outside


def _per_element(accesses: list[Access], tensor: Tensor) -> Tensor:
    """How often each element of `tensor` was touched, in its shape."""
    storage, itemsize = tensor.untyped_storage(), tensor.element_size()
    slots = storage.nbytes() // itemsize
    counts = np.zeros(slots, dtype=np.int64)
    for access in accesses:
        offset = access.addresses.astype(np.int64) - storage.data_ptr()
        offset = offset[(offset >= 0) & (offset < slots * itemsize)]
        if offset.size:
            assert access.itemsize == itemsize, "an access of another width than the tensor's"
            np.add.at(counts, offset // itemsize, 1)
    return torch.from_numpy(counts).as_strided(
        tensor.size(), tensor.stride(), tensor.storage_offset()
    )


def _storages_of(arguments) -> Iterator[torch.UntypedStorage]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument.untyped_storage()
        elif isinstance(argument, tuple | list):
            yield from _storages_of(argument)


@contextmanager
def count_memory() -> Iterator[Traffic]:
    """Records every access of the kernels that are interpreted inside the `with` block."""
    from triton.runtime import interpreter

    traffic = Traffic()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    originals = {
        (owner, name): getattr(owner, name)
        for owner, name in [
            (builder, "create_masked_load"),
            (builder, "create_masked_store"),
            (builder, "create_atomic_rmw"),
            (builder, "create_atomic_cas"),
            (executor, "__call__"),
        ]
    }

    def record(accesses: list[Access], pointers, mask=None) -> None:
        addresses = pointers.data.astype(np.uint64)
        active = np.ones_like(addresses, bool) if mask is None else mask.data
        addresses = addresses[np.broadcast_to(active, addresses.shape)]
        bits = pointers.get_element_ty().primitive_bitwidth
        accesses.append(Access(addresses.ravel(), max(1, bits // 8)))

    def load(self, pointers, mask, *rest):
        record(traffic.loads, pointers, mask)
        return originals[builder, "create_masked_load"](self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        record(traffic.stores, pointers, mask)
        return originals[builder, "create_masked_store"](self, pointers, value, mask, *rest)

    def rmw(self, operation, pointers, value, mask, *rest):
        record(traffic.atomics, pointers, mask)
        return originals[builder, "create_atomic_rmw"](
            self, operation, pointers, value, mask, *rest
        )

    def cas(self, pointers, *rest):
        record(traffic.atomics, pointers)
        return originals[builder, "create_atomic_cas"](self, pointers, *rest)

    def launch(self, *args, **kwargs):
        for storage in _storages_of([*args, *kwargs.values()]):
            traffic.storages[storage.data_ptr()] = storage
        return originals[executor, "__call__"](self, *args, **kwargs)

    replacements = zip(originals, (load, store, rmw, cas, launch), strict=True)
    try:
        for (owner, name), replacement in replacements:
            setattr(owner, name, replacement)
        yield traffic
    finally:
        for (owner, name), original in originals.items():
            setattr(owner, name, original)
