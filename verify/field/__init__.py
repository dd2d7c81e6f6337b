"""The finite-field test's domain: `domain` holds values, secrets and the rule table, the rest its rules.

In: nodes of primitives and the residues needed of each. Out: residues modulo random primes. The theory is in
`superopt.verify.field.domain` and docs/verification.md.
"""

from superopt.verify.field import order, reals, reductions, structure  # noqa: F401  (they register rules)
from superopt.verify.field.domain import (
    FIELD,
    FieldDomain,
    FieldValue,
    ZeroDivision,
    as_rational,
)

__all__ = ["FIELD", "FieldDomain", "FieldValue", "ZeroDivision", "as_rational"]
