"""Record the loads of the demo checkpoint over texts, for tests/placement/recorded_loads.npz.

    python scripts/record_demo_loads.py README.md docs/*.md --to tests/placement/recorded_loads.npz

Each interval is one piece of text of 512 bytes; layers and intervals together are 100 load matrices
and more.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_lightning.demo import checkpoint_path
from moe_lightning.modeling.seam import find_moe_layers
from moe_lightning.placement.recording import Recording, save_recording

NUM_PIECES, PIECE_BYTES = 40, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--to", type=Path, required=True)
    options = parser.parse_args()
    text = "\n".join(path.read_text() for path in options.texts)
    step = max(PIECE_BYTES, len(text) // NUM_PIECES)
    pieces = [text[n * step : n * step + PIECE_BYTES] for n in range(NUM_PIECES)]
    directory = checkpoint_path()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    layers = find_moe_layers(model)
    loads: dict[int, list[np.ndarray]] = {layer.layer: [] for layer in layers}
    together = {n.layer: np.zeros((n.num_experts, n.num_experts), np.int64) for n in layers}
    for layer in layers:

        def count(module, arguments, number=layer.layer, num_experts=layer.num_experts) -> None:
            chosen_TE = torch.zeros(arguments[1].shape[0], num_experts, dtype=torch.int64)
            chosen_TE.scatter_(1, arguments[1], 1)
            loads[number].append(chosen_TE.sum(dim=0).numpy())
            together[number] += (chosen_TE.T @ chosen_TE).numpy()

        layer.experts.register_forward_pre_hook(count)
    with torch.inference_mode():
        for piece in pieces:
            if piece:
                model(**tokenizer(piece, return_tensors="pt"))
    save_recording(options.to, Recording({n: np.stack(v) for n, v in loads.items()}, together))


if __name__ == "__main__":
    main()
