"""Reports: what was found, proven and gained, for people and for programs.

In: plans. Out: a `Report` with the numbers as fields and a readable text.
"""

from dataclasses import dataclass
from typing import Any, final

from superopt.plan import Plan


@final
@dataclass(frozen=True, slots=True)
class PlanReport:
    """What one plan is and how it came about."""

    inputs: str
    improved: bool
    original_s: float
    planned_s: float
    search_s: float
    proposed: int
    rejected: int
    proven: int
    kernels: tuple[str, ...]
    proof: str
    why: str
    notes: tuple[str, ...]

    @property
    def speedup(self) -> float:
        """Original time over plan time; 1 where the original runs."""
        return self.original_s / self.planned_s if self.improved and self.planned_s > 0 else 1.0

    def __str__(self) -> str:
        lines = [f"inputs {self.inputs}"]
        if self.improved:
            lines.append(
                f"  {self.original_s * 1e3:.3f} ms -> {self.planned_s * 1e3:.3f} ms "
                f"({self.speedup:.2f}x)"
            )
            lines += [f"  kernel {k}" for k in self.kernels]
            lines.append(f"  proof: {self.proof}")
        else:
            lines.append(f"  the original runs: {self.why}")
        lines.append(
            f"  search: {self.search_s:.1f} s, {self.proposed} proposed, {self.rejected} rejected, "
            f"{self.proven} proven"
        )
        return "\n".join(lines)


@final
@dataclass(frozen=True, slots=True)
class Report:
    """All plans of a function, and calls that no plan can serve."""

    plans: tuple[PlanReport, ...]
    unplanned: tuple[str, ...]

    @property
    def proposed(self) -> int:
        """Candidate kernels proposed, over all plans."""
        return sum(p.proposed for p in self.plans)

    @property
    def rejected(self) -> int:
        """Candidates rejected, over all plans."""
        return sum(p.rejected for p in self.plans)

    @property
    def proven(self) -> int:
        """Programs proven equal to their original, over all plans."""
        return sum(p.proven for p in self.plans)

    @property
    def search_s(self) -> float:
        """Seconds of search, over all plans."""
        return sum(p.search_s for p in self.plans)

    def __str__(self) -> str:
        if not self.plans and not self.unplanned:
            return "no plan yet: call the function, or warmup(*inputs)"
        return "\n".join([*map(str, self.plans), *(f"not planned: {u}" for u in self.unplanned)])


def plan_report(plan: Plan) -> PlanReport:
    """Return the report of one plan."""
    facts = plan.report
    return PlanReport(
        inputs=", ".join(f"{i.attrs.name}: {i.type}" for i in plan.original.inputs),
        improved=plan.program is not None,
        original_s=float(facts.get("original_s", 0.0)),
        planned_s=float(facts.get("planned_s", 0.0)),
        search_s=float(facts.get("search_s", 0.0)),
        proposed=int(facts.get("proposed", 0)),
        rejected=int(facts.get("rejected", 0)),
        proven=int(facts.get("proven", 0)),
        kernels=tuple(f"{k.name} ({k.backend}) {_short(k.config)}" for k in plan.kernels.values()),
        proof=proof_text(plan.certificate),
        why=str(facts.get("why", "")),
        notes=tuple(facts.get("notes", ())),
    )


_UNIT = 2.0**-24
"""Rounding error of float32, the precision inside kernels."""


def _short(config: dict[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in config.items())


def proof_text(certificate: dict[str, Any] | None) -> str:
    """Say in one line what the certificate shows."""
    if certificate is None:
        return "none (the original needs none)"
    # errors below one rounding are as good as none
    ratios = [e["candidate"] / max(e["original"], _UNIT) for e in certificate["float_errors"]]
    floating = f"; float errors at most {max(ratios):.1f}x the original's" if ratios else ""
    return (
        f"{equality_text(certificate['tests'], len(certificate['pieces']))}, "
        f"wrong with probability at most {certificate['bound']:.1e}{floating}"
    )


def equality_text(tests: int, pieces: int) -> str:
    """Say how equality was shown: by tests of the whole, or piece by piece."""
    if pieces:
        return f"equal in {pieces} pieces, each in several random prime fields"
    return f"equal in {tests} random prime fields"
