"""What the mixers of all wrappers share."""

from typing import Any

from memjax.nn.mixer import Mixer


class WrapperMixer(Mixer):
    """A mixer around another one. inner: one maker of that mixer, called with `name`."""

    inner: tuple[Any, ...] = ()

    @property
    def template(self) -> Mixer:
        """The inner mixer, without parameters; its output projection is this layer's."""
        return self.inner[0](parent=None, out_scale=self.out_scale)

    @property
    def memories(self) -> int:
        """As the inner mixer."""
        return self.template.memories
