"""Makes Triton's CPU interpreter compute as a GPU does where it would not.

The interpreter keeps bfloat16 as raw bits: it truncates when it casts to it and adds the bits when
told to add. Here casts round to nearest even, and arithmetic is done in float32 and rounded.
Float arguments, which it leaves Python floats, become float32 scalars. It believes a promise that
an address is a multiple of so many bytes, of which a GPU makes wide loads: here it is looked at.
"""

from __future__ import annotations

import numpy as np
import torch


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bits (uint16), rounded to nearest even; NaN as torch writes it."""
    values = np.array(values, dtype=np.float32, order="C")
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def mend_interpreter() -> None:
    """Patches the interpreter in place; written against Triton 3.6 to 3.9."""
    from triton import language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, fp_to_fp = builder.cast_impl, builder.create_fp_to_fp

    def is_bf16(value) -> bool:
        return value.dtype.scalar == tl.bfloat16

    def rounding_cast(self, src, dst_type):
        to_bf16 = dst_type.scalar == tl.bfloat16
        if is_bf16(src) == to_bf16:
            return cast(self, src, dst_type)
        if to_bf16:
            return handle(narrow(src.data), tl.bfloat16)
        return cast(self, handle(widen(src.data), tl.float32), dst_type)

    def rounding_fp_to_fp(self, src, dst_type, rounding_mode):
        towards_zero = rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar) and not towards_zero:
            return rounding_cast(self, src, dst_type)
        return fp_to_fp(self, src, dst_type, rounding_mode)

    def in_float32(original):
        """`original` on float32 copies of its bfloat16 operands, its result rounded back."""

        def method(self, *args):
            if not any(isinstance(arg, handle) and is_bf16(arg) for arg in args):
                return original(self, *args)
            wide = [
                handle(widen(arg.data), tl.float32)
                if isinstance(arg, handle) and is_bf16(arg)
                else arg
                for arg in args
            ]
            result = original(self, *wide)
            if result.data.dtype == np.bool_:
                return handle(result.data, tl.bfloat16)
            return handle(narrow(result.data), tl.bfloat16)

        return method

    def refuse_bf16(original):
        def method(self, inputs):
            for value in inputs:
                if value.handle.dtype.scalar == tl.bfloat16:
                    raise NotImplementedError("the interpreter reduces bf16 as raw bits: upcast")
            return original(self, inputs)

        return method

    to_kernel_argument = interpreter._implicit_cvt

    def pinned_to_float32(argument):
        if type(argument) is not float:
            return to_kernel_argument(argument)
        with np.errstate(over="ignore"):
            value = np.array([argument], dtype=np.float32)
        return tl.tensor(handle(value, tl.float32), tl.float32)

    set_attr = handle.set_attr

    def looked_at(self, name, values):
        if name == "tt.divisibility" and self.data.size == 1:
            divisor = int(np.ravel([getattr(values, "value", values)])[0])
            address = int(self.data.item())
            assert address % divisor == 0, f"promised a multiple of {divisor}, got {address}"
        return set_attr(self, name, values)

    handle.set_attr = looked_at
    interpreter._implicit_cvt = pinned_to_float32
    builder.cast_impl = rounding_cast
    builder.create_fp_to_fp = rounding_fp_to_fp
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma"):
        setattr(builder, name, in_float32(getattr(builder, name)))
    # Interpreters before 3.8 let NaN through the maximum that drops it on a GPU.
    builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    for operation in (interpreter.ReduceOps, interpreter.ScanOps):
        operation.apply_impl = refuse_bf16(operation.apply_impl)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fills fresh memory with what shows when it was never written: NaN, or -1 for integers."""
    if type(tensor) is not torch.Tensor or tensor.is_meta or not tensor.numel():
        return tensor
    with torch.no_grad():
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor.fill_(float("nan"))
        return tensor if tensor.dtype == torch.bool else tensor.fill_(-1)


def poisoned(original):
    """An allocator like `original` whose memory comes poisoned."""

    def allocate(*args, **kwargs):
        tensor = original(*args, **kwargs)
        return tensor if torch.compiler.is_compiling() else poison(tensor)

    return allocate
