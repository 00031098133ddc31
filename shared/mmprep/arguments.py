"""What a request may choose about processing, ``mm_processor_kwargs``: which arguments there are, and their one form. Pure.

A family says on its card which arguments it takes for each modality, with types, bounds and defaults. Frontends judge a
request by that and bring what it chose into one form, which is part of the item's key:

- an argument is named by its path: ``size.shortest_edge`` is a member of the mapping ``size``;
- a former name stands for the same argument, and wins over it, as in transformers (``min_pixels``);
- what equals the default is left out, and so is null: who chooses what would be done anyway shares the item of who
  chooses nothing.

Arguments are flat, as engines pass them on: each goes to every modality that knows it. Lanes read what frontends chose
with the same bounds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec

from mmprep.errors import InvalidRequest

Value: TypeAlias = bool | int | float
#: The request's field, in ``param``.
FIELD: Final = "mm_processor_kwargs"
#: Arguments that a request may name, and characters of a name that an error repeats.
_MOST, _SHOWN = 64, 64
_Name = Annotated[str, msgspec.Meta(max_length=64)]
_Chosen = Annotated[dict[_Name, Value], msgspec.Meta(max_length=_MOST)]


class Argument(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One argument of a family's processor for one modality.

    Attributes
    ----------
    name: its path, ``do_resize`` or ``size.height``.
    kind: ``whole`` number, ``number``, or ``flag`` (true or false).
    default: what is done where nothing is chosen; ``None``: something that no value of it means.
    least, most: bounds of a number, both allowed.
    former: other names of it.
    beside: arguments of which one must be chosen for this one to mean anything.
    """

    name: _Name
    kind: Literal["whole", "number", "flag"]
    default: Value | None = None
    least: int | float = 0
    most: int | float = 0
    former: tuple[_Name, ...] = ()
    beside: tuple[_Name, ...] = ()

    @property
    def group(self) -> str:
        """The mapping that it is a member of, empty where none."""
        return self.name.rpartition(".")[0]

    def read(self, value: Any, called: str | None = None) -> Value:
        """Return ``value`` as it is chosen.

        Parameters
        ----------
        called: the path by which the request names it.

        Raises
        ------
        InvalidRequest
            Of another type, or out of bounds.
        """
        called = called or self.name
        if self.kind == "flag":
            if isinstance(value, bool):
                return value
            raise refused(called, "must be true or false")
        known = int if self.kind == "whole" else int | float
        noun = "a whole number" if self.kind == "whole" else "a number"
        # What is no number compares with none.
        if isinstance(value, known) and not isinstance(value, bool) and self.least <= value <= self.most:
            return value if self.kind == "whole" else float(value)
        raise refused(called, f"must be {noun} from {self.least} to {self.most}")


#: By modality.
Arguments: TypeAlias = Mapping[str, Sequence[Argument]]


def refused(path: str, why: str) -> InvalidRequest:
    """Return the error for the argument at ``path``: ``why`` goes on after its name."""
    return InvalidRequest(f"'{path}' {why}.", param=f"{FIELD}.{path}")


def choose(arguments: Arguments, kwargs: Mapping[str, Any], present: Collection[str]) -> dict[str, bytes]:
    """Return what a request chose, packed, by modality; those of which nothing is chosen are not in it.

    Parameters
    ----------
    arguments:
        Of the model.
    kwargs:
        As the request holds them.
    present:
        Modalities of its media. Values must be right for each of them that knows the argument; one that no present
        modality knows must be right for some other.

    Raises
    ------
    InvalidRequest
        An unknown name, a wrong type, a value out of bounds, or a mapping that is not whole; ``param`` names it.
    """
    if not kwargs:
        return {}
    if len(kwargs) > _MOST:
        raise InvalidRequest(f"'{FIELD}' has {len(kwargs)} members; at most {_MOST} are allowed.", param=FIELD)
    given = {}
    for path, value in _paths(arguments, kwargs):
        takers = _takers(arguments, path)
        if value is not None:
            _judge(takers, path, value, present)
            given[path] = value
    packed = {}
    for modality in present:
        chosen = _chosen(arguments.get(modality, ()), given, kwargs)
        if chosen:
            packed[modality] = msgspec.json.encode(chosen, order="deterministic")
    return packed


