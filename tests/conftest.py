"""What every test shares: the devices there are."""

import pytest
import torch

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request):
    """Each device there is: `cpu` always, `cuda` when present."""
    return torch.device(request.param)
