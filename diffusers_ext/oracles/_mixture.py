r"""What the exact denoisers share: a mixture of Gaussians, noised.

The data are a mixture of Gaussians, :math:`p(x_0) = \sum_k \pi_k N(x_0; m_k, \Sigma_k)`. Then the noised data
:math:`x_t = \alpha_t x_0 + \sigma_t \epsilon` are one too, with :math:`C_k = \alpha_t^2 \Sigma_k + \sigma_t^2 I` and
:math:`z_k = x_t - \alpha_t m_k`:

.. math::
    p_t(x_t) &= \sum_k \pi_k N(z_k; 0, C_k), \qquad r_k = \pi_k N(z_k; 0, C_k) / p_t(x_t) \\
    E[x_0 | x_t] &= \sum_k r_k (m_k + \alpha_t \Sigma_k C_k^{-1} z_k) \\
    E[\epsilon | x_t] &= \sum_k r_k \sigma_t C_k^{-1} z_k = -\sigma_t \nabla \log p_t(x_t)

Every prediction type is a combination of the last two (Song et al. 2021, "Score-Based Generative Modeling through
Stochastic Differential Equations"; Salimans and Ho 2022 for v). For one Gaussian they and the solution of the
probability-flow ODE are in Wang and Vastola 2023 (arXiv 2303.02490); the low-rank mixture is that of Wang et al. 2024
(arXiv 2409.02426) with noise around the subspaces.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput

from ._covariance import DiagonalCovariance, Gain, LowRankCovariance
from ._ode import integrate
from ._process import PREDICTION_TYPES, NoiseProcess, read_scheduler

_Denoiser = TypeVar("_Denoiser", bound="MixtureDenoiser")

# Where a component has no width in some direction, the ODE is solved down to this angle; the posterior mean there is
# off by about its square.
_LAST_ANGLE = 1e-6


class MixtureDenoiser(ModelMixin, ConfigMixin):
    """Base of the denoisers. Computes in `float64`, whatever comes in, and answers in the dtype of the sample."""

    _supports_gradient_checkpointing = False
    means: torch.Tensor
    weights: torch.Tensor
    covariances: DiagonalCovariance | LowRankCovariance

    def _setup(
        self,
        covariance: str,
        rank: int,
        in_channels: int,
        sample_size: int | Sequence[int],
        num_components: int,
        num_classes: int,
        process: str,
        num_train_timesteps: int,
        sigma_data: float,
        prediction_type: str,
    ) -> None:
        allowed = ("epsilon", "v_prediction") if process == "edm" else PREDICTION_TYPES
        if prediction_type not in allowed:
            raise ValueError(
                f"`prediction_type` is {prediction_type!r}; allowed for process {process!r} are {', '.join(allowed)}."
            )
        for name, value, least in (("num_components", num_components, 1), ("num_classes", num_classes, 0)):
            if value < least:
                raise ValueError(f"`{name}` is {value!r}; it must be at least {least}.")
        self.shape = event_shape(in_channels, sample_size)
        self.dimension = math.prod(self.shape)
        self.noise_process = NoiseProcess(process, num_train_timesteps, sigma_data)
        if covariance == "diagonal":
            self.covariances = DiagonalCovariance(num_components, self.dimension)
        else:
            self.covariances = LowRankCovariance(num_components, self.dimension, rank)
        self.register_buffer("means", torch.zeros(num_components, self.dimension, dtype=torch.float64))
        uniform = torch.full((num_classes + 1, num_components), 1 / num_components, dtype=torch.float64)
        self.register_buffer("weights", uniform)

    @classmethod
    def _build(cls: type[_Denoiser], scheduler: Any, means: torch.Tensor, weights: torch.Tensor, **config: Any) -> Any:
        read, table = read_scheduler(scheduler)
        model = cls(in_channels=means.shape[1], sample_size=tuple(means.shape[2:]), **config, **read)
        if table is not None:
            model.noise_process.alphas_cumprod.copy_(table)
        model.means.copy_(means.flatten(1))
        model.weights.copy_(weights)
        return model

    # --- what a pipeline calls ---------------------------------------------------------------------------------------

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """The exact prediction of type `config.prediction_type`.

        For process `edm` it is the output of the raw network F that diffusers' EDM schedulers expect: with `epsilon`
        :math:`F = (E[x_0|x] - c_{skip} x) / c_{out}` (Karras et al. 2022, equation 7), with `v_prediction` -F.

        Args:
            sample: noisy `(batch, channels, height, width)`, scaled as a network gets it (`scale_model_input`).
            timestep: number, or tensor of shape `()`, `(1,)` or `(batch,)`; not necessarily whole.
            class_labels: integers `(batch,)` from 0 to `num_classes`, the last being the null class, which is also
                what None means.
            return_dict: whether to return an output object, or a tuple.

        Raises:
            ValueError: shapes do not fit, or a timestep or a label is out of range.
        """
        x = self._flat(sample)
        alpha, sigma = self.noise_process(timestep, len(x), x.device)
        self._refuse_no_density(sigma, timestep)
        kind = self.config.prediction_type
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        if self.noise_process.kind == "edm":
            width = self.noise_process.sigma_data if kind == "epsilon" else -self.noise_process.sigma_data
            noise_part, data_part = -width * alpha, sigma / width
        else:
            noise_part, data_part = {
                "epsilon": (one, zero),
                "sample": (zero, one),
                "v_prediction": (alpha, -sigma),
                "flow_prediction": (one, -one),
            }[kind]
        out = self._predict(x, alpha, sigma, noise_part, data_part, self._log_weights(class_labels, len(x)))
        out = out.to(sample.dtype).reshape(sample.shape)
        return UNet2DOutput(sample=out) if return_dict else (out,)

    # --- densities ---------------------------------------------------------------------------------------------------

    def log_prob(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int | None = None,
        class_labels: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        r""":math:`\log p_t(x_t)` in nats, `(batch,)`, of noisy samples, or of clean data where `timestep` is None.

        Raises:
            ValueError: as `forward`; or the data have no density at that timestep.
        """
        x = self._flat(sample)
        alpha, sigma = self.noise_process(timestep, len(x), x.device)
        self._refuse_no_density(sigma, timestep, single=True)
        joint = self._log_joint(self._centred(x, alpha), alpha, sigma, self._log_weights(class_labels, len(x)))
        return torch.logsumexp(joint, 1)

    def score(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int | None = None,
        class_labels: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        r""":math:`\nabla_{x_t} \log p_t(x_t)`, of the shape of `sample`. Arguments and errors as `log_prob`."""
        x = self._flat(sample)
        alpha, sigma = self.noise_process(timestep, len(x), x.device)
        self._refuse_no_density(sigma, timestep, single=True)
        z = self._centred(x, alpha)
        shares = self._responsibilities(z, alpha, sigma, self._log_weights(class_labels, len(x)))
        pulls = self.covariances.filter(z, lambda v: -1 / _marginal(v, alpha, sigma))
        return _mix(shares, pulls).to(sample.dtype).reshape(sample.shape)

    def posterior_mean(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int | None,
        class_labels: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """:math:`E[x_0 | x_t]`, of the shape of `sample`. Arguments and errors as `forward`."""
        x = self._flat(sample)
        alpha, sigma = self.noise_process(timestep, len(x), x.device)
        self._refuse_no_density(sigma, timestep)
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        out = self._predict(x, alpha, sigma, zero, one, self._log_weights(class_labels, len(x)))
        return out.to(sample.dtype).reshape(sample.shape)

    def posterior_covariance(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        r""":math:`\mathrm{Cov}[x_0 | x_t]`, `(batch, D, D)` over the flattened data.

        Within a component it is :math:`\sigma_t^2 \Sigma_k C_k^{-1}`. Arguments and errors as `forward`.
        """
        x = self._flat(sample)
        alpha, sigma = self.noise_process(timestep, len(x), x.device)
        self._refuse_no_density(sigma, timestep)
        z = self._centred(x, alpha)
        shares = self._responsibilities(z, alpha, sigma, self._log_weights(class_labels, len(x)))
        means = self.means.double() + self.covariances.filter(z, _gain(alpha, sigma, 0, 1))
        spread = self.covariances.matrix(
            lambda v: _safe_ratio(sigma[:, None, None] ** 2 * v, _marginal(v, alpha, sigma))
        )
        return _covariance_of_mixture(shares, means, spread).to(sample.dtype)

    def moments(self, class_labels: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean `(channels, height, width)` and covariance `(D, D)` of the clean data, or of one class of them."""
        shares = self._log_weights(class_labels, 1).exp()
        means = self.means.double()[None]
        spread = self.covariances.matrix(lambda v: v[None])
        return _mix(shares, means)[0].reshape(self.shape), _covariance_of_mixture(shares, means, spread)[0]

    def sample(
        self,
        n: int,
        timestep: torch.Tensor | float | int | None = None,
        class_labels: torch.Tensor | int | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Draw clean data, or noisy ones at `timestep`: `float64` `(n, channels, height, width)`.

        Args:
            n: how many.
            timestep: None for clean data.
            class_labels: one label, or `(n,)` of them; None for the null class.
            generator: on the model's device.

        Raises:
            ValueError: `n` is not positive, or a timestep or a label is out of range.
        """
        if n < 1:
            raise ValueError(f"`n` is {n!r}; it must be at least 1.")
        device = self.means.device
        alpha, sigma = self.noise_process(timestep, n, device)
        shares = self._log_weights(class_labels, n).exp()
        chosen = torch.multinomial(shares, 1, replacement=True, generator=generator)  # (n, 1)
        options = {"generator": generator, "device": device, "dtype": torch.float64}
        noise = torch.randn(n, 1, self.dimension, **options).expand(-1, shares.shape[1], -1)
        every = self.means.double() + self.covariances.filter(noise, lambda v: v[None].sqrt())
        clean = every.gather(1, chosen[..., None].expand(-1, -1, self.dimension)).squeeze(1)
        noisy = alpha[:, None] * clean + sigma[:, None] * torch.randn(n, self.dimension, **options)
        return noisy.reshape(n, *self.shape)

    # --- the exact solution of the sampler's equation ----------------------------------------------------------------

    @torch.no_grad()
    def exact_ode_solution(
        self,
        sample: torch.Tensor,
        t_start: float,
        t_end: float | None = None,
        class_labels: torch.Tensor | int | None = None,
        guidance_scale: float = 1.0,
        tolerance: float = 1e-12,
    ) -> torch.Tensor:
        r"""Where the probability-flow ODE leads from `sample`.

        One Gaussian has a closed form: along an eigenvector of variance l the distance to :math:`\alpha m` scales with
        :math:`\sqrt{\sigma^2 + \alpha^2 l}` (Wang and Vastola 2023). Otherwise the equation is solved numerically, in
        the angle :math:`\phi = \mathrm{atan2}(\sigma, \alpha)`, where it is :math:`dy/d\phi = v(y, \phi)` for
        :math:`y = x / \sqrt{\alpha^2 + \sigma^2}` and the v-prediction v (Salimans and Ho 2022, appendix D): smooth
        from pure noise to clean data for any schedule. On Gaussians, where the answer is known, the default tolerance
        gives ends within 1e-10. A trajectory that passes near the border between two modes multiplies its errors.

        With guidance v is :math:`v(\emptyset) + w (v(c) - v(\emptyset))` (Ho and Salimans 2022).

        Args:
            sample: state at `t_start`, `(batch, channels, height, width)`.
            t_start: timestep of `sample`, one for the whole batch.
            t_end: timestep of the result, later or earlier; None for clean data.
            class_labels: as in `forward`.
            guidance_scale: w; 1 is no guidance.
            tolerance: bound on the error of one step of the numerical solver.

        Returns:
            `float64` tensor of the shape of `sample`.

        Raises:
            ValueError: as `forward`; or the solution from `t_start` is not determined.
            RuntimeError: the tolerance cannot be reached.
        """
        x = self._flat(sample)
        (a0, s0), (a1, s1) = (self.noise_process(t, 1, x.device) for t in (t_start, t_end))
        if float(s0) == 0 and self.covariances.smallest() == 0:
            raise ValueError(
                f"`t_start` is {t_start!r}, where there is no noise; from there the solution is not unique."
            )
        labels = self._log_weights(class_labels, len(x))
        if len(self.means) == 1:
            stretch = self.covariances.filter(
                self._centred(x, a0), lambda v: (_marginal(v, a1, s1) / _marginal(v, a0, s0)).sqrt()
            )
            return (stretch + a1[:, None, None] * self.means.double()).reshape(sample.shape)
        null = self._log_weights(None, len(x))

        def guided(y: torch.Tensor, angle: torch.Tensor, velocity: bool) -> torch.Tensor:
            """Of states `(stages, batch, D)` at one angle a stage."""
            times = len(y)
            alpha, sigma = (value.repeat_interleave(len(x)) for value in (torch.cos(angle), torch.sin(angle)))
            parts = (alpha, -sigma) if velocity else (torch.zeros_like(alpha), torch.ones_like(alpha))
            states = y.flatten(0, 1)
            out = self._predict(states, alpha, sigma, *parts, labels.repeat(times, 1))
            if guidance_scale != 1:
                unconditional = self._predict(states, alpha, sigma, *parts, null.repeat(times, 1))
                out = unconditional + guidance_scale * (out - unconditional)
            return out.reshape(y.shape)

        start, end = float(torch.atan2(s0, a0)), float(torch.atan2(s1, a1))
        last = max(end, _LAST_ANGLE) if self.covariances.smallest() == 0 else end
        y = integrate(lambda y, angle: guided(y, angle, True), x / torch.hypot(a0, s0), start, last, tolerance)
        if last > end:
            y = guided(y[None], torch.full_like(y[0, :1], last), False)[0]
        return (y * torch.hypot(a1, s1)).reshape(sample.shape)

    # --- inside: x is (B, D), alpha and sigma are (B,), log weights are (B, K) ----------------------------------------

    def _predict(
        self,
        x: torch.Tensor,
        alpha: torch.Tensor,
        sigma: torch.Tensor,
        noise_part: torch.Tensor,
        data_part: torch.Tensor,
        log_weights: torch.Tensor,
    ) -> torch.Tensor:
        r""":math:`a E[\epsilon | x_t] + b E[x_0 | x_t]`, in one pass and without dividing by alpha or sigma."""
        z = self._centred(x, alpha)
        shares = self._responsibilities(z, alpha, sigma, log_weights)
        pulls = self.covariances.filter(z, _gain(alpha, sigma, noise_part[:, None, None], data_part[:, None, None]))
        return _mix(shares, data_part[:, None, None] * self.means.double() + pulls)

    def _responsibilities(
        self, z: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, log_weights: torch.Tensor
    ) -> torch.Tensor:
        if z.shape[1] == 1:  # holds where there is no density as well
            return torch.ones_like(log_weights)
        return torch.softmax(self._log_joint(z, alpha, sigma, log_weights), 1)

    def _log_joint(
        self, z: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, log_weights: torch.Tensor
    ) -> torch.Tensor:
        squares = (z * self.covariances.filter(z, lambda v: 1 / _marginal(v, alpha, sigma))).sum(-1)
        volumes = self.covariances.trace(lambda v: torch.log(_marginal(v, alpha, sigma)))
        return log_weights - (squares + volumes + self.dimension * math.log(2 * math.pi)) / 2

    def _centred(self, x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        return x[:, None] - alpha[:, None, None] * self.means.double()

    def _flat(self, sample: torch.Tensor) -> torch.Tensor:
        if sample.ndim != 4 or tuple(sample.shape[1:]) != self.shape:
            raise ValueError(
                f"`sample` has shape {tuple(sample.shape)}; this model takes (batch, {', '.join(map(str, self.shape))})."
            )
        return sample.flatten(1).double()

    def _log_weights(self, class_labels: torch.Tensor | int | None, batch: int) -> torch.Tensor:
        null = len(self.weights) - 1
        if class_labels is None:
            return torch.log(self.weights.double()[null]).expand(batch, -1)
        labels = torch.as_tensor(class_labels, device=self.weights.device)
        if labels.is_floating_point() or labels.ndim > 1 or labels.numel() not in (1, batch):
            raise ValueError(
                f"`class_labels` is {labels.dtype} of shape {tuple(labels.shape)}; it must hold integers, ({batch},)."
            )
        if not bool(((labels >= 0) & (labels <= null)).all()):
            raise ValueError(
                f"`class_labels` has values from {int(labels.min())} to {int(labels.max())}; allowed are 0 to {null}, "
                "the last being the null class."
            )
        return torch.log(self.weights.double()[labels.reshape(-1).expand(batch).long()])

    def _refuse_no_density(self, sigma: torch.Tensor, timestep: Any, single: bool = False) -> None:
        """Without noise, a distribution on a subspace has no density; a single Gaussian still has its predictions."""
        if (len(self.means) > 1 or single) and bool((sigma == 0).any()) and self.covariances.smallest() == 0:
            raise ValueError(
                f"`timestep` is {timestep!r}, where there is no noise; these data lie on subspaces and have no density "
                "there."
            )


# --- formulas --------------------------------------------------------------------------------------------------------


def _marginal(v: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    r"""Eigenvalues of :math:`\alpha^2 \Sigma + \sigma^2 I`, `(B, K, n)`, from those of :math:`\Sigma`, `(K, n)`."""
    return alpha[:, None, None] ** 2 * v + sigma[:, None, None] ** 2


def _gain(
    alpha: torch.Tensor, sigma: torch.Tensor, noise_part: torch.Tensor | int, data_part: torch.Tensor | int
) -> Gain:
    r"""From z to the z-dependent part of :math:`a E[\epsilon] + b E[x_0]` within a component."""
    a, s = alpha[:, None, None], sigma[:, None, None]
    return lambda v: _safe_ratio(noise_part * s + data_part * a * v, _marginal(v, alpha, sigma))


def _safe_ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """Zero where the denominator is: no width and no noise, so nothing to pull back."""
    positive = denominator > 0
    return torch.where(positive, numerator / torch.where(positive, denominator, 1.0), 0.0)


def _mix(shares: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return (shares[..., None] * values).sum(1)


def _covariance_of_mixture(shares: torch.Tensor, means: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """Law of total covariance, from `(B, K)`, `(B, K, D)` and `(B, K, D, D)`."""
    offsets = means - _mix(shares, means)[:, None]
    return torch.einsum("bk,bkde->bde", shares, spread + offsets[..., :, None] * offsets[..., None, :])


def event_shape(in_channels: int, sample_size: int | Sequence[int]) -> tuple[int, int, int]:
    size = (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
    if len(size) != 2 or in_channels < 1 or min(size) < 1:
        raise ValueError(
            f"`in_channels` is {in_channels!r} and `sample_size` {sample_size!r}; channels, height and width must be "
            "positive."
        )
    return in_channels, *size
