"""The fields that a class or function accepts, read from its signature without calling it."""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, partial
from typing import Any, NamedTuple

from mmengine.registry import Registry

from mmdet_lors.engine.new_style import type_name
from mmdet_lors.errors import UserError, first_line

RENAMED = dict(
    classes="metainfo=dict(classes=(...))",
    img_prefix="data_prefix=dict(img=...)",
    seg_prefix="data_prefix=dict(seg=...)",
    img_scale="scale",
    samples_per_gpu="batch_size",
    workers_per_gpu="num_workers",
    flip_ratio="prob",
)
"""Field of an earlier version -> its current name."""

NOT_FIELDS = {"type", "_scope_", "_delete_"}


@dataclass(frozen=True)
class Fields:
    """The keyword arguments of a class or function."""

    names: frozenset[str]
    required: frozenset[str] = frozenset()
    anything: bool = False
    """Other fields may be accepted as well; the signature does not say which."""


def nearest(name: str, known: Iterable[str], cutoff: float = 0.7) -> str | None:
    """The known name that was probably meant, if any."""
    by_lower = {other.lower(): other for other in sorted(known)}
    longer = [other for other in by_lower if other.startswith(name.lower()) and len(name) > 3]
    close = longer if len(longer) == 1 else get_close_matches(name.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[close[0]] if close else None


def meant(name: str, known: Iterable[str], what: str = "it has") -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them if there are few."""
    known = sorted(known)
    if name in RENAMED:
        return f"; it is now {RENAMED[name]}"
    if near := nearest(name, known, cutoff=0.6):
        return f"; did you mean {near}?"
    return f"; {what} {', '.join(known)}" if known and len(known) <= 30 else ""


@cache
def fields_of(kind: Callable) -> Fields:
    """The fields that a class or function accepts by name."""
    if not inspect.isclass(kind):
        return _of_signature(kind)
    if kind.__init__ is object.__init__:
        return _of_signature(kind)
    return _of_init(list(kind.__mro__))


def _of_signature(kind: Callable, bound: int = 0) -> Fields:
    try:
        parameters = list(inspect.signature(kind).parameters.values())
    except (TypeError, ValueError):
        return Fields(frozenset(), anything=True)
    by_place = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][bound:]
    named = by_place + [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    return Fields(
        frozenset(p.name for p in named),
        frozenset(p.name for p in named if p.default is p.empty),
        any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


def _of_init(mro: list[type], given: int = 0) -> Fields:
    """The fields of the first ``__init__`` in these classes, and of those that it passes ``**kwargs`` on to.

    Args:
        mro: the classes, in Python's method resolution order.
        given: how many positional arguments it gets.
    """
    while "__init__" not in vars(mro[0]):
        mro = mro[1:]
    init = vars(mro[0])["__init__"]
    if init is object.__init__:
        return Fields(frozenset())
    own = _of_signature(init, bound=1 + given)
    handed_on = _handed_on(init) if own.anything and len(mro) > 1 else None
    if handed_on is None:
        return own
    in_order = [p for p in inspect.signature(init).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    surplus = max(0, given - len(in_order)) if handed_on.args else 0
    base = _of_init(mro[1:], handed_on.positional + surplus)
    left = base.names - handed_on.named
    return Fields(
        own.names | left | handed_on.taken_out, own.required | (base.required & left) - own.names, base.anything
    )


class _Call(NamedTuple):
    """How an ``__init__`` calls ``super().__init__(..., **kwargs)``."""

    positional: int
    args: bool
    """Whether ``*args`` is passed on as well."""
    named: set[str]
    taken_out: set[str]
    """Keys that it removes from ``kwargs``."""


def _handed_on(init: Callable) -> _Call | None:
    """How ``__init__`` passes ``kwargs`` on; None if it does more with them: its fields cannot be read from that."""
    init = inspect.unwrap(init)
    try:
        function = ast.parse(textwrap.dedent(inspect.getsource(init))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    if not isinstance(function, ast.FunctionDef) or function.args.kwarg is None:
        return None
    name = function.args.kwarg.arg
    uses = [node for node in ast.walk(function) if isinstance(node, ast.Name) and node.id == name]
    for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
        stars = [k.value for k in call.keywords if k.arg is None]
        if not (isinstance(call.func, ast.Attribute) and call.func.attr == "__init__"):
            continue
        owner = call.func.value
        if not (isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name) and owner.func.id == "super"):
            continue
        looked_up = list(_looked_up(function, name))
        if len(stars) == 1 and len(uses) == 1 + len(looked_up) and stars[0] in uses:
            positional = [arg for arg in call.args if not isinstance(arg, ast.Starred)]
            taken_out = {key for method, key in looked_up if method == "pop"}
            named = {k.arg for k in call.keywords if k.arg}
            return _Call(len(positional), len(positional) < len(call.args), named, taken_out)
    return None


def _looked_up(function: ast.FunctionDef, name: str) -> Iterator[tuple[str, str]]:
    """(method, key) of every ``kwargs.get("key")`` and similar call in a function."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            owner, key = node.func.value, node.args[0]
            known = node.func.attr in ("get", "pop", "setdefault") and isinstance(key, ast.Constant)
            if known and isinstance(owner, ast.Name) and owner.id == name:
                yield node.func.attr, key.value


def find(kind: Any, registry: Registry, where: str, field: str = "type") -> Callable:
    """The class that ``type``, or another field, names, looked up as mmengine does: in the current scope and above.

    Raises:
        UserError: nothing is registered under that name.
    """
    if callable(kind):
        return kind
    if not isinstance(kind, str):
        raise UserError(f"{where}.{field} must be a name or a class, got {kind!r}")
    with registry.switch_scope_and_registry(None) as scoped:
        found = scoped.get(kind)
        if found is None:
            names, above = set(), scoped
            while above is not None:
                names |= set(above.module_dict)
                above = above.parent
            raise UserError(
                f"{where}.{field}: {kind!r} is not in the {scoped.scope}::{scoped.name} registry"
                f"{meant(type_name(kind), names)}"
            )
    return found


def bind(
    kind: Callable,
    node: dict,
    where: str,
    supplied: Iterable[str] = (),
    named: Iterable[str] = (),
    closed: bool = False,
) -> None:
    """Check that a class or function accepts a config's fields.

    Args:
        kind: what is built from the config.
        node: its config.
        where: its place, for messages.
        supplied: fields that mmengine gives, whether the config has them or not.
        named: fields beside ``type`` that mmengine removes from the config first.
        closed: accept only fields that the signature names, even if it has ``**kwargs``.

    Raises:
        UserError: a field that does not exist, or one that is missing.
    """
    fields = fields_of(kind)
    name = type_name(kind.func if isinstance(kind, partial) else kind)
    for field in node:
        if field not in fields.names | NOT_FIELDS | set(named) and (closed or not fields.anything):
            close = meant(str(field), (fields.names - set(supplied)) | set(named))
            raise UserError(f"{where}.{field}: {name} has no such field{close}")
    if missing := sorted(fields.required - set(node) - set(supplied)):
        raise UserError(f"{where}: {name} needs {', '.join(missing)}")


def check_node(value: Any, where: str, registry: Registry, default: str | None = None, **taken: Any) -> Any:
    """Bind a config to the class it names; anything else, such as an object that is already built, is accepted.

    Args:
        taken: ``supplied`` and ``named`` of :func:`bind`.
    """
    if not isinstance(value, dict):
        return None
    if "type" not in value and default is None:
        raise UserError(f"{where} has no type, which names its class in the {registry.name} registry")
    with registry.switch_scope_and_registry(value.get("_scope_")):
        kind = find(value.get("type", default), registry, where)
    bind(kind, value, where, **taken)
    return kind


@contextmanager
def said_of(where: str) -> Iterator[None]:
    """Adds a place in the config to whatever a constructor refuses."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except Exception as error:
        raise UserError(f"{where}: {first_line(error)}") from error
