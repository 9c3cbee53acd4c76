"""One HTML file about a run, or about several side by side.

    python -m snclr.report W1 [W2 ...] [--out FILE]

The file contains everything (styles, curves as SVG, pictures as data URIs), so it can be sent by
mail. Runs that differ only in their seed share a row: mean and sample standard deviation.
"""

import os
import sys

from .arguments import new_parser
from .pictures.report import write
from .running.errors import UsageError, one_clear_line


def main(argv: list[str]) -> None:
    parser = new_parser(
        "python -m snclr.report WORKDIR... [--out FILE]",
        "Describes runs in one HTML file that needs nothing else.",
    )
    parser.add_argument(
        "workdirs", nargs="+", metavar="WORKDIR", help="folder of a run; several are compared"
    )
    parser.add_argument(
        "--out", metavar="FILE", help="file to write (default: report.html in the first workdir)"
    )
    args = parser.parse_args(argv)
    out = args.out or os.path.join(args.workdirs[0], "report.html")
    if os.path.exists(out) and not os.path.isfile(out):
        raise UsageError(f"--out {out} is not a regular file: choose another name")
    write(args.workdirs, out)
    print(out)


if __name__ == "__main__":
    with one_clear_line("snclr.report"):
        main(sys.argv[1:])
