"""Activation functions by the names that transformers gives them (`ACT2FN` of transformers 5)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from loratools_formats.core.dtypes import Array
from loratools_formats.disk.errors import UnsupportedError


def _erf(x: Array) -> Array:
    return np.fromiter(map(math.erf, x.reshape(-1).tolist()), np.float64, x.size).reshape(x.shape)


def activation(name: str) -> Callable[[Array], Array]:
    """Return a function by its name.

    Raises:
        UnsupportedError: there is none of that name, or what it computes is trained.
    """
    if name not in _FUNCTIONS:
        raise UnsupportedError(
            "activation is not known", got=name, expected=", ".join(sorted(_FUNCTIONS))
        )
    return _FUNCTIONS[name]


def _sigmoid(x: Array) -> Array:
    small = np.exp(-np.abs(x))
    return np.where(x >= 0.0, 1.0, small) / (1.0 + small)


def _softplus(x: Array) -> Array:
    return np.logaddexp(0.0, x)


def _gelu(x: Array) -> Array:
    return 0.5 * x * (1.0 + _erf(x / math.sqrt(2.0)))


def _gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def _relu(x: Array) -> Array:
    return np.maximum(x, 0.0)


def _laplace(x: Array) -> Array:
    spread = 0.282095 * math.sqrt(2.0)
    return 0.5 * (1.0 + _erf((x - 0.707107) / spread))


_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_10": lambda x: np.clip(_gelu(x), -10.0, 10.0),
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": _gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": lambda x: x * np.clip(x + 3.0, 0.0, 6.0) / 6.0,
    "laplace": _laplace,
    "leaky_relu": lambda x: np.where(x >= 0.0, x, 0.01 * x),
    "linear": lambda x: x,
    "mish": lambda x: x * np.tanh(_softplus(x)),
    "prelu": lambda x: np.where(x >= 0.0, x, 0.25 * x),  # made anew at each use, never trained
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "relu": _relu,
    "relu2": lambda x: _relu(x) ** 2,
    "relu6": lambda x: np.clip(x, 0.0, 6.0),
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "sqrtsoftplus": lambda x: np.sqrt(_softplus(x)),
    "swish": lambda x: x * _sigmoid(x),
    "tanh": np.tanh,
}
