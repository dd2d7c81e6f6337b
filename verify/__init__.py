"""Decide whether two graphs compute the same function, and write down the evidence.

In: the original graph and a candidate (`superopt.ir`). Out: a verdict, which is a certificate when
the candidate passed the finite-field test and the floating-point test, and a counterexample when it
did not. Follows the random testing over finite fields of Mirage (OSDI 2025), with uniform inputs and
a computed error bound.
"""
