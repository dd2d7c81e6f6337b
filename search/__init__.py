"""Propose graphs that may compute the same function faster.

In: a kernel graph, a target, a cost model and a budget. Out: candidates, cheapest first. Nothing
here is trusted: every candidate is checked as a whole by `superopt.verify` before it can run.
"""
