"""The mutations that are tried: a choice of cosmic-ray's operators, and three that it lacks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import parso
from cosmic_ray.operators.operator import Example, Operator
from cosmic_ray.plugins import get_operator
from parso.python.tree import Keyword, Name

Position = tuple[tuple[int, int], tuple[int, int]]

# Bounds, conditions, constants, loops, error paths. Of the replacements of arithmetic one each: a wrong sign says as much
# as eleven wrong operators.
_CHOSEN = (
    "ReplaceBinaryOperator_Add_Sub",
    "ReplaceBinaryOperator_Sub_Add",
    "ReplaceBinaryOperator_Mul_Div",
    "ReplaceBinaryOperator_Div_Mul",
    "ReplaceBinaryOperator_FloorDiv_Mul",
    "ReplaceBinaryOperator_Mod_Mul",
    "ReplaceBinaryOperator_Pow_Mul",
    "ReplaceBinaryOperator_LShift_RShift",
    "ReplaceBinaryOperator_RShift_LShift",
    "ReplaceBinaryOperator_BitOr_BitAnd",
    "ReplaceBinaryOperator_BitAnd_BitOr",
    "ReplaceComparisonOperator_Eq_NotEq",
    "ReplaceComparisonOperator_NotEq_Eq",
    "ReplaceComparisonOperator_Lt_LtE",
    "ReplaceComparisonOperator_Lt_GtE",
    "ReplaceComparisonOperator_LtE_Lt",
    "ReplaceComparisonOperator_LtE_Gt",
    "ReplaceComparisonOperator_Gt_GtE",
    "ReplaceComparisonOperator_Gt_LtE",
    "ReplaceComparisonOperator_GtE_Gt",
    "ReplaceComparisonOperator_GtE_Lt",
    "ReplaceComparisonOperator_Is_IsNot",
    "ReplaceComparisonOperator_IsNot_Is",
    "ReplaceUnaryOperator_Delete_USub",
    "ReplaceUnaryOperator_Delete_Invert",
    "ReplaceUnaryOperator_Delete_Not",
    "AddNot",
    "ReplaceTrueWithFalse",
    "ReplaceFalseWithTrue",
    "ReplaceAndWithOr",
    "ReplaceOrWithAnd",
    "ReplaceBreakWithContinue",
    "ReplaceContinueWithBreak",
    "ExceptionReplacer",
    "NumberReplacer",
    "RemoveDecorator",
    "ZeroIterationForLoop",
)


class DropStatement(Operator):
    """A call for its effect, an update in place, a `del`, a `raise`: left out."""

    def mutation_positions(self, node: Any) -> Iterator[Position]:
        if node.type == "simple_stmt" and self._has_effect(node.children[0]):
            yield node.children[0].start_pos, node.children[0].end_pos

    def mutate(self, node: Any, index: int) -> Any:
        prefix = node.children[0].get_first_leaf().prefix
        node.children[0] = parso.parse(f"{prefix}pass")
        return node

    @staticmethod
    def _has_effect(statement: Any) -> bool:
        if statement.type == "expr_stmt":
            sign = statement.children[1]
            return sign.type == "operator" and sign.value.endswith("=") and sign.value != "="
        return statement.type in ("atom_expr", "await_expr", "power", "del_stmt", "raise_stmt")

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (Example("f(x)\n", "pass\n"), Example("x += 1\n", "pass\n"), Example("raise E\n", "pass\n"))


class ReplaceName(Operator):
    """The opposite of a builtin or of a method: the smallest for the largest, the first for the last."""

    OPPOSITES = {"min": "max", "max": "min", "any": "all", "all": "any", "startswith": "endswith"} | {
        "minimum": "maximum",
        "maximum": "minimum",
        "argmin": "argmax",
        "argmax": "argmin",
    }

    def mutation_positions(self, node: Any) -> Iterator[Position]:
        following = node.get_next_leaf() if isinstance(node, Name) and node.value in self.OPPOSITES else None
        if following is not None and following.value == "(":
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        node.value = self.OPPOSITES[node.value]
        return node

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (Example("min(x)\n", "max(x)\n"),)


class ReverseMembership(Operator):
    """`in` for `not in` and the reverse."""

    def mutation_positions(self, node: Any) -> Iterator[Position]:
        plain = isinstance(node, Keyword) and node.value == "in" and node.parent.type == "comparison"
        if plain or (node.type == "comp_op" and node.children[0].value == "not"):
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        if node.type == "comp_op":
            return Keyword("in", node.start_pos, node.children[0].prefix)
        node.value = "not in"
        return node

    @classmethod
    def examples(cls) -> tuple[Example, ...]:
        return (Example("x in y\n", "x not in y\n"), Example("x not in y\n", "x in y\n"))


def operators() -> dict[str, Operator]:
    """All of them by name."""
    chosen = {name: get_operator(f"core/{name}")() for name in _CHOSEN}
    return chosen | {kind.__name__: kind() for kind in (DropStatement, ReplaceName, ReverseMembership)}
