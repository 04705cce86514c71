"""Finds the scope, floating-point operations and bytes of a compiled program's instructions.

The source is the optimised HLO text. It has the same names of instructions as a profile. The bytes
are those that a program with a perfect cache moves: every operand once and every result once. Of an
operand that a fusion only slices, only the slices count. The operations are those of matrix
products, convolutions and fused attention, with 2 per multiply-add. Element-wise arithmetic is not
counted, because it is never the limit.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable

_BITS = {"pred": 8, "s4": 4, "u4": 4, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b(pred|token|opaque|bf16|[fsuc]\d+[a-z0-9]*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{\s*$")
# These only run other instructions, which a profile reports separately.
CONTAINERS = {"while", "call", "conditional", "async-start", "async-done"}
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "iota"}
_MOVES = {"copy", "transpose", "reshape", "broadcast", "concatenate", "slice", "dynamic-slice"}
_MOVES |= {"dynamic-update-slice", "pad", "reverse", "convert", "select", "compare", "add", "clamp"}
_COPIES = {"copy", "copy-start", "transpose", "concatenate", "pad", "reverse"}


@dataclasses.dataclass
class Instruction:
    """One instruction of a program."""

    name: str
    opcode: str
    shapes: list[tuple[str, tuple[int, ...]]]  # shape of the result, or shapes of a tuple's parts
    operands: list[str]
    text: str  # everything after the operands
    is_root: bool

    @property
    def bytes(self) -> float:
        """Bytes of the result, without the temporary memory of a library call."""
        parts = self.shapes
        if self.opcode == "custom-call" and len(parts) > 1:
            parts = [part for part in parts if part[0] not in ("s8", "u8")]
        return sum(_itembytes(kind) * math.prod(dims) for kind, dims in parts)

    @property
    def scope(self) -> str:
        """Path of JAX scopes, such as `jit(f)/blocks/gdn/dot_general`, or empty."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """Name of the function that a custom call calls, or empty."""
        found = re.search(r'custom_call_target="([^"]*)"', self.text)
        return found[1] if found else ""


def _itembytes(kind: str) -> float:
    digits = re.match(r"[a-z]+(\d+)", kind)
    return _BITS.get(kind, int(digits[1]) if digits else 32) / 8


def _closing(text: str, start: int) -> int:
    """Returns the index of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if not depth:
            return i
    raise ValueError(f"unbalanced: {text[:80]!r}")


