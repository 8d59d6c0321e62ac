"""Write a random checkpoint of any mixture-of-experts family and size.

python scripts/make_checkpoint.py --family qwen3_moe --target_params 200M --out DIR
"""

import sys

from jsonargparse import CLI

from moe_lightning.demo.random_checkpoint import make_checkpoint
from moe_lightning.errors import MoELightningError

if __name__ == "__main__":
    try:
        print(CLI(make_checkpoint, as_positional=False))
    except MoELightningError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
