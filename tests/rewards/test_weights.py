"""Where weights are, and in which format."""

import torch
from torch import nn

from rewards.weights import lent_to


class Tied(nn.Module):
    """Two layers with one weight, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.other.weight = self.one.weight
        self.register_buffer("scale", torch.ones(3))


def test_what_is_lent_comes_back_as_it_was() -> None:
    model, stays = Tied().requires_grad_(False), nn.Linear(2, 2, device="meta")
    before = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    there = stays.weight
    with lent_to("meta", model, stays):
        assert all(each.is_meta for each in (*model.parameters(), *model.buffers()))
        assert model.one.weight is model.other.weight
        assert stays.weight is there  # it is there already
    after = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