def _instruction(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(line)
    if not found:
        return None
    name, rest = found.groups()
    head = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:head], rest[head:].strip()
    opening = rest.find("(")
    if opening < 0:
        return None
    end = _closing(rest, opening)
    operands = re.findall(r"%([\w.-]+)", rest[opening:end])
    shapes = [
        (kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in _SHAPE.findall(shape)
    ]
    is_root = line.lstrip().startswith("ROOT ")
    return Instruction(name, rest[:opening], shapes, operands, rest[end + 1 :], is_root)


class Program:
    """The instructions of an optimised module by name.

    Args:
      text: the result of `jax.stages.Compiled.as_text()`.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.instructions: dict[str, Instruction] = {}
        self._home: dict[str, str] = {}
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if opened := _COMPUTATION.match(line):
                current = self.computations.setdefault(opened[1], {})
                name = opened[1]
            elif (instruction := _instruction(line)) is not None:
                current[instruction.name] = instruction
                # Names are unique in a module.
                self.instructions[instruction.name] = instruction
                self._home[instruction.name] = name

    def home(self, name: str) -> str:
        """Returns the name of the computation that contains an instruction."""
        return self._home[name]

    def called(self, instruction: Instruction) -> Iterable[Instruction]:
        """Returns the instructions inside a fusion, in order; else the instruction itself."""
        found = re.search(r"\bcalls=%?([\w.-]+)", instruction.text)
        if instruction.opcode != "fusion" or not found:
            return [instruction]
        return list(self.computations.get(found[1], {}).values())

    def scope(self, instruction: Instruction) -> str:
        """Returns the scope of an instruction, or, if it has none, of the product inside it."""
        if instruction.scope:
            return instruction.scope
        return next((part.scope for part in self.called(instruction) if self._flops(part)), "")

    def flops(self, instruction: Instruction) -> float:
        """Returns the operations of the matrix products, convolutions and attention inside it."""
        return sum(self._flops(part) for part in self.called(instruction))

    def _flops(self, part: Instruction) -> float:
        home = self.computations[self._home[part.name]]
        inputs = [home[name].shapes[0][1] for name in part.operands if name in home]
        if part.opcode == "dot" or (part.opcode == "custom-call" and "gemm" in part.target):
            return 2.0 * math.prod(part.shapes[0][1]) * self._contracted(part, inputs[0])
        if part.opcode == "custom-call" and "matmul" in part.target:
            return 2.0 * math.prod(part.shapes[0][1]) * self._contracted(part, inputs[0])
        if part.opcode == "convolution" or "conv" in part.target:
            # Every output element reads all kernel elements of its output channel.
            return 2.0 * math.prod(part.shapes[0][1]) * _taps(part, inputs[1])
        if "fmha" in part.target:
            return _attention_flops(part, inputs)
        return 0.0

    @staticmethod
    def _contracted(part: Instruction, lhs: tuple[int, ...]) -> int:
        plain = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", part.text)
        config = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', part.text)
        found = plain or config
        axes = [int(n) for n in re.findall(r"\d+", found[1])] if found else []
        return math.prod(lhs[axis] for axis in axes)

    def bytes(self, instruction: Instruction) -> float:
        """Returns the bytes that are read and written, as the module's docstring defines them."""
        if instruction.opcode in CONTAINERS | _FREE:
            return 0.0
        home = self.computations[self._home[instruction.name]]
        parts = list(self.called(instruction))
        if instruction.opcode != "fusion":
            sizes = [home[name].bytes for name in instruction.operands if name in home]
            if instruction.opcode in ("dynamic-slice", "slice", "gather"):
                return 2 * instruction.bytes
            if instruction.opcode == "dynamic-update-slice":
                return 2 * sizes[1] if len(sizes) > 1 else 0.0
            return instruction.bytes + sum(sizes)
        inside = {part.name: part for part in parts}
        total = instruction.bytes
        for root in (part for part in parts if part.is_root):
            written = [inside[n] for n in root.operands] if root.opcode == "tuple" else [root]
            for part in written:
                if part.opcode == "dynamic-update-slice":  # works in place and writes only a slice
                    total += inside[part.operands[1]].bytes - part.bytes
        for part in parts:
            if part.opcode == "parameter":
                uses = [p for p in parts if part.name in p.operands]
                total += _read(part, uses[0]) if len(uses) == 1 else part.bytes
        return max(total, 0.0)

    def is_copy(self, instruction: Instruction) -> bool:
        """Whether it only moves data, and computes nothing except addresses."""
        if instruction.opcode != "fusion":
            return instruction.opcode in _MOVES
        kinds = {part.opcode for part in self.called(instruction)} - _FREE
        return bool(kinds & (_COPIES | _MOVES)) and kinds <= _MOVES - {"add", "convert", "select"}


def _read(part: Instruction, use: Instruction) -> float:
    if use.operands[0] != part.name:  # it is an index
        return part.bytes
    if use.opcode in ("dynamic-slice", "slice", "gather"):
        return use.bytes
    if use.opcode == "dynamic-update-slice":
        return 0.0
    return part.bytes


def _taps(part: Instruction, kernel: tuple[int, ...]) -> float:
    labels = re.search(r"dim_labels=\w+_(\w+)->", part.text)
    outputs = kernel[labels[1].index("o")] if labels else kernel[-1]
    return math.prod(kernel) / max(outputs, 1)


def _attention_flops(part: Instruction, inputs: list[tuple[int, ...]]) -> float:
    """Counts cuDNN's attention of q, k, v (B, N, T, D) or (B, T, N, D); the result is as q."""
    if len(inputs) < 3 or len(inputs[0]) != 4:
        return 0.0
    q, k = inputs[:2]
    # If there are as many keys as queries, both axes match; there are fewer heads than tokens.
    heads = min((n for n in q[1:3] if n in k[1:3]), default=1)
    shared = math.prod(q[1:3]) * math.prod(k[1:3]) / heads**2  # queries x keys
    products = 5 if "Backward" in part.target else 2
    return 2.0 * products * q[0] * heads * shared * q[3]
