"""The device: one a process, with a generator and memory statistics."""

import torch

HABANA_VISIBLE_MODULES_VAR = "HABANA_VISIBLE_MODULES"
HLS_MODULE_ID_VAR = "HLS_MODULE_ID"
synchronized = 0


class Stream:
    """DeepSpeed names it in annotations as it is loaded."""


class Event:
    """DeepSpeed names it in annotations as it is loaded."""


class random:
    """The device's generator."""

    _generator = torch.Generator()

    @classmethod
    def get_rng_state(cls) -> torch.Tensor:
        return cls._generator.get_state()

    @classmethod
    def set_rng_state(cls, state: torch.Tensor) -> None:
        cls._generator.set_state(state)

    @classmethod
    def draw(cls) -> float:
        return float(torch.rand(1, generator=cls._generator))


def is_available() -> bool:
    return True


def device_count() -> int:
    return 1


def current_device() -> int:
    return 0


def set_device(index: int) -> None:
    assert index == 0


def synchronize() -> None:
    global synchronized
    synchronized += 1


def memory_stats() -> dict[str, int]:
    return {"Limit": 96 << 30, "InUse": 3 << 30, "MaxInUse": 5 << 30}
