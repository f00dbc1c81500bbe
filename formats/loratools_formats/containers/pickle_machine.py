"""A pickle machine that can make data and nothing else.

It knows the opcodes that state dicts consist of. A global is a name, never looked up; what a call
of one makes is decided by whoever runs the machine, which is given name and arguments as data. So
no file can run code, and none can take more steps, or make more objects, than its bytes.

Source: CPython's `pickletools`, which describes every opcode; torch saves with protocol 2.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from loratools_formats.disk.errors import AdapterError

MOST_STEPS = 16_000_000
_LONGEST_STRING = 1 << 16
_LONGEST_NAME = 256
_LONGEST_INTEGER = 16
_PROTOCOLS = range(2, 6)
_Operation = Callable[["Machine"], None]
_OPERATIONS: dict[int, _Operation] = {}


@dataclass(frozen=True)
class Global:
    """The name of a class or function, as module and name with a dot between."""

    name: str


@dataclass
class Machine:
    """One run over the bytes of a pickle.

    Attributes:
        data: bytes that begin with the pickle, or have it at `at`.
        persistent: makes what a persistent identifier stands for.
        call: makes what a call of a global with a tuple of arguments gives.
        at: the next byte; after the run, the first behind the pickle.
    """

    data: bytes
    persistent: Callable[[object], object]
    call: Callable[[str, tuple[object, ...]], object]
    at: int = 0
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def run(self) -> object:
        """Return the object that the pickle describes.

        Raises:
            AdapterError: malformed, too long, or not only data.
        """
        try:
            for _ in range(MOST_STEPS):
                code = self.take(1)[0]
                if code == _STOP:
                    return self.pop()
                operation = _OPERATIONS.get(code)
                if operation is None:
                    raise malformed(f"opcode 0x{code:02x} at byte {self.at - 1}")
                operation(self)
        except (IndexError, KeyError, struct.error) as error:
            raise malformed(f"an operation without operands at byte {self.at}") from error
        except UnicodeDecodeError as error:
            raise malformed(f"a string that is not UTF-8 at byte {self.at}") from error
        raise AdapterError("pickle takes too many steps", expected=f"at most {MOST_STEPS}")

    def take(self, nbytes: int) -> bytes:
        """Return the next bytes."""
        taken = self.data[self.at : self.at + nbytes]
        if len(taken) != nbytes:
            raise malformed("an end in the middle: it is truncated or too long")
        self.at += nbytes
        return taken

    def number(self, form: str) -> int:
        """Return the next number of a form of `struct`."""
        value: int = struct.unpack(form, self.take(struct.calcsize(form)))[0]
        return value

    def line(self) -> str:
        """Return the next line, which is a name."""
        end = self.data.find(b"\n", self.at, self.at + _LONGEST_NAME)
        if end < 0:
            raise malformed("a name that does not end")
        text = self.data[self.at : end].decode()
        self.at = end + 1
        return text

    def push(self, value: object) -> None:
        """Put a value on the stack."""
        self.stack.append(value)

    def pop(self) -> Any:
        """Take the last value off the stack; never one below the last mark."""
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise IndexError
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        """Take everything above the last mark off the stack."""
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def pop_of(self, kind: type) -> Any:
        """Take the last value off the stack, which must have a type."""
        value = self.pop()
        if type(value) is not kind:
            raise malformed(f"a {type(value).__name__} before byte {self.at}, not {kind.__name__}")
        return value

    def last(self, kind: type) -> Any:
        """Return the value on top of the stack, which must have a type, and leave it there."""
        value = self.pop_of(kind)
        self.stack.append(value)
        return value


def malformed(what: str) -> AdapterError:
    """Return the error that a pickle is not one that this machine runs."""
    return AdapterError(
        "pickled weights are malformed, or not a plain map of names to tensors",
        got=what,
        hint="Load them with torch where you trust them, and save the tensors as safetensors",
    )


_STOP = ord(".")


def _operation(code: bytes) -> Callable[[_Operation], _Operation]:
    def register(operation: _Operation) -> _Operation:
        _OPERATIONS[code[0]] = operation
        return operation

    return register


def _pushes(code: bytes, make: Callable[[Machine], object]) -> None:
    _OPERATIONS[code[0]] = lambda machine: machine.push(make(machine))


def _text(machine: Machine, form: str) -> str:
    return _bytes(machine, form).decode()


def _bytes(machine: Machine, form: str) -> bytes:
    nbytes = machine.number(form)
    if nbytes > _LONGEST_STRING:
        raise malformed(f"a string of {nbytes} bytes")
    return machine.take(nbytes)


def _integer(machine: Machine) -> int:
    nbytes = machine.number("<B")
    if nbytes > _LONGEST_INTEGER:
        raise malformed(f"an integer of {nbytes} bytes")
    return int.from_bytes(machine.take(nbytes), "little", signed=True)


def _float(machine: Machine) -> float:
    value: float = struct.unpack(">d", machine.take(8))[0]
    return value


_pushes(b"N", lambda _: None)
_pushes(b"\x88", lambda _: True)
_pushes(b"\x89", lambda _: False)
_pushes(b"J", lambda machine: machine.number("<i"))
_pushes(b"K", lambda machine: machine.number("<B"))
_pushes(b"M", lambda machine: machine.number("<H"))
_pushes(b"\x8a", _integer)
_pushes(b"G", _float)
_pushes(b"X", lambda machine: _text(machine, "<I"))
_pushes(b"\x8c", lambda machine: _text(machine, "<B"))
_pushes(b"\x8d", lambda machine: _text(machine, "<Q"))
_pushes(b"U", lambda machine: _text(machine, "<B"))
_pushes(b"T", lambda machine: _text(machine, "<I"))
_pushes(b"C", lambda machine: _bytes(machine, "<B"))
_pushes(b"B", lambda machine: _bytes(machine, "<I"))
_pushes(b")", lambda _: ())
_pushes(b"]", lambda _: [])
_pushes(b"}", lambda _: {})
_pushes(b"t", lambda machine: tuple(machine.pop_mark()))
_pushes(b"\x85", lambda machine: (machine.pop(),))
_pushes(b"\x86", lambda machine: (machine.pop(), machine.pop())[::-1])
_pushes(b"\x87", lambda machine: (machine.pop(), machine.pop(), machine.pop())[::-1])
_pushes(b"l", lambda machine: machine.pop_mark())
_pushes(b"h", lambda machine: machine.memo[machine.number("<B")])
_pushes(b"j", lambda machine: machine.memo[machine.number("<I")])
_pushes(b"c", lambda machine: Global(f"{machine.line()}.{machine.line()}"))
_pushes(b"Q", lambda machine: machine.persistent(machine.pop()))


@_operation(b"\x80")
def _protocol(machine: Machine) -> None:
    if (version := machine.number("<B")) not in _PROTOCOLS:
        raise malformed(f"protocol {version}")


@_operation(b"\x95")
def _frame(machine: Machine) -> None:
    machine.take(8)


@_operation(b"(")
def _mark(machine: Machine) -> None:
    machine.marks.append(len(machine.stack))


@_operation(b"0")
def _pop(machine: Machine) -> None:
    machine.pop()


def _remember(machine: Machine, place: int) -> None:
    machine.memo[place] = machine.stack[-1]


_OPERATIONS[ord("q")] = lambda machine: _remember(machine, machine.number("<B"))
_OPERATIONS[ord("r")] = lambda machine: _remember(machine, machine.number("<I"))
_OPERATIONS[0x94] = lambda machine: _remember(machine, len(machine.memo))


@_operation(b"\x93")
def _global_of_strings(machine: Machine) -> None:
    name, module = machine.pop_of(str), machine.pop_of(str)
    machine.push(Global(f"{module[:_LONGEST_NAME]}.{name[:_LONGEST_NAME]}"))


@_operation(b"a")
def _append(machine: Machine) -> None:
    value = machine.pop()
    machine.last(list).append(value)


@_operation(b"e")
def _extend(machine: Machine) -> None:
    values = machine.pop_mark()
    machine.last(list).extend(values)


@_operation(b"s")
def _set(machine: Machine) -> None:
    value, key = machine.pop(), machine.pop()
    _set_all(machine.last(dict), [key, value])


@_operation(b"u")
def _set_many(machine: Machine) -> None:
    values = machine.pop_mark()
    _set_all(machine.last(dict), values)


@_operation(b"d")
def _dict(machine: Machine) -> None:
    made: dict[object, object] = {}
    _set_all(made, machine.pop_mark())
    machine.push(made)


def _set_all(target: dict[object, object], values: list[object]) -> None:
    if len(values) % 2:
        raise malformed("a key without a value")
    for key, value in zip(values[::2], values[1::2], strict=True):
        if type(key) not in (str, int):
            raise malformed(f"a key that is a {type(key).__name__}")
        if key in target:
            raise malformed(f"two entries of one name: {str(key)[:_LONGEST_NAME]}")
        target[key] = value


@_operation(b"R")
def _reduce(machine: Machine) -> None:
    arguments, function = machine.pop_of(tuple), machine.pop_of(Global)
    machine.push(machine.call(function.name, arguments))


@_operation(b"\x81")
def _object(machine: Machine) -> None:
    """No object but data is made: whoever saved a whole model sees its class in the error."""
    machine.pop()
    raise malformed(f"an object of {machine.pop_of(Global).name}")


@_operation(b"b")
def _build(machine: Machine) -> None:
    """Attributes of a state dict, such as `_metadata`, say nothing of its tensors."""
    machine.pop()
    machine.last(dict)
