"""The `superopt` command.

In: arguments. Out: text on stdout (JSON lines with `--json`), progress on stderr, an exit code: 0 done, 1 not
equivalent or an internal error, 2 usage, 3 unsupported, 4 verification failed, 130 interrupted, 141 output that nobody reads.
PyTorch is imported by the verbs that need it, so that `--help` answers at once.
"""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from superopt import __version__
from superopt.errors import Unsupported, UsageError
from superopt.ir.errors import SuperoptError

DONE: Final = 0
INTERNAL: Final = 1
USAGE: Final = 2
UNSUPPORTED: Final = 3
NOT_VERIFIED: Final = 4
INTERRUPTED: Final = 130
BROKEN_PIPE: Final = 141

_PARTS: Final = {
    "original": "the program as lifted, a graph of operators",
    "program": "the program that was found, its kernels as block graphs",
    "schedule": "how each kernel came about",
    "source": "the generated source of the kernels",
    "python": "the generated Python that calls them",
}
_EPILOG: Final = """\
examples:
  superopt optimize model.pt2 -o fast                 a torch.export file to an artifact folder
  superopt optimize mypackage.ops:rms_norm -i f32[16,4096] -i f32[4096] -o fast
  superopt bench fast                                 the artifact against the program as it was
  superopt verify fast                                check its certificate again, from the folder alone
  superopt inspect fast --source                      the generated kernels

exit codes (with --json an error is a JSON line on stdout too):
  0 done   1 not equivalent, or an internal error   2 usage   3 unsupported
  4 verification failed   130 interrupted (what was found until then is kept)
  141 nobody reads the output

The cache folder is the user's cache directory, $SUPEROPT_CACHE_DIR, or --cache.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = make_parser()
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:
        return int(stop.code or 0) if not isinstance(stop.code, str) else USAGE
    if options.verb is None:
        parser.print_help()
        return USAGE
    from superopt import commands

    try:
        code: int = getattr(commands, f"run_{options.verb}")(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # whoever read our output (head) has seen enough; what is left must not fail at exit again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        print("superopt: interrupted", file=sys.stderr)
        return INTERRUPTED
    except SuperoptError as error:
        plain = isinstance(error, UsageError | Unsupported)
        text = str(error) if plain else f"{type(error).__name__}: {error}"
        code = commands.exit_code(error, options.verb)
        _tell(options, type(error).__name__, str(error), text, code)
    except Exception as error:  # a defect of ours: whoever reports it needs the traceback
        traceback.print_exc()
        code, text = INTERNAL, f"{type(error).__name__}: {error}"
        _tell(options, "internal error", text, f"internal error, please report it: {text}", code)
    return code


def _tell(options: argparse.Namespace, kind: str, message: str, text: str, code: int) -> None:
    """Print what went wrong: on stderr for people, on stdout as well for machines."""
    print(f"superopt {options.verb}: {text}", file=sys.stderr)
    if options.json:
        print(json.dumps({"event": "error", "error": kind, "message": message, "exit_code": code}))


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="superopt",
        description="Find, prove and measure a faster version of a PyTorch program.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"superopt {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    _optimize_parser(verbs)
    _run_parser(verbs)
    bench = _verb(verbs, "bench", "time an artifact against the program as it was")
    bench.add_argument("artifact", type=Path, help="artifact folder")
    bench.add_argument("--seconds", type=float, default=3.0, help="time to spend (default 3)")
    verify = _verb(verbs, "verify", "check an artifact's certificate again, from the folder alone")
    verify.add_argument("artifact", type=Path, help="artifact folder")
    verify.add_argument(
        "--bound", type=float, help="probability of a wrong verdict to reach, such as 1e-30"
    )
    inspect = _verb(verbs, "inspect", "print an artifact's graphs, schedules and sources")
    inspect.add_argument("artifact", type=Path, help="artifact folder")
    for part, meaning in _PARTS.items():
        inspect.add_argument(f"--{part}", action="store_true", help=f"only {meaning}")
    targets = _verb(verbs, "targets", "what this machine can do, measured")
    _cache_option(targets)
    cache = _verb(verbs, "cache", "list, measure or clear the cache folder")
    cache.add_argument("action", choices=("list", "size", "clear"), nargs="?", default="size")
    _cache_option(cache)
    ops = _verb(verbs, "ops", "the operators, and which meanings each of them has")
    ops.add_argument("--missing", action="store_true", help="only those without some meaning")
    return parser


def _verb(
    verbs: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, summary: str
) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=summary, description=summary[0].upper() + summary[1:])
    parser.add_argument("--json", action="store_true", help="JSON lines on stdout, for machines")
    return parser


def _cache_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="cache folder to use")


def _optimize_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    optimize = _verb(verbs, "optimize", "search for a faster program and write an artifact folder")
    optimize.add_argument("program", help="a torch.export file (.pt2), or module:function")
    optimize.add_argument("-o", "--output", type=Path, required=True, help="artifact folder")
    optimize.add_argument(
        "-i",
        "--input",
        action="append",
        default=[],
        metavar="SPEC",
        help="an argument of a function, such as f32[16,4096], i64[8]:1000 (values below 1000; "
        "2 where none is given), or a number; once per argument",
    )
    optimize.add_argument("--budget", type=float, default=120.0, help="seconds (default 120)")
    optimize.add_argument(
        "--seed",
        type=int,
        default=0,
        help="the same seed proposes the same kernels, as far as the budget reaches (default 0)",
    )
    optimize.add_argument(
        "--backend",
        choices=("auto", "cpu", "triton"),
        default="auto",
        help="default: what the tensors' device has",
    )
    optimize.add_argument("--strict", action="store_true", help="prove it twice, to 2^-120")
    optimize.add_argument("--force", action="store_true", help="replace an existing artifact")
    optimize.add_argument("--no-cache", action="store_true", help="search anew, store nothing")
    _cache_option(optimize)


def _run_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    run = _verb(verbs, "run", "run an artifact on stored or random inputs")
    run.add_argument("artifact", type=Path, help="artifact folder")
    run.add_argument(
        "--inputs", type=Path, metavar="NPZ", help="arrays by argument name, or in order"
    )
    run.add_argument("--outputs", type=Path, metavar="NPZ", help="where to write the results")
    run.add_argument("--seed", type=int, default=0, help="of random inputs (default 0)")


if __name__ == "__main__":
    sys.exit(main())
