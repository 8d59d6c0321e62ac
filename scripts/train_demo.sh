#!/usr/bin/env bash
# Make the demo checkpoint from scratch: corpus and tokenizer, random start, fit, export, evaluation.
#   scripts/train_demo.sh CORPUS_DIR     (plays.txt, verse.txt, prose.txt; public domain)
# Everything goes to outputs/train_demo; moe_lightning/demo/checkpoint is the result of one such run.
set -euo pipefail
corpus=${1:?usage: scripts/train_demo.sh CORPUS_DIR (with plays.txt, verse.txt and prose.txt)}
corpus=$(cd "$corpus" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=outputs/train_demo

"$python" scripts/make_demo_corpus.py --corpus "$corpus" --out $out/corpus
"$python" scripts/make_checkpoint.py --family qwen3_moe --out $out/start --tokenizer $out/corpus/tokenizer \
  --hidden_size 192 --num_layers 4 --num_experts 16 --top_k 2 --expert_size 192 \
  --num_heads 6 --num_kv_heads 2 --vocab_size 2048 --max_positions 1024 --tie true
# The checkpoint's own greedy text: a model this small repeats itself without a penalty.
"$python" - <<'PY'
import json, pathlib
path = pathlib.Path("outputs/train_demo/start/generation_config.json")
path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 1.2}, indent=2) + "\n")
PY
"$python" -m moe_lightning fit --config train_demo.yaml
"$python" -m moe_lightning export --model.checkpoint $out/start \
  --ckpt_path $out/run/checkpoints/last.ckpt --export_dir $out/checkpoint --dtype bfloat16
"$python" scripts/evaluate_demo.py --checkpoint $out/checkpoint --corpus $out/corpus
