"""Print the first predictions of a run; called by demo.sh with the options of predict."""

import argparse
import json
import textwrap
from itertools import islice
from pathlib import Path

NUM_SHOWN = 5


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--output_dir", default="./outputs/single_device")
    options, _ = parser.parse_known_args()
    path = Path(options.output_dir) / "predictions.jsonl"
    if not path.is_file():  # --help, --print_config, or Parquet output
        return
    print(f"\nThe first of {path}:")
    with path.open(encoding="utf-8") as file:
        for line in islice(file, NUM_SHOWN):
            row = json.loads(line)
            answer = row.get("text", {k: v for k, v in row.items() if k not in ("id", "embedding")})
            print(f"\n[{row['id']}]")
            print(textwrap.indent(str(answer).strip("\n"), "    "))


if __name__ == "__main__":
    main()
