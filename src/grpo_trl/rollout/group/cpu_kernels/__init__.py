"""Decoding steps on a CPU, in C++ and in float32: the layers of the Llama family, attention for others, products, norms.

Where `compiled()` is None, callers fall back to torch's operations.

Axes: R running rows, H query heads, D head size, C hidden size.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....cpu_kernels import FLOAT, POINTER, SIZE, library
from .. import norms, step


ACTIVATIONS = {"SiLU": 0, "SiLUActivation": 0, "GELUTanh": 1}
"""Of gates, by the name of their module."""


@functools.cache
def compiled() -> Any:
    """The functions of `kernels.cpp`; None where they do not compile."""
    return library(
        Path(__file__).with_name("kernels.cpp"),
        {
            "attend": [POINTER] * 4 + [SIZE],
            "layer": [POINTER] * 5 + [SIZE],
            "normalize": [POINTER] * 3 + [SIZE] * 2,
            "product": [POINTER] * 3 + [SIZE] * 2,
        },
    )


# ---- What the kernels read, with the fields that it has there ----
class Struct(ctypes.Structure):
    """Keeps the tensors that its pointers point to."""

    held: Any = ()

    @classmethod
    def holding(cls, tensors: Any, *values: Any) -> Any:
        made = cls(*values)
        made.held = tensors
        return made


class Norm(Struct):
    """An RMSNorm; without a weight where there is none."""

    _fields_ = (("weight", POINTER), ("eps", FLOAT))

    @classmethod
    def of(cls, norm: norms.Norm | None) -> "Norm":
        return cls(None, 0.0) if norm is None else cls.holding(norm, norm.weight.data_ptr(), norm.eps)


class Linear(Struct):
    """A weight of shape (outputs, inputs), and perhaps a bias."""

    _fields_ = (("weight", POINTER), ("bias", POINTER), ("outputs", SIZE))

    @classmethod
    def of(cls, parameters: tuple[Tensor, Tensor | None]) -> "Linear":
        weight, bias = parameters[0].contiguous(), parameters[1]
        return cls.holding((weight, bias), weight.data_ptr(), None if bias is None else bias.data_ptr(), len(weight))


class Weights(Struct):
    """Of a decoder layer."""

    _fields_ = (
        *((f"norm_{part}", Norm) for part in ("before_attention", "query", "key", "after_attention")),
        *((f"norm_{part}", Norm) for part in ("before_mlp", "after_mlp")),
        *((name, Linear) for name in ("qkv", "output", "gate_up", "down")),
        *((name, SIZE) for name in ("heads", "whole_norms", "activation")),
        ("residual", FLOAT),
    )

    def __init__(self, *parts: Any):
        super().__init__(*parts)
        self.held = parts


class Memory(Struct):
    """Of an attention layer."""

    _fields_ = (
        *((name, POINTER) for name in ("own", "prompts")),
        *((name, SIZE) for name in ("own_columns", "prompt_columns", "key_heads", "size", "value_size")),
        *((name, FLOAT) for name in ("scaling", "softcap")),
    )

    @classmethod
    def of(cls, layer: step.LayerMemory) -> "Memory":
        memories = layer.own, layer.prompts
        columns = [memory.shape[1] for memory in memories]
        sizes = *columns, layer.key_heads, layer.key_size, layer.value_size
        return cls(*(x.data_ptr() for x in memories), *sizes, layer.scaling, layer.softcap or 0.0)


class Reach(Struct):
    """Which keys each row sees."""

    _fields_ = (
        *((name, POINTER) for name in ("rows", "first", "stop")),
        *((name, SIZE) for name in ("slots", "group")),
    )

    @classmethod
    def of(cls, reach: step.Reach) -> "Reach":
        return cls.holding(reach, *(x.data_ptr() for x in reach), *reach.rows_XG.shape)


class Step(Struct):
    """What layers with the same window and rotation have in common."""

    _fields_ = (
        *((name, Reach) for name in ("own", "prompts")),
        *((name, POINTER) for name in ("lines", "cos", "sin")),
        *((name, SIZE) for name in ("rows", "turned")),
    )

    @classmethod
    def of(cls, now: step.Step, layer: step.LayerMemory, rotation: tuple[Tensor, Tensor] | None = None) -> "Step":
        def make() -> Step:
            reaches = [Reach.of(reach) for reach in now.reaches(layer.window)]
            lines = now.lines(layer.own.shape[1])
            turning = [None, None] if rotation is None else [x.data_ptr() for x in rotation]
            turned = 0 if rotation is None else rotation[0].shape[-1]
            held = reaches, lines, rotation
            return cls.holding(held, *reaches, lines.data_ptr(), *turning, len(lines), turned)

        made: Step = now.shared(("compiled", layer.window, id(rotation)), make)
        return made


# ---- The kernels ----
def attend(query_RHD: Tensor, layer: step.LayerMemory, now: step.Step) -> Tensor:
    """As `kernels.attend`."""
    rows, heads, _ = query_RHD.shape
    output = query_RHD.new_empty(rows, heads * layer.value_size)
    memory, common = _memory(layer), Step.of(now, layer)
    compiled().attend(query_RHD.data_ptr(), ctypes.byref(memory), ctypes.byref(common), output.data_ptr(), heads)
    return output


def layer(
    hidden_R1C: Tensor, weights: Weights, held: step.LayerMemory, now: step.Step, rotation: tuple[Tensor, Tensor]
) -> Tensor:
    """A decoder layer's output, of shape (R, 1, C)."""
    hidden_R1C = hidden_R1C.contiguous()
    output_R1C = torch.empty_like(hidden_R1C)
    structs = weights, _memory(held), Step.of(now, held, rotation)
    compiled().layer(hidden_R1C.data_ptr(), *map(ctypes.byref, structs), output_R1C.data_ptr(), hidden_R1C.shape[2])
    return output_R1C


def product(x: Tensor, linear: Linear) -> Tensor:
    """The outputs for `x` of shape (..., inputs), of shape (..., outputs)."""
    rows = x.contiguous()
    output = x.new_empty(*x.shape[:-1], linear.outputs)
    inputs = x.shape[-1]
    compiled().product(rows.data_ptr(), ctypes.byref(linear), output.data_ptr(), rows.numel() // inputs, inputs)
    return output


def normalize(x: Tensor, norm: Norm) -> Tensor:
    """The RMSNorm of `x`."""
    rows = x.contiguous()
    output, size = rows.new_empty(rows.shape), x.shape[-1]
    compiled().normalize(rows.data_ptr(), ctypes.byref(norm), output.data_ptr(), rows.numel() // size, size)
    return output


def _memory(layer: step.LayerMemory) -> Memory:
    """Made once per layer."""
    if layer.cpu_struct is None:
        layer.cpu_struct = Memory.of(layer)
    return layer.cpu_struct
