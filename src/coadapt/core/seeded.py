"""What all sites of an adapter share and nobody trains: random tensors that a seed makes again."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn


class Seeded(nn.Module):
    """Frozen tensors by name, as `make` makes them: of the same values in each call."""

    def __init__(self, make: Callable[[], Mapping[str, Tensor]], saved: bool) -> None:
        """
        Args:
            make: to be pickled, so no lambda.
            saved: whether they are part of files, and of state dicts.
        """
        super().__init__()
        self.make = make
        for name, value in make().items():
            self.register_buffer(name, value, persistent=saved)

    def at(self, name: str, like: Tensor) -> Tensor:
        """The tensor `name` on the device of `like`, and in its dtype unless it is one of whole numbers."""
        value = self.get_buffer(name)
        if value.is_meta and not like.is_meta:  # a base without values that has been given some
            value = self._buffers[name] = self.make()[name]
        return value.to(like) if value.is_floating_point() else value.to(like.device)
