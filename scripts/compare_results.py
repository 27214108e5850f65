"""Print results of eval.py side by side, as a Markdown table, with what differs in settings:

    python scripts/compare_results.py A.json B.json ...
"""

import argparse
import sys

import checkout  # noqa: F401 - finds the project

from libs.evaluate import compare
from utils import UserError, read_json

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("results", nargs="+", help="files that eval.py wrote")
    try:
        print(*compare({path: read_json(path) for path in parser.parse_args().results}), sep="\n")
    except UserError as error:
        sys.exit(f"error: {error}")
