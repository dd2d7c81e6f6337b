"""Turn a graph into source, and source into something that runs.

In: block graphs (`superopt.ir`) and a target. Out: readable source in the target's language and a
compiled, loaded kernel. A block graph lowers once to a tile program, which each backend prints.
"""
