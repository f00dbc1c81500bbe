"""`dataclass` as in the standard library, with methods that are written when they are first needed.

A command imports some hundred small classes and makes objects of a few of them. The standard
decorator writes and compiles up to six methods for each class, which took a third of the start of a
command. Here `__init__` is compiled at its first call, and the other methods are general functions.
All else is the standard library's: `fields`, `replace`, `asdict` and subclasses work as ever.
`InitVar`, ordering and slots are not offered, since nothing here uses them.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable
from dataclasses import MISSING, FrozenInstanceError
from operator import attrgetter
from reprlib import recursive_repr
from typing import TYPE_CHECKING, Any, NoReturn, cast

if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass  # noqa: PLC0414 - so that it is exported
else:

    def dataclass(cls=None, /, *, frozen=False, kw_only=False, repr=True):  # noqa: A002, ANN001, ANN201
        """Make a class a dataclass, as `dataclasses.dataclass` does with the same options."""

        def made(cls: type) -> type:
            return _record(cls, frozen=frozen, kw_only=kw_only, shown=repr)

        return made if cls is None else made(cls)


def _record(cls: type, *, frozen: bool, kw_only: bool, shown: bool) -> type:
    if cls.__doc__ is None:
        cls.__doc__ = cls.__name__  # else the original computes a signature for it
    own = set(vars(cls))
    bases = [getattr(base, "__dataclass_params__", None) for base in cls.__mro__[1:]]
    of_frozen = any(base.frozen for base in bases if base is not None)
    dataclasses.dataclass(init=False, repr=False, eq=False, frozen=of_frozen, kw_only=kw_only)(cls)
    parameters: Any = vars(cls)["__dataclass_params__"]
    parameters.frozen = frozen  # which the original asks the bases of later classes
    written: dict[str, object] = {
        "__init__": _compiled_when_called(cls),
        "__eq__": _equal,
        "__hash__": _hash if frozen else None,
    }
    if "__init__" not in own:
        written["__signature__"] = _Signature(cls)
    if shown:
        written["__repr__"] = _shown
    if frozen and not of_frozen:
        written |= {"__setattr__": _refuse_to_set, "__delattr__": _refuse_to_delete}
    for name, value in written.items():
        if name not in own:
            setattr(cls, name, value)
    return cls


def _compiled_when_called(cls: type) -> Callable[..., None]:
    def __init__(self: object, *values: object, **named: object) -> None:  # noqa: N807
        _assigning_init(cls)(self, *values, **named)

    return __init__


def _assigning_init(cls: Any) -> Callable[..., None]:
    """Return an `__init__` that assigns the fields; the class has it from then on."""
    names: dict[str, object] = {"_set": object.__setattr__, "_MISSING": MISSING}
    positional, named, body = ["self"], list[str](), list[str]()
    for one in dataclasses.fields(cls):
        name, value = one.name, one.name
        default = "" if one.default is MISSING else f"=_default_{name}"
        names[f"_default_{name}"] = one.default
        if one.default_factory is not MISSING:
            names[f"_make_{name}"] = one.default_factory
            default = "=_MISSING"
            value = f"_make_{name}() if {name} is _MISSING else {name}"
        if one.init:
            (named if one.kw_only else positional).append(name + default)
        elif one.default_factory is not MISSING:
            value = f"_make_{name}()"
        else:
            continue  # its default is an attribute of the class
        body.append(f" _set(self, {name!r}, {value})")
    if hasattr(cls, "__post_init__"):
        body.append(" self.__post_init__()")
    arguments = ", ".join([*positional, *(["*", *named] if named else [])])
    lines = "\n".join(body or [" pass"])
    exec(f"def __init__({arguments}):\n{lines}\n", names)  # noqa: S102 - names of fields only
    made: Any = names["__init__"]
    made.__qualname__ = f"{cls.__qualname__}.__init__"
    made.__annotations__ = {one.name: one.type for one in dataclasses.fields(cls) if one.init}
    cls.__init__ = made
    return made  # type: ignore[no-any-return]


class _Signature:
    """What `inspect.signature` finds of a class whose `__init__` is not compiled yet."""

    def __init__(self, cls: type) -> None:
        self._of = cls

    def __get__(self, instance: object, owner: type) -> inspect.Signature:
        if instance is not None or owner is not self._of:
            raise AttributeError("__signature__")
        made = inspect.signature(_assigning_init(owner))
        return made.replace(parameters=list(made.parameters.values())[1:])


@functools.cache
def _key(cls: Hashable) -> Callable[[object], object]:
    """Return what two objects of the class are compared by."""
    fields = dataclasses.fields(cast("Any", cls))
    names = [one.name for one in fields if one.compare]
    if len(names) > 1:
        return attrgetter(*names)
    return lambda record: tuple(getattr(record, name) for name in names)


def _equal(self: object, other: object) -> object:
    if other.__class__ is not self.__class__:
        return NotImplemented
    key = _key(cast("Hashable", type(self)))
    return key(self) == key(other)


def _hash(self: object) -> int:
    return hash(_key(cast("Hashable", type(self)))(self))


@recursive_repr()
def _shown(self: Any) -> str:
    shown = [
        f"{one.name}={getattr(self, one.name)!r}" for one in dataclasses.fields(self) if one.repr
    ]
    return f"{type(self).__qualname__}({', '.join(shown)})"


def _refuse_to_set(_self: object, name: str, _value: object) -> NoReturn:
    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def _refuse_to_delete(_self: object, name: str) -> NoReturn:
    raise FrozenInstanceError(f"cannot delete field {name!r}")
