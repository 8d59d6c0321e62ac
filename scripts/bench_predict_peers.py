"""vLLM as a contestant of bench_predict.py, in an environment and a process of its own."""

import json
import time
from pathlib import Path

import torch
from bench_experts_remote import Peer
from bench_predict_workload import Workload

SCRIPT = Path(__file__).with_name("bench_predict_vllm.py")
PAUSE_S = 0.08  # before and after its turn: threads, ours or its own, spin after their last work


class Vllm:
    """A process that has the same checkpoint loaded in vLLM.

    Args:
        python: The interpreter of its environment.
        checkpoint: The checkpoint.

    Attributes:
        versions: What it runs.

    Raises:
        PeerError: If it cannot take part.
    """

    def __init__(self, python: str, checkpoint: Path) -> None:
        threads = torch.get_num_threads()
        self._peer = Peer(python, str(SCRIPT), threads)
        try:
            answer = self._peer.ask(load=str(checkpoint.resolve()), threads=threads)
        except BaseException:
            self._peer.close()
            raise
        self.versions: dict[str, str] = answer["versions"]

    def generate(self, rows: Path, out: Path) -> float:
        """Continue the rows of a file of :func:`write_token_ids`.

        Args:
            rows: The file.
            out: File for the answers.

        Returns:
            How long it took.

        Raises:
            PeerError: If it broke down.
        """
        time.sleep(PAUSE_S)
        elapsed_s: float = self._peer.ask(run=str(rows), out=str(out))["seconds"]
        time.sleep(PAUSE_S)
        return elapsed_s

    def close(self) -> None:
        """End the process."""
        self._peer.close()


def write_token_ids(path: Path, workload: Workload, *, repetition_penalty: float) -> None:
    """Write the rows as vLLM takes them.

    Args:
        path: The file.
        workload: The rows.
        repetition_penalty: That of the checkpoint's generation_config.json, which the other
            contestants apply.
    """
    rows = [
        {
            "id": row,
            "token_ids": list(ids),
            "max_new_tokens": wanted,
            "repetition_penalty": repetition_penalty,
        }
        for row, (ids, wanted) in enumerate(
            zip(workload.token_ids, workload.max_new_tokens, strict=True)
        )
    ]
    path.write_text(json.dumps(rows))
