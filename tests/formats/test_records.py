"""Our `dataclass` does what the standard library's does."""

import copy
import dataclasses
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from loratools_formats.disk.records import dataclass

DECORATORS = [dataclass, dataclasses.dataclass]


def _classes(decorate: Callable[..., Any]) -> tuple[Any, Any, Any, Any]:
    @decorate(frozen=True)
    class Point:
        """A point."""

        x: int
        y: int = 2
        tags: list[str] = dataclasses.field(default_factory=list)
        seen: int = dataclasses.field(default=0, compare=False, repr=False)

    @decorate(frozen=True, kw_only=True)
    class Named(Point):
        """A point with a name."""

        name: str
        note: str = dataclasses.field(init=False)

        def __post_init__(self):
            object.__setattr__(self, "note", self.name.upper())

    @decorate
    class Open:
        """A class that may change."""

        values: tuple[int, ...] = ()

    @decorate(frozen=True, repr=False)
    class Shown:
        """A class with a text of its own."""

        only: tuple[int, ...] = (1,)

        def __repr__(self):
            return "shown"

    return Point, Named, Open, Shown


OURS, THEIRS = (_classes(decorate) for decorate in DECORATORS)
OF_MODULE = dataclass(frozen=True)(type("OF_MODULE", (), {"__annotations__": {"x": int}}))
OF_MODULE.__module__, OF_MODULE.__qualname__ = __name__, "OF_MODULE"


def _parameters(cls):
    return [
        (each.name, each.kind, each.annotation, each.default is inspect.Parameter.empty)
        for each in inspect.signature(cls).parameters.values()
    ]


@pytest.mark.parametrize("number", range(4))
def test_what_can_be_asked_of_a_class(number):
    ours, theirs = OURS[number], THEIRS[number]
    assert _parameters(ours) == _parameters(theirs)
    assert ours.__match_args__ == theirs.__match_args__
    names = [
        (each.name, each.type, each.default, each.init, each.kw_only, each.compare)
        for each in dataclasses.fields(ours)
    ]
    assert names == [
        (each.name, each.type, each.default, each.init, each.kw_only, each.compare)
        for each in dataclasses.fields(theirs)
    ]
    assert (ours.__hash__ is None) == (theirs.__hash__ is None)


@pytest.mark.parametrize("number", range(4))
def test_the_signature_is_that_after_the_first_object_too(number):
    cls = _classes(dataclass)[number]
    before = str(inspect.signature(cls))
    cls(**({"x": 1} if number < 2 else {}), **({"name": "n"} if number == 1 else {}))
    assert str(inspect.signature(cls)) == before


def test_objects_behave_alike():
    told = []
    for point, named, mutable, shown in (OURS, THEIRS):
        one, same, other = point(1, seen=5), point(1, 2, []), point(1, y=3)
        full = named(1, name="a")
        told.append(
            [
                repr(one).rpartition(".")[2],
                repr(full).rpartition(".")[2],
                repr(mutable()).rpartition(".")[2],
                repr(shown()),
                one == same,
                one == other,
                one == (1, 2, []),
                full == named(1, name="a"),
                full == one,
                mutable((1,)) == mutable((1,)),
                hash(shown()) == hash(shown()),
                dataclasses.asdict(full),
                dataclasses.replace(full, y=9).y,
                copy.deepcopy(full) == full,
                one.tags is not same.tags,
            ]
        )
    assert told[0] == told[1]
    assert told[0][4:10] == [True, False, False, True, False, True]


@pytest.mark.parametrize("classes", [OURS, THEIRS])
def test_frozen_objects_refuse_to_change(classes):
    point, named, mutable, _ = classes
    for one in (point(1), named(1, name="a")):
        with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'x'"):
            one.x = 2
        with pytest.raises(dataclasses.FrozenInstanceError, match="cannot delete field 'x'"):
            del one.x
    changed = mutable()
    changed.values = (3,)
    assert changed == mutable((3,))
    with pytest.raises(TypeError, match="unhashable"):
        hash(changed)
    with pytest.raises(TypeError, match="unhashable"):
        hash(point(1))


@pytest.mark.parametrize("classes", [OURS, THEIRS])
def test_wrong_arguments_are_refused(classes):
    point, named, _, _ = classes
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        point()
    with pytest.raises(TypeError, match="unexpected keyword argument 'z'"):
        point(1, z=2)
    with pytest.raises(TypeError, match="required keyword-only argument: 'name'"):
        named(1)


def test_the_standard_decorator_takes_subclasses():
    @dataclasses.dataclass(frozen=True)
    class More(OURS[0]):
        z: int = 7

    assert More(1, z=8) == More(1, z=8) != More(1)
    with pytest.raises(TypeError, match="cannot inherit non-frozen"):
        dataclasses.dataclass(type("Less", (OURS[0],), {}))


def test_undecorated_subclasses_have_their_own_init():
    class Own(OURS[2]):
        def __init__(self, count):
            super().__init__(tuple(range(count)))

    assert Own(2).values == (0, 1)
    assert list(inspect.signature(Own).parameters) == ["count"]


def test_a_class_of_its_own_init_keeps_it():
    @dataclass
    class Own:
        """A class with its own way to be made."""

        x: int

        def __init__(self):
            self.x = 4

    assert Own().x == 4
    assert not inspect.signature(Own).parameters


def test_pickles():
    assert pickle.loads(pickle.dumps(OF_MODULE(3))) == OF_MODULE(3)
