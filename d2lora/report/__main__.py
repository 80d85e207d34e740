"""python -m d2lora.report"""

import argparse
import sys

from d2lora import data, report
from d2lora.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m d2lora.report", description="Write the report and print the grids' tables."
    )
    parser.add_argument("sweeps", nargs="*", metavar="SWEEP", help="names of sweeps; all without any")
    parser.add_argument("--output", default="outputs", help="the folder that holds store and manifests")
    args = parser.parse_args()
    output = data.ROOT / args.output
    try:
        print(report.everything(output, args.sweeps))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
