"""GPUs through NVIDIA's management library: read, set, and always given back."""

from voltana_ctrl.moved import forward

__getattr__ = forward(__name__)
