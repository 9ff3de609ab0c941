"""Docstrings for the site: reST roles become links, and signatures lose what only the checks need (a griffe extension).

``:class:`UsageError``` is found in the scope in which it stands, or by its name, which is unique over the package; one
that is nowhere becomes a link that goes nowhere, and fails the strict build.
"""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from griffe import (
    Alias,
    Attribute,
    Class,
    Docstring,
    Expr,
    ExprBinOp,
    ExprName,
    ExprSubscript,
    ExprTuple,
    Extension,
    Function,
    Module,
    NameResolutionError,
    Object,
    ParameterKind,
    Parameters,
)

_ROLE = re.compile(r":(?:class|func|meth|attr|data|mod|exc):`~?([\w.]+)(?:\(\))?`")


class Docstrings(Extension):
    """Rewrite what docstrings and annotations say, once the whole package is loaded."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Walk through the package, and rewrite each object."""
        if pkg.path != "gobelin":
            return
        objects = list(_walk(pkg))
        by_name: dict[str, str] = {}
        for found in objects:
            by_name.setdefault(found.name, found.path)
        for found in objects:
            if isinstance(found, Module):
                _name_exports(found)
            if isinstance(found, Attribute):
                found.annotation = _plain(found.annotation)
            if isinstance(found, Function):
                for parameter in found.parameters:
                    parameter.annotation = _plain(parameter.annotation)
                found.returns = _plain(found.returns)
                _spell_settings(found)
            if found.docstring is not None:
                found.docstring.value = _ROLE.sub(partial(_link, found, pkg, by_name), found.docstring.value)


def _name_exports(module: Module) -> None:
    """Show each name once, where it is defined; a constant that a package exports needs no docstring for it."""
    for name in (module.exports or ()) if module.is_init_module else ():
        found = module[str(name)]
        found = found.final_target if isinstance(found, Alias) else found
        if found.docstring is None:
            found.docstring = Docstring(f"Part of :mod:`{module.path}`.", parent=found)
    module.exports = None


def _walk(parent: Object) -> Iterator[Object]:
    yield parent
    for member in parent.members.values():
        if not isinstance(member, Alias):
            yield from _walk(member)


def _link(scope: Object, pkg: Module, by_name: dict[str, str], role: re.Match[str]) -> str:
    name = role[1]
    if any(part.startswith("_") for part in name.split(".")):
        return f"`{name}`"
    return f"[`{name}`][{_target(scope, pkg, by_name, name)}]"


def _target(scope: Object, pkg: Module, by_name: dict[str, str], name: str) -> str:
    """Find the one place where what is named is documented."""
    first, _, rest = name.partition(".")
    if first == pkg.name:
        path = name
    else:
        try:
            path = scope.resolve(first)
        except NameResolutionError:
            path = by_name.get(first, first)
        path = f"{path}.{rest}" if rest else path
    inside = path.removeprefix(f"{pkg.name}.")
    try:
        found = pkg if inside == path else pkg[inside]
    except KeyError:
        return path
    return found.final_target.path if isinstance(found, Alias) else found.path


def _plain(annotation: Any) -> Any:
    """Leave out of ``Annotated[int, Ge(1)]`` what the checks read."""
    if isinstance(annotation, ExprBinOp):
        return ExprBinOp(_plain(annotation.left), annotation.operator, _plain(annotation.right))
    if isinstance(annotation, ExprSubscript):
        if annotation.canonical_path == "typing.Annotated" and isinstance(annotation.slice, ExprTuple):
            return _plain(annotation.slice.elements[0])
        return ExprSubscript(annotation.left, _plain(annotation.slice))
    if isinstance(annotation, ExprTuple):
        return ExprTuple([_plain(element) for element in annotation.elements], annotation.implicit)
    return annotation


def _spell_settings(function: Function) -> None:
    """Write ``**settings`` for a method that takes the fields of a settings class by name."""
    taken = [d.value for d in function.decorators if d.callable_path == "gobelin.settings.takes_settings"]
    if not taken:
        return
    (settings,) = [argument for call in taken if isinstance(call, Expr) for argument in call.arguments]  # type: ignore
    parameters = [parameter for parameter in function.parameters if parameter.name != "settings"]
    spelled = function.parameters["settings"]
    spelled.kind, spelled.annotation = ParameterKind.var_keyword, settings
    function.parameters = Parameters(*parameters, spelled)
    assert isinstance(settings, ExprName)
    assert function.docstring is not None
    scope = function.parent
    assert isinstance(scope, Class)
    function.docstring.value += f"\n\nThe settings are the fields of :class:`{settings.name}`, given by name."