def read_chosen(arguments: Sequence[Argument], packed: bytes) -> dict[str, Value]:
    """Return what was chosen for one medium, by the arguments' names.

    Parameters
    ----------
    arguments:
        Of the medium's modality.
    packed:
        From :func:`choose`; empty where nothing was chosen.

    Raises
    ------
    InvalidRequest
        It is nothing that :func:`choose` returns for these arguments.
    """
    if not packed:
        return {}
    known = {argument.name: argument for argument in arguments}
    try:
        plain = msgspec.json.decode(packed, type=_Chosen)
        return {name: known[name].read(value) for name, value in plain.items()}
    except (msgspec.MsgspecError, KeyError, UnicodeDecodeError):
        raise InvalidRequest("what was chosen for the medium is nothing that this model takes", param=FIELD) from None


def _paths(arguments: Arguments, kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the request's arguments by their paths."""
    groups = {argument.group for of_one in arguments.values() for argument in of_one}
    for name, value in kwargs.items():
        if "." in name:  # a path is no name
            raise _unknown(arguments, name)
        if name not in groups or not name:
            yield name, value
        elif isinstance(value, dict):
            for member, inner in value.items():
                yield f"{name}.{member}", inner
        elif value is not None:
            raise refused(name, f"must be an object with {_members(arguments, name)}")


def _takers(arguments: Arguments, path: str) -> dict[str, Argument]:
    """Return the argument at ``path`` of each modality that knows it; raises InvalidRequest where none does."""
    takers = {
        modality: argument for modality, of_one in arguments.items() for argument in of_one if path in _names(argument)
    }
    if not takers:
        raise _unknown(arguments, path)
    return takers


def _judge(takers: Mapping[str, Argument], path: str, value: Any, present: Collection[str]) -> None:
    """Refuse a value that is wrong for one of the modalities that it is for."""
    judges = [argument for modality, argument in takers.items() if modality in present]
    if judges:
        for argument in judges:
            argument.read(value, path)
        return
    errors = []
    for argument in takers.values():
        try:
            argument.read(value, path)
        except InvalidRequest as error:
            errors.append(error)
    if len(errors) == len(takers):
        raise errors[0]


def _unknown(arguments: Arguments, path: str) -> InvalidRequest:
    known = sorted({name for of_one in arguments.values() for argument in of_one for name in _names(argument)})
    there = f"it takes {', '.join(known)}" if known else "it takes none"
    return refused(path[:_SHOWN], f"is no argument that this model's processor takes here; {there}")


def _chosen(arguments: Sequence[Argument], given: Mapping[str, Any], kwargs: Mapping[str, Any]) -> dict[str, Value]:
    """Return what one modality does with what was given, without what it would do anyway."""
    found: dict[str, Value] = {}
    for argument in arguments:
        for name in (*argument.former, argument.name):
            if name in given:
                found[argument.name] = argument.read(given[name], name)
                break
    for argument in arguments:
        if kwargs.get(argument.group) is not None and argument.name not in found:
            # The processor would take the mapping in place of its own, and miss this.
            raise refused(argument.group, f"must hold {_members({'': arguments}, argument.group)}")
    known = {argument.name: argument for argument in arguments}
    other = {name: value for name, value in found.items() if value != known[name].default}
    return {name: value for name, value in other.items() if _means(known[name], other)}


def _means(argument: Argument, chosen: Mapping[str, Value]) -> bool:
    return not argument.beside or any(name in chosen for name in argument.beside)


def _names(argument: Argument) -> tuple[str, ...]:
    return (argument.name, *argument.former)


def _members(arguments: Arguments, group: str) -> str:
    names = [argument.name for of_one in arguments.values() for argument in of_one if argument.group == group]
    return " and ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
