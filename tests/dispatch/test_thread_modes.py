"""Modes of one thread, in another."""

import threading

import pytest
import torch

from moe_lightning.dispatch.thread_modes import ThreadModes, use_threads


def in_another_thread(function):
    answers = []
    thread = threading.Thread(target=lambda: answers.append(function()))
    thread.start()
    thread.join(20)
    return answers[0]


def seen():
    return (
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        (torch.randn(2, 2) @ torch.randn(2, 2)).dtype,
    )


def seen_with(modes):
    with modes.applied():
        return seen()


def test_inference_mode_and_autocast_come_along_and_gradients_never_do():
    assert in_another_thread(lambda: seen_with(ThreadModes())) == (
        False,
        False,
        False,
        torch.float32,
    )
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        modes = ThreadModes()
        assert in_another_thread(seen) == (False, True, False, torch.float32)
    assert in_another_thread(lambda: seen_with(modes)) == (True, False, True, torch.bfloat16)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_the_number_of_threads_is_the_calling_threads_own(num_threads):
    def set_and_ask():
        use_threads(num_threads)
        return torch.get_num_threads()

    before = torch.get_num_threads()
    assert in_another_thread(set_and_ask) == num_threads
    assert torch.get_num_threads() == before
    torch.set_num_threads(before)  # new threads start with the number last set anywhere
