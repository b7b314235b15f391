"""Optimizers written from their papers with NumPy in float64, a parameter at a time: what ours are compared with."""

from dataclasses import dataclass, field

import numpy as np

Array = np.ndarray


@dataclass
class PlainOptimizer:
    """`step` gives the new value of a parameter; state is kept by name. `decay` counts for the names in `decayed`."""

    decay: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    decayed: frozenset[str] = frozenset()
    state: dict[str, dict] = field(default_factory=dict)

    def step(self, name: str, w: Array, g: Array, lr: float) -> Array:
        own = self.state.setdefault(name, {"t": 0, "m": np.zeros_like(w), "v": np.zeros_like(w)})
        own["t"] += 1
        return self.new(name, w, g, lr, self.decay if name in self.decayed else 0.0, own)

    def new(self, name: str, w: Array, g: Array, lr: float, decay: float, own: dict) -> Array:
        raise NotImplementedError


class PlainAdamW(PlainOptimizer):
    inside = False

    def new(self, name, w, g, lr, decay, own):
        b1, b2 = self.betas
        own["m"] = b1 * own["m"] + (1 - b1) * g
        own["v"] = b2 * own["v"] + (1 - b2) * g**2
        m, v = own["m"] / (1 - b1 ** own["t"]), own["v"] / (1 - b2 ** own["t"])
        root = np.sqrt(v + self.eps) if self.inside else np.sqrt(v) + self.eps
        return w - lr * decay * w - lr * m / root


class PlainAdamWInside(PlainAdamW):
    inside = True


class PlainLion(PlainOptimizer):
    def new(self, name, w, g, lr, decay, own):
        b1, b2 = self.betas
        u = np.sign(b1 * own["m"] + (1 - b1) * g)
        own["m"] = b2 * own["m"] + (1 - b2) * g
        return w - lr * (u + decay * w)


class PlainStableAdamW(PlainOptimizer):
    def new(self, name, w, g, lr, decay, own):
        t = own["t"]
        b1, b2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in self.betas)
        own["m"] = b1 * own["m"] + (1 - b1) * g
        own["v"] = b2 * own["v"] + (1 - b2) * g**2
        rms = np.sqrt(np.mean(g**2 / np.maximum(own["v"], self.eps**2)))
        rate = lr / max(1.0, rms)
        return w - rate * decay * w - rate * own["m"] / (np.sqrt(own["v"]) + self.eps)


class PlainScheduleFree(PlainOptimizer):
    def new(self, name, w, g, lr, decay, own):
        """x, z and y are all kept here; the parameter is y."""
        b1, b2 = self.betas
        if own["t"] == 1:
            own |= {"z": w.copy(), "x": w.copy(), "sum": 0.0, "largest": 0.0}
        own["v"] = b2 * own["v"] + (1 - b2) * g**2
        d = g / (np.sqrt(own["v"] / (1 - b2 ** own["t"])) + self.eps) + decay * w
        own["z"] = own["z"] - lr * d
        own["largest"] = max(own["largest"], lr)
        own["sum"] += own["largest"] ** 2
        c = own["largest"] ** 2 / own["sum"]
        own["x"] = (1 - c) * own["x"] + c * own["z"]
        return (1 - b1) * own["z"] + b1 * own["x"]


class PlainSophia(PlainOptimizer):
    gamma = 0.05
    estimate: dict[str, Array] | None = None
    """B g^2 of drawn targets, in steps that have it."""

    def new(self, name, w, g, lr, decay, own):
        b1, b2 = self.betas
        own["m"] = b1 * own["m"] + (1 - b1) * g
        if self.estimate is not None:
            own["v"] = b2 * own["v"] + (1 - b2) * self.estimate[name]
        u = np.clip(own["m"] / np.maximum(self.gamma * own["v"], self.eps), -1, 1)
        return w - lr * decay * w - lr * u


class PlainMuon(PlainAdamW):
    momentum = 0.95
    spectral = False

    def new(self, name, w, g, lr, decay, own):
        if (".feedforward." not in name and ".attention." not in name) or w.ndim < 2:
            return super().new(name, w, g, lr, decay, own)
        own["m"] = self.momentum * own["m"] + (1 - self.momentum) * g
        x = self.momentum * own["m"] + (1 - self.momentum) * g
        x = x / (np.linalg.norm(x) + 1e-7)
        for _ in range(5):  # of any shape: the polynomial acts on singular values
            x = 3.4445 * x + (-4.7750 * (x @ x.T) + 2.0315 * (x @ x.T) @ (x @ x.T)) @ x
        scale = np.sqrt(max(1, w.shape[0] / w.shape[1])) if self.spectral else 0.2 * np.sqrt(max(w.shape))
        return w - lr * decay * w - lr * scale * x
