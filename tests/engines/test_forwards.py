"""Other forwards: in use for as long as any thread computes with them, and gone afterwards."""

import threading

import torch
from torch import nn

from gobelin.engines.forwards import is_replaced, other_forwards


def test_a_forward_is_called_between_the_hooks_and_gone_afterwards() -> None:
    layer = nn.Linear(2, 2)
    heard = []
    layer.register_forward_hook(lambda module, given, out: heard.append(out))
    with other_forwards({layer: torch.neg}):
        assert torch.equal(layer(torch.ones(2)), -torch.ones(2))
    assert torch.equal(heard[0], -torch.ones(2))
    assert "forward" not in vars(layer)


def test_what_somebody_else_put_there_stays() -> None:
    layer = nn.Linear(2, 2)
    layer.forward = torch.abs
    with other_forwards({layer: torch.neg}):
        assert torch.equal(layer(-torch.ones(2)), torch.ones(2))
    assert layer.forward is torch.abs


def test_one_thread_that_ends_takes_nothing_from_another() -> None:
    layer = nn.Linear(2, 2)
    entered, ended = threading.Event(), threading.Event()
    seen = []

    def work() -> None:
        with other_forwards({layer: torch.neg}):
            entered.set()
            ended.wait()
            seen.append(layer(torch.ones(2)))

    with other_forwards({layer: torch.neg}):
        thread = threading.Thread(target=work)
        thread.start()
        entered.wait()
    ended.set()
    thread.join()
    assert torch.equal(seen[0], -torch.ones(2))
    assert "forward" not in vars(layer)


def test_a_forward_of_somebody_else_is_told_from_ours() -> None:
    layer = nn.Linear(2, 2)
    with other_forwards({layer: torch.neg}):
        assert not is_replaced(layer)
    layer.forward = torch.abs
    assert is_replaced(layer)
