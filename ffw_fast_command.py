"""The entry of ``ffw-fast``, outside the package, because the package loads PyTorch and its kernels.

That takes seconds in which Ctrl-C may come, and fails where FFW_FAST_BACKEND asks for kernels that cannot be used.
"""

import sys


def main() -> int:
    """Run the command line; the exit code, as of ``ffw_fast.cli.main``."""
    try:
        from ffw_fast.cli import main as run
    except KeyboardInterrupt:
        print("ffw-fast: interrupted", file=sys.stderr)
        return 130
    except (ImportError, ValueError) as error:
        if "--traceback" in sys.argv:
            raise
        print(f"ffw-fast: error: {error}", file=sys.stderr)
        if isinstance(error, ValueError) or sys.argv[1:2] != ["info"]:
            return 2
        from ffw_fast.cli import main as run  # kernels are tried once; info tells what became of each
    return run()
