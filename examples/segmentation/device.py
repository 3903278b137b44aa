"""Where the examples run."""

from __future__ import annotations

import jax


def choose_device(name: str) -> jax.Device:
    """The first device of the kind asked for; ends the program if there is none."""
    if name == "cpu":
        jax.config.update("jax_platforms", "cpu")  # leaves the memory of a GPU alone
    try:
        device = jax.devices(None if name == "auto" else name)[0]
    except RuntimeError as error:
        raise SystemExit(f"error: --device {name}: {error}") from error
    if device.platform != jax.default_backend():
        raise SystemExit(f"error: --device {name}: jax already runs on {jax.default_backend()}")
    return device
